"""An ONNX folder whose files are written in place while it is served, as `cp` and syncs do."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from queue import Queue

import numpy as np
import pytest

from dora_serve.onnxruntime.continuous import ContinuousDecoder
from dora_serve.onnxruntime.limits import Limits
from dora_serve.onnxruntime.request import Delta
from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.server.options import ServerOptions
from dora_serve.server.prepare.offer import Offer
from dora_serve.server.prepare.onnx_folders import read_onnx_folder
from dora_serve.server.registry import Registry


def answered(engine: ContinuousDecoder) -> list[float]:
    """How likely each token of an answer was."""
    news: Queue[Delta] = Queue()
    sampling = Sampling(max_tokens=4, ignore_eos=True, logprobs=0)
    engine.submit([5, 6, 7, 8], None, [sampling], [news.put])
    told: list[float] = []
    reason = None
    while reason is None:
        delta = news.get(timeout=60)
        assert delta.error is None
        told += [own for own, _ in delta.logprobs]
        reason = delta.reason
    return told


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self/maps")
def test_a_served_graph_stays_what_it_was(adapters_onnx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    shutil.copytree(adapters_onnx, folder)
    graph, base, adapters = read_onnx_folder("model", folder)
    options = ServerOptions(limits=Limits(prefix_bytes=0))
    registry = Registry(Offer(graphs=[graph], models=[base, *adapters], problems={}), options)
    try:
        engine = registry.find("model").engine
        assert isinstance(engine, ContinuousDecoder)
        before = answered(engine)
        weights = folder / "model.onnx.data"
        weights.write_bytes(np.random.default_rng(0).bytes(weights.stat().st_size))
        assert answered(engine) == before
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
        assert str(folder) not in maps, "reading what is cut off would end the process"
        os.truncate(weights, 0)
        assert answered(engine) == before
    finally:
        registry.close()
