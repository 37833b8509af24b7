"""Every method of the registry in the class that tests ask about it: an entry that has none fails.

Tests that hold for some methods only are parametrised over a class of these. `QUESTIONS` names, for each, the table and
the classes that share its names out, so that nothing passes because nobody thought of it (test_classified.py). Where a
class is a dict, its values are options or the reason.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fedpeft import registry
from support import objectives, small_models
from support.handmade import RULES, WRAPPERS

# Test-time methods ----------------------------------------------------------------------------------------------------

# Options under which a method must answer as the source model does, in the same mode of batch norms.
NEUTRAL: dict[str, dict[str, Any]] = {
    "aug_average": {"augment": "identity"},
    "em_prior": {"rate": 0.0},
    "rdumb": {"base": "tent", "base_options": {"lr": 0.0}},
    "lame": {"lambda": 0.0, "base": "bn_adapt"},
    "tent": {"lr": 0.0},
    "eata": {"lr": 0.0},
    "sar": {"lr": 0.0},
    "rotta": {"lr": 0.0, "bn_alpha": 0.0},
    "memo": {"lr": 0.0},
    "cotta": {"lr": 0.0, "threshold": 0.0},
    "petal": {"lr": 0.0, "threshold": 0.0, "snapshot_lr": 0.0},
    "lsa": {"steps": 0},
    "itta": {"lr": 0.0},
    "roid": {"lr": 0.0, "correct_prior": False},
    "tlm": {"lambda": 0.0, "label_words": None},
    "ear": {"lr": 0.0},
    "atp": {"learn_lr": 0.0},
    "fedthe": {"head_epochs": 0, "memo_lr": 0.0},
}
NEVER_NEUTRAL = {
    "source": "is the source model",
    "bn_adapt": "is what the others are compared with",
    "t3a": "has no option under which its supports stay",
}
LEARNERS = (
    "rdumb",
    "tent",
    "eata",
    "sar",
    "rotta",
    "cotta",
    "petal",
    "itta",
    "roid",
    "em_prior",
    "lsa",
    "t3a",
    "tlm",
    "ear",
    "atp",
    "fedthe",
)
FORGETFUL = ("source", "aug_average", "bn_adapt", "lame", "memo")  # no batch leaves anything behind
# What private sites are asked to be scored with (law.py), and of that what a language model can have.
ASKED = (
    "source",
    "tent",
    "em_prior",
    "rdumb",
    "lame",
    "eata",
    "sar",
    "rotta",
    "memo",
    "t3a",
    "cotta",
    "petal",
    "lsa",
    "itta",
    "roid",
    "ear",
)
NEXT_TOKEN = ("source", "tent", "rdumb", "eata", "sar", "roid", "tlm")
NOT_ASKED = {
    "aug_average": "is cotta's teacher without learning",
    "bn_adapt": "is tent without learning",
    "atp": "refused under sample-level privacy",
    "fedthe": "refused under sample-level privacy",
}

# Continual learning ---------------------------------------------------------------------------------------------------

# Bytes that a body must keep more of with every task, by kind, by its own account; and bodies that keep no more.
GROWS = {
    "coso": "bases",
    "inflora": "bases",
    "factor_coso": "bases",
    "conpet_static": "raw",
    "joint": "raw",
    "er": "raw",
    "olora": "adapters",
    "owlora": "adapters",
    "sdlora": "adapters",
    "conpet": "adapters",
}
CONSTANT = ("frozen", "sequential", "fsa", "lae", "ewc", "lwf", "classp", "merging")  # from the second task on
# In a federation: one client is one learner; the clients' steps are others; the server half is another method; none.
ONE_CLIENT_IS_ONE_LEARNER = ("frozen", "sequential", "fsa", "inflora", "merging")
REPLAYS_AT_CLIENTS = ("conpet_static",)
HALVES_OF_THEIR_OWN = ("coso", "factor_coso", "lae")
STAY_CENTRAL = ("ewc", "lwf", "er", "joint", "classp", "olora", "sdlora", "owlora", "conpet")
ON_NOISED_SUMS = ("lda", "ncm")
NOT_ON_NOISED_SUMS: dict[str, dict[str, Any]] = {
    "linear": {},
    "masked": {},
    "ranpac": {"features": 50},
    "aligned": {"epochs": 2},
}
# Streams of embedded data, and those that ask for data sets.
CLASS_STREAMS: dict[str, dict[str, int]] = {
    "digits5": {},
    "glyph1d": {"train": 10, "test": 5},
    "records": {"limit": 300},
    "text": {"limit": 60},
}
OTHER_STREAMS = {"glyph1d_domain": {"train": 10, "test": 5}, "glyph1d_blurry": {"train": 20, "test": 5}}
PREPARED_STREAMS = ("wordnet", "glyphs")

# Strategies and partitioners ------------------------------------------------------------------------------------------

# Compared with dense float64 references after each round: exact means of products first.
EXACT = ("ffa_lora", "fedsvd", "flora", "fedex", "rolora", "fed_sb")
ROBUST = ("norm_clip", "trimmed_mean", "median", "krum")
REFERENCED = ("fedit", "lora_fair", "flexlora", "hetlora", "flower", *EXACT, "fedprox", "scaffold", *ROBUST)
APART = {
    "fedsa": "has no global product",
    "fedadam": "steps by itself",
    "fedyogi": "steps by itself",
    "fedadagrad": "steps by itself",
    "atp": "the mean of its rates is in test_federated_continual and test_federated_tta",
    "fedthe": "its history is in test_federated_fedthe",
}
# Optimizers whose steps are torch's own, and those that are compared with their equations in float64.
OF_TORCH = ("adamw", "sgd")
BY_HAND = (
    *("lora_plus", "lora_pro", "riemannian", "muon", "normuon", "namo", "namo_d", "root"),
    *("adamp", "sgdp", "schedule_free", "classp", "lora_fa"),
)
RANDOM_SPLITS = ("iid", "dirichlet", "shards", "quantity")
SPLITS_BY_DATA = ("column",)

QUESTIONS: dict[str, tuple[str, tuple[Collection[str], ...]]] = {
    "with nothing to learn, is it the source model?": ("tta", (NEUTRAL, NEVER_NEUTRAL)),
    "does a stream leave something behind?": ("tta", (LEARNERS, FORGETFUL)),
    "is it asked under the law of private clients?": ("tta", ({*ASKED, *NEXT_TOKEN}, NOT_ASKED)),
    "does what it keeps grow with the tasks?": ("bodies", (GROWS, CONSTANT)),
    "can a federation run it?": (
        "bodies",
        (ONE_CLIENT_IS_ONE_LEARNER, REPLAYS_AT_CLIENTS, HALVES_OF_THEIR_OWN, STAY_CENTRAL),
    ),
    "is it fitted on noised sums?": ("heads", (ON_NOISED_SUMS, NOT_ON_NOISED_SUMS)),
    "can it be built here?": ("streams", (CLASS_STREAMS, OTHER_STREAMS, PREPARED_STREAMS)),
    "is it a rule or a wrapper?": ("strategies", (RULES, ["fed_sb"], WRAPPERS)),
    "what is its reference?": ("strategies", (REFERENCED, APART)),
    "which small models have it?": (
        "objectives",
        ({task for task, *_ in small_models.KINDS.values()}, objectives.CASES),
    ),
    "is it torch's own?": ("optimizers", (OF_TORCH, BY_HAND)),
    "does it draw?": ("partitioners", (RANDOM_SPLITS, SPLITS_BY_DATA)),
}
# Tables of which conformance tests take every entry there is, and those that hold parts of others.
TAKEN_WHOLE = ("adapters", "penalties", "datasets", "mergers", "unlearning", "trackers")
PARTS = ("server_bodies", "checks")


def misplaced(question: str) -> dict[str, list[str]]:
    """Names of the table that are in no class, in several, and names in a class that the table does not have."""
    table, classes = QUESTIONS[question]
    names, placed = registry.names(table), [name for members in classes for name in members]
    wrong = {
        "in no class": [name for name in names if name not in placed],
        "in several": sorted({name for name in placed if placed.count(name) > 1}),
        "not registered": [name for name in placed if name not in names],
    }
    return {what: found for what, found in wrong.items() if found}
