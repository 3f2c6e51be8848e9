#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy>=2.0,<3",
#     "packaging>=24.2,<27",
#     "pandas>=2.2.2,<4",
#     "mlcroissant>=1.1.1,<1.2",
#     "tqdm>=4.66,<5",
# ]
# ///
"""Describe a dataset in croissant.json (MLCommons Croissant 1.1 with its RAI 1.0 vocabulary).

Reads what create_dataset.py wrote, `master_index.csv` and the headers of the tensors beside it, and
checks both. Describes the index, the tensors and three record sets: the candidates, the meaning of
their labels, and the images. What can be counted is counted. What only the author knows comes from
options; what is missing is listed in the summary and never invented. The file is written under a
temporary name and renamed once mlcroissant has read a record of each record set.

    python generate_croissant.py -c ./my_dataset/master_index.csv -o ./my_dataset/croissant.json
    python generate_croissant.py --license CC-BY-4.0 --version 1.0.0 --rai rai.json
    python generate_croissant.py --check

Exit codes: 0 written, or --check found no difference; 1 the dataset is damaged or differs from its
description, or the latter cannot be written (stderr says why); 2 wrong usage; 130 Ctrl-C.
"""

import argparse
import difflib
import hashlib
import json
import logging
import os
import platform
import re
import sys
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import mlcroissant as mlc
import numpy as np
import pandas as pd
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from tqdm.contrib.concurrent import thread_map

CHANNEL_NAMES = ("science", "reference", "difference", "score")
INDEX_NAME, IMAGES_DIR, CROISSANT_NAME = "master_index.csv", "images", "croissant.json"
INDEX_ID, TENSORS_ID = "master-index", "image-tensors"  # ids of the resources
RECORD_SET, LABELS_SET, IMAGES_SET = "transient_candidates", "labels", "images"
NO_MATCH = -1  # `match` of a candidate that matches no known source
EMPTY, NEVER = "Empty if the catalog has no value.", "Never empty."
FIELDS = {  # column of the index: its meaning and unit, and what an empty cell means
    "id": f"Number of the candidate in the catalog of its job, no unit. {EMPTY}",
    "jid": f"Job: the image-differencing run that the candidate is from. {NEVER}",
    "x": f"Column, pixels, 0-based; an integer is a pixel's centre. {NEVER}",
    "y": f"Row, pixels, 0-based; an integer is a pixel's centre. {NEVER}",
    "sharpness": "DAOFIND sharpness, dimensionless: the peak above its surroundings, divided by the"
    f" height of the fitted Gaussian; high for cosmic rays and hot pixels. {EMPTY}",
    "roundness1": f"DAOFIND roundness from symmetry, dimensionless, 0 for a round source. {EMPTY}",
    "roundness2": f"DAOFIND roundness from Gaussian fits along x and y, dimensionless. {EMPTY}",
    "npix": f"Number of pixels in the finder's kernel. {EMPTY}",
    "peak": f"Highest pixel of the candidate in the difference image, DN/s. {EMPTY}",
    "flux": f"Flux in the difference image, DN/s; may be negative. {EMPTY}",
    "mag": "Instrumental magnitude, mag: -2.5 log10(flux). Empty if flux <= 0 or not given.",
    "daofind_mag": f"DAOFIND magnitude, mag: -2.5 log10(peak density / threshold). {EMPTY}",
    "flags": f"Bit flags of the PSF photometry, 0 for none, no unit. {EMPTY}",
    "match": f"Number of the known source that the candidate is, no unit; -1 for none. {NEVER}",
    "label": f"1: real (match is not -1); 0: bogus (match is -1). {NEVER}",
    "image_filename": f"Path of the job's tensor, relative to the index's folder. {NEVER}",
}
INDEX_COLUMNS = tuple(FIELDS)
TEXT_COLUMNS = ("jid", "image_filename")
HASH_THREADS, MAX_LINES = 4, 40  # tensors hashed at a time; lines of an error message

LOG = logging.getLogger("generate_croissant")


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_index(csv_path: Path) -> tuple[pd.DataFrame, str]:
    """Return the index, TEXT_COLUMNS as categories and the others as float64, and its SHA-256."""
    types = dict.fromkeys(INDEX_COLUMNS, float) | dict.fromkeys(TEXT_COLUMNS, str)
    try:
        sha256 = file_sha256(csv_path)  # first: check_reload notices if the file changes later
        index = pd.read_csv(csv_path, dtype=types)
    except (OSError, ValueError) as error:
        found = f"not a readable index ({error})"
        raise DatasetError(f"{csv_path}: {found}; create_dataset.py writes it") from error
    # pandas takes what is too much in every row for row labels.
    if list(index) != list(INDEX_COLUMNS) or not isinstance(index.index, pd.RangeIndex):
        wrong = ", ".join(sorted({*index} ^ {*INDEX_COLUMNS})) or "their order, or too many cells"
        raise DatasetError(f"{csv_path}: wrong columns ({wrong}); expected {', '.join(FIELDS)}")
    if index.empty:
        raise DatasetError(f"{csv_path}: no candidates in it; there is nothing to describe")
    return index.astype(dict.fromkeys(TEXT_COLUMNS, "category")), sha256


def tensor_shape(path: Path) -> tuple[int, int]:
    """Return height and width of a tensor, pixels, from its .npy header; check the file's size."""
    try:
        tensor = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such tensor, but {INDEX_NAME} names it") from error
    except Exception as error:  # a damaged header can raise almost anything
        raise DatasetError(f"{path}: not a whole .npy file: {error}") from error
    order, channels = "C" if tensor.flags.c_contiguous else "Fortran", (len(CHANNEL_NAMES),)
    if (tensor.dtype, tensor.shape[2:], order) != ("<f4", channels, "C") or not tensor.size:
        found = f"{tensor.dtype} {tensor.shape} in {order} order"
        raise DatasetError(f"{path}: {found}; expected float32 (H, W, {channels[0]}) in C order")
    if path.stat().st_size != tensor.offset + tensor.nbytes:
        raise DatasetError(f"{path}: longer than its header says; run create_dataset.py again")
    return tensor.shape[:2]


def survey_images(folder: Path, index: pd.DataFrame, hashed: bool) -> pd.DataFrame:
    """Return one row per tensor: the columns of IMAGE_FIELDS, `sha256` only if `hashed`."""
    labels = (index["label"] == 1).groupby(index["jid"], observed=True, sort=False)
    jobs = labels.agg(candidates="size", real="sum")
    others = sorted({path.stem for path in (folder / IMAGES_DIR).glob("*.npy")} - {*jobs.index})
    jobs = jobs.reindex([*jobs.index, *others], fill_value=0).rename_axis("jid").reset_index()
    jobs["image_filename"] = [f"{IMAGES_DIR}/{jid}.npy" for jid in jobs["jid"]]
    paths, shapes, problems = [folder / name for name in jobs["image_filename"]], [], []
    for path in paths:
        try:
            shapes.append(tensor_shape(path))
        except DatasetError as error:
            problems.append(str(error))
    if problems:
        raise DatasetError("\n".join(problems))
    jobs[["height", "width"]] = shapes
    if hashed:
        bar = {"desc": "checksums", "leave": False, "disable": None if sys.stderr else True}
        jobs["sha256"] = thread_map(file_sha256, paths, max_workers=HASH_THREADS, **bar)
    return jobs.filter(IMAGE_FIELDS)


def check_rows(csv_path: Path, index: pd.DataFrame, images: pd.DataFrame) -> None:
    """Raise DatasetError if rows are wrong; its message counts them and shows the first."""
    job = index[["jid"]].astype(object).join(images.set_index("jid"), on="jid")
    is_name = index["jid"].str.fullmatch(r"jid[^/\\]*", na=False)
    path_differs = index["image_filename"].astype(object) != job["image_filename"]
    # Pixel i spans [i - 0.5, i + 0.5). NaN is between nothing.
    on_columns = index["x"].between(-0.5, job["width"] - 0.5, inclusive="left")
    on_rows = index["y"].between(-0.5, job["height"] - 0.5, inclusive="left")
    duplicated = index.duplicated(["jid", "id"]) & index["id"].notna()
    label, match = index["label"], index["match"]
    checks = [  # what is wrong, a mask of such rows, columns to show of them
        ("a jid that is not the name of a job folder", ~is_name, []),
        ("an image_filename other than images/<jid>.npy", path_differs, ["image_filename"]),
        ("a position off its image", ~(on_columns & on_rows), ["x", "y", "image_filename"]),
        ("a label other than 0 and 1", ~label.isin([0, 1]), ["label"]),
        ("a match that is not finite", ~np.isfinite(match), ["match"]),
        ("a label that contradicts match", (label == 1) != (match != NO_MATCH), ["match", "label"]),
        ("the jid and id of another row", duplicated, []),
    ]
    for what, wrong, columns in checks:
        if wrong.any():
            row = index.loc[wrong.idxmax(), ["id", "jid", *columns]]
            cells = ", ".join(f"{name} {cell}" for name, cell in row.items())
            place = f"the first is row {wrong.idxmax() + 1}: {cells}"
            raise DatasetError(f"{csv_path}: {wrong.sum():,} rows with {what}; {place}")


RAI_DEFAULTS = {  # terms that follow from how the scripts work
    "rai:dataAnnotationProtocol": "label is 1 (real) if match is the number of a known source"
    " (injected, simulated, or in a table of true sources), and 0 (bogus) if match is -1.",
    "rai:dataCollectionRawData": "Job folders in the file layout of RAPID: a science, a reference,"
    " a difference and a score image (FITS), and catalogs of the candidates.",
    "rai:dataImputationProtocol": "Masked pixels have the value of zero flux; no cell is filled.",
    "rai:dataManipulationProtocol": "Left out: candidates without a finite position on their image,"
    " and entire jobs without a usable catalog, labels, or four images of one shape.",
    "rai:dataPreprocessingProtocol": "Each image is scaled between the limits that astropy's"
    " ZScaleInterval finds at its defaults among its finite pixels, or, if those coincide, between"
    " the lowest and the highest of these pixels, and clipped to [0, 1]. The four images of a job"
    " are stacked to one float32 array (H, W, 4).",
    "rai:dataUseCases": "Training and testing of real-bogus classifiers for difference images.",
    "rai:machineAnnotationTools": "create_dataset.py (given by the catalog or matched by position)",
    "rai:personalSensitiveInformation": "None: images of the sky and measurements on them.",
}


def counted_terms(index: pd.DataFrame, images: pd.DataFrame, shape: list[int]) -> dict[str, object]:
    """Return the terms that are counted: description, limitations, missing data, versions."""
    real = f"{index['label'].sum():,.0f} ({index['label'].mean():.1%})"
    empty = [f"{name} {n:,} ({n / len(index):.1%})" for name, n in index.isna().sum().items() if n]
    size = "of several sizes" if -1 in shape else f"of {shape[0]} x {shape[1]} pixels"
    libraries = {name: version(name) for name in ("mlcroissant", "numpy", "pandas")}
    return {
        "description": f"Candidate transients of {index['jid'].nunique():,} image-differencing jobs"
        f" in the file layout of RAPID: {len(index):,} candidates, of which {real} are real and the"
        f" others bogus detections. {len(images):,} image tensors {size}, one per job, with the"
        f" channels {', '.join(CHANNEL_NAMES)}, each ZScale-normalised to [0, 1]; masked pixels"
        " have the value of zero flux.",
        "rai:dataCollectionMissingData": f"Empty cells among {len(index):,} candidates:"
        f" {', '.join(empty) or 'none'}.",
        "rai:dataLimitations": [
            f"Classes are as frequent as in the catalogs: {real} of {len(index):,} are real.",
            "A true source that is not among the known sources has no match and counts as bogus.",
            "Candidates of one job share its sky, PSF and flaws: split by job, not by candidate.",
        ],
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "name": "From job folders to tensors, index and description",
            "description": "Written by create_dataset.py, then described with the software named.",
            "prov:wasAssociatedWith": [
                {"@type": "prov:SoftwareAgent", "name": name, "softwareVersion": number}
                for name, number in {"Python": platform.python_version(), **libraries}.items()
            ],
        },
    }


SPECIAL_TYPES = {"label": ["cr:Int64", "cr:Label"], **dict.fromkeys(TEXT_COLUMNS, "sc:Text")}
IMAGE_FIELDS = {  # field: type, description
    "jid": ("sc:Text", "Job: the image-differencing run that the images are from."),
    "image_filename": ("sc:Text", "Path of the job's tensor, relative to the index's folder."),
    "height": ("cr:Int64", "Rows of the tensor, pixels."),
    "width": ("cr:Int64", "Columns of the tensor, pixels."),
    "candidates": ("cr:Int64", "Number of the job's candidates in the index."),
    "real": ("cr:Int64", "Number of those that are real."),
    "sha256": ("sc:Text", "SHA-256 checksum of the tensor's file."),
}
LABEL_FIELDS = {
    "label": ("cr:Int64", "Value of the label."),
    "name": ("sc:Text", "Name of the class."),
    "meaning": ("sc:Text", "What it takes to be in the class."),
    "url": ("sc:URL", "What such a detection is, in general."),
}
FALSE_POSITIVE = "https://en.wikipedia.org/wiki/False_positives_and_false_negatives"
TRANSIENT_SOURCE = "http://astrothesaurus.org/uat/1851"  # of the Unified Astronomy Thesaurus
LABELS = (
    (0, "bogus", "The candidate matches no known source.", FALSE_POSITIVE),
    (1, "real", "The candidate matches a known source.", TRANSIENT_SOURCE),
)


def node(kind: str, id_: str, name: str, text: str, **more: object) -> dict:
    """Return a node of the description in JSON-LD."""
    return {"@type": f"cr:{kind}", "@id": id_, "name": name, "description": text, **more}


def candidates_set(has_ids: bool, shape: list[int]) -> dict:
    """Return the record set of the candidates; the tensor is an annotation of image_filename."""
    fields = []
    for column, text in FIELDS.items():
        kind = SPECIAL_TYPES.get(column, "cr:Float64")
        source = {"fileObject": {"@id": INDEX_ID}, "extract": {"column": column}}
        more = {"dataType": kind, "source": source}
        fields.append(node("Field", f"{RECORD_SET}/{column}", column, text, **more))
    text = f"The tensor at that path; last axis: {', '.join(CHANNEL_NAMES)}."
    tensor = node("Field", f"{RECORD_SET}/image_filename/tensor", "tensor", text)
    tensor |= {"dataType": "cr:Float32", "isArray": True, "arrayShape": ",".join(map(str, shape))}
    tensor["source"] = {"fileSet": {"@id": TENSORS_ID}, "extract": {"fileProperty": "content"}}
    fields[-1]["annotation"] = tensor
    key = {"key": [{"@id": f"{RECORD_SET}/{column}"} for column in ("jid", "id")]}
    more = {"field": fields} | (key if has_ids else {})
    return node("RecordSet", RECORD_SET, RECORD_SET, "One record per candidate.", **more)


def inline_set(name: str, text: str, table: dict, rows: pd.DataFrame) -> dict:
    """Return a record set whose records are part of it; the first field is its key."""
    fields = [
        node("Field", f"{name}/{column}", column, table[column][1], dataType=table[column][0])
        for column in rows
    ]
    data = rows.add_prefix(f"{name}/").to_dict("records")
    key = {"@id": fields[0]["@id"]}
    return node("RecordSet", name, name, text, key=key, field=fields, data=data)


def distribution(csv_path: Path, sha256: str, base_url: str | None) -> list[dict]:
    """Return the index and the tensors and, if published, the folder at `base_url`."""
    text = "One row per candidate: position, finder statistics, label, tensor path."
    index = node("FileObject", INDEX_ID, csv_path.name, text, encodingFormat="text/csv")
    index["contentUrl"] = f"{base_url}/{quote(csv_path.name)}" if base_url else csv_path.name
    index |= {"contentSize": f"{csv_path.stat().st_size} B", "sha256": sha256}
    text = "One .npy per job, float32 (H, W, 4) in [0, 1]."
    tensors = node("FileSet", TENSORS_ID, "image tensors", text, includes=f"{IMAGES_DIR}/*.npy")
    tensors["encodingFormat"] = "application/x-numpy"
    if not base_url:
        return [index, tensors]
    text = "The URL of a tensor is contentUrl/image_filename, percent-encoded."
    folder = node("FileObject", "folder", "folder of the dataset", text, contentUrl=base_url)
    folder["encodingFormat"] = "inode/directory"
    # mlcroissant requires a checksum, which no folder has. Hugging Face writes this as well.
    folder["sha256"] = "https://github.com/mlcommons/croissant/issues/80"
    tensors["containedIn"] = {"@id": folder["@id"]}
    return [index, tensors, folder]


NEW_TERMS = "annotation arrayShape containedIn excludes isArray readLines sdVersion unArchive"
CONTEXT = {  # of Croissant 1.1, as far as the context of mlcroissant 1.1.1 lacks it
    **{term: f"cr:{term}" for term in NEW_TERMS.split()},
    "prov": "http://www.w3.org/ns/prov#",
    "prov:wasDerivedFrom": {"@type": "@id"},  # texts given for it are IRIs
}
CONFORMS_TO = [f"http://mlcommons.org/croissant/{one}" for one in ("1.1", "RAI/1.0")]


def build_metadata(csv_path: Path, hashed: bool, stated: dict, base_url: str | None) -> dict:
    """Return the description of a dataset in JSON-LD; `stated` are the terms that the user gave.

    The nodes of mlcroissant 1.1.1 are not used, because they lack or misname some of the terms.
    """
    index, sha256 = read_index(csv_path)
    images = survey_images(csv_path.parent, index, hashed)
    check_rows(csv_path, index, images)
    if len(others := images.loc[images["candidates"] == 0, "image_filename"]):
        LOG.warning(
            f"{len(others):,} tensors without candidates, such as {others.iloc[0]}: remove those"
            " that another run left (create_dataset.py --jobs); jobs without candidates are fine"
        )
    sides = (images[side].unique().tolist() for side in ("height", "width"))
    shape = [*(side[0] if len(side) == 1 else -1 for side in sides), len(CHANNEL_NAMES)]
    top = {"@context": mlc.Rdf().context | CONTEXT, "@type": "sc:Dataset"}
    top |= {"conformsTo": CONFORMS_TO, "name": csv_path.parent.resolve().name}
    terms = RAI_DEFAULTS | counted_terms(index, images, shape)
    text = f"{stated.get('description', '')} {terms['description']}".lstrip()
    candidates = candidates_set(index["id"].notna().all(), shape)
    rows = pd.DataFrame(LABELS, columns=list(LABEL_FIELDS))
    labels = inline_set(LABELS_SET, "What the labels mean.", LABEL_FIELDS, rows)
    labels["dataType"] = "sc:Enumeration"
    tensors = inline_set(IMAGES_SET, "One record per tensor.", IMAGE_FIELDS, images)
    files, sets = distribution(csv_path, sha256, base_url), [candidates, labels, tensors]
    return {**top, **terms, **stated, "description": text, "distribution": files, "recordSet": sets}


def check_reload(json_path: Path, csv_path: Path, base_url: str | None) -> None:
    """Read a record of each record set with mlcroissant, from local files even if published."""
    try:
        dataset = mlc.Dataset(json_path, mapping={INDEX_ID: csv_path} if base_url else None)
        for name in (RECORD_SET, LABELS_SET, IMAGES_SET):
            next(iter(dataset.records(name)))
    except Exception as error:  # mlcroissant and its parsers raise anything
        text = re.split(r"Found the following \d+ warning", str(error.__cause__ or error))[0]
        raise DatasetError(f"mlcroissant rejects the description: {text}") from error


DAY = r"[12]\d{3}-(?!02-3|(04|06|09|11)-31)(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
DATE = rf"{DAY}(T([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?"
PERIOD = rf"({DATE}|[12]\d{{3}}(-(0[1-9]|1[0-2]))?)"  # also a year or a month
SPDX = "https://spdx.org/licenses/"
REST = r"[^\s<>\"{}|\\^`]*"  # of a URL
URL = rf"https?://[\w.-]*\w(:\d+)?([/?#]{REST})?"
LICENSE = rf"{SPDX}(?!LicenseRef-)[\w.-]+|(?!{SPDX}){URL}"
# In JSON-LD: what needs a download, names a node of this description, or would be another dataset.
OBJECT = "or an object without @context, relative @id and type Dataset"
UNSAFE = r'"@context":|"@id": "[^:"]*"|"@type": [^:]*"(sc:|https?://schema\.org/)?Dataset"'
KINDS = {  # kind of value that the user gives: what is expected, and a pattern for texts
    "text": ("a text", r"(?s).*\S.*"),
    "url": ("a URL such as https://example.org/data", URL),
    "folder": ("a URL such as https://example.org/data, without ? and #", rf"(?!.*[?#]){URL}"),
    "license": ("an SPDX id such as CC-BY-4.0, or a URL", LICENSE),
    "date": ("a date such as 2026-01-31", DATE),
    "timeframe": ("a date such as 2026-01-31, or 2020/2022", rf"{PERIOD}(/{PERIOD})?"),
    "flag": ("true or false", ""),
    "item": (f"a text, {OBJECT}", r"(?s).*\S.*"),
    "source": (f"a DOI, an IRI, {OBJECT}", rf"([A-Za-z][\w+.-]*:|10\.\d+/){REST}\w{REST}"),
}


def parse(kind: str, value: object) -> object:
    """Return a value of one of KINDS, a DOI as its URL; raise what argparse reports otherwise."""
    expected, pattern = KINDS[kind]
    if kind == "flag":
        fits = isinstance(value, bool)
    elif kind in ("item", "source") and isinstance(value, dict):
        fits = value and not re.search(UNSAFE, json.dumps(value))
    else:
        fits = isinstance(value, str) and re.fullmatch(pattern, value)
    if not fits:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {value!r}")
    bare_doi = kind == "source" and str(value).startswith("10.")
    return f"https://doi.org/{value}" if bare_doi else value


def parse_license(value: str) -> str:
    """Return a URL as it is, and for an SPDX id its page at spdx.org."""
    with suppress(InvalidLicenseExpression):
        value = SPDX + canonicalize_license_expression(value)
    return parse("license", value)


def parse_agent(value: str) -> dict[str, str]:
    """Return who `name,email,url` is: an organization if it begins with 'org:', else a person."""
    kind = "sc:Organization" if value.startswith("org:") else "sc:Person"
    parts = [part.strip() for part in value.removeprefix("org:").split(",")]
    name, email, url, *more = [*parts, "", ""]  # email and url may be left out
    if not name or any(more) or not re.fullmatch(r"([^@\s]+@[^@\s]+)?", email):
        expected = "name,email,url, no commas within, such as Ada Lovelace,,https://ada.org"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {value!r}")
    given = {"@type": kind, "name": name, "email": email, "url": url and parse("url", url)}
    return {key: text for key, text in given.items() if text}


def parse_keywords(value: str) -> list[str]:
    """Return the words of a list with commas."""
    return [word.strip() for word in parse("text", value.strip(" ,")).split(",") if word.strip()]


ONE = (
    "annotationsPerItem dataCollection dataCollectionMissingData dataCollectionRawData"
    " dataImputationProtocol dataManipulationProtocol dataSocialImpact"
)
MANY = (
    "annotatorDemographics dataAnnotationAnalysis dataAnnotationPlatform dataAnnotationProtocol"
    " dataBiases dataCollectionType dataLimitations dataPreprocessingProtocol dataUseCases"
    " dataReleaseMaintenancePlan machineAnnotationTools personalSensitiveInformation"
)
RAI_TERMS = {  # term of --rai: what it takes; with an s, also a list of it
    **{f"rai:{name}": "text" for name in ONE.split()},
    **{f"rai:{name}": "texts" for name in MANY.split()},
    "rai:dataCollectionTimeframe": "timeframes",
    "rai:hasSyntheticData": "flag",
    "prov:wasAttributedTo": "items",
    "prov:wasDerivedFrom": "sources",
    "prov:wasGeneratedBy": "items",
}


def read_rai(path: Path) -> dict[str, object]:
    """Read the file of --rai; raise DatasetError unless it is a JSON object of RAI_TERMS."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        terms, pairs = json.loads(text), json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:  # main reports an OSError
        raise DatasetError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(terms, dict) or len(terms) < len(pairs):
        expected = 'an object such as {"rai:dataBiases": "..."}, no term twice'
        raise DatasetError(f"{path}: expected {expected}")
    for term, value in terms.items():
        if term not in RAI_TERMS:
            near = difflib.get_close_matches(term, RAI_TERMS, n=1) or RAI_TERMS
            raise DatasetError(f"{path}: unknown term '{term}'; expected {' or '.join(near)}")
        kind = RAI_TERMS[term].removesuffix("s")
        many = kind != RAI_TERMS[term] and isinstance(value, list) and value
        try:
            terms[term] = [parse(kind, one) for one in value] if many else parse(kind, value)
        except argparse.ArgumentTypeError as error:
            raise DatasetError(f"{path}: {term}: {error}") from error
    return terms


parse_text, parse_url, parse_date = (partial(parse, kind) for kind in ("text", "url", "date"))
REQUIRED, ADVISED = "required by Croissant", "recommended by Croissant"
OPTIONS = {  # option that states a term: term, parser, help, who asks for it
    "license": ("license", parse_license, "SPDX id or URL", REQUIRED),
    "url": ("url", parse_url, "page of the dataset", REQUIRED),
    "creator": ("creator", parse_agent, "name,email,url of a person, or org:name,...", REQUIRED),
    "date_published": ("datePublished", parse_date, "YYYY-MM-DD, or with a time", REQUIRED),
    "version": ("version", parse_text, "preferably MAJOR.MINOR.PATCH", ADVISED),
    "keywords": ("keywords", parse_keywords, "words to find it by, separated by commas", ADVISED),
    "publisher": ("publisher", parse_agent, "the same as for --creator", ADVISED),
    "date_created": ("dateCreated", parse_date, "the same as for --date_published", ADVISED),
    "date_modified": ("dateModified", parse_date, "the same as for --date_published", ADVISED),
    "same_as": ("sameAs", parse_url, "another page of the same dataset", ADVISED),
    "in_language": ("inLanguage", parse_text, "language, such as en", ADVISED),
    "sd_license": ("sdLicense", parse_license, "license of the description itself", ADVISED),
    "cite_as": ("citeAs", parse_text, "citation, preferably BibTeX", "recommended by mlcroissant"),
    "name": ("name", parse_text, "name of the dataset; if not given, that of its folder", ""),
    "description": ("description", parse_text, "what it is about; what was counted is added", ""),
}
REPEATABLE = {"license", "creator", "publisher", "same_as", "in_language", "sd_license"}
NEURIPS = "rai:dataBiases rai:dataSocialImpact rai:hasSyntheticData prov:wasDerivedFrom".split()


def summarize(metadata: dict) -> list[str]:
    """Return lines with the description, the options for what nobody stated, and notes."""
    missing: dict[str, list[str]] = {}
    for option, (term, _, _, who) in OPTIONS.items():
        if term not in metadata:
            missing.setdefault(who, []).append(f"--{option}")
    if rai := [term for term in NEURIPS if term not in metadata]:
        missing["required by NeurIPS"] = ["--rai with", *rai]
    lines = [metadata["description"]]
    lines += [f"{who}, but not stated: {' '.join(options)}" for who, options in missing.items()]
    if not re.fullmatch(r"\d+\.\d+\.\d+([-+].+)?", metadata.get("version", "1.0.0")):
        lines.append(f"note: version {metadata['version']} is not MAJOR.MINOR.PATCH")
    return lines


def write_description(args: argparse.Namespace) -> list[str]:
    """Describe a dataset, rename the file once mlcroissant has read it, and return a summary."""
    given = {term: getattr(args, option) for option, (term, *_) in OPTIONS.items()}
    stated = {term: value for term, value in given.items() if value is not None}
    for term, value in stated.items():
        if isinstance(value, list) and len(value) == 1:
            stated[term] = value[0]
    stated |= read_rai(args.rai) if args.rai else {}
    base_url = args.base_url.rstrip("/") if args.base_url else None
    metadata = build_metadata(args.csv_path, args.image_sha256, stated, base_url)
    temporary = args.output.with_name(f".{os.getpid()}.tmp")
    try:
        text = json.dumps(metadata, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")
        check_reload(temporary, args.csv_path, base_url)
        temporary.replace(args.output)
    except (OSError, ValueError) as error:  # ValueError: what JSON or UTF-8 cannot hold
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{args.output}: cannot be written: {reason}") from error
    finally:
        with suppress(OSError):  # on a read-only disk even this fails
            temporary.unlink()
    return [str(args.output), *(f"  {line}" for line in summarize(metadata))]


def check_description(args: argparse.Namespace) -> list[str]:
    """Compare a description, except for its words, with what would be written now."""
    try:
        text = args.output.read_text(encoding="utf-8")
        described = json.loads(text)
        then = {part: described[part] for part in ("distribution", "recordSet")}
        index_url = str(then["distribution"][0]["contentUrl"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        found = f"no description to compare with ({error})"
        raise DatasetError(f"{args.output}: {found}; run without --check to write it") from error
    base_url = index_url.rpartition("/")[0] if "://" in index_url else None
    now = build_metadata(args.csv_path, f'"{IMAGES_SET}/sha256"' in text, {}, base_url)
    texts = []
    for metadata in (then, {part: now[part] for part in then}):
        lines = json.dumps(metadata, indent=2, sort_keys=True).splitlines()
        # The author may change the words, as well as all other terms.
        texts.append([line for line in lines if '"description": ' not in line])
    names = f"{args.output} as it is", "as the dataset is now; write it again without --check"
    if lines := list(difflib.unified_diff(*texts, *names, n=6, lineterm="")):
        raise DatasetError("\n".join(lines))
    check_reload(args.output, args.csv_path, base_url)
    return [f"{args.output} agrees with the dataset"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(description="Describe a dataset in MLCommons Croissant.")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("-c", "--csv_path", type=Path, default=f"./hackathon_dataset/{INDEX_NAME}", help="index")
    add("-o", "--output", type=Path, default=argparse.SUPPRESS, help="description beside the index")
    for option, (_, parse_option, text, _) in OPTIONS.items():
        action, end = ("append", "; may be repeated") if option in REPEATABLE else ("store", "")
        add(f"--{option}", type=parse_option, action=action, help=f"{text}{end}")
    add("--rai", type=Path, help="JSON file with terms of responsible AI and provenance")
    add("--base_url", type=partial(parse, "folder"), help="URL of the published dataset folder")
    add("--image_sha256", action="store_true", help="add the checksums of the tensors")
    add("--check", action="store_true", help="write nothing; compare an existing description")
    args = parser.parse_args(argv)
    vars(args).setdefault("output", args.csv_path.with_name(CROISSANT_NAME))
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the process with code 2 if options do not fit each other."""
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    if args.check and (without_effect := given - {"csv_path", "output", "check"}):
        parser.error(f"--check writes nothing: --{min(without_effect)} would have no effect")
    if args.csv_path.suffix != ".csv" or args.output.suffix != ".json":
        parser.error("--csv_path must be named *.csv, and --output *.json; are they swapped?")
    if args.output.parent.resolve() != args.csv_path.parent.resolve():
        parser.error(f"--output must lie beside the index, in {args.csv_path.parent.resolve()}")
    if args.rai and args.output.resolve() == args.rai.resolve():
        parser.error("--output would overwrite the file of --rai")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # the summary lists what is missing
    try:
        lines = check_description(args) if args.check else write_description(args)
    except (DatasetError, OSError) as error:
        lines = str(error).splitlines()
        more = [f"and {len(lines) - MAX_LINES:,} more"] if len(lines) > MAX_LINES else []
        for line in lines[:MAX_LINES] + more:
            LOG.error(line)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted: nothing was written")
        return 130
    try:
        print(*lines, sep="\n", flush=True)
    except (OSError, UnicodeEncodeError) as error:  # the description is complete all the same
        LOG.warning(f"the summary cannot be printed: {error}")
        sys.stdout = None  # else Python tries again on exit, and fails
    return 0


if __name__ == "__main__":
    sys.exit(main())
