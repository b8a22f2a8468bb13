"""What transformers lacks to dequantise fused block fp8: a rule from weights and scales to a stack.

transformers 5.23 has it for experts one by one only (`HfQuantizer.update_weight_conversions`).
For a stack it reports the scales as unexpected and leaves the weights unmultiplied.
The arithmetic is its own (`Fp8Dequantize`); as that takes any grid that divides a matrix, what
the scales mean is decided here, and a grid that could mean something else is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightTransform,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

SCALES: Final = "_scale_inv"
COMPANIONS: Final = (SCALES, "_activation_scale")
STACK_DIMENSIONS: Final = 3
UP_TO_THE_LAYER: Final = re.compile(r"^.*?\.\d+\.")
GATE_UP: Final = (".gate_up_proj", ".mlp.input_linear.weight")
# modules without attributes that say so: gate and up are in halves; whether they are transposed
TRANSPOSED: Final = {
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}
# two-dimensional, [(E I), H] all three
FLAT: Final = {"DbrxExpertGLU": "moe_num_experts"}
FLAT_TRANSPOSED: Final = "w2"
# of MXFP8 and MXFP4, whatever the block size of other tensors
GROUP: Final = 32
FP8: Final = ("F8_E4M3", "F8_E5M2", torch.float8_e4m3fn, torch.float8_e5m2)


class _UnreadTensor(Protocol):
    """A tensor of a file that safetensors has not read yet."""

    def get_dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class StorageOrder:
    """The storage order of a stack's matrices in the file: [E, rows, columns].

    transposed: rows are inputs. joint: gate and up are in it. interleaved: gate and up alternate by
    rows or columns, rather than being halves.
    """

    rows: int
    columns: int
    transposed: bool
    joint: bool = False
    interleaved: bool = False


class StackDequantize(ConversionOps):
    """Weights [E, O, K] under `NAME` and their scales under `NAME_scale_inv` to one [E, O, K].

    Scales are a grid for each expert in its matrix's order, [E, o, k], or numbers: [E], or [E, 2]
    for gate and up. DBRX's weights are [(E O), K], its grids [(E o), k].
    """

    def __init__(self, quantizer: FineGrainedFP8HfQuantizer, *, transposes: bool = False) -> None:
        # under this name transformers sees that the tensors must come as they are in the file
        self.hf_quantizer = quantizer
        # whether a rule of transformers transposes the stack afterwards
        self.transposes = transposes

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **_: object,
    ) -> dict[str, list[torch.Tensor]]:
        """The stack under its own name; one without scales is what the file has.

        Raises:
            ValueError: what the scales mean is not certain. transformers fails the load with it.
        """
        ((name, (weights,)),) = (
            (n, tensors) for n, tensors in input_dict.items() if not n.endswith(COMPANIONS)
        )
        if name + SCALES not in input_dict:
            if weights.dtype in FP8:
                raise ValueError(f"{full_layer_name}: fp8 weights without scales")
            return {name: [weights]}
        if model is None:
            raise ValueError(f"{full_layer_name}: fused fp8 is dequantised for a model only")
        (scales,) = input_dict[name + SCALES]
        path, parameter = full_layer_name.rsplit(".", 1)
        module = model.get_submodule(path)
        stack, scales = _as_stack(module, weights, scales)
        order = _storage_order(module, parameter, stack, transposes=self.transposes)
        order = replace(order, joint=full_layer_name.endswith(GATE_UP))
        block = self.hf_quantizer.quantization_config.weight_block_size
        grid = _grid(scales, order, len(stack), None if block is None else (block[0], block[1]))
        if grid is None:
            raise ValueError(
                f"{full_layer_name}: scales {[*scales.shape]} of weights {[*stack.shape]} are not "
                f"a grid of blocks {block}, nor one number each for gate and up; load "
                "what `moeconv unfuse --layout per-expert` writes"
            )
        parts = {"weight": stack, "weight_scale_inv": grid}
        done = Fp8Dequantize(self.hf_quantizer).convert({**parts}, full_layer_name, model)
        (out,) = done.values()
        one = out[0] if isinstance(out, list) else out
        return {name: [one.flatten(0, 1) if weights.ndim < STACK_DIMENSIONS else one]}

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
        if self._dequantises():
            for stack in _stacks(model):
                # those that read the stack under this name alone; they may transpose it
                known = [
                    rule
                    for rule in rules
                    if isinstance(rule, WeightConverter) and rule.source_patterns == [stack]
                ]
                operations = [op for rule in known for op in rule.operations]
                transposes = any(isinstance(op, Transpose) for op in operations)
                sources = [stack, *(stack + companion for companion in COMPANIONS)]
                # transformers finds a rule by its source: no second one may be left beside it, and
                # the first wins, where its own for every `weight` fits JetMoE's stacks, too
                rules = [rule for rule in rules if rule not in known]
                operations = [StackDequantize(self, transposes=transposes), *operations]
                rules.insert(0, WeightConverter(sources, stack, operations))
        return rules

    def get_new_dtype(
        self,
        converter: WeightTransform,
        param: torch.Tensor | _UnreadTensor,
        dtype: torch.dtype | None,
    ) -> torch.dtype | None:
        """transformers' answer, but no fp8 of experts is cast as if it had no scales.

        Raises:
            ValueError: there is no rule that dequantises these experts.
        """
        wanted: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        stored = param.dtype if isinstance(param, torch.Tensor) else param.get_dtype()
        (target, *_) = converter.target_patterns
        if wanted is not None and stored in FP8 and "experts" in target and self._dequantises():
            raise ValueError(
                f"{target}: fp8 experts of this form cannot be dequantised on load; load what "
                "`moeconv unfuse --layout per-expert` writes"
            )
        return wanted

    def _dequantises(self) -> bool:
        return bool(self.pre_quantized and self.quantization_config.dequantize)


def _as_stack(
    module: nn.Module, weights: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as [E, rows, columns], and a grid beside [(E rows), columns] likewise."""
    if weights.ndim == STACK_DIMENSIONS:
        return weights, scales
    experts = int(getattr(module, FLAT[type(module).__name__]))
    flat_grid = scales.ndim == weights.ndim and not len(scales) % experts
    return (
        weights.unflatten(0, (experts, -1)),
        scales.unflatten(0, (experts, -1)) if flat_grid else scales,
    )


def _storage_order(
    module: nn.Module, parameter: str, stack: torch.Tensor, *, transposes: bool
) -> StorageOrder:
    """The storage order: that of its module, or the other one if a rule transposes it afterwards.

    `joint` follows from the full name, and is set by the caller.

    Raises:
        ValueError: the module does not say.
    """
    packed = 2 if stack.dtype is torch.int8 else 1  # two values of MXFP4 in each
    rows, columns = stack.shape[1], stack.shape[2] * packed
    kind = type(module).__name__
    if kind in FLAT:
        return StorageOrder(rows, columns, transposed=parameter == FLAT_TRANSPOSED)
    transposed = getattr(module, "is_transposed", TRANSPOSED.get(kind))
    halves = getattr(module, "is_concatenated", kind in TRANSPOSED)
    if transposed is None:
        raise ValueError(f"{kind}.{parameter}: the order of gate and up in fused fp8 is not known")
    # transformers leaves square matrices as they are
    if transposes and stack.shape[1:] != module.get_parameter(parameter).shape[1:]:
        transposed = not transposed
    if transposed and packed > 1:
        raise ValueError(f"{kind}.{parameter}: the order of two packed values is not known")
    return StorageOrder(rows, columns, transposed, interleaved=not halves)


def _grid(
    scales: torch.Tensor, order: StorageOrder, experts: int, block: tuple[int, int] | None
) -> torch.Tensor | None:
    """Scales as [E, o, k], to be spread evenly over the matrices; None if ambiguous."""
    if scales.ndim == 0 or len(scales) != experts:
        return None
    if scales.numel() == experts:
        return scales.reshape(experts, 1, 1)
    if scales.ndim == STACK_DIMENSIONS and _fits(scales.shape[1], scales.shape[2], order, block):
        return scales
    if order.joint and scales.shape[1:] in {(2,), (2, 1)}:
        numbers = scales.reshape(experts, 2)
        if order.interleaved:
            numbers = numbers.repeat(1, (order.columns if order.transposed else order.rows) // 2)
        return numbers.unsqueeze(1 if order.transposed else 2)  # the axis that joins gate and up
    return None


def _fits(down: int, across: int, order: StorageOrder, block: tuple[int, int] | None) -> bool:
    """Whether a grid can only be one scale for each block of a matrix in this order."""
    if order.transposed:
        # a grid that is not transposed with the weights has the numbers of blocks exchanged
        groups = (down * GROUP, across) == (order.rows, order.columns) and down != across
    else:
        groups = (down, across * GROUP) == (order.rows, order.columns)
    if groups or block is None:
        return groups
    out, into = block
    per_row, per_column = (into, out) if order.transposed else (out, into)
    if order.joint and order.interleaved and max(down, across) > 1:
        # blocks alternate between gate and up, or hold both: ambiguous
        return False
    return _covers(
        down, order.rows, per_row, joint=order.joint and not order.transposed
    ) and _covers(across, order.columns, per_column, joint=order.joint and order.transposed)


def _covers(count: int, size: int, block: int, *, joint: bool) -> bool:
    """Whether this many blocks cover an axis: transformers makes them of one size, no remainder."""
    whole = count == 1 and size <= block
    halves = joint and count == 2 and size <= 2 * block
    return count * block == size or whole or halves


def _stacks(model: PreTrainedModel) -> list[str]:
    """The names of the parameters that hold all experts, from after the layer's number on."""
    stacks = (
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if ("experts" in path.split(".") or type(module).__name__ in TRANSPOSED)
        and (p.ndim == STACK_DIMENSIONS or type(module).__name__ in FLAT)
    )
    return sorted({UP_TO_THE_LAYER.sub("", name) for name in stacks})
