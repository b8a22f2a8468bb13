"""Report files in the directory of an output that its manifest does not name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from moeconv.checkpoint.output import foreign_files
from moeconv.errors import Damaged, MoeconvError, quoted
from moeconv.manifest.model import Manifest
from moeconv.store.local import LocalStore

_MAX_REPORTED: Final = 20
_TENSORS: Final = (".safetensors", ".gguf", ".npz", ".npy", ".h5", ".msgpack", ".onnx", ".dduf")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".pt2", ".nemo", ".distcp")
_CODE: Final = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")
_INDEX: Final = ("index.json",)
_CONFIG: Final = ("config.json", "/params.json", "/quant_model_description.json")
# prefixes of files that programs read wherever they find them
_TEXTS: Final = ("tokenizer", "tekken", "vocab", "merges", "added_tokens", "special_tokens_map")
_TEMPLATES: Final = ("chat_template.json", ".jinja")


def risk_of(name: str, *, sharded: bool = False) -> str | None:
    """Why a file of this name is a risk: what programs do with it. None if they ignore it.

    sharded: whether the file is beside the files of an expert-parallel output.
    """
    name = f"/{name.lower()}"
    if name.endswith(_TENSORS):
        return "programs that load files by pattern would load it"
    if name.endswith(_PICKLES):
        return "programs that look for pickles would load it, and a pickle can run code"
    if name.endswith(_CODE):
        return "programs that trust a model's own code would run it"
    if name.endswith(_INDEX) and sharded:
        return "a loader that follows it would build a model without the ranks' experts"
    if name.endswith(_INDEX):
        return "loaders may follow it to tensors that are not the output's"
    if name.endswith(_CONFIG):
        return "programs read it to know what the tensors mean"
    if name.rpartition("/")[2].startswith(_TEXTS) or name.endswith(_TEMPLATES):
        return "programs read it to know what goes into the model"
    return None


def foreign_problems(root: Path, manifest: Manifest) -> tuple[list[MoeconvError], list[str]]:
    """Report files that were added: a problem if programs load such files, else a warning."""
    try:
        names = foreign_files(LocalStore(root), manifest)
    except MoeconvError as problem:
        return [problem], []
    sharded = manifest.root.ep_size is not None
    loaded = [(n, why) for n in names if (why := risk_of(n, sharded=sharded)) is not None]
    linked = "programs that follow links to directories would load what is there"
    loaded += [(n, linked) for n in names if (root / n).is_symlink() and (root / n).is_dir()]
    dangerous = {n for n, _ in loaded}
    harmless = [n for n in names if n not in dangerous]
    problems: list[MoeconvError] = [
        Damaged(
            f"{quoted(name)} does not belong to the output",
            at=quoted(name),
            cause=f"the manifest does not name it, but {why}",
            fix="remove it",
        )
        for name, why in loaded[:_MAX_REPORTED]
    ]
    if loaded[_MAX_REPORTED:]:
        more = len(loaded) - _MAX_REPORTED
        problems[-1].cause = f"{problems[-1].cause}; {more:,} more files like it were added"
    warnings = [f"{quoted(name)} is not part of this output" for name in harmless[:_MAX_REPORTED]]
    if harmless[_MAX_REPORTED:]:
        warnings.append(f"{len(harmless) - _MAX_REPORTED:,} more files are not part of this output")
    return problems, warnings
