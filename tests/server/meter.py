"""Measures a server while somebody else attacks it: `python meter.py HOST PORT PID`.

A process of its own, and before others where it may be: what the attacker does in one shall not
count. Until its input ends it asks for `/health`, each time by a new connection, and weighs the
process and those below it. Then it prints the longest wait in seconds, and the most bytes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from math import inf
from pathlib import Path

STALLED = 30.0  # seconds after which a server that says nothing is stalled
_PAUSE = 0.05


def used(pid: int) -> int:
    """Bytes of memory of the process and those below it; what several share counts once. Pages of
    files, as a library's, count not: how many belong to a process depends on who else reads them,
    and the system takes them back when it needs them."""
    found, left = 0, [pid]
    while left:
        folder = Path(f"/proc/{left.pop()}")
        with suppress(OSError):
            told = (folder / "smaps_rollup").read_text().split()
            kinds = ("Pss_Anon:", "Pss_Shmem:")
            found += sum(int(told[told.index(kind) + 1]) for kind in kinds) << 10
            for children in folder.glob("task/*/children"):
                left += map(int, children.read_text().split())
    return found


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


def main(host: str, port: int, pid: int) -> None:
    with suppress(OSError):
        os.nice(-15)
    done, waits, sizes = threading.Event(), [waited(host, port)], [used(pid)]

    def weigh() -> None:
        while not done.is_set():
            sizes.append(used(pid))
            time.sleep(_PAUSE)

    def ask() -> None:
        while not done.is_set():
            waits.append(waited(host, port))
            time.sleep(_PAUSE)

    threads = [threading.Thread(target=each) for each in (ask, weigh)]
    for each in threads:
        each.start()
    print("ready", flush=True)
    sys.stdin.read()
    done.set()
    for each in threads:
        each.join()
    print(max(waits), max(sizes))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
