"""Scales and ranks of any settings together are those of PEFT's own layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from converters.options import ReadOptions
from converters.readers.peft_common import Scaling

NAMES = [f"{number}.{layer}" for number in "01" for layer in ("q_proj", "xq_proj", "o_proj")]
# Suffixes, one with a part of a name, a regular expression, and what fits nothing.
KEYS = st.sampled_from(
    ["q_proj", "0.q_proj", "layers.1.q_proj", r"layers\.\d\.o_proj", ".*q_proj", "o_proj", "k_proj"]
)
PATTERNS = st.dictionaries(KEYS, st.integers(1, 9), max_size=3)


def model() -> nn.Module:
    layers = {
        number: nn.ModuleDict({name[2:]: nn.Linear(10, 10) for name in NAMES if name[0] == number})
        for number in "01"
    }
    return nn.ModuleDict({"layers": nn.ModuleDict(layers)})


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # of keys that fit nothing
@settings(deadline=None)
@given(
    rank=st.integers(1, 9),
    alpha=st.sampled_from([1, 3, 16, 0.5]),
    root=st.booleans(),
    ranks=PATTERNS,
    alphas=PATTERNS,
)
def test_any_settings_together(
    rank: int, alpha: float, root: bool, ranks: dict[str, int], alphas: dict[str, int]
) -> None:
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=root,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=r".*(q|xq|o)_proj",
    )
    peft = get_peft_model(model(), config)
    ours = Scaling(config.to_dict(), Path("adapter_config.json"), ReadOptions())
    found = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in peft.named_modules()
        if hasattr(layer, "scaling")
    }
    assert found.keys() == {f"layers.{name}" for name in NAMES}
    for name, (own, scale) in found.items():
        assert ours.rank(name) == own
        assert ours.of(name, own) == scale
    assume(alphas)  # else it is the same with the user's alpha
    said = Scaling(config.to_dict(), Path("adapter_config.json"), ReadOptions(lora_alpha=5.0))
    for name, (own, _) in found.items():
        assert said.of(name, own) == 5.0 / (own**0.5 if root else own)
