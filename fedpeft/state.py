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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedpeft.errors import InputError

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
    entries = [
        [key, str(value.dtype).removeprefix("torch."), list(value.shape)] for key, value in state.tensors.items()
    ]
    manifest = json.dumps({"tensors": entries, "sites": {name: asdict(site) for name, site in state.sites.items()}})
    values = [value.detach().cpu().contiguous().reshape(-1) for value in state.tensors.values()]
    dtypes = {value.dtype for value in values}
    if len(dtypes) == 1 and next(iter(dtypes)) != torch.bool:
        flat = torch.cat(values)
        return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy(), manifest
    flat = torch.cat([value.view(torch.uint8) for value in values]) if values else torch.empty(0, dtype=torch.uint8)
    return flat.numpy(), manifest


def unpack(array: np.ndarray, manifest: str) -> AdapterState:
    """The inverse of `pack`, bit for bit.

    Raises:
        StateMismatch: the manifest is malformed or does not describe this array.
    """
    try:
        meta = json.loads(manifest)
        entries = [(str(key), DTYPES[dtype], [int(size) for size in shape]) for key, dtype, shape in meta["tensors"]]
        sites = {
            name: Site(str(site["kind"]), tuple(site["shape"]), float(site["scaling"]))
            for name, site in meta["sites"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateMismatch(f"manifest is not valid: {error!r}") from error
    raw = torch.from_numpy(array.copy() if not array.flags.writeable else array).reshape(-1).view(torch.uint8)
    tensors: dict[str, Tensor] = {}
    start = 0
    for key, dtype, shape in entries:
        count = dtype.itemsize
        for size in shape:
            if size < 0:
                raise StateMismatch(f"manifest: {key} has shape {shape}.")
            count *= size
        if start + count <= raw.numel():
            tensors[key] = raw[start : start + count].clone().view(dtype).reshape(shape)
        start += count
    if start != raw.numel():
        raise StateMismatch(f"array has {raw.numel()} bytes, its manifest describes {start}.")
    return AdapterState(tensors, sites)


def to_dict(state: AdapterState) -> dict[str, Any]:
    """The sites as JSON-ready data; the tensors go to safetensors beside it."""
    return {name: asdict(site) for name, site in state.sites.items()}


def from_dict(tensors: dict[str, Tensor], sites: dict[str, Any]) -> AdapterState:
    return AdapterState(
        tensors, {name: Site(site["kind"], tuple(site["shape"]), site["scaling"]) for name, site in sites.items()}
    )
