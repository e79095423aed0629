"""How exact an ONNX folder is: its logits in ONNX Runtime against the live runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from converters.base import BaseModel
from converters.run import Run

from .engines.onnx_model import open_onnx
from .live import LiveModel
from .proof import logits, verification_batch


def prove(
    folder: Path, base: BaseModel, run: Run | None, adapters: Mapping[str, Run]
) -> dict[str, dict[str, float]]:
    """Per run (`merged`, or the adapter's name): `max_abs` of the logits' difference to the live
    run, `top1` agreement, and `control`, the live run's difference to the base."""
    runs: dict[str, Run] = {"merged": run} if run is not None else dict(adapters)
    found = {}
    model = open_onnx(folder)
    for name, each in runs.items():
        live = LiveModel(each, base)
        inputs = verification_batch(live.model)
        truth = logits(live.model, inputs)
        live.detach()
        model.adapters = None if run is not None else name
        deployed = logits(model, inputs)
        found[name] = {
            "max_abs": float((deployed - truth).abs().max()),
            "top1": float((deployed.argmax(-1) == truth.argmax(-1)).double().mean()),
            "control": float((logits(live.model, inputs) - truth).abs().max()),
        }
    return found
