"""create_dataset.py, from the catalogs of a job to its rows of the index, through whole runs."""

import random
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from conftest import (
    finish,
    make_catalog,
    make_images,
    read_csv,
    run,
    start,
    write_job,
    write_two_tables,
)

import create_dataset

JID, FINDER = "jid007", "diffimage_masked_psfcat_finder.txt"
COLUMNS = list(create_dataset.CATALOG_COLUMNS)
ROW = "id,x,y,match\n1,2,3,-1\n"
PAIR, FOUND = "id,match\n1,-1\n2,-1\n", "id x y\n1 1 1\n2 2 2\n"  # psfcat.csv and a finder table
EMPTY_CELLS = ['""', "--", "NA", "N/A", "<NA>", "NULL", "None", "nan", "null"]
ODD_CELLS = ["True", "1_0", "0x1A", "\uff11", "\xb2", "1j", "1d5", "bright", "'1'"]  # no numbers


class Outcome(NamedTuple):
    """What a user sees of a run."""

    code: int
    index: pd.DataFrame | None  # NaN for an empty cell
    out: str
    err: str

    def rows(self, names: str) -> list[list[float]]:
        """Return some columns of the index; the run did all that was asked for."""
        assert (self.code, "ERROR" in self.err) == (0, False), self.err
        return self.index[names.split()].to_numpy().tolist()

    def reason(self) -> str:
        """Return why the job was left out; it was the only one."""
        assert (self.code, self.index) == (1, None)
        reason, end = self.err.splitlines()
        assert end.startswith("ERROR: none of the jobs could be used")
        return reason.removeprefix(f"ERROR: {JID} left out: ")


@pytest.fixture
def job(tmp_path) -> Path:
    """Return the only job of an input folder, 72 pixels high and 80 wide, with make_catalog()."""
    return write_job(tmp_path / "raw", JID)


@pytest.fixture
def build(job, capsys) -> Callable[..., Outcome]:
    """Return a function that runs the job, with other catalogs if they are given."""

    def build(psfcat: str | bytes = "", finder: str | bytes = "") -> Outcome:
        for name, text in (("psfcat.csv", psfcat), (FINDER, finder)):
            if text:
                (job / name).write_bytes(text.encode() if isinstance(text, str) else text)
        out = job.parent.with_name("out")
        code = run(create_dataset, "-i", job.parent, "-o", out, "--workers", 1)
        path, index = out / "master_index.csv", None
        if path.exists():
            index = read_csv(path, keep_default_na=False, na_values=[""])
        return Outcome(code, index, *capsys.readouterr())

    return build


def layout(table: str, in_finder: bool) -> tuple[str, str]:
    """Return psfcat.csv and the finder table that have a table of two candidates, 1 and 2."""
    return (PAIR, table.replace(",", " ")) if in_finder else (table, "")


def assert_holds(index: pd.DataFrame, catalog: pd.DataFrame) -> None:
    """Assert that an index has every number of a catalog, to the last bit."""
    expected = catalog[COLUMNS].astype(float)
    pd.testing.assert_frame_equal(index[COLUMNS], expected, check_exact=True)


@pytest.mark.parametrize("rows", [12, 20_000])
def test_every_number_is_read_and_written_to_the_last_bit(build, rows):
    catalog = make_catalog(rows)
    outcome = build(catalog.to_csv(index=False))
    assert (outcome.code, outcome.err) == (0, "")
    assert_holds(outcome.index, catalog)


def test_the_index_has_the_columns_of_the_contract(build):
    index = build().index
    assert " ".join(index.columns) == (
        "id jid x y sharpness roundness1 roundness2 npix peak flux mag daofind_mag flags match"
        " label image_filename"
    )
    assert tuple(index.columns) == create_dataset.INDEX_COLUMNS
    assert set(index["jid"]) == {JID}
    assert set(index["image_filename"]) == {f"images/{JID}.npy"}


def test_a_column_is_added_to_the_index_in_one_line(job, tmp_path):
    source = Path(create_dataset.__file__).read_text(encoding="utf-8")
    assert source.count("daofind_mag flags") == 1
    script = tmp_path / "create_dataset.py"
    script.write_text(source.replace("daofind_mag flags", "daofind_mag snr flags"))
    (job / "psfcat.csv").write_text("id,x,y,match,snr\n1,2,3,-1,5.5\n2,2,3,-1,\n")
    pair = shutil.copytree(job, job.with_name("jid008"))
    (pair / "psfcat.csv").write_text(PAIR)
    (pair / FINDER).write_text("id x y SNR\n2 2 3 7.5\n1 2 3 6.5\n")
    done = finish(start(script, "-i", job.parent, "-o", tmp_path / "out", "--workers", "1"))
    assert done.code == 0, done.err
    index = read_csv(tmp_path / "out" / "master_index.csv")
    assert list(index.columns[-5:-3]) == ["snr", "flags"]
    np.testing.assert_array_equal(index["snr"], [5.5, np.nan, 6.5, 7.5])


def test_two_files_are_joined_on_id_and_not_by_row_order(job, build):
    write_two_tables(job, make_catalog(), [5, 0, 11, 2, 1, 3, 4, 10, 9, 8, 7, 6])
    assert_holds(build().index, make_catalog())


@pytest.mark.parametrize(
    "finder",
    ["id x y flux", "# id X y flux", "#id x y FLUX", "\ufeff# ID x y flux", " id x  y flux"],
)
@pytest.mark.parametrize(
    "psfcat",
    [
        *("id,match,flags", "# id,match,flags", "#id,Match,FLAGS", "ID,MATCH,FLAGS"),
        *("\ufeffid,match,flags", "\ufeff# id,match,flags", "  id , Match,  flags "),
        *('"id","match","flags"', '"# id","Match"," FLAGS "', '\ufeff"#ID",match,flags'),
    ],
)
def test_id_is_found_however_it_is_headed(build, psfcat, finder):
    """The column of `# id` was not found, and the files were joined by the order of their rows."""
    finder = f"{finder}\n9 45 9 900\n7 35 7 -7\n3 15 3 3\n"
    outcome = build(f"{psfcat}\n7,-1,0\n3,5,2\n9,-1,4\n", finder)
    found = outcome.rows("x y flux flags match")
    assert found == [[35, 7, -7, 0, -1], [15, 3, 3, 2, 5], [45, 9, 900, 4, -1]]


@pytest.mark.parametrize(
    ("psfcat", "finder"),
    [
        ("flags,match\n0,-1\n4,3\n", FOUND),
        ("flags,match\n0,-1\n4,3\n", "x y\n1 2\n3 4\n"),
        (PAIR, "source_id x y\n1 1 1\n2 2 2\n"),
        (make_catalog(2).drop(columns="id").to_csv(index=False), FOUND),
    ],
)
def test_two_files_without_ids_are_never_joined_by_row_order(build, psfcat, finder):
    assert re.search(r"\(2 rows\).*\(2 rows\).* the column id", build(psfcat, finder).reason())


@pytest.mark.parametrize("in_finder", [False, True])
@pytest.mark.parametrize(
    ("first", "second"), [("5", "5,5"), ("5,5", "5"), ("5,5", "5,5,5"), ("5,5,5", "5,5,5")]
)
def test_rows_of_unequal_length_are_refused(build, in_finder, first, second):
    table = f"id,x,y,match,flux,comment\n1,2,3,-1,{first}\n2,2,3,-1,{second}\n"
    number = 2 if first == "5,5" else 1
    reason = build(*layout(table, in_finder)).reason()
    name = FINDER if in_finder else "psfcat.csv"
    assert re.search(rf"{name}: .*\b(row {number}|line {number + 1})\b", reason)


@pytest.mark.parametrize(
    ("psfcat", "finder", "message"),
    [
        (PAIR, FOUND.replace("2 2 2", "3 2 2"), r"one to one: 2 ids .*only one .*, such as 2\b"),
        ("id,match\n1,-1\n", FOUND, r"\(1 rows\).*\(2 rows\).* one to one"),
        ("id,match\n1,-1\n,-1\n", FOUND, "one to one: 2 ids are empty"),
        ("id,match\n1,-1\n,-1\n", 'id x y\n1 1 1\n"" 1 1\n', "one to one: .* empty"),
        (PAIR, "id x y\n2 1 1\n2 1 1\n", f"{FINDER}: column id: '2.*row 2.*every id once"),
        ("id,match\n2,-1\n2.0,-1\n", FOUND, "psfcat.csv: column id: '2.*row 2.*every id once"),
        (ROW + "1,2,3,-1\n", "", "psfcat.csv: column id: '1.*row 2.*every id once"),
        (PAIR, "", "no column x, xcentroid, x_centroid, x_fit, here or in diff"),
        ("id,x,match\n1,2,-1\n", "", "no column y"),
        ("id,x,y\n1,2,3\n", "", "no labels; .* --truth, .* match in .*, or one .*inject.txt"),
        ("id;x;y;match\n1;2;3;-1\n", "", "psfcat.csv: .*none of the expected .*id;x;y;match"),
        ("z" * 999 + "\n1\n", "", "none of the expected columns: .*zzz"),
        ("\n\n", "", "psfcat.csv: the header has none of"),
        ('id,x,y,match,c\n1,2,3,-1,"a\n2,2,3,-1,b\n', "", "catalog: unexpected end"),
        ('id,x,y,match,c\n1,2,3,-1,"a\n2,2,3,-1,b"\n', "", "a quote is not closed"),
        ("id,x,y,match,Match\n1,2,3,-1,5\n", "", "column match occurs more than once"),
        ("#X,id, x,y,match\n1,2,3,-1,5\n", "", "column x occurs more than once"),
        ('id,x,y,match,"# ID"\n1,2,3,-1,5\n', "", "column id occurs more than once"),
        ("x,y,match,n_pixels,N_PIXELS\n2,3,-1,5,5\n", "", "column n_pixels occurs more than"),
        (PAIR, "# x id y X\n1 1 1 1\n2 2 2 2\n", f"{FINDER}: column x occurs more than once"),
    ],
)
def test_a_catalog_that_cannot_be_used_is_refused_with_a_short_reason(
    job, build, psfcat, finder, message
):
    reason = build(psfcat, finder).reason()
    assert re.search(message, reason)
    assert len(reason) < len(str(job)) + 320


@pytest.mark.parametrize("name", ["psfcat.csv", FINDER])
@pytest.mark.parametrize(
    "content",
    [ROW.encode("utf-16"), FOUND.encode("utf-16-be"), random.Random(0).randbytes(999), bytes(99)],
    ids=["UTF-16", "UTF-16 without a mark", "junk", "NUL"],
)
def test_what_is_not_text_is_left_out(build, name, content):
    reason = build(*{"psfcat.csv": PAIR, FINDER: FOUND, name: content}.values()).reason()
    assert name in reason
    assert reason.isprintable()


def test_a_missing_catalog_is_refused(job, build):
    (job / "psfcat.csv").unlink()
    expected = "no catalog; expected psfcat.csv or diffimage_masked_psfcat.txt"
    assert build().reason() == f"{job}: {expected}"


def test_a_header_without_rows_is_a_catalog_of_no_candidates(build):
    outcome = build("id,x,y,match\n")
    assert outcome.rows("id") == []
    assert re.search(r"candidates +0: 0 real", outcome.out)


def test_the_finder_is_not_asked_if_psfcat_has_everything(build):
    assert_holds(build(finder="id peak\n99 1.0\n").index, make_catalog())


def test_columns_of_psfcat_win_but_the_finders_centroids_win_over_fits(build):
    psfcat = "id,flux,match,x_fit,y_fit\n1,10,-1,50,60\n2,20,-1,51,61\n"
    outcome = build(psfcat, "id flux xcentroid ycentroid\n2 -2 7 8\n1 -1 5 6\n")
    assert outcome.rows("flux x y") == [[10, 5, 6], [20, 7, 8]]


@pytest.mark.parametrize(
    "names",
    ["x xcentroid x_centroid x_fit", "y ycentroid y_centroid y_fit", "npix n_pixels"],
)
def test_aliases_are_taken_in_order_of_preference(build, names):
    names = names.split()
    catalog = make_catalog(1).drop(columns=names[0])
    for number, name in reversed([*enumerate(names)]):
        catalog = catalog.assign(**{name: number})
        assert build(catalog.to_csv(index=False)).rows(names[0]) == [[number]]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + ROW,
        ROW.replace("\n", "\r\n"),
        ROW.replace("\n", "\r"),
        "\n\nid,x,y,match\n\n1,2,3,-1\n\n",
        " id , X,y ,Match \n 1, 2 ,3 ,-1\n",
        '"id","x","y","match"\n"1","2.0","3","-1"\n',
        "id,x,y,match,field\n1,2,3,-1,Ori\xf3n\n".encode("latin-1"),
        'id,x,y,match,comment\n1,2,3,-1,"several words, ""quoted"""\n',
        "id,a,x,A,y,a,match\n1,a,2,b,3,c,-1\n",
        "id,x,y,xcentroid,xcentroid,match\n1,2,3,4,5,-1\n",
        "id,x,y,match," + "z" * 999 + "\n1,2,3,-1," + "z" * 999 + "\n",
        *(f"id,x,y,match,comment\n1,2,3,-1,{cell}\n" for cell in ODD_CELLS),
    ],
)
def test_harmless_variants_of_psfcat_are_read(build, text):
    assert build(text).rows("id x y match") == [[1, 2, 3, -1]]


@pytest.mark.parametrize(
    "finder",
    [
        "id\tx\ty\n2\t22\t4\n1\t11\t3\n",
        "\n  id   x  y  \n\n  2 22\t4\n  1 11 3  \n\n",
        "id x y\r\n2 22 4\r\n1 11 3\r\n",
        "id x y\r2 22 4\r1 11 3\r",
        "id x name y name\n2 22 \"a 4 True\n1 11 '\xfc 3 0x1A\n",
    ],
)
def test_harmless_variants_of_the_finder_are_read(build, finder):
    assert build(PAIR, finder).rows("id x y") == [[1, 11, 3], [2, 22, 4]]


@pytest.mark.parametrize(
    ("in_finder", "cell"), [*product([False, True], EMPTY_CELLS), (False, ""), (False, " ")]
)
def test_a_cell_without_a_value_is_empty_in_the_index(build, in_finder, cell):
    table = f"id,x,flux,y,mag,match\n1,2,{cell},3,{cell},-1\n2,2,5,3,{cell},-1\n"
    outcome = build(*layout(table, in_finder))
    np.testing.assert_array_equal(outcome.rows("flux mag"), [[np.nan] * 2, [5, np.nan]])


@pytest.mark.parametrize("beside", ["5", "nan", "True"])
@pytest.mark.parametrize(
    ("in_finder", "cell"),
    [*product([False, True], ODD_CELLS), (True, '"2"'), (False, "1 2"), (False, "z" * 999)],
)
def test_a_cell_that_is_not_a_number_is_refused(build, in_finder, cell, beside):
    table = f"id,x,y,match,flux\n1,2,3,-1,{cell}\n2,2,3,-1,{beside}\n"
    reason = build(*layout(table, in_finder)).reason()
    name = FINDER if in_finder else "psfcat.csv"
    assert f"{name}: column flux: {cell[:80]!r} in row 1" in reason


@pytest.mark.parametrize("match", ["-99", "-2", "0.5", "-0.5", "inf", "-inf", "none", "True", ""])
def test_a_match_that_is_no_number_of_a_source_is_refused(build, match):
    reason = build(f"id,x,y,match\n1,2,3,-1\n2,2,3,{match}\n3,2,3,4\n").reason()
    named = rf"'{re.escape(match)}(\.0)?'" if match else "empty"
    assert re.search(f"column match( of the catalog)?: {named} in row 2", reason)


@pytest.mark.parametrize("match", ["-1", "-1.0", "0", "7", "7.0", "1e3"])
def test_label_is_real_for_any_match_but_minus_one(build, match):
    label = float(match) != -1
    assert build(f"x,y,match\n1,2,{match}\n").rows("match label") == [[float(match), label]]


@pytest.mark.parametrize(
    ("match", "warns"),
    [(range(4), True), ([-1, 5, 6, 7, -1], True), ([-1, 5, 6, -1], False), ([-1, -1], False)],
)
def test_a_job_more_than_half_real_is_a_warning(build, match, warns):
    outcome = build(make_catalog(len(match)).assign(match=match).to_csv(index=False))
    assert outcome.code == 0
    assert bool(re.fullmatch(f"WARNING: more than half .*{JID}.*\n", outcome.err)) == warns
    assert warns or outcome.err == ""


@pytest.mark.parametrize("in_two_files", [False, True])
@pytest.mark.parametrize("two", ["2", "nan", "169298436812112388"])
@pytest.mark.parametrize(
    "one",  # the first is the same number as the last of those above, as float64
    ["169298436812112387", "-169298436812112387", str(2**53), "18446744073709551617", "1e+17"],
)
def test_an_id_that_float64_may_not_hold_is_refused(build, one, two, in_two_files):
    """Two such ids became one, and candidates took the values of others."""
    psfcat = f"id,x,y,match\n{one},1,1,-1\n{two},2,2,4\n"
    reason = build(psfcat, f"id flux\n{two} 2\n{one} 1\n" if in_two_files else "").reason()
    assert re.search(r"psfcat.csv: column id: '-?[0-9.e+]+' in row 1\b.* 2\*\*53", reason)


def test_ids_below_two_to_the_53_are_exact(build):
    psfcat = "id,match\n9007199254740991,-1\n9007199254740990,4\n"
    outcome = build(psfcat, "id x y\n9007199254740990 2 2\n9007199254740991 1 1\n")
    assert outcome.rows("id x match") == [[2**53 - 1, 1, -1], [2**53 - 2, 2, 4]]


def test_mag_is_empty_if_flux_is_not_positive(build):
    catalog = make_catalog(4).assign(flux=[-1.0, 0.0, 2.0, np.nan], mag=[9.0, np.inf, -0.7, 5.0])
    index = build(catalog.to_csv(index=False)).index
    np.testing.assert_array_equal(index["mag"], [np.nan, np.nan, -0.7, 5])


def test_columns_that_the_catalog_lacks_are_empty_and_named(build):
    outcome = build(make_catalog().drop(columns=["flux", "flags"]).to_csv(index=False))
    assert outcome.code == 0
    assert outcome.index[["flux", "flags"]].isna().all(axis=None)
    assert outcome.err.endswith("left empty: flux (1 jobs), flags (1 jobs)\n")


@pytest.mark.parametrize(
    ("x", "y", "dropped"),
    [
        ("-0.5", "0", ""),  # the nearest pixel is 0
        ("-0.51", "0", "1 off the image"),
        ("79.49", "71.49", ""),
        ("79.5", "71", "1 off the image"),
        ("79", "71.5", "1 off the image"),
        ("75", "71", ""),  # x beyond the height of the image: x is the column
        ("71", "75", "1 off the image"),
        ("nan", "5", "1 without a position"),
        ("5", "inf", "1 without a position"),
        ("--", "500", "1 without a position"),
    ],
)
def test_a_candidate_stays_if_its_nearest_pixel_is_on_the_image(build, x, y, dropped):
    outcome = build(f"id,x,y,match\n1,{x},{y},4\n2,9,9,-1\n")
    assert outcome.rows("id") == ([[2]] if dropped else [[1], [2]])
    assert re.search(f"candidates +{1 if dropped else 2}: ", outcome.out)
    found = re.findall("1 off the image|1 without a position", outcome.out)
    assert found == ([dropped] if dropped else [])


def test_jobs_are_in_natural_order(tmp_path):
    jobs, images = ["jid", "jid1", "jid02", "jid2", "jid2b", "jid10"], make_images(shape=(9, 9))
    for jid in reversed(jobs):
        write_job(tmp_path / "raw", jid, make_catalog(2).assign(x=1, y=1), images)
    assert run(create_dataset, "-i", tmp_path / "raw", "-o", tmp_path / "out", "--workers", 1) == 0
    index = read_csv(tmp_path / "out" / "master_index.csv")
    assert index["jid"].tolist() == [jid for jid in jobs for _ in range(2)]
