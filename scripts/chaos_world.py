"""What `chaos_vllm.py` serves: a base, runs of mixed methods and ranks, and what each says."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from converters.model.base import open_base
from dora_serve import read_run
from dora_serve.proof.live import LiveModel

MODELS = Path(__file__).parents[1] / "models"
BASE = "tiny-llama-base"
torch.set_num_threads(1)  # models this small lose more to waiting threads than they win
TOKENS = 5  # that follow every prompt
GONE, BAD = "gone", "bad"  # what a name may be besides a content
_CLOSE = 2e-3  # of log-probabilities; the contents differ by far more
_MOMENT = 0.15  # seconds in which a look may meet a folder half there, but not two in a row
_TIE = 5e-3  # between two tokens, either of which may come
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Truth = list[tuple[list[int], list[torch.Tensor]]]  # per prompt: tokens, and log-probabilities


def prompts() -> list[list[int]]:
    """Short and long ones; the last three begin alike."""
    some = torch.Generator().manual_seed(1)

    def words(count: int) -> list[int]:
        return [1, *torch.randint(3, 80, (count,), generator=some).tolist()]

    long = words(270)
    return [words(3), words(7), words(40), words(140), long, [*long, 7, 9], [*long, 33, 5, 60]]


def make_contents(folder: Path) -> dict[str, Path]:
    """Name → run: everything vLLM serves, and in `bad-…` what it cannot."""
    base = folder / BASE
    shutil.copytree(MODELS / BASE, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    runs = folder / "contents"
    plain: dict[str, dict[str, Any]] = {
        "r1": {"r": 1, "lora_alpha": 2, "target_modules": _LINEAR},
        "r4": {"r": 4, "lora_alpha": 8, "target_modules": _LINEAR},
        "r4-again": {"r": 4, "lora_alpha": 8, "target_modules": _LINEAR},
        "r8-rs": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        "r16": {"r": 16, "lora_alpha": 16, "target_modules": ["o_proj", "down_proj", "k_proj"]},
        "patterns": {
            "r": 4,
            "target_modules": _LINEAR,
            "rank_pattern": {"layers.0.self_attn.q_proj": 7, "layers.2.mlp.down_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
        },
        "bad-rank": {"r": 40, "lora_alpha": 20, "target_modules": ["q_proj"]},
        "bad-dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj"]},
    }
    for seed, (name, settings) in enumerate(plain.items()):
        _save(base, runs / name, LoraConfig(task_type="CAUSAL_LM", **settings), seed)
    ada = AdaLoraConfig(
        init_r=12, target_r=4, lora_alpha=16, total_step=100, tinit=10, tfinal=10,
        task_type="CAUSAL_LM", target_modules=_LINEAR,
    )  # fmt: skip
    _save(base, runs / "ada", ada, 50)
    shutil.copytree(runs / "r4", runs / "bad-base")
    settings = json.loads((runs / "bad-base" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "org/another"
    (runs / "bad-base" / "adapter_config.json").write_text(json.dumps(settings))
    for name in ("Count_Down", "Every_Second"):
        (run,) = (MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8" / name).iterdir()
        shutil.copytree(run, runs / name)
        log = Path(*("Log" if part == "Checkpoint" else part for part in run.parts))
        shutil.copy(log / "task_info.json", runs / name)
    return {path.name: path for path in sorted(runs.iterdir())}


def _save(base: Path, out: Path, config: Any, seed: int) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    some = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=some) * 0.12
        if "lora_E" in name:  # as pruning leaves it
            parameter.data[torch.rand(parameter.shape, generator=some) < 0.6] = 0
    model.save_pretrained(out)


def truths(base: Path, contents: Mapping[str, Path]) -> dict[str, Truth]:
    """What PEFT, or the method's own module, says after every prompt, and the base by itself."""
    fresh: Callable[[], Any] = lambda: AutoModelForCausalLM.from_pretrained(base).eval()  # noqa: E731
    found = {BASE: _say(fresh())}
    for name, path in contents.items():
        if name.startswith("bad-"):
            continue
        if (path / "adapter_config.json").is_file():
            model = PeftModel.from_pretrained(fresh(), str(path)).eval()
        else:
            model = LiveModel(read_run(path), open_base(base)).model
        found[name] = _say(model)
    for one in found:
        assert [n for n in found if is_said(told(found[one], 4), found[n], 4)] == [one], one
    return found


def _say(model: Any) -> Truth:
    said = []
    with torch.inference_mode():
        for prompt in prompts():
            tokens: list[int] = []
            rows = []
            for _ in range(TOKENS):
                logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1]
                rows.append(torch.log_softmax(logits.float(), -1))
                tokens.append(int(rows[-1].argmax()))
            said.append((tokens, rows))
    return said


Answer = tuple[list[int], list[dict[int, float]]]  # tokens, and the likeliest at each place


def told(truth: Truth, prompt: int) -> Answer:
    """`truth` as an answer."""
    tokens, rows = truth[prompt]
    return tokens, [dict(enumerate(row.tolist())) for row in rows]


def is_said(answer: Answer, truth: Truth, prompt: int) -> bool:
    """Whether all of `answer` is what the content says that `truth` is of."""
    tokens, rows = truth[prompt]
    for token, likely, own, row in zip(*answer, tokens, rows, strict=True):
        if any(abs(float(row[k]) - value) > _CLOSE for k, value in likely.items()):
            return False
        if token != own:  # what follows has another beginning
            return bool(row[own] - row[token] < _TIE)
    return True


@dataclass
class Place:
    """A name that is served: its folder, and what lay there when. An event is its begin, its end,
    what is there since, and whether it was away or half there meanwhile."""

    name: str
    path: Path
    delay: float
    events: list[tuple[float, float, str, bool]] = field(default_factory=list)

    def possible(self, begin: float, end: float) -> set[str]:
        """What may be answered to a request between these times."""
        since = begin - self.delay
        before = [e for e in self.events if e[1] <= since]
        found = {before[-1][2]} if before else {GONE}
        for event in self.events[len(before) :]:
            if event[0] <= end:
                found |= {event[2], *([BAD] if event[3] else [])}
        return found

    def change(self, kind: str, content: str, source: Path) -> None:
        begin = time.time()
        aside = self.path.parent / f".{self.path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        if kind == "exchange":
            shutil.copytree(source, aside)
            if self.path.exists():
                self.path.rename(aside.with_suffix(".old"))
            aside.rename(self.path)
            shutil.rmtree(aside.with_suffix(".old"), ignore_errors=True)
        elif kind == "copy":
            shutil.rmtree(self.path, ignore_errors=True)
            shutil.copytree(source, self.path)
        elif kind == "overwrite":
            shutil.copytree(source, self.path, dirs_exist_ok=True)
            for file in set(_files(self.path)) - set(_files(source)):
                (self.path / file).unlink()
        elif kind == "slowly":
            self._write_slowly(source)
        elif kind == "delete":
            shutil.rmtree(self.path, ignore_errors=True)
        elif kind == "cut":
            for file in self.path.rglob("*.safetensors"):
                file.write_bytes(file.read_bytes()[:-200])
        what = {"delete": GONE, "cut": BAD}.get(
            kind, BAD if content.startswith("bad-") else content
        )
        if kind == "cut" and self.events and self.events[-1][2] == GONE:
            what = GONE
        end = time.time()
        self.events.append((begin, end, what, kind in ("slowly", "cut") or end - begin > _MOMENT))

    def _write_slowly(self, source: Path) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        weights = sorted(source.rglob("*.safetensors"))
        shutil.copytree(source, self.path, ignore=shutil.ignore_patterns("*.safetensors"))
        for file in weights:
            with (self.path / file.relative_to(source)).open("wb") as out:
                data = file.read_bytes()
                for start in range(0, len(data), max(1, len(data) // 3 + 1)):
                    out.write(data[start : start + len(data) // 3 + 1])
                    out.flush()
                    time.sleep(0.4)


def _files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


def next_change(place: Place, contents: Mapping[str, Path], random: Random) -> tuple[str, str]:
    """A kind of change, and the content that comes."""
    good = [name for name in contents if not name.startswith("bad-")]
    bad = [name for name in contents if name.startswith("bad-")]
    earlier = [event[2] for event in place.events[:-1] if event[2] in good]
    kind = random.choices(
        ["exchange", "copy", "overwrite", "slowly", "delete", "cut", "back", "unservable"],
        [5, 3, 3, 2, 2, 2, 4, 2],
    )[0]
    if kind == "back" and earlier:
        return random.choice(["exchange", "copy"]), earlier[-1]
    if kind == "unservable":
        return "exchange", random.choice(bad)
    return ("copy" if kind == "back" else kind), random.choice(good)
