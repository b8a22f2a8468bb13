"""Random recipes, and checkpoints in their layouts: axes in any legal order and grouping."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from tests.helpers import Spec
from tests.models import DTYPES, subsets
from tests.reference import Part, Parts, Place, companion_axes, dims_of, random_part, stored

STACK = "model.layers.{n}.ffn"
JOINED = {"gate_up": ("gate", "up"), "up_gate": ("up", "gate")}
# name -> letters of one matrix, and the block sizes in which some of them count
COMPONENTS: dict[str, tuple[str, dict[str, str]]] = {
    "bias": ("O", {}),
    "scale": ("OK", {"O": "2", "K": "block.1"}),
    "zeros": ("OK", {"K": "3"}),
    "g_idx": ("K", {}),
    "packed": ("OKb", {}),
    "meta": ("", {}),
}
BLOCK_SIZES = {"2": 2, "3": 3, "block.1": 2}
_SHARED = Path(__file__).parents[1] / "recipes" / "shared"
_SAFE_DTYPES = tuple(d for d in DTYPES if d != "F4")


@dataclass(frozen=True)
class TensorTemplate:
    """One stored tensor of a layout, as the recipe says it."""

    key: str
    name: str  # with {stack}, {expert}, {component} or {suffix}
    axes: str
    overrides: dict[str, str]

    @property
    def projections(self) -> tuple[str, ...]:
        return JOINED.get(self.key, (self.key,))


@dataclass(frozen=True)
class Layout:
    """One way to store a stack."""

    name: str
    lines: tuple[TensorTemplate, ...]


@dataclass(frozen=True)
class Case:
    """A recipe with two layouts, and what a checkpoint of its family holds."""

    layouts: tuple[Layout, Layout]
    components: dict[str, str]  # the axes of one matrix
    config: dict[str, object]
    stacks: dict[str, Parts]
    others: dict[str, Spec]

    @property
    def toml(self) -> str:
        """The recipe's text."""
        rows = ['name = "custom"', 'stack = "{prefix}{layer}.ffn"', "[config]"]
        rows += [f'{k} = ["{v}"]' for k, v in (("experts", "E"), ("width", "I"), ("hidden", "H"))]
        rows += ["[config.granules]", 'block = ["block"]']
        for layout in self.layouts:
            rows.append(f"[layouts.{layout.name}]")
            rows += [f'{line.key} = "{line.name}: {line.axes}"' for line in layout.lines]
            for line in layout.lines:
                rows.append(f"[layouts.{layout.name}.axes.{line.key}]")
                rows += [f'{name} = "{axes}"' for name, axes in line.overrides.items()]
        rows.append("[components]")
        for name, axes in self.components.items():
            suffix = "" if name == "weight" else f"_{name}"
            rows.append(f'{name} = {{ axes = "{axes}", suffix = "{suffix}" }}')
        return "\n".join(rows) + "\n"

    def tensors(self, layout: Layout) -> dict[str, Spec]:
        """Every stored tensor in a layout."""
        out = dict(self.others)
        for stack, parts in self.stacks.items():
            out |= stored(parts, self._places(stack, layout))
        return out

    def _places(self, stack: str, layout: Layout) -> list[Place]:
        return [
            Place(
                line.name.replace("{stack}", stack)
                .replace("{expert}", "{e}")
                .replace("{component}", component)
                .replace("{suffix}", "" if component == "weight" else f"_{component}"),
                line.projections,
                component,
                self.axes_in(line, component),
            )
            for line in layout.lines
            for component in self.components
        ]

    def axes_in(self, line: TensorTemplate, component: str) -> str:
        """A component's axes in a line: listed there, or derived from the weight's."""
        if component == "weight":
            return line.axes
        if component in line.overrides:
            return line.overrides[component]
        return companion_axes(self.components[component], line.axes)

    def straddles(self) -> bool:
        """Whether a block would lie across two matrices in a tensor of either layout."""
        return any(
            _straddles(self.axes_in(line, component), parts, line, component)
            for parts in self.stacks.values()
            for layout in self.layouts
            for line in layout.lines
            for component in self.components
            if (line.projections[0], component) in parts
        )


def _straddles(axes: str, parts: Parts, line: TensorTemplate, component: str) -> bool:
    """A counted axis beside others must be the fastest of them, and fill its last block."""
    weight = parts[line.projections[0], "weight"]
    size = dict(zip(weight.letters, weight.items.shape[1:], strict=True))
    block_sizes = COMPONENTS.get(component, ("", {}))[1]
    return any(
        letter in block_sizes
        and len(dim) > 1
        and (letter != dim[-1] or size[letter] % BLOCK_SIZES[block_sizes[letter]] != 0)
        for dim in dims_of(axes)
        for letter in dim
    )


@st.composite
def arrangements(draw: st.DrawFn, letters: Sequence[str], *, first: str = "") -> str:
    """Axes in any order and grouping, with dimensions of one here and there.

    first: comes first; a counted axis (`O/2`) stays alone.
    """
    order = [*first, *draw(st.permutations(letters))]
    dims: list[list[str]] = []
    for letter in order:
        solo = "/" in letter or (dims and "/" in dims[-1][-1])
        if dims and not solo and draw(st.booleans()):
            dims[-1].append(letter)
        else:
            dims.append([letter])
    words = [dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims]
    for _ in range(draw(st.integers(0, 3)) // 3):
        words.insert(draw(st.integers(0, len(words))), "1")
    return " ".join(words)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two layouts and a model."""
    gated = draw(st.booleans())
    packed = draw(st.sampled_from(("", "", "b")))
    names = draw(subsets(list(COMPONENTS)))
    tokens = {n: _counted(*COMPONENTS[n]) for n in names} | {"weight": ["O", "K", *packed]}
    components = {n: draw(arrangements(tokens[n])) for n in ("weight", *names)}
    # what all experts, or gate and up, have in common may be stored once
    common = {n: draw(st.sampled_from(("", "", "E", "G", "EG"))) for n in names}
    same_names = draw(st.booleans())
    facts = {"gated": gated, "components": components, "tokens": tokens, "common": common}
    first = draw(_layouts("a", "x", **facts))
    second = draw(_layouts("b", "x" if same_names else "y", **facts))
    sizes = {
        "E": draw(st.integers(1, 4)),
        "I": draw(st.integers(1, 6)),
        "H": draw(st.integers(1, 6)),
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    numbers = draw(st.lists(st.sampled_from((0, 3, 12)), min_size=1, max_size=2, unique=True))
    alike: dict[str, list[str]] = {}
    return Case(
        layouts=(first, second),
        components=components,
        config={**sizes, "block": [3, BLOCK_SIZES["block.1"]]},
        stacks={
            STACK.format(n=n): draw(
                _parts(
                    names,
                    gated=gated,
                    packed=packed,
                    common=common,
                    sizes=sizes,
                    rng=rng,
                    alike=alike,
                )
            )
            for n in numbers
        },
        others={"lm_head.weight": ("BF16", (3, 5), rng.bytes(30))},
    )


def _counted(letters: str, block_sizes: dict[str, str]) -> list[str]:
    return [f"{c}/{block_sizes[c]}" if c in block_sizes else c for c in letters]


@st.composite
def _layouts(
    draw: st.DrawFn,
    name: str,
    tag: str,
    *,
    gated: bool,
    components: dict[str, str],
    tokens: dict[str, list[str]],
    common: dict[str, str],
) -> Layout:
    alone = draw(st.booleans())
    keys = draw(st.sampled_from((("gate", "up"), ("gate_up",), ("up_gate",)))) if gated else ("up",)
    lines = []
    for key in (*keys, "down"):
        expert = ".{expert}" if alone else ""
        hole = draw(st.sampled_from((".{component}", "{suffix}")))
        outer = ("" if alone else "E", "G" if key in JOINED else "")
        axes = draw(arrangements([*tokens["weight"], *outer[1]], first=outer[0]))
        overrides = {}
        for component in [c for c in components if c != "weight"]:
            left = [c for c in outer if c and c not in common[component]]
            derived = companion_axes(components[component], axes)
            # a derived axis E that is not outermost has no meaning; the recipe must list the axes
            if draw(st.booleans()) or ("E" in derived and dims_of(derived)[0][:1] != ["E"]):
                placed = [c for c in left if c != "E"]
                overrides[component] = draw(
                    arrangements([*tokens[component], *placed], first="E" if "E" in left else "")
                )
        lines.append(TensorTemplate(key, f"{{stack}}{expert}.{tag}_{key}{hole}", axes, overrides))
    return Layout(name, tuple(lines))


@st.composite
def _parts(
    draw: st.DrawFn,
    names: list[str],
    *,
    gated: bool,
    packed: str,
    common: dict[str, str],
    sizes: dict[str, int],
    rng: np.random.Generator,
    alike: dict[str, list[str]],
) -> Parts:
    parts: Parts = {}
    for side in (("gate", "up") if gated else ("up",), ("down",)):
        turned = side == ("down",)
        rows, columns = (sizes["H"], sizes["I"]) if turned else (sizes["I"], sizes["H"])
        weights = draw(st.sampled_from(_SAFE_DTYPES))
        if weights not in alike:  # one dtype with scales here and none there would be a loss
            drawn = draw(subsets(names))
            biased = "bias" in next(iter(alike.values()), drawn)  # so would biases on one side
            alike[weights] = [n for n in names if (biased if n == "bias" else n in drawn)]
        for component in ("weight", *alike[weights]):
            letters, block_sizes = COMPONENTS.get(component, ("OK" + packed, {}))
            full = {"O": rows, "K": columns, "b": draw(st.integers(1, 3))}
            lengths = {
                c: -(-full[c] // BLOCK_SIZES.get(block_sizes.get(c, ""), 1)) for c in letters
            }
            dtype = weights if component == "weight" else draw(st.sampled_from(_SAFE_DTYPES))
            for p in side:
                part = random_part(rng, dtype, letters, sizes["E"], lengths)
                if "E" in common.get(component, ""):
                    part = Part(dtype, letters, np.repeat(part.items[:1], sizes["E"], axis=0))
                if "G" in common.get(component, "") and p == "up" and gated:
                    part = parts["gate", component]
                parts[p, component] = part
    return parts


def shared_layouts() -> tuple[str, ...]:
    """The names of the layouts that every family can be written in."""
    return tuple(tomllib.loads((_SHARED / "gated.toml").read_text("utf-8"))["layouts"])
