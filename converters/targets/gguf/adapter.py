"""A LoRA adapter as a GGUF file, which llama.cpp loads with `--lora`.

llama.cpp multiplies B·A by alpha/r with one alpha for all and the rank r of each tensor
(`src/llama-adapter.h`, `get_scale`): alpha is the largest rank here, and r/alpha is folded into
the factors. The rows of B follow what `convert_hf_to_gguf.py` does to the base weights: renamed,
and in the Llama family permuted for q and k. Written for the architectures of `_FAMILIES`, whose
conversion of adapted weights is known to do no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import BaseError, OutputError, TargetError
from ...model.base import HEAD, BaseModel
from ...model.tying import tied
from ...run import Run
from ...updates.rank_one import RankOneSum, stored_error
from ..lora_folder.adapter import AdapterPlan
from ..lora_folder.card import model_card

if TYPE_CHECKING:
    import gguf

ALPHA = "adapter.lora.alpha"

# The class on the Hugging Face side → llama.cpp's architecture, and whether its conversion permutes
# the rows of q and k (`LlamaModel.permute`); from llama.cpp's `conversion/*.py`.
_FAMILIES = {
    "GPT2LMHeadModel": ("gpt2", False),
    "Gemma2ForCausalLM": ("gemma2", False),
    "Gemma3ForCausalLM": ("gemma3", False),
    "GemmaForCausalLM": ("gemma", False),
    "GraniteForCausalLM": ("granite", True),
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Olmo2ForCausalLM": ("olmo2", False),
    "Phi3ForCausalLM": ("phi3", False),
    "PhiForCausalLM": ("phi2", False),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "SmolLM3ForCausalLM": ("smollm3", True),
    "Starcoder2ForCausalLM": ("starcoder2", False),
}
_USAGE = """```
llama-cli -m base.gguf --lora {name}.gguf
```"""


@dataclass(frozen=True, kw_only=True)
class GgufPlan(AdapterPlan):
    """`names`: module → tensor of the base. `heads`: module → heads whose rows are permuted."""

    architecture: str
    names: Mapping[str, str]
    heads: Mapping[str, int]

    def save(self, folder: Path, name: str) -> dict[str, float]:
        gguf = _gguf()
        alpha = float(max(rank for rank, _, _ in self.stored.values()))
        writer = gguf.GGUFWriter(folder / f"{name}.gguf", self.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32(ALPHA, alpha)
        errors: dict[str, float] = {}
        for module, (rank, out, inn) in self.stored.items():
            if not rank:
                continue
            a, b = (
                torch.zeros(rank, inn, dtype=self.dtype),
                torch.zeros(out, rank, dtype=self.dtype),
            )
            update = self.components(module)
            if update is not None:
                a, b = (factor.to(self.dtype) for factor in _folded(update, alpha).balanced())
                errors[module] = stored_error(update, a, b.double() * (alpha / rank))
            if module in self.heads:
                b = permute(b, self.heads[module])
            if module in self.run.embeddings:  # llama.cpp looks rows of lora_a up by token
                a, b = b, a.T
            for factor, tensor in (("lora_a", a), ("lora_b", b)):
                _add(writer, f"{self.names[module]}.{factor}", tensor)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        except OSError as error:
            if error.errno is not None:
                raise
            raise OutputError(  # numpy's, of a full disk
                str(error), file=folder, remedy="look after the disk and run again"
            ) from None
        card = model_card(self, library="gguf", usage=_USAGE.format(name=name))
        (folder / "README.md").write_text(card)
        return errors


def plan_gguf(plan: AdapterPlan) -> GgufPlan:
    """The plan of the same adapter as a GGUF file; raises `DoraExportError` for what llama.cpp has
    no place for."""
    gguf = _gguf()
    run, base = plan.run, plan.base
    if base is None:
        raise TargetError(
            "a GGUF adapter names its base's architecture, which is not known",
            file=run.path,
            remedy="pass the base model with `base`",
        )
    architecture, permuted = _family(base)
    layers = _count(base, "n_layer", "num_hidden_layers")
    if layers > len(base.tensors):  # a table is made of them
        raise BaseError(
            "the base's configuration has more layers than the base has tensors",
            file=base.path / "config.json",
            found=layers,
            expected=f"at most {len(base.tensors)}",
        )
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(known, layers)
    names = {}
    heads = {}
    for module in plan.stored:
        name = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise TargetError(
                f"llama.cpp's {architecture} has no tensor for this module",
                file=run.path,
                tensor=module,
                remedy="deploy the merged model (`merge`)",
            )
        names[module] = name
        if permuted and module.endswith((".q_proj", ".k_proj")):
            heads[module] = _heads(base, module, plan.stored[module][1])
    _check_tied(run, base, names)
    return GgufPlan(**vars(plan), architecture=architecture, names=names, heads=heads)


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows `[heads·dim, n]` from halves of the rotary pairs to pairs side by side, per head.

    What `LlamaModel.permute` does to q and k weights.
    """
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return split.transpose(1, 2).reshape(rows.shape)


def _folded(update: RankOneSum, alpha: float) -> RankOneSum:
    return replace(update, c=(update.c.double() * (update.rank / alpha)).float())


def _family(base: BaseModel) -> tuple[str, bool]:
    architectures = base.config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"
    if name not in _FAMILIES:
        raise TargetError(
            "GGUF adapters are not written for this architecture, whose conversion may change "
            "more than names",
            file=base.path / "config.json",
            found=name,
            expected=", ".join(_FAMILIES),
            remedy="deploy the merged model (`merge`), converted by llama.cpp",
        )
    return _FAMILIES[name]


def _heads(base: BaseModel, module: str, rows: int) -> int:
    names = ("num_key_value_heads", "num_attention_heads")
    heads = _count(base, *(names if module.endswith(".k_proj") else names[1:]))
    if heads < 1 or rows % (2 * heads):
        raise BaseError(
            "the rows of this module cannot be split among the heads",
            file=base.path / "config.json",
            tensor=module,
            found=f"{heads} heads",
            expected=f"a number of which {rows} rows are an even multiple",
        )
    return heads


def _count(base: BaseModel, *names: str) -> int:
    """The first of these numbers that the base's configuration has."""
    value = next((base.config[name] for name in names if base.config.get(name)), None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BaseError(
            f"the base's configuration has no {names[-1]}",
            file=base.path / "config.json",
            found=value,
        )
    return value


def _check_tied(run: Run, base: BaseModel, names: dict[str, str]) -> None:
    """llama.cpp has one tensor for a tied pair and applies what is said of it to both sides."""
    for module, name in names.items():
        if name in ("output.weight", "token_embd.weight") and HEAD in tied(base.config):
            raise TargetError(
                "llama.cpp cannot adapt the embedding or the head alone where they are tied",
                file=run.path,
                tensor=module,
                remedy="deploy the merged model (`merge`)",
            )


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    gguf = _gguf()
    if tensor.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.contiguous().numpy())


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise TargetError(
            "the package gguf is not installed", remedy="pip install 'dora-serve[gguf]'"
        ) from None
    return gguf
