"""Models in ONNX Runtime: one process, no GPU, no torch, another adapter in every row of a batch.

    >>> from dora_serve.onnxruntime import Decoder, Encoder, Sampling, Search, Seq2Seq, Transcriber
    >>> decoder = Decoder("onnx/")     # a folder that `dora-export onnx` wrote
    >>> for done in decoder.generate(["count : nine"] * 2, [None, "count-down"]):
    ...     print(done.text)
    >>> Encoder("onnx/").classify(["a good film"], "sentiment")[0].label
    >>> Seq2Seq("onnx/").generate(["a long text"], Search(max_tokens=60, beams=4), "news")[0].text
    >>> Transcriber("onnx/").transcribe([wave], language="en")[0].text  # float samples, 16 kHz

Nothing is imported until one of these names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .beams import Search
    from .decoder import Decoder
    from .encoder import Encoder
    from .sampling import Sampling
    from .seq2seq import Seq2Seq
    from .transcriber import Transcriber

__all__ = ["Decoder", "Encoder", "Sampling", "Search", "Seq2Seq", "Transcriber"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = "beams" if name == "Search" else name.lower()
    return getattr(import_module(f".{home}", __name__), name)
