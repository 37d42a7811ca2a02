"""The house rules: who imports whom, nothing unsafe is read, the README says what is there."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
import utils

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"model": {"torch"}, "data": {"torch", "numpy", "tqdm"},
            "utils": {"torch", "numpy", "tqdm"},
            "train": {"torch", "numpy", "model", "data", "utils"}}
README = (ROOT / "README.md").read_text("utf-8")


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text("utf-8"))


# --------------------------------------------------------------------------------- who needs whom


@pytest.mark.parametrize("name", PACKAGES)
def test_a_file_needs_its_packages_and_the_standard_library_alone(name):
    imported = set()
    for node in tree(name).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names <= PACKAGES[name]
    assert name == "utils" or "ctypes" not in imported  # there for malloc's settings alone


ALONE = """
import importlib, shutil, sys
sys.modules.update(PIL=None, matplotlib=None, tensorboard=None, wandb=None, onnx=None)
for name in ("model", "data", "utils"):
    sys.path.insert(0, name)
    importlib.import_module(name)
    sys.path.remove(name)
    del sys.modules[name]
"""


def test_each_leaf_imports_alone_with_the_four_packages(tmp_path):
    for name in ("model", "data", "utils"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
    command = [sys.executable, "-I", "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


# ------------------------------------------------------------------------------ nothing is unsafe

WEIGHTS, ARRAYS = {"weights_only": True}, {"allow_pickle": False}
WANTED = {"torch.load": WEIGHTS, "torch.hub.load_state_dict_from_url": WEIGHTS, "np.load": ARRAYS}
MODULES = set("pickle _pickle marshal shelve dill joblib yaml code pty commands xmlrpc".split())
NAMES = {"eval", "exec", "compile", "__import__"}  # the builtins, not torch.compile or model.eval
ENDINGS = (".system", ".popen", ".mktemp", ".getoutput", ".getstatusoutput", ".read_pickle",
           ".fromregex")


def unsafe(code):
    """The expressions of `code` that read what may hold code, evaluate text, or run a shell."""
    found = []
    for node in ast.walk(code):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or alias.name for alias in node.names]
            if any(name.split(".")[0] in MODULES for name in names):
                found.append(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {k.arg: getattr(k.value, "value", "?") for k in node.keywords}
            bad = called in NAMES or called.endswith(ENDINGS)
            bad |= "os.spawn" in called or "os.exec" in called
            bad |= "shell" in given or bool(given.get("allow_pickle"))
            wanted = WANTED.get(called, {})
            if bad or any(given.get(name) is not value for name, value in wanted.items()):
                found.append(node)
    return [ast.unparse(node) for node in found]


@pytest.mark.parametrize("name", PACKAGES)
def test_nothing_that_holds_code_is_read_and_nothing_is_run_by_a_shell(name):
    assert not unsafe(tree(name))


@pytest.mark.parametrize("text", [
    "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=flag)",
    "torch.hub.load_state_dict_from_url(u)", "np.load(p)", "np.load(p, allow_pickle=True)",
    "import pickle", "import yaml.loader", "from marshal import loads", "eval(t)", "exec(t)",
    "compile(t, '', 'exec')", "subprocess.run(t, shell=True)", "subprocess.run(t, shell=flag)",
    "os.system(t)", "os.popen(t)", "os.execv(t, [])", "tempfile.mktemp()",
])
def test_each_of_these_would_be_found(text):
    assert unsafe(ast.parse(text))
    assert not unsafe(ast.parse(
        "torch.compile(m); m.eval(); torch.load(p, weights_only=True); run([t]); from . import a; "
        "np.load(p, allow_pickle=False)"))


OFFLINE = """
import socket, sys
def refuse(*arguments):
    raise AssertionError(f"the network is used: {arguments[1:]}")
for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
try:
    socket.socket().connect(("127.0.0.1", 9))
except AssertionError:
    print("guarded")
import numpy as np, torch
torch.set_num_threads(1)
from PIL import Image
import train
Image.new("RGB", (24, 24)).save("a.png")
tiny = ("--model custom --model_args widths=8,16,32,48 --image_size 24 --max_samples 60 "
        "--epochs 1 --run_name a")
for flags in (tiny, "--evaluate runs/a/best.pt --output a.json",
              "--predict runs/a/best.pt --input a.png --output a.csv",
              "--export runs/a/best.pt --output a.pt2", "--copy onecycle --output a.py"):
    assert train.main(flags.split()) == 0, flags
"""


def test_no_network_is_used_unless_a_flag_asks(tmp_path):
    pytest.importorskip("PIL")
    done = subprocess.run([sys.executable, "-c", OFFLINE], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "guarded" in done.stdout, done.stderr[-2000:]
    pictures = {f"a-{kind}.png" for kind in ("confusion", "reliability", "mistakes")}
    written = {path.name for path in tmp_path.iterdir()} - pictures
    # what is written stands in the run folder and where --output says
    assert written == {"a.png", "runs", "a.json", "a.csv", "a.pt2", "a.py"}


# --------------------------------------------------------------------------------------- the README


def commands():
    """The words after train.py of each command line in the README."""
    for line in re.findall(r"(?:python|torchrun [^\n`|]*) train\.py([^\n`|]*)", README):
        text = line.split("#")[0].split("&&")[0].replace("NAME", "x").replace("PRESET", "cpu")
        yield [word for word in text.split() if word[0] != "["]


def test_every_flag_in_the_readme_exists():
    known = {o for action in train.build_parser()[0]._actions for o in action.option_strings}
    known |= {"--index_url", "--upgrade"}  # pip's, the next ones torchrun's
    known |= {"--nproc_per_node", "--max_restarts", "--nnodes", "--node_rank", "--master_addr"}
    flags = {f.replace("-", "_") for f in re.findall(r"(?<![\w-])--([a-z][a-z_-]*[a-z])", README)}
    assert {f"--{flag}" for flag in flags} <= known


def test_every_program_in_the_readme_can_be_run():
    names = set(re.findall(r"python3? (\S+\.py)", README))
    assert "train.py" in names
    for name in names:
        assert '__name__ == "__main__"' in (ROOT / name).read_text("utf-8"), name


def test_every_command_in_the_readme_parses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "trackers_available", lambda *asked: None)
    found = list(commands())
    assert len(found) >= 6
    for words in found:
        if "--output" in words:
            Path(words[words.index("--output") + 1]).parent.mkdir(parents=True, exist_ok=True)
        train.check_flags(*train.parse_flags(words))


def test_every_key_and_value_in_the_readme_is_an_argument():
    """`--model_args whiten=True` in prose, beside no other word, is of some network or schedule."""
    functions = {"model_args": train.models.MODELS, "scheduler_args": train.SCHEDULES}
    for flag, text in re.findall(r"`--(model_args|scheduler_args)((?: \w+=\S+?)+)`", README):
        errors = []
        for function in functions[flag].values():
            try:
                utils.keyword_arguments(text.split(), function, flag)
            except ValueError as error:
                errors.append(str(error))
        assert len(errors) < len(functions[flag]), errors


def test_the_readmes_main_command_trains_and_its_result_evaluates(tmp_path, monkeypatch, capsys):
    """The main job as the README writes it, cut short by two flags."""
    main = re.search(r"pip install -r requirements.txt && python (train\.py [^\n]*)", README)[1]
    assert main == "train.py --model efficientnet_b0 --accumulation_steps 2 --clip_grad_norm 1.0"
    words = [str(ROOT / "train.py"), *main.split()[1:], "--max_samples", "48", "--epochs", "1"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.isascii() and "Traceback" not in done.stderr
    monkeypatch.chdir(tmp_path)
    assert train.main(re.search(r"python train\.py (--evaluate \S+)", done.stdout)[1].split()) == 0
    assert re.search(r"accuracy [\d.]+%", capsys.readouterr().out)


def python_blocks():
    """(text before, code) of each python block of the README."""
    for n, match in enumerate(re.finditer(r"```python\n(.*?)```", README, re.S), 1):
        yield pytest.param(README[: match.start()], match[1], id=f"block {n}")


@pytest.mark.parametrize("before, block", list(python_blocks()))
def test_a_recipe_of_the_readme_runs(before, block, tmp_path, monkeypatch):
    """Beside the files that the commands with --copy above it write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    if "photos.pt2" in block:  # what the commands above it leave
        image = pytest.importorskip("PIL.Image")
        tiny = "--model custom --model_args widths=8,8,8,8 --image_size 32 --max_samples 20 --epochs 1"
        assert train.main(f"{tiny} --run_name photos".split()) == 0
        assert train.main("--export photos --output photos.pt2".split()) == 0
        Path("new").mkdir()
        image.new("RGB", (60, 40), "red").save("new/001.jpg")
    for words in re.findall(r"python train\.py (--copy [^\n`|#]*)", before):
        file = Path(words.split()[-1])
        if re.search(rf"^(from|import) {file.stem}\b", block, re.M):
            assert train.main(words.split()) == 0
            sys.modules.pop(file.stem, None)
    exec(compile(block, "README.md", "exec"), {"__name__": "recipe"})
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_the_readmes_table_of_copying_names_what_can_be_copied():
    section = re.search(r"^##+ Cop[^\n]*\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    rows = [re.findall(r"[A-Za-z_]\w+", " ".join(re.findall("`([^`]*)`", cell))) for cell in cells]
    rows = [row for row in rows if row]
    assert {"train_step", "update_ema", "find_lr"} <= {name for row in rows for name in row}
    for row in rows:
        names = {getattr(node, "name", None)
                 for node in ast.parse(utils.copy_definitions(row, ROOT)).body}
        assert set(row) <= names, row


def test_every_file_that_a_readme_links_to_exists():
    for folder in (ROOT, ROOT / "tests"):
        text = (folder / "README.md").read_text("utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (folder / link).exists(), link


def test_the_readme_maps_every_file():
    for name in (*(f"{name}.py" for name in PACKAGES), "configs.json", "tests/", "weights/"):
        assert f"`{name}`" in README


def test_the_weights_that_come_with_the_kit_are_small_plain_and_name_no_place():
    presets = json.loads((ROOT / "configs.json").read_text())
    files = sorted((ROOT / "weights").iterdir())
    assert [path.stem for path in files] == ["sudoku_extreme", "sudoku_full", "sudoku_quick"]
    for path in files:
        assert path.stat().st_size < 2**20
        meta = utils.load_checkpoint(path)["meta"]
        assert meta["model"] == "sudoku_gnn" and meta["source"]["data"] is None
        assert path.stem in presets
