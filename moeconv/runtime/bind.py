"""Match the tensors of an output with those of a model: names, ties, shapes, dtypes, slices.

Everything is checked, and all problems are reported together, before anything is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final, TypeAlias

import torch

from moeconv.core.text import counted, listed
from moeconv.errors import DoesNotFit, NoTorchDtype, UsageProblem, quoted
from moeconv.runtime.byte_runs import LocalTensor
from moeconv.runtime.dtensor import (
    Selection,
    Spans,
    counts,
    covering,
    local_selection,
    whole,
)
from moeconv.runtime.model_tensors import (
    Target,
    is_dtensor,
    is_row_major,
    local_tensor,
    memory_kind,
    modules_of,
    moved,
    overlapping,
    targets_of,
    unsharded,
    unwritable_reason,
)
from moeconv.runtime.write_tensors import Step

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str] | None
_Problems: TypeAlias = defaultdict[str, list[str]]  # by kind
_SHOWN: Final = 8  # problems of one kind that a message lists


@dataclass(frozen=True, slots=True)
class BoundTensor:
    """A model's tensor, the output's tensor that goes there, and how.

    kind: shape and dtype at the time of matching, which must not change before the load.
    """

    target: Target
    source: str
    kind: tuple[object, ...]
    steps: tuple[Step, ...]

    def only(self, slots: Collection[int], source: LocalTensor) -> BoundTensor:
        """Restrict to these local slots; source: the tensor that goes there."""
        slot_range, shape = source.slot_range, source.torch_shape
        if slot_range is None or not slot_range.stacked or len(slots) == len(slot_range.local):
            return self
        size = shape[0] // len(slot_range.local)
        taken = [(n - slot_range.local.start) * size for n in sorted(slots)]
        ranges = [(a, a + size) for a in taken]
        steps = (replace(s, rows=r) for s in self.steps for r in _where(s.wanted[0], ranges))
        return replace(self, steps=tuple(steps))

    def local(self) -> torch.Tensor:
        """This rank's memory of it. Raises DoesNotFit if the model has changed since."""
        tensor = self.target.now()
        local = local_tensor(tensor)
        same = unwritable_reason(tensor) is None and memory_kind(tensor) == self.kind
        if not same or (any(s.direct for s in self.steps) and not is_row_major(local)):
            raise moved(self.target.names[0])
        return local.detach()


@dataclass(frozen=True, slots=True)
class Binding:
    """The model's tensors to load. aliases: one of them and another name of the output for it."""

    model: torch.nn.Module
    bound: tuple[BoundTensor, ...]
    ignored: tuple[str, ...]
    tied: tuple[str, ...]
    aliases: tuple[tuple[BoundTensor, str], ...]
    cast: tuple[str, ...]

    def check(self) -> None:
        """Check that the model still has all of these tensors. Raises DoesNotFit."""
        modules = set(self.model.modules())
        for item in self.bound:
            item.local()
            if not modules.issuperset(module for module, _ in item.target.attributes):
                raise moved(item.target.names[0])


def _refuse(problems: _Problems) -> None:
    """Raise DoesNotFit with all problems, if there are any."""
    if not problems:
        return
    lines = [
        f"{kind} ({len(found):,}): {listed(found, most=_SHOWN, separator='; ')}"
        for kind, found in problems.items()
    ]
    total = sum(map(len, problems.values()))
    raise DoesNotFit(
        f"the output and the model do not match in {counted(total, 'place')}",
        cause="\n         ".join(lines),
        fix="pass `rename=`, `ignore=` or `cast=True` if that is what you mean",
    )


def _renamed(name: str, rename: Rename) -> str:
    """The model's name; of a mapping, the longest key that is the name or a dotted prefix of it."""
    if rename is None:
        return name
    if not isinstance(rename, Mapping):
        found = rename(name)
        if not isinstance(found, str):
            raise UsageProblem(
                f"`rename` gives {found!r} for {quoted(name)}",
                fix="return a string: the new name, or the same one",
            )
        return found
    prefix = name
    while True:
        if prefix in rename:
            rest = name[len(prefix) :].lstrip(".")
            return ".".join(part for part in (rename[prefix], rest) if part)
        if not prefix:
            return name
        prefix = prefix.rpartition(".")[0]


def _targets(model: torch.nn.Module, problems: _Problems) -> list[Target]:
    """The tensors to fill; add those that cannot be filled to the problems."""
    for before, module in modules_of(model):
        if unsharded(module):
            text = f"{quoted(before[:-1])} of FSDP2; call its `reshard()`"
            problems["currently unsharded"].append(text)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # only the model's own code knows its values
                problems["buffers on meta"].append(quoted(before + name))
    targets = targets_of(model)
    for target in targets:
        if target.unwritable:
            text = f"{quoted(target.names[0])} {target.unwritable}"
            problems["no plain memory"].append(text)
    for a, b in overlapping(targets):
        problems["different views of the same memory"].append(f"{quoted(a)} and {quoted(b)}")
    return targets


def patterns_of(texts: Iterable[str], option: str) -> tuple[str, ...]:
    """A tuple of patterns. Raises UsageProblem for a single string, which would be split."""
    if isinstance(texts, str):
        raise UsageProblem(f"`{option}` takes a list of strings", fix=f"{option}=[{texts!r}]")
    return tuple(texts)


def bind(
    model: torch.nn.Module,
    tensors: Mapping[str, LocalTensor],
    *,
    rename: Rename = None,
    ignore: Iterable[str] = (),
    cast: bool = False,
    needed: Collection[str] | None = None,
) -> Binding:
    """Match an output's tensors with a model's. Raises DoesNotFit with all problems.

    needed: only these must be in the model, not on meta and not ignored; the others are matched if
    they are there, and the model may have more.
    """
    problems: _Problems = defaultdict(list)
    patterns = patterns_of(ignore, "ignore")
    must = tensors if needed is None else needed
    skipped = {n for n in tensors if any(fnmatchcase(n, p) for p in patterns)}
    ignored = tuple(n for n in tensors if n in must and n in skipped)
    if needed is not None and ignored:  # the model would be in neither placement
        problems["ignored, but its slots change"] += map(quoted, ignored)
    by_target: dict[str, str] = {}
    for name in (n for n in tensors if n not in skipped):
        wanted = _renamed(name, rename)
        if wanted in by_target:
            both = f"{quoted(by_target[wanted])} and {quoted(name)} as {quoted(wanted)}"
            problems["two names become one"].append(both)
        by_target[wanted] = name
    bound: list[BoundTensor] = []
    tied: list[str] = []
    aliases: list[tuple[BoundTensor, str]] = []
    may_tie = any(hasattr(m, "tie_weights") for m in model.modules())
    hint = "; call `model.tie_weights()` first if it is tied" if may_tie else ""
    for target in _targets(model, problems):
        used = [n for n in dict.fromkeys(target.names) if n in by_target]
        given = [by_target.pop(n) for n in used]
        if not given:
            if needed is None:
                problems["not in the output"].append(quoted(target.names[0]) + hint)
            continue
        tensor = target.now()
        if needed is not None and tensor.is_meta:
            if any(n in needed for n in given):
                problems["on meta"].append(quoted(target.names[0]))
            continue
        if target.unwritable:
            continue  # noted already
        several = [_steps(tensor, tensors[n], problems, cast=cast) for n in given]
        bound.append(BoundTensor(target, given[0], memory_kind(tensor), several[0]))
        aliases += [(bound[-1], other) for other in given[1:]]
        tied += [name for name in target.names if name not in used]
    left = [quoted(name) for name in by_target.values() if name in must]
    if left:
        problems["not in the model"] += left
    _refuse(problems)
    converted = tuple(
        f.source for f in bound if tensors[f.source].torch_dtype != f.target.now().dtype
    )
    order = {name: number for number, name in enumerate(tensors)}
    bound.sort(key=lambda f: order[f.source])  # in the order of the files
    return Binding(model, tuple(bound), ignored, tuple(tied), tuple(aliases), converted)


def _steps(
    tensor: torch.Tensor,
    source: LocalTensor,
    problems: _Problems,
    *,
    cast: bool,
) -> tuple[Step, ...]:
    """How to fill one tensor; add what prevents it to the problems."""
    try:
        dtype, shape = source.torch_dtype, source.torch_shape
    except NoTorchDtype as problem:
        problems["dtypes that torch lacks"].append(problem.message)
        return ()
    if tensor.dtype != dtype and not (cast and _floats(tensor.dtype, dtype)):
        both = f"{quoted(source.name)} is {dtype}, the model has {tensor.dtype}"
        problems["another dtype"].append(both)
    wanted = _wanted(tensor, source, shape)
    if isinstance(wanted, str):
        problems["another shape"].append(wanted)
        return ()
    local = local_tensor(tensor)
    have = tuple(local.shape)
    if counts(wanted) != have and (all(counts(wanted)) or all(have)):
        both = f"{quoted(source.name)}: this rank has {list(have)}, not {list(counts(wanted))}"
        problems["another local shape"].append(both)
        return ()
    read = covering(shape, dtype.itemsize, wanted)
    direct = read == wanted and dtype == tensor.dtype and is_row_major(local)
    if not direct and local.is_inference() and not local.is_meta:
        both = f"{quoted(source.name)}: cannot copy into a tensor made in inference mode"
        problems["no plain memory"].append(both)
    return (Step(wanted, read, (0, local.shape[0] if have else 1), direct),)


def _where(spans: Spans, ranges: Iterable[tuple[int, int]]) -> Spans:
    """The positions, within the spans, of the indices in the ranges."""
    out, at = [], 0
    for a, b in spans:
        both = ((max(a, first), min(b, last)) for first, last in ranges)
        out += [(at + first - a, at + last - a) for first, last in both if first < last]
        at += b - a
    return tuple(out)


def _floats(*dtypes: torch.dtype) -> bool:
    packed = getattr(torch, "float4_e2m1fn_x2", None)
    return all(d.is_floating_point and d != packed for d in dtypes)


def _wanted(tensor: torch.Tensor, source: LocalTensor, shape: tuple[int, ...]) -> Selection | str:
    """Which part of the source goes into a tensor, or why none does."""
    target = tuple(tensor.shape)
    if not is_dtensor(tensor):
        if target == shape:
            return whole(shape)
        return f"{quoted(source.name)} is {list(shape)}, the model has {list(target)}"
    slot_range, scale = source.slot_range, 0
    if slot_range is not None and slot_range.stacked and target[1:] == shape[1:]:
        # perhaps all slots of all ranks along dimension 0, the mesh having EP as one of its
        # dimensions
        scale = shape[0] // len(slot_range.local)
    of_all = (
        slot_range is not None and target != shape and target[:1] == (scale * slot_range.total,)
    )
    if target != shape and not of_all:
        return f"{quoted(source.name)} is {list(shape)}, the model has {list(target)}"
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return f"{quoted(source.name)}: this rank is not in the mesh of its DTensor"
    found = local_selection(target, tuple(mesh.shape), coordinate, tensor.placements)
    if isinstance(found, str):
        return f"{quoted(source.name)}: {found}"
    if not of_all or slot_range is None:
        return found
    first, last = slot_range.start * scale, slot_range.stop * scale
    if any(a < first or b > last for a, b in found[0]):
        a, b = found[0][0][0] // scale, -(-found[0][-1][1] // scale)
        return (
            f"{quoted(source.name)}: its DTensor has slots {a} to {b - 1} on this rank, "
            f"the output has slots {slot_range.start} to {slot_range.stop - 1}"
        )
    return (tuple((a - first, b - first) for a, b in found[0]), *found[1:])
