"""The page of a server with a key, one of whose models was rounded and one answers at length."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from converters.files.json_files import read_json
from dora_serve import merge
from tests.browser import chromium, violations, watched
from tests.conftest import MODELS
from tests.server.conftest import BASE, DOWN, Server, started
from tests.server.page import PYTHON, SHELL, answers, ask, choose, run_of, told
from tests.server.test_faults import gauge, wait_idle


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key, of a merged model and one whose answers are long."""
    folder = tmp_path_factory.mktemp("locked")
    root = folder / "models"
    merge(run_of(DOWN), root / "merged", base=MODELS / BASE, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(MODELS / BASE, max_position_embeddings=8192)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "endless")
    AutoTokenizer.from_pretrained(MODELS / BASE).save_pretrained(root / "endless")
    with started(root, folder, "secret") as running:
        yield running


def unlock(page: Page, key: str) -> None:
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.locator("#models")).to_be_hidden()
    page.keyboard.type(key)
    page.keyboard.press("Enter")


def test_the_key(browser: Browser, locked: Server) -> None:
    with watched(browser) as (page, seen):
        page.goto(locked.url)
        unlock(page, "wrong")
        expect(page.get_by_role("alert")).to_have_text("This server needs an API key.")
        assert violations(page) == []
        unlock(page, "secret")
        expect(page.locator("#models tbody tr")).to_have_count(2)
        expect(page.get_by_role("alert")).to_be_empty()
        page.reload()
        choose(page, "merged")
        ask(page, "merged")
        assert answers(page) == {"merged": told(locked, "merged")}
        assert "secret" not in page.content()
        snippets = page.locator("pre").all_inner_texts()
        assert len(snippets) == 2
        for text, command in zip(snippets, (SHELL, PYTHON), strict=True):
            for key, fails in (("secret", False), ("wrong", True)):
                env = {"PATH": os.environ["PATH"], "DORA_SERVE_API_KEY": key}
                done = subprocess.run([*command, text], env=env, capture_output=True, text=True)
                assert ("API key" in done.stdout + done.stderr) == fails
        stores = "[sessionStorage.length, localStorage.length]"
        assert page.evaluate(stores) == [1, 0]
        page.get_by_role("button", name="Forget the key").click()
        expect(page.get_by_label("API key")).to_be_visible()
        assert page.evaluate(stores) == [0, 0]
        assert seen.troubles
        assert all("401" in each for each in seen.troubles)


def test_what_rounding_takes(browser: Browser, locked: Server) -> None:
    proof: Any = read_json(locked.root / "merged" / "dora_export.json")["modules"]
    assert proof
    with watched(browser) as (page, _):
        page.goto(locked.url)
        unlock(page, "secret")
        choose(page, "merged")
        expect(page.locator("td.module")).to_have_count(len(proof))
        for cell in page.locator("td.module").all():
            certified = proof[cell.get_attribute("data-module")]
            lost = f"{100 * certified['rounding']['lost']:.3g}"
            size = f"{certified['relative_update']:.3g}"
            facts = f"rank {certified['rank']} of 12, ‖ΔW‖/‖W‖ {size}, rounding loses {lost} %"
            assert str(cell.get_attribute("aria-label")).endswith(facts)


def test_stop(browser: Browser, locked: Server) -> None:
    with watched(browser) as (page, _):
        page.goto(locked.url)
        unlock(page, "secret")
        page.get_by_label("Max tokens").fill("4000")
        ask(page, "endless")
        stop = page.get_by_role("button", name="Stop")
        expect(page.locator(".answer").first).not_to_be_empty()
        stop.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("article", name="endless")).to_contain_text("stopped")
        expect(stop).to_be_disabled()
        expect(page.get_by_role("button", name="Send")).to_be_focused()
        part = answers(page)["endless"]
        assert part
        with locked.http as http:
            wait_idle(http)
            made = gauge(http, "vllm:generation_tokens_total")
        assert 0 < made < 4000  # the engine stopped as well
        assert told(locked, "endless", tokens=int(made)).startswith(part)
