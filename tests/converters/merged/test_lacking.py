"""A base that is not whole: what transformers begins anew, and then tells nobody of."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converters.errors import BaseError
from dora_serve.api import merge
from tests.converters.made import WEIGHTS
from tests.converters.quantized import adapter, plain_base


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return adapter(plain_base(tmp_path / "base", tie_word_embeddings=False), tmp_path / "run")


def test_a_whole_base_is_told_nothing_of(run: Path, tmp_path: Path) -> None:
    assert merge(run, tmp_path / "out", base=tmp_path / "base").warnings == ()


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.gate_proj.weight"])
def test_a_weight_that_is_nowhere(lost: str, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "base" / WEIGHTS
    save_file({n: t for n, t in load_file(file).items() if n != lost}, file, {"format": "pt"})
    (warning,) = merge(run, tmp_path / "out", base=tmp_path / "base").warnings
    assert warning.endswith(f"at random, at every load: {lost}")


def test_a_tied_head_is_not_missed(tmp_path: Path) -> None:
    run = adapter(plain_base(tmp_path / "base", tie_word_embeddings=True), tmp_path / "run")
    assert "lm_head.weight" not in load_file(tmp_path / "base" / WEIGHTS)
    assert merge(run, tmp_path / "out", base=tmp_path / "base").warnings == ()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_the_prefix_of_a_wrapper(prefix: str, run: Path, tmp_path: Path) -> None:
    """transformers would begin the whole model at random."""
    file = tmp_path / "base" / WEIGHTS
    save_file({prefix + n: t for n, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(BaseError, match="prefix of a wrapper"):
        merge(run, tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
