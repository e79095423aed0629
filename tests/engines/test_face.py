"""The engines' public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import dora_serve.onnxruntime as face


def test_every_name_is_there() -> None:
    for name in face.__all__:
        assert getattr(face, name).__name__ == name
    assert len(face.__all__) == 6
    assert not hasattr(face, "Runner")


def test_only_what_is_used_is_imported() -> None:
    code = (
        "import sys, dora_serve.onnxruntime as face;"
        "assert not {'numpy', 'onnxruntime', 'torch'} & set(sys.modules);"
        "face.Decoder, face.Encoder, face.Seq2Seq;"
        "assert 'numpy' in sys.modules and not {'onnxruntime', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
