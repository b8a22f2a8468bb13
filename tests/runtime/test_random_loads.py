"""Random loads, updates and placements of one model: each result is right, or is refused."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from moeconv import runtime
from moeconv.errors import DoesNotFit, GeometryMismatch
from moeconv.manifest.model import Run
from moeconv.runtime.files import Reader
from tests.runtime.models import like
from tests.runtime.versions import EXPERTS, OTHER, OWN, STACKS, Row, Sets, held, raw, should


def permuted(rnd: random.Random) -> Row:
    """Each expert once at least, and no rank with one twice is needed."""
    row = [*range(EXPERTS), *rnd.sample(range(EXPERTS), len(OWN) - EXPERTS)]
    rnd.shuffle(row)
    return tuple(row)


class Broken(Exception):
    """A read that fails."""


@dataclass
class Played:
    """A model, what its router says, and what the loader may not know any more.

    torn: a load ended early. unsure: and would have changed the placement.
    """

    sets: Sets
    rnd: random.Random
    patch: pytest.MonkeyPatch
    model: nn.Module
    version: str = "a"
    rows: dict[str, Row] = field(default_factory=lambda: dict.fromkeys(STACKS, OWN))
    torn: bool = False
    unsure: bool = False
    updaters: list[runtime.Updater] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def attempt(self, act: Callable[[], object], rows: dict[str, Row], version: str) -> bool:
        """Do it, perhaps with a read that fails. Whether it was done."""
        before = {n: raw(p) for n, p in self.model.named_parameters()}
        left = self.rnd.choice([0, 1, 2, 3]) if self.rnd.random() < 0.25 else -1
        real = Reader.into

        def into(reader: Reader, address: int, runs: tuple[Run, ...]) -> None:
            nonlocal left
            if left == 0:
                raise Broken
            left -= 1
            real(reader, address, runs)

        with self.patch.context() as patch:
            patch.setattr(Reader, "into", into)
            try:
                act()
            except Broken:
                self.count("broken")
                self.torn, self.unsure = True, self.unsure or rows != self.rows
                return False
            except (GeometryMismatch, DoesNotFit):
                self.count("refused")
                assert {n: raw(p) for n, p in self.model.named_parameters()} == before
                return False
        self.count("done")
        self.rows, self.version = rows, version
        return True

    def load(self) -> None:
        version, row = self.rnd.choice("ab"), self.rnd.choice([OWN, OTHER])
        shard = self.sets.open(version, row)
        if self.attempt(lambda: shard.load_into(self.model), dict.fromkeys(STACKS, row), version):
            self.torn = self.unsure = False

    def make_updater(self) -> None:
        shard = self.sets.open("a", self.rnd.choice([OWN, OTHER]))
        self.updaters.append(shard.updater(self.model))

    def update(self) -> None:
        if not self.updaters:
            return
        version, row = self.rnd.choice("ab"), self.rnd.choice([OWN, OTHER])
        updater = self.rnd.choice(self.updaters)
        newer = self.sets.open(version, row)
        if self.attempt(lambda: updater.load(newer), self.rows, version):
            assert not self.unsure
            self.torn = False

    def move(self) -> None:
        version = self.rnd.choice([self.version] * 3 + ["a", "b"])
        rows = {s: permuted(self.rnd) for s in self.rnd.sample(STACKS, self.rnd.choice([1, 2]))}
        moves = self.sets.open(version, self.rnd.choice([OWN, OTHER])).replace(rows)
        if self.rnd.random() < 0.3:
            moves = moves.shard.replace(rows := {s: permuted(self.rnd) for s in STACKS})
        if self.attempt(lambda: moves.load_into(self.model), self.rows | rows, self.version):
            assert not self.torn

    def disturb(self) -> None:
        """What others do to a model without telling; its router goes on as it was."""
        kind = self.rnd.choice(["copy", "memory", "written"])
        if kind == "copy":
            self.model, self.updaters = copy.deepcopy(self.model), []
            return
        parameter = self.rnd.choice(list(self.model.parameters()))
        if kind == "memory":
            parameter.data = parameter.data.clone()
        else:
            with torch.no_grad():
                parameter.view(torch.int16).mul_(1)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_is_right_or_refused(
    sets: Sets,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
):
    rnd = random.Random(seed)
    first = sets.open("a")
    played = Played(sets, rnd, monkeypatch, like(first))
    first.load_into(played.model)
    for _ in range(25):
        act = rnd.choices(
            [played.load, played.make_updater, played.update, played.move, played.disturb],
            [9 if played.torn else 1, 1, 3, 4, 1],
        )[0]
        act()
        if not played.torn:
            assert held(played.model, sets) == should(played.version, played.rows)
    for what, number in played.counts.items():
        record_property(what, number)
    assert played.counts["done"] >= 3
