"""The smallest fused set, byte for byte: a change here is a change of the format.

`MOECONV_UPDATE_GOLDEN=1` writes the files anew; read the difference before you commit it.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

import moeconv
from moeconv.core.digest import digest
from moeconv.version import __version__
from tests.badinput.builders import Tensors, config, entries, framed, nbytes
from tests.manifest.samples import DATA, INDEX_NAME, ORIGIN_NAME, PART_NAME, ROOT_NAME, signed

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
RECIPE = GOLDEN / "recipe.toml"
GENERATOR = b'"generator":"moeconv VERSION"'
STACK = "model.layers.0.mlp.experts"
SPECS: Tensors = {
    f"{STACK}.{expert}.{name}_proj.weight": ("BF16", (1, 1))
    for expert in (0, 1)
    for name in ("gate", "up", "down")
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stack, two experts, H = I = 1: the numbers 0 to 11 as bytes, fused."""
    src = tmp_path_factory.mktemp("golden") / "src"
    src.mkdir()
    data = bytes(range(sum(map(nbytes, SPECS.values()))))
    (src / "model.safetensors").write_bytes(framed(entries(SPECS)) + data)
    said = config("smallest_moe", experts=2, width=1, hidden=1)
    (src / "config.json").write_text(json.dumps(said))
    out = src.with_name("out")
    moeconv.fuse(src, out, recipe=RECIPE)
    return out


def _as_golden(made: Path, name: str) -> bytes:
    raw = (made / name).read_bytes()
    if name != ROOT_NAME:
        return raw
    # the version is the one thing that changes with every release
    body = raw.partition(b"\n")[0]
    generator = f'"generator":"moeconv {__version__}"'.encode()
    assert body.count(generator) == 1
    return signed(body.replace(generator, GENERATOR))


@pytest.mark.parametrize("name", [DATA, INDEX_NAME, PART_NAME, ORIGIN_NAME, ROOT_NAME])
def test_the_smallest_output_has_exactly_these_bytes(made: Path, name: str):
    golden = GOLDEN / "smallest" / name
    raw = _as_golden(made, name)
    if os.environ.get("MOECONV_UPDATE_GOLDEN") == "1":
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_bytes(raw)
    assert raw == golden.read_bytes()


def test_the_last_line_is_the_digest_of_the_first(made: Path):
    body, mark, end = (made / ROOT_NAME).read_bytes().split(b"\n")
    assert mark.decode() == digest(body)
    assert end == b""


def test_data_begins_on_a_page_and_is_in_the_order_of_the_axes(made: Path):
    raw = (made / DATA).read_bytes()
    assert int.from_bytes(raw[:8], "little") == 4096 - 8
    # the source has gate, up, down of expert 0, then of expert 1; `down_proj` sorts first
    down = bytes([4, 5, 10, 11])
    gate_up = bytes([0, 1, 2, 3, 6, 7, 8, 9])
    assert raw[4096:] == down + gate_up


def test_the_same_again_gives_the_same_bytes(made: Path):
    src = made.with_name("src")
    again = made.with_name("again")
    moeconv.fuse(src, again, recipe=RECIPE, jobs=3)
    for name in (DATA, INDEX_NAME, PART_NAME, ORIGIN_NAME, ROOT_NAME):
        assert (again / name).read_bytes() == (made / name).read_bytes()


def test_the_way_back_gives_the_source(made: Path):
    src = made.with_name("src")
    back = made.with_name("back")
    moeconv.unfuse(made, back)
    assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in src.iterdir())
    for path in src.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()


def test_the_golden_files_are_opened_and_verified(made: Path, tmp_path: Path):
    """Their recipe lacks the fields that recipes have had since: the defaults must do."""
    shutil.copytree(GOLDEN / "smallest", tmp_path / "set")
    shutil.copy(made / "config.json", tmp_path / "set")
    assert moeconv.verify(tmp_path / "set").problems == ()
    assert moeconv.fingerprint(tmp_path / "set") == moeconv.fingerprint(made)
