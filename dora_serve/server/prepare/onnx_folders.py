"""ONNX folders that `dora-export onnx` wrote, as graphs and models to serve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import TargetError, TensorFileError
from converters.files.handles import check_file
from converters.files.json_files import read_json
from converters.files.onnx_files import FOLDER, SUFFIX, digest, graphs_in, read_adapter_file
from converters.model.tasks import task_of

from ...folder.names import not_a_name
from .offer import ANSWERS, DECODES, TRANSLATES, Graph, Module, OfferedModel
from .onnx_graphs import check_graphs, read_genai

SERVED = (
    DECODES,
    TRANSLATES,
    ANSWERS,
    "sequence-classification",
    "token-classification",
    "feature-extraction",
)


def read_onnx_folder(name: str, path: Path) -> tuple[Graph, OfferedModel, list[OfferedModel]]:
    """The graph at `path`, called `name`, as a model, and its adapters by their own names.

    Raises `DoraExportError` for what is not served.
    """
    certificate: Mapping[str, Any] = read_json(path / "dora_export.json")
    decodes = (path / "genai_config.json").exists()
    task = DECODES if decodes else task_of(read_json(path / "config.json"))
    if task not in SERVED:
        raise TargetError("this task is not served", file=path, found=task or "an unknown task")
    genai = read_genai(path) if decodes else None
    check_graphs(path, genai)
    if genai is not None and not genai.search.past_present_share_buffer:
        raise TargetError(
            "this decoder's cache cannot be shared by requests that come and go",
            file=path,
            remedy="export it with --precision fp32, int8 or int4",
        )
    graph = Graph(folder=str(path), task=task, base=name, path=None)
    run = certificate.get("run") or {}
    merged = OfferedModel(
        name=name,
        kind="merged" if run else "base",
        method=run.get("method"),
        folder=str(path),
        task=task,
        base=None,
        adapter=None,
        modules=certified_modules(certificate),
        parameters=0,
        bytes=sum(
            file.stat().st_size for graph in graphs_in(path) for file in path.glob(f"{graph.name}*")
        ),
    )
    models = []
    for adapter, proof in (certificate.get("adapters") or {}).items():
        file = path / FOLDER / f"{adapter}{SUFFIX}"
        if not_a_name(adapter) or file.parent != path / FOLDER:
            raise TensorFileError(
                "the certificate names an adapter as no file can be",
                file=path / "dora_export.json",
                found=adapter,
            )
        check_file(file)
        arrays = read_adapter_file(file)
        models.append(
            OfferedModel(
                name=adapter,
                kind="adapter",
                method=proof["run"]["method"],
                folder=str(path),
                task=task,
                base=name,
                adapter=str(file),
                digest=digest(arrays).hex(),
                modules=certified_modules(proof),
                parameters=sum(array.size for array in arrays.values()),
                bytes=file.stat().st_size,
            )
        )
    return graph, merged, models


def certified_modules(certificate: Mapping[str, Any]) -> dict[str, Module]:
    """What a certificate tells of every adapted matrix."""
    return {
        module: Module(
            start=told.get("start_rank"),
            rank=told["rank"],
            relative=told.get("relative_update"),
            lost=(told.get("rounding") or {}).get("lost"),
        )
        for module, told in (certificate.get("modules") or {}).items()
        if told.get("rank") is not None
    }
