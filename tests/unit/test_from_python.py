"""Data handed over by a Python program: written once into the run's folder, read there as a file saved by hand is."""

from __future__ import annotations

import socket
import subprocess

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset, IterableDataset

from fedpeft.config import DataConfig
from fedpeft.data import from_python, source
from fedpeft.errors import InputError
from fedpeft.simulations.run import resume, simulate

TEXT, IMAGE = "sequence-classification", "image-classification"


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"text": "a", "label": 1}])


def letters(count=24, start=0):
    return [
        {
            "note": f"letter {'north sea' if number % 2 else 'south pole'} {number}",
            "ward": "ab"[number % 2],
            "day": number,
        }
        for number in range(start, start + count)
    ]


def photos(count=12):
    draws = np.random.default_rng(0)
    return [draws.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(count)]


def test_what_a_killed_process_has_left_in_the_folder_goes(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = tmp_path / f".data-{socket.gethostname()}-{ended.pid}-a"
    left.mkdir()
    from_python.write(DataConfig(), tmp_path, pandas.DataFrame(letters()), None)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def load(folder, data, test=None, task=TEXT, **keys):
    folder.mkdir(parents=True)
    config = DataConfig(**keys)
    from_python.write(config, folder, data, test)
    return source.load(config, task, 0)


def test_a_table_is_read_alike_whatever_hands_it_over(tmp_path):
    keys = {"text": "note", "label": "ward"}
    rows = letters(600)  # several blocks
    pandas.DataFrame(rows).to_parquet(tmp_path / "hand.parquet")
    hand = source.load(DataConfig(source=str(tmp_path / "hand.parquet"), **keys), TEXT, 0)
    shapes = {
        "frame": pandas.DataFrame(rows),
        "dataset": datasets.Dataset.from_list(rows),
        "formatted": datasets.Dataset.from_list(rows).with_format("torch"),
        "rows": Rows([{**row, "day": torch.tensor(row["day"])} for row in rows]),
    }
    for name, shape in shapes.items():
        for part, known in zip(load(tmp_path / name, shape, **keys), hand, strict=True):
            assert part.fingerprint == known.fingerprint, name
            assert part.columns["day"].tolist() == known.columns["day"].tolist(), name


def test_a_dict_of_splits_and_a_test_of_its_own(tmp_path):
    keys = {"text": "note", "label": "ward"}
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(letters(20)), test=datasets.Dataset.from_list(letters(6, 50))
    )
    train, test = load(tmp_path / "dict", both, **keys)
    assert (len(train), sorted(test.columns["day"].tolist())) == (20, list(range(50, 56)))
    train, test = load(tmp_path / "two", pandas.DataFrame(letters(20)), Rows(letters(4, 70)), **keys)
    assert (len(train), sorted(test.columns["day"].tolist())) == (20, list(range(70, 74)))


def test_pictures_of_a_torch_dataset_keep_their_pixels(tmp_path):
    arrays = photos()
    turned = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    forms = {
        "arrays": arrays,
        "bytes": turned,
        "fractions": [value.float() / 255 for value in turned],  # as torchvision's ToTensor has them
        "pillow": [Image.fromarray(array) for array in arrays],
    }
    for name, values in forms.items():
        rows = Rows([{"image": value, "label": number % 3} for number, value in enumerate(values)])
        train, test = load(tmp_path / name, rows, task=IMAGE)
        found = sorted(np.asarray(picture).tobytes() for part in (train, test) for picture in part.inputs)
        assert found == sorted(array.tobytes() for array in arrays), name
    other = [value.float() / 300 for value in turned]  # no whole numbers through 255
    train, test = load(
        tmp_path / "other", Rows([{"image": v, "label": n % 3} for n, v in enumerate(other)]), task=IMAGE
    )
    found = sorted(np.asarray(picture).tobytes() for part in (train, test) for picture in part.inputs)
    assert found == sorted(value.permute(1, 2, 0).contiguous().numpy().tobytes() for value in other)


def test_a_key_that_only_later_records_have_and_an_index_with_a_name_are_columns(tmp_path):
    rows = letters(300)
    rows[-1]["late"] = "x"
    train, test = load(tmp_path / "late", Rows(rows), text="note", label="ward")
    assert sorted([*train.columns["late"].tolist(), *test.columns["late"].tolist()]) == [""] * 299 + ["x"]
    frame = pandas.DataFrame(letters()).set_index("day")
    train, test = load(tmp_path / "index", frame, text="note", label="ward")
    assert sorted([*train.columns["day"].tolist(), *test.columns["day"].tolist()]) == list(range(24))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("notes.csv", r"data= is a builtins\.str; expected a pandas\.DataFrame.*key data\.source"),
        (letters(), r"data= is a builtins\.list; .*Dataset\.from_list"),
        (Stream(), r"data= is a .*Stream; .*parquet"),
        (datasets.IterableDataset.from_generator(letters), r"data= is a datasets.*IterableDataset; .*parquet"),
        (Rows([("a", 1)]), r"data=: record 1 of the Dataset is a tuple; expected a dict"),
        (Rows([]), "data=: no records"),
        (pandas.DataFrame({"text": [], "label": []}), "data=: no records"),
        (datasets.DatasetDict(test=datasets.Dataset.from_list([])), "data= split test: no records"),
        (pandas.DataFrame({0: ["a"], "label": ["b"]}), r"data=: the column 0 has no name that is a string"),
        (pandas.DataFrame({"text": ["a", 1], "label": ["b", "c"]}), "data=: the DataFrame cannot be written"),
        (Rows([{"text": "a", "label": object()}]), "data=: the records of the Dataset cannot be written as"),
        (Rows([{"text": "a"}] * 256 + [{"text": 1}]), "data=: the records of the Dataset cannot be written as"),
        (Rows([{"image": Image.new("I", (8, 8)), "label": 1}]), r"data=: record 1: image is no picture.*mode I"),
    ],
)  # fmt: skip
def test_what_is_no_data_is_refused_by_name_and_leaves_nothing(tmp_path, data, said):
    with pytest.raises(InputError, match=said):
        from_python.write(DataConfig(), tmp_path, data, None)
    assert not list(tmp_path.iterdir())


def test_a_run_has_what_it_was_handed_and_goes_on_with_it(tmp_path, monkeypatch):
    from fedpeft.record import report

    monkeypatch.setattr(report, "write", lambda run: [])
    frame = pandas.DataFrame(letters(48))
    keys = {
        "data.text": "note", "data.label": "ward", "data.clients": 2, "data.partition": "iid",
        "model.max_length": 16, "run.rounds": 2, "run.baselines": False, "client.local_steps": 1,
        "client.local_epochs": None,
    }  # fmt: skip
    frame.to_parquet(tmp_path / "hand.parquet", index=False)
    simulate("text", {**keys, "data.source": str(tmp_path / "hand.parquet")}, tmp_path / "hand")

    def interrupt(event):
        if event["event"] == "round" and event["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate("text", keys, tmp_path / "run", interrupt, data=frame)
    (tmp_path / "run").rename(tmp_path / "moved")
    resume(tmp_path / "moved")
    hand, found = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("hand", "moved"))
    assert found.keys() == hand.keys() and all(torch.equal(found[key], hand[key]) for key in hand)
    with pytest.raises(InputError, match=r"data\.label: .*wards"):
        simulate("text", {**keys, "data.label": "wards"}, tmp_path / "refused", data=frame)
    assert not (tmp_path / "refused").exists()
