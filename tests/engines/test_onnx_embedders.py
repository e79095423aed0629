"""Embedders in ONNX Runtime, with the modules of their sentence-transformers folders.

The truth is PEFT's live model in torch, and behind it the modules as that library defines them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from converters.model.base import open_base
from dora_serve import merge, read_run, write_onnx
from dora_serve.onnxruntime.encoder import Encoder
from dora_serve.onnxruntime.pipeline import POOLING, Pipeline, normalized
from dora_serve.onnxruntime.session import EngineError
from tests.conftest import randomize
from tests.engines.encoders import BOUND, ROWS, SIZES

ATTENTION = ["query", "value"]
# Family → class, configuration, what is adapted, tensors that embedders come without, pooling.
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str], bool, str]] = {
    "bert": ("Bert", SIZES, ATTENTION, False, "cls"),
    "roberta": ("Roberta", {**SIZES, "pad_token_id": 1}, ATTENTION, True, "mean"),
    "xlm-roberta": ("XLMRoberta", {**SIZES, "pad_token_id": 1}, ATTENTION, True, "cls"),
    "modernbert": (
        "ModernBert",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "pad_token_id": 0,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
        },
        ["Wqkv", "Wo"],
        False,
        "mean",
    ),
    "qwen3": (
        "Qwen3",
        {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
        ["q_proj", "v_proj", "down_proj"],
        False,
        "lasttoken",
    ),
}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def modules(folder: Path, *kinds: str) -> None:
    listed = [
        {"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.{kind}"}
        for i, kind in enumerate(("Transformer", *kinds))
    ]
    put(folder / "modules.json", listed)


def pipeline(folder: Path, pooling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooling, a dense layer and normalization beside a model; weight and bias of the layer."""
    modules(folder, "Pooling", "Dense", "Normalize")
    switches = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    put(folder / "1_Pooling" / "config.json", {f"pooling_mode_{switches[pooling]}": True})
    put(folder / "2_Dense" / "config.json", {"in_features": 32, "out_features": 8})
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(8, 32, generator=generator), torch.ones(8) / 2
    tensors = {"linear.weight": weight, "linear.bias": bias}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    return weight, bias


def make(name: str, tmp_path: Path) -> tuple[Path, Path, Any, tuple[torch.Tensor, torch.Tensor]]:
    """The base and the run on disk, PEFT's live model, and the dense layer."""
    kind, sizes, targets, bare, pooling = FAMILIES[name]
    torch.manual_seed(0)
    cls = getattr(transformers, f"{kind}Model")
    model = cls(getattr(transformers, f"{kind}Config")(**sizes))
    if bare:
        model = cls(model.config, add_pooling_layer=False)
    with torch.no_grad():  # as far from zero as what is trained, whose effect else is small
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    base = tmp_path / "base"
    model.save_pretrained(base)
    dense = pipeline(base, pooling)
    config = LoraConfig(r=3, lora_alpha=12, target_modules=targets, task_type="FEATURE_EXTRACTION")
    live = get_peft_model(cls.from_pretrained(base), config)
    randomize(live)
    live.save_pretrained(tmp_path / "run")
    return base, tmp_path / "run", live.eval(), dense


def vector(
    model: Any, row: list[int], pooling: str, dense: tuple[torch.Tensor, torch.Tensor]
) -> np.ndarray:
    with torch.no_grad():
        states = model(input_ids=torch.tensor([row])).last_hidden_state[0]
        pooled = {"cls": states[0], "mean": states.mean(0), "lasttoken": states[-1]}[pooling]
        out = torch.tanh(dense[0] @ pooled + dense[1])
    result: np.ndarray = torch.nn.functional.normalize(out, dim=0).numpy()
    return result


def of(encoder: Encoder, adapter: str | None) -> list[np.ndarray]:
    assert encoder.pipeline.normalized
    return [normalized(encoder.vector(each)) for each in encoder.run(ROWS, adapter)]


def test_adapters_that_classify_leave_the_pipeline_behind(tmp_path: Path) -> None:
    """It cuts what it embeds, and not what the classifier reads."""
    base, _, _, _ = make("bert", tmp_path)
    put(base / "sentence_bert_config.json", {"max_seq_length": 4})
    cls = transformers.BertForSequenceClassification
    config = LoraConfig(r=3, lora_alpha=12, target_modules=ATTENTION, task_type="SEQ_CLS")
    live = get_peft_model(cls.from_pretrained(base), config)
    randomize(live)
    live.save_pretrained(tmp_path / "classes")
    runs = {"classes": read_run(tmp_path / "classes")}
    write_onnx(open_base(base), tmp_path / "onnx", adapters=runs)
    assert not (tmp_path / "onnx" / "modules.json").exists()
    encoder = Encoder(tmp_path / "onnx")
    assert encoder.max_length == SIZES["max_position_embeddings"]
    row = ROWS[0]
    assert len(row) > 4
    with torch.no_grad():
        truth = live.eval()(input_ids=torch.tensor([row])).logits[0].numpy()
    (found,) = encoder.run([row], "classes")
    assert np.abs(found["logits"] - truth).max() < BOUND


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.supports(
                    method="peft_lora", family=f"{name} (embedder)", targets=("merged", "onnx")
                ),
                pytest.mark.further,
            ],
        )
        for name in FAMILIES
    ],
)
def test_vectors_are_those_of_the_live_pipeline(name: str, tmp_path: Path) -> None:
    base, folder, live, dense = make(name, tmp_path)
    pooling = FAMILIES[name][-1]
    truth = [vector(live, row, pooling, dense) for row in ROWS]
    with live.disable_adapter():
        plain = [vector(live, row, pooling, dense) for row in ROWS]
    run = read_run(folder)
    write_onnx(base, tmp_path / "many", adapters={"tuned": run})
    many = Encoder(tmp_path / "many")
    merge(run, tmp_path / "merged", base=base)
    write_onnx(tmp_path / "merged", tmp_path / "one")
    for found in (of(many, "tuned"), of(Encoder(tmp_path / "one"), None)):
        assert max(np.abs(a - b).max() for a, b in zip(found, truth, strict=True)) <= BOUND
    control = of(many, None)
    assert max(np.abs(a - b).max() for a, b in zip(control, plain, strict=True)) <= BOUND
    assert min(np.abs(a - b).max() for a, b in zip(control, truth, strict=True)) > 10 * BOUND
    # As it is loaded anew: another pooling is another model.
    cls = getattr(transformers, f"{FAMILIES[name][0]}Model")
    again = PeftModel.from_pretrained(cls.from_pretrained(base), str(folder)).eval()
    other = "mean" if pooling != "mean" else "cls"
    wrong = vector(again, ROWS[0], other, dense)
    assert np.abs(wrong - truth[0]).max() > 10 * BOUND


def rows_are_their_own(live: Any, output: str, folder: Path) -> None:
    """Of the graph of `live`, given random numbers, in `folder`: also where the model itself reads
    what fills a row up, which is the control."""
    with torch.no_grad():
        for tensor in live.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    live.save_pretrained(folder / "base")
    write_onnx(folder / "base", folder / "onnx")
    rows = [[5, 6, 7], [9, 8, 7, 6, 5, 9, 11], [7, 7, 5], [8, 6]]
    with torch.no_grad():
        truth = [live(input_ids=torch.tensor([row]))[output][0].numpy() for row in rows]
        filled = torch.tensor([rows[0] + [live.config.pad_token_id] * 4])
        mask = torch.arange(7)[None] < 3
        read = live(input_ids=filled, attention_mask=mask.long())[output][0].numpy()
    for found, expected in zip(Encoder(folder / "onnx").run(rows), truth, strict=True):
        assert np.abs(found[output] - expected).max() <= BOUND
    assert np.abs(read[: len(truth[0])] - truth[0]).max() > 10 * BOUND


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (
            "MobileBert",
            {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        ),
        pytest.param(
            "ConvBert",
            {"embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3},
            marks=pytest.mark.further,
        ),
    ],
)
def test_what_fills_rows_up_is_not_read(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls = getattr(transformers, f"{kind}Model")
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more, pad_token_id=0)
    rows_are_their_own(cls(config).eval(), "last_hidden_state", tmp_path)


@pytest.mark.parametrize("summary", ["mean", pytest.param("last", marks=pytest.mark.further)])
@pytest.mark.further
def test_heads_that_read_all_of_a_row_read_no_padding(summary: str, tmp_path: Path) -> None:
    """XLM's classes, where its configuration asks its head to read more than the first token."""
    sizes = {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 80}
    config = transformers.XLMConfig(**sizes, summary_type=summary, max_position_embeddings=40)
    torch.manual_seed(0)
    live = transformers.XLMForSequenceClassification(config).eval()
    rows_are_their_own(live, "logits", tmp_path)


STATES = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True}, STATES[0]),
        ({"pooling_mode": "max"}, STATES.max(0)),
        ({"word_embedding_dimension": 6, "pooling_mode_cls_token": False}, STATES.mean(0)),
        ({"pooling_mode": ["cls", "mean"]}, np.concatenate([STATES[0], STATES.mean(0)])),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, STATES.sum(0) / np.sqrt(5)),
        (
            {"pooling_mode_weightedmean_tokens": True, "pooling_mode_max_tokens": True},
            np.concatenate([STATES.max(0), np.average(STATES, 0, np.arange(1, 6))]),
        ),
    ],
)
def test_poolings(config: dict[str, Any], expected: np.ndarray, tmp_path: Path) -> None:
    modules(tmp_path, "Pooling")
    put(tmp_path / "1_Pooling" / "config.json", config)
    found = Pipeline(tmp_path)
    assert not found.normalized
    assert found(STATES) == pytest.approx(expected, abs=1e-6)


def test_without_a_pipeline_it_is_the_mean(tmp_path: Path) -> None:
    assert Pipeline(tmp_path)(STATES) == pytest.approx(POOLING["mean"](STATES))


@pytest.mark.parametrize(
    ("kinds", "config", "message"),
    [
        (("Pooling",), {"pooling_mode": "attention"}, "pooling_mode"),
        (("Pooling",), {"pooling_mode": []}, "pooling_mode"),
        (("Pooling", "WeightedLayerPooling"), {"pooling_mode": "cls"}, "modules.json"),
        (("Pooling", "Dense"), {"pooling_mode": "cls"}, "Dense"),
        ((), {}, "modules.json"),
    ],
)
def test_modules_that_are_not_known(
    kinds: tuple[str, ...], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    modules(tmp_path, *kinds)
    for number, kind in enumerate(kinds, 1):
        put(tmp_path / f"{number}_{kind}" / "config.json", config)
    with pytest.raises(EngineError, match=message):
        Pipeline(tmp_path)


def test_modules_outside_of_the_folder(tmp_path: Path) -> None:
    put(tmp_path / "own" / "modules.json", [{"path": "../other", "type": "x.Pooling"}])
    put(tmp_path / "other" / "config.json", {"pooling_mode": "cls"})
    with pytest.raises(EngineError, match="modules"):
        Pipeline(tmp_path / "own")
