"""How a run fits a base: what it changed of it, which class it is for, which way round it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from ..errors import BaseError, TargetError
from ..files.handles import reading
from ..files.hashes import Memory
from ..files.tensors import LazyTensor, LazyTensors, is_copy_of, same_values
from ..run import Run
from ..updates.update import convolution_matrix
from .architecture import class_for, is_known
from .base import HEAD, BaseModel
from .layout import Layout
from .tasks import architecture_of, auto_class, task_of, usual_ending
from .tying import new_embedding, tensor_names


def stored_name(module: str, base: BaseModel) -> str:
    """The tensor of a module on disk; a head that is not there gets its name in memory."""
    return base.find(f"{module}.weight") or base.find(module) or f"{module}.weight"


def is_transposed(
    run: Run, base: BaseModel, replaced: LazyTensors, module: str, shape: tuple[int, int]
) -> bool:
    """Whether the weight of `module` is stored as [in, out], see `BaseModel.is_transposed`.

    An embedding may be resized in `replaced` and adapted, and a tied head with it. Raises
    `BaseError` where neither that nor the base's has this shape.
    """
    whole = replaced.get(f"{module}.weight")
    if whole is None and f"{module}.weight" == HEAD and base.find(HEAD) is None:
        whole = new_embedding(base, replaced)
    if whole is not None and whole.shape == shape:
        return False
    transposed = base.is_transposed(module, shape, module in run.embeddings)
    if whole is not None and (own := base.weight(module)) and own.shape != whole.shape:
        raise BaseError(
            "the run's update does not fit the weight that the run holds",
            file=whole.path,
            tensor=whole.name,
            found=list(whole.shape),
            expected=list(shape),
        )
    return transposed


def weight_in_memory(run: Run, base: BaseModel, module: str) -> torch.Tensor | None:
    """The float32 weight `[out, in]` of a module that the base has under another name than the
    class the run is for, or as parts of other tensors; None where it is no tensor of its own."""
    layout = classes(run.task, run.num_labels, base).whole
    return layout.weight(module, run.shapes[module])


def kernels_of(run: Run, base: BaseModel | None) -> dict[str, tuple[int, ...]]:
    """`[in, *kernel]` of the modules that are convolutions, by the run and by the base."""
    if base is None:
        return dict(run.kernels)
    weights = {module: base.weight(module) for module in run.updates}
    shapes = {module: tensor.shape for module, tensor in weights.items() if tensor is not None}
    found = {
        module: shape[1:]
        for module, shape in shapes.items()
        if len(shape) > 2 and convolution_matrix(shape) == run.shapes[module]
    }
    return found | {m: kernel for m, kernel in run.kernels.items() if m not in shapes}


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

    `find` gives a tensor's name in the base; by default the class that the run is for does. Without
    a base all replaced tensors count as changed; `TargetError` where these are all the checkpoint
    holds outside of adapted modules, so that only the base can tell which were trained.
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
    known = None if find else _classes_of(run, base)
    find = find or (base.find if known is None else known.whole.find)
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
    architecture = _class_for(run.task, base)
    if architecture == current or architecture is None:
        return current, None
    if run.embedded_base is not None:
        return architecture, list(run.embedded_base)
    return architecture, tensor_names(architecture, base.config, run.num_labels)


def _class_for(task: str | None, base: BaseModel) -> str | None:
    own, task = architecture_of(base.config), task or base.task
    if task is None or task == task_of(base.config):
        return own or None
    found = auto_class(base.config, task) if is_known(own, base.config) else None
    return found or class_for(base.config, usual_ending(task))


def lies_plainly(run: Run, base: BaseModel) -> bool:
    """Whether every module and tensor of the run is on disk under the very name it has in the run,
    so that a merge need not know the class: it is the one that the base is saved in, or the family
    has no other for the task."""
    modules = (
        f"{module}.weight" in base.tensors or module in base.tensors for module in run.updates
    )
    if not all(modules) or not all(name in base.tensors for name in run.replaced):
        return False
    try:
        return _class_for(run.task, base) == (architecture_of(base.config) or None)
    except TargetError:
        return True


@dataclass(frozen=True)
class Classes:
    """`whole`: the class that a run is for. `text`: that of the text model alone, in which a run on
    a multimodal base may have been trained; None where the base has none."""

    base: BaseModel
    whole: Layout
    text: Layout | None

    @property
    def layouts(self) -> list[Layout]:
        return [layout for layout in (self.whole, self.text) if layout is not None]

    @property
    def known(self) -> bool:
        """Whether transformers knows the class."""
        return bool(self.whole.names.state)

    def module(self, name: str) -> str | None:
        """What the whole model calls a module, parameter or block; None where it has none that
        transformers knows under this name."""
        return self.whole.names.module(name) or self._through_text(name, (".weight", ""))

    def tensor(self, name: str) -> str | None:
        """As `module`, for a tensor."""
        return self.whole.names.tensor(name) or self._through_text(name, ("",))

    def _through_text(self, name: str, endings: tuple[str, ...]) -> str | None:
        """By the tensor on disk that the text model and the whole one are both loaded from."""
        text = self.text
        if text is None:
            return None
        for ending in endings:
            own = text.names.tensor(name + ending)
            disk = text.find(own) if own is not None else None
            found = self.whole.names.tensor(disk) if disk is not None else None
            if found is not None:
                return found.removesuffix(ending)
        return None


def classes(task: str | None, num_labels: int | None, base: BaseModel) -> Classes:
    """The classes that a run for `task` is for; raises `TargetError` where the base's family has
    none."""
    architecture = _class_for(task, base)
    whole, text = Layout(base, architecture, num_labels), None
    task = task or base.task
    if isinstance(base.config.get("text_config"), dict) and task is not None:
        with suppress(TargetError):
            name = class_for(base.config, usual_ending(task))
            text = Layout(base, name, num_labels) if name != architecture else None
    return Classes(base, whole, text)


def trained_in(known: Classes, keys: Iterable[str]) -> tuple[Layout, dict[str, str]]:
    """The class whose names the tensors of an adapter have, without PEFT's prefix, and each of
    `keys` as that class names its module. What is of no module keeps its name."""
    named = [{key: layout.names.inside(key) for key in keys} for layout in known.layouts]
    strange = [
        (sum(own is None for own in own_names.values()), sum(k != o for k, o in own_names.items()))
        for own_names in named
    ]
    best = strange.index(min(strange))
    return known.layouts[best], {key: own or key for key, own in named[best].items()}


def class_trained(run: Run, base: BaseModel) -> Layout:
    """The class whose names `run` has: of a multimodal base perhaps the text model alone."""
    known = classes(run.task, run.num_labels, base)
    if known.text is None:
        return known.whole
    return trained_in(known, [*run.replaced, *(f"{module}.weight" for module in run.updates)])[0]


def rows_in_memory(run: Run, base: BaseModel, module: str) -> int:
    """The number of rows of a module's weight, which may be tied to one that the base stores; 0
    where neither the base's class nor its text model has such a module."""
    weight = base.weight(module)
    if weight is not None:
        return weight.shape[0] if weight.shape else 0
    layouts = classes(run.task, run.num_labels, base).layouts
    shapes = [layout.names.state.get(f"{module}.weight", ()) for layout in layouts]
    return next((shape[0] for shape in shapes if shape), 0)


def resolved(run: Run, base: BaseModel) -> Run:
    """The run under the names that its modules have in the class it is for (of a multimodal base
    that is the whole model, also where the text model alone was trained).

    Raises `BaseError` for a module that this class has under no name that transformers knows. Of a
    class that transformers does not know, names are looked up in the base's files, with a warning
    where they are not the very same.
    """
    known = classes(run.task, run.num_labels, base)
    if not known.known:
        return _looked_up(run, base)
    modules = {}
    for module in run.updates:
        found = known.module(module)
        if found is None:
            _refuse_dropped(run, base, known.whole.names.architecture, [f"{module}.weight"])
            raise _unknown_module(run, base, known.whole, module)
        modules[module] = found
    tensors = {n: known.tensor(n) or n for n in (*run.replaced, *(run.embedded_base or ()))}
    strange = [name for name in run.replaced if known.tensor(name) is None]
    if strange:
        _refuse_dropped(run, base, known.whole.names.architecture, strange)
        warning = (
            f"{known.whole.names.architecture} has no {', '.join(strange[:4])}, which the run "
            "holds whole: whoever loads the result leaves it out, or refuses it"
        )
        run = replace(run, warnings=tuple(dict.fromkeys((*run.warnings, warning))))
    return _renamed(run, modules, tensors)


def _refuse_dropped(
    run: Run, base: BaseModel, architecture: str | None, strange: list[str]
) -> None:
    """Raise `BaseError` where `strange`, which the class that the run is for has not, is of the
    class that the base is saved in."""
    own = architecture_of(base.config)
    if not own or own == architecture:
        return
    names = Layout(base, own, None).names
    lost = [name for name in strange if names.tensor(name) is not None]
    if lost:
        raise BaseError(
            "the run trained a part of the base's class, which that it is said to be for has not",
            file=run.path,
            tensor=lost[0],
            found=f"task {run.task}: {architecture}",
            expected=f"{own}, as the base is saved",
            remedy="set task_type in adapter_config.json to what was trained",
        )


def check_names(run: Run, base: BaseModel) -> None:
    """Raise `BaseError` when a matrix that `run` updates is not in `base`, or of another shape. Of
    a quantized base, whose files hold other shapes, the class is asked."""
    packed = base.packed
    known = None if lies_plainly(run, base) and not packed else _classes_of(run, base)
    if known is None or not known.known:
        for module, shape in run.shapes.items():
            if not packed or base.weight(module) is None:
                base.is_transposed(module, shape, module in run.embeddings)
        return
    run = resolved(run, base)
    for module, shape in run.shapes.items():
        if known.whole.place(module, shape) is None:
            raise _unknown_module(run, base, known.whole, module)


def _classes_of(run: Run, base: BaseModel) -> Classes | None:
    with suppress(TargetError):
        return classes(run.task, run.num_labels, base)
    return None


def as_trained(run: Run, base: BaseModel) -> tuple[Run, Layout]:
    """As `resolved`, but a run of the text model alone of a multimodal base keeps the names of that
    model; and the layout of the class whose names they are."""
    known = classes(run.task, run.num_labels, base)
    under_whole = resolved(run, base)
    whole, text = known.whole, known.text
    if text is None or all(whole.names.module(module) is not None for module in run.updates):
        return under_whole, whole
    modules = {module: text.names.module(module) or module for module in run.updates}
    tensors = {name: text.names.tensor(name) or name for name in run.replaced}
    return _renamed(run, modules, tensors), text


def _renamed(run: Run, modules: Mapping[str, str], tensors: Mapping[str, str]) -> Run:
    same = all(old == new for names in (modules, tensors) for old, new in names.items())
    return run if same else run.renamed(modules, tensors)


def _looked_up(run: Run, base: BaseModel) -> Run:
    other = {
        module: found
        for module in run.updates
        if f"{module}.weight" not in base.tensors and module not in base.tensors
        if (found := base.find(f"{module}.weight") or base.find(module)) is not None
    }
    if not other:
        return run
    module, found = next(iter(other.items()))
    warning = (
        f"transformers does not know the base's class, so {module} is taken for {found} of the "
        f"base by the look of its name, and {len(other) - 1} more modules likewise"
    )
    return replace(run, warnings=(*run.warnings, warning))


def _unknown_module(run: Run, base: BaseModel, layout: Layout, module: str) -> BaseError:
    kind = module.rsplit(".", 1)[-1]
    if kind == "bias" and layout.names.has(module.removesuffix(".bias")):
        return BaseError(
            "the run trained a bias of a layer that has none in the base, so no weight of the base "
            "holds it",
            file=run.path,
            tensor=module,
            found=f"{layout.names.architecture} has no such bias (PEFT: lora_bias)",
            remedy="serve it with PEFT on its base: PeftModel.from_pretrained(base, adapter)",
        )
    like = [name for name in layout.names.state if f".{kind}." in name][:2]
    meant = base.find(f"{module}.weight") or base.find(module)
    return BaseError(
        "the base has no such module, under any name that is known",
        file=run.path,
        tensor=module,
        found=None if meant is None else f"no other name than {meant} is like it",
        expected=f"a name of {layout.names.architecture}, such as {', '.join(like) or 'none'}",
        remedy="is this the base it was trained on? if it is, rename the run's tensors",
    )
