"""One side of a tied pair trained alone, of every family whose class ties: whole, by LoRA, and in
single rows.

The truth is PEFT's own live model, which transformers builds and ties. The negative control takes
the other way of treating what is tied: sides that parted are made one again, sides that stayed one
are parted.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model

from converters.errors import DoraExportError
from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify, write_adapter
from tests.conftest import randomize
from tests.converters.families import save_base
from tests.converters.tied_families import ENCODER, FAMILIES, Family


def base(family: Family, folder: Path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(family.configuration())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() < 2))
    model.save_pretrained(folder)


def load(family: Family, folder: Path) -> Any:
    return getattr(transformers, family.model).from_pretrained(folder).eval()


def tuned(family: Family, folder: Path, out: Path, side: str, way: str) -> Any:
    """PEFT's live model of an adapter on `side`, as loading makes it, and the adapter in `out`."""
    inner: Any = family.inner if family.inner.startswith(".") else [family.inner]
    config: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": inner}
    if way == "whole":
        config["modules_to_save"] = [side]
    elif way == "tokens":
        config["trainable_token_indices"] = {side: [5, 9, 30]}
    elif isinstance(inner, str):
        config["target_modules"] = f"{inner}|{side}"
    else:
        config["target_modules"] = [*inner, side]
    model = get_peft_model(load(family, folder), LoraConfig(**config))
    randomize(model, ("lora_", "modules_to_save", "trainable_tokens_delta"))
    keep_padding(model)
    model.save_pretrained(out)
    return PeftModel.from_pretrained(load(family, folder), str(out)).eval()


def keep_padding(model: Any) -> None:
    """Leave the padding's row of embeddings as it was, which gets no gradient in training."""
    for module in model.modules():
        layer: Any = getattr(module, "base_layer", getattr(module, "original_module", None))
        row = getattr(layer, "padding_idx", None)
        with torch.no_grad():
            if row is not None and len(getattr(module, "lora_embedding_A", ())):
                module.lora_embedding_A["default"][:, row] = 0
            if row is not None and hasattr(module, "modules_to_save"):
                module.modules_to_save["default"].weight[row] = layer.weight[row]


def logits(family: Family, model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 9, 30, 11, 12, 13], [30, 2, 9, 8, 5, 40, 41, 42]])
    shapes = {"input_features": (8, 40), "pixel_values": (3, 16, 16), "input_values": (1600,)}
    generator = torch.Generator().manual_seed(0)
    other = {n: torch.randn(2, *shape, generator=generator) for n, shape in shapes.items()}
    other["image_embeds_position_mask"] = torch.tensor([[1] * 4 + [0] * 4] * 2)
    with torch.no_grad():
        inputs = {name: other.get(name, ids) for name in family.inputs}
        found: torch.Tensor = model(**inputs).logits
    return found


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def otherwise(family: Family, merged: Any, folder: Path, side: str) -> None:
    """Treat what is tied in the other way than the merged model does."""
    old = load(family, folder)
    weights = {name: merged.get_submodule(name).weight for name in family.sides}
    parted = any(not torch.equal(weight, weights[side]) for weight in weights.values())
    for name in family.sides:
        other = weights[side].detach() if parted else old.get_submodule(name).weight.detach()
        if name != side:
            merged.get_submodule(name).weight = torch.nn.Parameter(other.clone())


def refusal(family: Family, side: str, way: str) -> str:
    """The words that a run is refused with, none where it is merged."""
    if family.biased and way == "tokens":
        return "without its bias"
    spread = (way, side) == ("tokens", "shared")  # to all sides
    return "computes otherwise" if family.refused and not spread else ""


def cases() -> list[Any]:
    found = []
    for name, family in FAMILIES.items():
        for side, way in product(family.sides, ("whole", "lora", "tokens")):
            words = refusal(family, side, way)
            outcome = f"refused: {words}" if words else "●"
            marks = [pytest.mark.ties(name, side, way, outcome)]
            plain = family.default and (way != "lora" or name in ("qwen2", "t5", "bart"))
            marks += [] if plain else [pytest.mark.further]
            found.append(pytest.param(name, side, way, id=f"{name}-{side}-{way}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "side", "way"), cases())
def test_one_side_of_what_is_tied(tmp_path: Path, name: str, side: str, way: str) -> None:
    family = FAMILIES[name]
    base(family, tmp_path / "base")
    live = tuned(family, tmp_path / "base", tmp_path / "lora", side, way)
    truth = logits(family, live)
    run = read_run(tmp_path / "lora", ReadOptions(base=tmp_path / "base"))
    words = refusal(family, side, way)
    if words:
        with pytest.raises(DoraExportError, match=words):
            merge(run, tmp_path / "merged", base=tmp_path / "base")
        return
    merge(run, tmp_path / "merged", base=tmp_path / "base")
    cls = getattr(transformers, family.model)
    merged, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert apart(logits(family, merged.eval()), truth) < 1e-4
    write_adapter(run, tmp_path / "adapter", base=tmp_path / "base")
    again = PeftModel.from_pretrained(load(family, tmp_path / "base"), str(tmp_path / "adapter"))
    assert apart(logits(family, again.eval()), truth) < 1e-4
    if side not in family.silent:
        otherwise(family, merged, tmp_path / "base", side)
        assert apart(logits(family, merged), truth) > 1e-3


@pytest.mark.parametrize(("name", "side"), [("qwen2", "lm_head"), ("t5", "lm_head")])
def test_rows_of_all_sides_beside_lora_on_one(tmp_path: Path, name: str, side: str) -> None:
    """PEFT's live model has the trained rows in every side, under the one side's own LoRA."""
    family = FAMILIES[name]
    base(family, tmp_path / "base")
    config = LoraConfig(r=2, target_modules=[family.inner, side], trainable_token_indices=[5, 9])
    if name == "t5":
        config.trainable_token_indices = {"shared": [5, 9]}
    model: Any = get_peft_model(load(family, tmp_path / "base"), config)
    randomize(model, ("lora_", "trainable_tokens_delta"))
    model.save_pretrained(tmp_path / "run")
    truth = logits(
        family, PeftModel.from_pretrained(load(family, tmp_path / "base"), str(tmp_path / "run"))
    )
    run = read_run(tmp_path / "run", ReadOptions(base=tmp_path / "base"))
    for dtype in (None, torch.bfloat16):
        out = tmp_path / f"merged-{dtype}"
        merge(run, out, base=tmp_path / "base", dtype=dtype)
        found = verify(run, out, base=tmp_path / "base")
        assert found.passed
        assert found.truth == "peft"
    merged = load(family, tmp_path / "merged-None")
    assert apart(logits(family, merged), truth) < 1e-4
    with torch.no_grad():
        merged.get_submodule(side).weight[5] += 0.1
    assert apart(logits(family, merged), truth) > 1e-3
    with pytest.raises(DoraExportError, match="not low-rank"):
        write_adapter(run, tmp_path / "adapter", base=tmp_path / "base")


def test_a_head_that_its_class_reads_without_calling_it(tmp_path: Path) -> None:
    """LoRA on MobileBERT's decoder has no effect in PEFT's live model; merged it would have."""
    small = {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}
    head = "cls.predictions.decoder"
    family = Family(
        "MobileBertForMaskedLM", "MobileBertConfig", {**ENCODER, **small}, (head,), "query"
    )
    base(family, tmp_path / "base")
    plain = logits(family, load(family, tmp_path / "base"))
    model = get_peft_model(
        load(family, tmp_path / "base"), LoraConfig(r=2, target_modules=["predictions.decoder"])
    )
    randomize(model)
    model.save_pretrained(tmp_path / "lora")
    assert apart(logits(family, model.eval()), plain) == 0
    assert apart(logits(family, model.merge_and_unload()), plain) > 1e-3
    with pytest.raises(DoraExportError, match="without calling it"):
        merge(tmp_path / "lora", tmp_path / "merged", base=tmp_path / "base")


@pytest.mark.parametrize(
    "adapter",
    [LoraConfig(target_modules=["dt_proj"]), LoKrConfig(r=2, target_modules=["conv1d"])],
    ids=["projection", "convolution"],
)
def test_a_layer_inside_that_its_class_reads_without_calling_it(
    tmp_path: Path, adapter: PeftConfig
) -> None:
    """Of Mamba, which PEFT's live model has no use of; that lies plainly on disk."""
    family = FAMILIES["mamba"]
    base(family, tmp_path / "base")
    plain = logits(family, load(family, tmp_path / "base"))
    model = get_peft_model(load(family, tmp_path / "base"), adapter)
    randomize(model, ("lora_", "lokr_"))
    model.save_pretrained(tmp_path / "lora")
    assert apart(logits(family, model.eval()), plain) < 1e-5
    run = read_run(tmp_path / "lora", ReadOptions(base=tmp_path / "base"))
    for write in (merge, write_adapter):
        with pytest.raises(DoraExportError, match="without calling it"):
            write(run, tmp_path / "out", base=tmp_path / "base")


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3.5, sees", "bart", "bert", "gpt-neox, untied", "modernbert"]
)
def test_added_tokens(tmp_path: Path, name: str) -> None:
    """All that is tied has the rows that were added; BART's bias per token, which no adapter
    holds, is asked for."""
    family = FAMILIES[name]
    base(family, tmp_path / "base")

    def resized() -> Any:
        model = load(family, tmp_path / "base")
        torch.manual_seed(1)
        model.resize_token_embeddings(83, mean_resizing=False)
        return model

    model = get_peft_model(resized(), LoraConfig(r=2, target_modules=[family.inner]))
    randomize(model)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    live = PeftModel.from_pretrained(resized(), str(tmp_path / "lora")).eval()
    truth = logits(family, live)
    run = read_run(tmp_path / "lora", ReadOptions(base=tmp_path / "base"))
    if name == "bart":
        with pytest.raises(DoraExportError, match="resize_token_embeddings"):
            merge(run, tmp_path / "merged", base=tmp_path / "base")
        return
    merge(run, tmp_path / "merged", base=tmp_path / "base")
    merged = load(family, tmp_path / "merged")
    sides = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (sides[0] is sides[1]) == ("untied" not in name)
    assert merged.config.get_text_config().vocab_size == 83
    assert apart(logits(family, merged), truth) < 1e-4
    assert apart(logits(family, resized()), truth) > 1e-3


def test_a_side_whose_added_rows_are_nowhere(tmp_path: Path) -> None:
    family = FAMILIES["qwen3.5, sees"]
    base(family, tmp_path / "base")
    model = load(family, tmp_path / "base")
    model.resize_token_embeddings(83, mean_resizing=False)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(model, lora)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(DoraExportError, match="added rows"):
        merge(tmp_path / "lora", tmp_path / "merged", base=tmp_path / "base")


def resized(name: str, layers: Any, rows: Any, folder: Path) -> Any:
    """The model of PEFT on a base whose embedding was resized, and the adapter in `folder`."""
    cls = save_base(name, folder / "base", tied=True)
    model = cls.from_pretrained(folder / "base")
    model.resize_token_embeddings(83, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=layers, trainable_token_indices=rows)
    peft: Any = get_peft_model(model, config).eval()
    randomize(peft, ("lora_", "trainable_tokens_delta"))
    peft.save_pretrained(folder / "lora")
    return peft


def check_resized(peft: Any, folder: Path) -> None:
    """The adapter in `folder`, merged, is what `peft` computes."""
    merge(folder / "lora", folder / "merged", base=folder / "base")
    merged = type(peft.get_base_model()).from_pretrained(folder / "merged").eval()
    ids = torch.tensor([[5, 9, 12, 81, 40]])
    inputs = {"input_ids": ids}
    if merged.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        assert apart(merged(**inputs).logits, peft(**inputs).logits) < 1e-4


@pytest.mark.parametrize(
    ("name", "key"), [("llama", ""), ("llama", "embed_tokens"), ("t5", ""), ("t5", "shared")]
)
def test_single_rows_of_an_embedding_that_was_resized(name: str, key: str, tmp_path: Path) -> None:
    """PEFT then stores the rows of the tied head as well, which has none of its own, and nothing of
    what else is tied to the embedding."""
    rows: Any = {key: [5, 9, 81]} if key else [5, 9, 81]
    check_resized(resized(name, "all-linear", rows, tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "layers", "rows"),
    [
        ("llama", ["q_proj", "embed_tokens"], {"lm_head": [5, 9]}),
        ("llama", ["q_proj", "embed_tokens"], {"lm_head": [5, 81]}),
        ("t5", ["q"], {"embed_tokens": [5, 9]}),
    ],
)
def test_sides_have_the_new_rows(name: str, layers: list[str], rows: Any, tmp_path: Path) -> None:
    """Of a resized embedding PEFT stores one side; rows trained of another are of as many."""
    check_resized(resized(name, layers, rows, tmp_path), tmp_path)


def test_new_rows_of_which_only_the_adapter_is_stored(tmp_path: Path) -> None:
    """PEFT keeps no row of an embedding both of whose sides are adapted, but the head's LoRA."""
    resized("llama", ["q_proj", "lm_head"], {"embed_tokens": [5, 9]}, tmp_path)
    with pytest.raises(DoraExportError, match="added rows"):
        merge(tmp_path / "lora", tmp_path / "merged", base=tmp_path / "base")
