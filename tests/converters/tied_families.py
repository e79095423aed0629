"""Families whose class has one tensor under several names, as tiny configurations."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import transformers

from tests.converters import families
from tests.converters.naming import QWEN3_VISION, TOKENS

DECODER = {**families.DECODER, "num_hidden_layers": 1, "head_dim": 8}
ENCODER = {**families.ENCODER, "num_hidden_layers": 1}
TRANSLATOR = {
    "d_model": 32,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
    "vocab_size": 80,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "vocab_size": 80,
    "decoder_start_token_id": 0,
}
EYES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
HYBRID = {
    **DECODER,
    "num_hidden_layers": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "full_attention_interval": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
    },
}
WHISPER = {
    **{key: value for key, value in TRANSLATOR.items() if key != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
KOSMOS = {
    "vocab_size": 80,
    "embed_dim": 32,
    "layers": 1,
    "ffn_dim": 48,
    "attention_heads": 4,
    "max_position_embeddings": 60,
}
CONVOLUTIONS = {
    "conv_dim": [32] * 3,
    "conv_kernel": [8, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
SPEAKS = {
    "vocab_size": 80,
    "hidden_size": 32,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
    **{f"speech_decoder_{part}net_units": 32 for part in ("pre", "post")},
    "num_mel_bins": 20,
    "speaker_embedding_dim": 16,
    "max_text_positions": 64,
    **CONVOLUTIONS,
}
SHARED = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Family:
    """`sides`: the modules that share a weight. `inner`: a layer that is adapted beside a side.
    `silent`: sides that the class does not compute with. `refused`: whether it cannot be untied.
    `biased`: whether the head has a bias, which PEFT leaves out where single rows are trained."""

    model: str
    config: str
    values: dict[str, Any]
    sides: tuple[str, ...]
    inner: str
    silent: tuple[str, ...] = ()
    refused: bool = False
    biased: bool = False
    inputs: tuple[str, ...] = ("input_ids",)
    default: bool = field(default=False, kw_only=True)

    def configuration(self) -> Any:
        """A new one; some classes take what they know out of the values they are given."""
        return getattr(transformers, self.config)(**deepcopy(self.values))


PAIR = ("input_ids", "decoder_input_ids")
EMBED = ("model.embed_tokens", "lm_head")
SEES = ("model.language_model.embed_tokens", "lm_head")


def _t5(name: str, *, default: bool = False, **values: Any) -> Family:
    return Family(
        f"{name}ForConditionalGeneration",
        f"{name}Config",
        {**T5, **values},
        ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
        "q",
        silent=("shared",),
        inputs=PAIR,
        default=default,
    )


def _translator(model: str, name: str, *, default: bool = False) -> Family:
    config = f"{name}Config"
    silent = SHARED[:1]
    return Family(
        model, config, TRANSLATOR, SHARED, "q_proj", silent=silent, inputs=PAIR, default=default
    )


def _masked(
    name: str,
    embedding: str,
    head: str,
    inner: str,
    *,
    values: dict[str, Any] = ENCODER,
    default: bool = False,
) -> Family:
    model, config = f"{name}ForMaskedLM", f"{name}Config"
    return Family(model, config, values, (embedding, head), inner, default=default, biased=True)


FAMILIES = {
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**DECODER, "tie_word_embeddings": True},
        EMBED,
        "q_proj",
        default=True,
    ),
    "llama, untied": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**DECODER, "tie_word_embeddings": False},
        EMBED,
        "q_proj",
    ),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", DECODER, EMBED, "q_proj"),
    "phi": Family(
        "PhiForCausalLM",
        "PhiConfig",
        {**{k: v for k, v in DECODER.items() if k != "head_dim"}, "tie_word_embeddings": True},
        EMBED,
        "q_proj",
        biased=True,
    ),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 80},
        ("transformer.word_embeddings", "lm_head"),
        "query_key_value",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 80, "n_positions": 40},
        ("transformer.wte", "lm_head"),
        "c_attn",
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32},
        ("model.decoder.embed_tokens", "lm_head"),
        "q_proj",
    ),
    "gpt-neox, untied": Family(  # whose head is embed_out on disk
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**DECODER, "max_position_embeddings": 40, "tie_word_embeddings": False},
        ("gpt_neox.embed_in", "lm_head"),
        "query_key_value",
        default=True,
    ),
    "mamba": Family(
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 80, "state_size": 4},
        ("backbone.embeddings", "lm_head"),
        "in_proj",
    ),
    "t5": _t5("T5", default=True),
    "umt5": _t5("UMT5"),
    "longt5": _t5("LongT5", local_radius=4),
    "switch": Family(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {**T5, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0},
        ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
        "q",
        refused=True,
        inputs=PAIR,
    ),
    "bart": _translator("BartForConditionalGeneration", "Bart", default=True),
    "mbart": _translator("MBartForConditionalGeneration", "MBart"),
    "marian": _translator("MarianMTModel", "Marian", default=True),  # reads all but `shared`
    "pegasus": _translator("PegasusForConditionalGeneration", "Pegasus"),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        ("model.decoder.embed_tokens", "proj_out"),
        "q_proj",
        inputs=("input_features", "decoder_input_ids"),
        default=True,
    ),
    "bert": _masked(
        "Bert", "bert.embeddings.word_embeddings", "cls.predictions.decoder", "query", default=True
    ),
    "roberta": _masked("Roberta", "roberta.embeddings.word_embeddings", "lm_head.decoder", "query"),
    "albert": _masked(
        "Albert",
        "albert.embeddings.word_embeddings",
        "predictions.decoder",
        "query",
        values={**ENCODER, "embedding_size": 16},
    ),
    "electra": _masked(
        "Electra",
        "electra.embeddings.word_embeddings",
        "generator_lm_head",
        "query",
        values={**ENCODER, "embedding_size": 16},
    ),
    "xlm-roberta": _masked(
        "XLMRoberta", "roberta.embeddings.word_embeddings", "lm_head.decoder", "query"
    ),
    "mpnet": _masked("MPNet", "mpnet.embeddings.word_embeddings", "lm_head.decoder", "q"),
    "modernbert": _masked(
        "ModernBert",
        "model.embeddings.tok_embeddings",
        "decoder",
        "Wqkv",
        values={**ENCODER, "global_attn_every_n_layers": 1},
    ),
    "deberta": _masked(
        "Deberta", "deberta.embeddings.word_embeddings", "cls.predictions.decoder", "in_proj"
    ),
    "deberta-v2": _masked(
        "DebertaV2", "deberta.embeddings.word_embeddings", "cls.predictions.decoder", "query_proj"
    ),
    "distilbert": _masked(
        "DistilBert",
        "distilbert.embeddings.word_embeddings",
        "vocab_projector",
        "q_lin",
        values={"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "vocab_size": 80},
    ),
    "qwen3.5, sees": Family(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {
            "text_config": HYBRID,
            "tie_word_embeddings": True,
            "vision_config": QWEN3_VISION,
            **TOKENS,
        },
        SEES,
        "q_proj",
        default=True,
    ),
    "gemma3, sees": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": DECODER,
            "vision_config": EYES,
            "mm_tokens_per_image": 4,
            "image_token_index": 75,
            "boi_token_index": 76,
            "eoi_token_index": 77,
        },
        SEES,
        r".*language_model.*q_proj",
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**DECODER, "model_type": "llama", "tie_word_embeddings": True},
            "vision_config": {**EYES, "model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 79,
        },
        SEES,
        r".*language_model.*q_proj",
    ),
    "blip": Family(
        "BlipForConditionalGeneration",
        "BlipConfig",
        {
            "text_config": {**ENCODER, "encoder_hidden_size": 32, "projection_dim": 32},
            "vision_config": EYES,
        },
        ("text_decoder.bert.embeddings.word_embeddings", "text_decoder.cls.predictions.decoder"),
        "query",
        inputs=("pixel_values", "input_ids"),
        biased=True,
    ),
    "blip-2": Family(
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {
            "text_config": OPT,
            "vision_config": EYES,
            "qformer_config": {**ENCODER, "encoder_hidden_size": 32},
            "num_query_tokens": 2,
            "image_token_index": 9,
        },
        ("language_model.model.decoder.embed_tokens", "language_model.lm_head"),
        "q_proj",
        inputs=("pixel_values", "input_ids"),
    ),
    "kosmos-2": Family(
        "Kosmos2ForConditionalGeneration",
        "Kosmos2Config",
        {"text_config": KOSMOS, "vision_config": EYES, "latent_query_num": 4},
        ("text_model.model.embed_tokens", "text_model.lm_head"),
        "q_proj",
        inputs=("pixel_values", "input_ids", "image_embeds_position_mask"),
        default=True,
    ),
    "speecht5, hears": Family(
        "SpeechT5ForSpeechToText",
        "SpeechT5Config",
        SPEAKS,
        ("speecht5.decoder.prenet.embed_tokens", "text_decoder_postnet.lm_head"),
        "q_proj",
        inputs=("input_values", "decoder_input_ids"),
    ),
    "trocr": Family(
        "VisionEncoderDecoderModel",
        "VisionEncoderDecoderConfig",
        {
            "encoder": {**EYES, "model_type": "vit"},
            "decoder": {
                **{k: v for k, v in TRANSLATOR.items() if not k.startswith("encoder")},
                "model_type": "trocr",
                "cross_attention_hidden_size": 32,
            },
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
        },
        ("decoder.model.decoder.embed_tokens", "decoder.output_projection"),
        "fc1",
        inputs=("pixel_values", "decoder_input_ids"),
    ),
}
