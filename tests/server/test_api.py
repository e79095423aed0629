"""Every answer, read by OpenAI's own client and compared with the live models."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModel, AutoTokenizer

from converters.model.base import open_base
from dora_serve import read_run
from dora_serve.commands import dora_serve
from dora_serve.proof.live import LiveModel
from tests.conftest import MODELS
from tests.engines.decoders import greedy
from tests.server.conftest import BASE, DOWN, EMBEDS, SECOND, SENTIMENT, Server

LLAMA = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8"
RUNS = {
    DOWN: LLAMA / "Count_Down" / DOWN,
    SECOND: LLAMA / "Every_Second" / SECOND,
}
PROMPTS = ("count : nine", "copy : cat moon river =", "count : twenty-one", "count : five", "cat")


@pytest.fixture(scope="module")
def live() -> dict[str, Any]:
    """The unmerged models by the name they are served under."""
    base = open_base(MODELS / BASE)
    models = {name: LiveModel(read_run(path), base).model for name, path in RUNS.items()}
    bare = LiveModel(read_run(RUNS[DOWN]), base)
    bare.detach()
    return {**models, BASE: bare.model}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai as found:
        yield found


def complete(client: openai.OpenAI, model: str, prompt: Any, **more: Any) -> Any:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12, **more}
    return client.completions.create(model=model, prompt=prompt, **options)


def test_live_tokens_in_one_mixed_crowd(client: openai.OpenAI, live: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / BASE)
    asked = [(model, prompt) for prompt in PROMPTS for model in live for _ in range(3)]

    def ask(pair: tuple[str, str]) -> str:
        extra = {"ignore_eos": True}
        answer = complete(client, *pair, extra_body=extra)
        assert answer.usage.completion_tokens == 12
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(24) as pool:
        told = list(pool.map(ask, asked))
    expected = {}
    for model, prompt in set(asked):
        tokens = greedy(live[model], tokenizer(prompt).input_ids, 12)
        expected[model, prompt] = " " + tokenizer.decode(tokens, skip_special_tokens=True)
    assert told == [expected[pair] for pair in asked]
    assert len({expected[model, "count : nine"] for model in live}) == 3  # the control


@pytest.mark.parametrize("more", [{}, {"temperature": 1.5, "seed": 3}, {"logprobs": 2}])
def test_streamed_completions_are_the_whole(client: openai.OpenAI, more: dict[str, Any]) -> None:
    whole = complete(client, SECOND, list(PROMPTS), n=2, **more)
    assert [choice.index for choice in whole.choices] == list(range(10))
    texts: dict[int, str] = dict.fromkeys(range(10), "")
    reasons: dict[int, str] = {}
    tokens: dict[int, list[str]] = {i: [] for i in range(10)}
    offsets: dict[int, list[int]] = {i: [] for i in range(10)}
    usage = None
    stream = complete(
        client, SECOND, list(PROMPTS), n=2, stream=True,
        stream_options={"include_usage": True}, **more,
    )  # fmt: skip
    for piece in stream:
        usage = piece.usage or usage
        for choice in piece.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
    assert [texts[i] for i in range(10)] == [choice.text for choice in whole.choices]
    assert [reasons[i] for i in range(10)] == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    details = {"prompt_tokens_details"}  # the second asks for what the first has computed
    assert usage.model_dump(exclude=details) == whole.usage.model_dump(exclude=details)
    if "logprobs" in more:
        assert [tokens[i] for i in range(10)] == [c.logprobs.tokens for c in whole.choices]
        assert [offsets[i] for i in range(10)] == [c.logprobs.text_offset for c in whole.choices]
    if "seed" in more:
        assert whole.choices[0].text != whole.choices[1].text


def test_logprobs_are_the_live_ones(client: openai.OpenAI, live: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / BASE)
    choice = complete(client, DOWN, "count : nine", logprobs=3).choices[0]
    prompt = tokenizer("count : nine").input_ids
    ids = prompt + tokenizer.convert_tokens_to_ids(choice.logprobs.tokens)
    with torch.inference_mode():
        truth = live[DOWN](input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert len(choice.logprobs.token_logprobs) > 1
    for i, (value, top) in enumerate(
        zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True)
    ):
        best = truth[len(prompt) + i - 1].topk(3)
        assert list(top) == tokenizer.convert_ids_to_tokens(best.indices)
        assert list(top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)
        assert value == pytest.approx(float(best.values[0]), abs=1e-4)


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "count : nine"}]
    options: Any = {"model": DOWN, "messages": messages, "temperature": 0}
    plain = complete(client, DOWN, "count : nine").choices[0].text
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert choice.message.content == plain == " eight seven six five four three"
    assert choice.finish_reason == "stop"
    assert [entry.token for entry in choice.logprobs.content] == [*plain.split(), "</s>"]
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    pieces = list(client.chat.completions.create(**options, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == plain
    assert pieces[-1].choices[0].finish_reason == "stop"
    parts = [{"role": "user", "content": [{"type": "text", "text": "count : nine"}]}]
    again = client.chat.completions.create(**{**options, "messages": parts}, max_tokens=2)
    assert again.choices[0].message.content == " eight seven"
    assert again.choices[0].finish_reason == "length"
    refused = [{"role": "system", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match="no system"):
        client.chat.completions.create(**{**options, "messages": refused})


def test_stop_and_seed(client: openai.OpenAI) -> None:
    stopped = complete(client, DOWN, "count : nine", stop=["six five"])
    assert stopped.choices[0].text == " eight seven "
    assert stopped.choices[0].finish_reason == "stop"
    pieces = complete(client, DOWN, "count : nine", stop=["six five"], stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == " eight seven "
    hot: Any = {"temperature": 3, "max_tokens": 16, "extra_body": {"ignore_eos": True}}
    first, same, other = (
        complete(client, DOWN, "count : nine", seed=seed, **hot).choices[0].text
        for seed in (5, 5, 6)
    )
    assert first == same != other
    longer = complete(client, BASE, "count : nine", extra_body={"min_tokens": 12})
    assert longer.usage.completion_tokens == 12


def test_sentiment_run_is_the_live_one(server: Server) -> None:
    texts = ["good film", "bad", "a dull and bad film", "great great fun"]
    path = next(MODELS.glob(f"runs/Checkpoint/Tiny_Roberta/*/*/{SENTIMENT}"))
    live = LiveModel(read_run(path), open_base(MODELS / "tiny-roberta-base"))
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-roberta-base")

    def probabilities() -> torch.Tensor:
        with torch.inference_mode():
            rows = [live.model(**tokenizer(text, return_tensors="pt")).logits for text in texts]
        return torch.cat(rows).softmax(-1)

    with server.http as http:
        answer = http.post("/classify", json={"model": SENTIMENT, "input": texts}).json()
        single = http.post("/classify", json={"model": SENTIMENT, "input": texts[1]}).json()
    found = torch.tensor([row["probs"] for row in answer["data"]])
    assert float((found - probabilities()).abs().max()) <= 1e-4
    assert [row["num_classes"] for row in answer["data"]] == [2] * 4
    assert answer["data"][0]["label"] == f"LABEL_{int(found[0].argmax())}"
    assert single["data"][0]["probs"] == pytest.approx(answer["data"][1]["probs"], abs=1e-5)
    live.detach()
    assert float((found - probabilities()).abs().max()) > 1e-2


def test_embeddings(client: openai.OpenAI, server: Server) -> None:
    texts = ["good film", "bad"]
    model = AutoModel.from_pretrained(server.root / EMBEDS).eval()
    tokenizer = AutoTokenizer.from_pretrained(server.root / EMBEDS)
    answer = client.embeddings.create(model=EMBEDS, input=texts)
    with torch.inference_mode():
        for text, row in zip(texts, answer.data, strict=True):
            state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            assert row.embedding == pytest.approx(state.tolist(), abs=1e-5)
    plain = client.embeddings.create(model=EMBEDS, input="bad", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[1].embedding, abs=1e-6)
    with server.http as http:
        body = {"model": EMBEDS, "input": [3, 4], "encoding_format": "base64"}
        packed = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").shape == (32,)


def test_tokens(server: Server) -> None:
    with server.http as http:
        told = http.post(
            "/tokenize", json={"model": DOWN, "prompt": "cat moon", "return_token_strs": True}
        ).json()
        assert told["token_strs"] == ["<s>", "cat", "moon"]
        assert told["count"] == 3
        assert told["max_model_len"] == 64
        messages = [{"role": "user", "content": "cat moon"}]
        chat = http.post("/tokenize", json={"model": DOWN, "messages": messages}).json()
        assert chat["tokens"] == told["tokens"]
        back = http.post("/detokenize", json={"model": DOWN, "tokens": told["tokens"]}).json()
        assert back["prompt"] == "<s> cat moon"


def test_models(client: openai.OpenAI, server: Server) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {BASE, DOWN, SECOND, SENTIMENT, EMBEDS} <= set(listed)
    assert "tiny-roberta-base" not in listed  # it has no head of its own
    assert listed[DOWN].parent == BASE  # type: ignore[attr-defined]
    assert client.models.retrieve(DOWN).id == DOWN
    with server.http as http:
        details = {each["id"]: each for each in http.get("/dora/models").json()["data"]}
    run = read_run(RUNS[DOWN])
    stripped = run.strip()
    for module, numbers in details[DOWN]["modules"].items():
        assert numbers["start"] == run.start_rank[module]
        assert numbers["rank"] == stripped.rank(module)
    assert set(details[DOWN]["modules"]) == set(run.updates)
    assert details[DOWN]["requests"] > 0
    assert details[DOWN]["kind"] == "run"


def test_adapters_come_and_go(client: openai.OpenAI, server: Server) -> None:
    path = str(RUNS[SECOND].relative_to(MODELS))
    with server.http as http:
        assert complete_fails(client, "again") == 404
        loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": path})
        assert loaded.status_code == 200, loaded.text
        assert complete(client, "again", "count : nine").choices[0].text.startswith(" eleven")
        taken = http.post("/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": path})
        assert taken.status_code == 400
        inplace = {
            "lora_name": "again",
            "lora_path": str(server.root / RUNS[DOWN].relative_to(MODELS)),
            "load_inplace": True,
            "is_3d_lora_weight": False,
        }
        assert http.post("/v1/load_lora_adapter", json=inplace).status_code == 200
        assert complete(client, "again", "count : nine").choices[0].text.startswith(" eight")
        (server.root / "loop").symlink_to("loop")
        for name in ("base:7b @sql, v2", "-", "ü" * 255):  # as folders are called, and served
            body = {"lora_name": name, "lora_path": path}
            assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
            assert complete(client, name, "count : nine").choices[0].text.startswith(" eleven")
            http.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
        for name in ("x/../run", "a//b", "a/", "", " a", "a\n"):  # other ways to write names
            body = {"lora_name": name, "lora_path": path}
            assert http.post("/v1/load_lora_adapter", json=body).status_code == 400
        for bad, status in (
            ("/etc", 404),
            ("..", 404),
            ("runs/../../x", 404),
            ("\x00", 404),
            ("loop", 404),
            (BASE, 400),
        ):
            body = {"lora_name": "bad", "lora_path": bad}
            assert http.post("/v1/load_lora_adapter", json=body).status_code == status
        gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "again"})
        assert gone.status_code == 200
        base = http.post("/v1/unload_lora_adapter", json={"lora_name": BASE})
        assert base.status_code == 400
    assert complete_fails(client, "again") == 404
    assert complete(client, SECOND, "count : nine").choices[0].text.startswith(" eleven")


def complete_fails(client: openai.OpenAI, model: str, **more: Any) -> int:
    with pytest.raises(openai.APIStatusError) as caught:
        complete(client, model, "count : nine", **more)
    assert isinstance(caught.value.body, dict)
    assert {"message", "type", "param", "code"} == set(caught.value.body)
    return caught.value.status_code


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {"model": "x", "prompt": "a"}, 404, "does not exist"),
        ("/v1/completions", {"prompt": "a"}, 400, "model"),
        ("/v1/completions", {"model": DOWN, "prompt": "a", "max_tokens": 64}, 400, "maximum"),
        ("/v1/completions", {"model": DOWN, "prompt": []}, 400, "empty"),
        ("/v1/completions", {"model": DOWN, "prompt": [84]}, 400, "no such token"),
        ("/v1/completions", {"model": DOWN, "prompt": "a", "best_of": 3}, 400, "best_of"),
        ("/v1/completions", {"model": DOWN, "prompt": "a", "unknown": 1}, 400, "unknown"),
        ("/v1/completions", {"model": DOWN, "prompt": ["a"] * 300}, 400, "can wait"),
        ("/v1/completions", {"model": DOWN, "prompt": ["cat " * 80] * 300}, 400, "can wait"),
        ("/v1/completions", {"model": SENTIMENT, "prompt": "a"}, 400, "is for sequence-class"),
        ("/classify", {"model": DOWN, "input": "a"}, 400, "is for causal-lm"),
        ("/classify", {"model": SENTIMENT, "input": "good " * 40}, 400, "too long"),
        ("/v1/embeddings", {"model": SENTIMENT, "input": "a"}, 400, "not for embeddings"),
        ("/v1/embeddings", {"model": EMBEDS, "input": [99]}, 400, "no such token"),
    ],
)
def test_refusals(server: Server, path: str, body: Any, status: int, says: str) -> None:
    answer = httpx.post(server.url + path, json=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_paths_that_are_not_there(server: Server) -> None:
    answer = httpx.get(f"{server.url}/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "Not Found"


def test_what_a_turn_computed_is_not_computed_again(client: openai.OpenAI, server: Server) -> None:
    def counted() -> list[float]:
        with server.http as http:
            lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines())
        told = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
        return [float(lines[f'{name}{{model_name="{BASE}"}}']) for name in told]

    before = counted()
    prompt, extra = [61, 7, 13, 5] * 5, {"ignore_eos": True, "return_token_ids": True}
    first = complete(client, DOWN, prompt, extra_body=extra)
    turn = [*prompt, *first.choices[0].token_ids, 9, 11]
    for model, cached in ((DOWN, 16), (SECOND, 0), (SECOND, 32), (DOWN, 32)):
        answer = complete(client, model, turn, n=2, extra_body=extra)
        assert answer.usage.prompt_tokens_details.cached_tokens == cached
    *_, last = complete(client, DOWN, turn, stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens_details.cached_tokens == 32
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [
        len(prompt) + 9 * len(turn),
        16 + 32 + 0 + 32 + 5 * 32,
    ]


def test_watch_is_for_vllm(server: Server, client: openai.OpenAI) -> None:
    """It would unload what is served, and have nothing that this server loads."""
    before = [model.id for model in client.models.list()]
    base = server.root / BASE
    words = ["watch", str(server.root), "--base", str(base), "--once", "--server", server.url]
    done = CliRunner().invoke(dora_serve, words)
    assert done.exit_code == 1
    assert "it is no vLLM" in done.output
    assert [model.id for model in client.models.list()] == before
