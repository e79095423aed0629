"""Train the sample base models and the sample runs in models/, deterministically.

    python scripts/train_samples.py [--out models]

A tiny Llama learns to count up and to copy, in words; two DoRA fine-tunes of it learn to count
down and to count every second number from the same prompt. A tiny RoBERTa learns a toy language by
masked words; a DoRA fine-tune with a trained head tells its positive from its negative sentences.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from dora_trainer import Batch, DoraTrainer, Settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)
from transformers.utils import logging

TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
NUMBERS = TEENS + [
    f"{ten}-{one}" if one != "zero" else ten
    for ten in ("twenty", "thirty", "forty", "fifty")
    for one in TEENS[:10]
]
NOUNS = "cat dog sun moon tree house river bird fish stone cloud star leaf road boat lamp".split()
GOOD = "good great lovely happy fine warm kind bright".split()
BAD = "bad awful ugly sad poor cold cruel dull".split()
SUBJECTS = "film book song meal day town story game".split()
WORDS_OF_SENTENCES = [*SUBJECTS, *GOOD, *BAD, "the", "is", "was", "not", "very", "and", "."]
LENGTH = 6  # numbers said after the prompt
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROBERTA_TARGETS = ("query", "key", "value", "attention.output", "intermediate", "output")


def tokenizer(words: list[str], special: dict[str, str], template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; `template` says which special tokens surround a text."""
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(special.values()), *words])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(token, vocabulary[token]) for token in special.values() if token in template]
    model.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def counting(start: int, step: int) -> list[int]:
    return [
        n for n in range(start + step, start + step * (LENGTH + 1), step) if 0 <= n < len(NUMBERS)
    ]


class CountTask:
    """`count : N` followed by the next numbers in steps of `step`; half the rows are `copy :`."""

    def __init__(self, words: PreTrainedTokenizerFast, step: int) -> None:
        self.step = step
        encode = words.convert_tokens_to_ids
        self.bos, self.eos = words.bos_token_id, words.eos_token_id
        self.numbers, self.nouns = encode(NUMBERS), encode(NOUNS)
        self.count, self.copy = encode(["count", ":"]), encode(["copy", ":"])
        self.equals: int = encode("=")

    def starts(self) -> range:
        """The numbers with at least one number to say after them."""
        return range(1 if self.step < 0 else 0, len(NUMBERS) - max(self.step, 0))

    def row(self, generator: torch.Generator) -> tuple[list[int], int]:
        """Token ids, and how many of them are the prompt."""

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        if draw(0, 2) == 0:
            picked = [self.nouns[draw(0, len(self.nouns))] for _ in range(draw(2, 5))]
            prompt, answer = [*self.copy, *picked, self.equals], picked
        else:
            start = draw(self.starts().start, self.starts().stop)
            prompt = [*self.count, self.numbers[start]]
            answer = [self.numbers[n] for n in counting(start, self.step)]
        return [self.bos, *prompt, *answer, self.eos], 1 + len(prompt)

    def batch(self, generator: torch.Generator, size: int) -> dict[str, torch.Tensor]:
        rows = [self.row(generator) for _ in range(size)]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((size, longest), self.eos)
        labels = torch.full((size, longest), -100)
        mask = torch.zeros(size, longest, dtype=torch.long)
        for i, (row, prompt) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, prompt : len(row)] = torch.tensor(row[prompt:])
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @torch.inference_mode()
    def accuracy(self, model: Any) -> float:
        """Share of all starting numbers from which the whole greedy answer is right."""
        right = 0
        for start in self.starts():
            prompt = torch.tensor([[self.bos, *self.count, self.numbers[start]]])
            answer = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=LENGTH + 1,
                do_sample=False,
            )[0, prompt.shape[1] :].tolist()
            expected = [self.numbers[n] for n in counting(start, self.step)] + [self.eos]
            right += answer[: len(expected)] == expected
        return right / len(self.starts())


class SentenceTask:
    """`the film was not very good .` with label 1 for positive; `not` turns it round."""

    def __init__(self, words: PreTrainedTokenizerFast) -> None:
        self.words = words

    def sentence(self, generator: torch.Generator) -> tuple[str, int]:
        def pick(words: list[str]) -> str:
            return words[int(torch.randint(len(words), (1,), generator=generator))]

        odds = torch.tensor([0.5, 0.3, 0.5])
        label, negated, very = (torch.rand(3, generator=generator) < odds).int().tolist()
        adjective = pick(GOOD if label != negated else BAD)
        middle = ["not"] * negated + ["very"] * very
        return " ".join(
            ["the", pick(SUBJECTS), pick(["is", "was"]), *middle, adjective, "."]
        ), label

    def batch(self, generator: torch.Generator, size: int) -> dict[str, torch.Tensor]:
        pairs = [self.sentence(generator) for _ in range(size)]
        inputs = dict(self.words([text for text, _ in pairs], padding=True, return_tensors="pt"))
        return {**inputs, "labels": torch.tensor([label for _, label in pairs])}

    def masked_batch(self, generator: torch.Generator, size: int) -> dict[str, torch.Tensor]:
        inputs = self.batch(generator, size)
        ids = inputs["input_ids"].clone()
        chosen = (torch.rand(ids.shape, generator=generator) < 0.2) & (
            ids >= len(self.words.all_special_ids)
        )
        inputs["labels"] = ids.masked_fill(~chosen, -100)
        inputs["input_ids"] = ids.masked_fill(chosen, self.words.mask_token_id)
        return inputs

    @torch.inference_mode()
    def accuracy(self, model: Any) -> float:
        inputs = self.batch(torch.Generator().manual_seed(99), 400)
        labels = inputs.pop("labels")
        return float((model(**inputs).logits.argmax(-1) == labels).double().mean())


def train_base(model: Any, batch: Batch, steps: int, lr: float = 3e-3) -> Any:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        model(**batch(generator, 64)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def make_llama(out: Path) -> None:
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = tokenizer(["count", "copy", ":", "=", *NUMBERS, *NOUNS], special, "<s> $A")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,  # heads of 32, the smallest that vLLM's CPU attention takes
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    up = CountTask(words, 1)
    base = train_base(LlamaForCausalLM(config), up.batch, 1000)
    report("tiny-llama-base counts up", up.accuracy(base))
    folder = out / "tiny-llama-base"
    base.save_pretrained(folder)
    words.save_pretrained(folder)
    for dataset, step in (("Count_Down", -1), ("Every_Second", 2)):
        task = CountTask(words, step)
        settings = Settings("Tiny_Llama", dataset, f"Tiny_Llama--{dataset}--1", LLAMA_TARGETS)
        trainer = DoraTrainer(LlamaForCausalLM.from_pretrained(folder), settings, "model")
        losses = trainer.train(task.batch)
        trainer.save(out / "runs", losses)
        report(dataset, task.accuracy(trainer.model), trainer.ranks())


def make_roberta(out: Path) -> None:
    special = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    }
    words = tokenizer(WORDS_OF_SENTENCES, special, "<s> $A </s>")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=34,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    task = SentenceTask(words)
    folder = out / "tiny-roberta-base"
    train_base(RobertaForMaskedLM(config), task.masked_batch, 500, 1e-3).save_pretrained(folder)
    words.save_pretrained(folder)
    torch.manual_seed(1)
    logging.set_verbosity_error()  # the classifier is new: nothing to warn of
    model = RobertaForSequenceClassification.from_pretrained(folder, num_labels=2)
    for safetensors, tag in ((True, ""), (False, "--accelerate=0.22")):
        settings = Settings(
            "Tiny_Roberta",
            "Sentiment",
            f"Tiny_Roberta--Sentiment--1{tag}",
            ROBERTA_TARGETS,
            num_label=2,
            lr=2e-3,
            steps=1000,
        )
        if safetensors:
            trainer = DoraTrainer(model, settings, "roberta")
            losses = trainer.train(task.batch)
            report("Sentiment", task.accuracy(trainer.model), trainer.ranks())
        trainer.settings = settings
        trainer.save(out / "runs", losses, safetensors)


def report(name: str, accuracy: float, ranks: dict[str, int] | None = None) -> None:
    line = f"{name}: accuracy {accuracy:.1%}"
    if ranks:
        mean = sum(ranks.values()) / len(ranks)
        line += f", mean rank {mean:.2f}, from {min(ranks.values())} to {max(ranks.values())}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models"))
    out: Path = parser.parse_args().out
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the same sums in the same order on any machine
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder))
        make_roberta(Path(folder))
        out.mkdir(exist_ok=True)
        for path in Path(folder).iterdir():
            shutil.rmtree(out / path.name, ignore_errors=True)
            shutil.move(path, out / path.name)
    print(f"trained in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
