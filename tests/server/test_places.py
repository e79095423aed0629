"""What a client may learn of the machine from what is not served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from converters.errors import DoraExportError, MissingError
from dora_serve.onnxruntime.session import EngineError
from dora_serve.server.app import make_app
from dora_serve.server.options import ServerOptions
from dora_serve.server.prepare.child import make_offer
from dora_serve.server.prepare.offer import Offer
from dora_serve.server.registry import Registry
from dora_serve.server.state import State
from dora_serve.server.wire.errors import as_api_error
from dora_serve.server.wire.places import told
from tests.conftest import LLAMA_RUNS, MODELS

ROOT = Path("/srv/my models")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("broken\n  file: /srv/my models/a b/x.json", "broken\n  file: a b/x.json"),
        ("nothing here\n  file: /srv/my models", "nothing here\n  file: my models"),
        ("broken\n  file: /home/a b/base/config.json", "broken\n  file: config.json"),
        ("No such file: '/mnt/a b/model.onnx'", "No such file: 'model.onnx'"),
        ("give --base '/data/a b/base' or /data/other", "give --base 'base' or other"),
        ("found: /a/x, expected /b/y: no", "found: x, expected y: no"),
        ("base=/secret", "base=secret"),
        ("/srv/my models2/x and /data/srv/my models/x", "my models2/x and my models/x"),
        ("org/name, and/or, 1 / 2, https://host/a/b", None),
        ("is for /v1, not q_proj/weight", "is for v1, not q_proj/weight"),
    ],
)
def test_places(said: str, shown: str | None) -> None:
    assert told(said, ROOT) == (said if shown is None else shown)


@pytest.mark.parametrize("kind", [EngineError, MissingError])
def test_no_error_tells_where_the_cache_is(kind: type[DoraExportError]) -> None:
    """As of an adapter whose file there is damaged or gone."""
    error = kind("the adapter's file is gone", file="/home/a b/.cache/dora-serve/1f/x.onnx_adapter")
    assert str(as_api_error(error)) == "the adapter's file is gone\n  file: x.onnx_adapter"


def test_what_is_not_served_names_no_place_of_the_machine(tmp_path: Path) -> None:
    root, away = tmp_path / "served", tmp_path / "secret place" / "base"
    shutil.copytree(MODELS / "tiny-llama-base", away)
    shutil.copytree(away, root / "broken")
    (root / "broken" / "model.safetensors").write_bytes(b"x" * 100)
    (root / "linked").mkdir()
    for file in away.iterdir():
        (root / "linked" / file.name).symlink_to(file)
    (away / "model.safetensors").write_bytes(b"y" * 100)
    shutil.copytree(LLAMA_RUNS["down"], root / "run")
    (root / "run" / "task_info.json").write_text(json.dumps({"base": f"{away}/none"}))
    problems = make_offer(root, None, dry=True).problems
    assert {"broken", "linked"} <= problems.keys()
    assert str(root / "broken") in problems["broken"]
    options = ServerOptions()
    offer = Offer(graphs=[], models=[], problems={**problems, "other": f"'{away}': no"})
    state = State(root, Registry(offer, options), options)
    app = make_app(state, "127.0.0.1", None)
    with TestClient(app, "http://127.0.0.1") as http:
        shown = http.get("/dora/models").json()["not_served"]
    assert shown.keys() == {*problems, "other"}
    assert "file: broken/model.safetensors" in shown["broken"]
    assert str(tmp_path) not in json.dumps(shown) and "secret" not in json.dumps(shown)
