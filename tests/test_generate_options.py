"""generate_croissant.py: what its options say, where its output may lie, and --check."""

import json
import shutil
from pathlib import Path

import mlcroissant as mlc
import numpy as np
import pytest
from conftest import RAI, contents, describe, description_of, edit_index, run

import generate_croissant


def write_rai(tmp_path: Path, content: object) -> list[str]:
    path = tmp_path / "said.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return ["--rai", str(path)]


def test_with_everything_given_nothing_is_listed(dataset, everything, capsys):
    capsys.readouterr()
    assert describe(dataset, *everything) == 0
    printed = capsys.readouterr()
    assert "not stated" not in printed.out
    assert len(printed.out.splitlines()) == 2
    assert printed.err == ""


def test_what_is_given_is_written(dataset, everything):
    assert describe(dataset, *everything) == 0
    description = description_of(dataset)
    ada = {"name": "Ada Lovelace", "email": "ada@example.org", "url": "https://example.org/ada"}
    assert description["creator"] == [
        {"@type": "sc:Person", **ada},
        {"@type": "sc:Organization", "name": "Example Observatory"},
    ]
    archive = {"@type": "sc:Organization", "name": "Archive", "url": "https://a.org"}
    expected = {
        "name": "Mini RAPID",
        "license": "https://spdx.org/licenses/CC-BY-4.0",
        "url": "https://example.org/mini",
        "publisher": archive,
        "version": "1.2.3",
        "datePublished": "2026-11-01",
        "citeAs": "@misc{mini, title={Mini}}",
        "keywords": ["transients", "Roman"],
    }
    assert {term: description[term] for term in expected} == expected
    assert {term: description[term] for term in RAI} == RAI
    assert not {"rai:dataCollectionTimeFrame", "rai:dataDataManipulationProtocol"} & set(
        description
    )


def test_counts_are_added_to_a_given_description(dataset):
    assert describe(dataset, "--description", "Jobs to try the tools on.") == 0
    text = description_of(dataset)["description"]
    assert text.startswith("Jobs to try the tools on. Candidate transients of 4 image-")


def test_the_default_name_is_that_of_the_folder(dataset):
    assert describe(dataset) == 0
    assert description_of(dataset)["name"] == "dataset"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("CC-BY-4.0", "https://spdx.org/licenses/CC-BY-4.0"),
        ("apache-2.0", "https://spdx.org/licenses/Apache-2.0"),
        ("https://example.org/terms", "https://example.org/terms"),
    ],
)
def test_a_license_is_an_spdx_id_or_a_url(dataset, given, written):
    assert describe(dataset, "--license", given) == 0
    assert description_of(dataset)["license"] == written


BAD_OPTIONS = {
    "license": (
        "--license",
        "CC BY",
        "expected an SPDX id as CC-BY-4.0 or a URL, got 'CC BY'",
    ),
    "unknown license": ("--license", "MyLicense-1", "expected an SPDX id"),
    "two licenses": ("--license", "MIT OR Apache-2.0", "expected an SPDX id"),
    "own license": ("--license", "LicenseRef-mine", "expected an SPDX id"),
    "url without scheme": (
        "--url",
        "example.org",
        "expected a URL such as https://example.org/data, got 'example.org'",
    ),
    "url of a file": ("--url", "file:///etc", "expected a URL"),
    "url with a blank": ("--url", "https://a.org/my data", "expected a URL"),
    "url without host": ("--url", "https:///data", "expected a URL"),
    "base url": ("--base_url", "/data", "--base_url: expected a URL"),
    "date": (
        "--date_published",
        "1.11.2026",
        "expected a date such as 2026-01-31, got '1.11.2026'",
    ),
    "no such day": ("--date_published", "2026-13-01", "expected a date"),
    "version": ("--version", "abc", "expected a version such as 1.0.0, got 'abc'"),
    "short version": ("--version", "1.0", "expected a version"),
    "version with a leading zero": ("--version", "1.0.0-rc.01", "expected a version"),
    "version in other digits": ("--version", "1.0.\u0663", "expected a version"),
    "long version": ("--version", "1.0.0.0", "expected a version"),
    "creator without name": (
        "--creator",
        ",a@b.org",
        "expected name,email,url, no commas within, got ',a@b.org'",
    ),
    "creator with a bad email": (
        "--creator",
        "Ada,ada",
        "expected name,email,url, no commas within, got 'Ada,ada'",
    ),
    "creator with a bad url": ("--creator", "Ada,,a.org", "expected name,email,url"),
    "creator with too much": ("--creator", "Ada,a@b.c,https://d.e,f", "expected name,email,url"),
    "organization without name": ("--creator", "org:", "expected name,email,url"),
    "empty publisher": ("--publisher", "", "expected name,email,url, no commas within, got ''"),
    "empty name": ("--name", " ", "expected a text, got ' '"),
    "empty keywords": ("--keywords", "", "expected a text, got ''"),
    "url with a port that is none": ("--url", "https://a.org:x/", "expected a URL"),
    "url with angles": ("--url", "https://a.org/<x>", "expected a URL"),
    "url of a dot": ("--url", "https://.", "expected a URL"),
    "base url with a query": ("--base_url", "https://a.org/d?x=1", "a URL without ? and #"),
    "base url with a fragment": ("--base_url", "https://a.org/d#x", "a URL without ? and #"),
    "year one": ("--date_published", "0001-01-01", "expected a date"),
    "empty citation": ("--cite_as", "", "expected a text"),
}


@pytest.mark.parametrize(("option", "value", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_malformed_option_is_wrong_usage(dataset, capsys, option, value, message):
    with pytest.raises(SystemExit, match="2"):
        describe(dataset, option, value)
    assert message in capsys.readouterr().err
    assert not (dataset / "croissant.json").exists()


@pytest.mark.parametrize("version", ["0.0.0", "10.20.30-rc.1", "1.0.0-0a.b-c+2026.11-x"])
def test_a_semantic_version(dataset, version):
    assert describe(dataset, "--version", version) == 0
    assert description_of(dataset)["version"] == version


def test_a_day_that_no_calendar_has(dataset, capsys):
    with pytest.raises(SystemExit, match="2"):
        describe(dataset, "--date_published", "2026-02-30")
    assert "expected a date such as 2026-01-31, got '2026-02-30'" in capsys.readouterr().err


BAD_RAI = {
    "not JSON": ("{'a': 1}", "said.json: not valid JSON: Expecting property name"),
    "empty": ("", "said.json: not valid JSON"),
    "a list": (["rai:dataBiases"], 'said.json: expected an object such as {"rai:dataBiases"'),
    "near": ({"rai:dataBias": "x"}, "unknown term 'rai:dataBias'; expected rai:dataBiases\n"),
    "no prefix": ({"dataBiases": "x"}, "unknown term 'dataBiases'; expected rai:dataBiases\n"),
    "misnamed": (
        {"rai:dataCollectionTimeFrame": "2026-01-01"},
        "expected rai:dataCollectionTimeframe\n",
    ),
    "far": ({"xyz": "x"}, "unknown term 'xyz'; expected prov:wasDerivedFrom or prov:was"),
    "no text": ({"rai:dataBiases": 3}, "rai:dataBiases is 3; expected a text or a list of such"),
    "blank": ({"rai:dataBiases": " "}, "rai:dataBiases is ' '; expected a text"),
    "empty list": ({"rai:dataBiases": []}, "rai:dataBiases is []; expected a text"),
    "null": ({"rai:dataSocialImpact": None}, "rai:dataSocialImpact is None; expected a text\n"),
    "list for one": ({"rai:dataSocialImpact": ["a", "b"]}, "expected a text\n"),
    "text for a flag": ({"rai:hasSyntheticData": "yes"}, "is 'yes'; expected true or false"),
    "no url": (
        {"prov:wasDerivedFrom": "RAPID"},
        "is 'RAPID'; expected a URL such as https://example.org/data or a list",
    ),
    "no date": ({"rai:dataCollectionTimeframe": "fall 2026"}, "expected a date such as 2026-01-31"),
    "no day": ({"rai:dataCollectionTimeframe": ["2026-02-30"]}, "expected a date such as 2026-01"),
    "no activity": ({"prov:wasGeneratedBy": 5}, "is 5; expected a text or a list of such"),
    "blank activity": ({"prov:wasGeneratedBy": " "}, "is ' '; expected a text"),
    "empty activity": ({"prov:wasGeneratedBy": {}}, "is {}; expected an object"),
    "a download": (
        {"prov:wasGeneratedBy": [{"@context": "http://nope.invalid"}]},
        "expected an object without @context",
    ),
    "infinity": (
        '{"prov:wasGeneratedBy": {"a": Infinity}}',
        "cannot be written: Out of range float",
    ),
    "a term twice": (
        '{"rai:dataBiases": "a", "rai:dataBiases": "b"}',
        "said.json: not valid JSON: 'rai:dataBiases' occurs twice",
    ),
    "no unicode": ('{"rai:dataBiases": "\\ud800"}', "can't encode character '\\ud800'"),
}


@pytest.mark.parametrize(("content", "message"), BAD_RAI.values(), ids=BAD_RAI)
def test_a_malformed_file_of_rai(dataset, tmp_path, capsys, content, message):
    assert describe(dataset, *write_rai(tmp_path, content)) == 1
    assert message in capsys.readouterr().err
    assert not (dataset / "croissant.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff", "not valid JSON"), (b"[" * 100_000, "not valid JSON"), (None, "No such file")],
)
def test_a_file_of_rai_that_cannot_be_read(dataset, tmp_path, capsys, content, message):
    path = tmp_path / "said.json"
    if content is not None:
        path.write_bytes(content)
    assert describe(dataset, "--rai", str(path)) == 1
    assert (
        f"said.json: {'cannot be read: ' * (content is None)}{message}" in capsys.readouterr().err
    )


def test_every_term_of_the_vocabulary_can_be_given(dataset, tmp_path):
    given = dict.fromkeys((*generate_croissant.RAI_ONE, *generate_croissant.RAI_MANY), "said")
    given |= {"rai:dataCollectionTimeframe": "2026-01-31", "rai:hasSyntheticData": False}
    given |= {"prov:wasDerivedFrom": ["https://a.org", "https://b.org"]}
    given |= {"prov:wasGeneratedBy": "said"}
    assert len(given) == 23
    assert describe(dataset, *write_rai(tmp_path, given)) == 0
    description = description_of(dataset)
    assert {term: description[term] for term in given} == given
    assert {term for term in description if ":" in term} == given.keys()


def test_base_url_makes_the_url_of_the_index_absolute(described, tmp_path):
    moved = described / "my index.csv"
    shutil.copyfile(described / "master_index.csv", moved)
    output = tmp_path / "for_publication.json"
    options = "-c", moved, "-o", output, "--base_url", "https://a.org/d/"
    assert run(generate_croissant, *options) == 0
    index, tensors = json.loads(output.read_text())["distribution"]
    assert index["contentUrl"] == "https://a.org/d/my%20index.csv"
    assert tensors["includes"] == "images/*.npy"


def test_checkers_can_load_a_published_description_as_a_dictionary(dataset):
    assert describe(dataset, "--base_url", "https://example.org/data") == 0
    mapping = {"master-index": dataset / "master_index.csv"}
    loaded = mlc.Dataset(jsonld=description_of(dataset), mapping=mapping)
    for name, count in {"transient_candidates": 48, "labels": 2, "images": 4}.items():
        assert len(list(loaded.records(name))) == count


@pytest.mark.parametrize("folder", ["a", "a b", "[1]/b*"])
def test_an_output_above_the_dataset(dataset, tmp_path, folder):
    (tmp_path / "top" / folder).parent.mkdir(parents=True)
    moved = dataset.rename(tmp_path / "top" / folder)
    output = tmp_path / "top" / "croissant.json"
    assert run(generate_croissant, "-c", moved / "master_index.csv", "-o", output) == 0
    index, tensors = json.loads(output.read_text())["distribution"]
    assert index["contentUrl"] == f"{folder}/master_index.csv"
    found = sorted(output.parent.glob(tensors["includes"]))
    assert found == sorted((moved / "images").iterdir())
    assert len(list(mlc.Dataset(output).records("transient_candidates"))) == 48


def test_an_index_that_is_a_link(dataset, tmp_path):
    kept = (dataset / "master_index.csv").rename(tmp_path / "kept.csv")
    (dataset / "master_index.csv").symlink_to(kept)
    assert describe(dataset) == 0
    assert description_of(dataset)["distribution"][0]["contentUrl"] == "master_index.csv"


@pytest.mark.parametrize("output", ["elsewhere/croissant.json", "dataset/images/croissant.json"])
def test_an_output_elsewhere_is_wrong_usage(dataset, tmp_path, capsys, output):
    with pytest.raises(SystemExit, match="2"):
        run(generate_croissant, "-c", dataset / "master_index.csv", "-o", tmp_path / output)
    assert f"--output must lie in {dataset} or above it" in capsys.readouterr().err


def test_the_index_is_never_overwritten(dataset, capsys):
    before = contents(dataset)
    with pytest.raises(SystemExit, match="2"):
        describe(dataset, "-o", str(dataset / "master_index.csv"))
    assert "--csv_path must be named *.csv, and --output *.json" in capsys.readouterr().err
    assert contents(dataset) == before


def test_check_agrees_and_writes_nothing(dataset, everything, capsys):
    assert describe(dataset, *everything, "--image_sha256", "--base_url", "https://a.org") == 0
    before = contents(dataset)
    capsys.readouterr()
    assert describe(dataset, "--check") == 0
    printed = capsys.readouterr()
    assert printed.out == (
        f"{dataset}/croissant.json agrees with the dataset\n"
        "  described    4 tensors (0 without candidates), 48 candidates, 12 (25.0%) real\n"
    )
    assert printed.err == ""
    assert contents(dataset) == before


def edit_json(dataset: Path, old: str, new: str) -> None:
    text = (dataset / "croissant.json").read_text()
    assert old in text
    (dataset / "croissant.json").write_text(text.replace(old, new, 1))


def drop_a_job(dataset: Path) -> None:
    edit_index(dataset, lambda index: index[index["jid"] != "jid003"])
    (dataset / "images" / "jid003.npy").unlink()


def add_a_tensor(dataset: Path) -> None:
    np.save(dataset / "images" / "jid009.npy", np.zeros((72, 80, 4), np.float32))


def replace_tensor(dataset: Path, *shape: int) -> None:
    np.save(dataset / "images" / "jid002.npy", np.zeros(shape, np.float32))


IMAGES = "recordSet/images/data"
CHANGES = {
    "a row less": (
        lambda d: edit_index(d, lambda index: index.drop(index=20)),
        [
            "distribution/master-index/contentSize is ",
            "distribution/master-index/sha256 is ",
            f"{IMAGES}/jid002/images/candidates is 11, described as 12",
        ],
    ),
    "a job less": (
        drop_a_job,
        [
            "distribution/master-index/contentSize is ",
            "distribution/master-index/sha256 is ",
            f"{IMAGES} has 3 items, described as 4",
            f"{IMAGES}/jid003 is missing, described as {{",
        ],
    ),
    "a tensor more": (
        add_a_tensor,
        [f"{IMAGES} has 5 items, described as 4", f"{IMAGES}/jid009 is {{"],
    ),
    "another shape": (
        lambda d: replace_tensor(d, 72, 90, 4),
        [
            "arrayShape is 72,-1,4, described as 72,80,4",
            f"{IMAGES}/jid002/images/width is 90, described as 80",
            f"{IMAGES}/jid002/images/sha256 is ",
        ],
    ),
    "other pixels": (
        lambda d: replace_tensor(d, 72, 80, 4),
        [f"{IMAGES}/jid002/images/sha256 is "],
    ),
    "a tensor gone": (
        lambda d: (d / "images" / "jid002.npy").unlink(),
        ["images/jid002.npy: no such tensor, but master_index.csv names it"],
    ),
    "a tensor cut": (
        lambda d: (d / "images" / "jid002.npy").write_bytes(b"x"),
        ["images/jid002.npy: not a whole .npy file"],
    ),
    "another file": (
        lambda d: edit_json(d, '"contentUrl": "master_index.csv"', '"contentUrl": "/etc/passwd"'),
        ["distribution/master-index/contentUrl is master_index.csv, described as /etc/passwd"],
    ),
    "another column": (
        lambda d: edit_json(d, '"column": "x"', '"column": "y"'),
        ["source/extract/column is x, described as y"],
    ),
    "another type of a number": (
        lambda d: edit_json(d, '"images/candidates": 12', '"images/candidates": "12"'),
        [f"{IMAGES}/jid001/images/candidates is 12, described as 12"],
    ),
    "a job twice": (
        lambda d: edit_json(d, '"images/jid": "jid002"', '"images/jid": "jid001"'),
        [
            f"{IMAGES}/jid001/images/image_filename is ",
            f"{IMAGES}/jid001/images/sha256 is ",
            f"{IMAGES}/jid002 is {{",
        ],
    ),
    "a broken context": (
        lambda d: edit_json(d, '"recordSet": "cr:recordSet",', ""),
        ["mlcroissant refuses the description: "],
    ),
}


@pytest.mark.parametrize(("change", "messages"), CHANGES.values(), ids=CHANGES)
def test_check_names_every_difference(dataset, capsys, change, messages):
    assert describe(dataset, "--image_sha256") == 0
    change(dataset)
    before = contents(dataset)
    capsys.readouterr()
    assert describe(dataset, "--check") == 1
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert message in line
    assert printed.out == ""
    assert contents(dataset) == before


def test_check_leaves_the_words_to_the_author(described):
    edit_json(described, "Column, pixels, 0-based", "How far to the right")
    edit_json(described, "Candidate transients of", "Some candidates of")
    assert describe(described, "--check") == 0


def test_check_of_a_dataset_that_was_moved_from_below_its_description(dataset, tmp_path, capsys):
    output = tmp_path / "croissant.json"
    assert run(generate_croissant, "-c", dataset / "master_index.csv", "-o", output) == 0
    moved = dataset.rename(tmp_path / "moved") / "master_index.csv"
    assert run(generate_croissant, "-c", moved, "-o", output, "--check") == 1
    message = "contentUrl is moved/master_index.csv, described as dataset/master_index.csv"
    assert message in capsys.readouterr().err


def test_check_does_not_hash_where_no_checksum_was_written(described, monkeypatch):
    replace_tensor(described, 72, 80, 4)
    assert describe(described, "--check") == 0


def without_images(dataset: Path) -> None:
    description = description_of(dataset)
    description["recordSet"] = description["recordSet"][:1]
    (dataset / "croissant.json").write_text(json.dumps(description))


BAD_DESCRIPTIONS = {
    "none": (lambda d: (d / "croissant.json").unlink(), "no such file; run without --check"),
    "no JSON": (
        lambda d: (d / "croissant.json").write_text("{"),
        "no Croissant description; run without",
    ),
    "no Croissant": (
        lambda d: (d / "croissant.json").write_text("{}"),
        "no Croissant description; run",
    ),
    "a list": (
        lambda d: (d / "croissant.json").write_text("[1]"),
        "no Croissant description; run without",
    ),
    "no images": (without_images, "recordSet/images is {"),
    "a bad index": (lambda d: (d / "master_index.csv").write_text("a\n"), "not the columns of"),
    "no index": (lambda d: (d / "master_index.csv").unlink(), "master_index.csv: no such file"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_DESCRIPTIONS.values(), ids=BAD_DESCRIPTIONS)
def test_check_of_what_cannot_be_compared(described, capsys, damage, message):
    damage(described)
    assert describe(described, "--check") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "name"), [(["--creator", "Ada"], "creator"), (["--image_sha256"], "image_sha256")]
)
def test_check_takes_no_option_that_would_have_no_effect(described, capsys, options, name):
    with pytest.raises(SystemExit, match="2"):
        describe(described, "--check", *options)
    assert f"--check writes nothing: --{name} would have no effect" in capsys.readouterr().err
