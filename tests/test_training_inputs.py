"""test_croissant_dataset.py: what it says of damaged, odd and small datasets."""

import gc
import hashlib
import http.server
import json
import os
import pickle
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CUT_HEADER, describe, edit_index, make_catalog, make_images, run, write_job

import create_dataset
import test_croissant_dataset as training


def train(dataset: Path, *options: str) -> int:
    return run(training, "-d", dataset, "--epochs", "1", *options)


def edit_json(dataset: Path, change: Callable[[dict], object]) -> None:
    path = dataset / "croissant.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def write_json(dataset: Path, text: str) -> None:
    (dataset / "croissant.json").write_text(text)


def edit_file(dataset: Path, **values: object) -> None:
    """Change the resource that describes the index."""
    edit_json(dataset, lambda description: description["distribution"][0].update(values))


def edit_and_describe(dataset: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    edit_index(dataset, change)
    assert describe(dataset) == 0


def edit_and_hash(dataset: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change the index and its checksum, past what generate_croissant.py would refuse."""
    edit_index(dataset, change)
    content = (dataset / "master_index.csv").read_bytes()
    edit_file(dataset, sha256=hashlib.sha256(content).hexdigest())


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
        *(RECORDS, "cannot read its records (ValueError: did not find any record set"),
    ),
    "no such record set": (
        lambda d: edit_json(d, lambda j: j["recordSet"].pop(0)),
        *(RECORDS, "cannot read its records (ValueError: did not find any record set"),
    ),
    "a column is not described": (
        lambda d: edit_json(d, lambda j: j["recordSet"][0]["field"].pop(9)),
        *(RECORDS, "cannot read its records (KeyError: 'transient_candidates/flux')"),
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
    "no job": (partial(edit_cell, column="jid", value=None), RECORDS, "cannot read its records"),
    "text for a number": (partial(edit_cell, column="flux", value="x"), RECORDS, "cannot read"),
    "label 2": (
        partial(edit_cell, column="label", value=2),
        *(LABELS, "candidate 4 of jid001: label 2, match 3; run create_dataset.py again"),
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
        *("candidates occur once", "candidate 4 of jid001: image is images/jid002.npy"),
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
        *(CLASSES, "0 of 48 candidates are real; both classes are needed"),
    ),
    "only real": (
        lambda d: edit_and_describe(d, lambda index: index.assign(label=1, match=5.0)),
        *(CLASSES, "48 of 48 candidates are real; both classes are needed"),
    ),
    "no candidate": (
        lambda d: edit_and_hash(d, lambda index: index[:0]),
        *(CLASSES, "0 of 0 candidates are real; both classes are needed"),
    ),
    "one candidate": (
        lambda d: edit_and_describe(d, lambda index: index[:1]),
        *(CLASSES, "0 of 1 candidates are real; both classes are needed"),
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
def test_damage_is_named_and_exit_code_1(described, capsys, damage, claim, message):
    damage(described)
    capsys.readouterr()
    assert train(described) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    failed = [line for line in captured.out.splitlines() if line.startswith("  no ")]
    assert failed[-1].startswith(f"  no    {claim}")
    assert len(failed) == 1 or "../" in message or "://" in message  # no tensor of its job either


def test_all_that_does_not_hold_is_named_at_once(described, capsys):
    edit_cell(described, "label", 0)
    tensor_of(described).unlink()
    (described / "images" / "jid004.npy").unlink()
    assert train(described) == 1
    captured = capsys.readouterr()
    assert [line.split("/")[-1] for line in captured.err.splitlines()] == [
        "ERROR: candidate 4 of jid001: label 0, match 3; run create_dataset.py again",
        "jid002.npy: not a readable tensor: there is no such file",
        "jid004.npy: not a readable tensor: there is no such file",
    ]
    assert captured.out.count("  no  ") == 2
    assert captured.out.count("  yes  ") == 5


def test_many_problems_are_counted(described, capsys):
    edit_and_hash(described, lambda index: index.assign(label=1 - index["label"]))
    capsys.readouterr()
    assert train(described) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == training.MAX_PROBLEMS + 1
    assert lines[-1] == "ERROR: and 28 more"


def test_pixels_that_were_not_looked_at_first_are_found_in_training(described, capsys, monkeypatch):
    monkeypatch.setattr(training, "CHECKED_CUTOUTS", 2)
    edit_tensor(described, lambda tensor: tensor * np.float32(np.nan))
    for workers in ("0", "2"):
        assert train(described, "--workers", workers) == 1
        captured = capsys.readouterr()
        assert "(2 of 48 read)" in captured.out
        assert captured.err.splitlines()[-1].endswith("remove it and run create_dataset.py")
        assert "Traceback" not in captured.err
        gc.collect()  # ends the workers, which create_dataset.py of the next test would kill


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "No such file or directory"),
        (lambda path: path.write_bytes(b""), "jid002.npy: became shorter while it was in use"),
    ],
)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_tensor_that_changes_in_training(
    described, capsys, monkeypatch, change, message, workers
):
    def examine(args, examine=training.examine):
        dataset = examine(args)
        change(tensor_of(described))
        return dataset

    monkeypatch.setattr(training, "examine", examine)
    assert train(described, "--workers", workers) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    gc.collect()


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert train(tmp_path / "nothing") == 1
    assert (
        "croissant.json: no such file; generate_croissant.py writes it" in capsys.readouterr().err
    )


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
        lambda json, url: json["distribution"].append(
            json["distribution"][0] | {"@id": "other", "name": "other", "contentUrl": url}
        ),
    ],
    ids=["index", "context", "import", "context of a record set", "another file"],
)
def test_nothing_is_downloaded(described, capsys, listener, change):
    edit_json(described, lambda description: change(description, listener))
    assert train(described) == 1
    assert Listener.asked == []
    error = capsys.readouterr().err
    assert "leads out of" in error or "is not written out" in error


def make_dataset(folder: Path, jobs: int, size: int, positions: list[tuple[float, float]]) -> Path:
    """Make a dataset whose candidates are at some positions, every other one real."""
    for number in range(jobs):
        catalog = make_catalog(len(positions)).assign(match=np.arange(len(positions)) % 2 - 1)
        catalog[["x", "y"]] = positions
        images = make_images(number, (size, size))
        write_job(folder / "raw", f"jid{number}", catalog, images)
    dataset = folder / "dataset"
    assert run(create_dataset, "-i", folder / "raw", "-o", dataset) == 0
    assert describe(dataset) == 0
    return dataset


@pytest.mark.parametrize("size", [8, 70])
def test_candidates_in_corners_of_images_also_smaller_than_a_cutout(tmp_path, capsys, size):
    end = size - 0.51
    corners = [(-0.5, -0.5), (end, -0.5), (-0.5, end), (end, end)] * 2
    dataset = make_dataset(tmp_path, jobs=3, size=size, positions=corners)
    assert train(dataset) == 0
    assert "verdict: cannot tell: 4 real and 4 bogus test candidates" in capsys.readouterr().out


def test_one_job_is_split_by_candidate(tmp_path, capsys):
    dataset = make_dataset(tmp_path, jobs=1, size=70, positions=[(9, 9)] * 30)
    capsys.readouterr()
    assert train(dataset) == 0
    captured = capsys.readouterr()
    assert "WARNING: too few jobs hold real and bogus candidates to split by job" in captured.err
    assert "split by candidate" in captured.out
    assert "test                       1            6       3 (50.0%)" in captured.out


def test_too_few_real_candidates(described, capsys):
    edit_and_describe(described, lambda index: index[(index["label"] == 0) | (index.index < 8)])
    capsys.readouterr()
    assert train(described) == 1
    assert "2 of 38 candidates are real; training, validation and" in capsys.readouterr().err
