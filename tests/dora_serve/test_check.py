"""`dora-export check`: every change of an artifact or its base is found, and nothing else is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converters.certificate import FILE, file_record
from converters.model.base import open_base
from dora_serve import DoraExportError, merge, write_adapter
from dora_serve.commands import dora_export
from dora_serve.proof.check import check, record

WEIGHTS = "model.safetensors"


@pytest.fixture
def merged(llama_lora: Path, llama_base: Path, tmp_path: Path) -> Path:
    merge(llama_lora, tmp_path / "out", base=llama_base)
    return tmp_path / "out"


def rewrite(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(data: bytearray) -> None:
    data[-1] ^= 1


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {name: -tensor for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"}
    )


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: rewrite(folder / WEIGHTS, flip), WEIGHTS),
    (lambda folder: os.truncate(folder / WEIGHTS, 5000), WEIGHTS),
    (other_weights, WEIGHTS),
    (no_config, "config.json"),
    (lambda folder: (folder / "pytorch_model.bin").write_text("x"), "pytorch_model.bin"),
    (lambda folder: (folder / "more").symlink_to("/nowhere"), "more"),
    # Whose files transformers would read.
    (
        lambda folder: (folder / "additional_chat_templates").symlink_to("/tmp"),
        "additional_chat_templates",
    ),
]


@pytest.mark.parametrize(("change", "where"), CHANGES)
def test_a_change_is_found_where_it_is(
    change: Callable[[Path], object], where: str, merged: Path
) -> None:
    assert check(merged).passed
    change(merged)
    assert [difference.where for difference in check(merged).differences] == [where]


def test_the_base_is_compared(merged: Path, llama_base: Path, roberta_base: Path) -> None:
    result = check(merged, llama_base)
    assert result.passed
    tensors = open_base(llama_base).tensors.keys()
    assert result.weights == len(tensors)
    differences = check(merged, roberta_base).differences
    assert {each.where for each in differences} == tensors | open_base(roberta_base).tensors.keys()


@pytest.mark.parametrize("target", ["peft", "vllm", "gguf"])
def test_adapters(target: str, llama_lora: Path, llama_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_adapter(llama_lora, out, base=llama_base, target=target)
    assert check(out, llama_base).passed
    (weights,) = (path for path in out.iterdir() if path.suffix in (".gguf", ".safetensors"))
    rewrite(weights, flip)
    assert [difference.where for difference in check(out).differences] == [weights.name]


def test_large_files_are_compared_in_pieces_unless_recorded(merged: Path) -> None:
    large = merged / "large"
    large.touch()
    os.truncate(large, 80 << 20)
    known = file_record(large, pieces=True)
    assert known.keys() == {"bytes", "pieces"}

    def write(position: int) -> None:
        with large.open("r+b") as stream:
            stream.seek(position)
            stream.write(b"x")

    write(3 << 20)  # between two pieces
    assert file_record(large, pieces=True) == known
    proof = json.loads((merged / FILE).read_text())
    proof["files"]["large"] = known
    (merged / FILE).write_text(json.dumps(proof))
    result = check(merged)
    assert result.passed
    assert result.whole == result.files - 1
    record(merged)
    assert check(merged).whole == result.files
    write(4 << 20)
    assert not check(merged).passed

    write((80 << 20) - 1)
    assert file_record(large, pieces=True) != known


def test_what_is_recorded_is_written_through_no_link(merged: Path, tmp_path: Path) -> None:
    """A stranger's artifact may hold hidden links, which are no files of it."""
    (tmp_path / "mine").write_text("mine")
    (merged / f".{FILE}").symlink_to(tmp_path / "mine")
    (merged / ".adding.abcdefgh.dora-tmp").symlink_to(tmp_path)
    record(merged)
    assert (tmp_path / "mine").read_text() == "mine" and check(merged).passed


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "does not list"),
        ([1], "does not list"),
        ({"a": 1}, "does not list"),
        ({"../a": {}}, "elsewhere"),
        ({"/etc/passwd": {}}, "elsewhere"),
    ],
)
def test_certificates_of_another_kind(files: object, says: str, merged: Path) -> None:
    proof = json.loads((merged / FILE).read_text())
    (merged / FILE).write_text(json.dumps({**proof, "files": files}))
    with pytest.raises(DoraExportError, match=says):
        check(merged)


def test_the_command_says_what_and_exits_1(merged: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    done = run(dora_export, ["check", str(merged)])
    assert done.exit_code == 0
    assert "unchanged" in done.output
    rewrite(merged / "config.json", flip)
    done = run(dora_export, ["check", str(merged), "--json"])
    assert done.exit_code == 1
    (difference,) = json.loads(done.output)["differences"]
    assert difference["where"] == "config.json"
    done = run(dora_export, ["check", str(merged), "--record"])
    assert done.exit_code == 1
    assert run(dora_export, ["check", str(merged)]).exit_code == 1
    done = run(dora_export, ["check", str(tmp_path)])
    assert done.exit_code == 1
    assert "no certificate here" in done.output
