"""create_dataset.py, job folders as RAPID writes them today, and where their labels come from."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.table import MaskedColumn, Table
from astropy.wcs import WCS
from conftest import (
    DIFFERENCE,
    SHAPE,
    STEMS,
    contents,
    make_catalog,
    make_header,
    make_images,
    read_csv,
    run,
    write_job,
    write_labelled_jobs,
    write_list,
    write_rapid_job,
    write_truth,
    write_two_tables,
)

import create_dataset

HEIGHT, WIDTH = SHAPE
SCIENCE, REFERENCE, _, _ = STEMS
SIP = {"A_ORDER": 2, "B_ORDER": 2, "A_2_0": 2e-3, "B_1_1": -2e-3}  # several pixels at the edge
TPV = {"PV1_1": 1.0, "PV2_1": 1.0, "PV1_4": 60.0, "PV2_4": -60.0}  # as many at this scale


class Outcome(NamedTuple):
    """What a user sees of a run."""

    code: int
    index: pd.DataFrame | None
    out: str
    err: str

    def match(self) -> dict[float, float]:
        """Return `match` of each candidate by its id; the run did all that was asked for."""
        assert (self.code, "ERROR" in self.err) == (0, False), self.err
        assert (self.index["label"] == (self.index["match"] != -1)).all()
        return dict(zip(self.index["id"], self.index["match"], strict=True))


def distort(kind: str) -> fits.Header:
    """Return a header with distortion terms."""
    header = make_header()
    if kind == "SIP":
        header.update(SIP)
    for axis, name in enumerate(("RA---", "DEC--"), 1):
        header[f"CTYPE{axis}"] = f"{name}{'TAN-SIP' if kind == 'SIP' else 'TPV'}"
    if kind == "TPV":
        header.update(TPV)
    return header


@pytest.fixture
def build(tmp_path, capsys) -> Callable[..., Outcome]:
    """Return a function that makes the dataset of the jobs in tmp_path / "raw"."""

    def build(*options: object) -> Outcome:
        out = tmp_path / "out"
        options = ("-i", tmp_path / "raw", "-o", out, "--workers", 1, *options)
        code = run(create_dataset, *options)
        path = out / "master_index.csv"
        return Outcome(code, read_csv(path) if path.exists() else None, *capsys.readouterr())

    return build


def pair_by_brute_force(
    candidates: np.ndarray, sources: np.ndarray, radius: float
) -> dict[float, float]:
    """Return `match` by id: over and over, the nearest pair of those that are left."""
    distance = np.hypot(*(candidates[:, None] - sources).transpose(2, 0, 1))
    distance[:, ~((sources >= -0.5) & (sources < (WIDTH - 0.5, HEIGHT - 0.5))).all(axis=1)] = np.inf
    match = dict.fromkeys(range(1, len(candidates) + 1), -1)
    while distance.size and distance.min() <= radius:
        candidate, source = np.unravel_index(distance.argmin(), distance.shape)
        match[candidate + 1] = source
        distance[candidate], distance[:, source] = np.inf, np.inf
    return match


# Names


def rename_catalogs(job: Path, old: str, new: str) -> None:
    for suffix in ("_psfcat.txt", "_psfcat_finder.txt"):
        (job / f"{old}{suffix}").rename(job / f"{new}{suffix}")


@pytest.mark.parametrize(
    ("channel", "second", "first"),
    [(1, f"{REFERENCE}_gainmatched", REFERENCE), (2, DIFFERENCE, "diffimage_masked")],
)
def test_the_first_name_wins_and_a_tensor_made_of_another_is_rebuilt(
    tmp_path, build, channel, second, first
):
    job = write_rapid_job(tmp_path / "raw")
    write_list(job, [])
    build()
    path = tmp_path / "out" / "images" / "jid83.npy"
    before = np.load(path)
    added = job / f"{first}.fits"
    fits.writeto(added, make_images(7)[SCIENCE])
    if channel == 2:
        rename_catalogs(job, second, first)
    for path_of_old_date in (added, job):  # as `rsync -a` keeps them
        os.utime(path_of_old_date, (1, 1))
    assert "1 written, 0 up to date" in build().out
    changed = (np.load(path) != before).any(axis=(0, 1))
    assert changed.tolist() == [number == channel for number in range(4)]
    added.unlink()
    if channel == 2:
        rename_catalogs(job, first, second)
    assert "1 written, 0 up to date" in build().out
    np.testing.assert_array_equal(np.load(path), before)
    assert "0 written, 1 up to date" in build().out


DECOYS = ("{}_negative", "{}_uncert", "{}_residual", "sfft{}", "sfft_{}", "naive_{}")


def test_other_products_are_never_read(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw")
    write_list(job, [(10, 20)])
    build("--overwrite")
    before = contents(tmp_path / "out")
    stems = [stem for stems in create_dataset.CHANNELS.values() for stem in stems]
    for name in (decoy.format(stem) for stem in stems for decoy in DECOYS):
        for suffix in (".fits", "_psfcat.txt", "_psfcat_finder.txt", "_psfcat.csv"):
            (job / (name + suffix)).write_text("not for us")
    build("--overwrite")
    assert contents(tmp_path / "out") == before


def test_decoys_do_not_stand_in_for_a_missing_image(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw")
    write_list(job, [])
    path = job / f"{DIFFERENCE}.fits"
    for decoy in DECOYS:
        (job / f"{decoy.format(DIFFERENCE)}.fits").write_bytes(path.read_bytes())
    path.unlink()
    outcome = build()
    assert outcome.code == 1
    assert "no difference image; expected one of diffimage_masked.fits, " in outcome.err
    assert "zogy_diffimage_masked.fits" in outcome.err


# Catalogs


def test_two_text_catalogs_are_joined_on_id(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw", finder_order=[2, 0, 1])
    write_list(job, [])
    index = build().index
    expected = make_catalog(3)
    assert index["id"].tolist() == [1, 2, 3]
    assert index[["x", "y"]].to_numpy().tolist() == [[10, 20], [11, 21], [60, 50]]
    for column in ("npix", "peak", "flux", "daofind_mag", "flags", "sharpness"):
        assert index[column].tolist() == expected[column].tolist()


def cut_last_row(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def rename_id(path: Path) -> None:
    path.write_text(path.read_text().replace("id ", "source ", 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda psfcat, finder: finder.unlink(), "psfcat_finder.txt: .*No such file"),
        (lambda psfcat, finder: psfcat.unlink(), "no catalog; expected psfcat.csv or zogy_"),
        (lambda psfcat, finder: cut_last_row(finder), r"\(3 rows\).*\(2 rows\).* one to one"),
        (lambda psfcat, finder: cut_last_row(psfcat), r"\(2 rows\).*\(3 rows\).* one to one"),
        (lambda psfcat, finder: rename_id(finder), "cannot be joined: both need the column id"),
        (lambda psfcat, finder: rename_id(psfcat), "cannot be joined: both need the column id"),
    ],
)
def test_both_text_catalogs_are_needed(tmp_path, build, spoil, message):
    job = write_rapid_job(tmp_path / "raw")
    write_list(job, [])
    spoil(job / f"{DIFFERENCE}_psfcat.txt", job / f"{DIFFERENCE}_psfcat_finder.txt")
    outcome = build()
    assert outcome.code == 1
    assert re.search(message, outcome.err)


def test_the_finder_file_is_that_of_the_difference_image_in_use(tmp_path, build):
    job = write_job(tmp_path / "raw", "jid1")
    write_two_tables(job, make_catalog(), [*range(12)])
    write_rapid_job(tmp_path / "other")
    finder = tmp_path / "other" / "jid83" / f"{DIFFERENCE}_psfcat_finder.txt"
    finder.rename(job / finder.name)  # of other ids
    assert len(build().index) == 12


def test_psfcat_csv_comes_before_the_text_files_and_needs_no_finder_without_match(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw")
    make_catalog(5).drop(columns="match").to_csv(job / "psfcat.csv", index=False)
    write_list(job, [])
    assert len(build().match()) == 5


def test_a_match_in_the_finder_file_is_no_label(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw")
    path = job / f"{DIFFERENCE}_psfcat_finder.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0] + " match", *(f"{line} 4" for line in lines[1:])]) + "\n")
    assert "no labels" in build().err
    write_list(job, [])
    assert set(build().match().values()) == {-1}


# Lists of injected sources


def test_pixels_of_a_list_are_counted_from_one(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw")
    (job / "Roman_inject.txt").write_text("xpix ypix flux\n11 21 5.0\n")
    assert build("--match_radius", 0.001).match() == {1: 0, 2: -1, 3: -1}
    # As if the first pixel were 0, the source would be that of the next candidate.
    write_list(job, [(11, 21)])
    assert build("--match_radius", 0.001).match() == {1: -1, 2: 0, 3: -1}


@pytest.mark.parametrize(
    ("xy", "sources", "match"),
    [
        ([(10, 20)], [(10.5, 20), (9.75, 20)], [1]),
        ([(10.5, 20), (9.75, 20)], [(10, 20)], [-1, 0]),
        # The nearest pair goes first, though another choice would make two.
        ([(10, 20), (11.5, 20)], [(10.75, 20), (12.5, 20)], [0, 1]),
        ([(10, 20), (12, 20)], [(11.25, 20), (13.5, 20)], [-1, 0]),
        ([(10, 20), (30, 20)], [(10, 22), (30, 22.001), (50, 60)], [0, -1]),
        ([(10, 20)], [], [-1]),
        ([(10, 20)], [(np.nan, 20), (10, 20)], [1]),
    ],
)
def test_pairs_are_one_to_one_and_the_nearest_first(tmp_path, build, xy, sources, match):
    job = write_rapid_job(tmp_path / "raw", xy=xy)
    write_list(job, sources)
    assert [*build().match().values()] == match


@pytest.mark.parametrize(("radius", "match"), [("1.2499", -1), ("1.25", 0), ("1.2501", 0)])
def test_the_radius_is_in_pixels_and_counts_as_within(tmp_path, build, radius, match):
    job = write_rapid_job(tmp_path / "raw", xy=[(10, 20)])
    write_list(job, [(10.75, 21)])
    assert build("--match_radius", radius).match() == {1: match}


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ((-0.5, 10), True),
        ((-0.75, 10), False),
        ((0, -0.75), False),
        ((79.25, 71.25), True),
        ((79.5, 71), False),
        ((79, 71.5), False),
        ((75, 71), True),  # x beyond the height of the image
        ((71, 75), False),
    ],
)
def test_sources_off_the_image_take_no_part(tmp_path, build, source, seen):
    x, y = source
    job = write_rapid_job(tmp_path / "raw", xy=[(min(max(x, 0), 79), min(max(y, 0), 71))])
    write_list(job, [source])
    outcome = build("--match_radius", 9)
    assert outcome.match() == {1: 0 if seen else -1}
    found = f"{seen:d} on the images, {seen:d} found ({100 * seen:.1f} %)"
    assert re.search(r"sources +(.*)", outcome.out)[1] == found
    assert ("WARNING: no source was found in 1 of 1 jobs, such as jid83" in outcome.err) == (
        not seen
    )


def test_candidates_off_the_image_take_no_part(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw", xy=[(79.6, 30), (78.5, 30), (50, 60)])
    write_list(job, [(79.4, 30), (50, 60)])
    assert build().match() == {2: 0, 3: 1}


def test_a_list_without_rows_says_that_all_are_bogus(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw")
    write_list(job, [])
    outcome = build()
    assert outcome.match() == {1: -1, 2: -1, 3: -1}
    assert "0 on the images, 0 found" in outcome.out
    assert "WARNING: no source was found in 1 of 1 jobs, such as jid83" in outcome.err


def test_two_lists_in_one_folder_are_an_error(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw")
    write_list(job, [])
    write_list(job, [], "other_inject.txt")
    outcome = build()
    assert outcome.code == 1
    assert "Roman_inject.txt, other_inject.txt" in outcome.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xpix flux\n1 2\n", "expected the columns xpix and ypix"),
        ("a b\n1 2\n", "none of the expected columns"),
        ("xpix ypix\n1\n", "row 1 has 1 cells"),
        ("xpix ypix\n1 here\n", "column ypix: 'here' in row 1; expected a number"),
    ],
)
def test_a_list_that_cannot_be_read_leaves_out_its_job(tmp_path, build, text, message):
    job = write_rapid_job(tmp_path / "raw")
    (job / "Roman_inject.txt").write_text(text)
    outcome = build()
    assert outcome.code == 1
    assert f"{job}/Roman_inject.txt: " in outcome.err
    assert message in outcome.err


@pytest.mark.parametrize("seed", range(12))
def test_labels_are_those_of_brute_force(tmp_path, build, seed):
    rng = np.random.default_rng(seed)
    xy = rng.uniform((-0.5, -0.5), (WIDTH - 0.5, HEIGHT - 0.5), (rng.integers(1, 300), 2))
    near = xy[rng.integers(len(xy), size=50)] + rng.normal(0, 1.5, (50, 2))
    sources = np.concatenate([near, rng.uniform(-9, 90, (100, 2))])
    radius = rng.uniform(0.1, 6)
    write_list(write_rapid_job(tmp_path / "raw", xy=xy), sources)
    as_read = sources + 1 - 1  # in the list, 1 is the first pixel
    assert build("--match_radius", radius).match() == pair_by_brute_force(xy, as_read, radius)


def test_the_order_of_rows_does_not_matter(tmp_path, build):
    """With ties: sources and candidates on a grid, at the same distances again and again."""
    rng = np.random.default_rng(1)
    xy = np.array([(x, y) for x in range(2, 30, 2) for y in range(2, 30, 2)], float)
    sources = xy[rng.random(len(xy)) < 0.6] + rng.integers(-1, 2, (1, 2)) + (1, 0)
    labels = []
    for _ in range(4):
        job = write_rapid_job(tmp_path / "raw", f"jid{len(labels)}", xy)
        for path in job.glob("*.txt"):
            header, *rows = path.read_text().splitlines()
            path.write_text("\n".join([header, *rng.permutation(rows)]) + "\n")
        write_list(job, rng.permutation(sources))
        labels.append(len(labels))
    index = build().index
    by_job = index.pivot_table(index="id", columns="jid", values="label")
    assert 0.2 < by_job["jid0"].mean() < 0.8
    assert (by_job.nunique(axis=1) == 1).all()


# Truth tables

PIXELS = np.array([(10.0, 20.0), (60.0, 50.0), (79.0, 0.0), (40.0, 36.0), (120.0, 20.0)])
SKY_XY = PIXELS[[3, 0, 2, 1]] + 0.25  # of the candidates; the last source is off the image


@pytest.mark.parametrize("crval", [(150, 2), (0.0, -30), (359.99995, 10), (77, 89.9999), (77, -90)])
@pytest.mark.parametrize("distortion", ["", "SIP", "TPV"])
def test_sky_positions_become_pixels_by_the_wcs(tmp_path, build, crval, distortion):
    header = distort(distortion) if distortion else make_header()
    header["CRVAL1"], header["CRVAL2"] = crval
    write_rapid_job(tmp_path / "raw", xy=SKY_XY, header=header)
    truth = write_truth(tmp_path / "truth.csv", PIXELS, header)
    outcome = build("--truth", truth, "--match_radius", 0.36)
    assert outcome.match() == {1: 3, 2: 0, 3: 2, 4: 1}
    assert "4 on the images, 4 found (100.0 %)" in outcome.out
    assert "+0.25 in x, +0.25 in y" in outcome.out


@pytest.mark.parametrize("kind", ["SIP", "TPV"])
def test_the_distortions_of_these_tests_are_several_pixels(kind):
    full, plain = WCS(distort(kind)), WCS(make_header())
    moved = np.transpose(plain.all_world2pix(full.all_pix2world(PIXELS[:3], 0), 0)) - PIXELS[:3].T
    assert 2 < np.abs(moved).max() < 40


def test_the_image_may_be_an_extension_a_cube_of_one_plane_or_compressed(tmp_path, build):
    header = make_header()
    job = write_rapid_job(tmp_path / "raw", xy=SKY_XY, header=header)
    path, pixels = job / f"{DIFFERENCE}.fits", make_images()["diffimage_masked"]
    truth = write_truth(tmp_path / "truth.csv", PIXELS, header)
    for hdu in (
        fits.ImageHDU(pixels, header),
        fits.ImageHDU(pixels[None], header),
        fits.CompImageHDU(pixels, header, quantize_level=0, compression_type="GZIP_1"),
    ):
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, overwrite=True)
        assert build("--truth", truth).match() == {1: 3, 2: 0, 3: 2, 4: 1}


@pytest.mark.parametrize("name", ["truth.csv", "truth.ecsv", "truth.fits", "truth.vot"])
@pytest.mark.parametrize("columns", [("ra", "dec"), ("RA", "Dec")])
def test_a_truth_table_of_many_formats(tmp_path, build, name, columns):
    header = make_header()
    write_rapid_job(tmp_path / "raw", xy=SKY_XY, header=header)
    truth = write_truth(tmp_path / name, PIXELS, header, columns)
    assert build("--truth", truth).match() == {1: 3, 2: 0, 3: 2, 4: 1}


def test_positions_of_another_unit_are_converted(tmp_path, build):
    header = make_header()
    write_rapid_job(tmp_path / "raw", xy=SKY_XY, header=header)
    truth = write_truth(tmp_path / "truth.ecsv", PIXELS, header)
    table = Table.read(truth)
    table["ra"] /= 15
    table["ra"].unit, table["dec"].unit = "hourangle", "deg"
    table.write(truth, overwrite=True)
    assert build("--truth", truth).match() == {1: 3, 2: 0, 3: 2, 4: 1}


def with_mask(values: list[float]) -> MaskedColumn:
    return MaskedColumn(values, mask=[False, True])


TRUTHS = {
    "no dec": (
        Table({"ra": [1.0], "DE": [2.0]}),
        "expected one ra and one dec, it has ra, DE",
    ),
    "text": (Table({"ra": ["here", "1"], "dec": [1.0, 2]}), "not a table of sky positions (.csv"),
    "sexagesimal": (Table({"ra": ["1:2:3"], "dec": [2.0]}), "not a table of sky positions (.csv"),
    "masked": (Table({"ra": with_mask([1.0, 2]), "dec": [1.0, 2]}), "no valid position in row 2"),
    "inf": (Table({"ra": [np.inf], "dec": [2.0]}), "no valid position in row 1"),
    "beyond the pole": (Table({"ra": [1.0], "dec": [-90.1]}), "no valid position in row 1"),
    "metres": (Table({"ra": [1.0], "dec": [2.0]}, units={"ra": "m"}), "not a table of sky"),
}


@pytest.mark.parametrize(("table", "message"), TRUTHS.values(), ids=TRUTHS)
def test_a_truth_table_that_cannot_be_used_ends_the_run_before_any_job(
    tmp_path, build, table, message
):
    write_rapid_job(tmp_path / "raw", header=make_header())
    table.write(tmp_path / "truth.ecsv")
    outcome = build("--truth", tmp_path / "truth.ecsv")
    assert (outcome.code, outcome.index) == (1, None)
    assert outcome.err.startswith(f"ERROR: {tmp_path}/truth.ecsv: ")
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.csv", None, "No such file"),
        ("truth.dat", "ra dec\n1 2\n", "Format could not be identified"),
        ("truth.csv", "ra,dec\n1,2,3\n", "Number of header columns"),
        ("truth.csv", "", "expected one ra and one dec"),
        ("truth.fits", "not FITS", "not a table of sky positions"),
        ("truth.vot", "<xml", "not a table of sky positions"),
    ],
)
def test_a_truth_table_that_cannot_be_read_ends_the_run(tmp_path, build, name, text, message):
    write_rapid_job(tmp_path / "raw", header=make_header())
    if text is not None:
        (tmp_path / name).write_text(text)
    outcome = build("--truth", tmp_path / name)
    assert (outcome.code, outcome.index) == (1, None)
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert "format' argument" not in outcome.err


WITHOUT_WCS = {
    "none": (None, "it has no celestial axes"),
    "linear": (fits.Header({"CTYPE1": "LINEAR", "CTYPE2": "LINEAR"}), "it has no celestial axes"),
    "singular": (make_header(PC1_1=0.0, PC1_2=0.0, PC2_1=0.0, PC2_2=0.0), ".*singular"),
    "one axis": (fits.Header({"CTYPE1": "RA---TAN"}), ""),
    "off the sky": (
        make_header(CTYPE1="RA---SIN", CTYPE2="DEC--SIN", CDELT1=1e5, CDELT2=1e5),
        "a corner of the image has no sky position",
    ),
}


@pytest.mark.parametrize(("header", "reason"), WITHOUT_WCS.values(), ids=WITHOUT_WCS)
def test_a_job_without_a_usable_wcs_is_left_out_with_truth_only(tmp_path, build, header, reason):
    good = make_header()
    write_rapid_job(tmp_path / "raw", "jid1", xy=SKY_XY, header=good)
    write_list(write_rapid_job(tmp_path / "raw", "jid2", header=header), [])
    outcome = build("--truth", write_truth(tmp_path / "truth.csv", PIXELS, good))
    assert outcome.code == 1
    named = f"ERROR: jid2 left out: .*{DIFFERENCE}.fits: no usable WCS, as --truth needs: {reason}"
    assert re.match(named, outcome.err)
    assert outcome.index["match"].tolist() == [3, 0, 2, 1]
    assert "jid2 left out" not in build().err


def test_a_distortion_that_is_a_table_counts(tmp_path, build):
    """Its table is in another HDU."""
    job, header = write_rapid_job(tmp_path / "raw", xy=SKY_XY), make_header()
    for axis in (1, 2):
        header[f"CPDIS{axis}"] = "LOOKUP"
        for key, value in {"EXTVER": axis, "NAXES": 2, "AXIS.1": 1, "AXIS.2": 2}.items():
            header[f"DP{axis}"] = f"{key}: {value}"
    hdus = fits.HDUList([fits.PrimaryHDU(make_images()["diffimage_masked"], header)])
    for axis, pixels in ((1, 5.0), (2, -3.0)):
        grid = fits.ImageHDU(np.full((2, 2), pixels, "f4"), name="WCSDVARR", ver=axis)
        grid.header.update(CRPIX1=1, CRPIX2=1, CRVAL1=1, CRVAL2=1, CDELT1=80, CDELT2=80)
        hdus.append(grid)
    hdus.writeto(job / f"{DIFFERENCE}.fits", overwrite=True)
    truth = write_truth(tmp_path / "truth.csv", np.add(PIXELS, (5, -3)), make_header())
    assert build("--truth", truth).match() == {1: 3, 2: 0, 3: 2, 4: 1}


def test_two_columns_of_one_name_in_truth_are_an_error(tmp_path, build):
    """RA in hours beside ra in degrees: the last one won."""
    write_rapid_job(tmp_path / "raw", header=make_header())
    (tmp_path / "truth.csv").write_text("ra,dec,RA\n150,2,10\n")
    outcome = build("--truth", tmp_path / "truth.csv")
    assert (outcome.code, outcome.index) == (1, None)
    assert "expected one ra and one dec, it has ra, dec, RA" in outcome.err


def test_a_truth_file_of_two_tables_is_an_error(tmp_path, build):
    write_rapid_job(tmp_path / "raw", header=make_header())
    table = fits.BinTableHDU(Table({"ra": [150.0], "dec": [2.0]}))
    fits.HDUList([fits.PrimaryHDU(), table, table]).writeto(tmp_path / "truth.fits")
    outcome = build("--truth", tmp_path / "truth.fits")
    assert (outcome.code, outcome.index) == (1, None)
    assert "multiple tables are present" in outcome.err


def test_truth_with_a_byte_order_mark(tmp_path, build):
    header = make_header()
    write_rapid_job(tmp_path / "raw", xy=SKY_XY, header=header)
    truth = write_truth(tmp_path / "truth.csv", PIXELS, header)
    lines = [line.partition(",")[2] for line in truth.read_text().splitlines()]  # ra is first now
    truth.write_text("\n".join(lines), encoding="utf-8-sig")
    assert build("--truth", truth).match() == {1: 3, 2: 0, 3: 2, 4: 1}


def test_the_order_of_truth_does_not_matter(tmp_path, build):
    header, rng = make_header(), np.random.default_rng(2)
    pixels = rng.uniform((0, 0), (WIDTH - 1, HEIGHT - 1), (200, 2))
    write_rapid_job(tmp_path / "raw", xy=rng.permutation(pixels)[:150] + 0.125, header=header)
    labels = set()
    for _ in range(3):
        truth = write_truth(tmp_path / "truth.csv", rng.permutation(pixels), header)
        index = build("--truth", truth, "--match_radius", 3).index
        labels.add(tuple(index["label"]))
        assert np.isin(index["match"], [-1, *range(200)]).all()
    assert len(labels) == 1


def test_positions_that_repeat_are_a_warning(tmp_path, build):
    """As in a table with one row per epoch."""
    header = make_header()
    write_rapid_job(tmp_path / "raw", xy=SKY_XY, header=header)
    truth = write_truth(tmp_path / "truth.csv", np.concatenate([PIXELS, PIXELS[:2]]), header)
    assert "2 rows repeat a position" in build("--truth", truth).err


def test_lists_of_other_products_are_never_read(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw")
    names = "._Roman_inject.txt", "Roman_negative_inject.txt", "sfft_inject.txt", "naive_inject.txt"
    for name in names:
        write_list(job, [(11, 21)], name)
    assert "no labels" in build().err
    write_list(job, [(10, 20)])
    assert build("--match_radius", 0.5).match() == {1: 0, 2: -1, 3: -1}


def test_sip_terms_without_the_suffix_fill_no_pages(tmp_path, build):
    header = make_header(**SIP)
    write_rapid_job(tmp_path / "raw", xy=SKY_XY, header=header)
    outcome = build("--truth", write_truth(tmp_path / "truth.csv", PIXELS, header))
    assert outcome.match() == {1: 3, 2: 0, 3: 2, 4: 1}
    assert len((outcome.out + outcome.err).splitlines()) < 10


def test_distortions_of_an_image_with_a_third_axis(tmp_path, build):
    header = distort("SIP")
    job = write_rapid_job(tmp_path / "raw", xy=SKY_XY, header=header)
    cube = header.copy()
    cube.update(WCSAXES=3, CTYPE3="FREQ", CRVAL3=1.0, CDELT3=1.0, CRPIX3=1.0)
    path = job / f"{DIFFERENCE}.fits"
    fits.writeto(path, make_images()["diffimage_masked"][None], cube, overwrite=True)
    truth = write_truth(tmp_path / "truth.csv", PIXELS, header)
    assert build("--truth", truth).match() == {1: 3, 2: 0, 3: 2, 4: 1}


def test_numbers_of_truth_follow_those_of_the_list(tmp_path, build):
    header = make_header()
    job = write_rapid_job(tmp_path / "raw", xy=[*SKY_XY, (5, 60)], header=header)
    write_list(job, [(5, 61), (-7, 3)])
    truth = write_truth(tmp_path / "truth.csv", PIXELS, header)
    assert build("--truth", truth).match() == {1: 5, 2: 2, 3: 4, 4: 3, 5: 0}
    assert build().match() == {1: -1, 2: -1, 3: -1, 4: -1, 5: 0}


@pytest.mark.parametrize("hours", [False, True])
def test_truth_that_lies_on_no_image_is_a_warning(tmp_path, build, hours):
    header = make_header()
    job = write_rapid_job(tmp_path / "raw", xy=[*SKY_XY, (5, 60)], header=header)
    write_list(job, [(5, 60)])
    truth = write_truth(tmp_path / "truth.ecsv", PIXELS, header)
    if hours:  # right ascension in hours instead of degrees
        table = Table.read(truth)
        table["ra"] /= 15
        table.write(truth, overwrite=True)
    outcome = build("--truth", truth)
    found = "WARNING: no source of --truth lies on an image; are ra and dec ICRS, in degrees?\n"
    assert outcome.code == 0
    assert (found in outcome.err) == hours


def test_truth_without_rows_lies_on_no_image(tmp_path, build):
    job = write_rapid_job(tmp_path / "raw", header=make_header())
    write_list(job, [(10, 20)])
    (tmp_path / "truth.csv").write_text("ra,dec\n")
    outcome = build("--truth", tmp_path / "truth.csv")
    assert outcome.match() == {1: 0, 2: -1, 3: -1}
    assert "WARNING: no source of --truth lies on an image" in outcome.err


def test_truth_replaces_the_column_match(tmp_path, build):
    header = make_header()
    job = write_job(tmp_path / "raw")
    for path in job.glob("*.fits"):
        fits.writeto(path, fits.getdata(path), header, overwrite=True)
    catalog = make_catalog()
    truth = write_truth(tmp_path / "truth.csv", catalog[["x", "y"]].to_numpy()[[4, 2]], header)
    match = build("--truth", truth, "--match_radius", 0.01).match()
    assert match == {**dict.fromkeys(catalog["id"], -1), 5: 0, 3: 1}
    assert set(build().match().values()) == {-1, 3, 7, 11}


def test_the_column_match_comes_before_a_list(tmp_path, build):
    job = write_job(tmp_path / "raw")
    write_list(job, [(1, 2)])
    write_list(job, [(3, 4)], "other_inject.txt")  # which nobody asks for
    assert set(build().match().values()) == {-1, 3, 7, 11}


# What is said, and what is kept


def test_the_summary_tells_of_sources_and_of_the_three_origins(tmp_path, build):
    xy = [(10, 20), (30, 40), (50, 60)]
    write_list(write_rapid_job(tmp_path / "raw", "jid1", xy), [(10, 20), (60, 10), (99, 9)])
    write_list(write_rapid_job(tmp_path / "raw", "jid2", xy), [(29.5, 40.25)])
    write_job(tmp_path / "raw", "jid3")
    outcome = build()
    assert outcome.err == ""
    assert re.search(r"labels +2 jobs labelled by \*_inject.txt\n", outcome.out)
    assert re.search(r"labels +1 jobs labelled by match\n", outcome.out)
    assert re.search(r"sources +3 on the images, 2 found \(66.7 %\)\n", outcome.out)
    assert re.search(r"offset +\+0.25 in x, -0.12 in y", outcome.out)
    (tmp_path / "raw" / "jid3" / "psfcat.csv").rename(tmp_path / "psfcat.csv")
    assert "labelled by" not in build().out


@pytest.mark.parametrize("shift", [0.4, 0.75])
def test_a_list_that_is_off_by_more_than_half_a_pixel_is_a_warning(tmp_path, build, shift):
    rng = np.random.default_rng(0)
    xy = rng.uniform(2, 60, (30, 2))
    job = write_rapid_job(tmp_path / "raw", xy=xy)
    write_list(job, np.add(xy, [0, shift]))
    outcome = build("--match_radius", 1)
    assert f"+0.00 in x, -{shift:.2f} in y" in outcome.out
    assert ("WARNING: candidates are off their sources" in outcome.err) == (shift > 0.5)


def test_a_list_counted_from_zero_is_a_warning(tmp_path, build):
    xy = np.random.default_rng(0).uniform(2, 60, (30, 2))
    write_list(write_rapid_job(tmp_path / "raw", xy=xy), xy, first=0)
    outcome = build()
    assert "+1.00 in x, +1.00 in y" in outcome.out
    assert "does the list number its pixels from 0?" in outcome.err


def test_other_labels_rewrite_the_index_and_no_tensor(tmp_path, build):
    header = make_header()
    job = write_rapid_job(tmp_path / "raw", xy=SKY_XY, header=header)
    injected = write_list(job, [(10, 20)])
    truth = write_truth(tmp_path / "truth.csv", PIXELS, header)
    build()
    for options in (["--truth", truth], ["--match_radius", 0.1], []):
        outcome = build(*options)
        assert "0 written, 1 up to date" in outcome.out
    assert outcome.match()[2] == 0
    injected.write_text("xpix ypix flux\n")
    outcome = build()
    assert "0 written, 1 up to date" in outcome.out
    assert set(outcome.match().values()) == {-1}
    write_truth(truth, PIXELS[:0], header)
    assert set(build("--truth", truth).match().values()) == {-1}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bytes_do_not_depend_on_workers(tmp_path, workers):
    options = write_labelled_jobs(tmp_path)
    for out, count in (("one", 1), ("other", workers)):
        assert run(create_dataset, *options, "-o", tmp_path / out, "--workers", count) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize("radius", ["0", "-1", "nan", "inf", "far"])
def test_a_radius_that_is_no_number_above_zero_is_wrong_usage(tmp_path, build, radius):
    with pytest.raises(SystemExit, match="2"):
        build("--match_radius", radius)


# --jobs


def jids(outcome: Outcome) -> list[str]:
    return [*outcome.index["jid"].unique()]


def test_only_some_jobs(raw, tmp_path, build):
    build()
    tensors = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    outcome = build("--jobs", "jid003", "jid001", "jid003")
    assert outcome.code == 0
    assert jids(outcome) == ["jid001", "jid003"]
    assert "kept 2 tensors of jobs that are not in this run" in outcome.err
    assert outcome.err.endswith("croissant.json will include them: jid002, jid004\n")
    assert tensors == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npy")}
    assert jids(build("--jobs", "jid002")) == ["jid002"]


def test_jobs_from_a_file(raw, tmp_path, build):
    (tmp_path / "list.txt").write_text("jid002\n\n jid004 \n")
    assert jids(build("--jobs", f"@{tmp_path}/list.txt", "jid001")) == [
        "jid001",
        "jid002",
        "jid004",
    ]
    assert len([*(tmp_path / "out" / "images").iterdir()]) == 3


@pytest.mark.parametrize("names", [["jid9"], ["jid001", "jid9", "jid10"], ["psfcat"]])
def test_a_job_that_is_not_there_ends_the_run_before_any_job(raw, tmp_path, build, names):
    outcome = build("--jobs", *names)
    assert outcome.code == 1
    missing = [name for name in names if name != "jid001"]
    assert f"no such job folders, as named by --jobs: {', '.join(missing)}\n" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_file_of_jobs_that_is_missing_is_an_error(raw, tmp_path, build):
    outcome = build("--jobs", f"@{tmp_path}/list.txt")
    assert (outcome.code, outcome.index) == (1, None)
    assert outcome.err == f"ERROR: [Errno 2] No such file or directory: '{tmp_path}/list.txt'\n"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("jid001\r\njid002\r\n".encode("utf-8-sig"), 0),
        ("jid001\r\n".encode("utf-16"), 1),
        (b"\xff\xfe", 1),
        (b"--overwrite\n", 1),
        (b"@list.txt", 1),
    ],
)
def test_a_file_of_jobs_in_another_encoding(raw, tmp_path, build, content, code):
    (tmp_path / "list.txt").write_bytes(content)
    outcome = build("--jobs", f"@{tmp_path}/list.txt")
    assert outcome.code == code
    assert ("no such job folders" in outcome.err) == (code == 1)


def test_jobs_may_be_given_twice_and_end_in_a_slash(raw, build):
    assert jids(build("--jobs", "jid001/", "--jobs", "jid003")) == ["jid001", "jid003"]
