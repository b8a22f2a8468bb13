"""Into a model: strict, all problems at once and before the first byte, ties, meta, casts."""

import pytest
import torch
from torch import nn

import moeconv.runtime
from moeconv.errors import DoesNotFit
from tests.runtime.conftest import Opened
from tests.runtime.handmade import (
    STACK,
    Made,
    all_same,
    checkpoint,
    numbers,
    same,
)
from tests.runtime.models import TinyMoe, on_meta, state


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
        "in 4 places",
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
    assert "not in the output (1): `model.embed.weight`" in refusal(
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


def test_rename_takes_whole_names_and_may_drop_them(opened: Opened):
    made = Made({}, {}, {"model.a.weight": numbers(2, 2), "model.ab": numbers(3)}, 1)
    inner = nn.Module()
    inner.a, inner.c = nn.Linear(2, 2, bias=False), nn.Parameter(torch.zeros(3))
    opened(made).load_into(inner, rename={"model": "", "model.ab": "c"})
    assert same(inner.c.detach(), numbers(3))
    assert "two names become one" in refusal(opened(made), inner, rename=lambda _: "c")


def test_cast_is_reported(opened: Opened):
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
    monkeypatch.setattr("moeconv.runtime.write_tensors.BLOCK_BYTES", 100)
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
