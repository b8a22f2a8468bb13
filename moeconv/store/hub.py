"""`hf://org/name[@revision]`: fetched with huggingface_hub into its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from moeconv.errors import DownloadFailed, UsageProblem, quoted

SCHEME: Final = "hf://"


def fetch(address: str) -> Path:
    """The local snapshot of a Hub repository. Raises DownloadFailed, UsageProblem."""
    repo, _, revision = address.removeprefix(SCHEME).partition("@")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UsageProblem(
            f"{quoted(address)} is not a Hub address",
            cause="it must be `hf://org/name` or `hf://org/name@revision`",
            fix="write `hf://Qwen/Qwen3-30B-A3B`, for example",
        )
    # imported here: `moeconv --help` must not pay for it
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision or None))
    except Exception as problem:  # noqa: BLE001 - the hub client raises a dozen unrelated classes
        raise DownloadFailed(
            f"cannot fetch {quoted(address)}",
            cause=f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}",
            fix="check the name, the network and `hf auth whoami`; "
            "or `hf download` it and pass the directory",
        ) from None
