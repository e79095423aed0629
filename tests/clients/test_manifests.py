"""vLLM takes what `dora-serve deploy` writes, in its own environment."""

from __future__ import annotations

import json
import site
import subprocess
from pathlib import Path

import pytest

from tests.clients.test_clients import VLLM
from tests.dora_serve.test_deploy import BASE, KUBERNETES, VLLM_ON_RAY, root, written

__all__ = ["root"]

_READ = """
import json, sys
sys.path.append(sys.argv[1])  # Ray's
from ray.llm._internal.serve.engines.vllm.vllm_models import AsyncEngineArgs, VLLMEngineConfig
from ray.serve.llm import LLMServingArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

given = json.load(sys.stdin)
told = []
for config in LLMServingArgs.model_validate(given["application"]).llm_configs:
    words = VLLMEngineConfig.from_llm_config(config).get_initialization_kwargs()
    told.append(vars(AsyncEngineArgs(**words)))
parser = FlexibleArgumentParser()
serve = ServeSubcommand()
serve.subparser_init(parser.add_subparsers(required=True))
for command in given["commands"]:
    args = parser.parse_args(command)
    serve.validate(args)
    told.append({**vars(args), "model": args.model_tag})
print(json.dumps(told, default=str))
"""


@pytest.mark.skipif(not VLLM.exists(), reason="vLLM is not installed (make setup-vllm)")
def test_vllm_takes_it(root: Path) -> None:
    """Both by Ray's way to vLLM's arguments and by the command line of the manifests."""
    pytest.importorskip("pyarrow", reason="Ray Serve LLM needs it")
    (config,) = written(root, *VLLM_ON_RAY)
    deployments = [m for m in written(root, *KUBERNETES) if m["kind"] == "Deployment"]
    pods = [m["spec"]["template"]["spec"]["containers"][0] for m in deployments]
    given = {
        "application": config["applications"][0]["args"],
        "commands": [pod["command"][1:] + pod["args"] for pod in pods],
    }
    words = [str(VLLM), "-c", _READ, site.getsitepackages()[0]]
    done = subprocess.run(words, input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    on_ray, decoder, classifier = json.loads(done.stdout.splitlines()[-1])
    assert on_ray["model"] == str(root / BASE)
    assert decoder["model"] == classifier["model"] == f"/models/{BASE}"
    for told in (on_ray, decoder):
        assert told["served_model_name"] == [BASE]
        assert (told["enable_lora"], told["max_lora_rank"], told["max_loras"]) == (True, 16, 2)
        assert told["lora_target_modules"] == ["q_proj", "v_proj"]
    assert (classifier["runner"], classifier["convert"]) == ("pooling", "classify")
