"""Where the parameters of a base lie: by made-up files, and by what transformers itself loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from blake3 import blake3
from safetensors.torch import load_file, save_file

from converters.errors import BaseError, DoraExportError, MissingError, TargetError
from converters.files.tensors import open_file
from converters.model.base import BaseModel, open_base
from converters.model.layout import Layout, is_parameter, split_slice
from converters.model.match import changed, check_frozen
from converters.run import Run
from converters.updates.rank_one import RankOneSum
from dora_serve import merge
from tests.converters.families import save_base

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def make_base(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> BaseModel:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / WEIGHTS, {"format": "pt"})
    return open_base(folder)


def low_rank(out: int, inn: int, rank: int = 2, seed: int = 0) -> RankOneSum:
    generator = torch.Generator().manual_seed(seed)
    return RankOneSum(
        torch.randn(rank, inn, generator=generator),
        torch.ones(rank),
        torch.randn(out, rank, generator=generator),
    )


def make_run(folder: Path, updates: Mapping[str, Any], **more: Any) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, "test", updates, **more)


def lazy(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "whole.safetensors")
    return open_file(folder / "whole.safetensors")


# --- names


def test_names_with_and_without_prefixes(tmp_path: Path) -> None:
    names = ["model.a.weight", "head.weight", "bert.b.weight", "model.b.weight", "c", "x.c2"]
    base = make_base(tmp_path / "base", {name: torch.ones(1) for name in names})
    found = {
        "model.a.weight": "model.a.weight",
        "a.weight": "model.a.weight",
        "base_model.model.model.a.weight": "model.a.weight",
        "module.model.a.weight": "model.a.weight",
        "base_model.model.head.weight": "head.weight",
        "model.head.weight": "head.weight",
        "roberta.a.weight": None,
        "other.head.weight": "head.weight",
        "b.weight": None,  # of two
        "c": "c",
        "c2": "x.c2",
        "a": None,
        "nothing.weight": None,
    }
    assert {name: base.find(name) for name in found} == found


def test_weights_of_modules_and_parameters(tmp_path: Path) -> None:
    embed, bias = torch.ones(3, 2), torch.ones(4)
    base = make_base(tmp_path / "base", {"model.embed_tokens.weight": embed, "model.q.bias": bias})
    for name, tensor in (
        ("model.embed_tokens", "model.embed_tokens.weight"),
        ("embed_tokens", "model.embed_tokens.weight"),
        ("model.q.bias", "model.q.bias"),
        ("lm_head", "model.embed_tokens.weight"),
    ):
        weight = base.weight(name)
        assert weight is not None and weight.name == tensor
    assert base.weight("model.q") is None
    assert base.weight("other_head") is None


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "transformer.wte.weight", "shared.weight"),
        *("bert.embeddings.word_embeddings.weight", "backbone.embeddings.weight"),
    ],
)
def test_the_embedding(tmp_path: Path, name: str) -> None:
    others = {"model.position_embeddings.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    assert make_base(tmp_path / "none", others).embedding is None
    base = make_base(tmp_path / "base", {**others, name: torch.ones(2)})
    assert base.embedding == name


@pytest.mark.parametrize(
    ("module", "stored", "shape", "kind", "embedding", "expected"),
    [
        ("m.q", (3, 2), (3, 2), "llama", False, False),
        ("m.q", (2, 3), (3, 2), "llama", False, True),
        ("m.q", (2, 2), (2, 2), "llama", False, False),
        ("m.c_attn", (2, 2), (2, 2), "llama", False, False),
        ("m.c_attn", (2, 2), (2, 2), "gpt2", False, True),
        ("m.c_proj", (2, 2), (2, 2), "openai-gpt", False, True),
        ("m.c_fc", (2, 2), (2, 2), "imagegpt", False, True),
        ("m.q_attn", (2, 2), (2, 2), "decision_transformer", False, True),
        ("m.c_fc", (2, 2), (2, 2), "clvp", False, True),
        ("m.q", (2, 2), (2, 2), "gpt2", False, False),
        ("c_attn.q", (2, 2), (2, 2), "gpt2", False, False),
        ("m.wte", (2, 2), (2, 2), "gpt2", True, False),
        ("m.c_attn", (2, 2), (2, 2), "gpt2", True, False),
        ("m.conv", (4, 3, 2), (12, 2), "llama", False, False),
        ("m.bias", (5,), (1, 5), "llama", False, False),
        ("m.q", (3, 2), (3, 3), "llama", False, None),
        ("m.q", (3, 2), (6, 1), "llama", False, None),
        ("m.e", (2, 3), (3, 2), "llama", True, None),
        ("m.conv", (2, 1, 12), (12, 2), "llama", False, None),
    ],
)
def test_which_way_round_a_weight_lies(
    tmp_path: Path,
    module: str,
    stored: tuple[int, ...],
    shape: tuple[int, int],
    kind: str,
    embedding: bool,
    expected: bool | None,
) -> None:
    name = module if module.endswith("bias") else f"{module}.weight"
    base = make_base(tmp_path / "base", {name: torch.ones(stored)}, model_type=kind)
    if expected is None:
        with pytest.raises(BaseError, match="does not fit") as caught:
            base.is_transposed(module, shape, embedding)
        assert (caught.value.found, caught.value.expected) == (list(stored), list(shape))
        assert (caught.value.file, caught.value.tensor) == (base.path / WEIGHTS, name)
    else:
        assert base.is_transposed(module, shape, embedding) is expected
    with pytest.raises(BaseError, match="no such module") as caught:
        base.is_transposed("none", shape)
    assert caught.value.tensor == "none.weight"


def test_the_dtype_of_most_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(10).half(), "b": torch.ones(6), "c": torch.ones(3).half()}
    assert make_base(tmp_path / "one", tensors).dtype() == torch.float16
    tensors["b"] = torch.ones(7)
    assert make_base(tmp_path / "two", tensors).dtype() == torch.float32


@pytest.mark.parametrize("size", [0, 1, 1024, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_fingerprints(tmp_path: Path, size: int) -> None:
    """BLAKE3 of dtype, shape and every element, which are read in blocks."""
    data, bias = torch.randn(size), torch.ones(2)
    base = make_base(tmp_path / "base", {"m.weight": data, "b": bias})
    said = f"torch.float32 [{size}]".encode()
    assert base.fingerprint == {
        "m.weight": blake3(said + data.numpy().tobytes()).hexdigest(),
        "b": blake3(b"torch.float32 [2]" + bias.numpy().tobytes()).hexdigest(),
    }
    assert base.unlike(base.fingerprint) == []
    assert base.unlike({**base.fingerprint, "b": "x", "c": "y"}) == ["b", "c"]
    assert base.unlike({"b": base.fingerprint["b"]}) == ["m.weight"]


# --- folders


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def wrong_type(folder: Path) -> None:
    write(folder, "config.json", {"model_type": 3})


def indexed(weight_map: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        write(folder, INDEX, {"weight_map": weight_map})

    return damage


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (no_config, MissingError, "no config.json"),
        (no_weights, MissingError, "no weights"),
        (wrong_type, BaseError, "model_type"),
        (indexed(None), BaseError, "no weight_map"),
        (indexed({}), BaseError, "no weight_map"),
        (indexed(["a"]), BaseError, "no weight_map"),
        (indexed({"x": "../base/a.safetensors"}), BaseError, "outside"),
        (indexed({"x": "/etc/passwd"}), BaseError, "outside"),
        (indexed({"x": "b.safetensors"}), MissingError, "is missing"),
        (indexed({"x": "a.safetensors", "y": "a.safetensors"}), BaseError, "does not hold"),
    ],
)
def test_folders_that_are_no_base(
    tmp_path: Path, damage: Callable[[Path], None], kind: type[DoraExportError], says: str
) -> None:
    make_base(tmp_path / "base", {"x": torch.ones(1)})
    damage(tmp_path / "base")
    with pytest.raises(kind, match=says):
        open_base(tmp_path / "base")


def test_what_is_opened(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {"x": torch.ones(1)}, model_type="llama")
    assert (base.path, base.name) == (tmp_path / "base", str(tmp_path / "base"))
    assert base.config == {"model_type": "llama"}
    assert list(base.shards) == [tmp_path / "base" / WEIGHTS]
    torch.save({"y": torch.ones(1)}, tmp_path / "base" / "pytorch_model.bin")
    assert list(open_base(tmp_path / "base").tensors) == ["x"]  # safetensors first
    (tmp_path / "base" / WEIGHTS).unlink()
    assert list(open_base(tmp_path / "base").tensors) == ["y"]


def test_shards_come_in_their_order_with_only_the_files_of_the_index(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    make_base(folder, {"x": torch.ones(1)})
    (folder / WEIGHTS).unlink()
    for name in "cab":
        save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    write(folder, INDEX, {"weight_map": {n: f"{n}.safetensors" for n in "ca"}})
    base = open_base(folder)
    assert [path.name for path in base.shards] == ["a.safetensors", "c.safetensors"]
    assert list(base.tensors) == ["a", "c"]


@pytest.mark.parametrize("name", ["no/such-model", "x" * 5000, "none"])
def test_names_of_no_model(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="no such base model") as caught:
        open_base(name)
    assert caught.value.file == name


# --- runs against a base


def test_replaced_tensors_that_changed(tmp_path: Path) -> None:
    data = torch.randn(4, 2)
    base = make_base(
        tmp_path / "base", {"model.embed_tokens.weight": data, "model.n": torch.ones(2)}
    )
    whole = lazy(
        tmp_path / "run",
        {"n": torch.ones(2), "lm_head.weight": data.clone(), "new": torch.ones(2)},
    )
    run = make_run(tmp_path / "run", {}, replaced=whole)
    assert list(changed(run, base)) == ["new"]
    assert changed(run, None) == whole
    other = lazy(tmp_path / "run2", {"n": torch.zeros(2), "lm_head.weight": data + 1})
    run = make_run(tmp_path / "run2", {}, replaced=other)
    assert changed(run, base) == other
    assert list(changed(run, base, {"n": None, "lm_head.weight": None}.get)) == list(other)
    axes = make_run(
        tmp_path / "run3", {}, replaced=lazy(tmp_path / "run3", {"n": torch.ones(1, 2)})
    )
    with pytest.raises(BaseError, match="number of axes") as caught:
        changed(axes, base)
    assert (caught.value.tensor, caught.value.found) == ("n", [1, 2])


def test_without_a_base_a_checkpoint_must_tell_what_was_trained(tmp_path: Path) -> None:
    whole = lazy(tmp_path / "run", {"a.weight": torch.ones(2, 2), "b.bias": torch.ones(2)})
    updates = {"q": low_rank(2, 2)}
    frozen = lazy(tmp_path / "run2", {"q.weight": torch.ones(2, 2), "q.bias": torch.ones(2)})
    run = make_run(tmp_path / "run", updates, replaced=whole, embedded_base={**whole, **frozen})
    with pytest.raises(TargetError, match="does not tell"):
        changed(run, None)
    more = lazy(tmp_path / "run3", {"k.weight": torch.ones(2, 2)})
    told = make_run(
        tmp_path / "run", updates, replaced=whole, embedded_base={**whole, **frozen, **more}
    )
    assert changed(told, None) == whole


def test_frozen_weights(tmp_path: Path) -> None:
    tensors = {"model.a": torch.randn(3), "model.b": torch.randn(3)}
    base = make_base(tmp_path / "base", tensors)
    for number, (frozen, error) in enumerate(
        [
            ({"a": tensors["model.a"], "b": tensors["model.b"]}, None),
            ({"a": tensors["model.a"].half(), "unknown": torch.ones(1)}, None),
            ({"a": tensors["model.a"], "b": tensors["model.b"] + 1}, "model.b"),
            ({"a": torch.ones(4)}, "model.a"),
        ]
    ):
        folder = tmp_path / f"run{number}"
        run = make_run(folder, {}, embedded_base=lazy(folder, frozen))
        if error is None:
            check_frozen(run, base)
            continue
        with pytest.raises(BaseError) as caught:
            check_frozen(run, base)
        assert caught.value.tensor == error
        trained = make_run(folder, {}, embedded_base=run.embedded_base, replaced=run.embedded_base)
        check_frozen(trained, base)
    check_frozen(make_run(tmp_path / "run", {}), base)


# --- parameters in memory


@pytest.mark.parametrize(
    ("name", "stem", "index", "parameter"),
    [
        ("a.q_proj", "a.q_proj", None, False),
        ("a.experts.w[3]", "a.experts.w", 3, True),
        ("a.experts.w[123456789]", "a.experts.w", 123456789, True),
        ("a.experts.w[1234567890]", "a.experts.w[1234567890]", None, False),
        ("a.experts.w[-1]", "a.experts.w[-1]", None, False),
        ("a[3].b", "a[3].b", None, False),
        ("[3]", "[3]", None, False),
        ("a.bias", "a.bias", None, True),
        ("a.weight", "a.weight", None, True),
    ],
)
def test_names_of_blocks(name: str, stem: str, index: int | None, parameter: bool) -> None:
    assert split_slice(name) == (stem, index)
    assert is_parameter(name) is parameter


def loaded(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(folder)
    return model, {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_deployed(base: Path, merged: Path, deltas: Mapping[str, torch.Tensor]) -> None:
    """transformers loads `merged` as `base` with `deltas` added in memory, and nothing else."""
    _, before = loaded(base)
    _, after = loaded(merged)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor.double() + deltas.get(name, torch.zeros(())).double()
        assert torch.allclose(after[name].double(), expected, atol=1e-5), name
        assert torch.equal(after[name], tensor) is (name not in deltas), name


EXPERTS = "model.layers.{}.mlp.experts"


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "qwen2-moe"])
@pytest.mark.parametrize("which", [[0, 1, 2, 3], [2], [0, 3]], ids=str)
def test_updates_of_fused_experts_reach_their_parts_on_disk(
    tmp_path: Path, family: str, which: list[int]
) -> None:
    base = tmp_path / "base"
    save_base(family, base)
    _, state = loaded(base)
    updates, deltas = {}, {}
    for layer in (0, 1):
        for name in ("gate_up_proj", "down_proj"):
            parameter = f"{EXPERTS.format(layer)}.{name}"
            experts, out, inn = state[parameter].shape
            delta = torch.zeros(experts, out, inn)
            for number, expert in enumerate(which):
                update = low_rank(out, inn, seed=number + layer)
                updates[f"{parameter}[{expert}]"] = update
                delta[expert] = update.dense()
            deltas[parameter] = delta
    norm = "model.layers.0.self_attn.q_proj"
    updates[norm] = low_rank(*state[f"{norm}.weight"].shape)
    deltas[f"{norm}.weight"] = updates[norm].dense()
    run = make_run(
        tmp_path / "run", updates, task="causal-lm", start_rank=dict.fromkeys(updates, 7)
    )
    merge(run, tmp_path / "out", base=base)
    assert_deployed(base, tmp_path / "out", deltas)
    modules = json.loads((tmp_path / "out" / "dora_export.json").read_text())["modules"]
    assert {said["start_rank"] for said in modules.values()} == {7}
    kinds = 3 * len(which) * 2
    assert len(modules) == kinds + 1
    assert {said["rank"] for said in modules.values()} == {2}


def test_an_expert_that_the_base_does_not_have(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("qwen3-moe", base)
    parameter = f"{EXPERTS.format(0)}.down_proj"
    _, state = loaded(base)
    experts, out, inn = state[parameter].shape
    for name, shape, says in (
        (f"{parameter}[{experts}]", (out, inn), "does not have"),
        (f"{parameter}[0]", (out, inn + 1), "does not fit"),
        ("model.layers.0.self_attn.q_proj[0]", (32, 32), "does not have"),
    ):
        run = make_run(tmp_path / "run", {name: low_rank(*shape)}, task="causal-lm")
        with pytest.raises(BaseError, match=says) as caught:
            merge(run, tmp_path / "out", base=base)
        assert caught.value.tensor == name


def test_names_of_older_versions(tmp_path: Path) -> None:
    """BERT's first files say gamma and beta."""
    save_base("bert", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in tensors.items()
    }
    save_file(renamed, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    name = "bert.encoder.layer.0.output.LayerNorm"
    whole = {f"{name}.weight": torch.randn(32), f"{name}.bias": torch.randn(32)}
    query = "bert.encoder.layer.0.attention.self.query"
    update = low_rank(32, 32)
    run = make_run(
        tmp_path / "run",
        {query: update},
        replaced=lazy(tmp_path / "run", whole),
        task="sequence-classification",
        num_labels=2,
    )
    merge(run, tmp_path / "out", base=tmp_path / "base")
    _, before = loaded(tmp_path / "base")
    deltas = {key: tensor - before[key] for key, tensor in whole.items()}
    assert_deployed(
        tmp_path / "base", tmp_path / "out", {f"{query}.weight": update.dense(), **deltas}
    )
    base = open_base(tmp_path / "base")
    layout = Layout(base, "BertForSequenceClassification", 2)
    assert layout.find(f"{name}.weight") == f"{name}.gamma"
    assert layout.find(f"{query}.weight") == f"{query}.weight"
    assert layout.find("bert.nothing.weight") is None
    assert layout.members(f"{name}.weight") == []


def test_what_conversions_fuse(tmp_path: Path) -> None:
    save_base("qwen3-moe", tmp_path / "base")
    base = open_base(tmp_path / "base")
    layout = Layout(base, "Qwen3MoeForCausalLM")
    disk = EXPERTS.format(0)
    assert layout.is_fused(f"{disk}.1.gate_proj")
    assert layout.is_fused(f"{disk}.3.down_proj")
    assert not layout.is_fused("model.layers.0.self_attn.q_proj")
    assert layout.members(f"{disk}.down_proj") == [f"{disk}.{e}.down_proj.weight" for e in range(4)]
    fused = set(layout.members(f"{disk}.gate_up_proj"))
    assert fused == {f"{disk}.{e}.{kind}_proj.weight" for e in range(4) for kind in ("gate", "up")}
    shape = (24, 32)
    place = layout.place(f"{disk}.2.up_proj", shape)
    assert place is not None
    assert (place.parameter, place.rows, place.columns) == (f"{disk}.gate_up_proj", 24, 32)
    assert place.start == 2 * 48 + 24
    assert place.transposed is False
    assert layout.place("model.nothing", (2, 2)) is None


def test_a_classifier_of_a_language_model(tmp_path: Path) -> None:
    """The head that the run trained joins the body of the base, whose own head goes."""
    save_base("llama", tmp_path / "base", False)
    query = "model.layers.1.self_attn.q_proj"
    update, score = low_rank(32, 32), torch.randn(3, 32)
    run = make_run(
        tmp_path / "run",
        {query: update},
        replaced=lazy(tmp_path / "run", {"score.weight": score}),
        task="sequence-classification",
        num_labels=3,
    )
    merge(run, tmp_path / "out", base=tmp_path / "base")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 3
    found, own = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "base" / WEIGHTS)
    assert found.keys() == own.keys() - {"lm_head.weight"} | {"score.weight"}
    assert torch.equal(found["score.weight"], score)
    model, _ = loaded(tmp_path / "out")
    weight = model.get_submodule(query).weight
    assert torch.allclose(weight, own[f"{query}.weight"] + update.dense(), atol=1e-5)
    missing = make_run(
        tmp_path / "run2", {query: update}, task="sequence-classification", num_labels=3
    )
    with pytest.raises(BaseError, match="neither the base nor the run") as caught:
        merge(missing, tmp_path / "no", base=tmp_path / "base")
    assert caught.value.tensor == "score.weight"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"architectures": []}, TargetError, "no class"),
        ({"architectures": None}, TargetError, "no class"),
        ({"architectures": ["NothingForCausalLM"]}, TargetError, "no class"),
        ({"num_hidden_layers": 2001}, BaseError, "over 2000"),
        ({"num_hidden_layers": "two"}, BaseError, "cannot make"),
        ({"model_type": "nothing"}, BaseError, "cannot make"),
        ({"text_config": {"n_layer": 5000}}, BaseError, "n_layer is 5000"),
        ({"num_experts": 2001}, BaseError, "num_experts is 2001"),
    ],
    ids=str,
)
def test_configurations_of_no_classifier(
    tmp_path: Path, change: dict[str, object], error: type[DoraExportError], says: str
) -> None:
    save_base("llama", tmp_path / "base", False)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    run = make_run(
        tmp_path / "run",
        {"model.layers.1.self_attn.q_proj": low_rank(32, 32)},
        replaced=lazy(tmp_path / "run", {"score.weight": torch.randn(3, 32)}),
        task="sequence-classification",
        num_labels=3,
    )
    with pytest.raises(error, match=says):
        merge(run, tmp_path / "out", base=tmp_path / "base")


def test_labels_without_end(tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base", False)
    run = make_run(
        tmp_path / "run",
        {"model.layers.1.self_attn.q_proj": low_rank(32, 32)},
        task="sequence-classification",
        num_labels=1_000_001,
    )
    with pytest.raises(BaseError, match="num_labels is 1000001"):
        merge(run, tmp_path / "out", base=tmp_path / "base")
