"""Lists that decide, member by member, each against what PEFT, transformers or a trainer says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file

from converters.errors import RunError
from converters.files.tensors import open_safetensors
from converters.model.quantized import quantization, unquantized
from converters.model.quantized.scaled import drop_activations
from converters.model.quantized.tensor import Parts
from converters.model.tasks import labels_of
from converters.readers import read_run
from converters.readers.dora import _task
from tests.converters.families import DECODER

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = {f"{MODULE}.lora_A.weight": torch.ones(2, 4), f"{MODULE}.lora_B.weight": torch.ones(3, 2)}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
PROMPTS = sorted(
    kind.value
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if issubclass(config, PromptLearningConfig)
)


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **config}))
    return folder


@pytest.mark.parametrize("kind", [*PROMPTS, "ADAPTION_PROMPT", "LILY", "POLY", "XLORA", "SHADOW"])
def test_tuners_that_change_no_weight(kind: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"{kind} cannot be merged"):
        read_run(adapter(tmp_path / "run", PAIR, peft_type=kind))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kasa_config", {"beta": 1e-4}),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}),
        ("arrow_config", {"top_k": 3}),
        ("alora_invocation_tokens", [5, 6]),
        ("invocation_string", "now"),
        ("use_qalora", True),
        ("layer_replication", [[0, 2], [1, 3]]),
    ],
)
def test_variants_of_lora_that_are_no_lora(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"not read \({key}\)"):
        read_run(adapter(tmp_path / "run", PAIR, **{key: value}))


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("velora_config", "lora_velora_embed"),
        ("monteclora_config", "lora_monteclora_sampler.std_prior"),
    ],
)
def test_what_only_training_reads(key: str, part: str, tmp_path: Path) -> None:
    more = {**PAIR, f"{MODULE}.{part}": torch.ones(7)}
    plain = read_run(adapter(tmp_path / "plain", PAIR)).updates
    found = read_run(adapter(tmp_path / "run", more, **{key: {"num_groups": 2}})).updates
    assert found.keys() == plain.keys()
    for name in plain:
        one, other = (updates[name].components() for updates in (plain, found))
        assert one is not None and other is not None
        assert torch.equal(one.dense(), other.dense())
    with pytest.raises(RunError):  # where no variant is said, it is something else
        read_run(adapter(tmp_path / "odd", more))


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga"])
def test_starts_that_are_not_repeated(start: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not repeated when the adapter is loaded"):
        read_run(adapter(tmp_path / "run", PAIR, init_lora_weights=start))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (f"new_embeddings.{end}", "tokens that training added")
            for end in ("safetensors", "bin")
        ),
        *((f"non_lora_trainables.{end}", "beside the adapter") for end in ("safetensors", "bin")),
        ("trainable_params.bin", "LongLoRA"),
        ("vpm_resampler_embedtokens.pt", "MiniCPM-V"),
    ],
)
def test_parts_beside_the_adapter(name: str, message: str, tmp_path: Path) -> None:
    run = adapter(tmp_path / "run", PAIR)
    (run / name).write_bytes(b"")
    with pytest.raises(RunError, match=message):
        read_run(run)


@pytest.mark.parametrize("name", ["vit.safetensors", "mm_projector.bin", "extra.pt"])
def test_other_tensors_beside_the_adapter_are_told(name: str, tmp_path: Path) -> None:
    """A trainer of one's own puts there what it trained beside the adapter."""
    run = adapter(tmp_path / "run", PAIR)
    for other in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "recipe_state.pt"):
        (run / other).write_bytes(b"")
    before = read_run(run).warnings
    (run / name).write_bytes(b"")
    (told,) = set(read_run(run).warnings) - set(before)
    assert name in told
    assert not any("lies beside" in said for said in before)


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
def test_value_heads_are_told(name: str, tmp_path: Path) -> None:
    run = adapter(tmp_path / "run", PAIR)
    assert not any(name in warning for warning in read_run(run).warnings)
    (run / name).write_bytes(b"")
    assert any(name in warning for warning in read_run(run).warnings)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_value_head_in_the_place_of_a_model_is_told(name: str, tmp_path: Path) -> None:
    """TRL's model with a value head saves that alone so, beside the adapter."""
    run, save = adapter(tmp_path / "run", PAIR), save_file if "safe" in name else torch.save
    before = read_run(run).warnings
    save({"model.norm.weight": torch.ones(4)}, run / name)
    assert read_run(run).warnings == before
    save({"v_head.summary.weight": torch.ones(1, 4)}, run / name)
    (told,) = set(read_run(run).warnings) - set(before)
    assert name in told and "value model" in told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model/__0_0.distcp", "in shards of FSDP"),
        ("__0_0.distcp", "in shards of FSDP"),
        ("pytorch_model_fsdp.bin", "that FSDP put together"),
        ("zero_to_fp32.py", "pieces of DeepSpeed"),
        ("global_step9/mp_rank_00_model_states.pt", "pieces of DeepSpeed"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "pieces of DeepSpeed"),
        ("actor/model_world_size_8_rank_3.pt", "pieces of verl"),
        ("latest_checkpointed_iteration.txt", "pieces of Megatron"),
        ("iter_0000100/common.pt", "pieces of Megatron"),
        ("weights/common.pt", "pieces of Megatron"),
        ("iter_500.pth", "xtuner"),
        ("work/epoch_2.pth", "xtuner"),
        ("iter_500.pth/mp_rank_00_model_states.pt", "xtuner"),
        ("tuned.nemo", "archive of NeMo"),
        ("pytorch_lora_weights.safetensors", "diffusers"),
        ("adapters.npz", "early mlx-lm"),
    ],
)
def test_what_trainers_leave(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    if name.endswith("common.pt"):
        (tmp_path / name).with_name("__0_0.distcp").write_bytes(b"")
    with pytest.raises(RunError, match=message):
        read_run(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(RunError, match=message):  # beside an adapter's configuration too
        read_run(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RunError, match=message):  # or beside what DeepSpeed lets PEFT save
        read_run(tmp_path)


@pytest.mark.parametrize(
    "family",
    ["Roberta", "Bart", "Bert", "Llama", "Funnel", "XLNet", "Flaubert", "T5Gemma", "Perceiver"],
)
def test_heads_of_a_checkpoint(family: str) -> None:
    """As transformers calls them in each of its classifiers."""
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
    known = DECODER | sizes if family in ("Roberta", "Bart", "Bert", "Llama") else {}
    config = getattr(transformers, f"{family}Config")(**known)
    config.num_labels = 5
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    state = dict(model.state_dict())
    assert (_task(state), labels_of(state)) == ("sequence-classification", 5)


SCALES = (
    *("input_scale", "output_scale", "activation_scale", "input_scale_ub"),
    *("q_scale", "k_scale", "v_scale", "k_proj.output_scale", "v_proj.output_scale"),
)


def test_scales_of_activations_and_of_the_cache_are_left_out(tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.{name}" for name in (*SCALES, "q_proj.weight")]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
    parts = Parts(open_safetensors(tmp_path / "x.safetensors"))
    drop_activations(parts)
    assert set(names) - parts.used == {names[-1]}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("inside", [False, True])
def test_where_a_base_says_that_it_is_quantized(key: str, inside: bool) -> None:
    said = {key: {"quant_method": "fp8"}, "hidden_size": 4}
    config = {"text_config": said} if inside else said
    plain = {"hidden_size": 4}
    assert quantization(config) == {"quant_method": "fp8"}
    assert unquantized(config) == ({"text_config": plain} if inside else plain)
