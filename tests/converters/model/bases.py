"""Bases of made-up tensors, with nothing in their configuration but what is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from converters.model.base import BaseModel, open_base
from tests.converters.made import WEIGHTS


def make_base(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> BaseModel:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / WEIGHTS, {"format": "pt"})
    return open_base(folder)
