"""The layers of a checkpoint that a placement map covers."""

from __future__ import annotations

from moeconv.checkpoint.config import Config
from moeconv.core.text import spans
from moeconv.detect.config_sizes import layer_count
from moeconv.detect.stack import Stack
from moeconv.errors import ConfigMismatch, NoExperts, Unsupported, quoted
from moeconv.placement.model import MoeLayers, kind_and_layer, kinds_of


def main_kind(stacks: tuple[Stack, ...]) -> tuple[Stack, ...]:
    """Return the stacks of the kind with most stacks, then most bytes, in layer order."""
    by_name = {stack.name: stack for stack in stacks}
    kinds = [[by_name[kind[layer]] for layer in sorted(kind)] for kind in kinds_of(by_name)]
    main = max(kinds, key=_count_and_bytes, default=[])
    return tuple(main)


def layers_of(stacks: tuple[Stack, ...], config: Config) -> tuple[MoeLayers, tuple[str, ...]]:
    """Return the MoE layers of the main kind of stacks, and those stacks' names in layer order.

    A kind is a name without its layer number; the main one has most stacks, then most bytes.
    Raises NoExperts, Unsupported (layers of unlike E), ConfigMismatch (no layer below the last).
    """
    numbered = tuple(s for s in stacks if kind_and_layer(s.name))
    if not numbered:
        raise NoExperts(
            "no layer of the checkpoint has routed experts",
            cause=f"{len(stacks)} expert stacks, none of them in a numbered layer",
            fix="`moeconv inspect SRC` shows what is there",
        )
    found = ((kind_and_layer(s.name), s) for s in main_kind(numbered))
    main = {kind[1]: stack for kind, stack in found if kind}
    experts = {s.sizes.experts for s in main.values()}
    if len(experts) > 1:
        raise Unsupported(
            "a placement map needs layers that all have the same number of experts",
            at=quoted(next(iter(main.values())).name),
            cause=f"these layers have {', '.join(map(str, sorted(experts)))}",
            fix="shard this checkpoint without a map",
        )
    stated = layers_stated(tuple(main.values()), config)
    hidden = max(main) + 1 if stated is None else stated
    moe = tuple(n for n in main if n < hidden)
    if not moe:
        raise ConfigMismatch(
            "config.json and the tensors disagree on the number of layers",
            at="config.json",
            cause=f"it states {hidden}, but the layers with experts are {spans(tuple(main))}",
        )
    beyond = tuple(n for n in main if n >= hidden)
    layers = MoeLayers(experts.pop(), moe, beyond, hidden, stated=stated is not None)
    return layers, tuple(s.name for s in main.values())


def _count_and_bytes(kind: list[Stack]) -> tuple[int, int]:
    return len(kind), sum(t.nbytes for s in kind for t in s.tensors)


def layers_stated(alike: tuple[Stack, ...], config: Config) -> int | None:
    """Return the number of layers that config.json states for these stacks of one kind."""
    stack = alike[0]
    for section in stack.recipe.config.sections_of(stack.name):
        if count := layer_count(config, section):
            return count
    return None
