"""No key, token or password lies in the repository. Needs no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def scan(folder: Path, files: list[str]) -> subprocess.CompletedProcess[str]:
    """What detect-secrets says. Left out: `password = "…"`, which tests and documents are full of,
    and the folder names of the sample runs, which look like keys."""
    program = Path(sys.executable).with_name("detect-secrets-hook")
    options = ["--no-verify", "--disable-plugin", "KeywordDetector"]
    return subprocess.run(
        [program, *options, "--exclude-lines", r"runs/(Checkpoint|Log)", *files],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_repository_holds_no_secret() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    assert len(files) > 100
    done = scan(ROOT, files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_key_is_found(tmp_path: Path) -> None:
    (tmp_path / "aws.py").write_text('KEY = "AKIA' + "QYLPMN5HHHFPZAM2" + '"\n')
    (tmp_path / "key.pem").write_text("-----BEGIN RSA " + "PRIVATE KEY-----\n")
    (tmp_path / "random.py").write_text(
        'T = "hf_' + "kWmPqRzTxYvB" + "nJcLdSgHfVaE" + "uIoQwZyXtN" + '"\n'
    )
    for name in ("aws.py", "key.pem", "random.py"):
        done = scan(tmp_path, [name])
        assert done.returncode == 1, name
        assert name in done.stdout
