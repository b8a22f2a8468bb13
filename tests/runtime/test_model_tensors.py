"""What of a model cannot be filled is said before the first byte; what can be is filled right."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.two_tensor import TwoTensor

from moeconv.errors import DoesNotFit, UsageProblem
from tests.runtime.conftest import Opened
from tests.runtime.handmade import STACK, Made, all_same, checkpoint, numbers, same
from tests.runtime.models import TinyMoe, on_meta, state


def of(**values: torch.Tensor) -> Made:
    """A set of these tensors only."""
    return Made({}, {}, values, 1)


def module(**tensors: torch.Tensor) -> nn.Module:
    """A module with these parameters, after one that would be written first."""
    made = nn.Module()
    made.a0 = nn.Parameter(torch.zeros(3))
    for name, value in tensors.items():
        made.register_parameter(
            name, value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        )
    return made


def refused(opened: Opened, model: nn.Module, *, cast: bool = False, **values: torch.Tensor) -> str:
    with pytest.raises(DoesNotFit) as caught:
        opened(of(a0=numbers(3, start=1), **values)).load_into(model, cast=cast)
    assert not model.a0.any()
    return str(caught.value)


# --- one memory under several names ------------------------------------------------------------
def pair(first: torch.Tensor, second: torch.Tensor) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    values = {n: numbers(*t.shape, start=50) for n, t in (("x", first), ("y", second))}
    return module(x=first, y=second), values


W = torch.zeros(4, 4)
FLAT = torch.zeros(12)


@pytest.mark.parametrize(
    "views",
    [(W, W.t()), (W.view(16), W), (FLAT[:8], FLAT[4:]), (W, W[1]), (W[:, :2], W[:, 2:])],
    ids=["transposed", "flat", "overlapping", "row", "columns"],
)
def test_different_views_of_one_memory(opened: Opened, views: tuple[torch.Tensor, torch.Tensor]):
    model, values = pair(*views)
    assert "`x` and `y`" in refused(opened, model, **values)
    assert not W.any()
    assert not FLAT.any()


def test_disjoint_and_identical_views(opened: Opened):
    flat = torch.zeros(12)
    model = module(x=flat[:8], y=flat[8:], z=flat[:8])
    x, y = numbers(8), numbers(4, start=50)
    report = opened(of(a0=numbers(3), x=x, y=y)).load_into(model)
    assert same(flat, torch.cat([x, y]))
    assert report.tied == ("z",)


@pytest.mark.parametrize(
    "value", [torch.zeros(8).as_strided((3, 4), (2, 1)), torch.zeros(1, 4).expand(3, 4)]
)
def test_a_parameter_that_overlaps_itself(opened: Opened, value: torch.Tensor):
    assert "`x` overlaps itself" in refused(opened, module(x=value), x=numbers(3, 4))


# --- no plain memory ---------------------------------------------------------------------------
def fake() -> torch.Tensor:
    with FakeTensorMode():
        return nn.Parameter(torch.zeros(4))


class Own(nn.Parameter):
    """As inference engines have it, with attributes of its own."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TwoTensor(torch.zeros(4), torch.zeros(4)), "TwoTensor"),
        (fake, "FakeTensor"),
        (lambda: torch.zeros(4).to_sparse(), "sparse"),
        (nn.parameter.UninitializedParameter, "not initialised"),
        (lambda: Own(torch.empty(4, device="meta")), "class Own"),
    ],
)
def test_no_plain_memory(opened: Opened, make: Callable[[], torch.Tensor], reason: str):
    text = refused(opened, module(x=make()), x=numbers(4))
    assert "no plain memory (1): `x`" in text
    assert reason in text


def test_two_wrappers_are_not_one(opened: Opened):
    model = module(x=TwoTensor(W, W), y=TwoTensor(FLAT, FLAT))
    assert "no plain memory (2)" in refused(opened, model, x=numbers(4, 4), y=numbers(12))


def test_inference_mode(opened: Opened):
    with torch.inference_mode():
        model = module(x=torch.zeros(4, dtype=torch.float64))
        plain = module(x=torch.zeros(4))
    assert "inference mode" in refused(opened, model, cast=True, x=numbers(4))
    opened(of(a0=numbers(3), x=numbers(4))).load_into(plain)
    assert same(plain.x.data, numbers(4))


def test_conjugate_and_negative_views(opened: Opened):
    value = torch.complex(numbers(3), numbers(3, start=1))
    model = module(x=torch.zeros(3, dtype=torch.complex64).conj())
    opened(of(a0=numbers(3), x=value)).load_into(model)
    assert same(model.x.data.resolve_conj(), value)
    model = module(x=torch._neg_view(torch.zeros(3)))
    opened(of(a0=numbers(3), x=numbers(3))).load_into(model)
    assert same(model.x.data.resolve_neg(), numbers(3))


# --- options -----------------------------------------------------------------------------------
def test_options_of_the_wrong_kind(opened: Opened):
    shard = opened(checkpoint())
    for options in (
        {"ignore": "mtp.*"},
        {"device": "meta"},
        {"rename": lambda _: None},
    ):
        model = on_meta(TinyMoe(3))
        with pytest.raises(UsageProblem):
            shard.load_into(model, **options)
        assert all(p.is_meta for p in model.parameters())


# --- meta, wrappers, report --------------------------------------------------------------------
def test_meta_keeps_strides_and_modules_that_note_parameters(opened: Opened):
    model = nn.Conv2d(4, 4, 3, bias=False).to(memory_format=torch.channels_last)
    values, strides = state(model), model.weight.stride()
    opened(Made({}, {}, {"weight": values["weight"].contiguous()}, 1)).load_into(on_meta(model))
    assert model.weight.stride() == strides
    assert same(model.weight.data, values["weight"])
    lstm = nn.LSTM(4, 4)
    found = lstm(torch.ones(2, 1, 4))[0].detach()
    opened(Made({}, {}, state(lstm), 1)).load_into(on_meta(lstm))
    assert same(lstm(torch.ones(2, 1, 4))[0].detach(), found)


def test_names_without_wrappers(opened: Opened):
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 3)), nn.Linear(3, 2))
    model[1] = torch.compile(model[1])
    made = Made({}, {}, {}, 1)
    for n, shape in enumerate(((3, 2), (2, 3))):
        made.common |= {f"{n}.weight": numbers(*shape), f"{n}.bias": numbers(shape[0])}
    assert opened(made).load_into(model).tensors == 4


def test_casts_and_matching_are_reported(opened: Opened, monkeypatch: pytest.MonkeyPatch):
    import time

    from moeconv.runtime import shard

    real = shard.bind
    monkeypatch.setattr(shard, "bind", lambda *a, **k: (time.sleep(0.2), real(*a, **k))[1])
    made, model = checkpoint(), TinyMoe(3)
    model.model.embed.double()
    report = opened(made).load_into(model, cast=True)
    assert report.cast == ("model.embed.weight",)
    assert report.seconds >= 0.2


def test_rebalancing_refuses_to_ignore_what_changes(opened: Opened):
    made, model = checkpoint(), TinyMoe(3)
    shard = opened(made)
    shard.load_into(model)
    moves = shard.replace({STACK: (2, 0, 4, 1, 3, 0)})
    with pytest.raises(DoesNotFit, match="ignored, but its slots change"):
        moves.load_into(model, ignore=["*down*"])
    all_same(state(model), made.expected(0))
