"""Files that once ended in a crash or a hang: now in our errors, or in nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from converters.errors import DoraExportError
from converters.files.tensors import open_file
from converters.model.layout import split_slice
from converters.run import strip_update
from converters.updates.rank_one import RankOneSum

from .mutate import SPLIT
from .targets import TARGETS
from .test_targets import ends

LONG = "9" * 5000
_Q = "base_model.model.model.layers.0.self_attn.q_proj"


def entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adapter_config.json", {"base_model_name_or_path": LONG}),
        ("adapter_config.json", {"base_model_name_or_path": "\ud800"}),
        ("base config.json, merged and GGUF", {"num_hidden_layers": 1 << 31}),
        ("base config.json, merged and GGUF", {"num_attention_heads": 3}),
        ("base config.json, merged and GGUF", {"num_key_value_heads": -2}),
        ("base config.json, merged and GGUF", {"num_attention_heads": True}),
        ("base config.json, merged and GGUF", {"a": "\ud800"}),
        ("base config.json, merged and GGUF", {
            "architectures": ["LlamaModel"], "num_labels": 1 << 40, "num_hidden_layers": 1 << 31}),
        ("shard index", {"weight_map": {"lm_head.weight": LONG}}),
    ],
)  # fmt: skip
def test_configurations(name: str, change: dict[str, object], tmp_path: Path) -> None:
    target, work = TARGETS[name], tmp_path / "work"
    data = json.dumps({**json.loads(target.prepare(work)[0]), **change}).encode()
    with ends():
        target(work, data)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({f"{_Q}.lora_B.bias": entry([16], 0, 64)}, 64),
        ({f"{_Q}\ud800.lora_A.weight": entry([1], 0, 4)}, 4),
        ({"a": entry([0, *[34] * 15], 0, 0)}, 34),
        ({"a": entry([1] * 100, 0, 4)}, 4),
    ],
    ids=["a bias alone", "half a surrogate", "overflow", "100 axes"],
)
def test_weights(header: dict[str, object], size: int, tmp_path: Path) -> None:
    target, work = TARGETS["adapter_model.safetensors"], tmp_path / "work"
    target.prepare(work)
    with pytest.raises(DoraExportError):
        target.read(work, json.dumps(header).encode() + SPLIT + bytes(size))


def test_a_head_of_one_number_is_another_tensor(tmp_path: Path) -> None:
    target, work = TARGETS["adapter_model.safetensors"], tmp_path / "work"
    target.prepare(work)
    header = {"base_model.model.score.weight": entry([], 0, 4)}
    target.read(work, json.dumps(header).encode() + SPLIT + bytes(4))


def test_half_a_surrogate_in_a_torch_file(tmp_path: Path) -> None:
    torch.save({"a\ud800": torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(DoraExportError, match="not a plain tensor"):
        open_file(tmp_path / "x.bin")


def test_an_expert_of_5000_digits_is_no_expert() -> None:
    assert split_slice("experts.up[3]") == ("experts.up", 3)
    assert split_slice(f"experts.up[{LONG}]") == (f"experts.up[{LONG}]", None)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_products_beyond_float32(value: float) -> None:
    """Each factor in the file is finite; a gate times a column is not."""
    update = RankOneSum(torch.ones(2, 3), torch.ones(2), torch.ones(4, 2))
    assert strip_update(update, "q_proj", Path("run")).shape == (4, 3)
    update.b[1, 1] = value
    with pytest.raises(DoraExportError, match=r"finite(.|\n)*q_proj"):
        strip_update(update, "q_proj", Path("run"))


@pytest.mark.parametrize("opcode", [pickle.BINUNICODE8, pickle.BINBYTES8, pickle.BYTEARRAY8])
def test_a_string_longer_than_memory_in_a_torch_file(opcode: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x80\x05" + opcode + (1 << 60).to_bytes(8, "little") + b"a.")
    with pytest.raises(DoraExportError, match="torch cannot read"):
        open_file(path)


def test_a_graph_whose_input_is_called_by_what_is_no_text(tmp_path: Path) -> None:
    target = TARGETS["ONNX graph"]
    seed, *_ = target.prepare(tmp_path / "x")
    name = b"past_key_values.0.key"
    assert seed.count(name) > 0
    with ends():
        target(tmp_path / "x", seed.replace(name, b"\xff" + name[1:]))
