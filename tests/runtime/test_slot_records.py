"""Records of what a model holds: any order of loads, updates, placements is right or refused."""

import copy
import io
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

import moeconv
from moeconv import runtime
from moeconv.errors import DoesNotFit, GeometryMismatch, IoFailed, MissingShard, MoeconvError
from moeconv.runtime import slot_records
from moeconv.runtime.files import Reader
from tests.helpers import write_checkpoint
from tests.runtime.conftest import Opened
from tests.runtime.handmade import STACK, all_same, checkpoint, write_virtual
from tests.runtime.models import TinyMoe, like, state

EXPERTS, LAYERS, EP, HIDDEN, WIDTH = 4, 2, 2, 4, 2
STACKS = [f"model.layers.{n}.mlp.experts" for n in range(LAYERS)]
Row = tuple[int, ...]
OWN: Row = (0, 1, 2, 3, 0, 1)
OTHER: Row = (3, 1, 0, 2, 1, 3)
Whose = tuple[str, int, int]  # version, layer, expert


@dataclass
class Sets:
    """Versions of one model as sets by (version, placement); whose bytes are whose."""

    folder: Path
    owner: dict[bytes, Whose] = field(default_factory=dict)

    def open(self, version: str, row: Row = OWN, **options: object) -> runtime.Shard:
        path = self.folder / f"{version}-{'own' if row == OWN else 'other'}"
        return runtime.open(path, ep_rank=0, ep_size=EP, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["fused", "per-expert"])
def sets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sets:
    made = Sets(tmp_path_factory.mktemp(request.param))
    rnd = random.Random(request.param)
    for version in ("a", "b"):
        tensors = {"model.norm.weight": ("BF16", (HIDDEN,), rnd.randbytes(2 * HIDDEN))}
        for layer, stack in enumerate(STACKS):
            for e in range(EXPERTS):
                for p in ("gate", "up", "down"):
                    shape = (HIDDEN, WIDTH) if p == "down" else (WIDTH, HIDDEN)
                    raw = rnd.randbytes(2 * HIDDEN * WIDTH)
                    tensors[f"{stack}.{e}.{p}_proj.weight"] = ("BF16", shape, raw)
                    made.owner[raw] = (version, layer, e)
        src = write_checkpoint(made.folder / version, tensors, {"model_type": "qwen3_moe"})
        for name, row in (("own", OWN), ("other", OTHER)):
            moeconv.shard(
                src,
                made.folder / f"{version}-{name}",
                ep_size=EP,
                placement=dict.fromkeys(STACKS, row),
                layout=request.param,
            )
    return made


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


def held(model: nn.Module, sets: Sets) -> dict[str, list[set[Whose]]]:
    """Whose matrices are in each local slot of each stack."""
    slots = len(OWN) // EP
    found: dict[str, list[set[Whose]]] = {s: [set() for _ in range(slots)] for s in STACKS}
    size = 2 * HIDDEN * WIDTH
    for name, tensor in model.named_parameters():
        stack = next((s for s in STACKS if name.startswith(s)), None)
        if stack is None:
            continue
        number = name.removeprefix(f"{stack}.").split(".")[0]
        numbers = [int(number)] if number.isdecimal() else range(slots)
        data = raw(tensor)
        share = len(data) // len(numbers)
        for at, slot in enumerate(numbers):
            part = data[at * share : (at + 1) * share]
            for n in range(0, share, size):
                nobody = ("nobody", 0, 0)
                found[stack][slot].add(sets.owner.get(part[n : n + size], nobody))
    return found


def should(version: str, rows: dict[str, Row]) -> dict[str, list[set[Whose]]]:
    """What `held` finds where a model of rank 0 is right."""
    slots = len(OWN) // EP
    return {
        stack: [{(version, STACKS.index(stack), e)} for e in row[:slots]]
        for stack, row in rows.items()
    }


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

    def attempt(self, act: object, rows: dict[str, Row], version: str) -> bool:
        """Do it, perhaps with a read that fails. Whether it was done."""
        before = {n: raw(p) for n, p in self.model.named_parameters()}
        left = self.rnd.choice([0, 1, 2, 3]) if self.rnd.random() < 0.25 else -1
        real = Reader.into

        def into(reader: Reader, *args: object) -> None:
            nonlocal left
            if left == 0:
                raise Broken
            left -= 1
            real(reader, *args)  # type: ignore[arg-type]

        with self.patch.context() as patch:
            patch.setattr(Reader, "into", into)
            try:
                act()  # type: ignore[operator]
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
    sets: Sets, seed: int, monkeypatch: pytest.MonkeyPatch, record_property: object
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
        record_property(what, number)  # type: ignore[operator]
    assert played.counts["done"] >= 3


# --- by hand -----------------------------------------------------------------------------------
@pytest.fixture
def loaded(sets: Sets) -> tuple[runtime.Shard, nn.Module]:
    shard = sets.open("a")
    model = like(shard)
    shard.load_into(model)
    return shard, model


A, B = dict.fromkeys(STACKS, (3, 2, 1, 0, 1, 2)), dict.fromkeys(STACKS, (0, 2, 3, 1, 1, 2))
Loaded = tuple[runtime.Shard, nn.Module]


def test_an_update_after_a_new_placement_keeps_it(sets: Sets, loaded: Loaded):
    shard, model = loaded
    updater = shard.updater(model)
    updater.load(shard)
    shard.replace(A).load_into(model)
    for version in ("b", "a", "b"):
        updater.load(sets.open(version))
        assert held(model, sets) == should(version, A)
    sets.open("a", OTHER).load_into(model)
    updater.load(sets.open("b", OTHER))  # the newer set is in the model's placement already
    assert held(model, sets) == should("b", dict.fromkeys(STACKS, OTHER))
    updater.load(sets.open("b"))
    assert held(model, sets) == should("b", dict.fromkeys(STACKS, OTHER))


@pytest.mark.parametrize("row", [(3, 1, 2, 0, 0, 1), (0, 1, 3, 2, 0, 1), (0, 1, 2, 3, 1, 0)])
def test_an_update_after_a_placement_that_changes_some_slots(sets: Sets, loaded: Loaded, row: Row):
    """One slot of this rank, or only slots of other ranks: the model is in that placement."""
    shard, model = loaded
    updater, rows = shard.updater(model), dict.fromkeys(STACKS, row)
    shard.replace(rows).load_into(model)
    updater.load(sets.open("b"))
    assert held(model, sets) == should("b", rows)
    updater.load(sets.open("a").replace(rows).shard)
    assert held(model, sets) == should("a", rows)
    shard.replace(A).load_into(model)
    assert held(model, sets) == should("a", A)


def test_such_an_update_needs_the_other_ranks_files_before_it_writes(
    sets: Sets, loaded: Loaded, tmp_path: Path
):
    shard, model = loaded
    updater = shard.updater(model)
    shard.replace(A).load_into(model)
    partial = tmp_path / "partial"
    others = shutil.ignore_patterns("rank-00001-of-00002-*")
    shutil.copytree(sets.folder / "b-own", partial, ignore=others)
    with pytest.raises(MissingShard):
        updater.load(runtime.open(partial, ep_rank=0, ep_size=EP))
    assert held(model, sets) == should("a", A)


def test_two_placements_in_a_row_from_one_shard(sets: Sets, loaded: Loaded):
    shard, model = loaded
    first, second = shard.replace(A), shard.replace(B)
    first.load_into(model)
    report = second.load_into(model)
    assert held(model, sets) == should("a", B)
    # slot 1 is the same in A and B, though another than in the files
    assert report.bytes_read == LAYERS * 2 * 3 * 2 * HIDDEN * WIDTH
    assert second.load_into(model).bytes_read == 0
    shard.replace(shard.placement).load_into(model)
    assert held(model, sets) == should("a", dict.fromkeys(STACKS, OWN))


def test_a_second_model_that_holds_another_placement(sets: Sets, loaded: Loaded):
    shard, model = loaded
    other = like(shard)
    shard.replace(A).shard.load_into(other)
    moves = shard.replace(B)
    for one in (model, other):
        moves.load_into(one)
        assert held(one, sets) == should("a", B)


def test_a_model_that_was_filled_by_hand(sets: Sets, loaded: Loaded):
    """There is no record of what it holds, so that all slots of the named stacks are read."""
    shard, _ = loaded
    model = like(shard)
    with torch.no_grad():
        for name, value in shard.replace(A).shard.load().items():
            model.get_parameter(name).copy_(value)
    shard.replace({STACKS[0]: B[STACKS[0]]}).load_into(model)
    assert held(model, sets) == should("a", {STACKS[0]: B[STACKS[0]], STACKS[1]: A[STACKS[1]]})


def test_a_stack_that_the_new_placement_does_not_name(sets: Sets, loaded: Loaded):
    shard, model = loaded
    shard.replace({STACKS[0]: A[STACKS[0]]}).load_into(model)
    with pytest.raises(GeometryMismatch, match="does not name it"):
        shard.replace({STACKS[1]: A[STACKS[1]]}).load_into(model)
    last = shard.replace({STACKS[0]: A[STACKS[0]]}).shard
    last.replace({STACKS[1]: A[STACKS[1]]}).load_into(model)
    assert held(model, sets) == should("a", A)


def test_slots_of_an_older_set_are_not_mixed_in(sets: Sets, loaded: Loaded):
    shard, model = loaded
    newer = sets.open("b")
    shard.updater(model).load(newer)
    with pytest.raises(GeometryMismatch, match="weights of another output"):
        shard.replace(A).load_into(model)
    assert held(model, sets) == should("b", dict.fromkeys(STACKS, OWN))
    sets.open("b").replace(A).load_into(model)  # opened again, it is the same set
    assert held(model, sets) == should("b", A)


def test_sets_without_digests_are_told_apart_by_their_files(tmp_path: Path):
    a, b = (checkpoint(start=n) for n in (0, 100_000))
    sets = [
        runtime.open(write_virtual(tmp_path / n, tmp_path / f"{n}-src", m), ep_rank=0, ep_size=2)
        for n, m in (("a", a), ("b", b))
    ]
    for shard in sets:
        object.__setattr__(shard.output.root, "fingerprint", None)
    model = TinyMoe(3)
    sets[0].load_into(model)
    with pytest.raises(GeometryMismatch, match="weights of another output"):
        sets[1].replace([(2, 0, 4, 1, 3, 0)]).load_into(model)
    sets[0].replace([(2, 0, 4, 1, 3, 0)]).load_into(model)
    all_same(state(model), a.expected(0, {STACK: (2, 0, 4, 1, 3, 0)}))


def test_an_updater_made_under_another_placement_than_the_model_has(sets: Sets, loaded: Loaded):
    shard, model = loaded
    shard.replace(A).load_into(model)
    updater = shard.updater(model)
    with pytest.raises(GeometryMismatch, match="before the updater was made"):
        updater.load(sets.open("b"))
    assert held(model, sets) == should("a", A)
    updater.load(sets.open("b").replace(A).shard)
    assert held(model, sets) == should("b", A)
    sets.open("a").load_into(model)
    updater.load(sets.open("b"))
    assert held(model, sets) == should("b", dict.fromkeys(STACKS, OWN))


@pytest.mark.parametrize("kind", ["update", "load", "moves"])
def test_after_a_load_that_ended_early(
    sets: Sets, loaded: Loaded, kind: str, monkeypatch: pytest.MonkeyPatch
):
    shard, model = loaded
    updater, newer = shard.updater(model), sets.open("b")
    shard.replace(A).load_into(model)
    acts = {
        "update": lambda: updater.load(newer),
        "load": lambda: newer.load_into(model),
        "moves": lambda: shard.replace(B).load_into(model),
    }
    real, calls = Reader.into, iter(range(100))

    def failing(reader: Reader, *args: object) -> None:
        if next(calls) == 2:
            raise IoFailed("no", cause="a bad sector", fix="another disk")
        real(reader, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "into", failing)
        with pytest.raises(IoFailed):
            acts[kind]()
    for one in (shard, newer):
        with pytest.raises(DoesNotFit, match="ended early"):
            one.replace(A).load_into(model)
    if kind == "update":  # it changed no placement, so that it can be done again
        updater.load(newer)
        assert held(model, sets) == should("b", A)
    else:
        with pytest.raises(DoesNotFit, match="ended early"):
            updater.load(newer)
        newer.load_into(model)
        assert held(model, sets) == should("b", dict.fromkeys(STACKS, OWN))
    newer.replace(B).load_into(model)
    assert held(model, sets) == should("b", B)


@pytest.mark.parametrize("kind", ["memory", "written", "state_dict", "copy"])
def test_memory_that_others_replaced_or_wrote(sets: Sets, loaded: Loaded, kind: str):
    """What moves leaves in place must still be what was loaded; else all of it is read."""
    shard, model = loaded
    updater = shard.updater(model)
    shard.replace(A).load_into(model)
    other = like(shard)
    shard.load_into(other)
    if kind == "memory":
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data = q.data.clone()
    elif kind == "written":
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    elif kind == "state_dict":
        model.load_state_dict(other.state_dict())
    else:
        model = copy.deepcopy(model)
    shard.replace(B).load_into(model)
    assert held(model, sets) == should("a", B)
    if kind != "copy":
        updater.load(sets.open("b"))
        assert held(model, sets) == should("b", B)


def test_a_saved_model_is_plain(loaded: Loaded):
    """The notes stand with its modules, and must not make it need moeconv."""
    _, model = loaded
    file = io.BytesIO()
    torch.save(model, file)
    assert b"moeconv.runtime" not in file.getvalue()
    file.seek(0)
    back = torch.load(file, weights_only=False)
    all_same(dict(back.state_dict()), dict(model.state_dict()))


def test_a_model_of_some_layers(sets: Sets):
    """A stage of a pipeline: a new placement of all stacks moves what is there."""
    shard = sets.open("a")
    model = like(shard)
    del model.model.layers._modules["1"]
    names = [n for n in shard.names if ".layers.1." in n]
    shard.load_into(model, ignore=names)
    row = {STACKS[0]: A[STACKS[0]], STACKS[1]: OWN}
    shard.replace(row).load_into(model)
    assert held(model, sets)[STACKS[0]] == should("a", A)[STACKS[0]]
    with pytest.raises(DoesNotFit, match="not in the model"):
        shard.replace(A).load_into(model)


def notes(model: nn.Module) -> list[object]:
    return [
        note for m in model.modules() for note in m.__dict__.get(slot_records._KEY, {}).values()
    ]


def test_whole_sets_leave_no_note(sets: Sets, tmp_path: Path):
    moeconv.fuse(sets.folder / "a", tmp_path / "whole")
    row = dict.fromkeys(STACKS, (1, 0, 3, 2))
    moeconv.shard(sets.folder / "a", tmp_path / "one", ep_size=1, placement=row)
    one = runtime.open(tmp_path / "one", ep_rank=0, ep_size=1)
    whole = runtime.open(tmp_path / "whole", ep_rank=0, ep_size=1)
    model = like(one)
    updater = one.updater(model)
    updater.load(one)
    with pytest.raises(MoeconvError):
        updater.load(whole)
    assert notes(model)
    whole.load_into(model)
    assert not notes(model)
    all_same(state(model), whole.load())
    updater.load(one)
    all_same(state(model), one.load())


def test_two_stacks_in_one_memory(tmp_path: Path):
    """Experts that two layers share can have one placement only."""
    shape, names = (HIDDEN, HIDDEN), ("gate", "up", "down")
    tensors = {
        f"{stack}.{e}.{p}_proj.weight": ("BF16", shape, bytes([9 * e + n]) * 2 * HIDDEN**2)
        for stack in STACKS
        for e in range(EXPERTS)
        for n, p in enumerate(names)
    }
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    moeconv.shard(src, tmp_path / "set", ep_size=EP, placement=dict.fromkeys(STACKS, OWN))
    shard = runtime.open(tmp_path / "set", ep_rank=0, ep_size=EP)
    model = like(shard)
    one, other = (model.get_submodule(stack) for stack in STACKS)
    other._parameters.update(one._parameters)
    shard.load_into(model)
    before = state(model)
    rows = [{STACKS[0]: A[STACKS[0]]}, {STACKS[1]: A[STACKS[1]]}]
    rows += [dict(zip(STACKS, (OTHER, A[STACKS[1]]), strict=True))]
    for placement in rows:
        with pytest.raises(DoesNotFit, match="different experts"):
            shard.replace(placement).load_into(model)
        all_same(state(model), before)
    shard.replace(A).load_into(model)
    all_same(state(model), shard.replace(A).shard.load())


def test_what_is_ignored_is_left_alone_by_a_new_placement(sets: Sets, loaded: Loaded):
    """Also where it was never loaded, so that its contents are not known."""
    shard, _ = loaded
    model = like(shard)
    layer = model.get_submodule("model.layers")._modules.pop("1")
    shard.load_into(model, ignore=["*layers.1.*"])
    model.get_submodule("model.layers").add_module("1", layer)
    rows = {STACKS[0]: A[STACKS[0]], STACKS[1]: OWN}
    shard.replace(rows).load_into(model, ignore=["*layers.1.*"])
    assert held(model, sets)[STACKS[0]] == should("a", rows)[STACKS[0]]
    assert not any(p.any() for n, p in model.named_parameters() if ".layers.1." in n)


def test_tensors_of_a_model_in_two_placements(opened: Opened):
    shard, model = opened(checkpoint()), TinyMoe(3)
    shard.load_into(model)
    updater = shard.updater(model)
    shard.replace([(2, 0, 4, 1, 3, 0)]).load_into(model)
    notes = model.model.layers[0].mlp.experts.__dict__["_moeconv_loads"]
    lost = TinyMoe(3)
    shard.load_into(lost)
    notes["down_proj"] = lost.model.layers[0].mlp.experts.__dict__["_moeconv_loads"]["down_proj"]
    with pytest.raises(GeometryMismatch, match="in two placements"):
        updater.load(shard)
