"""`verify` of what is damaged: FAILED with the reason, exit code 1, and never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dora_serve import merge, read_run, write_adapter
from dora_serve.commands.verify import command
from tests.conftest import MODELS

BASE = MODELS / "tiny-llama-base"
SAMPLE = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"
MERGED, ADAPTER = "model.safetensors", "adapter_model.safetensors"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def artifacts(merged_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts")
    run = read_run(SAMPLE)
    merge(run, out / "merged", base=BASE)
    write_adapter(run, out / "adapter", base=BASE)
    shutil.copytree(merged_onnx, out / "onnx")
    return out


def cut(name: str) -> Damage:
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:-200])


def text(name: str, said: str) -> Damage:
    return lambda out: (out / name).write_text(said)


def said(name: str, **changes: object) -> Damage:
    def change(out: Path) -> None:
        known = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps({**known, **changes}))

    return change


def missing_shard(out: Path) -> None:
    tensors = load_file(out / MERGED)
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    lost = next(iter(names))
    save_file({n: t for n, t in tensors.items() if n != lost}, out / names[lost], {"format": "pt"})
    names[lost] = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": names}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / MERGED).unlink()


def other_keys(out: Path) -> None:
    tensors = load_file(out / ADAPTER)
    save_file({n.replace("layers", "blocks"): t for n, t in tensors.items()}, out / ADAPTER)


def other_words(out: Path) -> None:
    words = json.loads((out / "tokenizer.json").read_text())
    ids = list(words["model"]["vocab"].values())
    turned = [*ids[:4], *ids[:3:-1]]
    words["model"]["vocab"] = dict(zip(words["model"]["vocab"], turned, strict=True))
    (out / "tokenizer.json").write_text(json.dumps(words))


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    # artifact, damage, what the reason names
    "weights cut": ("merged", cut(MERGED), "does not load"),
    "weights gone": ("merged", lambda out: (out / MERGED).unlink(), "does not load"),
    "a shard is missing": ("merged", missing_shard, "does not load"),
    "no such class": ("merged", said("config.json", architectures=["Nobody"]), "architecture"),
    "a class that is no model": (
        "merged",
        said("config.json", architectures=["LlamaConfig"]),
        "does not load",
    ),
    "a class of another family": (
        "merged",
        said("config.json", architectures=["BertForMaskedLM"]),
        "",
    ),
    "no such family": ("merged", said("config.json", model_type="nobody"), "does not load"),
    "a configuration that is none": ("merged", text("config.json", "{"), ""),
    "a tokenizer that is none": ("merged", text("tokenizer.json", "{}"), "tokenizer"),
    "another's tokenizer": ("merged", other_words, "other tokens"),
    "an adapter cut": ("adapter", cut(ADAPTER), "does not load"),
    "an adapter under other names": ("adapter", other_keys, ""),
    "an adapter's configuration is none": (
        "adapter",
        text("adapter_config.json", "[]"),
        "does not load",
    ),
    "an adapter of a method that PEFT has not": (
        "adapter",
        said("adapter_config.json", peft_type="NOBODY"),
        "does not load",
    ),
    "an adapter of another rank": ("adapter", said("adapter_config.json", r=99), "does not load"),
    "a graph cut": ("onnx", cut("model.onnx"), "does not load"),
    "a graph gone": ("onnx", lambda out: (out / "model.onnx").unlink(), ""),
    "a graph that is none": ("onnx", text("model.onnx", "a graph"), "does not load"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_has_failed(artifacts: Path, tmp_path: Path, damage: str) -> None:
    artifact, change, reason = DAMAGES[damage]
    out = tmp_path / artifact
    shutil.copytree(artifacts / artifact, out)
    change(out)
    words = [str(SAMPLE), str(out), "--base", str(BASE), "--json"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    told = json.loads(done.stdout)
    assert told["passed"] is False
    assert told["failures"] and reason in " ".join(told["failures"])


def test_a_reason_is_told_in_lines(artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artifacts / "merged", tmp_path / "merged")
    cut("model.safetensors")(tmp_path / "merged")
    words = [str(SAMPLE), str(tmp_path / "merged"), "--base", str(BASE)]
    told = CliRunner().invoke(command, words).stdout
    assert f"\n{'':22}file: {tmp_path / 'merged' / 'model.safetensors'}\n" in told
    assert "\\n" not in told


def test_the_same_artifacts_undamaged_pass(artifacts: Path, tmp_path: Path) -> None:
    for artifact in ("merged", "adapter", "onnx"):
        words = [str(SAMPLE), str(artifacts / artifact), "--base", str(BASE)]
        done = CliRunner().invoke(command, words)
        assert done.exit_code == 0 and "PASSED" in done.output
    # A tokenizer that was saved again is another file and the same tokenizer.
    shutil.copytree(artifacts / "merged", tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "saved")
    words = [str(SAMPLE), str(tmp_path / "saved"), "--base", str(BASE)]
    assert CliRunner().invoke(command, words).exit_code == 0
