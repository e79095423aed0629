"""The commands as processes that have their imports behind them.

What a command costs is mostly the import of torch and transformers. `commands()` is a folder for
the PATH, the same for all workers of pytest-xdist: its `dora-export`, `dora-serve` and `python` ask
one process, which has imported them, to fork. Each is a process of its own with the asker's folder,
environment and streams, and ends with the command's exit code; who ends the asker ends the command.
What a command starts below it only to import torch again, a batch's workers too, is forked as well.
Tests of what a command imports, of signals, or of the processes below a command start the installed
ones instead.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

_PRELOADED = (
    *("click", "onnxruntime_genai.models.builder", "peft", "safetensors.torch"),
    *("torch", "transformers.modeling_utils"),
)
# Our modules that start a process of Python, ONNX Runtime's builder or the server's `prepare`.
_STARTING = ("converters.targets.onnx.decoder", "dora_serve.server.prepare.child")
_TABLE = "torch.onnx._internal.exporter._registration"
_NAMES = ("dora-export", "dora-serve", "python")
_READY = "ready"
_PATIENCE = 300.0  # seconds
SHARED = "DORA_TESTS_COMMANDS"
_ASK = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({address!r})
    words = json.dumps([[{name!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(asked, [len(words).to_bytes(8, "big")], [0, 1, 2])
    asked.sendall(words)
    code = asked.recv(1)
os._exit(code[0] if code else 70)
"""


def begin() -> Path:
    """Start that process, which ends with this one and is ready some seconds later."""
    folder = Path(tempfile.mkdtemp(prefix="commands-"))
    address = str(folder / "socket")
    for name in _NAMES:
        (folder / name).write_text(_ASK.format(python=sys.executable, address=address, name=name))
        (folder / name).chmod(0o755)
    subprocess.Popen(
        [sys.executable, "-c", "from tests.processes import serve; serve()", address],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def commands() -> Path:
    """The folder: that of all workers, whom `$SHARED` tells it, or one of our own."""
    folder = Path(os.environ[SHARED]) if SHARED in os.environ else begin()
    end = time.monotonic() + _PATIENCE
    while not (folder / _READY).exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return folder


class _Below:
    """What such a module sees as `sys`."""

    def __init__(self, python: Callable[[], Path]) -> None:
        self._python = python

    @property
    def executable(self) -> str:
        return str(self._python())


class _Forking:
    """What a batch sees as `multiprocessing`: its workers are forked from it."""

    parent_process = staticmethod(multiprocessing.parent_process)

    @staticmethod
    def get_context(_forkserver: str) -> object:
        return multiprocessing.get_context("fork")


def fork_below(python: Callable[[], Path] = lambda: commands() / "python") -> None:
    """Let `python` run what our modules start from this process, which is then forked as well, and
    a batch's workers be forked from the batch."""
    for module in _STARTING:
        import_module(module).__dict__["sys"] = _Below(python)
    import_module("dora_serve.batch.local").__dict__["multiprocessing"] = _Forking


def share_table() -> None:
    """Let torch make its table of what it can export once, not for each graph: it is the same."""
    registry = getattr(sys.modules.get(_TABLE), "ONNXRegistry", None)
    if registry is not None and isinstance(vars(registry)["from_torchlib"].__func__, FunctionType):
        made: Any = cache(vars(registry)["from_torchlib"].__func__)
        registry.from_torchlib = classmethod(made)


def serve() -> None:
    """Fork for each who connects, until standard input ends."""
    address = sys.argv[1]
    sys.path.remove("")  # a command does not look for modules where it is called
    gc.disable()
    for module in (*_PRELOADED, _TABLE):
        import_module(module)
    share_table()
    gc.freeze()  # what is imported is not looked through, and so not copied, in each process
    gc.enable()
    fork_below(lambda: Path(address).with_name("python"))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none of those who answer is waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        Path(address).with_name(_READY).touch()
        while True:
            ready, _, _ = select.select([listener.fileno(), 0], [], [])
            if 0 in ready:
                os._exit(0)
            asker, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(asker)
            asker.close()


def _answer(asker: socket.socket) -> NoReturn:
    """Run what is asked for in a child, and tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(asker, 8, 3)
    with asker.makefile("rb") as words:
        arguments, folder, environment = json.loads(words.read(int.from_bytes(size, "big")))
    child = os.fork()
    if child == 0:
        os.setpgrp()
        asker.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        _run(arguments)
    for stream in (*streams, 0, 1, 2):
        with contextlib.suppress(OSError):
            os.close(stream)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, asker.fileno()], [], [])
    if ended not in ready:  # the asker is gone
        os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):
        asker.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def _run(arguments: list[str]) -> NoReturn:
    """As the installed command or the interpreter would."""
    sys.argv = arguments
    code: object = 0
    try:
        name, *words = arguments
        if name == "dora-export":
            import_module("dora_serve.commands").run_export()
        elif name == "dora-serve":
            import_module("dora_serve.commands").dora_serve()
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            assert words[0] == "-c"
            sys.argv = ["-c", *words[2:]]
            sys.path.insert(0, "")
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as done:
        code = done.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
