"""A job's output file: whole lines, each answer once, and what is needed to go on after whatever ended the job."""

import fcntl
import json
import os
import sqlite3
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from time import monotonic

from xxhash import xxh3_128, xxh3_128_digest

from nanovllm.batch.inputs import Inputs

STDOUT = "-"
SAVE_SECONDS = 1.0  # between two notes of how far the input was read


class BatchError(Exception):
    """A job cannot begin, or cannot go on: nothing that is written is lost."""


class Ids:
    """A set of any size of custom_ids, each with where it was, in a temporary file that ends with the process."""

    def __init__(self):
        self._is_empty = True
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.execute("CREATE TABLE ids (hash BLOB PRIMARY KEY, place) WITHOUT ROWID")
        self._database.execute("BEGIN")  # and never a COMMIT: nobody else reads it

    def add(self, custom_id: str, place: str | None = None) -> bool:
        """Whether it was not there yet."""
        values, self._is_empty = (_hash(custom_id), place), False
        return self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", values).rowcount == 1

    def place(self, custom_id: str) -> str | None:
        row = self._database.execute("SELECT place FROM ids WHERE hash = ?", (_hash(custom_id),)).fetchone()
        return row and row[0]

    def __contains__(self, custom_id: str) -> bool:
        if self._is_empty:
            return False
        return self._database.execute("SELECT 1 FROM ids WHERE hash = ?", (_hash(custom_id),)).fetchone() is not None


class Output:
    """Appends records to a file, and knows what an earlier run of the same job has put there.

    Beside the file `out.jsonl` there is `out.jsonl.job`: what the answers depend on, and a digest of the input as far
    as it was read, by which a change is noticed. Standard output has neither.

    Args:
        path: The file, or "-".
        identity: What the answers depend on: JSON values by name.
        force: Go on although something has changed.

    Raises:
        BatchError: The file cannot be written, is another program's, is being written by another job, or the job has
            changed.
    """

    def __init__(self, path: str, identity: dict[str, object], inputs: Inputs, force: bool = False):
        self.path, self._inputs = path, inputs
        self.done, self.num_answered, self.num_failed = Ids(), 0, 0  # by earlier runs
        self._lock = threading.Lock()  # answers come from one thread, errors of lines from another
        self._digest, self._num_read, self._saved_at = xxh3_128(), 0, monotonic()
        self._note = {"identity": identity, "lines": 0, "digest": self._digest.hexdigest()}
        self._note_path = Path(f"{path}.job")
        self._is_kept = path != STDOUT and (not os.path.exists(path) or os.path.isfile(path))  # no pipe, no terminal
        if path == STDOUT:
            self._file = os.dup(sys.stdout.fileno())
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            if self._is_kept:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise BatchError(f"the output {path!r} is being written by another job") from error
        except OSError as error:
            raise BatchError(f"the output {path!r} cannot be written: {error.strerror}") from error
        try:
            if os.fstat(self._file).st_size:
                self._resume(identity, force)
            self._save_note()
        except BaseException:
            self._is_kept = False  # the note that is there stays
            self.close()
            raise

    # ---- an earlier run

    def _resume(self, identity: dict[str, object], force: bool) -> None:
        try:
            note = json.loads(self._note_path.read_text())
            before, num_lines, digest = note["identity"], int(note["lines"]), note["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not force:
                raise BatchError(
                    f"the output {self.path!r} exists, and no {self._note_path} tells that it is of this job: remove "
                    "it, or go on with --force, which keeps its answers"
                ) from error
        else:
            changed = [name for name in identity | before if identity.get(name) != before.get(name)]
            if self._inputs.can_repeat and self._input_digest(num_lines) != digest:
                changed.append("input")
            if not force:
                self._note |= {"lines": num_lines, "digest": digest}
            if changed and not force:
                raise BatchError(
                    f"the output {self.path!r} was begun with another {', another '.join(changed)}: choose a new "
                    "output, or go on with --force, which keeps the answers that it has"
                )
        self._read_answers()

    def _input_digest(self, num_lines: int) -> str | None:
        """Of the first lines of the input, None if there are fewer."""
        digest = xxh3_128()
        lines = self._inputs.lines()
        for _ in range(num_lines):
            line = next(lines, None)
            if line is None:
                return None
            digest.update(line[2] + b"\n")
        lines.close()
        self._inputs.unreadable.clear()
        return digest.hexdigest()

    def _read_answers(self) -> None:
        """Notes who has an answer. A last line that is torn was being written when something ended the job."""
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    self.done.add(record["custom_id"])
                    self._count(record)
                except (ValueError, KeyError, TypeError) as error:
                    raise BatchError(f"{self.path!r}, line {number}, is no answer: remove the line or file") from error
                end += len(line)
        os.ftruncate(self._file, end)

    def _count(self, record: dict[str, object]) -> None:
        self.num_failed += record["error"] is not None
        self.num_answered += record["error"] is None

    # ---- this run

    def has_read(self, line: bytes) -> None:
        """The next line of the input was read."""
        self._digest.update(line + b"\n")
        self._num_read += 1
        if self._num_read == self._note["lines"] and self._digest.hexdigest() != self._note["digest"]:
            raise BatchError(f"the output {self.path!r} was begun with another input: see --force")  # standard input
        if monotonic() - self._saved_at >= SAVE_SECONDS:
            self._save_note()

    def write(self, records: Iterable[dict[str, object]]) -> None:
        """Appends records. BatchError if there is no room for them, or the file is gone."""
        with self._lock:
            text = b""
            for record in records:
                self._count(record)
                text += _encoded(record) + b"\n"
            if self._file is None:
                raise BatchError(f"the output {self.path!r} is closed")
            try:
                while text:
                    text = text[os.write(self._file, text) :]
            except OSError as error:
                raise BatchError(
                    f"the output {self.path!r} cannot be written: {error.strerror}. What it has stays; once that is "
                    "mended, the same command goes on from there"
                ) from error

    def _save_note(self) -> None:
        if not self._is_kept:
            return
        if self._num_read >= self._note["lines"]:  # while an earlier run's part is read again its note holds
            self._note |= {"lines": self._num_read, "digest": self._digest.hexdigest()}
        self._saved_at = monotonic()
        new = Path(f"{self._note_path}.new")
        try:
            new.write_text(json.dumps(self._note))
            new.replace(self._note_path)
        except OSError as error:
            raise BatchError(f"{str(self._note_path)!r} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._file is None:
                return
            with suppress(OSError, BatchError):  # a full disk was told already, and the note before still holds
                self._save_note()
                os.fsync(self._file)
            os.close(self._file)
            self._file = None


def _encoded(record: dict[str, object]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only JSON can write
        return json.dumps(record).encode()


def _hash(custom_id: str) -> bytes:
    return xxh3_128_digest(custom_id.encode("utf-8", "surrogatepass"))


def checkpoint_digest(path: Path) -> str:
    """Of a checkpoint: its configuration, and 64 KiB at each of 16 places of every file of weights."""
    digest = xxh3_128()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.json")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as opened:
            for i in range(16):
                opened.seek(max(0, size - 2**16) * i // 15)
                digest.update(opened.read(2**16))
    return digest.hexdigest()
