"""What `up` finds, prepares and prints."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from subprocess import run

import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
)

from converters.errors import DoraExportError
from converters.files.tensors import numel
from converters.model.base import open_base
from dora_serve import read_run, write_onnx
from dora_serve.onnxruntime.decoder import Decoder
from dora_serve.server.options import ServerOptions
from dora_serve.server.prepare import precision
from dora_serve.server.prepare.child import make_offer
from dora_serve.server.prepare.make import make_offer as make
from dora_serve.server.up import table, up
from tests.conftest import MODELS
from tests.server.conftest import BASE, DOWN, SECOND, started

LLAMA = "Checkpoint/Tiny_Llama/Lora_Rank=8"
DOWN_PATH = f"{LLAMA}/Count_Down/{DOWN}"


def test_dry_run_says_what_would_be_served_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    assert up(MODELS, None, "127.0.0.1", 8000, "key", dry_run=True) == 0
    told = capsys.readouterr().out
    assert f"{DOWN}" in told
    assert "run of tiny-llama-base, dora" in told
    assert 'curl http://127.0.0.1:8000/classify -H "Authorization' in told
    assert not list((tmp_path / "cache").rglob("*.onnx"))


def test_nothing_to_serve(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(DoraExportError, match="nothing here can be served"):
        up(tmp_path, None, "127.0.0.1", 8000, None, dry_run=True)
    with pytest.raises(DoraExportError, match="no such folder"):
        up(tmp_path / "none", None, "127.0.0.1", 8000, None, dry_run=True)


def test_what_cannot_be_served_does_not_hinder_the_rest(tmp_path: Path) -> None:
    for name in (BASE, "runs"):
        shutil.copytree(MODELS / name, tmp_path / name)
    weights = tmp_path / "runs" / DOWN_PATH / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    plan = make_offer(tmp_path, None, dry=True)
    assert [model.name for model in plan.models] == [BASE, SECOND]
    assert str(weights) in plan.problems[DOWN]


def test_dry_run_tells_what_could_not_be_made(tmp_path: Path) -> None:
    """Neither a model that fills gaps nor a decoder that sees images is served; a translator is."""
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 39, "decoder_start_token_id": 39, "eos_token_id": 0}
    MarianMTModel(MarianConfig(**small, **heads, **tokens)).save_pretrained(tmp_path / "marian")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**size, intermediate_size=16)).save_pretrained(tmp_path / "fills")
    text = {**size, "num_key_value_heads": 1, "intermediate_size": 16, "head_dim": 8}
    sees = {**size, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config={**text, "vocab_size": 300}, vision_config=sees)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma")
    offer = make_offer(tmp_path, None, dry=True)
    assert [(model.name, model.task) for model in offer.models] == [("marian", "seq2seq-lm")]
    assert "for no task that is served" in offer.problems["fills"]
    assert "models of more than text" in offer.problems["gemma"]


def test_a_cache_that_does_not_stay_in_place_is_not_served(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    write_onnx(MODELS / BASE, folder)
    config = folder / "genai_config.json"
    said = json.loads(config.read_text())
    said["search"]["past_present_share_buffer"] = False
    config.write_text(json.dumps(said))
    plan = make_offer(tmp_path, None, dry=True)
    assert plan.models == []
    assert "cannot be shared" in plan.problems["half"]


def test_a_base_alone_takes_runs_later_and_onnx_folders_are_served_as_they_are(
    tmp_path: Path,
) -> None:
    root = tmp_path / "models"
    shutil.copytree(MODELS / BASE, root / BASE)
    shutil.copytree(MODELS / "runs", root / ".later")
    second = read_run(MODELS / "runs" / LLAMA / "Every_Second" / SECOND)
    write_onnx(MODELS / BASE, root / "merged", run=second)
    asked = {"prompt": "count : nine", "temperature": 0}
    with started(root, tmp_path) as server, server.http as http:

        def text(model: str) -> str:
            answer = http.post("/v1/completions", json={"model": model, **asked})
            return str(answer.json()["choices"][0]["text"])

        kinds = {each["id"]: each["kind"] for each in http.get("/dora/models").json()["data"]}
        assert kinds == {BASE: "base", "merged": "merged"}
        assert text("merged").startswith(" eleven thirteen")
        assert text(BASE).startswith(" ten eleven")
        body = {"lora_name": "later", "lora_path": f".later/{DOWN_PATH}"}
        loaded = http.post("/v1/load_lora_adapter", json=body)
        assert loaded.status_code == 200, loaded.text
        assert text("later").startswith(" eight seven")
        assert text(BASE).startswith(" ten eleven")


def test_the_precision_is_said_or_what_the_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a graph of its own in the cache; with an adapter made for it."""
    root, log = tmp_path / "root", DOWN_PATH.replace("Checkpoint", "Log")
    for path in (DOWN_PATH, log):
        shutil.copytree(MODELS / "runs" / path, root / "runs" / path)
    shutil.copytree(MODELS / BASE, root / BASE)
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    weights = sum(map(numel, open_base(root / BASE).tensors.values()))

    def made(asked: str) -> tuple[str, str]:
        offer = make(root.resolve(), None, False, lambda _: None, asked)
        assert not offer.problems and [model.name for model in offer.models] == [BASE, DOWN]
        certificate = json.loads(Path(offer.graphs[0].folder, "dora_export.json").read_text())
        done = Decoder(offer.graphs[0].folder)
        done.add_adapter("down", offer.models[1].adapter or "")
        assert done.generate(["count : nine"], "down")[0].text.startswith(" eight seven")
        return certificate["precision"], offer.graphs[0].folder

    graphs = dict(made(each) for each in ("fp32", "int8", "int4"))
    assert graphs.keys() == {"fp32", "int8", "int4"} and len({*graphs.values()}) == 3
    for share, expected in ((4.0, "fp32"), (3.9, "int8"), (1.25, "int8"), (1.2, "int4")):
        monkeypatch.setattr(precision, "memory", lambda room=share: int(4 * room * weights))
        assert made("auto") == (expected, graphs[expected])


def test_the_server_imports_no_torch() -> None:
    """Beside torch, ONNX Runtime reads several times slower."""
    code = (
        "import json, sys, dora_serve.server.up, dora_serve.server.app;"
        "import dora_serve.server.prepare.child;"
        "print(json.dumps([name in sys.modules for name in ('torch', 'onnx', 'transformers')]))"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False, False]


def test_a_damaged_cache_is_made_anew_and_never_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the graph a flipped bit, in the adapter a file that is gone: each is made anew once."""
    root, cache = tmp_path / "root", tmp_path / "cache"
    monkeypatch.setenv("DORA_SERVE_CACHE", str(cache))
    shutil.copytree(MODELS / BASE, root / BASE)
    shutil.copytree(MODELS / "runs" / DOWN_PATH, root / "runs" / DOWN_PATH)
    log = DOWN_PATH.replace("Checkpoint", "Log")
    shutil.copytree(MODELS / "runs" / log, root / "runs" / log)
    said: list[str] = []
    first = make(root.resolve(), None, False, said.append)
    assert not first.problems
    assert len(said) == 2
    assert make(root.resolve(), None, False, said.append) == first
    assert len(said) == 2

    (graph,) = (Path(each.folder) for each in first.graphs)
    (adapter,) = (Path(m.adapter) for m in first.models if m.adapter)
    weights = max(graph.iterdir(), key=lambda path: path.stat().st_size)
    whole = {path: path.read_bytes() for path in (weights, adapter)}
    flipped = bytearray(whole[weights])
    flipped[len(flipped) // 2] ^= 0x40
    weights.write_bytes(flipped)
    (adapter.parent.parent / "modules.json").unlink()
    capsys.readouterr()
    again = make(root.resolve(), None, False, said.append)
    assert again == first
    assert len(said) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if "made anew" in line]
    assert len(lines) == 2
    assert {path: path.read_bytes() for path in whole} == whole


@pytest.mark.parametrize("task", ["decodes", pytest.param("embeds", marks=pytest.mark.further)])
def test_the_command_to_try_it_works_without_a_tokenizer(task: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    if task == "decodes":
        shutil.copytree(MODELS / BASE, models / BASE, ignore=shutil.ignore_patterns("*token*"))
    else:
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertModel(BertConfig(**size)).save_pretrained(models / "embedder")
    with started(models, tmp_path) as running:
        told = table(make_offer(models, None, dry=True), running.url, False).splitlines()[-1]
        done = run(["bash", "-c", f"{told} --fail-with-body"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    "given",
    [pytest.param(False, marks=pytest.mark.further, id="own"), pytest.param(True, id="given")],
)
def test_a_model_that_chats_is_shown_with_a_chat(given: bool, tmp_path: Path) -> None:
    """The command that is printed is answered, and the dry run prints the same one."""
    models, template = tmp_path / "models", tmp_path / "chat.jinja"
    shutil.copytree(MODELS / BASE, models / BASE)
    (models / "broken").mkdir()
    (models / "broken" / "adapter_config.json").write_text("{")
    place = template if given else models / BASE / "chat_template.jinja"
    place.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    options = ServerOptions(chat_template=str(template) if given else None)
    with started(models, tmp_path, None, options) as running:
        offer = make_offer(models, None, dry=True)
        told = table(offer, running.url, False, chats=given).strip().splitlines()
        done = run(["bash", "-c", f"{told[-1]} --fail-with-body"], capture_output=True, text=True)
    assert f"  {BASE}  /v1/chat/completions  base" in told
    assert "  1 served, 1 not: see above" in told
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["object"] == "chat.completion"
    plain = table(make_offer(MODELS / BASE, None, dry=True), running.url, False)
    assert "/v1/completions" in plain and "not: see above" not in plain
    assert '"prompt": "Hello"' in plain  # in no words of another model's training
