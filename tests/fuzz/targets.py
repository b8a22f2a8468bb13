"""Each parser of bytes that may come from anywhere, with valid documents to start from."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from moeconv.checkpoint.header import header_length, parse_header
from moeconv.checkpoint.index import parse_index
from moeconv.checkpoint.origin import parse_origin
from moeconv.core.digest import digest
from moeconv.core.strict_json import error_json, loads
from moeconv.errors import MoeconvError
from moeconv.layout.recipe_toml import parse_recipe
from moeconv.layout.shipped import shipped_recipes
from moeconv.manifest.part_reader import parse_part, parse_parts
from moeconv.manifest.reader import parse_root
from moeconv.placement.eplb import KEY as EPLB_KEY
from moeconv.placement.files import read_map
from moeconv.placement.formats import FORMATS, write_map
from moeconv.placement.model import MoeLayers, Placement, trivial
from moeconv.placement.resolve import resolve
from moeconv.quantconfig.document import changed_lists, quant_texts
from moeconv.quantconfig.match_rules import Budget, MatchRules, Names, UnsupportedPattern
from tests.badinput.builders import entries, framed, index_doc, nbytes, qwen, two_files
from tests.badinput.test_recipes import GOOD
from tests.checkpoint.test_fuzz import ORIGIN
from tests.manifest.samples import PART, ROOT, ROOT_BODY, dump

TENSORS = qwen(1, 4, 8)
DATA_BYTES = sum(map(nbytes, TENSORS.values()))
HEAD = framed(dump({"__metadata__": {"format": "pt"}, **entries(TENSORS)}))
LAYERS = MoeLayers(experts=4, moe=(1, 2), beyond=(3,), hidden=3)
RULES: Final = {b"g": ("exclude", "modelopt"), b"p": ("dynamic", "gptq")}
PATTERNS: Final = (b"re:.*mlp\\.experts\\.\\d+\\.(gate|up)_proj$", b"model.layers.*.experts.*")
LISTS: Final = dump(
    {
        "quantization_config": {
            "ignore": ["lm_head", "re:.*experts.*", "model.layers.0.mlp.experts.0.gate_proj"],
            "quantized_layers": {"model.layers.0.mlp.experts.0.up_proj": {"bits": 4}},
        }
    }
)


@dataclass(frozen=True, slots=True)
class Target:
    """A parser: `parse` may return or raise MoeconvError; seeds: documents that it takes.

    bytes_per_byte: the memory for each byte of a document. Python's own objects for JSON take up
    to twenty times its bytes, events of YAML a little more.
    """

    parse: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    bytes_per_byte: int = 48


def _head(raw: bytes) -> None:
    length = header_length(raw, file_size=len(raw) + DATA_BYTES, where="x")
    header = parse_header(raw[: 8 + length], file_size=len(raw) + DATA_BYTES, file=0, where="x")
    covered = sum(t.nbytes for t in header.tensors)
    assert covered == len(raw) + DATA_BYTES - 8 - length, "a header that does not cover the data"


def _index(raw: bytes) -> None:
    index = parse_index(raw, name="i")
    assert all("/" not in file and file not in ("", "..") for file in index.files)


def _body(raw: bytes) -> None:
    parse_root(raw + b"\n" + digest(raw).encode() + b"\n")


def _part(raw: bytes) -> None:
    root = parse_root(ROOT)
    for parse in (parse_part, parse_parts):
        parse(raw, root, where="p")


def _recipe(raw: bytes) -> None:
    parse_recipe(raw.decode("utf-8", "replace"), where="mine.toml")


def _pattern(raw: bytes) -> None:
    """By each reader's rules; the budget is a fraction of a run's."""
    budget, text = Budget(100_000), raw[1:].decode("utf-8", "replace")
    rules = MatchRules(*RULES.get(raw[:1], ("modules_to_not_convert", "")))
    with contextlib.suppress(UnsupportedPattern):
        if matcher := rules.matcher(text, budget):
            matcher.suffixes(Names("model.layers.0.mlp.experts", frozenset({".11.gate_proj"})))


def _lists(raw: bytes) -> None:
    """Only valid JSON comes this far; what nobody changes stays as it is."""
    loads(raw, where="config.json", constants=True)
    text = raw.decode("utf-8")
    texts = quant_texts(text)
    assert changed_lists(text, texts, lambda _, __: None) == (text, ())
    changed, _ = changed_lists(text, texts, lambda _, ts: tuple((t, t + "x") for t in ts))
    loads(changed.encode("utf-8"), where="config.json", constants=True)


def _map(ending: str) -> Callable[[bytes], None]:
    def parse(raw: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=ending) as stream:
            stream.write(raw)
            stream.flush()
            read = read_map(Path(stream.name))
        resolve(read, LAYERS)

    return parse


def _inline(raw: bytes) -> None:
    read_map("{" + raw.decode("utf-8", "surrogateescape"))


def _maps() -> dict[str, bytes]:
    placement = Placement(4, LAYERS.moe, (trivial(4, 4), (3, 2, 1, 0)))
    return {name: write_map(name, placement, LAYERS, ep_size=2) for name in FORMATS}


def _array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([[0, 1, 2, 3], [3, 2, 1, 0]]))
    return out.getvalue()


def _saved() -> bytes:
    out = io.BytesIO()
    torch.save({EPLB_KEY: torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])}, out)
    return out.getvalue()


_MAPS: Final = _maps()
_JSON_MAPS: Final = tuple(raw for raw in _MAPS.values() if raw[:1] in (b"{", b"["))
TARGETS: Final = {
    "header": Target(_head, (HEAD,)),
    "index": Target(_index, (dump(index_doc(two_files(TENSORS))),)),
    "root": Target(parse_root, (ROOT,)),
    "root-body": Target(_body, (ROOT_BODY,)),
    "part": Target(_part, (PART,)),
    "origin": Target(parse_origin, (ORIGIN,)),
    # tomllib keeps a kilobyte for each table; a recipe is at most 128 KiB
    "recipe": Target(
        _recipe, (GOOD.encode(), *(r.toml.encode() for r in shipped_recipes()[:3])), 160
    ),
    "pattern": Target(_pattern, tuple(mode + text for mode in (*RULES, b"m") for text in PATTERNS)),
    "quantization-lists": Target(_lists, (LISTS,)),
    "map-json": Target(_map(".json"), _JSON_MAPS),
    "map-yaml": Target(_map(".yaml"), tuple(_MAPS.values())),
    # a row of one slot is a byte, and is at most one of 10,000
    "map-npy": Target(_map(".npy"), (_array(),), 220),
    "map-pt": Target(_map(".pt"), (_saved(),)),
    "map-inline": Target(_inline, tuple(raw[1:] for raw in _JSON_MAPS if raw[:1] == b"{")),
}


def tried(target: Target, raw: bytes) -> bool:
    """Whether a document was taken. A refusal must be sayable; all else goes through."""
    try:
        target.parse(raw)
    except MoeconvError as problem:
        unprintable = [line for line in str(problem).splitlines() if not line.isprintable()]
        assert not unprintable, f"written raw: {unprintable}"
        json.dumps(error_json(problem))
        return False
    return True
