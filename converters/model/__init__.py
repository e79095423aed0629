"""The base model: which tensors it has, what they are called, and where a run's modules lie."""
