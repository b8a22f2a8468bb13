"""Documents of expert-parallel sets that break one rule of the format each.

A breach is an edit of a good document, who finds it, and what must be said. `expressed`: the
JSON Schema sees it too; it knows one document at a time and no arithmetic.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from moeconv.errors import BadManifest, Damaged, MissingExpert, MoeconvError, UnsupportedVersion
from tests.manifest.epsamples import COMMON, COMMON_FILE, RANK_0, RANK_0_FILE, RANK_1, RANK_1_FILE
from tests.manifest.samples import ROOT_NAME, Edit

READER: Final = "reader"  # parse_root or parse_parts refuses the document
OPENING: Final = "opening"  # open_source finds it, from headers and documents
VERIFY: Final = "verify"  # only verify finds it


@dataclass(frozen=True)
class Breach:
    """One rule, broken."""

    name: str
    kind: str  # of set
    document: str
    edit: Edit
    facts: tuple[str, ...]
    error: type[MoeconvError] = BadManifest
    by: str = READER
    expressed: bool = True


# --- edits -------------------------------------------------------------------------------------
def put(*path: object) -> Edit:
    """Set the member at a path to the path's last item."""
    *way, key, value = path

    def edit(doc: Any) -> None:
        for step in way:
            doc = doc[step]
        doc[key] = value

    return edit


def drop(*path: object) -> Edit:
    """Remove the member at a path."""
    *way, key = path

    def edit(doc: Any) -> None:
        for step in way:
            doc = doc[step]
        del doc[key]

    return edit


def first(change: Callable[[Any], object], *, of: str = "") -> Edit:
    """Change a part's first tensor whose name ends in `of`."""

    def edit(doc: Any) -> None:
        change(next(t for t in tensors(doc) if t["name"].endswith(of)))

    return edit


def tensors(doc: Any) -> Iterator[Any]:
    """All tensors of a part for ranks."""
    for file in doc["files"]:
        yield from file["tensors"]
    yield from doc.get("virtual", [])


def swapped(key: str, one: int, other: int) -> Edit:
    """Exchange two items of a list."""

    def edit(doc: Any) -> None:
        items = doc[key]
        items[one], items[other] = items[other], items[one]

    return edit


def _repeat_tensor(doc: Any) -> None:
    doc["files"][0]["tensors"].append(doc["files"][0]["tensors"][0])


def _repeat_file(doc: Any) -> None:
    doc["files"].append(doc["files"][0])


def _without_first(doc: Any) -> None:
    doc["virtual"].pop(0)


def _experts_for_slots(tensor: Any) -> None:
    del tensor["expert"]["slots"]
    tensor["expert"]["experts"] = [0, 3]


def _slots_for_experts(tensor: Any) -> None:
    tensor["expert"]["slots"] = tensor["expert"].pop("experts")


def _exchanged(doc: Any) -> None:
    """The first two tensors point to each other's bytes."""
    one, other = list(tensors(doc))[1:3]
    one["runs"], other["runs"] = other["runs"], one["runs"]


ROW = ("stacks", 0, "physical_to_logical")


def root(
    name: str, edit: Edit, *facts: str, kind: str = "fused", expressed: bool = True, **how: Any
) -> Breach:
    """A breach of the root."""
    return Breach(name, kind, ROOT_NAME, edit, facts, expressed=expressed, **how)


def row(name: str, value: object, *facts: str, expressed: bool = False) -> Breach:
    """A placement that is none."""
    return root(name, put(*ROW, value), "physical_to_logical", *facts, expressed=expressed)


def virtual(name: str, edit: Edit, *facts: str, expressed: bool = True, **how: Any) -> Breach:
    """A breach of a virtual set's root."""
    return root(name, edit, *facts, kind="virtual", expressed=expressed, **how)


def part(
    name: str,
    document: str,
    edit: Edit,
    *facts: str,
    kind: str = "fused",
    expressed: bool = True,
    **how: Any,
) -> Breach:
    """A breach of a part."""
    return Breach(name, kind, document, edit, facts, expressed=expressed, **how)


SIZE = ("sharding", "ep_size")
SOURCE = ("source", "files", 0)
LATER = put("requires", ["expert-parallel", "pipeline-parallel"])

ROOTS: Final = (
    # --- sharding ---
    root("ep size 0", put(*SIZE, 0), "sharding.ep_size", "between 1"),
    root("ep size -1", put(*SIZE, -1), "sharding.ep_size"),
    root("ep size huge", put(*SIZE, 2**53 - 1), "sharding.ep_size", "99,999"),
    root("ep size true", put(*SIZE, True), "sharding.ep_size"),  # noqa: FBT003
    root("ep size null", put(*SIZE, None), "sharding.ep_size"),
    root("ep size absent", drop(*SIZE), "sharding.ep_size", "missing"),
    root("sharding absent", drop("sharding"), "sharding"),
    root("sharding null", put("sharding", None), "sharding"),
    root("sharding with more", put("sharding", "ranks", 2), "sharding.ranks", "unknown key"),
    # --- requires ---
    root("sharding not required", put("requires", []), "sharding: unknown key"),
    root("feature twice", put("requires", ["expert-parallel"] * 2), "requires", "twice"),
    root("feature unknown", LATER, "pipeline-parallel", error=UnsupportedVersion),
    virtual("source not required", put("requires", ["expert-parallel"]), "source: unknown key"),
    virtual("virtual alone", put("requires", ["virtual"]), "requires", "expert-parallel"),
    root("virtual without source", put("requires", ["expert-parallel", "virtual"]), "source"),
    # --- what a whole set has, too ---
    root("an index", lambda d: d.update(index=d["origin"]), "index", "must be null"),
    root("index absent", drop("index"), "index"),
    root("fingerprint null", put("fingerprint", None), "fingerprint"),
    root("two stacks of one name", put("stacks", 1, "name", "model.layers.0.mlp.experts"),
         "replicas", error=Damaged, by=OPENING, expressed=False),
    # --- parts ---
    root("a part too few", lambda d: d["parts"].pop(), "parts: must be one", expressed=False),
    root("a part too many", lambda d: d["parts"].append(
        d["parts"][0] | {"name": "moeconv/rank-00002-of-00002.json"}),
        "parts: must be one", expressed=False),
    root("parts in another order", swapped("parts", 1, 2), "parts[1].name", RANK_0,
         expressed=False),
    root("common not first", swapped("parts", 0, 1), "parts[0].name", COMMON),
    root("ranks from one", put("parts", 2, "name", "moeconv/rank-00002-of-00002.json"),
         "parts[2].name", RANK_1, expressed=False),
    root("parts of another ep size", put("parts", 2, "name", "moeconv/rank-00001-of-00004.json"),
         "parts[2].name", RANK_1, expressed=False),
    root("a part elsewhere", put("parts", 2, "name", "rank-00001-of-00002.json"), "parts[2].name"),
    root("no parts", put("parts", []), "parts"),
    root("another ep size", put(*SIZE, 3), "parts", expressed=False),
    # --- placement ---
    row("slots that do not divide", [3, 1, 0, 2, 1], "5 slots", "2 ranks"),
    row("an id beyond the experts", [3, 1, 0, 4, 1, 2], "names expert 4, but there are only 4"),
    row("an expert in no slot", [3, 1, 0, 1, 1, 3], "3 of 4"),
    row("a slot of none", [3, 1, 0, -1, 1, 2], expressed=True),
    row("a slot that is no number", [3, 1, 0, "2", 1, 2], expressed=True),
    row("no slots", [], "0 of 4", expressed=True),
    row("row null", None, expressed=True),
    row("row of rows", [[3, 1, 0], [2, 1, 3]], expressed=True),
    root("a row for what stays whole", put("stacks", 1, "physical_to_logical", [0, 1, 2, 0]),
         "mtp.layers.0.mlp.experts.", "in the files of ranks", by=OPENING, expressed=False),
    root("no row for what is shared", drop(*ROW), "stack: its experts are in the common files",
         RANK_0, expressed=False),
    # a placement that moves experts under the bytes that are there
    root("another placement", put(*ROW, [1, 3, 0, 2, 1, 3]), "replicas", error=Damaged, by=VERIFY,
         expressed=False),
    root("more experts than anybody can count", put("stacks", 1, "experts", 2**53 - 1),
         "stacks[1]", "1,048,576"),
    root("more experts than there are", put("stacks", 1, "experts", 2**20),
         "3 of 1048576 slots", error=MissingExpert, by=OPENING, expressed=False),
    root("more ranks than there are", lambda d: (
        put(*SIZE, 99_999)(d), drop(*ROW)(d)), "parts: must be one", expressed=False),
    # --- source ---
    virtual("source absent", drop("source"), "source"),
    virtual("directory absent", drop("source", "directory"), "source.directory", "missing"),
    virtual("directory relative", put("source", "directory", "source"), "source.directory"),
    virtual("directory empty", put("source", "directory", ""), "source.directory"),
    virtual("directory of the Hub", put("source", "directory", "hf://org/name"),
            "source.directory"),
    virtual("source file is a path", put(*SOURCE, "name", "../x.safetensors"),
            "source.files[0].name"),
    virtual("source file twice", lambda d: d["source"]["files"].append(d["source"]["files"][0]),
            "source.files", "each once"),
    virtual("source files disordered", lambda d: d["source"]["files"].insert(
        0, d["source"]["files"][0] | {"name": "z"}), "source.files", "order", expressed=False),
    virtual("mtime of one number", put(*SOURCE, "mtime", [1]), "source.files[0].mtime"),
    virtual("mtime a number", put(*SOURCE, "mtime", 1), "source.files[0].mtime"),
    virtual("mtime of a whole second", put(*SOURCE, "mtime", [1, 10**9]), "source.files[0].mtime"),
    virtual("mtime before its time", put(*SOURCE, "mtime", [-1, 0]), "source.files[0].mtime"),
    virtual("source header digest", put(*SOURCE, "header", "digest", "0"), "header.digest"),
    virtual("source size absent", drop(*SOURCE, "size"), "source.files[0].size"),
    virtual("source with more", put("source", "url", "x"), "source.url", "unknown key"),
    virtual("fingerprint absent", drop("fingerprint"), "fingerprint"),
    virtual("fingerprint of digests that are not there", put("fingerprint", "0" * 32),
            ROOT_NAME, "fingerprint", error=Damaged, by=VERIFY, expressed=False),
)  # fmt: skip

PARTS: Final = (
    # --- rank and files ---
    part("another rank", RANK_1, put("rank", 0), "rank: is not", expressed=False),
    part("rank of common", COMMON, put("rank", 0), "rank: is not"),
    part("no rank", RANK_1, put("rank", None), "rank: is not"),
    part("rank absent", COMMON, drop("rank"), "rank: is missing"),
    part("rank beyond", RANK_1, put("rank", 2), "rank: is not", expressed=False),
    part("rank a text", RANK_1, put("rank", "1"), "rank: must"),
    part("files absent", RANK_1, drop("files"), "files: is missing"),
    part("file named twice", RANK_1, _repeat_file, "files[0].file", expressed=False),
    part("the file of another rank", RANK_1, put("files", 0, "file", RANK_0_FILE),
         "files[0].file", RANK_1_FILE, expressed=False),
    part("a common file of a rank", RANK_1, put("files", 0, "file", COMMON_FILE),
         "files[0].file", RANK_1_FILE),
    part("files counted from nought", COMMON,
         put("files", 0, "file", "common-00000-of-00001.safetensors"), "files[0].file",
         expressed=False),
    part("a file that is a path", COMMON, put("files", 0, "file", f"a/{COMMON_FILE}"), "file"),
    part("tensors of a whole set", RANK_1, put("tensors", []), "tensors: unknown key"),
    part("runs in no virtual set", RANK_1, put("virtual", []), "virtual: unknown key"),
    # --- tensors ---
    part("two of one name", COMMON, _repeat_tensor, "appears twice", "down_scale",
         expressed=False),
    part("no expert in a rank's file", RANK_1, first(lambda t: t.pop("expert")), "expert",
         "common files"),
    part("expert null", COMMON, first(lambda t: t.update(expert=None), of="norm"), "expert"),
    part("experts in a rank's file", RANK_1, first(_experts_for_slots), "slots",
         "experts: unknown key"),
    part("slots in a common file", COMMON, first(_slots_for_experts, of="gate_up"),
         "slots: unknown key"),
    part("experts beside slots", RANK_1, first(lambda t: t["expert"].update(experts=[0, 3])),
         "experts: unknown key"),
    part("slots of another rank", RANK_1, first(lambda t: t["expert"].update(slots=[0, 3])),
         "slots", "rank 1", expressed=False),
    part("slots of two ranks", RANK_1, first(lambda t: t["expert"].update(slots=[2, 5])),
         "slots", "rank 1", expressed=False),
    part("slots beyond", RANK_1, first(lambda t: t["expert"].update(slots=[4, 7])), "slots",
         expressed=False),
    part("slots of nothing", RANK_1, first(lambda t: t["expert"].update(slots=[3, 3])), "slots",
         expressed=False),
    part("slots backwards", RANK_1, first(lambda t: t["expert"].update(slots=[6, 3])), "slots",
         expressed=False),
    part("slots of three numbers", RANK_1, first(lambda t: t["expert"].update(slots=[3, 4, 5])),
         "slots"),
    part("slots absent", RANK_1, first(lambda t: t["expert"].pop("slots")), "slots: is missing"),
    part("slots of a stack that stays whole", RANK_1, first(lambda t: t["expert"].update(stack=1)),
         "stack: its experts are in the common files", expressed=False),
    part("fewer slots than the tensor has", RANK_1, first(lambda t: (
        t["expert"].update(slots=[3, 5]), t["digests"].pop())), "recipe makes it", by=OPENING,
         expressed=False),
    part("a digest too few", RANK_1, first(lambda t: t["digests"].pop()), "digests: must be 3",
         expressed=False),
    part("no digests", RANK_1, first(lambda t: t.update(digests=[])), "digests: must be 3",
         expressed=False),
    part("replicas of different digests", RANK_1, first(lambda t: t["digests"].reverse()),
         "replicas", error=Damaged, by=OPENING, expressed=False),
    part("another slot's number in the name", RANK_1, first(
        lambda t: t["expert"].update(slots=[4, 5]), of="0.down.weight"),
         "replicas", error=Damaged, kind="per-expert", by=OPENING, expressed=False),
    # --- local ---
    part("local absent", COMMON, first(lambda t: t["expert"].pop("local")), "`local` is None",
         kind="per-expert", by=OPENING, expressed=False),
    part("local null", COMMON, first(lambda t: t["expert"].update(local=None)), "local",
         kind="per-expert"),
    part("local without a slot", COMMON, first(lambda t: t["expert"].update(local="scale")),
         "local: must contain `{slot}` once", kind="per-expert"),
    part("local with two slots", COMMON, first(
        lambda t: t["expert"].update(local="{slot}.{slot}")), "local: must contain `{slot}` once",
         kind="per-expert"),
    part("local of another name", COMMON, first(lambda t: t["expert"].update(local="{slot}.x")),
         "recipe makes it", kind="per-expert", by=OPENING, expressed=False),
    part("local for many experts", COMMON, first(lambda t: t["expert"].update(local="{slot}")),
         "local: is only for a tensor of one expert", expressed=False),
    part("local for what stays whole", COMMON, first(
        lambda t: t["expert"].update(local="{slot}.down.weight"), of="0.down.weight"),
         "local: is only", kind="per-expert", expressed=False),
    part("local on a rank", RANK_1, first(lambda t: t["expert"].update(local="{slot}")),
         "local: is only for tensors in the common files", kind="per-expert"),
    # --- virtual ---
    part("files in a virtual set", RANK_1, lambda d: d["files"].append(
        {"file": RANK_1_FILE, "size": 8, "header": {"size": 8, "digest": "0" * 32},
         "tensors": []}), "files: must be empty", kind="virtual"),
    part("virtual null", RANK_1, put("virtual", None), "virtual", kind="virtual"),
    part("a tensor with offsets", RANK_1, first(lambda t: t.update(start=0, stop=48)),
         "start: unknown key", kind="virtual"),
    part("runs absent", RANK_1, first(lambda t: t.pop("runs")), "runs: is missing",
         kind="virtual"),
    part("a run of a file that is not there", RANK_1, first(
        lambda t: t["runs"][1].__setitem__(0, 1)), "runs", "run 1", kind="virtual",
         expressed=False),
    part("a run beyond the file", RANK_1, first(
        lambda t: t["runs"][2].__setitem__(1, 10**6)), "runs", "run 2", kind="virtual",
         expressed=False),
    part("a run of two numbers", RANK_1, first(lambda t: t["runs"][0].pop()), "runs[0]",
         kind="virtual"),
    part("a negative run", RANK_1, first(lambda t: t["runs"][0].__setitem__(1, -16)), "runs[0]",
         kind="virtual"),
    part("a run too short", RANK_1, first(lambda t: t["runs"][0].__setitem__(2, 15)), RANK_1,
         "down", "47 bytes", kind="virtual", error=Damaged, by=VERIFY, expressed=False),
    part("a run too long", RANK_1, first(lambda t: t["runs"][0].__setitem__(2, 17)), RANK_1,
         "down", "49 bytes", kind="virtual", error=Damaged, by=VERIFY, expressed=False),
    part("a run too few", RANK_1, first(lambda t: t["runs"].pop()), RANK_1, "down",
         kind="virtual", error=Damaged, by=VERIFY, expressed=False),
    part("a dtype that is none", RANK_1, first(lambda t: t.update(dtype="BF17")), RANK_1, "BF17",
         kind="virtual", error=Damaged, by=VERIFY, expressed=False),
    part("a dtype that is not ASCII", RANK_1, first(lambda t: t.update(dtype="\u202e")), "dtype",
         "capital letters"),
    part("a dtype of two words", RANK_1, first(lambda t: t.update(dtype="F32 [4]")), "dtype"),
    part("runs of another expert", RANK_1, first(lambda t: t["runs"].reverse()), RANK_1, "down",
         "bytes that do not belong", kind="virtual", error=Damaged, by=VERIFY, expressed=False),
    part("runs of another projection", RANK_1, _exchanged, RANK_1, "gate",
         "bytes that do not belong", kind="virtual-per-expert", error=Damaged, by=VERIFY,
         expressed=False),
    part("digests of wrong count", RANK_1, first(lambda t: t.update(digests=["0" * 32])),
         "digests: must be 3", kind="virtual", expressed=False),
    part("a digest that is none", RANK_1, first(lambda t: t.update(digests=["0"] * 3)),
         "digests: must be", kind="virtual"),
    part("a common tensor of a rank's name", COMMON, first(
        lambda t: t.update(name="model.layers.0.mlp.experts.down"), of="norm"), RANK_0,
         "mlp.experts.down", "common files too", kind="virtual", error=Damaged, by=VERIFY,
         expressed=False),
    part("a slot missing", RANK_1, _without_first, "5 of 6 slots", kind="virtual-per-expert",
         error=MissingExpert, by=VERIFY, expressed=False),
)  # fmt: skip
