"""WordNet glosses -> lexicographer file (noun.animal, verb.motion, ...): 35 classes of short texts.

Princeton WordNet 3.0 as Debian packages it; format: wndb(5WN). A line of data.noun or data.verb is a synset; its
second field is the number of the lexicographer file and its gloss follows the bar, definition first, then examples in
quotes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpeft.data.recipe import Package, Recipe, find_member, held_out, write_parts

# File numbers of lexnames(5WN); adjectives and adverbs have too few files to tell apart.
NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception possession "
    "social stative weather"
)
NAMES = [*(f"noun.{name}" for name in NOUNS.split()), *(f"verb.{name}" for name in VERBS.split())]
# 00 to 02 are adjectives and adverbs.
LEXNAMES = {f"{number:02d}": name for number, name in enumerate(NAMES, 3)}
FEWEST = 400


def glosses(data: str) -> Iterator[tuple[str, str]]:
    """(definition, lexname) of every synset; the licence at the top of the file is indented by two spaces."""
    for line in data.splitlines():
        if line and not line.startswith("  "):
            fields, _, gloss = line.partition("|")
            definition = gloss.partition('; "')[0].strip()
            if definition:
                yield definition, LEXNAMES[fields.split(" ")[1]]


def build(files: dict[str, Path], target: Path) -> dict[str, Any]:
    """Write glosses of nouns and verbs labelled by their lexicographer file, of which each must have FEWEST glosses."""
    import pandas

    rows = [
        row
        for name in ("noun", "verb")
        for row in glosses(find_member(files["wordnet-base"], f"/wordnet/data.{name}").decode())
    ]
    sizes = Counter(label for _, label in rows)
    kept = [(text, label, label.partition(".")[0]) for text, label in rows if sizes[label] >= FEWEST]
    frame = pandas.DataFrame(kept, columns=["text", "label", "part_of_speech"])
    counts = write_parts(target, frame, [held_out(text) for text in frame["text"]])
    return {"counts": counts, "classes": frame["label"].nunique(), "glosses": len(rows)}


GLOSSES = Recipe(
    summary="WordNet 3.0 noun and verb glosses -> 35 lexicographer files; column part_of_speech",
    kind="text",
    license="WordNet 3.0 license (Princeton University)",
    sources=(Package("debian", "wordnet-base", "1:3.0-37", "wordnet-base_*.deb", "61060d960f9ada8f"),),
    build=build,
)
