"""`moeconv fingerprint`: one hash of a model, whatever its layout."""

from __future__ import annotations

from moeconv.cli import options
from moeconv.cli.ui import Ui, checked_color, handled


def fingerprint(
    src: options.Source,
    from_layout: options.FromLayout = None,
    recipe: options.RecipeFile = None,
    recorded: options.Recorded = False,
    max_memory: options.Memory = "512MiB",
    jobs: options.Jobs = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Read the model and print one hash of it, the same in every layout."""
    with handled(Ui(json=as_json, quiet=quiet, verbose=verbose, color=color)) as ui:
        checked_color(color)
        import moeconv
        from moeconv.core.text import parse_size

        with ui.progress("fingerprint") as progress:
            value = moeconv.fingerprint(
                src,
                recipe=recipe,
                from_layout=from_layout,
                recorded=recorded,
                max_memory=parse_size(max_memory),
                jobs=jobs,
                progress=progress,
            )
        if recorded:
            ui.warn("where a set records all digests, they were believed and its bytes not read")
        ui.result(
            value,
            lambda: {"type": "fingerprint", "fingerprint": value, "recorded": recorded},
        )
