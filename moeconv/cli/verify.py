"""`moeconv verify`: proofs about an output."""

from __future__ import annotations

from typing import Annotated

import typer

from moeconv.cli import options
from moeconv.cli.ui import EXIT_NO, Ui, checked_color, handled
from moeconv.core.json_value import error_json


def verify(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="An output of moeconv.", show_default=False)
    ],
    level: Annotated[
        str | None,
        typer.Option(
            "--level",
            metavar="LEVEL",
            help="structure (no data), digest (all re-read), source (byte by byte against SRC). "
            "Default: digest, or source where --source is given.",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", metavar="SRC", help="What OUT was made from.")
    ] = None,
    fill: Annotated[
        bool,
        typer.Option("--fill", help="Where SRC agrees, add the digests that a virtual set lacks."),
    ] = False,
    from_layout: options.FromLayout = None,
    recipe: options.RecipeFile = None,
    max_memory: options.Memory = "512MiB",
    jobs: options.Jobs = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Prove that OUT is whole and holds the bytes it should. Exit 1: it is not."""
    with handled(Ui(json=as_json, quiet=quiet, verbose=verbose, color=color)) as ui:
        checked_color(color)
        import moeconv
        from moeconv.core.text import counted, human_size, parse_size

        with ui.progress("verify") as progress:
            report = moeconv.verify(
                out,
                level=level or ("source" if source else "digest"),
                source=source,
                fill=fill,
                recipe=recipe,
                from_layout=from_layout,
                max_memory=parse_size(max_memory),
                jobs=jobs,
                progress=progress,
            )
        for warning in report.warnings:
            ui.warn(warning)
        if as_json:
            ui.document(
                {
                    "type": "verification",
                    "ok": report.ok,
                    "level": report.level,
                    "files": report.files,
                    "tensors": report.tensors,
                    "bytes_read": report.bytes_read,
                    "fingerprint": report.fingerprint,
                    "problems": [error_json(p) for p in report.problems],
                    "warnings": list(report.warnings),
                }
            )
        else:
            for problem in report.problems:
                ui.error(problem)
        if not report.ok:
            ui.say(f"NOT ok: {counted(len(report.problems), 'problem')} at level {report.level}")
            raise typer.Exit(EXIT_NO)
        if not as_json and not quiet:
            ui.data(
                f"ok: {report.level}, {counted(report.tensors, 'tensor')} in "
                f"{counted(report.files, 'file')}, {human_size(report.bytes_read)} read"
            )
