"""Side-by-side measurements, run by hand: python tests/bench.py sudoku.

One process, interleaved rounds, medians of five with the spread (the range over the median), ratios to the peer.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import model
import train


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


def rounds(jobs):
    """{name: [seconds]} of functions {name: call}, each warmed up once, then interleaved."""
    for call in jobs.values():
        call()
    times = [[train.timed(call) for call in jobs.values()] for _ in range(5)]
    return dict(zip(jobs, zip(*times)))


def table(title, times, items, peer):
    """Print items a second of each job, its spread and its ratio to `peer`."""
    print(f"\n{title}\n| what | a second | spread | ratio |\n| --- | --- | --- | --- |")
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        rate, spread = items[name] / median[name], (max(seconds) - min(seconds)) / median[name]
        ratio = rate / (items[peer] / median[peer])
        print(f"| {name} | {rate:,.1f} | {spread:.0%} | {ratio:.2f} |")


def sudoku(device):
    """Training and inference, puzzles a second, against RRN; solved or not does not enter."""
    torch.manual_seed(0)
    kit, peer = model.build_model("sudoku_gnn", 9).to(device), RRN().to(device)
    puzzles, solutions = (torch.from_numpy(grids).to(device) for grids in data.generate(64, "medium"))
    answers = torch.where(puzzles > 0, 0, solutions).long()
    dtype = torch.bfloat16 if train.utils.pick_precision("auto", device, True)[0] == torch.bfloat16 else torch.float32

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
    other = train.build_optimizer(peer, "adamw", 1e-4, 0.01, 0.9, device)
    jobs = {
        "kit, 6 steps with gradient": train_job(kit, own, 32, kit),
        "RRN, 6 steps with gradient": train_job(peer, other, 8, lambda p: peer(p, 6)),
    }
    table("sudoku: training", rounds(jobs), dict(zip(jobs, (32, 8))), "RRN, 6 steps with gradient")
    jobs = {"kit, 64 steps": infer_job(kit, 64), "RRN, 64 steps": infer_job(peer, 8, 64)}
    table("sudoku: inference", rounds(jobs), dict(zip(jobs, (64, 8))), "RRN, 64 steps")


PARTS = {"sudoku": sudoku}

if __name__ == "__main__":
    names = sys.argv[1:] or ["all"]
    if any(name not in (*PARTS, "all") for name in names):
        sys.exit(f"error: bench.py takes {', '.join(PARTS)} or all, got {' '.join(names)}")
    device = train.utils.pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    threads, today = torch.get_num_threads(), time.strftime("%Y-%m-%d")
    print(f"{device.type} {name}, {threads} threads, torch {torch.__version__}, {today}")
    for part in PARTS if "all" in names else names:
        PARTS[part](device)
