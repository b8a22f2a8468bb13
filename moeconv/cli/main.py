"""The command `moeconv`: its subcommands, and how the process starts and ends."""

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
from moeconv.cli.process import SIGNAL_EXITS, ignore_signals, install_handlers, open_streams
from moeconv.cli.recipes import recipes
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
    """Run the command line and end the process.

    `os._exit` skips freeing half a million tensors one by one; all files are on disk by then.
    """
    open_streams()
    install_handlers()
    _register_only(sys.argv[1:])
    try:
        code = _run()
    except SystemExit as end:  # raised while flushing: a signal arrived, or stdout was closed
        code = _code(end)
    ignore_signals()
    os._exit(code)


def _run() -> int:
    """Carry out the command line; its exit code, when all output is flushed."""
    try:
        try:
            app()
        except SystemExit as end:
            code = _code(end)
        except OSError as problem:  # of typer's own files, for `--install-completion`
            raise system_failure(problem) from None
        if code not in SIGNAL_EXITS:  # a slow reader must not delay an interrupted run
            sys.stdout.flush()
    except IoFailed as problem:
        sys.stderr.write(f"{problem}\n")
        return problem.exit_code
    return code


def _code(end: SystemExit) -> int:
    return end.code if isinstance(end.code, int) else int(end.code is not None)


def _register_only(arguments: list[str]) -> None:
    """Keep only the command that is called: Typer takes 40 ms to build the flags of all."""
    wanted = next(iter(arguments), None)
    named = [c for c in app.registered_commands if c.callback and c.callback.__name__ == wanted]
    if named:
        app.registered_commands, app.registered_groups = named, []


if __name__ == "__main__":
    main()
