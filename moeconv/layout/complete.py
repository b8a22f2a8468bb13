"""Is every expert there, whole, and like its fellows? Asked of names, dtypes and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moeconv.checkpoint.header import StoredTensor
from moeconv.errors import (
    ExpertDtype,
    ExpertGap,
    ExpertOutOfRange,
    ExpertShape,
    LayoutContradiction,
    MissingExpert,
    MissingScale,
    MoeconvError,
    ScaleWithoutWeight,
    quoted,
)
from moeconv.layout.match import SHARED, Found
from moeconv.layout.recipe import DOWN, WEIGHT, Layout, Line

_FETCH = "download the shard again, then `moeconv inspect SRC`"
_MAX_IDS = 8


def completeness(
    stack: str, found: Found, layout: Layout, *, experts: int | None
) -> list[MoeconvError]:
    """What is missing or odd in a stack that is stored in `layout`.

    experts: E from config.json, where it says one.
    """
    problems: list[MoeconvError] = []
    ids = _expert_ids(found, layout)
    for line in layout.lines:
        weights = found.tensors.get((line.template, WEIGHT), {})
        if not weights and not ids:
            problems.append(_no_line(stack, found, line))
    if layout.per_expert and ids:
        gaps = _gaps(stack, ids, experts)
        problems += gaps
        # an id out of range makes every other expert look incomplete: say the one thing
        if not gaps:
            problems += _missing_weights(stack, found, layout, ids, experts)
    problems += _companions(stack, found, layout)
    for tensors in found.tensors.values():
        problems += _odd_ones(stack, tensors)
    problems += _pairs(stack, found, layout)
    return problems


def _expert_ids(found: Found, layout: Layout) -> list[int]:
    templates = {line.template for line in layout.lines}
    return sorted(
        {
            expert
            for (template, _), tensors in found.tensors.items()
            if template in templates
            for expert in tensors
            if expert != SHARED
        }
    )


def _ranges(ids: Iterable[int]) -> str:
    listed = list(ids)
    text = ", ".join(map(str, listed[:_MAX_IDS]))
    return text + (f" and {len(listed) - _MAX_IDS} more" if len(listed) > _MAX_IDS else "")


def _says(experts: int | None) -> str:
    return "" if experts is None else f"; config.json says there are {experts}"


def _no_line(stack: str, found: Found, line: Line) -> MoeconvError:
    held = next(iter(found.all())).name
    return MissingExpert(
        f"{quoted(stack)} lacks {quoted(line.template.removeprefix('{stack}.'))}",
        at=quoted(stack),
        cause=f"it has {quoted(held)}, but no tensor for {' and '.join(line.projections)}",
        fix=_FETCH,
    )


def _gaps(stack: str, ids: list[int], experts: int | None) -> list[MoeconvError]:
    if experts is not None and ids[-1] >= experts:
        beyond = [i for i in ids if i >= experts]
        return [
            ExpertOutOfRange(
                f"{quoted(stack)} has an expert {beyond[0]}, but there are only {experts}",
                at=quoted(stack),
                cause=f"ids at or above {experts}, the number in config.json: {_ranges(beyond)}",
                fix="correct config.json, or remove the experts that do not belong",
            )
        ]
    present = set(ids)
    missing = [i for i in range(ids[-1] + 1) if i not in present]
    if not missing:
        return []
    return [
        ExpertGap(
            f"{quoted(stack)} lacks expert {missing[0]} altogether",
            at=quoted(stack),
            cause=f"ids go up to {ids[-1]}, these are missing: {_ranges(missing)}{_says(experts)}",
            fix=_FETCH,
        )
    ]


def _missing_weights(
    stack: str, found: Found, layout: Layout, ids: list[int], experts: int | None
) -> list[MoeconvError]:
    problems: list[MoeconvError] = []
    for line in layout.lines:
        weights = found.tensors.get((line.template, WEIGHT), {})
        # where the companions are there and the weight is not, `_companions` says it better
        lacking = [i for i in ids if i not in weights and not _companion_of(found, line, i)]
        if not lacking:
            continue
        rest = line.template.removeprefix("{stack}.").removeprefix("{expert}.")
        rest = rest.replace("{component}", WEIGHT)
        near = weights.get(lacking[0] - 1) or next(iter(weights.values()), None)
        said = f"its neighbour is {quoted(near.name)}" if near else "no expert has it"
        problems.append(
            MissingExpert(
                f"{quoted(stack)} lacks expert {lacking[0]}'s {quoted(rest)}",
                at=said,
                cause=f"{len(weights)} of {len(ids)} experts have it; missing: {_ranges(lacking)}"
                + _says(experts),
                fix=_FETCH,
            )
        )
    return problems


def _companion_of(found: Found, line: Line, expert: int) -> bool:
    return any(
        template == line.template and component != WEIGHT and expert in tensors
        for (template, component), tensors in found.tensors.items()
    )


def _companions(stack: str, found: Found, layout: Layout) -> list[MoeconvError]:
    problems: list[MoeconvError] = []
    for (template, component), tensors in found.tensors.items():
        if component == WEIGHT or template not in (line.template for line in layout.lines):
            continue
        weights = found.tensors.get((template, WEIGHT), {})
        alone = [i for i in tensors if i not in weights]
        if alone:
            name = tensors[alone[0]].name
            problems.append(
                ScaleWithoutWeight(
                    f"{quoted(name)} has no weight",
                    at=quoted(stack),
                    cause=f"{len(alone)} tensors named {quoted(component)} stand alone here",
                    fix=_FETCH,
                )
            )
        bare = [i for i in weights if i not in tensors]
        if bare:
            name = weights[bare[0]].name
            problems.append(
                MissingScale(
                    f"{quoted(name)} lacks its {quoted(component)}",
                    at=quoted(stack),
                    cause=f"{len(weights) - len(bare)} of {len(weights)} experts have one; "
                    f"these lack it: {_ranges(sorted(bare))}",
                    fix=_FETCH,
                )
            )
    return problems


def _odd_ones(stack: str, tensors: dict[int, StoredTensor]) -> list[MoeconvError]:
    problems: list[MoeconvError] = []
    for kind, what, facts in (
        (ExpertDtype, "dtype", {e: t.dtype for e, t in tensors.items()}),
        (ExpertShape, "shape", {e: str(list(t.shape)) for e, t in tensors.items()}),
    ):
        usual, count = Counter(facts.values()).most_common(1)[0]
        odd = sorted(e for e, fact in facts.items() if fact != usual)
        if odd:
            tensor = tensors[odd[0]]
            problems.append(
                kind(
                    f"{quoted(tensor.name)} has {what} {facts[odd[0]]}, not {usual}",
                    at=quoted(stack),
                    cause=f"{count} of {len(tensors)} experts have {usual}; odd: {_ranges(odd)}",
                    fix="convert from a checkpoint whose experts are alike",
                )
            )
    return problems


def _pairs(stack: str, found: Found, layout: Layout) -> list[MoeconvError]:
    """Gate and up must have the same components and dtypes: every fused layout joins them."""
    problems: list[MoeconvError] = []
    lines = [line for line in layout.lines if DOWN not in line.projections]
    held = {
        line.template: {c: t for (tpl, c), t in found.tensors.items() if tpl == line.template}
        for line in lines
    }
    for component in sorted({c for components in held.values() for c in components}):
        first = [next(iter(c[component].values())) for c in held.values() if component in c]
        if len(first) != len(lines) and component != WEIGHT:
            problems.append(
                MissingScale(
                    f"{quoted(stack)} has {quoted(component)} for one of gate and up only",
                    at=quoted(first[0].name),
                    cause="the two are always stored alike",
                    fix=_FETCH,
                )
            )
        dtypes = sorted({t.dtype for t in first})
        if len(dtypes) > 1:
            problems.append(
                ExpertDtype(
                    f"gate and up of {quoted(stack)} differ in dtype: {' and '.join(dtypes)}",
                    at=", ".join(quoted(t.name) for t in first),
                    cause="one tensor cannot hold both",
                    fix="convert from a checkpoint whose projections are alike",
                )
            )
    return problems


def contradiction(stack: str, reasons: list[str]) -> MoeconvError:
    """Names of a known layout, shapes of none."""
    return LayoutContradiction(
        f"the shapes in {quoted(stack)} fit no layout of its family",
        at=quoted(stack),
        cause="\n         ".join(reasons),
        fix="check that config.json belongs to these tensors; `moeconv recipes show` lists layouts",
    )
