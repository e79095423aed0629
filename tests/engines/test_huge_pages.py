"""A process's own memory in huge pages: what is in use nearly whole, and nothing of it changed."""

from __future__ import annotations

import ctypes
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
from numpy.typing import NDArray
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


def unless_refused(memory: mmap.mmap) -> None:
    """Skip where the system itself has no huge pages for `memory`, as when what is free lies in
    small pieces."""
    begin = np.frombuffer(memory, np.uint8).ctypes.data
    madvise = ctypes.CDLL(None).madvise
    for page in range(-(-begin // PAGE) * PAGE, (begin + SIZE) // PAGE * PAGE, PAGE):
        if madvise(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 25):  # MADV_COLLAPSE
            pytest.skip("the system has no huge pages free")


def test_memory_in_use_is_gathered_and_stays_what_it_was() -> None:
    whole, half = mapped(SIZE, mmap.MADV_DONTDUMP), mapped(SIZE // 2, mmap.MADV_DONTFORK)
    assert huge(whole) == 0
    gather().join()
    if huge(whole) < SIZE - 2 * PAGE:
        unless_refused(whole)
        pytest.fail("what the system gathers was not")
    assert huge(half) == 0, "it would take more memory"
    assert whole[:] == BYTES[:SIZE]
    assert half[: SIZE // 2] == BYTES[: SIZE // 2]


def save_product(file: Path, width: int) -> NDArray[np.float32]:
    """A graph of one product with the weights that are returned, `[width, width]`."""
    weights = np.random.default_rng(0).standard_normal((width, width), np.float32)
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [value("x", shape=[1, width])],
        [value("y", shape=[1, width])],
        [numpy_helper.from_array(weights, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return weights


def test_a_large_sessions_weights_are_gathered(tmp_path: Path) -> None:
    weights = save_product(tmp_path / "model.onnx", 4096)
    before = in_huge_pages()
    session = Session(tmp_path / "model.onnx", threads=1)
    for thread in threading.enumerate():
        if thread.name == "huge-pages":
            thread.join()
    if in_huge_pages() - before < weights.nbytes // 2:
        unless_refused(mapped(SIZE, mmap.MADV_DONTDUMP))
        pytest.fail("what the system gathers was not")
    x = np.ones((1, len(weights)), np.float32)
    assert np.allclose(session.run({"x": x})["y"], x @ weights, atol=1e-2)


def test_a_small_sessions_weights_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_product(tmp_path / "model.onnx", 256)
    gathered: list[bool] = []
    monkeypatch.setattr("dora_serve.onnxruntime.session.gather", lambda: gathered.append(True))
    Session(tmp_path / "model.onnx", threads=1)
    assert not gathered


def in_huge_pages() -> int:
    """Bytes of this process, as the kernel tells."""
    told = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"AnonHugePages: +(\d+) kB", told)
    assert found is not None
    return 1024 * int(found[1])
