"""Encoder requests in batches: every row's outputs are its own, whatever it lies beside."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import RobertaConfig, RobertaForSequenceClassification

from dora_serve import DoraExportError, read_run, verify, write_onnx
from dora_serve.onnxruntime import limits
from dora_serve.onnxruntime.encoder import Encoder
from dora_serve.onnxruntime.encoder_queue import EncoderQueue
from dora_serve.onnxruntime.limits import Limits, QueueFull
from tests.conftest import MODELS
from tests.engines.adapter_files import write_overflowing

SENTIMENT = next(MODELS.glob("runs/Checkpoint/Tiny_Roberta/*/*/Tiny_Roberta--Sentiment--1"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("encoder") / "onnx"
    write_onnx(MODELS / "tiny-roberta-base", target, adapters={"one": read_run(SENTIMENT)})
    for name in ("two", "three"):
        shutil.copyfile(path(target, "one"), path(target, name))
    return target


def path(folder: Path, name: str) -> str:
    return str(folder / "adapters" / f"{name}.onnx_adapter")


@contextmanager
def running(folder: Path, workers: int = 1, **limits: int) -> Iterator[EncoderQueue]:
    queue = EncoderQueue(Encoder(folder, threads=1), Limits(**limits), workers)
    try:
        yield queue
    finally:
        queue.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_their_own(folder: Path, workers: int) -> None:
    encoder = Encoder(folder, threads=1)
    choose = random.Random(0)
    size = Path(path(folder, "one")).stat().st_size
    asked = []
    for _ in range(120):
        ids = [0, *(choose.randint(4, 35) for _ in range(choose.randint(1, 29))), 2]
        asked.append((ids, choose.choice((None, "one", "two", "three"))))
    alone = [
        encoder.run([ids], None if name is None else "one")[0]["logits"] for ids, name in asked
    ]
    with running(folder, workers, max_rows=7, adapter_bytes=2 * size) as queue:
        futures = [
            queue.submit([(ids, [0] * len(ids))], None if name is None else path(folder, name))[0]
            for ids, name in asked
        ]
        for (ids, name), future, expected in zip(asked, futures, alone, strict=True):
            found = future.result(60)["logits"]
            assert float(np.abs(found - expected).max()) <= 1e-5, (ids, name)
        assert queue.pool.bytes <= 2 * size
    bare = np.array([encoder.run([ids], None)[0]["logits"] for ids, _ in asked])
    assert float(np.abs(bare - np.array(alone)).max()) > 1e-2  # the control: adapters tell
    assert queue.running == queue.waiting == 0


@pytest.mark.parametrize("says", ["not an ONNX Runtime adapter", "not finite"])
def test_only_the_one_at_fault_fails(folder: Path, tmp_path: Path, says: str) -> None:
    broken = tmp_path / "broken.onnx_adapter"
    if says == "not finite":
        write_overflowing(Path(path(folder, "one")), broken)
    else:
        broken.write_bytes(Path(path(folder, "one")).read_bytes()[:300])
    with running(folder, max_waiting=50) as queue:
        row = ([0, 5, 2], [0, 0, 0])
        good = [queue.submit([row], path(folder, "one"))[0] for _ in range(5)]
        bad = queue.submit([row], str(broken))[0]
        more = queue.submit([row] * 5, None)
        with pytest.raises(DoraExportError, match=says):
            bad.result(60)
        assert len({float(each.result(60)["logits"][0]) for each in good}) == 1
        assert all(each.result(60)["logits"].shape == (2,) for each in more)


def test_a_client_that_leaves_before_its_adapter_fails_ends_no_worker(folder: Path) -> None:
    row = ([0, 5, 2], [0, 0, 0])
    with running(folder) as queue:
        with queue._changed:  # the worker takes nothing meanwhile
            (left,) = queue.submit([row], str(folder / "lost.onnx_adapter"))
            assert left.cancel()
        assert queue.submit([row], None)[0].result(10)["logits"].shape == (2,)


def test_an_answer_that_cannot_be_made_ends_no_worker(folder: Path) -> None:
    def fails(_: object) -> None:
        raise ValueError("odd")

    row = ([0, 5, 2], [0, 0, 0])
    with running(folder) as queue:
        with pytest.raises(ValueError, match="odd"):
            queue.submit([row], None, fails)[0].result(10)
        assert queue.submit([row], None)[0].result(10)["logits"].shape == (2,)
        assert queue.running == 0


@pytest.mark.parametrize(
    ("bound", "said", "each"),
    [("_SCORES", "num_attention_heads", 30**2), ("_STATES", "intermediate_size", 30)],
)
def test_long_rows_are_few_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bound: str, said: str, each: int
) -> None:
    with running(folder) as queue:
        run, sizes = queue.encoder.run, []
        monkeypatch.setattr(limits, bound, 3 * queue.encoder.config[said] * each)

        def counted(rows: Any, *more: Any) -> Any:
            sizes.append(len(rows))
            return run(rows, *more)

        monkeypatch.setattr(queue.encoder, "run", counted)
        for answer in queue.submit([([5] * 30, [0] * 30)] * 10, None):
            assert answer.result(60)
    assert max(sizes) == 3
    assert sum(sizes) == 10


def test_what_takes_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not limits.takes_much(16, 128, {"num_heads": 16, "d_ff": 4096})
    assert limits.takes_much(16, 128, {"num_heads": 16, "intermediate_size": 16_384})
    monkeypatch.setattr(limits, "_SCORES", 3 * 4 * 30**2)
    assert not limits.takes_much(1, 30, {"num_heads": 4})
    assert limits.takes_much(1, 30, {})  # sixteen, where nothing is said
    assert limits.takes_much(1, 8192, {"num_heads": 0})  # layers of 4,096


def test_bounds(folder: Path) -> None:
    with running(folder, max_waiting=3) as queue:
        for ids, says in (([], "too long"), ([5] * 33, "too long"), ([99], "no such token")):
            with pytest.raises(DoraExportError, match=says):
                queue.submit([(ids, [0] * len(ids))], None)
        assert queue.submit([([5] * 32, [0] * 32)], None)[0].result(60)
        with pytest.raises(QueueFull):
            queue.submit([([5], [0])] * 4, None)


def test_one_row_takes_what_there_is_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model with thousands of positions a single text would take gigabytes."""
    assert limits.longest_row(3 << 30, {"num_heads": 16}) == 4096
    assert limits.longest_row(1000, {}) == 1024  # which are taken in any case
    monkeypatch.setattr(limits, "_ALWAYS", 2)
    with running(folder, row_bytes=12 * 4 * 20**2) as queue:  # it has four heads
        assert queue.max_length == 20
        assert queue.submit([([5] * 20, [0] * 20)], None)[0].result(60)
        with pytest.raises(DoraExportError, match="too long"):
            queue.submit([([5] * 21, [0] * 21)], None)


def test_what_a_long_row_took_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=16,
        intermediate_size=32, max_position_embeddings=2050,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    write_onnx(tmp_path / "base", tmp_path / "onnx")
    encoder = Encoder(tmp_path / "onnx", threads=1)

    def kept() -> int:
        before = psutil.Process().memory_info().rss
        encoder.run([[5] * 2000])  # 64 million scores, 256 MB, and copies of them
        return int(psutil.Process().memory_info().rss - before)

    encoder.run([[5] * 20])
    assert kept() < 100 << 20
    monkeypatch.setattr("dora_serve.onnxruntime.encoder.lone", lambda *_: False)
    assert kept() > 200 << 20  # the control


def test_a_tokenizers_bound_is_of_texts_alone(folder: Path, tmp_path: Path) -> None:
    """And the proof asks about every position that the model has."""
    shutil.copytree(folder, tmp_path / "onnx")
    said = tmp_path / "onnx/tokenizer_config.json"
    said.write_text(json.dumps({**json.loads(said.read_text()), "model_max_length": 9}))
    base = MODELS / "tiny-roberta-base"
    assert verify(read_run(SENTIMENT), tmp_path / "onnx", base).passed
    with pytest.raises(DoraExportError, match="too long"):
        Encoder(tmp_path / "onnx").classify(["a film " * 9])
