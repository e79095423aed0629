"""`dora-serve up` with ONNX Runtime: prepare a folder, say what is served where, serve it."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import NoReturn

from converters.errors import MissingError, visible

from ..extras import require
from ..folder.templates import has_template
from ..wording import alike, curl, curl_of, quoted
from .options import ServerOptions
from .prepare.offer import ANSWERS, DECODES, HEARS, TRANSLATES, Offer, OfferedModel

_PATHS = {
    DECODES: "/v1/completions",
    TRANSLATES: "/v1/completions",
    HEARS: "/v1/audio/transcriptions",
    ANSWERS: "/dora/answer",
    "sequence-classification": "/classify",
    "token-classification": "/pooling",
    "feature-extraction": "/v1/embeddings",
}
_CHATS = "/v1/chat/completions"
_EXAMPLES: dict[str, dict[str, object]] = {
    DECODES: {"prompt": "Hello", "max_tokens": 16, "temperature": 0},
    TRANSLATES: {"prompt": "a long text", "max_tokens": 16, "temperature": 0},
    ANSWERS: {"question": "what is good?", "context": "a good film"},
    "sequence-classification": {"input": "a good film"},
    "token-classification": {"input": "a good film"},
    "feature-extraction": {"input": "a good film"},
}


def up(
    root: Path,
    base: str | None,
    host: str,
    port: int,
    api_key: str | None,
    dry_run: bool,
    options: ServerOptions | None = None,
) -> int:
    """Serve everything in `root` until SIGTERM or SIGINT; what was accepted by then is answered.

    With `dry_run`, only say what would be. Returns the exit code; raises `DoraExportError` when
    there is nothing to serve.
    """
    from .prepare.child import make_offer

    require("serve", "onnx")  # before another process and a thread import them
    options = options or ServerOptions()
    root = root.absolute()  # of a link what it leads to by then, not now
    Thread(target=_import).start()
    with _terminable():
        offer = make_offer(root, base, dry_run, options.precision)
    from .app import make_app
    from .connections import serve
    from .guard import is_loopback
    from .log import Beside
    from .registry import Registry
    from .state import State

    _tell(offer.problems)
    for names, lines in alike(offer.warnings):
        print(f"warning: {names}:", *lines, file=sys.stderr)
    registry = None if dry_run else Registry(offer, options)
    if registry is not None and registry.problems != offer.problems:
        _tell({n: why for n, why in registry.problems.items() if n not in offer.problems})
        left = [model for model in offer.models if model.name not in registry.problems]
        offer = offer.model_copy(update={"models": left})
    if not offer.models:
        raise MissingError(
            "nothing here can be served",
            file=root,
            remedy="see what is said above of each"
            if offer.problems
            else "put a base model into the folder, and runs or adapters beside it",
        )
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(table(offer, url, api_key is not None, options.chat_template is not None), flush=True)
    if registry is None:
        return 0
    if api_key is None and not is_loopback(host):
        print("Whoever reaches this port may ask: --api-key sets a key.", file=sys.stderr)
    beside = Beside(sys.stderr.fileno())
    logging.basicConfig(format="%(message)s", handlers=[beside], level=logging.INFO)
    state = State(root, registry, options)
    app = make_app(state, host, api_key)
    return 0 if serve(app, host, port) else 1


def _import() -> None:
    """What is imported below, while another process prepares; in vain where that was stopped."""
    with suppress(RuntimeError):
        import_module(".app", __package__)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let signals that end it unwind the stack, so that the processes that prepare end too."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    ends = (signal.SIGTERM, signal.SIGHUP)
    previous = {n: signal.signal(n, stop) for n in ends if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _tell(problems: Mapping[str, str]) -> None:
    for names, lines in alike(problems):
        print("\n    ".join((f"not served: {names}", *lines)), file=sys.stderr)


def table(offer: Offer, url: str, key: bool, chats: bool = False) -> str:
    """What is served where, for a person, and a command to try it. `key`: clients must send one;
    `chats`: every decoder has a chat template, whatever lies beside it."""
    bases = {graph.folder: graph.path for graph in offer.graphs}
    # Of what was not made yet, the base's folder has the files that will be beside the graph.
    folders = {f: f if path is None or Path(f).is_dir() else path for f, path in bases.items()}
    where = {each.name: _path(each, Path(folders[each.folder]), chats) for each in offer.models}
    width = max(len(visible(name)) for name in where)
    broad = max(map(len, where.values()))
    lines = [f"{url}  (a page to look and try; details: /dora/models; API: /openapi.json)", ""]
    for model in offer.models:
        method = "" if model.method is None else f", {model.method}"
        of = "" if model.base is None else f" of {model.base}"
        name = f"{visible(model.name):<{width}}"
        lines.append(f"  {name}  {where[model.name]:<{broad}}  {model.kind}" + visible(of + method))
    if offer.problems:
        lines.append(f"  {len(offer.models)} served, {len(offer.problems)} not: see above")
    last = offer.models[-1]
    path = where[last.name]
    if path == _PATHS[HEARS]:
        form = f"-F file=@speech.wav --form-string {quoted(f'model={last.name}')}"
        command = f"{curl_of(url + path, key)} {form}"
    else:
        body = {"model": last.name, **_example(last, path, Path(folders[last.folder]))}
        command = curl(url + path, body, key)
    return "\n".join([*lines, "", command, ""])


def _path(model: OfferedModel, folder: Path, chats: bool) -> str:
    """Where it is asked first."""
    read = (folder / "tokenizer.json").exists()
    if model.task == DECODES and read and (chats or has_template(folder)):
        return _CHATS
    return _PATHS[_task(model)]


def _example(model: OfferedModel, path: str, folder: Path) -> dict[str, object]:
    """Of token ids where they may stand for a text, and no tokenizer lies that would read one."""
    example = _EXAMPLES[model.task]
    if path == _CHATS:
        rest = {name: value for name, value in example.items() if name != "prompt"}
        return {"messages": [{"role": "user", "content": example["prompt"]}], **rest}
    named = {DECODES: "prompt", TRANSLATES: "prompt", "feature-extraction": "input"}.get(model.task)
    if named is None or (folder / "tokenizer.json").exists():
        return example
    return {**example, named: [1, 2, 3]}


def _task(model: OfferedModel) -> str:
    from dora_serve.onnxruntime.transcriber import hears

    made = model.task == TRANSLATES and Path(model.folder).is_dir()
    return HEARS if made and hears(Path(model.folder)) else model.task
