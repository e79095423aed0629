"""The names that requests give, and the engines behind them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.errors import apart
from dora_serve.onnxruntime.continuous import ContinuousDecoder
from dora_serve.onnxruntime.decoder_graph import DecoderGraph
from dora_serve.onnxruntime.encoder import STATES, Encoder
from dora_serve.onnxruntime.encoder_queue import EncoderQueue
from dora_serve.onnxruntime.limits import Limits
from dora_serve.onnxruntime.mapped import part_from_files
from dora_serve.onnxruntime.seq2seq import Seq2Seq
from dora_serve.onnxruntime.seq2seq_queue import Seq2SeqQueue
from dora_serve.onnxruntime.transcriber import Transcriber, hears
from dora_serve.onnxruntime.transcriber_queue import TranscriberQueue

from ..folder.templates import has_template, read_template
from .options import ServerOptions
from .prepare.offer import DECODES, TRANSLATES, Graph, Offer, OfferedModel
from .tokenizing import Texts
from .wire.defaults import Defaults, read_defaults
from .wire.errors import ApiError

Writer = ContinuousDecoder | Seq2SeqQueue
Engine = Writer | EncoderQueue | TranscriberQueue
_FOR = {"feature-extraction": "embeddings"}  # tasks that callers know by another name


@dataclass(eq=False)
class Served:
    """A model and the engine that runs it. `defaults`: of what its requests leave open;
    `chat`: whether there is a chat template; `requests`: how many named it so far."""

    model: OfferedModel
    engine: Engine
    texts: Texts
    defaults: Defaults
    chat: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    requests: int = 0


class Registry:
    """Opens every graph of `offer`; adapters are loaded when a request names them. `problems`: what
    of the offer cannot be served, since its graph cannot be opened; `template`: the chat template
    of all decoders in place of their own."""

    def __init__(self, offer: Offer, options: ServerOptions) -> None:
        self.problems = dict(offer.problems)
        self._engines: dict[str, Engine] = {}
        self._defaults: dict[str, Defaults] = {}
        options = replace(options, limits=_shared(options.limits, offer.graphs))
        for graph in offer.graphs:
            with apart(self.problems, *(m.name for m in offer.models if m.folder == graph.folder)):
                self._defaults[graph.folder] = _defaults(graph, options)
                ends = self._defaults[graph.folder].ends
                engine = _open(graph, options, ends)
                if graph.path is None:  # a folder of the user's, who may write into it
                    part_from_files(Path(graph.folder))
                self._engines[graph.folder] = engine
        self.graphs = {g.folder: g for g in offer.graphs if g.folder in self._engines}
        file = options.chat_template
        self.template = None if file is None else read_template(Path(file))  # once: it may change
        self.texts = {folder: Texts(folder, self.template) for folder in self.graphs}
        self._chats = {
            folder
            for folder, graph in self.graphs.items()
            if graph.task == DECODES and (options.chat_template or has_template(Path(folder)))
        }
        self._models: dict[str, Served] = {}
        for model in offer.models:
            if model.folder in self._engines:
                self.add(model)

    def add(self, model: OfferedModel) -> None:
        """Serve `model`, in place of an earlier one of that name."""
        folder = model.folder
        if model.adapter is not None and model.digest is not None:
            self._engines[folder].pool.expect(model.adapter, model.digest)
        self._models[model.name] = Served(
            model,
            self._engines[folder],
            self.texts[folder],
            self._defaults[folder],
            folder in self._chats,
        )

    def remove(self, name: str) -> None:
        """Serve it no longer; requests that are running go on."""
        served = self._models.pop(name)
        if served.model.adapter is not None and served.model.adapter not in self._files():
            served.engine.pool.forget(served.model.adapter)

    def _files(self) -> set[str | None]:
        return {served.model.adapter for served in self}

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._models.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def find(self, name: str) -> Served:
        """The model of that name; raises `ApiError` 404."""
        try:
            return self._models[name]
        except KeyError:
            message = f"The model `{name[:200]}` does not exist."
            raise ApiError(message, 404, "model", "model_not_found") from None

    def writer(self, name: str) -> tuple[Served, Writer]:
        """As `find`, for a model that writes text."""
        served = self.find(name)
        if not isinstance(served.engine, ContinuousDecoder | Seq2SeqQueue):
            raise _other_task(served, "texts to go on with, or to read")
        return served, served.engine

    def transcriber(self, name: str) -> tuple[Served, TranscriberQueue]:
        """As `find`, for a model that hears."""
        served = self.find(name)
        if not isinstance(served.engine, TranscriberQueue):
            raise _other_task(served, "speech")
        return served, served.engine

    def decoder(self, name: str) -> tuple[Served, ContinuousDecoder]:
        """The same of one that goes on with what it is given."""
        served = self.find(name)
        if not isinstance(served.engine, ContinuousDecoder):
            raise _other_task(served, DECODES)
        return served, served.engine

    def encoder(self, name: str, *tasks: str) -> tuple[Served, EncoderQueue]:
        """As `find`, for an encoder that is for one of `tasks`."""
        served = self.find(name)
        engine = served.engine
        if not isinstance(engine, EncoderQueue) or served.model.task not in tasks:
            raise _other_task(served, " or ".join(_FOR.get(task, task) for task in tasks))
        return served, engine

    def own(self) -> list[Graph]:
        """The graphs that runs can be added to: those whose base is at hand."""
        return [graph for graph in self.graphs.values() if graph.path is not None]

    def engines(self) -> Iterator[tuple[str, Engine]]:
        """The engines, each by its base and task."""
        names = [graph.base for graph in self.graphs.values()]
        for folder, graph in self.graphs.items():
            once = names.count(graph.base) == 1
            yield graph.base if once else f"{graph.base} {graph.task}", self._engines[folder]

    def close(self) -> None:
        """Finish what was submitted, then end the engines."""
        for engine in self._engines.values():
            engine.close()


def _shared(limits: Limits, graphs: Sequence[Graph]) -> Limits:
    """The bounds of each engine, where all together have what `limits` say of memory."""
    decoders = sum(graph.task == DECODES for graph in graphs)
    return replace(
        limits,
        prefix_bytes=limits.prefix_bytes // max(1, decoders),
        row_bytes=limits.row_bytes // max(1, len(graphs) - decoders),
    )


def _defaults(graph: Graph, options: ServerOptions) -> Defaults:
    if graph.task not in (DECODES, TRANSLATES):
        return Defaults()
    reads = graph.task == TRANSLATES and not hears(Path(graph.folder))
    return read_defaults(Path(graph.folder), options.generation_config, reads=reads)


def _open(graph: Graph, options: ServerOptions, ends: frozenset[int] | None) -> Engine:
    if graph.task == DECODES:
        decoder = DecoderGraph(graph.folder, options.threads, options.max_length)
        decoder.eos = decoder.eos if ends is None else ends
        _ = decoder.tokenizer  # one that cannot be read is told now
        return ContinuousDecoder(decoder, options.limits)
    if graph.task == TRANSLATES and hears(Path(graph.folder)):
        heard = Transcriber(graph.folder, options.threads)
        _ = heard.tokenizer, heard.start, heard.spectrum, heard.usual
        return TranscriberQueue(heard, options.limits)
    if graph.task == TRANSLATES:
        translator = Seq2Seq(graph.folder, options.threads)
        _ = translator.tokenizer, translator.start
        return Seq2SeqQueue(translator, options.limits, options.max_length, ends)
    encoder = Encoder(graph.folder, options.threads)
    _ = encoder.tokenizer
    if STATES in encoder.outputs:
        _ = encoder.pipeline
    return EncoderQueue(encoder, options.limits, options.workers)


def _other_task(served: Served, task: str) -> ApiError:
    return ApiError(
        f"The model `{served.model.name}` is for {served.model.task}, not for {task}.",
        param="model",
        code="other_task",
    )
