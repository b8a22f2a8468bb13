"""config.json as nested values; recipes decide which keys matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from moeconv.core.strict_json import Json, loads
from moeconv.errors import BadConfig, quoted
from moeconv.store.base import Store
from moeconv.store.documents import read_document

CONFIG_NAME: Final = "config.json"
MAX_CONFIG_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Config:
    """A parsed config.json; `present` is False where the checkpoint has none."""

    doc: dict[str, Json] = field(default_factory=dict)
    present: bool = False
    _among: dict[tuple[str, ...], dict[str, Json]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def at(self, path: str) -> Json:
        """The value at a dotted path; list items by number; None where there is nothing."""
        return _below(self.doc, path)

    def among(self, paths: tuple[str, ...]) -> dict[str, Json]:
        """The values at those of these paths that exist, in order.

        Cached: each of very many stacks asks for the same paths.
        """
        found = self._among.get(paths)
        if found is None:
            values = ((path, self.at(path)) for path in paths)
            found = self._among[paths] = {path: v for path, v in values if v is not None}
        return found

    def every(self, path: str) -> list[Json]:
        """The values at a path in which `*` stands for every key of an object."""
        head, star, rest = path.partition(".*.")
        if not star:
            return [] if (value := self.at(path)) is None else [value]
        group = self.at(head)
        of = group.values() if isinstance(group, dict) else ()
        return [value for item in of if (value := _below(item, rest)) is not None]

    @property
    def model_type(self) -> str | None:
        """The family's name in transformers."""
        value = self.doc.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names of the model classes."""
        value = self.doc.get("architectures")
        return tuple(a for a in value if isinstance(a, str)) if isinstance(value, list) else ()


def _below(value: Json, path: str) -> Json:
    for key in path.split(".") if path else ():
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def read_config(store: Store) -> Config:
    """Read config.json; `present` is False where there is none. Raises BadConfig, BadJson."""
    file = store.file(CONFIG_NAME)
    if file is None:
        return Config()
    raw = read_document(file, MAX_CONFIG_BYTES)
    # configs of real models carry Infinity (time limits of state-space layers)
    doc = loads(raw, where=quoted(CONFIG_NAME), constants=True)
    if not isinstance(doc, dict):
        raise BadConfig(
            "config.json is not a JSON object",
            at=quoted(store.address),
            cause=f"it is a {type(doc).__name__}",
            fix="download config.json again",
        )
    return Config(doc, present=True)
