"""Sources, order, augmentation and batches: real files, closed forms, bitwise equality."""

import gzip
import io
import os
import pickle
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data


def solid(height, width, colour):
    return np.broadcast_to(np.uint8(colour), (height, width, len(colour)))


def save_folder(root, splits=("train", "test"), classes=("ant", "bee"), count=4, size=(40, 50)):
    """Class folders of random JPEGs under `root`; no split folders where `splits` is ("",)."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*size, 3), np.uint8)
                image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


def sizes(found):
    return {name: len(split) for name, split in found.splits.items()}


# ---------------------------------------------------------------------------------- built-in images


@pytest.fixture(scope="module")
def shapes():
    return data.built_in(32)


def test_built_in_images_are_the_same_each_time_and_share_none_between_splits(shapes):
    again, seen = data.built_in(32), set()
    for name, split in shapes.splits.items():
        assert np.array_equal(split.images, again.splits[name].images)
        assert np.bincount(split.labels).tolist() == [len(split) // 10] * 10
        seen.update(row.tobytes() for row in split.images)
    assert len(seen) == sum(sizes(shapes).values())


def test_built_in_classes_are_not_told_by_mean_colour_or_by_one_pixel(shapes):
    train, val = shapes.splits["train"], shapes.splits["val"]

    def nearest_neighbours(features, held):  # 9 nearest, by majority
        distance = ((held[:, None] - features[None]) ** 2).sum(-1)
        votes = train.labels[np.argpartition(distance, 9, 1)[:, :9]]
        guess = np.array([np.bincount(v, minlength=10).argmax() for v in votes])
        return (guess == val.labels).mean()

    mean = [split.images.mean((1, 2)) for split in (train, val)]
    assert nearest_neighbours(*mean) < 0.3  # chance is 0.1
    for y, x in ((16, 16), (10, 20), (4, 4)):
        pixel = [split.images[:, y, x].astype(float) for split in (train, val)]
        assert nearest_neighbours(*pixel) < 0.3


# ------------------------------------------------------------------------------------- file formats


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix, dot", [("", "-"), (".gz", "-"), ("", ".")])
def test_idx_reads_what_was_written(tmp_path, suffix, dot):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 28, 28), np.uint8), np.arange(30, dtype=np.uint8) % 3
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images{dot}idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{prefix}-labels{dot}idx1-ubyte{suffix}", labels)
    found = data.load(tmp_path, val_fraction=0.2)
    assert sizes(found) == {"train": 24, "val": 6, "test": 30}
    assert np.array_equal(found.splits["test"].images[..., 0], images)
    assert np.bincount(found.splits["val"].labels).tolist() == [2, 2, 2]
    assert found.image_size == 28 and found.classes == ["0", "1", "2"]


def cifar_rows(count, label_bytes, classes, seed=0):
    rows = np.random.default_rng(seed).integers(0, 256, (count, label_bytes + 3072), np.uint8)
    rows[:, :label_bytes] %= classes
    return rows


def test_a_folder_by_the_name_of_an_idx_file_is_not_it(tmp_path):
    images, labels = np.zeros((8, 28, 28), np.uint8), np.arange(8, dtype=np.uint8) % 2
    for name, array in (("images.idx3", images), ("labels.idx1", labels)):
        write_idx(tmp_path / f"train-{name}-ubyte", array)
        (tmp_path / f"train-{name.replace('.', '-')}-ubyte").mkdir()
    assert len(data.load(tmp_path, val_fraction=0).splits["train"]) == 8


def test_a_class_may_be_called_train(tmp_path):
    root = save_folder(tmp_path / "d", ("",), ("bus", "train"))
    assert data.load(root, val_fraction=0, cache_dir=tmp_path / "c").classes == ["bus", "train"]


def test_cifar_binary_reads_pixels_labels_and_names(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    blocks = [cifar_rows(20, 1, 10, seed) for seed in range(3)]
    for name, rows in zip(("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"), blocks):
        rows.tofile(folder / name)
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    found = data.load(tmp_path, val_fraction=0)
    train = found.splits["train"]
    assert len(train) == 40 and found.classes == list("abcdefghij") and "val" not in found.splits
    pixel = [int(blocks[1][5, 1 + c * 1024 + 3 * 32 + 7]) for c in range(3)]
    assert train.images[25, 3, 7].tolist() == pixel
    assert np.array_equal(train.labels[20:], blocks[1][:, 0])


def test_cifar_100_takes_the_fine_labels(tmp_path):
    rows = cifar_rows(50, 2, 100)
    rows.tofile(tmp_path / "train.bin")
    rows.tofile(tmp_path / "test.bin")
    found = data.load(tmp_path, val_fraction=0)
    assert len(found.classes) == 100 and np.array_equal(found.splits["test"].labels, rows[:, 1])


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW", "float"])
def test_npz_layouts_give_the_same_pixels(tmp_path, layout):
    shape = (20, 32, 32, 1 if layout == "NHW" else 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    given = {"NHWC": images, "NCHW": images.transpose(0, 3, 1, 2), "NHW": images[..., 0],
             "float": images / 255}
    np.savez(tmp_path / "a.npz", x=given[layout], y=(np.arange(20) % 2)[:, None])
    found = data.load(tmp_path / "a.npz", val_fraction=0)
    assert np.array_equal(found.splits["train"].images, images)


def test_npz_of_keras_names_keeps_the_test_split_apart(tmp_path):
    x, y = np.zeros((20, 24, 24), np.uint8), np.arange(20) % 2
    np.savez_compressed(tmp_path / "m.npz", x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
    found = data.load(tmp_path / "m.npz", val_fraction=0.1)
    assert sizes(found) == {"train": 18, "val": 2, "test": 6}


def test_arrays_are_resized_to_the_size_that_is_asked_for(tmp_path):
    x = np.broadcast_to(np.uint8([[[10, 200, 90]]]), (6, 40, 60, 3))
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(6) % 2)
    images = data.load(tmp_path / "a.npz", image_size=32, val_fraction=0).splits["train"].images
    assert images.shape == (6, 32, 32, 3) and (images == [10, 200, 90]).all()


# ------------------------------------------------------------------------------------ image folders


def test_a_folder_with_splits_and_one_without(tmp_path):
    named = save_folder(tmp_path / "named", ("train", "validation", "test"))
    found = data.load(named, cache_dir=tmp_path / "c")
    assert sizes(found) == {"train": 8, "val": 8, "test": 8}
    plain = save_folder(tmp_path / "plain", ("",), count=10)
    found = data.load(plain, val_fraction=0.3, cache_dir=tmp_path / "c")
    assert sizes(found) == {"train": 14, "val": 6}
    assert found.classes == ["ant", "bee"] and found.image_size == 40


@pytest.mark.parametrize("kind", "png grey grey16 palette rgba la cmyk bmp webp gif".split())
def test_every_kind_of_picture_comes_out_in_its_colour(tmp_path, kind):
    image = pytest.importorskip("PIL.Image")
    red = image.fromarray(np.array(solid(30, 30, (200, 40, 30))))
    grey = image.new("L", (30, 30), 120)
    path, expected = tmp_path / "a.png", (200, 40, 30)
    if kind == "grey":
        grey.save(path)
        expected = (120,) * 3
    elif kind == "grey16":
        image.fromarray(np.full((30, 30), 120 * 256, np.uint16)).save(path)
        expected = (120,) * 3
    elif kind == "palette":
        red.quantize(4).save(path)
    elif kind == "rgba":
        pixels = np.array(red.convert("RGBA"))
        pixels[:, :, 3] = 0
        image.fromarray(pixels).save(path)
        expected = (255,) * 3  # clear all over: the page behind it is white
    elif kind == "la":
        grey.convert("LA").save(path)
        expected = (120,) * 3
    elif kind == "cmyk":
        path = tmp_path / "a.jpg"
        red.convert("CMYK").save(path, quality=95)
    elif kind == "gif":
        path = tmp_path / "a.gif"
        red.save(path, save_all=True, append_images=[image.new("RGB", (30, 30), "blue")])
    elif kind == "webp":
        path = tmp_path / "a.webp"
        red.save(path, lossless=True)
    else:
        path = tmp_path / f"a.{kind}"
        red.save(path)
    out = data.decode_image(path, 24)
    assert out.shape == (24, 24, 3) and out.dtype == np.uint8
    assert np.abs(out.astype(int) - expected).max() <= 4


def test_the_exif_tag_turns_a_picture_upright(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 24:] = 255  # white on the right
    exif = image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    out = data.decode_image(tmp_path / "a.jpg", 32)
    assert out[28:].mean() > 240 and out[:20].mean() < 15  # the right edge went to the bottom


def test_large_pictures_are_stored_with_a_margin_and_small_ones_as_they_are(tmp_path):
    large = save_folder(tmp_path / "large", ("",), size=(160, 200))
    found = data.load(large, val_fraction=0, cache_dir=tmp_path / "c")
    assert found.image_size == 128 and found.splits["train"].images.shape[1:3] == (146, 146)
    small = save_folder(tmp_path / "small", ("",), size=(32, 32))
    found = data.load(small, val_fraction=0, cache_dir=tmp_path / "c")
    image = pytest.importorskip("PIL.Image")
    with image.open(small / "ant" / "2.jpg") as opened:
        assert np.array_equal(found.splits["train"].images[2], np.asarray(opened))


def test_the_cache_is_used_and_rebuilt_when_a_file_changes(tmp_path, monkeypatch):
    root, cache = save_folder(tmp_path / "d", ("",)), tmp_path / "c"
    decoded, decode = [], data.decode_image
    counting = lambda path, size: decoded.append(path) or decode(path, size)
    monkeypatch.setattr(data, "decode_image", counting)
    first = np.array(data.load(root, val_fraction=0, cache_dir=cache).splits["train"].images)
    again = data.load(root, val_fraction=0, cache_dir=cache).splits["train"].images
    assert len(decoded) == 8 and np.array_equal(first, again)
    os.utime(root / "ant" / "0.jpg", ns=(1, 1))
    data.load(root, val_fraction=0, cache_dir=cache)
    assert len(decoded) == 16 and len(list(cache.iterdir())) == 2
    data.load(root, image_size=24, val_fraction=0, cache_dir=cache)
    assert len(decoded) == 24 and len(list(cache.iterdir())) == 3  # other settings stand beside it


def test_a_stopped_decode_leaves_no_cache(tmp_path, monkeypatch):
    root, cache = save_folder(tmp_path / "d", ("",)), tmp_path / "c"
    decode = data.decode_image

    def stop(path, size):
        if path.name == "3.jpg":
            raise KeyboardInterrupt
        return decode(path, size)

    monkeypatch.setattr(data, "decode_image", stop)
    with pytest.raises(KeyboardInterrupt):
        data.load(root, cache_dir=cache)
    assert not cache.exists()
    monkeypatch.setattr(data, "decode_image", decode)
    assert len(data.load(root, val_fraction=0, cache_dir=cache).splits["train"]) == 8


def test_without_pillow_a_folder_names_the_package(tmp_path, monkeypatch):
    root = save_folder(tmp_path / "d", ("",))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match="pip install pillow"):
        data.load(root, cache_dir=tmp_path / "c")


# --------------------------------------------------------------------------------------- bad inputs


def bad_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def bad_cases(tmp):
    """(name, a function that makes the bad input, what its one line says)."""
    x, y = np.zeros((6, 24, 24), np.uint8), np.arange(6) % 2

    def idx(header=None, content=None, labels=None, gz=False):
        folder = tmp / "idx"
        folder.mkdir()
        whole = bytes([0, 0, 8, 3]) + struct.pack(">3I", *x.shape) + x.tobytes()
        raw = (header or whole[:16]) + (whole[16:] if content is None else content)
        name = "train-images-idx3-ubyte"
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(raw)[:-20] if gz else raw)
        labels = y.astype(np.uint8) if labels is None else labels
        write_idx(folder / "train-labels-idx1-ubyte", labels)
        return folder

    def folder(**arguments):
        return save_folder(tmp / "f", **arguments)

    def changed(path, content=None, link=None):
        path.unlink(missing_ok=True)
        if link:
            path.symlink_to(link)
        else:
            path.write_bytes(content)

    def truncated():
        root = folder(splits=("",))
        changed(root / "ant" / "1.jpg", (root / "ant" / "1.jpg").read_bytes()[:400])
        return root

    def two_broken():
        root = truncated()
        changed(root / "bee" / "2.jpg", b"hello")
        return root

    def not_a_picture():
        root = folder(splits=("",))
        changed(root / "bee" / "1.jpg", b"hello")
        return root

    def leading_out():
        root = folder(splits=("",))
        outside = tmp / "outside.jpg"
        outside.write_bytes((root / "ant" / "0.jpg").read_bytes())
        changed(root / "ant" / "1.jpg", link=outside)
        return root

    def empty_class():
        root = folder(splits=("",))
        (root / "cow").mkdir()
        return root

    def classes_differ():
        root = folder(splits=("train",))
        save_folder(root, ("val",), ("ant", "cow"))
        return root

    def too_many_pixels():
        root = folder(splits=("",))
        pytest.importorskip("PIL.Image").new("1", (10_000, 9_000)).save(root / "ant" / "big.png")
        return root

    def huge_npz():
        path = tmp / "h.npz"
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 32, 32)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", buffer.getvalue())
            archive.writestr("y.npy", buffer.getvalue())
        return path

    def cut_npz():
        path = bad_npz(tmp / "a.npz", x=x, y=y)
        path.write_bytes(path.read_bytes()[:-30])
        return path

    def cifar(rows):
        (tmp / "cifar").mkdir()
        rows.tofile(tmp / "cifar" / "data_batch_1.bin")
        return tmp / "cifar"

    labels_high = cifar_rows(5, 1, 10)
    labels_high[3, 0] = 11
    npz = tmp / "a.npz"
    return {
        "missing": (lambda: tmp / "nowhere", "no such file or folder"),
        "empty folder": (lambda: tmp, "two class folders"),
        "idx magic": (lambda: idx(header=bytes([0, 0, 9, 3]) + b"\0" * 12), "not IDX"),
        "idx short": (lambda: idx(content=b"abc"), "declares 3,456 bytes, has 3"),
        "idx long": (lambda: idx(content=bytes(4000)), "declares 3,456 bytes, has more"),
        "idx huge": (lambda: idx(header=bytes([0, 0, 8, 3]) + b"\xff" * 12), "at most"),
        "idx labels": (lambda: idx(labels=np.zeros(5, np.uint8)), "6 images, but labels of shape"),
        "idx gzip": (lambda: idx(gz=True), "damaged gzip"),
        "npz key": (lambda: bad_npz(npz, x=x), "x has no y"),
        "npz none": (lambda: bad_npz(npz, pixels=x), "needs x and y"),
        "npz object": (lambda: bad_npz(npz, x=np.array([{}, {}]), y=y[:2]), "allow_pickle=False"),
        "npz dimensions": (lambda: bad_npz(npz, x=x[:, 0, 0], y=y), "images must be"),
        "npz range": (lambda: bad_npz(npz, x=x + 2.0, y=y), r"must lie in \[0, 1\]"),
        "npz nan": (lambda: bad_npz(npz, x=x * np.nan, y=y), r"must lie in \[0, 1\]"),
        "npz dtype": (lambda: bad_npz(npz, x=x.astype(np.int32), y=y), "must be uint8"),
        "npz label": (lambda: bad_npz(npz, x=x, y=y - 1), "row 0 has -1"),
        "npz huge": (huge_npz, "h.npz: declares 1,024,000,000,000,000 bytes; at most"),
        "npz cut": (cut_npz, "not a whole NPZ"),
        "cifar length": (lambda: cifar(labels_high.ravel()[:-5]), "not whole rows of 3073"),
        "cifar label": (lambda: cifar(labels_high), "row 3 has 11"),
        "truncated": (truncated, "1.jpg: cannot be decoded"),
        "two broken": (two_broken, "1 more: .*2.jpg"),
        "not a picture": (not_a_picture, "1.jpg: not a whole picture in JPEG"),
        "leading out": (leading_out, "a link that leads out"),
        "empty class": (empty_class, "cow: no image"),
        "classes differ": (classes_differ, "class folders differ"),
        "too many pixels": (too_many_pixels, "is over 89,478,485 pixels .10000x9000"),
    }


@pytest.mark.parametrize("case", list(bad_cases(Path("."))))
def test_bad_input_is_one_line_and_leaves_no_cache(tmp_path, case):
    make, message = bad_cases(tmp_path)[case]
    path = make()
    with pytest.raises((ValueError, OSError), match=message) as caught:
        data.load(path, cache_dir=tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists() or list((tmp_path / "c").iterdir()) == []


# ---------------------------------------------------------------------------- splits, order, chance


def test_stratified_subset_and_split_keep_the_proportions():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    assert np.bincount(labels[data.stratified(labels, 100, 0)]).tolist() == [60, 30, 10]
    split = data.Split(np.arange(1000)[:, None, None, None], labels)
    train, val = data.set_aside(split, 0.1, seed=3)
    assert np.bincount(val.labels).tolist() == [60, 30, 10]
    rows = [set(part.images[np.arange(len(part))].ravel().tolist()) for part in (train, val)]
    assert rows[0].isdisjoint(rows[1]) and len(rows[0] | rows[1]) == 1000
    other = data.set_aside(split, 0.1, seed=4)[1]
    assert set(other.images[np.arange(len(other))].ravel().tolist()) != rows[1]


def test_pixel_statistics_are_exact():
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 9, 3), np.uint8)
    mean, std = data.pixel_statistics(images)
    assert np.allclose(mean, images.mean((0, 1, 2)) / 255)
    assert np.allclose(std, images.std((0, 1, 2)) / 255)


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    order = data.epoch_order(100, 1, 2)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert torch.equal(order, data.epoch_order(100, 1, 2))
    for seed, epoch in ((1, 3), (2, 2)):
        assert not torch.equal(order, data.epoch_order(100, seed, epoch))


def test_uniform_draws_are_uniform_and_independent_of_the_batch():
    u = data.uniform(torch.arange(50_000), 0, 0, 4)
    assert torch.equal(u[[7, 3]], data.uniform(torch.tensor([7, 3]), 0, 0, 4))
    assert u.min() >= 0 and u.max() < 1
    # Kolmogorov-Smirnov at 1e-6 for n = 50,000, each draw
    for column in u.T:
        gap = (column.sort().values - (torch.arange(50_000) + 0.5) / 50_000).abs().max()
        assert gap < 2.7 / 50_000**0.5
    # no correlation between draws, epochs or neighbours
    columns = torch.cat([u, data.uniform(torch.arange(50_000), 0, 1, 4), u.roll(1, 0)], 1)
    correlation = torch.corrcoef(columns.T) - torch.eye(12)
    assert correlation.abs().max() < 5 / 50_000**0.5


# ------------------------------------------------------------------------------------- augmentation

STATS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


@pytest.mark.parametrize("size", [32, 24])
def test_augmentation_of_a_sample_does_not_depend_on_its_batch(size):
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    index = torch.arange(100, 116)
    whole = data.augment(images, index, 1, 2, size, cutout=6, **STATS)
    assert whole.shape == (16, 3, size, size) and whole.dtype == torch.float32
    backwards = data.augment(images.flip(0), index.flip(0), 1, 2, size, cutout=6, **STATS).flip(0)
    pairs = zip(images.split(1), index.split(1))
    alone = torch.cat([data.augment(image, i, 1, 2, size, cutout=6, **STATS) for image, i in pairs])
    assert torch.equal(whole, backwards) and torch.allclose(whole, alone, atol=1e-5)
    assert not torch.equal(whole, data.augment(images, index, 1, 3, size, cutout=6, **STATS))


def test_padded_crop_and_flip_against_a_plain_loop():
    images = torch.randint(0, 256, (40, 12, 12, 3), dtype=torch.uint8)
    index = torch.arange(40)
    out = data.augment(images, index, 0, 0, 12, crop_padding=4, **STATS)
    u = data.uniform(index, 0, 0, 8)
    flipped = 0
    for i in range(40):
        padded = np.pad(images[i].numpy(), ((4, 4), (4, 4), (0, 0)), mode="reflect")
        top, left = int(u[i, 0] * 9), int(u[i, 1] * 9)
        expected = padded[top : top + 12, left : left + 12]
        if u[i, 4] < 0.5:
            expected, flipped = expected[:, ::-1], flipped + 1
        expected = (expected / 255 - STATS["mean"]) / STATS["std"]
        assert np.allclose(out[i].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert 8 < flipped < 32


def test_random_resized_crop_keeps_to_its_areas_and_to_the_image():
    """A picture whose red is x and whose green is y tells the box that was cut."""
    ramp = (torch.arange(64.0) + 0.5) / 64 * 255
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, torch.zeros(64, 64)], 2)
    image = image.to(torch.uint8)
    u = data.uniform(torch.arange(500), 0, 0, 8)
    out = data.resized_crop(image.expand(500, 64, 64, 3), u, u[:, 4] < 0.5, 32, 0.25) / 255
    width, height = ((out.amax((1, 2)) - out.amin((1, 2))) * 32 / 31).T[:2]
    area = width * height
    assert 0.2 < area.min() < 0.35 and 0.8 < area.max() < 1.05
    assert (width / height).max() < 4 / 3 + 0.1 and (width / height).min() > 3 / 4 - 0.1


def test_random_resized_crop_is_pillows():
    Image = pytest.importorskip("PIL.Image")
    images = torch.from_numpy(data.draw_shapes(np.arange(12) % 10, 48, np.random.default_rng(0)))
    u = data.uniform(torch.arange(12), 0, 0, 8)
    mirrored = torch.arange(12) % 2 == 0
    out = data.resized_crop(images, u, mirrored, 32, 0.3)
    for i in range(12):
        area, aspect = (0.3 + 0.7 * u[i, 0]) * 48 * 48, (4 / 3) ** (2 * u[i, 1] - 1)
        sides = (area / aspect).sqrt(), (area * aspect).sqrt()
        height, width = (min(48, round(side.item())) for side in sides)
        top, left = int(u[i, 2] * (49 - height)), int(u[i, 3] * (49 - width))
        box = Image.fromarray(images[i].numpy()).crop((left, top, left + width, top + height))
        expected = np.asarray(box.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        expected = expected[:, ::-1] if mirrored[i] else expected
        # of 255: both count in fixed point, with other widths
        assert abs(out[i].numpy() - expected).max() <= 2


def test_every_image_is_mirrored_in_one_of_two_epochs():
    images, index = torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8), torch.arange(64)
    even, odd = (
        data.augment(images, index, 3, epoch, 8, crop_padding=0, **STATS) for epoch in (4, 5)
    )
    plain = (even == data.centre(images, 8, **STATS)).flatten(1).all(1)
    assert torch.equal(even, odd.flip(3)) and 16 < plain.sum() < 48


def test_cutout_blanks_a_square_to_the_mean():
    white = torch.full((300, 32, 32, 3), 255, dtype=torch.uint8)
    out = data.augment(white, torch.arange(300), 0, 0, 32, cutout=8, **STATS)
    blank = (out == 0).all(1).flatten(1).sum(1)
    assert blank.max() == 64 and 16 <= blank.min() < 64  # whole squares, some over the border


def test_evaluation_takes_the_centre():
    images = torch.arange(36, dtype=torch.uint8).view(1, 6, 6, 1)
    out = data.centre(images, 4, (0.0,), (1.0,))
    assert torch.allclose(out[0, 0] * 255, images[0, 1:5, 1:5, 0].float())


# ------------------------------------------------------------------------------------------ batches


def test_resident_data_and_zero_or_two_workers_give_the_same_batches():
    rng = np.random.default_rng(0)
    split = data.Split(rng.integers(0, 256, (53, 8, 8, 3), np.uint8), rng.integers(0, 5, 53))
    cpu = torch.device("cpu")
    resident = data.batches(split, cpu)
    others = [data.batches(split, cpu, 0), data.batches(split, cpu, 0, workers=2, timeout=60)]
    for epoch in range(2):  # workers stay for the second
        order = data.epoch_order(53, 0, epoch)
        pieces = data.chunks(order, 8)
        runs = [list(fetch(pieces)) for fetch in (resident, *others)]
        assert [len(index) for *_, index in runs[0]] == [8] * 6 + [5]
        for images, labels, index in runs[0]:
            assert np.array_equal(images, split.images[index])
            assert np.array_equal(labels, split.labels[index])
        for other in runs[1:]:
            for a, b in zip(runs[0], other, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b))
        assert torch.equal(torch.cat([index for *_, index in runs[0]]), order)


def test_a_last_batch_of_one_joins_the_one_before():
    assert [len(piece) for piece in data.chunks(torch.arange(17), 8)] == [8, 9]
    assert [len(piece) for piece in data.chunks(torch.arange(18), 8)] == [8, 8, 2]
    assert [len(piece) for piece in data.chunks(torch.arange(3), 1)] == [1, 1, 1]


def test_a_spawned_worker_gets_the_name_of_a_map_and_not_its_pixels(tmp_path):
    root = save_folder(tmp_path / "d", ("",), count=30)
    train = data.load(root, val_fraction=0.2, cache_dir=tmp_path / "c").splits["train"]
    sent = pickle.dumps(train)
    assert len(sent) < train.images.nbytes / 10
    rows = torch.tensor([5, 0, 7]).numpy()
    assert np.array_equal(pickle.loads(sent).images[rows], train.images[rows])


def test_a_partial_file_is_complete_or_gone_and_old_ones_are_removed(tmp_path):
    old, fresh, target = (tmp_path / name for name in ("a.1.partial", "b.2.partial", "c.npy"))
    for path, age in ((old, 90_000), (fresh, 1000)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    with pytest.raises(KeyError), data.new_file(target, 4) as file:
        file.write(b"half")
        raise KeyError
    assert sorted(tmp_path.iterdir()) == [fresh]
    with data.new_file(target, 4) as file:
        file.write(b"full")
    assert sorted(tmp_path.iterdir()) == [fresh, target] and target.read_bytes() == b"full"
    with pytest.raises(ValueError, match="make room"), data.new_file(target, 2**70):
        pass


def test_a_board_as_text_has_its_clues_in_brackets():
    board = [1, 2, 0, *range(4, 10)] * 9
    lines = data.board_lines(board, [1, 0, 0] * 27)
    assert lines[0] == "[1] 2  . |[4] 5  6 |[7] 8  9" and len(lines) == 11
    assert lines[3] == lines[7] == "+".join(["-" * 9] * 3)


# ------------------------------------------------------------------------------------ mixed samples


@pytest.mark.parametrize("mixing", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 0.5}])
@pytest.mark.parametrize("size", [(8, 8), (9, 5)])
def test_mixed_targets_hold_exactly_the_shares_of_what_is_seen(mixing, size):
    """Sample i has the value i and the class i: its mean pixel is then its targets' mean class."""
    count = 64
    index, values = torch.arange(count), torch.arange(count, dtype=torch.float64)
    inputs = values[:, None, None, None].expand(-1, 3, *size).clone()
    x, targets = data.mix_samples(inputs, index, index, 5, 2, count, **mixing)
    assert x.shape == inputs.shape and targets.shape == (count, count)
    pairs = (targets > 0).sum(1) == 2
    assert (targets.sum(1) - 1).abs().max() < 1e-6 and (targets >= 0).all()
    assert ((targets > 0).sum(1) <= 2).all() and pairs.sum() > count // 2
    assert (x.mean((1, 2, 3)) - targets.double() @ values).abs().max() < 2e-5
    boxed = x.flatten(1).eq(x.flatten(1).round()).all(1) & pairs  # only whole values: CutMix
    assert boxed.any() == ("cutmix" in mixing)
    assert (~boxed).sum() > 10 or "mixup" not in mixing
    assert targets.diagonal().unique().numel() > count // 4  # each its own share


def test_a_box_that_hangs_over_is_counted_as_it_is_seen():
    """CutMix boxes: one rectangle, within the picture, whose area is the partner's share."""
    index = torch.arange(200)
    inputs = index[:, None, None, None].float().expand(-1, 1, 16, 16).clone()
    x, targets = data.mix_samples(inputs, index, index, 0, 0, 200, cutmix=1.0)
    cut_off = 0
    for i in range(200):
        inside = x[i, 0] != i
        rows, columns = inside.any(1), inside.any(0)
        assert inside.sum() == rows.sum() * columns.sum()
        assert targets[i, i].item() == pytest.approx(1 - inside.float().mean().item(), abs=1e-6)
        cut_off += bool(rows[0] or columns[0] or rows[-1] or columns[-1])
    assert 50 < cut_off < 200


def test_mixing_is_a_function_of_seed_epoch_and_batch():
    inputs, index = torch.rand(12, 3, 8, 8), torch.arange(12) * 7
    mixed = lambda seed, epoch, by=0: data.mix_samples(
        inputs, index % 5, index + by, seed, epoch, 5, mixup=0.5, cutmix=0.5)
    assert all(torch.equal(a, b) for a, b in zip(mixed(0, 0), mixed(0, 0)))
    for other in (mixed(1, 0), mixed(0, 1), mixed(0, 0, 1)):
        assert not torch.equal(mixed(0, 0)[0], other[0])


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 8.0])
def test_shares_follow_the_beta_distribution(alpha):
    """Labels differ: a sample's own target is its share. The moments are closed forms."""
    index, own, blank = torch.arange(100), [], torch.zeros(100, 1, 1, 1)
    for epoch in range(200):
        _, targets = data.mix_samples(blank, index, index, 0, epoch, 100, mixup=alpha)
        own.append(targets.diagonal().double() - 0.5)
    own = torch.cat(own)
    alone = 1 / 100  # of the samples are their own partner: their share is 1
    second, fourth = 1 / (4 * (2 * alpha + 1)), 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    assert own.mean().item() == pytest.approx(alone * 0.5, abs=0.015)
    assert (own**2).mean().item() == pytest.approx((1 - alone) * second + alone / 4, rel=0.03)
    assert (own**4).mean().item() == pytest.approx((1 - alone) * fourth + alone / 16, rel=0.06)


# --------------------------------------------------------------------------------- colours, files


def test_color_jitter_is_brightness_then_contrast_then_saturation():
    """By their definitions in float64: factors of the image, around its mean grey, around its grey."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8))
    u = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    found = data.jittered(images, u, 0.6).numpy()
    luma = np.array([0.299, 0.587, 0.114])
    for image, draws, got in zip(images.double().numpy(), u.double().numpy(), found):
        brightness, contrast, saturation = 1 + 0.6 * (2 * draws - 1)
        x = (image * brightness).clip(0, 255)
        x = (x.dot(luma).mean() * (1 - contrast) + x * contrast).clip(0, 255)
        x = (x.dot(luma)[..., None] * (1 - saturation) + x * saturation).clip(0, 255)
        assert np.allclose(x, got, atol=1e-2)
    assert torch.equal(data.jittered(images, torch.full((5, 3), 0.5), 0.6), images.float())


def test_each_image_has_its_own_colours_and_grey_ones_keep_theirs():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (4, 8, 8, 3), np.uint8))
    plain = dict(image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3, crop_padding=0, flip=False)
    index = torch.tensor([3, 9, 4, 7])
    whole = data.augment(images, index, 1, 2, **plain, color_jitter=0.4)
    assert torch.equal(whole[1:], data.augment(images[1:], index[1:], 1, 2, **plain, color_jitter=0.4))
    same = images[:1].expand(4, -1, -1, -1)
    alike = data.augment(same, index, 1, 2, **plain, color_jitter=0.4)
    assert len({tuple(x.flatten().tolist()) for x in alike}) == 4
    grey = dict(plain, mean=(0.5,), std=(0.2,))
    one = images[..., :1]
    found = data.augment(one, index, 1, 2, **grey, color_jitter=0.4)
    assert torch.equal(found, data.augment(one, index, 1, 2, **grey))


def test_a_folder_counts_what_it_passes_over_and_keeps_the_names_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = save_folder(Path("p"), splits=("",), size=(30, 30))
    for name in ("a.HEIC", "b.heic", "c.tif", ".hidden.heic", "README"):
        (root / "ant" / name).touch()
    found = data.load("p", val_fraction=0.5)
    for words in ("passed over 2 .heic", "1 .tif", "1 without suffix", "val is 50% of each class"):
        assert words in found.description
    for split in found.splits.values():
        assert len(split.files) == len(split) == 4
        for i, (name, label) in enumerate(zip(split.files, split.labels)):
            picture = data.decode_image(root / found.classes[label] / name, 30)
            assert np.array_equal(split.images[np.array([i])][0], picture)


def test_a_picture_is_framed_as_evaluation_frames_it(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    image.fromarray(pixels).save(tmp_path / "a.png")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    stored = torch.from_numpy(data.decode_image(tmp_path / "a.png", 36).copy())[None]
    framed = torch.from_numpy(data.framed(tmp_path / "a.png", 36, 32))[None]
    assert torch.equal(data.normalise(framed, mean, std), data.centre(stored, 32, mean, std))
