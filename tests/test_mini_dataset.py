"""make_mini_dataset.py: the simulated jobs are what the contract says, and what they claim."""

import re
import shutil
from pathlib import Path

import make_mini_dataset as simulator
import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.stats import mad_std
from astropy.wcs import WCS
from conftest import FINDER_COLUMNS, STEMS, contents, run

import create_dataset

SIZE = 256
SEED = simulator.parse_args([]).seed


def simulate(folder: Path, *options: str) -> int:
    return run(simulator, "-o", folder, "-s", str(SIZE), "-n", "2", *options)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "jobs"
    assert simulate(folder) == 0
    return folder


@pytest.fixture(scope="module")
def rapid(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "rapid"
    assert simulate(folder, "--layout", "rapid") == 0
    return folder


def read_list(job: Path) -> pd.DataFrame:
    [path] = job.glob("*_inject.txt")
    return pd.read_csv(path, sep=" ")


def truth_pixels(folder: Path, jid: str) -> np.ndarray:
    """Return x, y, flux of the rows that truth.csv has of a job, by the WCS of its difference."""
    truth = pd.read_csv(folder / "truth.csv").query("jid == @jid")
    wcs = WCS(fits.getheader(folder / jid / "zogy_diffimage_masked.fits"))
    return np.column_stack([*wcs.all_world2pix(truth["ra"], truth["dec"], 0), truth["flux"]])


def test_images_are_those_of_the_contract(jobs):
    for stem in STEMS:
        with fits.open(jobs / "jid001" / f"{stem}.fits") as hdus:
            assert hdus[0].data.dtype == np.dtype(">f4")
            assert hdus[0].data.shape == (SIZE, SIZE)
    difference = fits.getdata(jobs / "jid001" / f"{STEMS[2]}.fits")
    assert 0.01 < np.isnan(difference).mean() < 0.2
    assert np.isfinite(fits.getdata(jobs / "jid001" / f"{STEMS[0]}.fits")).all()


def test_score_is_in_sigma(jobs):
    score = fits.getdata(jobs / "jid001" / f"{STEMS[3]}.fits")
    assert mad_std(score, ignore_nan=True) == pytest.approx(1, abs=0.15)


def test_candidates_are_what_photutils_finds_in_the_difference(jobs):
    difference = fits.getdata(jobs / "jid001" / f"{STEMS[2]}.fits").astype(float)
    found = simulator.find_candidates(difference)
    catalog = pd.read_csv(jobs / "jid001" / "psfcat.csv")
    assert len(catalog) > 5
    np.testing.assert_allclose(catalog["x"], found["xcentroid"].astype(float))
    np.testing.assert_allclose(catalog["flux"], found["flux"].astype(float))


def test_both_layouts_are_written_and_read(jobs, tmp_path):
    one, two = (pd.read_csv(jobs / jid / "psfcat.csv") for jid in ("jid001", "jid002"))
    finder_name = create_dataset.FINDER_NAME.format(difference=STEMS[2])
    finder = pd.read_csv(jobs / "jid002" / finder_name, sep=r"\s+")
    assert set(one) == set(create_dataset.CATALOG_COLUMNS)
    assert list(finder) == FINDER_COLUMNS
    assert sorted(two["id"]) == sorted(finder["id"])
    assert two["id"].tolist() != finder["id"].tolist()
    assert run(create_dataset, "-i", jobs, "-o", tmp_path / "out") == 0
    assert len(pd.read_csv(tmp_path / "out" / "master_index.csv")) == len(one) + len(two)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(jobs, tmp_path):
    assert simulate(tmp_path / "again") == 0
    assert simulate(tmp_path / "other", "--seed", "5") == 0
    assert contents(tmp_path / "again") == contents(jobs)
    assert contents(tmp_path / "other") != contents(jobs)


def test_rapid_jobs_have_the_present_names_and_decoys_beside_them(rapid):
    job = rapid / "jid001"
    names = {path.name for path in job.iterdir()}
    decoys = {name for name in names if re.search("_negative|_uncert|_residual|sfft|naive", name)}
    assert names - decoys == {
        "bkg_subbed_science_image.fits",
        "awaicgen_output_mosaic_image_resampled_gainmatched.fits",
        "zogy_diffimage_masked.fits",
        "scorrimage_masked.fits",
        "zogy_diffimage_masked_psfcat.txt",
        "zogy_diffimage_masked_psfcat_finder.txt",
        "Roman_jid001_inject.txt",
    }
    assert {name.partition(".")[2] for name in decoys} == {"fits", "txt"}
    for path in job.glob("*.fits"):
        assert fits.getdata(path).shape == (SIZE, SIZE)
    reference = "awaicgen_output_mosaic_image_resampled_gainmatched.fits"
    assert fits.getdata(job / reference).dtype == np.dtype(">f8")


def test_rapid_images_are_those_of_the_other_layouts(jobs, rapid):
    for old, new in zip(STEMS, map(list, create_dataset.CHANNELS.values()), strict=True):
        [path] = [path for stem in new if (path := rapid / "jid002" / f"{stem}.fits").exists()]
        expected = fits.getdata(jobs / "jid002" / f"{old}.fits")
        np.testing.assert_array_equal(fits.getdata(path), expected)


def test_rapid_catalogs_are_joined_on_id_and_do_not_say_what_is_real(jobs, rapid):
    stem = rapid / "jid002" / "zogy_diffimage_masked_psfcat"
    fitted = pd.read_csv(f"{stem}.txt", sep=" ")
    finder = pd.read_csv(f"{stem}_finder.txt", sep=" ")
    assert list(fitted) == ["id", "x_fit", "y_fit", "flags"]
    present = {"xcentroid": "x_centroid", "ycentroid": "y_centroid", "npix": "n_pixels"}
    assert list(finder) == [present.get(name, name) for name in FINDER_COLUMNS]
    assert sorted(fitted["id"]) == sorted(finder["id"])
    assert fitted["id"].tolist() != finder["id"].tolist()


@pytest.mark.parametrize("number", [1, 2])
def test_every_transient_is_in_the_1_based_list_or_in_the_truth_table(rapid, number):
    jid = f"jid{number:03d}"
    transients = simulator.simulate_job(SEED, number, SIZE)[2]
    listed = read_list(rapid / jid).to_numpy() - [1, 1, 0]
    inside = ((listed[:, :2] >= -0.5) & (listed[:, :2] < SIZE - 0.5)).all(axis=1)
    table = truth_pixels(rapid, jid)
    assert abs(inside.sum() - len(table)) <= 1
    found = np.vstack([listed[inside], table])
    order, expected = found[:, 0].argsort(), transients[transients[:, 0].argsort()]
    np.testing.assert_allclose(found[order], expected, rtol=0, atol=1e-3)


def test_lists_have_sources_off_the_image(rapid):
    listed = read_list(rapid / "jid001")[["xpix", "ypix"]].to_numpy()
    assert (listed < 0).any()
    assert (listed > SIZE + 1).any()


def test_rapid_jobs_lie_at_different_places_on_a_turned_grid_of_roman_pixels(rapid):
    headers = [fits.getheader(path) for path in sorted(rapid.glob("jid*/scorrimage_masked.fits"))]
    assert len({header["CRVAL1"] for header in headers}) == 2
    for header in headers:
        sides = WCS(header).proj_plane_pixel_scales()
        np.testing.assert_allclose([side.to_value("arcsec") for side in sides], 0.11)
        assert header["RADESYS"] == "ICRS"
        assert header["CD1_2"] != 0


def test_the_same_arguments_give_the_same_rapid_bytes_over_jobs_of_another_layout(
    jobs, rapid, tmp_path
):
    shutil.copytree(jobs, tmp_path / "again")
    assert simulate(tmp_path / "again", "--layout", "rapid", "--seed", "5") == 0
    assert simulate(tmp_path / "again", "--layout", "rapid") == 0
    assert contents(tmp_path / "again") == contents(rapid)


def test_truth_of_replaced_jobs_is_removed(jobs, rapid, tmp_path):
    shutil.copytree(rapid, tmp_path / "again")
    assert simulate(tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(jobs)


def test_an_interrupted_run_leaves_no_truth_table(rapid, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    assert simulate(tmp_path, "--layout", "rapid") == 0
    monkeypatch.setattr(simulator, "write_sources", interrupt)
    assert simulate(tmp_path, "--layout", "rapid") == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jid001", "jid002"]


@pytest.mark.parametrize("layout", ["rapid", "mixed"])
def test_a_truth_table_of_someone_else_is_refused(tmp_path, capsys, layout):
    (tmp_path / "truth.csv").write_text("name,ra,dec\nSN 1987A,83.866,-69.27\n")
    before = contents(tmp_path)
    assert simulate(tmp_path, "--layout", layout) == 1
    assert "holds truth.csv" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_rapid_jobs_are_labelled_by_their_lists_and_fully_by_the_truth_table(tmp_path, capsys):
    assert run(simulator, "-o", tmp_path / "raw", "-n", 3, "-s", 512, "--layout", "rapid") == 0
    truth = str(tmp_path / "raw" / "truth.csv")
    assert f"-o ./hackathon_dataset --truth {truth}\n" in capsys.readouterr().out
    real = []
    for name, options in (("lists", ()), ("all", ("--truth", truth))):
        options = "-i", tmp_path / "raw", "-o", tmp_path / name, *options
        assert run(create_dataset, *options) == 0
        done = capsys.readouterr()
        offsets = re.search(r"offset +([+-]\S+) in x, ([+-]\S+) in y", done.out).groups()
        assert max(abs(float(offset)) for offset in offsets) < 0.15
        assert "WARNING" not in done.err
        real.append(pd.read_csv(tmp_path / name / "master_index.csv")["label"].sum())
    assert 0 < 1.5 * real[0] < real[1]


def test_rendering_keeps_the_flux_and_the_position():
    psf = simulator.make_psf(np.zeros(5), roll=0.3, blur=simulator.DIFFUSION_PX)
    image = simulator.render(np.array([[100.3, 80.8, 50.0]]), np.empty((0, 7)), psf, SIZE)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    assert image.sum() == pytest.approx(50, rel=1e-3)
    assert (image * columns).sum() / image.sum() == pytest.approx(100.3, abs=0.05)
    assert (image * rows).sum() / image.sum() == pytest.approx(80.8, abs=0.05)


def test_a_transient_stands_out_of_the_difference_and_a_steady_star_does_not():
    psf = simulator.make_psf(np.zeros(5), roll=0.3, blur=simulator.DIFFUSION_PX)
    star, transient = [60.0, 90.0, 300.0], [150.4, 120.2, 20.0]
    scene = simulator.render(np.array([star, transient]), np.empty((0, 7)), psf, SIZE)
    reference = simulator.render(np.array([star]), np.empty((0, 7)), psf, SIZE)
    difference, score = simulator.subtract(scene, reference, [psf, psf])
    assert np.unravel_index(score.argmax(), score.shape) == (120, 150)
    box = difference[110:131, 140:161]
    assert box.sum() == pytest.approx(20, rel=0.1)
    assert abs(difference[85:96, 55:66]).max() < 0.1


def test_matches_are_one_to_one_closest_first_within_4_px():
    injected = np.array([[10, 10], [50, 50], [90.0, 90]])
    candidates = np.array([[11, 10], [10.5, 10], [54.0, 50], [90, 94.1], [70, 70]])
    assert simulator.match_injected(candidates, injected).tolist() == [-1, 0, 1, -1, -1]


def test_a_folder_that_holds_other_jobs_is_refused(tmp_path, capsys):
    (tmp_path / "jid009").mkdir()
    assert simulate(tmp_path) == 1
    assert "holds jid009" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["jid009"]


def test_jobs_that_were_not_simulated_are_never_replaced(tmp_path, capsys):
    (tmp_path / "jid001").mkdir()
    assert simulate(tmp_path) == 1
    assert "holds jid001" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("-s", "255"), ("-s", "4090"), ("-n", "0"), ("--seed", "-1")])
def test_numbers_out_of_range_are_wrong_usage(tmp_path, option):
    with pytest.raises(SystemExit, match="2"):
        simulate(tmp_path, *option)
