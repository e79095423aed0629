"""Graphs and adapter files of what a folder holds, each made once and kept in the cache.

All that needs torch happens here, in a process of its own: ONNX Runtime beside torch reads several
times slower, and the server does without its memory.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from converters.certificate import FILE, tool, write_certificate
from converters.errors import BaseError, DoraExportError, MissingError, TargetError, apart
from converters.files.json_files import read_json
from converters.files.onnx_files import FOLDER, SUFFIX, digest, graphs_in, read_adapter_file
from converters.files.output import output_folder
from converters.files.tensors import numel
from converters.model.base import BaseModel, open_base
from converters.model.match import target_architecture
from converters.progress import show
from converters.run import Run
from converters.targets.merged.companions import companions
from converters.targets.onnx import add_adapters
from converters.targets.onnx.plan import plan_added, plan_onnx
from dora_serve.api import write_onnx
from dora_serve.extras import quiet
from dora_serve.folder.cache import cached, is_cached, key_of, member_key
from dora_serve.folder.inventory import Member, discover, read_member
from dora_serve.folder.names import names_inside
from dora_serve.progress import progress_bar, say, timed
from dora_serve.server.prepare import offer
from dora_serve.server.prepare.lighter import without_compiler, without_unused
from dora_serve.server.prepare.onnx_folders import (
    SERVED,
    certified_modules,
    read_onnx_folder,
)
from dora_serve.server.prepare.precision import AUTO, chosen

_AT_ONCE = 64  # runs of one graph; of more those that are not in the cache wait for a request
_TRIED = 3  # runs, before it is the base that no graph can be made of
_NAME = "adapter"  # of the one in an adapter's own folder
_MAP = "modules.json"

Say = Callable[[str], None]


def make_offer(
    root: Path, base: str | None, dry: bool, say: Say, precision: str = "fp32"
) -> offer.Offer:
    """Discover what is in `root` and make what serving it needs; `dry` makes nothing."""
    found = discover(root, base)
    graphs: list[offer.Graph] = []
    models: list[offer.OfferedModel] = []
    problems = dict(found.problems)
    for name, model in found.bases.items():
        members = found.of(model)
        own = model.task
        narrow = chosen(model) if precision == AUTO else precision
        tasks = dict.fromkeys([*([own] if own else []), *(m.run.task or own for m in members)])
        if own is None:
            problems[name] = "its architecture is for no task that is served"
            problems[name] += "; runs of it are, by their own" if tasks else ""
        for task in tasks:
            runs = [member for member in members if (member.run.task or own) == task]
            runs, graph = _graph_for(
                name, model, task, narrow, runs, name == found.given, dry, say, problems
            )
            if graph is None:
                continue
            graphs.append(graph)
            if task == own:
                with apart(problems, name):
                    models.append(_base(name, model, graph))
            with progress_bar(len(runs), "adapters", "adapter") as advance:
                for member in runs:
                    with apart(problems, member.name):
                        models.append(_member(member, graph, dry, say, len(runs) > _AT_ONCE))
                    advance(1)
    inside: dict[str, list[offer.OfferedModel]] = {}
    for name, path in found.onnx.items():
        with apart(problems, name):
            graph, own_model, inside[name] = read_onnx_folder(name, path)
            graphs.append(graph)
            models.append(own_model)
    called = names_inside(
        {name: [m.name for m in adapters] for name, adapters in inside.items()},
        {*found.bases, *found.members, *found.onnx, *found.problems},
    )
    for folder, adapters in inside.items():
        models += [m.model_copy(update={"name": called[folder, m.name]}) for m in adapters]
    return offer.Offer(graphs=graphs, models=models, problems=problems, warnings=found.warnings)


def add(wanted: offer.Addition) -> offer.OfferedModel:
    """Make the adapter file of one more run.

    Raises `DoraExportError` when it cannot be read or belongs to none of the graphs.
    """
    bases: dict[str, BaseModel] = {}
    unread: dict[str, str] = {}  # of which another run is not to suffer
    for path, name in {graph.path: graph.base for graph in wanted.graphs if graph.path}.items():
        with apart(unread, name):
            bases[path] = open_base(path)
    given = next((open_base(g.path) for g in wanted.graphs if g.path and g.given), None)
    with without_unused():
        try:
            member = read_member(wanted.name, Path(wanted.path), list(bases.values()), given)
        except BaseError as error:
            if unread:
                error.found = f"{error.found}; not read: {', '.join(unread)}"
            raise
    for graph in wanted.graphs:
        if graph.path == str(member.base.path) and member.run.task in (None, graph.task):
            _check_served(member.base, graph)
            return _member(member, graph, False, print)
    raise TargetError(
        "no graph that is served takes this run",
        found=f"{member.run.task or 'a run'} of {member.base.name}",
        expected=", ".join(f"{graph.task} of {graph.base}" for graph in wanted.graphs),
        remedy="start the server anew with the run in its folder",
    )


def _check_served(base: BaseModel, graph: offer.Graph) -> None:
    """Raise `BaseError` where `base` is no longer what `graph` was made of: a run of the one that
    lies there now would be computed as another model, with other tokens perhaps."""
    if graph.state is not None and key_of(_state(base)) != graph.state:
        raise BaseError(
            "the base is no longer the one that is served",
            file=base.path,
            remedy="start the server anew",
        )


def _graph_for(
    name: str,
    base: BaseModel,
    task: str | None,
    precision: str,
    runs: list[Member],
    given: bool,
    dry: bool,
    say: Say,
    problems: dict[str, str],
) -> tuple[list[Member], offer.Graph | None]:
    """The graph of `base`, and the runs that it is for. The first run shapes an encoder's: one for
    which none can be made is left out, as a problem of its own."""
    tries = min(len(runs), _TRIED) if task != offer.DECODES else 0
    failed: dict[str, str] = {}
    for start in range(tries + 1):
        with apart(failed, f"{start}"):
            graph = _graph(name, base, task, precision, runs[start:], given, dry, say)
            problems |= {runs[each].name: failed[f"{each}"] for each in range(start)}
            return runs[start:], graph
    problems |= dict.fromkeys([name, *(member.name for member in runs)], failed["0"])
    return [], None


def _graph(
    name: str,
    base: BaseModel,
    task: str | None,
    precision: str,
    members: list[Member],
    given: bool,
    dry: bool,
    say: Say,
) -> offer.Graph:
    if task not in SERVED:
        raise TargetError("this task is not served", found=task, expected=", ".join(SERVED))
    # A decoder's graph is the same with every run, but for a base that is for another task itself.
    plain = task == offer.DECODES == base.task
    first = members[0].run if members and not plain else None
    head = [target_architecture(first, base)[0], first.num_labels] if first else []
    asked = [task] if task == offer.DECODES else [task, *head, bool(members)]
    asked.append(precision)
    folder, state = Path(f"{base.path} {task}"), None
    if dry:
        _plan(base, {} if first is None else {_NAME: first})
    else:
        key, state = _base_key(base, asked), key_of(_state(base))

        def make(target: Path) -> None:
            say(f"{name}: making its ONNX graph in {precision}, once …")
            adapters = {"first": first} if first else {}
            with timed(f"onnx-{precision}", "making the graph", base.nbytes):
                write_onnx(base, target, adapters=adapters, precision=precision)
            # Else it would be kept under the name of what the base was before.
            if _base_key(base, asked) != key:
                raise BaseError(
                    "what lies beside the base's weights changed while it was read",
                    file=base.path,
                    remedy="start the server anew when nothing writes to it",
                )

        folder = cached(key, make)
    return offer.Graph(
        folder=str(folder), task=task, base=name, path=str(base.path), given=given, state=state
    )


def _base_key(base: BaseModel, asked: Sequence[object]) -> str:
    """A name for the graph of a base: of what it is, and of what is asked for."""
    return key_of([tool(), *_state(base), asked])


def _state(base: BaseModel) -> tuple[object, ...]:
    """What a base is: its tensors and configuration, and the files beside them."""
    return base.identity, companions(base.path).hashes()


def _base(name: str, base: BaseModel, graph: offer.Graph) -> offer.OfferedModel:
    file = base.path / FILE
    proof: dict[str, Any] = read_json(file) if file.exists() else {}
    merged = proof.get("target") == "merged"
    return offer.OfferedModel(
        name=name,
        kind="merged" if merged else "base",
        method=proof["run"]["method"] if merged else None,
        folder=graph.folder,
        task=graph.task,
        base=None,
        adapter=None,
        modules=certified_modules(proof) if merged else {},
        parameters=sum(numel(tensor) for tensor in base.tensors.values()),
        bytes=base.nbytes,
    )


def _member(
    member: Member, graph: offer.Graph, dry: bool, say: Say, later: bool = False
) -> offer.OfferedModel:
    """A run as it is served, its adapter made; `later`: unless it would have to be made now."""
    run, base = member.run, member.base
    modules: dict[str, offer.Module] = {}
    file, known, size, parameters, waits = None, None, 0, 0, False
    if dry:
        _plan(base, {_NAME: run})
    else:

        def make(target: Path) -> None:
            say(f"{member.name}: making its adapter, once …")
            with without_unused():
                from transformers import GenerationMixin, PreTrainedModel  # noqa: F401
            _write(run, base, Path(graph.folder), target)

        key = member_key(member, form="onnx adapter", graph=Path(graph.folder).name)
        waits = later and not is_cached(key)
        if waits:
            kept = plan_added(Path(graph.folder), {_NAME: run}, base, force=True)[_NAME]
            for module, rank in kept.ranks.items():
                start = run.start_rank.get(module, rank)
                modules[module] = offer.Module(start=start, rank=rank or 0)
                parameters += (rank or 0) * sum(kept.shapes[module])
        else:
            folder = cached(key, make)
            file = folder / FOLDER / f"{_NAME}{SUFFIX}"
            size = file.stat().st_size
            arrays = read_adapter_file(file)
            known, parameters = digest(arrays).hex(), sum(array.size for array in arrays.values())
            read = json.loads((folder / _MAP).read_text(encoding="utf-8"))
            modules = {module: offer.Module(**numbers) for module, numbers in read.items()}
    return offer.OfferedModel(
        name=member.name,
        kind="run",
        method=run.method,
        folder=graph.folder,
        task=graph.task,
        base=graph.base,
        adapter=None if file is None else str(file),
        digest=known,
        run=str(member.path) if waits else None,
        modules=modules,
        parameters=parameters,
        bytes=size,
    )


def _plan(base: BaseModel, adapters: Mapping[str, Run]) -> None:
    """Raise `DoraExportError` where the graph, or a branch of it, could not be made."""
    plan_onnx(base, adapters=adapters)


def _write(run: Run, base: BaseModel, graph: Path, target: Path) -> None:
    if not graph.is_dir():
        raise MissingError("the cache was emptied meanwhile", remedy="start the server anew")
    with output_folder(target) as folder:
        copy = folder / "graph"  # of its own, since the output folder is locked
        copy.mkdir()
        for file in (*graphs_in(graph), graph / FILE):
            shutil.copyfile(file, copy / file.name)
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
    """Answer the request on standard input, one line, on standard output, both JSON."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    request = json.loads(sys.stdin.buffer.readline())
    Thread(target=_end_with_server, daemon=True).start()
    show(progress_bar)
    quiet()
    reply: offer.Offer | offer.OfferedModel | offer.Failure
    try:
        if "path" in request:
            with without_compiler():
                reply = add(offer.Addition(**request))
        else:
            request["root"] = Path(request["root"])
            reply = make_offer(**request, say=say)
    except DoraExportError as error:
        reply = offer.Failure(error=str(error))
    with suppress(BrokenPipeError), answer:  # whoever asked may be gone
        answer.write(reply.model_dump_json())


def _end_with_server() -> None:
    """End this process and those below it once standard input ends: the server is gone."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
