#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3",
#     "mlcroissant>=1.1.1,<1.2",
#     "torch>=2.6,<=2.13.0",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Train a real-bogus network on a dataset and say whether the dataset can be learned from.

Read: `croissant.json` in the dataset folder, through mlcroissant the records that it describes,
and from the tensors that they name a 64 x 64 cutout around each candidate. Nothing is downloaded
and nothing is written.

The network sees the four-channel cutout and nine columns of the catalog. It is trained on some of
the jobs and judged on the others: among 3 % real candidates, accuracy would praise a network that
says "bogus" to all, so the report gives ROC AUC and average precision, beside what ranking by flux
and chance (the base rate) reach on the same jobs.

    python test_croissant_dataset.py
    python test_croissant_dataset.py -d ./my_dataset
    python test_croissant_dataset.py -d ./my_dataset --epochs 40 --seed 1

Exit codes: 0 trained and judged; 1 the dataset is missing, damaged or cannot be learned from (the
reason is on stderr); 2 wrong usage; 130 interrupted by Ctrl-C.
"""

import argparse
import functools
import hashlib
import logging
import os
import sys
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

# A thread that waits for another is to sleep, not to spin: on a machine shared with other programs,
# spinning takes the processor from the thread that is waited for. Only heeded before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import mlcroissant as mlc
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

CHANNEL_NAMES = ("science", "reference", "difference", "score")
CROISSANT_NAME = "croissant.json"
RECORD_SET = "transient_candidates"
FEATURE_COLUMNS = tuple(
    "sharpness roundness1 roundness2 npix peak flux mag daofind_mag flags".split()
)
LOG_COLUMNS = ("peak", "flux")  # span five decades and both signs: a signed logarithm
CUTOUT_PX = 64  # side of a cutout; the candidate's nearest pixel is at [32, 32]
VALIDATION_SHARE = 0.25  # of the jobs
SPLIT_TRIES = 100  # seeded shuffles of the jobs to find both classes on both sides
EPOCHS = 20
BATCH_SIZE = 64  # small datasets: about a thousand candidates give twenty steps an epoch
LEARNING_RATE = 2e-3  # highest rate of the one-cycle schedule
WEIGHT_DECAY = 1e-2
DROPOUT = 0.3
FEATURE_LIMIT = 8.0  # scaled features are clipped here, in interquartile ranges
SEED = 20260
OPEN_TENSORS = 64  # mapped at a time: each takes one of the process's file descriptors
# What numpy raises on a damaged .npy header.
NPY_ERRORS = (OSError, ValueError, OverflowError, SyntaxError, tokenize.TokenError)
# What mlcroissant and its parsers raise on a damaged description: its own errors and Python's.
MLCROISSANT_ERRORS = (mlc.ValidationError, mlc.GenerationError, ValueError, LookupError, TypeError)
MLCROISSANT_ERRORS += (AttributeError, AssertionError, RecursionError)

LOG = logging.getLogger("test_croissant_dataset")


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


@dataclass(frozen=True)
class Candidates:
    """The records of a dataset as arrays of equal length, one entry per candidate.

    jid, image: str; x, y: float64, pixels; label: float32, 1 real, 0 bogus; features: float32
    (N, 9) in the order of FEATURE_COLUMNS, NaN where the catalog has no value.
    """

    jid: np.ndarray
    image: np.ndarray
    x: np.ndarray
    y: np.ndarray
    label: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class FeatureScaling:
    """Median and interquartile range of the transformed features, float32 (10,)."""

    center: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Scores:
    """How well a ranking separates real from bogus; both are 1 for a perfect one."""

    roc_auc: float
    average_precision: float


def one_line(error: Exception) -> str:
    """Return the type and the text of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load_description(json_path: Path) -> mlc.Dataset:
    """Load croissant.json and hold the files that it describes against their checksums.

    Raises
    ------
    DatasetError
        The description is missing or invalid; or a file that it describes lies outside its folder
        (nothing is downloaded), is gone, or was changed after the description was written.
    """
    if not json_path.is_file():
        raise DatasetError(f"{json_path}: no such file; generate_croissant.py writes it")
    try:
        dataset = mlc.Dataset(jsonld=json_path)
        files = [node for node in dataset.metadata.distribution if isinstance(node, mlc.FileObject)]
    except MLCROISSANT_ERRORS as error:
        raise DatasetError(
            f"{json_path}: not a valid Croissant description ({one_line(error)}); run"
            " generate_croissant.py again"
        ) from error
    for node in files:
        path = inside(json_path.parent, str(node.content_url))
        if not path.is_file():
            raise DatasetError(f"{path}: no such file, but {json_path} describes it")
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != str(node.sha256).lower():
            raise DatasetError(
                f"{path}: changed after {json_path} was written (sha256 is {found}, expected"
                f" {node.sha256}); run generate_croissant.py again"
            )
    return dataset


def inside(folder: Path, name: str) -> Path:
    """Return the path of a name relative to the folder; refuse what leads out of it.

    Read as a Windows path, in which both slashes divide, a name is inside on every system.
    """
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or "://" in name:
        raise DatasetError(f"{name}: leads out of {folder}; a path inside it was expected")
    return folder / name


def read_candidates(dataset_dir: Path) -> Candidates:
    """Read all records of a dataset through mlcroissant.

    Raises
    ------
    DatasetError
        The description or the index is missing, invalid or changed, or a label is not 0 or 1.
    """
    json_path = dataset_dir / CROISSANT_NAME
    dataset = load_description(json_path)
    columns = ("jid", "image_filename", "x", "y", "label", *FEATURE_COLUMNS)
    table: dict[str, list] = {column: [] for column in columns}
    try:
        for record in tqdm(dataset.records(RECORD_SET), desc="records", unit="", disable=None):
            for column, values in table.items():
                values.append(record[f"{RECORD_SET}/{column}"])
        texts = {c: np.array([v.decode() for v in table[c]]) for c in ("jid", "image_filename")}
        numbers = {c: np.array(v, dtype=np.float64) for c, v in table.items() if c not in texts}
    except MLCROISSANT_ERRORS as error:
        raise DatasetError(
            f"{json_path}: mlcroissant cannot read its records ({one_line(error)}); run"
            " generate_croissant.py again"
        ) from error
    candidates = Candidates(
        jid=texts["jid"],
        image=texts["image_filename"],
        x=numbers["x"],
        y=numbers["y"],
        label=numbers["label"].astype(np.float32),
        features=np.stack([numbers[c] for c in FEATURE_COLUMNS], axis=1).astype(np.float32),
    )
    check_candidates(candidates, dataset_dir)
    return candidates


def check_candidates(candidates: Candidates, dataset_dir: Path) -> None:
    """Raise DatasetError where the candidates cannot be trained on."""
    if not np.isin(candidates.label, (0, 1)).all():
        raise DatasetError(f"{dataset_dir}: a label in its index is neither 0 nor 1")
    if not (np.isfinite(candidates.x) & np.isfinite(candidates.y)).all():
        raise DatasetError(f"{dataset_dir}: a candidate in its index has no position")
    real, total = int(candidates.label.sum()), len(candidates.label)
    if real in (0, total):
        raise DatasetError(
            f"{dataset_dir}: {real} of {total} candidates are real; both classes are needed"
        )


def open_tensor(path: Path) -> np.ndarray:
    """Map a tensor, float32 (H, W, 4), without reading its pixels.

    Raises
    ------
    DatasetError
        The file is missing or cut short, or is no such tensor.
    """
    try:
        tensor = np.lib.format.open_memmap(path, mode="r")
    except NPY_ERRORS as error:
        raise DatasetError(f"{path}: not a readable tensor: {one_line(error)}") from error
    if tensor.dtype != np.dtype("<f4") or tensor.shape[2:] != (len(CHANNEL_NAMES),):
        raise DatasetError(f"{path}: {tensor.dtype} {tensor.shape}; expected float32 (H, W, 4)")
    return tensor


def cut_out(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Return the square around a candidate.

    Parameters
    ----------
    image : numpy.ndarray
        float32 (H, W, C).
    x, y : float
        Position, pixels; pixel i spans [i - 0.5, i + 0.5).

    Returns
    -------
    numpy.ndarray
        float32 (64, 64, C), whose [32, 32] is the nearest pixel; 0 where it lies off the image.
    """
    top = int(np.floor(y + 0.5)) - CUTOUT_PX // 2
    left = int(np.floor(x + 0.5)) - CUTOUT_PX // 2
    inner = image[max(top, 0) : max(top + CUTOUT_PX, 0), max(left, 0) : max(left + CUTOUT_PX, 0)]
    square = np.zeros((CUTOUT_PX, CUTOUT_PX, image.shape[2]), dtype=np.float32)
    row, column = max(-top, 0), max(-left, 0)
    square[row : row + inner.shape[0], column : column + inner.shape[1]] = inner
    return square


def transform_features(features: np.ndarray) -> np.ndarray:
    """Make the columns comparable: signed logarithm of peak and flux, and a flag for no magnitude.

    Parameters
    ----------
    features : numpy.ndarray
        float32 (N, 9) in the order of FEATURE_COLUMNS; NaN or infinite is no value.

    Returns
    -------
    numpy.ndarray
        float32 (N, 10), NaN is no value; the last column is 1 where `mag` has none.
    """
    values = np.where(np.isfinite(features), features, np.nan)
    for name in LOG_COLUMNS:
        column = values[:, FEATURE_COLUMNS.index(name)]
        column[:] = np.sign(column) * np.log1p(np.abs(column))
    no_mag = np.isnan(values[:, [FEATURE_COLUMNS.index("mag")]])
    return np.hstack([values, no_mag]).astype(np.float32)


def fit_scaling(values: np.ndarray) -> FeatureScaling:
    """Fit the scaling of transformed features, float32 (N, 10), of the training candidates."""
    center, scale = np.zeros(values.shape[1]), np.ones(values.shape[1])
    for i, column in enumerate(values.T):
        known = column[~np.isnan(column)]
        if known.size:
            low, center[i], high = np.percentile(known, (25, 50, 75))
            scale[i] = (high - low) or known.std() or 1.0
    return FeatureScaling(center.astype(np.float32), scale.astype(np.float32))


def scale_features(values: np.ndarray, scaling: FeatureScaling) -> np.ndarray:
    """Scale transformed features to median 0 and range 1; what has no value becomes 0."""
    scaled = (values - scaling.center) / scaling.scale
    return np.clip(np.nan_to_num(scaled), -FEATURE_LIMIT, FEATURE_LIMIT).astype(np.float32)


class CutoutDataset(Dataset):
    """Cutouts, features and labels of a dataset; the cutouts are read when they are asked for.

    Parameters
    ----------
    dataset_dir : Path
        Folder that the image paths of the records are relative to.
    candidates : Candidates
        The records.
    features : numpy.ndarray
        float32 (N, 10), scaled and finite.

    Raises
    ------
    DatasetError
        A tensor is missing, damaged or outside the folder; later, where a pixel is not in [0, 1].
    """

    def __init__(self, dataset_dir: Path, candidates: Candidates, features: np.ndarray) -> None:
        self.candidates = candidates
        self.features = torch.from_numpy(features)
        self.labels = torch.from_numpy(candidates.label)
        self.paths = {name: inside(dataset_dir, name) for name in np.unique(candidates.image)}
        self.open_tensor = functools.lru_cache(OPEN_TENSORS)(open_tensor)
        for path in self.paths.values():
            self.open_tensor(path)

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return cutout (4, 64, 64) in [0, 1], features (10,) and label () of one candidate."""
        path = self.paths[self.candidates.image[index]]
        tensor = self.open_tensor(path)
        square = cut_out(tensor, self.candidates.x[index], self.candidates.y[index])
        if not (square.min() >= 0 and square.max() <= 1):  # NaN fails both
            raise DatasetError(
                f"{path}: a pixel is not in [0, 1]; remove it and run create_dataset.py"
            )
        return torch.from_numpy(square).permute(2, 0, 1), self.features[index], self.labels[index]


class RealBogusNetwork(nn.Module):
    """A convolutional network on the cutout, joined with the features; gives a logit.

    Pixel-unshuffling trades resolution for channels before the first convolution, which saves
    work. The maps are flattened, not averaged: where a source lies in the cutout matters. They are
    reduced before the features join them, or a thousand pixels would drown ten features.
    """

    def __init__(self, feature_count: int) -> None:
        super().__init__()
        layers = [nn.PixelUnshuffle(2)]
        channels = 4 * len(CHANNEL_NAMES)
        for width in (32, 48, 64):
            layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        pixels = (CUTOUT_PX // 16) ** 2  # one unshuffling and three poolings
        layers += [nn.Flatten(), nn.Dropout(DROPOUT), nn.Linear(channels * pixels, 32), nn.ReLU()]
        self.image_layers = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(32 + feature_count, 64), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(64, 1)
        )

    def forward(self, cutouts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return logits (N,) of cutouts (N, 4, 64, 64) and features (N, 10)."""
        return self.head(torch.cat([self.image_layers(cutouts), features], dim=1)).squeeze(1)


def split_jobs(candidates: Candidates, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the candidates by job, with both classes on both sides.

    Returns
    -------
    train, validation : numpy.ndarray
        Indices of candidates, int64, sorted.

    Raises
    ------
    DatasetError
        There are too few jobs, or too few with real candidates.
    """
    rng = np.random.default_rng(seed)
    jobs = np.unique(candidates.jid)
    held_out = max(1, round(VALIDATION_SHARE * len(jobs)))
    for _ in range(SPLIT_TRIES if len(jobs) > 1 else 0):
        is_held_out = np.isin(candidates.jid, rng.permutation(jobs)[:held_out])
        sides = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        if all(0 < candidates.label[side].sum() < len(side) for side in sides):
            return sides
    raise DatasetError(
        f"{len(jobs)} jobs cannot be split into training and validation jobs that both hold real"
        " and bogus candidates; more jobs are needed"
    )


def augment(cutouts: torch.Tensor) -> torch.Tensor:
    """Bring each cutout, (N, 4, 64, 64), into one of its eight orientations, at random."""
    turned = torch.empty_like(cutouts)
    choice = torch.randint(8, (len(cutouts),))
    for k in range(8):
        chosen = torch.rot90(cutouts[choice == k], k % 4, dims=(2, 3))
        turned[choice == k] = chosen.flip(3) if k >= 4 else chosen
    return turned


def train_epoch(
    network: nn.Module,
    batches: Iterable[list[torch.Tensor]],
    loss_function: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Train on each batch once and return the mean loss of a candidate."""
    network.train()
    total, count = 0.0, 0
    for cutouts, features, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(network(augment(cutouts), features), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item() * len(labels)
        count += len(labels)
    return total / count


@torch.inference_mode()
def predict(network: nn.Module, batches: Iterable[list[torch.Tensor]]) -> np.ndarray:
    """Return the real-bogus scores of the batches' candidates, float32 (N,), in [0, 1].

    They rank; they are no probabilities, because training weighs both classes the same.
    """
    network.eval()
    logits = [network(cutouts, features) for cutouts, features, _ in batches]
    return torch.sigmoid(torch.cat(logits)).numpy()


def rank_scores(labels: np.ndarray, scores: np.ndarray) -> Scores:
    """Return ROC AUC and average precision of a ranking.

    Parameters
    ----------
    labels : numpy.ndarray
        (N,), 1 real, 0 bogus; both occur.
    scores : numpy.ndarray
        (N,), higher is more likely real; equal scores count as one step of the curves.

    Returns
    -------
    Scores
        Area under the ROC curve by trapezoids, and the sum of precision times the step in recall
        (the definition of scikit-learn's `average_precision_score`).
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_step = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    hits = np.append(0, np.cumsum(labels[order] == 1)[last_of_step])
    chosen = np.append(0, last_of_step + 1)
    recall, false_rate = hits / hits[-1], (chosen - hits) / (chosen[-1] - hits[-1])
    precision = hits[1:] / chosen[1:]
    return Scores(
        roc_auc=float(np.trapezoid(recall, false_rate)),
        average_precision=float(np.sum(np.diff(recall) * precision)),
    )


def train(
    dataset: CutoutDataset,
    train_side: np.ndarray,
    validation_side: np.ndarray,
    epochs: int,
    seed: int,
) -> Scores:
    """Train a network on one side, log a line an epoch, and return its scores on the other.

    The last epoch is the one that is judged: to pick the best one by the validation jobs would
    flatter the network on those jobs.
    """
    torch.manual_seed(seed)
    shuffled = DataLoader(Subset(dataset, train_side), BATCH_SIZE, shuffle=True)
    held_out = DataLoader(Subset(dataset, validation_side), BATCH_SIZE)
    labels = dataset.candidates.label
    network = RealBogusNetwork(dataset.features.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, epochs=epochs, steps_per_epoch=len(shuffled)
    )
    real = labels[train_side].sum()
    loss_function = nn.BCEWithLogitsLoss(
        pos_weight=torch.tensor((len(train_side) - real) / real)  # both classes weigh the same
    )
    for epoch in range(1, epochs + 1):
        bar = tqdm(shuffled, f"epoch {epoch}", leave=False, unit="batch", disable=None)
        loss = train_epoch(network, bar, loss_function, optimizer, schedule)
        scores = rank_scores(labels[validation_side], predict(network, held_out))
        LOG.info(
            f"epoch {epoch:2}/{epochs}  loss {loss:.4f}  validation ROC AUC {scores.roc_auc:.4f}"
            f"  average precision {scores.average_precision:.4f}"
        )
    return scores


def report(candidates: Candidates, sides: Sequence[np.ndarray], scores: Scores) -> str:
    """Return the closing lines: both sides of the split, and three rankings of the second."""
    lines = []
    for name, side in zip(("train", "validation"), sides, strict=True):
        jobs, real = len(np.unique(candidates.jid[side])), int(candidates.label[side].sum())
        lines.append(
            f"  {name:<12} {jobs:,} jobs, {len(side):,} candidates, {real:,} real"
            f" ({real / len(side):.1%})"
        )
    labels = candidates.label[sides[1]]
    flux = candidates.features[sides[1], FEATURE_COLUMNS.index("flux")]
    rankings = {
        "network": scores,
        "ranked by flux": rank_scores(labels, np.nan_to_num(flux, nan=-np.inf)),
        "chance (base rate)": Scores(0.5, float(labels.mean())),
    }
    lines.append(f"  {'on the validation jobs':<24} ROC AUC   average precision")
    lines += [
        f"  {name:<24} {ranking.roc_auc:7.3f}   {ranking.average_precision:7.3f}"
        for name, ranking in rankings.items()
    ]
    return "\n".join(lines)


def run(dataset_dir: Path, epochs: int, seed: int) -> str:
    """Check the dataset, train on it, and return the report.

    Raises
    ------
    DatasetError
        The dataset is missing, damaged or cannot be learned from.
    """
    candidates = read_candidates(dataset_dir)
    train_side, validation_side = split_jobs(candidates, seed)
    values = transform_features(candidates.features)
    features = scale_features(values, fit_scaling(values[train_side]))
    dataset = CutoutDataset(dataset_dir, candidates, features)
    with logging_redirect_tqdm():
        scores = train(dataset, train_side, validation_side, epochs, seed)
    return f"{dataset_dir}\n{report(candidates, (train_side, validation_side), scores)}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("-d", "--dataset_dir", type=Path, default="./hackathon_dataset", help="dataset to train on")
    add("--epochs", type=int, default=EPOCHS, help="passes over the training jobs")
    add("--seed", type=int, default=SEED, help="seed of the split, the weights and the order")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if not 0 <= args.seed < 2**63:
        parser.error("--seed must be at least 0 and below 2**63")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    LOG.setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # what is not stated is no fault here
    try:
        print(run(args.dataset_dir, args.epochs, args.seed), flush=True)
    except (DatasetError, OSError) as error:
        LOG.error(error)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
