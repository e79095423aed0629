"""The corpus: what is wrong with each folder, and the words of the error."""

from __future__ import annotations

import json

import torch

from .folders import (
    CONFIG,
    MODEL,
    QA,
    QB,
    WEIGHTS,
    Case,
    Evil,
    Q,
    base_config,
    base_tensor,
    bomb,
    both,
    configure,
    entry,
    grown,
    header,
    index,
    link,
    pair,
    pickled,
    pipe,
    raw,
    rename,
    run_tensor,
    secret_link,
    task_info,
    tensors,
    torch_file,
    write,
)

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HUGE = 1 << 40
A, B = entry([4, 32], 0, 512), entry([32, 4], 512, 1024)
DATA = bytes(1024)
NAN = float("nan")
NORM = "model.norm.weight"
SHARD = "model-00001-of-00001.safetensors"
PRUNE = "prune_state_dict.pt"

HEADERS = [
    ("empty file", write(WEIGHTS, b""), "beyond the end"),
    ("seven bytes", write(WEIGHTS, b"1234567"), "beyond the end"),
    ("header length of exabytes", write(WEIGHTS, b"\xff" * 8 + b"{}"), "beyond the end"),
    ("header length in the other byte order", header({QA: A, QB: B}, DATA, ">"), "beyond the end"),
    ("header is no JSON", header(b"{" * 64), "not valid JSON"),
    ("header is a list", header([1, 2]), "not an object"),
    ("header is not UTF-8", header(b'{"\xff\xfe": 1}'), "not valid JSON"),
    ("header nested a hundred thousand deep", header(DEEP), "not valid JSON"),
    ("a name twice", header(b'{"a": {}, "a": {}}'), "appears twice"),
    ("entry is a number", header({QA: 7}), "malformed"),
    ("negative dimension", pair(entry([-4, -32], 0, 512), B, DATA), "malformed"),
    ("fractional dimension", pair(entry([4.0, 32], 0, 512), B, DATA), "malformed"),
    ("dimension true", pair(entry([True, 128], 0, 512), B, DATA), "malformed"),
    ("dimensions beyond 64 bits", pair(entry([1 << 62, 1 << 62], 0, 512), B, DATA), "malformed"),
    ("dimension of 400 digits", header(raw({})[8:8] + b'{"a":{"dtype":"F32","shape":['
        + b"9" * 5000 + b'],"data_offsets":[0,4]}}', DATA), "not valid JSON"),
    ("terabytes claimed", pair(entry([HUGE], 0, 4 * HUGE), B, DATA), "malformed"),
    ("rank of a trillion in no bytes", both(
        pair(entry([HUGE, 0], 0, 0), entry([32, HUGE], 0, 0)), configure(r=HUGE)), "malformed"),
    ("offsets overlap", pair(A, entry([32, 4], 256, 768), DATA), "overlaps"),
    ("offsets leave a gap", pair(A, entry([32, 4], 516, 1028), DATA + b"1234"), "gap"),
    ("offsets beyond the end", pair(A, entry([32, 4], 512, 1024), DATA[:600]), "file size"),
    ("offsets before the data", pair(entry([4, 32], -512, 0), B, DATA), "malformed"),
    ("offsets the wrong way round", pair(entry([4, 32], 512, 0), B, DATA), "does not match"),
    ("offsets are text", pair(entry([4, 32], "0", "512"), B, DATA), "malformed"),
    ("three offsets", header({QA: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}),
        "malformed"),
    ("unknown dtype", pair(entry([4, 32], 0, 512, "F7"), B, DATA), "unknown dtype"),
    ("dtype is a list", pair(entry([4, 32], 0, 512, ["F32"]), B, DATA), "malformed"),
    ("bytes after the last tensor", pair(A, B, DATA + b"PK\x03\x04"), "file size"),
]  # fmt: skip

ADAPTER_FILES = [
    ("pickle with code, zipped", torch_file("adapter_model.bin", {QA: Evil()}, WEIGHTS),
        "more than tensors"),
    ("pickle with code, old format", torch_file("adapter_model.bin", {QA: Evil()}, WEIGHTS,
        _use_new_zipfile_serialization=False), "more than tensors"),
    ("pickle with code, bare", pickled("adapter_model.bin", WEIGHTS), 
        "more than tensors|cannot read"),
    ("a module pickled whole", torch_file("adapter_model.bin", torch.nn.Linear(2, 2), WEIGHTS),
        "more than tensors"),
    ("zip bomb", bomb, "cannot read|lora_B"),
    ("terabytes by a stride of zero", torch_file("adapter_model.bin",
        {QA: torch.zeros(1).expand(HUGE), QB: torch.zeros(1)}, WEIGHTS), "file's size"),
    ("terabytes on no device", torch_file("adapter_model.bin",
        {QA: torch.empty(HUGE, device="meta")}, WEIGHTS), "file's size"),
    ("sparse tensor", torch_file("adapter_model.bin",
        {QA: torch.eye(4).to_sparse(), QB: torch.eye(4)}, WEIGHTS), "file's size"),
    ("complex tensor", torch_file("adapter_model.bin",
        {QA: torch.zeros(4, 32, dtype=torch.complex64)}, WEIGHTS), "file's size"),
    ("names that are numbers", torch_file("adapter_model.bin", {1: torch.eye(4)}, WEIGHTS),
        "file's size"),
    ("a list of tensors", torch_file("adapter_model.bin", [torch.eye(4)], WEIGHTS), "state dict"),
    ("weights are a link to nowhere", link(WEIGHTS, "/nowhere"), "no weights"),
    ("weights are a link to themselves", link(WEIGHTS, WEIGHTS), "no weights|cannot be read"),
    ("weights are an endless device", link(WEIGHTS, "/dev/zero"), "no weights"),
    ("weights are a link to a text outside", secret_link(WEIGHTS), "beyond the end"),
    ("configuration is a link to a text outside", secret_link(CONFIG), "not valid JSON"),
    ("weights are a pipe", pipe(WEIGHTS), "no weights"),
    ("configuration is a pipe", pipe(CONFIG), "no run found"),
    ("configuration of a terabyte", grown(CONFIG, HUGE), "too large"),
]  # fmt: skip

CONFIGS = [
    ("configuration is a list", write(CONFIG, b"[]"), "not a JSON object"),
    ("configuration is not UTF-8", write(CONFIG, b'{"r": "\xff"}'), "not valid JSON"),
    ("configuration nested deep", write(CONFIG, DEEP), "not valid JSON"),
    ("a setting twice", write(CONFIG, b'{"peft_type": "LORA", "r": 4, "r": 8}'), "appears twice"),
    ("an unknown kind of adapter", configure(peft_type="../../evil"), "no run found"),
    ("negative rank", configure(r=-4, rank_pattern={}), "stored rank differs"),
    ("huge rank", configure(r=10**300, rank_pattern={}), "not a number"),
    ("rank true", configure(r=True, rank_pattern={}), "not a number"),
    ("rank is text", configure(r="4"), "not a number"),
    ("alpha infinite", configure(lora_alpha=float("inf")), "lora_alpha"),
    ("alpha is a list", configure(lora_alpha=[8]), "lora_alpha"),
    ("patterns are a list", configure(rank_pattern=["q_proj"]), "rank_pattern"),
    ("a pattern's rank is text", configure(rank_pattern={"q_proj": "2"}), "rank_pattern"),
    ("a pattern that is a bomb", configure(rank_pattern={r"(.|..|...)+[!?]": 4}), "takes longer"),
    ("a bomb behind a sound pattern", configure(alpha_pattern={"v_proj": 3, r"(.|..|...)+[!?]": 4}),
        "takes longer"),
    ("a pattern of nested repeats", configure(
        rank_pattern={"((a{1,99}){1,99}){1,99}{9999999999}": 4}),
        "not a regular expression"),
    ("a pattern without end", configure(rank_pattern={"q" * 200_000: 4}), "longer than"),
    ("target_parameters is a number", configure(target_parameters=7), "target_parameters"),
    ("layers replicated a million times", configure(layer_replication=[[0, 10**6]]), "not read"),
    ("tuner with a bomb as target", configure(peft_type="LOHA",
        target_modules=r"(.|..|...)+[!?]", base_model_name_or_path=None),
        "takes longer"),
    *((f"tuner with a bomb in {key}", configure(peft_type="LOHA", base_model_name_or_path=None,
        **{"rank_pattern": {}, key: said}), "takes longer")
        for key, said in (("rank_pattern", {r"(.|..|...)+[!?]": 4}),
            ("alpha_pattern", {r"(.|..|...)+[!?]": 4}),
            ("layers_pattern", [r"(.|..|...)+[!?]"]))),
    ("tuner with a pattern that is none", configure(peft_type="LOHA", rank_pattern={},
        base_model_name_or_path=None, alpha_pattern={"q_proj(": 4}), "not a regular expression"),
    ("tuner with a rank of a trillion", configure(peft_type="LOHA", r=HUGE, rank_dropout=0.0),
        "PEFT cannot|unknown|missing"),
]  # fmt: skip

ADAPTER_TENSORS = [
    ("A holds NaN", tensors(qa=lambda t: t * NAN), "NaN or infinity"),
    ("B holds infinity", tensors(qb=lambda t: t / 0), "NaN or infinity"),
    ("A of whole numbers", tensors(qa=lambda t: t.int()), "floating-point"),
    ("A of truth values", tensors(qa=lambda t: t.bool()), "floating-point"),
    ("float8 with NaN", tensors(qa=lambda t: (t * NAN).to(torch.float8_e5m2)), "NaN"),
    ("values beyond float32 in float64", tensors(qa=lambda t: t.double() * 1e300), "infinity"),
    ("a product beyond float32", tensors(qa=lambda t: t * 0 + 1e38, qb=lambda t: t * 0 + 1e38),
        "NaN, infinity|beyond"),
    ("B of another rank", tensors(qb=torch.ones(32, 5)), "different rank"),
    ("A in three dimensions", tensors(qa=torch.ones(2, 16, 2)), "different rank"),
    ("A is one number", tensors(qa=torch.tensor(1.0)), "different rank"),
    ("no rank at all", tensors(qa=torch.ones(0, 32), qb=torch.ones(32, 0)), "stored rank differs"),
    ("wider than the base", tensors(qa=torch.ones(2, 4096)), "does not fit"),
    ("full-width letters", rename("q_proj", "ｑ_proj"), "configuration's|no such module"),
    ("a zero-width joiner", rename(Q, Q.replace("self", "se\u200dlf")), "no such module"),
    ("right-to-left override", rename(Q, Q + "\u202e"), "configuration's|no such module"),
    ("Cyrillic look-alike", rename("v_proj", "v_рroj"), "no such module"),
    ("NUL in a name", rename("v_proj", "v_pr\0oj"), "no such module"),
    ("path in a name", rename("v_proj", "../../../etc/passwd"), "no such module"),
    ("a name of a megabyte", rename("v_proj", "v" * 1_000_000), "no such module"),
    ("layer of a trillion", rename("layers.0", f"layers.{HUGE}"), "no such module"),
    ("without B", tensors(qb=None), "incomplete"),
]  # fmt: skip

RUNS = [
    ("prune state with code", torch_file(PRUNE, {"finally_mask_dict": Evil()}, PRUNE),
        "more than tensors"),
    ("prune state is a list", torch_file(PRUNE, [1], PRUNE), "not a prune state"),
    ("prune state of numbers", torch_file(PRUNE, {"finally_mask_dict": {"a": 1}}, PRUNE),
        "not a prune state"),
    ("prune state is no file of torch", write(PRUNE, b"PK\x03\x04" + bytes(100)), "cannot read"),
    ("prune state is a pipe", pipe(PRUNE), "not a file"),
    ("checkpoint with code", pickled("pytorch_model.bin", MODEL), "more than tensors|cannot read"),
    ("task info is a list", task_info("[8]"), "not a JSON object"),
    ("task info nested deep", task_info(DEEP.decode()), "not valid JSON"),
    ("task info names alpha twice", task_info('{"lora_alpha": 8, "lora_alpha": 9}'),
        "appears twice"),
    ("alpha is code", task_info('{"lora_alpha": "__import__(\'os\')"}'), "not a number"),
    ("alpha of a million digits", task_info(json.dumps({"lora_alpha": "9" * 1_000_000})),
        "not a number"),
    ("start rank negative", task_info('{"lora_alpha": 8, "adaptive_lora_start_rank": -6}'),
        "start rank differs"),
    ("scaler NaN", run_tensor("lora_scaler", lambda t: t * NAN), "NaN or infinity"),
    ("scaler a matrix", run_tensor("lora_scaler", lambda t: t.view(2, 3)), "per component"),
    ("scaler of whole numbers", run_tensor("lora_scaler", lambda t: t.long()), "floating-point"),
    ("two wrappers", rename("model.model.layers.0", "module.model.model.layers.0", MODEL),
        "outside the training wrapper"),
    ("an update of nothing known", rename("model.model.layers.1", "model.evil.layers.1", MODEL),
        "no such module"),
]  # fmt: skip

BASES = [
    ("no configuration", lambda folder: (folder / "config.json").unlink(), "config.json"),
    ("base configuration is a list", write("config.json", b"[]"), "not a JSON object"),
    ("model type is a list", base_config(model_type=["llama"]), "model_type"),
    ("weights are a pipe", pipe(MODEL), "not a file"),
    ("shards is a list", index([1]), "weight_map"),
    ("shards named by numbers", index({NORM: 7}), "missing"),
    ("shard above the folder", index({NORM: "../x.safetensors"}), "outside"),
    ("shard by absolute path", index({NORM: "/etc/passwd"}), "outside"),
    ("shard in a folder below", index({NORM: "below/x.safetensors"}), "outside"),
    ("shard is the folder itself", index({NORM: "."}), "outside|cannot be read"),
    ("shard is the folder above", index({NORM: ".."}), "outside|cannot be read"),
    ("shard without the tensor", index({"elsewhere": SHARD}), "does not hold"),
    ("the same tensor in two shards", both(index({NORM: SHARD, "a": "b.safetensors"}),
        write("b.safetensors", raw({NORM: entry([1], 0, 4)}, b"1234"))), "two|does not hold"),
    ("tokenizer is a link to a file outside", secret_link("tokenizer.json"), "outside|link"),
    ("base weights with code", pickled("pytorch_model.bin", MODEL),
        "more than tensors|cannot read"),
    ("an adapted weight of infinity", base_tensor("model.layers.0.self_attn.q_proj.weight",
        lambda t: t / 0), "q_proj"),
    ("an adapted weight of whole numbers", base_tensor("model.layers.0.self_attn.q_proj.weight",
        lambda t: t.int()), "q_proj"),
    ("an adapted weight of eight bits", base_tensor("model.layers.0.self_attn.q_proj.weight",
        lambda t: t.to(torch.float8_e4m3fn)), "of eight bits"),
    ("an adapted weight of another shape", base_tensor("model.layers.0.self_attn.q_proj.weight",
        torch.ones(4, 4)), "does not fit"),
]  # fmt: skip

CASES = [
    Case(name, kind, spoil, says)
    for kind, cases in (
        ("adapter", [*HEADERS, *ADAPTER_FILES, *CONFIGS, *ADAPTER_TENSORS]),
        ("run", RUNS),
        ("base", BASES),
    )
    for name, spoil, says in cases
]
