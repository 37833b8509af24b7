"""Sources: what is read from files and folders, what is refused and how, how test sets and limits are drawn."""

import json

import numpy as np
import pandas
import pytest
from PIL import Image

from fedpeft.config import DataConfig
from fedpeft.data import source
from fedpeft.errors import InputError

TEXT = "sequence-classification"
IMAGE = "image-classification"


def write_csv(path, rows, header="text,label,site"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def animals(tmp_path, count=40):
    return write_csv(
        tmp_path / "animals.csv", [f"text {i},{'cat' if i % 4 else 'dog'},site{i % 3}" for i in range(count)]
    )


def read(path, **options):
    return source.load(DataConfig(source=str(path), **options), TEXT, seed=0)


def test_csv_columns_are_found_and_the_rest_kept(tmp_path):
    train, test = read(animals(tmp_path))
    assert train.label_names == ["cat", "dog"] and train.kind == "text"
    assert list(train.columns) == ["site"]
    for records in (train, test):
        for text, label, site in zip(records.inputs, records.labels, records.columns["site"], strict=True):
            number = int(text.split()[1])
            assert records.label_names[label] == ("cat" if number % 4 else "dog")
            assert site == f"site{number % 3}"


def test_a_file_in_a_folder_that_has_the_name_of_a_prepared_set_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path / "nothing-prepared"))
    (tmp_path / "debian").mkdir()
    animals(tmp_path / "debian")
    assert read("debian/animals.csv")[0].label_names == ["cat", "dog"]
    with pytest.raises(InputError, match="debian/da is not prepared"):
        read("debian/da")


def test_held_out_set_is_stratified_seeded_and_disjoint(tmp_path):
    path = animals(tmp_path, 80)
    train, test = read(path, test_fraction=0.25)
    assert (len(train), len(test)) == (60, 20)
    assert np.bincount(test.labels).tolist() == [15, 5]
    assert not set(train.inputs) & set(test.inputs)
    assert read(path)[1].inputs == test.inputs
    other = source.load(DataConfig(source=path), TEXT, seed=1)[1]
    assert other.inputs != test.inputs


def test_a_class_of_one_record_stays_in_training(tmp_path):
    path = write_csv(tmp_path / "a.csv", [f"text {i},{'rare' if i == 7 else 'often'},s" for i in range(20)])
    for seed in range(5):
        train, _ = source.load(DataConfig(source=path, test_fraction=0.5), TEXT, seed)
        assert "text 7" in train.inputs


def test_limit_is_stratified_keeps_every_class_and_caps_the_test_set(tmp_path):
    rows = [f"text {i},{'c' if i < 2 else 'b' if i < 20 else 'a'},s" for i in range(200)]
    train, test = read(write_csv(tmp_path / "a.csv", rows), limit=20, test_fraction=0.5)
    assert (len(train), len(test)) == (20, 20)
    assert np.bincount(train.labels, minlength=3)[2] == 1 and 15 <= np.bincount(train.labels)[0] <= 18


def test_numeric_labels_are_sorted_as_numbers(tmp_path):
    train, _ = read(write_csv(tmp_path / "a.csv", [f"text {i},{i % 11},s" for i in range(44)]))
    assert train.label_names == [str(i) for i in range(11)]


def test_words_that_look_like_missing_values_are_words(tmp_path):
    train, test = read(write_csv(tmp_path / "a.csv", ["NA,None,nan"] * 2 + ["null,b,NA"] * 6))
    assert {*train.inputs, *test.inputs} == {"NA", "null"} and train.label_names == ["None", "b"]
    assert {*train.columns["site"]} == {"nan", "NA"}


def test_jsonl_and_parquet_give_what_csv_gives(tmp_path):
    rows = [{"sentence": f"text {i}", "target": i % 2, "age": i} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    loaded = [read(tmp_path / f"a.{ending}") for ending in ("jsonl", "json", "parquet")]
    for train, test in loaded:
        assert train.fingerprint == loaded[0][0].fingerprint and test.inputs == loaded[0][1].inputs
        assert train.columns["age"].tolist() == [int(text.split()[1]) for text in train.inputs]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text,", "record 3 has no label"),
        (",cat", "record 3 has no text"),
        ("   ,cat", "record 3 has no text"),
    ],
)
def test_missing_values_are_refused_with_the_record(tmp_path, row, message):
    path = write_csv(tmp_path / "a.csv", ["a,cat", "b,dog", row, "d,dog"], "text,label")
    with pytest.raises(InputError, match=message):
        read(path)


def test_nan_and_fraction_labels_are_refused(tmp_path):
    pandas.DataFrame({"text": ["a", "b"], "label": [1.0, float("nan")]}).to_parquet(tmp_path / "nan.parquet")
    with pytest.raises(InputError, match="record 2 has no label"):
        read(tmp_path / "nan.parquet")
    (tmp_path / "half.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0.5}\n')
    with pytest.raises(InputError, match=r"record 2 has 0\.5; labels must be"):
        read(tmp_path / "half.jsonl")


def test_missing_columns_are_refused_with_the_columns_there_are(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["a,b"], "words,kind")
    with pytest.raises(InputError, match=r"no text column.*words, kind.*data\.text"):
        read(path)
    with pytest.raises(InputError, match=r"no label column.*words, kind.*data\.label"):
        read(path, text="words")
    with pytest.raises(InputError, match=r"data\.label: 'kinds' is not known. Did you mean 'kind'"):
        read(path, text="words", label="kinds")


def test_broken_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": \n')
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    (tmp_path / "c.csv").write_text("text,label\na,b,c\n")
    (tmp_path / "d.txt").write_text("a")
    for name, message in (
        ("a.jsonl", "line 2"),
        ("b.parquet", "not readable as parquet"),
        ("c.csv", "more fields"),
        ("d.txt", "ending"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(InputError, match=r"data\.source: no file or folder .*missing\.csv"):
        read(tmp_path / "missing.csv")


def test_a_test_set_that_is_learned_from_is_said(tmp_path, caplog):
    path = animals(tmp_path)
    (tmp_path / "link.csv").symlink_to("animals.csv")
    train, test = read(path, test=str(tmp_path / "link.csv"))
    assert len(train) == len(test) == 40
    assert "data.test: 40 of 40 records of the test set are those that are learned from" in caplog.text
    assert train.skipped[-1].where == "data.test"
    (tmp_path / "other").mkdir()
    assert not read(path, test=animals(tmp_path / "other"))[0].skipped


def test_test_file_is_aligned_by_label_name(tmp_path):
    train_path = animals(tmp_path)
    test_path = write_csv(tmp_path / "test.csv", ["x,dog,s", "y,dog,s"])
    train, test = read(train_path, test=test_path)
    assert len(train) == 40 and [test.label_names[label] for label in test.labels] == ["dog", "dog"]
    assert test.label_names == train.label_names


def test_labels_that_only_the_test_set_has_are_refused(tmp_path):
    test_path = write_csv(tmp_path / "test.csv", ["x,dog,s", "y,horse,s"])
    with pytest.raises(InputError, match="'horse' are not in the training set, which has cat, dog"):
        read(animals(tmp_path), test=test_path)


def test_saved_data_set_keeps_its_classes_and_its_test_split(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zebra", "ape"])}
    )

    def part(prefix, labels):
        return datasets.Dataset.from_dict(
            {"text": [f"{prefix} {i}" for i in range(len(labels))], "label": labels}, features=features
        )

    datasets.DatasetDict({"train": part("train", [0, 1, 1]), "test": part("test", [1, 0])}).save_to_disk(
        tmp_path / "saved"
    )
    train, test = read(tmp_path / "saved")
    assert train.label_names == ["zebra", "ape"] and train.labels.tolist() == [0, 1, 1]
    assert test.inputs == ["test 0", "test 1"] and test.labels.tolist() == [1, 0]
    part("hidden", [0, -1]).save_to_disk(tmp_path / "hidden")
    with pytest.raises(InputError, match="record 2 has the label -1"):
        read(tmp_path / "hidden")


def test_image_folder(tmp_path):
    for index in range(8):
        folder = tmp_path / "pictures" / ("red" if index % 2 else "grey")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (5, 3), (200, 0, 0)) if index % 2 else Image.new("L", (5, 3), 90)
        image.save(folder / f"{index}.png")
    train, test = source.load(DataConfig(source=str(tmp_path / "pictures")), IMAGE, 0)
    assert np.asarray(train.inputs).shape == (6, 3, 5, 3) and train.inputs[0].dtype == np.uint8 and len(test) == 2
    for image, label in zip(train.inputs, train.labels, strict=True):
        assert image[0, 0].tolist() == ([200, 0, 0] if train.label_names[label] == "red" else [90, 90, 90])
    Image.new("L", (4, 4)).save(tmp_path / "pictures" / "red" / "small.png")
    both = source.load(DataConfig(source=str(tmp_path / "pictures")), IMAGE, 0)
    assert sorted({array.shape for part in both for array in part.inputs}) == [(3, 5, 3), (4, 4, 3)]


def test_number_arrays_outside_their_range_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": [[0.0, 16.0]], "label": 1}) + "\n")
    with pytest.raises(InputError, match=r"record 1 is no picture that can be read: fractions from 0 to 16"):
        source.load(DataConfig(source=str(tmp_path / "a.jsonl")), IMAGE, 0)


def test_data_of_the_wrong_kind_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"model\.task=sequence-classification needs text data; data\.source=digits has images"
    ):
        read("digits")
    with pytest.raises(InputError, match=r"model\.task=image-classification needs image data"):
        source.load(DataConfig(source=animals(tmp_path)), IMAGE, 0)


def test_language_modelling_needs_no_labels(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(8)))
    train, test = source.load(DataConfig(source=str(tmp_path / "a.jsonl")), "causal-lm", 0)
    assert (len(train), len(test)) == (6, 2) and not train.labels.any()


def test_an_unreachable_hub_is_said_with_the_nearest_name(monkeypatch):
    import datasets

    def refuse(*arguments, **keys):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        InputError, match=r"data\.source: 'digit' is not known. Did you mean 'digits'.*no route to the hub"
    ):
        source.load(DataConfig(source="digit"), IMAGE, 0)


def test_unprepared_recipe_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path))
    with pytest.raises(InputError, match="fedpeft data prepare wordnet"):
        read("wordnet")


def test_digits_have_their_fixed_test_set_in_the_unit_range():
    train, test = source.load(DataConfig(source="digits"), IMAGE, 0)
    assert train.inputs.shape == (1200, 8, 8, 1) and test.inputs.shape == (597, 8, 8, 1)
    assert train.inputs.dtype == np.float32 and train.inputs.min() == 0 and train.inputs.max() == 1
    assert test.fingerprint == source.load(DataConfig(source="digits"), IMAGE, 5)[1].fingerprint
    assert np.ptp(np.bincount(test.labels)) <= 3


def test_digits_are_scikit_learns_and_their_test_set_is_what_it_draws():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    train, test = source.load(DataConfig(source="digits"), IMAGE, 0)
    raw = load_digits()
    drawn = train_test_split(np.arange(len(raw.target)), test_size=597, stratify=raw.target, random_state=0)
    for part, index in zip((train, test), map(np.sort, drawn), strict=True):
        assert np.array_equal(part.inputs[..., 0] * 16, raw.images[index])
        assert np.array_equal(part.labels, raw.target[index])
    assert train.label_names == [str(name) for name in raw.target_names]


def test_docstrings_are_distinct_texts_of_every_library():
    train, test = source.load(DataConfig(source="docstrings"), TEXT, 0)
    assert not set(train.inputs) & set(test.inputs)
    assert len(set(train.inputs)) == len(train.inputs) and min(map(len, train.inputs)) >= 40
    counts = np.bincount(np.concatenate([train.labels, test.labels]))
    assert len(counts) == 4 and counts.min() > 100 and counts.max() <= 400
    for label, module in zip(train.labels, train.columns["module"], strict=True):
        assert module.split(".")[0] == train.label_names[label]


def test_fingerprint_tells_content_apart():
    base = source.Records(["ab", "c"], np.array([0, 1]), ["x", "y"], {}, "text")
    others = [
        source.Records(["a", "bc"], np.array([0, 1]), ["x", "y"], {}, "text"),
        source.Records(["ab", "c"], np.array([1, 0]), ["x", "y"], {}, "text"),
        source.Records(["ab", "c"], np.array([0, 1]), ["x", "z"], {}, "text"),
        base.take(np.array([1, 0])),
    ]
    assert len({records.fingerprint for records in [base, *others]}) == 5
    same = source.Records(["ab", "c"], np.array([0, 1]), ["x", "y"], {"site": np.array(["p", "q"])}, "text")
    assert same.fingerprint == base.fingerprint
