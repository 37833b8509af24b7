"""A cache of other content, of another tokenizer or template, or of other options is never used."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import DataConfig
from fedpeft.data import source
from fedpeft.data.cache import Cache
from fedpeft.data.encode import encode
from fedpeft.models.embedded import byte_tokenizer

CELLS = st.text(st.sampled_from('ab,"\n é'), min_size=1, max_size=6).filter(str.strip)


def tokenizer(lower, end, template):
    from tokenizers.normalizers import Lowercase

    made = byte_tokenizer()
    if lower:
        made.backend_tokenizer.normalizer = Lowercase()
    if not end:
        made.eos_token = None
    made.chat_template = template
    return made


CASES = st.fixed_dictionaries(
    {
        "texts": st.lists(CELLS, min_size=6, max_size=9),
        "lower": st.booleans(),
        "end": st.booleans(),
        "template": st.sampled_from([None, "a", "b"]),
        "length": st.integers(2, 6),
        "task": st.sampled_from(["causal-lm", "sequence-classification"]),
        "column": st.sampled_from(["text", "other"]),
        "seed": st.integers(0, 2),
    }
)


def answer(case, path, cache):
    """Everything that a run gets of its records."""
    quoted = ['"' + text.replace('"', '""') + '"' for text in case["texts"]]
    rows = [f"{text},{text[::-1] if len(text) == 3 else text},{'xy'[number % 2]}" for number, text in enumerate(quoted)]
    path.write_text("\n".join(["text,other,label", *rows]))
    config = DataConfig(source=str(path), text=case["column"], test_fraction=0.4)
    train, test = source.load(config, case["task"], case["seed"], cache)
    processor = tokenizer(case["lower"], case["end"], case["template"])
    data = encode(train, processor, case["task"], case["length"], "texts", cache)
    return (
        list(train.inputs),
        list(test.inputs),
        train.labels.tolist(),
        train.label_names,
        {name: train.columns[name].tolist() for name in train.columns},
        train.fingerprint,
        {name: value.tolist() for name, value in data.inputs.items()},
        data.labels.tolist(),
        data.skipped,
    )


@settings(max_examples=12, deadline=None)
@given(cases=st.lists(CASES, min_size=2, max_size=3), swap=st.integers(0, 7))
def test_what_a_shared_cache_gives_is_what_no_cache_gives(cases, swap):
    """Cases that differ in one thing only are among them: each, after the others have filled the cache."""
    first = cases[0]
    near = [{**first, key: cases[1][key]} for key in list(first)[swap:]]
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "a.csv", Cache(Path(folder) / "cache", 0)
        for case in [first, *near, *cases[1:], first]:
            assert answer(case, path, cache) == answer(case, path, None)
        assert np.all([entry.is_dir() for entry in cache.root.iterdir()])
