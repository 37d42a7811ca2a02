"""From a source to a batch: built-in images, image folders, IDX, CIFAR, NPZ and Sudoku files.

Axes: N samples, B batch, H height, W width, C channels. A split holds uint8 images [N, H, W, C] and
int64 labels [N]; pixels stay uint8 until they are on the device. Each function can be used alone:
this file imports torch, numpy, tqdm and the standard library only (image folders need Pillow).

    data = load("photos/", image_size=64)              # or None: the built-in images
    train = data.splits["train"]
    fetch = batches(train, torch.device("cpu"))
    for images, labels, index in fetch(chunks(epoch_order(len(train), 0, 0), 32)):
        inputs = augment(images, index, 0, 0, image_size=64, mean=data.mean, std=data.std)
"""

import functools
import glob
import gzip
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import signal
import time
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib import format as npy_format
from torch.utils.data import DataLoader
from tqdm import tqdm

MAX_ARRAY_BYTES = 8 * 2**30  # a file of a few kB can declare any size: more than this is refused
DEFLATE_RATIO = 1032  # deflate unpacks one byte to at most this many
MAX_LINE = 2**12  # characters of a line in a puzzle file
MAX_RESIZED_PIXELS = 2**26  # at once: 0.8 GB as float32 in colour
MAX_IMAGE_PIXELS = 89_478_485  # Pillow warns beyond this; here it is an error
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif"}
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, H, W, C] and labels int64 [N]; for Sudoku see `load_sudoku`."""

    images: np.ndarray
    labels: np.ndarray
    files: np.ndarray = ()  # names of the pictures' files, if they come from a folder

    def __len__(self):
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """Splits by name (`train`, `val`, perhaps `test`), class names and what the model must know."""

    splits: dict
    classes: list
    image_size: int
    description: str
    mean: tuple = ()
    std: tuple = ()

    @property
    def channels(self):
        split = next(iter(self.splits.values()))
        return (*split.images.shape[3:], 1)[0]  # puzzles have none

    def fingerprint(self):
        """What tells whether two loads gave the same training data."""
        sizes = [len(split) for split in self.splits.values()]
        return [*self.mean, *self.std, *sizes, zlib.crc32(self.splits["train"].labels.data)]


# ---------------------------------------------------------------------------------------- sources


def load(source, image_size=0, val_fraction=0.1, max_samples=0, seed=0, cache_dir=".cache"):
    """Return the `Data` at `source`: None (built-in images), a folder or an NPZ file. `image_size`
    0 chooses a size that suits the source; `max_samples` limits each split (0: no limit). A missing
    validation split is taken from the training split by `seed`. Classes keep their proportions.
    Raises ValueError or OSError with a message of one line."""
    if source is None:
        data = built_in(image_size or 64)
    elif (path := existing(source, "class folders, IDX, CIFAR or NPZ")).is_file():
        data = load_npz(path, image_size)
    else:
        data = load_idx(path, image_size) or load_cifar(path, image_size)
        data = data or load_folder(path, image_size, cache_dir, max_samples, seed)
    splits = dict(data.splits)
    for name, split in splits.items():
        if 0 < max_samples < len(split):
            rows = stratified(split.labels, max_samples, seed)
            splits[name] = Split(split.images[rows], split.labels[rows])
    if "val" not in splits and val_fraction > 0:
        splits["train"], splits["val"] = set_aside(splits["train"], val_fraction, seed)
        text = f"{data.description}; val is {100 * val_fraction:.3g}% of each class of train"
        data = replace(data, description=text)
    mean, std = pixel_statistics(splits["train"].images)
    return replace(data, splits=splits, mean=mean, std=std)


def require(condition, message):
    """ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_bytes(what, size, limit=math.inf):
    """ValueError, which begins with `what`, if `size` bytes are more than can be held."""
    limit = min(limit, MAX_ARRAY_BYTES)
    require(size <= limit, f"{what} {size:,} bytes; at most {limit:,} are accepted; give less")


def existing(source, wanted):
    """Return the path of the file or folder named by --data; ValueError if there is none."""
    path = Path(os.path.expanduser(source))  # unlike Path.expanduser it accepts unknown users
    require(source and path.exists(),
            f"--data {source}: no such file or folder; give --data PATH with {wanted}")
    require(path.is_file() or path.is_dir(),
            f"--data {source}: is neither a file nor a folder; give one of them")
    return path


def inside(path, root):
    """Return `path`; ValueError if a link leads from it out of the folder `root`."""
    require(path.resolve().is_relative_to(root.resolve()),
            f"{path}: a link that leads out of {root}; copy the file in its place")
    return path


def files_in(folder, pattern, root):
    """Return the files of a folder that match `pattern`, sorted; none may link out of `root`."""
    return [inside(p, root) for p in sorted(folder.glob(pattern)) if p.is_file()]


@contextmanager
def unpacked(path):
    """Open a file for reading bytes, unpacked if it is gzip; ValueError if it is damaged."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip ({one_line(error)}); fetch it again") from None


@contextmanager
def new_file(target, size):
    """Open a file of `size` bytes for writing that becomes `target` once complete; on an error
    nothing remains. Removes partial files of killed processes. ValueError for too little room."""
    folder = target.parent.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.urandom(8).hex()}.partial")
    try:
        free = shutil.disk_usage(folder).free
        require(size <= free,
                f"--cache_dir {folder}: needs {size >> 20:,} MiB, has {free >> 20:,}; make room")
        for stale in folder.glob("*.partial"):
            with suppress(OSError):  # another process may have removed it
                if stale.stat().st_mtime < time.time() - 86_400:
                    stale.unlink()
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty
            folder.rmdir()


# -------------------------------------------------------------------------------- built-in images


def built_in(image_size=64):
    """Return ten classes of shapes, in turn, always the same images. Position, radius, rotation,
    colours, gradient and noise vary, so that no mean colour and no single pixel tells the class."""
    classes = "bars crescent cross disk frame half_disk ring square star triangle".split()
    count, ends = 4000, (3000, 3500)  # images in all; where train and val end
    require_bytes(f"--image_size {image_size}: {count:,} images take", count * image_size**2 * 3)
    labels = np.arange(count) % len(classes)
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    step = min(250, 250 * 256**2 // image_size**2)

    def draw(start):  # part by part: bounds the working memory and uses two cores
        part = slice(start, start + step)
        images[part] = draw_shapes(labels[part], image_size, np.random.default_rng((2024, start)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(draw, range(0, count, step)))
    parts = map(Split, np.split(images, ends), np.split(labels, ends))
    return Data(dict(zip(("train", "val", "test"), parts)), classes, image_size, "built-in shapes")


def draw_shapes(labels, size, rng):
    """Return uint8 [N, size, size, 3]: the shape of each label (0 to 9, see `built_in`)."""
    count = len(labels)

    def draw(low, high, *shape):  # float32 [N, *shape, 1, 1]
        return rng.uniform(low, high, (count, *shape, 1, 1)).astype(np.float32)

    x = np.linspace(-1, 1, size, dtype=np.float32)
    y = x[:, None]
    angle, radius = draw(0, 2 * math.pi), draw(0.5, 0.85)
    x_moved, y_moved = x - draw(-0.25, 0.25), y - draw(-0.25, 0.25)
    # [N, size, size] coordinates in the frame of the shape, in units of its radius
    u = (np.cos(angle) * x_moved + np.sin(angle) * y_moved) / radius
    v = (np.cos(angle) * y_moved - np.sin(angle) * x_moved) / radius
    distance = np.empty_like(u)
    for label in np.unique(labels):
        rows = labels == label
        distance[rows] = SHAPES[label](u[rows], v[rows])
    # [N, 1, size, size] opacity, smooth over one pixel
    alpha = np.clip(0.5 - distance * radius * size / 2, 0, 1)[:, None]
    # half the shapes are lighter than their background, half are darker
    light = rng.permutation(np.arange(count) < count // 2)[:, None, None, None]
    dark_colour, light_colour = draw(0.0, 0.45, 3), draw(0.55, 1.0, 3)  # [N, 3, 1, 1]
    colour = np.where(light, light_colour, dark_colour)
    ground = np.where(light, dark_colour, light_colour)
    ground = ground + draw(-0.2, 0.2, 3) * x + draw(-0.2, 0.2, 3) * y
    image = colour - ground  # from here in place: a fifth less time in all
    image *= alpha
    image += ground
    image += rng.standard_normal((count, 1, size, size), np.float32) * draw(0.01, 0.08, 1)
    image *= 255
    return np.moveaxis(np.clip(image, 0, 255, image).astype(np.uint8), 1, 3)


def box_distance(u, v, half_width, half_height):
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def star_distance(u, v):
    theta = np.mod(np.arctan2(v, u), 2 * math.pi / 5) - math.pi / 5  # a tip at each sector's border
    return (np.hypot(u, v) * np.cos(np.abs(theta) - 0.95) - 0.32) * 0.9


SHAPES = (  # signed distances, negative inside, for radius 1; in the order of `built_in`'s classes
    lambda u, v: box_distance(np.abs(u) - 0.6, v, 0.25, 0.85),
    lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.8 - np.hypot(u - 0.5, v)),
    lambda u, v: np.minimum(box_distance(u, v, 1, 0.28), box_distance(u, v, 0.28, 1)),
    lambda u, v: np.hypot(u, v) - 0.9,
    lambda u, v: np.abs(box_distance(u, v, 0.65, 0.65)) - 0.15,
    lambda u, v: np.maximum(np.hypot(u, v + 0.4) - 1, -(v + 0.4)),
    lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.18,
    lambda u, v: box_distance(u, v, 0.75, 0.75),
    star_distance,
    lambda u, v: np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.5,
)


# ---------------------------------------------------------------------------- NPZ, IDX and CIFAR

CIFAR = (  # bytes of a row, classes, files of training and test, file of class names
    (3073, 10, "data_batch_*.bin", "test_batch.bin", "batches.meta.txt"),
    (3074, 100, "train.bin", "test.bin", "fine_label_names.txt"),
)


def load_npz(path, image_size=0):
    """Return the `Data` of an NPZ file of arrays x, y or x_train, y_train, x_val, x_test and so on.
    Images are uint8, or float in [0, 1], of shape [N, H, W], [N, H, W, C] or [N, C, H, W]."""
    try:
        arrays = read_npz(path)
    except Exception as error:
        problem = one_line(error)
        if not isinstance(error, ValueError | OSError):  # of a damaged zip: zlib.error and more
            problem = f"not a whole NPZ file ({problem}); puzzles need --model sudoku_gnn"
        raise ValueError(f"{path}: {problem}") from None
    pairs, names = {}, sorted(arrays) or "neither"
    for key, split in (("", "train"), *SPLIT_NAMES.items()):
        x, y = (f"{letter}_{key}".rstrip("_") for letter in "xy")
        if x in arrays:
            require(y in arrays, f"{path}: {x} has no {y} beside it; got {names}")
            pairs[split] = f"{path}: {x}", arrays[x], arrays[y]
    require("train" in pairs, f"{path}: needs x and y, or x_train and y_train; got {names}")
    return from_arrays(f"{path.name} (NPZ)", pairs, image_size)


def read_npz(path):
    """Return {name: array} of the x and y; ValueError if they declare more than the file holds."""
    arrays, declared = {}, 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name.split("_")[0] in ("x", "y"):
                with archive.open(member) as file:
                    head = io.BytesIO(file.read(2**14))  # numpy accepts headers to 10,000 bytes
                version = "1_0" if npy_format.read_magic(head) == (1, 0) else "2_0"
                shape, _, dtype = getattr(npy_format, f"read_array_header_{version}")(head)
                declared += max(member.file_size, math.prod(shape) * dtype.itemsize)
                require_bytes("declares", declared, DEFLATE_RATIO * path.stat().st_size)
                with archive.open(member) as file:
                    arrays[name] = npy_format.read_array(file, allow_pickle=False)
    return arrays


def idx_files(folder):
    """Return {split: (images file, labels file)} by the names of MNIST's files, gzip or not."""
    found = {}
    for prefix, split in (("train", "train"), ("t10k", "test"), ("test", "test")):
        images = files_in(folder, f"{prefix}-images?idx3-ubyte*", folder)
        labels = files_in(folder, f"{prefix}-labels?idx1-ubyte*", folder)
        if images or labels:
            first = (images + labels)[0]
            require(images and labels,
                    f"{first}: images and labels come in pairs; the other file is missing")
            found[split] = images[0], labels[0]
    return found


def read_idx(path, axes):
    """Return the uint8 array of an IDX file; ValueError unless its header fits its length."""
    with unpacked(path) as file:
        kind, sides = file.read(4), file.read(4 * axes)
        require(kind == bytes([0, 0, 8, axes]) and len(sides) == 4 * axes,
                f"{path}: not IDX of {axes} axes of bytes, its header is {kind.hex()}")
        shape = np.frombuffer(sides, ">u4").tolist()
        declared = math.prod(shape)
        require_bytes(f"{path}: declares", declared)
        content = file.read(min(declared, DEFLATE_RATIO * path.stat().st_size) + 1)
    has = "more" if len(content) > declared else f"{len(content):,}"
    require(len(content) == declared,
            f"{path}: declares {declared:,} bytes, has {has}; fetch the file again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def load_idx(path, image_size=0):
    """Return the `Data` of MNIST or Fashion-MNIST as distributed; None without IDX files."""
    files = idx_files(path)
    if files:
        require("train" in files,
                f"{path}: train-images-idx3-ubyte is missing; only the test files are there")
        pairs = {name: (x, read_idx(x, 3), read_idx(y, 1)) for name, (x, y) in files.items()}
        return from_arrays(f"{path.name} (IDX)", pairs, image_size)


def load_cifar(path, image_size=0):
    """Return the `Data` of CIFAR's binary version, fine labels, in `path` or its archive's folder;
    None without such files. A row holds one label byte (CIFAR-100: two) and pixels [3, 32, 32]."""
    folders = (path, path / "cifar-10-batches-bin", path / "cifar-100-binary")
    for folder, (width, count, *patterns, listing) in itertools.product(folders, CIFAR):
        pairs = {}
        for split, pattern in zip(("train", "test"), patterns):
            parts = []
            for file in files_in(folder, pattern, path):
                size = file.stat().st_size
                require_bytes(f"{file}:", size)
                require(size and size % width == 0,
                        f"{file}: {size:,} bytes are not whole rows of {width}; fetch it again")
                parts.append(np.fromfile(file, np.uint8).reshape(-1, width))
            if parts:
                rows = np.concatenate(parts)
                pixels = rows[:, -3072:].reshape(-1, 3, 32, 32)
                pairs[split] = folder / pattern, pixels, rows[:, -3073]
        if "train" in pairs:
            names = folder / listing
            classes = names.read_text("utf-8", "replace").split() if names.is_file() else []
            if len(classes) != count:
                classes = [str(k) for k in range(count)]
            return from_arrays(f"{path.name} (CIFAR-{count})", pairs, image_size, classes)


def from_arrays(description, pairs, image_size, classes=None):
    """Return the `Data` of {split: (where, images, labels)}; errors begin with `where`."""
    highest = len(classes) - 1 if classes else 65_535
    splits = {name: checked_split(*pair, highest) for name, pair in pairs.items()}
    count = 1 + max(split.labels.max() for split in splits.values())
    classes = classes or [str(k) for k in range(count)]
    return match_size(Data(splits, classes, image_size, description))


def checked_split(where, images, labels, highest):
    """Return a `Split` of arrays in any layout that users have; ValueError begins with `where`."""
    channels = (1, 2, 3, 4)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in channels and images.shape[1] in channels:
        images = np.moveaxis(images, 1, 3)  # [N, C, H, W] -> [N, H, W, C]
    if labels.shape[1:] == (1,):
        labels = labels[:, 0]
    require(images.ndim == 4 and images.shape[3] in channels and images.size,
            f"{where}: images must be [N, H, W] or [N, H, W, 1 to 4], got {list(images.shape)}")
    require(labels.shape == (len(images),),
            f"{where}: {len(images)} images, but labels of shape {list(labels.shape)}")
    if images.dtype.kind == "f":
        require(images.min() >= 0 and images.max() <= 1,  # so no NaN either
                f"{where}: float images must lie in [0, 1]; scale them, or give uint8 in 0 to 255")
        images = (images * 255).round().astype(np.uint8)
    require(images.dtype == np.uint8,
            f"{where}: images must be uint8, or float in [0, 1]; got {images.dtype}")
    require(labels.dtype.kind in "iu",
            f"{where}: labels must be integers from 0; got {labels.dtype}")
    for row in np.flatnonzero((labels < 0) | (labels > highest)):
        raise ValueError(f"{where}: labels must be 0 to {highest}; row {row} has {labels[row]}")
    return Split(np.ascontiguousarray(images), labels.astype(np.int64))


def match_size(data):
    """Return `data` with images of `image_size`: shorter side resized, centre cropped. `image_size`
    0 keeps the shorter side; below 24 px, which the networks need, it becomes 32."""
    where, shapes = data.description, [split.images.shape for split in data.splits.values()]
    counts, heights, widths, channels = zip(*shapes)
    kinds, count, shorter = sorted({*channels}), sum(counts), min(heights + widths)
    require(len(kinds) == 1, f"{where}: splits have {kinds} channels; they must agree")
    size = data.image_size or (shorter if shorter >= 24 else 32)
    require_bytes(f"--image_size {size}: {count:,} images take", count * size**2 * kinds[0])
    splits = {name: Split(resize_arrays(split.images, size, where), split.labels)
              for name, split in data.splits.items()}
    return replace(data, splits=splits, image_size=size)


def resize_arrays(images, size, where):
    """Return the centre squares uint8 [N, size, size, C] of uint8 [N, H, W, C], antialiased."""
    count, *sides, channels = images.shape
    if sides == [size, size]:
        return images
    height, width = (max(size, round(side * size / min(sides))) for side in sides)
    require(height * width <= MAX_IMAGE_PIXELS,
            f"{where}: {sides[0]}x{sides[1]} images become {height}x{width}, "
            f"over {MAX_IMAGE_PIXELS:,} pixels; crop them")
    step = max(1, min(512, MAX_RESIZED_PIXELS // max(math.prod(sides), height * width)))
    top, left = (height - size) // 2, (width - size) // 2
    out = np.empty((count, size, size, channels), np.uint8)
    for start in range(0, count, step):
        part = slice(start, start + step)
        x = torch.tensor(images[part]).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
        x = x[:, :, top : top + size, left : left + size].round()
        out[part] = x.permute(0, 2, 3, 1).numpy()
    return out


# ---------------------------------------------------------------------------------- image folders


def pictures_in(folder):
    """Return the visible pictures at any depth of a folder, in the same order on every system."""
    files = [p for p in folder.rglob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(filter(Path.is_file, files), key=Path.as_posix)


def passed_over(folder):
    """Return the numbers of files that are no pictures, by suffix, as text; "" without any."""
    suffixes = [p.suffix.lower() for p in folder.rglob("[!.]*") if p.is_file()]
    others = Counter(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES).most_common(5)
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others)


def scan_folder(root):
    """Return ({split: [(path, label)]}, class names) of a folder of class folders, by name. Folders
    train, val (valid, validation) and test above the class folders are splits. ValueError for a
    link that leads out of `root`, for an empty class, and for splits whose classes differ."""
    def folders(path):
        return sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != ".")

    named = [name for name in folders(root) if name.lower() in SPLIT_NAMES and folders(root / name)]
    parts = {SPLIT_NAMES[name.lower()]: root / name for name in named} or {"train": root}
    require("train" in parts and len(parts) >= len(named),
            f"{root}: has {named}; needs one train beside them, and each split once")
    files, classes = {split: [] for split in parts}, folders(parts["train"])
    for split, folder in parts.items():
        odd = sorted(set(folders(folder)) ^ set(classes))[:5]
        require(not odd,
                f"{folder}: class folders differ from {parts['train']}'s in {odd}; they must agree")
        for label, place in enumerate(folder / name for name in classes):
            pictures = pictures_in(inside(place, root))
            require(pictures, f"{place}: no image in this class folder; add some or remove it")
            for path in pictures:
                files[split].append((inside(path, root) if path.is_symlink() else path, label))
    require(len(classes) > 1,
            f"{root}: needs two class folders or more, got {classes}; or IDX, CIFAR or NPZ files")
    return files, classes


def load_folder(root, image_size=0, cache_dir=".cache", max_samples=0, seed=0):
    """Return the `Data` of a folder of class folders, decoded once to a memory map in `cache_dir`.
    Pictures larger than `image_size` are stored as centre squares of image_size * 8/7, from which
    training crops at random and evaluation crops the centre. Needs Pillow."""
    files, classes = scan_folder(root)
    for name, rows in files.items():
        chosen = stratified(np.array([label for _, label in rows]), max_samples, seed)
        files[name] = [rows[i] for i in chosen]
    paths = [path for rows in files.values() for path, _ in rows]
    sides = filter(None, map(shorter_side, paths[:: max(1, len(paths) // 64)]))
    typical = int(np.median([*sides] or [64]))
    if not image_size:
        # small pictures keep their size; others get the largest multiple of 32 that leaves a margin
        image_size = max(24, typical) if typical <= 72 else min(224, typical * 7 // 8 // 32 * 32)
    stored = round(image_size * 8 / 7) if typical > image_size else image_size
    images = decode_cached(paths, root, stored, Path(cache_dir))
    splits, start = {}, 0
    for name, rows in files.items():
        labels = np.array([label for _, label in rows])
        names = np.array([path.name for path, _ in rows])
        splits[name] = Split(Rows(images, start + np.arange(len(rows))), labels, names)
        start += len(rows)
    passed, description = passed_over(root), f"{root.resolve().name} (image folder)"
    stray = len(pictures_in(root)) - len(paths)
    if stray and not max_samples:
        passed += f"{', ' * bool(passed)}{stray} pictures outside the class folders"
    return Data(splits, classes, image_size, description + f"; passed over {passed}" * bool(passed))


def import_pillow():
    """Return Pillow's modules Image and ImageOps; ValueError with the remedy if not installed."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError("image folders need the package Pillow: pip install pillow") from None
    return Image, ImageOps


@contextmanager
def open_picture(path):
    """Open a picture; errors, also those of reading its pixels, become ValueErrors of one line."""
    Image, _ = import_pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image = Image.open(path, formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height}")
        with image:
            yield image
        return
    except Image.DecompressionBombError as error:
        problem = f"is over {MAX_IMAGE_PIXELS:,} pixels ({one_line(error)}); make it smaller"
    except Image.UnidentifiedImageError:
        problem = f"not a whole picture in {', '.join(IMAGE_FORMATS)}; convert or remove it"
    except Exception as error:  # damaged files raise SyntaxError, struct.error, TypeError, ...
        problem = f"cannot be decoded ({one_line(error)}); replace or remove it"
    raise ValueError(f"{path}: {problem}")


def shorter_side(path):
    """Return it in px, or 0 if unreadable; decoding reports all such files together."""
    with suppress(ValueError), open_picture(path) as image:
        return min(image.size)
    return 0


def decode_image(path, size):
    """Return the centre square uint8 [size, size, 3] of a picture, upright, on white if clear."""
    Image, ImageOps = import_pillow()
    with open_picture(path) as image:
        # JPEG is decoded at a half, a quarter or an eighth of its size
        image.draft("RGB" if image.mode == "YCbCr" else None, (size, size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)


def framed(path, stored_size, image_size):
    """Return uint8 [image_size, image_size, 3]: a picture as evaluation and prediction see it, the
    middle of its centre square at `stored_size`; for programs that `--export` wrote."""
    start = (stored_size - image_size) // 2
    middle = slice(start, start + image_size)
    return decode_image(path, stored_size)[middle, middle].copy()


def decode_pictures(paths, size, channels=3, batch_size=64):
    """Yield (paths, uint8 [n, size, size, channels], [(path, ValueError)]), a batch at a time: the
    centre squares (one channel is Pillow's luma), and apart the pictures that cannot be read."""
    def decode(path):
        try:
            return decode_image(path, size)
        except ValueError as error:
            return ValueError(str(error))  # its cause would keep the whole picture in memory

    import_pillow()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without Python's lock
        for start in range(0, len(paths), batch_size):
            good, images, errors = [], [], []
            part = paths[start : start + batch_size]
            for path, image in zip(part, pool.map(decode, part)):
                if isinstance(image, ValueError):
                    errors.append((path, image))
                else:
                    good.append(path)
                    images.append(image)
            images = np.array(images, np.uint8).reshape(-1, size, size, 3)
            if channels == 1:
                luma = images @ np.array([19595, 38470, 7471], np.uint32)
                images = ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]
            yield good, images, errors


def find_pictures(*places):
    """Return the paths named by files, folders (at any depth) and globs; ValueError if none."""
    found = []
    for place in places:
        path, files = Path(os.path.expanduser(place)), []
        named = [path] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        for path in map(Path, named):
            files += pictures_in(path) if path.is_dir() else [path]
        files = [p for p in files if p.is_file() and not p.name.startswith(".")]
        require(files,
                f"--input {place}: no picture there; give a picture, a folder of them or a glob")
        found += files
    return list(dict.fromkeys(found))


def decode_cached(paths, root, size, cache_dir):
    """Return a memory map uint8 [len(paths), size, size, 3] of the decoded pictures, kept by a hash
    of the files' names, sizes and times. One ValueError names all unreadable pictures."""
    entries = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    key = mix(str(root.resolve()), entries, size, "centre square, bicubic, 1")
    target, shape = cache_dir / f"{key:x}.npy", (len(paths), size, size, 3)
    if not target.exists():
        broken, batch_size = [], max(2**23 // size**2, os.cpu_count())  # 25 MB at once
        # written as a file, since a full disk under a memory map would kill the process
        with new_file(target, math.prod(shape)) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            npy_format.write_array_header_1_0(file, header)
            with tqdm(desc="decode", total=len(paths), unit="img", disable=None) as bar:
                for good, images, errors in decode_pictures(paths, size, batch_size=batch_size):
                    file.write(images.tobytes())
                    broken += errors
                    bar.update(len(good) + len(errors))
            if broken:
                names = ", ".join(str(path) for path, _ in broken[1:6])
                more = f"; {len(broken) - 1} more: {names}" if names else ""
                raise ValueError(f"{broken[0][1]}{more}")
    try:
        images = npy_format.open_memmap(target, mode="r")
        require((images.shape, images.dtype) == (shape, np.uint8),
                f"it holds {images.dtype} {images.shape}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{target}: a damaged cache ({one_line(error)}); remove it") from None
    return images


# ------------------------------------------------------------------------------------------ Sudoku
# Cells are numbered 0 to 80 in reading order; 0 is a blank. Solvers hold candidates as bit masks
# uint16 [81, N] with bit d - 1 for digit d; puzzles are the last axis, so that each operation runs
# over all of them.

LEVELS = ("easy", "medium", "hard")
EASY_CLUES = 36  # easy: singles solve it and it has as many; medium: singles; hard: the rest
ROW, COLUMN = np.divmod(np.arange(81), 9)
UNIT_OF = np.stack([ROW, COLUMN, ROW // 3 * 3 + COLUMN // 3])  # [3, 81]: row, column, box of a cell
UNITS = np.argsort(UNIT_OF, axis=1, kind="stable").reshape(3, 9, 9)  # [3, 9, 9]: cells of a unit
BITS = np.array([511, *(1 << np.arange(9))], np.uint16)  # the mask of a blank and of each clue
COUNT = np.array([mask.bit_count() for mask in range(512)], np.int8)  # of the candidates
DIGIT = np.array([mask.bit_length() for mask in range(512)], np.uint8)  # of a single candidate


def in_chunks(function, rows, size):
    """Return `function` of the rows, computed and concatenated for `size` rows at a time."""
    return np.concatenate([function(rows[i : i + size]) for i in range(0, len(rows), size)])


def apply_singles(masks):
    """Return (masks after one round of naked and hidden singles, all single?, contradictory?)."""
    single, broken = masks & (masks - 1) == 0, (masks == 0).any(0)
    fixed = np.where(single, masks, 0)
    seen, hidden = np.zeros((2, *masks.shape), np.uint16)
    for units, unit_of in zip(UNITS, UNIT_OF):
        cells = masks[units]  # [9 units, 9 cells, N]
        once, twice = cells[:, 0].copy(), np.zeros_like(cells[:, 0])
        for j in range(1, 9):
            twice |= once & cells[:, j]
            once |= cells[:, j]
        broken |= (once != 511).any(0)
        seen |= np.bitwise_or.reduce(fixed[units], axis=1)[unit_of]
        hidden |= (once & ~twice)[unit_of]
    rest = np.where(single, masks, masks & ~seen)
    alone = rest & hidden
    return np.where(alone != 0, alone, rest), single.all(0), broken


def propagate(masks, goal=None):
    """Return (masks uint16 [N, 81] after singles until nothing changes, solved? [N], broken? [N]).
    With `goal` (a cell for each puzzle) it stops when that cell is found, and `solved` says so."""
    solved, broken = np.zeros((2, len(masks)), bool)
    active, masks = np.arange(len(masks)), masks.T.copy()
    while len(active):
        before = masks[:, active]
        after, single, bad = apply_singles(before)
        masks[:, active] = after
        changed = (after != before).any(0)
        if goal is not None:
            single = COUNT[after[goal[active], np.arange(len(active))]] == 1
        solved[active], broken[active] = single & ~bad, bad
        active = active[changed & ~(single | bad)]
    return masks.T, solved, broken


def solve(puzzles, preference=None, limit=2, max_guesses=10**6):
    """Return what `search` finds from the clues of uint8 [N, 81]."""
    return search(BITS[puzzles], preference, limit, max_guesses)


def search(masks, preference=None, limit=2, max_guesses=10**6, chunk=2048):
    """Search depth first, with singles between guesses, all candidates uint16 [N, 81] at once. A
    guess fixes a cell with the fewest candidates: the first to its lowest digit, or the cell and
    digit of the highest `preference` (float [N, 81, 9] in 0 to 1). Returns (first solutions uint8
    [N, 81], zeros if none; solutions found int64 [N], at most `limit`: 1 of 2 proves uniqueness, -1
    if `max_guesses` came first; guesses int64 [N] up to the first solution)."""
    count = len(masks)
    if preference is None:
        preference = np.zeros((count, 1, 1), np.int8)
    if count > chunk:
        parts = [slice(start, start + chunk) for start in range(0, count, chunk)]
        found = [search(masks[part], preference[part], limit, max_guesses) for part in parts]
        return tuple(map(np.concatenate, zip(*found)))
    solutions = np.zeros((count, 81), np.uint8)
    number, guesses, tried, depth = np.zeros((4, count), np.int64)
    stack = np.empty((82, count, 81), np.uint16)  # a guess fixes a cell, so 81 levels suffice
    stack[0] = masks
    while len(active := np.flatnonzero((depth >= 0) & (number < limit) & (tried < max_guesses))):
        masks, solved, broken = propagate(stack[depth[active], active])
        done = active[solved]
        first = number[done] == 0
        solutions[done[first]] = DIGIT[masks[solved][first]]
        number[done] += 1
        closed = solved | broken
        depth[active[closed]] -= 1
        active, masks = active[~closed], masks[~closed]  # [n], [n, 81]
        top, left = depth[active], COUNT[masks]  # left: candidates of a cell
        options = np.where(left > 1, masks, 0)[:, :, None] & BITS[1:]  # [n, 81, 9]
        score = np.where(options, preference[active] - left[:, :, None], -99)
        best = score.reshape(-1, 729).argmax(1)  # the first of equal ones
        cell, bit = best // 9, BITS[1 + best % 9]
        # the guess goes on top; below it stays the board without that candidate
        stack[top, active] = stack[top + 1, active] = masks
        stack[top, active, cell] &= ~bit
        stack[top + 1, active, cell] = bit
        guesses[active] += number[active] == 0
        tried[active] += 1
        depth[active] += 1
    number[(depth >= 0) & (number < limit)] = -1
    return solutions, number, guesses


def grade(puzzles):
    """Return uint8 [N]: 0 easy, 1 medium, 2 hard (see EASY_CLUES) of uint8 [N, 81]."""
    if len(puzzles) > 8192:
        return in_chunks(grade, puzzles, 8192)
    _, solved, _ = propagate(BITS[puzzles])
    return np.where(solved, (puzzles > 0).sum(1) < EASY_CLUES, 2).astype(np.uint8)


def generate(count, level, seed=0):
    """Return (puzzles, solutions) uint8 [count, 81] of a level by `seed`, all different. Random
    grids lose clues in random order while singles alone still solve them, which proves the solution
    unique; hard ones lose more while a search finds one. The first are the same for any count."""
    found = {}
    for block in itertools.count():
        rng = np.random.default_rng(mix(seed, LEVELS.index(level), block))
        for puzzle, solution in zip(*dig(level, rng)):
            found.setdefault(puzzle.tobytes(), (puzzle, solution))
        if len(found) >= count:
            pairs = np.array([*found.values()][:count]).reshape(count, 2, 81)
            return pairs[:, 0].copy(), pairs[:, 1].copy()


def dig(level, rng):
    """Return a block of (puzzles, solutions) of one level, as `generate` describes."""
    size = 768 if level == "hard" else 2048
    grids = np.zeros((size, 9, 9), np.uint8)
    digits = np.tile(np.arange(1, 10), (size, 1))
    for i in (0, 3, 6):  # boxes on the diagonal can be filled at random; the search fills the rest
        grids[:, i : i + 3, i : i + 3] = rng.permuted(digits, axis=1).reshape(-1, 3, 3)
    preference = rng.random((size, 81, 9), np.float32)
    solutions, found, _ = solve(grids.reshape(-1, 81), preference, 1, max_guesses=40)
    solutions = solutions[found == 1]  # the others need long searches
    order = rng.random(solutions.shape).argsort(1)  # in which clues are removed
    puzzles = solutions.copy()
    np.put_along_axis(puzzles, order[:, :30], 0, 1)
    enough = grade(puzzles) < 2  # 51 clues nearly always suffice for singles
    solutions, puzzles, order = solutions[enough], puzzles[enough], order[enough]
    low, high = {"easy": (EASY_CLUES, 46), "medium": (27, EASY_CLUES), "hard": (20, 29)}[level]
    target = rng.integers(low, high, len(solutions))
    singles = np.full(len(solutions), level == "hard")  # hard puzzles that singles still solve
    for cells in order[:, 30:].T:
        wanted = np.flatnonzero(((puzzles > 0).sum(1) > target) | singles)
        cell, trial = cells[wanted], BITS[puzzles[wanted]]
        trial[np.arange(len(wanted)), cell] = 511
        # a clue that singles find again was not needed: the rest is solved as before
        _, good, _ = propagate(trial, cell)
        if level == "hard":  # still unique if no other digit in this cell leads to a solution
            unsure = ~good
            other, place = trial[unsure], (np.arange(unsure.sum()), cell[unsure])
            other[place] &= ~BITS[solutions[wanted[unsure], cell[unsure]]]
            good[unsure] = search(other, limit=1)[1] == 0
            singles[wanted[unsure & good]] = False  # for good: fewer clues help no single
        puzzles[wanted[good], cell[good]] = 0
    kept = grade(puzzles) == LEVELS.index(level)
    return puzzles[kept], solutions[kept]


# ------------------------------------------------------------------------------------ Sudoku files

CELL = np.full(256, 255, np.uint8)  # a character's digit, 0 for a blank, 255 if it is no cell
CELL[np.frombuffer(b"0.Xx*_", np.uint8)] = 0
CELL[np.frombuffer(b"123456789", np.uint8)] = np.arange(1, 10)
PUZZLE_COLUMNS = ("puzzle", "puzzles", "quizzes", "question")
SOLUTION_COLUMNS = ("solution", "solutions", "answer")


def read_sudoku(path, with_solutions=True, block=2**13):
    """Return (puzzles uint8 [N, 81], solutions uint8 [N, 81] or None) of a file, perhaps gzip. The
    content tells the format: CSV with puzzle and solution columns (Kaggle's, Sudoku-Extreme's,
    RRN's without a header), one puzzle a line (.sdm), or one board in nine rows (.sdk, .ss). A
    blank is one of 0.Xx*_. ValueError names the line at fault. `block` lines are parsed at once."""
    lines = puzzle_lines(path)
    number, first = next(lines, (0, ""))
    require(first, f"{path}: is empty; give a puzzle file")
    if "," not in first and len(first) != 81 and first.lower() not in PUZZLE_COLUMNS:
        return read_board(path, [(number, first), *itertools.islice(lines, 1000)]), None
    names = [name.strip().lower() for name in first.split(",")]
    grids = [i for i, name in enumerate(names) if re.fullmatch("[0-9.x*_]{81}", name)]
    if grids:  # no header: RRN's files, and one puzzle a line
        columns = grids[:1] + [i for i in grids[1:] if re.fullmatch("[1-9]*", names[i])]
        lines = itertools.chain([(number, first)], lines)
    else:
        puzzle, solution = ([i for i, name in enumerate(names) if name in known]
                            for known in (PUZZLE_COLUMNS, SOLUTION_COLUMNS))
        columns = puzzle[:1] + solution[:1]
        require(puzzle,
                f"{path}: line {number}: neither 81 cells nor a header with a puzzle column, "
                f"got {one_line(first)[:60]}")
    parts = []
    while rows := list(itertools.islice(lines, block)):
        parts.append(parse_rows(path, rows, columns[: 1 + with_solutions], len(names)))
    require(parts, f"{path}: has a header and no puzzle; give a puzzle file")
    puzzles, *solutions = map(np.concatenate, zip(*parts))
    return puzzles, solutions[0] if solutions else None


def puzzle_lines(path):
    """Yield (number, text without quotes and outer spaces) of each line, comments left out."""
    number, taken, rest = 1, 0, ""
    with unpacked(path) as file:
        stream = io.TextIOWrapper(file, "utf-8-sig", "replace")
        parts = iter(lambda: stream.read(2**20), "")
        for part in itertools.chain(parts, ["\n"]):
            taken += len(part)
            require(taken <= MAX_ARRAY_BYTES,
                    f"{path}: line {number}: over {MAX_ARRAY_BYTES:,} bytes of text; "
                    "split the file")
            *lines, rest = (rest + part).replace('"', "").split("\n")
            for text in map(str.strip, lines):
                if text and text[0] != "#":
                    yield number, text
                number += 1
            require(len(rest) <= MAX_LINE,
                    f"{path}: line {number}: too long for a puzzle; give 81 cells, or nine rows")


def parse_rows(path, rows, columns, count):
    """Return the grids uint8 [n, 81] of the puzzle and solution columns in [(line number, text)].
    ValueError, with the line, for bad cells, repeated digits and solutions that do not fit."""
    def refuse(bad, problem):  # bad is bool [n, cells]
        if bad.any():
            row, cell = np.argwhere(bad)[0]
            raise ValueError(f"{path}: line {rows[row][0]}: {problem.format(cell + 1)}")

    for number, text in rows:
        found = text.count(",") + 1
        if found != count:
            raise ValueError(f"{path}: line {number}: has {found} columns, the first line {count}")
    grids = []
    for name, column in zip(("puzzle", "solution"), columns):
        cells = [text.split(",")[column] for _, text in rows]
        for (number, _), text in zip(rows, cells):
            if len(text) != 81:
                raise ValueError(f"{path}: line {number}: has {len(text)} cells, a puzzle has 81")
        text = "".join(cells).encode("latin-1", "replace")
        grids.append(CELL[np.frombuffer(text, np.uint8)].reshape(-1, 81))
        refuse(grids[-1] > 9, f"cell {{}} of the {name} is none of 1-9 or 0.Xx*_")
    puzzles, answers = grids[0], grids[-1]
    if len(grids) > 1:
        refuse(answers == 0, "cell {} of the solution is blank")
        refuse((puzzles > 0) & (puzzles != answers), "cell {} of the solution contradicts the clue")
    # a puzzle repeats no digit if its solution fits and repeats none
    refuse(~consistent(answers)[:, None], f"a row, column or box of the {name} repeats a digit")
    return grids


def read_board(path, lines):
    """Return uint8 [1, 81] of one board in nine rows of [(line number, text)]: .sdk with headers
    and sections, .ss with rules between the boxes, or bare."""
    rows, in_puzzle = [], True
    for number, text in lines:
        cells = text.replace("|", "").replace(" ", "")
        if text[0] == "[":
            in_puzzle = text.lower() == "[puzzle]"
        elif in_puzzle and cells and "--" not in cells:
            require(re.fullmatch("[0-9.Xx*_]{9}", cells),
                    f"{path}: line {number}: a row is nine cells of 1-9 or 0.Xx*_, "
                    f"got {one_line(text)[:50]}")
            rows.append((number, cells))
    require(len(rows) == 9,
            f"{path}: has {len(rows)} rows of cells, a board has 9; or give 81 cells a line")
    board = "".join(cells for _, cells in rows)
    return parse_rows(path, [(rows[0][0], board)], [0], 1)[0]


def consistent(grids):
    """Return bool [N]: no row, column or box of uint8 [N, 81] has a digit twice, blanks aside."""
    if len(grids) > 4096:  # fits into the cache
        return in_chunks(consistent, grids, 4096)
    bits = np.ascontiguousarray(np.where(grids > 0, BITS[grids], 0).T)
    good = np.ones(len(grids), bool)
    for units in UNITS:
        cells = bits[units]
        good &= (np.bitwise_or.reduce(cells, 1) == cells.sum(1, np.uint16)).all(0)
    return good


def sudoku_text(suffix, puzzles, solutions=None):
    """Return grids uint8 [N, 81] as text: .csv with columns puzzle and solution (empty where it is
    all zeros), or .sdm or .sdk (one board) with the solution if there is one, else the puzzle."""
    if solutions is None:
        solutions = np.zeros_like(puzzles)

    def write(grids):
        return [bytes(row).decode() for row in grids + 48]

    if suffix == ".csv":
        answers = [text.removeprefix("0" * 81) for text in write(solutions)]
        lines = ["puzzle,solution", *map(",".join, zip(write(puzzles), answers))]
    else:
        filled = np.where(solutions > 0, solutions, puzzles)
        lines = [line.replace("0", ".") for line in write(filled)]
    if suffix == ".sdk":
        require(len(lines) == 1, "an .sdk file holds one board; for several give .sdm or .csv")
        lines = ["[Puzzle]", *(lines[0][i : i + 9] for i in range(0, 81, 9))]
    return "\n".join(lines) + "\n"


def board_lines(board, puzzle):
    """Return a board of 81 digits as lines of text: clues in brackets, a dot for a blank."""
    cells = [f"[{digit}]" if clue else f" {digit or '.'} " for digit, clue in zip(board, puzzle)]
    thirds = ["".join(cells[i : i + 3]) for i in range(0, 81, 3)]
    rows = ["|".join(thirds[i : i + 3]).rstrip() for i in range(0, 27, 3)]
    rule = "+".join(["-" * 9] * 3)
    return [*rows[:3], rule, *rows[3:6], rule, *rows[6:]]


def finish_boards(puzzles, p, max_guesses=0):
    """Return (answers uint8 [N, 81], zeros where not solved; texts; [solved, solved by the network
    alone, guesses]) for puzzles uint8 [N, 81] and a network's probabilities `p` float [N, 81, 9].
    Up to `max_guesses` each search and prove the solution unique; 0 keeps the network's board."""
    boards = p.argmax(2).astype(np.uint8) + 1
    alone = solved = consistent(boards)  # all cells are filled and clues kept: the rules decide
    verdicts, total = np.where(alone, "solved", "not solved"), 0
    if max_guesses:
        found, number, guesses = solve(puzzles, p, max_guesses=max_guesses)
        solved, total = number == 1, guesses.sum()
        boards = np.where(number[:, None] > 0, found, puzzles)
        verdicts = np.where(alone, "solved by the network alone", "solved by search").astype(object)
        verdicts += [f", proved unique with {n:,} guesses" for n in guesses]
        verdicts[number == 0] = "impossible: no solution"
        verdicts[number > 1] = "ambiguous: several solutions"
        verdicts[number < 0] = "undecided: too many guesses"
    texts = ["\n".join([verdict, *board_lines(board, puzzle)])
             for verdict, board, puzzle in zip(verdicts, boards, puzzles)]
    counts = [solved.sum(), (solved & alone).sum(), total]
    return np.where(solved[:, None], boards, 0), texts, counts


# puzzles of each level
GENERATED = {"train": (4000, 4000, 300), "val": (150, 150, 100), "test": (300, 300, 100)}


def load_sudoku(source=None, val_fraction=0.1, max_samples=0, seed=0, cache_dir=".cache"):
    """Return the `Data` of Sudoku puzzles: generated ones (None), a file, or a folder of splits.
    Images are puzzles uint8 [N, 81], 0 a blank. Labels are uint8 [N, 82]: the digit of a blank, 0
    for a clue, and last the level (`grade`). No validation or test puzzle shares its solution with
    a training puzzle, up to symmetry; the description counts what is dropped."""
    sets, notes = generated(Path(cache_dir)) if source is None else read_splits(source), []
    for name, grids in sets.items():
        kept = np.sort(np.unique(row_hash(grids[0]), return_index=True)[1])
        if count := len(grids[0]) - len(kept):
            notes.append(f"{count:,} duplicates dropped from {name}")
        if 0 < max_samples < len(kept):
            rng = np.random.default_rng(mix(seed, len(kept)))
            kept = np.sort(rng.choice(kept, max_samples, replace=False))
        sets[name] = [grid[kept] for grid in grids]
    train = sets.pop("train")
    if sets or val_fraction > 0:
        rows, classes = row_hash(train[0]), symmetry_class(train[1])
    for name, grids in sets.items():
        for twin in np.flatnonzero(np.isin(row_hash(grids[0]), rows)):
            raise ValueError(f"{source}: puzzle {twin + 1} of {name} is in train too; remove it")
        new = ~np.isin(symmetry_class(grids[1]), classes)
        require(new.any(),
                f"{source}: every solution of {name} is one of train's up to symmetry; give others")
        if count := (~new).sum():
            notes.append(f"{count:,} of {name} dropped, solved like one of train up to symmetry")
        sets[name] = [grid[new] for grid in grids]
    if "val" not in sets and val_fraction > 0:
        _, members = np.unique(classes, return_inverse=True)
        order = np.random.default_rng(mix(seed, 2)).permutation(members.max() + 1)
        place = order[members]  # whole classes go to val, in random order
        val = place <= np.searchsorted(np.cumsum(np.bincount(place)), len(place) * val_fraction)
        require(not val.all(),
                f"--val_fraction {val_fraction}: too few different solution grids; give more")
        train, sets["val"] = ([grid[rows] for grid in train] for rows in (~val, val))
    splits = {}
    for name, (puzzles, solutions) in {"train": train, **sets}.items():
        answers = np.where(puzzles > 0, 0, solutions)
        splits[name] = Split(puzzles, np.column_stack([answers, grade(puzzles)]))
    description = "generated puzzles" if source is None else f"{Path(source).name} (Sudoku)"
    return Data(splits, [*"123456789"], 9, "; ".join([description, *notes]))


def generated(cache_dir):
    """Return {split: (puzzles, solutions)} of GENERATED, kept in `cache_dir` once made."""
    path = cache_dir / f"sudoku-{mix(*GENERATED.items(), 'generator 1, stacked'):x}.npz"
    # a missing or damaged file is written again
    with suppress(Exception), np.load(path, allow_pickle=False) as kept:
        return {name: kept[name] for name in GENERATED}
    sets, size = {}, 162 * sum(map(sum, GENERATED.values()))
    with new_file(path, size) as file:  # first: a folder that cannot be used is told at once
        for seed, (name, counts) in enumerate(GENERATED.items()):
            levels = [generate(count, level, seed) for count, level in zip(counts, LEVELS)]
            sets[name] = np.concatenate(levels, axis=1)  # [2, N, 81]
        np.savez(file, **sets)
    return sets


def read_splits(source):
    """Return {split: (puzzles, solutions)} of a file (all train) or a folder of split files."""
    path = existing(source, "a puzzle file")
    named = [(p.name.split(".")[0].lower(), p) for p in sorted(path.glob("*")) if p.is_file()]
    named = [(SPLIT_NAMES[name], inside(p, path)) for name, p in named if name in SPLIT_NAMES]
    files = {"train": path} if path.is_file() else dict(named)
    require("train" in files and len(files) >= len(named),
            f"{path}: needs train.csv, perhaps val.csv and test.csv (or .gz, .sdm), each once")
    sets = {}
    for name, file in files.items():
        sets[name] = read_sudoku(file)
        require(sets[name][1] is not None,
                f"{file}: has no solutions; it can be predicted, not trained or evaluated on")
    return sets


def row_hash(rows):
    """Return uint64 [N] of integers [N, M]: different rows agree with probability 2^-64."""
    if len(rows) > 65_536:
        return in_chunks(row_hash, rows, 65_536)
    factors = np.random.default_rng(81).integers(1, 2**63, rows.shape[1], np.uint64) * 2 + 1
    return rows.astype(np.uint64) @ factors


def symmetry_class(solutions):
    """Return uint64 [N]: equal for grids uint8 [N, 81] that a symmetry maps to each other. Two rows
    of a band map digits to digits, and two digits map columns to columns: permutations whose cycle
    lengths no relabelling, permutation or transposition changes. The class combines those of all
    pairs. It is no canonical form, but no two of 22,000 random grids shared one."""
    if len(solutions) > 2048:  # fits into the cache
        return in_chunks(symmetry_class, solutions, 2048)

    def pair_codes(lines):  # int64 [..., M, 9] -> [..., pairs]: of all pairs of M lines, sorted
        first, second = np.triu_indices(lines.shape[-2], 1)
        step = np.take_along_axis(lines[..., second, :], lines.argsort(-1)[..., first, :], -1)
        power, code = step, 0
        for _ in range(3):  # how many elements return after 2, 3 and 4 steps; none does after 1
            power = np.take_along_axis(step, power, -1)
            code = code * 10 + (power == np.arange(9)).sum(-1)
        return np.sort(code, -1)

    a, b, c = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
    grids = solutions.reshape(-1, 9, 9).astype(np.int64) - 1
    sides = []
    for lines in (grids, grids.transpose(0, 2, 1)):
        codes = pair_codes(lines.reshape(-1, 3, 3, 9)) @ [1_000_000, 1000, 1]  # [N, bands]
        bands = np.sort(codes).astype(np.uint64).T
        sides.append((bands[0] * a ^ bands[1]) * b ^ bands[2])
    sides = np.sort(sides, 0)
    columns = grids.argsort(2).transpose(0, 2, 1)  # [N, digit, row]: the digit's column in the row
    return (sides[0] * c ^ sides[1]) * a ^ row_hash(pair_codes(columns))


# ------------------------------------------------------------------------------ order and subsets


def one_line(error):
    """The error's text on one line, control characters escaped, cut to 200 characters."""
    return (repr(str(error))[1:-1].split("\\n")[0] or type(error).__name__)[:200]


def mix(*numbers):
    """Return a 63-bit seed from numbers; different tuples, such as (seed, epoch), differ."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


def epoch_order(count, seed, epoch):
    """Return int64 [count]: the permutation of one epoch, a function of (seed, epoch)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch)))


def stratified(labels, count, seed):
    """Return sorted indices of `count` samples (0: all), classes in proportion, by `seed`."""
    if not count or count >= len(labels):
        return np.arange(len(labels))
    shuffled = np.random.default_rng(mix(seed, count)).permutation(len(labels))
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by class, random within
    # the i-th of n in a class gets place (i + 1/2) / n; the first `count` places are in proportion
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in np.bincount(labels)])
    return np.sort(shuffled[np.argsort(place, kind="stable")[:count]])


def set_aside(split, fraction, seed):
    """Return (train, val), which share the images through `Rows`: `fraction` of each class, at
    least one, is in val; a single one stays in train."""
    rng = np.random.default_rng(mix(seed, 1))
    val = np.zeros(len(split), bool)
    for label in np.unique(split.labels):
        rows = rng.permutation(np.flatnonzero(split.labels == label))
        count = max(1, round(len(rows) * fraction))
        val[rows[: min(len(rows) - 1, count)]] = True
    require(val.any(),
            f"--val_fraction {fraction}: leaves no validation image of {len(split)}; give more")
    parts = [np.flatnonzero(rows) for rows in (~val, val)]
    names = [split.files[rows] if len(split.files) else () for rows in parts]
    return tuple(Split(Rows(split.images, rows), split.labels[rows], files)
                 for rows, files in zip(parts, names))


class Rows:
    """Some rows of an array, memory map or its file [N, ...], read only when indexed."""

    def __init__(self, array, rows):
        if isinstance(array, Path):
            array = np.load(array, mmap_mode="r", allow_pickle=False)
        if isinstance(array, Rows):
            array, rows = array.array, array.rows[rows]
        self.array, self.rows = array, rows
        self.shape = (len(rows), *array.shape[1:])
        self.nbytes = array[:1].nbytes * len(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.array[self.rows[index]]

    def __reduce__(self):
        """Pickle a memory map as its file name: a spawned worker would be sent all its pixels."""
        mapped = isinstance(self.array, np.memmap)
        return Rows, (Path(self.array.filename) if mapped else self.array, self.rows)


def pixel_statistics(images, most=10_000):
    """Return (mean, std) by channel in [0, 1] of at most `most` images; std at least 1/255."""
    step = math.ceil(len(images) / most)
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 500 * step):
        part = torch.tensor(images[start : start + 500 * step : step])
        for channel in range(len(counts)):  # NumPy's bincount takes twice the time
            counts[channel] += part[..., channel].ravel().bincount(minlength=256).numpy()
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 255.0**-2))
    return tuple(mean.tolist()), tuple(std.tolist())


# ------------------------------------------------------------------- augmentation on whole batches


def uniform(index, seed, epoch, draws):
    """Return float32 [B, draws] in [0, 1), a function of (seed, epoch, index) for each sample: the
    finaliser of SplitMix64 (Steele et al. 2014) on a counter, in wrapping int64 arithmetic."""
    # one counter for every (sample, draw); the 63-bit key separates seeds and epochs
    z = index.cpu()[:, None] * draws + torch.arange(draws) + 1
    z = z * -7046029254386353131 + mix(seed, epoch, draws)  # the golden ratio's odd 64-bit constant
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    return (z >> 40 & 0xFFFFFF).float() / 2**24


def augment(images, index, seed, epoch, image_size, mean, std,
            crop_padding=4, flip=True, min_crop_area=0.35, cutout=0, color_jitter=0.0):
    """Return normalised float32 [B, C, image_size, image_size] from square uint8 [B, H, W, C].
    Larger images get a random resized crop (area from `min_crop_area` to 1, aspect 3/4 to 4/3;
    Szegedy et al. 2015), others a crop after padding by reflection. Half are mirrored, in the next
    epoch the other half (Jordan 2024, arXiv:2404.00498). A square of `cutout` px becomes the mean
    (DeVries & Taylor 2017; 0: off). For `color_jitter` see `jittered`, for the draws `uniform`."""
    assert images.shape[1] == images.shape[2] >= image_size, (images.shape, image_size)
    u = uniform(index, seed, epoch, 8)
    mirrored = flip & ((uniform(index, seed, 0, 8)[:, 4] < 0.5) ^ bool(epoch % 2))
    if images.shape[1] > image_size:
        x = resized_crop(images, u, mirrored, image_size, min_crop_area)
    else:
        x = padded_crop(images, u, mirrored, crop_padding)
    if color_jitter and x.shape[3] == 3:
        x = jittered(x, uniform(index, mix(seed, "colour"), epoch, 3), color_jitter)
    return normalise(x, mean, std, cutout_mask(u, image_size, cutout, x) if cutout else None)


def padded_crop(images, u, mirrored, padding):
    """Return uint8 [B, H, W, C]: a random window, by u[:, 0:2], of the reflected image."""
    batch, height, width, channels = images.shape
    x, p, device = images, padding, images.device
    if p:
        before, after = images[:, :, 1 : p + 1].flip(2), images[:, :, -p - 1 : -1].flip(2)
        padded = torch.cat([before, images, after], 2)
        # strided view [B, H, 2p + 1, W * C], then one index: 4 times as fast as a gather
        windows = padded.view(batch, height, -1).unfold(2, width * channels, channels)
        top, left = (u[:, :2] * (2 * p + 1)).long().to(device)[:, :, None].unbind(1)  # [B, 1]
        row = (top - p + torch.arange(height, device=device)).abs()  # [B, H], reflected at the top
        row = row.minimum(2 * height - 2 - row)  # and at the bottom
        x = windows[torch.arange(batch, device=device)[:, None], row, left].view(images.shape)
    index = mirrored.nonzero()[:, 0].to(device)
    return x.index_copy(0, index, x.index_select(0, index).flip(2))


def resized_crop(images, u, mirrored, size, min_area):
    """Return uint8 [B, size, size, C]: a random box, by u[:, 0:4], of each square image. One at
    a time it is 10 times as fast as grid_sample for bytes on a CPU; other devices use floats."""
    batch, whole, _, channels = images.shape
    area = min_area + (1 - min_area) * u[:, 0]
    aspect = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
    side = torch.stack([area / aspect, area * aspect], 1).sqrt() * whole
    side = side.round().clamp(1, whole)  # [B, (height, width)]
    corner = (u[:, 2:4] * (whole - side + 1)).floor()
    out = images.new_empty(batch, size, size, channels)
    for i, (top, left, h, w) in enumerate(torch.cat([corner, side], 1).int().tolist()):
        box = images[i : i + 1, top : top + h, left : left + w].permute(0, 3, 1, 2)
        if images.device.type != "cpu":
            box = box.float()
        box = F.interpolate(box, (size, size), mode="bilinear", antialias=True)
        if box.is_floating_point():
            box = box.round()
        box = box[0].permute(1, 2, 0)
        out[i] = box.flip(1) if mirrored[i] else box
    return out


def jittered(images, u, strength):
    """Return float32 [B, H, W, 3] in 0 to 255: brightness, contrast and saturation of each image
    changed by factors of 1 - strength to 1 + strength, by u [B, 3], as in torchvision's jitter."""
    factors = (1 + strength * (2 * u - 1)).to(images.device)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    x = (images.float() * brightness).clamp(0, 255)
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    x = mean.lerp(x, contrast).clamp(0, 255)
    return grey(x).lerp(x, saturation).clamp(0, 255)


def grey(images):
    """Return the luma [B, H, W, 1] of float [B, H, W, 3] (ITU-R 601)."""
    red, green, blue = images.unbind(3)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[..., None]


def cutout_mask(u, size, side, x):
    """Return float32 [B, size, size * C]: 0 in a square of `side` px around u[:, 5:7], else 1."""
    centre = (u[:, 5:7] * size).floor()[:, :, None]  # [B, 2, 1]; the square may hang over
    far = ((torch.arange(size) - centre).add(side // 2).div(side).floor() != 0).float()
    rows, columns = far.to(x.device).unbind(1)
    return torch.maximum(rows[:, :, None], columns.repeat_interleave(x.shape[3], 1)[:, None])


def normalise(images, mean, std, keep=None):
    """Return float32 [B, C, H, W], channels last, of [B, H, W, C] in 0 to 255, times `keep`."""
    mean, std = pixel_rows(tuple(mean), tuple(std), images.shape[2], images.device)
    # constants along rows of W * C make it 7 times as fast as channel by channel
    x = images.flatten(2).to(torch.float32, copy=True).sub_(mean).div_(std)
    if keep is not None:
        x.mul_(keep)
    return x.view(images.shape).permute(0, 3, 1, 2)


@functools.lru_cache(8)
def pixel_rows(mean, std, width, device):
    """Return mean and std in 0 to 255, repeated for each pixel of a row: float32 [width * C]."""
    return tuple((torch.tensor(values) * 255).repeat(width).to(device) for values in (mean, std))


def centre(images, image_size, mean, std):
    """Return the normalised centre [B, C, image_size, image_size] of uint8 [B, H, W, C]."""
    top, left = ((side - image_size) // 2 for side in images.shape[1:3])
    return normalise(images[:, top : top + image_size, left : left + image_size], mean, std)


def mix_samples(inputs, labels, index, seed, epoch, classes, mixup=0.0, cutmix=0.0):
    """Return float [B, C, H, W] mixed in pairs, and their soft targets float32 [B, classes]. Mixup
    (Zhang et al. 2018) averages a sample and a partner by a share from Beta(mixup, mixup). CutMix
    (Yun et al. 2019) pastes a box of the partner, clipped to the image. Labels int64 [B] get the
    shares that are seen. With both, each sample gets one of them. `index` is the whole batch's."""
    batch, sides = len(inputs), inputs.shape[2:]
    rng = np.random.default_rng(mix(seed, epoch, index.tolist()))
    partner = rng.permutation(batch)
    boxed = rng.random(batch) < (0.5 if mixup and cutmix else bool(cutmix))
    alpha = np.where(boxed, cutmix, mixup).clip(1e-3, 100)
    share = rng.beta(alpha, alpha)  # of the sample itself
    place = rng.random((batch, 2)) * sides  # (y, x)
    half = np.sqrt(boxed * (1 - share))[:, None] * sides / 2  # 0 without CutMix: an empty box
    low, high = (place - half).round().clip(0), (place + half).round().clip(max=sides)
    own = np.where(boxed, 1, share)  # outside the box
    share = own * (1 - (high - low).prod(1) / math.prod(sides))
    y, x = map(np.arange, sides)
    rows = (y < low[:, :1]) | (y >= high[:, :1])  # outside the box
    columns = (x < low[:, 1:]) | (x >= high[:, 1:])
    drawn = (partner, np.float32(own), np.float32(share)[:, None], rows, columns)
    partner, own, share, rows, columns = (torch.from_numpy(x).to(inputs.device) for x in drawn)
    outside = rows[:, None, :, None] | columns[:, None, None, :]  # [B, 1, H, W]
    weight = (outside * own[:, None, None, None]).to(inputs)
    targets = F.one_hot(labels, classes).float()
    mixed = inputs.index_select(0, partner).lerp(inputs, weight)
    return mixed, targets[partner].lerp(targets, share)


def image_views(inputs):
    """Yield (view, weight) of float [B, C, H, W] for test-time augmentation: the image and, at half
    its weight, two moved by one px; each also mirrored (Jordan 2024, arXiv:2404.00498)."""
    padded = F.pad(inputs, (1, 1, 1, 1), mode="reflect")
    right, left = padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]
    for view, weight in ((inputs, 0.25), (right, 0.125), (left, 0.125)):
        for image in (view, view.flip(3)):
            yield torch.empty_like(inputs).copy_(image), weight  # in the layout of `inputs`


# ----------------------------------------------------------------------------------------- batches


def chunks(order, batch_size):
    """Return a tensor in batches; a last batch of one joins the one before: BatchNorm needs two."""
    pieces = list(order.split(batch_size))
    if len(pieces) > 1 and len(pieces[-1]) == 1 < batch_size:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces


def ignore_signals(worker):
    """Let workers survive Ctrl-C or a shutdown sent to all: the main process finishes its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Gather(torch.utils.data.Dataset):
    """A dataset for DataLoader that gathers a whole batch: indices in, (images, labels) out."""

    split: Split

    def __getitem__(self, index):
        index = index.numpy()
        images, labels = self.split.images[index], self.split.labels[index]
        return torch.from_numpy(images), torch.from_numpy(labels)


def batches(split, device, resident_bytes=2**30, workers=None, timeout=600):
    """Return fetch(pieces), which yields (images, labels, index int64 [B] on the CPU) of each
    tensor of indices: from the device if all take at most `resident_bytes` and `workers` is None,
    else from a DataLoader, silent for at most `timeout` seconds. Both give the same batches."""
    if workers is None and split.images.nbytes <= resident_bytes:
        images = torch.from_numpy(split.images[np.arange(len(split))]).to(device)
        labels = torch.from_numpy(split.labels).to(device)

        def fetch(pieces):
            for index in pieces:
                rows = index.to(device)  # images[rows] would take 15 times as long
                yield images.index_select(0, rows), labels[rows], index

        return fetch
    if workers is None:  # a spawned worker would be sent a copy of what is in memory
        mapped = isinstance(getattr(split.images, "array", split.images), np.memmap)
        workers = min(4, os.cpu_count() or 1) if mapped else 0
    sampler = []  # refilled by each call, so that workers persist over epochs
    loader = DataLoader(
        Gather(split), sampler=sampler, batch_size=None, num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
        persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
        timeout=timeout if workers else 0,
        generator=torch.Generator(),  # else each pass would draw from the generator of dropout
    )

    def fetch(pieces):
        sampler[:] = pieces
        for (images, labels), index in zip(loader, pieces):
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True), index

    return fetch
