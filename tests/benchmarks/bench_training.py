"""Measure test_croissant_dataset.py: cutouts, training, records and a quick look.

One table: medians, and the extremes if there are several rounds. Ratios are of figures of the same
round. Each figure comes from a process of its own, whose imports do not count.

- Cutouts: the same candidates in the same random order, from maps that are kept open ("plain
  maps"), with `np.load(mmap_mode="r")` per sample, and by ours, which also checks that pixels are
  in [0, 1]. The first batches are compared. Maps are opened before the clock starts. Warm: cutouts
  were read before. Cold: the page cache was dropped; only root can do that, others do without.
- Training: the textbook loop (a `Dataset` that opens the tensor for each sample, batches of 16,
  SGD, float32, PyTorch's own number of threads) and the script's `train`, whose time includes the
  evaluation of the validation split after each epoch. One epoch before does not count.
- Records: mlcroissant alone, and ours with one and with two processes, checksum included.
- Quick look: the whole script with QUICK_LOOK, start-up included, and the time of mlcroissant alone
  for all records of that index, extrapolated from its rate in the same round.

    python tests/benchmarks/bench_training.py
    python tests/benchmarks/bench_training.py --dataset_dir ./my_dataset --epochs 8
    python tests/benchmarks/bench_training.py --jobs 3 --size 512 --candidates 150 --rounds 1

Jobs are simulated, 50 s each, unless `--dataset_dir` has a dataset; `--work_dir` has to hold 3 GB.
Needs three jobs with real and bogus candidates, Linux and tests/requirements.txt, and no GPU.
Temporary files are removed in any case. Exit codes: 0 measured; 1 a command failed or the cutouts
differ (stderr names it); 2 wrong usage; 130 interrupted by Ctrl-C.
"""

import argparse
import hashlib
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlcroissant as mlc
import numpy as np
import pandas as pd
import torch
from bench_create_dataset import DROP_CACHES, LOG, TESTS, BenchmarkError, run, run_benchmark, table
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader, Dataset

ROOT = TESTS.parent
sys.path.insert(0, str(ROOT))
import test_croissant_dataset as script  # noqa: E402

QUICK_LOOK = ("--max_candidates", "2000", "--epochs", "1")
LEARNING_RATE = 0.001  # of the textbook's SGD: best of 0.0003, 0.001, 0.002, 0.003, 0.01 and 0.03
SEED = 0  # of candidates, order and split; the round is added for weights and training
# What the functions need and the processes that call them share; nothing of it has run.
IMPORTED = ["mlcroissant", "sklearn.metrics", "torch.utils.data", "test_croissant_dataset"]
Section = dict[str, float]  # figures of one round


def prepare_process() -> None:
    """Make this process like one of the script: quiet, and with the usual way to start others."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    multiprocessing.set_start_method(None, force=True)


def call(function: Callable, *arguments: object) -> object:
    """Call a function of this file in a process of its own; return its result.

    The process is forked from one that has only imported the libraries. Raises BenchmarkError if
    the function fails.
    """
    name = f"{function.__name__} {arguments[0]}"
    context, start = multiprocessing.get_context("forkserver"), time.perf_counter()
    context.set_forkserver_preload(IMPORTED)
    with ProcessPoolExecutor(1, context, prepare_process) as pool:
        try:
            result = pool.submit(function, *arguments).result()
        except Exception as error:  # whatever the script or a library raises
            raise BenchmarkError(f"{name}: {type(error).__name__}: {error}") from error
    LOG.info(f"{name}: {time.perf_counter() - start:.2f} s")
    return result


def read_candidates(folder: Path, wanted: int | None) -> pd.DataFrame:
    """Read candidates of a dataset as the script does."""
    json_path = folder / "croissant.json"
    index = script.find_index(script.load_description(json_path), folder)
    return script.read_records(json_path, *index, wanted, SEED)


def select_candidates(wanted: int, folder: Path, table_path: Path) -> str:
    """Save candidates, their split and tensors, in the script's random order; describe them."""
    candidates = read_candidates(folder, wanted)
    split = script.split_candidates(candidates, SEED)
    paths = f"{folder}/" + candidates["image_filename"]
    dataset = script.CutoutDataset(folder, candidates)
    order = dataset.shuffle(np.arange(len(candidates)), [SEED])
    candidates = candidates.assign(split=split, path=paths).iloc[order]
    candidates.reset_index(drop=True).to_pickle(table_path)
    height, width, _ = np.load(paths[0], mmap_mode="r").shape
    return (
        f"{paths.nunique()} jobs of {height} x {width} pixels, {(split == 'train').sum():,} of"
        f" {len(candidates):,} candidates to train on"
    )


def cut_out(image: np.ndarray, x: float, y: float, square: np.ndarray) -> None:
    """Copy the pixels around a position into a square of zeros (64, 64, 4)."""
    left, top = (math.floor(value + 0.5) - 32 for value in (x, y))
    part = image[max(top, 0) : top + 64, max(left, 0) : left + 64]
    square[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]] = part


def load_plainly(
    candidates: pd.DataFrame, open_tensor: Callable[[str], np.ndarray], batches: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield the cutouts of batches, float32 (N, 64, 64, 4)."""
    places = candidates[["path", "x", "y"]].to_numpy().tolist()
    for rows in batches:
        squares = np.zeros((len(rows), 64, 64, 4), np.float32)
        for square, row in zip(squares, rows, strict=True):
            path, x, y = places[row]
            cut_out(open_tensor(path), x, y, square)
        yield squares


def read_cutouts(way: str, cold: bool, folder: Path, table_path: Path) -> tuple[float, str]:
    """Read all cutouts once; return cutouts/s and a digest of the first batch."""
    candidates = pd.read_pickle(table_path)
    batches = script.divide(np.arange(len(candidates)), script.BATCH_SIZE)
    open_tensor = partial(np.load, mmap_mode="r")
    if way == "plain maps":
        open_tensor = {path: open_tensor(path) for path in candidates["path"].unique()}.get
    loaded = load_plainly(candidates, open_tensor, batches)
    if way == "ours":
        dataset = script.CutoutDataset(folder, candidates)
        loaded = (cutouts.permute(0, 2, 3, 1) for cutouts, _, _ in dataset.load(batches))
    if cold:
        os.sync()
        DROP_CACHES.write_text("3")
    start = time.perf_counter()
    first = next(loaded)
    for _ in loaded:
        pass
    rate = len(candidates) / (time.perf_counter() - start)
    return rate, hashlib.sha256(np.ascontiguousarray(first)).hexdigest()


class TextbookDataset(Dataset):
    """Candidates one by one, each from a tensor that is opened for it."""

    def __init__(self, candidates: pd.DataFrame, features: torch.Tensor) -> None:
        self.records, self.features = candidates.to_dict("records"), features

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return cutout, features and label of a candidate."""
        record, square = self.records[i], np.zeros((64, 64, 4), np.float32)
        cut_out(np.load(record["path"], mmap_mode="r"), record["x"], record["y"], square)
        cutout = torch.from_numpy(square).permute(2, 0, 1).contiguous()
        return cutout, self.features[i], torch.tensor(record["label"], dtype=torch.float32)


def train_textbook(seed: int, epochs: int, folder: Path, table_path: Path) -> tuple[float, float]:
    """Train as textbooks do; return candidates/s and average precision on the test split, %."""
    candidates = pd.read_pickle(table_path)
    train, test = (np.flatnonzero(candidates["split"] == name) for name in ("train", "test"))
    dataset = script.CutoutDataset(folder, candidates)
    dataset.fit_features(train)
    batches = script.divide(np.arange(len(dataset)), script.BATCH_SIZE)
    features = torch.cat([features for _, features, _ in dataset.load(batches)])
    odds = torch.tensor(1 / candidates["label"][train].mean() - 1)
    loss_function = torch.nn.BCEWithLogitsLoss(pos_weight=odds)
    torch.manual_seed(seed)
    train_set = TextbookDataset(candidates.iloc[train], features[train])
    loader = DataLoader(train_set, batch_size=16, shuffle=True)
    for passes in (1, epochs):  # the first does not count
        network = script.RealBogusNetwork()
        optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9)
        start = time.perf_counter()
        for _ in range(passes):
            for *inputs, labels in loader:
                optimizer.zero_grad()
                loss_function(network(*inputs), labels).backward()
                optimizer.step()
        rate = passes * len(train) / (time.perf_counter() - start)
    test_loader = DataLoader(TextbookDataset(candidates.iloc[test], features[test]), batch_size=128)
    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(*inputs) for *inputs, _ in test_loader])
    return rate, 100 * average_precision_score(candidates["label"][test], logits)


def train_ours(seed: int, epochs: int, folder: Path, table_path: Path) -> tuple[float, float]:
    """Train as the script does; return the same."""
    candidates = pd.read_pickle(table_path)
    split = candidates["split"].to_numpy()
    train, test = (np.flatnonzero(split == name) for name in ("train", "test"))
    settings = script.parse_args(["-d", str(folder), "--seed", str(seed), "--device", "cpu"])
    backend = script.pick_backend(settings.device)
    dataset = script.CutoutDataset(folder, candidates)
    dataset.fit_features(train)
    for passes in (1, epochs):  # the first does not count
        start = time.perf_counter()
        network, *_ = script.train(dataset, split, replace(settings, epochs=passes), backend)
        rate = passes * len(train) / (time.perf_counter() - start)
    logits = script.predict(network, dataset, test, settings.batch_size, backend)
    return rate, 100 * average_precision_score(candidates["label"][test], logits)


def read_index(processes: int, folder: Path, rows: int) -> float:
    """Return records/s of ours in one process or more, or of mlcroissant alone: 0 processes."""
    start = time.perf_counter()
    if processes:
        script.count_cpus = lambda: processes
        script.RECORDS_PER_PART = (
            rows if processes == 1 else min(script.RECORDS_PER_PART, -(-rows // processes))
        )
        read_candidates(folder, None)
    else:
        for _ in mlc.Dataset(folder / "croissant.json").records("transient_candidates"):
            pass
    return rows / (time.perf_counter() - start)


def describe(folder: Path) -> Path:
    """Write croissant.json into a dataset; return its folder."""
    paths = "-c", folder / "master_index.csv", "-o", folder / "croissant.json"
    run("croissant.json", sys.executable, ROOT / "generate_croissant.py", *paths)
    return folder


def find_dataset(args: argparse.Namespace, work_dir: Path) -> Path:
    """Return the folder of the dataset to work on, after making it if none is given."""
    if args.dataset_dir is not None:
        if not (args.dataset_dir / "croissant.json").is_file():
            raise BenchmarkError(f"{args.dataset_dir}: no croissant.json there; expected a dataset")
        return args.dataset_dir.resolve()
    jobs_dir, folder = work_dir / "simulated", work_dir / "dataset"
    options = "-o", jobs_dir, "-n", str(args.jobs), "-s", str(args.size)
    run("simulation", sys.executable, TESTS / "make_mini_dataset.py", *options)
    run("dataset", sys.executable, ROOT / "create_dataset.py", "-i", jobs_dir, "-o", folder)
    shutil.rmtree(jobs_dir)
    return describe(folder)


def repeat_rows(dataset_dir: Path, folder: Path, rows: int) -> Path:
    """Make a dataset of so many rows: those of another one, repeated or thinned, with new ids."""
    index = pd.read_csv(dataset_dir / "master_index.csv", dtype=str, keep_default_na=False)
    folder.mkdir()
    (folder / "images").symlink_to(dataset_dir / "images")
    repeated = index.iloc[np.arange(rows) * len(index) // rows].assign(id=range(1, rows + 1))
    repeated.to_csv(folder / "master_index.csv", index=False)
    return describe(folder)


def with_ratios(figures: Section, *pairs: tuple[str, str]) -> Section:
    """Add ratios of figures."""
    return figures | {f"{one} / {other}": figures[one] / figures[other] for one, other in pairs}


def measure_cutouts(cold: bool, *paths: Path) -> Section:
    """Read the cutouts in each way; raise BenchmarkError if they differ."""
    ways = *others, ours = "plain maps", "np.load per sample", "ours"
    results = {way: call(read_cutouts, way, cold, *paths) for way in ways}
    if len({digest for _, digest in results.values()}) > 1:
        raise BenchmarkError(f"{script.__file__}: its cutouts differ from those of plain maps")
    rates = {way: rate for way, (rate, _) in results.items()}
    return with_ratios(rates, *((ours, other) for other in others))


def measure_training(*arguments: object) -> dict[str, Section]:
    """Train in both ways."""
    pairs = zip(call(train_textbook, *arguments), call(train_ours, *arguments), strict=True)
    rates, precision = (dict(zip(("textbook", "ours"), pair, strict=True)) for pair in pairs)
    rates = with_ratios(rates, ("ours", "textbook"))
    return {"training, candidates/s": rates, "average precision, test split, %": precision}


def measure_records(args: argparse.Namespace, index: Path, quick_index: Path) -> dict[str, Section]:
    """Read the index in each way, and take a quick look at a larger one."""
    ways = alone, one, two = "mlcroissant alone", "1 process", "2 processes"
    rates = {way: call(read_index, number, index, args.records) for number, way in enumerate(ways)}
    rates = with_ratios(rates, (one, alone), (two, alone), (two, one))
    words = sys.executable, script.__file__, "-d", quick_index, *QUICK_LOOK
    ours, everything = run("quick look", *words).seconds, args.quick_records / rates[alone]
    return {
        f"records/s, {args.records:,} records": rates,
        f"quick look, {args.quick_records:,} records": {
            "ours, s": ours,
            "mlcroissant alone, extrapolated, s": everything,
            "extrapolated / ours": everything / ours,
        },
    }


def benchmark(args: argparse.Namespace, work_dir: Path) -> str:
    """Measure everything in a temporary folder; return the table."""
    folder, table_path = find_dataset(args, work_dir), work_dir / "candidates.pkl"
    data = call(select_candidates, args.candidates, folder, table_path)
    index = repeat_rows(folder, work_dir / "records", args.records)
    quick_index = repeat_rows(folder, work_dir / "quick", args.quick_records)
    rounds, cold = [], os.access(DROP_CACHES, os.W_OK)
    for seed in range(args.rounds):
        call(read_cutouts, "plain maps", False, folder, table_path)  # into the page cache
        made = {"cutouts/s, warm page cache": measure_cutouts(False, folder, table_path)}
        made |= measure_training(seed, args.epochs, folder, table_path)
        made |= measure_records(args, index, quick_index)
        rounds.append(made)
    for made in rounds:  # last, so that nothing else is read from a cold page cache
        title = "cutouts/s, cold page cache" + ("" if cold else ": left out, only root can drop it")
        made[title] = measure_cutouts(True, folder, table_path) if cold else {}
    sections = {
        title: {what: [made[title][what] for made in rounds] for what in figures}
        for title, figures in rounds[0].items()
    }
    head = f"{Path(script.__file__).name}: {data}", f"epochs {args.epochs}, rounds {args.rounds}"
    return table(head, sections)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(description="Measure test_croissant_dataset.py.")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--dataset_dir", type=Path, help="dataset to use instead of simulated jobs")
    add("--size", type=int, default=4089, help="pixels a side of the simulated jobs")
    add("--work_dir", type=Path, default=tempfile.gettempdir(), help="where to put temporary files")
    counts = {  # default, least, and what is counted
        "jobs": (5, 3, "jobs to simulate"),
        "candidates": (6000, 30, "candidates to use, evenly over the jobs"),
        "epochs": (3, 1, "passes over the training split"),
        "rounds": (3, 1, "rounds that count"),
        "records": (20_000, 30, "rows of the index that is read whole"),
        "quick_records": (300_000, 30, "rows of the index of the quick look"),
    }
    for name, (default, _, text) in counts.items():
        add(f"--{name}", type=int, default=default, help=text)
    args = parser.parse_args(argv)
    for name, (_, least, _) in counts.items():
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected {least} or more, got {getattr(args, name)}")
    for name in ("jobs", "size"):
        if args.dataset_dir is not None and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect with --dataset_dir")
    if not args.work_dir.is_dir():
        parser.error(f"--work_dir: no such folder: {args.work_dir}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_benchmark(parse_args(argv), benchmark)


if __name__ == "__main__":
    sys.exit(main())
