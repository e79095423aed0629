"""`/classify` and `/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from dora_serve.onnxruntime.encoder_queue import EncoderQueue
from dora_serve.onnxruntime.pipeline import normalized

from ..registry import Served
from ..state import note, state_of
from ..tokenizing import Row
from ..wire import answers, pieces
from ..wire.errors import ApiError
from ..wire.requests import ClassifyRequest, EmbeddingRequest, Texts
from ..wire.sending import beside, while_there
from .reading import JsonRoute

router = APIRouter(route_class=JsonRoute)

_NUMBERS = 1 << 21  # of one answer: as Python's and as JSON they take 180 MB


@router.post("/classify", response_model=answers.Classification)
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """The class of a text, or of each of several."""
    served, engine = state_of(request).models.encoder(body.model, "sequence-classification")
    head, outputs, used = await run(request, served, engine, body, "classify", logits)

    def label(index: int, row: Any) -> answers.Label:
        found, told = engine.encoder.classification(row), row
        if body.use_activation is not False:
            told = engine.encoder.probabilities(row)
        return answers.Label(
            index=index, label=found.label, probs=told.tolist(), num_classes=len(told)
        )

    def answer() -> answers.Classification:
        data = [label(i, row) for i, row in enumerate(outputs)]
        return answers.Classification(**head, data=data, usage=used)

    return await beside(answer)


@router.post("/v1/embeddings", response_model=answers.Embeddings)
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """A vector per text, as the model's pipeline makes it; without one the mean of its tokens' last
    hidden states."""
    models = state_of(request).models
    served, engine = models.encoder(body.model, "feature-extraction")
    head, outputs, used = await run(request, served, engine, body, "embd", engine.encoder.vector)

    def told(vector: Any) -> Any:
        vector = shortened(vector, body, engine.encoder.pipeline.normalized)
        packed = body.encoding_format == "base64"
        return base64.b64encode(vector.astype("<f4")).decode() if packed else vector.tolist()

    def answer() -> answers.Embeddings:
        data = [answers.Embedding(index=i, embedding=told(v)) for i, v in enumerate(outputs)]
        return answers.Embeddings(**head, data=data, usage=used)

    return await beside(answer)


def shortened(vector: Any, body: EmbeddingRequest, ends: bool) -> Any:
    """The first `dimensions` of a vector, of length one where that is asked for, or where the
    pipeline `ends` so and nothing is asked."""
    if body.dimensions is not None and body.dimensions > len(vector):
        raise ApiError(f"the vectors have {len(vector)} dimensions", param="dimensions")
    vector = vector[: body.dimensions]
    wanted = ends if body.use_activation is None else body.use_activation
    return normalized(vector) if wanted else vector


def logits(row: dict[str, Any]) -> Any:
    return row["logits"]


async def run(
    request: Request,
    served: Served,
    engine: EncoderQueue,
    body: Texts,
    prefix: str,
    finish: Callable[[dict[str, Any]], Any],
    pairs: Sequence[tuple[str, str]] | None = None,
) -> tuple[dict[str, Any], list[Any], answers.Usage]:
    """The head of an answer, the numbers that `finish` makes of the outputs of every text of
    `body`, or of `pairs`, and the tokens that were read."""
    inputs = body.inputs if pairs is None else pairs
    if len(inputs) > engine.limits.max_waiting:
        raise ApiError(f"{len(inputs)} texts are more than can wait", param="input")
    rows = await served.texts.encode(
        inputs,
        engine.max_length,
        "input",
        body.add_special_tokens,
        body.kept(engine.max_length),
        body.truncation_side,
        "right",  # what transformers and vLLM cut of what an encoder reads
    )
    return await computed(request, served, engine, rows, prefix, _counted(finish))


def _counted(finish: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """The same, but that it raises `ApiError` once that are more numbers than one answer has: what
    a model tells of a text, or of each of its tokens, grows with its width and its labels."""
    count = 0

    def counting(row: dict[str, Any]) -> Any:
        nonlocal count
        found = finish(row)
        count += found.size
        if count > _NUMBERS:
            raise ApiError(
                f"an answer has at most {_NUMBERS} numbers: send fewer texts, or shorter ones",
                param="input",
                code="too_many_numbers",
            )
        return found

    return counting


async def computed(
    request: Request,
    served: Served,
    engine: EncoderQueue,
    rows: Sequence[Row],
    prefix: str,
    finish: Callable[[dict[str, Any]], Any],
) -> tuple[dict[str, Any], list[Any], answers.Usage]:
    """The same of `rows` of tokens."""
    state, lengths, begin = state_of(request), [len(ids) for ids, _ in rows], time.monotonic()
    submitted = engine.submit(rows, served.model.adapter, finish)
    futures = [asyncio.wrap_future(each) for each in submitted]
    served.requests += 1
    count, name = sum(lengths), served.model.name
    note(request, model=name, prompt_tokens=count)
    state.metrics.asked(served.model, lengths)
    try:
        async with asyncio.timeout(state.options.timeout):
            outputs = list(await while_there(request, asyncio.gather(*futures)))
    except TimeoutError:
        raise ApiError("the answer took too long", 504, code="timeout") from None
    finally:  # nobody waits for the others where one failed
        for future in futures:
            future.cancel()
    state.metrics.answered(served.model, "stop", time.monotonic() - begin)
    head = {"id": pieces.new_id(prefix), "created": int(time.time()), "model": name}
    return head, outputs, answers.Usage(**pieces.usage(count, 0))
