"""What happens in the folder while the server runs: adapters that were ready, runs that the server
was started with, names, and what can no longer be served."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from dora_serve import write_adapter
from tests.engines.vllm.servers import AT_START, BASE, DORA_SERVE, KEY, SMALL, ask, wait_until
from tests.engines.vllm.test_vllm_resolver import (
    PROMPT,
    base_said,
    exchange,
    lora,
    names,
    refused,
    said,
    traffic,
)

pytest.importorskip("vllm")
pytestmark = pytest.mark.usefixtures("up")


@contextmanager
def watching(folder: Path, base: Path, url: str, cache: Path, *more: str) -> Iterator[Path]:
    """`dora-serve watch`; yields its log."""
    log = cache / f"watch-{folder.parent.name}.log"
    words = [DORA_SERVE, "watch", folder, "--server", url, "--base", base, "--interval", "0.3"]
    env = {"DORA_SERVE_CACHE": str(cache), "DORA_SERVE_API_KEY": KEY, "PATH": "/usr/bin:/bin"}
    with log.open("w") as out:
        process = subprocess.Popen([*map(str, words), *more], env=env, stdout=out, stderr=out)
    try:
        yield log
    finally:
        process.terminate()
        process.wait()


def ready(base: Path, out: Path, rank: int) -> Path:
    """An adapter as `dora-export adapter --target vllm` leaves it."""
    run = lora(base, out.with_name(f"{out.name}-run"), rank)
    write_adapter(run, out, base=base, target="vllm")
    return out


def is_refused(url: str, name: str, kind: type[openai.APIStatusError]) -> bool:
    """Whether it is by now: a request that vLLM reads while the name goes is told 404 alone."""
    try:
        ask(url, name, PROMPT)
    except (kind, openai.NotFoundError) as error:
        return isinstance(error, kind)
    return False


def test_a_run_of_the_start_is_followed(folder: Path, url: str, tmp_path: Path) -> None:
    old, second = said(folder, folder / AT_START), lora(folder / BASE, tmp_path / "second", 5)
    new = said(folder, second)
    assert ask(url, AT_START, PROMPT) == old != new
    with traffic(url, AT_START, AT_START, BASE) as answers:
        exchange(folder / AT_START, second)
        wait_until(lambda: (AT_START, new) in answers)
    told = {(model, tuple(tokens)) for model, tokens in answers}
    ours = {(AT_START, tuple(old)), (AT_START, tuple(new))}
    assert told == {*ours, (BASE, tuple(base_said(url)))}
    asked = [tokens for model, tokens in answers if model == AT_START]
    assert asked == sorted(asked, key=lambda tokens: tokens == new), "the old one came back"
    shutil.rmtree(folder / AT_START)
    wait_until(lambda: AT_START not in names(url))
    refused(url, AT_START, openai.NotFoundError)
    assert ask(url, BASE, PROMPT) == base_said(url)


@pytest.mark.parametrize("change", ["exchanged", "overwritten", "deleted"])
def test_adapters_that_were_ready_are_served_from_the_cache(
    folder: Path, url: str, tmp_path: Path, change: str
) -> None:
    one, other = folder / "later" / f"team-1-{change}" / "out", folder / "later" / change / "out"
    first = ready(folder / BASE, tmp_path / "first", 3)
    second = ready(folder / BASE, tmp_path / "second", 4)
    shutil.copytree(first, one)
    shutil.copytree(second, other)
    name, beside = (str(path.relative_to(folder)) for path in (one, other))
    assert [ask(url, n, PROMPT) for n in (name, beside)] == [
        said(folder, first),
        said(folder, second),
    ]
    third = ready(folder / BASE, tmp_path / "third", 6)
    new = said(folder, third)
    if change == "exchanged":
        exchange(one, third)
        wait_until(lambda: ask(url, name, PROMPT) == new)
        exchange(one, first)
        wait_until(lambda: ask(url, name, PROMPT) == said(folder, first))
    elif change == "overwritten":
        for file in third.iterdir():
            shutil.copyfile(file, one / file.name)
        wait_until(
            lambda: is_refused(url, name, openai.BadRequestError) or ask(url, name, PROMPT) == new
        )
        wait_until(lambda: ask(url, name, PROMPT) == new)
    else:
        shutil.rmtree(one.parent)
        wait_until(lambda: is_refused(url, name, openai.NotFoundError))
    assert ask(url, beside, PROMPT) == said(folder, second)
    assert ask(url, BASE, PROMPT) == base_said(url)


def test_what_can_no_longer_be_served_says_why(folder: Path, url: str, tmp_path: Path) -> None:
    run = folder / "later" / "turning"
    first = lora(folder / BASE, tmp_path / "first", 2)
    shutil.copytree(first, run)
    assert ask(url, "turning", PROMPT) == said(folder, first)
    high = lora(folder / BASE, tmp_path / "high", 24)
    exchange(run, high)
    wait_until(lambda: is_refused(url, "turning", openai.BadRequestError))
    assert "max-lora-rank" in refused(url, "turning", openai.BadRequestError)
    exchange(run, first)
    wait_until(lambda: not is_refused(url, "turning", openai.BadRequestError))
    assert ask(url, "turning", PROMPT) == said(folder, first)
    config = json.loads((run / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/other"
    (run / "adapter_config.json").write_text(json.dumps(config))
    wait_until(lambda: is_refused(url, "turning", openai.BadRequestError))
    assert "org/other" in refused(url, "turning", openai.BadRequestError)


def test_a_run_has_one_name(folder: Path, url: str) -> None:
    run = folder / "later" / "named"
    lora(folder / BASE, run, 3)
    assert ask(url, "named", PROMPT) == ask(url, "later/named", PROMPT) == said(folder, run)
    others = ["./later/named", "later/named/", "later//named", "later/./named", "named/", "./named"]
    others += ["later/../later/named", " named", "named ", str(run), f"../{folder.name}/named"]
    before = names(url)
    for other in others:
        assert "does not exist" in refused(url, other, openai.NotFoundError)
    assert names(url) == before


def test_a_namesake_takes_no_name_away(folder: Path, url: str) -> None:
    first = folder / "later" / "one" / "twin"
    lora(folder / BASE, first, 3)
    old = said(folder, first)
    assert ask(url, "twin", PROMPT) == old
    second = lora(folder / BASE, folder / "twin", 5)
    assert ask(url, f"{folder.name}/twin", PROMPT) == said(folder, second) != old
    assert ask(url, "twin", PROMPT) == old
    namesake = lora(folder / BASE, folder / "later" / BASE, 4)
    assert ask(url, f"later/{BASE}", PROMPT) == said(folder, namesake)
    assert ask(url, BASE, PROMPT) == base_said(url) != said(folder, namesake)


def test_watch_refuses_what_it_can_no_longer_serve(
    folder: Path, url: str, tmp_path: Path, cache: Path
) -> None:
    first = lora(folder / BASE, tmp_path / "first", 2)
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    weights = wanted / "guarded" / "adapter_model.safetensors"
    with watching(wanted, folder / BASE, url, cache):
        shutil.copytree(first, wanted / "guarded")
        wait_until(lambda: "guarded" in names(url))
        weights.write_bytes(weights.read_bytes()[:-100])
        wait_until(lambda: is_refused(url, "guarded", openai.BadRequestError))
        assert "does not match its header" in refused(url, "guarded", openai.BadRequestError)
        exchange(wanted / "guarded", lora(folder / BASE, tmp_path / "high", 24))
        wait_until(lambda: "max_lora_rank" in refused(url, "guarded", openai.BadRequestError))
        exchange(wanted / "guarded", first)
        wait_until(lambda: "guarded" in names(url))
        assert ask(url, "guarded", PROMPT) == said(folder, first)
        shutil.rmtree(wanted / "guarded")
        wait_until(lambda: "guarded" not in names(url))
        refused(url, "guarded", openai.NotFoundError)


def test_sigterm_during_the_start_ends_it(folder: Path, tmp_path: Path) -> None:
    words = [DORA_SERVE, "up", folder, "--base", folder / BASE, "--engine", "vllm", "--", *SMALL]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([*map(str, words)], stdout=out, stderr=out)
    wait_until(lambda: "log     " in log.read_text() or process.poll() is not None)
    time.sleep(3)  # the server is loading its libraries
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert "ready after" not in log.read_text()


def test_a_folder_that_only_looks_like_a_run_is_refused_with_the_reason(
    folder: Path, url: str
) -> None:
    odd = folder / "odd" / "adapter_config.json"
    odd.mkdir(parents=True)
    try:
        assert "is no file" in refused(url, "odd", openai.BadRequestError)
    finally:
        shutil.rmtree(odd.parent)
