"""Train an image classifier or a Sudoku solver on one laptop GPU or on a CPU; resume, evaluate, use it.

    python train.py --model efficientnet_b0 --accumulation_steps 2 --clip_grad_norm 1.0
    python train.py --model custom --data photos/ --ema_decay 0.999    # a folder of class folders
    python train.py --config cifar10 --data cifar10/                   # a preset of configs.json
    python train.py --resume                                           # the last unfinished run
    python train.py --find_lr                                          # a learning-rate range test
    python train.py --evaluate runs/NAME/best.pt runs/NAME/ema.pt      # side by side on the test split
    python train.py --predict runs/NAME/best.pt --input photos/new/    # classes of pictures
    python train.py --predict --input puzzle.sdk                       # solve a Sudoku
    python train.py --export runs/NAME/best.pt --output model.pt2      # for torch.export, or .onnx
    python train.py --copy train_step update_ema --output loop.py      # functions for your own project
    torchrun --nproc_per_node 2 train.py --run_name NAME               # one process a GPU

A *step* is one optimizer update over a window of up to accumulation_steps batches. Schedules, EMA,
logs and saves count in steps. Data order, augmentation and dropout are functions of the seed and of
the epoch, the sample and the step, so a run resumed at any step is bitwise the run never stopped.
"""

import argparse
import contextlib
import copy
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, update_bn

import data
import model as models
import utils

MAX_BAD_STEPS = 25  # in a row; fp16 needs 16 to halve its scale from 65,536 to 1
TRACK_EVERY = 50  # steps between two points of --tensorboard and --wandb within an epoch
MAX_SHOWN, MAX_GUESSES = 100, 100_000  # predictions on the terminal; guesses of --search a puzzle
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RUNS = Path("runs")
WEIGHTS = Path(__file__).with_name("weights") / "sudoku_extreme.pt"  # the default of --predict
KIT = [Path(__file__).with_name(name) for name in
       ("train.py", "model.py", "data.py", "utils.py", "configs.json")]
MODES = set("config resume find_lr evaluate predict export copy input search tta output".split())
OUTPUTS = {"find_lr": [".csv"], "evaluate": [".json", ".csv"], "export": [".pt2", ".onnx"],
           "predict": [".csv", ".json", ".sdm", ".sdk"], "copy": [".py"]}
COMMON = "tta quiet output batch_size device amp channels_last model_args"
READ_BY = {  # the flags that a mode reads; its checkpoint holds the others
    "evaluate": f"evaluate data cache_dir workers {COMMON}".split(),
    "predict": f"predict input search {COMMON}".split(),
    "export": "export output model_args".split(),
    "copy": "copy output".split(),
}
NEEDS = {  # flag -> it needs one of these
    "input": ["predict"], "search": ["predict"], "tta": ["evaluate", "predict"],
    "output": list(OUTPUTS), "predict": ["input"], "export": ["output"], "copy": ["output"],
}
IMAGE_FLAGS = set("image_size crop_padding flip min_crop_area color_jitter cutout label_smoothing "
                  "class_weights pretrained mixup cutmix".split())
ALIASES = dict(pair.split(":") for pair in (  # of timm, Hugging Face, Lightning, fastai, ultralytics
    "learning_rate:lr base_lr:lr lr0:lr sched:scheduler lr_scheduler:scheduler lr_scheduler_type:scheduler "
    "wd:weight_decay opt:optimizer optim:optimizer fp16:amp bf16:amp precision:amp mixed_precision:amp "
    "half:amp gradient_accumulation_steps:accumulation_steps grad_accum_steps:accumulation_steps "
    "accumulate_grad_batches:accumulation_steps max_epochs:epochs num_epochs:epochs "
    "num_train_epochs:epochs weights:pretrained initial_checkpoint:pretrained warmup:warmup_epochs "
    "warmup_ratio:warmup_epochs warmup_steps:warmup_epochs clip_grad:clip_grad_norm "
    "max_grad_norm:clip_grad_norm gradient_clip_val:clip_grad_norm bs:batch_size batch:batch_size "
    "per_device_train_batch_size:batch_size num_workers:workers imgsz:image_size img_size:image_size "
    "input_size:image_size patience:early_stopping smoothing:label_smoothing model_ema_decay:ema_decay "
    "arch:model model_kwargs:model_args data_dir:data dataset:data name:run_name output_dir:run_name "
    "torchcompile:compile grad_checkpointing:checkpoint_activations report_to:tensorboard "
    "drop:model_args dropout:model_args drop_path:model_args log_wandb:wandb "
    "accelerator:device checkpoint:evaluate ckpt:evaluate").split())
FREE_ON_RESUME = set("device workers save_every tensorboard wandb quiet run_name cache_dir data "
                     "memory_gb checkpoint_activations timeout".split())


# -------------------------------------------------------------------------------------- flags


def build_parser():
    """(parser of all flags, {flag: default}). Each flag's type checks its value."""
    num, path, switch = utils.number, utils.file_path, utils.boolean
    count, positive, size = num(int, 0), num(int, 1), num(int, 0, 2048)
    at_least_0, above_0 = num(float, 0), num(float, 0, open_low=True)
    share, alpha = num(float, 0, 1, open_high=True), num(float, 0, 100)
    groups = {  # (flag, type or choices, default, what it is)
        "most used": (
            ("data", path, None, "folder of class folders, or IDX, CIFAR, NPZ or puzzle files; else built-in data"),
            ("config", str, None, "preset of configs.json, such as finetune; other flags override it"),
            ("model", list(models.MODELS), "efficientnet_b0", "network to train"),
            ("pretrained", path, None, "file of weights to start from; the flag alone: official EfficientNet-B0"),
            ("epochs", positive, 10, "passes over the training split"),
            ("batch_size", num(int, 1, word="auto"), 16, "samples at once; auto: what fits in memory"),
            ("lr", above_0, None, "peak learning rate, also as --max_lr; default: by optimizer"),
            ("device", str, "auto", "auto, cuda, cuda:N, mps or cpu"),
            ("run_name", utils.run_name, None, "name of the run's folder under runs/; else model and time"),
            ("resume", lambda text: text and path(text), None,
             "name of the run to go on with; the flag alone: the last unfinished"),
        ),
        "data": (
            ("image_size", size, 0, "side of the images in px; 0: by the source"),
            ("val_fraction", share, 0.1, "share of each class for validation, if there is no split"),
            ("max_samples", count, 0, "size of a subset of each split; 0: all"),
            ("workers", num(int, 0, 64), None, "loader processes; default: 0 for data in memory"),
            ("cache_dir", path, ".cache", "folder for decoded image folders"),
            ("crop_padding", num(int, 0, 256), 4, "padding in px before a random crop of small images"),
            ("flip", switch, None, "random mirroring; default: of colour images only"),
            ("min_crop_area", num(float, 0, 1, True), 0.35, "smallest share of the area in a random crop"),
            ("color_jitter", share, 0.0, "strength of random brightness, contrast, saturation"),
            ("cutout", size, 0, "side in px of the erased square; 0: off"),
            ("mixup", alpha, 0.0, "Beta parameter of Mixup; 0: off"),
            ("cutmix", alpha, 0.0, "Beta parameter of CutMix; with --mixup: one of both; 0: off"),
        ),
        "model": (
            ("model_args", str, [], "KEY=VALUE arguments of the network, such as widths=24,64,256,256"),
            ("focal_gamma", at_least_0, 0.0, "exponent gamma of the focal loss; 0: off"),
            ("label_smoothing", share, 0.0, "share of the target spread over all classes"),
            ("class_weights", ["off", "balanced"], "off", "loss weights by inverse class frequency"),
        ),
        "training": (
            ("min_steps", count, 0, "smallest number of steps: small sets get smaller batches, more epochs"),
            ("accumulation_steps", positive, 1, "micro-batches of a step"),
            ("effective_batch", positive, None, "samples of a step, in place of accumulation steps"),
            ("clip_grad_norm", at_least_0, 0.0, "largest gradient norm; 0: no clipping"),
            ("optimizer", list(models.LEARNING_RATES), None, "default: muon for Sudoku, adamw for images"),
            ("weight_decay", at_least_0, 0.01, "weight decay of matrices and filters"),
            ("momentum", share, 0.9, "momentum of sgd and muon, beta1 of adamw"),
            ("ema_decay", share, 0.0, "decay of the weights' moving average; 0: none"),
            ("swa_start_epoch", count, 0, "first epoch of the SWA mean; 0: none"),
            ("sam_rho", at_least_0, 0.0, "radius of SAM; 0: off"),
            ("seed", num(int, 0, 2**63 - 1), 0, "seed of all randomness"),
        ),
        "schedule": (
            ("scheduler", list(SCHEDULES), "onecycle", "schedule of the learning rate"),
            ("scheduler_args", str, [], "KEY=VALUE arguments of the schedule, such as pct_start=0.2"),
            ("warmup_epochs", at_least_0, 0.0, "epochs of linear warm-up, except for onecycle"),
        ),
        "machine": (
            ("amp", ["auto", "True", "False", "fp16", "bf16"], "auto", "mixed precision; auto: if it is fast here"),
            ("channels_last", switch, True, "memory format of images and filters"),
            ("memory_gb", above_0, None, "limit of GPU memory in GB; on a CPU: of --batch_size auto"),
            ("checkpoint_activations", switch, False, "activations computed twice, to save memory"),
            ("deterministic", switch, True, "deterministic cuDNN, for bitwise resume"),
            ("timeout", above_0, 600.0, "longest silence in s of a loader worker or process"),
            # no CUDA graphs: they would reuse the memory of accumulated gradients
            ("compile", ["off", "default", "max-autotune-no-cudagraphs"], "off", "mode of torch.compile"),
        ),
        "run": (
            ("save_every", count, 0, "steps between saves; 0: one save after each epoch"),
            ("early_stopping", count, 0, "patience in validations; 0: off"),
            ("min_delta", at_least_0, 0.0, "smallest change that is an improvement"),
            ("monitor", str, None, "metric for best.pt and patience, such as val_loss"),
            ("tensorboard", switch, False, "scalars for TensorBoard"),
            ("wandb", switch, False, "scalars for Weights & Biases"),
            ("quiet", switch, False, "no progress bars"),
        ),
        "other modes": (
            ("find_lr", switch, False, "learning-rate range test"),
            ("evaluate", path, None, "metrics of checkpoints on the test split, else on val"),
            ("predict", path, None, "predictions of a checkpoint for --input; alone: Sudoku"),
            ("export", path, None, "program of a checkpoint, written to --output"),
            ("copy", str, None, "functions of the kit with all they need, written to --output"),
            ("tta", switch, False, "average over six views of each image (--evaluate, --predict)"),
            ("input", path, None, "pictures, folders, globs, or a file of puzzles"),
            ("search", switch, False, "proved solutions of what the network does not solve"),
            ("output", path, None, "file of --find_lr, --evaluate, --predict, --export or --copy"),
        ),
    }
    alone = {"pretrained": "official", "amp": "True", "compile": "default", "resume": "",
             "predict": str(WEIGHTS)}  # the value of a flag without one
    description, examples, _ = __doc__.split("\n\n")
    parser = utils.Parser(
        usage="python train.py [--config NAME] [--data PATH] [flags]", description=description,
        epilog=f"examples:\n{examples}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {}
    for title, rows in groups.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in rows:
            options = {"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": "X"}
            if name in alone or kind is switch:
                options |= {"nargs": "?", "const": alone.get(name, True)}
            if name in ("model_args", "scheduler_args", "evaluate", "copy", "input"):
                options["nargs"] = "+"
            if default not in (None, False, []):
                text += f" (default: {default})"
            # no default: a flag counts as given even where it equals its default
            names = ["--lr", "--max_lr"] if name == "lr" else [f"--{name}"]
            group.add_argument(*names, default=argparse.SUPPRESS, help=text, **options)
            defaults[name] = default
    return parser, defaults


def parse_flags(argv):
    """(args, given): all flags, and a dict of those set by the user or by the preset.

    The user's flags override the preset, the preset overrides the defaults.
    """
    parser, defaults = build_parser()
    flags, preset = utils.parse_words(parser, argv, ALIASES), {}
    if "config" in flags:
        path = Path(__file__).with_name("configs.json")
        preset = utils.parse_preset(parser, path, flags["config"], MODES)
    if flags.keys() & {"epochs", "batch_size", "accumulation_steps", "effective_batch"}:
        preset.pop("min_steps", None)  # what the user asks for is not changed
    if "effective_batch" in flags or flags.get("batch_size") == "auto":
        steps = preset.pop("accumulation_steps", 1)  # the samples of a step stay the preset's
        if preset.get("batch_size", "auto") != "auto":
            preset["effective_batch"] = steps * preset["batch_size"]
    for key in {"model_args", "scheduler_args"} & flags.keys():
        flags[key] = preset.get(key, []) + flags[key]  # the last value of a KEY counts
    given = {**preset, **flags}
    return argparse.Namespace(**{**defaults, **given}), given


def check_flags(args, given):
    """Mutates `args`: types the KEY=VALUE arguments. ValueError for flags that do not go together.

    No data has been read yet; `settle` checks what depends on the data.
    """
    mode = next((mode for mode in (*READ_BY, "find_lr") if getattr(args, mode)), None)
    if mode in READ_BY and args.batch_size == "auto":
        args.batch_size = 16
    for key in given if mode in READ_BY else ():
        if key not in READ_BY[mode]:
            raise ValueError(f"--{key}: does not go with --{mode}; leave it out")
    for key, others in NEEDS.items():
        if getattr(args, key) and not any(getattr(args, other) for other in others):
            raise ValueError(f"--{key}: needs --{' or --'.join(others)}; add it")
    several = os.environ.get("LOCAL_RANK") and os.environ.get("WORLD_SIZE", "1") != "1"
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    version = [int(part) for part in re.findall(r"\d+", torch.__version__)[:2]]
    swa, epochs, warmup_epochs = args.swa_start_epoch, args.epochs, args.warmup_epochs
    automatic = args.effective_batch or args.batch_size == "auto"
    utils.raise_first((
        (version < [2, 10], f"torch {torch.__version__}: is too old; install 2.10 or later"),
        (mode in READ_BY and several, f"--{mode}: is for one process; start it without torchrun"),
        (args.compile != "off" and args.checkpoint_activations,
         "--checkpoint_activations: does not go with --compile; leave one of them out"),
        (automatic and "accumulation_steps" in given,
         "--accumulation_steps: follows from --effective_batch; leave it out"),
        (automatic and args.min_steps,
         "--min_steps: does not go with --effective_batch or --batch_size auto; leave one of them out"),
        (swa > epochs, f"--swa_start_epoch {swa}: must be at most --epochs {epochs}"),
        (args.scheduler != "onecycle" and warmup_epochs >= epochs,
         f"--warmup_epochs {warmup_epochs:g}: must be below --epochs {epochs}"),
        (restarts and not mode and not (args.run_name and args.resume == ""),
         "--resume: torchrun --max_restarts needs --resume --run_name NAME to find the run again"),
    ))
    if args.output:
        utils.check_output(args.output, OUTPUTS[mode], [*(args.input or ()), args.data, *KIT])
    utils.trackers_available(args.tensorboard, args.wandb)
    if mode in READ_BY or args.resume or (args.resume == "" and not args.run_name):
        return  # the checkpoint holds the rest
    if args.scheduler == "onecycle" and args.warmup_epochs:
        raise ValueError("--warmup_epochs: onecycle warms up itself; leave it out")
    for key in given.keys() & IMAGE_FLAGS if args.model == "sudoku_gnn" else ():
        raise ValueError(f"--{key}: is for pictures, not for --model {args.model}; leave it out")
    functions = {"model_args": models.MODELS[args.model], "scheduler_args": SCHEDULES[args.scheduler]}
    for key, function in functions.items():
        setattr(args, key, utils.keyword_arguments(getattr(args, key), function, f"--{key}"))
    if args.scheduler_args.get("anneal", "cos") not in ("cos", "linear"):
        raise ValueError("--scheduler_args anneal: must be cos or linear")
    for key in args.scheduler_args.keys() & SCHEDULE_RANGES.keys():
        low, high = SCHEDULE_RANGES[key]
        if not low <= args.scheduler_args[key] <= high:
            raise ValueError(f"--scheduler_args {key}: must be from {low:g} to {high:g}")


# ----------------------------------------------------------------------- what the loop carries


@dataclass(frozen=True)
class Task:
    """What the loop needs to know of a kind of data; the functions are pure."""

    loss: Callable  # (outputs, targets) -> the loss summed over the batch's items, a float32 scalar
    items: Callable = len  # targets -> their number of items
    # (outputs, targets) -> numerators [metrics], denominators (as many, a number, None: the items)
    measure: Callable = lambda outputs, targets: (outputs.new_zeros(0), None)
    metrics: tuple = ()  # their names; the first one chooses best.pt
    unit: str = "samples"
    augment: Callable | None = None  # (images, targets, index, epoch) -> (inputs, targets)
    prepare: Callable | None = None  # images -> inputs, for evaluation
    views: Callable | None = None  # inputs -> (view, weight) ..., for test-time augmentation


@dataclass
class TrainState:
    """All that a run mutates; saved and restored whole, except for the last three fields."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: dict | None = None  # name -> tensor, as in the model's state dict
    swa: AveragedModel | None = None
    step: int = 0  # attempted steps; bad ones count, so that schedules and logs agree
    epoch: int = 0  # completed epochs
    epoch_step: int = 0  # completed steps of the current epoch
    bad_steps: int = 0
    bad_in_a_row: int = 0
    totals: torch.Tensor | None = None  # of the current epoch, see `batch_totals`
    micro_batch: int | None = None  # largest batch since memory ran out; None: no limit
    seconds: float = 0.0  # training time of the current epoch
    gradient_norm: float = 0.0  # before clipping, smoothed over good steps
    history: list = field(default_factory=list)  # rows of metrics.csv, one dict an epoch
    finished: bool = False
    forward: Callable | None = None  # the compiled model
    share: Callable | None = None  # see `share_among_processes`
    stop: bool = False  # whether a process asks to stop

    def __post_init__(self):  # once: walking the modules of EfficientNet-B0 takes 0.3 ms
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.buffers = list(self.model.buffers())
        self.live = self.model.state_dict()  # the tensors themselves, no copies

    def to_checkpoint(self):
        values = {name: getattr(self, name) for name in SAVED}
        return {n: v.state_dict() if hasattr(v, "state_dict") else v for n, v in values.items()}

    def load(self, saved):
        """Set this state to a saved one of the same model."""
        for name in SAVED:
            own, value = getattr(self, name), saved[name]
            if hasattr(own, "load_state_dict"):
                if value:  # the scaler of another precision saved nothing
                    own.load_state_dict(value)
            elif name == "ema" and own:
                torch._foreach_copy_(list(own.values()), [value[key] for key in own])
            elif name != "ema":
                setattr(self, name, value)
        for p, moments in self.optimizer.state.items():  # in the memory format of this device
            for name, value in moments.items():
                if value is not None and value.ndim:
                    moments[name] = torch.empty_like(p).copy_(value)


SAVED = [f.name for f in fields(TrainState)][:-3]


# ---------------------------------------------------------------------------------- schedules
# Pure functions of the step, counted from 0, to (learning rate, momentum or None to leave it).


def onecycle(step, total_steps, max_lr, pct_start=0.3, div_factor=25.0, final_div_factor=1e4,
             anneal="cos", cycle_momentum=True):
    """Up to max_lr, down to max_lr / div_factor / final_div_factor (Smith & Topin 2018)."""
    peak, last, first = pct_start * total_steps - 1, total_steps - 1, max_lr / div_factor
    if step <= peak and step < last:
        share = step / peak if peak > 0 else 1.0
        (lr, lr_to), (momentum, momentum_to) = (first, max_lr), (0.95, 0.85)
    else:
        share = (step - peak) / (last - peak) if last > peak else 1.0
        (lr, lr_to), (momentum, momentum_to) = (max_lr, first / final_div_factor), (0.85, 0.95)
    share = (1 - math.cos(math.pi * share)) / 2 if anneal == "cos" else share
    momentum += (momentum_to - momentum) * share
    return lr + (lr_to - lr) * share, momentum if cycle_momentum else None


def warmup(step, warmup_steps):
    """A factor that rises linearly from 1 / warmup_steps to 1 over the first warmup_steps."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step, total_steps, lr, warmup_steps=0):
    """Linear warm-up, then half a cosine down to 0 at total_steps (Loshchilov & Hutter 2017)."""
    if step < warmup_steps:
        return lr * warmup(step, warmup_steps), None
    share = (step - warmup_steps) / (total_steps - warmup_steps)
    return lr * (1 + math.cos(math.pi * share)) / 2, None


def constant(step, total_steps, lr, warmup_steps=0):
    """Linear warm-up, then lr."""
    return lr * warmup(step, warmup_steps), None


def plateau(step, total_steps, lr, warmup_steps=0, values=(), patience=3, factor=0.1, min_delta=0.0):
    """Linear warm-up, then lr, cut by `factor` each time that patience runs out over `values`.

    `values` holds the monitored metric of each validation so far, higher being better. Equal to
    torch's ReduceLROnPlateau with an absolute threshold of min_delta.
    """
    best, waited, cuts = -math.inf, 0, 0
    for value in values:
        best, waited = (value, 0) if value > best + min_delta else (best, waited + 1)
        if waited > patience:
            cuts, waited = cuts + 1, 0
    return lr * factor**cuts * warmup(step, warmup_steps), None


SCHEDULES = {"onecycle": onecycle, "cosine": cosine, "plateau": plateau, "constant": constant}
SCHEDULE_RANGES = {"pct_start": (0, 1), "div_factor": (1e-6, 1e6), "final_div_factor": (1e-6, 1e12),
                   "factor": (1e-6, 1), "patience": (0, 1e6), "warmup_steps": (0, 1e9)}


def rates(args, step, steps_per_epoch, values=()):
    """(learning rate, momentum or None) of a step by the flags; `values` as in `plateau`."""
    options = dict(args.scheduler_args)
    if args.scheduler != "onecycle":
        options.setdefault("warmup_steps", round(args.warmup_epochs * steps_per_epoch))
    if args.scheduler == "plateau":
        options |= {"values": values, "min_delta": args.min_delta}
    return SCHEDULES[args.scheduler](step, args.epochs * steps_per_epoch, args.lr, **options)


# ---------------------------------------------------------------------------------------- EMA


def start_ema(model):
    """Copies of the tensors of the model's state dict, buffers too, for `update_ema`."""
    tensors = model.state_dict().items()
    return {name.removeprefix("_orig_mod."): tensor.detach().clone() for name, tensor in tensors}


@torch.no_grad()
def update_ema(ema, weights, decay, updates):
    """Mutates the dict `ema`: ema += (1 - d) * (weights - ema), weights being a state dict.

    d = min(decay, (1 + n) / (10 + n)), where n = `updates` counts the updates before this one.
    Integer buffers are copied. torch.compile's prefix of the names does not matter.
    """
    if ema.keys() != weights.keys():
        weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    floats = [name for name in ema if ema[name].is_floating_point()]
    weight = 1 - min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_([ema[n] for n in floats], [weights[n] for n in floats], weight)
    for name in ema.keys() - floats:
        ema[name].copy_(weights[name])


# ----------------------------------------------------------------------------------- one step


def unchanged(images, targets, index, epoch=0):
    """The augmentation that does nothing."""
    return images, targets


def train_step(state, window, task, augment=unchanged, dtype=torch.float32, clip_grad_norm=0.0,
               ema_decay=0.0, seed=None, sam_rho=0.0):
    """Mutates `state`: one optimizer update from a window of batches (images, targets, index).

    The summed loss is divided by the items of the whole window, so uneven batches give the gradient
    of the one big batch (except for BatchNorm, which normalises each batch by itself). `augment`
    turns (images, targets, index) into inputs and targets; `seed` determines dropout; `sam_rho` is
    the rho of `uphill`. A non-finite loss or gradient changes nothing. Where memory runs out, the
    window is done again in halves. Returns (totals as in `batch_totals`, gradient norm, good or not).
    """
    buffers = [buffer.clone() for buffer in state.buffers]
    if seed is None and sam_rho:  # both passes need the same randomness
        seed = int(torch.randint(2**62, ()))
    first_norm, totals = 0.0, None
    while totals is None:
        totals = window_gradients(state, window, task, augment, dtype, seed)
        if sam_rho and totals is not None:
            with uphill(state, sam_rho) as first_norm:
                second = window_gradients(state, window, task, augment, dtype, seed)
            totals = None if second is None else totals
        if totals is None:
            restore(state, buffers)
    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state)
    norm_value, loss_value = norm.item(), totals.tolist()[0][0]  # the loss is ready with the norm
    good = math.isfinite(norm_value + loss_value + float(first_norm))
    if good:
        if clip_grad_norm:
            nn.utils.clip_grads_with_norm_(state.parameters, clip_grad_norm, norm)
        state.scaler.step(state.optimizer)
        if state.ema is not None:
            update_ema(state.ema, state.live, ema_decay, state.step - state.bad_steps)
    state.scaler.update()
    restore(state, [] if good else buffers)
    state.step += 1
    state.bad_steps += not good
    state.bad_in_a_row = 0 if good else state.bad_in_a_row + 1
    return totals, norm_value, good


def window_gradients(state, window, task, augment, dtype, seed):
    """Mutates the gradients of `state`: adds the window's. Its totals; None if memory ran out."""
    device = state.parameters[0].device
    if seed is not None:
        set_seed(seed, device)
    batches, parts, failed = split(window, state.micro_batch), [], False
    counts = [task.items(targets) for _, targets, _ in batches]
    items = sum(counts)
    try:
        for (images, targets, index), count in zip(batches, counts):
            with autocast(device, dtype):
                inputs, targets = augment(images, targets, index)
                outputs = (state.forward or state.model)(inputs)
                loss = task.loss(outputs, targets)
            parts.append(batch_totals(task, loss.detach(), count, outputs.detach(), targets))
            state.scaler.scale(loss).backward(loss.new_ones(()) / items)  # as of loss / items
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed = True
    if failed:  # outside `except`: the exception keeps the failed pass's tensors alive
        inputs = outputs = loss = None
        largest = max(len(images) for images, *_ in batches)
        if largest < 4:  # BatchNorm needs two samples
            raise torch.OutOfMemoryError(f"out of memory with a batch of {largest}")
        state.micro_batch = largest // 2
    totals = sum(parts[1:], parts[0]) if parts else zero_totals(task, device)
    if state.share is not None:
        totals, failed = state.share(state, totals, failed)
    return None if failed else totals


def zero_totals(task, device):
    """Zeros [2, 1 + metrics], for sums of `batch_totals`; float64, which MPS lacks."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(2, 1 + len(task.metrics), device=device, dtype=dtype)


def batch_totals(task, loss, items, outputs, targets):
    """float [2, 1 + metrics]: numerators over denominators of the loss and of each metric."""
    numerators, denominators = task.measure(outputs, targets)
    numerators = torch.cat((loss[None], numerators))
    counts = torch.empty_like(numerators).fill_(items)
    if denominators is not None:
        counts[1:] = denominators
    return torch.stack((numerators, counts))


@contextlib.contextmanager
def uphill(state, rho):
    """Mutates `state`: within the block the weights are moved by rho along their gradient.

    SAM (Foret et al. 2021, arXiv:2010.01412) takes its gradient there. The block begins without
    gradients; after it weights and buffers are bitwise as before. Yields the gradient's norm."""
    norm = gradient_norm(state)
    weights = [p for p in state.parameters if p.grad is not None]
    tensors = [*(p.detach() for p in weights), *state.buffers]
    before = [tensor.clone() for tensor in tensors]
    moves = torch._foreach_mul([p.grad for p in weights], rho / norm.clamp(min=1e-12))
    torch._foreach_add_(tensors[: len(weights)], moves)
    restore(state, [])
    try:
        yield norm
    finally:
        for tensor, old in zip(tensors, before):
            tensor.copy_(old)


def gradient_norm(state):
    """The norm of all gradients together, a scalar tensor."""
    gradients = [p.grad for p in state.parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def restore(state, buffers):
    """Mutates `state`: removes all gradients and sets the buffers to the given ones, if any."""
    for p in state.parameters:
        p.grad = None
    for buffer, old in zip(state.buffers, buffers):
        buffer.copy_(old)


def split(window, size):
    """The batches of a window in parts of up to `size` samples; as they are for None."""
    parts = []
    for images, targets, index in window if size else ():
        sizes = [len(part) for part in torch.arange(len(images)).split(size)]
        if len(sizes) > 1 and sizes[-1] == 1:  # BatchNorm needs two
            sizes[-2:] = [size + 1]
        indices = [None] * len(sizes) if index is None else index.split(sizes)
        parts += zip(images.split(sizes), targets.split(sizes), indices)
    return parts if size else window


def out_of_memory(error):
    """Whether an error says that memory ran out, on CUDA (its libraries too), MPS or a CPU."""
    texts = "out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory"
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return memory or any(text in str(error) for text in texts)


def autocast(device, dtype):
    """torch.autocast to `dtype`; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def set_seed(seed, device):
    """Seeds the CPU and `device`; torch.manual_seed visits every backend, which takes 0.1 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).manual_seed(seed)


def share_among_processes(state, totals, failed):
    """Mutates `state`: one message makes its gradients and float buffers those of all processes.

    Gradients are weighted by the items of each process, buffers (BatchNorm's statistics) averaged;
    state.stop becomes whether any process asks to stop. A process without items sends zeros.
    Returns the totals of all and whether memory ran out in any.
    """
    weights, dtype = state.parameters, state.parameters[0].dtype
    buffers = [buffer for buffer in state.buffers if buffer.is_floating_point()]
    state.scaler.scale(totals)  # makes its scale, also in a process without a batch
    items = 0.0 if failed else totals[1, 0].item()
    for p in weights:
        p.grad = torch.zeros_like(p) if p.grad is None or not items else p.grad * items
    own = [*(p.grad for p in weights), *buffers]
    flags = totals.new_tensor([failed, state.stop])
    parts = [tensor.flatten() for tensor in [*own, totals, flags]]
    message = utils.all_reduce(torch.cat([part.to(dtype) for part in parts]))
    *received, sums, flags = message.split([len(part) for part in parts])
    totals = sums.view_as(totals).to(totals.dtype)
    divisors = [totals[1, 0].item() or 1.0] * len(weights) + [utils.world()[1]] * len(buffers)
    for tensor, total, divisor in zip(own, received, divisors):
        tensor.copy_(total.view_as(tensor) / divisor)
    failed, state.stop = flags.bool().tolist()
    return totals, failed


# --------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def outputs_of(model, batches, prepare=None, dtype=torch.float32, weights=None, views=None):
    """Yields (outputs, targets) of `model` in eval mode for each batch; see `evaluate`."""
    training = model.training
    model.eval()
    try:
        for images, targets, _ in batches:
            inputs, outputs = prepare(images) if prepare else images, 0.0
            with autocast(images.device, dtype):
                for view, weight in views(inputs) if views else [(inputs, 1)]:
                    part = functional_call(model, weights or {}, (view,))
                    outputs = outputs + part.to(torch.promote_types(part.dtype, torch.float32)) * weight
            yield outputs, targets
    finally:
        model.train(training)


@torch.inference_mode()
def sum_totals(pairs, task):
    """The sum of `batch_totals` over pairs (outputs, targets), on the CPU."""
    totals = zero_totals(task, torch.device("cpu"))
    for outputs, targets in pairs:
        loss = task.loss(outputs, targets)
        totals += batch_totals(task, loss, task.items(targets), outputs, targets).cpu()
    return totals


def means(totals, task):
    """{"loss": ..., metric: ...} of totals; NaN where no item was counted.

    A metric with a denominator of its own, such as the solve rate of hard boards, is left out where
    that is 0.
    """
    numerators, denominators = totals.tolist()
    named = zip(("loss", *task.metrics), numerators, denominators)
    return {name: n / d if d else math.nan for name, n, d in named if d or not denominators[0]}


def evaluate(model, batches, task, prepare=None, dtype=torch.float32, weights=None, views=None):
    """{"loss": ..., metric: ...} of `model` in eval mode over batches (images, targets, index).

    `prepare(images)` makes the model's inputs. `weights`, a state dict such as the EMA, replace the
    model's own during the call. `views(inputs)` gives (view, weight) pairs whose outputs are
    averaged: test-time augmentation.
    """
    return means(sum_totals(outputs_of(model, batches, prepare, dtype, weights, views), task), task)


# ---------------------------------------------------------------------------------------- fit


@dataclass
class Run:
    """The parts of one run, put together by `prepare` and `open_run`."""

    args: argparse.Namespace
    task: Task
    device: torch.device
    dtype: torch.dtype
    source: data.Data
    meta: dict  # what makes a checkpoint usable alone
    fetch: dict  # split -> its function of `data.batches`
    steps_per_epoch: int
    flags: dict = field(default_factory=dict)  # as they were asked for and as they were settled
    folder: Path = RUNS
    log: Callable = print
    stop: list = field(default_factory=list)  # the signals received
    trackers: list = field(default_factory=list)


def fit(state, run):
    """Mutates `state`: trains it to the end of the run or until a signal; the exit status."""
    while not state.finished:
        if not train_epoch(state, run):
            return stopped(state, run, f"at step {state.step}")
        row = validate(state, run)
        if utils.any_process(run.stop):  # this validation is incomplete: resuming does it again
            return stopped(state, run, f"in the validation of epoch {state.epoch + 1}")
        close_epoch(state, run, row)
        if not state.finished and utils.any_process(run.stop):
            return stopped(state, run, f"after epoch {state.epoch}")
    report_best(state, run)
    return 0


def train_epoch(state, run):
    """Mutates `state`: takes the remaining steps of its epoch. False where a signal stops it."""
    args, task, (rank, ranks) = run.args, run.task, utils.world()
    pieces = data.chunks(training_order(run, state.epoch), args.batch_size)
    done, began = state.epoch_step * args.accumulation_steps * ranks, time.perf_counter()
    began -= state.seconds
    values, augment = monitored(state, run), partial(task.augment, epoch=state.epoch)
    zeros = zero_totals(task, run.device)
    state.totals = zeros if state.totals is None else state.totals.to(zeros)  # where resumed
    title = f"epoch {state.epoch + 1}/{args.epochs}"
    with utils.progress_bar(title, sum(map(len, pieces)), task.unit, args.quiet) as bar:
        bar.update(sum(map(len, pieces[:done])))
        windows = fetch_windows(run.fetch["train"], pieces[done:], args.accumulation_steps)
        for window, samples in windows:
            state.stop, micro_batch = bool(run.stop), state.micro_batch
            models.set_rates(state.optimizer, *rates(args, state.step, run.steps_per_epoch, values))
            seed = data.mix(args.seed, state.step, rank)
            totals, norm, good = train_step(state, window, task, augment, run.dtype,
                                            args.clip_grad_norm, args.ema_decay, seed, args.sam_rho)
            state.epoch_step += 1
            state.seconds = time.perf_counter() - began
            if state.micro_batch != micro_batch:
                run.log(f"step {state.step}: out of memory, done again; now {state.micro_batch} at once")
            if good:
                state.totals += totals
                weight = 0.05 if state.gradient_norm else 1.0
                state.gradient_norm += (norm - state.gradient_norm) * weight
            elif state.bad_in_a_row >= MAX_BAD_STEPS:
                raise FloatingPointError(f"step {state.step}: {MAX_BAD_STEPS} steps in a row were not "
                                         "finite; try a new run with a lower --lr or --amp False")
            if state.stop if ranks > 1 else run.stop:  # several processes agreed within the step
                return False
            if args.save_every and state.step % args.save_every == 0:
                save(state, run)
            for track in run.trackers if state.step % TRACK_EVERY == 0 else ():
                lr, loss = state.optimizer.param_groups[0]["lr"], means(totals, task)["loss"]
                track(state.step, {"step_loss": loss, "step_lr": lr, "step_gradient_norm": norm})
            bar.update(samples)  # after the save: the terminal may be gone
            utils.show(bar, progress_text, state, run)
    return True


def training_order(run, epoch):
    """int64 [N]: the order of the training samples in an epoch."""
    return data.epoch_order(len(run.source.splits["train"]), run.args.seed, epoch)


def fetch_windows(fetch, pieces, size):
    """Yields (this process's batches, samples over all processes) of each window.

    `pieces` are the batches of indices of all processes, of which each takes up to `size`.
    """
    rank, ranks = utils.world()
    groups = [pieces[i : i + size * ranks] for i in range(0, len(pieces), size * ranks)]
    batches = iter(fetch([piece for group in groups for piece in group[rank::ranks]]))
    for group in groups:
        yield list(itertools.islice(batches, len(group[rank::ranks]))), sum(map(len, group))


def progress_text(state, run):
    """The epoch's mean loss and main metric so far and the time that is left, for the bar."""
    found = means(state.totals, run.task)
    text = utils.metrics_line({name: found[name] for name in ("loss", run.task.metrics[0])})
    steps = run.args.epochs * run.steps_per_epoch - state.step
    left = utils.duration(steps * state.seconds / state.epoch_step)
    bad = f", {state.bad_steps} bad steps" if state.bad_steps else ""
    return f"{text}{bad}, run {left} left"


def validate(state, run):
    """Mutates `state.swa`. The epoch's row of metrics, of training and validation."""
    args, task, (rank, ranks), epoch = run.args, run.task, utils.world(), state.epoch + 1
    row = {"epoch": epoch, "step": state.step}
    row |= {f"train_{name}": value for name, value in means(state.totals, task).items()}
    scored = {"val": (state.model, None)}
    if state.ema is not None:
        scored["ema"] = state.model, state.ema
    if state.swa is not None and epoch >= args.swa_start_epoch:
        if state.swa.n_averaged < epoch + 1 - args.swa_start_epoch:  # once, where done again
            state.swa.update_parameters(state.model)
        recompute_statistics(state, run)
        scored["swa"] = state.swa.module, None
    if "val" not in run.fetch:
        return row
    pieces = data.chunks(torch.arange(len(run.source.splits["val"])), 2 * args.batch_size)
    for name, (model, weights) in scored.items():
        batches = itertools.takewhile(lambda batch: not run.stop, run.fetch["val"](pieces[rank::ranks]))
        if state.micro_batch:
            batches = (part for batch in batches for part in split([batch], 2 * state.micro_batch))
        outputs = outputs_of(model, batches, task.prepare, run.dtype, weights)
        totals = utils.all_reduce(sum_totals(outputs, task))
        row |= {f"{name}_{metric}": value for metric, value in means(totals, task).items()}
    return row


def recompute_statistics(state, run):
    """Mutates `state.swa`: BatchNorm's statistics become those of the mean weights."""
    set_seed(data.mix(run.args.seed, state.step, 1), run.device)  # of dropout before a BatchNorm
    batches = run.fetch["train"](data.chunks(training_order(run, state.epoch), run.args.batch_size))
    batches = itertools.takewhile(lambda batch: not utils.any_process(run.stop), batches)
    with autocast(run.device, run.dtype):
        update_bn((run.task.augment(*batch, state.epoch)[0] for batch in batches), state.swa.module)


def monitored(state, run, tie=0.0):
    """The monitored metric of each epoch that measured it, negated where lower is better.

    `tie` times the loss is subtracted, so that of equal epochs the one with the lower loss is best.
    """
    name = run.args.monitor
    sign, loss = 1 if utils.higher_is_better(name) else -1, name.split("_")[0] + "_loss"
    return [sign * row.get(name, math.nan) - (tie and tie * row[loss])
            for row in state.history if loss in row]


def epochs_since_best(values, min_delta=0.0):
    """Validations since one exceeded all before it by over min_delta; 0 if the last one does."""
    best, since = -math.inf, 0
    for value in values:  # a NaN exceeds nothing
        best, since = (value, 0) if value > best + min_delta else (best, since + 1)
    return since


def close_epoch(state, run, row):
    """Mutates `state`: completes the epoch, writes its files and logs its line."""
    args, task, seconds = run.args, run.task, state.seconds
    row |= {"lr": state.optimizer.param_groups[0]["lr"], "gradient_norm": state.gradient_norm,
            "seconds": seconds, "samples_per_second": len(run.source.splits["train"]) / seconds,
            "bad_steps": state.bad_steps}
    state.history.append(row)
    state.epoch, state.epoch_step, state.totals, state.seconds = state.epoch + 1, 0, None, 0.0
    kind, values = args.monitor.split("_")[0], monitored(state, run, tie=1e-9)
    since_best = epochs_since_best(values) if f"{kind}_loss" in row else -1
    if since_best == len(values):
        raise FloatingPointError(f"epoch {state.epoch}: {args.monitor} was never finite; try a new run "
                                 "with a lower --lr")
    waited = epochs_since_best(values, args.min_delta)
    impatient = 0 < args.early_stopping <= waited
    state.finished = impatient or state.epoch == args.epochs
    weights = {"ema": state.ema}
    if state.swa is not None and state.swa.n_averaged:
        weights["swa"] = state.swa.module.state_dict()
    if since_best == 0:
        weights["best"] = weights.get(kind) or state.model.state_dict()
    for name, tensors in weights.items():
        if tensors:
            save(state, run, f"{name}.pt", {"model": tensors, "epoch": state.epoch, "metrics": row})
    if utils.world()[0] == 0:
        utils.write_csv(run.folder / "metrics.csv", state.history)
    save(state, run)
    for track in run.trackers:
        track(state.step, {name: value for name, value in row.items() if name != "step"})
    run.log(utils.epoch_line(row, task.metrics[0], task.unit, args.epochs, since_best == 0))
    if impatient and state.epoch < args.epochs:
        run.log(f"early stopping: {args.monitor} has not improved for {args.early_stopping} epochs")


def save(state, run, name="last.pt", content=None):
    """Writes `content`, or else the whole state and the flags, with the metadata to a file."""
    content = content or {**state.to_checkpoint(), "flags": run.flags}
    if utils.world()[0] == 0:
        try:
            content = {**content, "step": state.step, "meta": run.meta}
            utils.save_checkpoint(run.folder / name, content)
        except ValueError as error:
            raise FloatingPointError(f"{error}; try a new run with a lower --lr") from None


def stopped(state, run, where):
    """Saves a run that a signal stopped; the exit status."""
    save(state, run)
    run.log(f"stopped {where}; go on with: python train.py --resume {run.folder.name}")
    return 128 + (run.stop or [signal.SIGTERM])[0]


def report_best(state, run):
    """Logs the best epoch, draws the curves and names the command that evaluates the weights."""
    monitor, folder = run.args.monitor, run.folder
    rows = [row for row in state.history if monitor.split("_")[0] + "_loss" in row]
    best = rows[-1 - epochs_since_best(monitored(state, run, tie=1e-9))]
    value = f"{best[monitor]:.2%}" if utils.higher_is_better(monitor) else f"{best[monitor]:.4f}"
    kind = {"ema": "EMA", "swa": "SWA"}.get(monitor.split("_")[0], "raw")
    run.log(f"best       {monitor} {value} in epoch {best['epoch']}: {folder / 'best.pt'} ({kind} weights)")
    curves = folder / "curves.png"
    if utils.world()[0] == 0:
        made = utils.save_history(curves, state.history, run.task.metrics[0])
        run.log(f"curves     {curves if made else 'need matplotlib: pip install matplotlib'}")
    if len(run.source.splits) > 1:
        files = [folder / f"{name}.pt" for name in ("best", "ema", "swa")]
        names = " ".join(str(file) for file in files if file.exists())
        run.log(f"evaluate   python train.py --evaluate {names}")
    inputs = "puzzles.csv" if run.args.model == "sudoku_gnn" else "PICTURES"
    if run.meta["in_channels"] in (1, 3):
        run.log(f"predict    python train.py --predict {folder} --input {inputs}")
    if run.args.tensorboard:
        run.log(f"watch      tensorboard --logdir {folder}")


# ---------------------------------------------------------------------------------- LR finder


def find_lr(state, next_window, step, min_lr=1e-6, max_lr=10.0, steps=100, smoothing=0.95,
            divergence=4.0):
    """A learning-rate range test (Smith 2017, arXiv:1506.01186): one rate a step, exponentially.

    `next_window()` gives a window and `step(state, window)` trains on it, as `train_step` does. The
    test stops where the smoothed loss exceeds `divergence` times its least value or is not finite.
    The state and the random generators are afterwards as before. Returns (rates, smoothed losses,
    the rate in the `valley`). ValueError if fewer than ten losses were finite.
    """
    tried, losses, average = [], [], 0.0
    with preserved(state):
        state.model.train()
        for _ in range(steps + MAX_BAD_STEPS):
            if len(tried) == steps:
                break
            rate = min_lr * (max_lr / min_lr) ** (len(tried) / (steps - 1))
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            totals, _, good = step(state, next_window())
            loss = (totals[0, 0] / totals[1, 0]).item()
            if not good and math.isfinite(loss) and state.scaler.is_enabled():
                continue  # fp16 overflowed and its scale was halved: the same rate again
            average = smoothing * average + (1 - smoothing) * loss
            smoothed = average / (1 - smoothing ** (len(tried) + 1))
            limit = divergence * min(losses, default=math.inf)
            if not (good and math.isfinite(smoothed) and smoothed <= limit):
                break
            tried.append(rate)
            losses.append(smoothed)
    if len(tried) < 10:
        raise ValueError(f"the range test diverged after {len(tried)} rates from {min_lr:g}; "
                         "check data and model")
    return tried, losses, valley(tried, losses)


@contextlib.contextmanager
def preserved(state):
    """Restores `state` and the random generators of CPU and CUDA at the end of the block."""
    saved = copy.deepcopy(state.to_checkpoint())
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            restore(state, [])
            state.load(saved)


def valley(rates, losses):
    """The rate two thirds along the longest decreasing subsequence of the losses; fastai's rule."""
    longest = []  # (length, start) of the decreasing subsequence that ends at each loss
    for i, loss in enumerate(losses):
        before = [(longest[j][0] + 1, j, longest[j][1]) for j in range(i) if loss < losses[j]]
        length, _, start = max(before, default=(1, i, i))  # the latest of equally long ones
        longest.append((length, start))
    end = max(range(len(losses)), key=lambda i: longest[i][0])
    return rates[longest[end][1] + round((end - longest[end][1]) * 2 / 3)]


def run_find_lr(state, run):
    """The range test on the run's own windows, logged, and its curve as CSV and as a picture; 0."""
    args = run.args

    def endless():
        for epoch in itertools.count():
            pieces = data.chunks(training_order(run, epoch), args.batch_size)
            for window, _ in fetch_windows(run.fetch["train"], pieces, args.accumulation_steps):
                yield window, partial(run.task.augment, epoch=epoch)

    def step(state, item):
        bar.update()
        return train_step(state, item[0], run.task, item[1], run.dtype, args.clip_grad_norm,
                          sam_rho=args.sam_rho)

    with utils.progress_bar("find_lr", 100, "step", args.quiet) as bar:
        tried, losses, best = find_lr(state, partial(next, endless()), step)
    run.log(f"find_lr    suggested: --lr {best:.2e}, a careful rate; the loss falls on above it")
    if utils.world()[0] == 0:
        path = Path(args.output or RUNS / f"{run.folder.name}-find_lr.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        utils.write_csv(path, [{"lr": lr, "loss": loss} for lr, loss in zip(tried, losses)])
        drawn = utils.save_curve(path.with_suffix(".png"), tried, losses, {"suggested": best})
        run.log(f"curve      {path}, as a picture {'beside it' if drawn else 'with matplotlib'}")
    return 0


# ------------------------------------------------------------------------------ kinds of data


def make_task(args, meta, device, memory_format):
    """The `Task` of the model that the metadata names: puzzles or images."""
    if meta["model"] == "sudoku_gnn":
        return Task(
            loss=partial(models.sudoku_loss, focal_gamma=args.focal_gamma),
            items=lambda labels: (labels[:, :81] > 0).sum(),
            measure=utils.sudoku_metrics, metrics=utils.SUDOKU_METRICS, unit="boards",
            augment=unchanged,  # the network is equivariant to every symmetry
        )
    weights = None
    if args.class_weights == "balanced":
        weights = models.balanced_weights(meta["class_counts"]).to(device)
    return Task(
        loss=partial(models.image_loss, label_smoothing=args.label_smoothing,
                     focal_gamma=args.focal_gamma, weights=weights),
        measure=utils.image_metrics, metrics=("accuracy",), unit="images", views=data.image_views,
        augment=partial(augment_images, args, meta, memory_format),
        prepare=partial(prepare_images, meta, memory_format),
    )


def augment_images(args, meta, memory_format, images, labels, index, epoch):
    """(inputs, labels or shares of classes) of uint8 images [B, H, W, C], drawn for the epoch."""
    draws = index, args.seed, epoch
    x = data.augment(images, *draws, meta["image_size"], meta["mean"], meta["std"],
                     args.crop_padding, args.flip, args.min_crop_area, args.cutout,
                     args.color_jitter)
    if args.mixup or args.cutmix:
        classes = meta["num_classes"]
        x, labels = data.mix_samples(x, labels, *draws, classes, args.mixup, args.cutmix)
    return x.contiguous(memory_format=memory_format), labels


def prepare_images(meta, memory_format, images):
    """The inputs of evaluation: the normalised centre of uint8 images [B, H, W, C]."""
    x = data.centre(images, meta["image_size"], meta["mean"], meta["std"])
    return x.contiguous(memory_format=memory_format)


def absolute(path):
    return str(Path(os.path.expanduser(path)).resolve())


def load_source(args):
    """The `data.Data` that the flags name."""
    common = args.val_fraction, args.max_samples, args.seed, args.cache_dir
    if args.model == "sudoku_gnn":
        return data.load_sudoku(args.data, *common)
    return data.load(args.data, args.image_size, *common)


# ---------------------------------------------------------------------------- preparing a run


def prepare(args, saved=None):
    """(state, run, lines for the log). ValueError or OSError for flags or data that do not fit.

    Mutates `args`: settles what was left open. `saved` is the checkpoint of a run that goes on.
    """
    device, dtype, memory_format, notes = utils.set_up_device(
        args.device, args.amp, args.channels_last, args.deterministic, args.memory_gb)
    with utils.first_process_first(os.environ.get("LOCAL_RANK", "0") == "0"):  # fills the cache
        source = load_source(args)
    hints = fit_steps(args, len(source.splits["train"])) if args.min_steps and not saved else []
    settle(args, source)
    weights, origin = starting_weights(args, saved)
    meta = describe_model(args, source, origin)
    utils.check_agreement({"data": meta["fingerprint"], "classes": meta["classes"]})
    task = make_task(args, meta, device, memory_format)
    state = build_state(args, source, meta, task, weights, origin, device, dtype, memory_format)
    model, samples, ranks = state.model, len(source.splits["train"]), utils.world()[1]
    resident_bytes = free_memory(args, device) // 4
    fetch = {name: data.batches(split, device, resident_bytes, args.workers, args.timeout)
             for name, split in source.splits.items() if name != "test"}

    def inputs(count):
        [batch] = fetch["train"]([torch.arange(count) % samples])
        return task.augment(*batch, 0)[0]

    copies = bool(state.ema) + bool(state.swa) + 2 * bool(args.sam_rho)
    with autocast(device, dtype):
        memory = models.estimate_memory(model, inputs(4), models.MOMENTS[args.optimizer], copies)
    settle_batch(args, samples, memory, free_memory(args, device))
    size, steps = args.batch_size, args.accumulation_steps
    run = Run(args, task, device, dtype, source, meta, fetch, count_steps(args, samples))
    if args.compile != "off":
        with autocast(device, dtype):
            state.forward, note = models.compile_model(model, inputs(size), args.compile)
        notes.append(note)
    parameters = sum(p.numel() for p in model.parameters())
    total = sum(memory.values()) + memory["sample"] * (size - 1)
    cards = ", ".join(f"{models.largest_batch(memory, (0.9 * gb - 0.5) * 2**30):,}" for gb in (4, 6, 8))
    splits = ", ".join(f"{name} {len(split):,}" for name, split in source.splits.items())
    counts, size_px = meta["class_counts"], f", {source.image_size} px" if meta["class_counts"] else ""
    hints += [] if saved else find_hints(args, source, meta)
    return state, run, [
        f"device     {device}, {torch.get_num_threads()} threads | {', '.join(notes)}",
        f"model      {args.model}, {parameters:,} parameters"
        + (f", weights from {args.pretrained}" if args.pretrained else ""),
        f"memory     about {total / 2**20:,.0f} MiB, {memory['sample'] / 2**20:.2f} a sample | "
        f"largest batch for 4, 6, 8 GB: {cards}",
        f"data       {source.description}{size_px} | {splits}",
        f"classes    {utils.class_counts(counts, source.classes) if counts else 'the nine digits'}",
        f"batch      {size} x {steps} accumulation x {ranks} processes = {size * steps * ranks} | "
        f"{run.steps_per_epoch:,} steps an epoch, {args.epochs} epochs",
        *(f"hint       {text}" for text in hints),
    ]


def settle(args, source):
    """Mutates `args`: fills what was left open and depends on the data. ValueError for misfits."""
    train, has_val = source.splits["train"], "val" in source.splits
    puzzles, batch, args.image_size = args.model == "sudoku_gnn", args.batch_size, source.image_size
    args.flip = train.images.shape[-1] >= 3 if args.flip is None else args.flip
    args.optimizer = args.optimizer or ("muon" if puzzles else "adamw")
    args.lr = args.lr or models.LEARNING_RATES[args.optimizer]
    args.effective_batch = args.effective_batch or (128 if batch == "auto" else None)
    blind = args.early_stopping and not has_val and not args.monitor
    kinds = ["train", *["val"] * has_val, *["ema"] * bool(has_val and args.ema_decay)]
    metrics = utils.SUDOKU_METRICS if puzzles else ("accuracy",)
    args.monitor = args.monitor or f"{kinds[-1]}_{metrics[0]}"
    kinds += ["swa"] * bool(has_val and args.swa_start_epoch)
    names = [f"{kind}_{name}" for kind in kinds for name in ("loss", *metrics)]
    smallest = models.smallest_image(args.model, **args.model_args)
    utils.raise_first((
        (args.image_size < smallest,
         f"--image_size {args.image_size}: {args.model} needs {smallest} px or more"),
        (batch == 1 and args.model == "efficientnet_b0" and args.image_size <= 32,
         "--batch_size 1: BatchNorm needs two values a channel at 32 px; give 2 or more"),
        (not puzzles and max(args.crop_padding, args.cutout) >= args.image_size,
         f"--crop_padding {args.crop_padding}, --cutout {args.cutout}: must be below the image size, "
         f"{args.image_size}"),
        (args.color_jitter and train.images.shape[-1] != 3,
         "--color_jitter: needs images with three channels; leave it out"),
        (batch != "auto" and batch > len(train),
         f"--batch_size {batch}: there are {len(train)} training samples; give less"),
        ((args.effective_batch or 0) > max(128, len(train)),
         f"--effective_batch {args.effective_batch}: there are {len(train)} samples; give less"),
        (blind, "--early_stopping: needs validation data; give --val_fraction above 0"),
        (args.monitor not in names, f"--monitor {utils.shorten(args.monitor)}: is not measured; "
         f"give one of {', '.join(name for name in names if not name.endswith(data.LEVELS))}"),
    ))


def find_hints(args, source, meta):
    """Texts that say what is likely to go wrong with few, or unevenly many, images of one's own."""
    counts, val = meta["class_counts"] or [1], source.splits.get("val", ())
    if 0 < len(val) < 100:
        yield f"{len(val)} validation samples: one of them changes a metric by {1 / len(val):.1%}"
    if max(counts) > 3 * min(counts) and args.class_weights == "off":
        yield "the largest class has over three times the images of the smallest: try --class_weights balanced"
    fits = args.model == "efficientnet_b0" and meta["in_channels"] in (1, 3)
    if args.data and fits and not args.pretrained and sum(counts) < 5000:
        yield "few images for efficientnet_b0 from scratch: try --config finetune; offline --model custom"


def count_steps(args, samples):
    """The steps of an epoch of so many samples."""
    batches = len(data.chunks(torch.zeros(samples), args.batch_size))
    return -(-batches // (args.accumulation_steps * utils.world()[1]))


def fit_steps(args, samples):
    """Mutates `args` until a run has `min_steps`: 20 an epoch or more, by smaller batches, then by
    more epochs. Below 16 images a step, fine-tuning gets worse. Notes for the log on what changed."""
    ranks = utils.world()[1]
    most = max(-(-16 // ranks), samples // 20 // ranks, 2)
    before = args.batch_size, args.accumulation_steps, args.epochs
    args.batch_size = min(args.batch_size, most)
    args.accumulation_steps = min(args.accumulation_steps, most // args.batch_size)
    args.epochs = max(args.epochs, -(-args.min_steps // count_steps(args, samples)))
    now = args.batch_size, args.accumulation_steps, args.epochs
    text = "to take {} steps: {} x {} images a step for {} epochs, not {} x {} for {}"
    return [text.format(args.min_steps, *now, *before)] if now != before else []


def starting_weights(args, saved):
    """(state dict or None, metadata of the images that the weights were trained on)."""
    if saved is not None or args.pretrained is None:
        return None, saved["meta"] if saved else {}
    if args.pretrained == "official":
        if args.model != "efficientnet_b0":
            raise ValueError("--pretrained: only efficientnet_b0 has official weights; give a file, "
                             "or leave out --pretrained (or --config finetune)")
        return models.official_weights(), IMAGENET
    found = utils.load_checkpoint(utils.checkpoint_of(RUNS, args.pretrained), legacy=True)
    meta = found.get("meta")
    own = isinstance(meta, dict) and {"mean", "std"} <= meta.keys()
    return found.get("model", found) or {}, meta if own else IMAGENET


def describe_model(args, source, origin):
    """The metadata that makes a checkpoint usable alone."""
    train, arguments = source.splits["train"], dict(args.model_args)
    if args.model == "custom":
        arguments.setdefault("stem_stride", models.stem_stride_for(source.image_size))
    fits = origin and len(origin["mean"]) == len(source.mean)  # weights keep their own statistics
    mean, std = (origin["mean"], origin["std"]) if fits else (source.mean, source.std)
    puzzles, classes = args.model == "sudoku_gnn", len(source.classes)
    counts = [] if puzzles else np.bincount(train.labels, minlength=classes).tolist()
    return {
        "model": args.model, "num_classes": classes, "arguments": arguments,
        "in_channels": source.channels, "classes": source.classes,
        "image_size": source.image_size, "stored_size": train.images.shape[1],
        "mean": list(mean), "std": list(std),
        "class_counts": counts,
        "fingerprint": source.fingerprint(),
        "source": {"data": args.data and absolute(args.data), "val_fraction": args.val_fraction,
                   "max_samples": args.max_samples, "seed": args.seed},
    }


def build_state(args, source, meta, task, weights, origin, device, dtype, memory_format):
    """The `TrainState` at the start of a run: the same in all processes, drawn by the seed."""
    ranks, classes, channels = utils.world()[1], meta["num_classes"], meta["in_channels"]
    torch.manual_seed(args.seed)
    model = models.build_model(args.model, classes, channels, **meta["arguments"])
    if args.checkpoint_activations:
        model.run_stage = models.recomputed
    if meta["arguments"].get("whiten"):
        train = source.splits["train"]
        rows = data.stratified(train.labels, 5000, args.seed)
        parts = np.array_split(rows, max(1, len(rows) // 64))
        images = (torch.from_numpy(np.array(train.images[part])) for part in parts)
        models.whiten_stem(model, map(task.prepare, images))
    if weights is not None:
        try:
            new_head = origin.get("classes", meta["classes"]) != meta["classes"]
            models.load_backbone(model, weights, new_head)
        except ValueError as error:
            raise ValueError(f"--pretrained {args.pretrained}: {error}") from None
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # a process sees one batch in so many
            module.momentum = 1 - (1 - module.momentum) ** ranks
    model.to(device, memory_format=memory_format)
    for tensor in model.state_dict().values() if ranks > 1 else ():
        dist.broadcast(tensor, 0)  # machines may differ in the last bit
    optimizer = models.build_optimizer(
        model, args.optimizer, args.lr, args.weight_decay, args.momentum, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ema, swa = start_ema(model) if args.ema_decay else None, None
    if args.swa_start_epoch:
        swa = AveragedModel(model)
    share = share_among_processes if ranks > 1 else None
    return TrainState(model, optimizer, scaler, ema, swa, share=share)


def free_memory(args, device):
    """Bytes that training may take, alike in all processes."""
    free = min(utils.free_bytes(device), utils.memory_cap(device, args.memory_gb))
    return utils.all_reduce(torch.tensor(float(free)), "MIN").item()


def settle_batch(args, samples, memory, free):
    """Mutates `args`: batch_size where it is auto, and accumulation_steps by effective_batch."""
    effective, ranks = args.effective_batch, utils.world()[1]
    if not effective:
        return
    if args.batch_size == "auto":
        most = min(effective // ranks, samples, models.largest_batch(memory, 0.8 * free))
        fits = [size for size in range(most, 1, -1) if effective % (size * ranks) == 0]
        if not fits:
            raise ValueError(f"--batch_size auto, --effective_batch {effective}: no batch divides it "
                             "and fits in memory; give another --effective_batch")
        args.batch_size = fits[0]
    if effective % (args.batch_size * ranks):
        raise ValueError(f"--effective_batch {effective}: must be a multiple of --batch_size "
                         f"{args.batch_size} times {ranks} processes; or give --batch_size auto")
    args.accumulation_steps = effective // args.batch_size // ranks


# --------------------------------------------------------------------- new and resumed runs


def find_saved(args, held):
    """(the run's folder, the checkpoint to go on from or None); `held` keeps the folder locked."""
    rank = utils.world()[0]
    if args.resume is not None and (args.resume or not args.run_name):
        folder = utils.find_run(RUNS, args.resume)
    else:
        folder = RUNS / (args.run_name or utils.dated_name(args.model))
        if args.resume is None or not utils.any_process(utils.has_checkpoints(folder)):
            return folder, None
    with utils.first_process_first(rank == 0):  # it sets aside what is damaged
        if rank == 0 and folder.is_dir():
            held.enter_context(utils.lock(folder))
        saved = utils.load_newest(folder, [*SAVED, "meta", "flags"], set_aside=rank == 0)
    utils.check_agreement({"checkpoints; they need one folder runs": saved and saved["step"]})
    return folder, saved


def open_run(args, given, held):
    """(state, run) of a new run or of one that goes on; `held` keeps its folder locked."""
    rank, ranks = utils.world()
    own = {key: value for key, value in vars(args).items() if key not in FREE_ON_RESUME}
    utils.check_agreement({"flags": (own, args.run_name), "versions of torch": torch.__version__})
    folder, saved = find_saved(args, held)
    resumes = saved is not None
    if resumes:
        args = merge_flags(folder, saved, args, given)
        if saved["finished"]:  # a job queue starts it once more
            utils.logger()(f"run        {folder} | finished already")
            sys.exit(0)
    elif not args.find_lr:
        utils.check_unused(folder)
    state, run, lines = prepare(args, saved)
    run.folder, run.log = folder, utils.logger()
    run.flags = {"asked": {k: v for k, v in given.items() if k not in MODES}, "processes": ranks}
    if resumes:
        for key in ("classes", "image_size", "in_channels", "fingerprint"):
            if saved["meta"][key] != run.meta[key]:
                raise ValueError(f"--resume: the data changed ({key}): files were added, removed or "
                                 "edited; start a new run")
        state.load(saved)
        run.flags["asked"] = saved["flags"]["asked"]
    asked = ", ".join(f"{key} {value}" for key, value in run.flags["asked"].items())
    lines += [f"flags      {asked or 'the defaults'} | {args.scheduler}, seed {args.seed}",
              f"run        {folder}" + (f" | resumed at step {state.step}" if resumes else "")]
    for line in lines[: -1 if args.find_lr else None]:
        run.log(line)
    if args.find_lr:
        return state, run
    run.flags["settled"] = {k: v for k, v in vars(args).items() if k not in MODES}
    if rank == 0 and not resumes:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(utils.lock(folder))
        utils.check_unused(folder)  # of two runs that start at once, one stops here
        save(state, run)
        about = {**run.flags, "environment": utils.environment()}
        utils.write_json(folder / "config.json", about)
        if args.data and args.model != "sudoku_gnn":
            save_samples(run)
    run.log = utils.logger(folder / "log.txt", lines)
    if rank == 0:
        run.trackers = utils.trackers(folder, state.step, vars(args), args.tensorboard,
                                      args.wandb)
    return state, run


def save_samples(run):
    """Writes samples.png, training images as the network sees them, if matplotlib is installed."""
    images, labels, index = next(iter(run.fetch["train"]([training_order(run, 0)[:24]])))
    inputs, _ = run.task.augment(images, labels, index, 0)
    mean, std = (torch.tensor(run.meta[key])[:, None, None] for key in ("mean", "std"))
    pixels = (inputs.cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    titles = [utils.short(run.meta["classes"][k]) for k in labels.tolist()]
    heading = "training images as the network sees them in the first epoch"
    utils.save_contact_sheet(run.folder / "samples.png", pixels.numpy(), titles, heading)


def merge_flags(folder, saved, args, given):
    """The saved run's flags with today's free ones; ValueError for another one that differs."""
    asked, settled, processes = (saved["flags"][name] for name in ("asked", "settled", "processes"))
    where, ranks = f"--resume {folder.name}", utils.world()[1]
    if strange := settled.keys() ^ (vars(args).keys() - MODES):
        raise ValueError(f"{where}: another version of the kit wrote it ({min(strange)}); use that")
    if saved["finished"] and args.resume:
        best = folder / "best.pt"
        raise ValueError(f"{where}: finished already; to train on, start a run with --pretrained {best}")
    for key, value in given.items():
        if key in FREE_ON_RESUME:
            settled[key] = value
        elif key not in MODES and value not in (settled[key], asked.get(key, settled[key])):
            raise ValueError(f"--{key} {value}: the run has {settled[key]}; leave the flag out, or "
                             "start a new run")
    batches = settled["accumulation_steps"] * processes
    if batches % ranks:
        raise ValueError(f"{where}: a step has {batches} batches, which {ranks} processes cannot "
                         "share alike; start a number of processes that divides them")
    settled["accumulation_steps"] = batches // ranks
    settled["device"] = args.device if ranks > 1 else settled["device"]  # each process has its own
    return argparse.Namespace(**{**vars(args), **settled})


# ------------------------------------------------------------------------------- other modes


def load_model(path, args):
    """(model on its device, metadata, `Task`, function of batches to (outputs, targets) pairs).

    ValueError for a bad checkpoint.
    """
    path = utils.checkpoint_of(RUNS, path)
    found = utils.load_checkpoint(path)
    meta = found.get("meta")
    needed = {"model", "arguments", "classes", "image_size", "mean", "std"}
    if not isinstance(meta, dict) or not needed <= meta.keys() or meta["model"] not in [*models.MODELS]:
        raise ValueError(f"{path}: has no metadata; give a checkpoint that a run of this kit wrote")
    meta = {"stored_size": meta["image_size"], "source": {}, **meta}
    changes = utils.keyword_arguments(args.model_args, models.MODELS[meta["model"]], "--model_args")
    try:
        meta["arguments"] = {**meta["arguments"], **changes}
        classes, channels = meta["num_classes"], meta["in_channels"]
        model = models.build_model(meta["model"], classes, channels, **meta["arguments"])
        models.check_state_dict(model.state_dict(), found["model"])
        model.load_state_dict(found["model"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        reason = utils.one_line(error)
        raise ValueError(f"{path}: its metadata and weights misfit ({reason}); give another") from None
    device, dtype, memory_format, _ = utils.set_up_device(args.device, args.amp, args.channels_last)
    model.to(device, memory_format=memory_format).eval()
    task = make_task(args, meta, device, memory_format)
    if args.tta and task.views is None:
        raise ValueError("--tta: is for pictures; the Sudoku network is equivariant and gains nothing")
    views = task.views if args.tta else None
    return model, meta, task, partial(
        outputs_of, model, prepare=task.prepare, dtype=dtype, views=views)


def run_evaluate(args):
    """Scores each checkpoint of --evaluate, prints them, writes --output and pictures; 0."""
    results, best, pictures = [], None, None
    paths = [utils.checkpoint_of(RUNS, name) for name in args.evaluate]
    for path in paths:  # a bad one among several is named before any is scored
        utils.load_checkpoint(path)
    for path in paths:
        result, task, drawn = score(path, args)
        head = f"{path} on {result['samples']:,} {task.unit} ({result['split']})"
        print(f"{head}{', --tta' * args.tta}: {utils.metrics_line(result)}")
        if len(paths) == 1:
            print("\n".join(f"  {line}" for line in utils.report_lines(result)))
        if best is None or result[task.metrics[0]] > best[task.metrics[0]]:
            best, pictures = result, drawn  # only one checkpoint's images are kept
        results.append(result)
    if any(result["chose_checkpoint"] for result in results):
        print("note: these samples chose the checkpoint; give --data PATH with others for a fair test")
    if len(results) > 1:
        print("\n".join(["", *utils.side_by_side(results)]))
    if args.output:
        utils.write_results(args.output, results)
        files = [args.output, *utils.draw_report(Path(args.output), best, pictures)]
        print(f"written    {', '.join(map(str, files))}")
    return 0


def split_to_score(path, args, meta):
    """(name of the split, its `data.Split`, `data.Data`): test, else val, else all of other data."""
    # with another seed or fraction, samples that it was trained on would be scored
    flags = {**vars(args), **meta["source"], "image_size": meta["image_size"], "model": meta["model"]}
    stored = meta["source"].get("data")
    own = not args.data or absolute(args.data) == stored
    flags["data"], names = args.data or stored, ["test", "val"]
    try:
        source = load_source(argparse.Namespace(**flags))
        changed = source.fingerprint() != meta.get("fingerprint", source.fingerprint())
    except ValueError:
        if own:
            raise
        changed = True  # other data, perhaps too small to be split
    if changed and not own:  # it is scored whole where it has no splits
        flags |= {"val_fraction": 0.0, "max_samples": 0}
        names.append("train")
        source = load_source(argparse.Namespace(**flags))
    name = next((name for name in names if name in source.splits), None)
    if name is None:
        raise ValueError(f"{path}: its data has no test or val split; give --data PATH with one")
    if name == "val" and changed and own:
        raise ValueError(f"{flags['data']}: changed since training, so its val split may hold training "
                         "samples; give --data PATH with others")
    split, known = source.splits[name], meta["classes"]
    strange = [name for name in source.classes if name not in known]
    if strange or source.channels != meta["in_channels"]:
        raise ValueError(
            f"--data: classes {utils.shorten(strange or known)} in {source.channels} channels do not "
            f"fit {path}, with {utils.shorten(known)} in {meta['in_channels']}")
    if source.classes != known:  # other data may lack a class
        index = np.array([known.index(name) for name in source.classes], np.int64)
        split = replace(split, labels=index[split.labels])
    return "all" if name == "train" else name, split, source


def score(path, args):
    """(result, its `Task`, what pictures need or None) of a checkpoint on its test or val split."""
    model, meta, task, apply = load_model(path, args)
    name, split, source = split_to_score(path, args, meta)
    device, size, pairs, drawn = next(model.parameters()).device, 2 * args.batch_size, [], None
    fetch = data.batches(split, device, utils.free_bytes(device) // 4, args.workers)
    pieces = data.chunks(torch.arange(len(split)), size)
    list(apply(fetch(pieces[:1])))  # the first pass at a size takes longer
    began = time.perf_counter()
    with utils.progress_bar(Path(path).name, len(split), task.unit, args.quiet) as bar:
        for outputs, targets in apply(fetch(pieces)):
            pairs.append((outputs.cpu(), targets.cpu()))
            bar.update(len(targets))
    rate = len(split) / (time.perf_counter() - began)
    result = means(sum_totals(pairs, task), task)
    if meta["model"] != "sudoku_gnn":
        logits, labels = (torch.cat(column) for column in zip(*pairs))
        p, labels = logits.float().softmax(1).numpy(), labels.numpy()
        result |= utils.classification_report(p, labels, meta["classes"])
        drawn = p, labels, split, meta
    return {
        "checkpoint": str(path), "data": source.description, "split": name, "samples": len(split),
        "chose_checkpoint": name == "val" and source.fingerprint() == meta.get("fingerprint"),
        "tta": args.tta, **result, "samples_per_second": rate, "batch_size": size,
    }, task, drawn


def run_predict(args):
    """Applies the checkpoint of --predict to --input; the exit status."""
    model, meta, _, apply = load_model(args.predict, args)
    puzzles = meta["model"] == "sudoku_gnn"
    allowed = [".csv", ".sdm", ".sdk"] if puzzles else [".csv", ".json"]
    if args.output and Path(args.output).suffix not in allowed:
        raise ValueError(f"--output {args.output}: {meta['model']} writes {allowed}")
    if args.search and not puzzles:
        raise ValueError("--search: is for puzzles; leave it out")
    predict = predict_puzzles if puzzles else predict_images
    return predict(apply, meta, next(model.parameters()).device, args)


def predict_images(apply, meta, device, args):
    """Classes of the pictures of --input, printed and written; 1 if some could not be read."""
    paths, size, channels = data.find_pictures(*args.input), meta["stored_size"], meta["in_channels"]
    if channels not in (1, 3):
        raise ValueError(f"--predict {args.predict}: takes {channels} channels, pictures have 3; "
                         "use --evaluate")
    for place in filter(os.path.isdir, map(os.path.expanduser, args.input)):
        if passed := data.passed_over(Path(place)):
            print(f"note: {place}: passed over {passed}; convert pictures to JPEG or PNG")
    rows, broken = [], []
    with utils.progress_bar("predict", len(paths), "images", args.quiet) as bar:
        for part, images, errors in data.decode_pictures(paths, size, channels, 2 * args.batch_size):
            batches = [(torch.from_numpy(images).to(device), None, None)] if part else []
            for logits, _ in apply(batches):
                rows += utils.prediction_rows(part, logits.float().softmax(1).cpu(), meta["classes"])
            broken += [{"file": str(path), "error": str(error)} for path, error in errors]
            bar.update(len(part) + len(errors))
    print("\n".join(map(utils.prediction_line, rows[:MAX_SHOWN])))
    for row in broken:
        print(f"error: {row['error']}", file=sys.stderr)
    if args.output:
        utils.write_results(args.output, rows + broken)
    where = f"all in {args.output}" if args.output else f"up to {MAX_SHOWN} are shown"
    print(f"{len(rows):,} of {len(paths):,} pictures; {where}")
    return int(bool(broken))


def predict_puzzles(apply, meta, device, args):
    """Boards and verdicts for the puzzles of --input, printed and written to --output; 0."""
    path, suffix = Path(args.input[0]), Path(args.output or "").suffix
    if len(args.input) > 1 or not path.is_file() or path.suffix.lower() in data.IMAGE_SUFFIXES:
        raise ValueError(f"--input {' '.join(args.input)}: is no file of puzzles; for pictures name a "
                         "checkpoint: --predict CKPT")
    puzzles, _ = data.read_sudoku(path, with_solutions=False)
    if args.output:
        data.sudoku_text(suffix, puzzles[:2])  # refuses early what an .sdk cannot hold
    answers, counts = np.zeros_like(puzzles), np.zeros(3, int)
    with utils.progress_bar("predict", len(puzzles), "boards", args.quiet) as bar:
        for start in range(0, len(puzzles), 64):
            part = puzzles[start : start + 64]
            [(logits, _)] = apply([(torch.from_numpy(part).to(device), None, None)])
            p, guesses = logits[-1].float().softmax(-1).cpu().numpy(), MAX_GUESSES * args.search
            answers[start : start + 64], texts, found = data.finish_boards(part, p, guesses)
            counts += found
            bar.update(len(part))
            for i, text in enumerate(texts[: max(0, MAX_SHOWN - start)]):
                bar.write(f"puzzle {start + i + 1}: {text}\n")
    if args.output:
        utils.write_atomic(args.output, data.sudoku_text(suffix, puzzles, answers).encode())
    solved, alone, guesses = counts
    print(f"{solved:,} of {len(puzzles):,} solved, {alone:,} by the network alone in "
          f"{meta['arguments']['message_steps']} steps, {guesses:,} guesses"
          + (f", in {args.output}" if args.output else ""))
    return 0


def run_export(args):
    """Writes the checkpoint of --export as a program from raw bytes to probabilities; 0."""
    output = Path(args.output)
    if output.suffix == ".onnx" and (absent := utils.missing("onnx", "onnxscript")):
        raise ValueError(f"--output {output}: needs the packages {absent}: pip install {absent}")
    args.device, args.channels_last = "cpu", False
    model, meta, *_ = load_model(args.export, args)
    size, channels, puzzles = meta["image_size"], meta["in_channels"], meta["model"] == "sudoku_gnn"
    if puzzles:
        print("exporting the unrolled steps, about a minute for 64", flush=True)
    shape, top = ((81,), 10) if puzzles else ((size, size, channels), 256)
    batches = [torch.from_numpy(np.random.default_rng(n).integers(0, top, (n, *shape), np.uint8))
               for n in (2, 1, 3)]  # of several sizes, as the batch is dynamic
    names = "model classes image_size stored_size mean std".split()
    deployed = models.Deployed(model, meta["mean"], meta["std"]).eval()
    facts = {name: meta[name] for name in names}
    content = utils.exported(deployed, batches, output.suffix, facts)
    utils.write_atomic(output, content)
    print(f"{output}: {len(content) / 2**20:.1f} MiB, uint8 {['batch', *shape]} to probabilities")
    return 0


def run_copy(args):
    """Writes the functions of --copy, with all they need, to --output; 0."""
    text = utils.copy_definitions(args.copy, Path(__file__).parent)
    utils.write_atomic(args.output, text.encode())
    print(f"{args.output}: {', '.join(args.copy)}, {len(text.splitlines())} lines")
    return 0


# --------------------------------------------------------------------------------------- main


def main(argv=None):
    """Does what the flags (a list of words; None: the command line) ask for; the exit status."""
    args, given = parse_flags(sys.argv[1:] if argv is None else argv)
    calls = {"evaluate": run_evaluate, "predict": run_predict, "export": run_export, "copy": run_copy}
    run, rank = None, os.environ.get("RANK", "0")
    try:
        with utils.catch_signals(gently=False), contextlib.ExitStack() as held:
            check_flags(args, given)
            for mode, call in calls.items():
                if getattr(args, mode):
                    return call(args)
            held.enter_context(utils.processes(args.device, args.timeout))
            state, begun = open_run(args, given, held)
            if args.find_lr:
                return run_find_lr(state, begun)
            run = begun
            with utils.catch_signals() as run.stop:
                return fit(state, run)
    except KeyboardInterrupt as stopped:  # outside of `fit`, which saves
        if rank == "0":
            print("stopped before training", file=sys.stderr)
        return 128 + (*stopped.args, signal.SIGINT)[0]
    except BrokenPipeError:  # the reader of the output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, EOFError, RuntimeError, MemoryError, FloatingPointError) as error:
        return explain(error, run, args)


def explain(error, run, args):
    """Says in one line what ended the program; the exit status. Unexpected errors propagate."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader worker's death would raise here too
    line, rank = utils.one_line(utils.message_of(error)), os.environ.get("RANK", "0")
    if run is None and isinstance(error, ValueError | OSError):
        utils.fail(utils.message_of(error))
    if "DataLoader" in str(error) or isinstance(error, ConnectionError | EOFError):
        for worker in multiprocessing.active_children():  # one that hangs would block the exit
            worker.kill()
        line = f"a DataLoader worker ended ({line}); try --workers 0, or a longer --timeout"
    elif utils.lost_process(error):
        silent = f"was silent for {args.timeout:g} s"
        line = f"another process {silent if 'imed out' in str(error) else 'ended'}"
    elif out_of_memory(error):
        line += "; give a smaller --batch_size, --batch_size auto or --checkpoint_activations"
    elif not isinstance(error, OSError | FloatingPointError):
        raise error
    if run is None or rank != "0":
        print(f"error: {f'process {rank}: ' * (rank != '0')}{line}", file=sys.stderr)
    else:
        run.log(f"error: {line}; go on from the last good checkpoint with: python train.py "
                f"--resume {run.folder.name}")
    return 1


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for names outside a terminal's code page
    sys.exit(main())
