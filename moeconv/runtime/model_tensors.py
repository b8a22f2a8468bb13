"""The tensors of a model: their names, their memory, and whether it can be written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias, TypeGuard

import torch
from torch.nn.parameter import is_lazy

from moeconv.errors import DoesNotFit, quoted

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Attribute: TypeAlias = tuple[torch.nn.Module, str]
# what wrappers of activation checkpointing and torch.compile put into names
_WRAPPERS: Final = frozenset(("_checkpoint_wrapped_module", "_orig_mod"))


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter or buffer under all its names; `attributes` are where the model keeps it.

    unwritable: why its memory cannot be written; None if it can.
    """

    names: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    buffer: bool
    unwritable: str | None

    def now(self) -> torch.Tensor:
        """The tensor as the model has it at present."""
        module, attribute = self.attributes[0]
        tensor = (module._buffers if self.buffer else module._parameters)[attribute]
        if tensor is None:
            raise moved(self.names[0])
        return tensor


def moved(name: str) -> DoesNotFit:
    """The error for a model that changed."""
    return DoesNotFit(
        f"{quoted(name)} has changed",
        at=quoted(name),
        cause="the model's tensors changed after they were matched, or FSDP has it unsharded",
        fix="call `model.reshard()` of FSDP2 first, or make a new updater",
    )


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, without importing its module, which takes a second."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's own memory, or the tensor itself. Under no_grad this communicates nothing."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def is_row_major(local: torch.Tensor) -> bool:
    """Whether its bytes are its values in row-major order."""
    return local.is_contiguous() and not local.is_conj() and not local.is_neg()


def memory_kind(tensor: torch.Tensor) -> tuple[object, ...]:
    """Shape and dtype of this rank's memory, and of what it is a slice."""
    spec = (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None
    return tuple(local_tensor(tensor).shape), tensor.dtype, spec


def unwritable_reason(tensor: torch.Tensor) -> str | None:
    """Why a tensor's memory cannot be written, or None. Tensors on meta can be materialised."""
    if is_lazy(tensor):
        return "is not initialised"
    if is_dtensor(tensor):
        spec = getattr(tensor, "_spec", None)
        order = getattr(spec, "shard_order", None) or ()
        if any(list(entry.mesh_dims) != sorted(entry.mesh_dims) for entry in order):
            return "is sharded in an order that differs from its mesh"
    local = local_tensor(tensor)
    kind = type(local).__torch_dispatch__
    if local.layout != torch.strided or kind is not torch.Tensor.__torch_dispatch__:
        return f"is not plain memory but {type(local).__name__} ({local.layout})"
    if local.is_meta:
        own = type(tensor) in (torch.nn.Parameter, torch.Tensor) or is_dtensor(tensor)
        return None if own else f"on meta is of class {type(tensor).__name__}, which would be lost"
    if not local.data_ptr() and local.numel():
        return "has no memory"
    if local.is_inference() and not (is_row_major(local) and local.device.type == "cpu"):
        return "was made in inference mode; only `torch.inference_mode()` may copy into it"
    return "overlaps itself" if _overlaps(local) else None


def _overlaps(local: torch.Tensor) -> bool:
    """Whether two elements may share memory; False is always right."""
    reach = 0  # the largest offset that smaller strides come to
    pairs = zip(local.stride(), local.shape, strict=True)
    for stride, size in sorted(pair for pair in pairs if pair[1] > 1):
        if stride <= reach:
            return bool(local.numel())
        reach += stride * (size - 1)
    return False


def unsharded(module: torch.nn.Module) -> bool:
    """Whether FSDP2 has gathered the parameters: writes to these would be lost."""
    find = getattr(module, "_get_fsdp_state", None)
    state = find() if find is not None else None
    groups = getattr(state, "_fsdp_param_groups", None) or [
        getattr(state, "_fsdp_param_group", None)
    ]
    return not all(getattr(group, "is_sharded", True) for group in groups)


def modules_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(what names begin with, module), as `state_dict()` calls them, however often each."""
    for path, module in model.named_modules(remove_duplicate=False):
        words = [word for word in path.split(".") if word and word not in _WRAPPERS]
        yield "".join(f"{word}." for word in words), module


def targets_of(model: torch.nn.Module) -> list[Target]:
    """Parameters and persistent buffers; those that are the same view of one memory together."""
    found: dict[tuple[object, ...], Target] = {}
    for before, module in modules_of(model):
        passing = module._non_persistent_buffers_set
        kept = [(n, b, True) for n, b in module._buffers.items() if n not in passing]
        for name, tensor, buffer in [
            *((n, p, False) for n, p in module._parameters.items()),
            *kept,
        ]:
            if tensor is None:
                continue
            unwritable = unwritable_reason(tensor)
            key = (id(tensor),) if unwritable else _view(tensor)
            known = found.get(key, Target((), (), buffer, unwritable))
            names, attributes = (*known.names, before + name), (*known.attributes, (module, name))
            found[key] = replace(known, names=names, attributes=attributes)
    return list(found.values())


def _view(tensor: torch.Tensor) -> tuple[object, ...]:
    local = local_tensor(tensor)
    if local.is_meta or not local.numel():
        return (id(tensor),)
    kind = local.dtype, local.device, local.is_conj(), local.is_neg()
    return local.data_ptr(), tuple(local.shape), local.stride(), *kind


def overlapping(targets: Iterable[Target]) -> Iterator[tuple[str, str]]:
    """Names of two targets whose memory is, or may be, the same in part."""
    spans = []
    for target in targets:
        local = local_tensor(target.now())
        if target.unwritable is None and not local.is_meta and local.numel():
            pairs = zip(local.stride(), local.shape, strict=True)
            last = sum(stride * (size - 1) for stride, size in pairs)
            start = local.data_ptr()
            spans.append(
                (str(local.device), start, start + (last + 1) * local.itemsize, target.names[0])
            )
    device, reach, owner = "", 0, ""
    for where, start, stop, name in sorted(spans):
        if where == device and start < reach:
            yield owner, name
        if where != device or stop > reach:
            device, reach, owner = where, stop, name
