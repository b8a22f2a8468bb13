"""Two stacks in one row of expert ids (text, then vision): each name on a rank is one expert's."""

import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moeconv
from moeconv import runtime
from moeconv.errors import ConfigMismatch, NameCollision
from tests.helpers import Spec, tree_sha256, write_checkpoint
from tests.shard.test_shards import rows

HIDDEN = 8
SHAPES = {"plain": None, "by tensor": (), "by channel": (-1, 1)}
Kinds = tuple[str, str]


@dataclass(frozen=True)
class Ernie:
    """A checkpoint, and which expert (layer, kind, number in its stack) each tensor is of."""

    tensors: dict[str, Spec]
    config: dict[str, object]
    owner: dict[bytes, tuple[int, str, int]]


def ernie(experts: tuple[int, int], scaled: Kinds, *, layers: int = 1, seed: int = 0) -> Ernie:
    """Every tensor has bytes of its own, so that they tell whose they are."""
    rnd, owner = random.Random(seed), {}
    tensors: dict[str, Spec] = {"model.norm.weight": ("BF16", (HIDDEN,), rnd.randbytes(2 * HIDDEN))}
    widths = (6, 4)

    def put(name: str, dtype: str, shape: tuple[int, ...], whose: tuple[int, str, int]) -> None:
        size = {"BF16": 2, "F32": 4, "F8_E4M3": 1}[dtype]
        for n in shape:
            size *= n
        tensors[name] = (dtype, shape, rnd.randbytes(size))
        owner[tensors[name][2]] = whose

    for layer in range(layers):
        for e in range(sum(experts)):
            number = int(e >= experts[0])
            whose = (layer, ("text", "vision")[number], e - number * experts[0])
            width, form = widths[number], scaled[number]
            for p, out, inner in (
                ("gate", width, HIDDEN),
                ("up", width, HIDDEN),
                ("down", HIDDEN, width),
            ):
                name = f"model.layers.{layer}.mlp.experts.{e}.{p}_proj"
                dtype, scale = "BF16" if form == "plain" else "F8_E4M3", SHAPES[form]
                put(f"{name}.weight", dtype, (out, inner), whose)
                if scale is not None:
                    shape = tuple(out if n < 0 else n for n in scale)
                    put(f"{name}.weight_scale", "F32", shape, whose)
                    put(f"{name}.input_scale", "F32", (), whose)
    config: dict[str, object] = {
        "model_type": "ernie4_5_vl_moe",
        "text_config": {
            "moe_num_experts": list(experts),
            "moe_intermediate_size": list(widths),
            "hidden_size": HIDDEN,
            "num_hidden_layers": layers,
        },
    }
    if set(scaled) != {"plain"}:
        config["quantization_config"] = {"quant_method": "fp8"}
    return Ernie(tensors, config, owner)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def experts_by_name(
    shard: runtime.Shard, owner: dict[bytes, tuple[int, str, int]]
) -> dict[tuple[int, int], tuple[str, int]]:
    """Which expert the tensors with each (layer, number) in their names are of: one, or it fails.

    Each has a weight of all projections, and the scales of its kind.
    """
    found: dict[tuple[int, int], set[tuple[str, int]]] = {}
    parts: dict[tuple[int, int], set[str]] = {}
    for name, tensor in shard.load().items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(.+)", name)
        if match is None:
            assert name == "model.norm.weight"
            continue
        key = int(match[1]), int(match[2])
        layer, kind, expert = owner[raw(tensor)]
        assert layer == key[0]
        found.setdefault(key, set()).add((kind, expert))
        parts.setdefault(key, set()).add(match[3])
    for key, whose in found.items():
        assert len(whose) == 1, (key, whose)
    by_kind: dict[str, set[str]] = {}
    for key, names in parts.items():
        ((kind, _),) = found[key]
        assert by_kind.setdefault(kind, names) == names
        assert {f"{p}_proj.weight" for p in ("gate", "up", "down")} <= names
    return {key: whose.pop() for key, whose in found.items()}


@settings(max_examples=15)
@given(
    experts=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    scaled=st.tuples(*(st.sampled_from(sorted(SHAPES)) for _ in range(2))),
    ep=st.sampled_from((1, 2, 3)),
    virtual=st.booleans(),
    data=st.data(),
)
def test_each_name_on_a_rank_is_one_experts(
    experts: tuple[int, int], scaled: Kinds, ep: int, virtual: bool, data: st.DataObject
):
    made = ernie(experts, scaled, layers=2)
    names = {
        kind: [f"model.layers.{n}{tail}" for n in range(2)]
        for kind, tail in (("text", ".mlp"), ("vision", ""))
    }
    # a stack that the map leaves out is trivial, or whole where it cannot be shared out
    placed = {
        name: (data.draw(rows(count, ep)), kind)
        for (kind, several), count in zip(names.items(), experts, strict=True)
        for name in several
        if (count % ep and 3 * count > sum(experts)) or data.draw(st.booleans())
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        src = write_checkpoint(root / "src", made.tensors, made.config)
        try:
            moeconv.shard(
                src,
                root / "out",
                ep_size=ep,
                placement={name: row for name, (row, _) in placed.items()} or "trivial",
                allow_duplicates=True,
                layout="per-expert",
                virtual=virtual,
            )
        except NameCollision:  # the common files count experts, and this rank has more slots
            assert any(kind == "text" and len(r) // ep > experts[0] for r, kind in placed.values())
            return
        assert moeconv.verify(root / "out", level="structure").problems == ()
        report = moeconv.verify(root / "out", level="source", source=src)
        assert report.problems == ()
        for rank in range(ep):
            shard = runtime.open(root / "out", ep_rank=rank, ep_size=ep)
            got = experts_by_name(shard, made.owner)
            for layer in range(2):
                mine = [whose for key, whose in sorted(got.items()) if key[0] == layer]
                want = [
                    (kind, e)
                    for kind in ("text", "vision")
                    for e in shard.logical_experts(names[kind][layer])
                ]
                assert mine == want  # in slot order: text first, then vision
        moeconv.merge(root / "out", root / "back")
        assert tree_sha256(root / "back") == tree_sha256(src)


@pytest.mark.parametrize("scaled", [("plain", "by tensor"), ("by tensor", "by tensor")])
def test_scales_have_the_numbers_of_their_weights(tmp_path: Path, scaled: Kinds):
    made = ernie((4, 4), scaled)
    src = write_checkpoint(tmp_path / "src", made.tensors, made.config)
    moeconv.shard(src, tmp_path / "out", ep_size=2, layout="per-expert", redundant=2)
    shard = runtime.open(tmp_path / "out", ep_rank=1, ep_size=2, verify="digest")
    numbers = [*range(3), *range(4, 7)]  # vision's begin where its ids begin
    experts = [*(("text", e) for e in (3, 0, 1)), *(("vision", e) for e in (3, 0, 1))]
    got = experts_by_name(shard, made.owner)
    assert got == {(0, n): e for n, e in zip(numbers, experts, strict=True)}


def test_more_slots_of_text_on_a_rank_than_ids(tmp_path: Path):
    made = ernie((2, 3), ("by tensor", "by channel"))
    src = write_checkpoint(tmp_path / "src", made.tensors, made.config)
    moeconv.shard(
        src,
        tmp_path / "out",
        ep_size=1,
        placement={"model.layers.0.mlp": (0, 1, 1, 0), "model.layers.0": (2, 1, 0)},
        allow_duplicates=True,
        layout="per-expert",
    )
    shard = runtime.open(tmp_path / "out", ep_rank=0, ep_size=1)
    text, vision = (("text", e) for e in (0, 1, 1, 0)), (("vision", e) for e in (2, 1, 0))
    want = {(0, n): e for n, e in enumerate((*text, *vision))}
    assert experts_by_name(shard, made.owner) == want


def test_a_name_for_two_things_is_refused(tmp_path: Path):
    """Vision's scales are called 2, 3, 4 in the common files, and text has a slot 2 on a rank."""
    made = ernie((2, 3), ("by channel", "by tensor"))
    src = write_checkpoint(tmp_path / "src", made.tensors, made.config)
    with pytest.raises(NameCollision, match=r"experts\.2\."):
        moeconv.shard(
            src,
            tmp_path / "out",
            ep_size=2,
            placement={"model.layers.0.mlp": (0, 1, 1, 0, 1, 0), "model.layers.0": (0, 1, 2, 0)},
            allow_duplicates=True,
            layout="per-expert",
        )
    assert not (tmp_path / "out").exists()


# --- lists in config.json ----------------------------------------------------------------------
@settings(max_examples=15)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 3))
@example((2, 3), 2)
@example((3, 2), 2)
def test_a_list_of_two_kinds_is_not_one_of_two_layers(experts: tuple[int, int], layers: int):
    made = ernie(experts, ("plain", "plain"), layers=layers)
    with tempfile.TemporaryDirectory() as folder:
        src = write_checkpoint(Path(folder) / "src", made.tensors, made.config)
        plan = moeconv.fuse(src, Path(folder) / "out", dry_run=True).plan
        assert [s.experts for s in plan.stacks] == [*experts[::-1]] * layers


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("key", ["moe_num_experts", "moe_intermediate_size"])
@pytest.mark.parametrize("number", [0, 1])
def test_each_number_of_such_a_list_counts(tmp_path: Path, layers: int, key: str, number: int):
    made = ernie((3, 3), ("plain", "plain"), layers=layers)
    made.config["text_config"][key][number] += 1  # type: ignore[index]
    src = write_checkpoint(tmp_path / "src", made.tensors, made.config)
    with pytest.raises((ConfigMismatch, moeconv.errors.Malformed)):
        moeconv.fuse(src, tmp_path / "out", dry_run=True)
