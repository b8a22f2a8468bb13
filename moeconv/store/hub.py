"""`hf://org/name[@revision]`: a model repository on the Hugging Face Hub, read by ranges."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Final

from moeconv.core.names import relative_path_problem
from moeconv.errors import DownloadFailed, LfsPointer, UnsafePath, UsageProblem, quoted
from moeconv.store.base import FileFacts
from moeconv.store.documents import LFS_MARK
from moeconv.store.paths import NEVER_COPIED, matches

SCHEME: Final = "hf://"
START_BYTES: Final = 1 << 20  # of a file's first request: most headers and documents fit
_KEPT_STARTS: Final = 16  # files whose first bytes are kept in memory
_RETRIES: Final = 5
_ATTEMPTS: Final = 2  # at a body that ends early
_TIMEOUT: Final = 30.0  # seconds without a byte
_NETWORK_FIX: Final = "check the network and `HF_ENDPOINT`, then run again"


class HubStore:
    """The files of one commit of a Hub repository.

    The first use lists the repository: one request, which also resolves the revision to a commit,
    so that all reads are of one revision. A snapshot that is complete in the Hub's cache is read
    from there; without a network, only such a snapshot can be read.
    """

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
        self._lock = threading.Lock()

    def names(self, *, exclude: tuple[str, ...] = ()) -> list[str]:
        """Names of all files, sorted, but those that the globs of `exclude` leave out.

        Raises DownloadFailed, UnsafePath.
        """
        return [name for name in self._sizes if not matches(name, exclude)]

    def stat(self, name: str) -> FileFacts | None:
        """The size of a file; None where the repository does not have it."""
        size = self._sizes.get(name)
        return None if size is None else FileFacts(size=size, mtime_ns=0)

    def local_path(self, name: str) -> Path | None:
        """The file in the Hub's cache, if it is there."""
        commit, _ = self._listing
        return self._cached(name, commit)

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on; fewer only where the file ends.

        Raises DownloadFailed, LfsPointer.
        """
        size = self._sizes.get(name)
        if size is None:
            raise self._failed(f"does not have {quoted(name)}", "it is not in the listing", "")
        nbytes = min(nbytes, size - offset)
        if nbytes <= 0:
            return b""
        if path := self.local_path(name):
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(nbytes)
        if offset >= START_BYTES:
            return self._fetch(name, offset, nbytes)
        start = self._start(name, size)
        data = start[offset : offset + nbytes]
        if len(data) < nbytes:
            data += self._fetch(name, offset + len(data), nbytes - len(data))
        return data

    @property
    def _sizes(self) -> dict[str, int]:
        return self._listing[1]

    @cached_property
    def _listing(self) -> tuple[str, dict[str, int]]:
        """The commit, and the size of each file by name."""
        # imported here: `moeconv --help` must not pay for it
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(
                self.repo, revision=self.revision, files_metadata=True, timeout=_TIMEOUT
            )
        except Exception as problem:  # noqa: BLE001 - the client raises a dozen unrelated classes
            if getattr(problem, "response", None) is None and (found := self._snapshot()):
                return found
            raise self._explained(problem) from None
        sizes: dict[str, int] = {}
        for file in sorted(info.siblings or (), key=lambda f: f.rfilename):
            name = file.rfilename
            if not NEVER_COPIED.isdisjoint(name.split("/")):
                continue
            if why := relative_path_problem(name):
                raise UnsafePath(
                    f"{quoted(name)} {why}",
                    at=quoted(self.address),
                    cause="the repository lists a file of this name",
                    fix="report it to the repository's owner",
                )
            sizes[name] = file.size or 0
        return info.sha or self.revision or "main", sizes

    def _snapshot(self) -> tuple[str, dict[str, int]] | None:
        """The commit and the sizes of a snapshot that is complete in the Hub's cache."""
        from huggingface_hub import snapshot_download

        try:
            root = Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except Exception:  # noqa: BLE001 - no snapshot, or an incomplete one
            return None
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return root.name, {path.relative_to(root).as_posix(): path.stat().st_size for path in files}

    def _cached(self, name: str, commit: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def _start(self, name: str, size: int) -> bytes:
        """The first `START_BYTES` of a file, or all of it."""
        with self._lock:
            found = self._starts.get(name)
        if found is None:
            found = self._fetch(name, 0, min(size, START_BYTES))
            with self._lock:
                self._starts[name] = found
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
            if not offset and data.startswith(LFS_MARK):
                raise LfsPointer(
                    f"{quoted(name)} is a Git-LFS pointer, not the file itself",
                    at=quoted(self.address),
                    cause="the server has only the pointer of this file",
                    fix="upload the file itself to the repository, or use another `HF_ENDPOINT`",
                )
            if len(data) == nbytes:
                return data
        raise self._failed(
            f"ended {quoted(name)} too early",
            f"{len(data):,} of {nbytes:,} bytes from offset {offset:,} arrived",
            "run again; or `hf download` it and pass the directory",
        )

    def _request(self, name: str, offset: int, nbytes: int) -> bytes:
        """What one ranged request gives: at most `nbytes` bytes, fewer where the body ends."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff

        headers = build_hf_headers() | {
            "Range": f"bytes={offset}-{offset + nbytes - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.repo, name, revision=self._listing[0])
        data = bytearray()
        with http_stream_backoff(
            "GET",
            url,
            max_retries=_RETRIES,
            headers=headers,
            follow_redirects=True,
            timeout=_TIMEOUT,
        ) as response:
            try:
                hf_raise_for_status(response)
                if offset and response.status_code != 206:
                    raise self._failed(
                        f"does not serve a part of {quoted(name)}",
                        f"it answered a request for bytes {offset:,} and on with the whole file",
                        "`hf download` it and pass the directory",
                    )
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) >= nbytes:  # a server without ranges would send the whole file
                        break
            except (DownloadFailed, HfHubHTTPError):
                raise
            except Exception:  # noqa: BLE001, S110 - the body ended early; the caller counts
                pass
        return bytes(data[:nbytes])

    def download(self) -> Path:
        """The whole repository in the Hub's cache. Raises DownloadFailed."""
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.repo, revision=self.revision))
        except Exception as problem:  # noqa: BLE001 - the client raises a dozen unrelated classes
            raise self._explained(problem) from None

    def _explained(self, problem: Exception, name: str | None = None) -> DownloadFailed:
        from huggingface_hub import errors

        response = getattr(problem, "response", None)
        status = getattr(response, "status_code", None)
        asked = quoted(name) if name else "the repository"
        if isinstance(problem, errors.GatedRepoError):
            return self._failed(
                "is gated",
                f"the Hub answered {status}: access needs its owner's consent and your token",
                "accept its terms on the Hub, then `hf auth login` or set `HF_TOKEN`",
            )
        if isinstance(problem, errors.RepositoryNotFoundError):
            return self._failed(
                "does not exist or is private",
                f"the Hub answered {status}; it does not tell the two apart",
                "check the name; for a private one `hf auth login` or set `HF_TOKEN`",
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
                "wait a while, then run again" if busy else "check `hf auth whoami`",
            )
        return self._failed(
            "cannot be reached",
            f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}",
            _NETWORK_FIX,
        )

    def _failed(self, what: str, cause: str, fix: str) -> DownloadFailed:
        return DownloadFailed(
            f"{quoted(self.repo)} {what}",
            at=quoted(self.address),
            cause=cause,
            fix=fix or "check the name",
        )


def fetch(address: str) -> Path:
    """The local snapshot of a Hub repository. Raises DownloadFailed, UsageProblem."""
    return HubStore(address).download()
