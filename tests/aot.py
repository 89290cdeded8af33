"""Compiles Triton kernels for GPUs that are not here, and says what the binaries need.

Run as a script it is the compiler's process: in the tests' own, kernels may belong to Triton's interpreter.
"""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

SHARED_LIMIT = {arch: n * 1024 for arch, n in {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}.items()}  # bytes
ALL = "NANOVLLM_ALL_ARCHITECTURES" in os.environ  # else those that differ most; tests/triton_versions.py takes all
ARCHITECTURES = list(SHARED_LIMIT) if ALL else [86, 90, 100]


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel takes: bytes of shared memory a block; registers, and bytes spilled, a thread."""

    shared: int
    registers: int
    spilled: int
    ttgir: str
    ptx: str


def compile_kernel(
    kernel, signature: dict[str, str], constexprs: dict, arch: int, num_warps: int = 4, num_stages: int = 3
) -> Binary:
    """Compiles `kernel`, unless this session has done so.

    Args:
        kernel: What `triton.jit` made of a function at the top of a module.
        signature: Each run-time parameter's type as "i32" or "*bf16", followed by ":16" if 16 divides its value.
        constexprs: The values of the others.
        arch: 80 for sm_80, and so on.
        num_warps: As at the launch.
        num_stages: As at the launch.

    Raises:
        RuntimeError: It does not compile; with the compiler's traceback.
    """
    name = kernel.fn.__module__, kernel.fn.__name__
    return _ask(json.dumps([*name, signature, constexprs, arch, num_warps, num_stages]))


@functools.cache
def _ask(request: str) -> Binary:
    compiler = _start_compiler()
    compiler.stdin.write(request + "\n")
    compiler.stdin.flush()
    answer = json.loads(compiler.stdout.readline() or '{"error": "the compiler died; see its output above"}')
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return Binary(**answer)


@functools.cache
def _start_compiler() -> subprocess.Popen:
    """Ends when this process does, with its standard input."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def _serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the compiler prints is no answer
    with tempfile.TemporaryDirectory(prefix="nanovllm-aot-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for request in sys.stdin:
            try:
                answer = _compile(*json.loads(request))
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


def _compile(
    module: str, name: str, signature: dict, constexprs: dict, arch: int, num_warps: int, num_stages: int
) -> dict[str, int | str]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), name)
    if wrong := set(kernel.arg_names) ^ (signature.keys() | constexprs.keys()):
        raise ValueError(f"{name} and the types and values given for it differ in {sorted(wrong)}")
    indices = [index for index, arg in enumerate(kernel.arg_names) if signature.get(arg, "").endswith(":16")]
    compiled = triton.compile(
        ASTSource(
            kernel,
            {arg: signature.get(arg, "constexpr").removesuffix(":16") for arg in kernel.arg_names},
            constexprs,
            {(index,): [["tt.divisibility", 16]] for index in indices},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    # Kernels have no arrays of their own in Triton: what is on the stack or in local memory was spilled.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {resource: int(amount) for resource, amount in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return {
        "shared": compiled.metadata.shared,
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "ttgir": compiled.asm["ttgir"],
        "ptx": compiled.asm["ptx"],
    }


if __name__ == "__main__":
    _serve()
