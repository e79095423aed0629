"""What the matrices of a graph are fitted to: what they multiply while the graph reads a text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ...errors import BaseError, RunError, panics
from ...model.architecture import known_model, offline
from ...model.base import BaseModel
from ...model.tasks import architecture_of
from .lengths import context_of
from .quantized import BLOCK, Fit, Keep, Product, products
from .surgery import take

ROW, _MOST, _READ = 512, 24, 1 << 20  # tokens of a row, rows, bytes of the text
_DAMPED = 0.01  # of the mean square, as the reference implementation of GPTQ has it
_MEMORY = 1 << 30  # bytes of the sums of squares that are gathered together


def rows_of(text: Path, base: BaseModel) -> NDArray[np.int64]:
    """The text's first tokens `[rows, ROW]`, or as long as the base reads, by its tokenizer.

    Raises `RunError` for a file that is no text, of less than a row, or of tokens that the base has
    no row for, and `BaseError` for a base without a tokenizer.
    """
    from transformers import AutoTokenizer

    config = known_model(architecture_of(base.config), base.config).config.get_text_config()
    try:
        with text.open("rb") as stream:
            words = stream.read(_READ).decode("utf-8", "ignore" if _longer(text) else "strict")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            "the text to calibrate with cannot be read",
            file=text,
            found=str(error),
            expected="a text file in UTF-8",
        ) from None
    try:
        with offline(), panics():
            tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
            ids = tokenizer(words, verbose=False).input_ids
    except Exception as error:  # of whatever kind
        raise BaseError(
            "the base has no tokenizer that reads the text, by which it could be calibrated with",
            file=base.path,
            found=f"{type(error).__name__}: {error}"[:300],
            remedy="leave out `calibrate`, or copy the tokenizer's files into the base",
        ) from error
    length = min(ROW, context_of(config))
    count = min(_MOST, len(ids) // length)
    if not count:
        raise RunError(
            "the text to calibrate with is too short",
            file=text,
            found=f"{len(ids)} tokens",
            expected=f"at least {length}; up to {_MOST * length} are read",
        )
    rows = np.array(ids[: count * length], np.int64).reshape(count, length)
    if rows.max() >= config.vocab_size:
        raise RunError(
            "the text to calibrate with has tokens that the base has no row for",
            file=text,
            found=f"token {rows.max()} of the base's tokenizer",
            expected=f"tokens below {config.vocab_size}",
            remedy="take a text without them",
        )
    return rows


def _longer(text: Path) -> bool:
    return text.stat().st_size > _READ


def fit(
    file: Path,
    model: ir.Model,
    modules: Mapping[str, str],
    rows: NDArray[np.int64],
    keep: Keep,
) -> None:
    """Have what becomes 4 bits of the float32 graph `model`, which lies in `file`, kept as it is
    fitted to the tokens `rows`."""
    waiting: defaultdict[str, list[Product]] = defaultdict(list)
    for product in products(model.graph, 4, modules, True):
        if product.bits == 4:
            waiting[str(take(product.nodes[0], 0).name)].append(product)
    widths = {name: _width(found[0]) for name, found in waiting.items()}
    for names in _together(widths):
        for name, squares in _squares(file, {n: widths[n] for n in names}, rows).items():
            found = _fit(squares)
            for product in waiting[name]:
                keep(product.matrix, 4, BLOCK[4], product.turned, found)


def _width(product: Product) -> int:
    return int(product.matrices[0].shape.numpy()[1 if product.turned else 0])


def _together(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in groups that are gathered in one reading of the text."""
    group: list[str] = []
    taken = 0
    for name, width in widths.items():
        taken += 4 * width**2
        if group and taken > _MEMORY:
            yield group
            group, taken = [], 4 * width**2
        group.append(name)
    if group:
        yield group


def _squares(
    file: Path, widths: Mapping[str, int], rows: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """Value → XᵀX `[in, in]` of all that it is while the graph reads `rows`."""
    import onnxruntime

    model = ir.load(file)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    for name in widths:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
        if not values[name].is_graph_output():
            model.graph.outputs.append(values[name])
    told = file.with_name(f"squares-{file.name}")
    ir.save(model, told)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(told, options)
    sums = {name: np.zeros((width, width), np.float32) for name, width in widths.items()}
    for row in rows:
        feeds = _feeds(session, row[None])
        for name, found in zip(sums, session.run(list(sums), feeds), strict=True):
            flat = found.reshape(-1, found.shape[-1])
            sums[name] += flat.T @ flat
    told.unlink()
    return sums


def _feeds(session: Any, ids: NDArray[np.int64]) -> dict[str, Any]:
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    named = {value.name: value for value in session.get_inputs()}
    for name, value in named.items():
        if name.startswith("past_key_values."):
            feeds[name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    if "position_ids" in named:
        feeds["position_ids"] = np.arange(ids.shape[1])[None]
    return feeds


def _fit(squares: NDArray[np.float32]) -> Fit:
    """The inverse's upper triangular root, of a matrix filled up to whole blocks."""
    filled = np.pad(squares, (0, -len(squares) % BLOCK[4]))
    matrix = torch.from_numpy(filled).double()
    idle = matrix.diagonal() == 0
    matrix.diagonal()[idle] = 1
    matrix.diagonal().add_(_DAMPED * float(matrix.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    return Fit(matrix.diagonal().float().numpy(), upper.numpy())
