"""Several processes: the same steps as one, agreed by all, and what happens when one is lost.

The processes come from a fork server that imports the kit once; two of them do many things in turn.
"""

import contextlib
import copy
import csv
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import model as models
import train
import utils

usable = os.name == "posix" and torch.distributed.is_available()
pytestmark = pytest.mark.skipif(not usable, reason="needs a fork server and gloo")
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

# ------------------------------------------------------------------------- starting processes


def free_ports(count):
    with contextlib.ExitStack() as held:  # all at once, so that they differ
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def default_signals():
    """Undoes what nohup or a shell's background job left ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def enter(folder, variables, function, arguments):
    """The life of a process: function(*arguments), whose result is its exit status."""
    default_signals()
    os.chdir(folder)
    os.environ.update(variables)
    rank = variables["RANK"]
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{name}{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    torch.set_num_threads(1)
    utils.save_history = lambda *all: False
    status = function(*arguments)
    sys.stdout.flush()
    os._exit(status or 0)


def start(function, *arguments, count=2, folders=None, **variables):
    """Processes of torch.distributed that call function(*arguments); they print to out0.txt ..."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", __name__])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    shared = {"WORLD_SIZE": str(count), **address, **variables}
    found = []
    with pytest.MonkeyPatch.context() as patch:  # for the fork server's imports
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        for rank in range(count):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            folder = folders[rank] if folders else os.getcwd()
            process = context.Process(target=enter, args=(folder, own, function, arguments))
            process.start()
            found.append(process)
    return found


def statuses(processes, seconds=90):
    """The exit codes of processes, which are killed where they take longer."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def in_turn(jobs, ports):
    """Does each job {name: function}; its status, output and errors go to NAME.RANK.json."""
    for (name, function), port in zip(jobs.items(), ports):
        os.environ["MASTER_PORT"] = str(port)
        target = Path(f"{name}.{os.environ['RANK']}")
        with open(f"{target}.out", "w") as out, open(f"{target}.err", "w") as err:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    status = function()
                except BaseException:
                    traceback.print_exc()
                    status = -1
        texts = {kind: Path(f"{target}.{kind}").read_text() for kind in ("out", "err")}
        Path(f"{target}.json").write_text(json.dumps({"status": status, **texts}))


def session(jobs, apart=None):
    """Two processes do the jobs in turn, the second in the folder `apart`: {name: two results}."""
    folders = [Path.cwd(), Path(apart or ".").absolute()]
    codes = statuses(start(in_turn, jobs, free_ports(len(jobs)), folders=folders), 300)
    found = {}
    for name in jobs:
        paths = [folder / f"{name}.{rank}.json" for rank, folder in enumerate(folders)]
        results = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
        missing = {"status": "never ended", "out": "", "err": ""}
        found[name] = [SimpleNamespace(**{**missing, **result}) for result in results]
    texts = [(folder / f"err{rank}.txt").read_text()[-2000:] for rank, folder in enumerate(folders)]
    assert codes == [0, 0], (codes, texts)
    return found


def ended(results, *expected):
    assert [result.status for result in results] == list(expected), [r.err[-3000:] for r in results]


# ------------------------------------------------------------------------------- single steps

TASK = train.Task(  # class 0 is no item, as a clue of a puzzle is none
    loss=lambda y, t: nn.functional.cross_entropy(y, t - 1, ignore_index=-1, reduction="sum"),
    measure=lambda y, t: ((y.argmax(1) == t - 1).sum()[None], (t > 0).sum()),
    metrics=("accuracy",),
    items=lambda t: (t > 0).sum(),
)
# Windows of up to two batches in each of two processes: even ones, one with a batch more in the
# first process, one without any batch in the second.
SIZES = [(4, 3, 4, 2), (4, 5, 4, 4), (4, 4, 3), (5,), (4, 4, 4, 4)]
# "fail" is the place, the step and the call of `augment` within it at which the second process runs
# out of memory; the first two calls are the first pass.
CASES = {
    "plain": {},
    "clipped": {"clip_grad_norm": 0.1},
    "sharpness-aware": {"sam_rho": 0.1},
    "half precision": {"fp16": True, "clip_grad_norm": 0.1},
    "with norm": {"norm": True},
    "not finite": {"poison": True, "norm": True},
    "no items in one process": {"blank": True},
    "stopped": {"stop": True},
    "compiled": {"compiled": True, "norm": True},
    "memory out in augment": {"fail": ("augment", 1, 2)},
    "memory out in a first batch": {"fail": ("augment", 1, 1), "norm": True},
    "memory out in an only batch": {"fail": ("augment", 2, 1), "clip_grad_norm": 0.1},
    "memory out in loss": {"fail": ("loss", 1, 2), "norm": True},
    "memory out in measure": {"fail": ("measure", 1, 2)},
    "memory out in backward": {"fail": ("backward", 1, 2)},
    "memory out in a second pass": {"fail": ("loss", 1, 4), "sam_rho": 0.1, "norm": True},
    "memory out in fp16": {"fail": ("backward", 4, 2), "fp16": True, "stop": True},
}


def make(fp16=False, norm=False):
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(16)] * norm
    net = nn.Sequential(nn.Linear(6, 16, bias=not norm), *norms, nn.Tanh(), nn.Linear(16, 3))
    net.to(torch.float32 if fp16 else torch.float64)
    optimizer = models.build_optimizer(net, "adamw", 0.1, 0.01, 0.9, CPU)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    return train.TrainState(net, optimizer, scaler, train.start_ema(net))


def window_of(number, case):
    """The batches of all processes for a step; the odd ones are the second process's."""
    torch.manual_seed(number)
    count, dtype = sum(SIZES[number]), torch.float32 if case.get("fp16") else torch.float64
    x, y = torch.randn(count, 6, dtype=dtype), torch.randint(0, 4, (count,))
    y[0] = 1  # the first batch of all has an item
    window = list(zip(*(column.split(SIZES[number]) for column in (x, y, torch.arange(count)))))
    if case.get("poison") and number == 1:
        window[1][0][0, 0] = float("nan")
    if case.get("blank") and number == 1:
        for _, targets, _ in window[1::2]:
            targets.zero_()
    return window


def running_out(state, place, step, call):
    """(task, augment) that run out of memory at a place in a step, with more than 3 samples."""
    calls = []

    def at(here, x):
        calls.extend([state.step] * (here == "augment"))
        if here == place and state.step == step and calls.count(step) >= call and len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    def loss(y, t):
        if place == "backward":
            y.register_hook(lambda gradient: at("backward", gradient))
        return TASK.loss(at("loss", y), t)

    measure = lambda y, t: TASK.measure(at("measure", y), t)
    augment = lambda x, t, index: (at("augment", x), t)
    return dataclasses.replace(TASK, loss=loss, measure=measure), augment


def eager(inner):
    """torch.compile with all but the compiler of C++, which takes half a minute when it is cold."""
    return partial(inner, backend="aot_eager")


def take_steps(case, state, step):
    """What is known after each step(state, number, options): tensors and numbers."""
    options = {key: case[key] for key in ("clip_grad_norm", "sam_rho") if key in case}
    found = []
    for number in range(len(SIZES)):
        totals, norm, good = step(state, number, {**options, "ema_decay": 0.9, "seed": number})
        copied = copy.deepcopy([dict(state.model.state_dict()), state.ema])
        found.append({
            "tensors": copied, "totals": totals.tolist(), "norm": norm, "good": good,
            "micro_batch": state.micro_batch, "scale": state.scaler.get_scale(), "stop": state.stop,
        })  # fmt: skip
    return found


def steps_of_a_process(case):
    """The steps that this process takes with the others; None where nothing can be compiled."""
    rank, ranks = utils.world()
    state = make(case.get("fp16", False), case.get("norm", False))
    task, augment, state.share = TASK, train.unchanged, train.share_among_processes
    if case.get("compiled"):
        example = torch.randn(4, 6, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", eager(torch.compile))
            state.forward, _ = models.compile_model(state.model, example, "default")
        if state.forward is None:
            return None
    if "fail" in case and rank == 1:
        task, augment = running_out(state, *case["fail"])

    def step(state, number, options):
        state.stop = bool(case.get("stop")) and rank == 1 and number == 2
        windows = train.fetch_windows(iter, window_of(number, case), 4 // ranks)
        [(mine, _)] = windows
        return train.train_step(state, mine, task, augment, **options)

    return take_steps(case, state, step)


def steps_of_one_process(case):
    """The reference: one process has all batches, and BatchNorm's statistics worked out.

    Those of two processes are the mean of what each has from its own batches. Where memory ran out
    in the second process, its batches are halved.
    """
    state = make(case.get("fp16", False), case.get("norm", False))

    def statistics(window):
        net = copy.deepcopy(state.model).train()
        for images, *_ in window:
            net(images)
        return [buffer for buffer in net.buffers() if buffer.is_floating_point()]

    def step(state, number, options):
        window = window_of(number, case)
        shares = [window[0::2], window[1::2]]
        if "fail" in case and number >= case["fail"][1]:
            shares[1] = train.split(shares[1], 2)
        expected = [(a + b) / 2 for a, b in zip(*map(statistics, shares))]

        def share(state, totals, failed):
            own = [buffer for buffer in state.buffers if buffer.is_floating_point()]
            for buffer, value in zip(own, expected):
                buffer.copy_(value)
            return totals, failed

        state.share = share
        return train.train_step(state, sum(shares, []), TASK, **options)

    return take_steps(case, state, step)


def all_cases():
    with utils.processes("cpu", 30):
        found = {name: steps_of_a_process(case) for name, case in CASES.items()}
        torch.save(found, f"steps{utils.world()[0]}.pt")


# ---------------------------------------------------------------------------------- whole runs

# 60 samples in batches of 12: a window of four and one of a single batch, of which one process has
# none; two steps an epoch.
TINY = (
    "--model custom --model_args widths=8,16,32,48 --image_size 24 --max_samples 60 --epochs 2 "
    "--batch_size 12 --amp False --ema_decay 0.9 --clip_grad_norm 1 --optimizer sgd "
    "--save_every 1 --quiet --timeout 30"
)
TWO = f"{TINY} --accumulation_steps 2 --run_name"


def main(flags, rank=None, where=None, instead=None, **variables):
    """The status of train.main with the flags (of each process, where they are a list).

    In the process `rank`, or in all, the function `where` is replaced by instead(function).
    """
    own = os.environ.get("RANK", "0")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        if where and str(rank) in (own, "None"):
            owner, name = where.split(".")
            patch.setattr(sys.modules[owner], name, instead(getattr(sys.modules[owner], name)))
        try:
            return train.main((flags if isinstance(flags, str) else flags[int(own)]).split())
        except SystemExit as stopped:
            return stopped.code


def at_call(n, act, inner):
    """inner, before whose n-th call act() happens."""
    calls = []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == n:
            act()
        return inner(*arguments, **options)

    return call


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(1000)


def diverge():
    raise FloatingPointError("diverged")


def poisoned(inner):
    def augment(*arguments, **options):
        inputs, targets = inner(*arguments, **options)
        return inputs * float("inf"), targets

    return augment


def older(inner):
    return lambda *arguments, **options: {**inner(*arguments, **options), "step": 1}


VARIANTS = {  # run: more flags
    "whole": "",
    "averaged": "--swa_start_epoch 1 --sam_rho 0.1 --mixup 0.3",
    "compiled": "--compile",
}
STOPPED = {  # run: the process that gets a signal; before which call; where the run stops; its step
    "in_step": (1, "train.train_step", 1, "at step 2", 2),
    "in_validation": (1, "train.outputs_of", 1, "in the validation of epoch 1", 2),
    "after_epoch": (0, "utils.write_csv", 1, "after epoch 1", 2),
}
LOST = {  # run: what happens to the second process in the third step; what the first says; timeout
    "died": (die, "another process ended", 30),
    "hung": (hang, "another process was silent for 4 s", 4),
}
RESTARTS = {"TORCHELASTIC_MAX_RESTARTS": "3"}
REFUSED = {  # name: the flags of both processes, their variables, the message
    "seeds": (["--seed 1", "--seed 2"], {}, "the processes have different flags"),
    "networks": (["--model_args widths=8,8,8,8", ""], {}, "the processes have different flags"),
    "names": (["--run_name r0", "--run_name r1"], {}, "the processes have different flags"),
    "datas": (["--data 0.npz", "--data 1.npz"], {}, "the processes have different data"),
    "mps": (["--device mps"] * 2, {}, "--device mps: not on this machine"),
    "address": ([""] * 2, {"MASTER_ADDR": ""}, "MASTER_ADDR: is not set, others of torchrun's"),
    "effective": (["--effective_batch 36"] * 2, {}, "multiple of --batch_size 12 times 2 process"),
    "auto": (["--batch_size auto --effective_batch 33"] * 2, {}, "no batch divides it"),
    "evaluate": (["--evaluate best.pt"] * 2, {}, "--evaluate"),
    "restarts": ([""] * 2, RESTARTS, "--max_restarts needs --resume --run_name"),
    "resume_alone": (["--resume"] * 2, RESTARTS, "--max_restarts needs --resume --run_name"),
}


def begun_jobs():
    jobs = {"steps": all_cases}
    for name, flags in VARIANTS.items():
        jobs[name] = partial(main, f"{TWO} {name} {flags}")
    jobs["compiled"] = partial(jobs["compiled"], None, "torch.compile", eager)
    for name, (rank, where, n, _, _) in STOPPED.items():
        jobs[name] = partial(main, f"{TWO} {name}", rank, where, partial(at_call, n, terminate))
    few = f"{TINY} --batch_size 2 --save_every 0 --run_name bad"
    jobs["bad"] = partial(main, few, 1, "train.augment_images", poisoned)
    never = "--epochs 9 --early_stopping 1 --min_delta 1"
    jobs["impatient"] = partial(main, f"{TWO} impatient {never}")
    auto = "--batch_size auto --effective_batch 24"
    jobs["chosen"] = partial(main, f"{TINY} --run_name chosen {auto}")
    sweep = "--find_lr --max_samples 24 --batch_size 24 --output curve.csv"  # one batch for two
    jobs["swept"] = partial(main, f"{TINY} {sweep}")
    for name, (flags, variables, _) in REFUSED.items():
        both = [own if name in ("evaluate", "resume_alone") else f"{TINY} {own}" for own in flags]
        jobs[name] = partial(main, both, **variables)
    return jobs


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The folder of all that the processes of this file write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("processes"))
        patch.setattr(utils, "save_history", lambda *all: False)
        yield Path.cwd()


@pytest.fixture(scope="module")
def begun(folder):
    """What two processes did that stand in two folders, so that what the second writes is seen."""
    (folder / "apart").mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 24, 24, 3), np.uint8)
    for rank, where in enumerate((folder, folder / "apart")):
        np.savez(where / f"{rank}.npz", x=images, y=np.arange(30) % (3 + rank))
    return session(begun_jobs(), "apart")


@pytest.fixture(scope="module")
def lost(begun):
    """Two pairs of processes, the second of which dies or hangs; the first one's status."""
    found = {}
    for name, (act, _, seconds) in LOST.items():
        flags = f"{TWO} {name} --timeout {seconds}"
        processes = start(main, flags, 1, "train.train_step", partial(at_call, 3, act))
        processes[0].join(60)
        found[name] = processes[0].exitcode, Path("err0.txt").read_text()
        statuses(processes, 0)
    return found


@pytest.fixture(scope="module")
def resumed(begun, lost):
    """What two processes did that go on with runs."""
    shutil.copytree("runs/in_validation", "runs/alone")
    shutil.copytree("runs/in_validation", "runs/three")
    one = f"{TINY} --accumulation_steps 4 --run_name of_one"
    assert main(one, 0, "train.train_step", partial(at_call, 3, diverge)) == 1
    jobs = {"differing": partial(main, "--resume in_step", 1, "utils.load_newest", older)}
    for name in [*STOPPED, *LOST, "of_one", "whole"]:
        jobs[f"again_{name}"] = partial(main, f"--resume {name} --quiet --timeout 30")
    return session(jobs)


def read_csv(path):
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def rows_of(name):
    return read_csv(Path("runs") / name / "metrics.csv")


def last(name):
    return utils.load_checkpoint(Path("runs") / name / "last.pt")


def same(a, b):
    """Whether two checkpoints have the same tensors, bit by bit."""
    parts = ("model", "ema", "optimizer", "swa")
    a, b = ({part: found[part] for part in (*parts, "step")} for found in (a, b))
    pairs = zip(utils.tensors(a), utils.tensors(b), strict=True)
    return a["step"] == b["step"] and all(x == y and torch.equal(t, u) for (x, t), (y, u) in pairs)


def close(a, b):
    """Whether they are alike but for rounding; BatchNorm's statistics but for a step's order."""
    loose = lambda key: dict(rtol=0.05, atol=0.02) if "running" in key else dict(atol=1e-5)
    plain = [key for key in a["model"] if "num_batches" not in key]
    return all(torch.allclose(a["model"][key], b["model"][key], **loose(key)) for key in plain)


# --------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one_to_eleven_digits(begun, name):
    ended(begun["steps"], None, None)
    case = CASES[name]
    paths = "steps0.pt", "apart/steps1.pt"
    first, second = (torch.load(path, weights_only=True)[name] for path in paths)
    if first is None:
        pytest.skip("torch.compile does not work here")
    bound = 1e-5 if case.get("fp16") else 1e-11
    for number, one in enumerate(steps_of_one_process(case)):
        mine, other = first[number], second[number]
        for part in range(2):  # weights and buffers, EMA
            for key, expected in one["tensors"][part].items():
                if "num_batches" not in key:
                    found = mine["tensors"][part][key]
                    assert torch.equal(found, other["tensors"][part][key]), (number, key)
                    assert torch.allclose(found, expected, rtol=0, atol=bound), (number, key)
        for key in ("totals", "norm", "good", "scale", "stop"):
            assert repr(mine[key]) == repr(other[key]), (number, key)
        assert (mine["good"], mine["scale"]) == (one["good"], one["scale"])
        assert mine["good"] == (not ("poison" in case and number == 1))
        assert mine["stop"] == ("stop" in case and number == 2)
        for a, b in zip(sum(mine["totals"], []), sum(one["totals"], [])):
            assert a == pytest.approx(b, rel=bound, nan_ok=True), number
        assert mine["norm"] == pytest.approx(one["norm"], rel=max(bound, 1e-9), nan_ok=True)
        failed = "fail" in case and number >= case["fail"][1]
        assert (mine["micro_batch"], other["micro_batch"]) == (None, 2 if failed else None)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_of_two_processes_is_the_run_of_one(begun, name):
    ended(begun[name], 0, 0)
    text = begun[name][0].out
    assert "12 x 2 accumulation x 2 processes = 48 | 2 steps an epoch" in text
    if "not compiled (" in text:
        pytest.skip("torch.compile does not work here")
    assert ("compiled (default)" in text) == (name == "compiled")
    flags = VARIANTS[name].replace("--compile", "")
    assert main(f"{TINY} --accumulation_steps 4 --run_name one_{name} {flags}") == 0
    one, two = last(f"one_{name}"), last(name)
    assert close(one, two) and one["step"] == two["step"] == 4
    for a, b in zip(rows_of(f"one_{name}"), rows_of(name), strict=True):
        assert a["train_accuracy"] == b["train_accuracy"] or "--mixup" in flags
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5) and a["lr"] == b["lr"]
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)
        assert round(b["val_accuracy"] * 60, 6) % 1 == 0  # 60 samples, none counted twice


def test_the_first_process_alone_writes_and_prints(begun, folder):
    assert not (folder / "apart/runs").exists() and not (folder / "apart/curve.csv").exists()
    assert not any(results[1].out for results in begun.values())
    assert (folder / "runs/whole/last.pt").exists()


@pytest.mark.parametrize("name", STOPPED)
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_bitwise(begun, resumed, name):
    _, _, _, where, step = STOPPED[name]
    ended(begun[name], 143, 143)
    assert f"stopped {where}; go on with: python train.py --resume {name}" in begun[name][0].out
    ended(resumed[f"again_{name}"], 0, 0)
    assert f"resumed at step {step}" in resumed[f"again_{name}"][0].out
    assert same(last("whole"), last(name))


def test_a_run_goes_on_with_another_number_of_processes_that_divides_a_step(begun, resumed):
    assert main("--resume alone --quiet") == 0
    assert close(last("whole"), last("alone")) and last("alone")["step"] == 4
    assert last("alone")["flags"]["settled"]["accumulation_steps"] == 4
    ended(resumed["again_of_one"], 0, 0)
    assert "resumed at step 2" in resumed["again_of_one"][0].out
    assert close(last("whole"), last("of_one")) and last("of_one")["step"] == 4
    assert last("of_one")["flags"]["settled"]["accumulation_steps"] == 2
    assert statuses(start(main, "--resume three", count=3)) == [2, 2, 2]
    for rank in range(3):
        assert "which 3 processes cannot share alike" in Path(f"err{rank}.txt").read_text()


@pytest.mark.parametrize("name", LOST)
def test_a_process_that_dies_or_hangs_ends_the_other_and_the_run_goes_on(lost, resumed, name):
    status, errors = lost[name]
    assert status == 1 and "Traceback" not in errors
    log = (Path("runs") / name / "log.txt").read_text()
    assert f"error: {LOST[name][1]}; go on from the last good checkpoint with" in log
    ended(resumed[f"again_{name}"], 0, 0)
    assert same(last("whole"), last(name))


def test_bad_steps_in_one_process_end_all_and_keep_the_last_good_checkpoint(begun):
    ended(begun["bad"], 1, 1)
    count = train.MAX_BAD_STEPS
    assert f"step {count}: {count} steps in a row were not finite" in begun["bad"][0].out
    [line] = begun["bad"][1].err.splitlines()
    assert line.startswith("error: process 1:") and "steps in a row" in line
    found = last("bad")
    assert found["bad_steps"] == found["step"] == 15  # of the first epoch
    assert all(tensor.isfinite().all() for _, tensor in utils.tensors(found["model"]))


def test_early_stopping_ends_all_processes_in_the_same_epoch(begun):
    ended(begun["impatient"], 0, 0)
    assert len(rows_of("impatient")) == 2 and last("impatient")["finished"]
    assert "early stopping" in begun["impatient"][0].out


def test_what_is_chosen_by_measurements_is_chosen_by_all(begun):
    ended(begun["chosen"], 0, 0)
    flags = last("chosen")["flags"]
    assert flags["processes"] == 2 and 1e-6 < flags["settled"]["lr"] < 10
    assert flags["settled"]["batch_size"] * flags["settled"]["accumulation_steps"] == 12
    ended(begun["swept"], 0, 0)  # one batch for two processes
    assert len(read_csv("curve.csv")) >= 10


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_suit_several_processes_is_one_line_and_status_2(begun, name):
    ended(begun[name], 2, 2)
    for rank, result in enumerate(begun[name]):
        [line] = result.err.splitlines()
        assert line.startswith("error: " + "process 1: " * rank) and REFUSED[name][2] in line


def test_checkpoints_that_differ_and_a_run_that_ended_are_not_gone_on_with(resumed):
    messages = {"differing": "the processes have different checkpoints",
                "again_whole": "finished already"}
    for name, message in messages.items():
        ended(resumed[name], 2, 2)
        assert all(message in result.err for result in resumed[name])


def test_torchrun_starts_a_run_again_that_lost_a_process_and_it_ends_as_if_nothing_were(begun):
    Path("fragile.py").write_text(
        "import os, pathlib, signal, sys\n"
        "import train, utils\n"
        "inner, died = train.train_step, pathlib.Path('died')\n"
        "def step(state, *arguments, **options):\n"
        "    if state.step == 3 and os.environ['RANK'] == '1' and not died.exists():\n"
        "        died.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return inner(state, *arguments, **options)\n"
        "train.train_step = step\n"
        "utils.save_history = lambda *all: False\n"
        "sys.exit(train.main())\n"
    )
    torchrun = f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_ports(1)[0]}"
    words = f"{torchrun} --max_restarts 1 fragile.py {TWO} restarted --resume".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True,
                          timeout=150, preexec_fn=default_signals)
    assert done.returncode == 0 and Path("died").exists(), done.stderr[-3000:]
    assert "resumed at step 3" in done.stdout
    assert same(last("whole"), last("restarted"))
