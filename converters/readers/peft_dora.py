"""Weight-decomposed DoRA as PEFT saves it: a LoRA adapter with `use_dora`, and a magnitude beside
each lora_A and lora_B (huggingface/peft, `src/peft/tuners/lora/dora.py`).

Read here: linear layers, Conv1D, convolutions, and embeddings, whose norm is over the vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import RunError
from ..files.tensors import LazyTensor, LazyTensors, load_finite, numel
from ..options import ReadOptions
from ..run import LazyUpdates, Run
from ..updates.magnitude import MagnitudeUpdate
from ..updates.update import Update, transposed
from .peft_lora import PeftLoraReader
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder

_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")


class PeftDoraReader:
    """Reads an adapter folder."""

    name = "peft_dora"
    looks_for = f'{CONFIG_FILE} with "use_dora": true, and {" or ".join(WEIGHT_FILES)}'

    def detect(self, folder: RunFolder) -> RunFolder | None:
        config = folder.adapter_config
        if config.get("peft_type") != "LORA" or config.get("use_mora"):
            return None
        return folder if config.get("use_dora") or _magnitudes(folder) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        magnitudes = _magnitudes(folder)
        if not folder.adapter_config.get("use_dora"):
            raise RunError(
                "the adapter has magnitudes of DoRA, and its configuration says that it is none: "
                "PEFT leaves them out",
                file=folder.path / CONFIG_FILE,
                found="use_dora: false",
                expected=f"use_dora: true, or no {next(iter(magnitudes))}.lora_magnitude_vector",
                remedy="set use_dora to true where it was trained so",
            )
        run, tensors = PeftLoraReader().read(folder, options), folder.adapter
        file = run.files[0]
        plain = [module for module in run.start_rank if module not in magnitudes]
        if plain:
            raise RunError(
                "use_dora is set, but a module of the adapter has no magnitude",
                file=file,
                tensor=f"{plain[0]}.lora_magnitude_vector",
                found=f"none in {len(plain)} of {len(run.start_rank)} modules",
                expected="a lora_magnitude_vector beside each lora_A",
                remedy="a conversion dropped it: use the adapter as it was trained",
            )
        loaders = {module: partial(run.take, module) for module in run.updates}
        for module, magnitude in magnitudes.items():
            _check(module, magnitude, tensors, file)
            loaders[module] = partial(_update, run, module, magnitude)
        return replace(run, method=self.name, updates=LazyUpdates(loaders, run.shapes))


def _magnitudes(folder: RunFolder) -> LazyTensors:
    """Module → its magnitude."""
    tensors = {} if folder.adapter_file is None else folder.adapter
    return {m[1]: t for name, t in tensors.items() if (m := _MAGNITUDE.fullmatch(name))}


def _check(module: str, magnitude: LazyTensor, tensors: LazyTensors, file: Path) -> None:
    factor = tensors.get(f"{module}.lora_B.weight", tensors.get(f"{module}.lora_embedding_B"))
    if factor is None:
        raise RunError(
            "a magnitude without lora_A and lora_B",
            file=file,
            tensor=magnitude.name,
            expected=f"{module}.lora_A.weight and {module}.lora_B.weight",
        )
    if numel(magnitude) != factor.shape[0]:
        raise RunError(
            "the magnitude does not fit lora_B",
            file=file,
            tensor=magnitude.name,
            found=list(magnitude.shape),
            expected=f"[{factor.shape[0]}] beside {factor.name} {list(factor.shape)}",
        )


def _update(run: Run, module: str, magnitude: LazyTensor) -> Update:
    delta = run.take(module).components()
    assert delta is not None
    if module in run.embeddings:  # stored as [vocab, dim]: `in` is the first axis
        return transposed(MagnitudeUpdate(load_finite(magnitude), delta.transposed()))
    return MagnitudeUpdate(load_finite(magnitude).flatten(), delta)
