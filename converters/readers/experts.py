"""Which of a layer's experts a run adapts, where those are not all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

# `experts.3.up_proj` and `experts.up_projs.3`; fused, `experts.up_proj[3]`.
_FORMS = (
    re.compile(r"(?P<all>.+\.experts)\.(?P<one>\d{1,9})\.(?P<kind>\w+)"),
    re.compile(r"(?P<all>.+\.experts)\.(?P<kind>\w+)\.(?P<one>\d{1,9})"),
    re.compile(r"(?P<all>.+\.experts)\.(?P<kind>\w+)\[(?P<one>\d{1,9})\]"),
)
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def partial_experts(modules: Iterable[str], config: Mapping[str, object]) -> Iterator[str]:
    """A warning where `modules`, the updates of a run, are of some of the experts that the base's
    `config` counts, for the first such layer and the number of others."""
    inner = config.get("text_config")
    said = {**config, **(inner if isinstance(inner, dict) else {})}
    count = next((n for key in _COUNTS if isinstance(n := said.get(key), int)), 0)
    found: dict[str, set[int]] = {}
    for module in modules:
        match = next((m for form in _FORMS if (m := form.fullmatch(module))), None)
        if match is not None:
            found.setdefault(f"{match['all']}.{match['kind']}", set()).add(int(match["one"]))
    part = {name: experts for name, experts in found.items() if len(experts) < count}
    if part:
        name, experts = next(iter(part.items()))
        more = f", and of {len(part) - 1} more likewise" if len(part) > 1 else ""
        yield (
            f"the run adapts {len(experts)} of the {count} experts of {name}{more}: the others "
            "stay as they are in the base"
        )
