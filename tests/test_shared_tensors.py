"""A stored tensor that lacks an axis is shared by the matrices along it: read so, written if equal.

The recipe has every kind: one scale for each matrix, for each expert, for a whole stack.
"""

from pathlib import Path

import pytest

import moeconv
from moeconv.errors import UnequalShared
from tests.helpers import Spec, read_tensors, tree_sha256, write_checkpoint

STACK = "model.layers.0.ffn"
EXPERTS = 3
RECIPE = """
name = "shared"
stack = "{prefix}{layer}.ffn"

[layouts.alone]
gate = "{stack}.{expert}.gate.{component}: O K"
up = "{stack}.{expert}.up.{component}: O K"
down = "{stack}.{expert}.down.{component}: O K"

[layouts.each]                 # derived: E G, and E for down
gate_up = "{stack}.each_gate_up{suffix}: E (G O) K"
down = "{stack}.each_down{suffix}: E O K"

[layouts.expert]               # one scale for gate and up; one bias too
gate_up = "{stack}.expert_gate_up{suffix}: E (G O) K"
down = "{stack}.expert_down{suffix}: E O K"
[layouts.expert.axes.gate_up]
scale = "E"
bias = "E O"

[layouts.stack]                # one scale for all experts, in a tensor of one item or of none
gate_up = "{stack}.stack_gate_up{suffix}: E (G O) K"
down = "{stack}.stack_down{suffix}: E O K"
[layouts.stack.axes.gate_up]
scale = "1"
bias = "(G O)"
[layouts.stack.axes.down]
scale = ""

[components]
weight = { axes = "O K", suffix = "" }
scale = { axes = "", suffix = "_scale" }
bias = { axes = "O", suffix = "_bias" }
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The recipe's file."""
    path = tmp_path / "shared.toml"
    path.write_text(RECIPE)
    return path


def u8(*shape: int, data: bytes) -> Spec:
    """A tensor of bytes."""
    return ("U8", shape, data)


def weights() -> dict[str, Spec]:
    """gate and up [1, 2], down [2, 1] of every expert, all different."""
    out: dict[str, Spec] = {}
    for e in range(EXPERTS):
        out[f"{STACK}.{e}.gate.weight"] = u8(1, 2, data=bytes([10 * e, 10 * e + 1]))
        out[f"{STACK}.{e}.up.weight"] = u8(1, 2, data=bytes([10 * e + 2, 10 * e + 3]))
        out[f"{STACK}.{e}.down.weight"] = u8(2, 1, data=bytes([10 * e + 4, 10 * e + 5]))
    return out


def scales(gate: bytes, up: bytes, down: bytes) -> dict[str, Spec]:
    """One scalar for every expert's projections."""
    values = {"gate": gate, "up": up, "down": down}
    return {
        f"{STACK}.{e}.{p}.scale": u8(data=v[e : e + 1])
        for e in range(EXPERTS)
        for p, v in values.items()
    }


def companions(out: Path) -> dict[str, Spec]:
    """What is stored beside the weights."""
    return {
        name.removeprefix(f"{STACK}."): spec
        for name, spec in read_tensors(out).items()
        if name.endswith(("scale", "bias"))
    }


@pytest.mark.parametrize(
    ("layout", "given", "stored"),
    [
        (
            "each",
            scales(b"abc", b"def", b"ghi"),
            {
                "each_gate_up_scale": u8(3, 2, data=b"adbecf"),
                "each_down_scale": u8(3, data=b"ghi"),
            },
        ),
        (
            "expert",
            scales(b"abc", b"abc", b"ghi"),
            {"expert_gate_up_scale": u8(3, data=b"abc"), "expert_down_scale": u8(3, data=b"ghi")},
        ),
        (
            "stack",
            scales(b"aaa", b"aaa", b"zzz"),
            {"stack_gate_up_scale": u8(1, data=b"a"), "stack_down_scale": u8(data=b"z")},
        ),
    ],
)
def test_equal_values_are_stored_once(
    layout: str,
    given: dict[str, Spec],
    stored: dict[str, Spec],
    recipe: Path,
    tmp_path: Path,
):
    src = write_checkpoint(tmp_path / "src", weights() | given, {})
    out = tmp_path / "out"
    moeconv.fuse(src, out, recipe=recipe, layout=layout)
    assert companions(out) == stored
    assert moeconv.verify(out).problems == ()
    assert moeconv.verify(out, level="source", source=src, recipe=recipe).problems == ()
    assert moeconv.fingerprint(out) == moeconv.fingerprint(src, recipe=recipe)
    moeconv.unfuse(out, tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)

    # the same tensors from somebody else: every matrix gets its copy
    foreign = write_checkpoint(tmp_path / "foreign", read_tensors(out), {})
    assert moeconv.fingerprint(foreign, recipe=recipe) == moeconv.fingerprint(src, recipe=recipe)
    moeconv.fuse(foreign, tmp_path / "alone", recipe=recipe, layout="alone")
    assert read_tensors(tmp_path / "alone") == weights() | given


@pytest.mark.parametrize(
    ("layout", "given"),
    [
        ("expert", scales(b"abc", b"abx", b"ghi")),
        ("stack", scales(b"aaa", b"aaa", b"zzy")),
        ("stack", scales(b"aaa", b"bbb", b"zzz")),
        ("stack", scales(b"aab", b"aab", b"zzz")),
    ],
)
def test_unequal_values_are_refused(
    layout: str, given: dict[str, Spec], recipe: Path, tmp_path: Path
):
    src = write_checkpoint(tmp_path / "src", weights() | given, {})
    with pytest.raises(UnequalShared) as refusal:
        moeconv.fuse(src, tmp_path / "out", recipe=recipe, layout=layout)
    assert refusal.value.exit_code == 4
    assert "scale" in (refusal.value.at or "")
    assert not (tmp_path / "out").exists()


def test_from_one_kind_of_sharing_to_another(recipe: Path, tmp_path: Path):
    given = weights() | scales(b"aaa", b"aaa", b"zzz")
    src = write_checkpoint(tmp_path / "src", given, {})
    moeconv.fuse(src, tmp_path / "0", recipe=recipe, layout="stack")
    for n, layout in enumerate(("expert", "each", "stack", "each", "expert", "alone"), 1):
        moeconv.fuse(tmp_path / str(n - 1), tmp_path / str(n), layout=layout)
        assert moeconv.verify(tmp_path / str(n)).problems == ()
        assert moeconv.fingerprint(tmp_path / str(n)) == moeconv.fingerprint(tmp_path / "0")
    assert read_tensors(tmp_path / "6") == given


def test_a_shared_tensor_of_several_items(recipe: Path, tmp_path: Path):
    """A bias [E, O] for both gate and up, and one [2·O] for all experts."""
    bias = {
        f"{STACK}.{e}.{p}.bias": u8(len(v), data=v)
        for e in range(EXPERTS)
        for p, v in (("gate", b"g"), ("up", b"g"), ("down", b"xy"))
    }
    src = write_checkpoint(tmp_path / "src", weights() | bias, {})
    moeconv.fuse(src, tmp_path / "expert", recipe=recipe, layout="expert")
    assert companions(tmp_path / "expert") == {
        "expert_gate_up_bias": u8(3, 1, data=b"ggg"),
        "expert_down_bias": u8(3, 2, data=b"xyxyxy"),
    }
    moeconv.fuse(src, tmp_path / "stack", recipe=recipe, layout="stack")
    assert companions(tmp_path / "stack") == {
        "stack_gate_up_bias": u8(2, data=b"gg"),
        "stack_down_bias": u8(3, 2, data=b"xyxyxy"),
    }


def test_the_ledger_says_what_is_shared(recipe: Path, tmp_path: Path):
    src = write_checkpoint(tmp_path / "src", weights() | scales(b"aaa", b"aaa", b"zzz"), {})
    done = moeconv.fuse(src, tmp_path / "out", recipe=recipe, layout="stack", dry_run=True)
    verbs = {entry.source: entry.verb for entry in done.plan.ledger}
    assert verbs[f"{STACK}.1.gate.weight"] == "fused"
    assert verbs[f"{STACK}.1.gate.scale"] == "shared"
