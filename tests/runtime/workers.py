"""What the processes of the distributed tests do: `python -m tests.runtime.workers RANK DIR`.

All scenarios run in one start of four processes, since starting them is what takes time. A
process writes the scenarios that it came through; an error ends it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import moeconv.runtime
from moeconv.errors import DoesNotFit
from moeconv.runtime import ep_rank_of
from tests.runtime.handmade import STACK, Made, checkpoint, numbers, same, write_set
from tests.runtime.models import TinyMoe, on_meta

WORLD = 4
COLLECTIVES = [
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "irecv",
    "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
    "scatter_object_list", "send",
]  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes the operators that communicate."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Note and go on."""
        if "c10d" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def silence() -> Iterator[list[str]]:
    """Yield what was said to others meanwhile: operators, calls, sequence numbers of groups."""
    said: list[str] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def noted(name: str) -> object:
        def call(*args: object, **options: object) -> object:
            said.append(name)
            return real[name](*args, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, noted(name))
    groups = list(dist.distributed_c10d._world.pg_map)
    before = [g._get_sequence_number_for_group() for g in groups]
    try:
        with Watch() as watch:
            yield said
        said += watch.seen
        after = [g._get_sequence_number_for_group() for g in groups]
        said += [] if after == before else [f"sequence numbers {before} {after}"]
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def local_bytes(model: nn.Module) -> int:
    """This process's bytes of all that a set fills."""
    tensors = dict(model.state_dict()).values()
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def sharded(mesh: DeviceMesh, rest: DeviceMesh) -> nn.Module:
    """The model of twinkle: experts Shard(1) on their own mesh, the rest Shard(0)."""
    model = on_meta(TinyMoe(3, head=True, layers=2))
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts, mesh=mesh, shard_placement_fn=lambda _: Shard(1))
    fully_shard(model, mesh=rest)
    return model


def check(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Every parameter, put together again, is that of a full load."""
    found = model.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        tensor = found[name]
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert same(full, value), name


def made_set(directory: Path, name: str, rank: int, **options: object) -> tuple[Path, Made]:
    """The same set for all, written by process 0."""
    made = checkpoint(layers=2, **options)
    made.common["head.weight"] = numbers(7, 8, start=77 + int(options.get("start", 0)))
    for tensor in [*made.common.values(), *(f.value for f in made.experts.values())]:
        tensor.div_(4096)  # small enough for a forward
    if rank == 0:
        write_set(directory / name, made)
    dist.barrier()
    return directory / name, made


# --- scenarios ---------------------------------------------------------------------------------
def the_watch_sees_collectives(rank: int, directory: Path) -> None:
    for act in (
        lambda: dist.all_reduce(torch.ones(1)),
        lambda: dist.distributed_c10d._get_default_group().allreduce([torch.ones(1)]).wait(),
        lambda: torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_reduce(
                torch.ones(1), "sum", dist.distributed_c10d._get_default_group().group_name
            )
        ),
    ):
        with silence() as said:
            act()
        assert said


def ep_and_fsdp(rank: int, directory: Path) -> None:
    """Mesh ep 2 x fsdp 2; everything, forward, backward, again, and a new placement."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "fsdp"))
    world = init_device_mesh("cpu", (WORLD,))
    out, made = made_set(directory, "first", rank)
    newer_out, newer = made_set(directory, "newer", rank, start=4096 * 50)
    ep_rank = ep_rank_of(rank, WORLD, 2, order="twinkle")
    assert ep_rank == mesh.get_local_rank("ep")
    for rest in (mesh["fsdp"], world):
        model = sharded(mesh["fsdp"], rest)
        shard = moeconv.runtime.open(out, ep_rank=ep_rank, ep_size=2)
        with silence() as said:
            updater = shard.updater(model)
            report = updater.load(shard)
        assert not said, said
        assert report.materialised == len(list(model.parameters()))
        assert report.bytes_read == local_bytes(model)
        assert report.overread == ()
        assert not any(f.startswith(f"rank-0000{1 - ep_rank}") for f in report.files)
        expected = made.expected(ep_rank)
        check(model, expected)
        assert model.model.layers[0].mlp.experts.gate_up_proj.to_local().shape == (3, 4, 8)
        plain = TinyMoe(3, head=True, layers=2)
        shard.load_into(plain)
        ids = torch.tensor([1, 2, 6])
        assert torch.allclose(model(ids), plain(ids), rtol=1e-5)
        model(ids).sum().backward()
        plain(ids).sum().backward()
        grad = model.model.layers[1].mlp.experts.down_proj.grad
        assert torch.allclose(
            grad.full_tensor(), plain.model.layers[1].mlp.experts.down_proj.grad, rtol=1e-4
        )
        model.model.layers[0].mlp.experts.unshard()
        with pytest.raises(DoesNotFit) as caught:
            shard.load_into(model)
        assert "call its `reshard()`" in str(caught.value)
        with pytest.raises(DoesNotFit):
            updater.load(moeconv.runtime.open(newer_out, ep_rank=ep_rank, ep_size=2))
        model.model.layers[0].mlp.experts.reshard()
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        pointers = {n: p.to_local().data_ptr() for n, p in model.named_parameters()}
        with silence() as said:
            report = updater.load(moeconv.runtime.open(newer_out, ep_rank=ep_rank, ep_size=2))
        assert not said, said
        assert {n: p.to_local().data_ptr() for n, p in model.named_parameters()} == pointers
        assert (report.materialised, report.bytes_read) == (0, local_bytes(model))
        check(model, newer.expected(ep_rank))
        shard.load_into(plain)
        moved = [(2, 0, 4, 1, 3, 0), (0, 2, 1, 3, 4, 4)]
        moves = moeconv.runtime.open(newer_out, ep_rank=ep_rank, ep_size=2).replace(moved)
        with silence() as said:
            moves.load_into(model)
        assert not said, said
        rows = dict(zip(newer.rows, moved, strict=True))
        check(model, newer.expected(ep_rank, rows))
        # a newer set keeps the placement that the model has, and only what changes again is read
        rows[STACK] = (2, 0, 1, 4, 3, 0)
        with silence() as said:
            updater.load(moeconv.runtime.open(newer_out, ep_rank=ep_rank, ep_size=2))
            check_later = moeconv.runtime.open(newer_out, ep_rank=ep_rank, ep_size=2)
            report = check_later.replace(rows).load_into(model)
        assert not said, said
        check(model, newer.expected(ep_rank, rows))
        assert report.bytes_read == (8 * 8 + 8 * 4) // 2 * 4 + 4


def real_parameters(rank: int, directory: Path) -> None:
    """FSDP2 around parameters that are there already; casting into them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "fsdp"))
    out, made = made_set(directory, "real", rank)
    model = TinyMoe(3, head=True, layers=2, dtype=torch.float64)
    fully_shard(model, mesh=mesh["fsdp"])
    shard = moeconv.runtime.open(out, ep_rank=mesh.get_local_rank("ep"), ep_size=2)
    with silence() as said:
        shard.load_into(model, cast=True)
    assert not said, said
    wide = {n: v if "scale" in n else v.double() for n, v in made.expected(shard.ep_rank).items()}
    check(model, wide)


PLACEMENTS = [
    (Shard(0), Shard(0)),
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Shard(0), Replicate()),
    (Replicate(), Shard(2)),
    (Shard(2), Shard(1)),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(1, split_factor=2), Shard(1)),
    (_StridedShard(2, split_factor=2), Shard(2)),
]


def blank(value: torch.Tensor, mesh: DeviceMesh, placements: tuple[object, ...]) -> DTensor:
    """A DTensor of zeros on this process, and nothing said to others."""
    local = split(value, mesh, placements)
    return DTensor.from_local(
        torch.zeros_like(local), mesh, placements, run_check=False,
        shape=value.shape, stride=value.stride(),
    )  # fmt: skip


def split(value: torch.Tensor, mesh: DeviceMesh, placements: tuple[object, ...]) -> torch.Tensor:
    """This process's part, by torch's own splitting."""
    pairs = zip(placements, mesh.shape, mesh.get_coordinate(), strict=True)
    for placement, parts, number in pairs:
        if not isinstance(placement, Replicate | Partial):
            value = placement._split_tensor(value, parts, with_padding=False)[0][number]
    return value


def any_mesh(rank: int, directory: Path) -> None:
    """Every kind of placement, even and uneven, with pieces large and small."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    values = {"even": numbers(4, 64, 32), "uneven": numbers(5, 7, 3), "tiny": numbers(2, 2, 2)}
    made = Made({}, {}, values, 1)
    if rank == 0:
        write_set(directory / "any", made)
    dist.barrier()
    shard = moeconv.runtime.open(directory / "any", ep_rank=0, ep_size=1)
    over: set[str] = set()
    for placements in PLACEMENTS:
        model = nn.ParameterDict({n: blank(v, mesh, placements) for n, v in values.items()})
        with silence() as said:
            report = shard.load_into(model)
        assert not said, said
        for name, value in values.items():
            assert same(
                model[name].to_local().detach(), split(value, mesh, placements).contiguous()
            )
        assert report.bytes_read == local_bytes(model) + report.bytes_overread, placements
        over |= {name for name, _ in report.overread}
        inner = {p.dim for p in placements if not isinstance(p, Replicate)} & {2}
        assert bool(report.bytes_overread) == bool(inner), placements
    assert over == set(values)


def all_slots_along_dimension_0(rank: int, directory: Path) -> None:
    """[P, ...] with EP as a dimension of the mesh; another rank's slots are refused."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "fsdp"))
    made = checkpoint()
    if rank == 0:
        write_set(directory / "all", made)
    dist.barrier()
    ep_rank = mesh.get_local_rank("ep")
    row = made.rows[STACK]
    model = TinyMoe(3)
    experts = model.model.layers[0].mlp.experts
    full = {n: made.experts[f"{STACK}.{n}"].value[list(row)] for n in ("gate_up_proj", "down_proj")}
    shard = moeconv.runtime.open(directory / "all", ep_rank=ep_rank, ep_size=2)
    for placements in ((Shard(0), Shard(0)), (Shard(0), Replicate()), (Shard(0), Shard(1))):
        for name, value in full.items():
            setattr(experts, name, nn.Parameter(blank(value, mesh, placements)))
        with silence() as said:
            shard.load_into(model)
        assert not said, said
        for name, value in full.items():
            found = getattr(experts, name).to_local().detach()
            assert same(found, split(value, mesh, placements).contiguous())
    other = moeconv.runtime.open(directory / "all", ep_rank=1 - ep_rank, ep_size=2)
    with pytest.raises(DoesNotFit) as caught:
        other.load_into(model)
    mine, others = [("slots 0 to 2", "slots 3 to 5"), ("slots 3 to 5", "slots 0 to 2")][ep_rank]
    assert f"has {mine} on this rank, the output has {others}" in str(caught.value)


def refusals(rank: int, directory: Path) -> None:
    """Partial; a mesh without this process."""
    mesh = init_device_mesh("cpu", (WORLD,))
    value = numbers(4, 2)
    if rank == 0:
        write_set(directory / "refused", Made({}, {}, {"x": value}, 1))
    dist.barrier()
    shard = moeconv.runtime.open(directory / "refused", ep_rank=0, ep_size=1)
    model = nn.ParameterDict({"x": blank(value, mesh, (Partial(),))})
    with pytest.raises(DoesNotFit) as caught:
        shard.load_into(model)
    assert "Partial" in str(caught.value)
    # this process has the right number of rows, but not of this size
    wrong = DTensor.from_local(
        torch.zeros(1, 3), mesh, (Shard(0),), run_check=False, shape=value.shape, stride=(2, 1)
    )
    with pytest.raises(DoesNotFit) as caught:
        shard.load_into(nn.ParameterDict({"x": wrong}))
    assert "this rank has [1, 3], not [1, 2]" in str(caught.value)
    from torch.distributed.tensor._dtensor_spec import ShardOrderEntry

    square = init_device_mesh("cpu", (2, 2))
    turned = blank(value, square, (Shard(0), Shard(0)))
    turned._spec.shard_order = (ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
    model = nn.Module()
    model.register_buffer("x", turned)
    with pytest.raises(DoesNotFit) as caught:
        shard.load_into(model)
    assert "in an order that differs from its mesh" in str(caught.value)
    # as many bytes here, but of other rows
    model = nn.ParameterDict({"x": blank(value, mesh, (Shard(0),))})
    updater = shard.updater(model)
    updater.load(shard)
    model["x"] = nn.Parameter(blank(value, square, (Shard(0), Shard(0))))
    with pytest.raises(DoesNotFit) as caught:
        updater.load(shard)
    assert "has changed" in str(caught.value)
    pair = DeviceMesh("cpu", [0, 1])
    local = DTensor.from_local(
        torch.zeros(2 if rank < 2 else 0, 2), pair, (Shard(0),), run_check=False,
        shape=value.shape, stride=value.stride(),
    )  # fmt: skip
    model = nn.ParameterDict({"x": local})
    if rank < 2:
        shard.load_into(model)
        assert same(model["x"].to_local().detach(), value[2 * rank : 2 * rank + 2])
    else:
        with pytest.raises(DoesNotFit) as caught:
            shard.load_into(model)
        assert "not in the mesh" in str(caught.value)


SCENARIOS = [
    the_watch_sees_collectives,
    ep_and_fsdp,
    real_parameters,
    any_mesh,
    all_slots_along_dimension_0,
    refusals,
]


def main() -> None:
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory / 'meet'}", rank=rank, world_size=WORLD
    )
    done = []
    for scenario in SCENARIOS:
        scenario(rank, directory)
        done.append(scenario.__name__)
        (directory / f"done{rank}").write_text("\n".join(done))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
