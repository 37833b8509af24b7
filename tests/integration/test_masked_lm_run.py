"""A run over masked texts: equal to the loop that averages by hand, with other tokens hidden in every round."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from fedpeft import config as configs
from fedpeft import seeds
from fedpeft.errors import InputError
from fedpeft.objectives.base import IGNORE
from fedpeft.run.world import load_world
from support import by_hand, objectives
from support import small_models as small


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.save("bert-mlm", tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def job(base, tmp_path):
    return {
        "model.name": str(base),
        "model.task": "masked-lm",
        "model.max_length": 24,
        "data.source": str(objectives.write("masked-lm", tmp_path / "texts.jsonl", 24)),
        "data.clients": 2,
        "run.rounds": 2,
    }


def loss(model, share):
    """The mean over texts of the mean over each one's hidden tokens, text by text."""
    losses = []
    for index in range(len(share)):
        inputs, labels = share.batch(np.array([index]))
        says = model(**inputs).logits[0].log_softmax(-1)
        hidden = [place for place, label in enumerate(labels[0].tolist()) if label != IGNORE]
        losses.append(-sum(says[place, labels[0, place]] for place in hidden) / len(hidden))
    return torch.stack(losses).mean()


def test_a_federated_run_is_the_loop_that_averages_by_hand(job, base, tiny, tmp_path):
    plain = {"client.optimizer": "sgd", "client.lr": 0.5, "client.batch_size": 100, "client.local_steps": 2}
    tiny("run", {**job, **plain})
    world = load_world(configs.load(tmp_path / "run" / "resolved.yaml"), tmp_path / "run")

    def shares(number):
        seed = world.config.run.seed
        return {
            client: share.augmented(seeds.derive(seed, "round", number, "client", client))
            for client, share in world.local.train_data.items()
        }

    first, second = (next(iter(shares(number).values())).labels for number in (1, 2))
    assert not torch.equal(first, second)
    make = lambda: transformers.AutoModelForMaskedLM.from_pretrained(base)  # noqa: E731
    by_hand.compare(
        tmp_path / "run", tmp_path / "hand", by_hand.average(world, make, loss, shares, 2, 0.5, tmp_path / "hand")
    )


def test_a_run_that_was_interrupted_ends_with_the_same_bits(job, ends_alike):
    ends_alike(job)


def test_hidden_words_are_told_in_the_files_order(job, base, tiny, fedpeft, tmp_path):
    tiny("run", job)
    texts = ["red <mask> 3", "<mask><mask>", "nothing is hidden here"]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = fedpeft("predict", tmp_path / "run", "--data", tmp_path / "new.jsonl", "--out", tmp_path / "o.jsonl")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [len(row["words"]) for row in rows] == [1, 2, 0] and rows[2]["text"] == texts[2]
    assert rows[0]["text"] == f"red {rows[0]['words'][0]} 3"


def test_models_without_such_a_head_are_refused_by_name(job, tiny, tmp_path):
    for kind, why in (("llama", "cannot load '.*llama' for masked-lm"), ("bert", "do not cover BertForMaskedLM")):
        folder = small.save(kind, tmp_path / kind)
        with pytest.raises(InputError, match=rf"model\.name: .*{why}"):
            tiny("refused", {**job, "model.name": str(folder)})
