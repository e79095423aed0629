"""Runs against a base: what was changed, and whether it is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converters.errors import BaseError, TargetError
from converters.model.base import BaseModel, open_base
from converters.model.match import (
    as_trained,
    changed,
    check_frozen,
    check_names,
    class_trained,
    classes,
    is_transposed,
    kernels_of,
    resolved,
    rows_in_memory,
    target_architecture,
)
from tests.converters import naming
from tests.converters.families import save_base
from tests.converters.made import lazy, low_rank, make_run
from tests.converters.model.bases import make_base


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


def test_an_update_of_another_shape_than_the_weight_that_the_run_holds(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {"model.embed_tokens.weight": torch.ones(6, 2)})
    module = "model.embed_tokens"
    resized = lazy(tmp_path / "run", {f"{module}.weight": torch.ones(8, 2)})
    for rows, fits in ((8, True), (6, False)):
        run = make_run(tmp_path / "run", {module: low_rank(rows, 2)}, replaced=resized)
        if fits:
            assert not is_transposed(run, base, resized, module, (rows, 2))
            continue
        with pytest.raises(BaseError, match="does not fit the weight that the run holds") as caught:
            is_transposed(run, base, resized, module, (rows, 2))
        error = caught.value
        assert (error.tensor, error.found, error.expected) == (f"{module}.weight", [8, 2], [6, 2])


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


def test_names_of_a_class_that_nobody_knows_are_looked_up_and_told(tmp_path: Path) -> None:
    names = ["model.layers.0.q.weight", "model.layers.0.k.weight", "model.head.weight"]
    base = make_base(tmp_path / "base", {name: torch.ones(4, 4) for name in names})
    plain = make_run(tmp_path / "run", {"model.layers.0.q": low_rank(4, 4)})
    assert resolved(plain, base) is plain
    updates = {name: low_rank(4, 4) for name in ("layers.0.q", "layers.0.k", "model.head", "none")}
    run = make_run(tmp_path / "run", updates, warnings=("first",))
    found = resolved(run, base)
    assert found.updates.keys() == run.updates.keys()
    assert found.warnings[0] == "first" and len(found.warnings) == 2
    assert "layers.0.q is taken for model.layers.0.q.weight" in found.warnings[1]
    assert "1 more modules likewise" in found.warnings[1]


def test_a_run_for_a_task_that_its_family_has_no_class_for(tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base", False)
    base, module = open_base(tmp_path / "base"), "model.layers.0.mlp.up_proj"
    for name in (module, module.removeprefix("model.")):
        run = make_run(tmp_path / "run", {name: low_rank(48, 32)}, task="seq2seq-lm")
        check_names(run, base)
        with pytest.raises(TargetError, match="no class for this task"):
            resolved(run, base)
    odd = make_run(tmp_path / "run", {module[6:]: low_rank(48, 31)}, task="seq2seq-lm")
    with pytest.raises(BaseError, match="does not fit"):
        check_names(odd, base)


@pytest.mark.parametrize(
    ("family", "own", "task", "found"),
    [
        ("gemma3_text", "Gemma3ForCausalLM", "feature-extraction", "Gemma3TextModel"),
        (
            "gemma3_text",
            "Gemma3ForCausalLM",
            "sequence-classification",
            "Gemma3TextForSequenceClassification",
        ),
        ("gemma3n_text", "Gemma3nForCausalLM", "feature-extraction", "Gemma3nTextModel"),
        ("gemma3", "Gemma3ForConditionalGeneration", "feature-extraction", "Gemma3Model"),
        ("llama", "LlamaForCausalLM", "feature-extraction", "LlamaModel"),
        ("bert", "BertForMaskedLM", "causal-lm", "BertLMHeadModel"),
        ("gemma3_text", "Gemma3ForCausalLM", "seq2seq-lm", None),
    ],
)
def test_the_class_for_a_task_is_the_one_that_transformers_makes_of_the_base(
    tmp_path: Path, family: str, own: str, task: str, found: str | None
) -> None:
    """Text models share their first name with the multimodal models that they are part of."""
    base = BaseModel(tmp_path, "base", {"model_type": family, "architectures": [own]}, {})
    if found is None:
        with pytest.raises(TargetError, match="no class for this task"):
            classes(task, None, base)
    else:
        assert classes(task, None, base).whole.names.architecture == found


def test_names_that_a_class_has_not(tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base", False)
    base = open_base(tmp_path / "base")
    for name in ("model.layers.7.mlp.up_proj", "some.mlp.up_proj"):
        run = make_run(tmp_path / "run", {name: low_rank(48, 32)})
        for check in (check_names, resolved, as_trained):
            with pytest.raises(BaseError, match="no such module") as caught:
                check(run, base)
            assert (caught.value.file, caught.value.tensor) == (run.path, name)
            assert "LlamaForCausalLM, such as model.layers.0.mlp.up_proj" in str(
                caught.value.expected
            )


@pytest.mark.parametrize("task", [None, "causal-lm"])
@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_a_run_of_the_text_model_of_a_multimodal_base(
    tmp_path: Path, task: str | None, prefix: str
) -> None:
    """The whole class has its modules under other names, and both are answered."""
    naming.make(tmp_path, naming.FAMILIES["gemma3"])
    base, inner = open_base(tmp_path / "base"), "layers.1.self_attn.q_proj"
    shape = base.tensors[f"language_model.model.{inner}.weight"].shape
    whole = {f"{prefix}norm.weight": torch.ones(32)}
    run = make_run(
        tmp_path / "run",
        {prefix + inner: low_rank(*shape)},
        task=task,
        replaced=lazy(tmp_path / "run", whole),
    )
    known = classes(task, None, base)
    assert known.known
    assert known.whole.names.architecture == "Gemma3ForConditionalGeneration"
    assert known.text is not None
    assert known.text.names.architecture == "Gemma3ForCausalLM"
    assert known.module("model.nothing") is None and known.tensor("model.nothing") is None
    found = resolved(run, base)
    assert list(found.updates) == [f"model.language_model.{inner}"]
    assert list(found.replaced) == ["model.language_model.norm.weight"]
    own, layout = as_trained(run, base)
    assert list(own.updates) == [prefix + inner]
    assert list(own.replaced) == [f"{prefix}norm.weight"]
    text = prefix == "model."
    assert layout.names.architecture == (
        "Gemma3ForCausalLM" if text else "Gemma3ForConditionalGeneration"
    )
    assert class_trained(run, base).names.architecture == layout.names.architecture
    assert rows_in_memory(run, base, f"{prefix}embed_tokens") == 80
    assert rows_in_memory(run, base, f"{prefix}nothing") == 0


def test_which_class_a_run_is_for(tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base", False)
    base = open_base(tmp_path / "base")
    for task in (None, "causal-lm"):
        run = make_run(tmp_path / "run", {}, task=task)
        assert target_architecture(run, base) == ("LlamaForCausalLM", None)
    run = make_run(tmp_path / "run", {}, task="sequence-classification", num_labels=3)
    architecture, names = target_architecture(run, base)
    assert architecture == "LlamaForSequenceClassification"
    assert names is not None and "score.weight" in names and "lm_head.weight" not in names
    frozen = lazy(tmp_path / "run", {"x.weight": torch.ones(1)})
    run = make_run(tmp_path / "run", {}, task="token-classification", embedded_base=frozen)
    assert target_architecture(run, base) == ("LlamaForTokenClassification", ["x.weight"])


def test_convolutions_are_known_by_the_base(tmp_path: Path) -> None:
    tensors = {"c.weight": torch.ones(6, 2, 3, 3), "q.weight": torch.ones(6, 18)}
    base = make_base(tmp_path / "base", tensors)
    run = make_run(
        tmp_path / "run",
        {name: low_rank(6, 18) for name in ("c", "q", "none")},
        kernels={"c": (2, 3, 3)},
    )
    assert kernels_of(run, base) == {"c": (2, 3, 3)}
    assert kernels_of(run, None) == {"c": (2, 3, 3)}
    other = make_run(tmp_path / "run", {"c": low_rank(6, 17)}, kernels={"c": (2, 3, 3)})
    assert kernels_of(other, base) == {}
