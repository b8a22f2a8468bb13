"""Into one model again and again: newer sets of the same geometry, then other placements."""

from pathlib import Path

import pytest
import torch
from torch import nn

from moeconv import runtime
from moeconv.errors import DoesNotFit, GeometryMismatch, IoFailed, SourceChanged
from tests.runtime.conftest import Opened
from tests.runtime.handmade import STACK, all_same, checkpoint, same, write_set
from tests.runtime.models import TinyMoe, on_meta, state


# --- again and again ---------------------------------------------------------------------------
def test_updater(opened: Opened, monkeypatch: pytest.MonkeyPatch):
    made, model = checkpoint(layers=2), on_meta(TinyMoe(3, layers=2))
    newer = checkpoint(layers=2, start=100_000)
    updater = opened(made).updater(model)
    assert updater.load(opened(made)).materialised == 4 + 3
    all_same(state(model), made.expected(0))
    pointers = {n: t.data_ptr() for n, t in model.state_dict().items()}
    second = opened(newer)

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("moeconv.runtime.update.fit", never)
    monkeypatch.setattr("moeconv.runtime.fit._renamed", never)
    monkeypatch.setattr(torch, "empty", never)
    report = updater.load(second)
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == pointers
    all_same(state(model), newer.expected(0))
    assert (report.materialised, report.tensors) == (0, 9)


def test_updater_where_offsets_differ(opened: Opened, tmp_path: Path):
    made, newer, model = checkpoint(), checkpoint(start=100_000), TinyMoe(3)
    updater = opened(made).updater(model)
    updater.load(opened(made))
    out = write_set(tmp_path / "split", newer, split=True)
    updater.load(runtime.open(out, ep_rank=0, ep_size=2))
    all_same(state(model), newer.expected(0))


def test_updater_refuses_another_geometry(opened: Opened):
    made, model = checkpoint(), TinyMoe(3)
    shard = opened(made)
    updater = shard.updater(model)
    others = [
        opened(made, 1),
        opened(checkpoint(row=(0, 2, 1, 3, 4, 0))),
        opened(checkpoint(dtype=torch.bfloat16)),
        opened(checkpoint(width=8)),
        opened(checkpoint(layers=2)),
        shard.replace([(2, 0, 3, 4, 1, 0)]).shard,
    ]
    before = state(model)
    for other in others:
        with pytest.raises(GeometryMismatch):
            updater.load(other)
    all_same(state(model), before)


def test_updater_compares_ties_again(opened: Opened):
    made, newer = checkpoint(), checkpoint()
    model = TinyMoe(3, head=True)
    model.head.weight = model.model.embed.weight
    made.common["head.weight"] = newer.common["head.weight"] = made.common["model.embed.weight"]
    updater = opened(made).updater(model)
    newer.common["model.embed.weight"] = newer.common["model.embed.weight"] + 1
    with pytest.raises(DoesNotFit):
        updater.load(opened(newer))


def test_updater_sees_that_the_model_changed(opened: Opened):
    made, model = checkpoint(), TinyMoe(3)
    updater = opened(made).updater(model)
    model.model.embed = nn.Embedding(7, 8)  # another parameter of the same kind is not a change
    updater.load(opened(made))
    model.to(torch.bfloat16)
    updater = opened(made).updater(TinyMoe(3))
    updater.load(opened(made))
    other = TinyMoe(3)
    updater = opened(made).updater(other)
    other.model.embed.weight = nn.Parameter(torch.zeros(7, 9))
    with pytest.raises(DoesNotFit):
        updater.load(opened(made))


def test_a_file_that_went_away(opened: Opened, tmp_path: Path):
    shard = opened(checkpoint())
    for file in tmp_path.rglob("rank-00000*.safetensors"):
        file.unlink()
    with pytest.raises(IoFailed):
        shard.load_into(TinyMoe(3))


def test_a_file_replaced_after_open(opened: Opened, tmp_path: Path):
    shard = opened(checkpoint())
    (file,) = tmp_path.rglob("rank-00000*.safetensors")
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(SourceChanged):
        shard.load_into(TinyMoe(3))


# --- a new placement ---------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [0, 1])
def test_replace_writes_only_the_changed_slots(opened: Opened, rank: int):
    new = {STACK: (2, 0, 4, 1, 3, 0)}
    made, model = checkpoint(), TinyMoe(3, head=True)
    shard = opened(made, rank)
    names = {"model": "m", "m": "model"}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(-1)
    moves = shard.replace(new)
    report = moves.load_into(model)
    changed = {slot for slot, _ in moves.changed[STACK]}
    experts, expected = model.model.layers[0].mlp.experts, made.expected(rank, new)
    for slot in range(3):
        whole = expected[f"{STACK}.gate_up_proj"][slot]
        found = experts.gate_up_proj[slot].detach()
        assert same(found, whole if slot in changed else torch.full_like(whole, -1))
    assert report.tensors == 3
    assert report.bytes_read == len(changed) * (8 * 8 + 8 * 4 + 1) * 4
    assert (model.model.embed.weight == -1).all()
    model.m = model.model
    del model.model
    moves.load_into(model, rename={"model": names["model"]})
    with pytest.raises(DoesNotFit):
        moves.load_into(nn.Linear(2, 2))


def test_replace_after_a_load(opened: Opened):
    made, model = checkpoint(layers=2, per_expert=False), TinyMoe(3, layers=2)
    shard = opened(made)
    shard.load_into(model)
    rows = [(2, 0, 4, 1, 3, 0), (0, 2, 1, 3, 4, 4)]
    first = shard.replace(rows)
    first.load_into(model)
    expected = made.expected(0, dict(zip(made.rows, rows, strict=True)))
    all_same(state(model), expected)
    back = first.shard.replace(shard.placement)
    back.load_into(model)
    all_same(state(model), made.expected(0))
    first.shard.load_into(model)
    all_same(state(model), expected)


def test_replace_with_nothing_changed_reads_nothing(opened: Opened):
    shard = opened(checkpoint())
    moves = shard.replace(shard.placement)
    assert (moves.changed, moves.load()) == ({}, {})
    assert moves.load_into(TinyMoe(3)).bytes_read == 0


def test_replace_refuses_meta(opened: Opened):
    moves = opened(checkpoint()).replace([(2, 0, 4, 1, 3, 0)])
    with pytest.raises(DoesNotFit):
        moves.load_into(on_meta(TinyMoe(3)))
