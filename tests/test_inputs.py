"""Bad input ends in one line and status 2 with nothing written; random input does no worse."""

import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import train
import utils

ROOT = Path(__file__).resolve().parent.parent
PUZZLE = "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......"
SOLUTION = "417369825632158947958724316825437169791586432346912758289643571573291684164875293"
TINY = "--model custom --data a.npz --batch_size 8 --model_args widths=8,16,32,48".split()
SUDOKU = "--model sudoku_gnn --data p.csv --val_fraction 0 --batch_size 1".split()
LONG = "x" * 5000


def everything(root="."):
    """{path: time and size, or kind} below `root`: what must not change; locks aside."""
    stat = lambda path: (path.stat().st_mtime_ns, path.stat().st_size)
    kind = lambda path: stat(path) if path.is_file() else "folder" if path.is_dir() else "other"
    return {str(path): kind(path) for path in Path(root).rglob("*") if path.name != "lock"}


def outcome(call):
    """(exit status, standard error) of a call; a traceback comes through, except SystemExit."""
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        try:
            status = call()
        except SystemExit as stop:
            status = stop.code
    return status, errors.getvalue()


def is_one_line(text):
    """Whether standard error holds one error, short enough to read, that moves no terminal."""
    whole = text.startswith("error: ") and text.endswith("\n") and text[:-1].isprintable()
    return whole and 10 < len(text) <= 1100


def refused(argv, words):
    """Asserts that `train.main(argv)` ends in one line with `words` in this order, writing nothing.

    `argv` is a list or a text of words.
    """
    argv, before = argv.split() if isinstance(argv, str) else list(map(str, argv)), everything()
    status, line = outcome(lambda: train.main(argv))
    assert status == 2 and is_one_line(line), (status, line)
    assert re.search(".*".join(map(re.escape, words.split())), line), line
    assert everything() == before


def arrays(count=40, size=24, classes=4):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, size, size, 3), np.uint8), np.arange(count) % classes


def write_arrays(path, classes=4):
    x, y = arrays(classes=classes)
    np.savez(path, x=x, y=y)


def write_puzzles(path):
    Path(path).write_text(f"puzzle,solution\n{PUZZLE},{SOLUTION}\n")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of good and odd files, of checkpoints, and of runs that stopped or are finished."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_arrays("a.npz")
        write_puzzles("p.csv")
        x, y = np.zeros((3000, 24, 24), np.uint8), np.arange(3000) % 4
        np.savez_compressed("big.npz", x=x, y=y)
        Path("file").write_text("x")
        for name in ("folder", "folder.csv", "empty", "photos"):
            Path(name).mkdir()
        Path("photos/a.jpg").write_bytes(b"x")
        patch.setattr(train, "fit", lambda state, run: 0)  # so a run stops at its first save
        small = "--model_args width=4 hidden=4 message_steps=2".split()
        for flags, name in ((TINY, "stopped"), ([*SUDOKU, *small], "puzzles")):
            assert train.main([*flags, "--run_name", name]) == 0
        last = utils.load_checkpoint("runs/stopped/last.pt")
        for name, changed in {
            "done": {**last, "finished": True},
            "older": {key: value for key, value in last.items() if key != "flags"},
        }.items():
            Path("runs", name).mkdir()
            torch.save(changed, f"runs/{name}/last.pt")
        for name in ("stopped", "puzzles"):
            saved = utils.load_checkpoint(f"runs/{name}/last.pt")
            torch.save({key: saved[key] for key in ("model", "meta")}, f"{name}.pt")
        torch.save({"model": {}, "meta": {"epoch": 3}}, "foreign.pt")
    return folder


# ---------------------------------------------------------------------------------------- arguments


# Flags | words of the line that refuses them, in their order. TINY and SUDOKU are flags that run.
WORDS = r"""
--epoch 3                                      | --epoch is no flag; did you mean --epochs?
extra                                          | 'extra' is no flag
--epochs                                       | --epochs: expected one argument
--epochs 0                                     | --epochs: must be an integer at least 1, got '0'
--epochs 1.5                                   | --epochs: must be an integer
--batch_size -3                                | --batch_size: must be
--batch_size few                               | --batch_size: integer at least 1 or auto
--accumulation_steps 0.5                       | --accumulation_steps: must be an integer
--lr nan                                       | --lr: must be a number above 0, got 'nan'
--lr inf                                       | --lr: must be
--lr 0                                         | --lr: must be
--lr -1                                        | --lr: must be
--clip_grad_norm -1                            | --clip_grad_norm: must be
--ema_decay 1                                  | --ema_decay: must be at least 0 and below 1
--ema_decay -0.1                               | --ema_decay: must be at least 0 and below 1
--val_fraction 1                               | --val_fraction: must be
--val_fraction nan                             | --val_fraction: must be a number
--workers -1 |
    --workers: must be an integer at least 0 and at most 64
--workers 1000                                 | --workers: must be
--memory_gb 0                                  | --memory_gb: must be a number above 0
--seed 99999999999999999999                    | --seed: must be
--mixup nan                                    | --mixup: must be
--cutmix 1e9                                   | --cutmix: must be at most 100
--sam_rho -1                                   | --sam_rho: must be
--early_stopping -1                            | --early_stopping: must be
--wandb maybe                                  | --wandb: must be True or False
--compile perhaps                              | --compile: invalid choice
--model resnet                                 | --model: invalid choice custom
--amp maybe                                    | --amp: invalid choice
--device tpu                                   | --device tpu: not on this machine; cpu
--device mps:3                                 | --device mps:3: not on this machine
--device cpu:x                                 | --device cpu:x: not on this machine
--device cpu:²                                 | not on this machine
--run_name ..                                  | --run_name: must be 1 to 64
--run_name a/b                                 | --run_name: must be 1 to 64
--run_name a\b                                 | --run_name: must be 1 to 64
--run_name /tmp/x                              | --run_name: must be 1 to 64
--config nothing |
    --config 'nothing' is no preset; there are efficientnet_b0_4gb cpu
--data nowhere                                 | --data nowhere: no such file or folder
--data ~nobody-by-this-name/x                  | no such file or folder; give
--cache_dir file --model sudoku_gnn            | file: look at the path
--cache_dir file/in/it --model sudoku_gnn      | file in it: look at the path
--pretrained= --model custom                   | --pretrained: is empty
--predict=                                     | --predict: is empty
--export= --output a.pt2                       | --export: is empty
--compile --checkpoint_activations             | --checkpoint_activations: --compile
--effective_batch 8 --accumulation_steps 2     | --accumulation_steps: --effective_batch
--batch_size auto --accumulation_steps 2       | --accumulation_steps: --effective_batch
--batch_size auto --min_steps 9                | --min_steps: leave one of them out
--effective_batch 8 --min_steps 9              | --min_steps: leave one of them out
--swa_start_epoch 4 --epochs 3                 | --swa_start_epoch 4: at most --epochs 3
--warmup_epochs 3 --epochs 3 --scheduler cosine | --warmup_epochs 3: must be below --epochs 3
--warmup_epochs 1                              | --warmup_epochs: onecycle warms up
--image_size 2048                              | --image_size 2048: 4,000 images take bytes

--data a.npz --model custom --model_args width=8 |
    --model_args 'width': there are widths did you mean widths?
TINY --model_args widths                       | --model_args 'widths': must be KEY=VALUE
TINY --model_args =3                           | --model_args '': is no argument
TINY --model_args widths=8,16                  | --model_args widths: 4 integers got '8,16'
TINY --model_args widths=a,b,c,d               | --model_args widths: 4 integers
TINY --model_args depths=                      | --model_args depths: 3 integers
TINY --model_args widths=1,8,8,8               | widths: 4 integers from 2 got (1, 8, 8, 8)
TINY --model_args depths=1,-1,1                | depths: 3 integers from 0
TINY --model_args stem_stride=1.5              | --model_args stem_stride: must be an integer
TINY --model_args stem_stride=0                | stem_stride: must be from 1 to 4, got 0
TINY --model_args stem_stride=4                | --image_size 24: needs 36
TINY --model_args whiten=perhaps               | --model_args whiten: True or False
TINY --model_args num_classes=3                | --model_args 'num_classes': is no argument
TINY --model_args depths=1,1,1 depths=1,-1,1   | depths: 3 integers from 0
--data a.npz --model_args widths=8,16,32,48 |
    --model_args 'widths': is no argument; there are dropout
--data a.npz --image_size 32 --model_args dropout=2 | dropout: must be below 1, got 2
--data a.npz --model_args dropout=nan          | --model_args dropout: must be a number
SUDOKU --model_args widths=8,16,32,48          | --model_args 'widths': did you mean width?
SUDOKU --model_args message_steps=0            | message_steps: must be from 1
SUDOKU --model_args free_steps=-1              | free_steps: must be from 0
--model_args                                   | --model_args: expected at least one argument
TINY --scheduler_args patience=3 |
    --scheduler_args 'patience': is no argument; there are pct_start
TINY --scheduler_args pct_start=2              | --scheduler_args pct_start: must be from 0 to 1
TINY --scheduler_args div_factor=0             | --scheduler_args div_factor: must be from
TINY --scheduler_args final_div_factor=1e999   | --scheduler_args final_div_factor: must be a number
TINY --scheduler_args anneal=odd               | --scheduler_args anneal: must be cos or linear
TINY --scheduler_args cycle_momentum=may       | --scheduler_args cycle_momentum: True or False
TINY --scheduler_args max_lr=3                 | --scheduler_args 'max_lr': is no argument
TINY --scheduler_args pct_start=.1 pct_start=2 | --scheduler_args pct_start: must be from 0 to 1
TINY --scheduler plateau --scheduler_args factor=2 | --scheduler_args factor: must be from to 1
TINY --scheduler plateau --scheduler_args patience=-1 | --scheduler_args patience: must be from 0
TINY --scheduler plateau --scheduler_args min_delta=1 | --scheduler_args 'min_delta': is no argument
TINY --scheduler plateau --scheduler_args values=1 | --scheduler_args 'values': is no argument
TINY --scheduler cosine --scheduler_args pct_start=.2 |
    --scheduler_args 'pct_start': there are warmup_steps
TINY --scheduler constant --scheduler_args warmup_step=1 | did you mean warmup_steps?

--data a.npz --image_size 28                   | --image_size 28: needs 32 px
--data a.npz --image_size 32 --batch_size 1    | --batch_size 1: BatchNorm
--data big.npz --image_size 2048               | --image_size 2048: 3,000 images take bytes
TINY --image_size 20                           | --image_size 20: needs 24 px
TINY --batch_size 37                           | --batch_size 37: 36 training samples
TINY --effective_batch 12 |
    --effective_batch 12: must be a multiple of --batch_size 8
TINY --effective_batch 999                     | --effective_batch 999: 36 samples
TINY --batch_size auto --effective_batch 31 --max_samples 34 | --effective_batch 31: no batch fits
TINY --batch_size auto --memory_gb 0.001       | --batch_size auto fits in memory
TINY --monitor speed |
    --monitor 'speed': train_loss, train_accuracy, val_loss, val_accuracy
TINY --val_fraction 0 --early_stopping 2       | --early_stopping: needs validation data
TINY --val_fraction 0 --monitor val_loss       | --monitor 'val_loss': train_loss
TINY --max_samples 1                           | --val_fraction leaves no validation
TINY --crop_padding 24                         | --crop_padding 24 below the image size, 24
TINY --cutout 24                               | --cutout 24: below the image size, 24
TINY --pretrained nowhere.pth                  | nowhere.pth: no such checkpoint
TINY --pretrained folder                       | folder: no such checkpoint
TINY --pretrained file                         | file:
TINY --pretrained                              | --pretrained: efficientnet_b0
--data a.npz --image_size 32 --pretrained stopped.pt |
    --pretrained stopped.pt: missing in the weights
TINY --pretrained stopped.pt --model_args widths=8,16,32,64 |
    --pretrained stopped.pt: 48x32x3x3 64x32x3x3
SUDOKU --data a.npz                            | a.npz: line 1:
--model custom --data p.csv |
    p.csv: not a whole NPZ file puzzles need --model sudoku_gnn

--copy train_stp --output a.py                 | --copy 'train_stp': did you mean train_step?
--copy main nothing --output a.py              | --copy 'nothing': is no function
--copy --output a.py                           | --copy: expected at least one argument
--find_lr --output no/a.csv                    | --output no/a.csv: in a folder that exists
--find_lr --output folder.csv                  | --output folder.csv: must be a .csv file
--find_lr --data p.csv --output p.csv          | --output p.csv: is an input
--predict --input p.csv --output p.csv         | --output p.csv: is an input
--evaluate nowhere.pt                          | nowhere.pt: no such checkpoint
--evaluate empty                               | empty: no such checkpoint; give a .pt file of a run
--evaluate file                                | file: not a whole checkpoint
--evaluate foreign.pt                          | foreign.pt: has no metadata
--evaluate puzzles.pt                          | puzzles.pt: no test or val split
--evaluate puzzles.pt --tta                    | --tta: is for pictures
--evaluate stopped.pt --data p.csv             | p.csv: not a whole NPZ file
--evaluate stopped.pt --data nowhere           | --data nowhere: no such file
--evaluate stopped.pt --model_args message_steps=8 | --model_args 'message_steps': there are widths
--evaluate stopped.pt --model_args widths=8,16,32,64 | stopped.pt: 48x32x3x3 64x32x3x3
--evaluate puzzles.pt --model_args message_steps=0 | message_steps: must be from 1
--predict foreign.pt --input photos            | foreign.pt: has no metadata
--predict stopped.pt --input nowhere/*         | --input nowhere/*: no picture there
--predict stopped.pt --input empty             | --input empty: no picture there
--predict stopped.pt --input photos --search   | --search: is for puzzles
--predict stopped.pt --input photos --output a.sdm | --output a.sdm: .csv .json
--predict puzzles.pt --input p.csv --output a.json | --output a.json: .csv .sdm .sdk
--predict puzzles.pt --input folder            | --input folder: is no file of puzzles
--predict puzzles.pt --input p.csv p.csv       | --input p.csv p.csv: is no file of puzzles
--predict --input photos/a.jpg |
    --input photos/a.jpg: name a checkpoint: --predict CKPT
--export nowhere.pt --output a.pt2             | nowhere.pt: no such checkpoint

--run_name stopped                             | --run_name stopped: exists; --resume stopped
TINY --run_name stopped --resume other |
    --resume 'other': no such run there are done, older, puzzles, stopped
--resume nothing                               | --resume 'nothing': no such run
--resume done                                  | --resume done: finished already
--resume done                                  | --resume done: finished already
--resume older                                 | has no flags
--resume --run_name older                      | has no flags
--resume stopped --lr 0.5                      | --lr 0.5: the run has 0.002
--resume stopped --epochs 9                    | --epochs 9: the run has 10
--resume stopped --model sudoku_gnn            | --model sudoku_gnn: the run has custom
--resume stopped --config cpu                  | the run has
--resume stopped --model_args widths=8,16,32,64 |
    --model_args widths=8,16,32,64 the run has (8, 16, 32, 48)
--resume stopped --scheduler_args pct_start=0.2 | --scheduler_args pct_start=0.2 the run has
--resume stopped --data p.csv                  | p.csv: not a whole NPZ file
"""
SHORT = {"TINY": TINY, "SUDOKU": SUDOKU}
CASES = []
for line in filter(None, WORDS.replace("|\n", "|").splitlines()):
    flags, message = line.split("|")
    CASES.append((sum((SHORT.get(word, [word]) for word in flags.split()), []), message))
CASES += [  # what no line of words can hold
    (["--run_name", ""], "--run_name: must be 1 to 64"),
    (["--run_name", "x" * 65], "--run_name: must be 1 to 64"),
    (["--run_name", "a\n"], r"--run_name: got 'a\n'"),
    (["--run_name", "a\u202eb"], r"--run_name: got 'a\u202eb'"),
    (["--epochs", "9" * 400], "--epochs: must be"),
    (["--" + LONG], "is no flag; see --help"),
    (["--model", LONG], "--model: invalid choice 'sudoku_gnn'"),
    (["--config", LONG], "is no preset; there are efficientnet_b0_4gb"),
    (["--device", "a\x1b[31m\nb"], r"--device a\x1b[31m\nb: not on this machine"),
    ([*TINY, "--monitor", "a\nb" * 99], "--monitor is not measured train_loss"),
    ([*TINY, "--model_args", LONG + "=1"], "--model_args is no argument; there are"),
    ([*TINY, "--model_args", "widths=" + "8," * 2000], "--model_args widths: 4 integers"),
    ([*TINY, "--model_args", "a\nb=1"], r"--model_args 'a\nb': is no argument"),
    (["--copy", LONG, "--output", "a.py"], "--copy is no function"),
    (["--find_lr", "--output", "x" * 240 + ".csv"], "--output at most 200 bytes"),
]
PATHS = [  # a flag that takes a path, among the flags it needs
    ["--data"],
    ["--model", "sudoku_gnn", "--cache_dir"],  # which images in memory do not need
    ["--find_lr", "--output"],
    ["--pretrained"],
    ["--evaluate"],
    ["--predict", "--input"],
    ["--resume"],
]
NO_NAME = "is a name that no file can have"
CASES += [
    ([*flags, text], f"{flags[-1]}: {words}")
    for flags in PATHS
    for text, words in (
        ("a\0b", NO_NAME + r" got 'a\x00b'"),
        ("\ud800", NO_NAME),
    )
]
CASES += [  # the system says so in its own words
    ([*flags, text], "error:")
    for flags in PATHS
    for text in (LONG, "x/" * 3000)
]
CASES += [([*flags, ""], f"{flags[-1]}: is empty") for flags in PATHS if flags != ["--resume"]]
for mode, forms in train.OUTPUTS.items():  # each mode writes its own forms
    argv = [
        f"--{mode}",
        *["file"] * (mode != "find_lr"),
        *["--input", "p.csv"] * (mode == "predict"),
    ]
    CASES.append(([*argv, "--output", "a.png"], f"--output a.png: {' or '.join(forms)} file"))
if hasattr(os, "mkfifo"):
    CASES += [
        (["--data", os.devnull], "is neither a file nor a folder"),
        ([*SUDOKU, "--data", os.devnull], "is neither a file nor a folder"),
    ]


NAMES = [" ".join(argv)[-60:].encode("unicode_escape").decode() for argv, _ in CASES]


@pytest.mark.parametrize("argv, words", CASES, ids=NAMES)
def test_a_flag_that_cannot_be_meant_is_refused(argv, words, made, monkeypatch):
    monkeypatch.chdir(made)
    refused(argv, words)


def flags_of(argv, **changes):
    args, _ = train.parse_flags(argv.split())
    return SimpleNamespace(**{**vars(args), **changes})


@pytest.mark.parametrize("mode", train.READ_BY)
def test_a_mode_refuses_each_flag_that_it_does_not_read(mode):
    args = flags_of("", **{mode: ["x"]})
    for key in vars(args):
        if key not in train.READ_BY[mode]:
            with pytest.raises(ValueError, match=f"--{key}: does not go with --{mode}"):
                train.check_flags(args, {mode: ["x"], key: 1})


@pytest.mark.parametrize("key", train.NEEDS)
def test_a_flag_that_needs_others_is_refused_without_them(key):
    needs = " or ".join(f"--{other}" for other in train.NEEDS[key])
    with pytest.raises(ValueError, match=f"--{key}: needs {needs}"):
        train.check_flags(flags_of("", **{key: ["x"]}), {key: ["x"]})


@pytest.mark.parametrize("key", sorted(train.IMAGE_FLAGS))
def test_a_flag_for_pictures_is_refused_for_puzzles(key):
    with pytest.raises(ValueError, match=f"--{key}: is for pictures, not for --model sudoku_gnn"):
        train.check_flags(flags_of("--model sudoku_gnn"), {"model": "sudoku_gnn", key: 1})


# -------------------------------------------------------------------------------------- environment


def test_torch_that_is_too_old_is_named_with_the_version_it_takes(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    refused("--data nowhere", "torch 2.9.1+cu128: too old 2.10")
    for version in ("2.10.0", "3.0.0a0+git1"):
        monkeypatch.setattr(torch, "__version__", version)
        refused("--data nowhere", "--data nowhere: no such file")


ALONE = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}
ENVIRONMENTS = [  # variables, flags, words
    (ALONE, "--data a.npz", "MASTER_ADDR: is not set torchrun"),
    ({"WORLD_SIZE": "2"}, "--data a.npz", "RANK: is not set torchrun"),
    (ALONE, "--evaluate stopped.pt", "--evaluate: one process without torchrun"),
    ({"TORCHELASTIC_MAX_RESTARTS": "3"}, "--data a.npz", "--resume --run_name NAME"),
    ({"TORCHELASTIC_MAX_RESTARTS": "3"}, "--run_name a", "--resume --run_name NAME"),
]


@pytest.mark.parametrize("variables, flags, words", ENVIRONMENTS)
def test_a_start_by_torchrun_that_lacks_something_is_refused(
    variables, flags, words, made, monkeypatch
):
    monkeypatch.chdir(made)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(flags, words)


def test_memory_that_runs_out_before_the_run_is_one_line(monkeypatch):
    def full(*arguments):
        raise MemoryError("Unable to allocate 7 GiB for an array")

    monkeypatch.setattr(train, "prepare", full)
    status, line = outcome(lambda: train.main([]))
    assert status == 1 and is_one_line(line) and "Unable to allocate 7 GiB" in line
    assert not everything()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_not_there_is_named_with_its_remedy(package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(f"--{package}", f"--{package} needs {package} pip install {package}")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_refused_by_its_name():
    for name, flags in (("a.npz", "--data a.npz"), ("a.pt", "--evaluate a.pt")):
        Path(name).write_bytes(b"x")
        Path(name).chmod(0)
        refused(flags, f"{name}: Permission denied;")
    Path("shut").mkdir(mode=0o500)
    refused("--find_lr --output shut/a.csv", "--output shut/a.csv: cannot be written to")


# -------------------------------------------------------------------------------------- checkpoints


def checkpoint(made, kind):
    """A file that is no good checkpoint, made from a good one."""
    good, meta = (
        made / "stopped.pt",
        lambda **changes: {**whole, "meta": {**whole["meta"], **changes}},
    )
    whole, raw = utils.load_checkpoint(good), bytearray(good.read_bytes())
    raw[len(raw) // 2] ^= 1
    bytes_of = {
        "text": b"hello",
        "nothing": b"",
        "half": raw[: len(raw) // 2],
        "a flipped bit": raw,
    }
    if kind in bytes_of:
        Path("bad.pt").write_bytes(bytes_of[kind])
        return
    torch.save(
        {
            "code": {**whole, "f": train.Task},
            "a tensor": torch.zeros(3),
            "a later format": {"format_version": 99},
            "an odd format": {**whole, "format_version": "x"},
            "no metadata": {"model": whole["model"]},
            "odd metadata": {**whole, "meta": 3},
            "an unknown model": meta(model="resnet"),
            "odd arguments": meta(arguments=3),
            "unknown arguments": meta(arguments={"length": 3}),
            "other classes": meta(num_classes=3),
            "no number of classes": meta(num_classes="x"),
            "no weights": {**whole, "model": None},
            "weights of no name": {**whole, "model": {"a": torch.zeros(1)}},
            "weights that are none": {**whole, "model": {name: 3 for name in whole["model"]}},
        }[kind],
        "bad.pt",
    )


DAMAGE = {  # kind: words of --evaluate, words of --pretrained or None where it is good enough
    "text": ("bad.pt: not a whole checkpoint", "bad.pt:"),
    "nothing": ("bad.pt: not a whole checkpoint", "bad.pt:"),
    "half": ("bad.pt: not a whole checkpoint", "bad.pt:"),
    "a flipped bit": (
        "bad.pt: not a whole checkpoint damaged at",
        "bad.pt: not a whole checkpoint",
    ),
    "code": ("bad.pt: more than tensors",) * 2,
    "a tensor": ("bad.pt: holds a Tensor",) * 2,
    "a later format": ("bad.pt: format 99 up to 1",) * 2,
    "an odd format": ("bad.pt: format",) * 2,
    "no metadata": ("bad.pt: has no metadata", None),
    "odd metadata": ("bad.pt: has no metadata", None),
    "an unknown model": ("bad.pt: metadata", None),
    "odd arguments": ("bad.pt: metadata", None),
    "unknown arguments": ("bad.pt: metadata", None),
    "other classes": ("bad.pt: head.weight is 4x48, needs 3x48", None),
    "no number of classes": ("bad.pt: metadata", None),
    "no weights": ("bad.pt: weights",) * 2,
    "weights of no name": ("bad.pt: missing in the weights",) * 2,
    "weights that are none": ("bad.pt: weights",) * 2,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_its_name(kind, made):
    checkpoint(made, kind)
    write_arrays("a.npz")
    evaluate, pretrained = DAMAGE[kind]
    refused("--evaluate bad.pt", evaluate)
    if pretrained:
        refused([*TINY, "--pretrained", "bad.pt"], pretrained)


def test_changed_data_is_refused_on_resume(made, monkeypatch):
    shutil.copytree(made / "runs", "runs")
    write_arrays("a.npz", classes=5)
    refused(
        ["--resume", "stopped", "--data", "a.npz"], "--resume: the data changed (classes)"
    )


def test_no_run_to_go_on_with_is_said():
    refused("--resume", "--resume: no unfinished run with a checkpoint")
    refused("--resume nothing", "--resume 'nothing': no such run there are none")


# ------------------------------------------------------------------------------------- configs.json


DEEP = "[" * 900 + "]" * 900
CONFIGS = {  # what the file holds: the words of its line
    "": "configs.json: not JSON line 1 column 1",
    '{"p": {"epochs": 3},\n "q": "a': "configs.json: not JSON line 2 column 7",
    '{"p": {"epochs": 3,}}': "configs.json: not JSON line 1",
    "\ufeff{}": "configs.json: not JSON line 1 column 1",
    '{"p": {"epochs": ' + "9" * 5000 + "}}": "configs.json:",
    '{"p": {"epochs": ' + DEEP + "}}": "configs.json:",
    "[" * 100_000: "configs.json: not JSON recursion",
    b'{"p": "\xff"}': "configs.json: JSON in UTF-8 position 7",
    "3": "configs.json: an object of objects",
    '["p"]': "configs.json: an object of objects",
    '{"p": 3}': "configs.json: an object of objects",
    "{}": "--config 'p' is no preset; there are none",
    '{"q": {}}': "--config 'p' is no preset; there are q",
    '{"p": {}, "p": {}}': "configs.json: key 'p' stands twice",
    '{"p": {}, "q": {"r": {"a": 1, "a": 2}}}': "key 'a' stands twice",
    '{"p": {"model_args": {"width": 3, "width": 4}}}': "key 'width' stands twice",
    '{"' + LONG + '": 1, "' + LONG + '": 2}': "stands twice; remove one",
    '{"p": {"lr": NaN}}': "lr: must be a number got 'nan'",
    '{"p": {"lr": -Infinity}}': "lr: must be a number got '-inf'",
    '{"p": {"lr": 1e999}}': "lr: must be a number",
    '{"p": {"lr": null}}': "lr: must be a number got 'None'",
    '{"p": {"lr": [1]}}': "lr: must be a number got '[1]'",
    '{"p": {"monitor": null}}': "monitor None: is of another type",
    '{"p": {"monitor": {"a": 1}}}': "monitor {'a': 1}: is of another type",
    '{"p": {"data=x": 3}}': "'data=x' is no flag",
    '{"p": {"epoch": 3}}': "epoch did you mean --epochs?",
    '{"p": {"-x": 3}}': "'-x' is no flag",
    '{"p": {"help": true}}': "ignored explicit argument",
    '{"p": {"epochs": true}}': "epochs: must be an integer got 'True'",
    '{"p": {"epochs": "3"}}': "epochs '3': is of another type",
    '{"p": {"epochs": 2.5}}': "epochs: must be an integer",
    '{"p": {"epochs": {"a": 1}}}': "epochs: must be an integer",
    '{"p": {"flip": "true"}}': "flip 'true': is of another type",
    '{"p": {"amp": true}}': "amp True: is of another type",
    '{"p": {"model": "resnet"}}': "model: invalid choice",
    '{"p": {"model": 3}}': "model: invalid choice",
    '{"p": {"run_name": 3}}': "run_name 3: is of another type",
    '{"p": {"run_name": "../x"}}': "run_name: must be",
    '{"p": {"resume": "x"}}': "resume 'x': is no flag for a preset",
    '{"p": {"find_lr": true}}': "find_lr True: is no flag for a preset",
    '{"p": {"copy": {"x": 1}}}': "copy {'x': 1}: is no flag for a preset",
    '{"p": {"config": "q"}}': "config 'q': is no flag for a preset",
    r'{"p": {"data": "\ud800"}}': "data: is a name that no file can have",
    r'{"p": {"cache_dir": "a\u0000"}}': "cache_dir: is a name that no file can have",
    '{"p": {"model_args": "widths=1,2"}}': "model_args 'widths=1,2': is of another type",
    '{"p": {"model_args": 3}}': "model_args KEY=VALUE",
    '{"p": {"model_args": {}}}': "'model_args' is no flag",
    '{"p": {"model_args": ["widths=3"]}}': "--model_args is no argument",
    '{"p": {"model": "custom", "model_args": {"widths": []}}}': "widths: must be got ''",
    '{"p": {"model": "custom", "model_args": {"widths": null}}}': "widths: must be got 'None'",
    '{"p": {"model": "custom", "model_args": {"widths": [[1]]}}}': "widths: must be got '[1]'",
    '{"p": {"model": "custom", "model_args": {"widths": {"a": 1}}}}': "widths: must be got",
    '{"p": {"model_args": {"dropout": 0.1, "--epochs": 3}, "data": "no"}}': "'model_args' is no flag, or",
    '{"p": {"model_args": {"--evaluate": "x"}}}': "'model_args' is no flag",
    '{"p": {"model_args": {"width": 3}}}': "model_args 'width': is no argument; there are dropout",
    '{"p": {"model": "custom", "model_args": {"width": 3}}}': "'width': did you mean widths?",
    '{"p": {"model": "custom", "model_args": {"widths": [8, 16]}}}': "widths: 4 integers got",
    '{"p": {"model": "custom", "model_args": {"widths": ["a", 8, 8, 8]}}}': "widths: 4 integers",
    '{"p": {"model": "custom", "model_args": {"whiten": 1}}}': "whiten: True or False, got '1'",
    '{"p": {"scheduler_args": {"pct_start": true}}}': "pct_start: must be a number",
    '{"p": {"scheduler_args": {"pct_start": 7}}}': "pct_start: must be from 0 to 1",
    '{"p": {"scheduler_args": {"patience": 7}}}': "'patience': is no argument; there are pct_start",
    None: "configs.json: No such file",
    Path: "configs.json: Is a directory",
}


@pytest.mark.parametrize("content", CONFIGS, ids=[f"{content}"[:60] for content in CONFIGS])
def test_presets_that_are_damaged_name_the_file_and_the_place(content, monkeypatch):
    if content is Path:
        Path("configs.json").mkdir()
    elif content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        Path("configs.json").write_bytes(raw)
    monkeypatch.setattr(train, "__file__", str(Path("train.py").absolute()))
    refused("--config p", CONFIGS[content])


# --------------------------------------------------------------------------------------------- data


def npy(shape, descr="|u1", body=b"", version=(1, 0), length=None):
    """The bytes of an array file whose header may lie."""
    header = (
        repr({"descr": descr, "fortran_order": False, "shape": shape}).encode("latin-1", "replace")
        + b"\n"
    )
    size = len(header) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes(version)
        + struct.pack("<H" if version == (1, 0) else "<I", size)
        + header
        + body
    )


def zipped(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def idx(folder, images, labels, suffix=""):
    """A folder of two IDX files from (header dimensions, body) each."""
    folder.mkdir(exist_ok=True)
    for name, axes, (shape, body) in (("images-idx3", 3, images), ("labels-idx1", 1, labels)):
        raw = bytes([0, 0, 8, axes]) + struct.pack(f">{axes}I", *shape) + body
        (folder / f"train-{name}-ubyte{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    return folder


def pictures(root, classes=("ant", "bee"), splits=("",), count=3, size=(30, 24)):
    image = pytest.importorskip("PIL.Image")
    for i, place in enumerate(f"{split}/{name}" for split in splits for name in classes):
        (root / place.strip("/")).mkdir(parents=True)
        for j in range(count):
            image.new("RGB", size, (40 * i, 60 * j, 90)).save(root / place.strip("/") / f"{j}.png")
    return root


def png(width, height, body=b""):
    """A PNG whose header declares these sides."""
    chunk = lambda kind, content: (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def linked(place, target):
    """`place` moved out of its folder, and a link to it left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    place.rename(target)
    place.symlink_to(target.absolute())


def link_in(kind):
    """A data folder in which one thing is a link that leads out."""
    root, away = Path("root"), Path("away/thing")
    if kind in ("class", "split", "file of a class"):
        pictures(root, splits=("train", "val") if kind == "split" else ("",))
        linked(root / {"class": "ant", "split": "val", "file of a class": "ant/0.png"}[kind], away)
    elif kind == "idx":
        idx(root, ((4, 24, 24), bytes(4 * 576)), ((4,), bytes([0, 1, 0, 1])))
        linked(root / "train-labels-idx1-ubyte", away)
    elif kind in ("cifar", "cifar folder"):
        folder = root / "cifar-10-batches-bin"
        folder.mkdir(parents=True)
        (folder / "data_batch_1.bin").write_bytes(bytes(3073 * 4))
        linked(folder / "data_batch_1.bin" if kind == "cifar" else folder, away)
    else:
        root.mkdir()
        (root / "train.csv").write_text(f"puzzle,solution\n{PUZZLE},{SOLUTION}\n")
        linked(root / "train.csv", away)
    return root


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize(
    "kind", ["class", "split", "file of a class", "idx", "cifar", "cifar folder", "sudoku"]
)
def test_a_link_that_leads_out_of_the_data_folder_is_refused(kind):
    root = link_in(kind)
    family = "sudoku_gnn" if kind == "sudoku" else "custom"
    refused(["--model", family, "--data", root], "error: root/ a link that leads out of root; copy")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_the_data_folder_itself_and_links_within_it_are_followed():
    pictures(Path("real"))
    (Path("real/ant/again.png")).symlink_to(Path("real/ant/0.png").absolute())
    Path("root").symlink_to(Path("real").absolute())
    assert len(data.scan_folder(Path("root"))[0]["train"]) == 7
    idx(Path("numbers"), ((4, 24, 24), bytes(4 * 576)), ((4,), bytes([0, 1, 0, 1])))
    Path("link").symlink_to(Path("numbers").absolute())
    assert set(data.idx_files(Path("link"))) == {"train"}


def fifo(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no FIFO here")
    os.mkfifo(path)
    return path


def npz(**content):
    np.savez("a.npz", **content)
    return Path("a.npz")


def cifar_sparse():
    Path("cifar").mkdir()
    with open("cifar/data_batch_1.bin", "wb") as file:
        file.truncate(3073 * 4 * 10**6)  # takes no disk
    return Path("cifar")


def cifar_fifo():
    Path("cifar").mkdir()
    fifo("cifar/data_batch_1.bin")
    return Path("cifar")


def encrypted():
    raw = bytearray(zipped(Path("a.npz"), {"x.npy": npy((2,), body=b"ab")}).read_bytes())
    for sign, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        raw[raw.index(sign) + offset] |= 1
    Path("a.npz").write_bytes(raw)
    return Path("a.npz")


def compressed_by(method):
    raw = bytearray(zipped(Path("a.npz"), {"x.npy": npy((2,), body=b"ab")}).read_bytes())
    raw[raw.index(b"PK\1\2") + 10] = raw[raw.index(b"PK\3\4") + 8] = method
    Path("a.npz").write_bytes(raw)
    return Path("a.npz")


def bad_names():
    folder = pictures(Path("f"))
    (folder / "ant" / "0.png").write_bytes(png(50_000, 50_000))
    return folder


def cut_header():
    folder = pictures(Path("f"))
    (folder / "bee" / "2.png").write_bytes((folder / "bee" / "2.png").read_bytes()[:20])
    return folder


def tiff():
    folder = pictures(Path("f"))
    pytest.importorskip("PIL.Image").new("RGB", (30, 30)).save(folder / "bee" / "x.tiff")
    (folder / "bee" / "x.tiff").rename(folder / "bee" / "x.png")
    return folder


def no_pictures():
    folder = pictures(Path("f"))
    (folder / "cow").mkdir()
    (folder / "cow" / "notes.txt").write_text("none")
    return folder


def other_classes():
    pictures(Path("f"), splits=("train",))
    return pictures(Path("f"), ("ant", "cow"), ("val",))


def labels_only():
    idx(Path("f"), ((1, 2, 2), bytes(4)), ((1,), bytes(1)))
    Path("f/train-images-idx3-ubyte").unlink()
    return Path("f")


def puzzle_splits():
    Path("s").mkdir()
    for name in ("train", "val"):
        Path(f"s/{name}.csv").write_text(f"puzzle,solution\n{PUZZLE},{SOLUTION}\n")
    return Path("s")


def text_file(text, name="p.csv"):
    Path(name).write_text(text)
    return Path(name)


def packed_lines(content, name="p.csv.gz"):
    """A gzip file of a member for each part, equal parts packed once."""
    packed = {part: gzip.compress(part, 1) for part in content}
    Path(name).write_bytes(b"".join(packed[part] for part in content))
    return Path(name)


X, Y = arrays()
HUGE = (2**16, 2**8, 2**8)  # 4 GiB, below the limit of what is read
LIE = "declares 4,294,967,296 bytes"
BAD_DATA = {  # images, or puzzles where the name begins with "puzzle"
    "a folder of an idx name beside labels": (
        labels_only,
        "images and labels come in pairs; the other file is",
    ),
    "idx of a wrong number of labels": (
        lambda: idx(Path("f"), ((4, 2, 2), bytes(16)), ((3,), bytes(3))),
        "4 images",
    ),
    "idx that declares more than it holds": (
        lambda: idx(Path("f"), (HUGE, b"abc"), ((1,), b"a")),
        f"{LIE}, has 3",
    ),
    "packed idx that declares more": (
        lambda: idx(Path("f"), (HUGE, b"abc"), ((1,), b"a"), ".gz"),
        f"{LIE}, has 3",
    ),
    "idx of no image": (
        lambda: idx(Path("f"), ((0, 5, 5), b""), ((0,), b"")),
        "images must be [N, H, W]",
    ),
    "npz that declares more than it holds": (
        lambda: zipped(Path("a.npz"), {"x.npy": npy(HUGE), "y.npy": npy((2**16,))}),
        f"a.npz: {LIE}",
    ),
    "npz of many arrays below the limit": (
        lambda: zipped(Path("a.npz"), {f"x_{i}.npy": npy((2**20, 1024)) for i in range(9)}),
        "a.npz: declares",
    ),
    "npz with a header without end": (
        lambda: zipped(
            Path("a.npz"), {"x.npy": npy((1,), version=(2, 0), length=2**26, body=b" " * 2**15)}
        ),
        "a.npz: EOF: reading array header",
    ),
    "npz with dimensions below 0": (
        lambda: zipped(
            Path("a.npz"),
            {"x.npy": npy((-1, 24, 24), body=bytes(576)), "y.npy": npy((1,), body=b"a")},
        ),
        "a.npz: ",
    ),
    "npz with a type that is none": (
        lambda: zipped(Path("a.npz"), {"x.npy": npy((1,), "no type")}),
        "a.npz: ",
    ),
    "npz nested deep": (
        lambda: zipped(Path("a.npz"), {"x.npy": npy(0).replace(b"0", b"(" * 900)}),
        "a.npz: ",
    ),
    "npz that holds text": (
        lambda: zipped(Path("a.npz"), {"x.npy": b"hello", "y.npy": b"hello"}),
        "a.npz: ",
    ),
    "npz that is encrypted": (encrypted, "a.npz: not a whole NPZ file (File"),
    "npz of an unknown compression": (lambda: compressed_by(99), "a.npz: not a whole NPZ file"),
    "npz of objects": (lambda: npz(x=np.array([{}]), y=Y[:1]), "allow_pickle=False"),
    "npz with labels beyond 63 bits": (
        lambda: npz(x=X[:3], y=np.array([0, 2**64 - 1, 1], np.uint64)),
        "row 1 has 18446744073709551615",
    ),
    "npz with a label too high": (
        lambda: npz(x=X[:3], y=np.array([0, 1, 65_536])),
        "row 2 has 65536",
    ),
    "npz with labels that are fractions": (
        lambda: npz(x=X, y=Y + 0.5),
        "labels must be integers from 0; got float64",
    ),
    "npz of strips that no resize can take": (
        lambda: npz(x=np.zeros((2, 1, 10**6), np.uint8), y=Y[:2]),
        "1x1000000 images become 32x32000000, over 89,",
    ),
    "npz of a number and no list": (
        lambda: npz(x=np.uint8(3), y=np.uint8(3)),
        "images must be [N, H, W]",
    ),
    "cifar larger than the limit": (
        cifar_sparse,
        "data_batch_1.bin: 12,292,000,000 bytes; at most",
    ),
    "cifar that is a FIFO": (cifar_fifo, "needs two class folders"),
    "a FIFO": (lambda: fifo("p"), "--data p: is neither a file nor a folder"),
    "a bomb by its header": (bad_names, "0.png: is over 89,478,485 pixels"),
    "a picture of half a header": (
        cut_header,
        "2.png: cannot be decoded (Truncated File Read); replace or",
    ),
    "a picture of another kind": (
        tiff,
        "x.png: not a whole picture in JPEG, PNG, BMP, WEBP, GIF; convert or remove",
    ),
    "a class without a picture": (
        no_pictures,
        "f/cow: no image in this class folder; add some or remove it",
    ),
    "classes that differ": (
        other_classes,
        "f/val: class folders differ from f/train's in ['bee', 'cow']; they must",
    ),
    "puzzles that are a FIFO": (
        lambda: fifo("p.csv"),
        "--data p.csv: is neither a file nor a folder",
    ),
    "puzzles with an unknown header": (
        lambda: text_file("board,answer\n1,2\n"),
        "p.csv: line 1: neither 81 cells nor",
    ),
    "puzzles in train and val": (puzzle_splits, "puzzle 1 of val in train too; remove it"),
    "puzzles of a header without end": (
        lambda: text_file("puzzle," * 20_000),
        "p.csv: line 1: too long for a puzzle",
    ),
    "puzzles with a line of spaces": (
        lambda: text_file(f"{PUZZLE}\n{' ' * 2**20}\n{PUZZLE}\n", "p.sdm"),
        "p.sdm: line 2: too long for a puzzle",
    ),
    "puzzles with too few cells": (
        lambda: text_file(f"puzzle,solution\n{PUZZLE},{SOLUTION[1:]}\n"),
        "line 2: has 80",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_is_damaged_is_refused_by_its_path(case):
    make, message = BAD_DATA[case]
    family = "sudoku_gnn" if case.startswith("puzzle") else "custom"
    refused(["--model", family, "--data", make()], message)


def test_a_puzzle_file_of_more_text_than_the_limit_is_refused_by_its_line(monkeypatch):
    monkeypatch.setattr(data, "MAX_ARRAY_BYTES", 100_000)
    path = packed_lines([f"{PUZZLE}\n".encode() * 1000] * 2)
    with pytest.raises(
        ValueError, match="p.csv.gz: line 1: over 100,000 bytes of text; split the file"
    ):
        data.read_sudoku(path)
    assert len(data.read_sudoku(packed_lines([f"{PUZZLE}\n".encode() * 1000]))[0]) == 1000


def test_a_damaged_cache_of_pictures_is_refused_by_its_path():
    pictures(Path("f"))
    data.load("f", cache_dir="c")
    (kept,) = Path("c").iterdir()
    whole = kept.read_bytes()
    other = io.BytesIO()
    np.save(other, np.zeros((2, 2)))
    for content in (b"", b"PK\3\4", whole[:-9], whole[:40], other.getvalue()):
        kept.write_bytes(content)
        with pytest.raises(ValueError, match=f"{kept.name}: a damaged cache .*; remove it"):
            data.load("f", cache_dir="c")


def test_names_of_classes_that_are_no_text_do_not_stop_cifar():
    Path("c").mkdir()
    Path("c/data_batch_1.bin").write_bytes(bytes(3073) + b"\1" + bytes(3072))
    Path("c/batches.meta.txt").write_bytes(b"a b \xff\xfe d e f g h i j")
    assert len(data.load("c", val_fraction=0).classes) == 10


def test_large_pictures_are_resized_in_parts_to_the_same_pixels(monkeypatch):
    x, y = arrays(7, 30)
    whole = data.match_size(data.Data({"train": data.Split(x, y)}, [], 24, ""))
    monkeypatch.setattr(data, "MAX_RESIZED_PIXELS", 30 * 30 * 2)
    parts = data.match_size(data.Data({"train": data.Split(x, y)}, [], 24, ""))
    assert np.array_equal(whole.splits["train"].images, parts.splits["train"].images)


# ------------------------------------------------------------------------------------- random input
# A property runs on a few examples, the same each time; under -m slow on many, new each time.


def often(few, many):
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture
def throw(tmp_path_factory):
    """throw(check, examples, *strategies): calls check with values that hypothesis draws."""
    hypothesis = pytest.importorskip("hypothesis")
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path_factory.getbasetemp() / "hypothesis")

    def run(check, examples, *strategies):
        few, phase = examples < 1000, hypothesis.Phase
        settings = hypothesis.settings(
            max_examples=examples,
            derandomize=few,
            deadline=None,
            database=None,
            phases=[phase.generate, *[phase.shrink] * (not few)],  # shrinking takes minutes
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        settings(hypothesis.given(*strategies)(check))()

    return run


@pytest.fixture
def st():
    return pytest.importorskip("hypothesis.strategies")


def one_line_or(call):
    """What a call gives; None where it raises what `train.main` says in one line."""
    try:
        return call()
    except (ValueError, OSError) as caught:
        error = caught
        status, line = outcome(lambda: utils.fail(utils.message_of(error)))
        assert status == 2 and is_one_line(line), (line, error)
        return None


GARBAGE = (
    *"0 1 2 -1 3 0.5 1e-320 1e308 nan inf -inf 1e999 True true auto".split(),
    *"a.npz p.csv nowhere . .. / ~".split(),
    *"~nobody ** [ a.csv runs/x cpu cpu:0 mps cuda:\u00b2 1,2,3 1,2,3,4".split(),
    *"-- - -x --epochs %s {} NaN".split(),
    "",
    " ",
    "9" * 400,
    "9" * 5000,
    "x" * 300,
    "x" * 5000,
    "\0",
    "\n",
    "\x1b[31m",
    "\ud800",
    "\u00b2",
    "\u0663",
    "\u202e",
    os.devnull,
)


def flag_words(st, values, names=None):
    """Strategy of command lines: real and damaged flags, with fitting and other values."""
    actions = [
        a
        for a in train.build_parser()[0]._actions
        if a.dest != "help" and (names is None or a.dest in names)
    ]
    anything = st.one_of(
        st.sampled_from(values), st.text(max_size=8), st.integers().map(str), st.floats().map(str)
    )

    def words(action):
        value = (
            st.one_of(anything, st.sampled_from(list(action.choices)))
            if action.choices
            else anything
        )
        name = action.option_strings[0]
        return st.one_of(
            st.just([name]),
            value.map(lambda v: [name, v]),
            value.map(lambda v: [f"{name}={v}"]),
            st.tuples(value, value).map(lambda pair: [name, *pair]),
        )

    known = st.sampled_from(actions).flatmap(words)
    strange = st.one_of(anything.map(lambda v: [v]), anything.map(lambda v: ["--" + v]))
    return st.lists(st.one_of(known, known, known, strange), max_size=5).map(
        lambda parts: sum(parts, [])
    )


def end_before_reading(monkeypatch, prepare=None):
    """Ends each mode in a ValueError: before a file is read, or after `prepare`."""
    write_arrays("a.npz")
    write_puzzles("p.csv")

    def stop(*arguments):
        if prepare:
            prepare(*arguments)
        raise ValueError("stopped where the run would begin")

    monkeypatch.setattr(train, "prepare", stop)
    monkeypatch.setattr(train, "load_model", stop)
    monkeypatch.setattr(utils, "copy_definitions", stop)


@often(80, 60_000)
def test_random_flags_end_in_one_line(examples, throw, st, monkeypatch):
    end_before_reading(monkeypatch)
    before = everything()

    def check(argv):
        status, line = outcome(lambda: train.main(argv))
        helped = status == 0 and {"-h", "--help"} & {*argv}
        assert (status == 2 and is_one_line(line)) or helped, (status, line)
        assert everything() == before

    throw(check, examples, flag_words(st, GARBAGE))


SMALL = """
    0 1 2 3 5 16 24 0.5 0.9 1e-3 1e-320 1e300 auto True False a.npz p.csv
    widths=8,16,32,48 widths=2,2,2,2 depths=0,0,0 depths=1,2,1 stem_stride=2 stem_stride=4
    whiten=True width=4 hidden=4 pooled=1 free_steps=0 grad_steps=1 message_steps=2 pct_start=0
    pct_start=1 div_factor=1 anneal=linear cycle_momentum=False patience=0 factor=1
    warmup_steps=3
""".split()
READ_LATE = """
    data image_size val_fraction max_samples crop_padding flip min_crop_area cutout mixup
    cutmix seed model_args epochs batch_size accumulation_steps effective_batch
    clip_grad_norm optimizer lr weight_decay momentum ema_decay swa_start_epoch sam_rho
    scheduler scheduler_args warmup_epochs amp channels_last
    checkpoint_activations early_stopping monitor focal_gamma label_smoothing
""".split()


@often(30, 3000)
def test_random_flags_that_parse_end_in_one_line_or_make_a_run(examples, throw, st, monkeypatch):
    end_before_reading(monkeypatch, train.prepare)
    before = everything()

    def check(puzzles, argv):
        flags = [*(SUDOKU if puzzles else TINY), *argv, "--quiet"]
        status, line = outcome(lambda: train.main(flags))
        assert status in (1, 2) and is_one_line(line), (status, line)
        assert everything() == before

    throw(check, examples, st.booleans(), flag_words(st, SMALL, READ_LATE))


@often(60, 30_000)
def test_random_presets_end_in_one_line(examples, throw, st, monkeypatch):
    actions = [action.dest for action in train.build_parser()[0]._actions if action.dest != "help"]
    texts = st.one_of(st.text(max_size=9), st.sampled_from(GARBAGE))
    scalar = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
    deeper = lambda inner: st.one_of(st.lists(inner), st.dictionaries(texts, inner))
    value = st.recursive(scalar, deeper, max_leaves=8)
    keys = st.one_of(st.sampled_from(actions), st.text(max_size=6))
    preset = st.dictionaries(keys, value, max_size=4)
    presets = st.dictionaries(st.sampled_from(["p", "q"]), preset).map(json.dumps)
    real = (ROOT / "configs.json").read_text("utf-8").replace('"cpu"', '"p"')
    cuts = st.tuples(st.integers(0, len(real)), st.integers(0, 40), st.text(max_size=4))
    damaged = cuts.map(lambda cut: real[: cut[0]] + cut[2] + real[cut[0] + cut[1] :])
    starts = st.tuples(st.sampled_from(["[", '{"p":', '{"p": {"epochs": [']), st.integers(1, 3000))
    nested = starts.map(lambda pair: pair[0] * pair[1])
    content = st.one_of(presets, value.map(json.dumps), st.text(), damaged, nested)
    content = content.map(lambda text: text.encode("utf-8", "surrogatepass"))
    monkeypatch.setattr(train, "__file__", str(Path("train.py").absolute()))

    def check(content):
        Path("configs.json").write_bytes(content)
        found = []
        status, line = outcome(lambda: found.append(train.parse_flags(["--config", "p"])[1]))
        good = status is None and not line and not found[0].keys() & train.MODES - {"config"}
        assert good or (status == 2 and is_one_line(line)), (status, line, found)

    throw(check, examples, st.one_of(content, content, st.binary(max_size=60)))


@often(80, 40_000)
def test_random_puzzle_files_are_read_or_end_in_one_line(examples, throw, st):
    zeros = PUZZLE.replace(".", "0")
    board = st.sampled_from(
        [PUZZLE, SOLUTION, "." * 81, PUZZLE[:80], PUZZLE + "1", zeros, PUZZLE[:9]]
    )
    words = st.sampled_from(
        ["puzzle", "solution", "#", "[Puzzle]", "---+---", '"', "rating", "\ufeff"]
    )
    cell = st.one_of(
        board, board, st.text("123456789.0Xx*_", max_size=90), st.text(max_size=5), words
    )
    line = st.lists(cell, max_size=4).map(",".join)
    text = st.lists(st.one_of(line, line, st.sampled_from(["", " ", "\t"])), max_size=14)
    text = st.tuples(text, st.sampled_from(["\n", "\r\n", "\r", " \n", "\n\n"])).map(
        lambda pair: pair[1].join(pair[0])
    )
    content = st.one_of(
        text.map(lambda t: t.encode("utf-8", "surrogatepass")), st.binary(max_size=200)
    )
    path = Path("p.csv")

    def check(content, packed, cut, both):
        content = gzip.compress(content, 1) if packed else content
        path.write_bytes(content[: len(content) - cut] if packed else content)
        found = one_line_or(lambda: data.read_sudoku(path, both))
        if found is not None:
            puzzles, solutions = found
            assert (
                puzzles.ndim == 2 and puzzles.shape[1] == 81 and len(puzzles) and puzzles.max() <= 9
            )
            assert data.consistent(puzzles).all()
            if solutions is not None:
                assert (
                    solutions.shape == puzzles.shape
                    and solutions.min() >= 1
                    and data.consistent(solutions).all()
                )
                assert (solutions[puzzles > 0] == puzzles[puzzles > 0]).all()

    throw(check, examples, content, st.booleans(), st.integers(0, 9), st.booleans())


def sound(found, size):
    """Whether what `data.load` gave is what the loop takes."""
    splits = found.splits.values()
    shapes = {split.images.shape[1:] for split in splits}
    assert (
        len(shapes) == 1 and found.image_size >= 24 and shapes.pop()[:2] == (found.image_size,) * 2
    )
    assert (
        size in (0, found.image_size)
        and np.isfinite(found.mean).all()
        and np.isfinite(found.std).all()
    )
    for split in splits:
        assert len(split.images) == len(split.labels) > 0 and 0 <= split.labels.min()
        assert (
            split.labels.max() < len(found.classes)
            and np.asarray(split.images[:2]).dtype == np.uint8
        )


@often(80, 25_000)
def test_random_idx_files_are_read_or_end_in_one_line(examples, throw, st):
    side = st.one_of(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**32 - 1))
    body = st.one_of(st.binary(max_size=150), st.just(bytes(144)), st.just(bytes([0, 1] * 40)))
    magic = st.one_of(*[st.none()] * 6, st.binary(max_size=4))

    def check(shape, labels, images, classes, magic, packed, fits, cut, size):
        folder = Path("f")
        folder.mkdir(exist_ok=True)
        if fits:  # else nearly all would end at their lengths
            shape, labels = (len(classes), *(min(side, 6) for side in shape[1:])), len(classes)
            images = (images or b"\0") * 36 * len(classes)
            images = images[: shape[0] * shape[1] * shape[2]]
        for name, axes, sides, content in (
            ("images-idx3", 3, shape, images),
            ("labels-idx1", 1, (labels,), classes),
        ):
            raw = (
                (bytes([0, 0, 8, axes]) if magic is None else magic)
                + struct.pack(f">{axes}I", *sides)
                + content
            )
            raw = gzip.compress(raw, 1) if packed else raw
            path = folder / f"train-{name}-ubyte"
            path.with_suffix("" if packed else ".gz").unlink(missing_ok=True)
            path.with_suffix(".gz" if packed else "").write_bytes(raw[: len(raw) - cut])
        found = one_line_or(lambda: data.load("f", size, 0.3))
        assert found is None or sound(found, size) is None

    throw(
        check,
        examples,
        st.tuples(side, side, side),
        side,
        body,
        st.binary(max_size=40),
        magic,
        st.booleans(),
        st.booleans(),
        st.sampled_from([0, 0, 0, 1, 5]),
        st.sampled_from([0, 24, 40]),
    )


@often(80, 25_000)
def test_random_npz_members_are_read_or_end_in_one_line(examples, throw, st):
    kinds = "|u1 <f4 <i8 <u8 |b1 |O <U3 |S0 |V0 <c8 <M8[s] >i2 |i1 <f2 |V99999999".split()
    odd = st.sampled_from(["", [("a", "<i4")], [("a", "|O")], None, 3])
    descr = st.one_of(st.sampled_from(kinds), st.sampled_from(kinds), odd, st.text(max_size=5))
    shape = st.one_of(
        st.lists(st.integers(0, 6), max_size=5).map(tuple),
        st.just((5, 4, 3)),
        st.just((5,)),
        st.tuples(st.integers(), st.integers(-2, 2**40)),
        st.integers(),
        st.text(max_size=3),
    )
    lie = st.builds(
        npy,
        shape,
        descr,
        st.binary(max_size=120),
        st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]),
        st.one_of(st.none(), st.none(), st.integers(0, 65_535)),
    )

    def true(array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    count, kind = (
        st.integers(0, 9),
        st.sampled_from(["u1", "f4", "i8", "u8", "i1", "f8", "bool", "u2"]),
    )
    number = st.sampled_from([0.0, 1.0, -1.0, 0.5, 200.0, np.nan, 2.0**40])

    @np.errstate(invalid="ignore")
    def resized(shape, kind, number):
        return true(np.resize([0.0, number, 1.0], shape).astype(kind))

    honest = st.builds(resized, st.lists(count, max_size=4), kind, number)
    names = "x.npy y.npy x_train.npy y_train.npy x_val.npy y_val.npy x_test.npy y_test.npy"
    names = [*names.split(), "x", "y", "z.npy"]
    content = st.one_of(lie, honest, honest, st.binary(max_size=99))
    members = st.dictionaries(st.sampled_from(names), content, max_size=5)
    labels = st.lists(st.integers(-1, 5), min_size=1, max_size=9)
    pair = labels.map(
        lambda y: {
            "x.npy": true(np.arange(len(y) * 20, dtype=np.uint8).reshape(-1, 4, 5)),
            "y.npy": true(np.array(y)),
        }
    )
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3)

    def check(members, method, flips, harm, size):
        path = zipped(Path("a.npz"), members, method)
        raw = bytearray(path.read_bytes())
        for place, value in flips if harm else ():
            raw[int(place * len(raw))] = value
        path.write_bytes(raw)
        with np.errstate(all="ignore"):
            found = one_line_or(lambda: data.load("a.npz", size, 0.3))
        assert found is None or sound(found, size) is None

    throw(
        check,
        examples,
        st.one_of(members, members, pair),
        st.sampled_from(methods),
        flips,
        st.booleans(),
        st.sampled_from([0, 24, 40]),
    )


@often(100, 40_000)
def test_random_bytes_of_pictures_are_decoded_or_end_in_one_line(examples, throw, st):
    image = pytest.importorskip("PIL.Image")
    rng, whole = np.random.default_rng(0), []
    picture = image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    exif = image.Exif()
    exif[0x0112], exif[0x010E] = 6, "upright"
    for kind in data.IMAGE_FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "I;16", "CMYK", "1"):
            buffer = io.BytesIO()
            try:
                grey = image.fromarray(rng.integers(0, 65_536, (9, 12), np.uint16))
                (grey if mode == "I;16" else picture.convert(mode)).save(buffer, kind, exif=exif)
            except (OSError, ValueError, KeyError):
                continue  # a mode that the format does not have
            whole.append(buffer.getvalue())
    assert len(whole) > 15
    place = st.floats(0, 1)
    harm = st.one_of(
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=4)),
        st.tuples(
            st.just("set"),
            st.floats(0, 0.1),
            st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff"]),
        ),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("cut"), place, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("end"), place, st.just(b"")),
    )

    def check(content, harms, size):
        content = bytearray(content)
        for kind, share, what in harms:
            i = int(share * len(content))
            content[
                i : {
                    "set": i + len(what),
                    "insert": i,
                    "cut": i + 3 * len(what),
                    "end": len(content),
                }[kind]
            ] = b"" if kind == "cut" else what
        Path("a.png").write_bytes(content)
        found = one_line_or(lambda: data.decode_image(Path("a.png"), size))
        assert found is None or (found.shape == (size, size, 3) and found.dtype == np.uint8)
        assert data.shorter_side(Path("a.png")) >= 0

    content = st.one_of(*[st.sampled_from(whole)] * 4, st.binary(max_size=60))
    throw(check, examples, content, st.lists(harm, max_size=3), st.sampled_from([8, 24, 30]))


# ------------------------------------------------------------------------------------------- memory

HOGS = """
import os, resource, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
import data
import test_inputs as t
from PIL import Image

def refuse(name, call):
    try:
        call()
    except (ValueError, OSError) as error:
        assert "memory" not in str(error).lower() and "allocate" not in str(error), error
        print(name, "refused:", error)

# libraries are loaded and threads started
data.decode_image(t.pictures(Path("warm")) / "ant" / "0.png", 24)
data.match_size(data.Data({{"train": data.Split(*t.arrays(4))}}, [], 32, ""))
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + {limit} * 2**20,) * 2)

refuse("idx", lambda: data.load(t.idx(Path("f"), (t.HUGE, b"abc"), ((1,), b"a"))))
refuse("idx.gz", lambda: data.load(t.idx(Path("g"), (t.HUGE, b"abc"), ((1,), b"a"), ".gz")))
members = {{"x.npy": t.npy(t.HUGE), "y.npy": t.npy((2**16,))}}
refuse("npz", lambda: data.load(t.zipped(Path("a.npz"), members)))
with open("cifar.bin", "wb") as file:
    file.truncate(2**36)
Path("cifar").mkdir()
os.rename("cifar.bin", "cifar/data_batch_1.bin")
refuse("cifar", lambda: data.load("cifar"))
refuse("images", lambda: data.built_in(2048))
x, y = np.zeros((64, 1, 10**5), np.uint8), np.arange(64) % 4
refuse("strips", lambda: data.load(t.npz(x=x, y=y), 1024))
x, y = np.zeros((4, 1, 400), np.uint8), np.arange(4) % 2
data.load(t.npz(x=np.tile(x, (1, 6, 1)), y=y), 128)
refuse("blanks", lambda: data.read_sudoku(t.packed_lines([b" " * 2**20] * 250)))
refuse("zeros", lambda: data.read_sudoku(t.packed_lines([bytes(2**20)] * 250)))
lines = [t.PUZZLE.encode() + b"\\n", b"," * 2**22]
refuse("commas", lambda: data.read_sudoku(t.packed_lines(lines)))
for sides in ((2**31 - 1, 2**31 - 1), (50_000, 50_000), (2**31 - 1, 1)):
    Path("a.png").write_bytes(t.png(*sides))
    refuse(f"png {{sides}}", lambda: data.decode_image(Path("a.png"), 24))
for kind, at in (("GIF", 6), ("BMP", 18)):
    Image.new("L", (9, 9)).save("a.gif", kind)
    raw = bytearray(Path("a.gif").read_bytes())
    raw[at : at + 4] = b"\\xff\\xff\\xff\\x7f"
    Path("a.gif").write_bytes(raw)
    refuse(kind, lambda: data.decode_image(Path("a.gif"), 24))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux bounds a process's memory"
)
def test_what_declares_more_memory_than_there_is_takes_none_of_it(tmp_path):
    pytest.importorskip("PIL")
    code = HOGS.format(root=str(ROOT), tests=str(ROOT / "tests"), limit=200)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    refusals = done.stdout.splitlines()
    assert len(refusals) == 14 and all("refused" in line for line in refusals), (
        done.stdout + done.stderr
    )
