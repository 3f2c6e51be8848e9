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
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench_create_dataset import TESTS, BenchmarkError, Figures, run, run_benchmark, table

ROOT = TESTS.parent
SCRIPT = ROOT / "test_croissant_dataset.py"
LEARNING_RATE = "0.001"  # of the textbook's SGD: best of 0.0003, 0.001, 0.002, 0.003, 0.01 and 0.03

# The processes that are measured. Each prints its figures at the end, as a line of JSON.
IMPORTS = """
import hashlib, json, sys, time
root, folder, count, epochs, number, learning_rate = sys.argv[1:]
sys.path.insert(0, root)
import test_croissant_dataset as script
import mlcroissant as mlc
import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader, Dataset
def read_records():
    return mlc.Dataset(folder + "/croissant.json").records("transient_candidates")
start = time.perf_counter()
"""
ALONE = f"""{IMPORTS}
for record in read_records():
    pass
print(json.dumps(time.perf_counter() - start))
"""
SETUP = f"""{IMPORTS}
args = script.parse_args(["-d", folder, "--max_candidates", count, "--epochs", "1"])
threads = torch.get_num_threads()
args.device, args.dtype = script.pick_device("cpu")  # may leave one thread
args.rank, args.processes = 0, 1
dataset = script.examine(args)
candidates = dataset.candidates
candidates["split"] = script.split_candidates(candidates, args.seed)
rows, test_rows = dataset.rows_of("train"), dataset.rows_of("test")
dataset.fit_features(rows)
args.seed += int(number)
torch.manual_seed(args.seed)
epochs = int(epochs)
used = epochs * len(rows)
def finish(figures, logits, batch):
    figures["precision"] = 100 * average_precision_score(dataset.labels[test_rows], logits)
    tensors = (np.ascontiguousarray(tensor) for tensor in batch)
    figures["seen"] = [hashlib.sha256(tensor).hexdigest() for tensor in tensors]
    print(json.dumps(figures))
"""
TEXTBOOK = SETUP
TEXTBOOK += """
torch.set_num_threads(threads)
name = "transient_candidates/{}".format
records = {(r[name("jid")].decode(), r[name("id")]): r for r in read_records()}
class TextbookDataset(Dataset):
    def __init__(self, rows):
        keys = candidates.loc[rows, ["jid", "id"]].itertuples(index=False, name=None)
        self.records, self.features = [records[key] for key in keys], dataset.features[rows]
    def __len__(self):
        return len(self.records)
    def __getitem__(self, i):
        record = self.records[i]
        path = folder + "/" + record[name("image_filename")].decode()
        image = np.load(path, mmap_mode="r")
        top, left = (int(np.floor(record[name(axis)] + 0.5)) - 32 for axis in "yx")
        y, x = max(top, 0), max(left, 0)
        inner = image[y : top + 64, x : left + 64]
        cutout = np.zeros((64, 64, 4), np.float32)
        cutout[y - top : y - top + inner.shape[0], x - left : x - left + inner.shape[1]] = inner
        cutout = torch.from_numpy(cutout).permute(2, 0, 1).contiguous()
        return cutout, self.features[i], torch.tensor(record[name("label")]).float()
def train(network, epochs):
    optimizer = torch.optim.SGD(network.parameters(), lr=float(learning_rate), momentum=0.9)
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
figures = {"loading": used / (loaded - start), "training": used / (trained - loaded)}
test_loader = DataLoader(TextbookDataset(test_rows), batch_size=128)
network.eval()
with torch.inference_mode():
    logits = torch.cat([network(cutouts, features) for cutouts, features, _ in test_loader])
finish(figures, logits, next(iter(test_loader)))
"""
OURS = SETUP
OURS += """
def read():
    order = np.random.default_rng(args.seed).permutation(rows)
    return script.read_batches(dataset, script.share_out(order, args), args)
next(read())
figures = {"first batch": time.perf_counter() - start}
def timed(train_epoch):
    def call(*arguments):
        start = time.perf_counter()
        loss = train_epoch(*arguments)
        seconds.append(time.perf_counter() - start)
        return loss
    return call
seconds = []
script.train_epoch = timed(script.train_epoch)
script.find_best = lambda history: history[-1]  # judged after the last epoch, like the textbook's
script.train(dataset, args)
start = time.perf_counter()
for _ in range(epochs):
    for batch in read():
        pass
figures["loading"] = used / (time.perf_counter() - start)
args.epochs, fast = epochs, args.dtype
for kind, args.dtype in (("in float32", torch.float32), ("training", fast)):
    seconds.clear()
    network, _ = script.train(dataset, args)
    figures[kind] = used / sum(seconds)
file = dataset.files[0]
figures["head"] = [
    f"{len(dataset.files)} jobs of {file.height} x {file.width} pixels, {len(rows):,} of"
    f" {len(dataset):,} candidates to train on",
    f"ours {str(fast).removeprefix('torch.')}, batch {args.batch_size}",
]
finish(figures, script.predict(network, dataset, test_rows, args), dataset[test_rows[:128]])
"""
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
    run("simulation", sys.executable, TESTS / "make_mini_dataset.py", *options)
    run("dataset", sys.executable, ROOT / "create_dataset.py", "-i", jobs_dir, "-o", folder)
    shutil.rmtree(jobs_dir)
    return describe(folder)


def make_part(dataset_dir: Path, folder: Path, rows: list[dict[str, str]]) -> Path:
    """Make a dataset of some rows of another one's index, with links to their tensors."""
    (folder / "images").mkdir(parents=True)
    for name in {row["image_filename"] for row in rows}:
        (folder / name).symlink_to(dataset_dir / name)
    with (folder / "master_index.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return describe(folder)


def make_parts(dataset_dir: Path, work_dir: Path, count: int) -> dict[str, Path]:
    """Make datasets of as many candidates: of one job, the one with most of them, and of all."""
    with (dataset_dir / "master_index.csv").open(newline="", encoding="utf-8") as handle:
        index = list(csv.DictReader(handle))
    jobs = Counter(row["jid"] for row in index)
    if len(jobs) < 3:  # one for each split
        raise BenchmarkError(f"{dataset_dir}: candidates of {len(jobs)} jobs, expected 3 or more")
    ((jid, most),) = jobs.most_common(1)
    parts = {}
    for name, rows in (
        ("1 job", [row for row in index if row["jid"] == jid]),
        (f"{len(jobs)} jobs", index),
    ):
        places = sorted(random.Random(0).sample(range(len(rows)), min(count, most)))
        parts[name] = make_part(dataset_dir, work_dir / name, [rows[i] for i in places])
    return parts


def make_round(args: argparse.Namespace, dataset_dir: Path, number: int) -> dict:
    """Run the sources once and return what each printed; the loops have to see the same cutouts."""
    options = dataset_dir, str(args.candidates), str(args.epochs), str(number), LEARNING_RATE
    printed = {}
    for name, source in SOURCES.items():
        text = run(name, sys.executable, "-c", source, ROOT, *options).text
        printed[name] = json.loads(text.splitlines()[-1])
    if printed["textbook"]["seen"] != printed["ours"]["seen"]:
        raise BenchmarkError(f"{SCRIPT.name}: its cutouts differ from the textbook's")
    return printed


def with_ratio(figures: Figures) -> Figures:
    """Add how many times the first of two figures the second one is."""
    (one, firsts), (other, seconds) = figures.items()
    ratios = [second / first for first, second in zip(firsts, seconds, strict=True)]
    return figures | {f"{other} / {one}": ratios}


def benchmark(args: argparse.Namespace, work_dir: Path) -> str:
    """Measure everything in a temporary folder; return the table."""
    dataset_dir = find_dataset(args, work_dir)
    parts = make_parts(dataset_dir, work_dir, args.candidates)
    rounds = [make_round(args, dataset_dir, number) for number in range(args.rounds)]
    words = sys.executable, SCRIPT, "--epochs", "1", "-d"
    memory = {
        name: [run(name, *words, folder).peak_mb for _ in rounds] for name, folder in parts.items()
    }
    loading, training, precision = (
        {name: [printed[name][key] for printed in rounds] for name in ("textbook", "ours")}
        for key in ("loading", "training", "precision")
    )
    float32, first = ([r["ours"][key] for r in rounds] for key in ("in float32", "first batch"))
    alone = [printed["mlcroissant alone"] for printed in rounds]
    beyond = [whole - part for whole, part in zip(first, alone, strict=True)]
    sections = {
        "loading, candidates/s": with_ratio(loading),
        "training, candidates/s": with_ratio(training) | {"ours in float32": float32},
        "average precision, %": precision,
        "start, s": {"mlcroissant alone": alone, "to the first batch": first, "beyond it": beyond},
        "memory, MB": with_ratio(memory),
    }
    data, kind = rounds[0]["ours"]["head"]
    counts = f"epochs {args.epochs}, rounds {args.rounds}"
    head = f"{SCRIPT.name}: {data}", f"{counts}; textbook float32, batch 16; {kind}"
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
