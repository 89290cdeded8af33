"""How checkpoints keep a weight: as it is, or quantised by one of the methods that are in use.

A `Format` names the tensors that there are for a weight of N outputs and K inputs, and says of each how it lies in the
file and what it becomes in `QuantizedWeight`, which is the same for all of them:

- FP8 (DeepSeek-AI, 2024, arXiv:2412.19437): scales of blocks;
- GPTQ (Frantar et al., 2022, arXiv:2210.17323) and AWQ (Lin et al., 2023, arXiv:2306.00978): 4 or 8 bits in int32s;
- compressed-tensors, what llm-compressor writes: 4 or 8 bits in int32s, int8, or fp8.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor

from nanovllm.kernels.quantized import pack_4_bits, unpack_4_bits
from nanovllm.utils.checks import check_choice, check_int, require
from nanovllm.utils.loader import CheckpointTensor, ShapeError

FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
SCALES = FLOATS | {"F8_E8M0"}
PACKED = frozenset({"I32"})
FP8 = frozenset({"F8_E4M3"})
INT8 = frozenset({"I8"})
AWQ_ORDER = 0, 4, 1, 5, 2, 6, 3, 7  # which 4 bits of an int32 have the code of each of eight outputs
# Raises ShapeError if a tensor says something of a weight of N outputs and K inputs that is not supported.
Check = Callable[[CheckpointTensor, tuple[int, int]], None]


@dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint: how the elements of one for an [N, K] weight lie, and what they are."""

    target: str  # of `QuantizedWeight`: values, scales or zeros
    units: tuple[int, int] = (1, 1)  # outputs and inputs that an element is about; 0: all
    dtypes: frozenset[str] = FLOATS  # as safetensors names them
    transposed: bool = False  # inputs come first
    bits: int = 0  # of a code, if an int32 has several, the lowest bits first
    packed: int = 1  # of what: 0 outputs, 1 inputs
    order: tuple[int, ...] = ()  # of the codes in an int32
    shift: int = 0  # what is to be added to a code

    def read(self, loaded: CheckpointTensor, shape: tuple[int, int], rows: slice, columns: slice) -> Tensor:
        """What it has of these rows and columns of an [N, K] weight of `shape`: [rows, units of columns].

        ShapeError if it has not the dtype or the shape that it should have.
        """
        units = [unit or size for unit, size in zip(self.units, shape, strict=True)]
        stored = [-(-size // unit) for size, unit in zip(shape, units, strict=True)]
        stored = stored[::-1] if self.transposed else stored
        found, dtype = list(loaded.get_shape()), loaded.get_dtype()
        if found != stored and not prod(stored) == prod(found) == 1:
            raise ShapeError(f"has shape {found}, the configuration says {stored}")
        if dtype not in self.dtypes:
            lacks_scales = self.dtypes == FLOATS and dtype in FP8 | INT8
            wanted = "has no scales beside it" if lacks_scales else f"should be {' or '.join(sorted(self.dtypes))}"
            raise ShapeError(f"is {dtype}, and {wanted}")
        if prod(stored) == 1:
            return loaded[...].reshape(1, 1).expand(rows.stop - rows.start, 1)
        spans = [slice(span.start // u, -(-span.stop // u)) for span, u in zip((rows, columns), units, strict=True)]
        x = loaded[tuple(spans[::-1] if self.transposed else spans)]
        x = x.T if self.transposed else x
        x = x.float() if dtype == "F8_E8M0" else x  # powers of two
        if self.bits:
            x = self._unpack(x)
        elif units[0] > 1:
            x = x.repeat_interleave(units[0], 0)
        return x[rows.start % units[0] :][: rows.stop - rows.start]

    def _unpack(self, x: Tensor) -> Tensor:
        """Codes of int32s; those of values in 4 bits come, and stay, two inputs a byte."""
        x = (x if self.packed else x.T).contiguous().view(torch.uint8)
        if self.target == "values" and self.packed:
            return x if self.bits == 4 else (x ^ 128).view(torch.int8)
        x = unpack_4_bits(x) if self.bits == 4 else x
        x = x.unflatten(1, (-1, 8))[..., self.order].flatten(1) if self.order else x
        x = x if self.packed else x.T
        if self.target == "values":
            return pack_4_bits(x)
        x = x + self.shift & (1 << self.bits) - 1
        return x if self.bits == 4 else x.to(torch.int16) - 128


@dataclass(frozen=True)
class Format:
    parts: dict[str, Part]  # what a weight needs, by the ends of the tensors' names
    others: dict[str, Check] = field(default_factory=dict)  # what may be there, and adds nothing
    group_size: int = 0  # inputs that share a scale; 0: all

    @property
    def is_plain(self) -> bool:
        return len(self.parts) == 1

    @property
    def dtype(self) -> torch.dtype:
        """Of a quantised weight's values."""
        part = next(part for part in self.parts.values() if part.target == "values")
        return torch.float8_e4m3fn if part.dtypes == FP8 else torch.uint8 if part.bits == 4 else torch.int8

    def check_cut(self, num_inputs: int, size: int) -> None:
        """ValueError if `size` ranks, each of which has so many of `num_inputs`, would divide a group."""
        fitting = [n for n in range(1, 9) if num_inputs % (n * (self.group_size or 1)) == 0 or n == 1]
        if size not in fitting:
            raise ValueError(
                f"tensor_parallel_size={size} divides groups of {self.group_size} of {num_inputs} inputs, which share "
                f"a scale; use one of {fitting}"
            )


PLAIN = Format({"weight": Part("values")})


def read_format(config: object) -> Format:
    """What `quantization_config` of a config.json says; ValueError if it is of a kind that is not supported."""
    if not config:
        return PLAIN
    config = config if isinstance(config, dict) else config.to_dict()
    method = config.get("quant_method")
    if method not in READERS:
        raise ValueError(
            f"quant_method={method!r} is not supported, but {', '.join(READERS)}; or use the checkpoint that is not "
            "quantised, with quantization='int8' or 'int4' if it should be"
        )
    return READERS[method](config)


def _fp8(config: dict) -> Format:
    block = config.get("weight_block_size") or (0, 0)
    weight, scale = Part("values", dtypes=FP8), Part("scales", _pair("weight_block_size", block), SCALES)
    others = dict.fromkeys(["activation_scale", "input_scale"], _adds_nothing)
    return Format({"weight": weight, "weight_scale_inv": scale}, others, scale.units[1])


def _awq(config: dict) -> Format:
    check_choice("bits", config.get("bits", config.get("w_bit")), [4])
    check_choice("version", str(config.get("version", "gemm")).lower(), ["gemm"])
    group = _group_size(config.get("group_size", config.get("q_group_size")))
    packed = {"dtypes": PACKED, "transposed": True, "bits": 4, "packed": 0, "order": AWQ_ORDER}
    parts = {
        "qweight": Part("values", (8, 1), **packed),
        "qzeros": Part("zeros", (8, group), **packed),
        "scales": Part("scales", (1, group), transposed=True),
    }
    return Format(parts, group_size=group)


def _gptq(config: dict) -> Format:
    bits = config.get("bits")
    check_choice("bits", bits, [4, 8])
    check_choice("checkpoint_format", config.get("checkpoint_format", "gptq"), ["gptq", "gptq_v2"])
    group, shift = _group_size(config.get("group_size")), config.get("checkpoint_format") != "gptq_v2"
    packed = {"dtypes": PACKED, "transposed": True, "bits": bits}
    parts = {
        "qweight": Part("values", (1, 32 // bits), **packed),
        "qzeros": Part("zeros", (32 // bits, group), **packed, packed=0, shift=int(shift)),
        "scales": Part("scales", (1, group), transposed=True),
    }
    return Format(parts, {"g_idx": partial(_check_order, group_size=group), "bias": _check_zero}, group)


def _compressed(config: dict) -> Format:
    schemes = [group["weights"] for group in config["config_groups"].values()]
    if any(scheme != schemes[0] for scheme in schemes):
        raise ValueError("config_groups have different weights, which is not supported")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError(f"sparsity_config={config['sparsity_config']} is not supported; use a dense checkpoint")
    scheme, kind = schemes[0], config.get("format")
    bits, strategy, is_symmetric = scheme["num_bits"], scheme.get("strategy"), scheme.get("symmetric", True)
    check_choice("format", kind, ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"])
    check_choice("num_bits", bits, [4, 8] if kind == "pack-quantized" else [8])
    check_choice("strategy", strategy, ["tensor", "channel", "group", "block"])
    sizes = {"tensor": (0, 0), "channel": (1, 0), "group": (1, _group_size(scheme.get("group_size") or -1))}
    units = _pair("block_structure", scheme["block_structure"]) if strategy == "block" else sizes[strategy]
    parts = {"weight_scale": Part("scales", units)}
    others = dict.fromkeys(["input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale"], _adds_nothing)
    others["weight_g_idx"] = partial(_check_order, group_size=units[1])
    if kind == "pack-quantized":
        packed = {"dtypes": PACKED, "bits": bits}
        parts["weight_packed"] = Part("values", (1, 32 // bits), **packed)
        others["weight_shape"] = _check_shape
        if not is_symmetric:
            parts["weight_zero_point"] = Part("zeros", (32 // bits, units[1]), **packed, packed=0)
    else:
        parts["weight"] = Part("values", dtypes=FP8 if scheme.get("type") == "float" else INT8)
        if not is_symmetric:
            parts["weight_zero_point"] = Part("zeros", units, INT8)
    if is_symmetric:
        others["weight_zero_point"] = _check_zero
    return Format(parts, others, units[1])


READERS = {"fp8": _fp8, "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}


def _group_size(size: int | None) -> int:
    """As in a configuration, where -1 says that all inputs are one group."""
    check_int("group_size", size, -1)
    require(
        size == -1 or (size > 0 and size % 16 == 0), f"group_size={size} is not supported, but multiples of 16, or -1"
    )
    return max(size, 0)


def _pair(name: str, sizes: list[int]) -> tuple[int, int]:
    require(len(sizes) == 2, f"{name} must be two sizes, of outputs and of inputs, got {sizes}")
    check_int(name, sizes[0], 0)
    return sizes[0], _group_size(sizes[1] or -1)


def _adds_nothing(loaded: CheckpointTensor, shape: tuple[int, int]) -> None:
    """Of activations or the cache, which are not quantised here."""


def _check_shape(loaded: CheckpointTensor, shape: tuple[int, int]) -> None:
    if loaded[...].tolist() != list(shape):
        raise ShapeError(f"says {loaded[...].tolist()}, the configuration {list(shape)}")


def _check_zero(loaded: CheckpointTensor, shape: tuple[int, int]) -> None:
    if loaded[...].any():
        raise ShapeError("is not 0, and the configuration says that there is none")


def _check_order(loaded: CheckpointTensor, shape: tuple[int, int], group_size: int) -> None:
    if not torch.equal(loaded[...].long(), torch.arange(shape[1]) // (group_size or shape[1])):
        raise ShapeError("has inputs ordered by their activations (desc_act), which is not supported")
