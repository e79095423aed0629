"""What lies beside a base's weights: what goes along with a merged model, and what stays behind.

A sentence-transformers folder is read here as that library reads it: `modules.json` in order, each
module from the sub-folder it names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
)

from converters.errors import BaseError
from converters.model.base import open_base
from converters.targets.onnx.plan import plan_onnx
from dora_serve import merge, read_run
from tests.conftest import MODELS, randomize, tiny_llama

INPUTS = {
    "input_ids": torch.randint(3, 80, (3, 9), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 3 + [0] * 6]),
}
PIPELINE = {
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def pipeline(folder: Path, seed: int = 1, kind: str = "sentence_transformers.models") -> None:
    """The files of a pipeline that ends in vectors of 8 numbers; its last module has no folder."""
    names = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    names.append(("3_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{kind}.{name}"}
        for i, (path, name) in enumerate(names)
    ]
    put(folder / "modules.json", modules)
    put(folder / "sentence_bert_config.json", {"max_seq_length": 32})
    put(folder / "config_sentence_transformers.json", {"prompts": {"query": "q: "}})
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    put(folder / "1_Pooling" / "config.json", pooling)
    put(folder / "2_Dense" / "config.json", {"in_features": 32, "out_features": 8})
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "linear.weight": torch.randn(8, 32, generator=generator),
        "linear.bias": torch.ones(8),
    }
    save_file(weights, folder / "2_Dense" / "model.safetensors")


def vectors(folder: Path, model: Any = None) -> torch.Tensor:
    """What the pipeline in `folder` makes of INPUTS, with the Transformer in it or `model`."""
    values = torch.zeros(0)
    for module in json.loads((folder / "modules.json").read_text()):
        kind, own = module["type"].rpartition(".")[2], folder / module["path"]
        if kind == "Transformer":
            model = model or BertModel.from_pretrained(own)
            with torch.no_grad():
                values = model.eval()(**INPUTS).last_hidden_state
        elif kind == "Pooling":
            assert json.loads((own / "config.json").read_text())["pooling_mode_mean_tokens"]
            mask = INPUTS["attention_mask"].unsqueeze(-1)
            values = (values * mask).sum(1) / mask.sum(1)
        elif kind == "Dense":
            weights = load_file(own / "model.safetensors")
            assert json.loads((own / "config.json").read_text())["out_features"] == 8
            values = torch.tanh(values @ weights["linear.weight"].T + weights["linear.bias"])
        else:
            assert kind == "Normalize"
            values = torch.nn.functional.normalize(values)
    return values


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=80,
    )
    BertModel(config).save_pretrained(tmp_path / "base")
    pipeline(tmp_path / "base")
    return tmp_path / "base"


def lora_on(model: Any, out: Path, task: str, targets: tuple[str, ...]) -> Any:
    config = LoraConfig(r=3, lora_alpha=48, target_modules=list(targets), task_type=task)
    lora = get_peft_model(model, config)
    randomize(lora)
    lora.save_pretrained(out)
    return lora.eval()


def embedding_run(base: Path, out: Path) -> Any:
    model = BertModel.from_pretrained(base)
    return lora_on(model, out, "FEATURE_EXTRACTION", ("query", "value"))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_pipeline_of_a_base_goes_along(tmp_path: Path, embedder: Path) -> None:
    embedding_run(embedder, tmp_path / "run")
    live = PeftModel.from_pretrained(BertModel.from_pretrained(embedder), str(tmp_path / "run"))
    truth = vectors(embedder, live.eval())
    assert float((vectors(embedder) - truth).abs().max()) > 1e-2
    written = merge(tmp_path / "run", tmp_path / "merged", base=embedder)
    assert written.warnings == ()
    assert float((vectors(tmp_path / "merged") - truth).abs().max()) < 1e-6
    assert files(tmp_path / "merged") >= PIPELINE


def test_json_of_others_beside_a_base_is_no_configuration(tmp_path: Path, embedder: Path) -> None:
    """all-MiniLM-L6-v2 has a list of its training data beside it, `data_config.json`."""
    put(embedder / "data_config.json", [{"name": "pairs", "lines": 3}])
    embedding_run(embedder, tmp_path / "run")
    assert merge(tmp_path / "run", tmp_path / "merged", base=embedder).warnings == ()
    assert "data_config.json" in files(tmp_path / "merged")


def test_a_pipeline_that_was_saved_with_the_run_takes_its_place(
    tmp_path: Path, embedder: Path
) -> None:
    live = embedding_run(embedder, tmp_path / "run")
    pipeline(tmp_path / "run", seed=2)
    put(tmp_path / "run" / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": 1})
    truth = vectors(tmp_path / "run", live)
    assert float((vectors(embedder, live) - truth).abs().max()) > 1e-2
    merge(tmp_path / "run", tmp_path / "merged", base=embedder)
    assert float((vectors(tmp_path / "merged") - truth).abs().max()) < 1e-6


def test_a_pipeline_stays_behind_where_the_run_is_for_another_task(
    tmp_path: Path, embedder: Path
) -> None:
    model = BertForSequenceClassification.from_pretrained(embedder)
    lora_on(model, tmp_path / "run", "SEQ_CLS", ("query",))
    written = merge(tmp_path / "run", tmp_path / "merged", base=embedder)
    assert not files(tmp_path / "merged") & PIPELINE
    (warning,) = written.warnings
    assert "1_Pooling" in warning and "2_Dense" in warning and "embeddings" in warning
    model, info = BertForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    lora_on(tiny_llama(), tmp_path / "run", "CAUSAL_LM", ("q_proj",))
    put(base / "tokenizer_config.json", {"from": "base"})
    put(base / "chat_template.jinja", "base")
    put(base / "additional_chat_templates" / "tool.jinja", "base's tool")
    return base


def test_further_chat_templates_go_along(tmp_path: Path, decoder: Path) -> None:
    written = merge(tmp_path / "run", tmp_path / "merged", base=decoder)
    assert written.warnings == ()
    template = tmp_path / "merged" / "additional_chat_templates" / "tool.jinja"
    assert template.read_text() == "base's tool"


def test_the_runs_tokenizer_brings_its_own_templates(tmp_path: Path, decoder: Path) -> None:
    put(tmp_path / "run" / "tokenizer_config.json", {"from": "run"})
    put(tmp_path / "run" / "additional_chat_templates" / "rag.jinja", "run's rag")
    merge(tmp_path / "run", tmp_path / "merged", base=decoder)
    found = {name for name in files(tmp_path / "merged") if name.endswith(".jinja")}
    assert found == {"additional_chat_templates/rag.jinja"}


def test_a_template_of_the_run_goes_along_and_half_a_tokenizer_does_not(
    tmp_path: Path, decoder: Path
) -> None:
    (tmp_path / "run" / "chat_template.jinja").write_text("run's")
    written = merge(tmp_path / "run", tmp_path / "merged", base=decoder)
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "run's"
    assert written.warnings == ()
    put(tmp_path / "run" / "tokenizer.json", {"from": "run"})
    written = merge(tmp_path / "run", tmp_path / "again", base=decoder)
    (warning,) = written.warnings
    assert "chat_template.jinja, tokenizer.json of the run stay behind" in warning
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "base"


def test_a_base_beside_the_current_folder_or_in_the_runs(
    tmp_path: Path, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of these is a link out of its folder, though one folder seems to hold the other."""
    run, link = tmp_path / "run", tmp_path / "run" / "linked"
    merge(run, tmp_path / "merged", base=decoder)
    monkeypatch.chdir(run)
    link.symlink_to(decoder)
    for number, base in enumerate((Path("..") / decoder.relative_to(tmp_path), link)):
        out = tmp_path / str(number)
        merge(Path(), out, base=base)
        assert files(out) == files(tmp_path / "merged")


def test_other_formats_of_the_base_and_stray_code_stay_behind(
    tmp_path: Path, decoder: Path
) -> None:
    put(decoder / "onnx" / "model.onnx", "weights of the base")
    put(decoder / "original" / "params.json", {})
    put(decoder / ".cache" / "x.json", {})
    put(decoder / "handler.py", "raise SystemExit('this must not run')")
    written = merge(tmp_path / "run", tmp_path / "merged", base=decoder)
    told = "\n".join(written.warnings)
    assert "onnx, original" in told and "handler.py" in told and ".cache" not in told
    assert not [n for n in files(tmp_path / "merged") if n.startswith(("onnx", "orig", ".", "h"))]


def remote(base: Path, where: str) -> None:
    if where == "pipeline":
        pipeline(base, kind="custom_st")
        put(base / "custom_st.py", "raise SystemExit('this must not run')")
    elif where == "sub-folder":
        pipeline(base)
        put(base / "1_Pooling" / "pool.py", "raise SystemExit('this must not run')")
    else:
        known = json.loads((base / where).read_text())
        put(base / where, {**known, "auto_map": {"AutoModel": "modeling_own.OwnModel"}})
        put(base / "modeling_own.py", "raise SystemExit('this must not run')")


@pytest.mark.parametrize(
    "where", ["config.json", "tokenizer_config.json", "pipeline", "sub-folder"]
)
def test_a_base_with_code_of_its_own_is_refused(tmp_path: Path, decoder: Path, where: str) -> None:
    remote(decoder, where)
    with pytest.raises(BaseError, match="code of its own") as error:
        merge(tmp_path / "run", tmp_path / "merged", base=decoder)
    assert error.value.file is not None and error.value.remedy and error.value.found
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["path", "parent", "folder", "file", "list"])
def test_a_pipeline_never_leads_out_of_its_folder(
    tmp_path: Path, embedder: Path, kind: str
) -> None:
    embedding_run(embedder, tmp_path / "run")
    secret = tmp_path / "secret"
    put(secret / "config.json", {"secret": 1})
    modules = json.loads((embedder / "modules.json").read_text())
    if kind in ("path", "parent"):
        modules[1]["path"] = {"path": str(secret), "parent": "../secret"}[kind]
        put(embedder / "modules.json", modules)
    elif kind == "folder":
        (embedder / "1_Pooling" / "config.json").unlink()
        (embedder / "1_Pooling").rmdir()
        (embedder / "1_Pooling").symlink_to(secret)
    elif kind == "file":
        (embedder / "1_Pooling" / "config.json").unlink()
        (embedder / "1_Pooling" / "config.json").symlink_to(secret / "config.json")
    else:
        put(embedder / "modules.json", {"not": "a list"})
    with pytest.raises(BaseError) as error:
        merge(tmp_path / "run", tmp_path / "merged", base=embedder)
    assert str(embedder) in str(error.value.file)
    assert not (tmp_path / "merged").exists()


def test_the_snapshot_of_a_hub_cache_is_no_link_out(tmp_path: Path, embedder: Path) -> None:
    embedding_run(embedder, tmp_path / "run")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(sorted(files(embedder))):
        (embedder / name).rename(blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        depth = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{depth}blobs/{number}")
    merge(tmp_path / "run", tmp_path / "merged", base=snapshot)
    assert files(tmp_path / "merged") >= PIPELINE
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))


@pytest.mark.parametrize(
    ("end", "ends", "told"),
    [("lamp", 2, True), ("lamp", [2, 83], False), ("</s>", 2, False)],
    ids=["another", "one of several", "the same"],
)
def test_another_end_of_texts_is_told(end: str, ends: Any, told: bool, tmp_path: Path) -> None:
    """Trainer takes the tokenizer's end into the live model's configuration, which no adapter
    holds: by the base's, what is merged writes on."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(MODELS / "tiny-llama-base", base)
    put(base / "generation_config.json", {"eos_token_id": ends})
    model = LlamaForCausalLM.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomize(peft)
    peft.save_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = end
    tokenizer.save_pretrained(run)
    report = merge(run, tmp_path / "out", base=base)
    assert told == any("83" in said and "eos_token_id" in said for said in report.warnings)
    graphs = plan_onnx(open_base(base), run=read_run(run))
    assert told == any("83" in said and "eos_token_id" in said for said in graphs.warnings)
    own = AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id
    known = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert told == (own not in (known if isinstance(known, list) else [known]))


@pytest.mark.parametrize(("pad", "told"), [("<mine>", True), (None, False)])
def test_another_token_that_fills_up_is_told(pad: str | None, told: bool, tmp_path: Path) -> None:
    """A reward model's score is read before the first pad, by the configuration of the base."""
    base, run = MODELS / "tiny-llama-base", tmp_path / "run"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
        model.resize_token_embeddings(len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    randomize(peft)
    peft.save_pretrained(run)
    tokenizer.save_pretrained(run)
    report = merge(run, tmp_path / "out", base=base)
    assert told == any("pad_token_id" in said for said in report.warnings)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    rows = tokenizer(["a dog", "the cat sat on the red mat"], padding=True, return_tensors="pt")
    with torch.no_grad():
        truth, ours = (each(**rows).logits for each in (peft.eval(), merged))
        assert told == (not torch.allclose(truth, ours, atol=1e-4))
        merged.config.pad_token_id = tokenizer.pad_token_id  # as the warning says
        assert torch.allclose(truth, merged(**rows).logits, atol=1e-4)
