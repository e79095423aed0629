"""What an ONNX folder that anybody may have made says of itself, checked before it is opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from converters.errors import TensorFileError
from converters.files.handles import check_file
from converters.files.json_files import read_json
from converters.files.onnx_files import BATCHED, GENAI, MODEL, graphs_in

_LARGEST = (1 << 31) - 1  # bytes that protobuf reads
_Count = Annotated[StrictInt, Field(gt=0, le=1 << 24)]
_Token = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


class _Said(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class _Decoder(_Said):
    num_hidden_layers: _Count
    num_key_value_heads: _Count
    head_size: _Count


class _Model(_Said):
    decoder: _Decoder
    eos_token_id: _Token | list[_Token]
    context_length: _Count
    vocab_size: _Count


class _Search(_Said):
    past_present_share_buffer: StrictBool


class Genai(_Said):
    """`genai_config.json`, so far as it is read here."""

    model: _Model
    search: _Search


def read_genai(folder: Path) -> Genai:
    """Raises `TensorFileError` where it is not what `dora-export onnx` writes."""
    path = folder / GENAI
    try:
        return Genai.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TensorFileError(
            "the configuration is none of a decoder that is served here",
            file=path,
            found=f"{place}: {first['msg']}",
            remedy="export it again",
        ) from None


def check_graphs(folder: Path, genai: Genai | None) -> None:
    """Raise `TensorFileError` where a graph of `folder` is none, takes data from elsewhere, or is
    not the one that `genai` tells of."""
    for path in (*(graphs_in(folder) or [folder / MODEL]), folder / BATCHED):
        if path.name != BATCHED or path.exists():
            _check(path, genai)


def _check(path: Path, genai: Genai | None) -> None:
    import onnx

    if check_file(path) > _LARGEST:
        raise TensorFileError("too large for an ONNX graph", file=path)
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # of protobuf, whose kinds changed over time
        raise TensorFileError("not an ONNX graph", file=path, found=str(error)[:200]) from None
    for tensor in _tensors(model):
        said = {_text(entry.key): _text(entry.value) for entry in tensor.external_data}
        if tensor.data_location != onnx.TensorProto.EXTERNAL and not said:
            continue
        place = PurePosixPath(said.get("location", ""))
        if place.is_absolute() or ".." in place.parts or not place.parts:
            raise TensorFileError(
                "the graph takes data from outside of its folder",
                file=path,
                tensor=tensor.name,
                found=said.get("location"),
            )
        check_file(path.parent / place)
    if genai is None:
        return
    decoder = genai.model.decoder
    inputs = {_text(value.name): value.type.tensor_type.shape.dim for value in model.graph.input}
    keys = [
        name for name in inputs if name.startswith("past_key_values.") and name.endswith(".key")
    ]
    shape = [dim.dim_value for dim in inputs.get("past_key_values.0.key", ())]
    if len(keys) != decoder.num_hidden_layers or shape[1::2] != [
        decoder.num_key_value_heads,
        decoder.head_size,
    ]:
        raise TensorFileError(
            f"the graph is not the one that {GENAI} tells of",
            file=path,
            found=f"{len(keys)} layers, cache {shape}",
            expected=f"{decoder.num_hidden_layers} layers, {decoder.num_key_value_heads} heads "
            f"of {decoder.head_size}",
        )


def _text(name: str | bytes) -> str:
    """A name in a graph, which protobuf gives as bytes where it is no text."""
    return name if isinstance(name, str) else name.decode(errors="replace")


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a protobuf message, however deep."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            several = isinstance(value, list) or not hasattr(value, "DESCRIPTOR")
            for each in value if several else [value]:
                yield from _tensors(each)
