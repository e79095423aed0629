"""Models that translate and that answer questions of a text, and beam search, over HTTP; the truth
is transformers' own model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from schemathesis import GenerationMode
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from dora_serve import write_onnx
from dora_serve.onnxruntime.limits import Limits
from dora_serve.server.options import ServerOptions
from tests.conftest import MODELS, randomize
from tests.server.conftest import BASE, Server, started
from tests.server.test_schema import statuses_of

SOURCES = [
    "count : nine eight",
    "count : five",
    "nine eight seven six five four three two one",
    "one",
]
NEW = 7
# What generation configurations have an encoder-decoder do: as that of a BART for news, and others.
SEARCHES: dict[str, dict[str, Any]] = {
    "searches": {
        "num_beams": 4,
        "min_length": 6,
        "max_length": 14,
        "no_repeat_ngram_size": 2,
        "length_penalty": 2.0,
        "early_stopping": True,
        "forced_eos_token_id": 2,
    },
    "converses": {
        "num_beams": 3,
        "min_new_tokens": 3,
        "max_new_tokens": 12,
        "no_repeat_ngram_size": 3,
        "encoder_no_repeat_ngram_size": 2,
        "length_penalty": 0.65,
        "early_stopping": "never",
    },
    "repeats nothing": {
        "max_new_tokens": 10,
        "no_repeat_ngram_size": 1,
        "encoder_no_repeat_ngram_size": 2,
        "min_new_tokens": 9,
        "repetition_penalty": 1.3,
    },
}
OLDER = "an older one"  # whose config.json says it
# What two models that read two texts want of their tokenizer.
PAIRS = {
    "typed": ["input_ids", "token_type_ids", "attention_mask"],
    "untyped": ["input_ids", "attention_mask"],
}


def begins(model: Any, words: Any) -> set[int]:
    """What the model's answers begin with."""
    asked = (words(text, return_tensors="pt") for text in SOURCES)
    return {int(model.generate(**each, max_new_tokens=1)[0, 1]) for each in asked}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("tasks")
    root = place / "models"
    words = AutoTokenizer.from_pretrained(MODELS / BASE)
    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=len(words),
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id,
        decoder_start_token_id=words.pad_token_id,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():  # else nothing depends on what is read
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.3)
    model.save_pretrained(root / "writes")
    words.save_pretrained(root / "writes")
    adapted: Any = get_peft_model(
        T5ForConditionalGeneration.from_pretrained(root / "writes"),
        LoraConfig(r=3, target_modules=["q", "v", "wi"], task_type="SEQ_2_SEQ_LM"),
    )
    randomize(adapted)
    adapted.save_pretrained(root / "tuned")
    said: Any = model.generation_config  # it never writes what it would begin with
    said.bad_words_ids = [[token] for token in begins(model, words) - {words.eos_token_id}]
    said.begin_suppress_tokens = [*begins(model, words)]
    trained = place / "trained"
    model.save_pretrained(trained / "told")
    words.save_pretrained(trained / "told")
    write_onnx(trained / "told", root / "told")
    for name, more in SEARCHES.items():
        model.generation_config = GenerationConfig(
            **more,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            decoder_start_token_id=words.pad_token_id,
        )
        model.save_pretrained(trained / name)
        words.save_pretrained(trained / name)
        shutil.copytree(root / "told", root / name)  # the graph is the same
        shutil.copy(trained / name / "generation_config.json", root / name)
    older = shutil.copytree(trained / "searches", root / OLDER)
    named = json.loads((older / "config.json").read_text()) | SEARCHES["searches"]
    (older / "config.json").write_text(json.dumps(named))
    (older / "generation_config.json").unlink()
    reads = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        vocab_size=len(words), max_position_embeddings=40,
    )  # fmt: skip
    BertForQuestionAnswering(reads).save_pretrained(root / "answers")
    words.save_pretrained(root / "answers")
    reads.num_labels, reads.initializer_range = 1, 0.5
    nearness = BertForSequenceClassification(reads)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    nearness.save_pretrained(place / "pairs")
    words.save_pretrained(place / "pairs")
    write_onnx(place / "pairs", root / "typed")
    shutil.copytree(root / "typed", root / "untyped")
    for name in PAIRS:
        config = json.loads((root / name / "tokenizer_config.json").read_text())
        config["model_input_names"] = PAIRS[name]
        (root / name / "tokenizer_config.json").write_text(json.dumps(config))
    with started(root, place, None, ServerOptions(threads=1)) as running:
        yield running


def ask(server: Server, path: str = "/v1/completions", **body: Any) -> Any:
    with server.http as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def trained_in(root: Path, name: str) -> Path:
    """Where the weights of a served model lie."""
    folder = root.parent / "trained" / name
    return folder if folder.exists() else root / name


def written(root: Path, name: str, **more: Any) -> dict[str, list[int]]:
    """What transformers' model writes of every source."""
    words = AutoTokenizer.from_pretrained(root / "writes")
    base = "told" if name == "told" else "writes"
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(trained_in(root, base))
    if name == "tuned":
        model = PeftModel.from_pretrained(model, root / "tuned")
    found = {}
    for text in SOURCES:
        out = model.generate(
            **words(text, return_tensors="pt"), max_new_tokens=NEW, do_sample=False, **more
        )
        found[text] = [token for token in out[0, 1:].tolist() if token not in (words.eos_token_id,)]
    return found


@pytest.mark.parametrize("name", ["writes", "tuned", "told"])
def test_an_encoder_decoder_writes_what_transformers_writes(tasks: Server, name: str) -> None:
    def one(text: str) -> Any:
        options: Any = {"max_tokens": NEW, "temperature": 0, "return_token_ids": True}
        return ask(tasks, model=name, prompt=text, **options)

    with ThreadPoolExecutor(4) as pool:  # rows of many lengths, which come and go
        told = list(pool.map(one, SOURCES * 3))
    truth = written(tasks.root, name)
    end = AutoTokenizer.from_pretrained(tasks.root / "writes").eos_token_id
    for text, answer in zip(SOURCES * 3, told, strict=True):
        (choice,) = answer["choices"]
        assert [token for token in choice["token_ids"] if token != end] == truth[text]
    assert len({str(tokens) for tokens in truth.values()}) > 1
    if name != "writes":
        assert written(tasks.root, "writes") != truth  # the control


@pytest.mark.parametrize("name", [*SEARCHES, OLDER])
def test_what_is_left_open_is_what_generate_does(tasks: Server, name: str) -> None:
    """Many at once, so that some wait and begin beside others; a stream has all in its end."""

    def one(text: str) -> Any:
        return ask(tasks, model=name, prompt=text, return_token_ids=True)

    with ThreadPoolExecutor(8) as pool:
        told = dict(zip(SOURCES * 6, pool.map(one, SOURCES * 6), strict=True))
    truth = searched(tasks.root, name)
    assert {text: answer["choices"][0]["token_ids"] for text, answer in told.items()} == truth
    assert len({str(tokens) for tokens in truth.values()}) > 1
    for text, answer in told.items():
        with tasks.openai as client:
            stream = client.completions.create(model=name, prompt=text, stream=True)
            assert "".join(each.choices[0].text for each in stream) == answer["choices"][0]["text"]
    if SEARCHES.get(name, SEARCHES["searches"]).get("num_beams"):
        assert truth != searched(tasks.root, name, num_beams=1)  # the control


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_asked_for_greedily_keeps_the_rules(tasks: Server, name: str) -> None:
    """But for an end that is forced, which only a search has."""
    options: Any = {"temperature": 0, "max_tokens": NEW, "return_token_ids": True}
    more = {"num_beams": 1, "max_new_tokens": NEW, "max_length": None}
    truth = searched(tasks.root, name, **more, forced_eos_token_id=None)
    for text in SOURCES:
        (choice,) = ask(tasks, model=name, prompt=text, **options)["choices"]
        assert choice["token_ids"] == truth[text]
    free = {"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0}
    assert truth != searched(tasks.root, name, **more, **free, min_new_tokens=None)  # the control


def searched(root: Path, name: str, **more: Any) -> dict[str, list[int]]:
    """What `generate` makes of every source, alone, with its end."""
    words = AutoTokenizer.from_pretrained(root / name)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(trained_in(root, name))
    found = {}
    for text in SOURCES:
        found[text] = model.generate(**words(text, return_tensors="pt"), **more)[0, 1:].tolist()
    return found


def test_beams_that_take_too_much_are_refused(tasks: Server, tmp_path: Path) -> None:
    options = ServerOptions(threads=1, limits=Limits(cache_bytes=4 << 10))
    body = {"model": "searches", "prompt": SOURCES[2]}
    root = tmp_path / "models"
    shutil.copytree(tasks.root / "searches", root / "searches")
    with started(root, tmp_path, None, options) as small, small.http as http:
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 400
        assert "beams" in refused.json()["error"]["message"]
        assert http.post("/v1/completions", json={**body, "temperature": 0}).status_code == 200


def test_why_an_answer_ended(tasks: Server) -> None:
    """One that was cut off by a forced end was cut off."""
    for limit, more in ((13, {}), (9, {"max_tokens": 9})):
        options: Any = {"model": "searches", "prompt": SOURCES, "return_token_ids": True, **more}
        choices = ask(tasks, **options)["choices"]
        assert len(choices) == len(SOURCES)
        for choice in choices:
            cut = len(choice["token_ids"]) == limit
            assert choice["finish_reason"] == ("length" if cut else "stop")
            assert choice["token_ids"][-1] == 2
            assert choice["stop_reason"] is None


def test_the_longest_text_of_a_model_without_positions(tasks: Server) -> None:
    """2,048 tokens, as transformers reads them; one more is refused, and so is a longer answer."""
    words = AutoTokenizer.from_pretrained(tasks.root / "writes")
    text = " ".join(["one", "five", "nine"][i % 7 % 3] for i in range(2047))
    read = words(text, return_tensors="pt")
    assert read["input_ids"].shape == (1, 2048)
    options: Any = {"model": "writes", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    done = ask(tasks, **options, prompt=text, logprobs=1, return_token_ids=True)["choices"][0]
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(tasks.root / "writes")
    tokens = done["token_ids"]
    start = [model.config.decoder_start_token_id]
    with torch.no_grad():
        logits = model(**read, decoder_input_ids=torch.tensor([start + tokens])).logits[0]
    values = logits.log_softmax(-1)
    assert tokens == values.argmax(-1)[:3].tolist()
    told = [values[i, token].item() for i, token in enumerate(tokens)]
    assert done["logprobs"]["token_logprobs"] == pytest.approx(told, abs=1e-4)
    with tasks.http as http:
        for more in ({"prompt": f"{text} one"}, {"prompt": "one", "max_tokens": 2049}):
            answer = http.post("/v1/completions", json={**options, **more})
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"
        cut = {**options, "prompt": f"{text} one", "truncate_prompt_tokens": -1}
        assert http.post("/v1/completions", json=cut).json()["usage"]["prompt_tokens"] == 2048


def test_what_else_an_encoder_decoder_is_asked(tasks: Server) -> None:
    options: Any = {"model": "tuned", "prompt": SOURCES[0], "max_tokens": NEW, "temperature": 0}
    whole = ask(tasks, **options, logprobs=2)
    with tasks.openai as client:
        pieces = list(client.completions.create(**options, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole["choices"][0]["text"]
    assert len(pieces) > 2
    several = ask(tasks, **{**options, "temperature": 1, "seed": 3}, n=3)
    assert len({choice["text"] for choice in several["choices"]}) > 1
    biased = ask(tasks, **options, logit_bias={"9": 100}, return_token_ids=True)
    assert biased["choices"][0]["token_ids"] == [9] * NEW
    with tasks.http as http:
        for more, param in (({"echo": True}, "echo"), ({"prompt_logprobs": 1}, "prompt_logprobs")):
            refused = http.post("/v1/completions", json={**options, **more})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        chat = {"model": "tuned", "messages": [{"role": "user", "content": "one"}]}
        assert http.post("/v1/chat/completions", json=chat).json()["error"]["code"] == "other_task"


def test_beams_of_an_encoder_decoder(tasks: Server) -> None:
    """Without ends, where transformers stops at other places."""
    truth = written(tasks.root, "tuned", num_beams=3, eos_token_id=-1, length_penalty=0.0)
    for text in SOURCES:
        options: Any = {
            "use_beam_search": True,
            "n": 3,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        told = ask(tasks, model="tuned", prompt=text, max_tokens=NEW, **options)["choices"]
        assert told[0]["token_ids"] == truth[text]
        assert len({str(choice["token_ids"]) for choice in told}) == 3


def test_an_answer_is_a_part_of_the_context(tasks: Server) -> None:
    words = AutoTokenizer.from_pretrained(tasks.root / "answers")
    model = BertForQuestionAnswering.from_pretrained(tasks.root / "answers").eval()
    context, starts = "nine eight seven six five four", set()
    for question in ("one", "two three", "four nine one"):
        given: Any = words(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets = given.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            logits = model(**given)
        start, end = (each[0].log_softmax(-1) for each in (logits.start_logits, logits.end_logits))
        inside = [i for i, part in enumerate(given.sequence_ids(0)) if part == 1]
        best = max(
            ((start[i] + end[j]).item(), i, j) for i in inside for j in inside if i <= j < i + 30
        )
        asked = {"model": "answers", "question": question, "context": context}
        told = ask(tasks, "/dora/answer", **asked)
        assert (told["start"], told["end"]) == (offsets[best[1]][0], offsets[best[2]][1])
        assert told["answer"] == context[told["start"] : told["end"]]
        assert told["score"] == pytest.approx(torch.tensor(best[0]).exp().item(), rel=1e-4)
        starts.add(told["score"])
        one = ask(tasks, "/dora/answer", **asked, max_answer_tokens=1)
        assert len(one["answer"].split()) == 1
    assert len(starts) == 3
    with tasks.http as http:
        long = {"model": "answers", "question": "one", "context": "nine " * 50}
        refused = http.post("/dora/answer", json=long)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        other = http.post("/dora/answer", json={**long, "model": "writes"})
        assert other.json()["error"]["code"] == "other_task"
    assert json.dumps(told["usage"])


def test_a_context_without_tokens_is_refused(tasks: Server) -> None:
    asked = {"model": "answers", "question": "one"}
    with tasks.http as http:
        refused = http.post("/dora/answer", json={**asked, "context": " "})
    assert refused.status_code == 400, refused.text
    assert ask(tasks, "/dora/answer", **asked, context="nine eight")["answer"]


def test_two_texts_are_of_two_types_where_the_tokenizer_says_so(tasks: Server) -> None:
    """vLLM asks the same tokenizer, and gave these scores on a CPU."""
    found = {}
    for name in PAIRS:
        words = AutoTokenizer.from_pretrained(tasks.root / name)
        model = BertForSequenceClassification.from_pretrained(tasks.root.parent / "pairs").eval()
        given = words([SOURCES[0]] * 3, SOURCES[1:], return_tensors="pt", padding=True)
        assert ("token_type_ids" in given) == (name == "typed")
        with torch.no_grad():
            truth = model(**given).logits[:, 0].sigmoid().tolist()
        sides = {"text_1": SOURCES[0], "text_2": SOURCES[1:]}
        told = ask(tasks, "/score", model=name, **sides)["data"]
        found[name] = [each["score"] for each in told]
        assert found[name] == pytest.approx(truth, abs=1e-5)
    assert found["typed"] != pytest.approx(found["untyped"], abs=1e-3)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["/dora/answer", "/v1/completions"])
def test_no_server_error(tasks: Server, path: str, mode: GenerationMode) -> None:
    statuses = statuses_of(tasks, path, mode, ["answers", "writes", "tuned"], 30)
    assert 200 in statuses or mode is GenerationMode.NEGATIVE
