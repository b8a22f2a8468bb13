"""Everything that is printed: results to stdout, messages to stderr."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol, TextIO

import typer

from moeconv.cli.process import interruptible, report_interrupt
from moeconv.core.strict_json import Json, error_json
from moeconv.core.system_errors import system_failure
from moeconv.core.text import human_size
from moeconv.errors import InternalError, MoeconvError, UsageProblem, printable, quoted

HEARTBEAT_SECONDS: Final = 10.0
EXIT_NO: Final = 1
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_STYLES: Final = {"error": "31;1", "warning": "33;1", "note": "36"}


@dataclass(frozen=True, slots=True)
class Ui:
    """What one command prints, and how: by its `PrintFlags`."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: str = "auto"

    # --- data ----------------------------------------------------------------------------------
    def data(self, text: str) -> None:
        """One line (or more) of data."""
        sys.stdout.write(f"{text}\n")

    def document(self, doc: Json) -> None:
        """The one JSON document of a `--json` run."""
        text = json.dumps(doc, indent=2, ensure_ascii=False)
        # lone surrogates, from paths that are not valid text, cannot be UTF-8: escape them
        self.data(_SURROGATES.sub(lambda half: f"\\u{ord(half[0]):04x}", text))

    def result(self, path: str, doc: Callable[[], Json]) -> None:
        """The result: a path or a value, or the whole document with `--json`."""
        if self.json:
            self.document(doc())
        else:
            self.data(path)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns, or one block per row on a narrow terminal. Rows are escaped text."""
        # imported here, as everything slow: `moeconv --help` must not pay for it
        from rich.cells import cell_len
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        widths = [max(map(cell_len, column)) + 2 for column in zip(titles, *rows, strict=True)]
        if sys.stdout.isatty() and sum(widths) > shutil.get_terminal_size().columns:
            for first, *rest in rows:
                self.data(first)
                for title, cell in zip(titles[1:], rest, strict=True):
                    self.data(f"  {title}: {cell}")
            return
        table = Table(box=None, pad_edge=False, show_edge=False, header_style=None)
        for title in titles:
            table.add_column(Text(title), no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        console = Console(file=io.StringIO(), width=sum(widths) + 1, no_color=True)
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().splitlines():
            self.data(line.rstrip())

    # --- messages ------------------------------------------------------------------------------
    def say(self, text: str) -> None:
        """A message; not with `--quiet` or `--json`."""
        if not self.quiet and not self.json:
            sys.stderr.write(f"{text}\n")

    def debug(self, text: str) -> None:
        """A message for `--verbose`."""
        if self.verbose:
            sys.stderr.write(f"{printable(text)}\n")

    def warn(self, text: str) -> None:
        """A warning; not with `--quiet`."""
        if not self.quiet:
            sys.stderr.write(f"{self._styled('warning')}: {text}\n")

    def error(self, problem: MoeconvError) -> None:
        """An error, as text or as the last JSON object on stderr."""
        if self.json:
            sys.stderr.write(json.dumps(error_json(problem), ensure_ascii=False) + "\n")
            return
        text = str(problem)
        if self._colored():
            text = text.replace("error[", f"{self._styled('error')}[", 1)
        sys.stderr.write(f"{text}\n")

    def _colored(self) -> bool:
        if self.color != "auto":
            return self.color == "always"
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return sys.stderr.isatty() and not plain

    def _styled(self, word: str) -> str:
        return f"\x1b[{_STYLES[word]}m{word}\x1b[0m" if self._colored() else word

    # --- progress ------------------------------------------------------------------------------
    @contextmanager
    def progress(self, what: str) -> Iterator[Progress | None]:
        """A callback for bytes done: a bar on a terminal, else a line every ten seconds."""
        if self.quiet:
            yield None
            return
        meter = _Bar(what) if sys.stderr.isatty() else _Heartbeat(what, sys.stderr)
        try:
            yield meter
        finally:
            meter.close()


class Progress(Protocol):
    """`progress(done, total)` in bytes, called from one worker at a time."""

    def __call__(self, done: int, total: int) -> None:
        """Show it."""

    def close(self) -> None:
        """End the display."""


class _Bar(Progress):
    def __init__(self, what: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=0,
            desc=what,
            unit="B",
            unit_scale=True,
            unit_divisor=1000,
            dynamic_ncols=True,
            file=sys.stderr,
            miniters=1,
        )

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Heartbeat(Progress):
    """Plain lines for logs: at the start, every ten seconds, at the end."""

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._stream = stream
        self._started = self._last = time.monotonic()
        self._done = self._total = -1

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        first = self._total < 0
        self._done, self._total = done, total
        if first:
            self._line(f"{self._what}: {human_size(total)} to go")
        elif now - self._last >= HEARTBEAT_SECONDS:
            self._last = now
            self._line(self._progress(now))

    def _progress(self, now: float) -> str:
        seconds = max(now - self._started, 1e-9)
        speed = self._done / seconds
        left = (self._total - self._done) / speed if speed else 0.0
        share = 100 * self._done / self._total if self._total else 100.0
        return (
            f"{self._what}: {human_size(self._done)} of {human_size(self._total)} "
            f"({share:.1f}%), {human_size(int(speed))}/s, {left:.0f} s left"
        )

    def _line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        if self._total >= 0:
            seconds = max(time.monotonic() - self._started, 1e-9)
            self._line(
                f"{self._what}: {human_size(self._done)} in {seconds:.1f} s, "
                f"{human_size(int(self._done / seconds))}/s"
            )


@contextmanager
def handled(ui: Ui) -> Iterator[Ui]:
    """Run a command's body: every failure becomes a message and an exit code."""
    if ui.quiet or ui.json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read by huggingface_hub
    try:
        with interruptible():
            if ui.color not in ("auto", "always", "never"):
                raise UsageProblem(
                    f"{quoted(ui.color)} is not a value of `--color`", fix="auto, always or never"
                )
            yield ui
            sys.stdout.flush()
    except typer.Exit:
        raise
    except MoeconvError as problem:
        ui.error(problem)
        raise typer.Exit(problem.exit_code) from None
    except OSError as problem:
        failure = system_failure(problem)
        ui.error(failure)
        raise typer.Exit(failure.exit_code) from None
    except KeyboardInterrupt as problem:
        raise typer.Exit(report_interrupt(problem)) from None
    except Exception as problem:  # noqa: BLE001 - the one place that reports bugs
        ui.error(_bug(problem))
        if ui.verbose:
            traceback.print_exc()
        raise typer.Exit(InternalError.exit_code) from None


def command_ui(flags: Mapping[str, object]) -> AbstractContextManager[Ui]:
    """Run a command's body with a `Ui` from its `PrintFlags`. Raises typer.Exit."""
    return handled(
        Ui(
            json=bool(flags.get("as_json")),
            quiet=bool(flags.get("quiet")),
            verbose=bool(flags.get("verbose")),
            color=str(flags.get("color", "auto")),
        )
    )


def _bug(problem: Exception) -> MoeconvError:
    last = traceback.extract_tb(problem.__traceback__)[-1]
    return InternalError(
        f"unexpected {type(problem).__name__}: {problem}",
        at=f"{last.name}, line {last.lineno}",
        fix="report it with the output of the same command and `-v`",
    )
