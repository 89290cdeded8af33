"""The kernels' shared library: compiled when first needed, for these sources and this compiler, and kept on disk."""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
UID = os.getuid() if hasattr(os, "getuid") else 0  # as Windows says of every file
FLAGS = ["-O3", "-std=c++20", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=off"]  # which products and sums are fused may depend on a tile's rows, and results may not


def build(flags: Sequence[str]) -> Path:
    """The file of the library for a target's flags; compiles it unless some process of this user has.

    RuntimeError that says what is missing.
    """
    flags = [*FLAGS, *flags]
    compiler = _find_compiler()
    version = _run([*compiler, "--version"]) if compiler else ""
    name = "cpu_kernels-" + _digest(*(file.read_text() for file in [*SOURCES, *HEADERS]), *flags)
    library = f"{name}-{_digest(version)}.so" if compiler else f"{name}-*.so"
    problems = []
    for directory in _directories():
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if directory.lstat().st_uid != UID:  # whose code would be run
                raise PermissionError("it belongs to another user")
            for found in directory.glob(library):
                return found
            if compiler:
                return _compile([*compiler, *flags], directory / library)
        except OSError as error:
            problems.append(f"{directory}: {error.strerror or error}")
    if not compiler:
        raise RuntimeError(
            "there is no C++ compiler, neither in CXX nor as c++, g++ or clang++; install g++ 10 or newer"
        )
    raise RuntimeError(f"no directory can keep the library ({'; '.join(problems)}); set XDG_CACHE_HOME to one that can")


def _find_compiler() -> list[str] | None:
    """As the beginning of a command."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((words for words in map(shlex.split, candidates) if shutil.which(words[0])), None)


def _directories() -> Iterator[Path]:
    """Where to keep libraries, the best first: a user may have no home, or may not write there."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):
        yield Path(cache, "nanovllm")
    yield Path(tempfile.gettempdir(), f"nanovllm_kernels_{UID}")


def _compile(command: list[str], library: Path) -> Path:
    """In a directory of its own: a process that is killed meanwhile leaves nothing that others wait for or load."""
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        output = Path(directory, "kernels.so")
        together = "".join(f'#include "{source}"\n' for source in SOURCES)  # which reads the headers only once
        _run([*command, "-x", "c++", "-", "-o", str(output)], together)
        os.replace(output, library)
    return library


def _run(command: list[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[-1])}")
    return done.stdout


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
