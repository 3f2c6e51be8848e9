"""What holds between the files of the repository: constants, requirements, README."""

import ast
import re
import sys
import tomllib
from itertools import combinations
from pathlib import Path

import make_mini_dataset
import pytest
from conftest import finish, start
from packaging.requirements import Requirement

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


def test_the_scripts_requirements_have_a_lower_and_an_upper_bound():
    for line in requirements(ROOT / "requirements.txt"):
        assert re.fullmatch(r"[a-z-]+>=[\d.]+,<[\d.]+", line), line


def test_what_ci_installs_is_pinned_and_within_the_scripts_requirements():
    pins = dict(line.split("==") for line in requirements(ROOT / "tests" / "requirements.txt"))
    for line in requirements(ROOT / "requirements.txt"):
        requirement = Requirement(line)
        assert pins[requirement.name] in requirement.specifier, line


def test_importing_the_scripts_runs_nothing(tmp_path):
    names = ", ".join(module.__name__ for module in MODULES)
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    assert finish(start("-c", command, cwd=tmp_path)) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def help_of(script, capsys) -> str:
    with pytest.raises(SystemExit, match=r"^0$"):
        script.main(["--help"])
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_readme_has_at_most_260_lines_and_a_small_picture():
    assert len(README.splitlines()) <= 260
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", README)
    assert 50_000 < (ROOT / picture).stat().st_size < 400_000


def test_readme_begins_with_two_commands():
    commands = code_blocks("bash")
    assert len(commands) == 2
    for command in commands:
        assert max(map(len, command.splitlines())) < 72
        assert "pip install -q -r tests/requirements.txt" in command
    for script in ("tests/make_mini_dataset.py", *SCRIPTS):
        assert f"python {script}" in commands[0]
    assert "--report_dir" in commands[0]
    assert "python -m pytest" in commands[1]


@pytest.mark.parametrize("script", MODULES)
def test_readme_names_options_that_exist_with_their_defaults(script, capsys):
    text = " ".join(help_of(script, capsys).split())
    table = README.partition("| script | option |")[2].partition("\n\n")[0]
    name, rows = "", []
    for line in table.splitlines()[2:]:
        first, option, default, _ = (cell.strip() for cell in line.split("|")[1:-1])
        name = first.strip("` ") or name
        if name == Path(script.__file__).name:
            rows.append((re.findall("--[a-z_]+", option)[0], default.strip("`")))
    assert rows
    for option, default in rows:
        assert f"{option} " in text
        if default.startswith("./"):
            assert f"(default: {default})" in text, option


def test_readme_and_its_examples_name_no_option_that_does_not_exist(capsys):
    known = set()
    for script in (*MODULES, make_mini_dataset):
        known |= set(re.findall("--[a-z][a-z0-9_]+", help_of(script, capsys)))
    foreign = {"--index-url", "--nworkers", "--nthreads", "--nproc_per_node"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", README)) - foreign <= known


def test_readme_describes_every_column():
    for column in create_dataset.INDEX_COLUMNS:
        assert f"| `{column}` |" in README


def test_every_test_file_has_its_line():
    named = re.findall(r"^\| `(\S+)` \|", (ROOT / "tests" / "README.md").read_text(), re.MULTILINE)
    listed = {path for name in named for path in (ROOT / "tests").glob(name)}
    assert listed >= {*(ROOT / "tests").glob("*.*")} - {ROOT / "tests" / "README.md"}
    assert all(any((ROOT / "tests").glob(name)) for name in named)


BENCHMARKS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("*/*.py"))]


@pytest.mark.parametrize("script", BENCHMARKS)
def test_readme_and_the_tables_name_the_benchmarks(script):
    assert f"python {script}" in README
    assert f"python {script}" in (ROOT / "tests" / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("script", [*SCRIPTS, "tests/make_mini_dataset.py", *BENCHMARKS])
def test_docstrings_are_not_needed(script):
    """`python -OO` removes them."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names
    assert "__doc__" not in names
