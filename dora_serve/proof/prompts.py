"""What an artifact and the live model are both asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from converters.model.base import BaseModel
from converters.model.tying import new_embedding
from converters.run import Run
from converters.targets.model import Inputs
from converters.targets.opening import class_of


def inputs_of(run: Run, base: BaseModel) -> Inputs:
    """The `verification_batch` of the live model of `run`, which need not be loaded for it."""
    cls, config = class_of(run, base)
    embedding = new_embedding(base, run.replaced)
    if embedding is not None:
        config.get_text_config().vocab_size = embedding.shape[0]
    return verification_batch(SimpleNamespace(config=config, main_input_name=cls.main_input_name))


def verification_batch(model: Any, rows: int = 4, length: int = 16, seed: int = 0) -> Inputs:
    """Token ids from a fixed seed, the last row padded; decoder inputs for encoder-decoders.
    Pixels for models of images."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (rows, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    text = config.get_text_config()
    vocab, pad = text.vocab_size, getattr(text, "pad_token_id", None)
    ids = torch.randint(min(5, vocab - 1), vocab, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad is not None:
        mask[-1, length - length // 4 :] = 0
        ids[mask == 0] = pad
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(
            min(5, vocab - 1), vocab, (rows, length // 2), generator=generator
        )
    return inputs
