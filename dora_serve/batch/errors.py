"""What can be wrong with a batch as a whole; what is wrong with one run is in its record."""

from __future__ import annotations

from converters.errors import DoraExportError


class ManifestError(DoraExportError, ValueError):
    """The manifest is not one, or names its runs so that their outputs cannot be told apart."""


class ClusterError(DoraExportError, ConnectionError):
    """No Ray cluster could be reached."""
