"""Install the wheel of a release alone, and have it answer.

    python scripts/release.py DIST

Without its dependencies, which are tested elsewhere: click by itself must do for a help text.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def main() -> None:
    (wheel,) = Path(sys.argv[1]).glob("*.whl")
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        bin = Path(folder) / "bin"
        for more in (["click>=8.4"], [str(wheel), "--no-deps"]):
            subprocess.run([bin / "pip", "install", "--quiet", *more], check=True)
        for program in ("dora-export", "dora-serve"):
            said = subprocess.run(
                [bin / program, "--version"], check=True, capture_output=True, text=True, cwd=folder
            ).stdout
            assert version in said, said
            subprocess.run(
                [bin / program, "--help"], check=True, stdout=subprocess.DEVNULL, cwd=folder
            )
    print(f"{wheel.name}: installs and answers")


if __name__ == "__main__":
    main()
