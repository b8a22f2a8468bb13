"""One stack: which layout fits its names and shapes, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.checkpoint.config import Config
from moeconv.detect.completeness import completeness
from moeconv.detect.config_sizes import (
    config_mismatches,
    stated_block_sizes,
    stated_sizes,
    states_scales,
)
from moeconv.detect.diagnose import (
    ambiguous_axis_order,
    ambiguous_block_size,
    ambiguous_layout,
    no_fit,
    sizes_differ_from_manifest,
    unconfirmed_layout,
    unknown_tensors,
)
from moeconv.detect.interpretations import (
    BlockSizes,
    Interpretation,
    RecordedDims,
    axes_of,
    interpretations,
    recorded_first,
    transposed_variants,
)
from moeconv.detect.match import MatchedStack, candidate_layouts, no_range
from moeconv.detect.solve import EXPERTS, HIDDEN, WIDTH, SizeHints, solve
from moeconv.detect.stack import Sizes, Stack, StoredComponent
from moeconv.errors import MoeconvError
from moeconv.layout.axes import geometry
from moeconv.layout.recipe import Layout
from moeconv.manifest.model import StackEntry


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a stack beside its tensors.

    from_layout: the layout that the user gives for all stacks.
    recorded: what the manifest of an output says of the stack, which is then not judged anew.
    dims: the numbers of dimensions of all matrices in that manifest.
    router: the number of experts that the stack's own router chooses from, if known.
    """

    config: Config
    from_layout: str | None
    recorded: StackEntry | None
    dims: RecordedDims
    router: int | None = None


@dataclass(frozen=True, slots=True)
class _Fit:
    """One way to store the stack that all its shapes agree with."""

    layout: Layout
    block_sizes: BlockSizes
    interpretation: Interpretation
    sizes: Sizes


def judge(matched: MatchedStack, evidence: Evidence) -> Stack | list[MoeconvError]:
    """Return the stack that these tensors are, or the problems that keep them from being one."""
    layouts = _candidates(matched)
    if isinstance(layouts, MoeconvError):
        return [layouts]
    recorded = evidence.recorded
    preferred = recorded.layout if recorded else evidence.from_layout
    layouts = [layout for layout in layouts if layout.name == preferred] or layouts
    if recorded:
        stated = dict(zip((EXPERTS, WIDTH, HIDDEN), recorded.sizes, strict=True))
    else:
        stated = stated_sizes(matched, evidence.config)
    quantised = not recorded and states_scales(evidence.config, matched.recipe, matched.name)
    problems = completeness(matched, layouts[0], experts=stated.get(EXPERTS), quantised=quantised)
    # config.json of a pruned model is often that of the whole one; its router is not
    if problems and layouts[0].numbered and (count := _count(matched)) == evidence.router:
        stated[EXPERTS] = count
        if completeness(matched, layouts[0], experts=count, quantised=quantised):
            return problems
    elif problems:
        return problems
    hints = SizeHints(_count(matched) if layouts[0].numbered else None, stated)
    fits = _solve(matched, layouts, evidence, hints)
    if isinstance(fits, MoeconvError):
        return [fits]
    fit = fits[0]
    problem = _ambiguity(matched, fits, evidence, hints)
    problems = [problem] if problem else _cross_check(matched, fit.sizes, evidence)
    return problems or _stack(matched, fit)


def judge_passthrough(matched: MatchedStack, config: Config) -> list[MoeconvError]:
    """Return the problems of a stack that is copied as it is, among them missing experts."""
    layouts = _candidates(matched)
    if isinstance(layouts, MoeconvError):
        return [layouts]
    experts = stated_sizes(matched, config).get(EXPERTS)
    problems = completeness(matched, layouts[0], experts=experts, quantised=False)
    if problems or not layouts[0].per_expert:
        return problems
    return list(config_mismatches(matched, {EXPERTS: _count(matched)}, config))


def _candidates(matched: MatchedStack) -> list[Layout] | MoeconvError:
    """Return the layouts that have these names, or the problem that there is none."""
    if matched.unknown:
        return unknown_tensors(matched)
    if matched.recipe.ids and not matched.recipe.taken:
        return no_range(matched, matched.recipe.ids)
    return candidate_layouts(matched)


def _solve(
    matched: MatchedStack, layouts: list[Layout], evidence: Evidence, hints: SizeHints
) -> list[_Fit] | MoeconvError:
    """Return for each layout and choice of block sizes the first interpretation that fits."""
    blocks = stated_block_sizes(matched, layouts, evidence.config)
    fits: list[_Fit] = []
    reasons: list[str] = []
    for layout in layouts:
        for block_sizes in blocks.choices:
            options = interpretations(matched, layout, block_sizes)
            options = recorded_first(options, layout, matched.name, evidence.dims)
            first_reasons: list[str] | None = None
            for interpretation in options:
                solved = solve(matched, layout, interpretation, hints)
                if isinstance(solved, Sizes):
                    fits.append(_Fit(layout, block_sizes, interpretation, solved))
                    break
                first_reasons = solved if first_reasons is None else first_reasons
            else:
                reasons += first_reasons or []
    return fits or no_fit(matched, layouts, blocks, hints, reasons)


def _ambiguity(
    matched: MatchedStack, fits: list[_Fit], evidence: Evidence, hints: SizeHints
) -> MoeconvError | None:
    """Return the problem that the tensors may also be stored in another way, if they may."""
    layouts = list({fit.layout.name: fit.layout for fit in fits}.values())
    if len(layouts) > 1:
        return ambiguous_layout(matched, layouts)
    if evidence.recorded:
        return None
    best = fits[0]
    layout, chosen = best.layout, best.interpretation
    if layout.ask and evidence.from_layout != layout.name:
        return unconfirmed_layout(matched, layout)
    others = [f.interpretation for f in fits[1:] if axes_of(f.interpretation) != axes_of(chosen)]
    if others:
        return ambiguous_block_size(matched, [chosen, *others])
    for other in transposed_variants(interpretations(matched, layout, best.block_sizes), chosen):
        fitting = isinstance(solve(matched, layout, other, hints), Sizes)
        if fitting and _differs(layout, best.sizes, chosen, other):
            return ambiguous_axis_order(matched, chosen, other)
    return None


def _cross_check(matched: MatchedStack, sizes: Sizes, evidence: Evidence) -> list[MoeconvError]:
    """Return the contradictions between sizes solved from shapes and those stated elsewhere."""
    solved = (sizes.experts, sizes.width, sizes.hidden)
    if evidence.recorded is None:
        named = dict(zip((EXPERTS, WIDTH, HIDDEN), solved, strict=True))
        if sizes.experts == evidence.router:
            del named[EXPERTS]
        return list(config_mismatches(matched, named, evidence.config, evidence.router))
    if evidence.recorded.sizes != solved:
        return [sizes_differ_from_manifest(evidence.recorded, sizes)]
    return []


def _count(matched: MatchedStack) -> int:
    return 1 + max(expert for tensors in matched.tensors.values() for expert in tensors)


def _differs(layout: Layout, sizes: Sizes, one: Interpretation, other: Interpretation) -> bool:
    """Whether two interpretations place any matrix differently: of a grid of 1 x 1 they do not."""

    def placed(interpretation: Interpretation) -> list[object]:
        shapes = [
            geometry(interpretation[line.template, name][1], sizes.of(line, name))
            for line in layout.lines
            for template, name in interpretation
            if template == line.template
        ]
        return [(g.pair_stride, [axis for axis in g.matrix if axis[0] > 1]) for g in shapes]

    return placed(one) != placed(other)


def _stack(matched: MatchedStack, fit: _Fit) -> Stack:
    components = []
    for line in fit.layout.lines:
        for key in ((line.template, c.name) for c in matched.recipe.components):
            if key not in fit.interpretation:
                continue
            tensors = matched.tensors[key]
            component, axes = fit.interpretation[key]
            components.append(
                StoredComponent(
                    line=line,
                    component=component,
                    dtype=matched.sample(key).dtype,
                    axes=axes,
                    geometry=geometry(axes, fit.sizes.of(line, component.name)),
                    tensors=tuple(tensors[e] for e in sorted(tensors)),
                )
            )
    return Stack(
        matched.name,
        matched.recipe,
        fit.layout,
        fit.sizes,
        tuple(sorted(fit.block_sizes.items())),
        tuple(components),
    )
