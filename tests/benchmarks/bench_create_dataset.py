"""Measure create_dataset.py: its speed, its memory, and how both grow with the number of jobs.

Whole processes, start-up included, in one table: medians, and the extremes if there are several
rounds. A round runs the textbook build of the same tensors (astropy and NumPy, in one process),
`cat` of each job's four images into one file, and ours, create_dataset.py. Outputs are removed and
the disk is synced before each command.

- Warm: inputs are in the page cache. All jobs are links to the simulated ones. A first round, which
  does not count, compares our tensors with the textbook's.
- Cold: the page cache is dropped before each command, and then the libraries are imported once.
  These jobs are copies. Only root can drop the page cache; for others this part is skipped.
- Memory: peak resident size of the largest process.
- Growth: the first and the last tenth of many small jobs, from the dates of their tensors, and
  second runs, which have only the index to write.

    python tests/benchmarks/bench_create_dataset.py
    python tests/benchmarks/bench_create_dataset.py --jobs_dir ./raw_data --rounds 3
    python tests/benchmarks/bench_create_dataset.py --size 256 --rounds 1 --small_jobs 20

Simulating a job takes 50 s, unless `--jobs_dir` has some; `--work_dir` has to hold 12 GB. Needs
Linux, tests/requirements.txt and plain .fits files. Temporary files are removed in any case.
Exit codes: 0 measured; 1 a command failed or its tensors are wrong (stderr names it); 2 wrong
usage; 130 interrupted by Ctrl-C.
"""

import argparse
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from subprocess import PIPE, STDOUT, Popen

# Nothing large is imported: a child's peak is at least the size of its parent at its start.

TESTS = Path(__file__).resolve().parents[1]
SCRIPT, SIMULATOR = TESTS.parent / "create_dataset.py", TESTS / "make_mini_dataset.py"
IMAGE_NAMES = (  # in the order of the tensor's last axis
    "bkg_subbed_science_image.fits awaicgen_output_mosaic_image_resampled.fits"
    " diffimage_masked.fits scorrimage_masked.fits"
).split()
DROP_CACHES = Path(os.environ.get("DROP_CACHES", "/proc/sys/vm/drop_caches"))  # tests: another file
TOLERANCE = 1e-6  # between tensors, whose values are in [0, 1]
MAXRSS_MB = 1024 / 1e6  # unit of ru_maxrss on Linux

IMPORTS = "import sys; from pathlib import Path; import numpy as np; from astropy.io import fits"
TEXTBOOK = f"""{IMPORTS}
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
COMPARE = f"""{IMPORTS}
jobs_dir, textbook_dir, ours_dir, difference_name = sys.argv[1:]
worst = 0
for path in sorted(Path(textbook_dir).iterdir()):
    finite = np.isfinite(fits.getdata(Path(jobs_dir, path.stem, difference_name)))
    ours, textbook = (np.load(p, mmap_mode="r") for p in (Path(ours_dir, path.name), path))
    assert (ours.shape, ours.dtype) == (textbook.shape, textbook.dtype), path.name
    worst = np.maximum(worst, np.abs(ours - textbook)[finite].max())  # NaN stays
print(*finite.shape, worst)
"""
LIBRARIES = "import numpy, pandas, astropy.io.fits, astropy.visualization, multiprocessing, tqdm"
SMALL_JOBS = f"""{IMPORTS}
tests, jobs_dir, count = sys.argv[1:]
sys.path[:0] = [tests, str(Path(tests).parent)]
from conftest import make_catalog, make_images, write_job
images, catalog = make_images(shape=(64, 64)), make_catalog(rows=20)
catalog[["x", "y"]] *= 0.8  # they are made for 80 x 72 pixels
for number in range(int(count)):
    write_job(Path(jobs_dir), f"jid{{number:06d}}", catalog, images)
"""

LOG = logging.getLogger("bench_create_dataset")
Words = tuple[str | Path, ...]  # of a command
Figures = dict[str, Sequence[float]]  # what was measured, with its unit: once or several times


class BenchmarkError(Exception):
    """A command that failed, or gave wrong results; its text names it."""


@dataclass(frozen=True)
class Run:
    """One finished command with all its processes."""

    seconds: float
    peak_mb: float  # resident size of the largest process
    text: str  # what was printed, stderr included


def run(name: str, *words: str | Path) -> Run:
    """Run a command; on Ctrl-C, end all its processes. Raises BenchmarkError where it fails."""
    start = time.perf_counter()
    pipes = {"stdout": PIPE, "stderr": STDOUT, "text": True, "errors": "backslashreplace"}
    with Popen(words, start_new_session=True, **pipes) as process:
        try:
            text = process.stdout.read()  # ends when the last of its processes has ended
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            process.stdout.read()
            raise
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        command = shlex.join(word for word in map(str, words) if "\n" not in word)  # no sources
        raise BenchmarkError(f"{name}: exit code {process.returncode} of {command}\n{text.strip()}")
    LOG.info(f"{name}: {seconds:.2f} s")
    return Run(seconds, usage.ru_maxrss * MAXRSS_MB, text)


def measure(output_dir: Path, words: Words, keep: bool = False, cold: bool = False) -> Run:
    """Run a command that fills a folder, empty at first; nothing is left to write to the disk."""
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir()
    os.sync()
    if cold:
        DROP_CACHES.write_text("3")
        run("libraries", sys.executable, "-c", LIBRARIES)
    result = run(output_dir.name, *words)
    if not keep:
        shutil.rmtree(output_dir)
    return result


def ours(jobs_dir: Path, output_dir: Path, workers: int) -> Words:
    """Make the command that runs create_dataset.py."""
    return sys.executable, SCRIPT, "-i", jobs_dir, "-o", output_dir, "--workers", str(workers)


def make_round(jobs_dir: Path, work_dir: Path, workers: int) -> dict[Path, Words]:
    """Make the commands of a round, in order, each under the folder that it fills."""
    textbook_dir, cat_dir, ours_dir = (work_dir / name for name in ("textbook", "cat", "ours"))
    return {
        textbook_dir: (sys.executable, "-c", TEXTBOOK, jobs_dir, textbook_dir, *IMAGE_NAMES),
        cat_dir: ("sh", "-c", CAT, "sh", jobs_dir, cat_dir, *IMAGE_NAMES),
        ours_dir: ours(jobs_dir, ours_dir, workers),
    }


def link_jobs(folder: Path, jobs: Sequence[Path], count: int) -> Path:
    """Make an input folder of links to job folders, some of them several times; return it."""
    folder.mkdir()
    for number in range(count):
        (folder / f"jid{number:06d}").symlink_to(jobs[number % len(jobs)])
    return folder


def copy_jobs(folder: Path, jobs: Sequence[Path], count: int) -> Path:
    """Make an input folder of copies, none of which is in the page cache because of another."""
    for number in range(count):
        shutil.copytree(jobs[number % len(jobs)], folder / f"jid{number:06d}")
    return folder


def find_jobs(args: argparse.Namespace, work_dir: Path) -> list[Path]:
    """Return the job folders to work on, after simulating them if none are given."""
    jobs_dir = args.jobs_dir
    if jobs_dir is None:
        jobs_dir = work_dir / "simulated"
        LOG.info(f"simulating {args.simulated} jobs of {args.size} x {args.size} pixels")
        options = ("-o", jobs_dir, "-n", str(args.simulated), "-s", str(args.size))
        run(SIMULATOR.name, sys.executable, SIMULATOR, *options)
    jobs = sorted(path.resolve() for path in jobs_dir.glob("jid*") if path.is_dir())
    if not jobs:
        raise BenchmarkError(f"{jobs_dir}: no folders jid* in it")
    return jobs


def warm_up(jobs_dir: Path, commands: dict[Path, Words]) -> str:
    """Run each command once, check our tensors against the textbook's, and describe them."""
    run("reading the jobs", "sh", "-c", 'cat "$1"/jid*/* > /dev/null', "sh", jobs_dir)
    for output_dir, words in commands.items():
        measure(output_dir, words, keep=True)
    textbook_dir, _, ours_dir = commands
    folders = jobs_dir, textbook_dir, ours_dir / "images"
    result = run("comparison", sys.executable, "-c", COMPARE, *folders, IMAGE_NAMES[2])
    for output_dir in commands:
        shutil.rmtree(output_dir)
    height, width, worst = result.text.split()[-3:]
    if not float(worst) <= TOLERANCE:  # NaN fails
        raise BenchmarkError(f"{SCRIPT.name}: off by {worst} from the textbook's tensors")
    return f"{height} x {width} pixels; tensors within {float(worst):.1g} of the textbook's"


def ratios(rounds: Sequence[dict[str, Run]], *pairs: tuple[str, str]) -> Figures:
    """Return the seconds of each command, and the ratios of some within the same round."""
    figures = {f"{name}, s": [r[name].seconds for r in rounds] for name in rounds[0]}
    for one, other in pairs:
        figures[f"{one} / {other}"] = [r[one].seconds / r[other].seconds for r in rounds]
    return figures


def warm(
    args: argparse.Namespace, work_dir: Path, jobs: Sequence[Path]
) -> tuple[str, Figures, Figures]:
    """Run the rounds; return what warm_up found, and the figures of speed and of memory."""
    jobs_dir = link_jobs(work_dir / "warm", jobs, args.jobs)
    one_job_dir = link_jobs(work_dir / "one_job", jobs, 1)
    commands = make_round(jobs_dir, work_dir, args.workers)
    found = warm_up(jobs_dir, commands)
    rounds = [{d.name: measure(d, w) for d, w in commands.items()} for _ in range(args.rounds)]
    one_job = measure(work_dir / "ours", ours(one_job_dir, work_dir / "ours", args.workers))
    memory = {
        f"{name}, {args.jobs} jobs, MB": [r[name].peak_mb for r in rounds]
        for name in ("textbook", "ours")
    }
    speed = ratios(rounds, ("textbook", "ours"), ("ours", "cat"))
    return found, speed, memory | {"ours, 1 job, MB": [one_job.peak_mb]}


def cold(args: argparse.Namespace, work_dir: Path, jobs: Sequence[Path]) -> Figures:
    """Run the rounds of `cat` and ours from a cold page cache; nothing if it cannot be dropped."""
    if not os.access(DROP_CACHES, os.W_OK):
        LOG.warning(f"cold: skipped, because {DROP_CACHES} cannot be written (only root can)")
        return {}
    jobs_dir = copy_jobs(work_dir / "cold", jobs, args.cold_jobs)
    commands = make_round(jobs_dir, work_dir, args.workers)
    del commands[work_dir / "textbook"]
    rounds = [
        {d.name: measure(d, w, cold=True) for d, w in commands.items()} for _ in range(args.rounds)
    ]
    shutil.rmtree(jobs_dir)
    return ratios(rounds, ("ours", "cat"))


def pace(images_dir: Path) -> Figures:
    """Tell the time of a job in the first and in the last tenth of a run, from its tensors."""
    times = [path.stat().st_mtime for path in sorted(images_dir.iterdir())]
    tenth = len(times) // 10
    parts = times[:tenth], times[-tenth:]  # workers overtake one another: not quite in order
    first, last = (1e3 * (max(part) - min(part)) / (tenth - 1) for part in parts)
    ratio = last / (first or math.nan)  # the dates of a few tensors may be the same
    return {"first tenth, ms/job": [first], "last tenth, ms/job": [last], "last / first": [ratio]}


def growth(args: argparse.Namespace, work_dir: Path) -> Figures:
    """Tell how the time of a job changes with the number of jobs."""
    folder, commands, figures = work_dir / "small", {}, {}
    run("small jobs", sys.executable, "-c", SMALL_JOBS, TESTS, folder, str(args.small_jobs))
    jobs = sorted(folder.iterdir())
    for count in (len(jobs) // 4, len(jobs) // 2, len(jobs)):
        jobs_dir = link_jobs(work_dir / f"jobs_{count}", jobs, count)
        output_dir = work_dir / f"ours_{count}"
        commands[count] = ours(jobs_dir, output_dir, args.workers)
        measure(output_dir, commands[count], keep=True)
        figures[f"index of {count:,} jobs, ms/job"] = []
    for count, words in list(commands.items()) * args.rounds:
        result = run(f"index of {count:,} jobs", *words)
        if f" 0 written, {count:,} up to date" not in result.text:
            raise BenchmarkError(f"{SCRIPT.name}: not only the index was written:\n{result.text}")
        figures[f"index of {count:,} jobs, ms/job"].append(1e3 * result.seconds / count)
    return pace(output_dir / "images") | figures


def benchmark(args: argparse.Namespace, work_dir: Path) -> str:
    """Measure everything in a temporary folder; return the table."""
    jobs = find_jobs(args, work_dir)
    found, speed, memory = warm(args, work_dir, jobs)
    sections = {f"warm page cache, {args.jobs} jobs": speed, "memory": memory}
    if figures := cold(args, work_dir, jobs):
        sections[f"cold page cache, {args.cold_jobs} jobs"] = figures
    sections[f"growth, {args.small_jobs:,} jobs of 64 x 64 pixels"] = growth(args, work_dir)
    head = [
        f"{SCRIPT.name}: jobs of {found}",
        f"workers {args.workers}, processors {len(os.sched_getaffinity(0))}, rounds {args.rounds}",
    ]
    return table(head, sections)


def table(head: Sequence[str], sections: dict[str, Figures]) -> str:
    """Set figures out in lines: median, and least and most where there are several."""
    lines = [*head, f"{'':36}{'median':>10}{'min':>10}{'max':>10}"]
    for title, figures in sections.items():
        lines.append(title)
        for what, values in figures.items():
            spread = (min(values), max(values)) if len(values) > 1 else ()
            cells = "".join(f"{value:10,.2f}" for value in (median(values), *spread))
            lines.append(f"  {what:34}{cells}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(description="Measure create_dataset.py: speed and memory.")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--jobs", type=int, default=16, help="jobs of the warm rounds")
    add("--cold_jobs", type=int, default=8, help="jobs of the cold rounds")
    add("--workers", type=int, default=2, help="worker processes of create_dataset.py")
    add("--rounds", type=int, default=5, help="rounds that count")
    add("--small_jobs", type=int, default=1000, help="jobs of the run that shows growth")
    add("--simulated", type=int, default=4, help="jobs to simulate; the others are the same again")
    add("--work_dir", type=Path, default=tempfile.gettempdir(), help="where to put temporary files")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--size", type=int, default=4089, help="pixels a side of the simulated jobs")
    add("--jobs_dir", type=Path, help="folder of jobs to use instead of simulated ones")
    args = parser.parse_args(argv)
    counts = dict.fromkeys(("jobs", "cold_jobs", "workers", "rounds", "simulated"), 1)
    for name, least in {**counts, "small_jobs": 20}.items():
        if getattr(args, name) < least:  # a tenth of the small jobs has to be two
            parser.error(f"--{name}: expected {least} or more, got {getattr(args, name)}")
    if not args.work_dir.is_dir():
        parser.error(f"--work_dir: no such folder: {args.work_dir}")
    return args


def run_benchmark(
    args: argparse.Namespace, benchmark: Callable[[argparse.Namespace, Path], str]
) -> int:
    """Print the table of a benchmark, made in a temporary folder, and return the exit code."""
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_benchmark(parse_args(argv), benchmark)


if __name__ == "__main__":
    sys.exit(main())
