"""Pictures of the rank of every module."""
