"""What a reader hands on: a training run, read lazily and never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RunError
from .files.tensors import LazyTensor, LazyTensors
from .updates.rank_one import RankOneSum
from .updates.update import Update

if TYPE_CHECKING:
    from .fit import FitReport

# transformers' head class suffix and PEFT's task type of each task a run can be for.
HEADS = {
    "causal-lm": ("ForCausalLM", "CAUSAL_LM"),
    "sequence-classification": ("ForSequenceClassification", "SEQ_CLS"),
    "question-answering": ("ForQuestionAnswering", "QUESTION_ANS"),
    "seq2seq-lm": ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    "token-classification": ("ForTokenClassification", "TOKEN_CLS"),
    "feature-extraction": ("Model", "FEATURE_EXTRACTION"),
}


class LazyUpdates(Mapping[str, Update]):
    """Module name → update; each access reads the update anew, so that none stays in memory."""

    def __init__(self, loaders: Mapping[str, Callable[[], Update]]) -> None:
        self._loaders = loaders

    def __getitem__(self, module: str) -> Update:
        return self._loaders[module]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


def strip_update(update: Update, module: str, path: Path) -> Update:
    """The update without zero and dependent components, in order of size; other kinds as they
    are. Raises `RunError` when the product of what was trained leaves the range of float32."""
    components = update.components()
    if components is None:
        return update
    alive = components.strip()
    if not alive.is_finite():
        raise RunError("the update is not of finite numbers", file=path, tensor=module)
    return alive.reduced().sorted()


@dataclass(frozen=True)
class Run:
    """A finished (or interrupted) training run.

    `updates`: Hugging Face module name → update. `replaced`: tensor name → tensor trained whole.
    `embedded_base`: the frozen weights that a reference checkpoint carries, by tensor name.
    `base`: the base model the run names, a hub id. `start_rank`: rank per module before pruning.
    `embeddings`: the modules of `updates` that are embeddings, `[vocab, dim]`. `tied`: those whose
    update also reaches the tensors that share their weight. `fit`: how the updates were cut, None
    where they are as trained.

    A key of `updates` is a module, whose weight the update is for; or a parameter such as a bias
    `[n]`, which is seen as `[1, n]`; or `parameter[e]`, block e of a parameter `[E, …]`.
    """

    path: Path
    method: str
    updates: Mapping[str, Update]
    replaced: LazyTensors = field(default_factory=dict)
    embedded_base: LazyTensors | None = None
    base: str | None = None
    task: str | None = None
    num_labels: int | None = None
    finished: bool = True
    start_rank: Mapping[str, int] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    files: tuple[Path, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    fit: FitReport | None = None

    def strip(self) -> Run:
        """The run without pruned components."""

        def loader(module: str) -> Callable[[], Update]:
            return lambda: strip_update(self.updates[module], module, self.path)

        return replace(self, updates=LazyUpdates({m: loader(m) for m in self.updates}))

    def rank(self, module: str) -> int | None:
        """The rank of one module as it stands; None where the update has no rank."""
        components = self.updates[module].components()
        return None if components is None else components.rank


__all__ = ["HEADS", "LazyTensor", "LazyUpdates", "RankOneSum", "Run", "Update", "strip_update"]
