"""Answers follow the schema, pattern or grammar that is asked for, whatever the model would say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_serve.server.bounded.grammars import read
from dora_serve.server.options import ServerOptions
from dora_serve.server.wire.errors import ApiError
from dora_serve.server.wire.structure import StructuredOutputs, asked
from tests.server.conftest import Server, started
from tests.server.schemas import schema

MODEL = "tiny-bytes"
LINES = [
    '{"name": "red", "tags": [1, 2.5, null, true, false]}',
    "the cat sat on the mat",
    "ab12 水",
]


def bytes_tokenizer() -> Tokenizer:
    """One whose tokens are bytes and a few longer ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return tokenizer


def save_bytes_model(folder: Path) -> None:
    """A model that says anything, with these tokens."""
    tokenizer = bytes_tokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=600,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def structured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("structured")
    save_bytes_model(root / "models" / MODEL)
    with started(root / "models", root, None, ServerOptions(threads=1)) as running:
        yield running


def ask(server: Server, **more: Any) -> Any:
    body = {"model": MODEL, "prompt": "say", "max_tokens": 500, "seed": 1, **more}
    with server.http as http:
        return http.post("/v1/completions", json=body)


def text(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["text"])


@pytest.mark.parametrize("rounds", [32, pytest.param(128, marks=pytest.mark.further)])
def test_random_schemas_beside_one_another(structured: Server, rounds: int) -> None:
    """Many at once, each row with its own."""

    def one(seed: int) -> Any:
        given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema(seed)}}
        return json.loads(text(ask(structured, response_format=given, seed=seed)))

    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(one, range(rounds)))
    checks = [jsonschema.Draft202012Validator(schema(seed)) for seed in range(rounds)]
    for check, answer in zip(checks, told, strict=True):
        check.validate(answer)
    # The control: an answer to one schema is none to most others.
    others = [check.is_valid(answer) for check in checks for answer in told]
    assert sum(others) < len(others) / 4


def test_without_a_schema_it_says_anything(structured: Server) -> None:
    answer = ask(structured, max_tokens=60).json()["choices"][0]["text"]
    with pytest.raises(ValueError, match=r"(?s)."):
        json.loads(answer)


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"choice": ["yes", "no", 'it\'s "x"\n']}, 'yes|no|it\'s "x"\n'),
        ({"regex": r"[a-c]{3}-\d{2}"}, r"[a-c]{3}-\d{2}"),
        ({"grammar": 'start: "a" NAME "!"\nNAME: /[xyz]{2}/'}, "a[xyz]{2}!"),
        ({"grammar": 'root ::= "one" | "two" rest\nrest ::= " three"'}, "one|two three"),
        ({"json": '{"enum": [12, "b"]}'}, '12|"b"'),
        ({"json": {"const": {"a": 1}}, "disable_any_whitespace": True}, r'\{"a":1\}'),
        # The texts of special tokens, of which one ends an answer.
        ({"choice": ["a</s>b"]}, "a</s>b"),
        ({"regex": r"<\/s>[xy]<s>"}, "</s>[xy]<s>"),
        ({"grammar": 'root ::= "</s>" [xy] "<s>"'}, "</s>[xy]<s>"),
        ({"json": {"properties": {"<s>": {"const": "ü</s>"}}, "required": ["<s>"], "type": "object",
                   "additionalProperties": False}, "disable_any_whitespace": True},
         '{"<s>":"ü</s>"}'),
    ],
)  # fmt: skip
def test_structured_outputs(structured: Server, given: dict[str, Any], pattern: str) -> None:
    for seed in range(4):
        told = text(ask(structured, structured_outputs=given, seed=seed))
        assert re.fullmatch(pattern, told.strip() if "json" in given else told), told


def follows(told: Any, text: str) -> bool:
    """Whether a text follows what `asked` told."""
    _, grammar = read(json.dumps(told).encode())
    matcher = LLMatcher(LLTokenizer("byte"), grammar.decode(), log_level=0)
    allowed = all(matcher.try_consume_tokens([byte]) for byte in text.encode())
    return bool(allowed and matcher.is_accepting())


def said(**given: Any) -> Any:
    return asked(None, StructuredOutputs.model_validate(given))


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (r'root ::= "\u00fcab"', "üab", "\ufcab"),  # which zeros that are left out would make
        (r'root ::= "\U0001F600" "\x41\n\"\\"', '😀A\n"\\', "😀A"),
        (r"root ::= [\u0430-\u044f]+ [^\u00e0-\u00ff]", "жx", "xx"),
        ("root ::= [a&&b~~]+ [!--] [--/] [[^] [^^]", "a&~#.[x", "a&~#.[^"),
        (r"root ::= [\]\-.] [a-]", "]-", "]b"),
        ('root ::= start Item item\nstart ::= "a"\nItem ::= "b"\nitem ::= "c"', "abc", "abb"),
        ('root ::= "start #" # "x"\r\n  | "Root"\r\n', "start #", "start "),
        ('?start: x\n!x: "a ::= b" | "c"', "a ::= b", "b"),
        ('x: "a"\n%import common.INT\nstart: INT x', "12a", "a"),
    ],
)
def test_grammars_of_both_forms(grammar: str, right: str, wrong: str) -> None:
    told = said(grammar=grammar)
    assert [follows(told, text) for text in (right, wrong)] == [True, False]


_64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}


@pytest.mark.parametrize(
    ("schema", "right"),
    [
        (_64, "-9007199254740993"),
        ({**_64, "minimum": 0, "maximum": 2**64 - 1}, "9007199254740993"),
        ({"enum": [2**62, True]}, str(2**62)),
        ({"type": "object", "properties": {"const": {**_64, "default": 2**53 + 1}}}, '{"const":1}'),
    ],
)
def test_large_numbers(schema: Any, right: str) -> None:
    assert follows(said(json=schema), right)


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 2**53 + 1},
        {"items": {"enum": ["x", {"y": [-(2**63)]}]}},
        {"const": 2**63},
        {"const": 10**400},
        {"type": "integer", "maximum": 2**53 + 3},
    ],
)
def test_a_number_that_would_be_written_as_another(schema: Any) -> None:
    with pytest.raises(ApiError, match="cannot be written exactly"):
        follows(said(json=schema), "")


def test_a_chat_whose_answer_is_an_object(structured: Server) -> None:
    closed = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "is it?"}],
        "max_tokens": 400,
        "n": 3,
        "seed": 2,
        "structured_outputs": {"json": closed, "disable_additional_properties": True},
    }
    with structured.http as http:
        choices = http.post("/v1/chat/completions", json=body).json()["choices"]
    assert [json.loads(each["message"]["content"]).keys() for each in choices] == [{"ok"}] * 3


def test_any_object(structured: Server) -> None:
    found = []
    for seed in range(6):
        given: Any = {"response_format": {"type": "json_object"}, "logit_bias": {"1": 100}}
        answer = ask(structured, seed=seed, **given).json()["choices"][0]
        if answer["finish_reason"] == "stop":
            found.append(json.loads(answer["text"]))
        else:
            assert answer["text"].lstrip().startswith("{")
    assert all(isinstance(each, dict) for each in found)


def test_greedy_and_streamed_are_the_same(structured: Server) -> None:
    given: Any = {"structured_outputs": {"regex": "[a-z]{5,9}!"}, "temperature": 0}
    whole = text(ask(structured, **given))
    with structured.openai as client:
        pieces = client.completions.create(
            model=MODEL, prompt="say", max_tokens=500, stream=True, temperature=0,
            extra_body={"structured_outputs": given["structured_outputs"]},
        )  # fmt: skip
        assert "".join(piece.choices[0].text for piece in pieces) == whole


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "say", "max_tokens": 99}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "say"}]}),
        ("/v1/responses", {"input": "say"}),
    ],
)
def test_a_streamed_line_is_one_for_whoever_splits_text(
    structured: Server, path: str, asked: dict[str, Any]
) -> None:
    """httpx's `iter_lines` ends a line where Unicode does, within an answer too."""
    says = "a\x85b\u2028c\u2029水"
    follows = {"structured_outputs": {"choice": [says]}, "seed": 1, "stream": True}
    body = {"model": MODEL, **asked, **follows}
    with structured.http as http, http.stream("POST", path, json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    told = ""
    for event in events:
        (piece,) = event.get("choices", [event])
        delta = piece.get("delta", "")
        told += delta if isinstance(delta, str) else delta.get("content", "")
        told += piece["text"] if path == "/v1/completions" else ""
    assert told == says


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
        ({"structured_outputs": {"grammar": "start: ("}}, "grammar"),
        ({"structured_outputs": {"json": "{"}}, "grammar"),
        ({"structured_outputs": {"json": {"type": "foo"}}}, "foo"),
        ({"structured_outputs": {"json": {"not": {}}}}, "not"),
        ({"structured_outputs": {"json": {"$ref": "http://example.org/x"}}}, "grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "one of"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {
                "response_format": {"type": "json_object"},
                "structured_outputs": {"json": {"type": "object"}},
            },
            "not with response_format",
        ),
        ({"structured_outputs": {"choice": ["x" * 70_000]}}, "65536"),
        ({"structured_outputs": {"regex": "x" * 70_000}}, "65536"),
    ],
)
def test_what_is_wrong(structured: Server, given: dict[str, Any], says: str) -> None:
    answer = ask(structured, **given)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


_DEEP: Any = {"type": "string"}
for _ in range(200):
    _DEEP = {"type": "array", "items": _DEEP}
COSTLY: dict[str, Any] = {
    "a pattern of many states": {"regex": "(a|b)*a(a|b){24}(a|b)*"},
    "repetitions in repetitions": {"regex": "((a{1,100}){1,100}){1,100}b"},
    "a long string": {"json": {"type": "string", "pattern": "^(.*x.*y.*z){1,60}$"}},
    "deep": {"json": _DEEP},
    "many names": {
        "json": {"type": "object", "properties": {f"n{i}": {"type": "string"} for i in range(2000)}}
    },
    "all orders": {"json": {"allOf": [{"pattern": f"{i}.*"} for i in range(40)], "type": "string"}},
    "recursive": {
        "json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}
    },
    "ambiguous": {"grammar": 'start: s\ns: s s | "a" | s s s | ""'},
    "empty again and again": {"grammar": 'start: a*\na: b*\nb: c*\nc: "x"?'},
    "many words": {"choice": [f"{i:0120x}" for i in range(500)]},
    "a text that has to come and never ends": {"grammar": 'start: ("x" | "y") /b+/ "b"'},
    "the same, told to be chosen": {
        "grammar": 'start: ("x" | "y") /b+/ "b"\n%llguidance {"no_forcing": false}'
    },
    "the same in the other form": {"grammar": 'root ::= ("x" | "y") b "b"\nb ::= "b"+'},
    "intersections": {"grammar": "start: X\nX: /(.*a.*){8}/ & /(.*b.*){8}/ & ~/(.*c.*){4}/"},
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_is_costly_is_answered_or_refused(structured: Server, name: str) -> None:
    """And another is answered beside it."""
    with ThreadPoolExecutor(1) as pool:
        costly = pool.submit(ask, structured, structured_outputs=COSTLY[name], max_tokens=40)
        begin = time.monotonic()
        assert ask(structured, max_tokens=3).status_code == 200
        beside = time.monotonic() - begin
        answer = costly.result()
    print(f"\n{name}: {answer.status_code}, beside {beside:.2f} s, {answer.text[:150]}")
    assert answer.status_code in (200, 400)
    assert structured.process.poll() is None


def test_a_tokenizer_of_words_cannot_follow(server: Server) -> None:
    body = {"model": "tiny-llama-base", "prompt": "cat", "structured_outputs": {"choice": ["a"]}}
    with server.http as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "tokenizer" in answer.json()["error"]["message"]
