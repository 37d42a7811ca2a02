"""From a checkpoint to an answer: the report against scikit-learn, --predict, --export, pictures, trackers, SWA."""

import csv
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import save_folder
from test_runs import ROOT, TINY, run, same

import data
import model
import train
import utils

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(model.MODELS, "custom", partial(model.CustomCNN, widths=(8, 16, 32, 48)))


def main(flags):
    try:
        return train.main(flags if isinstance(flags, list) else flags.split())
    except SystemExit as stopped:
        return stopped.code


# ------------------------------------------------------------------------------------------- the report


def random_case(seed, count=400, classes=7, present=None):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)) * 2
    labels = rng.integers(0, present or classes, count)
    logits[np.arange(count), labels] += 1.5
    p = np.exp(logits)
    return (p / p.sum(1, keepdims=True)).round(2 + 2 * (seed % 2)), labels  # rounded: with ties


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("present", [7, 5])
@pytest.mark.filterwarnings("ignore")
def test_the_report_agrees_with_scikit_learn(seed, present):
    metrics = pytest.importorskip("sklearn.metrics")
    p, labels = random_case(seed, present=present)
    found, chosen, names = utils.classification_report(p, labels), p.argmax(1), range(7)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, chosen))
    assert np.array_equal(found["confusion_matrix"], metrics.confusion_matrix(labels, chosen, labels=names))
    for average in ("macro", "weighted"):
        three = metrics.precision_recall_fscore_support(labels, chosen, labels=names, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), three):
            assert found[f"{average}_{name}"] == pytest.approx(value)
    each = metrics.precision_recall_fscore_support(labels, chosen, labels=names, zero_division=0)
    for k, row in enumerate(found["per_class"]):
        own = [row[name] for name in ("precision", "recall", "f1", "samples")]
        assert own == pytest.approx([column[k] for column in each])
        if k < present:
            expected = metrics.average_precision_score(labels == k, p[:, k])
            assert row["average_precision"] == pytest.approx(expected)
    expected = np.mean([metrics.average_precision_score(labels == k, p[:, k]) for k in range(present)])
    assert found["mean_average_precision"] == pytest.approx(expected)
    if seed % 2:  # scikit-learn breaks ties of the fifth place in another way
        assert found["top5_accuracy"] == pytest.approx(metrics.top_k_accuracy_score(labels, p, k=5, labels=names))


def test_the_report_of_a_case_worked_out_by_hand():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    found = utils.classification_report(p, np.array([0, 0, 1, 1]))
    assert found["confusion_matrix"].tolist() == [[2, 0], [1, 1]] and found["accuracy"] == 0.75
    pairs = [(torch.from_numpy(np.log(p)), torch.tensor([0, 0, 1, 1]))]
    loss = train.image_report(pairs, None)[0]["loss"]
    assert loss == pytest.approx(-(np.log(0.9) + np.log(0.6) + np.log(0.8) + np.log(0.3)) / 4)
    assert found["confidence"] == pytest.approx(0.75) and found["top5_accuracy"] == 1.0
    # bins of 1/15: each sample alone, so the error is the mean of |right - confidence|
    assert found["calibration_error"] == pytest.approx((0.1 + 0.4 + 0.2 + 0.7) / 4)
    assert found["entropy"] == pytest.approx(-(p * np.log(p)).sum() / 4)
    assert found["per_class"][0]["average_precision"] == pytest.approx((1 + 2 / 3) / 2)  # ranks 1 and 3 of 0.9 0.7 0.6


def test_a_perfect_and_a_certain_but_wrong_classifier():
    labels = np.array([0, 1, 2, 1])
    good, bad = (utils.classification_report(np.eye(3)[chosen], labels) for chosen in (labels, [1] * 4))
    assert good["calibration_error"] == 0 and good["macro_f1"] == good["mean_average_precision"] == 1
    assert bad["accuracy"] == bad["calibration_error"] == 0.5 and bad["entropy"] == 0


# ---------------------------------------------------------------------------------------- --evaluate


def test_checkpoints_are_scored_side_by_side_and_written(monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run("--ema_decay 0.9 --swa_start_epoch 1")
    capsys.readouterr()
    shown, inner = {}, utils.save_contact_sheet

    def spy(path, images, titles, heading):
        shown.update(images=images, titles=titles, heading=heading)
        return inner(path, images, titles, heading)

    monkeypatch.setattr(utils, "save_contact_sheet", spy)
    names = ["best", "ema", "swa"]
    paths = [f"runs/run/{name}.pt" for name in names]
    assert main(["--evaluate", *paths, "--amp", "False", "--output", "all.json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(Path("all.json").read_text())
    assert [row["checkpoint"] for row in found] == paths and all(row["samples"] == 60 for row in found)
    table = [line.split() for line in text.splitlines() if line.startswith("macro_f1")][0]
    values = [row["macro_f1"] for row in found]
    assert [float(v.strip("*")) for v in table[1:]] == pytest.approx(values, abs=1e-4)
    assert [v.startswith("*") for v in table[1:]] == [v == max(values) for v in values]
    top = max(found, key=lambda row: row["accuracy"])
    assert f"highest accuracy: {top['checkpoint']}" in text
    assert np.array(found[0]["confusion_matrix"]).sum() == 60 and found[0]["per_class"][0]["class"] == "bars"
    assert 0 < found[0]["latency_ms"] <= found[0]["latency_p95_ms"]
    images = shown["images"]
    assert shown["heading"].startswith(f"{top['checkpoint']} on test") and len(images) == len(shown["titles"]) > 5
    assert all("taken for" in title for title in shown["titles"])
    for kind in ("curves", "confusion", "reliability", "mistakes"):
        assert Path(f"all-{kind}.png").read_bytes().startswith(PNG), kind
    assert main(["--evaluate", *paths, "--amp", "False", "--output", "all.csv"]) == 0
    with open("all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in found]
    assert "per_class" not in rows[0] and rows[1]["checkpoint"] == paths[1]


def test_checkpoints_of_different_data_are_not_marked(capsys):
    run("--epochs 1")
    run("--epochs 1", "other", TINY.replace("60", "50"))
    capsys.readouterr()
    assert main("--evaluate runs/run/best.pt runs/other/best.pt --amp False") == 0
    text = capsys.readouterr().out
    assert "different data" in text and "*" not in text and "highest" not in text


def test_names_are_drawn_as_they_are_and_pictures_never_stop_an_evaluation(monkeypatch):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 40)
    labels = rng.integers(0, 3, 40)
    report = utils.classification_report(p, labels)
    Path("metrics.csv").write_text("a,b\n1,2\n")  # of another program
    names = ["$\\frac$", "\u65e5\u672c", "a very long name that ends in " + "x" * 40]
    meta = {"classes": names, "image_size": 8}
    images = rng.integers(0, 256, (40, 10, 10, 2), dtype=np.uint8)  # two channels: grey by the first
    result = {**report, "checkpoint": "net.pt", "split": "test", "tta": False}
    titles, inner = [], utils.save_contact_sheet
    monkeypatch.setattr(utils, "save_contact_sheet", lambda *all: (titles.extend(all[2]), inner(*all))[1])
    made = utils.draw_report(Path("e.json"), result, (p, labels, images, meta))
    assert [path.name for path in made] == ["e-confusion.png", "e-reliability.png", "e-mistakes.png"]
    wrong = sorted((round(100 * p[i].max()) for i in range(40) if p[i].argmax() != labels[i]), reverse=True)
    assert [int(title.split()[-1].strip("%")) for title in titles] == wrong[:24] and wrong[0] > wrong[-1]
    assert utils.short("a-very-long-class-name-1") != utils.short("a-very-long-class-name-2")


def test_the_loss_of_a_certain_mistake_is_not_cut_off():
    logits = torch.tensor([[200.0, 0.0], [0.0, 1.0]])
    result, _ = train.image_report([(logits, torch.tensor([1, 1]))], None)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([1, 1])).item())


def test_a_bad_checkpoint_among_several_prints_no_scores(capsys):
    run()
    capsys.readouterr()
    assert main("--evaluate runs/run/best.pt nowhere.pt --output a.json") == 2
    printed = capsys.readouterr()
    assert not printed.out and "nowhere.pt: no such checkpoint" in printed.err and not Path("a.json").exists()


# ----------------------------------------------------------------------------------------- --predict


@pytest.fixture
def photos():
    save_folder(Path("photos"), ("train", "val", "test"), count=9, size=(40, 50))
    assert main("--model custom --data photos --image_size 32 --epochs 2 --batch_size 6 --run_name p --amp False") == 0
    return Path("runs/p/best.pt")


def test_prediction_is_what_evaluation_scores_and_needs_the_checkpoint_alone(photos, capsys):
    assert main(f"--evaluate {photos} --amp False --output e.json") == 0
    Path("elsewhere").mkdir()
    alone = shutil.move(photos, "elsewhere/net.pt")
    shutil.move("photos/test", "new")
    shutil.rmtree("photos")
    shutil.rmtree(".cache")
    assert main(f"--predict {alone} --input new --amp False --output p.json") == 0
    found = json.loads(Path("p.json").read_text())
    assert len(found) == 18 and found[0]["file"] == str(sorted(Path("new").rglob("*.*"))[0])
    right = sum(row["class"] == Path(row["file"]).parent.name for row in found) / 18
    assert right == pytest.approx(json.loads(Path("e.json").read_text())["accuracy"])
    assert all(sum(top["probability"] for top in row["top5"]) == pytest.approx(1) for row in found)  # of two classes
    assert "18 of 18 pictures" in capsys.readouterr().out
    one = found[0]["file"]
    assert main(["--predict", alone, "--input", one, str(Path("new/b*/*")), "--amp", "False", "--output", "p.csv"]) == 0
    with open("p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and rows[0]["file"] == one and rows[0]["class"] == found[0]["class"]
    assert float(rows[0]["probability"]) == pytest.approx(found[0]["probability"], abs=1e-5)
    assert float(rows[0]["probability2"]) == pytest.approx(1 - found[0]["probability"], abs=1e-5)


def test_broken_pictures_are_named_and_passed_over(photos, capsys):
    Path("photos/test/ant/a.png").write_bytes(b"no picture")
    whole = Path(sorted(Path("photos/test/bee").iterdir())[0])
    whole.write_bytes(whole.read_bytes()[:200])
    assert main(f"--predict {photos} --input photos/test --output p.json") == 1
    printed = capsys.readouterr()
    rows = json.loads(Path("p.json").read_text())
    assert len(rows) == 19 and sum("error" in row for row in rows) == 2
    assert "17 of 19 pictures, 2 could not be read" in printed.out
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and {"a.png", whole.name} == {Path(e.split(": ")[1]).name for e in errors}
    Path("bad").mkdir()
    shutil.copy("photos/test/ant/a.png", "bad/a.png")
    assert main(f"--predict {photos} --input bad") == 1


def test_views_change_a_prediction_and_agree_with_their_average(photos):
    paths = data.find_pictures("photos/test")
    for name, flags in (("plain", ""), ("tta", " --tta")):
        assert main(f"--predict {photos} --input photos/test --amp False --output {name}.json{flags}") == 0
    plain, tta = (json.loads(Path(f"{name}.json").read_text()) for name in ("plain", "tta"))
    assert any(abs(a["probability"] - b["probability"]) > 1e-6 for a, b in zip(plain, tta))
    net, meta, *_ = train.load_model(photos, train.parse_flags(["--amp", "False"])[0])
    (_, images, _), = data.decode_pictures(paths[:4], meta["stored_size"])
    inputs = data.centre(torch.from_numpy(images), 32, meta["mean"], meta["std"])
    with torch.inference_mode():
        p = sum(net(view) * weight for view, weight, _ in data.image_views(inputs)).softmax(1)
    assert [row["probability"] for row in tta[:4]] == pytest.approx(p.max(1).values.tolist(), abs=1e-4)


def test_pictures_are_found_as_a_shell_would_find_them():
    pytest.importorskip("PIL")
    save_folder(Path("photos"), ("new",), count=2)
    Path("photos/new/ant/._0.jpg").write_bytes(b"a Mac's")
    Path("photos/new/ant/notes.txt").write_text("no picture")
    assert data.find_pictures("photos/new/*") == data.find_pictures("photos") == data.find_pictures("photos", "photos")
    assert len(data.find_pictures("photos")) == 4 and len(data.find_pictures("photos/new/a*/*.jpg")) <= 2
    Path("c: d.png").write_bytes(b"x")
    (_, _, ((path, error),)), = data.decode_pictures([Path("c: d.png")], 8)
    assert path == Path("c: d.png") and "c: d.png" in str(error)


def test_a_model_of_grey_images_reads_pictures_by_their_luma():
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 24, 24), dtype=np.uint8)
    np.savez("grey.npz", x=x, y=np.arange(40) % 2)
    assert main("--model custom --data grey.npz --epochs 1 --batch_size 8 --run_name g --amp False") == 0
    image.fromarray(x[0]).save("a.png")
    colour = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image.fromarray(colour).save("b.png")
    (_, found, _), = data.decode_pictures([Path("a.png"), Path("b.png")], 24, channels=1)
    assert np.array_equal(found[0, ..., 0], x[0])
    assert np.array_equal(found[1, ..., 0], np.asarray(image.fromarray(colour).convert("L")))
    assert main("--predict runs/g/best.pt --input a.png b.png") == 0


USE_FAULTS = {
    "--predict NET": "--predict: needs --input PATH",
    "--predict NET --input nowhere/*.jpg": "--input nowhere/*.jpg: no picture there",
    "--predict NET --input empty": "--input empty: no picture there",
    "--predict NET --input photos --output a.sdm": "custom writes .csv or .json",
    "--predict NET --input photos --search": "--search: is for puzzles",
    "--predict NET --input photos --epochs 3": "--epochs: --predict does not read it",
    "--predict NET --input photos --message_steps 3": "--message_steps:",
    "--predict --input picture.jpg": "name the checkpoint that it is for: --predict CKPT",
    "--export NET": "--export: needs --output FILE.pt2 or FILE.onnx",
    "--export NET --output a.pt": "must be a .pt2 or .onnx file",
    "--export NET --output no/a.pt2": "in a folder that exists",
    "--export none.pt --output a.pt2": "no such checkpoint",
    "--export NET --output a.pt2 --tta": "--tta: does not go with --export",
    "--swa_lr 0.1": "--swa_lr: needs --swa_start_epoch",
    "--swa_start_epoch 4 --epochs 3": "--swa_start_epoch 4: must be at most --epochs 3",
    "--freeze_epochs 4 --epochs 3": "--freeze_epochs 4: must be at most --epochs 3",
    "--model sudoku_gnn --mixup 0.2": "--mixup: is for pictures",
    "--model sudoku_gnn --freeze_epochs 1": "--freeze_epochs: is for pictures",
    "--mixup nan": "--mixup: must be a number at least 0 and at most 100",
    "--cutmix 1e9": "--cutmix: must be a number at least 0 and at most 100",
    "--swa_start_epoch 2 --freeze_epochs 2": "--swa_start_epoch 2: must be above --freeze_epochs",
    "--freeze_epochs 1 --lr auto": "--freeze_epochs: the sweep is of the whole network",
    "--predict FOREIGN --input photos": "FOREIGN: has no metadata",
    "--predict empty --input photos": "empty: no such checkpoint; give a .pt file of a run",
    "--sam_rho -1": "--sam_rho: must be a number at least 0",
}


@pytest.mark.parametrize("flags", USE_FAULTS)
def test_a_bad_use_is_one_line_status_2_and_nothing_written(flags, capsys):
    Path("empty").mkdir()
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(b"x")
    Path("picture.jpg").write_bytes(b"x")
    if "FOREIGN" in flags:
        utils.save_checkpoint("FOREIGN", {"model": {}, "meta": {"epoch": 3}})
    if "NET" in flags:
        meta = {"model": "custom", "num_classes": 2, "in_channels": 3, "arguments": {}, "classes": ["a", "b"],
                "image_size": 24, "stored_size": 24, "mean": [0.5] * 3, "std": [0.5] * 3}  # fmt: skip
        utils.save_checkpoint("NET", {"model": model.build_model("custom", 2).state_dict(), "meta": meta})
    before = sorted(Path().rglob("*"))
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert USE_FAULTS[flags] in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_a_name_that_the_code_page_lacks_is_printed_all_the_same(photos):
    found = utils.load_checkpoint(photos)
    found["meta"]["classes"] = ["\u732b", "\u72ac"]
    found["meta"]["arguments"]["widths"] = [8, 16, 32, 48]
    utils.save_checkpoint("cats.pt", found)
    command = [sys.executable, str(ROOT / "train.py"), "--predict", "cats.pt", "--input", "photos/test"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0 and rb"\u732b" in done.stdout and b"Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------ --export


def test_the_exported_program_answers_as_predict_does(photos, capsys):
    assert main(f"--export {photos} --output net.pt2") == 0
    facts = {"facts.json": ""}
    program = torch.export.load("net.pt2", extra_files=facts).module()
    assert json.loads(facts["facts.json"])["classes"] == ["ant", "bee"]
    paths = data.find_pictures("photos/test")
    assert main(f"--predict {photos} --input photos/test --amp False --output p.json") == 0
    rows = json.loads(Path("p.json").read_text())
    side = utils.load_checkpoint(photos)["meta"]["stored_size"]
    (_, images, _), = data.decode_pictures(paths, side)
    cut = (side - 32) // 2
    for count in (1, 7, 18):
        p = program(torch.from_numpy(images[:count, cut : cut + 32, cut : cut + 32]))
        assert p.shape == (count, 2)
        assert p.max(1).values.tolist() == pytest.approx([row["probability"] for row in rows[:count]], abs=1e-5)


def test_onnx_holds_the_same_network():
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx.reference")
    run("--epochs 1")
    assert main("--export runs/run/best.pt --output net.onnx") == 0
    session = onnx.ReferenceEvaluator("net.onnx")
    images = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    net, meta, *_ = train.load_model("runs/run/best.pt", train.parse_flags(["--amp", "False"])[0])
    with torch.inference_mode():
        expected = net(data.centre(torch.from_numpy(images), 24, meta["mean"], meta["std"])).softmax(1).numpy()
    assert np.allclose(session.run(None, {session.input_names[0]: images})[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["efficientnet_b0", "sudoku_gnn"])
def test_the_other_networks_export_too(name):
    torch.manual_seed(0)
    arguments = {"message_steps": 2} if name == "sudoku_gnn" else {}
    net = model.build_model(name, 9, 1 if name == "sudoku_gnn" else 3, **arguments)
    for p in net.parameters():
        p.data += torch.randn_like(p) * 0.02
    size = [] if name == "sudoku_gnn" else [1.0] * 3
    meta = {"model": name, "num_classes": 9, "in_channels": len(size) or 1, "arguments": arguments,
            "classes": list("123456789"), "image_size": 32, "mean": [v / 2 for v in size],
            "std": [v / 4 for v in size]}  # fmt: skip
    before = model.Conv2d.tuned_on
    utils.save_checkpoint("net.pt", {"model": net.state_dict(), "meta": meta})
    assert main("--export net.pt --output net.pt2") == 0
    shape = (4, 81) if name == "sudoku_gnn" else (4, 32, 32, 3)
    inputs = torch.randint(0, 10, shape, dtype=torch.uint8)
    found = torch.export.load("net.pt2").module()(inputs)
    with torch.no_grad():
        plain = inputs if name == "sudoku_gnn" else data.centre(inputs, 32, meta["mean"], meta["std"])
        outputs = net.eval()(plain)[-1] if name == "sudoku_gnn" else net.eval()(plain)
    assert model.Conv2d.tuned_on == before
    assert (found.sum(-1) - 1).abs().max() < 1e-5 and torch.allclose(found, outputs.softmax(-1), atol=1e-5)


def test_an_export_that_differs_is_not_written(monkeypatch, capsys):
    run("--epochs 1")
    inner = utils.exported

    def wrong(*arguments):
        content, call = inner(*arguments)
        return content, lambda batch: call(batch) + 0.01

    monkeypatch.setattr(utils, "exported", wrong)
    assert main("--export runs/run/best.pt --output net.pt2") == 2
    assert "differs" in capsys.readouterr().err and not Path("net.pt2").exists()


# ------------------------------------------------------------------------------- averaging and freezing


def val_loss(weights):
    """Of a state dict on the validation images of TINY, by hand."""
    state, fresh, _ = train.prepare_run(train.parse_flags(TINY.split())[0])
    state.model.load_state_dict(weights)
    with torch.no_grad():
        pairs = [(state.model.eval()(fresh.prepare(images)), labels)
                 for images, labels, _ in fresh.fetch_val(fresh.val_order)]  # fmt: skip
    logits, labels = (torch.cat(column) for column in zip(*pairs))
    return torch.nn.functional.cross_entropy(logits, labels).item()


def test_swa_is_the_mean_of_the_epochs_with_statistics_of_the_training_data(monkeypatch):
    ends, inner = [], utils.save_checkpoint

    def keep(path, found):
        if Path(path).name == "last.pt":
            ends.append({name: tensor.clone() for name, tensor in found["model"].items()})
        inner(path, found)

    monkeypatch.setattr(utils, "save_checkpoint", keep)
    last, rows, log = run("--epochs 4 --swa_start_epoch 2 --swa_lr 0.01 --ema_decay 0.9")
    averaged = utils.load_checkpoint("runs/run/swa.pt")["model"]
    assert len(ends) == 4 and last["swa"]["n_averaged"] == 3
    for name, tensor in averaged.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(tensor, sum(end[name] for end in ends[1:]) / 3, atol=1e-6), name
    assert "swa_accuracy" not in rows[0] or not rows[0]["swa_accuracy"]
    assert all(rows[i]["swa_accuracy"] for i in (1, 2, 3)) and "swa loss" in log
    config = train.parse_flags(f"{TINY} --epochs 4 --swa_start_epoch 2 --swa_lr 0.01".split())[0]
    plain = train.onecycle(1, 8, 0.003, 0.3, 25.0, 1e4)[0]  # two steps an epoch; the last of the first one
    expected = [plain, *(train.swa_rate(step, 2, 2, plain, 0.01) for step in (3, 5, 7))]
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected) and expected[2] == 0.01
    for name in ("swa", "val"):  # what is written is what the checkpoints are worth
        weights = averaged if name == "swa" else last["model"]
        assert float(rows[3][f"{name}_loss"]) == pytest.approx(val_loss(weights), rel=1e-4)
    assert val_loss(averaged) != pytest.approx(val_loss(last["model"]), rel=1e-3)
    # the first BatchNorm's statistics, batch by batch, equally weighed
    state, fresh, _ = train.prepare_run(config)
    stem = state.model.stem
    state.model.load_state_dict(averaged)
    means, variances = [], []
    with torch.no_grad():
        for batch in fresh.fetch_train(fresh.order(3)):
            x = stem.conv(fresh.augment(*batch, 3)[0]).transpose(0, 1).flatten(1)
            means.append(x.mean(1))
            variances.append(x.var(1))
    assert torch.allclose(averaged["stem.bn.running_mean"], torch.stack(means).mean(0), atol=1e-5)
    assert torch.allclose(averaged["stem.bn.running_var"], torch.stack(variances).mean(0), rtol=1e-4)


def test_best_can_go_by_the_averaged_weights():
    _, rows, _ = run("--epochs 3 --swa_start_epoch 2 --monitor swa_loss")
    best, averaged = (utils.load_checkpoint(f"runs/run/{name}.pt") for name in ("best", "swa"))
    losses = [float(row["swa_loss"]) for row in rows if row["swa_loss"]]
    assert val_loss(best["model"]) == pytest.approx(min(losses), rel=1e-4)
    assert val_loss(averaged["model"]) == pytest.approx(losses[-1], rel=1e-4)


def test_averaged_statistics_do_not_depend_on_the_loader():
    """EfficientNet draws dropout and stochastic depth while its statistics are recomputed."""
    flags = "--model efficientnet_b0 --image_size 32 --max_samples 24 --batch_size 8 --epochs 1 --swa_start_epoch 1"
    found = [run("--amp False" + more, f"run{i}", flags)[0] for i, more in enumerate(("", " --workers 0"))]
    assert same(found[0]["swa"], found[1]["swa"]) and same(found[0]["model"], found[1]["model"])


def test_the_backbone_stays_while_it_is_frozen(monkeypatch):
    monkeypatch.chdir(Path())
    start = train.prepare_run(train.parse_flags(TINY.split())[0])[0].model.state_dict()
    frozen = run("--freeze_epochs 2 --weight_decay 0.5", "frozen")[0]["model"]
    moved = {name for name in start if not torch.equal(start[name], frozen[name])}
    assert moved == {"head.weight", "head.bias"}
    half = run("--freeze_epochs 1", "half")[0]["model"]
    assert all(not torch.equal(start[name], half[name]) for name in start if "running" in name)


# ---------------------------------------------------------------------------------- watching a run


def test_tensorboard_gets_scalars_rates_norms_and_samples(monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(train, "TRACK_EVERY", 1)
    plain = run("", "plain")
    tracked = run("--tensorboard", "tracked")
    assert same(plain[0]["model"], tracked[0]["model"])  # to be watched changes nothing
    events = EventAccumulator("runs/tracked").Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train_loss", "val_accuracy", "lr", "gradient_norm", "step_loss", "step_lr"} <= scalars
    assert [e.step for e in events.Scalars("step_gradient_norm")] == [1, 2, 3, 4]
    assert float(tracked[1][1]["gradient_norm"]) > 0
    picture = events.Images("samples")[0]
    assert picture.encoded_image_string.startswith(PNG) and (picture.width, picture.height) == (96, 96)


def test_sudoku_runs_show_a_board(capsys):
    pytest.importorskip("tensorboard")
    puzzles, solutions = data.generate(30, "easy", 0)
    Path("p.csv").write_text(data.sudoku_text(".csv", puzzles, solutions))
    flags = "--model sudoku_gnn --data p.csv --epochs 1 --batch_size 8 --width 8 --hidden 8 --message_steps 2"
    assert main(f"{flags} --free_steps 1 --val_fraction 0.2 --tensorboard --run_name s") == 0
    assert any(b"samples" in path.read_bytes() and b"---+---" in path.read_bytes()
               for path in Path("runs/s").glob("events*"))  # fmt: skip


def test_quiet_leaves_a_log_without_bars():
    flags = "--model custom --widths 8,16,32,48 --image_size 24 --max_samples 40 --epochs 1"
    for name, words in (("loud", []), ("quiet", ["--quiet"])):
        command = [sys.executable, str(ROOT / "train.py"), *flags.split(), "--run_name", name, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.isascii() and "\x1b" not in done.stdout
        assert ("epoch 1/1:" in done.stderr) == (name == "loud") and (done.stderr == "") == (name == "quiet")


def test_one_command_draws_the_curves_of_a_run():
    pytest.importorskip("matplotlib")
    run("--ema_decay 0.9")
    assert Path("runs/run/curves.png").read_bytes().startswith(PNG)
    Path("runs/run/curves.png").unlink()
    command = [sys.executable, str(ROOT / "utils.py")]
    done = subprocess.run([*command, "runs/run/metrics.csv"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and Path("runs/run/curves.png").exists(), done.stderr
    Path("bad.csv").write_text("a,b\n1,2\n")
    done = subprocess.run([*command, "bad.csv"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "bad.csv: no metrics.csv" in done.stderr
    with pytest.raises(ValueError, match="none.csv: cannot be read"):
        utils.curves("none.csv")


def test_without_matplotlib_everything_but_the_pictures_is_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run()
    assert main("--evaluate runs/run/best.pt --output e.json") == 0
    assert Path("e.json").is_file() and not list(Path().rglob("*.png"))
