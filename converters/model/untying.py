"""What becomes of tensors that are one, where a run made one of them different: each side a tensor
of its own, or, where the class cannot hold that, a refusal."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import TargetError
from ..files.tensors import LazyTensor, is_copy_of, same_values
from ..run import LazyUpdates, Run
from ..updates.in_turn import InTurn
from ..updates.update import Update
from .architecture import empty_model, is_known, known_model
from .base import BaseModel
from .tying import aliases, groups

Updates = dict[str, tuple[str, ...]]  # module → the run's keys of its updates, in turn

_LAYER = re.compile(r"\.\d+\.")
_WITH_PEFT = "serve it with PEFT on its base: PeftModel.from_pretrained(base, adapter)"


def untied(
    run: Run,
    base: BaseModel,
    architecture: str | None,
    find: Callable[[str], str | None],
    *,
    together: bool = True,
) -> tuple[Run, BaseModel]:
    """`run` and `base` as they are where nothing is tied that the run made different.

    The base then holds every side as a tensor of its own, with its old values, and its
    configuration says so; the run says of each side what became of it. Sides that stay one are one
    tensor in both, or, not `together`, as the base has them. `find` gives the tensor on disk of a
    name in memory.

    Raises `TargetError` for a class whose tied sides cannot differ when it is loaded, and where the
    run enlarged one side and does not hold the other.
    """
    if in_every_layer((*run.updates, *run.replaced), base):
        return run, base
    sharing = [_alike(base, names) for names in groups(base, architecture, run.num_labels)]
    shared = [_Shared.of(run, base, find, names) for names in sharing if len(names) > 1]
    _check_biases(run, find, shared)
    copies = [one for one in shared if one.is_copy(base)]
    touched = [one for one in shared if one.holder and one.changed and one not in copies]
    replaced = dict(run.replaced)
    for one in copies:
        for name in one.names:
            one.take_out(name, {}, replaced)
    if not touched:
        return (replace(run, replaced=replaced) if copies else run), base
    parted = [one for one in touched if not one.same]
    if parted:
        config, still = _untied_config(run, base, architecture, parted)
        alone = [one for one in shared if one.holder and (one in parted or not still(one))]
    else:
        config, alone = dict(base.config), []
    updates: Updates = {module: (module,) for module in run.updates}
    added: dict[str, LazyTensor] = {}
    dropped: set[str] = set()
    for one in touched:
        kept = one.names if one in alone or not together else [one.first]
        for name in one.names:
            one.take_out(name, updates, replaced)
            if name in kept:
                one.put_in(name, updates, replaced)
        dropped |= {disk for name, disk in one.held.items() if name not in kept}
    for one in alone:
        added |= {n: _named(one.old(n, base), n) for n in one.names if n not in one.held}
    shards = {
        path: {name: t for name, t in tensors.items() if name not in dropped}
        for path, tensors in base.shards.items()
    }
    shards[list(shards)[-1]] |= added
    if updates != {module: (module,) for module in run.updates}:
        shapes = {module: run.shapes[origin] for module, (origin, *_) in updates.items()}
        last = {module: keys[-1] for module, keys in updates.items()}
        run = replace(
            run,
            updates=LazyUpdates({m: partial(_in_turn, run, k) for m, k in updates.items()}, shapes),
            start_rank={m: run.start_rank[o] for m, o in last.items() if o in run.start_rank},
            embeddings=frozenset(m for m, o in last.items() if o in run.embeddings),
            tied=frozenset(m for m, (o, *_) in updates.items() if o in run.tied),
        )
    return replace(run, replaced=replaced), replace(base, shards=shards, config=config)


def in_every_layer(names: Collection[str], base: BaseModel) -> bool:
    """Whether all `names` are of layers of a stack, and the base stores each kind in every layer of
    it: what layers share is stored once."""
    layers: dict[str, set[str]] = {}
    for name in base.tensors:
        for stem, number in _places(name):
            layers.setdefault(stem, set()).add(number)
    for name in names:
        found = _places(name if name in base.tensors else f"{name}.weight")
        counts = {len(layers.get(stem, ())) for stem, _ in found}
        if len(counts) != 1 or counts <= {0, 1}:
            return False
    return True


def _places(name: str) -> list[tuple[str, str]]:
    """`a.3.b.weight` → (`a`, `3`) and (`a.*.b.weight`, `3`); none of a name outside of layers."""
    match = _LAYER.search(name)
    if match is None:
        return []
    stack, inside = name[: match.start()], name[match.end() :]
    return [(stack, match[0]), (f"{stack}.*.{inside}", match[0])]


@dataclass(frozen=True)
class _Shared:
    """One tensor under several `names` in memory. `held`: name → tensor on disk. `first`: the name
    that stays where they stay one. `tensors`: name → what the run put there whole; `updates`: name
    → the keys of its updates, in turn; `keys`: name → the run's own keys of it."""

    names: list[str]
    held: Mapping[str, str]
    first: str
    holder: LazyTensor | None
    tensors: Mapping[str, LazyTensor]
    updates: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, tuple[str, ...]]
    same: bool

    @classmethod
    def of(
        cls, run: Run, base: BaseModel, find: Callable[[str], str | None], names: list[str]
    ) -> _Shared:
        held = {name: name for name in names if name in base.tensors}
        for name in names:
            disk = find(name) if name not in held else None
            if disk is not None and disk not in held.values():
                held[name] = disk
        first = next((name for name in names if name in held), names[0])
        holder = base.tensors[held[first]] if held else None
        whole = _keyed(names, held, run.replaced, find)
        adapted = _keyed(names, held, run.updates, find)
        tensors = {name: run.replaced[key] for name, key in whole.items()}
        reaching = [t for name, t in tensors.items() if whole[name] not in run.apart]
        # Rows that reach every side lie under a side's own adapter.
        everywhere = tuple(key for key in adapted.values() if key in run.tied)
        own = {name: (key,) for name, key in adapted.items() if key not in run.tied}
        updates = {n: everywhere + own.get(n, ()) for n in names if everywhere or n in own}
        if reaching:
            tensors = dict.fromkeys(names, reaching[0]) | tensors
        now = {n: tensors.get(n, base.tensors.get(held.get(n, ""), holder)) for n in names}
        _check_rows(run, {n: t.shape for n, t in now.items() if t is not None})
        for several in updates.values():
            _check_rows(run, {key: run.shapes[key] for key in several})
        keys = {n: tuple(k for k in (whole.get(n), adapted.get(n)) if k) for n in names}
        same = len({updates.get(name) for name in names}) == 1 and _one(list(now.values()))
        return cls(names, held, first, holder, tensors, updates, keys, same)

    @property
    def changed(self) -> bool:
        return bool(self.tensors or self.updates)

    def is_copy(self, base: BaseModel) -> bool:
        """Whether all that the run holds of it are the base's values, saved under other names."""
        held = {} if self.holder is None or self.updates else self.tensors
        return bool(held) and all(is_copy_of(t, self.old(n, base)) for n, t in held.items())

    def old(self, name: str, base: BaseModel) -> LazyTensor:
        tensor = base.tensors.get(self.held.get(name, ""), self.holder)
        assert tensor is not None
        return tensor

    def take_out(self, name: str, updates: Updates, replaced: dict[str, LazyTensor]) -> None:
        for key in self.keys[name]:
            updates.pop(key, None)
            replaced.pop(key, None)

    def put_in(self, name: str, updates: Updates, replaced: dict[str, LazyTensor]) -> None:
        if name in self.tensors:
            replaced[name] = self.tensors[name]
        if name in self.updates:
            keys = self.updates[name]
            plain = name if keys[-1].endswith(".weight") else name.removesuffix(".weight")
            updates[plain] = keys


def _in_turn(run: Run, keys: tuple[str, ...]) -> Update:
    updates = tuple(run.take(key) for key in keys)
    return updates[0] if len(updates) == 1 else InTurn(updates)


def _alike(base: BaseModel, names: list[str]) -> list[str]:
    """`names` without those that the base stores with other values: loaded, they stay apart."""
    stored = [name for name in names if name in base.tensors]
    others = {n for n in stored[1:] if not same_values(base.tensors[n], base.tensors[stored[0]])}
    return [name for name in names if name not in others]


def _keyed(
    names: list[str],
    held: Mapping[str, str],
    keys: Collection[str],
    find: Callable[[str], str | None],
) -> dict[str, str]:
    """Name in memory → the one of the run's `keys`, tensors or modules, that is it."""
    inside = any(map(_LAYER.search, names))
    like = [key for key in keys if inside or not _LAYER.search(key)]
    disk = {find(f"{key}.weight") or find(key): key for key in like}
    found = {
        name: next((k for k in (name, name.removesuffix(".weight")) if k in keys), None)
        or disk.get(held.get(name, ""))
        for name in names
    }
    return {name: key for name, key in found.items() if key is not None}


def _one(tensors: list[LazyTensor | None]) -> bool:
    """Whether all hold the same values."""
    known = list({id(t): t for t in tensors if t is not None}.values())
    return all(
        other.shape == known[0].shape and same_values(other, known[0]) for other in known[1:]
    )


def _check_rows(run: Run, named: Mapping[str, tuple[int, ...]]) -> None:
    shapes = {shape: name for name, shape in named.items()}
    if len(shapes) > 1:
        one, other = list(shapes)[:2]
        raise TargetError(
            "one side of a tied pair has other rows than what is tied to it, and the run does not "
            "hold what the other side's added rows are",
            file=run.path,
            tensor=shapes[one],
            found=list(one),
            expected=f"{list(other)}, as {shapes[other]}",
            remedy="save the adapter again with save_embedding_layers=True",
        )


def _check_biases(run: Run, find: Callable[[str], str | None], shared: list[_Shared]) -> None:
    """Raise `TargetError` for single rows of a head with a bias, which PEFT leaves out."""
    biases = {name for one in shared for name in one.names}
    everywhere = {m: keys[0] for one in shared for m, keys in one.updates.items()}
    sides = {m.removesuffix(".weight") for m, key in everywhere.items() if key in run.embeddings}
    for module in (*run.embeddings, *sides):
        bias = f"{module}.bias"
        if bias in biases or find(bias) is not None:
            raise TargetError(
                "PEFT computes this module without its bias where single rows of it are trained, "
                "so the model that was trained is not one of its class",
                file=run.path,
                tensor=bias,
                remedy=_WITH_PEFT,
            )


def _named(tensor: LazyTensor, name: str) -> LazyTensor:
    own: Any = tensor
    renamed: LazyTensor = replace(own, name=name)
    return renamed


def _untied_config(
    run: Run, base: BaseModel, architecture: str | None, parted: list[_Shared]
) -> tuple[dict[str, object], Callable[[_Shared], bool]]:
    """The configuration of the base untied, and whether its class ties a group all the same.

    transformers 5 does not tie what a checkpoint holds with different values, also where the
    configuration says so.
    """
    config = dict(base.config)
    config["tie_word_embeddings"] = False
    if not is_known(architecture, base.config):
        return config, lambda _: False
    model = known_model(str(architecture), base.config, run.num_labels)
    scaled = getattr(model.config, "scale_decoder_outputs", None)
    if scaled is not None:  # in T5's configuration tie_word_embeddings also says this
        config["scale_decoder_outputs"] = scaled
    for key in getattr(model.config, "sub_configs", {}):
        inner = config.get(key)
        if isinstance(inner, dict) and getattr(
            getattr(model.config, key), "tie_word_embeddings", False
        ):
            config[key] = {**inner, "tie_word_embeddings": False}
    loaded = known_model(str(architecture), config, run.num_labels)
    one, apart = aliases(loaded), hasattr(loaded, "all_tied_weights_keys")
    if apart:
        from transformers.initialization import no_tie_weights

        context: Any = no_tie_weights()
    else:
        context = nullcontext()
    with context:
        inseparable = _identical(empty_model(str(architecture), config, run.num_labels))
    stuck = [n for group in parted for n in group.names if n in inseparable]
    if stuck:
        raise _refusal(run, stuck[0], architecture, "is one module, or always tied, in this class")
    if _computes_by_tie(loaded) and _tie(loaded) != _tie(model):
        name = parted[0].names[-1]
        raise _refusal(run, name, architecture, "is tied, and untied the class computes otherwise")
    return config, lambda group: all(name in one for name in group.names[1:])


def _identical(model: Any) -> set[str]:
    """The names of parameters that are one object."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _computes_by_tie(model: Any) -> bool:
    """Whether a module of the model reads in its computation whether the model is tied."""
    forwards = (inspect.unwrap(kind.forward) for kind in {type(m) for m in model.modules()})
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return any(code is not None and "tie_word_embeddings" in code.co_names for code in codes)


def _tie(model: Any) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _refusal(run: Run, name: str, architecture: str | None, why: str) -> TargetError:
    return TargetError(
        f"the run changed one side of a tensor that {why}",
        file=run.path,
        tensor=name,
        found=architecture,
        remedy="deploy it as an adapter (`adapter`)",
    )
