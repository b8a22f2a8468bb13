"""The command `moeconv`: its verbs, each in a module of its own."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from moeconv.cli.compare import diff, fingerprint, verify
from moeconv.cli.convert import fuse, merge, shard, unfuse
from moeconv.cli.demo import demo
from moeconv.cli.inspect import inspect
from moeconv.cli.placement import placement
from moeconv.cli.recipes import recipes
from moeconv.cli.signals import ENDED, end_when_told, hear_no_more
from moeconv.cli.streams import open_streams
from moeconv.core.system_errors import system_failure
from moeconv.errors import IoFailed
from moeconv.version import __version__

app = typer.Typer(
    name="moeconv",
    help="Converts Mixture-of-Experts checkpoints between layouts, byte for byte, and proves it.",
    no_args_is_help=True,
    # the default would eat the brackets of shapes and draw boxes into logs
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(inspect)
app.command()(fuse)
app.command()(unfuse)
app.command()(shard)
app.command()(merge)
app.command()(verify)
app.command()(diff)
app.command()(fingerprint)
app.add_typer(placement, name="placement")
app.add_typer(recipes, name="recipes")
app.command()(demo)


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it with a bare flag
    if wanted:
        typer.echo(f"moeconv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", help="Print the version.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Converts Mixture-of-Experts checkpoints between layouts, byte for byte, and proves it."""


def main() -> NoReturn:
    """The console script: it ends the process that it runs in.

    At once: to take half a million tensors apart one by one helps nobody, and by then all files
    are closed and on the disk.
    """
    open_streams()
    end_when_told()
    _leave_out_others(sys.argv[1:])
    try:
        code = _run()
    except SystemExit as end:  # told while it said its last words, or there was nobody to hear them
        code = _code(end)
    hear_no_more()
    os._exit(code)


def _run() -> int:
    """Carry out the command line; its exit code, when all of it is said."""
    try:
        try:
            app()
        except SystemExit as end:
            code = _code(end)
        except OSError as problem:  # typer's own files, those of `--install-completion`
            raise system_failure(problem) from None
        if code not in ENDED:  # whoever wants an end may not be kept by a reader who is slow
            sys.stdout.flush()
    except IoFailed as problem:
        sys.stderr.write(f"{problem}\n")
        return problem.exit_code
    return code


def _code(end: SystemExit) -> int:
    return end.code if isinstance(end.code, int) else int(end.code is not None)


def _leave_out_others(arguments: list[str]) -> None:
    """Where the first word is a verb, the flags of all others need not be looked at."""
    wanted = next(iter(arguments), None)
    named = [c for c in app.registered_commands if c.callback and c.callback.__name__ == wanted]
    if named:
        app.registered_commands, app.registered_groups = named, []


if __name__ == "__main__":
    main()
