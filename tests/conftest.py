"""Small job folders like RAPID's, written afresh for each test."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.utils import minversion
from astropy.wcs import WCS

import create_dataset
import generate_croissant
import test_croissant_dataset

# Workers of pytest-xdist and the processes that tests start share the cores: one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LIMIT_S = 40  # on every wait: many times what it takes
STEMS = tuple(stems[0] for stems in create_dataset.CHANNELS.values())
SHAPE = (72, 80)  # height and width of the images, pixels: not square, to tell x from y
CUT_HEADER = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': Fal".ljust(117) + b"\n"
DIFFERENCE = "zogy_diffimage_masked"  # RAPID's present name
DEGREES_PX = 0.11 / 3600
FINDER_COLUMNS = (
    "id xcentroid ycentroid sharpness roundness1 roundness2 npix peak flux mag daofind_mag".split()
)
STARTED: list[subprocess.Popen] = []  # processes of the running test
RAI = {  # what a user may say with --rai: two misnamed terms, and those that NeurIPS requires
    "rai:dataBiases": ["One filter.", "Bright sources only."],
    "rai:dataCollectionTimeframe": ["2026-10-01", "2026-10-31"],
    "rai:dataManipulationProtocol": "Nothing was left out.",
    "rai:dataSocialImpact": "None.",
    "rai:hasSyntheticData": True,
    "prov:wasDerivedFrom": "https://example.org/raw",
}


def make_images(seed: int = 0, shape: tuple[int, int] = SHAPE) -> dict[str, np.ndarray]:
    """Return four noise images, big-endian float32; the last two with a masked border."""
    rng = np.random.default_rng(seed)
    images = {stem: rng.normal(0, 3, shape).astype(">f4") for stem in STEMS}
    for stem in STEMS[2:]:
        images[stem][:, :5] = np.nan
        images[stem][-3:, :] = np.nan
    return images


def make_catalog(rows: int = 12, seed: int = 0) -> pd.DataFrame:
    """Return a catalog with all columns; every fourth candidate is real, the first on a corner."""
    rng = np.random.default_rng(seed)
    flux = rng.normal(0, 50, rows) * 10 ** rng.uniform(-2, 3, rows)
    positive = np.where(flux > 0, flux, np.nan)
    return pd.DataFrame(
        {
            "id": np.arange(1, rows + 1),
            "x": np.append(-0.4, rng.uniform(0, SHAPE[1] - 1, rows - 1)),
            "y": np.append(SHAPE[0] - 0.6, rng.uniform(0, SHAPE[0] - 1, rows - 1)),
            "sharpness": rng.uniform(0.2, 1, rows),
            "roundness1": rng.uniform(-1, 1, rows),
            "roundness2": rng.uniform(-1, 1, rows),
            "npix": 25,
            "peak": flux / 3,
            "flux": flux,
            "mag": -2.5 * np.log10(positive),
            "daofind_mag": rng.normal(-0.2, 0.2, rows),
            "flags": rng.integers(0, 8, rows),
            "match": np.where(np.arange(rows) % 4 == 3, np.arange(rows), -1),
        }
    )


def write_job(
    folder: Path,
    jid: str = "jid001",
    catalog: pd.DataFrame | None = None,
    images: dict[str, np.ndarray] | None = None,
    seed: int = 0,
) -> Path:
    """Write one job folder with everything in psfcat.csv and return its path."""
    job = folder / jid
    job.mkdir(parents=True)
    for stem, pixels in (make_images(seed) if images is None else images).items():
        fits.writeto(job / f"{stem}.fits", pixels)
    (make_catalog(seed=seed) if catalog is None else catalog).to_csv(
        job / "psfcat.csv", index=False
    )
    return job


def make_header(**cards: object) -> fits.Header:
    """Return a header whose reference pixel is near the middle of the image, north turned by 3."""
    wcs, turn = WCS(naxis=2), np.radians(3)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [150, 2]
    wcs.wcs.crpix = [SHAPE[1] / 2, SHAPE[0] / 2]
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    wcs.wcs.cd = DEGREES_PX * np.array([[-1], [1]]) * rotation
    return fits.Header([*wcs.to_header().cards, ("RADESYS", "ICRS"), *cards.items()])


def write_rapid_job(
    folder: Path,
    jid: str = "jid83",
    xy: object = ((10, 20), (11, 21), (60, 50)),
    header: fits.Header | None = None,
    finder_order: list[int] | None = None,
) -> Path:
    """Write a job under RAPID's present names; candidates are numbered from 1."""
    job = folder / jid
    job.mkdir(parents=True)
    stems = STEMS[0], f"{STEMS[1]}_gainmatched", DIFFERENCE, STEMS[3]
    for stem, pixels in zip(stems, make_images().values(), strict=True):
        fits.writeto(job / f"{stem}.fits", pixels, header)
    catalog = make_catalog(len(xy)).drop(columns=["match", "x", "y"])
    catalog["x_centroid"], catalog["y_centroid"] = np.reshape(xy, (-1, 2)).T
    fitted = catalog.assign(x_fit=catalog["x_centroid"] + 0.25, y_fit=catalog["y_centroid"])
    text = {"sep": " ", "index": False, "na_rep": "nan"}
    fitted[["id", "x_fit", "y_fit", "flags"]].to_csv(job / f"{DIFFERENCE}_psfcat.txt", **text)
    finder = catalog.drop(columns="flags").rename(columns={"npix": "n_pixels"})
    order = range(len(finder)) if finder_order is None else finder_order
    finder.iloc[list(order)].to_csv(job / f"{DIFFERENCE}_psfcat_finder.txt", **text)
    return job


def write_list(job: Path, sources: object, name: str = "Roman_inject.txt", first: int = 1) -> Path:
    """Write a list of injected sources at 0-based pixels; `first` is the number of the first."""
    lines = [f"{x + first!r} {y + first!r} 100.0" for x, y in np.reshape(sources, (-1, 2)).tolist()]
    path = job / name
    path.write_text("\n".join(["xpix ypix flux", *lines]) + "\n")
    return path


def write_truth(
    path: Path, pixels: object, header: fits.Header, names: tuple[str, str] = ("ra", "dec")
) -> Path:
    """Write a truth table of sources at 0-based pixels of an image."""
    ra, dec = WCS(header).all_pix2world(np.reshape(pixels, (-1, 2)), 0).T
    table = Table({"name": np.arange(len(ra)), names[0]: ra, names[1]: dec})
    table.write(path, overwrite=True, format={".vot": "votable"}.get(path.suffix))
    return path


def write_labelled_jobs(folder: Path) -> tuple[str | Path, ...]:
    """Write jobs with lists and a truth table; return the options that read them."""
    header, rng = make_header(), np.random.default_rng(0)
    for number in range(5):
        xy = rng.uniform(0, 70, (40, 2))
        job = write_rapid_job(folder / "raw", f"jid{number}", xy, header)
        write_list(job, xy[:9] + rng.normal(0, 1, (9, 2)))
    truth = write_truth(folder / "truth.csv", rng.uniform(0, 70, (40, 2)), header)
    return "-i", folder / "raw", "--truth", truth


def write_jobs(folder: Path, jobs: int, size: int) -> Path:
    """Write so many jobs of `size` pixels a side and return their folder."""
    for number in range(1, jobs + 1):
        images = make_images(number, (size, size))
        write_job(folder, f"jid{number:03d}", images=images, seed=number)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder and its subfolders."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wait_for(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait until a condition holds, or fail."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


class Finished(NamedTuple):
    """How a process ended and what it printed."""

    code: int
    out: str
    err: str


def run(script: ModuleType, *options: str | Path) -> int:
    """Run the command line of a script in this process and return its exit code."""
    return script.main([str(option) for option in options])


def train(dataset: Path, *options: str | Path) -> int:
    """Train on a dataset in this process, for one epoch by default, and return the exit code."""
    return run(test_croissant_dataset, "-d", dataset, "--epochs", "1", *options)


def start(
    script: str | Path,
    *options: str | Path,
    prefix: tuple[str, ...] = (),
    sigint: signal.Handlers = signal.SIG_DFL,
    **settings: object,
) -> subprocess.Popen:
    """Start a Python file (or `-c`, or `-m`, and what they need) as a process in its own group.

    It heeds Ctrl-C even if this process ignores it, as it does after `nohup ... &`. The end of the
    test ends it.
    """
    STARTED.append(
        subprocess.Popen(
            [*prefix, sys.executable, script, *options],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
        )
    )
    return STARTED[-1]


def finish(process: subprocess.Popen, limit_s: float = LIMIT_S) -> Finished:
    """Wait for a process; there may be no traceback in what it printed."""
    with process:
        try:
            out, err = process.communicate(timeout=limit_s)
        finally:
            process.kill()
    assert "Traceback" not in (err or "")
    return Finished(process.returncode, out or "", err or "")


@pytest.fixture(autouse=True)
def _end_processes() -> Iterator[None]:
    """Kill what a test started and left."""
    yield
    for process in STARTED:
        with process, suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    STARTED.clear()


def read_csv(path: Path, **options: object) -> pd.DataFrame:
    """Read a CSV file, floats to the last bit, which pandas does by itself from 3.1 on."""
    if not minversion(pd, "3.1"):
        options["float_precision"] = "round_trip"
    return pd.read_csv(path, **options)


def edit_index(dataset: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Rewrite the index of a dataset; `change` gets its table and returns the new one."""
    path = dataset / "master_index.csv"
    change(read_csv(path)).to_csv(path, index=False)


def state_of(path: Path) -> tuple[str, str]:
    """Return the state and the process group in a stat file of proc(5)."""
    state, _, group = path.read_text().rpartition(")")[2].split()[:3]
    return state, group


def describe(dataset: Path, *options: str) -> int:
    """Write croissant.json into a dataset and return the exit code."""
    paths = ["-c", str(dataset / "master_index.csv"), "-o", str(dataset / "croissant.json")]
    return generate_croissant.main([*paths, *options])


def description_of(dataset: Path) -> dict:
    """Return the croissant.json of a dataset."""
    return json.loads((dataset / "croissant.json").read_text(encoding="utf-8"))


def edit_json(dataset: Path, change: Callable[[dict], object]) -> None:
    """Change the croissant.json of a dataset."""
    path = dataset / "croissant.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def edit_and_hash(dataset: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change the index and its checksum, past what generate_croissant.py would refuse."""
    edit_index(dataset, change)
    digest = hashlib.sha256((dataset / "master_index.csv").read_bytes()).hexdigest()
    edit_json(dataset, lambda description: description["distribution"][0].update(sha256=digest))


def write_dataset(
    folder: Path,
    jobs: dict[str, list[int]],
    shape: tuple[int, int] = SHAPE,
    seed: int = 0,
    **columns: object,
) -> Path:
    """Write noise tensors, an index and croissant.json; of each job, the labels are given."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for jid in jobs:
        np.save(folder / "images" / f"{jid}.npy", rng.random((*shape, 4), np.float32))
    label = np.concatenate(list(jobs.values())).astype(int)
    names = list(create_dataset.INDEX_COLUMNS)
    index = pd.DataFrame(rng.normal(size=(len(label), len(names))), columns=names)
    index["id"] = np.arange(1, len(label) + 1)
    index["jid"] = np.repeat(list(jobs), [len(labels) for labels in jobs.values()])
    index["x"], index["y"] = rng.uniform(0, np.array(shape)[::-1] - 1, (len(label), 2)).T
    index["mag"] = index["mag"].where(rng.random(len(label)) < 0.7)
    index["label"], index["match"] = label, np.where(label, index["id"], -1)
    index["image_filename"] = "images/" + index["jid"] + ".npy"
    index.assign(**columns).to_csv(folder / "master_index.csv", index=False)
    assert describe(folder) == 0
    return folder


def read_index(dataset: Path) -> pd.DataFrame:
    """Return the index of a dataset as mlcroissant reads it, by default."""
    return pd.read_csv(dataset / "master_index.csv")


def write_two_tables(job: Path, catalog: pd.DataFrame, finder_order: list[int]) -> None:
    """Write a catalog in the layout of two files, the finder's rows in another order."""
    names = {"x": "xcentroid", "y": "ycentroid"}
    finder = catalog.rename(columns=names)[FINDER_COLUMNS].iloc[finder_order]
    finder.to_csv(job / "diffimage_masked_psfcat_finder.txt", sep=" ", index=False, na_rep="nan")
    fitted = catalog.assign(x_fit=catalog["x"] + 0.25, y_fit=catalog["y"] + 0.25)
    fitted[["id", "x_fit", "y_fit", "flags", "match"]].to_csv(job / "psfcat.csv", index=False)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder to copy from: `raw`, four small jobs, and their dataset in two states."""
    folder = tmp_path_factory.mktemp("originals")
    for number in range(1, 5):
        write_job(folder / "raw", f"jid{number:03d}", seed=number)
    assert run(create_dataset, "-i", folder / "raw", "-o", folder / "dataset") == 0
    described = shutil.copytree(folder / "dataset", folder / "described" / "dataset")
    assert describe(described) == 0
    return folder


@pytest.fixture
def raw(originals: Path, tmp_path: Path) -> Path:
    """Return a folder of four small jobs."""
    return shutil.copytree(originals / "raw", tmp_path / "raw")


@pytest.fixture
def dataset(raw: Path, originals: Path, tmp_path: Path) -> Path:
    """Return the dataset of these jobs, without a description."""
    return shutil.copytree(originals / "dataset", tmp_path / "dataset")


@pytest.fixture
def described(raw: Path, originals: Path, tmp_path: Path) -> Path:
    """Return the dataset of these jobs with its croissant.json."""
    return shutil.copytree(originals / "described" / "dataset", tmp_path / "dataset")


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset to train on, only to be read: 4 jobs of 24, every other candidate real."""
    folder = tmp_path_factory.mktemp("sample") / "dataset"
    return write_dataset(folder, {f"jid{number:03d}": [0, 1] * 12 for number in range(1, 5)})


@pytest.fixture
def sample_copy(sample: Path, tmp_path: Path) -> Path:
    """Return a copy of that dataset, to be changed."""
    return shutil.copytree(sample, tmp_path / "dataset")


@pytest.fixture
def quick_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longest in small runs: many resamples, and report.png."""
    monkeypatch.setattr(test_croissant_dataset, "RESAMPLES", 100)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_: None)


@pytest.fixture
def everything(tmp_path: Path) -> list[str]:
    """Return options with all that generate_croissant.py asks of the user."""
    rai = tmp_path / "rai.json"
    rai.write_text(json.dumps(RAI))
    return [
        *("--name", "Mini RAPID", "--description", "Jobs to try the tools on."),
        *("--license", "cc-by-4.0", "--url", "https://example.org/mini"),
        *("--creator", "Ada Lovelace,ada@example.org,https://example.org/ada"),
        *("--creator", "org:Example Observatory", "--publisher", "org:Archive,,https://a.org"),
        *("--version", "1.2.3", "--date_published", "2026-11-01"),
        *("--date_created", "2026-10-31T23:59:00Z", "--date_modified", "2026-11-02"),
        *("--cite_as", "@misc{mini, title={Mini}}", "--keywords", "transients, Roman"),
        *("--same_as", "https://doi.org/10.5281/zenodo.1", "--in_language", "en"),
        *("--sd_license", "CC0-1.0"),
        *("--rai", str(rai)),
    ]
