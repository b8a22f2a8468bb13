"""`moeconv merge`: an expert-parallel set back to one plain checkpoint."""

from __future__ import annotations

from moeconv.cli import options
from moeconv.cli.convert import show_result
from moeconv.cli.ui import Ui, checked_color, handled


def merge(
    src: options.Source,
    output: options.Output,
    layout: options.Layout = None,
    exclude: options.Exclude = None,
    max_shard_size: options.ShardSize = "5GB",
    align: options.Align = "page",
    digests: options.Digests = "now",
    max_memory: options.Memory = "512MiB",
    jobs: options.Jobs = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    unchecked: options.Unchecked = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Write a set of moeconv back as the checkpoint it came from; its source is not needed."""
    with handled(Ui(json=as_json, quiet=quiet, verbose=verbose, color=color)) as ui:
        checked_color(color)
        import moeconv
        from moeconv.core.text import parse_size

        shard_size, memory = parse_size(max_shard_size), parse_size(max_memory)
        with ui.progress("merge") as progress:
            result = moeconv.merge(
                src,
                output,
                layout=layout,
                exclude=tuple(exclude or ()),
                max_shard_size=shard_size,
                align=align,
                digests=digests,
                max_memory=memory,
                jobs=jobs,
                overwrite=overwrite,
                resume=resume,
                unchecked=unchecked,
                dry_run=dry_run,
                progress=progress,
            )
        if result.plan.restores and exclude:
            ui.warn("what --exclude left out is missing from the restored origin")
        show_result(ui, "merge", result)
