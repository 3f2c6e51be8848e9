#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3",
#     "astropy>=7.0,<9",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Turn RAPID job folders into a dataset: one image tensor a job and one index of candidates.

Read: every folder `jid*` directly under the input folder, with a science, a reference, a difference
and a score image (FITS) and the candidate catalog `psfcat.csv`, whose finder columns may lie in
`diffimage_masked_psfcat_finder.txt`.

Written: `images/<jid>.npy`, float32 (H, W, 4), each channel ZScale-normalised to [0, 1], and
`master_index.csv`, a row per candidate with its label (1 real, 0 bogus). A tensor that is newer
than its images is kept, so that a second run does only what is missing.

    python create_dataset.py
    python create_dataset.py -i ./raw_data -o ./my_dataset --workers 8
    python create_dataset.py -i /shared/raw -o /shared/dataset --scheduler tcp://node1:8786

Exit codes: 0 all jobs are in the dataset; 1 a job was left out or the run failed (stderr says why);
2 wrong usage; 130 interrupted by Ctrl-C. A candidate without a position on its image is left out
and counted in the summary; that alone does not change the exit code.
"""

import _thread
import argparse
import csv
import errno
import gc
import gzip
import io
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

# One thread a worker is enough; only heeded before numpy loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

try:
    import fcntl
except ImportError:  # Windows cannot lock a folder
    fcntl = None

CHANNELS = {  # name: file name without suffix, in the order of the tensor's last axis
    "science": "bkg_subbed_science_image",
    "reference": "awaicgen_output_mosaic_image_resampled",
    "difference": "diffimage_masked",
    "score": "scorrimage_masked",
}
CHANNEL_NAMES = tuple(CHANNELS)
IMAGE_SUFFIXES = (".fits", ".fits.gz", ".fits.fz")  # in order of preference
CATALOG_NAME, FINDER_NAME = "psfcat.csv", "diffimage_masked_psfcat_finder.txt"
INDEX_NAME, IMAGES_DIR = "master_index.csv", "images"
INDEX_COLUMNS = tuple(
    "id jid x y sharpness roundness1 roundness2 npix peak flux mag daofind_mag flags match label"
    " image_filename".split()
)
# What the catalogs give; the other columns of the index are worked out here.
CATALOG_COLUMNS = tuple(c for c in INDEX_COLUMNS if c not in ("jid", "label", "image_filename"))
FINDER_COLUMNS = tuple(c for c in CATALOG_COLUMNS if c not in ("flags", "match"))
ALIASES = {  # names of a column in the catalogs, in order of preference, where there are several
    "x": ("x", "xcentroid", "x_centroid"),
    "y": ("y", "ycentroid", "y_centroid"),
    "npix": ("npix", "n_pixels"),
}
FIT_COLUMNS = {"x": "x_fit", "y": "y_fit"}  # stand in where there is no other position
EMPTY_CELLS = dict.fromkeys(("", "--", "NA", "null", "None"), "nan")
NO_MATCH = -1  # `match` of a candidate with no source within the match radius
# Of a FITS image whose pixels are float32 as they stand; cards that change that; and that recur.
PLAIN_CARDS = {b"SIMPLE": b"T", b"BITPIX": b"-32", b"NAXIS": b"2"}
SPECIAL_CARDS = (b"BSCALE", b"BZERO", b"BLANK", b"PCOUNT", b"GCOUNT", b"GROUPS", b"HIERARCH")
COMMENT_CARDS = (b"", b"COMMENT", b"HISTORY", b"CONTINUE")
# How a tensor begins that numpy has written.
NPY_HEADER = (
    rb"(?s).NUMPY.{4}{'descr': '<f4', 'fortran_order': False, 'shape': \((\d+), (\d+), 4\), } *\n"
)
NPY_HEADER_BYTES = 128
SAMPLE_SIZE = 1000  # pixels of an image that ZScale looks at
STRIP_ROWS = 32  # rows in memory at a time: few enough for the processor's cache
WRITE_BYTES = 1 << 18  # for larger writes, Linux looks for larger pieces of memory, which is slower
START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # forked, workers import nothing anew
MAX_WORKERS = 61 if sys.platform == "win32" else 1024  # Windows waits for no more
AHEAD = 4  # jobs in flight a worker: enough that none waits, few enough to hold their rows
PROGRESS_JOBS = 100  # a line after so many, where stderr is no terminal
CONNECT_S = 12  # patience with a Dask scheduler, and then with its first worker, seconds
TEMPORARY = ".create_dataset-"  # begins the name of a file that is not whole yet

LOG = logging.getLogger("create_dataset")
Submit = Callable[..., Future]  # hands a function and its arguments to a worker
Table = dict[str, np.ndarray]  # catalog columns, float64 (N,), NaN where a cell is empty


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


class OutputError(Exception):
    """The same, where it ends the run and not only one job: the output cannot be written."""


@dataclass(frozen=True)
class Image:
    """One FITS image: where its pixels lie in the file, or the pixels, float32 (H, W)."""

    path: Path
    shape: tuple[int, int]  # height and width, pixels
    offset: int = 0  # of big-endian float32 pixels, bytes
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class Channel:
    """An image, its limits, and each strip's masked pixels: uint32 positions in the flat strip."""

    image: Image
    masked: list[np.ndarray]
    vmin: float
    vmax: float


@dataclass(frozen=True)
class JobResult:
    """Result of one job: its lines of the index, or the reason why it was left out."""

    jid: str
    rows: str | None
    counts: Counter[str]  # what the job adds to the summary
    reason: str = ""


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line, or its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts jid2 before jid10, and settles jid1 against jid01 by the text."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdecimal() else part for part in parts], name


def find_jobs(input_dir: Path) -> list[str]:
    """Name the job folders directly under `input_dir`, in natural order."""
    if not input_dir.is_dir():
        raise DatasetError(f"{input_dir}: no such folder; give the one that holds jid* with -i")
    with os.scandir(input_dir) as entries:
        jobs = [entry.name for entry in entries if entry.name.startswith("jid") and entry.is_dir()]
    if not jobs:
        raise DatasetError(f"{input_dir}: no job folders in it; folders named jid* were expected")
    return sorted(jobs, key=natural_key)


def find_image(job_dir: Path, stem: str) -> Path:
    """Return the image file of `stem`, or the compressed file that stands in for it."""
    for suffix in IMAGE_SUFFIXES:
        path = job_dir / f"{stem}{suffix}"
        if path.exists():
            return path
    raise DatasetError(f"{job_dir}: no {stem}.fits (nor .fits.gz, nor .fits.fz)")


def find_plain(path: Path) -> Image | None:
    """Find the pixels of a FITS file that begins with an image of unscaled float32, else None.

    RAPID writes such files, and so astropy, as long to import as a job takes, is rarely needed.
    """
    cards = {}
    with path.open("rb") as handle:
        while (card := handle.read(80)) and not card.startswith(b"END     "):
            keyword = card[:8].rstrip().upper()
            twice = keyword in cards and keyword not in COMMENT_CARDS
            if twice or keyword in SPECIAL_CARDS or not (cards or keyword == b"SIMPLE"):
                return None
            cards[keyword] = card[9:].partition(b"/")[0].strip()
        offset, size = -(-handle.tell() // 2880) * 2880, os.fstat(handle.fileno()).st_size
    sides = [cards.get(keyword, b"") for keyword in (b"NAXIS2", b"NAXIS1")]
    if not PLAIN_CARDS.items() <= cards.items() or not all(
        re.fullmatch(rb"\d{1,9}", x) for x in sides
    ):
        return None
    height, width = map(int, sides)
    whole = 0 < 4 * height * width <= size - offset
    return Image(path, (height, width), offset) if whole else None


def read_image(path: Path) -> Image:
    """Read the first HDU that holds 2-D pixels in a FITS file, plain, gzipped or tile-compressed.

    Raises DatasetError where the file is damaged, cut short, or holds no 2-D image.
    """
    from astropy.io import fits
    from astropy.utils.exceptions import AstropyUserWarning

    try:
        # The gzip module reads to the end, where the checksum is; astropy stops at the last pixel.
        source = io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        with warnings.catch_warnings(), np.errstate(over="ignore"):  # beyond float32: masked
            warnings.simplefilter("ignore", AstropyUserWarning)
            warnings.filterwarnings("error", "File may have been truncated")
            with fits.open(source, memmap=False, uint=False) as hdus:  # uint ignores BLANK
                for hdu in hdus:
                    if hdu.is_image and len(hdu.shape) == 2 and all(hdu.shape):
                        return Image(path, hdu.shape, pixels=np.array(hdu.data, dtype=np.float32))
    except Exception as error:  # all of it: astropy's error for a damaged tile has no public name
        raise DatasetError(f"{path}: not a readable FITS image: {one_line(error)}") from error
    raise DatasetError(f"{path}: no HDU with a 2-D image in it")


def strips(image: Image) -> Iterator[np.ndarray]:
    """Yield an image STRIP_ROWS rows at a time, float32 (rows, W); the next may overwrite the last.

    Files are read, not mapped: if one shrank or a disk failed, a mapping would end the process.
    """
    height, width = image.shape
    if image.pixels is not None:
        yield from np.split(image.pixels, range(STRIP_ROWS, height, STRIP_ROWS))
        return
    buffer = np.empty((STRIP_ROWS, width), ">f4")
    try:
        with image.path.open("rb") as handle:
            handle.seek(image.offset)
            for start in range(0, height, STRIP_ROWS):
                strip = buffer[: height - start]
                if handle.readinto(strip) != strip.nbytes:
                    raise DatasetError(f"{image.path}: became shorter while it was read")
                yield strip
    except OSError as error:
        raise DatasetError(f"{image.path}: cannot be read: {one_line(error)}") from error


def finite_sample(image: Image, masked: Sequence[np.ndarray]) -> np.ndarray:
    """Return every n-th finite pixel, SAMPLE_SIZE or fewer, sorted; `masked` is that of Channel."""
    height, width = image.shape
    parts = (part.astype(np.int64) + i * STRIP_ROWS * width for i, part in enumerate(masked))
    gaps = np.concatenate(list(parts))
    count = height * width - gaps.size
    rank = np.arange(0, count, max(1, count // SAMPLE_SIZE))[:SAMPLE_SIZE]
    # gaps[i] - i finite pixels lie before gap i, which shifts all that are behind it.
    gaps -= np.arange(gaps.size)
    position = rank + np.searchsorted(gaps, rank, side="right")
    if image.pixels is not None:
        return np.sort(image.pixels.ravel()[position])
    cells = bytearray()
    with image.path.open("rb", buffering=0) as handle:
        for number in position.tolist():
            handle.seek(image.offset + 4 * number)
            cells += handle.read(4)
    if len(cells) < 4 * position.size:
        raise DatasetError(f"{image.path}: became shorter while it was read")
    return np.sort(np.frombuffer(cells, ">f4").astype(np.float32))


def zscale(sample: np.ndarray) -> tuple[float, float]:
    """Return IRAF's zscale limits of a sorted sample, float32 (N,), N > 0.

    To the last bit those of `astropy.visualization.ZScaleInterval` at its defaults: a line through
    the sorted values, without those off it and their neighbours, is steepened fourfold and cut off
    at the extremes.
    """
    rank, rejected = np.arange(sample.size), np.zeros(sample.size, bool)
    neighbours = np.ones(max(1, int(sample.size * 0.01)), bool)
    least, before, kept = max(5, int(sample.size * 0.5)), sample.size + 1, sample.size
    for _ in range(5):
        if not least <= kept < before:
            break
        slope, start = np.polyfit(rank, sample, deg=1, w=(~rejected).astype(int))
        residual = sample - (slope * rank + start)
        rejected |= np.abs(residual) > 2.5 * residual[~rejected].std()
        rejected = np.convolve(rejected, neighbours, mode="same")
        before, kept = kept, np.sum(~rejected)
    vmin, vmax = sample[0], sample[-1]
    if kept >= least:
        slope, middle, median = slope / 0.25, (sample.size - 1) // 2, np.median(sample)
        vmin = max(vmin, median - (middle - 1) * slope)
        vmax = min(vmax, median + (sample.size - middle) * slope)
    return float(vmin), float(vmax)


def find_limits(image: Image, masked: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the zscale limits vmin < vmax of an image; `masked` is that of Channel.

    Where the two coincide, the finite minimum and maximum stand in. Raises DatasetError where those
    coincide too, or where float32 cannot hold their distance.
    """
    sample = finite_sample(image, masked)
    if not sample.size:
        raise DatasetError(f"{image.path}: no finite pixel")
    vmin, vmax = zscale(sample)
    if not vmin < vmax:
        finite = (strip[np.isfinite(strip)] for strip in strips(image))
        ranges = [(part.min(), part.max()) for part in finite if part.size]
        vmin, vmax = float(min(ranges)[0]), float(max(high for _, high in ranges))
    with np.errstate(over="ignore", under="ignore"):
        if not 0 < np.float32(vmax - vmin) < np.inf:
            raise DatasetError(f"{image.path}: cannot be scaled between {vmin:g} and {vmax:g}")
    return vmin, vmax


def open_channels(paths: Sequence[Path]) -> list[Channel]:
    """Open a job's four images, in the order of CHANNEL_NAMES, and find what scales them.

    Raises DatasetError where an image cannot be read or scaled, or the shapes differ.
    """
    images = [find_plain(path) or read_image(path) for path in paths]
    channels, shape = [], images[0].shape
    for image in images:
        if image.shape != shape:
            raise DatasetError(f"{image.path}: {image.shape} pixels; {paths[0].name} has {shape}")
        masked = [np.flatnonzero(~np.isfinite(strip)).astype(np.uint32) for strip in strips(image)]
        channels.append(Channel(image, masked, *find_limits(image, masked)))
    return channels


def tensor_strips(channels: Sequence[Channel]) -> Iterator[np.ndarray]:
    """Yield a job's tensor, float32 (rows, W, 4) in [0, 1], finite; a strip overwrites the last.

    A masked pixel gets what zero flux, the sky, gets.
    """
    width, count = channels[0].image.shape[1], len(channels)
    vmin = np.tile(np.array([c.vmin for c in channels], np.float32), width)
    distance = np.tile(np.array([c.vmax - c.vmin for c in channels], np.float32), width)
    buffer = np.empty((STRIP_ROWS, width, count), "<f4")
    planes = [zip(strips(c.image), c.masked, strict=True) for c in channels]
    for parts in zip(*planes, strict=True):
        strip = buffer[: len(parts[0][0])]
        pixels, rows = strip.reshape(-1, count), strip.reshape(len(strip), -1)
        for number, (plane, masked) in enumerate(parts):
            pixels[:, number] = plane.ravel()
            pixels[masked, number] = 0
        with np.errstate(over="ignore"):  # infinity clips to 1
            rows -= vmin
            rows /= distance
        np.clip(rows, 0, 1, out=rows)
        if not rows.min() >= 0:  # NaN fails; nothing else can leave [0, 1]
            raise DatasetError(f"{channels[0].image.path.parent}: NaN in the tensor; please report")
        yield strip


def read_table(path: Path) -> Table:
    """Read those of CATALOG_COLUMNS and FIT_COLUMNS that a catalog has, under whatever alias.

    Cells are separated by blanks in *.txt, else by commas. Raises DatasetError where the file is
    missing or damaged, a column or an id occurs twice, or a cell is not a number.
    """
    try:
        # Known columns are ASCII; what else there is may be Latin-1.
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as handle:
            cells = csv.reader(handle, skipinitialspace=True, strict=True)
            cells = map(str.split, handle) if path.suffix == ".txt" else cells
            rows = [row for row in cells if row not in ([], [""])]  # blank lines
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DatasetError(f"{path}: not a readable catalog: {reason}") from error
    header, table = [name.strip() for name in rows[0]] if rows else [], {}
    for number, row in enumerate(rows):
        if len(row) != len(header):
            problem = f"row {number} has {len(row)} cells, and the header {len(header)}"
            raise DatasetError(f"{path}: rows of different length: {problem}")
    for column in (*CATALOG_COLUMNS, *FIT_COLUMNS.values()):
        name = next((name for name in ALIASES.get(column, (column,)) if name in header), None)
        if header.count(name) > 1:
            raise DatasetError(f"{path}: column {name} occurs more than once")
        if name is not None:
            position = header.index(name)
            cells = [row[position] for row in rows[1:]]
            table[column] = to_float(cells, f"{path}: column '{name}'")
    if not table:
        raise DatasetError(f"{path}: the header has no column of a catalog: {header}"[:300])
    ids, counts = np.unique(table.get("id", ()), return_counts=True, equal_nan=False)
    if (counts > 1).any():  # (jid, id) is the key of the index
        raise DatasetError(f"{path}: id {ids[counts > 1][0]:.17g} occurs more than once")
    return table


def to_float(cells: Sequence[str], where: str) -> np.ndarray:
    """Return a catalog column as float64 (N,), or say which cell is not a number."""
    text = "".join(cells)
    with suppress(ValueError):
        if text.isascii() and "_" not in text:  # float() would take both
            return np.array([float(EMPTY_CELLS.get(cell, cell)) for cell in cells])
    for row, cell in enumerate(cells, 1):
        try:
            wrong = float(EMPTY_CELLS.get(cell, cell)) and ("_" in cell or not cell.isascii())
        except ValueError:
            wrong = True
        if wrong:
            raise DatasetError(f"{where} holds {cell[:80]!r} in row {row}; a number was expected")
    raise AssertionError(where)


def join_finder(catalog: Table, finder: Table, job_dir: Path) -> Table:
    """Add to psfcat.csv's columns those that only the finder's table has, one to one on `id`.

    The rows stay those of `catalog`, in its order. Raises DatasetError where the ids do not match
    one to one, or where `catalog` has no ids and the row counts differ.
    """
    sizes = [len(next(iter(table.values()))) for table in (catalog, finder)]
    both = f"{job_dir}: {CATALOG_NAME} ({sizes[0]} rows) and {FINDER_NAME} ({sizes[1]} rows)"
    if "id" not in catalog and sizes[0] == sizes[1]:
        return finder | catalog
    if "id" not in catalog or "id" not in finder:
        raise DatasetError(f"{both} cannot be joined: both need the column id")
    ids, finder_ids = catalog["id"], finder["id"]
    alone = np.setxor1d(ids[~np.isnan(ids)], finder_ids[~np.isnan(finder_ids)])
    empty = np.isnan(ids).sum() + np.isnan(finder_ids).sum()
    if alone.size or empty:
        some = f", such as {alone[0]:.17g}" if alone.size else ""
        found = f"{alone.size} ids occur in only one of them{some}, and {empty} ids are empty"
        raise DatasetError(f"{both} do not match one to one: {found}")
    order = np.argsort(finder_ids)[np.searchsorted(np.sort(finder_ids), ids)]
    return {column: values[order] for column, values in finder.items()} | catalog


def read_catalog(job_dir: Path) -> Table:
    """Read a job's candidates from psfcat.csv and, where that lacks columns, the finder's table.

    Those of CATALOG_COLUMNS that are there come back, in catalog order; `x`, `y` and `match` always
    are, and `match` is finite. Raises DatasetError where a catalog is missing or damaged, the two
    do not join, or positions or labels are missing.
    """
    path, finder_path = job_dir / CATALOG_NAME, job_dir / FINDER_NAME
    catalog = read_table(path)
    if "match" not in catalog:
        raise DatasetError(f"{path}: no column match, so that no candidate can be labelled")
    unknown = ~np.isfinite(catalog["match"])
    if unknown.any():
        found = f"{unknown.sum()} of {unknown.size} rows"
        raise DatasetError(f"{path}: match is empty or infinite in {found}")
    if not set(FINDER_COLUMNS) <= set(catalog) and finder_path.exists():
        catalog = join_finder(catalog, read_table(finder_path), job_dir)
    for axis, fit in FIT_COLUMNS.items():
        fitted = catalog.pop(fit, None)
        if catalog.setdefault(axis, fitted) is None:
            names = ", ".join((*ALIASES[axis], fit))
            raise DatasetError(f"{path}: no column {names}, here or in {FINDER_NAME}")
    return catalog


def index_rows(catalog: Table, jid: str, shape: tuple[int, int]) -> tuple[str, Counter[str]]:
    """Make the lines of a job in the index, from its catalog and its images' height and width.

    A cell is empty where the catalog has no value, and so is `mag` where the flux is not positive.
    The counts are of candidates by label, of those left out, and of columns that are missing.
    """
    table = dict.fromkeys(CATALOG_COLUMNS, np.full(catalog["match"].size, np.nan)) | catalog
    table["mag"] = np.where(table["flux"] <= 0, np.nan, table["mag"])
    # The nearest pixel counts: pixel i spans [i - 0.5, i + 0.5).
    column, row = (np.floor(table[axis] + 0.5) for axis in "xy")
    on_image = (column >= 0) & (column < shape[1]) & (row >= 0) & (row < shape[0])
    has_position = np.isfinite(column) & np.isfinite(row)
    real = table["match"][on_image] != NO_MATCH
    counts = Counter({f"lacks {column}": 1 for column in CATALOG_COLUMNS if column not in catalog})
    counts["no position"] = int((~has_position).sum())
    counts["off the image"] = int((has_position & ~on_image).sum())
    counts["real"], counts["bogus"] = int(real.sum()), int((~real).sum())
    texts = {"jid": [jid] * real.size, "label": ["01"[label] for label in real.tolist()]}
    texts["image_filename"] = [f"{IMAGES_DIR}/{jid}.npy"] * real.size
    for column in CATALOG_COLUMNS:
        values = table[column][on_image].tolist()
        texts[column] = ["" if value != value else repr(value) for value in values]  # NaN
    rows = zip(*(texts[column] for column in INDEX_COLUMNS), strict=True)
    return "".join(",".join(row) + "\n" for row in rows), counts


@contextmanager
def atomic_write(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """Yield a file beside `path` that takes its name once it is written whole.

    Raises OutputError where it cannot be written, such as where `size` bytes do not fit.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.urandom(8).hex()}.tmp")
    try:
        try:
            with temporary.open("xb") as handle:
                yield handle
            temporary.replace(path)
        finally:
            with suppress(OSError):  # it has its name, or was never made
                temporary.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(path.parent).free
            needed = f"{size / 1e6:,.1f} MB are needed, " if size else ""
            reason += f": {needed}{free / 1e6:,.1f} MB are free"
        raise OutputError(f"{path}: cannot be written: {reason}") from error


def write_tensor(path: Path, channels: Sequence[Channel]) -> int:
    """Write a job's tensor as .npy, a strip at a time, and return the bytes written."""
    shape = (*channels[0].image.shape, len(channels))
    size = NPY_HEADER_BYTES + 4 * int(np.prod(shape))
    with atomic_write(path, size) as handle:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        for strip in tensor_strips(channels):
            pixels = strip.reshape(-1).view(np.uint8)
            for start in range(0, pixels.size, WRITE_BYTES):
                handle.write(pixels[start : start + WRITE_BYTES].data)
    return size


def current_shape(tensor_path: Path, image_paths: Iterable[Path]) -> tuple[int, int] | None:
    """Return height and width of a tensor that is whole and newer than its images, else None."""
    with suppress(OSError), tensor_path.open("rb") as handle:
        stat = os.fstat(handle.fileno())
        header = re.fullmatch(NPY_HEADER, handle.read(NPY_HEADER_BYTES))
        if header and stat.st_mtime_ns >= max(path.stat().st_mtime_ns for path in image_paths):
            height, width = map(int, header.groups())
            if stat.st_size == NPY_HEADER_BYTES + 16 * height * width:
                return height, width
    return None


def process_job(job_dir: Path, images_dir: Path, overwrite: bool) -> JobResult:
    """Write the tensor of one job, unless it is up to date, and return the job's index rows.

    A job that cannot be used is no error here: its result carries the reason. Raises OutputError
    where the tensor cannot be written.
    """
    jid, written = job_dir.name, Counter({"jobs up to date": 1})
    tensor_path = images_dir / f"{jid}.npy"
    try:
        if not jid.isprintable() or set(jid) & set('\\",') or len(os.fsencode(jid)) > 250:
            raise DatasetError("such a name cannot stand in the index; rename the folder")
        paths = [find_image(job_dir, stem) for stem in CHANNELS.values()]
        catalog = read_catalog(job_dir)
        shape = None if overwrite else current_shape(tensor_path, paths)
        if shape is None:
            channels = open_channels(paths)
            shape = channels[0].image.shape
            written = Counter({"jobs written": 1, "bytes": write_tensor(tensor_path, channels)})
        rows, counts = index_rows(catalog, jid, shape)
    except (DatasetError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        return JobResult(jid, None, Counter({"jobs left out": 1}), one_line(error))
    return JobResult(jid, rows, counts + written)


def set_up_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


@contextmanager
def open_executor(workers: int, scheduler: str | None) -> Iterator[tuple[Submit, int]]:
    """Yield what hands jobs to workers, and their number: processes here, or those of Dask.

    Raises DatasetError where Dask is not installed or does not answer.
    """
    if scheduler is None:
        gc.freeze()  # what is imported stays: no worker has to search it for garbage
        context = multiprocessing.get_context(START_METHOD)
        on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it
        try:
            with ProcessPoolExecutor(workers, context, set_up_worker) as executor:
                executor.submit(int).result()  # starts them
                signal.signal(signal.SIGINT, on_ctrl_c)
                yield executor.submit, workers
        finally:
            for worker in multiprocessing.active_children():  # of a pool that broke: it waits
                worker.kill()
        return
    try:
        from distributed import Client, KilledWorker

        for name in ("asyncio", "distributed", "distributed.client", "tornado.application"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # they log tracebacks at a Ctrl-C
        client = Client(scheduler, timeout=CONNECT_S)
        client.wait_for_workers(1, timeout=CONNECT_S)
    except ImportError as error:
        raise DatasetError("--scheduler needs Dask: pip install distributed") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{scheduler}: no Dask scheduler with workers answers") from error
    try:
        with client:  # and not its get_executor(), which waits for ever where the connection breaks
            yield partial(client.submit, pure=False), sum(client.nthreads().values())
    except KilledWorker as error:
        raise DatasetError(f"{scheduler}: workers died at one job: {one_line(error)}") from error


def run_jobs(
    submit: Submit, tasks: Iterable[tuple[Path, Path, bool]], ahead: int
) -> Iterator[JobResult]:
    """Yield the results of `process_job` in the order of its tasks, `ahead` of them in flight."""
    pending = deque()
    try:
        for task in tasks:
            pending.append(submit(process_job, *task))
            if len(pending) == ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except (BrokenExecutor, CancelledError, OSError) as error:
        raise DatasetError(
            "a worker died (killed, or out of memory?) or was lost; finished tensors are kept, and"
            f" the same command goes on from there: {one_line(error)}"
        ) from error
    finally:
        for future in pending:
            future.cancel()


def show_progress(results: Iterable[JobResult], total: int) -> Iterator[JobResult]:
    """Pass results on, with a bar where stderr is a terminal, else a line every PROGRESS_JOBS."""
    done, start, bar = 0, time.monotonic(), bool(sys.stderr) and sys.stderr.isatty()
    with ExitStack() as stack:
        if bar:
            from tqdm import tqdm  # 30 ms to import, which a run without a terminal saves
            from tqdm.contrib.logging import tqdm_logging_redirect

            tqdm.monitor_interval = 0  # no thread that the fork of the workers would meet
            bars = tqdm_logging_redirect(results, total=total, unit="job")
            results = stack.enter_context(bars)
        try:
            for done, result in enumerate(results, 1):
                yield result
                if done % PROGRESS_JOBS == 0 and not bar:
                    rate = done / (time.monotonic() - start)
                    left = (total - done) / rate / 60
                    LOG.info(
                        f"{done:,} of {total:,} jobs, {rate:.1f} a second, {left:.0f} min left"
                    )
        finally:
            if done < total:
                LOG.warning(f"stopped after {done:,} of {total:,} jobs; those begun are finished")


def write_index(results: Iterable[JobResult], output_dir: Path) -> tuple[Counter[str], set[str]]:
    """Write the rows of all jobs as they come; return the summed counts and the jobs' names.

    Raises DatasetError where no job could be used or a tensor is not there; an index that was there
    stays as it was.
    """
    counts, used, index_path = Counter(), set(), output_dir / INDEX_NAME
    with atomic_write(index_path) as handle:
        handle.write((",".join(INDEX_COLUMNS) + "\n").encode())
        for result in results:
            counts.update(result.counts)
            if result.rows is None:
                jid = result.jid if result.jid.isprintable() else ascii(result.jid)
                LOG.error(f"{jid} left out: {result.reason}")
            else:
                used.add(result.jid)
                handle.write(result.rows.encode())
        if not used:
            raise DatasetError(f"none of the jobs could be used; {index_path} is not written")
        missing = used.difference(path.stem for path in (output_dir / IMAGES_DIR).glob("*.npy"))
        if missing:
            found = f"the tensors of {len(missing)} jobs are not there, such as {min(missing)}.npy"
            raise DatasetError(f"{output_dir}: {found}; do all workers share this folder?")
        counts["bytes"] += handle.tell()
    return counts, used


def remove_stale_tensors(images_dir: Path, used: set[str], jobs: Iterable[str]) -> None:
    """Remove the tensors of jobs that were left out; name those whose job folder is gone."""
    stale = {path.stem for path in images_dir.glob("*.npy")} - used
    for jid in stale.intersection(jobs):
        (images_dir / f"{jid}.npy").unlink()
    gone = sorted(stale.difference(jobs), key=natural_key)
    if gone:
        LOG.warning(
            f"{images_dir}: kept, though their jobs are not in the input folder; not in the index,"
            f" but the file set of croissant.json will include them: {', '.join(gone)}"
        )


@contextmanager
def sole_run(output_dir: Path) -> Iterator[None]:
    """Hold a folder against other runs, and clear it in the end of what is not whole.

    The lock ends with this process and its workers, however they end.
    """
    with ExitStack() as stack:
        if fcntl:
            folder = os.open(output_dir, os.O_RDONLY)
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DatasetError(f"{output_dir}: another run is writing there") from error
        try:
            yield
        finally:
            for path in (*output_dir.glob(f"{TEMPORARY}*"), *output_dir.glob(f"*/{TEMPORARY}*")):
                path.unlink(missing_ok=True)


def make_folders(input_dir: Path, output_dir: Path) -> Path:
    """Make the folder of the tensors and return it; refuse an output inside of a job."""
    images_dir = output_dir / IMAGES_DIR
    for folder in images_dir.resolve().parents:
        if folder.parent == input_dir.resolve() and folder.name.startswith("jid"):
            raise DatasetError(f"{output_dir}: lies in a job folder, {folder}; choose another -o")
    try:
        images_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{images_dir}: cannot be made: {error.strerror}") from error
    return images_dir


def build_dataset(args: argparse.Namespace) -> Counter[str]:
    """Make the dataset of all jobs, or bring it up to date, and return what the summary counts."""
    input_dir, output_dir = args.input_dir, args.output_dir
    if args.scheduler:  # its workers run in other folders
        input_dir, output_dir = input_dir.absolute(), output_dir.absolute()
    jobs = find_jobs(input_dir)
    images_dir = make_folders(input_dir, output_dir)
    tasks = ((input_dir / jid, images_dir, args.overwrite) for jid in jobs)
    workers = min(args.workers, len(jobs))
    with sole_run(output_dir), open_executor(workers, args.scheduler) as (submit, slots):
        results = show_progress(run_jobs(submit, tasks, AHEAD * slots), len(jobs))
        counts, used = write_index(results, output_dir)
        remove_stale_tensors(images_dir, used, jobs)
    return counts


def summary(counts: Counter[str], index_path: Path, seconds: float) -> str:
    """Return the closing lines of a run."""
    real, bogus = counts["real"], counts["bogus"]
    percent = 100 / max(real + bogus, 1)
    return (
        f"{index_path}\n"
        f"  jobs         {counts['jobs written']:,} written, {counts['jobs up to date']:,} up to"
        f" date, {counts['jobs left out']:,} left out\n"
        f"  candidates   {real + bogus:,}: {real:,} real ({real * percent:.1f} %),"
        f" {bogus:,} bogus ({bogus * percent:.1f} %)\n"
        f"  dropped      {counts['no position']:,} without a position,"
        f" {counts['off the image']:,} off the image\n"
        f"  written      {counts['bytes'] / 1e6:,.1f} MB in {seconds:.1f} s"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("-i", "--input_dir", type=Path, default="./mini_dataset", help="folder of the jid* folders")
    add(
        "-o", "--output_dir", type=Path, default="./hackathon_dataset", help="folder of the dataset"
    )
    add("--overwrite", action="store_true", help="rebuild also the tensors that are up to date")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    default = str(min(cpus or 1, MAX_WORKERS))  # a text: argparse takes an equal number for unset
    add = parser.add_mutually_exclusive_group().add_argument
    add("--workers", type=int, default=default, help="processes on this machine")
    add("--scheduler", help="address of a Dask scheduler whose workers are to do it instead")
    args = parser.parse_args(argv)
    if not 1 <= args.workers <= MAX_WORKERS:
        parser.error(f"--workers: expected 1 to {MAX_WORKERS}, got {args.workers}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    LOG.setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that it cannot print
        sys.stdout.reconfigure(errors="backslashreplace")
    start = time.monotonic()
    try:
        counts = build_dataset(args)
        lacking = {c: counts[f"lacks {c}"] for c in CATALOG_COLUMNS if counts[f"lacks {c}"]}
        if lacking:
            names = ", ".join(f"{column} ({number} jobs)" for column, number in lacking.items())
            LOG.warning(f"columns missing from catalogs, left empty: {names}")
        print(summary(counts, args.output_dir / INDEX_NAME, time.monotonic() - start), flush=True)
    except (DatasetError, OutputError, OSError) as error:
        LOG.error(error)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted: finished tensors are kept; the same command goes on from there")
        return 130
    return 1 if counts["jobs left out"] else 0


def interrupt_once(*_: object) -> None:
    """Turn Ctrl-C into an exception, and ignore it from then on: a second would break the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    """Repeat a Ctrl-C that came within a destructor (Dask has some), where exceptions are lost."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
        return
    signal.signal(signal.SIGINT, interrupt_once)
    threading.Timer(0.1, _thread.interrupt_main).start()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt_once)
    sys.unraisablehook = interrupt_again
    sys.exit(main())
