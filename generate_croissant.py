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
import sys
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from urllib.parse import quote

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
    "peak": f"Highest pixel in the difference image, DN/s. {EMPTY}",
    "flux": f"Flux in the difference image, DN/s; may be negative. {EMPTY}",
    "mag": "Instrumental magnitude, mag: -2.5 log10(flux). Empty where the flux is not positive.",
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
KEY = ("jid", "id")  # names a candidate
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
PATTERNS = {  # of what the user gives
    TEXT_KIND: r"(?s).*\S.*",
    URL_KIND: r"https?://[^\s/?#]+\S*",
    DATE_KIND: r"\d{4}-\d\d-\d\d",
    # As semver.org has it: three numbers, of a pre-release -words or numbers, of a build +words.
    VERSION_KIND: rf"{NUMBER}(\.{NUMBER}){{2}}(-{PRE}(\.{PRE})*)?(\+{WORD}(\.{WORD})*)?",
}
PART_ROWS = 100_000  # of the index in memory at a time: some 60 MB
MAX_PROBLEMS = 20  # that a run lists
# What numpy raises on a damaged .npy header.
NPY_ERRORS = (OSError, ValueError, OverflowError, SyntaxError, tokenize.TokenError)
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
        """Number of real candidates, and their share."""
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
        int64 `candidates` and `real` of each `jid`, in the order of the index.
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
    jobs, keys, empty, first = [], [], Counter(), []
    texts = dict.fromkeys(TEXT_COLUMNS, str)
    options = {"chunksize": PART_ROWS, "index_col": False, "dtype": texts, "low_memory": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            check_header(pd.read_csv(csv_path, header=None, nrows=1, dtype=str).iloc[0].tolist())
            for part in pd.read_csv(csv_path, **options):
                part = checked_rows(part)
                empty.update(part.isna().sum().to_dict())
                first = first or part[:1].to_dict("records")
                jobs.append(part.groupby("jid", sort=False)["label"].agg(["size", "sum"]))
                keys.append(part[list(KEY)])
    except (ValueError, pd.errors.ParserWarning) as error:
        raise DatasetError(f"not a readable CSV file: {one_line(error)}") from error
    if not first:
        raise DatasetError("no candidates in it; there is nothing to describe")
    keys = pd.concat(keys)
    refuse_rows(keys, {"jid and id of another row": keys.duplicated() & keys["id"].notna()})
    jobs = pd.concat(jobs).groupby(level="jid", sort=False).sum().astype(int)
    return jobs.set_axis(["candidates", "real"], axis="columns"), empty, first[0]


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
    given = part[list(NUMBER_COLUMNS)]
    numbers = given.apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = {
        f"a {column} that is no number": (numbers[column].isna() & given[column].notna())
        | (given[column].dtype == bool)
        for column in NUMBER_COLUMNS
    }
    wrong |= {f"no {column}": part[column].isna() for column in TEXT_COLUMNS}
    wrong |= {f"no finite {column}": ~np.isfinite(numbers[column]) for column in REQUIRED_NUMBERS}
    path = IMAGES_DIR + "/" + part["jid"] + ".npy"
    wrong |= {
        "a label other than 0 and 1": ~numbers["label"].isin([0, 1]),
        "a label that contradicts match": (numbers["label"] == 1) != (numbers["match"] != NO_MATCH),
        "an image_filename other than images/<jid>.npy": (part["image_filename"] != path)
        | part["jid"].str.contains(r"[/\\]", na=False),
    }
    refuse_rows(part, wrong)
    return part.assign(**numbers)


def refuse_rows(rows: pd.DataFrame, wrong: dict[str, pd.Series]) -> None:
    """Raise DatasetError at the first row for which one of the masks is true."""
    for what, mask in wrong.items():
        if mask.any():
            row = rows.loc[mask.idxmax()]
            cells = (f"{c} {row[c]}" for c in rows if c in KEY or c in what.split())
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
    except NPY_ERRORS as error:
        raise DatasetError(f"{path}: not a whole .npy file: {one_line(error)}") from error
    channels = len(CHANNEL_NAMES)
    if tensor.dtype != np.dtype("<f4") or tensor.shape[2:] != (channels,):
        raise DatasetError(
            f"{path}: {tensor.dtype} {tensor.shape}; expected float32 (H, W, {channels})"
        )
    if not tensor.flags.c_contiguous:
        raise DatasetError(f"{path}: Fortran order; expected C order")
    if path.stat().st_size != tensor.offset + tensor.nbytes:
        raise DatasetError(f"{path}: longer than its header says; run create_dataset.py again")
    return tensor.shape[:2]


def survey_images(folder: Path, jobs: pd.DataFrame, hashed: bool) -> tuple[list[dict], list[str]]:
    """Return a record of IMAGE_FIELDS for each tensor, and what is wrong with the tensors."""
    found = {path.stem for path in (folder / IMAGES_DIR).glob("*.npy")}
    jobs = jobs.reindex([*jobs.index, *sorted(found - set(jobs.index))], fill_value=0)
    images, problems = [], []
    bar = tqdm(jobs.index, desc="tensors", unit="", delay=1, disable=None, leave=False)
    for jid, (candidates, real) in zip(bar, jobs.to_numpy().tolist(), strict=True):
        name = f"{IMAGES_DIR}/{jid}.npy"
        images.append({"jid": jid, "image_filename": name, "candidates": candidates, "real": real})
        try:
            images[-1] |= zip(("height", "width"), tensor_shape(folder / name), strict=True)
            if hashed:
                images[-1]["sha256"] = file_sha256(folder / name)
        except DatasetError as error:
            problems.append(str(error))
    return images, problems


def gather_facts(csv_path: Path, hashed: bool) -> tuple[Facts, list[str]]:
    """Read and check a dataset and return its facts, and what is wrong with its tensors.

    Raises DatasetError where the index is missing or wrong.
    """
    try:
        jobs, empty, first = survey_index(csv_path)
    except DatasetError as error:
        raise DatasetError(f"{csv_path}: {error}") from error
    images, problems = survey_images(csv_path.parent, jobs, hashed)
    return Facts(csv_path, file_sha256(csv_path), images, empty, first), problems


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
            f"Classes are unbalanced as they come: {facts.real} of {facts.candidates:,} candidates"
            " are real.",
            "A source that was neither injected nor simulated has no match and counts as bogus.",
            "Candidates of one job share its sky, PSF and flaws: split by job, not by candidate.",
        ],
        "rai:dataManipulationProtocol": "Left out: candidates without a finite position on their"
        " image, and, whole, jobs without all four images or without labels.",
        "rai:dataPreprocessingProtocol": [
            "Each image is scaled between the limits that astropy's ZScaleInterval finds at its"
            " defaults among its finite pixels, and clipped to [0, 1].",
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
    """Return what wrote the dataset and this description, with the versions that are known here."""
    versions = {"Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "@type": "prov:Activity",
        "name": "From job folders to tensors, index and description",
        "description": "create_dataset.py wrote tensors and index; generate_croissant.py checked"
        " and described them, with the software named here.",
        "prov:wasAssociatedWith": [
            {"@type": "prov:SoftwareAgent", "name": name, "softwareVersion": version}
            for name, version in versions.items()
        ],
    }


def read_rai(path: Path) -> dict[str, object]:
    """Read the file of --rai; raise DatasetError where it is no JSON object of known terms."""
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(given, dict):
        raise DatasetError(f'{path}: expected an object such as {{"rai:dataBiases": "..."}}')
    known = (*RAI_ONE, *RAI_MANY, *RAI_EXTRA)
    for term, value in given.items():
        if term not in known:
            near = difflib.get_close_matches(term, known, n=1) or sorted(known)
            raise DatasetError(f"{path}: unknown term '{term}'; expected {' or '.join(near)}")
        if expected := misfit(term, value):
            raise DatasetError(f"{path}: {term} is {value!r}; expected {expected}")
    return given


def misfit(term: str, value: object) -> str:
    """Return what a term of --rai takes, or nothing where the value is such."""
    if term == "rai:hasSyntheticData":
        return "" if isinstance(value, bool) else "true or false"
    if term == "prov:wasGeneratedBy":
        return "" if value and isinstance(value, str | dict | list) else "a text or an object"
    kinds = {"rai:dataCollectionTimeframe": DATE_KIND, "prov:wasDerivedFrom": URL_KIND}
    kind, many = kinds.get(term, TEXT_KIND), term not in RAI_ONE
    values = value if many and isinstance(value, list) else [value]
    good = values and all(is_a(kind, one) for one in values)
    return "" if good else kind + (" or a list of such" if many else "")


def is_a(kind: str, value: object) -> bool:
    """Tell whether a value is a text of one kind of PATTERNS."""
    if not isinstance(value, str) or not re.fullmatch(PATTERNS[kind], value):
        return False
    with suppress(ValueError):
        return kind != DATE_KIND or bool(date.fromisoformat(value))
    return False


def record_set(
    ctx: mlc.Context, name: str, description: str, fields: dict[str, str], data: list[dict], **more
) -> mlc.RecordSet:
    """Return a record set with the records `data`, or else with the rows of the index."""
    made = []
    for field, text in fields.items():
        extract = mlc.Extract(ctx=ctx, column=field)
        index = {"source": mlc.Source(ctx=ctx, file_object=INDEX_ID, extract=extract)}
        texts = {"id": f"{name}/{field}", "name": field, "description": text}
        types = [TYPES.get(field, mlc.DataType.FLOAT64)]
        made.append(mlc.Field(ctx=ctx, data_types=types, **texts, **({} if data else index)))
    rows = [{f"{name}/{field}": row[field] for field in fields} for row in data]
    texts = {"id": name, "name": name, "description": description}
    return mlc.RecordSet(ctx=ctx, fields=made, data=rows or None, **texts, **more)


def candidates_set(ctx: mlc.Context, array_shape: str) -> mlc.RecordSet:
    """Return the record set of the candidates; the tensor is an annotation of its path."""
    text = "One record per candidate; jid and id name it, where its catalog has ids."
    key = [f"{RECORD_SET}/{column}" for column in KEY]
    candidates = record_set(ctx, RECORD_SET, text, FIELDS, [], key=key)
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


def labels_set(ctx: mlc.Context) -> mlc.RecordSet:
    """Return the record set that says what the labels mean."""
    data = [dict(zip(LABEL_FIELDS, label, strict=True)) for label in LABELS]
    more = {"key": [f"{LABELS_SET}/label"], "data_types": [ENUMERATION]}
    return record_set(ctx, LABELS_SET, "What the labels mean.", LABEL_FIELDS, data, **more)


def images_set(ctx: mlc.Context, images: list[dict]) -> mlc.RecordSet:
    """Return the record set of the images, with their checksums where these were made."""
    fields = {field: text for field, text in IMAGE_FIELDS.items() if field in images[0]}
    key = [f"{IMAGES_SET}/jid"]
    return record_set(ctx, IMAGES_SET, "One record per job.", fields, images, key=key)


def distribution(
    ctx: mlc.Context, facts: Facts, output: Path, base_url: str | None
) -> list[mlc.FileObject | mlc.FileSet]:
    """Return index and tensors, relative to the folder of `output` or, the index, to `base_url`."""
    csv_path, folder = facts.csv_path, Path()
    if not base_url:
        folder = csv_path.parent.resolve().relative_to(output.parent.resolve())
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


def default_date(csv_path: Path) -> datetime:
    """Return the day of SOURCE_DATE_EPOCH, or else of the index's last change, UTC."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH") or csv_path.stat().st_mtime
    try:
        day = datetime.fromtimestamp(int(seconds), tz=UTC).date()
    except (ValueError, OverflowError, OSError) as error:
        raise DatasetError(f"SOURCE_DATE_EPOCH is {seconds!r}; expected seconds") from error
    return datetime.combine(day, time())


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
    metadata = mlc.Metadata(
        ctx=ctx,
        conforms_to=[CONFORMS_TO, CONFORMS_TO_RAI],
        description=f"{given.get('description', '')} {describe(facts)}".lstrip(),
        date_modified=modified,
        **stated,
        distribution=distribution(ctx, facts, output, given.get("base_url")),
        record_sets=[
            candidates_set(ctx, facts.array_shape),
            labels_set(ctx),
            images_set(ctx, facts.images),
        ],
        **{snake_case(term): value for term, value in terms.items() if term not in RAI_EXTRA},
    ).to_json()
    metadata = {MISNAMED.get(term, term): value for term, value in metadata.items()}
    last = {term: metadata.pop(term) for term in ("distribution", "recordSet")}
    return metadata | {term: terms[term] for term in RAI_EXTRA if term in terms} | last


def check_reload(json_path: Path, facts: Facts, mapping: dict[str, Path] | None) -> None:
    """Load a description with mlcroissant and read a record of each of its record sets.

    Raises
    ------
    DatasetError
        mlcroissant finds a fault, or reads something else than the index holds.
    """
    try:
        dataset = mlc.Dataset(jsonld=json_path, mapping=mapping)
        names = [record_set.id for record_set in dataset.metadata.record_sets]
        first = {name: next(iter(dataset.records(name))) for name in names}
    except (mlc.ValidationError, mlc.GenerationError, ValueError, OSError) as error:
        raise DatasetError(f"mlcroissant refuses the description: {one_line(error)}") from error
    for column, value in facts.first.items():
        read = first[RECORD_SET][f"{RECORD_SET}/{column}"]
        read = read.decode() if isinstance(read, bytes) else read
        if not (read == value or (read is None and pd.isna(value))):
            raise DatasetError(f"mlcroissant reads {column} as {read!r}; the index has {value!r}")


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


def write_croissant(csv_path: Path, output: Path, given: dict) -> str:
    """Describe a dataset, put the description under its name once it reloads, and sum it up.

    Raises
    ------
    DatasetError
        The dataset is damaged, or the description cannot be written or reloaded.
    """
    rai = read_rai(given["rai"]) if "rai" in given else {}
    facts, problems = gather_facts(csv_path, "image_sha256" in given)
    raise_problems(problems)
    try:
        metadata = build_metadata(facts, output, given, rai)
    except (mlc.ValidationError, ValueError) as error:
        raise DatasetError(f"mlcroissant refuses the description: {one_line(error)}") from error
    with atomic_write(output) as temporary:
        text = json.dumps(metadata, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        check_reload(temporary, facts, {INDEX_ID: csv_path} if "base_url" in given else None)
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
    """Hold an existing description against the dataset; raise DatasetError with the differences.

    Returns the closing lines of the run.
    """
    if not output.is_file():
        raise DatasetError(f"{output}: no such file; run without --check to write it")
    try:
        metadata = mlc.Dataset(jsonld=output).metadata
        sha256 = {file.id: file.sha256 for file in metadata.file_objects}[INDEX_ID]
        (data,) = (one.data for one in metadata.record_sets if one.id == IMAGES_SET)
        rows = [{name.rpartition("/")[2]: cell for name, cell in row.items()} for row in data]
        images = {row["jid"]: row for row in rows}
    except MLCROISSANT_ERRORS as error:
        raise DatasetError(
            f"{output}: not a description that this script writes:"
            f" {type(error).__name__} {one_line(error)}"
        ) from error
    hashed = any("sha256" in image for image in images.values())
    facts, problems = gather_facts(csv_path, hashed)
    raise_problems([*differences(facts, sha256, images), *problems])
    return f"{output} agrees with the dataset\n{summary(facts)}"


def differences(facts: Facts, sha256: str, described: dict[str, dict]) -> list[str]:
    """Return how a dataset differs from its description: checksum of the index, and images."""
    found = {image["jid"]: image for image in facts.images}
    candidates = sum(image["candidates"] for image in described.values())
    pairs = {
        f"{facts.csv_path}: sha256": (facts.sha256, sha256),
        "number of jobs": (len(found), len(described)),
        "number of candidates": (facts.candidates, candidates),
    }
    for jid in sorted(found.keys() | described.keys()):
        now, then = found.get(jid), described.get(jid)
        if now and then:
            fields = (field for field in then if field in now)  # not of a tensor that is damaged
            pairs |= {f"{jid}: {field}": (now[field], then[field]) for field in fields}
        else:
            pairs[f"job {jid}"] = tuple("there" if image else "missing" for image in (now, then))
    changed = ((what, now, then) for what, (now, then) in pairs.items() if now != then)
    return [f"{what} is {now}, described as {then}" for what, now, then in changed]


def matching(kind: str) -> Callable[[str], str]:
    """Return a function that lets only texts of one kind of PATTERNS pass."""

    def check(text: str) -> str:
        if not is_a(kind, text):
            raise argparse.ArgumentTypeError(f"expected {kind}, got {text!r}")
        return text

    return check


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
        raise argparse.ArgumentTypeError(f"expected name,email,url, got {text!r}")
    kind = mlc.Organization if text.startswith("org:") else mlc.Person
    return kind(**dict(zip(patterns, (one or None for one in texts), strict=False)))


def keywords(text: str) -> list[str]:
    """Return the words of a list with commas."""
    return [matching(TEXT_KIND)(word).strip() for word in text.split(",")]


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
    text, url = matching(TEXT_KIND), matching(URL_KIND)
    options = {
        "name": (text, "name of the dataset, otherwise that of its folder"),
        "description": (text, "what it is about; what was counted is added"),
        "license": (license_url, "SPDX id or URL"),
        "url": (url, "page of the dataset"),
        "creator": (party, "name,email,url of a person, or org:name,...; repeat it for more"),
        "publisher": (party, "the same, of who publishes it"),
        "version": (matching(VERSION_KIND), "MAJOR.MINOR.PATCH"),
        "date_published": (matching(DATE_KIND), "YYYY-MM-DD, otherwise the day of the index"),
        "cite_as": (text, "citation, BibTeX for choice"),
        "keywords": (keywords, "what to find it by, separated by commas"),
        "rai": (Path, "JSON file with terms of responsible AI and provenance"),
        "base_url": (url, "where the index is published: makes its URL absolute"),
    }
    nothing = argparse.SUPPRESS  # no attribute where the option is not used
    for name, (kind, help_text) in options.items():
        many = {"action": "append", "dest": "creators"} if name == "creator" else {}
        add(f"--{name}", type=kind, default=nothing, help=help_text, **many)
    texts = "add the checksums of the tensors"
    add("--image_sha256", action="store_true", default=nothing, help=texts)
    add("--check", action="store_true", help="write nothing; compare an existing description")
    args = parser.parse_args(argv)
    if args.check and (useless := vars(args).keys() - {"csv_path", "output", "check"}):
        parser.error(f"--check writes nothing: {min(useless)} would have no effect")
    csv_folder, output_folder = (p.parent.resolve() for p in (args.csv_path, args.output))
    if args.output.suffix != ".json":
        parser.error(f"--output must be named *.json, not {args.output.name}")
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
    sys.exit(main())
