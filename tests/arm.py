"""Compiles the CPU kernels for Arm and runs them emulated, on processors with and without bf16, against plain loops.

Run as `python -m tests.arm`. Needs a cross compiler and QEMU, in Debian the packages g++-aarch64-linux-gnu and
qemu-user. On an Arm machine itself the tests do.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nanovllm.kernels.cpu.build import FLAGS, SOURCES
from nanovllm.kernels.cpu.targets import TARGETS

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CHECK = Path(__file__).parent / "arm_check.cpp"
PROCESSORS = {"neon": ["cortex-a76", "neoverse-n1", "max"], "neon_bf16": ["max"]}  # the first two have no bf16


def run(target: str, flags: tuple[str, ...], processors: list[str]) -> bool:
    """Whether all is right on each of the processors."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "check")
        together = "".join(f'#include "{file}"\n' for file in [*SOURCES, CHECK])
        options = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")] + ["-static", *flags]
        subprocess.run([COMPILER, *options, "-x", "c++", "-", "-o", program], input=together, text=True, check=True)
        commands = [[EMULATOR, "-cpu", name, program] for name in processors]
        results = [subprocess.run(command, capture_output=True, text=True) for command in commands]
    for name, done in zip(processors, results, strict=True):
        print(f"{target} on {name}: {(done.stdout + done.stderr).strip()}", flush=True)
    return all(done.returncode == 0 for done in results)


def main() -> None:
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    targets = [target for target in TARGETS if target.name in PROCESSORS]
    results = [run(target.name, target.flags, PROCESSORS[target.name]) for target in targets]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
