"""dora-export as the tests call it."""

from __future__ import annotations

from click.testing import CliRunner, Result

from dora_serve.commands import dora_export

SECRET = "the-secret-that-is-never-printed"


def export(*arguments: object) -> Result:
    result = CliRunner().invoke(dora_export, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert SECRET not in result.output
    return result


def good(*arguments: object) -> str:
    result = export(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def bad(*arguments: object) -> str:
    result = export(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output
