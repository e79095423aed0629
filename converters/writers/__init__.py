"""Writers: one file per deployment format."""
