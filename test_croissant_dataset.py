#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3",
#     "pandas>=3.1,<4",
#     "mlcroissant>=1.1.1,<1.2",
#     "torch>=2.6,<=2.13.0",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Train a real-bogus network on a dataset and say whether the dataset can be learned from.

Read: `croissant.json` in the dataset folder, through mlcroissant the records that it describes,
and from the tensors that they name a 64 x 64 cutout around each candidate. Nothing is downloaded.
Written, with `--report_dir` alone: metrics.json, predictions.csv, model.pt and report.png.

First comes a list of what holds of the dataset and what does not. Then a network that sees the
four-channel cutout and nine columns of the catalog is trained on some of the jobs, the best epoch
and the threshold are chosen on others, and it is judged on the rest. Among 3 % real candidates,
accuracy would praise a network that says "bogus" to all; so the report gives ROC AUC and average
precision with intervals, beside what a logistic regression, flux and chance reach on the same jobs.

    python test_croissant_dataset.py
    python test_croissant_dataset.py -d ./my_dataset --report_dir ./report --min_ap 0.8
    torchrun --nproc_per_node 4 test_croissant_dataset.py -d ./my_dataset

Exit codes: 0 trained and judged; 1 the dataset is missing, damaged or too small, or the network is
below `--min_ap` (the reason is on stderr); 2 wrong usage; 130 interrupted by Ctrl-C.
"""

import _thread
import argparse
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import os
import signal
import sys
import tempfile
import textwrap
import threading
import tokenize
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

if __name__ == "__main__":  # Ctrl-C within the imports, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
import mlcroissant as mlc
import numpy as np
import pandas as pd
import torch
from torch import distributed, nn
from torch.optim import LBFGS, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

CHANNEL_NAMES = ("science", "reference", "difference", "score")
PIXEL_BYTES = 4 * len(CHANNEL_NAMES)  # of a tensor: float32
CROISSANT_NAME = "croissant.json"
RECORD_SET = "transient_candidates"
FEATURE_COLUMNS = tuple(
    "sharpness roundness1 roundness2 npix peak flux mag daofind_mag flags".split()
)
LOG_COLUMNS = ("peak", "flux")  # span five decades and both signs: a signed logarithm
LARGEST = 1e30  # of a feature: squares of larger ones overflow
FEATURE_LIMIT = 8.0  # scaled features are clipped here, in interquartile ranges
CUTOUT_PX = 64  # side of a cutout; the candidate's nearest pixel is at [32, 32]
INNER_PX = 16  # side of its middle, which the network sees at full resolution
CHECKED_CUTOUTS = 4000  # read before training: half a second; the others as they are trained on
SPLITS = ("train", "validation", "test")
BOTH = 2  # kind of a job with both classes; of others, their label
DEAL = (0, 1, 2, 0, 0)  # splits that jobs are dealt out to in turn: 60, 20 and 20 %
BATCH_SIZE = 128  # candidates a step
LEARNING_RATE = 2e-3  # highest rate of the one-cycle schedule
WEIGHT_DECAY = 1e-2
DROPOUT = 0.5
MIN_EPOCHS, MAX_EPOCHS, MIN_STEPS = 8, 60, 300  # by default: small datasets need more epochs
RIDGE = 1e-4  # of the logistic regression: keeps weights finite where classes separate
RESAMPLES = 1000  # of the bootstrap
CONFIDENCE = (2.5, 97.5)  # percentiles: a 95 % interval
MIN_JOBS = 10  # test jobs from which on jobs are resampled, not candidates
MIN_EACH = 5  # real and bogus test candidates, without which there is no verdict
SHEET_ROWS = 4  # candidates of each kind on the picture
SEED = 20260
MAX_WORKERS = 1024
DEVICES = ("auto", "cuda", "mps", "cpu")
MAX_PROBLEMS = 20  # named of each kind, the others are counted
MAX_MESSAGE = 300  # letters of another library's message
EPOCH_LINE = (
    "epoch {epoch:2}/{epochs}  loss {train_loss:.4f}  validation loss {validation_loss:.4f}"
    "  ROC AUC {roc_auc:.4f}  average precision {average_precision:.4f}"
)
RANKINGS = {  # of the test candidates, by which column: the network and two yardsticks
    "network": "score",
    "logistic regression": "regression",
    "ranked by flux": "flux",
}
FIGURES = ("roc_auc", "average_precision", "behind")  # of each ranking
ESTIMATE = "{:.3f} ({:.3f} to {:.3f})"
CALLS = """
  called real from score {threshold:.3f} on, the highest F1 of the validation split:
  precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}
                          called real  called bogus
  real                {true_positives:17,}{false_negatives:14,}
  bogus               {false_positives:17,}{true_negatives:14,}
"""
CURVES = (  # title and axes of the report's upper row
    ("Loss", "epoch", "weighted cross-entropy"),
    ("ROC curve, test split", "false positive rate", "true positive rate"),
    ("Precision and recall, test split", "recall", "precision"),
    ("Real-bogus scores, test split", "score", "candidates"),
)
# What numpy raises on a damaged .npy header.
NPY_ERRORS = (OSError, ValueError, TypeError, OverflowError, MemoryError, SyntaxError)
NPY_ERRORS += (tokenize.TokenError,)
# What mlcroissant and its parsers raise on a damaged description: its own errors and Python's.
MLCROISSANT_ERRORS = (mlc.ValidationError, mlc.GenerationError, ValueError, LookupError, TypeError)
MLCROISSANT_ERRORS += (AttributeError, AssertionError, RecursionError)

LOG = logging.getLogger("test_croissant_dataset")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # cutouts, features, labels
Estimate = list[float]  # a figure and the ends of its 95 % interval
Ranking = tuple[np.ndarray, np.ndarray]  # what sort_scores returns


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


@dataclass(frozen=True)
class TensorFile:
    """A tensor on disk: float32 (height, width, 4) from a byte on."""

    path: Path
    height: int
    width: int
    offset: int


def one_line(error: Exception) -> str:
    """Return the type and the begin of the text of an error on one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", MAX_MESSAGE, placeholder=" ...")


def raise_problems(problems: Sequence[str], count: int) -> None:
    """Raise DatasetError where there are problems, so many, with a line for each of the first."""
    named = list(problems[:MAX_PROBLEMS])
    if count > len(named):
        named.append(f"and {count - len(named):,} more")
    if named:
        raise DatasetError("\n".join(named))


def inside(folder: Path, name: str) -> Path:
    """Return the path of a name relative to the folder; refuse what leads out of it.

    Read as a Windows path, in which both slashes divide, a name is inside on every system.
    """
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or "://" in name:
        raise DatasetError(f"{name}: leads out of {folder}; a path inside it was expected")
    return folder / name


def refuse_downloads(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a dictionary of JSON; raise ValueError where its context is a link to be followed."""
    for key, value in pairs:
        if key == "@import" or (key == "@context" and not isinstance(value, dict)):
            raise ValueError(f"{key} is not written out: {value}")
    return dict(pairs)


def load_description(json_path: Path) -> mlc.Dataset:
    """Load croissant.json; raise DatasetError where it is missing or not valid."""
    if not json_path.is_file():
        raise DatasetError(f"{json_path}: no such file; generate_croissant.py writes it")
    try:
        json.loads(json_path.read_bytes(), object_pairs_hook=refuse_downloads)
        dataset = mlc.Dataset(jsonld=json_path)
        dataset.metadata.distribution[0]
    except MLCROISSANT_ERRORS as error:
        raise DatasetError(
            f"{json_path}: not a valid Croissant description ({one_line(error)}); run"
            " generate_croissant.py again"
        ) from error
    return dataset


def check_files(dataset: mlc.Dataset, json_path: Path) -> None:
    """Raise DatasetError where a described file is outside the folder, gone, or was changed.

    An archive would be unpacked into a cache outside the folder, and a file set has no checksum:
    candidates are read from neither.
    """
    files = [node for node in dataset.metadata.distribution if isinstance(node, mlc.FileObject)]
    known = {node.id for node in files if not node.contained_in}
    sources = {
        field.source.uuid
        for records in dataset.metadata.record_sets
        if records.id == RECORD_SET
        for field in records.fields
    }
    if not sources <= known:
        raise DatasetError(
            f"{json_path}: {RECORD_SET} is not read from a file in its folder; run"
            " generate_croissant.py again"
        )
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


def read_records(dataset: mlc.Dataset, json_path: Path) -> pd.DataFrame:
    """Read all candidates through mlcroissant; raise DatasetError where it cannot."""
    texts: dict[str, list[str]] = {"jid": [], "image_filename": []}
    numbers = {c: array("d") for c in ("id", "x", "y", *FEATURE_COLUMNS, "match", "label")}
    try:
        for record in progress(dataset.records(RECORD_SET), "records"):
            for column, cells in texts.items():
                cells.append(sys.intern(record[f"{RECORD_SET}/{column}"].decode()))
            for column, cells in numbers.items():
                cell = record[f"{RECORD_SET}/{column}"]
                cells.append(math.nan if cell is None else cell)
    except MLCROISSANT_ERRORS as error:
        raise DatasetError(
            f"{json_path}: mlcroissant cannot read its records ({one_line(error)}); run"
            " generate_croissant.py again"
        ) from error
    columns = {column: pd.Series(cells, dtype=str) for column, cells in texts.items()}
    return pd.DataFrame(columns | {column: np.array(cells) for column, cells in numbers.items()})


def read_candidates(dataset_dir: Path) -> pd.DataFrame:
    """Read the candidates of a dataset, for a training of your own.

    Returns
    -------
    pandas.DataFrame
        A row a candidate, in the order of the index: `jid` and `image_filename` are text; `id`,
        `x`, `y` (pixels), FEATURE_COLUMNS, `match` and `label` (1 real, 0 bogus) are float64, NaN
        where the index has no value.

    Raises
    ------
    DatasetError
        The description or the index is missing, invalid or changed, or leads out of the folder.
    """
    json_path = dataset_dir / CROISSANT_NAME
    dataset = load_description(json_path)
    check_files(dataset, json_path)
    return read_records(dataset, json_path)


def refuse(candidates: pd.DataFrame, wrong: np.ndarray, reason: str) -> None:
    """Raise DatasetError where candidates are wrong, for a reason that is a template of columns."""
    template = f"candidate {{id:.15g}} of {{jid}}: {reason}; run create_dataset.py again"
    rows = candidates[wrong]
    problems = [template.format(**row) for row in rows[:MAX_PROBLEMS].to_dict("records")]
    raise_problems(problems, len(rows))


def open_tensor(path: Path) -> TensorFile:
    """Read the header of a tensor; raise DatasetError where it is no whole float32 (H, W, 4)."""
    if not path.is_file():
        raise DatasetError(f"{path}: not a readable tensor: there is no such file")
    try:
        with np.errstate(over="ignore"):  # of a shape that cannot be
            tensor = np.lib.format.open_memmap(path, mode="r")
    except NPY_ERRORS as error:
        raise DatasetError(f"{path}: not a readable tensor: {one_line(error)}") from error
    is_image = tensor.shape[2:] == (len(CHANNEL_NAMES),) and tensor.flags.c_contiguous
    if tensor.dtype != np.dtype("<f4") or not is_image:
        raise DatasetError(
            f"{path}: {tensor.dtype} {tensor.shape}; expected float32 (H, W, 4) in C order"
        )
    if tensor.offset + tensor.nbytes != path.stat().st_size:
        raise DatasetError(f"{path}: longer than its header says; run create_dataset.py again")
    return TensorFile(path, *tensor.shape[:2], tensor.offset)


def read_cutout(
    handle: BinaryIO, file: TensorFile, position: np.ndarray, square: np.ndarray
) -> None:
    """Read the square around a position, x and y, into float32 (64, 64, 4), from an open tensor.

    Its [32, 32] becomes the nearest pixel, where pixel i spans [i - 0.5, i + 0.5); what is off the
    image stays as it is. Read row by row: of a mapped tensor, each row of a large image would cost
    a page fault and the mapping of pages around it, which takes 2.5 times as long.
    """
    left, top = (math.floor(value + 0.5) - CUTOUT_PX // 2 for value in position)
    first, start = max(left, 0), max(top, 0)
    end, last = max(file.height - top, 0), max(file.width - left, 0)
    part = square[start - top : end, first - left : last]
    offset = file.offset + (start * file.width + first) * PIXEL_BYTES
    count = 0
    for line in part:
        handle.seek(offset)
        count += handle.readinto(line)
        offset += file.width * PIXEL_BYTES
    if count != part.nbytes:
        raise DatasetError(f"{file.path}: became shorter while it was in use")


def transform_features(candidates: pd.DataFrame) -> np.ndarray:
    """Make the features comparable: signed logarithm of peak and flux, a flag for no magnitude.

    Parameters
    ----------
    candidates : pandas.DataFrame
        With FEATURE_COLUMNS; NaN or infinite is no value.

    Returns
    -------
    numpy.ndarray
        float64 (N, 10), NaN is no value; the last column is 1 where `mag` has none.
    """
    values = candidates[list(FEATURE_COLUMNS)].astype(float)
    values = values.where(np.isfinite(values)).clip(-LARGEST, LARGEST)
    for name in LOG_COLUMNS:
        values[name] = np.sign(values[name]) * np.log1p(values[name].abs())
    return values.assign(no_mag=values["mag"].isna()).to_numpy(float)


def fit_scaling(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median and the interquartile range of transformed features, each float64 (10,)."""
    columns = pd.DataFrame(values)
    low, center, high = columns.quantile((0.25, 0.5, 0.75)).to_numpy()
    spread = np.where(high > low, high - low, columns.std(ddof=0))
    constant = ~(columns.max() > columns.min())  # also where there is no value; std is not quite 0
    return np.nan_to_num(center), np.where(constant, 1.0, spread)


def scale_features(values: np.ndarray, center: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Scale transformed features to median 0 and range 1, float32; what has no value becomes 0."""
    scaled = np.nan_to_num((values - center) / scale)
    return np.clip(scaled, -FEATURE_LIMIT, FEATURE_LIMIT).astype(np.float32)


class CutoutDataset(Dataset):
    """Cutouts, features and labels of candidates; cutouts are read when they are asked for.

    `dataset[i]` is one candidate: cutout float32 (4, 64, 64) in [0, 1] and 0 off the image,
    features float32 (10,), label float32 (). `dataset[[i, j, ...]]` is a batch of them, which is
    faster, and which a DataLoader makes use of.

    Parameters
    ----------
    dataset_dir : Path
        Folder that the image paths of the candidates are relative to.
    candidates : pandas.DataFrame
        As `read_candidates` returns it. Features are NaN where it is, until `fit_features`.

    Raises
    ------
    DatasetError
        A tensor is missing, damaged or outside the folder; later, where a pixel is not in [0, 1].
    """

    def __init__(self, dataset_dir: Path, candidates: pd.DataFrame) -> None:
        self.candidates = candidates
        self.positions = candidates[["x", "y"]].to_numpy()
        self.values = transform_features(candidates)
        self.features = torch.from_numpy(self.values)
        self.labels = torch.from_numpy(candidates["label"].to_numpy(np.float32))
        self.file_of, names = pd.factorize(candidates["image_filename"])
        self.files: list[TensorFile] = []
        problems = []
        for name in progress(names, "tensors"):
            try:
                self.files.append(open_tensor(inside(dataset_dir, name)))
            except DatasetError as error:
                problems.append(str(error))
        raise_problems(problems, len(problems))

    def rows_of(self, split: str) -> np.ndarray:
        """Return the rows whose column `split` is so."""
        return np.flatnonzero(self.candidates["split"] == split)

    def fit_features(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale the features as those of some rows, the training split, ask for."""
        scaling = fit_scaling(self.values[rows])
        self.features = torch.from_numpy(scale_features(self.values, *scaling))
        return scaling

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.labels)

    def __getitem__(self, index: int | Sequence[int]) -> Batch:
        """Return a candidate, or a batch whose cutouts are (N, 4, 64, 64), channels last."""
        if np.ndim(index) == 0:
            return tuple(values[0] for values in self[[index]])
        rows = np.asarray(index)
        squares = self.read_cutouts(rows)
        if not (squares.min(initial=0) >= 0 and squares.max(initial=0) <= 1):  # NaN fails both
            wrong = rows[~((squares >= 0) & (squares <= 1)).all(axis=(1, 2, 3))]
            paths = [self.files[number].path for number in np.unique(self.file_of[wrong])]
            reason = "a pixel is not in [0, 1]; remove it and run create_dataset.py"
            raise_problems([f"{path}: {reason}" for path in paths], len(paths))
        return torch.from_numpy(squares).permute(0, 3, 1, 2), self.features[rows], self.labels[rows]

    def read_cutouts(self, rows: np.ndarray) -> np.ndarray:
        """Read the cutouts of candidates, float32 (N, 64, 64, 4), tensor by tensor."""
        squares = np.zeros((len(rows), CUTOUT_PX, CUTOUT_PX, len(CHANNEL_NAMES)), np.float32)
        for number in np.unique(self.file_of[rows]):
            file = self.files[number]
            with file.path.open("rb", buffering=0) as handle:
                if hasattr(os, "posix_fadvise"):  # what lies between the cutouts is not to be read
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for i in np.flatnonzero(self.file_of[rows] == number):
                    read_cutout(handle, file, self.positions[rows[i]], squares[i])
        return squares

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Return candidates one by one, read as a batch: what a DataLoader asks for."""
        return list(zip(*self[indices], strict=True))


@contextmanager
def holds(claim: str, failures: list[str], go_on: bool = False) -> Iterator[None]:
    """Print whether what the block checks holds; end there, or go on, where it does not."""
    try:
        yield
    except (DatasetError, OSError) as error:
        print(f"  no    {claim}", flush=True)
        failures.append(str(error))
        if not go_on:
            raise DatasetError("\n".join(failures)) from error
    else:
        print(f"  yes   {claim}", flush=True)


def examine(args: argparse.Namespace) -> CutoutDataset:
    """Print what holds of a dataset; raise DatasetError with a line for all that does not."""
    json_path = args.dataset_dir / CROISSANT_NAME
    failures: list[str] = []
    print(args.dataset_dir)
    with holds("croissant.json is valid Croissant", failures):
        description = load_description(json_path)
    with holds("the index is in the folder and as described (SHA-256)", failures):
        check_files(description, json_path)
    with holds("mlcroissant reads every record", failures):
        candidates = read_records(description, json_path)
    match, label = candidates["match"], candidates["label"]
    with holds("labels are 0 or 1, and 1 just where match is not -1", failures, go_on=True):
        wrong = match.isna() | (label != (match != -1))
        refuse(candidates, wrong, "label {label:g}, match {match:g}")
    with holds("both classes occur", failures, go_on=True):
        real, total = (label == 1).sum(), len(label)
        if real in (0, total):
            raise DatasetError(f"{real} of {total} candidates are real; both classes are needed")
    with holds("candidates occur once, and have their job's tensor", failures, go_on=True):
        refuse(candidates, candidates.duplicated(["jid", "id"]) & candidates["id"].notna(), "twice")
        named = "images/" + candidates["jid"] + ".npy"
        refuse(candidates, candidates["image_filename"] != named, "image is {image_filename}")
    with holds("tensors are in the folder, whole, and float32 (H, W, 4)", failures):
        dataset = CutoutDataset(args.dataset_dir, candidates)
    with holds("positions are on their image", failures):
        nearest = np.floor(dataset.positions + 0.5)
        sizes = [(file.width, file.height) for file in dataset.files]
        ends = np.array(sizes, dtype=int).reshape(-1, 2)[dataset.file_of]
        wrong = ~((nearest >= 0) & (nearest < ends)).all(axis=1)
        refuse(candidates, wrong, "position ({x:g}, {y:g}) is not on its image")
    if args.max_candidates is not None:
        dataset = CutoutDataset(args.dataset_dir, thin(candidates, args.max_candidates, args.seed))
    total, checked = len(dataset), min(len(dataset), CHECKED_CUTOUTS)
    with holds(f"cutouts are finite and in [0, 1] ({checked:,} of {total:,} read)", failures):
        for rows in batches_of(np.linspace(0, total - 1, checked).astype(int), BATCH_SIZE):
            dataset[rows]
    if failures:
        raise DatasetError("\n".join(failures))
    return dataset


def batches_of(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Divide rows into batches of so many; the last may have fewer."""
    return np.array_split(rows, range(size, len(rows), size))


def thin(candidates: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Keep no more than so many candidates, at random, as many of each job as it has."""
    shuffled = candidates.sample(frac=1, random_state=seed)
    rank_in_job = shuffled.groupby("jid").cumcount().sort_values(kind="stable")
    return candidates.loc[np.sort(rank_in_job.index[:count])].reset_index(drop=True)


def deal_out(units: pd.Series | pd.Index, labels: np.ndarray, seed: int) -> np.ndarray | None:
    """Deal units of candidates, such as jobs, out to SPLITS; return the split of each candidate.

    Units with both classes, with real and with bogus candidates alone are dealt out apart, in
    random order, so that each split gets its share of each. Where one lacks a class then, those of
    one class are dealt out after those of both; None where that does not help either.
    """
    unit_of, names = pd.factorize(units)
    sizes, real = np.bincount(unit_of), np.bincount(unit_of, weights=labels)
    kinds = np.where(real == 0, 0, np.where(real == sizes, 1, BOTH))
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-kinds[order], kind="stable")]
    split = np.empty(len(names), dtype=int)
    for joined in (BOTH, 1, 0):
        groups = np.where(kinds == joined, BOTH, kinds)[order]
        for group in np.unique(groups):
            members = order[groups == group]
            split[members] = np.resize(DEAL, len(members))
        parts = [labels[split[unit_of] == number] for number in range(len(SPLITS))]
        if all(0 < part.sum() < len(part) for part in parts):
            return np.array(SPLITS)[split[unit_of]]
    return None


def split_candidates(candidates: pd.DataFrame, seed: int) -> np.ndarray:
    """Split candidates into training, validation and test ones, each with both classes.

    Jobs are kept together. Where there are too few of them, a warning is logged, and candidates
    are split instead: a network then knows the sky, the PSF and the flaws that it is judged on.

    Returns
    -------
    numpy.ndarray
        str (N,), one of SPLITS for each candidate.

    Raises
    ------
    DatasetError
        Fewer than three candidates are real, or are bogus.
    """
    labels = candidates["label"].to_numpy()
    split = deal_out(candidates["jid"], labels, seed)
    if split is None:
        LOG.warning(
            "too few jobs hold real and bogus candidates to split by job: candidates of one job"
            " are trained on and judged, which flatters; add jobs or raise --max_candidates"
        )
        split = deal_out(candidates.index, labels, seed)
    if split is None:
        raise DatasetError(
            f"{labels.sum():.0f} of {len(labels)} candidates are real; training, validation and"
            " test need a real and a bogus one each: add jobs or raise --max_candidates"
        )
    return split


def tower(channels: int, size: int, block: int, widths: Sequence[int]) -> nn.Sequential:
    """Make layers that turn (N, channels, size, size) into (N, 32).

    Blocks of pixels become channels, then convolutions alternate with pooling. The maps are
    flattened, not averaged, because where a source lies matters, and are reduced to 32 values, or
    they would drown the features.
    """
    layers: list[nn.Module] = [nn.PixelUnshuffle(block)] if block > 1 else []
    channels, size = channels * block**2, size // block
    for width in widths:
        layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.MaxPool2d(2), nn.ReLU()]
        channels, size = width, size // 2
    layers += [nn.Flatten(), nn.Linear(channels * size**2, 32), nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers)


class RealBogusNetwork(nn.Module):
    """A network that joins two looks at the cutout with the features, and gives a logit.

    The middle of the cutout, where the candidate is, is seen pixel by pixel; the whole, which shows
    trails and bright neighbours, in blocks of 4 x 4 pixels.
    """

    def __init__(self, feature_count: int = len(FEATURE_COLUMNS) + 1) -> None:
        super().__init__()
        self.inner = tower(len(CHANNEL_NAMES), INNER_PX, block=1, widths=(32, 64))
        self.whole = tower(len(CHANNEL_NAMES), CUTOUT_PX, block=4, widths=(32, 64))
        self.features = nn.Sequential(
            nn.Linear(feature_count, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()
        )
        self.head = nn.Sequential(
            nn.Linear(3 * 32, 64), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(64, 1)
        )

    def forward(self, cutouts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return logits (N,), float32, of cutouts (N, 4, 64, 64) and features (N, 10).

        The type of the cutouts, float32 or bfloat16, is that in which convolutions are computed.
        """
        edge = (CUTOUT_PX - INNER_PX) // 2
        kind, dtype = cutouts.device.type, cutouts.dtype
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            inner = self.inner(cutouts[:, :, edge:-edge, edge:-edge])
            looks = (inner, self.whole(cutouts), self.features(features))
        return self.head(torch.cat(looks, dim=1).float()).squeeze(1)  # bfloat16 would make ties


def pick_device(name: str) -> tuple[torch.device, torch.dtype]:
    """Return the device of a name, and the type that it computes convolutions fastest in.

    That is bfloat16 where there are instructions for it: without them it is slower than float32.
    On the CPU, PyTorch is then left one thread in this process.
    """
    rank = int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine: all choose alike
    there = {"cuda": torch.cuda.device_count() >= processes}
    there |= {"mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise DatasetError(f"--device {name}: there is none here; auto takes what there is")
    if name == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = name == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
    if name == "cpu" and fast:  # threads that wait for each other lose more than a second one wins
        torch.set_num_threads(1)
    device = torch.device(f"cuda:{rank}" if name == "cuda" else name)
    return device, torch.bfloat16 if fast else torch.float32


def summed(values: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Add up the values of all processes, in place."""
    if args.processes > 1:
        distributed.all_reduce(values)
    return values


def is_leader() -> bool:
    """Return whether this process is the one that prints and writes."""
    return not distributed.is_torchelastic_launched() or os.environ["RANK"] == "0"


def join_processes(device: torch.device) -> tuple[int, int]:
    """Join the processes that torchrun started; return the rank of this one and their number."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


def progress(steps: Iterable, text: str, total: int | None = None) -> Iterable:
    """Show a progress bar on a terminal."""
    shown = is_leader() and sys.stderr is not None
    return tqdm(steps, text, total, leave=False, disable=None if shown else True)


def share_out(rows: np.ndarray, args: argparse.Namespace) -> list[np.ndarray]:
    """Divide rows into batches, and return this process's share of each."""
    batches = batches_of(rows, args.batch_size)
    return [batch[args.rank :: args.processes] for batch in batches]


def keep_quiet(_: int) -> None:
    """Print nothing in a worker: its errors go to the parent, all else is of an end by Ctrl-C."""
    sys.excepthook = lambda *_: None


def start_workers(loader: DataLoader) -> Iterator[Batch]:
    """Start to read. Ctrl-C is held back meanwhile, and workers leave it to this process."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        batches = iter(loader)
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
    return batches


def read_batches(
    dataset: CutoutDataset, shares: list[np.ndarray], args: argparse.Namespace
) -> Iterator[Batch]:
    """Start to read batches, and return an iterator that puts them on the device."""
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    loader = DataLoader(
        dataset, None, sampler=shares, num_workers=args.workers, worker_init_fn=keep_quiet
    )
    return on_device(start_workers(loader), args)


def on_device(batches: Iterator[Batch], args: argparse.Namespace) -> Iterator[Batch]:
    """Yield batches on the device; raise DatasetError where a cutout cannot be read."""
    try:
        for cutouts, features, labels in batches:
            cutouts = cutouts.to(args.device, args.dtype)
            yield cutouts, features.to(args.device), labels.to(args.device)
    except (DatasetError, OSError, RuntimeError) as error:
        if args.workers == 0:
            raise
        *_, text = str(error).rpartition("Error: ")  # a traceback stands before it
        raise DatasetError(text.strip()) from error


def augment(cutouts: torch.Tensor) -> torch.Tensor:
    """Bring cutouts, (N, 4, 64, 64), into one of eight orientations each, by their random place."""
    turned = torch.empty_like(cutouts)
    for k in range(8):
        part = cutouts[k::8]
        part = part.transpose(2, 3) if k & 4 else part
        turned[k::8] = part.flip([dim for dim, bit in ((2, 1), (3, 2)) if k & bit])
    return turned


def read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Let a thread prepare the next batch while this one is trained on."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def train_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    loss_function: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    args: argparse.Namespace,
) -> float:
    """Train on each batch once and return the mean loss of a candidate."""
    network.train()
    total = torch.zeros(2, device=args.device)  # loss, candidates
    for cutouts, features, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(network(cutouts, features), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += torch.stack([loss.detach() * len(labels), total.new_tensor(len(labels))])
    loss, count = summed(total, args).tolist()
    return loss / count


@torch.inference_mode()
def predict(
    network: nn.Module, dataset: CutoutDataset, rows: np.ndarray, args: argparse.Namespace
) -> torch.Tensor:
    """Return the logits of candidates, float32 (N,), in all processes."""
    network.eval()
    logits = torch.zeros(len(rows), device=args.device)
    places = share_out(np.arange(len(rows)), args)
    batches = read_batches(dataset, [rows[place] for place in places], args)
    for place, (cutouts, features, _) in zip(places, progress(batches, "judging"), strict=True):
        logits[place] = network(cutouts, features)
    return summed(logits, args)


def equal_loss(labels: torch.Tensor) -> nn.BCEWithLogitsLoss:
    """Make the loss in which both classes weigh the same, however rare one of them is."""
    real = labels.sum()
    return nn.BCEWithLogitsLoss(pos_weight=(len(labels) - real) / real)


def learn(
    network: nn.Module, dataset: CutoutDataset, args: argparse.Namespace
) -> Iterator[dict[str, float]]:
    """Train on the training split; yield after each epoch its figures on the validation split."""
    rows, held_out = dataset.rows_of("train"), dataset.rows_of("validation")
    labels = dataset.labels[held_out]
    learner = nn.parallel.DistributedDataParallel(network) if args.processes > 1 else network
    optimizer = AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    leftover = len(rows) % args.batch_size  # is dropped where batch norm could not use it
    used = len(rows) - (leftover if leftover < 2 * args.processes else 0)
    steps = math.ceil(used / args.batch_size)
    schedule = OneCycleLR(optimizer, args.learning_rate, args.epochs * steps)
    loss_function = equal_loss(dataset.labels[rows]).to(args.device)
    for epoch in range(1, args.epochs + 1):
        order = np.random.default_rng([args.seed, epoch]).permutation(rows)[:used]
        batches = read_batches(dataset, share_out(order, args), args)
        augmented = ((augment(cutouts), *others) for cutouts, *others in batches)
        bar = progress(read_ahead(augmented), f"epoch {epoch}", steps)
        train_loss = train_epoch(learner, bar, loss_function, optimizer, schedule, args)
        for values in network.buffers():  # of batch norm: all processes are to judge alike
            values.copy_(summed(values.float(), args) / args.processes)
        logits = predict(network, dataset, held_out, args)
        loss = loss_function(logits, labels.to(args.device)).item()
        if not math.isfinite(train_loss + loss):
            raise DatasetError("the loss is not finite any more: try a lower --learning_rate")
        ranking = sort_scores(logits.cpu().numpy())
        roc_auc, average_precision = rank_scores(labels.numpy(), ranking)
        yield {
            "epoch": epoch,
            "train_loss": train_loss,
            "validation_loss": loss,
            "roc_auc": roc_auc,
            "average_precision": average_precision,
        }


def train(
    dataset: CutoutDataset, args: argparse.Namespace
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a network, log each epoch, and return it as it was after the best one.

    The best epoch is the one with the highest average precision on the validation split. Ctrl-C
    after the first epoch ends the training there: the history is shorter than asked for.
    """
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    network = RealBogusNetwork().to(args.device, memory_format=torch.channels_last)
    torch.manual_seed(args.seed + args.rank)  # each process flips in its own way
    history: list[dict[str, float]] = []
    best: dict[str, torch.Tensor] = {}
    try:
        for row in learn(network, dataset, args):
            history.append(row)
            if row is find_best(history):
                best = {name: values.clone() for name, values in network.state_dict().items()}
            LOG.info(EPOCH_LINE.format(epochs=args.epochs, **row))
    except KeyboardInterrupt:
        if not best or args.processes > 1:  # the others were interrupted elsewhere
            raise
        LOG.error(f"interrupted in epoch {len(history) + 1}; judged is what was learned before")
    network.load_state_dict(best)
    return network, history


def choose_epochs(count: int, batch_size: int) -> int:
    """Return how many passes over so many candidates train a network, within limits."""
    return min(max(MIN_EPOCHS, math.ceil(MIN_STEPS * batch_size / count)), MAX_EPOCHS)


def find_best(history: list[dict[str, float]]) -> dict[str, float]:
    """Return the epoch of the highest average precision, the first of equal ones."""
    return max(history, key=lambda row: row["average_precision"])


def sort_scores(scores: np.ndarray) -> Ranking:
    """Return the order of falling scores (N,), and where in it each run of equal scores ends.

    NaN comes last, as one run.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    return order, np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)


def count_steps(
    labels: np.ndarray, ranking: Ranking, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Count, at the start and at each step down a ranking, the real and all candidates so far."""
    order, ends = ranking
    weights = np.ones(len(labels)) if weights is None else weights
    real = np.cumsum((weights * labels)[order])[ends]
    return np.append(0, real), np.append(0, np.cumsum(weights[order])[ends])


def rank_scores(
    labels: np.ndarray, ranking: Ranking, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """Return ROC AUC and average precision of a ranking.

    Area under the ROC curve by trapezoids, and the sum of precision times the step in recall (the
    definition of scikit-learn's `average_precision_score`).
    """
    real, called = count_steps(labels, ranking, weights)
    recall, false_rate = real / real[-1], (called - real) / (called[-1] - real[-1])
    precision = real[1:] / np.maximum(called[1:], 1)
    roc_auc = np.trapezoid(recall, false_rate)
    return float(roc_auc), float(np.sum(np.diff(recall) * precision))


def resample(labels: np.ndarray, jobs: pd.Series, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each candidate is drawn, with replacement, in each sample of the bootstrap.

    Whole jobs are drawn where there are enough of them, because candidates of one job are alike;
    else candidates of each class.
    """
    rng = np.random.default_rng(seed)
    unit_of, names = pd.factorize(jobs)
    strata = [np.arange(len(names))]
    if len(names) < MIN_JOBS:
        unit_of = np.arange(len(labels))
        strata = [np.flatnonzero(labels == kind) for kind in (0, 1)]
    times_drawn = np.zeros(unit_of.max() + 1)
    for _ in range(RESAMPLES):
        weights = np.zeros(len(labels))
        while not 0 < weights @ labels < weights.sum():  # both classes are needed
            for units in strata:
                drawn = rng.integers(len(units), size=len(units))
                times_drawn[units] = np.bincount(drawn, minlength=len(units))
            weights = times_drawn[unit_of]
        yield weights


def compare_rankings(test: pd.DataFrame, seed: int) -> dict[str, dict[str, Estimate]]:
    """Return ROC AUC and average precision of the rankings of the test candidates.

    `behind` is by how much the average precision is below the network's. The intervals are at 95 %,
    from the same resamples.
    """
    labels = test["label"].to_numpy()
    rankings = [sort_scores(test[column].to_numpy()) for column in RANKINGS.values()]
    as_it_is = np.ones(len(test))  # values[0] are of the test split itself, the others resampled
    weights = itertools.chain([as_it_is], resample(labels, test["jid"], seed))
    values = np.array([[rank_scores(labels, ranking, w) for ranking in rankings] for w in weights])
    values = np.dstack([values, values[:, :1, 1] - values[:, :, 1]])
    low, high = np.percentile(values[1:], CONFIDENCE, axis=0)
    estimates = np.stack([values[0], low, high], axis=-1).tolist()
    named = [dict(zip(FIGURES, row, strict=True)) for row in estimates]
    return dict(zip(RANKINGS, named, strict=True))


def regress(dataset: CutoutDataset, rows: np.ndarray) -> np.ndarray:
    """Fit a logistic regression to the features of some rows; return the logits of all."""
    features = torch.cat([dataset.features, torch.ones(len(dataset), 1)], dim=1).double()
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")
    loss_function = equal_loss(dataset.labels[rows].double())

    def closure() -> torch.Tensor:
        """Return the loss with its gradient, as often as LBFGS asks for it."""
        optimizer.zero_grad()
        loss = loss_function(features[rows] @ weights, dataset.labels[rows].double())
        loss = loss + RIDGE * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (features @ weights).detach().numpy()


def choose_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the score from which on candidates are to be called real for the highest F1."""
    order, ends = sort_scores(scores)
    real, called = count_steps(labels, (order, ends))
    return float(scores[order][ends][np.argmax(real[1:] / (called[1:] + real[-1]))])


def call(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """Return the confusion matrix at a threshold, real being positive, and what follows from it."""
    called = scores >= threshold
    tn, fp, fn, tp = np.bincount(2 * labels.astype(int) + called, minlength=4).tolist()
    return {
        "threshold": threshold,
        "true_positives": tp,
        "false_negatives": fn,
        "false_positives": fp,
        "true_negatives": tn,
        "precision": tp / max(tp + fp, 1),
        "recall": tp / (tp + fn),
        "f1": 2 * tp / (2 * tp + fp + fn),
    }


def reach_verdict(
    rankings: dict[str, dict[str, Estimate]], real: int, bogus: int
) -> tuple[bool, str]:
    """Say whether the network learned, with the interval that says so.

    It did where the interval of its ROC AUC is above 0.5. That of the average precision does not
    tell: of a ranking by chance it lies above the base rate in 13 to 31 of 100 trials.
    """
    if min(real, bogus) < MIN_EACH:
        return False, f"cannot tell: {real} real and {bogus} bogus test candidates are too few"
    network, *yardsticks = rankings
    roc_auc = rankings[network]["roc_auc"]
    text = f"ROC AUC {ESTIMATE.format(*roc_auc)}, where chance gives 0.5"
    if roc_auc[1] <= 0.5:
        return False, f"not learned: {text}"
    best = max(yardsticks, key=lambda name: rankings[name]["average_precision"][0])
    gain, low, high = rankings[best]["behind"]
    better = "better" if low > 0 else "worse" if high < 0 else "not clearly better"
    return True, (
        f"learned: {text}; {better} than {best}"
        f" (average precision {gain:+.3f}, {low:+.3f} to {high:+.3f})"
    )


def judge(candidates: pd.DataFrame, seed: int) -> dict:
    """Hold the columns `score` and `regression` of the test split against its labels."""
    validation, test = (candidates[candidates["split"] == name] for name in SPLITS[1:])
    threshold = choose_threshold(validation["label"].to_numpy(), validation["score"].to_numpy())
    rankings = compare_rankings(test, seed)
    labels, real = test["label"].to_numpy(), int(test["label"].sum())
    learned, verdict = reach_verdict(rankings, real, len(labels) - real)
    return {
        "learned": learned,
        "verdict": verdict,
        "base_rate": real / len(labels),
        "rankings": rankings,
        "calls": call(labels, test["score"].to_numpy(), threshold),
    }


def count_splits(candidates: pd.DataFrame) -> pd.DataFrame:
    """Return a table of the jobs, the candidates and the real candidates of each split."""
    columns = {"jobs": ("jid", "nunique"), "candidates": ("id", "size"), "real": ("label", "sum")}
    return candidates.groupby("split").agg(**columns).loc[list(SPLITS)].astype(int)


def describe_splits(candidates: pd.DataFrame) -> str:
    """Return the lines about the splits."""
    counts = count_splits(candidates)
    whole = counts["jobs"].sum() == candidates["jid"].nunique()
    title = f"split by {'job' if whole else 'candidate'}"
    lines = [f"  {title:<22}{'jobs':>6}{'candidates':>13}{'real':>8}"]
    for name, jobs, count, real in counts.itertuples():
        lines.append(f"  {name:<22}{jobs:6,}{count:13,}{real:8,} ({real / count:.1%})")
    return "\n".join(lines)


def describe_results(results: dict) -> str:
    """Return the closing lines: the rankings of the test split, the calls, the verdict."""
    lines = [f"  {'on the test split':<22}{'ROC AUC':<26}average precision"]
    for name, figures in results["rankings"].items():
        roc_auc, precision, _ = (ESTIMATE.format(*figures[key]) for key in FIGURES)
        lines.append(f"  {name:<22}{roc_auc:<26}{precision}")
    lines.append(f"  {'base rate':<22}{'0.500':<26}{results['base_rate']:.3f}")
    return "\n".join(lines) + CALLS.format(**results["calls"]) + f"verdict: {results['verdict']}"


def draw_curves(axes: Sequence, test: pd.DataFrame, results: dict) -> None:
    """Draw losses, ROC curves, precision-recall curves and histograms of the test candidates."""
    losses, roc, precision_recall, histogram = axes
    labels, calls = test["label"].to_numpy(), results["calls"]
    history = pd.DataFrame(results["history"]).set_index("epoch")
    for column, color in (("train_loss", "0.6"), ("validation_loss", "C0")):
        losses.plot(history[column], ".-", color=color, label=column.replace("_", " "))
    losses.axvline(results["best_epoch"], color="C0", linestyle=":", label="epoch kept")
    for (name, column), color in zip(RANKINGS.items(), ("C0", "C1", "0.6"), strict=True):
        real, called = count_steps(labels, sort_scores(test[column].to_numpy()))
        recall, bogus = real / real[-1], (called - real) / (called - real)[-1]
        area, average, _ = (value for value, *_ in results["rankings"][name].values())
        roc.plot(bogus, recall, color=color, label=f"{name}  {area:.3f}")
        precision = real[1:] / called[1:]
        precision_recall.plot(recall[1:], precision, color=color, label=f"{name}  {average:.3f}")
    roc.plot((0, 1), (0, 1), ":", color="0.8", label="chance  0.500")
    base = results["base_rate"]
    precision_recall.plot((0, 1), (base, base), ":", color="0.8", label=f"base rate  {base:.3f}")
    precision_recall.plot(calls["recall"], calls["precision"], "o", color="C0", label="threshold")
    for label, name, color in ((0, "bogus", "0.6"), (1, "real", "C3")):
        bins = np.linspace(0, 1, 41)
        histogram.hist(test["score"][labels == label], bins, color=color, alpha=0.7, label=name)
    histogram.axvline(calls["threshold"], color="C0", linestyle=":", label="threshold")
    histogram.set_yscale("log")
    for curve, (title, x, y) in zip(axes, CURVES, strict=True):
        curve.set(title=title, xlabel=x, ylabel=y)
        curve.legend(frameon=False, fontsize="small")


def draw_sheet(
    axes: Sequence, test: pd.DataFrame, dataset: CutoutDataset, threshold: float
) -> None:
    """Draw the cutouts of the most confident right and wrong calls, a row a candidate."""
    size, kinds = CUTOUT_PX + 2, ("bogus", "real")
    centers = (np.arange(SHEET_ROWS) + 0.5) * size
    for axis, (label, called) in zip(axes, itertools.product((1, 0), repeat=2), strict=True):
        group = test[(test["label"] == label) & ((test["score"] >= threshold) == called)]
        chosen = group.sort_values("score", ascending=not called)[:SHEET_ROWS]
        sheet = np.full((SHEET_ROWS, size, len(CHANNEL_NAMES), size), np.nan)
        sheet[: len(chosen), 1:-1, :, 1:-1] = dataset[chosen.index][0].permute(0, 2, 1, 3)
        axis.imshow(sheet.reshape(SHEET_ROWS * size, -1), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{kinds[label]}, called {kinds[called]}: {len(group):,}")
        axis.set_xticks(centers[: len(CHANNEL_NAMES)], CHANNEL_NAMES)
        names = [f"{row.jid}\n{row.id:.15g}\n{row.score:.3f}" for row in chosen.itertuples()]
        axis.set_yticks(centers[: len(chosen)], names, parse_math=False)
        axis.tick_params(length=0, labelsize="small")
        axis.spines[:].set_visible(False)


def draw_report(dataset: CutoutDataset, results: dict) -> bytes:
    """Draw the picture of the report; return it as PNG."""
    from matplotlib.figure import Figure  # an optional extra

    test = dataset.candidates[dataset.candidates["split"] == "test"]
    figure = Figure(figsize=(17, 10), dpi=120, layout="constrained")
    figure.suptitle(results["verdict"])
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    draw_curves(upper.subplots(1, 4), test, results)
    draw_sheet(lower.subplots(1, 4), test, dataset, results["calls"]["threshold"])
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def prepare_report_dir(folder: Path) -> None:
    """Make the folder of the report, before hours are spent on what could not be written there."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise DatasetError("--report_dir draws with matplotlib: pip install matplotlib") from error
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def pack_model(network: nn.Module, scaling: tuple[np.ndarray, ...], results: dict) -> bytes:
    """Return model.pt: the weights and what else it takes to call candidates."""
    model = {
        "weights": network.cpu().state_dict(),
        "center": torch.from_numpy(scaling[0]),
        "scale": torch.from_numpy(scaling[1]),
        "feature_columns": FEATURE_COLUMNS,
        "threshold": results["calls"]["threshold"],
        "settings": results["settings"],
    }
    packed = io.BytesIO()
    torch.save(model, packed)
    return packed.getvalue()


def write_report(folder: Path, dataset: CutoutDataset, results: dict, model: bytes) -> None:
    """Write metrics.json, predictions.csv, model.pt and report.png; none is seen half-written."""
    columns = ["jid", "id", "split", "label", "score"]
    predictions = dataset.candidates[columns].astype({"label": int}).to_csv(index=False)
    contents = {
        "metrics.json": (json.dumps(results, indent=2, allow_nan=False) + "\n").encode(),
        "predictions.csv": predictions.encode(),
        "model.pt": model,
        "report.png": draw_report(dataset, results),
    }
    parts = {folder / f".{name}.part": folder / name for name in contents}
    try:
        for part, content in zip(parts, contents.values(), strict=True):
            part.write_bytes(content)
        for part, path in parts.items():
            part.replace(path)
    except OSError as error:
        raise DatasetError(f"{folder}: the report cannot be written: {error}") from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def find_exit_code(results: dict, min_ap: float | None) -> int:
    """Return the exit code of a finished training; log why it is 1."""
    if results["interrupted"]:
        return 130
    precision = results["rankings"]["network"]["average_precision"][0]
    if min_ap is None or (results["learned"] and precision >= min_ap):
        return 0
    LOG.error(f"--min_ap {min_ap}: average precision {precision:.3f}, {results['verdict']}")
    return 1


def run(args: argparse.Namespace) -> int:
    """Check the dataset, train on it, judge the network, and return the exit code."""
    args.device, args.dtype = pick_device(args.device)
    writes = args.report_dir is not None and is_leader()
    if writes:
        prepare_report_dir(args.report_dir)
    dataset = examine(args)
    candidates = dataset.candidates
    candidates["split"] = split_candidates(candidates, args.seed)
    print(describe_splits(candidates), flush=True)
    rows = dataset.rows_of("train")
    scaling = dataset.fit_features(rows)
    args.epochs = args.epochs or choose_epochs(len(rows), args.batch_size)
    args.rank, args.processes = join_processes(args.device)
    if min(args.batch_size, len(rows)) < 2 * args.processes:
        raise DatasetError(
            f"{args.processes} processes need two candidates each in a batch: --batch_size is"
            f" {args.batch_size}, and {len(rows)} are trained on"
        )
    network, history = train(dataset, args)
    logits = predict(network, dataset, np.arange(len(dataset)), args).cpu()
    # Scores rank; they are no probabilities, because training weighs both classes the same.
    candidates["score"] = torch.sigmoid(logits.double()).numpy()
    candidates["regression"] = regress(dataset, rows)
    results = {
        **judge(candidates, args.seed),
        "splits": count_splits(candidates).to_dict("index"),
        "interrupted": len(history) < args.epochs,
        "best_epoch": find_best(history)["epoch"],
        "history": history,
        "settings": json.loads(json.dumps(vars(args), default=str)),
        "versions": {package: version(package) for package in ("numpy", "mlcroissant", "torch")},
    }
    print(describe_results(results), flush=True)
    if writes:
        model = pack_model(network, scaling, results)
        write_report(args.report_dir, dataset, results, model)
    return find_exit_code(results, args.min_ap)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,  # or the help would say "default: None"
    )
    add, number = parser.add_argument, {"type": int, "metavar": "N"}
    add("-d", "--dataset_dir", type=Path, default="./hackathon_dataset", help="dataset to train on")
    add("--epochs", help="passes over the training split; by default what it needs", **number)
    add("--batch_size", default=BATCH_SIZE, help="candidates a step", **number)
    add("--learning_rate", type=float, default=LEARNING_RATE, help="highest of the one-cycle rate")
    add("--seed", default=SEED, help="seed of the split, the weights and the order", **number)
    add("--workers", default=0, help="processes that read cutouts ahead", **number)
    add("--device", choices=DEVICES, default="auto", help="what to compute on")
    add("--report_dir", type=Path, help="folder for the figures, scores, weights and a picture")
    add("--min_ap", type=float, help="average precision below which the exit code is 1")
    add("--max_candidates", help="take no more of them, evenly over the jobs", **number)
    unset = dict.fromkeys(("epochs", "report_dir", "min_ap", "max_candidates"))
    args = parser.parse_args(argv, argparse.Namespace(**unset))
    least = {"epochs": 1, "batch_size": 2, "workers": 0, "max_candidates": 1, "seed": 0}
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            parser.error(f"--{name} must be at least {value}")
    if not 0 < args.learning_rate <= 1:
        parser.error("--learning_rate must be above 0 and no more than 1")
    if args.workers > MAX_WORKERS:
        parser.error(f"--workers must be no more than {MAX_WORKERS}")
    if args.seed >= 2**32:
        parser.error("--seed must be below 2**32")
    if args.min_ap is not None and not 0 <= args.min_ap <= 1:
        parser.error("--min_ap must be between 0 and 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    LOG.setLevel(logging.INFO if is_leader() else logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)  # what is not stated is no fault here
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that it cannot print
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with redirect_stdout(sys.stdout if is_leader() else None), logging_redirect_tqdm():
            return run(args)
    except (DatasetError, OSError) as error:
        for line in str(error).splitlines():
            LOG.error(line)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted")
        return 130


def interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    """Repeat a Ctrl-C that came within a destructor, where exceptions are lost."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


if __name__ == "__main__":
    sys.unraisablehook = interrupt_again
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
