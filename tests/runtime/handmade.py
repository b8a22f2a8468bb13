"""Sets written by hand with stock safetensors: what the planner would write, without the planner.

A checkpoint here is a dict of tensors. Experts are given fused and whole, [E, ...]; their names
are told to `Recipe` by stack. Every value differs, so that no wrong slice can look right.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save

from moeconv.core.digest import digest
from moeconv.manifest.model import (
    COMMON_PART,
    ORIGIN_NAME,
    ExpertEntry,
    FileEntry,
    Part,
    RecipeText,
    Root,
    Run,
    SourceEntry,
    SourceFile,
    StackEntry,
    TensorEntry,
    part_name,
    part_names,
    rank_name,
)
from moeconv.manifest.writer import part_bytes, rank_part_bytes, root_bytes

PAGE: Final = 4096
STACK: Final = "model.layers.0.mlp.experts"
Tensors = Mapping[str, torch.Tensor]
Row = tuple[int, ...]


@dataclass
class Fused:
    """One fused tensor of a stack, [E, ...]; small ones are kept for all experts.

    per_expert: (name of one expert's tensor with `{}`, name on a rank with `{slot}`).
    """

    stack: str
    value: torch.Tensor
    axes: str = "E (G O) K"
    projections: tuple[str, ...] = ("gate", "up")
    component: str = "weight"
    small: bool = False
    per_expert: str | None = None
    everyone: bool = False  # one value for all experts

    @property
    def matrix(self) -> tuple[int, ...]:
        """The canonical shape of one: this knows only the axes that tests use."""
        sizes = tuple(self.value.shape[self.axes.startswith("E") or self.per_expert is not None :])
        if not {"O", "K"} & set(self.axes):
            return ()
        turned = self.axes.endswith(("K O", "K (O G)"))
        out, rest = (sizes[1], sizes[0]) if turned else (sizes[0], sizes[1])
        return out // (len(self.projections) if "G" in self.axes else 1), rest


@dataclass
class Made:
    """What a set was made of: placed tensors by name, rows by stack, common tensors."""

    experts: dict[str, Fused]
    rows: dict[str, Row]
    common: dict[str, torch.Tensor]
    ep: int
    unplaced: dict[str, Fused] = field(default_factory=dict)

    def expected(self, rank: int, rows: Mapping[str, Row] | None = None) -> dict[str, torch.Tensor]:
        """What a rank must load: independent of all code under test."""
        out = dict(self.common) | {n: f.value for n, f in self.unplaced.items()}
        for name, fused in self.experts.items():
            if fused.everyone:
                out[name] = fused.value
                continue
            row = (rows or self.rows)[fused.stack]
            share = len(row) // self.ep
            mine = row[rank * share : (rank + 1) * share]
            if fused.per_expert is None:
                out[name] = torch.stack([fused.value[e] for e in mine])
            else:
                for slot, e in enumerate(mine):
                    out[fused.per_expert.format(slot)] = fused.value[e]
        return out


def numbers(*shape: int, start: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that all differ (as far as the dtype can)."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return (torch.arange(count) + start).reshape(shape).to(dtype)


def checkpoint(
    *,
    experts: int = 5,
    width: int = 4,
    hidden: int = 8,
    row: Row = (2, 0, 1, 3, 4, 0),
    ep: int = 2,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
    per_expert: bool = False,
    start: int = 0,
) -> Made:
    """A small MoE: embedding, router, fused experts with a scale for each."""
    made = Made({}, {}, {}, ep)
    made.common["model.embed.weight"] = numbers(7, hidden, start=start, dtype=dtype)
    for layer in range(layers):
        stack = f"model.layers.{layer}.mlp.experts"
        made.rows[stack] = row
        base = start + 10_000 * (layer + 1)
        made.common[f"model.layers.{layer}.mlp.gate.weight"] = numbers(
            experts, hidden, start=base, dtype=dtype
        )
        up = numbers(experts, 2 * width, hidden, start=base + 1000, dtype=dtype)
        down = numbers(experts, hidden, width, start=base + 5000, dtype=dtype)
        scale = numbers(experts, start=start)
        if per_expert:
            made.experts[f"{stack}.g"] = Fused(
                stack,
                up[:, :width].clone(),
                "O K",
                ("gate",),
                per_expert=f"{stack}.{{}}.gate.weight",
            )
            made.experts[f"{stack}.u"] = Fused(
                stack, up[:, width:].clone(), "O K", ("up",), per_expert=f"{stack}.{{}}.up.weight"
            )
            made.experts[f"{stack}.d"] = Fused(
                stack, down, "O K", ("down",), per_expert=f"{stack}.{{}}.down.weight"
            )
            made.experts[f"{stack}.s"] = Fused(
                stack, scale, "", ("down",), "scale", small=True,
                per_expert=f"{stack}.{{}}.down.scale",
            )  # fmt: skip
        else:
            made.experts[f"{stack}.gate_up_proj"] = Fused(stack, up)
            made.experts[f"{stack}.down_proj"] = Fused(stack, down, "E O K", ("down",))
            made.experts[f"{stack}.down_proj_scale"] = Fused(
                stack, scale, "E", ("down",), "scale", small=True
            )
    return made


# --- writing -----------------------------------------------------------------------------------
_NAMES: Final = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.uint8: "U8", torch.float64: "F64", torch.bool: "BOOL", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint16: "U16", torch.uint32: "U32",
    torch.uint64: "U64", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: "F4",
}  # fmt: skip


def raw(tensor: torch.Tensor) -> bytes:
    """Its bytes, whatever the dtype."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@dataclass
class Named:
    """A tensor to write, and what the manifest says of it."""

    name: str
    value: torch.Tensor
    expert: ExpertEntry | None = None
    digest: bytes = b""  # of what the units' digests are

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored: two F4 values are one element in torch."""
        sizes = tuple(self.value.shape)
        return (*sizes[:-1], sizes[-1] * 2) if _NAMES[self.value.dtype] == "F4" else sizes

    @property
    def digests(self) -> tuple[str, ...]:
        """The true one of a common tensor; of experts any, the loader never compares them."""
        if self.expert is None:
            return (digest(raw(self.value)),)
        return (digest(self.digest),) * self.expert.units


def write_data(path: Path, tensors: Sequence[Named], rank: int | None) -> Part:
    """One data file: stock safetensors bytes, the header padded to a page."""
    ordered = sorted(tensors, key=lambda t: (-t.value.dtype.itemsize, t.name))
    stock = json.loads(_header(save({"x": torch.zeros(1)}))[8:])
    assert set(stock["x"]) == {"dtype", "shape", "data_offsets"}
    doc: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in ordered:
        size = len(raw(t.value))
        kind = _NAMES[t.value.dtype]
        doc[t.name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(doc).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    header = struct.pack("<Q", len(text)) + text
    path.write_bytes(header + b"".join(raw(t.value) for t in ordered))
    entries = []
    for t in ordered:
        a, b = doc[t.name]["data_offsets"]  # type: ignore[index]
        start, stop = len(header) + a, len(header) + b
        kind = _NAMES[t.value.dtype]
        entries.append(TensorEntry(t.name, kind, t.shape, start, stop, t.digests, t.expert))
    return Part(path.name, len(header) + at, len(header), digest(header), tuple(entries), rank)


def _header(file: bytes) -> bytes:
    return file[: 8 + struct.unpack("<Q", file[:8])[0]]


def _named(made: Made, rank: int | None) -> list[Named]:
    """The tensors of a rank's files, or of the common ones."""
    numbers_of = {stack: n for n, stack in enumerate(stacks_of(made))}
    out = []
    if rank is None:
        out += [Named(name, value) for name, value in made.common.items()]
    for name, fused in {**made.experts, **made.unplaced}.items():
        placed, count = name in made.experts, experts_of(made, fused.stack)
        everyone = ExpertEntry(
            numbers_of[fused.stack], tuple(range(count)), fused.projections, fused.component,
            fused.axes, fused.matrix, None,
        )  # fmt: skip
        row = made.rows.get(fused.stack, ())
        share = len(row) // made.ep
        as_it_is = not placed or (fused.small and fused.per_expert is None)
        if rank is None and as_it_is:
            out.append(Named(name, fused.value, everyone))
        elif rank is None and fused.small and fused.per_expert is not None:
            local = fused.per_expert.format("{slot}")
            out += [
                Named(
                    fused.per_expert.format(e),
                    fused.value[e],
                    replace(everyone, experts=(e,), local=local),
                )
                for e in range(count)
            ]
        elif rank is not None and placed and not fused.small:
            first = rank * share
            mine = row[first : first + share]
            if fused.per_expert is None:
                held = replace(everyone, experts=mine, slots=(first, first + share))
                out.append(Named(name, torch.stack([fused.value[e] for e in mine]), held))
            else:
                for slot, e in enumerate(mine):
                    held = replace(everyone, experts=(e,), slots=(first + slot, first + slot + 1))
                    out.append(Named(fused.per_expert.format(slot), fused.value[e], held))
    return out


def experts_of(made: Made, stack: str) -> int:
    """How many experts a stack has."""
    several = {**made.experts, **made.unplaced}.values()
    return max(len(f.value) for f in several if f.stack == stack and not f.everyone)


def stacks_of(made: Made) -> list[str]:
    """The stacks in order."""
    return list(dict.fromkeys(f.stack for f in {**made.experts, **made.unplaced}.values()))


def _root(made: Made, parts: list[FileEntry], origin: FileEntry, ep: int | None) -> Root:
    stacks = []
    for name in stacks_of(made):
        row = made.rows.get(name) if ep is not None else None
        stacks.append(StackEntry(name, "r", "fused", "fused", experts_of(made, name), 1, 1, row))
    return Root(
        generator="by hand",
        recipes=(RecipeText("r", ""),),
        stacks=tuple(stacks),
        parts=tuple(parts),
        index=None,
        origin=origin,
        sidecars=(),
        tensor_count=0,
        tensor_bytes=0,
        fingerprint="0" * 32,
        ep_size=ep,
    )


def _document(out: Path, name: str, data: bytes) -> FileEntry:
    (out / name).write_bytes(data)
    return FileEntry(name, len(data), digest(data))


def write_set(
    out: Path,
    made: Made,
    *,
    split: bool = False,
    edit: Callable[[list[Named], int | None], list[Named]] = lambda named, _: named,
) -> Path:
    """An expert-parallel set. split: a rank has two files. edit: what to write instead."""
    (out / "moeconv").mkdir(parents=True)
    origin = _document(out, ORIGIN_NAME, b"{}\n")
    entries = []
    root = _root(made, [], origin, made.ep)
    for document, rank in part_names(root.ep_size).items():
        stem = "common" if rank is None else rank_name(rank, made.ep)
        named = edit(_named(made, rank), rank)
        halves = [named[::2], named[1::2]] if split and rank is not None else [named]
        parts = tuple(
            write_data(out / f"{stem}-{n:05d}-of-{len(halves):05d}.safetensors", half, rank)
            for n, half in enumerate(halves, start=1)
        )
        assert document == COMMON_PART or rank is not None
        entries.append(_document(out, document, rank_part_bytes(rank, parts)))
    (out / "moeconv.json").write_bytes(root_bytes(replace(root, parts=tuple(entries))))
    return out


def write_whole(out: Path, made: Made) -> Path:
    """A whole set of the same tensors, two data files."""
    (out / "moeconv").mkdir(parents=True)
    whole = Made({}, {}, made.common, 1, {**made.experts, **made.unplaced})
    named = _named(whole, None)
    entries = []
    for n, half in enumerate((named[::2], named[1::2]), start=1):
        name = f"model-{n:05d}-of-00002.safetensors"
        part = write_data(out / name, half, None)
        entries.append(_document(out, part_name(name), part_bytes(part)))
    index = _document(out, "model.safetensors.index.json", b"{}")
    origin = _document(out, ORIGIN_NAME, b"{}\n")
    root = replace(_root(whole, entries, origin, None), index=index)
    (out / "moeconv.json").write_bytes(root_bytes(root))
    return out


def write_virtual(out: Path, source: Path, made: Made, *, shift: int = 0) -> Path:
    """A virtual set over one whole fused file in `source`. shift: odd bytes before the data."""
    (out / "moeconv").mkdir(parents=True)
    source.mkdir(parents=True, exist_ok=True)
    whole = Made({}, {}, made.common, 1, {**made.experts, **made.unplaced})
    named = _named(whole, None)
    if shift:
        named.append(Named("aaa.pad", numbers(shift, dtype=torch.uint8)))
    part = write_data(source / "model.safetensors", named, None)
    facts = (source / "model.safetensors").stat()
    pinned = SourceFile(
        part.file, facts.st_size, facts.st_mtime_ns, part.header_size, part.header_digest
    )
    where = {t.name: t for t in part.tensors}
    origin = _document(out, ORIGIN_NAME, b"{}\n")
    root = replace(_root(made, [], origin, made.ep), source=SourceEntry(str(source), (pinned,)))
    entries = []
    for document, rank in part_names(root.ep_size).items():
        tensors = []
        for t in _named(made, rank):
            at, experts = where[t.name], t.expert.experts if t.expert else ()
            size = at.stop - at.start
            if rank is not None:
                size //= len(made.experts[t.name].value)
                runs = tuple(Run(0, at.start + e * size, size) for e in experts)
            else:
                runs = (Run(0, at.start, size),)
            kind = _NAMES[t.value.dtype]
            tensors.append(TensorEntry(t.name, kind, t.shape, 0, 0, (), t.expert, runs))
        virtual = Part("", 0, 0, "", tuple(tensors), rank)
        entries.append(_document(out, document, rank_part_bytes(rank, (virtual,))))
    (out / "moeconv.json").write_bytes(root_bytes(replace(root, parts=tuple(entries))))
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def all_same(found: Tensors, expected: Tensors) -> None:
    """The same names with the same bytes."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert same(found[name], value), name
