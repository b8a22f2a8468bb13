"""Find experts under the names of another family than the rest of the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from moeconv.checkpoint.header import StoredTensor
from moeconv.checkpoint.model import Checkpoint
from moeconv.core.names import natural_key
from moeconv.core.text import counted, quoted_list
from moeconv.detect.detect import Detection, detect
from moeconv.errors import MoeconvError, UnknownExpertTensor, quoted
from moeconv.layout.recipe import Recipe
from moeconv.layout.shipped import shipped_recipes, vocabulary

# not `shared_experts.0.`, nor attention's `experts.input_linear`: no router chooses these
_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.(?:expert_)?[0-9]+\.", re.ASCII)
STACK_DIMENSIONS: Final = 3


def with_unmatched(
    checkpoint: Checkpoint, stated: tuple[Recipe, ...], detection: Detection
) -> tuple[tuple[Recipe, ...], Detection]:
    """Return recipes and detection, extended by stacks whose names other families' recipes know.

    stated: the recipes that `detection` was made with. Only recipes of families published per
    expert are tried: their names leave no layout open. Experts that no recipe knows are a problem:
    readers of the output would not find them.
    """
    files = tuple(f.name for f in checkpoint.files)
    recipes = stated
    unfit: tuple[MoeconvError, ...] = ()
    for recipe in _candidates(stated) if _unmatched(detection) else ():
        if not _unmatched(detection):
            break
        found = detect(detection.unclaimed, checkpoint.config, (recipe,), files=files)
        if found.problems:
            known = not any(isinstance(p, UnknownExpertTensor) for p in found.problems)
            unfit = unfit or (found.problems if known else ())
        elif all(s.layout.name == recipe.unfuse for s in found.stacks):
            detection = _joined(detection, found, recipe, stated)
            recipes += (recipe,) if found.stacks else ()
    left = _unmatched(detection)
    if not left and not (detection.stacks or detection.passthrough or detection.problems):
        left = _fused_lookalikes(detection)
    if left:
        problems = unfit or (_unknown(left, files, stated),)
        detection = replace(detection, problems=(*detection.problems, *problems))
    return recipes, replace(detection, notes=(*detection.notes, *_fused_notes(detection)))


def _candidates(stated: tuple[Recipe, ...]) -> Iterator[Recipe]:
    """Yield other families' recipes, with the config.json keys of this one."""
    names = {r.name for r in stated}
    keys = stated[0].config
    for recipe in sorted(shipped_recipes(), key=lambda r: -len(r.model_types)):
        layout = recipe.layout(recipe.unfuse) if recipe.unfuse else None
        if layout and layout.per_expert and recipe.name not in names and recipe.ids is None:
            same = dict(recipe.config.block_sizes).keys() <= dict(keys.block_sizes).keys()
            yield replace(recipe, config=keys) if same else recipe


def _unmatched(detection: Detection) -> list[StoredTensor]:
    return [t for t in detection.unclaimed if _ONE_EXPERT.search(t.name)]


def _fused_notes(detection: Detection) -> Iterator[str]:
    """Yield a note on tensors that look like fused experts, which are copied as they are."""
    left = _fused_lookalikes(detection)
    if left and (detection.stacks or detection.passthrough):
        more = f" and {counted(len(left) - 1, 'tensor')} more" if left[1:] else ""
        yield (
            f"{quoted(left[0].name)} {list(left[0].shape)}{more}: named like fused experts, but "
            "no recipe knows them; copied unchanged"
        )


def _fused_lookalikes(detection: Detection) -> list[StoredTensor]:
    return [t for t in detection.unclaimed if _looks_fused(t)]


def _looks_fused(tensor: StoredTensor) -> bool:
    words, experts = tensor.name.split("."), vocabulary().experts
    return (
        len(tensor.shape) >= STACK_DIMENSIONS
        and experts.mentioned(words)
        and not experts.excluded(words)
    )


def _joined(
    one: Detection, other: Detection, recipe: Recipe, stated: tuple[Recipe, ...]
) -> Detection:
    names = [s.name for s in other.stacks] + list(other.passthrough)
    if not names:
        return one
    note = (
        f"{counted(len(names), 'stack')} with tensor names of recipe {quoted(recipe.name)}, not "
        f"{quoted(stated[0].name)} like the others: {quoted_list(names, most=3)}"
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


def _unknown(
    left: list[StoredTensor], files: tuple[str, ...], stated: tuple[Recipe, ...]
) -> MoeconvError:
    first = left[0]
    return UnknownExpertTensor(
        f"{quoted(first.name)} has a name like an expert's, but no recipe knows it",
        at=f"{quoted(files[first.file])}, tensor {quoted(first.name)}",
        cause=f"there are {counted(len(left), 'tensor')} with such names, not known to "
        f"{' or '.join(quoted(r.name) for r in stated)}",
    )
