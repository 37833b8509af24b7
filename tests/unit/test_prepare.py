"""Recipes on tiny package files made by hand: what is parsed, what is kept, what is refused. Nothing is fetched."""

import gzip
import json

import numpy as np
import pandas
import pytest
from PIL import Image

from fedpeft.config import DataConfig
from fedpeft.data import prepare, recipe, source
from fedpeft.data.recipes import debian, fashion_mnist, glyphs, vader, wordnet
from fedpeft.errors import InputError
from support.packages import deb, tarball, trust

NOUNS = """  1 This software and database is being provided to you
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived  
02084071 05 n 03 dog 0 | a member of the genus Canis; that barks; "the dog barked all night"; "a | b"  
00000001 05 n 01 cat 0 | a feline
"""


@pytest.fixture
def wordnet_deb(tmp_path, monkeypatch):
    verbs = '00001740 29 v 04 breathe 0 | draw air into the lungs; "I can breathe"\n'
    verbs += "".join(f"{i:08d} 38 v 01 go 0 | move in the way number {i}\n" for i in range(40))
    cats = "".join(f"{i:08d} 05 n 01 cat 0 | a cat with {i} lives\n" for i in range(12))
    (tmp_path / "files").mkdir()
    path = deb(
        tmp_path / "files" / "wordnet-base_3.0_all.deb",
        {"./usr/share/wordnet/data.noun": (NOUNS + cats).encode(), "./usr/share/wordnet/data.verb": verbs.encode()},
    )
    trust(monkeypatch, wordnet, "GLOSSES", path)
    monkeypatch.setattr(wordnet, "FEWEST", 2)
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path / "cache"))
    return path


def test_wordnet_glosses_are_cut_before_their_examples():
    assert list(wordnet.glosses(NOUNS)) == [
        ("that which is perceived", "noun.Tops"),
        ("a member of the genus Canis; that barks", "noun.animal"),
        ("a feline", "noun.animal"),
    ]
    assert (wordnet.LEXNAMES["03"], wordnet.LEXNAMES["28"], wordnet.LEXNAMES["43"]) == (
        "noun.Tops",
        "noun.time",
        "verb.weather",
    )


def test_a_prepared_set_is_a_source(wordnet_deb, tmp_path):
    folder = prepare.prepare("wordnet", wordnet_deb.parent)
    assert folder == tmp_path / "cache" / "wordnet"
    about = json.loads((folder / "dataset.json").read_text())
    assert about["glosses"] == 56 and about["classes"] == 2 and about["license"].startswith("WordNet")
    assert about["files"] == {wordnet_deb.name: recipe.sha256(wordnet_deb)}
    train, test = source.load(DataConfig(source="wordnet"), "sequence-classification", 0)
    assert about["counts"]["train"]["rows"] == len(train) and about["counts"]["test"]["rows"] == len(test)
    assert len(train) + len(test) == 54 and 6 <= len(test) <= 22
    assert train.label_names == ["noun.animal", "verb.motion"] and list(train.columns) == ["part_of_speech"]
    assert not set(train.inputs) & set(test.inputs)
    again, _ = source.load(DataConfig(source=str(folder)), "sequence-classification", 0)
    assert again.fingerprint == train.fingerprint


def test_a_wrong_hash_is_refused_and_leaves_nothing(wordnet_deb, tmp_path):
    wordnet_deb.write_bytes(wordnet_deb.read_bytes() + b"x")
    with pytest.raises(
        InputError,
        match=r"sha256 of wordnet-base 1:3\.0-37 must begin with [0-9a-f]{16}, but wordnet-base_3\.0_all\.deb has",
    ):
        prepare.prepare("wordnet", wordnet_deb.parent)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(
        InputError, match=r"no file wordnet-base_\*\.deb\. Fetch it there with: apt-get download wordnet-base=1:3\.0-37"
    ):
        prepare.prepare("wordnet", tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match=r"python -m pip download --no-deps --no-binary :all: vaderSentiment==3\.3\.2"):
        prepare.prepare("vader", tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="--from: no folder"):
        prepare.prepare("vader", tmp_path / "none", tmp_path / "out")
    with pytest.raises(InputError, match="Did you mean 'wordnet'"):
        prepare.prepare("wordnets", tmp_path, tmp_path / "out")


def test_a_missing_or_failing_tool_says_so(tmp_path):
    with pytest.raises(InputError, match=r"tool no-such-tool is not installed here\. Download .* --from"):
        recipe.run(["no-such-tool"], tmp_path, "lists")
    with pytest.raises(InputError, match=r"lists: 'sh -c .*failed: no space left .*--from"):
        recipe.run(["sh", "-c", "echo no space left >&2; exit 3"], tmp_path, "lists")


def test_a_foreign_folder_is_never_replaced_and_an_own_one_is(wordnet_deb, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "letter.txt").write_text("keep")
    with pytest.raises(InputError, match="was not made by data prepare"):
        prepare.prepare("wordnet", wordnet_deb.parent, target)
    assert (target / "letter.txt").read_text() == "keep"
    (target / "letter.txt").unlink()
    (target / "scan.nii").write_text("keep")  # a data set of another tool, whose description has the same name
    for theirs in ('{"name": "hippocampus", "labels": {"0": "background"}}', "[]", "no json"):
        (target / "dataset.json").write_text(theirs)
        with pytest.raises(InputError, match="was not made by data prepare"):
            prepare.prepare("wordnet", wordnet_deb.parent, target)
    assert (target / "scan.nii").read_text() == "keep"
    (target / "scan.nii").unlink()
    (target / "dataset.json").unlink()
    prepare.prepare("wordnet", wordnet_deb.parent, target)
    (target / "stale").write_text("")
    prepare.prepare("wordnet", wordnet_deb.parent, target)
    assert sorted(path.name for path in target.iterdir()) == ["dataset.json", "test.parquet", "train.parquet"]


def test_vader_keeps_clear_ratings_with_domain_and_document(tmp_path, monkeypatch):
    inner = tarball(
        {
            "hutto/tweets_GroundTruth.txt": b"1\t0.51\tgood\r\n2\t0.5\tmeh\r\n3\t-0.5\tmeh\r\n4\t-0.6\tbad\ttabbed\r\n",
            "hutto/amazonReviewSnippets_GroundTruth.txt": "".join(
                f"{i // 3}_{i % 3}\t2.0\tsentence {i}\r\n" for i in range(60)
            ).encode(),
            "hutto/tweets_anonDataRatings.txt": b"not this",
        }
    )
    path = tmp_path / "vadersentiment-3.3.2.tar.gz"
    path.write_bytes(tarball({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    trust(monkeypatch, vader, "RATINGS", path)
    folder = prepare.prepare("vader", tmp_path, tmp_path / "out")
    train, test = pandas.read_parquet(folder / "train.parquet"), pandas.read_parquet(folder / "test.parquet")
    rows = {row.text: row for part in (train, test) for row in part.itertuples()}
    assert len(rows) == 62 and "meh" not in rows
    assert (rows["good"].label, rows["good"].domain) == ("positive", "tweets")
    assert (rows["bad\ttabbed"].label, rows["sentence 7"].document) == ("negative", "amazon-2")
    assert len(test) > 3 and not set(train["document"]) & set(test["document"])


PACKAGES = """Package: foo-dev
Source: foo (1.0)
Maintainer: Ada Team <ada@example.org>
Section: libs
Description-md5: m1

Package: foo
Maintainer: Ada Team <ada@example.org>
Section: text
Description-md5: m2
Tag: role::program,
 uitoolkit::gtk

Package: libbar-dev
Source: bar
Maintainer: "Bo" <bo@example.org>
Section: libdevel
Description-md5: m3

Package: libbar2
Source: bar
Maintainer: "Bo" <bo@example.org>
Section: libs
Description-md5: m4

Package: odd
Maintainer: C <c@example.org>
Section: misc
Description-md5: m5
"""


def apt_lists(folder):
    stem = "deb.example.org_debian_dists_trixie"
    english = [
        ("foo-dev", "m1"),
        ("foo", "m2"),
        ("libbar-dev", "m3"),
        ("libbar2", "m4"),
        ("libbar2", "old"),
        ("odd", "m5"),
    ]

    def translation(language, keys):
        return "\n".join(
            f"Package: {name}\nDescription-md5: {md5}\nDescription-{language}: about {name} {md5} {language}\n It is\n"
            f"  wide.\n .\n Really.\n"
            for name, md5 in keys
        )

    (folder / f"{stem}_main_binary-amd64_Packages").write_text(PACKAGES)
    (folder / f"{stem}-updates_main_binary-amd64_Packages").write_text(PACKAGES.replace("foo", "fresh"))
    (folder / f"{stem}_InRelease").write_text("Hash: SHA256\n\nOrigin: Debian\nDate: Sat, 01 Jan 2000 00:00:00 UTC\n")
    (folder / f"{stem}_main_i18n_Translation-en").write_text(translation("en", english))
    for language in debian.LANGUAGES:
        compressed = gzip.compress(translation(language, english[1:2]).encode())
        (folder / f"{stem}_main_i18n_Translation-{language}.gz").write_bytes(compressed)


def test_debian_keeps_one_binary_per_source_package(tmp_path):
    apt_lists(tmp_path)
    files = debian.AptLists(debian.LANGUAGES).find(tmp_path)
    chosen = debian.one_per_source(debian.stanzas(files["Packages"]))
    assert {source: package["Package"] for source, package in chosen.items()} == {
        "foo": "foo",
        "bar": "libbar2",
        "odd": "odd",
    }
    assert chosen["foo"]["Tag"] == "role::program,\nuitoolkit::gtk"


def test_debian_joins_descriptions_in_every_language(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    apt_lists(tmp_path / "lists")
    monkeypatch.setattr(debian, "FEWEST", 1)
    folder = prepare.prepare("debian", tmp_path / "lists", tmp_path / "out")

    def rows(part):
        return pandas.concat(
            [pandas.read_parquet(folder / part / f"{name}.parquet") for name in ("train", "test")]
        ).to_dict("records")

    foo = {"text": "about foo m2 en. It is wide. Really.", "label": "text", "maintainer": "Ada Team", "source": "foo"}
    bar = {"text": "about libbar2 m4 en. It is wide. Really.", "label": "libs", "maintainer": "Bo", "source": "bar"}
    assert sorted(rows(""), key=lambda row: row["source"]) == [bar, foo]
    assert rows("da") == [{**foo, "text": "about foo m2 da. It is wide. Really."}]
    about = json.loads((folder / "dataset.json").read_text())
    assert about["release_date"] == "Sat, 01 Jan 2000 00:00:00 UTC" and about["parts"] == list(debian.LANGUAGES)
    with pytest.raises(InputError, match="part of debian: 'dk' is not known"):
        prepare.read_folder(folder, "dk")


def test_debian_lists_that_are_missing_are_named(tmp_path):
    apt_lists(tmp_path)
    next(tmp_path.glob("*Translation-da.gz")).unlink()
    with pytest.raises(InputError, match=r"one file \*_dists_\*_main_i18n_Translation-da\* of one release, found 0"):
        debian.AptLists(debian.LANGUAGES).find(tmp_path)


def test_fashion_mnist_images_come_through_bit_for_bit(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = {
        "train": rng.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "t10k": rng.integers(0, 256, (10, 28, 28), dtype=np.uint8),
    }
    files = {}
    for part, images in pixels.items():
        header = b"\0\0\x08\x03" + np.array(images.shape, dtype=">u4").tobytes()
        labels = (
            b"\0\0\x08\x01" + np.array([len(images)], dtype=">u4").tobytes() + bytes(i % 10 for i in range(len(images)))
        )
        files[f"./usr/share/datasets/fashion-mnist/{part}-images-idx3-ubyte.gz"] = gzip.compress(
            header + images.tobytes()
        )
        files[f"./usr/share/datasets/fashion-mnist/{part}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    path = deb(tmp_path / "dataset-fashion-mnist_0_all.deb", files)
    trust(monkeypatch, fashion_mnist, "FASHION_MNIST", path)
    folder = prepare.prepare("fashion-mnist", tmp_path, tmp_path / "out")
    train, test = source.load(DataConfig(source=str(folder)), "image-classification", 0)
    assert np.array_equal(train.inputs[..., 0], pixels["train"]) and np.array_equal(test.inputs[..., 0], pixels["t10k"])
    assert [test.label_names[label] for label in test.labels] == list(fashion_mnist.CLASSES)
    with pytest.raises(InputError, match="not an IDX file"):
        fashion_mnist.idx(gzip.compress(b"\0\0\x0d\x01"))


def test_a_glyph_is_cropped_scaled_and_centred():
    ink = np.full((48, 12), 200, dtype=np.uint8)
    page = glyphs._centre_ink(ink)
    assert page.shape == (32, 32)
    rows, columns = np.flatnonzero(page.any(1)), np.flatnonzero(page.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (4, 27, 13, 18)
    assert set(np.unique(page)) == {0, 200}


def test_fonts_draw_62_characters_or_are_left_out(tmp_path, monkeypatch):
    import matplotlib

    fonts = f"{matplotlib.get_data_path()}/fonts/ttf"
    with open(f"{fonts}/DejaVuSans.ttf", "rb") as file:
        drawn = glyphs.draw(file.read())
    with open(f"{fonts}/STIXSizOneSymReg.ttf", "rb") as file:
        assert glyphs.draw(file.read()) is None  # brackets and large signs only
    assert drawn is not None and drawn.shape == (62, 32, 32)
    place = {character: index for index, character in enumerate(glyphs.CHARACTERS)}
    heights = [np.ptp(np.flatnonzero(glyph.any(1))) + 1 for glyph in drawn]
    assert max(heights) == 24 and len({glyph.tobytes() for glyph in drawn}) > 55
    assert (
        np.abs(drawn[place["c"]].astype(int) - drawn[place["C"]]).mean()
        < np.abs(drawn[place["c"]].astype(int) - drawn[place["k"]]).mean()
    )


def test_underscores_are_dashes(wordnet_deb):
    assert prepare.home("fashion_mnist") == prepare.home("fashion-mnist")
    assert prepare.recipe("fashion_mnist") is prepare.recipe("fashion-mnist")
    with pytest.raises(InputError, match="fashion_mnist is not prepared"):
        source.load(DataConfig(source="fashion_mnist"), "image-classification", 0)


def test_every_recipe_is_listed_with_a_summary_a_licence_and_pinned_files():
    assert prepare.recipes().keys() == prepare.RECIPES.keys()
    for name in prepare.RECIPES:
        chosen = prepare.recipe(name)
        assert 20 < len(chosen.summary) < 130 and chosen.license and chosen.kind in ("text", "image", "model")
        assert all(len(item.sha256) == 16 for item in chosen.sources if isinstance(item, recipe.Package))


def test_a_build_goes_where_a_link_leads(wordnet_deb, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for _ in range(2):
        assert prepare.prepare("wordnet", wordnet_deb.parent, tmp_path / "link") == tmp_path / "disk"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "train.parquet").is_file()


def test_a_folder_of_pictures_may_have_a_description_of_the_name_of_ours(tmp_path):
    for label in ("cat", "dog"):
        for number in range(4):
            path = tmp_path / "pets" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 20 * number + 100, np.uint8)).save(path)
    (tmp_path / "pets" / "dataset.json").write_text('{"name": "pets", "labels": ["cat", "dog"]}')
    config = DataConfig(source=str(tmp_path / "pets"))
    assert source.load(config, "image-classification", 0)[0].label_names == ["cat", "dog"]
