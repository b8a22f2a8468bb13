"""Which stacks a checkpoint has, and how each is stored: recipes, names, then shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor
from moeconv.core.names import natural_key
from moeconv.core.text import counted
from moeconv.detect.across_layers import bare_stacks, lost_layers, lost_stacks, unequal_stacks
from moeconv.detect.block_sizes import several_sizes, stated_granules
from moeconv.detect.candidates import by_names
from moeconv.detect.completeness import bare_dtype, completeness
from moeconv.detect.config_sizes import (
    against_config,
    said_sizes,
    says_quantised,
    says_scaled,
    states_experts,
)
from moeconv.detect.diagnose import (
    fits_several,
    names_alone,
    no_fit,
    not_as_in_manifest,
    too_many_stacks,
    turned_or_not,
    unknown_inside,
)
from moeconv.detect.id_ranges import in_ranges, no_range
from moeconv.detect.interpretations import Reading, bound, readings, turned_about
from moeconv.detect.match import Found, collect
from moeconv.detect.recorded_ranks import RecordedRanks, recorded_first
from moeconv.detect.solve import Fit, fit
from moeconv.detect.stack import Sizes, Stack, StoredComponent
from moeconv.errors import (
    LayoutContradiction,
    MoeconvError,
    UnknownLayout,
    quoted,
)
from moeconv.layout.axes import geometry
from moeconv.layout.recipe import Layout, Recipe
from moeconv.manifest.model import MAX_STACKS, StackEntry

MAX_PROBLEMS: Final = 100  # of one checkpoint that are kept


@dataclass(frozen=True, slots=True)
class Detection:
    """The expert stacks of a checkpoint, its other tensors, and the problems found on the way.

    others: tensors of no stack in `stacks`, `passthrough_tensors` included.
    problems: at most the first `MAX_PROBLEMS`.
    rejected: names of stacks that have problems and so are not in `stacks`.
    passthrough: names of stacks in a format that cannot be rearranged: copied as they are.
    """

    stacks: tuple[Stack, ...]
    others: tuple[StoredTensor, ...]
    problems: tuple[MoeconvError, ...]
    rejected: tuple[str, ...] = ()
    passthrough: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    passthrough_tensors: tuple[StoredTensor, ...] = ()

    def checked(self) -> Detection:
        """Return this detection. Raises the first of its problems, with the others attached."""
        if self.problems:
            raise self.problems[0].with_also(self.problems[1:])
        return self


def detect(
    tensors: tuple[StoredTensor, ...],
    config: Config,
    recipes: tuple[Recipe, ...],
    *,
    files: tuple[str, ...],
    from_layout: str | None = None,
    known: dict[str, StackEntry] | None = None,
    ranks: RecordedRanks | None = None,
) -> Detection:
    """Find the expert stacks among `tensors` (headers' facts, no data).

    files: the names of the files, for messages.
    from_layout: decides between layouts that fit one stack equally; known: for outputs of
    moeconv, what the manifest says of each stack, which then is not judged anew; told: what its
    matrices are there, where shapes leave several readings open. Problems are
    collected, not raised.
    """
    collected, others = collect(
        tensors,
        in_ranges(recipes, config),
        files,
        owners={name: entry.recipe for name, entry in (known or {}).items()},
    )
    if len(collected) > MAX_STACKS:
        return Detection((), tensors, (too_many_stacks(collected),), tuple(collected))
    passed = {name: found for name, found in collected.items() if found.passthrough}
    as_they_are = tuple(t for found in passed.values() for t in found.all())
    others += as_they_are
    problems = _Kept()
    if from_layout is not None:
        problems += _unknown_from_layout(from_layout, recipes) or _unfit_from_layout(
            from_layout, collected
        )
    stacks, damaged = [], []
    for name in sorted(passed, key=natural_key):
        unfit = _judge_passed(name, passed[name], config)
        problems += unfit
        damaged += [name] if unfit else []
    for name in sorted(collected.keys() - passed.keys(), key=natural_key):
        judged = _judge(
            name,
            collected[name],
            config,
            known=(known or {}).get(name),
            from_layout=from_layout,
            ranks=ranks or {},
        )
        if isinstance(judged, Stack):
            stacks.append(judged)
        else:
            problems += judged
            damaged.append(name)
    problems += lost_stacks(stacks, others, collected)
    if known is None:
        stated = (
            s.name for s in stacks if s.recipe.varying or states_experts(s.name, s.recipe, config)
        )
        problems += unequal_stacks(stacks, frozenset(stated))
        problems += bare_stacks(stacks)
        problems += lost_layers(tuple(stacks), others, config)
    return Detection(
        tuple(stacks),
        others,
        problems.all(),
        tuple(damaged),
        tuple(sorted(passed, key=natural_key)),
        (*_said_of_passed(passed), *_said_of_bare(collected if known is None else {}, config)),
        as_they_are,
    )


class _Kept:
    """The first problems of a checkpoint; of the others, that they were there."""

    def __init__(self) -> None:
        self._first: list[MoeconvError] = []
        self._count = 0

    def __iadd__(self, found: Iterable[MoeconvError]) -> _Kept:
        for problem in found:
            self._count += 1
            if len(self._first) < MAX_PROBLEMS:
                self._first.append(problem)
        return self

    def all(self) -> tuple[MoeconvError, ...]:
        """Those that were kept; the first says how many there are, where it is not all of them."""
        if self._count > len(self._first):
            told = f"{self._count:,} problems in all, the first {len(self._first):,} are listed"
            self._first[0].cause = f"{self._first[0].cause}; {told}"
        return tuple(self._first)


def _said_of_passed(passed: dict[str, Found]) -> Iterator[str]:
    reasons: dict[str, int] = {}
    for found in passed.values():
        reasons[str(found.passthrough)] = reasons.get(str(found.passthrough), 0) + 1
    for component, count in reasons.items():
        yield (
            f"{counted(count, 'stack')} with {quoted(component)}: copied through as they are, "
            "this format cannot be rearranged"
        )


def _said_of_bare(collected: dict[str, Found], config: Config) -> Iterator[str]:
    dtypes = Counter(
        dtype
        for stack, found in collected.items()
        if (dtype := bare_dtype(found))
        # fp8 may be meant as it is, if nothing is said to be quantised
        and (not dtype.startswith("F8") or says_quantised(config, found.recipe, stack))
    )
    for dtype, count in dtypes.items():
        yield f"{counted(count, 'stack')} of {dtype} without scales: moved as they are"


def _unknown_from_layout(name: str, recipes: tuple[Recipe, ...]) -> list[MoeconvError]:
    names = sorted({layout.name for recipe in recipes for layout in recipe.layouts})
    if not names or name in names:
        return []
    return [
        UnknownLayout(
            f"no recipe of this family has a layout {quoted(name)}",
            cause=f"it has {', '.join(map(quoted, names))}",
            fix=f"give one of these to `--from-layout`, {quoted(names[0])} for example",
        )
    ]


def _unfit_from_layout(name: str, collected: dict[str, Found]) -> list[MoeconvError]:
    """A layout that no stack's names can have: to go on without a word would be to guess."""
    named = [(stack, by_names(found)) for stack, found in collected.items()]
    if not named or any(
        isinstance(layouts, list) and name in (layout.name for layout in layouts)
        for _, layouts in named
    ):
        return []
    return [
        LayoutContradiction(
            f"no expert stack has the names of layout {quoted(name)}",
            at=", ".join(quoted(stack) for stack, _ in named[:3]),
            cause="`--from-layout` says how SRC is stored, and SRC says otherwise",
            fix="leave it away; `moeconv inspect SRC` shows what is there",
        )
    ]


def _judge(
    name: str,
    found: Found,
    config: Config,
    *,
    known: StackEntry | None,
    from_layout: str | None,
    ranks: RecordedRanks,
) -> Stack | list[MoeconvError]:
    candidates = _candidates(name, found)
    if isinstance(candidates, MoeconvError):
        return [candidates]
    wanted = known.layout if known else from_layout
    candidates = [c for c in candidates if c.name == wanted] or candidates
    said = _from_manifest(known) if known else said_sizes(name, found.recipe, config)
    problems = completeness(
        name,
        found,
        candidates[0],
        experts=said.get("experts"),
        quantised=not known and says_scaled(config, found.recipe, name),
    )
    if problems:
        return problems
    choices, unsaid = stated_granules(name, found, candidates, config)
    count = _count(found) if candidates[0].numbered else None
    fits = [
        (c, granules, *_first_fit(options, found, c, count, said))
        for c in candidates
        for granules in choices
        for options in (recorded_first(readings(found, c, granules), c, name, ranks),)
    ]
    survivors = [(la, g, reading, f.sizes) for la, g, reading, f in fits if f.sizes is not None]
    layouts = list({layout.name: layout for layout, *_ in survivors}.values())
    if not survivors:
        why = [reason for *_, f in fits for reason in f.reasons]
        return [no_fit(name, found, candidates, choices, unsaid, count, said, why)]
    if len(layouts) > 1:
        return [fits_several(name, found, layouts)]
    layout, granules, reading, sizes = survivors[0]
    if layout.ask and not known and from_layout != layout.name:
        return [names_alone(name, found, layout)]
    others = [r for *_, r, _ in survivors[1:] if bound(r) != bound(reading)]
    if others and not known:
        return [several_sizes(name, found, [reading, *others])]
    for other in () if known else turned_about(readings(found, layout, granules), reading):
        fitting = fit(found, layout, reading=other, count=count, known=said).sizes is not None
        if fitting and _elsewhere(layout, sizes, reading, other):
            return [turned_or_not(name, found, reading, other)]
    if known and known.sizes != (sizes.experts, sizes.width, sizes.hidden):
        return [not_as_in_manifest(name, known, sizes)]
    held = {"experts": sizes.experts, "width": sizes.width, "hidden": sizes.hidden}
    problems = [] if known else against_config(name, found.recipe, held, config)
    return problems or _stack(name, found, layout, sizes, granules, reading)


def _candidates(name: str, found: Found) -> list[Layout] | MoeconvError:
    """The layouts whose names these are, or why there is none."""
    if found.unknown:
        return unknown_inside(name, found)
    if found.recipe.ids and not found.recipe.taken:
        return no_range(name, found)
    return by_names(found)


def _judge_passed(name: str, found: Found, config: Config) -> list[MoeconvError]:
    """What is wrong with a stack that stays as it is: its experts are counted all the same."""
    candidates = _candidates(name, found)
    if isinstance(candidates, MoeconvError):
        return [candidates]
    said = said_sizes(name, found.recipe, config).get("experts")
    problems = completeness(name, found, candidates[0], experts=said, quantised=False)
    if problems or not candidates[0].per_expert:
        return problems
    return against_config(name, found.recipe, {"experts": _count(found)}, config)


def _first_fit(
    options: list[Reading], found: Found, layout: Layout, count: int | None, said: dict[str, int]
) -> tuple[Reading, Fit]:
    """The first reading that fits; where none does, the first and why not."""
    tried: list[tuple[Reading, Fit]] = []
    for reading in options:
        tried.append((reading, fit(found, layout, reading=reading, count=count, known=said)))
        if tried[-1][1].sizes is not None:
            return tried[-1]
    return tried[0] if tried else ({}, Fit())


def _from_manifest(entry: StackEntry) -> dict[str, int]:
    return {"experts": entry.experts, "width": entry.width, "hidden": entry.hidden}


def _count(found: Found) -> int:
    return 1 + max(expert for tensors in found.tensors.values() for expert in tensors)


def _elsewhere(layout: Layout, sizes: Sizes, one: Reading, other: Reading) -> bool:
    """Whether a reading has any matrix in another place: turned or not, a grid of 1 x 1 is one."""

    def places(reading: Reading) -> list[object]:
        shapes = [
            geometry(reading[line.template, name][1], sizes.of(line, name))
            for line in layout.lines
            for template, name in reading
            if template == line.template
        ]
        return [(g.pair_stride, [axis for axis in g.matrix if axis[0] > 1]) for g in shapes]

    return places(one) != places(other)


def _stack(  # noqa: PLR0917
    name: str,
    found: Found,
    layout: Layout,
    sizes: Sizes,
    granules: dict[str, int],
    reading: Reading,
) -> Stack:
    members = []
    for line in layout.lines:
        for key in ((line.template, c.name) for c in found.recipe.components):
            if key not in reading:
                continue
            tensors = found.tensors[key]
            component, axes = reading[key]
            members.append(
                StoredComponent(
                    line=line,
                    component=component,
                    dtype=next(iter(tensors.values())).dtype,
                    axes=axes,
                    geometry=geometry(axes, sizes.of(line, component.name)),
                    tensors=tuple(tensors[e] for e in sorted(tensors)),
                )
            )
    return Stack(name, found.recipe, layout, sizes, tuple(sorted(granules.items())), tuple(members))
