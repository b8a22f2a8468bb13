"""Why no layout of its family fits a stack: which tensor does not, and all that it was tried as."""

from __future__ import annotations

from moeconv.checkpoint.header import StoredTensor
from moeconv.core.text import counted
from moeconv.detect.block_sizes import Granules
from moeconv.detect.interpretations import Reading, held, readings, same_rank
from moeconv.detect.match import Found
from moeconv.detect.solve import fit
from moeconv.detect.stack import Sizes
from moeconv.errors import (
    AmbiguousLayout,
    ConfigMismatch,
    Damaged,
    LayoutContradiction,
    MoeconvError,
    TooManyStacks,
    UnknownExpertTensor,
    quoted,
)
from moeconv.layout.recipe import Layout
from moeconv.manifest.model import MAX_STACKS, StackEntry


def no_fit(  # noqa: PLR0917
    stack: str,
    found: Found,
    layouts: list[Layout],
    choices: list[Granules],
    unsaid: dict[str, str],
    count: int | None,
    known: dict[str, int],
    reasons: list[str],
) -> MoeconvError:
    """The problem of a stack that no reading of any layout fits.

    choices, unsaid: the sizes of blocks and groups that config.json says, and does not say.
    reasons: why the first reading of each layout does not fit.
    """
    weights = frozenset(found.recipe.weights)

    def fits(layout: Layout, only: frozenset[str]) -> bool:
        return any(
            fit(found, layout, reading=reading, count=count, known=known).sizes is not None
            for granules in choices
            for reading in readings(found, layout, granules, only=only)
        )

    layout = next((la for la in layouts if fits(la, weights)), None)
    if layout is None:
        return _contradiction(stack, found, _tried(found, layouts[0], weights), reasons)
    parts = {component.name for _, component in held(found, layout)} - weights
    odd = frozenset(name for name in parts if not fits(layout, weights | {name}))
    tried = _tried(found, layout, odd)
    asked = _asked(found, layout, odd, unsaid)
    if not asked:
        return _contradiction(stack, found, tried, reasons)
    keys = " or ".join(quoted(key) for key in asked)
    tensor = _sample(found, layout, odd)
    sizes = sorted({f"`{name}` {size}" for granules in choices for name, size in granules.items()})
    stated = f"only {', '.join(sizes)}, which does not fit" if sizes else "none"
    return ConfigMismatch(
        f"{_said(tensor)} needs a block size, and config.json says {stated}",
        at=f"{found.place(tensor)}; config.json, key {keys}",
        cause="\n         ".join((*tried, "a block size is never inferred from shapes")),
        fix="use the config.json that belongs to these tensors; if it is, no recipe knows their "
        "format, and `--recipe FILE` takes one that does",
    )


def _said(tensor: StoredTensor) -> str:
    return f"{quoted(tensor.name)}, {tensor.dtype} {list(tensor.shape)},"


def _sample(found: Found, layout: Layout, components: frozenset[str]) -> StoredTensor:
    line, component = next(pair for pair in held(found, layout) if pair[1].name in components)
    return next(iter(found.tensors[line.template, component.name].values()))


def _asked(
    found: Found, layout: Layout, components: frozenset[str], unsaid: dict[str, str]
) -> list[str]:
    """The keys of config.json that would say what a reading of these needs."""
    names = {
        granule
        for line, component in held(found, layout)
        if component.name in components
        for reading in component.readings
        for form in line.forms(component.read_as(reading))
        if same_rank(found, (line.template, component.name), form)
        for granule in form.granules
    }
    return list(dict.fromkeys(unsaid[name] for name in sorted(names) if name in unsaid))


def _tried(found: Found, layout: Layout, components: frozenset[str]) -> list[str]:
    """What each of these tensors is, and the axes that it was held against."""
    lines = []
    for line, component in held(found, layout):
        if component.name in components:
            tensor = next(iter(found.tensors[line.template, component.name].values()))
            forms = (f for r in component.readings for f in line.forms(component.read_as(r)))
            said = ", ".join(dict.fromkeys(f"`{f}`" if f.dims else "one number" for f in forms))
            lines.append(f"{_said(tensor)} was tried as {said}")
    return lines


def _contradiction(
    stack: str, found: Found, tried: list[str], reasons: list[str]
) -> LayoutContradiction:
    """Names of a known layout, shapes of none."""
    return LayoutContradiction(
        f"the shapes in {quoted(stack)} fit no layout of its family",
        at=found.place(found.all()[0]),
        cause="\n         ".join((*reasons, *tried)),
        fix="check that config.json belongs to these tensors; `moeconv recipes show` lists layouts",
    )


def too_many_stacks(collected: dict[str, Found]) -> MoeconvError:
    """The problem of a checkpoint with more stacks than a set may have."""
    name, found = next(iter(collected.items()))
    return TooManyStacks(
        f"the checkpoint has {len(collected):,} expert stacks",
        at=found.place(found.all()[0]),
        cause=f"a set may have {MAX_STACKS:,} of them, one or two for each layer; "
        f"the first is {quoted(name)}",
        fix="check that SRC is one model, and that `--recipe FILE`, if given, takes whole layers "
        "for stacks",
    )


def not_as_in_manifest(name: str, known: StackEntry, sizes: Sizes) -> MoeconvError:
    """The problem of a stack whose tensors do not have the sizes that the manifest says."""
    return Damaged(
        f"{quoted(name)} is not of the sizes that the manifest says",
        at=quoted(name),
        cause=f"E, I, H are {sizes.experts}, {sizes.width}, {sizes.hidden}; "
        f"the manifest has {', '.join(map(str, known.sizes))}",
    )


def unknown_inside(name: str, found: Found) -> MoeconvError:
    """The problem of a stack with tensors in it that its recipe does not know."""
    first = found.unknown[0]
    return UnknownExpertTensor(
        f"{quoted(first.name)} lies inside an expert stack, but its recipe does not know it",
        at=found.place(first),
        cause=f"recipe {quoted(found.recipe.name)} knows the components "
        f"{', '.join(quoted(c.name) for c in found.recipe.components)}; in this stack "
        f"{counted(len(found.unknown), 'tensor')} beside them",
    )


def fits_several(stack: str, found: Found, layouts: list[Layout]) -> MoeconvError:
    """The problem of a stack whose shapes fit more than one layout."""
    names = ", ".join(quoted(layout.name) for layout in layouts)
    shapes = "; ".join(
        f"{quoted(t.name)} {list(t.shape)}"
        for t in (next(iter(v.values())) for v in found.tensors.values())
    )
    return AmbiguousLayout(
        f"{quoted(stack)} fits more than one layout: {names}",
        at=quoted(stack),
        cause=f"the shapes fit each of them: {shapes}",
        fix=f"find out who wrote it, then say `--from-layout {layouts[0].name}` or another",
    )


def names_alone(stack: str, found: Found, layout: Layout) -> MoeconvError:
    """The problem of a stack with a layout's names, which other programs give, too."""
    return AmbiguousLayout(
        f"{quoted(stack)} has the names of layout {quoted(layout.name)}, which do not tell enough",
        at=found.place(found.all()[0]),
        cause=str(layout.ask),
        fix=f"find out who wrote it; if it is that layout, say `--from-layout {layout.name}`",
    )


def turned_or_not(stack: str, found: Found, one: Reading, other: Reading) -> MoeconvError:
    """The problem of a stack with a matrix that fits its axes in either order."""
    key = next(key for key in one if one[key][1] != other[key][1])
    tensor = next(iter(found.tensors[key].values()))
    recipe = found.recipe.name
    return AmbiguousLayout(
        f"{quoted(tensor.name)} may be turned or not: its shape does not tell",
        at=found.place(tensor),
        cause=f"{list(tensor.shape)} fits both `{one[key][1]}` and `{other[key][1]}`",
        fix=f"find out who wrote it; `moeconv recipes show {recipe}` prints the recipe: leave the "
        "one that is right under `axes` and give it with `--recipe FILE`",
    )
