"""What each engine can read of a LoRA adapter: data, so that a new engine is a new entry.

Sources, by engine: huggingface/peft `src/peft/tuners/lora/`; vllm-project/vllm
`vllm/lora/{peft_helper,model_manager,lora_weights}.py`, `vllm/config/lora.py`; sgl-project/sglang
`python/sglang/srt/lora/{lora.py,lora_config.py,lora_manager.py,mem_pool.py}`; predibase/lorax
`server/lorax_server/adapters/lora.py`, `server/lorax_server/models/flash_*.py`;
ggml-org/llama.cpp `src/llama-adapter.{h,cpp}`, `src/models/`, `convert_lora_to_gguf.py`,
`conversion/`.
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
    `experts`: the projections that it needs of every expert of a layer where one is adapted.
    `experts_in`: model type → how its class there calls the experts of a layer, where that is
    another name than in memory: by the latter it finds nothing, and says nothing. `fused`: model
    types whose adapters on fused experts it reads as PEFT stores them, all parameters or none.
    `kinds`: last names of the modules it can adapt, None for any. `unadapted`: model type → those
    that it cannot adapt there, `ALL` for every one, and class → the same where that differs.
    `together`: kinds that it loads
    only all or none. `uniform`: it stores every kind of module in every layer at one rank, so
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
    experts: tuple[frozenset[str], ...] = ()
    experts_in: Mapping[str, str] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
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

    def adapts(self, module: str, model_type: object, architecture: str = "") -> bool:
        """Whether it adapts `module` of a base of this type and class, as far as they are known."""
        of_type = self.unadapted.get(str(model_type), _NOTHING)
        lacks = self.unadapted.get(architecture, of_type)
        return not lacks & {ALL, module.rsplit(".", 1)[-1]}


ALL = "*"
_NOTHING: frozenset[str] = frozenset()
_LLAMA_KINDS = frozenset("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
_EXPERTS = (frozenset({"gate_proj", "up_proj", "down_proj"}), frozenset({"w1", "w2", "w3"}))
_SGLANG_KINDS = _LLAMA_KINDS | {"qkv_proj", "gate_up_proj"}
_LORAX_KINDS = _LLAMA_KINDS | set(
    "lm_head qkv_proj gate_up_proj dense fc1 fc2 c_attn c_proj c_fc w1 w2 w3 Wqkv out_proj "
    "query_key_value dense_h_to_4h dense_4h_to_h".split()
)
# vLLM 0.32, `vllm/model_executor/models/`: classes without `SupportsLoRA`, or not there at all and
# not fit for its Transformers backend (`is_backend_compatible`).
# RoBERTa's classifiers have it, but load no head of two layers.
_VLLM_WITHOUT = (
    "albert bamba bart bert big_bird bigbird_pegasus biogpt blenderbot blenderbot-small "
    "bloom blt bros canine codegen cohere2_moe convbert cpmant dbrx deberta deberta-v2 "
    "deepseek_v4 distilbert electra falcon falcon_mamba flaubert fnet fsmt funnel gemma3n "
    "gemma3n_text git gpt-sw3 gpt2 gpt_neo gpt_neox_japanese gptj gte hrm_text ibert "
    "kimi_linear layoutlm layoutlmv2 layoutlmv3 led lilt longformer longt5 luke m2m_100 "
    "mamba mamba2 marian markuplm mbart megatron-bert mimo_v2_flash modernbert mpnet mpt mra "
    "mt5 musicgen musicgen_melody mvp nllb-moe nomic_bert nystromformer openai-gpt "
    "openai_privacy_filter pegasus perceiver plbart prophetnet reformer rembert roberta "
    "roformer rwkv speech_to_text squeezebert stablelm switch_transformers t5 tapas trocr "
    "umt5 vit whisper xglm xlm xlm-roberta xlnet xlstm yoso zamba zamba2"
).split()
# Classes whose `embedding_modules` lack the head, those of the Transformers backend among them.
_VLLM_WITHOUT_HEAD = (
    "afmoe arcee axk1 axk2 bitnet cohere cohere2 cwm deepseek_v2 deepseek_v3 deepseek_v32 "
    "diffllama doge dots1 emu3 ernie4_5_moe flex_olmo gemma gemma2 gemma3 gemma3_text gemma4 "
    "gemma4_text gemma4_unified glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_bigcode gpt_neox "
    "gpt_oss helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 jais2 jetmoe laguna longcat_flash "
    "mellum minimax minimax_m2 ministral ministral3 mistral nanochat olmo olmo2 olmo3 olmo_hybrid "
    "olmoe opt persimmon phi qwen2 qwen2_moe qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma "
    "seed_oss smollm3 solar_open starcoder2 vaultgemma youtu zaya"
).split()
_VLLM_UNADAPTED = {
    **dict.fromkeys(_VLLM_WITHOUT, frozenset({ALL})),
    **dict.fromkeys(_VLLM_WITHOUT_HEAD, frozenset({"lm_head", "embed_out"})),
    "Gemma3TextModel": frozenset({ALL}),  # Gemma's embedder; with a head the class has it
    # Embedders, whose classes there have it where those with a head have it not.
    **dict.fromkeys(("BertModel", "ModernBertModel", "RobertaModel", "XLMRobertaModel"), _NOTHING),
}
# Classes whose `embedding_modules` name the embedding.
_VLLM_EMBEDDINGS = frozenset(
    "apertus cohere cohere2 ernie4_5 exaone4 exaone_moe falcon_h1 granite granite_swa granitemoe "
    "granitemoe_swa granitemoehybrid granitemoeshared hyperclovax jamba lfm2 lfm2_moe llama llama4 "
    "llama4_text minicpm minicpm3 mixtral nemotron nemotron_h phi3 phimoe qwen3 qwen3_moe".split()
)
# Multimodal types whose class takes `model.…` for the text model (`hf_to_vllm_mapper`).
VLLM_TEXT_NAMES = frozenset("ernie4_5_vl_moe mistral3 paddleocr_vl qwen2_5_vl qwen2_vl".split())
# PEFT 0.21, `tuners_utils.py`: scans over states read these weights in their own kernels.
_PEFT_UNADAPTED = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"),
    frozenset({"out_proj", "conv1d"}),
)
# llama.cpp of llama-cpp-python 0.3.36: types none of whose classes `conversion/` knows.
_LLAMA_CPP_WITHOUT = (
    "albert bart bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blt "
    "canine codegen convbert cpmant ctrl cwm data2vec-text deberta deberta-v2 diffllama doge "
    "electra ernie esm flaubert flex_olmo fnet fsmt funnel gpt_neo gpt_neox_japanese gptj helium "
    "ibert jetmoe led longcat_flash longformer longt5 luke m2m_100 marian mbart megatron-bert "
    "mobilebert modernbert-decoder mpnet mra mvp nanochat nllb-moe nystromformer olmo_hybrid "
    "openai-gpt opt pegasus pegasus_x perceiver persimmon plbart prophetnet recurrent_gemma "
    "reformer rembert roberta-prelayernorm roc_bert roformer squeezebert switch_transformers "
    "t5gemma vaultgemma xglm xlm xlm-roberta-xl xlnet xlstm xmod yoso zamba zamba2"
).split()
# Weights that a graph in `src/models/` multiplies or looks up without `build_lora_mm`: an adapter
# on one is loaded, and left out without a word, or refused by its shape.
_LATENT = frozenset("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj".split())
_INDEXED = frozenset({"q_proj", "lm_head", "wq_b", "wk", "weights_proj"})
_PLACES = frozenset({"position_embeddings", "token_type_embeddings"})
_LLAMA_CPP_UNADAPTED = {
    **dict.fromkeys(_LLAMA_CPP_WITHOUT, frozenset({ALL})),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), _LATENT | {"q_proj", "lm_head"}
    ),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "hy_v4"), _LATENT | _INDEXED),
    "kimi_linear": _LATENT
    | set("q_proj k_proj v_proj o_proj f_a_proj f_b_proj b_proj g_a_proj g_b_proj lm_head".split()),
    "minicpm3": _LATENT,
    **dict.fromkeys(("gpt2", "gpt_bigcode"), frozenset({"wpe"})),
    **dict.fromkeys(
        ("bert", "camembert", "distilbert", "nomic_bert", "roberta", "xlm-roberta"), _PLACES
    ),
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
        frozenset({"embed_tokens_per_layer", "per_layer_model_projection", "modality_router"}),
    ),
    "nemotron_h": frozenset({"fc1_latent_proj", "fc2_latent_proj"}),
    # No tensor of the head: the embedding's takes its place.
    **dict.fromkeys(("gemma", "gemma2"), frozenset({"embed_tokens", "lm_head"})),
}
_PEFT_FEATURES = frozenset(
    "use_dora lora_bias target_parameters trainable_token_indices layer_replication "
    "alora_invocation_tokens use_bdlora velora_config monteclora_config kasa_config".split()
)

# Engine → model types of which it drops a head that is not the embedding (`conversion/gemma.py`,
# `vllm/model_executor/models/{commandr,cohere2_moe}.py`).
HEADLESS = {
    "llama.cpp": frozenset({"gemma", "gemma2"}),
    "vLLM": frozenset({"cohere", "cohere2", "cohere2_moe"}),
}

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
            unadapted=_PEFT_UNADAPTED,
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
            experts=_EXPERTS,
            experts_in={"mixtral": "block_sparse_moe.experts"},
            fused=frozenset({"gpt_oss"}),
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
            unadapted=_LLAMA_CPP_UNADAPTED,
            reading=Reading(stored_rank=True),
        ),
    )
}
PEFT = PROFILES["peft"]
# It needs no prefix, does not find the magnitudes of DoRA (`transformers/integrations/peft.py`),
# and looks for no invocation in a text, which PEFT's own model does.
TRANSFORMERS = replace(
    PEFT,
    name="transformers",
    prefix=False,
    features=PEFT.features - {"use_dora", "alora_invocation_tokens"},
)
