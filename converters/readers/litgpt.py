"""LoRA of litgpt (Lightning-AI/litgpt, `litgpt/lora.py`): `lit_model.pth.lora`, with
`hyperparameters.yaml` and `model_config.yaml` beside it.

ΔW = (lora_alpha / lora_r)·lora_B·lora_A. Queries, keys and values are one layer `qkv`, whose
`lora_A [k·r, in]` and `lora_B [rows of those k, r]` hold a pair for each of the k that were
trained. What is read under which name of transformers is as `litgpt/scripts/convert_lit_checkpoint`
says; GPT-NeoX and Falcon store the rows of qkv head by head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..errors import RunError
from ..files.json_files import is_number
from ..options import ReadOptions
from ..run import LazyUpdates, Run
from ..updates.rank_one import RankOneSum
from .fused import MOST, count, for_rows
from .module import AdaptedModule, grouped
from .run_folder import RunFolder

WEIGHTS, MODEL, TRAINING = "lit_model.pth.lora", "model_config.yaml", "hyperparameters.yaml"
_PART = re.compile(r"(.+)\.lora_(A|B)")
_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(fc_1|fc_2|proj)")
_NESTED = 1000  # brackets of a configuration
_LARGEST = 100_000
_EXPERT_LAYERS = ("fc_1", "fc_2", "proj")
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class _Family:
    """How transformers calls what litgpt calls `layers`. `qkv` is the one layer for queries, keys
    and values where there is one; `by_heads`: whose rows are queries, keys and values of one group
    after the other. `experts`: the block, and its layers as `fc_1`, `fc_2` and `proj`."""

    layers: Mapping[str, str]
    prefix: str = "model.layers"
    qkv: str | None = None
    by_heads: bool = False
    head: str = "lm_head"
    experts: tuple[str, tuple[str, str, str]] = ("", ("", "", ""))
    fused: Mapping[str, tuple[str, int]] = field(default_factory=dict)


_PROJECTION = {"attn.proj": "self_attn.o_proj"}
_GATED = {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
_LLAMA = _Family(
    {**_PROJECTION, **_GATED, "mlp.gate": "block_sparse_moe.gate"},
    experts=("block_sparse_moe", ("w1", "w3", "w2")),
)
_QWEN3 = _Family(
    {**_PROJECTION, **_GATED, "mlp.gate": "mlp.gate"},
    experts=("mlp", ("gate_proj", "up_proj", "down_proj")),
)
_PHI = _Family({"attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"})
_PHI3 = _Family(
    {**_PROJECTION, "mlp.proj": "mlp.down_proj"},
    qkv="self_attn.qkv_proj",
    fused={"mlp.fc_1": ("mlp.gate_up_proj", 0), "mlp.fc_2": ("mlp.gate_up_proj", 1)},
)
_DENSE = {"mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}
_FALCON = _Family(
    {"attn.proj": "self_attention.dense", **_DENSE},
    "transformer.h",
    "self_attention.query_key_value",
    by_heads=True,
)
_NEOX = _Family(
    {"attn.proj": "attention.dense", **_DENSE},
    "gpt_neox.layers",
    "attention.query_key_value",
    by_heads=True,
    head="embed_out",
)


# A module of transformers, and of what it has: the rank, `[out, in]` of its weight, the update.
_Found = tuple[str, int, tuple[int, int], Callable[[], RankOneSum]]


class LitgptReader:
    """Reads the folder of a finished or intermediate step."""

    name = "litgpt"
    looks_for = f"{WEIGHTS}, {MODEL} and {TRAINING}"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        return folder if folder.has(WEIGHTS) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        file, path = folder.path / WEIGHTS, folder.path / TRAINING
        model, training = (_yaml(folder.path / name) for name in (MODEL, TRAINING))
        modules, rest = grouped(folder.tensors(file), _PART)
        if rest:
            raise RunError("a tensor that is no part of LoRA", file=file, tensor=next(iter(rest)))
        said = training.get("lora_alpha")
        alpha = said if options.lora_alpha is None else options.lora_alpha
        rank = training.get("lora_r")
        if not is_number(alpha) or type(rank) is not int or rank < 1:
            raise RunError(
                "the rank or alpha is not known",
                file=path,
                found=f"lora_r: {rank}, lora_alpha: {alpha}",
                remedy="write them there, as they were in training",
            )
        names = _Names(model, training, file, rank, alpha / rank)
        updates: dict[str, Callable[[], RankOneSum]] = {}
        start: dict[str, int] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name, module in modules.items():
            for own, stored, shape, load in names.updates(name, module):
                if shapes.setdefault(own, shape) != shape:
                    raise module.error(
                        "parts of one weight do not fit each other",
                        "lora_B",
                        found=list(shape),
                        expected=list(shapes[own]),
                    )
                before = updates.get(own)
                updates[own] = load if before is None else partial(_both, before, load)
                start[own] = start.get(own, 0) + stored
        return Run(
            path=folder.path,
            method=self.name,
            updates=LazyUpdates(updates, shapes),
            base=_hub_id(model),
            task="causal-lm",
            start_rank=start,
            files=(file, folder.path / MODEL, path),
            options={"lora_alpha": alpha},
        )


class _Names:
    """What litgpt's modules update in transformers."""

    def __init__(
        self,
        model: Mapping[str, object],
        training: Mapping[str, object],
        file: Path,
        rank: int,
        scale: float,
    ) -> None:
        self._model, self._file, self._rank, self._scale = model, file, rank, scale
        self._family = _family(model)
        self._trained = [bool(training.get(f"lora_{part}")) for part in ("query", "key", "value")]

    def updates(self, name: str, module: AdaptedModule) -> list[_Found]:
        """What each module of transformers has of `module`."""
        family, scale = self._family, self._scale
        match = _LAYER.fullmatch(name)
        block, layer = (f"{family.prefix}.{match[1]}", match[2]) if match else ("", name)
        if layer == "attn.qkv" and match:
            return self._qkv(block, module)
        if module.pair() != self._rank:
            raise module.error(
                "the stored rank is another than lora_r",
                "lora_A",
                found=module.pair(),
                expected=self._rank,
            )
        own, expert = family.layers.get(layer), _EXPERT.fullmatch(layer)
        if layer in family.fused and match:
            weight, place = family.fused[layer]
            rows = module.shape[0]
            load = partial(self._at, 2 * rows, torch.arange(rows) + place * rows, module)
            return [(f"{block}.{weight}", self._rank, (2 * rows, module.shape[1]), load)]
        if expert and family.experts[0]:
            parent, layers = family.experts
            own = f"{parent}.experts.{expert[1]}.{layers[_EXPERT_LAYERS.index(expert[2])]}"
        if name == "lm_head":
            return [(family.head, self._rank, module.shape, partial(module.sum, scale))]
        if own is None or not match:
            raise RunError(
                "a module whose name in transformers is not known",
                file=self._file,
                tensor=name,
                found=f"{self._model.get('name')}, {self._model.get('mlp_class_name')}",
                remedy="merge and convert it with litgpt (merge_lora, convert_from_litgpt), then "
                "`extract`",
            )
        return [(f"{block}.{own}", self._rank, module.shape, partial(module.sum, scale))]

    def _at(self, out: int, rows: torch.Tensor, module: AdaptedModule) -> RankOneSum:
        return for_rows(out, [(rows, module.sum(self._scale))])

    def _qkv(self, block: str, module: AdaptedModule) -> list[_Found]:
        said = self._file.parent / MODEL
        heads, groups, size = (
            count(self._model, key, said) for key in ("n_head", "n_query_groups", "head_size")
        )
        sizes = [size * heads, size * groups, size * groups]
        of = [part for part, trained in enumerate(self._trained) if trained]
        if not of or sum(sizes) > MOST:
            raise module.error(
                "queries, keys and values are not of a model",
                "lora_A",
                found=f"{sizes} rows, of which {of} were trained",
            )
        needed = {"A": self._rank * len(of), "B": sum(sizes[part] for part in of)}
        for part in "AB":
            if part not in module.parts:
                raise module.incomplete(f"lora_{part}", "lora_A and lora_B")
            shape = module.parts[part].shape
            columns = shape[1] if part == "A" else self._rank
            if shape != (needed[part], columns):
                raise module.error(
                    "the pairs of queries, keys and values do not fit the configuration",
                    f"lora_{part}",
                    found=list(shape),
                    expected=[needed[part], columns],
                )
        pairs = {part: partial(self._part, module, sizes, of, part) for part in of}
        family, width = self._family, module.shape[1]
        if family.qkv is None:
            return [
                (f"{block}.self_attn.{_QKV[part]}", self._rank, (sizes[part], width), load)
                for part, load in pairs.items()
            ]
        order = torch.arange(sum(sizes))
        if family.by_heads:
            if heads % groups:
                raise RunError(
                    "n_head is no multiple of n_query_groups",
                    file=said,
                    found=f"{heads}, {groups}",
                )
            q, k, v = torch.split(order, sizes)
            grouped_rows = [part.view(groups, -1) for part in (q, k, v)]
            order = torch.cat(grouped_rows, 1).flatten().argsort()
        rows = torch.split(order, sizes)

        def load() -> RankOneSum:
            return for_rows(sum(sizes), [(rows[part], pair()) for part, pair in pairs.items()])

        return [(f"{block}.{family.qkv}", self._rank * len(of), (sum(sizes), width), load)]

    def _part(
        self, module: AdaptedModule, sizes: list[int], of: list[int], part: int
    ) -> RankOneSum:
        """The pair of queries, keys or values alone."""
        place, first = of.index(part), sum(sizes[p] for p in of if p < part)
        a = module.load("A")[place * self._rank : (place + 1) * self._rank]
        b = module.load("B")[first : first + sizes[part]]
        return RankOneSum(a, torch.full((self._rank,), self._scale), b)


def _family(model: Mapping[str, object]) -> _Family:
    """The family, as litgpt's own conversion finds it out."""
    name, mlp = str(model.get("name")), model.get("mlp_class_name")
    low = name.lower()
    if "falcon" in name:
        return _FALCON
    if low.startswith("phi"):
        return _PHI3 if low.startswith(("phi-3", "phi-4")) else _PHI
    if low.startswith("qwen3"):
        return _QWEN3
    gated = mlp in ("LLaMAMLP", "GemmaMLP", "LLaMAMoE")
    return _LLAMA if gated else _NEOX


def _both(one: Callable[[], RankOneSum], other: Callable[[], RankOneSum]) -> RankOneSum:
    first, second = one(), other()
    everything = torch.arange(first.shape[0])
    return for_rows(first.shape[0], [(everything, first), (everything, second)])


def _hub_id(model: Mapping[str, object]) -> str | None:
    said = model.get("hf_config")
    known = isinstance(said, dict) and said.get("org") and said.get("name")
    return f"{said['org']}/{said['name']}" if known and isinstance(said, dict) else None


def _yaml(path: Path) -> Mapping[str, object]:
    import yaml

    try:
        with path.open("rb") as stream:
            text = stream.read(_LARGEST)
        if text.count(b"{") + text.count(b"[") > _NESTED:
            raise ValueError  # which yaml reads in time by the square of their number
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError  # a few bytes that are as large as one likes, once they are written
        value = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RunError(
            f"a file of the run cannot be read: {type(error).__name__}",
            file=path,
            remedy="copy the whole folder that litgpt wrote",
        ) from None
    if not isinstance(value, dict):
        raise RunError("not a configuration of litgpt", file=path, found=type(value).__name__)
    return value
