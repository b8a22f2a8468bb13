"""Sidecars that a conversion changes: config.json, where it names expert modules."""

from __future__ import annotations

from dataclasses import replace

from moeconv.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES
from moeconv.checkpoint.quantlists import changed_lists
from moeconv.checkpoint.reading import read_document
from moeconv.checkpoint.source import Checkpoint
from moeconv.layout.stack import Stack
from moeconv.plan.modules import Renamings
from moeconv.plan.values import Plan, Rewrite


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
    plan = replace(plan, notes=(*plan.notes, *notes))
    if after == now:
        return plan
    return replace(plan, rewrites=(Rewrite(CONFIG_NAME, now, after),))


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
