"""Reads and writes that come back short: the same result in the end, or our own error."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest
import torch

import moeconv
from moeconv import runtime
from moeconv.engine.copy import disk_sink, worker
from moeconv.errors import MoeconvError
from moeconv.verification.report import VerifyReport
from tests.badinput.builders import config, qwen, two_files, write
from tests.badinput.checks import tree
from tests.faults.short import READS, ShortCalls
from tests.runtime.handmade import checkpoint, write_set
from tests.runtime.models import TinyMoe, state

EXPERTS, WIDTH, HIDDEN = 4, 32, 64
STACK = "model.layers.0.mlp.experts"
HOW_OFTEN = [pytest.param(2), pytest.param(100_000, marks=pytest.mark.soak)]
Verb = Callable[["Place"], object]


@dataclass(frozen=True, slots=True)
class Place:
    """A foreign source, outputs of it in all forms, a hand-made set, and where an output goes."""

    src: Path
    fused: Path
    ranks: Path
    virtual: Path
    handmade: Path
    out: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Sets of several files, with sidecars that are copied and one that is rewritten."""
    home = tmp_path_factory.mktemp("short")
    made = Place(*(home / name for name in ("src", "fused", "ranks", "virtual", "handmade", "out")))
    skipped = {"modules_to_not_convert": [f"{STACK}.{e}.up_proj" for e in range(EXPERTS)]}
    doc = config(experts=EXPERTS, width=WIDTH, hidden=HIDDEN, quantization_config=skipped)
    write(made.src, two_files(qwen(EXPERTS, WIDTH, HIDDEN)), config=doc)
    (made.src / "vocabulary.txt").write_bytes(os.urandom(5000))
    moeconv.fuse(made.src, made.fused)
    moeconv.shard(made.src, made.ranks, ep_size=2, redundant=2, max_shard_size=30_000)
    options = {"ep_size": 2, "virtual": True, "layout": "per-expert"}
    moeconv.shard(made.src, made.virtual, **options)
    write_set(made.handmade, checkpoint())
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[ShortCalls]:
    """Small copies go the ways of large ones, and nothing waits for the disk."""
    monkeypatch.setattr(worker, "LARGE_TILE_BYTES", 3000)
    monkeypatch.setattr(disk_sink, "KERNEL_BYTES", 1000)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    found = ShortCalls(monkeypatch)
    yield found
    found.stop()


def _proven(report: VerifyReport) -> bool:
    """That all is well; what is not is raised."""
    if not report.ok:
        raise report.problems[0]
    return True


def _filled(place: Place) -> object:
    if not place.out.exists():
        shutil.copytree(place.virtual, place.out)
    report = moeconv.verify(place.out, level="source", source=place.src, fill=True, jobs=1)
    return _proven(report) and tree(place.out)


def _bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        n: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()
    }


def _loaded(place: Place) -> object:
    shard = runtime.open(place.ranks, ep_rank=1, ep_size=2, verify="digest")
    return _bytes(shard.load())


def _loaded_virtually(place: Place) -> object:
    return _bytes(runtime.open(place.virtual, ep_rank=1, ep_size=2).load())


def _in_a_model(place: Place) -> object:
    model = TinyMoe(3)
    shard = runtime.open(place.handmade, ep_rank=0, ep_size=2)
    shard.load_into(model)
    before = _bytes(state(model))
    shard.replace({STACK: (2, 0, 3, 4, 1, 0)}).load_into(model)
    return before, _bytes(state(model))


def _to(verb: Callable[..., object], source: str, **options: object) -> Verb:
    """A verb that writes; what it wrote."""

    def run(place: Place) -> object:
        verb(getattr(place, source), place.out, **options)
        return tree(place.out)

    return run


VERBS: dict[str, Verb] = {
    "fuse": _to(moeconv.fuse, "src", jobs=1, max_shard_size=40_000),
    "unfuse": _to(moeconv.unfuse, "fused", jobs=1),
    "shard": _to(moeconv.shard, "src", jobs=1, ep_size=2),
    "shard --virtual": _to(moeconv.shard, "src", ep_size=2, virtual=True, layout="per-expert"),
    "merge": _to(moeconv.merge, "ranks", jobs=1),
    "merge of a virtual set": _to(moeconv.merge, "virtual", jobs=1),
    "verify": lambda p: _proven(moeconv.verify(p.ranks, jobs=1)),
    "verify of ranks against their source": lambda p: _proven(
        moeconv.verify(p.ranks, level="source", source=p.src, jobs=1)
    ),
    "verify of a whole set against its source": lambda p: _proven(
        moeconv.verify(p.fused, level="source", source=p.src, jobs=1)
    ),
    "verify --fill": _filled,
    "diff": lambda p: moeconv.diff(p.src, p.fused, jobs=1),
    "fingerprint": lambda p: moeconv.fingerprint(p.src, jobs=1),
    "open and load": _loaded,
    "open and load a virtual set": _loaded_virtually,
    "load into a model, and replace": _in_a_model,
}


def ended(place: Place) -> None:
    """The place of the output is free again."""
    shutil.rmtree(place.out, ignore_errors=True)


def turns(calls: ShortCalls, verb: Verb, place: Place, times: int) -> tuple[object, list[int]]:
    """What the verb gives where all is well; of each kind of call, which ones to cut short."""
    verb(place)  # recipes are read once
    ended(place)
    calls.start(None, lambda n: n, final=False)
    wanted = verb(place)
    ended(place)
    kinds: dict[str, list[int]] = {}
    for number, kind in enumerate(calls.made, start=1):
        kinds.setdefault(kind, []).append(number)
    rng = random.Random(7)
    return wanted, [n for its in kinds.values() for n in rng.sample(its, min(times, len(its)))]


@pytest.mark.parametrize("times", HOW_OFTEN)
@pytest.mark.parametrize("name", VERBS)
def test_a_short_transfer_is_called_again(
    place: Place,
    calls: ShortCalls,
    name: str,
    times: int,
    record_property: Callable[[str, object], None],
) -> None:
    verb, made = VERBS[name], Counter[str]()
    wanted, chosen = turns(calls, verb, place, times)
    for number, part in zip(chosen, cycle((lambda n: n - 1, lambda _: 1)), strict=False):
        calls.start(number, part, final=False)
        assert verb(place) == wanted, f"{calls.kind}, call {number}"
        assert calls.kind
        made[calls.kind] += 1
        ended(place)
    assert made.total() == len(chosen) > 0
    record_property("short calls that were made good", dict(made))


def failure(verb: Verb, place: Place) -> MoeconvError | None:
    """What a verb failed with; anything but our own class goes through."""
    try:
        verb(place)
    except MoeconvError as problem:
        return problem
    return None


@pytest.mark.parametrize("times", HOW_OFTEN)
@pytest.mark.parametrize("name", VERBS)
def test_a_file_that_ends_and_a_disk_that_is_full_are_errors(
    place: Place,
    calls: ShortCalls,
    name: str,
    times: int,
    record_property: Callable[[str, object], None],
) -> None:
    verb, made = VERBS[name], Counter[str]()
    wanted, chosen = turns(calls, verb, place, times)
    before = tree(place.src)
    for number, part in zip(chosen, cycle((lambda n: n - 1, lambda _: 1)), strict=False):
        calls.start(number, part, final=True)
        problem = failure(verb, place)
        assert problem is not None, f"{calls.kind}, call {number}, was taken as whole"
        assert problem.fix
        assert (calls.kind in READS) == (problem.code != "disk-full"), problem
        made[calls.kind] += 1
        calls.stop()
        if name == "verify --fill":  # begun or not, it can be ended
            assert verb(place) == wanted
        else:
            assert tree(place.out) is None
        ended(place)
    assert tree(place.src) == before
    record_property("short calls that were errors", dict(made))
