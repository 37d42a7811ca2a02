"""Evidence of a run: checkpoints, run folders, logs, curves, probes of the device.

Any piece here works alone: this file imports torch, numpy, tqdm and the standard library only
(tensorboard, wandb and matplotlib where a function needs them).
"""

import csv
import ctypes
import importlib.util
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

FORMAT_VERSION = 1


# ------------------------------------------------------------------------------------- checkpoints


def write_atomic(path, content, previous=None):
    """Replace the file at `path` by `content` (bytes), so that either the old or the new one is whole.

    The old one becomes `previous` where a name is given, once the new one is on the disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, path.with_name(previous))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # Windows opens no folder; its rename is journalled
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path, checkpoint):
    """Write `checkpoint` (nested dicts and lists of tensors and primitives) to `path`, atomically.

    A file that stands there becomes `previous.pt` where its name is `last.pt`. Raises ValueError,
    with nothing written, where a tensor under "model", "ema" or "swa" holds a NaN or an infinity.
    """
    path = Path(path)
    for part in ("model", "ema", "swa"):
        for name, tensor in (checkpoint.get(part) or {}).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{path}: {part} {name} is not finite; nothing was written")
    buffer = io.BytesIO()
    torch.save({**checkpoint, "format_version": FORMAT_VERSION}, buffer)
    write_atomic(path, buffer.getvalue(), "previous.pt" if path.name == "last.pt" else None)


def load_checkpoint(path, legacy=False):
    """The checkpoint at `path`, on the CPU; ValueError in one line where it is none, damaged or too new.

    The archive's checksums are verified first: torch.load does not look at them, and of 400 flipped
    bits it read 369 without a word. `legacy` admits what torch before 1.6 wrote, which has no archive.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; give a .pt file of a run")
    try:
        if not (legacy and not zipfile.is_zipfile(path)):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{path}: damaged at {damaged}; use another checkpoint of the run")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({one_line(error)}); use another one") from None
    except torch.serialization.pickle.UnpicklingError:
        raise ValueError(f"{path}: holds more than tensors and primitives, so it was not loaded") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, no checkpoint")
    if checkpoint.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(f"{path}: format {checkpoint['format_version']}, this kit reads up to {FORMAT_VERSION}")
    return checkpoint


def load_newest(folder, log=print):
    """The whole checkpoint with the highest step of `last.pt` and `previous.pt` in `folder`.

    A damaged one is set aside as `*.damaged` with a warning; ValueError where none is left.
    """
    found = []
    for name in ("last.pt", "previous.pt"):
        path = Path(folder) / name
        if path.exists():
            try:
                found.append(load_checkpoint(path))
            except ValueError as error:
                if "this kit reads up to" in str(error):
                    raise  # whole, and another version's
                os.replace(path, path.with_suffix(".damaged"))
                log(f"warning: {error}; set aside as {path.with_suffix('.damaged').name}")
    if not found:
        raise ValueError(f"--resume: no checkpoint in {folder}; start the run without --resume")
    return max(found, key=lambda checkpoint: checkpoint["step"])


def one_line(error):
    """The error's text on one line, control characters escaped, cut to 200 characters."""
    return (repr(str(error))[1:-1].split("\\n")[0] or type(error).__name__)[:200]


# ---------------------------------------------------------------------------- run folder and logs


def environment():
    """What a result depends on beside its config: versions, machine, git commit (empty where none is)."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "platform": platform.platform(), "gpu": gpu, "threads": torch.get_num_threads(), "git_commit": commit,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip


def logger(path=None, past=()):
    """A function log(line): to the terminal, above any bar, and to the file at `path` where given.

    `past` holds lines that the terminal has had and the file has not.
    """
    if past:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in past)

    def log(line):
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        if path is not None:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    return log


def write_metrics(path, rows):
    """Write metrics.csv whole from `rows` (dicts, one an epoch): a resumed run leaves no row twice."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def write_json(path, value):
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def trackers_available(tensorboard=False, wandb=False):
    """ValueError, before anything is written, where a tracker that is asked for is not installed."""
    for wanted, package in ((tensorboard, "tensorboard"), (wandb, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{package} needs the package {package}: pip install {package}")


def trackers(folder, config, tensorboard=False, wandb=False):
    """A list of functions track(step, {name: number}), one a tracker asked for."""
    tracks = []
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder))

        def to_tensorboard(step, numbers):
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)
            writer.flush()

        tracks.append(to_tensorboard)
    if wandb:
        import wandb as client

        name = Path(folder).name
        try:
            run = client.init(dir=str(folder), name=name, id=name, resume="allow", config=config)
        except client.Error as error:
            raise OSError(f"--wandb: {one_line(error)}; log in, or set WANDB_MODE=offline") from None
        tracks.append(lambda step, numbers: run.log(numbers, step=step))
    return tracks


def text_plot(x, y, marks=(), width=64, height=12):
    """Lines of ASCII: y (a list of floats) against log10 of x, with a `|` column at each x in `marks`."""
    x, y = np.log10(np.asarray(x, float)), np.asarray(y, float)
    top = min(y.max(), 1.5 * y[: max(1, len(y) // 4)].max())  # a diverging end would flatten the rest
    y = np.minimum(y, top)
    low, span = y.min(), max(top - y.min(), 1e-12)
    place = lambda v: np.clip((v - x[0]) / max(x[-1] - x[0], 1e-12) * (width - 1), 0, width - 1).round().astype(int)
    canvas = np.full((height, width), " ")
    for mark in marks:
        canvas[:, place(np.log10(mark))] = "|"
    canvas[((top - y) / span * (height - 1)).round().astype(int), place(x)] = "*"
    labels = {0: f"{top:9.3f}", height - 1: f"{low:9.3f}"}
    lines = [f"{labels.get(i, ''):>9} {''.join(row)}" for i, row in enumerate(canvas)]
    return [*lines, f"{'':10}{10 ** x[0]:<{width - 8}.1e}{10 ** x[-1]:>8.1e}"]


def save_curve(path, x, y, marks):
    """PNG of y against x on a log axis with labelled vertical `marks`; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.semilogx(x, y, color="black", linewidth=1.5)
    for i, (name, value) in enumerate(marks.items()):
        axes.axvline(value, color=f"C{i}", linestyle="--", label=f"{name}: {value:.1e}")
    axes.set(xlabel="learning rate", ylabel="smoothed loss", title="Learning-rate range test")
    axes.set_ylim(min(y) - 0.05 * (y[0] - min(y)) - 1e-3, min(max(y), 1.5 * y[0]) + 1e-3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


# ----------------------------------------------------------------------------------------- metrics


def image_metrics(logits, labels):
    """(sums [1], count) of the accuracy of float [B, K] against int64 [B]; of shares [B, K] the one that was chosen."""
    chosen = logits.argmax(1)
    right = labels.gather(1, chosen[:, None])[:, 0] if labels.is_floating_point() else chosen == labels
    return right.sum(0, keepdim=True), len(labels)


SUDOKU_SCORES = ("solve_rate", "violations", "cell_accuracy", "confidence", "entropy")
SUDOKU_METRICS = tuple(score + level for level in ("", "_easy", "_medium", "_hard") for score in SUDOKU_SCORES)


def sudoku_metrics(logits, labels):
    """(sums float [20], counts int64 [20]) of SUDOKU_METRICS over a batch, by the last of logits [S, B, 81, 9].

    Labels are integer [B, 82]: the digit of each blank, 0 for a clue, and last the level, 0 easy to 2 hard.
    Over boards: `solve_rate`, the share whose blanks are all right, and `violations`, the digits
    missing in rows, columns and boxes. Over blanks: `cell_accuracy`, `confidence` (the largest
    probability, mean) and `entropy` (nats, mean). Each overall and by level.
    """
    answers, level = labels[:, :81].long(), labels[:, 81]
    log_p = logits[-1].float().log_softmax(-1)
    confidence, digit = log_p.max(-1)
    blank = answers > 0
    right = (digit + 1 == answers) & blank
    board = torch.nn.functional.one_hot(digit, 9).view(-1, 9, 9, 9)  # [B, row, column, digit]
    boxes = board.view(-1, 3, 3, 3, 3, 9).sum((2, 4))
    violations = sum((units == 0).flatten(1).sum(1) for units in (board.sum(1), board.sum(2), boxes))
    blanks = blank.sum(1)
    over_boards = ((right.sum(1) == blanks), violations)
    over_blanks = (right, confidence.exp() * blank, -(log_p.exp() * log_p).sum(-1) * blank)
    scores = torch.stack([*over_boards, *(score.sum(1) for score in over_blanks)]).float()  # [5, B]
    counts = torch.stack([*[torch.ones_like(blanks)] * 2, *[blanks] * 3])
    chosen = torch.stack([torch.ones_like(level), *(level == i for i in range(3))]).long()  # [4, B]: all, easy …
    # [4, 5] each, as products and sums: a matrix product would round under autocast
    return tuple((chosen[:, None] * x).sum(2).flatten() for x in (scores, counts))


# ------------------------------------------------------------------------ device and memory probes


def pick_device(name="auto"):
    """The torch.device of `name`; auto is cuda, mps or cpu, the first that is there. ValueError if it is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    kind = name.split(":")[0]
    number = name[len(kind) :]
    if not there.get(kind, False) or (number and not (kind == "cuda" and number[1:].isdigit())):
        raise ValueError(f"--device {name}: not on this machine; it has {[k for k, ok in there.items() if ok]}")
    if number and int(number[1:]) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices, counted from 0")
    if kind == "cuda":
        return torch.device("cuda", int(number[1:]) if number else torch.cuda.current_device())
    return torch.device(name)


def cpu_has_amx():
    """Whether bf16 products run on AMX tiles: 3.5 to 7 times fp32's rate; elsewhere bf16 is far slower."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def pick_precision(amp, device):
    """(dtype, reason) for autocast: float32 is off. `amp` is auto, True, False, fp16 or bf16.

    auto and True: bf16 where CUDA has it, else fp16 (but fp32 on the GTX 16 series, whose fp16 gives
    NaN); on a CPU bf16 with AMX; else float32.
    """
    if amp in ("fp16", "bf16"):
        slow = ", many times slower than float32 on a CPU" * (amp == "fp16" and device.type == "cpu")
        return (torch.float16 if amp == "fp16" else torch.bfloat16), "asked for" + slow
    if amp == "False":
        return torch.float32, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "supported by this GPU"
        if "GTX 16" in torch.cuda.get_device_name(device):
            return torch.float32, "fp16 gives NaN on the GTX 16 series"
        return torch.float16, "this GPU has no bf16"
    if device.type == "cpu" and cpu_has_amx():
        return torch.bfloat16, "this CPU has AMX"
    return torch.float32, f"mixed precision gains nothing on this {device.type}"


def tune(device, deterministic=True, memory_gb=None):
    """Mutates the process: what makes training on `device` faster or safer; its names, for the log.

    On CUDA: TF32 products, cuDNN deterministic or else benchmarked, and a cap on memory, so that Windows does not
    spill into the system's without a word. On a CPU see `keep_freed_memory`.
    """
    if device.type != "cuda":
        return ["freed memory kept"] * (device.type == "cpu" and keep_freed_memory())
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
    cap = memory_cap(device, memory_gb)
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(device).total_memory, device)
    return ["TF32", f"cuDNN {'deterministic' if deterministic else 'benchmarked'}", f"at most {cap / 2**30:.1f} GB"]


def memory_cap(device, memory_gb=None):
    """Bytes of the CUDA device that this process may take: memory_gb, or all but a twentieth; else no bound."""
    if device.type != "cuda":
        return math.inf
    total = torch.cuda.get_device_properties(device).total_memory
    return min(total, memory_gb * 2**30) if memory_gb else 0.95 * total


def keep_freed_memory(keep=True):
    """Mutates the process: glibc keeps freed blocks, in place of handing large ones back at each step.

    Training on a CPU gains 5 to 30% by it; the process keeps its peak of memory. False where there is no glibc.
    `keep` False sets what glibc comes to by itself in a program that frees large blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    # M_TRIM_THRESHOLD, M_MMAP_MAX and M_MMAP_THRESHOLD of malloc.h
    for name, value in {-1: -1, -4: 0}.items() if keep else {-1: 64 * 2**20, -4: 65536, -3: 32 * 2**20}.items():
        if not mallopt(name, value):
            return False
    return True


def out_of_memory(error):
    """Whether a RuntimeError says that memory ran out, on CUDA (its libraries too), MPS or a CPU."""
    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def free_bytes(device):
    """Free memory on the device, or of the machine where it is a CPU (4 GiB where it does not tell)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30
