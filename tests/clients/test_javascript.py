"""What is exported, in JavaScript: transformers.js in Node, and onnxruntime-web in a browser with
one adapter in the place of another; `make test-clients`."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from converters.model.base import open_base
from dora_serve import read_run, write_onnx
from tests.browser import chromium, watched
from tests.clients.test_clients import HERE, NODE, ROOT
from tests.conftest import MODELS
from tests.engines.encoders import live_rows, tiny_lora

CLASSES: dict[str, Any] = {
    "AutoModel": BertModel,
    "AutoModelForSequenceClassification": BertForSequenceClassification,
    "AutoModelForTokenClassification": BertForTokenClassification,
}
IDS = [2, 5, 6, 7, 3]
PAGE = """<!doctype html><link rel="icon" href="data:,"><script type="module">
import * as ort from "/modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { feedsOf, readAdapter } from "/docs/browser.js";
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
const read = async (name) => (await fetch(name)).arrayBuffer();
const weights = new Uint8Array(await read("/many/model.onnx.data"));
const data = [{ path: "model.onnx.data", data: weights }];
const graph = new Uint8Array(await read("/many/model.onnx"));
const session = await ort.InferenceSession.create(graph, { externalData: data });
const found = {};
for (const name of ["one", "two", "none", "one"]) {
  const adapter =
    name === "none" ? null : readAdapter(await read(`/many/adapters/${name}.onnx_adapter`));
  const ids = BigInt64Array.from(IDS.map(BigInt));
  const row = [1, ids.length];
  const feeds = { input_ids: new ort.Tensor("int64", ids, row) };
  feeds.attention_mask = new ort.Tensor("int64", ids.map(() => 1n), row);
  feeds.token_type_ids = new ort.Tensor("int64", ids.map(() => 0n), row);
  const more = feedsOf(ort, session, adapter);
  const { last_hidden_state: told } = await session.run({ ...feeds, ...more });
  found[name] = [...(found[name] ?? []), Array.from(told.data)];
}
window.found = found;
</script>"""


def save(folder: Path, cls: Any) -> Any:
    words = AutoTokenizer.from_pretrained(MODELS / "tiny-roberta-base")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        vocab_size=len(words), max_position_embeddings=40, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    model = cls(config).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model


def save_writer(folder: Path) -> Any:
    words = AutoTokenizer.from_pretrained(MODELS / "tiny-roberta-base")
    torch.manual_seed(0)
    config = BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.3,
        vocab_size=len(words), max_position_embeddings=40, forced_eos_token_id=None,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, decoder_start_token_id=2,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model


@pytest.mark.skipif(not (NODE / "@huggingface").exists(), reason="no transformers.js here")
def test_transformers_js_computes_the_same(tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(MODELS / "tiny-roberta-base")
    truth: dict[str, Any] = {}
    for name, cls in CLASSES.items():
        model = save(tmp_path / "bases" / name, cls)
        write_onnx(tmp_path / "bases" / name, tmp_path / "exported" / name)
        with torch.no_grad():
            told = model(**words("good film", return_tensors="pt"))
        truth[name] = getattr(told, "logits", None)
        if truth[name] is None:
            truth[name] = told.last_hidden_state
    model, name = save_writer(tmp_path / "bases" / "writes"), "AutoModelForSeq2SeqLM"
    write_onnx(tmp_path / "bases" / "writes", tmp_path / "exported" / name)
    more = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 1}
    truth[name] = model.generate(**words("good film", return_tensors="pt"), **more)
    assert len(set(truth[name][0].tolist())) > 3
    node = shutil.which("node") or "node"
    program = [node, HERE / "with_transformers.mjs", NODE, tmp_path / "exported"]
    words_ = [str(word) for word in (*program, *(f"{name}={name}" for name in truth))]
    done = subprocess.run(words_, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, expected in truth.items():
        assert found[name]["ids"] == words("good film")["input_ids"]
        assert found[name]["numbers"] == pytest.approx(expected.flatten().tolist(), abs=1e-4)
    assert len({str(each["numbers"]) for each in found.values()}) == len(truth)


@contextmanager
def files(**folders: Path) -> Iterator[str]:
    """An address below which each folder lies under its name."""

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = {  # noqa: RUF012
            **SimpleHTTPRequestHandler.extensions_map,
            ".mjs": "text/javascript",
        }

        def translate_path(self, path: str) -> str:
            _, name, *rest = path.partition("?")[0].split("/")
            return str(folders[name].joinpath(*rest)) if name in folders else "/nowhere"

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.mark.skipif(not (NODE / "onnxruntime-web").exists(), reason="no onnxruntime-web here")
def test_a_browser_takes_one_adapter_for_another(tmp_path: Path) -> None:
    save(tmp_path / "base", BertModel)
    base, many = open_base(tmp_path / "base"), tmp_path / "many"
    kinds = {"one": ["query", "value"], "two": ["key", "output.dense"]}
    runs = {
        name: read_run(
            tiny_lora(tmp_path / "base", "BertModel", tmp_path / name, None, target_modules=modules)
        )
        for name, modules in kinds.items()
    }
    write_onnx(base, many, adapters=runs)
    graph = onnx.load(many / "model.onnx", load_external_data=False)  # as docs/browser.md says
    inputs = {each.name for each in graph.graph.input}
    kept = [each for each in graph.graph.initializer if each.name not in inputs]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    onnx.save(graph, many / "model.onnx")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text(PAGE.replace("IDS", json.dumps(IDS), 1))
    places = {"modules": NODE, "docs": ROOT / "docs", "many": many, "page": tmp_path / "page"}
    with files(**places) as url, chromium() as browser, watched(browser) as (page, seen):
        page.goto(f"{url}/page/index.html")
        page.wait_for_function("window.found || null", timeout=60_000)
        found = page.evaluate("window.found")
        assert seen.troubles == []
    for name, run in runs.items():
        (expected,) = live_rows(run, base, [IDS])
        for told in found[name]:  # the first of them before the other was there, and behind it
            assert told == pytest.approx(expected["last_hidden_state"].ravel().tolist(), abs=1e-4)
    (bare,) = live_rows(runs["one"], base, [IDS], attached=False)
    assert found["none"][0] == pytest.approx(bare["last_hidden_state"].ravel().tolist(), abs=1e-4)
    assert found["none"][0] != pytest.approx(found["two"][0], abs=1e-2)
    assert len(found["one"]) == 2
