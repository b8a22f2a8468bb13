"""Identify the expert stacks of a checkpoint, whoever wrote it: the one door of this package.

An output of moeconv has a manifest. The family of any other is what config.json says, or the names
of the tensors where these disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor
from moeconv.checkpoint.model import Checkpoint
from moeconv.checkpoint.output import RecordedDocuments
from moeconv.detect.detect import Detection, detect
from moeconv.detect.from_manifest import detection_from_manifest
from moeconv.detect.interpretations import recorded_dims
from moeconv.detect.unmatched import with_unmatched
from moeconv.errors import UnknownExpertTensor, UnknownFamily, quoted
from moeconv.layout.recipe import SECTIONS, Recipe
from moeconv.layout.shipped import load_recipe, manifest_recipes, recipes_for, shipped_recipes
from moeconv.manifest.model import Manifest


def identify(
    checkpoint: Checkpoint, *, recipe: str | Path | None = None, from_layout: str | None = None
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
    return _identify_foreign(checkpoint, recipe, from_layout)


def identify_origin(output: RecordedDocuments, config: Config) -> Detection:
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
    dims = recorded_dims(manifest)
    return recipes, detect(tensors, config, recipes, files=files, recorded=recorded, dims=dims)


def _identify_foreign(
    checkpoint: Checkpoint, recipe: str | Path | None, from_layout: str | None
) -> tuple[tuple[Recipe, ...], Detection]:
    """Return the recipes of a checkpoint that moeconv did not write, and its stacks by them.

    recipe: name or file of the one to use, whatever config.json says.
    """
    names = tuple(f.name for f in checkpoint.files)
    recipes, notes = ((load_recipe(recipe),), ()) if recipe is not None else _by_config(checkpoint)
    detection = detect(
        checkpoint.tensors, checkpoint.config, recipes, files=names, from_layout=from_layout
    )
    if recipe is None and recipes:
        if _names_disagree(detection):
            recipes, detection = _by_names(checkpoint, recipes, detection)
        recipes, detection = with_unmatched(checkpoint, recipes, detection)
    return recipes, replace(detection, notes=(*notes, *detection.notes))


def _by_config(checkpoint: Checkpoint) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
    """Return the recipes for the model type, or for that of the language model in config.json.

    The second value are notes. Raises UnknownFamily.
    """
    config = checkpoint.config
    if chosen := recipes_for(model_type=config.model_type, architectures=config.architectures):
        return chosen, tuple(_conflicting_family(config, chosen))
    for section in filter(None, SECTIONS):
        part = config.at(section)
        inner = Config(part, present=True) if isinstance(part, dict) else Config()
        chosen = recipes_for(model_type=inner.model_type, architectures=inner.architectures)
        if chosen:
            kind = config.model_type
            who = f"no recipe knows model_type {quoted(kind)}" if kind else "there is no model_type"
            inner_kind = quoted(inner.model_type or ", ".join(inner.architectures))
            note = (
                f"{who}; the {quoted(section)} in config.json is {inner_kind}: its recipe is used"
            )
            return chosen, (note,)
    if not any("expert" in t.name for t in checkpoint.tensors):
        return (), ()
    raise _unknown_family(checkpoint)


def _conflicting_family(config: Config, recipes: tuple[Recipe, ...]) -> Iterator[str]:
    """Yield a note if model_type and architecture name two families (Kimi K2, pruned Qwen3.5)."""
    own = config.model_type or ""
    types = [t for r in recipes for t in r.model_types]
    for architecture in config.architectures:
        stem, whole, _ = architecture.partition("ForConditionalGeneration")
        stem = stem.partition("For")[0]
        # a text model is `X_text` by its type and `XForCausalLM` by its architecture
        mine = {_bare(own)} if whole else {_bare(own), _bare(own.removesuffix("_text"))}
        other = next((t for t in types if _bare(t) == _bare(stem)), None)
        if own in types and other and _bare(stem) not in mine:
            yield (
                f"config.json says model_type {quoted(own)} and architecture "
                f"{quoted(architecture)}, which belongs to {quoted(other)}: the names of the "
                "tensors decide"
            )


def _bare(name: str) -> str:
    """Return the letters of a name, sorted: architectures reorder the words of model types."""
    return "".join(sorted(name.replace("_", "").casefold()))


def _names_disagree(detection: Detection) -> bool:
    """Whether the tensors do not have the names of the family that config.json states."""
    if detection.stacks or detection.passthrough:
        return False
    kinds = {type(problem) for problem in detection.problems}
    return kinds == {UnknownExpertTensor} or (
        not kinds and any(".experts." in t.name for t in detection.others)
    )


def _by_names(
    checkpoint: Checkpoint, stated: tuple[Recipe, ...], detection: Detection
) -> tuple[tuple[Recipe, ...], Detection]:
    """Return the recipe whose names the tensors have, where config.json states another family."""
    match = _of_these_names(checkpoint, stated=stated)
    if match is None:
        return stated, detection
    recipe, found = match
    note = (
        f"config.json says model_type {quoted(checkpoint.config.model_type or '')}, but "
        f"the tensors have the names of recipe {quoted(recipe.name)}: the names win"
    )
    return (recipe,), replace(found, notes=(note, *found.notes))


def _of_these_names(
    checkpoint: Checkpoint, *, stated: tuple[Recipe, ...]
) -> tuple[Recipe, Detection] | None:
    """Return another recipe than the stated ones by which all stacks are complete, if there is one.

    Only recipes of families published per expert are tried: their names leave no layout open.
    """
    names = tuple(f.name for f in checkpoint.files)
    others = [r for r in shipped_recipes() if r.unfuse is not None and r not in stated]
    for recipe in sorted(others, key=lambda r: -len(r.model_types)):
        found = detect(checkpoint.tensors, checkpoint.config, (recipe,), files=names)
        alone = found.stacks and all(s.layout.name == recipe.unfuse for s in found.stacks)
        if alone and not found.problems and all(s.layout.per_expert for s in found.stacks):
            return recipe, found
    return None


def _unknown_family(checkpoint: Checkpoint) -> UnknownFamily:
    config, tensors = checkpoint.config, checkpoint.tensors
    sample = next(t.name for t in tensors if "expert" in t.name)
    kind = f"model_type is {quoted(config.model_type)}" if config.model_type else "no model_type"
    match = _of_these_names(checkpoint, stated=())
    return UnknownFamily(
        "no recipe knows this family of models",
        at="config.json" if config.present else "there is no config.json",
        cause=f"{kind}; the tensors have names like {quoted(sample)}",
        fix=f"these names fit recipe {quoted(match[0].name)}: if it is such a model, "
        f"pass `--recipe {match[0].name}`"
        if match
        else "`moeconv recipes list` shows the known families; pass one of them, or a recipe file "
        "of your own, with `--recipe`",
    )
