"""create_dataset.py, from FITS images to tensors."""

import gzip
import os
import re
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.visualization import ZScaleInterval
from conftest import STEMS, contents, make_images, run, write_job
from numpy.testing import assert_array_equal

import create_dataset

SCIENCE = STEMS[0]
IMAGE = make_images(5, (20, 30))[STEMS[2]]  # with masked pixels, which tell where zero flux is
COUNTS = np.rint(100 * np.nan_to_num(IMAGE)).astype(">i2")
EMPTY, CUBE = fits.PrimaryHDU(), fits.PrimaryHDU(np.zeros((2, 20, 30), np.float32))
TABLE = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.zeros(3))])
MASK = fits.ImageHDU(np.indices(IMAGE.shape, np.uint8)[1], name="MASK")


def content_of(*hdus: fits.PrimaryHDU | fits.ImageHDU) -> bytes:
    """Return the content of a FITS file."""
    fits.HDUList(list(hdus)).writeto(file := BytesIO())
    return file.getvalue()


def tiles_of(pixels: np.ndarray, compression: str = "GZIP_2") -> fits.CompImageHDU:
    return fits.CompImageHDU(pixels, compression_type=compression, quantize_level=0)


PLAIN, TILED = content_of(fits.PrimaryHDU(IMAGE)), content_of(EMPTY, tiles_of(IMAGE))
ZIPPED = gzip.compress(PLAIN, mtime=0)


def write_arrays(folder: Path, *arrays: np.ndarray) -> Path:
    """Write a job with these arrays in its first channels and return its folder."""
    images = make_images(shape=arrays[0].shape) | dict(zip(STEMS, arrays, strict=False))
    return write_job(folder / "raw", images=images)


def write_science(folder: Path, content: bytes, suffix: str = ".fits", jid: str = "jid001") -> Path:
    """Write a job with this content in the file of its science image and return its folder."""
    job = write_job(folder / "raw", jid, images=make_images(shape=IMAGE.shape))
    (job / f"{SCIENCE}.fits").unlink()
    (job / f"{SCIENCE}{suffix}").write_bytes(content)
    return job


def build(raw: Path, *options: str) -> int:
    """Make the dataset `out` beside the folder of the jobs, in this process."""
    return run(create_dataset, "-i", raw, "-o", raw.parent / "out", "--workers", 1, *options)


def tensor_path(job: Path) -> Path:
    return job.parent.parent / "out" / "images" / f"{job.name}.npy"


def tensor_of(job: Path, *options: str) -> np.ndarray:
    """Build the dataset of a job's folder and return the tensor of the job."""
    assert build(job.parent, *options) == 0
    return np.load(tensor_path(job))


def channel_of(job: Path, *options: str) -> np.ndarray:
    return tensor_of(job, *options)[..., 0]


def reason_of(job: Path, capsys: pytest.CaptureFixture) -> str:
    """Build the dataset of a job's folder and return why the job was left out."""
    assert build(job.parent) == 1
    assert not tensor_path(job).exists()
    begin = f"ERROR: {job.name} left out: "
    [line] = [text for text in capsys.readouterr().err.splitlines() if text.startswith(begin)]
    return line.removeprefix(begin)


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Return what the tensor should hold of an image, by astropy and in the image's precision."""
    precision = np.result_type(pixels, np.float32).type
    pixels = pixels.astype(precision)
    finite = np.isfinite(pixels)
    with np.errstate(over="ignore"):
        vmin, vmax = map(float, ZScaleInterval().get_limits(pixels))
        if not vmin < vmax:
            vmin, vmax = float(pixels[finite].min()), float(pixels[finite].max())
        flux = np.where(finite, pixels, precision(0))
        return np.clip((flux - precision(vmin)) / precision(vmax - vmin), 0, 1).astype("<f4")


def stacked(*images: np.ndarray) -> np.ndarray:
    return np.stack([scaled(image) for image in images], axis=-1)


def test_tensor_is_what_astropys_zscale_gives_of_each_channel(tmp_path):
    before = contents(job := write_job(tmp_path / "raw"))
    assert_array_equal(tensor_of(job), stacked(*make_images().values()))
    assert contents(job) == before


def test_tensor_is_c_ordered_little_endian_float32_in_0_1(tmp_path):
    tensor = tensor_of(write_job(tmp_path / "raw"))
    assert (tensor.dtype.str, tensor.shape) == ("<f4", (72, 80, 4))
    assert tensor.flags.c_contiguous
    assert (tensor.min(), tensor.max()) == (0, 1)


@pytest.mark.parametrize("size", [2, 3, 5, 9, 10, 60, 999, 1000, 1001, 1999, 2000, 2500])
def test_limits_of_so_many_finite_pixels_are_astropys(tmp_path, size):
    rng, arrays = np.random.default_rng(size), []
    for number in range(4):
        deviation = 10 ** rng.uniform(-3, 3)
        pixels = rng.normal(rng.normal(0, 100), deviation, size)
        pixels[rng.random(size) < rng.uniform(0, 0.6)] *= rng.normal(0, 50)  # sources, or noise
        if number == 3 and size > 5:
            pixels = np.rint(pixels / deviation)  # many pixels are equal
        arrays.append(np.full((40, 70), np.nan, np.float32))
        arrays[-1].flat[np.sort(rng.choice(40 * 70, size, replace=False))] = pixels
    assert_array_equal(tensor_of(write_arrays(tmp_path, *arrays)), stacked(*arrays))


@pytest.mark.parametrize("shape", [(3, 5), (31, 40), (32, 40), (33, 77), (130, 200), (200, 331)])
@pytest.mark.parametrize("fraction", [0, 0.04, 0.7, 1])
def test_limits_are_astropys_on_the_finite_pixels(tmp_path, shape, fraction):
    rng = np.random.default_rng(7)
    arrays = [rng.normal(5, 3, shape).astype(dtype) for dtype in (">f4", "<f4", ">f8", ">f4")]
    for pixels in arrays:
        pixels[rng.random(shape) < fraction] = np.nan
        pixels[-1, -2:] = np.inf, 1000
        pixels[0, 0] = -50
    assert_array_equal(tensor_of(write_arrays(tmp_path, *arrays)), stacked(*arrays))


@pytest.mark.parametrize("chunk", [7, 64])
def test_tensor_is_the_same_whatever_is_read_at_a_time(tmp_path, monkeypatch, chunk):
    rng, images = np.random.default_rng(1), list(make_images(shape=(40, 70)).values())
    images[:2] = images[0].astype(np.float64) + 1e8, np.rint(100 * images[1]).astype(np.int16)
    for image in images[2:]:
        image[rng.random(image.shape) < 0.3] = np.nan
        image.flat[: 4 * chunk] = np.nan  # whole chunks
        image.flat[6 * chunk :: chunk] = np.nan  # the first pixel of each of the others
        image.flat[8 * chunk - 1 :: 3 * chunk] = np.inf  # the last one of some
    expected = tensor_of(job := write_arrays(tmp_path, *images))
    monkeypatch.setattr(create_dataset, "CHUNK_PIXELS", chunk)
    assert tensor_of(job, "--overwrite").tobytes() == expected.tobytes()
    assert_array_equal(expected, stacked(*images))


def test_minimum_and_maximum_stand_in_if_the_limits_coincide_and_masked_is_zero_flux(tmp_path):
    pixels = np.zeros((50, 50), np.float32)
    pixels[:2, :4] = [[-2, 6, 2, np.nan], [0, 4, np.inf, -np.inf]]
    assert ZScaleInterval().get_limits(pixels) == (0, 0)
    channel = channel_of(write_arrays(tmp_path, pixels))
    # Zero flux is a quarter of the way from -2 to 6, and so is every masked pixel.
    assert channel[:2, :4].tolist() == [[0, 1, 0.5, 0.25], [0.25, 0.75, 0.25, 0.25]]


@pytest.mark.parametrize(("level", "value"), [(100, 0), (-100, 1)])
def test_zero_flux_beyond_the_limits_is_clipped(tmp_path, level, value):
    channel = channel_of(write_arrays(tmp_path, IMAGE + level))
    assert (channel[np.isnan(IMAGE)] == value).all()


def test_float64_of_small_contrast_on_a_high_level_keeps_its_grey_levels(tmp_path):
    pixels = 1e8 + np.random.default_rng(0).uniform(-3, 3, (72, 80))
    channel = channel_of(write_arrays(tmp_path, pixels))
    assert np.unique(channel).size > 3000
    assert_array_equal(channel, scaled(pixels))


@pytest.mark.parametrize("where", [0, slice(None)], ids=["one pixel", "all pixels"])
@pytest.mark.parametrize("factor", [1e-300, 1e160, 1e300])
def test_float64_beyond_float32_is_scaled_in_float64(tmp_path, where, factor):
    pixels = np.random.default_rng(0).normal(1, 3, IMAGE.shape)
    pixels.flat[where] *= factor
    channel = channel_of(write_arrays(tmp_path, pixels))
    assert np.isfinite(channel).all()
    assert_array_equal(channel, scaled(pixels))


MOST = np.arange(90).reshape(9, 10) % 3 > 0
RANGELESS = [
    (np.full((9, 9), np.nan, np.float32), "no finite pixel"),
    (np.full((9, 9), np.inf, np.float32), "no finite pixel"),
    (np.full((9, 9), 2.5, np.float32), "cannot be scaled between 2.5 and 2.5"),
    (np.full((9, 9), 7, np.int16), "cannot be scaled between 7 and 7"),
    (np.where(MOST, 2.5, np.nan), "cannot be scaled between 2.5 and 2.5"),
    (np.where(MOST, 3e38, -3e38).astype(np.float32), "cannot be scaled between -3e+38 and 3e+38"),
    (np.where(MOST, 1.7e308, -1.7e308), "cannot be scaled between -1.7e+308 and 1.7e+308"),
]


@pytest.mark.parametrize(("pixels", "message"), RANGELESS)
def test_images_without_a_range_are_refused(tmp_path, capsys, pixels, message):
    job = write_arrays(tmp_path, pixels)
    assert reason_of(job, capsys) == f"{job / SCIENCE}.fits: {message}"


def test_limits_that_float32_cannot_tell_apart_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ZScaleInterval, "get_limits", lambda self, pixels: (0.0, 1e-60))
    reason = reason_of(write_arrays(tmp_path, IMAGE), capsys)
    assert "cannot be scaled between 0 and 1e-60" in reason


def test_a_tensor_is_checked_before_it_is_written(tmp_path, capsys, monkeypatch):
    nan = np.float32(np.nan)
    monkeypatch.setattr(np, "clip", lambda pixels, low, high, out: np.multiply(pixels, nan, out))
    assert "NaN in the tensor" in reason_of(write_job(tmp_path / "raw"), capsys)
    assert not contents(tmp_path / "out")


def test_shapes_that_differ_are_refused(tmp_path, capsys):
    images = make_images()
    images[STEMS[3]] = images[STEMS[3]][:-1]
    reason = reason_of(write_job(tmp_path / "raw", images=images), capsys)
    assert re.search(rf"\(72, 80\).* {STEMS[3]}\.fits \(71, 80\)", reason)


def card(keyword: str, value: object) -> str:
    return f"{keyword:<8}= {value:>20}"


def headed(*cards: str, end: str = "END") -> bytes:
    """Return the content of a file with such a header and the pixels of IMAGE."""
    header = "".join(text.ljust(80) for text in (*cards, end)).encode()
    return b"".join(part.ljust(-(-len(part) // 2880) * 2880) for part in (header, IMAGE.tobytes()))


START = (card("SIMPLE", "T"), card("BITPIX", -32), card("NAXIS", 2), card("NAXIS1", 30))
GOOD = (*START, card("NAXIS2", 20))
HISTORY = "HISTORY".ljust(77, "x") + "END"
MANY = [f"{card(f'KEY{number}', number)} / END of nothing" for number in range(200)]
NO_PIXELS = fits.PrimaryHDU(np.zeros((0, 5), np.float32))
READABLE = {
    "big-endian": (IMAGE, PLAIN),
    "float64": (IMAGE.astype(">f8"), content_of(fits.PrimaryHDU(IMAGE.astype(">f8")))),
    "int16": (COUNTS, content_of(fits.PrimaryHDU(COUNTS))),
    "uint16": (abs(COUNTS), content_of(fits.PrimaryHDU(abs(COUNTS).astype(np.uint16)))),
    "int32": (COUNTS * 1e3, content_of(fits.PrimaryHDU(COUNTS * np.int32(1000)))),
    "extension": (IMAGE, content_of(EMPTY, fits.ImageHDU(IMAGE))),
    "behind a table and a cube": (IMAGE, content_of(CUBE, TABLE, fits.ImageHDU(IMAGE))),
    "behind no pixels": (IMAGE, content_of(NO_PIXELS, fits.ImageHDU(IMAGE))),
    "first of two": (IMAGE, content_of(fits.PrimaryHDU(IMAGE), fits.ImageHDU(-IMAGE))),
    "tile-compressed": (IMAGE, TILED),
    "tile-compressed integers": (COUNTS, content_of(EMPTY, tiles_of(COUNTS, "RICE_1"), MASK)),
    "tile-compressed behind a cube": (IMAGE, content_of(CUBE, tiles_of(IMAGE, "GZIP_1"), MASK)),
    "behind a comment that ends in END": (IMAGE, headed(*GOOD, HISTORY, *[""] * 40)),
    "behind 200 keywords": (IMAGE, headed(*GOOD, *MANY)),
    "behind blank cards": (IMAGE, headed(*GOOD, *[""] * 100)),
}


@pytest.mark.parametrize(("pixels", "content"), READABLE.values(), ids=READABLE)
def test_the_first_two_dimensional_image_is_read(tmp_path, pixels, content):
    assert_array_equal(channel_of(write_science(tmp_path, content)), scaled(pixels))


@pytest.mark.parametrize("axis", [(0,), (1,), (2,), (0, 1)])
@pytest.mark.parametrize("before", [(), (EMPTY,)], ids=["primary", "tile-compressed"])
def test_an_image_with_axes_of_length_1_counts_and_not_the_mask_behind_it(tmp_path, axis, before):
    hdu = (tiles_of if before else fits.PrimaryHDU)(np.expand_dims(IMAGE, axis))
    job = write_science(tmp_path, content_of(*before, hdu, MASK))
    assert_array_equal(channel_of(job), scaled(IMAGE))


def test_shapes_in_a_file_without_a_two_dimensional_image_are_named(tmp_path, capsys):
    job = write_science(tmp_path, content_of(CUBE, TABLE, fits.ImageHDU(np.zeros(7))))
    path, _, message = reason_of(job, capsys).partition(": ")
    assert path == f"{job / SCIENCE}.fits"
    assert "no HDU with a 2-D image" in message
    shapes = [sorted(re.findall(r"\d+", shape)) for shape in re.findall(r"\((.*?)\)", message)]
    assert shapes == [["2", "20", "30"], ["7"]]


@pytest.mark.parametrize(("scale", "zero"), [(1, 0), (-2, 0), (1, 2), (1, 32768), (-0.5, 100)])
@pytest.mark.parametrize("dtype", ["f4", "f8", "u1", "i2", "i4", "i8"])
def test_bscale_bzero_and_blank_are_applied(tmp_path, dtype, scale, zero):
    stored = (IMAGE if dtype in ("f4", "f8") else abs(COUNTS) % 200).astype(dtype)
    pixels = stored.astype(np.result_type(stored, np.float32))
    hdu = fits.PrimaryHDU(stored)
    hdu.header["BSCALE"], hdu.header["BZERO"] = scale, zero
    if stored.dtype.kind != "f":
        hdu.header["BLANK"] = stored[9, 9].item()
        pixels[stored == stored[9, 9]] = np.nan
    content = content_of(hdu)
    assert f"BSCALE  = {scale:>20}".encode() in content
    channel = channel_of(write_science(tmp_path, content))
    assert_array_equal(channel, scaled(pixels * scale + zero))


ODD_HEADERS = {
    "a side that is no number": headed(*START, card("NAXIS2", "2E1")),
    "a side with a blank": headed(*START, card("NAXIS2", "2 0")),
    "a side with a point": headed(*START, card("NAXIS2", "20.0")),
    "a negative side": headed(*START, card("NAXIS2", -20)),
    "a side of 70 digits": headed(*START, f"NAXIS2  = {'9' * 70}"),
    "more pixels than there are": headed(*START, card("NAXIS2", 10**8)),
    "no side": headed(*START),
    "an odd BITPIX": headed(START[0], card("BITPIX", 7), *GOOD[2:]),
    "a keyword twice": headed(*GOOD, card("NAXIS2", 20)),
    "scaled, in lower case": headed(*GOOD, card("bscale", 2.0)),
    "scaled by a text": headed(*GOOD, card("BSCALE", "'x'")),
    "parameters": headed(*GOOD, card("PCOUNT", 5)),
    "not ASCII": headed(*GOOD, "COMMENT é"),
    "not SIMPLE": headed(card("SIMPLE", "F"), *GOOD[1:]),
    "no end": headed(*GOOD, *[""] * 200, end=""),
}


@pytest.mark.parametrize("content", ODD_HEADERS.values(), ids=ODD_HEADERS)
def test_an_odd_header_gives_the_right_pixels_or_leaves_out_the_job(tmp_path, capsys, content):
    job = write_science(tmp_path, content)
    if build(job.parent) == 0:
        assert_array_equal(np.load(tensor_path(job))[..., 0], scaled(IMAGE))
    else:
        assert f"jid001 left out: {job / SCIENCE}.fits: " in capsys.readouterr().err


NO_FITS = {
    "nothing": b"",
    "text": b"not an image",
    "a web page": b"<!DOCTYPE html>\n<title>404</title>" * 200,
    "gzip of text": gzip.compress(b"not an image"),
    "two bytes of gzip": b"\x1f\x8b",
    "nine bytes": PLAIN[:9],
    "a cut first card": PLAIN[:50],
    "a cut header": PLAIN[:500],
    "a header that lacks a byte": PLAIN[:2879],
    "SIMPLE neither T nor F": headed(card("SIMPLE", "X"), *GOOD[1:]),
}


@pytest.mark.parametrize("content", NO_FITS.values(), ids=NO_FITS)
def test_no_fits_file_is_called_so_with_no_advice_of_options_we_lack(tmp_path, capsys, content):
    job = write_science(tmp_path, content)
    reason = reason_of(job, capsys)
    assert re.match(r"not a (readable )?FITS ", reason.removeprefix(f"{job / SCIENCE}.fits: "))
    assert not re.search(r"ignore_missing|verify|=True", reason)


@pytest.mark.parametrize("suffix", create_dataset.IMAGE_SUFFIXES)
@pytest.mark.parametrize("content", [PLAIN, ZIPPED, TILED], ids=["plain", "gzip", "tiles"])
def test_the_content_counts_and_not_the_suffix(tmp_path, content, suffix):
    assert_array_equal(channel_of(write_science(tmp_path, content, suffix)), scaled(IMAGE))


def test_compressed_files_stand_in_in_order_of_preference(tmp_path):
    job = write_science(tmp_path, PLAIN)
    (job / f"{SCIENCE}.fits.gz").write_bytes(gzip.compress(content_of(fits.PrimaryHDU(-IMAGE))))
    (job / f"{SCIENCE}.fits.fz").write_bytes(content_of(EMPTY, tiles_of(COUNTS)))
    for suffix, pixels in ((".fits", IMAGE), (".fits.gz", -IMAGE), (".fits.fz", COUNTS)):
        assert_array_equal(channel_of(job, "--overwrite"), scaled(pixels))
        (job / f"{SCIENCE}{suffix}").unlink()


def test_a_flipped_bit_in_gzip_content_never_gives_wrong_pixels(tmp_path, capsys):
    whole, end = write_science(tmp_path, ZIPPED, jid="jid0"), 8 * len(ZIPPED)
    jobs = {}
    for bit in (*range(80), *range(80, end - 64, 401), *range(end - 64, end, 3)):
        damaged = bytearray(ZIPPED)
        damaged[bit // 8] ^= 1 << bit % 8
        jobs[bit] = shutil.copytree(whole, whole.with_name(f"jid{bit + 1}"))
        (jobs[bit] / f"{SCIENCE}.fits").write_bytes(damaged)
    assert build(whole.parent) == 1
    read = {bit for bit, job in jobs.items() if tensor_path(job).exists()}
    assert read <= {*range(24, 80)}  # flags, time and system in the header: not the pixels'
    expected = tensor_path(whole).read_bytes()
    assert all(tensor_path(jobs[bit]).read_bytes() == expected for bit in read)
    reasons = re.findall(rf"left out: .*/{SCIENCE}\.fits: not a ", capsys.readouterr().err)
    assert len(reasons) == len(jobs) - len(read)


UNPADDED = {
    "float32": (IMAGE, bytes, fits.PrimaryHDU(IMAGE)),
    "int16": (COUNTS, bytes, fits.PrimaryHDU(COUNTS)),
    "extension": (IMAGE, bytes, EMPTY, fits.ImageHDU(IMAGE)),
    "gzip": (IMAGE, gzip.compress, fits.PrimaryHDU(IMAGE)),
}


@pytest.mark.parametrize("image", UNPADDED.values(), ids=UNPADDED)
def test_only_the_padding_behind_the_last_pixel_may_be_missing(tmp_path, capsys, image):
    pixels, pack, *hdus = image
    content = content_of(*hdus)
    end = content.index(pixels.tobytes()) + pixels.nbytes
    assert end < len(content)
    job = write_science(tmp_path, pack(content[:end]))
    assert_array_equal(channel_of(job), scaled(pixels))
    job = write_science(tmp_path, pack(content[: end - 1]), jid="jid002")
    reason = reason_of(job, capsys)
    assert reason.startswith(f"{job / SCIENCE}.fits: not a readable FITS image, or cut short: ")


def flip_a_byte(content: bytes) -> bytes:
    place = len(content) * 4 // 5
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


DAMAGES = {
    "cut": lambda content: content[: len(content) * 3 // 4],
    "without its end": lambda content: content.rstrip(b"\0")[:-8],
    "with a flipped byte": flip_a_byte,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(("suffix", "content"), [(".fits.gz", ZIPPED), (".fits.fz", TILED)])
def test_a_damaged_compressed_file_is_left_out(tmp_path, capsys, suffix, content, damage):
    job = write_science(tmp_path, damage(content), suffix)
    assert f"{job / SCIENCE}{suffix}: not a readable FITS image" in reason_of(job, capsys)


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CONSTANT = content_of(fits.PrimaryHDU(np.ones((72, 80))))
BROKEN = {
    "missing": (Path.unlink, f"no science image; expected one of {SCIENCE}.fits, "),
    "a folder": (turn_into_folder, "Is a directory"),
    "cut": (lambda path: os.truncate(path, 2880 + 9000), "cut short"),
    "no pixels": (lambda path: path.write_bytes(content_of(EMPTY)), "no HDU with a 2-D image"),
    "constant": (lambda path: path.write_bytes(CONSTANT), "cannot be scaled between 1 and 1"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_job_with_a_broken_image_is_left_out_and_named(raw, tmp_path, capsys, damage, message):
    damage(raw / "jid002" / f"{SCIENCE}.fits")
    reason = reason_of(raw / "jid002", capsys)
    assert SCIENCE in reason
    assert message in reason
    names = {path.name for path in (tmp_path / "out" / "images").iterdir()}
    assert names == {"jid001.npy", "jid003.npy", "jid004.npy"}
    assert "jid002" not in (tmp_path / "out" / "master_index.csv").read_text()


@pytest.fixture
def spoil(tmp_path, monkeypatch) -> Callable[[Callable[[Path], None]], Path]:
    """Return a function that lets the science image of jid1 change once it is partly read."""
    for jid in ("jid1", "jid2"):
        write_job(tmp_path / "raw", jid, images=make_images(0, (300, 300)))
    path, clip = tmp_path / "raw" / "jid1" / f"{SCIENCE}.fits", np.clip

    def spoil(change: Callable[[Path], None]) -> Path:
        def spoiling_clip(*args: object, **more: object) -> np.ndarray:
            if str(path) in Path("/proc/self/maps").read_text():  # not in the worker of jid2
                monkeypatch.setattr(np, "clip", clip)  # after the first pixels
                change(path)
            return clip(*args, **more)

        monkeypatch.setattr(np, "clip", spoiling_clip)
        return path

    return spoil


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),  # gives zeros: a page is mapped
        lambda path: os.utime(path, ns=(0, 2**61)),
        lambda path: path.unlink(),
    ],
    ids=["without its last byte", "written again", "gone"],
)
def test_a_file_that_changes_while_it_is_read_leaves_out_its_job(tmp_path, capsys, spoil, change):
    spoil(change)
    out = tmp_path / "out"
    assert run(create_dataset, "-i", tmp_path / "raw", "-o", out, "--workers", "1") == 1
    reason = f"{tmp_path}/raw/jid1: changed while it was read; run again"
    assert capsys.readouterr().err == f"ERROR: jid1 left out: {reason}\n"
    assert [path.name for path in (out / "images").iterdir()] == ["jid2.npy"]


def test_a_file_that_is_cut_short_while_it_is_read_ends_the_run(
    tmp_path, capsys, monkeypatch, spoil
):
    """Its pixels are mapped: the kernel kills the worker that asks for what is no longer there."""
    path, out, options = tmp_path / "raw", tmp_path / "out", ("--workers", "2")
    content = spoil(lambda path: os.truncate(path, 5000)).read_bytes()
    assert run(create_dataset, "-i", path, "-o", out, *options) == 1
    assert capsys.readouterr().err.startswith("ERROR: the workers failed at jid1 or a later job (")
    assert not (out / "master_index.csv").exists()
    assert not (out / "images" / "jid1.npy").exists()
    monkeypatch.undo()
    (path / "jid1" / f"{SCIENCE}.fits").write_bytes(content)
    assert run(create_dataset, "-i", path, "-o", out, *options) == 0
    assert {p.name for p in (out / "images").iterdir()} == {"jid1.npy", "jid2.npy"}


def test_a_channel_that_is_added_is_in_the_tensor_which_a_second_run_keeps(tmp_path, monkeypatch):
    job, extra = write_job(tmp_path / "raw"), make_images(9)[STEMS[3]]
    fits.writeto(job / "extra_image.fits", extra)
    assert tensor_of(job).shape == (72, 80, 4)
    monkeypatch.setitem(create_dataset.CHANNELS, "extra", ("extra_image",))
    assert_array_equal(tensor_of(job), stacked(*make_images().values(), extra))
    before = tensor_path(job).stat()
    tensor_of(job)
    after = tensor_path(job).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_second_name_of_a_channel_stands_in_if_the_first_is_missing(tmp_path, monkeypatch):
    job = write_science(tmp_path, ZIPPED, ".fits.gz")
    fits.writeto(job / "other_image.fits", COUNTS)
    monkeypatch.setitem(create_dataset.CHANNELS, "science", (SCIENCE, "other_image"))
    assert_array_equal(channel_of(job), scaled(IMAGE))
    (job / f"{SCIENCE}.fits.gz").unlink()
    assert_array_equal(channel_of(job, "--overwrite"), scaled(COUNTS))
