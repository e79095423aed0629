"""`dora-export sign ARTIFACT`."""

from __future__ import annotations

from pathlib import Path

import click

from converters.errors import visible

from ..progress import timed
from . import common


@click.command("sign")
@click.argument("artifact", type=common.INPUT)
@click.option(
    "--private-key",
    type=common.FOLDER,
    required=True,
    metavar="FILE",
    help="Elliptic curve key, PEM, as of `openssl ecparam -name prime256v1 -genkey -noout`.",
)
@common.force_option
@common.json_option
@common.reports_errors
def command(artifact: Path, private_key: Path, force: bool, as_json: bool) -> None:
    """Sign all files of ARTIFACT: model.sig beside them, in the format of Sigstore's model signing.

    `dora-export check ARTIFACT --public-key FILE` verifies it, and so does `python -m model_signing
    verify key ARTIFACT --signature ARTIFACT/model.sig --public_key FILE`.
    """
    from converters.files.handles import paths_below
    from dora_serve.proof.signing import sign
    from dora_serve.remote.local import needs_local

    needs_local(artifact, "sign")
    nbytes = sum(file.stat().st_size for file in paths_below(artifact) if file.is_file())
    with timed("sign", "signing", nbytes):
        signature = sign(artifact, private_key, force)
    if as_json:
        common.print_json({"signature": str(signature)})
    else:
        click.echo(f"{visible(signature)}: signed")
