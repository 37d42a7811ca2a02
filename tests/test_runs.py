"""Whole runs: the command line, a stop at any step, what stands on disk, every flag, every bad one."""

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import train
import utils

ROOT = Path(__file__).resolve().parent.parent
TINY = "--model custom --image_size 24 --max_samples 60 --batch_size 16 --accumulation_steps 2 --epochs 2 --amp False"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    # the custom CNN at an eighth of its width, for seconds' sake; what runs in a process of its own is whole
    monkeypatch.setitem(model.MODELS, "custom", partial(model.CustomCNN, widths=(8, 16, 32, 48)))
    monkeypatch.setattr(utils, "save_history", lambda *all: False)  # half a second a run; test_use.py has the pictures


def run(flags="", name="run", preset=TINY):
    """Train in this process; (last checkpoint, rows of metrics.csv, text of the log)."""
    assert train.main(f"{preset} --run_name {name} {flags}".split()) == 0
    return outcome(name)


def outcome(name):
    folder = Path("runs") / name
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return utils.load_checkpoint(folder / "last.pt"), rows, (folder / "log.txt").read_text()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


TIMED = ("seconds", "samples_per_second")


def same_outcome(a, b):
    """Every weight, moment, counter and row equal, but for wall time."""
    parts = ("model", "optimizer", "scaler", "ema", "swa", "gradient_norm", "step", "epoch",
             "epoch_step", "bad_steps", "finished")  # fmt: skip
    strip = lambda rows: [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    return all(same(a[0][part], b[0][part]) for part in parts) and strip(a[1]) == strip(b[1])


class StopAt(list):
    """Stands for a signal that arrives during the n-th step."""

    def __init__(self, steps):
        super().__init__([signal.SIGTERM])
        self.steps = steps

    def __bool__(self):
        self.steps -= 1
        return self.steps < 0


def run_stopped(monkeypatch, steps, flags, name):
    """A run that is stopped after `steps` steps."""
    asked = StopAt(10**9)
    inner = train.train_step

    def counted(*arguments, **keywords):
        asked.steps = 10**9 if counted.left > 1 else 0
        counted.left -= 1
        return inner(*arguments, **keywords)

    counted.left = steps
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", counted)
        patch.setattr(train, "catch_signals", lambda gently=True: train.contextlib.nullcontext(asked))
        assert train.main(f"{TINY} --run_name {name} {flags}".split()) == 143


# ------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "flags",
    [
        "--ema_decay 0.9 --clip_grad_norm 1.0 --cutout 6",
        "--optimizer sgd --scheduler plateau --scheduler_patience 0 --amp bf16",
        "--amp fp16 --scheduler cosine --warmup_epochs 0.5",
        "--optimizer muon --whiten --widths 24,16,32,48 --depths 1,0,1 --checkpoint_activations --val_samples 20 "
        "--val_every 2",
        "--model efficientnet_b0 --image_size 32 --scheduler constant",  # dropout and stochastic depth
        "--swa_start_epoch 1 --swa_lr 0.01 --ema_decay 0.9 --sam_rho 0.1 --mixup 0.3 --cutmix 1",
        "--freeze_epochs 1 --focal_gamma 2 --swa_start_epoch 2 --optimizer sgd",
    ],
)
def test_a_run_resumed_at_any_step_is_the_run_that_was_never_stopped(monkeypatch, flags):
    baseline = run(flags, "baseline")
    assert baseline[0]["step"] == 4
    for step in range(1, 4):
        run_stopped(monkeypatch, step, flags, f"stopped{step}")
        assert utils.load_checkpoint(f"runs/stopped{step}/last.pt")["step"] == step
        assert train.main(["--resume", f"stopped{step}"]) == 0
        assert same_outcome(baseline, outcome(f"stopped{step}")), step


def test_each_field_of_the_state_matters_on_resume(monkeypatch):
    """Drop one in turn: then the run that goes on is another one, or does not go on at all."""
    flags = "--ema_decay 0.9 --amp fp16"
    baseline = run(flags, "baseline")
    run_stopped(monkeypatch, 3, flags, "stopped")
    whole = utils.load_checkpoint("runs/stopped/last.pt")
    fresh = {
        "model": {k: torch.ones_like(v) for k, v in whole["model"].items()},
        "ema": {k: torch.zeros_like(v) for k, v in whole["ema"].items()},
        "optimizer": {**whole["optimizer"], "state": {}},
        "scaler": {**whole["scaler"], "scale": 1.0},
        "step": 0, "epoch": 0, "epoch_step": 0, "bad_steps": 1, "sums": None, "history": [], "finished": True,
    }  # fmt: skip
    for name, value in fresh.items():
        (Path("runs") / "stopped" / "previous.pt").unlink(missing_ok=True)
        utils.save_checkpoint("runs/stopped/last.pt", {**whole, name: value})
        try:
            status = train.main(["--resume", "stopped"])
        except SystemExit as stopped:
            status = stopped.code
        assert status != 0 or not same_outcome(baseline, outcome("stopped")), name


def command(flags):
    return [sys.executable, str(ROOT / "train.py"), *flags.split()]


def wait_for_step(process, path, step, seconds=60):
    """Until the checkpoint at `path` has reached `step`, or fail."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if utils.load_checkpoint(path)["step"] >= step:
                return
        except (ValueError, OSError):
            pass  # between one checkpoint and the next
        time.sleep(0.01)
    pytest.fail(f"no step {step} in {path}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT] if os.name == "posix" else [])
def test_a_process_that_is_killed_resumes_bitwise(monkeypatch, number):
    monkeypatch.setitem(model.MODELS, "custom", model.CustomCNN)
    flags = TINY.replace("--epochs 2", "--epochs 8") + " --save_every 1 --ema_decay 0.9 --widths 16,32,64,96"
    baseline = run(preset=flags, name="baseline")
    process = subprocess.Popen(command(f"{flags} --run_name killed"), stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)
    wait_for_step(process, "runs/killed/last.pt", 3)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0].decode()
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number
        assert "python train.py --resume killed" in text
    subprocess.run(command("--resume"), check=True, capture_output=True, timeout=120)
    assert same_outcome(baseline, outcome("killed"))


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_used(monkeypatch):
    baseline = run("--save_every 1", "baseline")
    run_stopped(monkeypatch, 3, "--save_every 1", "stopped")
    path = Path("runs/stopped/last.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert train.main(["--resume", "stopped"]) == 0
    assert "warning" not in (path.parent / "config.json").read_text()
    assert (path.parent / "last.damaged").exists()
    assert same_outcome(baseline, outcome("stopped"))


def test_no_flipped_bit_is_loaded(tmp_path):
    path = tmp_path / "a.pt"
    utils.save_checkpoint(path, {"model": {"w": torch.randn(500)}, "step": 1})
    whole = path.read_bytes()
    random = np.random.RandomState(0)
    for _ in range(150):
        content = bytearray(whole)
        content[random.randint(len(content))] ^= 1 << random.randint(8)
        path.write_bytes(content)
        try:
            found = utils.load_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error)
        else:  # a bit of the archive's own dates or paddings: what is loaded must be what was saved
            path.write_bytes(whole)
            assert same(found, utils.load_checkpoint(path))


def test_a_stopped_write_keeps_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    utils.save_checkpoint(path, {"step": 1})
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                utils.save_checkpoint(path, {"step": 2})
        assert utils.load_checkpoint(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


# ------------------------------------------------------------------------------------- what a run leaves


def test_a_run_saves_its_evidence_and_its_best_evaluates_alone(capsys):
    last, rows, log = run("--ema_decay 0.9")
    folder = Path("runs/run")
    names = {path.name for path in folder.iterdir()}
    whole = {"config.json", "metrics.csv", "log.txt", "lock", "last.pt", "previous.pt", "best.pt", "ema.pt"}
    assert names - {"curves.png"} == whole
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"]["image_size"] == 24 and stored["config"]["lr"] == 0.003
    assert stored["environment"]["torch"] == torch.__version__
    assert [row["epoch"] for row in rows] == ["1", "2"] and float(rows[-1]["lr"]) < float(rows[0]["lr"])
    best = utils.load_checkpoint(folder / "best.pt")
    assert best["metrics"]["ema_accuracy"] == max(float(row["ema_accuracy"]) for row in rows)
    assert best["meta"]["classes"][0] == "bars" and len(best["meta"]["mean"]) == 3
    assert same(last["ema"], utils.load_checkpoint(folder / "ema.pt")["model"])
    assert "16 x 2 accumulation x 1 process = 32 | 2 steps an epoch, 2 epochs, 4 steps" in log
    capsys.readouterr()
    assert train.main("--evaluate runs/run/ema.pt --output found.json --amp False".split()) == 0
    assert "on 60 test images: loss" in capsys.readouterr().out
    found = json.loads(Path("found.json").read_text())
    assert found["split"] == "test" and found["samples"] == 60 and 0 <= found["accuracy"] <= 1


def test_repeated_bad_steps_end_the_run_clearly_and_keep_the_last_good_checkpoint(monkeypatch, capsys):
    augment = train.data.augment
    poisoned = lambda images, index, seed, epoch, *a, **k: augment(images, index, seed, epoch, *a, **k) * (
        1 if epoch == 0 else float("nan")
    )
    monkeypatch.setattr(train.data, "augment", poisoned)
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 2)
    assert train.main(f"{TINY} --run_name run --save_every 1".split()) == 1
    assert "2 steps in a row were not finite" in capsys.readouterr().out
    saved = utils.load_newest("runs/run")
    assert saved["step"] in (2, 3) and all(v.isfinite().all() for v in saved["model"].values())


def test_a_weight_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="model w is not finite"):
        utils.save_checkpoint(tmp_path / "a.pt", {"model": {"w": torch.tensor([1.0, float("nan")])}})
    assert not list(tmp_path.glob("*.pt"))


# -------------------------------------------------------------------------------------- a test a flag


def weights(flags, name):
    return run(flags, name)[0]["model"]


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 1", "--clip_grad_norm 0.01", "--cutout 8", "--flip False", "--crop_padding 0", "--label_smoothing 0.2",
        "--optimizer sgd", "--weight_decay 1.0", "--momentum 0.5 --cycle_momentum False", "--lr 0.001",
        "--max_lr 0.01", "--pct_start 0.6", "--div_factor 5", "--final_div_factor 2", "--anneal linear",
        "--cycle_momentum False", "--batch_size 8", "--accumulation_steps 1", "--max_samples 50", "--amp bf16",
        "--image_size 32", "--mixup 0.3", "--cutmix 1", "--sam_rho 0.1", "--focal_gamma 2", "--freeze_epochs 1",
        "--swa_start_epoch 1 --swa_lr 0.1",
    ],
)  # fmt: skip
def test_a_flag_changes_the_weights_and_its_default_does_not(flags):
    default = getattr(test_a_flag_changes_the_weights_and_its_default_does_not, "default", None)
    if default is None:
        default = weights("", "default")
        assert same(default, weights("--cutout 0 --pct_start 0.3 --seed 0", "again"))
        test_a_flag_changes_the_weights_and_its_default_does_not.default = default
    assert not same(default, weights(flags, "other"))


def test_min_crop_area_changes_random_resized_crops_of_larger_pictures():
    from test_data import save_folder

    save_folder(Path("photos"), ("train", "val"), count=9, size=(80, 90))
    flags = "--data photos --batch_size 8"
    assert not same(weights(flags, "a"), weights(f"{flags} --min_crop_area 0.9", "b"))


@pytest.mark.parametrize("flags", ["--workers 0", "--workers 2", "--channels_last",
                                   "--save_every 1", "--cache_dir c", "--quiet", "--swa_start_epoch 1"])  # fmt: skip
def test_a_flag_of_the_machine_leaves_the_weights_alone(flags):
    assert same(weights("", "default"), weights(flags, "other"))


def lrs(flags):
    return [float(row["lr"]) for row in run(flags)[1]]


def test_schedules_follow_their_flags():
    assert lrs("--scheduler constant --lr 0.01") == [0.01, 0.01]
    warm = run("--scheduler constant --lr 0.01 --warmup_epochs 1.5", "warm")[1]
    assert float(warm[0]["lr"]) == pytest.approx(0.01 * 2 / 3)
    cosine = float(run("--scheduler cosine --lr 0.01", "cosine")[1][0]["lr"])
    assert cosine == pytest.approx(0.01 * (1 + np.cos(np.pi / 4)) / 2)


def test_plateau_cuts_the_rate_by_its_factor_after_its_patience():
    flags = "--scheduler plateau --scheduler_patience 1 --scheduler_factor 0.5 --min_delta 10 --lr 1e-4"
    rows = run(flags, preset=TINY.replace("--epochs 2", "--epochs 5"))[1]
    # nothing gains by 10 after the first epoch: cut after epochs 3 and 5
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-4, 1e-4, 1e-4, 5e-5, 5e-5])


def test_early_stopping_waits_its_patience_and_ends_with_status_0():
    last, rows, log = run("--early_stopping 1 --min_delta 10", preset=TINY.replace("--epochs 2", "--epochs 9"))
    assert len(rows) == 2 and last["finished"] and "early stopping" in log


def test_monitor_decides_what_is_best():
    _, rows, _ = run("--monitor train_loss")
    best = utils.load_checkpoint("runs/run/best.pt")
    assert best["metrics"]["train_loss"] == min(float(row["train_loss"]) for row in rows)


def test_val_fraction_0_trains_without_validation(tmp_path):
    np.savez("a.npz", x=np.random.RandomState(0).randint(0, 256, (40, 24, 24, 3)).astype(np.uint8), y=np.arange(40) % 4)
    _, rows, log = run("--data a.npz --val_fraction 0")
    assert "val_loss" not in rows[0] and "no val" in log and Path("runs/run/best.pt").exists()


def test_amp_true_on_a_plain_cpu_trains_in_fp32_and_says_so(monkeypatch):
    monkeypatch.setattr(utils, "cpu_has_amx", lambda: False)
    assert "precision float32 (mixed precision gains nothing on this cpu)" in run("--amp True")[2]
    cpu = torch.device("cpu")
    assert utils.pick_precision("auto", cpu)[0] == torch.float32
    monkeypatch.setattr(utils, "cpu_has_amx", lambda: True)
    assert utils.pick_precision("auto", cpu)[0] == torch.bfloat16


@pytest.mark.parametrize(
    "bf16, name, expected", [(1, "L4", "bfloat16"), (0, "T4", "float16"), (0, "GTX 1650", "float32")]
)
def test_amp_auto_on_cuda(monkeypatch, bf16, name, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bool(bf16))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {name}")
    assert utils.pick_precision("auto", torch.device("cuda"))[0] == getattr(torch, expected)


def test_compile_falls_back_to_eager_in_one_line(monkeypatch):
    def no_compiler(net, mode):
        return lambda x: (_ for _ in ()).throw(RuntimeError("TritonMissing: no\nTriton"))

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = run("--compile", "other")
    assert "not compiled (TritonMissing: no)" in found[2]
    monkeypatch.undo()


def test_a_model_wrapped_by_torch_compile_trains_as_the_bare_one(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, mode: compile_(net, backend="eager"))  # traced, no C++ compiler
    plain, wrapped = run("", "plain"), run("--compile", "wrapped")
    assert ", compiled" in wrapped[2]
    assert float(wrapped[1][0]["train_loss"]) == pytest.approx(float(plain[1][0]["train_loss"]), rel=1e-5)


@pytest.mark.slow
def test_compile_trains_as_eager_does():
    eager, compiled = run("", "eager")[1], run("--compile", "compiled")
    assert ", compiled" in compiled[2]
    assert float(eager[0]["train_loss"]) == pytest.approx(float(compiled[1][0]["train_loss"]), rel=1e-3)


def test_pretrained_takes_a_file_and_keeps_the_backbone(capsys):
    official = model.build_model("efficientnet_b0", 1000)
    torch.save(official.state_dict(), "b0.pth")
    config, _ = train.parse_flags("--pretrained b0.pth --image_size 32 --max_samples 60".split())
    state, run_, _ = train.prepare_run(config)
    assert torch.equal(state.model.features[5][0].block[0][0].weight, official.features[5][0].block[0][0].weight)
    assert run_.meta["mean"] == [0.485, 0.456, 0.406]
    torch.save(model.build_model("custom", 10).state_dict(), "b0.pth")
    with pytest.raises(SystemExit):
        train.main("--pretrained b0.pth --image_size 32 --max_samples 60".split())
    assert "features.0.0.weight is missing" in capsys.readouterr().err


def test_pretrained_weights_of_a_run_bring_their_statistics_which_a_resumed_run_keeps(monkeypatch):
    rng = np.random.default_rng(0)
    np.savez("dark.npz", x=rng.integers(0, 90, (60, 24, 24, 3), dtype=np.uint8), y=np.arange(60) % 3)
    run(f"--data dark.npz {'--epochs 1'}", "first")
    first = utils.load_checkpoint("runs/first/best.pt")["meta"]
    flags = "--pretrained runs/first/best.pt --freeze_epochs 1"
    run_stopped(monkeypatch, 1, flags, "second")
    shutil.rmtree("runs/first")
    assert train.main(["--resume", "second"]) == 0
    second = utils.load_checkpoint("runs/second/best.pt")["meta"]
    np.savez("ten.npz", x=rng.integers(0, 90, (60, 24, 24, 3), dtype=np.uint8), y=np.arange(60) % 10)
    config, _ = train.parse_flags(f"{TINY} --data ten.npz --pretrained runs/second/best.pt".split())
    other = train.prepare_run(config)[0].model  # ten classes as well, but others
    assert not other.head.weight.any() and utils.load_checkpoint("runs/second/best.pt")["model"]["head.weight"].any()
    assert second["mean"] == first["mean"] and second["std"] == first["std"] and len(second["classes"]) == 10
    assert train.prepare_run(train.parse_flags(TINY.split())[0])[1].meta["mean"] != first["mean"]


def test_pretrained_alone_asks_for_the_official_file_with_its_hash(monkeypatch, tmp_path):
    asked = []
    official = model.build_model("efficientnet_b0", 1000).state_dict()
    load = lambda url, check_hash, **rest: asked.append((url, check_hash)) or official
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config, _ = train.parse_flags("--pretrained --image_size 32 --max_samples 60".split())
    train.prepare_run(config)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "efficientnet_b0_rwightman-3dd342df.pth").touch()
    train.prepare_run(config)
    names = [Path(url).name for url, _ in asked]
    assert names == ["efficientnet_b0_rwightman-7f5810bc.pth", "efficientnet_b0_rwightman-3dd342df.pth"]
    assert all(check for _, check in asked)


def test_find_lr_prints_suggestions_and_writes_the_curve(capsys):
    assert train.main(f"{TINY} --find_lr --output curve.csv".split()) == 0
    out = capsys.readouterr().out
    assert "steepest" in out and "valley" in out and "minimum/10" in out and "*" in out and out.isascii()
    rows = Path("curve.csv").read_text().splitlines()
    assert rows[0] == "lr,loss" and len(rows) > 11 and not Path("runs").exists()
    assert Path("curve.png").exists() == (utils.importlib.util.find_spec("matplotlib") is not None)


def test_lr_auto_takes_the_valley():
    run("--lr auto")
    config = json.loads(Path("runs/run/config.json").read_text())["config"]
    assert f"--lr {config['lr']:.2e}" in Path("runs/run/log.txt").read_text()


def test_tensorboard_writes_events():
    pytest.importorskip("tensorboard")
    run("--tensorboard")
    assert list(Path("runs/run").glob("events.out.tfevents.*"))


def test_wandb_works_offline():
    pytest.importorskip("wandb")
    run("--wandb")
    assert list(Path("runs/run/wandb").glob("offline-run-*"))


def test_hyphens_are_accepted_and_a_flag_beats_the_preset_even_by_its_default():
    assert train.parse_flags(["--batch-size", "4", "--clip-grad-norm=0.5"])[0]["batch_size"] == 4
    preset = json.loads((ROOT / "configs.json").read_text())["cifar10"]
    config, _ = train.parse_flags("--config cifar10 --cutout 0".split())
    assert preset["cutout"] == 8 and config["cutout"] == 0 and config["batch_size"] == preset["batch_size"]


@pytest.mark.parametrize("name", json.loads((ROOT / "configs.json").read_text()))
def test_every_preset_parses_and_says_only_what_differs(name):
    config, given = train.parse_flags(["--config", name])
    defaults, _ = train.parse_flags([])
    assert not [key for key in given if key not in ("config", "model") and given[key] == defaults[key]]


def test_device_and_run_name_and_resume_without_a_name(monkeypatch):
    run_stopped(monkeypatch, 1, "--device cpu", "first")
    run("--device cpu", "second")
    assert train.find_run("").name == "first" == train.find_run(str(Path("runs/first").resolve())).name


# ------------------------------------------------------------------------------------ what is refused

BAD_FLAGS = {
    "--epoch 3": "did you mean --epochs?",
    "--epochs 0": "--epochs: must be an integer at least 1, got '0'",
    "--epochs 1.5": "--epochs: must be an integer",
    "--batch_size -3": "--batch_size: must be",
    "--accumulation_steps 0": "--accumulation_steps: must be",
    "--lr nan": "--lr: must be a number above 0 or auto, got 'nan'",
    "--lr inf": "--lr: must be",
    "--lr 0": "--lr: must be",
    "--lr -1": "--lr: must be",
    "--clip_grad_norm -1": "--clip_grad_norm: must be",
    "--clip_grad_norm nan": "--clip_grad_norm: must be",
    "--ema_decay 1": "--ema_decay: must be a number at least 0 and below 1",
    "--val_fraction 1": "--val_fraction: must be",
    "--warmup_epochs 5 --epochs 3": "--warmup_epochs 5: must be below --epochs 3",
    "--monitor speed": "there are train_loss, train_accuracy, val_loss, val_accuracy",
    "--workers 1000": "--workers: must be",
    "--run_name ../x": "--run_name: must be",
    "--run_name a/b": "--run_name: must be",
    "--run_name CON": "reserved name",
    "--run_name " + "x" * 65: "1 to 64",
    "--batch_size 4000": "the training split has 3000 samples",
    "--device cuda:99": "--device cuda:99",
    "--device tpu": "--device tpu",
    "--amp maybe": "--amp: invalid choice",
    "--model resnet": "--model: invalid choice",
    "--widths 64,128": "must be 4 integers from 2",
    "--depths 1,-1,1": "must be 3 integers from 0",
    "--widths 24,64,256,256": "--widths: is for custom",
    "--whiten": "--whiten: is for custom",
    "--model sudoku_gnn --whiten": "--whiten: is for pictures",
    "--tta": "--tta: needs --evaluate or --predict",
    "--effective_batch 24": "--effective_batch 24: must be a multiple of the batch, 16",
    "--effective_batch 9999999999": "--effective_batch 9999999999: there are 3000 samples",
    "--batch_size auto --effective_batch 61 --max_samples 60": "no batch up to 60 divides it",
    "--batch_size auto --accumulation_steps 4": "--accumulation_steps: follows from --effective_batch",
    "--val_samples 20": "--val_samples: are scored between validations",
    "--compile --checkpoint_activations": "--checkpoint_activations: torch.compile does not",
    "--effective_batch 8 --accumulation_steps 2": "--accumulation_steps: follows from --effective_batch",
    "--batch_size few": "must be an integer at least 1 or auto",
    "--batch_size auto --memory_gb 0.001 --max_samples 60": "not even 2 samples fit in memory",
    "--val_every 0": "must be an integer at least 1 or adaptive",
    "--memory_gb 0": "must be a number above 0",
    "--compile perhaps": "--compile: invalid choice",
    "--resume nothing": "no such run",
    "--resume": "no unfinished run with a checkpoint",
    "--cutout 64": "--cutout 64: must be below the image size, 64",
    "--config nothing": "is no preset; there are efficientnet_b0_4gb",
    "--data nowhere": "no such file or folder",
    "--evaluate nowhere.pt": "no such checkpoint",
    "--pretrained nowhere.pth": "no such checkpoint",
    "--image_size 20 --model custom": "needs 24 px",
    "--image_size 28": "needs 32 px",
    "--crop_padding 64": "--crop_padding 64",
    "extra": "'extra' is no flag",
    "--device cpu:x": "--device cpu:x",
    "--epochs " + "9" * 400: "--epochs: must be",
    "--find_lr --output nowhere/a.csv": "must be a .csv file in a folder that exists",
    "--find_lr --output a.png": "must be a .csv file",
    "--evaluate a.pt --output a.txt": "must be a .json or .csv file",
    "--data=": "is empty",
    "--output a.json": "only --find_lr, --evaluate, --predict, --export write one",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_one_line_status_2_and_nothing_written(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and BAD_FLAGS[flags] in error
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 400
    assert not list(Path(".").iterdir())


def test_an_empty_run_name_and_control_characters_are_escaped(capsys):
    for argv in (["--run_name", ""], ["--data", "a\x1b[31m\nb"]):
        with pytest.raises(SystemExit):
            train.main(argv)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "\x1b" not in error


def test_early_stopping_without_validation_data_is_refused(capsys):
    np.savez("a.npz", x=np.zeros((40, 24, 24, 3), np.uint8), y=np.arange(40) % 4)
    with pytest.raises(SystemExit):
        train.main("--model custom --data a.npz --val_fraction 0 --early_stopping 3".split())
    assert "no validation data" in capsys.readouterr().err and not Path("runs").exists()


def test_a_run_that_exists_or_is_finished_or_differs_is_refused(monkeypatch, capsys):
    run_stopped(monkeypatch, 1, "", "stopped")
    before = {path: path.read_bytes() for path in Path("runs/stopped").iterdir()}
    refused = {
        f"{TINY} --run_name stopped": "exists; choose another name, or --resume stopped",
        "--resume stopped --lr 0.5": "--lr 0.5: the run has 0.003",
        "--resume stopped --epochs 9": "--epochs 9: the run has 2",
    }
    for flags, message in refused.items():
        with pytest.raises(SystemExit) as stopped:
            train.main(flags.split())
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path("runs/stopped").iterdir()}
    assert train.main("--resume stopped --epochs 2 --workers 0".split()) == 0
    with pytest.raises(SystemExit):
        train.main(["--resume", "stopped"])
    assert "finished already" in capsys.readouterr().err


def test_changed_data_is_refused_on_resume(monkeypatch, capsys):
    make = lambda seed: np.savez(
        "a.npz", x=np.random.RandomState(seed).randint(0, 256, (60, 24, 24, 3)).astype(np.uint8), y=np.arange(60) % 4
    )
    make(0)
    run_stopped(monkeypatch, 1, "--data a.npz", "stopped")
    make(1)
    with pytest.raises(SystemExit):
        train.main(["--resume", "stopped"])
    assert "the data changed" in capsys.readouterr().err


BAD_CONFIGS = {
    '{"p": {"epochs": 3,}}': "configs.json:1:",
    '{"p": {"epochs": 3, "epochs": 4}}': "key 'epochs' stands twice",
    '{"p": {"epoch": 3}}': "did you mean epochs?",
    '{"p": {"epochs": true}}': "epochs must be an integer at least 1, got 'true'",
    '{"p": {"epochs": "3"}}': "epochs must be a number",
    '{"p": {"epochs": 2.5}}': "epochs must be an integer",
    '{"p": {"lr": NaN}}': "NaN is no number",
    '{"p": {"lr": Infinity}}': "Infinity is no number",
    '{"p": {"lr": 1e999}}': "lr must be a number",
    '{"p": {"lr": null}}': "lr must be a number",
    '{"p": {"lr": [1]}}': "lr must be a number",
    '{"p": {"model": "resnet"}}': "model must be one of",
    '{"p": {"model": 3}}': "model must be",
    '{"p": {"run_name": "../x"}}': "run_name must be",
    '{"p": {"resume": "x"}}': "'resume' is no flag for a preset",
    '["p"]': "must be an object of objects",
    '{"q": {}}': "there are q",
    "[" * 100_000: "nested too deep",
    b'{"p": "\xff"}': "not UTF-8 at byte 7",
    None: "no such file",
}


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=[str(i) for i in range(len(BAD_CONFIGS))])
def test_a_bad_config_is_one_line_and_status_2(text, tmp_path, monkeypatch, capsys):
    if text is not None:
        (tmp_path / "configs.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", "p"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and BAD_CONFIGS[text] in error
    assert error.startswith("error: ") and error.count("\n") == 1


def bad_checkpoint(kind):
    if kind == "holds code":
        torch.save({"model": {}, "f": train.Task}, "a.pt")
    elif kind == "newer":
        torch.save({"format_version": 99}, "a.pt")
    elif kind == "truncated":
        torch.save({"w": torch.zeros(1000)}, "b.pt")
        Path("a.pt").write_bytes(Path("b.pt").read_bytes()[:900])
    elif kind == "text":
        Path("a.pt").write_text("hello")
    elif kind == "a tensor":
        torch.save(torch.zeros(3), "a.pt")
    else:
        torch.save({"w": torch.zeros(3)}, "a.pt")


@pytest.mark.parametrize(
    "kind, message",
    [("holds code", "more than tensors"), ("newer", "format 99"), ("truncated", "not a whole checkpoint"),
     ("text", "not a whole checkpoint"), ("a tensor", "holds a Tensor"), ("no metadata", "no metadata")],
)  # fmt: skip
def test_a_bad_checkpoint_is_one_line_and_status_2(kind, message, capsys):
    bad_checkpoint(kind)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--evaluate", "a.pt"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_a_sweep_that_diverges_leaves_no_folder(monkeypatch, capsys):
    def diverging(*arguments, **keywords):
        raise ValueError("--find_lr: the loss diverged")

    monkeypatch.setattr(train, "find_lr", diverging)
    with pytest.raises(SystemExit) as stopped:
        train.main(f"{TINY} --run_name run --lr auto".split())
    assert stopped.value.code == 2 and "diverged" in capsys.readouterr().err and not Path("runs").exists()


def test_a_metric_that_was_never_finite_ends_the_run_clearly(monkeypatch, capsys):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: {name: float("nan") for name in evaluate(*a, **k)})
    assert train.main(f"{TINY} --run_name run".split()) == 1
    assert "val_accuracy was never finite" in capsys.readouterr().out


def test_evaluation_without_a_test_split_keeps_to_the_runs_own_validation_images(capsys):
    images = np.random.RandomState(0).randint(0, 256, (60, 24, 24, 3)).astype(np.uint8)
    np.savez("a.npz", x=images, y=np.arange(60) % 4)
    _, rows, _ = run("--data a.npz --seed 3 --val_fraction 0.2")
    for flag in ("--seed 5", "--val_fraction 0.5", "--max_samples 9", "--find_lr", "--resume run"):
        with pytest.raises(SystemExit):  # another split would hold images that were trained on
            train.main(f"--evaluate runs/run/last.pt {flag}".split())
        assert "leave it out" in capsys.readouterr().err
    train.main("--evaluate runs/run/last.pt --amp False --output a.json".split())
    found = json.loads(Path("a.json").read_text())
    assert found["split"] == "val" and found["samples"] == 12
    assert found["loss"] == pytest.approx(float(rows[-1]["val_loss"]), rel=1e-4)


def test_a_full_disk_ends_the_run_in_one_line(monkeypatch, capsys):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "save_checkpoint", full)
    assert train.main(f"{TINY} --run_name run".split()) == 1
    assert "No space left on device" in capsys.readouterr().out


def test_a_missing_tracker_names_its_package(monkeypatch, capsys):
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: None)
    for package in ("tensorboard", "wandb"):
        with pytest.raises(SystemExit):
            train.main([f"--{package}"])
        assert f"pip install {package}" in capsys.readouterr().err and not Path("runs").exists()


# -------------------------------------------------------------------------------------------- memory


def out_of_memory_at(monkeypatch, samples, calls=None):
    """Models raise as CUDA does where they are trained on more than `samples` at once, in calls of that number."""
    seen, forward = [], model.CustomCNN.forward

    def limited(self, x):
        seen.append(len(x))
        if self.training and len(x) > samples and (calls is None or len(seen) in calls):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, x)

    monkeypatch.setattr(model.CustomCNN, "forward", limited)
    return seen


@pytest.mark.parametrize(
    "flags", ["", "--ema_decay 0.9 --optimizer sgd --clip_grad_norm 1", "--amp fp16 --optimizer muon"]
)
def test_a_run_that_is_out_of_memory_goes_on_as_the_small_batch_run(monkeypatch, flags):
    small = run(f"{flags} --batch_size 4 --accumulation_steps 8", "small")
    out_of_memory_at(monkeypatch, 4)
    large = run(f"{flags} --batch_size 16", "large")
    assert "step 1: out of memory, so done again; from here on 4 at once" in large[2]
    assert large[2].count("out of memory") == 1 and large[0]["micro_batch"] == 4  # 16, 8, then 4
    assert same(small[0]["model"], large[0]["model"]) and same(small[0]["ema"], large[0]["ema"])
    assert same(small[0]["optimizer"], large[0]["optimizer"])
    assert small[1][0]["train_loss"] == large[1][0]["train_loss"]


def test_a_micro_batch_is_remembered_on_resume(monkeypatch):
    seen = out_of_memory_at(monkeypatch, 8)
    whole = run("", "whole")
    run_stopped(monkeypatch, 3, "", "cut")
    assert utils.load_checkpoint("runs/cut/last.pt")["micro_batch"] == 8
    seen.clear()
    assert train.main(["--resume", "cut"]) == 0
    assert max(seen[:6]) <= 8 and same(whole[0]["model"], outcome("cut")[0]["model"])


def test_not_even_two_samples_fit(monkeypatch, capsys):
    out_of_memory_at(monkeypatch, 0, calls=range(20, 10**6))
    assert train.main(f"{TINY} --run_name none --epochs 20".split()) == 1
    assert "out of memory" in (line := capsys.readouterr().out.splitlines()[-1]) and "go on with" in line
    out_of_memory_at(monkeypatch, 0)
    assert train.main(f"{TINY} --run_name early".split()) == 1  # in the estimate, before a folder is made
    assert "smaller --batch_size" in capsys.readouterr().err and not Path("runs/early").exists()


def test_a_presets_samples_a_step_are_kept_by_auto():
    config, given = train.parse_flags("--config custom_4gb --batch_size auto".split())
    assert config["effective_batch"] == 256 and "accumulation_steps" not in given
    config, given = train.parse_flags("--config custom_4gb --batch_size 8 --effective_batch 24".split())
    assert config["effective_batch"] == 24 and "accumulation_steps" not in given


def test_validation_keeps_to_the_micro_batch(monkeypatch):
    seen = out_of_memory_at(monkeypatch, 4)
    run("--epochs 1")
    assert max(seen[6:]) <= 8  # after the estimate's two and the attempts at 16 and 8


def test_cuda_is_tuned_and_capped(monkeypatch):
    device, calls = torch.device("cuda", 1), []
    for name in ("set_device", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"total_memory": 8 * 2**30}))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    for flag in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, flag, False)
    assert utils.tune(device) == ["TF32", "cuDNN deterministic", "at most 7.6 GB"]
    assert utils.tune(device, False, 4) == ["TF32", "cuDNN benchmarked", "at most 4.0 GB"]
    assert torch.backends.cudnn.benchmark is True and torch.backends.cudnn.deterministic is False
    assert calls == [(device,), (0.95, device), (device,), (0.5, device)]
    assert utils.memory_cap(device, 100) == 8 * 2**30 and utils.memory_cap(torch.device("cpu"), 1) == float("inf")


def test_the_micro_batch_divides_the_effective_one():
    assert train.choose_batch(96, 1000, lambda size: size <= 40) == 32
    assert train.choose_batch(128, 60, lambda size: True) == 32
    with pytest.raises(ValueError, match="no batch up to 60"):
        train.choose_batch(101, 60, lambda size: True)


def test_moments_take_the_memory_format_of_the_device_that_resumes():
    """A run saved where the model is contiguous goes on where it is channels_last, as it would have there."""
    for optimizer in ("adamw", "sgd"):
        states = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
            net.to(memory_format=memory_format)
            chosen = train.build_optimizer(net, optimizer, 0.1, 0.0, 0.9, torch.device("cpu"))
            states.append(train.TrainState(net, chosen, torch.amp.GradScaler("cpu", enabled=False)))
        task = train.Task(loss=lambda y, t: (y - t).square().sum())
        window = [(torch.randn(4, 3, 3, 3), torch.randn(4, 2), None)]
        train.train_step(states[0], window, task)
        states[1].load(copy.deepcopy(states[0].to_checkpoint()))
        for state in states:
            train.train_step(state, window, task)
        for a, b in zip(*(state.model.parameters() for state in states)):
            assert torch.allclose(a, b, atol=1e-6)


def test_memory_runs_out_midway_and_the_step_changes_nothing_twice(monkeypatch):
    """The second of two batches fails: gradients and statistics of the first are not counted again."""
    plain = run("--epochs 1 --batch_size 8 --accumulation_steps 4", "plain")
    out_of_memory_at(monkeypatch, 8, calls=[4])  # 2 of the estimate, then the window's first, its second
    found = run("--epochs 1 --batch_size 16 --accumulation_steps 2", "found")
    assert "out of memory" in found[2] and same(plain[0]["model"], found[0]["model"])


def test_batch_size_auto_takes_the_largest_divisor_that_fits(monkeypatch):
    preset, forward = TINY.replace("--batch_size 16 --accumulation_steps 2", ""), model.CustomCNN.forward
    free = run("--batch_size auto --effective_batch 24", "free", preset)
    assert "batch      24 x 1 accumulation" in free[2]
    out_of_memory_at(monkeypatch, 10)
    monkeypatch.setattr(utils, "memory_cap", lambda device, memory_gb=None: 1)
    bound = run("--batch_size auto --effective_batch 24", "bound", preset)
    assert "batch      8 x 3 accumulation" in bound[2] and "out of memory" not in bound[2]
    monkeypatch.setattr(model.CustomCNN, "forward", forward)
    fixed = run("--batch_size 8 --effective_batch 24", "fixed", preset)
    assert same(fixed[0]["model"], bound[0]["model"])  # the trials left no trace


@pytest.mark.parametrize("name", ["custom", "efficientnet_b0", "sudoku_gnn"])
@pytest.mark.parametrize("amp", ["False", "bf16"])
def test_checkpointed_activations_train_bitwise_alike_in_less_memory(name, amp):
    preset = f"--model {name} --max_samples 24 --batch_size 8 --epochs 1 --amp {amp}"
    if name == "sudoku_gnn":
        puzzles, solutions = train.data.generate(40, "easy", 0)
        Path("p.csv").write_text(train.data.sudoku_text(".csv", puzzles, solutions))
        preset += " --data p.csv --grad_steps 3 --free_steps 2 --message_steps 4"
    else:
        preset += " --image_size 32"
    kept, recomputed = run("", "kept", preset), run("--checkpoint_activations", "recomputed", preset)
    assert same(kept[0]["model"], recomputed[0]["model"])
    sample = [float(log.split("activations ")[1].split()[0]) for *_, log in (kept, recomputed)]
    assert sample[1] < 0.75 * sample[0]


# --------------------------------------------------------------------------------- validation's cadence


def test_validation_every_n_epochs_and_a_sample_in_between():
    checkpoint, rows, log = run("--epochs 5 --val_every 2 --val_samples 20 --ema_decay 0.9")
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True, True]  # the last always
    assert [bool(row["val_sample_loss"]) for row in rows] == [True, False, True, False, False]
    assert [bool(row["ema_sample_accuracy"]) for row in rows] == [True, False, True, False, False]
    assert all(round(float(rows[i]["val_sample_accuracy"]) * 20, 6) % 1 == 0 for i in (0, 2))
    best = utils.load_checkpoint("runs/run/best.pt")
    assert best["epoch"] in (2, 4, 5) and "val sample loss" in log


def test_adaptive_validation_and_patience_in_validations():
    due = [epoch for epoch in range(1, 41) if train.validates(epoch, 40, "adaptive")]
    assert due == [*range(1, 11), *range(12, 31, 2), 33, 36, 39, 40]
    rows = run("--epochs 12 --val_every 3 --early_stopping 2 --lr 1e-30 --min_delta 1")[1]
    assert len(rows) == 9  # of the validations after epochs 3, 6 and 9 the first is a gain


def test_a_step_that_is_suddenly_slow_is_told():
    usual = 0.0
    for seconds in (3.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2):
        usual, slow = train.slow_step(usual, seconds)
        assert not slow
    assert train.slow_step(usual, 60.0) == (usual, True)


def test_whitening_makes_patches_white_and_the_stem_stays(monkeypatch):
    checkpoint, _, _ = run("--whiten --widths 24,16,32,48 --depths 1,0,1")
    begun = run("--whiten --widths 24,16,32,48 --depths 1,0,1 --lr 1e-30 --optimizer sgd", "begun")[0]
    assert torch.equal(checkpoint["model"]["stem.0.weight"], begun["model"]["stem.0.weight"])
    assert checkpoint["model"]["stage3.conv.weight"].shape == (48, 32, 3, 3)
    config = train.parse_flags(TINY.split())[0]
    source = train.load_images(config)
    x = train.data.centre(torch.from_numpy(source.splits["train"].images), 24, source.mean, source.std)
    y = torch.nn.functional.conv2d(x, checkpoint["model"]["stem.0.weight"])[:, :12].transpose(0, 1).flatten(1)
    moments = y @ y.T / y.shape[1]
    strong = moments.diagonal() > 0.9  # directions of next to no variance are left small
    assert strong.sum() >= 3 and (moments - torch.diag(moments.diagonal())).abs().max() < 1e-2
    assert torch.allclose(moments.diagonal()[strong], torch.ones(int(strong.sum())), atol=0.1)


def test_tta_averages_six_views(capsys):
    run("--epochs 2")
    found = {}
    for name, flags in (("plain", []), ("tta", ["--tta"])):
        assert train.main(["--evaluate", "runs/run/best.pt", "--output", f"{name}.json", *flags]) == 0
        found[name] = json.loads(Path(f"{name}.json").read_text())
    net, meta, *_ = train.load_model("runs/run/best.pt", train.parse_flags(["--amp", "False"])[0])
    source = train.load_images({**train.parse_flags(TINY.split())[0]})
    inputs = train.data.centre(torch.from_numpy(source.splits["test"].images), 24, meta["mean"], meta["std"])
    moved = lambda i: torch.nn.functional.pad(inputs, (1, 1, 1, 1), mode="reflect")[:, :, i : i + 24, i : i + 24]
    with torch.inference_mode():
        both = lambda x: (net(x) + net(x.flip(3))) / 2
        logits = both(inputs) / 2 + both(moved(0)) / 4 + both(moved(2)) / 4
    labels = torch.from_numpy(source.splits["test"].labels)
    assert found["tta"]["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=0.02)
    assert found["tta"]["loss"] != found["plain"]["loss"]
    x = torch.randn(2, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    views, weights, _ = zip(*train.data.image_views(x))
    assert len(views) == 6 and sum(weights) == 1 and torch.equal(views[0], x) and torch.equal(views[1], x.flip(3))
    assert torch.equal(views[2][:, :, 1:, 1:], x[:, :, :-1, :-1])
    assert torch.equal(views[4][:, :, :-1, :-1], x[:, :, 1:, 1:])
