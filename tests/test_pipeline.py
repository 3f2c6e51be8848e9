"""The three scripts as a user runs them: real processes, in sequence, with their defaults."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_job

ROOT = Path(__file__).parents[1]


def run(folder: Path, script: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / script, *options], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    for number in range(1, 5):
        write_job(folder / "mini_dataset", f"jid{number:03d}", seed=number)
    return folder


def test_defaults_chain_up(folder):
    created = run(folder, "create_dataset.py")
    assert (created.returncode, created.stderr) == (0, "")
    assert created.stdout.startswith("hackathon_dataset/master_index.csv\n")
    generated = run(folder, "generate_croissant.py")
    assert (generated.returncode, generated.stderr) == (0, "")
    assert generated.stdout.startswith("hackathon_dataset/croissant.json\n")
    trained = run(folder, "test_croissant_dataset.py", "--epochs", "2")
    assert trained.returncode == 0, trained.stderr
    assert len(trained.stderr.splitlines()) == 2
    assert trained.stdout.startswith("hackathon_dataset\n")
    written = {path.name for path in (folder / "hackathon_dataset").iterdir()}
    assert written == {"croissant.json", "images", "master_index.csv"}
    index = pd.read_csv(folder / "hackathon_dataset" / "master_index.csv")
    for name in index["image_filename"].unique():
        tensor = np.load(folder / "hackathon_dataset" / name)
        assert (tensor.dtype, tensor.shape[2]) == (np.dtype("<f4"), 4)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("create_dataset.py", ("-i", "nowhere"), "nowhere: no such folder"),
        ("generate_croissant.py", ("-c", "no/i.csv", "-o", "no/c.json"), "i.csv: no such file"),
        ("test_croissant_dataset.py", ("-d", "nowhere"), "croissant.json: no such file"),
    ],
)
def test_a_failure_is_exit_code_1_and_one_line(folder, script, options, message):
    done = run(folder, script, *options)
    assert done.returncode == 1
    assert done.stdout in ("", "nowhere\n  no    croissant.json is valid Croissant\n")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    "script", ["create_dataset.py", "generate_croissant.py", "test_croissant_dataset.py"]
)
def test_wrong_usage_is_exit_code_2(folder, script):
    done = run(folder, script, "--wrong")
    assert done.returncode == 2
    assert "unrecognized arguments: --wrong" in done.stderr
