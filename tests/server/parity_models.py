"""The models whose answers are compared with vLLM's, saved for either server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from tests.conftest import MODELS
from tests.server import parity
from tests.server.parity_more import CLASSIFIER, DEFAULTS, EMBEDDER

TWICE = "twice"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ before }}{{ message.content }}{% endfor %}"
)


def save_base(folder: Path, **said: object) -> None:
    """The decoder, with a chat template; `said`: what its generation_config.json says."""
    shutil.copytree(MODELS / parity.MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    if said:
        (folder / "generation_config.json").write_text(json.dumps(said))


def save_encoder(folder: Path, head: type, layers: int = 2, **more: object) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = RobertaConfig(
        **shape, vocab_size=36, intermediate_size=48, max_position_embeddings=34,
        initializer_range=0.3, **more,
    )  # fmt: skip
    head(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODELS / "tiny-roberta-base").save_pretrained(folder)


def save_twice(folder: Path, **said: object) -> str:
    """The decoder whose chats begin twice, as those of `/v1/responses` do in vLLM; its name."""
    save_base(folder / TWICE, **said)
    (folder / TWICE / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    return TWICE


def save(group: str, folder: Path) -> str:
    """The model of a group, below `folder`; its name."""
    if group == "decoder":
        save_base(folder / parity.MODEL)
        return parity.MODEL
    if group == "defaults":
        save_base(folder / parity.MODEL, **DEFAULTS)
        return parity.MODEL
    if group == "classifier":
        labels: Any = {"id2label": {0: "bad", 1: "good", 2: "none"}}
        save_encoder(folder / CLASSIFIER, RobertaForSequenceClassification, num_labels=3, **labels)
        return CLASSIFIER
    save_encoder(folder / EMBEDDER, RobertaModel)
    _save_modules(folder / EMBEDDER)
    return EMBEDDER


def _save_modules(folder: Path) -> None:
    """Those of sentence-transformers: the mean, of length one."""
    modules = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules.items())
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    mean = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(mean))
