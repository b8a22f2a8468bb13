"""What transformers lacks to dequantise fused block fp8: a rule from weights and scales to a stack.

transformers 5.23 has it for experts one by one only (`HfQuantizer.update_weight_conversions`). Of a
stack it reports the scales as unexpected and goes on with weights that were never multiplied.
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
# of modules that do not say it themselves: gate and up in halves, and whether turned
TURNED: Final = {
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}
# two-dimensional, [(E I), H] all three
FLAT: Final = {"DbrxExpertGLU": "moe_num_experts"}
FLAT_TURNED: Final = "w2"
# of MXFP8 and MXFP4, whatever block size is said for the rest
GROUP: Final = 32
FP8: Final = ("F8_E4M3", "F8_E5M2", torch.float8_e4m3fn, torch.float8_e5m2)


class _InFile(Protocol):
    """A tensor of a file that safetensors has not read yet."""

    def get_dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Lie:
    """How the matrices of a stack lie in the file: [E, rows, columns].

    turned: rows are inputs. joint: gate and up are in it. alternating: by rows or columns, rather
    than by halves.
    """

    rows: int
    columns: int
    turned: bool
    joint: bool = False
    alternating: bool = False


class StackDequantize(ConversionOps):
    """Weights [E, O, K] under `NAME` and their scales under `NAME_scale_inv` to one [E, O, K].

    Scales are a grid for each expert as its matrix lies, [E, o, k], or numbers: [E], or [E, 2] for
    gate and up. DBRX's weights are [(E O), K], its grids [(E o), k].
    """

    def __init__(self, quantizer: FineGrainedFP8HfQuantizer, *, turns: bool = False) -> None:
        # under this name transformers sees that the tensors must come as they are in the file
        self.hf_quantizer = quantizer
        # whether a rule of transformers turns the stack afterwards, where it is not as it should be
        self.turns = turns

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
            ValueError: what the scales mean is not certain. transformers says it of the load.
        """
        ((name, (weights,)),) = (
            (n, tensors) for n, tensors in input_dict.items() if not n.endswith(COMPANIONS)
        )
        if name + SCALES not in input_dict:
            if weights.dtype in FP8:
                raise ValueError(
                    f"{full_layer_name}: fp8 weights whose scales do not come with them"
                )
            return {name: [weights]}
        if model is None:
            raise ValueError(f"{full_layer_name}: fused fp8 is dequantised for a model only")
        (scales,) = input_dict[name + SCALES]
        path, parameter = full_layer_name.rsplit(".", 1)
        module = model.get_submodule(path)
        stack, scales = _as_stack(module, weights, scales)
        lie = _lie(module, parameter, stack, turns=self.turns)
        lie = replace(lie, joint=full_layer_name.endswith(GATE_UP))
        block = self.hf_quantizer.quantization_config.weight_block_size
        grid = _grid(scales, lie, len(stack), None if block is None else (block[0], block[1]))
        if grid is None:
            raise ValueError(
                f"{full_layer_name}: scales {[*scales.shape]} of weights {[*stack.shape]} are no "
                f"grid of blocks {block} as these lie, nor numbers that can be told apart; load "
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
                known = _rules_of(stack, rules)
                operations = [op for rule in known for op in rule.operations]
                turns = any(isinstance(op, Transpose) for op in operations)
                sources = [stack, *(stack + companion for companion in COMPANIONS)]
                # transformers finds a rule by its source: no second one may be left beside it, and
                # the first wins, where its own for every `weight` fits JetMoE's stacks, too
                rules = [rule for rule in rules if rule not in known]
                operations = [StackDequantize(self, turns=turns), *operations]
                rules.insert(0, WeightConverter(sources, stack, operations))
        return rules

    def get_new_dtype(
        self, converter: WeightTransform, param: torch.Tensor | _InFile, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """transformers' answer, but no fp8 of experts is cast as if it had no scales.

        Raises:
            ValueError: there is no rule that dequantises these experts.
        """
        wanted: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        held = param.dtype if isinstance(param, torch.Tensor) else param.get_dtype()
        (target, *_) = converter.target_patterns
        if wanted is not None and held in FP8 and "experts" in target and self._dequantises():
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


def _lie(module: nn.Module, parameter: str, stack: torch.Tensor, *, turns: bool) -> Lie:
    """How a stack lies: as its module has it, or the other way about if a rule turns it then.

    Whether gate and up are in it, its whole name tells.

    Raises:
        ValueError: the module does not tell.
    """
    packed = 2 if stack.dtype is torch.int8 else 1  # two values of MXFP4 in each
    rows, columns = stack.shape[1], stack.shape[2] * packed
    kind = type(module).__name__
    if kind in FLAT:
        return Lie(rows, columns, turned=parameter == FLAT_TURNED)
    turned = getattr(module, "is_transposed", TURNED.get(kind))
    halves = getattr(module, "is_concatenated", kind in TURNED)
    if turned is None:
        raise ValueError(f"{kind}.{parameter}: how gate and up lie in fused fp8 is not known")
    # a square one transformers leaves as it is
    if turns and stack.shape[1:] != module.get_parameter(parameter).shape[1:]:
        turned = not turned
    if turned and packed > 1:
        raise ValueError(f"{kind}.{parameter}: which of two packed values is which is not known")
    return Lie(rows, columns, turned, alternating=not halves)


def _grid(
    scales: torch.Tensor, lie: Lie, experts: int, block: tuple[int, int] | None
) -> torch.Tensor | None:
    """Scales as [E, o, k], to be spread evenly over the matrices as they lie; None if unsure."""
    if scales.ndim == 0 or len(scales) != experts:
        return None
    if scales.numel() == experts:
        return scales.reshape(experts, 1, 1)
    if scales.ndim == STACK_DIMENSIONS and _fits(scales.shape[1], scales.shape[2], lie, block):
        return scales
    if lie.joint and scales.shape[1:] in {(2,), (2, 1)}:
        return _pairs(scales.reshape(experts, 2), lie)
    return None


def _pairs(numbers: torch.Tensor, lie: Lie) -> torch.Tensor:
    """A number for gate and one for up, [E, 2], along the axis on which they lie."""
    if lie.alternating:
        numbers = numbers.repeat(1, (lie.columns if lie.turned else lie.rows) // 2)
    return numbers.unsqueeze(1 if lie.turned else 2)


def _fits(down: int, across: int, lie: Lie, block: tuple[int, int] | None) -> bool:
    """Whether a grid has one scale for each block of a matrix as it lies, and no other meaning."""
    if lie.turned:
        # a grid that is not turned with the weights has the numbers of blocks changed over
        groups = (down * GROUP, across) == (lie.rows, lie.columns) and down != across
    else:
        groups = (down, across * GROUP) == (lie.rows, lie.columns)
    if groups or block is None:
        return groups
    out, into = block
    per_row, per_column = (into, out) if lie.turned else (out, into)
    if lie.joint and lie.alternating and max(down, across) > 1:
        # blocks of gate and of up in turn, or blocks of both: nothing tells
        return False
    return _covers(down, lie.rows, per_row, joint=lie.joint and not lie.turned) and _covers(
        across, lie.columns, per_column, joint=lie.joint and lie.turned
    )


def _covers(count: int, size: int, block: int, *, joint: bool) -> bool:
    """Whether so many blocks are the whole: transformers makes them of one size, with no rest."""
    whole = count == 1 and size <= block
    halves = joint and count == 2 and size <= 2 * block
    return count * block == size or whole or halves


def _stacks(model: PreTrainedModel) -> list[str]:
    """The names of the parameters that hold all experts, from after the layer's number on."""
    stacks = (
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if ("experts" in path.split(".") or type(module).__name__ in TURNED)
        and (p.ndim == STACK_DIMENSIONS or type(module).__name__ in FLAT)
    )
    return sorted({UP_TO_THE_LAYER.sub("", name) for name in stacks})


def _rules_of(stack: str, rules: list[WeightTransform]) -> list[WeightConverter]:
    """The rules that read a stack under this name alone; that they turn it must go on."""
    return [
        rule
        for rule in rules
        if isinstance(rule, WeightConverter) and rule.source_patterns == [stack]
    ]
