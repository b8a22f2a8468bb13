"""Is every expert there, whole, and like its fellows? Asked of names, dtypes and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import combinations, islice

from moeconv.checkpoint.dtypes import BITS
from moeconv.checkpoint.header import StoredTensor
from moeconv.core.text import counted
from moeconv.detect.match import SHARED, Found
from moeconv.errors import (
    ExpertDtype,
    ExpertGap,
    ExpertOutOfRange,
    ExpertShape,
    MissingExpert,
    MissingScale,
    MoeconvError,
    ScaleWithoutWeight,
    quoted,
)
from moeconv.layout.recipe import DOWN, WEIGHT, Layout, Line

_MAX_IDS = 8
# floating point of less than 16 bits and integers mean nothing without their scales
_QUANTISED = frozenset(d for d in BITS if d.startswith(("F4", "F6", "F8", "I", "U")))


def completeness(
    stack: str, found: Found, layout: Layout, *, experts: int | None, quantised: bool
) -> list[MoeconvError]:
    """What is missing or odd in a stack that is stored in `layout`.

    experts: E from config.json, where it says one; quantised: whether it says that there are such.
    """
    problems: list[MoeconvError] = []
    ids = _expert_ids(found, layout)
    for line in layout.weight_lines:
        weights = found.weights(line.template)
        if not weights and not ids:
            problems.append(_no_line(stack, found, line))
    if layout.numbered and ids:
        gaps = _gaps(stack, found, ids, experts)
        problems += gaps
        # an id out of range makes every other expert look incomplete: say the one thing
        if not gaps:
            problems += _missing_weights(stack, found, layout, ids, experts)
    for (_, component), tensors in found.tensors.items():
        if component not in found.recipe.passed:  # a JSON blob is as long as its numbers
            problems += _odd_ones(stack, found, tensors)
    problems += _companions(stack, found, layout)
    problems += _pairs(stack, found, layout)
    # where one projection has them, `_pairs` said it
    return problems or _bare(stack, found, quantised=quantised)


def bare_dtype(found: Found) -> str | None:
    """The dtype of quantised weights where no component beside them scales them."""
    there = {component for _, component in found.tensors}
    if found.passthrough or any(c.scales for c in found.recipe.components if c.name in there):
        return None
    weights = (t for (_, c), t in found.tensors.items() if c in found.recipe.weights)
    dtypes = {tensor.dtype for tensors in weights for tensor in tensors.values()}
    return next(iter(sorted(dtypes & _QUANTISED)), None)


def _bare(stack: str, found: Found, *, quantised: bool) -> list[MoeconvError]:
    """Quantised weights of which none has a scale: the whole stack lost them.

    fp8 may be meant as it is, and integers be what a recipe of one's own makes of them: config.json
    must say that they are quantised, or their name.
    """
    dtype = bare_dtype(found)
    names = {component for _, component in found.tensors}
    packed = [c for c in found.recipe.weights if c != WEIGHT and c in names]
    if dtype is None or not (packed or quantised):
        return []
    kind = packed[0] if packed else WEIGHT
    tensor = next(next(iter(t.values())) for (_, c), t in found.tensors.items() if c == kind)
    return [
        MissingScale(
            f"{quoted(stack)} has {quoted(kind)} in {dtype} but no scales",
            at=found.place(tensor),
            cause="quantised weights cannot be used without scales; no expert has them",
            fix=f"{MissingScale.fix}; or, if the recipe calls them something else, give their "
            "component `scales = true` there",
        )
    ]


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
    held = found.all()[0]
    return MissingExpert(
        f"{quoted(stack)} lacks {quoted(line.template.removeprefix('{stack}.'))}",
        at=found.place(held),
        cause=f"it has this one, but no tensor for {' and '.join(line.projections)}",
    )


def _gaps(stack: str, found: Found, ids: list[int], experts: int | None) -> list[MoeconvError]:
    last = _tensor_of(found, ids[-1])
    if experts is not None and ids[-1] >= experts:
        beyond = [i for i in ids if i >= experts]
        return [
            ExpertOutOfRange(
                f"{quoted(stack)} has an expert {beyond[0]}, but there are only {experts}",
                at=found.place(_tensor_of(found, beyond[0])),
                cause=f"ids at or above {experts}, the number in config.json: {_ranges(beyond)}",
                fix="correct config.json, or remove the experts that do not belong",
            )
        ]
    present = set(ids)
    count = ids[-1] + 1 - len(ids)
    if not count:
        return []
    # lazily: a single absurd id must not make a list of two billion missing ones
    missing = list(islice((i for i in range(ids[-1]) if i not in present), _MAX_IDS))
    more = f" and {count - len(missing):,} more" if count > len(missing) else ""
    return [
        ExpertGap(
            f"{quoted(stack)} lacks expert {missing[0]} altogether",
            at=f"the last expert is in {found.place(last)}",
            cause=f"ids go up to {ids[-1]}, these are missing: "
            f"{', '.join(map(str, missing))}{more}{_says(experts)}",
        )
    ]


def _tensor_of(found: Found, expert: int) -> StoredTensor:
    return next(t[expert] for t in found.tensors.values() if expert in t)


def _missing_weights(
    stack: str, found: Found, layout: Layout, ids: list[int], experts: int | None
) -> list[MoeconvError]:
    problems: list[MoeconvError] = []
    for line in layout.weight_lines:
        weights = found.weights(line.template)
        # where the companions are there and the weight is not, `_companions` says it better
        lacking = [i for i in ids if i not in weights and not _companion_of(found, line, i)]
        if not lacking:
            continue
        rest = line.template.removeprefix("{stack}.").removeprefix("{expert}.")
        kind = next((c for t, c in found.tensors if c in found.recipe.weights), WEIGHT)
        rest = rest.replace("{component}", kind).replace("{parameter}", kind)
        # its other projections say where it should be; they may lie in the next shard
        near = _tensor_of(found, lacking[0])
        problems.append(
            MissingExpert(
                f"{quoted(stack)} lacks expert {lacking[0]}'s {quoted(rest)}",
                at=f"its neighbour is in {found.place(near)}",
                cause=("" if weights else "no expert has it: ")
                + f"{len(weights)} of {len(ids)} experts have it; "
                f"missing: {_ranges(lacking)}{_says(experts)}",
            )
        )
    return problems


def _companion_of(found: Found, line: Line, expert: int) -> bool:
    return any(
        template == line.template and component not in found.recipe.weights and expert in tensors
        for (template, component), tensors in found.tensors.items()
    )


def _companions(stack: str, found: Found, layout: Layout) -> list[MoeconvError]:
    problems: list[MoeconvError] = []
    for (template, component), tensors in found.tensors.items():
        known = template in (line.template for line in layout.weight_lines)
        if component in found.recipe.weights or not known:
            continue
        weights = found.weights(template)
        alone = [i for i in tensors if i not in weights]
        if alone:
            tensor = tensors[alone[0]]
            problems.append(
                ScaleWithoutWeight(
                    f"{quoted(tensor.name)} has no weight",
                    at=found.place(tensor),
                    cause=f"in this stack {counted(len(alone), 'tensor')} of component "
                    f"{quoted(component)} without a weight",
                )
            )
        # one of another dtype may need none, and that it is of another was said
        usual = Counter(t.dtype for t in weights.values()).most_common(1)
        bare = [i for i, t in weights.items() if i not in tensors and t.dtype == usual[0][0]]
        if bare:
            tensor = weights[bare[0]]
            problems.append(
                MissingScale(
                    f"{quoted(tensor.name)} lacks its {quoted(component)}",
                    at=found.place(tensor),
                    cause=f"{len(weights) - len(bare)} of {len(weights)} experts have one; "
                    f"these lack it: {_ranges(sorted(bare))}",
                )
            )
    return problems


def _odd_ones(stack: str, found: Found, tensors: dict[int, StoredTensor]) -> list[MoeconvError]:
    problems: list[MoeconvError] = []
    if len({(t.dtype, t.shape) for t in tensors.values()}) == 1:
        return problems
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
                    at=found.place(tensor),
                    cause=f"in {quoted(stack)} {count} of {len(tensors)} experts have {usual}; "
                    f"odd: {_ranges(odd)}",
                )
            )
    return problems


def _pairs(stack: str, found: Found, layout: Layout) -> list[MoeconvError]:
    """Projections of one dtype have the same companions; gate and up have one dtype.

    Every fused layout joins gate and up. Down may be of another precision, but quantised weights
    of the same dtype with scales here and none there are a file that lost some; so are biases.
    """
    problems: list[MoeconvError] = []
    held = {line.projections: _first_of(found, line, layout) for line in layout.weight_lines}
    kinds = {p: [c for c in found.recipe.weights if c in held[p]] for p in held}
    weights = {p: held[p][kinds[p][0]] for p in held if kinds[p]}
    two = _two_kinds(stack, found, kinds, held)
    if two:
        return [two]
    pair = [t for p, t in weights.items() if DOWN not in p]
    if len({t.dtype for t in pair}) > 1:
        problems.append(
            ExpertDtype(
                f"gate and up of {quoted(stack)} differ in dtype: "
                f"{' and '.join(t.dtype for t in pair)}",
                at=found.place(*pair),
                cause="one tensor cannot hold both",
                fix="convert from a checkpoint whose projections are alike",
            )
        )
    lost: dict[tuple[str, tuple[str, ...]], MoeconvError] = {}
    for a, b in combinations(weights, 2):
        joined = DOWN not in (*a, *b)
        alike = weights[a].dtype == weights[b].dtype and weights[a].dtype in _QUANTISED
        for component in sorted(held[a].keys() ^ held[b].keys()):
            kind = found.recipe.component(component)
            if not (joined or alike or (kind and kind.everywhere)):
                continue
            has, lacks = (a, b) if component in held[a] else (b, a)
            what = "one of gate and up" if joined else "some projections"
            problem = MissingScale(
                f"{quoted(stack)} has {quoted(component)} for {what} only",
                at=found.place(weights[lacks]),
                cause=f"this {weights[lacks].dtype} lacks it, {quoted(weights[has].name)} has it",
            )
            lost.setdefault((component, lacks), problem)
    return [*problems, *lost.values()]


def _first_of(found: Found, line: Line, layout: Layout) -> dict[str, StoredTensor]:
    """A tensor of each component of a line's projections, wherever the layout stores it."""
    of = [ln for ln in layout.lines if set(line.projections) <= set(ln.projections)]
    templates = {ln.template for ln in of}
    return {c: next(iter(t.values())) for (tpl, c), t in found.tensors.items() if tpl in templates}


def _two_kinds(
    stack: str,
    found: Found,
    kinds: dict[tuple[str, ...], list[str]],
    held: dict[tuple[str, ...], dict[str, StoredTensor]],
) -> MoeconvError | None:
    """Experts of one stack that are quantised beside others that are not, or in another way."""
    pair = {c: p for p, names in kinds.items() if DOWN not in p for c in names}
    down = {c: p for p, names in kinds.items() if DOWN in p for c in names}
    for side in (pair, down):
        if len(side) > 1:
            tensors = [held[p][c] for c, p in side.items()]
            return ExpertDtype(
                f"experts of {quoted(stack)} are stored in two ways: {' and '.join(side)}",
                at=found.place(*tensors),
                cause="one tensor cannot hold both",
            )
    return None
