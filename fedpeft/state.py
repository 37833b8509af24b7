"""AdapterState: the only thing on the wire and on disk. Named tensors, and per adapted module (site) what they mean.

A tensor is named `site/role`: the module's path in the base model, and what the tensor is there. Roles of a LoRA site:

    A            [r, in]     as peft's lora_A.weight
    B            [out, r]    as peft's lora_B.weight
    R            [r, r]      core of LoRA-SB: the product is scaling * B R A
    residual_B, residual_A   factored change of the frozen weight: W <- W + residual_B residual_A (scaling included)

Tensors of a trained head keep their parameter names as roles; asking for the role "head" means all of them. A tensor
that a strategy sends beside the adapter is named `role:site/role`, as SCAFFOLD's `control:site/A`; its role is the
prefix.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedpeft.errors import InputError
from fedpeft.foreign import read_json, shown

if TYPE_CHECKING:
    import numpy as np

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)}


class StateMismatch(InputError):
    """Two adapter states do not have the same tensors; the message names the difference."""


@dataclass(frozen=True)
class Site:
    """An adapted module: `kind` is lora or head, `shape` its frozen weight's [out, in], `scaling` alpha / r."""

    kind: str
    shape: tuple[int, ...] = ()
    scaling: float = 1.0


@dataclass(frozen=True)
class AdapterState:
    """Tensors by `site/role`, in sorted order, and the sites they belong to. Treat both dicts as read-only."""

    tensors: dict[str, Tensor]
    sites: dict[str, Site] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", {key: self.tensors[key] for key in sorted(self.tensors)})

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def role(self, key: str) -> str:
        """What the tensor is: "head" for every tensor of a head, the prefix for what is sent beside the adapter."""
        prefix, colon, _ = key.partition(":")
        if colon:
            return prefix
        site, _, role = key.rpartition("/")
        return "head" if site in self.sites and self.sites[site].kind == "head" else role

    def lora_sites(self) -> list[str]:
        return [name for name, site in self.sites.items() if site.kind != "head"]

    def rank(self, site: str) -> int:
        return self.tensors[f"{site}/A"].shape[0]

    def select(self, roles: Iterable[str]) -> AdapterState:
        """The tensors whose role is one of `roles`; all sites are kept, so that nothing loses its meaning."""
        roles = set(roles)
        return AdapterState({key: value for key, value in self.tensors.items() if self.role(key) in roles}, self.sites)

    def without(self, roles: Iterable[str]) -> AdapterState:
        roles = set(roles)
        return AdapterState(
            {key: value for key, value in self.tensors.items() if self.role(key) not in roles}, self.sites
        )

    def replace(self, tensors: dict[str, Tensor] | AdapterState) -> AdapterState:
        """A copy with these tensors put in, or added."""
        new = tensors.tensors if isinstance(tensors, AdapterState) else tensors
        return AdapterState({**self.tensors, **new}, self.sites)

    def map(self, function: Callable[[Tensor], Tensor]) -> AdapterState:
        return AdapterState({key: function(value) for key, value in self.tensors.items()}, self.sites)

    def clone(self) -> AdapterState:
        return self.map(lambda value: value.detach().clone())

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.tensors.values())

    def distance(self, other: AdapterState) -> float:
        """L2 distance over the tensors of `self`."""
        squares = [(value.double() - other[key].double()).square().sum() for key, value in self.tensors.items()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def sha256(self) -> str:
        """Hash of names, dtypes, shapes and bits."""
        digest = hashlib.sha256()
        for key, value in self.tensors.items():
            digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(_bytes(value))
        return digest.hexdigest()

    def require_same_form(self, other: AdapterState, what: str) -> None:
        """Raise StateMismatch unless `other` has exactly the tensors of `self`, in the same shapes and dtypes."""
        missing = [key for key in self.tensors if key not in other.tensors]
        extra = [key for key in other.tensors if key not in self.tensors]
        if missing or extra:
            raise StateMismatch(f"{what}: missing {_few(missing)}; unexpected {_few(extra)}.")
        for key, value in self.tensors.items():
            given = other[key]
            if given.shape != value.shape:
                raise StateMismatch(f"{what}: {key} has shape {list(given.shape)}, expected {list(value.shape)}.")
            if given.dtype != value.dtype:
                raise StateMismatch(f"{what}: {key} has dtype {given.dtype}, expected {value.dtype}.")


def _few(keys: list[str]) -> str:
    return "nothing" if not keys else ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def pack(state: AdapterState) -> tuple[np.ndarray, str]:
    """All tensors in one flat array, and the manifest (JSON) that tells them apart.

    The array has the tensors' dtype when they share one (bfloat16 as an int16 view), else it is their bytes as uint8.
    """
    values = [value.detach().cpu().contiguous().reshape(-1) for value in state.tensors.values()]
    flat = torch.cat(values) if _one_dtype(state) else torch.cat(
        [torch.empty(0, dtype=torch.uint8), *(value.view(torch.uint8) for value in values)])
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy(), manifest_of(state)


def manifest_of(state: AdapterState) -> str:
    """What tells the tensors of a packed array apart."""
    entries = [[key, str(value.dtype).removeprefix("torch."), list(value.shape)]
               for key, value in state.tensors.items()]
    return json.dumps({"tensors": entries, "sites": {name: asdict(site) for name, site in state.sites.items()}})


def packed_form(form: AdapterState) -> tuple[str, int]:
    """numpy's name of the dtype, and the length, of the array that `pack` makes of a state of this form."""
    if not _one_dtype(form):
        return "uint8", form.nbytes
    dtype = next(iter(form.tensors.values())).dtype
    return "int16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."), form.parameters


def _one_dtype(state: AdapterState) -> bool:
    dtypes = {value.dtype for value in state.tensors.values()}
    return len(dtypes) == 1 and torch.bool not in dtypes


def described(manifest: str, longest: int | None = None) -> AdapterState:
    """The form that a manifest tells: its tensors without values (torch's meta device), and the sites.

    Args:
        longest: bytes of the manifest; None takes any.

    Raises:
        StateMismatch: the manifest is malformed or too long.
    """
    try:
        meta = read_json(manifest, "manifest", len(manifest.encode()) if longest is None else longest)
        names = [key for key, _, _ in meta["tensors"]]
        if names != sorted(set(names)):
            raise ValueError("names are not sorted, or not different")
        tensors = {_text(key): torch.empty(_sizes(shape), dtype=DTYPES[_text(dtype)], device="meta")
                   for key, dtype, shape in meta["tensors"]}
        sites = {name: Site(_text(site["kind"]), _sizes(site["shape"]), _finite(site["scaling"]))
                 for name, site in meta["sites"].items()}
        return AdapterState(tensors, sites)
    except Exception as error:  # of a structure that somebody else made, whatever is wrong with it
        raise StateMismatch(f"manifest is not valid: {shown(repr(error), 500)}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 8 or any(type(size) is not int or size < 0 for size in values):
        raise ValueError(f"{values!r} is no shape")
    return tuple(values)


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no scaling")
    return float(value)


def unpack(array: np.ndarray, manifest: str | AdapterState) -> AdapterState:
    """The inverse of `pack`, bit for bit.

    Args:
        manifest: as `pack` made it, or what `described` read in it.

    Raises:
        StateMismatch: the manifest is malformed or does not describe this array.
    """
    form = described(manifest) if isinstance(manifest, str) else manifest
    if array.nbytes != form.nbytes:
        raise StateMismatch(f"array has {array.nbytes} bytes, its manifest describes {form.nbytes}.")
    tensors: dict[str, Tensor] = {}
    raw = torch.from_numpy(array.copy() if not array.flags.writeable else array).reshape(-1).view(torch.uint8)
    start = 0
    for key, value in form.tensors.items():
        tensors[key] = raw[start : start + value.nbytes].clone().view(value.dtype).reshape(value.shape)
        start += value.nbytes
    return AdapterState(tensors, form.sites)


def to_dict(state: AdapterState) -> dict[str, Any]:
    """The sites as JSON-ready data; the tensors go to safetensors beside it."""
    return {name: asdict(site) for name, site in state.sites.items()}


def from_dict(tensors: dict[str, Tensor], sites: dict[str, Any]) -> AdapterState:
    return AdapterState(
        tensors, {name: Site(site["kind"], tuple(site["shape"]), site["scaling"]) for name, site in sites.items()}
    )
