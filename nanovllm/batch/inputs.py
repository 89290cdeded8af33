"""The lines of a job's input files, one after the other, whatever is in them."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import BinaryIO

import zstandard

STDIN = "-"
LONGEST_LINE = 64 * 2**20  # bytes; of a longer one only so much is read, which is no JSON then


class Inputs:
    """Input files, found and opened once so that a mistake is seen before anything is computed.

    `.gz` and `.zst` are decompressed. A file that cannot be read to its end is left there, and named in `unreadable`.

    Raises:
        ValueError: A name or pattern fits no file, a file cannot be opened, or standard input is given twice.
    """

    def __init__(self, names: list[str]):
        self.paths: list[str] = []
        for name in names:
            found = [name] if name == STDIN or Path(name).exists() else sorted(glob(name, recursive=True))
            if not found:
                raise ValueError(f"the input {name!r} does not exist, and as a pattern it fits no file")
            self.paths += found
        if self.paths.count(STDIN) > 1:
            raise ValueError("the input '-', standard input, can be read only once")
        for path in self.paths:
            if path != STDIN:
                try:
                    with open(path, "rb") as file:
                        file.peek(1)
                except OSError as error:
                    raise ValueError(f"the input {path!r} cannot be read: {error.strerror}") from error
        self.unreadable: dict[str, str] = {}  # why, by path
        self.can_repeat = STDIN not in self.paths
        sizes = [Path(path).stat().st_size for path in self.paths if path != STDIN]
        self._total = sum(sizes) if self.can_repeat else None
        self._file: BinaryIO | None = None  # the one that is being read, as it lies on the disk
        self._before = 0  # bytes of the files before it

    @property
    def share_read(self) -> float | None:
        """How much of all bytes was read, from 0 to 1; None if nobody knows, as of standard input."""
        if not self._total:
            return None
        try:
            return (self._before + (self._file.tell() if self._file else 0)) / self._total
        except ValueError:  # closed meanwhile, by the thread that reads
            return self._before / self._total

    def lines(self) -> Iterator[tuple[str, int, bytes]]:
        """(path, number from 1, line without its end) of every line that is not blank."""
        self._before = 0
        for path in self.paths:
            try:
                yield from self._lines_of(path)
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                self.unreadable[path] = str(error) or type(error).__name__
            self._before += Path(path).stat().st_size if path != STDIN and Path(path).exists() else 0

    def _lines_of(self, path: str) -> Iterator[tuple[str, int, bytes]]:
        with sys.stdin.buffer if path == STDIN else open(path, "rb") as raw:
            self._file = None if path == STDIN else raw
            file, number = _decompressed(raw, path), 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                        pass
                if line := line.strip():
                    yield path, number, line
        self._file = None


def _decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".zst"):
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw
