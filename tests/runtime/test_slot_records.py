"""Records of what a model holds: loads, updates and placements one after the other."""

import copy
import io
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import moeconv
from moeconv import runtime
from moeconv.errors import DoesNotFit, GeometryMismatch, IoFailed, MissingShard, MoeconvError
from moeconv.manifest.model import Run
from moeconv.runtime import slot_records
from moeconv.runtime.files import Reader
from tests.helpers import write_checkpoint
from tests.runtime.conftest import Opened
from tests.runtime.handmade import STACK, all_same, checkpoint, write_virtual
from tests.runtime.models import TinyMoe, like, state
from tests.runtime.versions import (
    EP,
    EXPERTS,
    HIDDEN,
    LAYERS,
    OTHER,
    OWN,
    STACKS,
    WIDTH,
    Row,
    Sets,
    held,
    should,
)


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


def test_slots_of_an_older_output_are_not_mixed_in(sets: Sets, loaded: Loaded):
    shard, model = loaded
    newer = sets.open("b")
    shard.updater(model).load(newer)
    with pytest.raises(GeometryMismatch, match="weights of another output"):
        shard.replace(A).load_into(model)
    assert held(model, sets) == should("b", dict.fromkeys(STACKS, OWN))
    sets.open("b").replace(A).load_into(model)  # opened again, it is the same set
    assert held(model, sets) == should("b", A)


def test_outputs_without_digests_are_distinguished_by_their_files(tmp_path: Path):
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

    def failing(reader: Reader, address: int, runs: tuple[Run, ...]) -> None:
        if next(calls) == 2:
            raise IoFailed("no", cause="a bad sector", fix="another disk")
        real(reader, address, runs)

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


def test_whole_outputs_leave_no_records(sets: Sets, tmp_path: Path):
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
