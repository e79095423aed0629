"""A quantized base in planning for vLLM and in ONNX: judged by its class, computed in floats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.model.base import open_base
from converters.readers import ReadOptions, read_run
from dora_serve.api import merge, write_onnx
from dora_serve.folder.pairing import fits, told
from dora_serve.proof.verify import verify
from dora_serve.vllm.command import serve_options
from dora_serve.vllm.fleet import Pool
from tests.converters.made import WEIGHTS
from tests.converters.merged.test_quantized_ints import awq_base, gptq_base
from tests.converters.quantized import adapter, packed_base, plain_base


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "plain", torch.float16)


def test_slots_and_dtype_are_those_of_the_class(plain: Path, tmp_path: Path) -> None:
    run = adapter(plain, tmp_path / "run")
    pools = []
    for base in (plain, gptq_base(plain, tmp_path / "base", "4 bits")[0]):
        read = read_run(run, ReadOptions(base=base))
        opened = open_base(base)
        assert fits(read, opened)
        ranks = {module: rank for module, rank in read.ranks.items() if rank is not None}
        pools.append(Pool("base", opened, "causal-lm", {"run": ranks}))
    one, other = pools
    assert one.matrices == other.matrices and one.slot == other.slot > 0
    assert other.base_bytes == sum(
        t.nbytes for t in load_file(tmp_path / "base" / WEIGHTS).values()
    )
    assert other.base_bytes < one.base_bytes
    dtypes = [serve_options(pool, {"run": run}, gpu=False)["dtype"] for pool in pools]
    assert dtypes == ["float16", "float16"]


def test_one_shard_with_another_name_is_found(plain: Path, tmp_path: Path) -> None:
    """As hubs hold models that were saved in one piece by a large shard size."""
    shard = "model-00001-of-00001.safetensors"
    tensors = load_file(plain / WEIGHTS)
    (plain / WEIGHTS).rename(plain / shard)
    (plain / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)})
    )
    run = adapter(plain, tmp_path / "run")
    merge(run, tmp_path / "out", base=plain)
    found = verify(read_run(run, ReadOptions(base=plain)), tmp_path / "out", plain)
    assert found.passed, found


def test_the_dtype_of_a_base_that_is_not_known(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(gptq_base(plain, tmp_path / "base", "4 bits")[0] / WEIGHTS)
    other = packed_base(plain, tmp_path / "other", tensors, {"quant_method": "exl9"})
    pool = Pool("base", open_base(other), "causal-lm", {})
    assert serve_options(pool, {}, gpu=False)["dtype"] == "float16"


def test_parts_in_several_files(plain: Path, tmp_path: Path) -> None:
    """Each weight lies where its largest part did, and a file of scales alone is gone."""
    base, truth = awq_base(plain, tmp_path / "base")
    tensors = load_file(base / WEIGHTS)
    (base / WEIGHTS).unlink()
    scales = {n: t for n, t in tensors.items() if n.endswith(".scales")}
    files = {
        "a.safetensors": scales,
        "b.safetensors": {n: tensors[n] for n in tensors.keys() - scales},
    }
    for file, held in files.items():
        save_file(held, base / file, {"format": "pt"})
    index = {name: file for file, held in files.items() for name in held}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    run = adapter(plain, tmp_path / "run")
    merge(run, tmp_path / "out", base=base, dtype="float32")
    assert [path.name for path in sorted((tmp_path / "out").glob("*.safetensors"))] == [
        "b.safetensors"
    ]
    merged = load_file(tmp_path / "out" / "b.safetensors")
    assert merged.keys() == truth.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(merged[name], truth[name])
    found = verify(read_run(run, ReadOptions(base=base)), tmp_path / "out", base)
    assert found.passed, found


def test_merged_into_what_was_not_quantized_it_says_how_far_that_is(
    plain: Path, tmp_path: Path
) -> None:
    base, truth = awq_base(plain, tmp_path / "base")
    run = adapter(plain, tmp_path / "run", ["q_proj", "down_proj"])
    config = json.loads((run / "adapter_config.json").read_text())
    own = load_file(plain / WEIGHTS)
    adapted = [name for name in own if name.endswith(("q_proj.weight", "down_proj.weight"))]
    apart = sum(float((truth[n].double() - own[n].double()).square().sum()) for n in adapted)
    apart = (apart / sum(float(own[n].double().square().sum()) for n in adapted)) ** 0.5
    assert 0.01 < apart < 0.5
    for named, said in (
        (str(base), f"it is another model, if a close one (its weights are {apart:.1%} apart)"),
        ("somebody/llama-awq", "it is another model, if a close one"),
        ("somebody/llama", "as was asked for"),
        (str(plain), ""),
    ):
        config["base_model_name_or_path"] = named
        (run / "adapter_config.json").write_text(json.dumps(config))
        warnings = told(read_run(run, ReadOptions(base=plain)), open_base(plain)).warnings
        assert len(warnings) == bool(said)
        assert all(warning.endswith(said) for warning in warnings)


@pytest.mark.parametrize("merged", [pytest.param(True, marks=pytest.mark.further), False])
def test_onnx(merged: bool, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    base, _ = awq_base(plain, tmp_path / "base")
    run = read_run(adapter(plain, tmp_path / "run"), ReadOptions(base=base))
    if merged:
        write_onnx(base, tmp_path / "out", run=run)
    else:
        write_onnx(base, tmp_path / "out", adapters={"run": run})
    found = verify(run, tmp_path / "out", base)
    assert found.passed and str(found.dequantized).startswith("this tool"), found
    assert not list((tmp_path / "out").glob(".*"))
