"""Single rows of a weight, trained whole, as components of a LoRA adapter: one a row."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from ...files.tensors import LazyTensor
from ...model.base import BaseModel
from ...model.layout import Layout
from ...model.tying import groups
from ...run import LazyUpdates, Run
from ...updates.rank_one import RankOneSum
from ...updates.replaced import ReplacedRows


def rows_as_components(run: Run, base: BaseModel, layout: Layout) -> Run:
    """`run`, of which every side of what is tied has its own update, with those of single rows as
    sums of rank-1 components: what each row differs by from the base's.

    Rows of a weight that the base has in another size, or not as a tensor of its own, and those of
    a class that is not known stay as they are. No other row of the base is read.
    """
    model, names = layout.names.model, layout.names
    if model is None or not run.embeddings:
        return run
    tied = groups(base, names.architecture, run.num_labels)
    sides = {m: next((g for g in tied if f"{m}.weight" in g), [f"{m}.weight"]) for m in run.updates}
    found = {}
    for module in run.embeddings:
        own = (f"{module}.weight", *sides[module])
        held = (name if name in base.tensors else layout.find(name) for name in own)
        weight = next((base.tensors[name] for name in held if name is not None), None)
        rows = isinstance(run.updates[module], ReplacedRows)
        if rows and weight is not None and weight.shape == run.shapes[module]:
            found[module] = partial(_differences, run, module, weight)
    updates = {module: partial(run.take, module) for module in run.updates} | found
    alone = {m for m in run.tied if all(n.removesuffix(".weight") in run.updates for n in sides[m])}
    heads = {m for m in run.embeddings if isinstance(model.get_submodule(m), torch.nn.Linear)}
    return replace(
        run,
        updates=LazyUpdates(updates, run.shapes) if found else run.updates,
        embeddings=run.embeddings - heads,
        tied=run.tied - alone,
    )


def _differences(run: Run, module: str, weight: LazyTensor) -> RankOneSum:
    update = run.take(module)
    assert isinstance(update, ReplacedRows)
    rows, (size, width) = len(update.index), update.shape
    old = torch.empty(rows, width, dtype=weight.dtype)
    for place, row in enumerate(update.index.tolist()):
        weight.read_into(old[place], row * width)
    places = torch.zeros(size, rows)
    places[update.index, torch.arange(rows)] = 1.0
    return RankOneSum(update.rows - old.float(), torch.ones(rows), places).strip().sorted()
