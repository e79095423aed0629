"""What adapter_config.json promises, compared with what the files hold.

PEFT refuses some adapters that lack what their configuration names, and of others it takes the
base's values, or fresh ones, in silence. Here neither is merged: without what was trained it is not
the model that was trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ..errors import DoraExportError, RunError, some
from ..files.json_files import is_number
from ..model.base import BaseModel
from ..model.match import class_trained, classes
from ..model.tasks import HEADS, architecture_of, task_of_peft
from ..model.tying import aliases, tied_in_peft
from ..options import ReadOptions
from ..run import Run
from .embedding_pairs import refuse_plain_pairs
from .experts import partial_experts
from .module import with_factors
from .named import Named
from .patterns import PatternError
from .peft_common import check_class, class_said, is_below, known_base, modules_to_save
from .run_folder import CONFIG_FILE, RunFolder
from .unread import not_read


def checked(run: Run, folder: RunFolder, options: ReadOptions, named: bool = True) -> Run:
    """`run` with warnings of what its folder has and no reader reads, and of what its configuration
    names and may be lost.

    Raises `LostError`, with the file and what it lacks, for whole modules, heads, tokens and biases
    that are trained by the configuration, that the base's class has, and that are not there;
    `RunError`, where only `named` ones are wanted, for adapted modules that it does not name.
    """
    config, path = folder.adapter_config, folder.path / CONFIG_FILE
    if not config or not {*run.files} & {*folder.adapter_files}:  # of another trainer than PEFT
        return run
    unread = not_read(folder)
    promises = _Promises(run, config, path, options)
    promises.head()
    promises.tokens()
    refuse_plain_pairs(run, folder, promises._file, promises._base)
    warnings = (
        *unread,
        *promises.modules(),
        *promises.biases(),
        *(partial_experts(run.updates, base.config) if (base := promises._base) else ()),
        *(
            ()
            if run.method == "peft_tuner"
            else promises.targets(with_factors(folder.adapter), named)
        ),
    )
    return replace(run, warnings=tuple(dict.fromkeys((*run.warnings, *warnings))))


class LostError(RunError):
    """Something that was trained, by the configuration, is not in the run's files."""


class _Promises:
    """What a configuration says was trained. Each check yields warnings, and raises `LostError`
    where it is certain that something is lost."""

    def __init__(
        self, run: Run, config: Mapping[str, object], path: Path, options: ReadOptions
    ) -> None:
        self._run, self._config, self._path, self._options = run, config, path, options

    def modules(self) -> Iterator[str]:
        """Modules trained whole: PEFT wants each tensor of each module whose name ends so."""
        config = self._config
        said = modules_to_save(config)
        own = HEADS.get(task_of_peft(config.get("task_type")) or "", ())
        entries = list(dict.fromkeys((*said, *own)))
        missing: dict[str, str] = {}
        for entry in entries:
            held = [name for name in self._held if is_below(name, entry)]
            base = self._base
            if base is None:
                if not held and entry in said and entry not in own:
                    yield _may_be_lost(entry, "modules_to_save")
                continue
            stored = [name for name in base.tensors if is_below(name, entry)]
            if stored and all(self._holds(name) for name in stored):
                continue
            names = self._class_names
            if names is None:
                names = stored
                if not held and not stored and entry in said:
                    yield _may_be_lost(entry, "modules_to_save")
            missing |= {
                name: entry for name in names if is_below(name, entry) and not self._holds(name)
            }
        if missing:
            modules = ", ".join(dict.fromkeys(missing.values()))
            raise self._lost(f"{modules} was trained whole (modules_to_save)", list(missing))
        self._biased_sides()
        sides = self._other_sides()
        if sides:
            raise self._lost("both sides of a tied pair are stored (ensure_weight_tying)", sides)

    def head(self) -> None:
        """The class whose head was trained whole, where PEFT was told no task."""
        name, names, base = class_said(self._config), self._class_names, self._base
        check_class(name, self._run.task, base, self._path)
        if base is None or names is None or name in ("", architecture_of(base.config)):
            return
        strange = [n for n in self._run.replaced if not any(_same(n, own) for own in names)]
        if strange and self._run.task is None:
            raise RunError(
                "the run was trained in another class than the base is saved in, with a head that "
                "this one has not",
                file=self._path,
                tensor=strange[0],
                found=f"{name}, and {architecture_of(base.config)} in the base's config.json",
                expected="a base of the class that was trained",
                remedy=f"save the base in that class (transformers: {name}.from_pretrained(base, "
                "num_labels=…).save_pretrained(folder)), and pass the folder with `base`",
            )

    def tokens(self) -> None:
        """Single rows of embeddings: one stored delta for each embedding named."""
        indices = self._config.get("trainable_token_indices")
        if not indices or self._config.get("peft_type") == "TRAINABLE_TOKENS":
            return
        rows = self._run.embeddings & self._run.updates.keys()
        names = [str(name) for name in indices] if isinstance(indices, dict) else []
        lost = [name for name in names if not any(module.endswith(name) for module in rows)]
        if rows and lost and self._base is not None and self._aliases:
            # What is tied to an embedding that was trained follows it.
            sides = [side.removesuffix(".weight") for side in self._aliases]
            lost = [name for name in lost if not any(side.endswith(name) for side in sides)]
        elif rows and self._base is None:
            lost = []
        if lost or not rows:
            missing = [f"{name}.token_adapter" for name in lost or ["the embedding"]]
            raise self._lost("tokens were trained (trainable_token_indices)", missing)

    def biases(self) -> Iterator[str]:
        """Biases: of the layers, `bias`, and of the factors, `lora_bias`."""
        run, kind = self._run, str(self._config.get("bias") or "none")
        if self._config.get("lora_bias"):
            plain = [m for m in run.updates if m not in run.embeddings and not m.endswith(".bias")]
            lost = [f"{m}.lora_B.bias" for m in plain if f"{m}.bias" not in run.updates]
            if lost:
                raise self._lost("biases were trained (lora_bias)", lost)
        held = any(self._is_bias(name) for name in run.replaced)
        if kind == "none" or (held and self._base is None):
            return
        if self._base is None:
            yield _may_be_lost("the biases", f"bias: {kind}")
            return
        lost = [n for n in self._class_names or self._base.tensors if self._is_bias(n)]
        if kind != "all":
            layers = [f"{module}.bias" for module in run.updates]
            lost = [name for name in lost if any(_same(name, layer) for layer in layers)]
        lost = [name for name in lost if not self._holds(name)]
        if lost and held and kind == "all":  # training may have left them as they were
            yield (
                f"the configuration says that all biases were trained, and the file lacks "
                f"{some(lost)}: there the base's stay, as in PEFT"
            )
        elif lost:
            raise self._lost(f"biases were trained (bias: {kind})", lost)

    def targets(self, stored: Collection[str], only: bool) -> Iterator[str]:
        """What the configuration names and the file lacks; raises `RunError` where `stored`, the
        modules with factors in the file, has more than it names, unless that is wanted too."""
        config = self._config
        named = Named(config)
        try:
            parameters = [str(name) for name in _list(config.get("target_parameters"))]
            parameters = self._in_class([name for name in parameters if not self._has(name)])
            lost = [*self._lost_targets(named), *parameters]
            more = [m for m in stored if named.known and not self._names(named, m)]
            biases = [name for name in self._run.updates if name.endswith(".bias")]
            more += [] if config.get("lora_bias") else biases
            idle = [
                f"{key}[{name!r}]"
                for key in ("rank_pattern", "alpha_pattern")
                for name, number in _map(config.get(key)).items()
                if is_number(number) and not any(named.key(name, m) for m in self._modules(stored))
            ]
        except PatternError as error:
            raise RunError(str(error), file=self._path) from None
        idle += self._nowhere()
        held = [m for m in stored if any(f".{n}." in f".{m}." for n in named.layers)]
        idle += [f"layer {n}" for n in named.layers if not lost and not _within(str(n), held)]
        if lost:
            yield (
                f"the configuration names {some(lost)} to be adapted, and the file holds nothing "
                "of it: is it the whole adapter?"
            )
        if more and only:
            raise RunError(
                "the file holds updates of modules that the configuration does not name, so PEFT "
                "leaves them out",
                file=self._file,
                tensor=more[0],
                found=f"updates of {some(more)}",
                expected="modules that target_modules and what stands beside it mean, and biases "
                "of factors where lora_bias is true",
                remedy="where they were trained: `lint` with `fix` names them in the "
                "configuration; else take them out of the file",
            )
        if idle:
            yield f"what the configuration says of {some(idle)} is of nothing in the file"

    def _modules(self, stored: Collection[str]) -> list[str]:
        """The names by which patterns may mean what is `stored`: those of parameters too."""
        parameters = [str(name) for name in _list(self._config.get("target_parameters"))]
        return [*stored, *parameters, *(f"{m}.{p}" for m in stored for p in parameters)]

    def _names(self, named: Named, module: str) -> bool:
        """Whether `module`, as the file calls it or as the class does, is among those `named`, or
        adapted because it is tied to one that is (ensure_weight_tying)."""
        if named.names(module):
            return True
        tying = bool(self._config.get("ensure_weight_tying"))
        own = self._in_memory(module)
        if own is None:  # without a base nobody knows; a name that no class has is said elsewhere
            return tying or self._base is not None
        sides = {own}
        if tying:
            one, weight = self._aliases, f"{own}.weight"
            source = one.get(weight, weight)
            tied = {source, *(name for name, other in one.items() if other == source)}
            sides |= {name.removesuffix(".weight") for name in tied}
        return any(named.names(side) for side in sides)

    def _in_memory(self, module: str) -> str | None:
        """What the model that the run was trained in calls `module`; None where nobody knows."""
        if self._base is None or self._model is None:
            return None
        return classes(self._run.task, self._run.num_labels, self._base).module(module)

    def _lost_targets(self, named: Named) -> list[str]:
        if not named.known:
            return []
        names: Iterable[str] | None = None if self._base is None else self._base.tensors
        if self._base is not None and "text_config" in self._base.config:
            names = self._class_names  # that of the text model alone perhaps
        if names is None:
            said = _list(self._config.get("target_modules"))
            return [str(name) for name in said if not _within(str(name), self._held)]
        modules = [n.removesuffix(".weight") for n in names if n.endswith(".weight")]
        modules = [m for m in modules if named.names(m, parameters=False)]
        # What is trained whole besides is not adapted.
        saved = modules_to_save(self._config)
        modules = [m for m in modules if not any(is_below(f"{m}.weight", n) for n in saved)]
        return self._in_class([m for m in modules if not self._has(m)])

    def _nowhere(self) -> list[str]:
        """What target_modules lists and neither the file has nor the base."""
        if self._base is None:
            return []
        known = [*self._held, *self._base.tensors, *(self._class_names or ())]
        said = [str(name) for name in _list(self._config.get("target_modules"))]
        return [f"target_modules[{name!r}]" for name in said if not _within(name, known)]

    def _in_class(self, lost: list[str]) -> list[str]:
        """Those of `lost` that the model has, which is built where there are any."""
        known = self._class_names if lost else None
        if known is None:
            return lost
        return [n for n in lost if any(_same(n, k) or _same(f"{n}.weight", k) for k in known)]

    def _has(self, name: str) -> bool:
        """Whether a module or parameter has something in the file, a block of it perhaps."""
        return name in self._owners or any(_same(name, own) for own in self._owners)

    @cached_property
    def _owners(self) -> set[str]:
        held = {name.partition("[")[0] for name in self._held}
        return held | {f"{name}.weight" for name in held}

    @property
    def _file(self) -> Path:
        return self._run.files[0] if self._run.files else self._path

    @property
    def _base(self) -> BaseModel | None:
        if not hasattr(self, "_opened"):
            self._opened = known_base(self._options.base, self._run.base, self._run.revision)
        return self._opened

    @property
    def _model(self) -> object | None:
        """The model that the run was trained in, without weights; None where it is not known."""
        if not hasattr(self, "_built"):
            self._built: object | None = None
            if self._base is None:
                return None
            with suppress(DoraExportError):  # said where the model is needed
                self._built = class_trained(self._run, self._base).names.model
        return self._built

    @property
    def _class_names(self) -> list[str] | None:
        return None if self._model is None else list(self._model.state_dict())  # type: ignore[attr-defined]

    @property
    def _aliases(self) -> Mapping[str, str]:
        return {} if self._model is None else aliases(self._model)

    def _biased_sides(self) -> None:
        """Raise `RunError` for a layer that PEFT tied to an embedding trained whole, and made
        without its bias (ensure_weight_tying)."""
        run, names = self._run, self._class_names
        if names is None or not self._config.get("ensure_weight_tying"):
            return
        for name, source in self._aliases.items():
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias in names and source in run.apart and name in run.replaced.keys() - run.apart:
                raise RunError(
                    "PEFT trained this layer without its bias, which the base has "
                    "(ensure_weight_tying of a module trained whole)",
                    file=self._path,
                    tensor=bias,
                    remedy="serve it with PEFT",
                )

    def _other_sides(self) -> list[str]:
        """Tensors tied to the input embedding, where that was trained: ensure_weight_tying stores
        them too where PEFT knows the names (`_check_tied_modules`)."""
        config, own = self._config, None if self._model is None else tied_in_peft(self._model)
        named = [*modules_to_save(config), *map(str, _list(config.get("target_modules")))]
        known = any(name.rpartition(".")[2] in ("embed_tokens", "lm_head") for name in named)
        if not config.get("ensure_weight_tying") or own is None or not known:
            return []
        whole = {f"{module}.weight" for module in self._run.updates.keys() - self._run.tied}
        trained = whole | self._run.replaced.keys()
        return [
            name
            for name, source in self._aliases.items()
            if source in trained and source == f"{own}.weight" and not self._holds(name)
        ]

    @cached_property
    def _held(self) -> set[str]:
        """What the run holds, as it calls it; of a text model inside a multimodal base also as the
        whole model does."""
        run, base = self._run, self._base
        own = {*run.replaced, *run.updates, *(f"{m}.weight" for m in run.updates)}
        if base is None or "text_config" not in base.config or self._model is None:
            return own
        known = classes(run.task, run.num_labels, base)
        found = [*(known.tensor(name) for name in own), *map(known.module, run.updates)]
        return own | {name for name in found if name is not None}

    def _holds(self, name: str) -> bool:
        return any(_same(name, held) for held in self._held)

    def _is_bias(self, name: str) -> bool:
        heads = HEADS.get(task_of_peft(self._config.get("task_type")) or "", ())
        whole = (*modules_to_save(self._config), *heads)
        return name.endswith(".bias") and not any(is_below(name, entry) for entry in whole)

    def _lost(self, promise: str, missing: list[str]) -> LostError:
        return LostError(
            f"the configuration says that {promise}, and the file lacks it",
            file=self._file,
            tensor=missing[0],
            found=f"nothing of {some(missing)}",
            expected="what was trained, or it is not the model that was trained",
            remedy="save it again with PEFT, or correct adapter_config.json where that was not "
            "trained",
        )


def _may_be_lost(name: str, key: str) -> str:
    return (
        f"the configuration says that {name} was trained ({key}), and the file holds nothing of "
        "it: name the `base`, which tells whether it is lost"
    )


def _same(name: str, other: str) -> bool:
    """Whether two names are of one tensor, one of them perhaps without the model's prefix."""
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _map(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _within(name: str, tensors: Iterable[str]) -> bool:
    return any(f".{name}." in f".{tensor}." for tensor in tensors)
