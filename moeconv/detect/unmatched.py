"""Experts under the names of another family than the rest of the checkpoint: taken, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor
from moeconv.core.names import natural_key
from moeconv.core.text import counted, quoted_list
from moeconv.detect.detect import Detection, detect
from moeconv.errors import MoeconvError, UnknownExpertTensor, quoted
from moeconv.layout.recipe import Recipe
from moeconv.layout.shipped import vocabulary

# `shared_experts.0.` and attention's `experts.input_linear` are no experts of a router's choice
_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.(?:expert_)?[0-9]+\.", re.ASCII)
STACK_DIMENSIONS: Final = 3


@dataclass(frozen=True, slots=True)
class Headers:
    """What there is to look at: config.json and the names of the files."""

    config: Config
    files: tuple[str, ...]


def with_unmatched(
    headers: Headers,
    said: tuple[Recipe, ...],
    detection: Detection,
    shipped: Callable[[], Iterable[Recipe]],
) -> tuple[tuple[Recipe, ...], Detection]:
    """The recipes and the detection with stacks under other names, which other recipes know.

    said: the recipes that detection had; shipped: asked for all others, if need be. Only recipes
    that publish experts one by one are tried: their names leave no layout open. What none knows is
    a problem: an expert that is copied as it is would be lost to whoever reads the others.
    """
    recipes = said
    unfit: tuple[MoeconvError, ...] = ()
    for recipe in _candidates(said, shipped()) if _unmatched(detection) else ():
        if not _unmatched(detection):
            break
        untouched = set(detection.passthrough_tensors)
        rest = tuple(t for t in detection.others if t not in untouched)
        found = detect(rest, headers.config, (recipe,), files=headers.files)
        if found.problems:
            known = not any(isinstance(p, UnknownExpertTensor) for p in found.problems)
            unfit = unfit or (found.problems if known else ())
        elif all(s.layout.name == recipe.unfuse for s in found.stacks):
            detection = _joined(detection, found, recipe, said)
            recipes += (recipe,) if found.stacks else ()
    left = _unmatched(detection)
    if not left and not (detection.stacks or detection.passthrough or detection.problems):
        left = _stacked(detection)
    if left:
        problems = unfit or (_unknown(left, headers, said),)
        detection = replace(detection, problems=(*detection.problems, *problems))
    return recipes, replace(detection, notes=(*detection.notes, *_of_stacks(detection)))


def _candidates(said: tuple[Recipe, ...], shipped: Iterable[Recipe]) -> Iterator[Recipe]:
    """Other families' recipes, with the keys of the config.json that is there."""
    names = {r.name for r in said}
    keys = said[0].config
    for recipe in sorted(shipped, key=lambda r: -len(r.model_types)):
        layout = recipe.layout(recipe.unfuse) if recipe.unfuse else None
        if layout and layout.per_expert and recipe.name not in names and recipe.ids is None:
            same = dict(recipe.config.block_sizes).keys() <= dict(keys.block_sizes).keys()
            yield replace(recipe, config=keys) if same else recipe


def _unmatched(detection: Detection) -> list[StoredTensor]:
    likely = [t for t in detection.others if _ONE_EXPERT.search(t.name)]
    untouched = set(detection.passthrough_tensors) if likely else set()
    return [t for t in likely if t not in untouched]


def _of_stacks(detection: Detection) -> Iterator[str]:
    """A word on what looks like experts stored together, which stays as it is and whole."""
    left = _stacked(detection)
    if left and (detection.stacks or detection.passthrough):
        more = f" and {counted(len(left) - 1, 'tensor')} more" if left[1:] else ""
        yield (
            f"{quoted(left[0].name)} {list(left[0].shape)}{more}: named like experts stored "
            "together, which no recipe here knows; copied through as they are"
        )


def _stacked(detection: Detection) -> list[StoredTensor]:
    likely = [t for t in detection.others if _looks_stacked(t)]
    untouched = set(detection.passthrough_tensors) if likely else set()
    return [t for t in likely if t not in untouched]


def _looks_stacked(tensor: StoredTensor) -> bool:
    words, experts = tensor.name.split("."), vocabulary().experts
    return (
        len(tensor.shape) >= STACK_DIMENSIONS
        and experts.mentioned(words)
        and not experts.excluded(words)
    )


def _joined(
    one: Detection, other: Detection, recipe: Recipe, said: tuple[Recipe, ...]
) -> Detection:
    names = [s.name for s in other.stacks] + list(other.passthrough)
    if not names:
        return one
    note = (
        f"{counted(len(names), 'stack')} under the names of recipe {quoted(recipe.name)}, not "
        f"{quoted(said[0].name)} as the rest: {quoted_list(names, most=3)}"
    )
    return Detection(
        tuple(sorted((*one.stacks, *other.stacks), key=lambda s: natural_key(s.name))),
        (*one.passthrough_tensors, *other.others),
        one.problems,
        one.rejected,
        tuple(sorted((*one.passthrough, *other.passthrough), key=natural_key)),
        (note, *one.notes, *other.notes),
        (*one.passthrough_tensors, *other.passthrough_tensors),
    )


def _unknown(left: list[StoredTensor], headers: Headers, said: tuple[Recipe, ...]) -> MoeconvError:
    first = left[0]
    return UnknownExpertTensor(
        f"{quoted(first.name)} is named like an expert's, but no recipe knows it",
        at=f"{quoted(headers.files[first.file])}, tensor {quoted(first.name)}",
        cause=f"{counted(len(left), 'tensor')} of such names beside those that "
        f"{' and '.join(quoted(r.name) for r in said)} knows",
    )
