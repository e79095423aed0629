"""Adapters and merged models in vLLM itself: log-probabilities and greedy tokens of the live run.

On a CPU vLLM's attention takes heads of 32, 64, 80, … only, so every base here has heads of 32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from converters.errors import TargetError
from converters.readers import ReadOptions
from converters.run import Run
from converters.targets.engines import ALL, PROFILES
from dora_serve import merge, read_run, verify, write_adapter
from dora_serve.proof.verify import Verification
from dora_serve.vllm.engine import Vllm, VllmError
from tests.conftest import DATA, MODELS, quick, randomize
from tests.converters.families import (
    DECODER,
    MOE,
    PARAMETERS,
    save_adapter,
    save_base,
)
from tests.converters.test_adalora import train
from tests.converters.test_gated import ALPHA, RANK, gate_layers, write_adapter_folder
from tests.converters.test_other_ranks import dylora_run
from tests.engines.vllm.servers import apart
from tests.reference_layout import state_dict, write_run

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

BOUND = 1e-4
COUNT_DOWN = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down"
SAMPLES = sorted(COUNT_DOWN.parent.glob("*/*"))
REFERENCE = DATA / "reference"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = "model.layers"

WIDE = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
GROUPED = {**WIDE, "num_key_value_heads": 1, "head_dim": 32}
LLAMA = {**DECODER, **GROUPED, "tie_word_embeddings": False}
HEADS_OF_32: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 2, "n_positions": 64},
    "opt": {**WIDE, "word_embed_proj_dim": 64},
    "bert": WIDE,
    "roberta": WIDE,
    "qwen2-moe": {
        **GROUPED,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3-moe": {**GROUPED, "moe_intermediate_size": 32},
}
ADAPTED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "opt")
PLAIN = ("llama", "gemma3", "phi3")  # of those that are adapted
MERGED = ("phi3", "gemma2", "gpt2", "bert", "roberta", *sorted(MOE))


def supports(method: str, family: str, target: str = "vllm") -> pytest.MarkDecorator:
    return pytest.mark.supports(method=method, family=family, targets=(target,))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to waiting threads than they win."""
    before, setter = torch.get_num_threads(), torch.set_num_threads
    torch.set_num_threads(1)
    yield
    torch.set_num_threads = setter  # vLLM puts one in its place that does nothing
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "base"
    save_base("llama", folder, False, **GROUPED)
    return folder


def fresh(base: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(base)


def lora_run(base: Path, out: Path, **config: Any) -> Run:
    save_adapter(transformers.LlamaForCausalLM, base, out, **config)
    return read_run(out)


def in_vllm(run: Run, base: Path, out: Path, *, adapter: bool = True) -> Verification:
    """What vLLM makes of `run`, which must be what the live run computes."""
    if adapter:
        write_adapter(run, out, base=base, target="vllm")
    else:
        merge(run, out, base=base)
    found = verify(run, out, base, "vllm")
    assert found.max_abs <= BOUND
    assert found.top1 == 1
    assert found.control_fails == found.has_update
    return found


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.name for sample in SAMPLES])
def test_sample_runs(tmp_path: Path, sample: Path) -> None:
    in_vllm(read_run(sample), MODELS / "tiny-llama-base", tmp_path / "adapter")


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.further), True])
def test_trained_rows_of_the_embedding(tmp_path: Path, tied: bool) -> None:
    save_base("llama", tmp_path / "base", tied, **GROUPED)
    more: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 30]}
    save_adapter(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path / "lora", **more)
    run = read_run(tmp_path / "lora", ReadOptions(base=tmp_path / "base"))
    in_vllm(run, tmp_path / "base", tmp_path / "adapter")


def test_reference_runs_trained_their_head_and_are_merged(tmp_path: Path) -> None:
    entries = json.loads((REFERENCE / "index.json").read_text())
    (entry,) = (entry for entry in entries if entry["name"] == "llama-32")
    run, base = read_run(REFERENCE / entry["checkpoint"]), REFERENCE / entry["base"]
    in_vllm(run, base, tmp_path / "merged", adapter=False)
    with pytest.raises(TargetError, match=r"lm_head(.|\n)*merge it"):
        write_adapter(run, tmp_path / "adapter", base=base, target="vllm")


def family_run(family: str, folder: Path) -> tuple[Run, Path]:
    """PEFT's LoRA on every linear layer, with patterns, and its base."""
    base = folder / "base"
    cls = save_base(family, base, **HEADS_OF_32.get(family, GROUPED))
    save_adapter(
        cls,
        base,
        folder / "lora",
        target_modules="all-linear",
        rank_pattern={r".*\.1\..*": 5},
        alpha_pattern={r".*\.0\..*": 9},
        fan_in_fan_out=family == "gpt2",
        **(PARAMETERS if family in MOE else {}),
    )
    return read_run(folder / "lora", ReadOptions(base=base)), base


@pytest.mark.parametrize(
    "family", quick([pytest.param(f, marks=supports("peft_lora", f)) for f in ADAPTED], *PLAIN)
)
def test_adapters_of_every_family(tmp_path: Path, family: str) -> None:
    run, base = family_run(family, tmp_path)
    in_vllm(run, base, tmp_path / "adapter")


@pytest.mark.parametrize("family", quick(MERGED, "gpt2", "bert", "roberta", "mixtral"))
def test_merged_models_of_every_family(tmp_path: Path, family: str) -> None:
    run, base = family_run(family, tmp_path)
    in_vllm(run, base, tmp_path / "merged", adapter=False)


@pytest.mark.parametrize("family", sorted({"gpt2", "bert", "roberta", *MOE}))
def test_adapters_that_vllm_does_not_compute_are_refused(tmp_path: Path, family: str) -> None:
    run, base = family_run(family, tmp_path)
    with pytest.raises(TargetError, match="`merge`"):
        write_adapter(run, tmp_path / "adapter", base=base, target="vllm")
    assert not (tmp_path / "adapter").exists()


def test_why_roberta_classifiers_are_refused(tmp_path: Path) -> None:
    run, base = family_run("roberta", tmp_path)
    write_adapter(run, tmp_path / "adapter", base=base, target="peft")
    found = verify(run, tmp_path / "adapter", base, "vllm")
    assert not found.passed
    assert "RobertaClassificationHead" in "".join(found.failures)  # vLLM does not start
    engine = Vllm(base, 32, {"max_lora_rank": 8}, labels=2)  # starts without lora_target_modules
    with pytest.raises(VllmError, match=r"classifier.*unsupported LoRA weight"):
        engine.classify([[5, 6, 7]], tmp_path / "adapter")
    engine.close()


def families_that_vllm_has() -> int:
    """How many of the model types that the profile leaves out vLLM has, which says the same."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.models
    unadapted = PROFILES["vllm"].unadapted
    seen = set()
    for family in {*unadapted, "llama", "phi3", "qwen3", "mixtral"}:
        for architecture in {CAUSAL.get(family), CLASSIFIERS.get(family)} & known.keys():
            try:
                cls: Any = known[architecture].load_model_cls()
            except ImportError:  # torchvision
                continue
            lora, lacks = getattr(cls, "supports_lora", False), unadapted.get(family, frozenset())
            if "roberta" not in family:  # it says yes and fails, see above
                assert bool(lora) == (ALL not in lacks), family
            if lora and architecture == CAUSAL.get(family):
                head = "lm_head" in getattr(cls, "embedding_modules", {})
                assert head == ("lm_head" not in lacks), family
            seen.add(family)
    return len(seen)


def test_the_profile_says_what_vllm_says_of_its_models() -> None:
    assert apart(families_that_vllm_has) > 25


def families_as_their_classes_say() -> int:
    """How many families of decoders vLLM has. Of each it is asked of vLLM's class what that adapts,
    or of transformers' own where vLLM has none and would take that."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    known, profile, seen = ModelRegistry.models, PROFILES["vllm"], 0
    for family, name in CAUSAL.items():
        if name not in known:
            own: Any = getattr(transformers, str(name), None)
            if own is not None and not own.is_backend_compatible():
                assert not profile.adapts("q_proj", family), family
            continue
        try:
            cls: Any = known[name].load_model_cls()
        except ImportError:  # torchvision
            continue
        assert profile.adapts("q_proj", family) == supports_lora(cls), family
        if supports_lora(cls):
            modules = getattr(cls, "embedding_modules", {})
            assert profile.adapts("lm_head", family) == ("lm_head" in modules), family
            assert profile.embeds(family) <= ("embed_tokens" in modules), family
        seen += 1
    return seen


def encoders_as_their_classes_say() -> int:
    """How many families have a body that vLLM serves for vectors with adapters, of all that the
    profile says so of; where it has no class, transformers' own has to be one that it takes."""
    import transformers
    from transformers.models.auto import modeling_auto as auto
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    known, profile, seen = ModelRegistry.models, PROFILES["vllm"], 0
    for family in auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES:
        name = auto.MODEL_MAPPING_NAMES.get(family)
        if not isinstance(name, str) or not profile.adapts("q_proj", family, name):
            continue
        if name in known:
            assert supports_lora(known[name].load_model_cls()), name
        elif auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family) not in known:
            assert getattr(transformers, name).is_backend_compatible(), name
        seen += 1
    return seen


@pytest.mark.further
def test_what_its_classes_adapt() -> None:
    assert apart(families_as_their_classes_say) > 60
    assert apart(encoders_as_their_classes_say) > 20


@supports("peft_adalora", "llama")
def test_adalora_as_peft_pruned_it(tmp_path: Path, llama: Path) -> None:
    modules = ["q_proj", "v_proj", "down_proj"]
    train(fresh(llama), tmp_path / "run", True, task_type="CAUSAL_LM", target_modules=modules)
    run = read_run(tmp_path / "run")
    assert len({run.strip().rank(module) for module in run.updates}) > 1
    in_vllm(run, llama, tmp_path / "adapter")


@pytest.mark.further
@supports("dylora", "llama")
def test_dylora(tmp_path: Path, llama: Path) -> None:
    dylora_run(fresh(llama), tmp_path / "run", ("q_proj", "up_proj"))
    in_vllm(read_run(tmp_path / "run", ReadOptions(rank=2)), llama, tmp_path / "adapter")


@pytest.mark.further
@supports("gated (ALoRA)", "llama")
def test_gates(tmp_path: Path, llama: Path) -> None:
    layers = gate_layers(fresh(llama), ("q_proj", "down_proj"))
    write_adapter_folder(tmp_path / "run", layers, "lora_gate", r=RANK, lora_alpha=ALPHA)
    in_vllm(read_run(tmp_path / "run"), llama, tmp_path / "adapter")


@supports("dora", "llama")
def test_dora_with_pruned_modules(tmp_path: Path, llama: Path) -> None:
    """q, k, v of different ranks, and layers in which one of the fused parts is left."""
    state = state_dict(fresh(llama), tuple(LINEAR))
    left = {"q_proj": 1, "k_proj": 2, "up_proj": 3}
    for name, scaler in state.items():
        if name.endswith(".lora_scaler"):
            kind = name.split(".")[-2]
            scaler[:] = 0
            scaler[: left.get(kind, 6)] = 1.5
            if kind in ("k_proj", "gate_proj") and ".layers.0." in name:
                scaler[:] = 0
            if kind in ("q_proj", "v_proj", "o_proj", "up_proj") and ".layers.1." in name:
                scaler[:] = 0
    run = read_run(write_run(tmp_path / "runs", state))
    stripped = run.strip()
    ranks = [stripped.rank(f"{LAYERS}.0.self_attn.{kind}") for kind in LINEAR[:3]]
    assert ranks == [1, 0, 6]
    in_vllm(run, llama, tmp_path / "adapter")


def test_a_run_pruned_to_nothing_is_the_base(tmp_path: Path, llama: Path) -> None:
    state = state_dict(fresh(llama), ("q_proj", "down_proj"))
    for name in state:
        if name.endswith(".lora_scaler"):
            state[name].zero_()
    run = read_run(write_run(tmp_path / "runs", state))
    found = in_vllm(run, llama, tmp_path / "adapter")
    assert not found.has_update
    assert found.control == 0


def test_the_head_of_a_language_model(tmp_path: Path, llama: Path) -> None:
    run = lora_run(llama, tmp_path / "lora", target_modules=["q_proj", "lm_head"])
    in_vllm(run, llama, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_head_that_vllm_does_not_adapt(tmp_path: Path, family: str) -> None:
    cls = save_base(family, tmp_path / "base", False, **GROUPED)
    save_adapter(cls, tmp_path / "base", tmp_path / "lora", target_modules=["q_proj", "lm_head"])
    with pytest.raises(TargetError, match="lm_head"):
        write_adapter(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base", target="vllm")


@pytest.mark.parametrize(
    ("in_base", "labels", "saved"),
    [
        pytest.param(2, 5, True, id="more labels than the base"),
        pytest.param(None, 3, True, id="a base without a head", marks=pytest.mark.further),
        pytest.param(3, 3, False, id="LoRA on the head"),
    ],
)
def test_classifiers(tmp_path: Path, in_base: int | None, labels: int, saved: bool) -> None:
    cls, base = transformers.LlamaForSequenceClassification, tmp_path / "base"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, num_labels=in_base or 2)
    (cls if in_base else transformers.LlamaForCausalLM)(config).save_pretrained(base)
    model = cls.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    lora = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj", *([] if saved else ["score"])],
        modules_to_save=["score"] if saved else None,
        task_type="SEQ_CLS",
    )
    peft = get_peft_model(model, lora)
    randomize(peft, ("lora_", "modules_to_save"))
    peft.save_pretrained(tmp_path / "lora")
    run = read_run(tmp_path / "lora", ReadOptions(base=base))
    in_vllm(run, base, tmp_path / "adapter")


def double_alpha(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    twice = {name: 2 * alpha for name, alpha in config["alpha_pattern"].items()}
    config |= {"lora_alpha": 2 * config["lora_alpha"], "alpha_pattern": twice}
    path.write_text(json.dumps(config))


def swap_layers(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    one, two = (f"base_model.model.{LAYERS}.{n}.self_attn.q_proj.lora_A.weight" for n in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("damage", [double_alpha, swap_layers])
def test_a_damaged_adapter_fails(
    tmp_path: Path, llama: Path, damage: Callable[[Path], None]
) -> None:
    run = lora_run(llama, tmp_path / "lora", target_modules=["q_proj", "up_proj"])
    write_adapter(run, tmp_path / "adapter", base=llama, target="vllm")
    damage(tmp_path / "adapter")
    found = verify(run, tmp_path / "adapter", llama, "vllm")
    assert not found.passed
    assert found.max_abs > 10 * BOUND
