"""Vectors and classes of texts and tokens, and models that read two texts at once, are those of the
live model."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)

from dora_serve.server.options import ServerOptions
from dora_serve.server.routes import encoding, invoking
from dora_serve.server.wire import answers, pieces
from dora_serve.server.wire.errors import ApiError
from dora_serve.server.wire.requests import ClassifyRequest, EmbeddingRequest
from tests.server.conftest import Server, started
from tests.server.parity_models import save_encoder

CROSS, IDENTITY, TOKENS, EMBEDS = "cross", "identity", "tokens", "embeds"
TEXTS = ["good film", "a dull and bad film", "bad"]
FUNCTION = "torch.nn.modules.linear.Identity"


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pooled")
    root = folder / "models"
    one: Any = {
        "layers": 1,
        "num_labels": 1,
        "type_vocab_size": 1,
    }  # RoBERTa's own have one type of token
    save_encoder(root / CROSS, RobertaForSequenceClassification, **one)
    function: Any = {"sbert_ce_default_activation_function": FUNCTION}
    save_encoder(root / IDENTITY, RobertaForSequenceClassification, **one, **function)
    labels = {0: "none", 1: "name", 2: "place"}
    save_encoder(root / TOKENS, RobertaForTokenClassification, 1, num_labels=3, id2label=labels)
    save_encoder(root / EMBEDS, RobertaModel, 1)
    with started(root, folder, None, ServerOptions(threads=1)) as running:
        yield running


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Models of 10,000 labels, of texts and of tokens."""
    folder = tmp_path_factory.mktemp("labelled")
    root = folder / "models"
    save_encoder(root / CROSS, RobertaForSequenceClassification, 1, num_labels=10_000)
    save_encoder(root / TOKENS, RobertaForTokenClassification, 1, num_labels=10_000)
    with started(root, folder, None, ServerOptions(threads=1)) as running:
        yield running


@pytest.mark.further
@pytest.mark.parametrize(
    ("path", "body", "fine"),
    [
        ("/classify", {"model": CROSS}, 20),
        ("/pooling", {"model": CROSS}, 20),
        ("/pooling", {"model": TOKENS, "encoding_format": "base64"}, 8),
    ],
)
def test_more_numbers_than_an_answer_has(labelled: Server, path: str, body: Any, fine: int) -> None:
    """`/classify` told all, gigabytes of them, and `/pooling` computed and held all first."""
    assert len(ask(labelled, path, **body, input=["a good film"] * fine)["data"]) == fine
    with labelled.http as http:
        refused = http.post(path, json={**body, "input": ["a good film"] * 256})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_numbers")


def test_the_first_number_too_many_is_refused() -> None:
    """So that those of the texts behind it are never held."""
    most = encoding._NUMBERS
    counting = encoding._counted(lambda row: row["logits"])
    half = {"logits": np.broadcast_to(np.float32(0), (most // 2,))}
    for _ in range(2):
        assert counting(half) is half["logits"]
    with pytest.raises(ApiError, match="fewer texts"):
        counting({"logits": np.zeros(1)})


def ask(server: Server, path: str, **body: Any) -> Any:
    with server.http as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def live(server: Server, name: str, head: Any, *texts: str) -> torch.Tensor:
    """The live model's logits, or last hidden states, for a text or a pair."""
    folder: Path = server.root / name
    codes = AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = head.from_pretrained(folder).eval()(**codes)[0]
    return found[0]


def test_a_model_that_reads_both(pooled: Server) -> None:
    head = RobertaForSequenceClassification
    query = TEXTS[0]
    logits = [live(pooled, CROSS, head, query, text).item() for text in TEXTS]
    expected = torch.sigmoid(torch.tensor(logits)).tolist()
    told = ask(pooled, "/score", model=CROSS, text_1=query, text_2=TEXTS)
    assert [each["score"] for each in told["data"]] == pytest.approx(expected, abs=1e-5)
    swapped = torch.sigmoid(live(pooled, CROSS, head, TEXTS[1], query)).item()
    assert abs(swapped - expected[1]) > 1e-3  # the control: the order of the two matters
    pairs = ask(pooled, "/score", model=CROSS, text_1=[TEXTS[1]], text_2=[query])
    assert pairs["data"][0]["score"] == pytest.approx(swapped, abs=1e-5)
    same: Any = {"model": IDENTITY, "text_1": query, "text_2": TEXTS}
    raw = ask(pooled, "/score", **same)
    assert [each["score"] for each in raw["data"]] == pytest.approx(logits, abs=1e-5)
    bare = ask(pooled, "/score", **{**same, "model": CROSS}, use_activation=False)
    assert [each["score"] for each in bare["data"]] == pytest.approx(logits, abs=1e-5)
    ranked = ask(pooled, "/rerank", model=CROSS, query=query, documents=TEXTS)["results"]
    assert [each["index"] for each in ranked] == np.argsort(-np.array(expected)).tolist()
    assert ranked[0]["relevance_score"] == pytest.approx(max(expected), abs=1e-5)
    codes = AutoTokenizer.from_pretrained(pooled.root / CROSS)
    assert told["usage"]["prompt_tokens"] == sum(len(codes(query, t)["input_ids"]) for t in TEXTS)


def test_the_class_of_one_label(pooled: Server) -> None:
    logit = live(pooled, CROSS, RobertaForSequenceClassification, TEXTS[1])
    (one,) = ask(pooled, "/classify", model=CROSS, input=TEXTS[1])["data"]
    assert one["probs"] == pytest.approx(torch.sigmoid(logit).tolist(), abs=1e-5)
    (raw,) = ask(pooled, "/classify", model=CROSS, input=TEXTS[1], use_activation=False)["data"]
    assert raw["probs"] == pytest.approx(logit.tolist(), abs=1e-5)
    (same,) = ask(pooled, "/pooling", model=CROSS, input=TEXTS[1])["data"]
    assert same["data"] == pytest.approx(one["probs"], abs=1e-6)


def test_the_class_of_every_token(pooled: Server) -> None:
    logits = [live(pooled, TOKENS, RobertaForTokenClassification, text) for text in TEXTS]
    told = ask(pooled, "/pooling", model=TOKENS, input=TEXTS)["data"]
    raw = ask(
        pooled, "/pooling", model=TOKENS, input=TEXTS, task="token_classify", use_activation=False
    )["data"]
    for one, bare, expected in zip(told, raw, logits, strict=True):
        assert np.array(one["data"]) == pytest.approx(expected.softmax(-1).numpy(), abs=1e-5)
        assert np.array(bare["data"]) == pytest.approx(expected.numpy(), abs=1e-5)
    assert len({len(each["data"]) for each in told}) > 1


def test_vectors(pooled: Server) -> None:
    states = live(pooled, EMBEDS, RobertaModel, TEXTS[1])
    mean = states.mean(0)
    body: Any = {"model": EMBEDS, "input": TEXTS[1]}
    (raw,) = ask(pooled, "/pooling", **body, use_activation=False)["data"]
    assert raw["data"] == pytest.approx(mean.tolist(), abs=1e-5)
    (unit,) = ask(pooled, "/pooling", **body, task="embed", dimensions=5)["data"]
    assert unit["data"] == pytest.approx((mean[:5] / mean[:5].norm()).tolist(), abs=1e-5)
    (every,) = ask(pooled, "/pooling", **body, task="token_embed", encoding_format="base64")["data"]
    found = np.frombuffer(base64.b64decode(every["data"]), "<f4").reshape(states.shape)
    assert found == pytest.approx(torch.nn.functional.normalize(states).numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/pooling", {"model": EMBEDS, "input": "a", "task": "classify"}, "task"),
        ("/pooling", {"model": TOKENS, "input": "a", "dimensions": 2}, "dimensions"),
        ("/pooling", {"model": EMBEDS, "input": "a", "dimensions": 99}, "dimensions"),
        ("/classify", {"model": TOKENS, "input": "a"}, "model"),
        ("/v1/embeddings", {"model": CROSS, "input": "a"}, "model"),
        ("/score", {"model": TOKENS, "text_1": "a", "text_2": "b"}, "model"),
        ("/score", {"model": CROSS, "text_1": "a", "text_2": "good " * 60}, "input"),
        (
            "/pooling",
            {"model": EMBEDS, "input": TEXTS * 80, "task": "token_embed"},
            None,
        ),
    ],
)
def test_what_is_refused(pooled: Server, path: str, body: Any, param: str | None) -> None:
    with pooled.http as http:
        answer = http.post(path, json=body)
    assert answer.status_code == (400 if param else 200), answer.text
    if param:
        assert answer.json()["error"]["param"] == param


def test_what_is_too_long_loses_its_end(pooled: Server) -> None:
    """As transformers, sentence-transformers and vLLM cut what an encoder reads, with what belongs
    around it; a prompt that is gone on with loses its begin."""
    text, query = "good bad film a dull and bad film", "a film"
    cut: Any = {"truncation": True, "max_length": 6, "return_tensors": "pt"}

    def codes(name: str, *texts: str) -> Any:
        return AutoTokenizer.from_pretrained(pooled.root / name)(*texts, **cut)

    with torch.no_grad():
        head = RobertaForSequenceClassification.from_pretrained(pooled.root / CROSS).eval()
        score = torch.sigmoid(head(**codes(CROSS, query, text))[0]).item()
        model = RobertaModel.from_pretrained(pooled.root / EMBEDS).eval()
        vector = model(**codes(EMBEDS, text))[0][0].mean(dim=0)
    most: Any = {"truncate_prompt_tokens": 6}
    told = ask(pooled, "/score", model=CROSS, text_1=query, text_2=text, **most)
    assert told["data"][0]["score"] == pytest.approx(score, abs=1e-5)
    ids = codes(EMBEDS, text)["input_ids"][0].tolist()
    for given in (text, [*ids, 9, 8, 7]):
        (one,) = ask(pooled, "/v1/embeddings", model=EMBEDS, input=given, **most)["data"]
        assert one["embedding"] == pytest.approx(vector.tolist(), abs=1e-5)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/classify", "/invocations"])
def test_many_numbers_are_told_beside_the_event_loop(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million of them, as 256 vectors of 4,096 numbers are, would keep all clients waiting."""
    told: list[int] = []

    class Row(np.ndarray):
        def tolist(self) -> Any:
            told.append(threading.get_ident())
            return super().tolist()

    async def run(*_: Any) -> Any:
        usage = answers.Usage(**pieces.usage(3, 0))
        head = {"id": "x", "created": 1, "model": "m"}
        return head, [np.array([0.5, 1e-7], np.float32).view(Row)] * 2, usage

    encoder = SimpleNamespace(
        vector=None,
        pipeline=SimpleNamespace(normalized=False),
        classification=lambda _: SimpleNamespace(label="good"),
        probabilities=lambda row: row,
    )
    served = SimpleNamespace(model=SimpleNamespace(task="feature-extraction"))
    models = SimpleNamespace(
        encoder=lambda *_: (served, SimpleNamespace(encoder=encoder)), find=lambda _: served
    )
    monkeypatch.setattr(encoding, "run", run)
    state = SimpleNamespace(models=models)
    request: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(server=state)))
    vectors, classes = EmbeddingRequest(model="m", input="a"), ClassifyRequest(model="m", input="a")
    asked: dict[str, Any] = {
        "/v1/embeddings": lambda: encoding.embeddings(vectors, request),
        "/classify": lambda: encoding.classify(classes, request),
        "/invocations": lambda: invoking._answer(vectors, request),
    }
    answer = asyncio.run(asked[path]())
    row = json.loads(answer.body)["data"][1]
    assert row.get("embedding", row.get("probs")) == pytest.approx([0.5, 1e-7])
    assert told and threading.get_ident() not in told
