"""test_croissant_dataset.py: cutouts, features, splits, metrics, training, and what it refuses."""

import hashlib
import json
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CUT_HEADER
from sklearn.metrics import average_precision_score, roc_auc_score

import generate_croissant
import test_croissant_dataset as training
from test_croissant_dataset import FEATURE_COLUMNS, DatasetError

PEAK, FLUX, MAG = (FEATURE_COLUMNS.index(name) for name in ("peak", "flux", "mag"))


def make_candidates(labels_of_jobs: dict[str, list[int]]) -> training.Candidates:
    jid = np.repeat(list(labels_of_jobs), [len(labels) for labels in labels_of_jobs.values()])
    zeros = np.zeros(len(jid))
    return training.Candidates(
        jid=jid,
        image=np.char.add(np.char.add("images/", jid), ".npy"),
        x=zeros,
        y=zeros,
        label=np.concatenate(list(labels_of_jobs.values())).astype(np.float32),
        features=np.zeros((len(jid), len(FEATURE_COLUMNS)), np.float32),
    )


# Every pixel of this image says where it is: 1 + row * 1000 + column, the same in each channel.
PIXELS = 1 + np.arange(100)[:, None] * 1000.0 + np.arange(120)
IMAGE = np.repeat(PIXELS[..., None], 4, axis=2).astype(np.float32)


@pytest.mark.parametrize("x", [0, 31, 32, 50.4, 87, 88, 119, -0.5])
@pytest.mark.parametrize("y", [0, 31, 32, 50.5, 67, 68, 99])
def test_cutout_is_centred_and_zero_off_the_image(x, y):
    square = training.cut_out(IMAGE, x, y)
    row, column = int(np.floor(y + 0.5)), int(np.floor(x + 0.5))
    padded = np.pad(IMAGE, ((64, 64), (64, 64), (0, 0)))
    expected = padded[row + 32 : row + 96, column + 32 : column + 96]
    np.testing.assert_array_equal(square, expected)
    assert square[32, 32, 0] == 1 + row * 1000 + column
    assert square.shape == (64, 64, 4)
    assert square.dtype == np.float32


def test_cutout_of_a_small_image_keeps_it_whole():
    square = training.cut_out(IMAGE[:3, :5], x=4, y=0)
    np.testing.assert_array_equal(square[32:35, 28:33], IMAGE[:3, :5])
    assert np.count_nonzero(square) == 3 * 5 * 4


def test_features_are_transformed_by_hand():
    features = np.zeros((2, 9), np.float32)
    features[:, FLUX] = [np.e - 1, 1 - np.e**2]
    features[:, PEAK] = [0, np.inf]
    features[:, MAG] = [-3, np.nan]
    values = training.transform_features(features)
    np.testing.assert_allclose(values[:, FLUX], [1, -2], rtol=1e-6)
    np.testing.assert_array_equal(values[:, PEAK], [0, np.nan])
    np.testing.assert_array_equal(values[:, MAG], [-3, np.nan])
    np.testing.assert_array_equal(values[:, 9], [0, 1])
    assert features[0, FLUX] != values[0, FLUX]


def test_scaling_is_median_and_interquartile_range_and_ignores_what_is_missing():
    values = np.array([[1, 5], [2, 5], [3, 5], [4, 5], [5, np.nan]], np.float32)
    scaling = training.fit_scaling(values)
    assert scaling.center.tolist() == [3, 5]
    assert scaling.scale.tolist() == [2, 1]
    scaled = training.scale_features(np.array([[5, np.nan], [99, 6]], np.float32), scaling)
    assert scaled.tolist() == [[1, 0], [training.FEATURE_LIMIT, 1]]


def test_scaling_survives_a_column_without_values():
    values = np.full((3, 1), np.nan, np.float32)
    scaled = training.scale_features(values, training.fit_scaling(values))
    assert scaled.tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("seed", range(20))
def test_split_is_by_job_and_has_both_classes_on_both_sides(seed):
    jobs = {f"jid{n}": [0, 0, n % 2] for n in range(8)}
    candidates = make_candidates(jobs)
    train, validation = training.split_jobs(candidates, seed)
    assert sorted([*train, *validation]) == list(range(24))
    assert not set(candidates.jid[train]) & set(candidates.jid[validation])
    assert len(set(candidates.jid[validation])) == 2
    assert set(candidates.label[train]) == set(candidates.label[validation]) == {0, 1}


def test_split_depends_on_the_seed_alone():
    candidates = make_candidates({f"jid{n}": [0, 1] for n in range(12)})
    splits = [tuple(training.split_jobs(candidates, seed)[1]) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(
    "labels",
    [{"jid1": [0, 1, 0]}, {"jid1": [0, 1], "jid2": [0, 0]}, {"jid1": [1, 1], "jid2": [0, 0]}],
    ids=["one job", "real in one job", "one class a job"],
)
def test_jobs_that_cannot_be_split_are_refused(labels):
    with pytest.raises(DatasetError, match="cannot be split"):
        training.split_jobs(make_candidates(labels), seed=0)


def test_scores_by_hand():
    labels, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1])
    ranked = training.rank_scores(labels, scores)
    assert ranked.roc_auc == pytest.approx(3 / 4)  # one of the four pairs is the wrong way round
    assert ranked.average_precision == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_equal_scores_rank_like_chance():
    ranked = training.rank_scores(np.array([1, 0, 0, 0, 0]), np.zeros(5))
    assert ranked.roc_auc == pytest.approx(0.5)
    assert ranked.average_precision == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random(500) < 0.1).astype(int)
    scores = np.round(rng.normal(labels, 1), 1)  # rounded: many ties
    scores[:3] = -np.inf
    ranked = training.rank_scores(labels, scores)
    finite = np.maximum(scores, -99)
    assert ranked.roc_auc == pytest.approx(roc_auc_score(labels, finite))
    assert ranked.average_precision == pytest.approx(average_precision_score(labels, finite))


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
    assert candidates.jid.tolist() == index["jid"].tolist()
    assert candidates.image.tolist() == index["image_filename"].tolist()
    np.testing.assert_array_equal(candidates.x, index["x"])
    np.testing.assert_array_equal(candidates.label, index["label"])
    expected = index[list(FEATURE_COLUMNS)].to_numpy(np.float32)
    np.testing.assert_array_equal(candidates.features, expected)


def test_positions_and_truth_are_never_features():
    forbidden = {"id", "jid", "x", "y", "match", "image_filename", "label"}
    assert not forbidden & set(FEATURE_COLUMNS)


def test_dataset_gives_cutout_features_and_label(described):
    candidates = training.read_candidates(described)
    features = np.ones((len(candidates.label), 10), np.float32)
    dataset = training.CutoutDataset(described, candidates, features)
    square, row, label = dataset[15]
    expected = training.cut_out(
        np.load(described / "images" / "jid002.npy"), candidates.x[15], candidates.y[15]
    )
    np.testing.assert_array_equal(square.permute(1, 2, 0).numpy(), expected)
    assert (row.tolist(), label.item(), len(dataset)) == ([1.0] * 10, 1.0, 48)


def test_more_tensors_than_file_descriptors_can_be_mapped(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    candidates = make_candidates({f"jid{n}": [0] for n in range(300)})
    (tmp_path / "images").mkdir()
    for name in candidates.image:
        np.save(tmp_path / name, np.zeros((4, 4, 4), np.float32))
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        dataset = training.CutoutDataset(tmp_path, candidates, np.zeros((300, 10), np.float32))
        assert sum(len(dataset[index]) for index in range(300)) == 900
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def numbered(described) -> training.CutoutDataset:
    """Return a dataset whose features are the number of the candidate."""
    numbers = np.repeat(np.arange(48, dtype=np.float32)[:, None], 10, axis=1)
    return training.CutoutDataset(described, training.read_candidates(described), numbers)


def test_training_sees_the_training_side_alone_and_judging_the_other(numbered, monkeypatch):
    train_side, validation_side = training.split_jobs(numbered.candidates, seed=3)
    seen: dict[str, list[int]] = {"trained": [], "judged": []}

    def train_epoch(network, batches, *others):
        seen["trained"] += [int(number) for _, numbers, _ in batches for number in numbers[:, 0]]
        return 0.0

    def predict(network, batches):
        seen["judged"] += [int(number) for _, numbers, _ in batches for number in numbers[:, 0]]
        return np.zeros(len(validation_side))

    monkeypatch.setattr(training, "train_epoch", train_epoch)
    monkeypatch.setattr(training, "predict", predict)
    training.train(numbered, train_side, validation_side, epochs=1, seed=3)
    assert seen["trained"] != sorted(seen["trained"])
    assert sorted(seen["trained"]) == train_side.tolist()
    assert seen["judged"] == validation_side.tolist()


def test_features_are_scaled_by_the_training_side_alone(described, monkeypatch):
    candidates = training.read_candidates(described)
    train_side, _ = training.split_jobs(candidates, seed=3)
    fitted = []
    fit_scaling = training.fit_scaling
    monkeypatch.setattr(
        training, "fit_scaling", lambda values: fitted.append(values) or fit_scaling(values)
    )
    assert run(described, "--seed", "3") == 0
    expected = training.transform_features(candidates.features)[train_side]
    np.testing.assert_array_equal(fitted[0], expected)


def test_both_classes_weigh_the_same_and_cutouts_are_augmented(described, monkeypatch):
    weights, augmented = [], []
    loss_function, augment = torch.nn.BCEWithLogitsLoss, training.augment
    monkeypatch.setattr(
        torch.nn,
        "BCEWithLogitsLoss",
        lambda pos_weight: (
            weights.append(pos_weight.item()) or loss_function(pos_weight=pos_weight)
        ),
    )
    monkeypatch.setattr(
        training, "augment", lambda cutouts: augmented.append(len(cutouts)) or augment(cutouts)
    )
    assert run(described) == 0
    assert weights == [27 / 9]
    assert sum(augmented) == 36


def test_a_score_does_not_depend_on_the_rest_of_its_batch():
    torch.manual_seed(0)
    network = training.RealBogusNetwork(10)
    cutouts, features = torch.rand(6, 4, 64, 64), torch.rand(6, 10)
    together = training.predict(network, [(cutouts, features, None)])
    alone = training.predict(
        network, [(cutouts[n : n + 1], features[n : n + 1], None) for n in range(6)]
    )
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    assert ((together > 0) & (together < 1)).all()


def run(dataset: Path, *options: str) -> int:
    return training.main(["-d", str(dataset), "--epochs", "1", *options])


def test_a_run_reports_both_sides_and_three_rankings(described, capsys):
    assert run(described) == 0
    captured = capsys.readouterr()
    assert captured.err.count("epoch") == 1
    assert "train        3 jobs, 36 candidates, 9 real (25.0%)" in captured.out
    assert "validation   1 jobs, 12 candidates, 3 real (25.0%)" in captured.out
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["network", "ranked", "chance"]
    assert lines[-1].split()[-2:] == ["0.500", "0.250"]


def test_two_runs_give_the_same_numbers_and_another_seed_others(described, capsys):
    reports = []
    for seed in ("7", "7", "8"):
        assert run(described, "--seed", seed, "--epochs", "2") == 0
        reports.append(capsys.readouterr())
    assert reports[0] == reports[1]
    assert reports[0].err != reports[2].err


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


def test_the_network_learns_what_can_only_be_seen_in_the_pixels(described, capsys):
    brighten_real_candidates(described)
    assert training.main(["-d", str(described), "--epochs", "40"]) == 0
    rows = capsys.readouterr().out.splitlines()[-3:]
    network, flux = (float(row.split()[-1]) for row in rows[:2])
    assert network > 0.9
    assert network > flux + 0.2


def test_the_network_learns_what_can_only_be_seen_in_the_features(described, capsys):
    label = pd.read_csv(described / "master_index.csv")["label"]
    rewrite_index(described, sharpness=0.2 + 0.5 * label)
    for path in (described / "images").iterdir():
        np.save(path, np.full((72, 80, 4), 0.5, np.float32))
    capsys.readouterr()
    assert training.main(["-d", str(described), "--epochs", "40"]) == 0
    network = float(capsys.readouterr().out.splitlines()[-3].split()[-1])
    assert network > 0.6  # the base rate is 0.25


def test_ranking_by_flux_is_reported(described, capsys):
    label = pd.read_csv(described / "master_index.csv")["label"]
    rewrite_index(described, flux=label * 10 - 5.0)
    capsys.readouterr()
    assert run(described) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == [
        *("ranked", "by", "flux", "1.000", "1.000")
    ]


def edit_json(dataset: Path, change) -> None:
    path = dataset / "croissant.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def rewrite_index(dataset: Path, **columns: object) -> None:
    """Change columns of the index and describe the dataset again."""
    csv_path, json_path = dataset / "master_index.csv", dataset / "croissant.json"
    pd.read_csv(csv_path).assign(**columns).to_csv(csv_path, index=False)
    assert generate_croissant.main(["-c", str(csv_path), "-o", str(json_path)]) == 0


def point_index_at(url: str):
    def change(description: dict) -> None:
        description["distribution"][0]["contentUrl"] = url

    return lambda dataset: edit_json(dataset, change)


def change_index_behind_the_checks(dataset: Path, column: str, value: object) -> None:
    """Change a cell of the index and its checksum, past what generate_croissant.py would refuse."""
    csv_path = dataset / "master_index.csv"
    index = pd.read_csv(csv_path)
    index.loc[3, column] = value
    index.to_csv(csv_path, index=False)
    digest = hashlib.sha256(csv_path.read_bytes()).hexdigest()
    edit_json(dataset, lambda description: description["distribution"][0].update(sha256=digest))


def spoil_tensor(dataset: Path, value: float) -> None:
    tensor = np.load(dataset / "images" / "jid002.npy")
    tensor[:] = value
    np.save(dataset / "images" / "jid002.npy", tensor)


BAD_DATASETS = {
    "no description": (lambda d: (d / "croissant.json").unlink(), "croissant.json: no such file"),
    "broken JSON": (lambda d: (d / "croissant.json").write_text("{"), "not a valid Croissant"),
    "JSON of something else": (lambda d: (d / "croissant.json").write_text("[1]"), "not a valid"),
    "no resources": (lambda d: (d / "croissant.json").write_text("{}"), "not a valid Croissant"),
    "no record set": (
        lambda d: edit_json(d, lambda description: description.pop("recordSet")),
        "mlcroissant cannot read its records (ValueError: did not find any record set",
    ),
    "a column is not described": (
        lambda d: edit_json(d, lambda description: description["recordSet"][0]["field"].pop(9)),
        "mlcroissant cannot read its records (KeyError: 'transient_candidates/flux')",
    ),
    "not valid": (
        lambda d: edit_json(d, lambda description: description["distribution"][0].pop("@id")),
        "not a valid Croissant description",
    ),
    "index changed": (
        lambda d: (d / "master_index.csv").open("a").write("\n"),
        "master_index.csv: changed after",
    ),
    "index gone": (lambda d: (d / "master_index.csv").unlink(), "master_index.csv: no such file"),
    "index elsewhere": (point_index_at("../master_index.csv"), "leads out of"),
    "index elsewhere, its type in another spelling": (
        lambda d: edit_json(
            d,
            lambda text: text["distribution"][0].update(
                {"@type": ["cr:FileObject"], "contentUrl": "../dataset/master_index.csv"}
            ),
        ),
        "leads out of",
    ),
    "index absolute": (point_index_at("/etc/passwd"), "leads out of"),
    "index a URL": (point_index_at("http://127.0.0.1/x.csv"), "leads out of"),
    "tensor gone": (lambda d: (d / "images" / "jid002.npy").unlink(), "jid002.npy: not a readable"),
    "tensor no npy": (
        lambda d: (d / "images" / "jid002.npy").write_text("x"),
        "jid002.npy: not a readable tensor",
    ),
    "tensor with a cut header": (
        lambda d: (d / "images" / "jid002.npy").write_bytes(CUT_HEADER),
        "jid002.npy: not a readable tensor",
    ),
    "tensor float64": (
        lambda d: np.save(d / "images" / "jid002.npy", np.zeros((72, 80, 4))),
        "jid002.npy: float64 (72, 80, 4); expected float32",
    ),
    "tensor with NaN": (lambda d: spoil_tensor(d, np.nan), "images/jid002.npy: a pixel is not in"),
    "tensor above 1": (lambda d: spoil_tensor(d, 1.5), "images/jid002.npy: a pixel is not in"),
    "checksum no text": (
        lambda d: edit_json(d, lambda text: text["distribution"][0].update(sha256=None)),
        "not a valid Croissant description",
    ),
    "path no text": (
        lambda d: edit_json(d, lambda text: text["distribution"][0].update(contentUrl=None)),
        "not a valid Croissant description",
    ),
    "field without a name": (
        lambda d: edit_json(d, lambda text: text["recordSet"][0]["field"][0].update({"@id": None})),
        "not a valid Croissant description",
    ),
    "no version": (
        lambda d: edit_json(d, lambda text: text.update(conformsTo={})),
        "not a valid Croissant description",
    ),
    "label 2": (lambda d: change_index_behind_the_checks(d, "label", 2), "neither 0 nor 1"),
    "no position": (lambda d: change_index_behind_the_checks(d, "x", np.nan), "has no position"),
    "no job": (lambda d: change_index_behind_the_checks(d, "jid", None), "cannot read its records"),
    "tensor elsewhere": (
        lambda d: change_index_behind_the_checks(d, "image_filename", "../jid001.npy"),
        "../jid001.npy: leads out of",
    ),
    "only bogus": (lambda d: rewrite_index(d, label=0, match=-1.0), "0 of 48 candidates are real"),
    "only real": (lambda d: rewrite_index(d, label=1, match=5.0), "48 of 48 candidates are real"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_DATASETS.values(), ids=BAD_DATASETS)
def test_a_bad_dataset_is_refused(described, capsys, damage, message):
    damage(described)
    assert run(described) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert run(tmp_path / "nothing") == 1
    assert "croissant.json: no such file" in capsys.readouterr().err


def test_ctrl_c_is_130(described, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_epoch", interrupt)
    assert run(described) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--epochs", "0"), "--epochs must be at least 1"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--seed", "9" * 20), "--seed must be at least 0 and below"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(described, capsys, option, message):
    with pytest.raises(SystemExit, match="2"):
        run(described, *option)
    assert message in capsys.readouterr().err
