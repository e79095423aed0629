"""A folder is parsed once for all readers, and a command reads each tensor of a run once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from converters.files.tensors import SafetensorsTensor
from converters.readers import RunFolder, read_run, run_folder
from converters.run import LazyUpdates
from converters.updates import memo
from converters.updates.rank_one import RankOneSum
from dora_serve import merge, write_adapter
from dora_serve.commands import dora_export

MODULES = 6  # of `llama_lora`


def counting(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, float]:
    """How many elements of each of the run's tensors were read, as a share of all it has."""
    counts: dict[str, float] = defaultdict(float)
    original = SafetensorsTensor.read_into

    def counted(self: SafetensorsTensor, buffer: torch.Tensor, start: int) -> None:
        if self.path.parent == folder:
            counts[self.name] += buffer.numel() / torch.Size(self.shape).numel()
        original(self, buffer, start)

    monkeypatch.setattr(SafetensorsTensor, "read_into", counted)
    return counts


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, llama_lora: Path) -> dict[str, float]:
    return counting(monkeypatch, llama_lora)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The updates whose components were checked to be independent."""
    shapes: list[tuple[int, int]] = []
    original = RankOneSum.reduced

    def counted(self: RankOneSum) -> RankOneSum:
        shapes.append(self.shape)
        return original(self)

    monkeypatch.setattr(RankOneSum, "reduced", counted)
    return shapes


@pytest.mark.parametrize(
    ("command", "checks"),
    [
        (["merge", "RUN", "OUT"], MODULES),
        (["merge", "RUN", "OUT", "--dry-run"], MODULES),
        (["adapter", "RUN", "OUT"], MODULES),
        (["adapter", "RUN", "OUT", "--target", "vllm"], MODULES),
        (["adapter", "RUN", "OUT", "--dry-run"], MODULES),
        (["adapter", "RUN", "OUT", "--max-rank", "2"], MODULES),
        (["inspect", "RUN"], MODULES),
        (["inspect", "RUN", "--html", "OUT", "--curve"], MODULES),
        (["onnx", "RUN", "OUT", "--dry-run"], 0),
        (["onnx", "OUT", "--adapter", "a=RUN", "--dry-run"], MODULES),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_a_command_reads_each_tensor_once(
    tmp_path: Path,
    llama_base: Path,
    llama_lora: Path,
    read: dict[str, float],
    checked: list[tuple[int, int]],
    command: list[str],
    checks: int,
) -> None:
    out = tmp_path / ("out.html" if "--html" in command else "out")
    words = [word.replace("RUN", str(llama_lora)).replace("OUT", str(out)) for word in command]
    result = CliRunner().invoke(dora_export, [*words, "--base", str(llama_base)])
    assert result.exit_code == 0, result.output
    assert len(checked) == checks
    assert len(read) == (2 * MODULES if checks else 0)
    assert set(read.values()) <= {1.0}


def test_verify_leaves_the_reading_to_peft(
    tmp_path: Path, llama_base: Path, llama_lora: Path, read: dict[str, float]
) -> None:
    merge(llama_lora, tmp_path / "out", base=llama_base)
    read.clear()
    words = ["verify", str(llama_lora), str(tmp_path / "out"), "--base", str(llama_base)]
    result = CliRunner().invoke(dora_export, words)
    assert result.exit_code == 0, result.output
    assert "truth" in result.output and not read  # the truth is PEFT's own model
    assert "QLoRA" in result.output  # what the numbers say nothing of


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "RUN", "OUT"],
        ["adapter", "RUN", "OUT"],
        ["inspect", "RUN"],
        ["verify", "RUN", "MERGED"],
        ["onnx", "RUN", "OUT"],
        pytest.param(["onnx", "OUT", "--adapter", "a=RUN"], marks=pytest.mark.further),
    ],
    ids=lambda value: "-".join(value),
)
def test_each_factor_is_read_once_where_the_live_model_is_made_of_them_too(
    tmp_path: Path,
    llama_base: Path,
    dora_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    """Of a method that PEFT has not: the proof reads the run as the artifact's writer does."""
    if "MERGED" in command:
        merge(dora_run, tmp_path / "merged", base=llama_base)
    read = counting(monkeypatch, dora_run)
    places = {
        "RUN": str(dora_run),
        "OUT": str(tmp_path / "out"),
        "MERGED": str(tmp_path / "merged"),
    }
    words = [word.replace("RUN", places["RUN"]) for word in command]
    words = [places.get(word, word) for word in words]
    result = CliRunner().invoke(dora_export, [*words, "--base", str(llama_base)])
    assert result.exit_code == 0, result.output
    factors = {name: share for name, share in read.items() if ".lora_" in name}
    assert len(factors) == 3 * 2 * 4  # A, B and the scaler, of four modules in two layers
    assert set(factors.values()) == {1.0}


def test_a_merge_reads_once_without_memory_and_an_adapter_does_not(
    tmp_path: Path,
    llama_base: Path,
    llama_lora: Path,
    read: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[str] = []
    monkeypatch.setattr(memo.Memo, "remember", lambda _self, name, _update: kept.append(name))
    result = merge(llama_lora, tmp_path / "merged", base=llama_base)
    assert not kept  # whatever the size of the run
    assert len(read) == 2 * MODULES and set(read.values()) == {1.0}
    assert set(result.plan.ranks.values()) == {2, 4} and set(read.values()) == {1.0}
    read.clear()
    write_adapter(llama_lora, tmp_path / "adapter", base=llama_base)
    assert kept and set(read.values()) == {2.0}  # for the plan, and for the file


def test_readers_parse_a_folder_once(llama_lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: Counter[str] = Counter()
    for name in ("open_file", "read_json"):
        original = getattr(run_folder, name)

        def counted(path: Path, original: Callable[[Path], object] = original) -> object:
            parsed[path.name] += 1
            return original(path)

        monkeypatch.setattr(run_folder, name, counted)
    read_run(llama_lora)
    assert parsed == {"adapter_config.json": 1, "adapter_model.safetensors": 1}


def test_shapes_are_those_of_the_updates(llama_lora: Path, read: dict[str, float]) -> None:
    run = read_run(llama_lora)
    shapes = dict(run.strip().shapes)
    assert not read and len(shapes) == MODULES
    assert shapes == {module: update.shape for module, update in run.updates.items()}


def sums(count: int, loaded: Counter[str]) -> LazyUpdates:
    def load(name: str) -> RankOneSum:
        loaded[name] += 1
        return RankOneSum(torch.ones(1, 90), torch.ones(1), torch.ones(9, 1))  # 400 bytes

    return LazyUpdates({str(n): partial(load, str(n)) for n in range(count)})


def test_what_is_held_has_one_bound_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST_BYTES", 4 * 400)
    loaded: Counter[str] = Counter()
    first, second = sums(3, loaded), sums(3, Counter())
    for name in first:
        assert first[name] is first[name]
    assert set(loaded.values()) == {1}
    assert first["0"] is not None and second["0"] and second["1"]  # 0 was used, 1 is the oldest
    assert [first.rank(name) for name in first] == [1, 1, 1] and set(loaded.values()) == {1}
    first["0"], first["2"]
    assert set(loaded.values()) == {1}
    first["1"]
    assert loaded == {"0": 1, "1": 2, "2": 1}


def test_the_run_knows_its_files(llama_lora: Path) -> None:
    folder = RunFolder(llama_lora)
    assert folder.has("adapter_config.json") and not folder.has(
        "adapter_config.json", "config.json"
    )
    assert folder.first("config.json", "adapter_config.json") == llama_lora / "adapter_config.json"
    assert folder.below("x").path == llama_lora / "x" and folder.checkpoint is None
