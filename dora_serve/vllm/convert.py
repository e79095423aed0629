"""Runs as adapters that vLLM loads, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from converters.certificate import FILE as CERTIFICATE
from converters.certificate import artifact_files
from converters.errors import RunError
from converters.files.cache import cache_folder
from converters.files.handles import reading
from converters.files.hashes import Memory
from converters.files.json_files import read_json
from converters.targets.lora_folder import CONFIG

from ..api import write_adapter
from ..folder.cache import cached, member_key
from ..folder.inventory import Member
from ..proof.check import check

TARGET = "vllm"


def vllm_adapter(member: Member) -> Path:
    """The folder to give to vLLM, in the cache under a key of the run's and its base's whole
    content: made now if it is not there, a copy where the run was written for vLLM.

    vLLM reads an adapter's files again whenever it needs room, and tells weights, and the keys and
    values computed with them, apart by name and path. So it is given no path of the user's, where
    anything may happen.

    Raises `DoraExportError` when no adapter equals the run, or it changed since reading it began.
    """
    make: Callable[[Path], object] = partial(_copy, member.path)
    if not _is_for_vllm(member.path):
        make = partial(write_adapter, member.run, base=member.base, target=TARGET)
    return cached(_key(member), make).absolute()


def vllm_adapter_path(member: Member) -> Path:
    """Where `vllm_adapter` finds or makes it; makes nothing."""
    return (cache_folder() / _key(member)).absolute()


def _key(member: Member) -> str:
    return member_key(member, target=TARGET)


def _copy(adapter: Path, folder: Path) -> None:
    """Copy an adapter with its certificate. Raises `RunError` when it changes meanwhile."""
    # No hard links: who writes to a file of the run writes to all its links.
    with reading(adapter, RunError):
        for name, path in {CERTIFICATE: adapter / CERTIFICATE, **artifact_files(adapter)}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    if not check(folder).passed:
        raise RunError(
            "the run changed while it was read",
            file=adapter,
            remedy="run again when nothing writes to it",
        )


def _is_for_vllm(path: Path) -> bool:
    """Whether it is an adapter that was written for vLLM, and still is as it was written."""
    proof = path / CERTIFICATE
    with reading(path, RunError):
        if not (path / CONFIG).is_file() or not proof.is_file():
            return False
        if read_json(proof).get("target") != TARGET:
            return False
        memory = Memory("as its certificate says", [proof, *artifact_files(path).values()])
    if memory.answer is None:
        memory.answer = str(check(path).passed)
        memory.keep(memory.answer)
    return memory.answer == str(True)
