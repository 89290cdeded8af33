"""The compiled functions, called or recorded."""

import ctypes
import math
import struct
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.layers.cpu_kernels.build import FEATURES, build
from nanovllm.utils.device import cpu_has

# Of each function the kinds of its arguments: pointer, integer, fp32.
SIGNATURES = {
    "pack_bf16": "pii",
    "pack_int8": "piippp",
    "linear_bf16": "pipppiii",
    "linear_int8": "pipppppiii",
    "rows_bf16": "pppii",
    "rows_int8": "ppppii",
    "store_kv": "pippiiii",
    "copy_blocks": "pppiiii",
    "attend": "pppppppiiiiiiii",
    "add_rms_norm": "pppfppii",
    "norm_rope": "pipippfpppppiiii",
    "silu_and_mul": "ppipii",
    "sample": "pipppii",
    "replay": "pi",
}
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
PACKED = {"p": "q", "i": "q", "f": "f4x"}  # in 64 bits each


@cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled functions, or None if they cannot be: with one warning, unless the processor is what cannot."""
    if not all(cpu_has(feature) for feature in FEATURES):
        return None
    try:
        library = ctypes.CDLL(str(build()))
    except Exception as error:  # whatever a compiler, a file system or a linker can do wrong
        warnings.warn(
            "there are no compiled CPU kernels: plain PyTorch computes instead, several times slower, and "
            f"quantization='int8' is not possible. The reason: {error}",
            stacklevel=2,
        )
        return None
    for name, kinds in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [KINDS[kind] for kind in kinds], None
    return library


def call(name: str, *args: torch.Tensor | int | float | None) -> None:
    """Runs a function, and notes the call if there is a `Recording` under way."""
    values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    getattr(load_kernels(), name)(*values)
    if _recording is not None:
        _recording.calls.append((name, values))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Memory for a result."""
    return torch.empty(*shape, dtype=dtype) if _recording is None else _recording.empty(shape, dtype)


_recording: "Recording | None" = None


class Recording:
    """The calls of one run of a piece of work, which `replay` repeats without Python between them.

    For work that reads and writes the same memory each time. Its results live in memory that other recordings use too:
    they are valid until the next run or replay of one. What PyTorch computes itself is not recorded; if there is any,
    `is_complete` is false, unless `is_checked` says not to look.
    """

    _free: dict[int, list[np.ndarray]] = defaultdict(list)  # buffers of all recordings that none uses now, by size

    def __init__(self, work: Callable[[], torch.Tensor], is_checked: bool = True):
        global _recording
        self.calls: list[tuple[str, list]] = []
        watch = _Watch() if is_checked else None
        _recording = self
        try:
            with watch or nullcontext():
                self.output = work()
        finally:
            _recording = None
        self.is_complete = watch is None or not watch.has_computed
        formats = {name: "".join(PACKED[kind] for kind in kinds) for name, kinds in SIGNATURES.items()}
        packed = [struct.pack(formats[name], *(value or 0 for value in values)) for name, values in self.calls]
        self._arguments = np.frombuffer(b"".join(packed), dtype=np.int64)
        sizes = np.array([len(arguments) for arguments in packed], dtype=np.int64)
        starts = self._arguments.ctypes.data + np.cumsum(sizes) - sizes
        library = load_kernels()
        functions = [ctypes.cast(library["call_" + name], ctypes.c_void_p).value for name, _ in self.calls]
        self._table = np.stack([np.array(functions, dtype=np.int64), starts], axis=1)  # [calls, 2]
        self.calls.clear()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As torch.empty, of memory that is used again once nothing refers to the tensor, but never given back."""
        num_bytes = math.prod(shape) * dtype.itemsize
        size = 1 << (num_bytes - 1).bit_length()
        buffer = self._free[size].pop() if self._free[size] else np.empty(size, dtype=np.uint8)
        used = buffer[:num_bytes]  # an array object of its own, which ends with the tensor's storage
        weakref.finalize(used, self._free[size].append, buffer)
        return torch.from_numpy(used).view(dtype).view(shape)

    def replay(self) -> torch.Tensor:
        load_kernels().replay(self._table.ctypes.data, len(self._table))
        return self.output


class _Watch(TorchDispatchMode):
    """Notices what PyTorch computes, which is all but views and memory."""

    has_computed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        harmless = torch.ops.aten.empty, torch.ops.aten.detach
        self.has_computed |= not func.is_view and func.overloadpacket not in harmless
        return func(*args, **(kwargs or {}))
