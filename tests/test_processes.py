"""Several processes: the same steps as one, counted once, agreed by all, and what happens when one is lost."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
import utils

pytestmark = pytest.mark.skipif(os.name != "posix" or not torch.distributed.is_available(), reason="needs forkserver")
ROOT = Path(__file__).resolve().parent.parent
# 60 samples in batches of 12: a window of four and one of a single batch, in which one process has none
TINY = ("--model custom --widths 8,16,32,48 --image_size 24 --max_samples 60 --batch_size 12 --epochs 2 --amp False "
        "--ema_decay 0.9 --clip_grad_norm 1 --optimizer sgd --quiet --timeout 60").split()  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the fork server, which imports train once for all
    monkeypatch.setattr(utils, "save_history", lambda *all: False)


def enter(folder, variables, function, arguments):
    os.chdir(folder)
    os.environ.update(variables)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{variables['RANK']}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    torch.set_num_threads(1)
    utils.save_history = lambda *all: False
    status = function(*arguments)
    sys.stdout.flush()
    os._exit(status or 0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(function, *arguments, count=2, folders=None, **variables):
    """Processes of torch.distributed that each call function(*arguments); out0.txt, err0.txt … have what they print."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables}
    found = []
    for rank in range(count):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        folder = folders[rank] if folders else os.getcwd()
        found.append(context.Process(target=enter, args=(folder, own, function, arguments)))
        found[-1].start()
    return found


def statuses(processes, seconds=90):
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def together(function, *arguments, **options):
    codes = statuses(start(function, *arguments, **options))
    assert codes == [0] * len(codes), (codes, [path.read_text()[-2000:] for path in sorted(Path().rglob("err*.txt"))])


def make(dtype=torch.float64, fp16=False, norm=False, width=16):
    torch.manual_seed(0)
    nn = torch.nn
    norms = [nn.BatchNorm1d(width)] * norm
    net = nn.Sequential(nn.Linear(6, width, bias=not norm), *norms, nn.Tanh(), nn.Linear(width, 3)).to(dtype)
    optimizer = train.build_optimizer(net, "adamw", 0.1, 0.01, 0.9, torch.device("cpu"))
    state = train.TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=fp16), train.start_ema(net))
    train.distribute(state)
    return state


def window_of(sizes, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    x, y = torch.randn(sum(sizes), 6, dtype=dtype), torch.randint(0, 4, (sum(sizes),))
    y[0] = 1  # the first batch of all has an item
    return list(zip(x.split(sizes), y.split(sizes), torch.arange(sum(sizes)).split(sizes)))


TASK = train.Task(  # class 0 is no item, as a clue of a puzzle is none
    loss=lambda y, t: torch.nn.functional.cross_entropy(y, t - 1, ignore_index=-1, reduction="sum"),
    measure=lambda y, t: ((y.argmax(1) == t - 1).sum()[None], (t > 0).sum()),
    metrics=("accuracy",), items=lambda t: (t > 0).sum(),
)  # fmt: skip
WIDE = 20_000  # 1.6 MB of weights: more than the first bucket that DDP would make by itself
CASES = {
    "plain": {}, "clipped": {"clip_grad_norm": 0.1}, "sharpness-aware": {"sam_rho": 0.1}, "half precision": {"fp16": 1},
    "with norm": {"norm": True}, "not finite": {"poison": 1},
    **{f"memory out in {place}": {"fail": (place, 5), "width": WIDE} for place in ("augment", "loss", "backward")},
    "memory out in measure": {"fail": ("measure", 5)}, "memory out in a first batch": {"fail": ("augment", 3)},
    "memory out in a sharpness-aware pass": {"sam_rho": 0.1, "fail": ("loss", 6)},
    "memory out with norm": {"norm": True, "fail": ("loss", 5)},
}  # fmt: skip
# windows of up to two batches in each of two processes; uneven ones, also at the place where memory runs out
SIZES = [(4, 3, 4, 2), (4, 5, 4, 4), (4, 4, 3), (5,), (4, 4, 4, 4)]


def failing(task, place, n):
    """(task, augment) that run out of memory at a place from the n-th batch on where it has more than 3 samples."""
    calls = []

    def at(here, x):
        calls.extend([1] * (here == "augment"))
        if here == place and len(calls) >= n and len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    def loss(y, t):
        if place == "backward":
            y.register_hook(lambda gradient: at("backward", gradient))
        return task.loss(at("loss", y), t)

    measure = lambda y, t: task.measure(at("measure", y), t)
    return dataclasses.replace(task, loss=loss, measure=measure), lambda x, t, index: (at("augment", x), t)


def steps_of(case, rank=0, ranks=1):
    """[[state dict, EMA, sums, norm, good, micro-batch, scale]] of a few steps of one case."""
    case = dict(case)
    options = {key: case.pop(key) for key in ("fp16", "norm", "width") if key in case}
    dtype = torch.float32 if "fp16" in options else torch.float64
    fail, poison = case.pop("fail", None), case.pop("poison", None)
    state, found, task, augment = make(dtype, **options), [], TASK, train.keep_both
    if fail and rank == 1:
        task, augment = failing(TASK, *fail)
    for number, sizes in enumerate(SIZES):
        window = window_of(sizes, number, dtype)
        if poison and number == 1:
            window[1][0][0, 0] = float("nan")
        for mine, counted, _ in train.shared_windows(lambda mine: mine, window, 4 // ranks):
            sums, norm, good = train.train_step(state, mine, task, augment, ema_decay=0.9, seed=number, counted=counted,
                                                **case)  # fmt: skip
        copied = {k: v.detach().clone() for k, v in state.model.state_dict().items()}
        found.append([copied, {k: v.clone() for k, v in state.ema.items()}, list(map(float, (*sums[:2], *sums[2]))),
                      norm, good, state.micro_batch, state.scaler.get_scale()])  # fmt: skip
    return found


def all_cases():
    with utils.processes("cpu", 30):
        rank, ranks = utils.world()
        torch.save({name: steps_of(case, rank, ranks) for name, case in CASES.items()}, f"found{rank}.pt")


def test_two_processes_take_the_steps_of_one_to_eleven_digits():
    together(all_cases)
    found = [torch.load(f"found{rank}.pt", weights_only=True) for rank in range(2)]
    for name, case in CASES.items():
        expected = steps_of(case)
        bound = 1e-5 if "fp16" in case else 1e-11
        for number, one in enumerate(expected):
            two, other = found[0][name][number], found[1][name][number]
            for key in one[0]:
                assert torch.equal(two[0][key], other[0][key]) or "num_batches" in key, (name, number, key)
                if "running" not in key and "num_batches" not in key:
                    for part in range(2):
                        # BatchNorm over halves is another one: that ranks agree is what is left to see
                        assert ("norm" in case and "fail" in case) or \
                            torch.allclose(one[part][key], two[part][key], rtol=0, atol=bound), (name, number, key)
            assert repr(two[2:]) == repr(other[2:]), (name, number)
            assert two[4] == one[4] and two[6] == one[6]
            if not ("norm" in case and "fail" in case):
                assert two[2] == pytest.approx(one[2], rel=bound, nan_ok=True), (name, number)
                assert two[3] == pytest.approx(one[3], rel=max(bound, 1e-9), nan_ok=True)
        assert (found[0][name][-1][5] == 2) == ("fail" in case), name


# ---------------------------------------------------------------------------------------- whole runs


def rows_of(name):
    return utils.read_metrics(Path("runs") / name / "metrics.csv")


def last(name):
    return utils.load_checkpoint(Path("runs") / name / "last.pt")


def same(a, b):
    """Whether two checkpoints have the same tensors, bit by bit."""
    parts = ("model", "ema", "optimizer", "swa")
    pairs = zip(*(utils.tensors({part: found[part] for part in parts}) for found in (a, b)))
    return all(x == y and torch.equal(t, u) for (x, t), (y, u) in pairs) and a["step"] == b["step"]


def close(a, b):
    """Whether they are alike but for rounding; BatchNorm's statistics but for the weights within a step."""
    loose = lambda key: dict(rtol=0.05, atol=0.02) if "running" in key else dict(atol=1e-5)
    plain = [key for key in a["model"] if "num_batches" not in key]
    return all(torch.allclose(a["model"][key], b["model"][key], **loose(key)) for key in plain)


@contextlib.contextmanager
def at_step(step, act):
    """Calls act() within the step of that number, counted from 0, of the run that is trained in the block."""
    inner = train.train_step

    def acting(state, *arguments, **options):
        if state.step == step:
            act()
        return inner(state, *arguments, **options)

    train.train_step = acting
    yield
    train.train_step = inner


def main(flags, rank=None, step=None, act=None):
    """train.main, where the process of that rank does something within a step; its exit status."""
    with at_step(step if os.environ.get("RANK") == str(rank) else -1, act):
        try:
            return train.main([*TINY, *flags.split()] if "--resume" not in flags else flags.split())
        except SystemExit as stopped:
            return stopped.code


def stopped_in(flags, name):
    """train.main, where one process gets a SIGTERM in the first call of a function."""
    owner, rank = (train, 1) if name == "evaluate" else (utils, 0)
    inner, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(name)
        if os.environ["RANK"] == str(rank) and len(calls) == 1:
            terminate()
        return inner(*arguments, **options)

    setattr(owner, name, call)
    return main(flags)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def hang():
    time.sleep(1000)


TWO = "--accumulation_steps 2 --save_every 1 --run_name"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))
        together(main, f"{TWO} whole")
        return last("whole")


@pytest.mark.parametrize("flags", ["", "--swa_start_epoch 1 --sam_rho 0.1 --mixup 0.3", "--freeze_epochs 1"])
def test_a_run_of_two_processes_is_the_run_of_one_and_the_first_alone_writes(flags):
    Path("elsewhere").mkdir()
    together(main, f"{TWO} two {flags}", folders=[os.getcwd(), "elsewhere"])
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["err1.txt", "out1.txt"]
    assert Path("elsewhere/out1.txt").read_text() == ""
    assert "12 x 2 accumulation x 2 processes = 48 | 2 steps an epoch" in Path("out0.txt").read_text()
    assert main(f"--accumulation_steps 4 --run_name one {flags}") == 0
    one, two = last("one"), last("two")
    assert close(one, two) and one["step"] == two["step"] == 4
    for a, b in zip(rows_of("one"), rows_of("two")):
        assert a["train_accuracy"] == b["train_accuracy"] or "--mixup" in flags
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3) and a["lr"] == b["lr"]
        assert round(b["val_accuracy"] * 60, 6) % 1 == 0  # 60 samples, none counted twice


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_with_any_number(whole):
    calls = {"later": ("write_csv", "after epoch 1", 1), "stopped": ("evaluate", "in the validation", 0)}
    for name, (call, where, epoch) in calls.items():
        assert statuses(start(stopped_in, f"{TWO} {name}", call)) == [143, 143], Path("out0.txt").read_text()
        assert f"stopped {where}" in Path("out0.txt").read_text()
        assert last(name)["step"] == 2 and last(name)["epoch"] == epoch
    for name in ("alone", "three"):
        Path("runs", name).mkdir()
        for path in Path("runs/stopped").glob("*.*"):
            (Path("runs") / name / path.name).write_bytes(path.read_bytes())
    together(main, "--resume stopped --quiet")
    assert same(whole, last("stopped"))
    assert main("--resume alone --quiet") == 0
    assert close(whole, last("alone")) and last("alone")["config"]["accumulation_steps"] == 4
    assert statuses(start(main, "--resume three", count=3)) == [2, 2, 2]
    assert "which 3 processes cannot share alike; start one of 1, 2, 4" in Path("err0.txt").read_text()


@pytest.mark.parametrize("act", [die, hang])
def test_a_process_that_dies_or_hangs_ends_the_others_and_the_run_goes_on(act, whole):
    seconds = 3 if act is hang else 60
    processes = start(main, f"{TWO} lost --timeout {seconds}", 1, 2, act)
    processes[0].join(60)
    assert processes[0].exitcode == 1
    statuses(processes, 0)
    log = Path("runs/lost/log.txt").read_text()
    assert f"error: another process {'was silent for 3 s' if act is hang else 'ended'}; the last good" in log
    assert "the last good checkpoint is of step 2; go on with: python train.py --resume lost" in log
    assert "Traceback" not in Path("err0.txt").read_text()
    together(main, "--resume lost --quiet --timeout 60")
    assert same(whole, last("lost"))


def test_what_is_chosen_by_trials_is_chosen_by_all():
    together(main, "--lr auto --batch_size auto --effective_batch 24 --run_name chosen")
    together(main, "--find_lr --batch_size 60 --output curve.csv")  # one batch for two processes
    assert Path("curve.csv").exists()
    stored = json.loads(Path("runs/chosen/config.json").read_text())
    assert stored["config"]["batch_size"] == 12 and 1e-6 < stored["config"]["lr"] < 10
    assert stored["environment"]["processes"] == 2


REFUSED = [  # the flags of both processes, their variables, the message
    (["--run_name a --seed 1", "--run_name a --seed 2"], {}, "the processes have different flags"),
    (["--run_name a --widths 8,8,8,8", "--run_name a"], {}, "the processes have different flags"),
    (["--find_lr --device mps"] * 2, {}, "--device mps: not on this machine"),
    (["--run_name a"] * 2, {"MASTER_ADDR": ""}, "MASTER_ADDR: is not set, others of torchrun's variables are"),
    (["--run_name a --compile"] * 2, {}, "--compile: does not go with several processes"),
    (["--run_name a --sync_batchnorm"] * 2, {}, "--sync_batchnorm: is for several CUDA devices"),
    (["--run_name a --effective_batch 36"] * 2, {}, "must be a multiple of the batch, 12, times 2 processes"),
    (["--run_name a --batch_size auto --effective_batch 33"] * 2, {}, "--effective_batch 33: must be a multiple of 2"),
    ([""] * 2, {"TORCHELASTIC_MAX_RESTARTS": "3"}, "--run_name: torchrun --max_restarts needs one"),
]


def refused(ports):
    """Tries all of REFUSED, one after the other; their statuses to a file, their errors to standard error."""
    found, rank = [], int(os.environ["RANK"])
    for (flags, variables, _), port in zip(REFUSED, ports):
        before = dict(os.environ)
        os.environ.update({"MASTER_PORT": str(port), **variables})
        found.append(main(flags[rank]))
        os.environ.clear()
        os.environ.update(before)
    Path(f"statuses{rank}.json").write_text(json.dumps(found))


def test_what_does_not_suit_several_processes_is_one_line_and_status_2():
    together(refused, [free_port() for _ in REFUSED])
    for rank in range(2):
        errors = Path(f"err{rank}.txt").read_text().splitlines()
        assert json.loads(Path(f"statuses{rank}.json").read_text()) == [2] * len(REFUSED) == [2] * len(errors)
        for error, (_, _, message) in zip(errors, REFUSED):
            assert error.startswith("error: " + "process 1: " * rank) and message in error
    assert not Path("runs").exists()


def torchrun(arguments, script=None, seconds=120, **variables):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([*words, *arguments[: arguments.index("--")], str(script or ROOT / "train.py"),
                           *arguments[arguments.index("--") + 1 :]], env=environment, capture_output=True, text=True,
                          timeout=seconds)  # fmt: skip


def test_torchrun_starts_a_run_again_that_lost_a_process_and_it_ends_as_if_nothing_had_been(whole, monkeypatch):
    Path("fragile.py").write_text(
        "import os, pathlib, signal, sys, train\n"
        "inner, died = train.train_step, pathlib.Path('died')\n"
        "def step(state, *arguments, **options):\n"
        "    if state.step == 3 and os.environ['RANK'] == '1' and not died.exists():\n"
        "        died.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return inner(state, *arguments, **options)\n"
        "train.train_step = step\n"
        "sys.exit(train.main())\n"
    )
    done = torchrun(["--max_restarts", "1", "--", *TINY, *f"{TWO} again".split()], "fragile.py")
    assert done.returncode == 0 and Path("died").exists(), done.stderr[-2000:]
    assert "resumed at step 3" in done.stdout
    assert same(whole, last("again"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not train.restarted(Path("runs/again"))  # another torchrun's run is not gone on with
    monkeypatch.setattr(utils, "launcher", lambda: train.read_run_config(Path("runs/again/config.json"))
                        ["environment"]["launcher"])  # fmt: skip
    assert train.restarted(Path("runs/again"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not train.restarted(Path("runs/again"))
