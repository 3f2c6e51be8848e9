"""Measure generate_croissant.py on a large index: its speed, its memory, and how both grow.

Whole processes, start-up and mlcroissant's own check included, in one table: medians, and least and
most where there are several rounds. A round runs, on the same dataset, the textbook way (the index
read whole by pandas, each tensor loaded, a FileObject with its checksum for each) and ours,
generate_croissant.py, with and without the tensors' checksums. Memory: peak resident size. Growth:
ours, without checksums, on a quarter and on half of the rows.

    python tests/benchmarks/bench_generate_croissant.py
    python tests/benchmarks/bench_generate_croissant.py --rows 4000 --images 4 --rounds 1

The dataset is made of random numbers, its tensors are of 64 x 64 pixels. Needs Linux,
tests/requirements.txt and 0.6 GB for temporary files, which are removed in any case.
Exit codes: 0 measured; 1 a command failed (stderr names it); 2 wrong usage; 130 interrupted by
Ctrl-C.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from bench_create_dataset import TESTS, Figures, Run, Words, run, run_benchmark, table

SCRIPT = TESTS.parent / "generate_croissant.py"

DATASET = """
import sys
from pathlib import Path
import numpy as np
import pandas as pd
folder, rows, images = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
(folder / "images").mkdir(parents=True)
rng = np.random.default_rng(0)
number, per_job = np.arange(rows), -(-rows // images)
jid = np.char.add("jid", (number // per_job).astype(str))
index = pd.DataFrame({"id": 1.0 + number % per_job, "jid": jid})
for column in "x y sharpness roundness1 roundness2 npix peak flux mag daofind_mag flags".split():
    index[column] = rng.uniform(0, 63, rows)
index.loc[rng.random(rows) < 0.3, "mag"] = np.nan
index["match"] = np.where(rng.random(rows) < 0.03, 1.0, -1.0)
index["label"] = (index["match"] != -1).astype(int)
index["image_filename"] = "images/" + index["jid"] + ".npy"
index.to_csv(folder / "master_index.csv", index=False)
for name in index["image_filename"].unique():
    np.save(folder / name, rng.random((64, 64, 4), dtype=np.float32))
"""
TEXTBOOK = """
import hashlib, json, sys
from pathlib import Path
import mlcroissant as mlc
import numpy as np
import pandas as pd
folder = Path(sys.argv[1])
index = pd.read_csv(folder / "master_index.csv")
def file_object(name, kind):
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return mlc.FileObject(
        id=name, name=name, content_url=name, encoding_formats=[kind], sha256=digest
    )
files = [file_object("master_index.csv", "text/csv")]
for name in index["image_filename"].unique():
    tensor = np.load(folder / name)
    assert tensor.dtype == np.float32 and tensor.shape[2] == 4
    files.append(file_object(name, "application/x-numpy"))
kinds = {"f": mlc.DataType.FLOAT64, "i": mlc.DataType.INT64}
fields = [
    mlc.Field(
        id=f"candidates/{column}",
        name=column,
        data_types=[kinds.get(index[column].dtype.kind, mlc.DataType.TEXT)],
        source=mlc.Source(file_object="master_index.csv", extract=mlc.Extract(column=column)),
    )
    for column in index
]
candidates = mlc.RecordSet(id="candidates", name="candidates", fields=fields)
metadata = mlc.Metadata(name="d", distribution=files, record_sets=[candidates])
path = folder / "textbook.json"
path.write_text(json.dumps(metadata.to_json(), indent=2))
print(next(iter(mlc.Dataset(path).records("candidates"))))
"""


def make_dataset(folder: Path, rows: int, images: int) -> Path:
    """Make a dataset of random numbers, and return its folder."""
    words = (sys.executable, "-c", DATASET, folder, str(rows), str(images))
    run(f"{rows:,} rows", *words)
    return folder


def ours(folder: Path, *options: str) -> Words:
    """Make the command that runs generate_croissant.py."""
    paths = "-c", folder / "master_index.csv", "-o", folder / "croissant.json"
    return sys.executable, SCRIPT, *paths, *options


def speed_and_memory(folder: Path, rounds: int) -> tuple[Figures, Figures]:
    """Run the rounds, after one that does not count."""
    commands = {
        "textbook": (sys.executable, "-c", TEXTBOOK, folder),
        "ours": ours(folder),
        "ours with checksums": ours(folder, "--image_sha256"),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(1 + rounds):
        for name, words in commands.items():
            runs[name].append(run(name, *words))
    seconds = {name: [one.seconds for one in made[1:]] for name, made in runs.items()}
    pairs = zip(seconds["textbook"], seconds["ours with checksums"], strict=True)
    speed = {f"{name}, s": values for name, values in seconds.items()}
    speed["textbook / ours with checksums"] = [textbook / ours for textbook, ours in pairs]
    return speed, {f"{name}, MB": [one.peak_mb for one in made[1:]] for name, made in runs.items()}


def benchmark(args: argparse.Namespace, work_dir: Path) -> str:
    """Measure everything in a temporary folder; return the table."""
    parts = {
        rows: make_dataset(work_dir / str(rows), rows, args.images)
        for rows in (args.rows // 4, args.rows // 2, args.rows)
    }
    speed, memory = speed_and_memory(parts[args.rows], args.rounds)
    growth: Figures = {}
    for rows, folder in list(parts.items())[:-1]:
        made = [run(f"ours, {rows:,} rows", *ours(folder)) for _ in range(args.rounds)]
        growth[f"{rows:,} rows, s"] = [one.seconds for one in made]
        growth[f"{rows:,} rows, MB"] = [one.peak_mb for one in made]
    head = f"{SCRIPT.name}: {args.rows:,} rows, {args.images:,} tensors; rounds {args.rounds}"
    return table([head], {"speed": speed, "memory": memory, "growth": growth})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(description="Measure generate_croissant.py on a large index.")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000, help="candidates in the index")
    add("--images", type=int, default=1000, help="tensors")
    add("--rounds", type=int, default=5, help="rounds that count")
    add("--work_dir", type=Path, default=tempfile.gettempdir(), help="where to put temporary files")
    args = parser.parse_args(argv)
    if min(args.images, args.rounds) < 1 or args.rows < 4 * args.images:
        parser.error("expected a round, an image, and four rows for each image at the least")
    if not args.work_dir.is_dir():
        parser.error(f"--work_dir: no such folder: {args.work_dir}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_benchmark(parse_args(argv), benchmark)


if __name__ == "__main__":
    sys.exit(main())
