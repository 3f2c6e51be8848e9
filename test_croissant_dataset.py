#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3",
#     "pandas>=2.2.2,<4",
#     "mlcroissant>=1.1.1,<1.2",
#     "torch>=2.6,<3",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Train a real-bogus network on a dataset and say whether the dataset can be learned from.

Reads `croissant.json` in the dataset folder, the records that it describes through mlcroissant, and
from the tensors that they name a 64 x 64 cutout around each candidate. Nothing is downloaded.
Writes metrics.json, predictions.csv, model.pt and report.png if `--report_dir` is given.

First it prints a list of checks. Then a network that sees the four-channel cutout and nine columns
of the catalog is trained on some of the jobs. The best epoch and the threshold are chosen on other
jobs, and the rest are the test. With 3 % real candidates, accuracy would praise a network that says
"bogus" to all. The verdict therefore rests on how the network ranks the candidates within each test
job, beside what a logistic regression, the flux alone and chance reach.

    python test_croissant_dataset.py
    python test_croissant_dataset.py -d ./my_dataset --report_dir ./report --min_ap 0.8
    torchrun --nproc_per_node 4 test_croissant_dataset.py -d ./my_dataset

Exit codes: 0 trained and tested; 1 the dataset is missing, damaged or too small, or the network is
below `--min_ap` (the reason is on stderr); 2 wrong usage; 130 interrupted by Ctrl-C.
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import logging
import math
import mmap
import os
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path, PureWindowsPath

import mlcroissant as mlc
import numpy as np
import pandas as pd
import torch
from torch import distributed, nn
from torch.optim import LBFGS, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

CHANNEL_NAMES = ("science", "reference", "difference", "score")
CROISSANT_NAME = "croissant.json"
RECORD_SET = "transient_candidates"
FEATURE_COLUMNS = tuple(
    "sharpness roundness1 roundness2 npix peak flux mag daofind_mag flags".split()
)
TEXT_COLUMNS = ("jid", "image_filename")
NUMBER_COLUMNS = ("id", "x", "y", *FEATURE_COLUMNS, "match", "label")
COLUMN_OF_FIELD = {f"{RECORD_SET}/{column}": column for column in (*TEXT_COLUMNS, *NUMBER_COLUMNS)}
CUTOUT_PX = 64  # side of a cutout; the candidate's nearest pixel is at [32, 32]
INNER_PX = 16  # side of its middle, which the network sees at full resolution
CHECKED_CUTOUTS = 1000  # read before training; the others are checked when they are trained on
RECORDS_PER_PART = 10_000  # which mlcroissant reads in 2.5 s; more are read in parallel
MEMORY_SHARE = 0.25  # of the memory, for the tensors among which candidates are shuffled
SPLITS = ("train", "validation", "test")
TURNS = ("train", "validation", "test", "train", "train")  # jobs are dealt to these in turn
BATCH_SIZE = 128  # candidates per step
STEPS, MAX_EPOCHS = 550, 60  # what the number of epochs aims at, and its limit
LEARNING_RATE = 3e-3  # highest rate of the one-cycle schedule
WEIGHT_DECAY, DROPOUT = 1e-1, 0.5
RESAMPLES = 1000  # of the bootstrap
MIN_JOBS = 10  # if a split has at least as many jobs, the jobs are resampled, too
MIN_EACH = 5  # real and bogus test candidates that a verdict needs
SEED = 20260
MAX_PROBLEMS = 20  # listed in a message; the others are counted
DESCRIBE_AGAIN = "run generate_croissant.py again"

LOG = logging.getLogger("test_croissant_dataset")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # cutouts, features, labels
Ranking = tuple[np.ndarray, np.ndarray]  # ranks int (N,), from 0, job by job; job of each rank
Estimate = list[float]  # a figure and the ends of its 95 % interval


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line."""

    dataset_dir: Path
    epochs: int | None
    batch_size: int
    learning_rate: float
    seed: int
    device: str
    report_dir: Path | None
    min_ap: float | None
    max_candidates: int | None


@contextmanager
def explain_failure(text: str) -> Iterator[None]:
    """Turn the failure of a library into a DatasetError that begins with a text."""
    try:
        yield
    except (DatasetError, OSError):  # such as a full disk
        raise
    except Exception as error:  # numpy, mlcroissant and its parsers raise anything
        while error.__cause__:
            error = error.__cause__
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise DatasetError(f"{text}: {reason}") from error


def raise_problems(problems: list[str]) -> None:
    """Raise DatasetError that lists the first MAX_PROBLEMS problems, if there are any."""
    if problems:
        more = f"\nand {len(problems) - MAX_PROBLEMS:,} more" if problems[MAX_PROBLEMS:] else ""
        raise DatasetError("\n".join(problems[:MAX_PROBLEMS]) + more)


def torchrun(name: str, alone: int) -> int:
    """Return a number that torchrun gives to its processes; `alone` if there is no torchrun."""
    return int(os.environ[name]) if distributed.is_torchelastic_launched() else alone


def count_cpus() -> int:
    """Return the number of processors that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // torchrun("LOCAL_WORLD_SIZE", 1))


def is_leader() -> bool:
    """Return whether this process is the one that prints and writes."""
    return torchrun("RANK", 0) == 0


def progress(steps: Iterable, text: str, total: int | None = None) -> Iterable:
    """Show a progress bar on a terminal."""
    hidden = not is_leader() or sys.stderr is None
    return tqdm(steps, text, total, leave=False, disable=hidden or None)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a name relative to the folder; refuse one that leads out of it."""
    path = PureWindowsPath(name)  # takes / and \: what is inside for Windows is inside everywhere
    if path.anchor or ".." in path.parts or "://" in name:
        raise DatasetError(f"{name}: leads out of {folder}; a path inside it was expected")
    return folder / name


def refuse_downloads(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a dictionary from JSON; raise ValueError if its context would be downloaded."""
    for key, value in pairs:
        if key == "@import" or (key == "@context" and not isinstance(value, dict)):
            raise ValueError(f"{key} is not written out: {value}")
    return dict(pairs)


def load_description(json_path: Path) -> mlc.Metadata:
    """Load croissant.json; raise DatasetError if it is missing, invalid or lacks a column."""
    if not json_path.parent.is_dir():
        raise DatasetError(f"{json_path.parent}: no such folder; give that of the dataset with -d")
    if not json_path.is_file():
        raise DatasetError(f"{json_path}: no such file; generate_croissant.py writes it")
    with explain_failure(f"{json_path}: not a valid Croissant description; {DESCRIBE_AGAIN}"):
        json.loads(json_path.read_bytes(), object_pairs_hook=refuse_downloads)
        metadata = mlc.Dataset(json_path).metadata
        sets = [records for records in metadata.record_sets if records.id == RECORD_SET]
        known = {field.id for records in sets for field in records.fields}
        if missing := [field for field in COLUMN_OF_FIELD if field not in known]:
            raise ValueError(f"it does not describe {', '.join(missing)}")
    return metadata


def find_index(metadata: mlc.Metadata, folder: Path) -> tuple[str, Path]:
    """Return the id and the path of the file that the candidates are read from.

    Raises DatasetError if that is no file in the folder, or if it was changed. An archive would be
    unpacked into a cache outside the folder, and a file set has no checksum.
    """
    (records,) = (records for records in metadata.record_sets if records.id == RECORD_SET)
    sources = {field.source.uuid for field in records.fields}
    file = next((node for node in metadata.distribution if {node.id} == sources), None)
    if not isinstance(file, mlc.FileObject) or file.contained_in:
        text = f"{RECORD_SET} is not read from a file in its folder"
        raise DatasetError(f"{folder / CROISSANT_NAME}: {text}; {DESCRIBE_AGAIN}")
    path = inside(folder, str(file.content_url))
    if not path.is_file():
        raise DatasetError(f"{path}: no such file, but {CROISSANT_NAME} describes it")
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != str(file.sha256).lower():
        text = f"changed after {CROISSANT_NAME} was written"
        raise DatasetError(
            f"{path}: {text} (sha256 is {found}, expected {file.sha256}); {DESCRIBE_AGAIN}"
        )
    return file.id, path


def read_part(json_path: Path, file_id: str, text: str) -> pd.DataFrame:
    """Read candidates through mlcroissant from a part of the index: its header and some rows."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # this may be another process
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.csv"
        part.write_text(text, encoding="utf-8", newline="")
        dataset = mlc.Dataset(json_path, mapping={file_id: part})
        (node,) = (node for node in dataset.metadata.distribution if node.id == file_id)
        node.sha256 = hashlib.sha256(text.encode()).hexdigest()  # mlcroissant verifies it
        records = pd.DataFrame(dataset.records(RECORD_SET), columns=list(COLUMN_OF_FIELD))
    records = records.rename(columns=COLUMN_OF_FIELD)
    if records[list(TEXT_COLUMNS)].isna().any(axis=None):
        raise ValueError(f"a cell of {' or '.join(TEXT_COLUMNS)} is empty")
    texts = {column: records[column].map(bytes.decode) for column in TEXT_COLUMNS}
    return records.astype(dict.fromkeys(NUMBER_COLUMNS, float)).assign(**texts)


@contextmanager
def hold_interrupt() -> Iterator[None]:
    """Delay Ctrl-C; processes that are started in the meantime never see it."""
    can_hold = hasattr(signal, "pthread_sigmask")  # not on Windows
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if can_hold else None
    try:
        yield
    finally:
        if can_hold:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_records(
    json_path: Path, file_id: str, index_path: Path, wanted: int | None, seed: int
) -> pd.DataFrame:
    """Read all candidates, or `wanted` of them, through mlcroissant.

    Returns
    -------
    pandas.DataFrame
        One row per candidate, in the order of the index. TEXT_COLUMNS are text, NUMBER_COLUMNS
        float64, NaN where the index has no value.
    """
    with explain_failure(f"{json_path}: mlcroissant cannot read its records; {DESCRIBE_AGAIN}"):
        jobs = pd.read_csv(index_path, usecols=["jid"], dtype=str)["jid"]
        skipped = []  # lines of the index, after its header
        if wanted is not None:
            shuffled = jobs.sample(frac=1, random_state=seed)
            turns = shuffled.groupby(shuffled).cumcount().sort_values(kind="stable")
            skipped = turns.index[wanted:] + 1
        count = max(1, len(jobs) - len(skipped))
        parts = math.ceil(count / RECORDS_PER_PART)
        text = {"dtype": str, "keep_default_na": False}  # cells as they are
        size = math.ceil(count / parts)
        rows = pd.read_csv(index_path, skiprows=skipped, chunksize=size, **text)
        texts = (chunk.to_csv(index=False) for chunk in rows)
        read = partial(read_part, json_path, file_id)
        if parts == 1:
            return read(next(texts))
        pool = ProcessPoolExecutor(min(parts, count_cpus()))
        try:
            with hold_interrupt():
                tables = pool.map(read, texts)
            return pd.concat(progress(tables, "index", parts), ignore_index=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, only the current parts are finished


def raise_file_limit(count: int) -> None:
    """Allow this process to have `count` tensors mapped, each of which is an open file."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = count + 100  # for everything else
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    except ImportError:  # Windows has no such limit
        pass
    except (ValueError, OSError) as error:
        raise DatasetError(
            f"{count:,} tensors are needed at once, but only {hard:,} files may be open; have the"
            " limit raised (ulimit -Hn), or split the dataset"
        ) from error


def measure_memory() -> int:
    """Return the memory of the machine, or the limit of the control group, in bytes."""
    if not hasattr(os, "sysconf"):  # Windows does not say
        return 2**33
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controller, group = line.split(":", 2)
        folder = Path("/sys/fs/cgroup", controller, group.lstrip("/"))
        for parent in (folder, *folder.parents):
            for limit in ("memory.max", "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):  # there is none, or it is "max"
                    memory = min(memory, int((parent / limit).read_text()))
    return memory


def open_tensor(path: Path) -> np.memmap:
    """Map a tensor, float32 (H, W, 4); raise DatasetError if it is not one, or not whole."""
    if not path.is_file():
        raise DatasetError(f"{path}: not a readable tensor: there is no such file")
    # numpy warns if a damaged header gives an impossible shape.
    with explain_failure(f"{path}: not a readable tensor"), np.errstate(over="ignore"):
        tensor = np.lib.format.open_memmap(path, mode="r")
    layout = tensor.dtype, tensor.shape[2:], tensor.flags.c_contiguous
    if layout != (np.dtype("<f4"), (len(CHANNEL_NAMES),), True):
        raise DatasetError(
            f"{path}: {tensor.dtype} {tensor.shape}; expected float32 (H, W, {len(CHANNEL_NAMES)})"
            " in C order"
        )
    if tensor.offset + tensor.nbytes != path.stat().st_size:
        raise DatasetError(f"{path}: longer than its header says; run create_dataset.py again")
    return tensor


def transform_features(candidates: pd.DataFrame) -> np.ndarray:
    """Return the features, float64 (N, 10), NaN where there is no value.

    `peak` and `flux` span five decades and both signs, so they become signed logarithms. The last
    column is 1 where `mag` has no value.
    """
    values = candidates[list(FEATURE_COLUMNS)].astype(float)
    values = values.where(np.isfinite(values)).clip(-1e30, 1e30)  # squares of larger ones overflow
    for name in ("peak", "flux"):
        values[name] = np.sign(values[name]) * np.log1p(values[name].abs())
    return values.assign(no_mag=values["mag"].isna()).to_numpy(float)


BATCHES_AHEAD = 4  # that the kernel is told of before they are read


class CutoutDataset:
    """Cutouts, features and labels of the candidates that `read_records` returns.

    `dataset[rows]` is a batch of N candidates: cutouts float32 (N, 4, 64, 64), channels last, in
    [0, 1] and 0 off the image, features float32 (N, 10), labels float32 (N,). A cutout is a slice
    of a mapped tensor. Features are not scaled, and NaN without a value, until `fit_features`.
    DatasetError says which tensors are damaged, and in batches, where a pixel is not in [0, 1].

    For a training of your own, with the features scaled by the training split:

        candidates = pd.read_csv("my_dataset/master_index.csv")
        dataset = CutoutDataset(Path("my_dataset"), candidates)
        train = np.flatnonzero(split_candidates(candidates, seed=1) == "train")
        dataset.fit_features(train)
        for epoch in range(10):
            batches = divide(dataset.shuffle(train, epoch), 128)  # or slightly more
            for cutouts, features, labels in dataset.load(batches):
                ...
    """

    def __init__(self, dataset_dir: Path, candidates: pd.DataFrame) -> None:
        self.candidates = candidates
        # Pixel i spans [i - 0.5, i + 0.5). Positions that are no numbers are refused later.
        self.nearest = np.floor(candidates[["x", "y"]].to_numpy() + 0.5)
        self.corners = np.nan_to_num(self.nearest).clip(-1e9, 1e9).astype(int) - CUTOUT_PX // 2
        self.values = transform_features(candidates)
        self.features = torch.from_numpy(self.values)
        self.labels = torch.from_numpy(candidates["label"].to_numpy(np.float32))
        self.tensor_of, self.names = pd.factorize(candidates["image_filename"])
        self.tensors: list[np.memmap] = []
        self.is_advised = np.zeros(len(candidates), bool)
        raise_file_limit(len(self.names))
        problems = []
        for name in progress(self.names, "tensors"):
            try:
                self.tensors.append(open_tensor(inside(dataset_dir, name)))
            except (DatasetError, OSError) as error:
                problems.append(str(error))
        raise_problems(problems)
        self.block_bytes = MEMORY_SHARE * measure_memory()
        self.is_one_block = sum(tensor.nbytes for tensor in self.tensors) < self.block_bytes

    def fit_features(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale the features to median 0 and interquartile range 1 of some rows; return both.

        They are clipped to -8 and 8, and 0 stands for no value.
        """
        fitted = pd.DataFrame(self.values[rows])
        low, center, high = fitted.quantile((0.25, 0.5, 0.75)).to_numpy()
        scale = np.where(high > low, high - low, fitted.std(ddof=0))
        scale[~(fitted.max() > fitted.min())] = 1  # also without values; std is not quite 0
        center = np.nan_to_num(center)
        features = np.nan_to_num((self.values - center) / scale).clip(-8, 8)
        self.features = torch.from_numpy(features.astype(np.float32))
        return center, scale

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray) -> Batch:
        """Return a batch of candidates."""
        squares = np.zeros((len(rows), CUTOUT_PX, CUTOUT_PX, len(CHANNEL_NAMES)), np.float32)
        for square, row in zip(squares, rows, strict=True):
            left, top = self.corners[row]
            first, start = max(left, 0), max(top, 0)
            tensor = self.tensors[self.tensor_of[row]]
            part = tensor[start : top + CUTOUT_PX, first : left + CUTOUT_PX]
            height, width, _ = part.shape
            square[start - top :, first - left :][:height, :width] = part
        if not (squares.min(initial=0) >= 0 and squares.max(initial=0) <= 1):  # NaN fails both
            wrong = ~((squares >= 0) & (squares <= 1)).all(axis=(1, 2, 3))
            names = self.names[np.unique(self.tensor_of[rows][wrong])]
            reason = "a pixel is not in [0, 1]; remove it and run create_dataset.py again"
            raise_problems([f"{name}: {reason}" for name in names])
        return torch.from_numpy(squares).permute(0, 3, 1, 2), self.features[rows], self.labels[rows]

    def shuffle(self, rows: np.ndarray, seed: Sequence[int]) -> np.ndarray:
        """Return rows in random order, such that the tensors needed at a time fit the memory.

        Tensors come in random order, in blocks, and candidates are shuffled within their block. If
        all tensors fit, that is one block.
        """
        rng = np.random.default_rng(seed)
        tensors = rng.permutation(np.unique(self.tensor_of[rows]))
        block = np.zeros(len(self.tensors))
        sizes = np.cumsum([self.tensors[tensor].nbytes for tensor in tensors])
        block[tensors] = sizes // self.block_bytes
        rows = rng.permutation(rows)
        return rows[np.argsort(block[self.tensor_of[rows]], kind="stable")]

    def are_on_image(self) -> np.ndarray:
        """Return whether the nearest pixel of each candidate is on its image, bool (N,)."""
        sizes = np.array([tensor.shape[1::-1] for tensor in self.tensors], int).reshape(-1, 2)
        inside = (self.nearest >= 0) & (self.nearest < sizes[self.tensor_of])
        return inside.all(axis=1)

    def advise(self, rows: np.ndarray) -> None:
        """Ask the kernel to read the rows of pixels that cutouts cross.

        What fits the memory is asked for only once: asking takes as long as reading what is there.
        """
        if self.is_one_block:
            rows = rows[~self.is_advised[rows]]
            self.is_advised[rows] = True
        for tensor, top in zip(self.tensor_of[rows], self.corners[rows, 1], strict=True):
            mapped, row_bytes = self.tensors[tensor].base, self.tensors[tensor].strides[0]
            start = max(top, 0) * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            end = min(start + CUTOUT_PX * row_bytes, len(mapped))
            for place in range(start, end, 2**19):  # the kernel reads no more per call
                mapped.madvise(mmap.MADV_WILLNEED, place, min(2**19, end - place))

    def load(self, batches: list[np.ndarray]) -> Iterator[Batch]:
        """Yield batches; a thread reads the next one while this one is used."""

        def read(number: int) -> Batch:
            """Return a batch, after a word to the kernel about a later one."""
            ahead = number + BATCHES_AHEAD
            if ahead < len(batches) and hasattr(mmap, "MADV_WILLNEED"):
                self.advise(batches[ahead])
            return self[batches[number]]

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(read, 0)
            for number in range(1, len(batches)):
                batch, coming = coming.result(), pool.submit(read, number)
                yield batch
            yield coming.result()


def divide(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Divide rows into batches of equal length, `size` or slightly more."""
    return np.array_split(rows, max(1, len(rows) // size))


@contextmanager
def claim(text: str, failures: list[str] | None = None) -> Iterator[None]:
    """Print a claim and whether it holds; collect the error that refutes it, or raise it."""
    try:
        yield
        print(f"  yes   {text}", flush=True)
    except (DatasetError, OSError) as error:
        print(f"  no    {text}", flush=True)
        if failures is None:
            raise
        failures.append(str(error))


def refuse(wrong: pd.DataFrame, reason: str) -> None:
    """Raise DatasetError if there are wrong candidates; the reason is a template of columns."""
    line = f"candidate {{id:.15g}} of {{jid}}: {reason}; run create_dataset.py again"
    raise_problems([line.format(**row) for row in wrong.to_dict("records")])


def check_copies(dataset: CutoutDataset, split: np.ndarray) -> None:
    """Raise DatasetError if copies of a job put the same candidates into two splits.

    Cutouts are compared only if the features are equal, which without copies is rare.
    """
    values = dataset.values.astype(np.float32)  # the last digits may differ
    alike = np.flatnonzero(pd.DataFrame(values).duplicated(keep=False))
    table = pd.DataFrame({"jid": dataset.candidates["jid"], "split": split}).iloc[alike]
    table["place"] = table["jid"] + " (" + table["split"] + ")"
    cutouts = (cutout for rows in divide(alike, BATCH_SIZE) for cutout in dataset[rows][0])
    pairs = zip(values[alike], cutouts, strict=True)
    table["content"] = [
        hashlib.sha256(features.tobytes() + cutout.numpy().tobytes()).digest()
        for features, cutout in pairs
    ]
    groups = table.groupby("content")
    shared = groups["place"].unique()[groups["split"].nunique() > 1].map(" and ".join)
    text = "candidates have the same cutout and features; remove the copies"
    counts = shared.value_counts().items()
    raise_problems([f"{places}: {count:,} {text}" for places, count in counts])


def find_notes(dataset: CutoutDataset, test: np.ndarray) -> Iterator[str]:
    """Yield what is odd about the features and the jobs but may be right."""
    values = dataset.candidates[list(FEATURE_COLUMNS)].replace([np.inf, -np.inf], np.nan)
    real, bogus = (values[test & (dataset.labels.numpy() == label)] for label in (1, 0))
    above = real.fillna(-np.inf).min() > bogus.fillna(-np.inf).max()
    below = real.fillna(np.inf).max() < bogus.fillna(np.inf).min()
    for column in FEATURE_COLUMNS:
        if values[column].isna().all():
            yield f"column {column} has no finite value"
        elif min(len(real), len(bogus)) >= MIN_EACH and (above[column] or below[column]):
            yield f"column {column} alone ranks the test candidates perfectly"
    shares = dataset.candidates["jid"].value_counts(normalize=True)
    if len(shares) > 1 and shares.iloc[0] > 0.5:
        yield f"job {shares.index[0]} has {shares.iloc[0]:.0%} of the candidates"


def assign_splits(units: Sequence, labels: pd.Series, seed: int) -> np.ndarray | None:
    """Assign units of candidates, such as jobs, to SPLITS; return the split of each candidate.

    Units with and without real candidates are dealt out apart, in random order but those with both
    classes first, so that each split gets its share. None if a split lacks a class all the same.
    """
    unit_of, names = pd.factorize(units)
    has_real, has_bogus = (np.bincount(unit_of, labels == kind) > 0 for kind in (1, 0))
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(~(has_real & has_bogus)[order], kind="stable")]
    split = np.full(len(names), "validation")
    for group in (order[has_real[order]], order[~has_real[order]]):
        split[group] = np.resize(TURNS, len(group))
    classes = labels.groupby(split[unit_of]).nunique()
    return split[unit_of] if (classes == 2).sum() == len(SPLITS) else None


def split_candidates(candidates: pd.DataFrame, seed: int) -> np.ndarray:
    """Return the split of each candidate, str (N,), so that each has real and bogus ones.

    Jobs are kept together. If there are too few for that, a warning is logged, and candidates are
    split instead; DatasetError if there are too few of them as well.
    """
    label = candidates["label"]
    if (split := assign_splits(candidates["jid"], label, seed)) is not None:
        return split
    if (split := assign_splits(candidates.index, label, seed)) is None:
        raise DatasetError(
            f"{(label == 1).sum()} of {len(label)} candidates are real; training, validation and"
            " test need a real and a bogus one each: add jobs, or raise --max_candidates"
        )
    LOG.warning(
        "too few jobs hold real and bogus candidates to split by job: the network is trained and"
        " tested on candidates of the same job, whose sky, PSF and flaws it then knows, which"
        " flatters it; add jobs, or raise --max_candidates"
    )
    return split


def examine(settings: Settings) -> tuple[CutoutDataset, np.ndarray]:
    """Print what holds of a dataset; return it and its split, str (N,).

    Raises DatasetError if something does not hold; of the candidates, it names all that does not.
    """
    folder, wanted, seed = settings.dataset_dir, settings.max_candidates, settings.seed
    json_path = folder / CROISSANT_NAME
    print(folder)
    with claim("croissant.json is valid Croissant"):
        metadata = load_description(json_path)
    with claim("the index is in the folder and as described (SHA-256)"):
        index = find_index(metadata, folder)
    amount = "every record" if wanted is None else f"at most {wanted:,} records"
    with claim(f"mlcroissant reads {amount}"):
        candidates = read_records(json_path, *index, wanted, seed)
    with claim("tensors are in the folder, whole, and float32 (H, W, 4)"):
        dataset = CutoutDataset(folder, candidates)
    match, label = candidates["match"], candidates["label"]
    failures: list[str] = []
    with claim("labels are 0 or 1, and 1 just where match is not -1", failures):
        wrong = match.isna() | (label != (match != -1))
        refuse(candidates[wrong], "label {label:g}, match {match:g}")
    with claim("candidates occur once", failures):
        refuse(candidates[candidates.duplicated(["jid", "id"]) & candidates["id"].notna()], "twice")
    with claim("candidates have their job's tensor", failures):
        wrong = candidates["image_filename"] != "images/" + candidates["jid"] + ".npy"
        refuse(candidates[wrong], "image is {image_filename}")
    with claim("positions are on their image", failures):
        wrong = ~dataset.are_on_image()
        refuse(candidates[wrong], "position ({x:g}, {y:g}) is not on its image")
    if failures:
        raise DatasetError("\n".join(failures))
    with claim("both classes occur, often enough for every split"):
        split = split_candidates(candidates, seed)
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), CHECKED_CUTOUTS)).astype(int)
    with claim(f"cutouts are finite and in [0, 1] ({len(rows):,} of {len(dataset):,} read)"):
        for _ in dataset.load(divide(rows, BATCH_SIZE)):
            pass
    with claim("no candidate is in two splits, under two names"):
        check_copies(dataset, split)
    for note in find_notes(dataset, split == "test"):
        print(f"  note  {note}", flush=True)
    return dataset, split


def conv_branch(channels: int, size: int, block: int, widths: Sequence[int]) -> nn.Sequential:
    """Make layers that turn (N, channels, size, size) into (N, 32).

    Blocks of pixels become channels, then convolutions alternate with pooling. The maps are
    flattened, not averaged, because it matters where a source lies, and reduced to 32 values, or
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
        self.inner = conv_branch(len(CHANNEL_NAMES), INNER_PX, block=1, widths=(32, 64))
        self.whole = conv_branch(len(CHANNEL_NAMES), CUTOUT_PX, block=4, widths=(32, 64))
        self.features = nn.Sequential(
            nn.Linear(feature_count, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()
        )
        self.head = nn.Sequential(
            nn.Linear(3 * 32, 64), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(64, 1)
        )

    def forward(self, cutouts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return logits (N,), float32, of cutouts (N, 4, 64, 64) and features (N, 10).

        The type of the cutouts, float32 or bfloat16, is that in which convolutions are computed:
        weights are float32, so that a network without autocast fails on bfloat16 cutouts.
        """
        edge = (CUTOUT_PX - INNER_PX) // 2
        kind, dtype = cutouts.device.type, cutouts.dtype
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            inner = self.inner(cutouts[:, :, edge:-edge, edge:-edge])
            branches = (inner, self.whole(cutouts), self.features(features))
        return self.head(torch.cat(branches, dim=1).float()).squeeze(1)  # bfloat16 makes ties


@dataclass(frozen=True)
class Backend:
    """The device of this process, and its place among the processes of torchrun."""

    device: torch.device
    dtype: torch.dtype  # of the convolutions
    rank: int
    processes: int

    def share(self, rows: np.ndarray) -> np.ndarray:
        """Return this process's share of a batch."""
        return rows[self.rank :: self.processes]

    def put(self, cutouts: torch.Tensor, *others: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the parts of a batch on the device."""
        yield cutouts.to(self.device, self.dtype)
        yield from (values.to(self.device) for values in others)

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Add up the values of all processes, in place."""
        if self.processes > 1:
            distributed.all_reduce(values)
        return values


def pick_backend(name: str) -> Backend:
    """Return the device of a name, and the type that it computes convolutions fastest in.

    That is bfloat16 if there are instructions for it: without them it is slower than float32.
    """
    cuda = torch.cuda.device_count() >= torchrun("LOCAL_WORLD_SIZE", 1)
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if not {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpu": True}[name]:
        raise DatasetError(f"--device {name}: there is none here; auto takes what there is")
    device, fast = torch.device(name), False
    if name == "cuda":
        device = torch.device(name, torchrun("LOCAL_RANK", 0))
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        torch.backends.cudnn.deterministic = True
    elif name == "cpu":
        fast = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
        if count_cpus() <= 2:  # two threads lose more beside another program than they win
            torch.set_num_threads(1)
    dtype = torch.bfloat16 if fast else torch.float32
    return Backend(device, dtype, torchrun("RANK", 0), torchrun("WORLD_SIZE", 1))


def orient(cutouts: torch.Tensor, k: int) -> torch.Tensor:
    """Bring cutouts (N, 4, 64, 64) into orientation k of eight; the first four are flips."""
    turned = cutouts.transpose(2, 3) if k & 4 else cutouts
    return turned.flip([dim for dim, bit in ((2, 1), (3, 2)) if k & bit])


def augment(cutouts: torch.Tensor) -> torch.Tensor:
    """Bring each of the cutouts (N, 4, 64, 64) into one of eight orientations, by its place."""
    turned = torch.empty_like(cutouts)
    for k in range(8):
        turned[k::8] = orient(cutouts[k::8], k)
    return turned


def mix(batch: Batch, rng: np.random.Generator) -> Batch:
    """Blend each candidate of a batch with another one (mixup, Zhang et al. 2018)."""
    share = rng.beta(MIXUP, MIXUP)
    return tuple(share * values + (1 - share) * values.flip(0) for values in batch)


def count_odds(labels: torch.Tensor) -> float:
    """Return how many bogus candidates there are per real one."""
    return len(labels) / labels.sum().item() - 1


def balanced_loss(logits: torch.Tensor, labels: torch.Tensor, odds: float) -> torch.Tensor:
    """Return the cross-entropy in which real and bogus weigh the same, at `odds` bogus per real."""
    weight = torch.tensor(odds, device=logits.device)
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)


@torch.inference_mode()
def predict(
    network: nn.Module,
    dataset: CutoutDataset,
    rows: np.ndarray,
    size: int,
    backend: Backend,
    views: int = 1,
) -> torch.Tensor:
    """Return the logits of candidates, float32 (N,) on the CPU, in all processes.

    Each is the mean over the first `views` orientations of its cutout.
    """
    network.eval()
    logits = torch.zeros(len(rows), device=backend.device)
    places = [backend.share(batch) for batch in divide(np.arange(len(rows)), size)]
    batches = progress(dataset.load([rows[place] for place in places]), "predicting", len(places))
    for place, batch in zip(places, batches, strict=True):
        cutouts, features, _ = backend.put(*batch)
        for k in range(views):
            logits[place] += network(orient(cutouts, k), features) / views
    return backend.add_up(logits).cpu()


def rate_logits(logits: torch.Tensor, labels: torch.Tensor, odds: float) -> dict[str, float]:
    """Return loss, ROC AUC and average precision of the validation split."""
    roc_auc, precision = rate_ranking(rank_candidates(logits.numpy()), labels.numpy())
    loss = balanced_loss(logits, labels, odds).item()
    return {"validation_loss": loss, "roc_auc": roc_auc, "average_precision": precision}


def plan_steps(count: int, settings: Settings, backend: Backend) -> tuple[int, int]:
    """Return the number of steps per epoch over `count` candidates, and of epochs."""
    if min(settings.batch_size, count) < 2 * backend.processes:
        raise DatasetError(
            f"{backend.processes} processes need two candidates each in a batch: --batch_size is"
            f" {settings.batch_size}, and {count} are trained on"
        )
    steps = max(1, count // settings.batch_size)
    return steps, settings.epochs or min(max(1, round(STEPS / steps)), MAX_EPOCHS)


MIXUP, MIXUP_EPOCHS = 0.2, 20  # strength of mixup; trainings with fewer epochs do without it
TOLERANCE = 0.01  # of average precision, within which a later epoch is the better one
EPOCH_LINE = (
    "epoch {epoch:2}/{epochs}  loss {train_loss:.4f}  validation loss {validation_loss:.4f}"
    "  ROC AUC {roc_auc:.4f}  average precision {average_precision:.4f}"
)


def train(
    dataset: CutoutDataset, split: np.ndarray, settings: Settings, backend: Backend
) -> tuple[nn.Module, list[dict[str, float]], int]:
    """Train a network; return it as of the best epoch, the figures of all epochs, and that epoch.

    The best epoch is the last one whose average precision on the validation split is the highest,
    give or take TOLERANCE: later epochs, with their lower learning rate, do better on other jobs.
    """
    rows, held_out = (np.flatnonzero(split == name) for name in SPLITS[:2])
    steps, epochs = plan_steps(len(rows), settings, backend)
    torch.manual_seed(settings.seed)
    network = RealBogusNetwork().to(backend.device)
    if backend.device.type != "mps":  # where batch norm is said to go wrong with it
        network = network.to(memory_format=torch.channels_last)
    learner = nn.parallel.DistributedDataParallel(network) if backend.processes > 1 else network
    optimizer = AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, settings.learning_rate, epochs * steps)
    odds = count_odds(dataset.labels[rows])
    torch.manual_seed(settings.seed + backend.rank)  # dropout differs between processes
    rng = np.random.default_rng(settings.seed)
    history, highest, best_epoch, weights = [], 0.0, 0, {}
    for epoch in range(1, epochs + 1):
        network.train()
        total = torch.zeros((), device=backend.device)
        order = dataset.shuffle(rows, [settings.seed, epoch])
        batches = [backend.share(batch) for batch in divide(order, settings.batch_size)]
        for batch in progress(dataset.load(batches), f"epoch {epoch}", steps):
            cutouts, features, labels = backend.put(*batch)
            cutouts = augment(cutouts)
            if epochs >= MIXUP_EPOCHS:
                cutouts, features, labels = mix((cutouts, features, labels), rng)
            loss = balanced_loss(learner(cutouts, features), labels, odds)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(labels)
        for values in network.buffers():  # of batch norm, so that all processes predict alike
            values.copy_(backend.add_up(values.float()) / backend.processes)
        row = {"epoch": epoch, "train_loss": backend.add_up(total).item() / len(rows)}
        logits = predict(network, dataset, held_out, settings.batch_size, backend)
        history.append(row | rate_logits(logits, dataset.labels[held_out], odds))
        if not math.isfinite(history[-1]["train_loss"] + history[-1]["validation_loss"]):
            raise DatasetError("the loss is not finite any more: try a lower --learning_rate")
        LOG.info(EPOCH_LINE.format(epochs=epochs, **history[-1]))
        highest = max(highest, history[-1]["average_precision"])
        if history[-1]["average_precision"] >= highest - TOLERANCE:
            best_epoch, weights = epoch, copy.deepcopy(network.state_dict())
    network.load_state_dict(weights)
    return network, history, best_epoch


RIDGE = 1e-4  # of the logistic regression: keeps weights finite where classes separate


def regress(dataset: CutoutDataset, rows: np.ndarray) -> np.ndarray:
    """Fit a logistic regression to the features of some rows; return the logits of all."""
    features = torch.cat([dataset.features, torch.ones(len(dataset), 1)], dim=1).double()
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")
    labels = dataset.labels[rows].double()
    odds = count_odds(labels)

    def closure() -> torch.Tensor:
        """Return the loss and leave its gradient in the weights, for LBFGS."""
        optimizer.zero_grad()
        loss = balanced_loss(features[rows] @ weights, labels, odds)
        loss += RIDGE * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (features @ weights).detach().numpy()


def rank_candidates(scores: np.ndarray, jobs: np.ndarray | int = 0) -> Ranking:
    """Rank candidates within each job by falling score; equal scores share a rank, NaN is last."""
    table = pd.DataFrame({"job": jobs, "score": -scores})
    ranks = table.groupby(["job", "score"], dropna=False).ngroup().to_numpy()
    job_of_rank = np.zeros(ranks.max() + 1, int)
    job_of_rank[ranks] = jobs
    return ranks, job_of_rank


def rate_ranking(
    ranking: Ranking, labels: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """Return ROC AUC and average precision of a ranking, NaN where they are not defined.

    ROC AUC is the fraction of the pairs of a real and a bogus candidate of one job that are in the
    right order; ties count half. Average precision is the sum of precision times step in recall
    (scikit-learn's definition) and has a meaning only if all candidates are of one job.
    """
    ranks, job_of_rank = ranking
    weights = np.ones(len(labels)) if weights is None else weights
    real, bogus = (np.bincount(ranks, weights * (labels == kind)) for kind in (1, 0))
    real_of_job, bogus_of_job = (np.bincount(job_of_rank, part) for part in (real, bogus))
    found = np.cumsum(real)
    better = found - real / 2 - (np.cumsum(real_of_job) - real_of_job)[job_of_rank]
    precision = found / np.maximum(np.cumsum(real + bogus), 1)
    with np.errstate(invalid="ignore"):
        return bogus @ better / (real_of_job @ bogus_of_job), real @ precision / found[-1]


def choose_threshold(
    scores: np.ndarray, ranking: Ranking, labels: np.ndarray, weights: np.ndarray
) -> float:
    """Return the threshold with the highest F1: candidates are real at or above it."""
    ranks, _ = ranking
    real, called = np.bincount(ranks, weights * labels), np.bincount(ranks, weights)
    f1 = np.cumsum(real) / np.maximum(np.cumsum(called) + real.sum(), 1)
    return float(scores[ranks == np.argmax(f1)][0])


MATRIX = ("true_positives", "false_negatives", "false_positives", "true_negatives")


def count_calls(called: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Return the confusion matrix, real being positive, and precision, recall and F1."""
    tn, fp, fn, tp = np.bincount(2 * labels.astype(int) + called, weights, minlength=4)
    matrix = dict(zip(MATRIX, (tp, fn, fp, tn), strict=True))
    f1 = 2 * tp / max(2 * tp + fp + fn, 1)
    return matrix | {"precision": tp / max(tp + fp, 1), "recall": tp / max(tp + fn, 1), "f1": f1}


def resample(jobs: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield how often each candidate and its job are drawn: first once, then by the bootstrap.

    Candidates are drawn with replacement within each job, because those of one job are alike; if
    there are MIN_JOBS or more, the jobs are drawn too, with replacement.
    """
    yield np.ones(len(jobs)), np.ones(len(jobs))
    rng = np.random.default_rng(seed)
    _, job, sizes = np.unique(jobs, return_inverse=True, return_counts=True)
    by_job, starts = np.argsort(job, kind="stable"), np.cumsum(sizes) - sizes
    for _ in range(RESAMPLES):
        times = np.ones(len(sizes), int)
        if len(sizes) >= MIN_JOBS:
            times = np.bincount(rng.integers(len(sizes), size=len(sizes)), minlength=len(sizes))
        drawn = np.repeat(np.arange(len(sizes)), times * sizes)  # jobs, once for each candidate
        places = starts[drawn] + rng.integers(sizes[drawn])
        yield np.bincount(by_job[places], minlength=len(jobs)).astype(float), times[job]


def evaluate(
    labels: np.ndarray, jobs: np.ndarray, scores: pd.DataFrame, split: np.ndarray, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Rate how candidates of the test split are ranked, and which are called real.

    Labels, jobs (numbers) and split are arrays (N,); scores has N rows and a column per ranking.
    Returns FIGURES of each ranking, and how far its average precision is "behind" the network's; of
    "calls" the threshold, confusion matrix, precision, recall and F1. The threshold is chosen on
    the validation split. Intervals come from resamples of both splits, so that those of the calls
    include what the choice of the threshold adds.
    """
    test, held_out = split == "test", split == "validation"
    real, held_out_real = labels[test], labels[held_out]
    network, held_out_network = (scores["network"].to_numpy()[part] for part in (test, held_out))
    rankings = {
        name: [rank_candidates(values[test].to_numpy(), by) for by in (jobs[test], 0)]
        for name, values in scores.items()
    }
    chooser = rank_candidates(held_out_network)
    rows = []
    draws = zip(resample(jobs[test], seed), resample(jobs[held_out], seed + 1), strict=True)
    for (weights, times), (held_out_weights, _) in draws:
        row = {}
        # Pairs have the product of two weights: without the root, two draws of a job count as four.
        pair_weights = weights / np.sqrt(np.maximum(times, 1))
        for name, (within, overall) in rankings.items():
            roc_auc, precision = rate_ranking(overall, real, weights)
            row[name, "roc_auc_within_jobs"], _ = rate_ranking(within, real, pair_weights)
            row[name, "roc_auc"], row[name, "average_precision"] = roc_auc, precision
            row[name, "behind"] = row["network", "average_precision"] - precision
        threshold = choose_threshold(held_out_network, chooser, held_out_real, held_out_weights)
        row["calls", "threshold"] = threshold
        calls = count_calls(network >= threshold, real, weights)
        rows.append(row | {("calls", name): number for name, number in calls.items()})
    table = pd.DataFrame(rows)
    low, high = table[1:].quantile([0.025, 0.975]).to_numpy()
    results: dict[str, dict[str, Estimate]] = {}
    for (name, figure), *estimate in zip(table, table.iloc[0], low, high, strict=True):
        results.setdefault(name, {})[figure] = estimate
    return results


def reach_verdict(
    rankings: dict[str, dict[str, Estimate]], real: int, bogus: int
) -> tuple[bool, str]:
    """Say whether the network learned: the interval of its ROC AUC within jobs is above 0.5.

    A ROC AUC of all candidates as one may be that of a network that knows the jobs, and the average
    precision of a ranking by chance lies above the base rate in 13 to 31 of 100 trials.
    """
    if min(real, bogus) < MIN_EACH:
        return False, (
            f"cannot tell: {real} real and {bogus} bogus test candidates, of jobs that have both,"
            " are too few"
        )
    network, *yardsticks = rankings
    roc_auc = rankings[network]["roc_auc_within_jobs"]
    text = f"ROC AUC within jobs {show(roc_auc)}, where chance gives 0.5"
    if roc_auc[1] <= 0.5 + 1e-9:  # rounding errors
        return False, f"not learned: {text}"
    best = max(yardsticks, key=lambda name: rankings[name]["average_precision"][0])
    gain, low, high = rankings[best]["behind"]
    better = "better" if low > 0 else "worse" if high < 0 else "not clearly better"
    return True, (
        f"learned: {text}; {better} than {best}"
        f" (average precision {gain:+.3f}, {low:+.3f} to {high:+.3f})"
    )


FIGURES = {  # of a ranking of the test candidates
    "roc_auc_within_jobs": "ROC AUC within jobs",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
}


def show(estimate: Estimate) -> str:
    """Return a figure with its interval."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*estimate)


def print_splits(candidates: pd.DataFrame, split: np.ndarray) -> pd.DataFrame:
    """Count jobs, candidates and real ones of each split; print and return the table."""
    columns = {"jobs": ("jid", "nunique"), "candidates": ("jid", "size"), "real": ("label", "sum")}
    counts = candidates.groupby(split).agg(**columns).loc[list(SPLITS)].astype(int)
    unit = "job" if counts["jobs"].sum() == candidates["jid"].nunique() else "candidate"
    print(f"  {f'split by {unit}':<22}{'jobs':>6}{'candidates':>13}{'real':>8}")
    for name, jobs, count, real in counts.itertuples():
        print(f"  {name:<22}{jobs:6,}{count:13,}{real:8,} ({real / count:.1%})", flush=True)
    return counts


def print_results(results: dict) -> None:
    """Print the rankings of the test split, the calls, and the verdict."""
    calls = results["calls"]
    rows = [["on the test split", *FIGURES.values()]]
    for name, figures in results["rankings"].items():
        rows.append([name, *(show(figures[key]) for key in FIGURES)])
    rows.append(["base rate", "0.500", "0.500", f"{results['base_rate']:.3f}"])
    for row in rows:
        print("  {:<22}{:<25}{:<25}{}".format(*row))
    print(
        f"  called real from score {calls['threshold'][0]:.3f} on, the highest F1 of the validation"
        f" split:\n  precision {show(calls['precision'])}, recall {show(calls['recall'])},"
        f" F1 {calls['f1'][0]:.3f}"
    )
    counts = [f"{calls[name][0]:,.0f}" for name in MATRIX]
    print(f"  {'called real':>35}{'called bogus':>14}")
    print("  real {:>30}{:>14}\n  bogus{:>30}{:>14}".format(*counts))
    print(f"verdict: {results['verdict']}", flush=True)


CURVES = (  # title and axes of the upper row of the picture
    ("Loss", "epoch", "weighted cross-entropy"),
    ("ROC curve, test split", "false positive rate", "true positive rate"),
    ("Precision and recall, test split", "recall", "precision"),
    ("Real-bogus scores, test split", "score", "candidates"),
)


def draw_curves(axes: Sequence, labels: np.ndarray, scores: pd.DataFrame, results: dict) -> None:
    """Draw losses, ROC curves, precision-recall curves and histograms of the test candidates."""
    losses, roc, precision_recall, histogram = axes
    calls, base = results["calls"], results["base_rate"]
    history = pd.DataFrame(results["history"]).set_index("epoch")
    for column, color in (("train_loss", "0.6"), ("validation_loss", "C0")):
        losses.plot(history[column], ".-", color=color, label=column.replace("_", " "))
    losses.axvline(results["best_epoch"], color="C0", linestyle=":", label="epoch kept")
    for (name, values), color in zip(scores.items(), ("C0", "C1", "0.6"), strict=True):
        ranks, _ = rank_candidates(values.to_numpy())
        steps = (np.bincount(ranks, labels == kind) for kind in (1, 0))
        real, bogus = (np.append(0, np.cumsum(part)) for part in steps)
        area, average = (results["rankings"][name][key][0] for key in list(FIGURES)[1:])
        roc.plot(bogus / bogus[-1], real / real[-1], color=color, label=f"{name}  {area:.3f}")
        precision = real[1:] / (real + bogus)[1:]
        label = f"{name}  {average:.3f}"
        precision_recall.plot(real[1:] / real[-1], precision, color=color, label=label)
    roc.plot((0, 1), (0, 1), ":", color="0.8", label="chance  0.500")
    precision_recall.plot((0, 1), (base, base), ":", color="0.8", label=f"base rate  {base:.3f}")
    point = calls["recall"][0], calls["precision"][0]
    precision_recall.plot(*point, "o", color="C0", label="threshold")
    for label, name, color in ((0, "bogus", "0.6"), (1, "real", "C3")):
        values, bins = scores["network"][labels == label], np.linspace(0, 1, 41)
        histogram.hist(values, bins, color=color, alpha=0.7, label=name)
    histogram.axvline(calls["threshold"][0], color="C0", linestyle=":", label="threshold")
    histogram.set_yscale("log")
    for axis, (title, x, y) in zip(axes, CURVES, strict=True):
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.legend(frameon=False, fontsize="small")


def draw_sheet(
    axes: Sequence, dataset: CutoutDataset, test: np.ndarray, scores: np.ndarray, threshold: float
) -> None:
    """Draw the cutouts of the most confident right and wrong calls, one row per candidate."""
    count, size, kinds = 4, CUTOUT_PX + 2, ("bogus", "real")
    centers = (np.arange(max(count, len(CHANNEL_NAMES))) + 0.5) * size
    for axis, (label, called) in zip(axes, itertools.product((1, 0), repeat=2), strict=True):
        group = (dataset.labels.numpy()[test] == label) & ((scores >= threshold) == called)
        order = np.argsort(-scores if called else scores, kind="stable")
        chosen = order[group[order]][:count]
        sheet = np.full((count, size, len(CHANNEL_NAMES), size), np.nan)
        sheet[: len(chosen), 1:-1, :, 1:-1] = dataset[test[chosen]][0].permute(0, 2, 1, 3).numpy()
        axis.imshow(sheet.reshape(count * size, -1), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{kinds[label]}, called {kinds[called]}: {group.sum():,}")
        axis.set_xticks(centers[: len(CHANNEL_NAMES)], CHANNEL_NAMES)
        rows = dataset.candidates.iloc[test[chosen]].assign(score=scores[chosen])
        names = [f"{row.jid}\n{row.id:.15g}\n{row.score:.3f}" for row in rows.itertuples()]
        axis.set_yticks(centers[: len(names)], names, parse_math=False)
        axis.tick_params(length=0, labelsize="small")
        axis.spines[:].set_visible(False)


def prepare_report_dir(folder: Path) -> None:
    """Make the folder of the report, before hours are spent on what could not be written there."""
    with explain_failure("--report_dir draws with matplotlib: pip install matplotlib"):
        import_module("matplotlib.figure")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_report(
    folder: Path,
    dataset: CutoutDataset,
    split: np.ndarray,
    scores: pd.DataFrame,
    results: dict,
    model: dict,
) -> None:
    """Write metrics.json, predictions.csv, model.pt and report.png."""
    from matplotlib.figure import Figure  # an optional extra

    metrics = json.loads(json.dumps(results, default=str), parse_constant=lambda _: None)  # no NaN
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    columns = {"split": split, "label": dataset.labels.int().numpy(), "score": scores["network"]}
    predictions = dataset.candidates[["jid", "id"]].assign(**columns)
    predictions.to_csv(folder / "predictions.csv", index=False)
    packed = io.BytesIO()  # torch has errors of its own if it writes to a full disk
    torch.save(model, packed)
    (folder / "model.pt").write_bytes(packed.getvalue())
    figure = Figure(figsize=(17, 9), dpi=120, layout="constrained")
    figure.suptitle(results["verdict"])
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    test, threshold = np.flatnonzero(split == "test"), results["calls"]["threshold"][0]
    draw_curves(upper.subplots(1, 4), dataset.labels.numpy()[test], scores.iloc[test], results)
    draw_sheet(lower.subplots(1, 4), dataset, test, scores["network"].to_numpy()[test], threshold)
    figure.savefig(folder / "report.png")


VIEWS = 4  # orientations over which scores of the validation and the test split are averaged


def score_candidates(
    network: nn.Module, dataset: CutoutDataset, split: np.ndarray, size: int, backend: Backend
) -> pd.DataFrame:
    """Return the scores of candidates: of the network, which comes first, and of the yardsticks."""
    logits = torch.zeros(len(dataset))
    for name, views in zip(SPLITS, (1, VIEWS, VIEWS), strict=True):
        rows = np.flatnonzero(split == name)
        logits[rows] = predict(network, dataset, rows, size, backend, views)
    return pd.DataFrame(
        {
            # They rank and are no probabilities, because training weighs both classes the same.
            "network": torch.sigmoid(logits.double()),
            "logistic regression": regress(dataset, np.flatnonzero(split == "train")),
            "ranked by flux": dataset.candidates["flux"],
        }
    )


def run(settings: Settings) -> int:
    """Check the dataset, train on it, test the network, and return the exit code."""
    backend = pick_backend(settings.device)
    writes = settings.report_dir is not None and is_leader()
    if writes:
        prepare_report_dir(settings.report_dir)
    dataset, split = examine(settings)
    candidates, rows = dataset.candidates, np.flatnonzero(split == "train")
    counts = print_splits(candidates, split)
    center, scale = dataset.fit_features(rows)
    if backend.processes > 1:
        distributed.init_process_group("nccl" if backend.device.type == "cuda" else "gloo")
    network, history, best_epoch = train(dataset, split, settings, backend)
    scores = score_candidates(network, dataset, split, settings.batch_size, backend)
    labels = candidates["label"].to_numpy()
    jobs, _ = pd.factorize(candidates["jid"])
    rankings = evaluate(labels, jobs, scores, split, settings.seed)
    calls = rankings.pop("calls")
    test = candidates[split == "test"].groupby("jid")["label"]
    mixed = test.filter(lambda values: values.nunique() > 1)
    learned, verdict = reach_verdict(rankings, int(mixed.sum()), int((1 - mixed).sum()))
    results = {
        "learned": learned,
        "verdict": verdict,
        "base_rate": counts.loc["test", "real"] / counts.loc["test", "candidates"],
        "rankings": rankings,
        "calls": calls,
        "splits": counts.to_dict("index"),
        "best_epoch": best_epoch,
        "history": history,
        "settings": asdict(settings) | asdict(backend) | {"epochs": len(history)},
        "versions": {package: version(package) for package in ("numpy", "mlcroissant", "torch")},
    }
    print_results(results)
    if writes:
        model = {
            "weights": network.cpu().state_dict(),
            "center": torch.from_numpy(center),
            "scale": torch.from_numpy(scale),
            "feature_columns": FEATURE_COLUMNS,
            "threshold": calls["threshold"][0],
            "settings": {name: str(value) for name, value in results["settings"].items()},
        }
        write_report(settings.report_dir, dataset, split, scores, results, model)
    precision = rankings["network"]["average_precision"][0]
    if settings.min_ap is None or (learned and precision >= settings.min_ap):
        return 0
    LOG.error(f"--min_ap {settings.min_ap}: average precision {precision:.3f}, {verdict}")
    return 1


def parse_args(argv: list[str] | None) -> Settings:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description="Train a real-bogus network on a dataset; say if it can be learned from.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("-d", "--dataset_dir", type=Path, default="./hackathon_dataset", help="dataset to train on")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="to compute on")
    add("--report_dir", type=Path, help="folder for the figures, scores, weights and a picture")
    numbers = {  # type, default, least, most, help
        "epochs": (int, None, 1, 10**9, f"passes over the training split, else {STEPS} steps"),
        "batch_size": (int, BATCH_SIZE, 2, 10**9, "candidates per step"),
        "learning_rate": (float, LEARNING_RATE, 1e-9, 1, "highest of the one-cycle rate"),
        "seed": (int, SEED, 0, 2**32 - 1, "seed of the split, the weights and the order"),
        "min_ap": (float, None, 0, 1, "average precision below which the exit code is 1"),
        "max_candidates": (int, None, 1, 10**9, "take no more of them, evenly over the jobs"),
    }
    for name, (kind, default, _, _, text) in numbers.items():
        add(f"--{name}", type=kind, default=default, metavar="N", help=text)
    settings = Settings(**vars(parser.parse_args(argv)))
    for name, (_, _, least, most, _) in numbers.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name}: expected {least} to {most}, got {value}")
    return settings


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    settings = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    LOG.setLevel(logging.INFO if is_leader() else logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)  # what is not stated is no fault here
    if hasattr(sys.stdout, "reconfigure"):  # a path may have letters that it cannot print
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with redirect_stdout(sys.stdout if is_leader() else None), logging_redirect_tqdm():
            return run(settings)
    except (DatasetError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        for line in str(error).splitlines():
            LOG.error(line)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
