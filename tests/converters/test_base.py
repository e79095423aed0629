"""Every way a base model lies on disk: the same merge comes out of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from converters.model.base import open_base
from dora_serve import DoraExportError, merge, read_run, write_adapter
from dora_serve.proof.verify import logits, verification_batch

FILE = "model.safetensors"


def single_bin(base: Path, out: Path) -> None:
    shutil.copytree(base, out)
    torch.save(load_file(out / FILE), out / "pytorch_model.bin")
    (out / FILE).unlink()


def sharded(base: Path, out: Path) -> None:
    LlamaForCausalLM.from_pretrained(base).save_pretrained(out, max_shard_size="20KB")


def sharded_bin(base: Path, out: Path) -> None:
    shutil.copytree(base, out)
    tensors = load_file(out / FILE)
    (out / FILE).unlink()
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map: dict[str, str] = {}
    for i, half in enumerate(halves, 1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, out / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def without_model_prefix(base: Path, out: Path) -> None:
    shutil.copytree(base, out)
    tensors = {name.removeprefix("model."): t for name, t in load_file(out / FILE).items()}
    save_file(tensors, out / FILE, {"format": "pt"})


LAYOUTS: list[Callable[[Path, Path], None]] = [single_bin, sharded, sharded_bin]
RENAMED: list[Callable[[Path, Path], None]] = [without_model_prefix]


def merged_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def merged_with(
    layout: Callable[[Path, Path], None], base: Path, run: Path, folder: Path
) -> dict[str, torch.Tensor]:
    layout(base, folder / "base")
    merge(run, folder / "out", base=folder / "base")
    return merged_tensors(folder / "out")


@pytest.fixture(scope="session")
def expected(
    llama_base: Path, llama_lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("expected") / "out"
    merge(llama_lora, out, base=llama_base)
    return load_file(out / FILE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_merge_from_every_serialization(
    layout: Callable[[Path, Path], None],
    llama_base: Path,
    llama_lora: Path,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    found = merged_with(layout, llama_base, llama_lora, tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("layout", RENAMED)
def test_names_match_with_and_without_a_prefix(
    layout: Callable[[Path, Path], None],
    llama_base: Path,
    llama_lora: Path,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    found = merged_with(layout, llama_base, llama_lora, tmp_path)
    assert found.keys() == load_file(tmp_path / "base" / FILE).keys()
    for name, tensor in found.items():
        known = name.removeprefix("module.")
        known = known if known in expected else f"model.{known}"
        assert torch.equal(tensor, expected[known])


def test_a_hub_id_is_taken_from_the_local_cache(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(llama_base, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    base = open_base("someone/tiny")
    assert base.name == "someone/tiny"
    shutil.copytree(llama_base, cache / "snapshots" / "def")
    (cache / "refs" / "two").write_text("def")
    assert [open_base("someone/tiny", r).path.name for r in (None, "two")] == ["abc", "def"]
    with pytest.raises(DoraExportError, match="neither a folder nor a model"):
        open_base("someone/tiny", "three")
    merge(llama_lora, tmp_path / "out", base="someone/tiny")
    model = LlamaForCausalLM.from_pretrained(llama_base)
    inputs = verification_batch(model)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert float((logits(model, inputs) - logits(merged, inputs)).abs().max()) > 1e-2
    with pytest.raises(DoraExportError, match="hf download someone/other"):
        merge(read_run(llama_lora), tmp_path / "no", base="someone/other")
    assert not (tmp_path / "no").exists()


def test_the_revision_that_a_run_names(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT loads it; not whichever is called main, and no path."""
    cache = tmp_path / "cache" / "models--someone--tiny"
    for commit, scale in (("abc", 3.0), ("def", 1.0)):
        shutil.copytree(llama_base, cache / "snapshots" / commit)
        tensors = {n: t * scale for n, t in load_file(llama_base / FILE).items()}
        save_file(tensors, cache / "snapshots" / commit / FILE, {"format": "pt"})
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    (cache / "refs" / "v1+x").write_text("def")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run = Path(shutil.copytree(llama_lora, tmp_path / "run"))
    config = run / "adapter_config.json"
    said = {**json.loads(config.read_text()), "base_model_name_or_path": "someone/tiny"}
    config.write_text(json.dumps({**said, "revision": "v1+x"}))
    own = merge(run, tmp_path / "own").path
    right = merge(llama_lora, tmp_path / "right", base=llama_base).path
    expected = load_file(right / FILE)
    assert all(torch.equal(t, expected[n]) for n, t in load_file(own / FILE).items())
    written = write_adapter(run, tmp_path / "adapter", target="peft").path / config.name
    assert json.loads(written.read_text())["revision"] == "v1+x"
    asked = merge(run, tmp_path / "asked", base="someone/tiny")
    assert any("revision v1+x" in warning for warning in asked.warnings)
    for other in ("v2", "../refs/main"):
        config.write_text(json.dumps({**said, "revision": other}))
        with pytest.raises(DoraExportError, match="neither a folder") as caught:
            merge(run, tmp_path / "no")
        assert other in str(caught.value)
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("named", ["other.safetensors", "other.safetensors.index.json"])
def test_weights_that_only_transformers_reads_are_refused(
    named: str, llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    base, config = tmp_path / "base", tmp_path / "base" / "config.json"
    shutil.copytree(llama_base, base)
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "transformers_weights": FILE}))
    merge(llama_lora, tmp_path / "same", base=base)
    LlamaForCausalLM.from_pretrained(tmp_path / "same")
    config.write_text(json.dumps({**said, "transformers_weights": named}))
    with pytest.raises(DoraExportError, match="transformers_weights"):
        merge(llama_lora, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_base_with_an_adapter_beside_it_is_refused(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    """transformers loads both as one model: merged into the base alone, a run is another one."""
    base = tmp_path / "base"
    shutil.copytree(llama_base, base)
    merge(llama_lora, tmp_path / "alone", base=base)
    for file in llama_lora.glob("adapter_*"):
        shutil.copy(file, base)
    loaded = LlamaForCausalLM.from_pretrained(base).state_dict()
    assert any("lora_A" in name for name in loaded)
    with pytest.raises(DoraExportError, match="an adapter lies beside the base"):
        merge(llama_lora, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [FILE, "pytorch_model.bin"])
def test_a_base_of_no_tensors(name: str, llama_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama_base, base)
    (base / FILE).unlink()
    save_file({}, base / name) if name == FILE else torch.save({}, base / name)
    with pytest.raises(DoraExportError, match="holds no tensor"):
        open_base(base)
