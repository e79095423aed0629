"""A Llama of half a billion random parameters, for benches of a size whose weights cannot be had.

    python scripts/random_base.py TOKENIZER OUT

TOKENIZER: a folder whose tokenizer and number of words it gets, as SmolLM2's.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

PARTS = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "*.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    known = AutoConfig.from_pretrained(options.tokenizer)
    config = LlamaConfig(
        vocab_size=known.vocab_size,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        hidden_size=1280,
        intermediate_size=4480,
        num_hidden_layers=20,
        num_attention_heads=20,
        num_key_value_heads=5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    print(f"{model.num_parameters() / 1e9:.2f} billion parameters")
    model.save_pretrained(options.out)
    for pattern in PARTS:
        for file in options.tokenizer.glob(pattern):
            shutil.copy(file, options.out)


if __name__ == "__main__":
    main()
