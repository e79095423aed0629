"""Decoders in ONNX Runtime against the live runs: one adapter, many in a batch, every precision."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import dora_serve
from converters.errors import OutputError
from converters.files.onnx_files import read_adapter_file
from converters.model.base import open_base
from converters.targets.onnx import add_adapters, write_onnx
from dora_serve import DoraExportError, Run, read_run, verify
from dora_serve.onnxruntime.decoder import Batch, Decoder
from dora_serve.onnxruntime.model import OnnxDecoder
from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.proof.live import LiveModel
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import LLAMA_RUNS, MODELS, made_once
from tests.engines.adapter_files import scale_adapter, write_overflowing
from tests.engines.decoders import (
    BOUND,
    EFFECT,
    Case,
    check,
    dequantized,
    displace_small_tensors,
    in_floats,
    truths,
)

BASE = MODELS / "tiny-llama-base"
NAMES = tuple(LLAMA_RUNS)
PROMPTS = ("count : nine", "copy : cat moon river =", "count : twenty-one", "count : five")


def sample(name: str) -> Run:
    return read_run(LLAMA_RUNS[name])


@pytest.fixture(scope="session")
def llama(adapters_onnx: Path) -> Case:
    return Case(adapters_onnx, BASE, {name: sample(name) for name in NAMES})


@pytest.mark.supports(method="dora", family="llama", targets=("onnx",))
def test_sample_runs_one_by_one_and_mixed(llama: Case) -> None:
    check(llama, 32)


def test_verify_finds_the_run_among_the_adapters_and_a_wrong_one(
    llama: Case, tmp_path: Path
) -> None:
    for name in NAMES:
        result = verify(sample(name), llama.folder, BASE)
        assert result.engine == "onnxruntime"
        assert result.passed
        assert result.control_fails
    folder = Path(shutil.copytree(llama.folder, tmp_path / "swapped"))
    other = folder / "adapters" / "second.onnx_adapter"
    shutil.copyfile(other, folder / "adapters" / "down.onnx_adapter")
    assert not verify(sample("down"), folder, BASE).passed
    roberta = read_run(next(MODELS.glob("runs/Checkpoint/Tiny_Roberta/*/*/*")))
    with pytest.raises(DoraExportError, match="not among the folder's adapters"):
        verify(roberta, folder, BASE)
    with pytest.raises(DoraExportError, match="engine peft does not load"):
        verify(sample("down"), folder, BASE, engine="peft")


def test_merged_graph_equals_the_live_run(merged_onnx: Path) -> None:
    run, base = sample("down"), open_base(BASE)
    assert verify(run, merged_onnx, base).passed
    live = LiveModel(run, base)
    inputs = verification_batch(live.model)
    found = logits(OnnxDecoder(merged_onnx), inputs)
    assert float((found - logits(live.model, inputs)).abs().max()) <= BOUND
    live.detach()
    assert float((found - logits(live.model, inputs)).abs().max()) > 1
    done = Decoder(merged_onnx).generate(["count : nine"])
    assert done[0].text == " eight seven six five four three"
    assert done[0].reason == "stop"


def test_the_graph_tells_nothing_of_where_its_builder_lies(merged_onnx: Path) -> None:
    """The builder takes the commit of any repository around it for its own."""
    made = onnx.load(merged_onnx / "model.onnx", load_external_data=False)
    assert made.producer_version == version("onnxruntime-genai")


def test_logits_are_computed_only_where_they_are_wanted(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, ...]] = []
    run = Batch._run

    def noted(batch: Batch, *inputs: Any) -> Any:
        found = run(batch, *inputs)
        computed.append(found.shape)
        return found

    monkeypatch.setattr(Batch, "_run", noted)
    decoder = Decoder(llama.folder)
    rows = [decoder.encode(text) for text in ("count : nine", "copy : cat moon river =")]
    adapters = ["down", None]
    everywhere = decoder.batch(rows, adapters).prefill_all()
    last = decoder.batch(rows, adapters).prefill()
    vocabulary = everywhere.shape[2]
    assert computed == [(2, max(map(len, rows)), vocabulary), (2, 1, vocabulary)]
    assert last.shape == (2, vocabulary)
    for row, tokens in enumerate(rows):
        assert float(np.abs(last[row] - everywhere[row, len(tokens) - 1]).max()) <= 1e-5
    assert len(rows[0]) != len(rows[1])

    session = onnxruntime.InferenceSession(llama.folder / "model.onnx")
    feeds = onnxruntime_feeds(llama, session, rows[1])
    both = np.array([[1, 3]])
    some = session.run(["logits"], {**feeds, "logits_positions": both})[0]
    every = session.run(["logits"], feeds)[0]
    assert some.shape[1] == 2 and every.shape[1] == len(rows[1])
    assert float(np.abs(some - every[:, both[0]]).max()) <= 1e-5


def test_an_adapter_that_overflows_does_not_reach_the_other_rows(
    llama: Case, tmp_path: Path
) -> None:
    decoder = Decoder(llama.folder)
    write_overflowing(
        llama.folder / "adapters" / "down.onnx_adapter", tmp_path / "huge.onnx_adapter"
    )
    decoder.add_adapter("huge", tmp_path / "huge.onnx_adapter")
    ids = decoder.encode("count : nine")
    alone = decoder.batch([ids], ["second"]).prefill()[0]
    beside = decoder.batch([ids, ids, ids], ["huge", "second", None]).prefill()
    assert not np.isfinite(beside[0]).all()
    assert float(np.abs(beside[1] - alone).max()) <= 1e-5
    assert np.isfinite(beside[2]).all()
    with pytest.raises(DoraExportError, match="not finite"):
        decoder.generate([ids], "huge")


def test_a_graph_that_lacks_the_input_is_refused(llama: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "other"))
    (folder / "batched.onnx").unlink()
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    inputs = [value for value in graph.graph.input if value.name != "logits_positions"]
    del graph.graph.input[:]
    graph.graph.input.extend(inputs)
    onnx.save(graph, folder / "model.onnx")
    with pytest.raises(DoraExportError, match="export it again"):
        Decoder(folder)


def onnxruntime_logits(case: Case, adapter: str, ids: list[int]) -> Any:
    """Plain ONNX Runtime with its own LoraAdapter on the single-adapter graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(case.folder / "model.onnx", options)
    lora, run_options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    lora.Load(str(case.folder / "adapters" / f"{adapter}.onnx_adapter"))
    run_options.add_active_adapter(lora)
    return session.run(["logits"], onnxruntime_feeds(case, session, ids), run_options)[0]


def onnxruntime_feeds(case: Case, session: Any, ids: list[int]) -> dict[str, Any]:
    """One row of tokens, and a cache that holds none."""
    config = json.loads((case.folder / "genai_config.json").read_text())
    size = config["model"]["decoder"]["head_size"]
    empty = {
        value.name: np.zeros((1, value.shape[1], 0, size), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    row = np.array([ids])
    return {"input_ids": row, "attention_mask": np.ones_like(row), **empty}


def test_plain_onnxruntime_and_genai_use_our_files(llama: Case) -> None:
    import onnxruntime_genai as og

    decoder = Decoder(llama.folder)
    ids = decoder.encode("count : nine")
    plain = onnxruntime_logits(llama, "down", ids)
    ours = decoder.batch([ids], ["down"]).prefill_all()
    assert float(np.abs(plain - ours).max()) <= 1e-5

    model = og.Model(str(llama.folder))
    adapters = og.Adapters(model)
    adapters.load(str(llama.folder / "adapters" / "down.onnx_adapter"), "down")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 6, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.set_active_adapter(adapters, "down")
    generator.append_tokens([ids])
    while not generator.is_done():
        generator.generate_next_token()
    sequence = [int(token) for token in generator.get_sequence(0)]
    words = decoder.tokenizer.decode(sequence[len(ids) :])
    assert words == "eight seven six five four three"


def test_the_generation_defaults_of_the_base_go_along(llama: Case) -> None:
    name = "generation_config.json"
    assert (llama.folder / name).read_bytes() == (BASE / name).read_bytes()


def test_adapters_come_and_go_without_a_new_session(llama: Case) -> None:
    decoder = Decoder(llama.folder)
    session = decoder.session
    decoder.remove_adapter("down")
    with pytest.raises(DoraExportError, match="no such adapter"):
        decoder.generate(["count : nine"], "down")
    decoder.add_adapter("again", llama.folder / "adapters" / "down.onnx_adapter")
    done = decoder.generate(["count : nine"] * 2, ["again", "second"])
    assert [row.text.split()[0] for row in done] == ["eight", "eleven"]
    assert decoder.session is session


def test_adding_an_adapter_to_a_folder(tmp_path: Path) -> None:
    base = open_base(BASE)
    dora_serve.write_onnx(base, tmp_path / "out", adapters={"down": sample("down")})
    graphs = {f: (tmp_path / "out" / f).read_bytes() for f in ("model.onnx", "batched.onnx")}
    with pytest.raises(DoraExportError, match="there already"):
        add_adapters(tmp_path / "out", {"down": sample("down")}, base)
    add_adapters(tmp_path / "out", {"second": sample("second")}, base)
    assert all((tmp_path / "out" / f).read_bytes() == data for f, data in graphs.items())
    assert (
        Decoder(tmp_path / "out")
        .generate(["count : nine"], "second")[0]
        .text.startswith(" eleven thirteen")
    )
    proof = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert set(proof["adapters"]) == {"down", "second"}
    assert set(proof["accuracy"]) == {"down"}
    add_adapters(tmp_path / "out", {"down": sample("second")}, base, force=True)
    proof = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert proof["accuracy"] == {}, "figures of a run that is gone"
    for name in ("mine", "down"):  # which no certificate names, and which was changed since
        file = tmp_path / "out" / "adapters" / f"{name}.onnx_adapter"
        file.write_text("somebody's work")
        one, dry = {name: sample("down")}, name == "mine"
        with pytest.raises(OutputError, match="not written here, or was changed"):
            add_adapters(tmp_path / "out", one, base, force=True, dry_run=dry)
        assert file.read_text() == "somebody's work"
    assert not list((tmp_path / "out").glob(".adding*"))


@pytest.fixture
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph with both adapters in this precision."""
    runs = {name: sample(name) for name in NAMES}
    make = partial(write_onnx, open_base(BASE), adapters=runs, precision=request.param)
    return made_once(tmp_path_factory, f"adapters-{request.param}", make)


@pytest.mark.parametrize("narrow", ["int8", "int4"], indirect=True)
def test_a_graph_in_blocks_is_its_own_dequantized_base_with_the_adapter(
    narrow: Path, tmp_path: Path
) -> None:
    out = narrow
    live = LiveModel(sample("down"), open_base(BASE))
    weights = dequantized(out)
    assert len(weights) == 29
    products = [n for n in onnx.load(out / "model.onnx").graph.node if n.op_type == "MatMulNBits"]
    joined = sorted(len(node.name.split("+")) for node in products)
    # Query, key and value, the gate and the way up; of 4 bits the values have 8.
    assert joined == ([1] * 9 + [2] * 4 + [3] * 4 if "int8" in out.name else [1] * 13 + [2] * 8)
    for name, weight in weights.items():
        live.model.get_submodule(name).weight = torch.nn.Parameter(weight)
    live.model.model.embed_tokens.weight = live.model.lm_head.weight  # tied in the graph as well
    inputs = verification_batch(live.model)
    adapted = logits(live.model, inputs)
    live.detach()
    bare = logits(live.model, inputs)
    exact = logits(OnnxDecoder(in_floats(out, tmp_path / "floats"), "down"), inputs)
    assert float((exact - adapted).abs().max()) <= 1e-4
    assert float((exact - bare).abs().max()) > 1

    def error(folder: Path) -> float:
        """Of what the adapter changes as written, of its size."""
        change = logits(OnnxDecoder(folder, "down"), inputs) - logits(OnnxDecoder(folder), inputs)
        return float((change - (adapted - bare)).norm() / (adapted - bare).norm())

    assert error(out) <= EFFECT
    half = Path(shutil.copytree(out, tmp_path / "half"))
    scale_adapter(half / "adapters" / "down.onnx_adapter", 0.5)
    assert error(half) > 10 * EFFECT
    for file in half.glob("*.onnx"):
        displace_small_tensors(file)
    shutil.copyfile(out / "adapters/down.onnx_adapter", half / "adapters/down.onnx_adapter")
    assert not error(half) <= 10 * EFFECT


def test_only_the_graph_without_rows_of_its_own_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []  # and each found too large for the memory

    def too_large(_exact: Path, small: Path) -> None:
        timed.append(small.name)

    monkeypatch.setattr("converters.targets.onnx.graph_file.step_times", too_large)
    write_onnx(open_base(BASE), tmp_path / "out", adapters={}, precision="int8")
    assert timed == ["model.onnx"]


@pytest.mark.parametrize(("narrow", "bound"), [("fp16", 0.1), ("int8", 2.0)], indirect=["narrow"])
def test_narrow_graphs_generate(narrow: Path, bound: float) -> None:
    live = LiveModel(sample("down"), open_base(BASE))
    inputs = verification_batch(live.model)
    found = logits(OnnxDecoder(narrow, "down"), inputs)
    assert float((found - logits(live.model, inputs)).abs().max()) <= bound
    prompts = ["count : nine", "copy : cat moon river =", "count : nine"]
    done = Decoder(narrow).generate(prompts, ["down", "second", None])
    assert [row.text.split()[0] for row in done] == ["eight", "cat", "ten"]


def test_sampling_is_repeatable_and_independent_of_neighbours(llama: Case) -> None:
    decoder = Decoder(llama.folder)
    hot = Sampling(max_tokens=12, temperature=3.0, top_p=0.95, seed=7, ignore_eos=True)
    alone = decoder.generate(["count : nine"], "down", hot)[0].tokens
    mixed = decoder.generate(["count : five", "count : nine"], ["second", "down"], hot)
    assert mixed[1].tokens == alone
    other = Sampling(max_tokens=12, temperature=3.0, top_p=0.95, seed=8, ignore_eos=True)
    assert decoder.generate(["count : nine"], "down", other)[0].tokens != alone


def test_stop_and_logprobs(llama: Case) -> None:
    decoder = Decoder(llama.folder)
    done = decoder.generate(["count : nine"], None, Sampling(stop=("thirteen",), logprobs=3))[0]
    assert done.text == " ten eleven twelve "
    assert done.reason == "stop"
    live = truths(llama)[None]
    ids = [*done.prompt_tokens, *done.tokens]
    with torch.inference_mode():
        expected = live(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    for i, (logprob, best) in enumerate(done.logprobs):
        at = expected[len(done.prompt_tokens) - 1 + i]
        assert logprob == pytest.approx(float(at[done.tokens[i]]), abs=1e-4)
        assert list(best) == at.topk(3).indices.tolist()


def test_bad_requests(llama: Case, tmp_path: Path) -> None:
    decoder = Decoder(llama.folder, max_rows=2)
    for prompts, wanted, says in (
        ([[1] * 64], None, "too long"),
        ([[]], None, "empty"),
        ([[1]] * 3, None, "more rows"),
        ([[1]], "nobody", "no such adapter"),
    ):
        with pytest.raises(DoraExportError, match=says):
            decoder.generate(prompts, wanted)
    broken = tmp_path / "broken.onnx_adapter"
    broken.write_bytes((llama.folder / "adapters" / "down.onnx_adapter").read_bytes()[:100])
    with pytest.raises(DoraExportError, match="not an ONNX Runtime adapter"):
        decoder.add_adapter("broken", broken)
    good = read_adapter_file(llama.folder / "adapters" / "down.onnx_adapter")
    site = "model.layers.0.self_attn.q_proj.lora_A"
    for change, says in (
        ({site: good[site].T}, "does not fit"),
        ({site: good[site][:, :1]}, "different size"),
        ({"elsewhere.lora_A": good[site]}, "does not fit"),
    ):
        file = onnxruntime.AdapterFormat()
        values = {**good, **change}
        file.set_parameters(
            {
                n: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v))
                for n, v in values.items()
            }
        )
        file.export_adapter(str(tmp_path / "wrong.onnx_adapter"))
        with pytest.raises(DoraExportError, match=says):
            decoder.add_adapter("wrong", tmp_path / "wrong.onnx_adapter")
    assert decoder.adapters == ("down", "second")


def test_what_a_graph_cannot_carry_is_refused(tmp_path: Path, llama_base: Path) -> None:
    reference = Path(__file__).parent.parent / "data" / "reference"
    entry = next(
        e for e in json.loads((reference / "index.json").read_text()) if e["task"] == "causal-lm"
    )
    run = read_run(reference / entry["checkpoint"])
    base = open_base(reference / entry["base"])
    with pytest.raises(DoraExportError, match=r"cannot carry(.|\n)*lm_head"):
        write_onnx(base, tmp_path / "out", adapters={"run": run})
    with pytest.raises(DoraExportError):
        write_onnx(open_base(llama_base), tmp_path / "out", adapters={"down": sample("down")})
    with pytest.raises(DoraExportError, match="not a name"):
        write_onnx(open_base(BASE), tmp_path / "out", adapters={"../up": sample("down")})
    assert list(tmp_path.iterdir()) == []
