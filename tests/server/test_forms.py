"""Calls of tools in what models write, by the text alone, and what looking for them may cost."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dora_serve.server.wire import forms
from dora_serve.server.wire.calls import WrittenCalls

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
F = ("f", '{"a": 1}')
ARGUMENTS: Any = {
    "properties": {
        "a": {"type": "integer"},
        "t": {"type": "string"},
        "b": {"type": "boolean"},
        "o": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "l": {"$ref": "#/$defs/list"},
        "m": {"$ref": "#/definitions/of~1lists"},
        "n": {
            "anyOf": 5,
            "oneOf": [3, {"const": None}],
            "allOf": [{"$ref": "#/properties/n"}] * 40,
        },
    },
    "$defs": {"list": {"type": "array"}},
    "definitions": {"of/lists": {"type": "array"}},
}


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call", "no call", []),
        (CALL, "", [F]),
        (f"Well.\n{CALL}\n{CALL}\n", "Well.\n", [F, F]),
        (f"{CALL}\n\nSo be it.\n\n{CALL}", "\n\nSo be it.\n\n", [F, F]),
        ("a < b and <tool", "a < b and <tool", []),
        ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
        ('<tool_call>{"name": "f"}', "", [("f", "{}")]),  # the end tag is often cut off
        ('{"name": "f", "parameters": {"a": 1}}', "", [F]),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [F]),
        ('{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"a": 1}}', "",
         [("f", "{}"), F]),
        ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        ('{"a": 1}', '{"a": 1}', []),
        ("[1, 2]", "[1, 2]", []),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "", [F]),
        ('[{"name": "f", "parameters": {"a": 1}}, {"name": "f", "parameters": {"a": 1}}]', "",
         [F, F]),
        ('[{"name": "f", "parameters": "x"}, 3]', '[{"name": "f", "parameters": "x"}, 3]', []),
        ("", "", []),
        # With what sets two apart inside, or a line between.
        ('{"name": "f", "parameters": {"a": "x; {y}"}};\n{"name": "f", "parameters": {"a": 1}}', "",
         [("f", '{"a": "x; {y}"}'), F]),
        ('{"name": "f", "parameters": {"a": 1}}\n{"name": "f", "parameters": {"a": 1}}', "",
         [F, F]),
        ('{"name": "f", "parameters": {"a": NaN}}', '{"name": "f", "parameters": {"a": NaN}}', []),
        ('{"name": "f", "arguments": [1e999]}', '{"name": "f", "arguments": [1e999]}', []),
        # Half a surrogate pair, which JSON can say and an answer cannot.
        (r'{"name": "f", "arguments": {"t": "\ud83dé"}}', "", [("f", r'{"t": "\ud83d\u00e9"}')]),
        (r'[TOOL_CALLS]f{"t": "\ud83d"}', "", [("f", r'{"t": "\ud83d"}')]),
        (r'{"name": "f", "arguments": "\udc00"}', r'{"name": "f", "arguments": "\udc00"}', []),
        (r'<tool_call>{"name": "\ud800"}</tool_call>', r'<tool_call>{"name": "\ud800"}</tool_call>',
         []),
        # Mistral's newest, and what it says before; the mark without a call.
        ('[TOOL_CALLS]f[ARGS]{"a": 1}', "", [F]),
        ('So:[TOOL_CALLS]f[CALL_ID]a1b2[ARGS]{"a": 1}[TOOL_CALLS]f{"a": 1}', "So:", [F, F]),
        ('So: [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', "So: ", [F]),
        ("[TOOL_CALLS] f is called", "[TOOL_CALLS] f is called", []),
        # Phi 4 and Granite 3.
        ('<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|>', "", [F]),
        ('<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]', "", [F]),
        # Qwen 3 Coder and 3.5, whose values are texts; Llama 3's own form.
        ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
         "", [F]),
        ("Hm.<function=f>\n<parameter=a>1<parameter=t>\n 1\n2 \n</parameter></function>", "Hm.",
         [("f", '{"a": 1, "t": " 1\\n2 "}')]),
        ("<function=f><parameter=b>True</parameter><parameter=o>null</parameter></function>", "",
         [("f", '{"b": true, "o": null}')]),
        ('<function=f><parameter=l>["x"]</parameter><parameter=a>none</parameter></function>', "",
         [("f", '{"l": ["x"], "a": "none"}')]),
        ('<function=f><parameter=m>["x"]</parameter></function>', "", [("f", '{"m": ["x"]}')]),
        ("<function=f><parameter=n>null</parameter></function>", "", [("f", '{"n": null}')]),
        ('<function=f>{"a": 1}</function>', "", [F]),
        ("<tool_call><function=f></function></tool_call>", "", [("f", "{}")]),
        ("<function=other></function>", "<function=other></function>", []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_forms_of_calls(
    text: str, content: str, calls: list[tuple[str, str]], size: int
) -> None:
    """In pieces of any size."""
    finder = WrittenCalls(forms.Tools({"f": ARGUMENTS}))
    told, found = "", []
    for begin in range(0, max(len(text), 1), size):
        more, new = finder.add(text[begin : begin + size], last=begin + size >= len(text))
        told += more
        found += [(call["function"]["name"], call["function"]["arguments"]) for call in new]
    assert (told, found) == (content, calls)


@pytest.mark.parametrize("name", ["f", "f[CALL_ID]a"])
def test_blanks_behind_a_name(name: str) -> None:
    """Of which each was tried for the end of the name: a minute."""
    begin = time.thread_time()
    told = WrittenCalls(forms.Tools({"f": ARGUMENTS})).add(
        f"[TOOL_CALLS]{name}{' ' * 100_000}", last=True
    )
    assert time.thread_time() - begin < 5
    assert not told[1]


def test_a_parameter_that_is_named_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time all of its schema was looked through for its types: up to 20 s in which nobody was
    answered."""
    looked: list[Any] = []
    real = forms._own_kinds

    def looks(each: Any) -> set[str]:
        looked.append(each)
        return real(each)

    monkeypatch.setattr(forms, "_own_kinds", looks)
    schema = {"properties": {"a": {"anyOf": [{"enum": [each]} for each in range(1000)]}}}
    call = "<function=f>" + "<parameter=a>1</parameter>" * 1000 + "</function>"
    finder = WrittenCalls(forms.Tools({"f": schema}))
    _, found = finder.add(call * 2, last=True)
    assert [each["function"]["arguments"] for each in found] == ['{"a": 1}'] * 2
    assert len(looked) <= 64


def test_the_most_that_is_looked_through_for_types() -> None:
    """Of what one schema may be the part is looked at that any real one has."""
    tools = forms.Tools(
        {
            "f": {
                "properties": {
                    "wide": {"anyOf": [*[True] * 64, {"type": "integer"}]},
                    "long": {"enum": [*[1] * 1024, "a"]},
                    "named": {"type": [*["integer"] * 64, "string"]},
                    "deep": {"$ref": "#" + "/a" * 65},
                    "far": {"$ref": "#/b/c"},
                },
                "b": {"c": {"type": "boolean"}},
            }
        }
    )
    kinds = {name: tools.kinds("f", name) for name in ("wide", "long", "named", "deep", "far")}
    assert kinds == {
        "wide": set(), "long": {"integer", "number"}, "named": {"integer"}, "deep": set(),
        "far": {"boolean"},
    }  # fmt: skip
