"""Measure test_croissant_dataset.py beside the textbook loop: speed, precision, start and memory.

The textbook loop is PyTorch's tutorial on this dataset: `__getitem__` takes a candidate's record
dictionary, opens the tensor with `np.load(mmap_mode="r")` and cuts the square out; batches of 16,
float32, SGD. Ours is the script's own. In a round each has a process of its own; candidates, split,
features, network and number of epochs are the same, and the cutouts are compared. The seed of the
weights and of the order changes with the round. An epoch that does not count comes before.

Loading: passes over the training split in random order, without a step. Training: its epochs,
loading included. Average precision: of the test split after the last epoch. Start: from opening
croissant.json to the first batch, with all that the script checks, beside mlcroissant reading the
records to no purpose. Memory: peak resident size of the whole script for one epoch on as many
candidates of one job and of all jobs. Medians, and least and most where there are several rounds.

    python tests/benchmarks/bench_training.py
    python tests/benchmarks/bench_training.py --dataset_dir ./my_dataset --epochs 8
    python tests/benchmarks/bench_training.py --jobs 6 --size 512 --candidates 400 --rounds 1

Jobs are simulated, 50 s each, unless `--dataset_dir` has a dataset; `--work_dir` has to hold 3 GB.
Needs Linux and tests/requirements.txt, and no GPU. Temporary files are removed in any case.
Exit codes: 0 measured; 1 a command failed or the cutouts differ (stderr names it); 2 wrong usage;
130 interrupted by Ctrl-C.
"""

import argparse
import csv
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench_create_dataset import (
    SIMULATOR,
    TESTS,
    BenchmarkError,
    Figures,
    run,
    run_benchmark,
    table,
)

ROOT = TESTS.parent
SCRIPT = ROOT / "test_croissant_dataset.py"
LEARNING_RATE = "0.01"  # of the textbook's SGD: the best of 0.001, 0.003, 0.01, 0.03 and 0.1

# Sources of the processes that are measured. Each prints its figures as a line of JSON at its end.
IMPORTS = """
import hashlib, json, sys, time
root, folder, count, epochs, round_number, learning_rate = sys.argv[1:]
sys.path.insert(0, root)
import test_croissant_dataset as script
import mlcroissant as mlc
import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader, Dataset

RECORD_SET, epochs = "transient_candidates", int(epochs)
def read_records():
    return mlc.Dataset(folder + "/croissant.json").records(RECORD_SET)
start = time.perf_counter()
"""
ALONE = (
    IMPORTS
    + """
for record in read_records():
    pass
print(json.dumps({"seconds": time.perf_counter() - start}))
"""
)
SETUP = (
    IMPORTS
    + """
args = script.parse_args(["-d", folder, "--max_candidates", count, "--epochs", "1"])
args.device, args.dtype = script.pick_device("cpu")
args.rank, args.processes = 0, 1
dataset = script.examine(args)
candidates = dataset.candidates
candidates["split"] = script.split_candidates(candidates, args.seed)
rows, test_rows = dataset.rows_of("train"), dataset.rows_of("test")
dataset.fit_features(rows)
args.seed += int(round_number)
torch.manual_seed(args.seed)

def finish(figures, logits, batch):
    figures["average precision"] = 100 * average_precision_score(dataset.labels[test_rows], logits)
    tensors = (np.ascontiguousarray(tensor.numpy()) for tensor in batch)
    figures["seen"] = [hashlib.sha256(tensor).hexdigest() for tensor in tensors]
    print(json.dumps(figures))
"""
)
TEXTBOOK = (
    SETUP
    + """
records = {(r[RECORD_SET + "/jid"].decode(), r[RECORD_SET + "/id"]): r for r in read_records()}

class TextbookDataset(Dataset):
    def __init__(self, rows):
        keys = candidates.loc[rows, ["jid", "id"]].itertuples(index=False, name=None)
        self.records, self.features = [records[key] for key in keys], dataset.features[rows]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record = self.records[i]
        image = np.load(
            folder + "/" + record[RECORD_SET + "/image_filename"].decode(), mmap_mode="r"
        )
        top, left = (int(np.floor(record[f"{RECORD_SET}/{axis}"] + 0.5)) - 32 for axis in "yx")
        y, x = max(top, 0), max(left, 0)
        inner = image[y : top + 64, x : left + 64]
        cutout = np.zeros((64, 64, 4), np.float32)
        cutout[y - top : y - top + inner.shape[0], x - left : x - left + inner.shape[1]] = inner
        cutout = torch.from_numpy(cutout).permute(2, 0, 1).contiguous()
        return cutout, self.features[i], torch.tensor(record[RECORD_SET + "/label"]).float()

def train(network, epochs):
    optimizer = torch.optim.SGD(network.parameters(), lr=float(learning_rate), momentum=0.9)
    network.train()
    for _ in range(epochs):
        for cutouts, features, labels in loader:
            optimizer.zero_grad()
            loss_function(network(cutouts, features), labels).backward()
            optimizer.step()

loader = DataLoader(TextbookDataset(rows), batch_size=16, shuffle=True)
labels = dataset.labels[rows]
loss_function = torch.nn.BCEWithLogitsLoss(pos_weight=(1 - labels).sum() / labels.sum())
train(script.RealBogusNetwork(), 1)
start = time.perf_counter()
for _ in range(epochs):
    for batch in loader:
        pass
loaded = time.perf_counter()
network = script.RealBogusNetwork()
train(network, epochs)
trained = time.perf_counter()
test_loader = DataLoader(TextbookDataset(test_rows), batch_size=128)
with torch.inference_mode():
    network.eval()
    logits = torch.cat([network(cutouts, features) for cutouts, features, _ in test_loader])
used = epochs * len(rows)
figures = {"loading": used / (loaded - start), "training": used / (trained - loaded)}
finish(figures, logits, next(iter(test_loader)))
"""
)
OURS = (
    SETUP
    + """
def read():
    order = np.random.default_rng(args.seed).permutation(rows)
    return script.read_batches(dataset, script.share_out(order, args), args)

next(read())
figures = {"to the first batch": time.perf_counter() - start}

def timed(train_epoch):
    def call(*arguments):
        start = time.perf_counter()
        loss = train_epoch(*arguments)
        seconds.append(time.perf_counter() - start)
        return loss
    return call

seconds = []
script.train_epoch = timed(script.train_epoch)
script.find_best = lambda history: history[-1]  # judged after the last epoch, as the textbook loop
script.train(dataset, args)
start = time.perf_counter()
for _ in range(epochs):
    for batch in read():
        pass
used = epochs * len(rows)
figures["loading"] = used / (time.perf_counter() - start)
args.epochs, fast = epochs, args.dtype
for kind, args.dtype in (("training in float32", torch.float32), ("training", fast)):
    seconds.clear()
    network, _ = script.train(dataset, args)
    figures[kind] = used / sum(seconds)
height, width = dataset.files[0].height, dataset.files[0].width
figures["found"] = (
    f"{len(dataset.files)} jobs of {height} x {width} pixels,"
    f" {len(dataset):,} candidates, {len(rows):,} of them to train on"
)
figures["kind"] = f"{str(fast).removeprefix('torch.')}, batch {args.batch_size}"
finish(figures, script.predict(network, dataset, test_rows, args), dataset[test_rows[:128]])
"""
)
SOURCES = {"textbook": TEXTBOOK, "mlcroissant alone": ALONE, "ours": OURS}


def describe(folder: Path) -> Path:
    """Write croissant.json into a dataset, and return its folder."""
    paths = "-c", folder / "master_index.csv", "-o", folder / "croissant.json"
    run("croissant.json", sys.executable, ROOT / "generate_croissant.py", *paths)
    return folder


def find_dataset(args: argparse.Namespace, work_dir: Path) -> Path:
    """Return the folder of the dataset to work on, after making it where none is given."""
    if args.dataset_dir is not None:
        if not (args.dataset_dir / "croissant.json").is_file():
            raise BenchmarkError(f"{args.dataset_dir}: no croissant.json there; expected a dataset")
        return args.dataset_dir.resolve()
    jobs_dir, folder = work_dir / "simulated", work_dir / "dataset"
    options = "-o", jobs_dir, "-n", str(args.jobs), "-s", str(args.size)
    run(SIMULATOR.name, sys.executable, SIMULATOR, *options)
    run("dataset", sys.executable, ROOT / "create_dataset.py", "-i", jobs_dir, "-o", folder)
    shutil.rmtree(jobs_dir)
    return describe(folder)


def read_index(dataset_dir: Path) -> list[dict[str, str]]:
    """Read the index of a dataset as text."""
    with (dataset_dir / "master_index.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def make_part(dataset_dir: Path, folder: Path, rows: list[dict[str, str]]) -> Path:
    """Make a dataset of some rows of another one, with links to their tensors."""
    (folder / "images").mkdir(parents=True)
    for name in {row["image_filename"] for row in rows}:
        (folder / name).symlink_to(dataset_dir / name)
    with (folder / "master_index.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return describe(folder)


def make_parts(dataset_dir: Path, work_dir: Path, count: int) -> dict[str, Path]:
    """Make datasets of as many candidates of one job, the one with most of them, and of all."""
    index = read_index(dataset_dir)
    ((jid, most),) = Counter(row["jid"] for row in index).most_common(1)
    parts = {"1 job": [row for row in index if row["jid"] == jid]}
    parts[f"{len({row['jid'] for row in index})} jobs"] = index
    chosen = {}
    for name, rows in parts.items():
        places = random.Random(0).sample(range(len(rows)), min(count, most))
        part_dir = work_dir / name.replace(" ", "_")
        chosen[name] = make_part(dataset_dir, part_dir, [rows[i] for i in sorted(places)])
    return chosen


def measure(name: str, *arguments: str | Path) -> dict:
    """Run one of the sources; return the figures that it prints."""
    result = run(name, sys.executable, "-c", SOURCES[name], ROOT, *arguments, LEARNING_RATE)
    return json.loads(result.text.splitlines()[-1])


def make_round(args: argparse.Namespace, dataset_dir: Path, number: int) -> dict[str, dict]:
    """Measure everything but memory once; raise BenchmarkError where the loops see different data."""
    arguments = dataset_dir, str(args.candidates), str(args.epochs), str(number)
    figures = {name: measure(name, *arguments) for name in SOURCES}
    if figures["textbook"]["seen"] != figures["ours"]["seen"]:
        raise BenchmarkError(f"{SCRIPT.name}: its cutouts differ from the textbook's")
    return figures


def compare(rounds: list[dict[str, dict]], key: str) -> Figures:
    """Return the figures of both loops, and how many times the textbook's ours are."""
    textbook, ours = ([figures[name][key] for figures in rounds] for name in ("textbook", "ours"))
    ratios = [one / other for one, other in zip(ours, textbook, strict=True)]
    return {"textbook": textbook, "ours": ours, "ours / textbook": ratios}


def benchmark(args: argparse.Namespace, work_dir: Path) -> str:
    """Measure everything in a temporary folder; return the table."""
    dataset_dir = find_dataset(args, work_dir)
    parts = make_parts(dataset_dir, work_dir, args.candidates)
    rounds, memory = [], {name: [] for name in parts}
    for number in range(1, args.rounds + 1):
        rounds.append(make_round(args, dataset_dir, number))
        for name, folder in parts.items():
            script = run(name, sys.executable, SCRIPT, "-d", folder, "--epochs", "1")
            memory[name].append(script.peak_mb)
    few, many = memory.values()
    ratio = {" / ".join(reversed(memory)): [y / x for x, y in zip(few, many, strict=True)]}
    training, ours = compare(rounds, "training"), [figures["ours"] for figures in rounds]
    start = {
        "mlcroissant alone": [figures["mlcroissant alone"]["seconds"] for figures in rounds],
        "to the first batch": [figures["to the first batch"] for figures in ours],
    }
    beyond = [y - x for x, y in zip(*start.values(), strict=True)]
    sections = {
        "loading, candidates/s": compare(rounds, "loading"),
        "training, candidates/s": training
        | {"ours in float32": [figures["training in float32"] for figures in ours]},
        "average precision, %": compare(rounds, "average precision"),
        "start, s": start | {"beyond mlcroissant": beyond},
        "memory, MB": memory | ratio,
    }
    head = [
        f"{SCRIPT.name}: {ours[0]['found']}",
        f"epochs {args.epochs}, rounds {args.rounds}, processors {len(os.sched_getaffinity(0))};"
        f" textbook float32, batch 16; ours {ours[0]['kind']}",
    ]
    return table(head, sections)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--dataset_dir", type=Path, help="dataset to use instead of simulated jobs")
    add("--jobs", type=int, default=5, help="jobs to simulate")
    add("--size", type=int, default=4089, help="pixels a side of the simulated jobs")
    add("--candidates", type=int, default=6000, help="candidates to use, evenly over the jobs")
    add("--epochs", type=int, default=3, help="passes over the training split")
    add("--rounds", type=int, default=3, help="rounds that count")
    add("--work_dir", type=Path, default=tempfile.gettempdir(), help="where to put temporary files")
    args = parser.parse_args(argv)
    for name, least in {"jobs": 3, "candidates": 30, "epochs": 1, "rounds": 1}.items():
        if getattr(args, name) < least:  # three jobs are one for each split
            parser.error(f"--{name}: expected {least} or more, got {getattr(args, name)}")
    for name in ("jobs", "size"):
        if args.dataset_dir is not None and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name}: has no effect with --dataset_dir")
    if not args.work_dir.is_dir():
        parser.error(f"--work_dir: no such folder: {args.work_dir}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_benchmark(parse_args(argv), benchmark)


if __name__ == "__main__":
    sys.exit(main())
