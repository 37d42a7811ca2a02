"""Side-by-side measurements, run by hand: python tests/bench.py PART ..., or all.

The parts are loop, data, train, start, memory, methods, choices, sudoku and processes, and, by
itself, `race FOLDER`, a training on CIFAR-10 for each seed. The jobs of every other part run in one
process in interleaved rounds. A table shows the median of at least five rounds, the spread (range
over median) and the ratio to the peer. Peers are listed in tests/requirements-bench.txt; those that
are not installed are named and left out.
"""

import contextlib
import csv
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import model
import train
import utils

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("lightning", "accelerate", "timm", "torchvision")

# torchvision declares these operators itself only if its compiled code fits the installed torch.
DECLARE_OPERATORS = """
import torch
for operator in ("nms", "qnms"):
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    torch.library.define(f"torchvision::{operator}", schema)
"""


@functools.cache
def peer(name):
    """The module of a peer; None where it is not installed or cannot be imported.

    Another process tries the import first, as it is and then with torchvision's operators declared:
    operators declared twice, or compiled code for another torch, would abort this process.
    """
    if importlib.util.find_spec(name) is None:
        return None
    for preparation in ("", DECLARE_OPERATORS):
        command = [sys.executable, "-c", f"{preparation}\nimport {name}"]
        if subprocess.run(command, capture_output=True, timeout=300).returncode == 0:
            if "torchvision" not in sys.modules:
                exec(preparation)
            return importlib.import_module(name)
    print(f"{name} cannot be imported beside torch {torch.__version__}; it is left out")
    return None


class RRN(nn.Module):
    """A plain Recurrent Relational Network (Palm et al. 2018).

    An MLP runs on each of 1,620 edges, an LSTM on 81 cells. Axes: B puzzles, H width.
    """

    def __init__(self, width=96):
        super().__init__()
        self.digit, self.row, self.column = (nn.Embedding(n, 16) for n in (10, 9, 9))
        self.embed, self.edge, self.node = (mlp(n, width) for n in (48, 2 * width, 2 * width))
        self.lstm, self.head = nn.LSTMCell(width, width), nn.Linear(width, 9)
        same = (data.UNIT_OF[:, :, None] == data.UNIT_OF[:, None, :]).any(0)
        target, source = np.nonzero(same & ~np.eye(81, dtype=bool))  # sorted by target: 20 a cell
        self.register_buffer("target", torch.from_numpy(target))
        self.register_buffer("source", torch.from_numpy(source))

    def forward(self, puzzles, steps):
        batch, cell = len(puzzles), torch.arange(81, device=puzzles.device)
        place = torch.cat([self.row(cell // 9), self.column(cell % 9)], 1).expand(batch, -1, -1)
        x = self.embed(torch.cat([self.digit(puzzles.long()), place], 2))  # [B, 81, H]
        h, state, logits = x, (x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))), []
        for _ in range(steps):
            messages = self.edge(torch.cat([h[:, self.target], h[:, self.source]], 2))
            received = messages.view(batch, 81, 20, -1).sum(2)  # of [B, 1620, H]
            state = self.lstm(self.node(torch.cat([x, received], 2)).flatten(0, 1), state)
            h = state[0].view(batch, 81, -1)
            logits.append(self.head(h))
        return torch.stack(logits)


def mlp(inputs, width):
    layers = [nn.Linear(inputs, width)]
    for _ in range(3):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


# ------------------------------------------------------------------------------- measuring


def rounds(jobs, repeats=5):
    """{name: [seconds]} of {name: function}: each is called once to warm up, then in turns."""
    for call in jobs.values():
        call()
    times = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, call in jobs.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return times


def spread(seconds):
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def table(title, times, items, against):
    """Prints items a second of each job, its spread and its ratio to each job in `against`.

    `items` is a number for all jobs or {name: number}.
    """
    ratios = "".join(f" x {name} |" for name in against)
    print(f"\n{title}\n| what | a second | spread |{ratios}\n{'| --- ' * (3 + len(against))}|")
    if not isinstance(items, dict):
        items = dict.fromkeys(times, items)
    rate = {name: items[name] / statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        ratios = "".join(f" {rate[name] / rate[other]:.2f} |" for other in against)
        print(f"| {name} | {rate[name]:,.1f} | {spread(seconds):.0%} |{ratios}", flush=True)


@contextlib.contextmanager
def quiet():
    """Within the block, bars and logs are written to memory."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def keep_freed_memory(device, keep=True):
    """On a CPU, sets what the kit sets (True) or what glibc adapts to by itself (False)."""
    if device.type == "cpu":
        utils.keep_freed_memory(keep)


def new_state(net, device, optimizer="adamw", lr=1e-3, ema=False, dtype=torch.float32):
    optimizer = model.build_optimizer(net, optimizer, lr, 0.01, 0.9, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return train.TrainState(net, optimizer, scaler, train.start_ema(net) if ema else None)


def image_task(args):
    """The kit's task for images, without augmentation."""
    task = train.make_task(args, {"model": "custom"}, torch.device("cpu"),
                           torch.contiguous_format)
    return replace(task, augment=train.unchanged)


# ---------------------------------------------------------------------------------- the loop


def tiny():
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    return nn.Sequential(*layers)


def random_batches(count, shape, device):
    return [(torch.randn(*shape).to(device), torch.randint(0, 10, shape[:1]).to(device),
             torch.arange(shape[0])) for _ in range(count)]


def epoch_job(net, batches, device, words="", dtype=torch.float32):
    """The kit's `train_epoch`: bar, metrics, finite check, stop by signal. What ends an epoch, its
    checkpoints, log line and curves, takes 0.1 to 0.3 s for any number of steps: left out."""
    size = len(batches[0][0])
    words = f"--monitor train_loss --epochs 1 --batch_size {size} --lr 0.001 {words}".split()
    args, given = train.parse_flags([*words, "--scheduler", "constant"])
    train.check_flags(args, given)
    source = data.Data({"train": range(len(batches) * size)}, [], 0, "")

    def call():
        state = new_state(net, device, ema=args.ema_decay > 0)
        run = train.Run(args, image_task(args), device, dtype, source, meta={},
                        fetch={"train": lambda pieces: iter(batches)}, steps_per_epoch=len(batches))
        with quiet():
            train.train_epoch(state, run)

    return call


def bare_job(net, batches, dtype=torch.float32, **options):
    """The loop that one writes by hand: forward, backward, step, zero_grad."""

    def call():
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3, **options)
        net.train()
        for x, y, _ in batches:
            with train.autocast(x.device, dtype):
                loss = F.cross_entropy(net(x).float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    return call


def accelerate_job(net, batches):
    from accelerate import Accelerator

    accelerator = Accelerator()

    def call():
        own, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), 1e-3))
        for x, y, _ in batches:
            loss = F.cross_entropy(own(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    return call


def lightning_job(net, batches, bar):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, i):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), 1e-3)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    options = dict(max_epochs=1, logger=False, enable_checkpointing=False, devices=1,
                   enable_model_summary=False, enable_progress_bar=bar, accelerator="auto")

    def call():
        with quiet():
            lightning.Trainer(**options).fit(Module(), loader)

    return call


def loop_part(device):
    """Steps a second of a tiny model, and of the custom CNN with EMA and clipping."""
    batches = random_batches(3000, (32, 64), device)
    net = lambda: tiny().to(device)
    jobs = {"bare loop": bare_job(net(), batches),
            "kit: train_epoch": epoch_job(net(), batches, device),
            "bare loop, fused AdamW": bare_job(net(), batches, fused=True)}
    if peer("accelerate"):
        jobs["Accelerate"] = accelerate_job(net(), batches)
    if peer("lightning"):
        jobs["Lightning, no bar"] = lightning_job(net(), batches, False)
        jobs["Lightning with its bar"] = lightning_job(net(), batches, True)
    wanted = "bare loop", "bare loop, fused AdamW", "Accelerate", "Lightning with its bar"
    against = [name for name in wanted if name in jobs]
    table("loop: a tiny model (6.6k parameters, batch 32), AdamW, steps", rounds(jobs),
          len(batches), against)
    dtype, _ = utils.pick_precision("auto", device)
    last = torch.channels_last
    batches = [(x.to(memory_format=last), y, index)
               for x, y, index in random_batches(12, (64, 3, 32, 32), device)]
    net = lambda: model.build_model("custom", 10).to(device, memory_format=last)
    full = "--ema_decay 0.999 --clip_grad_norm 1"
    jobs = {"bare loop, fused AdamW": bare_job(net(), batches, dtype, fused=True),
            "kit: EMA, clipping, finite check": epoch_job(net(), batches * 4, device, full, dtype),
            "the same bare loop again": bare_job(net(), batches, dtype, fused=True)}
    table("loop: custom CNN, batch 64, 32 px, steps", rounds(jobs), dict(zip(jobs, (12, 48, 12))),
          ["bare loop, fused AdamW"])


# -------------------------------------------------------------------------------------- data


def kit_job(split, batch_size, device, *arguments, **options):
    """A pass of the kit over a split: batches, augmented by data.augment with the arguments."""
    fetch = data.batches(split, device)
    pieces = data.chunks(torch.arange(len(split)), batch_size)

    def call():
        keep_freed_memory(device)
        for x, _, index in fetch(pieces):
            data.augment(x, index, 0, 0, *arguments, **options)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


def torchvision_job(dataset, batch_size, device, workers=2):
    """A pass of torch's DataLoader over a dataset of torchvision."""
    loader = torch.utils.data.DataLoader(dataset, batch_size, True, num_workers=workers,
                                         persistent_workers=workers > 0)

    def call():
        keep_freed_memory(device, False)
        for x, y in loader:
            x.to(device), y.to(device)

    return call


class Pictures(torch.utils.data.Dataset):
    """torchvision's CIFAR10 without its download: PIL images and transforms, one at a time."""

    def __init__(self, images, labels, mean, std):
        from PIL import Image
        from torchvision import transforms as T

        self.images, self.labels, self.open = images, labels, Image.fromarray
        crop, flip = T.RandomCrop(32, 4, padding_mode="reflect"), T.RandomHorizontalFlip()
        erase = T.RandomErasing(1.0, (1 / 16, 1 / 16), (1.0, 1.0))
        self.transform = T.Compose([crop, flip, T.ToTensor(), T.Normalize(mean, std), erase])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.open(self.images[i])), self.labels[i]


def small_images(device, rng):
    """Images a second of 32 px from memory."""
    images = rng.integers(0, 256, (25_600, 32, 32, 3), np.uint8)
    labels, mean, std = rng.integers(0, 10, len(images)), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    jobs = {"kit": kit_job(data.Split(images, labels), 256, device, 32, mean, std, cutout=8)}
    if peer("torchvision"):
        dataset = Pictures(images, labels, mean, std)
        jobs["torchvision, 2 workers"] = torchvision_job(dataset, 256, device)
    table("data: 32 px, crop, flip, normalise, cutout, batch 256, images", rounds(jobs),
          len(images), list(jobs)[1:])


def photographs(device, rng, folder):
    """Images a second of JPEG files brought to 224 px."""
    from PIL import Image

    root = folder / "photos"
    for i, picture in enumerate(data.draw_shapes(np.arange(768) % 10, 256, rng)):
        path = root / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(picture).resize((320, 240), Image.Resampling.BICUBIC)
        picture.save(path, quality=90)
    with quiet():
        split = data.load_folder(root, 224, folder / "cache").splits["train"]
    mean, std = data.pixel_statistics(split.images)
    jobs = {"kit, from its cache": kit_job(split, 64, device, 224, mean, std)}
    if peer("torchvision"):
        from torchvision import datasets
        from torchvision import transforms as T

        crop, flip = T.RandomResizedCrop(224, (0.35, 1.0)), T.RandomHorizontalFlip()
        transform = T.Compose([crop, flip, T.ToTensor(), T.Normalize(mean, std)])
        jobs["torchvision ImageFolder, 2 workers"] = torchvision_job(
            datasets.ImageFolder(root, transform), 64, device)
    table("data: 320x240 JPEG to 224 px, random resized crop, flip, batch 64, images",
          rounds(jobs), len(split), list(jobs)[1:])


def data_part(device):
    """Images a second of the same augmentations, drawn for each image by itself."""
    rng = np.random.default_rng(0)
    small_images(device, rng)
    if importlib.util.find_spec("PIL") is None:
        return print("data: the folder of photographs needs Pillow")
    with tempfile.TemporaryDirectory() as folder:
        photographs(device, rng, Path(folder))


# ---------------------------------------------------------------------------------- training


def kit_steps(device, x, y, steps, dtype):
    """Whole steps of EfficientNet-B0 as `train_step` runs them."""
    torch.manual_seed(0)
    net = model.build_model("efficientnet_b0", 10).to(device, memory_format=torch.channels_last)
    state, task = new_state(net.train(), device, dtype=dtype), image_task(train.parse_flags([])[0])

    def call():
        keep_freed_memory(device)
        for _ in range(steps):
            train.train_step(state, [(x, y, None)], task, dtype=dtype)
        keep_freed_memory(device, False)

    return call


def train_part(device):
    """Images a second of EfficientNet-B0, batch 16: the kit, and timm in each of its settings."""
    chosen, _ = utils.pick_precision("auto", device)
    half = torch.bfloat16 if device.type == "cpu" else chosen
    forms = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    for size, steps in ((64, 8), (128, 4), (224, 2)):
        [(x, y, _)] = random_batches(1, (16, 3, size, size), device)
        last = x.to(memory_format=torch.channels_last)
        jobs = {"kit": kit_steps(device, last, y, steps, chosen)}
        for dtype in dict.fromkeys((torch.float32, half)) if peer("timm") else ():
            for name, form in forms.items():
                net = timm_b0().to(device, memory_format=form)
                batches = [(x.to(memory_format=form), y, None)] * steps
                jobs[f"timm, {str(dtype)[6:]}, {name}"] = bare_job(net, batches, dtype, fused=True)
        table(f"train: efficientnet_b0, {size} px, batch 16, images", rounds(jobs), 16 * steps,
              list(jobs)[1:])


def timm_b0():
    torch.manual_seed(0)
    options = dict(num_classes=10, drop_rate=0.2, drop_path_rate=0.2)
    return peer("timm").create_model("efficientnet_b0", **options)


BARE_STEP = """
import torch, model
net = model.build_model("efficientnet_b0", 10).to(memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
x = torch.randn(16, 3, 64, 64).to(memory_format=torch.channels_last)
net(x).sum().backward()
optimizer.step()
"""
KIT_STEP = """
import sys, train
step = train.train_step
train.train_step = lambda *arguments, **options: (step(*arguments, **options), sys.exit(0))
train.main(sys.argv[1:])
"""


def start_part(device):
    """Seconds from the command to the end of the first step, of the kit and of a bare script.

    Both run on the CPU, the bare script in float32, the kit in what it chooses there.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        run = lambda *words: subprocess.run([sys.executable, "-c", *words], cwd=folder,
                                            env=environment, check=True, capture_output=True)
        names = (f"start{i}" for i in range(99))
        times = rounds({
            "import torch": lambda: run("import torch"),
            "bare script: model, AdamW, a step": lambda: run(BARE_STEP),
            "train.py, its first step done": lambda: run(
                KIT_STEP, "--device", "cpu", "--run_name", next(names))})
    print("\nstart: efficientnet_b0, 64 px, batch 16\n| what | seconds | spread |")
    print("| --- | --- | --- |")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | {spread(seconds):.0%} |")
    _, bare, kit = map(statistics.median, times.values())
    print(f"| train.py beyond the bare script | {kit - bare:.2f} | |")


def memory_part(device):
    """EfficientNet-B0 at 224 px: MiB an image kept for backward, and the price of recomputing."""
    [(x, y, _)] = random_batches(1, (16, 3, 224, 224), device)
    x = x.to(memory_format=torch.channels_last)
    nets = {"kit": model.build_model("efficientnet_b0", 10),
            "kit --checkpoint_activations": model.build_model("efficientnet_b0", 10)}
    nets["kit --checkpoint_activations"].run_stage = model.recomputed
    if peer("timm"):
        nets["timm"] = timm_b0()
        nets["timm"].run_stage = model.direct  # which activation_bytes reads
    for dtype in dict.fromkeys((torch.float32, utils.pick_precision("auto", device)[0])):
        kept, jobs = [], {}
        for name, net in nets.items():
            net.to(device, memory_format=torch.channels_last).train()
            with train.autocast(device, dtype):
                kept.append(f"{name} {model.activation_bytes(net, x) / 16 / 2**20:.1f}")
            jobs[name] = bare_job(net, [(x, y, None)] * 2, dtype, fused=True)
        table(f"memory: efficientnet_b0, 224 px, batch 16, {str(dtype)[6:]}, images",
              rounds(jobs), 32, ["kit"])
        print("kept for backward, with the largest recomputed block, MiB an image: "
              + ", ".join(kept))


def methods_part(device):
    """Images a second of a step with each method: a lean custom network on augmented 32 px."""
    images = torch.randint(0, 256, (128, 32, 32, 3), dtype=torch.uint8, device=device)
    window = [(images, torch.randint(0, 10, (128,), device=device), torch.arange(128))]
    meta = {"model": "custom", "image_size": 32, "num_classes": 10, "mean": [0.5] * 3,
            "std": [0.25] * 3}
    dtype, _ = utils.pick_precision("auto", device)
    last = torch.channels_last

    def job(words):
        args, _ = train.parse_flags(["--model", "custom", "--flip", *words.split()])
        torch.manual_seed(0)
        net = model.build_model("custom", 10, widths=(24, 32, 64, 128), depths=(1, 1, 1))
        net.to(device, memory_format=last)
        state = new_state(net, device, "muon", 0.02, args.ema_decay > 0, dtype)
        task = train.make_task(args, meta, torch.device("cpu"), last)
        augment = functools.partial(task.augment, epoch=0)
        options = {"ema_decay": args.ema_decay, "sam_rho": args.sam_rho, "seed": 0}
        return lambda: train.train_step(state, window, task, augment, dtype, **options)

    flags = ["--label_smoothing 0.2", "--focal_gamma 2", "--mixup 0.2", "--cutmix 1",
             "--mixup 0.2 --cutmix 1", "--ema_decay 0.99", "--sam_rho 0.1"]
    jobs = {"plain": job(""), **{words: job(words) for words in flags}}
    table("methods: custom, 32 px, batch 128, images", rounds(jobs, 9), 128, ["plain"])


def choices_part(device):
    """Images a second of a step with the settings that the kit chooses, and without each."""
    chosen, _ = utils.pick_precision("auto", device)

    def job(name, size, batch, dtype=chosen, form=torch.channels_last, tuned=("cpu",), kept=True,
            fused=True):
        [(x, y, _)] = random_batches(1, (batch, 3, size, size), device)
        torch.manual_seed(0)
        net = model.build_model(name, 10).to(device, memory_format=form)
        steps = bare_job(net, [(x.to(memory_format=form), y, None)] * 2, dtype, fused=fused)

        def call():
            model.Conv2d.tuned_on = tuned
            keep_freed_memory(device, kept)
            steps()

        return call

    for work in (("efficientnet_b0", 64, 16), ("efficientnet_b0", 224, 16), ("custom", 32, 256)):
        jobs = {"as chosen": job(*work), "float32": job(*work, dtype=torch.float32),
                "contiguous": job(*work, form=torch.contiguous_format),
                "AdamW not fused": job(*work, fused=False)}
        if device.type == "cpu":
            jobs["freed memory given back"] = job(*work, kept=False)
            if work[0] == "efficientnet_b0" and chosen == torch.bfloat16:
                jobs["convolutions as torch runs them"] = job(*work, tuned=())
        table("choices: {}, {} px, batch {}, images".format(*work), rounds(jobs), 2 * work[2],
              ["as chosen"])
    model.Conv2d.tuned_on = ("cpu",)


# ------------------------------------------------------------------------------------ Sudoku


def sudoku_part(device):
    """Puzzles a second in training and inference, beside RRN; they need not be solved."""
    torch.manual_seed(0)
    kit, plain = model.build_model("sudoku_gnn", 9).to(device), RRN().to(device)
    grids = data.generate(64, "medium")
    puzzles, solutions = (torch.from_numpy(part).to(device) for part in grids)
    answers = torch.where(puzzles > 0, 0, solutions).long()
    dtype, _ = utils.pick_precision("auto", device)

    def train_job(net, optimizer, batch, *steps):
        def call():
            torch.manual_seed(0)
            with train.autocast(device, dtype):
                logits = net(puzzles[:batch], *steps)
                blanks = (answers[:batch] > 0).sum()
                loss = model.sudoku_loss(logits, answers[:batch]) / blanks
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

        return call

    def infer_job(net, batch, *steps):
        @torch.inference_mode()
        def call():
            net.eval()
            with train.autocast(device, dtype):
                net(puzzles[:batch], *steps).sum().item()
            net.train()

        return call

    kit.free_steps = 0
    muon = model.build_optimizer(kit, "muon", 1e-4, 0.01, 0.9, device)
    adamw = model.build_optimizer(plain, "adamw", 1e-4, 0.01, 0.9, device)
    jobs = {"kit, 6 steps with gradient": train_job(kit, muon, 32),
            "RRN, 6 steps with gradient": train_job(plain, adamw, 8, 6)}
    table("sudoku: training, puzzles", rounds(jobs), dict(zip(jobs, (32, 8))), list(jobs)[1:])
    jobs = {"kit, 64 steps": infer_job(kit, 64), "RRN, 64 steps": infer_job(plain, 8, 64)}
    table("sudoku: inference, puzzles", rounds(jobs), dict(zip(jobs, (64, 8))), list(jobs)[1:])


# -------------------------------------------------------------------------------------- the race


class Frozen(nn.BatchNorm2d):
    """BatchNorm as airbench94 has it: the scale stays 1, the statistics follow 0.4 of a batch."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


def airbench94(images):
    """The network of airbench94, its whitening taken from normalised images [N, 3, 32, 32]."""

    def conv(inputs, outputs):
        layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        nn.init.dirac_(layer.weight.data[:inputs])
        return layer

    def group(inputs, outputs):
        return (conv(inputs, outputs), nn.MaxPool2d(2), Frozen(outputs), nn.GELU(),
                conv(outputs, outputs), Frozen(outputs), nn.GELU())

    whiten = nn.Conv2d(3, 24, 2)
    nn.init.zeros_(whiten.bias)
    patches = F.unfold(images, 2).mT.flatten(0, 1).double()
    eigenvalues, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (eigenvalues + 5e-4).sqrt()).T.flip(0)
    whiten.weight.data.copy_(torch.cat([filters, -filters]).view(24, 3, 2, 2))
    whiten.weight.requires_grad_(False)
    return nn.Sequential(whiten, nn.GELU(), *group(24, 64), *group(64, 256), *group(256, 256),
                         nn.MaxPool2d(3), nn.Flatten(), nn.Linear(256, 10, bias=False))


def airbench_batches(padded, labels, epoch, generator):
    """Shuffled batches of 1,024 images [B, 3, 32, 32] of `padded` [N, 3, 36, 36].

    They are moved by up to two pixels, and mirrored in every second epoch.
    """
    order = torch.randperm(len(padded), generator=generator)
    for rows in order.split(1024)[: len(order) // 1024]:
        x = padded.new_empty(len(rows), 3, 32, 32)
        moves = torch.randint(5, (2, len(rows)), generator=generator)
        for down, right in ((d, r) for d in range(5) for r in range(5)):
            chosen = (moves[0] == down) & (moves[1] == right)
            x[chosen] = padded[rows[chosen], :, down : down + 32, right : right + 32]
        x = x.flip(3) if epoch % 2 else x
        yield x.contiguous(memory_format=torch.channels_last), labels[rows]


def train_airbench94(images, labels, device, dtype, seed=0):
    """A network trained on normalised images by airbench94's recipe (Jordan 2024, arXiv:2404.00498).

    SGD with Nesterov momentum, biases 64 times as fast, lookahead, 9.9 epochs of a triangle.
    """
    torch.manual_seed(seed)
    generator, epochs, momentum = torch.Generator().manual_seed(seed), 9.9, 0.85
    some = torch.randperm(len(images), generator=generator)[:5000]  # of all classes
    net = airbench94(images[some].cpu()).to(device, memory_format=torch.channels_last)
    scale = 1024 * (1 + 1 / (1 - momentum))
    lr, decay = 11.5 / scale, 0.0153 * 1024 / scale
    biases = [m.bias for m in net.modules() if isinstance(m, Frozen)]
    others = [p for p in net.parameters() if p.requires_grad and not any(p is b for b in biases)]
    groups = [{"params": biases, "lr": 64 * lr, "weight_decay": decay / lr / 64},
              {"params": others, "lr": lr, "weight_decay": decay / lr}]
    optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=True, fused=True)
    rates, total = [64 * lr, lr], math.ceil(epochs * (len(images) // 1024))
    first = (torch.rand(len(images), generator=generator) < 0.5).to(device)
    images = torch.where(first[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    slow, step = {k: v.clone() for k, v in net.state_dict().items()}, 0

    def look_ahead(decay):
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(slow[name].lerp_(tensor, 1 - decay))

    for epoch in range(math.ceil(epochs)):
        net[0].bias.requires_grad_(epoch < 3)
        for x, y in airbench_batches(padded, labels, epoch, generator):
            place, peak = step / total, 0.23
            share = (0.2 + 0.8 * place / peak if place < peak
                     else 0.07 + 0.93 * (1 - place) / (1 - peak))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * share
            with train.autocast(device, dtype):
                logits = net(x).float() / 9
                loss = F.cross_entropy(logits, y, label_smoothing=0.2, reduction="sum")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 5 == 0:
                look_ahead(0.95**5 * (step / total) ** 3)
            if step == total:
                look_ahead(1.0)
                return net


def race_part(device, folder, seeds=3):
    """airbench94 and cifar10_fast on a folder of CIFAR-10: accuracy, with six views, seconds.

    The seconds of airbench94 are of its building and training, those of cifar10_fast of its epochs;
    neither counts the reading of the pictures.
    """
    cache, dtype = Path(".cache").resolve(), utils.pick_precision("auto", device)[0]
    source, ready = data.load(folder, 32, val_fraction=0, cache_dir=cache), {}
    for name in ("train", "test"):
        split = source.splits[name]
        images = torch.from_numpy(split.images[np.arange(len(split))]).to(device)
        ready[name] = (data.centre(images, 32, source.mean, source.std),
                       torch.from_numpy(split.labels).to(device))
    task, (x, y) = image_task(train.parse_flags([])[0]), ready["test"]
    parts = list(zip(x.split(500), y.split(500), [None] * len(y)))
    print("\nrace: CIFAR-10\n| what | accuracy | with six views | seconds |")
    print("| --- | --- | --- | --- |")

    def line(name, seed, seconds, plain, with_views):
        print(f"| {name}, seed {seed} | {plain:.2%} | {with_views:.2%} | {seconds:.0f} |", flush=True)

    for seed in range(seeds):
        keep_freed_memory(device)
        began = time.perf_counter()
        net = train_airbench94(*ready["train"], device, dtype, seed)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        line("airbench94", seed, seconds, *(
            train.evaluate(net, parts, task, dtype=dtype, views=views)["accuracy"]
            for views in (None, data.image_views)))
        with tempfile.TemporaryDirectory() as place:
            run = lambda *words: subprocess.run(
                [sys.executable, ROOT / "train.py", *words, "--cache_dir", cache, "--quiet"],
                cwd=place, check=True, stdout=subprocess.DEVNULL)
            run("--config", "cifar10_fast", "--data", Path(folder).resolve(), "--run_name", "race",
                "--seed", str(seed))
            with open(Path(place) / "runs/race/metrics.csv") as file:
                seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
            found = []
            for words in ([], ["--tta"]):
                run("--evaluate", "runs/race/last.pt", "--output", "out.json", *words)
                found.append(json.loads((Path(place) / "out.json").read_text())["accuracy"])
        line("cifar10_fast", seed, seconds, *found)


# -------------------------------------------------------------------------- many processes


def shared_steps(rank, ranks, port, output):
    """Times steps of EfficientNet-B0 on two batches of 8, shared by `ranks` processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with utils.processes("cpu", 600):
        torch.manual_seed(0)
        cpu, last = torch.device("cpu"), torch.channels_last
        net = model.build_model("efficientnet_b0", 10).to(memory_format=last)
        state, task = new_state(net, cpu), image_task(train.parse_flags([])[0])
        batches = [(x.to(memory_format=last), y, index)
                   for x, y, index in random_batches(2, (8, 3, 64, 64), cpu)]
        step = lambda: train.train_step(state, batches[rank::ranks], task)
        state.share = train.share_among_processes if ranks > 1 else None
        times = rounds({"step": step}, 9)
        if ranks > 1:
            gradients = torch.zeros(sum(p.numel() for p in net.parameters()))
            send = lambda: utils.all_reduce(gradients)
            times |= rounds({"its gradients alone": send}, 15)
            times |= rounds({"a number alone": lambda: utils.any_process(False)}, 15)
            state.share, state.forward = None, nn.parallel.DistributedDataParallel(net)
            warnings.filterwarnings("ignore", "Grad strides")  # of channels_last filters
            times |= rounds({"step, DistributedDataParallel in its place": step}, 9)
    if rank == 0:
        Path(output).write_text(json.dumps(times))


def processes_part(device):
    """Milliseconds of a step in two processes of one thread each, over Gloo, and in one."""
    context, times = torch.multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            output = Path(folder) / f"{ranks}.json"
            started = [context.Process(target=shared_steps, args=(rank, ranks, port, output))
                       for rank in range(ranks)]
            for process in started:
                process.start()
            for process in started:
                process.join()
            found = json.loads(output.read_text())
            times |= {f"{name}, {ranks} of one thread": found[name] for name in found}
    size = sum(p.numel() for p in model.build_model("efficientnet_b0", 10).parameters()) * 4
    alone = statistics.median(times["step, 1 of one thread"])
    print(f"\nprocesses: EfficientNet-B0, 64 px, 2 x 8 images a step, {size / 1e6:.1f} MB of "
          "gradients\n| what | ms | spread | x one process |\n| --- | --- | --- | --- |")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        ratio = f"{alone / middle:.2f}" if name.startswith("step") else ""
        print(f"| {name} | {middle * 1e3:.2f} | {spread(seconds):.0%} | {ratio} |")


PARTS = {"loop": loop_part, "data": data_part, "train": train_part, "start": start_part,
         "memory": memory_part, "methods": methods_part, "choices": choices_part,
         "sudoku": sudoku_part, "processes": processes_part}


def main(names):
    race = names[0] == "race" and len(names) == 2
    if not race and any(name not in (*PARTS, "all") for name in names):
        sys.exit(f"error: bench.py takes {', '.join(PARTS)}, all or race FOLDER, got "
                 f"{' '.join(names)}")
    device = utils.pick_device()
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        utils.set_up_device()  # TF32, for the peers too
    print(f"{device.type} {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}")
    for name in PEERS:
        there = importlib.util.find_spec(name)
        print(name, importlib.metadata.version(name) if there else "is not installed")
    if race:
        race_part(device, names[1])
    for part in PARTS if "all" in names else () if race else names:
        PARTS[part](device)


if __name__ == "__main__":
    main(sys.argv[1:] or ["all"])
