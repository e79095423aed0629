"""The command line and the configuration of a `vllm serve` that fits a pool of adapters."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from converters.errors import MissingError

from ..wording import quoted
from .fleet import POOLED, Pool

_LISTENS = "where vLLM listens is said by --host and --port before it"
_SAID_BEFORE = {  # options that are told of the server, or planned with, as they were before `--`
    "--host": _LISTENS,
    "--port": _LISTENS,
    "--uds": _LISTENS,
    "--model": "the base is said by the folder and by --base before it",
    "--lora-modules": "it would take the place of the folder's adapters: put its own there",
    "--api-key": "the key is said by --api-key or $DORA_SERVE_API_KEY before it",
}

_WIDTH = 76  # columns of a line, with the blank and backslash behind it below those of a terminal

Options = dict[str, str | int | bool | list[str]]


def serve_options(pool: Pool, adapters: Mapping[str, Path], gpu: bool) -> Options:
    """Options of `vllm serve`, by long name without dashes. `adapters`: name → folder. `gpu`:
    whether it will run on one.

    The dtype is the base's own: left to itself, vLLM rounds a float32 model to 16 bits. On a GPU
    that is left to it where there are adapters, whose kernels take no float32 there.
    """
    dtype = str(pool.base.dtype()).removeprefix("torch.")
    if gpu and adapters and dtype == "float32":
        dtype = "auto"
    options: Options = {
        "model": str(pool.base.path.absolute()),
        "served-model-name": pool.name,
        "dtype": dtype,
    }
    if pool.task in POOLED:
        options |= {"runner": "pooling", "convert": POOLED[pool.task]}
    if not adapters:
        return options
    options |= {
        "enable-lora": True,
        "max-lora-rank": pool.max_lora_rank,
        "max-loras": pool.max_loras,
        "max-cpu-loras": pool.max_cpu_loras,
    }
    if pool.target_modules:
        options["lora-target-modules"] = pool.target_modules
    if pool.labels is not None and "runner" in options:
        options["max-lora-cls-labels"] = pool.labels
    options["lora-modules"] = [_module(name, path) for name, path in adapters.items()]
    return options


def has_gpu() -> bool:
    """Whether vLLM would find a GPU on this machine."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))


def _module(name: str, path: Path) -> str:
    """A word of `--lora-modules`, in JSON where vLLM or its shell would take the plain one for
    something else."""
    plain = f"{name}={path}"
    if name.startswith("-") or "=" in name or "," in plain or not plain.isprintable():
        return json.dumps({"name": name, "path": str(path)})
    return plain


def command_line(
    options: Options,
    program: Sequence[str] = ("vllm", "serve"),
    more: Sequence[str] = (),
) -> list[str]:
    """The server's command; what the user adds stands at the end, where it overrides.

    To `vllm serve` the model is an argument, to vLLM's server as a module an option.
    """
    words = list(program)
    rest = dict(options)
    if words[-1:] == ["serve"]:
        words.append(str(rest.pop("model")))
    for name, value in rest.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *value]
        elif str(value).startswith("-"):
            words.append(f"--{name}={value}")  # else it is taken for an option
        else:
            words += [f"--{name}", str(value)]
    return [*words, *more]


def shell(words: Sequence[str]) -> str:
    """The command for pasting, an option a line, and of many values as many as a line takes."""
    lines = [""]
    for word in words:
        shown = quoted(word)
        if word.startswith("--"):
            lines.append(f"  {shown}")
        elif len(lines) > 1 and len(lines[-1]) + len(shown) > _WIDTH:
            lines.append(f"    {shown}")
        else:
            lines[-1] += f" {shown}"
    return " \\\n".join(lines).strip()


def yaml_file(options: Options) -> str:
    """The same for `vllm serve --config FILE`."""
    import yaml

    text: str = yaml.safe_dump(dict(options), sort_keys=False)
    return text


def why_not(word: str) -> str | None:
    """Why `word` may not be among what the user adds: what is told of the server, and how it is
    watched, would not be so."""
    option = _option(word)
    if option is None:
        return None
    if option.startswith("--ssl-"):
        return f"{option}: vLLM is watched over HTTP here; have a proxy before it speak HTTPS"
    known = next((name for name in _SAID_BEFORE if name.startswith(option)), None)
    return None if known is None else f"{known} after --: {_SAID_BEFORE[known]}"


def values_of(name: str, more: Sequence[str]) -> list[str]:
    """The values that the user's words give the option `name`, the last of which counts."""
    found: list[str] = []
    taking = False
    for word in more:
        option = _option(word)
        if option is not None and name.startswith(option):
            taking = "=" not in word
            found = [] if taking else [word.partition("=")[2]]
        elif word.startswith("-"):
            taking = False
        elif taking:
            found.append(word)
    return found


def _option(word: str) -> str | None:
    """The long option of a word, which vLLM also takes with low lines, and cut short."""
    if not word.startswith("--") or word == "--":
        return None
    return word.partition("=")[0].replace("_", "-")


def find_vllm(given: str | None) -> list[str]:
    """How to start vLLM's server: by the program or the Python given, else by this Python where
    vLLM is installed beside this package, else by `vllm` on the path.

    Raises `MissingError` when there is none.
    """
    if given is None and find_spec("vllm") is not None:
        given = sys.executable
    found = shutil.which(given or "vllm")
    if found is None:
        raise MissingError(
            "vLLM is not installed here",
            file=given,
            expected="the package beside this one, or its program on the PATH",
            remedy="install it (docs/vllm.md), or name its program or its Python with --vllm",
        )
    if Path(found).name.startswith("python"):
        return [found, "-m", "vllm.entrypoints.openai.api_server"]
    return [found, "serve"]


def find_vllm_or_name() -> list[str]:
    """How vLLM's server is started here, or where vLLM is."""
    try:
        return find_vllm(None)
    except MissingError:
        return ["vllm", "serve"]
