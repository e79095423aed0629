"""Bad input: one of our errors that names what is wrong, before anything is written."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_serve import DoraExportError, ReadOptions, merge, read_run, write_adapter
from tests.conftest import tiny_llama
from tests.processes import commands
from tests.reference_layout import ALPHA, START_RANK

FILE = "model.safetensors"
Q = "model.model.layers.0.self_attn.q_proj"


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    """Change, add or (None) remove tensors of a safetensors file."""
    tensors = {**load_file(path), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, path, {"format": "pt"})


def drop_b(run: Path, _base: Path) -> None:
    edit(run / FILE, **{f"{Q}.lora_b_linear.weight": None})


def short_scaler(run: Path, _base: Path) -> None:
    edit(run / FILE, **{f"{Q}.lora_scaler": torch.ones(START_RANK - 1)})


def other_rank(run: Path, _base: Path) -> None:
    edit(run / FILE, **{f"{Q}.lora_b_linear.weight": torch.ones(32, START_RANK + 1)})


def wrong_shape(run: Path, _base: Path) -> None:
    edit(run / FILE, **{f"{Q}.lora_a_linear.weight": torch.ones(START_RANK, 31)})


def nan_in_a(run: Path, _base: Path) -> None:
    edit(run / FILE, **{f"{Q}.lora_a_linear.weight": torch.full((START_RANK, 32), float("nan"))})


def inf_in_base(_run: Path, base: Path) -> None:
    # Not an adapted tensor's neighbour but the adapted weight itself.
    name = "model.layers.0.self_attn.q_proj.weight"
    edit(base / FILE, **{name: torch.full((32, 32), float("inf"))})


def other_base(_run: Path, base: Path) -> None:
    tensors = load_file(base / FILE)
    name = "model.layers.1.mlp.gate_proj.weight"
    edit(base / FILE, **{name: tensors[name] + 1e-3})


def wider_base(_run: Path, base: Path) -> None:
    shutil.rmtree(base)
    tiny_llama(hidden_size=40).save_pretrained(base)


def truncated_run(run: Path, _base: Path) -> None:
    os.truncate(run / FILE, (run / FILE).stat().st_size - 7)


def truncated_base(_run: Path, base: Path) -> None:
    os.truncate(base / FILE, (base / FILE).stat().st_size - 7)


def missing_config(_run: Path, base: Path) -> None:
    (base / "config.json").unlink()


def no_weights(_run: Path, base: Path) -> None:
    (base / FILE).unlink()


def missing_shard(_run: Path, base: Path) -> None:
    names = list(load_file(base / FILE))
    (base / FILE).unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (base / f"{FILE}.index.json").write_text(json.dumps(index))


def shard_outside(_run: Path, base: Path) -> None:
    (base / FILE).rename(base.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (base / f"{FILE}.index.json").write_text(json.dumps(index))


def other_start_rank(run: Path, _base: Path) -> None:
    change_info(run, adaptive_lora_start_rank="12")


def no_alpha(run: Path, _base: Path) -> None:
    change_info(run, lora_alpha=None)


def alpha_is_text(run: Path, _base: Path) -> None:
    change_info(run, lora_alpha="eight")


def alpha_is_nan(run: Path, _base: Path) -> None:
    change_info(run, lora_alpha="nan")


def alpha_is_huge(run: Path, _base: Path) -> None:
    change_info(run, lora_alpha="1e300")


def scalar_b(run: Path, _base: Path) -> None:
    edit(run / FILE, **{f"{Q}.lora_b_linear.weight": torch.tensor(1.0)})


def weights_are_a_folder(_run: Path, base: Path) -> None:
    (base / FILE).unlink()
    (base / FILE).mkdir()


def listed_model_type(_run: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": ["llama"]}))


def change_info(run: Path, **changes: str | None) -> None:
    path = Path(str(run.parent).replace("/Checkpoint/", "/Log/")) / "task_info.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def code_in_prune_state(run: Path, _base: Path) -> None:
    torch.save({"finally_mask_dict": Evil()}, run / "prune_state_dict.pt")


def code_in_weights(run: Path, _base: Path) -> None:
    (run / FILE).unlink()
    torch.save({f"{Q}.lora_a_linear.weight": Evil()}, run / "pytorch_model.bin")


def stray_tensor(run: Path, _base: Path) -> None:
    edit(run / FILE, **{"elsewhere.weight": torch.ones(2)})


def empty_run(run: Path, _base: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


def no_run(run: Path, _base: Path) -> None:
    shutil.rmtree(run)


Damage = Callable[[Path, Path], None]
CASES: list[tuple[Damage, str]] = [
    (drop_b, "lora_b_linear"),
    (short_scaler, r"\[5\](.|\n)*\[6\]"),
    (other_rank, "of different rank"),
    (wrong_shape, r"does not fit(.|\n)*\[32, 32\](.|\n)*\[32, 31\]"),
    (nan_in_a, "NaN or infinity"),
    (inf_in_base, "q_proj"),
    (other_base, "not the base the run was trained on(.|\n)*gate_proj"),
    (wider_base, r"another shape|does not fit"),
    (truncated_run, "file size"),
    (truncated_base, "file size"),
    (missing_config, "config.json"),
    (no_weights, "no weights"),
    (missing_shard, "model-00001-of-00002.safetensors"),
    (shard_outside, "outside"),
    (other_start_rank, "start rank differs(.|\n)*12"),
    (no_alpha, "`lora_alpha`"),
    (alpha_is_text, "not a number"),
    (alpha_is_nan, "not a number"),
    (alpha_is_huge, "not a number"),
    (scalar_b, r"\[32, 32\](.|\n)*\[32\]"),
    (weights_are_a_folder, "cannot be read(.|\n)*model.safetensors"),
    (listed_model_type, "model_type"),
    (code_in_prune_state, "more than tensors"),
    (code_in_weights, "more than tensors"),
    (stray_tensor, "elsewhere.weight"),
    (empty_run, "no run found"),
    (no_run, "no such run"),
]


@pytest.fixture
def base(llama_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_base, tmp_path / "base"))


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test the working folder holds no output, no temporary folder, no sign of code."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield
    assert list(work.iterdir()) == []


def test_the_undamaged_run_merges(dora_run: Path, base: Path, tmp_path: Path) -> None:
    merge(dora_run, tmp_path / "out", base=base)
    assert (tmp_path / "out" / FILE).exists()


@pytest.mark.parametrize(
    ("damage", "says"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_merge_refuses(damage: Damage, says: str, dora_run: Path, base: Path) -> None:
    damage(dora_run, base)
    with pytest.raises(DoraExportError, match=says):
        merge(dora_run, "out", base=base)


@pytest.mark.parametrize("damage", [drop_b, nan_in_a, other_base, wider_base, no_alpha])
def test_adapter_refuses(damage: Damage, dora_run: Path, base: Path) -> None:
    damage(dora_run, base)
    with pytest.raises(DoraExportError):
        write_adapter(dora_run, "out", base=base)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha_pattern"),
        ({"rank_pattern": {r"(.|..|...)+[!?]": 4}}, "takes longer than"),
        ({"rank_pattern": {"q{99999999999}": 4}}, "not a regular expression"),
        ({"rank_pattern": {"(" * 5000 + "q" + ")" * 5000: 4}}, "not a regular expression"),
        ({"peft_type": ["LORA"]}, "no run found"),
    ],
)
def test_configurations_of_the_wrong_kind(
    changes: dict[str, object], says: str, llama_lora: Path, base: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(llama_lora, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(DoraExportError, match=says):
        write_adapter(adapter, "out", base=base)


def test_an_alpha_that_is_no_number_is_refused(llama_lora: Path) -> None:
    with pytest.raises(DoraExportError, match="lora_alpha"):
        read_run(llama_lora, ReadOptions(lora_alpha=math.nan))


def test_lost_log_folder_needs_alpha(dora_run: Path, tmp_path: Path) -> None:
    info = Path(str(dora_run.parent).replace("/Checkpoint/", "/Log/")) / "task_info.json"
    moved = info.rename(tmp_path / "info.json")
    with pytest.raises(DoraExportError, match="`task_info`"):
        read_run(dora_run)
    by_alpha = read_run(dora_run, ReadOptions(lora_alpha=ALPHA))
    by_info = read_run(dora_run.parent, ReadOptions(task_info=moved))
    assert by_alpha.updates.keys() == by_info.updates.keys() != set()
    for module in by_alpha.updates:
        one, two = by_alpha.updates[module].components(), by_info.updates[module].components()
        assert one is not None
        assert two is not None
        assert torch.equal(one.c, two.c)


def test_output_inside_an_input_or_not_empty(dora_run: Path, base: Path, tmp_path: Path) -> None:
    for target in (dora_run / "out", dora_run, base / "out", base.parent):
        with pytest.raises(DoraExportError, match=r"inside an input|not empty"):
            merge(dora_run, target, base=base, force=True)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    with pytest.raises(DoraExportError, match="`force`"):
        merge(dora_run, full, base=base)
    assert (full / "mine").read_text() == "keep"
    with pytest.raises(DoraExportError, match="found: mine"):
        merge(dora_run, full, base=base, force=True)
    assert (full / "mine").read_text() == "keep"
    (full / "mine").unlink()
    merge(dora_run, full, base=base)
    before = (full / FILE).stat().st_ino
    merge(dora_run, full, base=base, force=True)
    assert (full / FILE).stat().st_ino != before


def test_no_space_is_found_before_writing(
    dora_run: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(DoraExportError, match="not enough space"):
        merge(dora_run, "out", base=base)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from dora_serve.commands import dora_export
dora_export(["merge", sys.argv[1], "out", "--base", sys.argv[2]])
"""


def test_a_failing_write_leaves_nothing(dora_run: Path, base: Path) -> None:
    command = [str(commands() / "python"), "-c", LIMITED, str(dora_run), str(base)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: reading or writing failed: File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_inputs_are_never_changed(dora_run: Path, base: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before = {**content(dora_run), **content(base)}
    merge(dora_run, tmp_path / "out", base=base)
    write_adapter(dora_run, tmp_path / "adapter", base=base)
    assert {**content(dora_run), **content(base)} == before


@pytest.mark.parametrize(("kinds", "finished"), [("bb", True), ("bf", False), ("fb", False)])
def test_pruning_is_finished_when_every_mask_is_boolean(
    dora_run: Path, tmp_path: Path, kinds: str, finished: bool
) -> None:
    run = Path(shutil.copytree(dora_run, tmp_path / "run"))
    dtypes = {"b": torch.bool, "f": torch.float32}
    masks = {str(n): torch.ones(2, dtype=dtypes[kind]) for n, kind in enumerate(kinds)}
    torch.save({"finally_mask_dict": masks}, run / "prune_state_dict.pt")
    read = read_run(run, ReadOptions(lora_alpha=ALPHA))
    assert read.finished is finished
    assert bool(read.warnings) is not finished


def test_an_empty_configuration_is_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    """What the kernel makes up, as /proc/kmsg, has no size, and its reader may wait for ever."""
    (tmp_path / "adapter_config.json").touch()
    (tmp_path / "adapter_model.safetensors").touch()
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(DoraExportError, match="empty"):
        read_run(tmp_path)
