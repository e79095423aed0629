"""A compact LoRA adapter of different rank per module, as a PEFT folder."""
