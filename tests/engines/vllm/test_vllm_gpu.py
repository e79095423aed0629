"""vLLM on a GPU computes what was trained: adapters of many ranks in one batch, on quantized bases,
on experts; and merged models that were quantized again. Needs a GPU, and vLLM for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from converters.lint import lint
from converters.model.base import open_base
from converters.readers import ReadOptions
from converters.targets.lora_folder import CONFIG
from converters.targets.lora_folder import WEIGHTS as LORA
from dora_serve import merge, read_run, verify, write_adapter
from dora_serve.proof.live import LiveModel
from dora_serve.vllm.engine import precision
from tests.conftest import randomize
from tests.converters.made import WEIGHTS
from tests.converters.merged.test_quantized_compressed import quantized as compressed
from tests.converters.merged.test_quantized_fp8 import FP8, by_hand
from tests.converters.merged.test_quantized_fp8 import pack as pack_fp8
from tests.converters.merged.test_quantized_ints import awq_base, consecutive, stream
from tests.converters.merged.test_quantized_ints import quantized as ints
from tests.converters.merged.test_quantized_mxfp4 import EXPERTS, SAID, live_model, packed
from tests.converters.quantized import packed_base
from tests.engines.vllm.gpu import ROWS, Engine, engine, judge
from tests.reference_layout import state_dict, write_run

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None or not torch.cuda.is_available(), reason="needs vLLM and a GPU"
)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Tensors = dict[str, torch.Tensor]


def save(model: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    cls = getattr(transformers, f"{model}ForCausalLM")
    torch.manual_seed(0)
    made = cls(cls.config_class(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:  # less alike than fresh ones, so that tokens differ
                parameter.mul_(3 if "expert" not in name else 2)
    made.to(dtype).save_pretrained(folder)
    return folder


def plain_of(base: Path, truth: Tensors | None = None) -> Any:
    """The live model in float32, of `truth` where the files hold no floats."""
    if truth is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        config = transformers.AutoConfig.from_pretrained(base)
        del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(truth)
    return model.eval()


def train(plain: Any, out: Path, **config: Any) -> Any:
    """An adapter on `plain`, saved to `out`; returns PEFT's live model."""
    told = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    live = get_peft_model(plain, LoraConfig(**{**told, **config})).eval()
    randomize(live)
    live.save_pretrained(out)
    return live


def written(run: Path, base: Path, out: Path) -> Path:
    """The adapter as it is written for vLLM, which lint takes."""
    write_adapter(run, out, base=base, target="vllm")
    assert not [f for f in lint(out, open_base(base), ["vllm"]) if f.severity == "error"]
    return out


def asked(made: Engine, lora: Path | None, **told: Any) -> dict[int, Any]:
    return dict(enumerate(made.ask([(row, lora) for row in ROWS], **told)))


def many_runs(base: Path, folder: Path) -> dict[str, tuple[Path, Any]]:
    """Name → run and its live model: of ranks 0 to 16, other ones in every module."""
    found: dict[str, tuple[Path, Any]] = {}
    configs: dict[str, dict[str, Any]] = {
        "rank 16 and less": {"r": 16, "rank_pattern": {"q_proj": 3, "layers.1.*up_proj": 9}},
        "rank 1": {"r": 1, "lora_alpha": 3, "use_rslora": True},
        "two kinds": {"r": 8, "target_modules": ["v_proj", "down_proj"]},
    }
    for name, config in configs.items():
        run = folder / name.replace(" ", "-")
        found[name] = run, train(plain_of(base), run, **config)
    state = state_dict(plain_of(base), tuple(LINEAR))
    for at, name in enumerate(n for n in state if n.endswith(".lora_scaler")):
        state[name][at % 7 :] = 0  # ranks 0 to 6
    run = write_run(folder / "dora", state)
    found["dynamic ranks"] = run, LiveModel(read_run(run), open_base(base)).model
    return found


@pytest.mark.parametrize("slots", [4, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_many_adapters_in_one_batch(
    request: pytest.FixtureRequest, tmp_path: Path, dtype: str, slots: int
) -> None:
    base = save("Llama", tmp_path / "base", getattr(torch, dtype))
    runs, plain = many_runs(base, tmp_path), plain_of(base)
    loras = {n: written(run, base, tmp_path / f"out-{n}") for n, (run, _) in runs.items()}
    settings = {"enable_lora": True, "max_lora_rank": 16, "max_loras": slots, "max_cpu_loras": 4}
    with engine(base, dtype, **settings) as made:
        alone = asked(made, None)
        rows = [(row, lora) for row in ROWS for lora in (*loras.values(), None)]
        answers = made.ask(rows)
    for at, name in enumerate((*loras, None)):
        mine = {n: answers[n * (len(loras) + 1) + at] for n in range(len(ROWS))}
        if name is None:
            assert all(mine[n].tokens == alone[n].tokens for n in mine)
            assert all((mine[n].logprobs - alone[n].logprobs).abs().max() < 0.05 for n in mine)
        else:
            judge(request, name, mine, alone, runs[name][1], plain, 0.03, getattr(torch, dtype))


def test_its_kernels_for_adapters_take_no_float32(tmp_path: Path) -> None:
    base = save("Llama", tmp_path / "base", torch.float32)
    with pytest.raises(AssertionError), engine(base, "float32", enable_lora=True):
        pass
    assert precision(open_base(base)) == "bfloat16"


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi3"])
def test_sizes_that_fill_no_block(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    """And the embedding and the head."""
    sizes: dict[str, Any] = {"hidden_size": 72, "intermediate_size": 100, "num_key_value_heads": 2}
    base = save(family, tmp_path / "base", **sizes, num_attention_heads=2)
    modules = {"Phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}.get(family, LINEAR)
    config = {"target_modules": [*modules, "embed_tokens", "lm_head"], "r": 5}
    live = train(plain_of(base), tmp_path / "run", **config)
    lora = written(tmp_path / "run", base, tmp_path / "out")
    with engine(base, enable_lora=True, max_lora_rank=8) as made:
        alone, found = asked(made, None), asked(made, lora)
    judge(request, family, found, alone, live, plain_of(base), 0.03)


def symmetric(weight: torch.Tensor, bits: int, index: torch.Tensor) -> Tensors:
    """GPTQ around the middle, as the kernels for it want."""
    groups, middle = int(index.max()) + 1, 1 << (bits - 1)
    columns = weight.T.double()
    scales = torch.stack(
        [columns[index == g].abs().amax(0) / (middle - 1) for g in range(groups)]
    ).half()
    around = (columns / scales.double()[index]).round().clamp(-middle, middle - 1)
    values = [stream(column, bits) for column in (around.long() + middle).T.tolist()]
    zeros = [stream([middle - 1] * weight.shape[0], bits)] * groups
    return {
        "qweight": torch.tensor(values, dtype=torch.int32).T,
        "qzeros": torch.tensor(zeros, dtype=torch.int32),
        "scales": scales,
        "g_idx": index.to(torch.int32),
        "": (around * scales.double()[index]).T,
    }


def fp8(plain: Path, folder: Path, rows: int, **more: Any) -> tuple[Path, Tensors]:
    tensors = pack_fp8(plain, rows, rows, "_scale_inv" if rows == 128 else "_scale")
    ending = "_scale_inv" if rows == 128 else "_scale"
    truth = by_hand(tensors, rows, rows, ending)
    if rows != 128:
        tensors = {n: t.reshape(()) if n.endswith(ending) else t for n, t in tensors.items()}
    return packed_base(plain, folder, tensors, {**FP8, **more}), truth


def gptq(plain: Path, folder: Path, bits: int, index: Any, **more: Any) -> tuple[Path, Tensors]:
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True, **more}
    return ints(plain, folder, said, lambda w: symmetric(w, bits, index(w.shape[1], 32)))


def by_library(plain: Path, folder: Path, kind: str) -> tuple[Path, Tensors]:
    from tests.converters.merged.test_quantized_compressed import loaded

    base = compressed(plain, folder, kind)
    return base, loaded(base)


# Kind → the base and its floats, and what vLLM's rounding of activations costs.
QUANTIZED: dict[str, tuple[Callable[[Path, Path], tuple[Path, Tensors]], float]] = {
    "fp8, one scale": (lambda p, f: fp8(p, f, 1000), 0.2),
    "fp8, blocks": (lambda p, f: fp8(p, f, 128, weight_block_size=[128, 128]), 0.2),
    "gptq, 4 bits": (lambda p, f: gptq(p, f, 4, consecutive, desc_act=False), 0.03),
    "gptq, 8 bits": (lambda p, f: gptq(p, f, 8, consecutive, desc_act=False), 0.03),
    "awq": (lambda p, f: awq_base(p, f, zero_point=True), 0.03),
    **{
        f"compressed-tensors, {kind}": (partial(by_library, kind=kind), share)
        for kind, share in {
            "fp8, rows": 0.2,
            "int8, rows": 0.2,
            "int4": 0.03,
            "int4, with zeros": 0.03,
            "nvfp4": 0.2,
            "mxfp4": 0.03,
        }.items()
    },
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_base(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    dtype = torch.float16 if kind.startswith(("gptq", "awq")) else torch.bfloat16
    plain = save("Llama", tmp_path / "plain", dtype)
    make, share = QUANTIZED[kind]
    base, truth = make(plain, tmp_path / "base")
    live = train(plain_of(base, truth), tmp_path / "run", rank_pattern={"q_proj": 3})
    lora = written(tmp_path / "run", base, tmp_path / "out")
    with engine(base, str(dtype)[6:], enable_lora=True, max_lora_rank=8) as made:
        alone, found = asked(made, None), asked(made, lora)
    judge(request, kind, found, alone, live, plain_of(base, truth), share, dtype)


@pytest.mark.parametrize(
    "kind", ["float32", "bfloat16", "merged", "fp8, blocks", "gptq, 4 bits", "awq"]
)
def test_the_proof(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """`verify` in vLLM passes what is right, and fails half of it."""
    exact = kind in ("float32", "bfloat16", "merged")
    dtype = getattr(torch, kind.replace("merged", "float32")) if exact else torch.float16
    base = plain = save("Llama", tmp_path / "plain", dtype)
    if not exact:
        base, _ = QUANTIZED[kind][0](plain, tmp_path / "base")
    train(plain_of(plain), tmp_path / "run")
    if kind == "merged":
        out = tmp_path / "out"
        merge(tmp_path / "run", out, base=base)
    else:
        out = written(tmp_path / "run", base, tmp_path / "out")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    right = verify(run, out, base, "vllm")
    told = {n: getattr(right, n) for n in ("dtype", "max_abs", "tolerance", "control", "top1")}
    request.node.user_properties.append((kind, {**told, "failures": str(right.failures)}))
    assert right.passed, right
    if kind == "merged":
        return
    file = out / LORA
    save_file({n: t / 2 if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    wrong = verify(run, out, base, "vllm", earlier=right)
    request.node.user_properties.append((f"{kind}, half", {"max_abs": wrong.max_abs}))
    assert not wrong.passed and wrong.max_abs > 2 * wrong.tolerance


def test_a_merge_in_float8_again(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    plain = save("Llama", tmp_path / "plain")
    base, truth = fp8(plain, tmp_path / "base", 128, weight_block_size=[128, 128])
    train(plain_of(base, truth), tmp_path / "run")
    merge(tmp_path / "run", tmp_path / "out", base=base, requantize=True)
    floats = by_hand(load_file(tmp_path / "out" / WEIGHTS), 128, 128)
    with engine(base) as made:
        alone = asked(made, None)
    with engine(tmp_path / "out") as made:
        found = asked(made, None)
    live = plain_of(base, floats)  # what the file says, which others prove to be what was trained
    judge(request, "fp8, blocks again", found, alone, live, plain_of(base, truth), 0.2)


# Family → sizes, the names of the parts in vLLM.
MIXED = {"num_experts_per_tok": 2}
MOE: dict[str, dict[str, Any]] = {
    "Mixtral": {**MIXED, "num_local_experts": 4},
    "Qwen3Moe": {**MIXED, "num_experts": 4, "moe_intermediate_size": 128},
    "GptOss": {
        **MIXED,
        "num_local_experts": 4,
        "layer_types": ["full_attention", "full_attention"],
        "intermediate_size": 128,
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 32,
            "truncate": False,
        },
    },
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def apart(
    live: Any, run: Path, out: Path, names: tuple[str, str, str], rank: int, block: str
) -> Path:
    """PEFT's adapter with its experts one by one: their updates, as PEFT computes them, in factors
    again."""
    tensors = {n: t for n, t in load_file(run / LORA).items() if ".experts" not in n}
    for name, module in live.named_modules():
        if not name.endswith(".experts") or not hasattr(module, "parameter_name"):
            continue
        while hasattr(module, "parameter_name"):
            delta = module.get_delta_weight("default").detach()
            both = module.parameter_name == "gate_up_proj"
            for number, matrix in enumerate(delta):
                parts = (
                    zip(names[:2], matrix.chunk(2), strict=True) if both else [(names[2], matrix)]
                )
                for part, update in parts:
                    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
                    key = f"{name.replace('mlp', block)}.{number}.{part}"
                    tensors[f"{key}.lora_A.weight"] = v[:rank].float().contiguous()
                    tensors[f"{key}.lora_B.weight"] = (u * s)[:, :rank].float().contiguous()
            module = module.base_layer
    out.mkdir()
    save_file(tensors, out / LORA, {"format": "pt"})
    told = json.loads((run / CONFIG).read_text())
    told |= {"r": rank, "lora_alpha": rank, "target_parameters": None}
    told["target_modules"] = [*told["target_modules"], *names]
    (out / CONFIG).write_text(json.dumps(told))
    return out


FORMS = {
    "Mixtral": ["apart"],
    "Qwen3Moe": ["apart", "mixed"],  # PEFT's form, where vLLM is told so
    "GptOss": ["as PEFT saves it"],
}


@pytest.mark.parametrize(("family", "form"), [(f, form) for f in FORMS for form in FORMS[f]])
def test_adapters_on_experts(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, form: str
) -> None:
    dtype = torch.bfloat16 if family == "GptOss" else torch.float16
    base, lora = save(family, tmp_path / "base", dtype, **MOE[family]), tmp_path / "run"
    config = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "lora_alpha": 4}
    live = train(plain_of(base), lora, **config)
    if form == "apart":
        mixtral = family == "Mixtral"
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        block = "block_sparse_moe" if mixtral else "mlp"
        lora = apart(live, lora, tmp_path / "apart", names, 4, block)
    settings: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8}
    told = {}
    if form == "mixed":
        settings["enable_mixed_moe_lora_format"] = told["is_3d_lora_weight"] = True
    else:
        found = lint(lora, open_base(base), ["vllm"])
        assert not [f for f in found if f.severity == "error"]
    with engine(base, str(dtype)[6:], **settings) as made:
        alone, answers = asked(made, None), asked(made, lora, **told)
    judge(request, f"{family}, {form}", answers, alone, live, plain_of(base), 0.05, dtype)


def test_beside_experts_in_mxfp4(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    plain = save("GptOss", tmp_path / "plain", **MOE["GptOss"])
    tensors = load_file(plain / WEIGHTS)
    for layer in range(2):
        for part in ("gate_up_proj", "down_proj"):
            name = f"{EXPERTS.replace('0', str(layer))}.{part}"
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed(tensors.pop(name))
    base = packed_base(plain, tmp_path / "base", tensors, SAID)
    live = train(live_model(base), tmp_path / "run", target_modules=["q_proj", "o_proj"])
    lora = written(tmp_path / "run", base, tmp_path / "out")
    with engine(base, enable_lora=True, max_lora_rank=8) as made:
        alone, found = asked(made, None), asked(made, lora)
    judge(request, "mxfp4", found, alone, live, live_model(base), 0.03)
