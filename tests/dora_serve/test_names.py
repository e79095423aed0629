"""Names: one rule, and every command, engine and resolver says the same of one folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from converters.errors import DoraExportError
from converters.model.base import open_base
from dora_serve import read_run
from dora_serve.batch import plan_batch
from dora_serve.commands import dora_serve
from dora_serve.folder import pairing
from dora_serve.folder.inventory import discover, read_member
from dora_serve.folder.names import name_elsewhere, names_below, names_inside, not_a_name
from dora_serve.folder.pairing import base_of, is_named
from dora_serve.server.prepare.make import make_offer
from tests.conftest import tiny_llama
from tests.dora_serve.following import desired, find_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shapes as `llama_base`, and called the same, with other weights."""
    folder = tmp_path_factory.mktemp("other") / "base"
    tiny_llama(initializer_range=0.1).save_pretrained(folder)
    return folder


RUN, ELSEWHERE = {"run": "root/run"}, "elsewhere/base"
SNAPSHOT = "root/models--org--tiny/snapshots/abc"


@dataclass(frozen=True)
class Layout:
    """What lies where: "base" and "other" are bases, "run" is a run of "base". `given`: `--base`.
    `bases`, `runs`: the names expected; `of`: the base of the runs."""

    places: dict[str, str]
    bases: dict[str, str]
    runs: dict[str, str] = field(default_factory=lambda: RUN)
    of: str = "base"
    given: str | None = None
    root: str = "root"


def one_base(run: str, name: str) -> Layout:
    """A base and a run in the folder `run`."""
    return Layout({"root/base": "base", run: "run"}, {"base": "root/base"}, {name: run})


LAYOUTS = {
    "plain": one_base("root/run", "run"),
    "a folder between that has the run's name": one_base("root/run/run", "run"),
    "a run beside a base of its name": one_base("root/runs/base", "runs/base"),
    "deep": Layout(
        {"root/a/b/base": "base", "root/c/d/run": "run"},
        {"base": "root/a/b/base"},
        {"run": "root/c/d/run"},
    ),
    "namesakes": Layout(
        {"root/a/base": "base", "root/b/base": "other", "root/x/run": "run", "root/y/run": "run"},
        {"a/base": "root/a/base", "b/base": "root/b/base"},
        {"x/run": "root/x/run", "y/run": "root/y/run"},
        "a/base",
    ),
    "nested namesakes": Layout(
        {"root/base": "base", "root/run/run": "run", "root/run/x/run": "run"},
        {"base": "root/base"},
        {"run/run": "root/run/run", "run/x/run": "root/run/x/run"},
    ),
    "the root is the run": Layout(
        {"root": "run", ELSEWHERE: "base"}, {"base": ELSEWHERE}, {"root": "root"}, given=ELSEWHERE
    ),
    "the base is elsewhere": Layout(
        {"root/run": "run", ELSEWHERE: "base"}, {"base": ELSEWHERE}, given=ELSEWHERE
    ),
    "one base here, its namesake elsewhere": Layout(
        {"root/base": "other", "root/run": "run", ELSEWHERE: "base"},
        {"base": "root/base", ELSEWHERE: ELSEWHERE},
        of=ELSEWHERE,
        given=ELSEWHERE,
    ),
    "two bases here, their namesake elsewhere": Layout(
        {"root/a/base": "other", "root/b/base": "other", "root/run": "run", ELSEWHERE: "base"},
        {"a/base": "root/a/base", "b/base": "root/b/base", ELSEWHERE: ELSEWHERE},
        of=ELSEWHERE,
        given=ELSEWHERE,
    ),
    "a run here has the name of the base elsewhere": Layout(
        {"root/x/base": "run", ELSEWHERE: "base"},
        {ELSEWHERE: ELSEWHERE},
        {"base": "root/x/base"},
        of=ELSEWHERE,
        given=ELSEWHERE,
    ),
    "the given base is here": Layout(
        {"root/a/base": "base", "root/b/base": "other", "root/run": "run"},
        {"a/base": "root/a/base", "b/base": "root/b/base"},
        of="a/base",
        given="root/a/base",
    ),
    "the folder is a snapshot of the hub's cache": Layout(
        {SNAPSHOT: "base", "root/run": "run"}, {"org/tiny": SNAPSHOT}, of="org/tiny", given=SNAPSHOT
    ),
}


def build(layout: Layout, top: Path, sources: dict[str, Path]) -> Path:
    for place, kind in layout.places.items():
        shutil.copytree(sources[kind], top / place, dirs_exist_ok=True)
    return top / layout.root


Spell = Callable[[Path, Path], str]


def spelled_relatively(path: Path, top: Path) -> str:
    return os.path.relpath(path, top)


def through_a_link(path: Path, top: Path) -> str:
    link = top / "link"
    link.symlink_to(path)
    return str(link)


SPELLINGS: dict[str, Spell] = {
    "absolute": lambda path, _: str(path),
    "relative": spelled_relatively,
    "with a slash": lambda path, _: f"{path}/",
    "with dots": lambda path, _: f"{path.parent}/./../{path.parent.name}/{path.name}",
    "through a link": through_a_link,
}


def command(*words: object) -> str:
    done = CliRunner().invoke(dora_serve, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


def after(words: list[str], flag: str) -> list[str]:
    """The values of `flag`, up to the next one."""
    rest = words[words.index(flag) + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:end]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_consumer_says_the_same(
    layout: Layout,
    tmp_path: Path,
    llama_base: Path,
    llama_lora: Path,
    other_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = {"base": llama_base, "other": other_base, "run": llama_lora}
    root = build(layout, tmp_path, sources)
    base = layout.given
    given = [] if base is None else ["--base", base]
    runs, bases = set(layout.runs), set(layout.bases)

    found = discover(root, base)
    assert not found.problems
    assert {n: b.path.resolve() for n, b in found.bases.items()} == {
        n: tmp_path / place for n, place in layout.bases.items()
    }
    assert {n: m.path for n, m in found.members.items()} == {
        n: tmp_path / place for n, place in layout.runs.items()
    }
    assert {found.name_of(m.base) for m in found.members.values()} == {layout.of}

    planned = json.loads(command("plan", root, *given, "--json"))
    (pool,) = planned["pools"]
    (words,) = planned["commands"]
    assert pool["name"] == layout.of
    assert set(planned["problems"]) == bases - {layout.of}  # none goes without a word
    assert after(words, "--served-model-name") == [layout.of]
    adapters = after(words, "--lora-modules")
    assert {word.rpartition("=")[0] for word in adapters} == runs

    served = command("up", root, *given, "--engine", "vllm", "--dry-run").replace("\\\n", "")
    assert after(served.split(), "--served-model-name") == [layout.of]
    assert sorted(after(served.split(), "--lora-modules")) == sorted(adapters)

    offer = make_offer(root.resolve(), base, True, print)
    assert {(m.name, m.base) for m in offer.models} == {
        *((name, None) for name in bases),
        *((name, layout.of) for name in runs),
    }
    assert {graph.base for graph in offer.graphs} == bases

    ray = ["deploy", root, *given, "--to", "ray", "--adapters-at", "s3://bucket/a"]
    (config,) = yaml.safe_load_all(command(*ray))
    (llm,) = config["applications"][0]["args"]["llm_configs"]
    assert llm["model_loading_config"]["model_id"] == layout.of

    assert set(desired(root, base).adapters) == runs
    jobs = plan_batch(root, tmp_path / "out", base=base).jobs
    assert {(job.name, Path(job.run)) for job in jobs} == {
        (n, tmp_path / place) for n, place in layout.runs.items()
    }

    top = root.resolve()
    for name, place in layout.runs.items():
        path = tmp_path / place
        assert find_run(root, name) == path
        if path != top:
            assert find_run(root, path.relative_to(top).as_posix()) == path
    for name in bases - runs:
        assert find_run(root, name) is None


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize(
    "name", ["the given base is here", "one base here, its namesake elsewhere"]
)
def test_however_the_base_is_spelled(
    name: str,
    spell: Spell,
    tmp_path: Path,
    llama_base: Path,
    llama_lora: Path,
    other_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = LAYOUTS[name]
    root = build(layout, tmp_path, {"base": llama_base, "other": other_base, "run": llama_lora})
    monkeypatch.chdir(tmp_path)
    found = discover(root, spell(tmp_path / str(layout.given), tmp_path))
    assert set(found.bases) == set(layout.bases)
    assert found.given == layout.of
    assert found.members["run"].base is found.bases[layout.of]


def test_a_hub_id(
    tmp_path: Path, llama_base: Path, llama_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id, by the folder of its snapshot, or by the run that names it: one base, one name."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--tiny" / "snapshots" / "abc"
    shutil.copytree(llama_base, snapshot)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    root = tmp_path / "root"
    for name in ("one", "two"):
        names_its_base(Path(shutil.copytree(llama_lora, root / name)), "org/tiny")
    for given in ("org/tiny", snapshot, None):
        found = discover(root, given)
        assert set(found.bases) == {"org/tiny"}, given
        assert not found.problems
        assert not found.warnings
        assert {m.base.path for m in found.members.values()} == {snapshot}
    shutil.copytree(llama_base, root / "tiny")
    assert discover(root).members["one"].base.path == root / "tiny"  # nearer, of the same name


def names_its_base(run: Path, base: str | None) -> None:
    config = run / "adapter_config.json"
    said = {**json.loads(config.read_text()), "base_model_name_or_path": base}
    config.write_text(json.dumps(said))


def test_a_run_that_names_another_base_is_not_paired_in_silence(
    tmp_path: Path, llama_base: Path, llama_lora: Path, other_base: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(other_base, root / "llama")
    run = Path(shutil.copytree(llama_lora, root / "run"))
    for named in ("org/mistral", "/elsewhere/mistral", str(llama_base)):
        names_its_base(run, named)
        found = discover(root)
        assert not found.members
        assert "the run's base is not known" in found.problems["run"]
        assert f"the run names {named}" in found.problems["run"]
        given = discover(root, root / "llama")
        assert given.members["run"].base is given.bases["llama"]
        assert f"the run names {named}" in given.warnings["run"]
        with pytest.raises(DoraExportError, match="not known"):
            read_member("run", run, [open_base(root / "llama")])
    for silent in ("org/llama", "/elsewhere/llama", "llama", None):
        names_its_base(run, silent)
        found = discover(root)
        assert found.members["run"].base is found.bases["llama"], silent
        assert not found.warnings
    # A folder that is there settles it: a namesake of other weights is not what was named.
    (tmp_path / "llama").symlink_to(llama_base)
    twin = Path(shutil.copytree(llama_base, tmp_path / "twin" / "base"))
    assert is_named(str(llama_base), open_base(twin))
    assert not is_named(str(llama_base), open_base(other_base))
    assert is_named(str(tmp_path / "llama"), open_base(llama_base))


def test_a_method_that_is_read_beside_its_base_finds_it_among_several(
    tmp_path: Path, llama_base: Path, other_base: Path
) -> None:
    from peft import VeraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    root = tmp_path / "root"
    shutil.copytree(llama_base, root / "mine")
    shutil.copytree(other_base, root / "theirs")
    model = LlamaForCausalLM.from_pretrained(root / "mine")
    config = VeraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    get_peft_model(model, config).save_pretrained(root / "run")
    names_its_base(root / "run", "org/mine")
    with pytest.raises(DoraExportError):
        read_run(root / "run")
    found = discover(root)
    assert not found.problems
    assert found.members["run"].base is found.bases["mine"]


def test_a_base_of_the_cache_that_does_not_fit(
    tmp_path: Path, llama_base: Path, llama_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(hidden_size=16).save_pretrained(tmp_path / "small")
    names_its_base(Path(shutil.copytree(llama_lora, tmp_path / "run")), "org/tiny")
    run = read_run(tmp_path / "run")
    for held, fine in ((llama_base, True), (tmp_path / "small", False)):
        cached = open_base(held)
        monkeypatch.setattr(pairing, "open_base", lambda *_, cached=cached: cached)
        if fine:
            assert base_of(run, []) is cached
        else:
            with pytest.raises(DoraExportError, match="not known"):
                base_of(run, [])


@pytest.mark.parametrize("name", ["run", "a/b", "a b", "模型", "e\u0301", ".hidden"])
def test_what_is_a_name(name: str) -> None:
    assert not_a_name(name) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((name, "a blank") for name in (" run", "run ", "a/ b", "a /b")),
        *((name, "empty") for name in ("", "a//b", "/a", "a/", "./a", "a/..")),
        *((name, "cannot be shown") for name in ("a\0", "a\nb", "a\u200bb", "\u3000a", "\ud800")),
    ],
)
def test_what_is_no_name(name: str, says: str) -> None:
    assert says in str(not_a_name(name))


def test_what_lies_elsewhere_renames_nothing(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "c" / "y"]
    assert list(names_below(tmp_path, paths).values()) == ["a/x", "b/x", "y"]
    assert names_below(tmp_path, [tmp_path]) == {tmp_path: tmp_path.name}
    hub, place = tmp_path / "models--org--tiny" / "snapshots" / "abc", tmp_path / "org" / "tiny"
    assert names_below(tmp_path, [hub]) == {hub: "org/tiny"}
    # Its id is the path of another: that is no other's name.
    both = {hub: "models--org--tiny/snapshots/abc", place: "tiny"}
    assert names_below(tmp_path, list(both)) == both
    far = tmp_path / "far" / "y"
    assert name_elsewhere(far, {"a/x"}) == "y"
    assert name_elsewhere(far, {"y"}) == "far/y"
    assert name_elsewhere(far, {"y", "far/y"}) == f"{tmp_path.name}/far/y"


def test_adapters_inside_onnx_folders() -> None:
    named = names_inside({"one": ["a", "b"], "two": ["a", "c", "one", "base"]}, {"base"})
    assert named == {
        ("one", "a"): "one/a",
        ("one", "b"): "b",
        ("two", "a"): "two/a",
        ("two", "c"): "c",
        ("two", "one"): "two/one",
        ("two", "base"): "two/base",
    }
