"""Checks of the stored numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .finding import AGAIN, Adapter, Finding

_HALF_MAX = float(torch.finfo(torch.float16).max)
_HALF_TINY = 2.0**-25  # rounds to zero below


def values(adapter: Adapter) -> Iterator[Finding]:
    """NaN and infinity, what float16 cannot hold, dtypes, and factors of zeros: one pass."""
    zero = set()
    factors = {factor.key for factor in adapter.factors}
    for key, tensor in adapter.tensors.items():
        if not tensor.dtype.is_floating_point:
            if key not in factors:
                continue  # positions, in some of PEFT's tuners
            yield Finding(
                "dtype", "error", adapter.all, key, "the tensor holds no floating-point numbers",
                str(tensor.dtype), "float32, float16 or bfloat16", AGAIN,
            )  # fmt: skip
            continue
        data = tensor.load().double()
        if not bool(torch.isfinite(data).all()):
            count = int((~torch.isfinite(data)).sum())
            yield Finding(
                "finite", "error", adapter.all, key, "the tensor holds NaN or infinity",
                f"{count} of {data.numel()} values", "finite values",
                "training diverged: take an earlier checkpoint",
            )  # fmt: skip
            continue
        largest = float(data.abs().max()) if data.numel() else 0.0
        if largest == 0.0:
            zero.add(key)
        elif largest > _HALF_MAX or largest < _HALF_TINY:
            yield Finding(
                "half", "warning", adapter.all, key, "float16 cannot hold these values",
                f"up to {largest:.3g} in size", f"between {_HALF_TINY:.1g} and {_HALF_MAX:g}",
                "serve it in bfloat16 or float32, or balance A and B: `lint` with `fix`",
            )  # fmt: skip
        if tensor.dtype == torch.float64:
            yield Finding(
                "float64", "warning", adapter.all, key, "the tensor is stored in float64",
                "float64", "float32 or narrower",
                "`lint` with `fix` stores float32",
            )  # fmt: skip
    yield from _zeros(adapter, zero)


def _zeros(adapter: Adapter, zero: set[str]) -> Iterator[Finding]:
    modules = dict.fromkeys(factor.module for factor in adapter.factors)
    still = dict.fromkeys(factor.module for factor in adapter.factors if factor.key in zero)
    if modules and still == modules and not adapter.others:
        yield Finding(
            "zero", "error", adapter.all, next(iter(modules)),
            "every update is zero: the adapter does nothing",
            f"{len(modules)} modules with A or B all zeros", "an update",
            "was the adapter saved before training?",
        )  # fmt: skip
        return
    for module in still:
        yield Finding(
            "zero-module", "info", adapter.all, module, "this update is zero", "A or B all zeros",
            "an update", "`adapter` leaves it out where the engine allows",
        )  # fmt: skip


CHECKS = (values,)
