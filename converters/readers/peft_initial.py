"""Adapters whose initialisation took something out of the base's weights, which PEFT takes out
again when it loads them (huggingface/peft, `pissa_init` and `olora_init` in
`src/peft/tuners/lora/layer.py`).

PiSSA takes the first r terms of the singular value decomposition of W, OLoRA s·Qᵣ·Rᵣ of W = Q·R. To
the base itself such an adapter adds s·B·A less what was taken out, of rank up to 2r. Other
initialisations of the kind draw random numbers, or look at data that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import MissingError, RunError, TensorFileError
from ..files.json_files import read_json
from ..model.match import Classes, classes
from ..model.quantized import method
from ..model.tying import groups
from ..options import ReadOptions
from ..run import Run
from ..updates.rank_one import RankOneSum
from .module import AdaptedModule
from .peft_common import IN_PEFT, need_base
from .unsloth import began_otherwise

# Initialisations that change the base weights: the adapter is right on the changed base only.
# ms-swift has LoRA-GA from its authors' package, by a name of its own.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga", "lora-ga")
_PLAIN = {"gaussian", "eva", "orthogonal", "mica", "true", "false"}  # those that do not, in PEFT
_CONVERT = (
    "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA adapter"
)
# What LLaMA-Factory puts below a run that it converts: the adapter as it began, and as it ended,
# both noted as if they had begun plainly, and the plain one that was made of them.
_UNCONVERTED = ("pissa_init", "pissa_backup")
_CONVERTED = "pissa_converted"
# What ms-swift puts beside its checkpoints, noted so too, and the plain one below each of them.
_SWIFT_BEGAN, _SWIFT_CONVERTED = "initial_model", "converted/default"


class Initial:
    """What the initialisation of `config` took out of the base's weights."""

    def __init__(
        self, config: Mapping[str, object], path: Path, run: Run, options: ReadOptions
    ) -> None:
        said = config.get("init_lora_weights")
        name = str(said).lower()
        self._path, self._said, self._stored = path, said, run.replaced.keys()
        self._known: Classes | None = None
        if said is True and (began := _began(path.resolve())) is not None:
            self._said = began
            raise self._refusal("is not told by this copy of it")
        if not name.startswith(BASE_CHANGING):
            if isinstance(said, str) and name not in _PLAIN:
                raise RunError(
                    "an initialisation that PEFT does not know, and that may have changed the base "
                    "weights",
                    file=path,
                    found=f"init_lora_weights: {said}",
                    expected=f"one that changes nothing: {', '.join(sorted(_PLAIN))}",
                    remedy="where it changed nothing, write true; else give the adapter that its "
                    "trainer converted",
                )
            return
        if said != "pissa" and name != "olora":
            raise self._refusal("is not repeated when the adapter is loaded")
        if said == "pissa" and began_otherwise(path.parent):
            raise RunError(
                "unsloth began this adapter with a singular value decomposition of its own, which "
                "PEFT and others do not repeat: they take something else out of the base's weights",
                file=path,
                found="init_lora_weights: pissa, and unsloth_lora_init.json beside it",
                remedy="load it with unsloth and merge it there (save_pretrained_merged), then "
                "deploy that, or `extract` an adapter of it; or train with "
                "UNSLOTH_FAST_LORA_INIT=0",
            )
        self._base = need_base(options, f"an adapter that began as {said}", path)
        if method(self._base.config) == "bitsandbytes":
            raise RunError(
                "an adapter that began so on a quantized base: PEFT quantizes anew what is left of "
                "the base's weights, and trains beside that",
                file=path,
                found=f"init_lora_weights: {said}, on a base of bitsandbytes",
                remedy=IN_PEFT,
            )
        self._known = classes(run.task, run.num_labels, self._base)
        tied = groups(self._base, self._known.whole.names.architecture, run.num_labels)
        self._shared = {name for group in tied for name in group}

    def check(self, module: AdaptedModule, parameter: bool) -> None:
        """Raise `RunError` for a module of which PEFT takes out something else."""
        if self._known is None:
            return
        name = self._known.module(module.name) or module.name
        if parameter or module.kernel or ".base_layer" in name:
            raise self._refusal("is known here for linear layers alone", name)
        if f"{name}.weight" in self._shared:
            raise self._refusal("changes all that is tied to this module", name)

    def update(self, module: AdaptedModule, scale: float) -> RankOneSum:
        """The update of the base's own weight; `scale` is that of the pair."""
        name, own = module.name, module.sum(scale)
        if self._known is None or f"{name}.weight" in self._stored:
            return own  # PEFT stores what is left of an embedding's or a head's weight
        known = self._known.module(name) or name
        weight = self._known.whole.weight(known, own.shape)
        if weight is None:
            raise self._refusal("takes a weight that the base does not hold by itself", name)
        lying = self._base.is_conv1d(known)
        stored = (weight.T if lying else weight).double()
        if self._said == "pissa":
            u, s, vh = torch.linalg.svd(stored.T if lying else stored, full_matrices=False)
            u, s, vh = (part.float() for part in (u[:, : own.rank], s[: own.rank], vh[: own.rank]))
            taken = RankOneSum(vh, -s, u)
        else:
            q, r = torch.linalg.qr(stored)
            c = torch.full((own.rank,), -scale)
            taken = RankOneSum(r[: own.rank].float(), c, q[:, : own.rank].float())
            taken = taken.transposed() if lying else taken
        parts = zip((own.a, own.c, own.b), (taken.a, taken.c, taken.b), (0, 0, 1), strict=True)
        return RankOneSum(*(torch.cat(pair, dim=axis) for *pair, axis in parts))

    def _refusal(self, why: str, tensor: str | None = None) -> RunError:
        own = self._path.resolve().parent
        own = own.parent if own.name in _UNCONVERTED else own
        converted = (
            name
            for name in (_CONVERTED, _SWIFT_CONVERTED)
            if (own / name / self._path.name).is_file()
        )
        plain = next(converted, None)
        return RunError(
            "the adapter's initialisation changed the base weights, so it is not an update of the "
            f"original base; what it changed {why}",
            file=self._path,
            tensor=tensor,
            found=f"init_lora_weights: {self._said}",
            remedy=f"give {plain}, the plain LoRA adapter made of it" if plain else _CONVERT,
        )


def _began(path: Path) -> str | None:
    """How the run beside began, where the folder of `path` is a copy of it that does not say so."""
    folder, beside = path.parent, list[Path]()
    if folder.name in _UNCONVERTED:
        beside = [folder.parent / path.name]
    elif folder.name == _SWIFT_BEGAN:
        beside = sorted(folder.parent.glob(f"checkpoint-*/{path.name}"))
    for each in beside:
        with suppress(MissingError, TensorFileError):  # others' files: it is read without them
            said = read_json(each).get("init_lora_weights")
            if str(said).lower().startswith(BASE_CHANGING):
                return str(said)
    return None
