"""OPCM against its dense reference, numpy float64, and the norm and directions that its paper promises to keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.merging.base import make, merge
from fedpeft.state import AdaptedLayer, AdapterState
from support.merging_parts import ALIKE, SHAPES, UNLIKE, adapter, change, close

UNEVEN = [AdapterState(one.tensors, {**one.sites, "v": AdaptedLayer("lora", (6, 5), 0.1)}) for one in UNLIKE]
FULL = [adapter(seed, rank=9) for seed in range(4)]


def norm(changes):
    return np.sqrt(sum((value**2).sum() for value in changes.values()))


def opcm(tasks, alpha, whole_diagonal):
    """Dense OPCM. `whole_diagonal`: as the authors' code; else only the entries that the merged change determines."""
    D, lambda_, norms = tasks[0], 1.0, [norm(tasks[0])]
    for task in tasks[1:]:
        norms.append(norm(task))
        total = {}
        for site, tau in task.items():
            U, S, Vt = np.linalg.svd(D[site], full_matrices=True)
            split = int(np.argmax(np.cumsum(S) / S.sum() > alpha))
            Z = U.T @ tau @ Vt.T
            count = min(Z.shape) if whole_diagonal else int((S / S[0] > 1e-10).sum())
            Z[np.arange(count), np.arange(count)] = 0
            Z[:split, :split] = 0
            total[site] = lambda_ * D[site] + U @ Z @ Vt
        lambda_ = norm(total) / np.mean(norms)
        D = {site: value / lambda_ for site, value in total.items()}
    return D, lambda_


def changes(one):
    return {site: change(one, site) for site in SHAPES}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("made", "whole"), [(UNLIKE, False), (UNEVEN, False), (FULL, True)])
def test_opcm_is_the_dense_reference(made, whole, alpha):
    """With full rank it is the authors' code itself, full U and V and the whole diagonal."""
    wanted, lambda_ = opcm([changes(one) for one in made], alpha, whole)
    merger = make("opcm", {"alpha": alpha})
    state = merger.fold(made)
    assert state["numbers"]["lambda"] == pytest.approx(lambda_, rel=1e-9)
    result = merger.result(state)
    for site in SHAPES:
        assert close(change(result, site), wanted[site], 1e-9)


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_opcm_keeps_norm_and_directions(alpha):
    merger = make("opcm", {"alpha": alpha})
    state = merger.add(merger.start(), UNLIKE[0])
    blocks = []
    for index in (1, 2, 3):
        before, lambda_before = changes(merger.result(state)), state["numbers"]["lambda"]
        state = merger.add(state, UNLIKE[index])
        after = changes(merger.result(state))
        mean = np.mean([norm(changes(one)) for one in UNLIKE[: index + 1]])
        assert norm(after) == pytest.approx(mean, rel=1e-12)
        for site in SHAPES:
            P = state["numbers"]["lambda"] * after[site] - lambda_before * before[site]
            tau = change(UNLIKE[index], site)
            assert abs((P * before[site]).sum()) <= 1e-11 * np.linalg.norm(P) * np.linalg.norm(before[site])
            assert 0.3 * np.linalg.norm(tau) < np.linalg.norm(P) <= np.linalg.norm(tau)
            U, S, Vt = np.linalg.svd(before[site], full_matrices=False)
            block = int(np.argmax(np.cumsum(S) / S.sum() > alpha))
            assert np.abs(U[:, :block].T @ P @ Vt[:block].T).max(initial=0) < 1e-11
            blocks.append(block)
    assert max(blocks) >= (3 if alpha == 0.9 else 1)


def test_opcm_depends_on_the_order_and_is_not_the_mean():
    one, other = (merge("opcm", made) for made in (ALIKE, ALIKE[::-1]))
    mean = np.mean([change(part, "u") for part in ALIKE], axis=0)
    assert not close(change(one, "u"), change(other, "u"), 0.1)
    scaled = mean * np.linalg.norm(change(one, "u")) / np.linalg.norm(mean)
    assert not close(change(one, "u"), scaled, 0.1)


def test_opcm_of_orthogonal_tasks_is_their_sum_with_the_norm_of_one():
    """Nothing is projected away, and lambda is the square root of the number of tasks."""
    tasks = []
    for index in range(3):
        A, B = torch.zeros(1, 9, dtype=torch.float64), torch.zeros(7, 1, dtype=torch.float64)
        A[0, index], B[index, 0] = 1.0, 3.0
        tasks.append(AdapterState({"u/A": A, "u/B": B}, {"u": AdaptedLayer("lora", (7, 9), 1.0)}))
    merger = make("opcm")
    state = merger.fold(tasks)
    assert state["numbers"]["lambda"] == pytest.approx(3**0.5)
    assert close(change(merger.result(state), "u"), sum(change(one, "u") for one in tasks) / 3**0.5)
