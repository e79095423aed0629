"""Hostile folders, built by code: each spoils a sound adapter, run or base in one way.

A case is a function that is given the folder to spoil, and the words of the error to expect.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Spoil = Callable[[Path], object]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
QA, QB = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
SECRET = "the-content-of-a-file-elsewhere"


@dataclass(frozen=True)
class Case:
    """`kind`: what is spoiled, "adapter", "run" or "base"."""

    name: str
    kind: str
    spoil: Spoil
    says: str


class Evil:
    """Makes the folder `executed` when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def raw(header: object, data: bytes = b"", order: str = "<") -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(f"{order}Q", len(text)) + text + data


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(name: str, data: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(data)


def header(value: object, data: bytes = b"", order: str = "<") -> Spoil:
    return write(WEIGHTS, raw(value, data, order))


def pair(a: object, b: object, data: bytes = b"") -> Spoil:
    return header({QA: a, QB: b}, data)


def configure(**values: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def tensors(**changes: Any) -> Spoil:
    """Changes tensors of an adapter by the keys qa and qb: to another, None to remove it, or by a
    function of the old one."""

    def spoil(folder: Path) -> None:
        known = load_file(folder / WEIGHTS)
        for key, value in changes.items():
            name = {"qa": QA, "qb": QB}[key]
            known[name] = value(known[name]) if callable(value) else value
        kept = {name: tensor for name, tensor in known.items() if tensor is not None}
        save_file(kept, folder / WEIGHTS)

    return spoil


def rename(old: str, new: str, file: str = WEIGHTS) -> Spoil:
    def spoil(folder: Path) -> None:
        known = load_file(folder / file)
        save_file({name.replace(old, new): t for name, t in known.items()}, folder / file)

    return spoil


def both(*steps: Spoil) -> Spoil:
    return lambda folder: [step(folder) for step in steps]


def torch_file(name: str, value: object, instead: str, **options: Any) -> Spoil:
    """A torch file in the place of a safetensors file."""

    def spoil(folder: Path) -> None:
        (folder / instead).unlink()
        torch.save(value, folder / name, **options)

    return spoil


def bomb(folder: Path) -> None:
    """A torch file whose storage of 256 MB is compressed to a few hundred KB."""
    (folder / WEIGHTS).unlink()
    path = folder / "adapter_model.bin"
    torch.save({QA: torch.zeros(4, 32)}, path)
    with zipfile.ZipFile(path) as old:
        files = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in files.items():
            new.writestr(name, bytes(256 << 20) if name.endswith("/data/0") else data)


def pickled(name: str, instead: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / instead).unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps({QA: Evil()}))

    return spoil


def link(name: str, to: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return spoil


def secret_link(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.write_text(SECRET)
        link(name, str(outside))(folder)

    return spoil


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def grown(name: str, size: int) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return spoil


def index(weight_map: object) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / MODEL).rename(folder / "model-00001-of-00001.safetensors")
        shutil.copyfile(
            folder / "model-00001-of-00001.safetensors", folder.parent / "x.safetensors"
        )
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def base_config(**values: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def base_tensor(name: str, tensor: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        known = load_file(folder / MODEL)
        known[name] = tensor(known[name]) if callable(tensor) else tensor
        save_file(known, folder / MODEL)

    return spoil


def task_info(text: str) -> Spoil:
    def spoil(folder: Path) -> None:
        log = Path(str(folder.parent).replace("/Checkpoint/", "/Log/"))
        (log / "task_info.json").write_text(text)

    return spoil


def run_tensor(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(folder: Path) -> None:
        known = load_file(folder / MODEL)
        name = next(n for n in known if n.endswith(part))
        known[name] = change(known[name])
        save_file(known, folder / MODEL)

    return spoil
