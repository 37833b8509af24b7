"""Every adapter state as a plain LoRA: what peft can load, and what offline aggregation works on."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedpeft.adapters.factored import find_method, tensors_at
from fedpeft.adapters.placed import find_placed
from fedpeft.state import FROZEN, AdapterState, StateMismatch


def flatten_adapter(adapter: AdapterState) -> AdapterState:
    """The same change of every weight, s B A, in the roles A and B only; what is no such product stays as it is.

    A core is folded, s B R A = s (B R) A, and a residual appended,

        s B A + residual_B residual_A = s [B, residual_B / s] [A; residual_A],

    so that the rank grows and the scaling stays. Tensors keep the dtype of B and A. Adapters of ours say themselves
    which B and A theirs are (`factored.Factored.fold`).

    >>> from fedpeft.state import AdaptedLayer
    >>> ones = {name: torch.ones(shape) for name, shape in (("q/A", (1, 3)), ("q/B", (2, 1)), ("q/R", (1, 1)))}
    >>> residual = {"q/residual_A": torch.ones(2, 3), "q/residual_B": torch.ones(2, 2)}
    >>> plain = flatten_adapter(AdapterState(ones | residual, {"q": AdaptedLayer("lora_sb", (2, 3), 2.0)}))
    >>> {key: list(value.shape) for key, value in plain.tensors.items()}
    {'q/A': [3, 3], 'q/B': [2, 3]}
    """
    adapter = _fold_factored(adapter)
    tensors, sites = dict(adapter.tensors), dict(adapter.sites)
    for site in adapter.lora_sites():
        if find_placed(sites[site].kind) is not None:
            continue
        keys = [f"{site}/A", f"{site}/B"]
        if sites[site].kind == "peft":
            keys = [f"model.{site}.lora_{factor}.weight/peft" for factor in "AB"]
            if f"{site}/residual_B" not in tensors:
                continue
            del sites[site]
        else:
            sites[site] = replace(sites[site], kind="lora")
        A, B = (tensors[key] for key in keys)
        core = tensors.pop(f"{site}/R", None)
        left, right = tensors.pop(f"{site}/residual_B", None), tensors.pop(f"{site}/residual_A", None)
        if core is not None:
            tensors[keys[1]] = (B.double() @ core.double()).to(B.dtype)
        if left is not None and right is not None:
            left = left.double() / adapter.sites[site].scaling
            tensors[keys[1]] = torch.cat([tensors[keys[1]], left.to(B.dtype)], dim=1)
            tensors[keys[0]] = torch.cat([A, right.to(A.dtype)], dim=0)
    return AdapterState(tensors, sites)


def _fold_factored(adapter: AdapterState) -> AdapterState:
    tensors, sites = dict(adapter.tensors), dict(adapter.sites)
    for site, layer in adapter.sites.items():
        if (method := find_method(layer.kind)) is None:
            continue
        own = tensors_at(adapter, site)
        B, A = method.fold({role: value.double() for role, value in own.items()}, (layer.shape[0], layer.shape[1]))
        for role in own:
            tensors.pop(f"{site}.{role}/{FROZEN}" if role in method.drawn else f"{site}/{role}")
        tensors |= {f"{site}/A": A.float().contiguous(), f"{site}/B": B.float().contiguous()}
        sites[site] = replace(layer, kind="lora")
    return AdapterState(tensors, sites)


def require_same_sites(first: AdapterState, other: AdapterState, what: str) -> None:
    """Raise StateMismatch unless two plain adapters have the same tensors, in the same shapes up to the rank."""
    missing, extra = sorted(set(first.tensors) - set(other.tensors)), sorted(set(other.tensors) - set(first.tensors))
    if missing or extra:
        raise StateMismatch(
            f"{what}: missing {', '.join(missing[:3]) or 'nothing'}; unexpected {', '.join(extra[:3]) or 'nothing'}."
        )
    for key, value in first.tensors.items():
        role = first.role(key)
        shapes = [list(tensor.shape) for tensor in (value, other[key])]
        outer = [shape[1:] if role == "A" else shape[:1] if role == "B" else shape for shape in shapes]
        if outer[0] != outer[1]:
            raise StateMismatch(f"{what}: {key} has shape {shapes[1]}, expected {shapes[0]}.")
    for site in other.lora_sites():
        if other[f"{site}/B"].shape[1] != other.rank(site):
            raise StateMismatch(
                f"{what}: {site} has {other.rank(site)} rows in A, but {other[f'{site}/B'].shape[1]} columns in B."
            )
