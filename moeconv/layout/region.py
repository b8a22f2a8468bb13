"""Regions: where logical matrices are stored. Every tile of a plan is a pair of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from moeconv.layout.axes import Geometry


class Region(NamedTuple):
    """Where the matrices of one expert are stored: from byte `base` of file number `file` on.

    geometry: shared by all experts of a tensor; `base` is where its expert 0 would begin.
    """

    file: int
    base: int
    geometry: Geometry

    def nbytes(self, bits: int) -> int:
        """The bytes of the region: of one expert, or of the tensor where its experts share it.

        bits: of one element.
        """
        return (self.geometry.expert_stride or self.geometry.numel) * bits // 8


@dataclass(frozen=True, slots=True)
class ProjectionRegions:
    """The regions of one projection and component, whose matrices are at `pair` along G in them.

    of: the region of an expert. All have this geometry.
    """

    of: Callable[[int], Region]
    geometry: Geometry
    pair: int

    @property
    def offset(self) -> int:
        """Elements from the start of a region to the projection's matrix."""
        return self.pair * self.geometry.pair_stride
