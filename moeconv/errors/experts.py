"""Experts: what is missing, misshapen or of no known form, and the recipes that say so."""

from __future__ import annotations

from moeconv.errors.kinds import Malformed, MoeconvError, Unsupported, UsageProblem


class BadRecipe(MoeconvError):
    """A recipe file that breaks a rule of recipes."""

    code = "bad-recipe"
    exit_code = 2


class AmbiguousLayout(UsageProblem):
    """More than one layout fits a stack; only `--from-layout` can say."""

    code = "ambiguous-layout"


class MissingExpert(Malformed):
    """One projection of one expert is missing."""

    code = "missing-expert"


class ExpertGap(Malformed):
    """An expert id without any tensor, below the last one."""

    code = "expert-gap"


class ExpertOutOfRange(Malformed):
    """An expert id at or above the number of experts."""

    code = "expert-out-of-range"


class ExpertShape(Malformed):
    """One expert's tensor has another shape than its fellows."""

    code = "expert-shape"


class ExpertDtype(Malformed):
    """One expert's tensor has another dtype than its fellows."""

    code = "expert-dtype"


class ScaleWithoutWeight(Malformed):
    """A companion of a weight that is not there."""

    code = "scale-without-weight"


class MissingScale(Malformed):
    """Some experts of a stack have a companion, others lack it."""

    code = "missing-scale"


class MixedLayouts(Malformed):
    """One stack stored in two layouts at once."""

    code = "mixed-layouts"


class ConfigMismatch(Malformed):
    """config.json and the tensors disagree."""

    code = "config-mismatch"


class LayoutContradiction(Malformed):
    """Names of a known layout, but shapes that it cannot have."""

    code = "layout-contradiction"


class UnknownExpertTensor(Malformed):
    """A tensor inside an expert stack that the recipe does not know."""

    code = "unknown-expert-tensor"


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
    """More expert stacks than a set may have."""

    code = "too-many-stacks"


class NoPerExpertForm(Unsupported):
    """The family publishes no per-expert checkpoint."""

    code = "no-per-expert-form"


class StraddlingBlock(Unsupported):
    """A quantisation block that would lie across two projections."""

    code = "straddling-block"


class SubByteAxis(Unsupported):
    """A rearrangement that would cut inside a byte."""

    code = "sub-byte"
