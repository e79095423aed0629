"""The certificates of every target follow docs/reference/certificate.schema.json, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from converters.certificate import FILE
from dora_serve import export, merge, write_adapter
from tests.conftest import MODELS, quick

SCHEMA = Path(__file__).parents[2] / "docs" / "reference" / "certificate.schema.json"
RUN = next(MODELS.glob("runs/*/*/*/Count_Down/*/checkpoint")).parent
BASE = MODELS / "tiny-llama-base"
ARTIFACTS: dict[str, Callable[[Path], object]] = {
    "merged": lambda out: merge(RUN, out, base=BASE, dtype="bf16"),
    "fitted": lambda out: write_adapter(RUN, out, base=BASE, max_rank=2),
    "fitted to a budget": lambda out: write_adapter(RUN, out, base=BASE, budget=9000),
    "without a base": lambda out: write_adapter(RUN, out),
    **{
        target: lambda out, target=target: export(RUN, out, target, base=BASE)  # type: ignore[misc]
        for target in ("peft", "vllm", "sglang", "lorax", "gguf")
    },
}


def faults(certificate: object) -> list[str]:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    return [
        f"{error.json_path}: {inner.json_path}: {inner.message}"
        for error in Draft202012Validator(schema).iter_errors(certificate)
        for inner in error.context or [error]
    ]


@pytest.mark.parametrize(
    "kind",
    quick(
        [*ARTIFACTS, "merged_onnx", "adapters_onnx"],
        *("merged", "fitted to a budget", "without a base", "vllm", "gguf", "adapters_onnx"),
    ),
)
def test_certificates_follow_the_schema(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind in ARTIFACTS:
        ARTIFACTS[kind](out := tmp_path / "out")
    else:
        out = request.getfixturevalue(kind)
    certificate: dict[str, Any] = json.loads((out / FILE).read_text())
    assert faults(certificate) == []
    for key in certificate:
        if key not in ("dtype", "replaced", "precision", "accuracy", "fit"):
            assert faults({name: part for name, part in certificate.items() if name != key}), key
    assert faults({**certificate, "more": 1})
    name, record = next(iter(certificate["files"].items()))
    broken = {**record, "sha256": record["sha256"][:-1]}
    assert faults({**certificate, "files": {name: broken}})
