"""How many labels a classifier has is said by its head, and by no other layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.converters.families import prove, save_adapter

SIZES = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 80, "pad_index": 0}


@pytest.mark.parametrize("head", [[], ["sequence_summary"]])
def test_a_layer_trained_whole_has_rows_and_no_labels(head: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls = transformers.FlaubertForSequenceClassification
    cls(transformers.FlaubertConfig(**SIZES, num_labels=3)).save_pretrained(tmp_path / "base")
    whole = {"target_modules": ["k_lin", "out_lin", "lin2"], "modules_to_save": ["q_lin", *head]}
    save_adapter(cls, tmp_path / "base", tmp_path / "lora", **whole)
    run = prove(cls, tmp_path / "base", tmp_path / "lora", tmp_path)
    assert run.num_labels == (3 if head else None)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").num_labels == 3
