"""What each engine can read of a LoRA adapter: data, so that a new engine is a new entry.

Sources, by engine: huggingface/peft `src/peft/tuners/lora/`; vllm-project/vllm
`vllm/lora/peft_helper.py`, `vllm/config/lora.py`; sgl-project/sglang
`python/sglang/srt/lora/{lora.py,lora_config.py,lora_manager.py,mem_pool.py}`; predibase/lorax
`server/lorax_server/adapters/lora.py`, `server/lorax_server/models/flash_*.py`;
ggml-org/llama.cpp `src/llama-adapter.{h,cpp}`, `convert_lora_to_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Reading:
    """How an engine computes a module's scale from `adapter_config.json`.

    `patterns`: by rank_pattern and alpha_pattern; else by `lora_alpha` and `r` alone.
    `stored_rank`: divides by the rank of the tensor. `rslora`: knows `use_rslora`.
    """

    patterns: bool = False
    stored_rank: bool = False
    rslora: bool = False


@dataclass(frozen=True)
class Profile:
    """`whole_modules`: modules trained whole that it loads, None for any. `max_rank`: its limit,
    and `slots`: the values its own limit may be set to.

    `biases`, `convolutions`: whether it loads trained biases and adapters on those. `embeddings`:
    the model types with which it loads adapters on embeddings, None for any.
    `features`: further fields of the configuration that it understands.
    `kinds`: last names of the modules it can adapt, None for any. `unadapted`: model type → those
    that it cannot adapt there, `ALL` for every one. `together`: kinds that it loads only all or
    none. `uniform`: it stores every kind of module in every layer at one rank, so
    that what the run lacks is written as zeros; `drops`: it leaves out a kind that one layer
    lacks. `prefix`: it knows a tensor only by PEFT's prefix. `conv1d`: it reads PEFT's adapters
    on Conv1D layers. `text_models`: it loads the text model of a multimodal base by itself, where
    that was trained; else always the whole.
    `reading`: how it takes the scale; `older`: versions that took it another way.
    """

    name: str
    whole_modules: frozenset[str] | None
    max_rank: int | None
    biases: bool
    embeddings: frozenset[str] | None
    convolutions: bool = False
    features: frozenset[str] = frozenset()
    kinds: frozenset[str] | None = None
    unadapted: Mapping[str, frozenset[str]] = field(default_factory=dict)
    together: tuple[tuple[str, ...], ...] = ()
    uniform: bool = False
    drops: bool = False
    prefix: bool = False
    conv1d: bool = True
    text_models: bool = False
    slots: tuple[int, ...] = ()
    reading: Reading = field(default_factory=Reading)
    older: Mapping[str, Reading] = field(default_factory=dict)

    def embeds(self, model_type: object) -> bool:
        """Whether it loads adapters on the embeddings of a base of this type."""
        return self.embeddings is None or str(model_type) in self.embeddings

    def adapts(self, module: str, model_type: object) -> bool:
        """Whether it adapts `module` of a base of this type, as far as the type is known."""
        lacks = self.unadapted.get(str(model_type), _NOTHING)
        return not lacks & {ALL, module.rsplit(".", 1)[-1]}


ALL = "*"
_NOTHING: frozenset[str] = frozenset()
_LLAMA_KINDS = frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
_SGLANG_KINDS = _LLAMA_KINDS | {"qkv_proj", "gate_up_proj"}
_LORAX_KINDS = _LLAMA_KINDS | set(
    "lm_head qkv_proj gate_up_proj dense fc1 fc2 c_attn c_proj c_fc w1 w2 w3 Wqkv out_proj "
    "query_key_value dense_h_to_4h dense_4h_to_h".split()
)
# vLLM 0.32, `vllm/model_executor/models/`: classes without `SupportsLoRA`, or not there at all.
# RoBERTa's have it, but load no head of two layers, and do not start with --lora-target-modules.
_VLLM_WITHOUT = (
    "albert bart bert bloom deberta deberta-v2 distilbert electra falcon gpt2 gptj mamba mamba2 "
    "mbart modernbert mt5 roberta stablelm t5 vit xlm-roberta"
).split()
# Classes whose `embedding_modules` lack the head.
_VLLM_WITHOUT_HEAD = (
    "cohere cohere2 gemma gemma2 gemma3_text glm glm4 gpt_bigcode gpt_neox mistral olmo olmo2 "
    "olmoe opt phi qwen2 qwen2_moe smollm3 starcoder2"
).split()
_VLLM_UNADAPTED = {
    **dict.fromkeys(_VLLM_WITHOUT, frozenset({ALL})),
    **dict.fromkeys(_VLLM_WITHOUT_HEAD, frozenset({"lm_head", "embed_out"})),
}
# Classes whose `embedding_modules` name the embedding.
_VLLM_EMBEDDINGS = frozenset(
    "apertus cohere cohere2 exaone4 falcon_h1 granite granitemoe granitemoehybrid granitemoeshared "
    "jamba lfm2 lfm2_moe llama minicpm mixtral nemotron phimoe qwen3".split()
)
# Multimodal types whose class takes `model.…` for the text model (`hf_to_vllm_mapper`).
VLLM_TEXT_NAMES = frozenset("ernie4_5_vl_moe mistral3 paddleocr_vl qwen2_5_vl qwen2_vl".split())
_PEFT_FEATURES = frozenset(
    "use_dora lora_bias target_parameters trainable_token_indices layer_replication "
    "alora_invocation_tokens".split()
)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "peft",
            None,
            None,
            biases=True,
            embeddings=None,
            convolutions=True,
            features=_PEFT_FEATURES,
            prefix=True,
            text_models=True,
            reading=Reading(patterns=True, rslora=True),
        ),
        Profile(
            "vllm",
            frozenset({"classifier", "score"}),
            512,
            biases=False,
            embeddings=_VLLM_EMBEDDINGS,
            unadapted=_VLLM_UNADAPTED,
            slots=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            reading=Reading(patterns=True, rslora=True),
            older={"vLLM up to 0.30": Reading(rslora=True)},
        ),
        # One buffer per kind of module, sliced and scaled by the configuration's r and lora_alpha;
        # q, k and v (gate and up) are stacked, and a layer without weights keeps what was there.
        Profile(
            "sglang",
            _NOTHING,
            None,
            biases=False,
            embeddings=_NOTHING,
            kinds=_SGLANG_KINDS,
            together=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
            uniform=True,
        ),
        # The layers of one kind are stacked; a kind that is absent in one layer is left out in all.
        Profile(
            "lorax",
            _NOTHING,
            None,
            biases=False,
            embeddings=_NOTHING,
            kinds=_LORAX_KINDS,
            uniform=True,
            drops=True,
            prefix=True,
            reading=Reading(rslora=True),
        ),
        # scale = alpha / rank of the tensor; any trained tensor beside A and B is refused.
        Profile(
            "gguf",
            _NOTHING,
            None,
            biases=False,
            embeddings=None,
            conv1d=False,
            reading=Reading(stored_rank=True),
        ),
    )
}
PEFT = PROFILES["peft"]
# It needs no prefix and does not find the magnitudes of DoRA (`transformers/integrations/peft.py`).
TRANSFORMERS = replace(
    PEFT, name="transformers", prefix=False, features=PEFT.features - {"use_dora"}
)
