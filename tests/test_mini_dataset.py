"""make_mini_dataset.py: the simulated jobs are what the contract says, and what they claim."""

from pathlib import Path

import make_mini_dataset as simulator
import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.stats import mad_std
from conftest import FINDER_COLUMNS, STEMS, contents, run

import create_dataset

SIZE = 256


def simulate(folder: Path, *options: str) -> int:
    return run(simulator, "-o", folder, "-s", str(SIZE), "-n", "2", *options)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "jobs"
    assert simulate(folder) == 0
    return folder


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
    finder = pd.read_csv(jobs / "jid002" / create_dataset.FINDER_NAME, sep=r"\s+")
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
