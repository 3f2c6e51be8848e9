"""create_dataset.py, from catalogs to index rows."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SHAPE, make_catalog, write_job, write_two_tables

import create_dataset
from create_dataset import CATALOG_COLUMNS, DatasetError, read_catalog

FINDER = "diffimage_masked_psfcat_finder.txt"
ORDER = [5, 0, 11, 2, 1, 3, 4, 10, 9, 8, 7, 6]  # of the finder's rows: not that of psfcat.csv


def expected_columns(catalog: pd.DataFrame) -> pd.DataFrame:
    return catalog[list(CATALOG_COLUMNS)].astype(float)


def read(job: Path) -> pd.DataFrame:
    return pd.DataFrame(read_catalog(job))


def index_of(catalog: pd.DataFrame, shape: tuple[int, int] = SHAPE) -> pd.DataFrame:
    rows, _ = create_dataset.index_rows(columns_of(catalog), "jid007", shape)
    return pd.read_csv(io.StringIO(rows), names=create_dataset.INDEX_COLUMNS)


def columns_of(catalog: pd.DataFrame) -> dict[str, np.ndarray]:
    return {name: catalog[name].to_numpy(dtype=float) for name in catalog}


def read_text(tmp_path: Path, text: str) -> pd.DataFrame:
    (tmp_path / "psfcat.csv").write_bytes(text.encode("latin-1"))
    return read(tmp_path)


def test_one_file_gives_every_column_to_the_last_bit(tmp_path):
    catalog = make_catalog()
    found = read(write_job(tmp_path, catalog=catalog))
    pd.testing.assert_frame_equal(found, expected_columns(catalog), check_exact=True)


def test_two_files_are_joined_on_id_and_not_by_row_order(tmp_path):
    catalog = make_catalog()
    job = write_job(tmp_path)
    write_two_tables(job, catalog, ORDER)
    found = read(job)
    pd.testing.assert_frame_equal(
        found[list(CATALOG_COLUMNS)], expected_columns(catalog), check_exact=True
    )


def test_finder_is_not_asked_where_psfcat_has_everything(tmp_path):
    job = write_job(tmp_path)
    (job / FINDER).write_text("id peak\n99 1.0\n")
    assert len(read(job)) == 12


def test_columns_of_psfcat_win_over_the_finders(tmp_path):
    job = write_job(tmp_path)
    (job / "psfcat.csv").write_text("id,flux,match\n1,10,-1\n2,20,-1\n")
    (job / FINDER).write_text("id flux xcentroid ycentroid\n2 -2 7 8\n1 -1 5 6\n")
    found = read(job)
    assert found["flux"].tolist() == [10, 20]
    assert found["x"].tolist() == [5, 7]


def test_finder_rows_are_taken_in_order_where_psfcat_has_no_id(tmp_path):
    job = write_job(tmp_path)
    (job / "psfcat.csv").write_text("flags,match\n0,-1\n4,3\n")
    (job / FINDER).write_text("id xcentroid ycentroid\n8 1 2\n9 3 4\n")
    found = read(job)
    assert found["id"].tolist() == [8, 9]
    assert found["x"].tolist() == [1, 3]
    assert found["match"].tolist() == [-1, 3]


@pytest.mark.parametrize(
    ("psfcat", "finder", "message"),
    [
        (
            "id,match\n1,-1\n2,-1\n",
            "id x y\n1 1 1\n3 1 1\n",
            "2 ids occur in only one of them, such as 2,",
        ),
        ("id,match\n1,-1\n", "id x y\n1 1 1\n2 1 1\n", "do not match one to one"),
        ("id,match\n1,-1\n,-1\n", "id x y\n1 1 1\n2 1 1\n", "and 1 ids are empty"),
        ("id,match\n1,-1\n2,-1\n", "id x y\n1 1 1\n2 1\n", "rows of different length"),
        ("id,match\n1,-1\n2,-1\n", "id x y\n2 1 1\n2 1 1\n", "finder.txt: id 2 occurs more than"),
        ("match\n-1\n", "id x y\n1 1 1\n2 1 1\n", r"\(1 rows\).*\(2 rows\) cannot be joined"),
        ("id,match\n1,-1\n", "x y\n1 1\n", "both need the column id"),
    ],
)
def test_tables_that_do_not_match_one_to_one_are_refused(tmp_path, psfcat, finder, message):
    (tmp_path / "psfcat.csv").write_text(psfcat)
    (tmp_path / FINDER).write_text(finder)
    with pytest.raises(DatasetError, match=message):
        read_catalog(tmp_path)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("x_fit,x_centroid,xcentroid,x", 4),
        ("x_fit,x_centroid,xcentroid,other", 3),
        ("x_fit,x_centroid,other,another", 2),
        ("x_fit,a,b,c", 1),
    ],
)
def test_aliases_are_taken_in_order_of_preference(tmp_path, header, expected):
    both = f"{header},{header.replace('x', 'y')},match"
    found = read_text(tmp_path, f"{both}\n1,2,3,4,11,12,13,14,-1\n")
    assert found[["x", "y"]].to_numpy().tolist() == [[expected, expected + 10]]


@pytest.mark.parametrize(("header", "expected"), [("n_pixels,other", 25), ("n_pixels,npix", 9)])
def test_n_pixels_is_npix_where_there_is_no_npix(tmp_path, header, expected):
    found = read_text(tmp_path, f"x,y,match,{header}\n1,1,-1,25,9\n")
    assert found["npix"].tolist() == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffid,x,y,match\n1,2,3,-1\n".encode().decode("latin-1"),
        "id,x,y,match\r\n1,2,3,-1\r\n",
        "\n\nid,x,y,match\n\n1,2,3,-1\n\n",
        " id , x,y ,match \n 1, 2 ,3 ,-1\n",
        "id,x,y,match,field\n1,2,3,-1,Ori\xf3n\n",
        "id,x,y,match,comment\n1,2,3,-1,text\n",
    ],
    ids=["BOM", "CRLF", "blank lines", "spaces", "Latin-1 bytes", "another column"],
)
def test_harmless_variants_of_a_catalog_are_read(tmp_path, text):
    found = read_text(tmp_path, text)
    assert found[["id", "x", "y", "match"]].to_numpy().tolist() == [[1, 2, 3, -1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no column of a catalog: \[\]"),
        ("id,x,y\n1,2,3\n", "no column match"),
        ("id,x,y,match\n1,2,3,\n2,2,3,-1\n", "match is empty or infinite in 1 of 2 rows"),
        ("id,x,y,match\n1,2,3,inf\n", "match is empty or infinite in 1 of 1 rows"),
        ("id,x,y,match\n1,2,3,-1\n2,2,3,no\n", "'match' holds 'no' in row 2"),
        ("id,x,y,match\n1,2,3,True\n", "'match' holds 'True' in row 1; a number"),
        ("id,x,y,match,flux\n1,2,3,-1,bright\n", "'flux' holds 'bright' in row 1"),
        ("id,x,y,match\n1,2,3,-1\n1,2,3,-1\n", "psfcat.csv: id 1 occurs more than once"),
        (
            "id,x,y,match\n1,2,3,-1\n2,2\n",
            "rows of different length: row 2 has 2 cells, and the header 4",
        ),
        ("id,x,y,match\n1,2,3,-1,5\n", "rows of different length"),
        ("id,x,y,match,match\n1,2,3,-1,5\n", "column match occurs more than once"),
        ("id,x,y,match, x\n1,2,3,-1,5\n", "column x occurs more than once"),
        ('id,x,y,match,c\n1,2,3,-1,"a\n2,2,3,-1,b\n', "catalog: unexpected end of data"),
        ("id,x,y,match\n1,2,3,-1\n,,,\n", "match is empty or infinite in 1 of 2 rows"),
        ("id,x,y,match\n1,2,3,-1_0\n", "'match' holds '-1_0' in row 1; a number"),
        ("id,x,y,match\n1,2,3,-1\n2,2,3,\xb2\n", "'match' holds '.' in row 2; a number"),
        ("id;x;y;match\n1;2;3;-1\n", r"has no column of a catalog: \['id;x;y;match'\]"),
        ("id,y,match\n1,2,-1\n", "no column x, xcentroid, x_centroid, x_fit, here or in diff"),
        ("id,x,match\n1,2,-1\n", "no column y"),
    ],
)
def test_catalogs_that_cannot_be_used_are_refused(tmp_path, text, message):
    with pytest.raises(DatasetError, match=message):
        read_text(tmp_path, text)


def test_a_missing_catalog_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"psfcat\.csv: not a readable catalog: No such file"):
        read_catalog(tmp_path)


def test_a_header_without_rows_is_a_catalog_of_no_candidates(tmp_path):
    found = read_text(tmp_path, "id,x,y,match\n")
    assert len(found) == 0
    assert len(index_of(found)) == 0


def test_index_rows_have_the_columns_of_the_contract():
    rows = index_of(make_catalog())
    assert ",".join(rows.columns) == (
        "id,jid,x,y,sharpness,roundness1,roundness2,npix,peak,flux,mag,daofind_mag,flags,match,"
        "label,image_filename"
    )
    assert set(rows["jid"]) == {"jid007"}
    assert set(rows["image_filename"]) == {"images/jid007.npy"}


def test_label_is_real_for_any_match_but_minus_one():
    catalog = make_catalog(4).assign(match=[-1, 0, 7, -2])
    assert index_of(catalog)["label"].tolist() == [0, 1, 1, 1]


def test_mag_is_empty_where_flux_is_not_positive():
    catalog = make_catalog(4).assign(flux=[-1.0, 0.0, 2.0, np.nan], mag=[9.0, np.inf, -0.7, 5.0])
    np.testing.assert_array_equal(index_of(catalog)["mag"], [np.nan, np.nan, -0.7, 5])


def test_columns_that_the_catalog_lacks_are_empty_and_counted():
    catalog = make_catalog().drop(columns=["flux", "flags"])
    _, counts = create_dataset.index_rows(columns_of(catalog), "jid001", SHAPE)
    assert index_of(catalog)[["flux", "flags"]].isna().all(axis=None)
    assert {key for key in counts if key.startswith("lacks")} == {"lacks flux", "lacks flags"}


@pytest.mark.parametrize(
    ("x", "y", "kept"),
    [
        (-0.5, 0, True),  # the nearest pixel is 0
        (-0.51, 0, False),
        (79.49, 71.49, True),
        (79.5, 71, False),
        (79, 71.5, False),
        (75, 71, True),  # x beyond the height of the image: x is the column
        (71, 75, False),
        (np.nan, 5, False),
        (5, np.inf, False),
    ],
)
def test_a_candidate_stays_if_its_nearest_pixel_is_on_the_image(x, y, kept):
    catalog = {"x": np.array([x]), "y": np.array([y]), "match": np.array([-1.0])}
    rows, counts = create_dataset.index_rows(catalog, "jid001", (72, 80))
    assert rows.count("\n") == kept
    assert counts["bogus"] == kept
    assert counts["no position"] + counts["off the image"] == (not kept)


def test_natural_order_of_job_names():
    names = ["jid10", "jid2", "jid1", "jid02", "jid2b", "jid"]
    assert sorted(names, key=create_dataset.natural_key) == [
        *("jid", "jid1", "jid02", "jid2", "jid2b", "jid10")
    ]


def test_two_hundred_thousand_candidates_are_read_and_written_to_the_last_bit(tmp_path):
    catalog = make_catalog(200_000)
    found = read(write_job(tmp_path, catalog=catalog, images={}))
    pd.testing.assert_frame_equal(found, expected_columns(catalog), check_exact=True)
    index = index_of(found, (1000, 1000))
    pd.testing.assert_frame_equal(index[list(CATALOG_COLUMNS)], found, check_exact=True)
