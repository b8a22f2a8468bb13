"""Which tensor of a set goes where in a model: names, ties, shapes, dtypes, slices.

Everything is checked, and all problems are told together, before anything is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, TypeAlias, TypeGuard

import torch

from moeconv.errors import DoesNotFit, NoTorchDtype, quoted
from moeconv.runtime.fill import Step
from moeconv.runtime.slices import (
    Selection,
    Spans,
    counts,
    covering,
    local_selection,
    whole,
)
from moeconv.runtime.tensors import LocalTensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str] | None
Place: TypeAlias = tuple[torch.nn.Module, str]
_SHOWN: Final = 8  # problems of one kind that a message lists


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter or buffer under all its names; `places` are where the model keeps it."""

    names: tuple[str, ...]
    places: tuple[Place, ...]
    buffer: bool

    def now(self) -> torch.Tensor:
        """The tensor as the model has it at present."""
        module, attribute = self.places[0]
        tensor = (module._buffers if self.buffer else module._parameters)[attribute]
        if tensor is None:
            raise _moved(self.names[0])
        return tensor


@dataclass(frozen=True, slots=True)
class Filled:
    """A target, the tensor of the set that goes there, and how. kind: what it must still be."""

    target: Target
    source: str
    kind: tuple[object, ...]
    steps: tuple[Step, ...]

    def local(self) -> torch.Tensor:
        """This rank's memory of it. Raises DoesNotFit where the model has changed since."""
        tensor = self.target.now()
        local = local_tensor(tensor)
        straight = local.is_contiguous() or not any(s.direct for s in self.steps)
        if kind_of(tensor) != self.kind or not straight:
            raise _moved(self.target.names[0])
        return local.detach()


@dataclass(frozen=True, slots=True)
class Fit:
    """All that is to be filled. twins: pairs of the set's names that one storage has."""

    filled: tuple[Filled, ...]
    ignored: tuple[str, ...]
    tied: tuple[str, ...]
    twins: tuple[tuple[str, str], ...]


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; that module costs a second to import, so it is not asked."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's own memory, or the tensor itself. Under no_grad this communicates nothing."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def kind_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Shape and dtype of this rank's memory, and of what it is a slice."""
    spec = (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None
    return tuple(local_tensor(tensor).shape), tensor.dtype, spec


def _unsharded(module: torch.nn.Module) -> bool:
    """Whether FSDP2 shows gathered parameters now: what is written to these, it throws away."""
    find = getattr(module, "_get_fsdp_state", None)
    state = find() if find is not None else None
    groups = getattr(state, "_fsdp_param_groups", None) or [
        getattr(state, "_fsdp_param_group", None)
    ]
    return not all(getattr(group, "is_sharded", True) for group in groups)


def _moved(name: str) -> DoesNotFit:
    return DoesNotFit(
        f"{quoted(name)} is not what it was",
        at=quoted(name),
        cause="the model changed its tensors since they were matched, or FSDP holds it unsharded",
        fix="call `model.reshard()` of FSDP2 first, or make a new updater",
    )


@dataclass(slots=True)
class _Problems:
    kinds: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def refuse(self) -> None:
        """Raise DoesNotFit with everything found."""
        if not self.kinds:
            return
        total = sum(map(len, self.kinds.values()))
        lines = []
        for kind, found in self.kinds.items():
            more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
            lines.append(f"{kind} ({len(found):,}): {'; '.join(found[:_SHOWN])}{more}")
        raise DoesNotFit(
            f"the set and the model do not fit in {total:,} place(s)",
            cause="\n         ".join(lines),
            fix="give `rename=`, `ignore=` or `cast=True` where that is what you mean",
        )


def _renamed(name: str, rename: Rename) -> str:
    """The model's name; of a mapping, the longest key that is the name or a dotted prefix of it."""
    if rename is None:
        return name
    if not isinstance(rename, Mapping):
        return rename(name)
    prefix = name
    while True:
        if prefix in rename:
            rest = name[len(prefix) :].lstrip(".")
            return ".".join(part for part in (rename[prefix], rest) if part)
        if not prefix:
            return name
        prefix = prefix.rpartition(".")[0]


def _targets(model: torch.nn.Module, problems: _Problems) -> list[Target]:
    """Parameters and persistent buffers, those of one storage together."""
    found: dict[tuple[object, ...], list[tuple[str, Place, bool]]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        before = f"{path}." if path else ""
        if _unsharded(module):
            text = f"{quoted(path)} of FSDP2; call its `reshard()`"
            problems.kinds["unsharded at present"].append(text)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[_storage(parameter)].append((before + name, (module, name), False))
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.is_meta:
                # nobody but the model's own code knows what such a buffer holds
                problems.kinds["buffers on meta"].append(quoted(before + name))
            if name not in module._non_persistent_buffers_set:
                found[_storage(buffer)].append((before + name, (module, name), True))
    return [
        Target(
            tuple(name for name, _, _ in several), tuple(p for _, p, _ in several), several[0][2]
        )
        for several in found.values()
    ]


def _storage(tensor: torch.Tensor) -> tuple[object, ...]:
    local = local_tensor(tensor)
    if local.is_meta or not local.numel():
        return (id(tensor),)
    return local.data_ptr(), tuple(local.shape), local.stride(), local.dtype, local.device


def fit(
    model: torch.nn.Module,
    tensors: Mapping[str, LocalTensor],
    *,
    rename: Rename = None,
    ignore: Iterable[str] = (),
    cast: bool = False,
    slots: Mapping[int, frozenset[int]] | None = None,
) -> Fit:
    """Match a set's tensors to a model. Raises DoesNotFit with all problems.

    slots: only these local slots of stacks are to be filled; then the model may have more tensors,
    and none may be on meta.
    """
    problems = _Problems()
    patterns = tuple(ignore)
    ignored = tuple(n for n in tensors if any(fnmatchcase(n, p) for p in patterns))
    by_target: dict[str, str] = {}
    for name in [n for n in tensors if n not in set(ignored)] if ignored else tensors:
        wanted = _renamed(name, rename)
        if wanted in by_target:
            both = f"{quoted(by_target[wanted])} and {quoted(name)} as {quoted(wanted)}"
            problems.kinds["two names become one"].append(both)
        by_target[wanted] = name
    filled: list[Filled] = []
    tied: list[str] = []
    twins: list[tuple[str, str]] = []
    hint = "; call `model.tie_weights()` first if it is tied" if _may_tie(model) else ""
    for target in _targets(model, problems):
        used = [n for n in dict.fromkeys(target.names) if n in by_target]
        given = [by_target.pop(n) for n in used]
        if not given:
            if slots is None:
                problems.kinds["not in the set"].append(quoted(target.names[0]) + hint)
            continue
        tensor = target.now()
        if slots is not None and tensor.is_meta:
            problems.kinds["on meta"].append(quoted(target.names[0]))
        for name in given:
            steps = _steps(tensor, tensors[name], problems, cast=cast, slots=slots)
            if name == given[0]:
                filled.append(Filled(target, name, kind_of(tensor), steps))
        twins += [(given[0], other) for other in given[1:]]
        tied += [name for name in target.names if name not in used]
    left = [quoted(name) for name in by_target.values()]
    if left:
        problems.kinds["without a place in the model"] += left
    problems.refuse()
    order = {name: number for number, name in enumerate(tensors)}
    filled.sort(key=lambda f: order[f.source])  # as they lie in the files
    return Fit(tuple(filled), ignored, tuple(tied), tuple(twins))


def _may_tie(model: torch.nn.Module) -> bool:
    return any(hasattr(m, "tie_weights") for m in model.modules())


def _steps(
    tensor: torch.Tensor,
    source: LocalTensor,
    problems: _Problems,
    *,
    cast: bool,
    slots: Mapping[int, frozenset[int]] | None,
) -> tuple[Step, ...]:
    """How to fill one tensor; its problems are noted."""
    try:
        dtype, shape = source.torch_dtype, source.torch_shape
    except NoTorchDtype as problem:
        problems.kinds["dtypes that torch lacks"].append(problem.message)
        return ()
    if tensor.dtype != dtype and not (cast and _floats(tensor.dtype, dtype)):
        both = f"{quoted(source.name)} is {dtype}, the model has {tensor.dtype}"
        problems.kinds["another dtype"].append(both)
    wanted = _wanted(tensor, source, shape)
    if isinstance(wanted, str):
        problems.kinds["another shape"].append(wanted)
        return ()
    local = local_tensor(tensor)
    have = tuple(local.shape)
    if counts(wanted) != have and (all(counts(wanted)) or all(have)):
        both = f"{quoted(source.name)}: this rank holds {list(have)}, not {list(counts(wanted))}"
        problems.kinds["another local shape"].append(both)
        return ()
    read = covering(shape, dtype.itemsize, wanted)
    direct = read == wanted and dtype == tensor.dtype and (local.is_meta or local.is_contiguous())
    every = (0, local.shape[0] if have else 1)
    held = source.held
    if slots is None or held is None or not held.stacked:
        return (Step(wanted, read, every, direct),)
    size = shape[0] // len(held.local)
    changed = sorted(slots.get(held.stack, frozenset()) & set(held.local))
    taken = [(n - held.local.start) * size for n in changed]
    ranges = _where(wanted[0], [(a, a + size) for a in taken])
    return tuple(Step(wanted, read, rows, direct) for rows in ranges)


def _where(spans: Spans, ranges: Iterable[tuple[int, int]]) -> Spans:
    """At which positions of the spans the indices of the ranges stand."""
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
    """What of the local tensor belongs there, or why nothing does."""
    target = tuple(tensor.shape)
    if not is_dtensor(tensor):
        if target == shape:
            return whole(shape)
        return f"{quoted(source.name)} is {list(shape)}, the model has {list(target)}"
    held = source.held
    # all slots of all ranks along dimension 0, the mesh having EP as one of its dimensions
    of_all = held is not None and held.stacked and target[1:] == shape[1:] and target != shape
    scale = shape[0] // len(held.local) if held is not None and of_all else 0
    if target != shape and not (held and scale and target[0] == scale * held.total):
        return f"{quoted(source.name)} is {list(shape)}, the model has {list(target)}"
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return f"{quoted(source.name)}: this rank is not in the mesh of its DTensor"
    found = local_selection(target, tuple(mesh.shape), coordinate, tensor.placements)
    if isinstance(found, str):
        return f"{quoted(source.name)}: {found}"
    if not of_all or held is None:
        return found
    first, last = held.start * scale, held.stop * scale
    if any(a < first or b > last for a, b in found[0]):
        a, b = found[0][0][0] // scale, -(-found[0][-1][1] // scale)
        return (
            f"{quoted(source.name)}: its DTensor has slots {a} to {b - 1} on this rank, "
            f"the set has slots {held.start} to {held.stop - 1}"
        )
    return (tuple((a - first, b - first) for a, b in found[0]), *found[1:])
