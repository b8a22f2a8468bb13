"""The command `moeconv`: its verbs, each in a module of its own."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moeconv.cli.convert import fuse, unfuse
from moeconv.cli.demo import demo
from moeconv.cli.diff import diff
from moeconv.cli.fingerprint import fingerprint
from moeconv.cli.inspect import inspect
from moeconv.cli.merge import merge
from moeconv.cli.placement import placement
from moeconv.cli.recipes import recipes
from moeconv.cli.shard import shard
from moeconv.cli.ui import end_cleanly_when_told, interrupted, interruptible
from moeconv.cli.verify import verify
from moeconv.version import __version__


class _Verbs(TyperGroup):
    """Ends interruptions outside of a verb as `handled` does: typer would say nothing of them."""

    def make_context(self, *args: Any, **more: Any) -> Any:  # noqa: ANN401 - typer keeps its types
        with interruptible():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        with interruptible():
            return super().invoke(ctx)


app = typer.Typer(
    name="moeconv",
    cls=_Verbs,
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
    try:
        end_cleanly_when_told()
        app()
    except KeyboardInterrupt as problem:
        sys.exit(interrupted(problem))


if __name__ == "__main__":
    main()
