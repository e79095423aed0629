"""Files as the system has them: their state, descriptors, errors; JSON; names in ONNX folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from converters.errors import (
    BaseError,
    DoraExportError,
    MissingError,
    RunError,
    TensorFileError,
)
from converters.files import cores as cores_module
from converters.files import onnx_files
from converters.files.cores import bind, cores
from converters.files.handles import (
    check_file,
    mounts,
    opened,
    reading,
    state_at,
    state_of,
    there,
)
from converters.files.json_files import is_number, parse_json, read_json
from converters.files.onnx_files import (
    graphs_in,
    head_names,
    heads_in,
    is_onnx_folder,
    names,
    read_adapter_file,
)


def test_the_state_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    found = path.stat()
    times = found.st_mtime_ns, found.st_ctime_ns
    assert state_at(path) == (found.st_dev, found.st_ino, 5, *times)
    assert state_of(found) == state_at(path)
    assert state_at(tmp_path / "none") is None
    assert there(path) and there(tmp_path)
    assert not there(tmp_path / "none") and not there(Path("x" * 5000))
    assert state_at(Path("x" * 5000)) is None
    assert check_file(path) == 5
    path.write_bytes(b"54321")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # as `cp -p` over it
    assert state_at(path) != state_of(found)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(TensorFileError, match="not a file") as caught:
            check_file(path)
        assert caught.value.file == path
    with pytest.raises(MissingError) as missing:
        check_file(tmp_path / "none")
    assert missing.value.file == tmp_path / "none"
    with pytest.raises(TensorFileError, match="cannot be read"):
        check_file(Path("x" * 5000))


def test_a_descriptor_is_closed_and_the_state_compared(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    state = state_at(path)
    assert state is not None
    with opened(path, state, "t") as fd:
        assert os.pread(fd, 9, 1) == b"2345"
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)
    with (
        pytest.raises(TensorFileError, match="changed") as caught,
        opened(path, state, "t") as fd,
    ):
        path.write_bytes(b"123456")
    assert (caught.value.file, caught.value.tensor) == (path, "t")
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)
    with pytest.raises(KeyError), opened(path, state) as fd:
        raise KeyError
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("kind", [BaseError, RunError])
def test_what_the_system_says_becomes_an_error_of_the_kind(
    tmp_path: Path, kind: type[DoraExportError]
) -> None:
    with pytest.raises(kind, match="No such file") as caught, reading(tmp_path, kind):
        (tmp_path / "none").read_bytes()
    assert caught.value.file == str(tmp_path / "none")
    with pytest.raises(kind) as caught, reading(tmp_path, kind):
        raise OSError(5, "Input/output error")
    assert caught.value.file == tmp_path
    own = MissingError("as it is")
    with pytest.raises(MissingError) as kept, reading(tmp_path, kind):
        raise own
    assert kept.value is own


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, {"b": "ä"}]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, {"b": "ä"}]}
    for text, says in (
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "appears twice"),
        ('{"a": {"b": 1, "b": 2}}', "appears twice"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(TensorFileError, match=says) as caught:
            read_json(path)
        assert caught.value.file == path
    with pytest.raises(MissingError):
        read_json(tmp_path / "none")
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"


@pytest.mark.parametrize(("size", "fits"), [(100_000_000, True), (100_000_001, False)])
def test_the_largest_json_file(tmp_path: Path, size: int, fits: bool) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as stream:
        stream.truncate(size)
    with pytest.raises(TensorFileError, match="not valid JSON" if fits else "too large"):
        read_json(path)


def test_what_an_onnx_folder_holds(tmp_path: Path) -> None:
    assert not is_onnx_folder(tmp_path)
    assert graphs_in(tmp_path) == []
    (tmp_path / "encoder_model.onnx").touch()
    (tmp_path / "decoder_with_past_model.onnx").touch()
    assert is_onnx_folder(tmp_path)
    assert [path.name for path in graphs_in(tmp_path)] == [
        "encoder_model.onnx",
        "decoder_with_past_model.onnx",
    ]
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.onnx").touch()
    assert is_onnx_folder(other)
    assert names("a.b") == ("a.b.lora_A", "a.b.lora_B", "a.b.lora_owner")
    assert head_names("m") == ("m.head_weight", "m.head_bias")
    assert heads_in([*head_names("z"), *head_names("m"), "x.lora_A"]) == ["m", "z"]


def test_the_names_that_others_know() -> None:
    """onnxruntime-genai's and Optimum's, and those of folders that were written before."""
    known = "MODEL BATCHED GENAI ENCODER DECODER WITH_PAST FOLDER SUFFIX OWN_HEADS ADAPTER_INDEX"
    assert [getattr(onnx_files, name) for name in known.split()] == [
        *("model.onnx", "batched.onnx", "genai_config.json", "encoder_model.onnx"),
        *("decoder_model.onnx", "decoder_with_past_model.onnx", "adapters", ".onnx_adapter"),
        *("base_heads.onnx_adapter", "adapter_index"),
    ]
    assert (onnx_files.LOGITS_POSITIONS, onnx_files.LABELS) == ("logits_positions", "labels")
    assert onnx_files.NO_ADAPTER == -1


def test_adapters_as_onnx_runtime_writes_them(tmp_path: Path) -> None:
    from onnxruntime import AdapterFormat, OrtValue

    path = tmp_path / "x.onnx_adapter"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({"m.lora_A": OrtValue.ortvalue_from_numpy(array)})
    adapter.export_adapter(str(path))
    found = read_adapter_file(path)
    assert found.keys() == {"m.lora_A"}
    assert np.array_equal(found["m.lora_A"], array)
    path.write_bytes(b"nonsense")
    with pytest.raises(TensorFileError, match="not an ONNX Runtime adapter") as caught:
        read_adapter_file(path)
    assert caught.value.file == path


@pytest.mark.parametrize(
    ("value", "fine"),
    [
        *((0, True), (-1, True), (2.5, True), (2.9e38, True), (-2.9e38, True)),
        *((3e38, False), (-3e38, False), (10**39, False), (-(10**39), False)),
        *((float("nan"), False), (float("inf"), False), (True, False), (False, False)),
        *(("1", False), (None, False), ([], False)),
    ],
)
def test_numbers_that_float32_holds(value: object, fine: bool) -> None:
    assert is_number(value) is fine


def test_mounts_have_the_names_that_paths_have(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "36 35 8:1 / /mnt/my\\040disk\\134x rw - ext4 /dev/sda1 rw\n1 2 0:3 / / rw - x y rw"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    assert mounts() == [Path("/mnt/my disk\\x"), Path("/")]


def test_bytes_of_half_a_surrogate_pair_are_no_text() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        parse_json(b'"\xed\xa0\xbd"')
    assert parse_json('"é"'.encode()) == "é"


def test_cores_that_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cores()
    bind(own[:1])
    try:
        assert cores() == own[:1]
    finally:
        bind(own)
    assert cores() == own
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.setattr(cores_module, "_bound", [])
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cores() == [0, 1, 2]
    bind([1])
    assert cores() == [1]
