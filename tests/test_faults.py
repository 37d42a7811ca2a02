"""What goes wrong on a laptop in the night: kills, signals, full disks, damaged files, dead workers, clocks, twins."""

import builtins
import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from test_processes import start, statuses
from test_runs import TINY, outcome, own_folder, run, run_stopped, same, same_outcome  # noqa: F401

import data
import train
import utils

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


@pytest.fixture(autouse=True)
def one_fork_server_for_all(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(train.__file__).parent))


def forked(act):
    """The exit status of a child that calls act(), as os.waitstatus_to_exitcode has it."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ----------------------------------------------------------------------------------------- writing


class Failing:
    """Stands for a file whose `budget` of bytes ends: then `act` is called with what is left of the write."""

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


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


def at_point(patch, n, act):
    """Lets act() happen before the n-th of the calls by which files are opened, flushed, renamed and read back."""
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
    patch.setattr(Path, "read_bytes", counted(Path.read_bytes))
    return seen


def checkpoint(step):
    return {"model": {"w": torch.full((200,), float(step))}, "step": step}


@posix
@pytest.mark.parametrize("part", ["calls", "bytes"])
def test_a_kill_at_any_point_of_a_write_leaves_the_old_or_the_new_checkpoint_whole(tmp_path, monkeypatch, part):
    """Of three writes in a row: at each call that touches the disk, and after each of some numbers of bytes."""
    killed = done = 0
    for n in range(1, 200) if part == "calls" else range(0, 4000, 97):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "lock").touch()

        def three():
            with monkeypatch.context() as patch:
                for step in (1, 2, 3):
                    if step == 3 and part == "calls":
                        at_point(patch, n, lambda: os._exit(9))
                    elif step == 3:
                        opened = lambda *a, **k: Failing(builtins.open(*a, **k), n, lambda: os._exit(9))
                        patch.setattr(utils, "open", opened, raising=False)
                    utils.save_checkpoint(folder / "last.pt", checkpoint(step))

        status = forked(three)
        found = utils.load_newest(folder)
        assert found["step"] in (2, 3) and (found["model"]["w"] == found["step"]).all(), n
        utils.lock(folder).close()
        left = {path.name for path in folder.iterdir()}
        assert left <= {"lock", "last.pt", "previous.pt"}, n  # what is partial was swept, nothing was set aside
        killed, done = killed + (status == 9), done + (status == 0)
        if status == 0:
            assert found["step"] == 3
            if part == "calls":
                break
    assert killed >= 7 and done


@pytest.mark.parametrize("room", [0, 1, 500, 1500])
def test_a_disk_that_is_full_at_any_byte_keeps_the_old_files_and_no_temporary(tmp_path, monkeypatch, room):
    for step in (1, 2):
        utils.save_checkpoint(tmp_path / "last.pt", checkpoint(step))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    opened = lambda *a, **k: Failing(builtins.open(*a, **k), room, full)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "open", opened, raising=False)
        with pytest.raises(OSError, match="No space"):
            utils.save_checkpoint(tmp_path / "last.pt", checkpoint(3))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_disk_that_fills_up_in_a_run_ends_it_in_one_line_and_the_run_goes_on(monkeypatch, capsys):
    whole = run("--save_every 1", "whole")
    inner, writes = utils.write_atomic, []

    def write(path, *rest):
        writes.append(path)
        if len(writes) > 4:  # config.json, two steps, best.pt
            patch.setattr(os, "fsync", lambda file: full())  # which names no path
        inner(path, *rest)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "write_atomic", write)
        assert train.main(f"{TINY} --run_name cut --save_every 1".split()) == 1
    log = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error")]
    assert len(log) == 1 and "runs/cut/metrics.csv: No space left on device; make room there" in log[0]
    assert "the last good checkpoint is of step 2; go on with: python train.py --resume cut" in log[0]
    assert train.main(["--resume", "cut"]) == 0 and same_outcome(whole, outcome("cut"))


def test_a_log_or_a_terminal_that_cannot_be_written_to_does_not_end_a_run(monkeypatch):
    whole = run("", "whole")

    def opened(path, mode="r", *rest, **options):
        if str(path).endswith("log.txt") and Path("runs/cut/last.pt").exists():
            full()
        return builtins.open(path, mode, *rest, **options)

    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        flush = fileno = lambda self: self.write("")

    with monkeypatch.context() as patch:
        patch.setattr(utils, "open", opened, raising=False)
        patch.setattr(sys, "stdout", Gone())
        assert train.main(f"{TINY} --run_name cut --quiet".split()) == 0
    assert same_outcome(whole, outcome("cut"))
    assert "2 steps an epoch" in outcome("cut")[2] and "epoch 1/2" not in outcome("cut")[2]


@posix
def test_what_is_written_is_on_the_disk_before_it_takes_its_place_and_so_is_the_place(tmp_path, monkeypatch):
    seen = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: (seen.append(name), call(*a)))
    utils.save_checkpoint(tmp_path / "last.pt", checkpoint(1))
    assert seen == ["fsync", "replace", "fsync"]
    utils.save_checkpoint(tmp_path / "last.pt", checkpoint(2))
    assert seen[3:] == ["fsync", "replace", "replace", "fsync"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   OSError(errno.EIO, "Input/output error")])  # fmt: skip
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_set_aside(tmp_path, monkeypatch, error):
    for step in (1, 2):
        utils.save_checkpoint(tmp_path / "last.pt", checkpoint(step))
    load, there = torch.load, sorted(path.name for path in tmp_path.iterdir())
    fails = lambda path, **options: (_ for _ in ()).throw(error) if path.name == "last.pt" else load(path, **options)
    monkeypatch.setattr(torch, "load", fails)
    if isinstance(error, OSError):
        assert utils.load_newest(tmp_path)["step"] == 1  # the other one may be readable
        (tmp_path / "previous.pt").unlink()
        with pytest.raises(ValueError, match="damaged or cannot be read"):  # a run must not begin again over it
            utils.load_newest(tmp_path)
        there.remove("previous.pt")
    else:
        with pytest.raises(type(error)):
            utils.load_newest(tmp_path)
    assert there == sorted(path.name for path in tmp_path.iterdir())


def test_what_reads_back_otherwise_replaces_nothing(tmp_path, monkeypatch):
    utils.save_checkpoint(tmp_path / "last.pt", checkpoint(1))
    before = (tmp_path / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: b"other")
        with pytest.raises(OSError, match="reads back otherwise"):
            utils.save_checkpoint(tmp_path / "last.pt", checkpoint(2))
    assert (tmp_path / "last.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("room", [10**5, 10**12])
def test_too_little_disk_is_told_before_anything_is_written(monkeypatch, capsys, room):
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**13, 0, room))
    if room > 10**6:
        assert train.main(f"{TINY} --run_name run".split()) == 0
        files = sum(path.stat().st_size for path in Path("runs/run").glob("*.pt"))
        state = train.prepare_run(train.parse_flags(TINY.split())[0])[0]
        assert files < train.disk_bytes(state, whole=True) < 4 * files
        return
    with pytest.raises(SystemExit) as stopped:
        train.main(f"{TINY} --run_name run".split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "needs" in error and "0.1 are free; make room there" in error
    assert not list(Path(".").iterdir())


@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_a_place_that_cannot_be_written_to_ends_before_training(monkeypatch, capsys, kind):
    if kind == "a file":
        Path("runs").write_text("")
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(train, "train_step", None)
    with pytest.raises(SystemExit) as stopped:
        train.main(f"{TINY} --run_name run".split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and not Path("runs/run").exists()
    assert error.startswith("error: runs/run: ") and "no folder that can be written to" in error


@pytest.mark.parametrize("part", ["model", "ema", "swa", "optimizer"])
def test_nothing_that_is_not_finite_is_ever_written(tmp_path, part):
    poisoned = {"model": {}, part: {"a": [{"w": torch.tensor([1.0, float("inf")])}]}}
    with pytest.raises(ValueError, match=f"{part} a 0 w is not finite"):
        utils.save_checkpoint(tmp_path / "a.pt", poisoned)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- damaged files


def damage(seed, flips, cuts, tmp_path):
    """(how many of so many flipped bits and truncations were refused, loaded as what was saved, loaded as other)."""
    state = train.prepare_run(train.parse_flags(f"{TINY} --ema_decay 0.9 --widths 8,8,8,8".split())[0])[0]
    path = tmp_path / "a.pt"
    utils.save_checkpoint(path, state.to_checkpoint())
    whole, saved, draw = path.read_bytes(), utils.load_checkpoint(path), random.Random(seed)
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
    return found


def test_no_flipped_bit_and_no_truncation_is_loaded_as_something_else(tmp_path):
    assert damage(0, 60, 20, tmp_path)["other"] == 0


@pytest.mark.slow
def test_none_of_a_thousand_flipped_bits_and_two_hundred_truncations_is_loaded_silently(tmp_path):
    assert damage(1, 1000, 200, tmp_path)["other"] == 0


def test_when_both_checkpoints_are_damaged_nothing_is_begun_in_silence(monkeypatch, capsys):
    run_stopped(monkeypatch, 2, "--save_every 1", "cut")
    for name in ("last.pt", "previous.pt"):
        path = Path("runs/cut") / name
        path.write_bytes(path.read_bytes()[:-300])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(["--resume", "cut"])
    text = capsys.readouterr()
    assert stopped.value.code == 2 and text.err.count("\n") == 1
    assert "its checkpoints are damaged or cannot be read" in text.err
    assert text.out.count("set aside as") == 2
    assert {"last.damaged", "previous.damaged"} <= {path.name for path in Path("runs/cut").iterdir()}


@pytest.mark.parametrize(
    "change, message",
    [(lambda found: found["config"].update(epochs="many"), "epochs must be an integer at least 1, got 'many'"),
     (lambda found: found["config"].update(flip=[1]), "flip must be True or False"),
     (lambda found: found["config"].update(epochs=41), "epochs is 41, the checkpoint's 2; restore it"),
     (lambda found: found["config"].update(optimizer="sgd"), "optimizer is 'sgd', the checkpoint's 'adamw'"),
     (lambda found: found["environment"].update(processes=-3), "its environment is not a run's"),
     (lambda found: found["config"].pop("epochs"), "its flags are not this kit's (epochs)"),
     (lambda found: found["environment"].update(processes="two"), "its environment is not a run's"),
     (lambda found: found.update(environment=3), "damaged")],
)  # fmt: skip
def test_a_run_whose_config_was_edited_is_one_line_and_status_2(monkeypatch, capsys, change, message):
    run_stopped(monkeypatch, 1, "", "cut")
    path = Path("runs/cut/config.json")
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    capsys.readouterr()
    assert attempt("--resume cut") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: runs/cut")


def test_a_run_without_its_config_and_what_stands_in_the_way_are_named(monkeypatch, capsys):
    run_stopped(monkeypatch, 2, "--save_every 1", "cut")
    for name in ("last.damaged", "metrics.csv"):
        Path("runs/cut", name).mkdir()
    Path("runs/cut/last.pt").write_text("")
    capsys.readouterr()
    assert attempt("--resume cut") == 1
    text = capsys.readouterr().out
    assert "set aside as last.damaged1" in text and "error: runs/cut/metrics.csv: Is a directory" in text
    Path("runs/cut/metrics.csv").rmdir()
    Path("runs/cut/config.json").unlink()
    assert attempt("--resume cut") == 2
    assert "runs/cut has no config.json; restore it, or" in capsys.readouterr().err


def test_a_checkpoint_of_another_program_is_set_aside(monkeypatch, capsys):
    run_stopped(monkeypatch, 2, "--save_every 1", "cut")
    torch.save({"model": {}, "step": 99}, "runs/cut/last.pt")
    capsys.readouterr()
    assert attempt("--resume cut") == 0
    assert "runs/cut/last.pt: has no epoch, so it is no checkpoint of a run; set aside" in capsys.readouterr().out


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_says(tmp_path, monkeypatch):
    for name, step in (("last.pt", 5), ("previous.pt", 7)):
        (tmp_path / "one").mkdir(exist_ok=True)
        utils.save_checkpoint(tmp_path / "one" / "last.pt", checkpoint(step))
        os.replace(tmp_path / "one" / "last.pt", tmp_path / name)
        os.utime(tmp_path / name, (10**9 - step, 10**9 - step))
    assert utils.load_newest(tmp_path)["step"] == 7
    jumps = iter(range(10**10, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))  # an hour back, again and again
    _, rows, _ = run("--epochs 2")
    assert all(float(row["seconds"]) > 0 and float(row["samples_per_second"]) > 0 for row in rows)


def test_best_is_never_replaced_by_a_worse_one_not_even_by_one_that_is_forgotten(monkeypatch):
    """Killed between best.pt and last.pt, on a machine that then computes otherwise: the forgotten epoch was better."""
    run_stopped(monkeypatch, 1, "--monitor val_loss", "cut")
    saved = {"model": {"w": torch.zeros(1)}, "meta": {}, "step": 4, "epoch": 2, "metrics": {"val_loss": 0.01}}
    utils.save_checkpoint("runs/cut/best.pt", saved)
    assert train.main(["--resume", "cut"]) == 0
    assert utils.load_checkpoint("runs/cut/best.pt")["metrics"] == {"val_loss": 0.01}
    run_stopped(monkeypatch, 1, "--monitor val_loss", "worse")
    utils.save_checkpoint("runs/worse/best.pt", {**saved, "metrics": {"val_loss": 99.0}})
    assert train.main(["--resume", "worse"]) == 0
    best = utils.load_checkpoint("runs/worse/best.pt")["metrics"]["val_loss"]
    assert best == min(float(row["val_loss"]) for row in outcome("worse")[1])


# -------------------------------------------------------------------------------------------- signals


def send(number):
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def before_call(monkeypatch, owner, name, n, act):
    """act() happens before the n-th call of owner.name, also one that is only drawn from later."""
    inner, calls = getattr(owner, name), []

    def acting(*arguments, **options):
        calls.append(name)
        if len(calls) == n:
            act()
        return inner(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, acting)
        yield


EVERYWHERE = "--ema_decay 0.9 --swa_start_epoch 1 --swa_lr 0.01"


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "owner, name, n, where",
    [(train, "train_step", 2, "at step 2"), (train, "evaluate", 2, "in the validation of epoch 1"),
     (train, "update_bn", 1, "in the validation of epoch 1"), (train, "update_bn", 2, "in the validation of epoch 2"),
     (utils, "write_csv", 1, "after epoch 1")],
)  # fmt: skip
def test_a_signal_anywhere_in_the_loop_saves_and_the_run_goes_on_bitwise(monkeypatch, number, owner, name, n, where):
    if number == signal.SIGINT and name != "train_step":
        pytest.skip("as SIGTERM")
    whole = run(EVERYWHERE, "whole")
    with before_call(monkeypatch, owner, name, n, lambda: send(number)):
        assert train.main(f"{TINY} --run_name cut {EVERYWHERE}".split()) == 128 + number
    assert f"stopped {where}; go on with: python train.py --resume cut" in Path("runs/cut/log.txt").read_text()
    assert train.main(["--resume", "cut"]) == 0
    assert same_outcome(whole, outcome("cut"))
    for kind in ("best", "ema", "swa"):
        a, b = (utils.load_checkpoint(f"runs/{name}/{kind}.pt") for name in ("whole", "cut"))
        assert same(a["model"], b["model"]), kind


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_learning_rate_sweep_leaves_nothing(monkeypatch, capsys, number):
    for flags in ("--lr auto --run_name run", "--find_lr"):
        with before_call(monkeypatch, train, "train_step", 5, lambda: send(number)):
            assert train.main(f"{TINY} {flags}".split()) == 128 + number
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.endswith("stopped" + " before there was a step to save" * ("auto" in flags))
        assert not Path("runs").exists()


@posix
def test_a_signal_while_pictures_are_decoded_leaves_no_partial_cache(monkeypatch):
    from test_data import save_folder

    save_folder(Path("photos"), ("train",), count=9)
    with before_call(monkeypatch, data.np.lib.format, "write_array_header_1_0", 1, lambda: send(signal.SIGTERM)):
        assert train.main(f"{TINY} --data photos --batch_size 4 --run_name run".split()) == 143
    assert not Path("runs").exists() and not list(Path(".").glob(".cache/*"))


@posix
def test_what_a_killed_decode_left_is_swept_by_the_next_and_one_under_way_is_left_alone(monkeypatch):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    Path("c").mkdir()
    dead, alive = (Path("c", f"x-y.{data.platform.node()}-{n}.partial") for n in (pid, os.getpid()))
    elsewhere = Path("c", f"x-y.another-{pid}.partial")
    for path in (dead, alive, elsewhere):
        path.touch()
    data.partial_file(Path("c/z.npy"), 1)
    assert not dead.exists() and alive.exists() and elsewhere.exists()


def test_a_full_disk_while_pictures_are_decoded_is_one_line(monkeypatch, capsys):
    from test_data import save_folder

    save_folder(Path("photos"), ("train",), count=9)
    for room in (100, 10**12):
        with monkeypatch.context() as patch:
            if room == 100:
                usage = type(shutil.disk_usage("."))
                patch.setattr(shutil, "disk_usage", lambda path: usage(10**13, 0, room))
            else:
                opened = lambda *a, **k: Failing(builtins.open(*a, **k), 200, full) if "wb" in a else open(*a, **k)
                patch.setattr(data, "open", opened, raising=False)
            with pytest.raises(SystemExit) as stopped:
                train.main(f"{TINY} --data photos --batch_size 4 --run_name run".split())
        error = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and ("No space" in error or "make room" in error)
        assert not Path("runs").exists() and not list(Path(".").glob(".cache/*"))


@posix
def test_a_signal_that_was_ignored_stays_ignored():
    """As nohup leaves SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.catch_signals() as received:
        send(signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


@posix
def test_a_second_signal_quits_at_once():
    def twice():
        with train.catch_signals() as received:
            send(signal.SIGTERM)
            assert received == [signal.SIGTERM]
            send(signal.SIGTERM)
            os._exit(1)

    assert forked(twice) == 143


# --------------------------------------------------------------------------------------------- workers


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
def test_a_loader_worker_that_dies_or_hangs_ends_the_run_in_one_line_and_it_goes_on(fault):
    flags = f"{SMALL} --save_every 1"
    assert statuses(start(attempt, f"{flags} --run_name whole", count=1)) == [0]
    assert statuses(start(attempt_with, fault, f"{flags} --run_name cut --workers 1 --timeout 2", count=1)) == [1]
    lines = [line for line in Path("out0.txt").read_text().splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "DataLoader" in lines[0] and "try --workers 0, or a longer --timeout" in lines[0]
    assert Path("err0.txt").read_text() == ""
    assert statuses(start(attempt, "--resume cut --workers 0", count=1)) == [0]
    assert same_outcome(outcome("whole"), outcome("cut"))


# --------------------------------------------------------------------------- a run that is not alone


def attempt(flags):
    try:
        return train.main(flags.split())
    except SystemExit as stopped:
        return stopped.code


SMALL = f"{TINY} --widths 8,16,32,48 --quiet"


@posix
@pytest.mark.parametrize("pairs", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_runs_of_one_name_the_second_ends_with_status_2(pairs):
    for i in range(pairs):
        # each a process of its own, of a world of one; started together
        flags = f"{SMALL} --run_name twin{i}"
        twins = [start(attempt, flags, count=1, WORLD_SIZE="1")[0] for _ in range(2)]
        assert sorted(statuses(twins)) == [0, 2], i
        config = json.loads(Path(f"runs/twin{i}/config.json").read_text())
        assert config["config"]["run_name"] == f"twin{i}"
        assert same(outcome(f"twin{i}")[0]["model"], outcome("twin0")[0]["model"])


@posix
def test_a_run_that_goes_on_elsewhere_is_locked_and_the_lock_of_a_dead_process_is_none(monkeypatch, capsys):
    whole = run("", "whole")
    run_stopped(monkeypatch, 1, "", "cut")
    Path("runs/cut/lock").write_text(f"pid {os.getpid()} on somewhere\n")  # left by a kill: nobody holds it
    Path("runs/cut/.last.pt.123.partial").write_text("half")
    pid = os.fork()
    if pid == 0:
        held = utils.lock("runs/cut")
        Path("held").touch()
        time.sleep(60)
        held.close()
    while not Path("held").exists():
        time.sleep(0.01)
    assert attempt("--resume cut") == 2
    assert f"runs/cut: in use by pid {pid} on {utils.platform.node()}" in capsys.readouterr().err
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert train.main(["--resume", "cut"]) == 0 and same_outcome(whole, outcome("cut"))
    assert not list(Path("runs/cut").glob(".*.partial"))


def test_a_run_that_was_killed_before_its_first_save_begins_again(monkeypatch):
    whole = run("--lr auto", "whole")
    for name, point in (("early", "mkdir"), ("late", "fit")):
        with monkeypatch.context() as patch:
            gone = lambda *a, **k: (_ for _ in ()).throw(SystemExit(9))
            if point == "mkdir":
                patch.setattr(utils, "write_json", gone)
            else:
                patch.setattr(train, "fit", gone)
            assert attempt(f"{TINY} --run_name {name} --lr auto") == 9
        assert Path("runs", name).is_dir()
    assert train.main(f"{TINY} --run_name early --lr auto".split()) == 0  # there is no run yet under that name
    assert train.main(["--resume", "late"]) == 0
    assert same_outcome(whole, outcome("early")) and same_outcome(whole, outcome("late"))


# ------------------------------------------------------------------------------- kills at any moment


PHASES = {"decoding": (data, "decode_cached"), "LR finder": (train, "find_lr"), "validation": (train, "evaluate"),
          "SWA's statistics": (train, "update_bn"), "writing": (utils, "write_atomic"), "step": (train, "train_step")}


def traced(flags):
    """As `attempt`; the file `phase` has what the process is doing."""

    def wrap(name, owner, inner):
        def call(*arguments, **options):
            before = traced.now
            traced.now = name if before == "starting" else before  # steps of the LR finder are the finder's
            Path("phase").write_text(traced.now)
            try:
                return inner(*arguments, **options)
            finally:
                traced.now = before
                Path("phase").write_text(before)

        return call

    traced.now = "starting"
    for name, (owner, attribute) in PHASES.items():
        setattr(owner, attribute, wrap(name, owner, getattr(owner, attribute)))
    return attempt(flags)


def kill_at_random(flags, kills, seed):
    """Kills that many runs and goes on with them; fails where one does not become the whole run, bit by bit.

    Every second one at a moment drawn from before a whole run's first save, the others from after it.
    """
    draw, phases = random.Random(seed), {}
    for name in ("whole", "timed"):  # the second is timed: the first imports more
        began, first = time.monotonic(), None
        process = start(attempt, f"{flags} --run_name {name}", count=1)[0]
        while process.is_alive():
            first = first or (Path("runs", name, "last.pt").exists() and time.monotonic() - began)
            process.join(0.01)
        assert process.exitcode == 0, Path("err0.txt").read_text()[-2000:]
        length, whole = time.monotonic() - began, outcome("whole")
        shutil.rmtree(".cache", ignore_errors=True)  # so that pictures are decoded again
    for i in range(kills):
        shutil.rmtree(".cache", ignore_errors=True)
        Path("phase").write_text("starting")
        killed = start(traced, f"{flags} --run_name run{i}", count=1)[0]
        moment = draw.uniform(0.1, first) if i % 2 else draw.uniform(first, length)
        killed.join(moment)
        killed.kill()
        killed.join()
        folder = Path("runs") / f"run{i}"
        left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        phase = "it had ended" if killed.exitcode == 0 else Path("phase").read_text() or "starting"
        phases[phase] = phases.get(phase, 0) + 1
        again = f"--resume run{i} --quiet" if "config.json" in left else f"{flags} --run_name run{i}"
        if killed.exitcode != 0:
            assert statuses(start(attempt, again, count=1)) == [0], (i, left, Path("err0.txt").read_text()[-2000:])
        assert same_outcome(whole, outcome(f"run{i}")), (i, moment, left)
        assert not [path for path in (*folder.glob(".*"), *Path(".cache").glob("*.partial"))]
        shutil.rmtree(folder)
    print(f"{kills} kills within {length:.1f} s (first save after {first:.1f} s), all went on bitwise: {phases}")


def everything(epochs, size):
    """Flags of a run that decodes, sweeps rates, trains, saves each step, averages weights and validates."""
    from test_data import save_folder

    save_folder(Path("photos"), ("train", "val"), count=9, size=(size, size))
    return f"{SMALL} --data photos --batch_size 4 --save_every 1 --epochs {epochs} {EVERYWHERE} --lr auto"


@posix
def test_runs_killed_at_random_moments_go_on_bitwise():
    kill_at_random(everything(3, 30), 2, seed=0)


@posix
@pytest.mark.slow
def test_a_hundred_runs_killed_at_random_moments_go_on_bitwise():
    kill_at_random(everything(20, 1500), 100, seed=1)
