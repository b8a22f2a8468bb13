"""The packings of quantised matrices in plain NumPy: how each format is written and read back.

A packed matrix is a dict of its parts by the names they have after a projection's, as arrays of
raw items; `DTYPES` says what safetensors calls them. Reading back gives float64, exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Parts = dict[str, Array]
Floats = NDArray[np.float64]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3(codes: Array) -> Floats:
    """F8_E4M3 bytes as numbers; both NaNs are left to themselves."""
    c = codes.astype(np.int64)
    sign, exponent, mantissa = 1 - 2 * (c >> 7), (c >> 3) & 15, c & 7
    normal = (1 + mantissa / 8) * np.exp2(exponent - 7.0)
    small = mantissa / 8 * 2.0**-6
    return np.asarray(sign * np.where(exponent > 0, normal, small))


def e8m0(codes: Array) -> Floats:
    """F8_E8M0 bytes as powers of two."""
    return np.asarray(np.exp2(codes.astype(np.float64) - 127))


def bf16(codes: Array) -> Floats:
    """BF16 words as numbers."""
    return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def nibbles(packed: Array, *, of: int, axis: int, bits: int = 4) -> Array:
    """Unsigned values of so many bits, low ones first, `of` in each item along `axis`."""
    shifts = np.arange(of, dtype=np.uint64) * bits
    wide = packed.astype(np.uint64)[..., None] >> shifts & (2**bits - 1)
    moved = np.moveaxis(wide, -1, axis + 1)
    shape = list(packed.shape)
    shape[axis] *= of
    return moved.reshape(shape).astype(np.uint8)


def packed(values: Array, *, of: int, axis: int, dtype: str, bits: int = 4) -> Array:
    """The inverse of `nibbles`."""
    shape = list(values.shape)
    shape[axis : axis + 1] = [shape[axis] // of, of]
    apart = np.moveaxis(values.reshape(shape).astype(np.uint64), axis + 1, -1)
    shifts = np.arange(of, dtype=np.uint64) * bits
    return (apart << shifts).sum(-1).astype(dtype)


def spread(scales: Array, rows: int, columns: int, block: tuple[int, int]) -> Array:
    """Each block's scale at each of its values."""
    whole = np.repeat(np.repeat(scales, block[0], axis=0), block[1], axis=1)
    return whole[:rows, :columns]


@dataclass(frozen=True)
class Format:
    """One way to store a matrix [rows, columns]: written at random, read back as numbers.

    dtypes: of the parts, by name. config: what config.json says of it. fused: the suffixes of the
    parts in fused names.
    """

    dtypes: dict[str, str]
    write: Callable[[np.random.Generator, int, int], Parts]
    read: Callable[[Parts], Floats]
    fused: dict[str, str]
    config: dict[str, object]


def _codes(rng: np.random.Generator, *shape: int) -> Array:
    """Random fp8 bytes without NaN."""
    codes = rng.integers(0, 127, shape) | rng.integers(0, 2, shape) << 7
    return codes.astype(np.uint8)


def _bytes(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(0, 256, shape).astype(np.uint8)


def _powers(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(110, 140, shape).astype(np.uint8)


def _floats(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.random(shape) + 0.5).astype(np.float32)


def _halves(rng: np.random.Generator, *shape: int) -> Array:
    """Positive BF16 words, exact."""
    return rng.integers(0x3F00, 0x4000, shape).astype(np.uint16)


def _block(rng: np.random.Generator, rows: int, columns: int) -> Parts:
    return {
        "weight": _codes(rng, rows, columns),
        "weight_scale_inv": _floats(rng, -(-rows // 4), -(-columns // 8)),
    }


def _block_of(kind: Callable[..., Array]) -> Callable[[np.random.Generator, int, int], Parts]:
    def write(rng: np.random.Generator, rows: int, columns: int) -> Parts:
        parts = _block(rng, rows, columns)
        return {**parts, "weight_scale_inv": kind(rng, *parts["weight_scale_inv"].shape)}

    return write


def _read_block(scale: Callable[[Array], Array]) -> Callable[[Parts], Floats]:
    def read(parts: Parts) -> Floats:
        rows, columns = parts["weight"].shape
        grid = spread(scale(parts["weight_scale_inv"]), rows, columns, (4, 8))
        return np.asarray(e4m3(parts["weight"]) * grid)

    return read


def _plain(scales: Array) -> Array:
    return scales.astype(np.float64)


_BLOCK = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
_INV = {"weight": "", "weight_scale_inv": "_scale_inv"}
_SCALE = {"weight": "", "weight_scale": "_scale"}


def _grouped(parts: Parts, weight: str, scale: str, group: int) -> Floats:
    """MXFP8 and its like: fp8 with a power of two for each group of a row."""
    return np.asarray(e4m3(parts[weight]) * np.repeat(e8m0(parts[scale]), group, axis=1))


def _fp4(parts: Parts, weight: str, scale: Array, group: int) -> Floats:
    values = E2M1[nibbles(parts[weight].view(np.uint8), of=2, axis=1)]
    return np.asarray(values * np.repeat(scale, group, axis=1))


def _pack_quantized(bits: int) -> Format:
    """compressed-tensors' integers in groups of 32, symmetric: offset binary along K."""
    of = 32 // bits

    def write(rng: np.random.Generator, rows: int, columns: int) -> Parts:
        values = rng.integers(0, 2**bits, (rows, columns))
        return {
            "weight_packed": packed(values, of=of, axis=1, dtype="u4", bits=bits),
            "weight_scale": _halves(rng, rows, columns // 32),
            "weight_shape": np.array([rows, columns], "i8"),
        }

    def read(parts: Parts) -> Floats:
        values = nibbles(parts["weight_packed"], of=of, axis=1, bits=bits).astype(np.float64)
        scales = np.repeat(bf16(parts["weight_scale"]), 32, axis=1)
        return np.asarray((values - 2 ** (bits - 1)) * scales)

    return Format(
        {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"},
        write,
        read,
        {"weight_packed": "_packed", "weight_scale": "_scale", "weight_shape": "_shape"},
        {"quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": 32}}}}},
    )


def _asymmetric(bits: int) -> Format:
    """The same with zero points, packed along N."""
    of, form = 32 // bits, _pack_quantized(bits)

    def write(rng: np.random.Generator, rows: int, columns: int) -> Parts:
        zeros = rng.integers(0, 2**bits, (rows, columns // 32))
        zero_point = packed(zeros, of=of, axis=0, dtype="u4", bits=bits)
        return {**form.write(rng, rows, columns), "weight_zero_point": zero_point}

    def read(parts: Parts) -> Floats:
        values = nibbles(parts["weight_packed"], of=of, axis=1, bits=bits).astype(np.float64)
        zeros = nibbles(parts["weight_zero_point"], of=of, axis=0, bits=bits)
        scales = np.repeat(bf16(parts["weight_scale"]), 32, axis=1)
        return np.asarray((values - np.repeat(zeros, 32, axis=1)) * scales)

    return Format(
        {**form.dtypes, "weight_zero_point": "I32"},
        write,
        read,
        {**form.fused, "weight_zero_point": "_zero_point"},
        form.config,
    )


FORMATS: dict[str, Format] = {
    "INT8, pack-quantized": _pack_quantized(8),
    "INT8, pack-quantized, asymmetric": _asymmetric(8),
    "INT2, pack-quantized": _pack_quantized(2),
    "INT2, pack-quantized, asymmetric": _asymmetric(2),
    "block fp8, F32 scales": Format(
        {"weight": "F8_E4M3", "weight_scale_inv": "F32"},
        _block, _read_block(_plain), _INV, _BLOCK,
    ),
    "block fp8, BF16 scales": Format(
        {"weight": "F8_E4M3", "weight_scale_inv": "BF16"},
        _block_of(_halves), _read_block(bf16), _INV, _BLOCK,
    ),
    "block fp8, E8M0 scales": Format(
        {"weight": "F8_E4M3", "weight_scale_inv": "F8_E8M0"},
        _block_of(_powers), _read_block(e8m0), _INV, _BLOCK,
    ),
    "MXFP8 under the name of block fp8": Format(
        {"weight": "F8_E4M3", "weight_scale_inv": "U8"},
        lambda rng, n, k: {
            "weight": _codes(rng, n, k), "weight_scale_inv": _powers(rng, n, k // 32)},
        lambda p: _grouped(p, "weight", "weight_scale_inv", 32), _INV, {},
    ),
    "MXFP8": Format(
        {"weight": "F8_E4M3", "weight_scale": "U8"},
        lambda rng, n, k: {"weight": _codes(rng, n, k), "weight_scale": _powers(rng, n, k // 32)},
        lambda p: _grouped(p, "weight", "weight_scale", 32), _SCALE, {},
    ),
    "MXFP4 of compressed-tensors": Format(
        {"weight_packed": "U8", "weight_scale": "U8"},
        lambda rng, n, k: {
            "weight_packed": _bytes(rng, n, k // 2), "weight_scale": _powers(rng, n, k // 32)},
        lambda p: _fp4(p, "weight_packed", e8m0(p["weight_scale"]), 32),
        {"weight_packed": "_packed", "weight_scale": "_scale"}, {},
    ),
    "MXFP4 of Ling": Format(
        {"weight": "U8", "weight_scale_inv": "U8"},
        lambda rng, n, k: {
            "weight": _bytes(rng, n, k // 2), "weight_scale_inv": _powers(rng, n, k // 32)},
        lambda p: _fp4(p, "weight", e8m0(p["weight_scale_inv"]), 32), _INV, {},
    ),
    "NVFP4 of compressed-tensors": Format(
        {"weight_packed": "U8", "weight_scale": "F8_E4M3",
         "weight_global_scale": "F32", "input_global_scale": "F32"},
        lambda rng, n, k: {
            "weight_packed": _bytes(rng, n, k // 2), "weight_scale": _codes(rng, n, k // 16),
            "weight_global_scale": _floats(rng, 1), "input_global_scale": _floats(rng, 1)},
        lambda p: _fp4(p, "weight_packed", e4m3(p["weight_scale"]), 16)
        / float(p["weight_global_scale"].reshape(-1)[0]),
        {"weight_packed": "_packed", "weight_scale": "_scale",
         "weight_global_scale": "_global_scale", "input_global_scale": "_input_global_scale"}, {},
    ),
    "NVFP4 of modelopt": Format(
        {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"},
        lambda rng, n, k: {
            "weight": _bytes(rng, n, k // 2), "weight_scale": _codes(rng, n, k // 16),
            "weight_scale_2": _floats(rng), "input_scale": _floats(rng)},
        lambda p: _fp4(p, "weight", e4m3(p["weight_scale"]), 16)
        * float(p["weight_scale_2"].reshape(-1)[0]),
        {"weight": "", "weight_scale": "_scale", "weight_scale_2": "_scale_2",
         "input_scale": "_input_scale"}, {},
    ),
    "fp8 by tensor": Format(
        {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"},
        lambda rng, n, k: {"weight": _codes(rng, n, k), "weight_scale": _floats(rng),
                           "input_scale": _floats(rng)},
        lambda p: e4m3(p["weight"]) * float(p["weight_scale"].reshape(-1)[0]),
        {**_SCALE, "input_scale": "_input_scale"}, {},
    ),
    "fp8 by tensor, a list of one": Format(
        {"weight": "F8_E4M3", "weight_scale": "F32"},
        lambda rng, n, k: {"weight": _codes(rng, n, k), "weight_scale": _floats(rng, 1)},
        lambda p: e4m3(p["weight"]) * float(p["weight_scale"].reshape(-1)[0]), _SCALE, {},
    ),
    "int8 by tensor": Format(
        {"weight": "I8", "weight_scale": "F32"},
        lambda rng, n, k: {"weight": _bytes(rng, n, k).view(np.int8), "weight_scale": _floats(rng)},
        lambda p: p["weight"].astype(np.float64) * float(p["weight_scale"].reshape(-1)[0]),
        _SCALE, {},
    ),
    "fp8 by channel": Format(
        {"weight": "F8_E4M3", "weight_scale": "BF16"},
        lambda rng, n, k: {"weight": _codes(rng, n, k), "weight_scale": _halves(rng, n, 1)},
        lambda p: e4m3(p["weight"]) * bf16(p["weight_scale"]), _SCALE, {},
    ),
    "int8 by channel, Ascend": Format(
        {"weight": "I8", "weight_scale": "F32", "weight_offset": "F32"},
        lambda rng, n, k: {"weight": _bytes(rng, n, k).view(np.int8),
                           "weight_scale": _floats(rng, n, 1), "weight_offset": _floats(rng, n, 1)},
        lambda p: (p["weight"].astype(np.float64) - p["weight_offset"].astype(np.float64))
        * p["weight_scale"].astype(np.float64),
        {**_SCALE, "weight_offset": "_offset"}, {},
    ),
    "int8 by channel, one dimension": Format(
        {"weight": "I8", "weight_scale": "F32"},
        lambda rng, n, k: {"weight": _bytes(rng, n, k).view(np.int8),
                           "weight_scale": _floats(rng, n)},
        lambda p: p["weight"].astype(np.float64) * p["weight_scale"].astype(np.float64)[:, None],
        _SCALE, {},
    ),
    "INT4, pack-quantized": Format(
        {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"},
        lambda rng, n, k: {
            "weight_packed": packed(rng.integers(0, 16, (n, k)), of=8, axis=1, dtype="u4"),
            "weight_scale": _halves(rng, n, k // 32), "weight_shape": np.array([n, k], "i8")},
        lambda p: (nibbles(p["weight_packed"], of=8, axis=1).astype(np.float64) - 8)
        * np.repeat(bf16(p["weight_scale"]), 32, axis=1),
        {"weight_packed": "_packed", "weight_scale": "_scale", "weight_shape": "_shape"},
        {"quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": 32}}}}},
    ),
    "INT4, pack-quantized, asymmetric": Format(
        {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64",
         "weight_zero_point": "I32", "weight_g_idx": "I32"},
        lambda rng, n, k: {
            "weight_packed": packed(rng.integers(0, 16, (n, k)), of=8, axis=1, dtype="u4"),
            "weight_scale": _halves(rng, n, k // 32), "weight_shape": np.array([n, k], "i8"),
            "weight_zero_point": packed(
                rng.integers(0, 16, (n, k // 32)), of=8, axis=0, dtype="u4"),
            "weight_g_idx": rng.permutation(k).astype("u4") // 32},
        lambda p: (nibbles(p["weight_packed"], of=8, axis=1).astype(np.float64)
                   - nibbles(p["weight_zero_point"], of=8, axis=0)[:, p["weight_g_idx"]])
        * bf16(p["weight_scale"])[:, p["weight_g_idx"]],
        {"weight_packed": "_packed", "weight_scale": "_scale", "weight_shape": "_shape",
         "weight_zero_point": "_zero_point", "weight_g_idx": "_weight_g_idx"},
        {"quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": 32}}}}},
    ),
    "GPTQ": Format(
        {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"},
        lambda rng, n, k: {
            "qweight": packed(rng.integers(0, 16, (k, n)), of=8, axis=0, dtype="u4"),
            "qzeros": packed(rng.integers(0, 16, (k // 32, n)), of=8, axis=1, dtype="u4"),
            "scales": (rng.random((k // 32, n)) + 0.5).astype(np.float16),
            "g_idx": rng.permutation(k).astype("u4") // 32},
        lambda p: ((nibbles(p["qweight"], of=8, axis=0).astype(np.float64)
                    - nibbles(p["qzeros"], of=8, axis=1)[p["g_idx"]] - 1)
                   * p["scales"].astype(np.float64)[p["g_idx"]]).T,
        {"qweight": "_qweight", "qzeros": "_qzeros", "scales": "_scales", "g_idx": "_g_idx"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
    ),
    "GPTQ of 8 bits": Format(
        {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"},
        lambda rng, n, k: {
            "qweight": packed(rng.integers(0, 256, (k, n)), of=4, axis=0, dtype="u4", bits=8),
            "qzeros": packed(rng.integers(0, 256, (k // 32, n)), of=4, axis=1, dtype="u4", bits=8),
            "scales": (rng.random((k // 32, n)) + 0.5).astype(np.float16),
            "g_idx": np.arange(k).astype("u4") // 32},
        lambda p: ((nibbles(p["qweight"], of=4, axis=0, bits=8).astype(np.float64)
                    - nibbles(p["qzeros"], of=4, axis=1, bits=8)[p["g_idx"]] - 1)
                   * p["scales"].astype(np.float64)[p["g_idx"]]).T,
        {"qweight": "_qweight", "qzeros": "_qzeros", "scales": "_scales", "g_idx": "_g_idx"},
        {"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 32}},
    ),
    "AWQ": Format(
        {"qweight": "I32", "qzeros": "I32", "scales": "F16"},
        lambda rng, n, k: {
            "qweight": packed(_awq(rng.integers(0, 16, (k, n))), of=8, axis=1, dtype="u4"),
            "qzeros": packed(_awq(rng.integers(0, 16, (k // 32, n))), of=8, axis=1, dtype="u4"),
            "scales": (rng.random((k // 32, n)) + 0.5).astype(np.float16)},
        lambda p: ((_unawq(nibbles(p["qweight"], of=8, axis=1)).astype(np.float64)
                    - np.repeat(_unawq(nibbles(p["qzeros"], of=8, axis=1)), 32, axis=0))
                   * np.repeat(p["scales"].astype(np.float64), 32, axis=0)).T,
        {"qweight": "_qweight", "qzeros": "_qzeros", "scales": "_scales"},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}},
    ),
}  # fmt: skip

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def _awq(values: Array) -> Array:
    """Columns in the order in which AWQ packs eight of them."""
    rows, columns = values.shape
    return values.reshape(rows, columns // 8, 8)[:, :, _ORDER].reshape(rows, columns)


def _unawq(values: Array) -> Array:
    rows, columns = values.shape
    return values.reshape(rows, columns // 8, 8)[:, :, np.argsort(_ORDER)].reshape(rows, columns)
