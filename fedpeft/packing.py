"""Adapter states as one flat array and a manifest in JSON, bit for bit: what is on the wire.

A manifest may have been written by somebody else: its size, depth and values are checked before anything is made of it.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedpeft.foreign import read_json, require_length, shown
from fedpeft.state import AdaptedLayer, AdapterState, StateMismatch

if TYPE_CHECKING:
    import numpy as np

NAMES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
DTYPES = {name: getattr(torch, name) for name in NAMES}
PARTS = ("tensors", "extra")  # of a state, in the order in which they are packed


def pack_state(state: AdapterState) -> tuple[np.ndarray, str]:
    """All tensors in one flat array, and the manifest (JSON) that tells them apart.

    The array has the tensors' dtype when they share one (bfloat16 as an int16 view), else it is their bytes as uint8.
    """
    values = [value.detach().cpu().reshape(-1) for value in state.payload]
    # The empty one is for a state without tensors, which `cat` alone refuses.
    flat = (
        torch.cat(values)
        if _one_dtype(state)
        else torch.cat([torch.empty(0, dtype=torch.uint8), *(value.view(torch.uint8) for value in values)])
    )
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy(), manifest_of(state)


def manifest_of(state: AdapterState) -> str:
    """What tells the tensors of a packed array apart."""
    listed = [
        tuple((key, value.dtype, tuple(value.shape)) for key, value in getattr(state, part).items()) for part in PARTS
    ]
    return _write_manifest(*listed, tuple(state.sites.items()))


Listed = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


@lru_cache(maxsize=16)  # all clients of a round have one form, or a few
def _write_manifest(tensors: Listed, extra: Listed, sites: tuple[tuple[str, AdaptedLayer], ...]) -> str:
    parts = {
        part: [[key, str(dtype).removeprefix("torch."), list(shape)] for key, dtype, shape in listed]
        for part, listed in zip(PARTS, (tensors, extra), strict=True)
    }
    return json.dumps({**parts, "sites": {name: vars(site) for name, site in sites}})


def packed_form(form: AdapterState) -> tuple[str, int]:
    """numpy's name of the dtype, and the length, of the array that `pack` makes of a state of this form."""
    if not _one_dtype(form):
        return "uint8", form.nbytes
    dtype = form.payload[0].dtype
    count = sum(value.numel() for value in form.payload)
    return "int16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."), count


def _one_dtype(state: AdapterState) -> bool:
    dtypes = {value.dtype for value in state.payload}
    return len(dtypes) == 1 and torch.bool not in dtypes


def read_form(manifest: str, longest: int | None = None) -> AdapterState:
    """The form that a manifest tells: its tensors without values (torch's meta device), and the sites.

    Args:
        longest: bytes of the manifest; None takes any.

    Raises:
        StateMismatch: the manifest is malformed or too long.
    """
    try:
        if longest is not None:
            require_length(manifest, "manifest", longest)
        return _form_of(manifest)
    except Exception as error:  # of a structure that somebody else made, whatever is wrong with it
        raise StateMismatch(f"manifest is not valid: {shown(repr(error), 500)}") from error


@lru_cache(maxsize=4)  # all clients of a round have one manifest, or a few
def _form_of(manifest: str) -> AdapterState:
    meta = read_json(manifest, "manifest", len(manifest.encode()))
    listed = {}
    for part in PARTS:
        names = [key for key, _, _ in meta[part]]
        if names != sorted(set(names)):
            raise ValueError("names are not sorted, or not different")
        listed[part] = {
            _require_text(key): torch.empty(_require_sizes(shape), dtype=DTYPES[_require_text(dtype)], device="meta")
            for key, dtype, shape in meta[part]
        }
    sites = {
        name: AdaptedLayer(_require_text(site["kind"]), _require_sizes(site["shape"]), _require_finite(site["scaling"]))
        for name, site in meta["sites"].items()
    }
    return AdapterState(**listed, sites=sites)


def _require_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _require_sizes(values: Any) -> tuple[int, ...]:
    # Exact types: True is an int.
    if not isinstance(values, list) or len(values) > 8 or any(type(size) is not int or size < 0 for size in values):
        raise ValueError(f"{values!r} is no shape")
    return tuple(values)


def _require_finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no scaling")
    return float(value)


def unpack_state(array: np.ndarray, manifest: str | AdapterState) -> AdapterState:
    """The inverse of `pack`, bit for bit.

    Args:
        manifest: as `pack` made it, or what `described` read in it.

    Raises:
        StateMismatch: the manifest is malformed or does not describe this array.
    """
    form = read_form(manifest) if isinstance(manifest, str) else manifest
    if array.nbytes != form.nbytes:
        raise StateMismatch(f"array has {array.nbytes} bytes, its manifest describes {form.nbytes}.")
    if _one_dtype(form) and array.dtype.itemsize == form.payload[0].itemsize:
        return _unpack_alike(array, form)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    raw = torch.from_numpy(array.copy() if not array.flags.writeable else array).reshape(-1).view(torch.uint8)
    start = 0
    for part in PARTS:
        for key, value in getattr(form, part).items():
            parts[part][key] = raw[start : start + value.nbytes].clone().view(value.dtype).reshape(value.shape)
            start += value.nbytes
    return AdapterState(**parts, sites=form.sites)


def _unpack_alike(array: np.ndarray, form: AdapterState) -> AdapterState:
    """`unpack` where all tensors have one dtype: a copy of each piece, cut by numpy, which is quicker than torch."""
    flat, dtype, start = array.reshape(-1), form.payload[0].dtype, 0
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for part in PARTS:
        for key, value in getattr(form, part).items():
            end = start + value.numel()
            parts[part][key] = torch.from_numpy(flat[start:end].reshape(value.shape).copy()).view(dtype)
            start = end
    return AdapterState(**parts, sites=form.sites)
