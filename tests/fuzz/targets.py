"""What is fuzzed: each target writes bytes where somebody else's file would lie and reads them.

A target may return or raise a `DoraExportError`; whatever else comes out is a fault of ours.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from transformers import LlamaForCausalLM

from converters.certificate import FILE, strangers
from converters.errors import DoraExportError, apart
from converters.files.onnx_files import read_adapter_file
from converters.files.tensors import open_file
from converters.model.base import open_base
from converters.targets.merged.plan import plan_merge
from dora_serve import ReadOptions, export, merge, read_run
from dora_serve.api import find_base
from dora_serve.proof.check import check
from dora_serve.server.chat_template import ChatTemplate
from dora_serve.server.prepare.onnx_folders import read_onnx_folder
from dora_serve.server.prepare.onnx_graphs import check_graphs, read_genai
from dora_serve.server.wire.errors import ApiError
from tests.conftest import tiny_llama
from tests.dora_serve.test_neighbours import GENAI, graph_folder
from tests.fuzz.archives import pickle_in, with_pickle
from tests.fuzz.asked import bodies, read_bodies, read_structure, structures
from tests.fuzz.methods import packed, prepare_runs, read_one, unpacked
from tests.fuzz.mutate import SPLIT
from tests.fuzz.trainers import prepare_trainers, read_trainer
from tests.reference_layout import state_dict, write_run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Target:
    """`read(folder, data)` in a folder that `prepare` filled and returned seeds for. `text`: the
    data, or what stands before `SPLIT`, is JSON. `rounds`: as many as a short test can afford."""

    name: str
    prepare: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]
    text: bool = True
    rounds: int = 60

    def __call__(self, folder: Path, data: bytes) -> None:
        with contextlib.suppress(DoraExportError):
            self.read(folder, data)


def _model() -> LlamaForCausalLM:
    return tiny_llama(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=16,
    )


def _base(folder: Path) -> list[bytes]:
    _model().save_pretrained(folder / "base")
    return [(folder / "base/config.json").read_bytes()]


def _adapter(folder: Path) -> list[bytes]:
    _base(folder)
    (folder / "adapter").mkdir()
    tensors = {}
    for kind in ("q_proj", "v_proj"):
        name = f"base_model.model.model.layers.0.self_attn.{kind}"
        tensors[f"{name}.lora_A.weight"] = torch.ones(2, 16)
        tensors[f"{name}.lora_B.weight"] = torch.ones(16, 2)
    save_file(tensors, folder / "adapter" / WEIGHTS)
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
    }
    patterns = {"rank_pattern": {"^q_proj": 2}, "alpha_pattern": {r"layers\.0\..*v_proj": 8}}
    seeds = [config, {**config, **patterns, "use_rslora": True}]
    (folder / "adapter" / CONFIG).write_text(json.dumps(config))
    more = {"modules_to_save": ["lm_head"], "target_parameters": ["mlp.w"], "bias": "all"}
    seeds += [{**config, **more}, {**config, "peft_type": "ADALORA"}]
    return [json.dumps(seed).encode() for seed in seeds]


def _read_config(folder: Path, data: bytes) -> None:
    (folder / "adapter" / CONFIG).write_bytes(data)
    run = read_run(folder / "adapter", ReadOptions(base=folder / "base"))
    for update in run.updates.values():
        update.components()
    with contextlib.suppress(DoraExportError):
        find_base(run, None)


def _adapter_header(folder: Path) -> list[bytes]:
    """The adapter's own header, and one with all that PEFT stores beside pairs of layers."""
    _adapter(folder)
    seeds = [SPLIT.join(unpacked((folder / "adapter" / WEIGHTS).read_bytes()))]
    attention = "base_model.model.model.layers.0.self_attn.q_proj"
    tokens = "base_model.model.model.embed_tokens"
    tensors = {
        f"{attention}.lora_A.weight": torch.ones(2, 16),
        f"{attention}.lora_B.weight": torch.ones(16, 2),
        f"{attention}.lora_B.bias": torch.ones(16),
        f"{attention}.lora_magnitude_vector": torch.ones(16),
        f"{tokens}.lora_embedding_A": torch.ones(2, 16),
        f"{tokens}.lora_embedding_B": torch.ones(16, 2),
        f"{tokens}.token_adapter.trainable_tokens_delta": torch.ones(1, 16),
        "base_model.model.lm_head.weight": torch.ones(16, 16),
        "base_model.model.model.norm.weight": torch.ones(16),
    }
    for left_out in range(len(tensors)):
        some = {name: t for number, (name, t) in enumerate(tensors.items()) if number != left_out}
        seeds.append(SPLIT.join(unpacked(save(some))))
    return seeds


def _read_adapter_header(folder: Path, data: bytes) -> None:
    (folder / "adapter" / WEIGHTS).write_bytes(_file(data))
    run = read_run(folder / "adapter", ReadOptions(base=folder / "base"))
    plan_merge(run.strip(), open_base(folder / "base"), None)


def _file(data: bytes) -> bytes:
    header, _, rest = data.partition(SPLIT)
    return packed(header, rest)


def _header(folder: Path) -> list[bytes]:
    folder.mkdir(exist_ok=True)
    entry = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
    other = {"dtype": "BF16", "shape": [], "data_offsets": [32, 34]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": entry, "b": other}).encode()
    return [header + SPLIT + bytes(34), b"{}" + SPLIT]


def _read_header(folder: Path, data: bytes) -> None:
    _read_file(folder, _file(data))


def _whole_file(folder: Path) -> list[bytes]:
    return [_file(seed) for seed in _header(folder)]


def _read_file(folder: Path, data: bytes) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    for tensor in open_file(path).values():
        tensor.load()


def _run(folder: Path) -> Path:
    return folder / "runs/Checkpoint/Tiny/Lora_Rank=4/Task/tag/checkpoint"


def _task_info(folder: Path) -> list[bytes]:
    _base(folder)
    write_run(folder / "runs", state_dict(_model(), ("q_proj",)))
    return [(folder / "runs/Log/Tiny/Lora_Rank=4/Task/tag/task_info.json").read_bytes()]


def _read_task_info(folder: Path, data: bytes) -> None:
    (folder / "runs/Log/Tiny/Lora_Rank=4/Task/tag/task_info.json").write_bytes(data)
    run = read_run(_run(folder))
    for update in run.updates.values():
        update.components()


def _prune_state(folder: Path) -> list[bytes]:
    """The pickle inside of the file."""
    _task_info(folder)
    return [pickle_in(_run(folder) / "prune_state_dict.pt")]


def _read_prune_state(folder: Path, data: bytes) -> None:
    with_pickle(_run(folder) / "prune_state_dict.pt", data)
    read_run(_run(folder))


def _torch_file(folder: Path) -> list[bytes]:
    folder.mkdir(exist_ok=True)
    seeds = []
    for zipped in (True, False):
        torch.save({"a": torch.ones(2)}, folder / "x", _use_new_zipfile_serialization=zipped)
        seeds.append((folder / "x").read_bytes())
    return seeds


def _read_torch_file(folder: Path, data: bytes) -> None:
    path = folder / "x.bin"
    path.write_bytes(data)
    for tensor in open_file(path).values():
        tensor.load()


def _read_base(folder: Path, data: bytes) -> None:
    """A base's configuration, on its way into a merged model and a GGUF file."""
    (folder / "base/config.json").write_bytes(data)
    run = read_run(folder / "adapter")
    shutil.rmtree(folder / "out", ignore_errors=True)
    for target in ("merged", "gguf"):
        with contextlib.suppress(DoraExportError):
            export(run, folder / "out" / target, target, base=open_base(folder / "base"))


def _base_and_adapter(folder: Path) -> list[bytes]:
    _adapter(folder)
    return [(folder / "base/config.json").read_bytes()]


def _index(folder: Path) -> list[bytes]:
    _base(folder)
    shard = "model-00001-of-00001.safetensors"
    (folder / "base/model.safetensors").rename(folder / "base" / shard)
    return [json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": shard}}).encode()]


def _read_index(folder: Path, data: bytes) -> None:
    (folder / "base/model.safetensors.index.json").write_bytes(data)
    open_base(folder / "base")


def _certificate(folder: Path) -> list[bytes]:
    _adapter(folder)
    merge(folder / "adapter", folder / "merged", base=folder / "base")
    return [(folder / "merged" / FILE).read_bytes()]


def _read_certificate(folder: Path, data: bytes) -> None:
    (folder / "merged" / FILE).write_bytes(data)
    strangers(folder / "merged")
    check(folder / "merged", folder / "base")


def _onnx_folder(folder: Path) -> list[bytes]:
    """Certificate and genai_config.json of a graph with an adapter, of which nothing is read."""
    graph_folder(folder)
    proof = {
        "tool": "dora-serve 1",
        "run": {"method": "dora"},
        "modules": {"a.q": {"start_rank": 4, "rank": 2, "rounding": {"lost": 0.5}}},
        "adapters": {"x": {"run": {"method": "dora"}, "modules": {"a.q": {"rank": 2}}}},
    }
    return [json.dumps({"proof": proof, "genai": GENAI}).encode()]


def _read_onnx_folder(folder: Path, data: bytes) -> None:
    """As `up` does, where what is wrong is a problem of this folder."""
    try:
        said = json.loads(data)
        proof, genai = json.dumps(said["proof"]), json.dumps(said["genai"])
    except (ValueError, LookupError, TypeError, RecursionError):
        proof = genai = data.decode(errors="replace")
    (folder / FILE).write_text(proof, errors="replace")
    (folder / "genai_config.json").write_text(genai, errors="replace")
    problems: dict[str, str] = {}
    with apart(problems, "folder"):
        read_onnx_folder("folder", folder)
    assert "MemoryError" not in problems.get("folder", "")


def _graph(folder: Path) -> list[bytes]:
    return [(graph_folder(folder) / "model.onnx").read_bytes()]


def _read_graph(folder: Path, data: bytes) -> None:
    (folder / "model.onnx").write_bytes(data)
    check_graphs(folder, read_genai(folder))


def _template(folder: Path) -> list[bytes]:
    """A tokenizer's configuration, with a template in each form that there is."""
    folder.mkdir(exist_ok=True)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    several = [
        {"name": "default", "template": template},
        {"name": "tool_use", "template": "{{ x }}"},
    ]
    one = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    return [json.dumps(seed).encode() for seed in (one, {**one, "chat_template": several})]


def _read_template(folder: Path, data: bytes) -> None:
    (folder / "tokenizer_config.json").write_bytes(data)
    with contextlib.suppress(ApiError):
        ChatTemplate(folder).render([{"role": "user", "content": "x"}], generation=True)


def _onnx_adapter(folder: Path) -> list[bytes]:
    import numpy as np
    from onnxruntime import AdapterFormat, OrtValue

    folder.mkdir(exist_ok=True)
    made = AdapterFormat()
    value = np.ones((2, 3), dtype=np.float32)
    made.set_parameters({"a.lora_A": OrtValue.ortvalue_from_numpy(value)})
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.export_adapter(str(folder / "x.onnx_adapter"))
    return [(folder / "x.onnx_adapter").read_bytes()]


def _read_onnx_adapter(folder: Path, data: bytes) -> None:
    (folder / "x.onnx_adapter").write_bytes(data)
    read_adapter_file(folder / "x.onnx_adapter")


TARGETS = {
    target.name: target
    for target in (
        Target("safetensors header", _header, _read_header),
        Target("safetensors file", _whole_file, _read_file, text=False),
        Target("adapter_config.json", _adapter, _read_config),
        Target("adapter_model.safetensors", _adapter_header, _read_adapter_header),
        Target("runs of other methods", prepare_runs, read_one),
        Target("runs of other trainers", prepare_trainers, read_trainer),
        Target("task_info.json", _task_info, _read_task_info),
        Target("prune_state_dict.pt", _prune_state, _read_prune_state, text=False),
        Target("torch file", _torch_file, _read_torch_file, text=False),
        Target("base config.json, merged and GGUF", _base_and_adapter, _read_base, rounds=12),
        Target("shard index", _index, _read_index),
        Target("certificate", _certificate, _read_certificate),
        Target("certificate and genai_config.json", _onnx_folder, _read_onnx_folder),
        Target("ONNX graph", _graph, _read_graph, text=False),
        Target("files of chat templates", _template, _read_template),
        Target("onnx_adapter", _onnx_adapter, _read_onnx_adapter, text=False),
        Target("bodies of requests", bodies, read_bodies, rounds=300),
        Target("schemas, patterns and grammars", structures, read_structure),
    )
}
