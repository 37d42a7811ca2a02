"""The house rules: who imports whom, nothing unsafe is read, the README's commands and flags exist."""

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
FILES = ("train.py", "model.py", "data.py", "utils.py")
README = (ROOT / "README.md").read_text("utf-8")


def tree(name):
    return ast.parse((ROOT / name).read_text("utf-8"))


def top_imports(name):
    for node in tree(name).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_leaves_need_torch_numpy_tqdm_and_the_standard_library_alone(name):
    siblings = {"model", "data", "utils"} if name == "train.py" else set()
    assert set(top_imports(name)) <= {"torch", "numpy", "tqdm", *siblings, *sys.stdlib_module_names}


@pytest.mark.parametrize("name", FILES[1:])
def test_each_leaf_imports_alone(name, tmp_path):
    (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    blocked = "import sys; sys.modules.update(PIL=None, matplotlib=None, tensorboard=None, wandb=None); "
    command = [sys.executable, "-c", blocked + f"import {name[:-3]}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)


WEIGHTS, ARRAYS = {"weights_only": True}, {"allow_pickle": False}
WANTED = {"torch.load": WEIGHTS, "torch.hub.load_state_dict_from_url": WEIGHTS, "np.load": ARRAYS}
MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "joblib", "yaml", "code", "pty", "commands", "xmlrpc"}
NAMES = {"eval", "exec", "compile", "__import__"}  # as builtins: torch.compile and model.eval() are others
ENDINGS = (".system", ".popen", ".mktemp", ".getoutput", ".getstatusoutput", ".read_pickle", ".fromregex")


def unsafe(code):
    """The expressions of `code` that read what may hold code, evaluate text, or run a shell."""
    found = []
    for node in ast.walk(code):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [node] * any(name.split(".")[0] in MODULES for name in names)
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {k.arg: getattr(k.value, "value", "?") for k in node.keywords}
            wanted = WANTED.get(called, {})
            bad = called in NAMES or called.endswith(ENDINGS) or "os.spawn" in called or "os.exec" in called
            bad |= bool(given.get("shell")) or "shell" in given or bool(given.get("allow_pickle"))
            found += [node] * (bad or any(given.get(name) is not value for name, value in wanted.items()))
    return [ast.unparse(node) for node in found]


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_holds_code_is_read_and_nothing_is_run_by_a_shell(name):
    assert not unsafe(tree(name))
    assert name == "utils.py" or "ctypes" not in top_imports(name)  # there for malloc's settings alone


@pytest.mark.parametrize(
    "text",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)", "np.load(p, allow_pickle=True)", "eval(t)",
     "torch.load(p, weights_only=flag)", "import pickle", "from marshal import loads", "os.system(t)", "exec(t)",
     "subprocess.run(t, shell=True)", "subprocess.run(t, shell=flag)", "tempfile.mktemp()", "import yaml.loader",
     "compile(t, '', 'exec')", "os.popen(t)", "torch.hub.load_state_dict_from_url(u)", "os.execv(t, [])"],
)  # fmt: skip
def test_each_of_these_would_be_found(text):
    assert unsafe(ast.parse(text))
    safe = "torch.compile(m); m.eval(); torch.load(p, weights_only=True); np.load(p, allow_pickle=False); run([t])"
    assert not unsafe(ast.parse(safe))


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
tiny = "--model custom --image_size 24 --max_samples 60 --batch_size 16 --epochs 1 --widths 8,16,32,48 --run_name a"
for flags in (tiny, "--evaluate runs/a/best.pt --output a.json", "--predict runs/a/best.pt --input a.png"):
    assert train.main(flags.split()) == 0, flags
"""


def test_no_network_is_used_unless_a_flag_asks(tmp_path):
    pytest.importorskip("PIL")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "guarded" in done.stdout, done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} <= {"a.png", "a.json", "runs"} | {
        f"a-{kind}.png" for kind in ("confusion", "reliability", "mistakes", "curves")
    }, "what is written stands in the run folder and beside --output"


def test_every_flag_in_the_readme_exists_and_every_command_parses():
    known = {option for action in train.build_parser()._actions for option in action.option_strings}
    flags = set(re.findall(r"(?<![\w-])--[a-z_]+", README)) - {"--index-url", "--upgrade"}
    flags -= {"--nproc_per_node", "--max_restarts", "--nnodes", "--node_rank", "--master_addr"}  # torchrun's own
    flags -= set(re.findall(r'add\("(--[a-z_]+)"', (ROOT / "data.py").read_text("utf-8")))  # python data.py
    assert flags <= known, flags - known
    commands = [c.split("#")[0].strip() for c in re.findall(r"python train\.py[^\n`|]*", README)]
    commands += [f"python{c.split('#')[0]}" for c in re.findall(r"torchrun [^\n`|]*?( train\.py[^\n`|]*)", README)]
    assert len(commands) >= 6
    for command in commands:
        words = [word for word in command.split()[2:] if word != "&&"]
        train.parse_flags([w.replace("NAME", "x").replace("PRESET", "cpu") for w in words])


def test_the_readmes_main_command_trains(tmp_path):
    """The main job as the README writes it, cut short by two flags."""
    main = re.search(r"pip install -r requirements.txt && python (train\.py [^\n]*)", README)[1]
    assert main == "train.py --model efficientnet_b0 --accumulation_steps 2 --clip_grad_norm 1.0"
    command = [sys.executable, str(ROOT / "train.py"), *main.split()[1:], "--max_samples", "64", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.isascii() and "Traceback" not in done.stderr
    evaluate = re.search(r"python train\.py (--evaluate \S+)", done.stdout)[1]
    command = [sys.executable, str(ROOT / "train.py"), *evaluate.split()]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and re.search(r"accuracy [\d.]+%", found.stdout), found.stderr[-2000:]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_a_recipe_of_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {"__name__": "recipe"})


def test_the_readme_maps_every_file():
    for name in (*FILES, "configs.json", "tests/"):
        assert f"`{name}`" in README


def test_the_weights_that_come_with_the_kit_are_small_plain_and_name_no_place():
    files = sorted((ROOT / "weights").iterdir())
    assert [path.stem for path in files] == ["sudoku_extreme", "sudoku_full", "sudoku_quick"]
    for path in files:
        assert path.stat().st_size < 2**20
        found = utils.load_checkpoint(path)
        assert found["meta"]["model"] == "sudoku_gnn" and found["meta"]["source"]["data"] is None
        assert path.stem in json.loads((ROOT / "configs.json").read_text())
