#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3",
#     "pandas>=3.1,<4",
#     "astropy>=7.0,<9",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Turn RAPID job folders into a dataset: one image tensor a job and one index of candidates.

Read: every folder `jid*` directly under the input folder, each with a science, a reference, a
difference and a score image (FITS) and the candidate catalog `psfcat.csv`, whose finder columns
may lie in `diffimage_masked_psfcat_finder.txt`.

Written: `images/<jid>.npy`, float32 (H, W, 4), each channel ZScale-normalised to [0, 1], and
`master_index.csv`, a row per candidate with its label (1 real, 0 bogus). A tensor that is newer
than its images is kept, so that a second run does only what is missing.

    python create_dataset.py
    python create_dataset.py -i ./raw_data -o ./my_dataset
    python create_dataset.py -i ./raw_data -o ./my_dataset --overwrite

Exit codes: 0 all jobs are in the dataset; 1 a job was left out or nothing could be written (the
reason is on stderr); 2 wrong usage; 130 interrupted by Ctrl-C. A candidate without a position on
its image is left out and counted in the summary; that alone does not change the exit code.
"""

import argparse
import gzip
import io
import logging
import os
import re
import sys
import time
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning
from astropy.visualization import ZScaleInterval
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

CHANNELS = {  # name: file name without suffix, in the order of the tensor's last axis
    "science": "bkg_subbed_science_image",
    "reference": "awaicgen_output_mosaic_image_resampled",
    "difference": "diffimage_masked",
    "score": "scorrimage_masked",
}
CHANNEL_NAMES = tuple(CHANNELS)
IMAGE_SUFFIXES = (".fits", ".fits.gz", ".fits.fz")  # in order of preference
CATALOG_NAME = "psfcat.csv"
FINDER_NAME = "diffimage_masked_psfcat_finder.txt"
INDEX_NAME = "master_index.csv"
IMAGES_DIR = "images"
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
FIT_COLUMNS = {"x": "x_fit", "y": "y_fit"}  # stand in where the finder has no position either
NO_MATCH = -1  # `match` of a candidate with no source within the match radius
# What numpy raises on a damaged .npy header.
NPY_ERRORS = (OSError, ValueError, OverflowError, SyntaxError, tokenize.TokenError)

LOG = logging.getLogger("create_dataset")


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


@dataclass(frozen=True)
class JobResult:
    """Result of one job: its index rows, or the reason why it was left out."""

    jid: str
    rows: pd.DataFrame | None  # INDEX_COLUMNS, a row per candidate
    counts: Counter[str]  # what the job adds to the summary
    reason: str = ""


def one_line(error: Exception) -> str:
    """Return the text of an error on one line, or its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts jid2 before jid10, and settles jid1 against jid01 by the text."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdecimal() else part for part in parts], name


def find_jobs(input_dir: Path) -> list[Path]:
    """List the job folders directly under `input_dir`, in natural order."""
    if not input_dir.is_dir():
        raise DatasetError(f"{input_dir}: no such folder; give the one that holds jid* with -i")
    jobs = [path for path in input_dir.glob("jid*") if path.is_dir()]
    if not jobs:
        raise DatasetError(f"{input_dir}: no job folders in it; folders named jid* were expected")
    return sorted(jobs, key=lambda path: natural_key(path.name))


def find_image(job_dir: Path, stem: str) -> Path:
    """Return the image file of `stem`, or the compressed file that stands in for it."""
    for suffix in IMAGE_SUFFIXES:
        path = job_dir / f"{stem}{suffix}"
        if path.is_file():
            return path
        if path.exists():
            raise DatasetError(f"{path}: not a file; a FITS image was expected")
    raise DatasetError(f"{job_dir}: no {stem}.fits (nor .fits.gz, nor .fits.fz)")


def read_image(path: Path) -> np.ndarray:
    """Read the first HDU that holds 2-D pixels from a FITS file, plain, gzipped or tile-compressed.

    Returns
    -------
    numpy.ndarray
        float32 (H, W), native byte order, BSCALE and BZERO applied; NaN or infinite is masked.

    Raises
    ------
    DatasetError
        The file is damaged, cut short, or holds no 2-D image.
    """
    try:
        # The gzip module reads to the end, where the checksum is; astropy stops at the last pixel.
        source = io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        with warnings.catch_warnings(), np.errstate(over="ignore"):  # beyond float32: masked
            warnings.simplefilter("ignore", AstropyUserWarning)
            warnings.filterwarnings("error", "File may have been truncated")
            with fits.open(source, uint=False) as hdus:  # uint=True would ignore BLANK
                for hdu in hdus:
                    if hdu.is_image and len(hdu.shape) == 2 and all(hdu.shape):
                        return np.array(hdu.data, dtype=np.float32)
    except Exception as error:  # all of it: astropy's error for a damaged tile has no public name
        raise DatasetError(f"{path}: not a readable FITS image: {one_line(error)}") from error
    raise DatasetError(f"{path}: no HDU with a 2-D image in it")


def zscale_limits(pixels: np.ndarray) -> tuple[float, float]:
    """Return the ZScale limits vmin < vmax of the finite pixels of a float32 (H, W) image.

    They are those of `astropy.visualization.ZScaleInterval` at its defaults, or the finite minimum
    and maximum where its two limits coincide. Raises DatasetError where those coincide too, or
    where float32 cannot hold their distance.
    """
    finite = pixels[np.isfinite(pixels)]
    if finite.size == 0:
        raise DatasetError("no finite pixel")
    vmin, vmax = ZScaleInterval().get_limits(finite)
    if not vmin < vmax:
        vmin, vmax = finite.min(), finite.max()
    if vmin == vmax:
        raise DatasetError(f"all finite pixels have the value {vmin:g}")
    with np.errstate(over="ignore", under="ignore"):
        if not 0 < np.float32(float(vmax) - float(vmin)) < np.inf:
            raise DatasetError(f"pixels from {vmin:g} to {vmax:g} cannot be scaled in float32")
    return float(vmin), float(vmax)


def normalise(pixels: np.ndarray, vmin: float, vmax: float) -> np.ndarray:
    """Scale an image to [0, 1], with its masked pixels at what zero flux (the sky) gets.

    Parameters
    ----------
    pixels : numpy.ndarray
        float32 (H, W); NaN or infinite is masked.
    vmin, vmax : float
        Values that become 0 and 1; Python floats, beside which float32 stays float32.

    Returns
    -------
    numpy.ndarray
        float32 (H, W), in [0, 1], finite.
    """
    scaled = np.where(np.isfinite(pixels), pixels, np.float32(0))
    with np.errstate(over="ignore"):  # infinity clips to 1
        scaled -= vmin
        scaled /= vmax - vmin
    return np.clip(scaled, 0, 1, out=scaled)


def build_tensor(paths: Iterable[Path]) -> np.ndarray:
    """Read and normalise a job's four images, in the order of CHANNEL_NAMES, into one tensor.

    Returns
    -------
    numpy.ndarray
        float32 (H, W, 4), C-ordered, in [0, 1], finite.

    Raises
    ------
    DatasetError
        An image cannot be read or scaled, or the shapes differ.
    """
    tensor = None
    for channel, path in enumerate(paths):
        pixels = read_image(path)
        if tensor is None:
            tensor = np.empty((*pixels.shape, len(CHANNEL_NAMES)), dtype="<f4")
        if pixels.shape != tensor.shape[:2]:
            raise DatasetError(
                f"{path}: {pixels.shape} pixels, but {tensor.shape[:2]} in the science image"
            )
        try:
            tensor[..., channel] = normalise(pixels, *zscale_limits(pixels))
        except DatasetError as error:
            raise DatasetError(f"{path}: {error}") from error
    if not (tensor.min() >= 0 and tensor.max() <= 1):  # NaN fails both
        raise DatasetError(f"{path.parent}: the tensor is not in [0, 1]; please report this")
    return tensor


def read_text(path: Path, separator: str) -> pd.DataFrame:
    """Read a catalog's text as it stands; raise DatasetError where it is missing or no table."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                # From bytes: pandas would take a Ctrl-C while it reads a file for a damaged file.
                io.BytesIO(path.read_bytes()),
                sep=separator,
                encoding="utf-8-sig",
                encoding_errors="replace",  # known columns are ASCII; others may be Latin-1
                index_col=False,
                low_memory=False,
            )
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file") from error
    except pd.errors.ParserWarning as error:
        raise DatasetError(f"{path}: the rows are longer than the header") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable catalog: {one_line(error)}") from error


def read_table(path: Path, separator: str = ",") -> pd.DataFrame:
    """Read those of CATALOG_COLUMNS and FIT_COLUMNS that a catalog has, under whatever alias.

    All are float64, with NaN for an empty cell. Raises DatasetError where a column occurs twice or
    a cell is not a number.
    """
    table = read_text(path, separator)
    table.columns = header = [str(name).strip() for name in table.columns]
    found = {}
    for column in (*CATALOG_COLUMNS, *FIT_COLUMNS.values()):
        name = next((name for name in ALIASES.get(column, (column,)) if name in header), None)
        if name is None:
            continue
        if header.count(name) > 1 or f"{name}.1" in header:  # pandas adds .1 to a second one
            raise DatasetError(f"{path}: column {name} occurs more than once")
        found[column] = to_float(table[name], path)
    if not found:
        raise DatasetError(f"{path}: the header has no column of a catalog: {header}"[:300])
    return pd.DataFrame(found, table.index)


def read_finder(path: Path) -> pd.DataFrame:
    """Read the finder's table, whose columns are separated by blanks: no cell may be empty."""
    table = read_table(path, separator=r"\s+")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if len({len(line.split()) for line in lines} - {0}) > 1:
        raise DatasetError(f"{path}: rows of different length; an empty cell should say nan")
    return table


def to_float(cells: pd.Series, path: Path) -> pd.Series:
    """Return a catalog column as float64, or say which cell is not a number."""
    numbers = pd.to_numeric(cells.astype(str) if cells.dtype == bool else cells, errors="coerce")
    wrong = numbers.isna() & cells.notna()
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DatasetError(
            f"{path}: column '{cells.name}' holds '{cells.iloc[row]}' in row {row + 1};"
            " a number was expected"
        )
    return numbers.astype(np.float64)


def join_finder(catalog: pd.DataFrame, finder: pd.DataFrame, job_dir: Path) -> pd.DataFrame:
    """Add to psfcat.csv's columns those that only the finder's table has, one to one on `id`.

    The rows stay those of `catalog`, in its order. Raises DatasetError where the ids do not match
    one to one, or where `catalog` has no ids and the row counts differ.
    """
    both = f"{job_dir}: {CATALOG_NAME} ({len(catalog)} rows) and {FINDER_NAME} ({len(finder)} rows)"
    added = [column for column in finder if column not in catalog]
    if "id" not in catalog and len(catalog) == len(finder):
        return pd.concat([catalog, finder[added]], axis=1)
    if "id" not in catalog or "id" not in finder:
        raise DatasetError(f"{both} cannot be joined: both need the column id")
    check_unique(finder["id"], job_dir / FINDER_NAME)
    alone = set(catalog["id"].dropna()) ^ set(finder["id"].dropna())
    empty = int(catalog["id"].isna().sum() + finder["id"].isna().sum())
    if alone or empty:
        raise DatasetError(
            f"{both} do not match one to one: {len(alone)} ids occur in only one of them, such as"
            f" {min(alone, default=np.nan):.17g}, and {empty} ids are empty"
        )
    return catalog.merge(finder[["id", *added]], on="id", how="left", validate="one_to_one")


def check_unique(ids: pd.Series, path: Path) -> None:
    """Raise DatasetError where an id occurs twice: (jid, id) is the key of the index."""
    twice = ids[ids.duplicated() & ids.notna()]
    if len(twice):
        raise DatasetError(f"{path}: id {twice.iloc[0]:.17g} occurs more than once")


def read_catalog(job_dir: Path) -> pd.DataFrame:
    """Read a job's candidates from psfcat.csv and, where that lacks columns, the finder's table.

    Returns
    -------
    pandas.DataFrame
        Those of CATALOG_COLUMNS that are there, float64, in catalog order; `x`, `y` and `match`
        always are, and `match` is finite. The columns of a PSF fit may stand beside them.

    Raises
    ------
    DatasetError
        A catalog is missing or damaged, the two do not join, or positions or labels are missing.
    """
    path, finder_path = job_dir / CATALOG_NAME, job_dir / FINDER_NAME
    catalog = read_table(path)
    if "match" not in catalog:
        raise DatasetError(f"{path}: no column match, so that no candidate can be labelled")
    unknown = int((~np.isfinite(catalog["match"])).sum())
    if unknown:
        raise DatasetError(
            f"{path}: match is empty or infinite in {unknown} of {len(catalog)} rows"
        )
    if "id" in catalog:
        check_unique(catalog["id"], path)
    if not set(FINDER_COLUMNS) <= set(catalog) and finder_path.exists():
        catalog = join_finder(catalog, read_finder(finder_path), job_dir)
    for axis, fit in FIT_COLUMNS.items():
        if axis not in catalog and fit in catalog:
            catalog[axis] = catalog[fit]
        if axis not in catalog:
            raise DatasetError(f"{path}: no column {axis} (nor {', '.join(ALIASES[axis])}, {fit})")
    return catalog


def nearest_pixel(position: np.ndarray) -> np.ndarray:
    """Return the pixel that a 0-based position falls in: pixel i spans [i - 0.5, i + 0.5)."""
    return np.floor(position + 0.5)


def index_rows(
    catalog: pd.DataFrame, jid: str, shape: tuple[int, int]
) -> tuple[pd.DataFrame, Counter[str]]:
    """Make the index rows of one job.

    Parameters
    ----------
    catalog : pandas.DataFrame
        From `read_catalog`.
    jid : str
        Name of the job folder.
    shape : tuple of int
        Height and width of the job's images, pixels.

    Returns
    -------
    rows : pandas.DataFrame
        INDEX_COLUMNS. A column that the catalog lacks is NaN, and so is `mag` where the flux is
        not positive.
    counts : Counter
        Candidates by label, those left out by reason, and the columns that the catalog lacks.
    """
    rows = catalog.reindex(columns=list(CATALOG_COLUMNS))
    rows["mag"] = rows["mag"].mask(rows["flux"] <= 0)
    rows["jid"] = jid
    rows["label"] = (rows["match"] != NO_MATCH).astype(np.int64)
    rows["image_filename"] = f"{IMAGES_DIR}/{jid}.npy"
    has_position = np.isfinite(rows["x"]) & np.isfinite(rows["y"])
    on_image = nearest_pixel(rows["x"]).between(0, shape[1] - 1)
    on_image &= nearest_pixel(rows["y"]).between(0, shape[0] - 1)
    counts = Counter({f"lacks {column}": 1 for column in CATALOG_COLUMNS if column not in catalog})
    counts["no position"] = int((~has_position).sum())
    counts["off the image"] = int((has_position & ~on_image).sum())
    rows = rows.loc[on_image, list(INDEX_COLUMNS)]  # NaN is between nothing
    counts["real"] = int(rows["label"].sum())
    counts["bogus"] = len(rows) - counts["real"]
    return rows, counts


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name once it is written whole."""
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # on a disk that is read-only there is nothing to remove
            temporary.unlink()


def write_tensor(tensor: np.ndarray, path: Path) -> int:
    """Write a tensor as .npy and return the bytes written.

    Not with `np.save`: on a full disk it raises an error that does not say so.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as handle:
        header = np.lib.format.header_data_from_array_1_0(tensor)
        np.lib.format.write_array_header_1_0(handle, header)
        handle.write(tensor.data)
        return handle.tell()


def current_shape(tensor_path: Path, image_paths: Iterable[Path]) -> tuple[int, int] | None:
    """Return height and width of a tensor that is whole and newer than its images, else None."""
    try:
        tensor = np.lib.format.open_memmap(tensor_path, mode="r")
        stat = tensor_path.stat()
    except NPY_ERRORS:
        return None
    whole = (
        tensor.dtype == np.dtype("<f4")
        and tensor.flags.c_contiguous
        and tensor.shape[2:] == (len(CHANNEL_NAMES),)
        and tensor.offset + tensor.nbytes == stat.st_size
    )
    newest = max(path.stat().st_mtime_ns for path in image_paths)
    return tensor.shape[:2] if whole and newest <= stat.st_mtime_ns else None


def process_job(job_dir: Path, images_dir: Path, overwrite: bool) -> JobResult:
    """Write the tensor of one job, unless it is up to date, and return the job's index rows.

    A job that cannot be used is no error here: its result carries the reason. Raises DatasetError
    where the tensor cannot be written.
    """
    jid = job_dir.name
    tensor_path = images_dir / f"{jid}.npy"
    tensor = None
    try:
        if not jid.isprintable() or "\\" in jid:
            raise DatasetError("such a name cannot stand in the index; rename the folder")
        paths = [find_image(job_dir, stem) for stem in CHANNELS.values()]
        catalog = read_catalog(job_dir)
        shape = None if overwrite else current_shape(tensor_path, paths)
        if shape is None:
            tensor = build_tensor(paths)
            shape = tensor.shape[:2]
        rows, counts = index_rows(catalog, jid, shape)
    except (DatasetError, OSError) as error:
        return JobResult(jid, None, Counter({"jobs left out": 1}), str(error))
    if tensor is None:
        counts["jobs up to date"] = 1
    else:
        counts["jobs written"] = 1
        counts["bytes"] = write_tensor(tensor, tensor_path)
    return JobResult(jid, rows, counts)


def write_index(results: Iterable[JobResult], index_path: Path) -> tuple[Counter, list[str]]:
    """Write the rows of all jobs as they come; return the summed counts and the jobs' names.

    Raises DatasetError where the index cannot be written or no job could be used; an index that
    was there stays as it was.
    """
    counts, used = Counter(), []
    with atomic_write(index_path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as handle:
            handle.write(",".join(INDEX_COLUMNS) + "\n")
            for result in results:
                counts += result.counts
                if result.rows is None:
                    jid = result.jid if result.jid.isprintable() else ascii(result.jid)
                    LOG.error(f"{jid} left out: {result.reason}")
                    continue
                used.append(result.jid)
                result.rows.to_csv(handle, header=False, index=False, lineterminator="\n")
        if not used:
            raise DatasetError(f"none of the jobs could be used; {index_path} is not written")
        counts["bytes"] += temporary.stat().st_size
    return counts, used


def remove_stale_tensors(images_dir: Path, used: list[str], jobs: list[Path]) -> None:
    """Remove the tensors of jobs that were left out; name those whose job folder is gone."""
    known = {job.name for job in jobs}
    stale = {path.stem for path in images_dir.glob("*.npy")} - set(used)
    for jid in stale & known:
        (images_dir / f"{jid}.npy").unlink()
    gone = sorted(stale - known, key=natural_key)
    if gone:
        LOG.warning(
            f"{images_dir}: kept, though their jobs are not in the input folder; not in the index,"
            f" but the file set of croissant.json will include them: {', '.join(gone)}"
        )


def build_dataset(input_dir: Path, output_dir: Path, overwrite: bool) -> Counter[str]:
    """Make the dataset of all jobs, or bring it up to date, and return what the summary counts.

    Raises DatasetError where there are no jobs, none of them can be used, or the output cannot be
    written.
    """
    jobs = find_jobs(input_dir)
    images_dir = output_dir / IMAGES_DIR
    try:
        images_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"{images_dir}: cannot be made: {error.strerror}") from error
    with logging_redirect_tqdm():
        bar = tqdm(jobs, unit="job", disable=None)  # None: no bar where stderr is no terminal
        results = (process_job(job, images_dir, overwrite) for job in bar)
        counts, used = write_index(results, output_dir / INDEX_NAME)
    remove_stale_tensors(images_dir, used, jobs)
    return counts


def warn_of_gaps(counts: Counter) -> None:
    """Say once a run which columns were missing from catalogs."""
    lacking = [column for column in CATALOG_COLUMNS if counts[f"lacks {column}"]]
    if lacking:
        jobs = ", ".join(f"{column} ({counts[f'lacks {column}']} jobs)" for column in lacking)
        LOG.warning(f"columns missing from catalogs, left empty: {jobs}")


def summary(counts: Counter, output_dir: Path, seconds: float) -> str:
    """Return the closing lines of a run."""
    real, bogus = counts["real"], counts["bogus"]
    candidates = real + bogus
    percent = 100 / max(candidates, 1)
    return "\n".join(
        (
            f"{output_dir / INDEX_NAME}",
            f"  jobs         {counts['jobs written']:,} written, {counts['jobs up to date']:,} up"
            f" to date, {counts['jobs left out']:,} left out",
            f"  candidates   {candidates:,}: {real:,} real ({real * percent:.1f} %),"
            f" {bogus:,} bogus ({bogus * percent:.1f} %)",
            f"  dropped      {counts['no position']:,} without a position,"
            f" {counts['off the image']:,} off the image",
            f"  written      {counts['bytes'] / 1e6:,.1f} MB in {seconds:.1f} s",
        )
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    start = time.monotonic()
    try:
        counts = build_dataset(args.input_dir, args.output_dir, args.overwrite)
        warn_of_gaps(counts)
        print(summary(counts, args.output_dir, time.monotonic() - start), flush=True)
    except (DatasetError, OSError) as error:
        LOG.error(error)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted: finished tensors are kept; the same command goes on from there")
        return 130
    return 1 if counts["jobs left out"] else 0


if __name__ == "__main__":
    sys.exit(main())
