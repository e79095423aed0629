"""Targets: one file or folder per deployment format, mirrors of the readers."""
