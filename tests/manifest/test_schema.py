"""The JSON Schema: it takes what moeconv writes and FORMAT.md shows, and not what breaks a rule."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import moeconv
from moeconv.manifest.model import FORMAT, MAX_EP_SIZE, MINOR, PARTS_DIR
from tests.badinput.builders import config, qwen, write
from tests.manifest import samples
from tests.manifest.breaches import PARTS, ROOTS, Breach
from tests.manifest.epsamples import KINDS, fresh
from tests.manifest.samples import ROOT_NAME, body_of, edited

HERE = Path(moeconv.__file__).parent
SCHEMA = json.loads((HERE / "manifest.schema.json").read_bytes())
EVERYTHING = Draft202012Validator(SCHEMA)
EXAMPLE = re.compile(r"<!-- ([a-z-]+) -->\n```json\n(.*?)```\n<!-- /\1 -->", re.DOTALL)


def documents(made: Path) -> Iterator[tuple[str, Any]]:
    """The root and the parts of a set."""
    yield ROOT_NAME, json.loads(body_of((made / ROOT_NAME).read_bytes()))
    for path in sorted((made / PARTS_DIR).glob("*.json")):
        yield path.name, json.loads(path.read_bytes())


def refused(doc: Any) -> list[str]:
    """What the schema has against a document."""
    return [problem.message for problem in EVERYTHING.iter_errors(doc)]


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"].endswith(f":1.{MINOR}")
    sizes = SCHEMA["$defs"]["root"]["allOf"][0]["then"]["properties"]["sharding"]["properties"]
    assert sizes["ep_size"]["maximum"] == MAX_EP_SIZE
    assert SCHEMA["$defs"]["root"]["properties"]["format"]["const"] == FORMAT


@pytest.mark.parametrize("kind", KINDS)
def test_documents_for_ranks_are_taken(tmp_path: Path, kind: str):
    for name, doc in documents(fresh(tmp_path, kind)):
        assert not refused(doc), name


def test_documents_of_a_filled_virtual_output_are_taken(tmp_path: Path):
    made = fresh(tmp_path, "virtual")
    report = moeconv.verify(
        made, level="source", source=tmp_path / "source", recipe=tmp_path / "tiny.toml", fill=True
    )
    assert report.ok
    for name, doc in documents(made):
        assert not refused(doc), name


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_documents_of_a_whole_output_are_taken(tmp_path: Path, layout: str):
    src = write(tmp_path / "src", qwen(2, 2, 4), config=config(experts=2, width=2, hidden=4))
    moeconv.fuse(src, tmp_path / "out", layout=layout, max_shard_size=5000, jobs=1)
    found = list(documents(tmp_path / "out"))
    assert len(found) > 2
    for name, doc in found:
        assert not refused(doc), name


def test_the_examples_of_the_text_are_taken():
    shown = dict(EXAMPLE.findall((HERE / "FORMAT.md").read_text()))
    assert set(shown) == {
        "part", "root", "ep-root", "ep-common", "ep-rank", "virtual-root", "virtual-rank"
    }  # fmt: skip
    for name, text in shown.items():
        assert not refused(json.loads(text)), name


@pytest.mark.parametrize(
    "breach", [b for b in (*ROOTS, *PARTS) if b.expressed], ids=lambda b: f"{b.kind}: {b.name}"
)
def test_a_breach_that_a_schema_can_say_is_refused(tmp_path: Path, breach: Breach):
    path = fresh(tmp_path, breach.kind) / breach.document
    assert refused(json.loads(edited(path.read_bytes(), breach.edit)))


@pytest.mark.parametrize(
    "breach", [b for b in (*ROOTS, *PARTS) if not b.expressed], ids=lambda b: f"{b.kind}: {b.name}"
)
def test_the_other_breaches_are_beyond_a_schema(tmp_path: Path, breach: Breach):
    # where the schema learns to say one of them, the table of breaches should say so
    path = fresh(tmp_path, breach.kind) / breach.document
    assert not refused(json.loads(edited(path.read_bytes(), breach.edit)))


@pytest.mark.parametrize("document", [samples.ROOT, samples.PART], ids=["root", "part"])
def test_every_member_is_required_and_none_other_is_taken(document: bytes):
    doc = json.loads(body_of(document))
    for holder in _objects(doc):
        holder["sizee"] = 1
        assert refused(doc)
        del holder["sizee"]
        holder["x-note"] = [1.5, None]
        assert not refused(doc)
        del holder["x-note"]
        for member in [m for m in holder if m != "expert"]:
            value = holder.pop(member)
            assert refused(doc), member
            holder[member] = value
    assert not refused(doc)


def _objects(doc: Any) -> list[dict[str, Any]]:
    below = doc.values() if isinstance(doc, dict) else doc if isinstance(doc, list) else ()
    own = [doc] if isinstance(doc, dict) else []
    return own + [found for item in list(below) for found in _objects(item)]


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../b", "a//b", "a\\b", "", ".", "x\0", "x\n", "c:x", "nul", "x/",
     "./x", "y" * 256, "\u202ex", "a/COM1.txt"],
)  # fmt: skip
def test_a_name_that_is_a_path_is_refused(name: str):
    doc = json.loads(samples.ROOT_BODY)
    doc["sidecars"][0]["name"] = name
    assert refused(doc)


@pytest.mark.parametrize("digest", ["", "0" * 31, "0" * 33, "F" * 32, "0" * 32 + "\n", 0, None])
def test_an_invalid_digest_is_refused(digest: object):
    doc = json.loads(samples.ROOT_BODY)
    doc["origin"]["digest"] = digest
    assert refused(doc)
