"""generate_croissant.py: what it writes, and what it refuses."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import mlcroissant as mlc
import numpy as np
import pandas as pd
import pytest
from conftest import CUT_HEADER

import create_dataset
import generate_croissant
from generate_croissant import INDEX_COLUMNS

RECORD_SET = "transient_candidates"


def run(dataset: Path) -> int:
    arguments = ["-c", str(dataset / "master_index.csv"), "-o", str(dataset / "croissant.json")]
    return generate_croissant.main(arguments)


def described_json(dataset: Path) -> dict:
    return json.loads((dataset / "croissant.json").read_text())


def test_every_record_is_the_row_of_the_index(described):
    index = pd.read_csv(described / "master_index.csv")
    records = mlc.Dataset(described / "croissant.json").records(RECORD_SET)
    rows = [
        {key.split("/")[1]: v.decode() if isinstance(v, bytes) else v for key, v in record.items()}
        for record in records
    ]
    read = pd.DataFrame(rows).astype(index.dtypes)
    pd.testing.assert_frame_equal(read, index, check_exact=True)


def test_fields_have_ids_types_and_descriptions(described):
    (record_set,) = described_json(described)["recordSet"]
    fields = record_set["field"]
    assert record_set["@id"] == RECORD_SET
    assert [field["@id"] for field in fields] == [f"{RECORD_SET}/{c}" for c in INDEX_COLUMNS]
    types = {field["name"]: field["dataType"] for field in fields}
    assert types.pop("jid") == types.pop("image_filename") == "sc:Text"
    assert types.pop("label") == "cr:Int64"
    assert set(types.values()) == {"cr:Float64"}
    assert all(len(field["description"]) > 20 for field in fields)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        *(("x", "pixels"), ("y", "pixels"), ("flux", "DN/s"), ("peak", "DN/s")),
        *(("mag", "magnitude"), ("sharpness", "dimensionless"), ("npix", "Number of pixels")),
        *(("mag", "Empty where the flux is not positive"), ("flags", "Empty where the catalog")),
        *(("label", "1: real"), ("match", "-1 where there is none")),
    ],
)
def test_descriptions_say_unit_and_missing_value(described, column, words):
    (record_set,) = described_json(described)["recordSet"]
    (field,) = [field for field in record_set["field"] if field["name"] == column]
    assert words in field["description"]


def test_it_conforms_to_croissant_1_1(described):
    description = described_json(described)
    assert description["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    assert description["@context"]["isArray"] == "cr:isArray"


def test_index_and_tensors_are_described(described):
    index, tensors = described_json(described)["distribution"]
    digest = hashlib.sha256((described / "master_index.csv").read_bytes()).hexdigest()
    assert (index["@type"], index["contentUrl"], index["sha256"]) == (
        *("cr:FileObject", "master_index.csv", digest),
    )
    assert (tensors["@type"], tensors["includes"]) == ("cr:FileSet", "images/*.npy")
    formats = index["encodingFormat"], tensors["encodingFormat"]
    assert formats == ("text/csv", "application/x-numpy")


def test_tensor_shape_comes_from_the_headers(described):
    (record_set,) = described_json(described)["recordSet"]
    annotation = record_set["field"][-1]["annotation"]
    assert (annotation["arrayShape"], annotation["dataType"]) == ("72,80,4", "cr:Float32")


def test_tensor_shape_is_open_where_the_jobs_differ(dataset):
    np.save(dataset / "images" / "jid001.npy", np.zeros((72, 99, 4), np.float32))
    assert run(dataset) == 0
    (record_set,) = described_json(dataset)["recordSet"]
    assert record_set["field"][-1]["annotation"]["arrayShape"] == "72,-1,4"


def test_description_counts(dataset, capsys):
    assert run(dataset) == 0
    text = described_json(dataset)["description"]
    assert "4 image-differencing jobs" in text
    assert "48 candidates, of which 12 (25.0%) are real" in text
    assert "4 image tensors of 72 x 80 pixels" in text
    assert "4 tensors, 48 candidates, 12 real" in capsys.readouterr().out


def test_what_only_the_user_knows_is_listed_and_not_invented(dataset, capsys):
    assert run(dataset) == 0
    description = described_json(dataset)
    assert not {"license", "url", "creator", "version", "citeAs"} & set(description)
    assert "license, url, creator, version, citeAs" in capsys.readouterr().out


def test_mlcroissants_own_validator_accepts_it(described):
    validator = Path(sys.executable).with_name("mlcroissant")
    arguments = [validator, "validate", "--jsonld", described / "croissant.json"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "error(s)" not in done.stderr
    assert "not standard" not in done.stderr


def test_the_same_dataset_gives_the_same_bytes(described):
    before = (described / "croissant.json").read_bytes()
    assert run(described) == 0
    assert (described / "croissant.json").read_bytes() == before


def test_default_date_is_that_of_the_index(dataset):
    os.utime(dataset / "master_index.csv", (86400 * 365, 86400 * 365))
    assert run(dataset) == 0
    assert described_json(dataset)["datePublished"] == "1971-01-01"


def edit(dataset: Path, old: str, new: str) -> None:
    csv_path = dataset / "master_index.csv"
    text = csv_path.read_text()
    assert old in text
    csv_path.write_text(text.replace(old, new, 1))


def set_cell(dataset: Path, column: str, value: object) -> None:
    index = pd.read_csv(dataset / "master_index.csv").astype({column: object})
    index.loc[1, column] = value
    index.to_csv(dataset / "master_index.csv", index=False)


def tensor(dataset: Path) -> Path:
    return dataset / "images" / "jid002.npy"


BAD_DATASETS = {
    "no index": (lambda d: (d / "master_index.csv").unlink(), "no such file"),
    "empty index": (lambda d: (d / "master_index.csv").write_text(""), "not a readable CSV"),
    "no rows": (
        lambda d: (d / "master_index.csv").write_text(",".join(INDEX_COLUMNS) + "\n"),
        "no candidates in it",
    ),
    "column missing": (lambda d: edit(d, "flux", "flax"), "missing flux; not expected flax"),
    "column twice": (lambda d: edit(d, "peak,flux", "flux,flux"), "not expected flux.1"),
    "order": (lambda d: edit(d, "peak,flux", "flux,peak"), "out of order"),
    "text in a number": (lambda d: set_cell(d, "flux", "big"), "'flux' holds 'big' in row 2"),
    "no position": (lambda d: set_cell(d, "x", np.nan), "'x' holds 'nan' in row 2"),
    "no match": (lambda d: set_cell(d, "match", np.nan), "'match' holds 'nan' in row 2"),
    "label 2": (lambda d: set_cell(d, "label", 2), "'label' holds '2' in row 2; expected 0 or 1"),
    "empty label": (lambda d: set_cell(d, "label", np.nan), "expected 0 or 1"),
    "label against match": (lambda d: set_cell(d, "label", 1), "labels contradict match"),
    "path out of the folder": (
        lambda d: set_cell(d, "image_filename", "../jid001.npy"),
        "expected images/<jid>.npy",
    ),
    "job out of the folder": (
        lambda d: edit(d, "jid001", "../jid") or edit(d, "images/jid001", "images/../jid"),
        "expected images/<jid>.npy",
    ),
    "rows too long": (
        lambda d: edit(d, "images/jid001.npy", "images/jid001.npy,9"),
        "not a readable CSV file",
    ),
    "key twice": (lambda d: set_cell(d, "id", 1.0), "id 1 of job 'jid001' occurs more than once"),
    "tensor in Fortran order": (
        lambda d: np.save(tensor(d), np.asfortranarray(np.zeros((72, 80, 4), "f4"))),
        "jid002.npy: Fortran order",
    ),
    "tensor of no candidate": (
        lambda d: np.save(d / "images" / "jid009.npy", np.zeros(3)),
        "jid009.npy: float64 (3,)",
    ),
    "tensor missing": (lambda d: tensor(d).unlink(), "jid002.npy: no such tensor"),
    "tensor truncated": (
        lambda d: tensor(d).write_bytes(tensor(d).read_bytes()[:-1]),
        "jid002.npy: not a whole .npy file",
    ),
    "tensor no npy": (lambda d: tensor(d).write_text("x"), "jid002.npy: not a whole .npy file"),
    "tensor with a cut header": (
        lambda d: tensor(d).write_bytes(CUT_HEADER),
        "jid002.npy: not a whole .npy file",
    ),
    "tensor too long": (
        lambda d: tensor(d).write_bytes(tensor(d).read_bytes() + b"x"),
        "jid002.npy: longer than its header says",
    ),
    "tensor pickled": (
        lambda d: np.save(tensor(d), np.array([{}], object), allow_pickle=True),
        "jid002.npy: not a whole .npy file",
    ),
    "tensor float64": (
        lambda d: np.save(tensor(d), np.zeros((72, 80, 4))),
        r"float64 (72, 80, 4); expected float32 (H, W, 4)",
    ),
    "tensor flat": (lambda d: np.save(tensor(d), np.zeros((9, 9), "f4")), "float32 (9, 9)"),
    "tensor of 3 channels": (
        lambda d: np.save(tensor(d), np.zeros((72, 80, 3), "f4")),
        "float32 (72, 80, 3)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_DATASETS.values(), ids=BAD_DATASETS)
def test_a_bad_dataset_is_not_described(dataset, capsys, damage, message):
    damage(dataset)
    assert run(dataset) == 1
    assert message in capsys.readouterr().err
    assert not [path for path in dataset.iterdir() if "croissant" in path.name]


def test_an_old_description_stays_where_the_dataset_became_bad(described):
    before = (described / "croissant.json").read_bytes()
    tensor(described).unlink()
    assert run(described) == 1
    assert (described / "croissant.json").read_bytes() == before


def test_a_description_that_reads_something_else_is_not_kept(dataset, capsys, monkeypatch):
    fields = generate_croissant.candidate_fields

    def swap_columns(ctx, facts):
        made = fields(ctx, facts)
        made[2].source, made[3].source = made[3].source, made[2].source
        return made

    monkeypatch.setattr(generate_croissant, "candidate_fields", swap_columns)
    assert run(dataset) == 1
    assert "mlcroissant reads x as" in capsys.readouterr().err
    assert not (dataset / "croissant.json").exists()


def test_a_description_that_mlcroissant_refuses_is_not_kept(dataset, capsys, monkeypatch):
    monkeypatch.setattr(generate_croissant, "TENSORS_ID", generate_croissant.INDEX_ID)
    assert run(dataset) == 1
    assert "mlcroissant refuses the description" in capsys.readouterr().err
    assert not (dataset / "croissant.json").exists()


def test_tensors_that_no_row_names_are_counted(dataset, capsys):
    np.save(dataset / "images" / "jid009.npy", np.zeros((72, 80, 4), np.float32))
    assert run(dataset) == 0
    assert "1 tensors have no candidate in the index" in capsys.readouterr().err


def test_an_output_that_is_a_folder(dataset, capsys):
    (dataset / "croissant.json").mkdir()
    assert run(dataset) == 1
    assert "croissant.json: cannot be written: Is a directory" in capsys.readouterr().err


def test_an_output_elsewhere_than_beside_the_index_is_wrong_usage(dataset, tmp_path, capsys):
    arguments = ["-c", str(dataset / "master_index.csv"), "-o", str(tmp_path / "croissant.json")]
    with pytest.raises(SystemExit, match="2"):
        generate_croissant.main(arguments)
    assert "beside the index" in capsys.readouterr().err


def test_the_index_is_never_overwritten(dataset, capsys):
    before = (dataset / "master_index.csv").read_bytes()
    csv_path = str(dataset / "master_index.csv")
    with pytest.raises(SystemExit, match="2"):
        generate_croissant.main(["-c", csv_path, "-o", csv_path])
    assert "must be named *.json" in capsys.readouterr().err
    assert (dataset / "master_index.csv").read_bytes() == before


def test_a_job_without_candidates_has_a_tensor(raw, tmp_path):
    (raw / "jid004" / "psfcat.csv").write_text("id,x,y,match\n")
    create_dataset.main(["-i", str(raw), "-o", str(tmp_path / "out")])
    assert run(tmp_path / "out") == 0
    text = described_json(tmp_path / "out")["description"]
    assert "3 image-differencing jobs" in text
    assert "4 image tensors" in text


def test_ctrl_c_is_130_and_leaves_nothing(dataset, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_croissant, "check_reload", interrupt)
    assert run(dataset) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in dataset.iterdir()) == ["images", "master_index.csv"]
