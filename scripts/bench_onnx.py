"""ONNX Runtime against its peers: a classifier, a decoder, and eight adapters in one batch.

    python scripts/bench_onnx.py [encoder] [decoder] [adapters] [--threads 2] [--runs 5]

Models are random, of the size of RoBERTa-base and of a Llama of 0.3 billion parameters. Every
variant runs in a process of its own (ONNX Runtime beside torch reads several times slower), and the
table gives its median and its ratio to the first variant. OpenVINO is among them where it is
installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LLAMA = {
    "hidden_size": 1024,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
ADAPTERS = 8
PROMPT, NEW = 64, 32


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32000)}, unk_token="w3"))
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def make_encoder(folder: Path) -> None:
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from converters.model.base import open_base
    from converters.targets.onnx import write_onnx

    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=32000, max_position_embeddings=514, type_vocab_size=1)
    RobertaForSequenceClassification(config).save_pretrained(folder / "base")
    tokenizer(folder / "base")
    for precision in ("fp32", "int8"):
        write_onnx(open_base(folder / "base"), folder / precision, precision=precision)


def make_decoder(folder: Path, threads: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from converters.model.base import open_base
    from converters.targets.onnx import write_onnx

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "base")
    tokenizer(folder / "base")
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for number in range(ADAPTERS):
        ranks = {kind: 1 + (3 * number + 5 * i) % 16 for i, kind in enumerate(kinds)}
        lora = LoraConfig(
            r=8, rank_pattern=ranks, target_modules=list(kinds), task_type="CAUSAL_LM"
        )
        model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), lora)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.02)
        model.save_pretrained(folder / f"a{number}")
    del model
    for name in ("adapters", "builder alone"):
        seconds, peak = measure("export", name, 0, folder, threads, 1)
        print(f"export, {name}: {seconds:.0f} s, peak memory {peak:.1f} GB")
    base, runs = open_base(folder / "base"), decoder_runs(folder)
    write_onnx(base, folder / "merged", run=runs["a0"])
    write_onnx(base, folder / "int4", adapters=runs, precision="int4")


def decoder_runs(folder: Path) -> dict[str, Any]:
    from converters.readers import read_run

    return {f"a{number}": read_run(folder / f"a{number}") for number in range(ADAPTERS)}


def export(name: str, folder: Path) -> tuple[float, float]:
    """Seconds, and GB of memory at most: this process's peak and that of the builder's, added."""
    from converters.model.base import open_base
    from converters.targets.onnx import write_onnx
    from converters.targets.onnx.decoder import build_decoder
    from converters.targets.onnx.graph_file import GraphWriter

    begin = time.perf_counter()
    if name == "adapters":
        write_onnx(open_base(folder / "base"), folder / "onnx", adapters=decoder_runs(folder))
    else:
        (folder / "plain").mkdir()
        build_decoder(
            folder / "base",
            folder / "plain",
            GraphWriter(folder / "plain", "fp32"),
            adaptable=False,
        )
    seconds = time.perf_counter() - begin
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return seconds, sum(resource.getrusage(each).ru_maxrss for each in who) * 1024 / 1e9


def repeat(work: Callable[[], Any], runs: int) -> float:
    work()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def rows(count: int, length: int) -> list[list[int]]:
    return [[4 + (7 * i + 13 * row) % 31990 for i in range(length)] for row in range(count)]


def encoder_torch(folder: Path, count: int, threads: int, runs: int, compiled: bool) -> float:
    import torch
    from transformers import RobertaForSequenceClassification

    torch.set_num_threads(threads)
    model = RobertaForSequenceClassification.from_pretrained(folder / "base").eval()
    call = torch.compile(model) if compiled else model
    ids = torch.tensor(rows(count, 128))
    with torch.inference_mode():
        return repeat(lambda: call(input_ids=ids, attention_mask=torch.ones_like(ids)), runs)


def encoder_ours(folder: Path, count: int, threads: int, runs: int) -> float:
    from dora_serve.onnxruntime.encoder import Encoder

    encoder = Encoder(folder, threads)
    ids = rows(count, 128)
    return repeat(lambda: encoder.run(ids), runs)


def encoder_openvino(folder: Path, count: int, threads: int, runs: int) -> float:
    """The same graph in OpenVINO."""
    import numpy as np
    import openvino

    wanted = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(folder / "model.onnx", "CPU", wanted)
    ids = np.array(rows(count, 128))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    request = model.create_infer_request()
    return repeat(lambda: request.infer(feeds), runs)


def torch_decoder(folder: Path, threads: int) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(threads)
    return LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()


def generate_torch(model: Any, count: int, new: int, **more: Any) -> None:
    import torch

    ids = torch.tensor(rows(count, PROMPT))
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            **more,
        )


def generate_og(folder: Path, count: int, new: int) -> Callable[[], object]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def work() -> None:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(
            batch_size=count, max_length=PROMPT + new, min_length=PROMPT + new, do_sample=False
        )
        generator = og.Generator(model, parameters)
        generator.append_tokens(rows(count, PROMPT))
        while not generator.is_done():
            generator.generate_next_token()

    return work


def generate_ours(
    folder: Path, count: int, new: int, threads: int, adapters: list[str | None]
) -> Callable[[], object]:
    from dora_serve.onnxruntime.decoder import Decoder
    from dora_serve.onnxruntime.sampling import Sampling

    decoder = Decoder(folder, threads, max_length=PROMPT + NEW + 1)
    sampling = Sampling(max_tokens=new, ignore_eos=True)
    return lambda: decoder.generate(rows(count, PROMPT), adapters, sampling)


def both(make: Callable[[int], Callable[[], Any]], runs: int) -> tuple[float, float]:
    """Seconds of a prefill with one token, and of one decode step after it."""
    one, all_ = repeat(make(1), runs), repeat(make(NEW), runs)
    return one, (all_ - one) / (NEW - 1)


def decoder_variant(name: str, folder: Path, count: int, threads: int, runs: int) -> Any:
    if name == "transformers":
        model = torch_decoder(folder, threads)
        return both(lambda new: lambda: generate_torch(model, count, new), runs)
    if name == "og Generator":
        return both(lambda new: generate_og(folder / "plain", count, new), runs)
    which = {"ours": "plain", "ours int4": "int4"}[name]
    none: list[str | None] = [None] * count
    return both(lambda new: generate_ours(folder / which, count, new, threads, none), runs)


def adapter_variant(name: str, folder: Path, threads: int, runs: int) -> Any:
    names = [f"a{i}" for i in range(ADAPTERS)]
    if name == "PEFT mixed batch":
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(torch_decoder(folder, threads), folder / "a0", "a0")
        for adapter in names[1:]:
            model.load_adapter(folder / adapter, adapter)
        model.eval()
        return both(
            lambda new: lambda: generate_torch(model, ADAPTERS, new, adapter_names=names), runs
        )
    if name == "ours, 8 runs in turn":

        def turns(new: int) -> Callable[[], object]:
            each = generate_ours(folder / "onnx", 1, new, threads, [names[0]])
            return lambda: [each() for _ in names]

        return both(turns, runs)
    which, wanted = {
        "merged, one model": ("merged", [None] * ADAPTERS),
        "ours, no adapter": ("onnx", [None] * ADAPTERS),
        "ours, 8 adapters": ("onnx", names),
    }[name]
    return both(lambda new: generate_ours(folder / which, ADAPTERS, new, threads, wanted), runs)  # type: ignore[arg-type]


def run_variant(group: str, name: str, count: int, folder: Path, threads: int, runs: int) -> Any:
    if group == "export":
        return export(name, folder)
    if group == "encoder" and name.startswith("transformers"):
        return encoder_torch(folder, count, threads, runs, "compile" in name)
    if group == "encoder" and name.startswith("OpenVINO"):
        return encoder_openvino(folder / name.split()[-1], count, threads, runs)
    if group == "encoder":
        return encoder_ours(folder / name.split()[-1], count, threads, runs)
    if group == "decoder":
        return decoder_variant(name, folder, count, threads, runs)
    return adapter_variant(name, folder, threads, runs)


VARIANTS = {
    "encoder": ["transformers sdpa", "transformers torch.compile", "ours fp32", "ours int8"],
    "decoder": ["transformers", "og Generator", "ours", "ours int4"],
    "adapters": [
        "PEFT mixed batch",
        "ours, 8 runs in turn",
        "merged, one model",
        "ours, no adapter",
        "ours, 8 adapters",
    ],
}
if find_spec("openvino") is not None:
    VARIANTS["encoder"] += ["OpenVINO fp32", "OpenVINO int8"]
COUNTS = {"encoder": (1, 8), "decoder": (1, 8), "adapters": (ADAPTERS,)}


def measure(group: str, name: str, count: int, folder: Path, threads: int, runs: int) -> Any:
    command = [sys.executable, __file__, "--variant", group, name, str(count), str(folder)]
    command += ["--threads", str(threads), "--runs", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(group: str, folder: Path, threads: int, runs: int) -> None:
    steps = group != "encoder"
    columns = "prefill ms | × | decode ms a step | ×" if steps else "ms | ×"
    length = PROMPT if steps else 128
    for count in COUNTS[group]:
        print(f"\n{group}, batch {count} × {length} tokens, {threads} threads, median of {runs}\n")
        print(f"| variant | {columns} |\n|---|{'---:|' * (4 if steps else 2)}")
        first = None
        for name in VARIANTS[group]:
            found = measure(group, name, count, folder, threads, runs)
            values = found if steps else [found]
            first = first or values
            cells = [f"{1e3 * v:.1f} | {f / v:.2f}" for v, f in zip(values, first, strict=True)]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("groups", nargs="*", choices=[[], *VARIANTS], help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--variant", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        group, name, count, path = options.variant
        found = run_variant(group, name, int(count), Path(path), options.threads, options.runs)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as root:
        wanted = options.groups or list(VARIANTS)
        if "encoder" in wanted:
            (encoder := Path(root, "encoder")).mkdir()
            make_encoder(encoder)
            table("encoder", encoder, options.threads, options.runs)
        if {"decoder", "adapters"} & set(wanted):
            (decoder := Path(root, "decoder")).mkdir()
            make_decoder(decoder, options.threads)
            for group in ("decoder", "adapters"):
                if group in wanted:
                    table(group, decoder, options.threads, options.runs)


if __name__ == "__main__":
    main()
