"""From a source to a batch: built-in images, image folders, IDX, CIFAR binary and NPZ files.

Axes: N samples, B batch, H height, W width, C channels. A split holds uint8 images [N, H, W, C] and
int64 labels [N]; pixels stay uint8 until they are on the device. Any piece here works alone: this
file imports torch, numpy, tqdm and the standard library only (image folders need Pillow).

    data = load("photos/", image_size=64)              # or None: the built-in images
    fetch = batches(data.splits["train"], 32, torch.device("cpu"))
    for images, labels, index in fetch(epoch_order(len(data.splits["train"]), seed=0, epoch=0)):
        inputs = augment(images, index, seed=0, epoch=0, image_size=64, mean=data.mean, std=data.std)
"""

import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import math
import os
import platform
import shutil
import signal
import struct
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

MAX_ARRAY_BYTES = 8 * 2**30  # a file of a few kB can declare any size: refuse beyond this
MAX_LINE = 2**16  # bytes of a line of puzzles
MAX_RESIZED_PIXELS = 2**26  # at once: 0.8 GB as float32 in colour
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own limit, as an error in place of its warning
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif"}
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, H, W, C] (an array or a memory map) and labels int64 [N]; for Sudoku see `load_sudoku`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def take(self, index):
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """Splits by name (`train`, `val`, perhaps `test`), class names and what the model must know."""

    splits: dict
    classes: list
    image_size: int
    description: str
    mean: tuple = ()
    std: tuple = ()


# ---------------------------------------------------------------------------------------- sources


def load(source, image_size=0, val_fraction=0.1, max_samples=0, seed=0, cache_dir=".cache"):
    """The `Data` at `source`: None (built-in images), a folder or an NPZ file, its kind recognised.

    `image_size` 0 takes the size that suits the source. A validation split that the source lacks is
    set aside from the training split, stratified, by `seed`; `max_samples` (0: all) bounds each
    split, stratified too. Raises ValueError or OSError, in one line, for whatever is wrong with it.
    """
    if source == "":
        raise ValueError("--data '': is empty; give a folder or a file, or leave the flag out for built-in images")
    path = None if source is None else Path(os.path.expanduser(source))  # which leaves the user who is not there
    if path is None:
        data = built_in(image_size or 64)
    elif not path.exists():
        raise ValueError(f"--data {source}: no such file or folder; give a folder of class folders, IDX, CIFAR or NPZ")
    elif path.is_file():
        data = load_npz(path, image_size)
    elif not path.is_dir():
        raise ValueError(f"--data {source}: is neither a file nor a folder; give one of them")
    elif files := idx_files(path):
        data = load_idx(path, files, image_size)
    elif files := cifar_files(path):
        data = load_cifar(path, files, image_size)
    else:
        data = load_folder(path, image_size, cache_dir, max_samples, seed)
    splits = {name: subset(split, max_samples, seed) for name, split in data.splits.items()}
    if "val" not in splits and val_fraction > 0:
        splits["train"], splits["val"] = set_aside(splits["train"], val_fraction, seed)
    mean, std = pixel_statistics(splits["train"].images)
    return replace(data, splits=splits, mean=mean, std=std)


def built_in(image_size=64, sizes=(("train", 3000), ("val", 500), ("test", 500)), seed=2024):
    """Ten classes of shapes drawn with signed distances, [N, image_size, image_size, 3]: the same each time.

    Position, radius, rotation, colours, background gradient and noise vary for each image, so that
    neither a mean colour nor any one pixel tells the class. Classes take turns through each split.
    """
    classes = ["bars", "crescent", "cross", "disk", "frame", "half_disk", "ring", "square", "star", "triangle"]
    total = sum(count for _, count in sizes)
    check_size(image_size, total, 3)
    labels = np.arange(total) % len(classes)
    images = np.empty((total, image_size, image_size, 3), np.uint8)

    step = max(1, min(250, 250 * 256**2 // image_size**2))

    def draw(start):  # in parts, which bounds the working memory and lets two cores share it
        part = slice(start, start + step)
        images[part] = draw_shapes(labels[part], image_size, np.random.default_rng((seed, start)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(draw, range(0, total, step)))
    splits, start = {}, 0
    for name, count in sizes:
        splits[name] = Split(images[start : start + count], labels[start : start + count])
        start += count
    return Data(splits, classes, image_size, "built-in shapes")


def check_size(image_size, count, channels):
    """ValueError where that many images of that size are beyond the limit of memory."""
    needed = count * image_size**2 * channels
    if needed > MAX_ARRAY_BYTES:
        raise ValueError(f"--image_size {image_size}: {count:,} images take {needed:,} bytes, "
                         f"at most {MAX_ARRAY_BYTES:,} are held; give a smaller one")  # fmt: skip


def draw_shapes(labels, size, rng):
    """Uint8 [N, size, size, 3]: the shape of each label (0 to 9, see `built_in`), drawn at random."""
    count = len(labels)
    draw = lambda low, high, *shape: rng.uniform(low, high, (count, *shape, 1, 1)).astype(np.float32)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    y, x = axis[None, :, None], axis[None, None, :]
    angle, radius = draw(0, 2 * math.pi), draw(0.5, 0.85)
    u, v = x - draw(-0.25, 0.25), y - draw(-0.25, 0.25)
    # [N, size, size] coordinates in the frame of the shape, its radius the unit
    u, v = (np.cos(angle) * u + np.sin(angle) * v) / radius, (np.cos(angle) * v - np.sin(angle) * u) / radius
    distance = np.empty_like(u)
    for label in np.unique(labels):
        rows = labels == label
        distance[rows] = SHAPES[label](u[rows], v[rows])
    alpha = np.clip(0.5 - distance * radius * size / 2, 0, 1)[:, None]  # [N, 1, size, size], smooth over one pixel
    # a colour and a background whose brightness differ, either way round
    light = rng.permuted(np.repeat([[True], [False]], [count // 2, count - count // 2], 0), axis=0)[:, :, None, None]
    dark_colour, light_colour = draw(0.0, 0.45, 3), draw(0.55, 1.0, 3)  # [N, 3, 1, 1]
    colour, ground = (np.where(light, a, b) for a, b in ((light_colour, dark_colour), (dark_colour, light_colour)))
    ground = ground + draw(-0.2, 0.2, 3) * x[:, None] + draw(-0.2, 0.2, 3) * y[:, None]
    image = ground + alpha * (colour - ground)
    noise = rng.standard_normal((count, 1, size, size), np.float32) * draw(0.01, 0.08, 1)
    return np.moveaxis(np.clip((image + noise) * 255, 0, 255).astype(np.uint8), 1, 3)


def _box(u, v, half_width, half_height):
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _triangle(u, v):
    return np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.5


def _star(u, v):
    theta = np.mod(np.arctan2(v, u), 2 * math.pi / 5) - math.pi / 5  # five sectors, a tip at each border
    r = np.hypot(u, v)
    return (r * np.cos(np.abs(theta) - 0.95) - 0.32) * 0.9


SHAPES = (  # signed distances, negative inside, radius 1; in the order of `built_in`'s classes
    lambda u, v: _box(np.abs(u) - 0.6, v, 0.25, 0.85),
    lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.8 - np.hypot(u - 0.5, v)),
    lambda u, v: np.minimum(_box(u, v, 1, 0.28), _box(u, v, 0.28, 1)),
    lambda u, v: np.hypot(u, v) - 0.9,
    lambda u, v: np.abs(_box(u, v, 0.65, 0.65)) - 0.15,
    lambda u, v: np.maximum(np.hypot(u, v + 0.4) - 1, -(v + 0.4)),
    lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.18,
    lambda u, v: _box(u, v, 0.75, 0.75),
    _star,
    _triangle,
)


def load_npz(path, image_size=0):
    """Arrays x, y or x_train, y_train and x_val, x_test …: uint8, or float in [0, 1], [N, H, W] or [N, H, W, C]."""
    try:
        most = min(MAX_ARRAY_BYTES, 1032 * path.stat().st_size)  # deflate makes no more of a byte
        for declared in itertools.accumulate(npz_sizes(path)):
            if declared > most:
                raise ValueError(f"{path}: declares {declared:,} bytes; at most {most:,} are read from a file so large")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if holds_samples(name)}
    except (ValueError, OSError) as error:  # numpy's own for object arrays and bad headers, and the one above
        raise ValueError(one_line(error) if str(path) in str(error) else f"{path}: {one_line(error)}") from None
    except Exception as error:  # of a damaged zip nearly anything: BadZipFile, zlib.error, RuntimeError, LZMAError
        raise ValueError(f"{path}: not a whole NPZ file ({one_line(error)}); puzzles need --model sudoku_gnn") from None
    splits = {}
    for suffix, split in {"": "train", **{f"_{key}": name for key, name in SPLIT_NAMES.items()}}.items():
        if f"x{suffix}" in arrays:
            if f"y{suffix}" not in arrays:
                raise ValueError(f"{path}: x{suffix} has no y{suffix} beside it; got {sorted(arrays)}")
            splits[split] = pair(f"{path}: x{suffix}", arrays[f"x{suffix}"], arrays[f"y{suffix}"])
    if "train" not in splits:
        raise ValueError(f"{path}: needs x and y, or x_train and y_train; got {sorted(arrays) or 'neither'}")
    classes = [str(k) for k in range(max(int(split.labels.max()) for split in splits.values()) + 1)]
    return match_size(Data(splits, classes, image_size, f"{path.name} (NPZ)"))


def npz_sizes(path):
    """The bytes that each array of an NPZ will take, the most of what its entry and its header declare."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if holds_samples(member.filename):
                with archive.open(member) as file:
                    head = io.BytesIO(file.read(2**14))  # numpy takes headers up to 10,000 bytes, after it read them
                version = np.lib.format.read_magic(head)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(head)
                yield max(member.file_size, math.prod(shape) * dtype.itemsize)


def holds_samples(name):
    """Whether an array of that name, or its file in an NPZ, is one that is read."""
    return name.removesuffix(".npy").split("_")[0] in ("x", "y")


def pair(where, images, labels):
    """A checked `Split` from arrays as users have them; raises ValueError that starts with `where`."""
    if images.ndim == 4 and images.shape[-1] not in (1, 2, 3, 4) and images.shape[1] in (1, 2, 3, 4):
        images = np.moveaxis(images, 1, 3)  # [N, C, H, W] -> [N, H, W, C]
    images = images[..., None] if images.ndim == 3 else images
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if images.ndim != 4 or images.shape[-1] not in (1, 2, 3, 4) or not images.size:
        raise ValueError(f"{where}: images must be [N, H, W] or [N, H, W, 1 to 4], got {list(images.shape)}")
    if labels.ndim != 1 or len(labels) != len(images):
        raise ValueError(f"{where}: {len(images)} images, but labels of shape {list(labels.shape)}")
    if np.issubdtype(images.dtype, np.floating):
        if not (np.isfinite(images).all() and 0 <= images.min() and images.max() <= 1):
            raise ValueError(f"{where}: float images must lie in [0, 1]; scale them, or give uint8 in 0 to 255")
        images = (images * 255).round().astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"{where}: images must be uint8, or float in [0, 1]; got {images.dtype}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{where}: labels must be integers from 0; got {labels.dtype}")
    bad = np.flatnonzero(labels != labels.astype(np.uint16))  # also right for uint64, which int64 cannot hold
    if len(bad):
        raise ValueError(f"{where}: labels must be 0 to 65535; row {bad[0]} has {labels[bad[0]]}")
    return Split(images, labels.astype(np.int64))


def idx_files(folder):
    """{split: (images file, labels file)} by the names of MNIST and its kin, gzipped or not."""
    found = {}
    for prefix, split in (("train", "train"), ("t10k", "test"), ("test", "test")):
        images = sorted(p for p in folder.glob(f"{prefix}-images?idx3-ubyte*") if p.is_file())
        labels = sorted(p for p in folder.glob(f"{prefix}-labels?idx1-ubyte*") if p.is_file())
        if images and labels:
            found[split] = (inside(images[0], folder), inside(labels[0], folder))
        elif images or labels:
            raise ValueError(f"{(images or labels)[0]}: images and labels come in pairs; the other file is missing")
    return found


def read_idx(path, dimensions):
    """The uint8 array of `dimensions` axes in an IDX file; its header must agree with its length."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(f"{path}: not IDX of {dimensions} axes of bytes, its header is {header[:4].hex()}")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            declared = math.prod(shape)
            if declared > MAX_ARRAY_BYTES:
                raise ValueError(f"{path}: declares {declared:,} bytes; at most {MAX_ARRAY_BYTES:,} are read")
            content = file.read(min(declared, 1032 * path.stat().st_size) + 1)  # gzip holds no more; taken at once
    except (EOFError, gzip.BadGzipFile, zipfile.zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip ({one_line(error)}); fetch the file again") from None
    if len(content) != declared:
        has = "more" if len(content) > declared else f"{len(content):,}"
        raise ValueError(f"{path}: declares {declared:,} bytes, has {has}; fetch the file again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def load_idx(path, files, image_size=0):
    """MNIST and Fashion-MNIST as they are distributed: grey images [N, 28, 28, 1]."""
    if "train" not in files:
        raise ValueError(f"{path}: train-images-idx3-ubyte is missing; only the test files are there")
    splits = {name: pair(str(x), read_idx(x, 3), read_idx(y, 1)) for name, (x, y) in files.items()}
    classes = [str(k) for k in range(max(int(split.labels.max()) for split in splits.values()) + 1)]
    return match_size(Data(splits, classes, image_size, f"{path.name} (IDX)"))


def cifar_files(folder):
    """{split: [files]} of CIFAR's binary version, in `folder` or in the folder its archive makes."""
    for root in (folder, folder / "cifar-10-batches-bin", folder / "cifar-100-binary"):
        find = lambda pattern: [inside(p, folder) for p in sorted(root.glob(pattern)) if p.is_file()]
        train, test = find("data_batch_*.bin"), find("test_batch.bin")
        if not train:
            train, test = find("train.bin"), find("test.bin")
        if train:
            return {"train": train, **({"test": test} if test else {})}
    return {}


def load_cifar(path, files, image_size=0):
    """CIFAR-10 or CIFAR-100 (fine labels), binary version: rows of 1 or 2 label bytes and 3,072 of pixels."""
    fine = files["train"][0].name == "train.bin"
    width, count = (3074, 100) if fine else (3073, 10)
    splits = {}
    for split, names in files.items():
        blocks = []
        for name in names:
            if (size := name.stat().st_size) > MAX_ARRAY_BYTES:
                raise ValueError(f"{name}: {size:,} bytes; at most {MAX_ARRAY_BYTES:,} are read")
            content = np.fromfile(name, np.uint8)
            if not len(content) or len(content) % width:
                raise ValueError(f"{name}: {len(content):,} bytes are no whole rows of {width}; fetch the file again")
            blocks.append(content.reshape(-1, width))
        rows = np.concatenate(blocks)
        bad = np.flatnonzero(rows[:, width - 3073] >= count)
        if len(bad):
            raise ValueError(f"{names[0]}: row {bad[0]} has label {rows[bad[0], width - 3073]}, must be below {count}")
        images = rows[:, width - 3072 :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # -> [N, 32, 32, 3]
        splits[split] = Split(np.ascontiguousarray(images), rows[:, width - 3073].astype(np.int64))
    listing = files["train"][0].parent / ("fine_label_names.txt" if fine else "batches.meta.txt")
    classes = listing.read_text("utf-8", "replace").split() if listing.is_file() else []
    classes = classes if len(classes) == count else [str(k) for k in range(count)]
    return match_size(Data(splits, classes, image_size, f"{path.name} (CIFAR-{count})"))


def match_size(data, chunk=512):
    """`data` with images of `image_size`: shorter side resized, centre cropped; as they are where it is 0."""
    sides = {side for split in data.splits.values() for side in split.images.shape[1:3]}
    channels = {split.images.shape[3] for split in data.splits.values()}
    if len(channels) > 1:
        raise ValueError(f"{data.description}: splits have {sorted(channels)} channels; they must agree")
    size = data.image_size or min(sides)
    if size < 24 and not data.image_size:
        size = 32  # networks here need 24 px
    check_size(size, sum(map(len, data.splits.values())), *channels)
    splits = {}
    for name, split in data.splits.items():
        height, width = split.images.shape[1:3]
        if (height, width) != (size, size):
            scale = size / min(height, width)
            shape = (max(size, round(height * scale)), max(size, round(width * scale)))
            if math.prod(shape) > MAX_IMAGE_PIXELS:
                raise ValueError(f"{data.description}: {height}x{width} images become {shape[0]}x{shape[1]}, "
                                 f"over {MAX_IMAGE_PIXELS:,} pixels; crop them")  # fmt: skip
            step = max(1, min(chunk, MAX_RESIZED_PIXELS // max(height * width, math.prod(shape))))
            resized = []
            for start in range(0, len(split), step):
                x = torch.from_numpy(np.array(split.images[start : start + step])).permute(0, 3, 1, 2)
                x = F.interpolate(x.float(), shape, mode="bilinear", antialias=True)
                top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
                x = x[:, :, top : top + size, left : left + size].round().clamp(0, 255).to(torch.uint8)
                resized.append(x.permute(0, 2, 3, 1).numpy())
            split = Split(np.ascontiguousarray(np.concatenate(resized)), split.labels)
        splits[name] = split
    return replace(data, splits=splits, image_size=size)


# ----------------------------------------------------------------------------------- image folders


def inside(path, root):
    """`path`; ValueError for a link that leads out of the folder `root`."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path}: a link that leads out of {root}; copy the file in its place")
    return path


def scan_folder(root):
    """({split: [(path, label)]}, class names) of a folder of class folders, in the order of their names.

    With train, val (valid, validation) or test above them where those hold folders; links that lead
    out of `root` are refused.
    """
    def folders(path):
        return sorted((p for p in path.iterdir() if p.is_dir() and p.name[0] != "."), key=lambda p: p.name)

    top, real_root = folders(root), root.resolve()
    named = {p: SPLIT_NAMES[p.name.lower()] for p in top if p.name.lower() in SPLIT_NAMES and folders(p)}
    if named and not ("train" in named.values() and len(set(named.values())) == len(named)):
        raise ValueError(f"{root}: has {[p.name for p in named]}; needs one train beside them, and each split once")
    parts = {split: folder for folder, split in named.items()} or {"train": root}
    classes = [p.name for p in folders(parts["train"])]
    files = {}
    for split, folder in parts.items():
        if [p.name for p in folders(folder)] != classes:
            odd = sorted({p.name for p in folders(folder)} ^ set(classes))
            raise ValueError(f"{folder}: class folders differ from {parts['train']}'s in {odd[:5]}; they must agree")
        files[split] = []
        for label, name in enumerate(classes):
            images = [p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES]
            images.sort(key=lambda p: p.as_posix())  # the same order on every system
            images = [p for p in images if not p.name.startswith(".") and p.is_file()]
            if not images:
                raise ValueError(f"{folder / name}: no image in this class folder; add some or remove it")
            real_folder = (folder / name).resolve()  # a link may stand at any level: the class folder or a picture
            for p in images:
                real = p.resolve() if p.is_symlink() else real_folder
                if not real.is_relative_to(real_root):
                    raise ValueError(f"{p}: a link that leads out of {root}; copy the picture in its place")
            files[split] += [(p, label) for p in images]
    if len(classes) < 2:
        raise ValueError(f"{root}: needs two class folders or more, got {classes}; or IDX, CIFAR or NPZ files")
    return files, classes


def load_folder(root, image_size=0, cache_dir=".cache", max_samples=0, seed=0):
    """A folder of class folders through a uint8 memory map in `cache_dir`, decoded once.

    Pictures are stored as centre squares: at image_size where they are no larger than that, else at
    image_size * 8/7, from which training crops at random and evaluation crops the centre. The cache
    is keyed by names, sizes and times of the files and by the settings. Needs Pillow.
    """
    files, classes = scan_folder(root)
    import_pillow()
    for name, rows in files.items():
        files[name] = [rows[i] for i in stratified([label for _, label in rows], max_samples, seed)]
    every = [path for rows in files.values() for path, _ in rows]
    probe = every[:: max(1, len(every) // 64)]
    sides = [side for side in map(shorter_side, probe) if side]
    typical = int(np.median(sides)) if sides else 64
    if not image_size:
        # small pictures as they are, photographs up to 224 px: the largest multiple of 32 that leaves a margin
        image_size = max(24, typical) if typical <= 72 else min(224, typical * 7 // 8 // 32 * 32)
    stored = round(image_size * 8 / 7) if typical > image_size else image_size
    images = decode_cached(every, root, stored, Path(cache_dir))
    splits, start = {}, 0
    for name, rows in files.items():
        labels = np.array([label for _, label in rows], np.int64)
        splits[name] = Split(Rows(images, np.arange(start, start + len(rows))), labels)
        start += len(rows)
    return Data(splits, classes, image_size, f"{root.resolve().name} (image folder)")


def import_pillow():
    """Pillow's Image and ImageOps modules; ValueError with the remedy where it is not installed."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError("image folders need the package Pillow: pip install pillow") from None
    return Image, ImageOps


def open_image(path):
    """The opened picture, its size within the limit; ValueError in one line for what is not a picture."""
    Image, _ = import_pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            image = Image.open(path, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: is over {MAX_IMAGE_PIXELS:,} pixels ({one_line(error)}); make it smaller") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: not a whole picture in {', '.join(IMAGE_FORMATS)}; convert or remove it") from None
    except Exception as error:  # on damaged files Pillow raises nearly anything: SyntaxError, struct.error, TypeError
        raise ValueError(f"{path}: cannot be decoded ({one_line(error)}); replace or remove it") from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{path}: {image.width}x{image.height} is over {MAX_IMAGE_PIXELS:,} pixels; make it smaller")
    return image


def shorter_side(path):
    """In px; 0 where the file is no picture, which decoding will say, all of them at once."""
    try:
        with open_image(path) as image:
            return min(image.size)
    except ValueError:
        return 0


def decode_image(path, size):
    """The centre square of a picture as uint8 [size, size, 3]: upright by its EXIF tag, clear parts white."""
    Image, ImageOps = import_pillow()
    try:
        with open_image(path) as image:
            image.draft("RGB" if image.mode == "YCbCr" else None, (size, size))  # JPEG at a half, a quarter, an eighth
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            side, (width, height) = min(image.size), image.size
            left, top = (width - side) / 2, (height - side) / 2
            if (width, height) != (size, size):
                image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            return np.asarray(image)
    except Exception as error:  # as above, while the pixels are read
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be decoded ({one_line(error)}); replace or remove it") from None


def decode_or_error(path, size):
    """As `decode_image`, but the ValueError is given back, so that all broken pictures are named at once."""
    try:
        return decode_image(path, size)
    except ValueError as error:
        return error


def find_pictures(*places):
    """The paths that files, folders (at any depth, by their suffixes) and globs name; ValueError for one of none."""
    found = []
    for place in places:
        path = Path(os.path.expanduser(place))
        named = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        within = lambda folder: (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES)
        files = [file for path in named for file in (within(path) if path.is_dir() else [path])]
        files = [file for file in files if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise ValueError(f"--input {place}: no picture there; give a picture, a folder of pictures or a glob")
        found += files
    return list(dict.fromkeys(found))


def decode_pictures(paths, size, channels=3, batch_size=64):
    """Yields (paths, uint8 [n, size, size, channels], [(path, ValueError)]) of centre squares, a batch at a time.

    One channel is the luma of the three, as Pillow's. Pictures that cannot be decoded are among the errors alone.
    """
    import_pillow()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), batch_size):
            part = paths[start : start + batch_size]
            decoded = list(pool.map(lambda path: decode_or_error(path, size), part))
            good = [(path, image) for path, image in zip(part, decoded) if not isinstance(image, ValueError)]
            images = np.stack([image for _, image in good]) if good else np.zeros((0, size, size, 3), np.uint8)
            if channels == 1:
                luma = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
                images = ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]
            broken = [(path, error) for path, error in zip(part, decoded) if isinstance(error, ValueError)]
            yield [path for path, _ in good], images, broken


def decode_cached(paths, root, size, cache_dir):
    """Memory map uint8 [len(paths), size, size, 3] of the decoded pictures, made anew when they changed.

    Written under a temporary name and renamed when whole, so a stopped decode is never taken for a
    cache; older caches of the same folder are removed.
    """
    entries = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    key = hashlib.sha256(repr((entries, size, "centre square, bicubic, 1")).encode()).hexdigest()[:16]
    family = hashlib.sha256(repr((str(root.resolve()), size, len(paths))).encode()).hexdigest()[:8]
    target = cache_dir / f"{family}-{key}.npy"
    if not target.exists():
        made = not cache_dir.exists()
        partial = partial_file(target, len(paths) * size * size * 3)
        try:
            # Pillow decodes outside the interpreter's lock; written as a file, as a full disk under a map is a SIGBUS
            with ThreadPoolExecutor(os.cpu_count()) as pool, open(partial, "wb") as file:
                shape = (len(paths), size, size, 3)
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                try:
                    decoded, broken = pool.map(lambda path: decode_or_error(path, size), paths), []
                    for image in tqdm(decoded, "decode", len(paths), unit="img", disable=None):
                        if isinstance(image, ValueError):
                            broken.append(image)
                        else:
                            file.write(image.tobytes())
                    if broken:
                        names = ", ".join(str(error).split(":")[0] for error in broken[1:6])
                        raise ValueError(f"{broken[0]}" + f"; {len(broken) - 1} more: {names}" * (len(broken) > 1))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
            if made and not target.exists():
                cache_dir.rmdir()
        for old in cache_dir.glob(f"{family}-*.npy"):
            if old != target:
                try:
                    old.unlink()
                except OSError:
                    pass  # in use by another run on Windows: that run's business
    try:
        images = np.lib.format.open_memmap(target, mode="r")
        if (images.shape, images.dtype) != ((len(paths), size, size, 3), np.uint8):
            raise ValueError(f"it holds {images.dtype} {images.shape}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{target}: a damaged cache ({one_line(error)}); remove it") from None
    return images


def partial_file(target, size):
    """The path beside `target` of what will be renamed to it, of `size` bytes; ValueError where there is no room.

    What processes of this machine left there that were killed is removed.
    """
    folder, owner = target.parent.absolute(), f"{platform.node()}-"
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < size:
        raise ValueError(f"--cache_dir {folder}: needs {size / 2**20:,.0f} MiB, has {free / 2**20:,.0f}; make room")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"*.{owner}*.partial"):
        with contextlib.suppress(OSError, ValueError):  # Windows itself refuses to remove what is open
            if os.name == "nt" or not is_alive(int(stale.stem.rpartition("-")[2])):
                stale.unlink()
    return target.with_suffix(f".{owner}{os.getpid()}.partial")


def is_alive(pid):
    """Whether a process of that number runs (POSIX)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ------------------------------------------------------------------------------------------ Sudoku
# Cells are numbered 0 to 80 in reading order, 0 is a blank. Solvers hold candidates as bit masks, uint16
# [81, N] with bit d - 1 for digit d: the puzzles come last, so that each operation runs over all of them.

LEVELS = ("easy", "medium", "hard")
EASY_CLUES = 36  # easy: singles alone solve it and it has 36 clues or more; medium: singles alone; hard: not so
ROW, COLUMN = np.divmod(np.arange(81), 9)
UNIT_OF = np.stack([ROW, COLUMN, ROW // 3 * 3 + COLUMN // 3])  # [3, 81]: each cell's row, column and box
UNITS = np.argsort(UNIT_OF, axis=1, kind="stable").reshape(3, 9, 9)  # [3, 9, 9]: each unit's cells
BITS = np.array([511, *(1 << np.arange(9))], np.uint16)  # the mask of a blank and of each clue
COUNT = np.array([bin(mask).count("1") for mask in range(512)], np.uint8)


def sweep(masks):
    """(masks after one round of naked and hidden singles, whether all is single, whether it is broken)."""
    single = masks & (masks - np.uint16(1)) == 0
    fixed = np.where(single, masks, np.uint16(0))
    seen, hidden = np.zeros_like(masks), np.zeros_like(masks)
    broken = (masks == 0).any(0)
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
    """Mutates masks uint16 [81, N]: naked and hidden singles until nothing changes. (solved, broken) bool [N].

    With `goal` (a cell for each puzzle) it stops where that cell is found, and that is what solved means.
    """
    solved, broken = np.zeros((2, masks.shape[1]), bool)
    active = np.arange(masks.shape[1])
    while len(active):
        before = masks[:, active]
        after, single, bad = sweep(before)
        masks[:, active] = after
        if goal is not None:
            single = COUNT[after[goal[active], np.arange(len(active))]] == 1
        solved[active], broken[active] = single & ~bad, bad
        active = active[(after != before).any(0) & ~bad & ~(single & (goal is not None))]
    return solved, broken


def digits_of(masks):
    """uint8 [N, 81] from masks [81, N]: the digit where one candidate is left, else 0."""
    return np.where(COUNT[masks] == 1, COUNT[masks - (masks > 0)] + 1, 0).astype(np.uint8).T


def solve(puzzles, preference=None, limit=2, max_guesses=10**6):
    """`search` from the clues of uint8 [N, 81]."""
    return search(BITS[puzzles], preference, limit, max_guesses)


def search(masks, preference=None, limit=2, max_guesses=10**6, chunk=2048):
    """Depth-first search with singles between guesses, over all candidates uint16 [N, 81] at once.

    A guess is a digit of a cell with the fewest left: the lowest of the first such cell, or the one
    with the highest `preference` (float [N, 81, 9] in 0 to 1, such as a network's probabilities). Returns
    (first solutions uint8 [N, 81], zeros where there is none; solutions found int64 [N], at most `limit`, so
    that 1 of 2 proves uniqueness, or -1 where `max_guesses` came first; guesses int64 [N] up to the
    first solution, or to the end without one).
    """
    count = len(masks)
    if count > chunk:
        parts = [slice(i, i + chunk) for i in range(0, count, chunk)]
        led = [None if preference is None else preference[part] for part in parts]
        found = [search(masks[part], lead, limit, max_guesses) for part, lead in zip(parts, led)]
        return tuple(np.concatenate(arrays) for arrays in zip(*found))
    solutions = np.zeros((count, 81), np.uint8)
    number, guesses, tried, depth = np.zeros((4, count), np.int64)
    stack = [masks.copy()]  # a level: [N, 81]; each puzzle's own top is at its depth
    while len(active := np.flatnonzero((depth >= 0) & (number < limit) & (tried < max_guesses))):
        masks = np.empty((81, len(active)), np.uint16)
        for level in np.unique(depth[active]):
            at = depth[active] == level
            masks[:, at] = stack[level][active[at]].T
        solved, broken = propagate(masks)
        done = active[solved]
        first = done[number[done] == 0]
        solutions[first] = digits_of(masks[:, solved])[number[done] == 0]
        number[done] += 1
        depth[active[solved | broken]] -= 1
        open_ = ~(solved | broken)
        active, masks = active[open_], masks[:, open_].T  # [n, 81]
        left = COUNT[masks]
        if preference is None:
            cell = np.where(left > 1, left, 10).argmin(1)
            chosen = masks[np.arange(len(active)), cell]
            bit = chosen & (~chosen + np.uint16(1))  # its lowest
        else:
            live = (masks[:, :, None] & BITS[1:]).astype(bool) & (left > 1)[:, :, None]
            best = np.where(live, preference[active] - left[:, :, None], -99).reshape(len(active), 729).argmax(1)
            cell, bit = best // 9, BITS[1 + best % 9]
        for level in np.unique(depth[active]):
            if level + 1 == len(stack):
                stack.append(np.empty((count, 81), np.uint16))
            at = np.flatnonzero(depth[active] == level)
            rows, places = active[at], cell[at]
            stack[level][rows] = stack[level + 1][rows] = masks[at]
            stack[level][rows, places] &= ~bit[at]
            stack[level + 1][rows, places] = bit[at]
        guesses[active] += number[active] == 0
        tried[active] += 1
        depth[active] += 1
    number[(depth >= 0) & (number < limit)] = -1
    return solutions, number, guesses


def grade(puzzles, chunk=8192):
    """uint8 [N]: 0 easy, 1 medium, 2 hard (see EASY_CLUES) of uint8 [N, 81]."""
    levels = np.empty(len(puzzles), np.uint8)
    for start in range(0, len(puzzles), chunk):
        part = puzzles[start : start + chunk]
        solved, _ = propagate(np.ascontiguousarray(BITS[part].T))
        levels[start : start + chunk] = np.where(solved, (part > 0).sum(1) < EASY_CLUES, 2)
    return levels


def generate(count, level, seed=0):
    """(puzzles, solutions) uint8 [count, 81] of a level (easy, medium, hard), by `seed`, no two alike.

    Random complete grids lose clues in random order as long as singles alone still solve them (which
    proves that the solution is unique), hard ones then as long as the search finds one solution only,
    until singles no longer do. The first puzzles are the same whatever the count.
    """
    found, seen, total = [], set(), 0
    for block in itertools.count():
        puzzles, solutions = dig(level, np.random.default_rng(mix(seed, LEVELS.index(level), block)))
        fresh = [i for i, row in enumerate(puzzles) if not (row.tobytes() in seen or seen.add(row.tobytes()))]
        found.append((puzzles[fresh], solutions[fresh]))
        total += len(fresh)
        if total >= count:
            return tuple(np.concatenate(arrays)[:count] for arrays in zip(*found))


def dig(level, rng):
    """Well over half of `size` (puzzles, solutions) of one level, as `generate` says."""
    size = 768 if level == "hard" else 2048
    puzzles = np.zeros((size, 9, 9), np.uint8)
    for i in (0, 3, 6):  # boxes that share no line can be filled at random; the search fills the rest
        puzzles[:, i : i + 3, i : i + 3] = rng.permuted(np.tile(np.arange(1, 10), (size, 1)), axis=1).reshape(-1, 3, 3)
    solutions, found, _ = solve(puzzles.reshape(-1, 81), rng.random((size, 81, 9), np.float32), 1, max_guesses=40)
    solutions = solutions[found == 1]  # the rest ran into long searches
    order = rng.random(solutions.shape).argsort(1)  # clues go in this order
    puzzles = solutions.copy()
    np.put_along_axis(puzzles, order[:, :30], 0, 1)
    enough = grade(puzzles) < 2  # 51 clues nearly always are
    solutions, puzzles, order, singles = solutions[enough], puzzles[enough], order[enough], np.ones(enough.sum(), bool)
    low, high = {"easy": (EASY_CLUES, 46), "medium": (27, EASY_CLUES), "hard": (20, 29)}[level]
    target = rng.integers(low, high, len(solutions))
    for cell in order[:, 30:].T:
        clues = (puzzles > 0).sum(1)
        wanted = np.flatnonzero((clues > target) | (singles & (level == "hard")))
        trial = BITS[puzzles[wanted]]
        trial[np.arange(len(wanted)), cell[wanted]] = 511
        # clues that singles find again were not needed: the rest is solved as it was
        good, _ = propagate(np.ascontiguousarray(trial.T), cell[wanted])
        if level == "hard":  # still unique where no other digit in this cell leads to a solution
            doubtful = np.flatnonzero(~good)
            other = trial[doubtful]
            other[np.arange(len(doubtful)), cell[wanted[doubtful]]] &= ~BITS[solutions[wanted, cell[wanted]][doubtful]]
            good[doubtful] = search(other, limit=1)[1] == 0
            singles[wanted[doubtful[good[doubtful]]]] = False  # for good: fewer clues help no single
        puzzles[wanted[good], cell[wanted[good]]] = 0
    kept = grade(puzzles) == LEVELS.index(level)
    return puzzles[kept], solutions[kept]


CELL = np.full(256, 255, np.uint8)  # a character's digit, 0 for a blank, 255 for what is no cell
CELL[np.frombuffer(b"0.Xx*_", np.uint8)] = 0
CELL[np.frombuffer(b"123456789", np.uint8)] = np.arange(1, 10)
PUZZLE_COLUMNS, SOLUTION_COLUMNS = ("puzzle", "puzzles", "quizzes", "question"), ("solution", "solutions", "answer")


def read_sudoku(path, with_solutions=True, block_bytes=2**22):
    """(puzzles uint8 [N, 81], solutions uint8 [N, 81] or None) of a file, its format known by its content.

    CSV with puzzle and solution columns (Kaggle's, RRN's without a header, Sudoku-Extreme's), one
    puzzle a line (.sdm), or one board in nine rows (.sdk, .ss); gzip too; a blank is one of 0.Xx*_.
    ValueError with the line for what is no puzzle, repeats a digit or contradicts its solution.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            rest = file.read(block_bytes).removeprefix(b"\xef\xbb\xbf")
            lines = (line.strip(b' "\r\t') for line in rest.split(b"\n"))
            first = next((line for line in lines if line and not line.startswith(b"#")), None)
            if first is None:
                raise ValueError(f"{path}: is empty; give a puzzle file")
            if len(first) > MAX_LINE:
                raise ValueError(f"{path}: line 1: too long for a puzzle; give 81 cells a line, or nine rows")
            if b"," not in first and len(first) != 81 and first.lower().decode("latin-1") not in PUZZLE_COLUMNS:
                return read_board(path, rest), None
            columns, skip = sudoku_columns(path, first)
            columns = columns if with_solutions else (columns[0], None, columns[2])
            header, _, after = rest.partition(first) if skip else (b"", b"", rest)
            line, rest, blocks = 1 + header.count(b"\n") + skip, after.partition(b"\n")[2] if skip else after, []
            taken = 0
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # parses while the next block is read
                while (more := file.read(block_bytes)) or rest:
                    whole, newline, rest = (rest + more).rpartition(b"\n") if more else (rest, b"", b"")
                    if whole.strip():
                        blocks.append(pool.submit(read_rows, path, whole, line, columns))
                    taken += len(whole)
                    if taken > MAX_ARRAY_BYTES:
                        raise ValueError(f"{path}: line {line}: over {MAX_ARRAY_BYTES:,} bytes of text; split the file")
                    line += whole.count(b"\n") + len(newline)
                    if len(rest) > MAX_LINE:
                        raise ValueError(f"{path}: line {line}: too long for a puzzle; give 81 cells a line")
                blocks = [block.result() for block in blocks]
    except (EOFError, gzip.BadGzipFile, zipfile.zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip ({one_line(error)}); fetch the file again") from None
    if not blocks:
        raise ValueError(f"{path}: has a header and no puzzle; give a puzzle file")
    return tuple(np.concatenate(arrays) if arrays[0] is not None else None for arrays in zip(*blocks))


def sudoku_columns(path, first):
    """((puzzle column, solution column or None, columns), whether the line is a header) of a file's first line."""
    names = [name.strip().strip(b'"').decode("utf-8", "replace").lower() for name in first.split(b",")]
    cells = [len(name) == 81 and (CELL[list(name.encode()[:81])] < 10).all() for name in names]
    if any(cells):  # RRN's files, and one puzzle a line
        index = [i for i, is_grid in enumerate(cells) if is_grid]
        complete = [i for i in index[1:] if not set(names[i]) & set("0.xX*_")]
        return (index[0], complete[0] if complete else None, len(names)), False
    puzzle, solution = (
        next((i for i, name in enumerate(names) if name in known), None) for known in (PUZZLE_COLUMNS, SOLUTION_COLUMNS)
    )
    if puzzle is None:
        got = one_line(first.decode("utf-8", "replace"))[:60]
        raise ValueError(f"{path}: line 1: neither 81 cells nor a header with a puzzle column, got {got}")
    return (puzzle, solution, len(names)), True


def read_rows(path, content, line, columns):
    """(puzzles, solutions or None) of whole lines; `line` is the first one's number."""
    puzzle, solution, count = columns
    text = np.frombuffer(content.replace(b'"', b"") + b"\n", np.uint8)
    ends = np.flatnonzero(text == 10)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > MAX_LINE:  # the loop below takes a pass for each space at the end of a line
        place = line + (ends - starts).argmax()
        raise ValueError(f"{path}: line {place}: too long for a puzzle; give 81 cells a line")
    while (spaces := (ends > starts) & np.isin(text[ends - 1], (9, 13, 32))).any():
        ends = ends - spaces
    numbers = line + np.arange(len(starts))
    filled = (ends > starts) & (text[starts] != 35)  # empty lines and comments are passed over, with their commas
    commas = np.flatnonzero(text == 44)
    commas = commas[filled[np.searchsorted(starts, commas, "right") - 1]]
    starts, ends, numbers = starts[filled], ends[filled], numbers[filled]
    have = np.searchsorted(commas, ends) - np.searchsorted(commas, starts)
    if (have != count - 1).any():
        row = np.flatnonzero(have != count - 1)[0]
        raise ValueError(f"{path}: line {numbers[row]}: has {have[row] + 1} columns, the first line {count}")
    borders = np.concatenate([starts[:, None] - 1, commas.reshape(len(starts), count - 1), ends[:, None]], 1)
    grids = []
    for column in (puzzle, solution):
        if column is None:
            grids.append(None)
            continue
        begin, length = borders[:, column] + 1, borders[:, column + 1] - borders[:, column] - 1
        if (length != 81).any():
            row = np.flatnonzero(length != 81)[0]
            raise ValueError(f"{path}: line {numbers[row]}: has {length[row]} cells, a puzzle has 81")
        grids.append(CELL[np.lib.stride_tricks.sliding_window_view(text, 81)[begin]])
    check_grids(path, numbers, *grids)
    return grids


def read_board(path, content):
    """uint8 [1, 81] of one board in nine rows: .sdk with its headers and sections, .ss with its rules, or bare."""
    grid, inside = [], True
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        text = line.strip()
        cells = text.replace("|", "").replace(" ", "")
        if text.startswith("["):
            inside = text.lower() == "[puzzle]"
        elif inside and cells and not text.startswith("#") and "--" not in cells:  # a rule between the boxes
            row = CELL[np.frombuffer(cells.encode(), np.uint8)]
            if len(row) != 9 or (row > 9).any():
                got = one_line(text)[:50]
                raise ValueError(f"{path}: line {number}: a row is nine cells of 1-9 or 0.Xx*_, got {got}")
            grid.append((number, row))
    if len(grid) != 9:
        raise ValueError(f"{path}: has {len(grid)} rows of cells, a board has 9; or give 81 cells a line")
    board = np.concatenate([row for _, row in grid])[None]
    check_grids(path, [grid[0][0]], board, None)
    return board


def check_grids(path, numbers, puzzles, solutions):
    """ValueError, with the line, for cells that are none, digits that repeat, solutions that do not fit."""
    def refuse(bad, say):
        if bad.any():
            row, cell = np.argwhere(bad)[0]
            raise ValueError(f"{path}: line {numbers[row]}: {say(cell + 1)}")

    for name, grids in (("puzzle", puzzles), ("solution", solutions)):
        if grids is None:
            continue
        refuse(grids > 9, lambda cell: f"cell {cell} of the {name} is none of 1-9 or 0.Xx*_")
        if name == "solution":
            refuse(grids == 0, lambda cell: f"cell {cell} of the solution is blank")
            refuse((puzzles > 0) & (puzzles != grids), lambda cell: f"cell {cell} of the solution contradicts the clue")
        refuse(~consistent(grids)[:, None], lambda cell: f"a row, column or box of the {name} repeats a digit")


def consistent(grids):
    """bool [N]: whether no row, column or box of uint8 [N, 81] has a digit twice (blanks aside)."""
    good = np.ones(len(grids), bool)
    for start in range(0, len(grids), 4096):  # in cache
        part = grids[start : start + 4096]
        bits = np.ascontiguousarray((BITS[part] & 511 * (part > 0).astype(np.uint16)).T)
        for units in UNITS:
            cells = bits[units]
            fine = np.bitwise_or.reduce(cells, 1) == np.add.reduce(cells, 1, dtype=np.uint16)
            good[start : start + 4096] &= fine.all(0)
    return good


def sudoku_text(suffix, puzzles, solutions=None):
    """The text of grids uint8 [N, 81] as .csv (puzzle,solution; an unsolved one's is empty), .sdm or .sdk (one board).

    .sdm and .sdk hold the solution where there is one (a row of zeros is none), else the puzzle.
    """
    solutions = np.zeros_like(puzzles) if solutions is None else solutions
    write = lambda grids: [bytes(row).decode() for row in grids + np.uint8(48)]
    if suffix == ".csv":
        rows = [f"{p},{s if s[0] != '0' else ''}" for p, s in zip(write(puzzles), write(solutions))]
        return "\n".join(["puzzle,solution", *rows]) + "\n"
    lines = [line.replace("0", ".") for line in write(np.where(solutions > 0, solutions, puzzles))]
    if suffix == ".sdm":
        return "\n".join(lines) + "\n"
    if len(lines) != 1:
        raise ValueError("an .sdk file holds one board, there are more; give a .sdm or .csv file")
    return "\n".join(["[Puzzle]", *(lines[0][i : i + 9] for i in range(0, 81, 9))]) + "\n"


GENERATED = {"train": (4000, 4000, 300), "val": (150, 150, 100), "test": (300, 300, 100)}  # of each level


def load_sudoku(source=None, val_fraction=0.1, max_samples=0, seed=0, cache_dir=".cache"):
    """The `Data` of Sudoku puzzles: a file, a folder of train and perhaps val and test files, or None: generated.

    Images are puzzles uint8 [N, 81], 0 a blank. Labels are uint8 [N, 82]: the digit of a blank and 0
    for a clue, and last the level (`grade`). No validation or test puzzle shares its solution grid
    with a training puzzle, up to every symmetry of Sudoku (`symmetry_class`). Repeated puzzles are
    dropped and counted; ValueError for a puzzle of another split that stands in train too.
    """
    sets, notes = (generated(Path(cache_dir)) if source is None else read_splits(source)), []
    for name, (puzzles, solutions) in sets.items():
        kept = np.sort(np.unique(row_hash(puzzles), return_index=True)[1])
        notes += [f"{len(puzzles) - len(kept):,} duplicates dropped from {name}"] * (len(kept) < len(puzzles))
        if 0 < max_samples < len(kept):
            kept = np.sort(np.random.default_rng(mix(seed, len(kept))).choice(kept, max_samples, replace=False))
        sets[name] = puzzles[kept], solutions[kept]
    puzzles, solutions = sets["train"]
    if len(sets) > 1 or val_fraction > 0:
        classes, rows = symmetry_class(solutions), row_hash(puzzles)
    for name in [name for name in sets if name != "train"]:
        twins = np.flatnonzero(np.isin(row_hash(sets[name][0]), rows))
        if len(twins):
            raise ValueError(f"{source}: puzzle {twins[0] + 1} of {name} stands in train too; remove it from one")
        apart = ~np.isin(symmetry_class(sets[name][1]), classes)
        notes += [f"{(~apart).sum():,} of {name} dropped, solved like one of train up to symmetry"] * (not apart.all())
        sets[name] = tuple(grids[apart] for grids in sets[name])
        if not apart.any():
            raise ValueError(f"{source}: every solution of {name} is one of train's, up to symmetry; give others")
    if "val" not in sets and val_fraction > 0:
        _, members = np.unique(classes, return_inverse=True)
        place = np.random.default_rng(mix(seed, 2)).permutation(members.max() + 1)[members]  # classes in random order
        val = place <= np.searchsorted(np.cumsum(np.bincount(place)), len(place) * val_fraction)
        if val.all():
            raise ValueError(f"--val_fraction {val_fraction}: too few different solution grids; give more")
        sets.update(train=(puzzles[~val], solutions[~val]), val=(puzzles[val], solutions[val]))
    splits = {
        name: Split(p, np.concatenate([np.where(p > 0, 0, s), grade(p)[:, None]], 1).astype(np.uint8))
        for name, (p, s) in sets.items()
    }
    name = "generated puzzles" if source is None else f"{Path(source).name} (Sudoku)"
    return Data(splits, [str(digit) for digit in range(1, 10)], 9, "; ".join([name, *notes]))


def generated(cache_dir):
    """{split: (puzzles, solutions)} of GENERATED, kept in `cache_dir` once they are made."""
    path = cache_dir / f"sudoku-{mix(*GENERATED.items(), 'generator 1'):x}.npz"
    with contextlib.suppress(Exception):  # none yet, or a damaged one, see `load_npz`: made anew
        with np.load(path, allow_pickle=False) as kept:
            return {name: (kept[f"{name}_puzzles"], kept[f"{name}_solutions"]) for name in GENERATED}
    sets = {}
    for seed, (name, counts) in enumerate(GENERATED.items()):
        levels = [generate(count, level, seed) for count, level in zip(counts, LEVELS)]
        sets[name] = tuple(np.concatenate(grids) for grids in zip(*levels))
    arrays = {f"{name}_puzzles": puzzles for name, (puzzles, _) in sets.items()}
    arrays |= {f"{name}_solutions": solutions for name, (_, solutions) in sets.items()}
    partial = partial_file(path, sum(array.nbytes for array in arrays.values()))
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return sets


def read_splits(source):
    """{split: (puzzles, solutions)} of a file (all of it train) or of a folder of train, val and test files."""
    path = Path(os.path.expanduser(source))
    if not source or not path.exists():
        raise ValueError(f"--data {source}: no such file or folder; give a puzzle file, or leave the flag out")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"--data {source}: is neither a file nor a folder; give one of them")
    files = {"train": path}
    if path.is_dir():
        named = [(SPLIT_NAMES.get(p.name.split(".")[0].lower()), p) for p in sorted(path.iterdir()) if p.is_file()]
        files = {name: inside(p, path) for name, p in named if name}
        if "train" not in files or len(files) < sum(name is not None for name, _ in named):
            raise ValueError(f"{path}: needs train.csv, perhaps val.csv and test.csv (or .gz, .sdm), each once")
    sets = {name: read_sudoku(p) for name, p in files.items()}
    for name, (_, solutions) in sets.items():
        if solutions is None:
            raise ValueError(f"{files[name]}: has no solutions; it can be predicted, not trained or evaluated on")
    return sets


def row_hash(rows):
    """uint64 [N]: equal for equal rows of integers [N, M]; two that differ agree by chance once in 2^64."""
    factors = np.random.default_rng(81).integers(1, 2**63, rows.shape[1], np.uint64) * 2 + 1
    parts = [rows[i : i + 65_536].astype(np.uint64) @ factors for i in range(0, len(rows), 65_536)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def symmetry_class(solutions, chunk=16_384):
    """uint64 [N]: the same for grids uint8 [N, 81] that relabelling, permuting or transposing turns into each other.

    Two rows of a band, read column by column, map digits to digits, and two digits, read row by row, map
    columns to columns: permutations whose cycle lengths no symmetry changes. The class is those of all
    pairs. It is an invariant and no canonical form, but of 22,000 random grids no two shared one.
    """
    if len(solutions) > chunk:
        parts = [symmetry_class(solutions[i : i + chunk]) for i in range(0, len(solutions), chunk)]
        return np.concatenate(parts)
    grids = solutions.reshape(-1, 9, 9).astype(np.int64) - 1
    sides = []
    for lines in (grids, grids.transpose(0, 2, 1)):
        bands = []
        for band in (0, 3, 6):
            pairs = itertools.combinations(range(band, band + 3), 2)
            codes = np.sort([cycle_code(lines[:, a], lines[:, b]) for a, b in pairs], 0)
            bands.append((codes[0] * 1000 + codes[1]) * 1000 + codes[2])
        bands = np.sort(bands, 0).astype(np.uint64)
        sides.append((bands[0] * np.uint64(0x9E3779B97F4A7C15) ^ bands[1]) * np.uint64(0xBF58476D1CE4E5B9) ^ bands[2])
    sides = np.sort(sides, 0)
    columns = grids.argsort(2)  # [N, row, digit]: where the row has the digit
    pairs = itertools.combinations(range(9), 2)
    codes = np.sort([cycle_code(columns[:, :, a], columns[:, :, b]) for a, b in pairs], 0)  # [36, N]
    return (sides[0] * np.uint64(0x94D049BB133111EB) ^ sides[1]) * np.uint64(0x9E3779B97F4A7C15) ^ row_hash(codes.T)


def cycle_code(a, b):
    """int64 [N]: tells the cycle lengths of the permutations of 0 to 8 that take a[n, i] to b[n, i], none to itself."""
    step = np.take_along_axis(b, a.argsort(1), 1)
    power, code = step, np.zeros(len(step), np.int64)
    for _ in range(3):  # how many elements lie in cycles that 2, 3 and 4 steps close
        power = np.take_along_axis(step, power, 1)
        code = code * 10 + (power == np.arange(9)).sum(1)
    return code


# ------------------------------------------------------------------------------------- order of a run


def one_line(error):
    """The error's text on one line, control characters escaped, cut to 200 characters."""
    return (repr(str(error))[1:-1].split("\\n")[0] or type(error).__name__)[:200]


def mix(*numbers):
    """A 63-bit seed from whole numbers and the like; no two of (seed, epoch), (seed, step, rank) share streams."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


def epoch_order(count, seed, epoch):
    """int64 [count]: the permutation of one epoch, a function of (seed, epoch) alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch)))


def curriculum_order(levels, seed, epoch, epochs):
    """int64 [N] for one epoch of a run: easy, then medium, then hard puzzles, by the share of the run that is done.

    `levels` integer [N]. Each place of the epoch draws its level by `CURRICULUM` (levels that are not there
    leave their share to the others) and takes that level's puzzles in random order, again and again.
    """
    rng, count = np.random.default_rng(mix(seed, epoch, 3)), len(levels)
    done = (epoch + np.arange(count) / count) / epochs
    phase = np.searchsorted([end for end, _ in CURRICULUM], done, "right")
    pools = [rng.permutation(np.flatnonzero(levels == level)) for level in range(3)]
    there = np.array([len(pool) > 0 for pool in pools])
    shares = (np.array([share for _, share in CURRICULUM])[phase] + 1e-9) * there
    cumulated = (shares / shares.sum(1, keepdims=True)).cumsum(1)
    drawn = (rng.random((count, 1)) >= cumulated[:, :2]).sum(1)
    order = np.empty(count, np.int64)
    for level, pool in enumerate(pools):
        places = np.flatnonzero(drawn == level)
        order[places] = np.resize(pool, len(places))
    return torch.from_numpy(order)


CURRICULUM = (  # until this share of the run: the shares of easy, medium and hard
    (0.2, (0.8, 0.2, 0.0)),
    (0.5, (0.2, 0.6, 0.2)),
    (2.0, (0.1, 0.3, 0.6)),
)


def stratified(labels, count, seed):
    """Sorted indices of `count` samples (0: all) with the classes in their proportion, by `seed`."""
    labels = np.asarray(labels)
    if not count or count >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng(mix(seed, count))
    shuffled = rng.permutation(len(labels))
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class by class, at random within
    _, sizes = np.unique(labels, return_counts=True)
    # the i-th of n in a class stands at (i + 1/2) / n; the first `count` over all classes keep the proportion
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in sizes])
    return np.sort(shuffled[np.argsort(place, kind="stable")[:count]])


def subset(split, count, seed):
    return split.take(stratified(split.labels, count, seed)) if 0 < count < len(split) else split


def set_aside(split, fraction, seed):
    """(train, val): `fraction` of each class, at least one, in val; a class of one stays in train.

    Images of a memory map stay there: the parts share it through `Rows`.
    """
    rng = np.random.default_rng(mix(seed, 1))
    val = np.zeros(len(split), bool)
    for label in np.unique(split.labels):
        rows = rng.permutation(np.flatnonzero(split.labels == label))
        val[rows[: min(len(rows) - 1, max(1, round(len(rows) * fraction)))]] = True
    if not val.any():
        raise ValueError(f"--val_fraction {fraction}: leaves no validation image of {len(split)}; give more data")
    return tuple(Split(Rows(split.images, np.flatnonzero(rows)), split.labels[rows]) for rows in (~val, val))


class Rows:
    """Some rows of an array or memory map [N, ...], read when indexed: nothing is copied before."""

    def __init__(self, array, rows):
        self.array, self.rows = array, rows
        self.shape, self.nbytes = (len(rows), *array.shape[1:]), array[:1].nbytes * len(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.array[self.rows[index]]

    def __getstate__(self):
        """A worker that is spawned opens the map by its name: pickled as it is, it would be read whole."""
        mapped = isinstance(self.array, np.memmap)
        return {**vars(self), "array": Path(self.array.filename) if mapped else self.array}

    def __setstate__(self, state):
        vars(self).update(state)
        if isinstance(self.array, Path):
            self.array = np.load(self.array, mmap_mode="r", allow_pickle=False)


def pixel_statistics(images, most=10_000):
    """(mean, std) by channel in [0, 1] over at most `most` images, evenly taken; std at least 1/255."""
    step = max(1, -(-len(images) // most))
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), step * 500):
        chunk = np.asarray(images[np.arange(start, min(start + step * 500, len(images)), step)])
        for channel in range(len(counts)):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 255.0**-2))
    return tuple(mean.tolist()), tuple(std.tolist())


# ------------------------------------------------------------------- augmentation on whole batches


def uniform(index, seed, epoch, draws):
    """float32 [B, draws] in [0, 1): the draws of each sample, a function of (seed, epoch, index) alone.

    The finaliser of SplitMix64 (Steele et al. 2014) over a counter, in wrapping int64 arithmetic: a
    sample draws the same in any batch, order, worker or process.
    """
    # one counter for every (sample, draw); the 63-bit key separates seeds and epochs
    z = index.cpu()[:, None] * draws + torch.arange(draws) + 1
    z = z * -7046029254386353131 + mix(seed, epoch, draws)  # the golden ratio's odd 64-bit constant
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    return (z >> 40 & 0xFFFFFF).float() / 2**24


def augment(images, index, seed, epoch, image_size, mean, std, crop_padding=4, flip=True, min_crop_area=0.35, cutout=0):
    """Normalised float32 [B, C, image_size, image_size] from square uint8 [B, H, W, C], each sample its own draw.

    Images larger than image_size get a random resized crop (area from `min_crop_area` to 1, aspect
    3/4 to 4/3; Szegedy et al. 2015); others are padded by reflection and cropped. Half are mirrored,
    the other half in the next epoch (Jordan 2024, arXiv:2404.00498), and a square of `cutout` px set to
    the mean (DeVries & Taylor 2017; 0 is off).
    """
    assert images.ndim == 4 and images.shape[1] == images.shape[2] >= image_size, (images.shape, image_size)
    u = uniform(index, seed, epoch, 8)
    turned = flip & ((uniform(index, seed, 0, 8)[:, 4] < 0.5) ^ bool(epoch % 2))
    if images.shape[1] > image_size:
        x = resized_crop(images, u, turned, image_size, min_crop_area)
    else:
        x = padded_crop(images, u, turned, crop_padding)
    return normalise(x, mean, std, cut(u, image_size, cutout, x) if cutout else None)


def padded_crop(images, u, turned, padding):
    """uint8 [B, H, W, C]: one of (2 * padding + 1)^2 windows of the reflected image, by u[:, 0:2]; some `turned`."""
    batch, height, width, channels = images.shape
    x, p = images, padding
    if padding:
        padded = images.new_empty(batch, height + 2 * p, width + 2 * p, channels)
        padded[:, p:-p, p:-p] = images
        padded[:, p:-p, :p], padded[:, p:-p, -p:] = images[:, :, 1 : p + 1].flip(2), images[:, :, -p - 1 : -1].flip(2)
        padded[:, :p], padded[:, -p:] = padded[:, p + 1 : 2 * p + 1].flip(1), padded[:, -2 * p - 1 : -p - 1].flip(1)
        # rows of each window as a strided view, then one index: four times as fast as a gather of pixels
        rows = padded.view(batch, height + 2 * p, -1).unfold(2, width * channels, channels)  # [B, H+2p, 2p+1, W * C]
        top, left = (u[:, :2] * (2 * p + 1)).long().to(images.device)[:, :, None].unbind(1)  # [B, 1]
        place = torch.arange(batch, device=u.device)[:, None].to(images.device)
        x = rows[place, top + torch.arange(height, device=top.device), left].view(images.shape)
    turned = turned.nonzero()[:, 0].to(images.device)
    return x.index_copy(0, turned, x.index_select(0, turned).flip(2))


def resized_crop(images, u, turned, size, min_area):
    """uint8 [B, size, size, C] of uint8 [B, H, W, C]: a box of random area, aspect and place, antialiased bilinear.

    One image at a time, which for bytes on a CPU is ten times as fast as grid_sample on the batch; other devices
    resize in float and round.
    """
    batch, height, width, channels = images.shape
    area, aspect = min_area + (1 - min_area) * u[:, 0], torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
    side = torch.stack([(area / aspect).sqrt() * height, (area * aspect).sqrt() * width], 1)  # [B, (height, width)]
    most = torch.tensor([height, width])
    side = side.round().clamp(min=1).minimum(most)
    corner = (u[:, 2:4] * (most - side + 1)).floor()
    out = images.new_empty(batch, size, size, channels)
    for i, (top, left, h, w) in enumerate(torch.cat([corner, side], 1).int().tolist()):
        box = images[i : i + 1, top : top + h, left : left + w].permute(0, 3, 1, 2)
        box = box if images.device.type == "cpu" else box.float()
        box = F.interpolate(box, (size, size), mode="bilinear", antialias=True)
        box = box if box.dtype == torch.uint8 else box.round().clamp(0, 255)
        box = box[0].permute(1, 2, 0)
        out[i] = box.flip(1) if turned[i] else box
    return out


def cut(u, size, side, x):
    """float32 [B, size, size * C]: 0 in a square of `side` px, its centre anywhere, so it may hang over; else 1."""
    centre = (u[:, 5:7] * size).floor()[:, :, None]  # [B, 2, 1]
    far = ((torch.arange(size) - centre).add(side // 2).div(side).floor() != 0).float()
    rows, columns = far.to(x.device).unbind(1)
    return torch.maximum(rows[:, :, None], columns.repeat_interleave(x.shape[3], 1)[:, None])


def normalise(images, mean, std, keep=None):
    """float32 [B, C, H, W] in channels_last memory from [B, H, W, C] in 0 to 255, times `keep` [B, H, W * C]."""
    batch, height, width, channels = images.shape
    mean, std = pixel_rows(tuple(mean), tuple(std), width, images.device)
    # rows of W * C: the constants along the whole row make it 7 times as fast as three by three
    x = images.reshape(batch, height, width * channels).to(torch.float32, copy=True).sub_(mean).div_(std)
    x = x if keep is None else x.mul_(keep)
    return x.view(images.shape).permute(0, 3, 1, 2)


@functools.lru_cache(8)
def pixel_rows(mean, std, width, device):
    """Mean and std of each channel in 0 to 255, once for each pixel of a row: float32 [width * C] on the device."""
    return tuple((torch.tensor(values) * 255).repeat(width).to(device) for values in (mean, std))


def centre(images, image_size, mean, std):
    """What evaluation sees: the centre of image_size of uint8 [B, H, W, C], normalised to [B, C, H, W]."""
    top, left = ((side - image_size) // 2 for side in images.shape[1:3])
    return normalise(images[:, top : top + image_size, left : left + image_size], mean, std)


def mix_samples(inputs, labels, index, seed, epoch, classes, mixup=0.0, cutmix=0.0):
    """(inputs, soft targets float32 [B, classes]): each of float [B, C, H, W] mixed with another one of its batch.

    Mixup (Zhang et al. 2018) averages the two by a share from Beta(mixup, mixup), CutMix (Yun et al. 2019) lays a box
    of the partner, cut to the picture, over the sample; the targets of labels int64 [B] get the shares of what is
    seen. With both above 0 each sample takes one of them at random. Draws are those of the sample, its partner
    depends on the batch.
    """
    batch, _, height, width = inputs.shape
    u, sides = uniform(index, seed, epoch, 6), torch.tensor([height, width])
    boxed = (u[:, 1] < 0.5) if mixup and cutmix else torch.full((batch,), bool(cutmix))
    own = beta(u[:, 2], mixup) if mixup else torch.zeros(batch)  # the share of the sample
    own = torch.where(boxed, beta(u[:, 2], cutmix), own) if cutmix else own
    half = (1 - own).sqrt()[:, None] * sides / 2  # [B, (y, x)]
    low, high = ((u[:, 3:5] * sides + by).round().clamp(min=0).minimum(sides) for by in (-half, half))
    own = torch.where(boxed, 1 - (high - low).prod(1) / (height * width), own)
    # drawn on the CPU; only these go to the device
    partner, boxed, own, low, high = (x.to(inputs.device) for x in (u[:, 0].argsort(), boxed, own, low, high))
    y, x = (torch.arange(side, device=inputs.device) for side in (height, width))
    rows, columns = (y >= low[:, :1]) & (y < high[:, :1]), (x >= low[:, 1:]) & (x < high[:, 1:])
    outside = 1 - (rows[:, None, :, None] & columns[:, None, None, :]).float()  # [B, 1, H, W]
    weight = torch.where(boxed[:, None, None, None], outside, own[:, None, None, None]).to(inputs)
    targets = F.one_hot(labels, classes).float()
    return inputs.index_select(0, partner).lerp(inputs, weight), targets[partner].lerp(targets, own[:, None])


def beta(u, alpha):
    """Draws from Beta(alpha, alpha), alpha 0.001 to 100, for uniform u float32 [B] on the CPU, by its quantiles."""
    place, lower = beta_quantiles(min(max(alpha, 1e-3), 100.0))
    x = torch.from_numpy(np.interp(torch.minimum(u, 1 - u).numpy() * 2, place, lower)).to(u)
    return torch.where(u < 0.5, x, 1 - x)


@functools.lru_cache(8)
def beta_quantiles(alpha, points=4097):
    """(shares float64 [points], x): which x below 1/2 holds each share of the lower half of Beta(alpha, alpha).

    In y = x^alpha, for an alpha below 1, the density has no pole, so that the trapezoids' sum is exact to 1e-6.
    """
    power = min(alpha, 1.0)
    x = np.linspace(0, 0.5**power, points) ** (1 / power)
    density = x ** (alpha - power) * (1 - x) ** (alpha - 1)
    shares = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return shares / shares[-1], x


def image_views(inputs):
    """(view, weight, restore) of float [B, C, H, W] for test-time augmentation (Jordan 2024, arXiv:2404.00498).

    The image, and with half its weight each the image moved by one px to the lower right and the upper left; all
    three also from left to right. `restore` makes outputs those of the image, here by leaving them.
    """
    _, _, height, width = inputs.shape
    padded = F.pad(inputs, (1, 1, 1, 1), mode="reflect")
    moved = [padded[:, :, i : i + height, i : i + width] for i in (0, 2)]
    last = inputs.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    for view, weight in ((inputs, 0.25), (moved[0], 0.125), (moved[1], 0.125)):
        for turned in (view, view.flip(3)):
            yield turned.contiguous(memory_format=memory_format), weight, same_outputs


def same_outputs(outputs):
    return outputs


def sudoku_symmetry(index, seed, epoch):
    """A random symmetry of Sudoku for each sample: (cells int64 [B, 81], digits int64 [B, 10]), each its own draw.

    Bands, rows in bands, stacks, columns in stacks and digits are permuted, half are transposed. New cell i
    is old cell cells[i], old digit d is new digit digits[d]; digits[0] = 0.
    """
    u = uniform(index, seed, epoch, 34)
    digits = F.pad(u[:, :9].argsort(1) + 1, (1, 0))
    lines = []
    for start in (9, 21):
        band, within = u[:, start : start + 3].argsort(1), u[:, start + 3 : start + 12].view(-1, 3, 3).argsort(2)
        lines.append((3 * band[:, :, None] + within).flatten(1))  # [B, 9]
    cells = 9 * lines[0][:, :, None] + lines[1][:, None, :]  # [B, 9, 9]
    return torch.where(u[:, 33, None, None] < 0.5, cells.mT, cells).flatten(1), digits


def transform_sudoku(grids, cells, digits):
    """Integer [B, 81] grids (0 a blank) under the symmetries of `sudoku_symmetry`."""
    return digits.to(grids.device).gather(1, grids.gather(1, cells.to(grids.device)).long()).to(grids.dtype)


def restore_sudoku(p, cells, digits):
    """Float [B, 81, 9] over the digits of transformed boards, turned back to those of the boards themselves."""
    cells, digits = cells.to(p.device), digits.to(p.device)
    p = p.gather(2, (digits[:, None, 1:] - 1).expand(-1, 81, -1))
    return p.gather(1, cells.argsort(1)[:, :, None].expand(-1, -1, 9))


def sudoku_views(puzzles, count=8):
    """(view, weight, restore) of integer [B, 81]: the boards, and `count` - 1 symmetries of them, for test-time use.

    `restore` turns logits [S, B, 81, 9] back. A network that is equivariant to rounding gains what rounding costs it.
    """
    yield puzzles, 1 / count, same_outputs
    for view in range(1, count):
        cells, digits = sudoku_symmetry(torch.full((len(puzzles),), view), 0, 0)
        restore = lambda logits, cells=cells, digits=digits: restore_sudoku(logits[-1], cells, digits)[None]
        yield transform_sudoku(puzzles, cells, digits), 1 / count, restore


# ------------------------------------------------------------------------------------------ batches


def chunks(order, batch_size):
    """`order` in pieces of batch_size; a last piece of one joins the one before (BatchNorm needs two)."""
    pieces = list(torch.as_tensor(order).split(batch_size))
    if len(pieces) > 1 and len(pieces[-1]) == 1 < batch_size:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces


def share(pieces, rank, ranks):
    """Every ranks-th of the pieces; the last stands in where one is missing, so that all processes have as many."""
    mine = pieces[rank::ranks]
    return mine + pieces[-1:] * (len(pieces[::ranks]) - len(mine))


def ignore_signals(worker):
    """Ctrl-C or a shutdown may reach every process: the main one finishes its step, so workers go on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Gather(torch.utils.data.Dataset):
    """For DataLoader: a list of indices in, their images and labels out, gathered at once."""

    def __init__(self, split):
        self.split = split

    def __getitem__(self, index):
        index = index.numpy()
        images = np.ascontiguousarray(self.split.images[index])
        return torch.from_numpy(images), torch.from_numpy(self.split.labels[index])


def batches(split, batch_size, device, resident_bytes=2**30, workers=None, timeout=600):
    """A function that yields the batches of an order: fetch(order, start=0) from batch `start` on.

    The order is of samples, or a list of batches of them, as `chunks` and `share` give.
    Each batch is (rows of the images, of the labels, index int64 [B] on the CPU). A split of
    at most `resident_bytes` is moved to the device once; a larger one, or any where `workers` is
    given, goes through a DataLoader, whose workers may be silent for `timeout` seconds. Both give the same batches.
    """
    cut = lambda order, start: (order if isinstance(order, list) else chunks(order, batch_size))[start:]
    if workers is None and split.images.nbytes <= resident_bytes:
        images = torch.from_numpy(np.array(split.images[np.arange(len(split))])).to(device)
        labels = torch.from_numpy(split.labels).to(device)

        def fetch(order, start=0):
            for index in cut(order, start):
                rows = index.to(device)
                yield images.index_select(0, rows), labels[rows], index  # images[rows] takes 15 times as long

        return fetch

    mapped = split.images
    while isinstance(mapped, Rows):
        mapped = mapped.array
    if workers is None:  # a spawned worker would be sent a copy of what is in memory
        workers = min(4, os.cpu_count() or 1) if isinstance(mapped, np.memmap) else 0
    pieces = []  # refilled for each order, so that workers persist over epochs
    loader = DataLoader(
        Gather(split), sampler=pieces, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None, persistent_workers=workers > 0,
        generator=torch.Generator(),  # else each pass draws from the one that dropout draws from
        worker_init_fn=ignore_signals if workers else None, timeout=timeout if workers else 0,
    )  # fmt: skip

    def fetch(order, start=0):
        pieces[:] = cut(order, start)
        for (images, labels), index in zip(loader, list(pieces)):
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True), index

    return fetch


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(
        description="Generate Sudoku puzzles with one solution each and write them to a CSV, .sdm or .sdk file.",
        epilog="example: python data.py --level hard --count 1000 --seed 0 --output hard.csv",
    )
    add = parser.add_argument
    add("--level", choices=LEVELS, default="medium", help="easy: singles solve it, 36 clues or more; medium: singles, "
        "fewer clues; hard: singles do not")  # fmt: skip
    add("--count", type=int, default=1000, help="puzzles, no two alike (default: %(default)s)")
    add("--seed", type=int, default=0, help="the same seed gives the same puzzles (default: %(default)s)")
    add("--output", type=Path, required=True, help="puzzle,solution in .csv; .sdm and .sdk hold the puzzle alone")
    parser.error = lambda message: sys.exit(print(f"error: {one_line(message)}", file=sys.stderr) or 2)
    flags = parser.parse_args()
    path, suffix = flags.output, flags.output.suffix
    try:
        if not 1 <= flags.count <= 10_000_000 or flags.seed < 0:
            raise ValueError(f"--count must be 1 to 10,000,000, got {flags.count:,}; --seed 0 or more, {flags.seed}")
        if suffix not in (".csv", ".sdm", ".sdk") or path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"--output {path}: must be a .csv, .sdm or .sdk file in a folder that exists")
        sudoku_text(suffix, np.zeros((min(flags.count, 2), 81), np.uint8))  # an .sdk holds one
        puzzles, solutions = generate(flags.count, flags.level, flags.seed)
        path.write_text(sudoku_text(suffix, puzzles, solutions if suffix == ".csv" else None), "ascii", newline="\n")
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    print(f"{path}: {flags.count:,} {flags.level} puzzles, {(puzzles > 0).sum(1).mean():.1f} clues on average")
