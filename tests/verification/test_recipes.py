"""`verify --source` does not believe the recipes of OUT: any bytes can be right by some recipe."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeconv
from moeconv.errors import Damaged, UnknownFamily
from moeconv.layout.shipped import load_recipe
from tests.badinput.builders import config, qwen, write
from tests.verification.forged import rename_in_recipe, resign, tensors_of

FUSED = 'gate_up = "{stack}.gate_up_proj{suffix}: E (G O) K"'
DOWN = 'down = "{stack}.down_proj{suffix}: E O K"'


def against(out: Path, src: Path, **more: Any) -> str:
    """All that `verify --source` says, which must be no."""
    report = moeconv.verify(out, level="source", source=src, **more)
    assert not report.ok
    return "\n".join(map(str, report.problems))


def swap_halves(out: Path) -> None:
    """Up over gate in every fused tensor of a set, and in all that it says of them."""

    def part(doc: Any) -> None:
        for file in doc.get("files", [doc]):
            path = out / file["file"]
            raw = bytearray(path.read_bytes())
            for t in file["tensors"]:
                if not t["name"].endswith("gate_up_proj"):
                    continue
                data = np.frombuffer(raw[t["start"] : t["stop"]], np.uint8)
                halves = data.reshape(t["shape"][0], 2, -1)
                raw[t["start"] : t["stop"]] = halves[:, ::-1].tobytes()
                t["expert"]["projections"] = ["up", "gate"]
                pairs = zip(t["digests"][::2], t["digests"][1::2], strict=True)
                t["digests"] = [value for gate, up in pairs for value in (up, gate)]
            path.write_bytes(raw)

    resign(out, part=part, root=rename_in_recipe(FUSED, FUSED.replace("gate_up =", "up_gate =")))


@pytest.mark.parametrize("kind", ["out", "ranks"])
def test_gate_and_up_exchanged_in_bytes_and_recipe(
    kind: str, src: Path, request: pytest.FixtureRequest
):
    out: Path = request.getfixturevalue(kind)
    swap_halves(out)
    assert moeconv.verify(out).ok, "the forgery must be whole, or it shows nothing"
    stated = against(out, src)
    assert "recipe `qwen3_moe` in `OUT` is not the known recipe" in stated
    assert "up and gate as" in stated


def test_a_transposed_matrix_of_the_recipe(out: Path, src: Path):
    """Square, so no shape speaks against it."""
    (data,) = out.glob("*.safetensors")
    raw = bytearray(data.read_bytes())

    def part(doc: Any) -> None:
        for t in tensors_of(doc):
            if t["name"].endswith("down_proj"):
                whole = np.frombuffer(raw[t["start"] : t["stop"]], "u2").reshape(t["shape"])
                raw[t["start"] : t["stop"]] = whole.transpose(0, 2, 1).tobytes()
                t["expert"]["axes"] = "E K O"
        data.write_bytes(raw)

    resign(out, part=part, root=rename_in_recipe(DOWN, DOWN.replace("E O K", "E K O")))
    assert moeconv.verify(out).ok
    assert "`{stack}.down_proj{suffix}: E K O`" in against(out, src)


def turn(out: Path, end: str, axes: str, *, item: str = "u2", layout: str | None = None) -> None:
    """Transpose what each expert has in tensors whose names end so, and say that they are so."""

    def part(doc: Any) -> None:
        for file in doc.get("files", [doc]):
            path = out / file["file"]
            raw = bytearray(path.read_bytes())
            for t in file["tensors"]:
                if t["name"].endswith(end):
                    whole = np.frombuffer(raw[t["start"] : t["stop"]], item).reshape(t["shape"])
                    raw[t["start"] : t["stop"]] = whole.transpose(0, 2, 1).tobytes()
                    t["expert"]["axes"] = axes
            path.write_bytes(raw)

    def root(doc: Any) -> None:
        for stack in doc["stacks"]:
            stack["layout"] = layout or stack["layout"]

    resign(out, part=part, root=root)


def test_a_layout_that_is_only_ever_read(tmp_path: Path):
    """The shipped recipe has it, for files that a program mixed up; loaders go by the shape."""
    tensors = qwen(4, 8, 16, layers=2)
    stated = config("qwen3_vl_moe", width=8, hidden=16, num_hidden_layers=2)
    src, out = write(tmp_path / "src", tensors, config=stated), tmp_path / "out"
    moeconv.fuse(src, out)
    turn(out, "gate_up_proj", "E K (G O)", layout="mixed-gate-up")
    assert moeconv.verify(out).ok, "the forgery must be whole, or it shows nothing"
    assert "layout `mixed-gate-up` is never written" in against(out, src)
    with pytest.raises(Damaged, match="mixed-gate-up"):
        moeconv.fingerprint(out)


def test_axes_that_are_only_read_where_those_that_are_written_fit_too(tmp_path: Path):
    """Scales of a grid that is square for gate and up together."""
    tensors: dict[str, Any] = {}
    for expert in range(2):
        for name, rows, columns in (("gate", 2, 4), ("up", 2, 4), ("down", 4, 2)):
            base = f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"
            data = bytes((7 * expert + n) % 251 for n in range(rows * columns * 16))
            tensors[base] = ("F8_E4M3", [rows * 4, columns * 4], data)
            scales = np.arange(rows * columns, dtype="<f4") + 100 * expert + len(name)
            tensors[f"{base}_scale_inv"] = ("F32", [rows, columns], scales.tobytes())
    more: dict[str, Any] = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}
    }
    stated = config("qwen3_vl_moe", experts=2, width=8, hidden=16, num_hidden_layers=1, **more)
    src, out = write(tmp_path / "src", tensors, config=stated), tmp_path / "out"
    moeconv.shard(src, out, ep_size=2, layout="hub")
    assert moeconv.verify(out, level="source", source=src).problems == ()
    turn(out, "gate_up_proj_scale_inv", "E (G O/4) K/4", item="u4")
    assert moeconv.verify(out).ok, "the forgery must be whole, or it shows nothing"
    assert "loaders read it as `E K/block.1 (G O/block.0)`" in against(out, src)


@pytest.mark.parametrize("kind", ["out", "ranks"])
def test_diff_and_fingerprint_believe_such_recipes_no_more(
    kind: str, src: Path, request: pytest.FixtureRequest
):
    out: Path = request.getfixturevalue(kind)
    swap_halves(out)
    for look in (lambda: moeconv.diff(src, out), lambda: moeconv.fingerprint(out)):
        with pytest.raises(Damaged, match="is not the known recipe"):
            look()
    assert moeconv.fingerprint(out, recorded=True) == moeconv.fingerprint(src)


def test_diff_believes_no_recipe_of_another_name_beside_a_known_one(out: Path, src: Path):
    def root(doc: Any) -> None:
        text = doc["recipes"][0]["toml"]
        toml = text.replace('name = "qwen3_moe"', 'name = "nobodys"')
        doc["recipes"] = [{"name": "nobodys", "toml": toml}]
        for stack in doc["stacks"]:
            stack["recipe"] = "nobodys"

    resign(out, root=root)
    for one, two in ((src, out), (out, src)):
        with pytest.raises(Damaged, match="of recipe `qwen3_moe`, not of `nobodys`"):
            moeconv.diff(one, two)


def test_a_layout_of_the_origin_that_would_be_restored_wrong(out: Path, src: Path):
    """OUT itself is right; its way back is not."""

    def root(doc: Any) -> None:
        text = doc["recipes"][0]["toml"]
        text = text.replace('gate = "{stack}.{expert}.gate_proj', 'gate = "{stack}.{expert}.X')
        text = text.replace('up = "{stack}.{expert}.up_proj', 'up = "{stack}.{expert}.gate_proj')
        doc["recipes"][0]["toml"] = text.replace("{expert}.X", "{expert}.up_proj")

    resign(out, root=root)
    assert moeconv.verify(out).ok
    assert "layout `per-expert` has other lines" in against(out, src)


def test_another_layout_for_the_origin(out: Path, src: Path):
    def root(doc: Any) -> None:
        for stack in doc["stacks"]:
            stack["origin_layout"] = "stacked"

    resign(out, root=root)
    assert "was not in the layout that OUT records" in against(out, src)


def test_parts_that_contradict_the_recipe(out: Path, src: Path):
    """The loader goes by them."""

    def part(doc: Any) -> None:
        for t in tensors_of(doc):
            if t["name"].endswith("gate_up_proj"):
                t["expert"]["projections"] = ["up", "gate"]

    resign(out, part=part)
    assert "does not match its part" in against(out, src)


def test_digests_that_are_not_those_of_the_bytes(out: Path, ranks: Path, src: Path):
    for made in (out, ranks):
        wrong = "0" * 32

        def part(doc: Any, wrong: str = wrong) -> None:
            for t in tensors_of(doc):
                if t["name"] == "model.embed_tokens.weight":
                    t["digests"] = [wrong]

        resign(made, part=part)
        stated = against(made, src)
        assert "OUT records a wrong digest of `model.embed_tokens.weight`" in stated


def test_a_source_that_is_an_output_is_believed_but_not_its_recipes(
    out: Path, src: Path, tmp_path: Path
):
    swap_halves(out)
    moeconv.fuse(out, tmp_path / "again")
    stated = against(tmp_path / "again", out)
    assert "in `OUT` is not the known recipe" in stated
    assert "in `SRC` is not the known recipe" in stated


def test_an_older_recipe_that_says_the_same_is_the_same(out: Path, ranks: Path, src: Path):
    """Fewer model types, another title, fewer layouts and components than today."""

    def root(doc: Any) -> None:
        text = doc["recipes"][0]["toml"]
        text = text.replace('"AXK1", ', "").replace("title = ", 'title = "old" # ')
        at = text.index("[layouts.kn]")
        doc["recipes"][0]["toml"] = text[:at] + text[text.index("[layouts.up-gate]") :]

    for made in (out, ranks):
        resign(made, root=root)
        assert moeconv.verify(made, level="source", source=src).problems == ()
    shutil.rmtree(ranks)
    moeconv.shard(out, ranks, ep_size=4)
    assert moeconv.verify(ranks, level="source", source=out).problems == ()


# --- recipes of a user's own -------------------------------------------------------------------
@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The large class under a name of the user's own."""
    text = load_recipe("qwen3_moe").toml
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('name = "qwen3_moe"', 'name = "mine"'))
    return path


def test_a_recipe_of_the_users_own_must_be_given(own: Path, src: Path, tmp_path: Path):
    made = tmp_path / "own"
    moeconv.fuse(src, made, recipe=own)
    stated = against(made, src)
    assert "recipe `mine` in `OUT`" in stated
    assert "--recipe FILE" in stated
    assert moeconv.verify(made, level="source", source=src, recipe=own).problems == ()
    own.write_text(own.read_text().replace(FUSED, FUSED.replace("gate_up =", "up_gate =")))
    assert "has other lines" in against(made, src, recipe=own)


def test_an_unknown_family_cannot_be_opened_without_it(own: Path, tmp_path: Path):
    foreign = {n.replace("mlp.experts", "mlp.unknown_experts"): s for n, s in qwen().items()}
    src = write(tmp_path / "foreign", foreign, config=config("nobody_knows"))
    own.write_text(own.read_text().replace("mlp.experts", "mlp.unknown_experts"))
    moeconv.fuse(src, tmp_path / "made", recipe=own)
    with pytest.raises(UnknownFamily):
        moeconv.verify(tmp_path / "made", level="source", source=src)
    assert moeconv.verify(tmp_path / "made", level="source", source=src, recipe=own).ok
    # a set as SRC carries it, and is believed
    moeconv.shard(tmp_path / "made", tmp_path / "ranks", ep_size=2)
    assert moeconv.verify(tmp_path / "ranks", level="source", source=tmp_path / "made").ok
