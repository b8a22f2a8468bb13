"""One tiny fused set, made once, and ways to break it: edit a document, then sign it again."""

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import moeconv
from moeconv.core.digest import digest
from tests.badinput.builders import config, qwen, write

DATA: Final = "model-00001-of-00001.safetensors"
PART_NAME: Final = f"moeconv/{DATA}.json"
ROOT_NAME: Final = "moeconv.json"
ORIGIN_NAME: Final = "moeconv/origin"
INDEX_NAME: Final = "model.safetensors.index.json"
FILES: Final = (
    DATA,
    PART_NAME,
    ROOT_NAME,
    ORIGIN_NAME,
    INDEX_NAME,
    "config.json",
    "tokenizer.json",
)

Edit = Callable[[Any], object]


def dump(doc: object) -> bytes:
    """A document as canonical JSON, as far as it can be."""
    return json.dumps(doc, sort_keys=True, separators=(",", ":")).encode()


@cache
def tiny_set() -> dict[str, bytes]:
    """Every file of a fused set: two experts, I = 2, H = 4, two stacks."""
    with tempfile.TemporaryDirectory() as folder:
        src = write(
            Path(folder) / "src",
            qwen(2, 2, 4, layers=2),
            config=config(experts=2, width=2, hidden=4),
        )
        out = Path(folder) / "out"
        moeconv.fuse(src, out, jobs=1)
        return {name: (out / name).read_bytes() for name in FILES}


def unpack(root: Path) -> Path:
    """The tiny set on disk."""
    (root / "moeconv").mkdir(parents=True)
    for name, raw in tiny_set().items():
        (root / name).write_bytes(raw)
    return root


def copy_of(root: Path, to: Path) -> Path:
    """The same directory again."""
    shutil.copytree(root, to)
    return to


# --- editing -----------------------------------------------------------------------------------
def signed(body: bytes) -> bytes:
    """A root with this body."""
    return body + b"\n" + digest(body).encode() + b"\n"


def body_of(raw: bytes) -> bytes:
    """The first line of a root."""
    return raw.partition(b"\n")[0]


def edited(raw: bytes, edit: Edit) -> bytes:
    """A document (root or part) after `edit` changed it in place."""
    doc = json.loads(body_of(raw))
    edit(doc)
    return dump(doc)


def edit_root(root: Path, edit: Edit) -> None:
    """Change the root of a set on disk, and sign it again."""
    path = root / ROOT_NAME
    path.write_bytes(signed(edited(path.read_bytes(), edit)))


def replace_named(root: Path, name: str, raw: bytes) -> None:
    """Change a file that the root names, and its size and digest there."""
    (root / name).write_bytes(raw)

    def renew(doc: Any) -> None:
        entries = [*doc["parts"], doc["index"], doc["origin"], *doc["sidecars"]]
        entry = next(e for e in entries if e and e["name"] == name)
        entry |= {"size": len(raw), "digest": digest(raw)}

    edit_root(root, renew)


def edit_part(root: Path, edit: Edit, name: str = PART_NAME) -> None:
    """Change a part of a set on disk, and all that vouches for it."""
    replace_named(root, name, edited((root / name).read_bytes(), edit) + b"\n")


ROOT: Final = tiny_set()[ROOT_NAME]
ROOT_BODY: Final = body_of(ROOT)
PART: Final = tiny_set()[PART_NAME]
