"""Random checkpoints of the shipped families: what they hold, and how it lies on the disk."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from hypothesis import strategies as st

from tests.helpers import BITS, INDEX_NAME, Spec, nbytes, write_file
from tests.reference import Parts, Place, Short, fingerprint, random_part, stored

DTYPES: Final = tuple(d for d in BITS if not d.startswith("F6"))
BLOCK: Final = "weight_scale_inv"


def _places(lines: str) -> list[Place]:
    """`NAME | projections | component | axes`, one a line."""
    rows = [[word.strip() for word in line.split("|")] for line in lines.strip().splitlines()]
    return [Place(name, tuple(p.split()), component, axes) for name, p, component, axes in rows]


def _per_expert(gate: str, up: str, down: str, components: Mapping[str, str]) -> list[Place]:
    names = {p: n for p, n in (("gate", gate), ("up", up), ("down", down)) if n}
    return [
        Place(f"{{s}}.{{e}}.{name}.{component}", (projection,), component, axes)
        for projection, name in names.items()
        for component, axes in components.items()
    ]


_ALONE = {"weight": "O K", BLOCK: "O K", "bias": "O"}
_FUSED = _places("""
    {s}.gate_up_proj           | gate up | weight           | E (G O) K
    {s}.gate_up_proj_scale_inv | gate up | weight_scale_inv | E (G O) K
    {s}.gate_up_proj_bias      | gate up | bias             | E (G O)
    {s}.down_proj              | down    | weight           | E O K
    {s}.down_proj_scale_inv    | down    | weight_scale_inv | E O K
    {s}.down_proj_bias         | down    | bias             | E O
""")
_TURNED = _places("""
    {s}.gate_up_proj           | gate up | weight           | E K (G O)
    {s}.gate_up_proj_scale_inv | gate up | weight_scale_inv | E K (G O)
    {s}.down_proj              | down    | weight           | E K O
    {s}.down_proj_scale_inv    | down    | weight_scale_inv | E K O
""")


@dataclass(frozen=True)
class Family:
    """The end of a stack's name, the components there may be, and where each layout keeps them."""

    stack: str
    components: tuple[str, ...]
    layouts: Mapping[str, list[Place]]


FAMILIES: Final = {
    "qwen3_moe": Family(
        "mlp.experts",
        (BLOCK, "bias"),
        {
            "per-expert": _per_expert("gate_proj", "up_proj", "down_proj", _ALONE),
            "fused": _FUSED,
        },
    ),
    "mixtral": Family(
        "block_sparse_moe.experts",
        (BLOCK,),
        {"per-expert": _per_expert("w1", "w3", "w2", _ALONE), "fused": _FUSED},
    ),
    "nemotron_h": Family(
        "mixer.experts",
        (),
        {
            "per-expert": _per_expert("", "up_proj", "down_proj", {"weight": "O K"}),
            "fused": _places("""
                {s}.up_proj   | up   | weight | E O K
                {s}.down_proj | down | weight | E O K
            """),
        },
    ),
    "granitemoe": Family(
        "block_sparse_moe",
        (),
        {
            "hub": _places("""
                {s}.input_linear.weight  | gate up | weight | E (G O) K
                {s}.output_linear.weight | down    | weight | E O K
            """),
            "fused": _places("""
                {s}.experts.gate_up_proj | gate up | weight | E (G O) K
                {s}.experts.down_proj    | down    | weight | E O K
            """),
            "per-expert": [
                Place(p.name.replace("{s}", "{s}.experts"), p.projections, p.component, p.axes)
                for p in _per_expert("gate_proj", "up_proj", "down_proj", {"weight": "O K"})
            ],
        },
    ),
    "gpt_oss": Family(
        "mlp.experts",
        ("bias",),
        {
            "fused": _places("""
                {s}.gate_up_proj      | gate up | weight | E K (O G)
                {s}.gate_up_proj_bias | gate up | bias   | E (O G)
                {s}.down_proj         | down    | weight | E K O
                {s}.down_proj_bias    | down    | bias   | E O
            """),
            "per-expert": _per_expert("gate_proj", "up_proj", "down_proj", _ALONE),
        },
    ),
    "qwen3_vl_moe": Family(
        "mlp.experts",
        (BLOCK,),
        {
            "per-expert": _per_expert("gate_proj", "up_proj", "down_proj", _ALONE),
            "fused": _FUSED,
            "hub": _TURNED,
        },
    ),
}
# the layouts that cut no 4-bit value in two
_WHOLE_NIBBLES: Final = ("qwen3_moe", "mixtral", "nemotron_h", "granitemoe")


@dataclass(frozen=True, repr=False)
class Model(Short):
    """What a checkpoint holds, in no layout yet."""

    family: str
    stacks: dict[str, Parts]
    others: dict[str, Spec]
    config: dict[str, object]

    def __repr__(self) -> str:
        """Without the bytes, which would bury a failing example."""
        others = {name: f"{dtype} {list(shape)}" for name, (dtype, shape, _) in self.others.items()}
        return f"Model({self.family}, {self.stacks}, {others}, {self.config})"

    def tensors(self, layout: str, *, odd_one: str | None = None) -> dict[str, Spec]:
        """Every stored tensor in a layout; the last stack may be in another one."""
        out = dict(self.others)
        last = list(self.stacks)[-1]
        for name, parts in self.stacks.items():
            its = odd_one or layout if name == last else layout
            for place in FAMILIES[self.family].layouts[its]:
                named = Place(
                    place.name.replace("{s}", name), place.projections, place.component, place.axes
                )
                out |= stored(parts, [named])
        return out

    @property
    def fingerprint(self) -> str:
        """By the definition of the format."""
        return fingerprint(self.stacks, self.others)


@st.composite
def models(draw: st.DrawFn) -> Model:
    """A model of a shipped family, tiny and of odd sizes."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    block = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    config: dict[str, object] = {"model_type": family}
    said = draw(st.booleans())
    sizes = draw(_sizes(block[0]))
    if said:
        width = "intermediate_size" if family in _PLAIN_WIDTH else "moe_intermediate_size"
        keys = ("n_routed_experts" if family == "nemotron_h" else "num_local_experts", width)
        config |= dict(zip((*keys, "hidden_size"), sizes, strict=True))
    quantised = BLOCK in FAMILIES[family].components and draw(st.booleans())
    if quantised:
        config["quantization_config"] = {"weight_block_size": list(block)}
    prefixes = draw(st.lists(st.sampled_from(_PREFIXES), min_size=1, max_size=3, unique=True))
    stacks = {}
    alike: dict[str, list[str]] = {}
    kinds: dict[str, tuple[int, int, int]] = {}
    for prefix in prefixes:
        # stacks of one kind have the same sizes; those of another may have their own
        kind = prefix.rpartition(".")[0]
        if kind not in kinds:
            kinds[kind] = sizes if said else draw(_sizes(block[0]))
        name = f"{prefix}.{FAMILIES[family].stack}"
        stacks[name] = draw(_parts(family, kinds[kind], block if quantised else None, rng, alike))
    return Model(family, stacks, draw(_others(rng)), config)


_PLAIN_WIDTH = ("mixtral", "granitemoe", "gpt_oss")
_PREFIXES = (
    "model.layers.0",
    "model.layers.2",
    "model.layers.10",
    "model.language_model.layers.3",
    "mtp.layers.0",
    "layers.7",
)


def _sizes(block: int) -> st.SearchStrategy[tuple[int, int, int]]:
    """E, I, H; blocks of rows must fit the width, or gate and up could not be joined."""
    return st.tuples(
        st.integers(1, 12), st.integers(1, 4).map(lambda n: n * block), st.integers(1, 9)
    )


@st.composite
def _parts(  # noqa: PLR0917
    draw: st.DrawFn,
    family: str,
    sizes: tuple[int, int, int],
    block: tuple[int, int] | None,
    rng: np.random.Generator,
    alike: dict[str, list[str]],
) -> Parts:
    experts, width, hidden = sizes
    held = {p for place in FAMILIES[family].layouts["per-expert"] for p in place.projections}
    parts: Parts = {}
    first = draw(st.sampled_from(DTYPES))
    for side in (("gate", "up"), ("down",)):
        rows, columns = (hidden, width) if side == ("down",) else (width, hidden)
        # where scales may be turned, a square grid of one side alone would not tell
        turned = "hub" in FAMILIES[family].layouts and BLOCK in FAMILIES[family].components
        dtype = first if turned or side != ("down",) else draw(st.sampled_from(DTYPES))
        if dtype == "F4" and (family not in _WHOLE_NIBBLES or rows * columns % 2):
            dtype = "U8"
        by, across = block or (1, 1)
        lengths = {
            "weight": {"O": rows, "K": columns},
            BLOCK: {"O": -(-rows // by), "K": -(-columns // across)},
            "bias": {"O": rows},
        }
        if dtype not in alike:  # one dtype with scales here and none there would be a loss
            names = FAMILIES[family].components
            drawn = set(draw(subsets(names)))
            # where config.json speaks of blocks, such weights without scales have lost them
            drawn -= set() if block else {BLOCK}
            drawn |= {BLOCK} if block and dtype.startswith(("F4", "F6", "F8", "I", "U")) else set()
            biased = "bias" in next(iter(alike.values()), drawn)  # so would biases on one side
            alike[dtype] = [n for n in names if (biased if n == "bias" else n in drawn)]
        for component in ("weight", *alike[dtype]):
            kind = dtype if component == "weight" else draw(st.sampled_from(("F32", "F8_E8M0")))
            letters = "".join(lengths[component])
            for p in side:
                if p in held:
                    parts[p, component] = random_part(
                        rng, kind, letters, experts, lengths[component]
                    )
    return parts


def subsets(items: Sequence[str]) -> st.SearchStrategy[list[str]]:
    """Some of the items, in their order."""
    return st.lists(st.booleans(), min_size=len(items), max_size=len(items)).map(
        lambda wanted: list(compress(items, wanted))
    )


_OTHER_NAMES = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.shared_experts.gate_proj.weight",
    "model.layers.0.mlp.experts_bias",
    "model.layers.11.self_attn.q_proj.weight",
    "a name, with spaces\tand ü",
    "0",
)
_OTHER_SHAPES = ((), (0,), (1,), (3, 0, 2), (7,), (2, 3), (4096,), (2048,), (5, 1, 3), (257, 5))


@st.composite
def _others(draw: st.DrawFn, rng: np.random.Generator) -> dict[str, Spec]:
    names = draw(subsets(_OTHER_NAMES))
    out: dict[str, Spec] = {}
    for name in names:
        dtype = draw(st.sampled_from([d for d in DTYPES if d != "F4"]))
        shape = draw(st.sampled_from(_OTHER_SHAPES))
        out[name] = (dtype, shape, rng.bytes(nbytes(dtype, shape)))
    return out


@dataclass(frozen=True)
class Disk:
    """How a checkpoint lies on the disk: everything that a conversion must not lose."""

    files: int
    seed: int  # of the cuts and orders
    names: str
    index: str | None
    index_metadata: dict[str, object] | None
    metadata: dict[str, str] | None
    padding: int
    indent: int | None
    sidecars: tuple[str, ...]

    def write(self, root: Path, tensors: Mapping[str, Spec], config: Mapping[str, object]) -> Path:
        """Write the checkpoint in a new directory."""
        root.mkdir()
        chance = random.Random(self.seed)
        order = chance.sample(list(tensors), len(tensors))
        files = min(self.files, len(order))
        cuts = sorted(chance.sample(range(1, len(order)), files - 1))
        shards = [order[a:b] for a, b in pairwise((0, *cuts, len(order)))]
        named = {self.names.format(n=n, of=files): s for n, s in enumerate(shards, 1)}
        for name, shard in named.items():
            write_file(
                root / name,
                {n: tensors[n] for n in shard},
                header_order=chance.sample(shard, len(shard)),
                metadata=self.metadata,
                padding=chance.randint(0, self.padding),
            )
        if self.index is not None:
            weight_map = {n: file for file, shard in named.items() for n in shard}
            doc: dict[str, Any] = {"weight_map": weight_map}
            if self.index_metadata is not None:
                doc["metadata"] = self.index_metadata
            (root / self.index).write_text(json.dumps(doc, indent=self.indent), "utf-8")
        (root / "config.json").write_text(json.dumps(config, indent=self.indent) + "\n", "utf-8")
        for sidecar in self.sidecars:
            (root / sidecar).parent.mkdir(parents=True, exist_ok=True)
            (root / sidecar).write_bytes(chance.randbytes(chance.choice((0, 1, 300, 5000))))
        return root


_SIDECARS = (
    "README.md",
    ".gitattributes",
    "tokenizer/vocab.json",
    "tokenizer/deep/er/merges.txt",
    "a name, with spaces and ü.txt",
    "original/consolidated.00.pth",
    "original/model.safetensors",
)


@st.composite
def disks(draw: st.DrawFn) -> Disk:
    """Any way in which a checkpoint may lie on the disk."""
    index = draw(st.sampled_from((INDEX_NAME, INDEX_NAME, "other.safetensors.index.json", None)))
    sidecars = draw(subsets(_SIDECARS))
    if index is not None and draw(st.booleans()):
        sidecars.append("consolidated.safetensors")  # the index does not name it
    return Disk(
        files=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**32 - 1)),
        names=draw(st.sampled_from(("model-{n:05d}-of-{of:05d}.safetensors", "{n}.safetensors"))),
        index=index,
        index_metadata=draw(
            st.sampled_from((None, {}, {"total_size": 1}, {"total_size": 7.0, "x": [1]}))
        ),
        metadata=draw(
            st.sampled_from((None, {}, {"format": "pt"}, {"ü": "\n", "z": "", "a": "b"}))
        ),
        padding=draw(st.sampled_from((0, 1, 9000))),
        indent=draw(st.sampled_from((None, 2))),
        sidecars=tuple(sidecars),
    )
