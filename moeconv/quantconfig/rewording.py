"""The words of sidecars that name expert modules, in the names of an output."""

from __future__ import annotations

import json

from moeconv.errors import quoted
from moeconv.quantconfig.ambiguous import is_unsure
from moeconv.quantconfig.document import changed_lists
from moeconv.quantconfig.modules import Renamings
from moeconv.quantconfig.rename import Mentions
from moeconv.quantconfig.texts import quant_methods, quant_texts


def reworded(
    name: str, first: bytes, renamings: Renamings, *, inside: bool
) -> tuple[bytes, list[str]]:
    """A document in the new names, and what is to be said of it."""
    if not renamings.changed:
        return first, []
    try:
        document = json.loads(first)
        mentions = Mentions(renamings, quant_methods(document, inside=inside))
        after, unchanged = changed_lists(first, mentions.reworded, inside=inside)
        mentions.left(unchanged)
        said = list(quant_texts(document, inside=inside))
    except (ValueError, IndexError, RecursionError):
        return first, []  # no JSON, and nobody's list of modules
    notes = [f"{name}, `{p}`: {n:,} names of experts renamed" for p, n in mentions.renamed.items()]
    notes += [
        f"{name}, `{place}`: {count:,} names added, of experts that a pattern no longer means"
        for place, count in mentions.added.items()
    ]
    notes += [
        f"{name}, `{place}`: names some experts of a stack only, left as it is"
        for place in mentions.kept
    ]
    unsure = [(t.place, t.text) for t in said if is_unsure(mentions, t)]
    return after, notes + _left_notes(name, [*mentions.shifted, *unsure])


def _left_notes(name: str, pairs: list[tuple[str, str]]) -> list[str]:
    """What names experts, or may, in a way that is not rewritten."""
    left: dict[str, list[str]] = {}
    for place, text in dict.fromkeys(pairs):
        left.setdefault(place, []).append(text)
    return [
        f"{name}, `{place}`: {quoted(texts[0])}"
        + (f" and {len(texts) - 1:,} more" if texts[1:] else "")
        + " left as written: see whether the new names are still meant"
        for place, texts in left.items()
    ]
