"""Weight-decomposed DoRA of its authors' PEFT fork (NVlabs/DoRA, `peft/src/peft/tuners/dora.py`).

W' = (m / ‖W + s·BA‖) ⊙ (W + s·BA) with s = lora_alpha/r; where only the magnitude was trained
(`Wdecompose_target_modules`), W' = (m / ‖W‖) ⊙ W. Only linear layers.
"""

from __future__ import annotations

import re

import torch

from ..options import ReadOptions
from ..run import Run
from ..updates.magnitude import MagnitudeUpdate
from ..updates.rank_one import RankOneSum
from .lora_reader import Adaptation, AdapterFiles
from .module import AdaptedModule, grouped
from .peft_common import Scaling, linear_shape, need_base
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder

_PART = re.compile(r"(.+)\.(?:lora_(A|B)|(weight_m_wdecomp))\.weight")
_MAGNITUDE = "weight_m_wdecomp"


class NvlabsDoraReader:
    """Reads an adapter folder."""

    name = "nvlabs_dora"
    looks_for = f'{CONFIG_FILE} with peft_type "DORA", and {" or ".join(WEIGHT_FILES)}'

    def detect(self, folder: RunFolder) -> RunFolder | None:
        return folder if folder.adapter_config.get("peft_type") == "DORA" else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        files = AdapterFiles(folder)
        scaling = Scaling(files.config, files.config_path, options)

        def adapt(module: AdaptedModule) -> Adaptation:
            alone = module.parts.keys() == {_MAGNITUDE}
            if alone:
                what = "a module of which only the magnitude was trained"
                rank, scale = 0, 0.0
                shape = linear_shape(need_base(options, what, module.file), module.name)
            else:
                rank, shape = module.pair(), module.shape
                scale = scaling.of(module.name, rank)
            _check_magnitude(module, shape)

            def load() -> MagnitudeUpdate:
                out, inn = shape
                none = RankOneSum(torch.zeros(0, inn), torch.zeros(0), torch.zeros(out, 0))
                delta = none if alone else module.sum(scale)
                return MagnitudeUpdate(module.load(_MAGNITUDE).squeeze(1), delta)

            return Adaptation(rank, load, shape)

        return files.run(self.name, grouped(files.tensors, _PART)[0], adapt)


def _check_magnitude(module: AdaptedModule, shape: tuple[int, int]) -> None:
    magnitude = module.parts.get(_MAGNITUDE)
    if magnitude is None:
        raise module.error(
            "a module has no magnitude",
            f"{_MAGNITUDE}.weight",
            expected=f"[{shape[0]}, 1]",
            remedy='the fork does not save magnitudes with bias "lora_only"; without them the '
            "trained model cannot be told",
        )
    if magnitude.shape != (shape[0], 1):
        raise module.error(
            "the magnitude does not fit the module",
            f"{_MAGNITUDE}.weight",
            found=list(magnitude.shape),
            expected=[shape[0], 1],
        )
