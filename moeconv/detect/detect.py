"""Find the expert stacks of a checkpoint by given recipes: names first, then shapes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor
from moeconv.core.names import natural_key
from moeconv.core.text import counted, quoted_list
from moeconv.detect.across_layers import (
    bare_stacks,
    lost_layers,
    lost_stacks,
    router_counts,
    unequal_stacks,
)
from moeconv.detect.completeness import bare_dtype
from moeconv.detect.config_sizes import (
    config_mismatches,
    states_experts,
    states_quantisation,
)
from moeconv.detect.diagnose import too_many_stacks
from moeconv.detect.interpretations import RecordedDims
from moeconv.detect.judge import Evidence, judge, judge_passthrough
from moeconv.detect.match import MatchedStack, candidate_layouts, in_ranges, match_names
from moeconv.detect.solve import EXPERTS
from moeconv.detect.stack import Stack
from moeconv.errors import LayoutContradiction, MoeconvError, UnknownLayout, quoted
from moeconv.layout.recipe import Recipe
from moeconv.manifest.model import MAX_STACKS, StackEntry

MAX_PROBLEMS: Final = 100  # reported for one checkpoint


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

    @property
    def unclaimed(self) -> tuple[StoredTensor, ...]:
        """The tensors that no recipe knows as an expert's."""
        known = set(self.passthrough_tensors)
        return tuple(t for t in self.others if t not in known) if known else self.others

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
    recorded: dict[str, StackEntry] | None = None,
    dims: RecordedDims | None = None,
) -> Detection:
    """Find the expert stacks among `tensors`, from headers alone. Collects problems, raises none.

    files: the names of the files, for messages.
    from_layout: decides between layouts that fit a stack equally well.
    recorded: for outputs of moeconv, what the manifest says of each stack, which is then only
    compared with the tensors; dims: those of its matrices.
    """
    stacks, others = match_names(
        tensors,
        in_ranges(recipes, config),
        files,
        owners={name: entry.recipe for name, entry in (recorded or {}).items()},
    )
    if len(stacks) > MAX_STACKS:
        return Detection((), tensors, (too_many_stacks(stacks),), tuple(stacks))
    passthrough = {name: matched for name, matched in stacks.items() if matched.passthrough}
    passthrough_tensors = tuple(t for m in passthrough.values() for t in m.all_tensors)
    others += passthrough_tensors
    problems = _Problems()
    if from_layout is not None:
        unknown = _unknown_from_layout(from_layout, recipes)
        problems += unknown or _unfit_from_layout(from_layout, stacks)
    rejected = []
    for name in sorted(passthrough, key=natural_key):
        found = judge_passthrough(passthrough[name], config)
        problems += found
        rejected += [name] if found else []
    accepted = []
    routed = router_counts(others) if recorded is None else {}
    for name in sorted(stacks.keys() - passthrough.keys(), key=natural_key):
        entry, router = (recorded or {}).get(name), routed.get(name.rpartition(".")[0])
        judged = judge(stacks[name], Evidence(config, from_layout, entry, dims or {}, router))
        if isinstance(judged, Stack):
            accepted.append(judged)
        else:
            problems += judged
            rejected.append(name)
    problems += lost_stacks(accepted, others, stacks)
    if recorded is None:
        problems += _across_stacks(accepted, others, config)
    return Detection(
        tuple(accepted),
        others,
        problems.all(),
        tuple(rejected),
        tuple(sorted(passthrough, key=natural_key)),
        (
            *_passthrough_notes(passthrough),
            *_no_scales_notes(stacks if recorded is None else {}, config),
            *(_router_notes(accepted, stacks, config) if recorded is None else ()),
        ),
        passthrough_tensors,
    )


def _across_stacks(
    stacks: list[Stack], others: tuple[StoredTensor, ...], config: Config
) -> Iterator[MoeconvError]:
    """Yield what is wrong with stacks that are complete each by itself, compared with others."""
    stated = (
        s.name for s in stacks if s.recipe.varying or states_experts(s.name, s.recipe, config)
    )
    yield from unequal_stacks(stacks, frozenset(stated))
    yield from bare_stacks(stacks)
    yield from lost_layers(tuple(stacks), others, config)


class _Problems:
    """The first problems of a checkpoint, and the number of all."""

    def __init__(self) -> None:
        self._first: list[MoeconvError] = []
        self._count = 0

    def __iadd__(self, problems: Iterable[MoeconvError]) -> _Problems:
        for problem in problems:
            self._count += 1
            if len(self._first) < MAX_PROBLEMS:
                self._first.append(problem)
        return self

    def all(self) -> tuple[MoeconvError, ...]:
        """Return the first problems; if there are more, the first one says how many."""
        if self._count > len(self._first):
            total = f"{self._count:,} problems in all; the first {len(self._first):,} are listed"
            self._first[0].cause = f"{self._first[0].cause}; {total}"
        return tuple(self._first)


def _passthrough_notes(passthrough: dict[str, MatchedStack]) -> Iterator[str]:
    reasons = Counter(str(matched.passthrough) for matched in passthrough.values())
    for component, count in reasons.items():
        yield (
            f"{counted(count, 'stack')} with {quoted(component)}: copied through unchanged, "
            "because this format cannot be rearranged"
        )


def _router_notes(
    accepted: list[Stack], stacks: dict[str, MatchedStack], config: Config
) -> Iterator[str]:
    """Yield notes on stacks with another number of experts than config.json states."""
    found: dict[str, list[str]] = defaultdict(list)
    for stack in accepted:
        experts = {EXPERTS: stack.sizes.experts}
        for problem in config_mismatches(stacks[stack.name], experts, config):
            found[f"{problem.at}: {problem.cause}"].append(stack.name)
    for text, names in found.items():
        yield f"{text}; so has the router of {quoted_list(names, most=1)}, which decides"


def _no_scales_notes(stacks: dict[str, MatchedStack], config: Config) -> Iterator[str]:
    dtypes = Counter(
        dtype
        for matched in stacks.values()
        if (dtype := bare_dtype(matched))
        # fp8 without scales may be intended where config.json states no quantisation
        and (
            not dtype.startswith("F8") or states_quantisation(config, matched.recipe, matched.name)
        )
    )
    for dtype, count in dtypes.items():
        yield f"{counted(count, 'stack')} of {dtype} without scales: converted as they are"


def _unknown_from_layout(name: str, recipes: tuple[Recipe, ...]) -> list[MoeconvError]:
    names = sorted({layout.name for recipe in recipes for layout in recipe.layouts})
    if not names or name in names:
        return []
    return [
        UnknownLayout(
            f"no recipe of this family has a layout {quoted(name)}",
            cause=f"it has {', '.join(map(quoted, names))}",
            fix=f"pass one of these to `--from-layout`, {quoted(names[0])} for example",
        )
    ]


def _unfit_from_layout(name: str, stacks: dict[str, MatchedStack]) -> list[MoeconvError]:
    """Return the problem that no stack's names are those of the layout, if that is so."""
    named = [(stack, candidate_layouts(matched)) for stack, matched in stacks.items()]
    if not named or any(
        isinstance(layouts, list) and name in (layout.name for layout in layouts)
        for _, layouts in named
    ):
        return []
    return [
        LayoutContradiction(
            f"no expert stack has the names of layout {quoted(name)}",
            at=", ".join(quoted(stack) for stack, _ in named[:3]),
            cause="`--from-layout` is the layout that SRC is stored in, but its names are those of "
            "another",
            fix="drop `--from-layout`; `moeconv inspect SRC` shows what is there",
        )
    ]
