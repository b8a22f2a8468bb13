"""moeconv converts Mixture-of-Experts checkpoints between layouts, byte for byte, and proves it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from moeconv.version import __version__

if TYPE_CHECKING:
    from moeconv.api.convert import fuse, unfuse
    from moeconv.api.open import open_source
    from moeconv.api.shard import merge, shard
    from moeconv.api.verify import diff, fingerprint, verify
    from moeconv.errors import MoeconvError

# PEP 562: `import moeconv` costs nothing until something of it is used
_HOMES = {
    "diff": "moeconv.api.verify",
    "fingerprint": "moeconv.api.verify",
    "fuse": "moeconv.api.convert",
    "merge": "moeconv.api.shard",
    "open_source": "moeconv.api.open",
    "shard": "moeconv.api.shard",
    "unfuse": "moeconv.api.convert",
    "verify": "moeconv.api.verify",
    "MoeconvError": "moeconv.errors",
}

__all__ = [
    "MoeconvError",
    "__version__",
    "diff",
    "fingerprint",
    "fuse",
    "merge",
    "open_source",
    "shard",
    "unfuse",
    "verify",
]


def __getattr__(name: str) -> object:
    if name == "runtime":  # needs torch, and is no name of `import *`
        return import_module("moeconv.runtime")
    if name not in _HOMES:
        raise AttributeError(f"module 'moeconv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
