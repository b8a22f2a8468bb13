"""Whatever a list means before a conversion it means after it, or it is said that it may not."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import moeconv
from moeconv.manifest.model import StackEntry
from moeconv.quantconfig.modules import Renamings
from moeconv.quantconfig.rename_document import renamed_document
from tests.families.listed import PLACES, TYPES, Place, document, layouts_of, stacks_of, texts
from tests.families.listed import universe as modules_in
from tests.families.test_tiny import family, shapes
from tests.phantoms import phantom


@cache
def renamings(model_type: str, old: str, new: str) -> Renamings:
    """As a plan from one layout to another would have them."""
    stacks = stacks_of(model_type)
    entries = []
    for stack in stacks:
        own = layouts_of(stack)
        sides = (own.get(name, stack.layout).name for name in (old, new))
        sizes = (stack.sizes.experts, stack.sizes.width, stack.sizes.hidden)
        before, after = sides
        entries.append(StackEntry(stack.name, stack.recipe.name, after, before, *sizes))
    return Renamings(stacks, entries)


def pairs(model_type: str) -> list[tuple[str, str]]:
    names = sorted({n for stack in stacks_of(model_type) for n in layouts_of(stack)})
    return [(old, new) for old in names for new in names if old != new]


def said(place: Place, notes: tuple[str, ...] | list[str]) -> bool:
    return any(f"`quantization_config.{place.key}`" in note and "left" in note for note in notes)


@pytest.mark.parametrize("model_type", TYPES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(PLACES))
def test_a_list_means_the_same_matrices(model_type: str, data: st.DataObject, place: Place):
    old, new = data.draw(st.sampled_from(pairs(model_type)))
    before, after = (modules_in(model_type, layout) for layout in (old, new))
    heads = sorted({stack for held in before.values() for stack, _, _ in held})
    names = data.draw(st.sampled_from([before, before, after]))  # a list may speak of no module yet
    found = data.draw(texts(place, sorted(names), heads))
    raw = document(place, found)
    made, notes = renamed_document(
        "config.json", raw, renamings(model_type, old, new), inside=False
    )
    now = list(json.loads(made)["quantization_config"][place.key])
    same = place.meant(found, before) == place.meant(now, after)
    event("said" if said(place, notes) else "changed" if made != raw else "as it was")
    assert same or said(place, notes), (old, new, now)


@settings(max_examples=12, deadline=None)
@given(st.data(), st.sampled_from(["deepseek_v3", "granitemoe", "mixtral", "step3p7"]))
def test_a_conversion_does_it_and_unfuse_brings_it_back(data: st.DataObject, model_type: str):
    doc = family(model_type)
    place = data.draw(st.sampled_from(PLACES))
    origin = stacks_of(model_type)[0].layout.name
    new = data.draw(st.sampled_from(sorted({n for o, n in pairs(model_type) if o == origin})))
    universe = modules_in(model_type, origin)
    heads = sorted({stack for held in universe.values() for stack, _, _ in held})
    found = data.draw(texts(place, sorted(universe), heads))
    with TemporaryDirectory() as folder:
        root = Path(folder)
        src = phantom(root / "src", shapes(doc["original"]), doc["config"])
        raw = json.dumps(doc["config"] | {"quantization_config": place.config(found)}, indent=1)
        (src / "config.json").write_text(raw)
        verb = moeconv.unfuse if new == "per-expert" else moeconv.fuse
        plan = verb(src, root / "out", layout=new).plan
        made = json.loads((root / "out" / "config.json").read_bytes())["quantization_config"]
        after = modules_in(model_type, new)
        same = place.meant(found, universe) == place.meant(made[place.key], after)
        assert same or said(place, plan.notes), made
        moeconv.unfuse(root / "out", root / "back")
        assert (root / "back" / "config.json").read_text() == raw
