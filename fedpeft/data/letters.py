"""Short sentences of letters made here by rule, whose words are tagged: who, where and when.

An input for demonstrations and tests of token classification, and no benchmark. Names are built from
syllables, so that most of the test set are new: they are known by their place and form, not by heart.
"""

from __future__ import annotations

import json

import numpy as np

from fedpeft import seeds
from fedpeft.data import answers
from fedpeft.data.records import Records

WARDS, RECORDS, TEST_SHARE = 6, 480, 4
TAGS = ["O", "PER", "LOC", "DATE"]
MONTHS = ("January", "March", "May", "June", "August", "October", "December")
SYLLABLES = ("ba", "den", "kor", "li", "mar", "no", "pel", "ri", "sta", "tun", "vel", "wi")
PATTERNS = (
    "PER came from LOC on DATE .",
    "On DATE we saw PER again .",
    "Dear PER , the results are there since DATE .",
    "PER was sent to LOC , where PER waits .",
    "The ward in LOC wrote to PER .",
    "Nothing new since DATE , all is calm .",
)


def _draw_name(rng: np.random.Generator, ends: tuple[str, ...]) -> str:
    """A name of two or three syllables; a place by its end."""
    made = "".join(rng.choice(SYLLABLES, size=rng.integers(2, 4)))
    return made.capitalize() + str(rng.choice(ends))


def _draw_sentence(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Words and tags of one sentence."""
    words: list[str] = []
    tags: list[str] = []
    for part in str(rng.choice(PATTERNS)).split():
        made = {
            "PER": lambda: [_draw_name(rng, ("", "a", "o")), _draw_name(rng, ("sen", "mann"))][
                : int(rng.integers(1, 3))
            ],
            "LOC": lambda: [_draw_name(rng, ("ton", "burg"))],
            "DATE": lambda: [str(rng.integers(1, 29)), str(rng.choice(MONTHS))],
        }.get(part)
        found = [part] if made is None else made()
        words += found
        tags += ["O" if made is None else part] * len(found)
    return words, tags


class Letters:
    """480 sentences with a tag for each word; column `ward` is who wrote it."""

    summary = "sentences whose words are tagged as person, place or date, made by rule (token-classification)"
    kind = "text"
    labelled = "tags"
    license = "Apache-2.0 (made here)"

    def load(self) -> tuple[Records, Records]:
        rng = seeds.numpy_generator(0, "letters")
        found: dict[str, tuple[list[str], list[str]]] = {}
        while len(found) < RECORDS:  # no two alike, or the test set would have sentences that were learned
            words, tags = _draw_sentence(rng)
            found.setdefault(" ".join(words), (words, tags))
        rows = list(found.values())
        wards = np.array([f"ward-{number}" for number in rng.integers(1, WARDS + 1, size=RECORDS)])
        records = Records(
            [json.dumps(row) for row in rows],
            np.zeros(RECORDS, dtype=np.int64),
            TAGS,
            {"ward": wards},
            "text",
            targets=answers.table_of([tags for _, tags in rows], TAGS),
        )
        return records.split_every(TEST_SHARE)
