"""The algebra of updates: what a training method adds to one weight matrix.

Most methods add a sum of rank-1 components, ΔW = Σᵢ cᵢ·bᵢaᵢᵀ (Mao et al. 2024, arXiv 2405.17357,
equation 4), a form that can be stripped, sorted and repacked without loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import TargetError


@dataclass(frozen=True)
class RankOneSum:
    """ΔW = Σᵢ c[i] · b[:, i] ⊗ a[i], every scaling already inside `c`.

    `a [r, in]`, `c [r]`, `b [out, r]`, all float32. Rank 0 is normal.
    """

    a: torch.Tensor
    c: torch.Tensor
    b: torch.Tensor

    def __post_init__(self) -> None:
        rank = self.c.shape[0]
        if self.a.shape[0] != rank or self.b.shape[1] != rank:
            raise ValueError(
                f"ranks differ: a {list(self.a.shape)}, c {list(self.c.shape)}, "
                f"b {list(self.b.shape)}"
            )

    @property
    def rank(self) -> int:
        return self.c.shape[0]

    @property
    def whole(self) -> bool:
        return False

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def components(self) -> RankOneSum:
        return self

    def transposed(self) -> RankOneSum:
        """The same update for a weight stored as `[in, out]`."""
        return RankOneSum(self.b.T.contiguous(), self.c, self.a.T.contiguous())

    def norms(self) -> torch.Tensor:
        """|cᵢ|·‖aᵢ‖·‖bᵢ‖, the Frobenius norm of each component, `[r]`, float64."""
        norms: torch.Tensor = self.c.abs().double() * self._a_norms() * self._b_norms()
        return norms

    # In float64: squares leave the range of float32 long before the values do.
    def _a_norms(self) -> torch.Tensor:
        norms: torch.Tensor = self.a.double().norm(dim=1)
        return norms

    def _b_norms(self) -> torch.Tensor:
        norms: torch.Tensor = self.b.double().norm(dim=0)
        return norms

    def norm(self) -> float:
        """‖ΔW‖ in the Frobenius norm, from the Gram matrices `[r, r]`, never from `[out, in]`."""
        a, b = self.a.double(), self.b.double() * self.c.double()
        return float((a @ a.T).mul_(b.T @ b).sum().clamp_(min=0).sqrt())

    def dense(self) -> torch.Tensor:
        """ΔW as a matrix `[out, in]`, float32."""
        return (self.b * self.c) @ self.a

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        if self.rank:
            rows.addmm_(self.b[start : start + rows.shape[0]] * self.c, self.a)
        return rows

    def _take(self, index: torch.Tensor) -> RankOneSum:
        return RankOneSum(self.a[index], self.c[index], self.b[:, index])

    def strip(self) -> RankOneSum:
        """Without the components that are exactly zero: cᵢ = 0, aᵢ = 0 or bᵢ = 0."""
        alive = (self.c != 0) & self.a.any(dim=1) & self.b.any(dim=0)
        return self if bool(alive.all()) else self._take(alive)

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(factor).all()) for factor in (self.a, self.b, self.c))

    def check_range(self, tensor: str | None = None) -> None:
        """Raise `TargetError` where ‖ΔW‖, or that of a component, is beyond float32: no engine
        computes with it what was trained."""
        norm = max(self.norm(), float(self.norms().max())) if self.rank else 0.0
        if not norm <= torch.finfo(torch.float32).max:
            raise TargetError(
                "an update is beyond the range of float32",
                tensor=tensor,
                found=f"‖ΔW‖ = {norm:.3g}",
                remedy="the run diverged, or its file is damaged: use an earlier checkpoint",
            )

    def reduced(self) -> RankOneSum:
        """The same ΔW of as few components as it has rank; itself, bit for bit, where the
        components are linearly independent.

        What is left out is of the size of float64 rounding, far below that of the float32 factors.
        """
        if _independent(self.a) and _independent(self.b.T):
            return self
        u, s, vh = self.svd()
        size = float(self.norms().sum())
        rank = int((s > max(self.shape) * torch.finfo(s.dtype).eps * size).sum())
        return self if rank == self.rank else cut(u, s, vh, rank)

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(u [out, k], s [k], vh [k, in])` with ΔW = u·diag(s)·vh, float64, the largest first.

        By QR of both factors and the SVD of the small core between them, never of `[out, in]`.
        """
        b, core_b = torch.linalg.qr(self.b.double() * self.c.double())
        a, core_a = torch.linalg.qr(self.a.double().T)
        u, s, vh = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
        return b @ u, s, vh @ a.T

    def fit(
        self, *, max_rank: int | None = None, energy: float | None = None
    ) -> tuple[RankOneSum, float]:
        """The nearest sum of at most `max_rank` components, or of as few as keep the share
        `energy` of the squared singular values; and its error ‖fitted − ΔW‖/‖ΔW‖.

        No sum of that rank is nearer in the Frobenius norm (Eckart and Young 1936). Where nothing
        has to go, the sum itself and 0.
        """
        u, s, vh = self.svd()
        rank = rank_for(s, max_rank, energy)
        return (self, 0.0) if rank >= self.rank else (cut(u, s, vh, rank), tail(s, rank))

    def sorted(self) -> RankOneSum:
        """The largest component first; equal ones keep their order."""
        return self._take(self.norms().argsort(descending=True, stable=True))

    def balanced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(A [r, in], B [out, r])` with ΔW = B·A and ‖Aᵢ‖ = ‖Bᵢ‖, float32.

        Equal norms keep both factors within the range of float16. Needs a stripped sum. Raises
        `TargetError` for a ΔW beyond float32.
        """
        self.check_range()
        a_norm, b_norm = self._a_norms(), self._b_norms()
        size = (self.c.abs().double() * a_norm * b_norm).sqrt()
        a = self.a * (size / a_norm).unsqueeze(1)
        b = self.b * (self.c.sign() * size / b_norm)
        return a.float(), b.float()


def _independent(vectors: torch.Tensor) -> bool:
    """Whether the rows are certainly linearly independent, whatever their lengths; `[r, n]`.

    False may also mean nearly dependent. By the Gram matrix `[r, r]`, which costs little.
    """
    rows = torch.nn.functional.normalize(vectors.double(), dim=1, eps=1e-300)
    return bool((torch.linalg.eigvalsh(rows @ rows.T) > 1e-8).all())


def rank_for(s: torch.Tensor, max_rank: int | None, energy: float | None) -> int:
    """How many of the singular values `s`, the largest first, the one given limit keeps."""
    if (max_rank is None) == (energy is None):
        raise ValueError("give either max_rank or energy")
    if energy is None:
        return min(int(max_rank or 0), int((s > 0).sum()))
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share, over 0 and up to 1: {energy}")
    # Summed from the smallest on, so that a share near 1 is told from 1.
    left = s.square().flip(0).cumsum(0).flip(0)
    return int((left > (1 - energy) * left[:1]).sum())


def tail(s: torch.Tensor, rank: int) -> float:
    """The relative error of keeping the first `rank` of the singular values `s`."""
    total = float(s.norm())
    return float(s[rank:].norm()) / total if total else 0.0


def cut(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> RankOneSum:
    """The first `rank` terms of a singular value decomposition, in float32. Raises `TargetError`
    for those beyond it."""
    result = RankOneSum(
        vh[:rank].float().contiguous(), s[:rank].float(), u[:, :rank].float().contiguous()
    )
    result.check_range()
    return result


def stored_error(update: RankOneSum, a: torch.Tensor, b: torch.Tensor) -> float:
    """‖stored ΔW − ΔW‖/‖ΔW‖ by the norm of the rank-2r difference, never of `[out, in]`.

    Raises `TargetError` where the stored factors overflowed their dtype.
    """
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise TargetError(
            "an update is beyond the range of the adapter's dtype",
            found=f"‖ΔW‖ = {update.norm():.3g}",
            expected=f"within {a.dtype}",
            remedy="use `dtype` float32",
        )
    difference = RankOneSum(
        torch.cat([a.float(), update.a]),
        torch.cat([torch.ones(len(a)), -update.c]),
        torch.cat([b.float(), update.b], dim=1),
    )
    norm = update.norm()
    return difference.norm() / norm if norm else 0.0
