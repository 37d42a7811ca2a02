"""Sudoku: rules, solver, generator, files, splits, the network, its loss and metrics, its use."""

import argparse
import gzip
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model
import train
import utils

# 17 clues, from Royle's collection (public); singles alone solve the first three, not the fourth
ROYLE = [
    "000000010400000000020000000000050407008000300001090000300400200050100000000806000",
    "000000010400000000020000000000050604008000300001090000300400200050100000000807000",
    "000000012000035000000600070700000300000400800100000000000120000080000040050000600",
    "000000012003600000000007000410020000000500300700000600280000040000300500000000000",
]
# AI Escargot
HARD = "100007090030020008009600500005300900010080002600004000300000010040000007007000300"
AMBIGUOUS = "." * 40 + "5" + "." * 40
IMPOSSIBLE = "516849732307605000809700065135060907472591006968370050253186074684207500791050608"
WEIGHTS = sorted(Path(train.__file__).with_name("weights").glob("*.pt"))


def grid(text):
    return data.CELL[np.frombuffer(text.encode(), np.uint8)]


def units():
    for i in range(9):
        yield [9 * i + j for j in range(9)]
        yield [9 * j + i for j in range(9)]
        yield [27 * (i // 3) + 3 * (i % 3) + 9 * (j // 3) + j % 3 for j in range(9)]


UNITS = list(units())
PEERS = [{c for unit in UNITS if i in unit for c in unit} - {i} for i in range(81)]
SOLVED = "".join(map(str, data.solve(grid(ROYLE[0])[None])[0][0]))


def candidates(board, cell):
    return set() if board[cell] else set(range(1, 10)) - {board[c] for c in PEERS[cell]}


def brute_force(puzzle, limit=2):
    """Up to `limit` solutions, cell by cell; shares nothing with the kit."""
    board, found = list(map(int, puzzle)), []

    def visit():
        if len(found) == limit:
            return
        best = None
        for i in range(81):
            if board[i] == 0:
                options = candidates(board, i)
                if best is None or len(options) < len(best[1]):
                    best = i, options
                    if len(options) < 2:
                        break
        if best is None:
            found.append(list(board))
            return
        for digit in sorted(best[1]):
            board[best[0]] = digit
            visit()
        board[best[0]] = 0

    visit()
    return found


def singles_solve(puzzle):
    """Whether naked and hidden singles alone fill the board, one cell at a time."""
    board = list(map(int, puzzle))
    while 0 in board:
        options = [candidates(board, i) for i in range(81)]
        for i, unit in itertools.product(range(81), UNITS):
            if i in unit and board[i] == 0:
                hidden = options[i] - set().union(*(options[c] for c in unit if c != i))
                if len(options[i]) == 1 or hidden:
                    board[i] = min(hidden or options[i])
                    break
        else:
            return False
    return all(sorted(board[c] for c in unit) == list(range(1, 10)) for unit in UNITS)


@pytest.fixture(scope="module")
def made():
    """{level: (puzzles, solutions)}."""
    return {level: data.generate(60, level, seed=3) for level in data.LEVELS}


def some(made, count):
    """(puzzles, solutions, labels as in a split) of the first `count` of each level."""
    puzzles, solutions = (np.concatenate([made[n][i][:count] for n in data.LEVELS]) for i in (0, 1))
    answers = np.where(puzzles > 0, 0, solutions)
    levels = np.repeat([0, 1, 2], count)[:, None]
    return puzzles, solutions, np.concatenate([answers, levels], 1).astype(np.uint8)


def write_csv(path, puzzles, solutions):
    Path(path).write_text(data.sudoku_text(".csv", puzzles, solutions))


# --------------------------------------------------------------------------- solver and generator


def test_units_are_the_rules():
    assert sorted(data.UNITS.reshape(27, 9).tolist()) == sorted(map(sorted, UNITS))


@pytest.mark.parametrize("level", data.LEVELS)
def test_generated_puzzles_have_one_solution_and_are_as_difficult_as_named(made, level):
    puzzles, solutions = made[level]
    assert len({row.tobytes() for row in puzzles}) == len(puzzles) == 60
    for puzzle, solution in zip(puzzles[:12], solutions[:12]):
        assert brute_force(puzzle) == [solution.tolist()]
        assert singles_solve(puzzle) == (level != "hard")
    clues = (puzzles > 0).sum(1)
    assert clues.min() >= 36 if level == "easy" else clues.max() < 36
    assert clues.min() < clues.max()
    assert (data.grade(puzzles) == data.LEVELS.index(level)).all()


def test_the_solver_agrees_with_brute_force_led_or_not(made):
    puzzles = np.concatenate([made["hard"][0][:20], [grid(text) for text in [*ROYLE, HARD]]])
    expected = [brute_force(puzzle) for puzzle in puzzles[20:]]
    lead = np.random.default_rng(0).random((len(puzzles), 81, 9))
    for preference in (None, lead):
        solutions, number, guesses = found = data.solve(puzzles, preference)
        assert (number == 1).all() and guesses.max() > 1
        assert np.array_equal(solutions[:20], made["hard"][1][:20])
        assert [[solution.tolist()] for solution in solutions[20:]] == expected
        parts = data.search(data.BITS[puzzles], preference, chunk=7)
        assert all(np.array_equal(a, b) for a, b in zip(found, parts))


def test_a_leader_that_knows_the_solution_never_guesses_wrong():
    puzzle = grid(HARD)[None]
    solution, _, plain = data.solve(puzzle)
    known = np.eye(9)[solution - 1]
    _, number, led = data.solve(puzzle, known)
    assert number == 1 and led < plain and led <= 12
    _, number, against = data.solve(puzzle, 1 - known)  # misled, it is still complete
    assert number == 1 and against > led


def test_ambiguous_and_impossible_boards_are_told_apart():
    puzzles = np.stack([grid(AMBIGUOUS), grid(IMPOSSIBLE), grid(ROYLE[0])])
    solutions, number, _ = data.solve(puzzles)
    assert number.tolist() == [2, 0, 1]
    assert not solutions[1].any() and data.consistent(solutions).all()


def test_the_search_ends_where_its_guesses_run_out():
    _, number, guesses = data.solve(grid(HARD)[None], max_guesses=2)
    assert number == -1 and guesses == 2


def test_generation_is_a_function_of_the_seed_and_the_first_stay_the_same(made):
    for again, expected in zip(data.generate(5, "medium", seed=3), made["medium"]):
        assert np.array_equal(again, expected[:5])
    other = data.generate(60, "easy", seed=4)[0]
    assert not {row.tobytes() for row in other} & {row.tobytes() for row in made["easy"][0]}


def test_generated_puzzles_are_kept_and_a_damaged_cache_is_made_anew(tmp_path, monkeypatch, made):
    calls = []

    def generate(count, level, seed):
        calls.append(level)
        return [grids[20 * seed : 20 * seed + count] for grids in made[level]]

    monkeypatch.setattr(data, "generate", generate)
    monkeypatch.setattr(data, "GENERATED", {"train": (6, 5, 4), "val": (3, 2, 1)})
    first = data.load_sudoku(cache_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert {name: len(split) for name, split in first.splits.items()} == {"train": 15, "val": 6}
    for content in (kept.read_bytes(), b"", kept.read_bytes()[:-40], b"PK"):
        again = data.load_sudoku(cache_dir=tmp_path)
        for name, split in first.splits.items():
            assert np.array_equal(split.images, again.splits[name].images)
            assert np.array_equal(split.labels, again.splits[name].labels)
        kept.write_bytes(content)
    assert list(tmp_path.iterdir()) == [kept] and len(calls) == 3 * 6


# ------------------------------------------------------------------------------------------ files


def files(puzzles, solutions):
    """{name: bytes} of every format, for the same puzzles."""
    p, s = (["".join(map(str, row)) for row in grids] for grids in (puzzles, solutions))
    dots, stars = ([text.replace("0", blank) for text in p] for blank in ".*")
    n = [str(i) for i in range(len(p))]

    def rows(*columns, header=None):
        lines = [header] * bool(header) + [*map(",".join, zip(*columns))]
        return "\n".join(lines) + "\n"

    quoted = rows(*([f'"{text}"' for text in grids] for grids in (p, s)))
    plain = rows(p, s, header="puzzle,solution")
    texts = {
        "kaggle1m": "\ufeff" + rows(p, s, header="quizzes,solutions").replace("\n", "\r\n"),
        "kaggle9m": plain,
        "kaggle3m": rows(n, dots, s, n, header="id,puzzle,solution,clues"),
        "rrn": rows(p, s).rstrip("\n"),
        "extreme": rows(n, dots, s, n, header="source,question,answer,rating"),
        "lines": "# one, two\n\n" + "  \n".join(stars) + "\n\n",
        "commented": "# by, me\n" + rows(p, s) + "#, the end\n",
        "quoted": '"puzzle","solution"\n' + quoted,
        "column": "Puzzle\n" + "\n".join(p),
    }
    content = {name: text.encode() for name, text in texts.items()}
    return {**content, "packed": gzip.compress(plain.encode())}


def test_every_format_that_users_have_is_recognised_by_its_content(tmp_path, made):
    puzzles, solutions, _ = some(made, 10)
    for name, content in files(puzzles, solutions).items():
        (tmp_path / name).write_bytes(content)
        for block in (2**13, 7):
            read = data.read_sudoku(tmp_path / name, block=block)
            assert np.array_equal(read[0], puzzles), name
            if name in ("lines", "column"):
                assert read[1] is None
            else:
                assert np.array_equal(read[1], solutions), name


BOARD = [ROYLE[0][i : i + 9].replace("0", ".") for i in range(0, 81, 9)]
BARS = ["|".join((row[:3], row[3:6], row[6:])) for row in BOARD]
RULE, EDGE = "-" * 11, "*-----------*"
BOARDS = {
    "sadman": "\n".join(["#A Author", "#D Title, with a comma", "[Puzzle]", *BOARD,
                         "[State]", *["1" * 9] * 9]),
    "sudocue": "#AMe\n#D1\n" + "\n".join(BOARD) + "\n",
    "bare": "\r\n".join(BOARD),
    "simple": "\n".join([EDGE, *(f"|{row}|" for row in BARS), EDGE]),
    "ss": "\n".join([*BARS[:3], RULE, *BARS[3:6], RULE, *BARS[6:]]),
}


@pytest.mark.parametrize("name", BOARDS)
def test_boards_in_nine_rows_are_read(tmp_path, name):
    (tmp_path / "board").write_text(BOARDS[name], newline="")
    puzzles, solutions = data.read_sudoku(tmp_path / "board")
    assert np.array_equal(puzzles, grid(ROYLE[0])[None]) and solutions is None


@pytest.mark.parametrize("suffix", [".csv", ".sdm", ".sdk"])
def test_what_is_written_reads_back(tmp_path, made, suffix):
    puzzles, solutions = (grids[: 1 if suffix == ".sdk" else 9] for grids in made["medium"])
    path = tmp_path / f"a{suffix}"
    path.write_text(data.sudoku_text(suffix, puzzles))
    assert np.array_equal(data.read_sudoku(path, with_solutions=False)[0], puzzles)
    path.write_text(data.sudoku_text(suffix, puzzles, solutions))
    read = data.read_sudoku(path)
    assert np.array_equal(read[0], puzzles if suffix == ".csv" else solutions)
    assert suffix != ".csv" or np.array_equal(read[1], solutions)


P, Q = ROYLE[:2]
HEAD = "puzzle,solution\n"
FAULTS = {
    HEAD: "has a header and no puzzle",
    "": "is empty",
    "name,colour\na,b\n": "line 1: neither 81 cells nor a header with a puzzle column",
    f"{HEAD}{P},{SOLVED}\n{P[:80]},{SOLVED}\n": "line 3: has 80 cells",
    f"{P}\n{Q}\n{P}5\n": "line 3: has 82 cells",
    f"{P},{SOLVED}\n{P}\n": "line 2: has 1 columns, the first line 2",
    f"{P}\na{P[1:]}\n": "line 2: cell 1 of the puzzle is none of",
    f"{HEAD}{P},{SOLVED[:-1]}a\n": "line 2: cell 81 of the solution is none of",
    f"{HEAD}{P},{SOLVED[:-1]}0\n": "line 2: cell 81 of the solution is blank",
    f"{HEAD}{Q},{SOLVED}\n": "contradicts the clue",
    "55" + P[2:]: "line 1: a row, column or box of the puzzle repeats a digit",
    f"{HEAD}{'0' * 81},{SOLVED[1] + SOLVED[1:]}\n": "of the solution repeats a digit",
    "\n".join(BOARD[:8]): "has 8 rows of cells",
    "\n".join([*BOARD[:3], "12345678x9", *BOARD[4:]]): "line 4: a row is nine cells",
}


@pytest.mark.parametrize("content", FAULTS, ids=[text[:30] for text in FAULTS.values()])
def test_a_bad_puzzle_file_is_one_line_that_names_the_line(tmp_path, content):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        data.read_sudoku(path)
    assert FAULTS[content] in str(error.value) and "\n" not in str(error.value)


def test_a_second_column_without_a_header_that_is_no_solution_is_passed_over(tmp_path):
    (tmp_path / "a").write_text(f"{P},{SOLVED[:-1]}0\n")
    puzzles, solutions = data.read_sudoku(tmp_path / "a")
    assert np.array_equal(puzzles[0], grid(P)) and solutions is None


def test_an_endless_line_is_refused_where_it_stands(tmp_path):
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        file.write("\n".join(ROYLE).encode() + b"\n" + bytes(2**23))
    with pytest.raises(ValueError, match="line 5: too long for a puzzle"):
        data.read_sudoku(tmp_path / "a.gz")


def test_damaged_gzip_is_named(tmp_path):
    packed = gzip.compress("\n".join(ROYLE * 500).encode())
    for content in (packed[:-20], packed[:60] + b"\0\0\0" + packed[63:]):
        (tmp_path / "a.gz").write_bytes(content)
        with pytest.raises(ValueError, match="damaged gzip"):
            data.read_sudoku(tmp_path / "a.gz")


# ------------------------------------------------------------------------- symmetries and splits

LINES, BANDS = np.arange(81).reshape(9, 9), np.arange(9)
GENERATORS = {  # (the cell that comes to each cell, the digit that takes each digit's place)
    "two rows": (LINES[[1, 0, *BANDS[2:]]].ravel(), BANDS),
    "three rows": (LINES[[1, 2, 0, *BANDS[3:]]].ravel(), BANDS),
    "two bands": (LINES[np.roll(BANDS[:6], 3).tolist() + [6, 7, 8]].ravel(), BANDS),
    "three bands": (LINES[np.roll(BANDS, 3)].ravel(), BANDS),
    "transpose": (LINES.T.ravel(), BANDS),
    "two digits": (LINES.ravel(), np.array([1, 0, *BANDS[2:]])),
    "nine digits": (LINES.ravel(), np.roll(BANDS, 1)),
}


def random_symmetry(seed):
    rng = np.random.default_rng(seed)
    rows, columns = (
        np.concatenate([3 * band + rng.permutation(3) for band in rng.permutation(3)])
        for _ in range(2)
    )
    board = LINES[rows][:, columns]
    return (board.T if seed % 2 else board).ravel(), rng.permutation(9)


def moved(grids, symmetry):
    """Grids [N, 81] after a symmetry."""
    cells, digits = symmetry
    return np.concatenate([[0], digits + 1]).astype(np.uint8)[grids[:, cells]]


def test_the_symmetry_class_is_an_invariant_that_tells_grids_apart(made):
    solutions = np.concatenate([made[level][1] for level in data.LEVELS])
    classes = data.symmetry_class(solutions)
    for symmetry in [*GENERATORS.values(), *map(random_symmetry, range(3))]:
        twins = moved(solutions, symmetry)
        assert data.consistent(twins).all() and (twins != solutions).any(1).all()
        assert np.array_equal(data.symmetry_class(twins), classes)
    assert len(np.unique(classes)) >= 0.97 * len(classes)
    assert np.array_equal(data.in_chunks(data.symmetry_class, solutions, 7), classes)


def test_validation_never_shares_a_solution_up_to_symmetry(tmp_path, made):
    grids = np.stack(made["easy"], 1)  # [60, (puzzle, solution), 81]
    twins = np.stack([moved(pair, random_symmetry(i)) for i, pair in enumerate(grids)])
    write_csv(tmp_path / "a.csv", *np.concatenate([grids, twins]).transpose(1, 0, 2))
    found = data.load_sudoku(tmp_path / "a.csv", val_fraction=0.2)
    train_split, val = found.splits["train"], found.splits["val"]
    whole = lambda split: np.where(split.images > 0, split.images, split.labels[:, :81])
    classes = [set(data.symmetry_class(whole(split))) for split in (train_split, val)]
    assert not classes[0] & classes[1]
    assert len(train_split) + len(val) == 120 and 20 <= len(val) <= 30
    assert np.array_equal(val.labels[:, 81], data.grade(val.images))
    assert ((val.labels[:, :81] == 0) == (val.images > 0)).all()
    fewer = data.load_sudoku(tmp_path / "a.csv", val_fraction=0.2, max_samples=30)
    assert sum(map(len, fewer.splits.values())) == 30


def test_a_folder_of_splits_is_kept_apart_and_duplicates_are_reported(tmp_path, made):
    puzzles, solutions = made["medium"]
    first = [np.concatenate([grids[:40], grids[:5]]) for grids in (puzzles, solutions)]
    write_csv(tmp_path / "train.csv", *first)
    write_csv(tmp_path / "valid.csv", puzzles[40:], solutions[40:])
    found = data.load_sudoku(tmp_path)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 40, "val": 20}
    assert "5 duplicates dropped from train" in found.description
    write_csv(tmp_path / "valid.csv", puzzles[39:], solutions[39:])
    with pytest.raises(ValueError, match="puzzle 1 of val .* in train too"):
        data.load_sudoku(tmp_path)
    other = moved(solutions[:1], random_symmetry(0))  # the first solution of train, moved
    other = np.where(np.arange(81) < 80, other, 0).astype(np.uint8), other
    for grids, start, message in ((other, 40, "1 of val dropped"), (other, 60, None)):
        pairs = [np.concatenate(p) for p in zip(grids, (puzzles[start:], solutions[start:]))]
        write_csv(tmp_path / "valid.csv", *pairs)
        if message:
            assert message in data.load_sudoku(tmp_path).description
        else:
            with pytest.raises(ValueError, match="every solution of val is one of train's"):
                data.load_sudoku(tmp_path)


# -------------------------------------------------------------------------- network, loss, metrics


def network(**arguments):
    torch.manual_seed(0)
    arguments = {"width": 16, "hidden": 24, "message_steps": 6, **arguments}
    net = model.build_model("sudoku_gnn", 9, **arguments)
    torch.nn.init.normal_(net.head)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    return net


def test_the_network_is_equivariant_so_augmentation_changes_nothing(made):
    """Outputs move with the board, and a training step has the same loss and gradient.

    The symmetries named generate all others.
    """
    net = network(free_steps=0, grad_steps=4).double()
    puzzles, solutions, labels = some(made, 3)

    def run(boards, answers):
        net.zero_grad()
        logits = net(torch.from_numpy(boards))
        loss = model.sudoku_loss(logits, torch.from_numpy(answers))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        return logits[-1].detach().softmax(-1), loss.item(), gradient

    p, loss, gradient = run(puzzles, labels)
    assert p.std() > 0.05 and gradient.abs().max() > 1
    for symmetry in [*GENERATORS.values(), *map(random_symmetry, range(4))]:
        answers = np.concatenate([moved(labels[:, :81], symmetry), labels[:, 81:]], 1)
        found, moved_loss, moved_gradient = run(moved(puzzles, symmetry), answers)
        cells, digits = symmetry
        # the logits leave in float32
        assert (found[:, :, digits] - p[:, cells]).abs().max() < 1e-5
        assert moved_loss == pytest.approx(loss, rel=1e-5)
        assert (moved_gradient - gradient).norm() < 1e-4 * gradient.norm()


def test_steps_in_training_end_where_evaluation_ends_and_clues_keep_their_digit(made):
    puzzles = torch.from_numpy(made["medium"][0][:4])
    net = network(free_steps=0, grad_steps=6, message_steps=6)
    logits = net(puzzles)
    assert logits.shape == (6, 4, 81, 9) and logits.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(net.eval()(puzzles)[0], logits[-1])
        net.message_steps = 3
        assert torch.equal(net(puzzles)[0], logits[2])
    clue = puzzles > 0
    assert torch.equal(logits[-1].argmax(-1)[clue] + 1, puzzles[clue].long())
    assert logits[-1].softmax(-1)[clue].amax(-1).min() == 1


def normalisations(root):
    """The number of LayerNorms that a gradient passes."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        seen.add(node)
        nodes += [inner for inner, _ in node.next_functions if inner and inner not in seen]
    return sum("LayerNorm" in type(node).__name__ for node in seen)


def test_free_steps_are_drawn_from_the_seed_and_carry_no_gradient():
    net, puzzles = network(free_steps=5, grad_steps=1), torch.from_numpy(grid(HARD)[None])
    torch.manual_seed(1)
    totals = [net(puzzles).sum() for _ in range(60)]
    torch.manual_seed(1)
    assert [net(puzzles).sum() for _ in range(5)] == totals[:5]
    # the start's normalisation counts where no step lies between it and the last
    assert {normalisations(total.grad_fn) for total in totals} == {1, 2}
    with torch.no_grad():
        net.eval()
        every = set()
        for net.message_steps in range(1, 7):
            every.add(net(puzzles).sum().item())
    assert {total.item() for total in totals} == every and len(every) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deep_runs_stay_finite_in_every_precision(made, dtype):
    net = network(message_steps=300, width=8, hidden=8).eval()
    net.pool.data *= 20  # features whose exponential no 16 bits hold
    with torch.no_grad(), train.autocast(torch.device("cpu"), dtype):
        assert net(torch.from_numpy(made["hard"][0][:1])).isfinite().all()


def test_the_first_loss_is_log_9_for_each_blank():
    net = model.build_model("sudoku_gnn", 9)
    puzzles, answers = (torch.from_numpy(grid(text)[None]) for text in (ROYLE[0], SOLVED))
    answers = torch.where(puzzles > 0, 0, answers)
    loss = model.sudoku_loss(net(puzzles), answers) / (81 - 17)
    assert loss.item() == pytest.approx(math.log(9), abs=1e-6)
    assert sum(p.numel() for p in net.parameters()) == 14_912  # as the README says


def test_the_loss_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 81, 9, dtype=torch.float64)
    answers = torch.zeros(3, 82, dtype=torch.uint8)
    answers[0, 5], answers[2, 80], answers[2, 3] = 4, 9, 1
    answers[:, 81] = 2  # the level, which is no cell
    for gamma in (0.0, 2.0):
        expected = 0.0
        blanks = [(0, 5, 4), (2, 80, 9), (2, 3, 1)]
        for s, (b, cell, digit) in itertools.product(range(2), blanks):
            e = [math.exp(v) for v in logits[s, b, cell].tolist()]
            p = e[digit - 1] / sum(e)
            expected -= (1 - p) ** gamma * math.log(p) / 2
        found = model.sudoku_loss(logits, answers, gamma).item()
        assert found == pytest.approx(expected, rel=1e-6)


def test_focal_weighting_below_one_has_finite_gradients():
    logits = torch.zeros(1, 1, 81, 9)
    logits[..., 0] = 200  # certain, and right
    logits.requires_grad_()
    answers = torch.ones(1, 81, dtype=torch.uint8)
    model.sudoku_loss(logits, answers, focal_gamma=0.5).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_validation_counts_exactly_in_16_bits(made, dtype):
    """Autocast would round a matrix product of counts: 16 bits hold integers to 256 or 2,048."""
    args = argparse.Namespace(focal_gamma=0.0)
    task = train.make_task(args, {"model": "sudoku_gnn"}, torch.device("cpu"), None)
    net = network(message_steps=2, width=8, hidden=8)
    puzzles, _, labels = some(made, 60)
    batch = torch.from_numpy(puzzles), torch.from_numpy(labels), None
    found = train.evaluate(net, [batch], task, dtype=dtype)
    with torch.no_grad(), train.autocast(torch.device("cpu"), dtype):
        logits = net.eval()(batch[0])
    blank = batch[0] == 0
    right = ((logits[-1].argmax(-1) + 1 == batch[1][:, :81]) & blank).sum().item()
    assert blank.sum() > 2**12 and right > 0
    assert found["cell_accuracy"] == pytest.approx(right / blank.sum().item(), abs=1e-9)
    loss = model.sudoku_loss(logits, batch[1]).item() / blank.sum().item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)


def test_metrics_against_a_plain_loop(made):
    rng = np.random.default_rng(0)
    puzzles, solutions, labels = some(made, 7)
    logits = rng.normal(size=(2, 21, 81, 9))
    some_solved = rng.random((21, 1, 1)) < 0.6
    logits[1] += 12 * np.eye(9)[solutions - 1] * some_solved
    logits[:, puzzles > 0] = np.where(np.eye(9)[puzzles[puzzles > 0] - 1], 0.0, -1e4)
    found = utils.sudoku_metrics(torch.from_numpy(logits), torch.from_numpy(labels))
    found = dict(zip(utils.SUDOKU_METRICS, zip(*found), strict=True))
    groups = {"": (0, 21), "_easy": (0, 7), "_medium": (7, 14), "_hard": (14, 21)}
    for level, (start, end) in groups.items():
        sums, blanks = dict.fromkeys(utils.SUDOKU_SCORES, 0.0), 0
        for b in range(start, end):
            board = logits[1, b].argmax(1) + 1
            sums["solve_rate"] += float((board == solutions[b]).all())
            sums["violations"] += sum(9 - len({board[c] for c in unit}) for unit in UNITS)
            for cell in np.flatnonzero(puzzles[b] == 0):
                e = np.exp(logits[1, b, cell])
                p = e / e.sum()
                blanks += 1
                sums["cell_accuracy"] += board[cell] == solutions[b, cell]
                sums["confidence"] += p.max()
                sums["entropy"] -= (p * np.log(p)).sum()
        assert 0 < sums["solve_rate"] < end - start and sums["violations"] > 0
        for score, value in sums.items():
            total, count = (float(x) for x in found[score + level])
            assert total == pytest.approx(value, rel=1e-4)
            of_boards = score in ("solve_rate", "violations")
            assert count == (end - start if of_boards else blanks)


# -------------------------------------------------------------------------------- finished boards


def finish(puzzles, p, guesses):
    answers, texts, counts = data.finish_boards(puzzles, p, guesses)
    return answers, [text.split("\n") for text in texts], [int(count) for count in counts]


def test_boards_are_finished_as_the_rules_and_the_search_say():
    """A network that knows a solution of the first board and of the one with several."""
    texts = [ROYLE[0], HARD, AMBIGUOUS, IMPOSSIBLE]
    puzzles = np.stack([grid(text) for text in texts])
    p = np.random.default_rng(0).random((4, 81, 9)) / 2
    known = np.stack([grid(SOLVED), data.solve(puzzles[2:3])[0][0]])
    p[[0, 2]] += np.eye(9)[known - 1]
    hard = brute_force(puzzles[1])[0]

    answers, lines, counts = finish(puzzles, p, 0)
    assert [line[0] for line in lines] == ["solved", "not solved"] * 2  # the rules decide alone
    assert counts == [2, 2, 0] and np.array_equal(answers[[0, 2]], known)
    assert not answers[[1, 3]].any()
    assert lines[0][1:] == data.board_lines(grid(SOLVED), puzzles[0])
    assert lines[1][1:] == data.board_lines(p[1].argmax(1) + 1, puzzles[1])

    answers, lines, counts = finish(puzzles, p, 10**5)
    heads = ["solved by the network alone,", "solved by search,", "ambiguous", "impossible"]
    assert all(line[0].startswith(head) for line, head in zip(lines, heads, strict=True))
    assert answers.tolist() == [list(grid(SOLVED)), hard, [0] * 81, [0] * 81]
    assert counts == [2, 1, data.solve(puzzles, p)[2].sum()]
    assert lines[3][1:] == data.board_lines(puzzles[3], puzzles[3])  # nothing is made up

    answers, lines, counts = finish(puzzles[1:2], p[1:2], 1)
    assert lines[0][0].startswith("undecided") and counts == [0, 0, 1] and not answers.any()


# ------------------------------------------------------------------------------------------- runs

SMALL = ("--model sudoku_gnn --batch_size 8 --lr 0.05 --data d "
         "--model_args width=8 hidden=8 free_steps=2 grad_steps=2 message_steps=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    """A folder with puzzles, apart in d by splits, and one finished run, runs/whole."""
    folder, threads = tmp_path_factory.mktemp("sudoku"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_csv(folder / "p.csv", *some(made, 20)[:2])
    (folder / "d").mkdir()
    write_csv(folder / "d" / "train.csv", *some(made, 20)[:2])
    write_csv(folder / "d" / "val.csv", *some({n: [g[20:] for g in made[n]] for n in made}, 4)[:2])
    (folder / "two.sdm").write_text("\n".join(ROYLE[:2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(f"{SMALL} --epochs 2 --amp False --run_name whole".split()) == 0
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def resumed_equals(name, flags, steps, monkeypatch):
    """A run stopped before each of `steps` and resumed ends as the run `name`, bit by bit."""
    whole, step = utils.load_checkpoint(f"runs/{name}/last.pt"), train.train_step
    for stop_at in steps:

        class Stop(Exception):
            pass

        def stopping(state, *rest, **named):
            if state.step == stop_at:
                raise Stop
            return step(state, *rest, **named)

        part = f"{name}{stop_at}"
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(train, "train_step", stopping)
            train.main([*flags.split(), "--save_every", "1", "--run_name", part])
        assert utils.load_checkpoint(f"runs/{part}/last.pt")["step"] == stop_at
        assert train.main(["--resume", part]) == 0
        resumed = utils.load_checkpoint(f"runs/{part}/last.pt")
        assert resumed["step"] == whole["step"] > stop_at
        pairs = zip(utils.tensors(whole), utils.tensors(resumed), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_sudoku_run_resumes_bitwise_at_any_step(here, monkeypatch):
    resumed_equals("whole", f"{SMALL} --epochs 2 --amp False", (1, 9), monkeypatch)


def test_a_sudoku_run_with_ema_16_bits_and_windows_resumes_bitwise(here, monkeypatch):
    flags = f"{SMALL} --epochs 2 --ema_decay 0.9 --amp bf16 --optimizer adamw"
    flags += " --accumulation_steps 2"
    assert train.main([*flags.split(), "--run_name", "other"]) == 0
    resumed_equals("other", flags, (5,), monkeypatch)


def test_training_learns_and_is_logged_with_every_metric(here):
    rows = utils.load_checkpoint("runs/whole/last.pt")["history"]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < math.log(9)  # chance
    log = Path("runs/whole/log.txt").read_text().splitlines()
    line = next(line for line in log if line.startswith("epoch"))
    assert all(f"{name} " in line for name in utils.SUDOKU_SCORES)
    header = Path("runs/whole/metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"val_{name}" for name in utils.SUDOKU_METRICS} <= set(header)


def evaluate(flags):
    assert train.main(f"--evaluate {flags} --amp False --output a.json".split()) == 0
    return json.loads(Path("a.json").read_text())


def test_the_best_of_a_run_evaluates_alone(here):
    best = utils.load_checkpoint("runs/whole/best.pt")["metrics"]
    found = evaluate("runs/whole/best.pt")  # the run's own validation puzzles
    for name in ("loss", *utils.SUDOKU_METRICS):
        assert found[name] == pytest.approx(best[f"val_{name}"], rel=1e-4)
    assert found["split"] == "val" and found["samples"] == 12
    every = evaluate("runs/whole/best.pt --data p.csv")
    assert every["samples"] == 60 and set(utils.SUDOKU_METRICS) <= set(every)
    assert every["samples_per_second"] > 0
    fewer = evaluate("runs/whole/best.pt --data p.csv --model_args message_steps=1")
    assert fewer["loss"] != every["loss"]


def test_a_level_that_is_not_there_can_not_be_monitored_for_long(here, made, capsys):
    write_csv("easy.csv", *(grids[:20] for grids in made["easy"]))
    flags = f"{SMALL} --data easy.csv --epochs 1 --monitor val_solve_rate_hard --run_name a"
    assert train.main(flags.split()) == 1
    assert "val_solve_rate_hard was never finite" in capsys.readouterr().out


# ------------------------------------------------------------------- predictions and old weights


def predict(capsys, *flags):
    assert train.main(["--predict", *flags]) == 0
    return capsys.readouterr().out


def test_the_weights_that_come_with_the_kit_solve_a_puzzle(here, capsys):
    Path("puzzle.sdk").write_text("\n".join(BOARD))
    out = predict(capsys, "--input", "puzzle.sdk", "--output", "solved.sdk")
    assert "puzzle 1: solved" in out and "1 of 1 solved" in out
    assert np.array_equal(data.read_sudoku("solved.sdk")[0][0], grid(SOLVED))
    shown = [line for line in out.splitlines() if "|" in line]
    assert [line.count("[") for line in shown] == [9 - row.count(".") for row in BOARD]
    assert "".join(c for line in shown for c in line if c.isdigit()) == SOLVED


def test_weights_of_an_earlier_version_score_as_the_readme_says(here, made):
    """All easy and medium boards, and most of those that singles do not solve."""
    write_csv("fixed.csv", *some(made, 8)[:2])
    files = " ".join(map(str, WEIGHTS))
    found = evaluate(f"{files} --data fixed.csv --model_args message_steps=32")
    assert len(found) == len(WEIGHTS) == 3
    for result in found:
        assert result["samples"] == 24
        assert result["solve_rate_easy"] == result["solve_rate_medium"] == 1
        assert result["solve_rate_hard"] >= 0.5


def test_weights_of_an_earlier_version_export_to_the_same_probabilities(here, made):
    flags = f"--export {WEIGHTS[-1]} --model_args message_steps=2 --output net.pt2"
    assert train.main(flags.split()) == 0
    program = torch.export.load("net.pt2").module()
    saved = utils.load_checkpoint(WEIGHTS[-1])
    net = model.build_model("sudoku_gnn", 9, **{**saved["meta"]["arguments"], "message_steps": 2})
    net.load_state_dict(saved["model"])
    for count in (1, 5):
        puzzles = torch.from_numpy(made["hard"][0][:count])
        with torch.no_grad():
            expected = net.eval()(puzzles)[-1].softmax(-1)
        assert torch.allclose(program(puzzles), expected, atol=1e-5) and expected.std() > 0.1


def test_search_finishes_what_the_network_does_not_and_names_the_rest(here, capsys):
    Path("some.sdm").write_text("\n".join([*ROYLE, HARD, AMBIGUOUS, IMPOSSIBLE]))
    call = ["runs/whole/best.pt", "--input", "some.sdm"]
    plain = predict(capsys, *call)
    assert "0 of 7 solved" in plain and plain.count("not solved") == 7
    out = predict(capsys, *call, "--search", "--output", "o.csv")
    assert out.count("solved by search") == 5 and "5 of 7 solved, 0 by the network alone" in out
    assert out.count("ambiguous: several solutions") == out.count("impossible: no solution") == 1
    guesses = [int(n.replace(",", "")) for n in re.findall(r"search, proved unique with ([\d,]+) guesses", out)]
    total = int(re.search(r"([\d,]+) guesses, in o.csv", out)[1].replace(",", ""))
    assert 0 < sum(guesses) <= total  # the total counts the boards without one solution too
    rows = Path("o.csv").read_text().splitlines()
    assert rows[1].split(",")[1] == SOLVED and rows[6].endswith(",") and rows[7].endswith(",")
    again = predict(capsys, *call[:2], "o.csv", "--search")  # reads back
    assert "5 of 7 solved" in again


CALL_FAULTS = {
    "--predict": "--predict: needs --input",
    "--predict --input none.sdk": "is no file of puzzles",
    "--predict --input two.sdm p.csv": "is no file of puzzles",
    "--predict --input bad.sdk": "bad.sdk: line 1: a row is nine cells",
    "--predict --input two.sdm --output a.sdk": "an .sdk file holds one board",
    "--predict --input two.sdm --output a.txt": "a.txt",
    "--predict --input two.sdm --output a.json": "a.json",
    "--predict none.pt --input two.sdm": "no such checkpoint",
    "--predict --input two.sdm --epochs 3": "--epochs: does not go with --predict",
    "--predict --input two.sdm --resume": "--resume: does not go with --predict",
    "--predict --input two.sdm --output two.sdm": "is an input",
    "--predict --input two.sdm --tta": "--tta: is for pictures",
    "--predict --input two.sdm --model_args message_steps=0": "message_steps: must be an integer",
    "--evaluate runs/whole/best.pt --data two.sdm": "has no solutions",
    f"{SMALL} --data two.sdm": "has no solutions",
    f"{SMALL} --data=": "is empty; give a path",
    f"{SMALL} --data nowhere.csv": "no such file or folder",
    f"{SMALL} --cutout 4": "--cutout: is for pictures",
    f"{SMALL} --pretrained a.pt": "--pretrained: is for pictures",
    f"{SMALL} --curriculum": "'--curriculum' is no flag",
    "--model sudoku_gnn --data d --model_args hidden=1000000": "hidden: must be an integer",
    "--model custom --model_args grad_steps=2": "grad_steps",
    "--search": "--search: needs --predict",
    "--input two.sdm": "--input: needs --predict",
}


@pytest.mark.parametrize("flags", CALL_FAULTS)
def test_a_bad_sudoku_call_is_one_line_status_2_and_nothing_written(here, flags, capsys):
    Path("bad.sdk").write_text("12.\n..3\n")
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train.main(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and CALL_FAULTS[flags] in error and error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
