"""generate_croissant.py: what it writes about a dataset that is whole."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import (
    describe,
    description_of,
    edit_index,
    finish,
    read_index,
    run,
    start,
    write_labelled_jobs,
)

import create_dataset
import generate_croissant
from generate_croissant import INDEX_COLUMNS

SCRIPT = Path(generate_croissant.__file__)


def record_sets(dataset: Path) -> dict[str, dict]:
    return {record_set["@id"]: record_set for record_set in description_of(dataset)["recordSet"]}


def fields(dataset: Path, record_set: str) -> dict[str, dict]:
    return {field["name"]: field for field in record_sets(dataset)[record_set]["field"]}


def image_rows(dataset: Path) -> dict[str, dict]:
    rows = record_sets(dataset)["images"]["data"]
    return {
        row["images/jid"]: {k.removeprefix("images/"): v for k, v in row.items()} for row in rows
    }


def test_there_are_three_record_sets_with_their_keys(described):
    keys = {name: record_set["key"] for name, record_set in record_sets(described).items()}
    assert keys == {
        "transient_candidates": [
            {"@id": "transient_candidates/jid"},
            {"@id": "transient_candidates/id"},
        ],
        "labels": {"@id": "labels/label"},
        "images": {"@id": "images/jid"},
    }


@pytest.mark.parametrize("ids", [[None, *range(47)], [None] * 48], ids=["one", "all"])
def test_without_an_id_of_each_candidate_there_is_no_key(dataset, ids):
    edit_index(dataset, lambda index: index.assign(id=ids))
    assert describe(dataset) == 0
    assert "key" not in record_sets(dataset)["transient_candidates"]
    assert "key" in record_sets(dataset)["images"]


def test_a_dataset_labelled_by_a_truth_table(tmp_path):
    out = tmp_path / "out"
    assert run(create_dataset, *write_labelled_jobs(tmp_path), "-o", out) == 0
    assert describe(out, "--base_url", "https://example.org/d") == 0
    types = {name: field["dataType"] for name, field in fields(out, "transient_candidates").items()}
    assert types["jid"] == types["image_filename"] == "sc:Text"
    annotation = fields(out, "transient_candidates")["image_filename"]["annotation"]
    assert annotation["arrayShape"] == "72,80,4"
    assert "a table of true sources" in description_of(out)["rai:dataAnnotationProtocol"]
    assert [row["real"] for row in image_rows(out).values()] == (
        read_index(out).groupby("jid", sort=False)["label"].sum().tolist()
    )


def test_candidates_have_a_typed_field_for_each_column(described):
    made = fields(described, "transient_candidates")
    assert tuple(made) == INDEX_COLUMNS
    for column, field in made.items():
        assert field["@id"] == f"transient_candidates/{column}"
        assert field["source"]["extract"] == {"column": column}
    types = {name: field["dataType"] for name, field in made.items()}
    assert types.pop("jid") == types.pop("image_filename") == "sc:Text"
    assert types.pop("label") == ["cr:Int64", "cr:Label"]
    assert set(types.values()) == {"cr:Float64"}


@pytest.mark.parametrize(
    ("column", "words"),
    [
        *(("x", "pixels"), ("y", "pixels"), ("flux", "DN/s"), ("peak", "DN/s")),
        *(("mag", "magnitude, mag"), ("sharpness", "dimensionless"), ("npix", "pixels")),
        *(("label", "1: real"), ("match", "-1 for none")),
    ],
)
def test_descriptions_say_the_unit(described, column, words):
    assert words in fields(described, "transient_candidates")[column]["description"]


def test_descriptions_say_what_an_empty_cell_means(described):
    endings = {
        name: field["description"].rpartition(". ")[2]
        for name, field in fields(described, "transient_candidates").items()
    }
    assert endings.pop("mag") == ("Empty if flux <= 0 or not given.")
    never = {name for name, ending in endings.items() if ending == "Never empty."}
    assert never == {"jid", "x", "y", "match", "label", "image_filename"}
    others = {ending for name, ending in endings.items() if name not in never}
    assert others == {"Empty if the catalog has no value."}


def test_the_tensor_is_an_annotation_of_its_path(described):
    annotation = fields(described, "transient_candidates")["image_filename"]["annotation"]
    assert annotation["dataType"] == "cr:Float32"
    assert (annotation["isArray"], annotation["arrayShape"]) == (True, "72,80,4")
    assert annotation["source"] == {
        "fileSet": {"@id": "image-tensors"},
        "extract": {"fileProperty": "content"},
    }


def test_a_side_that_differs_between_the_jobs_is_open(dataset):
    np.save(dataset / "images" / "jid001.npy", np.zeros((72, 99, 4), np.float32))
    assert describe(dataset) == 0
    annotation = fields(dataset, "transient_candidates")["image_filename"]["annotation"]
    assert annotation["arrayShape"] == "72,-1,4"
    assert "tensors of several sizes" in description_of(dataset)["description"]
    widths = {jid: row["width"] for jid, row in image_rows(dataset).items()}
    assert widths == {"jid001": 99, "jid002": 80, "jid003": 80, "jid004": 80}


def test_labels_are_an_enumeration(described):
    labels = record_sets(described)["labels"]
    assert labels["dataType"] == "sc:Enumeration"
    names = {row["labels/label"]: row["labels/name"] for row in labels["data"]}
    assert names == {0: "bogus", 1: "real"}
    assert fields(described, "labels")["url"]["dataType"] == "sc:URL"
    assert len({row["labels/url"] for row in labels["data"]}) == 2


def test_images_have_a_row_for_each_job(described):
    index = read_index(described)
    rows = image_rows(described)
    assert list(rows) == ["jid001", "jid002", "jid003", "jid004"]
    for jid, row in rows.items():
        labels = index.loc[index["jid"] == jid, "label"]
        assert row == {
            "jid": jid,
            "image_filename": f"images/{jid}.npy",
            "height": 72,
            "width": 80,
            "candidates": len(labels),
            "real": labels.sum(),
        }


def test_images_have_checksums_where_asked_for(dataset):
    assert describe(dataset, "--image_sha256") == 0
    assert fields(dataset, "images")["sha256"]["dataType"] == "sc:Text"
    for row in image_rows(dataset).values():
        pixels = (dataset / row["image_filename"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(pixels).hexdigest()


def test_a_job_without_candidates_has_a_tensor_and_a_row(raw, tmp_path, capsys):
    (raw / "jid002" / "psfcat.csv").write_text("id,x,y,match\n")
    assert run(create_dataset, "-i", raw, "-o", tmp_path / "out") == 0
    assert describe(tmp_path / "out") == 0
    text = description_of(tmp_path / "out")["description"]
    assert "3 image-differencing jobs" in text
    assert "36 candidates" in text
    assert "4 image tensors" in text
    row = image_rows(tmp_path / "out")["jid002"]
    assert (row["candidates"], row["real"], row["height"]) == (0, 0, 72)
    assert "1 tensors without candidates, such as images/jid002.npy" in capsys.readouterr().err


def test_it_conforms_to_croissant_1_1_and_rai(described):
    description = description_of(described)
    assert description["conformsTo"] == [
        "http://mlcommons.org/croissant/1.1",
        "http://mlcommons.org/croissant/RAI/1.0",
    ]
    assert description["@context"]["isArray"] == "cr:isArray"


def test_index_and_tensors_are_resources(described):
    index, tensors = description_of(described)["distribution"]
    content = (described / "master_index.csv").read_bytes()
    assert index["@type"] == "cr:FileObject"
    assert (index["contentUrl"], index["encodingFormat"]) == ("master_index.csv", "text/csv")
    assert index["contentSize"] == f"{len(content)} B"
    assert index["sha256"] == hashlib.sha256(content).hexdigest()
    assert tensors["@type"] == "cr:FileSet"
    assert tensors["encodingFormat"] == "application/x-numpy"
    assert tensors["includes"] == "images/*.npy"


def test_description_counts(dataset, capsys):
    assert describe(dataset) == 0
    text = description_of(dataset)["description"]
    assert "4 image-differencing jobs" in text
    assert "48 candidates, of which 12 (25.0%) are real" in text
    assert "4 image tensors of 72 x 80 pixels" in text
    printed = capsys.readouterr()
    assert text in " ".join(printed.out.split())
    assert printed.err == ""


def test_empty_cells_and_class_balance_are_counted(dataset):
    edit_index(dataset, lambda index: index.assign(npix=index["npix"].mask(index.index < 3)))
    assert describe(dataset) == 0
    description = description_of(dataset)
    empty = pd.read_csv(dataset / "master_index.csv")["mag"].isna().sum()
    assert description["rai:dataCollectionMissingData"] == (
        f"Empty cells among 48 candidates: npix 3 (6.2%), mag {empty} ({empty / 48:.1%})."
    )
    assert "12 (25.0%) of 48 are real" in description["rai:dataLimitations"][0]


def test_no_empty_cell_is_said_too(dataset):
    edit_index(dataset, lambda index: index.fillna(1.0))
    assert describe(dataset) == 0
    text = description_of(dataset)["rai:dataCollectionMissingData"]
    assert text == "Empty cells among 48 candidates: none."


def test_it_says_how_the_data_were_made(described):
    description = description_of(described)
    assert "ZScaleInterval" in description["rai:dataPreprocessingProtocol"]
    assert "if match is the number of a known" in description["rai:dataAnnotationProtocol"]
    assert (
        "given by the catalog or matched by position" in description["rai:machineAnnotationTools"]
    )
    assert "rai:annotationsPerItem" not in description  # human labels; there are none
    activity = description["prov:wasGeneratedBy"]
    assert activity["@type"] == "prov:Activity"
    agents = activity["prov:wasAssociatedWith"]
    versions = {agent["name"]: agent["softwareVersion"] for agent in agents}
    assert versions["numpy"] == np.__version__
    assert versions["pandas"] == pd.__version__
    assert versions.keys() == {"Python", "mlcroissant", "numpy", "pandas"}


def test_other_processes_write_the_same_bytes(described):
    before = (described / "croissant.json").read_bytes()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "TZ": f"UTC{seed}"}
        options = "-c", "master_index.csv", "-o", "croissant.json"
        assert finish(start(SCRIPT, *options, cwd=described, env=env)).code == 0
        assert (described / "croissant.json").read_bytes() == before


def test_no_date_is_invented(dataset, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert describe(dataset) == 0
    assert not {"datePublished", "dateModified", "dateCreated"} & description_of(dataset).keys()


def test_what_nobody_gave_is_listed_with_its_option_and_not_invented(dataset, capsys):
    assert describe(dataset) == 0
    out = capsys.readouterr().out.replace("\n    ", " ")
    listed = re.findall(r"^  (re.*), but not stated: (.*)$", out, re.MULTILINE)
    assert listed == [
        ("required by Croissant", "--license --url --creator --date_published"),
        (
            "recommended by Croissant",
            "--version --keywords --publisher --date_created --date_modified --same_as"
            " --in_language --sd_license",
        ),
        ("recommended by mlcroissant", "--cite_as"),
        (
            "required by NeurIPS",
            "--rai with rai:dataBiases rai:dataSocialImpact rai:hasSyntheticData"
            " prov:wasDerivedFrom",
        ),
    ]
    terms = "license url creator datePublished version keywords publisher sameAs citeAs sdLicense"
    assert not {*terms.split(), "rai:dataBiases"} & description_of(dataset).keys()


def test_the_eight_terms_of_neurips_are_there_or_listed(dataset, capsys):
    assert describe(dataset) == 0
    out = capsys.readouterr().out
    terms = (
        "rai:dataLimitations rai:dataBiases rai:personalSensitiveInformation rai:dataUseCases"
        " rai:dataSocialImpact rai:hasSyntheticData prov:wasDerivedFrom prov:wasGeneratedBy"
    )
    for term in terms.split():
        assert (term in description_of(dataset)) != (term in out)


def test_the_file_is_readable_text(described):
    text = (described / "croissant.json").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
