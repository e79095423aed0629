"""Proves a run against the logits of its method's own live model, artifact by artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from converters.model.base import open_base
from converters.run import Run
from converters.targets.opening import load_base
from dora_serve import merge, write_adapter

BOUND = 1e-4
REPACK = 1e-6

Inputs = dict[str, torch.Tensor]


def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def expected(folder: Path) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    """Inputs, the live model's logits, and the logits without the update, of a stored run."""
    stored = load_file(folder / "expected.safetensors")
    inputs = {name: stored[name] for name in ("input_ids", "attention_mask")}
    return inputs, stored["logits"], stored["base_logits"]


def prove(
    run: Run,
    base: Path,
    inputs: Inputs,
    truth: torch.Tensor,
    control: torch.Tensor,
    out: Path,
    targets: tuple[str, ...] = ("peft", "vllm"),
) -> None:
    """Every artifact of `run` has the logits `truth`, and none has those without the update."""
    assert float((truth - control).abs().max()) > 1e-2
    merge(run, out / "merged", base=base)
    architecture = transformers.AutoConfig.from_pretrained(out / "merged").architectures[0]
    cls = getattr(transformers, architecture)
    merged, info = cls.from_pretrained(out / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _same(logits(merged, inputs), truth, control)
    for target in targets:
        result = write_adapter(run, out / target, base=base, target=target)
        assert max(result.report.errors.values()) <= REPACK
        model = PeftModel.from_pretrained(load_base(run, open_base(base)), str(out / target))
        _same(logits(model, inputs), truth, control)


def _same(found: torch.Tensor, truth: torch.Tensor, control: torch.Tensor) -> None:
    assert float((found - truth).abs().max()) <= BOUND
    assert torch.equal(found.argmax(-1), truth.argmax(-1))
    assert float((found - control).abs().max()) > BOUND


def change_bin(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Damage the weights of a run, whichever torch or safetensors file holds them."""
    from safetensors.torch import save_file

    for file in (*run.glob("*.bin"), *run.glob("*.safetensors")):
        binary = file.suffix == ".bin"
        state = torch.load(file, weights_only=True) if binary else load_file(file)
        change(state)
        if binary:
            torch.save(state, file)
        else:
            save_file(state, file, {"format": "pt"})
