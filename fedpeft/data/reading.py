"""How one source is read, where the config says more of it than its name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpeft import registry
from fedpeft.config import DataConfig
from fedpeft.data.archives import ENDINGS as ARCHIVES
from fedpeft.data.readers import CSV, DELIMITERS, ending_of
from fedpeft.errors import InputError

FORMAT = ("delimiter", "encoding")
SPLITS = ("train_split", "test_split")
KINDS = {  # what a source is, and which of the keys it can have
    "an embedded data set": (),
    "a prepared data set": (),
    "a csv or tsv file": ("format",),
    "a file that is no csv or tsv": (),
    "a saved data set": (),
    "a saved data set of several splits": SPLITS,
    "a shard": (),
    "a folder of pictures": SPLITS,
    "a data set of the hub": ("revision", *SPLITS),
}


@dataclass(frozen=True)
class Reading:
    """The keys of `data` beside the name of a source.

    Attributes:
        format: delimiter and encoding of a csv or tsv file.
        train_split: the split, or folder, that is taken; None is by its name.
        test_split: the one that is the source's own test set; None is by its name.
        revision: of a data set of the hub.
        train_key: what named the split that is taken.
        asked: its records are to be answered: pictures need no labels, and none may be lost.
    """

    format: dict[str, str] = field(default_factory=dict)
    train_split: str | None = None
    test_split: str | None = None
    revision: str | None = None
    train_key: str = "train_split"
    asked: bool = False

    @classmethod
    def of(cls, config: DataConfig, key: str) -> Reading:
        """What the config says of `data.source`, or of `data.test`, of which the test split is taken.

        Raises:
            InputError: a delimiter or encoding that is none, or one split for two.
        """
        form = parse_format(config.format)
        if key == "data.test":
            # One key for two files, of which the other may be a parquet file.
            written = ending_of(Path(config.test or "")) in (*CSV, *ARCHIVES)
            return cls(form if written else {}, train_split=config.test_split, train_key="test_split")
        if config.train_split is not None and config.train_split == config.test_split and config.test is None:
            raise InputError(
                f"data.test_split={config.test_split} is data.train_split too: no test is of what was learned."
            )
        return cls(form, config.train_split, config.test_split if config.test is None else None, config.revision)

    @property
    def alone(self) -> bool:
        """Whether what is taken was named as all there is, or as the test set: then no other one is looked for."""
        return self.train_split is not None and (self.asked or self.train_key != "train_split")

    def inside(self, file: Path | None) -> Reading:
        """How an archive's file is read, or its folder: `data.format`, which is of two sources, may be of the other."""
        theirs = self.train_key == "test_split" and (file is None or ending_of(file) not in CSV)
        return replace(self, format={}) if theirs else self

    def require_file(self, source: str) -> None:
        """As `require`, for a file."""
        self.require("a csv or tsv file" if ending_of(Path(source)) in CSV else "a file that is no csv or tsv", source)

    def require(self, kind: str, where: str) -> None:
        """Refuse a key that sources of this kind, one of KINDS, cannot have."""
        for name in ("format", "train_split", "test_split", "revision"):
            value = getattr(self, name)
            if value and name not in KINDS[kind]:
                others = [other for other, names in KINDS.items() if name in names]
                key = self.train_key if name == "train_split" else name
                raise InputError(f"data.{key}={value}: {where} is {kind}; it is for {', '.join(others)}.")


def parse_format(tree: dict[str, Any]) -> dict[str, str]:
    """Delimiter, as one character, and encoding of `data.format`.

    Raises:
        InputError: another key, or a value that is none of these.
    """
    for name in tree:
        if name not in FORMAT:
            raise InputError(registry.unknown("data.format", name, FORMAT))
    found = {}
    if (value := tree.get("delimiter")) is not None:
        signs = {name: sign for sign, name in DELIMITERS.items()}
        sign = signs.get(value, value) if isinstance(value, str) else value
        if not isinstance(sign, str) or len(sign) != 1 or sign in '"\r\n\0':
            raise InputError(
                f"data.format: delimiter={value!r}; allowed are {', '.join(signs)}, or any other single character, "
                "no double quote or line break."
            )
        found["delimiter"] = sign
    if (value := tree.get("encoding")) is not None:
        try:
            "text".encode(value)
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"data.format: encoding={value!r} is no encoding of texts that Python knows ({error}); some are utf-8, "
                "utf-16-le, windows-1252, latin-1, shift_jis, gb18030."
            ) from error
        found["encoding"] = value
    return found
