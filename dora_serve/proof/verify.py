"""The proof: the live, unmerged model against a deployed artifact, in the engine that serves it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from converters.certificate import FILE as CERTIFICATE
from converters.errors import RunError
from converters.files.json_files import read_json
from converters.fit import fit_run
from converters.model.base import BaseModel, open_base
from converters.run import Run
from converters.targets.model import Inputs, logits
from converters.targets.target import target_of

from .live import LiveModel
from .prompts import inputs_of, verification_batch

TOLERANCE = 1e-4  # float32 logits, max abs; DESIGN bound for float32 engines
TIES_SHARE = 0.01  # a merged model of less than float32: share of the rounding's own effect


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


def verify(
    run: Run, artifact: str | Path, base: str | Path | BaseModel, engine: str | None = None
) -> Verification:
    """Compare the live model of `run` with `artifact` in `engine` (by default its target's first).

    A float32 artifact must equal the live model within 1e-4 on every logit. A merged model of a
    narrower dtype must equal the live model whose merged weights are rounded once, within the same
    bound or 1 % of what the rounding changed (sums of another order round near ties the other
    way); what is stored or computed less exactly may differ by the share of the update's own
    effect that its target names (`Model.share`). A fitted artifact is compared with the live run
    fitted to the limit its certificate names.
    """
    path = Path(artifact)
    base = base if isinstance(base, BaseModel) else open_base(base)
    target = target_of(path)
    if engine is not None and engine not in target.engines:
        raise RunError(
            f"the engine {engine} does not load this artifact",
            file=path,
            found=target.name,
            expected=" or ".join(target.engines) or "none",
        )
    engine = engine or next(iter(target.engines), "")
    fit = _fit_limit(path)
    model = target.open(path, base, run, engine)
    reading = model.read(inputs_of(run, base))
    model = replace(model, read=lambda _inputs: reading)  # its weights are let go
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
    tolerance = max(TOLERANCE, model.share * float((without - truth).abs().max()))
    if model.rounded is not None:
        live.fold_rounded(model.rounded)
        unrounded, truth = truth, reading.measure(live.model)
        tolerance = max(TOLERANCE, TIES_SHARE * float((truth - unrounded).abs().max()))
        top1 = reading.top1(live.model, truth)
    return Verification(
        engine=engine,
        dtype=model.dtype,
        tolerance=tolerance,
        max_abs=float((reading.values - truth).abs().max()),
        top1=top1,
        control=float((without - truth).abs().max()),
        has_update=has_update(run),
        fit=fit,
        unfitted=unfitted,
        top1_bound=model.top1,
    )


def has_update(run: Run) -> bool:
    """Whether anything of the run's updates is left to compare."""
    updates = (run.updates[module].components() for module in run.updates)
    return any(update is None or update.strip().rank for update in updates)


def _fit_limit(path: Path) -> dict[str, float] | None:
    """How the certificate says the run was fitted, None where it was not."""
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


__all__ = ["Inputs", "Verification", "has_update", "logits", "verification_batch", "verify"]
