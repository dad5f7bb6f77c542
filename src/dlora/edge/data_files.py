"""Data files as people have them, read one row at a time, each with where it stands.

JSON lines or one array, CSV and TSV, Parquet and Arrow, and text with a row a line, whatever the
case of the suffix. Of an array no more is in memory than a row and a piece of the file. JSON and
CSV are read by Python's own modules: rows keep their line numbers, and texts such as "NA", "042"
or "2024-01-01" stay what they are. No torch here.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Final, TextIO

from dlora.errors import DataError

__all__ = ["ROW_FILES", "Row", "data_files", "kind_of", "read_file"]

Row = tuple[str, int, dict[str, Any]]
"""Where a row stands, as a file and a line (or, in Parquet and Arrow, its number), and the row."""

_START: Final = 2**16
"""Bytes that tell what a file begins with."""
_PIECE: Final = 2**20
_LONGEST_ROW: Final = 2**26
"""Characters of an array's element. What is longer is taken for an array that is not closed."""
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w%\[\]:+-]+)?")
_BLANK: Final = re.compile(r"\s*")
_OF_DATASETS: Final = ("dataset_dict.json", "dataset_info.json", "state.json")
"""What `save_to_disk` of `datasets` writes beside its rows."""


def data_files(source: str) -> list[Path] | None:
    """The files that a source names; None for what may be a data set of the hub.

    A source is a file, a folder (its files in the order of their names), or several of these,
    separated by commas. Raises DataError for files that are not there.
    """
    path = Path(source).expanduser() if source.startswith("~") else Path(source)
    if path.is_dir():
        return _files_of(path)
    if path.exists():
        return [path]

    parts = [part.strip() for part in source.split(",")]
    if len(parts) > 1:
        found = [(part, data_files(part) if part else []) for part in parts]
        for part, files in found:
            if files is None:
                raise DataError(f"{part}: no such file")
        return [file for _, files in found for file in files or ()]
    if path.suffix.lower() in _READERS or not _HUB_ID.fullmatch(source):
        raise DataError(f"{source}: no such file")
    return None


def _files_of(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in _READERS
        and file.is_file()
        and file.name not in _OF_DATASETS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(f"{folder}: no data in this folder, want files in {', '.join(_READERS)}")
    return files


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file, by its suffix; an unknown one is JSON. Raises DataError."""
    try:
        yield from _READERS.get(path.suffix.lower(), _read_json)(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


# ----------------------------------------------------------------- JSON


def _read_json(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        start = file.read(_START).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    yield from (_read_array if start == b"[" else _read_lines)(path)


def _read_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    yield str(path), number, _object(path, number, row, "one JSON object a line")
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not JSON ({error.msg}); want one JSON object a line"
            ) from None
        except UnicodeDecodeError:
            raise DataError(f"{path}:{number + 1}: not UTF-8 text") from None


def _read_array(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        text = _Pieces(file)
        try:
            text.next_character()  # the bracket
            if text.peek() == "]":
                return
            end = ","
            while end == ",":
                text.peek()
                line = text.line
                row = _object(path, line, text.value(), "objects in the array")
                yield str(path), line, row
                end = text.next_character()
        except json.JSONDecodeError as error:
            line = text.line + text.text.count("\n", text.at, error.pos)
            raise DataError(f"{path}:{line}: not JSON ({error.msg})") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}: after line {text.line}: not UTF-8 text") from None
        if end != "]":
            raise DataError(f"{path}:{text.line}: not JSON (want , or ] after an object)")


def _object(path: Path, line: int, row: Any, want: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line}: got a {kind_of(row)}, want {want}")
    return row


def kind_of(value: Any) -> str:
    """What a value of JSON is, in a word for a person."""
    kinds = {list: "list", dict: "object", str: "text", bool: "truth value", NoneType: "null"}
    return kinds.get(type(value), "number" if isinstance(value, int | float) else "value")


class _Pieces:
    """A text file that is read piece by piece, as far as it is needed."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at, self.line = file, "", 0, 1
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            self._pass(blank.end() if blank else self.at)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def next_character(self) -> str:
        """The same, and go behind it."""
        character = self.peek()
        self._pass(self.at + len(character))
        return character

    def value(self) -> Any:
        """The JSON value that begins here. Raises JSONDecodeError."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if len(self.text) - self.at < _LONGEST_ROW and self._more():
                    continue
                raise
            self._pass(end)
            return value

    def _pass(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _more(self) -> bool:
        """Read on, at least as much as is left: a long value is then tried few times."""
        rest = self.text[self.at :]
        piece = self.file.read(max(_PIECE, len(rest)))
        self.text, self.at = rest + piece, 0
        return bool(piece)


# ----------------------------------------------------------------- tables


def _read_table(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        # The module's own limit is 128 KiB a field; a field is in the file, so no longer than it.
        csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, delimiter=delimiter)
            try:
                for row in reader:
                    if None in row or None in row.values():
                        raise DataError(
                            f"{path}:{reader.line_num}: the row has not as many fields as the "
                            "header"
                        )
                    yield str(path), reader.line_num, row
            except csv.Error as error:
                raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from None
            except UnicodeDecodeError:
                raise DataError(f"{path}:{reader.line_num + 1}: not UTF-8 text") from None

    return read


def _read_columns(path: Path) -> Iterator[Row]:
    """Parquet, or Arrow as `datasets` keeps it."""
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            for row in batch.to_pylist():
                number += 1
                yield str(path), number, row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        kind = path.suffix.lower().removeprefix(".").capitalize()
        raise DataError(f"{path}: not {kind}, behind row {number} ({reason})") from None


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow

    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1024)
        return

    # Arrow has two forms: with a table of its batches at the end, and without.
    with pyarrow.memory_map(str(path)) as source:
        try:
            table = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
            return
        yield from map(table.get_batch, range(table.num_record_batches))


# ----------------------------------------------------------------- text


def _read_text(path: Path) -> Iterator[Row]:
    """A row a line, split at newlines alone. What begins as a JSON object is JSON."""
    with path.open("rb") as start:
        if re.match(rb'(\xef\xbb\xbf)?\s*\{\s*"', start.read(_START)):
            yield from _read_lines(path)
            return
    number = 0
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    text = line.removesuffix("\n").removesuffix("\r")
                    yield str(path), number, {"text": text}
        except UnicodeDecodeError:
            raise DataError(f"{path}:{number + 1}: not UTF-8 text") from None


_READERS: Final[dict[str, Callable[[Path], Iterator[Row]]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".parquet": _read_columns,
    ".arrow": _read_columns,
    ".txt": _read_text,
}
ROW_FILES: Final = frozenset(_READERS) - {".txt"}
"""Suffixes of files whose rows have names in them."""
