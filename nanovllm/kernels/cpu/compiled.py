"""The compiled functions, called or recorded."""

import ctypes
import math
import struct
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from nanovllm.kernels.cpu.build import build
from nanovllm.kernels.cpu.targets import usable_targets
from nanovllm.utils.device import default_threads

# Of each function the kinds of its arguments: pointer, integer, fp32.
SIGNATURES = {
    "pack_bf16": "pii",
    "pack_int8": "piippp",
    "pack_codes": "piipp",
    "pack_int4": "pii",
    "quantize_int4": "piippppi",
    "linear_bf16": "pipppiii",
    "linear_int8": "pipppppiii",
    "linear_int4": "pippppppiiii",
    "rows_bf16": "pppii",
    "rows_int8": "ppppii",
    "rows_int4": "ppppppiii",
    "store_kv": "pippiiii",
    "copy_blocks": "pppiiiii",
    "attend": "pppppppiiiiiiii",
    "store_kv_int8": "pippiiii",
    "attend_int8": "pppppppiiiiii",
    "add_rms_norm": "pppfppii",
    "norm_rope": "pipippfpppppiiii",
    "silu_and_mul": "ppipii",
    "sample": "pippppii",
    "token_logprobs": "pipppppppiii",
    "mask_logits": "pippii",
    "replay": "pi",
    "set_num_threads": "i",
    "set_default_threads": "i",
}
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
PACKED = {"p": "q", "i": "q", "f": "f4x"}  # in 64 bits each


@cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled functions for the best target that can be had, whose name is their `target`.

    None if there is none: with one warning, unless the processor is what cannot. ValueError if NANOVLLM_CPU_ISA is
    wrong.
    """
    problems, library = [], None
    for target in usable_targets():
        try:
            library = _load(build(target.flags))
        except Exception as error:  # whatever a compiler, a file system or a linker can do wrong
            problems.append(f"{target.name}: {error}")
            continue
        library.target = target.name
        break
    if problems and library:
        warnings.warn(
            f"the CPU kernels are those for {library.target}, which are slower than what the processor could run. "
            f"The reason: {'; '.join(problems)}",
            stacklevel=2,
        )
    elif problems:
        warnings.warn(
            "there are no compiled CPU kernels: plain PyTorch computes instead, several times slower. "
            f"The reason: {problems[-1]}",
            stacklevel=2,
        )
    return library


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, kinds in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [KINDS[kind] for kind in kinds], None
    library.set_default_threads(default_threads())
    return library


class _Thread(threading.local):
    recording: "Recording | None" = None  # under way


_thread = _Thread()


def call(name: str, *args: torch.Tensor | int | float | None) -> None:
    """Runs a function, and notes the call if there is a `Recording` under way."""
    values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    getattr(load_kernels(), name)(*values)
    if _thread.recording is not None:
        _thread.recording.calls.append((name, values))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Memory for a result."""
    recording = _thread.recording
    return torch.empty(*shape, dtype=dtype) if recording is None else recording.memory.empty(shape, dtype)


class Memory:
    """What recordings of at most `max_rows` rows write to, all of them to the same places.

    A buffer is for rows of one width and has room for the most of them. So recordings need the same buffers however
    many rows they have, and none of their own; what no recording has reached yet takes no memory.
    """

    def __init__(self, max_rows: int):
        self.max_rows = max_rows
        self.nbytes = 0
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)  # buffers not in use, by bytes a row

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As torch.empty, of a buffer that is used again once nothing refers to the tensor."""
        assert shape[0] <= self.max_rows
        width = math.prod(shape[1:]) * dtype.itemsize
        free = self._free[width]
        if not free:
            free.append(np.empty(self.max_rows * width, dtype=np.uint8))
            self.nbytes += free[-1].nbytes
        buffer = free.pop()
        used = buffer[: shape[0] * width]  # an array object of its own, which ends with the tensor's storage
        weakref.finalize(used, free.append, buffer).atexit = False
        return torch.from_numpy(used).view(dtype).view(shape)


class Recording:
    """The calls of one run of a piece of work, which `replay` repeats without Python between them.

    For work that reads and writes the same memory each time, and of which all is done by `call`. Its results, the
    `output` among them, are valid until the next run or replay of a recording in the same `memory`.
    """

    def __init__(self, work: Callable[[], torch.Tensor], memory: Memory):
        self.calls: list[tuple[str, list]] = []
        self.memory = memory
        _thread.recording = self
        try:
            output = work()
        finally:
            _thread.recording = None
        # The same memory, but not what keeps its buffer from other recordings.
        data = (ctypes.c_byte * output.nbytes).from_address(output.data_ptr())
        self.output = torch.frombuffer(data, dtype=output.dtype).view(output.shape)
        formats = {name: "".join(PACKED[kind] for kind in kinds) for name, kinds in SIGNATURES.items()}
        packed = [struct.pack(formats[name], *(value or 0 for value in values)) for name, values in self.calls]
        self._arguments = np.frombuffer(b"".join(packed), dtype=np.int64)
        sizes = np.array([len(arguments) for arguments in packed], dtype=np.int64)
        starts = self._arguments.ctypes.data + np.cumsum(sizes) - sizes
        library = load_kernels()
        functions = [ctypes.cast(library["call_" + name], ctypes.c_void_p).value for name, _ in self.calls]
        self._table = np.stack([np.array(functions, dtype=np.int64), starts], axis=1)  # [calls, 2]
        self.calls.clear()

    def replay(self) -> torch.Tensor:
        load_kernels().replay(self._table.ctypes.data, len(self._table))
        return self.output
