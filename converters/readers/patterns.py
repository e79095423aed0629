"""PEFT's patterns: regular expressions that somebody else wrote, matched within bounds."""

from __future__ import annotations

import re
import time

import regex

from ..errors import RunError

SECONDS, SECONDS_IN_ALL = 1.0, 30.0

# What `regex` reads as its own, `(…){e<=1}` and `[[:alpha:]]`, and `re` letter by letter.
_BRACE = re.compile(r"(?<!\\)((?:\\\\)*)\{(?!\d*,?\d*\})")
_CLASS = "[:"


class PatternError(RunError):
    """Not a regular expression, or one that takes too long."""


class Patterns:
    """The patterns of one configuration, which share one allowance of time.

    `regex` has the syntax of `re`, which PEFT uses, and can be bounded in time.
    """

    def __init__(self) -> None:
        self._left = SECONDS_IN_ALL

    def suffix(self, pattern: str, module: str) -> bool:
        """Whether a key of PEFT's `rank_pattern` or `alpha_pattern` means `module`. Raises
        `PatternError`."""
        return self._match(rf"(.*\.)?({pattern})$", module) is not None

    def part(self, pattern: str, module: str) -> bool:
        """Whether an entry of PEFT's `modules_to_save` means `module` or what it is in. Raises
        `PatternError`."""
        return self._match(rf"(^|.*\.){pattern}($|\..*)", module) is not None

    def whole(self, pattern: str, module: str) -> bool:
        """Whether PEFT's `target_modules`, where it is one string, means `module`. Raises
        `PatternError`."""
        return self._match(rf"({pattern})\Z", module) is not None

    def number(self, pattern: str, module: str) -> int | None:
        """The number that is the segment of `module` behind what `pattern` means. Raises
        `PatternError`."""
        found = self._match(rf"{pattern}\.(?P<layer>\d+)\.", module)
        return int(found["layer"]) if found and found["layer"] else None

    def _match(self, pattern: str, module: str) -> regex.Match[str] | None:
        if len(pattern) > 100_000:
            raise PatternError("the pattern is longer than 100 000 characters")
        if self._left <= 0:  # many that are quick, but for being read
            raise PatternError(f"the patterns take longer than {SECONDS_IN_ALL:.0f} s to match")
        begin = time.monotonic()
        seconds = min(SECONDS, self._left)
        try:
            plain = _BRACE.sub(r"\1\\{", pattern).replace(_CLASS, r"[\:")
            return regex.match(plain, module, timeout=seconds)
        except TimeoutError:
            raise PatternError(f"the pattern takes longer than {seconds:.0f} s to match") from None
        except (regex.error, OverflowError, RecursionError, MemoryError):
            raise PatternError("the pattern is not a regular expression") from None
        finally:
            self._left -= time.monotonic() - begin
