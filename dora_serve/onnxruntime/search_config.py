"""How a model's generation configuration has an encoder-decoder write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .beams import Search
from .session import EngineError

_BEAMS = 64
# What a configuration may ask of what is written that is not done here, beside its neutral forms.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "return_timestamps": (None, False),
    "encoder_repetition_penalty": (None, 1),
    "diversity_penalty": (None, 0),
    "num_beam_groups": (None, 1),
    "guidance_scale": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None, []),
    "stop_strings": (None, []),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "dola_layers": (None,),
}
# And where the likeliest text is looked for, not drawn.
_NOT_SEARCHED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1),
    "do_sample": (None, False),
}
# And where it is drawn.
_NOT_DRAWN: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "top_h": (None,),
}


def read_search(config: Mapping[str, Any], file: Path, most: int, *, heard: bool = False) -> Search:
    """What `config`, read from `file`, says; of lengths that it does not name those of `Search`,
    and never more than `most` tokens. `heard`: of speech, whose texts are searched in any case.

    The names are those of transformers' `GenerationConfig`, whose `max_length` and `min_length`
    count the token that the decoder begins with. Raises `EngineError` where it asks for what is not
    done here, or what cannot be.
    """

    def count(name: str, least: int, greatest: int) -> int | None:
        found = config.get(name)
        if found is not None and not (isinstance(found, int) and least <= found <= greatest):
            raise EngineError(
                f"the configuration's {name} is none",
                file=file,
                found=found,
                expected=f"{least} to {greatest}",
            )
        return found

    beams = count("num_beams", 1, _BEAMS) or 1
    undone = _NOT_DONE | (_NOT_SEARCHED if beams > 1 or heard else {})
    undone |= _NOT_DRAWN if config.get("do_sample") else {}
    undone |= {"encoder_no_repeat_ngram_size": (None, 0), "min_length": (None, 0)} if heard else {}
    for name, neutral in undone.items():
        if config.get(name) not in neutral:
            raise EngineError(
                f"the generation configuration asks for what is not done here: {name}",
                file=file,
                found=config[name],
                remedy=f"take {name} out of it, if the text without it is wanted",
            )
    penalty, early = config.get("length_penalty"), config.get("early_stopping")
    if not isinstance(penalty, int | float | None):
        raise EngineError("no length_penalty", file=file, found=penalty)
    if early not in (None, True, False, "never"):
        raise EngineError("no early_stopping", file=file, found=early)
    begun = 0 if heard else 1  # tokens
    longest = count("max_length", begun + 1, 1 << 31)
    new = count("max_new_tokens", 1, 1 << 31) or (longest and longest - begun)
    shortest, least = count("min_length", 0, most + begun), count("min_new_tokens", 0, most)
    if least is None:
        least = max((shortest or 0) - begun, 0)
    return Search(
        min(most, new or (most if heard else Search.max_tokens)),
        beams=beams,
        length_penalty=1.0 if penalty is None else penalty,
        early_stopping=early or False,
        min_tokens=least,
        no_repeat_ngram=count("no_repeat_ngram_size", 0, most) or 0,
        no_read_ngram=count("encoder_no_repeat_ngram_size", 0, most) or 0,
    )
