"""Two small federations over real encoders, for benchmarks of very many short runs.

    texts        short opinions (VADER) of four kinds of people, a client each, on MiniLM; 2 classes
    characters   letters and digits in display fonts, dealt to five clients by a Dirichlet draw (with DP evenly), on a
                 ViT that knows text fonts; 36 classes

Records are the same for every seed, which draws adapter, the texts' head, batches, noise and the characters' split.
Three sets are apart: to train on, *held* (of the training records: rates are chosen by them) and to test on. What
leaves MiniLM's lower layers can be computed once, without dropout, for runs that adapt the upper ones only: a step then
costs a third.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft import registry, seeds
from fedpeft.adapters.adapted import adapt
from fedpeft.config import DataConfig, ModelConfig
from fedpeft.continual.streams import cache, glyphs, wordnet
from fedpeft.data import source
from fedpeft.data.encode import Encoded, encode
from fedpeft.data.records import Records
from fedpeft.errors import InputError, RunError
from fedpeft.models import loading
from fedpeft.models.base import Base
from fedpeft.models.rates import DTYPES
from fedpeft.run import loop, results
from fedpeft.run.world import make_world
from fedpeft.simulations.benchmarks.cells import Row
from fedpeft.simulations.run import open_grid

TEXT, IMAGES = "sequence-classification", "image-classification"
TOKENS, LOWER, BATCH = 16, 4, 64  # longest text; layers of MiniLM that are computed once
TEXTS = {"train": 240, "held": 60, "test": 140}  # a client
CHARACTERS = {"train": 40, "held": 10, "test": 20}  # a class
QUICK = 8  # times fewer records, but one of each group
PARTS = (("train", "held"), ("test",))  # what is drawn of the source's training and of its test records
EPSILON = 3.0
COMMON: dict[str, Any] = {
    "client.optimizer": "adamw",
    "client.local_epochs": None,
    "run.rounds": 6,
    "run.clients_per_round": None,
    "run.checkpoint_every": 1000,
    "run.evaluate_every": 1000,
}
PRIVATE = {"privacy.unit": "sample", "privacy.epsilon": EPSILON, "privacy.delta": 1e-5, "strategy.weighting": "uniform"}
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of each set without and with DP
    "texts": (
        {"client.local_steps": 2, "client.batch_size": 20},
        {"client.local_steps": 1, "client.batch_size": 40},
    ),
    "characters": (
        {"client.local_steps": 4, "client.batch_size": 24, "data.partition": {"name": "dirichlet", "alpha": 1.0}},
        # As many records each: a plan for every number of them would take longer than the run.
        {"client.local_steps": 1, "client.batch_size": 40, "data.partition": {"name": "iid"}},
    ),
}


@dataclass(frozen=True)
class Setting:
    """One federation.

    Attributes:
        records, encoded: by the name of their set: train, held, test.
        make_base: of the dtype and the seed of the head.
        config: what its runs have in common.
    """

    records: Mapping[str, Records]
    encoded: Mapping[str, Encoded]
    make_base: Callable[[str, int], Base]
    config: Mapping[str, Any]


def load_setting(name: str, upper: bool, quick: bool) -> Setting:
    """The federation of this name.

    Args:
        upper: of a text model only the upper layers, which get what the lower ones have made of the texts.
        quick: with few records.

    Raises:
        InputError: an unknown name, or a set or model that is not prepared.
    """
    if name not in SCHEDULES:
        raise InputError(registry.unknown("--sets", name, SCHEDULES))
    return _load_texts(upper, quick) if name == "texts" else _load_characters(quick)


def play_run(setting: Setting, changes: dict[str, Any], judged: str, folder: Path) -> Row:
    """One whole run in `folder`, which is removed: accuracy in % and loss on a set, bytes, epsilon.

    A run whose updates are not finite ends where it began, and its row says so.

    Args:
        changes: of the config, keys with dots.
        judged: the set that the last model is scored on.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = configs.load({}, {**setting.config, **changes})
    torch.set_num_threads(config.run.threads)
    model = adapt(setting.make_base(config.model.dtype, config.run.seed), config.adapter, config.run.seed)
    parts = ("train", judged)
    records, encoded = (tuple(of[part] for part in parts) for of in (setting.records, setting.encoded))
    world = make_world(config, folder, model, records, encoded)  # type: ignore[arg-type]
    events: list[dict[str, Any]] = []
    server, diverged = world.start, False
    with open_grid(world, folder) as federation:
        try:
            server = loop.Session(world, folder, federation, events.append).play(server)
        except RunError:
            diverged = True
    found = results.score(world, server)
    rounds = [event for event in events if event["event"] == "round"]
    shutil.rmtree(folder)
    return {
        "accuracy": 100 * found["accuracy"],
        "loss": found["loss"],
        "diverged": diverged,
        "bytes_up": sum(event["bytes_up"] for event in rounds) / max(len(rounds) * config.data.count, 1),
        "epsilon": max((event["epsilon_max"] for event in rounds if "epsilon_max" in event), default=None),
    }


def schedule_of(name: str, private: bool, quick: bool) -> dict[str, Any]:
    """Keys of the config that say how long a run trains, with DP or without."""
    found = SCHEDULES[name][private]
    size = found["client.batch_size"] // (QUICK if quick else 1)
    return {**found, "client.batch_size": size, **(PRIVATE if private else {}), **({"run.rounds": 2} if quick else {})}


def draw_sets(groups: np.ndarray, counts: dict[str, int], sets: Sequence[str], quick: bool) -> dict[str, np.ndarray]:
    """Numbers of so many records of every group for each of the sets, none in two: the same at every call."""
    rng = seeds.numpy_generator(0, "encoders")
    found: dict[str, list[np.ndarray]] = {which: [] for which in sets}
    for group in np.unique(groups):
        mine = rng.permutation(np.flatnonzero(groups == group))
        for which in sets:
            count = max(counts[which] // (QUICK if quick else 1), 1)
            found[which].append(mine[:count])
            mine = mine[count:]
    return {which: np.sort(np.concatenate(places)) for which, places in found.items()}


# Texts ----------------------------------------------------------------------------------------------------------------


def _load_texts(upper: bool, quick: bool) -> Setting:
    for needed in ("vader", "minilm"):
        cache.about(needed)
    settings = ModelConfig(name="minilm", task=TEXT, max_length=TOKENS)
    base = loading.load(settings, 2, 0)
    records, encoded = _choose_texts(base, quick)
    if upper:
        encoded = _through_lower_layers(base, encoded, quick)

    def make_base(dtype: str, seed: int) -> Base:
        # As `model.dtype=auto` would have it on a processor: attention of short texts as batched products.
        fast = TOKENS if dtype == "bfloat16" else None
        whole = loading.load(replace(settings, dtype=dtype, batched_attention=fast), 2, seed)
        return wordnet.upper_half(whole, LOWER) if upper else whole

    config = {
        "model": {"name": "minilm", "task": TEXT, "max_length": TOKENS},
        "data.source": "vader",
        "data.clients": 4,
        "data.partition": {"name": "column", "column": "domain"},
    }
    return Setting(records, encoded, make_base, {**config, **COMMON})


def _choose_texts(base: Base, quick: bool) -> tuple[dict[str, Records], dict[str, Encoded]]:
    """Short texts, as many of each client."""
    records, encoded = {}, {}
    for part, sets in zip(source.load(DataConfig(source="vader"), TEXT, 0), PARTS, strict=True):
        short = part.take(np.flatnonzero(encode(part, base.processor, TEXT, TOKENS + 1).lengths <= TOKENS))
        for which, places in draw_sets(short.columns["domain"].astype(str), TEXTS, sets, quick).items():
            records[which] = short.take(places)
            encoded[which] = encode(records[which], base.processor, TEXT, TOKENS)
    return records, encoded


def _through_lower_layers(base: Base, encoded: dict[str, Encoded], quick: bool) -> dict[str, Encoded]:
    half = wordnet.lower_half(base, LOWER)

    def compute() -> dict[str, Tensor]:
        found = {}
        for which, data in encoded.items():
            with torch.no_grad():
                blocks = [half(**block.inputs).last_hidden_state.half() for block in data.blocks(BATCH)]
            found[which] = torch.cat(blocks)
        return found

    facts = {"sets": TEXTS, "tokens": TOKENS, "lower": LOWER, "quick": quick}
    hidden = cache.tensors(f"encoders{LOWER}", "vader", facts, compute, also=("minilm",))
    return {
        which: Encoded(
            {"inputs_embeds": hidden[which], "attention_mask": data.inputs["attention_mask"].long()}, data.labels
        )
        for which, data in encoded.items()
    }


# Characters -----------------------------------------------------------------------------------------------------------


def _load_characters(quick: bool) -> Setting:
    parts, weights = glyphs.read_characters()
    records: dict[str, Records] = {}
    for part, sets in zip(map(glyphs.take_display_fonts, parts), PARTS, strict=True):
        drawn = draw_sets(part.labels, CHARACTERS, sets, quick)
        records |= {which: part.take(places) for which, places in drawn.items()}

    def make_base(dtype: str, seed: int) -> Base:
        base = glyphs.make_base(weights)
        base.backbone.to(DTYPES[dtype])
        return base

    config = {
        "model": {"name": "tiny-vit", "task": IMAGES},  # not loaded: `make_base` makes the one that is used
        "data.source": "glyphs",
        "data.clients": 5,
    }
    encoded = {which: encode(part, None, IMAGES, 1) for which, part in records.items()}
    return Setting(records, encoded, make_base, {**config, **COMMON})
