"""Evidence of a run: checkpoints, logs, flags, metrics, pictures; devices, processes, copying.

Imports torch, numpy, tqdm and the standard library; others only in the functions that need them.
"""

import ast
import contextlib
import csv
import ctypes
import difflib
import errno
import importlib.util
import inspect
import io
import itertools
import json
import logging
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
from argparse import ArgumentParser, ArgumentTypeError
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

FORMAT_VERSION = 1


# ------------------------------------------------------------------------------------ checkpoints


def write_atomic(path, content, previous=None):
    """Replace the file at `path` by `content` (bytes): at any time the old or the new one is whole.
    The old one is renamed to `previous`, if that name is given. An OSError names `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
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
    """Write nested dicts and lists of tensors and primitives to `path`, atomically; an existing
    `last.pt` becomes `previous.pt`. ValueError if a tensor holds a NaN or an infinity."""
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
    """The checkpoint at `path`, on the CPU. ValueError if it is missing, damaged or too new.
    `legacy` admits files of torch before 1.6, which have no checksums."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; give a .pt file, such as a run's best.pt")
    try:
        if zipfile.is_zipfile(path) or not legacy:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load ignores checksums
                    raise zipfile.BadZipFile(f"damaged at {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except torch.serialization.pickle.UnpicklingError:
        raise ValueError(f"{path}: holds more than tensors and primitives; give another")
    except Exception as error:  # damaged files make zipfile and torch raise almost any type
        if isinstance(error, OSError | MemoryError) or re.search("memory|DataLoader", str(error)):
            raise  # the file is not at fault
        raise ValueError(f"{path}: not a whole checkpoint ({one_line(error)}); use another one")
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, no checkpoint")
    version = checkpoint.get("format_version", 0)
    if not isinstance(version, int) or version not in range(FORMAT_VERSION + 1):
        raise ValueError(f"{path}: format {version}, this kit reads up to {FORMAT_VERSION}")
    return checkpoint


def load_newest(folder, needed=("step",), log=print, set_aside=True):
    """The checkpoint with the higher step of `last.pt` and `previous.pt`; None without files. A
    damaged one is renamed to `*.damaged` if `set_aside`, for holders of the `lock`."""
    folder, usable = Path(folder), []
    for path in filter(os.path.exists, (folder / "last.pt", folder / "previous.pt")):
        try:
            checkpoint = load_checkpoint(path)
            if "format_version" not in checkpoint:
                raise ValueError(f"{path}: is no checkpoint of this kit")
            usable.append(checkpoint)
        except OSError as error:
            log(f"warning: {path}: {error.strerror}; passed over")
        except ValueError as error:
            if "this kit reads up to" in str(error):
                raise
            if set_aside:
                names = (path.with_suffix(f".damaged{n or ''}") for n in itertools.count())
                aside = next(name for name in names if not name.exists())
                os.replace(path, aside)
                log(f"warning: {error}; set aside as {aside.name}")
    for key, checkpoint in itertools.product(needed, usable):
        if key not in checkpoint:
            raise ValueError(f"{folder}: its checkpoint has no {key}: another version of the kit "
                             "wrote it; use that, or start a new run")
    if not usable and has_checkpoints(folder):
        raise ValueError(f"--resume {folder.name}: its checkpoints are damaged or cannot be read; "
                         f"start anew, perhaps with --pretrained {folder / 'best.pt'}")
    return max(usable, key=lambda checkpoint: checkpoint["step"], default=None)


def has_checkpoints(folder):
    """Whether `folder` holds the state of a run, be it damaged."""
    names = ("last.pt", "previous.pt", "*.damaged*")
    return any(any(Path(folder).glob(name)) for name in names)


def one_line(error):
    """The error's text on one line, control characters escaped, cut to 200 characters."""
    return (repr(str(error))[1:-1].split("\\n")[0] or type(error).__name__)[:200]


# --------------------------------------------------------------------------- run folder and logs


def named_run(runs, name, usable, problem):
    """The folder `name` or runs/name, if it is `usable`; a ValueError lists some that are."""
    for folder in (Path(name), Path(runs) / name):
        if usable(folder):
            return folder
    others = [path.name for path in sorted(Path(runs).glob("*")) if usable(path)]
    like = sorted(difflib.get_close_matches(Path(name).name, others, 5, 0)) or ["none"]
    raise ValueError(f"{problem}; in {Path(runs).resolve()} there are {', '.join(like)}")


def checkpoint_of(runs, name):
    """The file `name`, or the best.pt of the run `name` (a folder, or one in `runs`)."""
    if Path(name).is_file():
        return Path(name)
    problem = f"{name}: no such checkpoint; give a .pt file of a run, or a run"
    return named_run(runs, name, lambda run: (run / "best.pt").is_file(), problem) / "best.pt"


def find_run(runs, name):
    """The folder `name` or runs/name; for "" the unfinished run whose config.json is newest."""
    if name:
        problem = f"--resume {shorten(name)}: no such run with a checkpoint"
        return named_run(runs, name, has_checkpoints, problem)
    files = sorted(Path(runs).glob("*/config.json"), key=lambda file: -file.stat().st_mtime_ns)
    for folder in (file.parent for file in files):  # another process may hold the run
        newest = load_newest(folder, ("step", "finished"), set_aside=False)
        if newest and not newest["finished"]:
            return folder
    raise ValueError(f"--resume: no unfinished run with a checkpoint in {Path(runs).resolve()}; "
                     "start one without --resume")


def dated_name(model):
    """A run's name from its model and the first process's clock."""
    now = torch.tensor(time.time() * (world()[0] == 0), dtype=torch.float64)
    return f"{model}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(all_reduce(now).item()))}"


def check_unused(folder):
    """ValueError if a folder holds more than what a run leaves that was killed before it began."""
    if any(file.name != "lock" and file.suffix != ".partial" for file in folder.glob("*")):
        raise ValueError(f"--run_name {folder.name}: {folder} exists; choose another name, or "
                         f"--resume {folder.name}")


def lock(folder):
    """The open file `lock` in `folder`, locked until it is closed or the process ends. Removes
    partial files of killed processes. ValueError if another process has locked it."""
    file = open(Path(folder) / "lock", "a+", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(2**20)  # beyond the text: Windows lets nobody read locked bytes
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not inherit it
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(f"{folder}: in use by {file.read().strip()}; wait, or choose another run")
    except OSError:
        return file  # the file system has no locks
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {platform.node()}\n")
    file.flush()
    for stale in Path(folder).glob(".*.partial"):
        stale.unlink()
    return file


def environment():
    """What a result depends on besides its flags: versions, machine, git commit ("" if unknown)."""
    command, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "platform": platform.platform(), "gpu": gpu,
            "git_commit": commit, "processes": world()[1]}


def logger(path=os.devnull, past=()):
    """A function log(line) for the terminal and the file at `path`, which `past` lines begin."""
    if world()[0]:  # only the first of several processes logs
        return lambda line: None

    def write(lines):
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    def log(line):
        with contextlib.suppress(OSError):  # a closed terminal or a full disk does not end the run
            tqdm.write(line, file=sys.stdout)  # above any progress bar
            sys.stdout.flush()
        write([line])

    write(past)
    return log


def progress_bar(title, total, unit, quiet):
    """A tqdm bar on a terminal; elsewhere `show` prints lines; neither for a total below 100."""
    hidden, terminal = quiet or total < 100 or world()[0] > 0, sys.stderr.isatty()
    width = shutil.get_terminal_size().columns  # tqdm takes a width of 0 as it is
    bar = tqdm(desc=title, total=total, unit=f" {unit}", leave=False, ncols=width,
               bar_format="{desc} {percentage:3.0f}% |{bar}| {rate_fmt}{postfix}",
               disable=hidden or not terminal)
    bar.title, bar.shown_at = title, time.monotonic()
    bar.interval = math.inf if hidden else 0.5 if terminal else 30
    return bar


def show(bar, text_of, *arguments):
    """Show text_of(*arguments), at the bar's own rate: making it may wait for the GPU."""
    now = time.monotonic()
    if now - bar.shown_at >= bar.interval:
        bar.shown_at = now
        text = text_of(*arguments)
        if bar.disable:
            with contextlib.suppress(OSError):  # a closed pipe does not end the run
                tqdm.write(f"{bar.title}, {text}", file=sys.stderr)
        else:
            bar.set_postfix_str(text, refresh=False)


def duration(seconds):
    """A time in words: seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def class_counts(counts, names):
    """The number of images of each class as text; of many classes, those with most and least."""
    pairs = sorted(zip(counts, names), reverse=True)
    texts = [f"{short(name)} {count:,}" for count, name in pairs]
    if len(texts) > 10:
        texts[3:-3] = ["..."]
    return f"{len(pairs)}: {', '.join(texts)}"


def write_results(path, results):
    """Write dicts to `path`: to .csv without their lists, to .json all, one result by itself."""
    if str(path).endswith(".csv"):
        write_csv(path, results)
    else:
        write_json(path, results if len(results) > 1 else results[0])


def write_csv(path, rows):
    """Write dicts to `path` as one CSV file, with a column for each key that holds no list."""
    names = dict.fromkeys(name for row in rows for name, value in row.items()
                          if not isinstance(value, list | np.ndarray))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
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


def trackers_available(tensorboard, wandb):
    """ValueError if a tracker that was asked for is not installed."""
    for name, asked in (("tensorboard", tensorboard), ("wandb", wandb)):
        if asked and missing(name):
            raise ValueError(f"--{name} needs the package {name}: pip install {name}")


def trackers(folder, step, config, tensorboard, wandb):
    """Functions track(step, {name: number}) of the trackers asked for, from `step` on."""
    tracks = []
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=step + 1)  # of steps lost in a crash

        def write(step, values):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        tracks.append(write)
    if wandb:
        import wandb as client

        name = folder.name
        try:
            run = client.init(dir=str(folder), name=name, id=name, resume="allow", config=config)
        except client.Error as error:
            raise OSError(f"--wandb: {one_line(error)}; log in, or set WANDB_MODE=offline")
        tracks.append(lambda step, values: run.log(values, step=step))
    return tracks


FORMATS = {"loss": "{:.4f}", "accuracy": "{:.2%}", "solve_rate": "{:.2%}", "violations": "{:.2f}",
           "cell_accuracy": "{:.2%}", "confidence": "{:.3f}", "entropy": "{:.3f}"}


def metrics_line(numbers):
    """The metrics of FORMATS that are in `numbers`, with their levels."""
    parts = []
    for name, form in FORMATS.items():
        if name in numbers:
            levels = [f"{key.removeprefix(f'{name}_')} {form.format(value)}"
                      for key, value in numbers.items() if key.startswith(f"{name}_")]
            more = f" ({', '.join(levels)})" if len(levels) > 1 else ""
            parts.append(f"{name} {form.format(numbers[name])}{more}")
    return ", ".join(parts)


def epoch_line(row, monitor, unit, epochs, new_best):
    """The log's line for an epoch's `row` of metrics.csv, with more on the EMA or validation."""
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
    detailed = "ema" if "ema_loss" in row else "val"
    for split in ("train", "val", "ema", "swa"):
        names = ["loss", monitor]
        if split == detailed:
            names = [*FORMATS, *(monitor + level for level in SUDOKU_LEVELS)]
        numbers = {name: row[f"{split}_{name}"] for name in names if f"{split}_{name}" in row}
        if numbers:
            parts.append(f"{split} {metrics_line(numbers)}")
    rate = f"lr {row['lr']:.2e}" if row["lr"] > 1e-7 else "lr near 0, as scheduled"
    parts += [f"{row['seconds']:.1f} s", f"{row['samples_per_second']:,.0f} {unit}/s", rate]
    if row["bad_steps"]:
        parts.append(f"{row['bad_steps']} bad steps")
    return " | ".join([*parts, "new best"] if new_best else parts)


@contextlib.contextmanager
def catch_signals(gently=True):
    """Yields a list that receives the number of SIGINT, SIGTERM or SIGHUP; a second ends at once.
    Without `gently` the first one raises KeyboardInterrupt with its number."""
    received = []

    def handle(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)
        if not gently:
            raise KeyboardInterrupt(number)

    with contextlib.ExitStack() as undo:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                undo.callback(signal.signal, number, signal.signal(number, handle))
        yield received


# ------------------------------------------------------------------------------ flags and presets


def number(kind, low=-math.inf, high=math.inf, open_low=False, open_high=False, word=None):
    """An argparse type: a finite int or float (`kind`) within bounds, or the string `word`."""
    wanted = "an integer" if kind is int else "a number"
    if low > -math.inf:
        wanted += f" {'above' if open_low else 'at least'} {low:g}"
    if high < math.inf:
        wanted += f" and {'below' if open_high else 'at most'} {high:g}"
    if word:
        wanted += f" or {word}"

    def parse(text):
        if text == word:
            return text
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            outside = (open_low and value == low) or (open_high and value == high)
            if low <= value <= high and math.isfinite(value) and not outside:
                return value
        raise ArgumentTypeError(f"must be {wanted}, got {shorten(text)}")

    return parse


def boolean(text):
    """An argparse type: True or False, also in lower case."""
    if text not in ("True", "False", "true", "false"):
        raise ArgumentTypeError(f"must be True or False, got {shorten(text)}")
    return text.lower() == "true"


def file_path(text):
    """An argparse type: the text itself if a file could have that name."""
    if not text:
        raise ArgumentTypeError("is empty; give a path")
    with contextlib.suppress(UnicodeEncodeError):  # half a surrogate pair
        if b"\0" not in os.fsencode(text):
            return text
    raise ArgumentTypeError(f"is a name that no file can have, got {shorten(text)}; give another")


def run_name(text):
    """An argparse type: a plain folder name, which cannot leave runs/."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text) or re.search(r"\.\.|\.$", text):
        raise ArgumentTypeError("must be 1 to 64 letters, digits, '.', '_' or '-', the first a "
                                f"letter or digit, got {shorten(text)}")
    return text


def shorten(value):
    """The repr of a user's input, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Parser(ArgumentParser):
    """argparse whose errors are one line, after the text `where`, with exit status 2."""

    where = ""

    def error(self, message):
        fail(self.where + re.sub("^argument ([^/:]+)[^:]*", r"\1", message))  # its first name


def fail(message):
    """End the program with exit status 2 and one line on standard error."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    if len(line) > 1000:  # the end says what to do
        line = f"{line[:700]} ... {line[-250:]}"
    rank = os.environ.get("RANK", "0")
    print(f"error: {f'process {rank}: ' * (rank != '0')}{line}", file=sys.stderr)
    raise SystemExit(2)


def message_of(error):
    """The message for a ValueError or an OSError; an OSError's path comes first."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    full = error.errno == errno.ENOSPC
    hint = "make room there" if full else "look at the path and at who may use it"
    return f"{error.filename}: {error.strerror}; {hint}"


def nearest(name, names):
    """A question after the one of `names` that is most like `name`."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else "see --help"


def raise_first(conditions):
    """ValueError with the message of the first of (condition, message) whose condition is true."""
    for wrong, message in conditions:
        if wrong:
            raise ValueError(message)


def check_output(path, suffixes, inputs):
    """ValueError unless the --output file `path` can be written; `inputs` are paths or None."""
    path = Path(path)
    where, folder = f"--output {path}:", path.parent
    used = path.exists() and any(path.samefile(x) for x in inputs if x and Path(x).exists())
    used |= path.name in ("config.json", "metrics.csv") and (folder / "lock").exists()  # a run's
    raise_first((
        (len(os.fsencode(path.name)) > 200,  # the temporary's name is longer, and 255 is the limit
         f"{where} must be a name of at most 200 bytes; shorten it"),
        (path.suffix not in suffixes or path.is_dir() or not folder.is_dir(),
         f"{where} must be a {' or '.join(suffixes)} file in a folder that exists"),
        (not os.access(folder, os.W_OK), f"{where} its folder cannot be written to; take another"),
        (used, f"{where} is an input, or a file of the kit or of a run; choose another name"),
    ))


def parse_words(parser, words, aliases=None):
    """{flag: value} of words as on the command line; ends the program where one is bad. `aliases`
    {name: flag} are names that other kits give to flags, for the advice."""
    words = [re.sub("^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), w) for w in words]
    flags, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].split("=")[0]
        alias = (aliases or {}).get(name[2:])
        near = nearest(name, list(parser._option_string_actions))
        parser.error(f"{shorten(name)} is no flag; {f'did you mean --{alias}?' if alias else near}")
    return vars(flags)


def parse_preset(parser, path, name, modes):
    """{flag: value} of the preset `name` of the JSON file `path`, checked as on the command line and
    by its JSON types; ends the program where it is bad. `modes` are flags that no preset sets."""
    try:
        preset, words = read_preset(path, name)
    except (ValueError, OSError) as error:
        parser.error(message_of(error))
    parser.where = f"{path.name}: {name}: "
    flags = parse_words(parser, words)
    for key, value in preset.items():
        if key in modes:
            parser.error(f"{key} {shorten(value)}: is no flag for a preset")
        if isinstance(value, str) != isinstance(flags.get(key), str):
            parser.error(f"{key} {shorten(value)}: is of another type; give it as for --{key}")
    return flags


def read_preset(path, name):
    """(the preset `name` of the JSON file `path`, its words for a command line)."""
    try:
        presets = json.loads(path.read_text("utf-8"), object_pairs_hook=unique_keys)
        if not isinstance(presets, dict) or not all(type(x) is dict for x in presets.values()):
            raise ValueError('must be an object of objects, {"name": {"flag": value}}')
        if name not in presets:
            names = ", ".join(presets) or "none"
            raise ValueError(f"--config {shorten(name)} is no preset; there are {names}")
        return presets[name], preset_words(presets[name])
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name}: cannot be read as JSON in UTF-8 ({error})")
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}")


def unique_keys(pairs):
    """The dict of the (key, value) pairs of a JSON object. ValueError if a key stands twice."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shorten(key)} stands twice; remove one")
        found[key] = value
    return found


def preset_words(preset):
    """Words of a command line for a preset: {"lr": 1, "model_args": {"widths": [24, 64]}} gives
    --lr=1 --model_args widths=24,64. ValueError for a key that no flag can have."""
    words = []
    for key, value in preset.items():
        nested = value if isinstance(value, dict) else {}
        if value == {} or not all(re.fullmatch(r"[a-z]\w*", name) for name in (key, *nested)):
            raise ValueError(f"{shorten(key)} is no flag, or the keys of its object are no arguments")
        words.append(f"--{key}" if nested else f"--{key}={value}")
        for name, inner in nested.items():
            text = ",".join(map(str, inner)) if isinstance(inner, list) else inner
            words.append(f"{name}={text}")
    return words


def keyword_arguments(words, function, flag):
    """{name: value} of KEY=VALUE words for the parameters of `function` with defaults, and of their
    types; a tuple is integers with commas. ValueError that begins with `flag`."""
    reserved = ("num_classes", "in_channels", "values", "min_delta")  # the caller sets these
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()
                if p.default is not p.empty and p.name not in reserved}
    types = {bool: boolean, int: number(int), float: number(float),
             tuple: lambda text: tuple(map(int, text.split(",")))}
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{flag} {shorten(word)}: must be KEY=VALUE")
        if name not in defaults:
            raise ValueError(f"{flag} {shorten(name)}: is no argument; there are "
                             f"{', '.join(defaults)}; {nearest(name, defaults)}")
        default = defaults[name]
        try:
            values[name] = types.get(type(default), str)(text)
            if isinstance(default, tuple) and len(values[name]) != len(default):
                raise ValueError
        except ArgumentTypeError as error:
            raise ValueError(f"{flag} {name}: {error}")
        except ValueError:
            raise ValueError(f"{flag} {name}: must be {len(default)} integers with commas, got "
                             f"{shorten(text)}")
    return values


# ----------------------------------------------------------------------- metrics, reports, pictures


def higher_is_better(monitor):
    """Whether higher values of the metric `monitor` are better."""
    return not re.search("loss|violations|entropy|error", monitor)


def image_metrics(logits, labels):
    """(right predictions [1], None) of logits float [B, K] and labels int64 [B]. For labels
    that are shares float [B, K], a prediction counts with the share of its class."""
    chosen = logits.argmax(1)
    right = chosen == labels if labels.ndim == 1 else labels.gather(1, chosen[:, None])[:, 0]
    return right.sum(0, keepdim=True, dtype=torch.float32), None


def classification_report(p, labels, names):
    """A dict of metrics of probabilities p float [N, K] for labels int [N], numpy arrays, N > 0. A
    ratio of 0 samples is 0, as in scikit-learn; `mean_average_precision` is over the classes that
    occur, `entropy` in nats, `confusion_matrix` [true][predicted]."""
    count, classes = p.shape
    order = (-p).argsort(1, kind="stable")[:, :5]
    matrix = np.bincount(labels * classes + order[:, 0], minlength=classes**2).reshape(classes, -1)
    right, support, chosen = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    scores = {"precision": ratio(right, chosen), "recall": ratio(right, support),
              "f1": ratio(2 * right, support + chosen)}
    occurs = support + chosen > 0  # other data may lack a class
    means = {f"macro_{name}": score[occurs].mean() for name, score in scores.items()}
    means |= {f"weighted_{name}": score @ support / count for name, score in scores.items()}
    precision = np.array([average_precision(p[:, k], labels == k) for k in range(classes)])
    scores |= {"average_precision": precision, "samples": support, "class": names}
    return {
        "accuracy": right.sum() / count,
        **({"top5_accuracy": (order == labels[:, None]).any(1).mean()} if classes > 5 else {}),
        **means,
        "mean_average_precision": precision[support > 0].mean(),
        "calibration_error": calibration(p, labels)[0],
        "confidence": float(p.max(1).mean()),
        "entropy": float(-(p * np.log(p.clip(np.finfo(np.float32).tiny))).sum(1).mean()),
        "per_class": [dict(zip(scores, values)) for values in zip(*scores.values())],
        "confusion_matrix": matrix,
    }


def ratio(a, b):
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(len(b)), where=b > 0)


def average_precision(scores, positive):
    """Average precision of `scores` [N], equal ones together; 0 where none is `positive` [N]."""
    order = (-scores).argsort(kind="stable")
    last_of_score = np.append(np.diff(scores[order]) != 0, True)
    hits = positive[order].cumsum()[last_of_score]
    rank = np.flatnonzero(last_of_score) + 1
    return float((np.diff(hits, prepend=0) * hits / rank).sum() / max(1, positive.sum()))


def calibration(p, labels, bins=15):
    """(expected calibration error, confidence [bins], accuracy [bins], share of samples [bins]) in
    bins of equal width (arXiv:1706.04599)."""
    confidence, right = p.max(1).astype(float), p.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    share, sure, good = (np.bincount(index, x, bins) / len(p) for x in (None, confidence, right))
    return float(np.abs(good - sure).sum()), ratio(sure, share), ratio(good, share), share


SUDOKU_SCORES = ("solve_rate", "violations", "cell_accuracy", "confidence", "entropy")
SUDOKU_LEVELS = ("", "_easy", "_medium", "_hard")
SUDOKU_METRICS = tuple(score + level for level in SUDOKU_LEVELS for score in SUDOKU_SCORES)


def sudoku_metrics(logits, labels):
    """(numerators float [20], denominators int64 [20]) of SUDOKU_METRICS over a batch. The last of
    logits [S, B, 81, 9] counts. Labels are integers [B, 82]: the digit of each blank, 0 for a clue,
    and last the level, 0 easy to 2 hard. `solve_rate` (all blanks right) and `violations` (digits
    missing in rows, columns and boxes) are means over boards, the others over blanks."""
    answers, level = labels[:, :81].long(), labels[:, 81]
    log_p = logits[-1].float().log_softmax(-1)
    confidence, digit = log_p.max(-1)
    blank = answers > 0
    right = (digit + 1 == answers) & blank
    board = torch.nn.functional.one_hot(digit, 9).view(-1, 9, 9, 9)  # [B, row, column, digit]
    units = (board.sum(1), board.sum(2), board.view(-1, 3, 3, 3, 3, 9).sum((2, 4)))
    violations = sum((counts == 0).flatten(1).sum(1) for counts in units)
    blanks = blank.sum(1)
    cells = (right, confidence.exp() * blank, -(log_p.exp() * log_p).sum(-1) * blank)
    scores = [right.sum(1) == blanks, violations, *(score.sum(1) for score in cells)]
    counts = [torch.ones_like(blanks)] * 2 + [blanks] * 3
    groups = torch.stack([level >= 0, *(level == i for i in range(3))]).long()  # [4, B]
    # products and sums give [4, 5] each; autocast would round a matrix product
    return tuple((groups[:, None] * values).sum(2).flatten()
                 for values in (torch.stack(scores).float(), torch.stack(counts)))


def report_lines(result):
    """Lines with the metrics of one checkpoint and the (up to) 20 classes of lowest F1."""
    lines = [f"{name:24} {x:,.4f}" for name, x in result.items() if isinstance(x, float)]
    rows = [row for row in result.get("per_class", ()) if row["samples"]]
    if rows:
        lines.append("precision  recall     F1     AP  samples  class, the lowest F1 first"
                     "; --output FILE.json holds all")
    form = ("{precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {average_precision:5.3f}  {samples:7}  "
            "{class}")
    return lines + [form.format(**row) for row in sorted(rows, key=lambda row: row["f1"])[:20]]


def side_by_side(results):
    """Lines of a table: a row for each metric, a column for each checkpoint, a star at the best."""
    names = [result["checkpoint"] for result in results]
    form = "{:24}" + f"{{:>{max(14, *map(len, names)) + 2}}}" * len(names)
    lines = [form.format("", *names)]
    same_data = len({(x["data"], x["split"], x["samples"]) for x in results}) == 1
    found = [(name, x) for result in results for name, x in result.items()]
    for metric in dict.fromkeys(name for name, x in found if isinstance(x, float)):
        values = [result.get(metric, math.nan) for result in results]
        best = np.nanmax(values) if higher_is_better(metric) else np.nanmin(values)
        marked = same_data and not metric.startswith(("confidence", "entropy"))
        cells = [f"*{x:.4f}" if marked and x == best else f"{x:.4f}" for x in values]
        lines.append(form.format(metric, *cells))
    if not same_data:
        return [*lines, "they were scored on different data, so none is marked"]
    main = "accuracy" if "accuracy" in results[0] else "solve_rate"
    best = max(results, key=lambda result: result.get(main, 0))
    return [*lines, f"highest {main}: {best['checkpoint']}"]


def draw_report(output, result, predictions):
    """Draw pictures of a checkpoint's `result` beside the file `output`; their paths. `predictions`
    is None or (probabilities [N, K], labels [N], their `data.Split`, metadata)."""
    if predictions is None:
        return []
    p, labels, split, meta = predictions
    names, size = list(map(short, meta["classes"])), meta["image_size"]
    title = f"{result['checkpoint']} on {result['split']}{', with --tta' * result['tta']}"
    chosen, confidence = p.argmax(1), p.max(1)
    wrong = np.flatnonzero(chosen != labels)
    first = wrong[(-confidence[wrong]).argsort(kind="stable")[:24]]
    heading = f"{title}\nthe most confident of {len(wrong):,} mistakes in {len(p):,}"
    titles = []
    for i in first:
        text = f"{names[labels[i]]}, taken for\n{names[chosen[i]]} {confidence[i]:.0%}"
        titles.append(f"{text}\n{short(split.files[i])}" if len(split.files) else text)
    start = (split.images.shape[1] - size) // 2
    images = split.images[first][:, start : start + size, start : start + size]
    kinds = ("confusion", "reliability", "mistakes")
    paths = [output.with_name(f"{output.stem}-{kind}.png") for kind in kinds]
    made = [save_confusion(paths[0], result["confusion_matrix"], names, title),
            save_reliability(paths[1], p, labels, title)]
    if wrong.size:
        made.append(save_contact_sheet(paths[2], images, titles, heading))
    return paths[: len(made)] if all(made) else []


def drawn(draw):
    """Decorator: a function (path, …) that writes the PNG of draw(figure, …), without a window. It
    returns False where matplotlib is not installed."""

    def write(path, *arguments):
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
            draw(figure, *arguments)
            figure.savefig(png, format="png", dpi=120, bbox_inches="tight", pad_inches=0.1)
        write_atomic(path, png.getvalue())
        return True

    return write


def short(name):
    """`name`, at most 20 characters, without its middle: long names often differ at the end."""
    return name if len(name) <= 20 else f"{name[:9]}..{name[-9:]}"


@drawn
def save_curve(figure, x, y, marks):
    """y over x on a log axis, with a vertical line for each of `marks` {name: x}."""
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    axes.semilogx(x, y, color="black")
    for name, value in marks.items():
        axes.axvline(value, linestyle="--", label=f"{name}: {value:.1e}")
    axes.set(xlabel="learning rate", ylabel="smoothed loss", title="Learning-rate range test")
    axes.set_ylim(top=1.5 * y[0])  # a diverging end would flatten the rest
    axes.xaxis.set_major_formatter("{x:.0e}")  # without a formatter for mathematical text
    axes.xaxis.set_minor_formatter("")
    axes.legend()


@drawn
def save_history(figure, rows, metric):
    """Curves of the loss, `metric` and the learning rate over `rows` (a dict for each epoch)."""
    figure.set_size_inches(12, 3.6)
    for axes, name in zip(figure.subplots(1, 3), ("loss", metric, "lr")):
        for key in (name, *(f"{split}_{name}" for split in ("train", "val", "ema", "swa"))):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points), marker=".", label=key)
        values = [y for line in axes.get_lines() for y in line.get_ydata() if math.isfinite(y)]
        if name == "loss" and values:  # one spike does not flatten the rest
            axes.set_ylim(0, min(1.05 * max(values), 2 * np.percentile(values, 90)))
        axes.set(xlabel="epoch", title=name.replace("_", " "))
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


@drawn
def save_confusion(figure, matrix, classes, heading):
    """Counts [true][predicted], each row coloured by its shares; names and numbers if they fit."""
    count = len(classes)
    side = min(20.0, 3.2 + 0.42 * count)
    figure.set_size_inches(side + 0.8, side)
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, fraction=0.046, label="share of the true class")
    if count <= 100:
        axes.set_xticks(range(count), classes, fontsize=7, rotation=90)
        axes.set_yticks(range(count), classes, fontsize=7)
    for i, j in zip(*matrix.nonzero()) if count <= 25 else ():
        color = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=color, fontsize=7)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"{heading}\n{np.trace(matrix):,} of {matrix.sum():,} right")


@drawn
def save_reliability(figure, p, labels, heading):
    """Accuracy over confidence in bins of equal width, for p [N, K] and labels [N]."""
    figure.set_size_inches(5, 5.5)
    axes = figure.subplots()
    error, confidence, accuracy, share = calibration(p, labels)
    axes.plot([0, 1], [0, 1], "k--", label="perfectly calibrated")
    axes.scatter(confidence, accuracy, 1000 * share, clip_on=False, label="area: share of samples")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"{heading}\nexpected calibration error {error:.3f}")
    axes.legend()


@drawn
def save_contact_sheet(figure, images, titles, heading):
    """Up to 24 images [H, W, C], uint8 or float in [0, 1], in rows of six under their titles."""
    rows = max(1, math.ceil(len(images) / 6))
    figure.set_size_inches(12, 2.5 * rows + 0.5)
    figure.suptitle(heading)
    for axes in figure.subplots(rows, 6, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title in zip(figure.axes, images, titles):
        axes.imshow(image[..., :3] if image.shape[-1] >= 3 else image[..., [0, 0, 0]])
        axes.set_title(title, fontsize=8)


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
    """The bytes of a `.pt2` or `.onnx` program of `model` for any batch size, with `facts` (a JSON
    object), compared with the model on `batches`. ValueError if it cannot be made or differs."""
    buffer, shapes = io.BytesIO(), ({0: torch.export.Dim("batch", min=1)},)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own code
            program = torch.export.export(model, (batches[0],), dynamic_shapes=shapes)
            if suffix == ".pt2":
                torch.export.save(program, buffer, extra_files={"facts.json": json.dumps(facts)})
                run = torch.export.load(io.BytesIO(buffer.getvalue())).module()
            else:
                import onnx.reference

                proto = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
                onnx.helper.set_model_props(proto, {k: json.dumps(v) for k, v in facts.items()})
                buffer.write(proto.SerializeToString())
                session = onnx.reference.ReferenceEvaluator(proto)
                name = session.input_names[0]
                run = lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
    except (RuntimeError, ImportError, torch.onnx.errors.OnnxExporterError) as error:
        raise ValueError(f"--export: the exporter failed ({one_line(error.__cause__ or error)})")
    with torch.no_grad(), np.errstate(all="ignore"):  # ONNX's reference overflows in exp
        if not all(torch.allclose(run(batch), model(batch), atol=1e-4) for batch in batches):
            raise ValueError("--export: the program differs from the model; nothing was written")
    return buffer.getvalue()


# ----------------------------------------------------------------------------- device and processes


def set_up_device(name="auto", amp="auto", channels_last=True, deterministic=True, memory_gb=None):
    """(device, dtype of autocast, memory format, notes for the log). Mutates the process. MPS gets
    no channels_last, whose backward pass is wrong there (pytorch #175189, #175190)."""
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # first: pick_precision asks the current GPU
    dtype, reason = pick_precision(amp, device)
    last = channels_last and device.type != "mps"
    notes = [f"{str(dtype).removeprefix('torch.')} ({reason})", *["channels_last"] * last]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = not deterministic
        cap = memory_cap(device, memory_gb)
        total = torch.cuda.get_device_properties(device).total_memory
        # Windows would silently spill into the system's memory
        torch.cuda.set_per_process_memory_fraction(cap / total, device)
        cudnn = "cuDNN deterministic" if deterministic else "cuDNN benchmarked"
        notes += ["TF32", cudnn, f"at most {cap / 2**30:.1f} GB"]
    elif device.type == "cpu" and keep_freed_memory():
        notes.append("freed memory kept")
    return device, dtype, torch.channels_last if last else torch.contiguous_format, notes


def pick_device(name="auto"):
    """The torch.device `name`; auto: the first there is of cuda, mps, cpu. ValueError if absent."""
    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if cards and name in ("auto", "cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    others = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    available = [*(f"cuda:{i}" for i in cards), *others]
    if name not in ("auto", *available):
        raise ValueError(f"--device {name}: not on this machine; it has {', '.join(available)}")
    return torch.device(others[0] if name == "auto" else name)


def cpu_is_fast_in_bf16():
    """Whether the CPU has AMX or AVX512-BF16: bf16 products take 1/7 to 1/2 of the time of float32.

    With neither they take longer. torch 2.10 has no public torch.cpu.get_capabilities.
    """
    checks = "_is_amx_tile_supported", "_is_avx512_bf16_supported"
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def pick_precision(amp, device):
    """(dtype of autocast, reason); float32 means off. `amp` is auto, True, False, fp16 or bf16."""
    asked = {"False": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if amp in asked:
        slow = amp == "fp16" and device.type == "cpu"
        return asked[amp], "asked for" + ", many times slower than float32 on a CPU" * slow
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "supported by this GPU"
        if "GTX 16" in torch.cuda.get_device_name(device):
            return torch.float32, "fp16 gives NaN on the GTX 16 series"
        return torch.float16, "this GPU has no bf16"
    if device.type == "cpu" and cpu_is_fast_in_bf16():
        return torch.bfloat16, "this CPU is fast in it"
    return torch.float32, f"mixed precision gains nothing on this {device.type}"


def memory_cap(device, memory_gb=None):
    """Bytes that this process may take on `device`: memory_gb, or 95% of a GPU; else no limit."""
    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else math.inf
    return min(total, memory_gb * 2**30) if memory_gb else 0.95 * total


def keep_freed_memory(keep=True):
    """Mutates the process: glibc keeps freed blocks, so that training on a CPU is 5 to 30% faster.
    False without glibc. `keep` False sets what glibc adapts to by itself."""
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
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        return int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return 4 * 2**30


def world():
    """(rank, number of processes) of torch.distributed; (0, 1) where it is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def processes(device, seconds):
    """Join the processes that torchrun started, if any, and leave them after the block. On cuda
    each takes the GPU of its local rank. Waiting for over `seconds` for another one is an error."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(f"{name}: is not set, others of torchrun's are; start with torchrun")
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
                         "look there")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first(first):
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
            raise ValueError(f"the processes have different {name}; start all with the same one")


def lost_process(error):
    """Whether an error says that another process ended or was silent for too long."""
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo" in str(error)


# ---------------------------------------------------------------------------------------- copying


def copy_definitions(names, folder):
    """The text of a Python file: the kit's top-level definitions `names` and all that they need."""
    imports, definitions = read_kit(folder)
    known = [name for defined, _, _ in definitions for name in defined]
    for name in names:
        if name not in known:
            raise ValueError(f"--copy {shorten(name)}: is no function, class or constant here; "
                             f"{nearest(name, known)}")
    needed, found = set(), set(names)
    while found:  # until nothing more is needed
        needed |= found
        used = (uses for defined, _, uses in definitions if defined & found)
        found = set().union(*used) - needed
    lines = [text for name, text in imports.items() if name in needed]
    lines.sort(key=lambda text: (text.startswith("from"), text))
    texts = [text for defined, text, _ in definitions if defined & needed]
    head = f"{', '.join(names)}: copied from the training kit with all they need. MIT License."
    head = f'"""{textwrap.fill(head, 95)}"""\n\n' + "\n".join(lines)
    return "\n\n\n".join([head, *dict.fromkeys(texts)]) + "\n"


def read_kit(folder):
    """({name: import}, [(names defined, text, names used)]) of the kit's statements: the leaves',
    then those of train.py, without its `utils.` and the like."""
    imports, definitions = {}, []
    for file in ("model", "data", "utils", "train"):
        source = (Path(folder) / f"{file}.py").read_text("utf-8")
        if file == "train":  # the only file that refers to the others
            source = re.sub(r"(?<![\w.])(models|data|utils)\.(?=[a-zA-Z_])", "", source)
        lines = source.split("\n")
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    node.names = [alias]
                    imports.setdefault(alias.asname or alias.name.split(".")[0], ast.unparse(node))
                continue
            first = min(x.lineno for x in (node, *getattr(node, "decorator_list", ()))) - 1
            while lines[first - 1].startswith("#"):  # comments belong to what follows them
                first -= 1
            walked = list(ast.walk(node))
            names = [x for x in walked if isinstance(x, ast.Name)]
            local = {x.arg for x in walked if isinstance(x, ast.arg)}
            local |= {x.id for x in names if isinstance(x.ctx, ast.Store)}
            targets = [getattr(x, "value", x) for x in getattr(node, "targets", ())]  # of T[i] = 1
            defined = {x.id for y in targets for x in ast.walk(y) if isinstance(x, ast.Name)}
            if hasattr(node, "name"):
                defined = {node.name}
            text = "\n".join(lines[first : node.end_lineno])
            definitions.append((defined, text, {x.id for x in names} - local))
    return imports, definitions
