"""The answers of a batch on disk: appended to FILE.part as they come, and FILE in the order of the prompts when all are there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from dsv2.errors import ConfigError, DataError
from dsv2.files import atomic_file, disk_errors, locked


class AnswerFile:
    """Answers of numbered prompts, kept across interruptions; made by ``open_answers``."""

    def __init__(self, out: Path, part: Path, file: FileIO, places: dict[int, tuple[int, int]]) -> None:
        self._out, self._part, self._file = out, part, file
        self._places = places  # where the line of a prompt begins in the part, and its length

    @property
    def present(self) -> frozenset[int]:
        """Numbers of the prompts that have been answered."""
        return frozenset(self._places)

    def add(self, number: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Append all answers to a prompt; a killed process loses at most the line that it was writing.

        Raises:
            DataError: the disk is full.
        """
        begin = self._file.seek(0, 2)
        self._places[number] = (begin, _append(self._part, self._file, {"number": number, "answers": answers}))

    def finish(self) -> None:
        """Write the file whole, an answer a line in the order of the prompts, and remove the part."""
        with atomic_file(self._out) as temporary, temporary.open("wb") as whole:
            for _, (begin, length) in sorted(self._places.items()):
                self._file.seek(begin)
                for answer in json.loads(self._file.read(length))["answers"]:
                    whole.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        self._part.unlink()


@contextmanager
def open_answers(out: Path, run: Mapping[str, Any], total: int) -> Iterator[AnswerFile]:
    """Begin a file of answers, or go on with what an interrupted process left in FILE.part.

    Args:
        out: the file.
        run: all that the answers depend on, as JSON; what was left must be of the same.
        total: prompts.

    Raises:
        ConfigError: the file is there already, its part is of another run, or another process writes it.
        DataError: the part is damaged, or the disk may not be written.
    """
    part, run = out.with_name(out.name + ".part"), json.loads(json.dumps(run))
    with disk_errors(part):
        out.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    try:
        with locked(part), part.open("r+b", buffering=0) as file:
            answers = AnswerFile(out, part, file, _resume(part, file, run))
            try:
                if out.exists() and len(answers.present) < total:  # with all present, a process was killed between its last two acts
                    raise ConfigError(f"{out} exists", hint="choose another path with --out, or remove it")
                if not file.seek(0, 2):
                    _append(part, file, {"run": run})
                yield answers
            finally:
                if not answers.present:
                    part.unlink()
    except BlockingIOError as error:
        raise ConfigError(f"another process writes {part}", hint="wait for it to end, or choose another --out") from error


def _resume(part: Path, file: FileIO, run: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """Return where the answers are, by number; cut a torn last line away."""
    data = file.readall()
    end = data.rfind(b"\n") + 1
    lines = data[:end].splitlines(keepends=True)
    file.truncate(end)
    try:
        rows = [json.loads(line) for line in lines]
        if rows:
            _require_same(part, rows[0]["run"], run)
        begin, present = len(lines[0]) if lines else 0, dict[int, tuple[int, int]]()
        for row, line in zip(rows[1:], lines[1:], strict=True):
            present[row["number"]] = (begin, len(line))
            begin += len(line)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{part} is damaged or was not written by dsv2", hint="remove it, or choose another path with --out") from error
    return present


def _append(part: Path, file: FileIO, row: Mapping[str, Any]) -> int:
    """Write a line at the end; return its length in bytes."""
    line = rest = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with disk_errors(part):
        while rest:  # a disk that fills up takes a part first and complains the next time
            rest = rest[file.write(rest) :]
    return len(line)


def _require_same(part: Path, found: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    different = [name for name in run if found.get(name) != run[name]]
    if different:
        raise ConfigError(
            f"{part} holds answers of another run: {different[0]} was {found.get(different[0])!r}, now it is {run[different[0]]!r}",
            hint="run the same command again to go on, remove it to begin anew, or choose another --out",
        )
