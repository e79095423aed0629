"""The Chromium of this machine, driven by Playwright, which then downloads none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser; the test is skipped where none is installed."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@dataclass
class Seen:
    """What a page asked for, and what its console told."""

    urls: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


@contextmanager
def watched(browser: Browser, width: int = 1280, **options: Any) -> Iterator[tuple[Page, Seen]]:
    """A page in a context of its own."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    context.set_default_timeout(10_000)
    seen = Seen()
    context.on("request", lambda request: seen.urls.append(request.url))
    context.on("weberror", lambda error: seen.troubles.append(str(error.error)))
    context.on(
        "console",
        lambda told: seen.troubles.append(told.text) if told.type in ("error", "warning") else None,
    )
    try:
        yield context.new_page(), seen
    finally:
        context.close()


@contextmanager
def quiet(browser: Browser, url: str, width: int = 1280, **options: Any) -> Iterator[Page]:
    """The page at `url`; in the end it has asked nothing of another place, nor told of an error."""
    place = url.partition("#")[0]
    with watched(browser, width, **options) as (page, seen):
        page.goto(url)
        yield page
        assert [each for each in seen.urls if not each.startswith(place)] == []
        assert seen.troubles == []


def violations(page: Page) -> list[str]:
    """What axe finds wrong for people who cannot see, point, or tell faint colours apart."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {node['html']}" for each in found for node in each["nodes"]]


def screenshot(page: Page, name: str, folder: Path) -> None:
    """Keep the page as `name`.png in $DORA_SCREENSHOTS, else in `folder`."""
    kept = Path(os.environ.get("DORA_SCREENSHOTS") or folder)
    kept.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=kept / f"{name}.png", full_page=True)
