"""Which task a transformers class is for, and what PEFT calls it: one table for everybody.

The endings of class names decide, with what the configuration says where an ending is used for two
tasks; names without such an ending are looked up in transformers' own lists of classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..files.json_files import read_objects

if TYPE_CHECKING:  # a server has no torch
    from pathlib import Path

    from ..files.tensors import LazyTensors

# Task → PEFT's task type, and the endings of the classes for it. The first ending is the usual one.
TASKS = {
    "causal-lm": ("CAUSAL_LM", ("ForCausalLM", "LMHeadModel")),
    "sequence-classification": ("SEQ_CLS", ("ForSequenceClassification",)),
    "question-answering": ("QUESTION_ANS", ("ForQuestionAnswering",)),
    "seq2seq-lm": (
        "SEQ_2_SEQ_LM",
        ("ForConditionalGeneration", "MarianMTModel", "EncoderDecoderModel"),
    ),
    "token-classification": ("TOKEN_CLS", ("ForTokenClassification",)),
    "feature-extraction": ("FEATURE_EXTRACTION", ("Model",)),
}
POOLING = ("feature-extraction", "sequence-classification", "token-classification")
# Task → the heads that PEFT trains and saves whole without being told, of whatever a model has.
HEADS = {
    "sequence-classification": ("classifier", "score"),
    "token-classification": ("classifier", "score"),
    "question-answering": ("qa_outputs",),
}
# The weights that have a row for each label, as transformers' classes for texts call them.
_HEAD_WEIGHTS = (
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "classifier.weight",
    "score.weight",
    "score.out_proj.weight",
    "classifier.linear_out.weight",
    "logits_proj.weight",
    "sequence_summary.summary.weight",
    "perceiver.decoder.decoder.final_layer.weight",
)
_ENDINGS = {ending: task for task, (_, endings) in TASKS.items() for ending in endings}
# Task → the list of classes that transformers' `AutoModelFor…` chooses from.
_AUTO = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "question-answering": "QUESTION_ANSWERING",
    "seq2seq-lm": "SEQ_TO_SEQ_CAUSAL_LM",
    "feature-extraction": "MODEL",
}
# Such lists, for names that end in none of these, and for what "Model" hides.
_LISTS = {
    "causal-lm": (_AUTO["causal-lm"], "IMAGE_TEXT_TO_TEXT"),
    "question-answering": (_AUTO["question-answering"],),
    "seq2seq-lm": (_AUTO["seq2seq-lm"], "SPEECH_SEQ_2_SEQ"),
}


def task_of(config: Mapping[str, object]) -> str | None:
    """The task that the class in a `config.json` is for; None for one that is no task's here."""
    name = architecture_of(config)
    ending = next((e for e in sorted(_ENDINGS, key=len, reverse=True) if name.endswith(e)), None)
    if ending == "ForConditionalGeneration" and not _encodes(config):
        return "causal-lm"  # a decoder that sees or hears; so PEFT calls all that write text
    if ending is None or name.endswith("HeadsModel"):
        return _listed(name)
    return _ENDINGS[ending]


def task_in(folder: Path, config: Mapping[str, object]) -> str | None:
    """The task of the model in `folder`: that of its class, but embeddings where pooling of
    sentence-transformers lies beside a class that writes or fills in words, as with Qwen3-Embedding
    and all-mpnet-base-v2. So sentence-transformers and vLLM take it."""
    own, listed = task_of(config), folder / "modules.json"
    if own not in ("causal-lm", None) or not listed.is_file():
        return own
    kinds = [str(module.get("type")) for module in read_objects(listed) or []]
    pools = any(kind.rpartition(".")[2] == "Pooling" for kind in kinds)
    return "feature-extraction" if pools else own


def labels_of(tensors: LazyTensors) -> int | None:
    """How many labels the head among the `tensors` of a classifier has; None where it is not
    there. Any other layer that was trained whole says nothing of labels."""
    heads = (tensors[name].shape for name in _HEAD_WEIGHTS if name in tensors)
    return next((shape[0] for shape in heads if shape), None)


def architecture_of(config: Mapping[str, object]) -> str:
    """The class in a `config.json`; empty where it names none."""
    known = config.get("architectures")
    return str(known[0]) if isinstance(known, list) and known else ""


def auto_class(config: Mapping[str, object], task: str | None) -> str | None:
    """The class that transformers' `AutoModelFor…` makes of a base for `task`."""
    found = _classes(_AUTO[task or "causal-lm"]).get(config.get("model_type"))
    return found if isinstance(found, str) else None


def usual_ending(task: str) -> str:
    """What the classes for `task` end in, `ForCausalLM` for example."""
    return TASKS[task][1][0]


def peft_type(task: str) -> str:
    """PEFT's `task_type` for `task`."""
    return TASKS[task][0]


def task_of_peft(task_type: object) -> str | None:
    """The task of PEFT's `task_type`; None for another."""
    return next((task for task, (peft, _) in TASKS.items() if peft == task_type), None)


def _encodes(config: Mapping[str, object]) -> bool:
    """Whether an encoder reads the text. Configurations that do not say so and are made of
    several are of decoders with an encoder of images or sound."""
    said = config.get("is_encoder_decoder")
    parts = any(key.endswith("_config") and isinstance(v, dict) for key, v in config.items())
    return said if isinstance(said, bool) else not parts


def _listed(name: str) -> str | None:
    found = (
        task
        for task, lists in _LISTS.items()
        for kind in lists
        if name and name in _classes(kind).values()
    )
    return next(found, None)


def _classes(kind: str) -> Mapping[object, object]:
    """Model type → class, in one of transformers' lists; nothing where there is no transformers."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return {}
    name = "MODEL_MAPPING_NAMES" if kind == "MODEL" else f"MODEL_FOR_{kind}_MAPPING_NAMES"
    found: Mapping[object, object] = getattr(modeling_auto, name, {})
    return found
