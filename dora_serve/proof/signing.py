"""Signing an artifact and verifying its signature, in the format of Sigstore's model signing.

`model.sig` lies beside the files it signs: all of them, the certificate too. What `sign` writes
`python -m model_signing verify key` accepts, and the other way round. No network is touched:
only keys of the user's own are supported, not Sigstore's identities.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.certificate import SIGNATURE, is_signature
from converters.errors import DoraExportError, MissingError, OutputError
from converters.files.handles import paths_below
from converters.files.output import addition

from ..wording import quoted
from .check import check

_CURVES = "an elliptic curve key in a PEM file: prime256v1, secp384r1 or secp521r1"


class SignatureError(DoraExportError, ValueError):
    """An artifact cannot be signed, or is not what the holder of the key signed."""


def sign(artifact: str | Path, private_key: str | Path, force: bool = False) -> Path:
    """Sign every byte of `artifact`; the path of the signature, which appears whole or not at all.

    Raises `SignatureError` when the artifact is not what its certificate says, or holds links, or
    the key is unfit; `OutputError` when it is signed already, unless `force`, or something else has
    the signature's name; `TensorFileError` where a folder cannot be listed.
    """
    import model_signing as library

    folder = Path(artifact)
    target = folder / SIGNATURE
    with _key_errors(private_key, "private"):
        signer = library.signing.Config().use_elliptic_key_signer(private_key=Path(private_key))
    if os.path.lexists(target) and not is_signature(target):
        raise OutputError(
            f"{SIGNATURE} is in the place of the signature and is none of an artifact: it stays",
            file=target,
            expected="what dora-export sign or model_signing writes, or nothing",
            remedy="move it away",
        )
    if target.exists() and not force:
        raise OutputError(
            "the artifact is signed already",
            file=target,
            remedy="pass `force` to replace the signature",
        )
    for difference in check(folder).differences:
        raise SignatureError(
            "the artifact is not what its certificate says, so it is not signed",
            file=folder / difference.where,
            found=difference.found,
            expected=difference.expected,
            remedy="write the artifact anew",
        )
    files = library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    signer.set_hashing_config(files)
    try:
        with addition(folder) as fresh:
            signer.sign(folder.resolve(), fresh / SIGNATURE)
            with (fresh / SIGNATURE).open("rb") as stream:
                os.fsync(stream.fileno())
            (fresh / SIGNATURE).replace(target)
    except ValueError as error:  # a link, or something that is neither file nor folder
        raise SignatureError(
            "what is in the folder cannot be signed",
            file=folder,
            found=error,
            expected="files and folders, no links",
        ) from None
    except OSError as error:
        if isinstance(error, DoraExportError):
            raise
        file = error.filename or folder
        raise OutputError(f"signing failed: {error.strerror}", file=file) from None
    return target


def verify_signature(artifact: str | Path, public_key: str | Path) -> list[str]:
    """What the signature leaves out, when the holder of the private key signed every other file of
    `artifact` as it is now. `sign` leaves nothing out; model_signing does what belongs to git.

    Raises `MissingError` where there is no signature, `SignatureError` where it is of another key
    or damaged, or a file was changed, added or removed, `TensorFileError` where a folder cannot be
    listed: the library takes it for an empty one.
    """
    import model_signing as library

    folder = Path(artifact)
    path = folder / SIGNATURE
    with _key_errors(public_key, "public"):
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    if not path.is_file():
        raise MissingError(
            "the artifact is not signed",
            file=path,
            expected="the signature that dora-export sign or model_signing writes",
            remedy="ask its maker for one; without --public-key, check finds damage only",
        )

    class Files(library.hashing.Config):  # type: ignore[misc]
        """The library hashes the files only when the signature itself has proved to be right."""

        reached = False
        digests: Mapping[str, str] | None = None

        def hash(self, *args: Any, **options: Any) -> Any:
            self.reached = True
            manifest = super().hash(*args, **options)
            self.digests = {
                each.identifier: each.digest.digest_hex for each in manifest.resource_descriptors()
            }
            return manifest

    files = Files().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints warnings
            verifier.set_hashing_config(files).verify(folder.resolve(), path)
    except Exception as error:  # of any type, where a stranger wrote the signature
        if files.digests is not None:
            raise _changed(folder, files.digests) from error
        if files.reached:
            raise SignatureError(
                "the artifact is not what was signed: a file cannot be read, or is a link",
                file=folder,
                found=error,
                expected="files and folders, no links",
            ) from error
        raise SignatureError(
            "the signature is not of this key, or is damaged",
            file=path,
            found=str(error).strip() or type(error).__name__,
            expected=f"a signature by the private key that belongs to {public_key}",
            remedy="pass the signer's public key; if this is it, do not use the artifact",
        ) from error
    present = {
        name.as_posix()
        for each in paths_below(folder)
        if (each.is_symlink() or not each.is_dir()) and (name := each.relative_to(folder))
    }
    return sorted(present - {SIGNATURE, *(files.digests or ())})


def _changed(folder: Path, found: Mapping[str, str]) -> SignatureError:
    """What differs from a signature that is right: the first file, and how many others."""
    envelope = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))["dsseEnvelope"]
    predicate = json.loads(base64.b64decode(envelope["payload"])).get("predicate", {})
    signed = {each["name"]: each["digest"] for each in predicate.get("resources", ())}
    changed = sorted(
        name for name in found.keys() | signed.keys() if found.get(name) != signed.get(name)
    )
    name, others = changed[0], len(changed) - 1
    return SignatureError(
        "the artifact is not what was signed" + (f", here and in {others} more" if others else ""),
        file=folder / name,
        found=f"sha256 {found[name]}" if name in found else "no file",
        expected=f"sha256 {signed[name]}" if name in signed else "no file of this name",
        remedy="fetch the artifact anew; if you changed it yourself, sign it again",
    )


@contextlib.contextmanager
def _key_errors(path: str | Path, kind: str) -> Iterator[None]:
    try:
        if stat.S_ISCHR(Path(path).stat().st_mode):
            raise ValueError("a device, which may have no end")
        yield
    except OSError as error:
        raise MissingError(
            f"the {kind} key cannot be read", file=path, found=error.strerror, expected=_CURVES
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise SignatureError(
            f"this is no {kind} key that can be used here",
            file=path,
            # A key that is not of an elliptic curve lacks the attribute `curve`.
            found="another type of key" if isinstance(error, AttributeError) else error,
            expected=_CURVES,
            remedy=f"with a passphrase: --private-key <(openssl pkey -in {quoted(path)})"
            if isinstance(error, TypeError)
            else None,
        ) from None
