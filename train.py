"""Train an image classifier or a Sudoku solver on one laptop GPU, or on a CPU; stop, resume, evaluate, use it.

    python train.py --model efficientnet_b0 --accumulation_steps 2 --clip_grad_norm 1.0
    python train.py --model custom --data photos/ --ema_decay 0.999    # your own folder of class folders
    python train.py --config cifar10 --data cifar10/                   # a preset of configs.json
    python train.py --resume                                           # the last run, from its last save
    python train.py --find_lr                                          # a learning-rate range test
    python train.py --evaluate runs/NAME/best.pt runs/NAME/ema.pt      # side by side on the test split
    python train.py --predict runs/NAME/best.pt --input photos/new/    # classes of pictures
    python train.py --predict --input puzzle.sdk                       # solve a Sudoku
    python train.py --export runs/NAME/best.pt --output model.pt2      # for torch.export's runtimes, or .onnx
    torchrun --nproc_per_node 2 train.py --run_name NAME               # a process a GPU, or several on CPUs

A *step* is one optimizer update over a window of up to accumulation_steps batches; schedules, EMA,
logs and saves count in steps. Order, augmentation and dropout are functions of the seed and of the
epoch, the sample and the step, so a run resumed at any step equals the run that was never stopped.
"""

import argparse
import contextlib
import copy
import csv
import difflib
import errno
import gc
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported, for seconds: no traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

import data
import model as models
import utils

AUTO = ("auto", "batch_size"), ("auto", "lr")  # found when the run began
MAX_BAD_STEPS = 25  # in a row; fp16 halves its scale 16 times from 65,536 to 1, so 25 is no mere overflow
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RUNS = Path("runs")
MODES = tuple("config resume find_lr evaluate predict export input search tta output".split())  # not in config.json
BOTH = "tta quiet output batch_size device amp channels_last message_steps"
READ_BY = {  # the flags that a mode reads; the checkpoint tells it the rest
    "evaluate": f"evaluate data cache_dir workers {BOTH}".split(),
    "predict": f"predict input search {BOTH}".split(),
    "export": "export output message_steps".split(),
}
OUTPUTS = {"find_lr": (".csv",), "evaluate": (".json", ".csv"), "predict": (".csv", ".json", ".sdm", ".sdk"),
           "export": (".pt2", ".onnx")}  # fmt: skip
WEIGHTS = Path(__file__).with_name("weights") / "sudoku_extreme.pt"  # what --predict takes where no checkpoint is named
MOST_SHOWN, MAX_GUESSES = 100, 100_000  # predictions on the terminal; of --search
TRACK_EVERY = 50  # steps between what --tensorboard and --wandb get within an epoch
FREE_ON_RESUME = ("device", "workers", "save_every", "tensorboard", "wandb", "quiet", "run_name", "cache_dir", "data",
                  "memory_gb", "checkpoint_activations", "timeout")  # fmt: skip


# -------------------------------------------------------------------------------------- the flags


def number(kind, low=-math.inf, high=math.inf, open_low=False, open_high=False, word=None):
    """An argparse type: a finite int or float within bounds, or the one `word` that stands for itself."""
    span = f"{'above' if open_low else 'at least'} {low:g}" if low > -math.inf else ""
    span += f"{' and ' if span else ''}{'below' if open_high else 'at most'} {high:g}" if high < math.inf else ""

    def parse(text):
        if text == word and word:
            return text
        try:
            value = kind(text)
            float(value)
        except (ValueError, OverflowError):
            value = math.nan
        inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
        if not (math.isfinite(value) and inside):
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {name} {span}{f' or {word}' if word else ''}, got {shown(text)}")
        return value

    return parse


def boolean(text):
    if text not in ("True", "False", "true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {shown(text)}")
    return text in ("True", "true")


def integers(count, low, example):
    """An argparse type: `count` integers from `low` to 9,999 with commas; the text itself, as presets hold it."""

    def parse(text):
        if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text) or len(text.split(",")) != count \
                or min(map(int, text.split(","))) < low:  # fmt: skip
            raise argparse.ArgumentTypeError(f"must be {count} integers from {low}, as {example}, got {shown(text)}")
        return text

    return parse


def file_path(text):
    """An argparse type: the text itself, where a system could have a file of that name."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: no such file or folder; give a path")
    try:
        longest = max(len(text) / 16, *map(len, os.fsencode(text).split(b"/")))  # 255 bytes a name, 4,080 in all
    except UnicodeEncodeError:  # half a surrogate pair
        longest = math.inf
    if "\0" in text or longest > 255:
        raise argparse.ArgumentTypeError(f"is a name that no file can have, got {shown(text)}; give another")
    return text


def run_name(text):
    """A folder's name that cannot leave runs/ and that every file system takes."""
    reserved = {"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(10))}
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text) or text.endswith(".") or ".." in text:
        raise argparse.ArgumentTypeError(
            f"must be 1 to 64 letters, digits, '.', '_' or '-', the first no sign, got {shown(text)}"
        )
    if text.split(".")[0].upper() in reserved:
        raise argparse.ArgumentTypeError(f"is a reserved name on Windows, got {shown(text)}; choose another")
    return text


def shown(text):
    """The repr of what a user gave, cut to a line's length."""
    return repr(text) if len(repr(text)) <= 80 else repr(text)[:77] + "..."


class Parser(argparse.ArgumentParser):
    """argparse, with errors in the kit's form: one line, exit status 2."""

    def error(self, message):
        fail(message.removeprefix("argument "))


def fail(message):
    """End with exit status 2 and one line on standard error."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    line = line if len(line) <= 1000 else f"{line[:700]} ... {line[-250:]}"  # what to do stands at the end
    rank = os.environ.get("RANK", "0")
    print(f"error: {f'process {rank}: ' * (rank != '0')}{line}", file=sys.stderr)
    raise SystemExit(2)


def said(error):
    """What to say of a ValueError or of the system's OSError, whose path goes first."""
    if isinstance(error, OSError) and error.filename is not None:
        hint = "make room there" if error.errno == errno.ENOSPC else "look at the path and at who may use it"
        return f"{error.filename}: {error.strerror}; {hint}"
    return str(error)


def build_parser():
    parser = Parser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    positive, share = number(int, 1), number(float, 0, 1, open_high=True)
    at_least_0, rate = number(float, 0), number(float, 0, open_low=True)

    add = parser.add_argument_group("data").add_argument
    add("--data", type=file_path, help="a folder of class folders, IDX or CIFAR files; NPZ or puzzles; else built-in")
    add("--image_size", type=number(int, 0, 2048), default=0, help="px a side; 0: what suits the source")
    add("--val_fraction", type=share, default=0.1, help="of each class, set aside where the data has no val split")
    add("--max_samples", type=number(int, 0), default=0, help="a subset of each split, images by class; 0: all")
    add("--workers", type=number(int, 0, 64), help="loader processes; else chosen: none where the data fits in memory")
    add("--cache_dir", type=file_path, default=".cache", help="where decoded image folders are kept")
    add("--crop_padding", type=number(int, 0, 256), default=4, help="px of the padded crop")
    add("--flip", type=boolean, nargs="?", const=True, help="from left to right; else on for colour images only")
    add("--min_crop_area", type=number(float, 0, 1, open_low=True), default=0.35, help="of random resized crops")
    add("--cutout", type=number(int, 0, 2048), default=0, help="px a side of the square set to the mean")
    alpha = number(float, 0, 100)
    add("--mixup", type=alpha, default=0.0, metavar="ALPHA", help="averages pairs by Beta(alpha, alpha); 0: off")
    add("--cutmix", type=alpha, default=0.0, metavar="ALPHA", help="boxes of one in another; both: one at random")
    add("--val_every", type=number(int, 1, word="adaptive"), default=1, help="epochs between validations, the last "
        "always; adaptive: 1 up to epoch 10, 2 up to 30, then 3")  # fmt: skip
    add("--val_samples", type=number(int, 0), default=0, help="a stratified sample scored in between; 0: none")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(models.MODELS), default="efficientnet_b0", help="the network")
    add("--pretrained", type=file_path, nargs="?", const="official", help="a weights file; alone: the official B0 file")
    four, three = integers(4, 2, "64,128,256,416"), integers(3, 0, "2,0,2")
    add("--widths", type=four, help="custom: channels of the stem and the three stages; else 64,128,256,416")
    add("--depths", type=three, help="custom: convolutions of the stages' residual parts; else 2,0,2")
    add("--whiten", type=boolean, nargs="?", const=True, default=False, help="custom: a frozen stem that decorrelates")
    size, steps = number(int, 1, 1024), number(int, 1, 10_000)
    add("--width", type=size, default=32, help="sudoku_gnn: features of a candidate's state")
    add("--hidden", type=size, default=64, help="sudoku_gnn: features of a message")
    add("--message_steps", type=steps, help="sudoku_gnn: steps in evaluation; else the checkpoint's, 64")
    add("--free_steps", type=number(int, 0, 10_000), default=24, help="sudoku_gnn: steps without gradient, at most")
    add("--grad_steps", type=steps, default=6, help="sudoku_gnn: steps with gradient and loss after them")
    add("--constraint_weight", type=at_least_0, default=0.0, help="sudoku_gnn: of the expected violations")
    add("--curriculum", type=boolean, nargs="?", const=True, default=False, help="easy, medium, then hard puzzles")
    add("--focal_gamma", type=at_least_0, default=0.0, help="weighs losses by (1 - p)^gamma; 0: off")
    add("--label_smoothing", type=share, default=0.0, help="share of the target spread over all classes")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=10, help="passes over the training split")
    add("--batch_size", type=number(int, 1, word="auto"), default=16, help="a micro-batch's samples; auto: what fits")
    add("--accumulation_steps", type=positive, default=1, help="micro-batches a step")
    add("--effective_batch", type=positive, help="samples a step, in place of accumulation_steps; auto's 128")
    add("--clip_grad_norm", type=at_least_0, default=0.0, help="largest gradient norm; 0: no clipping")
    add("--optimizer", choices=["adamw", "sgd", "muon"], help="else muon for sudoku_gnn, adamw for images")
    add("--lr", type=number(float, 0, open_low=True, word="auto"), help="peak; else 0.003 adamw, 0.1 sgd, 0.005 muon")
    add("--weight_decay", type=at_least_0, default=0.01, help="on matrices and filters alone")
    add("--momentum", type=share, default=0.9, help="of sgd; adamw's beta1; OneCycle cycles it, muon's too")
    add("--ema_decay", type=share, default=0.0, help="of the weights' moving average; 0: none")
    add("--swa_start_epoch", type=number(int, 0), default=0, help="the first whose weights are averaged; 0: none")
    add("--swa_lr", type=rate, help="the rate reached over that epoch and kept; else the schedule's")
    add("--sam_rho", type=at_least_0, default=0.0, help="SAM: a second pass, so far uphill; 0: off")
    add("--freeze_epochs", type=number(int, 0), default=0, help="at first, that train the head alone; 0: none")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of everything that is drawn")

    add = parser.add_argument_group("schedule").add_argument
    add("--scheduler", choices=list(SCHEDULES), default="onecycle", help="of the learning rate, a step at a time")
    add("--max_lr", type=rate, help="OneCycle's peak; else --lr")
    add("--pct_start", type=number(float, 0, 1), default=0.3, help="OneCycle's rising share")
    add("--div_factor", type=rate, default=25.0, help="OneCycle: peak / first rate")
    add("--final_div_factor", type=rate, default=1e4, help="OneCycle: first / last rate")
    add("--anneal", choices=["cos", "linear"], default="cos", help="OneCycle's form")
    add("--cycle_momentum", type=boolean, nargs="?", const=True, default=True, help="OneCycle: 0.95, 0.85, 0.95")
    add("--warmup_epochs", type=at_least_0, default=0.0, help="linear, of cosine, plateau and constant")
    add("--scheduler_patience", type=number(int, 0), default=3, help="plateau: validations without a gain before a cut")
    add("--scheduler_factor", type=number(float, 0, 1, True, True), default=0.1, help="plateau: the cut")

    add = parser.add_argument_group("machine").add_argument
    add("--device", type=str, default="auto", help="auto, cuda, cuda:N, mps or cpu")
    precisions = ["auto", "True", "False", "fp16", "bf16"]
    add("--amp", choices=precisions, nargs="?", const="True", default="auto", help="mixed precision")
    add("--channels_last", type=boolean, nargs="?", const=True, default=True, help="memory format of the model")
    add("--memory_gb", type=rate, help="of the GPU, else all but a twentieth; on a CPU what --batch_size auto may take")
    recompute = "compute them again in the backward pass in place of keeping them"
    add("--checkpoint_activations", type=boolean, nargs="?", const=True, default=False, help=recompute)
    add("--deterministic", type=boolean, nargs="?", const=True, default=True, help="cuDNN too, for bitwise resume")
    add("--timeout", type=rate, default=600.0, help="seconds that a loader worker or another process may be silent")
    add("--sync_batchnorm", type=boolean, nargs="?", const=True, default=False, help="torchrun: over all GPUs")
    modes = ["off", "default", "max-autotune-no-cudagraphs"]  # CUDA graphs reuse the memory of accumulated gradients
    add("--compile", choices=modes, nargs="?", const="default", default="off", help="torch.compile, where it works")

    add = parser.add_argument_group("run").add_argument
    add("--run_name", type=run_name, help="the folder under runs/; else model and time")
    add("--save_every", type=number(int, 0), default=0, help="steps between saves within an epoch; 0: at its end only")
    named = lambda text: text and file_path(text)
    add("--resume", type=named, nargs="?", const="", help="go on with a run (alone: the one started last)")
    add("--early_stopping", type=number(int, 0), default=0, metavar="PATIENCE", help="validations without gain; 0: off")
    add("--min_delta", type=at_least_0, default=0.0, help="the least change that is a gain")
    add("--monitor", type=str, help="what best.pt and patience go by; else accuracy or solve_rate of val or ema")
    add("--tensorboard", type=boolean, nargs="?", const=True, default=False, help="scalars and samples for TensorBoard")
    add("--wandb", type=boolean, nargs="?", const=True, default=False, help="the same for Weights & Biases")
    add("--quiet", type=boolean, nargs="?", const=True, default=False, help="no bars, for logs in files")
    add("--config", type=str, metavar="NAME", help="a preset of configs.json; flags override it")

    add = parser.add_argument_group("other modes").add_argument
    add("--find_lr", action="store_true", help="sweep the learning rate and suggest one")
    add("--evaluate", type=file_path, nargs="+", metavar="CKPT", help="checkpoints on the test split, else on val")
    alone = {"nargs": "?", "const": str(WEIGHTS)}
    add("--predict", type=file_path, **alone, metavar="CKPT", help="apply it to --input; alone: Sudoku")
    add("--export", type=file_path, metavar="CKPT", help="write it to --output, with what stands before and after it")
    views = "average over six views of an image, eight symmetries of a puzzle"
    add("--tta", type=boolean, nargs="?", const=True, default=False, help=f"--evaluate, --predict: {views}")
    add("--input", type=file_path, nargs="+", metavar="PATH", help="pictures, folders, globs; or a file of puzzles")
    add("--search", type=boolean, nargs="?", const=True, default=False, help="finish what the network does not, proved")
    add("--output", type=file_path, metavar="FILE", help="of --find_lr .csv, --evaluate .json .csv, --predict .csv "
        ".json (puzzles: .csv .sdm .sdk), --export .pt2 .onnx")  # fmt: skip
    return parser


def parse_flags(argv):
    """(config, given): all flags resolved, and those that flags or the preset set; flags over preset over defaults."""
    parser = build_parser()
    defaults = vars(parser.parse_args([]))
    actions = {action.dest: action for action in parser._actions if action.dest in defaults}
    for action in actions.values():
        if action.help and action.default not in (None, argparse.SUPPRESS, False, ""):
            action.help += f" (default: {action.default})"
        action.default = argparse.SUPPRESS  # so that a flag that equals its default still counts as given
    argv = [re.sub(r"^--[^=]+", lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in argv]
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        fail(f"{shown(name)} is no flag; {nearest(name, ['--' + key for key in defaults])}")
    flags = vars(flags)
    presets = Path(__file__).with_name("configs.json")
    preset = read_preset(presets, flags["config"], actions) if "config" in flags else {}
    if "effective_batch" in flags or flags.get("batch_size") == "auto":  # the preset's samples a step stay, or give way
        steps, size = preset.pop("accumulation_steps", 1), preset.get("batch_size", "auto")
        preset |= {"effective_batch": steps * size} if size != "auto" else {}
    given = {**preset, **flags}
    return {**defaults, **given}, given


def nearest(name, names):
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "see --help"


def read_preset(path, name, actions):
    """The checked flags of preset `name` in the JSON file at `path`; every fault ends in one line."""

    def no_twice(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{path.name}: key {shown(key)} stands twice; remove one")
            seen.add(key)
        return dict(pairs)

    def no_constant(text):
        raise ValueError(f"{path.name}: {text} is no number for JSON; give a finite one")

    try:
        if path.is_file() and path.stat().st_size > 2**20:
            raise ValueError(f"{path.name}: over {2**20:,} bytes; a preset is one short object")
        presets = json.loads(path.read_text("utf-8"), object_pairs_hook=no_twice, parse_constant=no_constant)
    except FileNotFoundError:
        fail(f"{path}: no such file; presets are read from beside train.py")
    except UnicodeDecodeError as error:
        fail(f"{path.name}: not UTF-8 at byte {error.start}; save it as UTF-8")
    except json.JSONDecodeError as error:
        fail(f"{path.name}:{error.lineno}:{error.colno}: not JSON: {error.msg}")
    except RecursionError:
        fail(f"{path.name}: nested too deep; a preset is one flat object")
    except (ValueError, OSError) as error:  # the first above, or of a number with too many digits
        fail(said(error) if path.name in str(error) else f"{path.name}: {error}")
    if not isinstance(presets, dict) or not all(isinstance(preset, dict) for preset in presets.values()):
        fail(f'{path.name}: must be an object of objects, {{"name": {{"flag": value}}}}')
    if name not in presets:
        fail(f"--config {shown(name)} is no preset; there are {', '.join(presets) or 'none'}")
    checked = {}
    for key, value in presets[name].items():
        if key not in actions or key in MODES:
            fail(f"{path.name}: {name}: {shown(key)} is no flag for a preset; {nearest(key, list(actions))}")
        try:
            checked[key] = checked_value(key, value, actions[key])
        except ValueError as error:
            fail(f"{path.name}: {name}: {error}")
    return checked


def checked_value(key, value, action):
    """The value of a flag in JSON as argparse's `action` takes it; ValueError in one line where it does not."""
    text = value if isinstance(value, str) else {list: "[...]", dict: "{...}"}.get(type(value)) or json.dumps(value)
    try:
        found = (action.type or str)(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{key} {error}") from None
    if isinstance(found, str) != isinstance(value, str):
        wanted = {str: "a string", bool: "true or false"}.get(type(found), "a number")
        raise ValueError(f"{key} must be {wanted}, got {shown(text) if isinstance(value, str) else text}")
    if action.choices and value not in action.choices:
        raise ValueError(f"{key} must be one of {action.choices}, got {shown(value)}")
    return found


# ------------------------------------------------------------------------- what the loop carries


@dataclass(frozen=True)
class Task:
    """What the loop needs of a model family: pure functions of (outputs, targets).

    `loss` is a *sum* over the items of the batch (a float32 scalar), which `items` counts. `measure`
    gives (sums [metrics], what they were summed over: a number, or [metrics]), in the order of `metrics`.
    `monitor` is the metric that best.pt goes by, `shown` how logs format the metrics, `unit` what
    samples are called.
    """

    loss: Callable
    measure: Callable = lambda outputs, targets: (torch.zeros(0, device=outputs.device), 0)
    metrics: tuple = ()
    items: Callable = len
    monitor: str = "loss"
    shown: dict = field(default_factory=dict)
    unit: str = "samples"


class Sums(NamedTuple):
    """Totals over samples, on the device: the loss above its items, and the metrics above what each counted."""

    loss: torch.Tensor | float  # scalar
    items: torch.Tensor | int
    values: torch.Tensor  # [metrics]
    counts: torch.Tensor | int  # [metrics], or one count for all

    def plus(self, other):
        return Sums(*(a + b for a, b in zip(self, other)))


@dataclass
class TrainState:
    """All that a run mutates; what is not derived from the config is saved and restored whole."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: dict | None = None  # name -> tensor, as the model's state dict
    swa: AveragedModel | None = None
    step: int = 0  # attempted steps; bad ones count, so that schedules and logs agree
    epoch: int = 0  # whole epochs done
    epoch_step: int = 0  # steps done in the epoch under way
    bad_steps: int = 0
    bad_in_a_row: int = 0
    sums: Sums | None = None  # of the epoch under way, in float64
    micro_batch: int | None = None  # samples at once, since memory ran out; None: batches as they come
    seconds: float = 0.0  # training time of the epoch under way
    gradient_norm: float = 0.0  # before clipping, smoothed over good steps
    history: list = field(default_factory=list)  # a dict an epoch: metrics.csv
    finished: bool = False
    forward: Callable | None = None  # the model, compiled or distributed where asked; not saved
    stop: bool = False  # that this process asks to stop; after a step, that any one does; not saved

    PLAIN = tuple(
        "step epoch epoch_step bad_steps bad_in_a_row micro_batch seconds gradient_norm history finished".split()
    )

    def __post_init__(self):  # gathered once: walking the modules costs 0.3 ms for EfficientNet-B0
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.buffers = list(self.model.buffers())
        self.live = self.model.state_dict()  # the tensors themselves, not copies

    def to_checkpoint(self):
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "ema": self.ema, "sums": self.sums and list(self.sums),
            "swa": self.swa and self.swa.state_dict(),
            **{name: getattr(self, name) for name in self.PLAIN},
        }  # fmt: skip

    def load(self, saved):
        """Set this state to a saved one; ValueError where the model's shapes differ."""
        models.check_state_dict(self.model.state_dict(), saved["model"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for p, moments in getattr(self.optimizer, "state", {}).items():  # in the memory format of this device
            moments |= {k: torch.empty_like(p).copy_(v) for k, v in moments.items() if v is not None and v.ndim}
        if saved["scaler"] and self.scaler.is_enabled():  # a run may go on at another precision
            self.scaler.load_state_dict(saved["scaler"])
        for name in self.PLAIN:
            setattr(self, name, saved[name])
        device = self.parameters[0].device
        like = dict(device=device, dtype=sum_dtype(device))
        self.sums = saved["sums"] and Sums(*(v.to(**like) if torch.is_tensor(v) else v for v in saved["sums"]))
        if self.ema is not None:
            for name, tensor in saved["ema"].items():
                self.ema[name].copy_(tensor)
        if self.swa is not None:
            self.swa.load_state_dict(saved["swa"])


SAVED = (*TrainState.PLAIN, "model", "optimizer", "scaler", "ema", "swa", "sums", "meta", "config")


class Together:
    """Optimizers that share out a model's parameters, used as one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, saved):
        for part, state in zip(self.parts, saved["parts"]):
            part.load_state_dict(state)


class Muon:
    """torch.optim.Muon, which takes matrices alone, for filters too: [out, in, h, w] is [out, in * h * w]."""

    def __init__(self, parameters, lr, weight_decay, momentum):
        matrices = [nn.Parameter(as_matrix(p.detach())) for p in parameters]
        self.inner = torch.optim.Muon(matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        self.param_groups = [{**self.inner.param_groups[0], "params": parameters}]

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, saved):
        self.inner.load_state_dict(saved)
        self.param_groups[0].update({**self.inner.param_groups[0], "params": self.param_groups[0]["params"]})

    def step(self):
        inner, outer = self.inner.param_groups[0], self.param_groups[0]
        inner.update({name: value for name, value in outer.items() if name != "params"})
        for matrix, p in zip(inner["params"], outer["params"]):
            matrix.grad = None if p.grad is None else as_matrix(p.grad)
        self.inner.step()


def as_matrix(weight):
    """A view [out, rest] of a dense weight or gradient [out, ...], its columns in the order of its memory."""
    return weight.as_strided((len(weight), weight[0].numel()), (weight[0].numel(), 1))


def build_optimizer(model, name, lr, weight_decay, momentum, device):
    """AdamW or SGD with Nesterov momentum, fused where the device has it, or Muon beside AdamW.

    Muon (Jordan et al. 2024) makes each update of a matrix or of dense filters orthogonal, at a scale where AdamW's
    rates hold; heads, embeddings, depthwise filters, biases and scales stay with AdamW.
    """
    groups = models.parameter_groups(model, weight_decay)
    fused = device.type in ("cuda", "cpu", "mps")
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
        for p in (p for group in groups * (momentum > 0) for p in group["params"]):
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)  # it fails where only some have one: after freezing
        return sgd
    head = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    suits = lambda p: name == "muon" and p[0].numel() > p[0, 0].numel() and not (head and p is head[0])
    matrices = [p for p in groups[0]["params"] if suits(p)]
    if matrices:
        groups[0]["params"] = [p for p in groups[0]["params"] if not suits(p)]
        groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, lr, betas=(momentum, 0.999), fused=fused)
    return Together(Muon(matrices, lr, weight_decay, momentum), adamw) if matrices else adamw


# ------------------------------------------------------------------------------------- schedules
# Pure functions of the step, 0 to total_steps - 1, to (learning rate, momentum or None for the optimizer's own).


def onecycle(step, total_steps, max_lr, pct_start, div_factor, final_div_factor, anneal="cos", cycle_momentum=True):
    """Up to max_lr and down to max_lr / div_factor / final_div_factor (Smith & Topin 2018); as torch's OneCycleLR."""
    rise_end, last = pct_start * total_steps - 1, total_steps - 1
    first = max_lr / div_factor
    if step <= rise_end and step < last:
        share = step / rise_end if rise_end > 0 else 1.0
        (lr_from, lr_to), (m_from, m_to) = (first, max_lr), (0.95, 0.85)
    else:
        share = (step - rise_end) / (last - rise_end) if last > rise_end else 1.0
        (lr_from, lr_to), (m_from, m_to) = (max_lr, first / final_div_factor), (0.85, 0.95)
    if anneal == "cos":
        share = (1 - math.cos(math.pi * share)) / 2
    return lr_from + (lr_to - lr_from) * share, (m_from + (m_to - m_from) * share) if cycle_momentum else None


def warmup(step, warmup_steps):
    """Linear from 1 / warmup_steps to 1 over the first warmup_steps, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step, total_steps, lr, warmup_steps=0):
    """Linear warm-up, then half a cosine down to 0 at total_steps (Loshchilov & Hutter 2017)."""
    if step < warmup_steps:
        return lr * warmup(step, warmup_steps), None
    return lr * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2, None


def constant(step, lr, warmup_steps=0, scale=1.0):
    """Linear warm-up, then lr, times `scale`."""
    return lr * scale * warmup(step, warmup_steps), None


def swa_rate(step, start, anneal_steps, lr_before, swa_lr):
    """Half a cosine from lr_before at step `start` to swa_lr over anneal_steps, which stays; as torch's SWALR."""
    share = (1 - math.cos(math.pi * min(1.0, (step - start) / anneal_steps))) / 2
    return lr_before + (swa_lr - lr_before) * share


def plateau_cuts(values, patience, higher_is_better, min_delta=0.0):
    """How often patience ran out over `values` (one a validation); as torch's ReduceLROnPlateau, threshold absolute."""
    best, waited, cuts = -math.inf, 0, 0
    for value in values if higher_is_better else [-v for v in values]:
        best, waited = (value, 0) if value > best + min_delta else (best, waited + 1)
        if waited > patience:
            cuts, waited = cuts + 1, 0
    return cuts


def epochs_since_best(values, higher_is_better, min_delta=0.0):
    """Validations since the last gain of more than `min_delta` over the best before it; 0 where the last one is it."""
    best, since = -math.inf, 0
    for value in values if higher_is_better else [-v for v in values]:
        best, since = (value, 0) if value > best + min_delta else (best, since + 1)
    return since


# name -> function of (config, step, total_steps, warmup_steps, cuts); the flags meet the pure functions here
SCHEDULES = {
    "onecycle": lambda c, step, total, warm, cuts: onecycle(
        step, total, c["max_lr"] or c["lr"], c["pct_start"], c["div_factor"], c["final_div_factor"], c["anneal"],
        c["cycle_momentum"]),
    "cosine": lambda c, step, total, warm, cuts: cosine(step, total, c["lr"], warm),
    "plateau": lambda c, step, total, warm, cuts: constant(step, c["lr"], warm, c["scheduler_factor"] ** cuts),
    "constant": lambda c, step, total, warm, cuts: constant(step, c["lr"], warm),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- EMA


def start_ema(model):
    """A plain dict of copies of the model's state, buffers too, for `update_ema`."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def update_ema(ema, own, decay, updates):
    """Move `ema` towards `own`, the model's state_dict(), in place: ema += (1 - d) * (own - ema).

    d = min(decay, (1 + n) / (10 + n)); n = `updates` counts the updates before this one. Whole-number
    buffers are copied. One fused call: 1.1 ms for EfficientNet-B0 on two cores, AveragedModel takes 3.5.
    """
    floats = [name for name in ema if ema[name].is_floating_point()]
    weight = 1 - min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_([ema[name] for name in floats], [own[name] for name in floats], weight)
    for name in ema.keys() - floats:
        ema[name].copy_(own[name])


# ------------------------------------------------------------------------------ one step, one pass


def autocast(device, dtype):
    """torch.autocast to `dtype`; nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def keep_both(images, targets, index):
    return images, targets


def train_step(state, window, task, augment=keep_both, dtype=torch.float32, clip_grad_norm=0.0, ema_decay=0.0,
               seed=None, sam_rho=0.0, counted=None):  # fmt: skip
    """Mutates `state`: one optimizer update from a window of batches (images, targets, index).

    The summed loss is divided by the items of the whole window, so uneven batches give the gradient of
    the one big batch (BatchNorm apart, which sees each batch alone). `augment(images, targets, index)`
    makes the model's inputs and their targets; `seed` is of dropout and its like. `sam_rho` takes the
    gradient where `sharpness_aware` says. A loss or gradient that is not finite changes no weight,
    buffer, optimizer state or EMA. Where memory runs out, the window is done again in halved batches
    with the same randomness, and `state.micro_batch` keeps their size. Returns (Sums, gradient norm,
    whether the step was good).

    Among several processes each has its share of the window, of which `counted` batches count (None: all) and the
    others stand in; sums, gradients, `state.stop` and all that is decided are those of all. Float buffers, as
    BatchNorm's, become their mean.
    """
    counted = len(window) if counted is None else counted
    held = [buffer.clone() for buffer in state.buffers]
    if seed is None and sam_rho:
        seed = int(torch.randint(2**62, ()))

    def one_pass():
        if seed is not None:
            set_seed(seed, state.parameters[0].device)
        real, extra = (split(part, state.micro_batch) for part in (window[:counted], window[counted:]))
        return accumulate(state, real, task, augment, dtype, extra)

    sums = None
    while sums is None:
        try:
            found = one_pass()
            first_norm = sharpness_aware(state, sam_rho, one_pass) if sam_rho else 0.0
            sums = found
        except RuntimeError as error:
            if not utils.out_of_memory(error):
                raise
            largest = max(len(images) for images, *_ in split(window, state.micro_batch))
            largest = int(utils.over_all(torch.tensor(largest), "MAX"))
            if largest < 4:  # BatchNorm needs two
                raise
            state.micro_batch = largest // 2
        if sums is None:  # past the except clause, which holds on to the tensors of the pass that failed
            undo(state, held)
            distribute(state)
    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state)
    norm_value, rest = torch.stack((norm, sums.loss + first_norm)).tolist()  # the step's one synchronisation
    good = math.isfinite(norm_value + rest)
    if good:
        average_buffers(state)
        if clip_grad_norm:
            nn.utils.clip_grads_with_norm_(state.parameters, clip_grad_norm, norm)
        state.scaler.step(state.optimizer)
        if state.ema is not None:
            update_ema(state.ema, state.live, ema_decay, state.step - state.bad_steps)
    state.scaler.update()
    undo(state, [] if good else held)
    state.step += 1
    state.bad_steps += not good
    state.bad_in_a_row = 0 if good else state.bad_in_a_row + 1
    return sums, norm_value, good


def gradient_norm(state):
    """Of all gradients together: a scalar tensor."""
    gradients = [p.grad for p in state.parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def sharpness_aware(state, rho, one_pass):
    """Mutates the gradients of `state`, those of a whole window, to those at the weights + rho * gradient / norm.

    SAM (Foret et al. 2021). `one_pass()` adds the window's gradients, with the same draws as before. The weights come
    back bit by bit, also where the ascent is not finite, and buffers stay as the first pass left them. Returns the
    first gradient's norm; a scale on the gradients, as fp16's, does not matter.
    """
    norm = gradient_norm(state)
    weights = [p for p in state.parameters if p.grad is not None]
    held = [[tensor.detach().clone() for tensor in tensors] for tensors in (weights, state.buffers)]
    try:
        with torch.no_grad():
            torch._foreach_add_(weights, torch._foreach_mul([p.grad for p in weights], rho / norm.clamp(min=1e-12)))
        undo(state, [])
        one_pass()
    finally:
        with torch.no_grad():
            for tensor, old in zip([*weights, *state.buffers], [*held[0], *held[1]]):
                tensor.copy_(old)
    return norm


def accumulate(state, window, task, augment, dtype, extra=()):
    """Mutates the gradients of `state`: adds those of the window's mean loss; the window's Sums.

    Among several processes both are those of all, `extra` batches weigh nothing, and where memory ran out in one, all
    raise OutOfMemoryError.
    """
    forward = state.model if state.forward is None else state.forward
    ranks, device = utils.world()[1], state.parameters[0].device
    counts = [task.items(targets) for _, targets, _ in window]
    items, sums, error = sum(counts), None, None
    if ranks > 1:
        forward.reducer._rebuild_buckets()  # DDP does so in a forward pass and sends: here nothing has failed yet
        items = utils.over_all(torch.as_tensor(items, device=device).float()) / ranks  # DDP takes the mean over ranks
        sums = no_sums(task, device)
    try:
        for i, ((images, targets, index), count) in enumerate(zip([*window, *extra], [*counts, *[0] * len(extra)])):
            if i == len(window):
                held = [buffer.clone() for buffer in state.buffers]  # what stands in moves no statistics
            silent = ranks > 1 and i + 1 < len(window) + len(extra)  # the last batch of a window alone sends gradients
            with forward.no_sync() if silent else contextlib.nullcontext():
                with autocast(images.device, dtype):
                    inputs, targets = augment(images, targets, index)
                    outputs = forward(inputs)
                    loss = task.loss(outputs, targets)
                if i < len(window):  # before the gradients are sent: after that nothing may fail
                    found = Sums(loss.detach(), count, *task.measure(outputs.detach(), targets))
                    sums = found if sums is None else sums.plus(found)
                # as that of loss / items, two operations less
                state.scaler.scale(loss).backward(loss.new_full((), i < len(window)) / items)
        for buffer, old in zip(state.buffers, held if extra else ()):
            buffer.copy_(old)
    except RuntimeError as raised:
        if ranks == 1 or not utils.out_of_memory(raised) or synchronised(state.model):
            raise
        error = utils.one_line(raised)
    if ranks == 1:
        return sums
    if error:  # in place of the gradients, which the others wait for
        inputs = outputs = loss = None  # else the pass that failed keeps its memory
        dist.all_reduce(torch.full((sum(p.numel() for p in state.parameters if p.requires_grad),), math.nan,
                                   dtype=state.parameters[0].dtype, device=device))  # fmt: skip
        sums = no_sums(task, device)
    sums, (failed, stop) = over_all(sums, task, device, bool(error), state.stop)
    if failed:
        raise torch.OutOfMemoryError(error or "out of memory in another process")
    state.stop = bool(stop)
    return sums


def synchronised(model):
    """Whether forward passes of the model wait for each other among processes: then none can fail alone."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def over_all(sums, task, device, *flags):
    """(Sums, sums of the flags) over all processes, in one message."""
    like, width = dict(dtype=sum_dtype(device), device=device), len(task.metrics)
    parts = [*(torch.as_tensor(part, **like).expand(n) for part, n in zip(sums, (1, 1, width, width)))]
    parts = utils.over_all(torch.cat([*parts, torch.tensor(flags, **like)])).split([1, 1, width, width, len(flags)])
    return Sums(parts[0][0], parts[1][0], *parts[2:4]), parts[4].tolist()


def distribute(state):
    """Mutates `state.forward`: the model in DistributedDataParallel, where there are several processes.

    In one bucket, sent when the last gradient is there: where memory runs out in a pass, nothing has been sent yet.
    DDP's own two, of 1 and 25 MB, would overlap next to nothing: EfficientNet-B0 has 16 MB in all.
    """
    if utils.world()[1] > 1:
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 filters, where they mean nothing
        state.forward = None
        gc.collect()  # else the hooks of the one before go on
        newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # from torch 2.13 on
        state.forward = DistributedDataParallel(
            state.model, init_sync=False, bucket_cap_mb=2**20, gradient_as_bucket_view=True,
            **{"forward_sync_buffers" if newer else "broadcast_buffers": False},
        )  # fmt: skip


def average_buffers(state):
    """Mutates the buffers of `state`, as BatchNorm's statistics: their mean over all processes."""
    floats, ranks = [buffer for buffer in state.buffers if buffer.is_floating_point()], utils.world()[1]
    if floats and ranks > 1:
        mean = utils.over_all(torch.cat([buffer.flatten() for buffer in floats])) / ranks
        for buffer, part in zip(floats, mean.split([buffer.numel() for buffer in floats])):
            buffer.copy_(part.view_as(buffer))


def set_seed(seed, device):
    """Mutates the generators of the CPU and of `device`; torch.manual_seed visits every backend, which takes 0.1 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).manual_seed(seed)


def undo(state, held):
    """Mutates `state`: no gradients, and the buffers `held` where some are."""
    for p in state.parameters:
        p.grad = None
    for buffer, old in zip(state.buffers, held):
        buffer.copy_(old)


def split(window, micro_batch):
    """The window in batches of up to `micro_batch` samples; as it is for None."""
    if micro_batch is None:
        return window
    pieces = [(batch, part) for batch in window for part in data.chunks(torch.arange(len(batch[0])), micro_batch)]
    return [tuple(None if a is None else a[part[0] : part[-1] + 1] for a in batch) for batch, part in pieces]


def no_sums(task, device):
    """Sums of nothing, in float64 where the device has it, to add to."""
    zeros = lambda *shape: torch.zeros(shape, device=device, dtype=sum_dtype(device))
    return Sums(zeros(), 0, zeros(len(task.metrics)), 0)


def sum_dtype(device):
    """What losses are summed in: float64, which MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def means(sums, task):
    """{"loss": …, metric: …} of Sums; NaN where no item was counted.

    A metric of its own count (the solve rate of hard boards) is left out where there was none.
    """
    totals = [sums.loss.item(), *sums.values.tolist()]
    counts = [float(sums.items), *(sums.counts * torch.ones_like(sums.values)).tolist()]
    named = zip(("loss", *task.metrics), totals, counts)
    return {name: total / count if count else math.nan for name, total, count in named if count or not counts[0]}


@torch.inference_mode()
def apply(model, batches, prepare, dtype=torch.float32, weights=None, views=None):
    """Yields (outputs, targets) of `model` in eval mode for batches (images, targets, index); see `evaluate`."""
    training = model.training
    model.eval()
    call = model if weights is None else lambda inputs: functional_call(model, weights, (inputs,))
    try:
        for images, targets, _ in batches:
            with autocast(images.device, dtype):
                outputs = predict(call, prepare(images), views)
            yield outputs, targets
    finally:
        model.train(training)


def evaluate(model, batches, task, prepare, dtype=torch.float32, weights=None, views=None):
    """{"loss": …, metric: …} of `model` in eval mode over batches (images, targets, index), each item once.

    `weights` (a state dict, such as the EMA) stand in for the model's own, which stay as they are.
    `views` is test-time augmentation, as of `predict`.
    """
    return total(apply(model, batches, prepare, dtype, weights, views), task)


@torch.inference_mode()
def total(pairs, task):
    """{"loss": …, metric: …} of (outputs, targets) of all processes, each item once."""
    sums = None
    for outputs, targets in pairs:
        found = Sums(task.loss(outputs, targets), task.items(targets), *task.measure(outputs, targets))
        sums = (no_sums(task, outputs.device) if sums is None else sums).plus(found)
    cpu = torch.device("cpu")
    sums = sums or no_sums(task, cpu)
    if utils.world()[1] > 1:
        sums, _ = over_all(Sums(*(torch.as_tensor(part).cpu() for part in sums)), task, cpu)
    return means(sums, task)


def predict(model, inputs, views=None):
    """The outputs of `model` for a batch, at least float32.

    `views(inputs)` gives (view, weight, restore): outputs of the views, each restored to those of the inputs, are
    averaged (test-time augmentation).
    """
    wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
    if views is None:
        return wide(model(inputs))
    return sum(restore(wide(model(view))) * weight for view, weight, restore in views(inputs))


def set_rates(optimizer, lr, momentum=None):
    """Mutates the optimizer: the rate, and the momentum (beta1 of Adam) where one is given."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif momentum is not None:
            group["momentum"] = momentum


# ------------------------------------------------------------------------------------------- fit


def windows(batches, size):
    """The batches in lists of up to `size`; the last may be shorter."""
    batches = iter(batches)
    while window := list(itertools.islice(batches, size)):
        yield window


def shared_windows(fetch, pieces, size):
    """(window, how many of its batches count, samples in it over all processes) of this process.

    A window takes `size` of the pieces, lists of indices, in each process.
    """
    rank, ranks = utils.world()
    for i, window in enumerate(windows(fetch(data.share(pieces, rank, ranks)), size)):
        of_all = pieces[i * size * ranks : (i + 1) * size * ranks]
        yield window, len(of_all[rank::ranks]), sum(map(len, of_all))


def fit(state, run, stop=()):
    """Mutates `state`: train it to the end of the run, or until `stop` holds a signal; the exit status.

    `run` holds the pieces that `prepare_run` put together. Every epoch ends in a row of metrics.csv, a
    line of the log, best.pt where the monitored metric gained, and last.pt.
    """
    config, task, log, folder = run.config, run.task, run.log, run.folder
    monitor, higher = config["monitor"], utils.higher_is_better(config["monitor"])
    rank, ranks = utils.world()
    track = utils.trackers(folder, config, config["tensorboard"], config["wandb"]) if rank == 0 else []

    loss = f"{monitor.split('_')[0]}_loss"
    scored = lambda: [row for row in state.history if loss in row]  # the epochs that ended in a validation

    def monitored(tie=0.0):  # NaN where none of its puzzles was there
        sign = -tie if higher else tie
        return [row.get(monitor, math.nan) + (sign * row[loss] if tie else 0.0) for row in scored()]

    def write(name, checkpoint):
        try:
            if rank == 0:
                utils.save_checkpoint(folder / name, {**checkpoint, "meta": run.meta})
        except ValueError as error:
            raise FloatingPointError(f"{error}; try a new run with a lower --lr") from None

    def save():
        write("last.pt", {**state.to_checkpoint(), "config": config})

    def export(name, weights, row):
        write(name, {"model": weights, "step": state.step, "epoch": state.epoch, "metrics": row})

    def stopped(where):
        save()
        log(f"stopped {where}; go on with: python train.py --resume {folder.name}")
        return 128 + (stop or [signal.SIGTERM])[0]

    while not state.finished:
        epoch, count = state.epoch, len(run.train)
        cuts = 0
        if config["scheduler"] == "plateau":
            cuts = plateau_cuts(monitored(), config["scheduler_patience"], higher, config["min_delta"])
        pieces = data.chunks(run.order(epoch), config["batch_size"])
        start = state.epoch_step * config["accumulation_steps"] * ranks
        if state.sums is None:
            state.sums = no_sums(task, run.device)
        usual = 0.0  # seconds of a step, smoothed
        began, shown_at = time.perf_counter() - state.seconds, 0.0
        bar = tqdm(
            desc=f"epoch {epoch + 1}/{config['epochs']}", total=count, initial=sum(map(len, pieces[:start])),
            unit=task.unit, leave=False, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 5,
            disable=config["quiet"] or rank > 0,
        )  # fmt: skip
        augment = lambda *batch: run.augment(*batch, epoch)
        freeze(state, epoch < config["freeze_epochs"])
        shared = shared_windows(run.fetch_train, pieces[start:], config["accumulation_steps"])
        with contextlib.closing(bar):
            for window, counted, samples in shared:
                state.stop = bool(stop)
                set_rates(state.optimizer, *run.schedule(state.step, cuts))
                step_began, micro_batch = time.perf_counter(), state.micro_batch
                sums, norm, good = train_step(
                    state, window, task, augment, run.dtype, config["clip_grad_norm"], config["ema_decay"],
                    seed=data.mix(config["seed"], state.step, rank),  # dropout = f(seed, step, rank)
                    sam_rho=config["sam_rho"], counted=counted,
                )
                if state.micro_batch != micro_batch:
                    log(f"step {state.step}: out of memory, so done again; from here on {state.micro_batch} at once")
                if good:
                    state.sums = state.sums.plus(sums)
                    state.gradient_norm += (norm - state.gradient_norm) * (0.05 if state.gradient_norm else 1.0)
                elif state.bad_in_a_row >= MAX_BAD_STEPS:
                    raise FloatingPointError(f"step {state.step}: {MAX_BAD_STEPS} steps in a row were not finite; try "
                                             "a new run with a lower --lr, --clip_grad_norm 1.0 or --amp False")
                state.epoch_step += 1
                now = time.perf_counter()
                state.seconds = now - began
                if state.stop if ranks > 1 else stop:  # among several, what all agreed on in the step
                    return stopped(f"at step {state.step}")
                if config["save_every"] and state.step % config["save_every"] == 0:
                    save()
                bar.update(samples)  # after the save: the terminal may be gone
                if track and state.step % TRACK_EVERY == 0:
                    lr = state.optimizer.param_groups[0]["lr"]
                    values = {"step_loss": (sums.loss / sums.items).item(), "step_lr": lr, "step_gradient_norm": norm}
                    for tracker in track:
                        tracker(state.step, values)
                usual, slow = slow_step(usual, now - step_began)
                if slow and run.device.type != "cpu":
                    log(f"warning: step {state.step} took {now - step_began:.1f} s, others {usual:.2f} s: memory may "
                        "have spilled into the system's; give --memory_gb or a smaller --batch_size")  # fmt: skip
                if not bar.disable and now - shown_at > bar.mininterval:  # reading the sums waits for the device
                    shown_at = now
                    bad = [f"{state.bad_steps} bad steps"] * bool(state.bad_steps)
                    found = means(state.sums, task)
                    form = {"loss": "loss {:.3f}", task.monitor: task.shown.get(task.monitor, "loss {:.3f}")}
                    parts = [form[name].format(found[name]) for name in form if name in found]
                    bar.set_postfix_str(", ".join(parts + bad), refresh=False)

        train, seconds = means(state.sums, task), state.seconds
        row = {"epoch": epoch + 1, "step": state.step, **{f"train_{k}": v for k, v in train.items()}}
        whole = validates(epoch + 1, config["epochs"], config["val_every"])
        scored_pieces = data.chunks(run.val_order if whole else run.val_sample, 2 * config["batch_size"])
        averaged = None  # with its statistics, where there is a mean of weights to score
        if state.swa is not None and epoch + 1 >= config["swa_start_epoch"]:
            if state.swa.n_averaged < epoch + 2 - config["swa_start_epoch"]:  # not so where validation was stopped
                state.swa.update_parameters(state.model)
            averaged = recompute_statistics(state, run, epoch, stop) if whole else None
        kinds = {"val": (state.model, None), "ema": (state.ema and state.model, state.ema), "swa": (averaged, None)}
        for name, (model, weights) in kinds.items():
            if run.fetch_val and len(scored_pieces[0]) and model is not None:
                most = state.micro_batch and 2 * state.micro_batch
                batches = itertools.takewhile(lambda batch: not stop, run.fetch_val(scored_pieces[rank::ranks]))
                batches = (part for batch in batches for part in split([batch], most))
                found = evaluate(model, batches, task, run.prepare, run.dtype, weights)
                row.update({f"{name if whole else name + '_sample'}_{k}": v for k, v in found.items()})
        if utils.any_of_all(stop):  # the validation is not whole: it is done again
            return stopped(f"in the validation of epoch {epoch + 1}")
        state.epoch, state.epoch_step, state.sums, state.seconds = epoch + 1, 0, None, 0.0
        rate = state.optimizer.param_groups[0]["lr"]  # of the last step
        row.update(lr=rate, gradient_norm=state.gradient_norm, seconds=seconds, samples_per_second=count / seconds)
        row.update(bad_steps=state.bad_steps)
        state.history.append(row)
        # a NaN is never a gain: comparisons with it are False; of equal epochs the one with the lower loss is best
        since = epochs_since_best(monitored(tie=1e-9), higher) if loss in row else -1
        if since == len(monitored()):
            raise FloatingPointError(f"epoch {epoch + 1}: {monitor} was never finite; try a new run with a lower --lr")
        patience_gone = config["early_stopping"] and config["early_stopping"] <= epochs_since_best(
            monitored(), higher, config["min_delta"]
        )
        state.finished = bool(state.epoch == config["epochs"] or patience_gone)
        if rank == 0 and since == 0 and not better(folder / "best.pt", monitor, higher, row):
            model, weights = kinds.get(monitor.split("_")[0], (state.model, None))
            export("best.pt", weights or model.state_dict(), row)
        if state.ema is not None:
            export("ema.pt", state.ema, row)
        if averaged is not None:
            export("swa.pt", averaged.state_dict(), row)
        if rank == 0:
            utils.write_csv(folder / "metrics.csv", state.history)
        save()
        for tracker in track:
            tracker(state.step, {**{k: v for k, v in row.items() if k != "step"}, "samples": run.samples(state, run)})
        log(epoch_line(row, task, config["epochs"], since == 0))
        if patience_gone and state.epoch < config["epochs"]:
            log(f"early stopping: {monitor} has not gained for {config['early_stopping']} epochs")
        if not state.finished and utils.any_of_all(stop):
            return stopped(f"after epoch {state.epoch}")

    best = scored()[-1 - epochs_since_best(monitored(tie=1e-9), higher)]
    value = f"{best[monitor]:.2%}" if higher else f"{best[monitor]:.4f}"
    log(f"best       {monitor} {value} in epoch {best['epoch']}: {folder / 'best.pt'}")
    if rank == 0 and utils.save_history(folder / "curves.png", state.history, task.monitor):
        log(f"curves     {folder / 'curves.png'}")
    if run.has_test or run.val:
        others = [str(folder / f"{name}.pt") for name in ("ema", "swa") if (folder / f"{name}.pt").exists()]
        log(f"evaluate   python train.py --evaluate {' '.join([str(folder / 'best.pt'), *others])}")
    return 0


def recompute_statistics(state, run, epoch, stop=()):
    """Mutates `state.swa`: BatchNorm statistics of the mean weights, over the epoch's augmented data; its model."""
    set_seed(data.mix(run.config["seed"], state.step, 1), run.device)  # dropout above a BatchNorm
    batches = itertools.takewhile(lambda batch: not utils.any_of_all(stop), run.fetch_train(run.order(epoch)))
    inputs = (run.augment(*batch, epoch)[0] for batch in batches)
    with autocast(run.device, run.dtype):
        update_bn(inputs, state.swa.module)
    return state.swa.module


def better(path, monitor, higher, row):
    """Whether weights at `path` have a better `monitor` than `row`: of an epoch that a crash made the run forget."""
    try:
        a, b = utils.load_checkpoint(path)["metrics"][monitor], row[monitor]
        return a > b if higher else a < b
    except (ValueError, KeyError, TypeError):  # none, or a damaged one
        return False


def freeze(state, frozen):
    """Mutates `state`: where `frozen` only the head, the last child of its model, is trained, the rest in eval mode."""
    head = [state.model, *state.model.children()][-1]
    state.model.train(not frozen)
    head.train()
    for p in state.parameters:
        p.requires_grad_(not frozen)
    for p in head.parameters():
        p.requires_grad_()
    distribute(state)


def validates(epoch, epochs, every):
    """Whether epoch 1 … `epochs` ends in a validation; adaptive: each up to 10, every second up to 30, then third."""
    every = (1 if epoch <= 10 else 2 if epoch <= 30 else 3) if every == "adaptive" else every
    return epoch == epochs or epoch % every == 0


def slow_step(usual, seconds):
    """(smoothed seconds of a step, whether this one took over a second and ten times as long); it then stays out."""
    slow = bool(usual) and seconds > max(1.0, 10 * usual)
    return (usual if slow else 0.9 * usual + 0.1 * seconds if usual else seconds), slow


def epoch_line(row, task, epochs, new_best):
    """The log's line of one epoch, in ASCII."""
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
    for split in ("train", "val", "ema", "swa", "val_sample", "ema_sample"):
        numbers = {name.removeprefix(f"{split}_"): value for name, value in row.items() if name.startswith(f"{split}_")}
        numbers = {name: value for name, value in numbers.items() if not name.startswith("sample_")}
        if numbers:
            whole = split.startswith("ema" if "ema_loss" in row else "val")  # levels stand in metrics.csv alone
            shown = {k: v for k, v in numbers.items() if (k in task.shown and whole) or k in ("loss", task.monitor)}
            shown |= {k: v for k, v in numbers.items() if k.startswith(f"{task.monitor}_") and whole}
            parts.append(f"{split.replace('_', ' ')} {metrics_line(shown, task)}")
    parts += [f"{row['seconds']:.1f} s", f"{row['samples_per_second']:,.0f} {task.unit}/s", f"lr {row['lr']:.2e}"]
    parts += [f"{row['bad_steps']} bad steps"] * bool(row["bad_steps"]) + ["new best"] * new_best
    return " | ".join(parts)


def metrics_line(numbers, task):
    """The loss and the metrics that `task.shown` formats, of {name: number}, with their levels where they have some."""
    parts = []
    for name, form in {"loss": "{:.4f}", **task.shown}.items():
        if name in numbers:
            levels = [f"{k[len(name) + 1 :]} {form.format(v)}" for k, v in numbers.items() if k.startswith(f"{name}_")]
            parts.append(f"{name} {form.format(numbers[name])}" + f" ({', '.join(levels)})" * (len(levels) > 1))
    return ", ".join(parts)


@contextlib.contextmanager
def catch_signals(gently=True):
    """Gives a list that receives the number of SIGINT, SIGTERM or SIGHUP, for the loop to see; a second ends at once.

    If not `gently`, the first one raises KeyboardInterrupt with its number.
    """
    received = []

    def handle(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)
        if not gently:
            raise KeyboardInterrupt(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------- LR finder


def find_lr(state, next_window, step, min_lr=1e-6, max_lr=10.0, steps=100, smoothing=0.95, divergence=4.0):
    """A learning-rate range test (Smith 2017): one rate a step, exponentially from min_lr to max_lr.

    `next_window()` gives a window and `step(state, window)` trains on it, as `train_step` does. Stops
    where the smoothed loss exceeds `divergence` times its least, or is not finite. Leaves model,
    optimizer, scaler, EMA and random numbers as they were. Returns (rates, smoothed losses,
    {"steepest", "valley", "minimum/10": rate}); ValueError where fewer than ten rates were finite.
    """
    rates, losses, average = [], [], 0.0
    with preserved(state):
        state.model.train()
        for _ in range(steps + MAX_BAD_STEPS):
            if len(rates) == steps:
                break
            rate = min_lr * (max_lr / min_lr) ** (len(rates) / (steps - 1))
            set_rates(state.optimizer, rate)
            sums, _, good = step(state, next_window())
            loss = (sums.loss / sums.items).item()
            if not good and math.isfinite(loss) and state.scaler.is_enabled():
                continue  # an fp16 overflow, which halves the scale: the same rate again
            average = smoothing * average + (1 - smoothing) * loss
            smoothed = average / (1 - smoothing ** (len(rates) + 1))
            if not good or not math.isfinite(smoothed) or (losses and smoothed > divergence * min(losses)):
                break
            rates.append(rate)
            losses.append(smoothed)
    if len(rates) < 10:
        raise ValueError(f"--find_lr: the loss diverged after {len(rates)} rates from {min_lr:g}; check data and model")
    return rates, losses, suggest_lr(rates, losses)


@contextlib.contextmanager
def preserved(state):
    """Model, optimizer, scaler, EMA, counters and random numbers leave the block as they entered it."""
    saved = copy.deepcopy(state.to_checkpoint())
    rng = torch.get_rng_state(), (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
    try:
        yield
    finally:
        undo(state, [])
        state.load(saved)
        torch.set_rng_state(rng[0])
        if rng[1]:
            torch.cuda.set_rng_state_all(rng[1])


def suggest_lr(rates, losses):
    """Rates by three rules: steepest slope over log rate; two thirds along the longest descent; least loss / 10."""
    slopes = torch.gradient(torch.tensor(losses).double(), spacing=(torch.tensor(rates).double().log(),))[0]
    # the longest decreasing subsequence (fastai's valley), by its length and the place where it starts
    longest = [(1, i) for i in range(len(losses))]
    for i in range(len(losses)):
        for j in range(i):
            if losses[i] < losses[j] and longest[i][0] <= longest[j][0] + 1:  # of equal ones the latest
                longest[i] = (longest[j][0] + 1, longest[j][1])
    end = max(range(len(losses)), key=lambda i: longest[i][0])
    begin = longest[end][1]
    return {
        "steepest": rates[int(slopes[: losses.index(min(losses)) + 1].argmin())],  # not a dip of the blow-up
        "valley": rates[begin + round((end - begin) * 2 / 3)],
        "minimum/10": rates[losses.index(min(losses))] / 10,
    }


def sweep(state, run):
    """Run `find_lr` on the real windows and report it; the rate it would take."""
    size, seed = run.config["accumulation_steps"], run.config["seed"]

    def endless():
        for epoch in itertools.count():
            pieces = data.chunks(data.epoch_order(len(run.train), seed, epoch), run.config["batch_size"])
            for window, counted, _ in shared_windows(run.fetch_train, pieces, size):
                yield epoch, window, counted

    source = endless()
    bar = tqdm(
        total=100, desc="find_lr", unit="step", leave=False, mininterval=0.5 if sys.stderr.isatty() else 5,
        disable=run.config["quiet"] or utils.world()[0] > 0,
    )  # fmt: skip

    def step(state, item):
        epoch, window, counted = item
        bar.update()
        augment = lambda *batch: run.augment(*batch, epoch)
        return train_step(state, window, run.task, augment, run.dtype, run.config["clip_grad_norm"],
                          sam_rho=run.config["sam_rho"], counted=counted)  # fmt: skip

    with contextlib.closing(bar):
        rates, losses, found = find_lr(state, lambda: next(source), step)
    for line in utils.text_plot(rates, losses, [found["valley"]]):
        run.log(line)
    run.log("find_lr    " + ", ".join(f"{name} {rate:.2e}" for name, rate in found.items()))
    verb = "takes" if run.config["lr"] == "auto" else "would take"
    run.log(f"find_lr    {verb} the valley: --lr {found['valley']:.2e}")
    return rates, losses, found


# ------------------------------------------------------------------------------- model families


@dataclass(frozen=True)
class Family:
    """What differs between kinds of data: functions of the config, of the `Data` and of a checkpoint's metadata."""

    load: Callable  # (config) -> Data
    check: Callable  # (config, source): sets what the config left open, ValueError for what does not fit
    arguments: Callable  # (config, source) -> the model's arguments
    task: Callable  # (config) -> Task
    prepare: Callable  # (meta, memory_format) -> function of a batch -> the model's input
    augment: Callable  # (config, meta, memory_format) -> function of (batch, targets, index, epoch) -> both to train on
    views: Callable  # (inputs) -> (view, weight, restore) …, for test-time augmentation
    order: Callable  # (config, split) -> function of the epoch -> the order of its samples
    flags: tuple  # those that only this kind of data knows
    to_score: Callable  # (config, given flags) -> (Data, the name of the split that --evaluate scores, or None)
    report: Callable  # ((outputs, targets) of batches, task) -> ({metric: value}, what pictures are drawn from)
    predict: Callable  # (model, meta, device, dtype, config) -> exit status, after printing and writing
    samples: Callable  # (state, run) -> a picture or a text for the trackers
    optimizer: str


def image_task(config):
    return Task(
        loss=lambda logits, labels: models.image_loss(logits, labels, config["label_smoothing"], config["focal_gamma"]),
        measure=utils.image_metrics, metrics=("accuracy",), monitor="accuracy", shown={"accuracy": "{:.2%}"},
        unit="images",
    )  # fmt: skip


def load_images(config):
    keys = ("image_size", "val_fraction", "max_samples", "seed", "cache_dir")
    return data.load(config["data"], **{key: config[key] for key in keys})


def held_out(config, given):
    source = load_images(config)
    return source, next((name for name in ("test", "val") if name in source.splits), None)


def check_images(config, source):
    """Mutates `config`: the flip where it is open; ValueError where a flag does not fit the images."""
    size, channels = source.image_size, source.splits["train"].images.shape[-1]
    least = 32 if config["model"] == "efficientnet_b0" else 24
    if size < least:
        raise ValueError(f"--image_size {size}: {config['model']} needs {least} px; give --image_size {least} or more")
    if config["batch_size"] == 1 and size <= 32 and config["model"] == "efficientnet_b0":
        raise ValueError("--batch_size 1: BatchNorm needs two values a channel at 32 px; give --batch_size 2 or more")
    for flag in ("widths", "depths", "whiten"):
        if config[flag] and config["model"] != "custom":
            raise ValueError(f"--{flag}: is for custom, the model is {config['model']}; leave it out")
    for flag in ("crop_padding", "cutout"):
        if config[flag] >= size:
            raise ValueError(f"--{flag} {config[flag]}: must be below the image size, {size}")
    config["flip"] = channels >= 3 if config["flip"] is None else config["flip"]


def image_augment(config, meta, memory_format):
    settings = [config[name] for name in ("crop_padding", "flip", "min_crop_area", "cutout")]
    mixing = {name: config[name] for name in ("mixup", "cutmix") if config[name]}

    def augment(images, labels, index, epoch):
        x = data.augment(images, index, config["seed"], epoch, meta["image_size"], meta["mean"], meta["std"], *settings)
        if mixing:
            x, labels = data.mix_samples(x, labels, index, config["seed"], epoch, meta["num_classes"], **mixing)
        return x.contiguous(memory_format=memory_format), labels

    return augment


def image_centre(meta, memory_format):
    def prepare(images):
        x = data.centre(images, meta["image_size"], meta["mean"], meta["std"])
        return x.contiguous(memory_format=memory_format)

    return prepare


def image_report(pairs, task):
    """`utils.classification_report`, and (probabilities float32 [N, K], labels [N]) that pictures are drawn from."""
    logits, labels = (torch.cat(column) for column in zip(*pairs))
    loss = models.image_loss(logits, labels).item() / len(labels)  # probabilities of float32 end at 1e-38
    p, labels = logits.float().softmax(1).numpy(), labels.numpy()
    return {"loss": loss, **utils.classification_report(p, labels)}, (p, labels)


def image_samples(state, run):
    """uint8 [H, W, 3]: up to 16 training images in rows of four, as the augmentation of the epoch made them."""
    batch = next(iter(run.fetch_train(run.order(state.epoch - 1)[:16])))
    x, _ = run.augment(*batch, state.epoch - 1)
    mean, std = (torch.tensor(run.meta[name], device=x.device)[:, None, None] for name in ("mean", "std"))
    x = utils.displayable(((x * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu())
    x = torch.cat([x, x.new_zeros(-len(x) % 4, *x.shape[1:])])
    return torch.cat([torch.cat(list(row), 1) for row in x.split(4)]).numpy()


def predict_images(model, meta, device, dtype, config):
    """Classes of the pictures of --input, printed and written to --output; 1 where some could not be read."""
    if config["search"]:
        raise ValueError("--search: is for puzzles; leave it out")
    paths, classes, rows, broken = data.find_pictures(*config["input"]), meta["classes"], [], []
    prepare = image_centre(meta, pick_memory_format(config["channels_last"], device))
    views, size = data.image_views if config["tta"] else None, scoring_batch(config)
    if meta["in_channels"] not in (1, 3):
        raise ValueError(f"--predict: pictures have 1 or 3 channels, the checkpoint {meta['in_channels']}")
    silent = config["quiet"] or len(paths) <= size or None
    bar = tqdm(total=len(paths), desc="predict", unit="images", leave=False, disable=silent)
    with contextlib.closing(bar):
        for part, images, errors in data.decode_pictures(paths, meta["stored_size"], meta["in_channels"], size):
            batches = [(torch.from_numpy(images).to(device), None, None)] if part else []
            for logits, _ in apply(model, batches, prepare, dtype, views=views):
                p, chosen = logits.float().softmax(1).cpu().topk(min(5, len(classes)))
                for path, values, places in zip(part, p.tolist(), chosen.tolist()):
                    top = [{"class": classes[k], "probability": value} for k, value in zip(places, values)]
                    rows.append({"file": str(path), **top[0], "top5": top})
            broken += [{"file": str(path), "error": str(error)} for path, error in errors]
            bar.update(len(part) + len(errors))
    for row in rows[:MOST_SHOWN]:
        print(f"{row['file']}: " + ", ".join(f"{top['class']} {top['probability']:.1%}" for top in row["top5"]))
    if len(rows) > MOST_SHOWN:
        print(f"... and {len(rows) - MOST_SHOWN:,} more" + "; --output FILE holds all" * (not config["output"]))
    for row in broken:
        print(f"error: {row['error']}", file=sys.stderr)
    if config["output"]:
        if Path(config["output"]).suffix == ".csv":
            flat = lambda top: {f"{name}{i + 1}": v for i, one in enumerate(top) for name, v in one.items() if i}
            rows = [{"file": row["file"], **row["top5"][0], **flat(row["top5"])} for row in rows]
        write = utils.write_json if Path(config["output"]).suffix == ".json" else utils.write_csv
        write(config["output"], rows + broken)
    unread = f", {len(broken):,} could not be read" * bool(broken)
    print(f"{len(rows):,} of {len(paths):,} pictures{unread}" + f", in {config['output']}" * bool(config["output"]))
    return int(bool(broken))


def shuffled(config, split):
    return lambda epoch: data.epoch_order(len(split), config["seed"], epoch)


def image_arguments(config, source):
    if config["model"] != "custom":
        return {}
    shape = {name: [int(n) for n in config[name].split(",")] for name in ("widths", "depths") if config[name]}
    return {"stem_stride": models.stem_stride_for(source.image_size), **shape, "whiten": config["whiten"]}


IMAGES = Family(
    load=load_images, to_score=held_out, check=check_images, task=image_task, prepare=image_centre,
    augment=image_augment, views=data.image_views, order=shuffled, arguments=image_arguments,
    flags=("image_size", "crop_padding", "flip", "min_crop_area", "cutout", "label_smoothing", "pretrained", "widths",
           "depths", "whiten", "mixup", "cutmix", "freeze_epochs"),
    optimizer="adamw", report=image_report, predict=predict_images, samples=image_samples,
)  # fmt: skip


def sudoku_task(config):
    gamma, constraint = config["focal_gamma"], config["constraint_weight"]
    return Task(
        loss=lambda logits, labels: models.sudoku_loss(logits, labels[:, :81], gamma, constraint),
        measure=utils.sudoku_metrics, metrics=utils.SUDOKU_METRICS, items=lambda labels: (labels[:, :81] > 0).sum(),
        monitor="solve_rate", unit="boards",
        shown={"solve_rate": "{:.2%}", "cell_accuracy": "{:.2%}", "violations": "{:.2f}", "confidence": "{:.3f}",
               "entropy": "{:.3f}"},
    )  # fmt: skip


def load_puzzles(config):
    return data.load_sudoku(*(config[key] for key in ("data", "val_fraction", "max_samples", "seed", "cache_dir")))


def puzzles_to_score(config, given):
    """A puzzle file of --data is scored whole; else the run's own test or val split."""
    if "data" not in given or os.path.isdir(os.path.expanduser(given["data"])):
        source = load_puzzles(config)
        return source, next((name for name in ("test", "val") if name in source.splits), None)
    return load_puzzles({**config, "val_fraction": 0.0, "max_samples": 0}), "train"


def puzzle_order(config, split):
    if not config["curriculum"]:
        return shuffled(config, split)
    return lambda epoch: data.curriculum_order(split.labels[:, 81], config["seed"], epoch, config["epochs"])


def predict_puzzles(model, meta, device, dtype, config):
    """Solve the puzzles of --input with a Sudoku network: boards and verdicts printed, written to --output."""
    path, output = Path(config["input"][0]), config["output"]
    if len(config["input"]) > 1 or not path.is_file():
        raise ValueError(f"--input {' '.join(config['input'])}: is no file; give a file of puzzles")
    if path.suffix.lower() in data.IMAGE_SUFFIXES:
        raise ValueError(f"--input {path}: is a picture; name the checkpoint that it is for: --predict CKPT")
    puzzles, _ = data.read_sudoku(path, with_solutions=False)
    if output:
        data.sudoku_text(Path(output).suffix, puzzles[:2])  # refuses early what an .sdk cannot hold
    views = data.sudoku_views if config["tta"] else None
    answers, solved, alone, led, unled, text = np.zeros_like(puzzles), 0, 0, 0, 0, []
    silent = config["quiet"] or len(puzzles) <= 64 or None
    bar = tqdm(total=len(puzzles), desc="predict", unit="boards", leave=False, disable=silent)
    with contextlib.closing(bar):
        for start in range(0, len(puzzles), 2048):  # bounds the memory of millions
            part = puzzles[start : start + 2048]
            p = probabilities(model, torch.from_numpy(part), device, dtype, bar, views)
            boards = p.argmax(2).astype(np.uint8) + 1
            good = own = data.consistent(boards)  # all cells are filled and clues kept, so that the rules decide
            verdicts = np.where(own, "solved", "not solved").astype(object)
            if config["search"]:
                solutions, number, guesses = data.solve(part, p, max_guesses=MAX_GUESSES)
                _, _, plain = data.solve(part, max_guesses=MAX_GUESSES)
                good, led, unled = number == 1, led + guesses.sum(), unled + plain.sum()
                boards[number > 0] = solutions[number > 0]
                verdicts = np.where(own, "solved by the network alone", "solved by search").astype(object)
                verdicts[number == 0], verdicts[number > 1] = "impossible: no solution", "ambiguous: several solutions"
                verdicts[number < 0] = "undecided: too many guesses"
                boards[number < 1] = part[number < 1]
                verdicts += [f", {a:,} guesses, {b:,} without the network" for a, b in zip(guesses, plain)]
            answers[start : start + len(part)] = np.where(good[:, None], boards, 0)
            solved, alone = solved + good.sum(), alone + (good & own).sum()
            for i in range(max(0, min(len(part), MOST_SHOWN - start))):
                text += [f"puzzle {start + i + 1}: {verdicts[i]}", *board_lines(boards[i], part[i]), ""]
    if output:
        utils.write_atomic(output, data.sudoku_text(Path(output).suffix, puzzles, answers).encode())
    if len(puzzles) > MOST_SHOWN:
        text.append(f"... and {len(puzzles) - MOST_SHOWN:,} more; --output FILE holds what was solved of all\n")
    steps = meta["arguments"]["message_steps"]
    written = f", in {output}" * bool(output)
    text.append(f"{solved:,} of {len(puzzles):,} solved, {alone:,} by the network alone in {steps} steps{written}")
    if config["search"]:
        text.append(f"guesses: {led:,} led by the network, {unled:,} without it")
    print("\n".join(text), flush=True)
    return 0


def probabilities(model, puzzles, device, dtype, bar=None, views=None):
    """float32 [N, 81, 9] over the digits of puzzles uint8 [N, 81], as a numpy array."""
    parts, batches = [], ((part.to(device), None, None) for part in puzzles.split(64))
    for logits, _ in apply(model, batches, lambda boards: boards, dtype, views=views):
        parts.append(logits[-1].float().softmax(-1).cpu())
        if bar is not None:
            bar.update(len(parts[-1]))
    return torch.cat(parts).numpy()


def puzzle_samples(state, run):
    """The first validation puzzle, or else the first of training, as the network fills it in, as text."""
    puzzles = torch.from_numpy(np.array((run.val or run.train).images[:1]))
    digits = probabilities(state.model, puzzles, run.device, run.dtype).argmax(2) + 1
    return "\n".join(board_lines(digits[0], puzzles[0].tolist()))


def board_lines(board, puzzle):
    """A board uint8 [81] as text: found digits bare, the puzzle's own in brackets, a dot for none."""
    cells = [f"[{digit}]" if clue else f" {digit or '.'} " for digit, clue in zip(board, puzzle)]
    rows = ["|".join("".join(cells[9 * r + c : 9 * r + c + 3]) for c in (0, 3, 6)).rstrip() for r in range(9)]
    rule = "+".join(["-" * 9] * 3)
    return [*rows[:3], rule, *rows[3:6], rule, *rows[6:]]


PUZZLES = Family(
    load=load_puzzles, to_score=puzzles_to_score,
    check=lambda config, source: None, task=sudoku_task, order=puzzle_order,
    prepare=lambda meta, memory_format: lambda puzzles: puzzles,
    augment=lambda config, meta, memory_format: lambda *batch: batch[:2],  # the network is equivariant
    views=data.sudoku_views,
    arguments=lambda config, source: {
        **{name: config[name] for name in ("width", "hidden", "free_steps", "grad_steps")},
        "message_steps": config["message_steps"] or 64},
    flags=("width", "hidden", "message_steps", "free_steps", "grad_steps", "constraint_weight", "curriculum"),
    optimizer="muon", report=lambda pairs, task: (total(pairs, task), None), predict=predict_puzzles,
    samples=puzzle_samples,
)  # fmt: skip

FAMILIES = {"custom": IMAGES, "efficientnet_b0": IMAGES, "sudoku_gnn": PUZZLES}


# ---------------------------------------------------------------------------- putting it together


@dataclass
class Run:
    """The pieces of one run, put together once by `prepare_run` and not changed after."""

    config: dict
    task: Task
    device: torch.device
    dtype: torch.dtype
    train: data.Split
    val: data.Split | None
    has_test: bool
    fetch_train: Callable
    fetch_val: Callable | None
    val_order: torch.Tensor  # all of the validation split
    val_sample: torch.Tensor  # those scored after epochs in between
    order: Callable  # epoch -> order
    augment: Callable  # (batch, targets, index, epoch) -> inputs, targets
    prepare: Callable  # batch -> inputs, for evaluation
    samples: Callable  # (state, run) -> a picture or a text for the trackers
    schedule: Callable  # (step, cuts) -> (lr, momentum)
    meta: dict
    folder: Path | None = None
    log: Callable = print


def prepare_run(config, resumed=None):
    """(state, run, lines that say what is about to happen); ValueError or OSError for bad input.

    `resumed` is the metadata of a run that goes on, which has its weights and statistics.
    """
    config, fresh, ranks = dict(config), resumed is None, utils.world()[1]
    device = utils.pick_device(config["device"])
    memory_format = pick_memory_format(config["channels_last"], device)
    settings = utils.tune(device, config["deterministic"], config["memory_gb"])
    family = FAMILIES[config["model"]]
    dtype, reason = utils.pick_precision(config["amp"], device)
    with utils.in_turn(os.environ.get("LOCAL_RANK", "0") == "0"):  # one process a machine fills the cache
        source = family.load(config)
    family.check(config, source)
    config["image_size"] = source.image_size
    train, val = source.splits["train"], source.splits.get("val")
    channels = (*train.images.shape[3:], 1)[0]  # of images [N, H, W, C]; puzzles are [N, 81]
    task = family.task(config)
    check_monitor(config, task, val is not None)
    for flag in ("swa_start_epoch", "freeze_epochs"):
        if config[flag] > config["epochs"]:
            raise ValueError(f"--{flag} {config[flag]}: must be at most --epochs {config['epochs']}")
    if 0 < config["swa_start_epoch"] <= config["freeze_epochs"]:
        raise ValueError(f"--swa_start_epoch {config['swa_start_epoch']}: must be above --freeze_epochs, else the "
                         "statistics of the frozen part would be lost")  # fmt: skip
    if config["swa_lr"] and not config["swa_start_epoch"]:
        raise ValueError("--swa_lr: needs --swa_start_epoch")
    if config["batch_size"] == "auto":
        config["effective_batch"] = config["effective_batch"] or 128
    if (config["effective_batch"] or 0) > max(128, len(train)):
        raise ValueError(f"--effective_batch {config['effective_batch']}: there are {len(train)} samples; give less")
    if config["batch_size"] != "auto" and config["batch_size"] > len(train):
        raise ValueError(f"--batch_size {config['batch_size']}: the training split has {len(train)} samples; give less")
    weights, origin = pretrained_weights(config) if config["pretrained"] and fresh else ({}, resumed or {})
    fits = origin and len(origin["mean"]) == len(source.mean)  # weights want the statistics they were trained with
    mean, std = (origin["mean"], origin["std"]) if fits else (source.mean, source.std)
    meta = {
        "model": config["model"], "num_classes": len(source.classes), "in_channels": channels,
        "arguments": family.arguments(config, source), "classes": source.classes, "image_size": source.image_size,
        "mean": list(mean), "std": list(std), "stored_size": train.images.shape[1],
        "fingerprint": [*source.mean, *source.std, len(train), len(val or ()), zlib.crc32(train.labels.data)],
        "source": {
            "data": config["data"] and str(Path(os.path.expanduser(config["data"])).resolve()),
            **{name: config[name] for name in ("val_fraction", "max_samples", "seed")},
        },
    }  # fmt: skip

    utils.check_agreement({"data": meta["fingerprint"], "classes": meta["classes"]})
    torch.manual_seed(config["seed"])
    model = models.build_model(config["model"], len(source.classes), channels, **meta["arguments"])
    if config["checkpoint_activations"]:
        model.run_stage = models.recomputed
    if config["whiten"] and fresh:
        some = np.array_split(data.stratified(train.labels, 5000, config["seed"]), max(1, min(len(train), 5000) // 64))
        prepare = family.prepare(meta, torch.contiguous_format)
        models.whiten_stem(model, (prepare(torch.from_numpy(np.array(train.images[part]))) for part in some))
    if config["pretrained"] and fresh:
        try:
            models.load_backbone(model, weights, new_head=origin.get("classes", source.classes) != source.classes)
        except ValueError as error:
            raise ValueError(f"--pretrained {config['pretrained']}: {error}") from None
    if config["sync_batchnorm"]:
        if device.type != "cuda" or ranks == 1:
            raise ValueError("--sync_batchnorm: is for several CUDA devices under torchrun; leave it out")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules() if ranks > 1 and not config["sync_batchnorm"] else ():
        if isinstance(module, nn.BatchNorm2d):  # a process sees one batch in `ranks`: so their mean moves as far as one
            module.momentum = 1 - (1 - module.momentum) ** ranks
    model.to(device, memory_format=memory_format)
    for tensor in model.state_dict().values() if ranks > 1 else ():
        dist.broadcast(tensor, 0)  # machines may differ in the last bit

    config["optimizer"] = config["optimizer"] or family.optimizer
    if config["lr"] is None:
        config["lr"] = {"sgd": 0.1, "adamw": 0.003, "muon": 0.005}[config["optimizer"]]
    first_rate = 1e-3 if config["lr"] == "auto" else config["lr"]
    optimizer = build_optimizer(
        model, config["optimizer"], first_rate, config["weight_decay"], config["momentum"], device
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = TrainState(model, optimizer, scaler, start_ema(model) if config["ema_decay"] else None)
    state.swa = AveragedModel(model) if config["swa_start_epoch"] else None

    augment = family.augment(config, meta, memory_format)
    few = torch.arange(4) % len(train)
    rows = (torch.from_numpy(np.array(a[few.numpy()])).to(device) for a in (train.images, train.labels))
    example, _ = augment(*rows, few, 0)
    moments = {"adamw": 2, "sgd": 1, "muon": 1}[config["optimizer"]]
    copies = bool(state.ema) + bool(state.swa) + 2 * bool(config["sam_rho"])  # the weights and the ascent of SAM
    with autocast(device, dtype):
        memory = models.estimate_memory(model, example, moments, copies)
    distribute(state)
    budget = min(utils.free_bytes(device), utils.memory_cap(device, config["memory_gb"])) // 4
    if config["batch_size"] == "auto":
        resident = sum(split.images.nbytes for split in (train, val) if split and split.images.nbytes <= budget)
        if config["effective_batch"] % ranks:
            raise ValueError(f"--effective_batch {config['effective_batch']}: must be a multiple of {ranks} processes")
        step = partial(train_step, state, task=task, augment=lambda *batch: augment(*batch, 0), dtype=dtype,
                       sam_rho=config["sam_rho"])  # fmt: skip
        fits = lambda size: trial(state, step, train, size, device, memory, resident, config["memory_gb"])
        config["batch_size"] = choose_batch(config["effective_batch"] // ranks, len(train), fits)
    if config["effective_batch"]:
        if config["effective_batch"] % (config["batch_size"] * ranks):
            sizes = "{effective_batch}: must be a multiple of the batch, {batch_size}".format(**config)
            sizes += f", times {ranks} processes" * (ranks > 1)
            raise ValueError(f"--effective_batch {sizes}; give --batch_size too, or --batch_size auto")
        config["accumulation_steps"] = config["effective_batch"] // config["batch_size"] // ranks
    steps_an_epoch = count_steps(len(train), config["batch_size"], config["accumulation_steps"] * ranks)
    total_steps, warmup_steps = config["epochs"] * steps_an_epoch, round(config["warmup_epochs"] * steps_an_epoch)
    if warmup_steps >= total_steps:
        raise ValueError(f"--warmup_epochs {config['warmup_epochs']:g}: must be below --epochs {config['epochs']}")

    def schedule(step, cuts):
        start = (config["swa_start_epoch"] - 1) * steps_an_epoch if config["swa_lr"] else math.inf
        plain = lambda step: SCHEDULES[config["scheduler"]](config, step, total_steps, warmup_steps, cuts)
        if step < start:
            return plain(step)
        lr, momentum = plain(max(0, start - 1))
        return swa_rate(step, start, steps_an_epoch, lr, config["swa_lr"]), momentum

    if ranks > 1 and config["compile"] != "off":
        raise ValueError("--compile: does not go with several processes here; leave it out")
    fetch = partial(data.batches, device=device, resident_bytes=budget, workers=config["workers"],
                    timeout=config["timeout"])  # fmt: skip
    run = Run(
        config=config, task=task, device=device, dtype=dtype, train=train, val=val,
        has_test="test" in source.splits, fetch_train=fetch(train, config["batch_size"]),
        fetch_val=fetch(val, 2 * config["batch_size"]) if val else None,
        val_order=torch.arange(len(val or ())),
        val_sample=torch.from_numpy(data.stratified(val.labels, config["val_samples"], config["seed"]))
        if val and config["val_samples"] else torch.arange(0),
        order=family.order(config, train), augment=augment,
        prepare=family.prepare(meta, memory_format), samples=family.samples, meta=meta,
        schedule=schedule,
    )  # fmt: skip
    note = compile_forward(state, run, config["compile"]) if config["compile"] != "off" else ""

    settings += ["channels_last"] * (memory_format is torch.channels_last and family is IMAGES)
    settings += [f"fused {config['optimizer']}"] * (config["optimizer"] != "muon")
    precision = f"{str(dtype).removeprefix('torch.')} ({reason})"
    return state, run, describe(state, run, source, memory, precision, settings, note)


def describe(state, run, source, memory, precision, settings, note):
    """Lines that say what is about to happen."""
    config, device, ranks = run.config, run.device, utils.world()[1]
    size, steps = config["batch_size"], config["accumulation_steps"]
    steps_an_epoch = count_steps(len(run.train), size, steps * ranks)
    total = sum(memory.values()) + memory["sample"] * (size - 1)
    fixed = {name: memory[name] for name in ("weights", "gradients", "optimizer", "ema") if memory[name]}
    parts = ", ".join(f"{name} {held / 2**20:.1f}" for name, held in fixed.items())
    cards = ", ".join(f"{models.largest_batch(memory, gb):,}" for gb in (4, 6, 8))
    splits = {name: f"{name} {len(split):,}" for name, split in source.splits.items()}
    return [
        f"device     {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, "
        f"{torch.get_num_threads()} threads | precision {precision}",
        f"model      {config['model']}, {sum(p.numel() for p in state.model.parameters()):,} parameters{note}",
        f"speed      {', '.join(settings)}",
        f"memory     about {total / 2**20:,.0f} MiB ({parts}, activations {memory['sample'] / 2**20:.2f} a sample) | "
        f"largest batch for 4, 6, 8 GB: {cards}",
        f"data       {source.description} | "
        + ", ".join(splits.get(name, f"no {name}") for name in ("train", "val", "test")),
        f"methods    {', '.join(methods(config)) or 'plain'}",
        f"batch      {size} x {steps} accumulation x {ranks} process{'es' * (ranks > 1)} = {size * steps * ranks} | "
        f"{steps_an_epoch:,} steps an epoch, "
        f"{config['epochs']} epochs, {steps_an_epoch * config['epochs']:,} steps",
    ]


def count_steps(samples, batch_size, window):
    """Steps an epoch: windows of so many batches."""
    return -(-len(data.chunks(torch.arange(samples), batch_size)) // window)


def methods(config):
    """Names of what is on beside the plain loop."""
    names = {"ema_decay": "EMA", "swa_start_epoch": "SWA from epoch", "swa_lr": "SWA's lr", "sam_rho": "SAM",
             "mixup": "Mixup", "cutmix": "CutMix", "label_smoothing": "label smoothing", "focal_gamma": "focal loss",
             "clip_grad_norm": "clipping at"}  # fmt: skip
    found = [f"{name} {config[flag]:g}" for flag, name in names.items() if config[flag]]
    found += ["SyncBatchNorm"] * config["sync_batchnorm"]
    found += [f"weights of {config['pretrained']}"] * bool(config["pretrained"])
    if config["freeze_epochs"]:
        random = "" if config["pretrained"] else ", the rest random: give --pretrained"
        found.append(f"head alone for {config['freeze_epochs']} epochs{random}")
    return found


def choose_batch(effective, most, fits):
    """The largest micro-batch, `most` to 2, that divides `effective` and for which fits(size); ValueError for none."""
    sizes = [size for size in range(min(effective, most), 1, -1) if effective % size == 0]
    for size in sizes:
        if fits(size):
            return size
    why = f"not even {sizes[-1]} samples fit in memory" if sizes else f"no batch up to {most} divides it"
    raise ValueError(f"--batch_size auto, --effective_batch {effective}: {why}; give another --effective_batch")


def trial(state, step, split, size, device, memory, resident, memory_gb):
    """Whether two real steps on `size` samples fit: on CUDA within 0.92 of the cap, on a CPU 0.8 of free memory.

    `resident` bytes of data come on top. Leaves `state` as it was. A CPU's memory has no end that can be run
    into, so there the estimate decides.
    """
    free = utils.free_bytes(device)
    limit = min(free, memory_gb * 2**30) if memory_gb else free
    held = sum(memory.values()) + 1.1 * memory["sample"] * (size - 1) + resident
    if utils.any_of_all(device.type != "cuda" and held > 0.8 * limit):
        return False
    index = torch.arange(size)
    window = [(*(torch.from_numpy(np.array(a[index.numpy()])).to(device) for a in (split.images, split.labels)), index)]
    with preserved(state):
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what a larger trial left would count
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            full = False
            try:
                step(window)
            except RuntimeError as error:
                if not utils.out_of_memory(error):
                    raise
                full = True
            if utils.any_of_all(full):
                return False
        used = torch.cuda.max_memory_reserved(device) + resident if device.type == "cuda" else 0
        fits = state.micro_batch is None and used <= 0.92 * utils.memory_cap(device, memory_gb)
    fits = not utils.any_of_all(not fits)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the data that is to stay on the device
    return fits


def pick_memory_format(channels_last, device):
    """channels_last where asked; not on MPS, where its backward is wrong (pytorch #175189, #175190)."""
    return torch.channels_last if channels_last and device.type != "mps" else torch.contiguous_format


def pretrained_weights(config):
    """(the state dict of --pretrained, metadata with the mean and standard deviation of its training images).

    From a file, this kit's or with ImageNet's statistics, or the official one through torch's hub cache and hash check.
    """
    imagenet = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if config["pretrained"] != "official":
        try:
            found = utils.load_checkpoint(config["pretrained"], legacy=True)
        except ValueError as error:
            raise ValueError(f"--pretrained {error}") from None
        meta = found.get("meta")
        own = isinstance(meta, dict) and {"mean", "std"} <= meta.keys()
        return found.get("model", found), meta if own else imagenet
    if config["model"] != "efficientnet_b0":
        raise ValueError("--pretrained official: only efficientnet_b0 has official weights; give a file")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    older, newer = "efficientnet_b0_rwightman-3dd342df.pth", "efficientnet_b0_rwightman-7f5810bc.pth"
    name = older if (hub / older).is_file() and not (hub / newer).is_file() else newer
    try:
        found = torch.hub.load_state_dict_from_url(
            f"https://download.pytorch.org/models/{name}", map_location="cpu", check_hash=True, weights_only=True
        )
        return found, imagenet
    except (OSError, RuntimeError) as error:  # no network, or a hash that differs
        why = utils.one_line(error)
        raise ValueError(f"--pretrained: cannot be fetched ({why}); give a file: --pretrained {name}") from None


def check_monitor(config, task, has_val):
    """Mutates `config`: the monitor where none is given; ValueError for one that the run will not measure."""
    splits = ["train", *["val"] * has_val, *["ema"] * bool(has_val and config["ema_decay"])]
    averaged = ["swa"] * bool(has_val and config["swa_start_epoch"])
    names = [f"{split}_{metric}" for split in splits + averaged for metric in ("loss", *task.metrics)]
    if config["early_stopping"] and not has_val and config["monitor"] is None:
        raise ValueError("--early_stopping: there is no validation data; give --val_fraction above 0")
    if config["monitor"] is None:
        config["monitor"] = f"{splits[-1]}_{task.monitor}"
    if config["monitor"] not in names:
        briefly = ", ".join(name for name in names if not name.endswith(data.LEVELS))
        raise ValueError(f"--monitor {shown(config['monitor'])} is not measured; there are {briefly}")


def compile_forward(state, run, mode):
    """Mutates `state.forward`: the compiled model if one pass through it works; a note for the log.

    A batch of another size, the ragged last one, goes through the model as it is: compiling anew takes a minute.
    """
    size = run.config["batch_size"]
    inputs, _ = run.augment(*next(iter(run.fetch_train(torch.arange(size)))), 0)
    held = [buffer.clone() for buffer in state.buffers]
    compiled = torch.compile(state.model, mode=mode)
    try:
        with autocast(run.device, run.dtype):
            compiled(inputs).float().sum().backward()
    except (RuntimeError, ImportError, OSError) as error:  # no compiler, no Triton, an operator it lacks
        return f", not compiled ({utils.one_line(error)})"
    finally:
        undo(state, held)
    state.forward = lambda inputs: compiled(inputs) if len(inputs) == size else state.model(inputs)
    return f", compiled ({mode})"


def find_run(name):
    """The folder of the run to resume: NAME or runs/NAME; without a name the unfinished one started last."""
    if name:
        folder = Path(name) if (Path(name) / "config.json").is_file() else RUNS / name
        if not (folder / "config.json").is_file() and folder.is_dir():
            raise ValueError(f"--resume {shown(name)}: {folder} has no config.json; restore it, or, where the run had "
                             f"not begun, start it again with --run_name {folder.name}")  # fmt: skip
        if not (folder / "config.json").is_file():
            there = ", ".join(sorted(p.parent.name for p in RUNS.glob("*/config.json"))[-5:]) or "none"
            raise ValueError(f"--resume {shown(name)}: no such run; in {RUNS.resolve()} there are {there}")
        return folder
    starts = {}
    for path in RUNS.glob("*/config.json"):
        if any((path.parent / last).exists() for last in ("last.pt", "previous.pt")):
            with contextlib.suppress(ValueError):  # a damaged one is not the one that is meant
                starts[read_run_config(path)["environment"]["started"], path.parent.name] = path.parent
    for start in sorted(starts, reverse=True):
        newest = utils.load_newest(starts[start], SAVED, set_aside=False)  # it may be another's
        if newest is None or not newest["finished"]:
            return starts[start]
    raise ValueError(f"--resume: no unfinished run with a checkpoint in {RUNS.resolve()}; start one without --resume")


def read_run_config(path):
    try:
        found = json.loads(path.read_text("utf-8"))
        config, environment = dict(found["config"]), {"processes": 1, "launcher": "", **found["environment"]}
        for action in build_parser()._actions:
            if config.get(action.dest) is not None:
                checked_value(action.dest, config[action.dest], action)
        if not (isinstance(environment["started"], str) and environment["processes"] in range(1, 10**6)):
            raise ValueError("its environment is not a run's")
        return {"config": config, "environment": environment}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({utils.one_line(error)}); restore it or start a new run") from None


def resumed_config(folder, config, given, ranks=1):
    """The config of the run in `folder`, with the free flags of this call; ValueError where another one differs.

    Its steps stay what they were, with as many batches, on any number of processes that divides them.
    """
    stored, environment = read_run_config(folder / "config.json").values()
    if strange := sorted(stored.keys() ^ {key for key in config if key not in MODES}):
        raise ValueError(f"{folder}: its flags are not this kit's ({strange[0]}); resume it with its own version")
    for key, value in given.items():
        if key in MODES:
            continue
        if key not in FREE_ON_RESUME and stored[key] != value and (value, key) not in AUTO:
            raise ValueError(f"--{key} {value}: the run has {stored[key]}; leave the flag out, or start a new run")
        if key in FREE_ON_RESUME and key != "run_name":
            stored[key] = value
    stored["timeout"] = config["timeout"]
    if ranks > 1:  # each has its own
        stored["device"] = config["device"]
    batches = stored["accumulation_steps"] * environment["processes"]
    if batches % ranks:
        fitting = ", ".join(str(count) for count in range(1, batches + 1) if batches % count == 0)
        raise ValueError(f"--resume {folder.name}: a step has {batches} batches, which {ranks} processes cannot share "
                         f"alike; start one of {fitting[:60]}")  # fmt: skip
    return {**config, **stored, "accumulation_steps": batches // ranks}


def main(argv=None):
    """Do what the flags (a list of words; None: those of the command line) ask for; the exit status."""
    config, given = parse_flags(sys.argv[1:] if argv is None else argv)
    run = None
    try:
        with catch_signals(gently=False), contextlib.ExitStack() as held:
            check_flags(config, given)
            for mode, call in (("predict", run_predict), ("evaluate", partial(run_evaluate, given=given)),
                               ("export", run_export)):  # fmt: skip
                if config[mode]:
                    return call(config)
            held.enter_context(utils.processes(config["device"], config["timeout"]))
            state, begun = begin(config, given, held)
            if config["find_lr"]:
                return report_find_lr(state, begun, config["output"])
            run = begun
            with catch_signals() as stop:
                return fit(state, run, stop)
    except KeyboardInterrupt as stopped:  # outside of the loop, which saves
        if os.environ.get("RANK", "0") == "0":
            training = run is None and not any(config[mode] for mode in OUTPUTS)
            print("stopped" + " before there was a step to save" * training, file=sys.stderr)
        return 128 + (*stopped.args, signal.SIGINT)[0]
    except BrokenPipeError:  # the reader of what is printed went away: no error of this program
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, EOFError, RuntimeError, MemoryError, FloatingPointError) as error:
        return explain(error, run, config)


def check_flags(config, given):
    """ValueError where flags do not go together."""
    if [int(part) for part in re.findall(r"\d+", torch.__version__)[:2]] < [2, 10]:
        raise ValueError(f"torch {torch.__version__}: too old; give 2.10 or later: pip install -r requirements.txt")
    check_output(config)
    cache = Path(config["cache_dir"])
    there = next((place for place in (cache, *cache.parents) if place.exists()), cache)
    if there.exists() and not there.is_dir():
        raise ValueError(f"--cache_dir {cache}: {there} is no folder; give a folder")
    for mode in READ_BY:
        if config[mode] and (other := [key for key in given if key not in READ_BY[mode]]):
            why = "does not go with --" + mode if other[0] in MODES else f"--{mode} does not read it"
            raise ValueError(f"--{other[0]}: {why}; leave it out")
        if config[mode] and os.environ.get("LOCAL_RANK") and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(f"--{mode}: is for one process; start it with python in place of torchrun")
    if config["val_samples"] and config["val_every"] == 1:
        raise ValueError("--val_samples: are scored between validations; give --val_every 2, more, or adaptive")
    for key, modes in (("input", ["predict"]), ("search", ["predict"]), ("tta", ["evaluate", "predict"])):
        if config[key] and not any(config[mode] for mode in modes):
            raise ValueError(f"--{key}: needs --{' or --'.join(modes)}")
    if config["compile"] != "off" and config["checkpoint_activations"]:
        raise ValueError("--checkpoint_activations: torch.compile does not take it; leave one of them out")
    if config["freeze_epochs"] and (config["find_lr"] or config["lr"] == "auto"):
        raise ValueError("--freeze_epochs: the sweep is of the whole network; leave it out, or give --lr a number")
    if (config["effective_batch"] or config["batch_size"] == "auto") and "accumulation_steps" in given:
        raise ValueError("--accumulation_steps: follows from --effective_batch; give that in its place")
    if config["resume"] is None and not any(config[mode] for mode in READ_BY):
        for family in (IMAGES, PUZZLES):
            other = [key for key in given if key in family.flags and key not in FAMILIES[config["model"]].flags]
            if other:
                kind = "pictures" if family is IMAGES else "puzzles"
                raise ValueError(f"--{other[0]}: is for {kind}, the model is {config['model']}; leave it out")
    utils.trackers_available(config["tensorboard"], config["wandb"])


def begin(config, given, held):
    """(state, run) of a run, a new one or one that goes on, with a folder of its own, which `held` keeps locked."""
    (rank, ranks), saved, name = utils.world(), None, config["run_name"]
    own = {key: value for key, value in config.items() if key not in FREE_ON_RESUME}
    utils.check_agreement({"flags": (own, name), "versions of torch": torch.__version__})
    if not (name or config["find_lr"] or config["resume"]) and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError("--run_name: torchrun --max_restarts needs one, to find the run again; give it a name")
    now = utils.over_all(torch.tensor(time.time() * (rank == 0), dtype=torch.float64))
    name = name or f"{config['model']}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now.item()))}"
    if utils.any_of_all(rank == 0 and restarted(RUNS / name)):
        config["resume"] = name
    if config["resume"] is not None:
        folder = find_run(config["resume"] or config["run_name"])
        config = resumed_config(folder, config, given, ranks)
        with utils.in_turn(rank == 0):  # one sets aside what is damaged
            if rank == 0:
                held.enter_context(utils.lock(folder))
            saved = utils.load_newest(folder, SAVED, set_aside=rank == 0)
        utils.check_agreement({"checkpoints; the folder runs must be one": saved and saved["step"]})
        for key, value in saved["config"].items() if saved else ():
            if key not in (*MODES, *FREE_ON_RESUME, "accumulation_steps") and config.get(key) != value:
                raise ValueError(f"{folder / 'config.json'}: {key} is {shown(config.get(key))}, the checkpoint's "
                                 f"{shown(value)}; restore it, or start a new run")  # fmt: skip
        if saved and saved["finished"]:
            raise ValueError(f"--resume {folder.name}: finished already; start a new run or evaluate it")
    else:
        folder = RUNS / name
        if folder.exists() and not config["find_lr"] and (folder.is_file() or in_use(folder)):
            raise ValueError(f"--run_name {name}: {folder} exists; choose another name, or --resume {name}")
    state, run, lines = prepare_run(config, saved and saved["meta"])
    if saved is not None:
        check_same_run(saved, run)
        state.load(saved)
    run.config["run_name"], run.folder, run.log = folder.name, folder, utils.logger()
    if not config["find_lr"]:
        utils.check_room(folder, disk_bytes(state, whole=saved is None))
        verb = f"resumed at step {state.step}" if saved else f"{config['scheduler']}, seed {config['seed']}"
        lines.append(f"run        {folder} | {verb}")
    for line in lines:
        run.log(line)
    if run.config["lr"] == "auto" and not config["find_lr"]:
        run.config["lr"] = sweep(state, run)[2]["valley"]
        lines.append(f"find_lr    --lr {run.config['lr']:.2e}")
    if rank == 0 and config["resume"] is None and not config["find_lr"]:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(utils.lock(folder))
        if in_use(folder):  # of two that start at once, one stops here
            raise ValueError(f"--run_name {name}: {folder} exists; choose another name, or --resume {name}")
        stored = {key: value for key, value in run.config.items() if key not in MODES}
        utils.write_json(folder / "config.json", {"config": stored, "environment": utils.environment()})
    if not config["find_lr"]:
        run.log = utils.logger(folder / "log.txt", lines)
    return state, run


def in_use(folder):
    """Whether a run's folder holds more than what one leaves that was killed before it began."""
    return any(path.name != "lock" and path.suffix != ".partial" for path in folder.iterdir())


def restarted(folder):
    """Whether torchrun has started this process again, and the run in `folder` is the one that it started before."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not (folder / "config.json").is_file():
        return False
    return read_run_config(folder / "config.json")["environment"]["launcher"] == utils.launcher()


def disk_bytes(state, whole):
    """What a run's checkpoints take: two and the one being written, best.pt and means; if not `whole`, one more."""
    weights, now = ({id(t): t.nbytes for _, t in utils.tensors(part)} for part in (state.live, state.to_checkpoint()))
    return (3 * sum(now.values()) + 10 * sum(weights.values())) if whole else sum(now.values())  # 6 for the moments


def explain(error, run, config):
    """Report in one line what ended the program; exit status 2 where `run` is None, as none has begun, else 1.

    What is none of the errors to expect is raised.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the death of a loader worker raises here too, anywhere
    line, memory, rank = utils.one_line(said(error)), utils.out_of_memory(error), os.environ.get("RANK", "0")
    if run is None and isinstance(error, ValueError | OSError):
        fail(said(error))
    if "DataLoader" in str(error) or isinstance(error, ConnectionError | EOFError):  # or its pipe tells
        line = line if "DataLoader" in line else f"a DataLoader worker ended ({line})"
        for worker in multiprocessing.active_children():  # one that hangs would keep this process from ending
            if worker.daemon:
                worker.kill()
        line += "; try --workers 0, or a longer --timeout where one was slow"
    elif utils.lost_process(error):
        what = f"was silent for {config['timeout']:g} s" if "imed out" in str(error) else "ended"
        line = f"another process {what}"
    elif memory:
        line += "; give a smaller --batch_size, --batch_size auto or --checkpoint_activations"
    elif not isinstance(error, OSError | FloatingPointError):
        raise error
    if run is None or rank != "0":
        print(f"error: {f'process {rank}: ' * (rank != '0')}{line}", file=sys.stderr)
    else:
        run.log(f"error: {line}; {standing(run.folder)}")
    return 1


def standing(folder):
    """What a run that failed leaves, in words."""
    try:
        saved = utils.load_newest(folder, set_aside=False)
    except (ValueError, OSError):
        saved = None
    if saved is None:
        return "no checkpoint had been written"
    return f"the last good checkpoint is of step {saved['step']}; go on with: python train.py --resume {folder.name}"


def check_output(config):
    """ValueError unless --output can be written, in the form that its mode writes."""
    if config["output"] is None:
        return
    mode = next((mode for mode in OUTPUTS if config[mode]), None)
    if mode is None:
        raise ValueError(f"--output: only --{', --'.join(OUTPUTS)} write one; add one of them")
    path = Path(config["output"])
    if len(os.fsencode(path.name)) > 200:  # its temporary's is longer, and a name has 255
        raise ValueError(f"--output {path}: must be a name of at most 200 bytes; give a shorter one")
    if path.suffix not in OUTPUTS[mode] or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output {path}: must be a {' or '.join(OUTPUTS[mode])} file in a folder that exists")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: its folder cannot be written to; choose another")
    for flag, files in (("input", config["input"] or ()), ("data", [config["data"] or ""])):
        if path.exists() and any(Path(file).exists() and path.samefile(file) for file in files):
            raise ValueError(f"--output {path}: is the --{flag}; choose another name")


def check_same_run(saved, run):
    """ValueError where the data of a resumed run is not what it was."""
    for key in ("classes", "image_size", "in_channels", "fingerprint"):
        if saved["meta"][key] != run.meta[key]:
            raise ValueError(f"--resume: the data changed, {key} was {shown(saved['meta'][key])}; start a new run")


def report_find_lr(state, run, output):
    """Sweep, then write the curve: CSV at `output` (or under runs/), and a PNG beside it with matplotlib."""
    rates, losses, found = sweep(state, run)
    if utils.world()[0]:
        return 0
    path = Path(output) if output else RUNS / f"{run.folder.name}-find_lr.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("lr", "loss"), *zip(rates, losses)])
    png = path.with_suffix(".png")
    drawn = utils.save_curve(png, rates, losses, found)
    run.log(f"curve      {path}" + (f", {png}" if drawn else " (a picture too with matplotlib)"))
    return 0


def load_model(path, config):
    """(model on the device in eval mode, its metadata, device, dtype) of a checkpoint; ValueError for a bad one."""
    found = utils.load_checkpoint(path)
    needed = {"model", "num_classes", "in_channels", "arguments", "classes", "image_size", "mean", "std"}
    if not isinstance(found.get("meta"), dict) or not needed <= found["meta"].keys() or "model" not in found:
        raise ValueError(f"{path}: has no metadata; give a checkpoint that a run of this kit wrote")
    meta, device = {"stored_size": found["meta"]["image_size"], **found["meta"]}, utils.pick_device(config["device"])
    if config["message_steps"]:
        if "message_steps" not in meta["arguments"]:
            raise ValueError(f"--message_steps: {path} is a {meta['model']}, which has none; leave it out")
        meta["arguments"]["message_steps"] = config["message_steps"]
    utils.tune(device)
    dtype, _ = utils.pick_precision(config["amp"], device)
    model = models.build_model(meta["model"], meta["num_classes"], meta["in_channels"], **meta["arguments"])
    models.check_state_dict(model.state_dict(), found["model"])
    model.load_state_dict(found["model"])
    model.to(device, memory_format=pick_memory_format(config["channels_last"], device))
    return model.eval(), meta, device, dtype


def run_evaluate(config, given):
    """Score each checkpoint of --evaluate, then print them, side by side too, and write --output and pictures."""
    results, best, drawn = [], None, None
    for path in config["evaluate"]:
        result, task, pictures = score(path, config, given)
        split = "" if result["split"] == "all" else f"{result['split']} "
        head = f"{path} on {result['samples']:,} {split}{task.unit}"
        lines = [f"{head}{', with --tta' * result['tta']}: {metrics_line(result, task)}"]
        if len(config["evaluate"]) == 1:
            lines += ["  " + line for line in utils.report_lines(result, task.unit)]
        if best is None or result.get(task.monitor, 0) > results[best].get(task.monitor, 0):
            best, drawn = len(results), pictures  # the only one whose images are kept
        results.append(result | {"lines": lines})
    print("\n".join(line for result in results for line in result.pop("lines")))
    scalars = [{k: v for k, v in result.items() if not isinstance(v, list | np.ndarray)} for result in results]
    if len(results) > 1:
        print("\n".join(["", *utils.side_by_side(scalars)]))
        if utils.same_data(scalars):
            print(f"highest {task.monitor}: {results[best]['checkpoint']}")
    if config["output"]:
        path = Path(config["output"])
        if path.suffix == ".csv":
            utils.write_csv(path, scalars)
        else:
            utils.write_json(path, results[0] if len(results) == 1 else results)
        print(f"written    {', '.join(map(str, [path, *utils.draw_report(path, results[best], drawn)]))}")
    return 0


def score(path, config, given):
    """({"checkpoint", "data", "split", "samples", "tta", metrics…}, its Task, what pictures need) of one checkpoint.

    On test, or on val where there is none.
    """
    model, meta, device, dtype = load_model(path, config)
    family = FAMILIES[meta["model"]]
    stored = {**meta["source"], "image_size": meta["image_size"], "model": meta["model"]}
    # another --data is looked at as it is; another seed or fraction would score samples that were trained on
    source, name = family.to_score({**config, **stored, **({"data": given["data"]} if "data" in given else {})}, given)
    if source.classes != meta["classes"]:
        raise ValueError(f"--data: its classes {source.classes[:5]} are not the checkpoint's {meta['classes'][:5]}")
    if name is None:
        raise ValueError(f"{path}: its data has no test or val split; give --data PATH with one")
    split = source.splits[name]
    if len(split.images.shape) == 4 and split.images.shape[-1] != meta["in_channels"]:
        raise ValueError(f"--data: {split.images.shape[-1]} channels, the checkpoint has {meta['in_channels']}")
    batch_size = scoring_batch(config)
    batches = data.batches(split, batch_size, device, utils.free_bytes(device) // 4, config["workers"])
    task, views = family.task(config), family.views if config["tta"] else None
    run = partial(apply, model, prepare=family.prepare(meta, pick_memory_format(config["channels_last"], device)),
                  dtype=dtype, views=views)  # fmt: skip
    one = next(iter(batches(torch.arange(1))))
    once = lambda: [outputs.flatten()[0].item() for outputs, _ in run([one])]  # .item() waits for the device
    for _ in range(3):
        once()
    latency = np.array([timed(once) for _ in range(30)]) * 1e3
    order = torch.arange(len(split))
    for _ in run(batches(order[:batch_size])):
        pass  # the first pass at a size takes longer
    bar = tqdm(total=len(split), desc=Path(path).name, unit=task.unit, leave=False, disable=config["quiet"] or None)
    pairs, began = [], time.perf_counter()
    with contextlib.closing(bar):
        for outputs, targets in run(batches(order)):
            pairs.append((outputs.cpu(), targets.cpu()))
            bar.update(len(targets))
    seconds = time.perf_counter() - began
    result, drawn = family.report(pairs, task)
    if drawn is not None:
        drawn = (*drawn, split.images, meta)
        for row, label in zip(result["per_class"], meta["classes"]):
            row["class"] = label
    name = "all" if name == "train" else name  # a puzzle file is scored whole
    speed = {"latency_ms": np.median(latency), "latency_p95_ms": np.percentile(latency, 95),
             "samples_per_second": len(split) / seconds, "batch_size": batch_size}  # fmt: skip
    about = {"checkpoint": str(path), "data": source.description, "split": name, "samples": len(split)}
    return {**about, "tta": config["tta"], **result, **speed}, task, drawn


def scoring_batch(config):
    """Samples at once where nothing is kept for a backward pass."""
    return 32 if config["batch_size"] == "auto" else 2 * config["batch_size"]


def run_predict(config):
    """Apply the checkpoint of --predict to --input; exit status."""
    if not config["input"]:
        raise ValueError("--predict: needs --input PATH, of pictures or a file of puzzles")
    model, meta, device, dtype = load_model(config["predict"], config)
    puzzles, suffix = meta["model"] == "sudoku_gnn", Path(config["output"] or "").suffix
    if suffix == ".json" and puzzles or suffix in (".sdm", ".sdk") and not puzzles:
        kinds = ".csv, .sdm or .sdk" if puzzles else ".csv or .json"
        raise ValueError(f"--output {config['output']}: {meta['model']} writes {kinds}; choose another name")
    return FAMILIES[meta["model"]].predict(model, meta, device, dtype, config)


def run_export(config):
    """Write the checkpoint of --export to --output by torch.export, with raw bytes in and probabilities out.

    The batch is dynamic. What was written is compared with the model first, read back, at two batch sizes.
    """
    if not config["output"]:
        raise ValueError("--export: needs --output FILE.pt2 or FILE.onnx")
    output = Path(config["output"])
    if output.suffix == ".onnx" and (missing := utils.missing("onnx", "onnxscript")):
        raise ValueError(f"--output {output}: needs the packages {missing}: pip install {missing}")
    model, meta, *_ = load_model(config["export"], {**config, "device": "cpu", "channels_last": False})
    deployed = models.Deployed(model, meta["mean"], meta["std"]).eval()
    for module in model.modules():
        if isinstance(module, models.Conv2d):
            module.tuned_on = ()  # a convolution as it is, whatever will run it
    size, channels = meta["image_size"], meta["in_channels"]
    shape, top = ((81,), 10) if meta["model"] == "sudoku_gnn" else ((size, size, channels), 256)
    example = lambda count: torch.from_numpy(np.random.default_rng(count).integers(0, top, (count, *shape), np.uint8))
    facts = {name: meta[name] for name in ("model", "classes", "image_size", "stored_size", "mean", "std")}
    if meta["model"] == "sudoku_gnn":
        print(f"exporting {meta['arguments']['message_steps']} unrolled steps, about a minute", flush=True)
    content, call = utils.exported(deployed, example(2), output.suffix, facts)
    for count in (1, 3):
        with torch.inference_mode():
            expected = deployed(example(count))
        if not torch.allclose(call(example(count)), expected, atol=1e-4):
            raise ValueError(f"--export: the exported model differs from {config['export']}; nothing was written")
    utils.write_atomic(output, content)
    print(f"{output}: {len(content) / 2**20:.1f} MiB, uint8 {['batch', *shape]} to probabilities, equal to the model's")
    return 0


def timed(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name that the code page of a terminal lacks
    sys.exit(main())
