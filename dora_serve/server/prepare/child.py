"""Calls `prepare` in a process of its own, which has torch where this one does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from converters.errors import RunError

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
    # Ctrl-C reaches both; this one ends that one, which has nothing to say of it.
    deaf = ["/bin/sh", "-c", """trap '' INT; exec "$0" "$@" """]
    command = [*deaf, sys.executable, "-m", "dora_serve.server.prepare.make"]
    environment = {"MALLOC_ARENA_MAX": "1", **os.environ}
    if is_said("quiet"):
        environment["TQDM_DISABLE"] = "1"
    done = subprocess.run(
        command, input=request, stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RunError("preparing what is to be served broke off", found=done.returncode)
    reply = json.loads(done.stdout)
    if "error" in reply:
        raise RunError(Failure(**reply).error)
    return done.stdout
