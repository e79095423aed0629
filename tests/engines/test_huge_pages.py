"""A process's own memory in huge pages: what is in use nearly whole, and nothing of it changed."""

from __future__ import annotations

import mmap
import platform
import re
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dora_serve.onnxruntime.huge_pages import gather
from dora_serve.onnxruntime.session import Session

SIZE, PAGE = 1 << 25, 1 << 21
BYTES = bytes(range(251)) * (SIZE // 251 + 1)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or tuple(map(int, platform.release().split(".")[:2])) < (6, 1),
    reason="needs Linux 6.1",
)


def mapped(count: int, apart: int) -> mmap.mmap:
    """Memory whose first `count` bytes are in use; `apart`: what keeps it from being one part with
    what lies beside it."""
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(apart)
    memory.write(BYTES[:count])
    return memory


def huge(memory: mmap.mmap) -> int:
    """How many bytes of it lie in huge pages, as the kernel tells."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    told = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{address:x}-.*\n(?:.*\n)*?AnonHugePages: +(\d+) kB", told, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def test_memory_in_use_is_gathered_and_stays_what_it_was() -> None:
    whole, half = mapped(SIZE, mmap.MADV_DONTDUMP), mapped(SIZE // 2, mmap.MADV_DONTFORK)
    assert huge(whole) == 0
    gather().join()
    assert huge(whole) >= SIZE - 2 * PAGE
    assert huge(half) == 0, "it would take more memory"
    assert whole[:] == BYTES[:SIZE]
    assert half[: SIZE // 2] == BYTES[: SIZE // 2]


@pytest.mark.parametrize("width", [256, 4096])
def test_a_sessions_weights_are_gathered_where_they_are_large(tmp_path: Path, width: int) -> None:
    weights = np.random.default_rng(0).standard_normal((width, width), np.float32)
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [value("x", shape=[1, width])],
        [value("y", shape=[1, width])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    del graph, model
    before = in_huge_pages()
    session = Session(tmp_path / "model.onnx", threads=1)
    for thread in threading.enumerate():
        if thread.name == "huge-pages":
            thread.join()
    grown, large = in_huge_pages() - before, weights.nbytes >= 1 << 26
    assert grown >= weights.nbytes // 2 if large else grown < PAGE
    x = np.ones((1, width), np.float32)
    assert np.allclose(session.run({"x": x})["y"], x @ weights, atol=1e-2)


def in_huge_pages() -> int:
    """Bytes of this process, as the kernel tells."""
    told = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"AnonHugePages: +(\d+) kB", told)
    assert found is not None
    return 1024 * int(found[1])
