"""Graphs and adapter files of what a folder holds, each made once and kept in the cache.

All that needs torch happens here, in a process of its own: ONNX Runtime beside torch reads several
times slower, and the server does without its memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.certificate import FILE, sha256, tool, write_certificate
from converters.errors import DoraExportError, TargetError
from converters.files.json_files import read_json
from converters.files.onnx_files import FOLDER, MODEL, SUFFIX, read_adapter_file
from converters.files.output import output_folder
from converters.files.tensors import nbytes, numel
from converters.model.base import BaseModel, open_base
from converters.model.match import target_architecture
from converters.run import Run
from converters.targets.onnx import add_adapters
from dora_serve.api import write_onnx
from dora_serve.folder.cache import cached, member_key
from dora_serve.folder.inventory import Found, Member, discover, read_member
from dora_serve.server.prepare import plan
from dora_serve.server.prepare.onnx_folders import (
    SERVED,
    certified_modules,
    own_task,
    read_onnx_folder,
)

_NAME = "adapter"  # of the one in an adapter's own folder
_MAP = "modules.json"
_BESIDE = {".json", ".jinja", ".txt", ".model"}

Say = Callable[[str], None]


def make_plan(root: Path, base: str | None, dry: bool, say: Say) -> plan.Plan:
    """Discover what is in `root` and make what serving it needs; `dry` makes nothing."""
    found = discover(root, base)
    graphs: list[plan.Graph] = []
    models: list[plan.Model] = []
    problems = dict(found.problems)
    for name, model in _bases(found).items():
        members = found.of(model)
        own = own_task(model.config)
        tasks = dict.fromkeys([*([own] if own else []), *(m.run.task or own for m in members)])
        if not tasks:
            problems[name] = "its architecture is for no task that is served"
        for task in tasks:
            runs = [member for member in members if (member.run.task or own) == task]
            try:
                graph = _graph(name, model, task, runs, dry, say)
                bare = [_base(name, model, graph)] if task == own else []
            except DoraExportError as error:
                problems |= {n: str(error) for n in [name, *(m.name for m in runs)]}
                continue
            graphs.append(graph)
            models += bare
            for member in runs:
                try:
                    models.append(_member(member, graph, dry, say))
                except DoraExportError as error:
                    problems[member.name] = str(error)
    for name, path in found.onnx.items():
        try:
            graph, its_models = read_onnx_folder(name, path, {m.name for m in models})
            graphs.append(graph)
            models += its_models
        except DoraExportError as error:
            problems[name] = str(error)
    return plan.Plan(graphs=graphs, models=models, problems=problems)


def add(wanted: plan.Addition) -> plan.Model:
    """Make the adapter file of one more run.

    Raises `DoraExportError` when it cannot be read or belongs to none of the graphs.
    """
    bases = {graph.path: open_base(graph.path) for graph in wanted.graphs if graph.path}
    member = read_member(wanted.name, Path(wanted.path), list(bases.values()))
    for graph in wanted.graphs:
        if graph.path == str(member.base.path) and member.run.task in (None, graph.task):
            return _member(member, graph, False, print)
    raise TargetError(
        "no graph that is served takes this run",
        found=f"{member.run.task or 'a run'} of {member.base.name}",
        expected=", ".join(f"{graph.task} of {graph.base}" for graph in wanted.graphs),
        remedy="start the server anew with the run in its folder",
    )


def _bases(found: Found) -> dict[str, BaseModel]:
    """The bases by name, those of members that lie elsewhere too."""
    known = dict(found.bases)
    paths = {base.path for base in known.values()}
    for member in found.members.values():
        if member.base.path not in paths:
            paths.add(member.base.path)
            known[Path(member.base.name).name] = member.base
    return known


def _graph(
    name: str, base: BaseModel, task: str | None, members: list[Member], dry: bool, say: Say
) -> plan.Graph:
    if task not in SERVED:
        raise TargetError("this task is not served", found=task, expected=", ".join(SERVED))
    first = members[0].run if members else None
    head = [target_architecture(first, base)[0], first.num_labels] if first else []
    asked = [task] if task == plan.DECODES else [task, *head, bool(members)]
    folder = Path(f"{base.path} {task}")
    if not dry:

        def make(target: Path) -> None:
            say(f"{name}: making its ONNX graph, once …")
            write_onnx(base, target, adapters={"first": first} if first else {})

        folder = cached(_base_key(base, asked), make)
    return plan.Graph(folder=str(folder), task=task, base=name, path=str(base.path))


def _base_key(base: BaseModel, asked: Sequence[object]) -> str:
    """The hash of a base's matrices, of the files beside them, and of what is asked for."""
    matrices = [n.removesuffix(".weight") for n, t in base.tensors.items() if len(t.shape) > 1]
    beside = {p.name: sha256(p) for p in sorted(base.path.glob("*")) if p.suffix in _BESIDE}
    said = [tool(), base.fingerprint(matrices), beside, asked]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def _base(name: str, base: BaseModel, graph: plan.Graph) -> plan.Model:
    file = base.path / FILE
    proof: dict[str, Any] = read_json(file) if file.exists() else {}
    merged = proof.get("target") == "merged"
    return plan.Model(
        name=name,
        kind="merged" if merged else "base",
        method=proof["run"]["method"] if merged else None,
        folder=graph.folder,
        task=graph.task,
        base=None,
        adapter=None,
        modules=certified_modules(proof) if merged else {},
        parameters=sum(numel(tensor) for tensor in base.tensors.values()),
        bytes=sum(nbytes(tensor) for tensor in base.tensors.values()),
    )


def _member(member: Member, graph: plan.Graph, dry: bool, say: Say) -> plan.Model:
    run, base = member.run, member.base
    modules: dict[str, plan.Module] = {}
    file, size, parameters = None, 0, 0
    if not dry:

        def make(target: Path) -> None:
            say(f"{member.name}: making its adapter, once …")
            _write(run, base, Path(graph.folder), target)

        key = member_key(member, form="onnx adapter", graph=Path(graph.folder).name)
        folder = cached(key, make)
        file = folder / FOLDER / f"{_NAME}{SUFFIX}"
        size = file.stat().st_size
        parameters = sum(array.size for array in read_adapter_file(file).values())
        read = json.loads((folder / _MAP).read_text(encoding="utf-8"))
        modules = {module: plan.Module(**numbers) for module, numbers in read.items()}
    return plan.Model(
        name=member.name,
        kind="run",
        method=run.method,
        folder=graph.folder,
        task=graph.task,
        base=graph.base,
        adapter=None if file is None else str(file),
        modules=modules,
        parameters=parameters,
        bytes=size,
    )


def _write(run: Run, base: BaseModel, graph: Path, target: Path) -> None:
    with output_folder(target) as folder:
        copy = folder / "graph"  # of its own, since the output folder is locked
        copy.mkdir()
        for name in (MODEL, FILE):
            shutil.copyfile(graph / name, copy / name)
        ranks = add_adapters(copy, {_NAME: run}, base)[_NAME]
        (copy / FOLDER).rename(folder / FOLDER)
        certificate = read_json(copy / FILE)
        shutil.rmtree(copy)
        numbers = dict(_modules(run, ranks))
        (folder / _MAP).write_text(json.dumps(numbers), encoding="utf-8")
        write_certificate(folder, certificate)


def _modules(run: Run, ranks: Mapping[str, int]) -> Iterable[tuple[str, dict[str, object]]]:
    for module, rank in ranks.items():
        update = run.updates[module].components()
        assert update is not None
        start = run.start_rank.get(module, update.rank)
        yield module, {"start": start, "rank": rank, "norm": update.norm()}


def main() -> None:
    """Answer the request on standard input on standard output, both JSON."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    request = json.load(sys.stdin)
    reply: plan.Plan | plan.Model | plan.Failure
    try:
        if "path" in request:
            reply = add(plan.Addition(**request))
        else:
            root, base, dry = Path(request["root"]), request["base"], request["dry"]
            reply = make_plan(root, base, dry, lambda text: print(text, file=sys.stderr))
    except DoraExportError as error:
        reply = plan.Failure(error=str(error))
    with answer:
        answer.write(reply.model_dump_json())


if __name__ == "__main__":
    main()
