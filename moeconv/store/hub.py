"""`hf://org/name[@revision]`: a model repository on the Hugging Face Hub, read by ranges."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Final

from moeconv.core.names import natural_key, relative_path_problem
from moeconv.core.signals import take_from
from moeconv.core.system_errors import system_failure
from moeconv.core.text import quoted_list
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
_NETWORK_FIX: Final = "check the network, `HF_ENDPOINT` and proxy variables, then run again"


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
            fix=self.store.by_hand,
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
        self._lock = Lock()
        self._answered = False  # whether a server refused to list the repository

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
        if nbytes == 0:
            return b""
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

        Without a network, a snapshot of the revision that the client knows to be complete. Raises
        DownloadFailed.
        """
        from huggingface_hub import try_to_load_from_cache

        try:
            commit, sizes = self._listing
        except DownloadFailed:
            if self._answered or (found := self._offline_snapshot()) is None:
                raise
            return found
        root = None
        for name in sizes:
            if relative_path_problem(name):
                return None
            cached = try_to_load_from_cache(self.repo, name, revision=commit)
            if not isinstance(cached, str):
                return None
            root = root or Path(cached.removesuffix(f"/{name}"))
        return root

    def download(self) -> Path:
        """The whole repository in the Hub's cache.

        Raises DownloadFailed, UnsafePath, IoFailed, DiskFull.
        """
        commit, sizes = self._listing
        for name in sizes:
            refuse_unsafe_name(name, self.address)
        root = self._fetch_snapshot(self.revision)
        if root.name != commit:  # the revision moved on since the listing
            root = self._fetch_snapshot(commit)
        if missing := [name for name in sizes if not (root / name).is_file()]:
            raise self._failed(
                "was not fetched completely",
                f"{quoted_list(missing, most=1)} is not in the Hub's cache",
                "run again when the Hub can be reached",
            )
        return root

    def _fetch_snapshot(self, revision: str | None) -> Path:
        """What `snapshot_download` gives; an interrupt does not wait for the client's threads."""
        from huggingface_hub import snapshot_download

        arriving: SimpleQueue[str | Exception] = SimpleQueue()

        def fetch() -> None:
            try:
                arriving.put(snapshot_download(self.repo, revision=revision))
            except Exception as problem:  # noqa: BLE001 - raised by the thread that waits
                arriving.put(problem)

        Thread(target=fetch, daemon=True).start()
        found = take_from(arriving)
        if isinstance(found, Exception):
            raise self._explained(found) from None
        return Path(found)

    @cached_property
    def _listing(self) -> tuple[str, dict[str, int]]:
        """The commit, and the size of each file by name, in natural order."""
        try:
            # imported here: `moeconv --help` must not pay for it
            from huggingface_hub import HfApi

            info = HfApi().model_info(
                self.repo, revision=self.revision, files_metadata=True, timeout=_TIMEOUT
            )
        except Exception as problem:  # noqa: BLE001 - the client raises a dozen unrelated classes
            self._answered = getattr(problem, "response", None) is not None
            raise self._explained(problem) from None
        sizes: dict[str, int] = {}
        for file in sorted(info.siblings or (), key=lambda f: natural_key(f.rfilename)):
            if NEVER_COPIED.isdisjoint(file.rfilename.split("/")):
                if type(file.size) is not int or file.size < 0:
                    raise self._failed(
                        "cannot be listed",
                        f"the server does not say how large {quoted(file.rfilename)} is",
                        self.by_hand,
                    )
                sizes[file.rfilename] = file.size
        if info.sha is None or not sizes:
            lacking = "names no commit" if sizes else "lists no files"
            raise self._failed("cannot be read", f"the server {lacking}", "check the name")
        return info.sha, sizes

    def _offline_snapshot(self) -> Path | None:
        """A cached snapshot of the revision. Raises DownloadFailed where files may be missing."""
        from huggingface_hub import snapshot_download

        try:
            root = Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except Exception:  # noqa: BLE001 - no snapshot of this revision
            return None
        # with the list of its files the client has compared the snapshot with it
        if not (root.parent.parent / "trees" / f"{root.name}.json").exists():
            raise self._failed(
                "cannot be listed, and its snapshot in the cache may lack files",
                "the Hub cannot be reached, and the cache has no list of the snapshot's files",
                f"if it is complete, pass its directory: {quoted(str(root))}",
            )
        return root

    @property
    def by_hand(self) -> str:
        """How to get the files without moeconv."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"run `hf download {self.repo}{revision}` and pass the directory that it prints"

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
            place = self._places.pop(name, None)
            try:
                data = self._request(name, offset, nbytes, place)
            except DownloadFailed:
                raise
            except Exception as problem:  # noqa: BLE001 - as above
                if place is not None:  # it expired, or wants a token
                    continue
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

    def _request(self, name: str, offset: int, nbytes: int, place: str | None) -> bytes:
        """What one ranged request gives: at most `nbytes` bytes, fewer where the body ends.

        place: where an earlier request was redirected to.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        ranged = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        if place is None:
            ranged |= build_hf_headers()
        url = place or hf_hub_url(self.repo, name, revision=self._listing[0])
        data = bytearray()
        with http_stream_backoff(
            "GET", url, max_retries=_RETRIES, headers=ranged, follow_redirects=True,
            timeout=_TIMEOUT,
        ) as response:  # fmt: skip
            hf_raise_for_status(response)
            partial = response.status_code == 206
            sent = response.headers.get("Content-Range", "") if partial else "bytes 0-"
            if not sent.startswith(f"bytes {offset}-"):
                raise self._failed(
                    f"does not serve a part of {quoted(name)}",
                    f"it was asked for the bytes from {offset:,} on, and sent "
                    + (f"`{sent}`" if partial else "the whole file"),
                    self.by_hand,
                )
            if place or response.history:
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
        if isinstance(problem, errors.OfflineModeIsEnabled):
            return self._failed(
                "cannot be reached",
                "`HF_HUB_OFFLINE` is set, and the cache has no snapshot of this revision",
                "unset `HF_HUB_OFFLINE`, or pass the directory of a local copy",
            )
        if isinstance(problem, errors.HFValidationError):
            cause = str(problem).partition("\n")[0]
            return self._failed("is not a name that the Hub allows", cause, "check the name")
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
        if isinstance(problem, errors.EntryNotFoundError) and status is not None:
            return self._failed(
                f"does not have {quoted(name or 'a file')}, which it lists",
                f"the Hub answered {status}",
                "wait a while, then run again; the repository may be changing",
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
            f"run again; or {self.by_hand}",
        )

    def _failed(self, what: str, cause: str, fix: str) -> DownloadFailed:
        return DownloadFailed(
            f"{quoted(self.repo)} {what}", at=quoted(self.address), cause=cause, fix=fix
        )
