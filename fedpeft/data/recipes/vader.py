"""Human sentiment ratings in four domains: tweets, film reviews, product reviews, newspaper editorials.

From the ICWSM 2014 data of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", in the source distribution of vaderSentiment. Snippets have a mean rating from -4 to 4; those beyond
+-0.5 are positive or negative, the others are dropped. Reviews and articles are cut into sentences whose ids share a
prefix: column `document`, which is wholly in the training or the test set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpeft.data.recipe import Package, Recipe, find_member, held_out, tar_members, write_parts

DOMAINS = {
    "tweets": "tweets",
    "movieReviewSnippets": "movie",
    "amazonReviewSnippets": "amazon",
    "nytEditorialSnippets": "nyt",
}
THRESHOLD = 0.5
ENDING = "_GroundTruth.txt"


def ratings(data: str, domain: str) -> Iterator[tuple[str, str, str, str]]:
    """(text, label, domain, document) of the snippets with a clear rating. Lines are id, mean rating, text."""
    for line in data.splitlines():
        # The third part may have tabs itself.
        name, rating, text = line.split("\t", 2)
        if abs(float(rating)) > THRESHOLD and text.strip():
            yield (
                text.strip(),
                "positive" if float(rating) > 0 else "negative",
                domain,
                f"{domain}-{name.partition('_')[0]}",
            )


def build(files: dict[str, Path], target: Path) -> dict[str, Any]:
    """Write the snippets with a clear rating as positive or negative; whole documents are held out."""
    import pandas

    inner = find_member(files["vaderSentiment"], "/hutto_ICWSM_2014.tar.gz")
    rows: list[tuple[str, str, str, str]] = []
    for name, content in tar_members(inner, lambda name: name.endswith(ENDING)):
        rows += ratings(content.decode("utf-8"), DOMAINS[Path(name).name.removesuffix(ENDING)])
    # In an order of its own: that of the files in the archive is its packer's.
    frame = pandas.DataFrame(sorted(rows, key=lambda row: row[2]), columns=["text", "label", "domain", "document"])
    counts = write_parts(target, frame, [held_out(document) for document in frame["document"]])
    return {
        "counts": counts,
        "classes": 2,
        "domains": {str(name): int(size) for name, size in frame["domain"].value_counts().items()},
    }


RATINGS = Recipe(
    summary="VADER human ratings -> positive or negative; columns domain (tweets, movie, amazon, nyt) and document",
    kind="text",
    license="MIT for the ratings; the snippets belong to their authors: use them, do not republish them",
    sources=(Package("pypi-source", "vaderSentiment", "3.3.2", "vader[Ss]entiment-*.tar.gz", "5d7c06e027fc8b99"),),
    build=build,
)
