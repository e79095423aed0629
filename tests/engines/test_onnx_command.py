"""`dora-export onnx` as a script meets it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from dora_serve.batch.convert import convert
from dora_serve.batch.job import Job
from dora_serve.commands import dora_export
from dora_serve.onnxruntime.decoder import Decoder
from tests.conftest import MODELS

BASE = MODELS / "tiny-llama-base"
RUNS = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8"
DOWN, SECOND = (RUNS / name / f"Tiny_Llama--{name}--1" for name in ("Count_Down", "Every_Second"))


def export(*arguments: object) -> Any:
    return CliRunner().invoke(dora_export, ["onnx", *map(str, arguments)])


def test_adapters_are_written_named_and_added(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = export(out, "--base", BASE, "--adapter", f"down={DOWN}", "--precision", "int4", "--json")
    assert made.exit_code == 0, made.output
    info = json.loads(made.stdout)
    assert info["precision"] == "int4"
    assert info["adapters"].keys() == info["accuracy"].keys() == {"down"}
    assert max(info["adapters"]["down"].values()) == 12
    assert json.loads((out / "dora_export.json").read_text())["accuracy"] == info["accuracy"]

    added = export("--add", out, "--base", BASE, "--adapter", SECOND, "--json")
    assert added.exit_code == 0, added.output
    info = json.loads(added.stdout)
    assert info["adapters"].keys() == {SECOND.name}  # named by its folder
    assert "precision" not in info  # it is the folder's, which this call does not choose
    done = Decoder(out).generate(["count : nine"] * 2, ["down", SECOND.name])
    assert [row.text.split()[0] for row in done] == ["eight", "eleven"]

    again = export("--add", out, "--base", BASE, "--adapter", SECOND)
    assert again.exit_code == 1
    assert "there already" in again.output


def test_what_is_added_to_a_folder_of_somebody_elses(tmp_path: Path) -> None:
    """Of a certificate with other types, and a link in the place of the adapters' folder."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    assert export(out, "--base", BASE, "--adapter", f"down={DOWN}").exit_code == 0
    certificate = out / "dora_export.json"
    whole = json.loads(certificate.read_text())
    add = partial(export, "--add", out, "--base", BASE, "--adapter")

    certificate.write_text(json.dumps({**whole, "files": None}))
    for more in ((), ("--dry-run",)):
        refused = add(f"one={SECOND}", *more)
        assert refused.exit_code == 1 and "does not list the artifact's files" in refused.output
    certificate.write_text(json.dumps({**whole, "accuracy": None}))
    assert add(f"one={SECOND}").exit_code == 0

    (out / "adapters").rename(elsewhere)
    (out / "adapters").symlink_to(elsewhere)
    refused = add(f"two={SECOND}")
    assert refused.exit_code == 1 and "folder is a link" in refused.output
    assert {file.name for file in elsewhere.iterdir()} == {"down.onnx_adapter", "one.onnx_adapter"}


def test_every_way_to_a_graph_says_how_exact_it_is(tmp_path: Path) -> None:
    words = ["export", DOWN, tmp_path / "one", "--base", BASE, "--target", "onnx", "--json"]
    done = CliRunner().invoke(dora_export, [*map(str, words)])
    assert done.exit_code == 0, done.output
    job = Job("two", str(SECOND), str(BASE), "onnx", "onnx", tmp_path / "two")
    record = convert(job)
    assert record is not None and record.error is None
    for name in ("one", "two"):
        accuracy = json.loads((tmp_path / name / "dora_export.json").read_text())["accuracy"]
        assert accuracy.keys() == {"merged"}
        assert accuracy["merged"]["max_abs"] < 1e-4 < accuracy["merged"]["control"]
    assert json.loads(done.stdout)["accuracy"].keys() == {"merged"}


def test_what_cannot_be_meant_is_a_usage_error(tmp_path: Path) -> None:
    for arguments in ([tmp_path], [DOWN, tmp_path, "--adapter", SECOND], []):
        assert export(*arguments, "--base", BASE).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_one_name_are_two(tmp_path: Path) -> None:
    """Trainers call the folders of all runs alike (`checkpoint-500`): none is left out."""
    runs = [tmp_path / name / "checkpoint-500" for name in ("one", "two")]
    for source, run in zip((DOWN, SECOND), runs, strict=True):
        run.parent.mkdir()
        CliRunner().invoke(dora_export, ["adapter", str(source), str(run)])
    named = [f"--adapter={run}" for run in runs], [f"--adapter=same={run}" for run in runs]
    for words in (*named, ["--add", *named[1], "--force"]):
        done = export(tmp_path / "out", "--base", BASE, *words, "--dry-run")
        assert done.exit_code == 2
        assert "two adapters would be called" in done.output and "NAME=RUN" in done.output
    at_hub = tmp_path / "models--me--mine/snapshots/0123"
    at_hub.parent.mkdir(parents=True)
    runs[0].rename(at_hub)  # `me/mine`, and no adapter's name has a slash
    done = export(tmp_path / "out", "--base", BASE, "--adapter", at_hub, "--dry-run", "--json")
    assert json.loads(done.stdout)["adapters"].keys() == {"mine"}
    at_hub.rename(runs[0])
    apart = [f"--adapter={run.parent.name}={run}" for run in runs]
    done = export(tmp_path / "out", "--base", BASE, *apart, "--dry-run", "--json")
    assert json.loads(done.stdout)["adapters"].keys() == {"one", "two"}


def test_add_ignores_nothing(tmp_path: Path) -> None:
    """`--add RUN OUT` did nothing and was a success; a precision was not heeded."""
    more = ["--add", tmp_path, "--base", BASE, "--adapter", SECOND]
    for words in (
        ["--add", DOWN, tmp_path, "--base", BASE],
        ["--add", tmp_path, "--base", BASE],
        [*more, "--precision", "int8"],
        [*more, "--calibrate", __file__],
    ):
        done = export(*words)
        assert done.exit_code == 2, done.output
    assert list(tmp_path.iterdir()) == []


def test_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = export(out, "--base", BASE, "--adapter", f"down={DOWN}", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    info = json.loads(planned.stdout)
    assert info["graphs"] == ["model.onnx", "batched.onnx"]
    assert max(info["adapters"]["down"].values()) == 12
    merged = export(DOWN, out, "--base", BASE, "--dry-run", "--precision", "int8")
    assert merged.stdout.startswith(f"would write {out}: model.onnx, int8, ")
    other = MODELS / "tiny-roberta-base"
    for arguments in ([DOWN, out], ["--adapter", DOWN, out], ["--add", "--adapter", DOWN, out]):
        assert export(*arguments, "--base", other, "--dry-run").exit_code == 1
    assert list(tmp_path.iterdir()) == []
