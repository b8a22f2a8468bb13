"""Why no layout of its family fits a stack: which tensor does not, and all that it was tried as."""

from __future__ import annotations

from moeconv.checkpoint.header import StoredTensor
from moeconv.errors import ConfigMismatch, LayoutContradiction, MoeconvError, quoted
from moeconv.layout.fit import fit
from moeconv.layout.granules import Granules
from moeconv.layout.match import Found
from moeconv.layout.readings import held, readings, same_rank
from moeconv.layout.recipe import Layout


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
