"""Which checks of a test certainly run: not those in a loop over what may be empty."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence


def certain(node: ast.expr, full: set[str]) -> bool:
    """Whether a loop over `node` runs at least once; `full` are names of what is not empty."""
    match node:
        case (
            ast.Tuple(elts=some) | ast.List(elts=some) | ast.Set(elts=some) | ast.Dict(values=some)
        ):
            return bool(some)
        case ast.Constant(value=str(text)):
            return bool(text)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.isupper() or name in full
        case ast.Call(func=ast.Name(id="range"), args=some):
            return all(isinstance(each, ast.Constant) for each in some)
        case ast.Call(func=ast.Name(id="enumerate" | "list" | "sorted" | "zip"), args=some):
            return any(certain(each, full) for each in some)
        case ast.Call(func=ast.Attribute(value=value, attr="items" | "keys" | "split" | "values")):
            return certain(value, full)
        case ast.ListComp(generators=loops):
            return all(certain(loop.iter, full) and not loop.ifs for loop in loops)
        case ast.BinOp(left=left, right=right):
            return certain(left, full) or certain(right, full)
    return False


def checks(body: Sequence[ast.stmt], helpers: set[str], full: set[str]) -> Iterator[bool]:
    """Of each check in `body` whether it certainly runs: `assert`, `raises`, a call of a helper."""
    for node in body:
        if isinstance(node, ast.Assign):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            full = full | names if certain(node.value, full) else full - names
        match node:
            case ast.Assert(
                test=ast.Call(func=ast.Name(id="all"), args=[ast.GeneratorExp(generators=loops)])
            ):
                yield all(certain(loop.iter, full) for loop in loops)
            case ast.Assert():
                yield True
            case ast.For(iter=over) | ast.AsyncFor(iter=over):
                runs = certain(over, full)
                yield from (runs and each for each in checks(node.body, helpers, full))
            case ast.If(body=inner, orelse=other):
                yield from checks([*inner, *other], helpers, full)
            case ast.While(body=inner):
                yield from checks(inner, helpers, full)
            case ast.Try(body=inner, finalbody=last):
                yield from checks([*inner, *last], helpers, full)
            case ast.With(items=items) | ast.AsyncWith(items=items):
                yield from (True for item in items if called(item.context_expr) & {"raises"})
                yield from checks(node.body, helpers, full)
            case ast.FunctionDef(body=inner) | ast.AsyncFunctionDef(body=inner):
                yield from checks(inner, helpers, full)
            case _ if called(node) & helpers:
                yield True


def called(node: ast.AST) -> set[str]:
    """The last names of the functions that are called in `node`."""
    calls = (each for each in ast.walk(node) if isinstance(each, ast.Call))
    return {ast.unparse(call.func).rpartition(".")[2] for call in calls}


def functions(trees: Sequence[ast.Module]) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = (node for tree in trees for node in ast.walk(tree))
    return [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def may_check_nothing(trees: Sequence[ast.Module]) -> list[str]:
    """The tests whose checks stand only in loops that may not run."""
    every = functions(trees)
    helpers = {
        f.name
        for f in every
        if not f.name.startswith("test_")
        and ("raises" in called(f) or any(isinstance(each, ast.Assert) for each in ast.walk(f)))
    }
    found = []
    for test in (f for f in every if f.name.startswith("test_")):
        sure = list(checks(test.body, helpers, set()))
        if sure and not any(sure):
            found.append(f"{test.name}, line {test.lineno}")
    return found
