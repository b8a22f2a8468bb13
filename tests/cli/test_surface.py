"""The surface: which flags exist, what --help costs, what the codes are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

from moeconv.cli.main import app
from moeconv.version import __version__
from tests.cli.run import environment, moeconv

CONVERT = {
    "--output", "--layout", "--from-layout", "--recipe", "--only-index", "--exclude",
    "--max-shard-size", "--align", "--digests", "--max-memory", "--jobs", "--dry-run",
    "--overwrite", "--resume", "--json", "--quiet", "--verbose", "--color", "--help",
}  # fmt: skip
COMPARE = {
    "--from-layout", "--recipe", "--only-index", "--exclude", "--max-memory", "--jobs", "--json",
    "--quiet",    "--verbose", "--color", "--help",
}  # fmt: skip
# A flag is a promise: one that comes or goes must show up in a review of this table.
SURFACE = {
    "inspect": {"--tensors", "--from-layout", "--recipe", "--only-index", "--json", "--quiet",
                "--verbose", "--color", "--help"},
    "fuse": CONVERT,
    "unfuse": CONVERT | {"--unchecked"},
    "shard": CONVERT | {"--ep", "--placement", "--redundant", "--allow-duplicates", "--virtual",
                        "--map-layers"},
    "merge": CONVERT - {"--from-layout", "--recipe", "--only-index"} | {"--unchecked"},
    "verify": COMPARE | {"--level", "--source", "--fill"},
    "diff": COMPARE | {"--recorded"},
    "fingerprint": COMPARE | {"--recorded"},
    "demo": {"--output", "--color", "--help"},
    "placement": {"--help"},
    "recipes": {"--help"},
}  # fmt: skip
PLACEMENT = {
    "show": {"--source", "--map-layers", "--ep", "--allow-duplicates", "--json", "--color",
             "--help"},
    "convert": {"--to", "--output", "--source", "--map-layers", "--ep", "--allow-duplicates",
                "--json", "--quiet", "--color", "--help"},
}  # fmt: skip


def flags(group: typer.core.TyperGroup) -> dict[str, set[str]]:
    """The long flags of every command of a group."""
    with group.make_context("moeconv", ["inspect"], resilient_parsing=True) as context:
        return {
            name: {
                flag
                for parameter in command.get_params(context)
                for flag in parameter.opts
                if flag.startswith("--")
            }
            for name, command in group.commands.items()
        }


def test_every_flag_is_meant() -> None:
    group = typer.main.get_command(app)
    assert flags(group) == SURFACE
    assert flags(group.commands["placement"]) == PLACEMENT


def test_every_command_has_help() -> None:
    for name in SURFACE:
        done = CliRunner().invoke(app, [name, "--help"])
        assert done.exit_code == 0
        assert len(done.output.splitlines()) > 4


def test_version() -> None:
    for flag in ("-V", "--version"):
        assert moeconv(flag).out == f"moeconv {__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "moeconv", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "huggingface_hub", "rich.table", "tqdm", "xxhash"}


def test_unknown_flag_is_usage(source: Path) -> None:
    done = moeconv("inspect", source, "--nope")
    assert done.code == 2
    assert "--nope" in done.err


def test_missing_output_is_usage(source: Path) -> None:
    assert moeconv("fuse", source).code == 2


def test_bare_sizes_are_refused_with_both_spellings(source: Path, tmp_path: Path) -> None:
    done = moeconv("fuse", source, "-o", tmp_path / "out", "--max-shard-size", "5G")
    assert done.code == 2
    assert "`5GB`" in done.err
    assert "`5GiB`" in done.err
    assert not (tmp_path / "out").exists()


def test_unknown_color_is_usage(source: Path) -> None:
    assert moeconv("inspect", source, "--color", "blue").code == 2


def test_errors_have_four_lines(tmp_path: Path) -> None:
    done = moeconv("inspect", tmp_path / "absent")
    assert done.code == 3
    first, *rest = done.err.splitlines()
    assert first.startswith("error[not-found]: ")
    assert rest[-1].startswith("  fix: ")


def test_errors_as_json_are_last_on_stderr(tmp_path: Path) -> None:
    done = moeconv("fuse", tmp_path, "-o", tmp_path / "out", "--json")
    problem = json.loads(done.err.splitlines()[-1])
    assert done.code == problem["exit_code"] == 4
    assert problem["code"] == "no-checkpoint"
    assert problem["fix"]
    assert done.out == ""


def test_names_are_escaped_before_a_screen(tmp_path: Path) -> None:
    bad = tmp_path / "e\x1b[2Jvil"
    bad.mkdir()
    done = moeconv("inspect", bad)
    assert "\x1b" not in done.err
    assert "\\x1b[2J" in done.err


def test_color_only_where_asked_or_on_a_screen(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert "\x1b[" not in moeconv("inspect", absent).err
    assert "\x1b[" in moeconv("inspect", absent, "--color", "always").err
    assert "\x1b[" not in moeconv("inspect", absent, "--color", "never").err
