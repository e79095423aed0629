"""Chat templates come out as transformers renders them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dora_serve.server.chat_template import ChatTemplate
from tests.conftest import MODELS

MESSAGES = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "nine"}]
EACH = "{% for m in messages %}"


@pytest.mark.parametrize(
    "template",
    [
        EACH + "{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}",
        "{% if tools is not none %}tools{% endif %}{{ documents is none }}",
        EACH + "{{ bos_token }}{{ m.content }}{{ eos_token }}{{ pad_token }}{% endfor %}",
    ],
)
def test_as_transformers(template: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODELS / "tiny-llama-base", tmp_path / "base"))
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert ChatTemplate(folder).render(MESSAGES, False) == expected
