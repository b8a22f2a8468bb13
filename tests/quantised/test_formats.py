"""Each format: dequantised after fusing as before, expert by expert, bit for bit; and back."""

from pathlib import Path

import numpy as np
import pytest

import moeconv
from moeconv.errors import UnknownLayout
from tests.helpers import Spec, read_tensors, tree_sha256, write_checkpoint
from tests.quantised.packing import FORMATS, Array, Floats, Format, Parts

STACK = "model.layers.0.mlp.experts"
E, I, H = 3, 64, 96  # noqa: E741 - the letters of the notation
SHAPES = {"gate": (I, H), "up": (I, H), "down": (H, I)}
ITEMS = {"F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "u4", "I8": "i1"}
# the others have blocks, groups or packed integers
UNPACKED = {
    "fp8 by tensor",
    "fp8 by tensor, a list of one",
    "int8 by tensor",
    "fp8 by channel",
    "int8 by channel, Ascend",
    "int8 by channel, one dimension",
}
CONFIG = {"model_type": "qwen3_moe", "moe_intermediate_size": I, "hidden_size": H}


def experts(form: Format, seed: int = 0) -> dict[tuple[int, str], Parts]:
    """Random experts, packed."""
    rng = np.random.default_rng(seed)
    return {(e, p): form.write(rng, *SHAPES[p]) for e in range(E) for p in SHAPES}


def spec(dtype: str, array: Array) -> Spec:
    return dtype, array.shape, array.tobytes()


def checkpoint(root: Path, form: Format, packed: dict[tuple[int, str], Parts]) -> Path:
    tensors = {
        f"{STACK}.{e}.{p}_proj.{part}": spec(form.dtypes[part], array)
        for (e, p), parts in packed.items()
        for part, array in parts.items()
    }
    return write_checkpoint(root, tensors, CONFIG | form.config)


def array(found: Spec) -> Array:
    dtype, shape, data = found
    return np.frombuffer(data, ITEMS.get(dtype, "u1")).reshape(shape)


def half(fused: Array, form: Format, part: str, e: int, place: int) -> Array:
    """Gate's or up's share of one expert's part, by the rules for each part, told by hand."""
    one = fused[e]
    alone = form.write(np.random.default_rng(0), I, H)[part].shape
    if one.shape == (2, *alone):  # stacked, not joined
        return one[place]
    axis = next(n for n, (a, b) in enumerate(zip(one.shape, alone, strict=True)) if a != b)
    return np.split(one, 2, axis=axis)[place]


def fused_parts(tensors: dict[str, Spec], form: Format, e: int, p: str) -> Parts:
    name = "down" if p == "down" else "gate_up"
    parts: Parts = {}
    for part, suffix in form.fused.items():
        whole = array(tensors[f"{STACK}.{name}_proj{suffix}"])
        parts[part] = (
            whole[e] if p == "down" else half(whole, form, part, e, ("gate", "up").index(p))
        )
    return parts


def same(one: Floats, other: Floats) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_the_same_and_the_way_back_is_exact(name: str, tmp_path: Path):
    form = FORMATS[name]
    packed = experts(form)
    src = checkpoint(tmp_path / "src", form, packed)
    moeconv.fuse(src, tmp_path / "out")
    made = read_tensors(tmp_path / "out")
    assert made.keys() == {
        f"{STACK}.{p}_proj{suffix}" for p in ("gate_up", "down") for suffix in form.fused.values()
    }
    for (e, p), parts in packed.items():
        again = fused_parts(made, form, e, p)
        for part, before in parts.items():
            assert again[part].tobytes() == before.tobytes(), part
        assert same(form.read(again), form.read(parts))
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()
    assert moeconv.fingerprint(tmp_path / "out") == moeconv.fingerprint(src)
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", ["sglang", "stacked", "megablocks", "kn", "up-gate"])
def test_every_layout_and_back(name: str, layout: str, tmp_path: Path):
    form = FORMATS[name]
    src = checkpoint(tmp_path / "src", form, experts(form))
    if layout in ("megablocks", "kn") and name not in UNPACKED:
        with pytest.raises(UnknownLayout, match=r"these work: .*`fused`"):
            moeconv.fuse(src, tmp_path / "out", layout=layout)
        return
    notes = moeconv.fuse(src, tmp_path / "out", layout=layout).plan.notes
    assert not any("no engine" in note for note in notes)
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()
    moeconv.fuse(tmp_path / "out", tmp_path / "fused")
    moeconv.fuse(src, tmp_path / "direct")
    assert read_tensors(tmp_path / "fused") == read_tensors(tmp_path / "direct")
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


@pytest.mark.parametrize("name", FORMATS)
def test_by_ranks_and_back(name: str, tmp_path: Path):
    form = FORMATS[name]
    src = checkpoint(tmp_path / "src", form, experts(form))
    for layout in ("fused", "per-expert"):
        out = tmp_path / layout
        moeconv.shard(src, out, ep_size=2, redundant=1, layout=layout)
        assert moeconv.verify(out, level="source", source=src).problems == ()
        moeconv.merge(out, tmp_path / f"{layout}-back")
        assert tree_sha256(tmp_path / f"{layout}-back") == tree_sha256(src)


def test_a_fused_output_warns_that_nothing_reads_it(tmp_path: Path):
    for name, told in (
        ("INT4, pack-quantized", "weight_packed"),
        ("GPTQ", "qweight"),
        ("AWQ", "qweight"),
        ("NVFP4 of modelopt", "weight_scale_2"),
        ("NVFP4 of compressed-tensors", "weight_global_scale"),
    ):
        form = FORMATS[name]
        src = checkpoint(tmp_path / name, form, experts(form))
        notes = moeconv.fuse(src, tmp_path / f"{name}-out", dry_run=True).plan.notes
        assert any(n.startswith(f"{told}: no engine") for n in notes), name
    form = FORMATS["fp8 by channel"]
    src = checkpoint(tmp_path / "fp8", form, experts(form))
    (note,) = moeconv.fuse(src, tmp_path / "fp8-out", dry_run=True).plan.notes
    assert note.startswith("weight_scale: transformers does not read")


@pytest.mark.parametrize("stacked", [False, True])
def test_it_says_so_of_every_family(stacked: bool, tmp_path: Path):
    """Step 3 has axes of its own for scales; what is said of them is what all say."""
    form, head = FORMATS["NVFP4 of modelopt"], "model.layers.0.moe"
    packed = experts(form)
    tensors = {
        f"{head}.experts.{e}.{p}_proj.{part}": spec(form.dtypes[part], array)
        for (e, p), parts in packed.items()
        for part, array in parts.items()
    }
    if stacked:
        tensors = {
            f"{head}.{p}_proj.{part}": spec(kind, np.stack([packed[e, p][part] for e in range(E)]))
            for p in SHAPES
            for part, kind in form.dtypes.items()
        }
    src = write_checkpoint(tmp_path / "src", tensors, CONFIG | {"model_type": "step3p5"})
    notes = moeconv.fuse(src, tmp_path / "out").plan.notes
    assert [n for n in notes if n.startswith("weight_scale_2: no engine")]
    assert [n for n in notes if n.startswith("weight_scale_2 of gate and up differ in 3 experts")]
    assert [n for n in notes if n.startswith("input_scale of gate and up differ in 3 experts")]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("NVFP4 of modelopt", "weight_scale_2"),
        ("NVFP4 of compressed-tensors", "weight_global_scale"),
        ("fp8 by tensor", "input_scale"),
        ("GPTQ", "g_idx"),
        ("INT4, pack-quantized, asymmetric", "weight_g_idx"),
    ],
)
def test_unequal_halves_are_kept_and_reported(name: str, part: str, tmp_path: Path):
    form = FORMATS[name]
    packed = experts(form)
    for e in range(E):
        for other in form.dtypes:
            # all alike, but for one expert's part
            if (e, other) != (1, part) and packed[e, "up"][other].shape == packed[e, "gate"][
                other
            ].shape:
                packed[e, "up"][other] = packed[e, "gate"][other]
    src = checkpoint(tmp_path / "src", form, packed)
    notes = moeconv.fuse(src, tmp_path / "out").plan.notes
    said = [n for n in notes if "gate and up differ" in n]
    assert len(said) == 1
    assert said[0].startswith(f"{part} of gate and up differ in 1 expert, kept apart")
    packed[1, "up"][part] = packed[1, "gate"][part]
    equal = checkpoint(tmp_path / "equal", form, packed)
    assert not any("differ" in n for n in moeconv.fuse(equal, tmp_path / "quiet").plan.notes)
