"""How much memory there is: what the machine has, or a control group of either version is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from subprocess import run

import pytest

from converters.files.memory import _given, memory

V1, V2 = "memory.limit_in_bytes", "memory.max"


@pytest.mark.parametrize(
    ("said", "files", "found"),
    [
        ("0::/", {V2: "2000"}, [2000]),  # a container of its own names
        ("0::/", {V2: "max"}, []),
        ("0::/user/unit", {f"user/unit/{V2}": "max", f"user/{V2}": "3000"}, [3000]),
        ("0::/user/unit", {f"user/unit/{V2}": "2000", f"user/{V2}": "3000"}, [2000, 3000]),
        ("0::/pod/host", {V2: "2000"}, [2000]),  # as the host names it, which is not seen here
        ("0::/../host", {V2: "2000"}, [2000]),
        ("4:memory:/job:1", {f"memory/job:1/{V1}": "2000", f"memory/{V1}": f"{1 << 63}"}, [2000]),
        ("4:cpu,memory:/docker/x", {f"memory/{V1}": "2000"}, [2000]),
        ("4:cpu:/a\n0::/b", {f"a/{V2}": "1", f"memory/a/{V1}": "1", f"b/{V2}": "2000"}, [2000]),
        ("0::/", {}, []),
    ],
)
def test_what_a_control_group_is_given(
    said: str, files: dict[str, str], found: list[int], tmp_path: Path
) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "root"
    own.write_text(f"1:name=systemd:/x\n{said}\n")
    for name, text in {"../" + V2: "1", "../" + V1: "1", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    assert [each for each in _given(own, root) if each < 1 << 62] == found


def test_of_a_system_without_them(tmp_path: Path) -> None:
    assert [*_given(tmp_path / "none", tmp_path)] == []
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory() <= machine


def test_what_the_process_itself_is_given() -> None:
    code = "from converters.files.memory import memory; print(memory())"
    limited = f"ulimit -v 500000; exec '{sys.executable}' -c '{code}'"
    done = run(["bash", "-c", limited], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 500000 << 10
