"""Embedders between sentence-transformers and this tool: its folders in and out, its own vectors
the truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converters.lint import lint
from converters.model.base import open_base
from dora_serve import ReadOptions, merge, read_run, verify, write_adapter, write_onnx
from dora_serve.folder.inventory import discover
from dora_serve.onnxruntime.decoder import Decoder
from dora_serve.onnxruntime.encoder import Encoder
from dora_serve.onnxruntime.session import EngineError
from dora_serve.server.prepare.make import make_offer
from dora_serve.vllm.fleet import plan_fleet
from tests.conftest import randomize
from tests.engines.encoders import BOUND

pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

WORDS = "a boat lamp harbour quiet was lit only its snow river walk by the tram bread first".split()
TEXTS = ["The harbour was quiet", "a lamp lit by snow", "bread", "walk by the river a tram first"]
LIMIT = 20  # tokens of a text
# Family → configuration, what is adapted, pooling, and what of the library comes behind it.
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str], dict[str, Any]]] = {
    "bert": ("Bert", {}, ["query", "value", "pooler.dense"], {"pooling_mode": "mean"}),
    "modernbert": (
        "ModernBert",
        {"num_hidden_layers": 2, "global_attn_every_n_layers": 2, "local_attention": 8},
        ["Wqkv", "Wo"],
        {"pooling_mode": "cls"},
    ),
    "qwen3": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 8},
        ["q_proj", "down_proj"],
        {"pooling_mode": "lasttoken"},
    ),
}


def make(family: str, folder: Path) -> tuple[SentenceTransformer, Path]:
    """A pipeline that the library itself saved, and an adapter for its model."""
    kind, more, targets, pooling = FAMILIES[family]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    sizes = {"vocab_size": len(vocab), "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 40}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **more}, pad_token_id=0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder / "model")
    (folder / "model/vocab.txt").write_text("\n".join(vocab))
    words = transformers.BertTokenizer.from_pretrained(folder / "model", do_lower_case=True)
    words.save_pretrained(folder / "model")
    model = Transformer(str(folder / "model"), max_seq_length=LIMIT)
    pooled = Pooling(32, **pooling)
    pipeline = SentenceTransformer(modules=[model, pooled, Dense(32, 12), Normalize()])
    pipeline.save_pretrained(str(folder / "base"), create_model_card=False)
    told = LoraConfig(r=3, lora_alpha=12, target_modules=targets, task_type="FEATURE_EXTRACTION")
    adapted = get_peft_model(
        getattr(transformers, f"{kind}Model").from_pretrained(folder / "base"), told
    )
    randomize(adapted)
    for name, factor in adapted.named_parameters():
        if "pooler" in name and "lora_B" in name:  # all-linear has it, and no loss reaches it
            torch.nn.init.zeros_(factor)
    adapted.save_pretrained(folder / "run")
    return SentenceTransformer(str(folder / "base"), device="cpu"), folder / "run"


def far(found: Any, truth: Any) -> float:
    return float(np.abs(np.asarray(found) - np.asarray(truth)).max())


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(n, marks=pytest.mark.further) for n in [*FAMILIES][1:])]
)
def test_folders_and_vectors_are_the_librarys(family: str, tmp_path: Path) -> None:
    pipeline, run = make(family, tmp_path)
    plain = pipeline.encode(TEXTS)
    inner = pipeline[0].auto_model
    pipeline[0].auto_model = PeftModel.from_pretrained(inner, str(run)).eval()
    truth = pipeline.encode(TEXTS)
    assert far(truth, plain) > 100 * BOUND  # the control of all that follows

    base = tmp_path / "base"
    merge(read_run(run), tmp_path / "merged", base=base)
    opened = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert far(opened.encode(TEXTS), truth) <= BOUND
    assert opened.max_seq_length == LIMIT
    assert verify(read_run(run), tmp_path / "merged", base).passed

    write_onnx(base, tmp_path / "onnx", adapters={"tuned": read_run(run)})
    encoder = Encoder(tmp_path / "onnx")
    assert far(encoder.embed(TEXTS, "tuned"), truth) <= BOUND
    assert far(encoder.embed(TEXTS), plain) <= BOUND
    with pytest.raises(EngineError, match="too long"):  # the library would cut the text
        encoder.embed(["bread " * LIMIT])
    other = "mean" if FAMILIES[family][3]["pooling_mode"] != "mean" else "cls"
    assert far(encoder.embed(TEXTS, "tuned", pooling=other)[:, :12], truth) > 100 * BOUND


@pytest.mark.parametrize(
    ("family", "named", "prefix"),
    [
        pytest.param("qwen3", "Qwen3ForCausalLM", "", marks=pytest.mark.further),
        ("bert", "BertForMaskedLM", ""),
        pytest.param("qwen3", "Qwen3ForCausalLM", "model.", marks=pytest.mark.further),
        pytest.param("bert", "BertForMaskedLM", "bert.", marks=pytest.mark.further),
    ],
)
def test_a_base_that_is_saved_with_its_head_is_an_embedder(
    family: str, named: str, prefix: str, tmp_path: Path
) -> None:
    """As Qwen3-Embedding, whose class has a head that is tied, and whose tensors have no prefix, or
    all-mpnet-base-v2, whose class fills in words; alone, with adapters that say their task or do
    not, merged, and for both engines."""
    pipeline, run = make(family, tmp_path)
    base, silent = tmp_path / "base", tmp_path / "silent"
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": [named], "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    held = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    save_file(held, base / "model.safetensors", {"format": "pt"})
    told = json.loads((run / "adapter_config.json").read_text())
    shutil.copytree(run, silent)
    (silent / "adapter_config.json").write_text(json.dumps({**told, "task_type": None}))
    plain = pipeline.encode(TEXTS)
    inner = pipeline[0].auto_model
    pipeline[0].auto_model = PeftModel.from_pretrained(inner, str(run)).eval()
    truth = pipeline.encode(TEXTS)

    assert open_base(base).task == "feature-extraction"
    write_onnx(base, tmp_path / "alone")
    assert far(Encoder(tmp_path / "alone").embed(TEXTS), plain) <= BOUND
    adapters = {"tuned": read_run(run), "silent": read_run(silent)}
    write_onnx(base, tmp_path / "onnx", adapters=adapters)
    encoder = Encoder(tmp_path / "onnx")
    for name in adapters:
        assert far(encoder.embed(TEXTS, name), truth) <= BOUND
    assert far(encoder.embed(TEXTS), plain) <= BOUND
    write_onnx(base, tmp_path / "silently", run=read_run(silent))
    assert far(Encoder(tmp_path / "silently").embed(TEXTS), truth) <= BOUND
    for name, path in (("run", run), ("silent", silent)):
        merge(read_run(path), tmp_path / f"merged {name}", base=base)
        opened = SentenceTransformer(str(tmp_path / f"merged {name}"), device="cpu")
        assert far(opened.encode(TEXTS), truth) <= BOUND
        assert verify(read_run(path), tmp_path / f"merged {name}", base).passed
        assert open_base(tmp_path / f"merged {name}").task == "feature-extraction"
    (pool,) = plan_fleet(discover(tmp_path, str(base))).pools
    assert pool.task == "feature-extraction"
    if family == "qwen3":  # vLLM's class that fills in words is not adapted
        assert {"run", "silent"} <= pool.ranks.keys()


def test_a_decoders_run_on_an_embedders_base_is_served_beside_it(tmp_path: Path) -> None:
    _, run = make("qwen3", tmp_path)
    root = tmp_path / "served"
    shutil.copytree(tmp_path / "base", root / "base")
    config = json.loads((root / "base/config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    (root / "base/config.json").write_text(json.dumps(config))
    shutil.copytree(run, root / "embeds")
    base = transformers.Qwen3ForCausalLM.from_pretrained(root / "base")
    told = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    live: Any = get_peft_model(base, told)
    randomize(live)
    live.eval().save_pretrained(root / "decodes")
    found = make_offer(root, str(root / "base"), False, print)
    assert found.problems == {}
    tasks = {model.name: model.task for model in found.models}
    embeds, decodes = "feature-extraction", "causal-lm"
    assert tasks == {"base": embeds, "embeds": embeds, "decodes": decodes}
    (graph,) = [graph for graph in found.graphs if graph.task == decodes]
    (model,) = [model for model in found.models if model.task == decodes]
    assert model.adapter is not None
    decoder = Decoder(graph.folder)
    decoder.add_adapter("decodes", model.adapter)
    for row in ([7, 9, 11, 6, 20, 8], [5, 6, 21], [*range(5, 21)]):
        with torch.inference_mode():
            truth = live(input_ids=torch.tensor([row])).logits[0, -1]
            with live.disable_adapter():
                plain = live(input_ids=torch.tensor([row])).logits[0, -1]
        assert far(decoder.batch([row], "decodes").prefill()[0], truth) <= BOUND
        assert far(truth, plain) > 100 * BOUND  # the control


@pytest.mark.parametrize("old", [False, True], ids=["today", "before 5"])
def test_an_adapter_of_the_whole_pipeline(old: bool, tmp_path: Path) -> None:
    """PEFT around the pipeline writes names that go through it, which its own model does not have:
    read all the same, and `lint` says that PEFT would leave them out."""
    pipeline, _ = make("bert", tmp_path)
    base, run = tmp_path / "base", tmp_path / "whole"
    plain = pipeline.encode(TEXTS)
    live = get_peft_model(
        pipeline, LoraConfig(r=3, lora_alpha=12, target_modules=FAMILIES["bert"][2])
    )
    randomize(live)
    truth = live.eval().base_model.model.encode(TEXTS)
    assert far(truth, plain) > 100 * BOUND
    live.save_pretrained(run)
    file = run / "adapter_model.safetensors"
    tensors = load_file(file)
    assert all(".0.model." in key for key in tensors)
    if old:
        save_file({k.replace(".0.model.", ".0.auto_model."): t for k, t in tensors.items()}, file)
    found = read_run(run, ReadOptions(base=base))
    assert not found.warnings
    merge(found, tmp_path / "merged", base=base)
    write_adapter(found, tmp_path / "adapter", base=base)
    opened = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert far(opened.encode(TEXTS), truth) <= BOUND
    assert verify(found, tmp_path / "merged", base).passed

    def computes(folder: Path) -> bool:
        inner = SentenceTransformer(str(base), device="cpu")
        inner[0].auto_model = PeftModel.from_pretrained(inner[0].auto_model, str(folder)).eval()
        return far(inner.encode(TEXTS), truth) <= BOUND

    for folder, right in ((tmp_path / "adapter", True), (run, False)):
        checks = {each.check for each in lint(folder, open_base(base), ["peft"])}
        assert computes(folder) is right and ("other-name" in checks) is not right


def test_texts_in_lower_case(tmp_path: Path) -> None:
    """As the pipeline's `do_lower_case` has them read, whatever the tokenizer does."""
    make("bert", tmp_path)
    base = tmp_path / "base"
    change(base / "tokenizer_config.json", do_lower_case=False)
    cased = SentenceTransformer(str(base), device="cpu").encode(TEXTS)
    change(base / "sentence_bert_config.json", do_lower_case=True)
    truth = SentenceTransformer(str(base), device="cpu").encode(TEXTS)
    assert far(truth, cased) > 100 * BOUND
    write_onnx(base, tmp_path / "onnx")
    assert far(Encoder(tmp_path / "onnx").embed(TEXTS), truth) <= BOUND


@pytest.mark.parametrize("width", [pytest.param(12, marks=pytest.mark.further), 32])
def test_dense_layers_beside_what_they_read(width: int, tmp_path: Path) -> None:
    make("bert", tmp_path)
    dense = Dense(32, width, use_residual=True)
    model = [Transformer(str(tmp_path / "model")), Pooling(32), dense, Normalize()]
    SentenceTransformer(modules=model).save_pretrained(str(tmp_path / "other"))
    truth = SentenceTransformer(str(tmp_path / "other"), device="cpu").encode(TEXTS)
    write_onnx(tmp_path / "other", tmp_path / "onnx")
    assert far(Encoder(tmp_path / "onnx").embed(TEXTS), truth) <= BOUND


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a pipeline as the library saves it."""
    folder = tmp_path_factory.mktemp("pipeline")
    make("bert", folder)
    write_onnx(folder / "base", folder / "onnx")
    assert Encoder(folder / "onnx").pipeline.normalized
    return folder / "onnx"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}),
        ("2_Dense/config.json", {"module_output_name": "other"}),
        ("3_Normalize/config.json", {"module_input_name": "token_embeddings"}),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 4}}}),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}),
        ("sentence_bert_config.json", {"modality_config": {"message": {"method": "forward"}}}),
    ],
)
def test_what_else_a_module_says_is_refused(
    graph: Path, file: str, said: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(graph, tmp_path / "onnx")
    change(tmp_path / "onnx" / file, **said)
    with pytest.raises(EngineError, match=next(iter(said))):
        _ = Encoder(tmp_path / "onnx").pipeline


@pytest.mark.parametrize(
    ("labels", "name", "today"),
    [pytest.param(1, "Tanh", True, marks=pytest.mark.further), (3, "Sigmoid", False)],
)
def test_a_rerankers_own_activation(labels: int, name: str, today: bool, tmp_path: Path) -> None:
    make("bert", tmp_path)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "model", num_labels=labels
    )
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "model")
    live = CrossEncoder(
        str(tmp_path / "model"), activation_fn=getattr(torch.nn, name)(), device="cpu"
    )
    base = tmp_path / "today"  # as the library saves it, and as it did before version 6
    live.save_pretrained(str(base))
    if not today:
        (base / "config_sentence_transformers.json").unlink()
        said = {"activation_fn": f"torch.nn.modules.activation.{name}"}
        change(base / "config.json", sentence_transformers=said)
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    truth = np.asarray(live.predict(pairs)).reshape(len(pairs), labels)
    write_onnx(base, tmp_path / "onnx")
    encoder = Encoder(tmp_path / "onnx")
    logits = np.stack([np.array(each.logits, np.float32) for each in encoder.classify(pairs)])
    assert far(encoder.probabilities(logits), truth) <= BOUND
    assert far(logits, truth) > 100 * BOUND
    (file,) = (each for each in (tmp_path / "onnx").glob("*.json") if name in each.read_text())
    file.write_text(file.read_text().replace(f"activation.{name}", "activation.ELU"))
    with pytest.raises(EngineError, match="activation"):
        Encoder(tmp_path / "onnx").probabilities(logits)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
