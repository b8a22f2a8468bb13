"""Every flag of the command line, written once.

A class here is a group of flags that some commands share: an attribute's name is the keyword of
the library's function, its annotation the flag, its value the default. `signature` makes of groups
what Typer reads.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Final, TypeAlias, get_type_hints

import typer

from moeconv.core.text import parse_size

# --- flags that commands of several kinds share --------------------------------------------------
Source: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A directory, a .safetensors file, a moeconv output, or hf://org/name[@revision].",
        show_default=False,
    ),
]
FromLayout: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--from-layout", metavar="NAME", help="The layout of SRC, if its shapes are ambiguous."
    ),
]
RecipeFile: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="FILE", help="Your own recipe file, or the name of a shipped one."
    ),
]
OnlyIndex: TypeAlias = Annotated[
    bool,
    typer.Option("--only-index", help="Take exactly the tensors that the index of SRC names."),
]
MapLayers: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--map-layers",
        metavar="moe|all",
        help="For a map without layer ids: row n is for the n-th MoE layer, or for layer n.",
    ),
]
AllowDuplicates: TypeAlias = Annotated[
    bool, typer.Option("--allow-duplicates", help="Let a rank hold the same expert twice.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result on stdout.")]
Verbose: TypeAlias = Annotated[
    bool, typer.Option("--verbose", "-v", help="More details on stderr.")
]
Color: TypeAlias = Annotated[
    str, typer.Option("--color", metavar="WHEN", help="auto, always or never.")
]


# --- groups --------------------------------------------------------------------------------------
class OutputFlags:
    """From SRC to OUT."""

    src: Source
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The output directory; it must be absent or empty.",
            show_default=False,
        ),
    ]


class ShardFlags:
    """Which experts each rank gets."""

    ep_size: Annotated[
        int,
        typer.Option(
            "--ep",
            min=1,
            max=99_999,
            metavar="N",
            help="The number of expert-parallel ranks.",
            show_default=False,
        ),
    ]
    placement: Annotated[
        str,
        typer.Option(
            "--placement",
            metavar="MAP",
            help="trivial, round-robin, or a map: a file in any format that `moeconv placement` "
            "reads, or its JSON.",
        ),
    ] = "trivial"
    map_layers: MapLayers = None
    redundant: Annotated[
        int | None,
        typer.Option(
            "--redundant",
            min=0,
            metavar="R",
            help="Extra slots per layer, for copies of experts.",
        ),
    ] = None
    allow_duplicates: AllowDuplicates = False
    virtual: Annotated[
        bool,
        typer.Option(
            "--virtual", help="Write no tensors, only a record of where their bytes are in SRC."
        ),
    ] = False


class SourceFlags:
    """What SRC is, where it does not say so itself."""

    from_layout: FromLayout = None
    recipe: RecipeFile = None
    only_index: OnlyIndex = False


class ExcludeFlags:
    """What to leave out of SRC."""

    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="GLOB",
            help="Leave out matching files that the index does not name; repeatable.",
        ),
    ] = None


class WorkFlags:
    """What a command may use."""

    max_memory: Annotated[
        str,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            help="Memory for permuting tensors, for all workers together.",
        ),
    ] = "512MiB"
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            metavar="N",
            help="Worker threads, at most 256 (default: two per core, at most 8).",
        ),
    ] = None


class WriteFlags:
    """What every command that writes OUT takes, but for what reading commands take too."""

    layout: Annotated[
        str | None,
        typer.Option(
            "--layout", metavar="NAME", help="The target layout, instead of the family's own."
        ),
    ] = None
    max_shard_size: Annotated[
        str,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            help="Maximum size of an output file: 5GB (10^9) or 5GiB (2^30).",
        ),
    ] = "5GB"
    align: Annotated[
        str,
        typer.Option(
            "--align",
            metavar="WHERE",
            help="page: data starts on a page; source: where most of it can be cloned from SRC.",
        ),
    ] = "page"
    digests: Annotated[
        str,
        typer.Option(
            "--digests", metavar="WHEN", help="now, or later: then `verify --fill` adds them."
        ),
    ] = "now"
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", "-n", help="Print the plan and write nothing; fails where a run would."
        ),
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if moeconv wrote it.")
    ] = False
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a run that was killed; keep finished files."),
    ] = False


class RestoreFlags:
    """For commands that can restore the original files."""

    unchecked: Annotated[
        bool,
        typer.Option(
            "--unchecked",
            help="Restore the original files without comparing them with the recorded digests.",
        ),
    ] = False


class VerifyFlags:
    """What to verify, and how."""

    out: Annotated[str, typer.Argument(metavar="OUT", help="A moeconv output.", show_default=False)]
    level: Annotated[
        str | None,
        typer.Option(
            "--level",
            metavar="LEVEL",
            help="structure (no data), digest (all re-read), source (byte by byte against SRC). "
            "Default: digest, or source with --source.",
        ),
    ] = None
    source: Annotated[
        str | None, typer.Option("--source", metavar="SRC", help="What OUT was made from.")
    ] = None
    fill: Annotated[
        bool,
        typer.Option("--fill", help="If SRC agrees, add the digests that OUT lacks."),
    ] = False


class DiffFlags:
    """What to compare."""

    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)]
    b: Annotated[
        str,
        typer.Argument(metavar="B", help="The checkpoint to compare it with.", show_default=False),
    ]


class FingerprintFlags:
    """What to read."""

    src: Source


class RecordedFlags:
    """For commands that read data which moeconv may have digests of."""

    recorded: Annotated[
        bool,
        typer.Option(
            "--recorded", help="Trust the digests that moeconv recorded instead of reading data."
        ),
    ] = False


class PrintFlags:
    """How to print."""

    as_json: AsJson = False
    quiet: Quiet = False
    verbose: Verbose = False
    color: Color = "auto"


_PRINT: Final = frozenset(PrintFlags.__annotations__)


def signature(*groups: type) -> inspect.Signature:
    """The parameters of a command with these groups of flags, as Typer reads them."""
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(group, name, inspect.Parameter.empty),
                annotation=annotation,
            )
            for group in groups
            for name, annotation in get_type_hints(group, include_extras=True).items()
        ]
    )


def keywords(values: dict[str, object]) -> dict[str, object]:
    """What a command was given, as keywords of the library's function. Raises BadSize."""
    given = {name: value for name, value in values.items() if name not in _PRINT}
    for name, value in given.items():
        if name in ("max_memory", "max_shard_size"):
            given[name] = parse_size(str(value))
        elif name == "exclude":
            given[name] = tuple(value) if isinstance(value, list) else ()
    return given
