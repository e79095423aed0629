"""What lies beside a base's weights, and which of it goes along with the merged model.

Files of the folder itself by what they are for; of its sub-folders only those that something of
these files names: the modules of a sentence-transformers pipeline, and further chat templates.
Others hold the base once more in another format, whose weights would be the old ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...certificate import FILE
from ...errors import BaseError, TensorFileError
from ...files.handles import check_file, paths_below
from ...files.hashes import file_hash
from ...files.json_files import read_json, read_objects
from ...model.base import BaseModel
from ...model.tasks import task_in
from ...run import Run

_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe"}
_OWN_FILES = {"config.json", "adapter_config.json", FILE}
# What `save_pretrained` of a tokenizer writes, of any kind.
_TOKENIZER = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
    *("source.spm", "target.spm", "bpe.codes"),
}
_CHAT = {"chat_template.jinja", "chat_template.json"}  # which fit any tokenizer
_TEMPLATES = "additional_chat_templates"
# What quantizers say beside config.json of a base's weights, which are floats in the output.
QUANTIZERS = {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}
# A sentence-transformers pipeline: which modules there are, and what else it says of them.
_MODULES = "modules.json"
_LONGEST = 1 << 30  # bytes of one file: its holes become bytes when it is copied
_NO_CODE = "nothing of it is executed here, and it is not passed on"


@dataclass(frozen=True)
class Companions:
    """`files`: name in the output → where it lies. `left`: what stays behind, and why."""

    files: Mapping[str, Path]
    left: tuple[str, ...] = ()

    def hashes(self) -> dict[str, str]:
        """Name in the output → BLAKE3 of the file."""
        return {name: file_hash(path) for name, path in sorted(self.files.items())}

    def copy(self, folder: Path) -> None:
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def companions(
    source: Path,
    run: Run | None = None,
    base: BaseModel | None = None,
    task: str | None = None,
) -> Companions:
    """Tokenizer, generation configuration, pooling layers and the like of the model in `source`,
    for `run` merged into `base`, or for `task`; weights and code stay behind.

    A tokenizer that was saved with the run takes the place of the base's, and so does a pipeline.
    A pipeline stays behind where they are for another task than embeddings. Raises `BaseError`
    for a model with code of its own, and for links out of a folder, and `TensorFileError` for a
    pointer of Git LFS.
    """
    _refuse_code(source)
    files, left = {}, []
    saved = run.path if run is not None else None
    tokenizer = saved is not None and (saved / "tokenizer_config.json").is_file()
    task = task if run is None else run.task
    config = read_json(source / "config.json") if base is None else base.config
    embeds = task in (None, "feature-extraction", task_in(source, config))
    pipeline = saved if saved is not None and (saved / _MODULES).is_file() else source
    whole = _pipeline(pipeline) if (pipeline / _MODULES).is_file() else {}
    for path in sorted(source.iterdir()):
        name = path.name
        known = path.suffix in _COPIED or name.upper().startswith(("LICENSE", "NOTICE"))
        own = name in _OWN_FILES or name.endswith(".index.json")
        own |= base is not None and base.stored is not None and name in QUANTIZERS
        if path.is_file() and known and not own and not (tokenizer and name in _TOKENIZER):
            files[name] = path
    own_files = [n for n in sorted(_TOKENIZER) if saved is not None and (saved / n).is_file()]
    if saved is not None and (tokenizer or set(own_files) <= _CHAT):
        files |= {name: saved / name for name in own_files}
    elif own_files:
        left.append(
            f"{', '.join(own_files)} of the run stay behind: it has no tokenizer_config.json, so "
            "the base's tokenizer goes along"
        )
    files |= _below((saved if saved is not None and tokenizer else source), _TEMPLATES)
    if embeds:
        files |= whole
    elif whole:
        files = {name: path for name, path in files.items() if not _of_pipeline(name)}
        left.append(
            f"{', '.join(sorted({name.partition('/')[0] for name in whole}))} stay behind: they "
            "make embeddings, which the model is not for"
        )
    kept = {name.partition("/")[0] for name in (*files, *whole)}
    left += list(_left_behind(source, kept))
    for path in files.values():
        _check_inside(path, _folder_of(path, source, saved))
        size = check_file(path)
        if size > _LONGEST:
            raise BaseError(
                "too large for a file that goes along with a model",
                file=path,
                found=f"{size} bytes",
                expected=f"at most {_LONGEST}",
            )
    return Companions(files, tuple(left))


def _of_pipeline(name: str) -> bool:
    kind = name.startswith(("sentence_", "config_sentence_transformers"))
    return name == _MODULES or (kind and name.endswith(".json"))


def _pipeline(folder: Path) -> dict[str, Path]:
    """The files of the pipeline in `folder`, those of its sub-folders too."""
    listed = folder / _MODULES
    _check_inside(listed, folder)
    modules = read_objects(listed)
    if modules is None:
        raise BaseError("not a list of modules", file=listed, expected="sentence-transformers' own")
    files = {path.name: path for path in folder.iterdir() if _of_pipeline(path.name)}
    for module in modules:
        kind, name = str(module.get("type", "")), str(module.get("path", ""))
        code = f"{kind.partition('.')[0]}.py"
        if (folder / code).is_file():
            raise _own_code(listed, f"{kind} in {code}")
        if name in ("", "."):
            continue
        way = PurePosixPath(name)
        if way.is_absolute() or ".." in way.parts:
            raise BaseError(
                "a module of the pipeline lies outside of the folder",
                file=listed,
                found=name,
                expected="a sub-folder",
            )
        files |= _below(folder, name)  # a module without parameters may have none
    return files


def _below(folder: Path, name: str) -> dict[str, Path]:
    """The files in the sub-folder `name`, at any depth, by their names in `folder`."""
    below = folder / name
    if not below.is_dir():
        return {}
    _check_inside(below, folder)
    found = [path for path in paths_below(below) if path.is_file()]
    code = next((path for path in found if path.suffix == ".py"), None)
    if code is not None:
        raise _own_code(code, code.name)
    return {path.relative_to(folder).as_posix(): path for path in found}


def _left_behind(source: Path, kept: set[str]) -> Iterator[str]:
    shown = [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]
    folders = [path.name for path in shown if path.is_dir() and path.name not in kept]
    folders = [name for name in folders if not name.startswith("__")]
    if folders:
        yield f"sub-folders of the base stay behind: {', '.join(folders[:8])}"
    code = [path.name for path in shown if path.suffix == ".py"]
    if code:
        yield f"code beside the base stays behind: {', '.join(code[:8])}"


def _refuse_code(source: Path) -> None:
    """Raise `BaseError` where transformers would take code out of the folder."""
    for path in sorted(source.glob("*config.json")):
        said: Mapping[str, object] = {}
        with suppress(TensorFileError):  # others' files: what transformers reads are objects
            said = read_json(path)
        if path.name != "adapter_config.json" and said.get("auto_map"):
            raise _own_code(path, "auto_map")


def _own_code(file: Path, found: str) -> BaseError:
    return BaseError(
        f"the base has code of its own; {_NO_CODE}",
        file=file,
        found=found,
        remedy="where transformers has the same model, name a copy of the base without auto_map "
        "and code; else merge it with PEFT (merge_and_unload)",
    )


def _folder_of(path: Path, source: Path, saved: Path | None) -> Path:
    """The inner one of both folders that `path` lies in, by its name: for pathlib `../base` lies in
    `.`, and a base may lie in the run's folder."""
    folders = (source,) if saved is None else (source, saved)
    holding = [folder for folder in folders if path.is_relative_to(folder)]
    return max(holding, key=lambda folder: len(folder.parts), default=source)


def _check_inside(path: Path, source: Path) -> None:
    """Raise `BaseError` for a link out of the folder, whose content nobody meant to pass on; the
    links of a hub cache's snapshot lead to its blobs."""
    own = source.resolve()
    blobs = own.parent.parent / "blobs"
    real = path.resolve()
    if not real.is_relative_to(own) and not (
        own.parent.name == "snapshots" and blobs in real.parents
    ):
        raise BaseError(
            "a file to be copied is a link out of its folder",
            file=path,
            found=real,
            remedy="copy the file into the folder, if it is meant",
        )
