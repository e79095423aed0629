"""Batches that go wrong in odd ways: what is there stays, and the status says what became of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from converters.errors import OutputError
from converters.files.cores import cores
from dora_serve.batch import Job, ManifestError, plan_batch
from dora_serve.batch.local import on_processes
from dora_serve.batch.status import locked
from dora_serve.commands import dora_export
from dora_serve.folder.cache import content_key
from tests.conftest import quick, tiny_llama
from tests.dora_serve.test_batch import (
    WEIGHTS,
    batch,
    copies,
    delta,
    litter,
    outputs,
    states,
    status,
    wait_for,
    workers_of,
)
from tests.dora_serve.test_commands import EXPORT


def lines(path: Path, *entries: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.further
def test_what_ended_is_in_the_status_though_the_next_run_takes_long(
    llama_lora: Path, tmp_path: Path
) -> None:
    runs = copies(llama_lora, tmp_path / "runs", 15)
    manifest = lines(tmp_path / "m", *({"run": str(run)} for run in runs))
    out = tmp_path / "out"
    command = [str(EXPORT), "batch", str(manifest), str(out), "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        wait_for(lambda: outputs(out) >= 5)
        (worker,) = workers_of(process.pid)
        worker.suspend()
        try:  # The last may be there and not yet told.
            wait_for(lambda: len(states(out).get("done", [])) >= outputs(out) - 1)
        finally:
            process.kill()
            worker.resume()
    done = states(out)["done"]
    again = batch(manifest, out)
    assert (again.done, again.skipped) == (15, len(done))


@pytest.mark.further
def test_what_starts_workers_is_killed(llama_lora: Path, tmp_path: Path) -> None:
    """While it imports what workers need, which takes it a second and more."""
    out = tmp_path / "out"
    command = [str(EXPORT), "batch", str(lines(tmp_path / "m", {"run": str(llama_lora)})), str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:

        def starters() -> list[psutil.Process]:
            below = psutil.Process(process.pid).children()
            return [each for each in below if any("forkserver" in w for w in each.cmdline())]

        wait_for(lambda: bool(starters()))
        for each in starters():
            each.kill()
        assert "1 done" in process.communicate(timeout=120)[0]
    assert process.returncode == 0


@pytest.mark.further
def test_no_worker_writes_on_when_the_command_was_killed(llama_lora: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama(vocab_size=400_000).save_pretrained(base)  # some time to write
    manifest = lines(tmp_path / "m", {"run": str(llama_lora), "base": str(base), "to": "merged"})
    out = tmp_path / "out"
    command = [str(EXPORT), "batch", str(manifest), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        wait_for(lambda: litter(out))
        workers = workers_of(process.pid)
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    wait_for(lambda: not litter(out))
    assert [path.name for path in out.iterdir()] == ["batch.json"]
    assert states(out) == {"pending": ["lora"]}


def test_the_status_is_written_through_no_link(llama_lora: Path, tmp_path: Path) -> None:
    manifest, out = lines(tmp_path / "m", {"run": str(llama_lora)}), tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_text("mine")
    (out / ".batch.json").symlink_to(tmp_path / "mine")
    assert batch(manifest, out).done == 1
    assert (tmp_path / "mine").read_text() == "mine"
    assert states(out) == {"done": ["lora"]}


def test_one_batch_at_a_time(llama_lora: Path, tmp_path: Path) -> None:
    manifest, out = lines(tmp_path / "m", {"run": str(llama_lora)}), tmp_path / "out"
    with locked(out), pytest.raises(OutputError, match="another batch"):
        batch(manifest, out)
    assert not list(out.iterdir())
    assert batch(manifest, out).done == 1


def test_names_that_meet_what_an_earlier_batch_made(llama_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = str(llama_lora)
    assert batch(lines(tmp_path / "m", {"run": run, "name": "a"}), out).done == 1
    assert batch(lines(tmp_path / "m", {"run": run, "name": "b/c"}), out).done == 1
    for name in ("a/x", "b"):
        manifest = lines(tmp_path / "m", {"run": run, "name": name})
        with pytest.raises(ManifestError, match="to one place"):
            plan_batch(manifest, out, force=True)
    assert states(out) == {"done": ["a", "b/c"]}


def test_no_output_goes_through_a_link(llama_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "b").mkdir(parents=True)
    (out / "a").symlink_to("b")
    (out / "loop").symlink_to("loop")
    run = str(llama_lora)
    for entries in (
        [{"run": run, "name": "a"}, {"run": run, "name": "b"}],
        [{"run": run, "name": "loop"}],
    ):
        with pytest.raises(ManifestError, match="through a link"):
            plan_batch(lines(tmp_path / "m", *entries), out)


def test_no_output_replaces_another_entrys_run(llama_lora: Path, tmp_path: Path) -> None:
    copies(llama_lora, tmp_path / "runs", 2)
    one, other = (f"{tmp_path}/runs/run-00{number}" for number in (0, 1))
    manifest = lines(tmp_path / "m", {"run": one, "name": "run-001"}, {"run": other, "name": "x"})
    with pytest.raises(OutputError, match="inside an input"):
        plan_batch(manifest, tmp_path / "runs", force=True)


def test_a_folder_that_a_failed_run_did_not_make_stays(llama_lora: Path, tmp_path: Path) -> None:
    (run,) = copies(llama_lora, tmp_path / "runs", 1)
    weights = (run / WEIGHTS).read_bytes()
    (run / WEIGHTS).write_bytes(b"no tensors")
    manifest, out = lines(tmp_path / "m", {"run": str(run)}), tmp_path / "out"
    assert batch(manifest, out).failed.keys() == {run.name}
    (run / WEIGHTS).write_bytes(weights)
    notes = out / run.name / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        plan_batch(manifest, out)
    assert notes.read_text() == "mine"
    shutil.rmtree(notes.parent)
    assert batch(manifest, out).done == 1


@pytest.mark.parametrize("run", ["/" + "x" * 5000, "/nowhere/\ud800", "nowhere/\udcff"])
def test_a_run_that_no_folder_can_be_called_has_failed(run: str, tmp_path: Path) -> None:
    manifest, out = lines(tmp_path / "m", {"run": run, "name": "a"}), tmp_path / "out"
    done = CliRunner().invoke(dora_export, ["batch", str(manifest), str(out), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["failed"].keys() == {"a"}
    assert status(out)["a"]["error"]


@pytest.mark.parametrize("name", ["batch.json/a", "/".join(["part"] * 1000)])
def test_a_name_that_cannot_be_written(name: str, llama_lora: Path, tmp_path: Path) -> None:
    manifest = lines(tmp_path / "m", {"run": str(llama_lora), "name": name})
    with pytest.raises(ManifestError, match="below the output"):
        plan_batch(manifest, tmp_path / "out")


def test_a_moved_base_is_named_anew(llama_lora: Path, llama_base: Path, tmp_path: Path) -> None:
    manifest, out = lines(tmp_path / "m", {"run": str(llama_lora)}), tmp_path / "out"
    for name in ("one", "other"):
        base = shutil.copytree(llama_base, tmp_path / name)
        assert batch(manifest, out, str(base)).skipped == 0
        config = json.loads((out / "lora" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
    assert batch(manifest, out, str(base)).skipped == 1


def test_a_run_that_changes_while_it_is_read_is_not_done(
    llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = copies(llama_lora, tmp_path / "runs", 1)
    manifest, out = lines(tmp_path / "m", {"run": str(run)}), tmp_path / "out"
    config = run / "adapter_config.json"

    def meanwhile(*args: Any, **asked: Any) -> str:
        config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 60'))
        return content_key(*args, **asked)

    with monkeypatch.context() as patched:
        patched.setattr("dora_serve.batch.convert.content_key", meanwhile)
        summary = batch(manifest, out)
    assert "changed while" in summary.failed[run.name]
    assert batch(manifest, out).done == 1
    assert (delta(out / run.name) - delta(run)).norm() <= 1e-6 * delta(run).norm()


def test_a_dry_run_says_by_its_exit_code_what_cannot_be_read(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    (_, broken) = copies(llama_lora, root, 2)
    shutil.copytree(llama_base, root / "base")
    (broken / WEIGHTS).write_bytes(b"no tensors")
    words = ["batch", str(root), str(tmp_path / "out"), "--dry-run", "--json"]
    done = CliRunner().invoke(dora_export, words)
    assert done.exit_code == 1
    plan = json.loads(done.stdout)
    assert [job["name"] for job in plan["runs"]] == ["run-000"]
    assert plan["failed"].keys() == {"run-001"}


def test_few_runs_have_all_cores(llama_lora: Path, tmp_path: Path) -> None:
    job = Job("a", str(llama_lora), None, "adapter", "peft", tmp_path / "a")
    results = on_processes([job], 4 * len(cores()))
    while next(results) is None:
        pass
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    assert sorted(os.sched_getaffinity(worker.pid)) == cores()
    results.close()
    assert not multiprocessing.active_children()


def test_what_was_changed_or_added_stays_and_what_is_gone_is_made_anew(
    llama_lora: Path, tmp_path: Path
) -> None:
    manifest, out = lines(tmp_path / "m", {"run": str(llama_lora), "name": "run"}), tmp_path / "out"
    assert batch(manifest, out).done == 1
    whole = (out / "run" / WEIGHTS).read_bytes()
    for name in ("README.md", WEIGHTS):  # a card that somebody wrote, or damage: nobody can tell
        (out / "run" / name).write_bytes(b"mine")
        for force in (False, True):
            assert f"found: {name}" in batch(manifest, out, force=force).failed["run"]
            assert (out / "run" / name).read_bytes() == b"mine"
        (out / "run" / name).unlink()
        again = batch(manifest, out)
        assert (again.done, again.skipped) == (1, 0)
        assert (out / "run" / WEIGHTS).read_bytes() == whole
    notes = out / "run" / "notes.txt"
    notes.write_text("mine")
    assert "found: notes.txt" in batch(manifest, out).failed["run"]
    assert notes.read_text() == "mine"
    notes.unlink()
    (out / "run" / "dora_export.json").write_text("{}")
    assert batch(manifest, out).failed.keys() == {"run"}
    assert (out / "run" / "dora_export.json").read_text() == "{}"
    assert (out / "run" / WEIGHTS).read_bytes() == whole


def test_nothing_is_put_beside_what_no_batch_wrote(llama_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    manifest = tmp_path / "runs.jsonl"
    manifest.write_text(json.dumps({"run": str(llama_lora), "name": "run"}))
    with pytest.raises(OutputError, match="not empty"):
        plan_batch(manifest, out)
    assert [path.name for path in out.iterdir()] == ["letter.txt"]
    assert len(plan_batch(manifest, out, force=True).jobs) == 1


@pytest.mark.parametrize(
    "name",
    quick(
        ["a\tb", "b\\c", "y" * 240, "batch.json", " led", "\udcff", "a\u202eb"],
        *("a\tb", "batch.json", "\udcff"),
    ),
)
def test_a_folder_that_no_output_can_be_called_is_one_line(
    name: str, llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """It was an error of all."""
    shutil.copytree(llama_base, tmp_path / "all" / "base")
    for each in ("good", name):
        shutil.copytree(llama_lora, tmp_path / "all" / each)
    out = tmp_path / "out"
    words = ["batch", str(tmp_path / "all"), str(out), "--workers", "1"]
    assert CliRunner().invoke(dora_export, [*words, "--dry-run"]).exit_code == 1
    assert not out.exists()
    for done in (0, 1):
        ended = CliRunner().invoke(dora_export, [*words, "--json"])
        assert ended.exit_code == 1
        said = json.loads(ended.stdout)
        assert (said["done"], said["skipped"], len(said["failed"])) == (1, done, 1)
        assert {state: len(names) for state, names in states(out).items()} == {
            "done": 1,
            "failed": 1,
        }
        assert {path.name for path in out.iterdir()} == {"batch.json", "good"}
    shutil.rmtree(tmp_path / "all" / name)
    assert CliRunner().invoke(dora_export, words).exit_code == 0


def test_outputs_of_a_folder_lie_in_no_other(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """It was an error of all: `q/A` is called by its path, and would lie in the output `q`."""
    shutil.copytree(llama_base, tmp_path / "all" / "base")
    for each in ("x/q", "z/A", "y/other"):
        shutil.copytree(llama_lora, tmp_path / "all" / each)
    out = tmp_path / "out"
    assert batch(tmp_path / "all", out).done == 3
    shutil.copytree(llama_lora, tmp_path / "all/q/A")
    plan = plan_batch(tmp_path / "all", tmp_path / "new")
    assert {job.name for job in plan.jobs} == {"x/q", "q/A", "z/A", "other"}
    assert not plan.problems
    shutil.rmtree(out / "A")
    again = batch(tmp_path / "all", out)  # what is done stays where it is
    assert (again.done, again.skipped, list(again.failed)) == (3, 2, ["q/A"])
    assert "q and q/A" in again.failed["q/A"]
    assert states(out) == {"done": ["A", "other", "q", "z/A"], "failed": ["q/A"]}


def test_a_disk_where_capitals_are_small_letters(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """The second run replaced the output of the first, and both counted as done."""
    shutil.copytree(llama_base, tmp_path / "all" / "base")
    for each in ("x/Run", "y/run"):
        shutil.copytree(llama_lora, tmp_path / "all" / each)
    out = tmp_path / "disk" / "out"
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "Aa").touch()
    assert {job.name for job in plan_batch(tmp_path / "all", out).jobs} == {"Run", "run"}
    (tmp_path / "disk" / "aA").hardlink_to(tmp_path / "disk" / "Aa")  # one file, as there
    assert {job.name for job in plan_batch(tmp_path / "all", out).jobs} == {"x/Run", "y/run"}
    manifest = lines(
        tmp_path / "m", *({"run": str(tmp_path / "all" / n)} for n in ("x/Run", "y/run"))
    )
    with pytest.raises(ManifestError, match="Run and run"):
        plan_batch(manifest, out)
