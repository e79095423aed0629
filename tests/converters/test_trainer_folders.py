"""The folders that trainers leave: which of them are runs, and what is said of the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from transformers import LlamaForCausalLM

from converters.errors import BaseError, MissingError, RunError
from dora_serve import merge, read_run
from dora_serve.commands import dora_export
from tests.conftest import randomize, tiny_llama
from tests.converters.other_trainers import INPUTS
from tests.converters.proving import logits, prove

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def trained(llama_base: Path, tmp_path: Path) -> Path:
    """An adapter as PEFT saves it."""
    model = LlamaForCausalLM.from_pretrained(llama_base)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def put(folder: Path, *names: str, **texts: str) -> Path:
    """Files of no meaning to us."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def checkpoint(adapter: Path, folder: Path) -> Path:
    """What Trainer puts into checkpoint-N."""
    names = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
    put(folder, *names, trainer_state='{"global_step": 100}')
    for name in ADAPTER:
        shutil.copy(adapter / name, folder)
    return folder


def trainer(adapter: Path, out: Path) -> Path:
    checkpoint(adapter, out / "checkpoint-90")
    return checkpoint(adapter, put(out, "runs/events.out.tfevents.1", "README.md"))


def llama_factory(adapter: Path, out: Path) -> Path:
    put(out, "trainer_log.jsonl", "training_loss.png", all_results="{}", train_results="{}")
    return trainer(adapter, out)


def axolotl(adapter: Path, out: Path) -> Path:
    """With the configuration of the base, and no weights of it."""
    put(out, "debug.log", "chat_template.jinja", config=tiny_llama().config.to_json_string())
    return trainer(adapter, out)


def unsloth(adapter: Path, out: Path) -> Path:
    trainer(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}
    config["target_modules"] = r"(?:.*?\.(?:self_attn|mlp)\.(?:q_proj|v_proj|down_proj))"
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def ms_swift(adapter: Path, out: Path) -> Path:
    swift = json.dumps({"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06})
    args = json.dumps({"tuner_type": "lora", "use_rslora": False, "train": True})
    return checkpoint(adapter, put(out, additional_config=swift, args=args))


def trl(adapter: Path, out: Path) -> Path:
    """GRPO and PPO; with DeepSpeed's own checkpoint beside what Trainer gathered."""
    names = ("global_step100/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest")
    return trainer(adapter, put(out, *names, "zero_to_fp32.py", completions="{}"))


def autotrain(adapter: Path, out: Path) -> Path:
    """Its callback, and many scripts', put a model of no tensors in the place of a large one."""
    torch.save({}, put(out, training_params="{}") / "pytorch_model.bin")
    return checkpoint(adapter, out)


@pytest.mark.parametrize(
    "make", [trainer, llama_factory, axolotl, unsloth, ms_swift, trl, autotrain]
)
def test_folders_that_are_runs(
    make: Callable[[Path, Path], Path], trained: Path, tmp_path: Path
) -> None:
    plain, run = read_run(trained), read_run(make(trained, tmp_path / "out"))
    assert run.method == "peft_lora" and run.path == tmp_path / "out"
    assert run.warnings == plain.warnings == ()
    assert run.updates.keys() == plain.updates.keys() and len(run.updates) == 6
    for module, update in run.updates.items():
        assert torch.equal(update.components().dense(), plain.updates[module].components().dense())  # type: ignore[union-attr]


def several(trained: Path, out: Path) -> tuple[Path, str, str]:
    for step in (1000, 200, 90):
        checkpoint(trained, out / f"checkpoint-{step}")
    return out, "checkpoint-90, checkpoint-200, checkpoint-1000", "checkpoint-1000"


def measured(trained: Path, out: Path) -> tuple[Path, str, str]:
    """With `metric_for_best_model`, trained in a folder that was moved since."""
    found = several(trained, out)
    state = {"best_model_checkpoint": "/elsewhere/out/checkpoint-200", "global_step": 1000}
    put(out / "checkpoint-1000", trainer_state=json.dumps(state))
    return *found[:2], "checkpoint-200"


def elsewhere(trained: Path, out: Path) -> tuple[Path, str, str]:
    """Trained on Windows."""
    found = several(trained, out)
    state = json.dumps({"best_model_checkpoint": r"D:\runs\out\checkpoint-90"})
    put(out / "checkpoint-1000", trainer_state=state)
    return *found[:2], "checkpoint-90"


def named(trained: Path, out: Path) -> tuple[Path, str, str]:
    """As PEFT saves a model with adapters of names of their own."""
    for name in ("math", "code"):
        shutil.copytree(trained, out / name)
    return out, "code, math", "math"


def versions(trained: Path, out: Path) -> tuple[Path, str, str]:
    """ms-swift: a folder of every start, and in it the checkpoints."""
    found = []
    for version in ("v0-20261126-101010", "v1-20261126-111111"):
        ms_swift(trained, out / version / "checkpoint-94")
        found.append(f"{version}/checkpoint-94")
    return out, ", ".join(found), found[-1]


@pytest.mark.parametrize("make", [several, measured, elsewhere, named, versions])
def test_folders_of_runs(
    make: Callable[[Path, Path], tuple[Path, str, str]],
    trained: Path,
    tmp_path: Path,
    llama_base: Path,
) -> None:
    folder, names, last = make(trained, tmp_path / "out")
    with pytest.raises(RunError, match="a folder of runs") as error:
        read_run(folder)
    assert error.value.found == names
    assert str(folder / last) in str(error.value.remedy)
    verbs: list[list[str]] = [
        ["inspect", str(folder)],
        ["merge", str(folder), str(tmp_path / "m"), "--base", str(llama_base)],
        ["adapter", str(folder), str(tmp_path / "a"), "--base", str(llama_base)],
        ["lint", str(folder), "--base", str(llama_base), "--target", "vllm"],
    ]
    for verb in verbs:
        result = CliRunner().invoke(dora_export, verb)
        assert result.exit_code == 1, result.output
        assert "a folder of runs" in result.output and "dora-export batch" in result.output, verb
    assert not (tmp_path / "m").exists()
    merge(read_run(folder / last), tmp_path / "one", base=llama_base)  # as the remedy says
    assert (tmp_path / "one" / "dora_export.json").exists()


def fsdp(out: Path) -> Path:
    return put(out, "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp")


def deepspeed(out: Path) -> Path:
    return put(out, "zero_to_fp32.py", "latest", "global_step9/mp_rank_00_model_states.pt")


def full(out: Path) -> Path:
    tiny_llama().save_pretrained(out)
    return out


def early_mlx(out: Path) -> Path:
    return put(out, "adapters.npz")


@pytest.mark.parametrize(
    ("make", "message", "remedy"),
    [
        (fsdp, "shards of FSDP", "merge-weights"),
        (deepspeed, "pieces of DeepSpeed", "zero_to_fp32"),
        (full, "a whole model", "`extract`"),
        (early_mlx, "early mlx-lm", "`extract`"),
    ],
)
def test_folders_that_are_none(
    make: Callable[[Path], Path], message: str, remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message) as error:
        read_run(make(tmp_path / "out"))
    assert remedy in str(error.value.remedy)


def whole_state(tmp_path: Path, base: Path) -> tuple[Any, dict[str, torch.Tensor], Path]:
    """A model with LoRA, all its tensors by PEFT's names, and a folder with its configuration."""
    wrapped = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    randomize(wrapped)
    wrapped.peft_config["default"].save_pretrained(tmp_path / "run")
    state = {name: tensor.detach().clone() for name, tensor in wrapped.state_dict().items()}
    return wrapped, state, tmp_path / "run"


def test_what_torch_puts_together_of_shards(llama_base: Path, tmp_path: Path) -> None:
    wrapped, state, run = whole_state(tmp_path, llama_base)
    shards = run / "pytorch_model_fsdp_0"
    save_shards({"model": state}, checkpoint_id=shards, no_dist=True)
    with pytest.raises(RunError, match="in shards of FSDP") as error:
        read_run(run)
    assert "dcp_to_torch" in str(error.value) and "adapter_model.bin" in str(error.value)
    dcp_to_torch_save(shards, run / "adapter_model.bin")  # as the remedy says
    control = logits(LlamaForCausalLM.from_pretrained(llama_base), INPUTS)
    told = logits(wrapped, INPUTS)
    prove(read_run(run), llama_base, INPUTS, told, control, tmp_path, ("peft",))


def test_a_whole_model_with_its_factors(llama_base: Path, tmp_path: Path) -> None:
    """As accelerate saves PEFT's model, or puts it together."""
    wrapped, state, run = whole_state(tmp_path, llama_base)
    saved = tmp_path / "saved"
    shutil.copytree(llama_base, saved)
    save_file(state, saved / "model.safetensors")
    for _ in range(2):
        with pytest.raises(RunError, match="with factors of LoRA in it") as error:
            read_run(saved)
        (saved / "config.json").unlink(missing_ok=True)  # as `save_state` leaves it
    assert ADAPTER[0] in str(error.value) and ADAPTER[1] in str(error.value)
    shutil.copy(saved / "model.safetensors", run / ADAPTER[0])  # as the remedy says
    control = logits(LlamaForCausalLM.from_pretrained(llama_base), INPUTS)
    told = logits(wrapped, INPUTS)
    prove(read_run(run), llama_base, INPUTS, told, control, tmp_path, ("peft",))


def test_factors_that_began_anew_in_training(trained: Path, tmp_path: Path) -> None:
    """ReLoRA's checkpoints as axolotl leaves them: merged into the base that the configuration
    names, they computed something else than was trained, in silence."""
    plain = checkpoint(trained, tmp_path / "out/checkpoint-2")
    at_restart = checkpoint(trained, tmp_path / "out/checkpoint-8")
    copy = shutil.copytree(trained, at_restart / "adapter")
    between = checkpoint(trained, tmp_path / "out/checkpoint-10")
    put(between / "relora", "model.safetensors", config="{}")
    for folder in (at_restart, copy, between):
        with pytest.raises(RunError, match="ReLoRA"):
            read_run(folder)
    put(plain / "relora")  # empty: of somebody else
    another = checkpoint(trained, tmp_path / "mine")
    shutil.copytree(trained, another / "adapter")  # a second adapter, as PEFT saves one
    for folder in (plain, another, another / "adapter"):
        read_run(folder)


def test_what_zero_3_leaves(trained: Path) -> None:
    tensors = load_file(trained / ADAPTER[0])
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.zeros(0)}, trained / ADAPTER[0])
    with pytest.raises(RunError, match="ZeRO-3") as error:
        read_run(trained)
    assert error.value.tensor == name


@pytest.mark.supports(method="peft_lora (sharded)", family="llama", targets=("merged", "peft"))
def test_an_adapter_in_shards(llama_base: Path, tmp_path: Path) -> None:
    """As transformers writes one that is larger than `max_shard_size`."""
    model: Any = LlamaForCausalLM.from_pretrained(llama_base)
    control = logits(model, INPUTS)
    try:
        model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    except ValueError as error:
        if "version of PEFT" not in str(error):  # transformers 5.24 asks for one that is to come
            raise
        pytest.skip(str(error))
    randomize(model)
    model.save_pretrained(tmp_path / "run", max_shard_size="2KB")
    shards = sorted((tmp_path / "run").glob("adapter_model-*"))
    assert len(shards) > 2 and not (tmp_path / "run" / ADAPTER[0]).exists()
    run = read_run(tmp_path / "run")
    assert {*shards} < {*run.files}
    prove(run, llama_base, INPUTS, logits(model, INPUTS), control, tmp_path, ("peft",))
    shards[1].unlink()
    with pytest.raises(MissingError, match="shards of the adapter"):
        read_run(tmp_path / "run")


def test_an_adapter_beside_what_it_was_merged_into(
    trained: Path, llama_base: Path, tmp_path: Path
) -> None:
    """Saved into one folder by many scripts. It was refused, as an adapter beside the base's
    weights, though the base lies elsewhere and PEFT takes the adapter."""
    live: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_base), trained)
    truth = logits(live, INPUTS)
    with live.disable_adapter():
        control = logits(live, INPUTS)
    live.merge_and_unload().save_pretrained(trained)
    run = read_run(trained)
    prove(run, llama_base, INPUTS, truth, control, tmp_path, ("peft",))
    with pytest.raises(BaseError, match="beside the base's weights"):
        merge(run, tmp_path / "twice", base=trained)


def test_other_adapters_below_one_are_told(llama_base: Path, tmp_path: Path) -> None:
    """As PEFT saves a model of several: the default one, which it loads again, and below it the
    others, which it does not."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), LoraConfig(r=2))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"]))
    model.add_adapter("third", LoraConfig(r=1, target_modules=["q_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").iterdir() if file.is_dir()} == {
        "other",
        "third",
    }
    checkpoint(tmp_path / "run", tmp_path / "run" / "checkpoint-100")
    (tmp_path / "run" / "last").symlink_to("checkpoint-100")
    (warning,) = read_run(tmp_path / "run").warnings
    assert "other, third below the adapter" in warning
    assert str(tmp_path / "run" / "other") in warning
    assert read_run(tmp_path / "run" / "other").warnings == ()
    assert read_run(tmp_path / "run" / "checkpoint-100").warnings == ()
