"""What a newcomer meets first: help, `env`, errors as JSON, dtypes by their short names."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from safetensors import safe_open

from converters.options import SHORT
from dora_serve.commands import dora_export, dora_serve
from dora_serve.commands.common import FIELDS
from dora_serve.commands.examples import EXAMPLES
from tests.conftest import MODELS

RUN = next(MODELS.glob("runs/*/*/*/Count_Down/*/checkpoint")).parent
VERBS = [
    (group, verb)
    for group in (dora_export, dora_serve)
    for verb in group.list_commands(click.Context(group))
]


@pytest.mark.parametrize(("group", "verb"), VERBS, ids=[verb for _, verb in VERBS])
def test_help_shows_examples_that_parse(group: click.Group, verb: str) -> None:
    shown = CliRunner().invoke(group, [verb, "--help"]).output
    command = group.get_command(click.Context(group), verb)
    assert command is not None
    assert EXAMPLES[verb]
    for example in EXAMPLES[verb]:
        assert f"  {group.name} {example}\n" in shown
        first, *words = example.split()
        assert first == verb
        files = [word for word in words if word.endswith(".pem")]
        with CliRunner().isolated_filesystem():
            for file in files:
                Path(file).touch()
            command.make_context(verb, words).close()


def test_env() -> None:
    told = json.loads(CliRunner().invoke(dora_serve, ["env", "--json"]).output)
    assert told["packages"]["torch"]
    assert told["cores"] >= 1
    assert "vllm" in {**told["packages"], **told["missing"]}
    assert "packages    " in CliRunner().invoke(dora_serve, ["env"]).output


@pytest.mark.parametrize(
    ("words", "code", "fields"),
    [
        (["merge", "/nowhere", "out", "--json"], 1, {"code": "MissingError", "file": "/nowhere"}),
        (["merge", "--json"], 2, {"code": "UsageError", "message": "Missing argument 'RUN'."}),
        (
            ["merge", "a", "b", "--json", "--base", ""],
            2,
            {"remedy": "see dora-export merge --help"},
        ),
        (["--json", "merge"], 2, {"code": "UsageError", "remedy": "see dora-export --help"}),
        (["no-such-verb", "--json"], 2, {"code": "UsageError"}),
    ],
)
def test_errors_as_json(words: list[str], code: int, fields: dict[str, str]) -> None:
    done = CliRunner().invoke(dora_export, words)
    assert done.exit_code == code
    error = json.loads(done.stdout.splitlines()[0])["error"]
    assert error | fields == error
    assert error.keys() == {"code", *FIELDS} and all(
        isinstance(value, str | None) for value in error.values()
    )
    assert error["message"] in done.stderr


@pytest.mark.parametrize("short", SHORT)
def test_short_names_of_dtypes(short: str, tmp_path: Path) -> None:
    words = ["merge", str(RUN), str(tmp_path / "out"), "--base", str(MODELS / "tiny-llama-base")]
    done = CliRunner().invoke(dora_export, [*words, "--dtype", short])
    assert done.exit_code == 0, done.output
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        name = "model.layers.0.self_attn.q_proj.weight"
        assert str(file.get_tensor(name).dtype) == f"torch.{SHORT[short]}"
