"""`dora-serve deploy`: what is written says what `plan` says, and its readers take it."""

from __future__ import annotations

import json
import re
import resource
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from dora_serve.commands import dora_serve
from dora_serve.onnxruntime.limits import Limits
from dora_serve.server.prepare import child, make
from tests.conftest import MODELS, randomize

BASE = "tiny-llama-base"
STORE = "s3://bucket/adapters"
VLLM_ON_RAY = ("--to", "ray", "--adapters-at", STORE)
EMBEDDED_ON_RAY = ("--to", "ray", "--engine", "onnxruntime", "--threads", "3")
KUBERNETES = ("--to", "kubernetes", "--image", "registry/dora-serve:1")


@cache
def deploy(*words: object) -> Result:
    return CliRunner().invoke(dora_serve, ["deploy", *map(str, words)])


def written(*words: object) -> list[Any]:
    done = deploy(*words)
    assert done.exit_code == 0, done.output
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample decoder with two adapters, and a classifier of the same base."""
    folder = tmp_path_factory.mktemp("deploy") / "models"
    shutil.copytree(MODELS / BASE, folder / BASE)
    for name, module, rank in (("count", "q_proj", 4), ("every", "v_proj", 12)):
        model = LlamaForCausalLM.from_pretrained(folder / BASE)
        save(model, folder / "runs" / name, r=rank, target_modules=[module], task_type="CAUSAL_LM")
    model = LlamaForSequenceClassification.from_pretrained(folder / BASE, num_labels=2)
    save(model, folder / "classifier", r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    return folder


def save(model: Any, folder: Path, **config: Any) -> None:
    adapted = get_peft_model(model, LoraConfig(**config))
    randomize(adapted)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def planned(root: Path) -> list[str]:
    """The command line of the plan for the decoder."""
    done = CliRunner().invoke(dora_serve, ["plan", str(root), "--gpu-memory", "80GB", "--json"])
    commands: list[list[str]] = json.loads(done.stdout)["commands"]
    (command,) = (words for words in commands if "--runner" not in words)
    return command


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_vllm_on_ray_has_the_values_of_the_plan(root: Path, planned: list[str]) -> None:
    (config,) = written(root, *VLLM_ON_RAY, "--min-replicas", 2, "--max-replicas", 5)
    (application,) = config["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (llm,) = application["args"]["llm_configs"]
    assert llm["model_loading_config"] == {"model_id": BASE, "model_source": planned[2]}
    engine = llm["engine_kwargs"]
    assert engine["enable_lora"] is True
    assert engine["dtype"] == "auto"  # the adapter kernels of a GPU take 16 bits
    for name in ("max_lora_rank", "max_loras", "max_cpu_loras", "dtype"):
        assert str(engine[name]) == option(planned, "--" + name.replace("_", "-"))
    first = planned.index("--lora-target-modules") + 1
    targets = engine["lora_target_modules"]
    assert targets == planned[first : first + len(targets)]
    assert not {"model", "served_model_name", "lora_modules"} & set(engine)  # Ray refuses them
    assert llm["lora_config"]["dynamic_lora_loading_path"] == f"{STORE}/{BASE}"
    assert llm["lora_config"]["max_num_adapters_per_replica"] == engine["max_cpu_loras"]
    scale = llm["deployment_config"]["autoscaling_config"]
    # Without the last, Ray Serve LLM keeps the least: its own value is 1e9.
    assert scale == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 64}
    (moved,) = written(root, *VLLM_ON_RAY, "--models-at", "/mnt/models")
    (llm,) = moved["applications"][0]["args"]["llm_configs"]
    assert llm["model_loading_config"]["model_source"] == f"/mnt/models/{BASE}"
    assert llm["deployment_config"] == {"num_replicas": 1}


def test_vllm_on_ray_needs_object_storage(root: Path, tmp_path: Path) -> None:
    for place in ((), ("--adapters-at", "/mnt/adapters"), ("--adapters-at", "s3://")):
        refused = deploy(root, "--to", "ray", *place)
        assert refused.exit_code == 1
        assert "with --adapters-at" in refused.stderr
    done = deploy(root, *VLLM_ON_RAY, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "classifier: Ray Serve LLM has no /classify" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"serve.yaml", "adapters"}
    adapters = tmp_path / "out/adapters" / BASE
    assert {path.name for path in adapters.iterdir()} == {"count", "every"}
    assert (adapters / "count/adapter_model.safetensors").is_file()
    assert (adapters / "count/adapter_config.json").is_file()


def test_an_output_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    nothing, used = tmp_path / "nothing", tmp_path / "used"
    nothing.mkdir()
    (used / "old").mkdir(parents=True)
    refused = deploy(nothing, *VLLM_ON_RAY, "-o", used)  # before anything is looked for
    assert refused.exit_code == 1
    assert "not empty" in refused.stderr
    inside = deploy(nothing, *VLLM_ON_RAY, "--base", used, "-o", used / "new")
    assert inside.exit_code == 1 and "inside an input" in inside.stderr
    assert deploy(root, *VLLM_ON_RAY, "-o", tmp_path / "first").exit_code == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        full = deploy(root, *VLLM_ON_RAY, "-o", tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.exit_code == 1
    assert "reading or writing failed: File too large" in full.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"nothing", "used", "first"}


def test_names_that_ray_would_take_for_others(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / BASE, tmp_path / "colon" / "llama:7b")
    colon = deploy(tmp_path / "colon", *VLLM_ON_RAY)
    assert colon.exit_code == 1
    assert "llama:7b" in colon.stderr
    shutil.copytree(root / BASE, tmp_path / "same" / BASE)
    for name in ("a/x", "b/x", "a--x"):
        shutil.copytree(root / "runs/count", tmp_path / "same" / name)
    same = deploy(tmp_path / "same", *VLLM_ON_RAY)
    assert same.exit_code == 1
    assert "a--x" in same.stderr


def test_a_base_that_is_not_in_the_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--org--tiny"
    shutil.copytree(root / BASE, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    here = partial(make.make_offer, say=print, precision="fp32")  # where the cache is this one
    monkeypatch.setattr(child, "make_offer", here)
    (config,) = written(root / "runs", *VLLM_ON_RAY, "--base", "org/tiny")
    (llm,) = config["applications"][0]["args"]["llm_configs"]
    assert llm["model_loading_config"]["model_id"] == "org/tiny"
    assert llm["lora_config"]["dynamic_lora_loading_path"] == f"{STORE}/org--tiny"
    (seen,) = written(root / "runs", *EMBEDDED_ON_RAY, "--base", "org/tiny")
    assert seen["applications"][0]["args"]["base"] == "org/tiny"
    # A pod has no hub's cache, and asks no hub.
    for words in ((*KUBERNETES,), (*KUBERNETES, "--engine", "onnxruntime")):
        unseen = deploy(root / "runs", *words, "--base", "org/tiny")
        assert unseen.exit_code == 1, words
        assert "does not lie in the folder that the servers see" in unseen.stderr


@pytest.mark.parametrize("words", [VLLM_ON_RAY, EMBEDDED_ON_RAY])
def test_ray_takes_it(root: Path, words: tuple[str, ...]) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed")
    (config,) = written(root, *words, "--min-replicas", 2, "--max-replicas", 5)
    read = schema.ServeDeploySchema.model_validate(config)
    assert [application.name for application in read.applications] == ["dora-serve"]
    config["applications"][0]["import_path"] = "nowhere"
    with pytest.raises(ValueError, match="import_path"):
        schema.ServeDeploySchema.model_validate(config)


def test_ray_serve_llm_takes_it(root: Path) -> None:
    """The class behind `ray.serve.llm.LLMConfig`, which alone needs no vLLM."""
    pytest.importorskip("pyarrow", reason="Ray Serve LLM needs it")
    found = pytest.importorskip("ray.llm._internal.serve.core.configs.llm_config")
    (config,) = written(root, *VLLM_ON_RAY, "--min-replicas", 2, "--max-replicas", 5)
    (llm,) = config["applications"][0]["args"]["llm_configs"]
    read = found.LLMConfig.model_validate(llm)
    assert (read.model_id, read.lora_config.max_num_adapters_per_replica) == (BASE, 2)
    wrong = {"dynamic_lora_loading_path": "/mnt/adapters"}
    with pytest.raises(ValueError, match="Invalid lora_config"):
        found.LLMConfig.model_validate({**llm, "lora_config": wrong})
    with pytest.raises(ValueError, match="Invalid deployment config"):
        found.LLMConfig.model_validate({**llm, "deployment_config": {"num_replicas": -1}})


def test_the_embedded_engine_on_ray(root: Path) -> None:
    (config,) = written(root, *EMBEDDED_ON_RAY, "--min-replicas", 2, "--max-replicas", 5)
    (application,) = config["applications"]
    assert application["import_path"] == "dora_serve.deploy.ray_app:application"
    assert application["args"] == {"folder": str(root), "base": None, "threads": 3}
    (deployment,) = application["deployments"]
    scale = {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": Limits().max_rows}
    assert deployment["autoscaling_config"] == scale
    assert deployment["ray_actor_options"] == {"num_cpus": 3}


def test_vllm_on_kubernetes_runs_the_command_of_the_plan(root: Path, planned: list[str]) -> None:
    manifests = written(root, *KUBERNETES, "--min-replicas", 2, "--max-replicas", 5)
    by = {(m["kind"], m["metadata"]["name"]): m for m in manifests}
    deployment = by["Deployment", f"vllm-{BASE}"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    found = container["command"] + container["args"]
    options = planned[3 : planned.index("--lora-modules")]
    assert found == [
        *("vllm", "serve", f"/models/{BASE}"),
        *options,
        *("--host", "0.0.0.0", "--port", "8000"),
    ]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["DORA_SERVE_RUNS"] == "/models"
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "replicas" not in deployment["spec"]
    scaler = by["HorizontalPodAutoscaler", f"vllm-{BASE}"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 5)
    classifier = by["Deployment", f"vllm-{BASE}-sequence-classification"]["spec"]["template"]
    assert "classify" in classifier["spec"]["containers"][0]["args"]
    selector = by["Service", f"vllm-{BASE}"]["spec"]["selector"]
    assert selector == deployment["spec"]["template"]["metadata"]["labels"]
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert ("PersistentVolumeClaim", claim) in by
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(("engine", "most"), [("vllm", 5), ("vllm", 2), ("onnxruntime", 5)])
def test_kubernetes_takes_it(root: Path, engine: str, most: int) -> None:
    more = () if engine == "vllm" else ("--engine", engine)
    manifests = written(root, *KUBERNETES, "--min-replicas", 2, "--max-replicas", most, *more)
    version = kubernetes_validate.latest_version()
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)
    (first, *_) = (m for m in manifests if m["kind"] == "Deployment")
    assert first["spec"].get("replicas") == (2 if most == 2 else None)
    scalers = [m for m in manifests if m["kind"] == "HorizontalPodAutoscaler"]
    assert bool(scalers) == (most > 2)
    first["spec"]["template"]["spec"]["containers"][0]["arguments"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(first, version, strict=True)


class GoLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads the numbers that `kubectl` reads, and PyYAML takes for text."""


_GO_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
GoLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(_GO_FLOAT + "$"), list("-+.0123456789")
)


def test_names_that_kubernetes_would_take_for_others(root: Path, tmp_path: Path) -> None:
    long = "llama-" * 12
    names = [f"{long}one", f"{long}two", "Llama.3", "llama-3", "1e5", "$(PATH)", "模型"]
    for name in names:
        shutil.copytree(root / BASE, tmp_path / name)
    (tmp_path / "no-place").symlink_to("x" * 300)
    done = deploy(tmp_path, *KUBERNETES)
    assert done.exit_code == 0, done.output
    manifests = list(yaml.load_all(done.stdout, GoLoader))
    deployments = [m for m in manifests if m["kind"] == "Deployment"]
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    called = [m["metadata"]["name"] for m in deployments]
    assert len(set(called)) == len(names)
    for name in called:
        assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", name)
        assert len(name) <= 52
    assert "vllm-1e5" in called
    assert manifests[0]["spec"]["resources"]["requests"]["storage"] == "1Gi"
    served = {m["spec"]["template"]["spec"]["containers"][0]["args"][2] for m in deployments}
    assert served == {name.replace("$", "$$") for name in names}  # `$(PATH)` would be a value


def test_what_the_servers_would_not_see(root: Path, tmp_path: Path) -> None:
    runs = root / "runs"
    elsewhere = deploy(runs, *KUBERNETES, "--base", root / BASE)
    assert elsewhere.exit_code == 1
    assert "does not lie in the folder" in elsewhere.stderr
    (seen,) = written(runs, *VLLM_ON_RAY, "--base", root / BASE)  # Ray: the same paths everywhere
    (llm,) = seen["applications"][0]["args"]["llm_configs"]
    assert llm["model_loading_config"]["model_source"] == str(root / BASE)
    for engine in ("vllm", "onnxruntime"):
        nothing = deploy(tmp_path, "--to", "ray", "--engine", engine)
        assert nothing.exit_code == 1
        assert "nothing here can be served" in nothing.stderr


def test_wrong_words(root: Path) -> None:
    wrong = [
        ("--to", "kubernetes"),
        ("--to", "kubernetes", "--image", ""),
        (*KUBERNETES, "--min-replicas", 3, "--max-replicas", 2),
        (*VLLM_ON_RAY, "--models-at", "models"),
        *((*KUBERNETES, "--models-at", at) for at in ("models", "/", "/cache", "/a:b", "/a/..")),
    ]
    for words in wrong:
        done = deploy(root, *words)
        assert done.exit_code == 2, (words, done.output)


def test_force_replaces_what_deploy_wrote_and_nobody_changed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def again(*more: str) -> Result:
        words = ["deploy", str(root), *VLLM_ON_RAY, "-o", str(out), *more]
        return CliRunner().invoke(dora_serve, words)

    assert again().exit_code == 0
    refused = again()
    assert refused.exit_code == 1 and "not empty" in refused.stderr
    assert again("--force").exit_code == 0
    serve = out / "serve.yaml"
    written = serve.read_text()
    thesis = out / "thesis.txt"

    def copy(source: Path, target: Path) -> None:
        thesis.write_text("mine")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", copy)  # it comes while the next is written
    refused = again("--force")
    assert refused.exit_code == 1 and "thesis.txt" in refused.stderr
    assert thesis.read_text() == "mine"
    thesis.unlink()
    monkeypatch.undo()
    for place, text, found in (
        (serve, f"{written}# mine\n", "serve.yaml"),
        (thesis, "mine", "thesis.txt"),
        (next(out.glob("adapters/*/*/*.safetensors")), "mine", "adapters"),
    ):
        place.write_text(text)
        refused = again("--force")
        assert refused.exit_code == 1
        assert found in refused.stderr
        serve.write_text(written)
        thesis.unlink(missing_ok=True)
