"""`moeconv placement show|convert`: which slot holds which expert, in the maps of other systems."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from moeconv.cli import options
from moeconv.cli.ui import Ui, handled

if TYPE_CHECKING:
    from moeconv.core.strict_json import Json
    from moeconv.placement.base import RawMap
    from moeconv.placement.model import MoeLayers, Placement

_SOURCE_HELP = "The checkpoint that the map is for: a directory, or anything else SRC may be."
Map: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MAP", help="A .json, .yaml, .pt or .npy file, or the JSON.", show_default=False
    ),
]
Ranks: TypeAlias = Annotated[
    int | None,
    typer.Option("--ep", min=1, metavar="N", help="Check the map for N expert-parallel ranks."),
]

placement = typer.Typer(
    help="Expert placement maps: show one, or convert it for another system.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@placement.command()
def show(
    map_: Map,
    source: Annotated[
        str | None, typer.Option("--source", metavar="SRC", help=_SOURCE_HELP)
    ] = None,
    map_layers: options.MapLayers = None,
    ep: Ranks = None,
    allow_duplicates: options.AllowDuplicates = False,
    as_json: options.AsJson = False,
    color: options.Color = "auto",
) -> None:
    """Show a map's format, sizes and ranks; report every problem that it has."""
    with handled(Ui(json=as_json, color=color)) as ui:
        from moeconv.errors import BadPlacement, UsageProblem
        from moeconv.placement.files import read_map
        from moeconv.placement.model import check
        from moeconv.placement.resolve import ep_size_of, resolve

        if map_layers is not None and source is None:
            raise UsageProblem(
                "`--map-layers` needs `--source SRC`",
                cause="without a checkpoint, the rows of a map keep the numbers that they have "
                "in the file",
                fix="add `--source SRC`, or drop `--map-layers`",
            )
        raw = read_map(map_)
        ep_size = ep_size_of(raw, ep)
        if source is None and raw.default is not None:
            raise UsageProblem(
                "this map needs `--source SRC`",
                cause="it has no rows: the placement depends on the number of experts",
                fix="add `--source SRC` and `--ep N`",
            )
        if source is None:
            layers, found = _alone(raw)
            assumed = (
                f"{layers.experts} experts, inferred from the largest id; "
                "`--source SRC` gives the exact number"
            )
        else:
            layers, _ = _layers(source)
            found, assumed = resolve(raw, layers, map_layers=map_layers, ep_size=ep_size)
        problem = None
        try:
            check(found, layers, ep_size=ep_size, allow_duplicates=allow_duplicates)
        except BadPlacement as misfit:
            problem = misfit
        if as_json:
            doc = _document(raw.format, found, ep_size, assumed)
            rows: list[Json] = [list(row) for row in found.physical_to_logical]
            ui.document({**doc, "ok": problem is None, "map": rows})
        else:
            _describe(ui, raw, found, assumed)
            if ep_size is not None and problem is None:
                _show_ranks(ui, found, ep_size)
        if problem is not None:
            raise problem


@placement.command()
def convert(
    map_: Map,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="sglang, vllm, trtllm, ascend or eplb.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write; it must not exist.",
            show_default=False,
        ),
    ],
    source: Annotated[
        str, typer.Option("--source", metavar="SRC", help=_SOURCE_HELP, show_default=False)
    ],
    map_layers: options.MapLayers = None,
    ep: Ranks = None,
    allow_duplicates: options.AllowDuplicates = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    color: options.Color = "auto",
) -> None:
    """Write a map in another system's format. Systems count layers differently: SRC says how."""
    with handled(Ui(json=as_json, quiet=quiet, color=color)) as ui:
        from moeconv.engine.output.atomic_file import refuse_file, write_single
        from moeconv.engine.output.preflight import refuse_overlap
        from moeconv.placement.files import read_map
        from moeconv.placement.formats import write_map
        from moeconv.placement.model import check
        from moeconv.placement.resolve import ep_size_of, resolve

        refuse_file(output)
        raw = read_map(map_)
        ep_size = ep_size_of(raw, ep)
        layers, place = _layers(source)
        refuse_overlap(place, output)
        found, assumed = resolve(raw, layers, map_layers=map_layers, ep_size=ep_size)
        check(found, layers, ep_size=ep_size, allow_duplicates=allow_duplicates)
        write_single(output, write_map(to, found, layers, ep_size=ep_size))
        ui.say(f"{raw.format}, {assumed}")
        doc = _document(to, found, ep_size, assumed)
        ui.result(str(output), lambda: {**doc, "source_format": raw.format, "output": str(output)})


def _layers(source: str) -> tuple[MoeLayers, Path | None]:
    """The checkpoint's layers and its path, if it is local."""
    from moeconv.api.open import open_source
    from moeconv.detect.moe_layers import layers_of

    opened = open_source(source)
    layers, _ = layers_of(opened.detection.checked().stacks, opened.checkpoint.config)
    return layers, opened.path


def _alone(raw: RawMap) -> tuple[MoeLayers, Placement]:
    """Layers and placement of a map alone, from its own indices and ids."""
    from moeconv.placement.model import MoeLayers, Placement

    indices = tuple(index for index, _ in raw.rows)
    rows = tuple(row for _, row in raw.rows)
    experts = 1 + max((expert for row in rows for expert in row), default=0)
    hidden = max(indices, default=-1) + 1
    return MoeLayers(experts, indices, (), hidden), Placement(experts, indices, rows)


def _document(name: str, found: Placement, ep_size: int | None, assumed: str) -> dict[str, Json]:
    return {
        "type": "placement",
        "format": name,
        "layers": list(found.layers),
        "experts": found.experts,
        "slots": found.slots,
        "redundant": _redundant(found),
        "ep": ep_size,
        "assumed": assumed,
    }


def _redundant(found: Placement) -> int | None:
    """R, the slots beyond the experts; None if there are fewer slots than experts."""
    return found.slots - found.experts if found.slots >= found.experts else None


def _describe(ui: Ui, raw: RawMap, found: Placement, assumed: str) -> None:
    from moeconv.core.text import counted

    redundant = _redundant(found)
    more = "too few" if redundant is None else f"{redundant} redundant"
    ui.data(f"format: {raw.format}, {counted(len(raw.rows), 'row')}, {raw.indexed}")
    ui.data(f"slots: {found.slots} ({counted(found.experts, 'expert')}, {more})")
    ui.data(f"assumed: {assumed}")
    alike = len(set(found.physical_to_logical)) == 1
    ui.data(f"layers: {counted(len(found.layers), 'layer')}, {'' if alike else 'not '}all alike")


def _show_ranks(ui: Ui, found: Placement, ep_size: int) -> None:
    """The first layer's experts, rank by rank."""
    row, per_rank = found.physical_to_logical[0], found.slots // ep_size
    ui.data(f"layer {found.layers[0]} on {ep_size} ranks of {per_rank} slots:")
    ui.table(
        ["rank", "experts"],
        [
            [str(r), " ".join(map(str, row[r * per_rank : (r + 1) * per_rank]))]
            for r in range(ep_size)
        ],
    )
