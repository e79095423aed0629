"""Tensors trained whole, and tensors that are one in the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dora_serve import merge
from tests.converters.made import (
    EMBED,
    HEAD,
    WEIGHTS,
    Q,
    assert_close,
    config_of,
    lazy,
    low_rank,
    make_base,
    make_run,
    moved,
)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_tensors_trained_whole_take_their_places(tmp_path: Path, dtype: torch.dtype | None) -> None:
    tensors = {
        EMBED: torch.randn(6, 4).bfloat16(),
        f"{Q}.weight": torch.randn(4, 4).bfloat16(),
        "model.norm.weight": torch.ones(4).bfloat16(),
        HEAD: torch.randn(6, 4).bfloat16(),
    }
    base = make_base(tmp_path / "base", tensors)
    whole = {"norm.weight": torch.full((4,), 2.0), HEAD: torch.randn(6, 4), "new": torch.randn(3)}
    run = make_run(tmp_path / "run", {Q: low_rank(4, 4)}, replaced=lazy(tmp_path / "run", whole))
    merge(run, tmp_path / "out", base=base, dtype=dtype)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert set(found) == {*tensors, "new"}
    out = dtype or torch.float32  # of what the run holds, where none is asked for
    assert torch.equal(found["model.norm.weight"], torch.full((4,), 2.0, dtype=out))
    assert torch.equal(found[HEAD], whole[HEAD].to(out))
    # What the base has not takes the dtype of its neighbours.
    assert torch.equal(found["new"], whole["new"].to(dtype or torch.bfloat16))
    assert torch.equal(found[EMBED], tensors[EMBED].to(dtype or torch.bfloat16))
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert set(said["base"]["fingerprint"]) == set(tensors)
    assert {*said["replaced"]} - {"norm.weight", "model.norm.weight"} == {HEAD, "new"}
    assert "merged" in (said.get("kind"), said.get("target"))
    assert config_of(tmp_path / "out").get("tie_word_embeddings") is not True


def test_replaced_tensors_that_are_the_bases_change_nothing(tmp_path: Path) -> None:
    tensors = {EMBED: torch.randn(6, 4), f"{Q}.weight": torch.randn(4, 4)}
    base = make_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    run = make_run(
        tmp_path / "run",
        {Q: low_rank(4, 4)},
        replaced=lazy(tmp_path / "run", {EMBED: tensors[EMBED], HEAD: tensors[EMBED].clone()}),
    )
    merge(run, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert set(found) == set(tensors)
    assert torch.equal(found[EMBED], tensors[EMBED])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True


@pytest.mark.parametrize("both", ["same", "different"])
def test_a_tied_pair_trained_whole(tmp_path: Path, both: str) -> None:
    tensors = {EMBED: torch.randn(6, 4), f"{Q}.weight": torch.randn(4, 4)}
    more = {"hidden_size": 4, "num_attention_heads": 1, "tie_word_embeddings": True}
    base = make_base(tmp_path / "base", tensors, **more)
    embed = torch.randn(9, 4)  # resized
    head = embed.clone() if both == "same" else torch.randn(9, 4)
    run = make_run(
        tmp_path / "run",
        {Q: low_rank(4, 4)},
        replaced=lazy(tmp_path / "run", {EMBED: embed, HEAD: head}),
    )
    merge(run, tmp_path / "out", base=base)
    found, config = load_file(tmp_path / "out" / WEIGHTS), config_of(tmp_path / "out")
    assert torch.equal(found[EMBED], embed)
    assert config["vocab_size"] == 9
    if both == "same":
        assert HEAD not in found
        assert config["tie_word_embeddings"] is True
    else:
        assert torch.equal(found[HEAD], head)
        assert config["tie_word_embeddings"] is False


def test_an_update_of_a_tied_head_unties_it(tmp_path: Path) -> None:
    tensors = {EMBED: torch.randn(6, 4), f"{Q}.weight": torch.randn(4, 4)}
    base = make_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    update = low_rank(6, 4)
    run = make_run(tmp_path / "run", {"lm_head": update})
    merge(run, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(found[EMBED], tensors[EMBED])
    assert_close(found[HEAD], moved(tensors[EMBED], update))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_an_update_of_a_tied_embedding(tmp_path: Path, tied: bool, stored: bool) -> None:
    """`tied`: the update reaches the head too. `stored`: the head lies in the file all the same."""
    embed = torch.randn(6, 4)
    tensors = {EMBED: embed, f"{Q}.weight": torch.randn(4, 4)}
    if stored:
        tensors[HEAD] = embed.clone()
    base = make_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    update, module = low_rank(6, 4), "model.embed_tokens"
    run = make_run(
        tmp_path / "run",
        {module: update},
        embeddings=frozenset({module}),
        tied=frozenset({module} if tied else ()),
    )
    merge(run, tmp_path / "out", base=base)
    found, config = load_file(tmp_path / "out" / WEIGHTS), config_of(tmp_path / "out")
    assert_close(found[EMBED], moved(embed, update))
    if tied:
        assert HEAD not in found
        assert config["tie_word_embeddings"] is True
    else:
        assert torch.equal(found[HEAD], embed)
        assert config["tie_word_embeddings"] is False


def test_an_update_of_gpt2s_embedding_unties_its_head(tmp_path: Path) -> None:
    embed, module = torch.randn(6, 4), "transformer.wte"
    base = make_base(
        tmp_path / "base",
        {f"{module}.weight": embed},
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
    )
    update = low_rank(6, 4)
    run = make_run(tmp_path / "run", {module: update}, embeddings=frozenset({module}))
    merge(run, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert_close(found[f"{module}.weight"], moved(embed, update))
    assert torch.equal(found[HEAD], embed)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_a_stored_head_that_is_another_stays(tmp_path: Path) -> None:
    embed, head, module = torch.randn(6, 4), torch.randn(6, 4), "model.embed_tokens"
    base = make_base(tmp_path / "base", {EMBED: embed, HEAD: head}, tie_word_embeddings=True)
    run = make_run(
        tmp_path / "run",
        {module: low_rank(6, 4)},
        embeddings=frozenset({module}),
        tied=frozenset({module}),
    )
    merge(run, tmp_path / "out", base=base)
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[HEAD], head)


def test_an_encoder_decoder_says_how_its_output_is_scaled(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    for tied, number in ((None, 0), (True, 1), (False, 2)):
        more = {} if tied is None else {"tie_word_embeddings": tied}
        base = make_base(
            tmp_path / f"base{number}",
            {"shared.weight": shared},
            model_type="t5",
            architectures=["T5ForConditionalGeneration"],
            **more,
        )
        update = low_rank(6, 4)
        merge(make_run(tmp_path / "run", {"lm_head": update}), tmp_path / f"o{number}", base=base)
        config = config_of(tmp_path / f"o{number}")
        assert config["scale_decoder_outputs"] is (tied is not False)
        assert config["tie_word_embeddings"] is False
        assert_close(load_file(tmp_path / f"o{number}" / WEIGHTS)[HEAD], moved(shared, update))
