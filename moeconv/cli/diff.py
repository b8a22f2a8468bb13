"""`moeconv diff`: two checkpoints matrix by matrix."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from moeconv.cli import options
from moeconv.cli.ui import EXIT_NO, Ui, checked_color, handled

_SAME = "="


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
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
    """Compare all bytes, by matrix: `=` same, `-` only in A, `+` only in B, `*` differs."""
    with handled(Ui(json=as_json, quiet=quiet, verbose=verbose, color=color)) as ui:
        checked_color(color)
        import moeconv
        from moeconv.core.text import counted, parse_size
        from moeconv.errors import printable, quoted

        with ui.progress("diff") as progress:
            found = moeconv.diff(
                a,
                b,
                recipe=recipe,
                from_layout=from_layout,
                recorded=recorded,
                max_memory=parse_size(max_memory),
                jobs=jobs,
                progress=progress,
            )
        counts = Counter(d.mark for d in found)
        different = [d for d in found if d.mark != _SAME]
        damaged = {side: [d for d in found if side in d.damaged] for side in ("A", "B")}
        if recorded:
            ui.warn("where a set records all digests, they were believed and its bytes not read")
        for side, its in damaged.items():
            if its:
                ui.warn(
                    f"{side} is damaged: {counted(len(its), 'matrix', 'matrices')} not as its "
                    f"manifest records or its replicas are, {quoted(its[0].address)} first"
                )
        if as_json:
            ui.document(
                {
                    "type": "diff",
                    "same": counts[_SAME],
                    "only_in_a": counts["-"],
                    "only_in_b": counts["+"],
                    "differ": counts["*"],
                    "recorded": recorded,
                    "damaged": {
                        side.lower(): [d.address for d in its] for side, its in damaged.items()
                    },
                    "differences": [
                        {"mark": d.mark, "address": d.address, "why": d.why} for d in different
                    ],
                }
            )
        elif not quiet:
            for d in found if verbose else different:
                ui.data(f"{d.mark} {printable(d.address)}" + (f"  ({d.why})" if d.why else ""))
            ui.say(
                f"{counts[_SAME]:,} same, {counts['-']:,} only in A, {counts['+']:,} only in B, "
                f"{counts['*']:,} differ"
            )
        if different or any(damaged.values()):
            raise typer.Exit(EXIT_NO)
