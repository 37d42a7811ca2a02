"""What goes wrong in the night: kills, full disks, damaged files, dead workers, clocks, twins.

Signals within a run and memory that runs out are in test_runs.py, bad steps in test_loop.py, lost
processes in test_processes.py.
"""

import builtins
import contextlib
import errno
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_data import save_folder
from test_processes import start, statuses
from test_runs import (  # noqa: F401
    ROOT,
    SMALL,
    TINY,
    WINDOWS,
    attempt,
    before_call,
    in_folder,
    outcome,
    own_folder,
    run,
    run_stopped,
    same,
    same_outcome,
)

import data
import train
import utils

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the started processes have: another number of threads gives other roundings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory):
    """What the run comes to that nothing disturbs."""
    return in_folder(tmp_path_factory.mktemp("whole"), lambda patch: run())


def forked(act):
    """The exit status of a child that calls act(), as os.waitstatus_to_exitcode has it."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ------------------------------------------------------------------------------------------ writing


class Failing:
    """A file with room for `budget` bytes; the write beyond them calls `act` halfway."""

    def __init__(self, file, budget, act):
        self.file, self.budget, self.act = file, budget, act

    def write(self, content):
        if len(content) > self.budget:
            self.file.write(content[: self.budget])
            self.file.flush()
            self.act()
        self.budget -= len(content)
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def limit_files(patch, module, budget, act):
    """Each file that `module` opens for writing has room for `budget` bytes."""

    def opened(path, mode="r", *rest, **options):
        file = builtins.open(path, mode, *rest, **options)
        return Failing(file, budget, act) if "w" in mode else file

    patch.setattr(module, "open", opened, raising=False)


def at_point(patch, n, act):
    """act() happens before the n-th call that opens, flushes, renames or closes a file."""
    seen = []

    def counted(call):
        def instead(*arguments, **options):
            seen.append(call)
            if len(seen) == n:
                act()
            return call(*arguments, **options)

        return instead

    for name in ("fsync", "replace", "open", "close"):
        patch.setattr(os, name, counted(getattr(os, name)))
    patch.setattr(utils, "open", counted(builtins.open), raising=False)


def checkpoint(step):
    return {"model": {"w": torch.full((200,), float(step))}, "step": step}


def save_twice(folder):
    for step in (1, 2):
        utils.save_checkpoint(folder / "last.pt", checkpoint(step))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@posix
@pytest.mark.parametrize("part", ["calls", "bytes"])
def test_a_kill_at_any_point_of_a_write_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path, monkeypatch, part
):
    """Of a third write: at each call that touches the disk, and after some numbers of bytes."""
    killed = done = 0
    save_twice(tmp_path)
    for n in range(1, 200) if part == "calls" else range(0, 4000, 197):
        folder = tmp_path / str(n)
        folder.mkdir()
        for name in ("last.pt", "previous.pt"):
            shutil.copy(tmp_path / name, folder)

        def third():
            if part == "calls":
                at_point(monkeypatch, n, lambda: os._exit(9))
            else:
                limit_files(monkeypatch, utils, n, lambda: os._exit(9))
            utils.save_checkpoint(folder / "last.pt", checkpoint(3))

        status = forked(third)
        utils.lock(folder).close()
        # what is partial was swept
        assert {path.name for path in folder.iterdir()} <= {"lock", "last.pt", "previous.pt"}, n
        found = utils.load_newest(folder, log=pytest.fail)
        assert found["step"] in (2, 3) and (found["model"]["w"] == found["step"]).all(), n
        killed, done = killed + (status == 9), done + (status == 0)
        if status == 0:
            assert found["step"] == 3
            if part == "calls":
                break
    assert killed >= 7 and done


@pytest.mark.parametrize("room", [0, 1, 500, 1500, "fsync", "replace"])
def test_a_disk_that_is_full_at_any_byte_keeps_the_old_files_and_no_temporary(
    tmp_path, monkeypatch, room
):
    save_twice(tmp_path)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        if isinstance(room, str):
            patch.setattr(os, room, full)
        else:
            limit_files(patch, utils, room, full)
        with pytest.raises(OSError, match="No space") as error:
            utils.save_checkpoint(tmp_path / "last.pt", checkpoint(3))
    assert before == contents(tmp_path) and error.value.filename == str(tmp_path / "last.pt")


FILES = "last.pt config.json last.pt last.pt best.pt metrics.csv last.pt last.pt".split()


@pytest.mark.parametrize("n, step", [(1, None), (2, None), (3, 0), (5, 2), (6, 2), (8, 2)])
def test_a_disk_that_fills_up_in_a_run_ends_it_in_one_line_and_the_run_goes_on(
    monkeypatch, capsys, whole, n, step
):
    """From the n-th file of a run on; `--resume --run_name` goes on with it or begins it."""
    inner, writes = utils.write_atomic, []

    def write(path, *rest):
        writes.append(Path(path).name)
        if len(writes) >= n:
            patch.setattr(os, "fsync", full)  # which names no path
        inner(path, *rest)

    flags = f"{TINY} --save_every 1 --resume --run_name cut"
    with monkeypatch.context() as patch:
        patch.setattr(utils, "write_atomic", write)
        status, text = attempt(flags), "".join(capsys.readouterr())
    lines = [line for line in text.splitlines() if line.startswith("error")]
    assert writes == FILES[:n] and len(lines) == 1
    assert f"runs/cut/{FILES[n - 1]}: No space left on device" in lines[0]
    assert status == (2 if step is None else 1)  # 2: before training
    assert step is None or "go on from the last good checkpoint with" in lines[0]
    saved = Path("runs/cut/last.pt")
    assert step is None or utils.load_checkpoint(saved)["step"] == step
    assert not list(Path("runs/cut").glob(".*.partial"))
    assert attempt(flags) == 0 and same_outcome(whole, outcome("cut"))


def test_a_log_or_a_terminal_that_cannot_be_written_to_does_not_end_a_run(monkeypatch, whole):
    def opened(path, mode="r", *rest, **options):
        if str(path).endswith("log.txt") and Path("runs/cut/metrics.csv").exists():
            full()
        return builtins.open(path, mode, *rest, **options)

    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        flush = fileno = lambda self: self.write("")

    with monkeypatch.context() as patch:
        patch.setattr(utils, "open", opened, raising=False)
        patch.setattr(sys, "stdout", Gone())
        assert attempt(f"{TINY} --run_name cut") == 0
    assert same_outcome(whole, outcome("cut"))
    assert "2 steps an epoch" in outcome("cut")[2] and "epoch 1/2" not in outcome("cut")[2]


def close_terminal(flags):
    """`attempt` in a terminal of its own, which is closed within the second step."""
    import fcntl
    import termios

    master, slave = os.openpty()
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for number in (1, 2):
        os.dup2(slave, number)
    patch = pytest.MonkeyPatch()
    with before_call(patch, train, "train_step", 2, lambda: os.close(master)):
        os._exit(attempt(flags))  # nothing is left to flush to


@posix
def test_a_terminal_that_is_closed_saves_the_run_and_it_goes_on(whole):
    """The system sends SIGHUP, and each write to the terminal is an error from then on."""
    closed = start(close_terminal, f"{TINY} --run_name cut", count=1)
    assert statuses(closed) == [128 + signal.SIGHUP]
    assert "stopped at step 2; go on with" in Path("runs/cut/log.txt").read_text()
    assert attempt("--resume cut") == 0 and same_outcome(whole, outcome("cut"))


@posix
def test_what_is_written_is_on_the_disk_before_it_takes_its_place_and_so_is_the_place(
    tmp_path, monkeypatch
):
    seen = []

    def noted(name, call):
        return lambda *arguments: (seen.append(name), call(*arguments))

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    save_twice(tmp_path)
    assert seen == ["fsync", "replace", "fsync", "fsync", "replace", "replace", "fsync"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
              OSError(errno.EIO, "Input/output error")],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_set_aside(tmp_path, monkeypatch, error):
    save_twice(tmp_path)
    load, before = torch.load, contents(tmp_path)

    def fails(path, **options):
        if path.name == "last.pt":
            raise error
        return load(path, **options)

    monkeypatch.setattr(torch, "load", fails)
    if isinstance(error, OSError):
        assert utils.load_newest(tmp_path)["step"] == 1  # the other one may be readable
        (tmp_path / "previous.pt").unlink()
        del before["previous.pt"]
        # a run must not begin again over it
        with pytest.raises(ValueError, match="damaged or cannot be read"):
            utils.load_newest(tmp_path)
    else:
        with pytest.raises(type(error)):
            utils.load_newest(tmp_path)
    assert contents(tmp_path) == before


def test_a_place_that_cannot_be_written_to_ends_before_training(monkeypatch, capsys):
    Path("runs").write_text("")
    monkeypatch.setattr(train, "train_step", None)
    assert attempt(f"{TINY} --run_name run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: runs/run: Not a directory") and error.count("\n") == 1


@pytest.mark.parametrize("part", ["model", "ema", "swa", "optimizer"])
def test_nothing_that_is_not_finite_is_ever_written(tmp_path, part):
    poisoned = {"model": {}, part: {"a": [{"w": torch.tensor([1.0, float("inf")])}]}}
    with pytest.raises(ValueError, match=f"{part} a 0 w is not finite"):
        utils.save_checkpoint(tmp_path / "a.pt", poisoned)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("flips, cuts", [(60, 20), pytest.param(1000, 200, marks=pytest.mark.slow)])
def test_no_flipped_bit_and_no_truncation_is_loaded_as_something_else(tmp_path, flips, cuts):
    """A flip in the archive's own dates or paddings does no harm: all is loaded as it was saved."""
    flags = f"{TINY} --ema_decay 0.9 --model_args widths=8,8,8,8"
    args, given = train.parse_flags(flags.split())
    train.check_flags(args, given)
    path = tmp_path / "a.pt"
    utils.save_checkpoint(path, train.prepare(args)[0].to_checkpoint())
    whole, saved, draw = path.read_bytes(), utils.load_checkpoint(path), random.Random(flips)
    found = {"refused": 0, "equal": 0, "other": 0}
    for i in range(flips + cuts):
        content = bytearray(whole)
        if i < flips:
            content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            content = content[: draw.randrange(len(whole))]
        path.write_bytes(content)
        try:
            found["equal" if same(utils.load_checkpoint(path), saved) else "other"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path))
            found["refused"] += 1
    print(f"{flips:,} flipped bits, {cuts:,} truncations: {found}")
    assert found["other"] == 0 and found["refused"] >= cuts


def test_when_both_checkpoints_are_damaged_nothing_is_begun_in_silence(monkeypatch, capsys):
    run_stopped(monkeypatch, 2, "--save_every 1", "cut")
    for name in ("last.pt", "previous.pt"):
        path = Path("runs/cut") / name
        path.write_bytes(path.read_bytes()[:-300])
    for aside in (2, 0):  # the second time they stand aside already
        capsys.readouterr()
        assert attempt(f"{TINY} --save_every 1 --resume --run_name cut") == 2
        text = capsys.readouterr()
        assert "its checkpoints are damaged or cannot be read" in text.err
        assert text.err.count("\n") == 1 and text.out.count("set aside as") == aside
    left = {path.name for path in Path("runs/cut").iterdir()}
    assert {"last.damaged", "previous.damaged"} <= left and "last.pt" not in left


def test_what_stands_in_the_way_of_a_run_is_named(monkeypatch, capsys):
    run_stopped(monkeypatch, 2, "--save_every 1", "cut")
    for name in ("last.damaged", "metrics.csv"):
        Path("runs/cut", name).mkdir()
    Path("runs/cut/last.pt").write_text("")
    capsys.readouterr()
    assert attempt("--resume cut") == 1
    text = capsys.readouterr().out
    assert "set aside as last.damaged1" in text
    assert "error: runs/cut/metrics.csv: Is a directory" in text


def test_a_checkpoint_of_another_program_is_set_aside(monkeypatch, capsys, whole):
    run_stopped(monkeypatch, 2, "--save_every 1", "cut")
    torch.save({"model": {}, "step": 99}, "runs/cut/last.pt")
    assert attempt("--resume cut") == 0 and same_outcome(whole, outcome("cut"))
    assert "no checkpoint of this kit; set aside as last.damaged" in capsys.readouterr().out


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_says(
    tmp_path, monkeypatch, whole
):
    for name, step in (("last.pt", 5), ("previous.pt", 7)):
        torch.save({"format_version": 1, **checkpoint(step)}, tmp_path / name)
        os.utime(tmp_path / name, (10**9 - step, 10**9 - step))
    assert utils.load_newest(tmp_path)["step"] == 7
    jumps = iter(range(10**10, 0, -(10**6)))  # eleven days back, again and again
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    found = run()
    assert same_outcome(whole, found)
    for row in found[1]:
        assert float(row["seconds"]) > 0 and float(row["samples_per_second"]) > 0


def test_the_best_of_an_epoch_lost_in_a_crash_is_written_again_bitwise(monkeypatch):
    """Killed between best.pt and last.pt, in each epoch."""

    def killed():
        raise SystemExit(9)

    run("", "whole")
    best = utils.load_checkpoint("runs/whole/best.pt")
    for epoch in (1, 2):
        with before_call(monkeypatch, utils, "write_csv", epoch, killed):
            assert attempt(f"{TINY} --run_name cut{epoch}") == 9
        assert attempt(f"--resume cut{epoch}") == 0
        found = utils.load_checkpoint(f"runs/cut{epoch}/best.pt")
        assert found["epoch"] == best["epoch"] and same(found["model"], best["model"])


# ------------------------------------------------------------------------------------------ signals


@posix
@pytest.mark.parametrize("ignored, status", [(False, -signal.SIGINT), (True, 7)])
def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(ignored, status):
    """But not in the background of a shell. Another numpy, imported first, stands for torch."""
    lines = "import os, signal", "signal.raise_signal(signal.SIGINT)", "os._exit(7)"
    Path("numpy.py").write_text("\n".join(lines))
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # `terminal` of own_folder sets it back
    done = subprocess.run([sys.executable, ROOT / "train.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.getcwd()})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@posix
def test_a_signal_while_pictures_are_decoded_leaves_no_partial_cache(monkeypatch):
    save_folder(Path("photos"), ("train",), count=9)
    terminate = lambda: signal.raise_signal(signal.SIGTERM)
    with before_call(monkeypatch, data.np.lib.format, "write_array_header_1_0", 1, terminate):
        assert attempt(f"{TINY} --data photos --batch_size 4 --run_name run") == 143
    assert not Path("runs").exists() and not Path(".cache").exists()


def test_a_full_disk_while_pictures_are_decoded_is_one_line(monkeypatch, capsys):
    save_folder(Path("photos"), ("train",), count=9)
    limit_files(monkeypatch, data, 200, full)
    assert attempt(f"{TINY} --data photos --batch_size 4 --run_name run") == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists() and not Path(".cache").exists()


@posix
def test_a_signal_that_was_ignored_stays_ignored():
    """As nohup leaves SIGHUP, and a shell the Ctrl-C of its background jobs."""
    numbers = (signal.SIGHUP, signal.SIGINT)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    with utils.catch_signals() as received:
        for number in numbers:
            signal.raise_signal(number)
            assert signal.getsignal(number) is signal.SIG_IGN
        assert received == []


@posix
def test_a_second_signal_quits_at_once():
    def twice():
        with utils.catch_signals() as received:
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)

    assert forked(twice) == 143


# ------------------------------------------------------------------------------------------ workers


class Fragile(data.Gather):
    """Dies or hangs at a sample."""

    fault = None

    def __getitem__(self, index):
        if self.fault and 7 in index:
            os.kill(os.getpid(), signal.SIGKILL) if self.fault == "dies" else time.sleep(1000)
        return super().__getitem__(index)


def attempt_with(fault, flags):
    multiprocessing.set_start_method("fork", force=True)  # so that workers have what is set here
    data.Gather, Fragile.fault = Fragile, fault
    return attempt(flags)


@posix
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_loader_worker_that_dies_or_hangs_ends_the_run_in_one_line_and_it_goes_on(whole, fault):
    flags = f"{TINY} --save_every 1 --run_name cut --workers 1 --timeout 2"
    assert statuses(start(attempt_with, fault, flags, count=1)) == [1]
    lines = [x for x in Path("out0.txt").read_text().splitlines() if x.startswith("error")]
    assert len(lines) == 1 and "DataLoader" in lines[0]
    assert "try --workers 0, or a longer --timeout" in lines[0]
    assert Path("err0.txt").read_text() == ""
    assert attempt("--resume cut --workers 0") == 0 and same_outcome(whole, outcome("cut"))


# -------------------------------------------------------------------------- a run that is not alone


@posix
@pytest.mark.parametrize("pairs", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_runs_of_one_name_the_second_ends_with_status_2(whole, pairs):
    """Each a process of its own, started together; also where each would begin or go on."""
    for i in range(pairs):
        flags = f"{TINY} --run_name twin{i}{' --resume' * (i % 2)}"
        twins = [start(attempt, flags, count=1, WORLD_SIZE="1")[0] for _ in range(2)]
        assert sorted(statuses(twins)) == [0, 2], i
        assert same_outcome(whole, outcome(f"twin{i}")), i


@posix
def test_a_run_that_goes_on_elsewhere_is_locked_and_the_lock_of_a_dead_process_is_none(
    monkeypatch, capsys, whole
):
    run_stopped(monkeypatch, 1, "", "cut")
    before = contents(Path("runs/cut"))
    Path("runs/cut/lock").write_text(f"pid {os.getpid()} on somewhere\n")  # which nobody holds
    Path("runs/cut/.last.pt.123.partial").write_text("half")
    pid = os.fork()
    if pid == 0:
        held = utils.lock("runs/cut")
        Path("held").touch()
        time.sleep(60)
        held.close()
        os._exit(0)
    while not Path("held").exists():
        time.sleep(0.01)
    for flags in ("--resume cut", f"{TINY} --resume --run_name cut"):
        assert attempt(flags) == 2
        assert f"runs/cut: in use by pid {pid} on " in capsys.readouterr().err
    assert {**contents(Path("runs/cut")), "lock": before["lock"]} == before
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert attempt("--resume cut") == 0 and same_outcome(whole, outcome("cut"))


@pytest.mark.parametrize(
    "owner, name, begun",
    [(utils, "lock", False), (train, "save", False),
     (utils, "write_json", True), (train, "fit", True)],
)  # fmt: skip
def test_a_run_that_was_killed_before_its_first_step_begins_again_or_goes_on(
    monkeypatch, owner, name, begun
):
    flags = f"{TINY} --run_name cut"

    def killed():
        raise SystemExit(9)

    with monkeypatch.context() as patch, before_call(patch, owner, name, 1, killed):
        assert attempt(flags) == 9
    assert Path("runs/cut").is_dir()
    shutil.copytree("runs/cut", "runs/copy")
    again = "--resume cut" if begun else flags
    assert attempt(again) == 0
    assert attempt(flags.replace("cut", "copy") + " --resume") == 0
    assert same_outcome(outcome("cut"), outcome("copy")) and outcome("cut")[0]["step"] == 4


# ------------------------------------------------------------------------------ kills at any moment


PHASES = {
    "writing": (utils, "write_atomic"), "SWA's statistics": (train, "update_bn"),
    "decoding": (data, "decode_cached"), "validation": (train, "sum_totals"),
    "a step": (train, "train_step"), "between steps": (train.models, "set_rates"),
    "starting": (utils, "set_up_device"),
}  # fmt: skip


def attempt_until(phase, n, delay, flags):
    """As `attempt`, but killed `delay` seconds after its n-th entry of a phase."""
    kill = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
    with before_call(pytest.MonkeyPatch(), *PHASES[phase], n, kill.start):
        return attempt(flags)


@posix
@pytest.mark.parametrize(
    "kills, epochs, size", [(2, 2, 30), pytest.param(42, 6, 800, marks=pytest.mark.slow)]
)
def test_runs_killed_at_random_moments_go_on_bitwise(kills, epochs, size):
    """They decode, train, save each step, average weights and validate.

    The same command line then begins a killed run again or goes on with it.
    """
    source = ""
    if importlib.util.find_spec("PIL"):
        save_folder(Path("photos"), ("train", "val"), count=9, size=(size, size))
        source = "--data photos --batch_size 4"
    flags = (f"{SMALL} {WINDOWS} {source} --quiet --save_every 1 --epochs {epochs} --ema_decay 0.9 "
             "--swa_start_epoch 1 --resume --run_name")  # fmt: skip
    entries, draw, killed = dict.fromkeys(PHASES, 0), random.Random(kills), {}
    with contextlib.ExitStack() as counting:
        for phase, (owner, name) in PHASES.items():
            inner = getattr(owner, name)

            def counted(*arguments, phase=phase, inner=inner, **options):
                entries[phase] += 1
                return inner(*arguments, **options)

            counting.enter_context(mock.patch.object(owner, name, counted))
        assert attempt(f"{flags} whole") == 0
    whole, phases = outcome("whole"), [phase for phase in PHASES if entries[phase]]
    assert len(phases) >= len(PHASES) - (not source)
    for i in range(kills):
        shutil.rmtree(".cache", ignore_errors=True)  # so that pictures are decoded again
        phase = phases[i % len(phases)]
        n, delay = draw.randint(1, entries[phase]), draw.uniform(0, 0.03)
        status = statuses(start(attempt_until, phase, n, delay, f"{flags} run{i}", count=1))
        killed[phase] = killed.get(phase, 0) + (status == [-signal.SIGKILL])
        if status != [0]:  # it may end first
            assert status == [-signal.SIGKILL], Path("err0.txt").read_text()[-2000:]
            again = statuses(start(attempt, f"{flags} run{i}", count=1))
            assert again == [0], (i, phase, n, Path("err0.txt").read_text()[-2000:])
        assert same_outcome(whole, outcome(f"run{i}")), (i, phase, n, delay)
        assert not list(Path("runs", f"run{i}").glob(".*"))
        shutil.rmtree(Path("runs", f"run{i}"))
    print(f"{entries} entries of the phases, {killed} kills")
    assert sum(killed.values()) >= kills / 2
