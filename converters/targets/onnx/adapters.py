"""`NAME.onnx_adapter`: one run's factors as ONNX Runtime's adapter file.

`onnxruntime.LoraAdapter` and `onnxruntime_genai.Adapters` load it; what it leaves out keeps the
graph's default of rank 0. A running server has these written for it, so what builds graphs, and
takes long to import, stays out of here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import OutputError, TargetError
from ...files.onnx_files import FOLDER, SUFFIX, graphs_in, head_names, heads_in, names
from ...model.base import BaseModel
from ...model.match import changed
from ...run import LazyUpdates, Run
from .report import refuse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_VERSION = 1
# Modules that the graph has in parts: Hugging Face name → the parts, in row order.
_PACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Site:
    """One MatMul that an update can be added to: its node (empty once the branch is there), the
    module it computes, `in` and `out` features."""

    node: str
    name: str
    in_features: int
    out_features: int


def write_adapters(
    folder: Path, adapters: Mapping[str, Run], base: BaseModel
) -> dict[str, dict[str, int]]:
    """Write the stripped runs beside the graphs of `folder`; returns their ranks. Raises
    `TargetError` for what the graphs have no inputs for."""
    shapes: dict[str, list[int | str]] = {}
    for file in graphs_in(folder):
        shapes |= _input_shapes(file)
    sites = _sites_in(shapes)
    (folder / FOLDER).mkdir(exist_ok=True)
    ranks = {}
    for name, run in adapters.items():
        heads = heads_in(shapes)
        own = {f"{module}.{part}" for module in heads for part in ("weight", "bias")}
        refuse(run, sorted(changed(run, base).keys() - own))
        updates = {m: partial(run.updates.__getitem__, m) for m in run.updates if m not in heads}
        file = folder / FOLDER / f"{name}{SUFFIX}"
        if file.exists():
            raise TargetError(
                "two adapters would be one file, since this disk does not tell their names apart",
                file=file,
                remedy="give one of them another name",
            )
        ranks[name] = write_adapter_file(
            file,
            replace(run, updates=LazyUpdates(updates)),
            sites,
            _head_tensors(run, base, shapes),
        )
    return ranks


def _input_shapes(file: Path) -> dict[str, list[int | str]]:
    """The axes of every input of a graph, a symbol's name where the size is free."""
    import onnx

    inputs = onnx.load(file, load_external_data=False).graph.input
    return {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            for dim in value.type.tensor_type.shape.dim
        ]
        for value in inputs
        if value.type.tensor_type.HasField("shape")
    }


def _sites_in(shapes: Mapping[str, list[int | str]]) -> dict[str, Site]:
    """The sites of a graph that has its branches already, by name, from its inputs' `shapes`."""
    found = {}
    for name in (n.removesuffix(".lora_A") for n in shapes if n.endswith(".lora_A")):
        a, b, _ = names(name)
        found[name] = Site("", name, int(shapes[a][0]), int(shapes[b][1]))
    return found


def _head_tensors(
    run: Run, base: BaseModel, shapes: Mapping[str, list[int | str]]
) -> dict[str, Array]:
    """What a run brings for the heads of a graph: input name → array, updates folded in.

    `shapes`: the graph's inputs. Raises `TargetError` for a head of another shape.
    """
    found: dict[str, Array] = {}
    for module in heads_in(shapes):
        for suffix, own in zip(("weight", "bias"), head_names(module), strict=True):
            name = f"{module}.{suffix}"
            tensor = run.replaced.get(name) or (run.embedded_base or {}).get(name)
            update = run.updates[module] if suffix == "weight" and module in run.updates else None
            if tensor is None and update is not None:
                tensor = base.weight(module)
            if tensor is None or own not in shapes:
                continue
            rows = tensor.load().float()
            array = (rows if update is None else update.merge(rows.clone(), 0)).numpy()
            array = array.T.copy() if suffix == "weight" else array
            expected = shapes[own]
            fits = len(expected) == array.ndim and all(
                isinstance(size, str) or size == actual
                for size, actual in zip(expected, array.shape, strict=True)
            )
            if not fits:
                raise TargetError(
                    "the run's head does not fit the graph",
                    file=run.path,
                    tensor=f"{module}.{suffix}",
                    found=list(array.shape),
                    expected=expected,
                )
            found[own] = array
    return found


def write_adapter_file(
    path: Path, run: Run, sites: Mapping[str, Site], heads: Mapping[str, Array] | None = None
) -> dict[str, int]:
    """Write the stripped `run`, A `[in, r]` and B `[r, out]` with scale 1, for the `sites` of a
    graph, by name, and the `heads` that it brings, by input name; returns the ranks.

    Raises `TargetError` where the graph has no site for an update, or one of another shape.
    """
    from onnxruntime import OrtValue

    parameters = {n: OrtValue.ortvalue_from_numpy(array) for n, array in (heads or {}).items()}
    ranks = {}
    for module in run.updates:
        update = run.updates[module].components()
        assert update is not None
        ranks[module] = update.rank
        if not update.rank:  # as of a pooling layer, which no loss reached: it needs no place
            continue
        own = _sites_of(module, update.shape, sites)
        a, b = update.balanced()
        for site, row in own:
            name_a, name_b, _ = names(site.name)
            rows = b[row : row + site.out_features]
            for name, factor in ((name_a, a), (name_b, rows)):
                parameters[name] = OrtValue.ortvalue_from_numpy(factor.T.contiguous().numpy())
    _export(path, parameters)
    return ranks


def _sites_of(
    module: str, shape: tuple[int, int], sites: Mapping[str, Site]
) -> list[tuple[Site, int]]:
    """The sites that compute an update of `shape [out, in]`, each with the update's first row
    there."""
    names = [module]
    for packed, parts in _PACKED.items():
        if module not in sites and module.endswith(packed):
            names = [module.removesuffix(packed) + part for part in parts]
    placed, row = [], 0
    for site in (sites[name] for name in names if name in sites):
        placed.append((site, row))
        row += site.out_features
    if not placed or row != shape[0] or any(s.in_features != shape[1] for s, _ in placed):
        raise TargetError(
            "the graph has no place for this module's update",
            tensor=module,
            found=[f"{s.name} [{s.out_features}, {s.in_features}]" for s, _ in placed] or "none",
            expected=list(shape),
            remedy="export it merged: dora-export onnx RUN OUT",
        )
    return placed


def write_own_heads(path: Path, heads: Mapping[str, Array]) -> None:
    """Write the heads of the base itself, by input name, as an adapter file."""
    from onnxruntime import OrtValue

    _export(path, {n: OrtValue.ortvalue_from_numpy(array) for n, array in heads.items()})


def _export(path: Path, parameters: Mapping[str, Any]) -> None:
    from onnxruntime import AdapterFormat

    file = AdapterFormat()
    file.set_adapter_version(_VERSION)
    file.set_model_version(_VERSION)
    file.set_parameters(dict(parameters))
    try:
        file.export_adapter(str(path))
    except RuntimeError:  # which it has for a full disk, and no other word
        raise OutputError(
            "ONNX Runtime could not write the adapter",
            file=path,
            remedy="nothing was left behind; look after the disk and run again",
        ) from None
