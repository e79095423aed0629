"""Decoders of every family in ONNX Runtime: one adapter, many in a batch, merged experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_serve
from converters.errors import DoraExportError
from converters.model.base import open_base
from converters.targets.onnx import write_onnx
from dora_serve import Run, read_run, verify
from dora_serve.onnxruntime.decoder import Decoder
from dora_serve.onnxruntime.sampling import Sampling
from tests.conftest import DATA, MODELS, made_once, randomize
from tests.converters.families import further
from tests.engines.decoders import PROMPTS, Case, check

REFERENCE = DATA / "reference"
LLAMAS = [
    entry
    for entry in json.loads((REFERENCE / "index.json").read_text())
    if entry["task"] == "causal-lm"
]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 84,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
GEMMA2 = {"head_dim": 16, "sliding_window": 32, "attn_logit_softcapping": 2.0}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", GEMMA2),
    "granite": ("GraniteConfig", {}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 64}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "smollm3": ("SmolLM3Config", {}),
    # From here on by torch.
    # To the builder the root of Gemma's size, by which it multiplies embeddings, has two decimals.
    "gemma": ("GemmaConfig", {"head_dim": 16, "hidden_size": 96}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8}),
    "gpt2": ("GPT2Config", GPT2),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 8}),
    "olmo2": ("Olmo2Config", {}),
    "opt": ("OPTConfig", OPT),
    "phi": ("PhiConfig", {}),
    "qwen2-moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16}),
    "starcoder2": ("Starcoder2Config", {}),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ONE_LAYER = {"num_hidden_layers": 1}  # where they do not differ: each takes time to export
MOE = {"mixtral", "qwen2-moe", "qwen3-moe"}


def tiny(name: str, root: Path, **more: Any) -> Any:
    """A random model of the family, saved; its class."""
    config, changes = FAMILIES[name]
    torch.manual_seed(0)
    shape = {**SHAPE, **changes, **more}
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**shape))
    with torch.no_grad():  # zero biases and unit norms would hide what is not computed
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.2)
    model.save_pretrained(root / "base")
    AutoTokenizer.from_pretrained(MODELS / "tiny-llama-base").save_pretrained(root / "base")
    return type(model)


def lora(cls: Any, root: Path, name: str, **options: Any) -> Run:
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **options})
    peft = get_peft_model(cls.from_pretrained(root / "base"), config)
    randomize(peft)
    peft.save_pretrained(root / name)
    return read_run(root / name)


def supported(names: Any) -> list[Any]:
    def marks(name: str) -> list[pytest.MarkDecorator]:
        proves = pytest.mark.supports(method="peft_lora", family=name, targets=("onnx",))
        # llama's are those of test_onnx_decoder.py, Mixtral has Gemma 3's windows too, and what
        # embeddings are multiplied by, Gemma 3 has in test_continuous.py.
        proved = name in ("llama", "gemma", "gemma3", "mixtral")
        return [proves, *([pytest.mark.further] if proved else further(name))]

    return [pytest.param(name, marks=marks(name)) for name in names]


def adapted(name: str, factory: pytest.TempPathFactory) -> Case:
    """The family's model with two adapters as ONNX, made once for all files."""

    def make(root: Path) -> None:
        cls = tiny(name, root)
        # PEFT takes the experts of some for linear layers.
        targets = ATTENTION if name in ("mixtral", "qwen3-moe") else "all-linear"
        options = {"target_modules": targets, "fan_in_fan_out": name == "gpt2"}
        runs = {
            "one": lora(cls, root, "one", rank_pattern={r".*\.0\..*": 2}, **options),
            "two": lora(cls, root, "two", rank_pattern={r".*\.1\..*": 5}, **options),
        }
        write_onnx(open_base(root / "base"), root / "onnx", adapters=runs)

    root = made_once(factory, f"adapted-{name}", make)
    runs = {run: read_run(root / run) for run in ("one", "two")}
    return Case(root / "onnx", root / "base", runs)


@pytest.mark.parametrize("name", supported(FAMILIES))
def test_adapters(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    case = adapted(name, tmp_path_factory)
    check(case, 32)
    written = Decoder(case.folder).generate(PROMPTS, "one", Sampling(32, ignore_eos=True))
    assert len({token for row in written for token in row.tokens}) > 3  # it says different things


@pytest.mark.parametrize("size", [pytest.param(24, marks=pytest.mark.further), 20])
def test_heads_of_other_sizes(size: int, tmp_path: Path) -> None:
    """ONNX Runtime's attention takes multiples of 8, and with a rotary embedding in it of 16."""
    cls = tiny("llama", tmp_path, head_dim=size, **ONE_LAYER)
    run = lora(cls, tmp_path, "one", target_modules=ATTENTION)
    base = open_base(tmp_path / "base")
    if size % 8:
        with pytest.raises(DoraExportError, match="heads of this size"):
            write_onnx(base, tmp_path / "onnx", adapters={"one": run})
    else:
        write_onnx(base, tmp_path / "onnx", adapters={"one": run})
        check(Case(tmp_path / "onnx", base.path, {"one": run}), 16)


@pytest.mark.further
def test_the_tanh_form_of_gelu_behind_a_bias(tmp_path: Path) -> None:
    """ONNX Runtime's fusion of both knows the exact form alone."""
    cls = tiny("starcoder2", tmp_path, **ONE_LAYER)
    run = lora(cls, tmp_path, "one", target_modules=ATTENTION)
    base = open_base(tmp_path / "base")
    write_onnx(base, tmp_path / "onnx", run=run)
    assert verify(run, tmp_path / "onnx", base).max_abs < 1e-4


@pytest.mark.further
def test_positions_that_the_builder_does_not_stretch(tmp_path: Path) -> None:
    """Of Llama's kinds of rotary embedding onnxruntime-genai's builder heeds one alone."""
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    cls = tiny("llama", tmp_path, rope_parameters=rope, **ONE_LAYER)
    run = lora(cls, tmp_path, "one", target_modules=ATTENTION)
    base = open_base(tmp_path / "base")
    write_onnx(base, tmp_path / "onnx", run=run)
    assert verify(run, tmp_path / "onnx", base).max_abs < 1e-4


def test_a_configuration_without_the_length_of_its_context(tmp_path: Path) -> None:
    model = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=84, hidden_size=64, n_layer=1, n_head=4)
    )
    model.save_pretrained(tmp_path / "base")
    run = lora(type(model), tmp_path, "one", target_modules="all-linear")
    with pytest.raises(DoraExportError, match="how long its context is"):
        write_onnx(open_base(tmp_path / "base"), tmp_path / "onnx", run=run)


def test_a_model_that_transformers_itself_cannot_compute(tmp_path: Path) -> None:
    """DBRX as its class is configured: it clips to nothing, which torch refuses."""
    sizes = {"vocab_size": 84, "d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 64}
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}
    attention = {"kv_n_heads": 2, "rope_theta": 10000.0}
    config = transformers.DbrxConfig(
        **sizes, attn_config=attention, ffn_config=experts, tie_word_embeddings=False
    )
    model = transformers.DbrxForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    run = lora(type(model), tmp_path, "one", target_modules=["Wqkv"])
    with pytest.raises(DoraExportError, match="cannot compute this model"):
        write_onnx(open_base(tmp_path / "base"), tmp_path / "onnx", run=run)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "layer", ["hidden_size", pytest.param("intermediate_size", marks=pytest.mark.further)]
)
@pytest.mark.further
def test_layers_as_wide_as_the_vocabulary(layer: str, tmp_path: Path) -> None:
    """To onnxruntime-genai's builder each of them is a head."""
    cls = tiny("llama", tmp_path, **{"vocab_size": 128, layer: 128}, **ONE_LAYER)
    run = lora(cls, tmp_path, "one", target_modules="all-linear")
    base = open_base(tmp_path / "base")
    write_onnx(base, tmp_path / "onnx", adapters={"one": run})
    check(Case(tmp_path / "onnx", base.path, {"one": run}), 16)


@pytest.mark.parametrize("name", [pytest.param(n, marks=further(n)) for n in sorted(MOE)])
def test_experts_are_exported_merged(name: str, tmp_path: Path) -> None:
    cls = tiny(name, tmp_path, **ONE_LAYER)
    run = lora(
        cls,
        tmp_path,
        "experts",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    base = open_base(tmp_path / "base")
    with pytest.raises(DoraExportError, match="export it merged"):
        write_onnx(base, tmp_path / "out", adapters={"a": run})
    write_onnx(base, tmp_path / "out", run=run)
    result = verify(run, tmp_path / "out", base)
    assert result.passed
    assert result.control_fails


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    root = tmp_path_factory.mktemp("gpt2")
    cls = tiny("gpt2", root, n_layer=1)
    run = lora(cls, root, "one", target_modules="all-linear", fan_in_fan_out=True)
    return root, run


@pytest.mark.parametrize(
    ("precision", "bound"),
    [
        pytest.param("fp16", 0.005, marks=pytest.mark.further),
        pytest.param("int8", 0.05, marks=pytest.mark.further),
        ("int4", 0.5),
    ],
)
def test_precisions(gpt2: tuple[Path, Run], tmp_path: Path, precision: str, bound: float) -> None:
    """The error is within a share of the update's effect; steps agree with a run of all tokens."""
    (root, run), out = gpt2, tmp_path / "out"
    base = open_base(root / "base")
    write_onnx(base, out, adapters={"one": run}, precision=precision)
    result = verify(run, out, base)
    assert 1e-4 < result.max_abs <= bound * result.control
    decoder = Decoder(out)
    prompt = decoder.encode(PROMPTS[0])
    done = decoder.generate([prompt], "one", Sampling(16, ignore_eos=True))[0]
    logits = decoder.batch([prompt + done.tokens[:-1]], ["one"]).prefill_all()[0]
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == done.tokens


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    """As Gemma 3's are: the graph would answer NaN."""
    cls = tiny("llama", tmp_path, **ONE_LAYER)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(("up_proj.weight", "gate_proj.weight")):
            tensors[name] *= 2000
    save_file(tensors, file, {"format": "pt"})
    run, base = lora(cls, tmp_path, "one", target_modules=ATTENTION), open_base(tmp_path / "base")
    with pytest.raises(DoraExportError, match="not finite"):
        dora_serve.write_onnx(base, tmp_path / "out", run=run, precision="fp16")
    assert not (tmp_path / "out").exists()
    dora_serve.write_onnx(base, tmp_path / "out", run=run)
    assert verify(run, tmp_path / "out", base).passed


def test_genai_runs_what_torch_exported(tmp_path_factory: pytest.TempPathFactory) -> None:
    out = adapted("gpt2", tmp_path_factory).folder
    decoder = Decoder(out)
    prompt = decoder.encode(PROMPTS[0])
    model = og.Model(str(out))
    adapters = og.Adapters(model)
    adapters.load(str(out / "adapters" / "one.onnx_adapter"), "one")
    parameters = og.GeneratorParams(model)
    length = len(prompt) + 8
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.set_active_adapter(adapters, "one")
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    wanted = decoder.generate([prompt, prompt], ["one", None], Sampling(8, ignore_eos=True))
    assert found == wanted[0].tokens != wanted[1].tokens


def one_of(entry: dict[str, Any]) -> Any:
    """The runs of one base differ in how they are read alone, which is not tested here."""
    plain = entry["name"] == "llama"
    return pytest.param(entry, id=entry["name"], marks=() if plain else pytest.mark.further)


@pytest.mark.supports(method="dora", family="llama", targets=("onnx",))
@pytest.mark.parametrize("entry", [one_of(entry) for entry in LLAMAS])
def test_reference_runs_whose_base_has_no_tokenizer(entry: dict[str, Any], tmp_path: Path) -> None:
    run, base = read_run(REFERENCE / entry["checkpoint"]), open_base(REFERENCE / entry["base"])
    write_onnx(base, tmp_path / "out", run=run)
    result = verify(run, tmp_path / "out", base)
    assert result.passed
    assert result.control_fails
    decoder = Decoder(tmp_path / "out")
    done = decoder.generate([[5, 6, 7]], sampling=Sampling(4, ignore_eos=True))[0]
    assert len(done.tokens) == 4
    assert done.text == ""
    with pytest.raises(DoraExportError, match="give token ids"):
        decoder.generate(["a text"])
