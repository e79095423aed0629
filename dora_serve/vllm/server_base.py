"""The base that a server has in its memory, whatever lies in its place by now."""

from __future__ import annotations

from pathlib import Path

from converters.errors import BaseError, TargetError
from converters.files.handles import state_at
from converters.model.base import BaseModel, open_base

from ..folder.inventory import Member
from ..folder.names import own_name
from .states import State, state_below


class ServerBase:
    """`base` as it was when the server read it."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._files = [base.path / "config.json", *base.shards]
        self._before = self._now()
        self._identity: str | None = None

    def elsewhere(self) -> dict[Path, State]:
        """The states of its files, by which it is known again."""
        return {file: state_below(file) for file in self._files}

    def check(self, member: Member) -> None:
        """Raise `DoraExportError` where the run is of another base, or another one lies in the
        place of this one: a run of that would be computed with the weights that the server has."""
        if member.base.path != self.base.path:
            raise TargetError(
                f"the run {member.name} is of another base than the server's",
                found=member.run.base,
                expected=own_name(self.base.path),
            )
        now = self._now()
        if now == self._before:
            self._identity = self.base.identity
        elif self._is_another():
            raise BaseError(
                "the base is no longer the one that is served",
                file=self.base.path,
                remedy="start the server anew",
            )
        self._before = now

    def _is_another(self) -> bool:
        return self._identity is None or open_base(self.base.path).identity != self._identity

    def _now(self) -> list[object]:
        return [state_at(file) for file in self._files]
