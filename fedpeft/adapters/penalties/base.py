r"""What a penalty is: a term of the loss beside the task's. `adapter.penalty` names it, and there are two kinds.

    over scores      loss_i(theta) + P(scores of record i; scores of record i by the base alone)
    over factors     loss(theta; records) + R(theta),   R = mean over layers of the method's `value`

A new one is a file here and a line in `fedpeft.registry`: a subclass of `OverScores` or `OverFactors` with its options
in `Config` (they stand under `adapter.penalty_options`). A term that sees records together, as a covariance or a
singular value over a batch does, is neither: under DP one record would move what others' losses are.

A term over scores is a part of its own record's loss, and is clipped with it.

Of a term over factors, under sample-level DP, the gradient is added after the noise, and is neither clipped nor
noised. This costs nothing: with g_t the t-th noised sum that is released, and z public,

    theta_0 = z,   theta_{t+1} = step(theta_t, g_t + R'(theta_t)),   so by induction theta_t = f_t(z, g_0 ... g_{t-1})

and R'(theta_t), a function of theta_t, is one of values that have been released: no record is read again, all that a
client sends is post-processing of g_0, g_1, ..., and the account is that of the same steps without a penalty. Nor is
the pull bent by the clipping of a record, as it would be if it were a part of each record's loss.

In a cohort factors have a dimension of clients in front, and every client gets its own gradient: a `value` is written
for the last two dimensions (`own["A"].mT`). The loss that a round reports has P, and not R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft.adapters.grouped import Values
from fedpeft.config import AdapterConfig, Configured
from fedpeft.errors import InputError
from fedpeft.models.base import Base
from fedpeft.state import AdapterState

SMOOTH = 1e-3


class Penalty(Configured):
    """A term of the loss."""


class OverScores(Penalty):
    """A term of each record's loss over what the model says of the record, and the base alone would say."""

    def losses(self, scores: Tensor, before: Tensor, targets: Tensor) -> Tensor:
        """The term [N] of each record, which must not depend on the others in its batch.

        Args:
            scores: of each token among all words [N, T, K].
            before: those of the base alone, without a gradient.
            targets: [N, T], IGNORE where nothing is predicted.
        """
        raise NotImplementedError


class OverFactors(Penalty):
    """A term of the loss over the factors of each layer.

    Attributes:
        roles: of the tensors that it reads at every layer; A is [r, in], B [out, r].
    """

    roles: ClassVar[tuple[str, ...]] = ("A", "B")

    def value(self, own: Values, weight: Callable[[], Tensor]) -> Tensor:
        """The penalty [...] of one layer.

        Args:
            own: the tensors of these roles, [..., *shape], with all clients' in the dimensions in front.
            weight: gives the frozen weight [out, in].

        Raises:
            InputError: it does not fit the shapes.
        """
        raise NotImplementedError

    def require_fit(self, shapes: Mapping[str, torch.Size], site: str) -> None:
        """Raise InputError where the tensors of a layer are not what it is made for; `shapes` by role."""
        for role in self.roles:
            if role not in shapes or (role in "AB" and len(shapes[role]) != 2):
                raise InputError(
                    f"{say_name(self)}: it is over {' and '.join(self.roles)} of every layer, with A and B as "
                    f"matrices, and {site} has {', '.join(f'{key} {list(shape)}' for key, shape in shapes.items())}. "
                    "Take another adapter, or set adapter.penalty=null."
                )


class Penalised:
    """A penalty over factors with the layers of a model that it is over."""

    def __init__(self, penalty: OverFactors, base: Base, form: AdapterState) -> None:
        self.penalty, self.base = penalty, base
        self.keys: dict[str, dict[str, str]] = {}
        for site in form.lora_sites():
            held = {form.role(key): value.shape for key, value in form.tensors.items() if key.startswith(f"{site}/")}
            penalty.require_fit(held, site)
            self.keys[site] = {role: f"{site}/{role}" for role in penalty.roles}

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """R [...], of tensors by parameter name."""
        each = [
            self.penalty.value({role: values[key] for role, key in keys.items()}, partial(self.base.values, site))
            for site, keys in self.keys.items()
        ]
        # A layer of which nothing trains has no dimension of clients in front.
        return torch.stack(torch.broadcast_tensors(*each)).mean(0)

    def gradients(self, trained: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """R' by parameter name, in what trains and R reads; each client's own where values are those of many.

        Args:
            others: what R reads and does not train.
        """
        read = {key for keys in self.keys.values() for key in keys.values()}
        leaves = {key: value.detach().requires_grad_() for key, value in trained.items() if key in read}
        with torch.enable_grad():
            fixed = {key: value.detach() for key, value in others.items() if key in read}
            # The sum over clients: R of one reads no other's factors, so each gets its own gradient.
            slopes = torch.autograd.grad(self.total({**fixed, **leaves}).sum(), list(leaves.values()))
        return dict(zip(leaves, slopes, strict=True))


def find_penalty(adapter: AdapterConfig) -> Penalty | None:
    """The penalty that a config names, with its options; None where it names none."""
    if adapter.penalty is None:
        return None
    found: Penalty = configs.method("penalties", adapter.penalty, adapter.penalty_options, "adapter.penalty_options")
    return found


def bind_penalty(adapter: AdapterConfig, base: Base, form: AdapterState) -> Penalised | None:
    """The config's penalty over factors with the layers of a model; None where it has none.

    Args:
        form: the adapter's tensors.

    Raises:
        InputError: the adapter has not the tensors that it is over.
    """
    penalty = find_penalty(adapter)
    return Penalised(penalty, base, form) if isinstance(penalty, OverFactors) else None


def say_name(penalty: Penalty) -> str:
    """The key and the name that a message blames."""
    return f"adapter.penalty={type(penalty).__module__.rpartition('.')[2]}"


def lack_orthonormality(own: Values) -> tuple[Tensor, Tensor]:
    """|| A A^T - I || and || B^T B - I || [...], Frobenius.

    Smooth at zero, sqrt(|| . ||^2 + e^2) - e with e = 1e-3: a norm has slope 1 however near it is to zero, and at
    orthonormal factors, where SORSA begins, rounding would say in which direction.
    """
    A, B = own["A"], own["B"]
    return _measure_distance(A @ A.mT), _measure_distance(B.mT @ B)


def _measure_distance(gram: Tensor) -> Tensor:
    off: Any = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    smooth: Tensor = (off.square().sum((-2, -1)) + SMOOTH**2).sqrt() - SMOOTH
    return smooth
