"""Into one model again and again: newer sets of the same geometry, then other placements."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from moeconv import runtime
from moeconv.errors import DoesNotFit, GeometryMismatch, IoFailed, MissingShard, SourceChanged
from tests.runtime.conftest import Opened
from tests.runtime.handmade import STACK, Made, all_same, checkpoint, same, write_set
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

    monkeypatch.setattr("moeconv.runtime.shard.bind", never)
    monkeypatch.setattr("moeconv.runtime.bind._renamed", never)
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


def swapped(made: Made) -> Made:
    made.experts[f"{STACK}.gate_up_proj"].projections = ("up", "gate")
    return made


def interleaved(made: Made) -> Made:
    made.experts[f"{STACK}.gate_up_proj"].axes = "E (O G) K"
    return made


@pytest.mark.parametrize("change", [swapped, interleaved])
def test_updater_refuses_the_same_shapes_of_another_meaning(
    opened: Opened, change: Callable[[Made], Made]
):
    made, model = checkpoint(), TinyMoe(3)
    updater = opened(made).updater(model)
    updater.load(opened(made))
    with pytest.raises(GeometryMismatch):
        updater.load(opened(change(checkpoint(start=1000))))
    all_same(state(model), made.expected(0))


def test_updater_after_another_parameter_or_module_of_the_same_kind(opened: Opened):
    made, model = checkpoint(), TinyMoe(3)
    updater = opened(made).updater(model)
    model.model.embed.weight = nn.Parameter(torch.zeros(7, 8))
    updater.load(opened(made))
    all_same(state(model), made.expected(0))
    model.model.embed = nn.Embedding(7, 8)
    with pytest.raises(DoesNotFit):  # else it would fill the module that nobody uses any more
        updater.load(opened(made))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(7, 9),
        torch.zeros(7, 8, dtype=torch.bfloat16),
        torch.zeros(8, 7).t(),
        torch.zeros(1, 8).expand(7, 8),
    ],
    ids=["shape", "dtype", "order", "expanded"],
)
def test_updater_sees_that_the_model_changed(opened: Opened, value: torch.Tensor):
    made, model = checkpoint(), TinyMoe(3)
    updater = opened(made).updater(model)
    updater.load(opened(made))
    model.model.layers[0].mlp.gate.weight.data.zero_()
    model.model.embed.weight = nn.Parameter(value)
    with pytest.raises(DoesNotFit, match="has changed"):
        updater.load(opened(checkpoint(start=50)))
    assert not value.any()
    expected = made.expected(0) | {
        "model.embed.weight": value,
        "model.layers.0.mlp.gate.weight": torch.zeros(5, 8),
    }
    all_same(state(model), expected)


@pytest.mark.parametrize("where", [0, -1])
def test_ties_are_compared_to_their_end_and_counted(
    opened: Opened, where: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("moeconv.runtime.updater.BLOCK_BYTES", 100)
    made, model = checkpoint(), TinyMoe(3)
    model.again = nn.Module()
    model.again.down = model.model.layers[0].mlp.experts.down_proj
    fused = made.experts[f"{STACK}.down_proj"]
    made.experts["again.down"] = replace(fused, component="other")
    report = opened(made).load_into(model)
    once = sum(t.nbytes for n, t in made.expected(0).items() if n != "again.down")
    assert report.bytes_read == once + 2 * made.expected(0)["again.down"].nbytes
    value = fused.value.clone()
    value[1].view(-1)[where] += 1  # expert 1 has this rank's last slot
    made.experts["again.down"] = replace(fused, component="other", value=value)
    with pytest.raises(DoesNotFit, match="bytes differ"):
        opened(made).load_into(model)


def test_a_file_that_has_disappeared(opened: Opened, tmp_path: Path):
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
    made, model = checkpoint(), TinyMoe(3)
    shard = opened(made, rank)
    names = {"model": "m", "m": "model"}
    shard.load_into(model)
    model.head = nn.Linear(8, 7, bias=False)  # the model may have more than the set
    for p in model.parameters():
        p.data.fill_(-1)  # not seen by autograd, so that only what is written shows
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
    assert moves.load_into(model, rename={"model": names["model"]}).bytes_read == 0
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


def test_chained_placements_open_each_file_once(tmp_path: Path):
    out = write_set(tmp_path / "set", checkpoint(row=(0, 1, 2, 3, 4, 0), ep=3))
    shard = runtime.open(out, ep_rank=0, ep_size=3)
    for row in [(4, 0, 2, 3, 1, 0), (0, 4, 2, 3, 1, 0)] * 3:
        shard = shard.replace([row]).shard
    names = [file.name for file in shard.files.values()]
    assert len(names) == len(set(names)) == 3


def test_another_replica_where_one_is_missing(tmp_path: Path):
    made = checkpoint(row=(0, 1, 2, 3, 2, 4), ep=3)  # expert 2 is on ranks 1 and 2
    out, new = write_set(tmp_path / "set", made), {STACK: (0, 2, 1, 3, 2, 4)}
    next(out.glob("rank-00001*.safetensors")).unlink()
    shard = runtime.open(out, ep_rank=0, ep_size=3)
    all_same(shard.replace(new).shard.load(), made.expected(0, new))
    next(out.glob("rank-00002*.safetensors")).unlink()
    with pytest.raises(MissingShard):
        shard.replace(new)


def test_replace_with_nothing_changed_reads_nothing(opened: Opened):
    shard = opened(checkpoint())
    moves = shard.replace(shard.placement)
    assert (moves.changed, moves.load()) == ({}, {})
    model = TinyMoe(3)
    shard.load_into(model)
    assert moves.load_into(model).bytes_read == 0


def test_replace_refuses_meta(opened: Opened):
    moves = opened(checkpoint()).replace([(2, 0, 4, 1, 3, 0)])
    with pytest.raises(DoesNotFit):
        moves.load_into(on_meta(TinyMoe(3)))
