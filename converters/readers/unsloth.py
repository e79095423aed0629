"""What unsloth leaves in a PEFT folder that PEFT reads otherwise than it was trained.

Of a fused parameter of experts `lora_B` is `[out, r, experts]` in PEFT. Unsloth's own forward took
it for `[out, experts, r]` until 2026.9.6, in the families that it computed itself, and does since
where it is told to, which the configuration then says (`lora_B_layout`; `saved_lora_b_layouts` and
`convert_legacy_lora_b` in unsloth_zoo, whose loader turns such runs). And it begins PiSSA with
another singular value decomposition than PEFT repeats, which a file beside the adapter tells
(`record_fast_pissa`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import DoraExportError
from ..files.json_files import read_json
from ..model.base import open_base
from ..model.match import classes
from ..options import ReadOptions
from ..run import Run
from .peft_common import need_base
from .run_folder import WEIGHT_FILES

DETAIL = "unsloth_fused_expert_lora"  # by parameter, where not all agree
LAYOUT = "lora_B_layout"
_GROUPED, _PEFTS = "grouped_by_expert", "rank_major"
_PARAMETERS = ("gate_up_proj", "down_proj")  # those that its own forward computes
# Whose forward of before 2026.9.6 was its own; in the others PEFT's ran.
_FAMILIES = frozenset(
    "deepseek_v3 ernie4_5_moe ernie4_5_vl_moe gemma4 glm4_moe glm4_moe_lite gpt_oss lfm2_moe "
    "mixtral qwen3_5_moe qwen3_moe qwen3_next qwen3_vl_moe".split()
)
_PISSA = "unsloth_lora_init.json"


def by_expert(
    config: Mapping[str, object],
    parameters: Collection[str],
    run: Run,
    file: Path,
    options: ReadOptions,
) -> frozenset[str]:
    """Those of `parameters`, of experts and of more than one rank, whose `lora_B` lies expert by
    expert. Of an older version the base tells, and is needed, since the configuration does not."""
    own = [name for name in parameters if name.rpartition(".")[2] in _PARAMETERS]
    said = _said(config)
    if said is not None:
        return frozenset(n for n in own if said.get(n.rpartition(".")[2]) == _GROUPED)
    if not own or not _is_older(config):
        return frozenset()
    need_base(options, "which way this version of unsloth laid lora_B of experts", file)
    assert options.base is not None
    known = classes(run.task, run.num_labels, open_base(options.base))
    names = known.whole.names
    named = {name: known.tensor(name) for name in own}
    owners = {
        name: names.model.get_submodule(found.rpartition(".")[0])
        for name, found in named.items()
        if found is not None and found in names.state
    }
    return frozenset(name for name, owner in owners.items() if _family(type(owner)) in _FAMILIES)


def not_said(turned: Collection[str], config: Mapping[str, object]) -> Iterator[str]:
    """A warning where no more than the age of a run tells that its `lora_B` lies so."""
    if turned and _said(config) is None:
        yield (
            "lora_B of experts is read expert by expert, as unsloth before 2026.9.6 trained it "
            f"and its loader reads it; of a run with UNSLOTH_MOE_LORA_MERGED=1 add {LAYOUT!r}: "
            f"{_PEFTS!r} to adapter_config.json"
        )


def laid_by_expert(config: Mapping[str, object]) -> bool:
    """Whether PEFT may read a run's `lora_B` of experts otherwise than it was trained, which it
    does in silence."""
    said = _said(config)
    return _is_older(config) if said is None else _GROUPED in said.values()


def began_otherwise(folder: Path) -> bool:
    """Whether the adapter in `folder` began with unsloth's own decomposition. A later adapter in
    the same folder is not the one that the file tells of."""
    with suppress(DoraExportError, OSError):
        expected = read_json(folder / _PISSA).get("sha256")
        file = next((folder / n for n in WEIGHT_FILES if (folder / n).is_file()), None)
        if file is not None:
            with file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() == expected
    return False


def _said(config: Mapping[str, object]) -> dict[str, object] | None:
    """Parameter → how its `lora_B` lies, by the configuration or what PEFT copied of it."""
    mapping = config.get("auto_mapping")
    for source in (config, mapping if isinstance(mapping, Mapping) else {}):
        detail = source.get(DETAIL)
        each = detail.get("parameters") if isinstance(detail, Mapping) else None
        if isinstance(each, Mapping):
            return {n: e.get(LAYOUT) for n, e in each.items() if isinstance(e, Mapping)}
        if source.get(LAYOUT) in (_GROUPED, _PEFTS):
            return dict.fromkeys(_PARAMETERS, source[LAYOUT])
    return None


def _is_older(config: Mapping[str, object]) -> bool:
    """Whether unsloth saved a run for parameters of experts; asked where it says nothing of them,
    as it does since 2026.9.6."""
    mapping = config.get("auto_mapping")
    ours = isinstance(mapping, Mapping) and mapping.get("unsloth_fixed")
    return bool(ours and config.get("target_parameters"))


def _family(owner: type) -> str:
    """`qwen3_moe` of a class of transformers."""
    parts = owner.__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""
