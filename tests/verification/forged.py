"""Sets that lie and vouch for the lie: every digest is taken anew after an edit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeconv.core.digest import digest, fingerprint
from moeconv.manifest.model import Manifest
from moeconv.manifest.part_reader import parse_parts
from moeconv.manifest.reader import parse_root
from tests.manifest.samples import ROOT_NAME, body_of, dump, signed

Edit = Callable[[Any], object]


def nothing(_: Any) -> None:
    """No edit."""


def resign(out: Path, *, part: Edit = nothing, root: Edit = nothing) -> None:
    """Edit all parts and the root of a set, then take all digests and the fingerprint anew."""
    doc = json.loads(body_of((out / ROOT_NAME).read_bytes()))
    for entry in doc["parts"]:
        body = json.loads((out / entry["name"]).read_bytes())
        part(body)
        (out / entry["name"]).write_bytes(dump(body) + b"\n")
    root(doc)
    for entry in filter(None, [*doc["parts"], doc["origin"], doc["index"], *doc["sidecars"]]):
        raw = (out / entry["name"]).read_bytes()
        entry |= {"size": len(raw), "digest": digest(raw)}
    top = parse_root(signed(dump(doc)))
    raws = {entry.name: (out / entry.name).read_bytes() for entry in top.parts}
    parts = [p for name, raw in raws.items() for p in parse_parts(raw, top, where=name)]
    if doc["fingerprint"] is not None:
        doc["fingerprint"] = fingerprint(Manifest(top, tuple(parts)).fingerprint_lines())
    (out / ROOT_NAME).write_bytes(signed(dump(doc)))


def tensors_of(part: Any) -> list[Any]:
    """The tensors that a part lists, whichever kind of set it is of."""
    files = part.get("files", [part])
    return [tensor for file in files for tensor in file["tensors"]]


def rename_in_recipe(old: str, new: str) -> Edit:
    """An edit of a root: another text in its first recipe."""

    def edit(doc: Any) -> None:
        text = doc["recipes"][0]["toml"]
        assert old in text
        doc["recipes"][0]["toml"] = text.replace(old, new)

    return edit


def keep_in_origin(out: Path, name: str, raw: bytes) -> None:
    """Let the origin keep these bytes of a sidecar, in place of any that it keeps."""
    head, _, rest = (out / "moeconv/origin").read_bytes().partition(b"\n")
    doc = json.loads(head)
    kept = sum(entry["size"] for entry in doc.get("sidecars", []))
    rest = rest[: len(rest) - kept]
    doc["sidecars"] = [{"name": name, "size": len(raw)}]
    (out / "moeconv/origin").write_bytes(dump(doc) + b"\n" + rest + raw)


def flip(path: Path, at: int = -1) -> None:
    """Turn one bit of a file around."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
