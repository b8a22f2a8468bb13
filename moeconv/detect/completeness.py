"""Check by names, dtypes and shapes that a stack has every expert, complete and uniform."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations, islice

from moeconv.checkpoint.header import StoredTensor
from moeconv.core.dtypes import BITS
from moeconv.core.text import LISTED, counted, listed
from moeconv.detect.match import SHARED, MatchedStack
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
from moeconv.layout.recipe import DOWN, WEIGHT, Layout, TensorTemplate

# integers and floating point of less than 16 bits mean nothing without their scales
_QUANTISED = frozenset(d for d in BITS if d.startswith(("F4", "F6", "F8", "I", "U")))


def completeness(
    matched: MatchedStack, layout: Layout, *, experts: int | None, quantised: bool
) -> list[MoeconvError]:
    """Return what is missing from a stack that is stored in `layout`, or differs from the rest.

    experts: E, if config.json states it; quantised: whether it states that weights have scales.
    """
    problems: list[MoeconvError] = []
    ids = _expert_ids(matched, layout)
    if not ids:
        problems += _missing_projections(matched, layout)
    elif layout.numbered:
        gap = _missing_ids(matched, ids, experts)
        # an id out of range would make every other expert look incomplete, too
        problems += [gap] if gap else _missing_weights(matched, layout, ids, experts)
    for (_, component), tensors in matched.tensors.items():
        if component not in matched.recipe.passed:  # a JSON blob is as long as its numbers
            problems += _outliers(matched, tensors)
    problems += _companions(matched, layout)
    problems += _across_projections(matched, layout)
    # where one projection has scales, `_across_projections` has reported it
    return problems or _bare(matched, quantised=quantised)


def bare_dtype(matched: MatchedStack) -> str | None:
    """Return the dtype of quantised weights where no component beside them scales them."""
    present = matched.components
    if matched.passthrough or any(c.scales for c in matched.recipe.components if c.name in present):
        return None
    weights = (t for (_, c), t in matched.tensors.items() if c in matched.recipe.weights)
    dtypes = {tensor.dtype for tensors in weights for tensor in tensors.values()}
    return next(iter(sorted(dtypes & _QUANTISED)), None)


def _bare(matched: MatchedStack, *, quantised: bool) -> list[MoeconvError]:
    """Return the problem of quantised weights of which none has a scale.

    fp8 without scales may be intended, and integers may be what a user's recipe makes of them: only
    where config.json or the component's name says that they are quantised is it a problem.
    """
    dtype = bare_dtype(matched)
    names = {component for _, component in matched.tensors}
    packed = [c for c in matched.recipe.weights if c != WEIGHT and c in names]
    if dtype is None or not (packed or quantised):
        return []
    kind = packed[0] if packed else WEIGHT
    tensor = next(next(iter(t.values())) for (_, c), t in matched.tensors.items() if c == kind)
    return [
        MissingScale(
            f"{quoted(matched.name)} has {quoted(kind)} in {dtype} but no scales",
            at=matched.where(tensor),
            cause="quantised weights cannot be used without scales; no expert has them",
            fix=f"{MissingScale.fix}; or, if the recipe has another name for them, set "
            "`scales = true` on that component",
        )
    ]


def _expert_ids(matched: MatchedStack, layout: Layout) -> list[int]:
    templates = {line.template for line in layout.lines}
    by_expert = (ts for (template, _), ts in matched.tensors.items() if template in templates)
    return sorted({expert for ts in by_expert for expert in ts} - {SHARED})


def _says(experts: int | None) -> str:
    return "" if experts is None else f"; config.json states {experts} experts"


def _missing_projections(matched: MatchedStack, layout: Layout) -> Iterator[MoeconvError]:
    for line in layout.weight_lines:
        if not matched.weights(line.template):
            yield MissingExpert(
                f"{quoted(matched.name)} lacks {quoted(line.template.removeprefix('{stack}.'))}",
                at=matched.where(matched.sample()),
                cause=f"it has this tensor, but none for {' and '.join(line.projections)}",
            )


def _missing_ids(matched: MatchedStack, ids: list[int], experts: int | None) -> MoeconvError | None:
    if experts is not None and ids[-1] >= experts:
        beyond = [i for i in ids if i >= experts]
        return ExpertOutOfRange(
            f"{quoted(matched.name)} has expert {beyond[0]}, but config.json states only {experts}",
            at=matched.where(matched.tensor_of(beyond[0])),
            cause=f"ids must be below {experts}; these are not: {listed(beyond)}",
            fix="use the config.json that belongs to these tensors",
        )
    count = ids[-1] + 1 - len(ids)
    if not count:
        return None
    present = set(ids)
    # lazily: one absurd id must not produce a list of two billion missing ones
    missing = list(islice((i for i in range(ids[-1]) if i not in present), LISTED))
    return ExpertGap(
        f"{quoted(matched.name)} has no tensor of expert {missing[0]}",
        at=f"its last expert is in {matched.where(matched.tensor_of(ids[-1]))}",
        cause=f"ids go up to {ids[-1]}; these are missing: "
        f"{listed(missing, count=count)}{_says(experts)}",
    )


def _missing_weights(
    matched: MatchedStack, layout: Layout, ids: list[int], experts: int | None
) -> Iterator[MoeconvError]:
    weight_names = matched.recipe.weights
    for line in layout.weight_lines:
        weights = matched.weights(line.template)
        # companions without a weight are reported by `_companions`
        companions = [
            tensors
            for (template, component), tensors in matched.tensors.items()
            if template == line.template and component not in weight_names
        ]
        lacking = [i for i in ids if i not in weights and not any(i in ts for ts in companions)]
        if not lacking:
            continue
        rest = line.template.removeprefix("{stack}.").removeprefix("{expert}.")
        kind = next((c for _, c in matched.tensors if c in weight_names), WEIGHT)
        rest = rest.replace("{component}", kind).replace("{parameter}", kind)
        # its other projections show where it should be, perhaps in the next shard
        near = matched.tensor_of(lacking[0])
        yield MissingExpert(
            f"{quoted(matched.name)} lacks expert {lacking[0]}'s {quoted(rest)}",
            at=f"another tensor of it is in {matched.where(near)}",
            cause=("" if weights else "no expert has it: ")
            + f"{len(weights)} of {len(ids)} experts have it; "
            f"missing: {listed(lacking)}{_says(experts)}",
        )


def _companions(matched: MatchedStack, layout: Layout) -> Iterator[MoeconvError]:
    for (template, component), tensors in matched.tensors.items():
        known = template in (line.template for line in layout.weight_lines)
        if component in matched.recipe.weights or not known:
            continue
        weights = matched.weights(template)
        alone = [i for i in tensors if i not in weights]
        if alone:
            tensor = tensors[alone[0]]
            yield ScaleWithoutWeight(
                f"{quoted(tensor.name)} has no weight",
                at=matched.where(tensor),
                cause=f"this stack has {counted(len(alone), 'tensor')} of component "
                f"{quoted(component)} without a weight",
            )
        # a weight of another dtype may need none, and its dtype has been reported
        usual = Counter(t.dtype for t in weights.values()).most_common(1)
        bare = [i for i, t in weights.items() if i not in tensors and t.dtype == usual[0][0]]
        if bare:
            tensor = weights[bare[0]]
            yield MissingScale(
                f"{quoted(tensor.name)} lacks its {quoted(component)}",
                at=matched.where(tensor),
                cause=f"{len(weights) - len(bare)} of {len(weights)} experts have it; "
                f"these lack it: {listed(sorted(bare))}",
            )


def _outliers(matched: MatchedStack, tensors: dict[int, StoredTensor]) -> Iterator[MoeconvError]:
    if len({(t.dtype, t.shape) for t in tensors.values()}) == 1:
        return
    for kind, what, facts in (
        (ExpertDtype, "dtype", {e: t.dtype for e, t in tensors.items()}),
        (ExpertShape, "shape", {e: str(list(t.shape)) for e, t in tensors.items()}),
    ):
        usual, count = Counter(facts.values()).most_common(1)[0]
        odd = sorted(e for e, fact in facts.items() if fact != usual)
        if odd:
            tensor = tensors[odd[0]]
            yield kind(
                f"{quoted(tensor.name)} has {what} {facts[odd[0]]}, not {usual}",
                at=matched.where(tensor),
                cause=f"in {quoted(matched.name)} {count} of {len(tensors)} experts have "
                f"{usual}; these differ: {listed(odd)}",
            )


def _across_projections(matched: MatchedStack, layout: Layout) -> Iterator[MoeconvError]:
    """Yield where projections differ in ways that no checkpoint has on purpose.

    Every fused layout joins gate and up, so these need one dtype and the same components. Down may
    have another precision, but quantised weights of one dtype all have scales or none has.
    """
    samples = {line.projections: _first_of(matched, line, layout) for line in layout.weight_lines}
    kinds = {p: [c for c in matched.recipe.weights if c in samples[p]] for p in samples}
    weights = {p: samples[p][kinds[p][0]] for p in samples if kinds[p]}
    if two := _mixed_formats(matched, kinds, samples):
        yield two
        return
    pair = [t for p, t in weights.items() if DOWN not in p]
    if len({t.dtype for t in pair}) > 1:
        yield ExpertDtype(
            f"gate and up of {quoted(matched.name)} have different dtypes: "
            f"{' and '.join(t.dtype for t in pair)}",
            at=matched.where(*pair),
            cause="one tensor cannot hold both",
            fix="use a checkpoint whose projections have the same dtype",
        )
    lost: dict[tuple[str, tuple[str, ...]], MoeconvError] = {}
    for a, b in combinations(weights, 2):
        joined = DOWN not in (*a, *b)
        alike = weights[a].dtype == weights[b].dtype and weights[a].dtype in _QUANTISED
        for component in sorted(samples[a].keys() ^ samples[b].keys()):
            kind = matched.recipe.component(component)
            if not (joined or alike or (kind and kind.everywhere)):
                continue
            has, lacks = (a, b) if component in samples[a] else (b, a)
            what = "one of gate and up" if joined else "some projections"
            problem = MissingScale(
                f"{quoted(matched.name)} has {quoted(component)} for only {what}",
                at=matched.where(weights[lacks]),
                cause=f"this {weights[lacks].dtype} tensor lacks it, but "
                f"{quoted(weights[has].name)} has it",
            )
            lost.setdefault((component, lacks), problem)
    yield from lost.values()


def _first_of(
    matched: MatchedStack, line: TensorTemplate, layout: Layout
) -> dict[str, StoredTensor]:
    """Return a tensor of each component of a line's projections, in any line."""
    of = [ln for ln in layout.lines if set(line.projections) <= set(ln.projections)]
    templates = {ln.template for ln in of}
    return {
        c: next(iter(t.values())) for (tpl, c), t in matched.tensors.items() if tpl in templates
    }


def _mixed_formats(
    matched: MatchedStack,
    kinds: dict[tuple[str, ...], list[str]],
    samples: dict[tuple[str, ...], dict[str, StoredTensor]],
) -> MoeconvError | None:
    """Return the problem that only some projections are quantised, or in different ways."""
    pair = {c: p for p, names in kinds.items() if DOWN not in p for c in names}
    down = {c: p for p, names in kinds.items() if DOWN in p for c in names}
    for side in (pair, down):
        if len(side) > 1:
            tensors = [samples[p][c] for c, p in side.items()]
            return ExpertDtype(
                f"experts of {quoted(matched.name)} have two formats: {' and '.join(side)}",
                at=matched.where(*tensors),
                cause="one tensor cannot hold both",
            )
    return None
