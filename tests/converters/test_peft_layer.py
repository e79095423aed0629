"""One layer of PEFT's, merged by PEFT: the other way round, its bias, and what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear, LoraConfig
from transformers.pytorch_utils import Conv1D

from converters.errors import RunError
from converters.updates.peft_layer import LayerUpdate, MergedBias, merge_layer
from converters.updates.update import Update

OUT, IN = 5, 3


def layer(turned: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    inner = Conv1D(OUT, IN) if turned else torch.nn.Linear(IN, OUT)
    config = LoraConfig(init_lora_weights=False, fan_in_fan_out=turned, **options)
    return Linear(inner, "default", config, r=2)


@pytest.mark.parametrize("turned", [True, False])
def test_a_layer_that_holds_its_weight_either_way_round(turned: bool) -> None:
    module = layer(turned)
    a, b = (getattr(module, f"lora_{side}")["default"].weight.detach().double() for side in "AB")
    update: Update = LayerUpdate("q", module, (OUT, IN), turned, Path("x"))
    assert update.whole is True
    assert update.components() is None
    weight = torch.randn(OUT, IN)
    own = module.get_base_layer().weight.detach().clone()
    rows = weight.clone()
    assert update.merge(rows, 0) is rows
    expected = weight.double() + b @ a * module.scaling["default"]
    assert torch.allclose(rows.double(), expected, atol=1e-6)
    assert not torch.allclose(rows, weight)
    assert torch.equal(module.get_base_layer().weight, own)  # the layer itself stays
    assert not module.merged


@pytest.mark.parametrize("given", [True, False])
def test_a_bias_is_merged_too(given: bool) -> None:
    module = layer(False, lora_bias=True, bias="none")
    with torch.no_grad():
        module.lora_B["default"].bias.copy_(torch.arange(OUT))
    bias = torch.ones(OUT) if given else None
    _, found = merge_layer(module, torch.zeros(OUT, IN), bias, "q", Path("x"))
    assert found is not None
    expected = torch.arange(OUT) * module.scaling["default"] + (1 if given else 0)
    assert torch.equal(found, expected)


def test_a_layer_without_a_bias_has_none() -> None:
    inner = torch.nn.Linear(IN, OUT, bias=False)
    module = Linear(inner, "default", LoraConfig(init_lora_weights=False), r=2)
    weight, bias = merge_layer(module, torch.zeros(OUT, IN), None, "q", Path("x"))
    assert bias is None
    assert not weight.requires_grad and bool(weight.any())


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, ValueError])
def test_what_peft_cannot_merge_is_named(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer(False)

    def refuse(*_: object, **__: object) -> None:
        raise error("x" * 1000)

    monkeypatch.setattr(Linear, "merge", refuse)
    with pytest.raises(RunError, match="cannot merge") as caught:
        LayerUpdate("q", module, (OUT, IN), False, Path("file")).merge(torch.zeros(OUT, IN), 0)
    assert (caught.value.file, caught.value.tensor) == (Path("file"), "q")
    assert caught.value.found == f"{error.__name__}: {'x' * 600}"


def test_a_merged_bias_is_calculated_when_it_is_read() -> None:
    asked = []

    def calculate() -> torch.Tensor:
        asked.append(True)
        return torch.arange(6.0)

    bias = MergedBias("q.bias", Path("file"), (6,), calculate)
    assert (bias.dtype, asked) == (torch.float32, [])
    assert torch.equal(bias.load(), torch.arange(6.0))
    part = torch.zeros(3)
    bias.read_into(part, 2)
    assert part.tolist() == [2, 3, 4]
    assert len(asked) == 2
