"""Small instructions, conversations and preferences made here: adding, turning round, counting, sorting, by rule.

An input for demonstrations and tests of the way that conversations take, and no benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fedpeft import seeds
from fedpeft.data.conversations import Turn, dump_turns
from fedpeft.data.records import Records
from fedpeft.data.wording import Wording

WORDS = ("apple", "bridge", "candle", "donkey", "ember", "forest", "garden", "harbour", "island", "jungle", "kettle")
TASKS: dict[str, Callable[[list[str], list[int]], tuple[str, str]]] = {
    "Add the numbers.": lambda words, numbers: (f"{numbers[0]} and {numbers[1]}", str(numbers[0] + numbers[1])),
    "Write the word from its end to its start.": lambda words, numbers: (words[0], words[0][::-1]),
    "How many letters has the word?": lambda words, numbers: (words[1], str(len(words[1]))),
    "Sort the words.": lambda words, numbers: (" ".join(words[:3]), " ".join(sorted(words[:3]))),
}
GREETINGS = ("Gladly", "With pleasure", "Of course", "Certainly")
GRUMBLES = (", you fool.", "! Ask someone else.", ". Leave me alone.", ", as anyone knows.")
RECORDS, USERS, EXCHANGES, TEST_SHARE = 240, 6, 2, 4


def _draw_exercise(rng: np.random.Generator) -> list[Turn]:
    """One question, in the form of an instruction with its input, and its answer."""
    instruction, make = list(TASKS.items())[rng.integers(len(TASKS))]
    asked, said = make([str(word) for word in rng.permutation(WORDS)], rng.integers(2, 60, size=2).tolist())
    return [("user", f"{instruction}\n\n{asked}"), ("assistant", said)]


def _draw_distinct(seed: str, exchanges: int) -> tuple[list[list[Turn]], np.random.Generator]:
    """Conversations of so many questions and answers, no two alike, and the generator that drew them."""
    rng = seeds.numpy_generator(0, seed)
    talks: dict[str, list[Turn]] = {}
    while len(talks) < RECORDS:
        turns = [turn for _ in range(exchanges) for turn in _draw_exercise(rng)]
        talks.setdefault(dump_turns(turns), turns)
    return list(talks.values()), rng


def _split_conversations(conversations: list[Any], columns: dict[str, Any], form: str) -> tuple[Records, Records]:
    """Training and test records: every fourth is for test."""
    none = np.zeros(len(conversations), dtype=np.int64)
    texts = [dump_turns(turns) for turns in conversations]
    records = Records(texts, none, ["all"], columns, "text", wording=Wording(form))
    return records.split_every(TEST_SHARE)


class Instructions:
    """240 instructions with an input and a short answer."""

    summary = "instructions with an input and a short answer, made by rule (causal-lm)"
    kind = "text"
    labelled = "none"
    license = "Apache-2.0 (made here)"

    def load(self) -> tuple[Records, Records]:
        return _split_conversations(_draw_distinct("instructions", 1)[0], {}, "alpaca")


class Chats:
    """240 conversations of two questions and two answers; column `user` is who asks."""

    summary = "conversations of four turns, made by rule, natural column user (causal-lm)"
    kind = "text"
    labelled = "none"
    license = "Apache-2.0 (made here)"

    def load(self) -> tuple[Records, Records]:
        talks, rng = _draw_distinct("chats", EXCHANGES)
        users = np.array([f"user-{number}" for number in rng.integers(1, USERS + 1, size=RECORDS)])
        return _split_conversations(talks, {"user": users}, "messages")


class Preferences:
    """240 pairs of answers, of which the polite one is preferred; column `user` is who asks."""

    summary = "pairs of answers, of which the polite one is preferred, made by rule, natural column user (preference)"
    kind = "text"
    labelled = "pairs"
    license = "Apache-2.0 (made here)"

    def load(self) -> tuple[Records, Records]:
        talks, rng = _draw_distinct("preferences", 1)
        users = np.array([f"user-{number}" for number in rng.integers(1, USERS + 1, size=RECORDS)])
        pairs = []
        for asked, (_, said) in talks:
            polite = f"{rng.choice(GREETINGS)}, it is {said}."
            rude = f"{said}{rng.choice(GRUMBLES)}"
            pairs.append([[asked, ("assistant", polite)], [asked, ("assistant", rude)]])
        return _split_conversations(pairs, {"user": users}, "preference")
