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
        own = config.get("use_dora") and not config.get("use_mora")
        return folder if config.get("peft_type") == "LORA" and own else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        run, tensors = PeftLoraReader().read(folder, options), folder.adapter
        file = run.files[0]
        magnitudes = {m[1]: t for name, t in tensors.items() if (m := _MAGNITUDE.fullmatch(name))}
        if not magnitudes:
            raise RunError(
                "use_dora is set, but the adapter has no magnitudes",
                file=file,
                expected="a lora_magnitude_vector beside each lora_A",
                remedy="a conversion dropped them: use the adapter as it was trained",
            )
        loaders = {module: partial(run.take, module) for module in run.updates}
        for module, magnitude in magnitudes.items():
            _check(module, magnitude, tensors, file)
            loaders[module] = partial(_update, run, module, magnitude)
        plain = [module for module in run.updates if module not in magnitudes]
        warning = (
            f"{len(plain)} of {len(run.updates)} modules have no magnitude and are read as plain "
            f"LoRA: {', '.join(plain[:3])}"
        )
        return replace(
            run,
            method=self.name,
            updates=LazyUpdates(loaders, run.shapes),
            warnings=(*run.warnings, *([warning] if plain else [])),
        )


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
