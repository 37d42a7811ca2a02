"""Evidence of a run: checkpoints, run folders, locks, logs, curves, probes of the device, agreement of processes.

Any piece here works alone: this file imports torch, numpy, tqdm and the standard library only
(tensorboard, wandb and matplotlib where a function needs them).
"""

import contextlib
import csv
import ctypes
import errno
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

FORMAT_VERSION = 1


# ------------------------------------------------------------------------------------- checkpoints


def write_atomic(path, content, previous=None):
    """Replace the file at `path` by `content` (bytes), so that either the old or the new one is whole.

    The old one becomes `previous` where a name is given, once the new one is on the disk and reads back alike (from
    the system's memory: what the disk itself loses later, `load_checkpoint` tells).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != content:
            raise OSError(errno.EIO, "what was written reads back otherwise; the disk may be failing", str(path))
        if previous is not None and path.exists():
            os.replace(path, path.with_name(previous))
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # not the temporary; a write that fails names none
        raise
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
    with nothing written, where any tensor holds a NaN or an infinity.
    """
    path = Path(path)
    for name, tensor in tensors(checkpoint):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite; nothing was written")
    buffer = io.BytesIO()
    torch.save({**checkpoint, "format_version": FORMAT_VERSION}, buffer)
    write_atomic(path, buffer.getvalue(), "previous.pt" if path.name == "last.pt" else None)


def tensors(tree, name=""):
    """(name, tensor) of all that nested dicts and lists hold."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(branch, f"{name} {key}".strip())


def load_checkpoint(path, legacy=False):
    """The checkpoint at `path`, on the CPU; ValueError in one line where it is none, damaged or too new.

    The archive's checksums are verified first: torch.load does not look at them, and of 400 flipped
    bits it read 369 without a word. `legacy` admits what torch before 1.6 wrote, which has no archive.
    """
    path = Path(path)
    if not path.is_file():
        instead = path / "best.pt" if (path / "best.pt").is_file() else "a .pt file of a run"
        raise ValueError(f"{path}: no such checkpoint; give {instead}")
    damaged = None
    try:
        if not (legacy and not zipfile.is_zipfile(path)):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except torch.serialization.pickle.UnpicklingError:
        raise ValueError(f"{path}: holds more than tensors and primitives, so it was not loaded") from None
    except OSError:
        raise
    except Exception as error:  # zipfile and torch raise nearly anything on damaged files, UnicodeDecodeError too
        if out_of_memory(error) or "DataLoader" in str(error):  # no fault of the file
            raise
        raise ValueError(f"{path}: not a whole checkpoint ({one_line(error)}); use another one") from None
    if damaged:
        raise ValueError(f"{path}: damaged at {one_line(damaged)}; use another checkpoint of the run")
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, no checkpoint")
    if checkpoint.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(f"{path}: format {checkpoint['format_version']}, this kit reads up to {FORMAT_VERSION}")
    return checkpoint


def load_newest(folder, needed=("step",), log=print, set_aside=True):
    """The whole one of `last.pt` and `previous.pt` in `folder` with the highest step; None where there never was any.

    One that is damaged or lacks a key that is `needed` is told and set aside as `*.damaged`, where `set_aside` says so:
    by a process that has the folder's `lock`. ValueError where there are some and none can be used.
    """
    folder, found = Path(folder), []
    for name in ("last.pt", "previous.pt"):
        path = folder / name
        try:
            checkpoint = load_checkpoint(path) if path.exists() else None
            if checkpoint and (absent := [key for key in needed if key not in checkpoint]):
                raise ValueError(f"{path}: has no {absent[0]}, so it is no checkpoint of a run")
            found += [checkpoint] if checkpoint else []
        except OSError as error:
            log(f"warning: {path}: {error.strerror}; passed over")
        except ValueError as error:
            if "this kit reads up to" in str(error):
                raise  # whole, and another version's
            if set_aside:
                names = (path.with_suffix(f".damaged{n or ''}") for n in itertools.count())
                aside = next(name for name in names if not name.exists())
                os.replace(path, aside)
                log(f"warning: {error}; set aside as {aside.name}")
    if not found and [*folder.glob("*.damaged*"), *folder.glob("last.pt"), *folder.glob("previous.pt")]:
        raise ValueError(f"--resume {folder.name}: its checkpoints are damaged or cannot be read; start anew, perhaps "
                         f"with --pretrained {folder / 'best.pt'}")  # fmt: skip
    return max(found, key=lambda checkpoint: checkpoint["step"]) if found else None


def one_line(error):
    """The error's text on one line, control characters escaped, cut to 200 characters."""
    return (repr(str(error))[1:-1].split("\\n")[0] or type(error).__name__)[:200]


# ---------------------------------------------------------------------------- run folder and logs


def check_room(folder, needed=0):
    """ValueError unless files of `needed` bytes can be written below `folder`, which need not exist yet."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{folder}: {there} is no folder that can be written to; give another, or its rights")
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(f"{folder}: needs {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} are free; make room there")


def lock(folder):
    """The open file `lock` in `folder`, with this process's pid and host: the folder is its own until that is closed.

    ValueError where another process has it. It is the system's lock, so it ends with its process, however that ends.
    """
    file = open(Path(folder) / "lock", "a+", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(2**20)  # past what is read below: Windows lets nobody read what is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not inherit it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return file  # a file system without locks
        with file:
            file.seek(0)
            raise ValueError(f"{folder}: in use by {file.read().strip()}; wait for it, or choose another run") from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {platform.node()}\n")
    file.flush()
    for stale in Path(folder).glob(".*.partial"):  # of a process that was killed while it wrote
        stale.unlink()
    return file


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
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"), "processes": world()[1], "launcher": launcher(),
    }  # fmt: skip


def launcher():
    """What tells one torchrun from another; empty where there is none."""
    return f"pid {os.getppid()} on {platform.node()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def logger(path=None, past=()):
    """A function log(line): to the terminal, above any bar, and to the file at `path` where given.

    `past` holds lines that the terminal has had and the file has not. Of several processes the first alone logs.
    A line that cannot be written is left out: the run matters more.
    """
    if world()[0]:
        return lambda line: None
    if past:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in past)

    def log(line):
        with contextlib.suppress(OSError):  # of a terminal that was closed
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        if path is not None:
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:  # of a disk that is full
                file.write(line + "\n")

    return log


def write_csv(path, rows):
    """Write dicts to `path` whole, with a column for each key of any of them: a resumed run leaves no row twice."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode(errors="backslashreplace"))  # of names that are not UTF-8


def write_json(path, value):
    """Write `value`, which may hold numpy's numbers and arrays, to `path`."""
    write_atomic(path, (json.dumps(value, indent=2, default=lambda array: array.tolist()) + "\n").encode())


def missing(*packages):
    """The names of those that are not installed, with spaces between."""
    return " ".join(package for package in packages if importlib.util.find_spec(package) is None)


def trackers_available(tensorboard=False, wandb=False):
    """ValueError, before anything is written, where a tracker that is asked for is not installed."""
    for wanted, flag, *packages in ((tensorboard, "tensorboard", "tensorboard"), (wandb, "wandb", "wandb", "PIL")):
        if wanted and (absent := missing(*packages).replace("PIL", "pillow")):
            raise ValueError(f"--{flag} needs the package {absent}: pip install {absent}")


def read_metrics(path):
    """The rows of a metrics.csv as dicts of numbers, without what was not measured; ValueError for another file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        if not rows or not all({"epoch", "lr", "train_loss"} <= row.keys() for row in rows):
            raise ValueError
    except (ValueError, TypeError, AttributeError, csv.Error):
        raise ValueError(f"{path}: no metrics.csv of a run; it needs rows with epoch, lr and train_loss") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the metrics.csv of a run") from None
    return rows


def curves(path, png=None):
    """Draws the metrics.csv at `path` to `png`, or to curves.png beside it: its path, or None without matplotlib."""
    rows, png = read_metrics(path), png or Path(path).with_name("curves.png")
    metric = next((name for name in ("accuracy", "solve_rate") if f"train_{name}" in rows[0]), "loss")
    return png if save_history(png, rows, metric) else None


def trackers(folder, config, tensorboard=False, wandb=False):
    """A list of functions track(step, {name: value}), one a tracker asked for.

    A value is a number, a text of several lines, or a picture uint8 [H, W, 3].
    """
    tracks = []
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder))

        def to_tensorboard(step, values):
            for name, value in values.items():
                if isinstance(value, str):
                    writer.add_text(name, "    " + value.replace("\n", "\n    "), step)  # as code, in its columns
                elif isinstance(value, np.ndarray):
                    writer.add_image(name, value, step, dataformats="HWC")
                else:
                    writer.add_scalar(name, value, step)
            writer.flush()

        tracks.append(to_tensorboard)
    if wandb:
        import wandb as client

        name = Path(folder).name
        try:
            run = client.init(dir=str(folder), name=name, id=name, resume="allow", config=config)
        except client.Error as error:
            raise OSError(f"--wandb: {one_line(error)}; log in, or set WANDB_MODE=offline") from None
        kinds = {str: lambda text: client.Html(f"<pre>{text}</pre>"), np.ndarray: client.Image}
        plain = lambda value: kinds.get(type(value), lambda number: number)(value)
        tracks.append(lambda step, values: run.log({name: plain(value) for name, value in values.items()}, step=step))
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


# ---------------------------------------------------------------------------------------- pictures
# Each draws with matplotlib, without a window, and gives back False where that is not installed.


def drawn(draw):
    """A function (path, …) that writes the PNG that draw(figure, …) drew on a matplotlib Figure."""

    @functools.wraps(draw)
    def write(path, *arguments, **options):
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError:
            return False
        png = io.BytesIO()
        with rc_context({"text.parse_math": False}), warnings.catch_warnings():  # names are no TeX
            warnings.simplefilter("ignore")  # of letters that no font here has
            figure = Figure(layout="constrained")
            draw(figure, *arguments, **options)
            figure.savefig(png, format="png", dpi=120, bbox_inches="tight", pad_inches=0.1)
        write_atomic(path, png.getvalue())
        return True

    return write


def short(name, most=20):
    """The name, its middle left out where it is longer than `most`: long names often differ at their ends."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}..{name[len(name) - most // 2 + 1 :]}"


@drawn
def save_curve(figure, x, y, marks):
    """y against x on a log axis with labelled vertical `marks`."""
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    axes.semilogx(x, y, color="black", linewidth=1.5)
    for i, (name, value) in enumerate(marks.items()):
        axes.axvline(value, color=f"C{i}", linestyle="--", label=f"{name}: {value:.1e}")
    axes.set(xlabel="learning rate", ylabel="smoothed loss", title="Learning-rate range test")
    axes.set_ylim(min(y) - 0.05 * (y[0] - min(y)) - 1e-3, min(max(y), 1.5 * y[0]) + 1e-3)
    axes.legend()


@drawn
def save_history(figure, rows, metric):
    """Learning curves of `rows` (dicts, one an epoch): the loss, the `metric`, and the learning rate, by split."""
    figure.set_size_inches(12, 3.6)
    epochs = [row["epoch"] for row in rows]
    for axes, name in zip(figure.subplots(1, 3), ("loss", metric, "lr")):
        for color, split in zip(("C7", "C0", "C1", "C2"), ("train", "val", "ema", "swa")):
            points = [(e, row[key]) for e, row in zip(epochs, rows) if (key := f"{split}_{name}") in row]
            if points:
                axes.plot(*zip(*points), color=color, label=split, marker="." * (len(points) < 40))
        if name == "lr":
            axes.plot(epochs, [row["lr"] for row in rows], color="black", marker="." * (len(rows) < 40))
        else:
            axes.legend()
        axes.set(xlabel="epoch", title={"lr": "learning rate at its end"}.get(name, name.replace("_", " ")))
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


@drawn
def save_confusion(figure, matrix, classes, heading):
    """Counts [true][predicted], each row coloured by its shares, with names and numbers where they fit."""
    matrix, count = np.asarray(matrix), len(classes)
    side = min(20.0, 3.2 + 0.42 * count)
    figure.set_size_inches(side + 0.8, side)
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, fraction=0.046, label="share of the true class")
    if count <= 100:
        axes.set_xticks(range(count), map(short, classes), rotation=90, fontsize=10 if count <= 40 else 7)
        axes.set_yticks(range(count), map(short, classes), fontsize=10 if count <= 40 else 7)
    if count <= 25:
        for i, j in zip(*matrix.nonzero()):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=color, fontsize=7)
    axes.set(xlabel="predicted", ylabel="true", title=f"{heading}\n{np.trace(matrix):,} of {matrix.sum():,} right")


@drawn
def save_reliability(figure, p, labels, heading, bins=15):
    """Accuracy against confidence in `bins` equal bins, above the share of samples in each (p [N, K], labels [N])."""
    figure.set_size_inches(5, 6.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    error, confidence, accuracy, share = calibration(p, labels, bins)
    width, filled = 1 / bins, share > 0
    middle = (np.arange(bins) + 0.5) / bins
    top.bar(middle[filled], accuracy[filled], width, color="C0", edgecolor="white", label="accuracy")
    top.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfectly calibrated")
    top.plot(confidence[filled], accuracy[filled], "o", color="C3", markersize=4, clip_on=False,
             label="at its mean confidence")  # fmt: skip
    top.set(ylabel="accuracy", ylim=(0, 1), title=f"{heading}\nexpected calibration error {error:.3f}")
    top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=2, frameon=False, fontsize=8)
    bottom.bar(middle, share, width, color="C7", edgecolor="white")
    bottom.set(xlabel="confidence", ylabel="share of samples", xlim=(0, 1))


def displayable(images):
    """[..., 3] of images [..., C]: the first three channels, or the first one three times."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., [0, 0, 0]]


@drawn
def save_contact_sheet(figure, images, titles, heading):
    """Up to 24 uint8 pictures [H, W, C] in rows of six, each under its title."""
    rows = -(-len(images) // 6)
    figure.set_size_inches(12, 2.5 * max(1, rows) + 0.5)
    figure.suptitle(heading)
    for axes in figure.subplots(max(1, rows), 6, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title in zip(figure.axes, images, titles):
        axes.imshow(displayable(image))
        axes.set_title(title, fontsize=8)


# ----------------------------------------------------------------------------- what an evaluation says


def report_lines(result, unit):
    """What stands below a checkpoint's first line: the other metrics, speed, and a table of up to 20 classes."""
    lines = []
    if "per_class" in result:
        of = lambda kind, name: f"{name} {result[f'{kind}_{name.lower()}']:.3f}"
        triple = lambda kind: f"{kind} " + ", ".join(of(kind, name) for name in ("precision", "recall", "F1"))
        lines = [
            f"top-5 {result['top5_accuracy']:.2%} | " * (len(result["per_class"]) > 5)
            + f"{triple('macro')} | {triple('weighted')}",
            f"mean average precision {result['mean_average_precision']:.3f} | calibration "
            f"error {result['calibration_error']:.3f}, confidence {result['confidence']:.3f}, "
            f"entropy {result['entropy']:.3f}",
        ]
    lines.append(
        f"{result['latency_ms']:.1f} ms for one (p95 {result['latency_p95_ms']:.1f}), "
        f"{result['samples_per_second']:,.0f} {unit}/s in batches of {result['batch_size']}"
    )
    rows = result.get("per_class", ())
    if rows:
        if len(rows) > 20:
            lines.append(f"the 20 classes of {len(rows)} with the lowest F1; --output FILE.json holds all")
            rows = sorted((row for row in rows if row["samples"]), key=lambda row: row["f1"])[:20]
        width = max(5, *(len(row["class"]) for row in rows))
        lines.append(f"{'class':{width}}  precision  recall     F1     AP  {unit}")
        lines += [f"{row['class']:{width}}  {row['precision']:9.3f}  {row['recall']:6.3f}  {row['f1']:5.3f}  "
                  f"{row['average_precision']:5.3f}  {row['samples']:,}" for row in rows]  # fmt: skip
    return lines


def same_data(results):
    """Whether the results are of the same samples and metrics, so that one can be better than the other."""
    return len({(result["data"], result["split"], result["samples"], *result) for result in results}) == 1


def side_by_side(results):
    """Lines of a table: a metric a row, a checkpoint a column; a star for the best of a row, on the same data."""
    plain, unmarked = ("checkpoint", "data", "split", "samples", "tta", "batch_size"), ("confidence", "entropy")
    alike = same_data(results)
    names = [Path(result["checkpoint"]) for result in results]
    named = [p.name if len({n.name for n in names}) == len(names) else str(Path(*p.parts[-2:])) for p in names]
    widths = [max(14, len(name) + 1) for name in named]
    lines = [f"{'':24}" + "".join(f"{name:>{width}}" for name, width in zip(named, widths))]
    for metric in dict.fromkeys(name for result in results for name in result if name not in plain):
        values = [result.get(metric, math.nan) for result in results]
        best = (max if higher_is_better(metric) else min)((v for v in values if v == v), default=None)
        best = best if alike and not metric.startswith(unmarked) else None
        cells = (f"{'*' if value == best else ''}{value:.4f}" if value == value else "-" for value in values)
        lines.append(f"{metric:24}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    return lines + ["they were scored on different data, so none is marked"] * (not alike)


def draw_report(output, result, drawn):
    """Paths of the PNGs drawn beside `output` for a checkpoint's result: none without matplotlib.

    Learning curves where a metrics.csv lies beside the checkpoint. `drawn` is None, or (probabilities [N, K],
    labels [N], images uint8 [N, H, W, C], metadata): confusion matrix, reliability and the most confident mistakes.
    """
    made, beside = [], lambda name: output.with_name(f"{output.stem}-{name}.png")
    metrics = Path(result["checkpoint"]).with_name("metrics.csv")
    if metrics.is_file():
        with contextlib.suppress(ValueError):  # damaged or another program's
            made += [png] if (png := curves(metrics, beside("curves"))) else []
    if drawn is None:
        return made
    p, labels, images, meta = drawn
    chosen, rows = p.argmax(1), np.arange(len(p))
    wrong = rows[chosen != labels]
    wrong = wrong[np.argsort(-p[wrong, chosen[wrong]], kind="stable")[:24]]
    size, side = meta["image_size"], images.shape[1]
    centre = slice((side - size) // 2, (side - size) // 2 + size)
    images = np.array(images[wrong])[:, centre, centre]
    name = lambda k: short(meta["classes"][k])
    titles = [f"{name(labels[i])}, taken for\n{name(chosen[i])} {p[i, chosen[i]]:.0%}" for i in wrong]
    heading = f"{result['checkpoint']} on {result['split']}" + ", with --tta" * result["tta"]
    mistakes = f"{heading}\nthe most confident of {(chosen != labels).sum():,} mistakes in {len(p):,}"
    for kind, call in (
        ("confusion", lambda path: save_confusion(path, result["confusion_matrix"], meta["classes"], heading)),
        ("reliability", lambda path: save_reliability(path, p, labels, heading)),
        ("mistakes", lambda path: save_contact_sheet(path, images, titles, mistakes)),
    ):
        if call(beside(kind)):
            made.append(beside(kind))
    return made


# ----------------------------------------------------------------------------------------- metrics


def higher_is_better(monitor):
    """Whether a metric of that name is better the higher it is."""
    return not any(word in monitor for word in ("loss", "violations", "entropy", "error", "latency"))


def image_metrics(logits, labels):
    """(sums [1], count) of the accuracy of float [B, K] against int64 [B]; of shares [B, K] the one that was chosen."""
    chosen = logits.argmax(1)
    right = labels.gather(1, chosen[:, None])[:, 0] if labels.is_floating_point() else chosen == labels
    return right.sum(0, keepdim=True), len(labels)



def classification_report(p, labels):
    """A dict of what is known of a classifier: probabilities float [N, K] against labels int [N], both numpy, N > 0.

    Means over classes are over all K (`macro_…`), or weighed by their samples (`weighted_…`); what has no samples
    to divide by counts as 0, as in scikit-learn. `mean_average_precision` is one against the rest, over the classes
    that occur; `calibration_error` as in `calibration`; `entropy` in nats. `per_class` is a list of dicts and
    `confusion_matrix` rows of counts [true][predicted].
    """
    count, classes = p.shape
    order = (-p).argsort(1, kind="stable")[:, :5]
    matrix = np.bincount(labels * classes + order[:, 0], minlength=classes**2).reshape(classes, classes)
    right, support, chosen = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    share = lambda a, b: np.divide(a, b, out=np.zeros(classes), where=b > 0)
    scores = {
        "precision": share(right, chosen), "recall": share(right, support), "f1": share(2 * right, support + chosen),
        "average_precision": np.array([average_precision(p[:, k], labels == k) for k in range(classes)]),
    }  # fmt: skip
    means = {f"macro_{name}": scores[name].mean() for name in ("precision", "recall", "f1")}
    means |= {f"weighted_{name}": scores[name] @ support / count for name in ("precision", "recall", "f1")}
    return {
        "accuracy": right.sum() / count,
        "top5_accuracy": (order == labels[:, None]).any(1).mean(), **means,
        "mean_average_precision": scores["average_precision"][support > 0].mean(),
        "calibration_error": calibration(p, labels)[0], "confidence": p.max(1).mean(),
        "entropy": -(p * np.log(p.clip(np.finfo(np.float32).tiny))).sum(1).mean(),
        "per_class": [{**{name: values[k] for name, values in scores.items()}, "samples": support[k]}
                      for k in range(classes)],
        "confusion_matrix": matrix,
    }  # fmt: skip


def average_precision(scores, positive):
    """Mean precision over the positives, at the thresholds that `scores` [N] set; ties count together. 0 for none."""
    order = (-scores).argsort(kind="stable")
    hits, distinct = positive[order].cumsum(), np.append(np.diff(scores[order]) != 0, True)
    hits, place = hits[distinct], np.flatnonzero(distinct) + 1
    return float((np.diff(hits, prepend=0) * hits / place).sum() / max(1, positive.sum()))


def calibration(p, labels, bins=15):
    """(expected calibration error, mean confidence, accuracy and share [bins]) over equal bins of the confidence.

    The error is the mean distance of accuracy and confidence, bins weighed by their share (Guo et al. 2017).
    """
    confidence, right = p.max(1).astype(float), p.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    share, sure, good = (np.bincount(place, x, bins) / len(p) for x in (np.ones(len(p)), confidence, right))
    divide = lambda a: np.divide(a, share, out=np.zeros(bins), where=share > 0)
    return float(np.abs(good - sure).sum()), divide(sure), divide(good), share


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


# ------------------------------------------------------------------------------------------ export


def exported(model, example, suffix, facts):
    """(the bytes of a `.pt2` or `.onnx` file, a function of a batch that runs what they say) of model(example).

    The first dimension is dynamic; `facts`, a JSON object, goes along as `facts.json` or as metadata. ValueError, in
    one line, where the exporter cannot follow the model.
    """
    buffer, shapes = io.BytesIO(), ({0: torch.export.Dim("batch", min=1)},)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.export.export(model, (example,), dynamic_shapes=shapes)
            if suffix == ".pt2":
                torch.export.save(program, buffer, extra_files={"facts.json": json.dumps(facts)})
                loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
                return buffer.getvalue(), lambda batch: loaded(batch).detach()
            import onnx
            import onnx.reference

            proto = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    except (RuntimeError, ImportError, torch.onnx.errors.OnnxExporterError) as error:
        raise ValueError(f"--export: the exporter failed ({one_line(error.__cause__ or error)})") from None
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in facts.items()})
    session = onnx.reference.ReferenceEvaluator(proto)
    run = lambda batch: torch.from_numpy(session.run(None, {session.input_names[0]: batch.numpy()})[0])
    return proto.SerializeToString(), run


# ------------------------------------------------------------------------ device and memory probes


def pick_device(name="auto"):
    """The torch.device of `name`; auto is cuda, mps or cpu, the first that is there. ValueError if it is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    kind = name.split(":")[0]
    number = name[len(kind) :]
    if not there.get(kind, False) or (number and not (kind == "cuda" and re.fullmatch(r":\d{1,4}", number))):
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
    """Whether an error says that memory ran out, on CUDA (its libraries too), MPS or a CPU."""
    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in texts)


def free_bytes(device):
    """Free memory on the device, or of the machine where it is a CPU (4 GiB where it does not tell)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30


# --------------------------------------------------------------------------------- many processes


def world():
    """(rank, number of processes) of torch.distributed; (0, 1) where it is not in use."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def processes(device, seconds):
    """Joins the others that torchrun started, where it did, and leaves them after the block.

    With `device` cuda each takes that of its local rank, over NCCL, else the CPU, over Gloo. Whoever waits for another
    for longer than `seconds` gets an error. ValueError where torchrun's variables are incomplete or nothing suits.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in names if not os.environ.get(name)]
    if absent and not set(names[:3]) <= set(absent):
        raise ValueError(f"{absent[0]}: is not set, others of torchrun's variables are; start with torchrun")
    if absent or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    kind = pick_device(device).type
    if kind == "mps" or ":" in device or not dist.is_available():
        raise ValueError(f"--device {device}: torchrun's processes take a CUDA device each or the CPU; say which")
    if kind == "cuda":
        torch.cuda.set_device(pick_device(f"cuda:{os.environ['LOCAL_RANK']}"))
    patience = timedelta(seconds=seconds)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=patience))
        # torchrun keeps its store when it starts processes again: without a prefix they find addresses of the dead
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
    except (RuntimeError, ValueError) as error:
        place = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        raise ValueError(f"torchrun: the processes did not meet at {place} ({one_line(error)}); look there") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def in_turn(first=True):
    """Processes for which `first` holds pass the block before the others, who wait for up to a day."""
    if world()[1] == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if not first:
        dist.barrier(group)
    yield
    if first:
        dist.barrier(group)
    dist.destroy_process_group(group)


def over_all(tensor, operation="SUM"):
    """Mutates `tensor`, to its sum over all processes, or MAX, MIN; the same tensor."""
    if world()[1] > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def any_of_all(flag):
    """Whether `flag` holds in any process."""
    return bool(over_all(torch.tensor(float(bool(flag)))))


def check_agreement(facts):
    """ValueError that names the first of `facts` {name: anything with a repr} that the processes do not share."""
    rank, count = world()
    if count == 1:
        return
    codes = torch.zeros(count, len(facts), dtype=torch.int64)
    codes[rank] = torch.tensor([zlib.crc32(repr(fact).encode()) for fact in facts.values()])
    for name, column in zip(facts, over_all(codes).T):
        if len(column.unique()) > 1:
            raise ValueError(f"the processes have different {name}; start them all with the same flags, data and torch")


def lost_process(error):
    """Whether an error says that another process ended or was silent for too long."""
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo" in str(error)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        given = f"{sys.argv[1]!r} is no file" if sys.argv[1:] else "no file"
        print(f"error: {given}; give one: python utils.py runs/NAME/metrics.csv ...   draws curves.png beside each",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    for file in sys.argv[1:]:
        try:
            if (png := curves(file)) is None:
                raise ValueError("curves need the package matplotlib: pip install matplotlib")
            print(png)
        except (ValueError, OSError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(2)
