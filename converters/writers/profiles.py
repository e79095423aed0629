"""What each engine can read of a LoRA adapter: data, so that a new engine is a new entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """`whole_modules`: modules trained whole that it loads, None for any. `max_rank`: its limit.

    `biases`, `embeddings`: whether it loads trained biases and adapters on embeddings.
    """

    name: str
    whole_modules: frozenset[str] | None
    max_rank: int | None
    biases: bool
    embeddings: bool


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("peft", None, None, biases=True, embeddings=True),
        # vllm/lora/peft_helper.py and vllm/config/lora.py; ranks up to 512, heads of classifiers.
        Profile("vllm", frozenset({"classifier", "score"}), 512, biases=False, embeddings=False),
    )
}
