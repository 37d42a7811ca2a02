"""Evidence of a run: checkpoints, logs, flags, metrics, pictures; devices, processes, copying.

Imports torch, numpy, tqdm and the standard library; others only in the functions that need them.
"""

import argparse
import ast
import contextlib
import csv
import ctypes
import difflib
import errno
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
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


# ------------------------------------------------------------------------------------ checkpoints


def write_atomic(path, content, previous=None):
    """Replace the file at `path` by `content` (bytes). At any time the old or the new one is whole.

    The old file is renamed to `previous` if that name is given. An OSError names `path`.
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
    except OSError as error:
        error.filename = str(path)  # in place of the temporary; a failed write names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # Windows cannot open folders, and journals its renames
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path, checkpoint):
    """Write `checkpoint` (nested dicts and lists of tensors and primitives) to `path`, atomically.

    An existing `last.pt` becomes `previous.pt`. ValueError if a tensor holds a NaN or an infinity.
    """
    path = Path(path)
    for name, tensor in tensors(checkpoint):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite; nothing was written")
    buffer = io.BytesIO()
    torch.save({**checkpoint, "format_version": FORMAT_VERSION}, buffer)
    write_atomic(path, buffer.getvalue(), "previous.pt" if path.name == "last.pt" else None)


def tensors(tree, name=""):
    """Yields (name, tensor) for each tensor in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(branch, f"{name} {key}".strip())


def load_checkpoint(path, legacy=False):
    """The checkpoint at `path`, on the CPU. Raises ValueError if it is missing, damaged or too new.

    The archive's checksums are verified first: torch.load ignores them, and read 369 of 400 files
    with one flipped bit. `legacy` admits files of torch before 1.6, which are no archives.
    """
    path = Path(path)
    if not path.is_file():
        instead = path / "best.pt" if (path / "best.pt").is_file() else "a .pt file of a run"
        raise ValueError(f"{path}: no such checkpoint; give {instead}")
    try:
        if zipfile.is_zipfile(path) or not legacy:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"damaged at {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except torch.serialization.pickle.UnpicklingError:
        raise ValueError(f"{path}: holds more than tensors and primitives; give another") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged files make zipfile and torch raise almost any type
        if re.search("memory|DataLoader", str(error)):  # the file is not at fault
            raise
        reason = one_line(error)
        raise ValueError(f"{path}: not a whole checkpoint ({reason}); use another one") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, no checkpoint")
    version = checkpoint.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"{path}: format {version}, this kit reads up to {FORMAT_VERSION}")
    return checkpoint


def load_newest(folder, needed=("step",), log=print, set_aside=True):
    """The checkpoint with the highest step of `last.pt` and `previous.pt`; None if there are none.

    A file that is damaged or lacks one of the keys `needed` is renamed to `*.damaged` and logged if
    `set_aside`: only a process that holds the folder's `lock` may do that. ValueError if there are
    files and none can be used.
    """
    folder, usable = Path(folder), []
    for path in (folder / "last.pt", folder / "previous.pt"):
        try:
            checkpoint = load_checkpoint(path) if path.exists() else None
            if checkpoint and (absent := [key for key in needed if key not in checkpoint]):
                if "format_version" in checkpoint:
                    raise ValueError(f"{path}: has no {absent[0]}: another version "
                                     "of the kit wrote it; use that version, or start a new run")
                raise ValueError(f"{path}: has no {absent[0]}, so it is no checkpoint of a run")
            usable += [checkpoint] if checkpoint else []
        except OSError as error:
            log(f"warning: {path}: {error.strerror}; passed over")
        except ValueError as error:
            if re.search("this kit reads up to|another version of the kit", str(error)):
                raise
            if set_aside:
                names = (path.with_suffix(f".damaged{n or ''}") for n in itertools.count())
                aside = next(name for name in names if not name.exists())
                os.replace(path, aside)
                log(f"warning: {error}; set aside as {aside.name}")
    if not usable and has_checkpoints(folder):
        raise ValueError(f"--resume {folder.name}: its checkpoints are damaged or cannot be read; "
                         f"start anew, perhaps with --pretrained {folder / 'best.pt'}")
    return max(usable, key=lambda checkpoint: checkpoint["step"], default=None)


def has_checkpoints(folder):
    """Whether `folder` holds the state of a run, be it damaged."""
    patterns = ("last.pt", "previous.pt", "*.damaged*")
    return any(path for pattern in patterns for path in Path(folder).glob(pattern))


def one_line(error):
    """The error's text on one line, control characters escaped, cut to 200 characters."""
    return (repr(str(error))[1:-1].split("\\n")[0] or type(error).__name__)[:200]


# --------------------------------------------------------------------------- run folder and logs


def find_run(runs, name):
    """The folder of the run to resume: `name` or runs/name; for "" the unfinished run started last.

    A run started when its config.json was written. Raises ValueError if there is no such run.
    """
    runs = Path(runs)
    for folder in (Path(name), runs / name) if name else ():
        if has_checkpoints(folder):
            return folder
    if name:
        others = sorted(path.name for path in runs.glob("*") if has_checkpoints(path))
        raise ValueError(f"--resume {shorten(name)}: no such run with a checkpoint; in "
                         f"{runs.resolve()} there are {', '.join(others[-5:]) or 'none'}")
    for path in sorted(runs.glob("*/config.json"), key=lambda path: -path.stat().st_mtime_ns):
        # nothing is set aside: another process may hold the run
        newest = load_newest(path.parent, ("step", "finished"), set_aside=False)
        if newest and not newest["finished"]:
            return path.parent
    raise ValueError(f"--resume: no unfinished run with a checkpoint in {runs.resolve()}; start "
                     "one without --resume")


def dated_name(model):
    """A run's name from its model and the first process's clock."""
    now = torch.tensor(time.time() * (world()[0] == 0), dtype=torch.float64)
    return f"{model}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(all_reduce(now).item()))}"


def check_unused(folder):
    """ValueError if a folder holds more than what a run leaves that was killed before it began."""
    files = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() else []
    if any(file.name != "lock" and file.suffix != ".partial" for file in files):
        raise ValueError(f"--run_name {folder.name}: {folder} exists; choose another name, or "
                         f"--resume {folder.name}")


def holds_better(path, monitor, row):
    """Whether the weights at `path` are better than `row`: from an epoch lost in a crash."""
    try:
        old, new = load_checkpoint(path)["metrics"][monitor], row[monitor]
        return old > new if higher_is_better(monitor) else old < new
    except (ValueError, KeyError, TypeError):  # no such file, or a damaged one
        return False


def check_room(folder, needed=0):
    """ValueError unless `needed` bytes can be written below `folder`, which need not exist yet."""
    path = Path(folder).absolute()
    parent = next(place for place in (path, *path.parents) if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{folder}: {parent} is no folder that can be written to; give another")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(f"{folder}: needs {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} are "
                         "free; make room there")


def lock(folder):
    """The open file `lock` in `folder`, with this process's pid and host: locked until closed.

    The system unlocks it when the process ends. ValueError if another process has locked it.
    Partial files of killed processes are removed.
    """
    file = open(Path(folder) / "lock", "a+", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(2**20)  # beyond the text: Windows lets nobody read locked bytes
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not inherit it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return file  # the file system has no locks
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ValueError(f"{folder}: in use by {holder}; wait, or choose another run") from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {platform.node()}\n")
    file.flush()
    for stale in Path(folder).glob(".*.partial"):
        stale.unlink()
    return file


def environment():
    """What a result depends on beside its flags: versions, machine, git commit ("" if unknown)."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "platform": platform.platform(), "gpu": gpu,
            "threads": torch.get_num_threads(), "git_commit": commit,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"), "processes": world()[1]}


def logger(path=None, past=()):
    """A function log(line) for the terminal, above any progress bar, and for the file at `path`.

    `past` lines were printed before the file existed. Only the first of several processes logs.
    """

    def log(line, terminal=True):
        with contextlib.suppress(OSError):  # a closed terminal or a full disk does not end the run
            if terminal:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
        if path is not None:
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    if world()[0]:
        return lambda line: None
    for line in past:
        log(line, terminal=False)
    return log


def progress_bar(title, total, unit, quiet=False):
    """A tqdm bar; none for under 100 samples, nor in other processes than the first."""
    hidden = quiet or total < 100 or world()[0] > 0
    return tqdm(desc=title, total=total, unit=unit, leave=False, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 5, disable=hidden)


def show(bar, text_of, *arguments):
    """Show text_of(*arguments) in a bar, at the bar's own rate: making it may wait for the GPU."""
    now = time.monotonic()
    if not bar.disable and now - getattr(bar, "shown_at", -math.inf) >= bar.mininterval:
        bar.shown_at = now
        bar.set_postfix_str(text_of(*arguments), refresh=False)


def write_results(path, results):
    """Write dicts to `path`: to .csv only their scalars, to .json all, one result by itself."""
    if str(path).endswith(".csv"):
        write_csv(path, list(map(scalars, results)))
    else:
        write_json(path, results if len(results) > 1 else results[0])


def scalars(result):
    return {name: x for name, x in result.items() if not isinstance(x, list | np.ndarray)}


def write_csv(path, rows):
    """Write dicts to `path` as one CSV file, with a column for each key of any row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode(errors="backslashreplace"))  # file names may be bytes


def write_json(path, value):
    """Write `value`, which may hold numpy numbers and arrays, to `path` as JSON."""
    text = json.dumps(value, indent=2, default=lambda array: array.tolist())
    write_atomic(path, (text + "\n").encode())


def missing(*packages):
    """The names of the packages that are not installed, separated by spaces."""
    return " ".join(name for name in packages if importlib.util.find_spec(name) is None)


def trackers_available(tensorboard=False, wandb=False):
    """ValueError if a tracker that was asked for is not installed."""
    for flag, asked, packages in (("tensorboard", tensorboard, ["tensorboard"]),
                                  ("wandb", wandb, ["wandb", "PIL"])):
        if asked and (absent := missing(*packages).replace("PIL", "pillow")):
            raise ValueError(f"--{flag} needs the package {absent}: pip install {absent}")


def trackers(folder, config, tensorboard=False, wandb=False):
    """A list of functions track(step, {name: value}), one for each tracker that was asked for.

    A value is a number, a text of several lines, or a picture uint8 [H, W, 3].
    """
    tracks = []
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        tracks.append(functools.partial(track_tensorboard, SummaryWriter(str(folder))))
    if wandb:
        import wandb as client

        name = Path(folder).name
        try:
            run = client.init(dir=str(folder), name=name, id=name, resume="allow", config=config)
        except client.Error as error:
            reason = one_line(error)
            raise OSError(f"--wandb: {reason}; log in, or set WANDB_MODE=offline") from None
        tracks.append(functools.partial(track_wandb, client, run))
    return tracks


def track_tensorboard(writer, step, values):
    for name, value in values.items():
        if isinstance(value, str):  # as a code block, which keeps its columns
            writer.add_text(name, "    " + value.replace("\n", "\n    "), step)
        elif isinstance(value, np.ndarray):
            writer.add_image(name, value, step, dataformats="HWC")
        else:
            writer.add_scalar(name, value, step)
    writer.flush()


def track_wandb(client, run, step, values):
    kinds = {str: lambda text: client.Html(f"<pre>{text}</pre>"), np.ndarray: client.Image}
    plain = lambda value: kinds[type(value)](value) if type(value) in kinds else value
    run.log({name: plain(value) for name, value in values.items()}, step=step)


def metrics_line(numbers, formats):
    """The loss and the metrics of `formats` {name: format} in `numbers`, with their levels."""
    parts = []
    for name, form in {"loss": "{:.4f}", **formats}.items():
        if name in numbers:
            levels = [f"{key[len(name) + 1 :]} {form.format(value)}"
                      for key, value in numbers.items() if key.startswith(f"{name}_")]
            more = f" ({', '.join(levels)})" if len(levels) > 1 else ""
            parts.append(f"{name} {form.format(numbers[name])}{more}")
    return ", ".join(parts)


def epoch_line(row, formats, monitor, unit, epochs, new_best):
    """The log's line for one epoch, given its row of metrics.csv.

    Each split shows the loss and `monitor`. The EMA, or without it the validation, shows all
    metrics of `formats` and the levels of `monitor`.
    """
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
    detailed = "ema" if "ema_loss" in row else "val"
    for split in ("train", "val", "ema", "swa"):
        names = ["loss", monitor]
        if split == detailed:
            names += [*formats, *(monitor + level for level in SUDOKU_LEVELS)]
        numbers = {name: row[f"{split}_{name}"] for name in names if f"{split}_{name}" in row}
        if numbers:
            parts.append(f"{split} {metrics_line(numbers, formats)}")
    parts.append(f"{row['seconds']:.1f} s")
    parts.append(f"{row['samples_per_second']:,.0f} {unit}/s")
    parts.append(f"lr {row['lr']:.2e}")
    if row["bad_steps"]:
        parts.append(f"{row['bad_steps']} bad steps")
    return " | ".join([*parts, "new best"] if new_best else parts)


@contextlib.contextmanager
def catch_signals(gently=True):
    """Yields a list that receives the number of SIGINT, SIGTERM or SIGHUP; a second ends at once.

    Without `gently` the first signal raises KeyboardInterrupt with its number.
    """
    received, before = [], {}

    def handle(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)
        if not gently:
            raise KeyboardInterrupt(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------ flags and presets


def number(kind, low=-math.inf, high=math.inf, open_low=False, open_high=False, word=None):
    """An argparse type: a finite int or float (`kind`) within bounds, or the string `word`."""
    bounds = [f"{'above' if open_low else 'at least'} {low:g}"] if low > -math.inf else []
    bounds += [f"{'below' if open_high else 'at most'} {high:g}"] if high < math.inf else []
    wanted = ["an integer" if kind is int else "a number", " and ".join(bounds)]
    wanted = " ".join(filter(None, wanted)) + (f" or {word}" if word else "")

    def parse(text):
        if word and text == word:
            return text
        try:
            value = kind(text)
            inside = low <= value <= high and math.isfinite(value)
        except (ValueError, OverflowError):
            inside = False
        if not inside or (open_low and value == low) or (open_high and value == high):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {shorten(text)}")
        return value

    return parse


def boolean(text):
    """An argparse type: True or False, also in lower case."""
    if text not in ("True", "False", "true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {shorten(text)}")
    return text in ("True", "true")


def file_path(text):
    """An argparse type: the text itself if a file could have that name."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: no such file or folder; give a path")
    try:
        longest = max(map(len, os.fsencode(text).split(b"/")))
    except UnicodeEncodeError:  # half a surrogate pair
        longest = math.inf
    if "\0" in text or longest > 255 or len(text) > 4080:  # what file systems take
        raise argparse.ArgumentTypeError(f"is a name that no file can have, got {shorten(text)}; "
                                         "give another")
    return text


def run_name(text):
    """An argparse type: a folder name that every file system takes and that cannot leave runs/."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text) or re.search(r"\.\.|\.$", text):
        raise argparse.ArgumentTypeError("must be 1 to 64 letters, digits, '.', '_' or '-', the "
                                         f"first a letter or digit, got {shorten(text)}")
    if re.match(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\.|$)", text.upper()):
        raise argparse.ArgumentTypeError(f"is a reserved name on Windows, got {shorten(text)}; "
                                         "choose another")
    return text


def shorten(text):
    """The repr of a user's input, cut to 80 characters."""
    return repr(text) if len(repr(text)) <= 80 else repr(text)[:77] + "..."


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, after the text `where`, with exit status 2."""

    where = ""

    def error(self, message):
        fail(self.where + message.removeprefix("argument "))


def fail(message):
    """End the program with exit status 2 and one line on standard error."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    if len(line) > 1000:  # the end says what to do
        line = f"{line[:700]} ... {line[-250:]}"
    rank = os.environ.get("RANK", "0")
    process = f"process {rank}: " if rank != "0" else ""
    print(f"error: {process}{line}", file=sys.stderr)
    raise SystemExit(2)


def message_of(error):
    """The message for a ValueError or an OSError; an OSError's path comes first."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    hint = "look at the path and at who may use it"
    if error.errno == errno.ENOSPC:
        hint = "make room there"
    return f"{error.filename}: {error.strerror}; {hint}"


def nearest(name, names):
    """A question after the one of `names` that is most like `name`."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "see --help"


def check_output(path, suffixes, inputs=()):
    """ValueError unless the --output file `path` can be written; `inputs` are paths or None."""
    path = Path(path)
    if len(os.fsencode(path.name)) > 200:  # the temporary's name is longer, and 255 is the limit
        raise ValueError(f"--output {path}: must be a name of at most 200 bytes; shorten it")
    if path.suffix not in suffixes or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output {path}: must be a {' or '.join(suffixes)} file in a folder "
                         "that exists")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: its folder cannot be written to; choose another")
    for other in filter(None, inputs):
        if path.exists() and Path(other).exists() and path.samefile(other):
            raise ValueError(f"--output {path}: is an input too; choose another name")


def read_preset(path, name):
    """The preset `name` of the JSON file `path`, as a dict. Raises ValueError in one line."""
    try:
        if not path.exists():
            raise ValueError("no such file; presets are read from it")
        if path.is_file() and path.stat().st_size > 2**20:
            raise ValueError(f"over {2**20:,} bytes; a preset is one short object")
        presets = json.loads(path.read_text("utf-8"), object_pairs_hook=unique_keys,
                             parse_constant=no_constant)
        if not isinstance(presets, dict) or not all(type(x) is dict for x in presets.values()):
            raise ValueError('must be an object of objects, {"name": {"flag": value}}')
        preset_words(presets.get(name, {}))
    except OSError as error:
        raise ValueError(message_of(error)) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 at byte {error.start}; convert it") from None
    except json.JSONDecodeError as error:
        place = f"{path.name}:{error.lineno}:{error.colno}"
        raise ValueError(f"{place}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep; a preset is flat" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path.name}: {reason}") from None
    if name not in presets:
        names = ", ".join(presets) or "none"
        raise ValueError(f"--config {shorten(name)} is no preset; there are {names}")
    return presets[name]


def unique_keys(pairs):
    """The dict of the (key, value) pairs of a JSON object. ValueError if a key stands twice."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shorten(key)} stands twice; remove one")
        found[key] = value
    return found


def no_constant(text):
    raise ValueError(f"{text} is no number for JSON; give a finite one")


def preset_words(preset):
    """Words of a command line for a preset. Raises ValueError for values that no flag can have.

    {"epochs": 3, "model_args": {"widths": [24, 64]}} gives --epochs=3 --model_args widths=24,64.
    """
    words = []
    for key, value in preset.items():
        nested = isinstance(value, dict)
        words += [f"--{key}"] if nested else []
        for name, inner in value.items() if nested else [(f"--{key}", value)]:
            if nested and name.startswith("-"):
                raise ValueError(f"{key} {shorten(name)}: is no argument")
            items = inner if nested and isinstance(inner, list) else [inner]
            words.append(f"{name}={','.join(map(str, items))}")
            if not items or not all(isinstance(item, str | int | float) for item in items):
                value = None
        if value in (None, {}) or not re.fullmatch(r"[a-z]\w*", key):
            raise ValueError(f"{shorten(key)} must be a flag, and its value a string, a number, "
                             "true, false, or an object of those and of lists of numbers")
    return words


def keyword_arguments(words, function, flag, reserved=(
        "num_classes", "in_channels", "values", "min_delta")):
    """{name: value} of KEY=VALUE words, for the parameters of `function` that have defaults.

    A value has the type of the default; a tuple is written as integers with commas. The caller
    sets the `reserved` parameters itself. Raises ValueError that begins with `flag`.
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters
                if p.default is not p.empty and p.name not in reserved}
    types, values = {bool: boolean, int: number(int), float: number(float)}, {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name in values:
            raise ValueError(f"{flag} {shorten(word)}: must be KEY=VALUE, each key once")
        if name not in defaults:
            raise ValueError(f"{flag} {shorten(name)}: is no argument; there are "
                             f"{', '.join(defaults)}; {nearest(name, defaults)}")
        default = defaults[name]
        try:
            if isinstance(default, tuple):
                values[name] = tuple(map(int, text.split(",")))
                if len(values[name]) != len(default):
                    raise ValueError
            else:
                values[name] = types.get(type(default), str)(text)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{flag} {name}: {error}") from None
        except ValueError:
            raise ValueError(f"{flag} {name}: must be {len(default)} integers with commas, got "
                             f"{shorten(text)}") from None
    return values


# ---------------------------------------------------------------------------------------- metrics


def higher_is_better(monitor):
    """Whether higher values of the metric `monitor` are better."""
    lower = ("loss", "violations", "entropy", "error", "latency")
    return not any(word in monitor for word in lower)


def image_metrics(logits, labels):
    """(right predictions [1], their number) for logits float [B, K] and labels int64 [B].

    For labels that are shares float [B, K], a prediction counts with the share of its class.
    """
    chosen = logits.argmax(1)
    right = chosen == labels if labels.ndim == 1 else labels.gather(1, chosen[:, None])[:, 0]
    return right.sum(0, keepdim=True), len(labels)


def classification_report(p, labels, names):
    """A dict of metrics of probabilities p float [N, K] for labels int [N], numpy arrays, N > 0.

    `macro_…` are means over all K classes, `weighted_…` means by samples; a ratio of 0 samples is
    0, as in scikit-learn. `mean_average_precision` is of one class against the others,
    over the classes that occur. `entropy` is in nats. `per_class` is a list of a dict for each of
    the K `names`, `confusion_matrix` has counts [true][predicted].
    """
    count, classes = p.shape
    order = (-p).argsort(1, kind="stable")[:, :5]
    matrix = np.bincount(labels * classes + order[:, 0], minlength=classes**2)
    matrix = matrix.reshape(classes, classes)
    right, support, chosen = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    scores = {"precision": ratio(right, chosen), "recall": ratio(right, support),
              "f1": ratio(2 * right, support + chosen)}
    means = {f"macro_{name}": score.mean() for name, score in scores.items()}
    means |= {f"weighted_{name}": score @ support / count for name, score in scores.items()}
    precision = np.array([average_precision(p[:, k], labels == k) for k in range(classes)])
    scores |= {"average_precision": precision, "samples": support, "class": names}
    return {
        "accuracy": right.sum() / count,
        "top5_accuracy": (order == labels[:, None]).any(1).mean(),
        **means,
        "mean_average_precision": precision[support > 0].mean(),
        "calibration_error": calibration(p, labels)[0],
        "confidence": p.max(1).mean(),
        "entropy": -(p * np.log(p.clip(np.finfo(np.float32).tiny))).sum(1).mean(),
        "per_class": [dict(zip(scores, values)) for values in zip(*scores.values())],
        "confusion_matrix": matrix,
    }


def ratio(a, b):
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(len(b)), where=b > 0)


def average_precision(scores, positive):
    """Mean precision over the positives at each threshold of `scores` [N]; 0 without positives.

    Samples of equal score count together.
    """
    order = (-scores).argsort(kind="stable")
    last_of_score = np.append(np.diff(scores[order]) != 0, True)
    hits = positive[order].cumsum()[last_of_score]
    rank = np.flatnonzero(last_of_score) + 1
    return float((np.diff(hits, prepend=0) * hits / rank).sum() / max(1, positive.sum()))


def calibration(p, labels, bins=15):
    """(expected calibration error, confidence [bins], accuracy [bins], share of samples [bins]).

    Bins have equal widths. The error is the mean distance of a bin's accuracy and mean confidence,
    weighted by its share (Guo et al. 2017, arXiv:1706.04599).
    """
    confidence, right = p.max(1).astype(float), p.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    share, sure, good = (np.bincount(index, weights, bins) / len(p)
                         for weights in (np.ones(len(p)), confidence, right))
    return float(np.abs(good - sure).sum()), ratio(sure, share), ratio(good, share), share


SUDOKU_SCORES = ("solve_rate", "violations", "cell_accuracy", "confidence", "entropy")
SUDOKU_LEVELS = ("", "_easy", "_medium", "_hard")
SUDOKU_METRICS = tuple(score + level for level in SUDOKU_LEVELS for score in SUDOKU_SCORES)


def sudoku_metrics(logits, labels):
    """(numerators float [20], denominators int64 [20]) of SUDOKU_METRICS over a batch.

    The last of logits [S, B, 81, 9] counts. Labels are integers [B, 82]: the digit of each blank, 0
    for a clue, and last the level, 0 easy to 2 hard. Means over boards: `solve_rate`, the share
    with all blanks right, and `violations`, the digits missing in rows, columns and boxes. Means
    over blanks: `cell_accuracy`, `confidence` (largest probability) and `entropy` (nats).
    """
    answers, level = labels[:, :81].long(), labels[:, 81]
    log_p = logits[-1].float().log_softmax(-1)
    confidence, digit = log_p.max(-1)
    blank = answers > 0
    right = (digit + 1 == answers) & blank
    board = torch.nn.functional.one_hot(digit, 9).view(-1, 9, 9, 9)  # [B, row, column, digit]
    boxes = board.view(-1, 3, 3, 3, 3, 9).sum((2, 4))
    units = (board.sum(1), board.sum(2), boxes)
    violations = sum((counts == 0).flatten(1).sum(1) for counts in units)
    blanks = blank.sum(1)
    cells = (right, confidence.exp() * blank, -(log_p.exp() * log_p).sum(-1) * blank)
    scores = [right.sum(1) == blanks, violations, *(score.sum(1) for score in cells)]
    counts = [torch.ones_like(blanks)] * 2 + [blanks] * 3
    groups = torch.stack([level >= 0, *(level == i for i in range(3))]).long()  # [4, B]
    # products and sums give [4, 5] each; autocast would round a matrix product
    return tuple((groups[:, None] * values).sum(2).flatten()
                 for values in (torch.stack(scores).float(), torch.stack(counts)))


# ----------------------------------------------------------------------------------- --evaluate


def report_lines(result, unit):
    """Lines with more metrics of a checkpoint, its speed, and a table of up to 20 classes."""
    lines, rows = [], result.get("per_class", ())
    floats = (float, np.floating)
    text = {name: f"{x:.3f}" for name, x in result.items() if isinstance(x, floats)}
    if rows:
        means = [f"{mean} precision {text[f'{mean}_precision']}, recall {text[f'{mean}_recall']}, "
                 f"F1 {text[f'{mean}_f1']}" for mean in ("macro", "weighted")]
        top5 = [f"top-5 {result['top5_accuracy']:.2%}"] if len(rows) > 5 else []
        lines.append(" | ".join(top5 + means))
        lines.append("mean average precision {mean_average_precision} | calibration error "
                     "{calibration_error}, confidence {confidence}, entropy {entropy}"
                     .format(**text))
    lines.append("{latency_ms:.1f} ms for one (p95 {latency_p95_ms:.1f}), "
                 "{samples_per_second:,.0f} {unit}/s in batches of {batch_size}"
                 .format(unit=unit, **result))
    if len(rows) > 20:
        lines.append(f"the 20 classes of {len(rows)} with the lowest F1; --output FILE.json holds "
                     "all")
        rows = sorted((row for row in rows if row["samples"]), key=lambda row: row["f1"])[:20]
    if rows:
        width = max(5, *(len(row["class"]) for row in rows))
        lines.append(f"{'class':{width}}  precision  recall     F1     AP  {unit}")
    form = "{class:{width}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {average_precision:5.3f}  "
    return lines + [(form + "{samples:,}").format(width=width, **row) for row in rows]


def same_data(results):
    """Whether all results have the same samples and metrics, so that they can be compared."""
    keys = {(row["data"], row["split"], row["samples"], *row) for row in results}
    return len(keys) == 1


def side_by_side(results):
    """Lines of a table: a row for each metric, a column for each checkpoint.

    A star marks the best value of a row if all were scored on the same data.
    """
    results = list(map(scalars, results))
    plain = ("checkpoint", "data", "split", "samples", "tta", "batch_size")
    comparable, paths = same_data(results), [Path(result["checkpoint"]) for result in results]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(Path(*path.parts[-2:])) for path in paths]
    rows = [["", *names]]
    for metric in dict.fromkeys(name for result in results for name in result if name not in plain):
        values = [result.get(metric, math.nan) for result in results]
        known = [value for value in values if not math.isnan(value)]
        best = (max if higher_is_better(metric) else min)(known, default=None)
        marked = comparable and not metric.startswith(("confidence", "entropy"))
        cells = [f"{'*' if marked and value == best else ''}{value:.4f}" for value in values]
        rows.append([metric, *("-" if cell == "nan" else cell for cell in cells)])
    form = "{:24}" + "".join(f"{{:>{max(14, len(name) + 1)}}}" for name in names)
    notes = [] if comparable else ["they were scored on different data, so none is marked"]
    if comparable:
        main = "accuracy" if "accuracy" in results[0] else "solve_rate"
        best = max(results, key=lambda result: result.get(main, 0))
        notes = [f"highest {main}: {best['checkpoint']}"]
    return [form.format(*row) for row in rows] + notes


def draw_report(output, result, predictions):
    """Draw pictures of a checkpoint's `result` beside the file `output`; their paths.

    `predictions` is None or (probabilities [N, K], labels [N], images uint8 [N, H, W, C],
    metadata); it gives the confusion matrix, the reliability diagram and the most confident
    mistakes.
    """
    beside, made = lambda kind: output.with_name(f"{output.stem}-{kind}.png"), {}
    if predictions is not None:
        p, labels, images, meta = predictions
        names = [short(name) for name in meta["classes"]]
        title = f"{result['checkpoint']} on {result['split']}"
        title += ", with --tta" if result["tta"] else ""
        matrix = result["confusion_matrix"]
        made["confusion"] = save_confusion(beside("confusion"), matrix, names, title)
        made["reliability"] = save_reliability(beside("reliability"), p, labels, title)
        chosen, confidence = p.argmax(1), p.max(1)
        wrong = np.flatnonzero(chosen != labels)
        first = wrong[np.argsort(-confidence[wrong], kind="stable")[:24]]
        title += f"\nthe most confident of {len(wrong):,} mistakes in {len(p):,}"
        titles = [f"{names[labels[i]]}, taken for\n{names[chosen[i]]} {confidence[i]:.0%}"
                  for i in first]
        start = (images.shape[1] - meta["image_size"]) // 2
        centre = slice(start, start + meta["image_size"])
        images = np.array(images[first])[:, centre, centre]
        made["mistakes"] = save_contact_sheet(beside("mistakes"), images, titles, title)
    return [beside(kind) for kind, done in made.items() if done]


# --------------------------------------------------------------------------------------- pictures
# Each function draws with matplotlib, without a window, and returns False if it is not installed.


def drawn(draw):
    """Decorator: a function (path, …) that writes the PNG of draw(figure, …)."""

    @functools.wraps(draw)
    def write(path, *arguments, **options):
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError:
            return False
        png = io.BytesIO()
        # names of classes are no TeX, and may have letters that no installed font has
        with rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = Figure(layout="constrained")
            draw(figure, *arguments, **options)
            figure.savefig(png, format="png", dpi=120, bbox_inches="tight", pad_inches=0.1)
        write_atomic(path, png.getvalue())
        return True

    return write


def short(name, most=20):
    """`name` without its middle if it is longer than `most`; long names often differ at the end."""
    half = most // 2 - 1
    return name if len(name) <= most else f"{name[:half]}..{name[-half:]}"


@drawn
def save_curve(figure, x, y, marks):
    """y over x on a log axis, with a vertical line for each of `marks` {name: x}."""
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    axes.semilogx(x, y, color="black")
    for i, (name, value) in enumerate(marks.items()):
        axes.axvline(value, color=f"C{i}", linestyle="--", label=f"{name}: {value:.1e}")
    axes.set(xlabel="learning rate", ylabel="smoothed loss", title="Learning-rate range test")
    low, high = min(y), min(max(y), 1.5 * y[0])  # a diverging end would flatten the rest
    axes.set_ylim(low - 0.05 * (high - low), high + 1e-3)
    axes.xaxis.set_major_formatter("{x:.0e}")
    axes.legend()


@drawn
def save_history(figure, rows, metric):
    """Curves of the loss, `metric` and the learning rate over `rows` (a dict for each epoch)."""
    figure.set_size_inches(12, 3.6)
    marker = "." if len(rows) < 40 else ""
    for axes, name in zip(figure.subplots(1, 3), ("loss", metric, "lr")):
        for split in ("lr",) if name == "lr" else ("train", "val", "ema", "swa"):
            key = name if name == "lr" else f"{split}_{name}"
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points), marker=marker, label=split)
        axes.legend()
        title = "learning rate at its end" if name == "lr" else name.replace("_", " ")
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


@drawn
def save_confusion(figure, matrix, classes, heading):
    """Counts [true][predicted], each row coloured by its shares; names and numbers if they fit."""
    matrix, count = np.asarray(matrix), len(classes)
    side = min(20.0, 3.2 + 0.42 * count)
    figure.set_size_inches(side + 0.8, side)
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, fraction=0.046, label="share of the true class")
    if count <= 100:
        ticks = {"ticks": range(count), "labels": classes, "fontsize": 10 if count <= 40 else 7}
        axes.set_xticks(**ticks, rotation=90)
        axes.set_yticks(**ticks)
    for i, j in zip(*matrix.nonzero()) if count <= 25 else ():
        color = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=color, fontsize=7)
    title = f"{heading}\n{np.trace(matrix):,} of {matrix.sum():,} right"
    axes.set(xlabel="predicted", ylabel="true", title=title)


@drawn
def save_reliability(figure, p, labels, heading, bins=15):
    """Accuracy over confidence in equal bins, above the share of samples (p [N, K], labels [N])."""
    figure.set_size_inches(5, 6.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    error, confidence, accuracy, share = calibration(p, labels, bins)
    middle = (np.arange(bins) + 0.5) / bins
    bars = {"width": 1 / bins, "edgecolor": "white"}
    top.bar(middle, accuracy, color="C0", label="accuracy", **bars)
    top.plot([0, 1], [0, 1], color="black", linestyle="--", label="perfectly calibrated")
    full = share > 0
    top.plot(confidence[full], accuracy[full], "C3o", markersize=4, clip_on=False,
             label="at its mean confidence")
    title = f"{heading}\nexpected calibration error {error:.3f}"
    top.set(ylabel="accuracy", ylim=(0, 1), title=title)
    top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=2, frameon=False, fontsize=8)
    bottom.bar(middle, share, color="C7", **bars)
    bottom.set(xlabel="confidence", ylabel="share of samples", xlim=(0, 1))


def displayable(images):
    """Images [..., 3] from images [..., C]: the first three channels, or the first one repeated."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., [0, 0, 0]]


@drawn
def save_contact_sheet(figure, images, titles, heading):
    """Up to 24 uint8 images [H, W, C] in rows of six, each under its title."""
    rows = max(1, math.ceil(len(images) / 6))
    figure.set_size_inches(12, 2.5 * rows + 0.5)
    figure.suptitle(heading)
    for axes in figure.subplots(rows, 6, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title in zip(figure.axes, images, titles):
        axes.imshow(displayable(image))
        axes.set_title(title, fontsize=8)


def picture_grid(inputs, mean, std):
    """uint8 [H, W, 3]: up to 16 normalised inputs float [B, C, h, w] in rows of four."""
    mean, std = (torch.tensor(values, device=inputs.device)[:, None, None] for values in (mean, std))
    x = ((inputs * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu()
    x = displayable(x)[:16]
    x = torch.cat([x, x.new_zeros(-len(x) % 4, *x.shape[1:])])
    return torch.cat([torch.cat(list(row), 1) for row in x.split(4)]).numpy()


def prediction_rows(paths, p, classes):
    """A flat dict for each file: its up to five most probable classes, p float [N, K]."""
    rows = []
    for path, shares, chosen in zip(paths, *(x.tolist() for x in p.topk(min(5, p.shape[1])))):
        row = {"file": str(path)}
        for place, share, k in zip(["", 2, 3, 4, 5], shares, chosen):
            row |= {f"class{place}": classes[k], f"probability{place}": share}
        rows.append(row)
    return rows


def prediction_line(row):
    """The text of one of `prediction_rows`."""
    file, *rest = row.values()
    return f"{file}: " + ", ".join(f"{name} {p:.1%}" for name, p in zip(rest[::2], rest[1::2]))


def exported(model, batches, suffix, facts):
    """The bytes of a `.pt2` or `.onnx` file that computes model(batch), its first dimension dynamic.

    The program is made from the first of `batches`, read back and compared with the model on all.
    `facts`, a JSON object, is stored as `facts.json` or as ONNX metadata. ValueError if the exporter
    cannot follow the model or its program differs.
    """
    buffer, shapes = io.BytesIO(), ({0: torch.export.Dim("batch", min=1)},)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own code
            program = torch.export.export(model, (batches[0],), dynamic_shapes=shapes)
            if suffix == ".pt2":
                torch.export.save(program, buffer, extra_files={"facts.json": json.dumps(facts)})
                run = torch.export.load(io.BytesIO(buffer.getvalue())).module()
            else:
                import onnx
                import onnx.reference

                proto = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
                texts = {name: json.dumps(fact) for name, fact in facts.items()}
                onnx.helper.set_model_props(proto, texts)
                buffer.write(proto.SerializeToString())
                session = onnx.reference.ReferenceEvaluator(proto)
                name = session.input_names[0]
                run = lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
    except (RuntimeError, ImportError, torch.onnx.errors.OnnxExporterError) as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"--export: the exporter failed ({reason})") from None
    for batch in batches:
        with torch.no_grad():
            if not torch.allclose(run(batch), model(batch), atol=1e-4):
                raise ValueError("--export: the program differs from the model; nothing was written")
    return buffer.getvalue()


# ----------------------------------------------------------------------------- device and memory


def set_up_device(name="auto", amp="auto", channels_last=True, deterministic=True, memory_gb=None):
    """(device, dtype of autocast, memory format, notes for the log). Mutates the process.

    On CUDA: TF32, deterministic or benchmarked cuDNN, and a cap on memory, since Windows would
    silently spill into the system's. On a CPU see `keep_freed_memory`. MPS gets no channels_last,
    whose backward pass is wrong there (pytorch #175189, #175190).
    """
    device = pick_device(name)
    dtype, reason = pick_precision(amp, device)
    last = channels_last and device.type != "mps"
    memory_format = torch.channels_last if last else torch.contiguous_format
    notes = [f"{str(dtype).removeprefix('torch.')} ({reason})", *["channels_last"] * last]
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = not deterministic
        cap = memory_cap(device, memory_gb)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap / total, device)
        cudnn = "deterministic" if deterministic else "benchmarked"
        notes += ["TF32", f"cuDNN {cudnn}", f"at most {cap / 2**30:.1f} GB"]
    elif device.type == "cpu" and keep_freed_memory():
        notes.append("freed memory kept")
    return device, dtype, memory_format, notes


def pick_device(name="auto"):
    """The torch.device `name`; auto: the first there is of cuda, mps, cpu. ValueError if absent."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    available = [kind for kind in found if found[kind]]
    kind, colon, index = (available[0] if name == "auto" else name).partition(":")
    numbered = kind == "cuda" and re.fullmatch(r"\d{1,4}", index)
    if kind not in available or (colon and not numbered):
        raise ValueError(f"--device {name}: not on this machine; it has {available}")
    if kind != "cuda":
        return torch.device(kind)
    count, index = torch.cuda.device_count(), int(index or torch.cuda.current_device())
    if index >= count:
        raise ValueError(f"--device {name}: this machine has {count} CUDA devices, counted from 0")
    return torch.device("cuda", index)


def cpu_has_amx():
    """Whether the CPU has AMX, which makes bf16 3.5 to 7 times as fast as fp32, else far slower."""
    # torch 2.10 has no public torch.cpu.get_capabilities
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def pick_precision(amp, device):
    """(dtype of autocast, reason); float32 means off. `amp` is auto, True, False, fp16 or bf16.

    auto and True: bf16 on CUDA, fp16 if the GPU has none, but float32 on the GTX 16 series, whose
    fp16 gives NaN; bf16 on a CPU with AMX; else float32.
    """
    if amp in ("False", "bf16"):
        return torch.bfloat16 if amp == "bf16" else torch.float32, "asked for"
    if amp == "fp16":
        slow = ", many times slower than float32 on a CPU" if device.type == "cpu" else ""
        return torch.float16, "asked for" + slow
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "supported by this GPU"
        if "GTX 16" in torch.cuda.get_device_name(device):
            return torch.float32, "fp16 gives NaN on the GTX 16 series"
        return torch.float16, "this GPU has no bf16"
    if device.type == "cpu" and cpu_has_amx():
        return torch.bfloat16, "this CPU has AMX"
    return torch.float32, f"mixed precision gains nothing on this {device.type}"


def memory_cap(device, memory_gb=None):
    """Bytes that this process may take on `device`: memory_gb, or 95% of a GPU; else no limit."""
    cap = memory_gb * 2**30 if memory_gb else math.inf
    if device.type != "cuda":
        return cap
    total = torch.cuda.get_device_properties(device).total_memory
    return min(total, cap) if memory_gb else 0.95 * total


def keep_freed_memory(keep=True):
    """Mutates the process: glibc keeps freed blocks and does not return large ones to the system.

    Training on a CPU is 5 to 30% faster, and keeps its peak of memory. False without glibc. `keep`
    False sets what glibc adapts to in a long-running program.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    # M_TRIM_THRESHOLD -1, M_MMAP_THRESHOLD -3 and M_MMAP_MAX -4 of malloc.h
    options = {-1: -1, -4: 0} if keep else {-1: 64 * 2**20, -4: 65536, -3: 32 * 2**20}
    return all(mallopt(option, value) for option, value in options.items())


def free_bytes(device):
    """Free memory in bytes on the GPU, else of the machine (4 GiB if it cannot be read)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s*(\d+) kB", text)[1]) * 1024
    except (OSError, TypeError):
        return 4 * 2**30


# -------------------------------------------------------------------------------- many processes


def world():
    """(rank, number of processes) of torch.distributed; (0, 1) where it is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def processes(device, seconds):
    """Join the processes that torchrun started, if any, and leave them after the block.

    With `device` cuda each takes the GPU of its local rank and NCCL, else the CPU and Gloo. Waiting
    longer than `seconds` for another one is an error. Raises ValueError if torchrun's variables are
    incomplete or the device is unsuitable.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(f"{name}: is not set, others of torchrun's variables are; start with "
                             "torchrun")
    kind = pick_device(device).type
    if kind == "mps" or ":" in device or not dist.is_available():
        raise ValueError(f"--device {device}: several processes need cuda, one GPU each, or cpu")
    if kind == "cuda":
        torch.cuda.set_device(pick_device(f"cuda:{os.environ['LOCAL_RANK']}"))
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    timeout = timedelta(seconds=seconds)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun's store outlives restarts; the prefix hides the addresses of dead processes
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=count)
    except (RuntimeError, ValueError) as error:
        place = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        raise ValueError(f"torchrun: the processes did not meet at {place} ({one_line(error)}); "
                         "look there") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first(first=True):
    """Processes with `first` True run the block before the others, who wait for up to a day."""
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


def all_reduce(tensor, operation="SUM"):
    """Mutates `tensor` to its SUM, MAX or MIN over all processes, and returns it."""
    if world()[1] > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def any_process(flag):
    """Whether `flag` is true in any process."""
    return bool(all_reduce(torch.tensor(float(bool(flag)))))


def check_agreement(facts):
    """ValueError that names the first of `facts` {name: value} that differs among the processes."""
    rank, count = world()
    codes = torch.zeros(count, len(facts), dtype=torch.int64)
    codes[rank] = torch.tensor([zlib.crc32(repr(fact).encode()) for fact in facts.values()])
    for name, column in zip(facts, all_reduce(codes).T):
        if len(column.unique()) > 1:
            raise ValueError(f"the processes have different {name}; start them all with the same "
                             "flags, data and torch")


def lost_process(error):
    """Whether an error says that another process ended or was silent for too long."""
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo" in str(error)


# ---------------------------------------------------------------------------------------- copying


def copy_definitions(names, folder):
    """The text of one Python file: the top-level definitions `names` of the kit in `folder`.

    It holds what they need, imports included, and nothing else. ValueError for an unknown name.
    """
    kit, places = read_kit(folder), {}
    for name in names:
        if name not in kit or kit[name][0][0][0] < 0:  # unknown, or an import
            raise ValueError(f"--copy {shorten(name)}: is no function, class or constant here; "
                             f"{nearest(name, kit)}")
    todo = list(dict.fromkeys(names))
    for name in todo:  # it grows
        for place, text, uses in kit[name]:
            places[text] = min(place, places.get(text, place))
            todo += uses & kit.keys() - set(todo)
    texts = sorted(places, key=places.get)
    imports = "\n".join(text for text in texts if places[text][0] < 0)
    head = f"{', '.join(names)}: copied from the training kit with all they need. MIT License."
    blocks = [f'"""{textwrap.fill(head, 95)}"""\n\n{imports}']
    return "\n\n\n".join(blocks + [text for text in texts if places[text][0] >= 0]) + "\n"


def read_kit(folder):
    """{name: [(place, text, names used)]} of the statements that define or import a name.

    Sorted by place, imports come first, then the leaves, then train.py. References to other files,
    such as `utils.world`, become plain names.
    """
    kit = {}
    for rank, file in enumerate(("model", "data", "utils", "train")):
        lines = (Path(folder) / f"{file}.py").read_text("utf-8").split("\n")
        for node in ast.parse("\n".join(lines)).body:
            for alias in getattr(node, "names", ()):  # of an import
                text = ast.unparse(type(node)(**{**vars(node), "names": [alias]}))
                place = -1, text.startswith("from"), text
                kit.setdefault(alias.asname or alias.name.split(".")[0], [(place, text, set())])
            first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))]) - 1
            while lines[first - 1].startswith("#"):  # comments belong to what follows them
                first -= 1
            text, walked = "\n".join(lines[first : node.end_lineno]), list(ast.walk(node))
            local = {x.arg for x in walked if isinstance(x, ast.arg)}
            local |= {x.id for x in walked if isinstance(getattr(x, "ctx", None), ast.Store)
                      and isinstance(x, ast.Name)}
            uses = {x.id for x in walked if isinstance(x, ast.Name)} - local
            if file == "train":  # the only file that refers to the others
                uses |= {x.attr for x in walked if isinstance(x, ast.Attribute)
                         and getattr(x.value, "id", None) in ("models", "data", "utils")}
                uses -= {"models", "data", "utils"}
                text = re.sub(r"(?<![\w.])(models|data|utils)\.(?=[a-zA-Z_])", "", text)
            targets = [getattr(x, "value", x) for x in getattr(node, "targets", ())]  # T of T[i] = 1
            defined = {x.id for y in targets for x in ast.walk(y) if isinstance(x, ast.Name)}
            for name in defined | {getattr(node, "name", None)} - {None}:
                kit.setdefault(name, []).append(((rank, first), text, uses - {name}))
    return kit
