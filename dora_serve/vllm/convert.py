"""Runs as adapters that vLLM loads, made once."""

from __future__ import annotations

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
    """The folder to give to vLLM: the member's own when it was written for vLLM, else one in the
    cache, made now if it is not there.

    Raises `DoraExportError` when no adapter equals the run, or it changed since reading it began.
    """
    if _is_for_vllm(member.path):
        return member.path.resolve()
    return cached(
        _key(member),
        lambda folder: write_adapter(member.run, folder, base=member.base, target=TARGET),
    )


def vllm_adapter_path(member: Member) -> Path:
    """Where `vllm_adapter` finds or makes it; makes nothing."""
    if _is_for_vllm(member.path):
        return member.path.resolve()
    return cache_folder() / _key(member)


def _key(member: Member) -> str:
    return member_key(member, target=TARGET)


def _is_for_vllm(path: Path) -> bool:
    """Whether it is an adapter that was written for vLLM, and still is as it was written."""
    proof = path / CERTIFICATE
    if not (path / CONFIG).is_file() or not proof.is_file():
        return False
    with reading(path, RunError):
        if read_json(proof).get("target") != TARGET:
            return False
        memory = Memory("as its certificate says", [proof, *artifact_files(path).values()])
    if memory.answer is None:
        memory.answer = str(check(path).passed)
        memory.keep(memory.answer)
    return memory.answer == str(True)
