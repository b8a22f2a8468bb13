"""What must be true between the members of a root, once each of them is well-formed."""

from __future__ import annotations

from collections import Counter

from moeconv.core.digest import fingerprint
from moeconv.core.names import file_name_problem, relative_path_problem
from moeconv.core.schema import Problems
from moeconv.errors import quoted
from moeconv.manifest.model import (
    MAX_EXPERTS,
    ORIGIN_NAME,
    PARTS_DIR,
    ROOT_NAME,
    Manifest,
    Root,
    data_name,
    part_name,
    part_names,
)


def contradictions(manifest: Manifest) -> list[str]:
    """Contradictions between a root and its parts: totals, replicas, the fingerprint."""
    root, out = manifest.root, []
    tensors = sum(len(p.tensors) for p in manifest.parts)
    nbytes = sum(t.stop - t.start for p in manifest.parts for t in p.tensors)
    if (root.tensor_count, root.tensor_bytes) != (tensors, nbytes):
        out.append(
            f"its totals are {root.tensor_count:,} tensors and {root.tensor_bytes:,} bytes, "
            f"its parts have {tensors:,} and {nbytes:,}"
        )
    known: dict[str, str] = {}
    differ = {
        address
        for address, _, _, value in manifest.matrices()
        if known.setdefault(address, value) != value
    }
    if differ:
        out.append(
            f"{len(differ)} matrices have replicas with different digests: {quoted(min(differ))}"
        )
    value = fingerprint(manifest.fingerprint_lines()) if manifest.complete else None
    if value != root.fingerprint:
        out.append("its fingerprint does not match its digests")
    return out


def check_root(root: Root, problems: Problems) -> None:
    """Note where stacks, recipes, placements and names contradict each other."""
    known = {r.name for r in root.recipes}
    for number, stack in enumerate(root.stacks):
        place = f"stacks[{number}]"
        if stack.recipe not in known:
            problems.add(f"{place}.recipe", f"{quoted(stack.recipe)} is not among the recipes")
        # checked before anything iterates over them
        if max(stack.experts, len(stack.physical_to_logical or ())) > MAX_EXPERTS:
            problems.add(place, f"has more than {MAX_EXPERTS:,} experts or slots")
    _check_placements(root, problems)
    if root.ep_size and not problems.count:
        _check_part_names(root, problems)
    _check_names(root, problems)


def _check_placements(root: Root, problems: Problems) -> None:
    """Check that each expert has a slot, each slot an expert, and each rank as many slots."""
    for number, stack in enumerate(root.stacks):
        row = stack.physical_to_logical
        if row is None:
            continue
        place = f"stacks[{number}].physical_to_logical"
        if root.ep_size and len(row) % root.ep_size:
            problems.add(
                place,
                f"has {len(row)} slots, which cannot be split evenly among {root.ep_size} ranks",
            )
        placed = set(row)
        if max(placed, default=0) >= stack.experts:
            problems.add(place, f"names expert {max(placed)}, but there are only {stack.experts}")
        elif len(placed) != stack.experts:
            problems.add(place, f"has slots for only {len(placed)} of {stack.experts} experts")


def _check_part_names(root: Root, problems: Problems) -> None:
    wanted = part_names(root.ep_size or 0)
    for number, (name, part) in enumerate(zip(wanted, root.parts, strict=False)):
        if part.name != name:
            problems.add(f"parts[{number}].name", f"must be {quoted(name)}")
            break
    if len(root.parts) != len(wanted):
        problems.add("parts", "must be one for the common files and one for each of the ranks")


def _check_names(root: Root, problems: Problems) -> None:
    """Each file once, and each where this format puts it."""
    for number, part in enumerate(root.parts if root.ep_size is None else ()):
        data = data_name(part.name)
        fits = part.name == part_name(data) and not file_name_problem(data)
        if not fits and not relative_path_problem(part.name):
            problems.add(f"parts[{number}].name", f"must be `{PARTS_DIR}/NAME.json`")
    if root.origin.name != ORIGIN_NAME:
        problems.add("origin.name", f"must be `{ORIGIN_NAME}`")
    index = [root.index.name] if root.index else []
    if index and file_name_problem(index[0]):
        problems.add("index.name", "must be a plain file name")
    files = [data_name(p.name) for p in root.parts]
    others = [*index, *(s.name for s in root.sidecars)]
    reserved = [n for n in others if n.partition("/")[0] in (PARTS_DIR, ROOT_NAME)]
    twice = [name for name, count in Counter([*files, *others]).items() if count > 1]
    for name in dict.fromkeys([*twice, *reserved]):
        problems.add("", f"{quoted(name)} is named more than once")
