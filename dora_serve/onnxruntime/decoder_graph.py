"""A decoder's graph in ONNX Runtime: what its inputs are, and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from converters.files.json_files import read_json
from converters.files.onnx_files import BORDER, LOGITS_POSITIONS

from .adapter_set import AdaptedFolder, AdapterSet
from .session import EngineError, open_adaptable

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class DecoderGraph(AdaptedFolder):
    """The graph in a decoder folder as `dora-export onnx` writes it, no adapter loaded.

    `threads`: as `Session` takes it. `max_length` (default: the model's context)
    bounds the tokens of a row. `in_place`: whether keys and values are written into the cache they
    are read from. `border`: a row that becomes longer needs all its keys and values anew; None
    where none does.

    Raises `EngineError` for a graph that was not made by `dora-export onnx`.
    """

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__(folder)
        settings: Any = read_json(self.folder / "genai_config.json")
        config = settings["model"]
        layers = config["decoder"]["num_hidden_layers"]
        self.cache = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        self.heads: int = config["decoder"]["num_key_value_heads"]
        self.head_size: int = config["decoder"]["head_size"]
        ends = config["eos_token_id"]
        self.eos: frozenset[int] = frozenset(ends if isinstance(ends, list) else [ends])
        self.context: int = config["context_length"]
        self.max_length: int = min(max_length or self.context, self.context)
        self.session = open_adaptable(self.folder, threads)
        if LOGITS_POSITIONS not in self.session.defaults:
            raise EngineError(
                "this graph computes the logits of every token of a prompt",
                file=self.folder,
                expected=f"an input {LOGITS_POSITIONS}",
                remedy="export it again: dora-export onnx",
            )
        self.vocabulary: int = config["vocab_size"]
        border = self.session.inference.get_modelmeta().custom_metadata_map.get(BORDER)
        self.border = None if border is None else int(border)
        self.in_place: bool = settings["search"]["past_present_share_buffer"]
        self.cache_type = _TYPES[self.session.types["past_key_values.0.key"]]
        self.adapter_set = AdapterSet([self.session])
