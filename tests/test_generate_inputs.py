"""generate_croissant.py: what it refuses, and how it ends where it cannot write."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import CUT_HEADER, describe, edit_index, finish, start

import generate_croissant
from generate_croissant import INDEX_COLUMNS

SCRIPT = Path(generate_croissant.__file__)


def end_rows(dataset: Path, end: str, count: int) -> None:
    """Write something behind so many rows, -1 for all: more fields than a table can hold."""
    csv_path = dataset / "master_index.csv"
    csv_path.write_text(csv_path.read_text().replace(".npy\n", f".npy{end}\n", count))


def set_cell(dataset: Path, column: str, value: object, row: int = 1) -> None:
    """Change a cell of the index; the others of its column are objects, to keep their text."""
    cells = {column: lambda index: index[column].astype(object).where(index.index != row, value)}
    edit_index(dataset, lambda index: index.assign(**cells))


def rename_job(dataset: Path, jid: str) -> None:
    """Give the first candidate another job."""
    set_cell(dataset, "jid", jid, row=0)
    set_cell(dataset, "image_filename", f"images/{jid}.npy", row=0)


def tensor(dataset: Path) -> Path:
    return dataset / "images" / "jid002.npy"


NO_JOB = "1 rows with a jid that is not the name of a job folder"
OFF_IMAGE = "1 rows with a position off its image; the first is row 2: id 2.0, jid jid001, x "
WRONG_PATH = "an image_filename other than images/<jid>.npy"
BAD_DATASETS = {
    "no index": (
        lambda d: (d / "master_index.csv").unlink(),
        "not a readable index ([Errno 2] No such file",
    ),
    "a folder as index": (
        lambda d: (d / "master_index.csv").unlink() or (d / "master_index.csv").mkdir(),
        "master_index.csv: not a readable index ([Errno 21] Is a directory",
    ),
    "empty index": (lambda d: (d / "master_index.csv").write_text(""), "not a readable index"),
    "binary index": (
        lambda d: (d / "master_index.csv").write_bytes(b"\x00\xff\xfe"),
        "not a readable index",
    ),
    "no rows": (
        lambda d: (d / "master_index.csv").write_text(",".join(INDEX_COLUMNS) + "\n"),
        "no candidates in it",
    ),
    "column missing": (
        lambda d: edit_index(d, lambda index: index.rename(columns={"flux": "flax"})),
        "master_index.csv: wrong columns (flax, flux); expected id, jid, x",
    ),
    "column extra": (
        lambda d: edit_index(d, lambda index: index.assign(snr=5)),
        "wrong columns (snr); expected id",
    ),
    "column twice": (
        lambda d: edit_index(d, lambda index: index.rename(columns={"peak": "flux"})),
        "wrong columns (flux.1, peak)",
    ),
    "order": (
        lambda d: edit_index(d, lambda i: i.rename(columns={"peak": "flux", "flux": "peak"})),
        "wrong columns (their order, or too many cells); expected id, jid",
    ),
    "text in a number": (
        lambda d: set_cell(d, "flux", "big"),
        "not a readable index (could not convert string to float: 'big'",
    ),
    "a column of texts": (
        lambda d: edit_index(d, lambda index: index.assign(peak="high")),
        "could not convert string to float: 'high'",
    ),
    "a column of truth values": (
        lambda d: edit_index(d, lambda index: index.assign(label=True)),
        "36 rows with a label that contradicts match",
    ),
    "no position": (lambda d: set_cell(d, "x", np.nan), OFF_IMAGE + "nan"),
    "infinite position": (lambda d: set_cell(d, "y", np.inf), OFF_IMAGE),
    "no match": (
        lambda d: set_cell(d, "match", np.nan),
        "1 rows with a match that is not finite",
    ),
    "no jobs": (
        lambda d: edit_index(d, lambda index: index.assign(jid=None)),
        "48 rows with a jid that is not the name of a job folder; the first is row 1: id 1.0",
    ),
    "no job": (
        lambda d: set_cell(d, "jid", np.nan),
        NO_JOB + "; the first is row 2: id 2.0, jid nan",
    ),
    "no path": (lambda d: set_cell(d, "image_filename", np.nan), WRONG_PATH),
    "label 2": (
        lambda d: set_cell(d, "label", 2),
        "1 rows with a label other than 0 and 1; the first is row 2: id 2.0, jid jid001, label 2",
    ),
    "empty label": (lambda d: set_cell(d, "label", np.nan), "1 rows with a label other than 0 and"),
    "label against match": (
        lambda d: set_cell(d, "label", 1),
        "1 rows with a label that contradicts match; the first is row 2: id 2.0, jid jid001,"
        " match -1.0, label 1.0",
    ),
    "path out of the folder": (
        lambda d: set_cell(d, "image_filename", "../jid001.npy"),
        f"1 rows with {WRONG_PATH}; the first is row 2: id 2.0, jid jid001, image_filename ../",
    ),
    "path of another job": (
        lambda d: set_cell(d, "image_filename", "images/jid002.npy"),
        WRONG_PATH,
    ),
    "job out of the folder": (
        lambda d: (
            (d / "images" / "jid").mkdir()
            or np.save(d / "x.npy", np.zeros((72, 80, 4), "f4"))
            or rename_job(d, "jid/../../x")
        ),
        NO_JOB,
    ),
    "job that is no text": (
        lambda d: (
            np.save(d / "images" / "001.npy", np.zeros((72, 80, 4), "f4")) or rename_job(d, "001")
        ),
        f"{NO_JOB}; the first is row 1: id 1.0, jid 001",
    ),
    "all rows with one cell in front": (
        lambda d: (d / "master_index.csv").write_text(
            (d / "master_index.csv").read_text().replace("\n", "\n7,").removesuffix("7,")
        ),
        "wrong columns (their order, or too many cells); expected id, jid",
    ),
    "jobs that look like numbers": (
        lambda d: (
            np.save(d / "images" / "001.npy", np.zeros((72, 80, 4), "f4"))
            or edit_index(
                d, lambda i: i.assign(jid="001", image_filename="images/001.npy", id=i.index)
            )
        ),
        "48 rows with a jid that is not the name of a job folder",
    ),
    "all rows too long": (
        lambda d: end_rows(d, ",", count=-1),
        "not a readable index (could not convert string to float: 'jid001'",
    ),
    "candidate off its image": (lambda d: set_cell(d, "x", 79.5), OFF_IMAGE + "79.5, y "),
    "candidate above its image": (lambda d: set_cell(d, "y", 71.5), OFF_IMAGE),
    "candidate before its image": (lambda d: set_cell(d, "x", -0.51), OFF_IMAGE + "-0.51, y "),
    "tensor of another run": (
        lambda d: np.save(tensor(d), np.zeros((8, 9, 4), "f4")),
        "rows with a position off its image; the first is row ",
    ),
    "tensor without pixels": (
        lambda d: np.save(tensor(d), np.zeros((0, 80, 4), "f4")),
        "jid002.npy: float32 (0, 80, 4) in C order; expected",
    ),
    "rows too long": (lambda d: end_rows(d, ",9", count=1), "not a readable index"),
    "key twice": (
        lambda d: set_cell(d, "id", 1.0),
        "1 rows with the jid and id of another row; the first is row 2: id 1.0, jid jid001",
    ),
    "tensor in Fortran order": (
        lambda d: np.save(tensor(d), np.asfortranarray(np.zeros((72, 80, 4), "f4"))),
        "jid002.npy: float32 (72, 80, 4) in Fortran order; expected float32 (H, W, 4) in C order",
    ),
    "tensor of no candidate": (
        lambda d: np.save(d / "images" / "jid009.npy", np.zeros(3)),
        "jid009.npy: float64 (3,)",
    ),
    "tensor missing": (lambda d: tensor(d).unlink(), "jid002.npy: no such tensor"),
    "tensors gone": (lambda d: shutil.rmtree(d / "images"), "jid004.npy: no such tensor"),
    "a folder as tensor": (
        lambda d: tensor(d).unlink() or tensor(d).mkdir(),
        "jid002.npy: not a whole .npy file: [Errno 21] Is a directory",
    ),
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
        "jid002.npy: float64 (72, 80, 4) in C order; expected float32 (H, W, 4)",
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
    assert describe(dataset) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert not [path for path in dataset.iterdir() if "croissant" in path.name]


def test_every_bad_tensor_is_named(dataset, capsys):
    tensor(dataset).unlink()
    (dataset / "images" / "jid004.npy").write_bytes(b"")
    assert describe(dataset) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1][-10:] for line in lines] == ["jid002.npy", "jid004.npy"]


def test_a_long_list_of_bad_tensors_is_cut_short(dataset, capsys):
    for number in range(5, 50):
        (dataset / "images" / f"jid{number:03d}.npy").write_bytes(b"")
    assert describe(dataset) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 41
    assert lines[-1] == "ERROR: and 5 more"


def test_a_wrong_row_is_named_by_its_place_in_the_index(dataset, capsys):
    set_cell(dataset, "label", 7, row=17)
    assert describe(dataset) == 1
    assert "the first is row 18: id 6.0, jid jid002, label 7" in capsys.readouterr().err


def test_ids_may_be_missing_or_the_same_in_two_jobs(dataset):
    edit_index(dataset, lambda index: index.assign(id=[None, None, *range(46)]))
    assert describe(dataset) == 0


def test_an_old_description_stays_where_the_dataset_became_bad(described):
    before = (described / "croissant.json").read_bytes()
    tensor(described).unlink()
    assert describe(described) == 1
    assert (described / "croissant.json").read_bytes() == before


def test_a_description_that_mlcroissant_rejects_is_not_kept(dataset, capsys, monkeypatch):
    monkeypatch.setattr(generate_croissant, "TENSORS_ID", generate_croissant.INDEX_ID)
    assert describe(dataset) == 1
    assert "mlcroissant rejects the description" in capsys.readouterr().err
    assert not (dataset / "croissant.json").exists()


def test_an_output_that_is_a_folder(dataset, capsys):
    (dataset / "croissant.json").mkdir()
    assert describe(dataset) == 1
    assert "croissant.json: cannot be written: Is a directory" in capsys.readouterr().err


def test_a_folder_without_write_permission(dataset):
    prefix = ()
    if os.geteuid() == 0:  # root writes everywhere, unless it gives that up
        prefix = ("setpriv", "--bounding-set", "-dac_override")
        if not shutil.which("setpriv"):
            pytest.skip("no setpriv, which takes root's right to write everywhere")
    dataset.chmod(0o555)
    options = "-c", "master_index.csv", "-o", "croissant.json"
    done = finish(start(SCRIPT, *options, prefix=prefix, cwd=dataset))
    dataset.chmod(0o755)
    assert done == (1, "", "ERROR: croissant.json: cannot be written: Permission denied\n")


def test_an_index_that_changes_meanwhile_is_not_described(dataset, capsys, monkeypatch):
    check_rows = generate_croissant.check_rows

    def change(*arguments):
        check_rows(*arguments)
        set_cell(dataset, "flux", 1.5)

    monkeypatch.setattr(generate_croissant, "check_rows", change)
    assert describe(dataset) == 1
    assert "is not identical with the reference" in capsys.readouterr().err
    assert not (dataset / "croissant.json").exists()


def test_ctrl_c_is_130_and_leaves_nothing(dataset, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_croissant, "check_reload", interrupt)
    assert describe(dataset) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in dataset.iterdir()) == ["images", "master_index.csv"]


INTERRUPTED = (  # a run that gets a Ctrl-C once it has read the index
    "import os, signal, sys; sys.path.insert(0, sys.argv[1]);"
    "import generate_croissant as g; check = g.check_rows;"
    "g.check_rows = lambda *rows: os.kill(os.getpid(), signal.SIGINT) or check(*rows);"
    "sys.exit(g.main(['-c', 'master_index.csv', '-o', 'croissant.json']))"
)


def test_ctrl_c_while_the_index_is_read_is_130(dataset):
    done = finish(start("-c", INTERRUPTED, SCRIPT.parent, cwd=dataset))
    assert done == (130, "", "ERROR: interrupted: nothing was written\n")
    assert sorted(path.name for path in dataset.iterdir()) == ["images", "master_index.csv"]


def test_an_ignored_ctrl_c_stays_ignored(dataset):
    process = start("-c", INTERRUPTED, SCRIPT.parent, cwd=dataset, sigint=signal.SIG_IGN)
    assert finish(process).code == 0
    assert (dataset / "croissant.json").exists()


def test_a_closed_stdout_is_no_failure(dataset):
    reader, writer = os.pipe()
    os.close(reader)
    options = "-c", "master_index.csv", "-o", "croissant.json"
    with open(writer, "wb") as stdout:  # noqa: PTH123
        done = finish(start(SCRIPT, *options, cwd=dataset, stdout=stdout))
    message = "WARNING: the summary cannot be printed: [Errno 32] Broken pipe\n"
    assert done == (0, "", message)
    assert (dataset / "croissant.json").exists()


def test_candidates_at_the_very_edges_of_their_image(dataset):
    x, y = [-0.5, 79.49, -0.5, 79.49], [-0.5, -0.5, 71.49, 71.49]
    edit_index(dataset, lambda i: i.assign(x=[*x, *i["x"][4:]], y=[*y, *i["y"][4:]]))
    assert describe(dataset) == 0


def test_a_name_that_is_no_text_of_unicode(dataset, capsys):
    assert describe(dataset, "--name", "Mini \udcff") == 1
    message = "cannot be written: 'utf-8' codec can't encode character '\\udcff'"
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in dataset.iterdir()) == ["images", "master_index.csv"]
