"""Find the layouts of a family that a stack's names can be of."""

from __future__ import annotations

from moeconv.checkpoint.header import StoredTensor
from moeconv.detect.match import SHARED, MatchedStack
from moeconv.errors import MixedLayouts, MoeconvError, quoted
from moeconv.layout.recipe import COMPANIONS, WEIGHT, WEIGHTS, Layout


def candidate_layouts(matched: MatchedStack) -> list[Layout] | MoeconvError:
    """Return the layouts that have all names of the stack, or the problem that there is none."""
    present = matched.templates
    layouts = [layout for layout in matched.recipe.layouts if _names_fit(matched, layout)]
    if layouts:
        return layouts
    touched = [
        layout
        for layout in matched.recipe.layouts
        if present & {line.template for line in layout.lines} and not layout.in_parts
    ]
    samples = {template: matched.sample((template, c)) for template, c in sorted(matched.tensors)}
    duplicate = _duplicate(matched)
    return MixedLayouts(
        "one expert stack is stored in two layouts at once",
        at=matched.where(*list(samples.values())[:4]),
        cause=f"its names belong to the layouts {', '.join(quoted(t.name) for t in touched)}"
        + (f"; {quoted(duplicate.name)} is in both" if duplicate else "; no tensor is in both"),
        fix="keep only one of the two in the directory; moeconv cannot know which one is right"
        if duplicate
        else "remove neither, since each holds what the other lacks; save the checkpoint again "
        "in one layout",
    )


def _duplicate(matched: MatchedStack) -> StoredTensor | None:
    """Return a tensor whose matrices other tensors hold as well, if there is one."""
    lines = {ln.template: ln for la in matched.recipe.layouts for ln in la.lines if not ln.part}
    seen: set[tuple[str, str, int]] = set()
    for (template, component), tensors in matched.tensors.items():
        kind = WEIGHT if component in matched.recipe.weights else component
        mine = {(p, kind, e) for p in lines[template].projections for e in tensors}
        for projection, _, expert in mine:
            whole = {(projection, kind, SHARED), (projection, kind, expert)}
            if seen & whole or (
                expert == SHARED and any((projection, kind) == one[:2] for one in seen)
            ):
                return tensors[expert]
        seen |= mine
    return None


def _names_fit(matched: MatchedStack, layout: Layout) -> bool:
    """Whether all names are of a layout; a layout in parts needs names of both."""
    present = set(matched.tensors)
    if not layout.in_parts:
        return matched.templates <= {line.template for line in layout.lines}
    parts = [
        {
            (ln.template, c.name)
            for ln in layout.lines
            if ln.part == p
            for c in matched.recipe.components
            if ln.holds(c)
        }
        for p in (WEIGHTS, COMPANIONS)
    ]
    return present <= parts[0] | parts[1] and all(present & part for part in parts)
