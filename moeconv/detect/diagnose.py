"""The problems of a stack that no layout fits, or more than one: what was tried, and the fix."""

from __future__ import annotations

from moeconv.checkpoint.header import StoredTensor
from moeconv.core.text import counted
from moeconv.detect.config_sizes import StatedBlocks
from moeconv.detect.interpretations import (
    Interpretation,
    axes_of,
    interpretations,
    named_block_sizes,
    present_components,
)
from moeconv.detect.match import MatchedStack
from moeconv.detect.solve import SizeHints, solve
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


def no_fit(
    matched: MatchedStack,
    layouts: list[Layout],
    blocks: StatedBlocks,
    hints: SizeHints,
    reasons: list[str],
) -> MoeconvError:
    """Return the problem of a stack that no interpretation of any layout fits.

    If its weights alone fit, the components that do not are named, with the key of config.json
    that would state their block size. reasons: why the first interpretation of each layout
    does not fit.
    """
    weights = frozenset(matched.recipe.weights)

    def fits(layout: Layout, only: frozenset[str]) -> bool:
        return any(
            isinstance(solve(matched, layout, interpretation, hints), Sizes)
            for block_sizes in blocks.choices
            for interpretation in interpretations(matched, layout, block_sizes, only=only)
        )

    layout = next((la for la in layouts if fits(la, weights)), None)
    if layout is None:
        return _contradiction(matched, _tried(matched, layouts[0], weights), reasons)
    companions = {component.name for _, component in present_components(matched, layout)} - weights
    unfit = frozenset(name for name in companions if not fits(layout, weights | {name}))
    tried = _tried(matched, layout, unfit)
    names = sorted(named_block_sizes(matched, layout, only=unfit) & blocks.unstated.keys())
    if not names:
        return _contradiction(matched, tried, reasons)
    keys = " or ".join(dict.fromkeys(quoted(blocks.unstated[name]) for name in names))
    line, component = next(present_components(matched, layout, only=unfit))
    tensor = matched.sample((line.template, component.name))
    sizes = sorted({f"`{name}` {n}" for choice in blocks.choices for name, n in choice.items()})
    stated = f"only {', '.join(sizes)}, which does not fit" if sizes else "none"
    return ConfigMismatch(
        f"{_shown(tensor)} needs a block size, and config.json states {stated}",
        at=f"{matched.where(tensor)}; config.json, key {keys}",
        cause="\n         ".join((*tried, "a block size is never inferred from shapes")),
        fix="use the config.json that belongs to these tensors; if you do already, no recipe knows "
        "their format: write one that does and give it with `--recipe FILE`",
    )


def _shown(tensor: StoredTensor) -> str:
    return f"{quoted(tensor.name)}, {tensor.dtype} {list(tensor.shape)},"


def _tried(matched: MatchedStack, layout: Layout, components: frozenset[str]) -> list[str]:
    """Return a line for each of these tensors: what it is, and the axes that were tried."""
    lines = []
    for line, component in present_components(matched, layout, only=components):
        tensor = matched.sample((line.template, component.name))
        forms = (f for r in component.possible_axes for f in line.forms(component.read_as(r)))
        axes = ", ".join(dict.fromkeys(f"`{f}`" if f.dims else "one number" for f in forms))
        lines.append(f"{_shown(tensor)} was tried as {axes}")
    return lines


def _contradiction(
    matched: MatchedStack, tried: list[str], reasons: list[str]
) -> LayoutContradiction:
    """Return the problem of a stack with names of a known layout and shapes of none."""
    return LayoutContradiction(
        f"the shapes in {quoted(matched.name)} fit no layout of its family",
        at=matched.where(matched.sample()),
        cause="\n         ".join((*reasons, *tried)),
        fix="check that config.json belongs to these tensors; `moeconv recipes show` lists layouts",
    )


def too_many_stacks(matched: dict[str, MatchedStack]) -> MoeconvError:
    """Return the problem of a checkpoint with more stacks than an output may have."""
    first = next(iter(matched.values()))
    return TooManyStacks(
        f"the checkpoint has {len(matched):,} expert stacks",
        at=first.where(first.sample()),
        cause=f"an output may have {MAX_STACKS:,}, and a model has one or two for each layer; "
        f"the first is {quoted(first.name)}",
        fix="check that SRC is one model, and that the stacks of `--recipe FILE`, if given, are "
        "whole layers",
    )


def sizes_differ_from_manifest(recorded: StackEntry, sizes: Sizes) -> MoeconvError:
    """Return the problem of a stack whose tensors do not have the sizes in the manifest."""
    return Damaged(
        f"{quoted(recorded.name)} does not have the sizes that the manifest records",
        at=quoted(recorded.name),
        cause=f"E, I, H are {sizes.experts}, {sizes.width}, {sizes.hidden}; "
        f"the manifest has {', '.join(map(str, recorded.sizes))}",
    )


def unknown_tensors(matched: MatchedStack) -> MoeconvError:
    """Return the problem of a stack with tensors that its recipe does not know."""
    first = matched.unknown[0]
    return UnknownExpertTensor(
        f"{quoted(first.name)} is in an expert stack, but its recipe does not know it",
        at=matched.where(first),
        cause=f"recipe {quoted(matched.recipe.name)} knows the components "
        f"{', '.join(quoted(c.name) for c in matched.recipe.components)}; this stack has "
        f"{counted(len(matched.unknown), 'tensor')} beyond these",
    )


def ambiguous_layout(matched: MatchedStack, layouts: list[Layout]) -> MoeconvError:
    """Return the problem of a stack whose shapes fit more than one layout."""
    names = ", ".join(quoted(layout.name) for layout in layouts)
    shapes = "; ".join(f"{quoted(t.name)} {list(t.shape)}" for t in matched.samples().values())
    return AmbiguousLayout(
        f"{quoted(matched.name)} fits more than one layout: {names}",
        at=quoted(matched.name),
        cause=f"the shapes fit each of them: {shapes}",
        fix=f"find out what wrote it, then pass `--from-layout {layouts[0].name}` or another",
    )


def unconfirmed_layout(matched: MatchedStack, layout: Layout) -> MoeconvError:
    """Return the problem of a stack with names that other programs use for another layout."""
    return AmbiguousLayout(
        f"{quoted(matched.name)} has the names of layout {quoted(layout.name)}, which do not "
        "prove that it is stored that way",
        at=matched.where(matched.sample()),
        cause=str(layout.ask),
        fix=f"find out what wrote it; if it is that layout, pass `--from-layout {layout.name}`",
    )


def ambiguous_axis_order(
    matched: MatchedStack, one: Interpretation, other: Interpretation
) -> MoeconvError:
    """Return the problem of a stack with a matrix that fits its axes in either order."""
    key = next(key for key in one if one[key][1] != other[key][1])
    tensor = matched.sample(key)
    return AmbiguousLayout(
        f"{quoted(tensor.name)} may or may not be transposed: its shape fits both",
        at=matched.where(tensor),
        cause=f"{list(tensor.shape)} fits both `{one[key][1]}` and `{other[key][1]}`",
        fix=f"find out what wrote it; `moeconv recipes show {matched.recipe.name}` prints the "
        "recipe: keep the right one under `axes` and give it with `--recipe FILE`",
    )


def ambiguous_block_size(
    matched: MatchedStack, interpretations: list[Interpretation]
) -> MoeconvError:
    """Return the problem of a stack that fits several of the block sizes in config.json."""
    axes = [axes_of(interpretation) for interpretation in interpretations]
    key = next(key for key in axes[0] if axes[0][key] != axes[1][key])
    tensor = matched.sample(key)
    options = " or ".join(dict.fromkeys(f"`{one[key]}`" for one in axes))
    return ConfigMismatch(
        f"config.json states several block or group sizes, and {quoted(matched.name)} fits more "
        "than one",
        at=matched.where(tensor),
        cause=f"{tensor.dtype} {list(tensor.shape)} may be {options}",
        fix="in a copy of config.json, keep only the size that the experts use",
    )
