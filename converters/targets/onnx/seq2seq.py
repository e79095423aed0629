"""Encoder-decoders (BART, T5, Whisper) as ONNX, with Optimum's names for files, inputs, outputs.

`encoder_model.onnx` reads the text, or hears the sound. `decoder_model.onnx` takes the first tokens
and fills the caches of keys and values: the decoder's own, and those over the encoder's output.
`decoder_with_past_model.onnx` adds one token. The three share one file of weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...errors import TargetError
from ...files.json_files import read_json
from ...files.onnx_files import ADAPTER_INDEX, DECODER, ENCODER, NO_ADAPTER, WITH_PAST
from .both_steps import write_both_steps
from .branches import add_branches
from .export import Axes, Part, fused
from .graph_file import GraphWriter
from .linear import linear_sites, three_axes
from .loaded import load_whole, write_config
from .surgery import optional_input

_ROWS, _SOURCE, _TOKENS = "batch_size", "encoder_sequence_length", "decoder_sequence_length"
_PAST = "past_decoder_sequence_length"
_MASK = "encoder_attention_mask"
_HEARS = "WhisperForConditionalGeneration"  # others of sound take a mask, or any length of it


class _Encoder(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, given: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        output = self.model.get_encoder()(given, attention_mask=attention_mask)
        states: torch.Tensor = output.last_hidden_state
        return states


class _First(torch.nn.Module):
    """The decoder without caches: logits, then per layer own and cross keys and values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits = _decode(
            self.model, encoder_attention_mask, input_ids, encoder_hidden_states, cache
        )
        own, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        pairs = zip(own, cross, strict=True)
        return (logits, *(t for a, b in pairs for t in (a.keys, a.values, b.keys, b.values)))


class _Next(torch.nn.Module):
    """The decoder with caches, one token: logits, then per layer own keys and values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._width = model.config.d_model

    def forward(
        self,
        input_ids: torch.Tensor,
        past: list[torch.Tensor],
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        layers = [past[i : i + 4] for i in range(0, len(past), 4)]
        cache = EncoderDecoderCache(
            DynamicCache([(layer[0], layer[1]) for layer in layers]),
            DynamicCache([(layer[2], layer[3]) for layer in layers]),
        )
        cache.is_updated = dict.fromkeys(range(len(layers)), True)
        # Only its shape is used: keys and values over the encoder's output are in the cache.
        states = past[2].new_zeros((past[2].shape[0], past[2].shape[2], self._width))
        logits = _decode(self.model, encoder_attention_mask, input_ids, states, cache)
        own = cache.self_attention_cache.layers
        return (logits, *(tensor for layer in own for tensor in (layer.keys, layer.values)))


def _decode(
    model: Any, mask: torch.Tensor | None, tokens: torch.Tensor, states: torch.Tensor, cache: Any
) -> torch.Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    output = model(
        attention_mask=mask,
        decoder_input_ids=tokens,
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        past_key_values=cache,
        use_cache=True,
    )
    logits: torch.Tensor = output.logits
    return logits


def build_seq2seq(model: Path, out: Path, writer: GraphWriter, *, adaptable: bool) -> None:
    """Write the graphs of the Hugging Face folder `model` into `out`, configuration and tokenizer
    beside it; `adaptable`: another adapter, or none, in every row of a batch.

    Raises `TargetError` when a graph would not compute what the model computes.
    """
    loaded = load_whole(model)
    sound = loaded.main_input_name != "input_ids"
    if not getattr(loaded.config, "d_model", None) or (sound and type(loaded).__name__ != _HEARS):
        raise TargetError("no ONNX export for this architecture", found=type(loaded).__name__)
    parts = parts_of(loaded)
    graphs = {name: part.export() for name, part in parts.items()}
    if adaptable:
        make_adaptable(graphs, loaded, parts)
    for name, part in parts.items():
        writer.write(name, fused(graphs.pop(name)), part.check)
    write_both_steps(out)
    write_config(loaded, out, model)
    write_rules(loaded, out)
    name_language(out)


def write_rules(loaded: Any, out: Path) -> None:
    """How the model writes, where no file of it says so: transformers then heeds what its
    `config.json` says, as that of an older BART, and leaves it out of the one that it saves."""
    path = out / "generation_config.json"
    if not path.exists():
        path.write_text(loaded.generation_config.to_json_string(), encoding="utf-8")


def name_language(out: Path) -> None:
    """Have the language that a Whisper's generation configuration in `out` names told by its code:
    which it is, transformers alone knows."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    path = out / "generation_config.json"
    said: Any = read_json(path) if path.exists() else {}
    code = TO_LANGUAGE_CODE.get(str(said.get("language")).lower())
    if code is not None:
        path.write_text(json.dumps({**said, "language": code}), encoding="utf-8")


def make_adaptable(graphs: dict[str, ir.Model], loaded: Any, parts: dict[str, Part]) -> None:
    """A branch behind every linear layer, but for one that some graph cannot have a branch of, and
    then none has; rows have no adapter where none are told."""
    found = {name: linear_sites(graphs[name], loaded, part) for name, part in parts.items()}
    lost = set[str]().union(*(left for _, left in found.values()))
    for name, (sites, _) in found.items():
        model = graphs[name]
        three_axes(model, sites, loaded)
        optional_input(model.graph, ADAPTER_INDEX, np.array([NO_ADAPTER]), [_ROWS])
        add_branches(model, (site for site in sites if site.name not in lost), batched=True)


def parts_of(model: Any) -> dict[str, Part]:
    """File name → graph to be."""
    decoder, words = model.get_decoder(), model.config.vocab_size - 3
    layers = len(decoder.layers if hasattr(decoder, "layers") else decoder.block)
    encoder, first = _Encoder(model), _First(model)
    sound = model.main_input_name != "input_ids"

    def tokens_of(rows: int) -> torch.Tensor:
        tokens: torch.Tensor = torch.arange(rows * (rows + 4)).view(rows, -1) % words + 3
        return tokens

    def read(rows: int) -> dict[str, Any]:
        if sound:  # of one length, all of which is heard
            shape = (rows, model.config.num_mel_bins, 2 * model.config.max_source_positions)
            return {"given": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
        mask = torch.ones_like(ids := tokens_of(rows))
        mask[-1, rows + 1 :] = 0
        return {"given": ids, "attention_mask": mask}

    def begin(rows: int) -> dict[str, Any]:
        given = read(rows)
        with torch.inference_mode():
            states = encoder(**given)
        inputs = {"input_ids": tokens_of(rows)[:, : rows + 1], "encoder_hidden_states": states}
        return inputs if sound else {**inputs, _MASK: given["attention_mask"]}

    def go_on(rows: int) -> dict[str, Any]:
        inputs = begin(rows)
        with torch.inference_mode():
            _, *past = first(**inputs)
        inputs["input_ids"] = inputs["input_ids"][:, :1]
        del inputs["encoder_hidden_states"]
        return {"input_ids": inputs.pop("input_ids"), "past": past, **inputs}

    kinds = [
        f"{layer}.{side}.{kind}"
        for layer in range(layers)
        for side in ("decoder", "encoder")
        for kind in ("key", "value")
    ]
    length = None if sound else _SOURCE
    source: Axes = (_ROWS, length)
    given: dict[str, Axes] = {"given": (*source, None) if sound else source}
    masks: dict[str, Axes] = {} if sound else {_MASK: source}
    more: dict[str, Axes] = {} if sound else {"attention_mask": source}

    def cache(kind: str, own: str) -> Axes:
        return (_ROWS, None, length if ".encoder." in kind else own, None)

    present = {f"present.{k}": cache(k, _TOKENS) for k in kinds}
    longer = {f"present.{k}": cache(k, f"{_PAST} + 1") for k in kinds if ".decoder." in k}
    tokens = "input_ids"
    return {
        ENCODER: Part(
            encoder,
            read,
            {**given, **more},
            {"last_hidden_state": (*source, None)},
            [model.main_input_name, *more],
        ),
        DECODER: Part(
            first,
            begin,
            {tokens: (_ROWS, _TOKENS), "encoder_hidden_states": (*source, None), **masks},
            {"logits": (_ROWS, _TOKENS, None), **present},
        ),
        WITH_PAST: Part(
            _Next(model),
            go_on,
            {tokens: (_ROWS, None), "past": [cache(k, _PAST) for k in kinds], **masks},
            {"logits": (_ROWS, None, None), **longer},
            [tokens, *(f"past_key_values.{kind}" for kind in kinds), *masks],
        ),
    }
