"""Which modules a configuration of PEFT names (huggingface/peft, `check_target_module_exists` in
`src/peft/tuners/tuners_utils.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from .patterns import Patterns

_ALL_LINEAR = "all-linear"


class Named:
    """`target_modules`, `target_parameters`, `exclude_modules` and the layers of a configuration.

    Its methods raise `PatternError` for an expression that is none, or takes too long.
    """

    def __init__(self, config: Mapping[str, object]) -> None:
        self._targets, self._excluded = config.get("target_modules"), config.get("exclude_modules")
        self._parameters = _list(config.get("target_parameters"))
        self._pattern = _list(config.get("layers_pattern"))
        self._patterns = Patterns()
        self.layers = [n for n in _list(config.get("layers_to_transform")) if type(n) is int]

    @property
    def known(self) -> bool:
        """Whether the configuration says which modules there are."""
        kind = isinstance(self._targets, str | list) and bool(self._targets)
        return kind and str(self._targets).lower() != _ALL_LINEAR

    def names(self, module: str, *, parameters: bool = True) -> bool:
        """Whether PEFT adapts `module`; with `parameters`, or a parameter in it."""
        if parameters and any(_below(str(name), module) for name in self._parameters):
            return True  # PEFT asks for exclusions of layers alone
        if self._meant(self._excluded, module):
            return False
        if not self._meant(self._targets, module):
            return False
        exact = isinstance(self._targets, list) and module in self._targets
        return exact or not self.layers or self._layer(module) in self.layers

    def key(self, key: str, module: str) -> bool:
        """Whether `key` of rank_pattern or alpha_pattern means `module`."""
        return self._patterns.suffix(key, module)

    def _meant(self, said: object, module: str) -> bool:
        if isinstance(said, str):
            return bool(said) and self._patterns.whole(said, module)
        return any(f".{module}".endswith(f".{name}") for name in _list(said))

    def _layer(self, module: str) -> int | None:
        """The first number behind a name that one of the patterns means; behind any where there is
        none. What lies deeper is numbered too: experts, the parts of T5's blocks."""
        before = [rf"(?:^|.*?\.){name}" for name in self._pattern] or [r".*?\.[^.]*"]
        found = (self._patterns.number(one, module) for one in before)
        return next((number for number in found if number is not None), None)


def _below(parameter: str, module: str) -> bool:
    """Whether `module` may hold the parameter, which is said by the end of its name."""
    parent = parameter.rpartition(".")[0]
    return not parent or f".{module}".endswith(f".{parent}")


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]
