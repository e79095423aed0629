"""Artifacts loaded by the libraries that serve them: transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from ..files.json_files import read_json
from ..files.tensors import open_safetensors
from ..model.base import BaseModel
from ..model.match import as_trained, target_architecture
from ..readers import ReadOptions, read_run
from ..run import Run
from .model import Model, read_logits

_NARROW = 0.05  # of an update's own effect, for an adapter of less than float32


def open_transformers(folder: Path, _base: BaseModel, _run: Run) -> Model:
    """A model folder, in the class that its configuration names, float32."""
    import transformers

    file = folder / "config.json"
    known = read_json(file).get("architectures")
    if not isinstance(known, list) or not hasattr(transformers, str(known[0])):
        raise RunError("unknown architecture", file=file, found=known)
    transformers.logging.disable_progress_bar()
    cls = getattr(transformers, str(known[0]))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention(config))
    return of_weights(read_logits(model.eval()), sorted(folder.glob("*.safetensors")), merged=True)


def open_peft(folder: Path, base: BaseModel, run: Run) -> Model:
    """An adapter folder, on `base` in the class that `run` was trained in, float32."""
    from peft import PeftModel

    # An adapter for the text model alone of a multimodal base is one in that class only.
    _, layout = as_trained(read_run(folder, ReadOptions(base=base.path)), base)
    loaded = load_base(run, base, layout.names.architecture)
    model = PeftModel.from_pretrained(loaded, str(folder))
    files = sorted(folder.glob("adapter_model.safetensors"))
    return of_weights(read_logits(model.float().eval()), files, merged=False)


def of_weights(read: Any, files: list[Path], *, merged: bool) -> Model:
    """A model of the narrowest dtype in `files`, and what that allows it to differ by."""
    dtypes = {tensor.dtype for file in files for tensor in open_safetensors(file).values()}
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    dtype = min(floating, key=lambda dtype: dtype.itemsize, default=torch.float32)
    exact = dtype == torch.float32
    return Model(
        read,
        str(dtype).removeprefix("torch."),
        rounded=dtype if merged and not exact else None,
        share=0.0 if merged or exact else _NARROW,
    )


def load_base(run: Run, base: BaseModel, architecture: str | None = None) -> Any:
    """The base as transformers loads it, float32, in `architecture`; None for the class that the
    run is for."""
    import transformers

    cls, config = class_of(run, base)
    if architecture not in (None, cls.__name__):
        cls, config = getattr(transformers, str(architecture)), None
    level = transformers.logging.get_verbosity()
    # The base lacks a head that the run brings, or has one of another size.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = cls.from_pretrained(
            base.path,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=run.num_labels is not None,
            attn_implementation=attention(config),
        ).eval()
    finally:
        transformers.logging.set_verbosity(level)
    if run.replaced:
        _resize(model, run)
    return model


def class_of(run: Run, base: BaseModel) -> tuple[Any, Any]:
    """The class the run was trained in, and its configuration."""
    import transformers

    architecture, _ = target_architecture(run, base)
    config = transformers.AutoConfig.from_pretrained(base.path)
    if run.num_labels is not None:
        config.num_labels = run.num_labels
    mapping = transformers.AutoModel._model_mapping
    return getattr(transformers, architecture) if architecture else mapping[type(config)], config


def attention(config: Any) -> str | None:
    """The implementation of attention that computes what the configuration says; None for
    transformers' default, which leaves the soft cap of Gemma 2 out."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def _resize(model: Any, run: Run) -> None:
    """Give the embedding as many rows as the one that the run brings."""
    embedding = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is embedding)
    tensor = run.replaced.get(f"{name}.weight")
    if tensor is not None and tensor.shape != embedding.weight.shape:
        model.resize_token_embeddings(tensor.shape[0], mean_resizing=False)
