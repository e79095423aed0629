"""Models loaded by the libraries that serve them: transformers and PEFT, float32."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError, BaseError, DoraExportError, TargetError
from ..files.json_files import read_json
from ..files.tensors import LazyTensor, open_safetensors
from ..model.architecture import offline
from ..model.base import BaseModel, open_base
from ..model.match import as_trained, classes
from ..model.names import Names
from ..model.quantized import Dequantized, method, quantization
from ..model.tasks import architecture_of, auto_class, task_of
from ..model.tying import aliases, embedding_in
from ..readers import ReadOptions, read_run
from ..readers.run_folder import CONFIG_FILE
from ..run import Run
from .merged.requantized import Blocks, blocks_of
from .model import Model, read_logits

NARROW = 0.05  # of an update's own effect, for an adapter of less than float32


@dataclass(frozen=True)
class Loaded:
    """A model, and what transformers or PEFT says of loading it: `missing` tensors begin at random,
    `unexpected` ones are left out. `dequantized`: of a quantized base, who made its floats."""

    model: Any
    missing: frozenset[str]
    unexpected: frozenset[str]
    dequantized: str | None = None


@offline()
def open_transformers(folder: Path, _base: BaseModel, _run: Run) -> Model:
    """A model folder, in the class that its configuration names.

    Raises `ArtifactError` where transformers does not load it.
    """
    import transformers

    file = folder / "config.json"
    known = architecture_of(read_json(file))
    if not hasattr(transformers, known):
        raise ArtifactError("unknown architecture", file=file, found=known or None)
    if (folder / CONFIG_FILE).exists():
        raise ArtifactError(
            "an adapter lies beside the weights: transformers adds it to them, others do not",
            file=folder / CONFIG_FILE,
            remedy="take it away where it was merged already; else merge it",
        )
    # What transformers makes at random must not be the same in the model that this is compared to.
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        cls, packed = getattr(transformers, known), open_base(folder)
        if packed.stored is None:
            loaded = _load(cls, folder, config, seed=1)
        else:
            loaded = _dequantized(cls, packed, config, seed=1)
    except Exception as error:
        raise _refused("transformers", folder, error) from error
    model = of_weights(loaded, sorted(folder.glob("*.safetensors")), merged=True)
    if model.rounded is None:
        return model
    owners = _owners(packed, known)
    own = _dtypes(packed, owners)
    for side, source in aliases(loaded.model).items():  # of which one alone is stored
        for name, stored in ((side, source), (source, side)):
            if stored in own:
                own.setdefault(name, own[stored])
    return replace(model, own=own, stored=_stored(packed, owners))


def open_peft(folder: Path, base: BaseModel, run: Run) -> Model:
    """An adapter folder, on `base` in the class that `run` was trained in.

    Raises `ArtifactError` where PEFT does not load it, `ModuleNotFoundError` without PEFT.
    """
    import peft  # noqa: F401

    try:
        # An adapter for the text model alone of a multimodal base is one in that class only.
        _, layout = as_trained(read_run(folder, ReadOptions(base=base.path)), base)
    except DoraExportError as error:
        raise _refused("PEFT", folder, error) from error
    model = load(run, base, seed=1, architecture=layout.names.architecture).model
    try:
        loaded = attach(model, folder)
    except Exception as error:
        raise _refused("PEFT", folder, error) from error
    return of_weights(loaded, sorted(folder.glob("adapter_model.safetensors")), merged=False)


def _owners(artifact: BaseModel, architecture: str) -> dict[str, str]:
    """Tensor of `artifact` → the parameter of the model that it is, or a part of."""
    names = Names(artifact, architecture)
    # An expert on disk is a part of a parameter.
    owners = {name: names.tensor(name) or name for name in artifact.tensors}
    known = names.state
    return {
        name: owner if owner in known or not known else names.rename(name)[0]
        for name, owner in owners.items()
    }


def _dtypes(artifact: BaseModel, owners: Mapping[str, str]) -> dict[str, torch.dtype | Blocks]:
    """Parameter → the dtype, or the blocks of float8, in which `artifact` stores it."""
    blocks = None if artifact.stored is None else blocks_of(artifact)
    return {
        owner: blocks
        if blocks is not None and isinstance(artifact.tensors[name], Dequantized)
        else artifact.tensors[name].dtype
        for name, owner in owners.items()
    }


def _stored(artifact: BaseModel, owners: Mapping[str, str]) -> dict[str, LazyTensor]:
    """Parameter → its tensor, of those that are one tensor each, no blocks of float8."""
    parts = Counter(owners.values())
    return {
        owner: artifact.tensors[name]
        for name, owner in owners.items()
        if parts[owner] == 1 and not isinstance(artifact.tensors[name], Dequantized)
    }


def of_weights(loaded: Loaded, files: list[Path], *, merged: bool) -> Model:
    """A model of the narrowest dtype in `files`, and what that allows it to differ by."""
    return Model(
        read_logits(loaded.model),
        missing=loaded.missing,
        unexpected=loaded.unexpected,
        **allowed(files, merged=merged),
    )


def allowed(files: list[Path], *, merged: bool) -> dict[str, Any]:
    """The fields of `Model` that the narrowest dtype in `files` decides."""
    dtypes = {tensor.dtype for file in files for tensor in open_safetensors(file).values()}
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    dtype = min(floating, key=lambda dtype: dtype.itemsize, default=torch.float32)
    exact = dtype == torch.float32
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "rounded": dtype if merged and not exact else None,
        "share": 0.0 if merged or exact else NARROW,
    }


def load_base(run: Run, base: BaseModel) -> Any:
    """The base as transformers loads it, float32, in the class the run was trained in."""
    return load(run, base).model


def load(run: Run, base: BaseModel, seed: int = 0, architecture: str | None = None) -> Loaded:
    """`load_base`, and what was missing. `seed` is that of the weights that the base lacks;
    `architecture` the class where it is not the one that the run is for.

    Raises `BaseError` where transformers does not load it.
    """
    cls, config = class_of(run, base)
    if architecture not in (None, cls.__name__):
        import transformers

        cls, config = getattr(transformers, str(architecture)), None
    options = {"ignore_mismatched_sizes": bool(run.num_labels)}
    try:
        if base.stored is None:
            loaded = _load(cls, base.path, config, seed, **options)
        else:
            loaded = _dequantized(cls, base, config, seed, **options)
    except Exception as error:
        raise BaseError(
            "transformers does not load this base",
            file=base.path,
            found=f"{type(error).__name__}: {str(error)[:600]}",
            expected=f"a {cls.__name__}",
        ) from error
    if run.replaced:
        _resize(loaded.model, run)
    return loaded


@offline()
def class_of(run: Run, base: BaseModel) -> tuple[Any, Any]:
    """The class the run was trained in, and its configuration: the base's own where that is for the
    run's task, else the one that transformers' Auto class for the task takes.

    Raises `BaseError` where transformers has none.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BaseError(
            "transformers does not know this base", file=base.path, found=str(error)[:600]
        ) from error
    if run.num_labels is not None:
        config.num_labels = run.num_labels
    own = architecture_of(base.config)
    name, task = own or None, run.task or base.task
    if not own or task not in (None, task_of(base.config)):
        name = auto_class({"model_type": config.model_type}, task or "feature-extraction")
    cls = getattr(transformers, name or "", None)
    if cls is None:  # of a task that the family's class is for by another name
        with suppress(TargetError):
            found = classes(run.task, run.num_labels, base).whole.names.architecture
            cls = getattr(transformers, found or "", None)
    if cls is None:
        raise BaseError(
            "transformers has no class for this base and task",
            file=base.path,
            found=f"{own or config.model_type}, {task or 'no task'}",
        )
    return cls, config


def attach(model: Any, folder: Path, *, inside: bool = False) -> Loaded:
    """`model` with the adapter in `folder`, which PEFT puts into it in place; `inside`: into the
    model without its head, which is what some were trained on.

    The two halves of `PeftModel.from_pretrained`, because the second tells what was missing.
    """
    from peft import PeftConfig, get_peft_model

    inner = model.base_model if inside else model
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    if inside:
        config.task_type = None
    mapping = getattr(inner, "_checkpoint_conversion_mapping", {})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        told = get_peft_model(inner, config).load_adapter(
            str(folder), "default", key_mapping=mapping
        )
    missing = frozenset(name for name in told.missing_keys if "vblora_vector_bank" not in name)
    # With bias="all" PEFT saves biases of whole modules twice, and loads them once.
    unexpected = frozenset(name for name in told.unexpected_keys if ".modules_to_save." not in name)
    return Loaded(model.float().eval(), missing, unexpected)


def attention(config: Any) -> str | None:
    """The implementation of attention that computes what the configuration says; None for
    transformers' default, which leaves the soft cap of Gemma 2 out."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


@offline()
def _load(cls: Any, folder: Path | None, config: Any, seed: int, **options: Any) -> Loaded:
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what is missing is told by the result
    transformers.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, told = cls.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention(config),
                output_loading_info=True,
                **options,
            )
    finally:
        transformers.logging.set_verbosity(level)
    missing = {*told["missing_keys"], *(each[0] for each in told["mismatched_keys"])}
    return Loaded(model.eval(), frozenset(missing), frozenset(told["unexpected_keys"]))


def _dequantized(cls: Any, base: BaseModel, config: Any, seed: int, **options: Any) -> Loaded:
    """A quantized base in float32: as the library that owns its format makes it, where transformers
    can ask that here, else of the tensors as they are dequantized here."""
    kind = method(base.config)
    own = copy.deepcopy(config or cls.config_class.from_pretrained(base.path))
    for holder in (own, own.get_text_config()):
        vars(holder).pop("quantization_config", None)
    try:
        if kind == "bitsandbytes" and any(_ragged(tensor) for tensor in base.tensors.values()):
            raise ValueError("bitsandbytes' CPU kernel is wrong where rows are no whole blocks")
        asked = copy.deepcopy(own)
        asked.quantization_config = {**(quantization(base.config) or {}), "dequantize": True}
        loaded = _load(cls, base.path, asked, seed, **options)
        if getattr(loaded.model, "is_quantized", False):
            loaded.model.dequantize(torch.float32)
        for module in loaded.model.modules():  # compressed-tensors rounds activations there
            if hasattr(module, "quantization_scheme"):
                module.quantization_enabled = False
        if lost := sorted((*loaded.missing, *filter(_of_weights, loaded.unexpected))):
            raise ValueError(f"it finds no {lost[0]}, or no place for it")
        packed = {n for n, tensor in base.tensors.items() if isinstance(tensor, Dequantized)}
        if kind == "compressed-tensors" and packed - loaded.model.state_dict().keys():
            raise ValueError("it fuses experts without their scales")
        if kind == "fp8" and any(_smaller_last(base, base.tensors[n].shape) for n in packed):
            raise ValueError("it takes all blocks for equal ones, also where the last are smaller")
        for name, parameter in loaded.model.named_parameters():
            plain = type(parameter) is torch.nn.Parameter and parameter.is_floating_point()
            if name.endswith((".weight", ".bias")) and not plain:
                raise TypeError(f"{name} stays {type(parameter).__name__} of {parameter.dtype}")
        return replace(loaded, model=loaded.model.float(), dequantized=f"transformers ({kind})")
    except Exception as error:
        state = {name: tensor.load() for name, tensor in base.tensors.items()}
        loaded = _load(cls, None, own, seed, state_dict=state, **options)
        why = f"{type(error).__name__}: {str(error)[:200]}"
        return replace(loaded, dequantized=f"this tool, because transformers cannot: {why}")


def _of_weights(name: str) -> bool:
    """Whether a tensor of a quantized base is a scale of weights, and not of activations."""
    return re.search(r"weight_(scale|zero_point|packed|g_idx)", name) is not None


def _smaller_last(base: BaseModel, shape: tuple[int, ...]) -> bool:
    """Whether the last blocks of a weight of `shape` are smaller than the others."""
    sizes = (quantization(base.config) or {}).get("weight_block_size")
    sizes = sizes if isinstance(sizes, list | tuple) else ()
    return any(
        length > size and length % size for length, size in zip(shape[-2:], sizes, strict=False)
    )


def _ragged(tensor: LazyTensor) -> bool:
    return isinstance(tensor, Dequantized) and tensor.shape[-1] % 64 != 0


def _refused(engine: str, folder: Path, error: Exception) -> ArtifactError:
    if isinstance(error, DoraExportError):
        return ArtifactError(**{"file": folder, **vars(error)})
    return ArtifactError(
        f"{engine} does not load it",
        file=folder,
        found=f"{type(error).__name__}: {str(error)[:600]}",
    )


def _resize(model: Any, run: Run) -> None:
    """Give the embedding as many rows as the one that the run brings."""
    tensor = run.replaced.get(f"{embedding_in(model)}.weight")
    if tensor is not None and tensor.shape != model.get_input_embeddings().weight.shape:
        model.resize_token_embeddings(tensor.shape[0], mean_resizing=False)
