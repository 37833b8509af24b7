"""Pictures that lie encoded, in files or as bytes: looked at once, and decoded whenever a batch asks for them.

What cannot be decoded is left out and counted; a picture of a kind that is not read (`fedpeft.data.pictures`) is an
error that names it, as a whole column may be of that kind.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.data import pictures
from fedpeft.data.cache import Cache, hash_code
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.errors import InputError

SMALLER = 8  # a JPEG is looked at in this part of its size, which is several times faster and reads it to its end


class Damaged(Exception):
    """Bytes that Pillow cannot decode."""


@dataclass(frozen=True)
class Look:
    """One picture, or what is common to all: channels, whether it has fractions, and its height and width (of several,
    None where they differ); `bright` is whether a value is above DARK where 255 is white.
    """

    channels: int
    fractions: bool
    size: tuple[int, int] | None
    bright: bool


class Pictures(Sequence[Any]):
    """Pictures [H, W, C] as they are read from files or bytes, all with as many channels.

    Args:
        values: paths, bytes, or {"bytes", "path"}.
        folder: that relative paths start from.
        hashes: uint8 [N, 32], sha256 of each picture's bytes.
        form: what is common to the whole column.
    """

    def __init__(self, values: Sequence[Any], folder: Path, hashes: np.ndarray, form: Look) -> None:
        self.values, self.folder, self.hashes, self.form = values, folder, hashes, form

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(len(self))[place]]
        array = pictures.read(self.values[place], self.folder)
        if self.form.fractions and array.dtype == np.uint8:
            array = array.astype(np.float32) / 255
        return np.repeat(array, self.form.channels, axis=2) if array.shape[2] < self.form.channels else array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(picture, dtype=dtype) for picture in self])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of each picture: uint8, or float32 in [0, 1]."""
        return np.dtype(np.float32 if self.form.fractions else np.uint8)

    def max(self) -> float:
        """The largest value, as of an array; reads all pictures, one by one."""
        return max(float(picture.max()) for picture in self)

    @property
    def uniform(self) -> bool:
        """Whether all have one size."""
        return self.form.size is not None

    def take(self, rows: np.ndarray) -> Pictures:
        """The pictures with these numbers, in this order; nothing is read."""
        return Pictures([self.values[row] for row in rows.tolist()], self.folder, self.hashes[rows], self.form)


def open_column(
    values: Sequence[Any], what: str, folder: Path, cache: Cache | None = None
) -> tuple[Any, np.ndarray, tuple[Skipped, ...]]:
    """The pictures of a column, numbers of those that there are, and what is to be said of those that are damaged.

    Arrays, nested lists and pictures of Pillow are read by `pictures.read_column`.

    Raises:
        InputError: as `read_column`, but for damaged ones; or all are.
    """
    if isinstance(values, np.ndarray) or not all(map(_is_encoded, values)):
        return pictures.read_column(values, what, folder), np.arange(len(values)), ()
    hashes, size = np.empty((len(values), 32), dtype=np.uint8), 0
    for number, value in enumerate(values):
        data = _read_bytes(value, what, number, folder)
        hashes[number], size = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8), size + len(data)

    def make(_: Path | None = None) -> dict[str, Any]:
        return _look_at_column(values, what, folder)

    facts = {"pictures": hashlib.sha256(hashes.tobytes()).hexdigest(), "code": hash_code()}
    kept = None if cache is None or size < cache.least else cache.get("pictures", facts, make)
    found = make() if kept is None else kept[1]
    bad = {int(number): str(reason) for number, reason in found["bad"]}
    good = np.array([number for number in range(len(values)) if number not in bad], dtype=np.int64)
    said = [f"record {number + 1} ({_name_picture(values[number])}: {reason})" for number, reason in bad.items()]
    if not len(good):
        raise InputError(f"{what}: none of {len(said)} pictures can be decoded: {said[0]}.")
    form = Look(**{**found["form"], "size": None if found["form"]["size"] is None else tuple(found["form"]["size"])})
    notes = note_skipped(what, "pictures are damaged and left out", said, len(values))
    return Pictures([values[number] for number in good.tolist()], folder, hashes[good], form), good, notes


def _look_at_column(values: Sequence[Any], what: str, folder: Path) -> dict[str, Any]:
    """What is common to a column's pictures, and the numbers of those that are damaged, with the reason."""
    form, bad = None, []
    for number, value in enumerate(values):
        try:
            seen = look(_read_bytes(value, what, number, folder), form is not None and form.bright)
        except Damaged as error:
            bad.append((number, str(error)))
            continue
        except Exception as error:  # Pillow and its plugins raise errors of many kinds
            raise _refuse_picture(what, number, error) from error
        form = seen if form is None else _join_looks(form, seen)
    if form is not None and not form.bright:  # seldom: a mask, or photos of the night
        dark = {number for number, _ in bad}
        pictures.read_column([value for number, value in enumerate(values) if number not in dark], what, folder)
    return {"form": asdict(form or Look(1, False, None, True)), "bad": bad}


def look(data: bytes, bright: bool) -> Look:
    """What a picture is like.

    Args:
        bright: it is known that the column has its white, so that values need not be looked at.

    Raises:
        Damaged: it cannot be decoded.
        ValueError: as of `pictures.read`.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
        width, height = picture.size
        quick = picture.format == "JPEG" and picture.mode in ("L", "RGB")
        turned = quick and pictures.orientation(picture) in pictures.UPRIGHT
        if quick:
            picture.draft(picture.mode, (width // SMALLER, height // SMALLER))
        # Opening has read the header alone.
        picture.load()
    # Too large is not damaged: whoever asks names the record, and leaves nothing out.
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise
    except UnidentifiedImageError as error:
        raise Damaged("no picture of a kind that Pillow knows") from error
    except Exception as error:  # Pillow and its plugins raise errors of many kinds
        raise Damaged(str(error) or type(error).__name__) from error
    if quick and (bright or int(np.asarray(picture).max()) > pictures.DARK):
        return Look(len(picture.getbands()), False, (width, height) if turned else (height, width), True)
    array = pictures.read(data)
    whole = array.dtype == np.uint8
    return Look(array.shape[2], not whole, array.shape[:2], not whole or int(array.max()) > pictures.DARK)


def _join_looks(form: Look, seen: Look) -> Look:
    return Look(
        max(form.channels, seen.channels),
        form.fractions or seen.fractions,
        form.size if form.size == seen.size else None,
        form.bright or seen.bright,
    )


def _is_encoded(value: Any) -> bool:
    return isinstance(value, str | bytes) or (isinstance(value, dict) and {"bytes", "path"} >= value.keys())


def _read_bytes(value: Any, what: str, number: int, folder: Path) -> bytes:
    try:
        return pictures.encoded(value, folder)
    except Exception as error:
        raise _refuse_picture(what, number, error) from error


def _refuse_picture(what: str, number: int, error: Exception) -> InputError:
    reason = str(error) or type(error).__name__
    return InputError(f"{what}: record {number + 1} is no picture that can be read: {reason}")


def _name_picture(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    return Path(path).name if isinstance(path, str) else "bytes"
