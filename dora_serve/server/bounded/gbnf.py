"""Grammars in llama.cpp's form, written so that llguidance's reader takes them as llama.cpp does.

By itself it cuts the zeros off `\\u00fc`, has sets of signs read as a regular expression's, where
`&&` and `--` are operators, takes two names that differ in case for one, and a rule has one line,
where vLLM lets it go on.
"""

from __future__ import annotations

import re

_RULE = re.compile(r"[\w-]+\s*::=")
_FIRST = re.compile(r"^[ \t]*" + _RULE.pattern, re.MULTILINE)
_SIGN = r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)|[^\\]"
_RANGE = re.compile(f"({_SIGN})(?:-({_SIGN}))?", re.DOTALL)
_PARTS = re.compile(
    r'"(?P<text>(?:\\.|[^"\\])*)"'
    r"|\[(?P<not>\^?)(?P<set>(?:\\.|[^\]\\])*)\]"
    r"|(?P<name>[\w-]+)"
    r"|#[^\n]*|(?P<end>\r?\n\s*)",  # a comment; the end of a line
    re.DOTALL,
)


def is_gbnf(grammar: str) -> bool:
    """Whether a rule of it is written as llama.cpp has them; else it is Lark's."""
    return _FIRST.search(grammar) is not None


def plain(grammar: str) -> str:
    """The same grammar without what is read otherwise."""
    names = {"root": "root"}
    taken = {"root", "start"}

    def named(name: str) -> str:
        if name not in names:
            new, count = name, 1
            while (read := _as_read(new)) in taken:
                count += 1
                new = f"{name}-{count}"
            taken.add(read)
            names[name] = new
        return names[name]

    def written(part: re.Match[str]) -> str:
        if part["text"] is not None:
            signs = re.findall(_SIGN, part["text"], re.DOTALL)
            return '"' + "".join(_in_text(_sign(each)) for each in signs) + '"'
        if part["set"] is not None:
            return f"[{part['not']}{_RANGE.sub(_range, part['set'])}]"
        if part["name"] is not None:
            return named(part["name"])
        return "\n" if part["end"] and _RULE.match(grammar, part.end()) else " "

    return _PARTS.sub(written, grammar)


def _as_read(name: str) -> str:
    """What the reader makes of a name."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name.replace("-", "_")).lower()


def _range(ends: re.Match[str]) -> str:
    return "-".join(_in_set(_sign(end)) for end in ends.groups() if end is not None)


def _sign(written: str) -> str:
    """The sign that an escape stands for; what is no escape stays, and is refused."""
    if len(written) > 2:
        return chr(int(written[2:], 16))
    if len(written) == 2 and not written[1].isalnum():
        return written[1]
    return {r"\n": "\n", r"\r": "\r", r"\t": "\t"}.get(written, written)


def _in_text(sign: str) -> str:
    plain = len(sign) > 1 or sign >= "\x80" or (sign.isprintable() and sign not in '"\\')
    return sign if plain else f"\\x{ord(sign):02x}"


def _in_set(sign: str) -> str:
    plain = len(sign) > 1 or sign >= "\x80" or sign.isalnum()
    return sign if plain else f"\\x{ord(sign):02x}"
