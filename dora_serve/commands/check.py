"""`dora-export check ARTIFACT`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from converters.errors import visible

from . import common


@click.command("check")
@click.argument("artifact", type=common.INPUT)
@common.base_option
@click.option(
    "--record",
    "recording",
    is_flag=True,
    help="If nothing differs, put the hash of every byte into the certificate.",
)
@click.option(
    "--public-key",
    type=common.FOLDER,
    metavar="FILE",
    help="Also verify model.sig with this key: as `sign` or model_signing wrote it.",
)
@common.json_option
@common.reports_errors
def command(
    artifact: Path, base: str | None, recording: bool, public_key: Path | None, as_json: bool
) -> None:
    """Compare the files of ARTIFACT with its certificate: names, sizes, hashes.

    With --base also the base with the one it was made from, with --public-key also every byte of
    every file with its signature. Exit code 1 when anything differs.
    """
    from dora_serve.proof.check import check, record
    from dora_serve.remote.local import needs_local

    if recording:
        needs_local(artifact, "--record")
    unsigned: list[str] = []
    if public_key is not None:
        from dora_serve.proof.signing import verify_signature

        unsigned = verify_signature(artifact, public_key)
    result = check(artifact, base)
    if recording and result.passed:
        record(artifact)
        result = check(artifact, base)
    if as_json:
        common.print_json(
            {
                **asdict(result),
                "signed": public_key is not None,
                "not_signed": unsigned,
                "passed": result.passed,
            }
        )
    else:
        for difference in result.differences:
            where, found = visible(difference.where), visible(difference.found)
            click.echo(f"{where}: {found}; expected {visible(difference.expected)}")
        pieces = 0 if public_key is not None else result.files - result.whole
        click.echo(
            f"{visible(artifact)}: {visible(result.target)}, {result.files} files"
            + (f", {pieces} of them compared in pieces (--record for every byte)" if pieces else "")
            + ("" if result.weights is None else f", {result.weights} base weights")
            + ("" if public_key is None else ", signed with this key")
            + (": unchanged" if result.passed else f": CHANGED in {len(result.differences)} places")
        )
    common.warn(tuple(f"the signature leaves out {name}" for name in unsigned))
    sys.exit(0 if result.passed else 1)
