"""What a model takes beside text, or instead: random inputs for the names in its class's signature,
of the shapes that its configuration says."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch

from converters.errors import TargetError
from converters.targets.model import Inputs

_PIXELS = 64
_PATCHES = 16  # of an image that is taken apart before
_FRAMES = 12  # of a spectrogram that goes on with what was heard
# How many places of a text an image takes, and which token stands there.
_PLACES = ("num_query_tokens", "latent_query_num", "mm_tokens_per_image")
_PLACEHOLDERS = ("image_token_id", "image_token_index")
_KINDS = (
    *("pixel_values", "pixel_values_videos", "flattened_patches", "input_values"),
    *("input_features", "decoder_input_values", "speaker_embeddings", "qformer_input_ids"),
)
# The part of a model that reads an input: a configuration without it has None in its place.
_READ_BY = {
    **dict.fromkeys(("pixel_values", "pixel_values_videos"), "vision_config"),
    **dict.fromkeys(("input_values", "input_features"), "audio_config"),
    "qformer_input_ids": "qformer_config",
}


def text_of(config: Any) -> Any:
    """The configuration of the text that goes in."""
    try:
        return config.get_text_config()
    except ValueError:  # there are two, and the other one's is what comes out
        return config.get_text_config(encoder=True)


def takes(cls: Any) -> dict[str, bool]:
    """The names in the signature of a class's `forward`, and whether it asks for each."""
    signature = inspect.signature(cls.forward).parameters
    return {name: p.default is p.empty for name, p in signature.items()}


def places(cls: Any, config: Any) -> int:
    """How many places an image takes in the texts of a class; 0 where it takes none, or nobody
    knows, or the class has no positions for so many."""
    known = (getattr(config, key, None) for key in _PLACES)
    count: int = next((n for n in known if n), None) or _patches(config)
    most = getattr(text_of(config), "max_position_embeddings", None) or 1 << 20
    images = [name for name in _KINDS if name in takes(cls)]
    return count if images and 2 * count < most else 0


def _patches(config: Any) -> int:
    """The patches of an image, as many as are left of them, where a place of the text is each."""
    eyes = getattr(config, "vision_config", None)
    sizes = [getattr(eyes, key, None) for key in ("image_size", "patch_size")]
    image, patch = (size[0] if isinstance(size, list | tuple) else size for size in sizes)
    if not image or not patch or not _placeholders(config):
        return 0
    side = image // patch * getattr(config, "downsample_ratio", 1)
    less = (getattr(config, key, None) for key in ("scale_factor", "downsample_factor"))
    return int(side / next((n for n in less if n), 1)) ** 2


def _placeholders(config: Any) -> list[int]:
    return [n for key in _PLACEHOLDERS if (n := getattr(config, key, None)) is not None]


def beside_text(cls: Any, config: Any) -> list[tuple[str, ...]]:
    """What a class of texts is asked beside them, the most first: all that it takes, what it asks
    for, nothing. Where the text itself has a place for an image, and nobody knows how long one
    is, images are left out."""
    names = takes(cls)
    kinds = [name for name in _KINDS if getattr(config, _READ_BY.get(name, ""), ()) is not None]
    main = [cls.main_input_name] if cls.main_input_name in kinds else []
    known = [name for name in kinds if name in names]
    asked = [name for name in known if names[name] or name in main]
    if _placeholders(config) and not places(cls, config):
        known = asked
    return list(dict.fromkeys((tuple(known), tuple(asked), ())))


def with_others(inputs: Inputs, names: Collection[str], cls: Any, config: Any) -> Inputs:
    """Texts with the other inputs `names`, one for each row."""
    if not names:
        return inputs
    rows, count = len(inputs["input_ids"]), places(cls, config)
    generator = torch.Generator().manual_seed(0)
    made = {name: random_input(name, config, rows, generator) for name in names}
    for name in [*made]:
        made |= dict(_with(name, made[name], takes(cls)))
    token = next(iter(_placeholders(config)), 1)
    ids = inputs["input_ids"].clone()
    if "bbox" in takes(cls):
        made["bbox"] = torch.zeros(*ids.shape, 4, dtype=torch.long)
    if count:
        ids[ids == token] = max(token - 1, 0)
        ones = torch.ones(rows, count, dtype=ids.dtype)
        if "image_embeds_position_mask" in takes(cls):
            made["image_embeds_position_mask"] = torch.cat([ones, torch.zeros_like(ids)], dim=1)
        ids = made["input_ids"] = torch.cat([ones * token, ids], dim=1)
        made["attention_mask"] = torch.cat([ones, inputs["attention_mask"]], dim=1)
    if "decoder_input_ids" in takes(cls) and "decoder_input_ids" not in inputs:
        made |= {name: ids for name in ("decoder_input_ids", "labels") if name in takes(cls)}
    return {**inputs, **made}


def _with(name: str, value: torch.Tensor, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What says how large an image was, where a class takes that too."""
    rows, count = value.shape[:2]
    if name == "flattened_patches" and "width" in names:
        yield "width", torch.full((rows,), count)
        yield "height", torch.ones(rows, dtype=torch.long)
    if name == "pixel_values" and "spatial_shapes" in names:
        yield "pixel_attention_mask", torch.ones(rows, count, dtype=torch.long)
        yield "spatial_shapes", torch.tensor([[1, count]] * rows)


def random_input(name: str, config: Any, rows: int, generator: torch.Generator) -> torch.Tensor:
    """`rows` of an input that is no text of the model's own.

    Raises `TargetError` for one whose shape is not known.
    """
    if name == "qformer_input_ids":
        vocab = config.qformer_config.vocab_size
        return torch.randint(min(5, vocab - 1), vocab, (rows, _FRAMES), generator=generator)
    found = torch.randn((rows, *_shape(name, config)), generator=generator)
    if name == "flattened_patches":  # each says its row and column first
        found[..., 0], found[..., 1] = 1.0, torch.arange(1, found.shape[1] + 1)
    return found


def _shape(kind: str, config: Any) -> tuple[int, ...]:
    """The shape of one input."""
    parts = ("vision_config", "image_config", "audio_config", "encoder", "backbone_config")
    holders = [config, *(getattr(config, part, None) for part in parts)]

    def said(key: str) -> Any:
        return next((v for h in holders if (v := getattr(h, key, None)) is not None), None)

    mels = getattr(config, "num_mel_bins", None)
    match kind:
        case "pixel_values" if said("num_patches") and said("patch_size"):
            return said("num_patches"), (said("num_channels") or 3) * said("patch_size") ** 2
        case "pixel_values" | "pixel_values_videos":
            size = said("image_size") or said("max_img_size") or _PIXELS  # of any where none is
            frames = [config.num_frames] if hasattr(config, "num_frames") else []
            channels = getattr(config, "num_channels", None) or 3
            return (*frames, channels, *((size, size) if isinstance(size, int) else size))
        case "flattened_patches":
            return min(_PATCHES, said("seq_len") - 1), 2 + said("patch_embed_hidden_size")
        case "decoder_input_values":
            return _FRAMES, config.num_mel_bins
        case "speaker_embeddings":
            return (config.speaker_embedding_dim,)
        case "input_features" if hasattr(config, "max_source_positions") and mels:
            return mels, 2 * config.max_source_positions  # Whisper's first layers halve it
        case "input_values" | "input_features" if mels and hasattr(config, "max_length"):
            return config.max_length, mels  # a spectrogram as an image
        case "input_values":
            return (4000,)  # samples
    for width in ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins"):
        if (n := said(width)) is not None:
            return 64, n
    raise TargetError(
        "verify does not know what to ask this model",
        found=f"{kind}, of a {type(config).__name__}",
        expected="text, images, waves or spectra",
        remedy="compare its outputs with the unmerged run's on inputs of your own",
    )
