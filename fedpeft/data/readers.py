"""Files of records, read as they are typed: csv, tsv, jsonl, json and parquet to columns of equal length.

Nothing is typed by its content. A csv has text only, and an empty field is missing; json and parquet have the types
that the file says, whole numbers exact. What is no such file is refused with the line and with what to do.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedpeft.data.skipped import Skipped, some
from fedpeft.errors import InputError

Columns = dict[str, Sequence[Any]]
BOMS = (  # longest first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DELIMITERS = {";": "semicolon", "\t": "tab", "|": "bar", ",": "comma"}
NEWLINE = re.compile(r"\r\n|\r|\n")  # not str.splitlines: a json string may hold U+2028 as it is
LONGEST_FIELD = 2**31 - 1


def ending(path: Path) -> str:
    """The ending that a file is read by: lower case, `.csv.gz` as a whole."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def read(path: Path) -> tuple[Columns, tuple[Skipped, ...]]:
    """Columns of a file, and what was left out of it.

    Raises:
        InputError: it is no such file; names it, the line where there is one, and what to do.
    """
    kind = ending(path)
    if kind not in ENDINGS:
        raise InputError(f"{path}: files are read by their ending; allowed: {', '.join(ENDINGS)}.")
    try:
        columns, skipped = ENDINGS[kind](path)
    except InputError:
        raise
    except Exception as error:  # whatever a parser stumbles over, it is about this file
        said = str(error).strip() or type(error).__name__
        raise InputError(f"{path}: not readable as {kind[1:]}: {said}") from error
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{path}: no records.")
    return columns, skipped


def decoded(path: Path) -> str:
    """The text of a file: UTF-8, or what its byte order mark says.

    Raises:
        InputError: bytes that are no such text; names the line and how to convert the file.
    """
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{path}: not readable as a gzip file: {error}. Pack it again, or give it unpacked."
            ) from error
    encoding = next((name for mark, name in BOMS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: line {line} is not in the encoding {encoding.removesuffix('-sig')}: byte "
            f"0x{data[error.start]:02x}. Files are read as UTF-8, or by their byte order mark. Convert it, for a file "
            f"from Windows: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > new{path.suffix}"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(
            f"{path}: line {line} has a null character. If the encoding is UTF-16 with no byte order "
            f"mark: iconv -f UTF-16LE -t UTF-8 {path.name} > new{path.suffix}; else remove it."
        )
    return text


# csv ------------------------------------------------------------------------------------------------------------------


def _csv(path: Path, delimiter: str = ",") -> tuple[Columns, tuple[Skipped, ...]]:
    rows = _rows(path, decoded(path), delimiter)
    _, header = next(rows, (0, []))
    _require_header(path, header, delimiter)
    values: list[list[str]] = []
    blank: list[int] = []
    empty: list[int] = []  # lines without a character, which do not count at the end of a file
    for line, row in rows:
        if not row:
            empty.append(line)
        elif not any(field.strip() for field in row):
            blank.append(line)
        elif len(row) != len(header):
            which = "more" if len(row) > len(header) else "fewer"
            raise InputError(
                f"{path}: line {line} has {len(row)} fields, {which} fields than the header, which has {len(header)}. "
                f"A field that holds a {DELIMITERS[delimiter]} or a line break stands between double quotes; a missing "
                "value is an empty field."
            )
        else:
            blank, empty = [*blank, *empty], []
            values.append(row)
    names = [name or f"column {number}" for number, name in enumerate(header, 1)]
    columns: Columns = {name: [row[place] for row in values] for place, name in enumerate(names)}
    lines = [f"line {number}" for number in sorted(blank)]
    return columns, some(str(path), "lines have no value and are left out", lines)


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line it starts on, fields) of each row. Text after a closing quote, or a quote never closed, is wrong."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise InputError(
                    f"{path}: lines {line} to {reader.line_num} are no csv: {error}. A field that starts with a double "
                    'quote ends with the next one, and a quote inside of it is doubled: "5"" disk". Is there a stray '
                    "quote?"
                ) from error
            if row is None:
                return
            yield line, row
    finally:
        csv.field_size_limit(limit)


def _require_header(path: Path, header: list[str], delimiter: str) -> None:
    if not any(name.strip() for name in header):
        raise InputError(f"{path}: the first line names no column. It must name every column, as text,label.")
    found = next((sign for sign in DELIMITERS if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and found:
        raise InputError(
            f"{path}: the fields seem to be separated by a {DELIMITERS[found]}: the header is {header[0]!r}. The "
            f"delimiter of {ending(path)} files is the {DELIMITERS[delimiter]}; save it with that one"
            f"{', or name the file .tsv' if DELIMITERS[found] == 'tab' else ''}."
        )
    require_distinct(path, header)


def require_distinct(path: Path, names: Sequence[str]) -> None:
    """Raise InputError where two columns have one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(
            f"{path}: {Counter(names)[twice[0]]} columns have the name {twice[0]!r}. Rename or remove all but one."
        )


def _tsv(path: Path) -> tuple[Columns, tuple[Skipped, ...]]:
    return _csv(path, "\t")


# json -----------------------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> tuple[Columns, tuple[Skipped, ...]]:
    rows = []
    for number, line in enumerate(NEWLINE.split(decoded(path)), 1):
        if line.strip():
            row = _parsed(path, line, f"line {number}")
            if not isinstance(row, dict):
                more = " A file with one list of objects is a .json file." if isinstance(row, list) else ""
                raise InputError(f"{path}: line {number} is {_named(row)}; expected an object on every line.{more}")
            rows.append(row)
    return _by_column(rows), ()


def _json(path: Path) -> tuple[Columns, tuple[Skipped, ...]]:
    rows = _parsed(path, decoded(path), "the file")
    if not isinstance(rows, list):
        keys = f" with the keys {', '.join(map(repr, list(rows)[:5]))}" if isinstance(rows, dict) else ""
        raise InputError(f"{path}: expected a list of objects, one per record; found {_named(rows)}{keys}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: record {number} is {_named(row)}; expected objects, one per record.")
    return _by_column(rows), ()


def _parsed(path: Path, text: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        hint = " Objects on lines of their own are a .jsonl file." if "Extra data" in str(error) else ""
        if what != "the file" and text.lstrip().startswith(("[", "{")) and text.rstrip()[-1:] in "[{,":
            hint = " An object or list over several lines is a .json file; here each line is one whole object."
        raise InputError(f"{path}: {what} is no JSON: {str(error) or 'nested too deep'}.{hint}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _named(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _by_column(rows: list[dict[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


# parquet --------------------------------------------------------------------------------------------------------------


def parquet(path: Path) -> Columns:
    """Columns of a parquet file as the Python values of their Arrow types: a null stays one, whole numbers exact."""
    from pyarrow import parquet as files

    table = files.ParquetFile(path).read()
    require_distinct(path, table.column_names)
    columns: Columns = {}
    for name in table.column_names:
        try:
            columns[name] = table.column(name).to_pylist()
        except Exception as error:  # dates beyond Python's, types of other programs
            kind = table.schema.field(name).type
            raise InputError(
                f"{path}: column {name} of the type {kind} cannot be read: {error}. Remove it, or save it "
                "as strings or numbers."
            ) from error
    return columns


ENDINGS: dict[str, Callable[[Path], tuple[Columns, tuple[Skipped, ...]]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": lambda path: (parquet(path), ()),
    ".csv.gz": _csv,
    ".tsv.gz": _tsv,
    ".jsonl.gz": _jsonl,
    ".ndjson.gz": _jsonl,
    ".json.gz": _json,
}
