"""What people do on the page at `/` of a server, and what the server itself would answer."""

from __future__ import annotations

import sys

from playwright.sync_api import Page, expect

from converters.run import Run
from dora_serve import read_run
from tests.conftest import MODELS
from tests.server.conftest import Server

SAMPLES = MODELS / "runs/Checkpoint"


PROMPT = "count : nine"


SHELL, PYTHON = ["bash", "-c"], [sys.executable, "-c"]


def run_of(name: str) -> Run:
    return read_run(next(SAMPLES.glob(f"*/*/*/{name}"))).strip()


def choose(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#chosen-title")).to_have_text(name)


def ask(page: Page, *names: str, prompt: str = PROMPT) -> None:
    """Send `prompt` to these models and to no other."""
    for box in page.get_by_role("checkbox").all():
        box.set_checked(box.get_attribute("value") in names)
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Send").click()


def answers(page: Page) -> dict[str, str]:
    expect(page.locator("article[aria-busy=true]")).to_have_count(0)
    return {
        str(each.get_attribute("aria-label")): str(each.locator(".answer").text_content())
        for each in page.get_by_role("article").all()
    }


def told(server: Server, model: str, prompt: str = PROMPT, tokens: int = 32) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    with server.http as http:
        return str(http.post("/v1/completions", json=body).json()["choices"][0]["text"])
