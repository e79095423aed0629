"""A process's own memory in huge pages: what is in use nearly whole, and nothing of it changed."""

from __future__ import annotations

import mmap
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dora_serve.onnxruntime.huge_pages import gather

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
