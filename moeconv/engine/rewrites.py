"""Sidecars that a conversion changes: config.json, where it names expert modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from moeconv.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES
from moeconv.checkpoint.quantlists import changed_lists, expert_patterns
from moeconv.checkpoint.reading import read_document
from moeconv.checkpoint.source import Checkpoint
from moeconv.errors import quoted
from moeconv.layout.stack import Stack
from moeconv.plan.modules import Renamings
from moeconv.plan.values import Plan, Rewrite

_QUANT_CONFIG: Final = "hf_quant_config.json"


def with_rewrites(plan: Plan, checkpoint: Checkpoint, stacks: tuple[Stack, ...]) -> Plan:
    """The plan with config.json's lists of expert modules in the names of the output.

    They start from the first source's config.json, so that no conversion builds on another.
    """
    if plan.restores:
        return _restoring(plan, checkpoint)
    now = _read(checkpoint, CONFIG_NAME)
    if now is None:
        return plan
    own = checkpoint.origin
    first = (dict(own.origin.sidecars) if own else {}).get(CONFIG_NAME, now)
    listed: set[str] = set()
    changed_lists(first, lambda _, names: listed.update(names))
    renamings = Renamings(stacks, plan.stacks, listed)
    places: dict[str, int] = {}

    def change(place: str, names: tuple[str, ...]) -> tuple[str, ...] | None:
        new = renamings.renamed(place, names)
        if new is not None:
            places[place] = len(set(names) - set(new))
        return new

    after = changed_lists(first, change)
    notes = [f"config.json, `{p}`: {n:,} names of experts renamed" for p, n in places.items()]
    notes += [
        f"config.json, `{place}`: names some experts of a stack only, left as it is"
        for place in dict.fromkeys(renamings.kept)
    ]
    if renamings.any:
        notes += _left_notes(CONFIG_NAME, after, renamings, inside=False)
        other = _read(checkpoint, _QUANT_CONFIG)
        notes += _left_notes(_QUANT_CONFIG, other, renamings, inside=True) if other else []
    plan = replace(plan, notes=(*plan.notes, *notes))
    if after == now:
        return plan
    return replace(plan, rewrites=(Rewrite(CONFIG_NAME, now, after),))


def _left_notes(name: str, raw: bytes, renamings: Renamings, *, inside: bool) -> list[str]:
    """What names experts in a way that is not rewritten."""
    left: dict[str, list[str]] = {}
    try:
        for place, text in expert_patterns(raw, inside=inside):
            if not renamings.knows(text):
                left.setdefault(place, []).append(text)
    except (ValueError, RecursionError):
        return []  # no JSON, and nobody's list of modules
    return [
        f"{name}, `{place}`: {quoted(texts[0])}"
        + (f" and {len(texts) - 1:,} more" if texts[1:] else "")
        + " left as written: see whether the new names are still meant"
        for place, texts in left.items()
    ]


def _restoring(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The first source's sidecars again."""
    own = checkpoint.origin
    rewrites = []
    for name, raw in own.origin.sidecars if own else ():
        now = _read(checkpoint, name)
        if now is not None and now != raw:
            rewrites.append(Rewrite(name, now, raw))
    return replace(plan, rewrites=tuple(rewrites))


def _read(checkpoint: Checkpoint, name: str) -> bytes | None:
    """A sidecar's bytes; None where the output does not get it."""
    sidecar = next((s for s in checkpoint.sidecars if s.name == name), None)
    if sidecar is None:
        return None
    return read_document(sidecar.path, MAX_CONFIG_BYTES, name=name)
