"""Configurations for clusters, made from the plan of a folder: one file per target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from converters.errors import TargetError

PORT = 8000


@dataclass(frozen=True)
class Cluster:
    """Where a folder is served. `root`: the folder. `at`: where the servers see it. `least`,
    `most`: how many replicas each server may have."""

    root: Path
    at: PurePosixPath
    least: int
    most: int

    def there(self, path: Path) -> str:
        """What lies below the folder, as the servers see it. Raises `TargetError` for the rest."""
        top, own = self.root.resolve(), path.resolve()
        if own.is_relative_to(top):
            return str(self.at / own.relative_to(top).as_posix())
        if self.at == PurePosixPath(top):  # every machine sees the paths of this one
            return str(own)
        raise TargetError(
            "this does not lie in the folder that the servers see",
            file=path,
            expected=f"a path below {self.root}",
            remedy="put it, or a link's target, into the folder",
        )

    def scale(self, requests: int) -> dict[str, object]:
        """Ray Serve's options for the number of replicas. `requests`: how many at once a replica
        should have, where it may choose."""
        if self.least == self.most:
            return {"num_replicas": self.least}
        bounds = {"min_replicas": self.least, "max_replicas": self.most}
        return {"autoscaling_config": {**bounds, "target_ongoing_requests": requests}}
