"""`moeconv demo`: fuse, verify, restore, shard and load a small checkpoint, in a few seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moeconv.cli import options
from moeconv.cli.ui import Ui, handled

if TYPE_CHECKING:
    from moeconv.api.run import Result

_RANKS: Final = 8


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Keep the checkpoints in this directory (absent or empty).",
        ),
    ] = None,
    color: options.Color = "auto",
) -> None:
    """Make a small checkpoint; fuse, verify, unfuse, shard, merge and load it."""
    with handled(Ui(color=color)) as ui:
        from moeconv.engine.copy.pool import Limits
        from moeconv.engine.options import DEFAULT_MEMORY_BYTES
        from moeconv.engine.output.preflight import refuse_existing

        if output is not None:
            refuse_existing(output, limits=Limits(1, DEFAULT_MEMORY_BYTES), overwrite=False)
            output.mkdir(parents=True, exist_ok=True)
            _run(ui, output)
            return
        import tempfile  # slow to import, and no other command needs it

        folder = Path(tempfile.mkdtemp(prefix="moeconv-demo-"))
        try:
            _run(ui, folder)
        finally:
            shutil.rmtree(folder)


def _run(ui: Ui, folder: Path) -> None:
    import moeconv
    from moeconv.cli.demo_checkpoint import make_checkpoint
    from moeconv.core.text import counted, human_size

    source, fused, back = folder / "source", folder / "fused", folder / "back"
    make_checkpoint(source)
    opened = moeconv.open_source(source)
    stack = opened.detection.stacks[0]
    ui.data(
        f"made      a Qwen3-MoE checkpoint: {counted(len(opened.checkpoint.files), 'file')}, "
        f"{counted(len(opened.checkpoint.tensors), 'tensor')}, "
        f"{human_size(opened.checkpoint.tensor_bytes)}, {stack.sizes.experts} experts a layer"
    )
    result = moeconv.fuse(source, fused)
    ui.data(
        f"fused     to {counted(result.plan.tensor_count, 'tensor')}: "
        f"{stack.name}.gate_up_proj is {_shape(result, stack.name)}"
    )
    report = moeconv.verify(fused, level="source", source=source)
    ui.data(f"verified  every byte of the source is in the output: {'yes' if report.ok else 'NO'}")
    prints = {moeconv.fingerprint(source), moeconv.fingerprint(fused)}
    ui.data(f"hashed    both layouts have the fingerprint {', '.join(sorted(prints))}")
    moeconv.unfuse(fused, back)
    same = _same_tree(source, back)
    ui.data(f"unfused   back to the original files, bit for bit: {'yes' if same else 'NO'}")
    ranks, merged = folder / "ranks", folder / "merged"
    shared = moeconv.shard(source, ranks, ep_size=_RANKS, redundant=_RANKS).plan
    ui.data(
        f"sharded   for {_RANKS} ranks of {(stack.sizes.experts + _RANKS) // _RANKS} slots each; "
        f"the {_RANKS} redundant experts of a layer add {human_size(shared.replica_bytes)}"
    )
    moeconv.merge(ranks, merged)
    again = _same_tree(source, merged)
    ui.data(f"merged    back to the original files, bit for bit: {'yes' if again else 'NO'}")
    loaded = _load(source, fused, stack.name, stack.sizes.experts)
    if loaded == "yes":
        loaded = _load_rank(source, ranks, stack.name)
    if loaded is None:
        ui.data("loaded    skipped: torch is not installed (`pip install 'moeconv[torch]'`)")
    else:
        ui.data(f"loaded    whole and by rank, equal to stacking the experts by hand: {loaded}")
    if not (report.ok and same and again and len(prints) == 1) or loaded == "NO":
        raise typer.Exit(1)


def _shape(result: Result, stack: str) -> str:
    name = f"{stack}.gate_up_proj"
    found = [t.shape for f in result.plan.files for t in f.tensors if t.name == name]
    return str(list(found[0]))


def _same_tree(a: Path, b: Path) -> bool:
    names = [sorted(str(p.relative_to(d)) for p in d.rglob("*") if p.is_file()) for d in (a, b)]
    return names[0] == names[1] and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names[0]
    )


def _load(source: Path, fused: Path, stack: str, experts: int) -> str | None:
    """Load both with the stock safetensors loader and compare; None without torch."""
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError:
        return None
    before = {n: t for f in sorted(source.glob("*.safetensors")) for n, t in load_file(f).items()}
    after = {n: t for f in sorted(fused.glob("*.safetensors")) for n, t in load_file(f).items()}
    wanted = torch.stack(
        [
            torch.cat([before[f"{stack}.{e}.{p}_proj.weight"] for p in ("gate", "up")])
            for e in range(experts)
        ]
    )
    return "yes" if torch.equal(after[f"{stack}.gate_up_proj"], wanted) else "NO"


def _load_rank(source: Path, ranks: Path, stack: str) -> str:
    """Load the last rank with `moeconv.runtime` and compare each slot with its expert."""
    import torch
    from safetensors.torch import load_file

    from moeconv import runtime

    before = {n: t for f in sorted(source.glob("*.safetensors")) for n, t in load_file(f).items()}
    shard = runtime.open(ranks, ep_rank=_RANKS - 1, ep_size=_RANKS)
    slots = shard.load()[f"{stack}.down_proj"]
    wanted = [before[f"{stack}.{e}.down_proj.weight"] for e in shard.logical_experts(stack)]
    return "yes" if torch.equal(slots, torch.stack(wanted)) else "NO"
