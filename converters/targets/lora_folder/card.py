"""The adapter's model card: base, method and rank table, as a README.md the hub understands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...fit import FitReport, percent

if TYPE_CHECKING:
    from .adapter import AdapterPlan

_PEFT_USAGE = """```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```"""


def model_card(plan: AdapterPlan, library: str = "peft", usage: str = _PEFT_USAGE) -> str:
    """Markdown with the hub's metadata block; `usage`: how `library` loads it."""
    run, ranks, fit = plan.run, plan.ranks, plan.run.fit
    base = plan.config.get("base_model_name_or_path")
    kept = sum(rank for _, rank in ranks.values())
    started = sum(start or 0 for start, _ in ranks.values())
    rows = "\n".join(
        f"| `{module}` | {start or ''} | {rank} |"
        + ("" if fit is None else f" {_error(fit, module)} |")
        for module, (start, rank) in ranks.items()
    )
    columns, rule = "| module | start rank | rank |", "|---|---:|---:|"
    if fit is None:
        about = (
            f"{kept} of {started} rank-1 components\nsurvived training; pruned ones are left out."
        )
    else:
        (name, value), *_ = fit.limit.items()
        about = (
            f"**Approximated**\n({name.replace('_', ' ')} {value}): {kept} rank-1 components, with "
            f"a relative error of the update\nof {percent(fit.error)} in all (Frobenius norm)."
        )
        columns, rule = f"{columns} error |", f"{rule}---:|"
    return f"""---
library_name: {library}
{f"base_model: {base}" if base else "base_model: unknown"}
tags:
- lora
- dynamic-rank
---

# LoRA adapter of different rank per module

Written by `dora-export`; method: `{run.method}`. {about}
Every scale is folded into the weights.

{usage}

{columns}
{rule}
{rows}
"""


def _error(fit: FitReport, module: str) -> str:
    """Nothing for a block of experts, which several modules of the run were joined to."""
    return percent(fit.errors[module]) if module in fit.errors else ""
