"""What ms-swift notes beside an adapter, and no file that goes along with a merge holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from converters.model.base import open_base
from converters.targets.merged.plan import plan_merge
from dora_serve import read_run
from dora_serve.commands import dora_export
from tests.conftest import MODELS

BASE = MODELS / "tiny-llama-base"
RUN = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swift") / "adapter"
    CliRunner().invoke(dora_export, ["adapter", str(RUN), str(folder)])
    return folder


def told(adapter: Path, folder: Path, base: Path = BASE, **arguments: Any) -> str:
    """What a merge warns of, where these arguments lie beside the adapter."""
    run = shutil.copytree(adapter, folder)
    (run / "args.json").write_text(json.dumps({"tuner_type": "lora", **arguments}))
    return " ".join(plan_merge(read_run(run), open_base(base), None).warnings)


def test_a_rope_scaling_is_told(adapter: Path, tmp_path: Path) -> None:
    """The result computed otherwise than the run, in silence."""
    assert "rope_scaling (yarn)" in told(adapter, tmp_path / "other", rope_scaling=YARN)
    base = shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_parameters": YARN}))
    for name, said in ("same", YARN), ("none", None), ("plain", {"rope_type": "default"}):
        mine = base if said == YARN else BASE
        assert "rope_scaling" not in told(adapter, tmp_path / name, mine, rope_scaling=said)


def test_new_tokens_are_told(adapter: Path, tmp_path: Path) -> None:
    """Texts with them became other tokens, since no tokenizer lies beside the adapter."""
    said = told(adapter, tmp_path / "new", new_special_tokens=["<s>", "<tool>"])
    assert "new tokens (<tool>)" in said
    assert "new tokens" not in told(adapter, tmp_path / "known", new_special_tokens=["<s>"])
    with_own = shutil.copytree(adapter, tmp_path / "own")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, with_own)
    assert "new tokens" not in told(with_own, tmp_path / "saved", new_special_tokens=["<tool>"])


def test_arguments_of_others_are_no_matter(adapter: Path, tmp_path: Path) -> None:
    run = shutil.copytree(adapter, tmp_path / "run")
    assert not plan_merge(read_run(run), open_base(BASE), None).warnings  # without any
    for text in ("[1]", "{", json.dumps({"rope_scaling": YARN}), '{"tuner_type": 1, "a": "b"}'):
        (run / "args.json").write_text(text)
        assert not plan_merge(read_run(run), open_base(BASE), None).warnings
