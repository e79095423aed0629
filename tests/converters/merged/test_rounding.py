"""What rounding took of an update, as the certificate says it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters.targets.merged.stream import Rounding
from converters.updates.rank_one import RankOneSum
from dora_serve import merge
from tests.converters.made import (
    WEIGHTS,
    K,
    Q,
    certificate,
    low_rank,
    make_base,
    make_run,
    moved,
)


def test_rounding_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30).bfloat16()
    base = make_base(tmp_path / "base", {f"{Q}.weight": weight, f"{K}.weight": torch.zeros(4, 4)})
    update = low_rank(40, 30, size=3e-3)
    run = make_run(
        tmp_path / "run", {Q: update, K: low_rank(4, 4)}, start_rank={Q: 8}, warnings=("told",)
    )
    result = merge(run, tmp_path / "out", base=base)
    delta = moved(weight * 0, update)
    found = load_file(tmp_path / "out" / WEIGHTS)[f"{Q}.weight"]
    stored = found.double().numpy() - weight.double().numpy()
    size = np.linalg.norm(delta)
    expected = {
        "cosine": (stored * delta).sum() / np.linalg.norm(stored) / size,
        "norm_ratio": np.linalg.norm(stored) / size,
        "lost": np.linalg.norm(stored - delta) / size,
    }
    modules = certificate(tmp_path / "out")["modules"]
    said = modules[Q]
    assert said["rounding"] == {
        key: pytest.approx(value, rel=1e-3) for key, value in expected.items()
    }
    relative = size / np.linalg.norm(weight.double().numpy())
    assert said["relative_update"] == pytest.approx(relative, rel=1e-3)
    assert (said["start_rank"], said["rank"]) == (8, 2)
    assert modules[K]["relative_update"] is None
    assert modules[K]["start_rank"] is None
    assert modules[K]["rounding"]["lost"] < 1e-6
    lost = said["rounding"]["lost"]
    assert 0.05 < lost < 1
    assert result.warnings[0] == "told"
    assert "1 of 2 modules" in result.warnings[-1] and f"worst: {Q}" in result.warnings[-1]
    assert f"{lost:.0%}" in result.warnings[-1]
    losses = {module: said["rounding"]["lost"] for module, said in modules.items()}
    assert result.report.summary() == {"lost_to_rounding": losses, "resumed": []}
    said = f"rounding changed a module's update by at most {lost:.2%}"
    assert result.report.lines() == [said]


def test_what_rounding_says_at_its_ends() -> None:
    nothing = Rounding()
    assert (nothing.cosine, nothing.norm_ratio, nothing.lost) == (1.0, 1.0, 0.0)
    assert nothing.relative_update is None
    assert Rounding(4.0, 1.0, 0.0, 0.0).cosine == 0.0
    assert Rounding(4.0, 1.0, 0.0, 0.0).lost == 1.0
    assert Rounding(4.0, 1.0, 4.0, -2.0).cosine == -1.0
    assert Rounding(4.0, 1.0, 4.0, -2.0).lost == 3.0
    assert Rounding(4.0, 1.0, 4.0, 2.0).norm_ratio == 2.0
    assert Rounding(4.0, 1.0, 1.0, 1.0).relative_update == 0.5
    one = Rounding()
    for _ in range(2):
        one.add(torch.tensor([1.0, 2]), torch.tensor([3.0, 0]), torch.tensor([1.0, 1]))
    assert one == Rounding(10.0, 18.0, 4.0, 6.0)


def test_only_losses_over_five_percent_are_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.randn(8, 8)})
    result = merge(make_run(tmp_path / "run", {Q: low_rank(8, 8)}), tmp_path / "out", base=base)
    assert not any("5 %" in said for said in result.warnings)
    assert certificate(tmp_path / "out")["modules"][Q]["rounding"]["lost"] < 1e-5


def test_rounding_is_measured_in_every_eighth_block(tmp_path: Path) -> None:
    """A block is 64 rows of 8192: of ten the first and the ninth are measured."""
    weight, rows = torch.ones(577, 8192), torch.zeros(577, 1)
    rows[512:576] = 1
    base = make_base(tmp_path / "base", {f"{Q}.weight": weight})
    update = RankOneSum(torch.ones(1, 8192), torch.ones(1), rows)
    merge(make_run(tmp_path / "run", {Q: update}), tmp_path / "out", base=base)
    said = certificate(tmp_path / "out")["modules"][Q]
    assert said["relative_update"] == pytest.approx(0.5**0.5, rel=1e-6)
