"""How a run fits a base: what it changed of it, which class it is for, which way round it lies."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import BaseError, TargetError
from ..files.handles import reading
from ..files.hashes import Memory
from ..files.tensors import LazyTensor, LazyTensors, is_copy_of, same_values
from ..run import Run
from .architecture import class_for
from .base import HEAD, BaseModel
from .tasks import architecture_of, task_of, usual_ending
from .tying import new_embedding, tensor_names


def stored_name(module: str, base: BaseModel) -> str:
    """The tensor of a module on disk; a head that is not there gets its name in memory."""
    return base.find(f"{module}.weight") or base.find(module) or f"{module}.weight"


def is_transposed(
    run: Run, base: BaseModel, replaced: LazyTensors, module: str, shape: tuple[int, int]
) -> bool:
    """Whether the weight of `module` is stored as [in, out], see `BaseModel.is_transposed`.

    An embedding may be resized in `replaced` and adapted, and a tied head with it.
    """
    whole = replaced.get(f"{module}.weight")
    if whole is None and f"{module}.weight" == HEAD and base.find(HEAD) is None:
        whole = new_embedding(base, replaced)
    if whole is not None and whole.shape == shape:
        return False
    return base.is_transposed(module, shape, module in run.embeddings)


def check_frozen(run: Run, base: BaseModel) -> None:
    """Raise `BaseError` when the frozen weights in a checkpoint are not the base's, at the coarser
    of both dtypes. That they are is remembered."""
    frozen = {
        name: (tensor, own)
        for name, tensor in (run.embedded_base or {}).items()
        if name not in run.replaced and (own := base.find(name)) is not None
    }
    if not frozen:
        return
    files = {path for t, own in frozen.values() for path in (t.path, base.tensors[own].path)}
    pairs = sorted((name, own) for name, (_, own) in frozen.items())
    with reading(run.path, BaseError):
        memory = Memory(f"frozen weights are the base's: {pairs}", files)
    if memory.answer is not None:
        return
    for tensor, own in frozen.values():
        if base.tensors[own].shape != tensor.shape:
            raise BaseError(
                "a base tensor has another shape than in the checkpoint",
                file=base.tensors[own].path,
                tensor=own,
                found=list(base.tensors[own].shape),
                expected=list(tensor.shape),
                remedy="pass the base that this run was trained on with `base`",
            )
        if not same_values(tensor, base.tensors[own]):
            raise BaseError(
                "this is not the base the run was trained on: frozen weights differ",
                file=base.tensors[own].path,
                tensor=own,
                expected=f"the values in {tensor.path}",
                remedy="pass the base that this run was trained on with `base`",
            )
    memory.keep("yes")


def changed(
    run: Run, base: BaseModel | None, find: Callable[[str], str | None] | None = None
) -> dict[str, LazyTensor]:
    """The replaced tensors that differ from the base; a tied head equal to its embedding does not.

    `find` gives a tensor's name in the base where it is not `BaseModel.find`. Without a base all
    replaced tensors count as changed; `TargetError` where these are all the checkpoint holds
    outside of adapted modules, so that only the base can tell which were trained.
    """
    if base is None:
        adapted = {f"{module}.{kind}" for module in run.updates for kind in ("weight", "bias")}
        if run.embedded_base is not None and not (
            run.embedded_base.keys() - run.replaced.keys() - adapted
        ):
            raise TargetError(
                "the checkpoint does not tell which of its tensors were trained",
                file=run.path,
                remedy="pass the base model with `base`",
            )
        return dict(run.replaced)
    find = find or base.find
    result = {}
    for name, tensor in run.replaced.items():
        own = find(name)
        if own is None and name == HEAD:
            own = base.embedding
        if own is not None and len(base.tensors[own].shape) != len(tensor.shape):
            raise BaseError(
                "a tensor of the run has another number of axes than the base's",
                file=tensor.path,
                tensor=name,
                found=list(tensor.shape),
                expected=list(base.tensors[own].shape),
                remedy="is this the base the run was trained on? pass it with `base`",
            )
        if own is None or not is_copy_of(tensor, base.tensors[own]):
            result[name] = tensor
    return result


def target_architecture(run: Run, base: BaseModel) -> tuple[str | None, list[str] | None]:
    """The class the run is for, and its tensor names where they are not the base's own."""
    current = architecture_of(base.config) or None
    if run.task is None or run.task == task_of(base.config):
        return current, None
    architecture = class_for(base.config, usual_ending(run.task))
    if architecture == current:
        return current, None
    if run.embedded_base is not None:
        return architecture, list(run.embedded_base)
    return architecture, tensor_names(architecture, base.config, run.num_labels)
