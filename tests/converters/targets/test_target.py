"""Which targets there are, which one wrote a folder, and what publishing a plan promises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.certificate import tool
from converters.certificate import write_certificate as certify
from converters.errors import MissingError, OutputError, TargetError
from converters.model.base import open_base
from converters.progress import Progress
from converters.targets.engines import PROFILES
from converters.targets.publish import publish
from converters.targets.target import (
    Plan,
    Report,
    Target,
    profiles,
    target_named,
    target_of,
    targets,
)
from dora_serve import merge, read_run, write_adapter
from tests.converters.made import certificate, make_run

OURS = ["gguf", "lorax", "merged", "onnx", "peft", "sglang", "vllm"]


def test_every_target_has_its_name_kind_and_engines() -> None:
    found = targets()
    assert list(found) == OURS
    assert [target.name for target in found.values()] == OURS
    assert {n for n, t in found.items() if t.kind == "model"} == {"merged", "onnx"}
    for name in OURS:
        assert target_named(name).name == name
        assert found[name].profile is PROFILES.get(name)
    assert found["vllm"].engines[0] == "peft" or "vllm" in found["vllm"].engines
    with pytest.raises(TargetError, match="unknown target") as caught:
        target_named("nothing")
    assert caught.value.found == "nothing"
    assert caught.value.expected == ", ".join(OURS)


def test_every_profile_and_that_of_transformers() -> None:
    found = profiles()
    assert set(found) == {"transformers", "peft", "vllm", "sglang", "lorax", "gguf"}
    assert {name: profile.name for name, profile in found.items()} == {name: name for name in found}
    assert not found["transformers"].prefix and found["peft"].prefix
    more = found["peft"].features - found["transformers"].features
    assert more == {"use_dora", "alora_invocation_tokens"}


def test_who_wrote_a_folder(llama_base: Path, llama_lora: Path, tmp_path: Path) -> None:
    write_adapter(llama_lora, tmp_path / "vllm", base=llama_base, target="vllm")
    merge(llama_lora, tmp_path / "merged", base=llama_base)
    write_adapter(llama_lora, tmp_path / "gguf", base=llama_base, target="gguf")
    for name in ("vllm", "merged", "gguf"):
        assert target_of(tmp_path / name).name == name  # by its certificate
        (tmp_path / name / "dora_export.json").unlink()
    assert target_of(tmp_path / "merged").name == "merged"  # by its look
    assert target_of(tmp_path / "vllm").name == "peft"
    assert target_of(tmp_path / "gguf").name == "gguf"
    (tmp_path / "merged" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(MissingError):
        target_of(tmp_path / "merged")
    (tmp_path / "config.json").rename(tmp_path / "merged" / "config.json")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "config.json").write_text("{}")
    with pytest.raises(MissingError):
        target_of(tmp_path / "only")
    (tmp_path / "only" / "pytorch_model.bin").touch()
    assert target_of(tmp_path / "only").name == "merged"
    assert target_of(llama_lora).name == "peft"
    (tmp_path / "merged" / "dora_export.json").write_text("{}")
    assert target_of(tmp_path / "merged").name == "merged"
    (tmp_path / "merged" / "dora_export.json").write_text('{"target": "nothing"}')
    with pytest.raises(TargetError, match="unknown target"):
        target_of(tmp_path / "merged")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="no artifact here") as caught:
        target_of(tmp_path / "empty")
    assert caught.value.file == tmp_path / "empty"
    assert ", ".join(OURS) in str(caught.value.expected)


@dataclass(frozen=True, kw_only=True)
class Small(Plan):
    """Writes one file of its own size."""

    fails: bool = False

    def write(self, folder: Path, name: str, progress: Progress) -> Report:
        (folder / "file").write_text(name)
        progress(self.nbytes)
        if self.fails:
            raise OutputError("as it is")
        modules = {"q": {"rank": 2}}
        return Report(modules=modules, details={"more": 1}, warnings=("written",))


def small(folder: Path, llama_base: Path, **more: Any) -> Small:
    values = {"target": "small", "nbytes": 3, "warnings": ("planned",), **more}
    return Small(run=make_run(folder / "run", {}), base=open_base(llama_base), **values)


def test_a_plan_becomes_a_folder_with_a_certificate(llama_base: Path, tmp_path: Path) -> None:
    told: list[int] = []

    @contextmanager
    def bar(total: int) -> Iterator[Progress]:
        told.append(total)
        yield told.append

    plan = small(tmp_path, llama_base)
    assert plan.inputs == [tmp_path / "run", llama_base]
    assert (plan.summary(), plan.lines()) == ({}, ["small of test"])
    assert (Report().summary(), Report().lines(), Report().warnings) == ({}, [], ())
    dry = publish(plan, str(tmp_path / "out"), dry_run=True, progress=bar)
    assert (dry.written, dry.warnings, told) == (False, ("planned",), [])
    assert not (tmp_path / "out").exists()
    done = publish(
        plan,
        tmp_path / "out",
        progress=bar,
        prove=lambda folder: {"read": (folder / "file").read_text()},
    )
    assert (done.written, done.path, done.plan) == (True, tmp_path / "out", plan)
    assert (done.warnings, told) == (("planned", "written"), [3, 3])
    assert done.accuracy == {"read": "out"}  # the name that the hidden folder will have
    said = certificate(tmp_path / "out")
    assert (said["target"], said["accuracy"], said["more"]) == ("small", {"read": "out"}, 1)
    assert said["modules"] == {"q": {"rank": 2}}
    assert set(said["files"]) == {"file"}
    assert said["base"]["fingerprint"] == open_base(llama_base).fingerprint
    again = publish(plan, tmp_path / "again")
    assert again.accuracy == {}
    assert "accuracy" not in certificate(tmp_path / "again")


def test_a_plan_that_may_not_be_written_is_not(llama_base: Path, tmp_path: Path) -> None:
    plan = small(tmp_path, llama_base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").touch()
    for dry in (True, False):
        with pytest.raises(OutputError, match="not empty"):
            publish(plan, tmp_path / "full", dry_run=dry)
        with pytest.raises(OutputError, match="inside an input"):
            publish(plan, llama_base / "out", dry_run=dry)
        with pytest.raises(OutputError, match="space"):
            publish(small(tmp_path, llama_base, nbytes=1 << 60), tmp_path / "out", dry_run=dry)
    with pytest.raises(OutputError, match="not written here"):
        publish(plan, tmp_path / "full", force=True)
    certify(tmp_path / "full", {"tool": tool()})
    with pytest.raises(OutputError, match="as it is"):
        publish(small(tmp_path, llama_base, fails=True), tmp_path / "full", force=True)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == [
        *("dora_export.json", "old")
    ]
    publish(plan, tmp_path / "full", force=True)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == [
        *("dora_export.json", "file")
    ]


@dataclass(frozen=True, kw_only=True)
class Stopped(Small):
    """Is interrupted when a part is written."""

    pieces = True

    def write(self, folder: Path, name: str, progress: Progress) -> Report:
        report = super().write(folder, name, progress)
        if (folder / "half").exists():
            return report
        (folder / "half").touch()
        raise KeyboardInterrupt


@pytest.mark.parametrize("resume", [True, False])
def test_what_an_interrupted_plan_leaves_to_one_that_resumes(
    llama_base: Path, tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces: list[bool] = []

    def write_certificate(folder: Path, proof: Any, pieces: bool) -> None:
        in_pieces.append(pieces)
        certify(folder, proof, pieces)

    monkeypatch.setattr("converters.targets.publish.write_certificate", write_certificate)
    plan = Stopped(
        target="small",
        nbytes=3,
        run=make_run(tmp_path / "run", {}),
        base=open_base(llama_base),
    )
    with pytest.raises(KeyboardInterrupt):
        publish(plan, tmp_path / "out", resume=resume)
    left = list(tmp_path.glob(".out.*"))
    assert bool(left) is resume and not (tmp_path / "out").exists()
    if resume:
        assert publish(plan, tmp_path / "out", resume=True).written
        assert in_pieces == [True]
        assert list(tmp_path.glob(".out.*")) == []
        publish(small(tmp_path, llama_base), tmp_path / "other")
        assert in_pieces == [True, False]


def test_what_a_target_has_that_says_nothing_else(
    tmp_path: Path, llama_base: Path, llama_lora: Path
) -> None:
    class Planless(Target):
        name, kind, options = "plain", "adapter", object

    class Plain(Planless):
        plan = None  # type: ignore[assignment]

    class Writing(Plan):
        write = None  # type: ignore[assignment]

    run = make_run(tmp_path / "run", {})
    with pytest.raises(TypeError, match=r"abstract method '?plan"):
        Planless()  # type: ignore[abstract]
    with pytest.raises(TypeError, match=r"abstract method '?write"):
        Plan(target="plain", run=run, base=None, nbytes=0)  # type: ignore[abstract]
    plain = Plain()
    assert (plain.engines, plain.profile, plain.holds(tmp_path)) == ((), None, False)
    lora = read_run(llama_lora)
    opened = plain.open(llama_lora, open_base(llama_base), lora, "peft")
    ids = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    assert opened.read([ids]).values[0].shape == (1, 1, 80)
    with pytest.raises(TargetError, match="not installed"):
        plain.open(tmp_path, open_base(llama_base), run, "no such engine")
    without = Writing(target="plain", run=run, base=None, nbytes=0)
    assert (without.inputs, without.pieces, without.warnings) == ([run.path], False, ())
    assert json.loads(json.dumps(without.certificate(Report()), default=str))["target"] == "plain"
