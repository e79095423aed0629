"""A folder that may hold a run, as readers see it: every file is opened and parsed once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from ..errors import DoraExportError, MissingError, RunError
from ..files.tensors import LazyTensors, open_file, open_files, read_json
from ..model.base import INDEX_FILES, SINGLE_FILES, BaseModel, open_base
from ..model.names import adapter_in, unwrapped, without_adapter
from .in_pieces import in_pieces

# What PEFT and its forks save.
CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_SHARDS = "adapter_model-?????-of-?????.safetensors"  # transformers' `save_pretrained`

# PEFT also saves the wrapper's copies of what it saves under its own name, without the adapter's
# name; in a state dict as the model has it there are only the wrapper's.
_ORIGINAL, _COPY = ".original_module.", ".modules_to_save."
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")


class RunFolder:
    """The folder `path`, and what its files hold, parsed when a reader asks for the first time.

    All readers are asked about the same object, so that a folder costs one look however many
    methods are installed. `weights` is the adapter's weight file where it is not one of
    `WEIGHT_FILES`, as in a run of several parts. Reading raises `DoraExportError` for a damaged
    file.
    """

    def __init__(self, path: Path, weights: Path | None = None) -> None:
        self.path = path
        self._weights = weights
        self._json: dict[str, Mapping[str, object]] = {}
        self._tensors: dict[Path, LazyTensors | DoraExportError] = {}

    def first(self, *names: str) -> Path | None:
        """The first of these files that is there."""
        return next((self.path / name for name in names if (self.path / name).is_file()), None)

    def has(self, *names: str) -> bool:
        """Whether all these files are there."""
        return all((self.path / name).is_file() for name in names)

    def json(self, name: str) -> Mapping[str, object]:
        """The object in a JSON file."""
        if name not in self._json:
            self._json[name] = read_json(self.path / name)
        return self._json[name]

    def tensors(self, file: str | Path) -> LazyTensors:
        """The tensors of a `.safetensors`, `.bin` or `.pt` file, by their names there. `file`: its
        path, or its name in this folder."""
        path = file if isinstance(file, Path) else self.path / file
        if path not in self._tensors:
            try:
                self._tensors[path] = open_file(path)
            except DoraExportError as error:  # it may be long: no reader is to find it anew
                self._tensors[path] = error
        known = self._tensors[path]
        if isinstance(known, DoraExportError):
            raise known
        return known

    def below(self, name: str) -> RunFolder:
        """The folder of that name inside this one."""
        return RunFolder(self.path / name)

    def only(self, files: Sequence[Path], what: str) -> Path:
        """The file of a run that may lie in one of several. Raises `RunError` for more than one."""
        if len(files) > 1:
            raise RunError(
                f"the folder holds {what}",
                file=self.path,
                found=", ".join(path.name for path in files),
                remedy="put the one you want into a folder of its own",
            )
        return files[0]

    @property
    def adapter_config(self) -> Mapping[str, object]:
        """adapter_config.json, empty where there is none."""
        return self.json(CONFIG_FILE) if self.has(CONFIG_FILE) else {}

    @property
    def adapter_file(self) -> Path | None:
        """The weights of the adapter, or their first shard; None where there are none."""
        return next(iter(self.adapter_files), None)

    @property
    def adapter_files(self) -> tuple[Path, ...]:
        """The weights of the adapter, in shards where transformers wrote it so."""
        one = self._weights or self.first(*WEIGHT_FILES)
        return (one,) if one else tuple(sorted(self.path.glob(_SHARDS)))

    @cached_property
    def adapter(self) -> LazyTensors:
        """The tensors of the adapter by name without PEFT's prefix, the segments of wrappers and
        the name of the adapter; raises `MissingError`, and `RunError` for several adapters, and for
        tensors that lie elsewhere."""
        files = self.adapter_files
        if not files:
            raise in_pieces(self.path) or MissingError(
                "the adapter has no weights",
                file=self.path,
                expected=" or ".join(WEIGHT_FILES),
                remedy="copy that file into the folder too, or let training save the adapter again",
            )
        shards = re.fullmatch(r".*-of-0*(\d+)\.safetensors", files[0].name)
        if shards and len(files) != int(shards[1]):
            raise MissingError(
                "shards of the adapter are missing",
                file=self.path,
                found=", ".join(file.name for file in files),
                expected=f"{shards[1]} files",
                remedy="copy or download the whole folder again",
            )
        stored = self.tensors(files[0]) if len(files) == 1 else open_files(files)
        if not stored and (pieces := in_pieces(self.path)) is not None:
            raise pieces  # DeepSpeed lets PEFT save nothing
        refuse_empty(stored)
        names = _plain(stored, files[0])
        own = {n: t for n, t in names.items() if _ORIGINAL not in n and _COPY not in n}
        copies = {
            _SAVED.sub("", n): t for n, t in names.items() if n.replace(_COPY, ".") not in own
        }
        return {**{n: t for n, t in copies.items() if _ORIGINAL not in n}, **own}

    @cached_property
    def checkpoint(self) -> BaseModel | None:
        """The model folder as transformers saves it, None where this is none, and where an adapter
        lies there too: that is the run then, and the model often what it was merged into."""
        if self.adapter_config and self.adapter_files:
            return None
        whole = self.has("config.json") and self.first(*SINGLE_FILES, *INDEX_FILES) is not None
        return open_base(self.path) if whole else None


def refuse_empty(tensors: LazyTensors) -> None:
    """Raise `RunError` for the empty vector that DeepSpeed leaves of a matrix whose pieces lie on
    other processes."""
    for name, tensor in tensors.items():
        if tensor.shape == (0,) and name.endswith(".weight"):
            raise RunError(
                "a tensor is empty: it was saved while DeepSpeed (ZeRO-3) kept its pieces on other "
                "processes",
                file=tensor.path,
                tensor=name,
                found="[0]",
                remedy="save it with stage3_gather_16bit_weights_on_model_save, or put its pieces "
                "together with the zero_to_fp32.py in the checkpoint's folder",
            )


def _plain(tensors: LazyTensors, file: Path) -> LazyTensors:
    named = {name for key in tensors if (name := adapter_in(key)) is not None}
    plain = {without_adapter(unwrapped(key)): tensor for key, tensor in tensors.items()}
    if len(named) > 1 or len(plain) < len(tensors):
        raise RunError(
            "several adapters in one file",
            file=file,
            found=", ".join(sorted(named)) or ", ".join(list(tensors)[:4]),
            expected="one tensor of a name",
            remedy="save each adapter by itself",
        )
    return plain
