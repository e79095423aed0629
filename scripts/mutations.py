"""Which small faults a source file can have: one change of one place, by mutmut's operators.

mutmut itself leaves out every decorated function and all that stands outside of functions, which
here are the properties, contexts and constants, and it starts from trampolines in a copy of the
sources; so its operators are used without its runner. Changes that say nothing are left out: the
words of errors, annotations, docstrings, aliases of types, assertions, and arguments that only
check (`strict`).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal, operator_string

ROOT = Path(__file__).parent.parent
ALIAS = re.compile(r"_?[A-Z]\w*[a-z]\w*|__all__|_log")
CHECKS = ("strict", "encoding", "separators")

Change = tuple[cst.CSTNode, cst.CSTNode, "range | None"]


@dataclass(frozen=True)
class Mutant:
    """A change of `file`: the text of its first line before and after, and the new source. `lines`:
    those by which tests are found; None, what stands outside of functions: any of the file."""

    file: str
    line: int
    before: str
    after: str
    lines: range | None
    source: str


def says_nothing(node: cst.CSTNode) -> bool:
    """Whether no change inside of `node` is worth a test."""
    match node:
        case cst.Annotation() | cst.Decorator() | cst.Assert() | cst.Import() | cst.ImportFrom():
            return True
        case cst.If(test=cst.Name("TYPE_CHECKING")):
            return True
        case cst.Expr(value=cst.BaseString()):
            return True
        case cst.SimpleString(value=text):
            return " " in text
        case cst.Arg(keyword=cst.Name(word)):
            return word in CHECKS
        case cst.Call(func=cst.Name(name)) if name in ("len", "isinstance"):
            return True
        case cst.Call(func=cst.Name(name) | cst.Attribute(attr=cst.Name(name))):
            made = name in ("bad", "kind", "_unknown") or name.endswith("Error")
            return made and name != "ApiError"
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(name))]):
            return ALIAS.fullmatch(name) is not None
    return False


def drops_check(call: cst.CSTNode, change: cst.CSTNode) -> bool:
    """Whether `change`, of a call, leaves an argument out that only checks."""
    assert isinstance(call, cst.Call) and isinstance(change, cst.Call)
    gone = [arg for arg in call.args if not any(arg is kept for kept in change.args)]
    return any(arg.keyword is not None and arg.keyword.value in CHECKS for arg in gone)


class Finder(cst.CSTVisitor):
    """Collects what can be changed in a module, into what, and on which lines it runs."""

    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Change] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if says_nothing(node):
            return False
        for kind, operator in mutation_operators:
            if not isinstance(node, kind):
                continue
            changes = list(operator(node))
            if operator is operator_string:
                changes = changes[:1]  # the others change the case of the letters
            if operator is operator_arg_removal:
                changes = [change for change in changes if not drops_check(node, change)]
            self.found += [(node, change, self._lines(node)) for change in changes]
        return True

    def _lines(self, node: cst.CSTNode) -> range | None:
        """The lines of the statement, or of the head of a compound one; None outside functions."""
        lines, done, inside = None, False, False
        while not isinstance(node, cst.Module):
            simple, compound = (
                isinstance(node, kind)
                for kind in (cst.SimpleStatementLine, cst.BaseCompoundStatement)
            )
            position = self.get_metadata(PositionProvider, node, None)
            whole = lines is None or isinstance(node, cst.FunctionDef)  # of a parameter's default
            if position is not None and not done and (not compound or whole):
                lines = range(position.start.line, position.end.line + 1)
            done = done or simple or compound
            inside = inside or isinstance(node, cst.FunctionDef)
            node = self.get_metadata(ParentNodeProvider, node)
        return lines if inside else None


def mutants(file: str, choose: random.Random, most: int) -> tuple[int, list[Mutant]]:
    """How many mutants `file` has, and at most `most` of them, at random, in its order."""
    wrapper = MetadataWrapper(cst.parse_module((ROOT / file).read_text()))
    finder = Finder()
    wrapper.visit(finder)
    total = len(finder.found)
    chosen = choose.sample(range(total), min(most, total))
    old = wrapper.module.code.splitlines()
    result = []
    for node, change, lines in (finder.found[number] for number in sorted(chosen)):
        code = cst.ensure_type(wrapper.module.deep_replace(node, change), cst.Module).code
        new = code.splitlines()
        first = next(n for n, pair in enumerate(zip(old, new, strict=False)) if len(set(pair)) > 1)
        texts = old[first].strip(), new[first].strip()
        result.append(Mutant(file, first + 1, *texts, lines, code))
    return total, result
