"""A merge that was killed is continued from its finished shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import LlamaForCausalLM

from converters.files.leftovers import JOURNAL
from dora_serve import merge
from dora_serve.commands import dora_export
from tests.processes import commands

# Tells its number, merges, and after the first shard stands still until stdin is closed.
STANDS_STILL = """
import os, sys, threading
from contextlib import contextmanager
from dora_serve import merge

@contextmanager
def progress(total):
    lock, written = threading.Lock(), 0
    def advance(count):
        nonlocal written
        with lock:
            written += count
        if written > int(sys.argv[4]):
            os.read(0, 1)
    yield advance

print(os.getpid(), flush=True)
merge(sys.argv[1], sys.argv[3], base=sys.argv[2], resume=True, progress=progress)
"""


@pytest.fixture(scope="session")
def base(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of several shards."""
    folder = tmp_path_factory.mktemp("shards") / "base"
    LlamaForCausalLM.from_pretrained(llama_base).save_pretrained(folder, max_shard_size="14KB")
    assert 4 <= len(list(folder.glob("*.safetensors"))) <= 8
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def left(target: Path) -> list[Path]:
    return [path for path in target.parent.iterdir() if path.name.startswith(".")]


def stop(run: Path, base: Path, target: Path, sent: signal.Signals = signal.SIGKILL) -> Path:
    """Stop a merge that has finished one shard and begun another; returns the folder it leaves."""
    first = min(base.glob("*.safetensors"))
    size = first.stat().st_size - 8 - int.from_bytes(first.read_bytes()[:8], "little")
    with subprocess.Popen(
        [commands() / "python", "-c", STANDS_STILL, run, base, target, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        number = int(process.stdout.readline())
        while not (finished(target) and len([*left(target)[0].glob("*.safetensors")]) > 1):
            assert process.poll() is None, "the merge ended"
            time.sleep(0.01)
        os.kill(number, sent)
    assert process.returncode == 128 + sent
    assert not target.exists()
    (folder,) = left(target)
    assert len(finished(target)) == 1
    return folder


def finished(target: Path) -> list[dict[str, Any]]:
    """The shards that the journal beside `target` names, once their lines are whole."""
    lines = [
        line
        for folder in (left(target) if target.parent.is_dir() else [])
        if (folder / JOURNAL).exists()
        for line in (folder / JOURNAL).read_text().splitlines(keepends=True)
    ]
    return [json.loads(line) for line in lines if '"shard"' in line and line.endswith("\n")]


def resume(run: Path, base: Path, target: Path, *options: str) -> dict[str, Any]:
    arguments = ["merge", str(run), str(target), "--base", str(base), "--resume", "--json"]
    done = CliRunner().invoke(dora_export, [*arguments, *options])
    assert done.exit_code == 0, done.output
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@pytest.fixture
def undisturbed(llama_lora: Path, base: Path, tmp_path: Path) -> dict[str, bytes]:
    merge(llama_lora, tmp_path / "undisturbed", base=base)
    return content(tmp_path / "undisturbed")


def test_a_killed_merge_is_continued(
    llama_lora: Path, base: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    inputs = content(base), content(llama_lora)
    target = tmp_path / "work" / "out"
    folder = stop(llama_lora, base, target)
    (shard,) = finished(target)
    assert (folder / shard["shard"]).read_bytes() == undisturbed[shard["shard"]]
    before = (folder / shard["shard"]).stat()

    result = resume(llama_lora, base, target)

    assert result["resumed"] == [shard["shard"]]
    assert result["warnings"] == []
    after = (target / shard["shard"]).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert content(target) == undisturbed
    assert left(target) == []
    assert (content(base), content(llama_lora)) == inputs


def test_a_merge_is_killed_and_continued_more_than_once(
    llama_lora: Path, base: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    target = tmp_path / "work" / "out"
    folder = stop(llama_lora, base, target)
    (folder / JOURNAL).write_text((folder / JOURNAL).read_text() + '{"shard": "mod')
    assert stop(llama_lora, base, target) == folder
    assert len(resume(llama_lora, base, target)["resumed"]) == 1
    assert content(target) == undisturbed


def test_a_damaged_shard_is_made_anew(
    llama_lora: Path, base: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    target = tmp_path / "work" / "out"
    folder = stop(llama_lora, base, target)
    path = folder / finished(target)[0]["shard"]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)

    result = resume(llama_lora, base, target)

    assert result["resumed"] == []
    assert [w for w in result["warnings"] if path.name in w and "anew" in w]
    assert content(target) == undisturbed


def test_a_link_in_the_place_of_a_shard_is_not_followed(
    llama_lora: Path, base: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    target = tmp_path / "work" / "out"
    path = stop(llama_lora, base, target) / finished(target)[0]["shard"]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert resume(llama_lora, base, target)["resumed"] == []
    assert not (target / path.name).is_symlink()
    assert content(target) == undisturbed


@pytest.mark.parametrize("changed", ["run", "base", "dtype", "option"])
def test_of_another_merge_nothing_is_taken(
    changed: str, llama_lora: Path, base: Path, tmp_path: Path
) -> None:
    target = tmp_path / "work" / "out"
    own_run, own_base = tmp_path / "run", tmp_path / "base"
    for source, copy in ((llama_lora, own_run), (base, own_base)):
        copy.mkdir()
        for name, data in content(source).items():
            (copy / name).write_bytes(data)
    stop(own_run, own_base, target)
    path = {
        "run": own_run / "adapter_model.safetensors",
        "base": max(own_base.glob("*.safetensors")),
    }.get(changed)
    if path is not None:
        path.write_bytes(path.read_bytes()[:-3] + b"\x01\x3f\x3f")
    options = {"dtype": ["--dtype", "float16"], "option": ["--lora-alpha", "7"]}.get(changed, [])

    result = resume(own_run, own_base, target, *options)

    assert result["resumed"] == []
    assert any("another run" in warning for warning in result["warnings"])
    CliRunner().invoke(
        dora_export,
        ["merge", str(own_run), str(tmp_path / "o"), "--base", str(own_base), *options],
    )
    assert content(target) == content(tmp_path / "o")
    assert left(target) == []


def test_without_the_flag_nothing_is_kept(
    llama_lora: Path, base: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    target = tmp_path / "work" / "out"
    stop(llama_lora, base, target)
    assert merge(llama_lora, target, base=base).report.resumed == ()
    assert left(target) == []
    assert content(target) == undisturbed


def test_a_terminated_merge_is_continued_as_well(
    llama_lora: Path, base: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    target = tmp_path / "work" / "out"
    stop(llama_lora, base, target, signal.SIGTERM)
    assert len(resume(llama_lora, base, target)["resumed"]) == 1
    assert content(target) == undisturbed


def test_an_error_leaves_nothing(llama_lora: Path, base: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "base"
    damaged.mkdir()
    for name, data in content(base).items():
        (damaged / name).write_bytes(data)
    last = max(damaged.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    (tmp_path / "work").mkdir()
    arguments = ["merge", llama_lora, tmp_path / "work" / "out", "--base", damaged, "--resume"]
    done = CliRunner().invoke(dora_export, [*map(str, arguments), "--dtype", "float16"])
    assert done.exit_code == 1
    assert "NaN" in done.output
    assert list((tmp_path / "work").iterdir()) == []
