"""Fewer descriptors than files: every verb and the loader do with 64, and say what they lack."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch

import moeconv
from moeconv import runtime
from moeconv.engine.output.atomic_file import write_single
from moeconv.errors import IoFailed
from tests.badinput.builders import config, qwen, write
from tests.badinput.checks import holds, tree
from tests.faults.killed import forked

EXPERTS: Final = 40
LIMIT: Final = 64


@dataclass(frozen=True, slots=True)
class Place:
    """A source of 122 files, outputs of it in more than 64 each, and where an output goes."""

    src: Path
    fused: Path
    ranks: Path
    virtual: Path
    out: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Each tensor has a file of its own."""
    home = tmp_path_factory.mktemp("limits")
    made = Place(*(home / name for name in ("src", "fused", "ranks", "virtual", "out")))
    tensors = qwen(EXPERTS, layers=1)
    files = {
        f"model-{n:05d}-of-{len(tensors):05d}.safetensors": {name: spec}
        for n, (name, spec) in enumerate(tensors.items(), start=1)
    }
    write(made.src, files, config=config(experts=EXPERTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        moeconv.fuse(made.src, made.fused)
        moeconv.shard(made.src, made.ranks, ep_size=2, layout="per-expert", max_shard_size=500)
        moeconv.shard(made.src, made.virtual, ep_size=2, layout="per-expert", virtual=True)
    assert len(files) > LIMIT
    assert len(list(made.ranks.glob("rank-00000*.safetensors"))) > LIMIT / 2
    return made


def limited(soft: int, hard: int, work: Callable[[], object], note: Path) -> None:
    """Do something in a child that may open so many files; what it raises fails the test."""
    note.unlink(missing_ok=True)

    def run() -> None:
        os.fsync = lambda _: None  # type: ignore[assignment]
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        try:
            work()
        except BaseException:
            note.write_text(traceback.format_exc())
            raise

    status = forked(run)
    assert status == 0, note.read_text() if note.exists() else status


def _bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {n: t.flatten().view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}


def _loaded(out: Path) -> object:
    verify = "digest" if out.name == "ranks" else None
    shard = runtime.open(out, ep_rank=1, ep_size=2, verify=verify)
    model = torch.nn.Module()
    for name, tensor in shard.load().items():
        at = model
        *folders, last = name.split(".")
        for folder in folders:
            if not hasattr(at, folder):
                at.add_module(folder, torch.nn.Module())
            at = getattr(at, folder)
        at.register_buffer(last, torch.zeros_like(tensor))
    shard.load_into(model)
    return _bytes(dict(model.state_dict())), _bytes(shard.load())


def _to(verb: Callable[..., object], source: str, **options: object) -> Callable[[Place], object]:
    def run(place: Place) -> object:
        verb(getattr(place, source), place.out, **options)
        return tree(place.out)

    return run


VERBS: dict[str, Callable[[Place], object]] = {
    "fuse": _to(moeconv.fuse, "src", jobs=8),
    "fuse into many files": _to(moeconv.fuse, "src", jobs=64, max_shard_size=500),
    "unfuse": _to(moeconv.unfuse, "fused", jobs=64),
    "shard": _to(moeconv.shard, "src", ep_size=2, jobs=8),
    "shard --virtual": _to(moeconv.shard, "src", ep_size=2, virtual=True, layout="per-expert"),
    "merge": _to(moeconv.merge, "ranks", jobs=8),
    "merge of a virtual set": _to(moeconv.merge, "virtual", jobs=8),
    "verify": lambda p: moeconv.verify(p.ranks, jobs=8).problems,
    "verify source": lambda p: (
        moeconv.verify(p.fused, level="source", source=p.src, jobs=8).problems
    ),
    "verify of ranks against their source": lambda p: (
        moeconv.verify(p.ranks, level="source", source=p.src, jobs=64).problems
    ),
    "diff": lambda p: moeconv.diff(p.src, p.fused, jobs=8),
    "fingerprint": lambda p: moeconv.fingerprint(p.src, jobs=8),
    "open, load and load_into": lambda p: _loaded(p.ranks),
    "open, load and load_into of a virtual set": lambda p: _loaded(p.virtual),
}


@pytest.mark.parametrize("name", VERBS)
def test_more_files_than_descriptors(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    wanted = VERBS[name](place)
    shutil.rmtree(place.out, ignore_errors=True)

    def same() -> None:
        assert VERBS[name](place) == wanted

    limited(LIMIT, LIMIT, same, tmp_path / "note")
    shutil.rmtree(place.out, ignore_errors=True)


WRITERS: dict[str, Callable[[Path], object]] = {
    "fuse": lambda p: moeconv.fuse(p / "src", p / "out"),
    "unfuse": lambda p: moeconv.unfuse(p / "fused", p / "out"),
    "unfuse by another layout": lambda p: moeconv.unfuse(p / "fused", p / "out", layout="fused"),
    "shard --virtual": lambda p: moeconv.shard(
        p / "src", p / "out", ep_size=2, virtual=True, layout="per-expert"
    ),
    "merge": lambda p: moeconv.merge(p / "ranks", p / "out"),
    "a single file": lambda p: write_single(p / "out", bytes(30_000)),
}


@pytest.mark.parametrize("most", [1, 29_999])
@pytest.mark.parametrize("name", WRITERS)
def test_a_limit_of_file_sizes_cuts_nothing(tmp_path: Path, name: str, most: int) -> None:
    """A sidecar of 30,000 bytes; what is less than it is written whole, or not at all."""
    src = write(tmp_path / "src", qwen())
    (src / "tokenizer.json").write_bytes(os.urandom(30_000))
    moeconv.fuse(src, tmp_path / "fused")
    moeconv.shard(src, tmp_path / "ranks", ep_size=2)

    def refused() -> None:
        infinite = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, infinite))
        with pytest.raises(IoFailed) as caught:
            WRITERS[name](tmp_path)
        holds(caught.value, IoFailed, "cannot write", os.strerror(errno.EFBIG))
        assert "ulimit -f" in str(caught.value.fix)
        resource.setrlimit(resource.RLIMIT_FSIZE, (infinite, infinite))

    before = tree(tmp_path)
    limited(1024, 1024, refused, tmp_path.with_name("note"))
    assert tree(tmp_path) == before


def test_a_soft_limit_is_raised_and_never_lowered(place: Place, tmp_path: Path) -> None:
    def raised() -> None:
        moeconv.fuse(place.src, place.out, jobs=1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert LIMIT < soft <= hard == 4096

    def kept() -> None:
        moeconv.fingerprint(place.src, jobs=1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (4000, 4096)

    limited(LIMIT, 4096, raised, tmp_path / "note")
    limited(4000, 4096, kept, tmp_path / "note")
    shutil.rmtree(place.out)


def failure(place: Place) -> IoFailed | None:
    """What a conversion failed with; anything but our own class goes through."""
    try:
        moeconv.fuse(place.src, place.out, jobs=8)
    except IoFailed as problem:
        return problem
    return None


@pytest.fixture
def next_number() -> Iterator[int]:
    """The descriptor that will be opened next; all smaller ones are in use."""
    opened = [os.open(os.devnull, os.O_RDONLY)]
    while opened[-1] < max(map(int, os.listdir("/proc/self/fd"))) - 1:  # noqa: PTH208
        opened.append(os.open(os.devnull, os.O_RDONLY))
    yield opened[-1]
    for descriptor in opened:
        os.close(descriptor)


@pytest.mark.parametrize("more", range(1, 8))
def test_too_few_for_anything(place: Place, tmp_path: Path, next_number: int, more: int) -> None:
    """The limit is named, with its number, and not the disk; nothing is left, or all is done."""
    limit = next_number + more

    def refused() -> None:
        os.close(next_number)
        problem = failure(place)
        if problem is not None:
            holds(problem, IoFailed, f"its limit of {limit} open files")
            assert "disk" not in str(problem.fix)
            assert "limit" in str(problem.fix)
            assert not place.out.exists()
        else:
            assert more > 3

    limited(limit, limit, refused, tmp_path / "note")
    shutil.rmtree(place.out, ignore_errors=True)
