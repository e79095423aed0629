"""Tools that an answer may or must call, as OpenAI and vLLM say it."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from .parameters import Object, Parameters, bounded
from .schemas import schemas


class Function(Parameters):
    """`parameters`: a JSON schema of an object, without one no parameters."""

    kept_empty: ClassVar = frozenset({"parameters", "description"})
    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return {"type": "object"} if self.parameters is None else self.parameters


class Tool(Parameters):
    type: Literal["function"] = "function"
    function: Function


class Named(Parameters):
    name: str


class NamedTool(Parameters):
    type: Literal["function"] = "function"
    function: Named


Choice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[Tool], Field(max_length=128, fail_fast=True), AfterValidator(bounded)]


def wrong_choice(tools: list[Tool] | None, choice: Choice | None) -> str | None:
    """What is wrong with a choice of tools, None when nothing is."""
    if choice in (None, "none", "auto"):
        return None
    if not tools:
        return "it needs tools"
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        return f"there is no tool {choice.function.name[:200]!r}"
    return None


def schema_of_calls(tools: list[Tool], choice: Choice | None, several: bool) -> Any:
    """The JSON schema of an answer that has to call: the arguments of a named tool, or a list of
    calls; None where none has to. Raises `ValueError` for definitions that are no object."""
    if isinstance(choice, NamedTool):
        named = (tool.function for tool in tools if tool.function.name == choice.function.name)
        return next(named).schema_of_arguments
    if choice != "required":
        return None
    kinds = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": {"$ref": f"#/$defs/{number}"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    inner = {str(i): _moved(each.function.schema_of_arguments, i) for i, each in enumerate(tools)}
    calls = {"type": "array", "minItems": 1, "items": {"anyOf": kinds}}
    return {**calls, **({} if several else {"maxItems": 1}), "$defs": inner}


def _moved(schema: dict[str, Any], number: int) -> Any:
    """A schema as the definition `number` of another: what it says of its own parts (`#`,
    `#/$defs/part`) leads there."""
    moved = {key: value for key, value in json.loads(json.dumps(schema)).items() if key != "$id"}
    if not isinstance(moved.get("$defs", {}), dict):
        raise ValueError("tools: $defs is no object")
    for each in schemas(moved):
        where = each.get("$ref")
        if isinstance(where, str) and (where == "#" or where.startswith("#/")):
            each["$ref"] = f"#/$defs/{number}{where[1:]}"
    return moved
