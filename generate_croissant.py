#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3",
#     "pandas>=3.1,<4",
#     "mlcroissant>=1.1.1,<1.2",
# ]
# ///
"""Describe a dataset of create_dataset.py in croissant.json (MLCommons Croissant 1.1).

Read: `master_index.csv`, which is checked whole, and the headers of the tensors that it names.

Written: `croissant.json` beside it, with the index and its checksum, the tensors, and the record
set `transient_candidates`, a field for each column. It gets its name only after mlcroissant has
loaded it and read a record through it.

    python generate_croissant.py
    python generate_croissant.py -c ./my_dataset/master_index.csv -o ./my_dataset/croissant.json

Exit codes: 0 written; 1 the dataset is damaged or the file cannot be written (the reason is on
stderr); 2 wrong usage; 130 interrupted by Ctrl-C.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import sys
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import mlcroissant as mlc
import numpy as np
import pandas as pd

CHANNEL_NAMES = ("science", "reference", "difference", "score")
CROISSANT_NAME = "croissant.json"
INDEX_NAME = "master_index.csv"
IMAGES_DIR = "images"
RECORD_SET = "transient_candidates"
INDEX_ID, TENSORS_ID = "master-index", "image-tensors"  # ids of the two resources
NO_MATCH = -1  # `match` of a candidate with no source within the match radius
EMPTY = "Empty where the catalog has no value."
FIELDS = {  # column of the index: its type and what it means, in the order of the columns
    "id": (mlc.DataType.FLOAT64, f"Number of the candidate in its job's finder catalog. {EMPTY}"),
    "jid": (mlc.DataType.TEXT, "Job: the image-differencing run that the candidate is from."),
    "x": (mlc.DataType.FLOAT64, "Column, pixels, 0-based; an integer is a pixel's centre."),
    "y": (mlc.DataType.FLOAT64, "Row, pixels, 0-based; an integer is a pixel's centre."),
    "sharpness": (
        mlc.DataType.FLOAT64,
        "DAOFIND sharpness, dimensionless: the peak above its surroundings over the height of the"
        f" fitted Gaussian; high for cosmic rays and hot pixels. {EMPTY}",
    ),
    "roundness1": (
        mlc.DataType.FLOAT64,
        f"DAOFIND roundness from symmetry, dimensionless, 0 for a round source. {EMPTY}",
    ),
    "roundness2": (
        mlc.DataType.FLOAT64,
        "DAOFIND roundness from the heights of the Gaussians fitted to the sums along x and y,"
        f" dimensionless, 0 for a round source. {EMPTY}",
    ),
    "npix": (mlc.DataType.FLOAT64, f"Number of pixels in the finder's kernel. {EMPTY}"),
    "peak": (
        mlc.DataType.FLOAT64,
        f"Highest pixel of the candidate in the difference image, DN/s. {EMPTY}",
    ),
    "flux": (
        mlc.DataType.FLOAT64,
        f"Flux of the candidate in the difference image, DN/s; may be negative. {EMPTY}",
    ),
    "mag": (
        mlc.DataType.FLOAT64,
        "Instrumental magnitude, -2.5 log10(flux). Empty where the flux is not positive.",
    ),
    "daofind_mag": (
        mlc.DataType.FLOAT64,
        f"DAOFIND magnitude, -2.5 log10 of the peak density over the detection threshold. {EMPTY}",
    ),
    "flags": (
        mlc.DataType.FLOAT64,
        f"Bit flags of the PSF photometry, 0 where nothing was noticed. {EMPTY}",
    ),
    "match": (
        mlc.DataType.FLOAT64,
        "Number of the injected or simulated source that it matches, -1 where there is none.",
    ),
    "label": (mlc.DataType.INT64, "1: real (match is not -1); 0: bogus (match is -1)."),
    "image_filename": (
        mlc.DataType.TEXT,
        "Path of the job's image tensor, relative to the folder of this file.",
    ),
}
INDEX_COLUMNS = tuple(FIELDS)
TEXT_COLUMNS = ("jid", "image_filename")
REQUIRED_COLUMNS = ("jid", "x", "y", "match", "label", "image_filename")  # no cell may be empty
# What numpy raises on a damaged .npy header.
NPY_ERRORS = (OSError, ValueError, OverflowError, SyntaxError, tokenize.TokenError)
CONTEXT_1_1 = {  # terms of Croissant 1.1 that mlcroissant 1.1.1 leaves out of the context it writes
    "annotation": "cr:annotation",
    "arrayShape": "cr:arrayShape",
    "containedIn": "cr:containedIn",
    "excludes": "cr:excludes",
    "isArray": "cr:isArray",
    "prov": "http://www.w3.org/ns/prov#",
    "readLines": "cr:readLines",
    "sdVersion": "cr:sdVersion",
    "unArchive": "cr:unArchive",
}
CONFORMS_TO = "http://mlcommons.org/croissant/1.1"
USER_KNOWS = ("license", "url", "creator", "version", "citeAs")  # never invented here

LOG = logging.getLogger("generate_croissant")


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


@dataclass(frozen=True)
class DatasetFacts:
    """What the description says about the dataset, all of it counted."""

    jobs: int  # with candidates
    tensors: int
    candidates: int
    real: int
    shape: tuple[int, int]  # height and width, pixels; -1 where the images differ


def one_line(error: Exception) -> str:
    """Return the text of an error on one line."""
    return " ".join(str(error).split())


def read_index(csv_path: Path) -> pd.DataFrame:
    """Read the index and check its columns, types, labels and keys.

    Returns
    -------
    pandas.DataFrame
        INDEX_COLUMNS, a row per candidate; `label` is int64, texts are str, the others float64.

    Raises
    ------
    DatasetError
        The file is missing or no such index; the text does not name the file.
    """
    if not csv_path.is_file():
        raise DatasetError("no such file; create_dataset.py writes it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            # From bytes: pandas would take a Ctrl-C while it reads the file for a damaged file.
            source = io.BytesIO(csv_path.read_bytes())
            index = pd.read_csv(source, encoding="utf-8", low_memory=False, index_col=False)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise DatasetError(f"not a readable CSV file: {one_line(error)}") from error
    if tuple(index.columns) != INDEX_COLUMNS:
        raise DatasetError(describe_columns(tuple(index.columns)))
    if index.empty:
        raise DatasetError("no candidates in it; there is nothing to describe")
    index = pd.DataFrame({column: checked_column(index[column]) for column in INDEX_COLUMNS})
    check_consistency(index)
    return index


def describe_columns(found: tuple[str, ...]) -> str:
    """Say how the columns that were found differ from INDEX_COLUMNS."""
    missing = [column for column in INDEX_COLUMNS if column not in found]
    extra = [column for column in found if column not in INDEX_COLUMNS]
    if missing or extra:
        return (
            f"not the columns of {INDEX_NAME}: missing {', '.join(missing) or 'none'};"
            f" not expected {', '.join(extra) or 'none'}"
        )
    return f"the columns are out of order; expected {', '.join(INDEX_COLUMNS)}"


def checked_column(cells: pd.Series) -> pd.Series:
    """Return a column in its type; raise DatasetError at its first cell that does not fit."""
    if cells.name in TEXT_COLUMNS:
        wrong, expected, typed = cells.isna(), "a text", cells.astype(str)
    else:
        numbers = pd.to_numeric(
            cells.astype(str) if cells.dtype == bool else cells, errors="coerce"
        )
        wrong, expected, typed = numbers.isna() & cells.notna(), "a number", numbers.astype(float)
        if cells.name in REQUIRED_COLUMNS:
            wrong |= ~np.isfinite(numbers)
        if cells.name == "label":
            wrong, expected = ~numbers.isin([0, 1]), "0 or 1"
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DatasetError(
            f"column '{cells.name}' holds '{cells.iloc[row]}' in row {row + 1}; expected {expected}"
        )
    return typed.astype(np.int64) if cells.name == "label" else typed


def check_consistency(index: pd.DataFrame) -> None:
    """Raise DatasetError where a label contradicts `match`, a path its job, or a key repeats."""
    wrong = index["label"] != (index["match"] != NO_MATCH)
    if wrong.any():
        row = index[wrong].iloc[0]
        raise DatasetError(
            f"{wrong.sum()} labels contradict match; the first: label {row['label']}, match"
            f" {row['match']:g} (job {row['jid']}, id {row['id']:.17g})"
        )
    wrong = index["image_filename"] != IMAGES_DIR + "/" + index["jid"] + ".npy"
    wrong |= index["jid"].str.contains(r"[/\\]")
    if wrong.any():
        row = index[wrong].iloc[0]
        raise DatasetError(
            f"image_filename '{row['image_filename']}' of job '{row['jid']}': expected"
            f" {IMAGES_DIR}/<jid>.npy"
        )
    twice = index.duplicated(["jid", "id"]) & index["id"].notna()
    if twice.any():
        row = index[twice].iloc[0]
        raise DatasetError(f"id {row['id']:.17g} of job '{row['jid']}' occurs more than once")


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


def gather_facts(csv_path: Path) -> tuple[pd.DataFrame, DatasetFacts]:
    """Read and check the index and all tensors beside it; raise DatasetError at what is wrong."""
    try:
        index = read_index(csv_path)
    except DatasetError as error:
        raise DatasetError(f"{csv_path}: {error}") from error
    folder = csv_path.parent
    named = set(index["image_filename"])
    found = {f"{IMAGES_DIR}/{path.name}" for path in (folder / IMAGES_DIR).glob("*.npy")}
    shapes = {tensor_shape(folder / name) for name in sorted(named | found)}
    if found - named:
        LOG.warning(
            f"{folder / IMAGES_DIR}: {len(found - named)} tensors have no candidate in the index;"
            " the file set includes them"
        )
    heights, widths = ({shape[axis] for shape in shapes} for axis in (0, 1))
    return index, DatasetFacts(
        jobs=len(named),
        tensors=len(found),
        candidates=len(index),
        real=int(index["label"].sum()),
        shape=tuple(sizes.pop() if len(sizes) == 1 else -1 for sizes in (heights, widths)),
    )


def describe(facts: DatasetFacts) -> str:
    """Return the description of the dataset, from counted facts."""
    height, width = facts.shape
    size = "of several sizes" if -1 in facts.shape else f"of {height} x {width} pixels"
    return (
        f"Candidate transients of {facts.jobs:,} image-differencing jobs in the file layout of"
        f" RAPID: {facts.candidates:,} candidates, of which {facts.real:,}"
        f" ({facts.real / facts.candidates:.1%}) are real and the others bogus detections."
        f" {facts.tensors:,} image tensors {size}, one a job, with the channels"
        f" {', '.join(CHANNEL_NAMES)}, each ZScale-normalised to [0, 1]; masked pixels have the"
        " value of zero flux."
    )


def candidate_fields(ctx: mlc.Context, facts: DatasetFacts) -> list[mlc.Field]:
    """Return the fields of the record set, with the tensor as an annotation of its path."""
    fields = [
        mlc.Field(
            ctx=ctx,
            id=f"{RECORD_SET}/{column}",
            name=column,
            description=description,
            data_types=[data_type],
            source=mlc.Source(
                ctx=ctx, file_object=INDEX_ID, extract=mlc.Extract(ctx=ctx, column=column)
            ),
        )
        for column, (data_type, description) in FIELDS.items()
    ]
    height, width = facts.shape
    tensor = mlc.Field(
        ctx=ctx,
        id=f"{RECORD_SET}/image_filename/tensor",
        name="tensor",
        description=f"The tensor at that path; last axis: {', '.join(CHANNEL_NAMES)}.",
        data_types=[mlc.DataType.FLOAT32],
        is_array=True,
        array_shape=f"{height},{width},{len(CHANNEL_NAMES)}",
        source=mlc.Source(
            ctx=ctx,
            file_set=TENSORS_ID,
            extract=mlc.Extract(ctx=ctx, file_property="content"),
        ),
    )
    fields[INDEX_COLUMNS.index("image_filename")].annotations = [tensor]
    return fields


def build_metadata(csv_path: Path, facts: DatasetFacts) -> dict:
    """Return the whole description as a JSON-LD dictionary."""
    rdf = mlc.Rdf(context={**mlc.Rdf().context, **CONTEXT_1_1})
    ctx = mlc.Context(conforms_to=CONFORMS_TO, rdf=rdf)
    with csv_path.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    index_file = mlc.FileObject(
        ctx=ctx,
        id=INDEX_ID,
        name=csv_path.name,
        description="One row per candidate: position, finder statistics, label, tensor path.",
        content_url=csv_path.name,
        encoding_formats=[mlc.EncodingFormat.CSV],
        sha256=sha256,
    )
    tensors = mlc.FileSet(
        ctx=ctx,
        id=TENSORS_ID,
        name="image tensors",
        description=f"One .npy a job, float32 (H, W, {len(CHANNEL_NAMES)}) in [0, 1].",
        includes=[f"{IMAGES_DIR}/*.npy"],
        encoding_formats=["application/x-numpy"],
    )
    candidates = mlc.RecordSet(
        ctx=ctx,
        id=RECORD_SET,
        name=RECORD_SET,
        description="One record per candidate; jid and id name it, where its catalog has ids.",
        fields=candidate_fields(ctx, facts),
    )
    modified = datetime.fromtimestamp(csv_path.stat().st_mtime, tz=UTC)
    return mlc.Metadata(
        ctx=ctx,
        conforms_to=[CONFORMS_TO],
        name=csv_path.resolve().parent.name,
        description=describe(facts),
        date_published=datetime(modified.year, modified.month, modified.day),
        distribution=[index_file, tensors],
        record_sets=[candidates],
    ).to_json()


def check_reload(json_path: Path, index: pd.DataFrame) -> None:
    """Load a description with mlcroissant and compare its first record with the index.

    Raises
    ------
    DatasetError
        mlcroissant finds a fault, or reads something else than the index holds.
    """
    try:
        records = mlc.Dataset(jsonld=json_path).records(RECORD_SET)
        record = next(iter(records))
    except (mlc.ValidationError, mlc.GenerationError, ValueError, OSError) as error:
        raise DatasetError(f"mlcroissant refuses the description: {one_line(error)}") from error
    for column, value in index.iloc[0].items():
        read = record[f"{RECORD_SET}/{column}"]
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


def write_croissant(csv_path: Path, output: Path) -> tuple[DatasetFacts, dict]:
    """Check the dataset, describe it, and put the description under its name once it reloads.

    Raises
    ------
    DatasetError
        The dataset is damaged, or the description cannot be written or reloaded.
    """
    index, facts = gather_facts(csv_path)
    try:
        metadata = build_metadata(csv_path, facts)
    except mlc.ValidationError as error:
        raise DatasetError(f"mlcroissant refuses the description: {one_line(error)}") from error
    with atomic_write(output) as temporary:
        text = json.dumps(metadata, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        check_reload(temporary, index)
    return facts, metadata


def summary(facts: DatasetFacts, metadata: dict, output: Path) -> str:
    """Return the closing lines of a run."""
    missing = [term for term in USER_KNOWS if term not in metadata]
    return (
        f"{output}\n"
        f"  described    {facts.tensors:,} tensors, {facts.candidates:,} candidates,"
        f" {facts.real:,} real\n"
        f"  not stated   {', '.join(missing)}"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    csv_path, output = (f"./hackathon_dataset/{name}" for name in (INDEX_NAME, CROISSANT_NAME))
    add("-c", "--csv_path", type=Path, default=csv_path, help="index of the dataset")
    add("-o", "--output", type=Path, default=output, help="description to write, beside the index")
    args = parser.parse_args(argv)
    if args.output.suffix != ".json":
        parser.error(f"--output must be named *.json, not {args.output.name}")
    if args.output.resolve().parent != args.csv_path.resolve().parent:
        parser.error(
            f"--output must lie in {args.csv_path.parent}, beside the index: the paths in it are"
            " relative to its own folder"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # what is not stated is listed below
    try:
        facts, metadata = write_croissant(args.csv_path, args.output)
        print(summary(facts, metadata, args.output), flush=True)
    except (DatasetError, OSError) as error:
        LOG.error(error)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted: nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
