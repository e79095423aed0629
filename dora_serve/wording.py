"""What the library says, in the words of the command line and as a terminal may show it."""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping

import click

from converters.errors import some, visible
from converters.options import ReadOptions

VERBS = frozenset(
    "adapter batch check diff export extract inspect lint merge onnx sign verify".split()
)


def in_flags(text: object) -> str:
    """`text` with the parameters between backticks as flags, and the verbs as commands; of what a
    terminal would obey only line breaks stay."""
    shown = "\n".join(visible(line) for line in str(text).split("\n"))
    return re.sub(r"`([a-z_]+)`", _word, shown)


def alike(told: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """What is told of each name in flags, line by line, without its file: the same is said once, of
    the names of which it is told."""
    names = defaultdict(list)
    for name, text in told.items():
        lines = in_flags(text).splitlines() or [""]
        names[tuple(x for x in lines if not x.startswith("  file: "))].append(visible(name))
    for shown, ones in names.items():
        yield some(ones, 20), list(shown)


def quoted(word: object) -> str:
    """`word` for a command that is printed to be copied into a shell, whatever is in it."""
    text = shlex.quote(str(word))
    if text.isprintable():
        return text
    signs = str(word).replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(sign if sign.isprintable() else _in_bash(sign) for sign in signs) + "'"


def curl(url: str, body: Mapping[str, object], key: bool) -> str:
    """A command that posts `body` to `url`. `key`: with the key in the variable that `up` reads."""
    return f"{curl_of(url, key)} -H 'Content-Type: application/json' -d {quoted(json.dumps(body))}"


def curl_of(url: str, key: bool) -> str:
    """The beginning of a command that asks `url`."""
    return f"curl {url}" + (' -H "Authorization: Bearer $DORA_SERVE_API_KEY"' if key else "")


def _in_bash(sign: str) -> str:
    code = ord(sign)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is no text
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def json_text(value: object, indent: int | None = None) -> str:
    """`value` as JSON in which what a terminal would obey is escaped, and other letters are not."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return re.sub(
        r"[^\n -~]", lambda m: m[0] if m[0].isprintable() else json.dumps(m[0])[1:-1], text
    )


def _word(match: re.Match[str]) -> str:
    name = match[1]
    if name in VERBS:
        return f"dora-export {name}"
    flag = "--" + name.replace("_", "-")
    return f"{flag} (of dora-export adapter)" if _is_of_another_command(name) else flag


def _is_of_another_command(name: str) -> bool:
    """Whether `name` says how a run is read, and the command that runs takes no such word."""
    context = click.get_current_context(silent=True)
    if context is None or name not in ReadOptions.__dataclass_fields__:
        return False
    return name not in {each.name for each in context.command.get_params(context)}
