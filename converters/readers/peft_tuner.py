"""Every PEFT tuner without a reader of its own, through PEFT itself (huggingface/peft,
`src/peft/tuners/`).

The base's architecture is built without memory, PEFT loads the adapter into it, and the `merge()`
of each PEFT layer turns base weight into deployed weight: no tuner's formula is repeated here.
Not read: tuners that have no weight to merge into, which are errors.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import BaseError, RunError
from ..files.output import save_tensors, temporary
from ..files.tensors import LazyTensor, LazyTensors, load_finite
from ..model.base import HEAD, BaseModel
from ..model.layout import Layout
from ..model.match import classes, trained_in
from ..model.names import PEFT_PREFIX
from ..options import ReadOptions
from ..run import Run
from ..updates.peft_layer import LayerUpdate, MergedBias, merge_layer
from ..updates.update import Update, convolution_matrix
from .patterns import PatternError, Patterns
from .peft_common import check_saved, known_base, origin
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder

_TUNERS = frozenset(
    "ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA "
    "LOKR MISS OFT OSF PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA "
    "TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT".split()
)
# PEFT calculates part of these layers from the base weights when it makes them.
_FROM_BASE = frozenset({"ADAMSS", "FROD", "OSF", "PSOFT"})
_CHANGE_BIAS = frozenset({"ADAMSS", "BEFT", "GLORA", "IA3", "ROAD"})

_PROMPT = "it learned what stands before the input, not weights"
_ROUTED = "what it adds depends on each input"
_UNMERGEABLE = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "it learned prompts inside the attention, not weights",
    "LILY": _ROUTED,
    "POLY": _ROUTED,
    "XLORA": _ROUTED,
    "SHADOW": "it is a second network beside the base",
}


class PeftTunerReader:
    """Reads an adapter folder; needs the base for its architecture."""

    name = "peft_tuner"
    looks_for = (
        f"{CONFIG_FILE} with the peft_type of another PEFT tuner (LOHA, VERA, OFT, IA3 …), "
        f"and {' or '.join(WEIGHT_FILES)}"
    )

    def detect(self, folder: RunFolder) -> RunFolder | None:
        kind = str(folder.adapter_config.get("peft_type"))
        return folder if kind in _TUNERS or kind in _UNMERGEABLE else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        config, config_path = folder.adapter_config, folder.path / CONFIG_FILE
        kind = str(config["peft_type"])
        _refuse_unmergeable(kind, config, config_path)
        file, tensors = _weights(folder)
        for tensor in tensors.values():
            if tensor.dtype.is_floating_point:
                load_finite(tensor)
        base = _find_base(config, options, config_path)
        run = Run(folder.path, self.name, {}, **origin(config, {}), files=(file, config_path))
        layout, named = trained_in(classes(run.task, None, base), tensors)
        tensors = {named[key]: tensor for key, tensor in tensors.items()}
        whole = {
            own: t for key, t in tensors.items() if (own := _base_name(key)) in layout.names.state
        }
        run = replace(run, **origin(config, whole))
        layout = Layout(base, layout.names.architecture, run.num_labels)
        model = _empty(run, base, layout.names.architecture)
        from_base = _is_from_base(kind, config)
        needed = _needed(tensors, base, layout) if from_base else {}
        _give_memory(model, whole, needed)
        names = [name for name, _ in model.named_modules()]
        _check_patterns(config, names, config_path)
        check_saved(config, names, config_path)
        with _as_named(folder, file, tensors) as place:
            layers = _load(model, place, file)
        absent = [module for module in layers if f"{module}.weight" not in needed]
        if from_base and absent:
            raise BaseError(
                f"{kind} is calculated from the base's weights, and one is not there",
                file=base.path,
                tensor=f"{absent[0]}.weight",
                remedy="is this the base it was trained on? pass the right one with `base`",
            )

        updates: dict[str, Update] = {}
        embeddings, tied = set(), set()
        for module, layer in layers.items():
            inner = layer.get_base_layer()
            if isinstance(inner, torch.nn.Embedding):
                embeddings.add(module)
            if kind == "TRAINABLE_TOKENS" and layer.tied_adapter is not None:
                tied |= embeddings
            elif kind not in ("BEFT", "LN_TUNING"):
                updates[module] = _update(module, layer, inner, kind, file)
            if kind == "BEFT" or (kind in _CHANGE_BIAS and inner.bias is not None):
                whole[f"{module}.bias"] = _bias(module, layer, inner, base, layout, file)
        # An adapter on an embedding or head may carry its untouched base weight along.
        replaced = {n: t for n, t in whole.items() if n.removesuffix(".weight") not in updates}
        return replace(
            run,
            updates=updates,
            replaced=replaced,
            embeddings=frozenset(embeddings),
            tied=frozenset(tied),
        )


def _weights(folder: RunFolder) -> tuple[Path, LazyTensors]:
    tensors, file = folder.adapter, folder.adapter_file
    if file is None or file.name not in WEIGHT_FILES:
        raise RunError(
            "PEFT, which reads this adapter, finds its weights under one name only",
            file=file,
            expected=" or ".join(WEIGHT_FILES),
            remedy="put the file into a folder of its own under that name, with the configuration",
        )
    return file, tensors


def _refuse_unmergeable(kind: str, config: Mapping[str, object], path: Path) -> None:
    reason = _UNMERGEABLE.get(kind)
    if kind == "PVERA" and config.get("sample_at_inference"):
        reason = "it draws random numbers at inference (sample_at_inference)"
    if reason is not None:
        raise RunError(
            f"{kind} cannot be merged into weights: {reason}",
            file=path,
            found=f"peft_type: {kind}",
            expected="a tuner that changes weights",
            remedy="serve it with PEFT on its base: PeftModel.from_pretrained(base, adapter)",
        )


def _is_from_base(kind: str, config: Mapping[str, object]) -> bool:
    """Whether PEFT calculates part of the layers from the base weights when it loads them."""
    # Which weights are tuned: those that are largest in the base, where the file does not say it.
    picked = kind == "SUPERTUNING" and not config.get("save_precomputed_indices", True)
    return picked or kind in _FROM_BASE


def _find_base(config: Mapping[str, object], options: ReadOptions, path: Path) -> BaseModel:
    """The base the user names, else the hub model of the configuration."""
    named = str(config.get("base_model_name_or_path") or "")
    base = known_base(options.base, named, origin(config, {})["revision"])
    if base is not None:
        return base
    raise RunError(
        f"{config['peft_type']} adapters can only be read with their base model",
        file=path,
        found=f"base_model_name_or_path: {named or None}",
        remedy="pass the base with `base`, a folder or a hub id",
    )


def _empty(run: Run, base: BaseModel, architecture: str | None) -> Any:
    """The model the run was trained in, on the meta device."""
    from ..model.architecture import empty_model

    if architecture is None:
        raise BaseError(
            "the base does not say which model it is",
            file=base.path / "config.json",
            expected="architectures",
            remedy="set architectures in the base's config.json",
        )
    return empty_model(architecture, base.config, run.num_labels)


@contextmanager
def _as_named(folder: RunFolder, file: Path, tensors: LazyTensors) -> Iterator[Path]:
    """A folder in which PEFT finds `tensors` under these names: the run's own, where they are."""
    keys = {
        name if name.startswith("base_model.") else PEFT_PREFIX + name: tensor
        for name, tensor in tensors.items()
    }
    if keys.keys() == folder.tensors(file).keys():
        yield folder.path
        return
    with temporary() as place:
        shutil.copyfile(folder.path / CONFIG_FILE, place / CONFIG_FILE)
        save_tensors({key: tensor.load() for key, tensor in keys.items()}, place / WEIGHT_FILES[0])
        yield place


def _base_name(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".ln_tuning_layers.", ".")


def _find(name: str, base: BaseModel, layout: Layout) -> LazyTensor | None:
    """The base's tensor of that name in memory; for a head that it lacks, the embedding."""
    tensor = layout.tensor(name)
    if tensor is None and name == HEAD and base.embedding is not None:
        return base.tensors[base.embedding]
    return tensor


def _needed(
    tensors: Mapping[str, LazyTensor], base: BaseModel, layout: Layout
) -> dict[str, LazyTensor]:
    """The base's weights and biases of the modules that have a tensor in the adapter."""
    owners = {name[:end] for name in tensors for end, char in enumerate(name) if char == "."}
    names = [f"{owner}.{kind}" for owner in owners for kind in ("weight", "bias")]
    found = {name: _find(name, base, layout) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _give_memory(
    model: Any, whole: Mapping[str, LazyTensor], filled: Mapping[str, LazyTensor]
) -> None:
    """Bring the model from the meta device to the CPU.

    Parameters in `whole` get memory, for PEFT to load them into; those in `filled` their values.
    All others are one zero seen as many.
    """
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{module_name}.{name}".removeprefix(".")
            if full in filled:
                data = load_finite(filled[full])
                _check_shape(filled[full], data, parameter)
            elif full in whole:
                data = torch.zeros(parameter.shape)
            else:
                data = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(data, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))


def _check_shape(tensor: LazyTensor, data: torch.Tensor, parameter: torch.Tensor) -> None:
    if data.shape != parameter.shape:
        raise BaseError(
            "a weight of the base has another shape than its configuration says",
            file=tensor.path,
            tensor=tensor.name,
            found=list(data.shape),
            expected=list(parameter.shape),
        )


def _check_patterns(config: Mapping[str, object], names: list[str], path: Path) -> None:
    """Raise `RunError` for regular expressions that PEFT would not come back from."""
    patterns = Patterns()
    asked: list[tuple[Callable[[str, str], object], str]] = [
        (patterns.whole, said)
        for key in ("target_modules", "exclude_modules")
        if isinstance(said := config.get(key), str)
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(said := config.get(key), Mapping):
            asked += ((patterns.suffix, str(pattern)) for pattern in said)
    said = config.get("layers_pattern") or []
    for pattern in [said] if isinstance(said, str) else said if isinstance(said, list) else []:
        asked.append((patterns.number, rf".*\.{pattern}"))
    for matches, pattern in asked:
        try:
            for name in names:
                matches(pattern, name)
        except PatternError as error:
            raise RunError(str(error), file=path, found=pattern) from None


def _load(model: Any, folder: Path, file: Path) -> dict[str, Any]:
    """The PEFT layers of the adapter by module name, loaded by PEFT."""
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise RunError(
            "this adapter is read with the peft package, which is not installed",
            file=folder,
            remedy="pip install 'dora-serve[peft]'",
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
            # Loading again tells which tensors did not find each other.
            names = loaded.load_adapter(str(folder), "default", torch_device="cpu")
        except (
            AttributeError,
            ImportError,
            LookupError,  # rows that an embedding of this size does not have, too
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise RunError(
                "PEFT cannot load this adapter into this base",
                file=file,
                found=f"{type(error).__name__}: {str(error)[:600]}",
                remedy="is this the base it was trained on, and the installed peft recent enough?",
            ) from error
    state = loaded.state_dict(keep_vars=True)
    # A tensor that layers share is stored once.
    known = {id(tensor) for name, tensor in state.items() if name not in names.missing_keys}
    missing = [name for name in names.missing_keys if id(state[name]) not in known]
    for kind, wrong in (("missing", missing), ("unknown", names.unexpected_keys)):
        if wrong:
            raise RunError(
                f"tensors of the adapter are {kind}",
                file=file,
                tensor=wrong[0],
                found=f"{len(wrong)} {kind} tensors",
                remedy="is this the adapter_config.json of another adapter, or another base's?",
            )
    root = loaded.get_base_model()
    return {n: layer for n, layer in root.named_modules() if isinstance(layer, BaseTunerLayer)}


def _update(module: str, layer: Any, inner: Any, kind: str, file: Path) -> LayerUpdate:
    weight = inner.weight
    if kind == "OFT" and math.prod(weight.shape[2:]) > 1:
        raise RunError(
            "OFT of a convolution turns overlapping pieces of its input, which no weight does",
            file=file,
            tensor=module,
            found=f"{type(inner).__name__}, weight {list(weight.shape)}",
            remedy="serve it with PEFT on its base: PeftModel.from_pretrained(base, adapter)",
        )
    if weight.dim() < 2:
        raise RunError(
            "adapters on this kind of layer are not read",
            file=file,
            tensor=module,
            found=f"{type(inner).__name__}, weight {list(weight.shape)}",
            expected="a linear layer, Conv1D, convolution or embedding",
            remedy="merge it with PEFT: merge_and_unload()",
        )
    conv1d = type(inner).__name__ == "Conv1D"
    # The weight is given to the layer when it is merged; until then it needs no memory.
    inner.weight = torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False)
    rows, columns = convolution_matrix(weight.shape)
    shape = (columns, rows) if conv1d else (rows, columns)
    return LayerUpdate(module, layer, shape, conv1d, file)


def _bias(
    module: str, layer: Any, inner: Any, base: BaseModel, layout: Layout, file: Path
) -> MergedBias:
    weight, bias = (_find(f"{module}.{kind}", base, layout) for kind in ("weight", "bias"))
    if inner.bias is None or weight is None or bias is None:
        raise RunError(
            "the adapter trained a bias that the base does not have, so it cannot be merged",
            file=file,
            tensor=f"{module}.bias",
            remedy="serve it with PEFT on its base: PeftModel.from_pretrained(base, adapter)",
        )

    def calculate() -> torch.Tensor:
        _, merged = merge_layer(layer, load_finite(weight), load_finite(bias), module, file)
        assert merged is not None
        return merged

    return MergedBias(f"{module}.bias", file, tuple(inner.bias.shape), calculate)
