"""create_dataset.py, from FITS images to tensors."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.visualization import ManualInterval, ZScaleInterval
from conftest import STEMS, make_images, write_job

import create_dataset
from create_dataset import DatasetError, Image, open_channels

SCIENCE = STEMS[0]


def tensor_of(job: Path) -> np.ndarray:
    channels = open_channels([create_dataset.find_image(job, stem) for stem in STEMS])
    return np.concatenate([strip.copy() for strip in create_dataset.tensor_strips(channels)])


def read(path: Path) -> np.ndarray:
    image = create_dataset.find_plain(path) or create_dataset.read_image(path)
    return np.concatenate([strip.astype("=f4") for strip in create_dataset.strips(image)])


def limits_of(pixels: np.ndarray) -> tuple[float, float]:
    image = Image(Path("image.fits"), pixels.shape, pixels=pixels)
    return create_dataset.find_limits(image, masked_of(image))


def masked_of(image: Image) -> list[np.ndarray]:
    strips = create_dataset.strips(image)
    return [np.flatnonzero(~np.isfinite(strip)).astype(np.uint32) for strip in strips]


def scaled(pixels: np.ndarray, vmin: float, vmax: float) -> np.ndarray:
    image = Image(Path("image.fits"), pixels.shape, pixels=pixels)
    channel = create_dataset.Channel(image, masked_of(image), vmin, vmax)
    return np.concatenate([s.copy() for s in create_dataset.tensor_strips([channel])])[..., 0]


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


@pytest.mark.parametrize("seed", range(40))
def test_zscale_is_bit_identical_to_astropys(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 2, 3, 5, 9, 10, 60, 999, 1000]))
    sample = rng.normal(rng.normal(0, 100), 10 ** rng.uniform(-3, 3), size)
    sample[rng.random(size) < rng.uniform(0, 0.6)] *= rng.normal(0, 50)  # sources, or noise
    if seed % 4 == 0:
        sample = np.round(sample)
    sample = np.sort(sample.astype(np.float32))
    expected = ZScaleInterval().get_limits(sample)
    assert create_dataset.zscale(sample) == tuple(map(float, expected))


@pytest.mark.parametrize("shape", [(3, 5), (31, 40), (32, 40), (33, 77), (130, 200)])
@pytest.mark.parametrize("fraction", [0, 0.04, 0.7, 1])
def test_limits_are_bit_identical_to_astropys_on_the_finite_pixels(shape, fraction):
    rng = np.random.default_rng(7)
    pixels = rng.normal(5, 3, shape).astype(np.float32)
    pixels[rng.random(shape) < fraction] = np.nan
    pixels[-1, -2:] = np.inf, 1000
    pixels[0, 0] = -50
    expected = ZScaleInterval().get_limits(pixels)
    assert limits_of(pixels) == tuple(map(float, expected))


def test_limits_of_a_file_are_those_of_its_pixels(tmp_path):
    pixels = make_images(shape=(150, 90))[STEMS[2]]
    fits.writeto(tmp_path / "image.fits", pixels)
    image = create_dataset.find_plain(tmp_path / "image.fits")
    expected = tuple(map(float, ZScaleInterval().get_limits(pixels)))
    assert create_dataset.find_limits(image, masked_of(image)) == expected


def test_minimum_and_maximum_stand_in_where_the_limits_coincide():
    pixels = np.zeros((50, 50), np.float32)
    pixels[3, 3], pixels[4, 4], pixels[40, 1] = -2, 6, np.nan
    assert ZScaleInterval().get_limits(pixels) == (0, 0)
    assert limits_of(pixels) == (-2, 6)


def test_scaling_by_hand():
    pixels = np.array([[-5, -1, 0], [1, 3, 4], [np.nan, np.inf, -np.inf]], np.float32)
    tensor = scaled(pixels, -1.0, 3.0)
    # Zero flux is a quarter of the way from -1 to 3, and so is every masked pixel.
    assert tensor.tolist() == [[0, 0, 0.25], [0.5, 1, 1], [0.25, 0.25, 0.25]]
    assert tensor.dtype == np.float32


def test_zero_flux_below_the_limits_is_clipped():
    assert scaled(np.array([[np.nan]], np.float32), 2.0, 3.0).item() == 0


def test_scaling_leaves_the_image_alone():
    pixels = np.array([[1, np.nan]], np.float32)
    scaled(pixels, 0.0, 2.0)
    np.testing.assert_array_equal(pixels, np.array([[1, np.nan]], np.float32))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((9, 9), np.nan, np.float32), "no finite pixel"),
        (np.full((9, 9), np.inf, np.float32), "no finite pixel"),
        (np.full((9, 9), 2.5, np.float32), "cannot be scaled between 2.5 and 2.5"),
    ],
)
def test_images_without_a_range_are_refused(pixels, message):
    with pytest.raises(DatasetError, match=message):
        limits_of(pixels)


@pytest.mark.parametrize("distance", [1e-60, 6e38])
def test_limits_that_float32_cannot_tell_apart_or_span_are_refused(monkeypatch, distance):
    monkeypatch.setattr(create_dataset, "zscale", lambda sample: (0.0, distance))
    with pytest.raises(DatasetError, match="cannot be scaled between 0 and"):
        limits_of(np.zeros((9, 9), np.float32))


def test_a_tensor_is_checked_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "clip", lambda pixels, low, high, out: out.fill(np.nan))
    with pytest.raises(DatasetError, match="jid001: NaN in the tensor"):
        tensor_of(write_job(tmp_path))


def test_a_file_that_shrinks_while_it_is_read_is_an_error_of_its_job(tmp_path):
    path = write_job(tmp_path) / f"{SCIENCE}.fits"
    image = create_dataset.find_plain(path)
    truncate(path, 2880 + 100)
    with pytest.raises(DatasetError, match="became shorter while it was read"):
        list(create_dataset.strips(image))


def test_shapes_that_differ_are_refused(tmp_path):
    images = make_images()
    images[STEMS[3]] = images[STEMS[3]][:-1]
    with pytest.raises(
        DatasetError, match=r"scorrimage_masked.fits: \(71, 80\) pixels; bkg.* has \(72, 80\)"
    ):
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


PLAIN = ("big-endian", "first of two")


@pytest.mark.parametrize("name", READABLE)
def test_only_unscaled_float32_at_the_begin_of_a_file_is_read_without_astropy(tmp_path, name):
    fits.HDUList([hdu.copy() for hdu in READABLE[name]]).writeto(tmp_path / "image.fits")
    assert (create_dataset.find_plain(tmp_path / "image.fits") is not None) == (name in PLAIN)


@pytest.mark.parametrize("key", ["BSCALE", "BZERO"])
def test_scaled_float32_is_left_to_astropy(tmp_path, key):
    hdu = fits.PrimaryHDU(IMAGE.copy())
    hdu.header[key] = 2.0
    hdu.writeto(tmp_path / "image.fits")
    expected = IMAGE * 2 if key == "BSCALE" else IMAGE + 2
    np.testing.assert_array_equal(read(tmp_path / "image.fits"), expected)


def card(keyword: str, value: object) -> str:
    return f"{keyword:<8}= {value:>20}".ljust(80)


PLAIN_HEADER = (card("SIMPLE", "T"), card("BITPIX", -32), card("NAXIS", 2), card("NAXIS1", 30))
ODD_HEADERS = {
    "a side that is no number": (*PLAIN_HEADER, card("NAXIS2", "2E1")),
    "a side with a blank": (*PLAIN_HEADER, card("NAXIS2", "2 0")),
    "a side with a point": (*PLAIN_HEADER, card("NAXIS2", "20.0")),
    "a side of 5,000 digits": (*PLAIN_HEADER, f"NAXIS2  = {'9' * 70}"),
    "more pixels than there are": (*PLAIN_HEADER, card("NAXIS2", 10**8)),
    "no side": PLAIN_HEADER,
    "a keyword twice": (*PLAIN_HEADER, card("NAXIS2", 20), card("NAXIS2", 20)),
    "scaled, in lower case": (*PLAIN_HEADER, card("NAXIS2", 20), card("bscale", 2.0)),
    "parameters": (*PLAIN_HEADER, card("NAXIS2", 20), card("PCOUNT", 5)),
    "no end": (*PLAIN_HEADER, card("NAXIS2", 20), *[" " * 80] * 200),
}


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_an_odd_header_is_left_to_astropy(tmp_path, name):
    end = () if name == "no end" else ("END",)
    header = "".join(line.ljust(80) for line in (*ODD_HEADERS[name], *end))
    padded = header.ljust(-(-len(header) // 2880) * 2880).encode()
    (tmp_path / "image.fits").write_bytes(padded + IMAGE.astype(">f4").tobytes())
    assert create_dataset.find_plain(tmp_path / "image.fits") is None


def test_a_comment_that_ends_in_end_does_not_end_the_header(tmp_path):
    header = (*PLAIN_HEADER, card("NAXIS2", 20), "HISTORY".ljust(77, "x") + "END", *[" " * 80] * 40)
    text = "".join((*header, "END".ljust(80)))
    padded = text.ljust(-(-len(text) // 2880) * 2880).encode()
    (tmp_path / "image.fits").write_bytes(padded + IMAGE.astype(">f4").tobytes())
    assert create_dataset.find_plain(tmp_path / "image.fits").offset == 5760
    np.testing.assert_array_equal(read(tmp_path / "image.fits"), IMAGE)


def test_a_long_header_is_read_to_its_end(tmp_path):
    hdu = fits.PrimaryHDU(IMAGE)
    for number in range(200):
        hdu.header[f"KEY{number}"] = (number, "END of nothing")
    hdu.writeto(tmp_path / "image.fits")
    image = create_dataset.find_plain(tmp_path / "image.fits")
    assert (image.offset, image.shape) == (2880 * 6, (20, 30))
    np.testing.assert_array_equal(read(tmp_path / "image.fits"), IMAGE)


@pytest.mark.parametrize("hdus", READABLE.values(), ids=READABLE)
def test_the_first_two_dimensional_image_is_read(tmp_path, hdus):
    fits.HDUList([hdu.copy() for hdu in hdus]).writeto(tmp_path / "image.fits")
    np.testing.assert_array_equal(read(tmp_path / "image.fits"), IMAGE)


def test_bscale_and_bzero_are_applied(tmp_path):
    hdu = fits.PrimaryHDU(IMAGE.copy())
    hdu.scale("int16", bscale=0.5, bzero=100)
    hdu.writeto(tmp_path / "image.fits")
    assert fits.getheader(tmp_path / "image.fits")["BSCALE"] == 0.5
    np.testing.assert_array_equal(read(tmp_path / "image.fits"), IMAGE)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint32, np.uint8])
def test_blank_integers_are_masked(tmp_path, dtype):
    hdu = fits.PrimaryHDU(np.array([[7, 8, 9]], dtype))
    hdu.header["BLANK"] = int(8 - hdu.header.get("BZERO", 0))  # of the number as it is stored
    hdu.writeto(tmp_path / "image.fits")
    pixels = read(tmp_path / "image.fits")
    np.testing.assert_array_equal(pixels, [[7, np.nan, 9]])


def test_float64_beyond_float32_is_masked(tmp_path):
    fits.writeto(tmp_path / "image.fits", np.array([[1e300, 1.0]]))
    assert read(tmp_path / "image.fits").tolist() == [[np.inf, 1]]


def test_infinite_pixels_are_masked_like_nan(tmp_path):
    images = make_images()
    expected = tensor_of(write_job(tmp_path, images=images))
    for stem in STEMS[2:]:
        masked = np.isnan(images[stem])
        images[stem][masked] = np.resize([np.inf, -np.inf, np.nan], masked.sum())
    tensor = tensor_of(write_job(tmp_path, "jid002", images=images))
    np.testing.assert_array_equal(tensor, expected)


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
    "a folder": (turn_into_folder, "Is a directory"),
    "all NaN": (
        lambda path: replace_with(path, fits.PrimaryHDU(np.full((72, 80), np.nan))),
        "no finite pixel",
    ),
    "constant": (
        lambda path: replace_with(path, fits.PrimaryHDU(np.ones((72, 80)))),
        "cannot be scaled between 1 and 1",
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
