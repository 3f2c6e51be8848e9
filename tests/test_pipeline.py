"""The three scripts as a user runs them: real processes, in sequence, with their defaults."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import STEMS, finish, make_catalog, run, start, write_job

import create_dataset
import generate_croissant
import test_croissant_dataset

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    for number in range(1, 5):
        write_job(folder / "mini_dataset", f"jid{number:03d}", seed=number)
    return folder


def test_defaults_chain_up(folder):
    created = finish(start(ROOT / "create_dataset.py", cwd=folder))
    assert (created.code, created.err) == (0, "")
    assert created.out.startswith("hackathon_dataset/master_index.csv\n")
    generated = finish(start(ROOT / "generate_croissant.py", cwd=folder))
    assert (generated.code, generated.err) == (0, "")
    assert generated.out.startswith("hackathon_dataset/croissant.json\n")
    trained = finish(start(ROOT / "test_croissant_dataset.py", "--epochs", "2", cwd=folder))
    assert trained.code == 0, trained.err
    assert len(trained.err.splitlines()) == 2
    assert trained.out.startswith("hackathon_dataset\n")
    written = {path.name for path in (folder / "hackathon_dataset").iterdir()}
    assert written == {"croissant.json", "images", "master_index.csv"}
    index = pd.read_csv(folder / "hackathon_dataset" / "master_index.csv")
    for name in index["image_filename"].unique():
        tensor = np.load(folder / "hackathon_dataset" / name)
        assert (tensor.dtype, tensor.shape[2]) == (np.dtype("<f4"), 4)


def test_a_channel_and_a_column_are_added_as_the_readme_says(tmp_path):
    edits = {
        "create_dataset.py": [
            ('    "score": (', '    "uncertainty": ("uncertainty",),\n    "score": ('),
            ("daofind_mag flags", "daofind_mag flags snr"),
        ],
        "generate_croissant.py": [
            ('"difference", "score")', '"difference", "uncertainty", "score")'),
            ('    "match": f"Number', '    "snr": "Signal to noise.",\n    "match": f"Number'),
        ],
        "test_croissant_dataset.py": [
            ('"difference", "score")', '"difference", "uncertainty", "score")'),
            ("daofind_mag flags", "daofind_mag flags snr"),
        ],
    }
    for number in range(1, 5):
        catalog = make_catalog(seed=number).assign(snr=np.arange(12) / 4)
        job = write_job(tmp_path / "mini_dataset", f"jid{number}", catalog, seed=number)
        shutil.copy(job / f"{STEMS[0]}.fits", job / "uncertainty.fits")
    for script, pairs in edits.items():
        source = (ROOT / script).read_text(encoding="utf-8")
        for old, new in pairs:
            assert source.count(old) == 1
            source = source.replace(old, new)
        (tmp_path / script).write_text(source, encoding="utf-8")
        report = "--epochs", "1", "--report_dir", "report"
        options = report if script == "test_croissant_dataset.py" else ()
        done = finish(start(tmp_path / script, *options, cwd=tmp_path))
        assert done.code == 0, done.err
    assert (tmp_path / "report" / "report.png").exists()
    folder = tmp_path / "hackathon_dataset"
    index = pd.read_csv(folder / "master_index.csv")
    assert index["snr"].tolist() == [*np.arange(12) / 4] * 4
    tensor = np.load(folder / "images" / "jid1.npy")
    np.testing.assert_array_equal(tensor[..., 3], tensor[..., 0])  # uncertainty is a copy
    assert tensor.shape[2] == 5
    assert "reference, difference, uncertainty, score" in (folder / "croissant.json").read_text()


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("create_dataset.py", ("-i", "nowhere"), "nowhere: no such folder"),
        (
            "generate_croissant.py",
            ("-c", "no/i.csv", "-o", "no/c.json"),
            "i.csv: not a readable index",
        ),
        (
            "test_croissant_dataset.py",
            ("-d", "nowhere"),
            "nowhere: no such folder; give that of the dataset with -d",
        ),
    ],
)
def test_a_failure_is_exit_code_1_and_one_line(folder, script, options, message):
    done = finish(start(ROOT / script, *options, cwd=folder))
    assert done.code == 1
    assert done.out in ("", "nowhere\n  no    croissant.json is valid Croissant\n")
    assert len(done.err.splitlines()) == 1
    assert message in done.err


@pytest.mark.parametrize("script", [create_dataset, generate_croissant, test_croissant_dataset])
def test_wrong_usage_is_exit_code_2(capsys, script):
    with pytest.raises(SystemExit, match="2"):
        run(script, "--wrong")
    assert "unrecognized arguments: --wrong" in capsys.readouterr().err
