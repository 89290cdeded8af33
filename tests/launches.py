"""What launches of Triton kernels would have compiled, found without a GPU.

A fresh process takes Triton's own way from a launch with CPU tensors to the compiler, where Triton's hook notes what is
asked of it: a kernel, specialised for its arguments' types, constants and divisibility. A launch that asks for nothing
new needs no compilation, and what was asked for can be compiled ahead of time.
"""

import importlib.util
import inspect
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple


class Specialization(NamedTuple):
    """A kernel by its name, and `aot.compile_kernel`'s arguments."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, object], ...]
    num_warps: int
    num_stages: int


def without_interpreter(function: Callable, *args):
    """The result of `function(*args)`, a test file's own function, in a fresh process in which Triton compiles."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_call, inspect.getfile(function), function.__name__, args).result()


def _call(path: str, name: str, args: tuple):
    os.environ.pop("TRITON_INTERPRET", None)
    spec = importlib.util.spec_from_file_location("launching", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)(*args)


def record(launch: Callable[[], None], arch: int = 90) -> set[Specialization]:
    """What kernels that `launch` launches must be compiled for. None of them runs.

    Only for a process of `without_interpreter`.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    noted = {}

    def note(key: str, fn, compile: dict, **_) -> bool:
        kernel, constants = fn.jit_function, compile["constants"]
        divisible = {kernel.arg_names[index] for (index,), attrs in compile["configs"][0].items() if attrs}
        noted[fn.name, key] = Specialization(
            kernel.fn.__name__,
            tuple(
                (name, type_ + ":16" * (name in divisible))
                for name, type_ in compile["signature"].items()
                if type_ != "constexpr"
            ),
            tuple((kernel.arg_names[index], value) for (index,), value in constants.items()),
            compile["num_warps"],
            compile["num_stages"],
        )
        return True  # leave it at that: compile nothing, launch nothing

    triton.runtime.driver.set_active(Driver())
    triton.knobs.runtime.jit_cache_hook = note
    try:
        launch()
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    specializations = set(noted.values())
    assert len(specializations) == len(noted)  # a specialization holds all that Triton tells apart
    return specializations
