"""LoRA and DoRA of torchtune (pytorch/torchtune, `torchtune/modules/peft/`), from the file of its
own names: `adapter_model.pt`, in older versions `adapter_<epoch>.pt`.

ΔW = (lora_alpha / rank)·lora_b·lora_a, and with `magnitude` weight-decomposed DoRA. Where its
rotary embedding takes neighbours, the rows of q_proj and k_proj lie in another order than in
transformers (`torchtune/models/convert_weights.py`); Qwen's do not. The adapter for PEFT that
torchtune writes beside this file has Qwen's rows out of order, and a DoRA's magnitudes too, so that
this file is read in its place. Its DoRA gives the whole output of a layer its length, and so a bias
(of Qwen 2) the same factors; the model that torchtune itself merges has the bias as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ..errors import RunError
from ..files.json_files import is_number
from ..files.tensors import load_finite
from ..model.base import BaseModel
from ..options import ReadOptions
from ..run import LazyUpdates, Run
from ..updates.magnitude import MagnitudeUpdate
from ..updates.peft_layer import MergedBias
from ..updates.rank_one import RankOneSum
from ..updates.update import Update
from .fused import MOST, count, for_rows
from .module import AdaptedModule, grouped
from .peft_common import need_base
from .run_folder import CONFIG_FILE, RunFolder

_NAMES = ("lora_a.weight", "lora_b.weight")
_PART = re.compile(r"(.+)\.(?:lora_(a|b)\.weight|(magnitude))")
_PARTS = {"a": "A", "b": "B"}
_MODULE = re.compile(r"layers\.(\d+)\.(attn\.\w+|mlp\.w[123])")
_LAYERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_HEADS = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
_REORDERED, _AS_THEY_ARE = ("llama", "mistral", "gemma", "gemma2"), ("qwen2", "qwen3", "phi3")
_WITH_BIAS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Phi-3 stores these as one, in this order.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


class TorchtuneReader:
    """Reads the folder of an epoch; needs the configuration of the base, which torchtune copies
    there."""

    name = "torchtune"
    over = ("peft_lora", "peft_dora")
    looks_for = "adapter_model.pt or adapter_<epoch>.pt, whose tensors end in .lora_a.weight"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        names = (name for file in _files(folder) for name in folder.tensors(file))
        return folder if any(name.endswith(_NAMES) for name in names) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        file = folder.only(_files(folder), "adapters of several epochs")
        modules, rest = grouped(folder.tensors(file), _PART, _PARTS)
        if rest:
            raise RunError(
                "a tensor that is no part of an adapter", file=file, tensor=next(iter(rest))
            )
        said = folder.adapter_config
        alpha = said.get("lora_alpha") if options.lora_alpha is None else options.lora_alpha
        if not is_number(alpha):
            raise RunError(
                "the run's lora_alpha is not known",
                file=file,
                expected=f"a number as lora_alpha, in {CONFIG_FILE} beside it",
                remedy="pass `lora_alpha`",
            )
        if folder.has("config.json") and options.base is None:
            config = folder.json("config.json")
        else:
            config = need_base(options, "an adapter of torchtune", file).config
        family = _Family(config, file)
        named = {family.name(name): module for name, module in modules.items()}
        ranks = {name: module.pair(_NAMES) for name, module in named.items()}
        loaders = {
            name: partial(family.update, name, module, alpha / max(1, ranks[name]))
            for name, module in named.items()
        }
        updates, start, shapes = family.fused(named, loaders, ranks)
        biases = family.biased(named)
        base_model = need_base(options, "a bias beside DoRA's magnitudes", file) if biases else None
        replaced = {
            f"{name}.bias": _scaled_bias(base_model, name, loaders[name], file)
            for name in biases
            if base_model is not None
        }
        base = said.get("base_model_name_or_path")
        files = (file, *(folder.path / n for n in (CONFIG_FILE, "config.json") if folder.has(n)))
        return Run(
            path=folder.path,
            method=self.name,
            updates=LazyUpdates(updates, shapes),
            replaced=replaced,
            base=str(base) if base else None,
            task="causal-lm",
            start_rank=start,
            files=files,
            options={"lora_alpha": alpha},
        )


def _files(folder: RunFolder) -> list[Path]:
    own = folder.path / "adapter_model.pt"
    if own.is_file():
        return [own]
    return sorted(folder.path.glob("adapter_[0-9]*.pt"))


class _Family:
    """The names and the order of rows of a base, by its configuration."""

    def __init__(self, config: Mapping[str, object], file: Path) -> None:
        self._config, self._file = config, file
        self._kind = str(config.get("model_type"))
        if self._kind not in (*_REORDERED, *_AS_THEY_ARE):
            raise RunError(
                "a family whose names in torchtune are not known here",
                file=file,
                found=f"model_type: {self._kind}",
                expected=", ".join((*_REORDERED, *_AS_THEY_ARE)),
                remedy="where torchtune saved the merged model too: `extract`",
            )

    def name(self, module: str) -> str:
        """The name in transformers."""
        match = _MODULE.fullmatch(module)
        layer = _LAYERS.get(match[2]) if match else None
        if match and layer:
            return f"model.layers.{match[1]}.{layer}"
        if module != "output":
            raise RunError(
                "a module whose name in transformers is not known",
                file=self._file,
                tensor=module,
                remedy="where torchtune saved the merged model too: `extract`",
            )
        return "lm_head"

    def update(self, name: str, module: AdaptedModule, scale: float) -> Update:
        pair = module.sum(scale)
        rows = self._order(name, pair.shape[0])
        delta = RankOneSum(pair.a, pair.c, pair.b[rows])
        if "magnitude" not in module.parts:
            return delta
        return MagnitudeUpdate(module.load("magnitude").flatten()[rows], delta)

    def biased(self, modules: Mapping[str, AdaptedModule]) -> list[str]:
        """The modules with a magnitude whose layers have a bias in torchtune."""
        if self._kind != "qwen2" and not self._config.get("attention_bias"):
            return []
        return [
            name
            for name, module in modules.items()
            if "magnitude" in module.parts and name.endswith(_WITH_BIAS)
        ]

    def fused(
        self,
        modules: Mapping[str, AdaptedModule],
        loaders: Mapping[str, Callable[[], Update]],
        ranks: Mapping[str, int],
    ) -> tuple[dict[str, Callable[[], Update]], dict[str, int], dict[str, tuple[int, int]]]:
        """The updates, ranks and shapes of the weights as the family stores them."""
        shapes = {name: module.shape for name, module in modules.items()}
        for name, module in modules.items():
            if "magnitude" in module.parts:
                module.check_size("magnitude", module.shape[0])
                if self._kind == "phi3" and any(name.endswith(p) for p in _FUSED.values()):
                    raise module.error("DoRA on a part of a fused weight is not read", "magnitude")
        if self._kind != "phi3":
            return dict(loaders), dict(ranks), shapes
        whole = {part: weight for weight, parts in _FUSED.items() for part in parts}
        updates: dict[str, Callable[[], Update]] = {}
        start: dict[str, int] = {}
        for name, load in loaders.items():
            layer = ".".join(name.split(".")[-2:])
            if layer not in whole:
                updates[name], start[name] = load, ranks[name]
                continue
            block, weight = name.removesuffix(layer), whole[layer]
            held = [block + part for part in _FUSED[weight] if block + part in loaders]
            sizes = [self._size(part) for part in _FUSED[weight]]
            if sum(sizes) > MOST:
                raise RunError("not the rows of a model", file=self._file, found=f"{sizes}")
            ends = torch.tensor(sizes).cumsum(0).tolist()
            rows = {
                block + part: torch.arange(end - size, end)
                for part, size, end in zip(_FUSED[weight], sizes, ends, strict=True)
            }
            for part in held:
                expected = (len(rows[part]), shapes[held[0]][1])
                if shapes[part] != expected:
                    raise modules[part].error(
                        "it has other rows than the base's configuration says, or is of another "
                        "width than the other parts of the weight",
                        "lora_b.weight",
                        found=list(shapes[part]),
                        expected=list(expected),
                    )
            shapes[block + weight] = ends[-1], shapes[held[0]][1]
            updates[block + weight] = partial(
                _stacked, ends[-1], {part: (rows[part], loaders[part]) for part in held}
            )
            start[block + weight] = sum(ranks[part] for part in held)
        return updates, start, {name: shapes[name] for name in updates}

    def _size(self, part: str) -> int:
        """The rows of one part of a fused weight."""
        if part.startswith("mlp."):
            return self._count("intermediate_size")
        return self._count(_HEADS.get(part, "num_key_value_heads")) * self._head_size

    def _count(self, key: str) -> int:
        return count(self._config, key, self._file)

    def _order(self, name: str, rows: int) -> torch.Tensor | slice:
        """For each row in transformers the row in torchtune."""
        key = _HEADS.get(".".join(name.split(".")[-2:]))
        if key is None or self._kind not in _REORDERED:
            return slice(None)
        heads, size = self._count(key), self._head_size
        if rows != heads * size or size % 2:
            raise RunError(
                "lora_b has other rows than the base's configuration says",
                file=self._file,
                tensor=name,
                found=rows,
                expected=f"{heads} heads of an even number: {size}",
                remedy="is this the base the run was trained on? pass it with `base`",
            )
        return torch.arange(rows).view(heads, size // 2, 2).transpose(1, 2).reshape(-1)

    @property
    def _head_size(self) -> int:
        if self._config.get("head_dim") is not None:
            return self._count("head_dim")
        return self._count("hidden_size") // self._count("num_attention_heads")


def _stacked(
    out: int, parts: Mapping[str, tuple[torch.Tensor, Callable[[], Update]]]
) -> RankOneSum:
    pairs = []
    for rows, load in parts.values():
        pair = load().components()
        assert pair is not None  # DoRA on a part was refused
        pairs.append((rows, pair))
    return for_rows(out, pairs)


def _scaled_bias(
    base: BaseModel, module: str, load: Callable[[], Update], file: Path
) -> MergedBias:
    """The bias of a layer whose whole output has the length that the magnitude gives it."""
    names = [base.find(f"{module}.{kind}") for kind in ("weight", "bias")]
    found = [base.tensors[name] for name in names if name is not None]
    if len(found) < 2:
        raise RunError(
            "the base has no bias of this layer, as torchtune has",
            file=file,
            tensor=f"{module}.bias",
            remedy="is this the base the run was trained on? pass it with `base`",
        )
    weight, bias = found

    def calculate() -> torch.Tensor:
        update = load()
        assert isinstance(update, MagnitudeUpdate)
        rows = update.delta.merge(load_finite(weight), 0)
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        scaled: torch.Tensor = load_finite(bias) * (update.magnitude / norm)
        return scaled.float()

    return MergedBias(bias.name, file, bias.shape, calculate)
