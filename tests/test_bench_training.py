"""The benchmark of training as a real process on tiny jobs: the lines of its table, no times."""

import re
from pathlib import Path

import pytest
from conftest import LIMIT_S, finish, start

SCRIPT = Path(__file__).parent / "benchmarks" / "bench_training.py"
SECTIONS = {
    "loading, candidates/s": ["textbook", "ours", "ours / textbook"],
    "training, candidates/s": ["textbook", "ours", "ours / textbook", "ours in float32"],
    "average precision, %": ["textbook", "ours"],
    "start, s": ["mlcroissant alone", "to the first batch", "beyond it"],
    "memory, MB": ["1 job", "3 jobs", "3 jobs / 1 job"],
}


def test_every_figure_has_its_line_in_order(tmp_path):
    sizes = "--jobs", "3", "--size", "512", "--candidates", "150", "--epochs", "1", "--rounds", "1"
    process = start(SCRIPT, *sizes, "--work_dir", tmp_path)
    done = finish(process, 3 * LIMIT_S)
    assert done.code == 0, done.err
    data, settings, columns, *lines = done.out.splitlines()
    found = r"3 jobs of 512 x 512 pixels, 50 of 150 candidates to train on"
    assert data == f"test_croissant_dataset.py: {found}"
    textbook = r"epochs 1, rounds 1; textbook float32, batch 16"
    assert re.fullmatch(rf"{textbook}; ours (bfloat16|float32), batch \d+", settings)
    assert columns.split() == ["median", "min", "max"]
    table: dict[str, list[str]] = {}
    for line in lines:
        what, *values = re.split(r"\s{2,}", line.strip())
        if not line.startswith(" "):
            table[what] = section = []
            continue
        section.append(what)
        (value,) = (float(text.replace(",", "")) for text in values)
        assert value > 0 or what == "beyond it", line
    assert table == SECTIONS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--jobs", "2"), "--jobs: expected 3 or more, got 2"),
        (("--rounds", "0"), "--rounds: expected 1 or more, got 0"),
        (("--dataset_dir", "there", "--size", "256"), "--size has no effect with --dataset_dir"),
        (("--work_dir", "nowhere"), "no such folder: nowhere"),
    ],
)
def test_wrong_usage_is_exit_code_2(options, message):
    done = finish(start(SCRIPT, *options))
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_a_missing_dataset_is_exit_code_1(tmp_path):
    options = "--dataset_dir", tmp_path / "nowhere", "--work_dir", tmp_path
    done = finish(start(SCRIPT, *options))
    assert (done.code, done.out) == (1, "")
    assert re.search(r"ERROR: .*nowhere: no croissant\.json there", done.err)
    assert list(tmp_path.iterdir()) == []
