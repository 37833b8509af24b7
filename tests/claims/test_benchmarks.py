"""Claims of REPRODUCIBILITY.md that must not break: eight seeds, one learning rate, the benchmark's own worlds."""

from __future__ import annotations

import pytest

from fedpeft.simulations.benchmarks.federated import DP, SKEW, dp_methods, skew_methods
from fedpeft.simulations.benchmarks.federated_report import paired
from fedpeft.simulations.benchmarks.toy import make_world, simulate

pytestmark = pytest.mark.claims  # how the rules compute is in tests/reference: test_fedsvd, test_lora_fair
SEEDS = range(8)


@pytest.fixture(scope="module")
def private():
    """Final accuracies of the DP experiment at learning rate 1: rows by (method, epsilon)."""
    worlds = [make_world(DP, seed) for seed in SEEDS]
    chosen = {one.name: one for one in dp_methods()}
    rows = {}
    for epsilon, names in ((None, ("FFA", "FFA orthonormal", "FedSVD")), (1.0, ("FedIT", "FFA orthonormal", "FedSVD"))):
        found = [run for name in names for run in simulate(DP, worlds, chosen[name], (1.0,), epsilon)]
        rows[epsilon] = [{"method": run.method, "seed": run.seed, "final": run.final} for run in found]
    return rows


def test_fedsvd_beats_ffa_with_kaiming_rows(private):
    difference, error, count = paired(private[None], "FedSVD", "FFA")
    assert count == 8 and difference > 2 * error > 0


def test_fedsvd_does_not_beat_ffa_with_orthonormal_rows(private):
    for rows in private.values():
        difference, error, _ = paired(rows, "FedSVD", "FFA orthonormal")
        assert abs(difference) < 3 * error


def test_fedsvd_beats_fedavg_at_epsilon_one_and_a_shared_rate(private):
    difference, error, _ = paired(private[1.0], "FedSVD", "FedIT")
    assert difference > 2 * error > 0


def test_lora_fair_gets_there_sooner_than_fedit():
    worlds = [make_world(SKEW, seed) for seed in SEEDS]
    chosen = {one.name: one for one in skew_methods()}
    found = [run for name in ("FedIT", "LoRA-FAIR .01") for run in simulate(SKEW, worlds, chosen[name], (0.3,))]
    rows = [{"method": run.method, "seed": run.seed, "average": run.average} for run in found]
    difference, error, _ = paired(rows, "LoRA-FAIR .01", "FedIT", "average")
    assert difference > 2 * error > 0
