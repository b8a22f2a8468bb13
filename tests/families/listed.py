"""Lists of names of expert modules, and what they mean by each quantiser's own rule.

Written from the quantisers' sources, not from moeconv's: compressed-tensors' `match_name`,
modelopt's and Quark's `fnmatch`, transformers' `should_convert_module`, AWQ's `key in name`,
GPTQModel's `dynamic_get`.
"""

import fnmatch
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from random import Random

from hypothesis import strategies as st

import moeconv
from moeconv.detect.stack import Stack
from moeconv.layout.recipe import COMPANIONS, Layout
from tests.families.test_tiny import family, shapes
from tests.phantoms import phantom

Matrix = tuple[str, int, str]  # stack, expert, projection
Universe = dict[str, frozenset[Matrix]]
# one for every recipe of several layouts of which transformers has a tiny model
TYPES = (
    *("aria", "dbrx", "deepseek_v3", "deepseek_v4", "dots3_note", "ernie4_5_vl_moe", "gemma4"),
    *("gpt_oss", "granitemoe", "hy_v4", "inkling2", "jamba", "jetmoe", "lfm2_moe", "llama4"),
    *("mistral_large4", "mixtral", "nemotron_h", "openai_privacy_filter"),
    *("qwen3_moe", "qwen3_omni_moe", "qwen3_vl_moe", "step3p7"),
)


def _named(text: str, name: str) -> bool:
    """compressed-tensors."""
    return bool(re.match(text[3:], name)) if text.startswith("re:") else text == name


def _globbed(text: str, name: str) -> bool:
    """modelopt, Quark."""
    return _named(text, name) or fnmatch.fnmatchcase(name, text)


def _not_converted(text: str, name: str) -> bool:
    """transformers."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return bool(re.match(rf"(?:{text}){boundary}", name)) or name.endswith(text)


def _overridden(text: str, name: str) -> bool:
    """GPTQModel."""
    return bool(re.match(text.removeprefix("-:").removeprefix("+:"), name))


@dataclass(frozen=True)
class Place:
    """A key of quantization_config, who reads it, and by which rule."""

    key: str
    method: str
    rule: Callable[[str, str], bool]
    keys: bool = False

    def config(self, texts: Iterable[str]) -> dict[str, object]:
        held = {t: {"bits": 4} for t in texts} if self.keys else list(texts)
        return {"quant_method": self.method, self.key: held}

    def meant(self, texts: Iterable[str], universe: Universe) -> frozenset[Matrix]:
        hits = (held for n, held in universe.items() if any(self.rule(t, n) for t in texts))
        return frozenset[Matrix]().union(*hits)


PLACES = (
    Place("ignore", "compressed-tensors", _named),
    Place("ignored_layers", "fp8", _named),
    Place("ignore", "modelopt", _globbed),
    Place("exclude_modules", "modelopt", _globbed),
    Place("exclude", "quark", _globbed),
    Place("quantized_layers", "modelopt", _named, keys=True),
    Place("modules_to_not_convert", "fp8", _not_converted),
    Place("llm_int8_skip_modules", "bitsandbytes", _not_converted),
    Place("modules_to_not_convert", "awq", lambda text, name: text in name),
    Place("dynamic", "gptq", _overridden, keys=True),
)


@cache
def stacks_of(model_type: str) -> tuple[Stack, ...]:
    """The first and the last stacks of a family's tiny model."""
    doc = family(model_type)
    with tempfile.TemporaryDirectory() as folder:
        src = phantom(Path(folder) / "src", shapes(doc["original"]), doc["config"])
        found = moeconv.open_source(src).detection.stacks
        return tuple(dict.fromkeys((*found[:2], *found[-2:])))


def layouts_of(stack: Stack) -> dict[str, Layout]:
    return {la.name: la for la in stack.recipe.layouts if not la.read_only}


@cache
def universe(model_type: str, layout: str) -> Universe:
    """The modules of a checkpoint in a layout: those that tensors are of, and the experts'."""
    found: Universe = {}
    for stack in stacks_of(model_type):
        own = layouts_of(stack).get(layout, stack.layout)
        held = _modules(stack, own)
        found |= held
        words = zip(*(name.split(".")[:-1] for name in held), strict=False)
        around = [w[0] for w in takewhile(lambda w: len({*w}) == 1, words)]
        if not own.per_expert and "experts" in around:
            found[".".join(around)] = frozenset[Matrix]().union(*held.values())
    return found


def _modules(stack: Stack, layout: Layout) -> Universe:
    weight = next(c for c in stack.recipe.components if c.weight)
    out: Universe = {}
    for line in layout.lines:
        experts = range(stack.sizes.experts)
        for expert in () if line.part == COMPANIONS else experts if line.per_expert else (None,):
            name = re.sub(
                r"[._](weight|" + weight.name + ")$", "", line.name(stack.name, weight, expert)
            )
            held = experts if expert is None else (expert,)
            out[name] = frozenset((stack.name, e, p) for e in held for p in line.projections)
    return out


def texts(place: Place, names: list[str], stacks: list[str]) -> st.SearchStrategy[list[str]]:
    """Some texts about modules: exact names, patterns, beginnings, ends, words, layers, mixed."""
    some = st.sampled_from([_exact, _alike, _leaf, _begun, _below, _ended, _numbers, _everywhere])
    drawn = st.builds(
        lambda make, name, stack, rng: make(place, name, stack, names, rng),
        some,
        st.sampled_from(names),
        st.sampled_from(stacks),
        st.randoms(use_true_random=False),
    )
    lists = st.lists(drawn, min_size=1, max_size=3).map(lambda ls: [t for one in ls for t in one])
    others = st.lists(st.sampled_from(["lm_head", "model.embed_tokens"]), max_size=1)
    return st.tuples(lists, others).map(lambda p: _signed(place, [*dict.fromkeys([*p[1], *p[0]])]))


def _signed(place: Place, found: list[str]) -> list[str]:
    return [f"-:{t}" for t in found] if place.key == "dynamic" else found


def _literal(place: Place, name: str) -> str:
    return re.escape(name) if place.key == "dynamic" else name


def _pattern(place: Place, regex: str, glob: str) -> str:
    """A regular expression as it is written there, or a glob, where there are no others."""
    if place.rule is _globbed:
        return glob
    if place.rule is _named:
        return f"re:{regex}"
    return regex


def _exact(place: Place, name: str, stack: str, names: list[str], rng: Random) -> list[str]:
    return [_literal(place, name)]


def _alike(place: Place, name: str, stack: str, names: list[str], rng: Random) -> list[str]:
    """All of a stack."""
    return [_literal(place, n) for n in names if n.startswith(f"{stack}.")]


def _leaf(place: Place, name: str, stack: str, names: list[str], rng: Random) -> list[str]:
    """One projection of a stack."""
    last = name.rpartition(".")[2]
    alike = [n for n in names if n.startswith(f"{stack}.") and n.endswith(f".{last}")]
    return [_literal(place, n) for n in alike]


def _begun(place: Place, name: str, stack: str, names: list[str], rng: Random) -> list[str]:
    """A module around it, by itself."""
    words = name.split(".")
    return [_literal(place, ".".join(words[: rng.randrange(1, len(words) + 1)]))]


def _below(place: Place, name: str, stack: str, names: list[str], rng: Random) -> list[str]:
    """What begins as a module around it."""
    words = name.split(".")
    head = ".".join(words[: rng.randrange(1, len(words))])
    tail = rng.choice([(r"\..*", ".*"), (".*", "*"), ("$", "")])
    return [_pattern(place, re.escape(head) + tail[0], head + tail[1])]


def _ended(place: Place, name: str, stack: str, names: list[str], rng: Random) -> list[str]:
    """An end of it, as it is or as a pattern."""
    words = name.split(".")
    end = ".".join(words[rng.randrange(len(words)) :])
    if rng.random() < 0.5:
        return [_literal(place, end[rng.choice([0, 0, 1]) :] or end)]
    return [_pattern(place, ".*" + re.escape(end) + rng.choice(["", "$"]), f"*{end}")]


def _numbers(place: Place, name: str, stack: str, names: list[str], rng: Random) -> list[str]:
    """It, with some other number in the place of each."""

    def regex(found: re.Match[str]) -> str:
        return str(rng.choice([r"\d+", "[0-3]", "(0|1)", found[0]]))

    def glob(found: re.Match[str]) -> str:
        return str(rng.choice(["*", "?", "[0-3]", "[!1]", found[0]]))

    numbers = re.compile(r"(?<![a-z])\d+")
    return [_pattern(place, numbers.sub(regex, re.escape(name)), numbers.sub(glob, name))]


def _everywhere(place: Place, name: str, stack: str, names: list[str], rng: Random) -> list[str]:
    """Some of the last words, wherever they stand."""
    last = sorted({n.rpartition(".")[2] for n in names})
    some = rng.sample(last, rng.randrange(1, len(last) + 1))
    if place.rule is _globbed:
        return [f"*.{word}" for word in some]
    return [_pattern(place, rf".*\.({'|'.join(map(re.escape, some))})$", "")]


def document(place: Place, found: Iterable[str], indent: int | None = None) -> bytes:
    return json.dumps({"quantization_config": place.config(found)}, indent=indent).encode()
