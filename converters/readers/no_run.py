"""What a folder holds instead of a run, and what to do with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PureWindowsPath

from ..certificate import FILE as CERTIFICATE
from ..errors import DoraExportError, RunError
from ..files.json_files import read_json
from ..model.base import SINGLE_FILES
from .in_pieces import in_pieces
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder

_STATE = "trainer_state.json"  # of transformers' Trainer, in each of its checkpoints
_NUMBER = re.compile(r"\d+")


def no_run(folder: RunFolder, looked_for: Mapping[str, str], below: Sequence[Path]) -> RunError:
    """The error for `folder`, in which no reader found a run; `below` are the folders inside it
    that hold one, `looked_for` what each reader wants to see."""
    path = folder.path
    if (path / CERTIFICATE).is_file():
        return RunError(
            "what was made of a run, not a run",
            file=path,
            found=CERTIFICATE,
            remedy="give the run, or look at this with `check`",
        )
    if below:
        names = sorted((str(each.relative_to(path)) for each in below), key=_by_number)
        best = _best(path / names[-1], below)
        one = f"{path / names[-1]} for example" if best is None else f"{best}, the best to {_STATE}"
        some = names if len(names) < 7 else [*names[:3], "…", *names[-3:]]
        return RunError(
            "a folder of runs, not a run",
            file=path,
            found=", ".join(some),
            expected="one of them",
            remedy=f"give {one}; `batch` takes all of them",
        )
    if (pieces := in_pieces(path)) is not None:
        return pieces
    try:
        model = folder.checkpoint
    except DoraExportError:
        model = None
    factor = next((n for n in (model.tensors if model else _stored(folder)) if ".lora_" in n), None)
    if factor is not None:
        return RunError(
            "a whole model with factors of LoRA in it, and no configuration that tells their scale",
            file=path,
            found=factor,
            remedy=f"put the file, as {WEIGHT_FILES[0]} (or .bin), into a folder with the "
            f"{CONFIG_FILE} of its training",
        )
    if model is not None:
        return RunError(
            "a whole model without factors of LoRA in it: a full fine-tune, a merged model, or a "
            "base",
            file=path,
            found=", ".join(list(model.tensors)[:3]),
            remedy="`extract` makes an adapter of what a full fine-tune changed of its base; it is "
            "deployed as it is, and `onnx` takes it too",
        )
    content = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
    looked = "; ".join(f"{name}: {what}" for name, what in looked_for.items())
    several = f"what a run of one of these holds: {', '.join(looked_for)}"
    return RunError(
        "no run found in this folder",
        file=path,
        found=content,
        expected=several if len(looked_for) > 2 else looked,
        remedy="give the checkpoint, task or adapter folder that training wrote",
    )


def _stored(folder: RunFolder) -> Iterable[str]:
    """The names in a file as of a whole model, such as accelerate's `save_state` leaves without a
    configuration."""
    file = folder.first(*SINGLE_FILES)
    with suppress(DoraExportError):
        return folder.tensors(file) if file is not None else ()
    return ()


def _best(last: Path, runs: Sequence[Path]) -> Path | None:
    """The one beside the `last` checkpoint that training measured as the best, where it did."""
    with suppress(DoraExportError):
        said = str(read_json(last / _STATE).get("best_model_checkpoint"))
        name = PureWindowsPath(said).name  # which takes separators of either kind
        return next((each for each in runs if each == last.parent / name), None)
    return None


def _by_number(name: str) -> tuple[list[int], str]:
    """checkpoint-1000 comes behind checkpoint-200."""
    return [int(n) for n in _NUMBER.findall(name)], name
