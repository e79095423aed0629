"""Folders that may not be read."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from converters.certificate import SIGNATURE, write_certificate
from converters.errors import TensorFileError
from dora_serve import read_run
from dora_serve.folder.inventory import discover
from dora_serve.proof.check import check
from dora_serve.proof.signing import sign, verify_signature
from dora_serve.vllm.desired import Following
from tests.dora_serve.test_sign import openssl, run

_VERSION = 0x20080522  # of the three words of 32 bits that capabilities are told in, twice
_PAST_RIGHTS = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@pytest.fixture(autouse=True)
def bound() -> Iterator[None]:
    """Root, too, is bound by what a file's rights say."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "capset"):
        pytest.skip("no capabilities of Linux")
    header, words = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, words) == 0
    effective = words[0]
    words[0] = effective & ~_PAST_RIGHTS
    assert libc.capset(header, words) == 0
    yield
    words[0] = effective
    assert libc.capset(header, words) == 0


@pytest.fixture
def root(llama_base: Path, llama_lora: Path, tmp_path: Path) -> Iterator[Path]:
    """A base, a run, and two that another user keeps to himself, the second in a folder."""
    shutil.copytree(llama_base, tmp_path / "base")
    for name in ("run", "other", "runs/one"):
        shutil.copytree(llama_lora, tmp_path / name)
    shut = [tmp_path / "other", tmp_path / "runs", tmp_path / "lost+found"]
    (tmp_path / "lost+found").mkdir()
    for folder in shut:
        folder.chmod(0)
    yield tmp_path
    for folder in shut:
        folder.chmod(0o700)


@pytest.mark.parametrize("rights", [0, 0o100, 0o400])
def test_a_folder_that_may_not_be_read_is_told(root: Path, rights: int) -> None:
    """Whether it may be listed or entered alone, or neither; not what file systems keep there."""
    (root / "other").chmod(rights)
    found = discover(root, root / "base")
    assert set(found.members) == {"run"}
    assert found.problems.keys() == {"other", "runs"}
    for why in found.problems.values():
        assert why.startswith("cannot be read: Permission denied")


def test_a_torch_file_that_may_not_be_read_is_not_called_damaged(root: Path) -> None:
    """To copy it again, as its message asked, brings the same."""
    torch.save({"a": torch.ones(2)}, root / "run" / "adapter_model.bin")
    (root / "run" / "adapter_model.safetensors").unlink()
    (root / "run" / "adapter_model.bin").chmod(0)
    with pytest.raises(TensorFileError, match="cannot be read: Permission denied") as caught:
        read_run(root / "run")
    assert caught.value.remedy is None


def test_a_run_whose_rights_come_and_go_is_followed(root: Path) -> None:
    following = Following(root, given=discover(root, root / "base").bases["base"])
    assert set(following.at_rest().adapters) == {"run"}
    assert following.at_rest().problems.keys() == {"other", "runs"}
    (root / "other").chmod(0o700)
    (root / "runs").chmod(0o700)
    assert set(following.at_rest().adapters) == {"run", "other", "one"}
    (root / "runs").chmod(0)
    found = following.at_rest()
    assert set(found.adapters) == {"run", "other"}
    assert "cannot be read" in found.problems["one"]


@pytest.fixture
def signed(tmp_path: Path) -> Iterator[Path]:
    """An artifact with a folder below it, signed by the key `ours`, which lies beside it."""
    ours, artifact = tmp_path / "ours", tmp_path / "artifact"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", ours)
    openssl("ec", "-in", ours, "-pubout", "-out", tmp_path / "ours.pub")
    (artifact / "below").mkdir(parents=True)
    (artifact / "config.json").write_text("{}")
    write_certificate(artifact, {"target": "merged"})
    sign(artifact, ours)
    (artifact / "below" / "more.json").write_text("{}")
    yield artifact
    (artifact / "below").chmod(0o700)


@pytest.mark.parametrize("rights", [0, 0o100, 0o400])
def test_what_cannot_be_listed_is_neither_signed_nor_verified(signed: Path, rights: int) -> None:
    """Its files would count as none, and whoever may read the folder would have them."""
    (signed / "below").chmod(rights)
    done = run("check", signed, "--public-key", signed.parent / "ours.pub")
    assert done.exit_code not in (0, None)
    with pytest.raises(ValueError, match="cannot be read"):
        verify_signature(signed, signed.parent / "ours.pub")
    with pytest.raises(TensorFileError, match="cannot be read: Permission denied"):
        check(signed)
    with pytest.raises(TensorFileError, match="cannot be read: Permission denied"):
        sign(signed, signed.parent / "ours", force=True)
    (signed / SIGNATURE).unlink()
    done = run("sign", signed, "--private-key", signed.parent / "ours")
    assert "cannot be read: Permission denied" in done.stderr
    assert not (signed / SIGNATURE).exists()


def test_what_a_disk_keeps_for_itself_is_passed_over(signed: Path) -> None:
    (signed / "below" / "more.json").unlink()
    (signed / "below").rename(signed / "lost+found")
    (signed / "lost+found").chmod(0)
    assert check(signed).passed
    assert verify_signature(signed, signed.parent / "ours.pub") == []
    (signed / "lost+found").rename(signed / "below")
