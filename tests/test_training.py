"""test_croissant_dataset.py: cutouts, features, splits, rankings, the network and its training."""

import io
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import training_args
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch.utils.data import DataLoader, Subset

import test_croissant_dataset as training
from test_croissant_dataset import FEATURE_COLUMNS, DatasetError

FLUX, PEAK, MAG = (FEATURE_COLUMNS.index(name) for name in ("flux", "peak", "mag"))


def make_candidates(labels_of_jobs: dict[str, list[int]], **columns: object) -> pd.DataFrame:
    jid = np.repeat(list(labels_of_jobs), [len(labels) for labels in labels_of_jobs.values()])
    label = np.concatenate(list(labels_of_jobs.values())).astype(float)
    candidates = pd.DataFrame({"jid": jid, "image_filename": [f"images/{j}.npy" for j in jid]})
    candidates[["id", "x", "y", *FEATURE_COLUMNS]] = 0.0
    return candidates.assign(match=np.where(label == 1, 5.0, -1.0), label=label, **columns)


# Every pixel of this image says where it is: 1 + row * 1000 + column, the same in each channel.
PIXELS = 1 + np.arange(100)[:, None] * 1000.0 + np.arange(120)
IMAGE = np.repeat(PIXELS[..., None], 4, axis=2).astype(np.float32)


def cut_out(image: np.ndarray, x: float, y: float) -> np.ndarray:
    square = np.zeros((64, 64, 4), np.float32)
    file = training.TensorFile(Path("x.npy"), *image.shape[:2], offset=5)
    handle = io.BytesIO(b"*****" + image.tobytes())
    training.read_cutout(handle, file, np.array([x, y]), square)
    return square


@pytest.mark.parametrize("x", [0, 31, 32, 50.4, 87, 88, 119, -0.5])
@pytest.mark.parametrize("y", [0, 31, 32, 50.5, 67, 68, 99])
def test_cutout_is_centred_and_zero_off_the_image(x, y):
    square = cut_out(IMAGE, x, y)
    row, column = int(np.floor(y + 0.5)), int(np.floor(x + 0.5))
    padded = np.pad(IMAGE, ((64, 64), (64, 64), (0, 0)))
    np.testing.assert_array_equal(square, padded[row + 32 : row + 96, column + 32 : column + 96])
    assert square[32, 32, 0] == 1 + row * 1000 + column


def test_cutout_of_a_small_image_keeps_it_whole():
    square = cut_out(IMAGE[:3, :5], x=4, y=0)
    np.testing.assert_array_equal(square[32:35, 28:33], IMAGE[:3, :5])
    assert np.count_nonzero(square) == 3 * 5 * 4


def test_features_are_transformed_by_hand():
    candidates = make_candidates({"jid1": [0, 0]})
    candidates["flux"] = [np.e - 1, 1 - np.e**2]
    candidates["peak"] = [0, np.inf]
    candidates["mag"] = [-3, np.nan]
    values = training.transform_features(candidates)
    np.testing.assert_allclose(values[:, FLUX], [1, -2])
    np.testing.assert_array_equal(values[:, PEAK], [0, np.nan])
    np.testing.assert_array_equal(values[:, MAG], [-3, np.nan])
    np.testing.assert_array_equal(values[:, 9], [0, 1])
    assert candidates["flux"][0] == np.e - 1


def test_scaling_is_median_and_interquartile_range_and_ignores_what_is_missing():
    values = np.array([[1, 5], [2, 5], [3, 5], [4, 5], [5, np.nan]])
    center, scale = training.fit_scaling(values)
    assert center.tolist() == [3, 5]
    assert scale.tolist() == [2, 1]
    scaled = training.scale_features(np.array([[5, np.nan], [99, 6]]), center, scale)
    assert scaled.tolist() == [[1, 0], [training.FEATURE_LIMIT, 1]]
    assert scaled.dtype == np.float32


def test_scaling_survives_columns_without_values_or_of_one_value():
    """The standard deviation of a thousand times 0.1 is not quite 0, and was divided by."""
    values = np.full((1000, 2), (np.nan, 0.1))
    center, scale = training.fit_scaling(values)
    assert (center.tolist(), scale.tolist()) == ([0, 0.1], [1, 1])
    assert not training.scale_features(values, center, scale).any()


def test_features_can_be_fitted_again(described):
    candidates = training.read_candidates(described)
    once, twice = (training.CutoutDataset(described, candidates) for _ in range(2))
    once.fit_features(np.arange(9))
    twice.fit_features(np.arange(30))
    twice.fit_features(np.arange(9))
    assert torch.equal(once.features, twice.features)


@pytest.mark.parametrize("seed", range(20))
def test_split_is_by_job_and_has_both_classes_everywhere(seed):
    # Three jobs alone have real candidates: each split gets one of them.
    candidates = make_candidates({f"jid{n}": [0, 0, int(n < 3)] for n in range(13)})
    split = training.split_candidates(candidates, seed)
    parts = candidates.groupby(split)
    assert parts["label"].sum().to_dict() == {"train": 1, "validation": 1, "test": 1}
    assert parts["jid"].nunique().to_dict() == {"train": 7, "validation": 3, "test": 3}
    assert (candidates.groupby("jid")["label"].size() == 3).all()
    assert parts["jid"].nunique().sum() == 13


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
    assert candidates.groupby("jid")["label"].size().size == len(labels)
    assert candidates.groupby(split)["jid"].nunique().sum() == len(labels)
    assert caplog.text == ""


def test_split_depends_on_the_seed_alone():
    candidates = make_candidates({f"jid{n}": [0, 1] for n in range(12)})
    splits = [tuple(training.split_candidates(candidates, seed)) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(
    "jobs",
    [{"jid1": [0, 1] * 10}, {"jid1": [0, 1] * 10, "jid2": [0, 0]}, {"jid1": [1] * 9, "jid2": [0]}],
    ids=["one job", "real in one job", "one class a job"],
)
def test_too_few_jobs_are_split_by_candidate_with_a_warning(jobs, caplog):
    candidates = make_candidates(jobs)
    if len(candidates) == 10:
        with pytest.raises(DatasetError, match=r"9 of 10 candidates are real; .* need a real and"):
            training.split_candidates(candidates, seed=0)
    else:
        split = training.split_candidates(candidates, seed=0)
        real = candidates.groupby(split)["label"].sum().to_dict()
        assert real == {"train": 6, "validation": 2, "test": 2}
    assert "too few jobs hold real and bogus candidates" in caplog.text


def test_a_quick_look_takes_as_many_of_each_job():
    candidates = make_candidates({"jid1": [0] * 50, "jid2": [0] * 5, "jid3": [0] * 50})
    candidates["id"] = np.arange(105.0)
    few = training.thin(candidates, 45, seed=1)
    assert few["jid"].value_counts().to_dict() == {"jid1": 20, "jid2": 5, "jid3": 20}
    assert few["id"].is_monotonic_increasing
    assert few.index.tolist() == list(range(45))
    assert few["id"].max() > 90  # at random, not the first of each
    pd.testing.assert_frame_equal(training.thin(candidates, 999, seed=1), candidates)


def rank(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    return training.rank_scores(labels, training.sort_scores(scores))


def test_scores_by_hand():
    roc_auc, average_precision = rank(np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1]))
    assert roc_auc == pytest.approx(3 / 4)  # one of the four pairs is the wrong way round
    assert average_precision == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_equal_scores_rank_like_chance():
    assert rank(np.array([1, 0, 0, 0, 0]), np.zeros(5)) == pytest.approx((0.5, 0.2))


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn_also_with_weights(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random(500) < 0.1).astype(int)
    scores = np.round(rng.normal(labels, 1), 1)  # rounded: many ties
    scores[:3] = -np.inf
    weights = rng.integers(0, 3, 500).astype(float)
    ranking, finite = training.sort_scores(scores), np.maximum(scores, -99)
    for weight in (None, weights):
        ours = training.rank_scores(labels, ranking, weight)
        expected = [
            function(labels, finite, sample_weight=weight)
            for function in (roc_auc_score, average_precision_score)
        ]
        assert ours == pytest.approx(tuple(expected))


def test_few_jobs_are_resampled_by_candidate_within_each_class():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    drawn = list(training.resample(labels, np.array(["jid1"] * 8), seed=0))
    assert len(drawn) == training.RESAMPLES
    assert all(weights[:3].sum() == 3 and weights[3:].sum() == 5 for weights in drawn)
    assert np.mean(drawn, axis=0) == pytest.approx(np.ones(8), abs=0.15)


def test_many_jobs_are_resampled_whole_and_never_without_a_class():
    labels, jobs = np.tile([1, 0, 0], 12), np.repeat([f"jid{n}" for n in range(12)], 3)
    labels[3:] = 0  # real in one job alone: a third of all draws would miss it
    for weights in training.resample(labels, jobs, seed=0):
        assert weights[0] > 0
        assert (weights.reshape(12, 3) == weights.reshape(12, 3)[:, :1]).all()
        assert weights.sum() == 36


def make_test_split(count: int, signal: float, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = np.tile([1.0, 0, 0, 0], count // 4)
    ranked = {c: rng.normal(label * signal, 1) for c in ("score", "regression", "flux")}
    return pd.DataFrame({"label": label, "jid": "jid1", **ranked})


def test_intervals_are_the_percentiles_of_the_resamples():
    test = make_test_split(400, signal=1)
    test.loc[5, "flux"] = np.nan
    compared = training.compare_rankings(test, seed=3)
    label, score, flux = (test[c].fillna(-99).to_numpy() for c in ("label", "score", "flux"))
    drawn = []
    for weights in training.resample(label, test["jid"], seed=3):
        one, other = (
            average_precision_score(label, s, sample_weight=weights) for s in (score, flux)
        )
        drawn.append((one, one - other))
    (low, less), (high, more) = np.percentile(drawn, (2.5, 97.5), axis=0)
    value, worse = (average_precision_score(label, s) for s in (score, flux))
    assert compared["network"]["average_precision"] == pytest.approx([value, low, high])
    assert compared["ranked by flux"]["behind"] == pytest.approx([value - worse, less, more])
    assert compared["network"]["roc_auc"][0] == pytest.approx(roc_auc_score(label, score))


def test_chance_is_called_learned_in_few_trials():
    learned = 0
    for seed in range(60):
        test = make_test_split(60, signal=0, seed=seed)
        learned += training.reach_verdict(training.compare_rankings(test, seed), 15, 45)[0]
    assert learned <= 6  # 2.5 % are meant


@pytest.mark.parametrize(
    ("roc_auc", "behind", "real", "expected"),
    [
        ([0.9, 0.8, 0.95], [0.1, 0.05, 0.2], 9, "learned: ROC AUC 0.900 (0.800 to 0.950)"),
        ([0.9, 0.8, 0.95], [0.1, 0.05, 0.2], 9, "better than logistic regression (average precisi"),
        (
            [0.9, 0.8, 0.95],
            [0.1, -0.1, 0.2],
            9,
            "not clearly better than logistic regression",
        ),
        ([0.9, 0.8, 0.95], [-0.1, -0.2, -0.1], 9, "; worse than logistic regression"),
        ([0.6, 0.5, 0.7], [0.1, 0.05, 0.2], 9, "not learned: ROC AUC 0.600 (0.500 to 0.700)"),
        ([1, 1, 1], [0.1, 0.05, 0.2], 4, "cannot tell: 4 real and 9 bogus test candidates"),
    ],
)
def test_verdict(roc_auc, behind, real, expected):
    rankings = {
        "network": {"roc_auc": roc_auc, "average_precision": [0.9, 0.8, 1], "behind": [0, 0, 0]},
        "logistic regression": {"average_precision": [0.8, 0.7, 0.9], "behind": behind},
        "ranked by flux": {"average_precision": [0.7, 0.6, 0.8], "behind": [0.2, 0.1, 0.3]},
    }
    learned, verdict = training.reach_verdict(rankings, real, bogus=9)
    assert expected in verdict
    assert learned == verdict.startswith("learned")


def test_threshold_has_the_highest_f1():
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.2).astype(int)
    scores = np.round(rng.normal(labels, 1), 1)
    threshold = training.choose_threshold(labels, scores)
    best = max(f1_score(labels, scores >= value) for value in np.unique(scores))
    assert f1_score(labels, scores >= threshold) == best


def test_calls_by_hand():
    labels, scores = np.array([1, 1, 1, 0, 0]), np.array([0.9, 0.5, 0.1, 0.5, 0.4])
    calls = training.call(labels, scores, 0.5)
    assert calls == {
        "threshold": 0.5,
        **{"true_positives": 2, "false_negatives": 1, "false_positives": 1, "true_negatives": 1},
        **{"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3},
    }
    assert training.call(labels, scores, 2)["precision"] == 0


def test_augmentation_gives_all_eight_orientations_of_all_channels():
    torch.manual_seed(0)
    square = torch.arange(4 * 9, dtype=torch.float32).reshape(4, 3, 3)
    turned = training.augment(square.repeat(200, 1, 1, 1))
    turns = [torch.rot90(square, k, dims=(1, 2)) for k in range(4)]
    expected = {tuple(t.flatten().tolist()) for t in turns + [t.flip(2) for t in turns]}
    assert len(expected) == 8
    assert {tuple(t.flatten().tolist()) for t in turned} == expected


def test_candidates_come_from_mlcroissant_in_the_order_of_the_index(described):
    candidates = training.read_candidates(described)
    index = pd.read_csv(described / "master_index.csv")
    pd.testing.assert_frame_equal(
        candidates[index.columns.tolist()], index, check_dtype=False, check_exact=True
    )


def test_positions_and_truth_are_never_features():
    forbidden = {"id", "jid", "x", "y", "match", "image_filename", "label"}
    assert not forbidden & set(FEATURE_COLUMNS)


@pytest.fixture
def cutouts(described) -> training.CutoutDataset:
    """Return a dataset whose features are the number of the candidate."""
    dataset = training.CutoutDataset(described, training.read_candidates(described))
    dataset.features = torch.arange(48.0)[:, None].repeat(1, 10)
    return dataset


def test_dataset_gives_cutout_features_and_label(cutouts, described):
    square, features, label = cutouts[15]
    image, row = np.load(described / "images" / "jid002.npy"), cutouts.candidates.iloc[15]
    np.testing.assert_array_equal(square.permute(1, 2, 0), cut_out(image, row["x"], row["y"]))
    assert (features.tolist(), label.item(), len(cutouts)) == ([15.0] * 10, 1.0, 48)


def test_a_batch_is_its_candidates_one_by_one(cutouts):
    rows = [40, 3, 15, 3]
    for part, (values, *others) in enumerate(zip(*(cutouts[row] for row in rows), strict=True)):
        np.testing.assert_array_equal(cutouts[rows][part], torch.stack([values, *others]))
    assert cutouts[rows][0].is_contiguous(memory_format=torch.channels_last)


def test_it_serves_a_training_of_the_users_own(described):
    candidates = training.read_candidates(described)
    dataset = training.CutoutDataset(described, candidates)
    rows = np.flatnonzero(training.split_candidates(candidates, seed=1) == "train")
    dataset.fit_features(rows)
    loader = DataLoader(Subset(dataset, rows), batch_size=5, shuffle=True)
    seen = [(*square.shape, *features.shape, *label.shape) for square, features, label in loader]
    assert seen == [(5, 4, 64, 64, 5, 10, 5)] * 4 + [(4, 4, 64, 64, 4, 10, 4)]
    assert all(torch.isfinite(features).all() for _, features, _ in loader)


def test_memory_does_not_grow_with_the_pixels(tmp_path):
    """Of a tensor of 134 MB, nothing but the cutouts is kept, or mapped, or read."""
    (tmp_path / "images").mkdir()
    image = np.lib.format.open_memmap(
        tmp_path / "images" / "jid1.npy", mode="w+", dtype=np.float32, shape=(2900, 2900, 4)
    )
    del image
    places = np.linspace(0, 2899, 300)
    candidates = make_candidates({"jid1": [0] * 300}, x=places, y=places)
    dataset = training.CutoutDataset(tmp_path, candidates)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for row in range(300):
        assert dataset[row][0].max() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_more_tensors_than_file_descriptors_can_be_read(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    candidates = make_candidates({f"jid{n}": [0] for n in range(300)})
    (tmp_path / "images").mkdir()
    for name in candidates["image_filename"]:
        np.save(tmp_path / name, np.zeros((4, 4, 4), np.float32))
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        dataset = training.CutoutDataset(tmp_path, candidates)
        assert dataset[list(range(300))][0].shape == (300, 4, 64, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def split_by_hand(dataset: training.CutoutDataset) -> None:
    dataset.candidates["split"] = np.repeat(["train", "validation", "test"], [24, 12, 12])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_training_split_and_validation_the_other(cutouts, monkeypatch, workers):
    split_by_hand(cutouts)
    seen: dict[bool, list[int]] = {True: [], False: []}
    forward = training.RealBogusNetwork.forward

    def spy(network, squares, features):
        seen[network.training] += features[:, 0].int().tolist()
        return forward(network, squares, features)

    monkeypatch.setattr(training.RealBogusNetwork, "forward", spy)
    training.train(cutouts, training_args(epochs=2, batch_size=10, workers=workers))
    first, second = seen[True][:24], seen[True][24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert list(range(24)) != first != second
    assert seen[False] == [*range(24, 36)] * 2


def test_a_leftover_of_one_is_dropped(cutouts, monkeypatch):
    split_by_hand(cutouts)
    sizes = []
    augment = training.augment
    monkeypatch.setattr(training, "augment", lambda x: sizes.append(len(x)) or augment(x))
    training.train(cutouts, training_args(epochs=1, batch_size=23))
    assert sizes == [23]


def test_the_best_epoch_is_kept(cutouts, monkeypatch):
    split_by_hand(cutouts)
    precisions, weights = [0.2, 0.7, 0.7, 0.4], []

    def learn(network, *others):
        for precision in precisions:
            with torch.no_grad():
                network.head[0].bias += 1
            weights.append(network.head[0].bias.clone())
            yield dict.fromkeys(("train_loss", "validation_loss", "roc_auc"), 0.5) | {
                "epoch": len(weights),
                "average_precision": precision,
            }

    monkeypatch.setattr(training, "learn", learn)
    network, history = training.train(cutouts, training_args(epochs=4))
    assert torch.equal(network.head[0].bias, weights[1])
    assert training.find_best(history)["epoch"] == 2


def test_both_classes_weigh_the_same():
    loss_function = training.equal_loss(torch.tensor([1.0, 0, 0, 0]))
    real, bogus = (
        loss_function(torch.tensor([-3.0]), torch.tensor([label])).item() for label in (1.0, 0.0)
    )
    expected = np.log1p(np.exp(3)), np.log1p(np.exp(-3))
    assert (real, bogus) == pytest.approx((3 * expected[0], expected[1]))


def test_a_score_does_not_depend_on_the_rest_of_its_batch(cutouts):
    torch.manual_seed(0)
    network, rows = training.RealBogusNetwork(), np.arange(6)
    together, alone = (
        training.predict(network, cutouts, rows, training_args(batch_size=size)) for size in (6, 1)
    )
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_bfloat16_gives_about_the_same_logits_and_few_ties(cutouts):
    torch.manual_seed(0)
    network, rows = training.RealBogusNetwork(), np.arange(48)
    exact, fast = (
        training.predict(network, cutouts, rows, training_args(dtype=dtype)).numpy()
        for dtype in (torch.float32, torch.bfloat16)
    )
    np.testing.assert_allclose(fast, exact, atol=0.05 * np.ptp(exact))
    assert len(np.unique(fast)) > 40


def test_logistic_regression_is_that_of_scikit_learn(cutouts):
    rng = np.random.default_rng(0)
    cutouts.features = torch.from_numpy(rng.normal(size=(48, 10)).astype(np.float32))
    rows = np.arange(40)
    logits = training.regress(cutouts, rows)
    labels, features = cutouts.labels.numpy(), cutouts.features.numpy()
    weights = np.where(labels == 1, 30 / 10, 1.0)[rows]  # as pos_weight does
    strength = 1 / (2 * training.RIDGE * len(rows))
    model = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000)
    model.fit(features[rows], labels[rows], weights)
    np.testing.assert_allclose(logits, model.decision_function(features), atol=0.2)
    assert average_precision_score(labels[rows], logits[rows]) > 0.4


@pytest.mark.parametrize(
    ("count", "batch_size", "epochs"), [(9000, 128, 8), (1000, 128, 39), (100, 128, 60)]
)
def test_small_datasets_are_trained_for_more_epochs(count, batch_size, epochs):
    assert training.choose_epochs(count, batch_size) == epochs
