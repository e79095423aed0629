"""The engine that ONNX Runtime serves with: decoders, encoders and encoder-decoders."""
