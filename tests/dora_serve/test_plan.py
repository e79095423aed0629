"""`dora-serve plan`: what vLLM must reserve for the adapters of a folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from converters.model.base import open_base
from dora_serve.commands import dora_serve
from dora_serve.folder.inventory import discover
from dora_serve.vllm.fleet import Fleet, plan_fleet, step_for
from dora_serve.vllm.fleet_view import cells, save_png, table
from tests.conftest import MODELS, randomize
from tests.processes import commands

LLAMA = MODELS / "tiny-llama-base"


def serve(*words: object) -> subprocess.CompletedProcess[str]:
    command = [str(commands() / "dora-serve"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def fleet_folder(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of rank 4 to 8 and one of rank 20, whose last components are small."""
    root = tmp_path_factory.mktemp("fleet")
    for name, rank, targets in (
        ("low", 4, ["q_proj"]),
        ("other", 6, ["q_proj", "down_proj"]),
        ("eight", 8, ["down_proj"]),
        ("high", 20, ["q_proj"]),
    ):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), config)
        randomize(model)
        if name == "high":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_B" in key:
                        parameter[:, 16:] *= 1e-3
        model.save_pretrained(root / name)
    return root


def test_the_smallest_slots(fleet_folder: Path, llama_base: Path) -> None:
    (pool,) = plan_fleet(discover(fleet_folder, llama_base)).pools
    assert pool.largest == {"low": 4, "other": 6, "eight": 8, "high": 20}
    assert pool.max_lora_rank == 32
    assert pool.target_modules == ["down_proj", "q_proj"]
    assert (pool.max_loras, pool.max_cpu_loras) == (4, 4)
    # In two layers, float32: q_proj [32, 32] with k_proj and v_proj [16, 32], one layer of vLLM's,
    # and down_proj [32, 48].
    assert pool.slot == 2 * 32 * ((32 + 32) + 2 * (16 + 32) + (32 + 48)) * 4
    assert pool.used["other"] == 2 * 6 * ((32 + 32) + (32 + 48)) * 4
    assert pool.used["low"] == 2 * 4 * (32 + 32) * 4
    assert pool.padding == 1 - sum(pool.used.values()) / (4 * pool.slot)
    assert pool.naive_slot > pool.slot
    (forced,) = pool.forced
    assert (forced.name, forced.rank, forced.step) == ("high", 20, 16)
    assert 0 < forced.error < 1e-2
    began = "  for the ranks that training began with (--max-lora-rank 128), without --lora-t"
    assert began in "\n".join(table(Fleet([replace(pool, start_rank=100)])))


def test_memory_bounds_the_slots(fleet_folder: Path, llama_base: Path) -> None:
    found = discover(fleet_folder, llama_base)
    (whole,) = plan_fleet(found).pools
    tight = int((whole.base_bytes + 2.5 * whole.slot / 0.25) / 0.9)
    (pool,) = plan_fleet(found, tight).pools
    assert pool.max_loras == 2
    assert pool.fits
    (pool,) = plan_fleet(found, whole.base_bytes // 2).pools
    assert not pool.fits


def test_no_memory_for_any_slot(fleet_folder: Path, llama_base: Path) -> None:
    found = discover(fleet_folder, llama_base)
    (pool,) = plan_fleet(found, open_base(llama_base).nbytes // 2).pools
    assert (pool.max_loras, pool.max_cpu_loras, pool.fits) == (1, 4, False)


@pytest.mark.parametrize(("names", "forced"), [(("low", "high"), ["high"]), (("high",), [])])
def test_half_of_them_may_force_a_step(
    fleet_folder: Path, llama_base: Path, tmp_path: Path, names: list[str], forced: list[str]
) -> None:
    for name in names:
        shutil.copytree(fleet_folder / name, tmp_path / name)
    (pool,) = plan_fleet(discover(tmp_path, llama_base)).pools
    assert [each.name for each in pool.forced] == forced


def test_steps() -> None:
    assert [step_for(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]


def test_the_command_line(fleet_folder: Path, llama_base: Path, tmp_path: Path) -> None:
    found, png = tmp_path / "plan.yaml", tmp_path / "plan.png"
    words = ["plan", fleet_folder, "--base", llama_base, "--gpu-memory", "24GiB"]
    done = serve(*words, "--yaml", found, "--png", png)
    assert done.returncode == 0, done.stderr
    assert "--max-lora-rank 32" in done.stdout
    assert "only high (rank 20) needs --max-lora-rank 32: fitted to rank 16" in done.stdout
    assert "dora-export adapter RUN OUT --max-rank 16" in done.stdout
    # Nobody who trained plain LoRA knows a start rank.
    assert "  without --lora-target-modules: " in done.stdout and "began" not in done.stdout
    assert "left out" not in done.stdout
    options: dict[str, Any] = yaml.safe_load(found.read_text())
    assert options["max-lora-rank"] == 32
    assert options["dtype"] == "auto"  # the adapter kernels of a GPU take 16 bits
    here = serve(*words[:-2]).stdout
    assert "--dtype float32" in here
    assert "On a GPU, whose adapter kernels take no float32: --dtype auto" in here
    assert options["lora-target-modules"] == ["down_proj", "q_proj"]
    assert len(options["lora-modules"]) == 4
    assert png.read_bytes().startswith(b"\x89PNG")
    plan = json.loads(serve(*words, "--json").stdout)
    (pool,) = plan["pools"]
    assert pool["adapters"]["high"]["largest_rank"] == 20
    (command,) = plan["commands"]
    assert command[:2] == ["vllm", "serve"]
    assert command[command.index("--max-lora-rank") + 1] == "32"
    bad = serve(*words[:-1], "much")
    assert bad.returncode == 2
    assert "not a size" in bad.stderr


def test_pools_by_base_and_what_cannot_be_an_adapter() -> None:
    done = serve("plan", MODELS, "--json")
    plan = json.loads(done.stdout)
    (pool,) = (p for p in plan["pools"] if p["base"].endswith("tiny-llama-base"))
    assert set(pool["adapters"]) == {"Tiny_Llama--Count_Down--1", "Tiny_Llama--Every_Second--1"}
    assert pool["max_lora_rank"] == 16
    assert "\n2 adapters planned, 3 left out\n" in serve("plan", MODELS).stdout


def test_the_command_for_pasting_fits_a_terminal(
    fleet_folder: Path, llama_base: Path, tmp_path: Path
) -> None:
    """Many adapters are no line of a thousand signs, and a shell reads the same words."""
    for count in range(20):
        shutil.copytree(fleet_folder / "low", tmp_path / f"customer-{count:02}")
    asked = ("plan", tmp_path, "--base", llama_base)
    (words,) = json.loads(serve(*asked, "--json").stdout)["commands"]
    text = serve(*asked).stdout
    (command,) = re.findall(r"^vllm serve (?:.*\\\n)*.*", text, re.MULTILINE)
    assert shlex.split(command.replace("\\\n", "")) == words
    modules = command[command.index("--lora-modules") :].splitlines()
    longest = max(len(word) for word in words)
    assert len(modules) > 5 and max(map(len, modules)) <= max(80, longest + 8)


def test_nothing_to_plan_is_a_failure(llama_lora: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(llama_lora, tmp_path / "root" / name)
    done = serve("plan", tmp_path / "root")
    assert done.returncode == 1
    assert "left out: one, two: the run's base is not known" in done.stdout
    assert done.stdout.count("the run names ") == 1
    up = serve("up", tmp_path / "root", "--engine", "vllm", "--dry-run")
    assert up.returncode == 1
    assert "left out: one, two: the run's base is not known" in up.stderr
    assert "see what is said above of each" in up.stderr
    assert "pass --base" in done.stdout and "nothing here can be served" in done.stderr
    told = serve("plan", tmp_path / "root", "--json")
    assert told.returncode == 1
    assert "no base lies here" in json.loads(told.stdout)["problems"]["one"]


def test_an_adapter_that_embeds_is_served_by_a_pooling_runner(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama_lora, tmp_path / "writes")
    shutil.copytree(llama_lora, tmp_path / "embeds")
    config = tmp_path / "embeds" / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "task_type": "FEATURE_EXTRACTION"})
    )
    done = serve("plan", tmp_path, "--base", llama_base, "--json")
    writes, embeds = json.loads(done.stdout)["commands"]
    assert "--runner" not in writes
    assert [embeds[embeds.index(f"--{n}") + 1] for n in ("runner", "convert")] == [
        "pooling",
        "embed",
    ]


def test_up_dry_run_prints_what_it_would_start(tmp_path: Path) -> None:
    words = ["up", MODELS, "--engine", "vllm", "--base", LLAMA, "--dry-run", "--port", "8123"]
    done = serve(*words, "--", "--tensor-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    command = done.stdout.replace("\\\n", "").split()
    assert command[:2] == ["vllm", "serve"]
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    assert command[command.index("--dtype") + 1] == "float32"
    without = serve("up", MODELS, "--engine", "vllm", "--dry-run")
    assert "vllm serve models/tiny-llama-base" in without.stdout.replace(str(MODELS), "models")
    assert "left out: Tiny_Roberta--Sentiment--1" in without.stderr
    alone = serve("up", LLAMA, "--engine", "vllm", "--dry-run")
    assert alone.returncode == 0
    assert "--enable-lora" not in alone.stdout
    nothing = serve("up", tmp_path, "--engine", "vllm", "--dry-run")
    assert nothing.returncode == 1
    assert "no base, no run" in nothing.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--live"], "--live is for --engine vllm"),
        (["--gpu-memory", "8GB"], "--gpu-memory is for --engine vllm"),
        (["--vllm", "vllm"], "--vllm is for --engine vllm"),
        (["--", "--max-model-len", "64"], "for --engine vllm"),
        (["--engine", "vllm", "--threads", "1"], "--threads is for --engine onnxruntime"),
        (["--engine", "vllm", "--workers", "1"], "--workers is for --engine onnxruntime"),
        (["--engine", "vllm", "--", "--port", "9000"], "--port after --"),
        (["--engine", "vllm", "--", "--port=9000"], "--port after --"),
        (["--engine", "vllm", "--", "--host", "0.0.0.0"], "--host after --"),
        (["--engine", "vllm", "--", "--hos", "0.0.0.0"], "--host after --"),
        (["--engine", "vllm", "--", "--lora-modules", "a=b"], "--lora-modules after --"),
        (["--engine", "vllm", "--", "--lora_mod=a=b"], "--lora-modules after --"),
        (["--engine", "vllm", "--", "--model", "other"], "--model after --"),
        (["--engine", "vllm", "--", "--api-key", "key"], "--api-key after --"),
        (["--engine", "vllm", "--", "--ssl_certfile=cert"], "--ssl-certfile: vLLM is watched"),
        (["--engine", "vllm", "--", "--ssl-keyfile", "key"], "--ssl-keyfile: vLLM is watched"),
    ],
)
def test_up_refuses_what_its_engine_would_not_heed(words: list[str], says: str) -> None:
    done = CliRunner().invoke(dora_serve, ["up", str(MODELS), "--dry-run", *words])
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.split())


def test_up_refuses_fewer_slots_than_its_adapters_need(
    fleet_folder: Path, llama_base: Path
) -> None:
    """vLLM would serve them without what has no slot, and say nothing."""
    words = ["up", str(fleet_folder), "--base", str(llama_base), "--engine", "vllm", "--dry-run"]
    words.append("--")
    done = CliRunner().invoke(dora_serve, [*words, "--lora-target-modules", "q_proj", "up_proj"])
    assert done.exit_code == 1
    assert "found: down_proj\n" in done.stderr
    named = ["--lora_target_mod", "q_proj", "v_proj", "down_proj"]
    assert CliRunner().invoke(dora_serve, [*words, *named]).exit_code == 0


NAMES = ["plain", "模型", "naïve e\u0301", "a $x$ b", "𝒳" * 3]


@pytest.fixture(scope="module")
def odd_names(fleet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    for name in NAMES:
        shutil.copytree(fleet_folder / "low", root / name)
    return root


def test_wide_signs_leave_the_columns_where_they_are(odd_names: Path, llama_base: Path) -> None:
    lines = list(table(plan_fleet(discover(odd_names, llama_base))))
    head = next(line for line in lines if "largest rank" in line)
    ends = {cells(line) for line in lines if line.endswith("%") and "padding" not in line}
    assert ends == {cells(head)}
    assert cells("模型") == 4
    assert cells("e\u0301") == 1


def test_the_picture_hides_nothing(
    odd_names: Path, llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *words: Any, **named: Any) -> None:
        save(figure, *words, **named)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a sign that the font lacks
        found = discover(odd_names, llama_base)
        save_png(plan_fleet(found), tmp_path / "plan.png")
    (figure,) = figures
    (panel,) = figure.axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert len(labels) == len(set(labels)) == len(NAMES)
    assert "\\u6a21\\u578b" in labels
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(panel.get_window_extent())


@pytest.mark.parametrize("form", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_that_is_not_used_is_told(form: str, llama_base: Path, llama_lora: Path) -> None:
    """What is served has its base's, and merged it would have its own."""
    folder = llama_lora.parent / f"own-template-{form}"
    shutil.copytree(llama_lora, folder / "own")
    said = {}
    for base_has in (None, "another", "of its own"):
        base = folder / f"base-{base_has}"
        shutil.copytree(llama_base, base)
        for place, text in ((folder / "own", "of its own"), (base, base_has)):
            whole = text if form.endswith("jinja") else json.dumps({"chat_template": text})
            if whole is not None:
                (place / form).write_text(whole)
        said[str(base_has)] = discover(folder / "own", base).warnings.get("own", "")
    assert all("chat template is not used" in said[name] for name in ("None", "another"))
    assert "chat template" not in said["of its own"]
    (folder / "own" / form).unlink()
    os.mkfifo(folder / "own" / form)  # which nobody writes
    assert "chat template" not in discover(folder / "own", base).warnings.get("own", "")


def test_tokens_that_are_not_used_are_told(llama_base: Path, llama_lora: Path) -> None:
    """What is served reads and ends texts by its base's tokenizer, merged it would by its own."""
    folder = llama_lora.parent / "own-tokens"
    shutil.copytree(llama_lora, folder / "own")
    shutil.copytree(llama_base, folder / "base")
    for place in ("own", "base"):
        AutoTokenizer.from_pretrained(MODELS / "tiny-llama-base").save_pretrained(folder / place)

    def said(**more: str) -> str:
        words = AutoTokenizer.from_pretrained(folder / "base")
        words.add_special_tokens(more)
        words.save_pretrained(folder / "own")
        return discover(folder / "own", folder / "base").warnings.get("own", "")

    assert said() == said(pad_token="<pad>") == ""
    assert "lacks <turn>" in said(bos_token="<turn>")
    assert "ends texts with <end>" in said(eos_token="<end>")


def test_the_command_does_not_depend_on_the_folder_it_is_run_in(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama_lora, tmp_path / "fleet" / "one")
    shutil.copytree(llama_base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(dora_serve, ["plan", "fleet", "--base", "base", "--json"])
    words = json.loads(told.stdout)["commands"][0]
    assert str(tmp_path / "base") in words
    assert Path(words[-1].partition("=")[2]).is_absolute()
