"""The packages that a plain installation leaves out."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from converters.errors import MissingError

# Package → the extra that brings it.
EXTRAS = {
    "OpenSSL": "sign",
    "fastapi": "serve",
    "fsspec": "remote",
    "gguf": "gguf",
    "jinja2": "serve",
    "llguidance": "serve",
    "matplotlib": "plot",
    "model_signing": "sign",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime_genai": "onnx",
    "onnxscript": "onnx",
    "peft": "peft",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "ray": "ray",
    "s3fs": "remote",
    "starlette": "serve",
    "uvicorn": "serve",
    "vllm": "vllm",
}


def without_extra(error: Exception) -> MissingError | None:
    """What to say of an optional package that is not installed; None of another error.

    pip takes the extras of what is installed, wherever that came from; the quotes are for zsh.
    """
    package = str(getattr(error, "name", None)).partition(".")[0]
    known = isinstance(error, ModuleNotFoundError) and package in EXTRAS
    return _missing(package) if known else None


def require(*extras: str) -> None:
    """Raise `MissingError` for the first package of `extras`, in this order, that is not here."""
    for wanted in extras:
        for package, extra in EXTRAS.items():
            if extra == wanted and find_spec(package) is None:
                raise _missing(package)


def _missing(package: str) -> MissingError:
    return MissingError(
        f"this needs the package {package}, which is not installed",
        remedy=f"pip install 'dora-serve[{EXTRAS[package]}]'",
    )


def quiet() -> None:
    """Let bitsandbytes not warn of a faster kernel that nothing here would use, whenever PEFT is
    imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
