"""How long a graph takes for one more token, beside the same graph in float32."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

_PAST, _RUNS = 8, 8


def step_times(exact: Path, small: Path) -> dict[str, float] | None:
    """Milliseconds of one step of the float32 graph `exact` and of `small`, in turn; None where the
    float32 weights would fill most of the memory that is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = sum(file.stat().st_size for file in exact.parent.iterdir() if file.is_file())
    if 2 * weights > free:
        return None
    steps = {"float32": _step(exact), "written": _step(small)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_RUNS):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    # The first prepares.
    return {name: round(1000 * statistics.median(all_[1:]), 2) for name, all_ in times.items()}


def _step(file: Path) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As a server's threads wait; by default they would keep the cores from the other session.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    session = onnxruntime.InferenceSession(file, options)
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros((1, value.shape[1], _PAST, value.shape[3]), np.float32)
    feeds["input_ids"] = np.zeros((1, 1), np.int64)
    feeds["attention_mask"] = np.ones((1, _PAST + 1), np.int64)
    if any(value.name == "position_ids" for value in session.get_inputs()):
        feeds["position_ids"] = np.full((1, 1), _PAST)
    return partial(session.run, ["logits"], feeds)
