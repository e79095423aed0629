"""What an ONNX folder holds, by name: for those who write it and those who run it.

Imports neither torch nor onnx, so that an engine can do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TensorFileError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# Decoders and encoders: the graph for one adapter at a time, and for another in every row.
MODEL, BATCHED = "model.onnx", "batched.onnx"
DATA = "model.onnx.data"  # the weights of all graphs that do not hold them themselves
GENAI = "genai_config.json"  # beside a decoder, as onnxruntime-genai reads it
# Encoder-decoders, with Optimum's names.
ENCODER = "encoder_model.onnx"
DECODER, WITH_PAST = "decoder_model.onnx", "decoder_with_past_model.onnx"
MERGED = "decoder_model_merged.onnx"  # both as one, for transformers.js

PRECISIONS = ("fp32", "fp16", "int8", "int4")

FOLDER, SUFFIX = "adapters", ".onnx_adapter"
OWN_HEADS = f"base_heads{SUFFIX}"

ADAPTER_INDEX, NO_ADAPTER = "adapter_index", -1
LOGITS_POSITIONS = "logits_positions"  # of a decoder: where logits are wanted; empty: everywhere
# Of a decoder that computes otherwise for rows longer than a border: how long each row gets, where
# that is more than its attention mask says. The border is in the graph's metadata.
ROW_LENGTHS, BORDER = "row_lengths", "row_length_border"
LABELS = "labels"  # the axis of a head whose size an adapter may change
_WEIGHT, _BIAS = ".head_weight", ".head_bias"


def is_onnx_folder(path: Path) -> bool:
    """Whether `path` is a folder as `dora-export onnx` writes it."""
    return (path / MODEL).is_file() or (path / ENCODER).is_file()


def graphs_in(folder: Path) -> list[Path]:
    """The graphs that together run with one adapter: one, or the parts of an encoder-decoder."""
    return [file for n in (MODEL, ENCODER, DECODER, WITH_PAST) if (file := folder / n).is_file()]


def names(site: str) -> tuple[str, str, str]:
    """The graph inputs of one site: A `[in, r]`, B `[r, out]`, and the owner of each rank."""
    return f"{site}.lora_A", f"{site}.lora_B", f"{site}.lora_owner"


def head_names(module: str) -> tuple[str, str]:
    """The graph inputs of one head: weight `[in, out]` and bias `[out]`."""
    return f"{module}{_WEIGHT}", f"{module}{_BIAS}"


def heads_in(names: Iterable[str]) -> list[str]:
    """The modules of the heads among the names of a graph's inputs."""
    return sorted(name.removesuffix(_WEIGHT) for name in names if name.endswith(_WEIGHT))


def read_adapter_file(path: Path) -> dict[str, Array]:
    """Input name → array. Raises `TensorFileError` when ONNX Runtime cannot read the file."""
    from onnxruntime import AdapterFormat

    try:
        parameters = AdapterFormat.read_adapter(str(path)).get_parameters()
        return {name: value.numpy().copy() for name, value in parameters.items()}
    except Exception as error:
        raise TensorFileError(
            "not an ONNX Runtime adapter",
            file=path,
            found=str(error)[:200],
            remedy="the file is damaged: add the adapter again",
        ) from None


def digest(parameters: Mapping[str, Array]) -> bytes:
    """SHA-256 of what `read_adapter_file` read: the same for the same parameters and no others."""
    found = sha256()
    for name, array in sorted(parameters.items()):
        found.update(f"{name} {array.dtype} {array.shape};".encode())
        found.update(array.data)
    return found.digest()
