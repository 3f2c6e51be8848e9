#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3",
#     "pandas>=2.2.2,<4",
#     "astropy>=7.0,<9",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Turn RAPID job folders into a dataset: one image tensor per job and one index of candidates.

Reads every folder `jid*` directly under the input folder: a science, a reference, a difference and
a score image (FITS), and the catalogs of candidates. Writes `images/<jid>.npy`, float32 (H, W, 4),
each channel ZScale-normalised to [0, 1], and `master_index.csv`, one row per candidate with its
label (1 real, 0 bogus). Labels come from `--truth`, from the column `match` of the catalog, or from
the list of injected sources in the job folder. A second run does only what is missing or outdated.

    python create_dataset.py -i ./raw_data -o ./my_dataset
    python create_dataset.py -i ./20260520 -o ./my_dataset --truth supernovae.csv
    python create_dataset.py -i /shared/raw -o /shared/dataset --scheduler tcp://node1:8786

Exit codes: 0 every job is in the dataset; 1 a job was left out or the run failed (stderr says why);
2 wrong usage; 130 interrupted by Ctrl-C. Candidates off the image are dropped and counted.
"""

import argparse
import csv
import gc
import gzip
import io
import logging
import multiprocessing
import operator
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
from astropy.io import fits
from astropy.utils import minversion
from astropy.visualization import ManualInterval, ZScaleInterval
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

CHANNELS = {  # in the order of the tensor's last axis; the stems of the file names, best first
    "science": ("bkg_subbed_science_image",),
    "reference": (
        "awaicgen_output_mosaic_image_resampled",
        "awaicgen_output_mosaic_image_resampled_gainmatched",
    ),
    "difference": ("diffimage_masked", "zogy_diffimage_masked"),
    "score": ("scorrimage_masked",),
}
CHANNEL_NAMES = tuple(CHANNELS)
IMAGE_SUFFIXES = (".fits", ".fits.gz", ".fits.fz")  # in order of preference
CATALOG_NAMES = ("psfcat.csv", "{difference}_psfcat.txt")  # best first
FINDER_NAME = "{difference}_psfcat_finder.txt"  # {difference}: stem of the difference image in use
INJECTED_NAME = "*_inject.txt"
OTHER_PRODUCTS = re.compile(r"^\.|_negative|_uncert|_residual|sfft|naive")  # never read
INDEX_NAME, IMAGES_DIR = "master_index.csv", "images"
INDEX_COLUMNS = tuple(
    "id jid x y sharpness roundness1 roundness2 npix peak flux mag daofind_mag flags match label"
    " image_filename".split()
)
# The columns that come from the catalogs.
CATALOG_COLUMNS = tuple(c for c in INDEX_COLUMNS if c not in ("jid", "label", "image_filename"))
ALIASES = {  # names of a column in the catalogs, best first, if it has several
    "x": ("x", "xcentroid", "x_centroid"),
    "y": ("y", "ycentroid", "y_centroid"),
    "npix": ("npix", "n_pixels"),
}
NO_MATCH = -1  # `match` of a candidate that is no injected or simulated source
MAX_OFFSET_PX = 0.5  # between candidates and their sources, median; a larger one is a warning
CHUNK_PIXELS = 2**15  # of an image handled at a time: they fit the processor's cache
PROGRESS_JOBS = 100  # jobs between two lines of progress if stderr is not a terminal
CONNECT_S = 12  # seconds to wait for a Dask scheduler, and then for its first worker
TEMPORARY = ".create_dataset-"  # the names of unfinished files begin with it
GO_ON = "finished tensors are kept; run the same command again to go on"

LOG = logging.getLogger("create_dataset")


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


class OutputError(Exception):
    """The output cannot be written. This ends the run; a DatasetError only leaves out its job."""


@dataclass(frozen=True)
class JobResult:
    """What a job adds to the dataset, or why it is left out."""

    reason: str = ""  # empty, unless it is left out
    rows: str = ""  # of the index, CSV
    counts: Counter[str] = field(default_factory=Counter)
    offsets: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))  # see match_sources


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts jid2 before jid10, and jid01 before jid1."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdecimal() else part for part in parts], name


def find_jobs(input_dir: Path, wanted: list[str] | None) -> list[str]:
    """Return the names of the jobs, all or those wanted, in natural order.

    All jid* entries except plain files are jobs, even those that cannot be opened.
    """
    if not input_dir.is_dir():
        raise DatasetError(f"{input_dir}: no such folder; give the one that holds jid* with -i")
    entries = [entry for entry in input_dir.iterdir() if entry.name.startswith("jid")]
    # Path.is_file would raise an error for a link that leads into a closed folder.
    jobs = {entry.name for entry in entries if not os.path.isfile(entry)}  # noqa: PTH113
    if not jobs:
        expected = "give the one that holds the job folders with -i"
        raise DatasetError(f"{input_dir}: no folders jid* in it; {expected}")
    chosen = set() if wanted else jobs
    for name in wanted or ():
        if name.startswith("@"):
            chosen.update(Path(name[1:]).read_text(encoding="utf-8-sig", errors="replace").split())
        else:
            chosen.add(name.rstrip("/"))
    if chosen - jobs:
        names = ", ".join(sorted(chosen - jobs, key=natural_key))
        raise DatasetError(f"{input_dir}: no such job folders, as named by --jobs: {names}")
    return sorted(chosen, key=natural_key)


def find_images(job_dir: Path) -> list[Path]:
    """Return the paths of a job's images, in the order of CHANNELS."""
    present = {entry.name for entry in job_dir.iterdir()}
    paths = []
    for channel, stems in CHANNELS.items():
        names = [stem + suffix for stem in stems for suffix in IMAGE_SUFFIXES]
        found = [name for name in names if name in present]
        if not found:
            raise DatasetError(f"{job_dir}: no {channel} image; expected one of {', '.join(names)}")
        paths.append(job_dir / found[0])
    return paths


@contextmanager
def open_image(path: Path) -> Iterator[tuple[fits.ImageHDU, fits.HDUList]]:
    """Open a FITS file and yield its first HDU with a 2-D image; axes of length 1 do not count.

    Floating-point pixels are memory-mapped: they are read only when they are used. Raises
    DatasetError if the file is damaged or has no image.
    """
    try:
        with path.open("rb") as file:
            start = file.read(30)
        source = path
        if start.startswith(b"\x1f\x8b"):  # gzip, whatever the name; its checksum is at the end
            source = io.BytesIO(gzip.decompress(path.read_bytes()))
            start = source.getvalue()[:30]
        if not re.match(rb"SIMPLE  = +[TF]", start):
            raise DatasetError(f"{path}: not a FITS file: it begins with {start[:9]!r}")
        # Warnings are about missing padding, for one; uint=True would ignore BLANK.
        with warnings.catch_warnings(action="ignore"), fits.open(source, uint=False) as hdus:
            images = [hdu for hdu in hdus if hdu.is_image]
            for hdu in images:
                if 0 not in hdu.shape and len(image_shape(hdu)) == 2:
                    yield hdu, hdus
                    return
            found = ", ".join(f"{hdu.name} {hdu.shape}" for hdu in images)
            raise DatasetError(f"{path}: no HDU with a 2-D image; it has {found or 'no images'}")
    except DatasetError:
        raise
    except Exception as error:  # all: astropy's error for a damaged tile has no public name
        raise DatasetError(f"{path}: not a readable FITS image, or cut short: {error}") from error


def image_shape(hdu: fits.ImageHDU) -> tuple[int, ...]:
    """Return (H, W) of a 2-D image; axes of length 1 do not count."""
    return tuple(side for side in hdu.shape if side != 1)


def find_limits(image: np.ndarray, path: Path) -> ManualInterval:
    """Return the ZScale limits of an image's finite pixels, or their extremes if those coincide.

    Raises DatasetError if there is no finite pixel or the extremes coincide as well.
    """
    zscale, gaps = ZScaleInterval(), np.flatnonzero(~np.isfinite(image))
    count = image.size - gaps.size
    if not count:
        raise DatasetError(f"{path}: no finite pixel")
    # Of the finite pixels, those that ZScale would pick: every n-th, up to 1,000.
    rank = np.arange(0, count, max(1, count // zscale.n_samples))[: zscale.n_samples]
    # gaps[i] - i finite pixels lie before gap i; every gap shifts the pixels after it by one.
    place = rank + np.searchsorted(gaps - np.arange(gaps.size), rank, side="right")
    sample = image.ravel()[place].astype(np.result_type(image, np.float32))
    vmin, vmax = map(float, zscale.get_limits(sample))
    if not vmin < vmax:
        finite = image[np.isfinite(image)]
        vmin, vmax = float(finite.min()), float(finite.max())
    if not 0 < sample.dtype.type(vmax - vmin) < np.inf:
        raise DatasetError(f"{path}: cannot be scaled between {vmin:g} and {vmax:g}")
    return ManualInterval(vmin, vmax)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file, and rename it to `path` once it is complete."""
    temporary = path.with_name(f"{TEMPORARY}{os.urandom(8).hex()}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it was renamed, or never created
            temporary.unlink()


def last_change(image_paths: list[Path]) -> float:
    """Return when a job's images or their folder changed last, ns, or infinity if one is missing.

    The folder changes when an image appears or goes away. The time of the change itself counts,
    too, because copies often keep the modification time of the original.
    """
    try:
        stats = [path.stat() for path in (image_paths[0].parent, *image_paths)]
    except OSError:
        return float("inf")
    return max(max(status.st_mtime_ns, status.st_ctime_ns) for status in stats)


def write_tensor(path: Path, image_paths: list[Path]) -> tuple[int, int]:
    """Write a job's tensor, float32 (H, W, channels), finite and in [0, 1]; return (H, W).

    Raises DatasetError if an image cannot be read or scaled, or if their shapes differ.
    """
    before = last_change(image_paths)
    images = []
    for image_path in image_paths:
        with open_image(image_path) as (hdu, _), image_path.open("rb") as file:
            images.append(hdu.data.squeeze())
            if hasattr(os, "posix_fadvise"):  # to read ahead: a tenth faster from a cold disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    shape, size = images[0].shape, images[0].size
    if any(image.shape != shape for image in images):
        found = ", ".join(f"{p.name} {i.shape}" for p, i in zip(image_paths, images, strict=True))
        raise DatasetError(f"{image_paths[0].parent}: images of different shapes: {found}")
    header = {"descr": "<f4", "fortran_order": False, "shape": (*shape, len(images))}
    # Overflow does no harm: such limits are refused, and such pixels are clipped.
    with np.errstate(all="ignore"), atomic_write(path) as file:
        limits = list(map(find_limits, images, image_paths))
        np.lib.format.write_array_header_1_0(file, header)
        buffer = np.empty((CHUNK_PIXELS, len(images)), "<f4")
        for start in range(0, size, CHUNK_PIXELS):
            strip = buffer[: size - start]
            for channel, (image, scale) in enumerate(zip(images, limits, strict=True)):
                pixels = image.ravel()[start : start + CHUNK_PIXELS]
                flux = pixels.astype(np.result_type(pixels, np.float32))  # at least float32
                flux[~np.isfinite(flux)] = 0  # masked pixels get what zero flux, the sky, gets
                strip[:, channel] = scale(flux, out=flux)  # in place
            if not strip.min() >= 0:  # false for NaN, too
                raise DatasetError(f"{path}: NaN in the tensor; please report this as a bug")
            file.write(strip)
        if last_change(image_paths) != before:
            raise DatasetError(f"{image_paths[0].parent}: changed while it was read; run again")
    return shape


def current_shape(path: Path, image_paths: list[Path]) -> tuple[int, int] | None:
    """Return (H, W) of a tensor that is complete, of its images' shape and newer, else None."""
    try:
        tensor, status = np.lib.format.open_memmap(path, mode="r"), path.stat()
        if status.st_mtime_ns <= last_change(image_paths):
            return None
        with open_image(image_paths[0]) as (hdu, _):
            shape = image_shape(hdu)
    except Exception:  # numpy raises many kinds for a damaged file, which is rewritten
        return None
    layout = tensor.dtype.str, tensor.shape, tensor.flags.c_contiguous, tensor.nbytes
    expected = "<f4", (*shape, len(CHANNELS)), True, status.st_size - tensor.offset
    return shape if layout == expected else None


def refuse_cells(cells: pd.Series, wrong: pd.Series, where: str, expected: str) -> None:
    """Raise DatasetError if some cells of a column are wrong; it names the first of them."""
    if wrong.any():
        row, value = wrong.idxmax(), cells[wrong].iloc[0]
        found = "empty" if pd.isna(value) else repr(str(value)[:80])
        more = f" and {wrong.sum() - 1} more" if wrong.sum() > 1 else ""
        raise DatasetError(f"{where}: {found} in row {row + 1}{more}; expected {expected}")


def find_columns(header: list[str], columns: Iterable[str], path: Path) -> dict[str, int]:
    """Return the position of each given column that a header has.

    The case of letters, spaces and a leading # do not count. Raises DatasetError if the header has
    none of them, or one of them twice.
    """
    names, positions = [name.strip("# \t").lower() for name in header], {}
    for column in columns:
        name = next((name for name in ALIASES.get(column, [column]) if name in names), None)
        if names.count(name) > 1:
            raise DatasetError(f"{path}: column {name} occurs more than once")
        if name is not None:
            positions[column] = names.index(name)
    if not positions:
        raise DatasetError(f"{path}: the header has none of the expected columns: {names}"[:300])
    return positions


# pandas reads floats to the last bit by default from 3.1 on, and deprecates the option.
EXACT_FLOATS = {} if minversion(pd, "3.1") else {"float_precision": "round_trip"}


def read_table(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    """Read the given columns of a text table, as far as it has them: float64, NaN if empty.

    Cells are separated by blanks in *.txt, else by commas. Raises DatasetError if the file is
    missing or damaged, rows differ in length, a cell is not a number, or an id occurs twice.
    """
    try:
        # Known columns have ASCII names; other text may be in any encoding.
        text = path.read_text(encoding="utf-8-sig", errors="replace").lstrip("# \t\n")
        lines = [line for line in text.split("\n") if line.strip()]
        style = {"delimiter": ",", "skipinitialspace": True}
        if path.suffix == ".txt":
            lines = [" ".join(line.split()) for line in lines]
            style = {"delimiter": " ", "quoting": csv.QUOTE_NONE}
        rows = csv.reader(lines, strict=True, **style)
        header = next(rows, [])
        positions = find_columns(header, columns, path)
        for number, row in enumerate(rows, 1):  # pandas would fill up short rows
            if len(row) != len(header) or rows.line_num != number + 1:
                found = f"row {number} has {len(row)} cells, the header {len(header)}"
                raise DatasetError(f"{path}: {found}; or a quote is not closed")
        cells = pd.read_csv(
            io.StringIO("\n".join(lines)),
            **style,
            header=0,
            names=range(len(header)),
            usecols=positions.values(),
            na_values=('""', "--"),  # besides those of pandas: empty, nan, NA, null, None ...
            low_memory=False,
            **EXACT_FLOATS,
        )
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetError(f"{path}: not a readable catalog: {error}") from error
    table = {}
    for column, position in positions.items():
        values = cells[position]
        if values.dtype.kind not in "iuf":  # pandas took True, for one, for a boolean
            values = values.map(str, na_action="ignore")
        table[column] = pd.to_numeric(values, errors="coerce").astype(float)
        wrong = table[column].isna() & values.notna()
        refuse_cells(values, wrong, f"{path}: column {header[position].strip()}", "a number")
    if "id" in table:
        ids, where = table["id"], f"{path}: column id"
        refuse_cells(ids, ids.abs() >= 2**53, where, "less than 2**53, as it is kept as float64")
        refuse_cells(ids, ids.duplicated() & ids.notna(), where, "every id once")
    return pd.DataFrame(table)


def read_catalog(job_dir: Path, difference: str) -> pd.DataFrame:
    """Read a job's candidates from its catalog and, if that lacks columns, the finder's table.

    Two files are joined on `id`, one to one. `difference` is the stem of the difference image in
    use. Returns those of CATALOG_COLUMNS that are there, in catalog order; `x` and `y` always are.
    Raises DatasetError if a catalog or positions are missing or damaged.
    """
    columns = (*CATALOG_COLUMNS, "x_fit", "y_fit")
    names = [name.format(difference=difference) for name in (*CATALOG_NAMES, FINDER_NAME)]
    csv_path, txt_path, finder_path = (job_dir / name for name in names)
    path = csv_path if os.path.lexists(csv_path) else txt_path
    if not os.path.lexists(path):
        raise DatasetError(f"{job_dir}: no catalog; expected {names[0]} or {names[1]}")
    catalog = read_table(path, columns)
    complete = set(CATALOG_COLUMNS) - {"match"} <= set(catalog)
    if path == txt_path or (not complete and os.path.lexists(finder_path)):
        finder = read_table(finder_path, columns)
        both = f"{path} ({len(catalog)} rows) and {finder_path.name} ({len(finder)} rows)"
        if "id" not in catalog or "id" not in finder:
            raise DatasetError(f"{both} cannot be joined: both need the column id")
        alone = np.setxor1d(catalog["id"], finder["id"])  # an empty id equals no other
        if alone.size:
            found = f"{alone.size} ids are empty or in only one of them, such as {alone[0]:.17g}"
            raise DatasetError(f"{both} do not match one to one: {found}")
        new = finder[["id", *finder.columns.difference([*catalog.columns, "match"])]]
        catalog = catalog.merge(new, on="id", validate="one_to_one")
    for axis in "xy":
        position = catalog.get(axis, catalog.get(f"{axis}_fit"))
        if position is None:
            expected = ", ".join((*ALIASES[axis], f"{axis}_fit"))
            raise DatasetError(f"{path}: no column {expected}, here or in {finder_path.name}")
        catalog[axis] = position
    return catalog


def read_truth(path: Path) -> np.ndarray:
    """Read `ra` and `dec`, ICRS, of a table of sources: degrees, float64 (n, 2).

    A column that has another unit is converted. Raises DatasetError if astropy cannot read the
    table, or a row has no valid position.
    """
    from astropy.table import Table  # here, since it takes a while and most runs do not need it
    from astropy.units import Quantity

    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.filterwarnings("error", ".*multiple tables")  # which one is meant?
            table = Table.read(path)
        names = [name.strip("\ufeff ").lower() for name in table.colnames]
        if (names.count("ra"), names.count("dec")) != (1, 1):
            raise ValueError(f"expected one ra and one dec, it has {', '.join(table.colnames)}")
        columns = [table.columns[names.index(name)] for name in ("ra", "dec")]
        axes = [np.ma.filled(column.astype(float), np.nan) for column in columns]
        truth = np.transpose([Quantity(axis, axis.unit or "deg").to_value("deg") for axis in axes])
    except Exception as error:  # all: every format has its own errors
        reason = str(error).partition(", please")[0].partition("\n")[0]  # without astropy's advice
        expected = "not a table of sky positions (.csv, .ecsv, .fits, .vot, ...)"
        raise DatasetError(f"{path}: {expected}: {reason}") from error
    wrong = ~(np.isfinite(truth[:, 0]) & (np.abs(truth[:, 1]) <= 90))
    if wrong.any():
        raise DatasetError(f"{path}: no valid position in row {wrong.argmax() + 1}")
    if repeated := pd.DataFrame(truth).duplicated().sum():
        LOG.warning(f"{path}: {repeated} rows repeat a position; each counts as another source")
    return truth


def locate(truth: np.ndarray, path: Path) -> np.ndarray:
    """Return the pixel positions of sky positions in an image, (n, 2), NaN if far outside."""
    from astropy.coordinates import SkyCoord  # here, since most runs do not need it
    from astropy.wcs import WCS

    logging.getLogger("astropy").setLevel(logging.WARNING)  # a page for each job without "-SIP"
    sky, xy = SkyCoord(truth, unit="deg"), np.full(truth.shape, np.nan)
    with open_image(path) as (hdu, hdus):
        try:
            wcs = WCS(hdu.header, hdus, naxis=["celestial"])
            if not wcs.has_celestial:
                raise ValueError("it has no celestial axes")
            height, width = image_shape(hdu)
            corners = wcs.pixel_to_world([0, width, 0, width], [0, 0, height, height])
            centre = wcs.pixel_to_world(width / 2, height / 2)
            radius = 1.2 * centre.separation(corners).max()  # with a margin of 20 %
            if not radius > 0:  # false for NaN, too
                raise ValueError("a corner of the image has no sky position")
            near = sky.separation(centre) < radius
            xy[near] = np.transpose(wcs.world_to_pixel(sky[near]))
        except Exception as error:  # all: wcslib's errors have no common name
            raise DatasetError(f"{path}: no usable WCS, as --truth needs: {error}") from error
    return xy


def read_sources(
    job_dir: Path, difference_path: Path, catalog: pd.DataFrame, truth: np.ndarray | None
) -> np.ndarray | None:
    """Return the pixel positions of the known sources of a job, x and y, float64 (n, 2).

    First the injected ones, then those of the truth table; None if the catalog's own column `match`
    labels the candidates. Raises DatasetError if nothing does, or `match` is wrong.
    """
    if truth is None and "match" in catalog:
        match = catalog["match"]
        known = (match == NO_MATCH) | ((match >= 0) & (match % 1 == 0))
        expected = f"{NO_MATCH} for no source, or its number >= 0"
        refuse_cells(match, ~known, f"{job_dir}: column match of the catalog", expected)
        return None
    lists = [p for p in sorted(job_dir.glob(INJECTED_NAME)) if not OTHER_PRODUCTS.search(p.name)]
    if truth is None and not lists:
        ways = f"--truth, a column match in the catalog, or one {INJECTED_NAME}"
        raise DatasetError(f"{job_dir}: no labels; give {ways}")
    if len(lists) > 1:
        names = ", ".join(path.name for path in lists)
        raise DatasetError(f"{job_dir}: expected one list of injected sources, found {names}")
    injected = np.empty((0, 2))
    for path in lists:
        table = read_table(path, ("xpix", "ypix"))
        if len(table.columns) < 2:
            raise DatasetError(f"{path}: expected the columns xpix and ypix")
        injected = table.to_numpy() - 1  # 1 is the centre of the first pixel
    return injected if truth is None else np.vstack([injected, locate(truth, difference_path)])


def is_on_image(xy: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return which positions, (n, 2), have their nearest pixel on an image of (H, W), bool (n,)."""
    pixel = np.floor(xy + 0.5)  # pixel i spans [i - 0.5, i + 0.5)
    return ((pixel >= 0) & (pixel < shape[::-1])).all(axis=1)


def match_sources(
    xy: np.ndarray, ids: np.ndarray, sources: np.ndarray, radius_px: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pair candidates and sources, (n, 2), within a radius: one to one, the nearest first.

    Returns `match` of all candidates, and candidate minus source of each pair, (pairs, 2). Ties are
    broken by position, then by id, so that the order of rows does not matter. NaN matches nothing.
    """
    order = np.argsort(xy[:, 0])
    window_px = radius_px + 1  # with a margin, because sums are rounded
    low, high = (np.searchsorted(xy[order, 0], sources[:, 0] + w) for w in (-window_px, window_px))
    near = [order[start:end] for start, end in zip(low, high, strict=True)]  # each source in x
    candidate = np.concatenate([order[:0], *near])
    source = np.repeat(np.arange(len(sources)), high - low)
    distance = np.hypot(*(xy[candidate] - sources[source]).T)
    ties = ids[candidate], *xy[candidate].T, *sources[source].T
    match, paired = np.full(len(xy), float(NO_MATCH)), {}
    for pair in np.lexsort((*ties, distance)):
        row, number = candidate[pair], source[pair]
        if distance[pair] <= radius_px and match[row] == NO_MATCH and number not in paired:
            match[row], paired[number] = number, row
    pairs = np.array([*paired.items()], int).reshape(-1, 2)
    return match, xy[pairs[:, 1]] - sources[pairs[:, 0]]


def index_job(
    catalog: pd.DataFrame,
    sources: np.ndarray | None,
    jid: str,
    shape: tuple[int, int],
    radius_px: float,
    true_sources: int,
) -> JobResult:
    """Make a job's rows of the index from its catalog, its sources and the (H, W) of its images.

    The last `true_sources` of the sources are those of --truth. Counts candidates by label, those
    left out, missing columns, and the sources on the image.
    """
    xy = catalog[["x", "y"]].to_numpy()
    on_image, has_position = is_on_image(xy, shape), np.isfinite(xy).all(axis=1)
    rows, offsets = catalog[on_image].reindex(columns=INDEX_COLUMNS), np.empty((0, 2))
    counts = Counter({f"lacks {c}": 1 for c in CATALOG_COLUMNS if c not in (*catalog, "match")})
    if sources is not None:
        visible = is_on_image(sources, shape)
        counts["sources"] = int(visible.sum())
        counts["true sources"] = int(visible[len(sources) - true_sources :].sum())
        sources = np.where(visible[:, None], sources, np.nan)
        ids = rows["id"].to_numpy()
        rows["match"], offsets = match_sources(xy[on_image], ids, sources, radius_px)
    rows["jid"], rows["image_filename"] = jid, f"{IMAGES_DIR}/{jid}.npy"
    rows["label"] = (rows["match"] != NO_MATCH).astype(int)
    rows["mag"] = rows["mag"].mask(rows["flux"] <= 0)
    counts["no position"] = int((~has_position).sum())
    counts["off the image"] = int((has_position & ~on_image).sum())
    counts["real"] = int(rows["label"].sum())
    counts["bogus"] = len(rows) - counts["real"]
    # Converted to objects first, floats are written a third faster, with the same digits.
    text = rows.astype(object).to_csv(header=False, index=False, lineterminator="\n")
    return JobResult(rows=text, counts=counts, offsets=offsets)


def process_job(
    job_dir: Path, images_dir: Path, overwrite: bool, truth: np.ndarray | None, radius_px: float
) -> JobResult:
    """Write the tensor of one job, unless it is up to date, and make its rows of the index."""
    jid, path = job_dir.name, images_dir / f"{job_dir.name}.npy"
    try:
        if not jid.isprintable() or set(jid) & set('\\",') or len(os.fsencode(jid)) > 250:
            raise DatasetError("its name is too long or has odd characters; rename the folder")
        image_paths = find_images(job_dir)
        difference_path = image_paths[CHANNEL_NAMES.index("difference")]
        catalog = read_catalog(job_dir, difference_path.name.partition(".fits")[0])
        sources = read_sources(job_dir, difference_path, catalog, truth)
        shape = None if overwrite else current_shape(path, image_paths)
        done = {"jobs up to date": 1}
        if shape is None:
            shape = write_tensor(path, image_paths)
            done = {"jobs written": 1, "bytes": 4 * len(CHANNELS) * shape[0] * shape[1]}
        true_sources = 0 if truth is None else len(truth)
        result = index_job(catalog, sources, jid, shape, radius_px, true_sources)
    except (DatasetError, OSError, MemoryError) as error:
        return JobResult(reason=" ".join(str(error).split()) or type(error).__name__)
    origin = "--truth" if truth is not None else "match" if sources is None else INJECTED_NAME
    result.counts.update({**done, f"labelled by {origin}": 1})
    return result


def set_up_worker() -> None:
    """Leave Ctrl-C to the parent process, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def run_locally(work: partial, job_dirs: list[Path], workers: int) -> Iterator[JobResult]:
    """Yield the results of all jobs, in order, from processes on this machine."""
    if workers == 1:  # in this process: a pool needs /dev/shm, which some containers lack
        yield from map(work, job_dirs)
        return
    gc.freeze()  # workers need not search for garbage in what was imported
    done = 0
    try:
        with ProcessPoolExecutor(workers, initializer=set_up_worker) as pool:
            try:
                for result in pool.map(work, job_dirs):
                    yield result
                    done += 1
            except KeyboardInterrupt:  # a second Ctrl-C would leave workers hanging
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                raise
    except (BrokenExecutor, OSError, ValueError) as error:
        where = f"the workers failed at {job_dirs[done].name} or a later job"
        raise DatasetError(f"{where} ({error}); try --workers 1; {GO_ON}") from error


def run_on_dask(work: partial, job_dirs: list[Path], address: str) -> Iterator[JobResult]:
    """Yield the results of all jobs, in order, from the workers of a Dask scheduler."""
    try:
        from distributed import Client
    except ImportError as error:
        raise DatasetError("--scheduler needs Dask: pip install distributed") from error
    for name in ("asyncio", "distributed", "distributed.client", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log tracebacks at a Ctrl-C
    try:
        with Client(address, timeout=CONNECT_S) as client:
            client.wait_for_workers(1, timeout=CONNECT_S)
            work = client.scatter(work, broadcast=True)  # once, for --truth may be large
            for future in client.map(operator.call, [work] * len(job_dirs), job_dirs, pure=False):
                yield future.result()
                future.release()
    except OutputError:
        raise
    except Exception as error:  # all: what Dask and the network may raise has no common name
        lost = f"{address}: the Dask scheduler or its workers do not answer: {error}"
        raise DatasetError(f"{lost}; {GO_ON}") from error


def write_index(
    jobs: list[str], results: Iterator[JobResult], output_dir: Path
) -> dict[str, JobResult]:
    """Write the rows of all jobs as their results come; return the results of those in the index.

    Raises DatasetError if no job could be used or a tensor is missing; an earlier index then stays.
    """
    path, used = output_dir / INDEX_NAME, {}
    with atomic_write(path) as file, logging_redirect_tqdm():
        file.write((",".join(INDEX_COLUMNS) + "\n").encode())
        bar = tqdm(results, total=len(jobs), unit="job", disable=None if sys.stderr else True)
        for number, (jid, result) in enumerate(zip(jobs, bar, strict=True), 1):
            if result.reason:
                LOG.error(f"{jid if jid.isprintable() else ascii(jid)} left out: {result.reason}")
            else:
                tensor = output_dir / IMAGES_DIR / f"{jid}.npy"
                if not tensor.exists():
                    raise DatasetError(f"{tensor}: is not there; do all workers share this folder?")
                file.write(result.rows.encode())
                used[jid] = replace(result, rows="")  # all together may not fit into memory
            if number % PROGRESS_JOBS == 0 and bar.disable:
                LOG.info(f"{number:,} of {len(jobs):,} jobs")
        if not used:
            raise DatasetError(f"none of the jobs could be used; {path} is not written")
    return used


def remove_stale_tensors(images_dir: Path, used: Iterable[str], jobs: list[str]) -> None:
    """Remove the tensors of jobs that were left out; name those of jobs not in this run."""
    stale = {path.stem for path in images_dir.glob("*.npy")}.difference(used)
    for jid in stale.intersection(jobs):
        (images_dir / f"{jid}.npy").unlink()
    if others := sorted(stale.difference(jobs), key=natural_key):
        names = ", ".join(others[:5]) + ", ..." * (len(others) > 5)
        LOG.warning(
            f"{images_dir}: kept {len(others)} tensors of jobs that are not in this run; they are"
            f" not in the index, but the file set of croissant.json will include them: {names}"
        )


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs; remove unfinished files on exit."""
    with ExitStack() as stack:
        if fcntl:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DatasetError(f"{folder}: another run is writing there") from error
            except OSError as error:  # some network file systems have no locks
                reason = f"{folder}: cannot be locked ({error.strerror})"
                LOG.warning(f"{reason}; make sure that no other run writes there")
        try:
            yield
        finally:
            for path in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"*/{TEMPORARY}*")]:
                path.unlink(missing_ok=True)


def build_dataset(args: argparse.Namespace) -> tuple[dict[str, JobResult], int]:
    """Make or update the dataset; return the results of its jobs, and how many were left out."""
    # Absolute, because the workers of Dask run in other folders.
    input_dir, output_dir = args.input_dir.absolute(), args.output_dir.absolute()
    images_dir, jobs = output_dir / IMAGES_DIR, find_jobs(input_dir, args.jobs)
    work = partial(
        process_job,
        images_dir=images_dir,
        overwrite=args.overwrite,
        truth=read_truth(args.truth) if args.truth else None,
        radius_px=args.match_radius,
    )
    images_dir.mkdir(parents=True, exist_ok=True)
    job_dirs = [input_dir / jid for jid in jobs]
    if args.scheduler:
        results = run_on_dask(work, job_dirs, args.scheduler)
    else:
        results = run_locally(work, job_dirs, min(args.workers, len(jobs)))
    with exclusive_lock(output_dir), closing(results):
        used = write_index(jobs, results, output_dir)
        remove_stale_tensors(images_dir, used, jobs)
    return used, len(jobs) - len(used)


def warn_of_doubts(used: dict[str, JobResult], total: Counter[str], offset: np.ndarray) -> None:
    """Warn of columns that catalogs lack, and of labels that seem wrong."""
    lacking = [f"{c} ({total[f'lacks {c}']} jobs)" for c in CATALOG_COLUMNS if total[f"lacks {c}"]]
    if lacking:
        LOG.warning(f"columns missing from catalogs, left empty: {', '.join(lacking)}")
    if suspect := [jid for jid, job in used.items() if job.counts["real"] > job.counts["bogus"]]:
        found = f"more than half of the candidates are real in {len(suspect)} of {len(used)} jobs"
        LOG.warning(f"{found}, such as {suspect[0]}; check that match is {NO_MATCH} for no source")
    by_position = {jid: job for jid, job in used.items() if not job.counts["labelled by match"]}
    if barren := [jid for jid, job in by_position.items() if not len(job.offsets)]:
        found = f"no source was found in {len(barren)} of {len(by_position)} jobs"
        LOG.warning(f"{found}, such as {barren[0]}; check the list or --truth, and the WCS")
    if total["labelled by --truth"] and not total["true sources"]:
        LOG.warning("no source of --truth lies on an image; are ra and dec ICRS, in degrees?")
    if np.abs(offset).max() > MAX_OFFSET_PX:
        LOG.warning("candidates are off their sources; does the list number its pixels from 0?")


def summarize(used: dict[str, JobResult], left_out: int, index_path: Path) -> str:
    """Return the closing lines of a run; warn of what a user should check."""
    total = sum((job.counts for job in used.values()), Counter())
    offsets = np.concatenate([job.offsets for job in used.values()])
    offset = np.median(offsets, axis=0) if len(offsets) else np.zeros(2)
    warn_of_doubts(used, total, offset)
    real, bogus, sources = total["real"], total["bogus"], total["sources"]
    percent = 100 / max(real + bogus, 1)
    origins = {key: count for key, count in total.items() if key.startswith("labelled by ")}
    size = total["bytes"] + index_path.stat().st_size
    lines = [
        f"jobs         {total['jobs written']:,} written, {total['jobs up to date']:,} up to date,"
        f" {left_out:,} left out",
        f"candidates   {real + bogus:,}: {real:,} real ({real * percent:.1f} %),"
        f" {bogus:,} bogus ({bogus * percent:.1f} %)",
        f"dropped      {total['no position']:,} without a position,"
        f" {total['off the image']:,} off the image",
        *(f"labels       {n:,} jobs {origin}" for origin, n in origins.items() if len(origins) > 1),
    ]
    if total["labelled by match"] < len(used):
        found = f"{len(offsets):,} found ({100 * len(offsets) / max(sources, 1):.1f} %)"
        lines.append(f"sources      {sources:,} on the images, {found}")
    if len(offsets):
        x, y = offset
        lines.append(f"offset       {x:+z.2f} in x, {y:+z.2f} in y: candidate - source, pixels")
    return "\n  ".join([str(index_path), *lines, f"written      {size / 1e6:,.1f} MB"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description="Turn RAPID job folders into an AI-ready dataset.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("-i", "--input_dir", type=Path, default="./mini_dataset", help="folder that holds jid*")
    add("-o", "--output_dir", type=Path, default="./hackathon_dataset", help="dataset to write")
    names = {"nargs": "+", "action": "extend", "metavar": "NAME"}
    add("--jobs", **names, help="only these job folders, or those named in @FILE")
    add("--truth", type=Path, help="table of real sources for all jobs: ra and dec, degrees")
    add("--match_radius", type=float, default="2", help="from candidate to source, pixels")
    add("--overwrite", action="store_true", help="rebuild the tensors that are up to date, too")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_mutually_exclusive_group().add_argument
    # A text: argparse does not see the conflict with --scheduler if the number is the default.
    add("--workers", type=int, default=str(cpus), help="processes on this machine")
    add("--scheduler", help="address of a Dask scheduler, whose workers do the work instead")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers: expected 1 or more, got {args.workers}")
    if not 0 < args.match_radius < float("inf"):
        parser.error(f"--match_radius: expected pixels above 0, got {args.match_radius:g}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    LOG.setLevel(logging.INFO)
    start = time.monotonic()
    try:
        used, left_out = build_dataset(args)
        summary = summarize(used, left_out, args.output_dir / INDEX_NAME)
    except (DatasetError, OutputError, OSError) as error:
        LOG.error(error)
        return 1
    except KeyboardInterrupt:
        LOG.error(f"interrupted: {GO_ON}")
        return 130
    try:
        print(f"{summary} in {time.monotonic() - start:.1f} s", flush=True)
    except (OSError, UnicodeEncodeError) as error:  # the dataset is complete all the same
        LOG.warning(f"the summary cannot be printed: {error}")
        sys.stdout = None  # else Python tries again on exit, and fails
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
