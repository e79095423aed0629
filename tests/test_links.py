"""What a page says in passing: links into pages, and commands within sentences and tables."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from dora_serve.commands import dora_export, dora_serve

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\]\(([^)#: ]*)#([^)]+)\)")
_CODE = re.compile(r"```.*?```", re.DOTALL)
_COMMAND = re.compile(r"`((?:dora-export|dora-serve) [^`\n]+)`")


def anchors(page: Path) -> set[str]:
    """What links into `page` may name, as Python-Markdown and GitHub make it of headings."""
    text = _CODE.sub("", page.read_text())
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", head).strip().lower() for head in found)
    return {re.sub(r"[-\s]+", "-", each) for each in words}


def test_every_link_into_a_page_finds_its_heading() -> None:
    found, lost = 0, []
    for page in PAGES:
        for name, anchor in _LINK.findall(_CODE.sub("", page.read_text())):
            target = page.parent / name if name else page
            found += 1
            if not target.is_file() or anchor not in anchors(target):
                lost.append(f"{page.relative_to(ROOT)}: {name}#{anchor}")
    assert found >= 20
    assert lost == []


def _told() -> list[tuple[str, str]]:
    return [
        (str(page.relative_to(ROOT)), command)
        for page in PAGES
        for command in _COMMAND.findall(_CODE.sub("", page.read_text()))
    ]


@pytest.mark.parametrize("page", sorted({page for page, _ in _told()}))
def test_every_command_in_a_sentence_has_its_verb_and_options(page: str) -> None:
    commands = [command for name, command in _told() if name == page]
    assert commands
    for command in commands:
        program, verb, *words = shlex.split(command.partition(" -- ")[0])
        group: click.Group = {"dora-export": dora_export, "dora-serve": dora_serve}[program]
        if verb.startswith("-"):
            continue
        found = group.get_command(click.Context(group), verb)
        assert found is not None, command
        context = click.Context(found)
        target = words[words.index("--target") + 1] if "--target" in words[:-1] else None
        if target is not None:
            context.meta["dora_serve.target"] = target
        known = {option for each in found.get_params(context) for option in each.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert given - known == set(), f"{page}: {command}"


def test_there_are_such_commands() -> None:
    assert len(_told()) >= 40
    assert {page for page, _ in _told()} >= {"README.md", "docs/vllm.md", "docs/server.md"}
