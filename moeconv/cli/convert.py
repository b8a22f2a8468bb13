"""The commands that write an output: `moeconv fuse`, `unfuse`, `shard` and `merge`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moeconv.cli.options import (
    ExcludeFlags,
    OutputFlags,
    PrintFlags,
    RestoreFlags,
    ShardFlags,
    SourceFlags,
    WorkFlags,
    WriteFlags,
    keywords,
    signature,
)
from moeconv.cli.ui import Ui, command_ui

if TYPE_CHECKING:
    from moeconv.api.run import Result


def _writing(verb: str, help_text: str, *groups: type) -> Callable[..., None]:
    """The command that calls the library's function `verb`; groups: flags that not all share."""

    def command(**flags: object) -> None:
        with command_ui(flags) as ui:
            import moeconv

            given = keywords(flags)
            with ui.progress(verb) as progress:
                result: Result = getattr(moeconv, verb)(**given, progress=progress)
            if result.source.checkpoint.origin and (
                flags.get("recipe") or flags.get("from_layout")
            ):
                ui.warn("SRC carries its own recipes; --recipe and --from-layout were not used")
            if result.plan.restores and flags["exclude"]:
                ui.warn("what --exclude left out is missing from the restored files")
            _show(ui, verb, result)

    command.__name__ = verb
    command.__doc__ = help_text
    command.__dict__["__signature__"] = signature(
        OutputFlags, *groups, ExcludeFlags, WriteFlags, WorkFlags, PrintFlags
    )
    return command


fuse = _writing("fuse", "Write every expert stack in its family's fused layout.", SourceFlags)
unfuse = _writing(
    "unfuse",
    "Write each expert's own tensors; a moeconv output is restored to its original files.",
    SourceFlags,
    RestoreFlags,
)
shard = _writing(
    "shard",
    "Write what each expert-parallel rank needs: its slots in its own files, the rest once.",
    ShardFlags,
    SourceFlags,
)
merge = _writing(
    "merge",
    "Write a sharded output back as the checkpoint it was made from; SRC is not needed.",
    RestoreFlags,
)


def _show(ui: Ui, verb: str, result: Result) -> None:
    """What a command did, or in a dry run would do: notes, warnings, and the result."""
    from moeconv.cli.show import copying_lines, plan_document, plan_summary, plan_table

    for stack in result.source.detection.stacks if ui.verbose else ():
        ui.debug(f"{stack.name}: {stack.layout.name} by recipe {stack.recipe.name}, {stack.sizes}")
    for tensor in result.plan.ledger if ui.verbose else ():
        ui.debug(f"{tensor.source}: {tensor.verb} into {', '.join(tensor.into[:3])}")
    for warning in result.source.checkpoint.warnings:
        ui.warn(warning)
    for note in result.plan.notes:
        ui.say(note)
    if result.dry_run:
        if not result.disk_space.enough:
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
