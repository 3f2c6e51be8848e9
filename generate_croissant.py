#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3",
#     "packaging>=24.2,<27",
#     "pandas>=3.1,<4",
#     "mlcroissant>=1.1.1,<1.2",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Describe a dataset of create_dataset.py in croissant.json (MLCommons Croissant 1.1, RAI 1.0).

Read: `master_index.csv`, which is checked whole, and the headers of the tensors beside it.

Written: `croissant.json`, with the index, the tensors and three record sets: the candidates, what
their labels mean, and the images, one a job. What can be counted is counted; what only the author
knows comes from the options, and what nobody gave is listed at the end, never invented. The file
gets its name only after mlcroissant has loaded it and read a record of each set.

    python generate_croissant.py
    python generate_croissant.py -c ./my_dataset/master_index.csv -o ./my_dataset/croissant.json
    python generate_croissant.py --license CC-BY-4.0 --version 1.0.0 --rai rai.json
    python generate_croissant.py --check

Exit codes: 0 written, or --check found no difference; 1 the dataset is damaged or differs from its
description, or that cannot be written (the reason is on stderr); 2 wrong usage; 130 interrupted by
Ctrl-C.
"""

import argparse
import difflib
import glob
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import signal
import sys
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from urllib.parse import quote

if __name__ == "__main__":  # the imports below take a second, in which Ctrl-C just ends
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import mlcroissant as mlc
import numpy as np
import pandas as pd
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from tqdm import tqdm

CHANNEL_NAMES = ("science", "reference", "difference", "score")
CROISSANT_NAME = "croissant.json"
INDEX_NAME, IMAGES_DIR = "master_index.csv", "images"
INDEX_ID, TENSORS_ID = "master-index", "image-tensors"  # ids of the two resources
RECORD_SET, LABELS_SET, IMAGES_SET = "transient_candidates", "labels", "images"
JOB_NAME = r"jid[^/\\]*"  # also: mlcroissant would take a jid such as 001 for a number
NO_MATCH = -1  # `match` of a candidate with no source within the match radius
EMPTY, NEVER = "Empty where the catalog has no value.", "Never empty."
FIELDS = {  # column of the index: its meaning, unit and empty cells
    "id": f"Number of the candidate in its job's finder catalog, no unit. {EMPTY}",
    "jid": f"Job: the image-differencing run that the candidate is from. {NEVER}",
    "x": f"Column, pixels, 0-based; an integer is a pixel's centre. {NEVER}",
    "y": f"Row, pixels, 0-based; an integer is a pixel's centre. {NEVER}",
    "sharpness": "DAOFIND sharpness, dimensionless: the peak above its surroundings over the height"
    f" of the fitted Gaussian; high for cosmic rays and hot pixels. {EMPTY}",
    "roundness1": f"DAOFIND roundness from symmetry, dimensionless, 0 for a round source. {EMPTY}",
    "roundness2": "DAOFIND roundness from the heights of the Gaussians fitted to the sums along x"
    f" and y, dimensionless, 0 for a round source. {EMPTY}",
    "npix": f"Number of pixels in the finder's kernel. {EMPTY}",
    "peak": f"Highest pixel of the candidate in the difference image, DN/s. {EMPTY}",
    "flux": f"Flux in the difference image, DN/s; may be negative. {EMPTY}",
    "mag": "Instrumental magnitude, mag: -2.5 log10(flux). Empty where the flux is not positive or"
    " the catalog has no value.",
    "daofind_mag": "DAOFIND magnitude, mag: -2.5 log10 of the peak density over the detection"
    f" threshold. {EMPTY}",
    "flags": f"Bit flags of the PSF photometry, 0 for none, no unit. {EMPTY}",
    "match": "Number of the injected or simulated source that it matches, no unit; -1 for none."
    f" {NEVER}",
    "label": f"1: real (match is not -1); 0: bogus (match is -1). {NEVER}",
    "image_filename": f"Path of the job's tensor, relative to the index's folder. {NEVER}",
}
INDEX_COLUMNS = tuple(FIELDS)
TEXT_COLUMNS = ("jid", "image_filename")
KEYS = {RECORD_SET: ("jid", "id"), LABELS_SET: ("label",), IMAGES_SET: ("jid",)}
NUMBER_COLUMNS = tuple(column for column in FIELDS if column not in TEXT_COLUMNS)
REQUIRED_NUMBERS = ("x", "y", "match", "label")  # no cell may be empty
LABEL_FIELDS = {
    "label": "Value of the label.",
    "name": "Name of the class.",
    "meaning": "What it takes to be in the class.",
}
LABELS = (
    (0, "bogus", "The candidate matches no injected or simulated source."),
    (1, "real", "The candidate matches an injected or simulated source."),
)
IMAGE_FIELDS = {
    "jid": "Job: the image-differencing run that the images are from.",
    "image_filename": "Path of the job's tensor, relative to the index's folder.",
    "height": "Rows of the tensor, pixels.",
    "width": "Columns of the tensor, pixels.",
    "candidates": "Number of candidates in the job.",
    "real": "Number of those that are real.",
    "sha256": "SHA-256 checksum of the tensor's file.",
}
TYPES = {  # of fields, by name; the others are cr:Float64
    **dict.fromkeys((*TEXT_COLUMNS, "name", "meaning", "sha256"), mlc.DataType.TEXT),
    **dict.fromkeys(("label", "height", "width", "candidates", "real"), mlc.DataType.INT64),
}
CATEGORY = "http://mlcommons.org/croissant/Label"  # second type of the candidates' label
ENUMERATION = "https://schema.org/Enumeration"  # type of the record set of the labels
CONFORMS_TO = "http://mlcommons.org/croissant/1.1"
CONFORMS_TO_RAI = "http://mlcommons.org/croissant/RAI/1.0"
CONTEXT_1_1 = {  # terms of Croissant 1.1 that mlcroissant 1.1.1 leaves out of the context it writes
    "annotation": "cr:annotation",
    "arrayShape": "cr:arrayShape",
    "containedIn": "cr:containedIn",
    "excludes": "cr:excludes",
    "isArray": "cr:isArray",
    "prov": "http://www.w3.org/ns/prov#",
    "prov:wasDerivedFrom": {"@type": "@id"},  # its texts are URLs
    "readLines": "cr:readLines",
    "sdVersion": "cr:sdVersion",
    "unArchive": "cr:unArchive",
}
RAI_ONE = tuple(  # terms of --rai that take one text
    "rai:annotationsPerItem rai:dataCollection rai:dataCollectionMissingData"
    " rai:dataCollectionRawData rai:dataImputationProtocol rai:dataManipulationProtocol"
    " rai:dataReleaseMaintenancePlan rai:dataSocialImpact".split()
)
RAI_MANY = tuple(  # terms of --rai that take one or several
    "rai:annotatorDemographics rai:dataAnnotationAnalysis rai:dataAnnotationPlatform"
    " rai:dataAnnotationProtocol rai:dataBiases rai:dataCollectionTimeframe rai:dataCollectionType"
    " rai:dataLimitations rai:dataPreprocessingProtocol rai:dataUseCases"
    " rai:machineAnnotationTools rai:personalSensitiveInformation".split()
)
# Terms of --rai that mlcroissant 1.1.1 has no keywords for.
RAI_EXTRA = ("rai:hasSyntheticData", "prov:wasDerivedFrom", "prov:wasGeneratedBy")
MISNAMED = {  # by mlcroissant 1.1.1: what the vocabulary calls it
    "rai:dataCollectionTimeFrame": "rai:dataCollectionTimeframe",
    "rai:dataDataManipulationProtocol": "rai:dataManipulationProtocol",
}
ASKED_FOR = {  # by whom: terms that only the user knows
    "required by Croissant": "license url creator",
    "recommended": "version citeAs keywords publisher",
    "required by NeurIPS": "rai:dataBiases rai:dataSocialImpact rai:hasSyntheticData"
    " prov:wasDerivedFrom",
}
STATED = tuple(  # options that mlcroissant takes as they are
    "name license url creators publisher version date_published cite_as keywords".split()
)
LIBRARIES = ("mlcroissant", "numpy", "pandas")  # whose versions are stated
TEXT_KIND, URL_KIND = "a text", "a URL such as https://example.org/data"
DATE_KIND, VERSION_KIND = "a date such as 2026-01-31", "a version such as 1.0.0"
NUMBER, WORD = r"(0|[1-9][0-9]*)", "[0-9A-Za-z-]+"
PRE = rf"({NUMBER}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
PATTERNS = {  # of what the user gives, by kind; parse_args relies on their order
    TEXT_KIND: r"(?s).*\S.*",
    URL_KIND: r"https?://[\w.-]*\w(:\d+)?([/?#][^\s<>\"{}|\\^`]*)?",
    DATE_KIND: r"[12]\d{3}-\d\d-\d\d",
    # As semver.org has it: three numbers, of a pre-release -words or numbers, of a build +words.
    VERSION_KIND: rf"{NUMBER}(\.{NUMBER}){{2}}(-{PRE}(\.{PRE})*)?(\+{WORD}(\.{WORD})*)?",
}
PART_ROWS = 100_000  # of the index in memory at a time: some 60 MB
MAX_PROBLEMS, MAX_CELL = 20, 80  # that a run lists, and letters of a cell in its messages
# What numpy raises on a damaged .npy header.
NPY_ERRORS = (OSError, ValueError, TypeError, OverflowError, MemoryError, SyntaxError)
NPY_ERRORS += (tokenize.TokenError,)
# What mlcroissant and its parsers raise on a damaged description: its own errors and Python's.
MLCROISSANT_ERRORS = (mlc.ValidationError, mlc.GenerationError, ValueError, LookupError, TypeError)
MLCROISSANT_ERRORS += (AttributeError, AssertionError, RecursionError)

LOG = logging.getLogger("generate_croissant")


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


@dataclass(frozen=True)
class Facts:
    """What the description says about a dataset, all of it counted."""

    csv_path: Path
    sha256: str  # of the index
    images: list[dict[str, str | int]]  # a record of IMAGE_FIELDS for each tensor
    empty: Counter[str]  # empty cells of each column
    first: dict[str, str | float]  # the first candidate

    @property
    def candidates(self) -> int:
        """Number of candidates."""
        return sum(image["candidates"] for image in self.images)

    @property
    def real(self) -> str:
        """Number of real candidates with their share, as a text."""
        real = sum(image["real"] for image in self.images)
        return f"{real:,} ({real / self.candidates:.1%})"

    @property
    def array_shape(self) -> str:
        """Shape of the tensors as Croissant writes it, -1 where they differ."""
        sides = ({image[side] for image in self.images} for side in ("height", "width"))
        height, width = (side.pop() if len(side) == 1 else -1 for side in sides)
        return f"{height},{width},{len(CHANNEL_NAMES)}"


def one_line(error: Exception) -> str:
    """Return the text of an error on one line."""
    return " ".join(str(error).split())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def snake_case(term: str) -> str:
    """Return a term as mlcroissant and the command line spell it: citeAs becomes cite_as."""
    return re.sub("(?=[A-Z])", "_", term.rpartition(":")[2]).lower()


def survey_index(csv_path: Path) -> tuple[pd.DataFrame, Counter[str], dict[str, str | float]]:
    """Read the index in parts and check its columns, types, labels, paths and keys.

    Returns
    -------
    jobs : pandas.DataFrame
        By `jid`, in the order of the index: int64 `candidates` and `real`, float64 `x_min`,
        `x_max`, `y_min` and `y_max`, pixels.
    empty : Counter
        Empty cells of each column.
    first : dict
        The first candidate.

    Raises
    ------
    DatasetError
        The file is missing or no such index; the text does not name the file.
    """
    if not csv_path.is_file():
        raise DatasetError("no such file; create_dataset.py writes it")
    kept, empty, first = [], Counter(), []
    texts = dict.fromkeys(TEXT_COLUMNS, str)
    options = {"chunksize": PART_ROWS, "index_col": False, "dtype": texts, "low_memory": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            head = pd.read_csv(csv_path, header=None, nrows=2, dtype=str)
            check_header(head.iloc[0].tolist())
            for part in pd.read_csv(csv_path, **options):
                part = checked_rows(part)
                empty.update(part.isna().sum().to_dict())
                first = first or part[:1].to_dict("records")
                kept.append(part[["jid", "id", "x", "y", "label"]])
    except (ValueError, pd.errors.ParserWarning) as error:
        raise DatasetError(f"not a readable CSV file: {one_line(error)}") from error
    if not first:
        raise DatasetError("no candidates in it; there is nothing to describe")
    rows = pd.concat(kept)
    twice = rows.duplicated(list(KEYS[RECORD_SET])) & rows["id"].notna()
    refuse_rows(rows, {"jid and id of another row": twice})
    jobs = rows.groupby("jid", sort=False)
    counts = jobs["label"].agg(candidates="size", real="sum").astype(int)
    x, y = (jobs[axis].agg(**{f"{axis}_min": "min", f"{axis}_max": "max"}) for axis in "xy")
    return pd.concat([counts, x, y], axis="columns"), empty, first[0]


def check_header(found: Sequence[str]) -> None:
    """Raise DatasetError where the columns are not those of INDEX_COLUMNS in their order."""
    wrong = {
        "missing": [column for column in INDEX_COLUMNS if column not in found],
        "not expected": [str(column) for column in found if column not in INDEX_COLUMNS],
        "twice": [column for column in INDEX_COLUMNS if found.count(column) > 1],
    }
    texts = [f"{what} {', '.join(columns)}" for what, columns in wrong.items() if columns]
    if tuple(found) != INDEX_COLUMNS:
        texts = texts or [f"out of order; expected {', '.join(INDEX_COLUMNS)}"]
        raise DatasetError(f"not the columns of {INDEX_NAME}: {'; '.join(texts)}")


def checked_rows(part: pd.DataFrame) -> pd.DataFrame:
    """Return rows of the index in their types; raise DatasetError where one is wrong in itself."""
    cells = part[list(NUMBER_COLUMNS)]
    numbers = cells.apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = {
        f"a {column} that is no number": (numbers[column].isna() & cells[column].notna())
        | (cells[column].dtype == bool)
        for column in NUMBER_COLUMNS
    }
    wrong |= {f"no finite {column}": ~np.isfinite(numbers[column]) for column in REQUIRED_NUMBERS}
    path = IMAGES_DIR + "/" + part["jid"] + ".npy"
    wrong |= {
        "a jid that is no name of a job folder": ~part["jid"].str.fullmatch(JOB_NAME, na=False),
        "an image_filename other than images/<jid>.npy": part["image_filename"] != path,
        "a label other than 0 and 1": ~numbers["label"].isin([0, 1]),
        "a label that contradicts match": (numbers["label"] == 1) != (numbers["match"] != NO_MATCH),
    }
    refuse_rows(part, wrong)
    return part.assign(**numbers)


def refuse_rows(rows: pd.DataFrame, wrong: dict[str, pd.Series]) -> None:
    """Raise DatasetError at the first row for which a mask is true.

    Shown of it are its key and the columns that the mask's name has among its words.
    """
    for what, mask in wrong.items():
        if mask.any():
            row = rows.loc[mask.idxmax()]
            shown = (column for column in rows if column in (*KEYS[RECORD_SET], *what.split()))
            cells = (f"{column} {str(row[column])[:MAX_CELL]}" for column in shown)
            raise DatasetError(
                f"{mask.sum():,} rows with {what}; the first is row {mask.idxmax() + 1}:"
                f" {', '.join(cells)}"
            )


def tensor_shape(path: Path) -> tuple[int, int]:
    """Return height and width of a tensor, pixels, from the .npy header alone.

    Raises
    ------
    DatasetError
        The file is missing, cut short, or not float32 (H, W, 4).
    """
    try:
        tensor = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such tensor, but {INDEX_NAME} names it") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error
    except NPY_ERRORS as error:
        raise DatasetError(f"{path}: not a whole .npy file: {one_line(error)}") from error
    channels = len(CHANNEL_NAMES)
    if tensor.dtype != np.dtype("<f4") or tensor.shape[2:] != (channels,) or not tensor.size:
        raise DatasetError(
            f"{path}: {tensor.dtype} {tensor.shape}; expected float32 (H, W, {channels})"
        )
    if not tensor.flags.c_contiguous:
        raise DatasetError(f"{path}: Fortran order; expected C order")
    if path.stat().st_size != tensor.offset + tensor.nbytes:
        raise DatasetError(f"{path}: longer than its header says; run create_dataset.py again")
    return tensor.shape[:2]


def check_positions(path: Path, shape: tuple[int, int], job: tuple) -> None:
    """Raise DatasetError where candidates of a job, a row of survey_index, are off its tensor."""
    height, width = shape
    # Pixel i spans [i - 0.5, i + 0.5).
    on_x = job.x_min >= -0.5 and job.x_max < width - 0.5
    on_y = job.y_min >= -0.5 and job.y_max < height - 0.5
    if not (on_x and on_y):
        raise DatasetError(
            f"{path}: {height} x {width} pixels, but its candidates are at x {job.x_min:g} to"
            f" {job.x_max:g}, y {job.y_min:g} to {job.y_max:g}; run create_dataset.py again"
        )


def survey_images(folder: Path, jobs: pd.DataFrame, hashed: bool) -> tuple[list[dict], list[str]]:
    """Return a record of IMAGE_FIELDS for each whole tensor, and what is wrong with the others."""
    found = {path.stem for path in (folder / IMAGES_DIR).glob("*.npy")}
    jobs = jobs.reindex([*jobs.index, *sorted(found - set(jobs.index))], fill_value=0)
    images, problems = [], []
    bar = {"desc": "tensors", "unit": "", "delay": 1, "disable": None, "leave": False}
    for job in tqdm(jobs.itertuples(), total=len(jobs), **bar):
        name = f"{IMAGES_DIR}/{job.Index}.npy"
        path = folder / name
        try:
            shape = tensor_shape(path)
            check_positions(path, shape, job)
        except DatasetError as error:
            problems.append(str(error))
            continue
        image = [job.Index, name, *shape, job.candidates, job.real]
        image += [file_sha256(path)] if hashed else []
        images.append(dict(zip(IMAGE_FIELDS, image, strict=False)))  # sha256 is the last of them
    return images, problems


def gather_facts(csv_path: Path, hashed: bool) -> Facts:
    """Read and check a dataset and return its facts; raise DatasetError at what is wrong."""
    try:
        jobs, empty, first = survey_index(csv_path)
    except DatasetError as error:
        raise DatasetError(f"{csv_path}: {error}") from error
    images, problems = survey_images(csv_path.parent, jobs, hashed)
    raise_problems(problems)
    return Facts(csv_path, file_sha256(csv_path), images, empty, first)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise DatasetError where there are problems, with a line for each of the first."""
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS:,} more"]
    if problems:
        raise DatasetError("\n".join(problems))


def describe(facts: Facts) -> str:
    """Return the description of the dataset, from counted facts."""
    jobs = sum(image["candidates"] > 0 for image in facts.images)
    height, width, _ = facts.array_shape.split(",")
    size = "of several sizes" if "-1" in (height, width) else f"of {height} x {width} pixels"
    return (
        f"Candidate transients of {jobs:,} image-differencing jobs in the file layout of RAPID:"
        f" {facts.candidates:,} candidates, of which {facts.real} are real and the others bogus"
        f" detections. {len(facts.images):,} image tensors {size}, one a job, with the channels"
        f" {', '.join(CHANNEL_NAMES)}, each ZScale-normalised to [0, 1]; masked pixels have the"
        " value of zero flux."
    )


def known_terms(facts: Facts) -> dict[str, object]:
    """Return what can be said of the data's making and limits without asking the user."""
    empty = [f"{name} {n:,} ({n / facts.candidates:.1%})" for name, n in facts.empty.items() if n]
    return {
        "rai:annotationsPerItem": "1",
        "rai:dataAnnotationProtocol": "label is 1 (real) where the catalog matches the candidate to"
        " an injected or simulated source, that is where match is not -1, and else 0 (bogus).",
        "rai:dataCollectionMissingData": f"Empty cells among {facts.candidates:,} candidates:"
        f" {', '.join(empty) or 'none'}.",
        "rai:dataCollectionRawData": "Job folders in the file layout of RAPID: a science, a"
        " reference, a difference and a score image (FITS), and a catalog of the candidates.",
        "rai:dataImputationProtocol": "A masked pixel has the value of zero flux. An empty cell of"
        " the catalog stays empty.",
        "rai:dataLimitations": [
            f"The balance of the classes is that of the catalogs: {facts.real} of"
            f" {facts.candidates:,} candidates are real.",
            "A source that was neither injected nor simulated has no match and counts as bogus.",
            "Candidates of one job share its sky, PSF and flaws: split by job, not by candidate.",
        ],
        "rai:dataManipulationProtocol": "Left out: candidates without a finite position on their"
        " image, and, whole, jobs without a usable catalog, labels, or four images of one shape.",
        "rai:dataPreprocessingProtocol": [
            "Each image is scaled between the limits that astropy's ZScaleInterval finds at its"
            " defaults among its finite pixels, or where those coincide between the lowest and the"
            " highest of these pixels, and clipped to [0, 1].",
            "The four images of a job are stacked to one float32 array (H, W, 4).",
        ],
        "rai:dataUseCases": "Training and evaluation of classifiers that tell real transients from"
        " bogus detections in difference images.",
        "rai:machineAnnotationTools": [
            "Candidates: DAOStarFinder and PSFPhotometry of photutils.",
            "Labels: match of the candidates with injected and simulated sources, by position.",
        ],
        "rai:personalSensitiveInformation": "None: images of the sky and measurements on them.",
        "prov:wasGeneratedBy": activity(),
    }


def activity() -> dict[str, object]:
    """Return what wrote the dataset and this description, with the versions of this run."""
    versions = {"Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "@type": "prov:Activity",
        "name": "From job folders to tensors, index and description",
        "description": "create_dataset.py wrote tensors and index, with versions that are not"
        " recorded; then generate_croissant.py checked and described them, with those named here.",
        "prov:wasAssociatedWith": [
            {"@type": "prov:SoftwareAgent", "name": name, "softwareVersion": version}
            for name, version in versions.items()
        ],
    }


def read_rai(path: Path) -> dict[str, object]:
    """Read the file of --rai; raise DatasetError where it is no JSON object of known terms."""
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_twins)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(said, dict):
        raise DatasetError(f'{path}: expected an object such as {{"rai:dataBiases": "..."}}')
    known = (*RAI_ONE, *RAI_MANY, *RAI_EXTRA)
    for term, value in said.items():
        if term not in known:
            near = difflib.get_close_matches(term, known, n=1) or sorted(known)
            raise DatasetError(f"{path}: unknown term '{term}'; expected {' or '.join(near)}")
        if expected := misfit(term, value):
            raise DatasetError(f"{path}: {term} is {value!r}; expected {expected}")
    return said


def without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of JSON; raise ValueError where a key occurs twice in it."""
    keys = Counter(key for key, _ in pairs)
    if len(keys) < len(pairs):
        raise ValueError(f"'{keys.most_common(1)[0][0]}' occurs twice")
    return dict(pairs)


def misfit(term: str, value: object) -> str:
    """Return what a term of --rai takes, or nothing where the value is such."""
    if term == "rai:hasSyntheticData":
        return "" if isinstance(value, bool) else "true or false"
    if term == "prov:wasGeneratedBy" and isinstance(value, dict | list):  # a context: a download
        return "" if value and "@context" not in json.dumps(value) else "an object without @context"
    kinds = {"rai:dataCollectionTimeframe": DATE_KIND, "prov:wasDerivedFrom": URL_KIND}
    kind, many = kinds.get(term, TEXT_KIND), term not in RAI_ONE
    values = value if many and isinstance(value, list) else [value]
    if values and all(is_a(kind, one) for one in values):
        return ""
    return f"{kind} or a list of such" if many else kind


def is_a(kind: str, value: object) -> bool:
    """Tell whether a value is a text of one kind of PATTERNS."""
    if not isinstance(value, str) or not re.fullmatch(PATTERNS[kind], value):
        return False
    try:
        return kind != DATE_KIND or bool(date.fromisoformat(value))
    except ValueError:
        return False


def record_set(
    ctx: mlc.Context, name: str, description: str, fields: dict[str, str], data: list[dict], **more
) -> mlc.RecordSet:
    """Return a record set with the records `data`, or else with the rows of the index."""
    made = []
    for field, text in fields.items():
        extract = mlc.Extract(ctx=ctx, column=field)
        index = mlc.Source(ctx=ctx, file_object=INDEX_ID, extract=extract)
        texts = {"id": f"{name}/{field}", "name": field, "description": text}
        types = [TYPES.get(field, mlc.DataType.FLOAT64)]
        made.append(mlc.Field(ctx=ctx, **texts, data_types=types, source=None if data else index))
    key = [f"{name}/{field}" for field in KEYS[name]]
    rows = [{f"{name}/{field}": row[field] for field in fields} for row in data]
    texts = {"id": name, "name": name, "description": description}
    return mlc.RecordSet(ctx=ctx, **texts, key=key, fields=made, data=rows or None, **more)


def candidates_set(ctx: mlc.Context, array_shape: str) -> mlc.RecordSet:
    """Return the record set of the candidates; the tensor is an annotation of its path."""
    text = "One record per candidate; jid and id name it, where its catalog has ids."
    candidates = record_set(ctx, RECORD_SET, text, FIELDS, [])
    fields = dict(zip(FIELDS, candidates.fields, strict=True))
    fields["label"].data_types += [CATEGORY]
    content = mlc.Extract(ctx=ctx, file_property="content")
    tensor = mlc.Field(
        ctx=ctx,
        id=f"{RECORD_SET}/image_filename/tensor",
        name="tensor",
        description=f"The tensor at that path; last axis: {', '.join(CHANNEL_NAMES)}.",
        data_types=[mlc.DataType.FLOAT32],
        is_array=True,
        array_shape=array_shape,
        source=mlc.Source(ctx=ctx, file_set=TENSORS_ID, extract=content),
    )
    fields["image_filename"].annotations = [tensor]
    return candidates


def record_sets(ctx: mlc.Context, facts: Facts) -> list[mlc.RecordSet]:
    """Return the record sets: candidates, labels, and images, with checksums where these exist."""
    labels = [dict(zip(LABEL_FIELDS, label, strict=True)) for label in LABELS]
    kinds = {"data_types": [ENUMERATION]}
    fields = {field: text for field, text in IMAGE_FIELDS.items() if field in facts.images[0]}
    return [
        candidates_set(ctx, facts.array_shape),
        record_set(ctx, LABELS_SET, "What the labels mean.", LABEL_FIELDS, labels, **kinds),
        record_set(ctx, IMAGES_SET, "One record per job.", fields, facts.images),
    ]


def distribution(
    ctx: mlc.Context, facts: Facts, output: Path, base_url: str | None
) -> list[mlc.FileObject | mlc.FileSet]:
    """Return index and tensors, relative to the folder of `output` or, the index, to `base_url`."""
    csv_path, folder = facts.csv_path, Path()
    if not base_url:
        folder = Path(os.path.relpath(csv_path.parent.resolve(), output.parent.resolve()))
    url = (folder / csv_path.name).as_posix()
    index = mlc.FileObject(
        ctx=ctx,
        id=INDEX_ID,
        name=csv_path.name,
        description="One row per candidate: position, finder statistics, label, tensor path.",
        content_url=f"{base_url.rstrip('/')}/{quote(url)}" if base_url else url,
        content_size=f"{csv_path.stat().st_size} B",
        encoding_formats=[mlc.EncodingFormat.CSV],
        sha256=facts.sha256,
    )
    tensors = mlc.FileSet(
        ctx=ctx,
        id=TENSORS_ID,
        name="image tensors",
        description=f"One .npy a job, float32 (H, W, {len(CHANNEL_NAMES)}) in [0, 1].",
        includes=[(Path(glob.escape(folder.as_posix())) / IMAGES_DIR / "*.npy").as_posix()],
        encoding_formats=["application/x-numpy"],
    )
    return [index, tensors]


def default_date(csv_path: Path) -> str:
    """Return the day of SOURCE_DATE_EPOCH, or else of the index's last change, UTC."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH") or csv_path.stat().st_mtime
    try:
        return datetime.fromtimestamp(int(seconds), tz=UTC).date().isoformat()
    except (ValueError, OverflowError, OSError) as error:
        raise DatasetError(f"SOURCE_DATE_EPOCH is {seconds!r}; expected seconds") from error


def build_metadata(facts: Facts, output: Path, given: dict, rai: dict) -> dict:
    """Return the whole description as a JSON-LD dictionary.

    `given` are the options that were used; the terms in `rai` replace those of known_terms.
    """
    rdf = mlc.Rdf(context={**mlc.Rdf().context, **CONTEXT_1_1})
    ctx = mlc.Context(conforms_to=CONFORMS_TO, rdf=rdf)
    modified = default_date(facts.csv_path)
    stated = {"name": facts.csv_path.parent.resolve().name, "date_published": modified}
    stated |= {option: given[option] for option in STATED if option in given}
    terms = {**known_terms(facts), **rai}
    try:
        metadata = mlc.Metadata(
            ctx=ctx,
            conforms_to=[CONFORMS_TO, CONFORMS_TO_RAI],
            description=f"{given.get('description', '')} {describe(facts)}".lstrip(),
            date_modified=modified,
            **stated,
            distribution=distribution(ctx, facts, output, given.get("base_url")),
            record_sets=record_sets(ctx, facts),
            **{snake_case(term): value for term, value in terms.items() if term not in RAI_EXTRA},
        ).to_json()
    except MLCROISSANT_ERRORS as error:
        raise DatasetError(refusal(error)) from error
    metadata = {MISNAMED.get(term, term): value for term, value in metadata.items()}
    last = {term: metadata.pop(term) for term in ("distribution", "recordSet")}
    return metadata | {term: terms[term] for term in RAI_EXTRA if term in terms} | last


def check_reload(json_path: Path, facts: Facts, published: bool) -> None:
    """Load a description with mlcroissant and read a record of each of its record sets.

    Nothing is downloaded: the file at hand stands in for the index of a `published` one. Raises
    DatasetError where mlcroissant finds a fault, or reads something else than the index.
    """
    mapping = {INDEX_ID: facts.csv_path} if published else None
    try:
        dataset = mlc.Dataset(jsonld=json_path, mapping=mapping)
        first = {name: next(iter(dataset.records(name))) for name in KEYS}
    except (*MLCROISSANT_ERRORS, OSError) as error:
        raise DatasetError(refusal(error)) from error
    for column, value in facts.first.items():
        read = first[RECORD_SET][f"{RECORD_SET}/{column}"]
        read = read.decode() if isinstance(read, bytes) else read
        if not (read == value or (read is None and pd.isna(value))):
            raise DatasetError(f"mlcroissant reads {column} as {read!r}; the index has {value!r}")


def refusal(error: Exception) -> str:
    """Return what mlcroissant has against a description, without its recommendations."""
    text = re.split(r"Found the following \d+ warning", one_line(error))[0].strip()
    return f"mlcroissant refuses the description: {text}"


def write_croissant(csv_path: Path, output: Path, given: dict) -> str:
    """Describe a dataset, put the description under its name once it reloads, and sum it up.

    Raises DatasetError where the dataset is damaged, or the description cannot be written.
    """
    rai = read_rai(given["rai"]) if "rai" in given else {}
    facts = gather_facts(csv_path, "image_sha256" in given)
    metadata = build_metadata(facts, output, given, rai)
    temporary = output.with_name(f".{os.getpid()}.tmp")
    try:
        text = json.dumps(metadata, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
        check_reload(temporary, facts, "base_url" in given)
        temporary.replace(output)
    except (OSError, ValueError) as error:  # ValueError: letters and numbers that JSON cannot hold
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DatasetError(f"{output}: cannot be written: {reason}") from error
    finally:
        with suppress(OSError):  # on a disk that is read-only there is nothing to remove
            temporary.unlink()
    return "\n".join([str(output), summary(facts), *not_stated(metadata)])


def summary(facts: Facts) -> str:
    """Return what was described, or compared with its description, in a line."""
    empty = sum(not image["candidates"] for image in facts.images)
    return (
        f"  described    {len(facts.images):,} tensors ({empty:,} without candidates),"
        f" {facts.candidates:,} candidates, {facts.real} real"
    )


def not_stated(metadata: dict) -> Iterator[str]:
    """Yield a line for each term that nobody gave, with the option that gives it."""
    head = "not stated"
    for who, terms in ASKED_FOR.items():
        for term in terms.split():
            if term not in metadata:
                option = "--rai" if ":" in term else f"--{snake_case(term)}"
                yield f"  {head:12} {term:22} {option:12} {who}"
                head = ""


def check_description(csv_path: Path, output: Path) -> str:
    """Hold a description against what would be written now, and sum the dataset up.

    Resources and record sets are compared, and mlcroissant reads them; the other terms are the
    author's. Raises DatasetError with the differences.
    """
    advice = "run without --check to write it"
    try:
        described = json.loads(output.read_text(encoding="utf-8-sig"))
        then = {part: described[part] for part in ("distribution", "recordSet")}
        url = str(next(one["contentUrl"] for one in then["distribution"] if "contentUrl" in one))
    except FileNotFoundError as error:
        raise DatasetError(f"{output}: no such file; {advice}") from error
    except (ValueError, LookupError, TypeError, RecursionError, StopIteration) as error:
        raise DatasetError(f"{output}: no Croissant description; {advice}") from error
    given = {"base_url": url.rpartition("/")[0]} if is_a(URL_KIND, url) else {}
    facts = gather_facts(csv_path, hashed=f'"{IMAGES_SET}/sha256"' in json.dumps(then))
    now = build_metadata(facts, output, given, {})
    raise_problems([one for part in then for one in differences(now[part], then[part], part)])
    check_reload(output, facts, bool(given))
    return f"{output} agrees with the dataset\n{summary(facts)}"


def differences(now: object, then: object, where: str) -> Iterator[str]:
    """Yield what differs between two values of JSON; the items of a list go by their names."""
    if isinstance(now, list) and isinstance(then, list):
        if len(now) != len(then):
            yield f"{where} has {len(now):,} items, described as {len(then):,}"
        now, then = ({item_name(item): item for item in items} for items in (now, then))
    if isinstance(now, dict) and isinstance(then, dict):
        for key in now | then:
            if key == "description":  # its words may be the author's, or an older version's
                continue
            yield from differences(now.get(key), then.get(key), f"{where}/{key}")
    elif now != then:
        shown = ("missing" if one is None else str(one)[:MAX_CELL] for one in (now, then))
        yield "{} is {}, described as {}".format(where, *shown)


def item_name(item: object) -> str:
    """Return what names an item of a list: its id or, in the data of a record set, its key."""
    if isinstance(item, dict):
        return str(item.get("@id") or item.get(f"{IMAGES_SET}/jid") or [*item.values()][:1])
    return str(item)


def checked(kind: str, text: str) -> str:
    """Return a text of the command line; the parser refuses what is not of its kind."""
    if not is_a(kind, text):
        raise argparse.ArgumentTypeError(f"expected {kind}, got {text!r}")
    return text


def license_url(text: str) -> str:
    """Return a URL as it is, and for an SPDX id its page at spdx.org."""
    if is_a(URL_KIND, text):
        return text
    with suppress(InvalidLicenseExpression):
        spdx_id = canonicalize_license_expression(text)
        if re.fullmatch(r"(?!LicenseRef-)[\w.-]+", spdx_id):
            return f"https://spdx.org/licenses/{spdx_id}"
    raise argparse.ArgumentTypeError(f"expected an SPDX id as CC-BY-4.0 or a URL, got {text!r}")


def party(text: str) -> mlc.Person | mlc.Organization:
    """Return who `name,email,url` is: after 'org:' an organization, else a person."""
    patterns = {"name": ".+", "email": r"([^@\s]+@[^@\s]+)?", "url": f"({PATTERNS[URL_KIND]})?"}
    texts = [part.strip() for part in text.removeprefix("org:").split(",")]
    fits = all(map(re.fullmatch, patterns.values(), texts))
    if not fits or len(texts) > len(patterns):
        raise argparse.ArgumentTypeError(f"expected name,email,url, no commas within, got {text!r}")
    kind = mlc.Organization if text.startswith("org:") else mlc.Person
    return kind(**dict(zip(patterns, (one or None for one in texts), strict=False)))


def keywords(text: str) -> list[str]:
    """Return the words of a list with commas."""
    return [word.strip() for word in checked(TEXT_KIND, text).split(",") if word.strip()]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    csv_path, output = (f"./hackathon_dataset/{name}" for name in (INDEX_NAME, CROISSANT_NAME))
    add("-c", "--csv_path", type=Path, default=csv_path, help="index of the dataset")
    add("-o", "--output", type=Path, default=output, help="description to write")
    text, url, day, version = (partial(checked, kind) for kind in PATTERNS)
    options = {
        "name": (text, "name of the dataset, otherwise that of its folder"),
        "description": (text, "what it is about; what was counted is added"),
        "license": (license_url, "SPDX id or URL"),
        "url": (url, "page of the dataset"),
        "creator": (party, "name,email,url of a person, or org:name,...; repeat it for more"),
        "publisher": (party, "the same, of who publishes it"),
        "version": (version, "MAJOR.MINOR.PATCH"),
        "date_published": (day, "YYYY-MM-DD, otherwise the day of the index"),
        "cite_as": (text, "citation, BibTeX for choice"),
        "keywords": (keywords, "what to find it by, separated by commas"),
        "rai": (Path, "JSON file with terms of responsible AI and provenance"),
        "base_url": (url, "where the index is published: makes its URL absolute"),
    }
    nothing = argparse.SUPPRESS  # no attribute where the option is not used
    for name, (kind, help_text) in options.items():
        many = {"action": "append", "dest": "creators"} if name == "creator" else {}
        add(f"--{name}", type=kind, default=nothing, help=help_text, **many)
    sums = "add the checksums of the tensors"
    add("--image_sha256", action="store_true", default=nothing, help=sums)
    add("--check", action="store_true", help="write nothing; compare an existing description")
    args = parser.parse_args(argv)
    if args.check and (useless := vars(args).keys() - {"csv_path", "output", "check"}):
        name = min(useless).replace("creators", "creator")
        parser.error(f"--check writes nothing: --{name} would have no effect")
    if args.csv_path.suffix != ".csv" or args.output.suffix != ".json":
        parser.error("--csv_path must be named *.csv, and --output *.json")
    if "base_url" in args and set("?#") & set(args.base_url):
        parser.error(f"--base_url: expected a URL without ? and #, got {args.base_url!r}")
    csv_folder, output_folder = (p.parent.resolve() for p in (args.csv_path, args.output))
    if not (args.check or "base_url" in args or csv_folder.is_relative_to(output_folder)):
        parser.error(
            f"--output must lie in {args.csv_path.parent} or above it, or be used with --base_url:"
            " Croissant has paths only to what lies below its own folder"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # what is not stated is listed at the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that it cannot print
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.check:
            report = check_description(args.csv_path, args.output)
        else:
            report = write_croissant(args.csv_path, args.output, vars(args))
        print(report, flush=True)
    except (DatasetError, OSError) as error:
        for line in str(error).splitlines():
            LOG.error(line)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted: nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
