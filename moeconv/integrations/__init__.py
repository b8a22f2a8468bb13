"""What other programs need of moeconv, one file each; they are imported only when asked for."""

from __future__ import annotations

from moeconv.errors import UnsupportedTransformers


def dequantize_fused_fp8() -> None:
    """Make transformers multiply fused fp8 experts by their scales when it dequantises on load.

    transformers 5.23 leaves those scales out (`dequantize=True`, or no GPU that can use fp8). After
    this call `from_pretrained`, in this process, gives the same parameters for an fp8 checkpoint
    and for what `moeconv fuse` makes of it: block fp8 and one number per expert, of transformers'
    own models. Where scales are ambiguous, or fp8 experts have none, the load fails. What
    transformers keeps in fp8 is not touched.

    Raises:
        UnsupportedTransformers: it is not installed, or is of an unsupported version.
    """
    try:
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        from moeconv.integrations.transformers_fp8 import StackFP8HfQuantizer
    except ImportError as error:
        raise UnsupportedTransformers(
            "fused fp8 cannot be dequantised with this version of transformers",
            cause=str(error),
            fix="install transformers 5.23, or load what "
            "`moeconv unfuse OUT -o DIR --layout per-expert` writes",
        ) from error
    AUTO_QUANTIZER_MAPPING["fp8"] = StackFP8HfQuantizer
