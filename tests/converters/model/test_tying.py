"""What is one tensor in a class, against what transformers itself makes one when it builds it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from converters.errors import TargetError
from converters.model.base import BaseModel, open_base
from converters.model.match import rows_in_memory
from converters.model.tying import aliases, groups, spreading, tensor_names, tied
from dora_serve import merge
from tests.converters.made import EMBED, HEAD, WEIGHTS, lazy, make_run
from tests.converters.tied_families import FAMILIES


def named(folder: Path, config: dict[str, Any]) -> BaseModel:
    """A base of which only the configuration counts."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, folder / WEIGHTS)
    return open_base(folder)


def llama(tie: bool) -> dict[str, Any]:
    family = FAMILIES["llama, untied"]
    config = transformers.LlamaConfig(**{**family.values, "tie_word_embeddings": tie})
    return {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    "name", [n if f.default else pytest.param(n, marks=pytest.mark.further)
             for n, f in FAMILIES.items()]
)  # fmt: skip
def test_groups_are_what_has_one_address(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    config = family.configuration()
    model = getattr(transformers, family.model)(config)
    places = defaultdict(set)
    for key, tensor in model.state_dict().items():
        places[tensor.data_ptr(), tensor.shape].add(key)
    expected = sorted(sorted(keys) for keys in places.values() if len(keys) > 1)
    said = {**config.to_dict(), "architectures": [family.model]}
    base = named(tmp_path / "base", said)
    found = groups(base, family.model, None)
    assert sorted(map(sorted, found)) == expected
    assert bool(expected) is not name.endswith("untied")
    first = {names[0] for names in found}
    assert first.isdisjoint(tied(said))
    assert set(tied(said)) == {key for names in found for key in names[1:]}
    kept = tensor_names(family.model, said, None)
    assert set(kept) == model.state_dict().keys() - set(tied(said))


class Shared(torch.nn.Module):
    """Four layers of one weight, the last two declared as transformers does, and one alone."""

    def __init__(self, declared: dict[str, str]) -> None:
        super().__init__()
        first = torch.nn.Linear(2, 2, bias=False)
        for name in "abcde":
            setattr(self, name, torch.nn.Linear(2, 2, bias=False) if name != "a" else first)
        for name in "bcd":
            getattr(self, name).weight = first.weight
        self.all_tied_weights_keys = declared


@pytest.mark.parametrize(
    "declared",
    [
        {},
        {"d.weight": "c.weight", "c.weight": "a.weight"},
        {"b.weight": "a.weight"},
        {"d.weight": "a.weight", "c.weight": "a.weight", "b.weight": "a.weight"},
    ],
)
def test_aliases_lead_to_the_first_of_one_object(declared: dict[str, str]) -> None:
    found = aliases(Shared(declared))
    assert dict(found) == {f"{name}.weight": "a.weight" for name in "bcd"}
    assert dict(declared) == Shared(declared).all_tied_weights_keys


def test_a_class_that_declares_another_as_the_first() -> None:
    found = aliases(Shared({"a.weight": "d.weight"}))
    assert found["a.weight"] == "d.weight" and "d.weight" not in found
    assert aliases(torch.nn.Linear(2, 2)) == {}


def test_a_class_that_nobody_knows_is_tied_as_its_configuration_says(tmp_path: Path) -> None:
    own = {"architectures": ["PartsForCausalLM"], "model_type": "parts"}
    for config, expected in (
        (own, [HEAD]),
        ({**own, "tie_word_embeddings": True}, [HEAD]),
        ({**own, "tie_word_embeddings": False}, []),
        ({**own, "architectures": ["PartsForSequenceClassification"]}, []),
        ({**own, "model_type": "llama"}, [HEAD]),
        ({**own, "architectures": ["LlamaForCausalLM"]}, [HEAD]),
        ({}, []),
    ):
        assert list(tied(config)) == expected
    assert set(tied(llama(True))) == {HEAD} and set(tied(llama(False))) == set()
    base = named(tmp_path / "base", own)
    assert groups(base, "PartsForCausalLM", None) == []
    save_file({EMBED: torch.ones(3, 2)}, base.path / WEIGHTS)
    assert groups(open_base(base.path), "PartsForCausalLM", None) == [[EMBED, HEAD]]


def test_rows_of_what_is_stored_or_tied(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    for tie in (True, False):
        base = named(tmp_path / str(tie), llama(tie))
        save_file({EMBED: torch.ones(81, 2), "s": torch.tensor(1.0)}, base.path / WEIGHTS)
        base = open_base(base.path)
        assert rows_in_memory(run, base, "model.embed_tokens") == 81
        assert rows_in_memory(run, base, "model.layers.0.mlp.up_proj") == 48
        assert rows_in_memory(run, base, "model.nothing") == 0
        assert rows_in_memory(run, base, "s") == 0
    unknown = named(tmp_path / "unknown", {"architectures": ["PartsForCausalLM"]})
    assert rows_in_memory(run, unknown, "model.layers.0.mlp.up_proj") == 0


@pytest.mark.parametrize(
    ("tokens", "spread"),
    [
        ({"embed_tokens"}, {"embed_tokens"}),
        ({"model.embed_tokens"}, {"model.embed_tokens"}),
        ({"lm_head"}, set()),
        ({"embed_tokens", "lm_head"}, set()),
        (set(), set()),
    ],
)
def test_which_single_rows_reach_the_other_side(
    tmp_path: Path, tokens: set[str], spread: set[str]
) -> None:
    """As PEFT does it: from the input embedding alone."""
    base = named(tmp_path / "base", llama(True))
    assert spreading(tokens, base, "LlamaForCausalLM", None) == spread
    assert spreading(tokens, base, "PartsForCausalLM", None) == tokens
    untied = named(tmp_path / "untied", llama(False))
    assert spreading(tokens, untied, "LlamaForCausalLM", None) == tokens


def test_sides_that_a_class_always_ties_cannot_part(tmp_path: Path) -> None:
    family = FAMILIES["switch"]
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(family.configuration())
    model.save_pretrained(tmp_path / "base")
    whole = lazy(tmp_path / "run", {"lm_head.weight": torch.randn(80, 32)})
    run = make_run(tmp_path / "run", {}, replaced=whole, apart=frozenset(whole))
    with pytest.raises(TargetError, match="one side of a tensor that is") as caught:
        merge(run, tmp_path / "out", base=tmp_path / "base")
    assert (caught.value.file, caught.value.found) == (run.path, family.model)
    assert caught.value.tensor in family.sides or caught.value.tensor == "lm_head.weight"
