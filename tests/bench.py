"""Side-by-side measurements, run by hand: python tests/bench.py PART ..., one of PARTS below, or all.

One process, interleaved rounds, medians of at least five with the spread (the range over the median), ratios to
the peer. Peers come from tests/requirements-bench.txt; the ones that are not installed are named and left out.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
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


def peer(name):
    """The module of a peer, or None where it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    for operator in ("nms", "qnms"):  # torchvision, which some import, misses them without its compiled operators
        with contextlib.suppress(RuntimeError):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
    return importlib.import_module(name)


class RRN(nn.Module):
    """A plain Recurrent Relational Network (Palm et al. 2018): an MLP on each of 1,620 edges, an LSTM on 81 cells."""

    def __init__(self, width=96):
        super().__init__()
        mlp = lambda fan_in: nn.Sequential(
            nn.Linear(fan_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))  # fmt: skip
        self.digit, self.row, self.column = nn.Embedding(10, 16), nn.Embedding(9, 16), nn.Embedding(9, 16)
        self.embed, self.edge, self.node = mlp(48), mlp(2 * width), mlp(2 * width)
        self.lstm, self.head = nn.LSTMCell(width, width), nn.Linear(width, 9)
        same = (data.UNIT_OF[:, :, None] == data.UNIT_OF[:, None, :]).any(0) & ~np.eye(81, dtype=bool)
        to, source = np.nonzero(same)  # sorted by `to`: 20 a cell
        self.register_buffer("target", torch.from_numpy(to))
        self.register_buffer("source", torch.from_numpy(source))

    def forward(self, puzzles, steps):
        batch, cell = len(puzzles), torch.arange(81, device=puzzles.device)
        place = torch.cat([self.row(cell // 9), self.column(cell % 9)], 1).expand(batch, -1, -1)
        x = self.embed(torch.cat([self.digit(puzzles.long()), place], 2))  # [B, 81, H]
        h, state, logits = x, (x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))), []
        for _ in range(steps):
            messages = self.edge(torch.cat([h[:, self.target], h[:, self.source]], 2))  # [B, 1620, H]
            received = messages.view(batch, 81, 20, -1).sum(2)
            state = self.lstm(self.node(torch.cat([x, received], 2)).flatten(0, 1), state)
            h = state[0].view(batch, 81, -1)
            logits.append(self.head(h))
        return torch.stack(logits)


def rounds(jobs, repeats=5):
    """{name: [seconds]} of functions {name: call}, each warmed up once, then interleaved."""
    for call in jobs.values():
        call()
    times = [[train.timed(call) for call in jobs.values()] for _ in range(repeats)]
    return dict(zip(jobs, zip(*times)))


def table(title, times, items, against):
    """Print items a second of each job, its spread and its ratio to each job named in `against`."""
    print(f"\n{title}\n| what | a second | spread | {' | '.join(f'x {name}' for name in against)} |")
    print("| --- " * (3 + len(against)) + "|")
    rate = {name: items[name] / statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
        ratios = " | ".join(f"{rate[name] / rate[other]:.2f}" for other in against)
        print(f"| {name} | {rate[name]:,.1f} | {spread:.0%} | {ratios} |", flush=True)


@contextlib.contextmanager
def quiet():
    """Bars and logs are written, but to memory."""
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------------ the loop


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def fit_job(net, batches, device, ema_decay=0.0, clip=0.0, dtype=torch.float32):
    """The kit's own `fit` over one epoch of ready batches: bar, log, metrics, finite check, checkpoints at its end."""
    task = train.image_task({"label_smoothing": 0.0, "focal_gamma": 0.0})
    config = {**train.parse_flags(["--monitor", "train_loss"])[0], "epochs": 1, "batch_size": len(batches[0][0]),
              "ema_decay": ema_decay, "clip_grad_norm": clip}  # fmt: skip

    def call():
        optimizer = train.build_optimizer(net, "adamw", 1e-3, 0.01, 0.9, device)
        state = train.TrainState(net, optimizer, torch.amp.GradScaler(device.type, enabled=False),
                                 train.start_ema(net) if ema_decay else None)  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, quiet():
            folder = Path(folder)
            run = train.Run(
                config=config, task=task, device=device, dtype=dtype, train=range(len(batches) * len(batches[0][0])),
                val=None, has_test=False, fetch_train=lambda pieces: iter(batches), fetch_val=None,
                val_order=[], val_sample=[], samples=lambda state, run: "", prepare=lambda x: x, meta={},
                order=lambda epoch: range(len(run.train)), augment=lambda x, t, index, epoch: (x, t),
                schedule=lambda step, cuts: (1e-3, None), folder=folder, log=utils.logger(folder / "log.txt"),
            )  # fmt: skip
            train.fit(state, run)

    return call


def bare_job(net, batches, dtype=torch.float32, device=None, **options):
    """What one writes by hand: forward, backward, step, zero_grad."""

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

    def call():
        with quiet():
            options = dict(max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
            trainer = lightning.Trainer(**options, enable_progress_bar=bar, accelerator="auto", devices=1)
            trainer.fit(Module(), loader)

    return call


def loop(device):
    """Steps a second of a tiny model, 3,000 steps an epoch, and of the custom CNN with all that the kit's step does."""
    make = lambda n, *shape: [(torch.randn(*shape).to(device), torch.randint(0, 10, shape[:1]).to(device),
                               torch.arange(shape[0])) for _ in range(n)]  # fmt: skip
    batches = make(3000, 32, 64)
    jobs = {"bare loop": bare_job(tiny().to(device), batches), "kit: fit": fit_job(tiny().to(device), batches, device),
            "bare loop, fused AdamW": bare_job(tiny().to(device), batches, fused=True)}  # fmt: skip
    if peer("accelerate"):
        jobs["Accelerate"] = accelerate_job(tiny().to(device), batches)
    if peer("lightning"):
        jobs["Lightning, no bar"] = lightning_job(tiny().to(device), batches, False)
        jobs["Lightning with its bar"] = lightning_job(tiny().to(device), batches, True)
    against = [name for name in ("bare loop", "Accelerate", "Lightning with its bar") if name in jobs]
    table("loop: a tiny model (6.6k parameters, batch 32), AdamW, steps", rounds(jobs),
          dict.fromkeys(jobs, len(batches)), against)  # fmt: skip
    dtype, _ = utils.pick_precision("auto", device)
    batches = [(x.to(memory_format=torch.channels_last), y, i) for x, y, i in make(12, 64, 3, 32, 32)]
    nets = [model.build_model("custom", 10).to(device, memory_format=torch.channels_last) for _ in range(3)]
    jobs = {
        "bare loop, fused AdamW": bare_job(nets[0], batches, dtype, fused=True),
        "kit: EMA, clipping, finite check": fit_job(nets[1], batches * 4, device, 0.999, 1.0, dtype),
        "the same bare loop again": bare_job(nets[2], batches, dtype, fused=True),
    }
    items = dict(zip(jobs, (12, 48, 12)))
    table("loop: custom CNN, batch 64, 32 px, steps", rounds(jobs), items, ["bare loop, fused AdamW"])


# ---------------------------------------------------------------------------------------------- data


def cifar_jobs(device, images, labels, workers=2):
    mean, std, index = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26), torch.arange(len(images))
    fetch = data.batches(data.Split(images, labels), 256, device)

    def kit():
        utils.tune(device)
        for x, _, i in fetch(index):
            data.augment(x, i, 0, 0, 32, mean, std, crop_padding=4, cutout=8)
        if device.type == "cuda":
            torch.cuda.synchronize()

    if peer("torchvision") is None:
        return {"kit": kit}
    from torchvision import transforms as T

    class Pictures(torch.utils.data.Dataset):
        """torchvision's CIFAR10 without its download: PIL images and the usual transforms, one at a time."""

        def __init__(self):
            from PIL import Image

            self.open = Image.fromarray
            crop, flip = T.RandomCrop(32, 4, padding_mode="reflect"), T.RandomHorizontalFlip()
            erase = T.RandomErasing(1.0, (1 / 16, 1 / 16), (1.0, 1.0))
            self.transform = T.Compose([crop, flip, T.ToTensor(), T.Normalize(mean, std), erase])

        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return self.transform(self.open(images[i])), labels[i]

    loader = torch.utils.data.DataLoader(Pictures(), 256, True, num_workers=workers, persistent_workers=workers > 0)

    def torchvision():
        utils.keep_freed_memory(False)
        for x, y in loader:
            x.to(device), y.to(device)

    return {"kit": kit, f"torchvision, {workers} workers": torchvision}


def folder_jobs(device, root, cache, workers=2):
    source = data.load_folder(root, 224, cache)
    split = source.splits["train"]
    fetch = data.batches(split, 64, device)
    mean, std = data.pixel_statistics(split.images)

    def kit():
        utils.tune(device)
        for x, _, i in fetch(torch.arange(len(split))):
            data.augment(x, i, 0, 0, 224, mean, std)
        if device.type == "cuda":
            torch.cuda.synchronize()

    if peer("torchvision") is None:
        return {"kit, from its cache": kit}, len(split)
    from torchvision import datasets
    from torchvision import transforms as T

    transform = T.Compose([T.RandomResizedCrop(224, (0.35, 1.0)), T.RandomHorizontalFlip(), T.ToTensor(),
                           T.Normalize(mean, std)])  # fmt: skip
    loader = torch.utils.data.DataLoader(datasets.ImageFolder(root, transform), 64, True, num_workers=workers,
                                         persistent_workers=workers > 0)  # fmt: skip

    def torchvision():
        utils.keep_freed_memory(False)
        for x, y in loader:
            x.to(device), y.to(device)

    return {"kit, from its cache": kit, f"torchvision ImageFolder, {workers} workers": torchvision}, len(split)


def data_part(device):
    """Images a second of the same augmentations, each image its own draw."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (25_600, 32, 32, 3), np.uint8)
    jobs = cifar_jobs(device, images, rng.integers(0, 10, len(images)))
    against = [name for name in jobs if name != "kit"]
    table("data: 32 px, crop, flip, normalise, cutout, batch 256, images", rounds(jobs),
          dict.fromkeys(jobs, len(images)), against)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("PIL") is None:
            return print("data: the folder of photographs needs Pillow")
        from PIL import Image

        pictures = data.draw_shapes(np.arange(768) % 10, 256, rng)
        for i, picture in enumerate(pictures):
            path = Path(folder) / "photos" / str(i % 2) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=90)
        with quiet():
            jobs, count = folder_jobs(device, Path(folder) / "photos", Path(folder) / "cache")
        against = [name for name in jobs if not name.startswith("kit")]
        table("data: 320x240 JPEG to 224 px, random resized crop, flip, batch 64, images", rounds(jobs),
              dict.fromkeys(jobs, count), against)  # fmt: skip


# ------------------------------------------------------------------------------------------ training


def train_jobs(device, size, steps, batch=16):
    """EfficientNet-B0's full step as `train_step` runs it, and timm's in each of its settings, glibc as it comes."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    chosen, _ = utils.pick_precision("auto", device)
    kinds = {"kit": (None, chosen, torch.channels_last)}
    if timm := peer("timm"):
        for dtype in dict.fromkeys((torch.float32, torch.bfloat16 if device.type == "cpu" else chosen)):
            for name, form in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
                kinds[f"timm, {str(dtype)[6:]}, {name}"] = (timm, dtype, form)

    def job(library, dtype, form):
        torch.manual_seed(0)
        options = dict(num_classes=10, drop_rate=0.2, drop_path_rate=0.2)
        net = (
            model.build_model("efficientnet_b0", 10)
            if library is None
            else timm.create_model("efficientnet_b0", **options)
        )
        net = net.to(device, memory_format=form).train()
        x, y = images.to(device, memory_format=form), labels.to(device)
        if library is None:
            optimizer = train.build_optimizer(net, "adamw", 1e-3, 0.01, 0.9, device)
            state = train.TrainState(net, optimizer, torch.amp.GradScaler(device.type, enabled=False))
            task = train.image_task({"label_smoothing": 0.0, "focal_gamma": 0.0})

            def call():
                if device.type == "cpu":
                    utils.keep_freed_memory()
                for _ in range(steps):
                    train.train_step(state, [(x, y, None)], task, dtype=dtype)
                if device.type == "cpu":
                    utils.keep_freed_memory(False)

            return call
        return bare_job(net, [(x, y, None)] * steps, dtype, fused=True)

    return {name: job(*kind) for name, kind in kinds.items()}


def train_part(device):
    """EfficientNet-B0, batch 16, fused AdamW, images a second."""
    for size, steps in ((64, 8), (128, 4), (224, 2)):
        jobs = train_jobs(device, size, steps)
        table(f"train: efficientnet_b0, {size} px, batch 16, images", rounds(jobs), dict.fromkeys(jobs, 16 * steps),
              [name for name in jobs if name.startswith("timm")])  # fmt: skip


def start_part(device):
    """Seconds from the command to the first training step on built-in data, and those of `import torch` alone."""
    first_step = ("import sys, train; train.train_step = lambda *a, **k: sys.exit(0); "
                  "train.main(sys.argv[1:])")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = lambda *command: subprocess.run([sys.executable, "-c", *command], cwd=folder, env=environment, check=True,
                                              capture_output=True)  # fmt: skip
        names = (f"start{i}" for i in range(99))
        jobs = {"import torch": lambda: run("import torch"),
                "train.py to its first step": lambda: run(first_step, "--run_name", next(names))}  # fmt: skip
        times = rounds(jobs)
    print("\nstart: built-in images, efficientnet_b0\n| what | seconds | spread |\n| --- | --- | --- |")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        print(f"| {name} | {medians[name]:.2f} | {(max(seconds) - min(seconds)) / medians[name]:.0%} |")
    print(f"| beyond import torch | {medians['train.py to its first step'] - medians['import torch']:.2f} | |")


def memory_part(device):
    """EfficientNet-B0 at 224 px, batch 16: MiB an image kept for backward, and what recomputing costs."""
    x, y = torch.randn(16, 3, 224, 224, device=device), torch.randint(0, 10, (16,), device=device)
    x = x.to(memory_format=torch.channels_last)
    nets = {
        "kit": model.build_model("efficientnet_b0", 10),
        "kit --checkpoint_activations": model.build_model("efficientnet_b0", 10),
    }
    nets["kit --checkpoint_activations"].run_stage = model.recomputed
    if timm := peer("timm"):
        nets["timm"] = timm.create_model("efficientnet_b0", num_classes=10, drop_rate=0.2, drop_path_rate=0.2)
    for dtype in dict.fromkeys((torch.float32, utils.pick_precision("auto", device)[0])):
        kept, jobs = {}, {}
        for name, net in nets.items():
            net = net.to(device, memory_format=torch.channels_last).train()
            net.run_stage = getattr(net, "run_stage", model.direct)
            with train.autocast(device, dtype):
                kept[name] = model.activation_bytes(net, x) / 16 / 2**20
            jobs[name] = bare_job(net, [(x, y, None)] * 2, dtype, fused=True)
        table(
            f"memory: efficientnet_b0, 224 px, batch 16, {str(dtype)[6:]}, images",
            rounds(jobs),
            dict.fromkeys(jobs, 32),
            ["kit"],
        )
        print("kept for backward, with the largest recomputed block, MiB an image: "
              + ", ".join(f"{name} {size:.1f}" for name, size in kept.items()))  # fmt: skip


def choices_part(device):
    """What each choice that is made by itself is worth: the kit's step with it and without."""
    for name, size, batch in (("efficientnet_b0", 64, 16), ("efficientnet_b0", 224, 16), ("custom", 32, 256)):
        x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(0, 10, (batch,), device=device)
        chosen = utils.pick_precision("auto", device)[0]

        def job(dtype=chosen, form=torch.channels_last, tuned=("cpu",), kept=True, fused=True):
            torch.manual_seed(0)
            net = model.build_model(name, 10).to(device, memory_format=form).train()
            inner = bare_job(net, [(x.to(memory_format=form), y, None)] * 2, dtype, fused=fused)

            def call():
                model.Conv2d.tuned_on = tuned
                if device.type == "cpu":
                    utils.keep_freed_memory(kept)
                inner()

            return call

        jobs = {"as chosen": job(), "float32": job(torch.float32), "contiguous": job(form=torch.contiguous_format),
                "AdamW not fused": job(fused=False)}  # fmt: skip
        if device.type == "cpu":
            jobs["freed memory given back"] = job(kept=False)
            if name == "efficientnet_b0" and chosen == torch.bfloat16:
                jobs["convolutions as torch runs them"] = job(tuned=())
        table(
            f"choices: {name}, {size} px, batch {batch}, images",
            rounds(jobs),
            dict.fromkeys(jobs, 2 * batch),
            ["as chosen"],
        )
    model.Conv2d.tuned_on = ("cpu",)


def methods_part(device):
    """What each method costs: a step of a lean custom network on 32 px images, with its augmentation."""
    images = torch.randint(0, 256, (128, 32, 32, 3), dtype=torch.uint8, device=device)
    window = [(images, torch.randint(0, 10, (128,), device=device), torch.arange(128))]
    meta = {"image_size": 32, "num_classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3}
    dtype, _ = utils.pick_precision("auto", device)

    def job(*words):
        config, _ = train.parse_flags(["--model", "custom", "--flip", *words])
        torch.manual_seed(0)
        net = model.build_model("custom", 10, widths=(24, 32, 64, 128), depths=(1, 1, 1))
        net.to(device, memory_format=torch.channels_last)
        optimizer = train.build_optimizer(net, "muon", 0.02, 0.01, 0.9, device)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        ema = train.start_ema(net) if config["ema_decay"] else None
        state, task = train.TrainState(net, optimizer, scaler, ema), train.image_task(config)
        augment = partial(train.image_augment(config, meta, torch.channels_last), epoch=0)
        options = {"ema_decay": config["ema_decay"], "sam_rho": config["sam_rho"], "seed": 0}
        return lambda: train.train_step(state, window, task, augment, dtype, **options)

    flags = ["--label_smoothing 0.2", "--focal_gamma 2", "--mixup 0.2", "--cutmix 1", "--mixup 0.2 --cutmix 1",
             "--ema_decay 0.99", "--sam_rho 0.1"]  # fmt: skip
    jobs = {"plain": job(), **{words: job(*words.split()) for words in flags}}
    table("methods: custom, 32 px, batch 128, images", rounds(jobs, 9), dict.fromkeys(jobs, 128), ["plain"])


# ------------------------------------------------------------------------------------------- Sudoku


def sudoku(device):
    """Training and inference, puzzles a second, against RRN; solved or not does not enter."""
    torch.manual_seed(0)
    kit, plain = model.build_model("sudoku_gnn", 9).to(device), RRN().to(device)
    puzzles, solutions = (torch.from_numpy(grids).to(device) for grids in data.generate(64, "medium"))
    answers = torch.where(puzzles > 0, 0, solutions).long()
    dtype, _ = utils.pick_precision("auto", device)

    def train_job(net, optimizer, batch, forward):
        def call():
            torch.manual_seed(0)
            with train.autocast(device, dtype):
                logits = forward(puzzles[:batch])
                loss = model.sudoku_loss(logits, answers[:batch]) / (answers[:batch] > 0).sum()
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
    own = train.build_optimizer(kit, "muon", 1e-4, 0.01, 0.9, device)
    other = train.build_optimizer(plain, "adamw", 1e-4, 0.01, 0.9, device)
    jobs = {
        "kit, 6 steps with gradient": train_job(kit, own, 32, kit),
        "RRN, 6 steps with gradient": train_job(plain, other, 8, lambda p: plain(p, 6)),
    }
    table("sudoku: training, puzzles", rounds(jobs), dict(zip(jobs, (32, 8))), ["RRN, 6 steps with gradient"])
    jobs = {"kit, 64 steps": infer_job(kit, 64), "RRN, 64 steps": infer_job(plain, 8, 64)}
    table("sudoku: inference, puzzles", rounds(jobs), dict(zip(jobs, (64, 8))), ["RRN, 64 steps"])


# ---------------------------------------------------------------------------------- many processes


def shared_steps(rank, ranks, port, output):
    """Times steps of EfficientNet-B0 on two batches of 8 at 64 px, shared by `ranks` processes of one thread each."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    found = {}
    with utils.processes("cpu", 600):
        torch.manual_seed(0)
        net = model.build_model("efficientnet_b0", 10).to(memory_format=torch.channels_last)
        optimizer = train.build_optimizer(net, "adamw", 1e-3, 0.01, 0.9, torch.device("cpu"))
        state = train.TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        task = train.image_task({"label_smoothing": 0.0, "focal_gamma": 0.0})
        x, y = torch.randn(16, 3, 64, 64).contiguous(memory_format=torch.channels_last), torch.randint(0, 10, (16,))
        window = data.share(list(zip(x.split(8), y.split(8), torch.arange(16).split(8))), rank, ranks)
        step = lambda: train.train_step(state, window, task)
        train.distribute(state)
        found["step"] = rounds({"step": step}, 9)["step"]
        if ranks > 1:
            own = state.forward
            state.forward = nn.parallel.DistributedDataParallel(net)
            found["step, DDP's own buckets"] = rounds({"step": step}, 9)["step"]
            state.forward = own
            gradients = torch.zeros(sum(p.numel() for p in net.parameters()))
            send = lambda: utils.over_all(gradients)
            found["its gradients alone"] = rounds({"send": send}, 15)["send"]
            found["a number alone"] = rounds({"send": lambda: utils.any_of_all(False)}, 15)["send"]
    if rank == 0:
        Path(output).write_text(json.dumps(found))


def processes_part(device):
    """What it costs to share a step: two processes of one thread each, over Gloo, beside one process of one thread."""
    context, found = torch.multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            output = Path(folder) / f"{ranks}.json"
            started = [context.Process(target=shared_steps, args=(rank, ranks, port, output)) for rank in range(ranks)]
            for process in started:
                process.start()
            for process in started:
                process.join()
            times = json.loads(output.read_text())
            found |= {f"{name}, {ranks} of one thread": seconds for name, seconds in times.items()}
    size = sum(p.numel() for p in model.build_model("efficientnet_b0", 10).parameters()) * 4
    alone = statistics.median(found["step, 1 of one thread"])
    print(f"\nprocesses: EfficientNet-B0, 64 px, 2 x 8 images a step, {size / 1e6:.1f} MB of gradients")
    print("| what | ms | spread | x one process |\n| --- | --- | --- | --- |")
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        spread, ratio = (max(seconds) - min(seconds)) / middle, f"{alone / middle:.2f}" if "step" in name else ""
        print(f"| {name} | {middle * 1e3:.2f} | {spread:.0%} | {ratio} |")


PARTS = {"loop": loop, "data": data_part, "train": train_part, "start": start_part, "memory": memory_part,
         "methods": methods_part, "choices": choices_part, "sudoku": sudoku,
         "processes": processes_part}  # fmt: skip

if __name__ == "__main__":
    names = sys.argv[1:] or ["all"]
    if any(name not in (*PARTS, "all") for name in names):
        sys.exit(f"error: bench.py takes {', '.join(PARTS)} or all, got {' '.join(names)}")
    device = utils.pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    threads, today = torch.get_num_threads(), time.strftime("%Y-%m-%d")
    print(f"{device.type} {name}, {threads} threads, torch {torch.__version__}, {today}")
    there = [name for name in PEERS if importlib.util.find_spec(name)]
    print("peers: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in there)
          + "".join(f"; {name} is not installed" for name in PEERS if name not in there))  # fmt: skip
    for part in PARTS if "all" in names else names:
        PARTS[part](device)
