"""The commands that read data and report: `moeconv verify`, `diff` and `fingerprint`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import typer

from moeconv.cli.options import (
    DiffFlags,
    ExcludeFlags,
    FingerprintFlags,
    PrintFlags,
    RecordedFlags,
    SourceFlags,
    VerifyFlags,
    WorkFlags,
    keywords,
    signature,
)
from moeconv.cli.ui import EXIT_NO, Ui, command_ui
from moeconv.core.strict_json import error_json
from moeconv.core.text import counted, human_size
from moeconv.errors import printable, quoted

if TYPE_CHECKING:
    from moeconv.verification.report import Difference, VerifyReport

Found = TypeVar("Found")
Flags: TypeAlias = Mapping[str, object]
_SAME: Final = "="
_RECORDED: Final = "where moeconv recorded all digests, they were trusted and the data was not read"


def _reading(
    verb: str, help_text: str, show: Callable[[Ui, Found, Flags], bool], *groups: type
) -> Callable[..., None]:
    """The command that calls the library's function `verb` and shows what it found.

    show(ui, found, flags): whether the answer is yes. groups: the command's own flags.
    """

    def command(**flags: object) -> None:
        with command_ui(flags) as ui:
            import moeconv

            given = keywords(flags)
            with ui.progress(verb) as progress:
                found: Found = getattr(moeconv, verb)(**given, progress=progress)
            if flags.get("recorded"):
                ui.warn(_RECORDED)
            if not show(ui, found, flags):
                raise typer.Exit(EXIT_NO)

    command.__name__ = verb
    command.__doc__ = help_text
    command.__dict__["__signature__"] = signature(
        *groups, SourceFlags, ExcludeFlags, WorkFlags, PrintFlags
    )
    return command


def _show_report(ui: Ui, report: VerifyReport, flags: Flags) -> bool:
    del flags
    for warning in report.warnings:
        ui.warn(warning)
    if ui.json:
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
    elif not ui.json and not ui.quiet:
        ui.data(
            f"ok: {report.level}, {counted(report.tensors, 'tensor')} in "
            f"{counted(report.files, 'file')}, {human_size(report.bytes_read)} read"
        )
    return report.ok


def _show_differences(ui: Ui, found: tuple[Difference, ...], flags: Flags) -> bool:
    counts = Counter(d.mark for d in found)
    different = [d for d in found if d.mark != _SAME]
    damaged = {side: [d.address for d in found if side in d.damaged] for side in ("A", "B")}
    for side, addresses in damaged.items():
        if addresses:
            ui.warn(
                f"{side} is damaged: {counted(len(addresses), 'matrix', 'matrices')} do not match "
                f"its manifest or their replicas, {quoted(addresses[0])} first"
            )
    if ui.json:
        ui.document(
            {
                "type": "diff",
                "same": counts[_SAME],
                "only_in_a": counts["-"],
                "only_in_b": counts["+"],
                "differ": counts["*"],
                "recorded": bool(flags["recorded"]),
                "damaged": {side.lower(): list(its) for side, its in damaged.items()},
                "differences": [
                    {"mark": d.mark, "address": d.address, "why": d.why} for d in different
                ],
            }
        )
    elif not ui.quiet:
        for d in found if ui.verbose else different:
            ui.data(f"{d.mark} {printable(d.address)}" + (f"  ({d.why})" if d.why else ""))
        ui.say(
            f"{counts[_SAME]:,} same, {counts['-']:,} only in A, {counts['+']:,} only in B, "
            f"{counts['*']:,} differ"
        )
    return not different and not any(damaged.values())


def _show_fingerprint(ui: Ui, value: str, flags: Flags) -> bool:
    recorded = bool(flags["recorded"])
    ui.result(value, lambda: {"type": "fingerprint", "fingerprint": value, "recorded": recorded})
    return True


verify = _reading(
    "verify",
    "Check that OUT is complete and its bytes are right; exit 1 if they are not.",
    _show_report,
    VerifyFlags,
)
diff = _reading(
    "diff",
    "Compare all bytes, by matrix: `=` same, `-` only in A, `+` only in B, `*` differs.",
    _show_differences,
    DiffFlags,
    RecordedFlags,
)
fingerprint = _reading(
    "fingerprint",
    "Read the model and print one hash of it, the same in every layout.",
    _show_fingerprint,
    FingerprintFlags,
    RecordedFlags,
)
