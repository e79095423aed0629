"""Which files of the base and the run lie beside merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from converters.errors import BaseError, OutputError
from dora_serve import merge
from tests.converters.made import (
    WEIGHTS,
    Q,
    low_rank,
    make_base,
    make_run,
)


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    along = "tokenizer.json merges.txt spiece.model x.jinja y.tiktoken z.spm a.vocab b.bpe".split()
    along += ["LICENSE", "license.md", "Notice"]
    behind = ["code.py", "README.md", "pytorch_model.bin", "other.index.json"]
    for name in [*along, *behind]:
        (base / name).write_text(name)
    (base / "generation_config.json").write_text('{"top_k": 3}')
    (base / "folder.json").mkdir()
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    (run.path / "tokenizer.json").write_text("half a tokenizer")
    merge(run, tmp_path / "out", base=base)
    found = {path.name: path for path in (tmp_path / "out").iterdir()}
    beside = {"config.json", WEIGHTS, "dora_export.json", "generation_config.json"}
    assert set(found) == {*along, *beside}
    assert json.loads(found["generation_config.json"].read_text()) == {"top_k": 3}
    assert {found[name].read_text() == name for name in along} == {True}


def test_a_tokenizer_of_the_run_replaces_the_bases(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json", "generation_config.json"):
        (base / name).write_text('{"of": "base"}')
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "x.json"):
        (run.path / name).write_text('{"of": "run"}')
    merge(run, tmp_path / "out", base=base)
    said = {
        path.name: path.read_text()
        for path in (tmp_path / "out").iterdir()
        if path.name not in (WEIGHTS, "config.json", "dora_export.json")
    }
    assert said == {
        "tokenizer_config.json": '{"of": "run"}',
        "tokenizer.json": '{"of": "run"}',
        "chat_template.jinja": '{"of": "run"}',
        "generation_config.json": '{"of": "base"}',
    }


def test_every_file_of_a_tokenizer_comes_from_the_run(tmp_path: Path) -> None:
    """By the names that transformers' tokenizers give them."""
    names = "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    names += "chat_template.jinja chat_template.json vocab.json merges.txt vocab.txt "
    names += "tokenizer.model spiece.model sentencepiece.bpe.model spm.model source.spm "
    names += "target.spm bpe.codes"
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    for name in names.split():
        (run.path / name).write_text(json.dumps(name if "config" not in name else {"of": name}))
        (base / name).write_text("{}")
    merge(run, tmp_path / "out", base=base)
    for name in names.split():
        assert name in (tmp_path / "out" / name).read_text(), name


def test_a_full_output_is_replaced_only_by_force(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OutputError, match="not empty"):
        merge(run, tmp_path / "out", base=base)
    with pytest.raises(OutputError, match="found: old"):
        merge(run, tmp_path / "out", base=base, force=True)
    (tmp_path / "out" / "old").unlink()
    merge(run, tmp_path / "out", base=base)
    merge(run, tmp_path / "out", base=base, force=True)
    for place in (base, run.path):
        with pytest.raises(OutputError, match="inside an input"):
            merge(run, place / "out", base=base)


def test_links_out_of_the_base_are_not_followed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    (tmp_path / "secret").write_text("secret")
    (base / "inside.txt").write_text("fine")
    (base / "link.txt").symlink_to(base / "inside.txt")
    merge(run, tmp_path / "out", base=base)
    assert (tmp_path / "out" / "link.txt").read_text() == "fine"
    (base / "out.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(BaseError, match="link out") as caught:
        merge(run, tmp_path / "out2", base=base)
    assert (caught.value.file, caught.value.found) == (base / "out.txt", tmp_path / "secret")


def test_links_of_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--x"
    base = make_base(model / "snapshots" / "abc", {f"{Q}.weight": torch.ones(2, 2)})
    (model / "blobs").mkdir()
    (model / "blobs" / "1234").write_text("blob")
    (base / "x.txt").symlink_to(model / "blobs" / "1234")
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    merge(run, tmp_path / "out", base=base)
    assert (tmp_path / "out" / "x.txt").read_text() == "blob"
    (model / "elsewhere").write_text("secret")
    (base / "y.txt").symlink_to(model / "elsewhere")
    with pytest.raises(BaseError, match="link out"):
        merge(run, tmp_path / "out2", base=base)


def test_the_sub_folders_of_a_pipeline_go_along_at_any_depth(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    (base / "1_Pooling" / "deep" / "er").mkdir(parents=True)
    (base / "1_Pooling" / "deep" / "er" / "file").write_text("x")
    (base / "modules.json").write_text('[{"path": "1_Pooling"}, {"type": "a.B", "path": ""}]')
    (base / "a").mkdir()
    merge(make_run(tmp_path / "run", {Q: low_rank(2, 2)}), tmp_path / "out", base=base)
    assert (tmp_path / "out" / "1_Pooling" / "deep" / "er" / "file").read_text() == "x"
    assert not (tmp_path / "out" / "a").exists()
    (base / "a.py").touch()
    with pytest.raises(BaseError, match="code of its own") as caught:
        merge(make_run(tmp_path / "run", {Q: low_rank(2, 2)}), tmp_path / "no", base=base)
    assert caught.value.file == base / "modules.json"
