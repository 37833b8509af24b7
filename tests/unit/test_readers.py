"""Other people's files and folders: what is read as it is typed, refused with the line, or left out and said."""

import gzip
import json
import logging

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedpeft.config import DataConfig
from fedpeft.data import source
from fedpeft.data.readers import ENDINGS, read
from fedpeft.errors import InputError

TEXT, IMAGE, LANGUAGE = "sequence-classification", "image-classification", "causal-lm"
GOOD = "text,label\n" + "".join(f"letter {i},{'ab'[i % 2]}\n" for i in range(8))


def load(path, task=TEXT, **keys):
    return source.load(DataConfig(source=str(path), **keys), task, 0)


def every(path, column, task=TEXT):
    """The natural column over training and test records, by the number in their text."""
    found = {}
    for part in load(path, task):
        for text, value in zip(part.inputs, part.columns[column].tolist(), strict=True):
            found[int(text.split()[-1])] = value
    return [found[number] for number in sorted(found)]


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def records(values, name="owner"):
    return [{"text": f"letter {i}", "label": "ab"[i % 2], name: value} for i, value in enumerate(values)]


# Types --------------------------------------------------------------------------------------------------------------


def test_whole_numbers_beside_a_null_stay_exact(tmp_path):
    ids = [2**53, 2**53 + 1, None, 2**63 + 5, -(2**60) - 1, 7]
    assert every(lines(tmp_path / "a.jsonl", records(ids)), "owner") == ids
    pq.write_table(pa.Table.from_pylist(records([2**53, 2**53 + 1, None, 5])), tmp_path / "a.parquet")
    assert every(tmp_path / "a.parquet", "owner") == [2**53, 2**53 + 1, None, 5]
    whole = every(lines(tmp_path / "b.jsonl", records([2**53, 2**53 + 1, 3, 4])), "owner")
    assert whole == [2**53, 2**53 + 1, 3, 4]


def test_columns_of_several_types_are_strings_and_none_vanishes(tmp_path):
    path = lines(tmp_path / "a.jsonl", records(["12B", 12, 13, None, True, 2.5]))
    assert every(path, "owner") == ["12B", "12", "13", "", "true", "2.5"]
    assert every(lines(tmp_path / "b.jsonl", records([None] * 4)), "owner") == [""] * 4
    assert every(lines(tmp_path / "c.jsonl", records([1, 2**60 + 1, 0.5, 2])), "owner") == [
        "1",
        str(2**60 + 1),
        "0.5",
        "2",
    ]
    assert "owner" not in load(lines(tmp_path / "d.jsonl", records([["a"], ["b"], None, []])))[0].columns


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array(["N", None, "S", "N"]).dictionary_encode(), ["N", "", "S", "N"]),
        (pa.array(["N", None, "S", "N"], pa.large_string()), ["N", "", "S", "N"]),
        (pa.array([1, None, 3, 4], pa.int8()), [1, None, 3, 4]),
        (pa.array([True, None, False, True]), ["true", "", "false", "true"]),
        (
            pa.array([0, 86_400_000, None, 5], pa.timestamp("ms")),
            ["1970-01-01T00:00:00", "1970-01-02T00:00:00", "", "1970-01-01T00:00:00.005000"],
        ),
        (pa.array(["1.50", "2.00", None, "3.25"]).cast(pa.decimal128(5, 2)), ["1.50", "2.00", "", "3.25"]),
    ],
    ids=["dictionary", "large string", "int8", "bool", "timestamp", "decimal"],
)
def test_parquet_columns_have_their_arrow_type(tmp_path, array, expected):
    table = pa.table({"text": [f"letter {i}" for i in range(4)], "label": ["a", "b"] * 2, "owner": array})
    pq.write_table(table, tmp_path / "a.parquet")
    assert every(tmp_path / "a.parquet", "owner") == expected


def test_class_names_are_as_typed(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD.replace(",a", ",007").replace(",b", ",7"))
    assert load(tmp_path / "a.csv")[0].label_names == ["007", "7"]
    (tmp_path / "b.csv").write_text(GOOD.replace(",a", ",yes").replace(",b", ",1.10"))
    assert load(tmp_path / "b.csv")[0].label_names == ["1.10", "yes"]
    assert load(tmp_path / "b.csv", labels=["yes", "1.10"])[0].label_names == ["yes", "1.10"]
    truth = [{"text": f"letter {i}", "label": i % 2 == 0} for i in range(8)]
    assert load(lines(tmp_path / "c.jsonl", truth))[0].label_names == ["false", "true"]
    pandas.DataFrame({"text": [str(i) for i in range(6)], "label": [1.0, 0.0] * 3}).to_parquet(tmp_path / "d.parquet")
    assert load(tmp_path / "d.parquet")[0].label_names == ["0", "1"]


def test_classes_that_look_like_something_else_are_said(tmp_path, caplog):
    (tmp_path / "a.csv").write_text(GOOD.replace("letter 2,a", "letter 2,nan").replace("letter 3,b", "letter 3,B"))
    assert load(tmp_path / "a.csv")[0].label_names == ["B", "a", "b", "nan"]
    assert "1 of 8 labels read like a missing value" in caplog.text and "'B' and 'b'" in caplog.text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, 0], r"record 3 has \[1, 0\] \(list\); a record has one label"),
        ({"a": 1}, r"record 3 has \{'a': 1\} \(dict\); a record has one label"),
        (None, "record 3 has no label"),
        ("  ", "record 3 has no label"),
        (float("nan"), "record 3 has no label"),
        (True, "record 1 has a string and record 3 has true or false"),
        (4, "record 1 has a string and record 3 has a whole number"),
        (float("inf"), "record 3 has inf; labels must be"),
        ("\ud83d", r"record 3 has half of a character \(\\ud83d\)"),
    ],
    ids=str,
)
def test_a_label_that_is_none_is_refused_with_its_record(tmp_path, value, said):
    rows = records(range(6))
    rows[2]["label"] = value
    with pytest.raises(InputError, match=said) as caught:
        load(lines(tmp_path / "a.jsonl", rows))
    assert "a.jsonl: column label" in str(caught.value)


def test_missing_labels_of_parquet_are_refused(tmp_path):
    for name, dtype in (("int", "Int64"), ("string", "string"), ("bool", "boolean")):
        label = pandas.array([{"Int64": 1, "string": "a", "boolean": True}[dtype], None], dtype=dtype)
        pandas.DataFrame({"text": ["a", "b"], "label": label}).to_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(InputError, match="column label: record 2 has no label"):
            load(tmp_path / f"{name}.parquet")


def test_columns_that_differ_in_case_only_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text(
        GOOD.replace("text,label", "Text,label").replace("\n", ",x\n").replace("label,x", "label,TEXT")
    )
    with pytest.raises(InputError, match=r"the text could be in 'Text' or 'TEXT'. Name one with data\.text"):
        load(tmp_path / "a.csv")
    assert set(load(tmp_path / "a.csv", text="TEXT")[0].inputs) == {"x"}


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.tsv", "a.jsonl", "a.NDJSON", "a.json", "a.csv.gz", "a.jsonl.gz"])
def test_byte_order_marks_endings_and_line_ends(tmp_path, name, encoding):
    rows = [{"text": f"Grüße\u2028 {i}", "label": "ab"[i % 2]} for i in range(4)]
    end = {"utf-8": "\r\n", "utf-16": "\r"}.get(encoding, "\n")
    text = json.dumps(rows, ensure_ascii=False)
    if "son" in name.lower() and not name.endswith(".json"):
        text = end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    elif not name.endswith(".json"):
        comma = "\t" if "tsv" in name else ","
        text = end.join([f"text{comma}label", *(f"{row['text']}{comma}{row['label']}" for row in rows)]) + end
    data = ("\ufeff" + text if encoding == "utf-16-le" else text).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    columns, skipped = read(tmp_path / name)
    assert columns == {key: [row[key] for row in rows] for key in ("text", "label")} and not skipped


def refusals():
    latin = GOOD.replace("letter 3", "lettre à 3")
    yield "latin.csv", latin.encode("latin-1"), r"line 5 is not in the encoding utf-8: byte 0xe0.*iconv"
    yield "latin.jsonl", '{"text": "à"}'.encode("latin-1"), "line 1 is not in the encoding"
    yield "wide.csv", GOOD.encode("utf-16-le"), "null character.*UTF-16"
    yield "torn.csv", "\ufefftext".encode("utf-16-le") + b"x", "not in the encoding utf-16"
    yield "semi.csv", GOOD.replace(",", ";"), "separated by a semicolon.*delimiter of .csv files is the comma"
    yield "tab.csv", GOOD.replace(",", "\t"), "separated by a tab.*delimiter: tab"
    yield "bar.csv", GOOD.replace(",", "|"), "separated by a bar"
    yield "comma.tsv", GOOD, "separated by a comma.*delimiter of .tsv files is the tab"
    yield "open.csv", GOOD.replace("letter 2", '"letter 2'), "lines 4 to 9 are no csv: unexpected end of data.*stray"
    yield "after.csv", GOOD.replace("letter 2", '"letter" 2'), "lines 4 to 4 are no csv"
    yield "more.csv", GOOD.replace("letter 2", "letter, 2"), "line 4 has 3 fields, more fields than the header"
    yield "fewer.csv", GOOD.replace("letter 2,a", "letter 2"), "line 4 has 1 fields, fewer fields than the header"
    yield "trailing.csv", GOOD.replace("\n", ",\n").replace("label,", "label"), "line 2 has 3 fields, more"
    yield "twice.csv", GOOD.replace("text,label", "label,label"), "2 columns have the name 'label'"
    yield "null.csv", GOOD.replace("letter 2", "let\0ter"), "line 4 has a null character"
    yield "empty.csv", "", "the first line names no column"
    yield "header.csv", "text,label\n", "no records"
    yield "bad.csv.gz", GOOD, "not readable as a gzip file"
    yield "short.csv.gz", gzip.compress(GOOD.encode())[:-12], "not readable as a gzip file"
    yield "list.jsonl", '[{"text": "a"}]', r"line 1 is a list; expected an object.*\.json file"
    yield "pretty.jsonl", '{\n "text": "a"\n}', r"line 1 is no JSON.*one whole object"
    yield "number.jsonl", '{"text": "a"}\n\n7\n', "line 3 is a number"
    yield "twice.jsonl", '{"text": "a", "text": "b"}', "line 1 is no JSON: the key 'text' is there twice"
    keys = [f'{{"user-{number}": "a text"}}' for number in range(3000)]
    yield "keys.jsonl", "\n".join(keys), "3000 records have 3000 different keys, 1 each.*names of records"
    yield "keys.json", f"[{', '.join(keys)}]", "3000 different keys"
    yield "deep.jsonl", "[" * 100_000, "line 1 is no JSON"
    yield "lines.json", '{"text": "a"}\n{"text": "b"}', r"no JSON: Extra data.*\.jsonl file"
    yield "table.json", '{"text": {"0": "a"}}', "found an object with the keys 'text'"
    yield "mixed.json", '[{"text": "a"}, null]', "record 2 is null"
    yield "a.parquet", b"PAR1 no", "not readable as parquet"
    yield "a.xlsx", b"PK", "allowed: .csv, .tsv"
    yield "a.csv.bz2", b"PK", "allowed: .csv, .tsv"


@pytest.mark.parametrize(("name", "data", "said"), refusals(), ids=[name for name, *_ in refusals()])
def test_what_is_no_such_file_is_refused_with_the_remedy(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(InputError, match=said) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_a_wide_table_of_objects_is_read(tmp_path):
    """4,000 columns of which each record has half are a table, and no records under names of their own."""
    rows = [{f"k{number}": "x" for number in range(first, 4000, 2)} for first in (0, 1)]
    (tmp_path / "wide.jsonl").write_text("\n".join(map(json.dumps, rows * 3)))
    columns, _ = read(tmp_path / "wide.jsonl")
    assert len(columns) == 4000 and list(columns["k3"]) == [None, "x"] * 3


def test_parquet_with_a_name_twice_is_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="2 columns have the name 'text'"):
        load(tmp_path / "a.parquet")


def test_a_pipe_and_a_folder_of_files_are_refused_by_name(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        load(tmp_path / "pipe")
    (tmp_path / "set.csv").mkdir()
    (tmp_path / "set.csv" / "part.csv").write_text(GOOD)
    with pytest.raises(InputError, match=r"It holds part\.csv: give a file by its own path"):
        load(tmp_path / "set.csv")


def test_fields_of_any_length_and_quoted_line_breaks_are_read(tmp_path):
    long = "word " * 100_000
    (tmp_path / "a.csv").write_text(GOOD + f'{long},a\n"two\nlines, ""quoted""",b\n5" disk,a\n')
    columns, _ = read(tmp_path / "a.csv")
    assert columns["text"][8:] == [long, 'two\nlines, "quoted"', '5" disk'] and len(columns["label"]) == 11


def test_lines_with_no_value_are_left_out_and_said(tmp_path, caplog):
    (tmp_path / "a.csv").write_text(GOOD.replace("letter 2", "\nletter 2") + ",\n,\n\n\n")
    train, test = load(tmp_path / "a.csv")
    assert len(train) + len(test) == 8
    assert "3 lines have no value and are left out: line 4, line 11, line 12" in caplog.text
    assert sum(entry.count for entry in train.skipped) == 3 and len(caplog.records) == 1


def test_every_ending_is_found_by_its_file_and_a_missing_one_is_no_hub_id(tmp_path):
    for name in ENDINGS:
        with pytest.raises(InputError, match=r"data\.source: no file or folder"):
            load(f"missing{name.upper()}")


# What a language model is trained on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "column", "why"),
    [
        (("prompt", "reponse_du_modele"), "prompt", "trained on the column prompt alone"),
        (("Prompt", "chosen", "rejected"), "Prompt", "chosen and rejected are preferences"),
        (("context", "question", "answers"), "question", "context, question, answers seem to be parts"),
        (("text", "completion"), "text", "trained on the column text alone"),
        (("message", "reply"), "message", "trained on the column message alone"),
        (("instruction", "output", "text"), "text", "could be in instruction, output or in text"),
    ],
)
def test_half_of_a_record_is_not_trained_on_alone(tmp_path, names, column, why):
    path = lines(tmp_path / "a.jsonl", [{name: f"{name} {i}" for name in names} for i in range(8)])
    with pytest.raises(InputError, match=rf"{why}.*data\.columns="):
        load(path, LANGUAGE)
    assert load(path, LANGUAGE, text=column)[0].inputs[0].startswith(column)


@pytest.mark.parametrize("names", [("question",), ("prompt", "number"), ("text", "site")])
def test_whole_texts_are_trained_on(tmp_path, names):
    rows = [{name: i if name == "number" else f"{name} {i}" for name in names} for i in range(8)]
    wanted = next(name for name in ("text", "prompt", "question") if name in names)
    assert load(lines(tmp_path / "a.jsonl", rows), LANGUAGE)[0].inputs[0].startswith(wanted)


def test_a_column_that_is_no_label_does_not_stop_a_language_model(tmp_path, caplog):
    rows = [{"text": f"letter {i}", "category": ["a", "b"][: i % 3]} for i in range(8)]
    train, _ = load(lines(tmp_path / "a.jsonl", rows), LANGUAGE)
    assert train.label_names == ["all"] and "labels are not read: a language model needs none" in caplog.text
    with pytest.raises(InputError, match="a record has one label"):
        load(tmp_path / "a.jsonl", LANGUAGE, label="category")


def test_one_class_is_refused_by_that_name(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD.replace(",b", ",a"))
    with pytest.raises(InputError, match=r"8 records of .*a\.csv have one class only, the label 'a'"):
        load(tmp_path / "a.csv")
    with pytest.raises(InputError, match="one class only"):
        load(tmp_path / "a.csv", labels=["a", "b"])
    assert len(source.whole(str(tmp_path / "a.csv"), "data.source", DataConfig(labels=["a", "b"]), TEXT)) == 8


# Folders of pictures --------------------------------------------------------------------------------------------------


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(17 * np.arange(16, dtype=np.uint8).reshape(4, 4)).save(path, format="PNG")


@pytest.fixture
def zoo(tmp_path):
    for label in ("cat", "dog"):
        for number in range(4):
            picture(tmp_path / "zoo" / label / f"{number}.png")
    return tmp_path / "zoo"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (".ipynb_checkpoints/1.png", "hidden files or folders are left out: .ipynb_checkpoints/"),
        ("__MACOSX/cat/1.png", "hidden files or folders are left out: __MACOSX/"),
        ("cat/._1.png", "hidden files or folders are left out: cat/._1.png"),
        ("dog/Thumbs.db", "hidden files or folders are left out: dog/Thumbs.db"),
        ("bird/batch/1.png", "folders deeper than LABEL/NAME are left out: bird/batch/"),
        ("fish/1.heic", "are left out: fish/1.heic"),
        ("fish/1.heic", "folders have no picture in them, so they are no labels: fish/"),
        ("1.png", "files in no folder of a label are left out: 1.png"),
        ("cat/more/1.png", "folders deeper than LABEL/NAME are left out: cat/more/"),
    ],
)
def test_what_is_no_picture_of_a_class_is_left_out_and_said(zoo, caplog, path, said):
    picture(zoo / path)
    train, test = load(zoo, IMAGE)
    assert train.label_names == ["cat", "dog"] and len(train) + len(test) == 8
    assert said in caplog.text and sum("are left out" in record.getMessage() for record in caplog.records) == 1
    assert sum(entry.count for entry in train.skipped) >= 1


def test_folders_of_splits(zoo, caplog):
    for name in ("val/cat/1.png", "val/dog/1.png", "extra/cat/1.png"):
        picture(zoo.parent / "set" / name)
    zoo.rename(zoo.parent / "set" / "train")
    train, test = load(zoo.parent / "set", IMAGE)
    assert (len(train), len(test)) == (8, 2)
    assert "beside train and val are left out: extra/" in caplog.text and "is the test set" in caplog.text
    caplog.clear()
    picture(zoo.parent / "set" / "test" / "cat" / "1.png")
    train, test = load(zoo.parent / "set", IMAGE)
    assert (len(train), len(test)) == (8, 1) and "are left out: extra/, val/" in caplog.text


def test_a_class_of_trains_is_a_class(zoo):
    (zoo / "dog").rename(zoo / "train")
    assert load(zoo, IMAGE)[0].label_names == ["cat", "train"]


def test_other_splits_of_a_saved_set_are_said(tmp_path, caplog):
    import datasets

    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    datasets.DatasetDict({"train": part, "test": part, "dev": part}).save_to_disk(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "saved")
    assert "1 other splits are not used: dev (2)" in caplog.text
