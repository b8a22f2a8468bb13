"""Files and directories: what cannot be read, is malformed, unsafe, or has no room."""

from __future__ import annotations

from moeconv.errors.kinds import IoFailed, Malformed, UsageProblem


class BadSize(UsageProblem):
    """A size that is not a number with GB or GiB."""

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


class SourceChanged(IoFailed):
    """A source file changed while it was read."""

    code = "source-changed"


class BadHeader(Malformed):
    """A safetensors header that breaks a rule not named below."""

    code = "bad-header"


class TruncatedFile(BadHeader):
    """A shard that is shorter than its header says."""

    code = "truncated-shard"


class TrailingBytes(BadHeader):
    """A shard that is longer than its header says."""

    code = "trailing-bytes"


class OverlappingTensors(BadHeader):
    """Two tensors that share bytes."""

    code = "overlap"


class HoleBetweenTensors(BadHeader):
    """Bytes of a data section that no tensor claims."""

    code = "hole"


class HeaderTooLong(BadHeader):
    """A header length beyond the file, or beyond 100 MB."""

    code = "header-length"


class DuplicateKey(Malformed):
    """A JSON object that says one key twice."""

    code = "duplicate-key"


class BadJson(Malformed):
    """Not JSON, or JSON outside the limits."""

    code = "bad-json"


class LfsPointer(Malformed):
    """A Git-LFS pointer where a shard should be."""

    code = "lfs-pointer"


class UnsafePath(Malformed):
    """A file name that is a path, or a link that leaves the checkpoint."""

    code = "unsafe-path"


class BadIndex(Malformed):
    """An index of the wrong form."""

    code = "bad-index"


class TensorNotInFile(BadIndex):
    """The index names a tensor that its file does not hold."""

    code = "tensor-not-in-file"


class TensorNotInIndex(BadIndex):
    """A file holds a tensor that the index does not name."""

    code = "tensor-not-in-index"


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
    """Two things would get the same name in the output."""

    code = "name-collision"
