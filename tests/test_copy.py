"""Made to be copied: what --copy writes works in an empty folder, and holds nothing unneeded."""

import ast
import builtins
import dis
import functools
import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import train
import utils

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------- what a reader does with each piece
# Each function runs in an interpreter of its own, beside loop.py, which holds what it imports.


def accumulate():
    """Uneven or halved batches give the weights of the one big batch."""
    import torch
    from loop import Task, TrainState, train_step

    def trained(sizes, limit=100):
        def loss(outputs, targets):
            if len(outputs) > limit:
                raise torch.OutOfMemoryError("out of memory")
            return (outputs - targets).square().sum()

        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        net.double()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        state = TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        for _ in range(3):
            x = torch.randn(sum(sizes), 8, dtype=torch.float64)
            window = [(part, part.sum(1, keepdim=True), None) for part in x.split(sizes)]
            totals, norm, good = train_step(state, window, Task(loss), clip_grad_norm=1.0)
            assert good and norm > 0
        return state, (totals[0, 0] / totals[1, 0]).item()

    whole, loss = trained([14])
    for state, other in (trained([6, 7, 1]), trained([1, 1, 12]), trained([14], limit=4)):
        for a, b in zip(whole.parameters, state.parameters):
            assert (a - b).abs().max() < 1e-12
        assert abs(loss - other) < 1e-12
    assert state.micro_batch == 3 and whole.micro_batch is None


def survive():
    """A NaN harms nothing, in float32, bfloat16 and float16 with a scaler; good steps learn."""
    import copy
    import math

    import torch
    from loop import Task, TrainState, train_step

    def tensors(state):
        moments = [v for values in state.optimizer.state.values() for v in values.values()]
        return [*state.model.state_dict().values(), *moments, *state.ema.values()]

    def window(poison=0.0):
        x = torch.randn(24, 8)
        x[-1, 0] += poison
        return [(part, part.sum(1, keepdim=True), None) for part in x.split([10, 14])]

    task = Task(lambda outputs, targets: (outputs.float() - targets).square().sum())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        layers = torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU()
        net = torch.nn.Sequential(*layers, torch.nn.Linear(32, 1))
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        ema = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        state = TrainState(net, torch.optim.AdamW(net.parameters(), 0.01), scaler, ema)
        options = {"dtype": dtype, "clip_grad_norm": 1.0, "ema_decay": 0.9, "seed": 1}
        losses = []
        while len(losses) < 60:
            totals, _, good = train_step(state, window(), task, **options)
            assert good or (dtype == torch.float16 and state.step < 20)  # the scale halves itself
            losses += [totals[0, 0] / totals[1, 0]] * good
        assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
        before, steps, bad = copy.deepcopy(tensors(state)), state.step, state.bad_steps
        for poison in (math.nan, math.inf):
            assert not train_step(state, window(poison), task, **options)[2]
        assert all(map(torch.equal, before, tensors(state)))
        assert (state.step, state.bad_steps, state.bad_in_a_row) == (steps + 2, bad + 2, 2)
        assert train_step(state, window(), task, sam_rho=0.05, **options)[2]
        assert state.bad_in_a_row == 0


def average():
    """The closed form of an exponential moving average, and a copied counter."""
    import math

    import torch
    from loop import update_ema

    torch.manual_seed(0)
    weights = [{"w": torch.randn(5, dtype=torch.float64), "n": torch.tensor(i)} for i in range(21)]
    ema = {name: tensor.clone() for name, tensor in weights[0].items()}
    for n in range(20):
        update_ema(ema, weights[n + 1], decay=0.7, updates=n)
    d = [min(0.7, (1 + n) / (10 + n)) for n in range(20)]
    expected = weights[0]["w"] * math.prod(d)
    for n in range(20):
        expected += weights[n + 1]["w"] * (1 - d[n]) * math.prod(d[n + 1 :])
    assert (ema["w"] - expected).abs().max() < 1e-14 and ema["n"] == 20


def sweep():
    """The range test of a parabola has a closed form, and leaves no trace."""
    import copy
    import math

    import torch
    from loop import Task, TrainState, find_lr, train_step

    net = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.ones_(net.weight)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    state = TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    one = torch.ones(4, 1, dtype=torch.float64)
    before, random = copy.deepcopy(state.to_checkpoint()), torch.get_rng_state()
    task = Task(lambda outputs, targets: (outputs - targets).square().sum())
    tried, losses, best = find_lr(
        state, lambda: [(one, 0 * one, None)], lambda state, w: train_step(state, w, task))
    # the loss w^2 has the slope 2 w, so that each step multiplies w by 1 - 2 lr
    w, average = 1.0, 0.0
    for i, (rate, loss) in enumerate(zip(tried, losses, strict=True)):
        assert math.isclose(rate, 1e-6 * 1e7 ** (i / 99))
        average = 0.95 * average + 0.05 * w**2
        assert math.isclose(loss, average / (1 - 0.95 ** (i + 1)), rel_tol=1e-9)
        w *= 1 - 2 * rate
    assert 90 < len(tried) < 100 and best in tried
    assert 0.001 < best < 1  # beyond a rate of 1 the weight grows
    after = state.to_checkpoint()
    assert torch.equal(before["model"]["weight"], after["model"]["weight"])
    assert before["optimizer"] == after["optimizer"] and before["step"] == after["step"] == 0
    assert torch.equal(random, torch.get_rng_state())


def schedule():
    """The schedule is torch's."""
    import math

    import torch
    from loop import onecycle

    for total, share, anneal in ((100, 0.3, "cos"), (7, 0.5, "linear"), (3, 0.3, "cos")):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.4, total, pct_start=share, anneal_strategy=anneal)
        for step in range(total):
            group = optimizer.param_groups[0]
            lr, momentum = onecycle(step, total, 0.4, pct_start=share, anneal=anneal)
            assert math.isclose(lr, group["lr"], rel_tol=1e-9)
            assert math.isclose(momentum, group["momentum"], rel_tol=1e-9)
            optimizer.step()
            if step + 1 < total:
                scheduler.step()


def score():
    """Uneven batches weigh by their samples; other weights and views are used and left."""
    import math

    import torch
    from loop import Task, evaluate

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Dropout(0.5)).double()
    x, labels = torch.randn(23, 6, dtype=torch.float64), torch.randint(3, (23,))
    batches = list(zip(x.split(9), labels.split(9), [None] * 3))
    task = Task(
        loss=lambda y, t: torch.nn.functional.cross_entropy(y, t, reduction="sum"),
        measure=lambda y, t: ((y.argmax(1) == t).sum()[None], len(t)), metrics=("accuracy",))

    def by_hand(weight, inputs):
        logits = inputs @ weight.T + net[0].bias
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).double().mean().item()}

    zero = {**net.state_dict(), "0.weight": torch.zeros(3, 6, dtype=torch.float64)}
    views = lambda inputs: [(inputs, 0.75), (-inputs, 0.25)]  # of a linear net: half the inputs
    with torch.no_grad():
        for expected, options in (
            (by_hand(net[0].weight, x), {}),
            (by_hand(net[0].weight, x / 2), {"views": views}),
            (by_hand(net[0].weight, 3 * x), {"prepare": lambda images: 3 * images}),
            (by_hand(zero["0.weight"], x), {"weights": zero}),
        ):
            found = evaluate(net, batches, task, **options)
            assert found.keys() == expected.keys()
            assert all(math.isclose(found[name], expected[name]) for name in found)
    assert net.training


def transform():
    """Each sample has its own draws; without any, what is left is the normalisation."""
    import torch
    from loop import augment

    torch.manual_seed(0)
    images, index = torch.randint(0, 256, (12, 40, 40, 3), dtype=torch.uint8), torch.arange(12)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    call = lambda images, index, epoch=0, size=32, **options: augment(
        images, index, 0, epoch, size, mean, std, **options)
    for size in (32, 40):
        x = call(images, index, size=size, cutout=8)
        assert x.shape == (12, 3, size, size) and x.dtype == torch.float32
        assert torch.equal(call(images[5:7], index[5:7], size=size, cutout=8), x[5:7])
        assert not torch.equal(call(images, index, 1, size, cutout=8), x)
        assert (x == 0).flatten(2).all(1).sum(1).min() >= 16  # the square; at least its corner
    plain = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None])
    plain /= torch.tensor(std)[:, None, None]
    still = call(images, index, size=40, crop_padding=0, flip=False)
    assert torch.allclose(still, plain, atol=1e-5)
    for i in range(12):  # mirrored in one of two epochs
        pair = [call(images, index, epoch, 40, crop_padding=0)[i] for epoch in (0, 1)]
        close = [torch.allclose(x, plain[i], atol=1e-5) for x in pair]
        assert sorted(close) == [False, True]
        assert torch.equal(pair[0], pair[1].flip(2))


def optimize():
    """Each optimizer takes torch's own step."""
    import torch
    from loop import build_optimizer

    def stepped(make):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        optimizers, x = make(net), torch.randn(32, 8)
        for _ in range(3):
            net(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for p in net.parameters()]

    def groups(net):
        first, bias1, head, bias2 = net.parameters()
        return [{"params": [first, head], "weight_decay": 0.1},
                {"params": [bias1, bias2], "weight_decay": 0.0}]

    def muon(net):
        first, bias1, head, bias2 = net.parameters()
        rest = [{"params": [head], "weight_decay": 0.1},
                {"params": [bias1, bias2], "weight_decay": 0.0}]
        matrix = torch.optim.Muon([first], 0.01, 0.1, momentum=0.9, nesterov=True,
                                  adjust_lr_fn="match_rms_adamw")
        return matrix, torch.optim.AdamW(rest, 0.01, betas=(0.9, 0.999))

    references = {
        "sgd": lambda net: [torch.optim.SGD(groups(net), 0.01, momentum=0.9, nesterov=True)],
        "adamw": lambda net: [torch.optim.AdamW(groups(net), 0.01, betas=(0.9, 0.999))],
        "muon": muon,
    }
    for name, reference in references.items():
        found = stepped(lambda net: [
            build_optimizer(net, name, 0.01, 0.1, 0.9, torch.device("cpu"))])
        for a, b in zip(found, stepped(reference)):
            assert torch.allclose(a, b, atol=1e-3 if name == "muon" else 1e-6), name
    unmoved = stepped(lambda net: [])
    assert not any(torch.allclose(a, b, atol=5e-3) for a, b in zip(found, unmoved))


def puzzle():
    """Generated puzzles have the one solution that the solver finds."""
    import numpy as np
    from loop import generate, solve

    puzzles, solutions = generate(4, "medium", seed=1)
    found, number, _ = solve(puzzles)
    assert np.array_equal(found, solutions) and (number == 1).all()
    clues = puzzles > 0
    assert np.array_equal(puzzles[clues], solutions[clues]) and not clues.all(1).any()
    grids = solutions.reshape(4, 9, 9)
    boxes = grids.reshape(4, 3, 3, 3, 3).swapaxes(2, 3).reshape(4, 9, 9)
    for units in (grids, grids.swapaxes(1, 2), boxes):
        assert (np.sort(units, 2) == np.arange(1, 10)).all()
    puzzles[:, :20] = 0
    assert (solve(puzzles)[1] == 2).any()  # two solutions or more are told apart from one


def store():
    """A checkpoint comes back bitwise, or is refused; a NaN is never written."""
    from pathlib import Path

    import torch
    from loop import load_checkpoint, save_checkpoint

    def refused(call, *arguments):
        try:
            call(*arguments)
        except ValueError as error:
            return str(error)
        raise AssertionError(arguments)

    weights = {"w": torch.randn(50), "n": torch.tensor(3)}
    for step in (1, 2):
        save_checkpoint("last.pt", {"model": weights, "step": step})
    for name, step in (("last.pt", 2), ("previous.pt", 1)):
        found = load_checkpoint(name)
        assert found["step"] == step
        assert all(torch.equal(found["model"][key], weights[key]) for key in weights)
    content = bytearray(Path("last.pt").read_bytes())
    place = content.find(weights["w"].numpy().tobytes())
    content[place] ^= 1
    Path("last.pt").write_bytes(content)
    assert "last.pt" in refused(load_checkpoint, "last.pt")
    assert "nowhere.pt" in refused(load_checkpoint, "nowhere.pt")
    weights["w"][7] = torch.nan
    assert "not finite" in refused(save_checkpoint, "nan.pt", {"model": weights})
    assert not Path("nan.pt").exists()


PIECES = {  # names -> (what uses them, the packages that they may need)
    "train_step TrainState Task": ([accumulate, survive], {"torch"}),
    "update_ema": ([average], {"torch"}),
    "find_lr train_step TrainState Task": ([sweep], {"torch"}),
    "onecycle": ([schedule], set()),
    "evaluate Task": ([score], {"torch"}),
    "augment": ([transform], {"torch"}),
    "build_optimizer": ([optimize], {"torch"}),
    "generate solve": ([puzzle], {"numpy"}),
    "save_checkpoint load_checkpoint": ([store], {"torch"}),
}
LINES = {"train_step": 150, "update_ema": 20, "find_lr": 80, "onecycle": 15, "evaluate": 60,
         "augment": 100, "build_optimizer": 75}

# Runs the scripts named on its command line, each as if alone beside its loop.py.
RUNNER = """
import importlib.util, json, os, runpy, sys, traceback
assert not any(map(importlib.util.find_spec, ("train", "model", "data", "utils")))
found = {}
for script in sys.argv[1:]:
    folder = os.path.dirname(script)
    os.chdir(folder)
    sys.path.insert(0, folder)
    try:
        runpy.run_path(script)
        found[script] = ""
    except Exception:
        found[script] = traceback.format_exc()
    sys.path.remove(folder)
    sys.modules.pop("loop", None)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A function of names to the file that --copy writes for them, in a folder of its own."""
    files = {}

    def copy(names):
        if names not in files:
            path = tmp_path_factory.mktemp("copy") / "loop.py"
            assert train.main(["--copy", *names.split(), "--output", str(path)]) == 0
            files[names] = path
        return files[names]

    return copy


@pytest.fixture(scope="module")
def outcomes(copied):
    """{(names, function): its traceback, or "" where all went well}."""
    scripts = {}
    for names, (functions, _) in PIECES.items():
        for function in functions:
            script = copied(names).with_name(f"{function.__name__}.py")
            script.write_text(f"{inspect.getsource(function)}\n\n{function.__name__}()\n")
            scripts[names, function] = str(script)
    command = [sys.executable, "-I", "-c", "import torch; torch.set_num_threads(1)" + RUNNER]
    command += scripts.values()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {key: found[script] for key, script in scripts.items()}


@pytest.mark.parametrize("names, function", [(n, f) for n in PIECES for f in PIECES[n][0]])
def test_a_copied_piece_works_in_an_empty_folder(outcomes, names, function):
    assert not outcomes[names, function], outcomes[names, function]


# ---------------------------------------------------------------------------- what a file holds


def global_loads(code):
    """The names that compiled code, with all code within it, looks up outside of functions."""
    found = {step.argval for step in dis.get_instructions(code)
             if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(global_loads(c) for c in code.co_consts if inspect.iscode(c)))


def contents(text):
    """({imported name: package}, [(names that a definition sets, names that it uses)])."""
    imports, definitions = {}, []
    for node in ast.parse(text).body[1:]:  # after the docstring
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                assert name not in imports, f"{name} is imported twice"
                imports[name] = getattr(node, "module", alias.name).split(".")[0]
            continue
        targets = [x for target in getattr(node, "targets", ()) for x in ast.walk(target)]
        own = {x.id for x in targets if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        # TABLE[...] = ... belongs to TABLE
        own |= {x.value.id for x in targets if isinstance(x, ast.Subscript)}
        own |= {node.name} if hasattr(node, "name") else set()
        uses = global_loads(compile(ast.Module([node], []), "loop.py", "exec"))
        definitions.append((own, uses - {"__annotations__"}, hasattr(node, "name")))
    functions = [name for own, _, named in definitions if named for name in own]
    assert len(functions) == len(set(functions)), "two definitions of one name"
    return imports, [(own, uses) for own, uses, _ in definitions]


def check_whole(text, names):
    """Asserts that `text` holds all that the definitions `names` need, and nothing else."""
    imports, definitions = contents(text)
    defined = set().union(*(own for own, _ in definitions))
    used = set().union(*(uses for _, uses in definitions))
    assert names <= defined | imports.keys()
    assert used - defined - imports.keys() <= {*dir(builtins), "__file__"}, "something is missing"
    assert imports.keys() <= used | names, "an import is not needed"
    for i, (own, _) in enumerate(definitions):
        others = set().union(*(uses for j, (_, uses) in enumerate(definitions) if j != i))
        assert own & (others | names), f"{own} is not needed"
    reached = set(names)
    for _ in definitions:  # two that use only each other would be needed by nobody
        reached = reached.union(*(uses for own, uses in definitions if own & reached))
    assert not [own for own, _ in definitions if not own & reached], "not needed"


@pytest.mark.parametrize("names", [*PIECES, *LINES, "onecycle cosine solve image_metrics batches"])
def test_a_file_holds_all_it_needs_and_nothing_else(copied, names):
    check_whole(copied(names).read_text(), set(names.split()))


@pytest.mark.parametrize("file", ["train", "model", "data", "utils"])
def test_every_function_and_class_of_the_kit_can_be_copied(file, monkeypatch):
    monkeypatch.setattr(utils, "read_kit", functools.cache(utils.read_kit))
    for node in ast.parse((ROOT / f"{file}.py").read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            check_whole(utils.copy_definitions([node.name], ROOT), {node.name})


@pytest.mark.parametrize("names", PIECES)
def test_a_file_imports_only_the_packages_it_is_said_to(copied, names):
    imports, _ = contents(copied(names).read_text())
    assert set(imports.values()) - sys.stdlib_module_names == PIECES[names][1]


@pytest.mark.parametrize("name", LINES)
def test_a_piece_with_all_it_needs_is_short(copied, name):
    lines = 0
    for node in ast.parse(copied(name).read_text()).body[1:]:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            first = min(x.lineno for x in (node, *getattr(node, "decorator_list", ())))
            lines += node.end_lineno - first + 1
    assert lines <= LINES[name]


def test_the_readme_says_how_long_the_pieces_are():
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w ]+)` \|.*\| (\d+) \| [\w, ]+ \|$", text, re.M)
    assert len(rows) > 8
    for names, lines in rows:
        assert len(utils.copy_definitions(names.split(), ROOT).splitlines()) == int(lines), names


def test_several_names_share_their_helpers_once(copied):
    together, *alone = (contents(copied(names).read_text())[1] for names in (
        "find_lr train_step TrainState Task", "find_lr", "train_step", "TrainState", "Task"))
    names = sorted(name for own, _ in together for name in own)
    assert len(names) == len(set(names))
    assert set(names) == {name for part in alone for own, _ in part for name in own}
    assert sum(map(len, alone)) > len(together)


def test_the_command_line_writes_the_same_file(copied, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--copy", "update_ema", "--output", "a.py"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "a.py").read_bytes() == copied("update_ema").read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


def test_definitions_are_copied_as_they_are_and_in_an_order_that_runs(copied):
    text = copied("train_step TrainState Task").read_text()
    for function in (train.train_step, train.TrainState, train.restore):
        assert textwrap.dedent(inspect.getsource(function)) in text
    again = copied("Task train_step TrainState").read_text()
    assert again.partition("\n\n")[2] == text.partition("\n\n")[2]  # but for the heading
    assert "from the training kit" in " ".join(ast.get_docstring(ast.parse(text)).split())


@pytest.mark.parametrize("flags, words", [
    ("--copy train_stepp --output loop.py", "did you mean train_step?"),
    ("--copy onecycle Onecycle --output loop.py", "did you mean onecycle?"),
    ("--copy onecycle", "--copy: needs --output"),
    ("--copy onecycle --output loop.txt", "must be a .py file"),
    ("--copy onecycle --output loop.py --seed 3", "--seed: does not go with --copy"),
])
def test_what_cannot_be_copied_is_one_line_and_nothing_is_written(
        tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train.main(flags.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1
    assert not list(Path().iterdir())
