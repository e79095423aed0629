"""PEFT's variants of LoRA in engines that know LoRA alone: each is refused by its name.

That PEFT computes them is in `test_lint_truth.py`. vLLM 0.32 refuses the tensors of the first
three as unsupported, and block-diagonal LoRA by its configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, get_peft_model

from converters.errors import RunError
from converters.lint import lint
from converters.model.base import open_base
from dora_serve import ReadOptions, read_run
from tests.conftest import randomize, tiny_llama
from tests.converters.lint_cases import BLOCKS

# Field of the configuration → its value, and whether the run can be written as plain LoRA.
VARIANTS: dict[str, tuple[Any, bool]] = {
    "velora_config": (peft.VeloraConfig(), True),
    "monteclora_config": (peft.MontecloraConfig(), True),
    "kasa_config": (peft.KasaConfig(), False),
    "use_bdlora": (BLOCKS, False),
}


@pytest.mark.parametrize("key", VARIANTS)
def test_a_variant_is_refused_by_its_name(llama_base: Path, tmp_path: Path, key: str) -> None:
    value, plain = VARIANTS[key]
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **{key: value})
    model = get_peft_model(tiny_llama(), config)
    randomize(model)
    model.save_pretrained(tmp_path / "lora")
    for engine in ("vllm", "sglang", "lorax", "gguf"):
        found = lint(tmp_path / "lora", open_base(llama_base), [engine])
        errors = [finding for finding in found if finding.severity == "error"]
        assert {finding.check for finding in errors} == {key}
        assert ("plain LoRA" in errors[0].fix) == plain
    # What the finding proposes is what the reader can do.
    options = ReadOptions(base=llama_base)
    if plain:
        assert read_run(tmp_path / "lora", options).updates
    else:
        with pytest.raises(RunError, match=key):
            read_run(tmp_path / "lora", options)
