"""Runs against a base: what was changed, and whether it is theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from converters.errors import BaseError, TargetError
from converters.model.base import BaseModel, open_base
from converters.model.match import changed, check_frozen
from tests.converters.made import lazy, low_rank, make_run

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def make_base(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> BaseModel:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / WEIGHTS, {"format": "pt"})
    return open_base(folder)


def test_replaced_tensors_that_changed(tmp_path: Path) -> None:
    data = torch.randn(4, 2)
    base = make_base(
        tmp_path / "base", {"model.embed_tokens.weight": data, "model.n": torch.ones(2)}
    )
    whole = lazy(
        tmp_path / "run",
        {"n": torch.ones(2), "lm_head.weight": data.clone(), "new": torch.ones(2)},
    )
    run = make_run(tmp_path / "run", {}, replaced=whole)
    assert list(changed(run, base)) == ["new"]
    assert changed(run, None) == whole
    other = lazy(tmp_path / "run2", {"n": torch.zeros(2), "lm_head.weight": data + 1})
    run = make_run(tmp_path / "run2", {}, replaced=other)
    assert changed(run, base) == other
    assert list(changed(run, base, {"n": None, "lm_head.weight": None}.get)) == list(other)
    axes = make_run(
        tmp_path / "run3", {}, replaced=lazy(tmp_path / "run3", {"n": torch.ones(1, 2)})
    )
    with pytest.raises(BaseError, match="number of axes") as caught:
        changed(axes, base)
    assert (caught.value.tensor, caught.value.found) == ("n", [1, 2])


def test_without_a_base_a_checkpoint_must_tell_what_was_trained(tmp_path: Path) -> None:
    whole = lazy(tmp_path / "run", {"a.weight": torch.ones(2, 2), "b.bias": torch.ones(2)})
    updates = {"q": low_rank(2, 2)}
    frozen = lazy(tmp_path / "run2", {"q.weight": torch.ones(2, 2), "q.bias": torch.ones(2)})
    run = make_run(tmp_path / "run", updates, replaced=whole, embedded_base={**whole, **frozen})
    with pytest.raises(TargetError, match="does not tell"):
        changed(run, None)
    more = lazy(tmp_path / "run3", {"k.weight": torch.ones(2, 2)})
    told = make_run(
        tmp_path / "run", updates, replaced=whole, embedded_base={**whole, **frozen, **more}
    )
    assert changed(told, None) == whole


def test_frozen_weights(tmp_path: Path) -> None:
    tensors = {"model.a": torch.randn(3), "model.b": torch.randn(3)}
    base = make_base(tmp_path / "base", tensors)
    for number, (frozen, error) in enumerate(
        [
            ({"a": tensors["model.a"], "b": tensors["model.b"]}, None),
            ({"a": tensors["model.a"].half(), "unknown": torch.ones(1)}, None),
            ({"a": tensors["model.a"], "b": tensors["model.b"] + 1}, "model.b"),
            ({"a": torch.ones(4)}, "model.a"),
        ]
    ):
        folder = tmp_path / f"run{number}"
        run = make_run(folder, {}, embedded_base=lazy(folder, frozen))
        if error is None:
            check_frozen(run, base)
            continue
        with pytest.raises(BaseError) as caught:
            check_frozen(run, base)
        assert caught.value.tensor == error
        trained = make_run(folder, {}, embedded_base=run.embedded_base, replaced=run.embedded_base)
        check_frozen(trained, base)
    check_frozen(make_run(tmp_path / "run", {}), base)
