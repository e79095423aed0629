"""The configuration of a merged model, and what no merge takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from converters.errors import BaseError, RunError
from dora_serve import merge
from tests.converters.made import (
    CONFIG,
    EMBED,
    HEAD,
    K,
    Q,
    config_of,
    lazy,
    low_rank,
    make_base,
    make_run,
)

# A class that transformers does not have, whose parts are told by the configuration alone.
OTHER = {"architectures": ["PartsForCausalLM"], "model_type": "parts"}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_names_the_dtype(tmp_path: Path, key: str) -> None:
    more = {"torch_dtype": "float32"} if key == "torch_dtype" else {}
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)}, **more)
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    merge(run, tmp_path / "out", base=base, dtype=torch.bfloat16)
    assert config_of(tmp_path / "out") == {**CONFIG, **more, key: "bfloat16"}
    merge(run, tmp_path / "same", base=base)
    assert config_of(tmp_path / "same") == {**CONFIG, **more}
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert said["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "same" / "dora_export.json").read_text())["dtype"] is None


def test_a_quantized_base_keeps_its_dtype(tmp_path: Path) -> None:
    base = make_base(
        tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)}, quantization_config={"bits": 8}
    )
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    with pytest.raises(BaseError, match="quantized"):
        merge(run, tmp_path / "out", base=base, dtype=torch.bfloat16)
    merge(run, tmp_path / "out", base=base)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_without_their_scales_take_no_update(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2).to(dtype)})
    with pytest.raises(BaseError, match="cannot take an update"):
        merge(make_run(tmp_path / "run", {Q: low_rank(2, 2)}), tmp_path / "out", base=base)


def test_two_modules_of_one_tensor(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2), Q.removeprefix("model."): low_rank(2, 2)})
    with pytest.raises(RunError, match="one module") as caught:
        merge(run, tmp_path / "out", base=base)
    assert caught.value.tensor == Q


def test_the_vocabulary_of_a_model_of_several_parts(tmp_path: Path) -> None:
    tensors = {EMBED: torch.randn(6, 4), HEAD: torch.randn(6, 4), f"{Q}.weight": torch.ones(4, 4)}
    text = {"vocab_size": 6, "other": 1}
    base = make_base(
        tmp_path / "base", tensors, text_config=text, tie_word_embeddings=False, **OTHER
    )
    whole = {EMBED: torch.randn(7, 4), HEAD: torch.randn(7, 4)}
    run = make_run(tmp_path / "run", {Q: low_rank(4, 4)}, replaced=lazy(tmp_path / "run", whole))
    merge(run, tmp_path / "out", base=base)
    config = config_of(tmp_path / "out")
    assert config["text_config"] == {"vocab_size": 7, "other": 1}
    assert config["vocab_size"] == 7


def test_labels_of_a_classifier(tmp_path: Path) -> None:
    tensors = {
        "roberta.encoder.layer.0.query.weight": torch.randn(4, 4),
        "classifier.out_proj.weight": torch.randn(3, 4),
    }
    roberta = {
        "model_type": "roberta",
        "architectures": ["RobertaForSequenceClassification"],
        "num_labels": 3,
    }
    module = "roberta.encoder.layer.0.query"
    for number, (labels, said) in enumerate(
        [
            (None, {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}),
            ({"0": "no", "1": "yes"}, {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}),
            ({"0": "a", "1": "b", "2": "c"}, {"0": "a", "1": "b", "2": "c"}),
        ]
    ):
        more = {} if labels is None else {"id2label": labels}
        base = make_base(tmp_path / f"base{number}", tensors, **roberta, **more)
        run = make_run(
            tmp_path / "run",
            {module: low_rank(4, 4)},
            task="sequence-classification",
            num_labels=3,
        )
        merge(run, tmp_path / f"out{number}", base=base)
        config = config_of(tmp_path / f"out{number}")
        assert config["id2label"] == said
        if said != labels:
            assert config["label2id"] == {f"LABEL_{i}": i for i in range(3)}
            assert "num_labels" not in config
        else:
            assert config["num_labels"] == 3
        assert config["architectures"] == ["RobertaForSequenceClassification"]


def test_frozen_weights_of_a_checkpoint_must_be_the_bases(tmp_path: Path) -> None:
    tensors = {f"{Q}.weight": torch.randn(4, 4), f"{K}.weight": torch.randn(4, 4)}
    base = make_base(tmp_path / "base", tensors)
    own = {f"{K}.weight": tensors[f"{K}.weight"], f"{Q}.weight": tensors[f"{Q}.weight"]}
    updates = {Q: low_rank(4, 4)}
    fine = make_run(tmp_path / "run", updates, embedded_base=lazy(tmp_path / "run", own))
    merge(fine, tmp_path / "out", base=base)
    for number, other in enumerate((own[f"{K}.weight"] + 1, torch.ones(4, 5))):
        folder = tmp_path / f"run{number}"
        frozen = lazy(folder, {**own, f"{K}.weight": other})
        with pytest.raises(BaseError) as caught:
            merge(make_run(folder, updates, embedded_base=frozen), tmp_path / "no", base=base)
        assert caught.value.tensor == f"{K}.weight"
