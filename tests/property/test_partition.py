"""Every partitioner over sizes, class balances and seeds: each record once, no client empty, decided by the seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data.partition import IID, Column, Dirichlet, Quantity, Shards
from support.classified import RANDOM_SPLITS

RANDOM = {"iid": IID(), "dirichlet": Dirichlet(1.0, 1), "shards": Shards(2), "quantity": Quantity(0.5, 2)}
SETTINGS = settings(deadline=None, max_examples=25)


@st.composite
def problems(draw):
    """Labels of 1 to 5 classes, sorted or not, and few enough clients for every partitioner."""
    clients = draw(st.integers(1, 8))
    labels = np.array(draw(st.lists(st.integers(0, 4), min_size=12 * clients, max_size=30 * clients)))
    return np.sort(labels) if draw(st.booleans()) else labels, clients, draw(st.integers(0, 2**31))


@pytest.mark.parametrize("name", RANDOM_SPLITS)
@SETTINGS
@given(problem=problems())
def test_each_record_goes_to_one_client(name, problem):
    labels, clients, seed = problem
    parts = RANDOM[name].split(labels, {}, clients, seed)
    assert len(parts) == clients and all(len(part) for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(len(labels)))


@pytest.mark.parametrize("name", RANDOM_SPLITS)
@SETTINGS
@given(problem=problems())
def test_the_seed_decides(name, problem):
    labels, clients, seed = problem

    def split(seed):
        return [part.tolist() for part in RANDOM[name].split(labels, {}, clients, seed)]

    assert split(seed) == split(seed)
    if clients > 1:
        assert len({str(split(seed + other)) for other in range(3)}) > 1


@SETTINGS
@given(groups=st.lists(st.integers(0, 6), min_size=8, max_size=60), seed=st.integers(0, 9))
def test_column_clients_are_whole_groups(groups, seed):
    values = np.array([f"group {group}" for group in groups])
    clients = min(3, len(set(groups)))
    parts = Column("site").split(np.zeros(len(groups), dtype=np.int64), {"site": values}, clients, seed)
    sizes = sorted((groups.count(group) for group in set(groups)), reverse=True)
    assert [len(part) for part in parts] == sizes[:clients]
    for part in parts:
        assert len(set(values[part])) == 1 and (values == values[part[0]]).sum() == len(part)
