"""The files of PEFT's folder."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
