"""Loading tensors: every slot right, views that never reach the file, every dtype, new slots."""

import os
from pathlib import Path

import pytest
import torch

import moeconv.runtime
from moeconv.errors import MissingShard, NoTorchDtype, SourceChanged, UsageProblem
from moeconv.manifest.model import Run, TensorEntry
from moeconv.runtime import write_tensors
from moeconv.runtime.byte_runs import LocalTensor, join_runs, run_chunks, slice_runs
from moeconv.runtime.write_tensors import load_tensors
from tests.runtime.handmade import (
    _NAMES,
    STACK,
    Made,
    all_same,
    checkpoint,
    numbers,
    raw,
    same,
    write_set,
    write_virtual,
)

ROWS = {
    1: (2, 0, 1, 3, 4),
    2: (2, 0, 1, 3, 4, 0),
    3: (4, 3, 2, 1, 0, 4),
    5: (1, 0, 3, 2, 4),
    8: (0, 1, 2, 3, 4, 0, 1, 2),
}


@pytest.mark.parametrize("ep", ROWS)
@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_every_rank(tmp_path: Path, ep: int, per_expert: bool, split: bool):
    made = checkpoint(row=ROWS[ep], ep=ep, per_expert=per_expert, layers=2)
    out = write_set(tmp_path / "set", made, split=split)
    for rank in range(ep):
        shard = moeconv.runtime.open(out, ep_rank=rank, ep_size=ep)
        all_same(shard.load(), made.expected(rank))
        assert set(shard.names) == set(made.expected(rank))


@pytest.mark.parametrize("per_expert", [False, True])
def test_global_tensors(tmp_path: Path, per_expert: bool):
    out = write_set(tmp_path / "set", checkpoint(per_expert=per_expert))
    found = moeconv.runtime.open(out, ep_rank=1, ep_size=2).global_tensors()
    if per_expert:
        assert {n: v.item() for n, v in found.items()} == {
            f"{STACK}.{e}.down.scale": float(e) for e in range(5)
        }
    else:
        all_same(found, {f"{STACK}.down_proj_scale": numbers(5)})


def test_a_value_that_all_experts_share(tmp_path: Path):
    made = checkpoint()
    made.experts[f"{STACK}.input_scale"] = shared = made.experts[f"{STACK}.down_proj_scale"]
    del made.experts[f"{STACK}.down_proj_scale"]
    shared.axes, shared.component, shared.everyone = "1", "input_scale", True
    shared.value = torch.tensor([0.5])
    out = write_set(tmp_path / "set", made)
    found = moeconv.runtime.open(out, ep_rank=1, ep_size=2)
    assert same(found.load()[f"{STACK}.input_scale"], shared.value)
    assert same(found.global_tensors()[f"{STACK}.input_scale"], shared.value)


def test_some_names(tmp_path: Path):
    made = checkpoint()
    shard = moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=0, ep_size=2)
    name = f"{STACK}.down_proj"
    all_same(shard.load(names=[name]), {name: made.expected(0)[name]})
    for unknown in (["no.such"], name):
        with pytest.raises(UsageProblem):
            shard.load(names=unknown)


# --- views -------------------------------------------------------------------------------------
def test_writing_to_a_view_never_reaches_the_file(tmp_path: Path):
    made = checkpoint()
    out = write_set(tmp_path / "set", made)
    for file in out.glob("*.safetensors"):
        file.chmod(0o444)
    before = {p: p.read_bytes() for p in out.glob("*.safetensors")}
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=2)
    for value in shard.load().values():
        value.fill_(77)
    assert {p: p.read_bytes() for p in before} == before
    all_same(shard.load(), made.expected(0))


def test_views_share_one_mapping_and_no_memory_is_taken(tmp_path: Path):
    made = checkpoint()
    shard = moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=0, ep_size=2)
    loaded = shard.load()
    bases = {
        name: value.untyped_storage().data_ptr()
        for name, value in loaded.items()
        if name.endswith("_proj")
    }
    assert len(set(bases.values())) == 1  # the rank's file
    for name in (f"{STACK}.down_proj_scale", "model.layers.0.mlp.gate.weight"):
        copied = loaded[name]  # gathered; not at a multiple of 16 bytes
        assert copied.untyped_storage().nbytes() == copied.numel() * 4


def test_copies_outlive_their_files(tmp_path: Path):
    """Views of a file that is cut end the process; what was asked for as a copy is read."""
    made, new = checkpoint(), {STACK: NEW}
    out = write_set(tmp_path / "set", made)
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=2)
    tensors, scales = shard.load(copy=True), shard.global_tensors(copy=True)
    moved = shard.replace(new).load(copy=True)
    several = [*tensors.values(), *scales.values(), *(value for _, value in moved.values())]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in several)  # nothing is mapped
    for file in out.glob("*.safetensors"):
        os.truncate(file, 0)
    all_same(tensors, made.expected(0))
    all_same(scales, {f"{STACK}.down_proj_scale": numbers(5)})
    expected = made.expected(0, new)
    for name, (slots, value) in moved.items():
        assert same(value, expected[name][list(slots)])


def test_a_misaligned_run_is_copied(tmp_path: Path):
    made = checkpoint()
    out = write_virtual(tmp_path / "set", tmp_path / "source", made, shift=3)
    # the pad sorts last, so put the file itself out of step
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=2)
    all_same(shard.load(), made.expected(0))
    for at in (4097, 4104):
        odd = LocalTensor(TensorEntry("x", "F32", (2,), at, at + 8, ()), (Run(0, at, 8),))
        value = load_tensors([odd], shard.files, None)["x"]
        assert raw(value) == (tmp_path / "source/model.safetensors").read_bytes()[at : at + 8]
        assert not value.data_ptr() % 16


def test_a_file_replaced_after_open(tmp_path: Path):
    out = write_set(tmp_path / "set", checkpoint())
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=2)
    file = out / "common-00001-of-00001.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-4] + b"zzzz")
    with pytest.raises(SourceChanged):
        shard.load()
    with pytest.raises(SourceChanged):
        shard.global_tensors()


@pytest.mark.parametrize("dtype", _NAMES)
def test_dtypes(tmp_path: Path, dtype: torch.dtype):
    data = numbers(3 * 2 * 4 * dtype.itemsize).to(torch.uint8)
    if dtype == torch.bool:
        data %= 2
    value = data.view(dtype).view(3, 2, 4)
    made = Made({}, {}, {"x": value, "empty": value[:0].clone()}, 1)
    shard = moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=0, ep_size=1)
    all_same(shard.load(), made.common)


def test_a_scalar(tmp_path: Path):
    made = Made({}, {}, {"x": torch.tensor(3.0)}, 1)
    shard = moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=0, ep_size=1)
    all_same(shard.load(), made.common)


@pytest.mark.parametrize(("dtype", "shape"), [("F6_E2M3", (4,)), ("F6_E3M2", (4,)), ("F4", (2, 3))])
def test_dtypes_that_torch_lacks(dtype: str, shape: tuple[int, ...]):
    with pytest.raises(NoTorchDtype) as caught:
        _ = LocalTensor(TensorEntry("x", dtype, shape, 0, 0, ()), ()).torch_dtype
    assert caught.value.exit_code == 5


# --- runs --------------------------------------------------------------------------------------
def test_runs_are_joined_and_cut():
    runs = join_runs([Run(0, 0, 4), Run(0, 4, 4), Run(1, 8, 0), Run(1, 8, 8), Run(0, 16, 8)])
    assert runs == (Run(0, 0, 8), Run(1, 8, 8), Run(0, 16, 8))
    assert slice_runs(runs, [(6, 18)]) == (Run(0, 6, 2), Run(1, 8, 8), Run(0, 16, 2))
    assert slice_runs(runs, [(20, 24), (0, 0), (2, 4), (4, 6)]) == (Run(0, 20, 4), Run(0, 2, 4))
    assert list(run_chunks(runs, 10)) == [
        (0, (Run(0, 0, 8), Run(1, 8, 2))),
        (10, (Run(1, 10, 6), Run(0, 16, 4))),
        (20, (Run(0, 20, 4),)),
    ]


# --- another device ----------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moeconv.runtime.write_tensors.RING_BYTES", 256)
    made = checkpoint(layers=3)
    shard = moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=1, ep_size=2)
    loaded = shard.load(device="cuda")
    assert all(v.is_cuda for v in loaded.values())
    all_same({n: v.cpu() for n, v in loaded.items()}, made.expected(1))


class FakeStream:
    """Copies are only done when somebody waits for them: a buffer used too early is seen."""

    def __init__(self, *_: object) -> None:
        self.pending: list[FakeEvent] = []

    def wait_stream(self, other: object) -> None:
        """Note what is waited for."""
        WAITED.append(other)

    def synchronize(self) -> None:
        for event in self.pending:
            event.synchronize()


class FakeEvent:
    """An event after one copy."""

    def record(self, stream: FakeStream) -> None:
        self.copies, LATE[:] = list(LATE), []
        stream.pending.append(self)

    def synchronize(self) -> None:
        for into, source in self.copies:
            into.set_(into.untyped_storage(), into.storage_offset(), into.shape)
            torch.Tensor.copy_(into, source)
        self.copies = []


LATE: list[tuple[torch.Tensor, torch.Tensor]] = []
WAITED: list[object] = []


class Slow(torch.Tensor):
    """Memory whose copies are late, as those of a stream are."""

    def copy_(self, source: torch.Tensor, *, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking
        LATE.append((self.as_subclass(torch.Tensor), source))
        return self


def test_the_ring_waits_before_it_uses_a_buffer_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from contextlib import nullcontext

    from moeconv.runtime.files import Reader

    WAITED.clear()
    monkeypatch.setattr(write_tensors, "RING_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("current of", device))
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k) if pin_memory else None
    )
    made = checkpoint()
    shard = moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=0, ep_size=2)
    tensor = shard.tensors[f"{STACK}.gate_up_proj"]
    into = numbers(tensor.nbytes, dtype=torch.uint8).zero_().as_subclass(Slow)
    ring = write_tensors.PinnedRing(torch.device("cpu"))
    with Reader(shard.files) as reader:
        reader.open(tensor.runs)
        ring.copy(into, tensor.runs, reader)
        # memory that the caller's stream has just made may still be in use there
        assert [("current of", torch.device("cpu"))] == WAITED
        expected = raw(made.expected(0)[tensor.name])
        assert into.as_subclass(torch.Tensor).numpy().tobytes() != expected
        ring.finish()
    assert into.as_subclass(torch.Tensor).numpy().tobytes() == expected


def test_a_filler_waits_for_its_rings_each_time():
    from moeconv.runtime.write_tensors import TensorWriter

    done: list[int] = []

    class Ring:
        def finish(self) -> None:
            done.append(len(done))

    filler = TensorWriter()
    filler._rings[torch.device("cpu")] = Ring()  # type: ignore[assignment]
    for _ in range(2):
        with filler:
            pass
    with pytest.raises(KeyError), filler:
        raise KeyError
    assert done == [0, 1, 2]


def test_meta_holds_no_bytes(tmp_path: Path):
    shard = moeconv.runtime.open(write_set(tmp_path / "set", checkpoint()), ep_rank=0, ep_size=2)
    with pytest.raises(UsageProblem):
        shard.load(device="meta")


def test_a_device_that_is_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from moeconv.runtime.files import Reader

    monkeypatch.setattr(write_tensors, "BLOCK_BYTES", 10)
    made = checkpoint()
    shard = moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=0, ep_size=2)
    tensor = shard.tensors[f"{STACK}.gate_up_proj"]
    flat = torch.zeros(tensor.nbytes, dtype=torch.uint8)
    with Reader(shard.files) as reader, write_tensors.TensorWriter() as filler:
        reader.open(tensor.runs)
        filler.buffered(flat, tensor.runs, reader)
    assert raw(flat) == raw(made.expected(0)[tensor.name])


# --- a new placement ---------------------------------------------------------------------------
NEW = (2, 0, 4, 1, 3, 0)


@pytest.mark.parametrize("kind", ["fused", "per-expert", "virtual"])
def test_replace(tmp_path: Path, kind: str):
    made = checkpoint(per_expert=kind == "per-expert")
    if kind == "virtual":
        out = write_virtual(tmp_path / "set", tmp_path / "source", made)
    else:
        out = write_set(tmp_path / "set", made, split=True)
    for rank in range(2):
        shard = moeconv.runtime.open(out, ep_rank=rank, ep_size=2)
        old = made.expected(rank)
        moves = shard.replace({STACK: NEW})
        mine = NEW[rank * 3 : rank * 3 + 3]
        assert moves.changed == {STACK: [((2, 4),), ((0, 1), (1, 3))][rank]}
        assert moves.shard.logical_experts(STACK) == mine
        new = made.expected(rank, {STACK: NEW})
        all_same(moves.shard.load(), new)
        all_same(shard.load(), old)
        for name, (slots, value) in moves.load().items():
            if kind == "per-expert":
                assert same(value, new[name])
                assert f".{slots[0]}." in name
            else:
                assert same(value, new[name][list(slots)])
        touched = {n for n in new if not same(new[n], old[n])}
        assert touched <= set(moves.load())
        again = moves.shard.replace([made.rows[STACK]])
        all_same(again.shard.load(), old)
        assert again.changed.keys() == {STACK}
        assert again.shard.replace([made.rows[STACK]]).changed == {}


def test_replace_reads_other_ranks_only_on_demand(tmp_path: Path):
    made = checkpoint(row=(0, 1, 2, 3, 4, 0), ep=3)
    out = write_set(tmp_path / "set", made)
    for gone in ("rank-00001-of-00003-00001-of-00001.safetensors",):
        (out / gone).unlink()
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=3)
    swapped = shard.replace([(1, 0, 2, 3, 4, 0)])  # all that is needed is at home
    all_same(swapped.shard.load(), made.expected(0, {STACK: (1, 0, 2, 3, 4, 0)}))
    fetched = shard.replace([(4, 0, 2, 3, 1, 0)])
    all_same(fetched.shard.load(), made.expected(0, {STACK: (4, 0, 2, 3, 1, 0)}))
    with pytest.raises(MissingShard) as caught:
        shard.replace([(2, 0, 1, 3, 4, 0)])
    assert gone in str(caught.value)


def test_replace_says_what_cannot_be(tmp_path: Path):
    from moeconv.errors import BadPlacement, GeometryMismatch

    shard = moeconv.runtime.open(write_set(tmp_path / "set", checkpoint()), ep_rank=0, ep_size=2)
    for rows, kind in (
        ([(0, 1, 2, 3)], GeometryMismatch),
        ([(0, 1, 2, 3, 4, 9)], BadPlacement),
        ([(0, 1, 2, 3, 3, 0)], BadPlacement),
        ({"no.such": (0,)}, BadPlacement),
    ):
        with pytest.raises(kind):
            shard.replace(rows)
