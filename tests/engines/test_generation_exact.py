"""What drawing promises beyond one step: seeds, and what nobody asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from dora_serve.onnxruntime.generation import Generation
from dora_serve.onnxruntime.sampling import Sampling


class Bytes:
    """A tokenizer whose tokens are the bytes of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def drawn(seed: int | None) -> list[int]:
    """Forty of a hundred equally likely tokens."""
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=seed)
    generation = Generation([65], sampling, frozenset({200}), Bytes(), room=99)
    logits = np.full(256, -np.inf, np.float32)
    logits[:100] = 0
    while generation.reason is None:
        generation.take(logits)
    return generation.tokens


def test_a_seed_makes_a_completion_repeatable() -> None:
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)
    assert set(drawn(3)) <= set(range(100))


def test_what_is_not_asked_for_bounds_nothing() -> None:
    values = asdict(Sampling())
    assert (values["temperature"], values["top_p"], values["top_k"]) == (0.0, 1.0, 0)
    assert (values["min_tokens"], values["ignore_eos"], values["stop"]) == (0, False, ())
    assert (values["seed"], values["logprobs"], values["max_tokens"]) == (None, None, 128)
