"""test_croissant_dataset.py: cutouts, features, splits, figures, and what is learned."""

import json
import resource
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import describe, edit_index, finish, read_index, run, start, write_dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

import test_croissant_dataset as training
from test_croissant_dataset import FEATURE_COLUMNS, SPLITS, CutoutDataset, DatasetError

pytestmark = pytest.mark.usefixtures("quick_training")


def make_candidates(labels_of_jobs: dict[str, list[int]], **columns: object) -> pd.DataFrame:
    jid = np.repeat(list(labels_of_jobs), [len(labels) for labels in labels_of_jobs.values()])
    label = np.concatenate(list(labels_of_jobs.values())).astype(float)
    candidates = pd.DataFrame({"jid": jid, "image_filename": [f"images/{j}.npy" for j in jid]})
    candidates[["id", "x", "y", *FEATURE_COLUMNS]] = 0.0
    return candidates.assign(match=np.where(label == 1, 5.0, -1.0), label=label, **columns)


def read_metrics(dataset: Path, *options: str) -> dict:
    """Train with a report and return its metrics.json."""
    assert run(training, "-d", dataset, "--report_dir", dataset / "report", *options) == 0
    return json.loads((dataset / "report" / "metrics.json").read_text())


# Cutouts

# Every pixel of this image says where it is, the same in each channel.
NUMBERS = 1 + np.arange(100)[:, None] * 1000 + np.arange(120)
IMAGE = np.repeat(NUMBERS[..., None] / 2**17, 4, axis=2).astype(np.float32)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a dataset folder with a large and a small image."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "images").mkdir()
    np.save(folder / "images" / "large.npy", IMAGE)
    np.save(folder / "images" / "small.npy", IMAGE[:3, :5])
    return folder


@pytest.mark.parametrize("x", [0, 31, 32, 50.4, 87, 88, 119, -0.5])
def test_cutouts_are_centred_and_zero_off_the_image(images, x):
    y = np.array([0, 31, 32, 50.5, 67, 68, 99])
    dataset = CutoutDataset(images, make_candidates({"large": [0] * 7}, x=x, y=y))
    cutouts, _, _ = dataset[np.arange(7)]
    padded = np.pad(IMAGE, ((64, 64), (64, 64), (0, 0)))
    column = int(np.floor(x + 0.5))
    for cutout, row in zip(cutouts, np.floor(y + 0.5).astype(int), strict=True):
        expected = padded[row + 32 : row + 96, column + 32 : column + 96]
        np.testing.assert_array_equal(cutout.permute(1, 2, 0), expected)
        assert cutout[0, 32, 32] == NUMBERS[row, column] / 2**17


def test_cutout_of_a_small_image_keeps_it_whole(images):
    dataset = CutoutDataset(images, make_candidates({"small": [0]}, x=4, y=0))
    (cutout,) = dataset[np.array([0])][0].permute(0, 2, 3, 1)
    np.testing.assert_array_equal(cutout[32:35, 28:33], IMAGE[:3, :5])
    assert np.count_nonzero(cutout) == 3 * 5 * 4


@pytest.fixture
def cutouts(sample) -> CutoutDataset:
    """Return the sample, its features scaled by the first half."""
    dataset = CutoutDataset(sample, read_index(sample))
    dataset.fit_features(np.arange(48))
    return dataset


def test_a_batch_is_what_its_rows_are_in_their_order(cutouts):
    rows = np.array([90, 3, 15, 3])
    squares, features, labels = cutouts[rows]
    assert squares.is_contiguous(memory_format=torch.channels_last)
    assert (squares.dtype, features.dtype, labels.dtype) == (torch.float32,) * 3
    assert labels.tolist() == [0, 1, 1, 1]
    for place, row in enumerate(rows):
        alone = cutouts[np.array([row])]
        for values, (value,) in zip((squares, features, labels), alone, strict=True):
            assert torch.equal(values[place], value)
    assert len(torch.unique(features, dim=0)) == len(torch.unique(squares, dim=0)) == 3


@pytest.mark.parametrize("sizes", [[3], [5, 2, 9, 1, 1, 1, 1, 4]])
def test_loaded_batches_are_those_asked_for(cutouts, sizes):
    order = np.random.default_rng(0).permutation(len(cutouts))
    batches = np.split(order, np.cumsum(sizes))[:-1]
    loaded = list(cutouts.load(batches))
    assert [len(labels) for _, _, labels in loaded] == sizes
    for rows, parts in zip(batches, loaded, strict=True):
        assert all(map(torch.equal, parts, cutouts[rows]))


def test_a_damaged_pixel_is_found_by_whoever_loads_it(sample_copy):
    path = sample_copy / "images" / "jid002.npy"
    np.save(path, np.full_like(np.load(path), np.nan))
    dataset = CutoutDataset(sample_copy, read_index(sample_copy))
    loaded = dataset.load([np.arange(24), np.arange(20, 30)])
    assert len(next(loaded)[0]) == 24
    with pytest.raises(DatasetError, match=r"images/jid002\.npy: a pixel is not in \[0, 1\]"):
        next(loaded)


MEMORY = """
import sys
from pathlib import Path
import numpy as np
import pandas as pd
from test_croissant_dataset import CutoutDataset

def own_memory_kb():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])

folder = Path(sys.argv[1])
dataset = CutoutDataset(folder, pd.read_pickle(folder / "candidates.pkl"))
before = own_memory_kb()
for rows in np.arange(300).reshape(-1, 10):
    assert dataset[rows][0].max() == 0
print(own_memory_kb() - before)
"""


def test_images_are_not_copied_into_memory(tmp_path):
    """Of a tensor of 134 MB, nothing but the cutouts takes memory of a process."""
    (tmp_path / "images").mkdir()
    path, shape = tmp_path / "images" / "jid1.npy", (2900, 2900, 4)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    places = np.linspace(0, 2899, 300)
    candidates = make_candidates({"jid1": [0] * 300}, x=places, y=places)
    candidates.to_pickle(tmp_path / "candidates.pkl")
    done = finish(start("-c", MEMORY, tmp_path, cwd=Path(training.__file__).parent))
    assert (done.code, done.err) == (0, "")
    assert int(done.out) < 20_000


def test_more_tensors_than_files_may_be_open(tmp_path):
    """The soft limit is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    candidates = make_candidates({f"jid{n}": [0] for n in range(300)})
    (tmp_path / "images").mkdir()
    for name in candidates["image_filename"]:
        np.save(tmp_path / name, np.zeros((4, 4, 4), np.float32))
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        dataset = CutoutDataset(tmp_path, candidates)
        assert dataset[np.arange(300)][0].shape == (300, 4, 64, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_jobs_that_fit_the_memory_are_shuffled_as_one(cutouts):
    orders = [cutouts.shuffle(np.arange(10, 90), [seed, 1]).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(10, 90))
    jobs = np.array(orders[0]) // 24
    assert np.count_nonzero(np.diff(jobs)) > 40  # next to another job, mostly


def test_jobs_that_do_not_fit_the_memory_come_one_after_the_other(sample, monkeypatch):
    monkeypatch.setattr(training, "MEMORY_SHARE", 1e-12)
    cutouts = CutoutDataset(sample, read_index(sample))
    assert len(list(cutouts.load(np.split(np.arange(96), 12)))) == 12
    rows = np.setdiff1d(np.arange(96), [5, 50])
    sequences = set()
    for epoch in range(1, 9):
        order = cutouts.shuffle(rows, [1, epoch])
        assert sorted(order) == rows.tolist()
        sequence = pd.unique(order // 24)
        assert np.count_nonzero(np.diff(order // 24)) == 3  # each job in one piece
        first = order[order // 24 == 0].tolist()
        assert first != sorted(first)
        sequences.add(tuple(sequence))
    assert len(sequences) > 3


# Features


def test_features_are_transformed_and_scaled_by_hand(images):
    values = dict.fromkeys(FEATURE_COLUMNS, 0.0) | {
        "sharpness": [1, 2, 3, 4, 5, 99],  # median 3, quartiles 2 and 4
        "flux": [*np.expm1([1, 2, 3, 4, 5]), 1 - np.e**2],  # its logarithm, with its sign
        "peak": [1, 1, 1, 1, 1, np.inf],  # constant where it is fitted, then no value
        "mag": [-3, -2, -1, 0, 1, np.nan],
        "npix": [0, 0, 0, 0, 4, 1],  # quartiles alike: standard deviation instead
    }
    dataset = CutoutDataset(images, make_candidates({"small": [0] * 6}, **values))
    dataset.fit_features(np.arange(5))
    features = pd.DataFrame(dataset[np.arange(6)][1].numpy()).set_axis(
        [*FEATURE_COLUMNS, "no_mag"], axis=1
    )
    assert features["sharpness"].tolist() == [-1, -0.5, 0, 0.5, 1, 8]  # 8 is the limit
    np.testing.assert_allclose(features["flux"], [-1, -0.5, 0, 0.5, 1, -2.5], atol=1e-6)
    assert features["peak"].tolist() == [0] * 6
    assert features["mag"].tolist() == [-1, -0.5, 0, 0.5, 1, 0]
    np.testing.assert_allclose(features["npix"], [0, 0, 0, 0, 2.5, 0.625])
    assert features["no_mag"].tolist() == [0, 0, 0, 0, 0, 1]
    assert dataset[np.arange(6)][1].dtype == torch.float32


def test_columns_without_values_or_of_one_value_become_zero(images):
    """The standard deviation of a thousand times 0.1 is not quite 0, and was divided by."""
    columns = {"mag": np.nan, "flags": 0.1}
    dataset = CutoutDataset(images, make_candidates({"small": [0] * 1000}, **columns))
    dataset.fit_features(np.arange(1000))
    features = dataset[np.arange(1000)][1]
    assert (features[:, :-1] == 0).all()


def test_features_can_be_fitted_again(sample):
    once, twice = (CutoutDataset(sample, read_index(sample)) for _ in range(2))
    once.fit_features(np.arange(9))
    twice.fit_features(np.arange(30))
    different = twice[np.arange(9)][1]
    twice.fit_features(np.arange(9))
    assert torch.equal(once[np.arange(96)][1], twice[np.arange(96)][1])
    assert not torch.equal(different, twice[np.arange(9)][1])


def test_positions_and_truth_are_never_features():
    forbidden = {"id", "jid", "x", "y", "match", "image_filename", "label"}
    assert len(FEATURE_COLUMNS) == 9
    assert not forbidden & set(FEATURE_COLUMNS)


# Splits


@pytest.mark.parametrize("seed", range(20))
def test_split_is_by_job_and_has_both_classes_everywhere(seed):
    # Three jobs alone have real candidates: each split gets one of them.
    candidates = make_candidates({f"jid{n}": [0, 0, int(n < 3)] for n in range(13)})
    split = training.split_candidates(candidates, seed)
    parts = candidates.groupby(split)
    assert parts["label"].sum().to_dict() == {"train": 1, "validation": 1, "test": 1}
    assert parts["jid"].nunique().to_dict() == {"train": 7, "validation": 3, "test": 3}


def test_jobs_of_one_class_are_split_too():
    jobs = {f"jid{n}": [n % 2] * 2 for n in range(6)}
    split = training.split_candidates(make_candidates(jobs), seed=0)
    assert sorted(split) == ["test"] * 4 + ["train"] * 4 + ["validation"] * 4


@pytest.mark.parametrize(
    "labels", [("0001", "0001", "11", *["000"] * 3), ("0001", "1", "1", *["000"] * 4)]
)
@pytest.mark.parametrize("seed", range(9))
def test_jobs_of_one_class_fill_up_what_those_of_both_leave(labels, seed, caplog):
    candidates = make_candidates({f"jid{n}": [*map(int, text)] for n, text in enumerate(labels)})
    split = training.split_candidates(candidates, seed)
    assert candidates.groupby(split)["jid"].nunique().sum() == len(labels)
    assert candidates.groupby(split)["label"].nunique().to_dict() == dict.fromkeys(SPLITS, 2)
    assert caplog.text == ""


def test_split_depends_on_the_seed_alone():
    candidates = make_candidates({f"jid{n}": [0, 1] for n in range(12)})
    splits = [tuple(training.split_candidates(candidates, seed)) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(
    "jobs",
    [{"jid1": [0, 1] * 10}, {"jid1": [0, 1] * 10, "jid2": [0, 0]}],
    ids=["one job", "real in one job"],
)
def test_too_few_jobs_are_split_by_candidate_with_a_warning(jobs, caplog):
    candidates = make_candidates(jobs)
    split = training.split_candidates(candidates, seed=0)
    real = candidates.groupby(split)["label"].sum().to_dict()
    assert real == {"train": 6, "validation": 2, "test": 2}
    assert "too few jobs hold real and bogus candidates" in caplog.text


def test_too_few_candidates_cannot_be_split():
    candidates = make_candidates({"jid1": [1] * 9, "jid2": [0]})
    with pytest.raises(DatasetError, match=r"9 of 10 candidates are real; .* need a real and"):
        training.split_candidates(candidates, seed=0)


# Figures

HELD_OUT = np.repeat([1.0, 0.0], 50)  # labels of a validation split that is ranked without fault


def evaluate(
    labels: Sequence[float],
    network: Sequence[float],
    jobs: Sequence[int] | int = 0,
    flux: Sequence[float] | float = 0.0,
    held_out: tuple[np.ndarray, np.ndarray] = (HELD_OUT, HELD_OUT),
) -> dict[str, dict[str, list[float]]]:
    """Rate test candidates of which labels, scores and jobs are given, after a validation split."""
    count, before = len(labels), len(held_out[0])
    scores = {
        "network": np.append(held_out[1], network),
        "ranked by flux": np.append(np.zeros(before), np.broadcast_to(flux, count)),
    }
    return training.evaluate(
        np.append(held_out[0], np.asarray(labels, float)),
        np.append(np.full(before, 99), np.broadcast_to(jobs, count)),
        pd.DataFrame(scores),
        np.repeat(["validation", "test"], [before, count]),
        seed=1,
    )


def within_jobs(labels: np.ndarray, scores: np.ndarray, jobs: np.ndarray) -> float:
    """Return the fraction of pairs of a real and a bogus candidate of a job in the right order."""
    right = pairs = 0
    for job in np.unique(jobs):
        real, bogus = (scores[(jobs == job) & (labels == kind)] for kind in (1, 0))
        difference = real[:, None] - bogus
        right += (difference > 0).sum() + 0.5 * (difference == 0).sum()
        pairs += difference.size
    return right / pairs


@pytest.mark.parametrize(
    ("labels", "scores", "jobs", "expected"),
    [
        ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1], 0, (3 / 4, 3 / 4, (1 + 2 / 3) / 2)),
        ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1], [7, 7, 3, 3], (1, 3 / 4, (1 + 2 / 3) / 2)),
        ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.7], [7, 7, 3, 3], (3 / 4, 5 / 8, (1 + 1 / 2) / 2)),
        ([1, 0, 0, 0, 0], [0.0] * 5, 0, (0.5, 0.5, 0.2)),
        ([0, 1, 1], [np.nan, 0.1, -9], 0, (1, 1, 1)),  # no score is last
    ],
    ids=["one job", "two jobs", "tie", "all alike", "no score"],
)
def test_rankings_by_hand(labels, scores, jobs, expected):
    figures = evaluate(labels, np.zeros(len(labels)), jobs, flux=scores)["ranked by flux"]
    found = [figures[key][0] for key in ("roc_auc_within_jobs", "roc_auc", "average_precision")]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_rankings_are_those_of_scikit_learn_and_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    labels, jobs = (rng.random(500) < 0.1).astype(int), rng.integers(0, 4, 500)
    scores = np.round(rng.normal(labels + jobs, 1), 1)  # rounded: many ties
    scores[:3] = -np.inf
    finite = np.maximum(scores, -99)
    figures = evaluate(labels, scores, jobs)["network"]
    assert figures["roc_auc_within_jobs"][0] == pytest.approx(within_jobs(labels, finite, jobs))
    assert figures["roc_auc"][0] == pytest.approx(roc_auc_score(labels, finite))
    assert figures["average_precision"][0] == pytest.approx(average_precision_score(labels, finite))


def bootstrap(
    labels: np.ndarray, scores: np.ndarray, jobs: np.ndarray, flux: np.ndarray, draw_jobs: bool
) -> dict[str, np.ndarray]:
    """Return the intervals of 500 resamples, drawn and rated one by one."""
    rng, names, rows = np.random.default_rng(5), np.unique(jobs), []
    for _ in range(500):
        chosen = rng.choice(names, len(names)) if draw_jobs else names
        places = [np.flatnonzero(jobs == name) for name in chosen]
        drawn = np.concatenate([rng.choice(place, len(place)) for place in places])
        draw_of = np.repeat(np.arange(len(places)), [len(place) for place in places])
        real = labels[drawn]
        precision = average_precision_score(real, scores[drawn])
        rows.append(
            {
                "roc_auc_within_jobs": within_jobs(real, scores[drawn], draw_of),
                "roc_auc": roc_auc_score(real, scores[drawn]),
                "average_precision": precision,
                "behind": precision - average_precision_score(real, flux[drawn]),
            }
        )
    return pd.DataFrame(rows).quantile([0.025, 0.975]).to_dict("list")


@pytest.mark.parametrize(("job_count", "draw_jobs"), [(4, False), (12, True)])
def test_intervals_are_those_of_a_bootstrap(monkeypatch, job_count, draw_jobs):
    """Candidates are drawn within jobs; of ten jobs or more, the jobs too.

    A job that was drawn twice counted as one of twice the size, with four times as many pairs.
    """
    monkeypatch.setattr(training, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    jobs = np.repeat(np.arange(job_count), 30)
    labels = rng.random(len(jobs)) < rng.uniform(0.2, 0.8, job_count)[jobs]
    easy = np.where(jobs % 4, 0.4, 3)  # a job in four is easy
    scores, flux = rng.normal(labels * easy, 1), rng.normal(labels, 1)
    found = evaluate(labels, scores, jobs, flux)
    estimates = found["network"] | {"behind": found["ranked by flux"]["behind"]}
    for name, ends in bootstrap(labels, scores, jobs, flux, draw_jobs).items():
        tolerance = 0.12 * np.ptp(ends)
        np.testing.assert_allclose(estimates[name][1:], ends, atol=tolerance, err_msg=name)
        assert ends[0] < estimates[name][0] < ends[1]


def learned(
    labels: Sequence[float], scores: Sequence[float], jobs: Sequence[int]
) -> tuple[bool, dict]:
    """Say whether the verdict on test candidates is "learned", and return the network's figures."""
    rankings = evaluate(labels, scores, jobs)
    del rankings["calls"]
    verdict, text = training.reach_verdict(rankings, real=99, bogus=99)
    assert verdict == text.startswith("learned: ")
    return verdict, rankings["network"]


def draw_rates(rng: np.random.Generator, jobs: np.ndarray) -> np.ndarray:
    """Return a rate per candidate, log-uniform between 1 and 30 %, the same within a job."""
    return 10 ** rng.uniform(-2, np.log10(0.3), jobs.max() + 1)[jobs]


def permute_labels(rng: np.random.Generator, jobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = rng.normal(size=len(jobs))
    return rng.permutation(scores > np.quantile(scores, 0.9)), scores


def flip_coins(rng: np.random.Generator, jobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rates = draw_rates(rng, jobs)
    return rng.random(len(jobs)) < rates, np.log(rates) + rng.normal(0, 0.1, len(jobs))


def find_signal(rng: np.random.Generator, jobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.random(len(jobs)) < 0.1
    return labels, rng.normal(labels * 1.5, 1)


@pytest.mark.parametrize("job_count", [4, 12])
@pytest.mark.parametrize(
    ("draw", "trials", "least", "most"),
    [(permute_labels, 60, 0, 5), (flip_coins, 60, 0, 5), (find_signal, 10, 9, 10)],
)
def test_meaningless_labels_are_called_learned_in_few_trials(job_count, draw, trials, least, most):
    jobs = np.repeat(np.arange(job_count), 360 // job_count)
    found = [learned(*draw(np.random.default_rng(trial), jobs), jobs)[0] for trial in range(trials)]
    assert least <= sum(found) <= most


@pytest.mark.parametrize("job_count", [4, 12])
def test_scores_that_know_the_job_alone_are_not_learned(job_count):
    rng = np.random.default_rng(0)
    jobs = np.repeat(np.arange(job_count), 90)
    rates = np.linspace(0.05, 0.6, job_count)[jobs]
    verdict, figures = learned(rng.random(len(jobs)) < rates, rates, jobs)
    assert not verdict
    assert figures["roc_auc_within_jobs"] == pytest.approx([0.5, 0.5, 0.5])
    assert figures["roc_auc"][1] > 0.6  # of all candidates as one, it looks learned


@pytest.mark.parametrize(
    ("roc_auc", "behind", "real", "expected"),
    [
        ([0.9, 0.8, 0.95], [0.1, 0.05, 0.2], 9, "learned: ROC AUC within jobs 0.900 (0.800 to 0."),
        ([0.9, 0.8, 0.95], [0.1, 0.05, 0.2], 9, "better than logistic regression (average precisi"),
        ([0.9, 0.8, 0.95], [0.1, -0.1, 0.2], 9, "not clearly better than logistic regression"),
        ([0.9, 0.8, 0.95], [-0.1, -0.2, -0.1], 9, "; worse than logistic regression"),
        ([0.6, 0.5, 0.7], [0.1, 0.05, 0.2], 9, "not learned: ROC AUC within jobs 0.600 (0.500 to"),
        ([1, 1, 1], [0.1, 0.05, 0.2], 4, "cannot tell: 4 real and 9 bogus test candidates"),
    ],
)
def test_verdict(roc_auc, behind, real, expected):
    rankings = {
        "network": {"average_precision": [0.9, 0.8, 1], "behind": [0, 0, 0]},
        "logistic regression": {"average_precision": [0.8, 0.7, 0.9], "behind": behind},
        "ranked by flux": {"average_precision": [0.7, 0.6, 0.8], "behind": [0.2, 0.1, 0.3]},
    }
    rankings["network"] |= {"roc_auc_within_jobs": roc_auc, "roc_auc": [1, 1, 1]}
    is_learned, verdict = training.reach_verdict(rankings, real, bogus=9)
    assert expected in verdict
    assert is_learned == verdict.startswith("learned")


def test_calls_by_hand():
    labels, scores = np.array([1, 1, 1, 0, 0]), np.array([0.9, 0.5, 0.1, 0.5, 0.4])
    calls = evaluate(labels, scores, held_out=(HELD_OUT, HELD_OUT / 2))["calls"]
    assert {name: value for name, (value, _, _) in calls.items()} == pytest.approx(
        {
            "threshold": 0.5,
            **{"true_positives": 2, "false_negatives": 1, "false_positives": 1},
            **{"true_negatives": 1, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3},
        }
    )


def test_precision_is_0_if_nothing_is_called_real():
    calls = evaluate([1, 0], [0.9, 0.1], held_out=(HELD_OUT, HELD_OUT + 1))["calls"]
    assert (calls["precision"][0], calls["recall"][0], calls["f1"][0]) == (0, 0, 0)


def draw_scores(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels, a fifth of them real, and scores with many ties."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 5 == 0).astype(float)
    return labels, np.round(rng.normal(labels, 1), 1)


def test_threshold_has_the_highest_f1_of_the_validation_split():
    (labels, scores), (test, test_scores) = draw_scores(300, seed=0), draw_scores(200, seed=1)
    calls = evaluate(test, test_scores, held_out=(labels, scores))["calls"]
    threshold = calls["threshold"][0]
    best = max(f1_score(labels, scores >= value) for value in np.unique(scores))
    assert f1_score(labels, scores >= threshold) == best
    for name, function in {"precision": precision_score, "recall": recall_score}.items():
        value, low, high = calls[name]
        assert value == pytest.approx(function(test, test_scores >= threshold))
        assert low < value < high


def test_intervals_of_the_calls_know_that_the_threshold_is_a_guess():
    test = draw_scores(500, seed=1)
    few, many = (
        evaluate(*test, held_out=draw_scores(count, seed=0))["calls"] for count in (80, 4000)
    )
    for name in ("threshold", "precision", "recall"):
        assert np.diff(few[name][1:]) > 1.3 * np.diff(many[name][1:])


# Learning


@pytest.fixture
def batches(monkeypatch) -> list[tuple[bool, torch.Tensor, torch.Tensor]]:
    """Return whether in training, cutouts and features of each batch that the network is given."""
    seen: list[tuple[bool, torch.Tensor, torch.Tensor]] = []
    forward = training.RealBogusNetwork.forward

    def spy(network, cutouts, features):
        seen.append((network.training, cutouts.clone(), features.clone()))
        return forward(network, cutouts, features)

    monkeypatch.setattr(training.RealBogusNetwork, "forward", spy)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # for float32
    monkeypatch.setattr(training, "VIEWS", 1)
    return seen


class Known:
    """What the network should be given of a dataset; candidates are known by their features."""

    def __init__(self, dataset: Path) -> None:
        index = read_index(dataset)
        self.split = training.split_candidates(index, seed=1)
        known = CutoutDataset(dataset, index)
        known.fit_features(np.flatnonzero(self.split == "train"))
        self.cutouts, self.features, self.labels = known[np.arange(len(index))]
        self.rows = {tuple(values): row for row, values in enumerate(self.features.tolist())}

    def rows_of(self, features: torch.Tensor) -> list[int]:
        return [self.rows[tuple(values)] for values in features.tolist()]


def test_training_sees_its_split_in_another_order_each_epoch(sample, batches):
    assert run(training, "-d", sample, "--epochs", "2", "--batch_size", "16", "--seed", "1") == 0
    known = Known(sample)
    rows, held_out, test = (np.flatnonzero(known.split == name).tolist() for name in SPLITS)
    seen: dict[bool, list[int]] = {True: [], False: []}
    for is_training, _, features in batches:
        seen[is_training] += known.rows_of(features)
    first, second = seen[True][:48], seen[True][48:]
    assert sorted(first) == sorted(second) == rows
    assert rows != first != second
    assert seen[False] == [*held_out, *held_out, *rows, *held_out, *test]


@pytest.mark.parametrize(("batch_size", "sizes"), [(128, [48]), (47, [48]), (10, [12] * 4)])
def test_no_batch_is_much_smaller_than_the_others(sample, batches, batch_size, sizes):
    assert run(training, "-d", sample, "--epochs", "1", "--batch_size", str(batch_size)) == 0
    assert [len(features) for is_training, _, features in batches if is_training] == sizes


def test_cutouts_are_trained_on_in_all_eight_orientations(sample, batches):
    assert run(training, "-d", sample, "--epochs", "3", "--seed", "1") == 0
    known = Known(sample)
    turns: list[Callable] = [partial(torch.rot90, k=k, dims=(1, 2)) for k in range(4)]
    turns += [lambda cutout, turn=turn: turn(cutout).flip(2) for turn in turns]
    used, found = set(), []
    for is_training, cutouts, features in batches:
        for cutout, row in zip(cutouts, known.rows_of(features), strict=True):
            (turn,) = (n for n in range(8) if torch.equal(cutout, turns[n](known.cutouts[row])))
            assert is_training or turn == 0
            used |= {turn}
            found += [(row, turn)] if is_training else []
    assert used == set(range(8))
    assert len(set(found)) > 96  # 48 candidates, hardly ever the same way in three epochs


def test_long_trainings_blend_candidates_and_short_ones_do_not(sample, batches, monkeypatch):
    monkeypatch.setattr(training, "MIXUP_EPOCHS", 3)
    blended = {}
    for epochs in ("2", "3"):
        batches.clear()
        assert run(training, "-d", sample, "--epochs", epochs, "--seed", "1") == 0
        known = set(Known(sample).rows)
        given = [
            f for is_training, _, features in batches if is_training for f in features.tolist()
        ]
        blended[epochs] = np.mean([tuple(values) not in known for values in given])
    assert blended["2"] == 0
    assert blended["3"] > 0.9


class Fixed(training.RealBogusNetwork):
    """A network that gives the same logit to every candidate."""

    LOGIT = -3.0

    def forward(self, cutouts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.head[-1].bias * 0 + self.LOGIT * torch.ones(len(cutouts))


class BestInTwoEpochs(training.RealBogusNetwork):
    """A network that ranks by sharpness after two or three epochs of one batch, else against it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("epochs", torch.zeros(1))

    def forward(self, cutouts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.epochs += 1
        sign = 1 if self.epochs.item() in (2, 3) else -1
        return self.head[-1].bias * 0 + sign * features[:, 0]


def test_the_last_of_the_best_epochs_is_kept(sample_copy, monkeypatch):
    edit_index(
        sample_copy, lambda index: index.assign(sharpness=index["label"] + index["id"] / 1e3)
    )
    assert describe(sample_copy) == 0
    monkeypatch.setattr(training, "RealBogusNetwork", BestInTwoEpochs)
    metrics = read_metrics(sample_copy, "--epochs", "4")
    assert metrics["best_epoch"] == 3
    precisions = [row["average_precision"] for row in metrics["history"]]
    assert precisions[1:3] == [1, 1] > [precisions[0], precisions[3]]
    assert metrics["rankings"]["network"]["average_precision"][0] == 1
    model = torch.load(sample_copy / "report" / "model.pt", weights_only=True)
    assert model["weights"]["epochs"].item() == 3


def test_both_classes_weigh_the_same(tmp_path, monkeypatch):
    jobs = {f"jid{number}": [0, 0, 0, 1] * 12 for number in range(3)}
    dataset = write_dataset(tmp_path / "dataset", jobs)
    monkeypatch.setattr(training, "RealBogusNetwork", Fixed)
    (epoch,) = read_metrics(dataset, "--epochs", "1")["history"]
    expected = (3 * np.log1p(np.exp(3)) + 3 * np.log1p(np.exp(-3))) / 4
    assert epoch["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert epoch["validation_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "batch_size", "epochs"), [(24, 128, 60), (24, 3, 34), (24, 2, 23), (1000, 2, 1)]
)
def test_epochs_are_what_550_steps_need(tmp_path, sample, monkeypatch, count, batch_size, epochs):
    if count != 24:
        jobs = {f"jid{number}": [0, 1] * (count // 2) for number in range(3)}
        sample = write_dataset(tmp_path / "dataset", jobs, shape=(8, 8))
    monkeypatch.setattr(training, "RealBogusNetwork", Fixed)
    report = tmp_path / "report"
    options = "-d", sample, "--batch_size", str(batch_size), "--report_dir", report
    assert run(training, *options) == 0
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["settings"]["epochs"] == len(metrics["history"]) == epochs


def test_a_loss_that_is_not_finite(sample, capsys, monkeypatch):
    monkeypatch.setattr(training, "RealBogusNetwork", Fixed)
    monkeypatch.setattr(Fixed, "LOGIT", float("nan"))
    assert run(training, "-d", sample, "--epochs", "3") == 1
    assert "the loss is not finite any more: try a lower --learning_rate" in capsys.readouterr().err


def test_bfloat16_gives_about_the_same_logits_and_few_ties(cutouts):
    torch.manual_seed(0)
    network = training.RealBogusNetwork().eval()
    squares, features, _ = cutouts[np.arange(96)]
    with torch.inference_mode():
        exact, fast = (
            network(squares.to(dtype), features).numpy()
            for dtype in (torch.float32, torch.bfloat16)
        )
    assert exact.dtype == fast.dtype == np.float32
    np.testing.assert_allclose(fast, exact, atol=0.05 * np.ptp(exact))
    assert len(np.unique(fast)) > 80


def test_logistic_regression_is_that_of_scikit_learn(tmp_path):
    rng = np.random.default_rng(0)
    jobs = {f"jid{number}": [0, 0, 0, 1] * 15 for number in range(6)}
    labels = np.concatenate([*jobs.values()])
    columns = {name: rng.normal(labels * 0.7, 1) for name in FEATURE_COLUMNS[:3]}
    dataset = write_dataset(tmp_path / "dataset", jobs, shape=(8, 8), **columns)
    metrics = read_metrics(dataset, "--epochs", "1", "--seed", "1")
    known = Known(dataset)
    rows, test = (known.split == name for name in ("train", "test"))
    labels, features = known.labels.numpy(), known.features.numpy()
    weights = np.where(labels == 1, 3.0, 1.0)  # as many bogus candidates per real one
    model = LogisticRegression(C=1 / (2 * 1e-4 * rows.sum()), tol=1e-8, max_iter=10_000)
    model.fit(features[rows], labels[rows], weights[rows])
    logits = model.decision_function(features)[test]
    found = metrics["rankings"]["logistic regression"]
    assert found["roc_auc"][0] == pytest.approx(roc_auc_score(labels[test], logits), abs=0.01)
    precision = average_precision_score(labels[test], logits)
    assert found["average_precision"][0] == pytest.approx(precision, abs=0.01)
    assert found["average_precision"][0] > 0.4


def blank_images(dataset: Path) -> None:
    for path in (dataset / "images").iterdir():
        np.save(path, np.full((72, 80, 4), 0.5, np.float32))


def brighten_real_candidates(dataset: Path) -> None:
    """Make noise of every tensor and put a blob where the index says real."""
    rows, columns = np.mgrid[:72, :80]
    rng = np.random.default_rng(0)
    for name, candidates in read_index(dataset).groupby("image_filename"):
        tensor = rng.uniform(0, 0.2, (72, 80, 4)).astype(np.float32)
        for x, y in candidates.loc[candidates["label"] == 1, ["x", "y"]].to_numpy():
            blob = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 2)
            tensor[..., 2] = np.maximum(tensor[..., 2], blob)
        np.save(dataset / name, tensor)


def test_the_network_learns_what_can_only_be_seen_in_the_pixels(sample_copy):
    brighten_real_candidates(sample_copy)
    metrics = read_metrics(sample_copy, "--epochs", "40", "--batch_size", "24")
    precisions = {n: f["average_precision"][0] for n, f in metrics["rankings"].items()}
    assert metrics["learned"]
    assert precisions["network"] > 0.9
    assert precisions["network"] > precisions["ranked by flux"] + 0.2
    assert precisions["network"] > precisions["logistic regression"] + 0.2


def test_the_network_learns_what_can_only_be_seen_in_the_features(sample_copy):
    edit_index(
        sample_copy, lambda index: index.assign(sharpness=0.2 + 0.5 * index["label"], flux=0.0)
    )
    assert describe(sample_copy) == 0
    blank_images(sample_copy)
    metrics = read_metrics(sample_copy, "--epochs", "40", "--batch_size", "12")
    rankings = metrics["rankings"]
    assert metrics["learned"]
    assert rankings["network"]["average_precision"][0] > 0.9
    assert rankings["logistic regression"]["average_precision"] == [1, 1, 1]
    assert rankings["ranked by flux"]["roc_auc_within_jobs"] == [0.5, 0.5, 0.5]
    assert metrics["base_rate"] == 0.5


def test_the_learning_rate_goes_up_and_down_once(sample, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(optimizer, *arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    options = "--epochs", "5", "--batch_size", "8", "--learning_rate", "0.01"
    assert run(training, "-d", sample, *options) == 0
    assert len(rates) == 30
    assert max(rates) == pytest.approx(0.01, rel=0.02)
    highest = rates.index(max(rates))
    assert all(a < b for a, b in pairwise(rates[: highest + 1]))
    assert all(a > b for a, b in pairwise(rates[highest:]))
