"""What holds between the files of the repository: constants, requirements, README."""

import ast
import re
import sys
import tomllib
from itertools import combinations
from pathlib import Path

import pytest
from conftest import finish, start

import create_dataset
import generate_croissant
import test_croissant_dataset as training

ROOT = Path(__file__).parents[1]
MODULES = (create_dataset, generate_croissant, training)
OPTIONAL = {"distributed", "matplotlib"}  # imported only where an option asks for it
SCRIPTS = tuple(Path(module.__file__).name for module in MODULES)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def constants(module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if re.fullmatch("[A-Z_]+", name)}


def requirements(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r")]


def inline_metadata(script: str) -> dict:
    text = (ROOT / script).read_text(encoding="utf-8")
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", text, flags=re.MULTILINE)
    return tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))


def imported_packages(script: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_constants_that_two_scripts_share_agree():
    shared = set()
    for one, other in combinations(MODULES, 2):
        names = (constants(one).keys() & constants(other).keys()) - {"LOG"}
        for name in names:
            assert getattr(one, name) == getattr(other, name), name
        shared |= names
    assert shared >= {"CHANNEL_NAMES", "INDEX_COLUMNS", "INDEX_NAME", "IMAGES_DIR", "RECORD_SET"}


def test_features_are_columns_of_the_index():
    assert set(training.FEATURE_COLUMNS) < set(create_dataset.INDEX_COLUMNS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_names_just_what_the_script_imports(script):
    metadata = inline_metadata(script)
    assert metadata["requires-python"] == ">=3.11"
    names = {re.match(r"[\w-]+", line)[0] for line in metadata["dependencies"]}
    assert names == imported_packages(script) - OPTIONAL


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_has_the_ranges_of_requirements_txt(script):
    assert set(inline_metadata(script)["dependencies"]) <= set(
        requirements(ROOT / "requirements.txt")
    )


def test_requirements_txt_has_nothing_that_no_script_needs():
    needed = [line for script in SCRIPTS for line in inline_metadata(script)["dependencies"]]
    assert set(requirements(ROOT / "requirements.txt")) == set(needed)


@pytest.mark.parametrize("path", ["requirements.txt", "tests/requirements.txt"])
def test_every_requirement_has_a_lower_and_an_upper_bound(path):
    lines = requirements(ROOT / path)
    assert lines
    for line in lines:
        assert re.search(r">=[\d.]+,<=?[\d.]+$", line), line


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_runs_nothing(script, tmp_path):
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script[:-3]}"
    assert finish(start("-c", command, cwd=tmp_path)) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_readme_begins_with_two_commands():
    commands = code_blocks("bash")[:2]
    assert all(len(command.strip().splitlines()) == 1 for command in commands)
    for script in ("tests/make_mini_dataset.py", *SCRIPTS):
        assert f"python {script}" in commands[0]
    assert "pytest" in commands[1]


@pytest.mark.parametrize("script", (*SCRIPTS, "tests/make_mini_dataset.py"))
def test_readme_names_every_option(script):
    done = finish(start(ROOT / script, "--help"))
    assert (done.code, done.err) == (0, "")
    options = set(re.findall(r"--[a-z][a-z0-9_]+", done.out)) - {"--help"}
    assert options
    for option in options:
        assert f"`{option}`" in README


def test_readme_describes_every_column():
    for column in create_dataset.INDEX_COLUMNS:
        assert f"| `{column}` |" in README
