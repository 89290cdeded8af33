"""Compiles every Triton kernel ahead of time under each version of Triton that the package allows; needs no GPU.

    python -m tests.triton_versions             # all of them, half an hour on two cores
    python -m tests.triton_versions 3.4.0

From the repository's root. Each version is installed into a directory of its own, which goes before this environment's
packages. The table counts the tests passed for each architecture: binaries that fit its shared memory and spill no
register. Exit code 0: none failed.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = ["3.4.0", "3.5.1", "3.6.0", "3.7.1"]  # of PyTorch 2.8, 2.9, 2.10 and 2.13
FILES = [
    f"tests/layers/test_{name}.py"
    for name in ("attention_compiled", "attention_triton", "invariant_triton", "fused", "experts", "triton_quantized")
]


def run(version: str) -> str:
    """What pytest says of each test."""
    with tempfile.TemporaryDirectory(prefix=f"triton-{version}-") as directory:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory]
        subprocess.run([*install, f"triton=={version}"], check=True)
        env = os.environ | {"PYTHONPATH": f"{directory}{os.pathsep}{ROOT}", "NANOVLLM_ALL_ARCHITECTURES": "1"}
        check = "import triton, sys; assert triton.__version__ == sys.argv[1], triton.__version__"
        subprocess.run([sys.executable, "-c", check, version], check=True, env=env)
        command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", *FILES]
        command += ["-o", "addopts=--import-mode=importlib"]  # pytest-xdist need not be there
        command += ["-k", "architecture or ahead_of_time or compiles_anything or 16_bytes"]
        return subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True).stdout


def main(versions: list[str]) -> int:
    table = {}
    for version in versions:
        output = run(version)
        print(output, file=sys.stderr, flush=True)
        ended = re.findall(r"^tests\S+::(\S+) (PASSED|FAILED|ERROR)", output, re.MULTILINE)
        results = [((re.search(r"sm_\d+", name) or ["any"])[0], result == "PASSED") for name, result in ended]
        table[version] = Counter(name for name, _ in results), Counter(name for name, passed in results if passed)
    columns = sorted({name for total, _ in table.values() for name in total}, key=lambda name: (len(name), name))
    print("triton", *(name.rjust(8) for name in columns))
    for version, (total, passed) in table.items():
        print(version.ljust(6), *(f"{passed[name]} of {total[name]}".rjust(8) for name in columns))
    return int(any(total != passed or not total for total, passed in table.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or VERSIONS))
