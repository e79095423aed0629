"""`dora-serve deploy`: what is written says what `plan` says, and its readers take it."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from dora_serve.commands import dora_serve
from tests.conftest import MODELS, randomize

COUNT, EVERY = "Tiny_Llama--Count_Down--1", "Tiny_Llama--Every_Second--1"
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
    """The sample decoder with its runs, and a classifier of the same base."""
    folder = tmp_path_factory.mktemp("deploy") / "models"
    shutil.copytree(MODELS / BASE, folder / BASE)
    for part in ("Checkpoint/Tiny_Llama", "Log/Tiny_Llama"):
        shutil.copytree(MODELS / "runs" / part, folder / "runs" / part)
    model = LlamaForSequenceClassification.from_pretrained(folder / BASE, num_labels=2)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    adapted = get_peft_model(model, config)
    randomize(adapted)
    adapted.save_pretrained(folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def planned(root: Path) -> list[str]:
    """The command line of the plan for the decoder."""
    done = CliRunner().invoke(dora_serve, ["plan", str(root), "--json"])
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
    assert llm["model_loading_config"] == {
        "model_id": BASE,
        "model_source": option(planned, "--model"),
    }
    engine = llm["engine_kwargs"]
    assert engine["enable_lora"] is True
    for name in ("max_lora_rank", "max_loras", "max_cpu_loras", "dtype"):
        assert str(engine[name]) == option(planned, "--" + name.replace("_", "-"))
    first = planned.index("--lora-target-modules") + 1
    targets = engine["lora_target_modules"]
    assert targets == planned[first : first + len(targets)]
    assert not {"model", "served_model_name", "lora_modules"} & set(engine)  # Ray refuses them
    assert llm["lora_config"]["dynamic_lora_loading_path"] == f"{STORE}/{BASE}"
    assert llm["lora_config"]["max_num_adapters_per_replica"] == engine["max_cpu_loras"]
    scale = llm["deployment_config"]["autoscaling_config"]
    assert scale == {"min_replicas": 2, "max_replicas": 5}
    (moved,) = written(root, *VLLM_ON_RAY, "--models-at", "/mnt/models")
    (llm,) = moved["applications"][0]["args"]["llm_configs"]
    assert llm["model_loading_config"]["model_source"] == f"/mnt/models/{BASE}"
    assert llm["deployment_config"] == {"num_replicas": 1}


def test_vllm_on_ray_needs_object_storage(root: Path, tmp_path: Path) -> None:
    refused = deploy(root, "--to", "ray")
    assert refused.exit_code == 1
    assert "--adapters-at" in refused.stderr
    done = deploy(root, *VLLM_ON_RAY, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "classifier: Ray Serve LLM has no /classify" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"serve.yaml", "adapters"}
    adapters = tmp_path / "out/adapters" / BASE
    assert {path.name for path in adapters.iterdir()} == {COUNT, EVERY}
    assert (adapters / COUNT / "adapter_model.safetensors").is_file()
    again = deploy.__wrapped__(root, *VLLM_ON_RAY, "-o", tmp_path / "out")
    assert again.exit_code == 1
    assert "not empty" in again.stderr


@pytest.mark.parametrize("words", [VLLM_ON_RAY, EMBEDDED_ON_RAY])
def test_ray_takes_it(root: Path, words: tuple[str, ...]) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed")
    (config,) = written(root, *words, "--min-replicas", 2, "--max-replicas", 5)
    read = schema.ServeDeploySchema.model_validate(config)
    assert [application.name for application in read.applications] == ["dora-serve"]
    config["applications"][0]["import_path"] = "nowhere"
    with pytest.raises(ValueError, match="import_path"):
        schema.ServeDeploySchema.model_validate(config)


def test_the_embedded_engine_on_ray(root: Path) -> None:
    (config,) = written(root, *EMBEDDED_ON_RAY, "--min-replicas", 2, "--max-replicas", 5)
    (application,) = config["applications"]
    assert application["import_path"] == "dora_serve.deploy.ray_app:application"
    assert application["args"] == {"folder": str(root), "base": None, "threads": 3}
    (deployment,) = application["deployments"]
    assert deployment["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 5}
    assert deployment["ray_actor_options"] == {"num_cpus": 3}


def test_vllm_on_kubernetes_runs_the_command_of_the_plan(root: Path, planned: list[str]) -> None:
    manifests = written(root, *KUBERNETES, "--min-replicas", 2, "--max-replicas", 5)
    by = {(m["kind"], m["metadata"]["name"]): m for m in manifests}
    deployment = by["Deployment", f"vllm-{BASE}"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    found = container["command"] + container["args"]
    at = planned.index("--lora-modules")
    expected = [word.replace(str(root), "/models") for word in planned[:at]]
    assert found == [*expected, "--host", "0.0.0.0", "--port", "8000"]
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
    for words in (("--to", "kubernetes"), (*KUBERNETES, "--min-replicas", 3, "--max-replicas", 2)):
        done = deploy(root, *words)
        assert done.exit_code == 2, done.output
