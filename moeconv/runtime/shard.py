"""One rank's part of an output, loaded as views, onto a device or into a model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Literal

import torch

from moeconv.core.system_errors import system_errors
from moeconv.errors import GeometryMismatch, UsageProblem, quoted
from moeconv.placement.model import Given, by_stack
from moeconv.runtime.bind import Rename, bind, patterns_of
from moeconv.runtime.byte_runs import LocalTensor
from moeconv.runtime.open import Files, is_global, open_for_rank, rank_tensors
from moeconv.runtime.rank_view import RankView, changed_slots
from moeconv.runtime.rebalance import Moves
from moeconv.runtime.updater import Report, Updater
from moeconv.runtime.validate import validate_rank
from moeconv.runtime.write_tensors import checked_device, load_tensors


def ep_rank_of(rank: int, world: int, ep: int, order: str = "sglang", *, moe_tp: int = 1) -> int:
    """The expert-parallel rank of a process.

    "sglang" (and transformers): EP neighbours are adjacent processes, or `moe_tp` apart where each
    expert is split over so many. "twinkle": the mesh is (ep, ep_fsdp), so FSDP neighbours are.
    Raises GeometryMismatch.

    >>> [moeconv.runtime.ep_rank_of(rank, 4, 2) for rank in range(4)]
    [0, 1, 0, 1]
    >>> [moeconv.runtime.ep_rank_of(rank, 4, 2, order="twinkle") for rank in range(4)]
    [0, 0, 1, 1]
    """
    if order not in ("sglang", "twinkle"):
        raise UsageProblem(f"{quoted(order)} is not an order of ranks", fix='"sglang" or "twinkle"')
    if order != "sglang" and moe_tp != 1:
        raise UsageProblem("only sglang splits experts", fix="drop `moe_tp=`")
    least = min(ep, world, moe_tp)
    if least < 1 or world % (ep * moe_tp) or not 0 <= rank < world:
        raise GeometryMismatch(
            f"process {rank} of {world} does not fit into {ep} expert-parallel ranks",
            cause="ep (times moe_tp) must divide the number of processes; ranks count from 0",
            fix="start a multiple of that many processes",
        )
    return rank % (ep * moe_tp) // moe_tp if order == "sglang" else rank // (world // ep)


@system_errors()
def open_shard(
    path: str | Path,
    *,
    ep_rank: int,
    ep_size: int,
    placement: Given | None = None,
    source: str | Path | None = None,
    verify: Literal["digest"] | None = None,
) -> Shard:
    """Open one rank's part of an output: check the root, its own and the common part and files.

    Other ranks' files may be absent. placement: what the caller believes, as {stack: [P]}, as
    rows, or as a Placement. source: where the files of a virtual output are, if not where it says;
    there they may have other times, because they were copied, but not another size or header.
    A whole output opens as rank 0 of 1. verify: "digest" reads every byte that the rank will use
    and checks it against the manifest; without it only documents and headers are checked. It also
    applies to all that is read through the shard later: other ranks' files for `replace`, and
    outputs that the updater loads, which are read twice if they were opened without it.

    Raises GeometryMismatch (another ep_size, rank or placement), Unfinished, NotAnOutput,
    MissingShard, Damaged, SourceChanged, UnsafePath, BadManifest, DuplicateTensor,
    UnsupportedVersion, DigestsMissing (to be verified, and there are none), UsageProblem.

    >>> shard = moeconv.runtime.open(OUT, ep_rank=0, ep_size=2)
    >>> shard.stacks
    ('model.layers.0.mlp.experts',)
    >>> shard.logical_experts("model.layers.0.mlp.experts")
    (2, 0, 1)
    """
    if verify not in (None, "digest"):
        raise UsageProblem(
            f"{quoted(str(verify))} is not a kind of verification", fix='"digest", or None'
        )
    ep_rank, ep_size = _number(ep_rank, "ep_rank"), _number(ep_size, "ep_size")
    output = open_for_rank(
        Path(path).absolute(), source=None if source is None else Path(source), rank=ep_rank
    )
    if ep_size != output.ep_size or not 0 <= ep_rank < ep_size:
        raise GeometryMismatch(
            f"rank {ep_rank} of {ep_size} was requested, the output is for {output.ep_size}",
            at=quoted(str(path)),
            cause=f"it was written with `--ep {output.ep_size}`",
            fix=f"start {output.ep_size} expert-parallel ranks, or shard again",
        )
    files: Files = {}
    common: list[LocalTensor] = []
    own: list[LocalTensor] = []
    for part in output.parts_of(None, ep_rank):
        for tensor in output.read_part(part, files):
            (common if tensor.slot_range is None else own).append(tensor)
    validate_rank(
        output.root,
        output.rows,
        [t.entry for t in common],
        [t.entry for t in own],
        rank=ep_rank,
        ep_size=ep_size,
    )
    tensors = rank_tensors(output, common, own, output.rows)
    shard = Shard(output, tuple(common), tuple(own), output.rows, tensors, files)
    if placement is not None:
        shard.check_placement(placement)
    return shard if verify is None else shard.verified()


def _number(value: int, option: str) -> int:
    try:
        return index(value)  # also those of numpy
    except TypeError:
        raise UsageProblem(f"`{option}` is {value!r}", fix="pass a whole number") from None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Shard(RankView):
    """One rank's part of an output, to be loaded. Immutable, and keeps no file open."""

    # --- tensors -------------------------------------------------------------------------------
    def load(
        self,
        device: torch.device | str | None = None,
        names: Iterable[str] | None = None,
        *,
        copy: bool = False,
    ) -> dict[str, torch.Tensor]:
        """This rank's experts, [S, ...] in slot order, and every common tensor; or just `names`.

        On the CPU they are views of privately mapped files where that can be: nothing is copied,
        and writing to one never reaches the file. The files must not be cut short meanwhile. All
        views of a file share one storage as large as the file: `torch.save` of one writes it all,
        so clone it first. What does not start at a multiple of 16 bytes is copied.
        copy: read everything into memory of its own. Take it where the files may be cut short or
        replaced while the tensors live (a cut file ends the process that touches a view of it,
        with SIGBUS), or are on a file system that goes away.
        Small tensors that are kept for all experts are gathered to this rank's slots.
        Raises UsageProblem (an unknown name, meta), NoTorchDtype, SourceChanged, IoFailed.

        >>> loaded = shard.load()
        >>> loaded["model.layers.0.mlp.experts.down_proj"].shape
        torch.Size([3, 8, 4])
        """
        chosen = self.names if names is None else patterns_of(names, "names")
        if unknown := [name for name in chosen if name not in self.tensors]:
            raise UsageProblem(
                f"{quoted(unknown[0])} is not a tensor of this rank", fix="see `Shard.names`"
            )
        return load_tensors([self.tensors[name] for name in chosen], self.files, device, copy=copy)

    def global_tensors(self, *, copy: bool = False) -> dict[str, torch.Tensor]:
        """The small tensors (scales) of all experts, as the common files have them: [E, ...].

        In logical order; where a layout names each expert, one tensor for each, by the
        checkpoint's names. Runtimes reduce over these, whichever experts they hold. copy: as in
        `load`.

        >>> shard.global_tensors()["model.layers.0.mlp.experts.down_proj_scale"]
        tensor([0., 1., 2., 3., 4.])
        """
        kept = [tensor for tensor in self.common if is_global(tensor, self.rows)]
        return load_tensors(kept, self.files, None, copy=copy)

    def load_into(
        self,
        model: torch.nn.Module,
        *,
        rename: Rename = None,
        ignore: Iterable[str] = (),
        cast: bool = False,
        device: torch.device | str | None = None,
    ) -> Report:
        """Read directly into a model's parameters and persistent buffers, whole or DTensors.

        Strict: each of them must be covered, by any name of its storage, and no tensor of the
        output left over; another shape or dtype is an error. All problems are raised together, as
        one DoesNotFit, before the first byte is written. Where the output has several names of one
        storage, it must have the same bytes under all of them.

        rename: a function, or a mapping of dotted prefixes (the longest that fits counts). ignore:
        patterns of names of the output that have no place in the model. cast: convert between float
        dtypes. Of a DTensor, only this process's slice is read, and nothing is communicated;
        dimension 0 of an expert tensor is S, or P where EP is a dimension of the mesh.

        Parameters on meta get memory on `device` (the CPU, or a DTensor's own kind of device), and
        keep their ties and requires_grad. A buffer on meta is refused: build the model with
        parameters on meta only (`accelerate.init_empty_weights(include_buffers=False)`).
        `model.to_empty()` is no way out: it leaves buffers that no checkpoint has, such as the
        `inv_freq` of rotary embeddings, as whatever was in memory.

        Which experts the model's slots hold is recorded with its modules, and `Moves.load_into` and
        `Updater.load` go by it; here all slots are filled as this shard has them, whatever they
        held. What you copy yourself is not recorded.

        What has no plain memory of its own is refused: views that overlap others or themselves
        (two names of the same view are tied, disjoint views are fine), wrapper subclasses, sparse
        and uninitialised parameters, subclasses of Parameter on meta, and what would have to be
        copied into a tensor of inference mode.

        Raises DoesNotFit, UsageProblem, IoFailed, SourceChanged.

        >>> report = shard.load_into(model)
        >>> report.tensors, report.bytes_overread
        (5, 0)
        """
        began = time.perf_counter()
        updater = self.updater(model, rename=rename, ignore=ignore, cast=cast, device=device)
        return updater.write(self, began)

    def updater(
        self,
        model: torch.nn.Module,
        *,
        rename: Rename = None,
        ignore: Iterable[str] = (),
        cast: bool = False,
        device: torch.device | str | None = None,
    ) -> Updater:
        """Match this output with a model once, to load newer ones of its geometry repeatedly.

        Nothing is read yet. Options and errors are those of `load_into`. A model that holds another
        placement than this shard is to be loaded with `load_into` first.

        >>> updater = shard.updater(model)
        >>> updater.load(shard).bytes_read == updater.load(shard).bytes_read
        True
        """
        where = checked_device(device)
        with torch.no_grad():
            binding = bind(model, self.tensors, rename=rename, ignore=ignore, cast=cast)
        return Updater(self, binding, where)

    def replace(self, placement: Given) -> Moves[Shard]:
        """What changes on this rank under a new placement of as many slots: to be read and filled.

        placement: as for `open`; stacks that it does not name stay. Experts that this rank's files
        lack come out of other ranks' parts and files, which must be there then, and are verified
        here if this shard is.
        Raises GeometryMismatch, BadPlacement, MissingShard, Damaged, SourceChanged, DigestsMissing.

        >>> moves = shard.replace({"model.layers.0.mlp.experts": (2, 0, 3, 4, 1, 0)})
        >>> moves.changed
        {'model.layers.0.mlp.experts': ((2, 3),)}
        >>> moves.load_into(model).tensors
        3
        """
        newer = self.rearranged(placement)
        named = frozenset(by_stack(self.stacks, placement))
        return Moves(newer, changed_slots(self.output, self.rows, newer.rows), named)
