"""What a request leaves open is what the base's generation_config.json says, as vLLM has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from converters.errors import DoraExportError
from dora_serve.commands.up import command
from dora_serve.server.chat_template import ChatTemplate
from dora_serve.server.options import ServerOptions
from dora_serve.server.wire.defaults import Defaults, read_defaults
from tests.server import parity_models, parity_more
from tests.server.conftest import BASE, Server, started
from tests.server.parity import LONG
from tests.server.test_parity import asked_alike

ANSWERS = parity_more.answers()["defaults"]
OTHER = "{{ bos_token }}count : {{ messages[0].content }}{{ tail }}"


def written(folder: Path, **said: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def said(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("defaults")
    parity_models.save_base(root / BASE, **parity_more.DEFAULTS)
    parity_models.save_twice(root, **parity_more.DEFAULTS)
    with started(root, place) as running:
        yield running


@pytest.mark.parametrize("name", parity_more.OF_DEFAULTS)
def test_as_vllm(said: Server, name: str) -> None:
    asked_alike(said, "defaults", name)


def test_the_defaults_change_what_is_said() -> None:
    """The control."""
    used = {name: ANSWERS[name]["choices"][0] for name in ("nothing", "ignoring ends")}
    assert [each["finish_reason"] for each in used.values()] == ["stop", "length"]
    assert ANSWERS["chat"]["usage"]["completion_tokens"] == parity_more.DEFAULTS["max_new_tokens"]
    assert ANSWERS["other end"]["choices"][0]["stop_reason"] == 20
    assert ANSWERS["own end"]["choices"][0]["stop_reason"] is None


def test_flags_against_them(said: Server, place: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    parity_models.save_base(root / BASE, **parity_more.DEFAULTS)
    template = tmp_path / "other.jinja"
    template.write_text(OTHER)
    bound = written(tmp_path / "bound", temperature=0, max_new_tokens=3, eos_token_id=30)
    plain = {"model": BASE, "prompt": LONG, "max_tokens": 10, "min_tokens": 3}
    body = {**plain, "repetition_penalty": 1.0, "temperature": 0}
    chat = {"model": BASE, "messages": [{"role": "user", "content": "nine"}], "max_tokens": 2}
    values = {"chat_template_kwargs": {"tail": " ten"}, "return_token_ids": True}
    with said.http as http:
        asked = [http.post("/v1/completions", json=each).json() for each in (body, plain)]
    expected, penalized = (each["choices"][0]["text"].split()[:3] for each in asked)
    assert expected != penalized  # the control
    options = ServerOptions(threads=1, generation_config=str(bound), chat_template=str(template))
    with started(root, place, None, options) as running, running.http as http:
        told = http.post("/v1/completions", json=plain).json()["choices"][0]
        assert told["finish_reason"] == "length"
        assert told["text"].split() == expected  # bounded, and no penalty
        ends = {}
        for token in (2, 20, 30):  # the tokenizer's, the base's and the other file's, as in vLLM
            biased = {"model": BASE, "prompt": LONG, "logit_bias": {str(token): 100}}
            (choice,) = http.post("/v1/completions", json=biased).json()["choices"]
            ends[token] = choice["finish_reason"], choice["stop_reason"]
        assert ends == {2: ("stop", None), 20: ("length", None), 30: ("stop", 30)}
        answer = http.post("/v1/chat/completions", json={**chat, **values}).json()
        text = "<s>count : nine ten"
        assert ChatTemplate(root / BASE, OTHER).render(
            chat["messages"], True, {"tail": " ten"}  # type: ignore[arg-type]
        ) == text  # fmt: skip
        same = http.post(
            "/tokenize", json={"model": BASE, "prompt": text, "add_special_tokens": False}
        )
        assert answer["prompt_token_ids"] == same.json()["tokens"]


def test_what_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", temperature=0.5, top_k=None, do_sample=False, max_new_tokens=9)
    assert read_defaults(folder, "auto") == Defaults(temperature=0.5, max_new_tokens=9)
    assert read_defaults(folder, "vllm") == Defaults()
    assert read_defaults(tmp_path, "auto") == Defaults()
    found = read_defaults(tmp_path, str(folder))
    assert found == Defaults(temperature=0.5, max_new_tokens=9, longest=9, ends=frozenset())
    several = written(tmp_path / "b", eos_token_id=[3, 4])
    assert read_defaults(tmp_path, str(several)).ends == frozenset((3, 4))


def test_what_an_encoder_decoder_draws_from(tmp_path: Path) -> None:
    """The fifty likeliest where its file says nothing, as transformers has it."""
    for said, top_k in (({}, 50), ({"top_k": 0}, 0), ({"top_k": 7}, 7)):
        folder = written(tmp_path / str(top_k), do_sample=True, **said)
        assert read_defaults(folder, "auto", reads=True).top_k == top_k
        assert read_defaults(folder, "auto").top_k == said.get("top_k")
    assert read_defaults(written(tmp_path / "greedy"), "auto", reads=True).top_k is None


@pytest.mark.parametrize("said", [{"temperature": -1}, {"top_p": "x"}, {"max_new_tokens": 0}])
def test_what_cannot_be_heeded(tmp_path: Path, said: dict[str, Any]) -> None:
    (name,) = said
    with pytest.raises(DoraExportError, match=name):
        read_defaults(written(tmp_path / "a", **said), "auto")
    with pytest.raises(DoraExportError, match="no such generation configuration"):
        read_defaults(tmp_path, str(tmp_path / "none"))


@pytest.mark.parametrize("words", [["--generation-config", "vllm"], ["--chat-template", __file__]])
def test_they_are_for_one_engine(place: Path, words: list[str]) -> None:
    done = CliRunner().invoke(command, [str(place), "--engine", "vllm", *words])
    assert done.exit_code == 2
    assert f"{words[0]} is for --engine onnxruntime" in done.output
