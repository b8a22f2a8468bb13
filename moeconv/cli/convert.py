"""`moeconv fuse` and `moeconv unfuse`: two verbs, one way to carry them out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from moeconv.cli import options
from moeconv.cli.ui import Ui, checked_color, handled

if TYPE_CHECKING:
    from moeconv.api.run import Result

# to the end of the process: taking half a million tensors apart one by one helps nobody
_HELD: Final[list[Result]] = []


def _command(verb: str, help_text: str) -> Callable[..., None]:
    """The command of a verb: both take the same flags, so they are written once."""

    def command(
        src: options.Source,
        output: options.Output,
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
        unchecked: options.Unchecked = False,
        as_json: options.AsJson = False,
        quiet: options.Quiet = False,
        verbose: options.Verbose = False,
        color: options.Color = "auto",
    ) -> None:
        with handled(Ui(json=as_json, quiet=quiet, verbose=verbose, color=color)) as ui:
            checked_color(color)
            import moeconv
            from moeconv.core.text import parse_size

            run = moeconv.fuse if verb == "fuse" else partial(moeconv.unfuse, unchecked=unchecked)
            shard_size, memory = parse_size(max_shard_size), parse_size(max_memory)
            with ui.progress(verb) as progress:
                result = run(
                    src,
                    output,
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
            if result.plan.restores and exclude:
                ui.warn("what --exclude left out is missing from the restored origin")
            show_result(ui, verb, result)

    command.__name__ = verb
    command.__doc__ = help_text
    if verb == "fuse":  # it never restores; typer asks the signature for the flags
        signature = inspect.signature(command, eval_str=True)
        flags = [p for p in signature.parameters.values() if p.name != "unchecked"]
        command.__dict__["__signature__"] = signature.replace(parameters=flags)
    return command


fuse = _command("fuse", "Write every expert stack in its family's fused layout.")
unfuse = _command("unfuse", "Write experts one by one; our own outputs go back to their origin.")


def show_result(ui: Ui, verb: str, result: Result) -> None:
    """What a writing verb did, or in a dry run would do: notes, warnings, and the result."""
    from moeconv.cli.show import copying_lines, plan_document, plan_summary, plan_table

    _HELD.append(result)
    for stack in result.source.detection.stacks if ui.verbose else ():
        ui.debug(f"{stack.name}: {stack.layout.name} by recipe {stack.recipe.name}, {stack.sizes}")
    for tensor in result.plan.ledger if ui.verbose else ():
        ui.debug(f"{tensor.source}: {tensor.verb} into {', '.join(tensor.into[:3])}")
    for warning in result.source.checkpoint.warnings:
        ui.warn(warning)
    for note in result.plan.notes:
        ui.say(note)
    if result.dry_run:
        if not result.room.enough:
            ui.warn(plan_summary(result)[-1])
        if ui.json:
            ui.document(plan_document(verb, result))
        elif not ui.quiet:
            ui.table(*plan_table(result))
            for line in plan_summary(result):
                ui.data(line)
        return
    for line in plan_summary(result)[:-1]:
        ui.say(line)
    counts, *hints = copying_lines(result) or [""]
    ui.debug(counts)
    for hint in hints:
        ui.say(hint)
    ui.result(str(result.out), lambda: plan_document(verb, result))
