"""The benchmark of training as a real process on tiny jobs: the lines of its table, no times."""

import importlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import LIMIT_S, finish, start

SCRIPT = Path(__file__).parent / "benchmarks" / "bench_training.py"
CUTOUTS = ["plain maps", "np.load per sample", "ours"]
CUTOUTS += ["ours / plain maps", "ours / np.load per sample"]
RECORDS = ["mlcroissant alone", "1 process", "2 processes", "1 process / mlcroissant alone"]
RECORDS += ["2 processes / mlcroissant alone", "2 processes / 1 process"]
SECTIONS = {
    "cutouts/s, warm page cache": CUTOUTS,
    "training, candidates/s": ["textbook", "ours", "ours / textbook"],
    "average precision, test split, %": ["textbook", "ours"],
    "records/s, 300 records": RECORDS,
    "quick look, 400 records": [
        "ours, s",
        "mlcroissant alone, extrapolated, s",
        "extrapolated / ours",
    ],
    "cutouts/s, cold page cache": CUTOUTS,
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("bench_training")


def test_every_figure_has_its_line_in_order(tmp_path):
    sizes = "--jobs", "3", "--size", "256", "--candidates", "150", "--epochs", "1", "--rounds", "1"
    indexes = "--records", "300", "--quick_records", "400"
    env = os.environ | {"DROP_CACHES": os.devnull}  # that of this machine stays
    process = start(SCRIPT, *sizes, *indexes, "--work_dir", tmp_path, env=env)
    done = finish(process, 8 * LIMIT_S)
    assert done.code == 0, done.err
    data, settings, columns, *lines = done.out.splitlines()
    found = "3 jobs of 256 x 256 pixels, 24 of 63 candidates to train on"
    assert data == f"test_croissant_dataset.py: {found}"
    assert settings == "epochs 1, rounds 1"
    assert columns.split() == ["median", "min", "max"]
    table: dict[str, list[str]] = {}
    for line in lines:
        what, *values = re.split(r"\s{2,}", line.strip())
        if not line.startswith(" "):
            table[what] = section = []
            continue
        section.append(what)
        (value,) = (float(text.replace(",", "")) for text in values)
        assert value > 0, line
    assert list(table.items()) == list(SECTIONS.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("x", "y", "rows", "columns"),
    [
        (40, 50, slice(0, 64), slice(0, 64)),
        (0.4, 99.4, slice(0, 33), slice(32, 64)),
        (99.6, -0.4, slice(32, 64), slice(0, 33)),
    ],
)
def test_the_benchmark_cuts_out_what_is_on_the_image(bench, x, y, rows, columns):
    image = np.arange(1, 100 * 101 * 4 + 1, dtype=np.float32).reshape(100, 101, 4)
    square = np.zeros((64, 64, 4), np.float32)
    bench.cut_out(image, x, y, square)
    filled = np.zeros_like(square, bool)
    filled[rows, columns] = True
    assert ((square > 0) == filled).all()
    center = image[int(np.floor(y + 0.5)), int(np.floor(x + 0.5))]
    assert (square[32, 32] == center).all()


def test_cutouts_that_differ_are_an_error(bench, monkeypatch):
    digests = {"plain maps": "a", "np.load per sample": "a", "ours": "b"}
    monkeypatch.setattr(bench, "call", lambda function, way, *others: (1.0, digests[way]))
    with pytest.raises(bench.BenchmarkError, match="its cutouts differ"):
        bench.measure_cutouts(False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--jobs", "2"), "--jobs: expected 3 or more, got 2"),
        (("--rounds", "0"), "--rounds: expected 1 or more, got 0"),
        (("--quick_records", "3"), "--quick_records: expected 30 or more, got 3"),
        (("--dataset_dir", "there", "--size", "256"), "--size has no effect with --dataset_dir"),
        (("--work_dir", "nowhere"), "no such folder: nowhere"),
    ],
)
def test_wrong_usage_is_exit_code_2(bench, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        bench.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_dataset_is_exit_code_1(bench, capsys, tmp_path):
    options = "--dataset_dir", tmp_path / "nowhere", "--work_dir", tmp_path
    assert bench.main([str(option) for option in options]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(r"ERROR: .*nowhere: no croissant\.json there", printed.err)
    assert list(tmp_path.iterdir()) == []
