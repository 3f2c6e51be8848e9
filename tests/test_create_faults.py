"""create_dataset.py, faults of whole runs: killed, interrupted, no space, no permission, rivals."""

import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import conftest
import pytest
from conftest import LIMIT_S, contents, finish, start, state_of, wait_for, write_jobs

import create_dataset

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

JOBS, SIZE = 40, 256  # jobs, and pixels a side: a run of some tenths of a second
TENSOR_BYTES = 128 + 16 * SIZE * SIZE
KILLS = 4
GOES_ON = "ERROR: interrupted: finished tensors are kept; run the same command again to go on\n"
MOUNT = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'  # read-only, as in some containers
PRIVATE = ("unshare", "--mount", "sh", "-c", MOUNT, "sh")


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and the time of change of each tensor under its final name."""
    stats = {path.name: path.stat() for path in (out / "images").glob("*.npy")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def unfinished(out: Path) -> list[Path]:
    return list(out.rglob(f"{create_dataset.TEMPORARY}*"))


def members(group: int) -> dict[int, str]:
    """Return the living processes of a group and their states, the letters of proc(5)."""
    found = {}
    for number in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()):
        with suppress(OSError):  # ended since
            state, of_group = state_of(Path(f"/proc/{number}/stat"))
            if int(of_group) == group and state not in "ZX":
                found[number] = state
    return found


def freeze(process: subprocess.Popen, out: Path, least: int = 3) -> None:
    """Stop a run where it has some tensors finished and another half written."""

    def is_frozen() -> bool:
        assert process.poll() is None, "the run ended before it could be stopped"
        os.killpg(process.pid, signal.SIGSTOP)
        wait_for(lambda: set(members(process.pid).values()) == {"T"})
        if len(finished(out)) >= least and unfinished(out / "images"):
            return True
        os.killpg(process.pid, signal.SIGCONT)
        return False

    wait_for(is_frozen)


def wait_until_idle(process: subprocess.Popen, switches: int = -1) -> int:
    """Wait until all threads of a process sleep, the first one again; return how often it did."""
    task = Path(f"/proc/{process.pid}/task")

    def sleeps() -> int:
        status = (task / str(process.pid) / "status").read_text()
        return int(re.search(r"^voluntary_ctxt_switches:\t(\d+)", status, re.MULTILINE)[1])

    wait_for(
        lambda: sleeps() > switches and {state_of(path)[0] for path in task.glob("*/stat")} == {"S"}
    )
    return sleeps()


def press_ctrl_c(process: subprocess.Popen) -> int:
    """Interrupt a frozen run, whose workers stay frozen; return what `wait_until_idle` needs."""
    process.send_signal(signal.SIGCONT)
    # A thread that still stands would take the signal from the main thread, which alone heeds it.
    switches = wait_until_idle(process)
    os.killpg(process.pid, signal.SIGINT)
    return switches


def writer(group: int) -> int:
    """Return the process of a group that has an unfinished tensor open."""
    for number in members(group):
        links = Path(f"/proc/{number}/fd").iterdir()
        if any(f"images/{create_dataset.TEMPORARY}" in str(link.readlink()) for link in links):
            return number
    raise AssertionError("no process has an unfinished tensor open")


def create(raw: Path, out: Path, *options: str, **settings: object) -> subprocess.Popen:
    """Start a run as a real process."""
    return start(create_dataset.__file__, "-i", raw, "-o", out, *options, **settings)


def run_as(prefix: tuple[str, ...], *arguments: Path | str) -> tuple[int, str]:
    """Make a whole run as a real process, under another command; return exit code and stderr."""
    code, _, error = finish(create(*arguments, prefix=prefix))
    return code, error


def run(raw: Path, out: Path, *options: str) -> tuple[int, str]:
    """Make a whole run in this process and return its exit code and its stderr."""
    with redirect_stderr(StringIO()) as error, redirect_stdout(StringIO()):
        code = conftest.run(create_dataset, "-i", raw, "-o", out, *options)
    return code, error.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Return a folder of jobs that takes a run some tenths of a second."""
    return write_jobs(tmp_path_factory.mktemp("faults") / "raw", JOBS, SIZE)


@pytest.fixture(scope="module")
def undisturbed(raw) -> dict[str, bytes]:
    """Return the files of the dataset that an undisturbed run makes."""
    assert run(raw, raw.with_name("undisturbed")) == (0, "")
    return contents(raw.with_name("undisturbed"))


@pytest.fixture
def held(raw, tmp_path) -> Path:
    """Return the same jobs, where a run stops at the last and waits for ever for its catalog."""
    shutil.copytree(raw, tmp_path / "held", copy_function=os.link)
    catalog = tmp_path / "held" / f"jid{JOBS:03d}" / "psfcat.csv"
    catalog.unlink()
    os.mkfifo(catalog)
    return tmp_path / "held"


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a small file system, or mounts it again with new options."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True, timeout=LIMIT_S)


def test_a_run_that_was_killed_again_and_again_is_continued(raw, held, undisturbed, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    for number, target in enumerate(sorted(rng.sample(range(JOBS - 10), KILLS))):
        process = create(held, out, "--workers", "2")
        if number % 2:
            freeze(process, out, target)
        else:
            wait_for(lambda: process.poll() is not None or len(finished(out)) >= target)  # noqa: B023
            assert process.poll() is None, process.stderr.read()
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(LIMIT_S) == -signal.SIGKILL
        wait_for(lambda: not members(process.pid))  # noqa: B023
    kept = finished(out)
    assert kept
    assert unfinished(out)
    assert run(raw, out) == (0, "")
    assert contents(out) == undisturbed
    assert kept.items() <= finished(out).items()


def test_workers_end_by_themselves_where_their_parent_was_killed(raw, undisturbed, tmp_path):
    process = create(raw, tmp_path / "out", "--workers", "2")
    freeze(process, tmp_path / "out")
    workers = members(process.pid).keys() - {process.pid}
    assert len(workers) == 2
    process.kill()
    assert process.wait(LIMIT_S) == -signal.SIGKILL
    os.killpg(process.pid, signal.SIGCONT)
    wait_for(lambda: not members(process.pid), limit_s=10)
    assert len(finished(tmp_path / "out")) < JOBS
    assert process.stderr.read() == ""
    assert run(raw, tmp_path / "out") == (0, "")
    assert contents(tmp_path / "out") == undisturbed


def test_ctrl_c_in_the_middle_of_a_run(raw, undisturbed, tmp_path):
    process = create(raw, tmp_path / "out", "--workers", "2")
    freeze(process, tmp_path / "out")
    press_ctrl_c(process)
    os.killpg(process.pid, signal.SIGCONT)
    assert finish(process) == (130, "", GOES_ON)
    kept = finished(tmp_path / "out")
    assert 0 < len(kept) < JOBS
    assert contents(tmp_path / "out").items() <= undisturbed.items()  # whole tensors alone
    assert run(raw, tmp_path / "out") == (0, "")
    assert contents(tmp_path / "out") == undisturbed
    assert kept.items() <= finished(tmp_path / "out").items()


def test_ctrl_c_twice(raw, tmp_path):
    process = create(raw, tmp_path / "out", "--workers", "2")
    freeze(process, tmp_path / "out")
    wait_until_idle(process, press_ctrl_c(process))  # it waits for its workers
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    assert finish(process) == (130, "", GOES_ON)
    assert unfinished(tmp_path / "out") == []
    assert run(raw, tmp_path / "out") == (0, "")


def test_ctrl_c_without_a_pool(raw, undisturbed, tmp_path):
    process = create(raw, tmp_path / "out", "--workers", "1")
    freeze(process, tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    assert finish(process) == (130, "", GOES_ON)
    assert unfinished(tmp_path / "out") == []
    assert contents(tmp_path / "out").items() <= undisturbed.items()


def test_a_ctrl_c_that_was_ignored_from_the_start_stays_ignored(raw, undisturbed, tmp_path):
    """As it is after `nohup python create_dataset.py &` in a script."""
    process = create(raw, tmp_path / "out", "--workers", "2", sigint=signal.SIG_IGN)
    freeze(process, tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    code, _, error = finish(process)
    assert (code, error) == (0, "")
    assert contents(tmp_path / "out") == undisturbed


def private_shm() -> tuple[str, ...]:
    """Return what makes /dev/shm read-only for one command, as it is in some containers."""
    done = subprocess.run([*PRIVATE, "true"], capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    return PRIVATE


def test_one_worker_needs_no_shared_memory(raw, undisturbed, tmp_path):
    assert run_as(private_shm(), raw, tmp_path / "out", "--workers", "1") == (0, "")
    assert contents(tmp_path / "out") == undisturbed


def test_workers_that_cannot_be_started(raw, tmp_path):
    code, error = run_as(private_shm(), raw, tmp_path / "out", "--workers", "2")
    assert code == 1
    assert re.fullmatch("ERROR: the workers failed at .*; try --workers 1; .*\n", error)
    assert contents(tmp_path / "out") == {}


def test_a_worker_that_dies_ends_the_run(raw, undisturbed, tmp_path):
    process = create(raw, tmp_path / "out", "--workers", "2")
    freeze(process, tmp_path / "out")
    kept = finished(tmp_path / "out")
    os.kill(writer(process.pid), signal.SIGKILL)
    os.killpg(process.pid, signal.SIGCONT)
    code, _, error = finish(process)
    assert code == 1
    assert re.match(r"ERROR: the workers failed at jid\d+ or a later job \(A process ", error)
    assert kept.items() <= finished(tmp_path / "out").items()
    assert contents(tmp_path / "out").items() <= undisturbed.items()
    assert run(raw, tmp_path / "out") == (0, "")
    assert contents(tmp_path / "out") == undisturbed


def test_a_full_disk(raw, undisturbed, mount):
    space = 8 << 20
    out = mount(f"size={space}") / "out"
    code, error = run(raw, out)
    assert code == 1
    message = re.fullmatch(
        rf"ERROR: {out}/images/jid\d+.npy: cannot be written: No space left on device\n", error
    )
    assert message
    assert finished(out)
    assert contents(out).items() <= undisturbed.items()
    mount(f"remount,size={2 * JOBS * TENSOR_BYTES}")
    assert run(raw, out) == (0, "")
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (False, "[Errno 30] Read-only file system: '{}'"),
        (True, "{}/master_index.csv: cannot be written: Read-only file system"),
    ],
)
def test_a_file_system_that_is_mounted_read_only(raw, mount, made, message):
    out = mount("size=1m") / "out"
    if made:
        (out / "images").mkdir(parents=True)
    mount("remount,ro")
    code, error = run(raw, out)
    assert code == 1
    assert error == f"ERROR: {message.format(out)}\n"
    assert out.exists() == made
    assert contents(out) == {}


def test_a_folder_without_write_permission(raw, tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True, mode=0o555)
    prefix = ()
    if os.geteuid() == 0:  # root writes everywhere, unless it gives that up
        prefix = ("setpriv", "--bounding-set", "-dac_override")
        if not shutil.which("setpriv"):
            pytest.skip("no setpriv, which takes root's right to write everywhere")
    code, error = run_as(prefix, raw, tmp_path / "out")
    assert code == 1
    message = r"ERROR: {}/images/jid\d+.npy: cannot be written: Permission denied\n"
    assert re.search(message.format(tmp_path / "out"), error)
    assert contents(tmp_path / "out") == {}


def test_a_second_run_into_the_same_output_is_refused(raw, undisturbed, tmp_path):
    process = create(raw, tmp_path / "out", "--workers", "2")
    freeze(process, tmp_path / "out")
    before = contents(tmp_path / "out")
    message = f"ERROR: {tmp_path}/out: another run is writing there\n"
    assert run(raw, tmp_path / "out") == (1, message)
    assert contents(tmp_path / "out") == before
    os.killpg(process.pid, signal.SIGCONT)
    code, _, error = finish(process)
    assert (code, error) == (0, "")
    assert contents(tmp_path / "out") == undisturbed


def test_a_line_of_progress_every_hundred_jobs(raw, tmp_path, monkeypatch):
    assert create_dataset.PROGRESS_JOBS == 100
    monkeypatch.setattr(create_dataset, "PROGRESS_JOBS", JOBS // 2)
    code, error = run(raw, tmp_path / "out")
    assert code == 0
    assert error == "INFO: 20 of 40 jobs\nINFO: 40 of 40 jobs\n"


def test_a_bar_of_progress_on_a_terminal(raw, tmp_path):
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    process = create(raw, tmp_path / "out", stderr=stderr)
    os.close(stderr)
    text, end = b"", time.monotonic() + LIMIT_S
    with process:
        with suppress(OSError):  # EIO: all that had the terminal open have ended
            while select.select([terminal], [], [], end - time.monotonic())[0]:
                text += os.read(terminal, 1 << 16)
        os.close(terminal)
        process.kill()
    assert process.returncode == 0
    assert re.search(rb"100%\S* 40/40 \[.*, *[\d.]+job/s\]", text)
    assert b"Traceback" not in text


@pytest.mark.parametrize("workers", ["1", "2", "3"])
def test_bytes_do_not_depend_on_the_number_of_workers(raw, undisturbed, tmp_path, workers):
    assert run(raw, tmp_path / "out", "--workers", workers) == (0, "")
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_bytes_are_the_same_from_workers_that_start_afresh(raw, undisturbed, tmp_path, method):
    source = (
        f"import multiprocessing, sys; multiprocessing.set_start_method({method!r});"
        " import create_dataset; sys.exit(create_dataset.main(sys.argv[1:]))"
    )
    options = "-i", raw, "-o", tmp_path / "out", "--workers", "2"
    process = start("-c", source, *options, cwd=Path(create_dataset.__file__).parent)
    code, _, error = finish(process)
    assert (code, error) == (0, "")
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "0"), "--workers: expected 1 or more, got 0"),
        (
            ("--workers", "3", "--scheduler", "127.0.0.1:1"),
            "argument --scheduler: not allowed with argument --workers",
        ),
    ],
)
def test_wrong_usage(raw, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        conftest.run(create_dataset, "-i", raw, "-o", tmp_path / "out", *options)
    assert capsys.readouterr().err.endswith(f": error: {message}\n")
    assert not (tmp_path / "out").exists()
