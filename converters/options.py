"""Options, declared once: fields of a frozen dataclass, of which flags and keywords are made.

Light to import, so that a help text is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import TargetError

DTYPES = ("float32", "float16", "bfloat16")
SHORT = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    metavar: str | None = None,
    flag: str | None = None,
) -> Any:
    """A field that users choose. `low`: the least whole number, or a bound that is not reached;
    `flag`: its name on the command line, where it is another."""
    about = {"help": help, "choices": tuple(choices), "low": low, "high": high}
    return field(default=default, metadata={**about, "metavar": metavar, "flag": flag})


def names(options: type) -> list[str]:
    return [each.name for each in fields(options)]


def chosen(options: type[T], given: Mapping[str, Any], owner: str) -> T:
    """`options` with what is `given` for the target `owner`; None is not given. Raises
    `TargetError` for a name that it does not have, or a value that is no choice."""
    known = {each.name: each for each in fields(options)}  # type: ignore[arg-type]
    values = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in known:
            raise TargetError(
                f"{owner} has no such option", found=name, expected=", ".join(known) or "none"
            )
        choices = known[name].metadata.get("choices")
        if choices:
            value = str(value).removeprefix("torch.")  # a dtype by itself or by its name
            value = value if value in choices else SHORT.get(value, value)
            if value not in choices:
                raise TargetError(f"unknown {name}", found=value, expected=", ".join(choices))
        values[name] = value
    return options(**values)


@dataclass(frozen=True)
class ReadOptions:
    """What a run may leave out and the user then has to say; None where not said.

    `base`: the base model, for methods whose tensors mean nothing without its configuration.
    `method`: the reader to use where several fit. `rank`: how many components of a nested adapter
    (DyLoRA) are used. `gate`: the name of the gate vector beside lora_A and lora_B. `parts`: the
    other folders or files of a run that is stored in parts.
    """

    lora_alpha: float | None = option(None, "The run's lora_alpha, if it holds none.")
    start_rank: int | None = option(None, "The run's initial rank.", low=1)
    task_info: Path | None = option(None, "task_info.json, if not beside the run.")
    base: str | Path | None = None
    method: str | None = option(None, "The run's method, where several fit.")
    rank: int | None = option(None, "DyLoRA: how many nested components to use.", low=1)
    gate: str | None = option(
        None,
        "ALoRA, SoRA: name of the gate vector, where it is not recognised.",
        metavar="NAME",
    )
    parts: tuple[Path, ...] = option(
        (),
        "Another folder or file of RUN, where it is stored in parts (DLoRA); may be given again.",
        flag="part",
    )


@dataclass(frozen=True)
class FitOptions:
    """To what an update is cut, see `fit_run`: one of them, or none for the whole update."""

    max_rank: int | None = option(None, "Approximate: components per module.", low=1)
    energy: float | None = option(
        None,
        "Approximate: share of each module's squared singular values to keep.",
        low=0,
        high=1,
    )
    budget: int | None = option(
        None,
        "Approximate: parameters in all, spread over the modules where they matter most.",
        low=1,
        metavar="PARAMETERS",
    )
