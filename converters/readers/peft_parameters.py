"""What PEFT trains besides layers: parameters of fused experts, and single rows of embeddings.

Sources: huggingface/peft, `ParamWrapper` in `src/peft/tuners/lora/layer.py`, `_inject_parameters`
in `tuners_utils.py`, and `src/peft/tuners/trainable_tokens/layer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, load_finite
from ..model.layout import REGISTERED
from ..model.match import rows_in_memory
from ..model.rows import grown_by
from ..model.tying import input_embedding, new_embedding
from ..options import ReadOptions
from ..run import LazyUpdates, Run
from ..updates.rank_one import RankOneSum
from ..updates.replaced import ReplacedRows
from ..updates.update import Update
from .module import AdaptedModule
from .peft_common import IN_PEFT, Scaling, need_base

TOKENS = ".token_adapter.trainable_tokens_delta"


def parameters(config: Mapping[str, object], stored: Iterable[str], file: Path) -> dict[str, str]:
    """Stored module (`experts`, `experts.base_layer`) → the parameter that its pair adapts, as
    `module.parameter`; modules adapted as layers are left out.

    The keys do not name the parameter: `target_parameters` and the nesting do.
    """
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list):
        raise RunError("target_parameters is not a list", file=file, found=targets)
    nested: dict[str, list[str]] = {}
    stored = list(stored)
    inner = next((name for name in stored if name.endswith(".experts.base_layer")), None)
    if inner is not None and not targets:  # as prime-rl saves gpt-oss, in the form of vLLM
        raise RunError(
            "pairs for the parameters of experts, which the configuration does not name",
            file=file,
            tensor=inner,
            found="no target_parameters",
            remedy='add "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] '
            'to adapter_config.json, and take "experts" out of target_modules',
        )
    for name in stored:
        nested.setdefault(name.replace(".base_layer", ""), []).append(name)
    result = {}
    for module, names in nested.items():
        found = {str(t).rpartition(".")[2] for t in targets if _applies(str(t), module)}
        if not found:
            continue
        if len(found) != len(names) or (len(found) > 1 and not found <= set(REGISTERED)):
            raise RunError(
                "which parameters this adapter is for cannot be told",
                file=file,
                tensor=module,
                found=f"{len(names)} pairs for {sorted(found)}",
                expected="one pair per parameter; several only of " + ", ".join(REGISTERED),
                remedy=IN_PEFT,
            )
        ordered = sorted(found, key=REGISTERED.index) if len(found) > 1 else list(found)
        for name, parameter in zip(sorted(names, key=len, reverse=True), ordered, strict=True):
            result[name] = f"{module}.{parameter}"
    return result


def _applies(target: str, module: str) -> bool:
    parent, _, parameter = target.rpartition(".")
    if not parent:  # a bare name fits every module: PEFT makes it for experts
        return module.rpartition(".")[2] == "experts"
    return f".{module}.{parameter}".endswith(f".{target}")


class Laid(NamedTuple):
    """How the pair of a parameter lies: the other way round than today's PEFT lays it, `lora_B`
    `[out, E, r]`; and of how many experts the base holds it, None where nobody knows."""

    other_way: bool
    by_expert: bool
    experts: int | None


def parameter_updates(
    parameter: str, pair: AdaptedModule, rows: int, scaling: Scaling, laid: Laid
) -> tuple[int, dict[str, Callable[[], Update]]]:
    """The rank, and name → update, per expert where `parameter` has several.

    `lora_A [E·r, in]` is `[E, r, in]`, `lora_B [out, r·E]` is `[out, r, E]`:
    ΔW[e] = s·B[:, :, e]·A[e].
    """
    rank = int(scaling.rank(parameter))
    even = rank > 0 and not rows % rank
    if not even or (laid.experts is not None and rows != laid.experts * rank):
        raise RunError(
            "lora_A does not hold a whole number of experts"
            if not even
            else "lora_A is not of all experts at the rank that the configuration says",
            file=pair.file,
            tensor=parameter,
            found=f"{rows} rows",
            expected=f"a multiple of the rank {rank}"
            if laid.experts is None
            else f"{laid.experts} experts at rank {rank}",
            remedy="where each was trained at another rank N (moe_rank_scaling of NeMo AutoModel), "
            'add "rank_pattern": {".*experts.*": N} to adapter_config.json',
        )
    experts = rows // rank
    whole = LazyUpdates({parameter: partial(pair.sum, scaling.of(parameter, rank))})

    def turned(update: RankOneSum) -> RankOneSum:
        return update.transposed() if laid.other_way else update

    if experts == 1:
        return rank, {parameter: lambda: turned(pair.sum(scaling.of(parameter, rank)))}

    def load(expert: int) -> Update:
        every = whole[parameter].components()
        assert every is not None
        rows = slice(expert * rank, (expert + 1) * rank)
        # Tensors of its own: one expert that stays in memory would keep all of them.
        columns = rows if laid.by_expert else slice(expert, None, experts)
        a, b = every.a[rows].clone(), every.b[:, columns].clone()
        return turned(RankOneSum(a, every.c[rows].clone(), b))

    return rank, {f"{parameter}[{expert}]": partial(load, expert) for expert in range(experts)}


def token_rows(
    config: Mapping[str, object],
    module: str,
    tokens: Mapping[str, LazyTensor],
    run: Run,
    options: ReadOptions,
) -> tuple[int, Callable[[], Update]]:
    """vocab, and the rows of the embedding `module [vocab, dim]` that `trainable_token_indices`
    names: those of `tokens`, or of the one that it is tied to and stored with.

    vocab is that of the weight in the adapter, its own or the one that it is tied to, where the
    embedding was resized, or the base's.
    """
    tensor, weight = tokens[module], run.replaced.get(f"{module}.weight")
    if weight is not None:
        vocab = weight.shape[0] if weight.shape else 0
    else:
        base = need_base(options, "trainable_token_indices", tensor.path)
        vocab = rows_in_memory(run, base, module)
        # A side of an embedding that was resized, which holds the new rows alone.
        old = base.tensors.get(input_embedding(base) or "")
        if old is not None and vocab == old.shape[0]:
            vocab += grown_by(base, new_embedding(base, run.replaced))
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        named = {
            name: rows
            for key, rows in indices.items()
            for name in tokens
            if f".{name}".endswith(f".{key}")
        }
        indices = named.get(module, next(iter(named.values())) if len(named) == 1 else None)
    fits = isinstance(indices, list) and all(type(i) is int and 0 <= i < vocab for i in indices)
    if not isinstance(indices, list) or not fits or len(tensor.shape) != 2:
        raise RunError(
            "trainable_token_indices does not say which rows were trained",
            file=tensor.path,
            tensor=tensor.name,
            found=str(indices)[:80],
            expected=f"row numbers below {vocab}",
        )
    if len(set(indices)) != tensor.shape[0] or len(indices) != tensor.shape[0]:
        raise RunError(
            "another number of rows was trained than trainable_token_indices names",
            file=tensor.path,
            tensor=tensor.name,
            found=list(tensor.shape),
            expected=f"{len(set(indices))} rows",
        )
    index = torch.tensor(indices)
    return vocab, lambda: ReplacedRows(index, load_finite(tensor), (vocab, tensor.shape[1]))
