"""What a request's object may name: parameters that are served, that change nothing, that are not
served, each with the values that are no use of it.

Null, the default and the empty form of a parameter are no use of it, whatever it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

_NAMES = 128  # of one object
LONGEST = 64 << 10  # characters of what may be any JSON


def bounded(value: Any) -> Any:
    """`value`; raises `ValueError` when it is longer than what may be any JSON. Bodies are read
    beside the event loop first, so that nothing longer comes there."""
    if len(json.dumps(value, default=BaseModel.model_dump_json)) > LONGEST:
        raise ValueError(f"more than {LONGEST} bytes")
    return value


def at_most(count: int) -> BeforeValidator:
    """Of an object, before what it holds is looked at: each wrong entry is an error of its own."""

    def check(given: Any) -> Any:
        if isinstance(given, dict) and len(given) > count:
            raise ValueError(f"more than {count} names")
        return given

    return BeforeValidator(check)


Object = Annotated[dict[str, Any], AfterValidator(bounded)]

# Who asks, what else the caller does with the answer, and what other engines' caches and billing
# need: no answer depends on it, but where a request declares it.
NO_EFFECT = frozenset(
    {
        "cache_control",  # of a part or a tool, as clients mark them for Anthropic
        "cache_salt",
        "include_obfuscation",
        "include_reasoning",
        "max_tool_calls",  # of tools that a server itself runs
        "mm_payload",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "provider_specific_fields",  # of an answer that litellm hands back
        "prompt_cache_retention",
        "request_id",
        "return_mm_kwargs",
        "return_token_offsets",
        "routed_experts_prompt_start",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "stream_interval",
        "user",
        "watermarking",
    }
)

_GUIDED = "vLLM itself ignores it: use `structured_outputs`"
_MEDIA = "texts alone are read"
_KEPT = "no answer is kept: send its turns again"
# Why it is not served, and its values that are no use of it beside null and what is empty.
NOT_SERVED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "audio": (_MEDIA, ()),
    "background": (_KEPT, (False,)),
    "best_of": ("every completion is told, give n alone", (1,)),
    "chat_template_kwargs": ("it is for chats", ()),
    "chat_template": ("a template is a program: it comes with the model", ()),
    "context_management": (_KEPT, ()),
    "conversation": (_KEPT, ()),
    "detokenize": ("tokens without text are not told", (True,)),
    "echo": ("a chat's last message is not told again", (False,)),
    "early_stopping": ("a search goes on while a beam may become better", (False,)),
    "ec_transfer_params": ("there is one process", ()),
    "embed_dtype": ("vectors are of float32", ("float32",)),
    "enable_response_messages": ("the tokens are told by chats", (False,)),
    "endianness": ("vectors are little-endian", ("native", "little")),
    "function_call": ("use `tool_choice`", ("none", "auto")),
    "functions": ("use `tools`", ()),
    "guided_choice": (_GUIDED, ()),
    "guided_decoding_backend": (_GUIDED, ()),
    "guided_grammar": (_GUIDED, ()),
    "guided_json": (_GUIDED, ()),
    "guided_regex": (_GUIDED, ()),
    "guided_whitespace_pattern": (_GUIDED, ()),
    "instruction": ("texts are compared as they are", ()),
    "is_3d_lora_weight": ("adapters are read as they are", (False,)),
    "kv_transfer_params": ("there is one process", ()),
    "logits_processors": ("a processor is a program", ()),
    "logprob_token_ids": ("the likeliest tokens alone are told", ()),
    "max_tokens_per_doc": ("use `truncate_prompt_tokens`", (0,)),
    "max_tokens_per_query": ("use `truncate_prompt_tokens`", (0,)),
    "media_io_kwargs": (_MEDIA, ()),
    "mm_processor_kwargs": (_MEDIA, ()),
    "modalities": (_MEDIA, (["text"],)),
    "padding": ("prompts are not padded", ("do_not_pad",)),
    "prediction": ("nothing is predicted ahead", ()),
    "previous_input_messages": (_KEPT, ()),
    "previous_response_id": (_KEPT, ()),
    "priority": ("requests are run in the order in which they come", (0,)),
    "prompt_embeds": (_MEDIA, ()),
    "repetition_detection": ("a repetition ends nothing", ()),
    "return_prompt_text": ("use /tokenize and /detokenize", (False,)),
    "structural_tag": ("use `json`, or `grammar`", ()),
    "tool_choice": ("tools are for chats", ("none", "auto")),
    "tools": ("tools are for chats", ()),
    "suffix": ("no gap is filled", ()),
    "thinking_token_budget": ("thoughts are not told from the rest", (-1,)),
    "verbosity": ("no model here knows it", ("medium",)),
    "vllm_xargs": ("there are no extensions", ()),
    "web_search_options": ("nothing is searched", ()),
}


def is_empty(value: object) -> bool:
    """Whether `value` is null or the empty form of something."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _same(value: object, default: object) -> bool:
    alike = isinstance(value, bool) == isinstance(default, bool)
    return alike and value == default


def is_neutral(name: str, value: object) -> bool:
    """Whether `value` is no use of a parameter that is not served."""
    return is_empty(value) or any(_same(value, each) for each in NOT_SERVED[name][1])


class Parameters(BaseModel):
    """An object of a request. `kept_empty`: fields whose empty form means something."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    kept_empty: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _what_is_used(cls, given: Any) -> Any:
        """What of an object is a use of something; an object of too many names is refused at
        once, since each unknown one is an error of its own."""
        if not isinstance(given, dict):
            return given
        if len(given) > _NAMES:
            raise ValueError(f"more than {_NAMES} names")
        used = {}
        for name, value in given.items():
            if name in cls._fields():
                if value is not None and not (is_empty(value) and cls._may_be_empty(name)):
                    used[name] = value
            elif name in NOT_SERVED:
                if not is_neutral(name, value):
                    raise refusal(name, f"not served: {NOT_SERVED[name][0]}")
            elif name in NO_EFFECT:
                bounded(value)
            elif not is_empty(value):
                used[name] = value
        return used

    @classmethod
    def _may_be_empty(cls, name: str) -> bool:
        return name not in cls.kept_empty and not cls._fields()[name].is_required()

    @classmethod
    def _fields(cls) -> dict[str, FieldInfo]:
        """By the names that are given."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}


def refusal(name: str, why: str) -> ValidationError:
    """What to raise where `why` is wrong with the parameter `name`."""
    said = PydanticCustomError("refused", "{why}", {"why": why})
    error = InitErrorDetails(type=said, loc=(name,), input=None)
    return ValidationError.from_exception_data("request", [error])
