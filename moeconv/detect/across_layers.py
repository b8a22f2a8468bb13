"""Cross-layer checks: detect stacks, layers and components that are missing entirely."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor
from moeconv.core.text import spans
from moeconv.detect.config_sizes import mtp_layer_count
from moeconv.detect.moe_layers import layers_stated, main_kind
from moeconv.detect.stack import Stack
from moeconv.errors import ConfigMismatch, MissingExpert, MissingScale, MoeconvError, quoted
from moeconv.layout.shipped import vocabulary
from moeconv.placement.model import kind_and_layer

MAX_LAYERS: Final = 10_000
_MAX_KINDS: Final = 100

_NUMBER = re.compile(r"([0-9]{1,9})\.")


def lost_stacks(
    stacks: Iterable[Stack], others: Iterable[StoredTensor], known: Iterable[str]
) -> Iterator[MoeconvError]:
    """Yield the layers that have a router but no experts.

    A router's tensor has the same name in all layers that have a stack. It is recognised by its
    name, or by E rows in the experts' own block. known: names of stacks that need no report.
    """
    groups: dict[str, dict[str, dict[int, Stack]]] = defaultdict(lambda: defaultdict(dict))
    for stack in stacks:
        if found := kind_and_layer(stack.name):
            (head, tail), layer = found
            groups[head][tail][layer] = stack
    beside: dict[str, dict[str, dict[int, StoredTensor]]]
    beside = defaultdict(lambda: defaultdict(dict))
    for tensor in others:
        if (found := kind_and_layer(tensor.name)) and found[0][0] in groups:
            (head, tail), layer = found
            beside[head][tail][layer] = tensor
    reported = set(known)
    for head, tail, layers in [(h, t, ls) for h, of in groups.items() for t, ls in of.items()]:
        routers = [
            tensors
            for rest, tensors in beside[head].items()
            if _routes(rest, tail, tensors, layers)
        ]
        kinds = list(groups[head].values())
        for layer in sorted({n for tensors in routers for n in tensors} - layers.keys()):
            name = f"{head}{layer}.{tail}".removesuffix(".")
            there = [tensors[layer] for tensors in routers if layer in tensors]
            instead = [other for other in kinds if layer in other]
            # another kind of stacks has its own routers: all of both must be there
            alike = all(layers.keys() <= other.keys() for other in instead)
            if instead and not (alike and len(there) == len(routers)):
                continue
            if name not in reported:
                reported.add(name)
                yield MissingExpert(
                    f"{quoted(name)} has no experts at all",
                    at=quoted(there[0].name),
                    cause=f"it has this tensor, as do {len(layers)} other layers with experts",
                )


def router_counts(others: Iterable[StoredTensor]) -> dict[str, int]:
    """How many experts the routers of a block choose from, by the block's name.

    The rows of its gate's weight, or of a bias for each expert; blocks whose routers' tensors
    disagree are left out.
    """
    routers = vocabulary().routers
    rows: dict[str, set[int]] = defaultdict(set)
    for tensor in others:
        words = tensor.name.split(".")
        if tensor.shape and routers.mentioned(words) and not routers.excluded(words):
            for end in range(max(len(words) - 3, 1), len(words)):
                rows[".".join(words[:end])].add(tensor.shape[0])
    return {block: min(counts) for block, counts in rows.items() if len(counts) == 1}


def lost_layers(
    stacks: tuple[Stack, ...], others: Iterable[StoredTensor], config: Config
) -> Iterator[MoeconvError]:
    """Yield the problem of layers that config.json counts but that have no tensor at all.

    Checked for the kind with most stacks, in models with one sequence of layers: an encoder and a
    decoder are counted under keys of their own. Not checked where there are only experts or only
    MTP layers, nor for last layers that may be MTP's, which are stored under other names.
    """
    main = main_kind(stacks)
    kind = kind_and_layer(main[0].name) if main else None
    stated = layers_stated(main, config) if kind else None
    if kind is None or stated is None or stated > MAX_LAYERS:
        return
    head = kind[0][0]
    beside = _numbers(head, (t.name for t in others))
    present = {n for n in beside | _numbers(head, (s.name for s in stacks)) if n < stated}
    lost = [n for n in range(stated) if n not in present]
    apart = vocabulary().own_layer_counts.mentioned(head.split("."))
    if not lost or not present or not beside or apart:
        return
    if lost[0] > max(present) and len(lost) <= mtp_layer_count(config):
        return
    yield ConfigMismatch(
        f"layer {lost[0]} has no tensor, but config.json states {stated} layers",
        at=f"{quoted(f'{head}{lost[0]}')}, next to {quoted(main[0].name)}",
        cause=f"{len(lost)} of {stated} layers have no tensors: {spans(tuple(lost))}",
        fix="download the shards that hold them, or use the config.json that belongs to these "
        "tensors",
    )


def _numbers(head: str, names: Iterable[str]) -> set[int]:
    """Return the numbers that follow `head` in these names."""
    found = (_NUMBER.match(name, len(head)) for name in names if name.startswith(head))
    return {int(match[1]) for match in found if match}


def unequal_stacks(stacks: Iterable[Stack], stated: frozenset[str]) -> Iterator[MoeconvError]:
    """Yield the problems of stacks of one kind with different numbers of experts.

    A missing last expert leaves no gap in the ids; only other layers show it. stated: names of the
    stacks whose number config.json states, which have been checked against it.
    """
    groups: dict[tuple[str, str], list[Stack]] = defaultdict(list)
    for stack in stacks:
        found = kind_and_layer(stack.name)
        if found and stack.name not in stated:
            groups[found[0]].append(stack)
    for alike in groups.values():
        usual = max(s.sizes.experts for s in alike)
        odd = [s for s in alike if s.sizes.experts != usual]
        if odd:
            yield ConfigMismatch(
                f"{quoted(odd[0].name)} has {odd[0].sizes.experts} experts, others {usual}",
                at=quoted(odd[0].name),
                cause=f"{len(odd)} of {len(alike)} stacks have fewer, and config.json does not "
                "say how many there should be",
                fix="use the config.json that belongs to these tensors, or download the shards "
                "again",
            )


def bare_stacks(stacks: Iterable[Stack]) -> Iterator[MoeconvError]:
    """Yield the stacks that lack components which others of their kind and dtype have."""
    groups: dict[tuple[str, str, str, str, str], list[tuple[Stack, frozenset[str]]]]
    groups = defaultdict(list)
    for stack in stacks:
        found = kind_and_layer(stack.name)
        for projection in stack.layout.projections if found else ():
            dtypes = {
                m.component: m.dtype for m in stack.members if projection in m.line.projections
            }
            weight, dtype = next((c.name, d) for c, d in dtypes.items() if c.weight)
            rest = frozenset(c.name for c in dtypes if not (c.weight or c.inputs))
            kind = found[0] if found else ("", "")
            groups[*kind, projection, weight, dtype].append((stack, rest))
    reported: set[str] = set()
    for (*_, projection, weight, dtype), alike in groups.items():
        sets = Counter(rest for _, rest in alike)
        # only the most frequent sets are compared, so that the work stays linear
        usual = [names for names, _ in sets.most_common(_MAX_KINDS)]
        fullest = {rest: next((s for s in usual if rest < s), None) for rest in sets}
        for stack, rest in alike:
            fuller = fullest[rest]
            if fuller is None or stack.name in reported:
                continue
            reported.add(stack.name)
            lacking = ", ".join(map(quoted, sorted(fuller - rest)))
            yield MissingScale(
                f"{quoted(stack.name)} lacks {lacking} of its {projection} projections",
                at=quoted(stack.name),
                cause=f"{sets[fuller]} of {len(alike)} stacks with {quoted(weight)} in {dtype} "
                f"have {'it' if len(fuller - rest) == 1 else 'them'}",
            )


def _routes(
    rest: str, tail: str, tensors: dict[int, StoredTensor], layers: dict[int, Stack]
) -> bool:
    if not layers.keys() <= tensors.keys():
        return False
    words = rest.split(".")
    routers = vocabulary().routers
    if routers.mentioned(words):
        return not routers.excluded(words)
    return rest.startswith(tail.partition(".")[0] + ".") and all(
        tensors[n].shape[:1] == (stack.sizes.experts,) for n, stack in layers.items()
    )
