"""The parameters of vLLM's requests are those that the embedded server knows: tests/data has them
with their defaults, for tests where vLLM is not installed."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

FILE = Path(__file__).parents[2] / "data" / "vllm_parameters.json"
# vLLM's request, and where it is.
KINDS = {
    "CompletionRequest": "openai.completion.protocol",
    "ChatCompletionRequest": "openai.chat_completion.protocol",
    "EmbeddingCompletionRequest": "pooling.embed.protocol",
    "ClassificationCompletionRequest": "pooling.classify.protocol",
    "TokenizeCompletionRequest": "serve.tokenize.protocol",
    "TokenizeChatRequest": "serve.tokenize.protocol",
    "DetokenizeRequest": "serve.tokenize.protocol",
}


def parameters(kind: str) -> dict[str, Any]:
    """Every parameter of vLLM's request with its default; null for those that must be given, and
    for those whose default is another each time."""
    found = getattr(import_module(f"vllm.entrypoints.{KINDS[kind]}"), kind)
    always = {name: field for name, field in found.model_fields.items() if name != "request_id"}
    defaults = {
        name: None if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in always.items()
    }
    return {**defaults, **{name: None for name in found.model_fields if name not in defaults}}


def test_the_known_parameters_are_vllms() -> None:
    """A new one fails here: add it to the file, and to the server's own list."""
    assert {kind: parameters(kind) for kind in KINDS} == json.loads(FILE.read_text())
