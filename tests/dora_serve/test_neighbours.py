"""One bad thing in a folder is told with its reason, and the rest of the folder is served."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from converters.errors import BaseError, DoraExportError, RunError, TensorFileError, apart, visible
from converters.model.architecture import check_counts, check_size, empty_model, offline
from converters.model.base import open_base
from dora_serve.commands import dora_serve
from dora_serve.folder.inventory import discover
from dora_serve.server.prepare import make
from dora_serve.server.prepare.onnx_folders import read_onnx_folder
from dora_serve.vllm.desired import Following
from tests.conftest import tiny_llama
from tests.dora_serve.following import find_run

Spoil = Callable[[Path], object]
MODEL, CONFIG, WEIGHTS = "model.safetensors", "adapter_config.json", "adapter_model.safetensors"
GENAI: dict[str, Any] = {
    "search": {"past_present_share_buffer": True},
    "model": {
        "decoder": {"num_hidden_layers": 1, "num_key_value_heads": 2, "head_size": 4},
        "eos_token_id": 2,
        "context_length": 64,
        "vocab_size": 84,
    },
}


def another(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else in the place of the file `name`."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def config(**values: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def text(name: str, content: str) -> Spoil:
    return lambda folder: (folder / name).write_text(content)


def header(content: bytes) -> Spoil:
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(content)) + content)


MANY = b"{" + b",".join(
    b'"a%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(200_001)
) + b"}"  # fmt: skip
BASES: dict[str, tuple[Spoil, str]] = {
    "weights are a pipe": (another(MODEL, os.mkfifo), "not a file"),
    "weights are a device": (another(MODEL, lambda p: p.symlink_to("/dev/zero")), "not a file"),
    "weights are a folder": (another(MODEL, Path.mkdir), "not a file"),
    "weights lead nowhere": (another(MODEL, lambda p: p.symlink_to("none")), "no weights"),
    "weights lead to themselves": (another(MODEL, lambda p: p.symlink_to(MODEL)), "no weights"),
    "config is a pipe": (another("config.json", os.mkfifo), "not a file"),
    "config is a folder": (another("config.json", Path.mkdir), "config.json is no file"),
    "config leads to itself": (
        another("config.json", lambda p: p.symlink_to("config.json")), "config.json"
    ),
    "config nests": (text("config.json", '{"a":' * 10**5), "not valid JSON"),
    "type is no name": (config(model_type=[1]), "model_type is not a name"),
    "layers without end": (config(num_hidden_layers=10**9), "over 2000"),
    "layers of other weights": (config(num_hidden_layers=1900), "over 64"),
    "layers inside": (config(text_config={"depth": 10**9}), "depth is 1000000000"),
    "layers in a list": (config(depths=[1, 10**9]), "depths is 1000000000"),
    "experts without end": (
        config(num_hidden_layers=60, num_local_experts=1999), "times num_local_experts"
    ),
    "positions one by one": (
        config(model_type="distilbert", max_position_embeddings=10**8, dim=64), "over 131072"
    ),
    "an index leads out": (
        lambda f: [
            (f / MODEL).rename(f / "m.safetensors"),
            text(f"{MODEL}.index.json", '{"weight_map":{"a":"../good/model.safetensors"}}')(f),
        ],
        "outside the model folder",
    ),
}  # fmt: skip
RUNS: dict[str, tuple[Spoil, str]] = {
    "config is a pipe": (another(CONFIG, os.mkfifo), "adapter_config.json is no file"),
    "config is a folder": (another(CONFIG, Path.mkdir), "adapter_config.json is no file"),
    "config leads to itself": (
        another(CONFIG, lambda p: p.symlink_to(CONFIG)), "adapter_config.json is no file"
    ),
    "config nests": (text(CONFIG, '{"a":' * 10**5), "not valid JSON"),
    "weights are a pipe": (another(WEIGHTS, os.mkfifo), "no weights"),
    "weights are a device": (another(WEIGHTS, lambda p: p.symlink_to("/dev/zero")), "no weights"),
    "weights are a folder": (another(WEIGHTS, Path.mkdir), "no weights"),
    "a header of terabytes": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8), "beyond the end"),
    "a header that nests": (header(b"[" * 10**6), "not valid JSON"),
    "tensors without end": (header(MANY), "more than 200,000 tensors"),
}  # fmt: skip


@pytest.fixture
def root(llama_base: Path, llama_lora: Path, tmp_path: Path) -> Path:
    """A base and its adapter."""
    shutil.copytree(llama_base, tmp_path / "root" / "good")
    shutil.copytree(llama_lora, tmp_path / "root" / "adapter")
    path = tmp_path / "root" / "adapter" / CONFIG
    values = {**json.loads(path.read_text()), "base_model_name_or_path": "good"}
    path.write_text(json.dumps(values))
    return tmp_path / "root"


def test_bad_members_are_told_and_the_rest_is_found(root: Path) -> None:
    told = {}
    for kind, cases, source in (("base", BASES, "good"), ("run", RUNS, "adapter")):
        for name, (spoil, says) in cases.items():
            folder = Path(shutil.copytree(root / source, root / f"{kind} {name}"))
            spoil(folder)
            told[folder.name] = says
    for name in ("evil\x1b[31m", " blank", "new\nline"):
        shutil.copytree(root / "good", root / name)
        told[name] = "its name"
    begin = time.process_time()
    found = discover(root)
    assert time.process_time() - begin < 60
    assert {*found.bases} == {"good"} and {*found.members} == {"adapter"}
    assert found.problems.keys() == told.keys()
    assert {n: says for n, says in told.items() if says not in found.problems[n]} == {}
    done = CliRunner().invoke(dora_serve, ["plan", str(root)])
    assert done.exit_code == 0, done.output
    out = "\n".join(x for x in done.output.splitlines() if x.startswith("left out: "))
    assert {name for name in told if visible(name) not in out} == set()


def test_what_is_odd_of_all_keeps_nothing_from_being_found(root: Path) -> None:
    os.mkfifo(root / "config.json")
    found = discover(root)
    assert {*found.bases} == {"good"} and {*found.members} == {"adapter"}
    assert found.problems == {root.name: "cannot be read: config.json is no file"}


def test_what_lies_beside_a_base_is_not_waited_for(root: Path) -> None:
    good = root / "good"
    os.mkfifo(good / "x.json")
    (good / "y.json").mkdir()
    (good / "zero.txt").symlink_to("/dev/zero")
    (good / "loop.txt").symlink_to("loop.txt")
    (good / "nothing.txt").symlink_to("nothing")
    base = open_base(good)
    assert make._base_key(base, []) == make._base_key(base, [])
    offer = make.make_offer(root, None, True, print)
    assert {model.name for model in offer.models} == {"good", "adapter"}
    assert not offer.problems


def test_a_bug_in_one_is_a_problem_of_that_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(root / "adapter", root / "odd")
    plan = make._plan

    def fails(base: Any, adapters: Any) -> None:
        if any(run.path.name == "odd" for run in adapters.values()):
            raise ZeroDivisionError("of another's code")
        plan(base, adapters)

    monkeypatch.setattr(make, "_plan", fails)
    offer = make.make_offer(root, None, True, print)
    assert offer.problems == {"odd": "ZeroDivisionError: of another's code"}
    assert {model.name for model in offer.models} == {"good", "adapter"}


@pytest.mark.parametrize(
    "certificate",
    ['{"target": "merged"}', '{"target": "merged", "run": [1]}', "[", '{"a": ' * 10**5,
     '{"target": "merged", "run": {"method": "m"}, "modules": {"a": {"rank": 1e400}}}',
     '{"target": "merged", "run": {"method": "m"}, "modules": [1]}'],
)  # fmt: skip
def test_an_odd_certificate_is_of_its_base_alone(certificate: str, root: Path) -> None:
    (root / "good" / "dora_export.json").write_text(certificate)
    offer = make.make_offer(root, None, True, print)
    assert offer.problems.keys() == {"good"}
    assert {model.name for model in offer.models} == {"adapter"}


def test_errors_of_every_kind_are_problems() -> None:
    problems: dict[str, str] = {}
    for error in (RunError("ours"), KeyError("x"), MemoryError("y"), RecursionError("z")):
        with apart(problems, type(error).__name__):
            raise error
    assert problems["RunError"] == "ours" and len(problems) == 4
    with pytest.raises(KeyboardInterrupt), apart(problems, "stopped"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 10**8}, {"hidden_size": 10**6}, {"intermediate_size": 10**9},
     {"model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 10**9}],
    ids=str,
)  # fmt: skip
def test_a_model_far_larger_than_its_file_is_not_built(
    change: dict[str, object], root: Path
) -> None:
    config(**change)(root / "good")
    base = open_base(root / "good")
    architecture = json.loads((root / "good" / "config.json").read_text())["architectures"][0]
    with pytest.raises(BaseError, match="larger than its weights' files"):
        check_size(architecture, base.config, 10**6)
    assert "good" in make.make_offer(root, None, True, print).problems


def test_models_as_large_as_their_files_are_built() -> None:
    model = tiny_llama()
    nbytes = sum(p.numel() * p.itemsize for p in model.parameters())
    values = json.loads(model.config.to_json_string())
    check_size("LlamaForCausalLM", values, nbytes)
    check_counts(values, len(model.state_dict()))
    check_counts({"num_hidden_layers": 61, "n_routed_experts": 384}, 61 * 384 * 3)
    check_counts({"num_hidden_layers": 94, "num_experts": 128}, 850)  # experts of a layer in one


def test_a_configuration_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []

    class Config:
        @classmethod
        def from_dict(cls, _: object) -> None:
            seen.append(constants.HF_HUB_OFFLINE)
            raise ValueError

    import transformers

    monkeypatch.setitem(transformers.CONFIG_MAPPING._extra_content, "evil", Config)
    with pytest.raises(BaseError):
        empty_model("LlamaForCausalLM", {"model_type": "evil"})
    assert seen == [True] and not constants.HF_HUB_OFFLINE
    with offline():
        assert constants.HF_HUB_OFFLINE


def graph_folder(
    folder: Path, location: str | None = None, layers: int = 1, genai: object = GENAI
) -> Path:
    """An ONNX folder of a decoder, with a tensor whose data lies at `location`."""
    cache = onnx.helper.make_tensor_value_info
    inputs = [cache(f"past_key_values.{n}.key", 1, ["rows", 2, "past", 4]) for n in range(layers)]
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1])
    if location is None:
        tensor.raw_data = bytes(4)
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    graph = onnx.helper.make_graph([node], "g", inputs, [])
    folder.mkdir()
    (folder / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (folder / "genai_config.json").write_text(json.dumps(genai))
    (folder / "config.json").write_text("{}")
    (folder / "dora_export.json").write_text("{}")
    return folder


def test_data_of_a_graph_lies_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4))
    for number, location in enumerate(("../secret", str(tmp_path / "secret"), "a/../../secret")):
        with pytest.raises(TensorFileError, match="outside of its folder"):
            read_onnx_folder("x", graph_folder(tmp_path / f"{number}", location))
    folder = graph_folder(tmp_path / "pipe", "data")
    os.mkfifo(folder / "data")
    with pytest.raises(TensorFileError, match="not a file"):
        read_onnx_folder("x", folder)
    (folder / "data").unlink()
    (folder / "data").write_bytes(bytes(4))
    assert read_onnx_folder("x", folder)[1].name == "x"
    assert read_onnx_folder("x", graph_folder(tmp_path / "inside"))[0].task == "causal-lm"


@pytest.mark.parametrize(
    ("place", "value"),
    [("num_hidden_layers", 10**9), ("num_hidden_layers", 0), ("num_hidden_layers", True),
     ("head_size", "4"), ("head_size", 5), ("num_key_value_heads", None),
     ("num_hidden_layers", 2), ("eos_token_id", [-1]), ("eos_token_id", {}),
     ("context_length", 10**12), ("vocab_size", 1.5), ("decoder", []), ("model", 1), ("search", {}),
     ("past_present_share_buffer", "yes")],
)  # fmt: skip
def test_odd_configurations_of_a_graph(place: str, value: object, tmp_path: Path) -> None:
    genai = json.loads(json.dumps(GENAI))
    holder = next(
        h for h in (genai, genai["model"], genai["model"]["decoder"], genai["search"]) if place in h
    )
    holder[place] = value
    folder = graph_folder(tmp_path / "x", genai=genai)
    with pytest.raises(DoraExportError, match=r"none of a decoder|not the one that"):
        read_onnx_folder("x", folder)


@pytest.mark.parametrize("name", ["../../adapter", "/etc/passwd", "a/b", "..", "", "\x1b[31m"])
def test_names_of_adapters_in_a_certificate_lead_nowhere(name: str, tmp_path: Path) -> None:
    folder = graph_folder(tmp_path / "x")
    proof = {"adapters": {name: {"run": {"method": "m"}, "modules": {}}}}
    (folder / "dora_export.json").write_text(json.dumps(proof))
    with pytest.raises(TensorFileError, match="no file can be"):
        read_onnx_folder("x", folder)


def test_garbage_graphs_are_told(root: Path) -> None:
    bad: dict[str, Callable[[Path], object]] = {
        "bytes": lambda f: (f / "model.onnx").write_bytes(b"\xff" * 100),
        "pipe": another("model.onnx", os.mkfifo),
        "certificate": lambda f: (f / "dora_export.json").write_text('{"adapters": [1]}'),
        "batched": lambda f: os.mkfifo(f / "batched.onnx"),
    }
    for name, spoil in bad.items():
        spoil(graph_folder(root / name))
    offer = make.make_offer(root, None, True, print)
    assert offer.problems.keys() == bad.keys()
    assert {model.name for model in offer.models} == {"good", "adapter"}


def test_one_name_per_run(root: Path) -> None:
    run = root / "adapter"
    (root / "deep").mkdir()
    (root / "link").symlink_to("adapter")
    (root / "loop").symlink_to("loop")
    assert find_run(root, "adapter") == run
    for name in (
        "deep/../adapter", "./adapter", "adapter/", "//adapter", "adapter/.", " adapter",
        "adapter ", "adapter\n", "adapter\x00", "\x1badapter", "adapter\u202e", "link", "loop",
        "loop/adapter", str(run), "", "/", ".", "..",
    ):  # fmt: skip
        assert find_run(root, name) is None, name


def test_a_run_that_is_followed_becomes_a_link_to_itself(root: Path) -> None:
    shutil.copytree(root / "adapter", root / "other")
    following = Following(root)
    assert set(following.at_rest().adapters) == {"adapter", "other"}
    shutil.rmtree(root / "adapter")
    (root / "adapter").symlink_to("adapter")
    found = following.at_rest()
    assert set(found.adapters) == {"other"}
    assert found.problems.keys() == {"adapter"}


@pytest.mark.parametrize("inside", [False, True])
def test_a_run_that_is_followed_becomes_a_link(root: Path, tmp_path: Path, inside: bool) -> None:
    """It is gone, as for whoever follows from then on."""
    following = Following(root)
    assert set(following.at_rest().adapters) == {"adapter"}
    other = (root if inside else tmp_path) / "other"
    (root / "adapter").rename(other)
    (root / "adapter").symlink_to(other)
    for each in (following, Following(root)):
        assert set(each.at_rest().adapters) == ({"other"} if inside else set())


def test_a_run_whose_file_is_damaged_is_parsed_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many methods and bases there are."""
    from converters.files import tensors
    from converters.readers import run_folder

    for number in range(3):
        shutil.copytree(root / "good", root / f"base {number}")
    save_file({"x": torch.ones(1)}, root / "adapter" / WEIGHTS)
    (root / "adapter" / WEIGHTS).write_bytes(b"damaged")
    opened = []
    open_file = tensors.open_file

    def counted(path: Path) -> Any:
        opened.append(path)
        return open_file(path)

    monkeypatch.setattr(run_folder, "open_file", counted)
    assert "adapter" in discover(root).problems
    assert len([path for path in opened if path.name == WEIGHTS]) <= 2  # looked for, and read
