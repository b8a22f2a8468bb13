"""`hf://org/name[@revision]`: a model repository on the Hugging Face Hub, read by ranges."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from moeconv.core.names import natural_key
from moeconv.core.system_errors import system_failure
from moeconv.errors import (
    DownloadFailed,
    IoFailed,
    LfsPointer,
    NotLocal,
    UsageProblem,
    quoted,
)
from moeconv.store.documents import LFS_MARK
from moeconv.store.paths import NEVER_COPIED, matches, refuse_unsafe_name

SCHEME: Final = "hf://"
START_BYTES: Final = 1 << 20  # of a file's first request: most headers and documents fit
_KEPT_STARTS: Final = 16  # files whose first bytes are kept in memory
_RETRIES: Final = 5
_ATTEMPTS: Final = 2  # at a body that ends early
_TIMEOUT: Final = 30.0  # seconds without a byte
_NETWORK_FIX: Final = "check the network and `HF_ENDPOINT`, then run again"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository; its bytes are fetched by ranges."""

    store: HubStore
    name: str
    size: int
    mtime_ns: int = 0

    @property
    def path(self) -> Path:
        """Raises NotLocal."""
        raise NotLocal(
            f"{quoted(self.name)} is not a local file",
            at=quoted(self.store.address),
            cause="this command reads whole files; from the Hub, moeconv reads only headers",
            fix=f"run `hf download {self.store.repo}` and pass the directory that it prints",
        )

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset` on. Raises DownloadFailed."""
        return self.store.read(self, offset, nbytes)


class HubStore:
    """The files of one commit of a Hub repository.

    The first use lists the repository: one request, which also resolves the revision to a commit,
    so that all reads are of one revision.
    """

    root: None = None

    def __init__(self, address: str) -> None:
        """Raises UsageProblem for text that is not a Hub address."""
        self.address = address
        self.repo, _, revision = address.removeprefix(SCHEME).partition("@")
        self.revision = revision or None
        if self.repo.count("/") != 1 or not all(self.repo.split("/")):
            raise UsageProblem(
                f"{quoted(address)} is not a Hub address",
                cause="it must be `hf://org/name` or `hf://org/name@revision`",
                fix="write `hf://Qwen/Qwen3-30B-A3B`, for example",
            )
        self._starts: OrderedDict[str, bytes] = OrderedDict()
        self._places: dict[str, str] = {}  # where the Hub redirects to, by file
        self._lock = threading.Lock()

    def entries(self) -> list[str]:
        """Names directly in the repository, as in `Store`. Raises DownloadFailed."""
        split = (name.partition("/") for name in self._listing[1])
        return list(dict.fromkeys(f"{first}{slash}" for first, slash, _ in split))

    def names(self, *, exclude: tuple[str, ...] = ()) -> list[str]:
        """Names of all files, as in `Store`. Raises DownloadFailed."""
        return [name for name in self._listing[1] if not matches(name, exclude)]

    def file(self, name: str) -> HubFile | None:
        """The file of this name, as in `Store`. Raises DownloadFailed, UnsafePath."""
        refuse_unsafe_name(name, self.address)
        size = self._listing[1].get(name)
        return None if size is None else HubFile(self, name, size)

    def read(self, file: HubFile, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes of a file from `offset` on. Raises DownloadFailed."""
        end = offset + nbytes
        if end > file.size:
            raise self._ended(file.name, file.size - offset, offset, nbytes)
        if offset >= START_BYTES:
            return self._fetch(file.name, offset, nbytes)
        start = self._start(file)
        data = start[offset:end]
        if len(data) < nbytes:
            data += self._fetch(file.name, offset + len(data), nbytes - len(data))
        return data

    def snapshot(self) -> Path | None:
        """The directory in the Hub's cache that has all files of this commit; None if none has.

        Without a network, whatever snapshot of the revision is there. Raises DownloadFailed.
        """
        from huggingface_hub import try_to_load_from_cache

        try:
            commit, sizes = self._listing
        except DownloadFailed:
            if (found := self._offline_snapshot()) is None:
                raise
            return found
        root = None
        for name in sizes:
            found_file = try_to_load_from_cache(self.repo, name, revision=commit)
            if not isinstance(found_file, str):
                return None
            root = root or Path(found_file.removesuffix(f"/{name}"))
        return root

    def download(self) -> Path:
        """The whole repository in the Hub's cache. Raises DownloadFailed, IoFailed, DiskFull."""
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.repo, revision=self.revision))
        except Exception as problem:  # noqa: BLE001 - the client raises a dozen unrelated classes
            raise self._explained(problem) from None

    @cached_property
    def _listing(self) -> tuple[str, dict[str, int]]:
        """The commit, and the size of each file by name, in natural order."""
        # imported here: `moeconv --help` must not pay for it
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(
                self.repo, revision=self.revision, files_metadata=True, timeout=_TIMEOUT
            )
        except Exception as problem:  # noqa: BLE001 - as above
            raise self._explained(problem) from None
        sizes: dict[str, int] = {}
        for file in sorted(info.siblings or (), key=lambda f: natural_key(f.rfilename)):
            if NEVER_COPIED.isdisjoint(file.rfilename.split("/")):
                if file.size is None:
                    raise self._failed(
                        "cannot be listed",
                        f"the server does not say how large {quoted(file.rfilename)} is",
                        f"run `hf download {self.repo}` and pass the directory that it prints",
                    )
                sizes[file.rfilename] = file.size
        if info.sha is None:
            raise self._failed("cannot be listed", "the server names no commit", _NETWORK_FIX)
        return info.sha, sizes

    def _offline_snapshot(self) -> Path | None:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except Exception:  # noqa: BLE001 - no snapshot of this revision
            return None

    def _start(self, file: HubFile) -> bytes:
        """The first `START_BYTES` of a file, or all of it."""
        with self._lock:
            found = self._starts.get(file.name)
        if found is None:
            found = self._fetch(file.name, 0, min(file.size, START_BYTES))
            with self._lock:
                self._starts[file.name] = found
                while len(self._starts) > _KEPT_STARTS:
                    self._starts.popitem(last=False)
        return found

    def _fetch(self, name: str, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset` on, with one ranged request."""
        data = b""
        for _ in range(_ATTEMPTS):
            try:
                data = self._request(name, offset, nbytes)
            except DownloadFailed:
                raise
            except Exception as problem:  # noqa: BLE001 - as above
                raise self._explained(problem, name) from None
            if len(data) == nbytes:
                return data
            if not offset and data.startswith(LFS_MARK):
                raise LfsPointer(
                    f"{quoted(name)} is a Git-LFS pointer, not the file itself",
                    at=quoted(self.address),
                    cause="the server has only the pointer of this file",
                    fix="upload the file itself to the repository, or use another `HF_ENDPOINT`",
                )
        raise self._ended(name, len(data), offset, nbytes)

    def _request(self, name: str, offset: int, nbytes: int) -> bytes:
        """What one ranged request gives: at most `nbytes` bytes, fewer where the body ends."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        ranged = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        url = self._places.pop(name, None)
        if url is None:  # the place that a redirect leads to takes no token
            ranged |= build_hf_headers()
            url = hf_hub_url(self.repo, name, revision=self._listing[0])
        data = bytearray()
        with http_stream_backoff(
            "GET", url, max_retries=_RETRIES, headers=ranged, follow_redirects=True,
            timeout=_TIMEOUT,
        ) as response:  # fmt: skip
            hf_raise_for_status(response)
            if offset and response.status_code != 206:
                raise self._failed(
                    f"does not serve a part of {quoted(name)}",
                    f"it answered a request for the bytes from {offset:,} on with the whole file",
                    f"run `hf download {self.repo}` and pass the directory that it prints",
                )
            if response.history:
                self._places[name] = str(response.url)
            try:
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) >= nbytes:  # a server without ranges would send the whole file
                        break
            except HfHubHTTPError:
                raise
            except Exception:  # noqa: BLE001, S110 - the body ended early; the caller counts
                pass
        return bytes(data[:nbytes])

    def _explained(self, problem: Exception, name: str | None = None) -> IoFailed:
        from huggingface_hub import errors

        if isinstance(problem, OSError) and problem.errno is not None:
            return system_failure(problem)  # a full disk, a cache that cannot be written to
        response = getattr(problem, "response", None)
        status = getattr(response, "status_code", None)
        asked = quoted(name) if name else "the repository"
        if isinstance(problem, errors.GatedRepoError):
            return self._failed(
                "is gated",
                f"the Hub answered {status}: access needs its owner's consent and your token",
                "accept its terms on the Hub, then run `hf auth login` or set `HF_TOKEN`",
            )
        if isinstance(problem, errors.RepositoryNotFoundError):
            return self._failed(
                "does not exist or is private",
                f"the Hub answered {status}; it does not tell the two apart",
                "check the name; for a private repository, run `hf auth login` or set `HF_TOKEN`",
            )
        if isinstance(problem, errors.RevisionNotFoundError):
            return self._failed(
                f"does not have the revision {quoted(self.revision or 'main')}",
                f"the Hub answered {status}",
                "pass a branch, a tag or a commit of the repository after `@`",
            )
        if status is not None:
            busy = status == 429 or status >= 500
            # the client retries the reads of files, not the listing
            retried = f", after {_RETRIES} retries" if busy and name else ""
            return self._failed(
                f"cannot be read: the server refused {asked}",
                f"it answered {status}{retried}",
                "wait a while, then run again"
                if busy
                else "check your login with `hf auth whoami`",
            )
        return self._failed(
            "cannot be reached",
            f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}",
            _NETWORK_FIX,
        )

    def _ended(self, name: str, arrived: int, offset: int, nbytes: int) -> DownloadFailed:
        return self._failed(
            f"ended {quoted(name)} too early",
            f"{max(arrived, 0):,} of {nbytes:,} bytes from offset {offset:,} arrived",
            f"run again, or run `hf download {self.repo}` and pass the directory that it prints",
        )

    def _failed(self, what: str, cause: str, fix: str) -> DownloadFailed:
        return DownloadFailed(
            f"{quoted(self.repo)} {what}", at=quoted(self.address), cause=cause, fix=fix
        )
