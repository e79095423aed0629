"""What an answer has to look like, as OpenAI and vLLM say it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from .parameters import Object, Parameters, bounded


class JsonSchema(Parameters):
    """`schema`: a JSON schema, without one any object."""

    kept_empty: ClassVar = frozenset({"schema"})
    name: str
    description: str | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Parameters):
    """`type` "text": anything."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


_Choices = Annotated[list[str], Field(max_length=1024, fail_fast=True), AfterValidator(bounded)]


_Json = Annotated[str | dict[str, Any], AfterValidator(bounded)]


class StructuredOutputs(Parameters):
    """One of the first five, as vLLM names them; the others say how JSON is written."""

    kept_empty: ClassVar = frozenset({"json"})
    json_: _Json | None = Field(None, alias="json")
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(each is not None for each in given) != 1:
            raise ValueError("give one of json, regex, choice, grammar, json_object")
        return self


# How a grammar is given to the process that reads it.
Asked = dict[str, Any]


def asked_json(schema: Any) -> Asked:
    """JSON of a schema."""
    return {"json": schema, "flexible": True, "closed": False, "pattern": None}


def asked(format: ResponseFormat | None, given: StructuredOutputs | None) -> Asked | None:
    """What is asked for by either, None for any text."""
    if format is not None and format.type != "text":
        schema = None if format.json_schema is None else format.json_schema.schema_
        return asked_json({"type": "object"} if schema is None else schema)
    if given is None:
        return None
    if given.json_ is None and not given.json_object:
        return {"regex": given.regex, "choice": given.choice, "grammar": given.grammar}
    return {
        "json": {"type": "object"} if given.json_ is None else given.json_,
        "flexible": not given.disable_any_whitespace,
        "closed": given.disable_additional_properties,
        "pattern": given.whitespace_pattern,
    }
