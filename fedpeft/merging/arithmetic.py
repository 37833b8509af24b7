"""Arithmetic on whole adapters, for robustness without a stream: WiSE-FT and robust weight signatures.

All of it acts on the change s B A that an adapter makes to each weight, never on B and A apart: products are added by
stacking factors, so they are exact and ranks add up (`fedpeft.lowrank.compress` takes off what is superfluous).

    >>> from fedpeft.state import AdapterState, AdaptedLayer
    >>> layers = {"0.q": AdaptedLayer("lora", (2, 3), 2.0)}
    >>> ones = AdapterState({"0.q/A": torch.ones(1, 3), "0.q/B": torch.ones(2, 1)}, layers)
    >>> half = wise_ft(ones, ones, 0.5)
    >>> (half["0.q/B"] @ half["0.q/A"]).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpeft.adapters.flat import flatten_adapter
from fedpeft.errors import InputError
from fedpeft.state import AdapterState

Term = tuple[float, AdapterState]


def wise_ft(start: AdapterState, tuned: AdapterState, a: float) -> AdapterState:
    """(1 - a) theta_0 + a theta_ft: Wortsman et al., arXiv 2109.01903. Heads are averaged entry by entry.

    Args:
        start: the adapter before fine-tuning. A fresh one changes no weight, and then the tuned one's rank stays.
        a: 0 is the start and 1 the tuned adapter, exactly; beyond is extrapolation.
    """
    return combine([(1 - a, start), (a, tuned)])


def combine(terms: Sequence[Term]) -> AdapterState:
    """sum_k w_k theta_k, with the scaling and the dtypes of the first term. Terms without effect take no rank.

    Raises:
        InputError: the terms adapt different modules, or modules of different shapes.
    """
    states = [(weight, flatten_adapter(state)) for weight, state in terms]
    first = states[0][1]
    for _, state in states[1:]:
        _require_same_sites(first, state)
    tensors = {
        key: _sum_weighted([(weight, state[key]) for weight, state in states])
        for key in first.tensors
        if first.role(key) == "head"
    }
    for site in first.lora_sites():
        tensors |= _stack_factors(site, first, states)
    return AdapterState(tensors, first.sites)


def robust_signature(
    clean: AdapterState, robust: AdapterState, layers: int = 7, orthogonal: bool = True
) -> AdapterState:
    """tau = theta_robust - theta_clean on the shallowest layers, as an adapter without head.

    Two adapters of one base, one tuned on clean and one on corrupted data. With `orthogonal`, what the robust one has
    along the clean one is taken out instead, module by module: tau = P_r - (<P_r, P_c> / <P_c, P_c>) P_c with the
    products P = s B A, so that tau is orthogonal to P_c: the authors' signature, with their 7 layers. Cai, Zhang and
    Wang, arXiv 2302.12480. Their averaging of batch norms has no counterpart in an adapter.

    Raises:
        InputError: different modules, or names without a layer number.
    """
    clean, robust = flatten_adapter(clean), flatten_adapter(robust)
    _require_same_sites(clean, robust)
    sites = shallowest(clean, layers)
    tensors: dict[str, Tensor] = {}
    for site in sites:
        share = 1.0
        if orthogonal:
            size = inner(clean, clean, site)
            # Nothing lies along an adapter that changes nothing.
            share = inner(robust, clean, site) / size if size > 0 else 0.0
        tensors |= _stack_factors(site, robust, [(1.0, robust), (-share, clean)])
    return AdapterState(tensors, {site: robust.sites[site] for site in sites})


def patch(target: AdapterState, signature: AdapterState, strength: float) -> AdapterState:
    """theta + lambda tau where the signature has modules; everything else stays. -lambda takes it off again.

    Raises:
        InputError: the target lacks a module of the signature, or has it in another shape.
    """
    target = flatten_adapter(target)
    tensors = dict(target.tensors)
    for site in signature.lora_sites():
        if site not in target.sites or target.sites[site].shape != signature.sites[site].shape:
            raise InputError(f"signature: {site} is no module of this adapter, or has another shape here.")
        tensors |= _stack_factors(site, target, [(1.0, target), (strength, signature)])
    return AdapterState(tensors, target.sites)


def shallowest(adapter: AdapterState, layers: int) -> list[str]:
    """LoRA modules in the first `layers` layers, by the first number in their names."""
    depth = {
        site: next((int(part) for part in site.split(".") if part.isdigit()), None) for site in adapter.lora_sites()
    }
    numbers = sorted({number for number in depth.values() if number is not None})
    if not numbers:
        raise InputError(f"layers: no module of the adapter has a layer number in its name ({', '.join(depth)}).")
    return [site for site, number in depth.items() if number is not None and number in numbers[:layers]]


def inner(one: AdapterState, other: AdapterState, site: str) -> float:
    """<s B A, s' B' A'>_F through the small products B'^T B and A A'^T."""
    B, A, C, D = (state[f"{site}/{role}"].double() for state in (one, other) for role in ("B", "A"))
    return float(one.sites[site].scaling * other.sites[site].scaling * ((C.T @ B) * (D @ A.T)).sum())


def _stack_factors(site: str, like: AdapterState, states: Sequence[Term]) -> dict[str, Tensor]:
    """Factors of sum_k w_k s_k B_k A_k over the scaling of `like`; those of `like` itself if nothing contributes."""
    B, A = like[f"{site}/B"], like[f"{site}/A"]
    kept = [
        (weight * state.sites[site].scaling / like.sites[site].scaling, state[f"{site}/B"], state[f"{site}/A"])
        for weight, state in states
        if weight != 0 and bool(state[f"{site}/B"].any() and state[f"{site}/A"].any())
    ]
    # Factors of rank 0 are none that peft can load, so those of `like` stay, with B = 0.
    if not kept:
        return {f"{site}/A": A.clone(), f"{site}/B": torch.zeros_like(B)}
    return {
        f"{site}/A": torch.cat([right.to(A.dtype) for _, _, right in kept], dim=0),
        f"{site}/B": torch.cat([(ratio * left.double()).to(B.dtype) for ratio, left, _ in kept], dim=1),
    }


def _sum_weighted(values: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Weighted sum in float64; a single term of weight 1 is that term, bit for bit."""
    used = [(weight, value) for weight, value in values if weight != 0]
    total = torch.zeros_like(values[0][1], dtype=torch.float64)
    for weight, value in used:
        total = total + weight * value.double()
    return total.to(values[0][1].dtype)


def _require_same_sites(one: AdapterState, other: AdapterState) -> None:
    shapes = [{name: site.shape for name, site in state.sites.items()} for state in (one, other)]
    different = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    if different:
        raise InputError(f"adapters: {different[0]} is not in both, or has another shape; they must be of one model.")
