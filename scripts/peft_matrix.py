"""Write docs/peft.md: PEFT's own test configurations through merge, adapter and verify.

    python scripts/peft_matrix.py TESTS [--only PATTERN] [--output docs/peft.md]

TESTS is the folder `tests` of a checkout of huggingface/peft. Its tables of tuners and options are
read from there, never imported. Each configuration is put on a small transformers model with
random weights, its adapter gets random weights, and the truth is PEFT's live model in a fresh load.
Tables for models that are no transformers classes (an MLP, convolutions) are mapped to classes
with such layers, and keep their options.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.lora import config as lora_config

from converters.errors import DoraExportError
from converters.readers import ReadOptions, read_run
from dora_serve import api
from dora_serve.proof.verify import verify

ROOT = Path(__file__).parent.parent
BOUND = 1e-4
EQUAL, REFUSED, DIFFERENT, TRACEBACK = "equal", "refused", "different", "traceback"
NOT_MADE = "not made by PEFT"
VERBS = ("merge", "adapter", "verify")

TEXT = {"vocab_size": 96, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
HALF = {"num_key_value_heads": 2, "intermediate_size": 80, "pad_token_id": 0}
BERT = {**TEXT, "intermediate_size": 80, "max_position_embeddings": 64, "pad_token_id": 0}
OPT = {**TEXT, "ffn_dim": 80, "word_embed_proj_dim": 40, "max_position_embeddings": 64}
GPT = {"vocab_size": 96, "n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 64}
VIT = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
CONV = {"depths": [1, 1], "num_channels": 3, "image_size": 32, "layer_scale_init_value": 1.0}
EXPERTS = {**TEXT, **HALF, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}

# Name → the class of transformers and its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", OPT),
    "GPT2": ("GPT2LMHeadModel", GPT),
    "GPT2 untied": ("GPT2LMHeadModel", {**GPT, "tie_word_embeddings": False}),
    "GPTJ": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "Llama": ("LlamaForCausalLM", {**TEXT, **HALF}),
    "Qwen2": ("Qwen2ForCausalLM", {**TEXT, **HALF}),
    "Gemma3": ("Gemma3ForCausalLM", {**TEXT, **HALF, "head_dim": 8, "sliding_window": 8}),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 40, "d_ff": 80, "d_kv": 10, "num_layers": 2, "num_heads": 4},
    ),
    "Bart": (
        "BartForConditionalGeneration",
        {"vocab_size": 96, "d_model": 40, "max_position_embeddings": 64}
        | {f"{s}_{k}": n for s in ("encoder", "decoder") for k, n in
           (("layers", 2), ("attention_heads", 4), ("ffn_dim", 80))},
    ),
    "Bert": ("BertModel", BERT),
    "Roberta": ("RobertaModel", BERT),
    "Deberta": ("DebertaModel", {**BERT, "relative_attention": True, "pos_att_type": ["c2p"]}),
    "DebertaV2": ("DebertaV2Model", BERT),
    "DebertaV2 conv": ("DebertaV2Model", {**BERT, "conv_kernel_size": 3}),
    "DebertaV2 groups": ("DebertaV2Model", {**BERT, "conv_kernel_size": 3, "conv_groups": 2}),
    "Bert classifier": ("BertForSequenceClassification", BERT),
    "Roberta classifier": ("RobertaForSequenceClassification", BERT),
    "Llama classifier": ("LlamaForSequenceClassification", {**TEXT, **HALF}),
    "Llama4": (
        "Llama4ForCausalLM",
        {**EXPERTS, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 1},
    ),
    "GptOss": ("GptOssForCausalLM", EXPERTS),
    "ViT": (
        "ViTForImageClassification", {**VIT, "num_channels": 5, "patch_size": 3, "image_size": 9}
    ),
    "ViT 8": (
        "ViTForImageClassification",
        {**VIT, "hidden_size": 32, "num_channels": 8, "patch_size": 3, "image_size": 9},
    ),
    "ViT 1x1": ("ViTForImageClassification", {**VIT, "patch_size": 1, "image_size": 3}),
    "ConvNext": ("ConvNextForImageClassification", {**CONV, "hidden_sizes": [8, 16],
                                                    "num_stages": 2, "patch_size": 4}),
    "RegNet": (
        "RegNetForImageClassification",
        {**CONV, "hidden_sizes": [16, 32], "embedding_size": 8, "groups_width": 8},
    ),
    "VideoMAE": (
        "VideoMAEForVideoClassification",
        {**VIT, "image_size": 8, "patch_size": 4, "num_frames": 4, "num_channels": 3},
    ),
    "Siglip": ("SiglipVisionModel", {**VIT, "patch_size": 4, "image_size": 16}),
}  # fmt: skip

# A model of PEFT's tables → ours. A custom one also says which layer each of its layers becomes.
NAMED = {
    "OPT": "OPT", "GPT2": "GPT2", "GPTJ": "GPTJ", "LlamaForCausalLM": "Llama", "qwen2": "Qwen2",
    "Gemma3": "Gemma3", "T5": "T5", "Bart": "Bart", "BertModel": "Bert", "RobertaModel": "Roberta",
    "DebertaModel": "Deberta", "DebertaV2Model": "DebertaV2", "tiny-random-BertForSeq":
    "Bert classifier", "RobertaForSeq": "Roberta classifier", "LlamaForSeq": "Llama classifier",
    "Llama4": "Llama4", "GptOss": "GptOss",
}  # fmt: skip
_MLP = ("OPT", {"lin0": "fc1", "lin1": "fc2", "emb": "embed_tokens"})
_CONV = {"conv2d": "projection", "lin0": "q_proj", "conv3d": "projection", "conv1d": "conv.conv"}
CUSTOM: dict[str, tuple[str, dict[str, str]]] = {
    "MLP": _MLP, "MLP2": _MLP, "MlpUsingParameters": _MLP,
    "MLP_LayerNorm": ("OPT", {"layernorm0": "final_layer_norm", "layernorm1":
                              "self_attn_layer_norm", **_MLP[1]}),
    "EmbConv1D": ("GPT2 untied", {"emb": "wte", "conv1d": "c_attn", "lin0": "lm_head"}),
    "Conv1d": ("DebertaV2 conv", _CONV), "Conv1dBigger": ("DebertaV2 conv", _CONV),
    "Conv1dGroups": ("DebertaV2 groups", _CONV),
    "Conv2d": ("ViT", _CONV), "Conv2d2": ("ViT 8", _CONV), "Conv2d1x1": ("ViT 1x1", _CONV),
    "Conv2dGroups": ("ConvNext", {"conv2d": "dwconv"}),
    "Conv2dGroups2": ("RegNet", {"conv2d": "layer.1.convolution"}),
    "Conv3d": ("VideoMAE", {**_CONV, "lin0": "query"}),
    "MHA": ("Siglip", {"mha": "attention", "lin0": "fc1"}),
}  # fmt: skip
# Folder, file, and the name of its table; of custom models, or with the models in a second table.
TABLES = {
    "test_custom_models.py": "TEST_CASES",
    "test_decoder_models.py": "PEFT_DECODER_MODELS_TO_TEST",
    "test_encoder_decoder_models.py": "PEFT_ENCODER_DECODER_MODELS_TO_TEST",
    "test_feature_extraction_models.py": "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST",
    "test_seq_classifier.py": "PEFT_SEQ_CLS_MODELS_TO_TEST",
    "test_target_parameters.py": "ALL_CONFIGS",
}


class Case(NamedTuple):
    """One configuration of PEFT's tables, on a model of ours."""

    table: str
    model: str
    config: type[Any]
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.table} {self.model} {self.config.__name__} {self.options}"


def tables(path: Path) -> dict[str, Any]:
    """The lists that a file of PEFT's tests assigns, evaluated with PEFT's names alone."""
    names = {**vars(peft), **vars(lora_config)}
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("TEST_CASES", "ALL_CONFIGS") or name.endswith("_MODELS_TO_TEST"):
                found[name] = eval(compile(ast.Expression(node.value), path.name, "eval"), names)
    return found


def renamed(value: Any, names: dict[str, str]) -> Any:
    """The options of a custom model for ours: names of its layers become ours."""
    if isinstance(value, dict):
        return {renamed(k, names): renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    if isinstance(value, str):
        return re.sub(r"\b(\w+?)(?=\.weight$|$)", lambda m: names.get(m[1], m[1]), value)
    return value


def cases(tests: Path) -> Iterator[Case]:
    for file, table in TABLES.items():
        found = tables(tests / file)
        if table == "TEST_CASES":
            for _, model, config, options in found[table]:
                name, names = CUSTOM[model]
                own = renamed(options, names)
                for key in ("target_modules", "feedforward_modules"):
                    if isinstance(own.get(key), str):  # a pattern for the whole of a name
                        own[key] = rf".*\.{own[key]}"
                if "target_svd_config" in own:
                    start = "model.decoder.layers.0."
                    own["target_svd_config"] = {start + k: v for k, v in
                                                own["target_svd_config"].items()}  # fmt: skip
                yield Case(file, name, config, own)
            continue
        rows = found["ALL_CONFIGS"]
        if table != "ALL_CONFIGS":
            rows = [(model, *row) for model in found[table] for row in rows]
        for model, config, options in rows:
            yield Case(file, next(n for k, n in NAMED.items() if k in model), config, options)


def load(folder: Path, name: str) -> Any:
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def outputs(model: Any) -> torch.Tensor:
    """All that the model computes, from inputs longer than any window of ours."""
    seed = torch.Generator().manual_seed(3)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = [config.num_channels, config.image_size, config.image_size]
        frames = [config.num_frames] if hasattr(config, "num_frames") else []
        inputs = {"pixel_values": torch.randn(3, *frames, *size, generator=seed)}
    else:
        inputs = {"input_ids": torch.randint(5, 96, (3, 24), generator=seed)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(5, 96, (3, 12), generator=seed)
    with torch.no_grad():
        found = model(**inputs)
    wanted = ("logits", "last_hidden_state", "pooler_output")
    return torch.cat([found[key].float().flatten() for key in wanted if found.get(key) is not None])


def judge(found: torch.Tensor, truth: torch.Tensor) -> str:
    error = float((found - truth).abs().max() / max(1.0, float(truth.abs().max())))
    return EQUAL if error <= BOUND else f"{DIFFERENT}: by {error:.1e} of the largest value"


def train(case: Case, base: Path, out: Path) -> None:
    """An adapter whose every trained number was moved, as PEFT saves it."""
    torch.manual_seed(0)
    config = case.config(**copy.deepcopy(case.options))
    model = get_peft_model(load(base, MODELS[case.model][0]), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(out)


def reason(error: DoraExportError) -> str:
    return " ".join(error.message.split())


def run(case: Case, base: Path, work: Path) -> dict[str, str]:
    """Verb → what became of it, and why."""
    kind = MODELS[case.model][0]
    adapter, merged, written = work / "run", work / "merged", work / "written"
    try:
        train(case, base, adapter)
        live = PeftModel.from_pretrained(load(base, kind), str(adapter)).eval()
        truth = outputs(live)
    except Exception as error:
        return {"merge": f"{NOT_MADE}: {type(error).__name__}: {str(error)[:150]}"}
    results: dict[str, str] = {}

    def attempt(verb: str, judged: Any) -> bool:
        try:
            results[verb] = judged()
        except DoraExportError as error:
            results[verb] = f"{REFUSED}: {reason(error)}"
        except Exception:
            results[verb] = f"{TRACEBACK}: {traceback.format_exc().splitlines()[-1]}"
            traceback.print_exc()
        return results[verb] == EQUAL

    def merge() -> str:
        api.merge(read_run(adapter, ReadOptions(base=base)), merged, base=base)
        said = json.loads((merged / "config.json").read_text())["architectures"][0]
        if bool((outputs(load(base, kind)) - truth).abs().max() <= BOUND):
            results["effect"] = "none"
        return judge(outputs(load(merged, said)), truth)

    def write() -> str:
        api.write_adapter(read_run(adapter, ReadOptions(base=base)), written, base=base)
        return judge(outputs(PeftModel.from_pretrained(load(base, kind), str(written))), truth)

    def proof() -> str:
        result = verify(read_run(adapter, ReadOptions(base=base)), merged, base)
        return EQUAL if result.passed else f"{DIFFERENT}: {result}"

    if attempt("merge", merge):
        attempt("verify", proof)
    else:
        with contextlib.suppress(Exception):
            if judge(outputs(live.merge_and_unload()), truth) == EQUAL:
                results["PEFT merges"] = "yes"
    attempt("adapter", write)
    return results


def page(results: list[tuple[Case, dict[str, str]]]) -> str:
    """The tables of docs/peft.md."""
    counts: dict[str, Counter[str]] = {verb: Counter() for verb in VERBS}
    reasons: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for case, found in results:
        for verb in VERBS:
            state, _, why = found.get(verb, "").partition(": ")
            if state:
                counts[verb][state] += 1
            if why:
                reasons[verb, f"{state}: {why}"][case.config.__name__.removesuffix("Config")] += 1
    return json.dumps([counts, list(reasons.items())], default=str, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--only", default="", help="a pattern that a configuration's text holds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(arguments.tests):
            if not re.search(arguments.only, str(case)):
                continue
            base, work = Path(folder) / case.model.replace(" ", "-"), Path(folder) / "work"
            if not base.exists():
                kind, options = MODELS[case.model]
                torch.manual_seed(0)
                cls = getattr(transformers, kind)
                cls(cls.config_class(**options)).save_pretrained(base)
            start = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                found = run(case, base, work)
            shutil.rmtree(work, ignore_errors=True)
            results.append((case, found))
            print(f"{time.monotonic() - start:.1f}s {case}\n    {found}", flush=True)
    (arguments.output or Path("/dev/stdout")).write_text(page(results))
    bad = (DIFFERENT, TRACEBACK)
    return int(any(text.startswith(bad) for _, found in results for text in found.values()))


if __name__ == "__main__":
    sys.exit(main())
