"""What is left as torch's first trace made it is what the exporter makes of it by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from torch.export import Dim, ExportedProgram

from converters.targets.onnx import decomposition
from converters.targets.onnx.decomposition import onnx_program


class Module(torch.nn.Module):
    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)


def plain(x: torch.Tensor) -> torch.Tensor:
    """With all that is put in an operator's place."""
    positive, large = x > 0, x.abs() > 1
    scale = torch.tensor(2.0)
    whole = x.to(torch.int64).to("cpu", torch.float64).to(x)
    chosen = torch.where((positive & large) | ~positive, x * scale, whole)
    return torch.min(torch.max(chosen, x), x.to(device="cpu") + 1).to(x)


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0].add_(1)
    return y.mul_(x)


def added(x: torch.Tensor) -> torch.Tensor:
    """As T5, to a sum that nobody else reads."""
    near = (x * 3).to(torch.int64) + 1
    near += torch.where(x > 0, 2, 5)
    return near * x


def added_to_what_is_read(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    z = y * 2
    y += x
    return y - z


def promoted(x: torch.Tensor) -> torch.Tensor:
    whole = x.to(torch.int64)
    return whole * 0.5 + torch.exp(whole) * (whole > 0.5) + (whole.to(torch.int32) < whole + 1) * x


def viewed(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(0, 1).swapaxes(0, 1).ravel().view_as(x)


def exported(by: Any, compute: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """The graph that `by` makes, and how often torch decomposed it."""
    times = 0
    decompose: Any = ExportedProgram.run_decompositions

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal times
        times += 1
        return decompose(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ExportedProgram, "run_decompositions", counted)
        program = by(
            Module(compute),
            kwargs={"x": torch.randn(3, 4)},
            dynamic_shapes={"x": {0: Dim("rows")}},
            dynamo=True,
            verbose=False,
        )
    return program, times


def check(compute: Any, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found, times = exported(onnx_program, compute, monkeypatch)
    assert times == expected
    truth, _ = exported(lambda module, **more: torch.onnx.export(module, (), **more), compute,
                        monkeypatch)  # fmt: skip
    assert [n.op_type for n in found.model.graph] == [n.op_type for n in truth.model.graph]
    session = onnxruntime.InferenceSession(found.model_proto.SerializeToString())
    for rows in (1, 3, 5):
        x = torch.randn(rows, 4) * 2
        (value,) = session.run(None, {"x": x.numpy()})
        assert torch.allclose(torch.from_numpy(value), compute(x.clone()), atol=1e-6)


@pytest.mark.parametrize(
    ("compute", "times"),
    [
        pytest.param(plain, 0, marks=pytest.mark.further),
        *((in_place, 1), (viewed, 1), (promoted, 0), (added, 0), (added_to_what_is_read, 1)),
    ],
)
def test_it_is_what_the_exporter_makes(
    compute: Any, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(compute, times, monkeypatch)


def test_what_the_exporter_does_not_take_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an operator of another torch, of which nobody knows here."""
    monkeypatch.setattr(decomposition, "_CASTS", set())
    check(plain, 1, monkeypatch)
