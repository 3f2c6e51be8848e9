"""test_croissant_dataset.py: whole runs, their report, and how they end."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    LIMIT_S,
    Finished,
    contents,
    describe,
    edit_index,
    finish,
    run,
    start,
    wait_for,
)
from sklearn.metrics import average_precision_score

import test_croissant_dataset as training

SCRIPT = Path(training.__file__)
WRITTEN = {"metrics.json", "model.pt", "predictions.csv", "report.png"}


def train(dataset: Path, *options: str | Path) -> int:
    return run(training, "-d", dataset, *options)


def blank_images(dataset: Path) -> None:
    for path in (dataset / "images").iterdir():
        np.save(path, np.full((72, 80, 4), 0.5, np.float32))


def brighten_real_candidates(dataset: Path) -> None:
    """Make noise of every tensor and put a blob where the index says real."""
    index = pd.read_csv(dataset / "master_index.csv")
    rows, columns = np.mgrid[:72, :80]
    rng = np.random.default_rng(0)
    for name, candidates in index.groupby("image_filename"):
        tensor = rng.uniform(0, 0.2, (72, 80, 4)).astype(np.float32)
        for x, y in candidates.loc[candidates["label"] == 1, ["x", "y"]].to_numpy():
            blob = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)
            tensor[..., 2] = np.maximum(tensor[..., 2], blob)
        np.save(dataset / name, tensor)


def precision_of(printed: str, name: str) -> float:
    """Return the average precision of a ranking from the closing lines."""
    (line,) = re.findall(rf"^  {name} .*$", printed, re.MULTILINE)
    return float(re.search(r"(\d\.\d+)(?: \([^(]*\))?$", line)[1])


def test_a_run_prints_checks_splits_rankings_calls_and_a_verdict(described, capsys):
    capsys.readouterr()
    assert train(described, "--epochs", "2") == 0
    captured = capsys.readouterr()
    epochs = captured.err.splitlines()
    assert [re.sub(r"\d\.\d{4}", "?", line) for line in epochs] == [
        f"INFO: epoch  {n}/2  loss ?  validation loss ?  ROC AUC ?  average precision ?"
        for n in (1, 2)
    ]
    lines = captured.out.splitlines()
    assert lines[0] == str(described)
    assert [line[:8] for line in lines[1:10]] == ["  yes   "] * 9
    assert lines[9].endswith("(48 of 48 read)")
    assert lines[10:14] == [
        "  split by job            jobs   candidates    real",
        "  train                      2           24       6 (25.0%)",
        "  validation                 1           12       3 (25.0%)",
        "  test                       1           12       3 (25.0%)",
    ]
    names = [line[2:23].strip() for line in lines[14:19]]
    assert names == ["on the test split", "network", "logistic regression", *names[3:]]
    assert names[3:] == ["ranked by flux", "base rate"]
    assert lines[18].split() == ["base", "rate", "0.500", "0.250"]
    assert lines[19].startswith("  called real from score 0.")
    called = [int(cell) for line in lines[22:24] for cell in line.split()[1:]]
    assert (sum(called[:2]), sum(called[2:])) == (3, 9)
    assert lines[24:] == ["verdict: cannot tell: 3 real and 9 bogus test candidates are too few"]


def test_two_runs_give_the_same_bytes_and_another_seed_others(described, tmp_path, capsys):
    reports = []
    for number, seed in enumerate(("7", "7", "8")):
        folder = tmp_path / str(number)
        options = ("--seed", seed, "--epochs", "2", "--report_dir", folder)
        assert train(described, *options) == 0
        report = contents(folder)
        assert report.keys() == WRITTEN
        del report["report.png"], report["model.pt"]  # metrics.json names its own folder
        report["metrics.json"] = report["metrics.json"].replace(str(folder).encode(), b"")
        reports.append(report)
    assert reports[0] == reports[1]
    assert reports[0]["predictions.csv"] != reports[2]["predictions.csv"]


def test_the_network_learns_what_can_only_be_seen_in_the_pixels(described, capsys):
    brighten_real_candidates(described)
    assert train(described, "--epochs", "40") == 0
    printed = capsys.readouterr().out
    assert precision_of(printed, "network") > 0.9
    assert precision_of(printed, "network") > precision_of(printed, "ranked by flux") + 0.2
    assert precision_of(printed, "network") > precision_of(printed, "logistic regression") + 0.2


def test_the_network_learns_what_can_only_be_seen_in_the_features(described, capsys):
    edit_index(described, lambda index: index.assign(sharpness=0.2 + 0.5 * index["label"]))
    assert describe(described) == 0
    blank_images(described)
    capsys.readouterr()
    assert train(described, "--epochs", "40") == 0
    printed = capsys.readouterr().out
    assert precision_of(printed, "network") > 0.9
    assert precision_of(printed, "logistic regression") == 1
    assert precision_of(printed, "base rate") == 0.25


def test_ranking_by_flux_is_that_of_the_test_candidates(described, capsys):
    edit_index(described, lambda index: index.assign(flux=index["label"] * 10 - 5.0))
    assert describe(described) == 0
    capsys.readouterr()
    assert train(described, "--epochs", "1") == 0
    assert precision_of(capsys.readouterr().out, "ranked by flux") == 1


@pytest.fixture
def reported(described, tmp_path) -> tuple[Path, Path]:
    """Return a dataset and the folder of the report about it."""
    brighten_real_candidates(described)
    folder = tmp_path / "new" / "report"
    assert train(described, "--epochs", "3", "--report_dir", folder) == 0
    return described, folder


def test_predictions_are_those_of_the_saved_model(reported):
    dataset, folder = reported
    predictions = pd.read_csv(folder / "predictions.csv")
    index = pd.read_csv(dataset / "master_index.csv")
    assert predictions.columns.tolist() == ["jid", "id", "split", "label", "score"]
    for column in ("jid", "id", "label"):
        assert predictions[column].tolist() == index[column].tolist()
    assert predictions["split"].value_counts().to_dict() == {
        **{"train": 24, "validation": 12, "test": 12}
    }
    saved = torch.load(folder / "model.pt", weights_only=True)
    network = training.RealBogusNetwork().eval()
    network.load_state_dict(saved["weights"])
    values = training.transform_features(training.read_candidates(dataset))
    features = training.scale_features(values, saved["center"].numpy(), saved["scale"].numpy())
    squares = training.CutoutDataset(dataset, training.read_candidates(dataset))[range(48)][0]
    with torch.inference_mode():
        scores = torch.sigmoid(network(squares, torch.from_numpy(features)))
    np.testing.assert_allclose(predictions["score"], scores, atol=0.02)  # bfloat16, maybe
    assert saved["settings"]["epochs"] == 3
    assert saved["feature_columns"] == training.FEATURE_COLUMNS


def test_metrics_are_those_of_the_predictions(reported):
    _, folder = reported
    metrics = json.loads((folder / "metrics.json").read_text())
    predictions = pd.read_csv(folder / "predictions.csv")
    test = predictions[predictions["split"] == "test"]
    value, low, high = metrics["rankings"]["network"]["average_precision"]
    assert value == pytest.approx(average_precision_score(test["label"], test["score"]))
    assert low <= value <= high
    calls = metrics["calls"]
    called = test["score"] >= calls["threshold"]
    assert calls["true_positives"] == (called & (test["label"] == 1)).sum()
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3]
    precisions = [row["average_precision"] for row in metrics["history"]]
    assert precisions[metrics["best_epoch"] - 1] == max(precisions)
    assert metrics["splits"]["test"] == {"jobs": 1, "candidates": 12, "real": 3}
    assert metrics["settings"]["seed"] == training.SEED
    assert set(metrics["versions"]) == {"numpy", "mlcroissant", "torch"}
    assert (metrics["interrupted"], metrics["base_rate"]) == (False, 0.25)


def test_the_picture_has_curves_and_cutouts(described, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: drawn.append(self) or savefig(self, *a, **k)
    )
    report_dir = described / "report"
    assert train(described, "--epochs", "2", "--report_dir", report_dir) == 0
    axes = [axis for part in drawn[0].subfigs for axis in part.axes]
    titles = [axis.get_title() for axis in axes]
    assert titles[:4] == [title for title, _, _ in training.CURVES]
    counts = [re.fullmatch(r"(real|bogus), called (real|bogus): (\d+)", t) for t in titles[4:]]
    assert sum(int(count[3]) for count in counts) == 12
    predictions = pd.read_csv(report_dir / "predictions.csv", index_col=["jid", "id"])["score"]
    shown = [label.get_text().split("\n") for label in axes[7].get_yticklabels()]
    scores = [float(score) for _, _, score in shown]
    assert scores == sorted(scores)  # bogus, called bogus: the most confident first
    for jid, number, score in shown:
        assert predictions[jid, float(number)] == pytest.approx(float(score), abs=6e-4)
    assert (report_dir / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("least", "learned", "code"),
    [("0", True, 0), ("0.9", True, 0), ("1", True, 1), ("0", False, 1)],
)
def test_min_ap_is_an_exit_code(described, monkeypatch, capsys, least, learned, code):
    results = {"learned": learned, "verdict": "so and so", "interrupted": False}
    results["rankings"] = {"network": {"average_precision": [0.9, 0.8, 1]}}
    assert training.find_exit_code(results, float(least)) == code
    assert training.find_exit_code(results, None) == 0


def test_a_run_below_min_ap_says_so(described, capsys):
    assert train(described, "--epochs", "1", "--min_ap", "1") == 1
    captured = capsys.readouterr()
    assert "ERROR: --min_ap 1.0: average precision 0." in captured.err
    assert "verdict: " in captured.out


def test_a_quick_look(described, capsys):
    assert train(described, "--epochs", "1", "--max_candidates", "32") == 0
    assert "(32 of 32 read)" in capsys.readouterr().out


def test_a_report_cannot_be_written_where_a_file_is(described, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "report"):
        assert train(described, "--report_dir", folder) == 1
        captured = capsys.readouterr()
        assert str(folder) in captured.err
        assert "epoch" not in captured.err


def test_a_full_disk_leaves_no_half_written_report(described, capsys, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def fill(path: Path, content: bytes) -> int:
        write_bytes(path, content[:100])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert train(described, "--epochs", "1", "--report_dir", tmp_path / "report") == 1
    captured = capsys.readouterr()
    assert "No space left on device" in captured.err
    assert "verdict: " in captured.out
    assert contents(tmp_path / "report") == {}


def test_matplotlib_missing_is_said_before_training(described, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(described, "--report_dir", tmp_path / "report") == 1
    captured = capsys.readouterr()
    assert captured.err == "ERROR: --report_dir draws with matplotlib: pip install matplotlib\n"
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there(described, capsys, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert train(described, "--device", name) == 1
    assert f"--device {name}: there is none here; auto takes what" in capsys.readouterr().err
    assert training.pick_device("auto")[0] == torch.device("cpu")


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_chosen_where_the_processor_has_it(monkeypatch, native):
    capabilities = {"avx512_bf16": native}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert training.pick_device("cpu")[1] == (torch.bfloat16 if native else torch.float32)


def test_a_loss_that_is_not_finite(described, capsys, monkeypatch):
    monkeypatch.setattr(
        training, "equal_loss", lambda labels: torch.nn.BCEWithLogitsLoss(torch.tensor(torch.inf))
    )
    assert train(described, "--epochs", "3") == 1
    assert "the loss is not finite any more: try a lower --learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--epochs", "0"), "--epochs must be at least 1"),
        (("--batch_size", "1"), "--batch_size must be at least 2"),
        (("--workers", "-1"), "--workers must be at least 0"),
        (("--workers", "9999999999"), "--workers must be no more than 1024"),
        (("--max_candidates", "0"), "--max_candidates must be at least 1"),
        (("--learning_rate", "0"), "--learning_rate must be above 0"),
        (("--learning_rate", "nan"), "--learning_rate must be above 0"),
        (("--learning_rate", "9"), "and no more than 1"),
        (("--min_ap", "1.1"), "--min_ap must be between 0 and 1"),
        (("--min_ap", "nan"), "--min_ap must be between 0 and 1"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--seed", "9" * 20), "--seed must be below 2**32"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(described, capsys, option, message):
    with pytest.raises(SystemExit, match="2"):
        train(described, *option)
    assert message in capsys.readouterr().err


def interrupt_after(epochs: int, monkeypatch) -> None:
    """Have Ctrl-C come within an epoch, after so many."""
    train_epoch, calls = training.train_epoch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > epochs:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(training, "train_epoch", interrupted)


def test_ctrl_c_ends_with_what_is_known_so_far(described, capsys, tmp_path, monkeypatch):
    interrupt_after(2, monkeypatch)
    assert train(described, "--epochs", "9", "--report_dir", tmp_path / "report") == 130
    captured = capsys.readouterr()
    assert "interrupted in epoch 3; judged is what was learned before" in captured.err
    assert "verdict: " in captured.out
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert (metrics["interrupted"], len(metrics["history"])) == (True, 2)


def test_ctrl_c_in_the_first_epoch_has_nothing_to_judge(described, capsys, monkeypatch):
    interrupt_after(0, monkeypatch)
    assert train(described) == 130
    captured = capsys.readouterr()
    assert captured.err == "ERROR: interrupted\n"
    assert "verdict" not in captured.out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_of_a_terminal_reaches_the_whole_group(described, workers):
    process = start(SCRIPT, "-d", described, "--epochs", "5000", "--workers", workers)
    first = process.stderr.readline()
    assert first.startswith("INFO: epoch"), first
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert "interrupted in epoch" in done.err


@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu"])
def test_ctrl_c_within_the_imports(described, library):
    process = start(SCRIPT, "-d", described, "--epochs", "5000")
    wait_for(lambda: library in Path(f"/proc/{process.pid}/maps").read_text())
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) == (130, "", "")


def test_ctrl_c_within_a_destructor_is_not_lost(described):
    """It was lost in a callback of weakref at the end of a DataLoader, and the run went on."""
    source = """
import runpy, signal, sys
import torch
class Last:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def slow(*_, **__):
    Last()
    while True:
        pass
torch.Tensor.backward = slow
sys.argv[:2] = sys.argv[1:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = finish(start("-c", source, SCRIPT, "-d", described))
    assert (done.code, done.err) == (130, "ERROR: interrupted\n")


def torchrun(processes: int, *options: str | Path) -> Finished:
    """Finish a run of several processes; torchrun itself has a traceback where one fails."""
    command = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)
    process = start(*command, SCRIPT, *options)
    out, err = process.communicate(timeout=3 * LIMIT_S)
    return Finished(process.returncode, out, err)


def test_two_processes_train_like_one(described, tmp_path):
    brighten_real_candidates(described)
    metrics, predictions = {}, {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        options = ("-d", described, "--epochs", "60", "--batch_size", "12", "--report_dir", folder)
        done = torchrun(processes, *options)
        assert done.code == 0, done.err
        assert done.out.count("verdict: ") == 1
        assert done.err.count("INFO: epoch 60/60") == 1
        metrics[processes] = json.loads((folder / "metrics.json").read_text())
        predictions[processes] = pd.read_csv(folder / "predictions.csv")
        assert set(contents(folder)) == WRITTEN
    one, two = metrics.values()
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert one["splits"] == two["splits"]
    same = ["jid", "id", "split", "label"]
    assert predictions[1][same].equals(predictions[2][same])
    for found in (one, two):
        assert found["rankings"]["network"]["average_precision"][0] > 0.9
    assert two["history"][0]["train_loss"] == pytest.approx(
        one["history"][0]["train_loss"], rel=0.2
    )


def test_every_process_has_its_share(described):
    rows = np.arange(23)
    parts = []
    for rank in range(3):
        args = training.parse_args(["--batch_size", "10"])
        args.rank, args.processes = rank, 3
        parts.append(training.share_out(rows, args))
    assert [len(part) for part in parts] == [3, 3, 3]
    for number in range(3):
        together = np.concatenate([part[number] for part in parts])
        assert sorted(together) == list(range(10 * number, min(10 * number + 10, 23)))


def test_a_failure_of_all_processes_is_exit_code_1(tmp_path):
    done = torchrun(2, "-d", tmp_path)
    assert done.code == 1
    assert "croissant.json: no such file" in done.err
    assert 'test_croissant_dataset.py", line' not in done.err


def test_too_many_processes(described, capsys, monkeypatch):
    monkeypatch.setattr(training, "join_processes", lambda device: (0, 100))
    assert train(described) == 1
    message = "100 processes need two candidates each in a batch: --batch_size is 128, and 24 are"
    assert message in capsys.readouterr().err
