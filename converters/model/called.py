"""Modules whose weights their class reads without calling them: PEFT's layers around them do
nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from ..errors import TargetError
from ..run import Run
from .base import BaseModel

# Model type → the modules whose weights its class reads without calling them, so that an adapter
# on them does nothing. Of a quantized base some are called.
_UNCALLED = {
    "mobilebert": ("cls.predictions.decoder", "cls.predictions.dense"),
    "longcat_flash": ("router.classifier",),
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino"), ("reference_points",)),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), ("dt_proj",)),
    "wavlm": tuple(f"attention.{kind}_proj" for kind in ("q", "k", "v", "out")),
    **dict.fromkeys(
        ("glm4v_vision", "glm4v_moe_vision", "siglip2_vision_model", "hunyuan_vl_vision"),
        ("position_embedding",),
    ),
}
# The same of every type: tables of positions and queries, convolutions over time, and those before
# a scan over states or a linear attention.
_TABLES = re.compile(
    r"(.*\.)?(embed_positions|rel_pos(_[xy])?_bias|ngram_embeddings|level_embed|tdnn\.\d+\.kernel"
    r"|query_(position_embeddings|refpoint_embeddings|feat|embed)|reference_point_embed"
    r"|queries_(embedder|features)|(iou|hq|obj_score|presence)_token|mask_tokens|no_mask_embed"
    r"|not_a_point_embed|(mixer|mamba|linear_attn)\.conv1d|bbox_attention\.k_(proj|linear))"
)


def check_called(run: Run, base: BaseModel) -> None:
    """Raise `TargetError` for a module of `run`, under its name in memory, whose weight the base's
    class reads without calling it."""
    for module in run.updates:
        if not is_called(module, run.updates, base):
            raise TargetError(
                "the base's class reads the weight of this module without calling it, so that an "
                "adapter on it does nothing, in training neither",
                file=run.path,
                tensor=module,
                found=base.config.get("model_type"),
                remedy="train it whole (modules_to_save), or take its tensors out of the run",
            )


def is_called(module: str, adapted: Collection[str], base: BaseModel) -> bool:
    """Whether the base's class calls `module`, named as in memory, beside which all of `adapted`
    is; else it only reads its weight."""
    if base.stored is not None or base.packed:
        return True
    names = [name for kind in _types(base.config) for name in _UNCALLED.get(kind, ())]
    owner = module.removesuffix(".out_proj")  # of torch's MultiheadAttention
    inside = owner != module and f"{owner}.in_proj_weight" not in adapted
    return not (
        any(f".{module}".endswith(f".{name}") for name in names)
        or _TABLES.fullmatch(module)
        or (inside and base.find(f"{owner}.in_proj_weight") is not None)
    )


def _types(config: Mapping[str, object]) -> Iterator[str]:
    """The types of a model and of those that it is made of."""
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _types(value)
    yield str(config.get("model_type"))
