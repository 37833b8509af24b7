"""Partitioners: hand-sized splits, refusals with their numbers, agreement with flwr-datasets; the saved split."""

import json
import warnings

import numpy as np
import pytest

from fedpeft import config as configs
from fedpeft import registry, seeds
from fedpeft.config import Config
from fedpeft.data import split
from fedpeft.data.partition import IID, Column, Dirichlet, Quantity, Shards
from fedpeft.data.records import Records
from fedpeft.errors import InputError

LABELS = np.repeat(np.arange(5), 60)


def counts(parts, labels=LABELS):
    return np.stack([np.bincount(labels[part], minlength=5) for part in parts])


def test_registered_partitioners_take_their_config_fields():
    for name in registry.names("partitioners"):
        partitioner = configs.method("partitioners", name, {}, "data.partition")
        assert vars(partitioner) == {key: item.default for key, item in configs.options_of(type(partitioner)).items()}


def test_iid_is_shuffled_even_when_the_file_is_sorted():
    parts = IID().split(LABELS, {}, 5, seed=0)
    assert [len(part) for part in parts] == [60] * 5
    assert counts(parts).min() >= 4  # contiguous blocks would have one class each


def test_dirichlet_is_that_of_flwr_datasets_on_shuffled_records():
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner

    order = seeds.numpy_generator(3, "partition", "order").permutation(len(LABELS))
    theirs = DirichletPartitioner(
        6, "label", alpha=0.3, min_partition_size=20, shuffle=False, seed=seeds.derive(3, "partition", "shares")
    )
    theirs.dataset = datasets.Dataset.from_dict({"label": LABELS[order], "index": order})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [sorted(theirs.load_partition(client)["index"]) for client in range(6)]
    ours = Dirichlet(alpha=0.3, min_examples=20).split(LABELS, {}, 6, seed=3)
    assert [part.tolist() for part in ours] == expected


def test_dirichlet_skew_grows_as_alpha_falls():
    def skew(alpha):
        tables = [counts(Dirichlet(alpha, 1).split(LABELS, {}, 6, seed)) for seed in range(5)]
        return np.mean([(table / table.sum(1, keepdims=True)).max(1).mean() for table in tables])

    assert skew(0.1) > skew(1.0) + 0.1 > skew(100.0) + 0.2
    assert skew(100.0) < 0.3


def test_dirichlet_that_cannot_reach_its_minimum_says_the_numbers():
    with pytest.raises(
        InputError, match=r"alpha=0\.01, 300 records over 30 clients.*min_examples=9 \(the smallest had \d+ at best\)"
    ):
        Dirichlet(0.01, 9).split(LABELS, {}, 30, 0)


def test_column_groups_are_pure_and_largest_first(caplog):
    site = np.array(["b", "a", "b", "c", "b", "c", "d"])
    parts = Column("site").split(np.zeros(7, dtype=np.int64), {"site": site}, 2, seed=0)
    assert [part.tolist() for part in parts] == [[0, 2, 4], [3, 5]]
    assert "2 of 7 records are in the 2 groups that are left out" in caplog.text


def test_an_owner_is_not_looked_for_among_all_records():
    """With 100,000 clients that is a comparison of each with every record: it took hours."""

    class Owner(str):
        compared = 0

        def __eq__(self, other):
            Owner.compared += 1
            return str(self) == str(other)

        __hash__ = str.__hash__

    values = np.array([Owner(f"ward-{number % 300}") for number in range(1500)], dtype=object)
    parts = Column("ward").split(np.zeros(1500, dtype=np.int64), {"ward": values}, clients=300, seed=0)
    assert sorted(map(tuple, parts)) == [tuple(range(first, 1500, 300)) for first in range(300)]
    assert Owner.compared < 10 * 1500


def test_column_refusals_say_how_many_groups_there_are():
    columns = {"site": np.array(["b", "a", "b", "c"])}
    with pytest.raises(InputError, match=r"has 3 groups.*Set data\.clients to at most 3"):
        Column("site").split(np.zeros(4, dtype=np.int64), columns, 4, 0)
    with pytest.raises(
        InputError, match=r"has 1 groups with at least data\.partition\.min_examples=2 records \(3 groups in all\)"
    ):
        Column("site", min_examples=2).split(np.zeros(4, dtype=np.int64), columns, 2, 0)
    with pytest.raises(InputError, match=r"'sit' is no column of the data. Natural columns: site"):
        Column("sit").split(np.zeros(4, dtype=np.int64), columns, 2, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array(["N", "", "S", " ", "N", ""], dtype=object), [[0, 4], [2]]),
        (np.array(["N", "", "S", "", "N", ""]), [[0, 4], [2]]),
        (np.array([2**53, None, 2**53 + 1, None, 2**53, None], dtype=object), [[0, 4], [2]]),
        (np.array([1.0, np.nan, 2.0, np.nan, 1.0, np.nan]), [[0, 4], [2]]),
    ],
    ids=["strings", "fixed width", "whole numbers", "floats"],
)
def test_records_without_an_owner_are_nobodys_and_said(values, expected, caplog):
    parts = Column("site").split(np.zeros(6, dtype=np.int64), {"site": values}, 2, 0)
    assert [part.tolist() for part in parts] == expected
    assert "column=site: 3 of 6 records have no value there, so no owner, and are left out" in caplog.text
    with pytest.raises(InputError, match=r"has 2 groups .*3 records have no value there\)\. Set data\.clients"):
        Column("site").split(np.zeros(6, dtype=np.int64), {"site": values}, 3, 0)


def test_owners_that_floats_cannot_tell_apart_are_refused():
    with pytest.raises(InputError, match="as floating point"):
        Column("site").split(np.zeros(3, dtype=np.int64), {"site": np.array([2.0**60, 1.0, np.nan])}, 1, 0)
    with pytest.raises(InputError, match="0 groups in all; 2 records have no value"):
        Column("site").split(np.zeros(2, dtype=np.int64), {"site": np.array(["", ""], dtype=object)}, 1, 0)


def test_a_saved_split_says_whose_records_a_client_has_and_what_is_left_out(tmp_path):
    site = np.array([7, None, 2**53 + 1, 7, None, 9], dtype=object)
    train = Records(list("abcdef"), np.array([0, 1, 0, 1, 0, 1]), ["no", "yes"], {"site": site}, "text")
    config = Config()
    config.data.partition.name, config.data.partition.options = "column", {"column": "site", "min_examples": 1}
    parts = Column("site").split(train.labels, train.columns, 2, 0)
    split.save(tmp_path / "split.json", dict(zip(NAMES, parts, strict=True)), train, config)
    tree = json.loads((tmp_path / "split.json").read_text())
    assert tree["clients"] == {"client-000": [0, 3], "client-001": [5]}
    assert tree["owners"] == {"client-000": "7", "client-001": "9"}
    found = split.left_out(tmp_path / "split.json")
    assert [(entry.count, entry.total, entry.examples) for entry in found] == [(2, 6, ()), (1, 6, (str(2**53 + 1),))]
    assert [entry.tree() for entry in found] == tree["left_out"]


def test_shards_bound_the_labels_of_a_client():
    table = counts(Shards(2).split(LABELS, {}, 10, seed=0))
    assert (table.sum(1) == 30).all() and ((table > 0).sum(1) <= 2).all()
    assert len({tuple(row > 0) for row in table}) > 3


def test_quantity_skews_sizes_and_not_labels():
    labels = np.tile(np.arange(5), 2000)
    parts = Quantity(alpha=0.5, min_examples=50).split(labels, {}, 6, seed=0)
    sizes = np.array([len(part) for part in parts])
    assert sizes.min() >= 50 and sizes.max() > 3 * sizes.min()
    shares = counts(parts, labels) / sizes[:, None]
    assert abs(shares - 0.2).max() < 4 * np.sqrt(0.16 / sizes.min())


@pytest.mark.parametrize("partitioner", [IID(), Dirichlet(0.5, 1), Shards(1), Quantity(1.0, 1)])
def test_more_clients_than_records_are_refused(partitioner):
    with pytest.raises(InputError, match=r"data\.clients=301.* the training set has 300\. 300 clients are possible"):
        partitioner.split(LABELS, {}, 301, 0)


# The saved split ------------------------------------------------------------------------------------------

NAMES = ["client-000", "client-001"]


@pytest.fixture
def saved(tmp_path):
    train = Records([f"text {i}" for i in range(6)], np.array([0, 1, 0, 1, 1, 1]), ["no", "yes"], {}, "text")
    config = Config()
    config.data.partition.options = {"alpha": 0.5}
    parts = {"client-000": np.array([0, 2]), "client-001": np.array([1, 3, 4, 5])}
    split.save(tmp_path / "run" / "split.json", parts, train, config)
    return tmp_path / "run" / "split.json", train


def test_split_round_trip_with_its_histogram(saved):
    path, train = saved
    assert split.load(path, train.fingerprint, NAMES) == {"client-000": [0, 2], "client-001": [1, 3, 4, 5]}
    tree = json.loads(path.read_text())
    assert tree["histogram"] == {"labels": ["no", "yes"], "counts": [[2, 0], [0, 4]]}
    assert tree["partition"] == {"name": "dirichlet", "alpha": 0.5} and tree["seed"] == 0


def test_split_of_other_data_or_clients_is_refused(saved):
    path, train = saved
    with pytest.raises(InputError, match="splits other training records"):
        split.load(path, train.take(np.arange(5)).fingerprint, NAMES)
    with pytest.raises(InputError, match=r"has 2 clients, data\.clients=3"):
        split.load(path, train.fingerprint, [*NAMES, "client-002"])
    with pytest.raises(InputError, match="has a client 'client-001'"):
        split.load(path, train.fingerprint, ["client-000", "site-b"])


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ({"client-000": [0, 2], "client-001": [2, 3]}, "to two clients"),
        ({"client-000": [0], "client-001": [6]}, "from 0 to 5"),
        ({"client-000": [0], "client-001": []}, "at least one"),
        ({"client-000": [0], "client-001": ["x"]}, r"no split\.json"),
    ],
)
def test_numbers_that_are_no_split_are_refused(saved, clients, message):
    path, train = saved
    path.write_text(json.dumps({**json.loads(path.read_text()), "clients": clients}))
    with pytest.raises(InputError, match=message):
        split.load(path, train.fingerprint, NAMES)


def test_unreadable_split_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        split.load(tmp_path / "none.json", "", NAMES)
    (tmp_path / "half.json").write_text('{"clients": ')
    with pytest.raises(InputError, match=r"half\.json is no split\.json"):
        split.load(tmp_path / "half.json", "", NAMES)
