"""What is served: graphs, and the names that requests give. Told by one process to another."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

# Tasks whose models write text, and answer questions of a text; the others are encoders' too.
DECODES, TRANSLATES, ANSWERS = "causal-lm", "seq2seq-lm", "question-answering"
HEARS = "automatic-speech-recognition"  # what a `TRANSLATES` that takes speech is told to be for


class _Fixed(BaseModel):
    model_config = ConfigDict(frozen=True)


class Module(_Fixed):
    """One adapted matrix: the rank that training began with and what it left, ‖ΔW‖, ‖ΔW‖/‖W‖, and
    the share of ΔW that rounding to the stored dtype took. None is what an artifact does not tell.
    """

    start: int | None
    rank: int
    norm: float | None = None
    relative: float | None = None
    lost: float | None = None


class Graph(_Fixed):
    """An ONNX folder and the base it was made from. `path`: the base's folder, None for an ONNX
    folder that was found as such. `given`: the user gave this base for all runs. `state`: what that
    base was, None where no graph was made of it."""

    folder: str
    task: str
    base: str
    path: str | None
    given: bool = False
    state: str | None = None


class OfferedModel(_Fixed):
    """What a request may name. `adapter`: the file of an adapter to `folder`'s graph, None for the
    graph as it is; `digest`: of its parameters. `run`: the folder of a run whose adapter is made
    when a request first names it."""

    name: str
    kind: Literal["base", "merged", "run", "adapter"]
    method: str | None
    folder: str
    task: str
    base: str | None
    adapter: str | None
    digest: str | None = None
    run: str | None = None
    modules: dict[str, Module]
    parameters: int
    bytes: int

    @property
    def adapted(self) -> bool:
        """Whether it is more than the graph as it is."""
        return self.adapter is not None or self.run is not None


class Offer(_Fixed):
    """All of it. `problems`: what lies in the folder and cannot be served, with the reason.
    `warnings`: what is served all the same, with what to know of it."""

    graphs: list[Graph]
    models: list[OfferedModel]
    problems: dict[str, str]
    warnings: dict[str, str] = {}


class Addition(_Fixed):
    """A run or adapter below the served folder `root` to add: its path, name, and graph."""

    root: str
    path: str
    name: str
    graphs: list[Graph]


class Failure(_Fixed):
    """Why there is no offer or no model."""

    error: str
