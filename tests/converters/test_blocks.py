"""A merge goes block by block: however the blocks fall, it is PEFT's own merge, rounded once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from converters.errors import DoraExportError, OutputError
from converters.files.output import output_folder
from converters.files.tensors import open_safetensors, same_values
from converters.updates.rank_one import RankOneSum, rank_for
from converters.updates.stacked import Stacked
from dora_serve import merge
from dora_serve.vllm.fleet import Matrix
from tests.conftest import randomize

ELEMENTS = "converters.targets.merged.stream.BLOCK_ELEMENTS"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def cases(
    llama_base: Path, llama_lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[type, Path, Path]]:
    """Class, base and adapter: weights stored as `[out, in]`, and as `[in, out]`."""
    root = tmp_path_factory.mktemp("conv1d")
    torch.manual_seed(0)
    shape = GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=30, n_positions=16)
    GPT2LMHeadModel(shape).save_pretrained(root / "base")
    lora = LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(root / "base"), lora)
    randomize(model)
    model.save_pretrained(root / "lora")
    return {
        "plain": (LlamaForCausalLM, llama_base, llama_lora),
        "transposed": (GPT2LMHeadModel, root / "base", root / "lora"),
    }


def stored(base: Path, out: Path, dtype: torch.dtype) -> Path:
    """The base with its weights in `dtype`."""
    out.mkdir()
    for path in base.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(rounded, out / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    (out / "config.json").write_text(json.dumps({**config, key: str(dtype).split(".")[1]}))
    return out


def merged_by_peft(cls: type, base: Path, lora: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge in float32."""
    model = cls.from_pretrained(base, dtype=torch.float32)  # type: ignore[attr-defined]
    whole = PeftModel.from_pretrained(model, str(lora)).merge_and_unload()
    return dict(whole.state_dict())


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(["plain", "transposed"]),
    elements=st.integers(1, 3000),
    inner=st.sampled_from(FLOATS),
    outer=st.sampled_from([None, *FLOATS]),
)
def test_any_blocks_and_dtypes(
    cases: dict[str, tuple[type, Path, Path]],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    elements: int,
    inner: torch.dtype,
    outer: torch.dtype | None,
) -> None:
    cls, plain, lora = cases[kind]
    root = tmp_path_factory.mktemp("blocks")
    base = stored(plain, root / "base", inner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ELEMENTS, elements)
        merge(lora, root / "out", base=base, dtype=outer)
    truth = merged_by_peft(cls, base, lora)
    before = load_file(base / "model.safetensors")
    found = load_file(root / "out" / "model.safetensors")
    assert found.keys() == before.keys()
    touched = 0
    for name, tensor in found.items():
        assert tensor.dtype == (outer or inner)
        wanted = truth[name if name in truth else f"transformer.{name}"]
        # The nearest value of the dtype, or its neighbour where PEFT's float32 sum rounds otherwise
        # within its own last places.
        error = (tensor.double() - wanted.double()).abs()
        bound = wanted.double().abs() * torch.finfo(tensor.dtype).eps / 2 * 1.02 + 2e-6
        assert bool((error <= bound).all()), name
        touched += not torch.equal(tensor, before[name].to(tensor.dtype))
    assert touched >= (6 if kind == "plain" else 3)  # the control: these the adapter changes


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(elements=st.integers(16, 600), at=st.floats(0.05, 0.95), dtype=st.sampled_from(FLOATS))
def test_a_merge_stopped_anywhere_and_continued(
    llama_base: Path,
    llama_lora: Path,
    tmp_path_factory: pytest.TempPathFactory,
    elements: int,
    at: float,
    dtype: torch.dtype,
) -> None:
    root = tmp_path_factory.mktemp("continued")
    LlamaForCausalLM.from_pretrained(llama_base).save_pretrained(
        root / "base", max_shard_size="12KB"
    )
    assert len(list((root / "base").glob("*.safetensors"))) > 3
    stopped: list[int] = []

    @contextmanager
    def stopping(total: int) -> Iterator[Callable[[int], None]]:
        told = 0

        def tell(count: int) -> None:
            nonlocal told
            told += count
            if told > at * total:
                stopped.append(told)
                raise KeyboardInterrupt

        yield tell

    options: Any = {"base": root / "base", "dtype": dtype}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ELEMENTS, elements)
        merge(llama_lora, root / "whole", **options)
        with pytest.raises(KeyboardInterrupt):
            merge(llama_lora, root / "out", resume=True, progress=stopping, **options)
        assert stopped
        assert not (root / "out").exists()
        merge(llama_lora, root / "out", resume=True, **options)
    names = sorted(path.name for path in (root / "whole").glob("*.safetensors"))
    assert len(names) > 3
    for name in names:
        assert (root / "out" / name).read_bytes() == (root / "whole" / name).read_bytes()


def test_a_weight_beyond_the_output_dtype_is_refused(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    base = stored(llama_base, tmp_path / "base", torch.float32)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for number, value in enumerate((1e5, -1e5, float("inf"), float("nan"))):
        tensors[name][-1, -1] = value
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(DoraExportError, match="beyond the output dtype"):
            merge(llama_lora, tmp_path / str(number), base=base, dtype=torch.float16)
        assert not (tmp_path / str(number)).exists()
    tensors[name][-1, -1] = 6e4
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merge(llama_lora, tmp_path / "out", base=base, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_what_is_no_float_keeps_its_dtype(
    dtype: torch.dtype, llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    base = stored(llama_base, tmp_path / "base", torch.float32)
    counts = torch.arange(40).to(dtype)
    tensors = {**load_file(base / "model.safetensors"), "model.steps": counts}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merge(llama_lora, tmp_path / "out", base=base, dtype=torch.bfloat16)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["model.steps"].dtype == dtype
    assert torch.equal(found["model.steps"], counts)
    assert found["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("step", range(1, 8))
def test_updates_of_single_rows_by_blocks(step: int) -> None:
    first = RankOneSum(torch.randn(2, 5), torch.ones(2), torch.randn(3, 2))
    second = RankOneSum(torch.randn(1, 5), torch.ones(1), torch.randn(2, 1))
    parts = ((torch.tensor([0, 2, 3]), first), (torch.tensor([4, 6]), second))
    update, weight = Stacked((7, 5), parts), torch.randn(7, 5)
    expected = weight.clone()
    for rows, part in parts:
        expected[rows] += part.b @ torch.diag(part.c) @ part.a
    blocks = [update.merge(weight[s : s + step].clone(), s) for s in range(0, 7, step)]
    assert torch.allclose(torch.cat(blocks), expected, atol=1e-6)
    assert not torch.equal(expected, weight)


def test_a_component_without_a_column_of_b_is_stripped() -> None:
    b = torch.ones(3, 2)
    b[:, 0] = 0
    assert RankOneSum(torch.randn(2, 4), torch.ones(2), b).strip().rank == 1


def test_all_energy_needs_no_zeros() -> None:
    assert rank_for(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), None, 1.0) == 2


def test_tensors_of_several_blocks_are_compared_to_their_end(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1200, 1000), "b": torch.zeros(1200, 1000)}
    tensors["b"][-1, -1] = 1
    for name, tensor in tensors.items():
        save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    a, b, again = (open_safetensors(tmp_path / f"{n}.safetensors")["w"] for n in "aba")
    assert not same_values(a, b)
    assert same_values(a, again)


def test_another_command_wrote_the_output_meanwhile(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="meanwhile"),
        output_folder(tmp_path / "out") as folder,
    ):
        (folder / "a").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "b").write_text("theirs")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    assert (tmp_path / "out" / "b").read_text() == "theirs"


def test_experts_count_in_a_slot_of_vllm() -> None:
    assert Matrix(4, 6, 3).nbytes(8, 2) == 3 * Matrix(4, 6).nbytes(8, 2) == 3 * 8 * 10 * 2
