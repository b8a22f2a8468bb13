"""Every rule of expert-parallel and virtual sets, broken once: who refuses it, and how."""

from pathlib import Path

import pytest

import moeconv
from moeconv.api.open import open_source
from moeconv.errors import MoeconvError
from moeconv.manifest.part_reader import parse_parts
from moeconv.manifest.reader import parse_root
from tests.badinput.checks import holds, untouched, within
from tests.manifest.breaches import OPENING, PARTS, READER, ROOTS, Breach
from tests.manifest.broken import reported
from tests.manifest.epsamples import KINDS, fresh
from tests.manifest.samples import ROOT_NAME, edit_part, edit_root


def broken(root: Path, breach: Breach) -> Path:
    """A set with this one thing wrong, and everything signed anew."""
    made = fresh(root, breach.kind)
    if breach.document == ROOT_NAME:
        edit_root(made, breach.edit)
    else:
        edit_part(made, breach.edit, breach.document)
    return made


def _read(made: Path) -> None:
    root = parse_root((made / ROOT_NAME).read_bytes())
    for entry in root.parts:
        parse_parts((made / entry.name).read_bytes(), root, where=entry.name)


def _refused(call: object, made: Path, breach: Breach) -> None:
    with pytest.raises(MoeconvError) as caught:
        call(made)  # type: ignore[operator]
    holds(caught.value, breach.error, *breach.facts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_output_passes(tmp_path: Path, kind: str):
    made = fresh(tmp_path, kind)
    _read(made)
    assert not open_source(made).detection.problems
    assert moeconv.verify(made, level="structure", jobs=1).ok


@pytest.mark.parametrize("breach", [*ROOTS, *PARTS], ids=lambda b: f"{b.kind}: {b.name}")
def test_a_breach_is_refused(tmp_path: Path, breach: Breach):
    made = broken(tmp_path, breach)
    reported(made, breach.error, *breach.facts)
    if breach.by == READER:
        _refused(_read, made, breach)
        _refused(open_source, made, breach)
    if breach.by in (READER, OPENING):
        _refused(lambda place: open_source(place).detection.checked(), made, breach)
        out = made.with_name("out")
        with within(10), untouched(made, out):
            _refused(lambda place: moeconv.merge(place, out, jobs=1), made, breach)
    if breach.by == OPENING:
        _read(made)


def test_breaches_have_names_of_their_own():
    names = [(b.kind, b.name) for b in (*ROOTS, *PARTS)]
    assert len(set(names)) == len(names)
