"""The rank map in a file of its own, as a browser shows it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from dora_serve import read_run
from dora_serve.rankmap.html import save_html
from tests.browser import chromium, quiet, screenshot, violations, watched
from tests.conftest import MODELS
from tests.processes import commands

RUNS = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def module(rank: int, start: int | None = 4, **more: float) -> dict[str, float | None]:
    return {"start": start, "rank": rank, "norm": None, "relative": None, "lost": None, **more}


def saved(folder: Path, modules: Mapping[str, Mapping[str, float | None]]) -> str:
    path = folder / "map.html"
    save_html(modules, {"method": "dora"}, path, "A run: ranks")
    return path.as_uri()


def cells(page: Page) -> dict[str, int]:
    found = page.locator("td[data-module]").all()
    return {str(each.get_attribute("data-module")): int(each.inner_text()) for each in found}


def focused(page: Page) -> str | None:
    return page.locator("td:focus").get_attribute("data-module")


def test_the_file_shows_what_training_left(browser: Browser, tmp_path: Path) -> None:
    ranks = {}
    for task in ("Count_Down", "Every_Second"):
        path = RUNS / task / f"Tiny_Llama--{task}--1"
        run = read_run(path).strip()
        file = tmp_path / f"{task}.html"
        command = [str(commands() / "dora-export"), "inspect", str(path), "--html", str(file)]
        assert subprocess.run(command, capture_output=True).returncode == 0
        with quiet(browser, file.as_uri()) as page:
            expect(page).to_have_title(f"{path.name}: ranks")
            assert "dora, finished" in page.locator("dl").inner_text()
            assert "224 of 336 kept" in page.locator("dl").inner_text()
            ranks[task] = cells(page)
            assert ranks[task] == {name: run.rank(name) for name in run.updates}
            page.get_by_text("As a table").click()
            rows = page.locator("table.list tbody tr").all_inner_texts()
            listed = [row.split("\t") for row in rows]
            assert {name: int(rank) for name, _, rank, _ in listed} == ranks[task]
            assert {start for _, start, _, _ in listed} == {"12"}
            assert violations(page) == []
            screenshot(page, f"map-{task}", tmp_path)
    assert ranks["Count_Down"] != ranks["Every_Second"]


def test_facts_of_a_cell(browser: Browser, tmp_path: Path) -> None:
    url = saved(
        tmp_path,
        {
            "model.layers.0.q": module(3, norm=1.23456, relative=0.01, lost=0.0321),
            "model.layers.1.q": module(2, None),
            "head": module(0),
        },
    )
    with quiet(browser, url) as page:
        about = page.locator(".about")
        page.locator("[data-module='model.layers.0.q']").hover()
        told = "rank 3 of 4 · ‖ΔW‖ 1.23 · ‖ΔW‖/‖W‖ 0.01 · rounding loses 3.21 %"
        expect(about).to_have_text(f"model.layers.0.q{told}")
        page.locator("[data-module='model.layers.1.q']").focus()
        expect(about).to_have_text("model.layers.1.qrank 2")
        label = page.locator("[data-module=head]").get_attribute("aria-label")
        assert label == "head: rank 0 of 4"


def test_arrows_go_from_cell_to_cell_over_holes(browser: Browser, tmp_path: Path) -> None:
    there = [(0, "a"), (1, "a"), (2, "a"), (0, "b"), (2, "b"), (1, "c")]
    url = saved(tmp_path, {f"h.{layer}.{kind}": module(layer) for layer, kind in there})
    with quiet(browser, url) as page:
        page.keyboard.press("Tab")
        walk = [focused(page)]
        for key in "Right Right Right Down Left Down Up End Home Down".split():
            name = key if key in ("End", "Home") else f"Arrow{key}"
            page.keyboard.press(name)
            walk.append(focused(page))
        assert [name and name[2:] for name in walk] == [
            "0.a", "1.a", "2.a", "2.a", "2.b", "0.b", "0.b", "0.a", "2.a", "0.a", "0.b",
        ]  # fmt: skip
        page.keyboard.press("Tab")
        assert page.locator("summary:focus").count() == 1  # the map is one stop
        page.keyboard.press("Shift+Tab")
        assert focused(page) == "h.0.b"


@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.further), "dark"])
def test_colours_tell_ranks_and_numbers_can_be_read(
    browser: Browser, tmp_path: Path, scheme: str
) -> None:
    # Tens, since axe does not judge a single digit.
    url = saved(tmp_path, {f"h.{i}.x": module(10 * i, 160) for i in range(17)})
    with quiet(browser, url, color_scheme=scheme) as page:
        expect(page.locator("td.module")).to_have_count(17)
        paints = page.locator("td.module").evaluate_all(
            "cells => cells.map(cell => getComputedStyle(cell).backgroundColor)"
        )
        light = [float(paint.split()[0].removeprefix("oklab(")) for paint in paints[1:]]
        assert light == sorted(light, reverse=scheme == "light")
        assert len(set(light)) == 16
        assert violations(page) == []
        page.locator("td.module").nth(8).evaluate("cell => cell.style.color = '#788'")
        assert any(found.startswith("color-contrast") for found in violations(page))


def test_eighty_layers_scroll_in_their_own_box(browser: Browser, tmp_path: Path) -> None:
    url = saved(tmp_path, {f"m.{i}.self_attn.q_proj": module(2) for i in range(80)})
    with quiet(browser, url, 360) as page:
        page.keyboard.press("Tab")
        page.keyboard.press("End")
        assert focused(page) == "m.79.self_attn.q_proj"
        expect(page.locator("td:focus")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_run_without_updates(browser: Browser, tmp_path: Path) -> None:
    with quiet(browser, saved(tmp_path, {})) as page:
        expect(page.locator("main")).to_contain_text("No matrix has an update")


def test_names_are_text_and_only_our_script_runs(browser: Browser, tmp_path: Path) -> None:
    name = "</script><script>document.title = 'theirs'</script>.0.<b>x</b>"
    url = saved(tmp_path, {name: module(1)})
    with quiet(browser, url) as page:
        assert cells(page) == {name: 1}
        expect(page).to_have_title("A run: ranks")
    file = tmp_path / "map.html"
    other = re.sub("</body>", "<script>document.title = 'theirs'</script></body>", file.read_text())
    file.write_text(other)
    with watched(browser) as (page, seen):
        page.goto(url)
        expect(page).to_have_title("A run: ranks")
        assert any("Content Security Policy" in each for each in seen.troubles)
