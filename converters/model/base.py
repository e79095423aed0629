"""The base model's folder: configuration, tensors, names, orientation, fingerprint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from blake3 import blake3

from ..errors import BaseError, MissingError
from ..files.handles import reading, there
from ..files.hashes import TensorHashes
from ..files.tensors import (
    LazyTensor,
    LazyTensors,
    nbytes,
    numel,
    open_file,
    read_json,
    rows_and_columns,
)
from ..updates.update import convolution_matrix
from .architecture import check_counts
from .quantized import METHODS, Dequantized, dequantized, dtype_before, method
from .tasks import task_in

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# Families whose linear layers are transformers' Conv1D, stored as [in, out].
CONV1D_FAMILIES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
CONV1D_LAYERS = {"c_attn", "q_attn", "c_proj", "c_fc"}
HEAD = "lm_head.weight"
_ADAPTER = "adapter_config.json"
_EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight"),
    ".embeddings.weight",  # Mamba
)
_REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_WRAPPER_PREFIXES = ("module.", "base_model.model.", "model.")


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk. `shards` maps each weight file to its tensors, in file order; those of
    a quantization that is known are float tensors in it, and `stored` are what the files hold.
    `fault`: why that could not be made of packed tensors. `revision`: of the hub's model, where one
    was asked for."""

    path: Path
    name: str
    config: Mapping[str, object]
    shards: Mapping[Path, LazyTensors]
    stored: Mapping[Path, LazyTensors] | None = None
    fault: BaseError | None = None
    revision: str | None = None

    @cached_property
    def tensors(self) -> LazyTensors:
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.items()}

    @cached_property
    def task(self) -> str | None:
        """What it is for by itself."""
        return task_in(self.path, self.config)

    @property
    def packed(self) -> bool:
        """Whether `tensors` are of other shapes than in memory: quantized in a way that is not
        known here."""
        return self.stored is None and method(self.config) is not None

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors in the files."""
        shards = self.shards if self.stored is None else self.stored
        return sum(nbytes(tensor) for shard in shards.values() for tensor in shard.values())

    @cached_property
    def _roots(self) -> list[str]:
        return sorted({name.split(".", 1)[0] + "." for name in self.tensors})

    def find(self, name: str) -> str | None:
        """The base's own name of tensor `name`, with or without a model prefix; None if absent.

        Lenient: it finds what is probably meant, and never validates that a class has a tensor of
        that name. `Layout.find` tells names in memory.
        """
        if name in self.tensors:
            return name
        shorter = [name[len(p) :] for p in _WRAPPER_PREFIXES if name.startswith(p)]
        shorter.append(name.split(".", 1)[-1])
        longer = [root + name for root in self._roots]
        found = {candidate for candidate in (*shorter, *longer) if candidate in self.tensors}
        return found.pop() if len(found) == 1 else None

    def weight(self, module: str) -> LazyTensor | None:
        """The weight tensor of a module, or the parameter of that name; for a head that the base
        does not hold, the embedding it is tied to."""
        name = self.find(f"{module}.weight") or self.find(module)
        if name is None and f"{module}.weight" == HEAD:
            name = self.embedding
        return None if name is None else self.tensors[name]

    def is_quantized(self, name: str) -> bool:
        """Whether the files hold tensor `name` as packed numbers, which are read as floats."""
        found = self.find(name)
        return found is not None and isinstance(self.tensors[found], Dequantized)

    def lends(self, module: str) -> bool:
        """Whether `weight` gives the embedding for `module`: a head that is tied to it, or lies
        under a name that its class knows."""
        return f"{module}.weight" == HEAD and self.find(HEAD) is None

    @cached_property
    def embedding(self) -> str | None:
        """The tensor name of the input embedding."""
        return next((name for name in self.tensors if name.endswith(_EMBEDDINGS)), None)

    def is_conv1d(self, module: str) -> bool:
        """Whether `module` is a layer of transformers' Conv1D, whose weight is `[in, out]`."""
        own = self.config.get("model_type") in CONV1D_FAMILIES
        return own and module.rsplit(".", 1)[-1] in CONV1D_LAYERS

    def is_transposed(self, module: str, shape: tuple[int, int], embedding: bool = False) -> bool:
        """Whether the weight of `module`, `shape [out, in]`, is stored as `[in, out]`.

        Raises `BaseError` when the stored shape is neither.
        """
        weight = self.weight(module)
        if weight is None:
            raise BaseError(
                "the base has no such module",
                file=self.path,
                tensor=f"{module}.weight",
                expected=f"a weight of shape {list(shape)}",
                found="; ".join(list(self.tensors)[:3]) + "; …",
                remedy="is this the base the run was trained on? pass it with `base`",
            )
        square = shape[0] == shape[1]
        stored = rows_and_columns(weight.shape)
        if len(weight.shape) > 2 and convolution_matrix(weight.shape) == shape:
            return False
        if stored == shape and not square:
            return False
        if weight.shape == shape[::-1] and not embedding:
            return not square or self.is_conv1d(module)
        if stored == shape:
            return False
        self.refuse_packed(module)
        raise BaseError(
            "the run's update does not fit the base weight",
            file=weight.path,
            tensor=weight.name,
            found=list(weight.shape),
            expected=list(shape),
            remedy="is this the base the run was trained on? pass the right one with `base`",
        )

    def refuse_packed(self, module: str) -> None:
        """Raise `BaseError` for a base whose weights are packed, which take no update."""
        if self.fault is not None:
            raise self.fault
        if self.packed:
            raise BaseError(
                "the base is quantized, and the file holds no plain weight of this module",
                file=self.path,
                tensor=f"{module}.weight",
                found=f"quantization_config: {method(self.config)}",
                expected=f"no quantization, or one of these: {', '.join(METHODS)}",
                remedy="merge into the base before it was quantized, or deploy an adapter "
                "(`adapter`), which engines compute beside the quantized base",
            )

    def dtype(self) -> torch.dtype:
        """The dtype that most of the base's bytes have, or had before it was quantized."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            dtype = dtype_before(tensor)
            if self.packed and not (dtype.is_floating_point and dtype.itemsize > 1):
                continue
            sizes[dtype] = sizes.get(dtype, 0) + numel(tensor) * dtype.itemsize
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)

    @cached_property
    def hashes(self) -> TensorHashes:
        """The hashes of its tensors, for one who reads them anyway."""
        return TensorHashes(self.shards if self.stored is None else self.stored)

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        """Tensor name → BLAKE3 of its dtype, shape and every element, of all tensors.

        It is what a certificate says of a base: the model, however its tensors lie in files. So a
        base that was sharded anew or converted to safetensors is the same as long as names, dtypes
        and elements are; what lies beside the tensors is not in it. A tensor that only one of two
        bases stores, such as the second name of a tied one, tells them apart.
        """
        return self.hashes.all()

    @cached_property
    def identity(self) -> str:
        """BLAKE3 of the fingerprint and of the configuration: what is made from two bases of one
        identity is the same."""
        said = [sorted(self.fingerprint.items()), self.config]
        return blake3(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise `BaseError` where another model lies in the folder by now: who was given its path,
        as transformers is, may have read that one."""
        if open_base(self.path).identity != self.identity:
            raise BaseError(
                "the base changed while it was read",
                file=self.path,
                remedy="run again when nothing writes to it",
            )

    def unlike(self, fingerprint: Mapping[str, object]) -> list[str]:
        """The tensors, by name, in which this base is not the one of `fingerprint`."""
        own = self.fingerprint
        names = {*own, *fingerprint}
        return sorted(name for name in names if own.get(name) != fingerprint.get(name))


def open_base(folder_or_id: str | Path, revision: str | None = None) -> BaseModel:
    """Open a base model: a local folder, or a hub id that is in the local cache, of which
    `revision` is a branch, a tag or a commit.

    Raises `MissingError` when there is none, `BaseError` when the folder is incomplete.
    """
    name = str(folder_or_id)
    if not name:
        raise MissingError("the base model's name is empty")
    folder = Path(name)
    own = folder.is_absolute() or name.startswith((".", "~"))  # no hub id begins so
    if own and not there(folder):
        raise MissingError(
            "no such base model: there is no such path",
            file=folder,
            remedy="give the folder that from_pretrained would take",
        )
    with reading(folder, BaseError):
        if there(folder) and folder.is_dir():
            return _open(folder, name)
    folder = _cached_snapshot(name, revision)
    with reading(folder, BaseError):
        return replace(_open(folder, name), revision=revision)


def _open(folder: Path, name: str) -> BaseModel:
    config_path = folder / "config.json"
    if not config_path.exists():
        raise MissingError(
            "the base model has no config.json",
            file=config_path,
            remedy="pass `base` the folder that from_pretrained would take",
        )
    config = read_json(config_path)
    if not isinstance(config.get("model_type", ""), str):
        raise BaseError("model_type is not a name", file=config_path, found=config["model_type"])
    _refuse_named(folder, config)
    stored, floats, fault = _open_shards(folder), None, None
    try:
        floats = dequantized(config, stored)
    except BaseError as error:  # an adapter can be made all the same
        fault = error
    if floats and config.get("model_type") in CONV1D_FAMILIES:
        floats = {path: _as_conv1d(tensors) for path, tensors in floats.items()}
    base = BaseModel(folder, name, config, floats or stored, floats and stored, fault)
    try:
        check_counts(config, len(base.tensors))
    except ValueError as error:
        raise BaseError(
            "config.json is not of a model with these weights", file=config_path, found=error
        ) from None
    return base


def _as_conv1d(tensors: LazyTensors) -> LazyTensors:
    """Packed weights are `[out, in]` of every layer; those of Conv1D are not, as floats."""
    return {
        name: tensor.flipped()
        if isinstance(tensor, Dequantized) and {*name.split(".")} & CONV1D_LAYERS
        else tensor
        for name, tensor in tensors.items()
    }


def _cached_snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    told = f", its revision {revision}" if revision else ""
    try:
        if revision and not _REVISION.fullmatch(revision):  # a path, which the cache would follow
            raise ValueError(revision)
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:
        raise MissingError(
            "no such base model: neither a folder nor a model in the local hub cache",
            file=name,
            found=f"revision {revision}" if revision else None,
            remedy="give a folder, or fetch it first"
            + (f": hf download {name}{told}" if _is_plain(name, revision) else ""),
        ) from None


def _is_plain(name: str, revision: str | None) -> bool:
    """Whether both can be shown in a command."""
    known = revision is None or _REVISION.fullmatch(revision)
    return bool(_HUB_ID.fullmatch(name) and known)


def _refuse_named(folder: Path, config: Mapping[str, object]) -> None:
    """Raise `BaseError` where transformers would load other weights than those that are read."""
    usual = [name for pair in zip(SINGLE_FILES, INDEX_FILES, strict=True) for name in pair]
    read = next((name for name in usual if (folder / name).exists()), None)
    named = config.get("transformers_weights")
    if named not in (None, read):
        raise BaseError(
            "config.json names the file that transformers takes the weights from "
            "(transformers_weights), which other engines do not read",
            file=folder / "config.json",
            found=named,
            expected=read or usual[0],
            remedy="load and save it with transformers, and use the new folder",
        )
    if read is not None and there(folder / _ADAPTER):
        raise BaseError(
            "an adapter lies beside the base's weights, and transformers loads it with them",
            file=folder / _ADAPTER,
            remedy="move the adapter into a folder of its own; merge it first where it belongs to "
            "the base",
        )


def _open_shards(folder: Path) -> dict[Path, LazyTensors]:
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (file := folder / single).exists():
            if tensors := open_file(file):
                return {file: tensors}
            raise BaseError(
                "the base's file holds no tensor", file=file, remedy="download the base again"
            )
        if (folder / index).exists():
            return _open_indexed(folder / index)
    raise MissingError(
        "the base model has no weights",
        file=folder,
        found=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder",
        expected=" or ".join((*SINGLE_FILES, *INDEX_FILES)),
    )


def _open_indexed(index: Path) -> dict[Path, LazyTensors]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseError("the shard index has no weight_map", file=index)
    shards: dict[Path, LazyTensors] = {}
    for file in sorted({str(file) for file in weight_map.values()}):
        path = index.parent / file
        if Path(file).name != file:
            raise BaseError("a shard lies outside the model folder", file=index, found=file)
        if not there(path):
            raise MissingError(
                "a shard of the base is missing",
                file=path,
                expected=f"named in {index.name}",
                remedy="download the base again",
            )
        shards[path] = open_file(path)
    for name, file in weight_map.items():
        if name not in shards[index.parent / str(file)]:
            raise BaseError(
                "the index names a tensor that its shard does not hold",
                file=index.parent / str(file),
                tensor=name,
                remedy="the base is damaged: download it again",
            )
    return shards
