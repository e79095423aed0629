"""The configurations of PEFT's own tests, each on a small model of transformers.

The tables are read from a checkout of huggingface/peft, none of whose code is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
from peft.tuners.lora import config as lora_config

TEXT = {"vocab_size": 96, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
HALF = {"num_key_value_heads": 2, "intermediate_size": 80, "pad_token_id": 0}
BERT = {**TEXT, "intermediate_size": 80, "max_position_embeddings": 128, "pad_token_id": 0}
OPT = {**TEXT, "ffn_dim": 80, "word_embed_proj_dim": 40, "max_position_embeddings": 128}
GPT = {"vocab_size": 96, "n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 128}
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
        {"vocab_size": 96, "d_model": 40, "max_position_embeddings": 128}
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
    "ConvNext": ("ConvNextForImageClassification", {**CONV, "hidden_sizes": [8, 8],
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
    "CLIP text": ("CLIPTextModel", {**TEXT, "intermediate_size": 80, "eos_token_id": 2}),
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
# File of PEFT's tests → its table of custom models, of models, or of both with options.
PAIRS = "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"
TABLES = {
    "test_custom_models.py": "TEST_CASES",
    "test_stablediffusion.py": "DIFFUSERS_CONFIGS",
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
            if name in (*TABLES.values(), PAIRS, "ALL_CONFIGS"):
                found[name] = eval(compile(ast.Expression(node.value), path.name, "eval"), names)
    return found


def renamed(value: Any, names: dict[str, str]) -> Any:
    """The options of a custom model for ours: names of its layers become ours."""
    if isinstance(value, dict):
        return {renamed(k, names): renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    if isinstance(value, lora_config.BdLoraConfig):
        return type(value)(**renamed(vars(value), names))
    if isinstance(value, str):
        return re.sub(r"\b(\w+?)(?=\.weight$|$)", lambda m: names.get(m[1], m[1]), value)
    return value


def _custom(file: str, model: str, config: type[Any], options: dict[str, Any]) -> Case:
    """A configuration for one of PEFT's own small models."""
    name, names = CUSTOM[model]
    own = renamed(options, names)
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(own.get(key), str):  # a pattern for the whole of a name
            own[key] = rf".*\.{own[key]}"
    if "target_svd_config" in own:
        start = "model.decoder.layers.0."
        own["target_svd_config"] = {start + k: v for k, v in own["target_svd_config"].items()}
    return Case(file, name, config, own)


def cases(tests: Path) -> Iterator[Case]:
    for file, table in TABLES.items():
        found = tables(tests / file)
        if table == "TEST_CASES":
            for _, model, config, options in found[table]:
                yield _custom(file, model, config, options)
            for _, tuner, config, *both in found[PAIRS]:  # of two adapters, one at a time
                model = "EmbConv1D" if tuner == "lora+trainable_tokens" else "MLP"
                for options in both if both[0] != both[1] else both[:1]:
                    yield _custom(file, model, config, options)
            continue
        if table == "DIFFUSERS_CONFIGS":
            for config, parts in found[table]:
                yield Case(file, "CLIP text", config, parts["text_encoder"])
            continue
        rows = found["ALL_CONFIGS"]
        if table != "ALL_CONFIGS":
            rows = [(model, *row) for model in found[table] for row in rows]
        for model, config, options in rows:
            yield Case(file, next(n for k, n in NAMED.items() if k in model), config, options)
