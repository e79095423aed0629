"""Chat templates come out as transformers renders them, or are refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config

from converters.targets.onnx.loaded import write_companions
from dora_serve.onnxruntime.session import OnnxFolder
from dora_serve.server.chat_template import ChatTemplate
from dora_serve.server.wire.errors import ApiError
from tests.conftest import MODELS

MESSAGES = [{"role": "user", "content": "cöunt <b>"}, {"role": "assistant", "content": "nine"}]
EACH = "{% for m in messages %}"
Folder = Callable[..., Path]
_SIGNS = sorted(ByteLevel.alphabet())
_ADDED = {"<|endoftext|>": 256, "</s>": 257}


@pytest.fixture
def base(tmp_path: Path) -> Folder:
    """A base's folder with a template of one's own, in its own file or in the configuration."""

    def make(template: str | None, **config: object) -> Path:
        folder = Path(shutil.copytree(MODELS / "tiny-llama-base", tmp_path / "base"))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return folder

    return make


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize(
    "template",
    [
        EACH + "{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}",
        "{% if tools is not none %}tools{% endif %}{{ documents is none }}",
        EACH + "{{ bos_token }}{{ m.content }}{{ eos_token }}{{ pad_token }}{% endfor %}",
        EACH + "\n  {% if m.role == 'user' %}\n  {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
        EACH + "{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
        EACH + "{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        EACH + "{{ m.content }}{% endfor %}{% if add_generation_prompt %}answer:{% endif %}",
        "{{ strftime_now('%Y') }}{{ messages[0]['content'].strip().upper() }}",
    ],
)
def test_as_transformers(template: str, generation: bool, base: Folder) -> None:
    folder = base(template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=generation
    )
    assert expected
    assert ChatTemplate(folder).render(MESSAGES, generation) == expected


@pytest.mark.parametrize(
    ("given", "told"), [('{"a": 1}', '{"a": 1}'), ("", "{}"), ("{", '"{"'), ({"a": 1}, '{"a": 1}')]
)
def test_arguments_of_calls_are_read(given: object, told: str, base: Folder) -> None:
    folder = base(EACH + "{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}")
    call = {"function": {"name": "f", "arguments": given}}
    assert ChatTemplate(folder).render([{"role": "assistant", "tool_calls": [call]}], False) == told


def test_where_a_template_lies(base: Folder) -> None:
    folder = base("file", chat_template="configuration")
    assert ChatTemplate(folder).render(MESSAGES, False) == "file"
    (folder / "chat_template.jinja").unlink()
    assert ChatTemplate(folder).render(MESSAGES, False) == "configuration"


SEVERAL = {name: f"the {name} {{{{ tools }}}}" for name in ("tool_use", "default", "rag")}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_one_of_several(tools: list[dict[str, object]] | None, apart: bool, base: Folder) -> None:
    """That for tools, where there are tools; in the configuration, or in files of their own."""
    told = [{"name": name, "template": text} for name, text in SEVERAL.items()]
    folder = base(None, chat_template=told)
    if apart:
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
    values = {} if tools is None else {"tools": tools}
    assert ChatTemplate(folder).render(MESSAGES, False, values) == expected
    assert expected.startswith("the default" if tools is None else "the tool_use")
    assert ChatTemplate(folder).text == SEVERAL["default"]


PARTS = [{"type": "text", "text": text} for text in (" one ", "", "two")]
WRITES_EACH = (
    EACH + "{{ m.role }}:{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}<{{ part.text | trim }}>{% endfor %}{% endif %};{% endfor %}"
)
TEXTS_ALONE = (
    EACH + "{{ m.content }}{% endfor %}",
    EACH + "{{ m.content | tojson }}{% endfor %}",
    EACH + "{{ m.content + '.' }}{% endfor %}",
    EACH + "{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
    EACH + "{% for part in m.content if m.content is not string %}{{ part }}{% endfor %}"
    "{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
)


@pytest.mark.parametrize("continued", [False, True])
def test_parts_stay_apart_where_each_is_written(continued: bool, base: Folder) -> None:
    folder = base(WRITES_EACH)
    turns: list[dict[str, Any]] = [{"role": "system", "content": "s"}]
    for role in ("user", "assistant"):
        turns.append({"role": role, "content": [{**part} for part in PARTS]})
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        turns, tokenize=False, continue_final_message=continued
    )
    assert expected.startswith("system:s;user:<one><><two>;assistant:<one><><two")
    assert ChatTemplate(folder).render(turns, False, continued=continued) == expected


def test_what_a_template_cuts_is_not_continued(base: Folder) -> None:
    folder = base(EACH + "{{ m.content.split('</think>')[-1] }}{% endfor %}")
    turns = [{"role": "assistant", "content": "<think>a</think>b"}]
    with pytest.raises(ValueError, match="does not appear in the chat"):
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            turns, tokenize=False, continue_final_message=True
        )
    with pytest.raises(ApiError, match="leaves out the message to continue"):
        ChatTemplate(folder).render(turns, False, continued=True)
    assert ChatTemplate(folder).render(turns, False) == "b"


@pytest.mark.parametrize("template", TEXTS_ALONE)
def test_parts_are_one_text_elsewhere(template: str, base: Folder) -> None:
    folder = base(template)
    one = [{"role": "user", "content": " one \n\ntwo"}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(one, tokenize=False)
    assert ChatTemplate(folder).render([{"role": "user", "content": PARTS}], False) == expected


def test_what_a_tool_said_is_one_text(base: Folder) -> None:
    turns = [{"role": "tool", "content": PARTS}]
    assert ChatTemplate(base(WRITES_EACH)).render(turns, False) == "tool:one \n\ntwo;"


ROLES = EACH + "{{ m.role }}:{{ m.content }};{% endfor %}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (ROLES, "system:a\n\n one \n\ntwo;user:u;"),
        (ROLES + "{# 'developer' #}", "system:a;user:u;developer: one \n\ntwo;"),
    ],
)
def test_a_developer_is_heard(template: str, told: str, base: Folder) -> None:
    """As the system by a template that knows none, and most of which would leave him out."""
    said = [("system", "a"), ("user", "u"), ("developer", PARTS)]
    turns = [{"role": role, "content": content} for role, content in said]
    assert ChatTemplate(base(template)).render(turns, False) == told


def test_special_tokens_with_properties(base: Folder) -> None:
    token = {"content": "<begin>", "lstrip": False}
    folder = base("{{ bos_token }}|{{ sep_token }}|", bos_token=token, sep_token=None)
    assert ChatTemplate(folder).render(MESSAGES, False) == "<begin>||"


@pytest.mark.parametrize(
    ("template", "says", "code"),
    [
        (None, "has no chat template", "no_chat_template"),
        ("", "has no chat template", "no_chat_template"),
        ("{{ raise_exception('only two turns') }}", "only two turns", None),
        ("{% if %}", "the chat template", None),
        ("{{ messages.append(1) }}", "the chat template", None),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template", None),
        ("{{ messages[0].content + 1 }}", "the chat template", None),
        ("{{ range(10 ** 9) | list }}", "the chat template", None),
        ("{{ 1 // 0 }}", "the chat template", None),
        ("{% include '/etc/passwd' %}", "the chat template", None),
    ],
)
def test_refusals(template: str | None, says: str, code: str | None, base: Folder) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        ChatTemplate(base(template)).render(MESSAGES, False)
    assert (caught.value.status, caught.value.code) == (400, code)


_SAID = (
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ image_token }}|"
    "{{ pad_token is defined }}" + EACH + "{{ m.content }}{{ eos_token }}{% endfor %}"
)
_WHOLE = {"added_tokens_decoder": {"257": {"content": "</s>", "special": True}}}
_PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    ("config", "beside"),
    [
        ({}, None),  # as DialoGPT's: only its class knows an end
        ({"tokenizer_class": "GPT2Tokenizer", "pad_token": "</s>"}, None),
        ({"tokenizer_class": "GPTNeoXTokenizer"}, None),  # which puts nothing before a text
        ({**_PLAIN, "eos_token": "</s>"}, {"eos_token": "<|endoftext|>", "bos_token": "</s>"}),
        ({**_PLAIN, **_WHOLE, "eos_token": "</s>"}, {"eos_token": "<|endoftext|>"}),
        ({**_PLAIN, "eos_token": {"content": "</s>", "__type": "AddedToken"}}, None),
        ({**_PLAIN, "extra_special_tokens": {"image_token": "</s>"}}, {"eos_token": "</s>"}),
    ],
)
def test_special_tokens_as_transformers(
    config: dict[str, object],
    beside: dict[str, object] | None,
    tmp_path: Path,
) -> None:
    """Some stand in other files of the tokenizer, or in none; and of an old one there is no
    `tokenizer.json`."""
    model = models.BPE({**{sign: i for i, sign in enumerate(_SIGNS)}, **_ADDED}, [])
    whole = Tokenizer(model)
    whole.pre_tokenizer, whole.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    whole.add_special_tokens([*_ADDED])
    whole.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 257)])
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    if "tokenizer_class" in config:
        whole.save(str(base / "tokenizer.json"))
    else:
        model.save(str(base))
    GPT2Config(vocab_size=260).save_pretrained(base)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    if beside is not None:
        (base / "special_tokens_map.json").write_text(json.dumps(beside))
    (base / "chat_template.jinja").write_text(_SAID)
    tokenizer = AutoTokenizer.from_pretrained(base)

    write_companions(out, base)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert ChatTemplate(out).render(MESSAGES, generation=False) == expected
    served = OnnxFolder(out)
    assert served.end == tokenizer.eos_token_id
    assert served.encode("two words") == tokenizer("two words")["input_ids"]
