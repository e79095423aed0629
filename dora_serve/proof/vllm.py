"""What vLLM computes with an artifact, and how the live model is asked the same.

Of a causal model: the log-probabilities of the likeliest tokens after every prompt token, and the
tokens that follow the prompt greedily. Of a classifier: its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from converters.errors import TargetError
from converters.files.tensors import read_json
from converters.model.base import BaseModel
from converters.run import Run
from converters.targets.lora_folder import CONFIG as ADAPTER_CONFIG
from converters.targets.lora_folder import WEIGHTS as ADAPTER_WEIGHTS
from converters.targets.model import Inputs, Model, Reading, equal_choices
from converters.targets.opening import NARROW, allowed

from ..vllm.engine import Answer, Vllm, precision
from ..vllm.fleet import step_for

TOKENS = 32
# Where vLLM computes in 16 bits: the least share of equal greedy tokens, since some choices are
# nearer to each other than 16 bits tell apart.
TOP1 = 0.9
ROUNDED = 0.2  # of an update's own effect, where activations are rounded to 8 bits too
_CLASSIFIER = "sequence-classification"


def open_folder(folder: Path, base: BaseModel, run: Run) -> Model:
    """`folder`, a model or an adapter of `base`, in vLLM.

    Raises `TargetError` for a task that is not compared there.
    """
    from transformers import AutoConfig

    task = run.task or "causal-lm"
    if task not in ("causal-lm", _CLASSIFIER):
        raise TargetError(
            "verify does not know what to ask of vLLM for this task",
            file=folder,
            found=task,
            expected=f"causal-lm or {_CLASSIFIER}",
        )
    longest = getattr(AutoConfig.from_pretrained(base.path), "max_position_embeddings", 1 << 20)
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else None
    labels = run.num_labels or 0 if task == _CLASSIFIER else 0
    lora = None if adapter is None else _lora_settings(adapter, labels)
    dtype = "float32" if adapter is None else precision(base)

    def read(batches: Sequence[Inputs]) -> Reading:
        rows = [row for inputs in batches for row in _rows(inputs)]
        lengths = [len(row) for row in rows]
        length = max(min(max(lengths) + TOKENS, longest), max(lengths) + 1)
        engine = Vllm(base.path if adapter else folder, length, lora, labels, dtype)
        try:
            if task == _CLASSIFIER:
                return _classified(torch.tensor(engine.classify(rows, adapter)), rows)
            return _completed(engine.complete(rows, length - max(lengths), adapter), rows)
        finally:
            engine.close()

    files = [folder / ADAPTER_WEIGHTS] if adapter else sorted(folder.glob("*.safetensors"))
    bounds = allowed(files, merged=adapter is None)
    if dtype != "float32":
        share = ROUNDED if rounds_activations(base) else NARROW
        bounds |= {"dtype": dtype, "share": share, "top1": TOP1}
    return Model(read, **bounds)


def rounds_activations(base: BaseModel) -> bool:
    """Whether an engine that keeps to the base's quantization rounds activations to 8 bits."""
    said: Any = base.config.get("quantization_config") or {}
    groups = said.get("config_groups") or {}
    return said.get("quant_method") == "fp8" or any(
        group.get("input_activations") for group in groups.values()
    )


def _rows(inputs: Inputs) -> list[list[int]]:
    """The rows without what pads them on the right."""
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    return [row[:n].tolist() for row, n in zip(inputs["input_ids"], lengths, strict=True)]


def _lora_settings(adapter: Path, labels: int) -> dict[str, Any]:
    """What vLLM must reserve for this adapter alone, whose head has `labels` rows."""
    config: Any = read_json(adapter / ADAPTER_CONFIG)
    return {
        "max_lora_rank": step_for(max([config["r"], *(config.get("rank_pattern") or {}).values()])),
        "max_loras": 1,
        "max_lora_cls_labels": labels or None,
        "lora_target_modules": sorted({m.rsplit(".", 1)[-1] for m in config["target_modules"]}),
    }


def _completed(answers: list[Answer], rows: list[list[int]]) -> Reading:
    values = torch.tensor([p for each in answers for at in each.logprobs for p in at.values()])

    def measure(model: Any) -> list[torch.Tensor]:
        found = []
        for row, answer in zip(rows, answers, strict=True):
            logits = _logits(model, row)
            for at, known in zip(logits.log_softmax(-1), answer.logprobs, strict=True):
                found.append(at[list(known)])
        return [torch.cat(found)]

    def top1(model: Any, _values: Sequence[torch.Tensor]) -> Callable[[float], float]:
        chosen, likely = [], []
        for row, answer in zip(rows, answers, strict=True):
            if answer.tokens:
                logits = _logits(model, [*row, *answer.tokens[:-1]])[len(row) - 1 :]
                chosen.append(
                    torch.nn.functional.one_hot(torch.tensor(answer.tokens), logits.shape[-1])
                )
                likely.append(logits)
        return lambda within: equal_choices(chosen, likely, within) if chosen else 1.0

    return Reading([values], measure, top1)


def _logits(model: Any, row: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([row])).logits[0].float()
    return logits


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The `count` likeliest tokens after `prompt`, each after the one before it."""
    ids, cache, tokens = torch.tensor([prompt]), None, []
    with torch.inference_mode():
        for _ in range(count):
            output = model(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
    return tokens


def _classified(values: torch.Tensor, rows: list[list[int]]) -> Reading:
    def measure(model: Any) -> list[torch.Tensor]:
        with torch.inference_mode():
            found = [model(input_ids=torch.tensor([row])).logits.float() for row in rows]
        return [torch.cat(found)]

    def top1(_model: Any, truth: Sequence[torch.Tensor]) -> Callable[[float], float]:
        return partial(equal_choices, [values], truth)

    return Reading([values], measure, top1)
