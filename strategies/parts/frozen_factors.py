"""Factors that stay as they were drawn: how clients know them, and what offline aggregation has to check."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.errors import InputError
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.instructions import Drawn


def orthonormal(adapter: AdapterState) -> AdapterState:
    """The adapter with every A [r, n] replaced by an orthonormal basis Q of its row space, A = L Q, and every B that is
    not zero by B L: the products stay.

    Raises:
        InputError: a rank is above the layer's input size.
    """
    tensors = {}
    for site in adapter.lora_sites():
        A, B = adapter[f"{site}/A"], adapter[f"{site}/B"]
        tensors[f"{site}/A"] = rows = _orthonormal_rows(A, site)
        if B.any():  # of an adapter that a run goes on from; a fresh one is zero
            tensors[f"{site}/B"] = (B.double() @ (A.double() @ rows.double().T)).to(B.dtype)
    return adapter.replace(tensors)


def _orthonormal_rows(A: Tensor, site: str) -> Tensor:
    if A.shape[0] > A.shape[1]:
        raise InputError(
            f"strategy.init=orthonormal: {site} has rank {A.shape[0]}, but only {A.shape[1]} inputs. "
            f"Set adapter.r to at most {A.shape[1]}, or strategy.init=kaiming."
        )
    # Server and clients each make it, so it may not hang on signs that LAPACK is free to choose.
    Q, R = torch.linalg.qr(A.double().T)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).double()  # QR is unique only with a signed diagonal
    rows: Tensor = (Q * sign).T.to(A.dtype).contiguous()
    return rows


def tell_drawn(adapter: AdapterState, roles: tuple[str, ...]) -> Drawn:
    """What a client is told about tensors that it draws itself, so that it can check them."""
    return Drawn(roles, adapter.select(roles).sha256())


def shared(server: ServerState, updates: list[Update], role: str) -> str | None:
    """The first site where an update's factor is not exactly the server's; None if there is none."""
    for site in server.adapter.lora_sites():
        key = f"{site}/{role}"
        if any(not torch.equal(update.adapter[key].double(), server.adapter[key].double()) for update in updates):
            return site
    return None


def require_shared(server: ServerState, updates: list[Update], name: str) -> None:
    """Raise InputError unless all adapters have the server's A."""
    site = shared(server, updates, "A")
    if site is not None:
        raise InputError(
            f"strategy {name} freezes A, but the adapters (or the start) have different A at {site}. "
            "Give adapters that were trained from one start with A frozen, or take a strategy that "
            "aggregates both factors (fedex, flexlora, flora)."
        )
