"""A decoder in every precision: bytes, milliseconds of a step, and its distance to float32 on text.

    python scripts/bench_precision.py BASE WORK [TEXT …] [--calibrate OTHER] [--threads 2]

Folders that WORK has already are measured too, by their names. The steps of all are taken in turn.
Texts are these docs, if none are given. `--calibrate`: int4 fitted to another text as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent
WRITTEN = ("fp32", "int8", "int4")
CHUNK, CHUNKS, PAST, STEPS = 512, 3, 64, 4
TEXTS = [ROOT / "docs" / f"{name}.md" for name in ("how-it-works", "server", "exactness", "vllm")]


def session(folder: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(folder / "batched.onnx", options)


def feeds(graph: Any, ids: np.ndarray[Any, Any], past: int = 0) -> dict[str, Any]:
    """Rows of tokens behind a cache of `past` zeros, without adapters."""
    rows, tokens = ids.shape
    given: dict[str, Any] = {
        value.name: np.zeros((rows, value.shape[1], past, value.shape[3]), np.float32)
        for value in graph.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    given |= {
        "input_ids": ids,
        "attention_mask": np.ones((rows, past + tokens), np.int64),
        "position_ids": np.tile(np.arange(past, past + tokens), (rows, 1)),
        "adapter_index": np.full(rows, -1),
    }
    return {each.name: given[each.name] for each in graph.get_inputs()}


def log_probabilities(graph: Any, chunks: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Of every chunk `[tokens, words]`."""
    found = []
    for chunk in chunks:
        logits = graph.run(["logits"], feeds(graph, chunk[None]))[0][0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return found


def step_times(graphs: dict[str, Any], rows: int, rounds: int) -> dict[str, float]:
    """Milliseconds of one token of every row: medians."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            given = feeds(graph, np.full((rows, 1), 5), PAST)
            graph.run(["logits"], given)
            for _ in range(STEPS):
                begin = time.perf_counter()
                graph.run(["logits"], given)
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("texts", type=Path, nargs="*", default=TEXTS)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    wanted: dict[str, dict[str, Any]] = {name: {"precision": name} for name in WRITTEN}
    if arguments.calibrate is not None:
        wanted["int4 fitted"] = {"precision": "int4", "calibrate": arguments.calibrate}
    for name, options in wanted.items():
        if not (out := arguments.work / name).exists():
            from dora_serve import write_onnx

            write_onnx(arguments.base, out, adapters={}, **options)
    folders = {path.name: path for path in sorted(arguments.work.iterdir()) if path.is_dir()}
    graphs = {name: session(folder, arguments.threads) for name, folder in folders.items()}
    text = "".join(path.read_text(encoding="utf-8") for path in arguments.texts)
    ids = Tokenizer.from_file(str(folders["fp32"] / "tokenizer.json")).encode(text).ids
    chunks = np.array(ids[: CHUNK * CHUNKS]).reshape(CHUNKS, CHUNK)
    truth = log_probabilities(graphs["fp32"], chunks)
    one, eight = (step_times(graphs, rows, arguments.rounds) for rows in (1, 8))
    print("| | MB | 1 row, ms | × | 8 rows, ms | × | mean KL divergence | same top token |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, graph in graphs.items():
        found = log_probabilities(graph, chunks)
        pairs = list(zip(truth, found, strict=True))
        divergence = np.mean([(np.exp(a) * (a - b)).sum(-1).mean() for a, b in pairs])
        same = np.mean([(a.argmax(-1) == b.argmax(-1)).mean() for a, b in pairs])
        size = (folders[name] / "model.onnx.data").stat().st_size / 1e6
        print(
            f"| {name} | {size:.0f} | {one[name]:.1f} | {one['fp32'] / one[name]:.2f} "
            f"| {eight[name]:.1f} | {eight['fp32'] / eight[name]:.2f} "
            f"| {divergence:.4f} | {100 * same:.1f} % |"
        )


if __name__ == "__main__":
    main()
