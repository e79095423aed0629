"""`dora-export sign` and `check --public-key`: who made an artifact, as Sigstore's tool sees it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from converters.certificate import FILE, SIGNATURE, file_record
from converters.errors import MissingError, OutputError
from dora_serve import merge
from dora_serve.commands import dora_export
from dora_serve.proof.check import check, record
from dora_serve.proof.signing import SignatureError, sign, verify_signature
from tests.dora_serve.test_no_network import Watched

WEIGHTS = "model.safetensors"


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs NAME and NAME.pub: `ours`, `other`, and some that are unfit."""
    folder = tmp_path_factory.mktemp("keys")
    curves = {"ours": "prime256v1", "other": "prime256v1", "p521": "secp521r1", "k1": "secp256k1"}
    for name, curve in curves.items():
        openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", folder / name)
        openssl("ec", "-in", folder / name, "-pubout", "-out", folder / f"{name}.pub")
    openssl("genrsa", "-out", folder / "rsa", "2048")
    openssl("rsa", "-in", folder / "rsa", "-pubout", "-out", folder / "rsa.pub")
    openssl(
        "ec", "-in", folder / "ours", "-aes256", "-passout", "pass:x", "-out", folder / "locked"
    )
    return folder


@pytest.fixture(scope="session")
def made(llama_lora: Path, llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "merged"
    merge(llama_lora, folder, base=llama_base)
    return folder


@pytest.fixture
def merged(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "merged"))


@pytest.fixture
def signed(merged: Path, keys: Path) -> Path:
    sign(merged, keys / "ours")
    return merged


def model_signing(verb: str, folder: Path, option: str, key: Path) -> int:
    """The tool's own command line."""
    command = [sys.executable, "-m", "model_signing", verb, "key", str(folder)]
    return subprocess.run(
        [*command, "--signature", str(folder / SIGNATURE), option, str(key)], capture_output=True
    ).returncode


def run(*words: object) -> Any:
    return CliRunner().invoke(dora_export, [str(word) for word in words])


@pytest.mark.parametrize("name", ["ours", pytest.param("p521", marks=pytest.mark.further)])
def test_the_tool_verifies_what_we_sign(name: str, merged: Path, keys: Path) -> None:
    assert sign(merged, keys / name) == merged / SIGNATURE
    assert model_signing("verify", merged, "--public_key", keys / f"{name}.pub") == 0
    assert model_signing("verify", merged, "--public_key", keys / "other.pub") == 1
    (merged / "config.json").write_text("{}")
    assert model_signing("verify", merged, "--public_key", keys / f"{name}.pub") == 1


def test_we_verify_what_the_tool_signs(merged: Path, keys: Path) -> None:
    assert model_signing("sign", merged, "--private_key", keys / "ours") == 0
    verify_signature(merged, keys / "ours.pub")
    with pytest.raises(SignatureError, match="not of this key"):
        verify_signature(merged, keys / "other.pub")


def test_a_signature_is_no_file_of_the_artifact(signed: Path) -> None:
    result = check(signed)
    assert result.passed
    assert SIGNATURE not in json.loads((signed / FILE).read_text())["files"]
    names = [path.name for path in signed.iterdir()]
    assert not [name for name in names if name.startswith(".")]


def rewritten(folder: Path) -> None:
    """As somebody would who also makes the certificate fit, so that `check` alone finds nothing."""
    (folder / "config.json").write_text("{}")
    proof = json.loads((folder / FILE).read_text())
    proof["files"]["config.json"] = file_record(folder / "config.json")
    (folder / FILE).write_text(json.dumps(proof))


def linked(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / WEIGHTS)
    (folder / WEIGHTS).symlink_to(folder.parent / WEIGHTS)


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (rewritten, r"config\.json\n  found: sha256 \w{64}\n  expected: sha256 \w{64}\n  to do"),
    (rewritten, "here and in 1 more"),
    (lambda folder: (folder / WEIGHTS).unlink(), rf"{WEIGHTS}\n  found: no file"),
    (lambda folder: (folder / "a.py").touch(), r"a\.py\n.*\n  expected: no file of this name"),
    (lambda folder: (folder / ".hidden").touch(), r"\.hidden\n"),
    (linked, "or is a link"),
    (lambda folder: (folder / SIGNATURE).write_text("{}"), "is damaged"),
    (lambda folder: (folder / SIGNATURE).write_text("[" * 99999), "is damaged"),
    (lambda folder: (folder / SIGNATURE).write_bytes(b"\xff"), "is damaged"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_a_change_is_found(
    change: Callable[[Path], object], says: str, signed: Path, keys: Path
) -> None:
    verify_signature(signed, keys / "ours.pub")
    change(signed)
    with pytest.raises(SignatureError, match=says):
        verify_signature(signed, keys / "ours.pub")


def test_only_the_signature_finds_an_attacker_who_writes_the_certificate_too(
    signed: Path, keys: Path
) -> None:
    rewritten(signed)
    assert check(signed).passed
    done = run("check", signed, "--public-key", keys / "ours.pub")
    assert done.exit_code == 1
    assert "not what was signed" in done.output


def test_a_manifest_that_was_changed_to_fit_is_not_believed(signed: Path, keys: Path) -> None:
    """Its own signature covers it, and the hint which key made it is not enough."""
    (signed / "a.py").touch()
    bundle = json.loads((signed / SIGNATURE).read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["serialization"]["ignore_paths"].append("a.py")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (signed / SIGNATURE).write_text(json.dumps(bundle))
    for public in ("ours.pub", "other.pub"):
        with pytest.raises(SignatureError, match="is damaged"):
            verify_signature(signed, keys / public)


def test_unsigned(merged: Path, keys: Path) -> None:
    with pytest.raises(MissingError, match="not signed"):
        verify_signature(merged, keys / "ours.pub")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rsa", "another type of key"),
        ("k1", "curve 'secp256k1'"),
        ("locked", "passphrase: --private-key <"),
        ("ours.pub", "no private key"),
        ("none", "cannot be read"),
        ("/dev/zero", "a device"),
    ],
)
def test_unfit_private_keys(name: str, says: str, merged: Path, keys: Path) -> None:
    done = run("sign", merged, "--private-key", keys / name)
    assert done.exit_code == 1
    assert says in done.output
    assert not (merged / SIGNATURE).exists()


@pytest.mark.parametrize("name", ["rsa.pub", "k1.pub", "ours", "none", "/dev/zero"])
def test_unfit_public_keys(name: str, signed: Path, keys: Path) -> None:
    done = run("check", signed, "--public-key", keys / name)
    assert done.exit_code == 1
    assert f"file: {keys / name}" in done.output


@pytest.mark.further
def test_a_key_with_a_passphrase_through_a_pipe(merged: Path, keys: Path) -> None:
    main = "from dora_serve.commands import dora_export; dora_export()"
    command = f'"$1" -c "{main}" sign "$2" --private-key <(openssl pkey -in "$3" -passin pass:x)'
    words = ["bash", "-c", command, "bash", sys.executable, str(merged), str(keys / "locked")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verify_signature(merged, keys / "ours.pub")


def test_what_is_not_signed(merged: Path, keys: Path) -> None:
    (merged / "a.py").touch()
    with pytest.raises(SignatureError, match="certificate says"):
        sign(merged, keys / "ours")
    (merged / "a.py").unlink()
    (merged / ".link").symlink_to("/nowhere")  # hidden files are not in the certificate
    with pytest.raises(SignatureError, match="no links"):
        sign(merged, keys / "ours")
    names = {path.name for path in merged.iterdir()}
    assert SIGNATURE not in names
    assert not [name for name in names if name.startswith(".adding")]


def test_a_signature_is_replaced_with_force_only(signed: Path, keys: Path) -> None:
    with pytest.raises(OutputError, match="`force`"):
        sign(signed, keys / "other")
    verify_signature(signed, keys / "ours.pub")
    done = run("sign", signed, "--private-key", keys / "other", "--force", "--json")
    assert json.loads(done.output) == {"signature": str(signed / SIGNATURE)}
    verify_signature(signed, keys / "other.pub")


def test_what_is_no_signature_stays(merged: Path, keys: Path) -> None:
    place, notes = merged / "model.sig", merged.parent / "notes.txt"
    notes.write_text("mine")
    for put in (
        lambda: place.write_text("somebody's notes"),
        lambda: place.symlink_to(notes),
        lambda: place.symlink_to("nowhere"),
        place.mkdir,
    ):
        put()
        for force in ((), ("--force",)):
            done = run("sign", merged, "--private-key", keys / "ours", *force)
            assert done.exit_code == 1
            assert "it stays" in done.output
        assert os.path.lexists(place)
        place.rmdir() if place.is_dir() else place.unlink()
    assert notes.read_text() == "mine"


def test_a_signature_is_never_half_there(signed: Path, keys: Path) -> None:
    """No file may grow beyond 1024 bytes, and a signature is larger."""
    before = (signed / SIGNATURE).read_bytes()
    assert len(before) > 1024
    names = sorted(signed.iterdir())
    main = "from dora_serve.commands import dora_export; dora_export()"
    command = f'ulimit -f 1; "$1" -c "{main}" sign "$2" --force --private-key "$3"'
    words = ["bash", "-c", command, "bash", sys.executable, str(signed), str(keys / "ours")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(signed.iterdir()) == names
    assert (signed / SIGNATURE).read_bytes() == before


def test_recording_would_break_the_signature(signed: Path, keys: Path) -> None:
    before = (signed / FILE).read_bytes()
    with pytest.raises(OutputError, match="sign again"):
        record(signed)
    assert (signed / FILE).read_bytes() == before
    verify_signature(signed, keys / "ours.pub")


def test_the_commands_by_url_and_as_json(signed: Path, keys: Path, tmp_path: Path) -> None:
    url = f"file://{signed}"
    done = run("check", url, "--public-key", keys / "ours.pub")
    assert "signed with this key: unchanged" in done.output
    done = run("check", signed, "--public-key", keys / "ours.pub", "--json")
    assert json.loads(done.output)["signed"] is True
    assert json.loads(run("check", signed, "--json").output)["signed"] is False
    done = run("check", signed, "--public-key", keys / "other.pub", "--json")
    assert json.loads(done.stdout)["error"]["code"] == "SignatureError"
    memory: Any = fsspec.filesystem("memory")
    memory.put(str(signed), "/signed", recursive=True)
    try:
        refused = run("sign", "memory://signed", "--private-key", keys / "ours")
    finally:
        memory.rm("/signed", recursive=True)
    assert "in place" in refused.output
    assert "signed already" in run("sign", url, "--private-key", keys / "ours").output
    link = tmp_path / "link"
    link.symlink_to(signed)
    assert run("check", link, "--public-key", keys / "ours.pub").exit_code == 0


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, signed: Path, keys: Path) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for line in (
        ["sign", signed, "--private-key", keys / "ours", "--force"],
        ["check", signed, "--public-key", keys / "ours.pub"],
    ):
        done = run(*line)
        assert done.exit_code == 1
        assert "pip install 'dora-serve[sign]'" in done.output
    assert run("check", signed).exit_code == 0


SIGNING = """
import sys
from dora_serve.commands import dora_export
artifact, keys = sys.argv[1:]
for line in (
    ["sign", artifact, "--private-key", keys + "/ours"],
    ["check", artifact, "--public-key", keys + "/ours.pub"],
):
    try:
        dora_export(line)
    except SystemExit as done:
        assert not done.code, line
assert "model_signing" in sys.modules
"""


@pytest.mark.further
def test_nothing_is_asked_of_the_network_and_nothing_kept(
    merged: Path, keys: Path, tmp_path: Path
) -> None:
    watched = Watched(tmp_path / "watched")
    done = watched("-c", SIGNING, merged, keys)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert watched.reached() == []
    assert list(watched.home.iterdir()) == []


def test_the_library_is_loaded_only_by_signing(signed: Path) -> None:
    modules = "dora_serve.commands.check, dora_serve.commands.sign, dora_serve.proof.signing"
    code = f"import sys, {modules}; sys.exit('model_signing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=signed.parent).returncode == 0


def test_what_belongs_to_git_is_signed(merged: Path, keys: Path) -> None:
    (merged / ".gitattributes").write_text("* text")
    (merged / ".git").mkdir()
    (merged / ".git" / "config").write_text("[core]")
    sign(merged, keys / "ours")
    assert verify_signature(merged, keys / "ours.pub") == []
    for name in (".gitattributes", ".git/config"):
        before = (merged / name).read_bytes()
        (merged / name).write_text("hook = evil")
        with pytest.raises(SignatureError, match="not what was signed") as caught:
            verify_signature(merged, keys / "ours.pub")
        assert caught.value.file == merged / name
        (merged / name).write_bytes(before)
    assert verify_signature(merged, keys / "ours.pub") == []


def test_what_the_tool_leaves_out_is_told(merged: Path, keys: Path) -> None:
    (merged / ".gitattributes").write_text("* text")
    assert model_signing("sign", merged, "--private_key", keys / "ours") == 0
    assert verify_signature(merged, keys / "ours.pub") == [".gitattributes"]
    done = run("check", merged, "--public-key", keys / "ours.pub")
    assert done.exit_code == 0
    assert "warning: the signature leaves out .gitattributes" in done.stderr
