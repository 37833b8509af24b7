"""Files of records, read as they are typed: csv, tsv, jsonl, json and parquet to columns of equal length.

Nothing is typed by its content. A csv has text only, and an empty field is missing; json and parquet have the types
that the file says, whole numbers exact. What is no such file is refused with the line and with what to do.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fedpeft.data.ragged import BLOCK, TextWriter
from fedpeft.data.skipped import Skipped, note_skipped
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
WIDE, SPARSE = 1000, 100  # columns, and cells for each value, from which on objects have no common keys
PIECE = 2**20  # bytes that are read at a time


def ending_of(path: Path) -> str:
    """The ending that a file is read by: lower case, `.csv.gz` as a whole."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def read(path: Path, folder: Path | None = None, **form: str) -> tuple[Columns, tuple[Skipped, ...]]:
    """Columns of a file, and what was left out of it.

    Args:
        folder: where columns of texts are written, for a cache; None keeps them in memory, as UTF-8.
        form: delimiter and encoding of a csv or tsv file, where they are not those of its ending and UTF-8.

    Raises:
        InputError: it is no such file; names it, the line where there is one, and what to do.
    """
    kind = ending_of(path)
    if kind not in ENDINGS:
        raise InputError(f"{path}: files are read by their ending; allowed: {', '.join(ENDINGS)}.")
    try:
        columns, skipped = ENDINGS[kind](path, folder, **form)
    except InputError:
        raise
    except Exception as error:  # whatever a parser stumbles over, it is about this file
        if folder is not None and isinstance(error, OSError) and str(error.filename).startswith(str(folder)):
            raise  # but for the disk that the cache is on
        said = str(error).strip() or type(error).__name__
        raise InputError(f"{path}: not readable as {kind[1:]}: {said}") from error
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{path}: no records.")
    return columns, skipped


def pieces(path: Path, given: str | None = None) -> Iterator[str]:
    """The text of a file, some at a time: UTF-8, or what its byte order mark says; else the encoding `given`.

    Raises:
        InputError: bytes that are no such text; names the line and how to convert the file.
    """
    lines, encoding, decoder = 1, "", None
    with path.open("rb") as raw:
        for data in _read_pieces(path, raw):
            if decoder is None:
                marked = next((name for mark, name in BOMS if data.startswith(mark)), None)
                unicode = given is None or codecs.lookup(given).name.startswith("utf")  # others may begin so by chance
                encoding = marked if marked is not None and unicode else given or "utf-8"
                decoder = codecs.getincrementaldecoder(encoding)()
            text = _decode_piece(path, decoder, data, encoding, lines)
            if "\0" in text:
                number = lines + text.count("\n", 0, text.index("\0"))
                raise InputError(
                    f"{path}: line {number} has a null character. If the encoding is UTF-16 with no byte order "
                    f"mark: iconv -f UTF-16LE -t UTF-8 {path.name} > new{path.suffix}; else remove it."
                )
            lines += text.count("\n")
            yield text


def _read_pieces(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """A file in pieces, unpacked; an empty one is the last, for a decoder to end with."""
    if path.suffix.lower() == ".gz":
        packed = gzip.GzipFile(fileobj=raw)
        try:
            while piece := packed.read(PIECE):
                yield piece
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{path}: not readable as a gzip file: {error}. Pack it again, or give it unpacked."
            ) from error
    else:
        while piece := raw.read(PIECE):
            yield piece
    yield b""


def _decode_piece(path: Path, decoder: codecs.IncrementalDecoder, data: bytes, encoding: str, lines: int) -> str:
    """The next piece as text; `lines` is the number of the line that it goes on with."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        # What the decoder had kept of the piece before is in front, and has no whole line.
        line = lines + error.object[: error.start].count(b"\n")
        raise InputError(
            f"{path}: line {line} is not in the encoding {encoding.removesuffix('-sig')}: byte "
            f"0x{error.object[error.start]:02x}. Files are read as UTF-8, or by their byte order mark. A csv has "
            "data.format={encoding: windows-1252} or the like; or convert it, for "
            f"a file from Windows: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > new{path.suffix}"
        ) from error


def lines_of(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The lines of a file with their ends, as csv and json end them: CR LF, CR or LF."""
    rest = ""
    for text in pieces(path, encoding):
        seen, rest = max(0, len(rest) - 1), rest + text
        # One at the end may be half of two.
        ends = [match.end() for match in NEWLINE.finditer(rest, seen) if match.end() < len(rest)]
        start = 0
        for end in ends:
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


class Spool:
    """Rows in, columns out: texts go to flat arrays, in memory or in files, and no row is kept as Python's objects.

    Args:
        folder: where columns of texts are written; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.count = folder, 0
        self.columns: dict[str, TextWriter | list[Any]] = {}

    def extend(self, columns: dict[str, Sequence[Any]], count: int) -> None:
        """Put the next `count` rows at the end; a column that was not there before has None in the rows before."""
        for name in [*columns, *(name for name in self.columns if name not in columns)]:
            values = columns.get(name, [None] * count)
            if name not in self.columns:
                path = self.folder and self.folder / f"column-{len(self.columns)}"
                self.columns[name] = TextWriter(path)
                self._put(name, [None] * self.count)
            self._put(name, values)
        self.count += count

    def finish(self) -> Columns:
        """The columns; one with other values than texts is a list."""
        return {
            name: column.finish() if isinstance(column, TextWriter) else column for name, column in self.columns.items()
        }

    def _put(self, name: str, values: Sequence[Any]) -> None:
        column = self.columns[name]
        if isinstance(column, TextWriter) and not all(value is None or isinstance(value, str) for value in values):
            column = self.columns[name] = list(column.finish())
        column.extend(values)


# csv ------------------------------------------------------------------------------------------------------------------


def _read_csv(
    path: Path, folder: Path | None, delimiter: str = "", encoding: str | None = None
) -> tuple[Columns, tuple[Skipped, ...]]:
    delimiter = delimiter or CSV[ending_of(path)]
    rows = _split_rows(path, delimiter, encoding)
    _, header = next(rows, (0, []))
    _require_header(path, header, delimiter)
    names = [name or f"column {number}" for number, name in enumerate(header, 1)]
    spool = Spool(folder)
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
                f"A field that holds a {_name_sign(delimiter)} or a line break stands between double quotes; a missing "
                "value is an empty field."
            )
        else:
            blank += empty
            empty = []
            values.append(row)
            if len(values) == BLOCK:
                spool.extend(dict(zip(names, zip(*values, strict=True), strict=True)), len(values))
                values = []
    if values or not spool.count:
        spool.extend({name: [row[place] for row in values] for place, name in enumerate(names)}, len(values))
    lines = [f"line {number}" for number in sorted(blank)]
    return spool.finish(), note_skipped(str(path), "lines have no value and are left out", lines)


def _name_sign(delimiter: str) -> str:
    return DELIMITERS.get(delimiter, repr(delimiter))


def _split_rows(path: Path, delimiter: str, encoding: str | None) -> Iterator[tuple[int, list[str]]]:
    """(line it starts on, fields) of each row. Text after a closing quote, or a quote never closed, is wrong."""
    reader = csv.reader(lines_of(path, encoding), delimiter=delimiter, strict=True)
    # One number for all readers of the process, so it is put back below.
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
            f"delimiter of {ending_of(path)} files is the {_name_sign(delimiter)}; save it with that one, or set "
            f"data.format={{delimiter: {DELIMITERS[found]}}}."
        )
    require_distinct(path, header)


def require_distinct(path: Path, names: Sequence[str]) -> None:
    """Raise InputError where two columns have one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(
            f"{path}: {Counter(names)[twice[0]]} columns have the name {twice[0]!r}. Rename or remove all but one."
        )


# json -----------------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, folder: Path | None) -> tuple[Columns, tuple[Skipped, ...]]:
    spool, rows = Spool(folder), []
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            row = _parse_json(path, line, f"line {number}")
            if not isinstance(row, dict):
                more = " A file with one list of objects is a .json file." if isinstance(row, list) else ""
                raise InputError(f"{path}: line {number} is {_name_kind(row)}; expected an object on every line.{more}")
            rows.append(row)
            if len(rows) == BLOCK:
                spool.extend(by_column(path, rows), len(rows))
                rows = []
    spool.extend(by_column(path, rows), len(rows))
    return spool.finish(), ()


def _read_json(path: Path, folder: Path | None) -> tuple[Columns, tuple[Skipped, ...]]:
    rows = _parse_json(path, "".join(pieces(path)), "the file")
    if not isinstance(rows, list):
        keys = f" with the keys {', '.join(map(repr, list(rows)[:5]))}" if isinstance(rows, dict) else ""
        raise InputError(f"{path}: expected a list of objects, one per record; found {_name_kind(rows)}{keys}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: record {number} is {_name_kind(row)}; expected objects, one per record.")
    spool = Spool(folder)
    spool.extend(by_column(path, rows), len(rows))
    return spool.finish(), ()


def _parse_json(path: Path, text: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=require_distinct_keys)
    except (ValueError, RecursionError) as error:
        hint = " Objects on lines of their own are a .jsonl file." if "Extra data" in str(error) else ""
        if what != "the file" and text.lstrip().startswith(("[", "{")) and text.rstrip()[-1:] in "[{,":
            hint = " An object or list over several lines is a .json file; here each line is one whole object."
        raise InputError(f"{path}: {what} is no JSON: {str(error) or 'nested too deep'}.{hint}") from error


def require_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, as `json` asks for it; ValueError where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _name_kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def by_column(where: Path, rows: Sequence[dict[str, Any]]) -> Columns:
    """Columns of objects, a column for each key, None where an object does not have it.

    Raises:
        InputError: nearly every object has keys of its own, so that the columns would be as many as the records.
    """
    names, values = dict.fromkeys(name for row in rows for name in row), sum(map(len, rows))
    if len(names) > WIDE and len(names) * len(rows) > SPARSE * values:
        raise InputError(
            f"{where}: {len(rows)} records have {len(names)} different keys, {values / len(rows):.3g} each, and every "
            f"key is a column: {', '.join(map(repr, list(names)[:3]))}, ... Are they names of records? Then write them "
            'as a value, as {"id": "...", "text": "..."}.'
        )
    return {name: [row.get(name) for row in rows] for name in names}


# parquet --------------------------------------------------------------------------------------------------------------


def parquet(path: Path, folder: Path | None = None) -> Columns:
    """Columns of a parquet file as the Python values of their Arrow types: a null stays one, whole numbers exact."""
    from pyarrow import parquet as files

    with files.ParquetFile(path) as file:
        names = file.schema_arrow.names
        require_distinct(path, names)
        spool = Spool(folder)
        # So that a file without rows has its columns.
        spool.extend({name: [] for name in names}, 0)
        for batch in file.iter_batches(BLOCK):
            spool.extend({name: _read_column(path, name, batch.column(name)) for name in names}, batch.num_rows)
    return spool.finish()


def _read_column(path: Path, name: str, column: Any) -> list[Any]:
    try:
        found: list[Any] = column.to_pylist()
    except Exception as error:  # dates beyond Python's, types of other programs
        raise InputError(
            f"{path}: column {name} of the type {column.type} cannot be read: {error}. Remove it, or save it "
            "as strings or numbers."
        ) from error
    return found


CSV = {".csv": ",", ".tsv": "\t", ".csv.gz": ",", ".tsv.gz": "\t"}  # and their delimiters
ENDINGS: dict[str, Callable[..., tuple[Columns, tuple[Skipped, ...]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": lambda path, folder: (parquet(path, folder), ()),
    ".csv.gz": _read_csv,
    ".tsv.gz": _read_csv,
    ".jsonl.gz": _read_jsonl,
    ".ndjson.gz": _read_jsonl,
    ".json.gz": _read_json,
}
