"""Measures a server while somebody else attacks it: `python meter.py HOST PORT PID`.

A process of its own, and before others where it may be: what the attacker does in one shall not
count. From one line of its input to the next it asks for `/health`, each time by a new connection,
and weighs the process and those below it. Then it prints the longest wait in seconds, and the most
bytes, and waits for the next two lines.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from math import inf
from pathlib import Path

STALLED = 30.0  # seconds after which a server that says nothing is stalled
_PAUSE = 0.05
_STEP = 4 << 20  # bytes by which a server grows before it is weighed anew
_PAGE = os.sysconf("SC_PAGE_SIZE")
_KCMP, _MEMORY = {"x86_64": 312, "aarch64": 272}, 1  # the system call's number, KCMP_VM
_C = ctypes.CDLL(None)


def used(pid: int) -> int:
    """Bytes of memory of the process and those below it; what several share of a library counts
    once, and so does what one just begun has of its parent until it runs a program of its own."""
    found = 0
    for folder, parent in _tree(pid):
        with suppress(OSError):
            # Asked before: its own program may begin while what it has is read.
            if not same_memory(int(folder.name), parent):
                told = (folder / "smaps_rollup").read_text().split()
                found += int(told[told.index("Pss:") + 1]) << 10
    return found


def resident(pid: int) -> int:
    """As `used`, but for what several share, of which each counts its own; read in no time."""
    found = 0
    for folder, _ in _tree(pid):
        with suppress(OSError):
            found += int((folder / "statm").read_text().split()[1]) * _PAGE
    return found


def _tree(pid: int) -> Iterator[tuple[Path, int]]:
    """The folders in /proc of the process and those below it, each with its parent."""
    left = [(pid, 0)]
    while left:
        process, parent = left.pop()
        folder = Path(f"/proc/{process}")
        yield folder, parent
        with suppress(OSError):
            for children in folder.glob("task/*/children"):
                left += ((int(child), process) for child in children.read_text().split())


def same_memory(process: int, parent: int) -> bool:
    """Whether two processes have one and the same memory, as after vfork."""
    number = _KCMP.get(os.uname().machine)
    return number is not None and _C.syscall(number, process, parent, _MEMORY, 0, 0) == 0


def waited(host: str, port: int) -> float:
    """Seconds until the server says that it is well, infinity when it does not."""
    begin = time.monotonic()
    connection = HTTPConnection(host, port, timeout=STALLED)
    try:
        connection.request("GET", "/health")
        fine = connection.getresponse().status == 200
    except (OSError, HTTPException):
        fine = False
    finally:
        connection.close()
    return time.monotonic() - begin if fine else inf


def measured(host: str, port: int, pid: int) -> tuple[float, int]:
    """The longest wait and the most bytes until the next line of input."""
    done, waits, sizes = threading.Event(), [waited(host, port)], [used(pid)]

    def weigh() -> None:
        weighed = resident(pid)
        while not done.is_set():
            now = resident(pid)
            if now > weighed + _STEP:  # to weigh takes some of a core
                sizes.append(used(pid))
                weighed = now
            time.sleep(2 * _PAUSE)

    def ask() -> None:
        while not done.is_set():
            waits.append(waited(host, port))
            time.sleep(_PAUSE)

    threads = [threading.Thread(target=each) for each in (ask, weigh)]
    for each in threads:
        each.start()
    print("ready", flush=True)
    sys.stdin.readline()
    done.set()
    for each in threads:
        each.join()
    return max(waits), max(sizes)


def main(host: str, port: int, pid: int) -> None:
    with suppress(OSError):
        os.nice(-15)
    while sys.stdin.readline():
        print(*measured(host, port, pid), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
