"""create_dataset.py, from FITS images to tensors."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.visualization import ManualInterval, ZScaleInterval
from conftest import STEMS, make_images, write_job

import create_dataset
from create_dataset import DatasetError

SCIENCE = STEMS[0]


def tensor_of(job: Path) -> np.ndarray:
    return create_dataset.build_tensor([create_dataset.find_image(job, stem) for stem in STEMS])


def test_tensor_is_what_astropys_zscale_gives_of_each_channel(tmp_path):
    tensor = tensor_of(write_job(tmp_path))
    for channel, pixels in enumerate(make_images().values()):
        filled = np.where(np.isfinite(pixels), pixels, 0).astype(np.float64)
        expected = ManualInterval(*ZScaleInterval().get_limits(pixels))(filled)
        np.testing.assert_allclose(tensor[..., channel], expected, rtol=0, atol=1e-6)


def test_tensor_is_c_ordered_little_endian_float32_in_0_1(tmp_path):
    tensor = tensor_of(write_job(tmp_path))
    assert tensor.dtype == np.dtype("<f4")
    assert tensor.flags.c_contiguous
    assert tensor.shape == (72, 80, 4)
    assert tensor.min() == 0
    assert tensor.max() == 1


def test_limits_are_bit_identical_to_astropys_on_the_finite_pixels():
    pixels = make_images()[STEMS[2]].astype(np.float32)
    pixels[0, 10] = np.inf
    assert np.isnan(pixels).any()
    expected = ZScaleInterval().get_limits(pixels[np.isfinite(pixels)])
    assert create_dataset.zscale_limits(pixels) == tuple(map(float, expected))


def test_minimum_and_maximum_stand_in_where_the_limits_coincide():
    pixels = np.zeros((50, 50), np.float32)
    pixels[3, 3], pixels[4, 4] = -2, 6
    assert ZScaleInterval().get_limits(pixels) == (0, 0)
    assert create_dataset.zscale_limits(pixels) == (-2, 6)


def test_normalise_by_hand():
    pixels = np.array([[-5, -1, 0], [1, 3, 4], [np.nan, np.inf, -np.inf]], np.float32)
    scaled = create_dataset.normalise(pixels, -1.0, 3.0)
    # Zero flux is a quarter of the way from -1 to 3, and so is every masked pixel.
    assert scaled.tolist() == [[0, 0, 0.25], [0.5, 1, 1], [0.25, 0.25, 0.25]]
    assert scaled.dtype == np.float32


def test_normalise_clips_zero_flux_that_lies_below_the_limits():
    assert create_dataset.normalise(np.array([[np.nan]], np.float32), 2.0, 3.0).item() == 0


def test_normalise_leaves_its_input_alone():
    pixels = np.array([[1, np.nan]], np.float32)
    create_dataset.normalise(pixels, 0.0, 2.0)
    np.testing.assert_array_equal(pixels, np.array([[1, np.nan]], np.float32))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((9, 9), np.nan, np.float32), "no finite pixel"),
        (np.full((9, 9), np.inf, np.float32), "no finite pixel"),
        (np.full((9, 9), 2.5, np.float32), "all finite pixels have the value 2.5"),
    ],
)
def test_images_without_a_range_are_refused(pixels, message):
    with pytest.raises(DatasetError, match=message):
        create_dataset.zscale_limits(pixels)


@pytest.mark.parametrize("distance", [1e-60, 6e38])
def test_limits_that_float32_cannot_tell_apart_or_span_are_refused(monkeypatch, distance):
    monkeypatch.setattr(ZScaleInterval, "get_limits", lambda self, values: (0.0, distance))
    with pytest.raises(DatasetError, match="cannot be scaled in float32"):
        create_dataset.zscale_limits(np.zeros((9, 9), np.float32))


def test_a_tensor_is_checked_before_it_is_returned(tmp_path, monkeypatch):
    monkeypatch.setattr(create_dataset, "normalise", lambda pixels, *limits: pixels * np.nan)
    with pytest.raises(DatasetError, match=r"jid001: the tensor is not in \[0, 1\]"):
        tensor_of(write_job(tmp_path))


def test_shapes_that_differ_are_refused(tmp_path):
    images = make_images()
    images[STEMS[3]] = images[STEMS[3]][:-1]
    with pytest.raises(DatasetError, match=r"scorrimage_masked.fits: \(71, 80\).*\(72, 80\)"):
        tensor_of(write_job(tmp_path, images=images))


IMAGE = np.arange(600, dtype=np.float32).reshape(20, 30) - 100
TABLE = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.zeros(3))])
CUBE = np.zeros((2, 20, 30), np.float32)
READABLE = {
    "big-endian": [fits.PrimaryHDU(IMAGE.astype(">f4"))],
    "float64": [fits.PrimaryHDU(IMAGE.astype(np.float64))],
    "integers": [fits.PrimaryHDU(IMAGE.astype(np.int16))],
    "extension": [fits.PrimaryHDU(), fits.ImageHDU(IMAGE)],
    "behind a table and a cube": [fits.PrimaryHDU(CUBE), TABLE, fits.ImageHDU(IMAGE)],
    "behind an image without pixels": [
        fits.PrimaryHDU(np.zeros((0, 5), np.float32)),
        fits.ImageHDU(IMAGE),
    ],
    "first of two": [fits.PrimaryHDU(IMAGE), fits.ImageHDU(IMAGE + 1)],
    "tile-compressed": [
        fits.PrimaryHDU(),
        fits.CompImageHDU(IMAGE, compression_type="GZIP_2", quantize_level=0),
    ],
}


@pytest.mark.parametrize("hdus", READABLE.values(), ids=READABLE)
def test_the_first_two_dimensional_image_is_read(tmp_path, hdus):
    fits.HDUList([hdu.copy() for hdu in hdus]).writeto(tmp_path / "image.fits")
    pixels = create_dataset.read_image(tmp_path / "image.fits")
    np.testing.assert_array_equal(pixels, IMAGE)
    assert pixels.dtype == np.dtype("=f4")
    assert pixels.flags.c_contiguous


def test_bscale_and_bzero_are_applied(tmp_path):
    hdu = fits.PrimaryHDU(IMAGE.copy())
    hdu.scale("int16", bscale=0.5, bzero=100)
    hdu.writeto(tmp_path / "image.fits")
    assert fits.getheader(tmp_path / "image.fits")["BSCALE"] == 0.5
    np.testing.assert_array_equal(create_dataset.read_image(tmp_path / "image.fits"), IMAGE)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint32, np.uint8])
def test_blank_integers_are_masked(tmp_path, dtype):
    hdu = fits.PrimaryHDU(np.array([[7, 8, 9]], dtype))
    hdu.header["BLANK"] = int(8 - hdu.header.get("BZERO", 0))  # of the number as it is stored
    hdu.writeto(tmp_path / "image.fits")
    pixels = create_dataset.read_image(tmp_path / "image.fits")
    np.testing.assert_array_equal(pixels, [[7, np.nan, 9]])


def test_float64_beyond_float32_is_masked(tmp_path):
    fits.writeto(tmp_path / "image.fits", np.array([[1e300, 1.0]]))
    assert create_dataset.read_image(tmp_path / "image.fits").tolist() == [[np.inf, 1]]


def test_compressed_files_stand_in_in_order_of_preference(tmp_path):
    for suffix in (".fits.fz", ".fits.gz", ".fits"):
        (tmp_path / f"{SCIENCE}{suffix}").touch()
        assert create_dataset.find_image(tmp_path, SCIENCE).name == f"{SCIENCE}{suffix}"


def test_gz_and_fz_give_the_same_tensor(tmp_path):
    expected = tensor_of(write_job(tmp_path))
    job = write_job(tmp_path, "jid002")
    for stem in STEMS[:2]:
        zipped = gzip.compress((job / f"{stem}.fits").read_bytes())
        (job / f"{stem}.fits.gz").write_bytes(zipped)
        (job / f"{stem}.fits").unlink()
    for stem in STEMS[2:]:
        pixels = fits.getdata(job / f"{stem}.fits")
        tiles = fits.CompImageHDU(pixels, compression_type="GZIP_2", quantize_level=0)
        tiles.writeto(job / f"{stem}.fits.fz")
        (job / f"{stem}.fits").unlink()
    np.testing.assert_array_equal(tensor_of(job), expected)


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as handle:
        handle.truncate(size)


def replace_with(path: Path, *hdus: fits.hdu.base.ExtensionHDU) -> None:
    fits.HDUList(list(hdus)).writeto(path, overwrite=True)


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN = {
    "missing": (Path.unlink, "no bkg_subbed_science_image.fits"),
    "empty file": (lambda path: truncate(path, 0), "not a readable FITS image"),
    "truncated header": (lambda path: truncate(path, 500), "not a readable FITS image"),
    "truncated data": (lambda path: truncate(path, 2880 + 9000), "not a readable FITS image"),
    "text": (lambda path: path.write_text("not an image"), "not a readable FITS image"),
    "no image": (lambda path: replace_with(path, fits.PrimaryHDU()), "no HDU with a 2-D image"),
    "a cube": (lambda path: replace_with(path, fits.PrimaryHDU(CUBE)), "no HDU with a 2-D image"),
    "a table": (
        lambda path: replace_with(path, fits.PrimaryHDU(), TABLE),
        "no HDU with a 2-D image",
    ),
    "a folder": (turn_into_folder, "not a file"),
    "all NaN": (
        lambda path: replace_with(path, fits.PrimaryHDU(np.full((72, 80), np.nan))),
        "no finite pixel",
    ),
    "constant": (
        lambda path: replace_with(path, fits.PrimaryHDU(np.ones((72, 80)))),
        "all finite pixels have the value 1",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_job_with_a_broken_image_is_left_out_and_named(raw, tmp_path, capsys, damage, message):
    damage(raw / "jid002" / f"{SCIENCE}.fits")
    assert create_dataset.main(["-i", str(raw), "-o", str(tmp_path / "out")]) == 1
    stderr = capsys.readouterr().err
    assert "jid002 left out" in stderr
    assert SCIENCE in stderr
    assert message in stderr
    names = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert names == ["jid001.npy", "jid003.npy", "jid004.npy"]
    assert "jid002" not in (tmp_path / "out" / "master_index.csv").read_text()


def cut_half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def drop_checksum(data: bytes) -> bytes:
    return data[:-8]


def flip_a_byte(data: bytes) -> bytes:
    return data[:9000] + bytes([data[9000] ^ 255]) + data[9001:]


@pytest.mark.parametrize("damage", [cut_half, drop_checksum, flip_a_byte])
def test_a_damaged_gz_is_left_out(raw, tmp_path, capsys, damage):
    plain = raw / "jid002" / f"{SCIENCE}.fits"
    plain.with_name(f"{SCIENCE}.fits.gz").write_bytes(damage(gzip.compress(plain.read_bytes())))
    plain.unlink()
    assert create_dataset.main(["-i", str(raw), "-o", str(tmp_path / "out")]) == 1
    assert f"{SCIENCE}.fits.gz: not a readable FITS image" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [cut_half, flip_a_byte])
def test_a_damaged_fz_is_left_out(raw, tmp_path, capsys, damage):
    plain = raw / "jid002" / f"{SCIENCE}.fits"
    packed = plain.with_name(f"{SCIENCE}.fits.fz")
    fits.CompImageHDU(fits.getdata(plain), compression_type="GZIP_1").writeto(packed)
    packed.write_bytes(damage(packed.read_bytes()))
    plain.unlink()
    assert create_dataset.main(["-i", str(raw), "-o", str(tmp_path / "out")]) == 1
    assert f"{SCIENCE}.fits.fz: not a readable FITS image" in capsys.readouterr().err
