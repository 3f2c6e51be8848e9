"""The benchmark as a real process on tiny jobs: the lines of its table, never its times."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from benchmarks import bench_create_dataset as bench
from conftest import LIMIT_S, STEMS, finish, run, start, wait_for, write_job

LINES = [  # of the table, titles among them
    *("warm page cache, 2 jobs", "textbook, s", "cat, s", "ours, s"),
    *("textbook / ours", "ours / cat"),
    *("memory", "textbook, 2 jobs, MB", "ours, 2 jobs, MB", "ours, 1 job, MB"),
    *("cold page cache, 3 jobs", "cat, s", "ours, s", "ours / cat"),
    *("growth, 20 jobs of 64 x 64 pixels", "first tenth, ms/job", "last tenth, ms/job"),
    "last / first",
    *(f"index of {count} jobs, ms/job" for count in (5, 10, 20)),
]


def start_bench(work_dir: Path, *options: str | Path) -> subprocess.Popen:
    """Start it; the page cache of this machine is not dropped."""
    env = os.environ | {"DROP_CACHES": os.devnull}
    return start(bench.__file__, "--work_dir", work_dir, "--simulated", "1", *options, env=env)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("bench")
    counts = "--jobs", "2", "--cold_jobs", "3", "--rounds", "1", "--small_jobs", "20"
    process = start_bench(folder, "--size", "256", *counts)
    done = finish(process, 3 * LIMIT_S)
    assert done.code == 0, done.err
    assert list(folder.iterdir()) == []
    return done.out.splitlines()


def test_heading_tells_what_was_measured(table):
    heading = r"create_dataset.py: jobs of 256 x 256 pixels; tensors within [\de.-]+ of the .*"
    assert re.fullmatch(heading, table[0])
    assert re.fullmatch(r"workers 2, processors \d+, rounds 1", table[1])
    assert table[2].split() == ["median", "min", "max"]


def test_every_figure_has_its_line_in_order(table):
    # Two tensors may have the same date: then there is no ratio of the tenths, but nan.
    figure = re.compile(r"(\d\.\d\d| nan)$")
    assert all(line.startswith(" ") == bool(figure.search(line)) for line in table[3:])
    assert [re.split(r"\s{2,}", line.strip())[0] for line in table[3:]] == LINES


def test_figures_of_several_rounds_have_their_median_and_extremes():
    sections = {"speed": {"ours, s": [3.0, 1.25, 2.0], "cat, s": [1234.5]}, "left out": {}}
    assert bench.table(["heading"], sections).splitlines() == [
        "heading",
        "                                        median       min       max",
        "speed",
        "  ours, s                                 2.00      1.25      3.00",
        "  cat, s                              1,234.50",
        "left out",
    ]


def test_peaks_are_those_of_processes_that_hold_numpy(table):
    for line in table:
        if ", MB" in line:
            assert 20 < float(line.split()[-1].replace(",", "")) < 2000, line


def test_image_names_are_those_of_create_dataset():
    assert [f"{stem}.fits" for stem in STEMS] == bench.IMAGE_NAMES


def test_pace_takes_each_tenth_by_itself(tmp_path):
    for number in range(30):  # one a second, and the last three take two seconds each
        path = tmp_path / f"jid{number:03d}.npy"
        path.touch()
        seconds = 1000 + number + max(0, number - 27)
        bench.os.utime(path, (seconds, seconds))
    assert bench.pace(tmp_path) == {
        "first tenth, ms/job": [1000],
        "last tenth, ms/job": [2000],
        "last / first": [2],
    }


def test_cold_is_skipped_if_the_page_cache_cannot_be_dropped(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bench, "DROP_CACHES", tmp_path / "nowhere")
    assert bench.cold(bench.parse_args([]), tmp_path, jobs=[]) == {}
    assert "cold: skipped, because" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_differ_are_an_error(tmp_path, monkeypatch):
    job = write_job(tmp_path / "jobs", "jid001")
    wrong = bench.TEXTBOOK.replace("nan_to_num(pixels) - vmin", "nan_to_num(pixels) - vmin + 1e-4")
    monkeypatch.setattr(bench, "TEXTBOOK", wrong)
    commands = bench.make_round(job.parent, tmp_path, 1)
    with pytest.raises(bench.BenchmarkError, match=r"create_dataset.py: off by .* textbook"):
        bench.warm_up(job.parent, commands)


def test_a_command_that_fails_is_named_with_what_it_said(tmp_path):
    for jid in ("jid001", "jid002"):
        job = write_job(tmp_path / "jobs", jid)
    (job / "psfcat.csv").unlink()
    (tmp_path / "work").mkdir()
    done = finish(start_bench(tmp_path / "work", "--jobs_dir", tmp_path / "jobs"))
    assert (done.code, done.out) == (1, "")
    assert re.search(r"ERROR: ours: exit code 1 of .*create_dataset\.py", done.err)
    assert "ERROR: jid000001 left out: " in done.err
    assert list((tmp_path / "work").iterdir()) == []


def test_ctrl_c_is_130_and_leaves_nothing(tmp_path):
    process = start_bench(tmp_path, "--size", "256")
    wait_for(lambda: list(tmp_path.glob("*/simulated")))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.code, done.out) == (130, "")
    assert "interrupted" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "0"), "--rounds: expected 1 or more, got 0"),
        (("--small_jobs", "19"), "--small_jobs: expected 20 or more"),
        (("--size", "256", "--jobs_dir", "jobs"), "not allowed with argument --size"),
    ],
)
def test_wrong_usage_is_exit_code_2(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(bench, *options)
    assert message in capsys.readouterr().err
