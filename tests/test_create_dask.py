"""create_dataset.py on a Dask cluster: a scheduler and worker processes on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import (
    contents,
    finish,
    run,
    start,
    state_of,
    wait_for,
    write_jobs,
    write_labelled_jobs,
)

import create_dataset

pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

JOBS, SIZE = 40, 256  # jobs, and pixels a side
HOST = "127.0.0.1"  # nothing here is to be seen from outside


def create(raw: Path, out: Path, *options: str, **settings: object) -> subprocess.Popen:
    """Start a run as a real process, whose functions a cluster gets by value."""
    return start(create_dataset.__file__, "-i", raw, "-o", out, *options, **settings)


class Cluster:
    """A Dask scheduler and its workers, processes that end with `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []
        self.contact, self.address = folder / "scheduler.json", ""
        self.launch("scheduler", "--port", "0", "--idle-timeout", "300s")

    def launch(self, role: str, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.dask_{role}", "--host", HOST]
        command += ["--no-dashboard", "--scheduler-file", self.contact, *options]
        with (self.folder / f"{role}{len(self.processes)}.log").open("w") as log:
            # In a folder of its own, since a cluster shares no working folder with a run.
            process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def add_worker(self) -> subprocess.Popen:
        wait_for(self.is_up)  # a worker would not wait for it
        scratch = str(self.folder / "scratch")
        return self.launch(
            "worker", "--no-nanny", "--nthreads", "1", "--local-directory", scratch,
            "--death-timeout", "60s",
        )  # fmt: skip

    def is_up(self) -> bool:
        with suppress(OSError, ValueError):  # not there yet, or not whole
            self.address = json.loads(self.contact.read_text())["address"]
        return bool(self.address)

    def wait_for_workers(self) -> None:
        logs = list(self.folder.glob("worker*.log"))
        wait_for(lambda: all("Registered to" in log.read_text() for log in logs))

    def close(self) -> None:
        for process in reversed(self.processes):
            with process:
                process.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Return a cluster of two workers."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.add_worker()
        cluster.add_worker()
        cluster.wait_for_workers()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Return a folder of jobs that takes a run about a second."""
    return write_jobs(tmp_path_factory.mktemp("dask") / "raw", JOBS, SIZE)


@pytest.fixture(scope="module")
def local(raw) -> dict[str, bytes]:
    """Return the files of the dataset that a run without Dask makes."""
    assert run(create_dataset, "-i", raw, "-o", raw.with_name("local")) == 0
    return contents(raw.with_name("local"))


def is_stopped(process: subprocess.Popen) -> bool:
    state, _ = state_of(Path(f"/proc/{process.pid}/stat"))
    assert state not in "ZX", "it ended"
    return state == "T"


def freeze_in_a_write(worker: subprocess.Popen) -> None:
    """Stop a worker where it has a tensor half written."""

    def is_frozen() -> bool:
        worker.send_signal(signal.SIGSTOP)
        wait_for(lambda: is_stopped(worker))
        links = [link.readlink() for link in Path(f"/proc/{worker.pid}/fd").iterdir()]
        if any(f"images/{create_dataset.TEMPORARY}" in str(link) for link in links):
            return True
        worker.send_signal(signal.SIGCONT)
        return False

    wait_for(is_frozen)


def test_bytes_are_those_of_a_run_without_dask(raw, local, cluster, tmp_path):
    out = tmp_path / "out"
    assert finish(create(raw, out, "--scheduler", cluster.address))[::2] == (0, "")
    assert contents(out) == local


def test_workers_of_another_working_folder_get_whole_paths(raw, local, cluster, tmp_path):
    relative = Path(os.path.relpath(raw, tmp_path))
    process = create(relative, Path("out"), "--scheduler", cluster.address, cwd=tmp_path)
    assert finish(process)[::2] == (0, "")
    assert contents(tmp_path / "out") == local


def test_labels_are_those_of_a_run_without_dask(cluster, tmp_path):
    options = write_labelled_jobs(tmp_path)
    assert run(create_dataset, *options, "-o", tmp_path / "local") == 0
    options += "-o", tmp_path / "out", "--scheduler", cluster.address
    assert finish(start(create_dataset.__file__, *options))[::2] == (0, "")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_worker_that_dies_is_replaced_by_the_others(raw, local, cluster, tmp_path):
    worker = cluster.add_worker()
    cluster.wait_for_workers()
    process = create(raw, tmp_path / "out", "--scheduler", cluster.address)
    freeze_in_a_write(worker)
    assert process.poll() is None
    worker.kill()
    assert finish(process)[0] == 0  # stderr may tell what Dask does about it
    assert contents(tmp_path / "out") == local


def test_a_tensor_that_a_worker_cannot_write_ends_the_run(raw, local, cluster, tmp_path):
    blocked = tmp_path / "out" / "images" / "jid020.npy"
    (blocked / "full").mkdir(parents=True)
    code, _, error = finish(create(raw, tmp_path / "out", "--scheduler", cluster.address))
    assert code == 1
    assert f"ERROR: {blocked}: cannot be written: Is a directory\n" in error
    assert contents(tmp_path / "out").items() <= local.items()  # whole tensors alone


def test_ctrl_c_in_the_middle_of_a_run(raw, local, cluster, tmp_path):
    worker = cluster.processes[1]
    process = create(raw, tmp_path / "out", "--scheduler", cluster.address)
    freeze_in_a_write(worker)
    try:
        for _ in range(3):  # once in 60 runs, Python drops it, within a destructor of Dask
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
                break
        code, _, error = finish(process)
    finally:
        worker.send_signal(signal.SIGCONT)
    assert code == 130
    assert error.endswith("run the same command again to go on\n")
    assert finish(create(raw, tmp_path / "out", "--scheduler", cluster.address))[::2] == (0, "")
    assert contents(tmp_path / "out") == local


def test_an_address_at_which_nobody_answers(raw, tmp_path):
    with socket.socket() as nobody:
        nobody.bind((HOST, 0))  # taken, so that no one else can answer there, but not listened at
        address = f"tcp://{HOST}:{nobody.getsockname()[1]}"
        impatient = "import create_dataset as c, sys; c.CONNECT_S = 1; sys.exit(c.main())"
        options = "-i", raw, "-o", tmp_path / "out", "--scheduler", address
        folder = Path(create_dataset.__file__).parent
        code, _, error = finish(start("-c", impatient, *options, cwd=folder), limit_s=10)
    assert code == 1
    assert error.startswith(f"ERROR: {address}: the Dask scheduler or its workers do not answer: ")
    assert len(error.splitlines()) == 1
    assert contents(tmp_path / "out") == {}


def test_where_dask_is_not_installed(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    options = "-i", raw, "-o", tmp_path / "out", "--scheduler", f"tcp://{HOST}:1"
    assert run(create_dataset, *options) == 1
    message = "ERROR: --scheduler needs Dask: pip install distributed\n"
    assert capsys.readouterr().err == message
    assert contents(tmp_path / "out") == {}


def test_a_scheduler_that_is_lost_ends_the_run(raw, local, tmp_path):
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster")
    try:
        worker = cluster.add_worker()
        cluster.wait_for_workers()
        process = create(raw, tmp_path / "out", "--scheduler", cluster.address)
        freeze_in_a_write(worker)
        cluster.processes[0].kill()
        code, _, error = finish(process)
    finally:
        cluster.close()
    assert code == 1
    assert "do not answer: " in error
    assert "; finished tensors are kept" in error
    assert contents(tmp_path / "out").items() <= local.items()  # whole tensors alone
