"""Lint's verdict is what vLLM does with the file: names in the classes that vLLM builds, and what
training added in a running engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from converters.lint import lint
from converters.model.base import open_base
from converters.readers import ReadOptions
from converters.targets.lora_folder import CONFIG, WEIGHTS
from dora_serve import read_run, write_adapter
from tests.converters.families import save_base
from tests.converters.lint_cases import Plant, unsaid
from tests.converters.naming import FAMILIES, OTHERS, WRAPPED, load, make, renamed, stranger
from tests.converters.test_lint_truth import spoilt, train
from tests.converters.test_naming import AS_IT_LIES
from tests.engines.vllm.test_vllm_names import BOUND, Engine
from tests.ports import free_port

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

FORMS: dict[str, Callable[[str], str]] = {"PEFT": str, **WRAPPED, **OTHERS, "another": stranger}
PLAIN = {"PEFT", "PEFT's prefix twice", "no prefix"}
# Family → the forms of a name that vLLM finds.
FINDS = {
    "llama": PLAIN,
    "mistral": PLAIN,
    "qwen3": PLAIN,
    "gemma3, decoder": PLAIN,
    "gemma3": {*PLAIN, "transformers 4"},
    "qwen2-vl": {*PLAIN, "transformers 4", "transformers 4, qwen2-vl"},
}
UNKNOWN = {  # the forms that mean nothing in a family's own class
    "qwen2-vl": {"body twice", "transformers 4"},
}
# The classes that see import torchvision, and read nothing of it until they are given an image.
TORCHVISION = """
import sys, types
from unittest.mock import MagicMock
__version__ = "0.28.0"
parts = "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional", "io"
for name in parts:
    module = sys.modules[f"torchvision.{name}"] = types.ModuleType(f"torchvision.{name}")
    module.__path__, module.__getattr__ = [], lambda name: MagicMock()
"""


def errors(lora: Path, base: Path) -> list[str]:
    found = lint(lora, open_base(base), ["vllm"])
    return [finding.check for finding in found if finding.severity == "error"]


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if find_spec("torchvision") is None:
        folder = tmp_path_factory.mktemp("stand-in")
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").write_text(TORCHVISION)
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))  # vLLM looks at its classes in a process
    yield
    patch.undo()


@pytest.fixture
def alone() -> Iterator[None]:
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def worker(base: Path) -> Any:
    """What loads adapters in vLLM, for the class that it builds of `base`, without weights."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model

    settings = {"dtype": "float32", "max_model_len": 32, "enforce_eager": True}
    settings |= {"skip_tokenizer_init": True, "enable_lora": True, "max_lora_rank": 8}
    config = EngineArgs(model=str(base), max_cpu_loras=64, **settings).create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            place = f"tcp://127.0.0.1:{free_port()}"
            init_distributed_environment(1, 0, place, 0, "gloo")
            initialize_model_parallel(1, 1)
        model: Any = initialize_model(config)
        found = WorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        found.create_lora_manager(model, config)
    return found


def finds(loader: Any, lora: Path, number: int) -> bool:
    """Whether vLLM loads the file and has a module for every update in it."""
    from vllm.lora.request import LoRARequest

    manager = loader._adapter_manager
    try:
        adapter = loader._load_adapter(LoRARequest(f"a{number}", number, str(lora)))
    except ValueError:
        return False
    known = set(manager.modules)
    for name in manager.modules:
        stem, _, kind = name.rpartition(".")
        known |= {f"{stem}.{part}" for part in manager.packed_modules_mapping.get(kind, ())}
    return bool(adapter.loras) and adapter.loras.keys() <= known


def marks(family: str) -> list[pytest.MarkDecorator]:
    rows = [
        pytest.mark.named(
            family=family,
            form=form,
            computes=("vllm",) if form in FINDS[family] else (),
            asked=("vllm",),
        )
        for form in AS_IT_LIES[family]
    ]
    return rows if family == "llama" else [*rows, pytest.mark.further]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("family", [pytest.param(name, marks=marks(name)) for name in FINDS])
def test_names_in_the_class_that_vllm_builds(tmp_path: Path, family: str) -> None:
    make(tmp_path / "made", FAMILIES[family])
    base, clean = tmp_path / "made" / "base", tmp_path / "made" / "lora"
    loader = worker(base)
    found, told, seen = set(), set(), set()
    for number, (form, change) in enumerate(FORMS.items(), 1):
        lora = renamed(clean, tmp_path / str(number), change)
        if form != "PEFT" and load_file(lora / WEIGHTS).keys() == load_file(clean / WEIGHTS).keys():
            continue
        seen.add(form)
        found |= {form} if finds(loader, lora, number) else set()
        told |= set() if errors(lora, base) else {form}
    assert told == found == set(FINDS[family]) & seen
    for form in seen - {"another", *UNKNOWN.get(family, set())}:
        lora = tmp_path / str(list(FORMS).index(form) + 1)
        run = read_run(lora, ReadOptions(base=base))
        write_adapter(run, tmp_path / f"out-{form}", base=base, target="vllm")
        assert finds(loader, tmp_path / f"out-{form}", 99), form


# What was trained, what is then done to the file, and whether vLLM computes what was trained.
CASES: dict[str, tuple[dict[str, Any], Plant | None, bool]] = {
    "as PEFT saves it": ({}, None, True),
    "the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, None, True),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, None, True),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, None, True),
    "patterns": ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 3}}, None, True),
    "rank-stabilized": ({"use_rslora": True}, None, True),
    "alpha below zero": ({"lora_alpha": -4}, None, True),
    "no alpha": ({}, unsaid("lora_alpha"), False),
    "magnitudes": ({"use_dora": True}, None, False),
    "a bias in B": ({"lora_bias": True}, None, False),
    "a whole head": ({"modules_to_save": ["lm_head"]}, None, False),
    "an orthogonal start": ({"init_lora_weights": "olora"}, None, False),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = Engine(tmp_path_factory.mktemp("tied"), "llama", tie_word_embeddings=True, head_dim=32)
    yield made
    made.llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("name", CASES)
def test_what_training_added(engine: Engine, tmp_path: Path, name: str) -> None:
    trained, plant, computes = CASES[name]
    base, family = engine.folder / "base", FAMILIES["llama"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(family.targets)}
    config = LoraConfig(**{**settings, "task_type": family.task, **trained})
    train(load(family, base), config, tmp_path / "lora")
    truth = engine.truth(tmp_path / "lora")
    assert float((truth - engine.truth(None)).abs().max()) > 100 * BOUND
    spoilt(plant, tmp_path / "lora")
    assert (
        engine.computes(tmp_path / "lora", truth)
        == computes
        == (not errors(tmp_path / "lora", base))
    )
    if computes:
        write_adapter(tmp_path / "lora", tmp_path / "out", base=base, target="vllm")
        assert engine.computes(tmp_path / "out", truth)


@pytest.mark.parametrize("absent", [None, (2, "up_proj"), (0, "down_proj")])
def test_experts_are_packed_all_or_none(tmp_path: Path, absent: tuple[int, str] | None) -> None:
    """Its kernels need a GPU; what stops it is the packing before them."""
    from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights

    save_base("qwen3-moe", tmp_path / "base")
    lora = tmp_path / "lora"
    lora.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    layers: list[LoRALayerWeights | None] = []
    for number in range(4):
        for kind in ("gate_proj", "down_proj", "up_proj"):  # in vLLM's order
            rows, columns = (32, 24) if kind == "down_proj" else (24, 32)
            a, b = torch.ones(4, columns), torch.ones(rows, 4)
            module = f"model.layers.0.mlp.experts.{number}.{kind}"
            layers.append(
                LoRALayerWeights(module, 4, 8, a, b) if (number, kind) != absent else None
            )
            if layers[-1] is not None:
                key = f"base_model.model.{module}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(tensors, lora / WEIGHTS)
    config = {"peft_type": "LORA", "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (lora / CONFIG).write_text(json.dumps({**config, "r": 4, "lora_alpha": 8}))
    assert errors(lora, tmp_path / "base") == ([] if absent is None else ["experts"])
    if absent is None:
        assert PackedLoRALayerWeights.pack_moe(layers, "experts").lora_a[0].shape == (4, 4, 32)
    else:
        with pytest.raises(AssertionError):
            PackedLoRALayerWeights.pack_moe(layers, "experts")
