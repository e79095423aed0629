"""Many runs by one command: all end converted or reported, whatever happens to some of them."""

from __future__ import annotations

import contextlib
import getpass
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converters.errors import OutputError
from converters.files.cores import cores
from converters.readers import read_run
from dora_serve.batch import Job, ManifestError, Summary, plan_batch, run_batch
from dora_serve.batch.convert import convert
from dora_serve.batch.job import Results
from dora_serve.batch.local import _Worker, on_processes
from dora_serve.commands import dora_export
from tests.conftest import tiny_llama
from tests.dora_serve.test_commands import EXPORT, export

WEIGHTS = "adapter_model.safetensors"
Q = "model.layers.1.self_attn.q_proj"


def copies(source: Path, root: Path, count: int, only: str = Q) -> list[Path]:
    """`count` copies of a part of an adapter, each with another update."""
    tensors = {name: t for name, t in load_file(source / WEIGHTS).items() if only in name}
    paths = []
    for number in range(count):
        path = root / f"run-{number:03}"
        path.mkdir(parents=True)
        shutil.copy(source / "adapter_config.json", path)
        changed = {n: t * (1 + number) if "lora_B" in n else t for n, t in tensors.items()}
        save_file(changed, path / WEIGHTS, metadata={"format": "pt"})
        paths.append(path)
    return paths


def delta(path: Path) -> torch.Tensor:
    """ΔW of one module."""
    components = read_run(path).updates[Q].components()
    assert components is not None
    return components.b.double() @ torch.diag(components.c.double()) @ components.a.double()


def status(out: Path) -> dict[str, dict[str, Any]]:
    runs: dict[str, dict[str, Any]] = json.loads((out / "batch.json").read_text())["runs"]
    return runs


def states(out: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, record in status(out).items():
        found.setdefault(record["state"], []).append(name)
    return found


def write_manifest(path: Path, runs: list[Path], base: Path, /, **last: str) -> Path:
    """JSON lines; every tenth run is merged, `last` is said of the last one."""
    entries = [
        {"run": str(run), "base": str(base), "to": "merged" if number % 10 == 5 else "adapter"}
        for number, run in enumerate(runs)
    ]
    entries[-1].update(last)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def here(jobs: Sequence[Job]) -> Results:
    """An engine that is this process."""
    for job in jobs:
        yield job, convert(job)


def batch(source: Path, out: Path, base: str | None = None, force: bool = False) -> Summary:
    return run_batch(plan_batch(source, out, base=base, force=force), here, lambda _count: None)


def workers_of(pid: int) -> list[psutil.Process]:
    """The worker processes below a command: forked by its fork server."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [worker for p in psutil.Process(pid).children() for worker in p.children()]
    return []


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outputs(out: Path) -> int:
    return len(list(out.glob("*/dora_export.json")))


def litter(out: Path) -> list[Path]:
    return list(out.rglob("*.dora-tmp"))


def test_many_runs_all_end_converted_or_reported(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    runs = copies(llama_lora, tmp_path / "runs", 24)
    other = tmp_path / "other"
    tiny_llama(hidden_size=16).save_pretrained(other)
    broken = {runs[3]: "corrupt", runs[14]: "no weights", runs[20]: "gone", runs[23]: "other base"}
    (runs[3] / WEIGHTS).write_bytes((runs[3] / WEIGHTS).read_bytes()[:500])
    (runs[14] / WEIGHTS).unlink()
    shutil.rmtree(runs[20])
    manifest = write_manifest(tmp_path / "all.jsonl", runs, llama_base, base=str(other))
    out = tmp_path / "out"
    command = [str(EXPORT), "batch", str(manifest), str(out), "--workers", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        wait_for(lambda: outputs(out) >= 5)
        killed = workers_of(process.pid)[0]
        killed.kill()
        summary = json.loads(process.stdout.read())
    assert process.returncode == 1
    names = {run.name for run in broken}
    assert (summary["done"], summary["skipped"], summary["pending"]) == (20, 0, 0)
    assert set(summary["failed"]) == set(states(out)["failed"]) == names
    assert all(summary["failed"].values())
    assert str(runs[3] / WEIGHTS) in summary["failed"]["run-003"]
    at_work = {int(record["worker"].rpartition(":")[2]) for record in status(out).values()}
    assert len(at_work - {killed.pid}) == 2
    assert not litter(out)

    for number in (0, 7, 22):
        wanted = delta(runs[number])
        found = delta(out / runs[number].name)
        assert torch.linalg.norm(found - wanted) <= 1e-6 * torch.linalg.norm(wanted)
        assert torch.linalg.norm(found - delta(runs[1])) > 0.1
    name = f"{Q}.weight"
    base = load_file(llama_base / "model.safetensors")[name].double()
    merged = load_file(out / "run-015" / "model.safetensors")[name].double()
    assert torch.allclose(merged - base, delta(runs[15]), atol=1e-5)

    # A rerun converts what was left, and what has changed since.
    shutil.copy(runs[0] / WEIGHTS, runs[3])
    shutil.copy(runs[0] / WEIGHTS, runs[8])
    shutil.rmtree(out / "run-011")
    (out / "run-012" / WEIGHTS).unlink()
    again = export("batch", manifest, out, "--workers", "2", "--json")
    assert again.returncode == 1
    summary = json.loads(again.stdout)
    assert set(summary["failed"]) == names - {"run-003"}
    assert (summary["done"], summary["skipped"]) == (21, 17)
    for name in ("run-003", "run-008", "run-011", "run-012"):
        assert torch.isfinite(delta(out / name)).all()
    assert torch.equal(delta(out / "run-008"), delta(out / "run-000"))


def test_a_changed_base_is_merged_again(llama_lora: Path, tmp_path: Path, llama_base: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama_base, base)
    manifest = tmp_path / "one.json"
    manifest.write_text(json.dumps([{"run": str(llama_lora), "base": str(base), "to": "merged"}]))
    out = tmp_path / "out"
    assert batch(manifest, out).done == 1
    assert batch(manifest, out).skipped == 1
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] += 1  # which the run does not adapt
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert batch(manifest, out).skipped == 0
    merged = load_file(out / "lora" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], tensors["lm_head.weight"])


def test_ctrl_c_leaves_a_status_that_the_next_goes_on_from(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    runs = copies(llama_lora, tmp_path / "runs", 12)
    manifest = write_manifest(tmp_path / "all.jsonl", runs, llama_base)
    out = tmp_path / "out"
    command = [str(EXPORT), "batch", str(manifest), str(out), "--workers", "2"]
    temporary = Path(tempfile.mkdtemp())  # not below `tmp_path`: of a socket's path 107 bytes count
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
        start_new_session=True,
    ) as process:
        wait_for(lambda: outputs(out) >= 3)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    before = states(out)
    assert before.keys() == {"done", "pending"}
    assert len(before["done"]) + len(before["pending"]) == 12
    assert all((out / name / "dora_export.json").is_file() for name in before["done"])
    wait_for(lambda: not litter(out))
    left = {path.name for path in temporary.iterdir()}
    shutil.rmtree(temporary)
    assert left <= {f"torchinductor_{getpass.getuser()}"}, left

    again = batch(manifest, out)
    assert (again.done, again.skipped) == (12, len(before["done"]))


@pytest.mark.further
def test_a_worker_ends_quietly_when_its_record_is_not_read(
    llama_lora: Path, tmp_path: Path
) -> None:
    job = Job("a", str(llama_lora), None, "adapter", "peft", tmp_path / "a")
    worker = _Worker(multiprocessing.get_context("forkserver"), cores())
    assert worker.take(job)
    assert worker.pipe.poll(60)
    worker.stop()
    assert worker.process.exitcode == 0


def test_a_run_that_kills_its_worker_twice_is_reported(llama_lora: Path, tmp_path: Path) -> None:
    jobs = [Job(name, str(llama_lora), None, "adapter", "peft", tmp_path / name) for name in "abcd"]

    def kill_first() -> None:
        """Stop the first worker before it does a thing, and kill it when it has a run."""
        fresh: list[int] = []
        while not fresh:
            found = (process.pid for process in multiprocessing.active_children())
            fresh = [pid for pid in found if pid is not None]
        os.kill(fresh[0], signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(fresh[0], signal.SIGKILL)

    def kill(worker: int) -> None:
        time.sleep(0.5)
        os.kill(worker, signal.SIGKILL)

    first = threading.Thread(target=kill_first)
    first.start()
    results = (ended for ended in on_processes(jobs, 1) if ended is not None)
    ended = [next(results) for _ in "bcd"]
    first.join()
    (worker,) = [p.pid for p in multiprocessing.active_children()]
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)
    second = threading.Thread(target=kill, args=(worker,))
    second.start()
    ended += results
    second.join()
    found = {job.name: record for job, record in ended if record is not None}
    assert [job.name for job, _ in ended] == ["b", "c", "d", "a"]
    assert {name: record.state for name, record in found.items()} == {
        "a": "failed",
        **dict.fromkeys("bcd", "done"),
    }
    assert "SIGKILL" in (found["a"].error or "")
    assert not multiprocessing.active_children()


def test_a_folder_of_runs_and_bases(llama_lora: Path, llama_base: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    runs = copies(llama_lora, root / "team", 4)
    shutil.copytree(llama_base, root / "base")
    (runs[2] / WEIGHTS).write_bytes(b"no tensors")
    shutil.copytree(runs[0], runs[3] / "other")
    out = tmp_path / "out"
    done = export("batch", root, out, "--to", "merged", "--workers", "1")
    assert done.returncode == 1
    assert "failed: run-002" in done.stderr
    assert "warning: run-003: other below the adapter" in done.stderr
    assert "3 done" in done.stdout
    assert states(out) == {"done": ["run-000", "run-001", "run-003"], "failed": ["run-002"]}
    assert (out / "run-001" / "model.safetensors").is_file()
    with pytest.raises(OutputError, match="inside an input"):
        plan_batch(root, root / "out")
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"run": "RUN", "name": "../out-of-it"}', "below the output"),
        ('{"run": "RUN", "name": "/etc/it"}', "below the output"),
        ('{"run": "RUN", "name": "a/../../it"}', "below the output"),
        ('{"run": "RUN", "name": "a//b"}', "below the output"),
        ('{"run": "RUN", "name": ".hidden"}', "below the output"),
        ('{"run": "RUN", "name": "batch.json"}', "below the output"),
        ('{"run": "RUN", "name": "a\\nb"}', "below the output"),
        ('{"run": "RUN", "name": "\\ud800"}', "below the output"),
        ('{"run": "RUN", "name": "linked/it"}', "through a link"),
        ('{"run": "RUN", "name": "theirs"}', "not empty"),
        ('{"run": "RUN"}\n{"run": "RUN"}', "to one place"),
        ('{"run": "RUN", "name": "a"}\n{"run": "RUN", "name": "a/b"}', "to one place"),
        ('{"run": "RUN", "to": "nowhere"}', "adapter or merged"),
        ('{"run": "RUN", "bse": "x"}', "mean nothing"),
        ('{"run": "RUN", "run": "x"}', "twice"),
        ('{"run": "RUN"}\n{"name": "x"}', "line 2 names no run"),
        ('{"run": 3}', "run is not a name"),
        ('{"run": "RUN"', "line 1 is not valid JSON"),
        ('[{"run": "RUN"}, 3]', "entry 2 is not an object"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "names no run"),
        ("", "names no run"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_manifest_that_is_wrong_writes_nothing(
    text: str, said: str, llama_lora: Path, tmp_path: Path
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    theirs = out / "theirs" / "file"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    elsewhere.mkdir()
    (out / "linked").symlink_to(elsewhere)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(text.replace("RUN", str(llama_lora)), errors="surrogateescape")
    with pytest.raises((ManifestError, OutputError), match=said):
        plan_batch(manifest, out)
    assert sorted(p.name for p in out.iterdir()) == ["linked", "theirs"]
    assert not list(elsewhere.iterdir())
    assert theirs.read_text() == "theirs"


def test_an_output_inside_a_run_writes_nothing(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    (run,) = copies(llama_lora, tmp_path, 1)
    manifest = write_manifest(tmp_path / "m.jsonl", [run], llama_base)
    before = sorted(run.iterdir())
    with pytest.raises(OutputError, match="inside an input"):
        plan_batch(manifest, run / "out")
    assert sorted(run.iterdir()) == before


def test_dry_run_and_a_status_of_another_kind(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    (run,) = copies(llama_lora, tmp_path, 1)
    manifest = write_manifest(tmp_path / "m.jsonl", [run], llama_base)
    out = tmp_path / "out"
    words = ["batch", str(manifest), str(out)]
    done = CliRunner().invoke(dora_export, [*words, "--dry-run", "--json"])
    assert done.exit_code == 0, done.stderr
    assert [entry["name"] for entry in json.loads(done.stdout)["runs"]] == ["run-000"]
    assert not out.exists()
    out.mkdir()
    for text in ("[]", "{}", '{"runs": {"a": {"state": "odd", "output": ""}}}'):
        (out / "batch.json").write_text(text)
        done = CliRunner().invoke(dora_export, words)
        assert done.exit_code == 1
        assert "error: " in done.stderr
        assert (out / "batch.json").read_text() == text


def test_an_output_that_holds_another_run_is_made_again(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    """Each of the two is whole, and of the same target: only the runs tell them apart."""
    one, two = copies(llama_lora, tmp_path / "runs", 2)
    manifest, out = write_manifest(tmp_path / "all.jsonl", [one, two], llama_base), tmp_path / "out"
    batch(manifest, out)
    assert batch(manifest, out).skipped == 2
    (out / one.name).rename(out / "aside")
    (out / two.name).rename(out / one.name)
    (out / "aside").rename(out / two.name)
    assert batch(manifest, out).skipped == 0
    for run in (one, two):
        assert torch.allclose(delta(out / run.name), delta(run), atol=1e-6)
    assert not torch.allclose(delta(one), delta(two), atol=1e-3)
