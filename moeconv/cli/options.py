"""The flags that mean the same everywhere, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Source: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A directory, a .safetensors file, an output of moeconv, or hf://org/name[@revision].",
        show_default=False,
    ),
]
Output: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="OUT", help="Where to write: absent or empty.", show_default=False
    ),
]
Layout: TypeAlias = Annotated[
    str | None,
    typer.Option("--layout", metavar="NAME", help="Another target layout than the family's own."),
]
FromLayout: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--from-layout", metavar="NAME", help="How SRC is stored, where its shapes leave it open."
    ),
]
RecipeFile: TypeAlias = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe of your own, or one by name."),
]
MapLayers: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--map-layers",
        metavar="moe|all",
        help="What row n of a map without a key is: the n-th MoE layer, or layer n of all.",
    ),
]
Exclude: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="GLOB", help="Leave out sidecar files that match; may be repeated."
    ),
]
ShardSize: TypeAlias = Annotated[
    str,
    typer.Option(
        "--max-shard-size", metavar="SIZE", help="Largest output file: 5GB (10^9) or 5GiB (2^30)."
    ),
]
Align: TypeAlias = Annotated[
    str,
    typer.Option(
        "--align",
        metavar="WHERE",
        help="page: data starts on one; source: where most of it can be cloned from SRC.",
    ),
]
Digests: TypeAlias = Annotated[
    str,
    typer.Option(
        "--digests", metavar="WHEN", help="now, or later: then `verify --fill` adds them."
    ),
]
Memory: TypeAlias = Annotated[
    str,
    typer.Option("--max-memory", metavar="SIZE", help="Bytes for permuting tensors, all workers."),
]
Jobs: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        metavar="N",
        help="Worker threads, 256 at most (default: two a core, at most 8).",
    ),
]
DryRun: TypeAlias = Annotated[
    bool,
    typer.Option("--dry-run", "-n", help="Print the plan, touch nothing; fail where a run would."),
]
Overwrite: TypeAlias = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace OUT if moeconv made it."),
]
Resume: TypeAlias = Annotated[
    bool,
    typer.Option("--resume", help="Go on where a run was killed; keep what is finished."),
]
Unchecked: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--unchecked",
        help="Restore the original files without holding their bytes against recorded digests.",
    ),
]
Recorded: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--recorded", help="Believe the digests that a set of moeconv records; do not read it."
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result on stdout.")]
Verbose: TypeAlias = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
Color: TypeAlias = Annotated[
    str, typer.Option("--color", metavar="WHEN", help="auto, always or never.")
]
