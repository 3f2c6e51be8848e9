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
    assert "note:" not in printed.out
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
        "dateCreated": "2026-10-31T23:59:00Z",
        "dateModified": "2026-11-02",
        "sameAs": "https://doi.org/10.5281/zenodo.1",
        "inLanguage": "en",
        "sdLicense": "https://spdx.org/licenses/CC0-1.0",
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
        ("https://example.org/LicenseRef-1", "https://example.org/LicenseRef-1"),
    ],
)
def test_a_license_is_an_spdx_id_or_a_url(dataset, given, written):
    assert describe(dataset, "--license", given) == 0
    assert description_of(dataset)["license"] == written


def test_options_that_may_be_repeated(dataset):
    options = []
    for option in ("--license", "--sd_license"):
        options += [option, "MIT", option, "https://example.org/terms"]
    for option in ("--creator", "--publisher"):
        options += [option, "Ada", option, "org:Archive"]
    options += ["--same_as", "https://a.org", "--same_as", "https://b.org"]
    options += ["--in_language", "en", "--in_language", "de"]
    assert describe(dataset, *options) == 0
    description = description_of(dataset)
    for term in ("license", "sdLicense"):
        assert description[term] == [
            "https://spdx.org/licenses/MIT",
            "https://example.org/terms",
        ]
    for term in ("creator", "publisher"):
        assert [one["name"] for one in description[term]] == ["Ada", "Archive"]
    assert description["sameAs"] == ["https://a.org", "https://b.org"]
    assert description["inLanguage"] == ["en", "de"]


BAD_OPTIONS = {
    "license": (
        "--license",
        "CC BY",
        "expected an SPDX id such as CC-BY-4.0, or a URL, got 'CC BY'",
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
    "license of the description": ("--sd_license", "CC BY", "expected an SPDX id"),
    "date": (
        "--date_published",
        "1.11.2026",
        "expected a date such as 2026-01-31, got '1.11.2026'",
    ),
    "no such day": ("--date_published", "2026-13-01", "expected a date"),
    "empty version": ("--version", "", "expected a text, got ''"),
    "no date-time": ("--date_created", "2026-01-01 noon", "expected a date"),
    "same as": ("--same_as", "zenodo.1", "expected a URL"),
    "creator without name": (
        "--creator",
        ",a@b.org",
        "https://ada.org, got ',a@b.org'",
    ),
    "creator with a bad email": (
        "--creator",
        "Ada,ada",
        "https://ada.org, got 'Ada,ada'",
    ),
    "creator with a bad url": ("--creator", "Ada,,a.org", "expected a URL such as"),
    "creator with too much": ("--creator", "Ada,a@b.c,https://d.e,f", "expected name,email,url"),
    "organization without name": ("--creator", "org:", "expected name,email,url"),
    "empty publisher": ("--publisher", "", "https://ada.org, got ''"),
    "empty name": ("--name", " ", "expected a text, got ' '"),
    "empty keywords": ("--keywords", "", "expected a text, got ''"),
    "keywords of commas": ("--keywords", " , ", "expected a text, got ''"),
    "license in brackets": ("--license", "(MIT)", "expected an SPDX id"),
    "license or later": ("--license", "MIT+", "expected an SPDX id"),
    "url with a port that is none": ("--url", "https://a.org:x/", "expected a URL"),
    "url with angles": ("--url", "https://a.org/<x>", "expected a URL"),
    "url of a dot": ("--url", "https://.", "expected a URL"),
    "base url with a query": ("--base_url", "https://a.org/d?x=1", "without ? and #"),
    "base url with a fragment": ("--base_url", "https://a.org/d#x", "without ? and #"),
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
def test_a_semantic_version(dataset, capsys, version):
    assert describe(dataset, "--version", version) == 0
    assert description_of(dataset)["version"] == version
    assert "note: version" not in capsys.readouterr().out


@pytest.mark.parametrize("version", ["1.0", "2026-11", "DR1", "1.0.0.0"])
def test_another_version_is_legal_and_noted(dataset, capsys, version):
    assert describe(dataset, "--version", version) == 0
    assert description_of(dataset)["version"] == version
    assert f"note: version {version} is not MAJOR.MINOR.PATCH" in capsys.readouterr().out


@pytest.mark.parametrize("day", ["2026-11-01T12:00:00Z", "2026-11-01T12:00:00.5+02:00"])
def test_a_date_may_have_a_time(dataset, day):
    assert describe(dataset, "--date_published", day) == 0
    assert description_of(dataset)["datePublished"] == day


@pytest.mark.parametrize("day", ["2026-02-30", "2026-04-31", "2026-01-31T25:00Z"])
def test_a_day_that_no_calendar_has(dataset, capsys, day):
    with pytest.raises(SystemExit, match="2"):
        describe(dataset, "--date_published", day)
    assert f"expected a date such as 2026-01-31, got '{day}'" in capsys.readouterr().err


def test_the_file_of_rai_is_not_overwritten(dataset, capsys):
    rai = dataset / "rai.json"
    rai.write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        describe(dataset, "--rai", str(rai), "-o", str(rai))
    assert "--output would overwrite the file of --rai" in capsys.readouterr().err
    assert rai.read_text() == "{}"


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
    "far": ({"xyz": "x"}, "unknown term 'xyz'; expected rai:annotationsPerItem or rai:dataColl"),
    "no text": ({"rai:dataBiases": 3}, "said.json: rai:dataBiases: expected a text, got 3\n"),
    "blank": ({"rai:dataBiases": " "}, "rai:dataBiases: expected a text, got ' '"),
    "empty list": ({"rai:dataBiases": []}, "rai:dataBiases: expected a text, got []"),
    "no text in a list": ({"rai:dataBiases": ["a", None]}, "expected a text, got None"),
    "null": ({"rai:dataSocialImpact": None}, "rai:dataSocialImpact: expected a text, got None\n"),
    "list for one": ({"rai:dataSocialImpact": ["a", "b"]}, "expected a text, got ['a', 'b']\n"),
    "object for a text": ({"rai:dataBiases": {"@id": "urn:a"}}, "expected a text, got {'@id'"),
    "text for a flag": ({"rai:hasSyntheticData": "yes"}, "expected true or false, got 'yes'"),
    "number for a flag": ({"rai:hasSyntheticData": 1}, "expected true or false, got 1"),
    "flag for a text": ({"rai:dataBiases": True}, "expected a text, got True"),
    "no url": (
        {"prov:wasDerivedFrom": "RAPID"},
        "expected a DOI, an IRI, or an object without @context, relative @id and type Dataset, got",
    ),
    "a term twice": ('{"rai:dataBiases": "a", "rai:dataBiases": "b"}', "no term twice"),
    "id of an own node": (
        {"prov:wasDerivedFrom": {"@id": "master-index", "contentUrl": "https://a.invalid"}},
        "relative @id",
    ),
    "another dataset": (
        {"prov:wasDerivedFrom": {"@type": "sc:Dataset", "name": "d"}},
        "or an object without @context, relative @id and type Dataset, got",
    ),
    "half a DOI": ({"prov:wasDerivedFrom": "10."}, "expected a DOI, an IRI, or an object"),
    "no date": ({"rai:dataCollectionTimeframe": "fall 2026"}, "expected a date such as 2026-01-31"),
    "no day": ({"rai:dataCollectionTimeframe": ["2026-02-32"]}, "expected a date such as 2026-01"),
    "three dates": ({"rai:dataCollectionTimeframe": "2020/2021/2022"}, "expected a date such as"),
    "no activity": ({"prov:wasGeneratedBy": 5}, "expected a text, or an object without @context"),
    "blank activity": ({"prov:wasGeneratedBy": " "}, "expected a text, or an object without"),
    "empty activity": ({"prov:wasGeneratedBy": {}}, "expected a text, or an object without"),
    "a download": (
        {"prov:wasGeneratedBy": [{"a": [{"@context": "http://nope.invalid"}]}]},
        "expected a text, or an object without @context, relative @id and type Dataset, got {'a'",
    ),
    "a context": ({"@context": "http://nope.invalid"}, "unknown term '@context'"),
    "infinity": (
        '{"prov:wasGeneratedBy": {"a": Infinity}}',
        "cannot be written: Out of range float",
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
    error = capsys.readouterr().err
    assert message in error
    assert "said.json" in error


def test_every_term_of_the_vocabulary_can_be_given(dataset, tmp_path):
    given = dict.fromkeys(generate_croissant.RAI_TERMS, "said")
    given |= {"rai:dataCollectionTimeframe": "2026-01-31", "rai:hasSyntheticData": False}
    given |= {"prov:wasDerivedFrom": ["https://a.org", "https://b.org"]}
    assert len(given) == 24
    assert describe(dataset, *write_rai(tmp_path, given)) == 0
    description = description_of(dataset)
    assert {term: description[term] for term in given} == given
    assert {term for term in description if ":" in term} == given.keys()


AGENT = {"@type": "prov:Agent", "prov:label": "RAPID"}
LEGAL_RAI = {
    "interval of years": ("rai:dataCollectionTimeframe", "2020/2022"),
    "interval of months": ("rai:dataCollectionTimeframe", "2026-10/2026-11"),
    "date-time": ("rai:dataCollectionTimeframe", "2026-10-01T12:00:00Z"),
    "interval of date-times": (
        "rai:dataCollectionTimeframe",
        ["2026-10-01T12:00Z/2026-10-02T12:00Z"],
    ),
    "several texts": ("rai:dataReleaseMaintenancePlan", ["a", "b"]),
    "id": ("prov:wasDerivedFrom", {"@id": "urn:dataset:ImageNet"}),
    "urn": ("prov:wasDerivedFrom", "urn:dataset:ImageNet"),
    "doi": ("prov:wasDerivedFrom", "doi:10.5281/zenodo.1"),
    "several sources": (
        "prov:wasDerivedFrom",
        ["https://a.org", {"@type": "prov:Entity", "name": "Jobs of May"}],
    ),
    "agent": ("prov:wasAttributedTo", AGENT),
    "several agents": ("prov:wasAttributedTo", [AGENT, "a person"]),
    "activity": ("prov:wasGeneratedBy", {"@type": "prov:Activity", "prov:label": "Injection"}),
    "human labels": ("rai:annotationsPerItem", "2"),
}


@pytest.mark.parametrize(("term", "value"), LEGAL_RAI.values(), ids=LEGAL_RAI)
def test_what_the_specifications_use_themselves(dataset, tmp_path, term, value):
    assert describe(dataset, *write_rai(tmp_path, {term: value})) == 0
    assert description_of(dataset)[term] == value


def test_a_bare_doi_becomes_its_url(dataset, tmp_path):
    assert describe(dataset, *write_rai(tmp_path, {"prov:wasDerivedFrom": "10.5281/zenodo.1"})) == 0
    assert description_of(dataset)["prov:wasDerivedFrom"] == "https://doi.org/10.5281/zenodo.1"


def test_base_url_says_where_index_and_tensors_are_published(described):
    moved = described / "my index.csv"
    shutil.copyfile(described / "master_index.csv", moved)
    options = "-c", moved, "-o", described / "published.json", "--base_url", "https://a.org/d/"
    assert run(generate_croissant, *options) == 0
    index, tensors, folder = json.loads((described / "published.json").read_text())["distribution"]
    assert index["contentUrl"] == "https://a.org/d/my%20index.csv"
    assert tensors["includes"] == "images/*.npy"
    assert tensors["containedIn"] == {"@id": folder["@id"]}
    assert folder["@type"] == "cr:FileObject"
    assert folder["contentUrl"] == "https://a.org/d"  # and / and image_filename


def test_checkers_can_load_a_published_description_as_a_dictionary(dataset):
    assert describe(dataset, "--base_url", "https://example.org/data") == 0
    mapping = {"master-index": dataset / "master_index.csv"}
    loaded = mlc.Dataset(jsonld=description_of(dataset), mapping=mapping)
    for name, count in {"transient_candidates": 48, "labels": 2, "images": 4}.items():
        assert len(list(loaded.records(name))) == count


def test_an_index_that_is_a_link(dataset, tmp_path):
    kept = (dataset / "master_index.csv").rename(tmp_path / "kept.csv")
    (dataset / "master_index.csv").symlink_to(kept)
    assert describe(dataset) == 0
    assert description_of(dataset)["distribution"][0]["contentUrl"] == "master_index.csv"


@pytest.mark.parametrize("output", ["c.json", "elsewhere/c.json", "dataset/images/c.json"])
@pytest.mark.parametrize("options", [(), ("--base_url", "https://a.org"), ("--check",)])
def test_an_output_elsewhere_is_wrong_usage(dataset, tmp_path, capsys, output, options):
    paths = "-c", dataset / "master_index.csv", "-o", tmp_path / output
    with pytest.raises(SystemExit, match="2"):
        run(generate_croissant, *paths, *options)
    assert f"--output must lie beside the index, in {dataset}\n" in capsys.readouterr().err


def test_the_description_is_written_beside_the_index_by_default(dataset):
    assert run(generate_croissant, "-c", dataset / "master_index.csv") == 0
    assert description_of(dataset)["name"] == "dataset"


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
    assert printed.out == f"{dataset}/croissant.json agrees with the dataset\n"
    assert printed.err == ""
    assert contents(dataset) == before


def edit_text(dataset: Path, old: str, new: str) -> None:
    """Replace one text in the description of a dataset."""
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


RECORD = [f'"images/{field}": ' for field in "candidates height image_filename jid".split()]
RECORD += [f'"images/{field}": ' for field in "real sha256 width".split()]
CHANGES = {  # what the lines of the description have, and those of the dataset in their place
    "a row less": (
        lambda d: edit_index(d, lambda index: index.drop(index=20)),
        ["contentSize", "sha256", '"images/candidates": 12'],
        ["contentSize", "sha256", '"images/candidates": 11'],
    ),
    "a job less": (
        drop_a_job,
        ["contentSize", "sha256", *RECORD[2:], "},", "{", *RECORD[:2]],
        ["contentSize", "sha256"],
    ),
    "a tensor more": (add_a_tensor, [], ["},", "{", *RECORD]),
    "another shape": (
        lambda d: replace_tensor(d, 72, 90, 4),
        ['"arrayShape": "72,80,4"', '"images/sha256"', '"images/width": 80'],
        ['"arrayShape": "72,-1,4"', '"images/sha256"', '"images/width": 90'],
    ),
    "other pixels": (
        lambda d: replace_tensor(d, 72, 80, 4),
        ['"images/sha256"'],
        ['"images/sha256"'],
    ),
    "another file": (
        lambda d: edit_text(d, '"contentUrl": "master_index.csv"', '"contentUrl": "/etc/passwd"'),
        ['"contentUrl": "/etc/passwd"'],
        ['"contentUrl": "master_index.csv"'],
    ),
    "another column": (
        lambda d: edit_text(d, '"column": "x"', '"column": "y"'),
        ['"column": "y"'],
        ['"column": "x"'],
    ),
    "another type of a number": (
        lambda d: edit_text(d, '"images/candidates": 12', '"images/candidates": "12"'),
        ['"images/candidates": "12"'],
        ['"images/candidates": 12'],
    ),
    "a job twice": (
        lambda d: edit_text(d, '"images/jid": "jid002"', '"images/jid": "jid001"'),
        ['"images/jid": "jid001"'],
        ['"images/jid": "jid002"'],
    ),
}


@pytest.mark.parametrize(("change", "then", "now"), CHANGES.values(), ids=CHANGES)
def test_check_shows_every_difference(dataset, capsys, change, then, now):
    assert describe(dataset, "--image_sha256") == 0
    change(dataset)
    before = contents(dataset)
    capsys.readouterr()
    assert describe(dataset, "--check") == 1
    printed = capsys.readouterr()
    errors = [line.removeprefix("ERROR: ") for line in printed.err.splitlines()]
    file = f"{dataset}/croissant.json"
    again = "as the dataset is now; write it again without --check"
    heads = [f"--- {file} as it is", f"+++ {again}"]
    assert [line for line in errors if line[:3] in ("---", "+++")] == heads
    for sign, expected in {"-": then, "+": now}.items():
        shown = [line for line in errors if line.startswith(sign) and line not in heads]
        assert len(shown) == len(expected)
        for text, line in zip(expected, shown, strict=True):
            assert text in line
    assert printed.out == ""
    assert contents(dataset) == before


def test_a_difference_shows_its_job(dataset, capsys):
    assert describe(dataset, "--image_sha256") == 0
    replace_tensor(dataset, 72, 80, 4)
    assert describe(dataset, "--check") == 1
    assert '"images/jid": "jid002"' in capsys.readouterr().err


def test_a_long_difference_is_cut_short(dataset, capsys):
    assert describe(dataset) == 0
    for number in range(100, 120):
        np.save(dataset / "images" / f"jid{number}.npy", np.zeros((72, 80, 4), np.float32))
    assert describe(dataset, "--check") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 42
    assert lines[-1].endswith(" more")


BAD_TENSORS = {
    "gone": (
        lambda d: (d / "images" / "jid002.npy").unlink(),
        "images/jid002.npy: no such tensor, but master_index.csv names it",
    ),
    "cut": (
        lambda d: (d / "images" / "jid002.npy").write_bytes(b"x"),
        "images/jid002.npy: not a whole .npy file",
    ),
    "a broken context": (
        lambda d: edit_text(d, '"recordSet": "cr:recordSet",', ""),
        "mlcroissant rejects the description: ",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_check_of_damaged_files(described, capsys, damage, message):
    damage(described)
    assert describe(described, "--check") == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_check_leaves_the_words_to_the_author(described):
    edit_text(described, "Column, pixels, 0-based", "How far to the right")
    edit_text(described, "Candidate transients of", "Some candidates of")
    assert describe(described, "--check") == 0


def test_the_order_of_keys_is_no_difference(described):
    path = described / "croissant.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert describe(described, "--check") == 0


def test_check_does_not_hash_if_no_checksum_was_written(described):
    replace_tensor(described, 72, 80, 4)
    assert describe(described, "--check") == 0


def without_images(dataset: Path) -> None:
    description = description_of(dataset)
    description["recordSet"] = description["recordSet"][:1]
    (dataset / "croissant.json").write_text(json.dumps(description))


NO_DESCRIPTION = "croissant.json: no description to compare with ("
BAD_DESCRIPTIONS = {
    "none": (lambda d: (d / "croissant.json").unlink(), "No such file or directory"),
    "no JSON": (lambda d: (d / "croissant.json").write_text("{"), NO_DESCRIPTION),
    "no Croissant": (lambda d: (d / "croissant.json").write_text("{}"), NO_DESCRIPTION),
    "a list": (lambda d: (d / "croissant.json").write_text("[1]"), NO_DESCRIPTION),
    "no images": (without_images, '"@type": "cr:Field"'),
    "a number as URL": (
        lambda d: edit_text(d, '"contentUrl": "master_index.csv"', '"contentUrl": NaN'),
        '"contentUrl": NaN',
    ),
    "a bad index": (lambda d: (d / "master_index.csv").write_text("a\n"), "wrong columns (a, d"),
    "no index": (
        lambda d: (d / "master_index.csv").unlink(),
        "master_index.csv: not a readable index ([Errno 2] No such",
    ),
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
