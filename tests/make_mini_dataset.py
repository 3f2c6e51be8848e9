"""Simulate RAPID job folders, so that the toolkit runs without a download.

A job is a science exposure of the Roman Space Telescope minus a deeper reference, with injected
transients and all that usually goes wrong, and what photutils finds in the difference. Sources
only appear: there are no variable stars and none that fade.

Writes ``<output_dir>/jid001``, ...: four FITS images and a catalog each, in the layouts that
create_dataset.py reads. Layout ``rapid`` has the names that RAPID writes since March 2026, other
products beside them, and a WCS; its catalogs do not say what is real: half of a job's transients
are in its ``*_inject.txt``, the rest of all jobs in ``<output_dir>/truth.csv``, written last.
Simulated jobs of the same name and their ``truth.csv`` are replaced; any other such entry is an
error, before anything is written. The same arguments give the same bytes.

    python tests/make_mini_dataset.py
    python tests/make_mini_dataset.py -o ./small_dataset -n 3 -s 256 --layout two_files
    python tests/make_mini_dataset.py -o ./rapid_dataset --layout rapid

Needs photutils and scipy besides requirements.txt: ``python -m pip install photutils scipy``.
Exit codes: 0 done, 1 failed (the reason on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import logging
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from astropy.io import fits
from astropy.stats import mad_std
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from numpy.random import Generator
from photutils.detection import DAOStarFinder
from photutils.psf import CircularGaussianPRF, PSFPhotometry
from scipy import fft, ndimage, signal, spatial
from tqdm import tqdm

# Instrument. Lengths are pixels; rows of objects start with x and y, integer at a pixel's centre.
MIN_SIZE, MAX_SIZE = 256, 4089  # a Roman detector has 4089 x 4089 pixels
EXPOSURE_S, GAIN_E_PER_DN, READ_NOISE_E = 107.0, 1.5, 12.0
ELECTRONS_PER_DN_S = EXPOSURE_S * GAIN_E_PER_DN  # collected from a flux of 1 DN/s
SKY_DN_S, SKY_TILT_DN_S = 0.6, 0.01  # per pixel, subtracted; rms of what that leaves over the image
SATURATION_DN_S = 90_000 / ELECTRONS_PER_DN_S  # full well, electrons
REFERENCE_EXPOSURES = 8
RESAMPLING_PX = 0.45  # Gaussian sigma of the reference's interpolation, which correlates its noise
# Telescope: an annulus crossed by three spiders, lengths in units of the pupil's radius.
WAVELENGTHS_PX = 1.65 * np.linspace(0.93, 1.07, 5)  # lambda / D across a band near 2 um
OBSCURATION, SPIDER_WIDTH = 0.31, 0.035
ABERRATION_WAVES, PSF_ERROR_WAVES = 0.025, 0.014  # rms of each term; of what is believed of it
DIFFUSION_PX = 0.55  # Gaussian sigma of charge diffusion and pointing jitter
PSF_HALF, OVERSAMPLING = 32, 5  # a PSF has 65 x 65 pixels
# Scene. Densities are per million pixels; laws are (lowest, highest, slope of dN/dF), in DN/s.
STARS, STAR_LAW = 1000, (1.0, 30_000.0, 1.75)
GALAXIES, GALAXY_LAW = 650, (6.0, 600.0, 1.9)
TRANSIENTS, TRANSIENT_LAW = 42, (0.7, 150.0, 1.4)
RADIUS_LAW, HOSTLESS_FRACTION = (1.0, 8.0, 1.8), 0.25  # half-light radius of galaxies; transients
EDGE, MARGIN = 8, 72  # objects lie up to EDGE outside; images are drawn with MARGIN to spare
# Cosmic rays, hot pixels, dead pixels: per million pixels, mean length, median DN/s, its log's rms.
DEFECTS = ((130, 3.5, 0.55, 1.0), (250, 0, 1.4, 1.0), (150, 0, -0.3, 0.0))
FLAGGED_FRACTION = 0.6  # of the defects, known to the calibration and masked
# Differencing and detection.
SHIFT_PX = (0.05, 0.25)  # range of a job's misregistration
DISTORTION_PX, PROPER_MOTION_PX = 0.06, 0.02  # rms at the middle of an edge; of one star
REGISTRATION_PX, ZERO_POINT_ERROR = 0.08, 0.006  # rms per axis that S_corr allows for; relative
THRESHOLD_SIGMA, FINDER_FWHM_PX, MATCH_RADIUS_PX = 3.95, 2.1, 4.0
SCIENCE, DIFFERENCE = "bkg_subbed_science_image.fits", "diffimage_masked.fits"
REFERENCE, SCORE = "awaicgen_output_mosaic_image_resampled.fits", "scorrimage_masked.fits"
PSFCAT, FINDER = "psfcat.csv", "diffimage_masked_psfcat_finder.txt"
FINDER_NAMES = ["id", "xcentroid", "ycentroid", "sharpness", "roundness1", "roundness2", "npix"]
FINDER_NAMES += ["peak", "flux", "mag", "daofind_mag"]
FIT_NAMES = ["x_fit", "y_fit", "flags"]
PRESENT_NAMES = {"xcentroid": "x_centroid", "ycentroid": "y_centroid", "npix": "n_pixels"}
LAYOUTS = ("one_file", "two_files")  # that `mixed` alternates
# Layout `rapid`: its other names of images, and the stems of products that nobody should read.
RAPID_IMAGES = {REFERENCE: "awaicgen_output_mosaic_image_resampled_gainmatched.fits"}
RAPID_IMAGES[DIFFERENCE] = "zogy_diffimage_masked.fits"
DECOYS = ["zogy_diffimage_masked_negative", "zogy_diffimage_masked_residual"]
DECOYS += ["zogy_diffimage_uncert_masked", "sfftdiffimage_masked", "naive_diffimage_masked"]
TRUTH, TRUTH_NAMES = "truth.csv", ["ra", "dec", "flux", "jid"]  # degrees (ICRS), DN/s
PIXEL_ARCSEC = 0.11
OUTSIDE = [[-9.5, 100, 5], [100, MAX_SIZE + 6.3, 20], [MAX_SIZE + 200, -40, 9]]  # off any image

LOG = logging.getLogger("make_mini_dataset")


class DatasetError(Exception):
    """Something that the user can fix; the message says how."""


def draw_law(rng: Generator, count: int, law: tuple[float, float, float]) -> np.ndarray:
    """Draw `count` values between two limits from a power law (lowest, highest, slope > 1)."""
    low, high, slope = law
    power = 1 - slope
    return (low**power + rng.random(count) * (high**power - low**power)) ** (1 / power)


def make_scene(rng: Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw what is in the sky of a science image of `size` pixels a side.

    Returns
    -------
    stars, transients : float64 (n, 3), x, y, flux (DN/s); all transients lie inside
    galaxies : float64 (n, 7), also half-light radius (pixels), Sersic index, axis ratio, angle
    """
    counts = rng.poisson(np.array([STARS, GALAXIES, TRANSIENTS]) * size**2 / 1e6)
    xy, host_xy, new_xy = (rng.uniform(-EDGE, size + EDGE, (n, 2)) for n in counts)
    stars = np.column_stack([xy, draw_law(rng, counts[0], STAR_LAW)])
    radius = draw_law(rng, counts[1], RADIUS_LAW)
    # Large galaxies are the bright ones, or they would be too faint to see.
    flux = draw_law(rng, counts[1], GALAXY_LAW) * radius
    shape = rng.uniform([0.7, 0.3, 0], [3, 1, np.pi], (counts[1], 3))
    galaxies = np.column_stack([host_xy, flux, radius, shape])
    hosts = rng.integers(counts[1], size=counts[2])
    offset = rng.laplace(0, 0.6, new_xy.shape) * radius[hosts, None]
    hostless = rng.random(counts[2]) < HOSTLESS_FRACTION
    new_xy = np.where(hostless[:, None], new_xy, host_xy[hosts] + offset)
    transients = np.column_stack([new_xy, draw_law(rng, counts[2], TRANSIENT_LAW)])
    inside = np.all((new_xy > -0.5) & (new_xy < size - 0.5), axis=1)
    return stars, transients[inside], galaxies


def make_psf(aberrations: np.ndarray, roll: float, blur: float) -> np.ndarray:
    """Image a point by a matrix Fourier transform of the pupil (Soummer et al. 2007).

    Parameters
    ----------
    aberrations : float64 (5,), defocus, two of astigmatism, two of coma, in waves
    roll : orientation of the spiders, radians
    blur : Gaussian sigma of what is not optics, pixels

    Returns
    -------
    float32 (65, 65), integrated over pixels, sum 1
    """
    u = np.linspace(-1, 1, 96)
    radius, theta = np.hypot(u, u[:, None]), np.arctan2(u[:, None], u)
    pupil = (radius <= 1) & (radius >= OBSCURATION)
    for angle in roll + np.arange(3) * np.pi / 3:
        pupil &= np.abs(radius * np.sin(theta - angle)) > SPIDER_WIDTH / 2
    twice, once = radius**2 * np.exp(2j * theta), (3 * radius**3 - 2 * radius) * np.exp(1j * theta)
    terms = [2 * radius**2 - 1, twice.real, twice.imag, once.real, once.imag]
    field = pupil * np.exp(2j * np.pi * np.tensordot(aberrations, terms, axes=1))
    t = (np.arange((2 * PSF_HALF + 1) * OVERSAMPLING) + 0.5) / OVERSAMPLING - PSF_HALF - 0.5
    psf = np.zeros((t.size, t.size))
    for wavelength in WAVELENGTHS_PX:
        transform = np.exp(1j * np.pi / wavelength * t[:, None] * u)
        psf += np.abs(transform @ field @ transform.T) ** 2
    # The wings end smoothly, or bright stars would sit in visible squares.
    fade = np.clip((np.hypot(t, t[:, None]) / PSF_HALF - 0.7) / 0.3, 0, 1)
    psf *= np.cos(np.pi / 2 * fade) ** 2
    psf = ndimage.gaussian_filter(ndimage.uniform_filter(psf, OVERSAMPLING), blur * OVERSAMPLING)
    psf = psf[OVERSAMPLING // 2 :: OVERSAMPLING][:, OVERSAMPLING // 2 :: OVERSAMPLING]
    return (psf / psf.sum()).astype(np.float32)


def make_galaxy(row: np.ndarray) -> np.ndarray:
    """Sersic profile, float32 (K, K), DN/s, of one row of `galaxies`, around its nearest pixel."""
    x, y, flux, radius, index, ratio, angle = row
    half = int(np.ceil(7 * radius))
    grid = np.arange(-half, half + 1)
    dx, dy = grid - (x - round(x)), (grid - (y - round(y)))[:, None]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    # The softening of 0.3 stands for the integration over the pixel, where a cusp would alias.
    r = np.sqrt(along**2 * ratio + across**2 / ratio + 0.3) / radius
    profile = np.exp(-(2 * index - 1 / 3) * r ** (1 / index))
    profile *= np.cos(np.pi / 2 * np.clip(np.hypot(dx, dy) / half, 0, 1)) ** 2
    return (flux / profile.sum() * profile).astype(np.float32)


def render(points: np.ndarray, galaxies: np.ndarray, psf: np.ndarray, size: int) -> np.ndarray:
    """Draw points (n, 3) and galaxies (m, 7) without noise: float32 (size, size), DN/s."""
    image = np.zeros((size + 2 * MARGIN, size + 2 * MARGIN), np.float32)
    # A point between pixels is an interpolation kernel (Lanczos, 4 pixels), sharper than the PSF.
    corner, taps = np.floor(points[:, :2]).astype(int), np.arange(-3, 5)
    distance = taps - (points[:, :2] - corner)[:, :, None]
    weights = np.sinc(distance) * np.sinc(distance / 4)
    weights /= weights.sum(axis=2, keepdims=True)
    spread = points[:, 2, None, None] * weights[:, 1, :, None] * weights[:, 0, None, :]
    rows, columns = (corner[:, axis, None] + taps + MARGIN for axis in (1, 0))
    np.add.at(image, (rows[:, :, None], columns[:, None, :]), spread.astype(np.float32))
    for galaxy in galaxies:
        stamp = make_galaxy(galaxy)
        x0, y0 = (round(value) + MARGIN - stamp.shape[0] // 2 for value in galaxy[:2])
        image[y0 : y0 + stamp.shape[0], x0 : x0 + stamp.shape[0]] += stamp
    return signal.fftconvolve(image, psf, "same")[MARGIN:-MARGIN, MARGIN:-MARGIN]


def expose(rng: Generator, image: np.ndarray, exposures: int) -> np.ndarray:
    """Add photon and read noise of `exposures` averaged to an image in DN/s; saturate it."""
    scale = np.float32(ELECTRONS_PER_DN_S * exposures)
    electrons = rng.poisson((np.maximum(image, 0) + np.float32(SKY_DN_S)) * scale)
    read_noise = np.float32(READ_NOISE_E * np.sqrt(exposures))
    electrons = electrons + read_noise * rng.standard_normal(image.shape, np.float32)
    image = electrons.astype(np.float32) / scale
    return np.minimum(image, np.float32(SATURATION_DN_S)) - np.float32(SKY_DN_S)


def displace(objects: np.ndarray, size: int, frame: np.ndarray) -> np.ndarray:
    """Move rows of x, y, ... by shift in x and y, rotation, scale (pixels at an edge's middle)."""
    turn, stretch = frame[2:]
    moved = objects.copy()
    moved[:, :2] += frame[:2] + (2 * moved[:, :2] / size - 1) @ [[stretch, turn], [-turn, stretch]]
    return moved


def make_coverage(rng: Generator, size: int) -> np.ndarray:
    """Footprint of the reference: bool (size, size), a slightly turned square with ragged edges."""
    angle = np.radians(rng.uniform(0.4, 1.1) * rng.choice([-1, 1]))
    y, x = np.mgrid[:size, :size].astype(np.float32) - np.float32((size - 1) / 2)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    covered = np.ones((size, size), bool)
    for along, across in ((u, v), (u, -v), (v, u), (v, -u)):
        # The dithered exposures of the mosaic end in steps.
        steps = rng.uniform(0, size / 90, 12)
        step = np.clip((along / size + 0.5) * steps.size, 0, steps.size - 1).astype(int)
        covered &= across < size / 2 - 2 - steps[step]
    return covered


def make_defects(rng: Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Make the charge (DN/s) of cosmic rays and bad pixels; tell which of them are flagged."""
    charge, flagged = np.zeros((size, size), np.float32), np.zeros((size, size), bool)
    for density, mean_length, level, scatter in DEFECTS:
        for x, y in rng.uniform(0, size, (rng.poisson(density * size**2 / 1e6), 2)):
            angle = rng.uniform(0, 2 * np.pi)
            path = np.arange(0, rng.exponential(mean_length) + 0.2, 0.25)
            xy = np.array([x + path * np.cos(angle), y + path * np.sin(angle)]).astype(int)
            columns, rows = xy[:, np.all((xy >= 0) & (xy < size), axis=0)]
            deposit = rng.lognormal(0, scatter) * level * rng.gamma(4, 0.25, rows.size)
            np.add.at(charge, (rows, columns), deposit.astype(np.float32))
            flagged[rows, columns] |= rng.random() < FLAGGED_FRACTION
    column, top, length = rng.integers(size, size=3) // [1, 2, 4]
    charge[top : top + length, column] += rng.uniform(0.3, 1.0)
    flagged[top : top + length * 9 // 10, column] = True
    # Neighbouring pixels share a little charge through their capacitance.
    sharing = np.array([[0, 2, 0], [2, 92, 2], [0, 2, 0]], np.float32) / 100
    return ndimage.convolve(charge, sharing), flagged


def get_variance(image: np.ndarray | float, exposures: int) -> np.ndarray:
    """Variance of a pixel, (DN/s)^2, from its flux in DN/s, estimated as a pipeline does."""
    electrons = (np.maximum(image, 0) + SKY_DN_S) * ELECTRONS_PER_DN_S + READ_NOISE_E**2
    return electrons / (exposures * ELECTRONS_PER_DN_S**2)


def subtract(new: np.ndarray, ref: np.ndarray, psfs: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Proper difference and corrected score of Zackay, Ofek and Gal-Yam (2016, ApJ 830, 27).

    Parameters
    ----------
    new, ref : float32 (H, W), finite; psfs : two of float32 (S, S)
        Science and reference, DN/s, and their PSFs as the pipeline knows them.

    Returns
    -------
    difference, score : float32 (H, W)
        The difference, DN/s, with white noise; and S_corr: that filtered with its PSF, over the
        noise of sky, sources and registration. Sigma is 1 on empty sky.
    """
    # Room for the PSF between opposite edges, which the Fourier transform joins.
    shape = [fft.next_fast_len(side + 2 * PSF_HALF, real=True) for side in new.shape]
    inside = tuple(slice(side) for side in new.shape)
    # Stamps sit in the array's corner: the phase of the roll moves their centre to [0, 0].
    boxes = (np.pad(psf, [(0, side - psf.shape[0]) for side in shape]) for psf in psfs)
    p_new, p_ref = (fft.rfft2(np.roll(box, (-PSF_HALF, -PSF_HALF), (0, 1))) for box in boxes)
    var_new, var_ref = (np.float32(get_variance(0, n)) for n in (1, REFERENCE_EXPOSURES))
    power = var_new * np.abs(p_ref) ** 2 + var_ref * np.abs(p_new) ** 2
    power += power.max() * np.float32(1e-4)  # keeps the frequencies that no PSF passes finite
    new_hat, ref_hat = fft.rfft2(new, shape), fft.rfft2(ref, shape)
    difference = fft.irfft2((p_ref * new_hat - p_new * ref_hat) / np.sqrt(power), shape)[inside]
    kernel_new = p_new.conj() * np.abs(p_ref) ** 2 / power
    kernel_ref = p_ref.conj() * np.abs(p_new) ** 2 / power
    score = fft.irfft2(kernel_new * new_hat, shape)[inside]
    # Both images move with the one registration error, so one gradient is enough.
    variance = sum(slope**2 for slope in np.gradient(score)) * np.float32(REGISTRATION_PX**2)
    score = score - fft.irfft2(kernel_ref * ref_hat, shape)[inside]
    for image, kernel, exposures in ((new, kernel_new, 1), (ref, kernel_ref, REFERENCE_EXPOSURES)):
        squared = fft.rfft2(fft.irfft2(kernel, shape) ** 2)
        noise = fft.rfft2(get_variance(image, exposures).astype(np.float32), shape)
        variance += fft.irfft2(noise * squared, shape)[inside]
    return difference * np.sqrt(var_new + var_ref), score / np.sqrt(variance)


def find_candidates(difference: np.ndarray) -> pd.DataFrame:
    """Find candidates (`FINDER_NAMES`) and fit them (`FIT_NAMES`) in a difference with NaN."""
    mask = ~np.isfinite(difference)
    threshold = THRESHOLD_SIGMA * mad_std(difference, ignore_nan=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)  # `flags` tells of fits that fail
        found = DAOStarFinder(threshold, FINDER_FWHM_PX)(difference, mask=mask)
        if found is None:
            return pd.DataFrame(columns=FINDER_NAMES + FIT_NAMES)
        photometry = PSFPhotometry(CircularGaussianPRF(fwhm=FINDER_FWHM_PX), 5, aperture_radius=3)
        start = found["x_centroid", "y_centroid"]
        fitted = photometry(difference, mask=mask, init_params=start)
    renamed = {present: name for name, present in PRESENT_NAMES.items()}
    catalog = found.to_pandas().rename(columns=renamed)[FINDER_NAMES]
    return catalog.assign(**{name: np.array(fitted[name]) for name in FIT_NAMES})


def match_injected(candidates: np.ndarray, injected: np.ndarray) -> np.ndarray:
    """Match x, y of (n, 2) and (m, 2) one to one, closest pairs first: int64 (n,), -1 for none."""
    match = np.full(len(candidates), -1)
    distance = spatial.distance.cdist(candidates, injected)
    rows, columns = np.nonzero(distance <= MATCH_RADIUS_PX)
    for pair in np.argsort(distance[rows, columns], kind="stable"):
        candidate, source = rows[pair], columns[pair]
        if match[candidate] == -1 and source not in match:
            match[candidate] = source
    return match


def simulate_job(seed: int, number: int, size: int) -> tuple[dict, pd.DataFrame, np.ndarray]:
    """Simulate one job: its images by file name, its catalog, the injected transients (n, 3)."""
    rng = np.random.default_rng([seed, number])
    stars, transients, galaxies = make_scene(rng, size)
    optics = rng.normal(0, ABERRATION_WAVES, (2, 5))
    beliefs = optics + rng.normal(0, PSF_ERROR_WAVES, optics.shape)
    rolls = rng.uniform(0, np.pi / 3, 2)  # the reference was taken at another orientation
    blurs = (DIFFUSION_PX, np.hypot(DIFFUSION_PX, RESAMPLING_PX))
    believed = [make_psf(*epoch) for epoch in zip(beliefs, rolls, blurs, strict=True)]
    psfs = [make_psf(*epoch, DIFFUSION_PX) for epoch in zip(optics, rolls, strict=True)]
    new = expose(rng, render(np.vstack([stars, transients]), galaxies, psfs[0], size), 1)
    saturated = ndimage.binary_dilation(new > 0.9 * SATURATION_DN_S)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - np.float32(0.5)
    tilt_x, tilt_y = rng.normal(0, SKY_TILT_DN_S, 2).astype(np.float32)
    charge, flagged = make_defects(rng, size)
    new = np.minimum(new + tilt_x * x + tilt_y * y + charge, np.float32(SATURATION_DN_S))
    angle = rng.uniform(0, 2 * np.pi)
    shift = rng.uniform(*SHIFT_PX) * np.array([np.cos(angle), np.sin(angle)])
    frame = np.concatenate([shift, rng.normal(0, DISTORTION_PX, 2)])
    stars[:, :2] += PROPER_MOTION_PX * rng.standard_t(3, (len(stars), 2)).clip(-30, 30)
    stars, galaxies = displace(stars, size, frame), displace(galaxies, size, frame)
    ref = expose(rng, render(stars, galaxies, psfs[1], size), REFERENCE_EXPOSURES)
    ref *= np.float32(1 + rng.normal(0, ZERO_POINT_ERROR))
    ref = ndimage.gaussian_filter(ref, RESAMPLING_PX)
    covered = make_coverage(rng, size)
    whole_ref = np.where(covered, ref, np.float32(0))
    difference, score = subtract(np.where(covered & ~flagged, new, whole_ref), whole_ref, believed)
    ref[~covered] = np.nan
    for image in (difference, score):
        image[flagged | saturated | ~covered] = np.nan
    catalog = find_candidates(difference.astype(float))
    positions = catalog[["xcentroid", "ycentroid"]].to_numpy(float)
    catalog["match"] = match_injected(positions, transients[:, :2])
    images = {SCIENCE: new, REFERENCE: ref, DIFFERENCE: difference, SCORE: score}
    return images, catalog, transients


def make_sky(rng: Generator, size: int) -> fits.Header:
    """Draw where a job points, as a FITS WCS: a tangent plane, turned by about a degree."""
    (ra, dec), angle = rng.uniform([0, -60], [360, 60]), np.radians(rng.uniform(0.5, 1.5))
    along, across = PIXEL_ARCSEC / 3600 * np.array([np.cos(angle), np.sin(angle)])
    header = fits.Header({"RADESYS": "ICRS", "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"})
    header.update(CRVAL1=ra, CRVAL2=dec, CRPIX1=(size + 1) / 2, CRPIX2=(size + 1) / 2)
    header.update(CD1_1=-along, CD1_2=across, CD2_1=across, CD2_2=along)
    return header


def write_sources(folder: Path, transients: np.ndarray, sky: fits.Header) -> pd.DataFrame:
    """Write every other transient to a job's injection list; return the rest as rows of TRUTH."""
    table = pd.DataFrame(np.vstack([OUTSIDE, transients[::2]]), columns=["xpix", "ypix", "flux"])
    table[["xpix", "ypix"]] += 1  # RAPID counts pixels from 1 here
    path = folder / f"Roman_{folder.name}_inject.txt"
    table.to_csv(path, sep=" ", index=False, float_format="%.6f")
    rest = transients[1::2].copy()
    rest[:, :2] = WCS(sky).all_pix2world(rest[:, :2], 0)
    return pd.DataFrame(rest, columns=TRUTH_NAMES[:3]).assign(jid=folder.name)


def write_decoys(folder: Path, catalog: pd.DataFrame, rng: Generator, size: int) -> None:
    """Write RAPID's other products: images of noise, and catalogs of one candidate at most."""
    image = rng.integers(256, size=(size, size), dtype=np.uint8)
    for stem in DECOYS:
        fits.PrimaryHDU(image).writeto(folder / f"{stem}.fits")
        for end in ("psfcat", "psfcat_finder"):
            catalog[:1].to_csv(folder / f"{stem}_{end}.txt", sep=" ", na_rep="nan", index=False)


def write_catalog(folder: Path, catalog: pd.DataFrame, layout: str) -> None:
    """Write a job's catalog in one of the layouts."""
    if layout == "one_file":
        table = catalog.rename(columns={"xcentroid": "x", "ycentroid": "y"})
        table.drop(columns=["x_fit", "y_fit"]).to_csv(folder / PSFCAT, index=False)
        return
    # Brightest first, unlike the finder's file: only a join on id puts the rows together.
    table = catalog.sort_values("flux", ascending=False, kind="stable")
    finder, style = catalog[FINDER_NAMES], {"sep": " ", "na_rep": "nan", "index": False}
    if layout == "rapid":
        table[["id", *FIT_NAMES]].to_csv(folder / "zogy_diffimage_masked_psfcat.txt", **style)
        path = folder / "zogy_diffimage_masked_psfcat_finder.txt"
        finder.rename(columns=PRESENT_NAMES).to_csv(path, **style)
        return
    table[["id", *FIT_NAMES, "match"]].to_csv(folder / PSFCAT, index=False)
    finder.to_csv(folder / FINDER, **style)


def write_images(folder: Path, images: dict[str, np.ndarray], seed: int, sky: fits.Header) -> None:
    """Write a job's images, big-endian floats in primary HDUs; as `rapid` if there is a WCS."""
    for name, image in images.items():
        exposures = REFERENCE_EXPOSURES if name == REFERENCE else 1
        header = fits.Header({"SIMULATE": True, "JID": folder.name, "SEED": seed})
        header["GAIN"] = (GAIN_E_PER_DN, "electrons per DN")
        header.update(BUNIT="" if name == SCORE else "DN/s", EXPTIME=EXPOSURE_S * exposures)
        header.update(sky)
        final = RAPID_IMAGES.get(name, name) if sky else name
        pixels = image.astype(">f8" if sky and name == REFERENCE else ">f4")
        fits.PrimaryHDU(pixels, header).writeto(folder / final)


def is_simulated(path: Path) -> bool:
    """Tell whether this script made a job folder or a table of transients."""
    try:
        if path.name == TRUTH:
            return path.read_text(errors="replace").startswith(",".join(TRUTH_NAMES) + "\n")
        return fits.getheader(path / SCIENCE).get("SIMULATE") is True
    except OSError:
        return False


def check_output(output_dir: Path, jids: list[str]) -> None:
    """Make the output folder, or raise DatasetError where it holds jobs that would be mixed in."""
    present, own = sorted([*output_dir.glob("jid*"), *output_dir.glob(TRUTH)]), {*jids, TRUTH}
    alien = [path.name for path in present if path.name not in own or not is_simulated(path)]
    if alien:
        names = f"{', '.join(alien)}, not written by this script for the same {len(jids)} jobs"
        raise DatasetError(f"{output_dir}: holds {names}; remove them or change --output_dir")
    if output_dir.exists() and not output_dir.is_dir():
        raise DatasetError(f"{output_dir}: a file, expected a folder; choose another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)


def make_job(args: argparse.Namespace, number: int) -> tuple[np.ndarray, pd.DataFrame | None]:
    """Write a job folder, whole or not at all; return its counts, and its rows of TRUTH if any."""
    jid = f"jid{number:03d}"
    layout = LAYOUTS[(number - 1) % 2] if args.layout == "mixed" else args.layout
    images, catalog, transients = simulate_job(args.seed, number, args.size)
    rng = np.random.default_rng([args.seed, number, 1])  # apart, so all layouts show the same sky
    sky, truth = make_sky(rng, args.size) if layout == "rapid" else fits.Header(), None
    with tempfile.TemporaryDirectory(prefix=f".{jid}-", dir=args.output_dir) as scratch:
        fresh, final = Path(scratch) / jid, args.output_dir / jid
        fresh.mkdir()
        write_images(fresh, images, args.seed, sky)
        write_catalog(fresh, catalog, layout)
        if sky:
            write_decoys(fresh, catalog, rng, args.size)
            truth = write_sources(fresh, transients, sky)
        size = sum(path.stat().st_size for path in fresh.iterdir())
        if final.exists():
            final.rename(Path(scratch) / "replaced")
        fresh.rename(final)
    return np.array([len(catalog), (catalog["match"] != -1).sum(), len(transients), size]), truth


def make_dataset(args: argparse.Namespace) -> str:
    """Simulate and write all jobs; return the summary."""
    start = time.perf_counter()
    numbers = range(1, args.jobs + 1)
    check_output(args.output_dir, [f"jid{number:03d}" for number in numbers])
    truth_path = args.output_dir / TRUTH
    truth_path.unlink(missing_ok=True)  # it describes the jobs that are replaced now
    jobs = [make_job(args, number) for number in tqdm(numbers, unit="job", disable=None)]
    counts, truths = zip(*jobs, strict=True)
    candidates, real, injected, size = np.sum(counts, axis=0)
    labels = ""
    if args.layout == "rapid":
        with tempfile.TemporaryDirectory(prefix=".truth-", dir=args.output_dir) as scratch:
            fresh = Path(scratch) / TRUTH
            pd.concat(truths).to_csv(fresh, index=False, float_format="%.10f")
            fresh.replace(truth_path)
        labels = f" --truth {shlex.quote(str(truth_path))}"
    return (
        f"{args.output_dir}: {args.jobs} jobs of {args.size} x {args.size} pixels\n"
        f"  candidates  {candidates:,}, of which {real:,} real ({real / max(candidates, 1):.1%})\n"
        f"  injected    {injected:,} transients\n"
        f"  written     {size / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s\n"
        f"next: python create_dataset.py -i {shlex.quote(str(args.output_dir))} "
        f"-o ./hackathon_dataset{labels}"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Simulate RAPID job folders.")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("-o", "--output_dir", type=Path, default=Path("mini_dataset"), help="folder of the jobs")
    add("-n", "--jobs", type=int, default=16, help="number of jobs")
    add("-s", "--size", type=int, default=512, help=f"pixels a side, {MIN_SIZE} to {MAX_SIZE}")
    add("--seed", type=int, default=20260, help="seed of the simulation, 0 or more")
    layouts = (*LAYOUTS, "rapid", "mixed")
    add("--layout", choices=layouts, default="mixed", help="mixed alternates the first two")
    args = parser.parse_args(argv)
    limits = {"jobs": (1, 99_999), "size": (MIN_SIZE, MAX_SIZE), "seed": (0, 2**63 - 1)}
    for name, (low, high) in limits.items():
        if not low <= (value := getattr(args, name)) <= high:
            parser.error(f"--{name}: expected {low} to {high}, got {value}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    try:
        print(make_dataset(args))
    except (DatasetError, OSError) as error:
        LOG.error(error)
        return 1
    except KeyboardInterrupt:
        LOG.error("interrupted: every job is whole, but some may be missing or of an earlier run")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
