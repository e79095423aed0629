"""Bases of made-up files: what their tensors are called, which way round they lie, what is none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from converters.errors import BaseError, DoraExportError, MissingError, TensorFileError
from converters.model.base import open_base
from tests.converters.made import WEIGHTS
from tests.converters.model.bases import make_base

INDEX = "model.safetensors.index.json"


def test_names_with_and_without_prefixes(tmp_path: Path) -> None:
    names = ["model.a.weight", "head.weight", "bert.b.weight", "model.b.weight", "c", "x.c2"]
    base = make_base(tmp_path / "base", {name: torch.ones(1) for name in names})
    found = {
        "model.a.weight": "model.a.weight",
        "a.weight": "model.a.weight",
        "base_model.model.model.a.weight": "model.a.weight",
        "module.model.a.weight": "model.a.weight",
        "base_model.model.head.weight": "head.weight",
        "model.head.weight": "head.weight",
        "roberta.a.weight": None,
        "other.head.weight": "head.weight",
        "b.weight": None,  # of two
        "c": "c",
        "c2": "x.c2",
        "a": None,
        "nothing.weight": None,
    }
    assert {name: base.find(name) for name in found} == found


def test_weights_of_modules_and_parameters(tmp_path: Path) -> None:
    embed, bias = torch.ones(3, 2), torch.ones(4)
    base = make_base(tmp_path / "base", {"model.embed_tokens.weight": embed, "model.q.bias": bias})
    for name, tensor in (
        ("model.embed_tokens", "model.embed_tokens.weight"),
        ("embed_tokens", "model.embed_tokens.weight"),
        ("model.q.bias", "model.q.bias"),
        ("lm_head", "model.embed_tokens.weight"),
    ):
        weight = base.weight(name)
        assert weight is not None and weight.name == tensor
    assert base.weight("model.q") is None
    assert base.weight("other_head") is None


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "transformer.wte.weight", "shared.weight"),
        *("bert.embeddings.word_embeddings.weight", "backbone.embeddings.weight"),
    ],
)
def test_the_embedding(tmp_path: Path, name: str) -> None:
    others = {"model.position_embeddings.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    assert make_base(tmp_path / "none", others).embedding is None
    base = make_base(tmp_path / "base", {**others, name: torch.ones(2)})
    assert base.embedding == name


@pytest.mark.parametrize(
    ("module", "stored", "shape", "kind", "embedding", "expected"),
    [
        ("m.q", (3, 2), (3, 2), "llama", False, False),
        ("m.q", (2, 3), (3, 2), "llama", False, True),
        ("m.q", (2, 2), (2, 2), "llama", False, False),
        ("m.c_attn", (2, 2), (2, 2), "llama", False, False),
        ("m.c_attn", (2, 2), (2, 2), "gpt2", False, True),
        ("m.c_proj", (2, 2), (2, 2), "openai-gpt", False, True),
        ("m.c_fc", (2, 2), (2, 2), "imagegpt", False, True),
        ("m.q_attn", (2, 2), (2, 2), "decision_transformer", False, True),
        ("m.c_fc", (2, 2), (2, 2), "clvp", False, True),
        ("m.q", (2, 2), (2, 2), "gpt2", False, False),
        ("c_attn.q", (2, 2), (2, 2), "gpt2", False, False),
        ("m.wte", (2, 2), (2, 2), "gpt2", True, False),
        ("m.c_attn", (2, 2), (2, 2), "gpt2", True, False),
        ("m.conv", (4, 3, 2), (12, 2), "llama", False, False),
        ("m.bias", (5,), (1, 5), "llama", False, False),
        ("m.q", (3, 2), (3, 3), "llama", False, None),
        ("m.q", (3, 2), (6, 1), "llama", False, None),
        ("m.e", (2, 3), (3, 2), "llama", True, None),
        ("m.conv", (2, 1, 12), (12, 2), "llama", False, None),
    ],
)
def test_which_way_round_a_weight_lies(
    tmp_path: Path,
    module: str,
    stored: tuple[int, ...],
    shape: tuple[int, int],
    kind: str,
    embedding: bool,
    expected: bool | None,
) -> None:
    name = module if module.endswith("bias") else f"{module}.weight"
    base = make_base(tmp_path / "base", {name: torch.ones(stored)}, model_type=kind)
    if expected is None:
        with pytest.raises(BaseError, match="does not fit") as caught:
            base.is_transposed(module, shape, embedding)
        assert (caught.value.found, caught.value.expected) == (list(stored), list(shape))
        assert (caught.value.file, caught.value.tensor) == (base.path / WEIGHTS, name)
    else:
        assert base.is_transposed(module, shape, embedding) is expected
    with pytest.raises(BaseError, match="no such module") as caught:
        base.is_transposed("none", shape)
    assert caught.value.tensor == "none.weight"


def test_the_dtype_of_most_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(10).half(), "b": torch.ones(6), "c": torch.ones(3).half()}
    assert make_base(tmp_path / "one", tensors).dtype() == torch.float16
    tensors["b"] = torch.ones(7)
    assert make_base(tmp_path / "two", tensors).dtype() == torch.float32


@pytest.mark.parametrize("size", [0, 1, 1024, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_fingerprints(tmp_path: Path, size: int) -> None:
    """BLAKE3 of dtype, shape and every element, which are read in blocks."""
    data, bias = torch.randn(size), torch.ones(2)
    base = make_base(tmp_path / "base", {"m.weight": data, "b": bias})
    said = f"torch.float32 [{size}]".encode()
    assert base.fingerprint == {
        "m.weight": blake3(said + data.numpy().tobytes()).hexdigest(),
        "b": blake3(b"torch.float32 [2]" + bias.numpy().tobytes()).hexdigest(),
    }
    assert base.unlike(base.fingerprint) == []
    assert base.unlike({**base.fingerprint, "b": "x", "c": "y"}) == ["b", "c"]
    assert base.unlike({"b": base.fingerprint["b"]}) == ["m.weight"]


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def wrong_type(folder: Path) -> None:
    write(folder, "config.json", {"model_type": 3})


def indexed(weight_map: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        write(folder, INDEX, {"weight_map": weight_map})

    return damage


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (no_config, MissingError, "no config.json"),
        (no_weights, MissingError, "no weights"),
        (wrong_type, BaseError, "model_type"),
        (indexed(None), BaseError, "no weight_map"),
        (indexed({}), BaseError, "no weight_map"),
        (indexed(["a"]), BaseError, "no weight_map"),
        (indexed({"x": "../base/a.safetensors"}), BaseError, "outside"),
        (indexed({"x": "/etc/passwd"}), BaseError, "outside"),
        (indexed({"x": "b.safetensors"}), MissingError, "is missing"),
        (indexed({"x": "a.safetensors", "y": "a.safetensors"}), BaseError, "does not hold"),
    ],
)
def test_folders_that_are_no_base(
    tmp_path: Path, damage: Callable[[Path], None], kind: type[DoraExportError], says: str
) -> None:
    make_base(tmp_path / "base", {"x": torch.ones(1)})
    damage(tmp_path / "base")
    with pytest.raises(kind, match=says):
        open_base(tmp_path / "base")


def test_what_is_opened(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {"x": torch.ones(1)}, model_type="llama")
    assert (base.path, base.name) == (tmp_path / "base", str(tmp_path / "base"))
    assert base.config == {"model_type": "llama"}
    assert list(base.shards) == [tmp_path / "base" / WEIGHTS]
    torch.save({"y": torch.ones(1)}, tmp_path / "base" / "pytorch_model.bin")
    assert list(open_base(tmp_path / "base").tensors) == ["x"]  # safetensors first
    (tmp_path / "base" / WEIGHTS).unlink()
    assert list(open_base(tmp_path / "base").tensors) == ["y"]


def test_shards_come_in_their_order_with_only_the_files_of_the_index(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    make_base(folder, {"x": torch.ones(1)})
    (folder / WEIGHTS).unlink()
    for name in "cab":
        save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    write(folder, INDEX, {"weight_map": {n: f"{n}.safetensors" for n in "ca"}})
    base = open_base(folder)
    assert [path.name for path in base.shards] == ["a.safetensors", "c.safetensors"]
    assert list(base.tensors) == ["a", "c"]


@pytest.mark.parametrize("name", ["no/such-model", "x" * 5000, "none"])
def test_names_of_no_model(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="no such base model") as caught:
        open_base(name)
    assert caught.value.file == name


def test_an_identity_is_of_tensors_and_configuration(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2), "a": torch.arange(3)}
    base = make_base(tmp_path / "base", tensors, model_type="x", b=1, a={"d": 2, "c": [3]})
    said = [sorted(base.fingerprint.items()), base.config]
    known = blake3(json.dumps(said, sort_keys=True).encode()).hexdigest()
    assert base.identity == known
    same = make_base(tmp_path / "same", tensors, a={"c": [3], "d": 2}, b=1, model_type="x")
    assert same.identity == known
    other = make_base(tmp_path / "other", tensors, model_type="x", b=1, a={"d": 2, "c": [4]})
    assert other.identity != known and other.fingerprint == base.fingerprint
    more = make_base(tmp_path / "more", {**tensors, "a": torch.arange(3) + 1}, **base.config)
    assert more.identity != known


def test_hashes_that_are_known_are_not_those_of_a_base_that_came_since(tmp_path: Path) -> None:
    """The other model was seen before, so that nothing has to be read to tell its hashes."""
    base = make_base(tmp_path / "base", {"a": torch.zeros(3)})
    other = make_base(tmp_path / "other", {"a": torch.ones(3)})
    (file,), (new,) = base.shards, other.shards
    new.replace(file)
    time.sleep(0.2)  # until what is found out of the file is remembered
    assert list(open_base(base.path).fingerprint) == ["a"]
    with pytest.raises(TensorFileError, match="changed while it was read"):
        _ = base.identity
