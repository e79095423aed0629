"""PEFT's patterns: regular expressions that somebody else wrote, matched within bounds."""

from __future__ import annotations

import regex

from .errors import RunError

SECONDS = 2.0


class PatternError(RunError):
    """Not a regular expression, or one that takes too long."""


def matches(pattern: str, module: str) -> bool:
    """Whether PEFT's `rank_pattern` or `alpha_pattern` key `pattern` means `module`.

    `regex` has the syntax of `re`, which PEFT uses, and can be bounded in time. Raises
    `PatternError`.
    """
    try:
        return regex.match(rf"(.*\.)?({pattern})$", module, timeout=SECONDS) is not None
    except TimeoutError:
        raise PatternError(f"the pattern takes longer than {SECONDS:.0f} s to match") from None
    except (regex.error, OverflowError, RecursionError):
        raise PatternError("the pattern is not a regular expression") from None
