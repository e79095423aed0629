"""Run folder in, deployment artifact out: a library without command line or server."""

import os

# What libraries read before they tell others of their use; ONNX Runtime reads it when it is loaded.
SILENCE = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

for name, value in SILENCE.items():
    os.environ.setdefault(name, value)
del name, value
