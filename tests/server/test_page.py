"""The page at `/` of a running server, as people with a mouse, a keyboard or a phone meet it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import chromium, quiet, screenshot, violations, watched
from tests.conftest import quick
from tests.server.conftest import BASE, DOWN, EMBEDS, SECOND, SENTIMENT, Server
from tests.server.page import PROMPT, PYTHON, SHELL, answers, ask, choose, run_of, told

_PLACES = """cells => cells.map(cell => {
    const table = cell.closest("table"), head = table.rows[0].cells[cell.cellIndex];
    const texts = [cell, table.caption, cell.parentElement.cells[0], head];
    return [cell.dataset.module, ...texts.map(each => each.textContent)];
})"""


DELTAS: list[tuple[dict[str, Any], str | None]] = [
    ({"tool_calls": [{"function": {"name": "now", "arguments": ""}}]}, None),
    ({"tool_calls": [{"function": {"arguments": '{"a": 1}'}}]}, None),
    ({}, "tool_calls"),
]
PIECES = [{"choices": [{"index": 0, "delta": d, "finish_reason": why}]} for d, why in DELTAS]
CALLS = "".join(f"data: {json.dumps(each)}\n\n" for each in PIECES) + "data: [DONE]\n\n"


OTHERS = ((360, "light"), (800, "light"), (800, "dark"), (1600, "dark"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with quiet(browser, server.url) as found:
        expect(found.locator(".rank-map .about")).to_be_visible()
        yield found


def details(server: Server) -> dict[str, dict[str, Any]]:
    with server.http as http:
        return {each["id"]: each for each in http.get("/dora/models").json()["data"]}


def test_models_and_what_they_are(page: Page, server: Server) -> None:
    rows = page.locator("#models tbody tr").all_inner_texts()
    table = {name: rest for name, *rest in (row.split("\t") for row in rows)}
    known = details(server)
    assert list(table) == list(known)
    for name, cells in table.items():
        run = run_of(name) if known[name]["kind"] == "run" else None
        every = [run.rank(module) or 0 for module in run.updates] if run else []
        assert cells[1:4] == [
            known[name]["base"] or "",
            known[name]["task"],
            f"{min(every)}–{max(every)} of 12" if every else "",
        ]
        assert cells[0] == ("run, dora" if every else "base")
        number, unit = cells[4].split()
        size = float(number) * 1000 ** ["B", "KB", "MB"].index(unit)
        assert size == pytest.approx(known[name]["bytes"], rel=0.005)
        assert int(cells[5]) == known[name]["requests"]
    assert {BASE, DOWN, SECOND, SENTIMENT, EMBEDS} <= set(table)


def test_the_map_is_that_of_the_run(page: Page) -> None:
    maps = {}
    for name in (DOWN, SECOND, SENTIMENT):
        choose(page, name)
        run = run_of(name)
        cells = page.locator("td[data-module]").evaluate_all(_PLACES)
        maps[name] = {module: int(rank) for module, rank, *_ in cells}
        assert maps[name] == {module: run.rank(module) for module in run.updates}
        _, *layers, _ = page.locator("table.map thead th").all_inner_texts()
        assert layers == [str(layer) for layer in range(3 if name == SENTIMENT else 4)]
        for module, _, stack, kind, layer in cells:
            assert module == (kind if stack == "outside of layers" else f"{stack}.{layer}.{kind}")
    assert maps[DOWN] != maps[SECOND]
    choose(page, BASE)
    expect(page.locator("#map")).to_contain_text("No matrix has an update")


def test_a_cell_tells_of_its_matrix(page: Page) -> None:
    choose(page, SECOND)
    run = run_of(SECOND)
    module = "model.layers.2.self_attn.k_proj"
    components = run.updates[module].components()
    assert components is not None
    facts = f"rank {run.rank(module)} of 12 · ‖ΔW‖ {components.norm():.3g}"
    about = page.locator(".about")
    page.locator(f"[data-module='{module}']").hover()
    expect(about).to_have_text(module + facts)
    page.locator("[data-module='model.layers.2.mlp.up_proj']").focus()
    expect(about).not_to_contain_text(module)
    page.keyboard.press("ArrowDown")  # the rows are in the order of names
    expect(about).to_have_text(module + facts)
    expect(page.locator("td:focus")).to_have_attribute(
        "aria-label", f"{module}: {facts.replace(' · ', ', ')}"
    )


def test_a_prompt_side_by_side(page: Page, server: Server, tmp_path: Path) -> None:
    before = details(server)
    streamed: list[str | None] = []
    page.on("response", lambda got: streamed.append(got.headers.get("content-type")))
    ask(page, BASE, DOWN, SECOND)
    found = answers(page)
    assert streamed.count("text/event-stream; charset=utf-8") == 3
    expect(page.locator("#progress")).to_have_text("3 answered.")
    for name in (BASE, DOWN, SECOND):
        cell = page.locator("tr", has_text=name).locator("td[data-label=Requests]").first
        expect(cell).to_have_text(str(before[name]["requests"] + 1))
    screenshot(page, "playground", tmp_path)
    assert found == {name: told(server, name) for name in (BASE, DOWN, SECOND)}
    assert len(set(found.values())) == 3


def test_chat_and_classification(page: Page, server: Server) -> None:
    page.get_by_label("Send as").select_option("chat")
    page.get_by_label("Max tokens").fill("3")
    ask(page, DOWN)
    assert answers(page) == {DOWN: " eight seven six"}
    expect(page.get_by_role("article")).to_contain_text("3 tokens, stopped at max tokens")
    texts = ["a great film", "a bad film"]
    labels = []
    for text in texts:
        ask(page, SENTIMENT, prompt=text)
        labels.append(answers(page)[SENTIMENT])
    with server.http as http:
        data = http.post("/classify", json={"model": SENTIMENT, "input": texts}).json()["data"]
    assert labels == [each["label"] for each in data]
    expect(page.get_by_role("article")).to_contain_text(f"class 0: {data[1]['probs'][0]:.3f}")


def test_an_address_names_a_model(browser: Browser, server: Server) -> None:
    with quiet(browser, f"{server.url}/#{SECOND}") as page:
        expect(page.locator("#chosen-title")).to_have_text(SECOND)
        choose(page, DOWN)
        assert page.url == f"{server.url}/#{DOWN}"
        page.goto(f"{server.url}/#{SENTIMENT}")
        expect(page.locator("#chosen-title")).to_have_text(SENTIMENT)
        page.goto(f"{server.url}/#%zz")  # names nothing
        expect(page.locator("#chosen-title")).to_have_text(SENTIMENT)


def test_what_is_not_served_and_which_version(page: Page, server: Server) -> None:
    with server.http as http:
        version = http.get("/version").json()["version"]
        missing = http.get("/dora/models").json()["not_served"]
    expect(page.locator("#version")).to_have_text(f"version {version}")
    assert page.locator("#absent").is_visible() == bool(missing)
    told = {"broken": "no such base\n  to do: look"}

    def change(route: Any) -> None:
        route.fulfill(json={**route.fetch().json(), "not_served": told})

    page.route("**/dora/models", change)
    page.get_by_role("button", name="Refresh").click()
    page.get_by_text("Not served: 1").click()
    expect(page.locator("#absent dt")).to_have_text("broken")
    expect(page.locator("#absent dd")).to_have_text(told["broken"])


def test_a_prompt_that_fits_until_one_is_written(page: Page) -> None:
    prompt = page.get_by_label("Prompt")
    choose(page, SENTIMENT)
    expect(prompt).to_have_value("a good film")
    expect(page.get_by_label("Send as")).to_have_value("text")
    choose(page, DOWN)  # which has a chat template
    expect(page.get_by_label("Send as")).to_have_value("chat")
    prompt.press_sequentially("cat")
    expect(prompt).to_have_value("cat")
    choose(page, SENTIMENT)
    expect(prompt).to_have_value("cat")


def test_a_system_message_a_schema_and_tools(page: Page) -> None:
    asked: list[Any] = []
    page.on("request", lambda sent: asked.append(sent.post_data_json) if sent.post_data else None)
    page.get_by_text("System message, schema, tools").click()
    schema, tool = {"type": "object"}, {"type": "function", "function": {"name": "now"}}
    page.get_by_label("Send as").select_option("chat")
    page.get_by_label("System message").fill("brief")
    page.get_by_label("JSON schema").fill(json.dumps(schema))
    page.get_by_label("Tools").fill(json.dumps([tool]))
    with page.expect_response("**/v1/chat/completions"):
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=CALLS))
        ask(page, DOWN)
    assert answers(page) == {DOWN: '\nnow {"a": 1}'}
    (body,) = asked
    turns = [{"role": "system", "content": "brief"}, {"role": "user", "content": PROMPT}]
    assert (body["messages"], body["tools"]) == (turns, [tool])
    assert body["response_format"]["json_schema"]["schema"] == schema
    page.get_by_label("Tools").fill("[")
    ask(page, DOWN)
    expect(page.locator("#progress")).to_contain_text("Tools, of a chat")
    expect(page.get_by_label("Tools")).to_be_focused()
    page.get_by_label("Send as").select_option("text")
    expect(page.get_by_label("Tools")).to_be_disabled()
    assert len(asked) == 1


def test_errors_are_the_servers_own_words(browser: Browser, server: Server) -> None:
    body = {"model": DOWN, "prompt": PROMPT, "max_tokens": 500}
    with server.http as http:
        reason = http.post("/v1/completions", json=body).json()["error"]["message"]
    with watched(browser) as (page, seen):
        page.goto(server.url)
        page.get_by_label("Max tokens").fill("500")
        ask(page, DOWN, SENTIMENT)
        expect(page.locator("article .wrong")).to_have_text(reason)
        expect(page.locator("#progress")).to_have_text("1 answered, 1 failed.")
        ask(page)
        expect(page.locator("#progress")).to_have_text("Choose whom to ask.")
        page.context.set_offline(True)
        ask(page, SENTIMENT)
        expect(page.locator("article .wrong")).to_have_text("The server does not answer.")
        expect(page.get_by_role("alert")).to_have_text("The server does not answer.")
        assert all(each.startswith("Failed to load resource") for each in seen.troubles)


@pytest.mark.parametrize("name", quick([BASE, DOWN, SENTIMENT, EMBEDS], DOWN))
def test_snippets_run_as_they_are(browser: Browser, server: Server, name: str) -> None:
    allowed = ["clipboard-read", "clipboard-write"]
    with quiet(browser, server.url, permissions=allowed) as page:
        choose(page, name)
        for title, command in (("curl", SHELL), ("Python", PYTHON)):
            page.get_by_role("button", name=f"Copy the {title} snippet").click()
            expect(
                page.locator(".snippet", has_text=title).get_by_role("status").first
            ).to_have_text("copied")
            text = page.evaluate("navigator.clipboard.readText()")
            assert text == page.get_by_role("region", name=f"{title} snippet").inner_text()
            before = details(server)[name]["requests"]
            done = subprocess.run([*command, text], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert details(server)[name]["requests"] == before + 1, done.stdout


def test_by_keyboard_alone(page: Page, server: Server) -> None:
    stops = []
    label = "e => e.ariaLabel ?? e.labels?.[0]?.innerText.trim() ?? e.innerText.trim()"
    for _ in range(40):
        page.keyboard.press("Tab")
        focus = page.locator(":focus")
        if focus.count() == 0:
            break
        outline = focus.evaluate("e => getComputedStyle(e).outlineStyle")
        assert outline != "none", focus.evaluate("e => e.outerHTML")
        stops.append(focus.evaluate(label))
    known = details(server)
    names = list(known)
    first = next(name for name in names if known[name]["modules"])
    module = next(iter(known[first]["modules"]))
    boxes = [name for name in names if known[name]["task"] != "feature-extraction"]
    with server.http as http:  # other tests' runs among it
        missing = len(http.get("/dora/models").json()["not_served"])
    reasons = [f"Not served: {missing}"] if missing else []
    at = len(names) + len(reasons) + 1
    assert stops[:at] == ["Refresh", *names, *reasons]
    assert stops[at].startswith(f"{module}: rank ")
    assert stops[at + 1 :] == [
        "As a table",
        "Copy the curl snippet",
        "curl snippet",
        "Copy the Python snippet",
        "Python snippet",
        "Prompt",
        *boxes,
        "System message, schema, tools",
        "Send as",
        "Max tokens",
        "Temperature",
        "Send",
    ]
    page.get_by_role("button", name=names[0], exact=True).focus()
    while page.locator(":focus").evaluate(label) != SECOND:
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#chosen-title")).to_have_text(SECOND)
    while page.locator(":focus").evaluate(label) != "Prompt":
        page.keyboard.press("Tab")
    page.keyboard.type(PROMPT)
    for name in boxes:
        page.keyboard.press("Tab")
        if page.locator(":focus").is_checked() != (name in (DOWN, SECOND)):
            page.keyboard.press("Space")
    page.keyboard.press("Shift+Tab")
    for _ in boxes[1:]:
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+Enter")
    assert answers(page) == {name: told(server, name) for name in (DOWN, SECOND)}


def test_the_focus_stays_where_it_is(page: Page, server: Server) -> None:
    requests = page.locator("tr", has_text=DOWN).locator("td[data-label=Requests]")
    places = (
        page.get_by_role("button", name=SECOND, exact=True),
        page.get_by_role("checkbox", name=SECOND),
        page.locator("td.module").first,
    )
    for place in places:
        before = int(requests.inner_text())
        place.focus()
        told(server, DOWN)
        page.locator("#refresh").evaluate("button => button.click()")
        expect(requests).to_have_text(str(before + 1))
        expect(place).to_be_focused()


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (360, "dark"),
        *(pytest.param(*each, marks=pytest.mark.further) for each in OTHERS),
    ],
)
def test_narrow_and_wide_light_and_dark(
    browser: Browser, server: Server, width: int, scheme: Any, tmp_path: Path
) -> None:
    with quiet(browser, server.url, width, color_scheme=scheme) as page:
        ask(page, BASE, DOWN, SECOND)
        answers(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for control in page.locator("button, input, select, textarea, summary").all():
            box = control.bounding_box()
            if box is not None:
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width
        paint = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
        red = int(paint.removeprefix("rgb(").split(",")[0])
        assert red > 200 if scheme == "light" else red < 60
        assert violations(page) == []
        screenshot(page, f"page-{width}-{scheme}", tmp_path)
        page.get_by_label("Max tokens").evaluate("e => e.labels[0].remove()")
        assert any(each.startswith("label") for each in violations(page))


def test_nothing_from_elsewhere(browser: Browser, server: Server) -> None:
    with watched(browser) as (page, seen):
        page.goto(server.url)
        page.evaluate("fetch('http://127.0.0.2:1/').catch(() => 0)")
        assert any("Content Security Policy" in each for each in seen.troubles)
        page.goto("about:blank")
        page.evaluate("fetch('http://127.0.0.2:1/').catch(() => 0)")
        assert seen.urls[-1] == "http://127.0.0.2:1/"  # what other tests find none of


def test_the_page_is_small(server: Server) -> None:
    folder = Path(__file__).parents[2] / "dora_serve" / "server" / "page"
    sizes = [len(httpx.get(f"{server.url}/{file.name}").content) for file in folder.iterdir()]
    assert sum(sizes) < 40_000
