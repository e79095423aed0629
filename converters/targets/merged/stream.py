"""Writing safetensors as a stream: a merge is a copy of the base in which some tensors change.

Untouched byte ranges are copied by the kernel. A touched tensor goes block of rows by block of
rows through buffers that fit the processor's cache: read, widen to float32, add the update, round
once, write. Memory is one block per thread, whatever the model.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import RawIOBase
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import BaseError
from ...files.cores import cores
from ...files.handles import opened
from ...files.hashes import TensorHashes
from ...files.tensors import DTYPE_NAMES, SafetensorsTensor, byte_view, nbytes, rows_and_columns
from ...progress import Progress
from ...run import Run
from ...updates.update import Update, transposed

if TYPE_CHECKING:
    from .plan import OutputTensor

BLOCK_ELEMENTS = 512 << 10  # 2 MiB in float32: stays in the cache, and amortizes the calls
_COPY_BYTES = 64 << 20
_REPORT_EVERY = 8

# Between file systems, or where the kernel has no such call for one of them.
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

Job = Callable[[], None]
Finished = Callable[[str, Mapping[str, "Rounding"]], None]  # a file on the disk, its modules

# A file that is to be told when it is finished waits for few others: a merge that is killed then
# loses an eighth of its work, not all of it.
_GROUPS = 8


@dataclass
class Rounding:
    """How much of an update survived rounding to the output dtype, over the measured rows.

    All are sums of squares or products over elements: `weight` ‖W‖², `update` ‖ΔW‖²,
    `stored` ‖S‖² and `product` ⟨S, ΔW⟩ with S = stored − W.
    """

    weight: float = 0.0
    update: float = 0.0
    stored: float = 0.0
    product: float = 0.0
    # Of weights quantized again, over all rows: elements, the sum of |S − ΔW|, the largest.
    count: int = 0
    error: float = 0.0
    largest: float = 0.0

    def add(self, weight: torch.Tensor, update: torch.Tensor, stored: torch.Tensor) -> None:
        self.weight += float(torch.dot(weight, weight))
        self.update += float(torch.dot(update, update))
        self.stored += float(torch.dot(stored, stored))
        self.product += float(torch.dot(stored, update))

    @property
    def cosine(self) -> float:
        size = (self.stored * self.update) ** 0.5
        return self.product / size if size else float(self.stored == self.update)

    @property
    def norm_ratio(self) -> float:
        return float((self.stored / self.update) ** 0.5) if self.update else 1.0

    @property
    def relative_update(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None for a base weight of zeros."""
        return float((self.update / self.weight) ** 0.5) if self.weight else None

    @property
    def lost(self) -> float:
        """‖S − ΔW‖ / ‖ΔW‖: the rounding of the whole merged weight, against the size of the update;
        over 1 where it is larger than that."""
        if not self.update:
            return 0.0
        square = self.stored - 2 * self.product + self.update
        return float((max(0.0, square) / self.update) ** 0.5)


def safetensors_header(tensors: Sequence[OutputTensor]) -> bytes:
    """Length prefix and header of a safetensors file with `tensors` in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.source.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_shards(
    folder: Path,
    shards: Mapping[str, Sequence[OutputTensor]],
    run: Run,
    progress: Progress,
    finished: Finished | None = None,
    hashes: TensorHashes | None = None,
) -> dict[str, Rounding]:
    """Write the safetensors files of `shards`; returns the rounding of each updated module.

    What `hashes` does not know of the sources is hashed beside, while it is in the page cache.

    As many files are in work as there are cores, because the kernel lets one writer into a file
    at a time. Those that are done go to the disk while the next are computed; `finished` is then
    called for each, from one thread.
    """
    reports: dict[str, Rounding] = {}
    most = len(cores())
    names = list(shards)
    width = most if finished is None else min(most, max(1, math.ceil(len(names) / _GROUPS)))
    threads = torch.get_num_threads()

    def flush(stream: RawIOBase, name: str) -> None:
        os.fsync(stream.fileno())
        if finished is not None:
            modules = (tensor.module for tensor in shards[name])
            finished(name, {module: reports[module] for module in modules if module is not None})

    torch.set_num_threads(1)  # the pool has the cores; a block is too small to split further
    try:
        with ExitStack() as files, ThreadPoolExecutor(most) as pool, ThreadPoolExecutor(1) as disk:
            flushes = []
            for start in range(0, len(names), width):
                streams = {
                    name: files.enter_context((folder / name).open("wb", buffering=0))
                    for name in names[start : start + width]
                }
                jobs = [
                    _shard_jobs(stream, shards[name], run, reports, progress, hashes)
                    for name, stream in streams.items()
                ]
                _run_jobs(pool, [j for row in zip_longest(*jobs) for j in row if j is not None])
                flushes += [disk.submit(flush, stream, name) for name, stream in streams.items()]
            for done in flushes:
                done.result()
    finally:
        torch.set_num_threads(threads)
    return reports


def _run_jobs(pool: ThreadPoolExecutor, jobs: Sequence[Job]) -> None:
    """Run all jobs; the first error stops the rest."""
    futures = [pool.submit(job) for job in jobs]
    try:
        for future in futures:
            future.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _shard_jobs(
    stream: RawIOBase,
    tensors: Sequence[OutputTensor],
    run: Run,
    reports: dict[str, Rounding],
    progress: Progress,
    hashes: TensorHashes | None,
) -> list[Job]:
    """Write the header of one file and return the jobs that fill in its tensors."""
    header = safetensors_header(tensors)
    offset = len(header)
    stream.write(header)
    stream.truncate(offset + sum(tensor.nbytes for tensor in tensors))
    jobs: list[Job] = []
    for tensor in tensors:
        if tensor.is_copy:
            jobs += _copy_jobs(tensor, stream.fileno(), offset, progress)
        else:
            jobs.append(_merge_job(tensor, run, stream.fileno(), offset, reports, progress))
        if hashes is not None and (job := hashes.job(tensor.source)) is not None:
            jobs.append(job)
        offset += tensor.nbytes
    return jobs


def _copy_jobs(tensor: OutputTensor, fd: int, offset: int, progress: Progress) -> list[Job]:
    source = tensor.source
    assert isinstance(source, SafetensorsTensor)
    total = nbytes(source)

    def job(start: int) -> Job:
        def copy() -> None:
            count = min(_COPY_BYTES, total - start)
            _copy_range(source, source.offset + start, fd, offset + start, count)
            progress(count)

        return copy

    return [job(start) for start in range(0, total, _COPY_BYTES)]


def _ended(source: SafetensorsTensor) -> BaseError:
    return BaseError(
        "the file ended while it was read",
        file=source.path,
        tensor=source.name,
        remedy="was it changed by another process? copy it again",
    )


def _copy_range(source: SafetensorsTensor, begin: int, fd: int, offset: int, count: int) -> None:
    with opened(source.path, source.state, source.name) as own:
        try:
            while count:
                done = os.copy_file_range(own, fd, count, begin, offset)
                if not done:
                    raise _ended(source)
                begin, offset, count = begin + done, offset + done, count - done
        except (AttributeError, OSError) as error:  # no such call, or not between these files
            if isinstance(error, OSError) and error.errno not in _NO_KERNEL_COPY:
                raise
            while count:
                data = os.pread(own, min(count, 1 << 20), begin)
                if not data:
                    raise _ended(source) from None
                _write_all(fd, memoryview(data), offset)
                begin, offset, count = begin + len(data), offset + len(data), count - len(data)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


_local = threading.local()


def _buffer(name: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """This thread's buffer of that name, grown when needed: fresh memory costs page faults."""
    size = elements * dtype.itemsize
    held: torch.Tensor | None = getattr(_local, name, None)
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.uint8)
        setattr(_local, name, held)
    return held[:size].view(dtype)


def _merge_job(
    tensor: OutputTensor,
    run: Run,
    fd: int,
    offset: int,
    reports: dict[str, Rounding],
    progress: Progress,
) -> Job:
    def merge() -> None:
        rows, columns = rows_and_columns(tensor.source.shape)
        update: Update | None = None
        if tensor.module is not None:
            update = run.take(tensor.module)
            if (parts := update.components()) is not None:
                parts.check_range(tensor.module)
            update = transposed(update) if tensor.transposed else update
            rows, columns = update.shape
            reports[tensor.module] = Rounding()
        step = max(1, BLOCK_ELEMENTS // columns) if columns else 1
        if tensor.blocks is not None:
            step = math.ceil(step / tensor.blocks.rows) * tensor.blocks.rows
        if update is not None and update.whole:
            step = max(1, rows)
        for number, start in enumerate(range(0, rows, step)):
            count = min(step, rows - start)
            out = _merge_block(tensor, update, start, count, columns, number, reports)
            position = offset + start * columns * tensor.dtype.itemsize
            _write_all(fd, byte_view(out), position)
            progress(count * columns * tensor.dtype.itemsize)

    return merge


def _merge_block(
    tensor: OutputTensor,
    update: Update | None,
    start: int,
    rows: int,
    columns: int,
    number: int,
    reports: dict[str, Rounding],
) -> torch.Tensor:
    size = rows * columns
    source = tensor.source
    raw = _buffer("raw", size, source.dtype)
    source.read_into(raw, start * columns)
    if not source.dtype.is_floating_point:
        return raw
    work = _buffer("work", size, torch.float32)
    work.copy_(raw)
    if update is not None:
        update.merge(work.view(rows, columns), start)
    out = _buffer("out", size, tensor.dtype)
    scales: torch.Tensor | None = None
    if tensor.blocks is None:
        out.copy_(work)
    else:
        matrix = work.view(rows, columns)
        scales = tensor.blocks.spread(tensor.blocks.scales(matrix), rows, columns).reshape(-1)
        # A scale of fewer bits may be a little too small; float8 has no infinity, but NaN.
        limit = torch.finfo(tensor.dtype).max
        out.copy_((work / scales).clamp_(-limit, limit))
    # A sum is the cheapest sign of NaN or infinity; finite values may overflow it as well.
    seen = out if scales is None else out.float()  # of which torch has no sum
    if not math.isfinite(seen.sum()) and not bool(torch.isfinite(seen).all()):
        low, high = (float(bound) for bound in torch.aminmax(work))
        raise BaseError(
            "the merged tensor holds NaN, infinity, or values beyond the output dtype",
            file=source.path,
            tensor=source.name,
            found=f"values from {low} to {high} in rows {start} to {start + rows}",
            expected=f"finite values within {tensor.dtype}",
            remedy="the base weights are damaged, or `dtype` is too narrow for them",
        )
    if tensor.module is not None and (scales is not None or number % _REPORT_EVERY == 0):
        weight = _buffer("weight", size, torch.float32).copy_(raw)
        stored = _buffer("stored", size, torch.float32).copy_(out)
        if scales is not None:
            stored.mul_(scales)
            errors = (stored - work).abs_()
            report = reports[tensor.module]
            report.count += size
            report.error += float(errors.sum())
            report.largest = max(report.largest, float(errors.max()))
        reports[tensor.module].add(weight, work.sub_(weight), stored.sub_(weight))
    return out
