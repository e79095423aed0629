"""Calls `prepare` in a process of its own, which has torch where this one does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from converters.errors import RunError
from converters.files.interpreters import current_folder, environment

from ...progress import is_said
from .offer import Addition, Failure, Offer, OfferedModel


def make_offer(root: Path, base: str | None, dry: bool, precision: str = "fp32") -> Offer:
    """What is in `root`, made ready to be served. Raises `RunError` when it cannot be."""
    asked = json.dumps({"root": str(root), "base": base, "dry": dry, "precision": precision})
    return Offer.model_validate_json(_call(asked))


def add_model(wanted: Addition) -> OfferedModel:
    """One more run, made ready to be served. Raises `RunError` when it cannot be."""
    return OfferedModel.model_validate_json(_call(wanted.model_dump_json()))


def _call(request: str) -> str:
    command = [sys.executable, "-m", "dora_serve.server.prepare.make"]
    surroundings = environment(MALLOC_ARENA_MAX="1")
    if is_said("quiet"):
        surroundings["TQDM_DISABLE"] = "1"
    pipe = subprocess.PIPE
    # A group of its own, which Ctrl-C does not reach: all of it ends with this one, whatever ends
    # that, since its standard input ends then.
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        encoding="utf-8",  # whatever the locale says
        env=surroundings,
        cwd=current_folder(),
        process_group=0,
    ) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.write(f"{request}\n")
                process.stdin.flush()
            answer = process.stdout.read()
            process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode or not answer:  # without its code, where SIGCHLD is ignored
        found = process.returncode or "no answer"
        raise RunError("preparing what is to be served broke off", found=found)
    reply = json.loads(answer)
    if "error" in reply:
        raise RunError(Failure(**reply).error)
    return answer
