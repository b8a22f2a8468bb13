"""Identify the expert stacks of a checkpoint, whoever wrote it: the one door of this package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor
from moeconv.checkpoint.output import OutputDocuments
from moeconv.checkpoint.source import Checkpoint
from moeconv.detect.detect import Detection, detect
from moeconv.detect.family import detect_foreign
from moeconv.detect.from_manifest import detection_from_manifest
from moeconv.detect.interpretations import recorded_ranks
from moeconv.layout.recipe import Recipe
from moeconv.layout.shipped import manifest_recipes
from moeconv.manifest.model import Manifest


def identify(
    checkpoint: Checkpoint,
    *,
    recipe: str | Path | None = None,
    from_layout: str | None = None,
) -> tuple[tuple[Recipe, ...], Detection]:
    """Return the recipes of a checkpoint and its stacks by them; problems are in the detection.

    recipe, from_layout: for foreign checkpoints; an output of moeconv carries its own.
    Raises UnknownFamily, BadRecipe.
    """
    manifest = checkpoint.manifest
    if manifest is not None and manifest.root.ep_size is not None:
        recipes = manifest_recipes(manifest.root)
        return recipes, detection_from_manifest(manifest, checkpoint.stored, recipes)
    names = tuple(f.name for f in checkpoint.files)
    tensors, config = checkpoint.tensors, checkpoint.config
    if manifest is not None:
        return _by_manifest(manifest, tensors, config, names, as_origin=False)
    if checkpoint.virtual is not None:
        # its layouts are those of the ranks; the tensors are those of the origin
        return _by_manifest(checkpoint.virtual.manifest, tensors, config, names, as_origin=True)
    return detect_foreign(checkpoint, recipe=recipe, from_layout=from_layout)


def identify_origin(output: OutputDocuments, config: Config) -> Detection:
    """Return the stacks of the foreign checkpoint that an output was made from."""
    tensors = tuple(t for f in output.origin.files for t in f.header.tensors)
    names = tuple(f.name for f in output.origin.files)
    _, detection = _by_manifest(output.manifest, tensors, config, names, as_origin=True)
    return detection


def _by_manifest(
    manifest: Manifest,
    tensors: tuple[StoredTensor, ...],
    config: Config,
    files: tuple[str, ...],
    *,
    as_origin: bool,
) -> tuple[tuple[Recipe, ...], Detection]:
    """Return recipes and stacks as the manifest records them.

    as_origin: the tensors are those of the origin, not of the output.
    """
    recipes = manifest_recipes(manifest.root)
    stacks = manifest.root.stacks
    recorded = {s.name: replace(s, layout=s.origin_layout) if as_origin else s for s in stacks}
    ranks = recorded_ranks(manifest)
    return recipes, detect(tensors, config, recipes, files=files, recorded=recorded, ranks=ranks)
