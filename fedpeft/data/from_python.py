"""Data that a Python program hands over are written once into the run's folder, so that a resumed run, and the worker
processes of one, read what the first round had.

    data/source.parquet    of a DataFrame, or of a torch Dataset of dicts
    data/source/           of a datasets.Dataset or DatasetDict, as `save_to_disk` writes it
    data/test...           likewise
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.config import DataConfig
from fedpeft.data import pictures
from fedpeft.errors import InputError
from fedpeft.files import blame_file, scratch_folder

if TYPE_CHECKING:
    import datasets
    import pandas
    from torch.utils.data import Dataset

FOLDER = "data"
BLOCK = 256  # records that are held as Python's objects
Source = Any  # pandas.DataFrame | datasets.Dataset | datasets.DatasetDict | torch.utils.data.Dataset


def write(config: DataConfig, run: Path, data: Source | None, test: Source | None) -> None:
    """Write what there is of `data` and `test`, whole or not at all; `config.source` and `config.test` then name it.

    Raises:
        InputError: of another type, without records, or with values that no file can hold.
        OSError: it cannot be written; names the place.
    """
    with scratch_folder(run, FOLDER) as place:
        made = place / FOLDER
        made.mkdir(mode=0o700)
        for key, argument, value in (("source", "data", data), ("test", "test", test)):
            if value is not None:
                with blame_file(run / FOLDER):
                    written = _write_argument(value, argument, made / key)
                setattr(config, key, str((run / FOLDER / written.name).absolute()))
        made.rename(run / FOLDER)


def follow(config: DataConfig, run: Path) -> None:
    """Let `config` name what `write` has left in the folder of a run that was moved since."""
    for key in ("source", "test"):
        path = Path(getattr(config, key) or "")
        moved = run / FOLDER / path.name
        ours = path.is_absolute() and path.parent.name == FOLDER and path.name.partition(".")[0] == key
        if ours and not path.exists() and moved.exists():
            setattr(config, key, str(moved.absolute()))


def _write_argument(value: Source, argument: str, path: Path) -> Path:
    import datasets
    import pandas
    from torch.utils.data import Dataset, IterableDataset

    if isinstance(value, pandas.DataFrame):
        return _write_frame(value, argument, path.with_suffix(".parquet"))
    if isinstance(value, datasets.Dataset | datasets.DatasetDict):
        return _write_saved(value, argument, path)
    if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
        return _write_rows(value, argument, path.with_suffix(".parquet"))
    hint = "A path goes into the key data.source, or data.test." if isinstance(value, str | Path) else ""
    if isinstance(value, list):
        hint = "A list of dicts becomes one by datasets.Dataset.from_list."
    if isinstance(value, datasets.IterableDataset | IterableDataset):
        hint = "What is read as a stream has no length: clients cannot share it. Save it to a parquet file first."
    kind = type(value)
    raise InputError(
        f"{argument}= is a {kind.__module__}.{kind.__qualname__}; expected a pandas.DataFrame, a datasets.Dataset or "
        f"DatasetDict, or a torch.utils.data.Dataset of dicts with a length. {hint}".rstrip()
    )


def _write_frame(frame: pandas.DataFrame, argument: str, path: Path) -> Path:
    """Columns, and an index that has a name, as pandas writes them."""
    if any(name is not None for name in frame.index.names):
        try:
            frame = frame.reset_index()
        except ValueError as error:
            raise InputError(f"{argument}=: the index of the DataFrame is no column of its own: {error}.") from error
    _require_records(f"{argument}=", len(frame), list(frame.columns))
    try:
        frame.to_parquet(path, index=False)
    except OSError:
        raise
    except Exception as error:  # of pyarrow, by the type of what it cannot write
        raise InputError(
            f"{argument}=: the DataFrame cannot be written as parquet: {error}. Columns hold strings, numbers, "
            "bytes or lists of them; a picture is its path or the bytes of its file."
        ) from error
    return path


def _write_saved(value: datasets.Dataset | datasets.DatasetDict, argument: str, path: Path) -> Path:
    parts = {"": value} if not isinstance(value, dict) else value
    if not parts:
        raise InputError(f"{argument}=: the DatasetDict has no split.")
    for name, part in parts.items():
        _require_records(f"{argument}={name and f' split {name}'}".rstrip(), len(part), part.column_names)
    value.with_format(None).save_to_disk(path)  # a format, as torch, would come back when it is read
    return path


def _write_rows(rows: Dataset[Any], argument: str, path: Path) -> Path:
    """The dicts of a torch Dataset, in blocks of which each has the types that it needs; all have one schema then."""
    import pyarrow as pa
    from pyarrow import parquet

    _require_records(f"{argument}=", _length_of(rows), ["a"])
    blocks: list[Path] = []
    for values in _cut_blocks(rows, argument):
        blocks.append(path.with_name(f"{path.stem}-{len(blocks)}.block"))
        names = dict.fromkeys(name for row in values for name in row)
        with _as_table(argument):
            table = pa.table({name: [row.get(name) for row in values] for name in names})
        parquet.write_table(table, blocks[-1])
    with _as_table(argument):
        schema = pa.unify_schemas([parquet.read_schema(block) for block in blocks], promote_options="permissive")
    with parquet.ParquetWriter(path, schema) as writer:
        for block in blocks:
            tables = [schema.empty_table(), parquet.read_table(block)]
            writer.write_table(pa.concat_tables(tables, promote_options="permissive"))
            block.unlink()
    return path


@contextmanager
def _as_table(argument: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's are among these
        raise InputError(
            f"{argument}=: the records of the Dataset cannot be written as one table: {error}. Each key holds strings, "
            "numbers, tensors or pictures, and of one kind in all records."
        ) from error


def _cut_blocks(rows: Any, argument: str) -> Iterator[list[dict[str, Any]]]:
    total = _length_of(rows)
    for start in range(0, total, BLOCK):
        block = []
        for number in range(start, min(total, start + BLOCK)):
            row = rows[number]
            if not isinstance(row, dict) or not row or not all(isinstance(key, str) for key in row):
                raise InputError(
                    f"{argument}=: record {number + 1} of the Dataset is a {type(row).__name__}; expected a dict "
                    'with a name for each value, as {"image": ..., "label": ...}. Wrap it in one that does.'
                )
            block.append(
                {key: _make_storable(value, f"{argument}=: record {number + 1}: {key}") for key, value in row.items()}
            )
        yield block


def _length_of(rows: Any) -> int:
    return len(rows) if hasattr(rows, "__len__") else 0


def _make_storable(value: Any, what: str) -> Any:
    """A value as parquet holds it; a picture of whole numbers 0 to 255 (or of these through 255) as PNG."""
    import torch
    from PIL import Image

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # [C, H, W], as torch has pictures.
        if value.ndim == 3 and value.shape[0] in (1, 3) and value.shape[2] not in (1, 3):
            value = value.permute(1, 2, 0)
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, Image.Image):
        try:
            value = pictures.read(value)
        except ValueError as error:
            raise InputError(f"{what} is no picture that can be read: {error}.") from error
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if isinstance(value, np.ndarray):
        whole = _as_whole(value)
        return value.tolist() if whole is None else _encode_png(whole)
    return value


def _as_whole(array: np.ndarray) -> np.ndarray | None:
    """The same picture in whole numbers, uint8 [H, W] or [H, W, 3]; None where it is none, or has other fractions."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not array.size or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        return None
    if array.dtype == np.uint8:
        return array
    if array.dtype != np.float32 or not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        return None
    whole = np.round(array * 255).astype(np.uint8)
    return whole if np.array_equal(whole.astype(np.float32) / 255, array) else None


def _encode_png(array: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    # Of no loss at any level; higher ones cost several times the time, before the first round.
    Image.fromarray(array).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _require_records(argument: str, count: int, names: list[Any]) -> None:
    if not count:
        raise InputError(f"{argument}: no records.")
    other = [name for name in names if not isinstance(name, str)]
    if other or not names:
        raise InputError(
            f"{argument}: {f'the column {other[0]!r} has no name that is a string' if other else 'no columns'}."
        )
