"""What an encoder's linear layers compute from constants, and models that compute no short text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers
from onnx_ir.passes import common

from converters.errors import DoraExportError
from converters.files.onnx_files import DECODER, ENCODER, WITH_PAST
from converters.model.base import open_base
from converters.readers import read_run
from converters.targets.onnx import add_adapters, write_onnx
from converters.targets.onnx.export import fused
from converters.targets.onnx.linear import linear_sites
from converters.targets.onnx.loaded import load_whole
from converters.targets.onnx.seq2seq import make_adaptable, parts_of
from dora_serve.proof.onnxruntime import prove
from tests.converters.families import save_adapter, save_base
from tests.engines.encoders import DEBERTA, check_adapters, tiny_base, tiny_lora


def test_a_layer_that_the_exporter_has_computed_carries_no_adapter(tmp_path: Path) -> None:
    """DeBERTa's keys and queries are asked for small tables of distances too, which are constants
    where nothing normalizes them."""
    sizes = {**DEBERTA, "norm_rel_ebd": "none"}
    base = tiny_base("DebertaV2", tmp_path / "base", sizes)
    out = tmp_path / "onnx"
    for target, fits in (("value_proj", True), ("query_proj", False), ("key_proj", False)):
        lora = tiny_lora(
            base,
            "DebertaV2ForSequenceClassification",
            tmp_path / target,
            3,
            target_modules=[target],
            modules_to_save=["pooler", "classifier"],
            task_type="SEQ_CLS",
        )
        runs = {target: read_run(lora)}
        if fits:
            write_onnx(open_base(base), out, adapters=runs)
            check_adapters((open_base(base), runs, out))
            continue
        with pytest.raises(DoraExportError, match="no place for this module's update"):
            add_adapters(out, runs, open_base(base))
        assert sorted(path.stem for path in (out / "adapters").iterdir()) == ["value_proj"]


@pytest.mark.further
def test_layers_whose_rows_do_not_come_first_carry_no_adapter(tmp_path: Path) -> None:
    """A branch tells the adapters of a batch by its first axis, which is FSMT's tokens'."""
    sizes = {"src_vocab_size": 80, "tgt_vocab_size": 80, "langs": ["en", "de"], "d_model": 32}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    torch.manual_seed(0)
    cls: Any = transformers.FSMTForConditionalGeneration
    cls(transformers.FSMTConfig(max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    save_adapter(cls, tmp_path / "base", tmp_path / "run", target_modules=["q_proj", "v_proj"])
    run, base = read_run(tmp_path / "run"), open_base(tmp_path / "base")
    with pytest.raises(DoraExportError, match="no place for this module's update"):
        write_onnx(base, tmp_path / "onnx", adapters={"run": run})
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("family", "sizes", "target"),
    [
        pytest.param(
            "roberta",
            {"max_position_embeddings": 8, "pad_token_id": 1, "num_hidden_layers": 1},
            "query",
            marks=pytest.mark.further,
        ),
        ("gpt2", {"n_positions": 4}, "c_attn"),
    ],
)
def test_a_context_of_a_few_tokens_is_refused(
    family: str, sizes: dict[str, Any], target: str, tmp_path: Path
) -> None:
    cls = save_base(family, tmp_path / "base", **sizes)
    save_adapter(cls, tmp_path / "base", tmp_path / "run", target_modules=[target])
    with pytest.raises(DoraExportError, match="does not compute a short text"):
        write_onnx(open_base(tmp_path / "base"), tmp_path / "onnx", run=read_run(tmp_path / "run"))
    assert not (tmp_path / "onnx").exists()


def pegasus_x(folder: Path) -> Any:
    """A random model, saved to `folder`; its class."""
    sizes = {"d_model": 32, "vocab_size": 80, "block_size": 8, "num_global_tokens": 4}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    torch.manual_seed(0)
    config = transformers.PegasusXConfig(max_position_embeddings=64, init_std=0.2, **sizes)
    cls = transformers.PegasusXForConditionalGeneration
    cls(config).save_pretrained(folder)
    return cls


@pytest.mark.further
def test_a_graph_that_the_optimizer_leaves_in_pieces_stays_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEGASUS-X: ONNX Runtime's fusions raise an error there, and print one."""
    pegasus_x(tmp_path / "base")
    encoder = parts_of(load_whole(tmp_path / "base"))[ENCODER]
    model = encoder.export()
    common.RemoveUnusedNodesPass()(model)
    nodes = [node.op_type for node in model.graph]
    capsys.readouterr()
    found = fused(model)
    assert not capsys.readouterr().out
    assert [node.op_type for node in found.graph] == nodes
    ir.save(found, tmp_path / "model.onnx")
    encoder.check(tmp_path / "model.onnx")


@pytest.mark.further
def test_what_is_written_of_such_a_graph(tmp_path: Path) -> None:
    cls = pegasus_x(tmp_path / "base")
    save_adapter(cls, tmp_path / "base", tmp_path / "run", target_modules=["q_proj", "v_proj"])
    run = read_run(tmp_path / "run")
    write_onnx(open_base(tmp_path / "base"), tmp_path / "onnx", run=run)
    found = prove(tmp_path / "onnx", open_base(tmp_path / "base"), run, {})["merged"]
    assert found["max_abs"] < 1e-4 < 1e-2 < found["control"]


@pytest.mark.further
def test_a_layer_that_one_graph_of_several_lost_has_a_branch_in_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first token would have the adapter, and those behind it would not."""
    save_base("t5", tmp_path / "base", num_layers=1)
    loaded = load_whole(tmp_path / "base")
    part = parts_of(loaded)[DECODER]
    first = part.export()
    graphs = {name: ir.from_proto(ir.to_proto(first)) for name in (DECODER, WITH_PAST)}
    lost = "decoder.block.0.layer.0.SelfAttention.q"

    def forgetful(model: Any, *told: Any) -> Any:
        sites, left = linear_sites(model, *told)
        assert lost in {site.name for site in sites}
        if model is graphs[DECODER]:
            return sites, left
        return [site for site in sites if site.name != lost], left | {lost}

    monkeypatch.setattr("converters.targets.onnx.seq2seq.linear_sites", forgetful)
    make_adaptable(graphs, loaded, dict.fromkeys(graphs, part))
    for model in graphs.values():
        inputs = " ".join(value.name or "" for value in model.graph.inputs)
        assert "SelfAttention.k" in inputs and "SelfAttention.q" not in inputs
