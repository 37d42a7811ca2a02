"""From a checkpoint to an answer: the report against scikit-learn, --predict, --export, pictures;
averaged and frozen weights; what watches a run.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import save_folder

import data
import model
import train
import utils

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = "--model_args widths=8,16,32,48"
SMALL = f"--model custom {WIDTHS} --amp False"
TINY = (f"{SMALL} --image_size 24 --max_samples 60 --batch_size 16 --accumulation_steps 2 "
        "--epochs 2")  # two steps an epoch
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def main(flags):
    try:
        return train.main(flags if isinstance(flags, list) else flags.split())
    except SystemExit as stopped:
        return stopped.code


def run(flags="", name="run", preset=TINY):
    """Trains in this process: (last checkpoint, rows of metrics.csv, text of the log)."""
    assert main(f"{preset} --run_name {name} {flags}") == 0
    folder = Path("runs") / name
    rows = read_csv(folder / "metrics.csv")
    return utils.load_checkpoint(folder / "last.pt"), rows, (folder / "log.txt").read_text()


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def prepared(flags=""):
    """(state, run) as a training run has them before its first step."""
    args, given = train.parse_flags(f"{TINY} {flags}".split())
    train.check_flags(args, given)
    return train.prepare(args)[:2]


def loaded(path):
    """(network in float32, its metadata)."""
    return train.load_model(path, train.parse_flags(["--amp", "False"])[0])[:2]


@pytest.fixture
def small_b0(monkeypatch):
    """EfficientNet-B0 of two stages: every kind of block, a quarter of the time."""
    monkeypatch.setattr(model, "B0_STAGES", ((1, 3, 1, 16, 1), (6, 5, 2, 24, 2)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one finished run, with best.pt, ema.pt and swa.pt; nobody changes it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("--ema_decay 0.9 --swa_start_epoch 1")
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with class folders of JPEGs, photos/, and runs/p of them; nobody changes it."""
    folder = tmp_path_factory.mktemp("photos")
    save_folder(folder / "photos", ("train", "val", "test"), count=9, size=(40, 50))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = f"{SMALL} --data photos --image_size 32 --epochs 2 --batch_size 6 --run_name p"
        assert main(flags) == 0
    return folder


# ------------------------------------------------------------------------------------- the report


def random_case(seed, present):
    """(probabilities [400, 7], labels of the first `present` classes)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(400, 7)) * 2
    labels = rng.integers(0, present, 400)
    logits[np.arange(400), labels] += 1.5
    p = np.exp(logits)
    return (p / p.sum(1, keepdims=True)).round(2 + 2 * (seed % 2)), labels  # rounded: with ties


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("present", [7, 5])
@pytest.mark.filterwarnings("ignore")
def test_the_report_agrees_with_scikit_learn(seed, present):
    metrics = pytest.importorskip("sklearn.metrics")
    (p, labels), classes = random_case(seed, present), range(7)
    chosen = p.argmax(1)
    found = utils.classification_report(p, labels, [f"class {k}" for k in classes])
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, chosen))
    matrix = metrics.confusion_matrix(labels, chosen, labels=classes)
    assert np.array_equal(found["confusion_matrix"], matrix)
    occurring = sorted({*labels, *chosen})
    scores = lambda average: metrics.precision_recall_fscore_support(
        labels, chosen, labels=occurring if average else classes, average=average, zero_division=0)
    for average in ("macro", "weighted"):
        for name, value in zip(("precision", "recall", "f1"), scores(average)):
            assert found[f"{average}_{name}"] == pytest.approx(value)
    precisions = [metrics.average_precision_score(labels == k, p[:, k]) for k in range(present)]
    for k, row in enumerate(found["per_class"]):
        own = [row[name] for name in ("precision", "recall", "f1", "samples")]
        assert row["class"] == f"class {k}"
        assert own == pytest.approx([column[k] for column in scores(None)])
        expected = precisions[k] if k < present else 0.0
        assert row["average_precision"] == pytest.approx(expected)
    assert found["mean_average_precision"] == pytest.approx(np.mean(precisions))
    if seed % 2:  # scikit-learn breaks ties of the fifth place in another way
        top5 = metrics.top_k_accuracy_score(labels, p, k=5, labels=classes)
        assert found["top5_accuracy"] == pytest.approx(top5)


def test_the_report_of_a_case_worked_out_by_hand():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    found = utils.classification_report(p, np.array([0, 0, 1, 1]), ["a", "b"])
    assert found["confusion_matrix"].tolist() == [[2, 0], [1, 1]] and found["accuracy"] == 0.75
    assert found["confidence"] == pytest.approx(0.75) and "top5_accuracy" not in found
    # bins of 1/15: each sample alone, so the error is the mean of |right - confidence|
    assert found["calibration_error"] == pytest.approx((0.1 + 0.4 + 0.2 + 0.7) / 4)
    assert found["entropy"] == pytest.approx(-(p * np.log(p)).sum() / 4)
    average = (1 + 2 / 3) / 2  # ranks 1 and 3 of 0.9, 0.7, 0.6
    assert found["per_class"][0]["average_precision"] == pytest.approx(average)


def test_a_perfect_and_a_certain_but_wrong_classifier():
    labels, names = np.array([0, 1, 2, 1]), ["a", "b", "c"]
    good, bad = (utils.classification_report(np.eye(3)[chosen], labels, names)
                 for chosen in (labels, [1] * 4))
    assert good["calibration_error"] == 0
    assert good["macro_f1"] == good["mean_average_precision"] == 1
    assert bad["accuracy"] == bad["calibration_error"] == 0.5 and bad["entropy"] == 0


# ------------------------------------------------------------------------------------- --evaluate


def test_checkpoints_are_scored_side_by_side_and_written(finished, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    shown, draw = {}, utils.save_contact_sheet

    def spy(path, images, titles, heading):
        shown.update(images=images, titles=titles, heading=heading)
        return draw(path, images, titles, heading)

    monkeypatch.setattr(utils, "save_contact_sheet", spy)
    paths = [str(finished / f"{name}.pt") for name in ("best", "ema", "swa")]
    assert main(["--evaluate", *paths, "--amp", "False", "--output", "all.json"]) == 0
    text, found = capsys.readouterr().out, json.loads(Path("all.json").read_text())
    assert [row["checkpoint"] for row in found] == paths
    assert all((row["samples"], row["split"]) == (60, "test") for row in found)
    _, *cells = next(line.split() for line in text.splitlines() if line.startswith("macro_f1"))
    values = [row["macro_f1"] for row in found]
    assert [float(cell.strip("*")) for cell in cells] == pytest.approx(values, abs=1e-4)
    assert [cell.startswith("*") for cell in cells] == [v == max(values) for v in values]
    top = max(found, key=lambda row: row["accuracy"])
    assert f"highest accuracy: {top['checkpoint']}" in text
    assert np.array(found[0]["confusion_matrix"]).sum() == 60
    assert found[0]["per_class"][0]["class"] == "bars"
    assert found[0]["samples_per_second"] > 0
    assert shown["heading"].startswith(f"{top['checkpoint']} on test")
    assert len(shown["images"]) == len(shown["titles"]) > 5
    assert all("taken for" in title for title in shown["titles"])
    for kind in ("confusion", "reliability", "mistakes"):
        assert Path(f"all-{kind}.png").read_bytes().startswith(PNG), kind
    scored = [(row, train.Task(sum, metrics=("accuracy",)), None) for row in found]
    monkeypatch.setattr(train, "score", lambda path, *_: scored[paths.index(str(path))])
    assert main(["--evaluate", *paths, "--output", "all.csv"]) == 0
    rows = read_csv("all.csv")
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in found]
    assert "per_class" not in rows[0] and rows[1]["checkpoint"] == paths[1]


def test_without_matplotlib_the_scores_are_there_and_the_loss_is_the_cross_entropy(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    run("--epochs 3 --lr 0.02 --label_smoothing 0.1")
    assert main("--evaluate runs/run/best.pt --amp False --output e.json") == 0
    assert not list(Path().rglob("*.png"))
    found = json.loads(Path("e.json").read_text())  # of one checkpoint: an object, not a list
    net, meta = loaded("runs/run/best.pt")
    test = prepared()[1].source.splits["test"]
    images, labels = (torch.from_numpy(np.array(a)) for a in (test.images, test.labels))
    with torch.no_grad():
        logits = net(data.centre(images, 24, meta["mean"], meta["std"]))
    loss = torch.nn.functional.cross_entropy(logits, labels.long()).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["accuracy"] == (logits.argmax(1) == labels).double().mean().item()


def test_the_loss_of_a_certain_mistake_is_not_cut_off(finished):
    args = train.parse_flags(["--amp", "False"])[0]
    task = train.load_model(finished / "best.pt", args)[2]
    logits, labels = torch.tensor([[200.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1])
    found = train.means(train.sum_totals([(logits, labels)], task), task)
    assert found["loss"] == pytest.approx((200 + np.log1p(np.exp(-1.0))) / 2)
    assert found["accuracy"] == 0.5


def test_checkpoints_of_different_data_are_not_marked(finished, capsys):
    run("--epochs 1", "other", TINY.replace("60", "50"))
    capsys.readouterr()
    assert main(f"--evaluate {finished}/best.pt runs/other/best.pt --amp False") == 0
    text = capsys.readouterr().out
    assert "different data" in text and "*" not in text and "highest" not in text


def test_names_are_drawn_as_they_are_and_the_worst_mistakes_come_first(monkeypatch):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(3), 40), rng.integers(0, 3, 40)
    names = ["$\\frac$", "\u65e5\u672c", "a very long name that ends in " + "x" * 40]
    result = {**utils.classification_report(p, labels, names),
              "checkpoint": "net.pt", "split": "test", "tta": False}
    images = rng.integers(0, 256, (40, 10, 10, 2), np.uint8)  # two channels: grey by the first
    files, titles, draw = np.array([f"{i}.jpg" for i in range(40)]), [], utils.save_contact_sheet

    def spy(path, images, found, heading):
        titles.extend(found)
        return draw(path, images, found, heading)

    monkeypatch.setattr(utils, "save_contact_sheet", spy)
    meta = {"classes": names, "image_size": 8}
    made = utils.draw_report(Path("e.json"), result, (p, labels, data.Split(images, labels, files), meta))
    assert [p.name for p in made] == ["e-confusion.png", "e-reliability.png", "e-mistakes.png"]
    wrong = p.argmax(1) != labels
    expected = sorted((round(100 * value) for value in p.max(1)[wrong]), reverse=True)
    assert [int(title.split()[-2].strip("%")) for title in titles] == expected[:24]
    assert all(wrong[int(title.split()[-1].removesuffix(".jpg"))] for title in titles)
    assert utils.short("a-very-long-class-name-1") != utils.short("a-very-long-class-name-2")


def test_a_bad_checkpoint_among_several_is_named_and_nothing_is_written(finished, capsys):
    assert main(f"--evaluate {finished}/best.pt nowhere.pt --output a.json") == 2
    error = capsys.readouterr().err
    assert "nowhere.pt: no such checkpoint" in error and error.count("\n") == 1
    assert not list(Path().iterdir())


# -------------------------------------------------------------------------------------- --predict


def predict(photos, flags, output="p.json"):
    """The rows that --predict writes for the network of `photos`."""
    words = ["--predict", str(photos / "runs/p/best.pt"), "--amp", "False", "--output", output]
    assert main([*words, *map(str, flags)]) == 0
    return json.loads(Path(output).read_text()) if output.endswith("json") else read_csv(output)


def test_prediction_is_what_evaluation_scores_and_needs_the_checkpoint_alone(
        photos, monkeypatch, capsys):
    source = photos / "photos/test"
    assert main(f"--evaluate {photos}/runs/p/best.pt --amp False --output e.json") == 0
    scored = json.loads(Path("e.json").read_text())
    monkeypatch.setattr(train, "load_source", lambda args: pytest.fail("the data is read"))
    Path("runs/p").mkdir(parents=True)
    shutil.copy(photos / "runs/p/best.pt", "runs/p/best.pt")
    found = predict(Path(), ["--input", source])
    assert [row["file"] for row in found] == list(map(str, sorted(source.rglob("*.*"))))
    right = sum(row["class"] == Path(row["file"]).parent.name for row in found) / 18
    assert right == pytest.approx(scored["accuracy"])
    for row in found:  # of two classes
        assert list(row) == ["file", "class", "probability", "class2", "probability2"]
        assert row["probability"] + row["probability2"] == pytest.approx(1)
    assert "18 of 18 pictures" in capsys.readouterr().out
    rows = predict(Path(), ["--input", found[0]["file"], source / "b*/*"], "p.csv")
    assert len(rows) == 10 and list(rows[0]) == list(found[0])
    for name, value in found[0].items():
        number = name.startswith("probability")
        assert (float(rows[0][name]) if number else rows[0][name]) == pytest.approx(value, abs=1e-5)


def test_broken_pictures_are_named_and_passed_over(photos, capsys):
    shutil.copytree(photos / "photos/test", "new")
    Path("new/ant/a.png").write_bytes(b"no picture")
    cut = sorted(Path("new/bee").iterdir())[0]
    cut.write_bytes(cut.read_bytes()[:200])
    command = f"--predict {photos}/runs/p/best.pt"
    assert main(f"{command} --input new --output p.json") == 1
    printed, rows = capsys.readouterr(), json.loads(Path("p.json").read_text())
    assert len(rows) == 19 and sum("error" in row for row in rows) == 2
    assert "17 of 19 pictures" in printed.out
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert {Path(line.split(": ")[1]).name for line in errors} == {"a.png", cut.name}
    assert len(errors) == 2
    assert main(f"{command} --input new/ant/a.png") == 1


def test_views_change_a_prediction_and_agree_with_their_average(photos):
    source = photos / "photos/test"
    plain, tta = predict(photos, ["--input", source]), predict(photos, ["--input", source, "--tta"])
    best = lambda rows: {row["file"]: row["probability"] for row in rows}
    assert any(abs(best(plain)[file] - p) > 1e-6 for file, p in best(tta).items())
    net, meta = loaded(photos / "runs/p/best.pt")
    (paths, images, _), = data.decode_pictures(data.find_pictures(source)[:4], meta["stored_size"])
    inputs = data.centre(torch.from_numpy(images), 32, meta["mean"], meta["std"])
    with torch.inference_mode():
        p = sum(net(view) * weight for view, weight in data.image_views(inputs)).softmax(1)
    expected = dict(zip(map(str, paths), p.max(1).values.tolist()))
    assert {file: best(tta)[file] for file in expected} == pytest.approx(expected, abs=1e-4)


def test_pictures_are_found_as_a_shell_would_find_them():
    pytest.importorskip("PIL")
    save_folder(Path("photos"), ("new",), count=2)
    Path("photos/new/ant/._0.jpg").write_bytes(b"a Mac's")
    Path("photos/new/ant/notes.txt").write_text("no picture")
    found = data.find_pictures("photos")
    assert found == data.find_pictures("photos/new/*") == data.find_pictures("photos", "photos")
    assert [path.name for path in found] == ["0.jpg", "1.jpg"] * 2
    assert data.find_pictures("photos/new/a*/*.jpg") == found[:2]
    Path("c: d.png").write_bytes(b"x")
    (_, _, ((path, error),)), = data.decode_pictures([Path("c: d.png")], 8)
    assert path == Path("c: d.png") and "c: d.png" in str(error)


def test_a_model_of_grey_images_reads_pictures_by_their_luma():
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 24, 24), np.uint8)
    np.savez("grey.npz", x=x, y=np.arange(40) % 2)
    assert main(f"{SMALL} --data grey.npz --epochs 1 --batch_size 8 --run_name g") == 0
    image.fromarray(x[0]).save("a.png")
    colour = image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    colour.save("b.png")
    (_, found, _), = data.decode_pictures([Path("a.png"), Path("b.png")], 24, channels=1)
    assert np.array_equal(found[0, ..., 0], x[0])
    assert np.array_equal(found[1, ..., 0], np.asarray(colour.convert("L")))
    assert main("--predict runs/g/best.pt --input a.png b.png") == 0


USE_FAULTS = {
    "--predict NET": "--predict: needs --input",
    "--predict NET --input nowhere/*.jpg": "--input nowhere/*.jpg: no picture there",
    "--predict NET --input empty": "--input empty: no picture there",
    "--predict NET --input photos --output a.sdm": "custom writes",
    "--predict NET --input photos --search": "--search: is for puzzles",
    "--predict NET --input photos --epochs 3": "--epochs: does not go with --predict",
    "--predict NET --input photos --model_args message_steps=3": "message_steps",
    "--predict --input picture.jpg": "--predict CKPT",
    "--predict SUDOKU --input puzzle.sdm --output a.json": "sudoku_gnn writes",
    "--predict SUDOKU --input puzzle.sdm --tta": "--tta: is for pictures",
    "--predict FOREIGN --input photos": "FOREIGN: has no metadata",
    "--predict empty --input photos": "empty: no such checkpoint; give a .pt file of a run",
    "--evaluate SUDOKU --tta": "--tta: is for pictures",
    "--evaluate SUDOKU --model_args message_steps=0": "message_steps: must be",
    "--evaluate NET --search": "--search: does not go with --evaluate",
    "--export NET": "--export: needs --output",
    "--export NET --output a.pt": "must be a .pt2 or .onnx file",
    "--export NET --output no/a.pt2": "in a folder that exists",
    "--export none.pt --output a.pt2": "no such checkpoint",
    "--export NET --output a.pt2 --tta": "--tta: does not go with --export",
    "--input photos": "--input: needs --predict",
    f"--copy update_ema --output {Path(train.__file__).with_name('utils.py')}": "a file of the kit",
    "--find_lr --output runs/old/metrics.csv": "a file of the kit or of a run",
    "--tta": "--tta: needs --evaluate or --predict",
    "--swa_start_epoch 4 --epochs 3": "--swa_start_epoch 4: must be at most --epochs 3",
    "--model sudoku_gnn --mixup 0.2": "--mixup: is for pictures",
    "--mixup nan": "--mixup: must be a number at least 0 and at most 100",
    "--cutmix 1e9": "--cutmix: must be a number at least 0 and at most 100",
    "--sam_rho -1": "--sam_rho: must be a number at least 0",
}


@pytest.mark.parametrize("flags", USE_FAULTS)
def test_a_bad_use_is_one_line_status_2_and_nothing_written(flags, capsys):
    Path("empty").mkdir()
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(b"x")
    Path("picture.jpg").write_bytes(b"x")
    Path("puzzle.sdm").write_text("." * 64 + "1" + "." * 16)
    Path("runs/old").mkdir(parents=True)
    Path("runs/old/lock").touch()
    if "FOREIGN" in flags:
        utils.save_checkpoint("FOREIGN", {"model": {}, "meta": {"epoch": 3}})
    if "NET" in flags:
        net = model.build_model("custom", 2, widths=(8, 8, 8, 8))
        meta = {"model": "custom", "num_classes": 2, "in_channels": 3, "classes": ["a", "b"],
                "arguments": {"widths": [8, 8, 8, 8]}, "image_size": 24, "stored_size": 24,
                "mean": [0.5] * 3, "std": [0.5] * 3}
        utils.save_checkpoint("NET", {"model": net.state_dict(), "meta": meta})
    before = sorted(Path().rglob("*"))
    assert main(flags.replace("SUDOKU", str(ROOT / "weights/sudoku_quick.pt"))) == 2
    error = capsys.readouterr().err
    assert USE_FAULTS[flags] in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_a_name_that_the_code_page_lacks_is_printed_all_the_same(photos):
    found = utils.load_checkpoint(photos / "runs/p/best.pt")
    found["meta"]["classes"] = ["\u732b", "\u72ac"]
    utils.save_checkpoint("cats.pt", found)
    command = [sys.executable, str(ROOT / "train.py"), "--predict", "cats.pt", "--input"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([*command, str(photos / "photos/test")], capture_output=True,
                          env=environment, timeout=60)
    assert done.returncode == 0 and rb"\u732b" in done.stdout and b"Traceback" not in done.stderr


# --------------------------------------------------------------------------------------- --export


def test_the_exported_program_answers_as_predict_does(photos):
    assert main(f"--export {photos}/runs/p/best.pt --output net.pt2") == 0
    files = {"facts.json": ""}
    program = torch.export.load("net.pt2", extra_files=files).module()
    facts = json.loads(files["facts.json"])
    assert facts["classes"] == ["ant", "bee"] and facts["image_size"] == 32
    source = photos / "photos/test"
    expected = [row["probability"] for row in predict(photos, ["--input", source])]
    paths, cut = data.find_pictures(source), (facts["stored_size"] - 32) // 2
    (_, images, _), = data.decode_pictures(paths, facts["stored_size"])
    images = torch.from_numpy(images[:, cut : cut + 32, cut : cut + 32])
    for count in (1, 7, 18):
        p = program(images[:count])
        assert p.shape == (count, 2)
        assert p.max(1).values.tolist() == pytest.approx(expected[:count], abs=1e-5)


def test_onnx_holds_the_same_network(finished):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx.reference")
    assert main(f"--export {finished}/best.pt --output net.onnx") == 0
    session = onnx.ReferenceEvaluator("net.onnx")
    images = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), np.uint8)
    net, meta = loaded(finished / "best.pt")
    with torch.inference_mode():
        inputs = data.centre(torch.from_numpy(images), 24, meta["mean"], meta["std"])
        expected = net(inputs).softmax(1).numpy()
    found = session.run(None, {session.input_names[0]: images})[0]
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["efficientnet_b0", "sudoku_gnn"])
def test_the_other_networks_export_too(name, small_b0):
    torch.manual_seed(0)
    puzzles = name == "sudoku_gnn"
    arguments, channels = ({"message_steps": 2}, 1) if puzzles else ({}, 3)
    net = model.build_model(name, 9, channels, **arguments).eval()
    for p in net.parameters():
        p.data += torch.randn_like(p) * 0.02
    mean, std = ([], []) if puzzles else ([0.5] * 3, [0.25] * 3)
    meta = {"model": name, "num_classes": 9, "in_channels": channels, "arguments": arguments,
            "classes": list("123456789"), "image_size": 32, "mean": mean, "std": std}
    utils.save_checkpoint("net.pt", {"model": net.state_dict(), "meta": meta})
    assert main("--export net.pt --output net.pt2") == 0
    shape = (4, 81) if puzzles else (4, 32, 32, 3)
    inputs = torch.randint(0, 10, shape, dtype=torch.uint8)
    found = torch.export.load("net.pt2").module()(inputs)
    with torch.no_grad():
        outputs = net(inputs)[-1] if puzzles else net(data.centre(inputs, 32, mean, std))
    assert (found.sum(-1) - 1).abs().max() < 1e-5
    assert torch.allclose(found, outputs.softmax(-1), atol=1e-5)


def test_an_export_that_differs_is_not_written(finished, monkeypatch, capsys):
    class Differing(model.Deployed):
        def forward(self, inputs):
            return super().forward(inputs) + 0.01 * torch.compiler.is_exporting()

    monkeypatch.setattr(model, "Deployed", Differing)
    assert main(f"--export {finished}/best.pt --output net.pt2") == 2
    assert "differs" in capsys.readouterr().err and not list(Path().iterdir())


# ------------------------------------------------------------------------- averaging and freezing


def val_loss(weights):
    """Of a state dict on the validation images of TINY, by hand."""
    state, fresh = prepared()
    state.model.load_state_dict(weights)
    with torch.no_grad():
        order = torch.arange(len(fresh.source.splits["val"]))
        (images, labels, _), = fresh.fetch["val"]([order])
        logits = state.model.eval()(fresh.task.prepare(images))
    return torch.nn.functional.cross_entropy(logits, labels.long()).item()


def test_swa_is_the_mean_of_the_epochs_with_statistics_of_the_training_data(monkeypatch):
    ends, save = [], utils.save_checkpoint

    def keep(path, content):
        if Path(path).name == "last.pt" and content["step"]:
            ends.append({name: tensor.clone() for name, tensor in content["model"].items()})
        save(path, content)

    monkeypatch.setattr(utils, "save_checkpoint", keep)
    flags = "--epochs 4 --swa_start_epoch 2 --ema_decay 0.9 --monitor swa_loss"
    last, rows, log = run(flags)
    averaged = utils.load_checkpoint("runs/run/swa.pt")["model"]
    assert len(ends) == 4 and last["swa"]["n_averaged"] == 3
    for name, tensor in averaged.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(tensor, sum(end[name] for end in ends[1:]) / 3, atol=1e-6), name
    assert [bool(row["swa_accuracy"]) for row in rows] == [False, True, True, True]
    assert "swa loss" in log
    for name, weights in (("swa", averaged), ("val", last["model"])):
        assert float(rows[3][f"{name}_loss"]) == pytest.approx(val_loss(weights), rel=1e-4)
    losses = [float(row["swa_loss"]) for row in rows[1:]]  # best.pt goes by the averaged weights
    best = utils.load_checkpoint("runs/run/best.pt")["model"]
    assert val_loss(best) == pytest.approx(min(losses), rel=1e-4)
    assert val_loss(averaged) != pytest.approx(val_loss(last["model"]), rel=1e-3)
    # the first BatchNorm's statistics, batch by batch, equally weighed
    state, fresh = prepared(flags)
    state.model.load_state_dict(averaged)
    means, variances = [], []
    with torch.no_grad():
        order = data.epoch_order(len(fresh.source.splits["train"]), seed=0, epoch=3)
        for batch in fresh.fetch["train"](data.chunks(order, 16)):
            inputs, _ = fresh.task.augment(*batch, 3)
            x = state.model.stem.conv(inputs).transpose(0, 1).flatten(1)
            means.append(x.mean(1))
            variances.append(x.var(1))
    mean, variance = (averaged[f"stem.bn.running_{name}"] for name in ("mean", "var"))
    assert torch.allclose(mean, sum(means) / len(means), atol=1e-5)
    assert torch.allclose(variance, sum(variances) / len(variances), rtol=1e-4)


def test_averaged_statistics_do_not_depend_on_the_loader(small_b0):
    """EfficientNet draws dropout and stochastic depth while its statistics are recomputed."""
    flags = ("--model efficientnet_b0 --image_size 32 --max_samples 24 --batch_size 8 --epochs 1 "
             "--swa_start_epoch 1 --amp False")
    found = [run(more, f"run{i}", flags)[0] for i, more in enumerate(("", "--workers 0"))]
    assert same(found[0]["swa"], found[1]["swa"]) and same(found[0]["model"], found[1]["model"])


# --------------------------------------------------------------------------------- watching a run


def test_tensorboard_gets_scalars_rates_and_norms(monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(train, "TRACK_EVERY", 1)
    plain, tracked = run("", "plain"), run("--tensorboard", "tracked")
    assert same(plain[0]["model"], tracked[0]["model"])  # being watched changes nothing
    events = EventAccumulator("runs/tracked").Reload()
    scalars = {"train_loss", "val_accuracy", "lr", "gradient_norm", "step_loss", "step_lr"}
    assert scalars <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("step_gradient_norm")] == [1, 2, 3, 4]
    rates = [event.value for event in events.Scalars("step_lr")]
    assert rates == pytest.approx([train.onecycle(step, 4, 0.002)[0] for step in range(4)])
    assert float(tracked[1][1]["gradient_norm"]) > 0


def test_wandb_gets_every_column(monkeypatch):
    class Client:
        """Stands for the package: keeps what it is given."""

        Error, rows = OSError, []

        def init(self, **facts):
            assert facts["name"] == facts["id"] == "watched" and facts["resume"] == "allow"
            return self

        def log(self, values, step):
            self.rows.append((step, values))

    monkeypatch.setitem(sys.modules, "wandb", Client())
    monkeypatch.setattr(utils, "missing", lambda *packages: "")
    monkeypatch.setattr(utils, "save_history", lambda *all: False)
    _, rows, _ = run("--wandb", "watched")
    assert len(Client.rows) == len(rows) == 2
    for (step, values), row in zip(Client.rows, rows):
        assert {"step": step, **values} == {name: float(value) for name, value in row.items()}


def test_quiet_leaves_a_log_without_bars(capsys):
    for name, flags in (("loud", ""), ("quiet", "--quiet")):
        run(flags, name, TINY.replace("60", "120") + " --epochs 1")
        printed = capsys.readouterr()
        assert printed.out.isascii() and "\x1b" not in printed.out
        assert printed.err == ""  # no terminal, and nothing took 30 seconds


def test_a_run_leaves_its_curves(finished):
    pytest.importorskip("matplotlib")
    assert (finished / "curves.png").read_bytes().startswith(PNG)


# ------------------------------------------------------------------------------------ own pictures


def test_outside_a_terminal_progress_is_a_line_at_most_every_thirty_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])
    with utils.progress_bar("epoch 2/3", 500, "images", False) as bar:
        for now[0] in (1.0, 29.0, 31.0, 40.0, 60.0, 62.0):
            utils.show(bar, lambda: f"at {now[0]:.0f}")
    assert capsys.readouterr().err == "epoch 2/3, at 31\nepoch 2/3, at 62\n"


def test_the_bar_says_what_is_left():
    times = {1: "1 s", 119: "119 s", 121: "2 min", 7000: "117 min", 8000: "2 h"}
    assert {t: utils.duration(t) for t in times} == times
    state = train.TrainState(torch.nn.Linear(1, 1), None, None, step=15, epoch_step=5, seconds=30.0)
    state.totals = torch.tensor([[8.0, 2.0], [4.0, 4.0]])
    args = train.argparse.Namespace(epochs=3)
    task = train.Task(sum, metrics=("accuracy",))
    shown = train.Run(args, task, None, None, None, None, None, steps_per_epoch=10)
    assert train.progress_text(state, shown) == "loss 2.0000, accuracy 50.00%, run 90 s left"


@pytest.mark.parametrize("samples, flags, settled", [
    (270, (64, 2, 10), (16, 1, 12)),  # 17 steps an epoch even so: more epochs
    (86, (32, 2, 10), (16, 1, 34)),
    (640, (64, 4, 10), (32, 1, 10)),
    (33, (16, 1, 10), (16, 1, 100)),  # two steps: a last batch of one joins the one before
    (200, (20, 1, 10), (16, 1, 16)),  # never below 16 a step
    (50_000, (64, 2, 10), (64, 2, 10)),
    (30, (4, 2, 1), (4, 2, 50)),
])
def test_small_sets_get_enough_steps(samples, flags, settled):
    names = "batch_size", "accumulation_steps", "epochs"
    args = train.argparse.Namespace(**dict(zip(names, flags)), min_steps=200)
    notes = [*train.fit_steps(args, samples)]
    assert tuple(getattr(args, name) for name in names) == settled
    assert bool(notes) == (flags != settled)
    batches = len(data.chunks(torch.zeros(samples), args.batch_size))
    steps = -(-batches // args.accumulation_steps)
    assert steps * args.epochs >= 200


def test_batches_and_epochs_that_the_user_names_stay():
    args, _ = train.parse_flags(["--config", "finetune"])
    assert args.min_steps == 200
    for words in ("--batch_size 64", "--epochs 3", "--accumulation_steps 2", "--effective_batch 8"):
        args, _ = train.parse_flags(["--config", "finetune", *words.split()])
        assert args.min_steps == 0


def own_photos(counts=(40, 6), split=""):
    """A folder of random pictures, unevenly many of two classes."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name, count in zip(("ant", "bee"), counts):
        folder = Path("photos", split, name)
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (30, 40, 3), np.uint8)
            image.fromarray(pixels).save(folder / f"{i}.png")


def test_a_run_on_own_pictures_says_what_it_found_and_what_to_do(capsys):
    own_photos()
    small = f"{SMALL} --data photos --image_size 24 --epochs 1 --run_name p"
    assert main(small) == 0
    log = Path("runs/p/log.txt").read_text()
    for words in ("photos (image folder); val is 10% of each class of train, 24 px",
                  "classes    2: ant 36, bee 5", "hint       5 validation samples", "by 20.0%",
                  "--class_weights balanced", "best.pt (raw weights)",
                  f"python train.py --predict {Path('runs/p')} --input PICTURES"):
        assert words in log, words
    if not utils.missing("matplotlib"):
        assert Path("runs/p/samples.png").read_bytes().startswith(PNG)
    assert main(f"{small}q --class_weights balanced --ema_decay 0.9 --tensorboard False") == 0
    log = Path("runs/pq/log.txt").read_text()
    assert "hint       the largest" not in log and "best.pt (EMA weights)" in log
    capsys.readouterr()
    assert main("--resume p") == 2
    assert f"--pretrained {Path('runs/p/best.pt')}" in capsys.readouterr().err
    # names of runs for checkpoints; the training folder is never scored whole, another one is
    assert main("--evaluate p --data photos --output a.json") == 0
    assert "these samples chose the checkpoint" in capsys.readouterr().out
    found = json.loads(Path("a.json").read_text())
    assert (found["split"], found["samples"]) == ("val", 5) and "top5_accuracy" not in found
    shutil.copytree("photos", "moved")  # the training data at another path: only what was set aside
    assert main("--evaluate p --data moved --output b.json") == 0
    found = json.loads(Path("b.json").read_text())
    assert (found["split"], found["samples"]) == ("val", 5)
    shutil.copytree("photos", "other")
    Path("other/ant/0.png").unlink()
    assert main("--evaluate p --data other --output b.json") == 0
    found = json.loads(Path("b.json").read_text())
    assert (found["split"], found["samples"]) == ("all", 45)
    Path("photos/ant/0.png").rename("0.png")  # val is drawn anew and may hold training images
    assert main("--evaluate p") == 2 and "changed since training" in capsys.readouterr().err
    assert main("--evaluate p --data photos") == 2
    Path("0.png").rename("photos/ant/0.png")
    # the classes of other data are found by their names
    shutil.copytree("photos/bee", "fewer/bee")
    shutil.copytree("photos/ant", "fewer/zebra")
    assert main("--evaluate p --data fewer") == 2
    assert "['zebra']" in capsys.readouterr().err
    three, two = Path("three"), Path("two")
    for name in ("ant", "bee", "cow"):
        shutil.copytree("photos/bee", three / name)
    assert main(f"{small}3 --data three --batch_size 8") == 0
    for name in ("bee", "cow"):
        shutil.copytree(three / name, two / name)
    assert main("--evaluate p3 --data two --output c.json") == 0
    found = json.loads(Path("c.json").read_text())["per_class"]
    assert [(row["class"], row["samples"]) for row in found] == [("ant", 0), ("bee", 6), ("cow", 6)]
    assert main("--resume --run_name p") == 0  # a job queue starts a finished run again
    assert "finished already" in capsys.readouterr().out
    Path("photos/ant/x.heic").touch()
    capsys.readouterr()
    assert main("--predict p --input photos") == 0
    assert "photos: passed over 1 .heic; convert" in capsys.readouterr().out


def test_training_from_scratch_on_few_pictures_names_the_better_way():
    own_photos()
    flags = "--data photos --image_size 32 --epochs 1 --max_samples 16 --val_fraction 0 --run_name b"
    assert main(flags) == 0
    assert "--config finetune" in Path("runs/b/log.txt").read_text()


def test_balanced_weights_have_the_mean_one_over_the_training_images():
    counts = [30, 10, 5]
    args = train.parse_flags(["--class_weights", "balanced"])[0]
    meta = {"model": "custom", "class_counts": counts}
    loss = train.make_task(args, meta, torch.device("cpu"), torch.contiguous_format).loss
    weights = loss.keywords["weights"]
    assert torch.allclose(weights * torch.tensor(counts), torch.full((3,), 15.0))
    assert (weights * torch.tensor(counts)).sum() == sum(counts)


@pytest.mark.parametrize("words", """learning_rate:lr wd:weight_decay fp16:amp lr_scheduler:scheduler
    gradient_accumulation_steps:accumulation_steps max_epochs:epochs weights:pretrained opt:optimizer
    warmup:warmup_epochs imgsz:image_size patience:early_stopping""".split())
def test_the_names_of_other_kits_are_known(words, capsys):
    theirs, own = words.split(":")
    assert main(f"--{theirs} 1") == 2
    assert capsys.readouterr().err.rstrip().endswith(f"did you mean --{own}?")


def test_a_word_like_no_flag_gets_no_guess(capsys):
    assert main("--zebra 1") == 2
    assert "did you mean" not in capsys.readouterr().err


def test_every_alias_names_a_flag_and_is_none():
    flags = vars(train.parse_flags([])[0])
    assert set(train.ALIASES.values()) <= flags.keys() and not train.ALIASES.keys() & flags.keys()


def test_help_begins_with_the_flags_that_matter_and_ends_with_examples(capsys):
    assert main("--help") == 0
    text = capsys.readouterr().out
    assert len(text.split("\n\n")[0].splitlines()) == 1  # the usage
    assert text.index("--data") < text.index("--resume") < text.index("--image_size")
    assert "python train.py --evaluate" in text.split("examples:")[1]


def test_the_mean_of_weights_knows_a_compiled_model():
    net = torch.nn.Linear(2, 1)
    compiled = torch.compile(net, backend="eager")
    ema = train.start_ema(compiled)
    assert ema.keys() == net.state_dict().keys()
    with torch.no_grad():
        net.weight.add_(1)
    expected = train.start_ema(net)
    plain = {name: tensor.clone() for name, tensor in ema.items()}
    train.update_ema(ema, compiled.state_dict(), 0.5, 9)
    train.update_ema(plain, net.state_dict(), 0.5, 9)
    assert same(ema, plain) and not same(ema, expected)
