"""Changes of the frozen base, kept as factors: W <- W + residual_B residual_A, scaling included."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedpeft import lowrank
from fedpeft.state import ServerState


def with_change(server: ServerState, changes: dict[str, tuple[Tensor, Tensor]]) -> ServerState:
    """The server with B A added to the base at each site of `changes` (B [m, q], A [q, n]).

    Factors are stacked, and compressed once their rank is above min(m, n): a residual never costs more than about twice
    the dense matrix. Stored in float32, or float64 where the adapter is.
    """
    tensors = {}
    for site, (B, A) in changes.items():
        if B.shape[1] == 0:
            continue
        old = server.adapter
        if f"{site}/residual_B" in old:
            B = torch.cat([old[f"{site}/residual_B"].double(), B.double()], dim=1)
            A = torch.cat([old[f"{site}/residual_A"].double(), A.double()], dim=0)
        # Only then: a compression costs a decomposition, and below that rank a stack is smaller than the dense matrix.
        if B.shape[1] > min(B.shape[0], A.shape[1]):
            B, A = lowrank.compress(B, A)
        dtype = torch.float64 if old[f"{site}/B"].dtype == torch.float64 else torch.float32
        tensors[f"{site}/residual_B"] = B.to(dtype).contiguous()
        tensors[f"{site}/residual_A"] = A.to(dtype).contiguous()
    return replace(server, adapter=server.adapter.replace(tensors))
