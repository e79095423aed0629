"""A run that names another base than the one at hand is never paired with it silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.certificate import FILE
from dora_serve import merge
from dora_serve.commands import dora_export, dora_serve
from dora_serve.folder.inventory import discover
from dora_serve.server.prepare.make import make_offer
from dora_serve.vllm.fleet import plan_fleet
from tests.conftest import tiny_llama


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def of_another(llama_base: Path, llama_lora: Path, tmp_path: Path) -> Path:
    """A folder with a base and an adapter of its shapes that names another one."""
    world = tmp_path / "world"
    shutil.copytree(llama_base, world / "mine")
    run = Path(shutil.copytree(llama_lora, world / "run"))
    config = run / "adapter_config.json"
    said = {**json.loads(config.read_text()), "base_model_name_or_path": "org/theirs"}
    config.write_text(json.dumps(said))
    return world


def output_of(command: object, *words: object) -> str:
    done = CliRunner().invoke(command, [str(word) for word in words])  # type: ignore[arg-type]
    assert done.exit_code == 0, done.output
    return done.output


WARNS = "the run names org/theirs as its base; it goes with"


@pytest.mark.parametrize(
    "words",
    [("merge",), ("adapter",), ("adapter", "--target", "vllm"), ("merge", "--dry-run")],
    ids=" ".join,
)
def test_another_base_only_when_it_is_given_and_then_with_a_warning(
    words: tuple[str, ...], of_another: Path, llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    verb, *options = words
    given = ["--base", of_another / "mine", *options]
    told = output_of(dora_export, verb, of_another / "run", tmp_path / "out", *given)
    assert told.count(WARNS) == 1
    silent = output_of(
        dora_export, verb, llama_lora, tmp_path / "own", "--base", llama_base, *options
    )
    assert "as its base" not in silent
    if verb == "merge":
        bare = CliRunner().invoke(
            dora_export, ["merge", str(of_another / "run"), str(tmp_path / "bare")]
        )
        assert bare.exit_code == 1
        assert not (tmp_path / "bare").exists()


def test_the_library_warns_as_the_command_line_does(of_another: Path, tmp_path: Path) -> None:
    result = merge(of_another / "run", tmp_path / "out", base=of_another / "mine")
    assert sum(WARNS in warning for warning in result.warnings) == 1
    assert WARNS in (tmp_path / "out" / FILE).read_text()


def test_up_and_plan_list_it_as_not_served(of_another: Path) -> None:
    found = discover(of_another)
    offer = make_offer(of_another, None, True, print)
    assert [model.name for model in offer.models] == ["mine"]
    for problems in (found.problems, offer.problems, plan_fleet(found).problems):
        assert "the run names org/theirs" in problems["run"]
    plan = json.loads(output_of(dora_serve, "plan", of_another, "--json"))
    assert "the run names org/theirs" in plan["problems"]["run"]
    assert [pool["name"] for pool in plan["pools"]] == ["mine"]
    up = output_of(dora_serve, "up", of_another, "--engine", "vllm", "--dry-run")
    assert "left out: run" in up


def test_a_base_that_is_not_served_is_listed_with_its_reason(
    of_another: Path, llama_base: Path, roberta_base: Path
) -> None:
    for name in ("second", "third"):
        shutil.copytree(llama_base, of_another / name)
    shutil.copytree(roberta_base, of_another / "masks")
    given = discover(of_another, of_another / "mine")
    fleet = plan_fleet(given)
    assert [pool.name for pool in fleet.pools] == ["mine"]
    assert {"second", "third", "masks"} <= fleet.problems.keys()
    shutil.rmtree(of_another / "run")
    alone = plan_fleet(discover(of_another, of_another / "mine"))
    assert [pool.name for pool in alone.pools] == ["mine"]
    assert {"second", "third", "masks"} <= alone.problems.keys()
    offer = make_offer(of_another, None, True, print)
    named = {model.name for model in offer.models} | offer.problems.keys()
    assert named == {"mine", "second", "third", "masks"}


@pytest.fixture
def too_wide(llama_lora: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with an adapter, and a base that is too wide for it and not the one it names."""
    shutil.copytree(llama_lora, tmp_path / "fleet" / "run")
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    return tmp_path / "fleet", tmp_path / "wide"


def test_a_base_that_does_not_fit_is_told_with_the_one_that_is_named(
    too_wide: tuple[Path, Path], llama_base: Path, tmp_path: Path
) -> None:
    """Whatever finds it out."""
    fleet, wide = too_wide
    says = f"the run names {llama_base} as its base: pass that one with --base"
    for command, *words in (
        (dora_export, "merge", fleet / "run", tmp_path / "out"),
        (dora_export, "adapter", fleet / "run", tmp_path / "out", "--target", "vllm"),
        (dora_serve, "plan", fleet),
    ):
        done = CliRunner().invoke(command, [*map(str, words), "--base", str(wide)])
        assert done.exit_code == 1 and says in done.output, done.output


def test_a_given_base_is_not_served_in_place_of_all_that_was_asked_for(
    too_wide: tuple[Path, Path], own_cache: Path
) -> None:
    """Nobody would look for the reason behind a server that runs, and no graph is made for it."""
    fleet, wide = too_wide
    asked = ["up", str(fleet), "--base", str(wide), "--dry-run", "--engine"]
    for engine in ("onnxruntime", "vllm"):
        done = CliRunner().invoke(dora_serve, [*asked, engine])
        assert done.exit_code == 1, done.output
        assert "served: run" in done.stderr or "left out: run" in done.stderr
        assert "nothing here can be served" in done.stderr
    offer = make_offer(fleet, str(wide), False, print)
    assert not offer.models and "run" in offer.problems
    assert not list(own_cache.rglob("*.onnx"))
    assert make_offer(wide, str(wide), True, print).models  # the base is what is asked for


def test_a_base_that_is_not_there(too_wide: tuple[Path, Path], tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    done = CliRunner().invoke(dora_serve, ["plan", str(too_wide[0]), "--base", gone])
    assert done.exit_code == 1
    assert "no such base model: there is no such path" in done.stderr and gone in done.stderr
