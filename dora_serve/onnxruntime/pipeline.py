"""From the last hidden states of a text to its vector, as a sentence-transformers folder says:
`modules.json` names pooling, dense layers and normalization in order. Without one it is the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters.files.json_files import read_json, read_objects

from .session import PIPELINES, EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]
    Step = Callable[[Array], Array]

_MODULES = "modules.json"


def _weighted(states: Array) -> Array:
    places = np.arange(1, len(states) + 1, dtype=np.float32)[:, None]
    weighted: Array = (states * places).sum(axis=0) / places.sum()
    return weighted


# Of the tokens of one text, `[tokens, hidden]` → `[hidden]`.
POOLING: Mapping[str, Step] = {
    "mean": lambda states: states.mean(axis=0, dtype=np.float32),
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.max(axis=0),
    "mean_sqrt_len_tokens": lambda states: states.sum(axis=0) / np.float32(np.sqrt(len(states))),
    "weightedmean": _weighted,
}
# The switches of older versions, in the order in which their vectors are put together.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS: Mapping[str, Step] = {
    "Identity": lambda x: x,
    "ReLU": lambda x: np.maximum(x, np.float32(0)),
    "Sigmoid": lambda x: np.exp(-np.logaddexp(np.float32(0), -x)),
    "Tanh": np.tanh,
}
# What goes from module to module: the states of tokens become one vector.
_STATES, _VECTOR = "token_embeddings", "sentence_embedding"
# How the model is asked here; a modality more, "message", would have texts rendered as chats.
_ASKED = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_READS: Mapping[str, tuple[object, ...]] = {
    "transformer_task": ("feature-extraction",),
    "modality_config": (_ASKED,),
    "module_output_name": (_STATES,),
    "processing_kwargs": (),
}


class Pipeline:
    """What the folder of an encoder does with its states. `normalized`: whether the vector gets
    length one at the end, which a caller may leave out. Raises `EngineError` for modules and modes
    that are not known here."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.normalized = folder, False
        for path in folder.glob(PIPELINES):
            self._check(path.name, read_json(path), _READS)
        self._steps: list[Step] = [POOLING["mean"]]
        if not (folder / _MODULES).is_file():
            return
        listed = read_objects(folder / _MODULES)
        if listed is None:
            raise self._error(_MODULES, "no list of modules")
        self._steps = []
        for number, module in enumerate(listed):
            kind = str(module.get("type")).rpartition(".")[2]
            own = folder / str(module.get("path", ""))
            if not own.resolve().is_relative_to(folder.resolve()):
                raise self._error(_MODULES, f"a path out of the folder: {module.get('path')}")
            self.normalized = False
            if kind == "Normalize":
                self._of_vectors(own)
                if number + 1 < len(listed):
                    self._steps.append(normalized)
                self.normalized = True
            elif kind == "Pooling":
                self._steps.append(self._pooling(read_json(own / "config.json")))
            elif kind == "Dense":
                self._steps.append(self._dense(own))
            elif kind != "Transformer" or number:
                raise self._error(_MODULES, kind)
        if not self._steps:
            raise self._error(_MODULES, "no Pooling")

    def __call__(self, states: Array) -> Array:
        """The vector `[n]` of the states `[tokens, hidden]`, before its length is made one."""
        for step in self._steps:
            states = step(states)
        return states

    def _pooling(self, config: Mapping[str, object]) -> Step:
        said = config.get("pooling_mode")
        if said is not None:
            modes = [str(mode) for mode in (said if isinstance(said, list) else [said])]
        else:
            modes = [mode for switch, mode in _SWITCHES.items() if config.get(switch)] or ["mean"]
        if not modes or not set(modes) <= POOLING.keys():
            raise self._error("pooling_mode", ", ".join(modes) or "none")
        return lambda states: np.concatenate([POOLING[mode](states) for mode in modes])

    def _dense(self, folder: Path) -> Step:
        from safetensors.numpy import load_file

        config = self._of_vectors(folder)
        said = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        activation = ACTIVATIONS.get(said.rpartition(".")[2])
        if activation is None or not (folder / "model.safetensors").is_file():
            raise self._error(f"{folder.name} (Dense)", said)
        tensors = load_file(folder / "model.safetensors")
        if "linear.weight" not in tensors:
            raise self._error(f"{folder.name} (Dense)", ", ".join(tensors))
        weight = tensors["linear.weight"].astype(np.float32)
        bias = tensors.get("linear.bias", np.zeros(len(weight))).astype(np.float32)
        if not config.get("use_residual"):
            return lambda vector: activation(weight @ vector + bias)
        beside = tensors.get("residual.weight", np.eye(len(weight))).astype(np.float32)
        if beside.shape != weight.shape:
            raise self._error(f"{folder.name} (Dense)", "use_residual without its weight")
        return lambda vector: activation(weight @ vector + bias) + beside @ vector

    def _of_vectors(self, folder: Path) -> Mapping[str, object]:
        """What a module's folder says, which may be nothing; it has to read and write the vector of
        a text."""
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        names = ("module_input_name", "module_output_name")
        self._check(folder.name, config, dict.fromkeys(names, (_VECTOR,)))
        return config

    def _check(
        self,
        where: str,
        said: Mapping[str, object],
        known: Mapping[str, tuple[object, ...]],
    ) -> None:
        """Raise `EngineError` where a value is none of those that are `known`, and not empty."""
        for name, values in known.items():
            if said.get(name) not in (None, {}, *values):
                raise self._error(f"{name} of {where}", str(said[name])[:100])

    def _error(self, what: str, found: str) -> EngineError:
        return EngineError(
            f"the vectors of this folder are made in a way that is not known here: {what}",
            file=self._folder / _MODULES,
            found=found,
            expected=f"Transformer, Pooling ({', '.join(POOLING)}), Dense "
            f"({', '.join(ACTIVATIONS)}, in safetensors), Normalize",
        )


def normalized(vectors: Array) -> Array:
    """The directions of `vectors [..., n]`, of length one; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    result: Array = vectors / np.maximum(lengths, np.float32(1e-12))
    return result
