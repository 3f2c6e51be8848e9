"""test_croissant_dataset.py: whole runs, their report, options, and how they end."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    LIMIT_S,
    Finished,
    contents,
    describe,
    edit_and_hash,
    edit_index,
    finish,
    read_csv,
    read_index,
    run,
    start,
    train,
    wait_for,
    write_dataset,
)
from sklearn.metrics import average_precision_score, roc_auc_score

import test_croissant_dataset as training
from test_croissant_dataset import FEATURE_COLUMNS, SPLITS, CutoutDataset

pytestmark = pytest.mark.usefixtures("quick_training")
SCRIPT = Path(training.__file__)
WRITTEN = {"metrics.json", "model.pt", "predictions.csv", "report.png"}
NUMBER = r"\d\.\d{3}"
ESTIMATE = rf"{NUMBER} \({NUMBER} to {NUMBER}\)"
FIGURES = ("roc_auc_within_jobs", "roc_auc", "average_precision")


def load_strictly(path: Path) -> dict:
    """Read JSON that has no NaN or Infinity, which JSON does not know."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


class Report(NamedTuple):
    """A run with a report."""

    dataset: Path
    folder: Path
    out: str
    err: str

    def metrics(self) -> dict:
        return load_strictly(self.folder / "metrics.json")

    def predictions(self, split: str | None = None) -> pd.DataFrame:
        table = read_csv(self.folder / "predictions.csv")
        return table if split is None else table[table["split"] == split]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    """Return a run of three epochs; each candidate occurs twice, so that scores have ties."""
    folder = tmp_path_factory.mktemp("report")
    jobs = {f"jid{number}": [0, 0, 1, 0, 1, 1] * 4 for number in range(12)}
    dataset = write_dataset(folder / "dataset", jobs)

    def double(index: pd.DataFrame) -> pd.DataFrame:
        same = ["x", "y", *FEATURE_COLUMNS]
        index.loc[1::2, same] = index.loc[::2, same].to_numpy()
        return index.assign(flux=index["flux"].round(1).where(index["flux"] > -1))

    edit_index(dataset, double)
    assert describe(dataset) == 0
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        options = "--epochs", "3", "--report_dir", folder / "new" / "report"
        assert run(training, "-d", dataset, *options) == 0
    return Report(dataset, folder / "new" / "report", out.getvalue(), err.getvalue())


# What is printed


def test_each_epoch_is_a_line(report):
    assert [re.sub(r"\d\.\d{4}", "?", line) for line in report.err.splitlines()] == [
        f"INFO: epoch  {n}/3  loss ?  validation loss ?  ROC AUC ?  average precision ?"
        for n in (1, 2, 3)
    ]


def test_a_run_prints_checks_splits_rankings_calls_and_a_verdict(report):
    lines = report.out.splitlines()
    assert lines[0] == str(report.dataset)
    assert lines[1:12] == [
        "  yes   croissant.json is valid Croissant",
        "  yes   the index is in the folder and as described (SHA-256)",
        "  yes   mlcroissant reads every record",
        "  yes   tensors are in the folder, whole, and float32 (H, W, 4)",
        "  yes   labels are 0 or 1, and 1 just where match is not -1",
        "  yes   candidates occur once",
        "  yes   candidates have their job's tensor",
        "  yes   positions are on their image",
        "  yes   both classes occur, often enough for every split",
        "  yes   cutouts are finite and in [0, 1] (288 of 288 read)",
        "  yes   no candidate is in two splits, under two names",
    ]
    assert lines[12:16] == [
        "  split by job            jobs   candidates    real",
        "  train                      7          168      84 (50.0%)",
        "  validation                 3           72      36 (50.0%)",
        "  test                       2           48      24 (50.0%)",
    ]
    assert lines[16].split("  ")[1] == "on the test split"
    names = "network", "logistic regression", "ranked by flux"
    for name, line in zip(names, lines[17:20], strict=True):
        assert re.fullmatch(rf"  {name} +{ESTIMATE} +{ESTIMATE} +{ESTIMATE}", line)
    assert lines[20].split() == ["base", "rate", "0.500", "0.500", "0.500"]
    assert lines[21].startswith("  called real from score 0.")
    assert re.fullmatch(rf"  precision {ESTIMATE}, recall {ESTIMATE}, F1 {NUMBER}", lines[22])
    called = [int(cell) for line in lines[24:26] for cell in line.split()[1:]]
    assert (sum(called[:2]), sum(called[2:])) == (24, 24)
    assert re.match(r"verdict: (not )?learned: ROC AUC within jobs ", lines[26])
    assert len(lines) == 27


def test_what_is_printed_is_what_metrics_json_says(report):
    metrics = report.metrics()

    def shown(estimate: list[float]) -> str:
        return "{:.3f} ({:.3f} to {:.3f})".format(*estimate)

    for name, ranking in metrics["rankings"].items():
        cells = (f"{shown(ranking[figure]):<25}" for figure in FIGURES)
        assert f"  {name:<22}{''.join(cells)}".rstrip() in report.out.splitlines()
    calls = metrics["calls"]
    line = f"precision {shown(calls['precision'])}, recall {shown(calls['recall'])}, F1 "
    assert line in report.out
    assert report.out.endswith(f"verdict: {metrics['verdict']}\n")


# The report


def test_the_report_has_four_files(report):
    assert contents(report.folder).keys() == WRITTEN
    assert (report.folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_are_the_candidates_of_the_index(report):
    index, predictions = read_index(report.dataset), report.predictions()
    assert predictions.columns.tolist() == ["jid", "id", "split", "label", "score"]
    for column in ("jid", "id", "label"):
        assert predictions[column].tolist() == index[column].tolist()
    assert predictions["split"].tolist() == training.split_candidates(index, 20260).tolist()
    assert predictions["score"].between(0, 1, inclusive="neither").all()


def test_candidates_have_exactly_the_numbers_of_the_index(report, monkeypatch):
    given = []

    class Spy(CutoutDataset):
        def __init__(self, folder: Path, table: pd.DataFrame) -> None:
            given.append(table)
            raise training.DatasetError("seen")

    monkeypatch.setattr(training, "CutoutDataset", Spy)
    assert train(report.dataset) == 1
    index = read_index(report.dataset)
    pd.testing.assert_frame_equal(
        given[0][index.columns.tolist()], index, check_dtype=False, check_exact=True
    )


def score_by_model(dataset_dir: Path, report_dir: Path, averaged: bool = True) -> np.ndarray:
    """Return the scores that model.pt gives, one by one: they do not depend on a batch.

    Those of the validation and the test split are of the mean logit of the four flips.
    """
    saved = torch.load(report_dir / "model.pt", weights_only=True)
    network = training.RealBogusNetwork().eval()
    network.load_state_dict(saved["weights"])
    dataset = CutoutDataset(dataset_dir, read_index(dataset_dir))
    split = read_csv(report_dir / "predictions.csv")["split"]
    center, scale = dataset.fit_features(np.flatnonzero(split == "train"))
    np.testing.assert_array_equal(saved["center"], center)
    np.testing.assert_array_equal(saved["scale"], scale)
    logits = []
    with torch.inference_mode():
        for row, name in enumerate(split):
            cutout, features, _ = dataset[np.array([row])]
            flips = [(), (2,), (3,), (2, 3)] if averaged and name != "train" else [()]
            views = [network(cutout.flip(dims), features) for dims in flips]
            logits.append(torch.stack(views).mean(dim=0))
    return torch.sigmoid(torch.cat(logits)).numpy()


def test_predictions_are_those_of_the_saved_model(report):
    scores = score_by_model(report.dataset, report.folder)
    found = report.predictions()["score"]
    np.testing.assert_allclose(found, scores, atol=0.1 * np.ptp(scores))  # bfloat16, maybe
    alone = score_by_model(report.dataset, report.folder, averaged=False)
    assert np.abs(found - scores).mean() < np.abs(found - alone).mean() / 2
    saved = torch.load(report.folder / "model.pt", weights_only=True)
    assert saved["settings"]["epochs"] == "3"
    assert tuple(saved["feature_columns"]) == FEATURE_COLUMNS
    assert saved["threshold"] == report.metrics()["calls"]["threshold"][0]


def within_jobs(table: pd.DataFrame, scores: pd.Series) -> float:
    """Return the fraction of pairs of a real and a bogus candidate of a job in the right order."""
    right = []
    for _, job in table.groupby("jid"):
        real, bogus = (scores[job.index[job["label"] == label]].to_numpy() for label in (1, 0))
        right.append((np.sign(real[:, None] - bogus) / 2 + 0.5).ravel())
    return float(np.concatenate(right).mean())


@pytest.mark.parametrize("name", ["network", "ranked by flux"])
def test_figures_are_those_of_the_predictions(report, name):
    test, metrics = report.predictions("test"), report.metrics()
    assert test["jid"].nunique() == 2
    flux = read_index(report.dataset)["flux"].fillna(-99)[test.index]
    scores = {"network": test["score"], "ranked by flux": flux}[name]
    pairs = test.assign(score=scores).groupby("score")["label"].nunique()
    assert (pairs > 1).sum() > 5  # ties of real and bogus
    figures = metrics["rankings"][name]
    expected = [within_jobs(test, scores), roc_auc_score(test["label"], scores)]
    expected.append(average_precision_score(test["label"], scores))
    for figure, value in zip(FIGURES, expected, strict=True):
        found, low, high = figures[figure]
        assert found == pytest.approx(value)
        assert low < found < high


def test_calls_are_those_of_the_predictions(report):
    test, calls = report.predictions("test"), report.metrics()["calls"]
    assert calls["threshold"][0] in report.predictions("validation")["score"].tolist()
    called, real = test["score"] >= calls["threshold"][0], test["label"] == 1
    assert calls["true_positives"][0] == (called & real).sum() > 0
    assert calls["false_positives"][0] == (called & ~real).sum()
    assert calls["precision"][0] == pytest.approx(real[called].mean())
    assert calls["recall"][0] == pytest.approx(called[real].mean())
    for name in ("precision", "recall"):
        value, low, high = calls[name]
        assert 0 <= low <= value <= high <= 1
        assert low < high


def test_metrics_say_how_it_was_learned(report):
    metrics = report.metrics()
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3]
    precisions = [row["average_precision"] for row in metrics["history"]]
    good = [
        n for n, value in enumerate(precisions) if value >= max(precisions) - training.TOLERANCE
    ]
    assert metrics["best_epoch"] == good[-1] + 1
    kept = precisions[good[-1]]
    held_out = report.predictions("validation")
    alone = score_by_model(report.dataset, report.folder, averaged=False)[held_out.index]
    precision = average_precision_score(held_out["label"], alone)
    assert kept == pytest.approx(precision, abs=0.02)
    assert metrics["splits"]["test"] == {"jobs": 2, "candidates": 48, "real": 24}
    assert metrics["base_rate"] == 0.5
    assert metrics["settings"]["seed"] == training.SEED
    assert metrics["settings"]["epochs"] == 3
    assert set(metrics["versions"]) == {"numpy", "mlcroissant", "torch"}
    assert metrics["learned"] == metrics["verdict"].startswith("learned")


def test_the_picture_has_curves_and_cutouts(sample, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_: drawn.append(figure))
    assert train(sample, "--report_dir", tmp_path) == 0
    axes = [axis for part in drawn[0].subfigs for axis in part.axes]
    titles = [axis.get_title() for axis in axes]
    assert titles[:4] == [title for title, _, _ in training.CURVES]
    counts = [re.fullmatch(r"(real|bogus), called (real|bogus): (\d+)", t) for t in titles[4:]]
    assert sum(int(count[3]) for count in counts) == 24
    predictions = read_csv(tmp_path / "predictions.csv", index_col=["jid", "id"])["score"]
    shown = [label.get_text().split("\n") for label in axes[7].get_yticklabels()]
    scores = [float(score) for _, _, score in shown]
    assert scores == sorted(scores)  # bogus, called bogus: the most confident first
    assert len(scores) > 0
    for jid, number, score in shown:
        assert predictions[jid, float(number)] == pytest.approx(float(score), abs=6e-4)


def test_two_runs_give_the_same_bytes_and_another_seed_others(sample, tmp_path):
    reports = []
    for number, seed in enumerate(("7", "7", "8")):
        folder = tmp_path / str(number)
        assert train(sample, "--seed", seed, "--report_dir", folder) == 0
        written = contents(folder)
        metrics = written["metrics.json"].replace(str(folder).encode(), b"")  # its own folder
        weights = torch.load(folder / "model.pt", weights_only=True)["weights"]
        reports.append((metrics, written["predictions.csv"], str(weights)))
    assert reports[0] == reports[1]
    assert all(one != other for one, other in zip(reports[0], reports[2], strict=True))


def test_no_test_job_with_both_classes_is_no_verdict_and_no_nan(tmp_path, capsys):
    jobs = {f"jid{number}": [number % 2] * 12 for number in range(8)}
    dataset = write_dataset(tmp_path / "dataset", jobs)
    assert train(dataset, "--report_dir", tmp_path / "report") == 0
    metrics = load_strictly(tmp_path / "report" / "metrics.json")
    assert metrics["rankings"]["network"]["roc_auc_within_jobs"] == [None, None, None]
    assert all(metrics["rankings"]["network"]["roc_auc"])
    verdict = "cannot tell: 0 real and 0 bogus test candidates, of jobs that have both, are too few"
    assert metrics["verdict"] == verdict
    assert not metrics["learned"]
    assert f"verdict: {verdict}\n" in capsys.readouterr().out


def test_a_report_cannot_be_written_where_a_file_is(sample, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "report"):
        assert train(sample, "--report_dir", folder) == 1
        captured = capsys.readouterr()
        assert str(folder) in captured.err
        assert captured.out == ""  # said before training


def test_a_full_disk_is_said_after_the_verdict(sample, capsys, tmp_path, monkeypatch):
    def fill(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert train(sample, "--report_dir", tmp_path / "report") == 1
    captured = capsys.readouterr()
    assert "No space left on device" in captured.err
    assert "verdict: " in captured.out


def test_matplotlib_missing_is_said_before_training(sample, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    assert train(sample, "--report_dir", tmp_path / "report") == 1
    captured = capsys.readouterr()
    message = "ERROR: --report_dir draws with matplotlib: pip install matplotlib: ModuleNotFound"
    assert captured.err.startswith(message)
    assert not (tmp_path / "report").exists()


def test_matplotlib_that_does_not_work_is_said_before_training(sample, tmp_path):
    settings = {"env": {**os.environ, "MPLBACKEND": "nonsense"}}
    done = finish(start(SCRIPT, "-d", sample, "--report_dir", tmp_path / "report", **settings))
    assert (done.code, done.out) == (1, "")
    assert "'nonsense' is not a valid value for backend" in done.err


# Options


def rank_by_sharpness(dataset: Path, monkeypatch, worse: int) -> None:
    """Make sharpness the score; it is the label, except for a bogus candidate in so many."""

    class Sharp(training.RealBogusNetwork):
        def forward(self, cutouts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
            return self.head[-1].bias * 0 + features[:, 0]

    def change(index: pd.DataFrame) -> pd.DataFrame:
        wrong = (index.groupby("jid").cumcount() == worse) & (worse > 0)
        return index.assign(sharpness=index["label"].where(~wrong, 2) + index["id"] / 1e3)

    monkeypatch.setattr(training, "RealBogusNetwork", Sharp)
    edit_index(dataset, change)
    assert describe(dataset) == 0


@pytest.mark.parametrize(("worse", "code"), [(0, 0), (20, 1)])
def test_min_ap_is_an_exit_code(sample_copy, monkeypatch, capsys, worse, code):
    rank_by_sharpness(sample_copy, monkeypatch, worse)
    assert train(sample_copy, "--min_ap", "0.99") == code
    captured = capsys.readouterr()
    assert "verdict: learned" in captured.out
    assert ("ERROR: --min_ap 0.99: average precision 0." in captured.err) == (code == 1)


@pytest.mark.parametrize("least", ["0", "1"])
def test_a_network_that_did_not_learn_is_below_any_min_ap(sample, capsys, least):
    assert train(sample, "--min_ap", least) == 1
    captured = capsys.readouterr()
    assert f"ERROR: --min_ap {least}.0: average precision 0." in captured.err
    assert "verdict: not learned" in captured.out


@pytest.fixture
def uneven(tmp_path) -> Path:
    """Return a dataset of jobs of 30, 4, 30 and 30 candidates."""
    jobs = {"jid1": [0, 1] * 15, "jid2": [0, 1] * 2, "jid3": [0, 1] * 15, "jid4": [0, 1] * 15}
    return write_dataset(tmp_path / "dataset", jobs)


def predict(dataset: Path, *options: str) -> pd.DataFrame:
    """Train with a report and return its predictions."""
    assert train(dataset, "--report_dir", dataset / "report", *options) == 0
    return read_csv(dataset / "report" / "predictions.csv")


@pytest.mark.parametrize("part_rows", [10_000, 13])
def test_a_quick_look_reads_only_what_it_takes(uneven, capsys, monkeypatch, part_rows):
    monkeypatch.setattr(training, "RECORDS_PER_PART", part_rows)
    few = predict(uneven, "--max_candidates", "64")
    assert few["jid"].value_counts().to_dict() == {"jid1": 20, "jid2": 4, "jid3": 20, "jid4": 20}
    assert few["id"].is_monotonic_increasing
    assert few["id"].max() > 85  # at random, not the first of each
    printed = capsys.readouterr().out
    assert "  yes   mlcroissant reads at most 64 records" in printed
    assert "(64 of 64 read)" in printed

    def spoil(index: pd.DataFrame) -> pd.DataFrame:
        return index.assign(
            flags=index["flags"].astype(str).where(index["id"].isin(few["id"]), "x")
        )

    edit_and_hash(uneven, spoil)
    pd.testing.assert_frame_equal(predict(uneven, "--max_candidates", "64"), few)
    assert train(uneven) == 1
    assert "mlcroissant cannot read its records" in capsys.readouterr().err


@pytest.mark.parametrize("part_rows", [10_000, 13])
def test_more_candidates_than_there_are_is_all(uneven, monkeypatch, part_rows):
    whole = predict(uneven)
    monkeypatch.setattr(training, "RECORDS_PER_PART", part_rows)
    pd.testing.assert_frame_equal(predict(uneven, "--max_candidates", "999"), whole)


def test_an_index_read_in_parts_is_the_same(sample, tmp_path, monkeypatch):
    written = []
    for number, part_rows in enumerate((10_000, 17)):
        monkeypatch.setattr(training, "RECORDS_PER_PART", part_rows)
        folder = tmp_path / str(number)
        assert train(sample, "--report_dir", folder) == 0
        metrics = load_strictly(folder / "metrics.json")
        written.append((metrics["rankings"], contents(folder)["predictions.csv"]))
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there(sample, capsys, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert train(sample, "--device", name) == 1
    assert f"--device {name}: there is none here; auto takes what" in capsys.readouterr().err


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_the_processor_never_mps_and_bfloat16_if_it_is_built_in(
    sample, monkeypatch, tmp_path, native
):
    capabilities = {"avx512_bf16": native}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert train(sample, "--report_dir", tmp_path) == 0
    settings = load_strictly(tmp_path / "metrics.json")["settings"]
    assert settings["device"] == "cpu"
    assert settings["dtype"] == ("torch.bfloat16" if native else "torch.float32")


@pytest.mark.parametrize(("cpus", "threads"), [(2, 1), (4, 3)])
def test_two_processors_compute_with_one_thread(tmp_path, monkeypatch, cpus, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    try:
        torch.set_num_threads(3)  # PyTorch's own choice
        assert train(tmp_path, "--device", "cpu") == 1  # there is no dataset
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "0"), "--epochs: expected 1 to 1000000000, got 0"),
        (("--batch_size", "1"), "--batch_size: expected 2 to 1000000000, got 1"),
        (("--workers", "2"), "unrecognized arguments: --workers 2"),
        (("--max_candidates", "0"), "--max_candidates: expected 1 to 1000000000, got 0"),
        (("--learning_rate", "0"), "--learning_rate: expected 1e-09 to 1, got 0"),
        (("--learning_rate", "nan"), "--learning_rate: expected 1e-09 to 1, got nan"),
        (("--learning_rate", "9"), "--learning_rate: expected 1e-09 to 1, got 9"),
        (("--min_ap", "1.1"), "--min_ap: expected 0 to 1, got 1.1"),
        (("--min_ap", "nan"), "--min_ap: expected 0 to 1, got nan"),
        (("--seed", "-1"), "--seed: expected 0 to 4294967295, got -1"),
        (("--seed", "9" * 20), "--seed: expected 0 to 4294967295, got 9999"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(sample, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        train(sample, *options)
    assert message in capsys.readouterr().err


# Ctrl-C


def test_ctrl_c_ends_the_run_with_what_was_printed(sample):
    process = start(SCRIPT, "-d", sample, "--epochs", "5000")
    first = process.stderr.readline()
    assert first.startswith("INFO: epoch  1/5000"), first
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert done.err.endswith("ERROR: interrupted\n")
    assert "  split by job " in done.out
    assert "verdict" not in done.out


def read_in_parts(dataset: Path) -> tuple[subprocess.Popen, Callable[[], list[str]]]:
    """Start a run that reads each record as a part; return it and what lists its workers."""
    source = "import sys, test_croissant_dataset as t; print(flush=True)"
    source += "; t.RECORDS_PER_PART = 1; sys.exit(t.main())"
    process = start("-c", source, "-d", dataset, cwd=SCRIPT.parent)
    process.stdout.readline()  # PyTorch with CUDA starts another program while it is imported
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return process, lambda: children.read_text().split()


def holds_ctrl_c(pid: str) -> bool:
    held = Path(f"/proc/{pid}/status").read_text().partition("SigBlk:")[2].split()[0]
    return bool(int(held, 16) >> (signal.SIGINT - 1) & 1)


def test_ctrl_c_while_the_index_is_read_in_parts(sample):
    process, workers = read_in_parts(sample)
    wait_for(lambda: len(workers()) == len(os.sched_getaffinity(0)))
    wait_for(lambda: all(map(holds_ctrl_c, workers())))
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert (done.code, done.err) == (130, "ERROR: interrupted\n")
    assert "every record" not in done.out


def test_ctrl_c_while_the_processes_that_read_start(sample):
    """In the first 10 to 20 ms it was lost, or the run hung, or the exit code was 1."""
    process, workers = read_in_parts(sample)
    wait_for(workers)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process).code == 130


def test_ctrl_c_that_nohup_has_ignored_stays_ignored(sample):
    process = start(SCRIPT, "-d", sample, "--epochs", "9", sigint=signal.SIG_IGN)
    assert process.stderr.readline().startswith("INFO: epoch  1/9")
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.code == 0
    assert "verdict: " in done.out


# torchrun


def torchrun(processes: int, *options: str | Path) -> Finished:
    """Finish a run of several processes; torchrun itself has a traceback where one fails."""
    command = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)
    process = start(*command, SCRIPT, *options)
    out, err = process.communicate(timeout=3 * LIMIT_S)
    return Finished(process.returncode, out, err)


def test_two_processes_train_like_one(sample_copy, tmp_path):
    labels = read_index(sample_copy)["label"]
    edit_index(
        sample_copy, lambda index: index.assign(**dict.fromkeys(FEATURE_COLUMNS[:4], labels))
    )
    assert describe(sample_copy) == 0
    options = "-d", sample_copy, "--epochs", "12", "--batch_size", "12", "--report_dir"
    assert run(training, *options, tmp_path / "1") == 0
    done = torchrun(2, *options, tmp_path / "2")
    assert done.code == 0, done.err
    assert done.out.count("verdict: ") == 1
    assert done.err.count("INFO: epoch 12/12") == 1
    assert contents(tmp_path / "2").keys() == WRITTEN
    one, two = (load_strictly(tmp_path / name / "metrics.json") for name in "12")
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert one["splits"] == two["splits"]
    losses = [found["history"][0]["train_loss"] for found in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    predictions = [read_csv(tmp_path / name / "predictions.csv") for name in "12"]
    scores = score_by_model(sample_copy, tmp_path / "2")
    np.testing.assert_allclose(predictions[1]["score"], scores, atol=0.05 * np.ptp(scores))
    same = ["jid", "id", "split", "label"]
    assert predictions[0][same].equals(predictions[1][same])
    for found, table in zip((one, two), predictions, strict=True):
        assert found["rankings"]["network"]["average_precision"][0] > 0.9
        for split in SPLITS:
            part = table[table["split"] == split]
            assert roc_auc_score(part["label"], part["score"]) > 0.9  # all have their score


def test_more_processes_than_a_batch_can_feed(sample):
    done = torchrun(2, "-d", sample, "--batch_size", "3")
    assert done.code == 1
    message = "2 processes need two candidates each in a batch: --batch_size is 3, and 48 are"
    assert message in done.err
    assert 'test_croissant_dataset.py", line' not in done.err
