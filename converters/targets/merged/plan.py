"""What a merge is about to do, decided from names, shapes and dtypes before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import BaseError
from ...files.tensors import (
    LazyTensor,
    LazyTensors,
    SafetensorsTensor,
    numel,
    refuse_quantized,
)
from ...model.base import BaseModel
from ...model.called import check_called
from ...model.lacking import check_whole
from ...model.layout import Layout
from ...model.match import (
    changed,
    check_frozen,
    is_transposed,
    lies_plainly,
    resolved,
    stored_name,
    target_architecture,
)
from ...model.quantized import METHODS, Dequantized, dtype_before, method, unquantized
from ...model.rows import check_rows, grown_by, resized
from ...model.tying import new_embedding
from ...model.untying import untied
from ...model.zeroed import as_loaded, check_zeroed
from ...progress import Progress
from ...run import Run
from ..target import Plan
from .arguments import other_arguments
from .companions import Companions, companions
from .ends import other_end, other_pad
from .heads import left_out
from .requantized import FLOAT8, SCALES, Blocks, Scales, blocks_of, stored_parts
from .settings import other_settings
from .types import dropped_types

if TYPE_CHECKING:
    from .folder import MergeReport


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output: where it comes from and which update goes into it."""

    name: str
    source: LazyTensor
    dtype: torch.dtype
    module: str | None = None
    transposed: bool = False
    blocks: Blocks | None = None  # that it is quantized by

    @property
    def nbytes(self) -> int:
        return numel(self.source) * self.dtype.itemsize

    @property
    def is_copy(self) -> bool:
        """Whether the bytes of the source file are the bytes of the output."""
        return (
            self.module is None
            and self.dtype == self.source.dtype
            and isinstance(self.source, SafetensorsTensor)
        )


@dataclass(frozen=True, kw_only=True)
class MergePlan(Plan):
    """The output's shards in order, and the configuration beside them.

    `run`: the run with its updates keyed by the tensors on disk. `dtype`: of the output, None for
    each tensor's own.
    """

    pieces = True
    base: BaseModel
    shards: Mapping[str, tuple[OutputTensor, ...]]
    config: Mapping[str, object]
    dtype: torch.dtype | None
    companions: Companions

    @property
    def ranks(self) -> Mapping[str, int | None]:
        """Each module's rank. The writing needs none, and knows all of them when it is done."""
        return self.run.ranks

    @property
    def tensors(self) -> list[OutputTensor]:
        return [tensor for shard in self.shards.values() for tensor in shard]

    def summary(self) -> dict[str, Any]:
        start = self.run.start_rank
        kept = sum(start.get(name, 0) if r is None else r for name, r in self.ranks.items())
        return {
            "method": self.run.method,
            "finished": self.run.finished,
            "shards": {name: len(tensors) for name, tensors in self.shards.items()},
            "merged": [tensor.name for tensor in self.tensors if tensor.module],
            "copied": sum(tensor.is_copy for tensor in self.tensors),
            **({} if (packed := self.dequantized) is None else {"dequantized": packed}),
            "modules": len(self.ranks),
            "components": {"start": sum(start.values()), "kept": kept},
        }

    @property
    def dequantized(self) -> dict[str, object] | None:
        """What became of a quantized base; None of another."""
        if self.requantized:
            return None
        count = sum(isinstance(tensor.source, Dequantized) for tensor in self.tensors)
        return {"method": method(self.base.config), "tensors": count} if count else None

    @property
    def requantized(self) -> list[str]:
        """The tensors that are quantized again."""
        return [tensor.name for tensor in self.tensors if tensor.blocks is not None]

    def lines(self) -> list[str]:
        parts, packed = self.summary()["components"], self.dequantized
        pruned = f" ({parts['kept']} of {parts['start']} components survived training)"
        if parts["kept"] == parts["start"]:
            pruned = ""
        return [
            f"merged {len(self.ranks)} modules{pruned} into {len(self.tensors)} tensors in "
            f"{len(self.shards)} shard(s)",
            *([] if packed is None else [_dequantized_line(packed)]),
        ]

    def write(self, folder: Path, name: str, progress: Progress) -> MergeReport:  # noqa: ARG002
        """Memory: one block of rows per thread and the components of one module, never a whole
        matrix. Where a killed merge left its journal, its finished shards are checked by hash and
        kept."""
        from .folder import write_folder

        return write_folder(folder, self, progress)


def plan_merge(
    run: Run, base: BaseModel, dtype: torch.dtype | None, *, requantize: bool = False
) -> MergePlan:
    """Plan the merge of `run` into `base`; `dtype` None keeps each tensor's own. `requantize` keeps
    what the base holds in float8 by blocks, and writes what changes of it in such blocks.

    Raises `BaseError` when module names or shapes do not fit, or when the base is not the one the
    run was trained on.
    """
    if base.fault is not None:
        raise base.fault
    if dtype is not None and base.packed:
        raise BaseError(
            "a quantized base keeps its dtypes, which its scales belong to",
            file=base.path,
            found=f"quantization_config: {method(base.config)}, and the dtype {dtype} wanted",
            expected=f"no quantization, or one of these: {', '.join(METHODS)}",
            remedy="merge into the base before it was quantized",
        )
    if not lies_plainly(run, base):
        run = resolved(run, base)
    check_called(run, base)
    given = base
    architecture, _ = target_architecture(run, base)
    find = Layout(base, architecture, run.num_labels).find
    base, zeroed = as_loaded(run, base, architecture, find)
    run, base = untied(run, base, architecture, find)
    architecture, expected = target_architecture(run, base)
    layout = Layout(base, architecture, run.num_labels)
    run = layout.on_disk(run)
    replaced = changed(run, base, layout.find)
    embedding = new_embedding(base, replaced)
    targets = _targets(run, base, replaced)
    check_frozen(run, base)

    packed, before = given.stored is not None, given.dtype()
    blocks = blocks_of(given) if requantize else None
    if blocks is not None and dtype is not None:
        raise BaseError(
            "a model in float8 again has no other dtype",
            file=base.path,
            found=str(dtype),
            remedy="leave out `dtype`, or `requantize`",
        )

    def output(name: str, source: LazyTensor) -> OutputTensor:
        own = base.tensors.get(source.name) is source
        key = source.name if own else base.find(name) or name
        module, transposed = targets.get(key, (None, False))
        own_dtype = dtype_before(source)
        if packed and own_dtype.is_floating_point:  # else half of the model is of another dtype
            own_dtype = torch.promote_types(own_dtype, before)
        out = dtype if dtype is not None and own_dtype.is_floating_point else own_dtype
        return OutputTensor(name, source, out, module, transposed)

    def outputs(name: str, source: LazyTensor) -> list[OutputTensor]:
        one = output(name, source)
        old = given.tensors.get(base.find(name) or name)
        if blocks is None or not isinstance(old, Dequantized):
            return [one]
        parts = stored_parts(given, old)
        names = (name, f"{name}{SCALES}")
        if one.module is None and source is old:
            return [OutputTensor(n, p, p.dtype) for n, p in zip(names, parts, strict=True)]
        if one.module is None:
            raise BaseError(
                "the run holds this quantized weight whole",
                file=given.path,
                tensor=name,
                remedy="merge without `requantize`",
            )
        scales = Scales(names[1], source, blocks, run, one.module, one.transposed)
        weight = replace(one, dtype=FLOAT8, blocks=blocks)
        return [weight, OutputTensor(names[1], scales, scales.dtype)]

    if expected is None:
        names = {layout.find(name) or name: tensor for name, tensor in replaced.items()}
        shards: dict[str, list[OutputTensor]] = {
            _shard_name(path): [
                each
                for name, tensor in t.items()
                for each in outputs(name, names.pop(name, tensor))
            ]
            for path, t in base.shards.items()
        }
    else:
        names, shards = {}, {_shard_name(path): [] for path in base.shards}
        # What is no longer tied, also where the class would tie what it finds in one place only.
        expected += [name for name in base.tensors.keys() - given.tensors if name not in expected]
        own = {name: layout.find(name) for name in expected if name not in replaced}
        renamed = {old: name for name, old in own.items() if old is not None}
        fused = {name: layout.members(name) for name, old in own.items() if old is None}
        renamed |= {old: old for members in fused.values() for old in members}
        for path, tensors in base.shards.items():
            shards[_shard_name(path)] += [
                each
                for old, tensor in tensors.items()
                if old in renamed
                for each in outputs(renamed[old], replaced.get(old, tensor))
            ]
        for name, old in own.items():
            if old is None and not fused[name] and (tensor := _from_run(run, base, name)):
                names[name] = tensor
        names |= {n: tensor for n, tensor in replaced.items() if n not in renamed}
    last = shards[_shard_name(list(base.shards)[-1])]
    # A tensor that the base does not hold takes the dtype of its neighbours.
    added = dtype or base.dtype()
    for name, tensor in names.items():
        new = output(name, tensor)
        last.append(replace(new, dtype=added) if new.dtype.is_floating_point else new)

    beside = companions(given.path, run, given)
    written = {name: tuple(tensors) for name, tensors in shards.items()}
    there = {tensor.name for tensors in written.values() for tensor in tensors}
    begun = check_whole(layout.names, there, base) if expected is None else ()
    told = (*other_settings(run, given), *other_arguments(run, given), *other_pad(run, given))
    told += (*left_out(given, base), *dropped_types(run, given))
    plan = MergePlan(
        target="merged",
        run=run,
        base=given,
        nbytes=sum(tensor.nbytes for tensors in written.values() for tensor in tensors),
        warnings=(*run.warnings, *beside.left, *other_end(run, given), *told, *begun),
        shards=written,
        config=_config(run, base, architecture, dtype, embedding, packed=requantize),
        dtype=dtype,
        companions=beside,
    )
    check_rows(
        run,
        base,
        architecture,
        replaced,
        {t.name: t.source.shape for t in plan.tensors},
        layout.find,
    )
    check_zeroed(run, zeroed, {t.name: (t.source, t.module) for t in plan.tensors}, layout.find)
    return plan


def _dequantized_line(packed: Mapping[str, object]) -> str:
    return (
        f"the base is quantized ({packed['method']}): its {packed['tensors']} packed tensors are "
        "dequantized, so the model is not quantized any more"
    )


def _shard_name(path: Path) -> str:
    """`pytorch_model-00001-of-00002.bin` becomes `model-00001-of-00002.safetensors`."""
    if path.suffix == ".safetensors":
        return path.name
    return path.stem.replace("pytorch_model", "model") + ".safetensors"


def _targets(run: Run, base: BaseModel, replaced: LazyTensors) -> dict[str, tuple[str, bool]]:
    """Base tensor name → (module, whether it is stored as [in, out])."""
    targets: dict[str, tuple[str, bool]] = {}
    for module, shape in run.shapes.items():
        transposed = is_transposed(run, base, replaced, module, shape)
        name = stored_name(module, base)
        if name in targets:
            raise BaseError(
                "two adapted modules are the same base tensor",
                file=base.path,
                tensor=name,
                found=f"{targets[name][0]} and {module}",
            )
        stored = replaced.get(name) or base.tensors.get(name)
        if stored is not None:
            if stored.dtype.itemsize < 2:
                base.refuse_packed(module)
            refuse_quantized(stored)
        targets[name] = (module, transposed)
    return targets


def _from_run(run: Run, base: BaseModel, name: str) -> LazyTensor | None:
    """None for a pooling layer that is nowhere: transformers makes it anew at every load, so that
    nothing was trained with it."""
    if run.embedded_base and name in run.embedded_base:
        return run.embedded_base[name]
    if ".pooler." in f".{name}" and (run.task or base.task) == "feature-extraction":
        return None
    raise BaseError(
        "neither the base nor the run has this tensor of the fine-tuned model",
        file=base.path,
        tensor=name,
        remedy="was the head saved with the adapter (modules_to_save)?",
    )


def _config(
    run: Run,
    base: BaseModel,
    architecture: str | None,
    dtype: torch.dtype | None,
    embedding: LazyTensor | None,
    *,
    packed: bool,
) -> dict[str, object]:
    plain = base.stored is not None and not packed
    config = unquantized(base.config) if plain else dict(base.config)
    if more := grown_by(base, embedding):
        config = resized(config, more)
    if architecture is not None:
        config["architectures"] = [architecture]
    if str(run.task).endswith("classification") and run.num_labels is not None:
        labels = config.get("id2label")
        if not isinstance(labels, dict) or len(labels) != run.num_labels:
            names = [f"LABEL_{i}" for i in range(run.num_labels)]
            config["id2label"] = {str(i): name for i, name in enumerate(names)}
            config["label2id"] = {name: i for i, name in enumerate(names)}
            config.pop("num_labels", None)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype)[len("torch.") :]
    return config
