"""The proof: the live, unmerged model against a deployed artifact, in the engine that serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.certificate import FILE as CERTIFICATE
from converters.errors import MissingError, RunError
from converters.files.onnx_files import is_onnx_folder
from converters.files.tensors import open_safetensors, read_json
from converters.fit import fit_run
from converters.model.base import BaseModel, open_base
from converters.run import Run
from converters.targets.lora_folder.adapter import CONFIG as ADAPTER_CONFIG
from converters.targets.lora_folder.adapter import WEIGHTS as ADAPTER_WEIGHTS

from .live import LiveModel, attention, load_base

TOLERANCE = 1e-4  # float32 logits, max abs; DESIGN bound for float32 engines
REDUCED_SHARE = 0.05  # a float16/bfloat16 adapter: share of the update's own effect on the logits
TIES_SHARE = 0.01  # a merged model of such a dtype: share of the rounding's own effect

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Verification:
    """`max_abs`: largest logit difference to the truth. `control`: the same with the update left
    out, which must be larger than the tolerance or nothing was tested. `top1`: share of equal
    argmax. For an adapter that was fitted, the truth is the live run fitted in the same way;
    `fit` is how, and `unfitted` the largest logit difference to the run as it was trained.
    `top1_bound`: the share of equal argmax that passes, below 1 for quantized graphs."""

    engine: str
    dtype: str
    tolerance: float
    max_abs: float
    top1: float
    control: float
    has_update: bool
    fit: dict[str, float] | None = None
    unfitted: float | None = None
    top1_bound: float = 1.0

    @property
    def control_fails(self) -> bool:
        return self.control > self.tolerance

    @property
    def passed(self) -> bool:
        close = self.max_abs <= self.tolerance and self.top1 >= self.top1_bound
        return close and (self.control_fails or not self.has_update)


def verification_batch(model: Any, rows: int = 4, length: int = 16, seed: int = 0) -> Inputs:
    """Token ids from a fixed seed, the last row padded; decoder inputs for encoder-decoders.
    Pixels for models of images."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (rows, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    text = config.get_text_config()
    vocab, pad = text.vocab_size, getattr(text, "pad_token_id", None)
    ids = torch.randint(min(5, vocab - 1), vocab, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad is not None:
        mask[-1, length - length // 4 :] = 0
        ids[mask == 0] = pad
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(
            min(5, vocab - 1), vocab, (rows, length // 2), generator=generator
        )
    return inputs


def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    """All logits of a model, padded positions left out where they are per token."""
    with torch.inference_mode():
        output = model(**inputs)
    if "start_logits" in output:
        result = torch.stack([output.start_logits, output.end_logits])
        padded: torch.Tensor = result.masked_fill(inputs["attention_mask"] == 0, 0.0)
        return padded
    result = output.logits if "logits" in output else output.last_hidden_state
    ids = inputs.get("input_ids")
    if ids is not None and result.dim() == 3 and result.shape[:2] == ids.shape:
        result = result * inputs["attention_mask"].unsqueeze(-1)
    flat: torch.Tensor = result.float()
    return flat


@dataclass(frozen=True)
class Reading:
    """What an engine computed, and how the same is asked of a transformers model.

    `values`: the artifact's, any shape. `measure(model)`: those of a transformers model.
    `top1(model, values)`: the share of its choices, with its `values`, that the engine made too.
    """

    values: torch.Tensor
    measure: Callable[[Any], torch.Tensor]
    top1: Callable[[Any, torch.Tensor], float]


def read_logits(model: Any) -> Reading:
    """The logits of a model that is called like a transformers model."""
    inputs = verification_batch(model)
    found = logits(model, inputs)

    def top1(_model: Any, values: torch.Tensor) -> float:
        return float((found.argmax(-1) == values.argmax(-1)).double().mean())

    return Reading(found, lambda other: logits(other, inputs), top1)


def _transformers(artifact: Path, _run: Run, _base: BaseModel) -> Reading:
    import transformers

    known = read_json(artifact / "config.json").get("architectures")
    if not isinstance(known, list) or not hasattr(transformers, str(known[0])):
        raise RunError("unknown architecture", file=artifact / "config.json", found=known)
    transformers.logging.disable_progress_bar()
    cls = getattr(transformers, str(known[0]))
    config = transformers.AutoConfig.from_pretrained(artifact)
    model = cls.from_pretrained(
        artifact, dtype=torch.float32, attn_implementation=attention(config)
    )
    return read_logits(model.eval())


def _peft(artifact: Path, run: Run, base: BaseModel) -> Reading:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(run, base), str(artifact))
    return read_logits(model.float().eval())


def _vllm(artifact: Path, run: Run, base: BaseModel) -> Reading:
    from .vllm import read_vllm

    return read_vllm(artifact, run, base)


ENGINES: dict[str, Callable[[Path, Run, BaseModel], Reading]] = {
    "transformers": _transformers,
    "peft": _peft,
    "vllm": _vllm,
}


def verify(
    run: Run, artifact: str | Path, base: str | Path | BaseModel, engine: str | None = None
) -> Verification:
    """Compare the live model of `run` with `artifact` in `engine` (by default the one that fits).

    A float32 artifact must equal the live model within 1e-4 on every logit. A merged model of a
    narrower dtype must equal the live model whose merged weights are rounded once, within the same
    bound or 1 % of what the rounding changed (sums of another order round near ties the other
    way); an adapter of a narrower dtype may differ by 5 % of the update's own effect. A
    fitted adapter is compared with the live run fitted to the limit its certificate names. vLLM
    is asked for log-probabilities and tokens, see `vllm_proof`; for ONNX folders see `onnx_proof`.
    """
    path = Path(artifact)
    base = base if isinstance(base, BaseModel) else open_base(base)
    if is_onnx_folder(path):
        from .onnxruntime import verify_onnx

        _check_engine(path, engine, ("onnxruntime",), "an ONNX folder")
        return verify_onnx(run, path, base)
    adapter = (path / ADAPTER_CONFIG).is_file()
    fits = ("peft", "vllm") if adapter else ("transformers", "vllm")
    engine = _check_engine(path, engine, fits, "an adapter" if adapter else "a model folder")
    dtype = _artifact_dtype(path, adapter)
    reading = ENGINES[engine](path, run, base)

    fit = _fit_limit(path) if adapter else None
    unfitted = None
    if fit is not None:
        whole = reading.measure(LiveModel(run, base).model)
        unfitted = float((reading.values - whole).abs().max())
        run, _ = fit_run(run.strip(), base, **fit)  # type: ignore[arg-type]
    live = LiveModel(run, base)
    truth = reading.measure(live.model)
    top1 = reading.top1(live.model, truth)
    live.detach()
    without = reading.measure(live.model)
    tolerance = TOLERANCE
    if dtype != torch.float32 and adapter:
        tolerance = max(TOLERANCE, REDUCED_SHARE * float((without - truth).abs().max()))
    elif dtype != torch.float32:
        live.fold_rounded(dtype)
        unrounded, truth = truth, reading.measure(live.model)
        tolerance = max(TOLERANCE, TIES_SHARE * float((truth - unrounded).abs().max()))
        top1 = reading.top1(live.model, truth)
    return Verification(
        engine=engine,
        dtype=str(dtype).removeprefix("torch."),
        tolerance=tolerance,
        max_abs=float((reading.values - truth).abs().max()),
        top1=top1,
        control=float((without - truth).abs().max()),
        has_update=has_update(run),
        fit=fit,
        unfitted=unfitted,
    )


def _check_engine(path: Path, wanted: str | None, fits: tuple[str, ...], kind: str) -> str:
    if wanted is not None and wanted not in fits:
        raise RunError(
            f"the engine {wanted} does not load this artifact",
            file=path,
            found=kind,
            expected=" or ".join(fits),
        )
    return wanted or fits[0]


def has_update(run: Run) -> bool:
    """Whether anything of the run's updates is left to compare."""
    updates = (run.updates[module].components() for module in run.updates)
    return any(update is None or update.strip().rank for update in updates)


def _fit_limit(path: Path) -> dict[str, float] | None:
    """How the certificate says the adapter was fitted, None where it was not."""
    file = path / CERTIFICATE
    fit = read_json(file).get("fit") if file.is_file() else None
    if fit is None:
        return None
    limit = fit.get("limit") if isinstance(fit, dict) else None
    names = {"max_rank", "energy", "budget"}
    numbers = isinstance(limit, dict) and all(type(v) in (int, float) for v in limit.values())
    if not isinstance(limit, dict) or not numbers or not limit.keys() <= names:
        raise RunError("the certificate's fit is not one", file=file, found=str(fit)[:200])
    return limit


def _artifact_dtype(path: Path, adapter: bool) -> torch.dtype:
    files = [path / ADAPTER_WEIGHTS] if adapter else sorted(path.glob("*.safetensors"))
    if not files:
        gguf = next(path.glob("*.gguf"), None)
        raise MissingError(
            "no artifact here" if gguf is None else "GGUF files are not read here",
            file=gguf or path,
            expected="a merged model, an adapter or an ONNX folder",
            remedy=None if gguf is None else "verify the same run's adapter for --target peft",
        )
    dtypes = {t.dtype for file in files for t in open_safetensors(file).values()}
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return min(floating, key=lambda dtype: dtype.itemsize)
