"""Writers: one file per deployment format."""

from . import adapter, merged

__all__ = ["adapter", "merged"]
