"""Outputs of moeconv: their manifests, placements and what loads them."""

from __future__ import annotations

from moeconv.errors.kinds import Malformed, MoeconvError, Unsupported, UsageProblem, WouldOverwrite


class BadPlacement(MoeconvError):
    """A well-formed placement map that does not fit the checkpoint or the ranks."""

    code = "bad-placement"
    exit_code = 2


class TorchNeeded(UsageProblem):
    """Something that only torch can read, and it is not installed."""

    code = "torch-needed"


class GeometryMismatch(UsageProblem):
    """A set of other ranks, of another placement or of other tensors than the caller's."""

    code = "geometry-mismatch"


class DoesNotFit(UsageProblem):
    """A model and a set that do not have the same tensors."""

    code = "does-not-fit"


class BadManifest(Malformed):
    """A manifest that breaks a rule of FORMAT.md."""

    code = "bad-manifest"


class Unfinished(Malformed):
    """An output whose writing never came to its end."""

    code = "unfinished"


class Damaged(Malformed):
    """A file of a moeconv set that is not the one that was written."""

    code = "damaged"


class DigestsMissing(Malformed):
    """A set whose bytes nobody has read yet: there is nothing to hold them against."""

    code = "digests-missing"


class BadPlacementFile(Malformed):
    """A placement map that breaks the rules of its own format."""

    code = "bad-placement-file"


class UnsupportedVersion(Unsupported):
    """A manifest of a newer major version, or with a feature this version lacks."""

    code = "unsupported-version"


class NotASet(Unsupported):
    """A proof was asked for that only an output of moeconv can give."""

    code = "not-a-set"


class NoTorchDtype(Unsupported):
    """A dtype of safetensors that torch lacks."""

    code = "no-torch-dtype"


class UnsupportedTransformers(Unsupported):
    """transformers is not installed, or has another inside than this version of moeconv knows."""

    code = "unsupported-transformers"


class NotVirtual(Unsupported):
    """A virtual set of a source that it cannot point into, or whose bytes are in another order."""

    code = "not-virtual"


class CannotResume(WouldOverwrite):
    """A half-done OUT that is of another plan or another source."""

    code = "cannot-resume"
