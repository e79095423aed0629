"""`dora-export merge RUN OUT`."""

from __future__ import annotations

import click

from .by_target import writes

_HELP = """Merge RUN into its base model and write the Hugging Face folder OUT.

OUT has the base's shards, dtype, configuration and tokenizer, loads with AutoModel…from_pretrained,
and appears whole or not at all. With --resume, the finished shards of a merge that was killed stay
in a hidden folder beside OUT; the same command again checks them by hash, makes the others, and OUT
is as if nothing had happened."""

_resume = click.Option(
    ["--resume"],
    is_flag=True,
    help="Continue a merge that was killed; if this one is, keep what it finished.",
)
command = writes("merge", _HELP, target="merged", options=[_resume])
