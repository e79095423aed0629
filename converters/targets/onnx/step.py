"""How long a graph takes for one more token, beside the same graph in float32."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

_PAST, _RUNS = 8, 5


def step_times(exact: Path, small: Path) -> dict[str, float] | None:
    """Milliseconds of one step of the float32 graph `exact` and of `small`; None where the float32
    weights would fill most of the memory that is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = sum(file.stat().st_size for file in exact.parent.iterdir() if file.is_file())
    if 2 * weights > free:
        return None
    return {"float32": _milliseconds(exact), "written": _milliseconds(small)}


def _milliseconds(file: Path) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options)
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            half = np.float16 if "16" in value.type else np.float32
            feeds[value.name] = np.zeros((1, value.shape[1], _PAST, value.shape[3]), half)
    feeds["input_ids"] = np.zeros((1, 1), np.int64)
    feeds["attention_mask"] = np.ones((1, _PAST + 1), np.int64)
    if any(value.name == "position_ids" for value in session.get_inputs()):
        feeds["position_ids"] = np.full((1, 1), _PAST)
    times = []
    for _ in range(_RUNS + 1):  # the first prepares
        begin = time.perf_counter()
        session.run(["logits"], feeds)
        times.append(time.perf_counter() - begin)
    return round(1000 * statistics.median(times[1:]), 2)
