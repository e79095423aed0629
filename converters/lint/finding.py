"""What a check is given, and what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from ..errors import BaseError, MissingError, RunError, TargetError
from ..files.handles import check_there
from ..files.tensors import LazyTensor, LazyTensors, open_file, read_json
from ..model.base import BaseModel
from ..model.match import Classes, classes
from ..model.names import PEFT_PREFIX as PREFIX
from ..model.names import as_peft_loads, unwrapped
from ..readers.no_run import no_run
from ..readers.patterns import Patterns
from ..readers.peft_common import ATTENTION_OUT, Origin, origin
from ..readers.registry import runs_below
from ..readers.run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder
from ..targets.engines import Profile
from ..targets.target import profiles

Severity = Literal["error", "warning", "info"]

PEFTS_OWN = ("peft", "transformers")  # where PEFT's layers compute
AGAIN = "save the adapter again from the training run"
MERGE = "deploy the merged model (`merge`)"
REPACK = "write it anew, without what is the base's own (`adapter`)"
_FACTOR = re.compile(r"(.+)\.(?:lora_(A|B)(\.\w+)?\.weight|lora_embedding_(A|B)(\.\w+)?)")


@dataclass(frozen=True)
class Finding:
    """`error`: the engine refuses the adapter or computes something else than PEFT with the base
    it was trained on. `warning`: some versions or dtypes do. `info`: good to know.

    `where`: the tensor, module or field of the configuration.
    """

    check: str
    severity: Severity
    targets: tuple[str, ...]
    where: str
    what: str
    found: str
    expected: str
    fix: str


@dataclass(frozen=True)
class Factor:
    """One stored A or B: `key` as in the file; `named`: the name of an adapter inside, or ""."""

    key: str
    module: str
    letter: str
    embedding: bool
    named: str


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as it lies there, sound or not."""

    path: Path
    config: Mapping[str, object]
    tensors: LazyTensors
    base: BaseModel | None
    engines: tuple[Profile, ...]

    @cached_property
    def patterns(self) -> Patterns:
        return Patterns()

    @cached_property
    def factors(self) -> list[Factor]:
        result = []
        for key in self.tensors:
            if match := _FACTOR.fullmatch(key.removeprefix(PREFIX)):
                letter, embedding = match[2] or match[4], match[4] is not None
                named = (match[3] or match[5] or "").removeprefix(".")
                result.append(Factor(key, match[1], letter, embedding, named))
        return result

    @cached_property
    def pairs(self) -> dict[str, tuple[LazyTensor, LazyTensor]]:
        """A and B of every complete layer; embeddings and parameters are left out."""
        linear = {
            (f.module, f.letter): self.tensors[f.key]
            for f in self.factors
            if not f.embedding and not self._on_parameter(f.module)
        }
        modules = dict.fromkeys(module for module, _ in linear)
        return {
            module: (linear[module, "A"], linear[module, "B"])
            for module in modules
            if (module, "A") in linear and (module, "B") in linear
        }

    def _on_parameter(self, module: str) -> bool:
        said = self.config.get("target_parameters")
        names = said if isinstance(said, list) else []
        plain = module.replace(".base_layer", "")
        state = self.classes.whole.names.state if self.classes is not None else ()
        for owner, _, last in (str(name).rpartition(".") for name in names):
            if owner and f".{plain}".endswith(f".{owner}"):
                return True
            if not owner and (f"{plain}.{last}" in state or plain.endswith(".experts")):
                return True
        return False

    @property
    def is_lora(self) -> bool:
        return self.config.get("peft_type") == "LORA"

    @property
    def task(self) -> str | None:
        return self._origin["task"]

    @cached_property
    def _origin(self) -> Origin:
        whole = {name: self.tensors[key] for name, key in self.others.items()}
        return origin(self.config, whole)

    @cached_property
    def classes(self) -> Classes | None:
        """The classes that the base is loaded as; None without a base, or where transformers does
        not know them."""
        if self.base is None:
            return None
        base, count = self.base, _layers_in_all(self.config.get("layer_replication"))
        if count is not None:
            base = replace(base, config={**base.config, "num_hidden_layers": count})
        with suppress(BaseError, TargetError):
            found = classes(self.task, self._origin["num_labels"], base)
            return found if found.known else None
        return None

    def meant(self, module: str) -> str | None:
        """What the base calls the module that is stored as `module`; None where it has none of a
        name that transformers knows."""
        plain = unwrapped(module)
        if self.classes is not None:  # vLLM has names of its own inside of multimodal models
            own = plain.replace("language_model.model.", "model.language_model.", 1)
            return self.classes.module(plain) or self.classes.module(own)
        return plain if self.base is None or self.base.weight(plain) is not None else None

    def is_embedding(self, module: str) -> bool:
        """Whether the base's class has an embedding of this name; False where nobody knows."""
        model = None if self.classes is None else self.classes.whole.names.model
        layers = {} if model is None else dict(model.named_modules())
        return isinstance(layers.get(module), torch.nn.Embedding)

    @cached_property
    def loaded(self) -> Mapping[str, str]:
        """Stored module → the module of the base that PEFT takes it for. Without a base: that of
        the very name."""
        stored = {f.key: f.module for f in self.factors if ".experts" not in f.module}
        if self.classes is None:
            return {m: m for k, m in stored.items() if k.startswith(PREFIX) and m == unwrapped(m)}
        found = self.classes
        text = {} if found.text is None else as_peft_loads(found.text.names, stored)
        return {**text, **as_peft_loads(found.whole.names, stored)}

    @cached_property
    def prefixed(self) -> bool:
        """Whether PEFT puts its prefix before names that lack it, as it does of classes whose
        experts it fuses."""
        if self.classes is None:
            return False
        names = self.classes.whole.names
        weights = (name for name, shape in names.state.items() if len(shape) == 2)
        module = next(weights, "").removesuffix(".weight")
        return module in as_peft_loads(names, {f"{module}.lora_A.weight": module})

    @cached_property
    def embeddings(self) -> list[str]:
        return sorted({factor.module for factor in self.factors if factor.embedding})

    @cached_property
    def layers(self) -> list[str]:
        """What PEFT puts a layer of its own in the place of, which holds one pair, or two."""
        modules = (*self.pairs, *self.embeddings)
        return list(dict.fromkeys(module.removesuffix(ATTENTION_OUT) for module in modules))

    @property
    def blocks(self) -> int:
        """Of how many blocks on the diagonal one factor of a pair may be, where these alone are
        stored (BD-LoRA)."""
        said = self.config.get("use_bdlora")
        count = said.get("nblocks", 1) if isinstance(said, Mapping) else 1
        return count if isinstance(count, int) and count > 0 else 1

    @cached_property
    def others(self) -> Mapping[str, str]:
        """Name without PEFT's prefix → key, of the tensors that are neither A nor B."""
        factors = {factor.key for factor in self.factors}
        return {key.removeprefix(PREFIX): key for key in self.tensors if key not in factors}

    @cached_property
    def ranks(self) -> dict[str, int]:
        return {module: a.shape[0] for module, (a, _) in self.pairs.items() if len(a.shape) > 1}

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise `PatternError` for regular expressions that PEFT would not come back from."""
        config, modules = self.config, {name.rpartition(".")[0] for name in names}
        whole = [config.get(key) for key in ("target_modules", "exclude_modules")]
        keyed = [config.get(key) for key in ("rank_pattern", "alpha_pattern")]
        layers = config.get("layers_pattern")
        for module in modules:
            for pattern in whole:
                if isinstance(pattern, str):
                    self.patterns.whole(pattern, module)
            for pattern in (key for each in keyed if isinstance(each, dict) for key in each):
                self.patterns.suffix(str(pattern), module)
            for pattern in layers if isinstance(layers, list) else [layers] if layers else ():
                self.patterns.suffix(str(pattern), module)

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(engine.name for engine in self.engines)

    def where(self, test: Callable[[Profile], bool]) -> tuple[str, ...]:
        """The engines of which `test` is true."""
        return tuple(engine.name for engine in self.engines if test(engine))

    def graded(self, test: Callable[[Profile], bool]) -> Iterator[tuple[Severity, tuple[str, ...]]]:
        """An error for the engines of which `test` is true, a warning for the others."""
        if errors := self.where(test):
            yield "error", errors
        if warnings := self.where(lambda engine: not test(engine)):
            yield "warning", warnings


def _layers_in_all(ranges: object) -> int | None:
    """How many layers PEFT makes of a base's by `layer_replication`; None where it leaves them."""
    if not isinstance(ranges, list):
        return None
    try:
        return int(sum(last - first for first, last in ranges))
    except (TypeError, ValueError):
        return None


Check = Callable[[Adapter], Iterator[Finding]]


def open_adapter(folder: Path, base: BaseModel | None, targets: Iterable[str]) -> Adapter:
    """Open an adapter folder for checks of `targets`; raises `MissingError` when it is none."""
    check_there(folder)
    config = folder / CONFIG_FILE
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if not config.is_file() or weights is None:
        if folder.is_dir() and (below := runs_below(folder)):
            raise no_run(RunFolder(folder), {}, below)
        raise MissingError(
            "no LoRA adapter here",
            file=folder,
            expected=f"{CONFIG_FILE} and {' or '.join(WEIGHT_FILES)}",
        )
    known = profiles()
    unknown = set(targets) - known.keys()
    if unknown:
        raise RunError("unknown target", found=", ".join(unknown), expected=", ".join(known))
    engines = tuple(known[name] for name in targets)
    return Adapter(folder, read_json(config), open_file(weights), base, engines)
