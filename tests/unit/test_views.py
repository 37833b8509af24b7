"""Views of a data set: lists of numbers on one storage, which nothing but a batch reads."""

from __future__ import annotations

import gc
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedpeft.clients import sequence
from fedpeft.clients.cohort.passes import assemble_batch, cut_passes, token_counts
from fedpeft.clients.train import find_taught
from fedpeft.config import ClientConfig
from fedpeft.continual import stream
from fedpeft.data.encode import Encoded
from fedpeft.strategies.instructions import Instructions, Lesson
from support import small_models as small

CLIENTS, SHARE, PIXELS, CLASSES = 1000, 12, 3 * 8 * 8, 4


class InputsAtRest(TorchDispatchMode):
    """Fails on any operation of torch that reads these tensors."""

    def __init__(self, *tensors):
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if torch.is_tensor(value) and value.untyped_storage().data_ptr() in self.storages:
                raise AssertionError(f"{function} reads the inputs")
        return function(*args, **(kwargs or {}))


def pictures(count):
    labels = torch.arange(count) % CLASSES
    return Encoded({"pixel_values": torch.randn(count, PIXELS, generator=torch.Generator().manual_seed(0))}, labels)


TASK = Instructions(2, learn=Lesson(1, (2, 3), (0, 1, 2, 3), (2, 3), True, ((0, 1), (2, 3))))


def shared(data):
    """Share, holdout, records of the task that have something to predict, order of replayed batches: by client."""
    order = np.random.default_rng(0).permuted(np.arange(CLIENTS * SHARE).reshape(CLIENTS, SHARE), axis=1)
    config = ClientConfig(batch_size=4, local_steps=2, local_epochs=None)
    for mine in order:
        share, held = data.view(mine[2:]), data.view(mine[:2])
        part = find_taught(sequence.records_of_task(share, TASK, "client"), None)
        yield share, held, part, sequence.mix_replay(share, TASK, config, seed=1)


def test_sharing_among_a_thousand_clients_reads_no_input():
    data = pictures(CLIENTS * SHARE)
    with InputsAtRest(data.inputs["pixel_values"]), pytest.raises(AssertionError, match="reads the inputs"):
        data.batch(np.arange(3))  # the watch is awake
    with InputsAtRest(data.inputs["pixel_values"]):
        clients = list(shared(data))
    assert {view.stored.inputs["pixel_values"].data_ptr() for views in clients for view in views} == {
        data.inputs["pixel_values"].data_ptr()
    }
    assert sorted(np.concatenate([view.rows for views in clients for view in views[:2]])) == list(range(len(data)))
    assert all(set(part.labels.tolist()) <= {2, 3} and len(order) == 8 for _, _, part, order in clients)


def test_sharing_among_a_thousand_clients_costs_lists_of_numbers():
    data = pictures(CLIENTS * SHARE)
    next(shared(data))
    gc.collect()
    tracemalloc.start()
    clients = list(shared(data))
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    views = [view for views in clients for view in views]
    numbers = 8 * sum(map(len, views))
    assert numbers < used < numbers + 1000 * len(views) < data.inputs["pixel_values"].nbytes / 2  # and some objects


def test_a_stream_of_tasks_is_views_of_its_records():
    train, test = pictures(40), pictures(20)
    plan = stream.plan(
        "toy", "class", train.labels.numpy(), test.labels.numpy(), stream.group_classes(CLASSES, 2, 0), 0
    )
    made = stream.build(plan, train, test)
    assert [task.train.stored for task in made.tasks] == [train.stored] * 2
    assert [task.test.stored for task in made.tasks] == [test.stored] * 2
    assert sum(len(task.train) for task in made.tasks) == 40


@pytest.mark.parametrize("kind", ["pictures", "texts", "language"])
def test_a_view_of_a_view_is_the_records_that_indexing_gives(kind):
    data = pictures(10) if kind == "pictures" else small.texts(10, causal=kind == "language")
    outer, inner = np.array([7, 2, 2, 9, 0]), np.array([3, 1, 0, 0])
    view = data.view(outer).view(inner)
    rows = outer[inner]
    assert view.stored is data.stored and view.rows.tolist() == rows.tolist() and len(view) == 4
    assert torch.equal(view.labels, data.labels[rows])
    assert all(torch.equal(value, data.inputs[name][rows]) for name, value in view.inputs.items())
    assert view.lengths.tolist() == data.lengths[rows].tolist()
    assert view.teaching().tolist() == np.flatnonzero(np.isin(rows, data.teaching())).tolist()
    found, wanted = view.batch(np.array([2, 1])), data.batch(np.array([7, 2]))
    assert torch.equal(found[1], wanted[1])
    assert all(torch.equal(value, wanted[0][name]) for name, value in found[0].items())


def test_lengths_are_tokens_of_texts_and_one_for_a_picture():
    texts = small.texts(6)
    assert texts.lengths.tolist() == texts.inputs["attention_mask"].sum(1).tolist() and len(set(texts.lengths)) > 1
    assert pictures(3).lengths.tolist() == [1, 1, 1]
    assert pictures(3).view(np.array([2])).lengths.tolist() == [1]


def test_what_a_view_gives_out_is_a_copy():
    data = pictures(4)
    view = data.view(np.arange(4))
    view.inputs["pixel_values"].zero_()
    view.labels.fill_(9)
    view.batch(np.arange(2))[0]["pixel_values"].zero_()
    assert data.inputs["pixel_values"].any(dim=1).all() and data.labels.tolist() == [0, 1, 2, 3]


def test_no_records_make_an_empty_batch():
    for data in (pictures(3), small.texts(3, causal=True)):
        inputs, labels = data.view(np.arange(0)).batch(np.arange(0))
        assert len(labels) == 0 and inputs.keys() == data.inputs.keys() and not any(map(len, inputs.values()))


def test_a_cohort_of_views_gets_the_rows_of_the_storage():
    """Two clients of one storage, texts of unequal lengths, one pass."""
    data = small.texts(10)
    shares = [data.view(np.array([9, 1, 4])), data.view(np.array([0, 3]))]
    model = SimpleNamespace(base=SimpleNamespace(backbone=SimpleNamespace(config=SimpleNamespace(pad_token_id=0))))
    lengths = [token_counts(model, share) for share in shares]
    [piece] = cut_passes(lengths, [np.array([2, 0]), np.array([1])], 1000)
    inputs, labels = assemble_batch(model, shares, piece)
    rows = np.array([4, 9, 3])
    assert labels.tolist() == data.labels[rows].tolist()
    width = int(data.lengths[rows].max())
    assert torch.equal(inputs["input_ids"], data.inputs["input_ids"][rows][:, :width])
