"""Reading a recipe's TOML: all problems of a file at once, with the key and a suggestion."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from typing import Final, TypeAlias

from moeconv.core.schema import MAX_KEPT, Problems, Table
from moeconv.core.text import counted
from moeconv.errors import BadRecipe, quoted
from moeconv.layout.axes import EXPERT, IN, OUT, PAIR, Axes, AxesSyntax, parse_axes
from moeconv.layout.recipe import (
    ANYTHING,
    DOWN,
    GATE,
    HALF_APART,
    TAKES,
    UP,
    WEIGHT,
    Component,
    ConfigKeys,
    Ids,
    Layout,
    Recipe,
    TensorTemplate,
    forms_of,
    half_apart,
    matrix_axes,
)

_LINES: Final[dict[str, tuple[str, ...]]] = {
    "gate": (GATE,),
    "up": (UP,),
    "down": (DOWN,),
    "gate_up": (GATE, UP),
    "up_gate": (UP, GATE),
}
_TextLists: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_PLACEHOLDERS = re.compile(r"\{([^{}]*)\}")
# a key of two characters costs a kilobyte once it is parsed, and each of its parts again
MAX_RECIPE_BYTES: Final = 128 * 1024
_MAX_KEY_PARTS: Final = 16
_MAX_COMPONENTS: Final = 1000
_MAX_LAYOUTS: Final = 100
_MAX_PATTERNS: Final = 100
_WORD: Final = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
# never from a quote behind a backslash: each of these would be looked through to the line's end
_START: Final = r"(?<![\w\\-])"
_LONG_KEY: Final = re.compile(rf"{_START}{_WORD}(?:[ \t]*+\.[ \t]*+{_WORD}){{{_MAX_KEY_PARTS}}}")


def parse_recipe(text: str, *, where: str) -> Recipe:
    """Parse and check a recipe. Raises BadRecipe with every problem."""
    problems = Problems()
    if len(text) > MAX_RECIPE_BYTES:
        problems.add("", f"is longer than {MAX_RECIPE_BYTES:,} characters")
    elif long := _LONG_KEY.search(text):
        problems.add("", f"has a key of more than {_MAX_KEY_PARTS} parts: {long[0][:40]}…")
    if problems.count:
        raise _refuse(where, problems)
    try:
        doc = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:  # an integer of too many digits is a ValueError
        problems.add("", str(problem))
        raise _refuse(where, problems) from None
    top = Table(doc, "", problems)
    components = _components(top.table("components"))
    layouts = _layouts(top.table("layouts"), components)
    fuse, unfuse = top.optional_text("fuse"), top.optional_text("unfuse")
    recipe = Recipe(
        name=_name(top, "name"),
        title=top.text("title", default=""),
        model_types=top.texts("model_types", default=()),
        architectures=top.texts("architectures", default=()),
        stacks=_stacks(top),
        config=_config(top.table("config")),
        layouts=(*layouts, *_half_apart(layouts, fuse, unfuse)),
        components=components,
        fuse=fuse,
        unfuse=unfuse,
        toml=text,
        passed=_passed(top.table("passed")) if top.has("passed") else (),
        varying=top.flag("varying"),
        ids=_ids(top.table("ids")) if top.has("ids") else None,
    )
    top.expects(("targets",))  # where the shared layouts go; says nothing once they are here
    top.finish()
    _check_whole(recipe, top)
    if problems.count:
        raise _refuse(where, problems)
    return recipe


def _half_apart(layouts: tuple[Layout, ...], fuse: str | None, unfuse: str | None) -> list[Layout]:
    """The mixture of two layouts that transformers may save, if the two differ in names.

    It saves weights as the family publishes them, in layout `unfuse` or else the first one, beside
    companions under their fused names.
    """
    by_name = {layout.name: layout for layout in layouts}
    first = layouts[0].name if layouts else ""
    fused, published = by_name.get(fuse or ""), by_name.get(unfuse or first)
    if not fused or not published or fused.numbered or HALF_APART in by_name:
        return []
    apart = {ln.template for ln in published.lines}.isdisjoint(ln.template for ln in fused.lines)
    return [half_apart(published, fused)] if apart else []


def _refuse(where: str, problems: Problems) -> BadRecipe:
    return BadRecipe(
        f"{quoted(where)} is not a valid recipe: {counted(problems.count, 'problem')}",
        at=quoted(where),
        cause="\n         ".join(problems.shown(MAX_KEPT)),
    )


def _name(top: Table, key: str) -> str:
    name = top.word(key)
    if name and not _NAME.fullmatch(name):
        top.problem(key, "must be lower-case letters, digits, `_`, `.`, `-`")
    return name


def _stacks(top: Table) -> tuple[str, ...]:
    listed = isinstance(top.raw("stack"), list)
    stacks = top.texts("stack") if listed else (top.word("stack"),)
    if len(stacks) > _MAX_PATTERNS:
        top.problem("stack", f"has {len(stacks):,} name patterns, more than {_MAX_PATTERNS}")
        return ()
    for stack in stacks:
        # a placeholder that occurs twice would be matched in every combination
        if stack and sorted(_PLACEHOLDERS.findall(stack)) != ["layer", "prefix"]:
            top.problem(
                "stack",
                "must contain `{prefix}` and `{layer}`, each once, and no other placeholder",
            )
        elif stack and not stack.startswith("{prefix}"):
            top.problem("stack", "must begin with `{prefix}`")
    if not stacks:
        top.problem("stack", "must be a name pattern, or a list of them")
    return stacks


def _few(table: Table, most: int) -> tuple[str, ...]:
    """The names in a table; each costs something with each of another table."""
    names = table.names()
    if len(names) > most:
        table.problem("", f"has {len(names):,} entries, more than {most:,}")
    return names[:most]


def _axes(table: Table, key: str, text: str) -> Axes:
    try:
        return parse_axes(text)
    except AxesSyntax as problem:
        table.problem(key, str(problem))
        return Axes(())


def _possible_axes(table: Table, key: str) -> tuple[Axes, ...]:
    """Axes, or a list of those that a tensor may have."""
    listed = table.texts(key) if isinstance(table.raw(key), list) else (table.text(key),)
    if not listed:
        table.problem(key, "must be axes, or a list of them")
    return tuple(_axes(table, key, text) for text in listed) or (Axes(()),)


def _passed(table: Table) -> tuple[str, ...]:
    names = table.texts("components")
    table.finish()
    return names


def _ids(table: Table) -> Ids:
    ids = Ids(table.texts("first", default=()), table.texts("stop", default=()))
    table.finish()
    return ids


def _components(table: Table) -> tuple[Component, ...]:
    out = []
    for name in _few(table, _MAX_COMPONENTS):
        entry = table.table(name)
        possible_axes = _possible_axes(entry, "axes")
        if any(axes.letters & {EXPERT, PAIR} for axes in possible_axes):
            entry.problem("axes", "must be those of one matrix; E and G come from the layout")
        if name == WEIGHT and len({axes.letters for axes in possible_axes}) > 1:
            entry.problem("axes", "of a weight may differ only in their blocks")
        out.append(
            Component(
                name=name,
                axes=possible_axes[0],
                suffix=entry.text("suffix"),
                possible_axes=possible_axes,
                weight=entry.flag("weight") or name == WEIGHT,
                scales=entry.flag("scales"),
                inputs=entry.flag("inputs"),
                everywhere=entry.flag("everywhere"),
                of=entry.text("of", default=""),
                note=entry.optional_text("note"),
                unequal=entry.optional_text("unequal"),
                parameter=entry.text("parameter", default=""),
            )
        )
        _check_roles(entry, out[-1])
        entry.finish()
    out.sort(key=lambda c: c.name != WEIGHT)  # shared components are added behind a recipe's own
    if WEIGHT not in (c.name for c in out):
        table.problem(WEIGHT, "is missing: every projection has one")
    suffixes = [c.suffix for c in out]
    if len(set(suffixes)) != len(suffixes):
        table.problems.add("components", "two have the same suffix")
    parameters = [c.parameter or c.name for c in out]
    if len(set(parameters)) != len(parameters):
        table.problems.add("components", "two have the same parameter")
    return tuple(out)


def _check_roles(entry: Table, component: Component) -> None:
    for key, role in (("scales", component.scales), ("inputs", component.inputs)):
        if role and component.weight:
            entry.problem(
                key, "is only for components that accompany a weight, and this is a weight"
            )
    if component.scales and component.inputs:
        entry.problem(
            "inputs", "cannot be combined with `scales`, which says that it scales weights"
        )


def _layouts(table: Table, components: tuple[Component, ...]) -> tuple[Layout, ...]:
    out = []
    for name in _few(table, _MAX_LAYOUTS):
        entry = table.table(name)
        special = entry.table("axes") if entry.has("axes") else None
        square, ask = entry.optional_text("square"), entry.optional_text("ask")
        takes = ANYTHING
        if entry.has("takes"):
            takes = entry.formed("takes", f"one of {', '.join(TAKES)}", TAKES.__contains__)
        lines = [_line(entry, key, special, components) for key in entry.names() if key in _LINES]
        if special:
            special.finish()
        entry.expects(_LINES)
        entry.finish()
        _check_layout(entry, lines, square)
        out.append(Layout(name, tuple(lines), square, ask, takes))
    if not out:
        table.problems.add("layouts", "must have at least one layout")
    return tuple(out)


def _line(
    entry: Table, key: str, special: Table | None, components: tuple[Component, ...]
) -> TensorTemplate:
    template, colon, axes_text = entry.text(key).rpartition(": ")
    if not colon:
        entry.problem(key, "must be `NAME TEMPLATE: AXES`")
    axes = _axes(entry, key, axes_text)
    overrides = []
    listed = special.table(key) if special and special.has(key) else None
    if listed:
        for name in listed.names():
            overrides.append((name, _possible_axes(listed, name)))
            if name not in (c.name for c in components):
                listed.problem(name, "is not a component of this recipe")
    line = TensorTemplate(_LINES[key], template, axes, tuple(overrides))
    before = entry.problems.count
    _check_line(entry, key, line)
    if entry.problems.count == before:
        _check_matrices(entry, key, line, components)
    return line


def _check_matrices(
    entry: Table, key: str, line: TensorTemplate, components: tuple[Component, ...]
) -> None:
    """Every layout arranges the same matrices: the axes of a component are its own, E and G."""
    for component in components:
        listed = dict(line.overrides).get(component.name, ())
        is_weight = component.name == WEIGHT
        for text in _misfits(line.axes, component.possible_axes, listed, is_weight=is_weight):
            entry.problem(key, f"gives {component.name} {text}")


@cache  # recipes have most components and many axes in common
def _misfits(
    line: Axes, possible_axes: tuple[Axes, ...], listed: tuple[Axes, ...], *, is_weight: bool
) -> tuple[str, ...]:
    """What is wrong with the axes of a component beside a weight of axes `line`."""
    own = [set(axes.flat) for axes in possible_axes]
    found = []
    for axes in (
        *(forms_of(line, r, listed, is_weight=is_weight)[0] for r in possible_axes),
        *listed,
    ):
        if matrix_axes(axes) not in own:
            known = ", ".join(f"`{axes}`" for axes in possible_axes)
            found.append(f"`{axes}`, but its own are {known}")
        elif EXPERT in axes.letters and axes.flat[0].letter != EXPERT:
            found.append(f"`{axes}`: E must come first")
    return tuple(dict.fromkeys(found))


def _check_line(entry: Table, key: str, line: TensorTemplate) -> None:
    placeholders = _PLACEHOLDERS.findall(line.template)
    unknown = set(placeholders) - {"stack", "expert", "component", "parameter", "suffix"}
    if unknown:
        entry.problem(key, f"unknown placeholder `{{{min(unknown)}}}`")
    if line.template == "{stack}":
        entry.problem(key, "must contain more than `{stack}`")
    if not line.template.startswith("{stack}") or len(set(placeholders)) != len(placeholders):
        entry.problem(key, "must begin with `{stack}` and use each placeholder once")
    named = [p for p in ("component", "parameter", "suffix") if p in placeholders]
    if len(named) > 1:
        entry.problem(key, f"has both `{{{named[0]}}}` and `{{{named[1]}}}`")
    for axes in (line.axes, *(a for _, listed in line.overrides for a in listed)):
        letters = axes.letters
        if (PAIR in letters) and len(line.projections) == 1:
            entry.problem(key, "has an axis G but joins no projections")
        if line.per_expert and EXPERT in letters:
            entry.problem(key, "has an axis E and a name for each expert")
        if EXPERT in letters and axes.flat[0].letter != EXPERT:
            entry.problem(key, "E must come first: a rank takes whole experts")
    if not {OUT, IN} <= line.axes.letters:
        entry.problem(key, "a weight has both O and K")
    if not line.per_expert and EXPERT not in line.axes.letters:
        entry.problem(key, "has neither `{expert}` in its name nor an axis E")
    if len(line.projections) > 1 and PAIR not in line.axes.letters:
        entry.problem(key, "joins projections but has no axis G")


def _check_layout(entry: Table, lines: list[TensorTemplate], square: str | None) -> None:
    joined = [p for line in lines for p in line.projections]
    if len(set(joined)) != len(joined):
        entry.problem("", "stores one projection twice")
    if len({line.template for line in lines}) != len(lines):
        entry.problem("", "has one name for two tensors")
    if UP not in joined or DOWN not in joined:
        entry.problem("", "needs `up` and `down` (alone or joined)")
    if len({line.per_expert for line in lines}) > 1:
        entry.problem("", "has names for each expert in some lines only")
    if square is not None and square not in _LINES:
        entry.problem("square", f"must be one of {', '.join(_LINES)}")


def _config(table: Table) -> ConfigKeys:
    keys = ConfigKeys(
        experts=table.texts("experts", default=()),
        width=table.texts("width", default=()),
        hidden=table.texts("hidden", default=()),
        block_sizes=_text_lists(table, "granules", default=()),
        sections=_text_lists(table, "sections", default=ConfigKeys().sections),
        layers=_text_lists(table, "layers", default=()),
    )
    for prefix, paths in keys.layers:
        for path in paths:
            if sorted(_PLACEHOLDERS.findall(path)) != ["key", "layer"]:
                table.problem(f"layers.{prefix}", "must contain `{layer}` and `{key}`, each once")
    table.finish()
    return keys


def _text_lists(table: Table, key: str, *, default: _TextLists) -> _TextLists:
    """A table of lists of texts."""
    if not table.has(key):
        return default
    inner = table.table(key)
    return tuple((name, inner.texts(name)) for name in inner.names())


def _check_whole(recipe: Recipe, top: Table) -> None:
    names = [layout.name for layout in recipe.layouts]
    for key, value in (("fuse", recipe.fuse), ("unfuse", recipe.unfuse)):
        if value is not None and value not in names:
            top.problem(key, f"{quoted(value)} is not a layout; the layouts are {', '.join(names)}")
    known = {name for name, _ in recipe.config.block_sizes}
    used = [a for c in recipe.components for axes in c.possible_axes for a in axes.flat]
    used += [
        a
        for layout in recipe.layouts
        for line in layout.lines
        for axes in (line.axes, *(o for _, listed in line.overrides for o in listed))
        for a in axes.flat
    ]
    for axis in used:
        if axis.named and axis.named.partition(".")[0] not in known:
            top.problem("config.granules", f"lacks `{axis.named}`, which the axes name")
    if len({frozenset(layout.projections) for layout in recipe.layouts}) > 1:
        top.problem("layouts", "must all store the same projections")
