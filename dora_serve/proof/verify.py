"""The proof: the live, unmerged model against a deployed artifact, in the engine that serves it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from converters.certificate import FILE as CERTIFICATE
from converters.errors import BaseError, RunError, TargetError, some
from converters.files.json_files import read_json
from converters.fit import fit_run
from converters.model.base import BaseModel, open_base
from converters.run import Run
from converters.targets.merged.requantized import Blocks
from converters.targets.model import Inputs, Model, Reading, logits
from converters.targets.opening import Loaded, load
from converters.targets.target import target_of

from ..extras import without_extra
from .beside import files_of
from .live import fold_rounded, truth_of
from .noise import difference, noise
from .prompts import Prompts, prompts_of, verification_batch

TOLERANCE = 1e-4  # float32 logits, max abs; DESIGN bound for float32 engines
NOISE = 4  # of the float32 noise: two computations of it, each with a margin of two
# A merged model of less than float32: share of the rounding's own effect. Two of 100,000 bfloat16
# weights lie so near a tie that sums of another order round the other way, by twelve times a
# rounding's mean square: 1.6 % of what all roundings change. Of float8 a sixteenth as many do.
TIES_SHARE, TIES_SHARE_8 = 0.05, 0.01
_LOST = 0.05  # rounding of one weight, as a share of its update, that is worth a warning
_FAR = 10  # how many times the bound the control should be


@dataclass(frozen=True)
class Verification:
    """`truth`: who computed the live model, "peft" or "live" (branches beside the layers).
    `tolerance`: the bound. `noise`: the float32 noise of the live model on these prompts, measured
    against `noise_of`. `max_abs`: largest logit difference to the truth. `control`: the same with
    the update left out, which must be larger than the tolerance or nothing was tested; of a run
    without updates, with what it trained whole left out. `top1`: share of equal argmax.

    For an adapter that was fitted, the truth is the live run fitted in the same way; `fit` is how,
    and `unfitted` the largest logit difference to the run as it was trained. For a merged model of
    less than float32, the truth is rounded in the same way; `rounding` is what that changed, and
    `lost` the largest of its changes of one weight, as a share of that weight's update.
    `top1_bound`: the share of equal argmax that passes, below 1 for quantized graphs. `asked`: the
    prompts. `left`: what they are not. `dequantized`: of a quantized base, who made the floats that
    the truth computes with. `failures`: reasons beside the numbers, which are not there where the
    artifact did not load."""

    engine: str
    dtype: str = ""
    truth: str = ""
    tolerance: float = TOLERANCE
    noise: float = 0.0
    noise_of: str = ""
    max_abs: float = math.nan
    top1: float = 0.0
    control: float = 0.0
    has_update: bool = True
    fit: dict[str, float] | None = None
    unfitted: float | None = None
    rounding: float | None = None
    lost: float | None = None
    top1_bound: float = 1.0
    asked: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    dequantized: str | None = None
    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def control_fails(self) -> bool:
        return self.control > self.tolerance

    @property
    def passed(self) -> bool:
        close = self.max_abs <= self.tolerance and self.top1 >= self.top1_bound
        return close and not self.failures and (self.control_fails or not self.has_update)


def verify(
    run: Run,
    artifact: str | Path,
    base: str | Path | BaseModel,
    engine: str | None = None,
    *,
    earlier: Verification | None = None,
) -> Verification:
    """Compare the live model of `run` with `artifact` in `engine` (by default its target's first).

    A float32 artifact must equal the live model on every logit within 1e-4, or four times the live
    model's own float32 noise where that is more; a tenth of the update's own effect where that
    effect is smaller than the bound. A merged model of a narrower dtype must equal the live model
    whose merged weights are rounded once, on a tie to the side that the model has, within the same
    bound or 5 % of what the rounding changed, of float8 1 % (of parameters that are stored in
    parts, sums of another order round near ties the other way); what is stored or computed less
    exactly may differ by the share of the update's own effect that its target names
    (`Model.share`). A fitted artifact is compared with the live run fitted to the limit its
    certificate names. One that does not load has failed. `earlier`: a verification of another
    artifact of the same run in the same engine, whose noise is not measured again.
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
    prompts = prompts_of(run, base, path)
    while True:
        try:
            model = target.open(path, base, run, engine)
            reading = model.read(prompts.batches)
            break
        except (BaseError, RunError, TargetError):
            raise  # of what was asked, not of the artifact
        except Exception as error:
            if (missing := without_extra(error)) is not None:
                raise missing from None
            why = _not_asked(run, base, prompts)
            if why is None:
                return Verification(engine, fit=fit, failures=(_reason(error),))
            if prompts.less is None:
                raise why from error
            prompts = prompts.less
    model = replace(model, read=lambda _batches: reading)  # its weights are let go
    unfitted = None
    if fit is not None:
        whole = reading.measure(truth_of(run, base).model)
        unfitted = difference(reading.values, whole)
        run, _ = fit_run(run.strip(), base, **fit)  # type: ignore[arg-type]
    try:
        found = _compare(run, base, model, reading, prompts, earlier)
    except (BaseError, RunError, TargetError):
        raise
    except Exception as error:
        if (why := _not_asked(run, base, prompts)) is not None:
            raise why from error
        raise
    faults, told = files_of(path, run, base)
    return replace(
        found,
        engine=engine,
        fit=fit,
        unfitted=unfitted,
        failures=(*found.failures, *faults),
        warnings=(*found.warnings, *told),
    )


def _not_asked(run: Run, base: BaseModel, prompts: Prompts) -> TargetError | None:
    """An error where the live model cannot be asked so either."""
    live = truth_of(run, base).model
    try:
        logits(live, prompts.batches[0])
    except Exception as error:
        return TargetError(
            "verify does not know what to ask this model",
            found=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            expected="text, images, waves or spectra",
            remedy="compare its outputs with the unmerged run's on inputs of your own",
        )
    return None


def _compare(
    run: Run,
    base: BaseModel,
    model: Model,
    reading: Reading,
    prompts: Prompts,
    earlier: Verification | None,
) -> Verification:
    live = truth_of(run, base)
    truth = reading.measure(live.model)
    failures = _badly_loaded(model, live.loaded, run)
    if [t.shape for t in truth] != [t.shape for t in reading.values]:
        shapes = " and ".join(
            str([list(t.shape) for t in side]) for side in (reading.values, truth)
        )
        failures.append(f"its outputs have another shape than the live model's: {shapes}")
        return Verification("", model.dtype, live.name, failures=tuple(failures))
    if earlier is not None and earlier.noise_of:
        noisy, noise_of = earlier.noise, earlier.noise_of
    else:
        noisy, noise_of = noise(live.model, reading.measure, truth)
    tolerance = exact = max(TOLERANCE, NOISE * noisy)
    top1 = reading.top1(live.model, truth)
    live.detach()
    without = reading.measure(live.model)
    control, has_update = difference(without, truth), True
    rounding = lost = None
    if control == 0:
        has_update = next(live.folded(), None) is not None
        if not has_update and run.replaced:
            control = difference(reading.measure(load(run, base).model), truth)
            has_update = control > 0
        if has_update and control == 0:
            failures.append(
                "of the update nothing was proved: what was asked has the same answers without it"
            )
    if 0 < control <= exact:
        exact = max(control / _FAR, NOISE * noisy)
    tolerance = max(exact, model.share * control)
    if model.rounded is not None:
        lost = fold_rounded(live, model.rounded, model.own, model.stored)
        unrounded, truth = truth, reading.measure(live.model)
        rounding = difference(truth, unrounded)
        in_blocks = any(isinstance(each, Blocks) for each in model.own.values())
        share = TIES_SHARE_8 if in_blocks else TIES_SHARE
        tolerance = max(exact, share * rounding if math.isfinite(rounding) else 0.0)
        top1 = reading.top1(live.model, truth)
    max_abs = difference(reading.values, truth)
    if not max_abs <= tolerance and (both := model.missing & live.loaded.missing):
        failures.append(
            f"neither it nor the base holds, so that they begin at random: {some(sorted(both))}"
        )
    return Verification(
        "",
        model.dtype,
        live.name,
        tolerance=tolerance,
        noise=noisy,
        noise_of=noise_of,
        max_abs=max_abs,
        # Of quantized graphs the bound is so wide that a share of the choices says more.
        top1=top1(tolerance if model.top1 == 1 else exact),
        control=control,
        has_update=has_update,
        rounding=rounding,
        lost=lost,
        top1_bound=model.top1,
        asked=prompts.asked,
        left=prompts.left,
        dequantized=live.loaded.dequantized,
        failures=tuple(failures),
        warnings=tuple(_warnings(control, tolerance, has_update, lost)),
    )


def _badly_loaded(model: Model, base: Loaded, run: Run) -> list[str]:
    """What the artifact lacks or has too much of, where its base does not."""
    lacks = (model.missing - base.missing) | (model.missing & run.replaced.keys())
    more = model.unexpected - base.unexpected
    said = []
    if lacks:
        said.append(f"it lacks tensors, which begin at random: {some(sorted(lacks))}")
    if more:
        said.append(f"it holds tensors that have no place in its class: {some(sorted(more))}")
    return said


def _warnings(control: float, tolerance: float, has_update: bool, lost: float | None) -> list[str]:
    said = []
    if not has_update:
        said.append(
            "the run's update is zero everywhere: the artifact is the base, and nothing of "
            "the run was proved"
        )
    elif tolerance < control < _FAR * tolerance:
        said.append(
            f"the update's own effect is only {control / tolerance:.1f} times the bound: a small "
            "fault in it would not be seen"
        )
    if lost is not None and lost > _LOST:
        said.append(
            f"rounding to the output dtype moved a module's weight {lost:.0%} as far as its "
            "update; use `dtype` float32, or deploy an adapter"
        )
    return said


def _reason(error: Exception) -> str:
    text = str(error) if hasattr(error, "remedy") else f"{type(error).__name__}: {error}"
    return f"it does not load: {text[:1200]}"


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


__all__ = ["Inputs", "Verification", "logits", "verification_batch", "verify"]
