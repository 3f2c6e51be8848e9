"""The benchmark of generate_croissant.py as a real process: the lines of its table, no times."""

import re
from pathlib import Path

import pytest
from conftest import LIMIT_S, finish, start

SCRIPT = Path(__file__).parent / "benchmarks" / "bench_generate_croissant.py"
ROWS = [
    *("textbook, s", "ours, s", "ours with checksums, s", "textbook / ours with checksums"),
    *("textbook, MB", "ours, MB", "ours with checksums, MB"),
    *("50 rows, s", "50 rows, MB", "100 rows, s", "100 rows, MB"),
]


def test_every_figure_has_its_line_in_order(tmp_path):
    sizes = "--rows", "200", "--images", "3"
    process = start(SCRIPT, *sizes, "--rounds", "1", "--work_dir", tmp_path)
    done = finish(process, 3 * LIMIT_S)
    assert done.code == 0, done.err
    head, columns, *lines = done.out.splitlines()
    assert head == "generate_croissant.py: 200 rows, 3 tensors; rounds 1"
    assert columns.split() == ["median", "min", "max"]
    assert [line for line in lines if not line.startswith(" ")] == ["speed", "memory", "growth"]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines if line.startswith(" ")]
    assert [what for what, *_ in cells] == ROWS
    for what, *values in cells:
        (value,) = (float(text.replace(",", "")) for text in values)
        assert value > 0, what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", "3", "--images", "1"), "four rows for each image"),
        (("--rounds", "0"), "expected a round"),
        (("--work_dir", "nowhere"), "no such folder: nowhere"),
    ],
)
def test_wrong_usage_is_exit_code_2(options, message):
    done = finish(start(SCRIPT, *options))
    assert (done.code, done.out) == (2, "")
    assert message in done.err
