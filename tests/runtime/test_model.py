"""Into a model: strict, all problems at once and before the first byte, ties, meta, casts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import moeconv.runtime
from moeconv.errors import DoesNotFit, GeometryMismatch, IoFailed, SourceChanged
from tests.runtime.handmade import (
    STACK,
    Made,
    all_same,
    checkpoint,
    numbers,
    same,
    write_set,
)
from tests.runtime.models import TinyMoe

Opened = Callable[..., moeconv.runtime.Shard]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """A rank of a set made for the occasion."""

    def make(made: Made, rank: int = 0) -> moeconv.runtime.Shard:
        number = len(list(tmp_path.iterdir()))
        out = write_set(tmp_path / f"set{number}", made)
        return moeconv.runtime.open(out, ep_rank=rank, ep_size=made.ep)

    return make


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, as plain tensors."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def refusal(shard: moeconv.runtime.Shard, model: nn.Module, **options: object) -> str:
    """What load_into says; nothing may have been written or set."""
    held = {n: id(p) for n, p in model.named_parameters()}
    before = {n: t for n, t in state(model).items() if not t.is_meta}
    with pytest.raises(DoesNotFit) as caught:
        shard.load_into(model, **options)
    assert {n: id(p) for n, p in model.named_parameters()} == held
    all_same({n: t for n, t in state(model).items() if not t.is_meta}, before)
    return str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_into_existing_parameters(opened: Opened, rank: int):
    made, model = checkpoint(layers=2), TinyMoe(3, layers=2)
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    versions = {n: p._version for n, p in model.named_parameters()}
    report = opened(made, rank).load_into(model)
    all_same(state(model), made.expected(rank))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
    assert all(p._version > versions[n] for n, p in model.named_parameters())
    assert (report.tensors, report.materialised, report.overread) == (9, 0, ())
    assert report.bytes_read == sum(t.nbytes for t in made.expected(rank).values())
    assert report.files == (
        "common-00001-of-00001.safetensors",
        f"rank-{rank:05d}-of-00002-00001-of-00001.safetensors",
    )
    assert report.seconds > 0
    with pytest.raises(AttributeError):
        report.tensors = 3  # type: ignore[misc]


def test_all_problems_at_once(opened: Opened):
    made, model = checkpoint(), TinyMoe(3, head=True)
    made.common["extra.weight"] = numbers(3)
    model.model.embed = nn.Embedding(6, 8)
    model.model.layers[0].mlp.gate.to(torch.bfloat16)
    text = refusal(opened(made), model)
    for part in (
        "in 4 place(s)",
        "`head.weight`",
        "`extra.weight`",
        "[7, 8], the model has [6, 8]",
        "torch.float32, the model has torch.bfloat16",
    ):
        assert part in text


def test_a_persistent_buffer_must_be_covered_another_not(opened: Opened):
    made = checkpoint()
    del made.experts[f"{STACK}.down_proj_scale"]
    assert f"{STACK}.down_proj_scale" in refusal(opened(made), TinyMoe(3))


def test_ignore(opened: Opened):
    made, model = checkpoint(), TinyMoe(3)
    made.common |= {"mtp.a": numbers(3), "mtp.b": numbers(2)}
    shard = opened(made)
    assert "`mtp.a`; `mtp.b`" in refusal(shard, model)
    report = shard.load_into(model, ignore=["mtp.*", "absent.*"])
    assert set(report.ignored) == {"mtp.a", "mtp.b"}
    assert report.tensors == 5


def test_ignoring_what_the_model_has(opened: Opened):
    assert "not in the set (1): `model.embed.weight`" in refusal(
        opened(checkpoint()), TinyMoe(3), ignore=["model.embed.*"]
    )


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("model.", "language_model.", 1),
        {"model": "language_model"},
        {"model": "wrong", "model.embed": "language_model.embed"}
        | {"model.layers": "language_model.layers"},
        {"": "x", "model": "language_model"},
    ],
)  # fmt: skip
def test_rename(opened: Opened, rename: object):
    made, model = checkpoint(), TinyMoe(3)
    model.language_model = model.model
    del model.model
    assert opened(made).load_into(model, rename=rename).tensors == 5
    embed = model.language_model.embed.weight.detach()
    assert same(embed, made.common["model.embed.weight"])


def test_rename_takes_whole_names_and_may_take_them_away(opened: Opened):
    made = Made({}, {}, {"model.a.weight": numbers(2, 2), "model.ab": numbers(3)}, 1)
    inner = nn.Module()
    inner.a, inner.c = nn.Linear(2, 2, bias=False), nn.Parameter(torch.zeros(3))
    opened(made).load_into(inner, rename={"model": "", "model.ab": "c"})
    assert same(inner.c.detach(), numbers(3))
    assert "two names become one" in refusal(opened(made), inner, rename=lambda _: "c")


def test_cast_is_said(opened: Opened):
    made = checkpoint(dtype=torch.bfloat16)
    shard, model = opened(made), TinyMoe(3)
    assert "another dtype (4)" in refusal(shard, model)
    shard.load_into(model, cast=True)
    for name, value in made.expected(0).items():
        assert same(state(model)[name], value.float()), name


def test_cast_is_for_floats_only(opened: Opened):
    made = Made({}, {}, {"a": numbers(3, dtype=torch.int32)}, 1)
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(3))
    assert "another dtype" in refusal(opened(made), model, cast=True)


def test_casts_in_blocks(opened: Opened, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moeconv.runtime.fill.BLOCK_BYTES", 100)
    made, model = checkpoint(dtype=torch.float16), TinyMoe(3, dtype=torch.float64)
    report = opened(made, 1).load_into(model, cast=True)
    for name, value in made.expected(1).items():
        if "scale" not in name:
            assert same(state(model)[name], value.double()), name
    assert report.bytes_read == sum(t.nbytes for t in made.expected(1).values())


def test_a_parameter_that_is_not_contiguous(opened: Opened):
    made, model = checkpoint(), TinyMoe(3)
    turned = torch.zeros(3, 4, 8).transpose(1, 2)
    model.model.layers[0].mlp.experts.down_proj = nn.Parameter(turned)
    opened(made).load_into(model)
    all_same(state(model), made.expected(0))
    assert same(turned, made.expected(0)[f"{STACK}.down_proj"])


def test_a_scalar(opened: Opened):
    made = Made({}, {}, {"a": torch.tensor(3.0), "b": torch.tensor(4.0, dtype=torch.float16)}, 1)
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    opened(made).load_into(model, cast=True)
    assert (model.a.item(), model.b.item()) == (3.0, 4.0)


# --- ties --------------------------------------------------------------------------------------
def test_a_tied_parameter_is_covered_by_either_name(opened: Opened):
    made, model = checkpoint(), TinyMoe(3, head=True)
    model.head.weight = model.model.embed.weight
    report = opened(made).load_into(model)
    assert report.tied == ("head.weight",)
    made.common["head.weight"] = made.common.pop("model.embed.weight")
    report = opened(made).load_into(model)
    assert report.tied == ("model.embed.weight",)


def test_both_names_with_the_same_bytes(opened: Opened):
    made, model = checkpoint(), TinyMoe(3, head=True)
    model.head.weight = model.model.embed.weight
    made.common["head.weight"] = made.common["model.embed.weight"].clone()
    assert opened(made).load_into(model).tied == ()


def test_both_names_with_different_bytes(opened: Opened):
    made, model = checkpoint(), TinyMoe(3, head=True)
    model.head.weight = model.model.embed.weight
    made.common["head.weight"] = made.common["model.embed.weight"] + 1
    text = refusal(opened(made), model)
    assert "`model.embed.weight` and `head.weight`" in text


def test_ties_are_compared_by_bytes_where_there_is_no_digest(opened: Opened):
    made, model = checkpoint(), TinyMoe(3)
    experts = model.model.layers[0].mlp.experts
    model.again = nn.Module()
    model.again.down_proj = experts.down_proj
    fused = made.experts[f"{STACK}.down_proj"]
    from dataclasses import replace

    made.experts["again.down_proj"] = replace(fused, component="other")
    assert opened(made).load_into(model).tensors == 5
    made.experts["again.down_proj"] = replace(fused, component="other", value=fused.value + 1)
    assert "bytes differ" in refusal(opened(made), model)


class Tying(TinyMoe):
    """As transformers' models: ties on demand."""

    def tie_weights(self) -> None:
        """The head is the embedding."""
        self.head.weight = self.model.embed.weight


def test_two_parameters_that_should_be_tied(opened: Opened):
    made, model = checkpoint(), Tying(3, head=True)
    text = refusal(opened(made), model)
    assert "`head.weight`; call `model.tie_weights()` first" in text
    model.tie_weights()
    assert opened(made).load_into(model).tied == ("head.weight",)


# --- meta --------------------------------------------------------------------------------------
def on_meta(model: nn.Module) -> nn.Module:
    """Parameters on meta, ties kept, buffers real."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            new = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
            module._parameters[name] = moved.setdefault(id(p), new)
    return model


def test_meta_parameters_get_memory(opened: Opened):
    made, model = checkpoint(), TinyMoe(3, head=True)
    model.head.weight = model.model.embed.weight
    model.model.layers[0].mlp.gate.weight.requires_grad_(requires_grad=False)
    model.model.embed.weight.mark = "kept"
    on_meta(model)
    model.model.embed.weight.mark = "kept"
    report = opened(made).load_into(model)
    assert report.materialised == 4
    assert model.head.weight is model.model.embed.weight
    assert model.head.weight.mark == "kept"
    assert not model.model.layers[0].mlp.gate.weight.requires_grad
    assert model.model.embed.weight.requires_grad
    expected = made.expected(0) | {"head.weight": made.common["model.embed.weight"]}
    all_same(state(model), expected)
    assert same(model.inv_freq, torch.full((4,), 0.5))
    model(torch.tensor([1, 2])).sum().backward()
    assert model.model.embed.weight.grad is not None


def test_accelerates_empty_weights(opened: Opened):
    from accelerate import init_empty_weights

    made = checkpoint()
    with init_empty_weights(include_buffers=False):
        model = TinyMoe(3)
    assert opened(made).load_into(model).materialised == 4
    all_same(state(model), made.expected(0))


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_on_meta_is_refused(opened: Opened, persistent: bool):
    model = TinyMoe(3)
    if persistent:
        experts = model.model.layers[0].mlp.experts
        experts.down_proj_scale = experts.down_proj_scale.to("meta")
    else:
        model.inv_freq = model.inv_freq.to("meta")
    assert "buffers on meta (1)" in refusal(opened(checkpoint()), on_meta(model))
    assert "inv_freq" in moeconv.runtime.Shard.load_into.__doc__


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
    monkeypatch.setattr("moeconv.runtime.fill.blocks", never)
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
    updater.load(moeconv.runtime.open(out, ep_rank=0, ep_size=2))
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
