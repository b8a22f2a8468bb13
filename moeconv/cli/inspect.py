"""`moeconv inspect`: show what a checkpoint holds, from headers only."""

from __future__ import annotations

import fnmatch
from typing import Annotated

import typer

from moeconv.cli import options
from moeconv.cli.ui import EXIT_NO, Ui, handled


def inspect(
    src: options.Source,
    tensors: Annotated[
        str | None,
        typer.Option("--tensors", metavar="GLOB", help="List the tensors whose names match."),
    ] = None,
    from_layout: options.FromLayout = None,
    recipe: options.RecipeFile = None,
    only_index: options.OnlyIndex = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Show stacks, layouts, dtypes, sizes, gaps and warnings; reads headers only."""
    with handled(Ui(json=as_json, quiet=quiet, verbose=verbose, color=color)) as ui:
        from moeconv.api.open import open_source
        from moeconv.cli import show

        opened = open_source(src, recipe=recipe, from_layout=from_layout, only_index=only_index)
        checkpoint, problems = opened.checkpoint, opened.detection.problems
        listed = None
        if tensors is not None:
            listed = [t for t in checkpoint.tensors if fnmatch.fnmatchcase(t.name, tensors)]
        for warning in checkpoint.warnings:
            ui.warn(warning)
        for note in opened.detection.notes:
            ui.say(note)
        if as_json:
            ui.document(show.checkpoint_document(opened, listed))
        elif listed is not None:
            ui.table(*show.tensor_table(listed, tuple(f.name for f in checkpoint.files)))
        elif not quiet:
            for line in show.checkpoint_lines(opened):
                ui.data(line)
            if opened.detection.stacks:
                ui.table(*show.stack_table(opened.detection.stacks))
            elif not problems and not opened.detection.passthrough:
                ui.data("no routed experts")
            for line in show.other_lines(opened):
                ui.data(line)
        for problem in problems:
            if not as_json:
                ui.error(problem)
        if problems:
            raise typer.Exit(EXIT_NO)
