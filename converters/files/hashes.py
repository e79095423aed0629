"""BLAKE3 of files and of tensors: every byte is read once, and the answer remembered.

What is remembered is kept in the user's cache under the state of the files: path, inode, size, and
both times of change. Not remembered is a file that changed a moment before it was read, since a
change within the same tick of the clock would not show in its state, and one whose state tells
little, see `is_telling`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from blake3 import blake3

from ..errors import BaseError, OutputError
from ..progress import Progress, shown
from .cache import private_cache
from .cores import cores
from .handles import check_file, reading
from .tensors import LazyTensor, LazyTensors, blocks, byte_view, nbytes

_SETTLED = 100_000_000  # nanoseconds; the kernel stamps files with a clock of some milliseconds
_PIECE = 1 << 20
HASHING = "reading every byte once"


def is_telling(found: os.stat_result) -> bool:
    """Whether a file's state tells it from any other that may come to lie at its path. Not where it
    changed at a whole second: so say file systems that know no more (squashfs, FAT, old ext), and
    disks and images of two versions of a model can be made with all sizes and times alike."""
    return found.st_ctime_ns % 1_000_000_000 != 0


class Memory:
    """What was once found out about `files`, of those contents: `answer`, None where it is to be
    found out now. `question` says what it is and how it is computed.

    Where the cache cannot be used, nothing is remembered.
    """

    def __init__(self, question: str, files: Iterable[Path]) -> None:
        now = time.time_ns()
        found = [(os.path.realpath(path), path.stat()) for path in sorted(set(files))]
        states = [(p, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in found]
        self._settled = all(s.st_ctime_ns + _SETTLED < now and is_telling(s) for _, s in found)
        self._key = blake3(json.dumps([question, states]).encode()).hexdigest(length=16)
        self.answer: str | None = None
        if not self._settled:
            return
        # One that a crash of the machine left in pieces is no JSON.
        with suppress(OutputError, OSError, ValueError):
            value = json.loads((private_cache() / "hashes" / self._key).read_bytes())
            self.answer = value if isinstance(value, str) else None

    def keep(self, answer: str) -> None:
        """Remember `answer` to the question, found out since this memory was asked."""
        if not self._settled:
            return
        with suppress(OutputError, OSError):
            place = private_cache() / "hashes"
            place.mkdir(exist_ok=True)
            descriptor, new = tempfile.mkstemp(dir=place)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    json.dump(answer, stream)
                Path(new).replace(place / self._key)
            except OSError:  # a full disk has room for names without end
                Path(new).unlink()
                raise


def file_hash(path: Path) -> str:
    """BLAKE3 of a file, remembered. Raises `OSError`, and `TensorFileError` for what is no file."""
    check_file(path)
    memory = Memory("file", [path])
    if memory.answer is not None:
        return memory.answer
    digest = blake3()
    with path.open("rb", buffering=0) as stream, shown(path.stat().st_size, HASHING) as advance:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            advance(len(piece))
    answer = digest.hexdigest()
    memory.keep(answer)
    return answer


class TensorHashes:
    """BLAKE3 of the tensors of `files`, path → tensors: each of dtype, shape and every element.
    Raises `DoraExportError` where a file is another by now than when it was opened."""

    def __init__(self, files: Mapping[Path, LazyTensors]) -> None:
        self._files = files
        self._memory: dict[Path, Memory] = {}
        self._known: dict[tuple[Path, str], str] = {}
        for path, tensors in files.items():
            with reading(path, BaseError):
                memory = Memory("tensors", [path])
            if memory.answer is not None:
                known = json.loads(memory.answer)
                # Of the file that lies there now, which has to be the one that was opened.
                for tensor in list(tensors.values())[:1]:
                    tensor.read_into(torch.empty(0, dtype=tensor.dtype), 0)
                self._known |= {(path, name): known[name] for name in tensors}
            else:
                self._memory[path] = memory

    def job(self, tensor: LazyTensor) -> Callable[[], None] | None:
        """What hashes `tensor`, for one who is about to read it anyway and has threads to do it;
        None where its hash is known, or it is none of the files'."""
        own = self._files.get(tensor.path, {}).get(tensor.name)
        if own is not tensor or (tensor.path, tensor.name) in self._known:
            return None
        return partial(self._hash, tensor)

    def all(self) -> dict[str, str]:
        """Tensor name → hash, of all tensors. Those that no job has hashed are read now, by as many
        threads as there are cores. Raises `DoraExportError` when a file cannot be read."""
        tensors = [tensor for each in self._files.values() for tensor in each.values()]
        left = [tensor for tensor in tensors if (tensor.path, tensor.name) not in self._known]
        with (
            shown(sum(map(nbytes, left)), HASHING) as advance,
            ThreadPoolExecutor(len(cores())) as pool,
        ):
            for _ in pool.map(partial(self._hash, advance=advance), left):
                pass
        for path, memory in self._memory.items():
            memory.keep(json.dumps({name: self._known[path, name] for name in self._files[path]}))
        self._memory.clear()
        return {tensor.name: self._known[tensor.path, tensor.name] for tensor in tensors}

    def _hash(self, tensor: LazyTensor, advance: Progress = lambda _bytes: None) -> None:
        digest = blake3(f"{tensor.dtype} {list(tensor.shape)}".encode())
        for block in blocks(tensor):
            digest.update(byte_view(block))
            advance(block.nbytes)
        self._known[tensor.path, tensor.name] = digest.hexdigest()
