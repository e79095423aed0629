"""What others named reaches a terminal, a page or a copied command without power over it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from converters.errors import DoraExportError, MissingError, RunError
from converters.model.base import open_base
from dora_serve import diff, read_run, write_adapter
from dora_serve.commands import dora_export, dora_serve
from dora_serve.rankmap.html import save_html
from dora_serve.rankmap.picture import save_png
from dora_serve.server.prepare.offer import DECODES, Graph, Offer, OfferedModel
from dora_serve.server.up import table
from dora_serve.wording import in_flags, json_text, quoted
from tests.conftest import DATA

EVIL = "\x1b]0;PWN\x07\x1b[2J\x9b31m\u202eEVIL\r"
SHOWN = r"\x1b]0;PWN\x07\x1b[2J\x9b31m\u202eEVIL\r"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
REFERENCE = DATA / "reference"


def obeyed(text: str) -> set[str]:
    """What a terminal would obey, or a reader be deceived by."""
    return {char for char in text if not char.isprintable() and char != "\n"}


def renamed(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    evil = {name.replace("v_proj", f"v_proj{EVIL}"): t for name, t in tensors.items()}
    assert evil.keys() != tensors.keys()
    save_file(evil, folder / WEIGHTS)
    configured(target_modules=["q_proj", f"v_proj{EVIL}", "up_proj"])(folder)


def one_more(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, f"{next(iter(tensors))}{EVIL}": next(iter(tensors.values())).clone()},
              folder / WEIGHTS)  # fmt: skip


def configured(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "modules": renamed,
    "tensor": one_more,
    "base": configured(base_model_name_or_path=f"some{EVIL}/base"),
    "type": configured(peft_type=f"LO{EVIL}"),
    "task": configured(task_type=f"CAUSAL{EVIL}"),
    "targets": configured(target_modules=[f"q{EVIL}"]),
    "pattern": configured(rank_pattern={EVIL: 3}),
}


def export(*words: object) -> Result:
    return CliRunner().invoke(dora_export, [str(word) for word in words])


@pytest.mark.parametrize("change", CHANGES)
def test_no_command_passes_on_what_a_terminal_obeys(
    change: str, llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    run, good = tmp_path / "run", tmp_path / "good"
    shutil.copytree(llama_lora, run)
    write_adapter(llama_lora, good, base=llama_base)
    CHANGES[change](run)
    base = ("--base", llama_base)
    commands = [
        ("inspect", run), ("inspect", run, *base, "--curve"), ("inspect", run, "--json"),
        ("lint", run), ("lint", run, *base, "--json"), ("diff", run, good), ("check", run),
        ("adapter", run, tmp_path / "out"), ("merge", run, tmp_path / "out", *base, "--dry-run"),
        ("merge", run, tmp_path / "out"), ("batch", run, tmp_path / "batch", "--dry-run"),
    ]  # fmt: skip
    said = ""
    for words in commands:
        done = export(*words)
        assert done.exception is None or isinstance(done.exception, SystemExit), words
        assert not obeyed(done.output + done.stderr), (words, done.output + done.stderr)
        said += done.output
    assert change == "task" or r"\u202e" in said or r"\\u202e" in said


def test_a_warning_is_one_line(llama_lora: Path, llama_base: Path, tmp_path: Path) -> None:
    """What a run calls its base, or a setting, begins no line of its own in what is said of it."""
    shutil.copytree(llama_lora, tmp_path / "all" / "run")
    forged = {"base_model_name_or_path": "x\nerror: forged", "y\nerror: forged": {}}
    configured(**forged)(tmp_path / "all" / "run")
    words = [str(tmp_path / "all"), "--base", str(llama_base)]
    done = [
        CliRunner().invoke(dora_serve, ["plan", *words]),
        CliRunner().invoke(dora_serve, ["up", *words, "--dry-run"]),
        CliRunner().invoke(dora_serve, ["up", *words, "--engine", "vllm", "--dry-run"]),
        CliRunner().invoke(dora_export, ["batch", *words, str(tmp_path / "out")]),
    ]
    for each in done:
        assert r"x\nerror: forged" in each.output, each.output
        assert not re.search("^error: forged", each.output, re.MULTILINE), each.output


def test_a_folder_whose_name_moves_the_cursor(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama_base, tmp_path / "all" / "base")
    shutil.copytree(llama_lora, tmp_path / "all" / f"run{EVIL}")
    shutil.copytree(llama_lora, tmp_path / "all" / "good")
    done = CliRunner().invoke(dora_serve, ["plan", str(tmp_path / "all")])
    assert done.exit_code == 0, done.output
    assert not obeyed(done.output)
    assert f"left out: run{SHOWN}: its name has signs that cannot be shown" in done.output
    assert "good" in done.output
    proof = tmp_path / f"out{EVIL}"
    done = export("adapter", llama_lora, proof, "--base", llama_base)
    assert done.exit_code == 0 and not obeyed(done.output)
    assert proof.is_dir()


def test_certificates_of_others(llama_lora: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_lora, tmp_path / "made"))
    files = {EVIL: {"bytes": EVIL}}
    (folder / "dora_export.json").write_text(json.dumps({"target": EVIL, "files": files}))
    for words in (("check", folder), ("check", folder, "--json")):
        done = export(*words)
        assert done.exit_code == 1
        assert not obeyed(done.output)


def test_json_stays_json_and_letters_stay_letters() -> None:
    value = {EVIL: ["ä", "日本", "\U000e0041", "\ud83d"]}
    text = json_text(value, indent=2)
    assert json.loads(text) == value
    assert not obeyed(text)
    assert "ä" in text and "日本" in text


def test_errors_show_names_in_their_message_too() -> None:
    error = RunError(f"the run {EVIL} is odd", found=EVIL, remedy="see `merge`")
    assert not obeyed(str(error)) and not obeyed(in_flags(error))
    assert in_flags(error).splitlines()[-1] == "  to do: see dora-export merge"


@pytest.mark.parametrize("word", ["plain", "a b", "$(touch x)", "it's", f"'\\{EVIL}'", "-x", ""])
def test_commands_to_copy_are_one_word(word: str) -> None:
    text = quoted(word)
    assert text.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {text}"], capture_output=True, check=True)
    assert done.stdout.decode() == word


@pytest.mark.parametrize("name", ["x; rm -rf ~", "$(id)/y", "--local-dir=/", "a b", "a/b/c", EVIL])
def test_no_remedy_is_a_command_of_an_unchecked_name(name: str) -> None:
    with pytest.raises(MissingError) as caught:
        open_base(name)
    assert "hf download" not in str(caught.value)
    with pytest.raises(DoraExportError) as refused:
        read_run(name)
    assert "hf download" not in str(refused.value)
    with pytest.raises(MissingError, match="hf download some/base"):
        open_base("some/base")


def test_the_table_of_what_is_served() -> None:
    model = OfferedModel(
        name=f"it's{EVIL}", kind="run", method=EVIL, folder="f", task=DECODES, base=EVIL,
        adapter=None, modules={}, parameters=0, bytes=0,
    )  # fmt: skip
    graph = Graph(folder="f", task=DECODES, base="b", path=None)
    text = table(Offer(graphs=[graph], models=[model], problems={}), "http://x", False)
    assert not obeyed(text)
    body = subprocess.run(
        ["bash", "-c", f"printf %s {text.strip().rpartition(' -d ')[2]}"], capture_output=True
    )
    assert json.loads(body.stdout)["model"] == model.name


def test_pages_and_pictures(tmp_path: Path) -> None:
    numbers = {"start": 1, "rank": 1, "norm": None, "relative": None, "lost": None}
    save_html({f"a{EVIL}": numbers}, {"method": EVIL}, tmp_path / "x.html", f"t{EVIL}")
    page = (tmp_path / "x.html").read_text()
    told = re.search(r'id="modules">(.*?)</script>', page)
    assert told is not None
    assert not obeyed(page) and not obeyed("".join(json.loads(told[1])))
    # A formula that is none would end matplotlib.
    save_png({r"a.0.$\frac{$": 1, "b.0.$": 2, f"{EVIL}.0.c": 3}, 3, tmp_path / "x.png", "$$\\x$$")
    assert (tmp_path / "x.png").stat().st_size


def test_the_api_takes_names_as_they_are(llama_lora: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(llama_lora, tmp_path / "run"))
    renamed(run)
    assert any(EVIL in name for name in diff(run, run).modules)


EMPTY = [
    ("adapter", "{run}", ""), ("adapter", "", "{out}"), ("merge", "{run}", ""),
    ("merge", "{run}", "{out}", "--base", ""), ("export", "{run}", "", "--target", "merged"),
    ("extract", "", "{out}", "--base", "x"), ("extract", "x", "", "--base", "x"),
    ("diff", "", "x"), ("diff", "x", ""), ("onnx", "{run}", ""), ("onnx", "", "{out}"),
    ("onnx", "{out}", "--adapter", ""), ("batch", "", "{out}"), ("batch", "{run}", ""),
    ("verify", "", "{out}"), ("verify", "{run}", ""), ("check", ""),
    ("check", "{out}", "--public-key", ""), ("sign", "", "--private-key", "x"),
    ("sign", "{out}", "--private-key", ""), ("lint", ""), ("lint", "{run}", "--fix", ""),
    ("inspect", ""), ("inspect", "{run}", "--html", ""), ("inspect", "{run}", "--png", ""),
    ("inspect", "{run}", "--curve-png", ""), ("inspect", "{run}", "--task-info", ""),
    ("inspect", "{run}", "--part", ""), ("inspect", "{run}", "--base", ""),
]  # fmt: skip
EMPTY_SERVE = [
    ("up", ""), ("up", "{run}", "--base", ""), ("plan", ""), ("plan", "{run}", "--png", ""),
    ("plan", "{run}", "--yaml", ""), ("deploy", "", "--to", "ray"),
    ("deploy", "{run}", "--to", "ray", "--output", ""),
    ("deploy", "{run}", "--to", "ray", "--models-at", ""),
    ("watch", "", "--server", "http://localhost:1"),
]  # fmt: skip


@pytest.mark.parametrize("words", [*EMPTY, *EMPTY_SERVE], ids=lambda words: " ".join(words))
def test_an_empty_path_is_refused(
    words: tuple[str, ...], llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a variable that is not set."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    given = [word.format(run=llama_lora, out=tmp_path / "out") for word in words]
    command = dora_serve if words in EMPTY_SERVE else dora_export
    force = ["--force"] if words[0] in ("adapter", "merge", "export", "lint", "batch") else []
    done = CliRunner().invoke(command, [*given, *force])
    assert done.exit_code == 2, done.output
    assert "empty" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert [path.name for path in Path().iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("engine", ["onnxruntime", "vllm"])
def test_an_empty_key_is_none(engine: str, tmp_path: Path) -> None:
    words = ["up", str(tmp_path), "--engine", engine, "--api-key", ""]
    refused = CliRunner().invoke(dora_serve, words)
    assert refused.exit_code == 2 and "--api-key is empty" in refused.output


def test_a_link_to_itself_is_refused(llama_lora: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for words in (("adapter", llama_lora, tmp_path / "loop"), ("inspect", tmp_path / "loop")):
        done = export(*words)
        assert done.exit_code == 2
        assert "no possible path" in done.output


def test_a_picture_replaces_no_input(llama_lora: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(llama_lora, tmp_path / "run"))
    before = (run / CONFIG).read_bytes()
    (tmp_path / "link").symlink_to(run / CONFIG)
    for place in (run / CONFIG, tmp_path / "link"):
        done = export("inspect", run, "--html", place, "--force")
        assert done.exit_code == 1
        assert "would replace an input" in done.stderr
    assert (run / CONFIG).read_bytes() == before
    fresh = export("inspect", run, "--html", run / "x", "--force")
    assert fresh.exit_code == 1 and "lie inside one" in fresh.stderr and not (run / "x").exists()
    two = export("inspect", run, "--html", tmp_path / "x", "--png", tmp_path / "x")
    assert two.exit_code == 2 and not (tmp_path / "x").exists()


def test_a_plans_files_are_whole_and_replace_nothing(
    llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama_base, tmp_path / "all" / "base")
    shutil.copytree(llama_lora, tmp_path / "all" / "run")
    mine = tmp_path / "mine"
    for option in ("--png", "--yaml"):
        mine.write_text("mine")
        words = ["plan", str(tmp_path / "all"), option, str(mine)]
        refused = CliRunner().invoke(dora_serve, words)
        assert refused.exit_code == 1 and "there already" in refused.output
        assert mine.read_text() == "mine"
        assert CliRunner().invoke(dora_serve, [*words, "--force"]).exit_code == 0
        assert mine.read_bytes() != b"mine"
        for name in ("base/config.json", "run/adapter_config.json"):
            before = (tmp_path / "all" / name).read_bytes()
            words = ["plan", str(tmp_path / "all"), option, str(tmp_path / "all" / name), "--force"]
            refused = CliRunner().invoke(dora_serve, words)
            assert refused.exit_code == 1 and "replace an input" in refused.output
            assert (tmp_path / "all" / name).read_bytes() == before
        for name in ("base", "run"):
            fresh = tmp_path / "all" / name / "fresh"
            words = ["plan", str(fresh.parents[1]), option, str(fresh)]
            refused = CliRunner().invoke(dora_serve, words)
            assert refused.exit_code == 1 and "lie inside one" in refused.output
            assert not fresh.exists()


def test_a_remedy_names_no_flag_that_the_command_lacks(tmp_path: Path) -> None:
    """Of a run without its log folder."""
    run = next(REFERENCE.glob("runs/Checkpoint/Tiny_Llama/*/*/*"))
    shutil.copytree(run, tmp_path / "runs" / "one")
    base = str(REFERENCE / "bases/llama")
    said = CliRunner().invoke(
        dora_export, ["batch", f"{tmp_path}/runs", f"{tmp_path}/out", "--base", base, "--dry-run"]
    )
    assert "--lora-alpha (of dora-export adapter)" in said.output
    said = CliRunner().invoke(
        dora_export, ["adapter", f"{tmp_path}/runs/one", f"{tmp_path}/out", "--base", base]
    )
    assert "--lora-alpha" in said.output and "(of dora-export" not in said.output
