"""Whole runs: what stands on disk, a stop at any step, every flag, every bad one, memory."""

import contextlib
import copy
import csv
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model
import train
import utils

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--model custom --model_args widths=8,16,32,48 --image_size 24 --max_samples 60 --amp False"
WINDOWS = "--batch_size 16 --accumulation_steps 2"  # of 60 images: 16 + 16 and 16 + 12
TINY = f"{SMALL} {WINDOWS} --epochs 2"
ONE = f"{SMALL} {WINDOWS} --epochs 1"
FEW = f"{TINY} --max_samples 18 --batch_size 5"  # 5 + 5 and 5 + 3
NAMES = "SIGINT", "SIGTERM", "SIGHUP"  # Windows lacks the last one
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
shapes = functools.cache(data.built_in)  # drawn once


@contextlib.contextmanager
def terminal():
    """Signals act as in a terminal; under nohup and in the background some are ignored."""
    defaults = [signal.default_int_handler, *[signal.SIG_DFL] * 2]
    before = [(n, signal.signal(n, handler)) for n, handler in zip(SIGNALS, defaults)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    quickly(monkeypatch)
    with terminal():
        yield


def quickly(monkeypatch):
    """No shapes drawn anew, no pictures (test_use.py), no waits for the disk (test_faults.py)."""
    monkeypatch.setattr(data, "built_in", shapes)
    monkeypatch.setattr(utils, "save_history", lambda *all: False)
    monkeypatch.setattr(utils, "draw_report", lambda *all: [])
    monkeypatch.setattr(os, "fsync", lambda file: None)


def attempt(flags):
    """The exit status of a command line, a list of words or a text."""
    try:
        return train.main(flags.split() if isinstance(flags, str) else flags)
    except SystemExit as stopped:
        return stopped.code


def run(flags="", name="run", preset=TINY):
    """Trains in this process: (last checkpoint, rows of metrics.csv, text of the log)."""
    assert attempt(f"{preset} --run_name {name} {flags}") == 0
    return outcome(name)


def outcome(name):
    folder = Path("runs") / name
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return utils.load_checkpoint(folder / "last.pt"), rows, (folder / "log.txt").read_text()


def refused(flags, capsys):
    """The one line with which a command ends that changes nothing on disk."""
    files = lambda: {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")
                     if path.name != "lock"}  # fmt: skip
    before = files()
    capsys.readouterr()
    status, error = attempt(flags), capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, (status, error)
    assert files() == before
    return error


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_outcome(a, b):
    """Every field of the state and every row equal bitwise, but for wall time."""
    timed = ("seconds", "samples_per_second")
    strip = lambda rows: [{k: v for k, v in row.items() if k not in timed} for row in rows]
    parts = [name for name in train.SAVED if name not in ("seconds", "history")]
    equal = all(same(a[0][part], b[0][part]) for part in parts)
    return equal and same(*(strip(x[0]["history"]) for x in (a, b))) and strip(a[1]) == strip(b[1])


@contextlib.contextmanager
def before_call(monkeypatch, owner, name, n, act):
    """act() happens before the n-th call of owner.name."""
    inner, numbers = getattr(owner, name), itertools.count(1)

    def acting(*arguments, **options):
        if next(numbers) == n:
            act()
        return inner(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, acting)
        yield


def run_stopped(monkeypatch, steps, flags="", name="stopped", preset=TINY):
    """A run that SIGTERM stops after `steps` steps."""
    with before_call(monkeypatch, train, "train_step", steps,
                     lambda: signal.raise_signal(signal.SIGTERM)):  # fmt: skip
        assert attempt(f"{preset} --run_name {name} {flags}") == 143


def run_copied(monkeypatch, flags, preset=TINY):
    """(outcome, names of copies of the run's folder as it was after each save)."""
    names, save = [], utils.save_checkpoint

    def kept(path, content):
        save(path, content)
        if Path(path).name == "last.pt":
            names.append(f"copy{len(names)}")
            shutil.copytree("runs/whole", f"runs/{names[-1]}")

    with monkeypatch.context() as patch:
        patch.setattr(utils, "save_checkpoint", kept)
        whole = run(f"{flags} --save_every 1", "whole", preset)
    return whole, names[:-1]  # the last one is finished


def step_of(name):
    return utils.load_checkpoint(f"runs/{name}/last.pt")["step"]


def in_folder(folder, make):
    """What make(monkeypatch) returns in a folder of its own; nobody changes what it wrote there."""
    with pytest.MonkeyPatch.context() as patch, terminal():
        patch.chdir(folder)
        quickly(patch)
        return make(patch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, outcome) of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    found = in_folder(folder, lambda patch: run("--ema_decay 0.9 --swa_start_epoch 1"))
    return folder / "runs" / "run", found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights after one epoch by the defaults."""
    return in_folder(tmp_path_factory.mktemp("plain"), lambda patch: run(preset=ONE))[0]["model"]


AUTO = "--ema_decay 0.9 --optimizer sgd --batch_size auto --effective_batch 30"


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """The folder of a run that was stopped after its first step, with much left to settle."""
    folder = tmp_path_factory.mktemp("cut")
    flags = f"{AUTO} --epochs 2"
    in_folder(folder, lambda patch: run_stopped(patch, 1, flags, "cut", SMALL))
    return folder / "runs" / "cut"


@pytest.fixture
def cut(cut_run):
    """A copy of it under runs/cut."""
    shutil.copytree(cut_run, "runs/cut")
    return Path("runs/cut")


# ----------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "flags",
    [
        "--ema_decay 0.9 --clip_grad_norm 1.0 --cutout 6",
        "--optimizer sgd --scheduler plateau --scheduler_args patience=0 --amp bf16",
        "--amp fp16 --scheduler cosine --warmup_epochs 0.5",
        "--optimizer muon --model_args widths=24,16,32,48 depths=1,0,1 whiten=True "
        "--checkpoint_activations",
        "--swa_start_epoch 1 --ema_decay 0.9 --sam_rho 0.1 --mixup 0.3 --cutmix 1",
        "--focal_gamma 2 --swa_start_epoch 2 --optimizer sgd",
    ],
)
def test_a_run_resumed_from_any_save_is_the_run_that_was_never_stopped(monkeypatch, flags):
    """Each save: at the start, after each step, and after each epoch's end."""
    whole, copies = run_copied(monkeypatch, flags, FEW)
    assert [step_of(name) for name in copies] == [0, 1, 2, 2, 3, 4]
    for name in copies:
        assert attempt(f"--resume {name}") == 0
        assert same_outcome(whole, outcome(name)), name


def test_dropout_and_stochastic_depth_are_drawn_again_on_resume(monkeypatch):
    preset = "--image_size 32 --max_samples 12 --batch_size 3 --accumulation_steps 2 --epochs 1 "
    whole, copies = run_copied(monkeypatch, "--amp False", preset + "--scheduler constant")
    assert [step_of(name) for name in copies] == [0, 1, 2]
    assert attempt(f"--resume {copies[1]}") == 0 and same_outcome(whole, outcome(copies[1]))


def test_the_comparison_of_runs_sees_another_seed_and_another_flag(finished):
    whole, flags = finished[1], "--ema_decay 0.9 --swa_start_epoch 1"
    assert same_outcome(whole, run(flags, "again"))
    for other in ("--seed 1", "--lr 0.0020001"):
        assert not same_outcome(whole, run(f"{flags} {other}", f"other{other.split()[1]}")), other


def test_each_field_of_the_state_matters_on_resume(monkeypatch, capsys):
    """With one of them fresh the run that goes on is another one; without it there is none."""
    flags = "--ema_decay 0.9 --amp fp16 --swa_start_epoch 1"
    whole, copies = run_copied(monkeypatch, flags, FEW)
    saved = utils.load_checkpoint(f"runs/{copies[4]}/last.pt")
    assert saved["step"] == 3 and whole[0]["scaler"]["scale"] != 1
    fresh = {
        "model": {k: torch.ones_like(v) for k, v in saved["model"].items()},
        "ema": {k: torch.zeros_like(v) for k, v in saved["ema"].items()},
        "swa": {k: torch.ones_like(v) for k, v in saved["swa"].items()},
        "optimizer": {**saved["optimizer"], "state": {}},
        "scaler": {**saved["scaler"], "scale": 1.0},
        "step": 0, "epoch": 0, "epoch_step": 0, "bad_steps": 1, "totals": None, "history": [],
        "finished": True, "gradient_norm": 0.0, "micro_batch": 2,
    }  # fmt: skip
    # repeated bad steps have a test of their own, and the seconds are not compared
    assert {*train.SAVED} - fresh.keys() == {"bad_in_a_row", "seconds"}
    for name, value in fresh.items():
        Path("runs", name).mkdir()
        utils.save_checkpoint(f"runs/{name}/last.pt", {**saved, name: value})
        assert attempt(f"--resume {name}") or not same_outcome(whole, outcome(name)), name
    for name in (*train.SAVED, "meta", "flags"):
        folder = Path("runs", f"without_{name}")
        folder.mkdir()
        utils.save_checkpoint(folder / "last.pt", {k: v for k, v in saved.items() if k != name})
        assert f"has no {name}: another version" in refused(f"--resume {folder.name}", capsys)


CHILD = f"""
import os, runpy, signal, sys
for number in {[int(number) for number in SIGNALS]}:
    signal.signal(number, signal.SIG_DFL)  # under nohup they are ignored
sys.path.insert(0, {str(ROOT)!r})
import model
calls, inner, number = [], model.set_rates, int(sys.argv[1])
def counted(*arguments):
    calls.append(0)
    if len(calls) == 3:
        os.kill(os.getpid(), number)
    inner(*arguments)
model.set_rates = counted
sys.argv = ["train.py", *sys.argv[2:]]
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_process_that_is_killed_in_its_third_step_resumes_bitwise(finished, name):
    number = getattr(signal, name)
    flags = f"{TINY} --save_every 1 --ema_decay 0.9 --swa_start_epoch 1 --run_name killed"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", CHILD, str(int(number)), *flags.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if name == "SIGKILL":
        assert done.returncode == -number and step_of("killed") == 2
    else:
        assert done.returncode == 128 + number and step_of("killed") == 3
        assert "python train.py --resume killed" in done.stdout and "Traceback" not in done.stderr
    assert attempt("--resume") == 0
    assert same_outcome(finished[1], outcome("killed"))


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_used(monkeypatch, finished):
    run_stopped(monkeypatch, 3, "--save_every 1 --ema_decay 0.9 --swa_start_epoch 1")
    path = Path("runs/stopped/last.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert attempt("--resume stopped") == 0
    assert path.with_name("last.damaged").exists()
    assert same_outcome(finished[1], outcome("stopped"))


# --------------------------------------------------------------------------- signals in every phase

EVERYWHERE = "--ema_decay 0.9 --swa_start_epoch 1"


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """The run that no signal stops: (outcome, weights in its files)."""

    def make(patch):
        found, kinds = run(EVERYWHERE, "whole"), ("best", "ema", "swa")
        return found, [utils.load_checkpoint(f"runs/whole/{kind}.pt") for kind in kinds]

    return in_folder(tmp_path_factory.mktemp("everywhere"), make)


@pytest.mark.parametrize(
    "number, owner, name, n, where",
    [
        *((number, train, "train_step", 2, "at step 2") for number in SIGNALS),
        (signal.SIGTERM, train, "sum_totals", 2, "in the validation of epoch 1"),
        (signal.SIGTERM, train, "update_bn", 1, "in the validation of epoch 1"),
        (signal.SIGTERM, train, "update_bn", 2, "in the validation of epoch 2"),
        (signal.SIGTERM, utils, "write_csv", 1, "after epoch 1"),
    ],
)
def test_a_signal_in_any_phase_saves_and_the_run_goes_on_bitwise(
    monkeypatch, everywhere, number, owner, name, n, where
):
    with before_call(monkeypatch, owner, name, n, lambda: signal.raise_signal(number)):
        assert attempt(f"{TINY} --run_name cut {EVERYWHERE}") == 128 + number
    log = Path("runs/cut/log.txt").read_text()
    assert f"stopped {where}; go on with: python train.py --resume cut" in log
    assert attempt("--resume cut") == 0 and same_outcome(everywhere[0], outcome("cut"))
    for whole, kind in zip(everywhere[1], ("best", "ema", "swa")):
        assert same(whole["model"], utils.load_checkpoint(f"runs/cut/{kind}.pt")["model"]), kind


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "owner, name, n, flags",
    [(train, "load_source", 1, "--run_name run"),
     (train, "train_step", 5, "--find_lr")],
)  # fmt: skip
def test_a_signal_before_there_is_a_run_leaves_nothing(
    monkeypatch, capsys, number, owner, name, n, flags
):
    with before_call(monkeypatch, owner, name, n, lambda: signal.raise_signal(number)):
        assert attempt(f"{TINY} {flags}") == 128 + number
    assert "before training" in capsys.readouterr().err and not Path("runs").exists()


# --------------------------------------------------------------------------- flags on a resumed run


def merged(words):
    """The flags with which `--resume cut` and these words would go on."""
    folder, parsed = Path("runs/cut"), train.parse_flags(f"--resume cut {words}".split())
    return train.merge_flags(folder, utils.load_newest(folder), *parsed)


def test_what_was_asked_and_what_was_settled_are_accepted_on_resume(cut):
    flags = utils.load_checkpoint(cut / "last.pt")["flags"]
    asked, settled = flags["asked"], flags["settled"]
    assert asked["batch_size"] == "auto" and "monitor" not in asked
    assert settled["batch_size"] == 30 and settled["lr"] == 0.1
    assert settled["monitor"] == "ema_accuracy" and settled["accumulation_steps"] == 1
    for words in (
        "", f"{SMALL} {AUTO} --epochs 2", f"--lr {settled['lr']!r} --batch_size 30",
        "--monitor ema_accuracy --flip True --weight_decay 0.01", "--accumulation_steps 1",
    ):  # fmt: skip
        found = merged(words)
        assert {name: getattr(found, name) for name in settled} == settled, words


def test_free_flags_take_the_values_of_today_on_resume(cut):
    words = "--workers 0 --save_every 7 --quiet --timeout 60 --device cpu --cache_dir c"
    free = {"workers": 0, "save_every": 7, "quiet": True, "timeout": 60.0, "device": "cpu",
            "cache_dir": "c"}  # fmt: skip
    found = vars(merged(words))
    settled = utils.load_checkpoint(cut / "last.pt")["flags"]["settled"]
    assert {name: found[name] for name in settled} == {**settled, **free}


@pytest.mark.parametrize(
    "flags", ["--lr 0.5", "--epochs 9", "--seed 1", "--batch_size 16", "--optimizer adamw",
              "--model_args widths=8,16,32,64", "--scheduler cosine", "--amp bf16", "--ema_decay 0"]
)  # fmt: skip
def test_a_flag_that_differs_is_refused_on_resume(cut, capsys, flags):
    for how in ("--resume cut", "--resume --run_name cut"):
        line = refused(f"{how} {flags}" + " --model custom" * ("model_args" in flags), capsys)
        assert f"{flags.split()[0]} " in line and "the run has" in line


def test_config_json_is_never_read(cut):
    shutil.copytree(cut, "runs/same")
    found = json.loads((cut / "config.json").read_text())
    flags = utils.load_checkpoint(cut / "last.pt")["flags"]
    assert {name: found[name] for name in flags} == json.loads(json.dumps(flags))
    assert found["environment"]["torch"] == torch.__version__
    (cut / "config.json").write_text("garbage {")
    Path("runs/same/config.json").unlink()
    assert attempt("--resume") == attempt("--resume same") == 0  # alone: the one with a config.json
    assert same_outcome(outcome("cut"), outcome("same"))


def test_resume_with_a_run_name_begins_that_run_or_goes_on_with_it(monkeypatch, finished, capsys):
    """What torchrun --max_restarts starts again and again."""
    flags = f"{TINY} --ema_decay 0.9 --swa_start_epoch 1 --resume --run_name again"
    Path("runs/again").mkdir(parents=True)
    for name in ("lock", ".last.pt.1.partial"):  # of a process that was killed before it began
        Path("runs/again", name).touch()
    stop = lambda: signal.raise_signal(signal.SIGTERM)
    with before_call(monkeypatch, train, "train_step", 3, stop):
        assert attempt(flags) == 143
    assert step_of("again") == 3
    assert attempt(flags) == 0 and same_outcome(finished[1], outcome("again"))
    before = Path("runs/again/last.pt").read_bytes()
    assert attempt(flags) == 0 and "finished already" in capsys.readouterr().out
    assert Path("runs/again/last.pt").read_bytes() == before


def test_resume_with_a_run_name_begins_over_nothing_that_it_finds(capsys):
    Path("runs/again").mkdir(parents=True)
    Path("runs/again/notes.txt").touch()
    flags = f"{TINY} --resume --run_name again"
    assert "exists" in refused(flags, capsys)
    Path("runs/again/last.damaged").touch()
    assert "damaged" in refused(flags, capsys)


def test_torchrun_restarts_need_a_run_that_they_can_find_again(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for flags in (f"{TINY} --run_name run", f"{TINY} --resume"):
        assert "--resume --run_name NAME" in refused(flags, capsys)
    run("--resume", preset=ONE)


def test_a_run_that_exists_is_not_begun_again_and_a_finished_one_does_not_go_on(cut, capsys):
    line = refused(f"{TINY} --run_name cut", capsys)
    assert "exists; choose another name, or --resume cut" in line
    assert attempt("--resume cut --workers 0") == 0
    assert "finished already" in refused("--resume cut", capsys)
    assert "no unfinished run" in refused("--resume", capsys)
    assert "there are cut" in refused("--resume other", capsys)


def test_a_run_is_found_by_its_name_its_path_or_as_the_one_started_last(cut):
    for name, age in (("older", 100), ("newer", -100)):
        shutil.copytree(cut, Path("runs", name))
        when = (cut / "config.json").stat().st_mtime - age
        os.utime(Path("runs", name, "config.json"), (when, when))
    find = lambda name: utils.find_run("runs", name).name
    assert find("") == "newer"
    assert find("older") == find(str(Path("runs/older").resolve())) == "older"
    saved = utils.load_checkpoint("runs/newer/last.pt")
    utils.save_checkpoint("runs/newer/last.pt", {**saved, "step": 99, "finished": True})
    assert find("") == "cut"


def test_a_run_of_another_version_is_refused(cut, capsys):
    saved = utils.load_checkpoint(cut / "last.pt")
    flags = saved["flags"]
    changed = {
        "more": {**flags["settled"], "curriculum": 1},
        "fewer": {name: value for name, value in flags["settled"].items() if name != "sam_rho"},
    }
    for name, settled in changed.items():
        Path("runs", name).mkdir()
        content = {**saved, "flags": {**flags, "settled": settled}}
        utils.save_checkpoint(f"runs/{name}/last.pt", content)
        line = refused(f"--resume {name}", capsys)
        assert "another version" in line and ("curriculum" in line or "sam_rho" in line)


def test_changed_data_is_refused_on_resume(monkeypatch, capsys):
    def make(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (60, 24, 24, 3), np.uint8)
        np.savez("a.npz", x=pixels, y=np.arange(60) % 4)

    make(0)
    run_stopped(monkeypatch, 1, "--data a.npz")
    make(1)
    assert "the data changed" in refused("--resume stopped", capsys)
    make(0)
    assert attempt("--resume stopped") == 0


# -------------------------------------------------------------------------------- what a run leaves


def test_a_run_saves_its_evidence_and_its_averages_evaluate_alone(finished, capsys):
    folder, (last, rows, log) = finished
    names = "config.json metrics.csv log.txt lock last.pt previous.pt best.pt ema.pt swa.pt"
    assert {path.name for path in folder.iterdir()} == {*names.split()}
    assert [row["epoch"] for row in rows] == ["1", "2"] and last["step"] == 4 and last["finished"]
    assert float(rows[-1]["lr"]) < float(rows[0]["lr"])
    names = "best", "ema", "swa"
    best, ema, swa = (utils.load_checkpoint(folder / f"{name}.pt") for name in names)
    assert best["metrics"]["ema_accuracy"] == max(float(row["ema_accuracy"]) for row in rows)
    assert best["meta"]["classes"][0] == "bars" and len(best["meta"]["mean"]) == 3
    assert same(last["ema"], ema["model"])
    averaged = {f"module.{name}": value for name, value in swa["model"].items()}
    assert same({**last["swa"], **averaged}, last["swa"])
    assert "16 x 2 accumulation x 1 processes = 32 | 2 steps an epoch, 2 epochs" in log
    files = [f"{folder}/{name}.pt" for name in ("ema", "swa")]
    assert attempt(["--evaluate", *files, "--output", "found.json", "--amp", "False"]) == 0
    assert "on 60 images (test): loss" in capsys.readouterr().out
    found = json.loads(Path("found.json").read_text())
    assert [result["checkpoint"] for result in found] == files
    for result in found:
        assert (result["split"], result["samples"]) == ("test", 60) and 0 <= result["accuracy"] <= 1


def test_repeated_bad_steps_end_the_run_clearly_and_are_counted_on_resume(monkeypatch, capsys):
    augment, steps, step = train.data.augment, [], train.train_step
    poisoned = lambda images, index, seed, epoch, *rest: augment(
        images, index, seed, epoch, *rest) * (1 if epoch == 0 else float("nan"))  # fmt: skip
    counted = lambda *arguments: steps.append(0) or step(*arguments)
    monkeypatch.setattr(train.data, "augment", poisoned)
    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 2)
    flags = f"{SMALL} {WINDOWS} --epochs 3 --run_name run --save_every 1"
    for command, total in ((flags, 4), ("--resume run", 5)):  # one more, as the third was bad too
        assert attempt(command) == 1 and len(steps) == total
        out = capsys.readouterr().out
        assert "2 steps in a row were not finite" in out and "--resume run" in out
        saved = utils.load_newest("runs/run")
        assert saved["step"] == 3 and saved["bad_in_a_row"] == 1
        assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_metric_that_was_never_finite_ends_the_run_clearly(monkeypatch, capsys):
    means = train.means
    monkeypatch.setattr(train, "means", lambda *a: dict.fromkeys(means(*a), float("nan")))
    assert attempt(f"{ONE} --run_name run") == 1
    assert "val_accuracy was never finite" in capsys.readouterr().out


def test_evaluation_without_a_test_split_keeps_to_the_runs_own_validation_images(capsys):
    images = np.random.default_rng(0).integers(0, 256, (60, 24, 24, 3), np.uint8)
    np.savez("a.npz", x=images, y=np.arange(60) % 4)
    _, rows, _ = run("--data a.npz --seed 3 --val_fraction 0.2")
    # another split would hold images that were trained on
    for flag in ("--seed 5", "--val_fraction 0.5", "--max_samples 9", "--find_lr", "--resume run"):
        assert "leave it out" in refused(f"--evaluate runs/run/last.pt {flag}", capsys)
    assert attempt("--evaluate runs/run/last.pt --amp False --output a.json") == 0
    found = json.loads(Path("a.json").read_text())
    found = found if isinstance(found, dict) else found[0]
    assert found["split"] == "val" and found["samples"] == 12
    assert found["loss"] == pytest.approx(float(rows[-1]["val_loss"]), rel=1e-4)


# ------------------------------------------------------------------------------------ a test a flag


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 1", "--clip_grad_norm 0.01", "--cutout 8", "--flip False", "--crop_padding 0",
        "--label_smoothing 0.2", "--optimizer sgd", "--weight_decay 1.0", "--lr 0.001",
        "--momentum 0.5 --scheduler constant", "--max_lr 0.01", "--scheduler_args pct_start=0.6",
        "--scheduler_args div_factor=5", "--scheduler_args final_div_factor=2",
        "--scheduler_args cycle_momentum=False", "--scheduler_args anneal=linear --epochs 3",
        "--batch_size 8", "--accumulation_steps 1", "--max_samples 50", "--amp bf16",
        "--image_size 32", "--mixup 0.3", "--cutmix 1", "--sam_rho 0.1", "--focal_gamma 2",
        "--model_args widths=8,16,32,64",
    ],
)  # fmt: skip
def test_a_flag_changes_the_weights(plain, flags):
    if "momentum" in flags or "anneal" in flags:  # these differ from what goes with them
        removed = {"--momentum 0.5 ": "", "cycle_momentum=False": "", "anneal=linear": "anneal=cos"}
        other = next(flags.replace(*pair) for pair in removed.items() if pair[0] in flags)
        plain = run(other.removesuffix("--scheduler_args "), "usual", ONE)[0]["model"]
    assert not same(plain, run(flags, "other", ONE)[0]["model"])


@pytest.mark.parametrize("flags", [
    "--cutout 0 --scheduler_args pct_start=0.3 --seed 0 --lr 0.002 --optimizer adamw --flip True",
    "--workers 0 --save_every 1 --cache_dir c --quiet --timeout 60 --memory_gb 4 --device cpu",
    "--workers 2", "--swa_start_epoch 1 --ema_decay 0.9 --checkpoint_activations",
])  # fmt: skip
def test_defaults_and_flags_of_the_machine_leave_the_weights_alone(plain, flags):
    assert same(plain, run(flags, "other", ONE)[0]["model"])


def test_the_memory_format_changes_rounding_alone():
    last, contiguous = (run(f"--channels_last {x}", x, ONE)[1][0] for x in ("True", "False"))
    assert float(last["train_loss"]) == pytest.approx(float(contiguous["train_loss"]), rel=1e-4)


def test_min_crop_area_changes_random_resized_crops_of_larger_pictures():
    from test_data import save_folder

    save_folder(Path("photos"), ("train", "val"), count=9, size=(80, 90))
    flags = "--data photos --batch_size 8"
    usual, large = run(flags, "usual", ONE), run(f"{flags} --min_crop_area 0.9", "large", ONE)
    assert not same(usual[0]["model"], large[0]["model"])


def lrs(flags, name="run", preset=TINY):
    return [float(row["lr"]) for row in run(flags, name, preset)[1]]


def test_schedules_follow_their_flags():
    assert lrs("--scheduler constant --lr 0.01", "constant") == [0.01, 0.01]
    warm = lrs("--scheduler constant --lr 0.01 --warmup_epochs 1.5", "warm")
    assert warm[0] == pytest.approx(0.01 * 2 / 3)
    cosine = lrs("--scheduler cosine --lr 0.01", "cosine")
    assert cosine[0] == pytest.approx(0.01 * (1 + np.cos(np.pi / 4)) / 2)


def test_plateau_cuts_the_rate_by_its_factor_after_its_patience():
    flags = "--scheduler plateau --scheduler_args patience=1 factor=0.5 --min_delta 10 --lr 1e-4"
    # nothing gains by 10 after the first epoch: cut after epochs 3 and 5
    expected = [1e-4, 1e-4, 1e-4, 5e-5, 5e-5]
    assert lrs(f"{flags} --epochs 5") == pytest.approx(expected)


def test_early_stopping_waits_its_patience_and_ends_with_status_0():
    last, rows, log = run("--early_stopping 1 --min_delta 10 --epochs 9")
    assert len(rows) == 2 and last["finished"] and "early stopping" in log


def test_monitor_decides_what_is_best():
    _, rows, _ = run("--monitor train_loss")
    best = utils.load_checkpoint("runs/run/best.pt")
    assert best["metrics"]["train_loss"] == min(float(row["train_loss"]) for row in rows)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_each_process_scores_its_own_part_of_the_validation_samples(monkeypatch, ranks):
    """Means would hide that every process scores every sample, so samples are counted."""
    args, given = train.parse_flags(f"{SMALL} --batch_size 4 --max_samples 45".split())
    train.check_flags(args, given)
    state, run, _ = train.prepare(args)
    state.totals = train.zero_totals(run.task, run.device)
    fetch, seen = run.fetch["val"], [[] for _ in range(ranks)]
    monkeypatch.setattr(utils, "all_reduce", lambda totals, *_: totals)
    for rank, indices in enumerate(seen):
        monkeypatch.setattr(utils, "world", lambda: (rank, ranks))

        def noted(pieces):
            indices.extend(index for piece in pieces for index in piece.tolist())
            return fetch(pieces)

        run.fetch["val"] = noted
        train.validate(state, run)
    scored = sorted(index for indices in seen for index in indices)
    assert scored == list(range(len(run.source.splits["val"])))
    sizes = [len(indices) for indices in seen]
    assert max(sizes) - min(sizes) <= 2 * args.batch_size


def test_without_validation_data_a_run_trains_and_early_stopping_is_refused(capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3), np.uint8)
    np.savez("a.npz", x=pixels, y=np.arange(40) % 4)
    flags = "--data a.npz --val_fraction 0"
    assert "needs validation data" in refused(f"{TINY} {flags} --early_stopping 3", capsys)
    _, rows, _ = run(flags)
    assert "val_loss" not in rows[0] and Path("runs/run/best.pt").exists()


def test_amp_true_on_a_plain_cpu_trains_in_fp32_and_says_so(monkeypatch):
    monkeypatch.setattr(utils, "cpu_is_fast_in_bf16", lambda: False)
    assert "float32 (mixed precision gains nothing on this cpu)" in run("--amp True", preset=ONE)[2]
    cpu = torch.device("cpu")
    assert utils.pick_precision("auto", cpu)[0] == torch.float32
    monkeypatch.setattr(utils, "cpu_is_fast_in_bf16", lambda: True)
    assert utils.pick_precision("auto", cpu)[0] == torch.bfloat16


@pytest.mark.parametrize("amx, avx512", [(0, 0), (0, 1), (1, 0)])
def test_a_cpu_is_fast_in_bf16_with_amx_or_avx512_bf16(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    assert utils.cpu_is_fast_in_bf16() == bool(amx or avx512)
    for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, check)
    assert not utils.cpu_is_fast_in_bf16()


@pytest.mark.parametrize(
    "bf16, name, expected",
    [(1, "L4", "bfloat16"), (0, "T4", "float16"), (0, "GTX 1650", "float32")],
)
def test_amp_auto_on_cuda(monkeypatch, bf16, name, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bool(bf16))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {name}")
    assert utils.pick_precision("auto", torch.device("cuda"))[0] == getattr(torch, expected)


def test_cuda_is_set_up_and_capped(monkeypatch):
    device, calls = torch.device("cuda", 1), []
    monkeypatch.setattr(utils, "pick_device", lambda name: device)
    for name in ("set_device", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: calls.append(arguments))
    properties = SimpleNamespace(total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    for flag in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, flag, False)
    notes = utils.set_up_device("cuda:1", "fp16")[3]
    assert notes[-3:] == ["TF32", "cuDNN deterministic", "at most 7.6 GB"]
    notes = utils.set_up_device("cuda:1", "fp16", deterministic=False, memory_gb=4)[3]
    assert notes[-2:] == ["cuDNN benchmarked", "at most 4.0 GB"]
    assert torch.backends.cudnn.benchmark is True and torch.backends.cudnn.deterministic is False
    assert calls == [(device,), "high", (0.95, device), (device,), "high", (0.5, device)]
    assert utils.memory_cap(device, 100) == 8 * 2**30
    assert utils.memory_cap(torch.device("cpu")) == float("inf")


def test_compile_falls_back_to_eager_in_one_line(monkeypatch, plain):
    def no_compiler(net, mode):
        return lambda x: (_ for _ in ()).throw(RuntimeError("TritonMissing: no\nTriton"))

    monkeypatch.setattr(torch, "compile", no_compiler)
    last, _, log = run("--compile", preset=ONE)
    assert "not compiled (TritonMissing: no)" in log and same(plain, last["model"])


def test_a_compiled_model_takes_whole_batches_and_trains_as_the_bare_one(monkeypatch, plain):
    sizes = []

    def stand_in(net, mode):
        return lambda x: sizes.append(len(x)) or net(x)

    monkeypatch.setattr(torch, "compile", stand_in)
    last, _, log = run("--compile", preset=ONE)
    assert ", compiled (default)" in log and same(plain, last["model"])
    assert sizes == [16] * 4  # to try it, then three; the last batch of 12 is not compiled for


@pytest.mark.slow
def test_compile_trains_as_eager_does():
    eager, compiled = run("", "eager")[1], run("--compile", "compiled")
    assert ", compiled" in compiled[2]
    expected = float(compiled[1][0]["train_loss"])
    assert float(eager[0]["train_loss"]) == pytest.approx(expected, rel=1e-3)


def prepared(flags):
    """(state, run) as a training run has them before its first step."""
    args, given = train.parse_flags(flags.split())
    train.check_flags(args, given)
    return train.prepare(args)[:2]


def test_pretrained_takes_a_file_and_keeps_the_backbone(capsys):
    official = model.build_model("efficientnet_b0", 1000)
    torch.save(official.state_dict(), "b0.pth")
    flags = "--pretrained b0.pth --image_size 32 --max_samples 60"
    state, begun = prepared(flags)
    weight = lambda net: net.features[5][0].block[0][0].weight
    assert torch.equal(weight(state.model), weight(official))
    assert begun.meta["mean"] == [0.485, 0.456, 0.406]
    torch.save(model.build_model("custom", 10).state_dict(), "b0.pth")
    assert "features.0.0.weight is missing" in refused(flags, capsys)


def test_pretrained_alone_asks_for_the_official_weights(monkeypatch, capsys):
    official = model.build_model("efficientnet_b0", 1000).state_dict()
    monkeypatch.setattr(model, "official_weights", lambda: official)
    state, begun = prepared("--pretrained --image_size 32 --max_samples 60")
    name = "features.5.0.block.0.0.weight"
    assert torch.equal(state.model.state_dict()[name], official[name])
    assert begun.meta["std"] == [0.229, 0.224, 0.225]
    assert "only efficientnet_b0 has official weights" in refused(f"{TINY} --pretrained", capsys)


def test_pretrained_weights_of_a_run_bring_their_statistics_which_a_resumed_run_keeps(monkeypatch):
    rng = np.random.default_rng(0)
    dark = lambda classes: {"x": rng.integers(0, 90, (60, 24, 24, 3), dtype=np.uint8),
                            "y": np.arange(60) % classes}  # fmt: skip
    np.savez("dark.npz", **dark(3))
    run("--data dark.npz", "first", ONE)
    first = utils.load_checkpoint("runs/first/best.pt")["meta"]
    run_stopped(monkeypatch, 1, "--pretrained runs/first/best.pt", "second")
    shutil.rmtree("runs/first")
    assert attempt("--resume second") == 0
    found = utils.load_checkpoint("runs/second/best.pt")
    second = found["meta"]
    np.savez("ten.npz", **dark(10))
    flags = f"{TINY} --data ten.npz --pretrained runs/second/best.pt"
    other = prepared(flags)[0].model  # ten classes as well, but others
    assert not other.head.weight.any() and found["model"]["head.weight"].any()
    assert second["mean"] == first["mean"] and second["std"] == first["std"]
    assert len(second["classes"]) == 10
    assert prepared(TINY)[1].meta["mean"] != first["mean"]


def test_checkpoints_of_the_versions_before_are_weights_to_start_from(finished):
    """Those had no size at which images are stored, and lists for widths."""
    found = utils.load_checkpoint(finished[0] / "best.pt")
    del found["meta"]["stored_size"]
    found["meta"]["arguments"]["widths"] = list(found["meta"]["arguments"]["widths"])
    utils.save_checkpoint("old.pt", {"config": {"curriculum": 0}, **found})
    assert same(found["model"], prepared(f"{TINY} --pretrained old.pt")[0].model.state_dict())
    assert attempt("--evaluate old.pt") == 0


def test_find_lr_names_a_rate_and_writes_the_curve(capsys):
    assert attempt(f"{FEW} --find_lr --output curve.csv") == 0
    out = capsys.readouterr().out
    rows = Path("curve.csv").read_text().splitlines()
    assert rows[0] == "lr,loss" and len(rows) > 11 and not Path("runs").exists()
    rate = re.search(r"--lr ([^,]+),", out)[1]
    assert rate in [f"{float(row.split(',')[0]):.2e}" for row in rows[1:]]
    drawn = utils.importlib.util.find_spec("matplotlib") is not None
    assert Path("curve.png").exists() == drawn


def test_a_sweep_that_diverges_leaves_no_folder(monkeypatch, capsys):
    def diverging(*arguments, **keywords):
        raise ValueError("--find_lr: the loss diverged")

    monkeypatch.setattr(train, "find_lr", diverging)
    assert "diverged" in refused(f"{TINY} --find_lr --quiet", capsys)


def test_whitening_makes_patches_white_and_the_stem_stays():
    flags = "--model_args widths=24,16,32,48 depths=1,0,1 whiten=True"
    trained = run(flags, preset=ONE)[0]["model"]
    state, begun = prepared(f"{ONE} {flags}")
    assert torch.equal(trained["stem.0.weight"], state.model.stem[0].weight)
    assert trained["stage3.conv.weight"].shape == (48, 32, 3, 3)
    x = begun.task.prepare(torch.from_numpy(begun.source.splits["train"].images))
    y = torch.nn.functional.conv2d(x, trained["stem.0.weight"])[:, :12].transpose(0, 1).flatten(1)
    moments = y @ y.T / y.shape[1]
    strong = moments.diagonal() > 0.9  # directions of next to no variance are left small
    assert strong.sum() >= 3
    assert (moments - torch.diag(moments.diagonal())).abs().max() < 1e-2
    assert torch.allclose(moments.diagonal()[strong], torch.ones(int(strong.sum())), atol=0.1)


def test_tta_averages_six_views(finished):
    path, found = finished[0] / "best.pt", {}
    for name, flags in (("plain", []), ("tta", ["--tta"])):
        words = ["--evaluate", str(path), "--output", f"{name}.json", "--amp", "False", *flags]
        assert attempt(words) == 0
        result = json.loads(Path(f"{name}.json").read_text())
        found[name] = result if isinstance(result, dict) else result[0]
    net, meta, *_ = train.load_model(path, train.parse_flags(["--amp", "False"])[0])
    split = prepared(TINY)[1].source.splits["test"]
    x = data.centre(torch.from_numpy(split.images), 24, meta["mean"], meta["std"])
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    moved = [padded[:, :, i : i + 24, i : i + 24] for i in (0, 2)]
    with torch.inference_mode():
        both = lambda x: (net(x) + net(x.flip(3))) / 2
        logits = both(x) / 2 + both(moved[0]) / 4 + both(moved[1]) / 4
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(split.labels).long())
    assert found["tta"]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["tta"]["loss"] != found["plain"]["loss"]


def test_wandb_works_offline():
    pytest.importorskip("wandb")
    run("--wandb", preset=ONE)
    assert list(Path("runs/run/wandb").glob("offline-run-*"))


def test_a_missing_tracker_names_its_package(monkeypatch, capsys):
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: None)
    for package in ("tensorboard", "wandb"):
        assert f"pip install {package}" in refused(f"--{package}", capsys)


# ------------------------------------------------------------------------------------------ presets

PRESETS = json.loads((ROOT / "configs.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_and_says_only_what_differs(name):
    args, given = train.parse_flags(["--config", name])
    train.check_flags(args, given)
    for key, value in PRESETS[name].items():
        found = getattr(args, key)
        if isinstance(value, dict):
            tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
            assert found == tuples, key
        else:
            assert found == value, key
    defaults = vars(train.parse_flags([])[0])
    assert not [key for key in given.keys() - {"config", "model"} if given[key] == defaults[key]]


def test_flags_beat_the_preset_even_by_their_defaults_and_hyphens_are_accepted():
    args = train.parse_flags(["--batch-size", "4", "--clip-grad-norm=0.5"])[0]
    assert (args.batch_size, args.clip_grad_norm) == (4, 0.5)
    args = train.parse_flags("--config cifar10 --cutout 0".split())[0]
    assert PRESETS["cifar10"]["cutout"] == 8 and args.cutout == 0
    assert args.batch_size == PRESETS["cifar10"]["batch_size"]


def test_arguments_of_the_preset_stay_where_a_flag_names_others():
    words = "--config cifar10_fast --model_args depths=0,0,0 --scheduler_args anneal=cos"
    args, given = train.parse_flags(words.split())
    train.check_flags(args, given)
    assert args.model_args == {"widths": (24, 64, 256, 256), "whiten": True, "depths": (0, 0, 0)}
    preset = PRESETS["cifar10_fast"]["scheduler_args"]
    assert args.scheduler_args == {**preset, "anneal": "cos"}


def test_a_presets_accumulation_gives_way_to_an_effective_batch():
    args, given = train.parse_flags("--config custom_4gb --batch_size auto".split())
    assert args.effective_batch == 256 and "accumulation_steps" not in given
    words = "--config custom_4gb --batch_size 8 --effective_batch 24"
    args, given = train.parse_flags(words.split())
    assert args.effective_batch == 24 and "accumulation_steps" not in given


# ---------------------------------------------------------------------------------- what is refused

BAD_FLAGS = {
    "--epoch 3": "did you mean --epochs?",
    "--epochs 0": "--epochs: must be an integer at least 1, got '0'",
    "--epochs 1.5": "--epochs: must be an integer",
    "--batch_size -3": "--batch_size: must be",
    "--accumulation_steps 0": "--accumulation_steps: must be",
    "--lr nan": "--lr: must be a number above 0, got 'nan'",
    "--lr inf": "--lr: must be",
    "--lr 0": "--lr: must be",
    "--lr -1": "--lr: must be",
    "--clip_grad_norm -1": "--clip_grad_norm: must be",
    "--clip_grad_norm nan": "--clip_grad_norm: must be",
    "--ema_decay 1": "--ema_decay: must be a number at least 0 and below 1",
    "--val_fraction 1": "--val_fraction: must be",
    "--warmup_epochs 5 --epochs 3 --scheduler cosine": "--warmup_epochs 5: must be below --epochs",
    "CUSTOM --monitor speed": "give one of train_loss, train_accuracy, val_loss, val_accuracy",
    "--workers 1000": "--workers: must be",
    "--run_name ../x": "--run_name: must be",
    "--run_name a/b": "--run_name: must be",
    "--run_name " + "x" * 65: "1 to 64",
    "CUSTOM --batch_size 61": "there are 60 training samples",
    "--device cuda:99": "--device cuda:99",
    "--device tpu": "--device tpu",
    "--device cpu:x": "--device cpu:x",
    "--amp maybe": "--amp: invalid choice",
    "--model resnet": "--model: invalid choice",
    "--compile perhaps": "--compile: invalid choice",
    "--model custom --model_args widths=64,128": "widths: must be 4 integers",
    "CUSTOM --model_args widths=1,8,8,8": "widths: must be 4 integers from 2",
    "CUSTOM --model_args depths=1,-1,1": "depths: must be 3 integers from 0",
    "--model_args widths=24,64,256,256": "'widths': is no argument",
    "--model_args whiten=True": "'whiten': is no argument",
    "--model custom --model_args whiten=2": "whiten: must be True or False",
    "--model custom --model_args whiten": "must be KEY=VALUE",
    "--model custom --model_args num_classes=3": "'num_classes': is no argument",
    "--scheduler_args pct_start=2": "pct_start: must be from 0 to 1",
    "--scheduler_args patience=2": "'patience': is no argument",
    "--scheduler plateau --scheduler_args patience=x": "patience: must be an integer",
    "--tta": "--tta: needs --evaluate or --predict",
    "CUSTOM --effective_batch 24": "must be a multiple of --batch_size 16",
    "CUSTOM --effective_batch 9999999999": "--effective_batch 9999999999: there are 60 samples",
    "CUSTOM --batch_size auto --effective_batch 61": "no batch divides it",
    "--batch_size auto --accumulation_steps 4": "--accumulation_steps: follows from",
    "--effective_batch 8 --accumulation_steps 2": "--accumulation_steps: follows from",
    "CUSTOM --batch_size auto --memory_gb 0.001": "no batch divides it and fits in memory",
    "--compile --checkpoint_activations": "--checkpoint_activations: does not go with --compile",
    "--batch_size few": "must be an integer at least 1 or auto",
    "--memory_gb 0": "must be a number above 0",
    "--resume nothing": "no such run",
    "--resume": "no unfinished run with a checkpoint",
    "CUSTOM --cutout 24": "--cutout 24: must be below the image size, 24",
    "CUSTOM --crop_padding 24": "--crop_padding 24",
    "--config nothing": "is no preset; there are efficientnet_b0_4gb",
    "--data nowhere": "no such file or folder",
    "--evaluate nowhere.pt": "no such checkpoint",
    "CUSTOM --pretrained nowhere.pth": "no such checkpoint",
    "--model custom --image_size 20": "needs 24 px",
    "--image_size 28": "needs 32 px",
    "extra": "'extra' is no flag",
    "--epochs " + "9" * 400: "--epochs: must be",
    "--find_lr --output nowhere/a.csv": "must be a .csv file in a folder that exists",
    "--find_lr --output a.png": "must be a .csv file",
    "--evaluate a.pt --output a.txt": "must be a .json or .csv file",
    "--data=": "is empty",
    "--output a.json": "--output: needs --find_lr or --evaluate",
    "--sync_batchnorm": "is no flag",
    "--whiten": "is no flag",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_one_line_status_2_and_nothing_written(flags, capsys):
    error = refused(flags.replace("CUSTOM", SMALL), capsys)
    assert BAD_FLAGS[flags] in error and len(error) < 400
    assert not list(Path(".").iterdir())


def test_an_empty_run_name_and_control_characters_are_escaped(capsys):
    for argv in (["--run_name", ""], ["--data", "a\x1b[31m\nb"]):
        assert "\x1b" not in refused(argv, capsys)


BAD_CONFIGS = {
    '{"p": {"epochs": 3,}}': "configs.json: cannot be read as JSON",
    '{"p": {"epochs": 3, "epochs": 4}}': "key 'epochs' stands twice",
    '{"p": {"epoch": 3}}': "did you mean --epochs?",
    '{"p": {"epochs": true}}': "epochs: must be an integer at least 1, got 'True'",
    '{"p": {"epochs": "3"}}': "epochs '3': is of another type",
    '{"p": {"epochs": 2.5}}': "epochs: must be an integer",
    '{"p": {"lr": NaN}}': "lr: must be a number",
    '{"p": {"lr": Infinity}}': "lr: must be a number",
    '{"p": {"lr": 1e999}}': "lr: must be a number",
    '{"p": {"lr": null}}': "lr: must be a number",
    '{"p": {"lr": [1]}}': "lr: must be a number",
    '{"p": {"model": "resnet"}}': "model: invalid choice",
    '{"p": {"model": 3}}': "model: invalid choice",
    '{"p": {"run_name": "../x"}}': "run_name: must be",
    '{"p": {"resume": "x"}}': "resume 'x': is no flag for a preset",
    '{"p": {"model": "custom", "model_args": {"widths": [[1]]}}}': "widths: must be",
    '{"p": {"model": "custom", "model_args": {"width": 3}}}': "did you mean widths?",
    '["p"]': "must be an object of objects",
    '{"q": {}}': "there are q",
    "[" * 100_000: "recursion",
    b'{"p": "\xff"}': "position 7",
    None: "No such file",
}


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=[str(i) for i in range(len(BAD_CONFIGS))])
def test_a_bad_config_is_one_line_and_status_2(text, monkeypatch, capsys):
    if text is not None:
        Path("configs.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(train, "__file__", str(Path("train.py").resolve()))
    assert BAD_CONFIGS[text] in refused("--config p", capsys)


def bad_checkpoint(kind):
    if kind == "holds code":
        torch.save({"model": {}, "f": train.Task}, "a.pt")
    elif kind == "newer":
        torch.save({"format_version": 99}, "a.pt")
    elif kind == "truncated":
        torch.save({"w": torch.zeros(1000)}, "a.pt")
        os.truncate("a.pt", 900)
    elif kind == "text":
        Path("a.pt").write_text("hello")
    elif kind == "a tensor":
        torch.save(torch.zeros(3), "a.pt")
    else:
        torch.save({"w": torch.zeros(3)}, "a.pt")


@pytest.mark.parametrize(
    "kind, message",
    [("holds code", "more than tensors"), ("newer", "format 99"),
     ("truncated", "not a whole checkpoint"), ("text", "not a whole checkpoint"),
     ("a tensor", "holds a Tensor"), ("no metadata", "no metadata")],
)  # fmt: skip
def test_a_bad_checkpoint_is_one_line_and_status_2(kind, message, capsys):
    bad_checkpoint(kind)
    assert message in refused("--evaluate a.pt", capsys)


# ------------------------------------------------------------------------------------------- memory


def out_of_memory_at(monkeypatch, samples, calls=None):
    """Models raise as CUDA does where they train on more than `samples`, in calls so numbered."""
    seen, forward = [], model.CustomCNN.forward

    def limited(self, x):
        seen.append((len(x), self.training))
        if self.training and len(x) > samples and (calls is None or len(seen) in calls):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, x)

    monkeypatch.setattr(model.CustomCNN, "forward", limited)
    return seen


@pytest.mark.parametrize(
    "flags",
    ["--ema_decay 0.9 --optimizer sgd --clip_grad_norm 1", "--amp fp16 --optimizer muon",
     "--sam_rho 0.1"],
)  # fmt: skip
def test_a_run_that_is_out_of_memory_goes_on_as_the_small_batch_run(monkeypatch, flags):
    small = run(f"{flags} --batch_size 4 --accumulation_steps 8", "small")
    out_of_memory_at(monkeypatch, 4)
    large = run(flags, "large")
    assert "step 1: out of memory, done again; now 4 at once" in large[2]
    # 16, 8, then 4
    assert large[2].count("out of memory") == 1 and large[0]["micro_batch"] == 4
    for part in ("model", "ema", "optimizer"):
        assert same(small[0][part], large[0][part]), part
    assert small[1][0]["train_loss"] == large[1][0]["train_loss"]


def test_a_micro_batch_is_remembered_on_resume(monkeypatch):
    seen = out_of_memory_at(monkeypatch, 8)
    whole, copies = run_copied(monkeypatch, "")
    for name in copies:
        step = step_of(name)
        assert utils.load_checkpoint(f"runs/{name}/last.pt")["micro_batch"] == (8 if step else None)
        seen.clear()
        assert attempt(f"--resume {name}") == 0 and same_outcome(whole, outcome(name)), name
        assert ((16, True) in seen) == (step == 0)


def test_memory_runs_out_midway_and_the_step_changes_nothing_twice(monkeypatch):
    """The second of two batches fails: what the first has added is not counted again."""
    small = run("--batch_size 8 --accumulation_steps 4", "small", ONE)
    out_of_memory_at(monkeypatch, 8, calls=[4])  # two of the estimate, the first batch, the second
    found = run("", "found", ONE)
    assert "out of memory" in found[2] and same(small[0]["model"], found[0]["model"])


def test_not_even_two_samples_fit(monkeypatch, capsys):
    out_of_memory_at(monkeypatch, 0, calls=range(10, 10**6))
    assert attempt(f"{TINY} --run_name none") == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert "out of memory" in line and "go on from" in line
    out_of_memory_at(monkeypatch, 0)
    assert attempt(f"{TINY} --run_name early") == 1  # in the estimate, before a folder is made
    assert "smaller --batch_size" in capsys.readouterr().err and not Path("runs/early").exists()


def test_validation_keeps_to_the_micro_batch(monkeypatch):
    seen = out_of_memory_at(monkeypatch, 4)
    run(preset=ONE)
    assert max(size for size, training in seen if not training) == 8  # without gradients: twice 4


@pytest.mark.parametrize(
    "free, expected", [(1000, 24), (213, 12), (212, 8), (0, None)]  # 0.8 free >= 50 + 10 size
)
def test_batch_size_auto_is_the_largest_divisor_by_the_estimate(free, expected):
    args = SimpleNamespace(effective_batch=24, batch_size="auto", accumulation_steps=1)
    memory = {"weights": 30, "once": 20, "sample": 10 / 1.1}
    if expected is None:
        with pytest.raises(ValueError, match="no batch divides it"):
            train.settle_batch(args, 60, memory, free)
    else:
        train.settle_batch(args, 60, memory, free)
        assert args.batch_size == expected and args.accumulation_steps == 24 // expected


def test_effective_batch_settles_the_accumulation_and_no_batch_exceeds_the_samples():
    args = SimpleNamespace(effective_batch=96, batch_size="auto", accumulation_steps=1)
    train.settle_batch(args, 40, {"sample": 1}, 1e9)
    assert (args.batch_size, args.accumulation_steps) == (32, 3)
    args = SimpleNamespace(effective_batch=96, batch_size=16, accumulation_steps=1)
    train.settle_batch(args, 100, {"sample": 1}, 0)
    assert (args.batch_size, args.accumulation_steps) == (16, 6)


def test_batch_size_auto_trains_as_the_batch_that_it_chose():
    preset = f"{SMALL} --epochs 1 --workers 0 --effective_batch 24"
    free = run("--batch_size auto", "free", preset)
    assert "batch      24 x 1 accumulation" in free[2]
    state, begun = prepared(f"{preset} --batch_size 8")
    inputs, _ = begun.task.augment(*next(iter(begun.fetch["train"]([torch.arange(4)]))), 0)
    memory = model.estimate_memory(state.model, inputs)
    gb = (sum(memory.values()) + 10 * memory["sample"]) / 0.8 / 2**30  # for 8, and not for 12
    bound = run(f"--batch_size auto --memory_gb {gb!r}", "bound", preset)
    assert "batch      8 x 3 accumulation" in bound[2]
    fixed = run("--batch_size 8", "fixed", preset)
    assert same(fixed[0]["model"], bound[0]["model"])  # the estimate left no trace


@pytest.mark.parametrize(
    "name, amp", [("efficientnet_b0", "False"), ("sudoku_gnn", "bf16")]
)
def test_checkpointed_activations_train_bitwise_alike(name, amp):
    """The custom CNN is among the flags that leave the weights alone."""
    preset = f"--model {name} --max_samples 8 --batch_size 4 --epochs 1 --amp {amp}"
    if name == "sudoku_gnn":
        puzzles, solutions = data.generate(12, "easy", 0)
        Path("p.csv").write_text(data.sudoku_text(".csv", puzzles, solutions))
        preset += " --data p.csv --model_args grad_steps=3 free_steps=2 message_steps=4"
    else:
        preset += " --image_size 32"
    kept = run("", "kept", preset)[0]["model"]
    assert same(kept, run("--checkpoint_activations", "recomputed", preset)[0]["model"])


def test_moments_take_the_memory_format_of_the_device_that_resumes():
    """A run saved where the model is contiguous goes on where it is channels_last."""
    for optimizer in ("adamw", "sgd"):
        states = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2)
            net = torch.nn.Sequential(*layers).to(memory_format=memory_format)
            chosen = model.build_optimizer(net, optimizer, 0.1, 0.0, 0.9, torch.device("cpu"))
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            states.append(train.TrainState(net, chosen, scaler))
        task = train.Task(loss=lambda y, t: (y - t).square().sum())
        window = [(torch.randn(4, 3, 3, 3), torch.randn(4, 2), None)]
        train.train_step(states[0], window, task)
        states[1].load(copy.deepcopy(states[0].to_checkpoint()))
        for state in states:
            train.train_step(state, window, task)
        for p, moments in states[1].optimizer.state.items():
            assert all(value.stride() == p.stride() for value in moments.values()
                       if value is not None and value.ndim)  # fmt: skip
        for a, b in zip(*(state.model.parameters() for state in states)):
            assert torch.allclose(a, b, atol=1e-6)
