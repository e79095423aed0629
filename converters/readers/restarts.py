"""Runs whose factors were merged into the base and begun anew while they trained (ReLoRA, as
axolotl does it in `src/axolotl/monkeypatch/relora.py`).

A checkpoint then holds an update of the weights at the last restart, and its configuration names
the base of the first. At a restart the factors are saved once more, into `adapter`; `relora` of
every checkpoint between two restarts holds the changed base.
"""

from __future__ import annotations

import filecmp
from pathlib import Path

from ..errors import RunError
from .run_folder import WEIGHT_FILES

_BASE, _COPY = "relora", "adapter"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def refuse_restarted(folder: Path) -> None:
    """Raise `RunError` for a checkpoint of ReLoRA. The first restart's alone would be right, and
    nothing in it tells it from the others."""
    own = folder.resolve()
    own = own.parent if own.name == _COPY and _restarts(own.parent) else own
    found = own / (_COPY if _restarts(own) else _BASE)
    if found.name == _COPY or any(any(found.glob(each)) for each in _WEIGHTS):
        raise RunError(
            "the factors were merged into the base and begun anew while they trained (ReLoRA), so "
            "they may be an update of weights that the base does not have",
            file=folder,
            found=f"{found.name}/ beside them, as axolotl leaves it",
            remedy="give the model that axolotl merged when it ended",
        )


def _restarts(folder: Path) -> bool:
    """Whether it is a checkpoint with a copy of its factors."""
    pairs = [(folder / name, folder / _COPY / name) for name in WEIGHT_FILES]
    return folder.name.startswith("checkpoint-") and any(
        own.is_file() and copy.is_file() and filecmp.cmp(own, copy, shallow=False)
        for own, copy in pairs
    )
