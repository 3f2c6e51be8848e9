"""Measure create_dataset.py: its speed, its memory, and how both grow with the number of jobs.

Everything is measured as whole processes, start-up included, and printed as one table.

Speed: every round runs, one after the other, (a) the textbook build of the same tensors with
astropy and NumPy, one job after the other in one process; (b) `cat` of each job's four images into
one file, which reads and writes the least that can be; (c) create_dataset.py. The inputs are in
the page cache, outputs are removed and the disk is synced before each, and a first round is not
counted. In that round the tensors of (c) are compared with those of (a).

Memory: the peak resident size of the largest process. Pages that a worker shares count in it.

Growth: the times of the first and of the last tenth of many small jobs, from the tensors' dates;
and second runs, which have only the index to write, for a quarter, half and all of them.

    python tests/benchmarks/bench_create_dataset.py
    python tests/benchmarks/bench_create_dataset.py --jobs_dir ./raw_data --pairs 3
    python tests/benchmarks/bench_create_dataset.py --size 256 --jobs 2 --pairs 1 --small_jobs 20

Jobs are simulated (50 s each at full size), unless `--jobs_dir` has some, with plain .fits files.
At full size the temporary folder takes 3.5 GB. Linux only; needs what make_mini_dataset.py needs.
Exit codes: 0 measured; 1 a command failed or its tensors are wrong (stderr names it); 2 wrong
usage; 130 interrupted by Ctrl-C. The temporary folder is removed in any case.
"""

import argparse
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

# A child's peak is at least the size of its parent when it starts, so nothing large is imported.

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = TESTS.parent / "create_dataset.py"
SIMULATOR = TESTS / "make_mini_dataset.py"
IMAGE_NAMES = (  # in the order of the tensor's last axis
    "bkg_subbed_science_image.fits",
    "awaicgen_output_mosaic_image_resampled.fits",
    "diffimage_masked.fits",
    "scorrimage_masked.fits",
)
TOLERANCE = 1e-6  # between tensors, whose values are in [0, 1]
MB = 1e6  # bytes
MAXRSS_BYTES = 1024  # unit of ru_maxrss on Linux
DECIMALS = {"MB": 0}  # of a figure, by unit; 2 for the others

TEXTBOOK = """
import sys
from pathlib import Path
import numpy as np
from astropy.io import fits
from astropy.visualization import ZScaleInterval

jobs_dir, output_dir, *names = sys.argv[1:]
for job in sorted(Path(jobs_dir).glob("jid*")):
    planes = []
    for name in names:
        pixels = fits.getdata(job / name)
        vmin, vmax = map(float, ZScaleInterval().get_limits(pixels))  # NumPy's would make float64
        planes.append(((np.nan_to_num(pixels) - vmin) / (vmax - vmin)).clip(0, 1))
    np.save(Path(output_dir, job.name + ".npy"), np.stack(planes, axis=-1, dtype=np.float32))
"""
CAT = """
set -e; jobs_dir=$1; output_dir=$2; shift 2
for job in "$jobs_dir"/jid*; do cd "$job"; cat "$@" > "$output_dir/${job##*/}"; done
"""
COMPARE = """
import sys
from pathlib import Path
import numpy as np
from astropy.io import fits

jobs_dir, ours_dir, textbook_dir, difference_name = sys.argv[1:]
worst = 0
for path in sorted(Path(textbook_dir).iterdir()):
    finite = np.isfinite(fits.getdata(Path(jobs_dir, path.stem, difference_name)))
    ours, textbook = (np.load(p, mmap_mode="r") for p in (Path(ours_dir, path.name), path))
    assert (ours.shape, ours.dtype) == (textbook.shape, textbook.dtype), path.name
    worst = np.maximum(worst, np.abs(ours - textbook)[finite].max())  # NaN stays
print(*finite.shape, worst)
"""
WRITE_SMALL_JOBS = """
import sys
from pathlib import Path
tests, jobs_dir, count = sys.argv[1:]
sys.path[:0] = [tests, str(Path(tests).parent)]
from conftest import make_catalog, make_images, write_job

images, catalog = make_images(shape=(64, 64)), make_catalog(rows=20)
catalog[["x", "y"]] *= 0.8  # they are made for 80 x 72 pixels
for number in range(int(count)):
    write_job(Path(jobs_dir), f"jid{number:06d}", catalog, images)
"""

LOG = logging.getLogger("bench_create_dataset")


class BenchmarkError(Exception):
    """A command that failed, or gave wrong results; its text names it."""


@dataclass(frozen=True)
class Command:
    """What to run, its name in the table and in messages, and the folder that it writes."""

    name: str
    words: tuple[str | Path, ...]
    output_dir: Path


@dataclass(frozen=True)
class Run:
    """One finished command with all its processes."""

    seconds: float
    peak_mb: float  # resident size of the largest process
    text: str  # what was printed, stderr included


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, one or more times."""

    what: str
    unit: str
    values: tuple[float, ...]


def run(name: str, *words: str | Path) -> Run:
    """Run a command to its end, and end it and all its processes on Ctrl-C.

    Raises BenchmarkError where its exit code is not 0.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            text = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.read()  # ends when the last of its processes has
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise BenchmarkError(f"{name}: exit code {process.returncode}\n{text.strip()}")
    LOG.info(f"{name}: {seconds:.2f} s")
    return Run(seconds, usage.ru_maxrss * MAXRSS_BYTES / MB, text)


def measure(command: Command, keep: bool = False) -> Run:
    """Run a command with an empty output folder and nothing left to write to the disk."""
    shutil.rmtree(command.output_dir, ignore_errors=True)
    command.output_dir.mkdir()
    os.sync()
    result = run(command.name, *command.words)
    if not keep:
        shutil.rmtree(command.output_dir)
    return result


def ours(jobs_dir: Path, output_dir: Path, workers: int) -> Command:
    """Make the command that runs create_dataset.py."""
    words = (sys.executable, SCRIPT, "-i", jobs_dir, "-o", output_dir, "--workers", str(workers))
    return Command(SCRIPT.name, words, output_dir)


def three_ways(jobs_dir: Path, work_dir: Path, workers: int) -> tuple[Command, Command, Command]:
    """Make the commands of a round: textbook, cat and create_dataset.py."""
    textbook_dir, cat_dir = work_dir / "textbook", work_dir / "cat"
    textbook = (sys.executable, "-c", TEXTBOOK, jobs_dir, textbook_dir, *IMAGE_NAMES)
    cat = ("sh", "-c", CAT, "sh", jobs_dir, cat_dir, *IMAGE_NAMES)
    return (
        Command("textbook, one process", textbook, textbook_dir),
        Command("cat of the images", cat, cat_dir),
        ours(jobs_dir, work_dir / "ours", workers),
    )


def link_jobs(folder: Path, jobs: Iterable[Path]) -> Path:
    """Make an input folder of links to job folders, and return it."""
    folder.mkdir()
    for job in jobs:
        (folder / job.name).symlink_to(job)
    return folder


def find_jobs(args: argparse.Namespace, work_dir: Path) -> list[Path]:
    """Return the job folders to work on, after simulating them where none are given."""
    jobs_dir = args.jobs_dir
    if jobs_dir is None:
        jobs_dir = work_dir / "simulated"
        LOG.info(f"simulating {args.jobs} jobs of {args.size} x {args.size} pixels")
        options = ("-o", jobs_dir, "-n", str(args.jobs), "-s", str(args.size))
        run(SIMULATOR.name, sys.executable, SIMULATOR, *options)
    jobs = sorted(path.resolve() for path in jobs_dir.glob("jid*") if path.is_dir())
    if len(jobs) < args.jobs:
        raise BenchmarkError(f"{jobs_dir}: {len(jobs)} folders jid*, expected {args.jobs} or more")
    return jobs[: args.jobs]


def warm_up(jobs_dir: Path, commands: Sequence[Command]) -> str:
    """Run each command once and check the tensors; return their shape and how far they agree."""
    run("reading the jobs", "sh", "-c", 'cat "$1"/jid*/* > /dev/null', "sh", jobs_dir)
    for command in commands:
        measure(command, keep=True)
    textbook_dir, _, output_dir = (command.output_dir for command in commands)
    return compare(jobs_dir, output_dir / "images", textbook_dir)


def compare(jobs_dir: Path, images_dir: Path, textbook_dir: Path) -> str:
    """Compare all tensors where the difference image is finite, and describe them.

    Raises BenchmarkError where one is missing or off by more than TOLERANCE.
    """
    words = (sys.executable, "-c", COMPARE, jobs_dir, images_dir, textbook_dir, IMAGE_NAMES[2])
    height, width, worst = run("comparing the tensors", *words).text.split()[-3:]
    if not float(worst) <= TOLERANCE:  # NaN fails
        raise BenchmarkError(f"{SCRIPT.name}: tensors differ by {worst} from the textbook's")
    return f"{height} x {width} pixels; tensors within {float(worst):.0e} of the textbook's"


def speed_rows(commands: Sequence[Command], rounds: Sequence[Sequence[Run]]) -> list[Row]:
    """Tell the times of the commands, and their ratios within a round."""
    seconds = [tuple(result.seconds for result in results) for results in zip(*rounds, strict=True)]
    rows = [Row(c.name, "s", values) for c, values in zip(commands, seconds, strict=True)]
    for what, over, under in (("textbook / ours", 0, 2), ("ours / cat", 2, 1)):
        pairs = zip(seconds[over], seconds[under], strict=True)
        rows.append(Row(what, "ratio", tuple(a / b for a, b in pairs)))
    return rows


def memory_rows(rounds: Sequence[Sequence[Run]], one_job: Run) -> list[Row]:
    """Tell the peak sizes of the textbook and of create_dataset.py."""
    textbook, _, whole = (
        tuple(r.peak_mb for r in results) for results in zip(*rounds, strict=True)
    )
    return [
        Row("textbook, all jobs", "MB", textbook),
        Row(f"{SCRIPT.name}, all jobs", "MB", whole),
        Row(f"{SCRIPT.name}, 1 job", "MB", (one_job.peak_mb,)),
    ]


def pace(times: Sequence[float]) -> float:
    """Return the milliseconds a job, from when its tensors were finished, in seconds."""
    return 1e3 * (max(times) - min(times)) / (len(times) - 1)


def pace_rows(images_dir: Path) -> list[Row]:
    """Tell the pace at the beginning and at the end of a run, from the dates of its tensors."""
    times = [path.stat().st_mtime for path in sorted(images_dir.iterdir())]
    tenth = len(times) // 10
    first, last = pace(times[:tenth]), pace(times[-tenth:])
    return [
        Row("a job of the first tenth", "ms", (first,)),
        Row("a job of the last tenth", "ms", (last,)),
        # The dates of a few small tensors may be the same.
        Row("last / first", "ratio", (last / first if first else math.nan,)),
    ]


def write_index(command: Command, jobs: int) -> float:
    """Run create_dataset.py where all tensors are up to date; return the milliseconds a job."""
    result = run(f"{command.name}, index of {jobs:,} jobs", *command.words)
    if f" 0 written, {jobs:,} up to date" not in result.text:
        raise BenchmarkError(f"{command.name}: more than the index was written:\n{result.text}")
    return 1e3 * result.seconds / jobs


def index_rows(jobs: Sequence[Path], images_dir: Path, args: argparse.Namespace) -> list[Row]:
    """Tell what an index alone takes, for a quarter, half and all of the jobs."""
    commands, work_dir = {}, images_dir.parents[1]
    for count in (len(jobs) // 4, len(jobs) // 2, len(jobs)):
        output_dir = work_dir / f"index_{count}"
        (output_dir / "images").mkdir(parents=True)
        for job in jobs[:count]:
            tensor = f"{job.name}.npy"
            (output_dir / "images" / tensor).hardlink_to(images_dir / tensor)
        jobs_dir = link_jobs(work_dir / f"jobs_{count}", jobs[:count])
        commands[count] = ours(jobs_dir, output_dir, args.workers)
    rounds = [[write_index(c, count) for count, c in commands.items()] for _ in range(args.pairs)]
    values = zip(commands, zip(*rounds, strict=True), strict=True)
    return [Row(f"index alone, a job of {count:,}", "ms", times) for count, times in values]


def growth_rows(args: argparse.Namespace, work_dir: Path) -> list[Row]:
    """Tell how the time of a job changes with the number of jobs."""
    jobs_dir = work_dir / "small"
    words = (sys.executable, "-c", WRITE_SMALL_JOBS, TESTS, jobs_dir, str(args.small_jobs))
    run("writing small jobs", *words)
    command = ours(jobs_dir, work_dir / "small_ours", args.workers)
    measure(command, keep=True)
    images_dir = command.output_dir / "images"
    return pace_rows(images_dir) + index_rows(sorted(jobs_dir.iterdir()), images_dir, args)


def table(sections: dict[str, list[Row]]) -> str:
    """Lay out the figures: median, and smallest and largest where there are several."""
    lines = [f"{'':34}{'unit':>8}{'median':>10}{'min':>10}{'max':>10}"]
    for title, rows in sections.items():
        lines.append(title)
        for row in rows:
            spread = (min(row.values), max(row.values)) if len(row.values) > 1 else ()
            values = (median(row.values), *spread)
            cells = "".join(f"{value:10,.{DECIMALS.get(row.unit, 2)}f}" for value in values)
            lines.append(f"  {row.what:32}{row.unit:>8}{cells}")
    return "\n".join(lines)


def benchmark(args: argparse.Namespace, work_dir: Path) -> str:
    """Measure everything in a temporary folder, and return the table with its heading."""
    jobs = find_jobs(args, work_dir)
    jobs_dir = link_jobs(work_dir / "jobs", jobs)
    commands = three_ways(jobs_dir, work_dir, args.workers)
    found = warm_up(jobs_dir, commands)
    rounds = [[measure(command) for command in commands] for _ in range(args.pairs)]
    one_job_dir = link_jobs(work_dir / "one_job", jobs[:1])
    one_job = measure(ours(one_job_dir, work_dir / "ours", args.workers))
    sections = {
        "speed, whole processes": speed_rows(commands, rounds),
        "memory, largest process": memory_rows(rounds, one_job),
        f"growth, {args.small_jobs:,} jobs of 64 x 64 pixels": growth_rows(args, work_dir),
    }
    cpus = len(os.sched_getaffinity(0))
    counts = f"workers {args.workers}, processors {cpus}, rounds {args.pairs}"
    return f"{SCRIPT.name}: {args.jobs} jobs of {found}\n{counts}\n\n{table(sections)}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--jobs", type=int, default=4, help="jobs of the timed runs")
    add("--workers", type=int, default=2, help="worker processes of create_dataset.py")
    add("--pairs", type=int, default=5, help="rounds that count")
    add("--small_jobs", type=int, default=1000, help="jobs of the run that shows growth")
    temporary = Path(tempfile.gettempdir())
    add("--work_dir", type=Path, default=temporary, help="where to make the temporary folder")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--size", type=int, default=4089, help="pixels a side of the simulated jobs")
    add("--jobs_dir", type=Path, help="folder of jobs to use instead of simulated ones")
    args = parser.parse_args(argv)
    limits = {"jobs": 1, "workers": 1, "pairs": 1, "small_jobs": 20}  # 2 to a tenth of these
    for name, least in limits.items():
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected {least} or more, got {getattr(args, name)}")
    if not args.work_dir.is_dir():
        parser.error(f"--work_dir: no such folder: {args.work_dir}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO, force=True)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=args.work_dir) as folder:
            print(benchmark(args, Path(folder).resolve()))
    except (BenchmarkError, OSError) as error:
        LOG.error(error)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted: the temporary folder is removed")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
