"""What transformers lacks to dequantise fused block fp8: a rule from weights and scales to a stack.

transformers 5.23 has it for experts one by one only (`HfQuantizer.update_weight_conversions`). Of a
stack it reports the scales as unexpected and goes on with weights that were never multiplied.
The arithmetic is its own (`Fp8Dequantize`).
"""

from __future__ import annotations

import re
from typing import Final

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

SCALES: Final = "_scale_inv"
COMPANIONS: Final = (SCALES, "_activation_scale")
STACK_DIMENSIONS: Final = 3
UP_TO_THE_LAYER: Final = re.compile(r"^.*?\.\d+\.")


class StackDequantize(ConversionOps):
    """Weights [E, O, K] under `NAME` and their scales under `NAME_scale_inv` to one [E, O, K].

    Scales are a grid for each expert, [E, o, k], or numbers: [E], or [E, 2] for gate and up.
    """

    def __init__(self, quantizer: FineGrainedFP8HfQuantizer) -> None:
        # under this name transformers sees that the tensors must come as they are in the file
        self.hf_quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **_: object,
    ) -> dict[str, list[torch.Tensor]]:
        """The stack under its own name; one without scales is what the file has."""
        ((name, (weights,)),) = (
            (n, tensors) for n, tensors in input_dict.items() if not n.endswith(COMPANIONS)
        )
        if name + SCALES not in input_dict:
            return {name: [weights]}
        (scales,) = input_dict[name + SCALES]
        parts = {"weight": weights, "weight_scale_inv": _grids(scales)}
        done = Fp8Dequantize(self.hf_quantizer).convert({**parts}, full_layer_name, model)
        (stack,) = done.values()
        return {name: stack if isinstance(stack, list) else [stack]}

    @property
    def reverse_op(self) -> ConversionOps:
        """fp8 again where transformers saves, as it does with experts one by one."""
        return Fp8Dequantize(self.hf_quantizer).reverse_op


class StackFP8HfQuantizer(FineGrainedFP8HfQuantizer):
    """transformers' quantizer for fp8, with a rule for every stack of the model at hand."""

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """transformers' rules; where it has one for a stack, the stack is dequantised first."""
        rules: list[WeightTransform] = super().update_weight_conversions(weight_conversions, model)
        if self.pre_quantized and self.quantization_config.dequantize:
            for stack in _stacks(model):
                known = _rules_of(stack, rules)
                operations = [op for rule in known for op in rule.operations]
                sources = [stack, *(stack + companion for companion in COMPANIONS)]
                # transformers finds a rule by its source: no second one may be left beside it
                rules = [rule for rule in rules if rule not in known]
                rules.append(WeightConverter(sources, stack, [StackDequantize(self), *operations]))
        return rules


def _grids(scales: torch.Tensor) -> torch.Tensor:
    """Scales as [E, o, k]."""
    return scales if scales.ndim == STACK_DIMENSIONS else scales.reshape(len(scales), -1, 1)


def _stacks(model: PreTrainedModel) -> list[str]:
    """The names of experts' three-dimensional parameters, from after the layer's number on."""
    stacks = (
        n
        for n, p in model.named_parameters()
        if p.ndim == STACK_DIMENSIONS and "experts" in n.split(".")
    )
    return sorted({UP_TO_THE_LAYER.sub("", name) for name in stacks})


def _rules_of(stack: str, rules: list[WeightTransform]) -> list[WeightConverter]:
    """The rules that read a stack under this name alone; that they turn it must go on."""
    return [
        rule
        for rule in rules
        if isinstance(rule, WeightConverter) and rule.source_patterns == [stack]
    ]
