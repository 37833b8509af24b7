"""Debian package descriptions -> archive section; maintainers are natural clients, human translations domains.

From the package lists of `apt-get update` in a private folder (nothing is installed, no root is needed). One binary
per source package is kept: siblings share most of their description and would leak between clients and into the test
set. The test packages are the same in every language. The descriptions have many authors and no single licence:
build, do not republish.
"""

from __future__ import annotations

import gzip
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.data.recipe import Recipe, held_out, run, write_parts
from fedpeft.errors import InputError

LANGUAGES = ("da", "it", "fr", "de", "ja", "ru")
# Sections that say how a package is built or shipped, not what it is about.
DROPPED = {"misc", "oldlibs", "metapackages", "localization", "libdevel", "doc", "kernel", "debug", "introspection"}
SUPPORT = re.compile(r"-(dev|doc|data|common|dbg|bin|tools|utils|tests?|examples|extra|plugins?)$")
FEWEST = 200
CHARACTERS = 600


@dataclass(frozen=True)
class AptLists:
    """`Packages` and `Translation-xx` of one release's main section, as apt keeps them (plain, .gz or .xz)."""

    languages: tuple[str, ...]

    def download(self, folder: Path) -> None:
        lists = folder / "lists"
        # apt-get does not make it, and ends without.
        (lists / "partial").mkdir(parents=True)
        options = {
            "Dir::State::lists": lists,
            # Else apt writes these into /var, which only root may.
            "Dir::Cache::pkgcache": folder / "pkgcache",
            "Dir::Cache::srcpkgcache": folder / "srcpkgcache",
            "Acquire::GzipIndexes": "false",
            "Acquire::Languages": ",".join(("en", *self.languages)),
        }
        run(
            ["apt-get", "update", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))],
            folder,
            "package lists",
        )
        for path in lists.glob("*_dists_*"):
            path.rename(folder / path.name)

    def find(self, folder: Path) -> dict[str, Path]:
        """Packages, Release and one Translation a language; updates and security lists beside them are left alone."""
        wanted = {
            "Packages": "*_dists_*_main_binary-*_Packages*",
            "Release": "*_dists_*Release",
            **{language: f"*_dists_*_main_i18n_Translation-{language}*" for language in ("en", *self.languages)},
        }
        found = {}
        for name, pattern in wanted.items():
            paths = [
                path
                for path in sorted(folder.glob(pattern))
                if not re.search(r"-(updates|security|backports)", path.name)
            ]
            if len(paths) != 1:
                raise InputError(
                    f"{folder}: expected one file {pattern} of one release, found {len(paths)}. They are in "
                    "/var/lib/apt/lists after: apt-get update -o "
                    f"Acquire::Languages={','.join(('en', *self.languages))}"
                )
            found[name] = paths[0]
        return found


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The stanzas of a Debian control file; continuation lines keep their line breaks."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    stanza: dict[str, str] = {}
    key = ""
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            line = line.rstrip("\n")
            if not line:
                if stanza:
                    yield stanza
                stanza = {}
            elif line[0] in " \t":
                stanza[key] += "\n" + line[1:]
            else:
                key, _, value = line.partition(":")
                stanza[key] = value.strip()
    if stanza:
        yield stanza


def one_per_source(packages: Iterator[dict[str, str]]) -> dict[str, dict[str, str]]:
    """Source name -> one binary: the one of that name, else one with no support suffix, else the first by name."""
    best: dict[str, tuple[tuple[bool, bool, str], dict[str, str]]] = {}
    for package in packages:
        name = package["Package"]
        source = package.get("Source", name).split(" ")[0]
        rank = (name != source, SUPPORT.search(name) is not None, name)
        if source not in best or rank < best[source][0]:
            best[source] = rank, package
    return {source: package for source, (_, package) in sorted(best.items())}


def description(text: str) -> str:
    """A description as running text: synopsis, then paragraphs; " ." lines are paragraph breaks. At most CHARACTERS."""
    lines = ["" if line == "." else line for line in text.split("\n")]
    return re.sub(r"\s+", " ", "\n".join([lines[0] + ".", *lines[1:]])).strip()[:CHARACTERS]


def translations(path: Path, language: str, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(package, md5 of the English description) -> text, for the wanted ones."""
    found = {}
    for stanza in stanzas(path):
        key = (stanza["Package"], stanza["Description-md5"])
        if key in wanted and stanza.get(f"Description-{language}"):
            found[key] = description(stanza[f"Description-{language}"])
    return found


def build(files: dict[str, Path], target: Path) -> dict[str, Any]:
    """Write package descriptions labelled by section, English in `target` and other languages in folders below it.

    One package stands for each source package. A section counts if it has at least FEWEST of them, and a translation
    if it is of a description that is kept in English.
    """
    import pandas

    chosen = one_per_source(stanzas(files["Packages"]))
    chosen = {source: package for source, package in chosen.items() if package["Section"] not in DROPPED}
    english = translations(
        files["en"], "en", {(package["Package"], package["Description-md5"]) for package in chosen.values()}
    )
    chosen = {
        source: package
        for source, package in chosen.items()
        if (package["Package"], package["Description-md5"]) in english
    }
    sizes = Counter(package["Section"] for package in chosen.values())
    chosen = {source: package for source, package in chosen.items() if sizes[package["Section"]] >= FEWEST}
    keys = {(package["Package"], package["Description-md5"]): source for source, package in chosen.items()}
    counts: dict[str, Any] = {}
    for language in (name for name in files if name not in ("Packages", "Release")):
        texts = english if language == "en" else translations(files[language], language, set(keys))
        rows = [
            (text, chosen[keys[key]]["Section"], _name_maintainer(chosen[keys[key]]), keys[key])
            for key, text in texts.items()
            if key in keys
        ]
        frame = pandas.DataFrame(
            sorted(rows, key=lambda row: row[3]), columns=["text", "label", "maintainer", "source"]
        )
        folder = target if language == "en" else target / language
        counts[language] = write_parts(folder, frame, [held_out(source) for source in frame["source"]])
    dates = [line for line in files["Release"].read_text(encoding="utf-8").splitlines() if line.startswith("Date: ")]
    return {
        "parts": [language for language in counts if language != "en"],
        "counts": counts,
        "classes": len({package["Section"] for package in chosen.values()}),
        "release_date": dates[0].removeprefix("Date: ") if dates else "unknown",
    }


def _name_maintainer(package: dict[str, str]) -> str:
    return package["Maintainer"].partition(" <")[0].strip('"')


SECTIONS = Recipe(
    summary="Debian package descriptions -> 30 sections; column maintainer; translated parts da, it, fr, de, ja, ru",
    kind="text",
    license="none for the whole: descriptions belong to their authors; use them, do not republish them",
    sources=(AptLists(LANGUAGES),),
    build=build,
)
