"""Every failure a user can cause: one class each, with code, exit status, place, cause and fix."""

from __future__ import annotations

from typing import ClassVar, Final

_MAX_QUOTED: Final = 4096  # characters: names and paths are shorter


def printable(name: str) -> str:
    """The name with control and other non-printable characters escaped, safe for a terminal."""
    if name.isprintable():
        return name
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in name
    )


def abridged(text: str, most: int) -> str:
    """The text, or its beginning and end where it has more than `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}…{text[-half:]}"


def quoted(name: str) -> str:
    """A name out of a file, escaped and in backticks; the middle of a very long one is left out."""
    return f"`{printable(abridged(name, _MAX_QUOTED))}`"


class MoeconvError(Exception):
    """A failure with a stable `code`, the process `exit_code`, and four short texts.

    message: what is wrong, one sentence without a full stop; at: file and tensor;
    cause: the facts, with numbers; fix: what the user can do.
    also: further problems found in the same pass over the same document.
    A class may have a default `fix`, used where none is given.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 4
    fix: str | None = None

    def __init__(
        self,
        message: str,
        *,
        at: str | None = None,
        cause: str | None = None,
        fix: str | None = None,
        also: tuple[MoeconvError, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.at = at
        self.cause = cause
        if fix is not None:
            self.fix = fix
        self.also = also

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        lines += [
            f"  {key}: {text}"
            for key, text in (("at", self.at), ("cause", self.cause), ("fix", self.fix))
            if text
        ]
        lines += [str(other) for other in self.also]
        return "\n".join(lines)

    def with_also(self, others: tuple[MoeconvError, ...]) -> MoeconvError:
        """This error, carrying the other problems of the same document."""
        self.also = others
        return self


class UsageProblem(MoeconvError):
    """Options that contradict each other, or an invalid value."""

    code = "usage"
    exit_code = 2


class IoFailed(MoeconvError):
    """The operating system refused a read or a write."""

    code = "io"
    exit_code = 3


class Malformed(MoeconvError):
    """Input that breaks the rules of its own format."""

    code = "malformed"
    exit_code = 4


class Unsupported(MoeconvError):
    """Well-formed input that moeconv does not support."""

    code = "unsupported"
    exit_code = 5


class WouldOverwrite(MoeconvError):
    """OUT is not empty."""

    code = "would-overwrite"
    exit_code = 6
    fix = "move it elsewhere, then run again"


class InternalError(MoeconvError):
    """A plan that fails its own checks: a bug of moeconv, never the user's fault."""

    code = "internal"
    exit_code = 70


class BadSize(UsageProblem):
    """A size that is not a number with a unit such as GB or GiB."""

    code = "bad-size"


class UnsafeOutput(UsageProblem):
    """OUT equal to, inside or around SRC."""

    code = "output-overlaps-source"


class SourceMissing(IoFailed):
    """SRC does not exist or cannot be read."""

    code = "not-found"


class DiskFull(IoFailed):
    """Not enough free space for the output, known before the first byte."""

    code = "disk-full"


class MemoryShort(IoFailed):
    """The system has no memory for a tensor that must be permuted."""

    code = "memory-short"


class DownloadFailed(IoFailed):
    """huggingface_hub could not fetch a repository."""

    code = "download-failed"


class NotLocal(IoFailed):
    """A file whose bytes are needed, in a store of which only headers are read."""

    code = "not-local"


class SourceChanged(IoFailed):
    """A source file changed while it was read."""

    code = "source-changed"
    fix = "wait until nothing writes to the source, then run again"


class BadHeader(Malformed):
    """A safetensors header that breaks a rule without a class of its own."""

    code = "bad-header"
    fix = "download the file again; if the problem remains, report it to the file's author"


class TruncatedFile(BadHeader):
    """A shard that is shorter than its header says."""

    code = "truncated-shard"
    fix = "download the file again"


class TrailingBytes(BadHeader):
    """A shard that is longer than its header says."""

    code = "trailing-bytes"
    fix = "download the file again"


class OverlappingTensors(BadHeader):
    """Two tensors that share bytes."""

    code = "overlap"
    fix = "download the file again"


class HoleBetweenTensors(BadHeader):
    """Bytes of a data section that no tensor claims."""

    code = "hole"
    fix = "download the file again"


class HeaderTooLong(BadHeader):
    """A header length beyond the file, or beyond 100 MB."""

    code = "header-length"
    fix = "download the file again; if the problem remains, it is not a safetensors file"


class DuplicateKey(Malformed):
    """A JSON object with the same key twice."""

    code = "duplicate-key"


class BadJson(Malformed):
    """Not JSON, or JSON outside the limits."""

    code = "bad-json"
    fix = "download the file again"


class LfsPointer(Malformed):
    """A Git-LFS pointer where a shard should be."""

    code = "lfs-pointer"


class UnsafePath(Malformed):
    """A file name that is a path, or a link that leaves the checkpoint."""

    code = "unsafe-path"


class BadIndex(Malformed):
    """An index of the wrong form."""

    code = "bad-index"
    fix = "download the index again"


class TensorNotInFile(BadIndex):
    """The index names a tensor that its file does not hold."""

    code = "tensor-not-in-file"
    fix = "download the index and the shard again; they are of different revisions"


class TensorNotInIndex(BadIndex):
    """A file holds a tensor that the index does not name."""

    code = "tensor-not-in-index"
    fix = "download the index and the shard again; they are of different revisions"


class MissingShard(BadIndex):
    """The index names a file that is not there."""

    code = "missing-shard"


class DuplicateTensor(Malformed):
    """One tensor name in two files."""

    code = "duplicate-tensor"


class NoCheckpoint(Malformed):
    """A directory without safetensors files."""

    code = "no-checkpoint"


class BadConfig(Malformed):
    """A config.json that is not a JSON object."""

    code = "bad-config"


class NameCollision(Malformed):
    """Two files or tensors would get the same name in the output."""

    code = "name-collision"


class BadRecipe(MoeconvError):
    """A recipe file that breaks a rule of recipes."""

    code = "bad-recipe"
    exit_code = 2
    fix = "`moeconv recipes show qwen3_moe` prints one that works"


class AmbiguousLayout(UsageProblem):
    """More than one layout fits a stack; only `--from-layout` can decide."""

    code = "ambiguous-layout"


class MissingExpert(Malformed):
    """One projection of one expert is missing."""

    code = "missing-expert"
    fix = "download the shard again, then run `moeconv inspect SRC`"


class ExpertGap(Malformed):
    """An expert id without any tensor, below the last one."""

    code = "expert-gap"
    fix = "download the shard again, then run `moeconv inspect SRC`"


class ExpertOutOfRange(Malformed):
    """An expert id at or above the number of experts."""

    code = "expert-out-of-range"


class ExpertShape(Malformed):
    """One expert's tensor has another shape than those of the other experts."""

    code = "expert-shape"
    fix = "use a checkpoint whose experts all have the same shapes"


class ExpertDtype(Malformed):
    """One expert's tensor has another dtype than those of the other experts."""

    code = "expert-dtype"
    fix = "use a checkpoint whose experts all have the same dtypes"


class ScaleWithoutWeight(Malformed):
    """A companion of a weight that is not there."""

    code = "scale-without-weight"
    fix = "download the shard again, then run `moeconv inspect SRC`"


class MissingScale(Malformed):
    """Some experts of a stack have a companion (scales, bias), others lack it."""

    code = "missing-scale"
    fix = "download the shard again, then run `moeconv inspect SRC`"


class MixedLayouts(Malformed):
    """One stack stored in two layouts at once."""

    code = "mixed-layouts"


class ConfigMismatch(Malformed):
    """config.json and the tensors disagree."""

    code = "config-mismatch"
    fix = "use the config.json that belongs to these tensors"


class LayoutContradiction(Malformed):
    """Names of a known layout, but shapes that it cannot have."""

    code = "layout-contradiction"


class UnknownExpertTensor(Malformed):
    """A tensor inside an expert stack that the recipe does not know."""

    code = "unknown-expert-tensor"
    fix = "write a recipe that has them and give it with `--recipe FILE`"


class UnequalShared(Malformed):
    """Values that a layout stores once, but the source has different."""

    code = "unequal-shared"


class UnknownFamily(Unsupported):
    """No recipe for this model type."""

    code = "unknown-family"


class UnknownLayout(Unsupported):
    """The family has no layout of that name."""

    code = "unknown-layout"


class NoExperts(Unsupported):
    """A checkpoint without routed experts."""

    code = "no-experts"


class TooManyStacks(Unsupported):
    """More expert stacks than an output may have."""

    code = "too-many-stacks"


class NoPerExpertForm(Unsupported):
    """The family publishes no per-expert checkpoint."""

    code = "no-per-expert-form"


class StraddlingBlock(Unsupported):
    """A quantisation block that would span two projections."""

    code = "straddling-block"


class SubByteAxis(Unsupported):
    """A rearrangement that would cut inside a byte."""

    code = "sub-byte"


class BadPlacement(MoeconvError):
    """A well-formed placement map that does not fit the checkpoint or the ranks."""

    code = "bad-placement"
    exit_code = 2
    fix = "regenerate the map for this checkpoint"


class TorchNeeded(UsageProblem):
    """Something that only torch can read, and it is not installed."""

    code = "torch-needed"


class GeometryMismatch(UsageProblem):
    """An output for other ranks, with another placement or other tensors than the caller's."""

    code = "geometry-mismatch"


class DoesNotFit(UsageProblem):
    """A model and an output that do not have the same tensors."""

    code = "does-not-fit"


class BadManifest(Malformed):
    """A manifest that breaks a rule of FORMAT.md."""

    code = "bad-manifest"
    fix = "convert the checkpoint again; manifests must not be edited by hand"


class Unfinished(Malformed):
    """An output that was not written to the end."""

    code = "unfinished"


class Damaged(Malformed):
    """A file of an output that is not as it was written."""

    code = "damaged"
    fix = "fetch the output again, or convert again"


class DigestsMissing(Malformed):
    """An output without recorded digests, so that its bytes cannot be verified."""

    code = "digests-missing"


class BadPlacementFile(Malformed):
    """A placement map that breaks the rules of its own format."""

    code = "bad-placement-file"


class UnsupportedVersion(Unsupported):
    """A manifest of a newer major version, or with a feature this version lacks."""

    code = "unsupported-version"


class NotAnOutput(Unsupported):
    """Something was asked for that only an output of moeconv provides."""

    code = "not-a-set"


class NoTorchDtype(Unsupported):
    """A dtype of safetensors that torch lacks."""

    code = "no-torch-dtype"


class UnsupportedTransformers(Unsupported):
    """transformers is not installed, or in a version that this moeconv does not know."""

    code = "unsupported-transformers"


class NotVirtual(Unsupported):
    """A virtual output of a source that it cannot point into, or with bytes in another order."""

    code = "not-virtual"


class CannotResume(WouldOverwrite):
    """An unfinished OUT of another plan or another source."""

    code = "cannot-resume"
    fix = "choose another directory, or pass `--overwrite`"
