"""Clients of lower rank hold the first rows of A and the first columns of B."""

from __future__ import annotations

from fedpeft.state import AdapterState


def prefix(adapter: AdapterState, rank: int | None) -> AdapterState:
    """The first `rank` rows of every A and columns of every B; the scaling stays. None cuts nothing."""
    if rank is None:
        return adapter
    cut = {}
    for site in adapter.lora_sites():
        cut[f"{site}/A"] = adapter[f"{site}/A"][:rank].contiguous()
        cut[f"{site}/B"] = adapter[f"{site}/B"][:, :rank].contiguous()
    return adapter.replace(cut)
