"""create_dataset.py, whole runs: what is written, kept, redone, left out and said."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.visualization import ManualInterval, ZScaleInterval
from conftest import (
    CUT_HEADER,
    STEMS,
    contents,
    finish,
    make_catalog,
    make_images,
    run,
    start,
    write_job,
    write_two_tables,
)

import create_dataset


def create(raw: Path, out: Path, *options: str) -> int:
    return run(create_dataset, "-i", raw, "-o", out, *options)


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}


def make_newer(path: Path, than: Path) -> None:
    newer = than.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(newer, newer))


def test_a_run_writes_tensors_and_index_and_nothing_else(raw, tmp_path):
    assert create(raw, tmp_path / "out") == 0
    assert sorted(contents(tmp_path / "out")) == [
        *(f"images/jid00{n}.npy" for n in range(1, 5)),
        "master_index.csv",
    ]
    tensor = np.load(tmp_path / "out" / "images" / "jid002.npy")
    for channel, stem in enumerate(STEMS):
        pixels = fits.getdata(raw / "jid002" / f"{stem}.fits")
        scale = ManualInterval(*ZScaleInterval().get_limits(pixels))
        expected = scale(np.nan_to_num(pixels.astype(float)))
        np.testing.assert_allclose(tensor[..., channel], expected, rtol=0, atol=1e-6)


def test_tensor_files_are_those_of_numpys_own_save(raw, tmp_path):
    create(raw, tmp_path / "out")
    written = tmp_path / "out" / "images" / "jid001.npy"
    np.save(tmp_path / "again.npy", np.load(written))
    assert written.read_bytes() == (tmp_path / "again.npy").read_bytes()


def test_index_text(tmp_path):
    catalog = make_catalog(2).assign(x=[1.1, 0.1 + 0.2], flux=[-1.0, 1e-7], match=[-1, 3])
    catalog[["sharpness", "roundness1", "roundness2", "peak", "daofind_mag"]] = 0.5
    catalog[["y", "flags"]], catalog["mag"] = 2, [np.nan, 17.5]
    write_job(tmp_path / "raw", catalog=catalog)
    create(tmp_path / "raw", tmp_path / "out")
    assert (tmp_path / "out" / "master_index.csv").read_bytes().decode() == (
        "id,jid,x,y,sharpness,roundness1,roundness2,npix,peak,flux,mag,daofind_mag,flags,match,"
        "label,image_filename\n"
        "1.0,jid001,1.1,2.0,0.5,0.5,0.5,25.0,0.5,-1.0,,0.5,2.0,-1.0,0,images/jid001.npy\n"
        "2.0,jid001,0.30000000000000004,2.0,0.5,0.5,0.5,25.0,0.5,1e-07,17.5,0.5,2.0,3.0,1,"
        "images/jid001.npy\n"
    )


def test_jobs_are_in_natural_order_and_candidates_in_catalog_order(tmp_path):
    for jid in ("jid10", "jid2", "jid1"):
        write_job(tmp_path / "raw", jid, catalog=make_catalog(3).iloc[[2, 0, 1]])
    write_job(tmp_path / "raw", "other")
    write_job(tmp_path / "raw" / "jid2", "jid4")  # not directly under the input folder
    (tmp_path / "raw" / "jid3").touch()
    assert create(tmp_path / "raw", tmp_path / "out") == 0
    index = pd.read_csv(tmp_path / "out" / "master_index.csv")
    assert index["jid"].tolist() == ["jid1"] * 3 + ["jid2"] * 3 + ["jid10"] * 3
    assert index["id"].tolist() == [3, 1, 2] * 3


def test_two_layouts_give_the_same_bytes(tmp_path):
    one, two = write_job(tmp_path / "one"), write_job(tmp_path / "two")
    write_two_tables(two, make_catalog(), list(range(11, -1, -1)))
    create(one.parent, tmp_path / "out1")
    create(two.parent, tmp_path / "out2")
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_summary(raw, tmp_path, capsys):
    lost = make_catalog(8).assign(x=[np.nan, -9, 5, 5, 5, 5, 5, 5])
    write_job(raw, "jid005", catalog=lost)
    shutil.rmtree(raw / "jid002")
    (raw / "jid002").mkdir()
    assert create(raw, tmp_path / "out") == 1
    captured = capsys.readouterr()
    size = sum(map(len, contents(tmp_path / "out").values())) / 1e6
    assert "4 written, 0 up to date, 1 left out" in captured.out
    assert "42: 11 real (26.2 %), 31 bogus (73.8 %)" in captured.out
    assert "1 without a position, 1 off the image" in captured.out
    assert f"{size:.1f} MB in " in captured.out
    assert "jid002 left out" in captured.err


def test_dropped_candidates_alone_are_no_failure(tmp_path, capsys):
    write_job(tmp_path / "raw", catalog=make_catalog(4).assign(x=[1, 2, 3, 500]))
    assert create(tmp_path / "raw", tmp_path / "out") == 0
    assert "1 off the image" in capsys.readouterr().out


def test_missing_columns_are_named_once_a_run(raw, tmp_path, capsys):
    for number in (1, 2):
        catalog = make_catalog().drop(columns=["sharpness"])
        catalog.to_csv(raw / f"jid00{number}" / "psfcat.csv", index=False)
    assert create(raw, tmp_path / "out") == 0
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 1
    assert "sharpness (2 jobs)" in warnings[0]


def test_a_job_of_no_candidates_has_its_tensor(raw, tmp_path):
    make_catalog().iloc[:0].to_csv(raw / "jid001" / "psfcat.csv", index=False)
    assert create(raw, tmp_path / "out") == 0
    assert (tmp_path / "out" / "images" / "jid001.npy").exists()


def test_a_second_run_redoes_nothing_and_writes_the_same_index(raw, tmp_path, capsys):
    create(raw, tmp_path / "out")
    before, times_before = contents(tmp_path / "out"), times(tmp_path / "out")
    assert create(raw, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == before
    assert times(tmp_path / "out") == times_before
    assert "0 written, 4 up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoiled",
    [
        np.zeros((72, 80, 4)),
        np.zeros((72, 80, 3), np.float32),
        np.zeros((80, 72, 4), np.float32),  # of another job of the same name
        np.zeros((72, 80), np.float32),
        np.asfortranarray(np.zeros((72, 80, 4), np.float32)),
        {"tensor": np.zeros((72, 80, 4), np.float32)},
        CUT_HEADER,
    ],
    ids=[
        "float64",
        "three channels",
        "another shape",
        "flat",
        "Fortran order",
        "npz",
        "cut header",
    ],
)
def test_a_second_run_redoes_what_is_no_tensor_of_the_contract(raw, tmp_path, spoiled):
    create(raw, tmp_path / "out")
    before = contents(tmp_path / "out")
    path = tmp_path / "out" / "images" / "jid001.npy"
    if isinstance(spoiled, dict):
        with path.open("wb") as handle:
            np.savez(handle, **spoiled)
    elif isinstance(spoiled, bytes):
        path.write_bytes(spoiled)
    else:
        np.save(path, spoiled)
    assert create(raw, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == before


def test_a_second_run_redoes_what_is_missing_damaged_or_older_than_its_images(raw, tmp_path):
    create(raw, tmp_path / "out")
    images = tmp_path / "out" / "images"
    before = contents(tmp_path / "out")
    (images / "jid001.npy").unlink()
    (images / "jid002.npy").write_bytes(before["images/jid002.npy"][:-1])
    make_newer(raw / "jid003" / f"{STEMS[3]}.fits", than=images / "jid003.npy")
    kept = (images / "jid004.npy").stat().st_ino
    stale = (images / "jid003.npy").stat().st_ino
    assert create(raw, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == before
    assert (images / "jid004.npy").stat().st_ino == kept
    assert (images / "jid003.npy").stat().st_ino != stale


def test_a_changed_catalog_changes_the_index_and_no_tensor(raw, tmp_path):
    create(raw, tmp_path / "out")
    times_before = times(tmp_path / "out")
    make_catalog(5).to_csv(raw / "jid001" / "psfcat.csv", index=False)
    assert create(raw, tmp_path / "out") == 0
    assert times(tmp_path / "out") == times_before
    index = pd.read_csv(tmp_path / "out" / "master_index.csv")
    assert (index["jid"] == "jid001").sum() == 5


def test_overwrite_redoes_every_tensor(raw, tmp_path, capsys):
    create(raw, tmp_path / "out")
    before, times_before = contents(tmp_path / "out"), times(tmp_path / "out")
    assert create(raw, tmp_path / "out", "--overwrite") == 0
    assert contents(tmp_path / "out") == before
    assert not set(times(tmp_path / "out").values()) & set(times_before.values())
    assert "4 written" in capsys.readouterr().out


def drop_match(job: Path) -> None:
    make_catalog().drop(columns="match").to_csv(job / "psfcat.csv", index=False)


def empty_match(job: Path) -> None:
    make_catalog().astype(object).assign(match="").to_csv(job / "psfcat.csv", index=False)


def text_match(job: Path) -> None:
    make_catalog().assign(match="none").to_csv(job / "psfcat.csv", index=False)


def break_join(job: Path) -> None:
    write_two_tables(job, make_catalog(), list(range(11)))


def change_shape(job: Path) -> None:
    fits.writeto(job / f"{STEMS[3]}.fits", np.eye(9, dtype="f4"), overwrite=True)


def replace_by_link(job: Path, target: str) -> None:
    shutil.rmtree(job)
    job.symlink_to(target)


UNUSABLE = {
    drop_match: "jid003: no labels; give --truth, a column match in the catalog,",
    empty_match: "jid003: column match of the catalog: empty in row 1 and 11 more; expected -1",
    text_match: "psfcat.csv: column match: 'none' in row 1 and 11 more; expected a number",
    break_join: "do not match one to one",
    change_shape: f"images of different shapes: {STEMS[0]}.fits (72, 80), ",
    lambda job: (job / "psfcat.csv").unlink(): "jid003: no catalog; expected psfcat.csv or ",
    lambda job: job.rename(job.with_name("jid\n3")): "rename the folder",
    lambda job: replace_by_link(job, "nowhere"): "jid003 left out: [Errno 2] No such file or",
    lambda job: replace_by_link(job, "jid003"): "jid003 left out: [Errno 40] Too many levels of",
}


@pytest.mark.parametrize(("damage", "message"), UNUSABLE.items())
def test_an_unusable_job_is_left_out_whole_and_named(raw, tmp_path, capsys, damage, message):
    damage(raw / "jid003")
    assert create(raw, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "left out: " in error
    assert message in error
    assert set(contents(tmp_path / "out")) == {
        *(f"images/jid00{n}.npy" for n in (1, 2, 4)),
        "master_index.csv",
    }
    index = pd.read_csv(tmp_path / "out" / "master_index.csv")
    assert set(index["jid"]) == {"jid001", "jid002", "jid004"}


def test_a_job_that_broke_since_loses_its_tensor_and_its_rows(raw, tmp_path):
    create(raw, tmp_path / "out")
    (raw / "jid003" / "psfcat.csv").unlink()
    assert create(raw, tmp_path / "out") == 1
    assert not (tmp_path / "out" / "images" / "jid003.npy").exists()
    assert "jid003" not in (tmp_path / "out" / "master_index.csv").read_text()


def test_a_tensor_of_a_job_that_is_gone_is_kept_and_named(raw, tmp_path, capsys):
    create(raw, tmp_path / "out")
    shutil.rmtree(raw / "jid003")
    assert create(raw, tmp_path / "out") == 0
    assert (tmp_path / "out" / "images" / "jid003.npy").exists()
    assert "croissant.json will include them: jid003" in capsys.readouterr().err
    assert "jid003" not in (tmp_path / "out" / "master_index.csv").read_text()


def test_where_no_job_can_be_used_the_dataset_stays_as_it_was(raw, tmp_path, capsys):
    create(raw, tmp_path / "out")
    before = contents(tmp_path / "out")
    for job in raw.iterdir():
        (job / "psfcat.csv").unlink()
    assert create(raw, tmp_path / "out") == 1
    assert contents(tmp_path / "out") == before
    assert "none of the jobs could be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no folders jid* in it; give the one that"),
        (lambda folder: folder.touch(), "no such folder"),
    ],
    ids=["missing", "no jobs", "a file"],
)
def test_an_input_that_cannot_be_used(tmp_path, capsys, make, message):
    make(tmp_path / "raw")
    assert create(tmp_path / "raw", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made(raw, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert create(raw, tmp_path / "out") == 1
    assert "Not a directory: " in capsys.readouterr().err


def test_a_failed_write_leaves_nothing_under_a_final_name(raw, tmp_path, capsys, monkeypatch):
    def fail(self, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", fail)
    assert create(raw, tmp_path / "out") == 1
    assert contents(tmp_path / "out") == {}
    message = "jid001.npy: cannot be written: No space left on device"
    assert message in capsys.readouterr().err


def test_wrong_usage_is_2():
    with pytest.raises(SystemExit, match="2"):
        create_dataset.main(["--no_such_option"])


def test_shapes_may_differ_between_jobs(tmp_path):
    write_job(tmp_path / "raw", "jid1", images=make_images(shape=(72, 80)))
    write_job(tmp_path / "raw", "jid2", images=make_images(shape=(80, 90)))
    assert create(tmp_path / "raw", tmp_path / "out") == 0
    assert np.load(tmp_path / "out" / "images" / "jid2.npy").shape == (80, 90, 4)


def test_a_name_too_long_for_its_tensor_is_an_error_of_its_job(raw, tmp_path, capsys):
    (raw / "jid003").rename(raw / ("jid3" + "0" * 249))
    assert create(raw, tmp_path / "out") == 1
    assert "rename the folder" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3


def test_a_tensor_that_a_worker_wrote_elsewhere_is_noticed(raw, tmp_path, capsys, monkeypatch):
    """As the workers of Dask do that do not share the output folder."""
    create(raw, tmp_path / "out")
    before = (tmp_path / "out" / "master_index.csv").read_bytes()
    (tmp_path / "out" / "images" / "jid002.npy").unlink()
    monkeypatch.setattr(Path, "replace", lambda self, target: self.unlink())
    assert create(raw, tmp_path / "out", "--workers", "1") == 1
    message = "jid002.npy: is not there; do all workers share this folder?"
    assert message in capsys.readouterr().err
    assert (tmp_path / "out" / "master_index.csv").read_bytes() == before


@pytest.mark.skipif(create_dataset.fcntl is None, reason="there are no locks")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(raw, tmp_path, capsys, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(create_dataset.fcntl, "flock", refuse)
    assert create(raw, tmp_path / "out") == 0
    message = f"out: cannot be locked ({os.strerror(code)}); make sure that no other run writes"
    assert message in capsys.readouterr().err
    assert len(contents(tmp_path / "out")) == 5


def test_a_plain_file_named_like_a_job_is_no_job(raw, tmp_path):
    (raw / "jid_notes.txt").write_text("")
    (raw / "jid_link").symlink_to("jid_notes.txt")
    assert create(raw, tmp_path / "out") == 0


def test_a_job_behind_a_link_is_a_job(raw, tmp_path):
    (raw / "jid001").rename(tmp_path / "elsewhere")
    (raw / "jid001").symlink_to(tmp_path / "elsewhere")
    assert create(raw, tmp_path / "out") == 0
    assert (tmp_path / "out" / "images" / "jid001.npy").exists()


@pytest.mark.parametrize("closed", ["jid002", "behind a link"])
def test_a_job_folder_without_permission_is_left_out(raw, tmp_path, closed):
    prefix = ()
    if os.geteuid() == 0:  # root enters every folder, unless it gives that up
        prefix = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
        if not shutil.which("setpriv"):
            pytest.skip("no setpriv, which takes root's right to enter every folder")
    folder = raw / "jid002"
    if closed == "behind a link":
        (tmp_path / "closed").mkdir()
        folder = (raw / "jid002").rename(tmp_path / "closed" / "jid002").parent
        (raw / "jid002").symlink_to(folder / "jid002")
    folder.chmod(0)
    options = "-i", raw, "-o", tmp_path / "out"
    code, _, error = finish(start(create_dataset.__file__, *options, prefix=prefix))
    folder.chmod(0o755)
    assert code == 1
    message = f"[Errno 13] Permission denied: '{raw}/jid002'"
    assert error == f"ERROR: jid002 left out: {message}\n"
    assert len(contents(tmp_path / "out")) == 4


def test_stderr_may_be_closed(raw, tmp_path):
    shell = ("sh", "-c", 'exec "$@" 2>&-', "sh")
    options = "-i", raw, "-o", tmp_path / "out"
    assert finish(start(create_dataset.__file__, *options, prefix=shell)).code == 0
    assert (tmp_path / "out" / "master_index.csv").exists()


def test_stdout_that_lacks_a_letter_of_a_path(raw, tmp_path):
    options = "-i", raw, "-o", tmp_path / "ångström"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code, out, error = finish(start(create_dataset.__file__, *options, env=environment))
    assert (code, out) == (0, "")
    assert error.startswith("WARNING: the summary cannot be printed: 'ascii' codec can't encode")
    assert (tmp_path / "ångström" / "master_index.csv").exists()


def test_a_reader_of_stdout_that_is_gone_is_no_failure(raw, tmp_path):
    process = start(create_dataset.__file__, "-i", raw, "-o", tmp_path / "out")
    process.stdout.close()
    assert process.wait(60) == 0
    message = "WARNING: the summary cannot be printed: [Errno 32] Broken pipe\n"
    assert process.stderr.read() == message
