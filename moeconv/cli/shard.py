"""`moeconv shard`: one set of files for each expert-parallel rank, and one for all of them."""

from __future__ import annotations

from typing import Annotated

import typer

from moeconv.cli import options
from moeconv.cli.convert import show_result
from moeconv.cli.ui import Ui, checked_color, handled


def shard(
    src: options.Source,
    output: options.Output,
    ep: Annotated[
        int,
        typer.Option(
            "--ep",
            min=1,
            max=99_999,
            metavar="N",
            help="Expert-parallel ranks.",
            show_default=False,
        ),
    ],
    placement: Annotated[
        str,
        typer.Option(
            "--placement",
            metavar="MAP",
            help="trivial, round-robin, or a map: a file of any format that `moeconv placement` "
            "reads, or its JSON.",
        ),
    ] = "trivial",
    map_layers: options.MapLayers = None,
    redundant: Annotated[
        int | None,
        typer.Option(
            "--redundant", min=0, metavar="R", help="Slots beyond the experts, for copies of them."
        ),
    ] = None,
    allow_duplicates: Annotated[
        bool,
        typer.Option("--allow-duplicates", help="Let a rank hold the same expert twice."),
    ] = False,
    virtual: Annotated[
        bool,
        typer.Option("--virtual", help="Write no tensors: say where their bytes are in SRC."),
    ] = False,
    layout: options.Layout = None,
    from_layout: options.FromLayout = None,
    recipe: options.RecipeFile = None,
    exclude: options.Exclude = None,
    max_shard_size: options.ShardSize = "5GB",
    align: options.Align = "page",
    digests: options.Digests = "now",
    max_memory: options.Memory = "512MiB",
    jobs: options.Jobs = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Write what each expert-parallel rank needs: its slots apart, everything else once."""
    with handled(Ui(json=as_json, quiet=quiet, verbose=verbose, color=color)) as ui:
        checked_color(color)
        import moeconv
        from moeconv.core.text import parse_size

        shard_size, memory = parse_size(max_shard_size), parse_size(max_memory)
        with ui.progress("shard") as progress:
            result = moeconv.shard(
                src,
                output,
                ep_size=ep,
                placement=placement,
                map_layers=map_layers,
                redundant=redundant,
                allow_duplicates=allow_duplicates,
                virtual=virtual,
                layout=layout,
                from_layout=from_layout,
                recipe=recipe,
                exclude=tuple(exclude or ()),
                max_shard_size=shard_size,
                align=align,
                digests=digests,
                max_memory=memory,
                jobs=jobs,
                overwrite=overwrite,
                resume=resume,
                dry_run=dry_run,
                progress=progress,
            )
        if result.source.checkpoint.origin and (recipe or from_layout):
            ui.warn("SRC carries its own recipes; --recipe and --from-layout were not used")
        show_result(ui, "shard", result)
