"""moeconv converts Mixture-of-Experts checkpoints between layouts, byte for byte, and proves it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from moeconv.version import __version__

if TYPE_CHECKING:
    from moeconv.api import fuse, open_source, unfuse
    from moeconv.checks import diff, fingerprint, verify
    from moeconv.errors import MoeconvError
    from moeconv.sharding import merge, shard

# PEP 562: `import moeconv` costs nothing until something of it is used
_HOMES = {
    "diff": "moeconv.checks",
    "fingerprint": "moeconv.checks",
    "fuse": "moeconv.api",
    "merge": "moeconv.sharding",
    "open_source": "moeconv.api",
    "shard": "moeconv.sharding",
    "unfuse": "moeconv.api",
    "verify": "moeconv.checks",
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
