"""test_croissant_dataset.py: what it says of damaged, odd and small datasets."""

import hashlib
import http.server
import os
import pickle
import shutil
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import (
    CUT_HEADER,
    describe,
    edit_and_hash,
    edit_index,
    edit_json,
    finish,
    read_index,
    start,
    train,
    write_dataset,
)

import test_croissant_dataset as training
from test_croissant_dataset import FEATURE_COLUMNS, split_candidates

pytestmark = pytest.mark.usefixtures("quick_training")
SCRIPT = Path(training.__file__)


def write_json(dataset: Path, text: str) -> None:
    (dataset / "croissant.json").write_text(text)


def edit_file(dataset: Path, **values: object) -> None:
    """Change the resource that describes the index."""
    edit_json(dataset, lambda description: description["distribution"][0].update(values))


def edit_and_describe(dataset: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    edit_index(dataset, change)
    assert describe(dataset) == 0


def edit_cell(dataset: Path, column: str, value: object) -> None:
    """Change a cell of the index; the others of its column are objects, to keep their text."""
    cells = {column: lambda index: index[column].astype(object).where(index.index != 3, value)}
    edit_and_hash(dataset, lambda index: index.assign(**cells))


def put_index_into_archive(dataset: Path) -> None:
    """Have the index come from a zip, which mlcroissant would unpack into its cache."""
    with zipfile.ZipFile(dataset / "x.zip", "w") as archive:
        archive.write(dataset / "master_index.csv", "master_index.csv")
    digest = hashlib.sha256((dataset / "x.zip").read_bytes()).hexdigest()
    packed = {"@type": "cr:FileObject", "@id": "zip", "name": "zip", "contentUrl": "x.zip"}
    packed |= {"encodingFormat": "application/zip", "sha256": digest}
    edit_json(dataset, lambda description: description["distribution"].append(packed))
    edit_file(dataset, containedIn={"@id": "zip"})


def tensor_of(dataset: Path) -> Path:
    return dataset / "images" / "jid002.npy"


def edit_tensor(dataset: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(tensor_of(dataset), change(np.load(tensor_of(dataset))))


def write_tensor(dataset: Path, content: bytes) -> None:
    tensor_of(dataset).write_bytes(content)


def cut_tensor(dataset: Path) -> None:
    write_tensor(dataset, tensor_of(dataset).read_bytes()[:-4])


def lengthen_tensor(dataset: Path) -> None:
    write_tensor(dataset, tensor_of(dataset).read_bytes() + b"0000")


def pickle_tensor(dataset: Path) -> None:
    np.save(tensor_of(dataset), np.array([print], dtype=object), allow_pickle=True)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(117) + b"\n" + bytes(99)


VALID, FILES = "croissant.json is valid Croissant", "the index is in the folder"
RECORDS, LABELS = "mlcroissant reads every record", "labels are 0 or 1"
CLASSES, TENSORS = "both classes occur", "tensors are in the folder"
POSITIONS, CUTOUTS = "positions are on their image", "cutouts are finite"

# What is done to a dataset, what does not hold then, and what the message says.
DAMAGES = {
    "no description": (lambda d: (d / "croissant.json").unlink(), VALID, "json: no such file"),
    "broken JSON": (partial(write_json, text="{"), VALID, "not a valid Croissant description"),
    "no JSON": (partial(write_json, text="\x00\xff"), VALID, "not a valid Croissant description"),
    "a list": (partial(write_json, text="[1]"), VALID, "not a valid Croissant description"),
    "not Croissant": (partial(write_json, text='{"a": 1}'), VALID, "not a valid Croissant"),
    "deep JSON": (partial(write_json, text="[" * 9**5), VALID, "not a valid Croissant"),
    "no id": (
        lambda d: edit_json(d, lambda j: j["distribution"][0].pop("@id")),
        *(VALID, "not a valid Croissant description"),
    ),
    "checksum no text": (partial(edit_file, sha256=None), VALID, "not a valid Croissant"),
    "path no text": (partial(edit_file, contentUrl=None), VALID, "not a valid Croissant"),
    "no version": (
        lambda d: edit_json(d, lambda j: j.update(conformsTo={})),
        *(VALID, "not a valid Croissant description"),
    ),
    "no record set": (
        lambda d: edit_json(d, lambda j: j.pop("recordSet")),
        *(VALID, "it does not describe transient_candidates/jid, transient_candidates/image"),
    ),
    "no such record set": (
        lambda d: edit_json(d, lambda j: j["recordSet"].pop(0)),
        *(VALID, "it does not describe transient_candidates/jid, transient_candidates/image"),
    ),
    "record set of another name": (
        lambda d: edit_json(d, lambda j: j["recordSet"][0].update({"@id": "other"})),
        *(VALID, "it does not describe transient_candidates/jid, transient_candidates/image"),
    ),
    "a column is not described": (
        lambda d: edit_json(d, lambda j: j["recordSet"][0]["field"].pop(9)),
        *(VALID, "it does not describe transient_candidates/flux\n"),
    ),
    "index changed": (
        lambda d: (d / "master_index.csv").open("a").write("\n"),
        *(FILES, "master_index.csv: changed after"),
    ),
    "index gone": (
        lambda d: (d / "master_index.csv").unlink(),
        *(FILES, "master_index.csv: no such file"),
    ),
    "index elsewhere": (
        partial(edit_file, contentUrl="../dataset/master_index.csv"),
        *(FILES, "../dataset/master_index.csv: leads out of"),
    ),
    "index elsewhere, its type in another spelling": (
        partial(edit_file, **{"@type": ["cr:FileObject"], "contentUrl": "../d/master_index.csv"}),
        *(FILES, "leads out of"),
    ),
    "index absolute": (partial(edit_file, contentUrl="/etc/passwd"), FILES, "leads out of"),
    "index on Windows": (partial(edit_file, contentUrl="..\\i.csv"), FILES, "leads out of"),
    "index a file URL": (partial(edit_file, contentUrl="file:///etc/passwd"), FILES, "leads out"),
    "no job": (
        partial(edit_cell, column="jid", value=None),
        *(
            RECORDS,
            "cannot read its records; run generate_croissant.py again: ValueError: a cell of",
        ),
    ),
    "text for a number": (
        partial(edit_cell, column="flux", value="x"),
        *(RECORDS, "could not convert string to float: 'x'"),
    ),
    "label 2": (
        partial(edit_cell, column="label", value=2),
        *(LABELS, "candidate 4 of jid001: label 2, match 4; run create_dataset.py again"),
    ),
    "label contradicts match": (
        partial(edit_cell, column="match", value=-1),
        *(LABELS, "candidate 4 of jid001: label 1, match -1; run create_dataset.py again"),
    ),
    "no match": (partial(edit_cell, column="match", value=None), LABELS, "label 1, match nan"),
    "a candidate twice": (
        partial(edit_cell, column="id", value=1),
        *("candidates occur once", "candidate 1 of jid001: twice; run create_dataset.py again"),
    ),
    "tensor of another job": (
        partial(edit_cell, column="image_filename", value="images/jid002.npy"),
        *(
            "candidates have their job's tensor",
            "candidate 4 of jid001: image is images/jid002.npy",
        ),
    ),
    "index in an archive": (
        put_index_into_archive,
        *(FILES, "transient_candidates is not read from a file in its folder"),
    ),
    "tensor a pipe": (
        lambda d: (tensor_of(d).unlink(), os.mkfifo(tensor_of(d))),
        *(TENSORS, "jid002.npy: not a readable tensor: there is no such file"),
    ),
    "only bogus": (
        lambda d: edit_and_describe(d, lambda index: index.assign(label=0, match=-1.0)),
        *(CLASSES, "0 of 96 candidates are real; training, validation and test need"),
    ),
    "only real": (
        lambda d: edit_and_describe(d, lambda index: index.assign(label=1, match=5.0)),
        *(CLASSES, "96 of 96 candidates are real; training, validation and test need"),
    ),
    "no candidate": (
        lambda d: edit_and_hash(d, lambda index: index[:0]),
        *(CLASSES, "0 of 0 candidates are real; training, validation and test need"),
    ),
    "one candidate": (
        lambda d: edit_and_describe(d, lambda index: index[:1]),
        *(CLASSES, "0 of 1 candidates are real; training, validation and test need"),
    ),
    "no position": (
        partial(edit_cell, column="x", value=np.nan),
        *(POSITIONS, "candidate 4 of jid001: position (nan, "),
    ),
    "position off the image": (
        partial(edit_cell, column="y", value=71.5),
        *(POSITIONS, "71.5) is not on its image; run create_dataset.py again"),
    ),
    "tensor elsewhere": (
        partial(edit_cell, column="image_filename", value="../jid001.npy"),
        *(TENSORS, "../jid001.npy: leads out of"),
    ),
    "tensor a URL": (
        partial(edit_cell, column="image_filename", value="https://example.org/jid001.npy"),
        *(TENSORS, "https://example.org/jid001.npy: leads out of"),
    ),
    "tensor gone": (lambda d: tensor_of(d).unlink(), TENSORS, "jid002.npy: not a readable tensor"),
    "tensor cut short": (cut_tensor, TENSORS, "jid002.npy: not a readable tensor"),
    "tensor too long": (lengthen_tensor, TENSORS, "jid002.npy: longer than its header says"),
    "tensor empty": (partial(write_tensor, content=b""), TENSORS, "jid002.npy: not a readable"),
    "tensor no npy": (partial(write_tensor, content=b"x"), TENSORS, "jid002.npy: not a readable"),
    "tensor a pickle": (
        partial(write_tensor, content=pickle.dumps(np.zeros((72, 80, 4), np.float32))),
        *(TENSORS, "jid002.npy: not a readable tensor"),
    ),
    "tensor of objects": (pickle_tensor, TENSORS, "jid002.npy: not a readable tensor"),
    "tensor with a cut header": (
        partial(write_tensor, content=CUT_HEADER),
        *(TENSORS, "jid002.npy: not a readable tensor"),
    ),
    "tensor with a header of bool shape": (
        partial(
            write_tensor,
            content=header("{'descr': '<f4', 'fortran_order': False, 'shape': (True, True, 4)}"),
        ),
        *(TENSORS, "jid002.npy: not a readable tensor"),
    ),
    "tensor with a header of unhashable": (
        partial(write_tensor, content=header("{[]:1}")),
        *(TENSORS, "jid002.npy: not a readable tensor"),
    ),
    "tensor with a header of mixed keys": (
        partial(write_tensor, content=header("{'a': 1, 2: 3}")),
        *(TENSORS, "jid002.npy: not a readable tensor"),
    ),
    "tensor with a header of huge": (
        partial(
            write_tensor,
            content=header(
                "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 9, 4)}"
            ),
        ),
        *(TENSORS, "jid002.npy: not a readable tensor"),
    ),
    "tensor float64": (
        partial(edit_tensor, change=lambda tensor: tensor.astype(float)),
        *(TENSORS, "jid002.npy: float64 (72, 80, 4); expected float32"),
    ),
    "tensor of big endian": (
        partial(edit_tensor, change=lambda tensor: tensor.astype(">f4")),
        *(TENSORS, "jid002.npy: >f4 (72, 80, 4); expected float32"),
    ),
    "tensor in another order": (
        partial(edit_tensor, change=np.asfortranarray),
        *(TENSORS, "jid002.npy: float32 (72, 80, 4); expected float32 (H, W, 4) in C order"),
    ),
    "tensor of three channels": (
        partial(edit_tensor, change=lambda tensor: tensor[..., :3]),
        *(TENSORS, "jid002.npy: float32 (72, 80, 3); expected float32"),
    ),
    "tensor with NaN": (
        partial(edit_tensor, change=lambda tensor: tensor * np.float32(np.nan)),
        *(CUTOUTS, "images/jid002.npy: a pixel is not in [0, 1]; remove it and run"),
    ),
    "tensor above 1": (
        partial(edit_tensor, change=lambda tensor: tensor + np.float32(1)),
        *(CUTOUTS, "images/jid002.npy: a pixel is not in [0, 1]"),
    ),
    "tensor below 0": (
        partial(edit_tensor, change=lambda tensor: tensor - np.float32(1)),
        *(CUTOUTS, "images/jid002.npy: a pixel is not in [0, 1]"),
    ),
}


@pytest.mark.parametrize(("damage", "claim", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_exit_code_1(sample_copy, capsys, damage, claim, message):
    damage(sample_copy)
    capsys.readouterr()
    assert train(sample_copy) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    failed = [line for line in captured.out.splitlines() if line.startswith("  no ")]
    assert [line.removeprefix("  no    ")[: len(claim)] for line in failed] == [claim]
    assert "epoch" not in captured.err


def test_all_that_does_not_hold_of_the_candidates_is_named_at_once(sample_copy, capsys):
    def damage(index: pd.DataFrame) -> pd.DataFrame:
        index.loc[3, "label"], index.loc[30, "x"] = 0, 99
        return index.assign(id=index["id"].replace(50, 49))

    edit_and_hash(sample_copy, damage)
    capsys.readouterr()
    assert train(sample_copy) == 1
    captured = capsys.readouterr()
    reasons = [line.partition(": ")[2].partition("; ")[0] for line in captured.err.splitlines()]
    y = read_index(sample_copy)["y"][30]
    assert reasons == [
        "candidate 4 of jid001: label 0, match 4",
        "candidate 49 of jid003: twice",
        f"candidate 31 of jid002: position (99, {y:g}) is not on its image",
    ]
    assert captured.out.count("  no  ") == 3
    assert captured.out.count("  yes  ") == 5


def test_all_damaged_tensors_are_named_at_once(sample_copy, capsys):
    for number in (2, 4):
        (sample_copy / "images" / f"jid00{number}.npy").unlink()
    assert train(sample_copy) == 1
    captured = capsys.readouterr()
    assert [line.split("/")[-1] for line in captured.err.splitlines()] == [
        "jid002.npy: not a readable tensor: there is no such file",
        "jid004.npy: not a readable tensor: there is no such file",
    ]
    assert captured.out.splitlines()[-1] == f"  no    {TENSORS}, whole, and float32 (H, W, 4)"


def test_many_problems_are_counted(sample_copy, capsys):
    edit_and_hash(sample_copy, lambda index: index.assign(label=1 - index["label"]))
    capsys.readouterr()
    assert train(sample_copy) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "ERROR: and 76 more"


def test_pixels_that_were_not_looked_at_first_are_found_in_training(
    sample_copy, capsys, monkeypatch
):
    monkeypatch.setattr(training, "CHECKED_CUTOUTS", 2)
    edit_tensor(sample_copy, lambda tensor: tensor * np.float32(np.nan))
    assert train(sample_copy) == 1
    captured = capsys.readouterr()
    assert "yes   cutouts are finite and in [0, 1] (2 of 96 read)" in captured.out
    assert captured.err.splitlines()[-1] == (
        "ERROR: images/jid002.npy: a pixel is not in [0, 1]; remove it and run create_dataset.py"
        " again"
    )


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert train(tmp_path / "nothing") == 1
    error = capsys.readouterr().err
    assert error.endswith("nothing: no such folder; give that of the dataset with -d\n")
    assert train(tmp_path) == 1
    error = capsys.readouterr().err
    assert "croissant.json: no such file; generate_croissant.py writes it" in error


def test_more_tensors_than_the_system_lets_be_open(sample):
    limit = "sh", "-c", 'ulimit -n 100; exec "$@"', "sh"
    done = finish(start(SCRIPT, "-d", sample, prefix=limit))
    assert done.code == 1
    assert done.err == (
        "ERROR: 4 tensors are needed at once, but only 100 files may be open; have the limit raised"
        " (ulimit -Hn), or split the dataset\n"
    )
    assert f"  no    {TENSORS}" in done.out


class Listener(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def listener():
    Listener.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/x"
        server.shutdown()


@pytest.mark.parametrize(
    "change",
    [
        lambda json, url: json["distribution"][0].update(contentUrl=url),
        lambda json, url: json.update({"@context": url}),
        lambda json, url: json["@context"].update({"@import": url}),
        lambda json, url: json["recordSet"][0].update({"@context": [url]}),
    ],
    ids=["index", "context", "import", "context of a record set"],
)
def test_nothing_is_downloaded(sample_copy, capsys, listener, change):
    edit_json(sample_copy, lambda description: change(description, listener))
    assert train(sample_copy) == 1
    assert Listener.asked == []
    error = capsys.readouterr().err
    assert "leads out of" in error or "is not written out" in error


def test_another_file_is_neither_needed_nor_downloaded(sample_copy, listener):
    other = {"@id": "other", "name": "other", "contentUrl": listener}
    edit_json(sample_copy, lambda j: j["distribution"].append(j["distribution"][0] | other))
    assert train(sample_copy) == 0
    assert Listener.asked == []


@pytest.mark.parametrize("size", [8, 70])
def test_candidates_in_corners_of_images_also_smaller_than_a_cutout(tmp_path, capsys, size):
    ends = np.array([-0.5, size - 0.51])
    dataset = write_dataset(
        tmp_path / "dataset",
        {f"jid{number}": [0, 1] * 12 for number in range(3)},
        shape=(size, size),
        x=np.tile(ends, 36),
        y=np.tile(ends.repeat(2), 18),
    )
    assert train(dataset) == 0
    printed = capsys.readouterr().out
    assert "  yes   positions are on their image" in printed
    assert "  test                       1           24      12 (50.0%)" in printed


def test_one_job_is_split_by_candidate(tmp_path, capsys):
    dataset = write_dataset(tmp_path / "dataset", {"jid1": [0, 1] * 60})
    capsys.readouterr()
    assert train(dataset) == 0
    captured = capsys.readouterr()
    assert "WARNING: too few jobs hold real and bogus candidates to split by job" in captured.err
    assert "split by candidate" in captured.out
    assert "test                       1           24      12 (50.0%)" in captured.out


def test_too_few_real_candidates(sample_copy, capsys):
    edit_and_describe(sample_copy, lambda index: index[(index["label"] == 0) | (index.index < 4)])
    capsys.readouterr()
    assert train(sample_copy) == 1
    assert "2 of 50 candidates are real; training, validation and" in capsys.readouterr().err


@pytest.mark.parametrize("real", [1, 2, 4])
def test_a_few_real_candidates_to_choose_the_threshold_by(tmp_path, capsys, monkeypatch, real):
    """A resample without real validation candidates divided 0 by 0, of which numpy warned."""
    monkeypatch.setattr(training, "RESAMPLES", 1000)
    jobs = {f"jid{number}": [1] * real + [0] * 20 for number in range(3)}
    dataset = write_dataset(tmp_path / "dataset", jobs)
    assert train(dataset) == 0
    assert "RuntimeWarning" not in capsys.readouterr().err


# Copied jobs


def copy_job(dataset: Path, jid: str, other: str) -> None:
    """Copy a job under another name."""
    shutil.copy(dataset / "images" / f"{jid}.npy", dataset / "images" / f"{other}.npy")

    def append(index: pd.DataFrame) -> pd.DataFrame:
        copy = index[index["jid"] == jid]
        copy = copy.assign(jid=other, image_filename=f"images/{other}.npy")
        return pd.concat([index, copy])

    edit_and_describe(dataset, append)


def find_seed(dataset: Path, jids: tuple[str, str], *, together: bool) -> str:
    """Return a seed by which two jobs are in the same split, or in different ones."""
    index = read_index(dataset).reset_index()
    for seed in range(100):
        split = split_candidates(index, seed)
        places = {split[index["jid"] == jid][0] for jid in jids}
        if (len(places) == 1) == together:
            return str(seed)
    raise AssertionError("no such seed")


COPIES = "no candidate is in two splits, under two names"


def test_a_copied_job_in_another_split_ends_the_checks(sample_copy, capsys):
    copy_job(sample_copy, "jid002", "jid900")
    seed = find_seed(sample_copy, ("jid002", "jid900"), together=False)
    capsys.readouterr()
    assert train(sample_copy, "--seed", seed) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"  no    {COPIES}"
    (line,) = captured.err.splitlines()
    assert "jid002 (" in line
    assert "jid900 (" in line
    assert line.endswith(": 24 candidates have the same cutout and features; remove the copies")


def test_a_copied_job_in_the_same_split_is_no_failure(sample_copy, capsys):
    copy_job(sample_copy, "jid002", "jid900")
    seed = find_seed(sample_copy, ("jid002", "jid900"), together=True)
    assert train(sample_copy, "--seed", seed) == 0
    assert f"  yes   {COPIES}" in capsys.readouterr().out


def change_a_feature(dataset: Path) -> None:
    edit_and_describe(
        dataset, lambda index: index.assign(flags=index["flags"] + (index["jid"] == "jid900"))
    )


def change_the_pixels(dataset: Path) -> None:
    path = dataset / "images" / "jid900.npy"
    np.save(path, np.load(path) / 2)


@pytest.mark.parametrize("change", [change_a_feature, change_the_pixels])
def test_what_differs_in_cutout_or_features_is_no_copy(sample_copy, capsys, change):
    copy_job(sample_copy, "jid002", "jid900")
    change(sample_copy)
    seed = find_seed(sample_copy, ("jid002", "jid900"), together=False)
    assert train(sample_copy, "--seed", seed) == 0
    assert f"  yes   {COPIES}" in capsys.readouterr().out


# Notes


def notes_of(dataset: Path, capsys) -> list[str]:
    capsys.readouterr()
    assert train(dataset) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("  note  ") for line in lines if line.startswith("  note  ")]


def test_there_is_nothing_to_note_of_noise(sample, capsys):
    assert notes_of(sample, capsys) == []


PERFECT = "column {} alone ranks the test candidates perfectly"


@pytest.mark.parametrize(
    ("column", "change", "note"),
    [
        ("npix", lambda index: index["label"] + index["npix"].clip(0, 0.5), PERFECT),
        ("peak", lambda index: index["peak"].clip(0, 0.5) - index["label"], PERFECT),
        ("mag", lambda index: index["mag"].fillna(9).where(index["label"] == 1), PERFECT),
        ("daofind_mag", lambda index: index["id"] * np.nan, "column {} has no finite value"),
    ],
    ids=["real highest", "real lowest", "only real has a value", "no value"],
)
def test_odd_columns_are_noted(sample_copy, capsys, column, change, note):
    edit_and_describe(sample_copy, lambda index: index.assign(**{column: change(index)}))
    assert column in FEATURE_COLUMNS
    assert notes_of(sample_copy, capsys) == [note.format(column)]


def test_a_column_that_ranks_all_but_one_perfectly_is_not_noted(sample_copy, capsys):
    def change(index: pd.DataFrame) -> pd.DataFrame:
        last = index.groupby("jid").cumcount() == 23  # of each job, a real one
        return index.assign(npix=index["label"].where(~last, -1))

    edit_and_describe(sample_copy, change)
    assert notes_of(sample_copy, capsys) == []


def test_a_job_with_more_than_half_of_the_candidates_is_noted(tmp_path, capsys):
    jobs = {f"jid{number}": [0, 1] * 15 for number in range(3)} | {"jid9": [0, 1] * 60}
    dataset = write_dataset(tmp_path / "dataset", jobs)
    assert notes_of(dataset, capsys) == ["job jid9 has 57% of the candidates"]
