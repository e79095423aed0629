"""What is asked of vLLM and of the embedded server alike, and what of the answers must be the same.

`tests/data/vllm_answers.json` has vLLM's answers; they are compared with vLLM where it is installed
(`tests/engines/vllm/test_vllm_parity.py`), and with the embedded server's everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "data" / "vllm_answers.json"
MODEL = "tiny-llama-base"
TOP = 5e-3  # between log-probabilities, which vLLM and ONNX Runtime compute in other orders


def complete(prompt: Any = "count : nine", **more: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 10, **more}
    return "/v1/completions", body


def chat(text: str = "count : nine", **more: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": text}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 10, **more}
    return "/v1/chat/completions", body


LONG = "copy : cat moon river = cat moon river ; copy : river cat ="
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": complete(),
    "two prompts": complete(["count : nine", "cat moon"]),
    "tokens": complete([1, 5, 9, 12], return_token_ids=True),
    "logprobs 0": complete(logprobs=0),
    "logprobs 3": complete(logprobs=3),
    "logprobs to the end": complete(logprobs=1, max_tokens=40),
    "tokens as ids": complete(logprobs=2, return_tokens_as_token_ids=True),
    "token ids": complete(return_token_ids=True, max_tokens=40),
    "ignore_eos": complete(ignore_eos=True, max_tokens=40, return_token_ids=True),
    "min_tokens": complete(min_tokens=30, max_tokens=40, logprobs=2, return_token_ids=True),
    "presence": complete(presence_penalty=1.5, max_tokens=30, ignore_eos=True),
    "presence below zero": complete(presence_penalty=-2, max_tokens=20, ignore_eos=True),
    "frequency": complete(frequency_penalty=1.2, max_tokens=30, ignore_eos=True),
    "frequency below zero": complete(frequency_penalty=-1, max_tokens=20, ignore_eos=True),
    "repetition": complete(LONG, repetition_penalty=1.4, max_tokens=25, ignore_eos=True),
    "repetition below one": complete(LONG, repetition_penalty=0.7, max_tokens=20, ignore_eos=True),
    "all penalties": complete(
        LONG, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, max_tokens=25,
        ignore_eos=True, logprobs=2,
    ),
    "bias": complete(logit_bias={"9": 100}, max_tokens=5, logprobs=1),
    "bias against": complete(logit_bias={"5": -100, "8": -100, "1": -3.5}, max_tokens=20),
    "bias beyond the bound": complete(logit_bias={"9": 1000, "10": 1000}, max_tokens=4),
    "bias and penalties": complete(
        logit_bias={"9": 7, "12": 6.5, "15": 6}, presence_penalty=2, repetition_penalty=1.3,
        max_tokens=20, ignore_eos=True,
    ),
    "allowed": complete(allowed_token_ids=[7, 9, 11, 13], max_tokens=8, logprobs=2),
    "allowed and bias": complete(allowed_token_ids=[7, 9], logit_bias={"7": -50}, max_tokens=5),
    "bad words": complete(bad_words=["twelve"], max_tokens=20),
    "bad words of several tokens": complete(bad_words=["eleven twelve"], max_tokens=20),
    "bad words and penalties": complete(
        bad_words=["eleven", "ten fifty"], frequency_penalty=0.5, max_tokens=20, ignore_eos=True
    ),
    "stop": complete(stop=["thirteen"], max_tokens=20),
    "stop of several": complete(stop=["fourteen", "thirteen four"], max_tokens=20),
    "stop included": complete(stop=["thirteen"], include_stop_str_in_output=True, max_tokens=20),
    "stop beyond min_tokens": complete(stop=["ten", "thirteen"], min_tokens=2, max_tokens=20),
    "stop token": complete(stop_token_ids=[20, 22], max_tokens=20, return_token_ids=True),
    "stop token included": complete(
        stop_token_ids=[20, 22], include_stop_str_in_output=True, max_tokens=20, logprobs=1,
        return_token_ids=True,
    ),
    "stop token beyond min_tokens": complete(
        stop_token_ids=list(range(4, 40)), min_tokens=3, max_tokens=20, return_token_ids=True
    ),
    "special tokens": complete(skip_special_tokens=False, ignore_eos=True, max_tokens=30),
    "special tokens and the end": complete(
        skip_special_tokens=False, include_stop_str_in_output=True, max_tokens=40
    ),
    "special tokens without spaces": complete(
        skip_special_tokens=False, spaces_between_special_tokens=False, max_tokens=8,
        allowed_token_ids=[1, 2, 9], logit_bias={"2": 60, "1": 58}, presence_penalty=2,
        ignore_eos=True,
    ),
    "echo": complete(echo=True),
    "echo of tokens": complete([1, 5, 9, 12], echo=True),
    "echo and token ids": complete(echo=True, return_token_ids=True),
    "echo and logprobs": complete(echo=True, logprobs=2, max_tokens=3),
    "echo and logprobs of two": complete(
        ["count : nine", LONG], echo=True, logprobs=1, max_tokens=1
    ),
    "echo alone": complete(echo=True, logprobs=1, max_tokens=0),
    "echo without logprobs alone": complete(LONG, echo=True, max_tokens=0),
    "no tokens without echo": complete(max_tokens=0),
    "prompt_logprobs": complete(LONG, prompt_logprobs=2, max_tokens=1),
    "prompt_logprobs 0": complete(prompt_logprobs=0, max_tokens=1),
    "prompt_logprobs and logprobs": complete(prompt_logprobs=1, logprobs=2, max_tokens=3),
    "no special tokens": complete(add_special_tokens=False, return_token_ids=True),
    "truncated": complete(LONG, truncate_prompt_tokens=5, return_token_ids=True),
    "truncated on the left": complete(
        LONG, truncate_prompt_tokens=5, truncation_side="left", return_token_ids=True
    ),
    "truncated on the right": complete(
        LONG, truncate_prompt_tokens=5, truncation_side="right", return_token_ids=True
    ),
    "truncated tokens": complete(
        [1, 5, 9, 12, 15, 18], truncate_prompt_tokens=3, return_token_ids=True
    ),
    "truncated to more than there is": complete(truncate_prompt_tokens=30, return_token_ids=True),
    "chat": chat(),
    "chat logprobs": chat(logprobs=True, top_logprobs=3),
    "chat logprobs without others": chat(logprobs=True),
    "chat token ids": chat(return_token_ids=True),
    "chat prompt_logprobs": chat(prompt_logprobs=1, max_tokens=2),
    "chat penalties": chat(repetition_penalty=1.3, presence_penalty=0.5, max_tokens=20),
    "chat parts": (
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "count :"}]},
                {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
                {"role": "user", "content": "nine"},
            ],
            "temperature": 0,
            "max_tokens": 5,
            "return_token_ids": True,
        },
    ),
    "chat continued": (
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [
                {"role": "user", "content": "count :"},
                {"role": "assistant", "content": " nine"},
            ],
            "temperature": 0,
            "max_tokens": 5,
            "add_generation_prompt": False,
            "continue_final_message": True,
            "return_token_ids": True,
        },
    ),
    "chat with values": chat(
        chat_template_kwargs={"before": "copy : "}, max_tokens=3, return_token_ids=True
    ),
    "beams": complete(use_beam_search=True, n=3),
    "beams of one": complete("cat moon", use_beam_search=True, max_tokens=6),
    "beams told": complete(use_beam_search=True, n=2, logprobs=2, max_tokens=5),
    "beams to the end": complete(
        use_beam_search=True, n=4, max_tokens=40, length_penalty=0.2, return_token_ids=True
    ),
    "beams beyond the end": complete(
        use_beam_search=True, n=2, max_tokens=30, ignore_eos=True, return_token_ids=True
    ),
    "beams with their end": complete(
        use_beam_search=True, n=3, max_tokens=30, include_stop_str_in_output=True,
        return_token_ids=True,
    ),
    "beams that prefer length": complete(use_beam_search=True, n=3, length_penalty=2.5),
    "beams of two prompts": complete(["count : nine", "cat moon"], use_beam_search=True, n=2),
    "beams of a chat": chat(use_beam_search=True, n=2),
    # Refused.
    "presence too large": complete(presence_penalty=2.1),
    "frequency too small": complete(frequency_penalty=-2.1),
    "repetition 0": complete(repetition_penalty=0),
    "top_p 0": complete(top_p=0),
    "min_p too large": complete(min_p=1.1),
    "top_k too small": complete(top_k=-2),
    "bias of no token": complete(logit_bias={"999999": 1}),
    "bias of no number": complete(logit_bias={"a": 1}),
    "allowed that is no token": complete(allowed_token_ids=[999999]),
    "stop token that is none": complete(stop_token_ids=[999999]),
    "prompt_logprobs below": complete(prompt_logprobs=-2),
    "logprobs above": complete(logprobs=21),
    "prompt too long": complete("count : nine " * 40),
    "best and streamed": complete(use_beam_search=True, stream=True),
    "unknown model": ("/v1/completions", {"model": "none", "prompt": "a"}),
    "two ends of a chat": chat(continue_final_message=True, add_generation_prompt=True),
    "prompt_logprobs streamed": complete(prompt_logprobs=1, stream=True),
}  # fmt: skip


def core(status: int, answer: dict[str, Any]) -> dict[str, Any]:
    """What must be the same of an answer."""
    if status != 200:
        return {"status": status}
    kept: dict[str, Any] = {"status": 200}
    for name in ("prompt_token_ids", "prompt_logprobs"):
        if answer.get(name) is not None:
            kept[name] = answer[name]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    kept["usage"] = {name: answer["usage"][name] for name in names}
    kept["choices"] = [_choice(choice) for choice in answer["choices"]]
    return kept


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    names = ("index", "finish_reason", "stop_reason")
    kept = {name: choice[name] for name in names}
    kept["text"] = choice.get("text", choice.get("message", {}).get("content"))
    for name in ("token_ids", "prompt_token_ids", "prompt_logprobs"):
        if choice.get(name) is not None:
            kept[name] = choice[name]
    told = choice.get("logprobs")
    if told is not None and "content" in told:
        parts = ("token", "logprob", "bytes", "top_logprobs")
        told = [{name: each[name] for name in parts} for each in told["content"]]
    kept["logprobs"] = told
    return kept


def same(one: Any, other: Any) -> Any:
    """`other`, with its numbers near those of `one` where they are as near."""
    if isinstance(one, dict):
        return {key: same(one[key], value) if key in one else value for key, value in other.items()}
    if isinstance(one, list) and len(one) == len(other):
        return [same(*pair) for pair in zip(one, other, strict=True)]
    if isinstance(one, float) and isinstance(other, float):
        return one if one == pytest.approx(other, abs=TOP) else other
    return other


def answers() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text())) if FILE.exists() else {}
