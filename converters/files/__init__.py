"""Bytes of this machine: tensor files, JSON, pickles never run, outputs that appear whole."""
