"""Inputs to break, commands to stop, and the judgement of what is left: for `faults.py`.

A command runs in a fork of this process, in which all that it needs is imported already, so that a
round costs a tenth of a second and is disturbed while it works, not while it imports; it is a
process of its own and is killed as one.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules

import peft
from transformers import LlamaConfig, LlamaForCausalLM

from converters import model, readers
from converters.certificate import FILE, sha256
from converters.targets import lora_folder, merged
from converters.targets.target import targets
from dora_serve.api import merge as merge
from dora_serve.commands import adapter as adapter
from dora_serve.commands import dora_export
from dora_serve.proof.check import check

# What commands import late is imported once, here.
for _room in (lora_folder, merged, model, readers):
    for _module in iter_modules(_room.__path__, f"{_room.__name__}."):
        import_module(_module.name)
targets()

MODELS = Path(__file__).parent.parent / "models"
RUNS = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8"
READS, WRITES, NAMES, FINDS = 1, 2, 4, 8  # as in fault_shim.c
NOBODY = 65534


def make_inputs(folder: Path) -> None:
    """A base and two adapters of it."""
    made = get_context("fork").Process(target=_make_inputs, args=(folder,))
    made.start()
    made.join()
    assert made.exitcode == 0


def _make_inputs(folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        vocab_size=2000,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base", max_shard_size="8MB")
    lora = peft.LoraConfig(r=8, target_modules="all-linear")
    for name in ("old", "new"):
        tuned = peft.get_peft_model(LlamaForCausalLM(config), lora)
        for parameter in tuned.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(folder / name)


@dataclass
class Process:
    """A command that was started; `said` is read when it has ended."""

    pid: int
    log: Path
    code: int | None = None

    def wait(self, seconds: float = 600) -> int:
        """The exit code, minus the signal's number where one ended it."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise SystemExit(f"a command hangs: {self.log.read_text()}")
            else:
                time.sleep(0.002)
        return self.code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    @property
    def said(self) -> str:
        return self.log.read_text()


@dataclass(frozen=True)
class Arm:
    """The call that fails: the `nth` of `kinds` on files below `prefix`, with the error `code`, or
    with the end of the process for code 0; for `nth` 0 the calls are counted in `count`."""

    kinds: int
    nth: int
    code: int
    prefix: Path
    count: Path | None = None


@dataclass
class World:
    """The `folder` in which everything happens, with a copy of the inputs `given`. `shim`: whether
    the library that makes calls fail is loaded."""

    folder: Path
    given: Path
    shim: bool
    hashes: dict[Path, str] = field(default_factory=dict)
    numbers: int = 0

    def __post_init__(self) -> None:
        for name in ("place", "temporary", "logs"):
            (self.folder / name).mkdir(parents=True)
        shutil.copytree(self.given, self.inputs)
        self.hashes = self._hash()

    @property
    def inputs(self) -> Path:
        return self.folder / "inputs"

    @property
    def temporary(self) -> Path:
        return self.folder / "temporary"

    @property
    def place(self) -> Path:
        return self.folder / "place"

    def _hash(self) -> dict[Path, str]:
        return {path: sha256(path) for path in sorted(self.inputs.rglob("*")) if path.is_file()}

    def inputs_changed(self) -> bool:
        return self._hash() != self.hashes

    def start(
        self, work: Callable[[], object], arm: Arm | None = None, user: int | None = None
    ) -> Process:
        """Start `work` as a process; what it prints goes into a log."""
        self.numbers += 1
        log = self.folder / "logs" / f"{self.numbers}"
        log.touch()
        log.chmod(0o666)
        pid = os.fork()
        if pid:
            return Process(pid, log)
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ["TMPDIR"] = str(self.temporary)
            if user is not None:
                os.setuid(user)
            if arm is not None:
                library = ctypes.CDLL(None)
                library.fault_arm(arm.kinds, arm.nth, arm.code, os.fsencode(arm.prefix))
            code = _run(work)
            if arm is not None and arm.count is not None:
                arm.count.write_text(str(library.fault_seen()))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def litter(self, place: Path) -> list[Path]:
        """Temporary files left; a killed command's janitor is given a moment to remove them."""
        end = time.monotonic() + 3
        while found := [
            *place.rglob("*.dora-tmp"),
            *place.rglob(".adding*"),
            # torch keeps a cache of its own there, of which an export makes the empty folder.
            *(p for p in self.temporary.iterdir() if not p.name.startswith("torchinductor_")),
        ]:
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        return found


def _run(work: Callable[[], object]) -> int:
    import traceback

    try:
        work()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def export(*arguments: object) -> None:
    dora_export([str(argument) for argument in arguments], standalone_mode=True)


def identity(output: Path) -> str | None:
    """A hash of all that an artifact holds, None where it is not what its certificate says."""
    try:
        if not check(output).passed:
            return None
    except Exception:
        return None
    files = json.loads((output / FILE).read_text())["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def mounted(place: Path) -> bool:
    """Whether a small disk could be mounted at `place`."""
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)]
    return not os.geteuid() and not subprocess.run(mount, capture_output=True).returncode
