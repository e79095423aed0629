"""Many adapters on one engine: what vLLM must reserve for them, and how little will do.

vLLM gives every slot, for every module it adapts, room for `max_lora_rank` components, whatever
the adapter in it has (vllm-project/vllm `vllm/lora/layers/`, `vllm/config/lora.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from converters.errors import DoraExportError
from converters.fit import fit_run
from converters.model.base import BaseModel
from converters.model.match import stored_name
from converters.targets.engines import PROFILES
from converters.targets.lora_folder.adapter import plan_adapter

from ..folder.inventory import Found, Member

# The parts of one layer of vLLM, each by the name that adapters have for it.
_LAYERS = (
    {"q_proj", "k_proj", "v_proj", "qkv_proj"},
    {"gate_proj", "up_proj", "gate_up_proj"},
)
STEPS = PROFILES["vllm"].slots
CLASSIFIES = "sequence-classification"
POOLED = {CLASSIFIES: "classify", "feature-extraction": "embed"}  # tasks → what vLLM makes for them
_SLOTS = 16  # enough different adapters in one batch for most; each slot costs memory and time
_SHARE = 0.25  # of what the weights leave of the memory; the rest is for the KV cache
_IN_USE = 0.9  # vLLM's default --gpu-memory-utilization


@dataclass(frozen=True)
class Matrix:
    """A matrix `[out, in]` of the base, or `count` of them in one tensor (experts)."""

    out: int
    inn: int
    count: int = 1

    def nbytes(self, rank: int, itemsize: int) -> int:
        """Room for A and B of `rank`."""
        return self.count * rank * (self.out + self.inn) * itemsize


@dataclass(frozen=True)
class Forced:
    """An adapter that needs a higher step than the rest, and the relative error of its update when
    it is fitted to the step below."""

    name: str
    rank: int
    step: int
    error: float


@dataclass(frozen=True)
class Pool:
    """The members of one base that one server can serve together; or a base alone.

    `name`: what clients call the base. `ranks`: per member, module → rank, pruned modules left
    out. `start_rank`: the largest rank that training began with. `memory`: bytes of the device.
    `any_base`: the user gave the base, so runs that name another one are taken too. `labels`: the
    most labels of a classification head.
    """

    name: str
    base: BaseModel
    task: str | None
    ranks: Mapping[str, Mapping[str, int]]
    start_rank: int = 1
    memory: int | None = None
    any_base: bool = False
    labels: int | None = None
    forced: Sequence[Forced] = ()

    @cached_property
    def base_bytes(self) -> int:
        return self.base.nbytes

    @cached_property
    def itemsize(self) -> int:
        """Bytes per element of the base, which the slots take over."""
        return self.base.dtype().itemsize

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Module → every matrix of the base that an adapter could be on."""
        found = {}
        for name, tensor in self.base.tensors.items():
            module = name.removesuffix(".weight")
            if len(tensor.shape) == 2 and name != module:
                found[module] = Matrix(*tensor.shape)
            elif len(tensor.shape) == 3:
                count, out, inn = tensor.shape
                found[module] = Matrix(out, inn, count)
        return found

    @cached_property
    def max_lora_rank(self) -> int:
        """The smallest `--max-lora-rank` that holds every member."""
        return step_for(max(self.largest.values(), default=1))

    @cached_property
    def largest(self) -> dict[str, int]:
        """Per member, its largest rank."""
        return {name: max(ranks.values(), default=0) for name, ranks in self.ranks.items()}

    @cached_property
    def target_modules(self) -> list[str]:
        """The kinds of module (last names) that some member still adapts."""
        touched = {module.rsplit(".", 1)[-1] for ranks in self.ranks.values() for module in ranks}
        return sorted(touched)

    def slot_bytes(self, rank: int, kinds: Iterable[str] | None = None) -> int:
        """One slot of `rank` on the modules of `kinds`; None: on every matrix of the base."""
        wanted = None if kinds is None else with_whole_layers(kinds)
        return sum(
            matrix.nbytes(rank, self.itemsize)
            for module, matrix in self.matrices.items()
            if wanted is None or module.rsplit(".", 1)[-1] in wanted
        )

    @cached_property
    def slot(self) -> int:
        """Bytes of one slot as proposed."""
        return self.slot_bytes(self.max_lora_rank, self.target_modules)

    @cached_property
    def naive_slot(self) -> int:
        """Bytes of one slot for adapters of uniform start rank on every matrix."""
        return self.slot_bytes(step_for(self.start_rank))

    @cached_property
    def used(self) -> dict[str, int]:
        """Per member, the bytes of a slot that hold its components."""
        return {
            name: sum(
                self.matrices[module].nbytes(rank, self.itemsize) for module, rank in ranks.items()
            )
            for name, ranks in self.ranks.items()
        }

    @property
    def padding(self) -> float:
        """The share of all members' slots that holds nothing."""
        room = self.slot * len(self.ranks)
        return 1 - sum(self.used.values()) / room if room else 0.0

    @cached_property
    def max_loras(self) -> int:
        """How many different adapters a batch may hold: all of them, if memory allows."""
        most = min(len(self.ranks), _SLOTS)
        if self.memory is not None and self.slot:
            free = self.memory * _IN_USE - self.base_bytes
            most = min(most, int(free * _SHARE // self.slot))
        return max(1, most)

    @property
    def max_cpu_loras(self) -> int:
        """All of them stay in the host's memory, which holds no padding."""
        return max(len(self.ranks), self.max_loras)

    @property
    def fits(self) -> bool:
        """Whether weights and slots fit into the memory given."""
        needed = self.base_bytes + self.slot * self.max_loras
        return self.memory is None or needed <= self.memory * _IN_USE

    @property
    def advice(self) -> str:
        """Whether to merge or to serve adapters, and why."""
        if len(self.ranks) == 1:
            (name,) = self.ranks
            return f"merge {name}: alone on its base, it pays for slots nobody shares"
        return f"serve as adapters: merged they would be {len(self.ranks)} whole models"

    @cached_property
    def split(self) -> dict[int, list[str]] | None:
        """Members by step, where a server for each step takes less memory than one for all."""
        steps: dict[int, list[str]] = {}
        for name, rank in self.largest.items():
            steps.setdefault(step_for(max(rank, 1)), []).append(name)
        together = self.base_bytes + self.slot * self.max_loras
        apart = sum(
            self.base_bytes
            + self.slot_bytes(step, self.target_modules) * min(len(names), self.max_loras)
            for step, names in steps.items()
        )
        return dict(sorted(steps.items())) if apart < together else None


@dataclass(frozen=True)
class Fleet:
    """All pools, and what cannot be served with the reason."""

    pools: Sequence[Pool]
    problems: Mapping[str, str] = field(default_factory=dict)


def step_for(rank: int) -> int:
    """The smallest value of `--max-lora-rank` that holds `rank`; the largest when none does."""
    return next((step for step in STEPS if step >= rank), STEPS[-1])


def with_whole_layers(kinds: Iterable[str]) -> set[str]:
    """`kinds` of modules and what vLLM computes in one layer with them, which gets slots too."""
    wanted = set(kinds)
    return wanted.union(*(layer for layer in _LAYERS if layer & wanted))


def plan_fleet(found: Found, memory: int | None = None) -> Fleet:
    """Pool the members of `found` by base and task; where there is none, each base is served alone.
    `memory`: bytes of the device.

    A base goes by its name, in the pools of a second task by `name-task`.
    """
    problems = dict(found.problems)
    groups: dict[tuple[str, str | None], list[Member]] = {}
    for member in found.members.values():
        task = member.run.task or member.base.task
        groups.setdefault((found.name_of(member.base), task), []).append(member)
    pools: list[Pool] = []
    for (base, task), members in sorted(groups.items(), key=lambda g: g[0][1] in POOLED):
        ranks = {}
        for member in members:
            try:
                ranks[member.name] = ranks_of(member)
            except DoraExportError as error:
                problems[member.name] = str(error)
        if ranks:
            second = any(pool.base.path == members[0].base.path for pool in pools)
            pool = Pool(
                f"{base}-{task or 'other'}" if second else base,
                members[0].base,
                task,
                ranks,
                memory=memory,
                any_base=found.given is not None,
            )
            pools.append(_described(pool, [found.members[name] for name in ranks]))
    if not pools:
        bases = found.bases if found.given is None else {found.given: found.bases[found.given]}
        pools = [Pool(n, b, b.task, {}, memory=memory) for n, b in bases.items()]
    served = {pool.base.path for pool in pools}
    reason = "no adapter of this base is served: `base` chooses it"
    if found.given is not None:
        reason = f"{found.given} was chosen with `base`"
    for name, other in found.bases.items():
        if other.path not in served:
            problems.setdefault(name, reason)
    for name in found.onnx:
        problems.setdefault(name, "vLLM reads no ONNX: `engine` onnxruntime serves it")
    return Fleet(pools, problems)


def ranks_of(member: Member) -> dict[str, int]:
    """Module, as the base calls it, → rank of what is left of it; pruned modules are left out.

    Raises `TargetError` when vLLM cannot serve the run as an adapter.
    """
    plan = plan_adapter(member.run.strip(), member.base, PROFILES["vllm"], torch.float32)
    return {
        stored_name(module, member.base).removesuffix(".weight"): rank
        for module, (_, rank) in plan.ranks.items()
        if rank
    }


def _described(pool: Pool, members: Sequence[Member]) -> Pool:
    """The pool with what its members tell."""
    start = [max(m.run.start_rank.values()) for m in members if m.run.start_rank]
    return replace(
        pool,
        start_rank=max([*start, *pool.largest.values(), 1]),
        labels=max((m.run.num_labels for m in members if m.run.num_labels), default=None),
        forced=_forced(members, pool.largest),
    )


def _forced(members: Sequence[Member], largest: Mapping[str, int]) -> list[Forced]:
    """Members of the highest step, when those below are more than they are."""
    steps = {name: step_for(max(rank, 1)) for name, rank in largest.items()}
    top = max(steps.values())
    at_top = Counter(steps.values())[top]
    if top == STEPS[0] or not 0 < at_top <= len(steps) / 2:
        return []
    below = STEPS[STEPS.index(top) - 1]
    forced = []
    for member in members:
        if steps[member.name] == top:
            _, report = fit_run(member.run.strip(), member.base, max_rank=below)
            forced.append(Forced(member.name, largest[member.name], below, report.error))
    return forced
