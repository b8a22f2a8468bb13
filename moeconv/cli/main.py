"""The command `moeconv`: its verbs, each in a module of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from moeconv.cli.convert import fuse, unfuse
from moeconv.cli.demo import demo
from moeconv.cli.diff import diff
from moeconv.cli.fingerprint import fingerprint
from moeconv.cli.inspect import inspect
from moeconv.cli.merge import merge
from moeconv.cli.placement import placement
from moeconv.cli.recipes import recipes
from moeconv.cli.shard import shard
from moeconv.cli.signals import end_when_told
from moeconv.cli.verify import verify
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


def main() -> None:
    """The console script."""
    end_when_told()
    app()


if __name__ == "__main__":
    main()
