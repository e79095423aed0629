"""The embedded server: vLLM's HTTP API over ONNX Runtime, in one process, without torch."""
