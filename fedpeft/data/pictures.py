"""Pictures as arrays, whatever file, table or library they come from: one reading of each of Pillow's modes.

| mode | read as |
|---|---|
| 1, L | grey |
| RGB, CMYK, YCbCr, P | colour |
| LA, La, RGBA, RGBa, PA, P with transparency | grey or colour on white |
| I;16 (and its byte orders) | grey, 0 to 65,535 brought to 0 to 255 |
| F | grey fractions, 0 to 1 |
| anything else | refused by its mode |

A mode says how numbers are stored, not which number is white, so that ranges are looked at over the whole column:
whole numbers that never pass 16, as those of masks, binary and 4-bit pictures, would be read as almost black and are
refused. A photo lies as its camera was held (EXIF), as in `datasets`. What has several pages or frames is refused; of
an MPO the first is the photo.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Array = np.ndarray
COLOUR = ("RGB", "CMYK", "YCbCr", "P")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
DARK = 16  # largest value of whole numbers at which a whole column counts as not using 0 to 255
ORIENTATION = 0x0112  # of EXIF: how a photo is to be turned to lie as its camera was held; 1 is not at all
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
UPRIGHT = (5, 6, 7, 8)  # orientations that exchange height and width
ENDINGS_OF_URLS = ("http://", "https://", "s3://", "gs://", "hf://")


def read_column(values: Sequence[Any], what: str, folder: Path) -> Array | list[Array]:
    """All pictures of a column: [N, H, W, C], or a list of [H, W, C] where they differ in size.

    uint8, or float32 in [0, 1] where any has fractions; C is 1 or 3, and grey ones become RGB where others have colour.

    Args:
        values: paths, bytes, Pillow images, nested lists, arrays, or {"bytes", "path"} as in parquet.
        what: file and column, for errors.
        folder: that relative paths start from.

    Raises:
        InputError: names the record that is no picture, or one of a kind that is not read.
    """
    if isinstance(values, np.ndarray):
        return values
    arrays = []
    for number, value in enumerate(values, 1):
        try:
            arrays.append(read(value, folder))
        except Exception as error:  # Pillow and its plugins raise errors of many kinds
            reason = str(error) or type(error).__name__
            raise InputError(f"{what}: record {number} is no picture that can be read: {reason}") from error
    _require_range(arrays, what)
    if any(array.dtype != np.uint8 for array in arrays):
        arrays = [array.astype(np.float32) / 255 if array.dtype == np.uint8 else array for array in arrays]
    channels = max(array.shape[2] for array in arrays)
    arrays = [np.repeat(array, channels, axis=2) if array.shape[2] == 1 else array for array in arrays]
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays


def read(value: Any, folder: Path = Path()) -> Array:
    """One picture [H, W, C], C 1 or 3: uint8, or float32 in [0, 1].

    Raises:
        ValueError, OSError, and what else Pillow raises: it is no picture, or of a mode that is not read.
    """
    from PIL import Image

    value = _place_of(value, folder)
    if isinstance(value, bytes | str):
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # 89 million pixels are 268 MB as colour
            value = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    if not isinstance(value, Image.Image):
        return _from_numbers(value)
    frames = getattr(value, "n_frames", 1)
    if frames > 1 and value.format != "MPO":
        raise ValueError(f"{value.format} with {frames} frames or pages; a record is one picture")
    turn = TURNS.get(orientation(value))
    return _from_pillow(value if turn is None else value.transpose(Image.Transpose[turn]))


def orientation(picture: Picture) -> int:
    """EXIF's number for how a photo is turned; 1, as it is stored, where there is none that can be read.

    Of all entries only this one is decoded: those of cameras are often of other types than they should be.
    """
    try:
        number = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises errors of many kinds for EXIF that is none
        return 1
    return number if isinstance(number, int) and number in TURNS else 1


def encoded(value: Any, folder: Path = Path()) -> bytes:
    """The bytes of a picture in a file, or in a table.

    Raises:
        ValueError, OSError: there is none.
    """
    value = _place_of(value, folder)
    if not isinstance(value, str):
        return bytes(value)
    with open(value, "rb") as file:
        return file.read()


def _place_of(value: Any, folder: Path) -> Any:
    """A path as one to read, and what a dictionary holds."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, float) and np.isnan(value)):
        raise ValueError("there is none")
    if isinstance(value, str):
        if value.lower().startswith(ENDINGS_OF_URLS):
            raise ValueError(f"'{value}' is a URL; pictures are read from files")
        value = os.path.join(folder, os.path.expanduser(value))  # of tens of thousands, where Path takes its time
    return value


def as_bytes(array: Array) -> bytes:
    """A picture with its type and shape, for hashes."""
    return f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()


def _from_pillow(picture: Picture) -> Array:
    if picture.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info:
        return _on_white(picture)
    if picture.mode in ("1", "L"):
        return np.asarray(picture.convert("L"))[..., None]
    if picture.mode in COLOUR:
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    if picture.mode in DEEP:
        # 65,535 / 255, so that white stays white.
        return np.round(np.asarray(picture).astype(np.float64) / 257).astype(np.uint8)[..., None]
    if picture.mode == "F":
        return _to_fractions(np.asarray(picture))[..., None]
    raise ValueError(f"mode {picture.mode} has no fixed white or colours; save it as 8-bit grey (L) or colour (RGB)")


def _on_white(picture: Picture) -> Array:
    """Grey stays grey. A shape that only its transparency shows, and white swallows, is an error."""
    from PIL import Image

    full = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", full.size, "white"), full).convert("RGB")
    array, alpha = np.asarray(flat), np.asarray(full.getchannel("A"))
    if array.min() == array.max() and alpha.min() != alpha.max():
        raise ValueError(f"mode {picture.mode}: on a white ground its shape cannot be seen; give it a ground")
    return array[..., :1] if picture.mode in ("LA", "La", "L", "1") else array


def _from_numbers(value: Any) -> Array:
    """Nested lists or an array: whole numbers 0 to 255 or fractions 0 to 1."""
    array = np.array([[np.asarray(cell) for cell in row] for row in value])
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or not array.size:
        raise ValueError(f"shape {list(array.shape)}, expected [H, W], [H, W, 1] or [H, W, 3]")
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        return _to_fractions(array)
    if array.dtype.kind not in "iu":
        raise ValueError(f"values of type {array.dtype}, expected numbers")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(
            f"whole numbers from {array.min()} to {array.max()}; allowed are 0 to 255, or fractions 0 to 1"
        )
    return array.astype(np.uint8)


def _to_fractions(array: Array) -> Array:
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise ValueError(
            f"fractions from {array.min():g} to {array.max():g}; allowed are 0 to 1, or whole numbers 0 to 255"
        )
    return array.astype(np.float32)


def _require_range(arrays: list[Array], what: str) -> None:
    whole = [array for array in arrays if array.dtype == np.uint8]
    largest = max((int(array.max()) for array in whole), default=255)
    if largest <= DARK and any(array.min() != array.max() for array in whole):
        raise InputError(
            f"{what}: no value in {len(whole)} pictures is above {largest} where 255 is white: they look "
            "binary, 4-bit, or 12-bit in 16. Bring them to 0 to 255, or to fractions 0 to 1."
        )
