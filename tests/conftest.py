"""Small real models and adapters, made once per test session."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny matrices, and tests side by side
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a thread for each tiny tensor

import pytest
from _pytest.mark import ParameterSet
from filelock import FileLock

from tests.processes import SHARED, begin, fork_below, share_table

if TYPE_CHECKING:  # not for the process that only hands out the tests
    import torch
    from transformers import LlamaForCausalLM

_FORKS = find_spec("onnxruntime_genai") is not None  # not beside vLLM
DATA = Path(__file__).parent / "data"
MODELS = Path(__file__).parent.parent / "models"

MakeAdapter = Callable[..., Path]

# A shell ignores Ctrl-C for what it runs in the background, and `nohup` the terminal's end, and so
# would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_ONE_VLLM = ("changes", "resolver", "up")  # ask one server
_OWN = ("defaults", "hearing", "responses", "stopping", "tasks", "tools", "up")
# What pytest-xdist gives to one worker: a file, or the files that share what is made once. Ray's
# clusters do not run beside each other. The longest begin first, lest one of them ends alone.
GROUPS = {
    "tests/cluster/": "cluster",
    **{name: name for name in (f"tests/server/test_{n}.py" for n in _OWN)},
    "tests/server/": "server",
    **dict.fromkeys((f"tests/engines/vllm/test_vllm_{n}.py" for n in _ONE_VLLM), "vllm"),
}
LONGEST = (
    "server",
    "cluster",
    "vllm",
    "tests/engines/vllm/test_vllm_proof.py",
    "tests/engines/test_onnx_encoder.py",
    "tests/engines/test_onnx_families.py",
    "tests/engines/test_onnx_constant.py",
    "tests/engines/test_onnx_both_steps.py",
    "tests/server/test_stopping.py",
    "tests/server/test_tasks.py",
    "tests/test_docs.py",
    "tests/test_faults.py",
    "tests/engines/test_onnx_large.py",
    "tests/engines/test_onnx_seq2seq.py",
    "tests/dora_serve/test_batch.py",
)


def group(test: str) -> str:
    """Of the name of a test, as pytest prints it."""
    path = test.partition("::")[0]
    return next((name for start, name in GROUPS.items() if path.startswith(start)), path)


def pytest_configure(config: pytest.Config) -> None:
    """What commands are forked from is one process for all workers, which import beside it."""
    alone = not getattr(config.option, "numprocesses", None)
    if not (alone or hasattr(config, "workerinput") or config.option.collectonly) and _FORKS:
        os.environ[SHARED] = str(begin())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: nobody looks for garbage in it, now or in each test."""
    gc.disable()
    try:
        return (yield)
    finally:
        _spare_what_nobody_reads()
        gc.freeze()
        gc.enable()


def _spare_what_nobody_reads() -> None:
    """transformers writes out each configuration that it makes, for a log that is off, torch the
    stack at each seed, for devices that are not there, and PEFT compiles the same model card anew
    for each adapter: a quarter of what a test of a tiny model takes."""
    if "transformers" in sys.modules:
        import transformers

        for kind in (transformers.PretrainedConfig, transformers.GenerationConfig):
            kind.__repr__ = object.__repr__
    if "torch" in sys.modules:
        import torch

        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                vars(device)["manual_seed_all"] = lambda _seed: None
    if "jinja2" in sys.modules:
        from jinja2 import Template

        Template.__new__ = lru_cache(maxsize=8)(Template.__new__)  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(group(item.nodeid), len(rank)))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist is not in every environment
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes a group whole: what a file makes once is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log)


def randomize(model: Any, words: tuple[str, ...] = ("lora_",)) -> None:
    """Give the fresh adapter weights values, so that the update is visible."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@dataclass(frozen=True)
class Dense:
    """W' = W + ΔW, whatever matrix ΔW `[out, in]` is."""

    delta: torch.Tensor
    whole: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    def components(self) -> None:
        return None

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return rows.add_(self.delta[start : start + rows.shape[0]])


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    values: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 80,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


def quick(cases: Iterable[Any], *names: str) -> list[Any]:
    """Parameters, of which the plain run has those of these names and `-m ''` all."""
    found = [each if isinstance(each, ParameterSet) else pytest.param(each) for each in cases]
    told = [str(each.id if each.id is not None else each.values[0]) for each in found]
    assert set(names) <= set(told)
    return [
        each if name in names else each._replace(marks=(*each.marks, pytest.mark.further))
        for each, name in zip(found, told, strict=True)
    ]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` as `make` writes it, by the first worker that asks; nobody changes it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers' common one
    folder = root / "once" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder.with_name(f"{name}.part"))
            folder.with_name(f"{name}.part").rename(folder)
    return folder


def pytest_runtest_setup() -> None:
    share_table()  # once an export has imported it


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from the user's cache, nor left in it; the workers share one."""
    cache = made_once(tmp_path_factory, "cache", lambda folder: folder.mkdir())
    os.environ.setdefault("DORA_SERVE_CACHE", str(cache))


@pytest.fixture(scope="session", autouse=True)
def _forked_below() -> None:
    """Nobody waits for an import of torch but where the process is what is tested."""
    if _FORKS:
        fork_below()


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "base", tiny_llama().save_pretrained)


@pytest.fixture(scope="session")
def roberta_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    config = RobertaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=80,
        max_position_embeddings=40,
    )
    return made_once(tmp_path_factory, "roberta", RobertaForMaskedLM(config).save_pretrained)


@pytest.fixture(scope="session")
def llama_lora(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter with rank and alpha patterns on linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"mlp.up_proj": 3},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), config)
    randomize(model)
    return made_once(tmp_path_factory, "lora", model.save_pretrained)


# The sample decoder's runs: what they learnt → the folder.
LLAMA_RUNS = {
    name: MODELS / f"runs/Checkpoint/Tiny_Llama/Lora_Rank=8/{task}/Tiny_Llama--{task}--1"
    for name, task in (("down", "Count_Down"), ("second", "Every_Second"))
}


@pytest.fixture(scope="session")
def merged_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of them merged, as ONNX."""
    from dora_serve import read_run, write_onnx

    def make(folder: Path) -> None:
        write_onnx(MODELS / "tiny-llama-base", folder, run=read_run(LLAMA_RUNS["down"]))

    return made_once(tmp_path_factory, "merged-onnx", make)


@pytest.fixture(scope="session")
def adapters_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample decoder as ONNX, with both runs as adapters."""
    from dora_serve import read_run, write_onnx

    def make(folder: Path) -> None:
        runs = {name: read_run(path) for name, path in LLAMA_RUNS.items()}
        write_onnx(MODELS / "tiny-llama-base", folder, adapters=runs)

    return made_once(tmp_path_factory, "adapters-onnx", make)


@pytest.fixture
def dora_run(llama_base: Path, tmp_path: Path) -> Path:
    """A run in the reference layout on `llama_base`, free to be damaged."""
    from transformers import LlamaForCausalLM

    from tests.reference_layout import state_dict, write_run

    model = LlamaForCausalLM.from_pretrained(llama_base)
    state = state_dict(model, ("q_proj", "k_proj", "v_proj", "down_proj"))
    return write_run(tmp_path / "runs", state)
