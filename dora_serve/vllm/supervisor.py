"""A server program that is kept running: started, waited for, brought back, and ended whole."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from converters.errors import DoraExportError
from converters.files.interpreters import environment

_POLL = 0.5
_GRACE = 60.0  # between asking a server to end and killing it
_GRACE_AT_START = 5.0  # of one that answers nobody yet
_TIDYING = 5.0  # between killing a server's processes and those that tidy up after them
_TIDIES = b"multiprocessing.resource_tracker"  # in the command of one of these
_STEADY = 60.0  # a crash after so long counts as the first one
_FAILURES = 5  # starts in a row that did not become ready
_LONGEST = 60.0  # between two starts
_LOOK = 5.0  # between two looks at whether the server is still there
_GONE = 20.0  # after so long without its engine or its port it will not end by itself
_PR_SET_PDEATHSIG = 1
_opener = build_opener(ProxyHandler({}))  # the server is on this machine, a proxy may not be


class ServerError(DoraExportError, RuntimeError):
    """The server does not start."""


@dataclass
class Supervisor:
    """Runs `command` until it is told to stop; `again()` gives the command of a later start, the
    former one is taken where it raises `DoraExportError`.

    `health`: the URL that answers 200 when the server is ready. `log`: the file that takes what
    the server prints. `report(event, seconds)` hears of "starting" twice a second, "ready",
    "crashed" (with the pause until the next start) and "stopping".
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    health: str
    log: Path
    report: Callable[[str, float], None]
    again: Callable[[], Sequence[str]] | None = None

    def run(self) -> None:
        """Keep the server running until SIGINT or SIGTERM; a second one ends it at once.

        Raises `ServerError` when the first start fails, or five in a row; a port where something
        answers already is such a failure. Nothing that the server started outlives this call.
        """
        was_ready, failures, pause = False, 0, 0.5
        with _signals() as signals:
            while True:
                began = time.monotonic()
                ready, code = self._once(signals)
                if signals:
                    return
                was_ready |= ready
                failures = 0 if ready else failures + 1
                if not was_ready or failures == _FAILURES:
                    raise self._error(code)
                pause = 1.0 if time.monotonic() - began > _STEADY else min(2 * pause, _LONGEST)
                self.report("crashed", pause)
                _sleep(pause, signals)
                if self.again is not None and not signals:
                    with suppress(DoraExportError, _Stopped), signals.raising():
                        self.command = self.again()
                if signals:
                    return

    def _once(self, signals: _Signals) -> tuple[bool, int | None]:
        """Run the server once: whether it became ready, and its exit code; None when its port was
        taken and it was not started, since what answers there would pass for it."""
        if self._taken():
            return False, None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment(), **self.environment},
                start_new_session=True,  # a group of its own, which Ctrl-C does not reach
                preexec_fn=_end_with_parent,
            )
        ready, began = False, time.monotonic()
        there = looked = began
        try:
            while process.poll() is None and not signals and looked - there < _GONE:
                seconds = time.monotonic() - began
                if ready and began + seconds - looked > _LOOK:
                    looked = time.monotonic()
                    there = there if self._is_gone() else looked
                elif not ready and self._answers():
                    ready = True
                    there = looked = time.monotonic()
                    self.report("ready", seconds)
                elif not ready:
                    self.report("starting", seconds)
                _sleep(_POLL, signals)
            if process.poll() is None and signals:
                self.report("stopping", 0)
        finally:
            _end(process, signals, _GRACE if ready and signals else _GRACE_AT_START)
        return ready, process.returncode

    def _taken(self) -> bool:
        where = urlsplit(self.health)
        address = (where.hostname or "", where.port or 80)
        with suppress(OSError), socket.create_connection(address, timeout=5):
            return True
        return False

    def _answers(self) -> bool:
        with suppress(OSError), _opener.open(self.health, timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def _is_gone(self) -> bool:
        """Whether nothing listens any more, or what does says that it cannot serve: vLLM whose
        engine died waits for ever for requests that wait for the engine."""
        try:
            _opener.open(self.health, timeout=5).close()
        except HTTPError as error:
            return error.code >= 500
        except URLError as error:
            return isinstance(error.reason, ConnectionRefusedError)
        except OSError:  # busy
            pass
        return False

    def _error(self, code: int | None) -> ServerError:
        if code is None:
            where = urlsplit(self.health)
            return ServerError(
                "another program has the server's port",
                found=f"port {where.port} of {where.hostname} answers already",
                remedy="end that program, or choose another port with --port",
            )
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        telling = [line for line in lines[-200:] if "Error" in line or "error" in line]
        return ServerError(
            "the server ended before it was ready",
            file=self.log,
            found=f"exit code {code}; " + "\n    ".join((telling or lines)[-4:]),
            remedy="read the log",
        )


def _end(process: subprocess.Popen[bytes], signals: _Signals, grace: float) -> None:
    """End the server and all that it started; kill what does not end within `grace` seconds.

    vLLM's shared memory, hundreds of megabytes at each start, is removed by a process of Python's
    that waits for all others to end.
    """
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        began = time.monotonic()
        while process.poll() is None and len(signals) < 2 and time.monotonic() - began < grace:
            time.sleep(0.1)
    began = time.monotonic()
    while (left := _group(process.pid)) and time.monotonic() - began < _TIDYING:
        for pid, command in left.items():
            if _TIDIES not in command:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _group(number: int) -> dict[int, bytes]:
    """Process → its command, of those of a group that run; none where there is no `/proc`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, group = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if state != "Z" and int(group) == number:
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
    return found


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end_with_parent() -> None:
    """In the child: SIGTERM when this process dies of whatever cause (Linux)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _sleep(seconds: float, signals: _Signals) -> None:
    end = time.monotonic() + seconds
    while not signals and time.monotonic() < end:
        time.sleep(min(0.1, seconds))


class _Stopped(BaseException):
    """A signal to stop came while something was done that does not look for one."""


class _Signals(list[int]):
    """The signals to stop that have come so far."""

    _raises = False

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise `_Stopped` as soon as one comes."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.append(number)
        if self._raises:
            raise _Stopped


@contextmanager
def _signals() -> Iterator[_Signals]:
    came = _Signals()
    previous = {n: signal.signal(n, came.note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
