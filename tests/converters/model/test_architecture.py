"""The class that a merged model is loaded in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from converters.errors import BaseError, DoraExportError, TargetError
from dora_serve import merge
from tests.converters.families import save_base
from tests.converters.made import lazy, low_rank, make_run

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def loaded(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(folder)
    return model, {key: tensor.clone() for key, tensor in model.state_dict().items()}


def test_a_classifier_of_a_language_model(tmp_path: Path) -> None:
    """The head that the run trained joins the body of the base, whose own head goes."""
    save_base("llama", tmp_path / "base", False)
    query = "model.layers.1.self_attn.q_proj"
    update, score = low_rank(32, 32), torch.randn(3, 32)
    run = make_run(
        tmp_path / "run",
        {query: update},
        replaced=lazy(tmp_path / "run", {"score.weight": score}),
        task="sequence-classification",
        num_labels=3,
    )
    merge(run, tmp_path / "out", base=tmp_path / "base")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 3
    found, own = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "base" / WEIGHTS)
    assert found.keys() == own.keys() - {"lm_head.weight"} | {"score.weight"}
    assert torch.equal(found["score.weight"], score)
    model, _ = loaded(tmp_path / "out")
    weight = model.get_submodule(query).weight
    assert torch.allclose(weight, own[f"{query}.weight"] + update.dense(), atol=1e-5)
    missing = make_run(
        tmp_path / "run2", {query: update}, task="sequence-classification", num_labels=3
    )
    with pytest.raises(BaseError, match="neither the base nor the run") as caught:
        merge(missing, tmp_path / "no", base=tmp_path / "base")
    assert caught.value.tensor == "score.weight"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"architectures": []}, TargetError, "no class"),
        ({"architectures": None}, TargetError, "no class"),
        ({"architectures": ["NothingForCausalLM"]}, TargetError, "no class"),
        ({"num_hidden_layers": 2001}, BaseError, "over 2000"),
        ({"num_hidden_layers": "two"}, BaseError, "cannot make"),
        ({"model_type": "nothing"}, BaseError, "cannot make"),
        ({"text_config": {"n_layer": 5000}}, BaseError, "n_layer is 5000"),
        ({"num_experts": 2001}, BaseError, "num_experts is 2001"),
    ],
    ids=str,
)
def test_configurations_of_no_classifier(
    tmp_path: Path, change: dict[str, object], error: type[DoraExportError], says: str
) -> None:
    save_base("llama", tmp_path / "base", False)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    run = make_run(
        tmp_path / "run",
        {"model.layers.1.self_attn.q_proj": low_rank(32, 32)},
        replaced=lazy(tmp_path / "run", {"score.weight": torch.randn(3, 32)}),
        task="sequence-classification",
        num_labels=3,
    )
    with pytest.raises(error, match=says):
        merge(run, tmp_path / "out", base=tmp_path / "base")


def test_labels_without_end(tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base", False)
    run = make_run(
        tmp_path / "run",
        {"model.layers.1.self_attn.q_proj": low_rank(32, 32)},
        task="sequence-classification",
        num_labels=1_000_001,
    )
    with pytest.raises(BaseError, match="num_labels is 1000001"):
        merge(run, tmp_path / "out", base=tmp_path / "base")
