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

Reads `master_index.csv` and the headers of the tensors beside it, and checks both. Writes
`croissant.json`, which describes the index, the tensors and three record sets: the candidates, the
meaning of their labels, and the images. What can be counted is counted. What only the author knows
comes from options; what nobody stated is listed at the end and never invented. The file gets its
name only after mlcroissant has loaded it and read a record of each record set.

    python generate_croissant.py
    python generate_croissant.py -c ./my_dataset/master_index.csv -o ./my_dataset/croissant.json
    python generate_croissant.py --license CC-BY-4.0 --version 1.0.0 --rai rai.json
    python generate_croissant.py --check

Exit codes: 0 written, or --check found no difference; 1 the dataset is damaged or differs from its
description, or the description cannot be written (stderr says why); 2 wrong usage; 130 interrupted
by Ctrl-C.
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
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
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
INDEX_ID, TENSORS_ID = "master-index", "image-tensors"  # ids of the resources
RECORD_SET, LABELS_SET, IMAGES_SET = "transient_candidates", "labels", "images"
NO_MATCH = -1  # `match` of a candidate that is none of the known sources
EMPTY, NEVER = "Empty if the catalog has no value.", "Never empty."
FIELDS = {  # column of the index: its meaning, unit and empty cells
    "id": f"Number of the candidate in the catalog of its job, no unit. {EMPTY}",
    "jid": f"Job: the image-differencing run that the candidate is from. {NEVER}",
    "x": f"Column, pixels, 0-based; an integer is a pixel's centre. {NEVER}",
    "y": f"Row, pixels, 0-based; an integer is a pixel's centre. {NEVER}",
    "sharpness": "DAOFIND sharpness, dimensionless: the peak above its surroundings, divided by the"
    f" height of the fitted Gaussian; high for cosmic rays and hot pixels. {EMPTY}",
    "roundness1": f"DAOFIND roundness from symmetry, dimensionless, 0 for a round source. {EMPTY}",
    "roundness2": "DAOFIND roundness from the heights of the Gaussians fitted to the sums along x"
    f" and y, dimensionless, 0 for a round source. {EMPTY}",
    "npix": f"Number of pixels in the finder's kernel. {EMPTY}",
    "peak": f"Highest pixel of the candidate in the difference image, DN/s. {EMPTY}",
    "flux": f"Flux in the difference image, DN/s; may be negative. {EMPTY}",
    "mag": "Instrumental magnitude, mag: -2.5 log10(flux). Empty if the flux is not positive or the"
    " catalog has no value.",
    "daofind_mag": "DAOFIND magnitude, mag: -2.5 log10 of the peak density over the detection"
    f" threshold. {EMPTY}",
    "flags": f"Bit flags of the PSF photometry, 0 for none, no unit. {EMPTY}",
    "match": f"Number of the known source that the candidate is, no unit; -1 for none. {NEVER}",
    "label": f"1: real (match is not -1); 0: bogus (match is -1). {NEVER}",
    "image_filename": f"Path of the job's tensor, relative to the index's folder. {NEVER}",
}
INDEX_COLUMNS = tuple(FIELDS)
TEXT_COLUMNS = ("jid", "image_filename")
HASH_THREADS = 4
MAX_LINES = 40  # of problems or differences in a message

LOG = logging.getLogger("generate_croissant")


class DatasetError(Exception):
    """An error that the user can fix; its text says where, what was found and what to do."""


def list_problems(problems: list[str]) -> None:
    """Raise DatasetError with the first MAX_LINES problems, if there are any."""
    more = [f"and {len(problems) - MAX_LINES:,} more"] if len(problems) > MAX_LINES else []
    if problems:
        raise DatasetError("\n".join(problems[:MAX_LINES] + more))


def read_index(csv_path: Path) -> pd.DataFrame:
    """Read the index: INDEX_COLUMNS as float64, but TEXT_COLUMNS as categories.

    Raises DatasetError if the file is missing, unreadable or empty, or has other columns.
    """
    types = dict.fromkeys(INDEX_COLUMNS, float) | dict.fromkeys(TEXT_COLUMNS, "category")
    try:
        index = pd.read_csv(csv_path, dtype=types)
    except FileNotFoundError as error:
        raise DatasetError(f"{csv_path}: no such file; create_dataset.py writes it") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{csv_path}: not a readable index: {error}") from error
    if list(index) != list(INDEX_COLUMNS):
        wrong = ", ".join(sorted({*index} ^ {*INDEX_COLUMNS})) or "their order"
        expected = ", ".join(INDEX_COLUMNS)
        raise DatasetError(f"{csv_path}: wrong columns ({wrong}); expected {expected}")
    if index.empty:
        raise DatasetError(f"{csv_path}: no candidates in it; there is nothing to describe")
    return index


def tensor_shape(path: Path) -> tuple[int, int]:
    """Return height and width of a tensor, pixels, from the .npy header alone.

    Raises DatasetError if the file is missing, cut short, or not float32 (H, W, 4) in C order.
    """
    try:
        tensor = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such tensor, but {INDEX_NAME} names it") from error
    except Exception as error:  # numpy raises anything if a header is damaged
        raise DatasetError(f"{path}: not a whole .npy file: {error}") from error
    order = "C" if tensor.flags.c_contiguous else "Fortran"
    if (tensor.dtype, tensor.shape[2:], order) != ("<f4", (4,), "C") or not tensor.size:
        found = f"{tensor.dtype} {tensor.shape} in {order} order"
        raise DatasetError(f"{path}: {found}; expected float32 (H, W, 4) in C order")
    if path.stat().st_size != tensor.offset + tensor.nbytes:
        raise DatasetError(f"{path}: longer than its header says; run create_dataset.py again")
    return tensor.shape[:2]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def survey_images(folder: Path, index: pd.DataFrame, hashed: bool) -> pd.DataFrame:
    """Return one row per tensor: the columns of IMAGE_FIELDS, `sha256` only if `hashed`.

    Raises DatasetError that lists the tensors that are missing or damaged.
    """
    jobs = (index["label"] == 1).groupby(index["jid"], observed=True, sort=False)
    jobs = jobs.agg(candidates="size", real="sum")
    others = {path.stem for path in (folder / IMAGES_DIR).glob("*.npy")} - set(jobs.index)
    if others:
        LOG.warning(
            f"{len(others):,} tensors without candidates, such as {min(others)}.npy: either their"
            " jobs have none, or another run left them (create_dataset.py --jobs); then remove them"
        )
    jobs = jobs.reindex([*jobs.index, *sorted(others)], fill_value=0).rename_axis("jid")
    jobs.insert(0, "image_filename", [f"{IMAGES_DIR}/{jid}.npy" for jid in jobs.index])
    paths, shapes, problems = [folder / name for name in jobs["image_filename"]], [], []
    for path in paths:
        try:
            shapes.append(tensor_shape(path))
        except DatasetError as error:
            problems.append(str(error))
    list_problems(problems)
    jobs.insert(1, "height", [height for height, _ in shapes])
    jobs.insert(2, "width", [width for _, width in shapes])
    if hashed:
        bar = {"total": len(paths), "desc": "checksums", "disable": None, "leave": False}
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            jobs["sha256"] = list(tqdm(pool.map(file_sha256, paths), **bar))
    return jobs.reset_index()


def check_rows(csv_path: Path, index: pd.DataFrame, images: pd.DataFrame) -> None:
    """Raise DatasetError if rows of the index are wrong; it counts them and shows the first."""
    jid, path = (index[column].astype(object) for column in TEXT_COLUMNS)
    names, jobs = index["jid"].cat.categories, images.set_index("jid")
    job_names = names[names.str.fullmatch(r"jid[^/\\]*")]
    paths, height, width = (jid.map(jobs[side]) for side in ("image_filename", "height", "width"))
    x, y, label, match = (index[column] for column in ("x", "y", "label", "match"))
    # Pixel i spans [i - 0.5, i + 0.5). Comparisons with NaN are false.
    on_image = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    again = index.duplicated(["jid", "id"]) & index["id"].notna()
    checks = [  # what is wrong, a mask of such rows, columns to show of them
        ("a jid that is not the name of a job folder", ~jid.isin(job_names), []),
        ("an image_filename other than images/<jid>.npy", path != paths, ["image_filename"]),
        ("a position off its image", ~on_image, ["x", "y", "image_filename"]),
        ("a label other than 0 and 1", ~label.isin([0, 1]), ["label"]),
        ("a match that is not a number", ~np.isfinite(match), ["match"]),
        ("a label that contradicts match", (label == 1) != (match != NO_MATCH), ["match", "label"]),
        ("the jid and id of another row", again, []),
    ]
    for what, wrong, columns in checks:
        if wrong.any():
            row = index.loc[wrong.idxmax(), ["id", "jid", *columns]]
            cells = ", ".join(f"{name} {cell}" for name, cell in row.items())
            place = f"the first is row {wrong.idxmax() + 1}: {cells}"
            raise DatasetError(f"{csv_path}: {wrong.sum():,} rows with {what}; {place}")


RAI_KNOWN = {  # what follows from the scripts
    "rai:dataAnnotationProtocol": "label is 1 (real) if match is not -1, else 0 (bogus). match is"
    " the number of the known source that the candidate is (injected, simulated, or listed in a"
    " table of true sources), or -1.",
    "rai:dataCollectionRawData": "Job folders in the file layout of RAPID: a science, a reference,"
    " a difference and a score image (FITS), and catalogs of the candidates.",
    "rai:dataImputationProtocol": "A masked pixel has the value of zero flux. An empty cell of the"
    " catalog stays empty.",
    "rai:dataManipulationProtocol": "Left out: candidates without a finite position on their image,"
    " and entire jobs without a usable catalog, labels, or four images of one shape.",
    "rai:dataPreprocessingProtocol": [
        "Each image is scaled between the limits that astropy's ZScaleInterval finds at its"
        " defaults among its finite pixels, or, if those coincide, between the lowest and the"
        " highest of these pixels, and clipped to [0, 1].",
        "The four images of a job are stacked to one float32 array (H, W, 4).",
    ],
    "rai:dataUseCases": "Training and evaluation of classifiers that tell real transients from"
    " bogus detections in difference images.",
    "rai:machineAnnotationTools": "create_dataset.py; match was given by the catalog or matched by"
    " position.",
    "rai:personalSensitiveInformation": "None: images of the sky and measurements on them.",
}


def counted_terms(index: pd.DataFrame, images: pd.DataFrame, shape: list[int]) -> dict[str, object]:
    """Return the terms that are counted: description, limitations, missing data, versions."""
    real = f"{index['label'].sum():,.0f} ({index['label'].mean():.1%})"
    empty = [f"{name} {n:,} ({n / len(index):.1%})" for name, n in index.isna().sum().items() if n]
    size = "of several sizes" if -1 in shape else f"of {shape[0]} x {shape[1]} pixels"
    agents = {"Python": platform.python_version()}
    agents |= {name: version(name) for name in ("mlcroissant", "numpy", "pandas")}
    return {
        "description": f"Candidate transients of {index['jid'].nunique():,} image-differencing jobs"
        f" in the file layout of RAPID: {len(index):,} candidates, of which {real} are real and the"
        f" others bogus detections. {len(images):,} image tensors {size}, one per job, with the"
        f" channels {', '.join(CHANNEL_NAMES)}, each ZScale-normalised to [0, 1]; masked pixels"
        " have the value of zero flux.",
        "rai:dataCollectionMissingData": f"Empty cells among {len(index):,} candidates:"
        f" {', '.join(empty) or 'none'}.",
        "rai:dataLimitations": [
            f"The balance of the classes is that of the catalogs: {real} of {len(index):,}"
            " candidates are real.",
            "A true source that is not among the known sources has no match and counts as bogus.",
            "Candidates of one job share its sky, PSF and flaws: split by job, not by candidate.",
        ],
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "name": "From job folders to tensors, index and description",
            "description": "create_dataset.py wrote tensors and index (its versions are not known),"
            " then generate_croissant.py checked and described them (versions as stated).",
            "prov:wasAssociatedWith": [
                {"@type": "prov:SoftwareAgent", "name": name, "softwareVersion": number}
                for name, number in agents.items()
            ],
        },
    }


FIELD_TYPES = {"label": ["cr:Int64", "cr:Label"], **dict.fromkeys(TEXT_COLUMNS, "sc:Text")}
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
    """Return the record set of the candidates; the tensor is an annotation of its path."""
    fields = []
    for column, text in FIELDS.items():
        kind = FIELD_TYPES.get(column, "cr:Float64")
        source = {"fileObject": {"@id": INDEX_ID}, "extract": {"column": column}}
        id_ = f"{RECORD_SET}/{column}"
        fields.append(node("Field", id_, column, text, dataType=kind, source=source))
    text = f"The tensor at that path; last axis: {', '.join(CHANNEL_NAMES)}."
    tensor = node("Field", f"{RECORD_SET}/image_filename/tensor", "tensor", text)
    tensor |= {"dataType": "cr:Float32", "isArray": True, "arrayShape": ",".join(map(str, shape))}
    tensor["source"] = {"fileSet": {"@id": TENSORS_ID}, "extract": {"fileProperty": "content"}}
    fields[-1]["annotation"] = tensor
    key = {"key": [{"@id": f"{RECORD_SET}/{column}"} for column in ("jid", "id")]}
    candidates = node("RecordSet", RECORD_SET, RECORD_SET, "One record per candidate.")
    return candidates | (key if has_ids else {}) | {"field": fields}


def inline_set(name: str, text: str, table: dict, rows: list[dict], **more: object) -> dict:
    """Return a record set whose records stand in the description; the first field is its key."""
    fields = [
        node("Field", f"{name}/{column}", column, table[column][1], dataType=table[column][0])
        for column in rows[0]
    ]
    data = [{f"{name}/{column}": cell for column, cell in row.items()} for row in rows]
    key = {"@id": fields[0]["@id"]}
    return node("RecordSet", name, name, text, **more, key=key, field=fields, data=data)


def distribution(csv_path: Path, base_url: str | None) -> list[dict]:
    """Return index and tensors, and the folder that contains them if it is at `base_url`."""
    text = "One row per candidate: position, finder statistics, label, tensor path."
    index = node("FileObject", INDEX_ID, csv_path.name, text, encodingFormat="text/csv")
    index["contentUrl"] = f"{base_url}/{quote(csv_path.name)}" if base_url else csv_path.name
    index |= {"contentSize": f"{csv_path.stat().st_size} B", "sha256": file_sha256(csv_path)}
    text = "One .npy per job, float32 (H, W, 4) in [0, 1]."
    tensors = node("FileSet", TENSORS_ID, "image tensors", text, includes=f"{IMAGES_DIR}/*.npy")
    tensors["encodingFormat"] = "application/x-numpy"
    if not base_url:
        return [index, tensors]
    text = "The URL of a tensor is contentUrl/image_filename, percent-encoded."
    folder = node("FileObject", "folder", "folder of the dataset", text, contentUrl=base_url)
    folder["encodingFormat"] = "inode/directory"
    # A folder has no checksum, but mlcroissant wants one. Hugging Face writes this, too.
    folder["sha256"] = "https://github.com/mlcommons/croissant/issues/80"
    tensors["containedIn"] = {"@id": folder["@id"]}
    return [index, tensors, folder]


CONTEXT = {  # terms of Croissant 1.1 that the context of mlcroissant 1.1.1 lacks
    **{term: f"cr:{term}" for term in ("annotation", "arrayShape", "containedIn", "isArray")},
    "prov": "http://www.w3.org/ns/prov#",
    "prov:wasDerivedFrom": {"@type": "@id"},  # its texts are IRIs
}
CONFORMS_TO = [f"http://mlcommons.org/croissant/{one}" for one in ("1.1", "RAI/1.0")]


def build_metadata(csv_path: Path, hashed: bool, stated: dict, base_url: str | None) -> dict:
    """Read and check a dataset, and return its description in JSON-LD.

    `stated` are the terms that the user gave. Nodes of mlcroissant 1.1.1 are not used: they lack
    terms of Croissant 1.1 and misname terms of responsible AI.
    """
    index = read_index(csv_path)
    images = survey_images(csv_path.parent, index, hashed)
    check_rows(csv_path, index, images)
    sides = (images[side].unique().tolist() for side in ("height", "width"))
    shape = [*(side[0] if len(side) == 1 else -1 for side in sides), len(CHANNEL_NAMES)]
    labels = [dict(zip(LABEL_FIELDS, label, strict=True)) for label in LABELS]
    kind = {"dataType": "sc:Enumeration"}
    head = {"@context": mlc.Rdf().context | CONTEXT, "@type": "sc:Dataset"}
    head |= {"conformsTo": CONFORMS_TO, "name": csv_path.parent.resolve().name}
    terms = RAI_KNOWN | counted_terms(index, images, shape)
    if "description" in stated:
        stated = stated | {"description": f"{stated['description']} {terms['description']}"}
    sets = [
        candidates_set(index["id"].notna().all(), shape),
        inline_set(LABELS_SET, "What the labels mean.", LABEL_FIELDS, labels, **kind),
        inline_set(IMAGES_SET, "One record per tensor.", IMAGE_FIELDS, images.to_dict("records")),
    ]
    files = distribution(csv_path, base_url)
    return {**head, **terms, **stated, "distribution": files, "recordSet": sets}


def check_reload(json_path: Path, csv_path: Path, base_url: str | None) -> None:
    """Load a description with mlcroissant and read a record of each of its record sets.

    Nothing is downloaded: the file at hand stands in for the published index. Raises DatasetError
    if mlcroissant rejects the description.
    """
    try:
        dataset = mlc.Dataset(json_path, mapping={INDEX_ID: csv_path} if base_url else None)
        for name in (RECORD_SET, LABELS_SET, IMAGES_SET):
            next(iter(dataset.records(name)))
    except Exception as error:  # mlcroissant and its parsers raise anything
        text = re.split(r"Found the following \d+ warning", str(error.__cause__ or error))[0]
        raise DatasetError(f"mlcroissant rejects the description: {text}") from error


DAY = r"[12]\d{3}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
DATE = rf"{DAY}(T\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?"
PERIOD = rf"({DATE}|[12]\d{{3}}(-(0[1-9]|1[0-2]))?)"  # also a year or a month
HOST, REST = r"https?://[\w.-]*\w(:\d+)?", r"[^\s<>\"{}|\\^`]*"  # of a URL
KINDS = {  # of what the user gives: what to expect, in words and as a pattern for texts
    "text": ("a text", r"(?s).*\S.*"),
    "url": ("a URL such as https://example.org/data", rf"{HOST}([/?#]{REST})?"),
    "folder": ("a URL without ? and #", rf"(?!.*[?#]){HOST}(/{REST})?"),
    "license": (
        "an SPDX id such as CC-BY-4.0, or a URL",
        rf"(?!.*/LicenseRef-){HOST}([/?#]{REST})?",
    ),
    "date": ("a date such as 2026-01-31", DATE),
    "timeframe": ("a date such as 2026-01-31, or 2020/2022", rf"{PERIOD}(/{PERIOD})?"),
    "flag": ("true or false", r"(?!)"),
    "item": ("a text, or an object without @context", r"(?s).*\S.*"),
    "source": ("a DOI, an IRI, or an object without @context", rf"([A-Za-z][\w+.-]*:|10\.){REST}"),
}


def checked(kind: str, value: object) -> object:
    """Return a value that is of one of KINDS; raise what the parser reports if it is not."""
    expected, pattern = KINDS[kind]
    if isinstance(value, dict):
        fits = kind in ("item", "source") and value and "@context" not in json.dumps(value)
    elif isinstance(value, str):
        fits = re.fullmatch(pattern, value)
    else:
        fits = kind == "flag" and isinstance(value, bool)
    if not fits:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {value!r}")
    bare_doi = kind == "source" and str(value).startswith("10.")
    return f"https://doi.org/{value}" if bare_doi else value


def license_url(value: str) -> str:
    """Return a URL as it is, and for an SPDX id its page at spdx.org."""
    with suppress(InvalidLicenseExpression):
        value = f"https://spdx.org/licenses/{canonicalize_license_expression(value)}"
    return checked("license", value)


def agent(value: str) -> dict[str, str]:
    """Return who `name,email,url` is: an organization if it begins with 'org:', else a person."""
    kind = "sc:Organization" if value.startswith("org:") else "sc:Person"
    parts = [part.strip() for part in value.removeprefix("org:").split(",")]
    name, email, url, *more = [*parts, "", ""]
    if not name or any(more) or not re.fullmatch(r"([^@\s]+@[^@\s]+)?", email):
        expected = "name,email,url, no commas within"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {value!r}")
    agent = {"@type": kind, "name": name, "email": email, "url": url and checked("url", url)}
    return {key: text for key, text in agent.items() if text}


def words(value: str) -> list[str]:
    """Return the words of a list with commas."""
    return [word.strip() for word in checked("text", value).split(",") if word.strip()]


ONE = (
    "annotationsPerItem dataCollection dataCollectionMissingData dataCollectionRawData"
    " dataImputationProtocol dataManipulationProtocol dataSocialImpact"
)
MANY = (
    "annotatorDemographics dataAnnotationAnalysis dataAnnotationPlatform dataAnnotationProtocol"
    " dataBiases dataCollectionType dataLimitations dataPreprocessingProtocol dataUseCases"
    " dataReleaseMaintenancePlan machineAnnotationTools personalSensitiveInformation"
)
RAI_TERMS = {  # term of --rai: what it takes; with an s: or a list of such
    **{f"rai:{term}": "text" for term in ONE.split()},
    **{f"rai:{term}": "texts" for term in MANY.split()},
    "rai:dataCollectionTimeframe": "timeframes",
    "rai:hasSyntheticData": "flag",
    "prov:wasAttributedTo": "items",
    "prov:wasDerivedFrom": "sources",
    "prov:wasGeneratedBy": "items",
}


def read_rai(path: Path) -> dict[str, object]:
    """Read the file of --rai; raise DatasetError unless it is a JSON object of RAI_TERMS."""
    try:
        terms = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(terms, dict):
        raise DatasetError(f'{path}: expected an object such as {{"rai:dataBiases": "..."}}')
    for term, value in terms.items():
        if term not in RAI_TERMS:
            near = difflib.get_close_matches(term, RAI_TERMS, n=1) or RAI_TERMS
            raise DatasetError(f"{path}: unknown term '{term}'; expected {' or '.join(near)}")
        kind = RAI_TERMS[term].removesuffix("s")
        many = kind != RAI_TERMS[term] and isinstance(value, list) and value
        try:
            terms[term] = [checked(kind, v) for v in value] if many else checked(kind, value)
        except argparse.ArgumentTypeError as error:
            raise DatasetError(f"{path}: {term}: {error}") from error
    return terms


a_text, a_url, a_date = (partial(checked, kind) for kind in ("text", "url", "date"))
CROISSANT, ADVISED = "required by Croissant", "recommended by Croissant"
OPTIONS = {  # option that states a term: term, parser (in brackets: repeatable), help, who asks
    "license": ("license", [license_url], "SPDX id or URL", CROISSANT),
    "url": ("url", a_url, "page of the dataset", CROISSANT),
    "creator": ("creator", [agent], "name,email,url of a person, or org:name,...", CROISSANT),
    "date_published": ("datePublished", a_date, "YYYY-MM-DD, or with a time", CROISSANT),
    "version": ("version", a_text, "preferably MAJOR.MINOR.PATCH", ADVISED),
    "keywords": ("keywords", words, "words to find it by, separated by commas", ADVISED),
    "publisher": ("publisher", [agent], "the same as for --creator", ADVISED),
    "date_created": ("dateCreated", a_date, "the same as for --date_published", ADVISED),
    "date_modified": ("dateModified", a_date, "the same as for --date_published", ADVISED),
    "same_as": ("sameAs", [a_url], "another page of the same dataset", ADVISED),
    "in_language": ("inLanguage", [a_text], "language, such as en", ADVISED),
    "sd_license": ("sdLicense", [license_url], "license of the description itself", ADVISED),
    "cite_as": ("citeAs", a_text, "citation, preferably BibTeX", "recommended by mlcroissant"),
    "name": ("name", a_text, "name of the dataset; if not given, that of its folder", ""),
    "description": ("description", a_text, "what it is about; what was counted is added", ""),
}
NEURIPS = "rai:dataBiases rai:dataSocialImpact rai:hasSyntheticData prov:wasDerivedFrom".split()


def not_stated(metadata: dict) -> list[str]:
    """Return lines with the options for what nobody stated, and a note on the version."""
    missing: dict[str, list[str]] = {}
    for option, (term, _, _, who) in OPTIONS.items():
        if term not in metadata:
            missing.setdefault(who, []).append(f"--{option}")
    if rai := [term for term in NEURIPS if term not in metadata]:
        missing["required by NeurIPS"] = ["--rai with", *rai]
    lines = [f"{who}, but not stated: {' '.join(options)}" for who, options in missing.items()]
    if not re.fullmatch(r"\d+\.\d+\.\d+([-+].+)?", metadata.get("version", "1.0.0")):
        lines.append(f"note: version {metadata['version']} is not MAJOR.MINOR.PATCH")
    return lines


def as_text(metadata: dict) -> str:
    """Return a description as JSON."""
    return json.dumps(metadata, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_description(args: argparse.Namespace) -> list[str]:
    """Describe a dataset, name the file once it reloads, and return lines that sum it up.

    Raises DatasetError if the dataset is damaged, or the description cannot be written.
    """
    given = {term: getattr(args, option) for option, (term, *_) in OPTIONS.items()}
    stated = {
        term: value[0] if isinstance(value, list) and len(value) == 1 else value
        for term, value in given.items()
        if value is not None
    }
    stated |= read_rai(args.rai) if args.rai else {}
    base_url = args.base_url and args.base_url.rstrip("/")
    metadata = build_metadata(args.csv_path, args.image_sha256, stated, base_url)
    temporary = args.output.with_name(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(as_text(metadata), encoding="utf-8")
        check_reload(temporary, args.csv_path, base_url)
        temporary.replace(args.output)
    except (OSError, ValueError) as error:  # ValueError: what JSON or UTF-8 cannot hold
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{args.output}: cannot be written: {reason}") from error
    finally:
        with suppress(OSError):  # nothing is there on a disk that is read-only
            temporary.unlink()
    lines = [metadata["description"], *not_stated(metadata)]
    indents = {"initial_indent": "  ", "subsequent_indent": "    "}
    lines = [textwrap.fill(line, 98, **indents, break_on_hyphens=False) for line in lines]
    return [str(args.output), *lines]


def without_words(item: dict) -> dict:
    """Return an object of a description without its own description."""
    return {key: value for key, value in item.items() if key != "description"}


def check_description(args: argparse.Namespace) -> list[str]:
    """Compare a description with what would be written now.

    Resources and record sets are compared except for their words; the other terms are the
    author's. Raises DatasetError that lists the differences.
    """
    path = args.output
    try:
        then = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=without_words)
        index_url = next(one["contentUrl"] for one in then["distribution"] if "contentUrl" in one)
        hashed = any(f"{IMAGES_SET}/sha256" in row for row in then["recordSet"][-1]["data"])
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file; run without --check to write it") from error
    except (ValueError, LookupError, TypeError, RecursionError, StopIteration) as error:
        text = f"not a description of this script ({error!r})"
        raise DatasetError(f"{path}: {text}; run without --check to write it") from error
    base_url = index_url.rpartition("/")[0] if "://" in index_url else None
    written = as_text(build_metadata(args.csv_path, hashed, {}, base_url))
    now = json.loads(written, object_hook=without_words)
    parts = ("distribution", "recordSet")
    texts = [as_text({part: one[part] for part in parts}).splitlines() for one in (then, now)]
    list_problems([*difflib.unified_diff(*texts, str(path), "the dataset", n=6, lineterm="")])
    check_reload(path, args.csv_path, base_url)
    return [f"{path} agrees with the dataset"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with code 2."""
    parser = argparse.ArgumentParser(
        description="Describe a dataset of create_dataset.py in MLCommons Croissant.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    csv_path, output = (f"./hackathon_dataset/{name}" for name in (INDEX_NAME, CROISSANT_NAME))
    add("-c", "--csv_path", type=Path, default=csv_path, help="index of the dataset")
    add("-o", "--output", type=Path, default=output, help="description to write, beside the index")
    for option, (_, parser_of, text, _) in OPTIONS.items():
        if isinstance(parser_of, list):
            add(f"--{option}", type=parser_of[0], action="append", help=f"{text}; may be repeated")
        else:
            add(f"--{option}", type=parser_of, help=text)
    add("--rai", type=Path, help="JSON file with terms of responsible AI and provenance")
    add(
        "--base_url",
        type=partial(checked, "folder"),
        help="where the folder of the dataset is published",
    )
    add("--image_sha256", action="store_true", help="add the checksums of the tensors")
    add("--check", action="store_true", help="write nothing; compare an existing description")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the process with code 2 if options do not fit each other."""
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    if args.check and (useless := given - {"csv_path", "output", "check"}):
        parser.error(f"--check writes nothing: --{min(useless)} would have no effect")
    if args.csv_path.suffix != ".csv" or args.output.suffix != ".json":
        parser.error("--csv_path must be named *.csv, and --output *.json")
    if args.output.parent.resolve() != args.csv_path.parent.resolve():
        parser.error(f"--output must lie in {args.csv_path.parent}, beside the index")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # what is not stated is listed at the end
    try:
        lines = check_description(args) if args.check else write_description(args)
    except (DatasetError, OSError) as error:
        for line in str(error).splitlines():
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
