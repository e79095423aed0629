"""Whisper as CTranslate2 keeps it, made a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

Tensors = dict[str, torch.Tensor]
_END, _START = 50257, 50258  # <|endoftext|>, <|startoftranscript|>
_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by CTranslate2's number of them


def make_whisper(source: Path, parts: list[Path], folder: Path) -> None:
    """Write `folder`, float32, of the files in `source` and the weights in `parts`, in order."""
    whole = source / "model.bin"
    with whole.open("wb") as stream:
        for part in parts:
            stream.write(part.read_bytes())
    with whole.open("rb") as stream:
        weights = _named(_tensors(stream))
    layers = {side: 1 + max(_layers(weights, side)) for side in ("encoder", "decoder")}
    width, hidden = (weights["model.encoder.layers.0.fc1.weight"].shape[i] for i in (1, 0))
    words = weights["model.decoder.embed_tokens.weight"].shape[0]
    said: dict[str, Any] = json.loads((source / "config.json").read_text())
    config = WhisperConfig(
        vocab_size=words,
        decoder_start_token_id=_START,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _END),
        d_model=width,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=hidden,
        decoder_ffn_dim=hidden,
    )
    model = WhisperForConditionalGeneration(config)
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown and set(missing) <= {
        "proj_out.weight",
        "model.encoder.embed_positions.weight",  # computed, and made by the model
    }, (missing, unknown)
    model.tie_weights()
    shutil.copy(source / "tokenizer.json", _made(folder))
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **ends)
    model.generation_config = _generation(config, tokenizer, said)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _generation(config: Any, tokenizer: Any, said: dict[str, Any]) -> GenerationConfig:
    """What OpenAI's own folders say."""
    token = tokenizer.convert_tokens_to_ids
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": token(f"<|{code}|>") for code in [*LANGUAGES][:99]},
        task_to_id={task: token(f"<|{task}|>") for task in TASK_IDS},
        no_timestamps_token_id=token("<|notimestamps|>"),
        prev_sot_token_id=token("<|startofprev|>"),
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        return_timestamps=False,
        alignment_heads=said["alignment_heads"],
        suppress_tokens=said["suppress_ids"],
        begin_suppress_tokens=said["suppress_ids_begin"],
    )


def _tensors(stream: BinaryIO) -> Tensors:
    """All variables of a CTranslate2 file, float32."""

    def take(form: str) -> Any:
        return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))[0]

    def name() -> str:
        return stream.read(take("H"))[:-1].decode()

    assert take("I") >= 5, "an older form of the file"
    name(), take("I")
    found: Tensors = {}
    for _ in range(take("I")):
        key, rank = name(), take("B")
        shape = [take("I") for _ in range(rank)]
        kind, size = take("B"), take("I")
        values = np.frombuffer(stream.read(size), _TYPES[kind]).reshape(shape)
        if values.dtype.kind == "f":
            found[key] = torch.from_numpy(values.astype(np.float32))
    return found


def _layers(weights: Tensors, side: str) -> list[int]:
    start = f"model.{side}.layers."
    return [int(n.removeprefix(start).split(".")[0]) for n in weights if n.startswith(start)]


_PLAIN = {
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
}
_FUSED = {
    "self_attention/linear_0": "self_attn.{}_proj",
    "attention/linear_1": "encoder_attn.{}_proj",
}
_ENDS = {"gamma": "weight", "beta": "bias"}


def _named(tensors: Tensors) -> Tensors:
    """The tensors by the names of transformers' class, fused ones apart."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        side, *inside, end = name.split("/")
        end = _ENDS.get(end, end)
        start = f"model.{side}"
        if inside and inside[0].startswith("layer_") and inside[0] != "layer_norm":
            start += f".layers.{inside[0].removeprefix('layer_')}"
            path = "/".join(inside[1:])
            if path in _FUSED:
                kinds = "qkv" if path.startswith("self") else "kv"
                for kind, part in zip(kinds, tensor.chunk(len(kinds)), strict=True):
                    if (kind, end) != ("k", "bias"):  # there is none, and zeros stand for it
                        found[f"{start}.{_FUSED[path].format(kind)}.{end}"] = part.clone()
                continue
            path = _PLAIN[path]
        else:
            path = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}.get(
                inside[0], inside[0]
            )
            if path == "projection":
                continue
            end = "weight" if end == "encodings" else end
        found[f"{start}.{path}.{end}"] = tensor
    return found
