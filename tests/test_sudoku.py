"""Sudoku: rules, solver, generator, files, symmetries, the network, its loss and metrics, --predict."""

import gzip
import itertools
import json
import math
import subprocess
import sys
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
HARD = "100007090030020008009600500005300900010080002600004000300000010040000007007000300"  # AI Escargot
AMBIGUOUS = "." * 40 + "5" + "." * 40
IMPOSSIBLE = "516849732307605000809700065135060907472591006968370050253186074684207500791050608"


def grid(text):
    return data.CELL[np.frombuffer(text.encode(), np.uint8)]


def units():
    for i in range(9):
        yield [9 * i + j for j in range(9)]
        yield [9 * j + i for j in range(9)]
        yield [27 * (i // 3) + 3 * (i % 3) + 9 * (j // 3) + j % 3 for j in range(9)]


UNITS = list(units())
PEERS = [{c for unit in UNITS if i in unit for c in unit} - {i} for i in range(81)]


def brute_force(puzzle, limit=2):
    """Up to `limit` solutions, cell by cell in the order of fewest candidates; shares nothing with the kit."""
    board, found = list(map(int, puzzle)), []

    def visit():
        if len(found) == limit:
            return
        best = None
        for i in range(81):
            if board[i] == 0:
                options = set(range(1, 10)) - {board[c] for c in PEERS[i]}
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
        options = [set() if board[i] else set(range(1, 10)) - {board[c] for c in PEERS[i]} for i in range(81)]
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
    return {level: data.generate(60, level, seed=3) for level in data.LEVELS}


# ------------------------------------------------------------------------------ solver and generator


def test_units_are_the_rules():
    assert sorted(map(tuple, data.UNITS.reshape(27, 9).tolist())) == sorted(map(tuple, map(sorted, UNITS)))


@pytest.mark.parametrize("level", data.LEVELS)
def test_generated_puzzles_have_one_solution_and_are_as_difficult_as_named(made, level):
    puzzles, solutions = made[level]
    assert len({row.tobytes() for row in puzzles}) == len(puzzles) == 60
    for puzzle, solution in zip(puzzles[:12], solutions[:12]):
        assert brute_force(puzzle) == [solution.tolist()]
        assert singles_solve(puzzle) == (level != "hard")
    clues = (puzzles > 0).sum(1)
    assert {"easy": clues.min() >= 36, "medium": clues.max() < 36, "hard": clues.max() < 36}[level]
    assert clues.min() < clues.max()
    assert (data.grade(puzzles) == data.LEVELS.index(level)).all()


def test_generation_is_a_function_of_the_seed_and_the_first_stay_the_same(made):
    again, _ = data.generate(20, "medium", seed=3)
    assert np.array_equal(again, made["medium"][0][:20])
    assert not np.array_equal(data.generate(20, "medium", seed=4)[0], again)


def test_the_solver_agrees_with_brute_force_led_or_not(made):
    puzzles = np.concatenate([made["hard"][0][:20], [grid(text) for text in [*ROYLE, HARD]]])
    for preference in (None, np.random.default_rng(0).random((len(puzzles), 81, 9))):
        solutions, number, _ = data.solve(puzzles, preference)
        assert (number == 1).all()
        for puzzle, solution in zip(puzzles[-5:], solutions[-5:]):
            assert brute_force(puzzle) == [solution.tolist()]
        assert np.array_equal(solutions[:20], made["hard"][1][:20])


def test_a_leader_that_knows_the_solution_never_guesses_wrong():
    puzzle = grid(HARD)[None]
    solution, _, plain = data.solve(puzzle)
    known = np.eye(9)[solution - 1]
    _, number, led = data.solve(puzzle, known)
    assert number == 1 and led < plain and led <= 12
    _, number, against = data.solve(puzzle, 1 - known)  # misled, it is still complete
    assert number == 1 and against > led


def test_ambiguous_and_impossible_boards_are_told_apart():
    solutions, number, _ = data.solve(np.stack([grid(AMBIGUOUS), grid(IMPOSSIBLE), grid(ROYLE[0])]))
    assert number.tolist() == [2, 0, 1]
    assert not solutions[1].any() and data.consistent(solutions).all()


def test_the_search_ends_where_its_guesses_run_out():
    _, number, guesses = data.solve(grid(HARD)[None], max_guesses=2)
    assert number == -1 and guesses == 2


# --------------------------------------------------------------------------------------------- files


def files(folder, puzzles, solutions):
    """{name: bytes} of every format, for the same puzzles."""
    p, s = (["".join(map(str, row)) for row in grids] for grids in (puzzles, solutions))
    dots = [text.replace("0", ".") for text in p]
    rows = lambda *columns: "\n".join(map(",".join, zip(*columns))) + "\n"
    n = [str(i) for i in range(len(p))]
    return {
        "kaggle1m": b"\xef\xbb\xbfquizzes,solutions\r\n" + rows(p, s).replace("\n", "\r\n").encode(),
        "kaggle9m": ("puzzle,solution\n" + rows(p, s)).encode(),
        "kaggle3m": ("id,puzzle,solution,clues,difficulty\n" + rows(n, dots, s, n, ["2.5"] * len(p))).encode(),
        "rrn": rows(p, s).encode().rstrip(b"\n"),
        "extreme": ("source,question,answer,rating\n" + rows(["x_1"] * len(p), dots, s, n)).encode(),
        "packed": gzip.compress(("puzzle,solution\n" + rows(p, s)).encode()),
        "lines": ("# one, two\n\n" + "  \n".join(text.replace("0", "*") for text in p) + "\n\n").encode(),
        "commented": ("# by, me\n" + rows(p, s) + "#, the end\n").encode(),
        "quoted": ('"puzzle","solution"\n' + rows([f'"{text}"' for text in p], [f'"{text}"' for text in s])).encode(),
        "column": ("Puzzle\n" + "\n".join(p)).encode(),
    }


def test_every_format_that_users_have_is_recognised_by_its_content(tmp_path, made):
    puzzles, solutions = (np.concatenate([made[level][i] for level in data.LEVELS]) for i in (0, 1))
    for name, content in files(tmp_path, puzzles, solutions).items():
        (tmp_path / name).write_bytes(content)
        for block in (2**22, 1000):  # a block ends within a line
            read = data.read_sudoku(tmp_path / name, block_bytes=block)
            assert np.array_equal(read[0], puzzles), name
            assert read[1] is None if name in ("lines", "column") else np.array_equal(read[1], solutions), name


BOARD = [ROYLE[0][i : i + 9].replace("0", ".") for i in range(0, 81, 9)]
BOARDS = {
    "sadman": "\n".join(["#A Author", "#D Title, with a comma", "[Puzzle]", *BOARD, "[State]", *["1" * 9] * 9]),
    "sudocue": "#AMe\n#D1\n" + "\n".join(BOARD) + "\n",
    "bare": "\r\n".join(BOARD),
    "simple": "\n".join(["*-----------*", *(f"|{row[:3]}|{row[3:6]}|{row[6:]}|" for row in BOARD), "*-----------*"]),
    "ss": "\n".join(
        "|".join((row[:3], row[3:6], row[6:])) + ("\n-----------" if i in (2, 5) else "") for i, row in enumerate(BOARD)
    ),
}


@pytest.mark.parametrize("name", BOARDS)
def test_boards_in_nine_rows_are_read(tmp_path, name):
    (tmp_path / "board").write_text(BOARDS[name], newline="")
    puzzles, solutions = data.read_sudoku(tmp_path / "board")
    assert np.array_equal(puzzles, grid(ROYLE[0])[None]) and solutions is None


@pytest.mark.parametrize("suffix", [".csv", ".sdm", ".sdk"])
def test_what_is_written_reads_back(tmp_path, made, suffix):
    puzzles, solutions = (grids[:1] if suffix == ".sdk" else grids for grids in made["medium"])
    path = tmp_path / f"a{suffix}"
    path.write_text(data.sudoku_text(suffix, puzzles))
    if suffix != ".csv":
        assert np.array_equal(data.read_sudoku(path)[0], puzzles)
    path.write_text(data.sudoku_text(suffix, puzzles, solutions))
    read = data.read_sudoku(path)
    assert np.array_equal(read[0], puzzles if suffix == ".csv" else solutions)
    assert suffix != ".csv" or np.array_equal(read[1], solutions)


SOLVED = "".join(map(str, data.solve(grid(ROYLE[0])[None])[0][0]))
FAULTS = {
    "puzzle,solution\n": "has a header and no puzzle",
    "": "is empty",
    "name,colour\na,b\n": "line 1: neither 81 cells nor a header with a puzzle column",
    f"puzzle,solution\n{ROYLE[0]},{SOLVED}\n{ROYLE[0][:80]},{SOLVED}\n": "line 3: has 80 cells",
    f"{ROYLE[0]}\n{ROYLE[1]}\n{ROYLE[2]}5\n": "line 3: has 82 cells",
    f"{ROYLE[0]},{SOLVED}\n{ROYLE[0]}\n": "line 2: has 1 columns, the first line 2",
    f"{ROYLE[0]}\na{ROYLE[0][1:]}\n": "line 2: cell 1 of the puzzle is none of",
    f"{ROYLE[0]},{SOLVED[:-1]}0\n": "is none",
    f"puzzle,solution\n{ROYLE[0]},{SOLVED[:-1]}0\n": "line 2: cell 81 of the solution is blank",
    f"puzzle,solution\n{ROYLE[1]},{SOLVED}\n": "contradicts the clue",
    "55" + ROYLE[0][2:]: "line 1: a row, column or box of the puzzle repeats a digit",
    f"puzzle,solution\n{'0' * 81},{SOLVED[1] + SOLVED[1:]}\n": "of the solution repeats a digit",
    "\n".join(BOARD[:8]): "has 8 rows of cells",
    "\n".join([*BOARD[:3], "12345678x9", *BOARD[4:]]): "line 4: a row is nine cells",
}


@pytest.mark.parametrize("content", FAULTS, ids=[text[:30] for text in FAULTS.values()])
def test_a_bad_puzzle_file_is_one_line_that_names_the_line(tmp_path, content):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    if FAULTS[content] == "is none":
        assert data.read_sudoku(path)[1] is None  # a second column that is no solution is passed over
        return
    with pytest.raises(ValueError) as error:
        data.read_sudoku(path)
    assert FAULTS[content] in str(error.value) and "\n" not in str(error.value)


def test_an_endless_line_is_refused_where_it_stands(tmp_path):
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        file.write("\n".join(ROYLE).encode() + b"\n")
        for _ in range(64):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="line 5: too long for a puzzle"):
        data.read_sudoku(tmp_path / "a.gz")


def test_damaged_gzip_is_named(tmp_path):
    packed = gzip.compress("\n".join(ROYLE * 500).encode())
    for content in (packed[:-20], packed[:60] + b"\0\0\0" + packed[63:]):
        (tmp_path / "a.gz").write_bytes(content)
        with pytest.raises(ValueError, match="damaged gzip"):
            data.read_sudoku(tmp_path / "a.gz")


# ------------------------------------------------------------------------------- splits and symmetries


def random_symmetries(grids, seed=0):
    cells, digits = data.sudoku_symmetry(torch.arange(len(grids)), seed, 0)
    return data.transform_sudoku(torch.from_numpy(grids), cells, digits), cells, digits


def test_symmetries_keep_the_rules_are_drawn_for_each_puzzle_and_invert(made):
    solutions = made["easy"][1]
    moved, cells, digits = random_symmetries(solutions)
    assert data.consistent(moved.numpy()).all() and moved.dtype == torch.uint8
    assert len({tuple(row) for row in cells.tolist()}) == len({tuple(row) for row in digits.tolist()}) == len(solutions)
    transposed = [(row // 9).view(9, 9)[0].unique().numel() == 9 for row in cells]
    assert 10 < sum(transposed) < 50
    one_hot = torch.nn.functional.one_hot(moved.long() - 1, 9).double()
    assert np.array_equal(data.restore_sudoku(one_hot, cells, digits).argmax(2).numpy() + 1, solutions)
    alone, _ = data.sudoku_symmetry(torch.tensor([7]), 0, 0)
    assert torch.equal(alone[0], cells[7])  # f(seed, epoch, index), whatever the batch
    assert not torch.equal(data.sudoku_symmetry(torch.tensor([7]), 0, 1)[0], alone)


def test_the_symmetry_class_is_an_invariant_that_tells_grids_apart(made):
    solutions = np.concatenate([made[level][1] for level in data.LEVELS])
    classes = data.symmetry_class(solutions)
    for seed in range(3):
        assert np.array_equal(data.symmetry_class(random_symmetries(solutions, seed)[0].numpy()), classes)
    assert len(np.unique(classes)) >= 0.97 * len(classes)
    assert np.array_equal(data.symmetry_class(solutions, chunk=7), classes)


def write_csv(path, puzzles, solutions):
    path.write_text(data.sudoku_text(".csv", puzzles, solutions))


def test_validation_never_shares_a_solution_up_to_symmetry(tmp_path, made):
    puzzles, solutions = made["easy"]
    twins = []
    for i, (p, s) in enumerate(zip(puzzles, solutions)):  # a symmetric twin of every puzzle
        cells, digits = (t.expand(2, -1) for t in data.sudoku_symmetry(torch.tensor([i]), 1, 0))
        twins.append(data.transform_sudoku(torch.from_numpy(np.stack([p, s])), cells, digits).numpy())
    twins = np.stack(twins)
    write_csv(tmp_path / "a.csv", *(np.concatenate([a, twins[:, i]]) for i, a in enumerate((puzzles, solutions))))
    found = data.load_sudoku(tmp_path / "a.csv", val_fraction=0.2)
    train_split, val = found.splits["train"], found.splits["val"]
    whole = lambda split: np.where(split.images > 0, split.images, split.labels[:, :81])
    assert not set(data.symmetry_class(whole(train_split))) & set(data.symmetry_class(whole(val)))
    assert len(train_split) + len(val) == 120 and 20 <= len(val) <= 30
    assert np.array_equal(val.labels[:, 81], data.grade(val.images))
    assert ((val.labels[:, :81] == 0) == (val.images > 0)).all()


def test_a_folder_of_splits_is_kept_apart_and_duplicates_are_reported(tmp_path, made):
    puzzles, solutions = made["medium"]
    write_csv(tmp_path / "train.csv", *(np.concatenate([grids[:40], grids[:5]]) for grids in (puzzles, solutions)))
    write_csv(tmp_path / "valid.csv", puzzles[40:], solutions[40:])
    found = data.load_sudoku(tmp_path)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 40, "val": 20}
    assert "5 duplicates dropped from train" in found.description
    write_csv(tmp_path / "valid.csv", puzzles[39:], solutions[39:])
    with pytest.raises(ValueError, match="puzzle 1 of val stands in train too"):
        data.load_sudoku(tmp_path)
    other = np.where(np.arange(81) < 80, solutions[:1], 0).astype(np.uint8)  # a puzzle of train's first solution
    pairs = (other, puzzles[40:]), (solutions[:1], solutions[40:])
    write_csv(tmp_path / "valid.csv", *map(np.concatenate, pairs))
    assert "1 of val dropped" in data.load_sudoku(tmp_path).description


def test_the_curriculum_has_its_shares_and_is_a_function_of_the_place_in_the_run():
    levels = np.repeat([0, 1, 2], [5000, 3000, 2000])
    for epoch, expected in ((0, (0.8, 0.2, 0)), (2, (0.2, 0.6, 0.2)), (9, (0.1, 0.3, 0.6))):
        order = data.curriculum_order(levels, seed=1, epoch=epoch, epochs=10)
        shares = np.bincount(levels[order], minlength=3) / len(order)
        assert np.abs(shares - expected).max() < 4 * math.sqrt(0.25 / len(order))
        assert torch.equal(order, data.curriculum_order(levels, 1, epoch, 10)) and len(order) == len(levels)
    whole = data.curriculum_order(levels, 1, 0, 1)  # one epoch is the whole run
    assert (levels[whole[:2000]] == 2).sum() == 0 and 0.5 < (levels[whole[5000:]] == 2).mean() < 0.7
    used = data.curriculum_order(levels, 1, 9, 10)
    counts = np.bincount(used[levels[used] == 2], minlength=len(levels))[levels == 2]
    assert counts.max() - counts.min() <= 1  # each hard puzzle as often as the next
    missing = data.curriculum_order(np.full(100, 2), 1, 0, 10)
    assert sorted(missing.tolist()) == list(range(100))


# ------------------------------------------------------------------------------ network, loss, metrics


def network(**arguments):
    torch.manual_seed(0)
    net = model.build_model("sudoku_gnn", 9, **{"width": 16, "hidden": 24, "message_steps": 6, **arguments})
    torch.nn.init.normal_(net.head)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    return net


def test_the_network_is_equivariant_so_augmentation_changes_nothing(made):
    net, puzzles = network().double().eval(), made["hard"][0][:16]
    moved, cells, digits = random_symmetries(puzzles)
    with torch.no_grad():
        expected = net(torch.from_numpy(puzzles))[-1].softmax(-1)
        found = data.restore_sudoku(net(moved)[-1].softmax(-1), cells, digits)
    assert expected.std() > 0.05 and (found - expected).abs().max() < 1e-5  # the logits leave in float32


def test_the_views_of_a_board_are_put_back_and_change_nothing(made):
    """Averaging an equivariant network over symmetries is the network itself; one that is not is helped."""
    net, puzzles = network().double().eval(), torch.from_numpy(made["hard"][0][:8])
    lopsided = lambda boards: net(boards) + torch.arange(81.0)[:, None] / 20  # prefers nothing, but by place
    with torch.no_grad():
        plain, averaged = net(puzzles), train.predict(net, puzzles, data.sudoku_views)
        once, again = (train.predict(lopsided, boards, data.sudoku_views) for boards in (puzzles, puzzles.flip(0)))
    assert (plain[-1] - averaged[-1]).abs().max() < 1e-4 and plain[-1].std() > 0.1
    assert torch.allclose(once[-1], again[-1].flip(0))  # a view is the same for every board
    with torch.no_grad():
        each = [restore(net(view)) for view, _, restore in list(data.sudoku_views(puzzles))]
    assert all((restored - plain).abs().max() < 1e-4 for restored in each)
    boards, weights, _ = zip(*data.sudoku_views(puzzles))
    assert sum(weights) == pytest.approx(1) and len({tuple(b[0].tolist()) for b in boards}) == len(boards) == 8


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


def test_free_steps_are_drawn_from_the_seed_and_carry_no_gradient():
    net, puzzles = network(free_steps=5, grad_steps=1), torch.from_numpy(grid(HARD)[None])
    torch.manual_seed(1)
    drawn = {net(puzzles).sum().item() for _ in range(60)}
    with torch.no_grad():
        net.eval()
        every = set()
        for net.message_steps in range(1, 7):
            every.add(net(puzzles).sum().item())
    assert drawn == every and len(every) == 6


def test_deep_runs_stay_finite_in_every_precision(made):
    net, puzzles = network(message_steps=300).eval(), torch.from_numpy(made["hard"][0][:4])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert net(puzzles).isfinite().all()


def test_the_first_loss_is_log_9_and_a_trained_net_has_under_a_million_parameters():
    net = model.build_model("sudoku_gnn", 9)
    puzzles, answers = torch.from_numpy(grid(HARD)[None]), torch.from_numpy(grid(SOLVED)[None])
    answers = torch.where(puzzles > 0, 0, answers)
    loss = model.sudoku_loss(net(puzzles), answers) / (answers > 0).sum()
    assert loss.item() == pytest.approx(math.log(9), abs=1e-6)
    assert sum(p.numel() for p in net.parameters()) == 14_912


def test_the_loss_by_hand():
    torch.manual_seed(0)
    logits, answers = torch.randn(2, 3, 81, 9, dtype=torch.float64), torch.zeros(3, 81, dtype=torch.uint8)
    answers[0, 5], answers[2, 80], answers[2, 3] = 4, 9, 1
    for gamma in (0.0, 2.0):
        expected = 0.0
        for s, (b, cell, digit) in itertools.product(range(2), [(0, 5, 4), (2, 80, 9), (2, 3, 1)]):
            e = [math.exp(v) for v in logits[s, b, cell].tolist()]
            p = e[digit - 1] / sum(e)
            expected -= (1 - p) ** gamma * math.log(p) / 2
        assert model.sudoku_loss(logits, answers, gamma).item() == pytest.approx(expected, rel=1e-6)
    p = logits.softmax(-1)
    expected = 0.0
    for s, b, unit, digit in itertools.product(range(2), range(3), UNITS, range(9)):
        expected += math.prod(1 - p[s, b, cell, digit].item() for cell in unit) / 2
    both = model.sudoku_loss(logits, answers, constraint_weight=0.5) - model.sudoku_loss(logits, answers)
    assert both.item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_expected_violations_of_certain_boards_are_their_violations():
    boards = torch.from_numpy(np.stack([grid(SOLVED), np.full(81, 3)])).long()
    p = torch.nn.functional.one_hot(boards - 1, 9).float()
    assert model.expected_violations(p).tolist() == pytest.approx([0, 27 * 8], abs=1e-3)


def test_validation_counts_exactly_in_16_bits(made):
    """Autocast would round a matrix product of counts: 28,328 blanks read 28,288."""
    net, task = network(), train.sudoku_task({"focal_gamma": 0.0, "constraint_weight": 0.0})
    puzzles, solutions = (np.tile(grids, (7, 1)) for grids in made["hard"])
    labels = np.concatenate([np.where(puzzles > 0, 0, solutions), data.grade(puzzles)[:, None]], 1).astype(np.uint8)
    batch = torch.from_numpy(puzzles), torch.from_numpy(labels), None
    for dtype in (torch.float32, torch.bfloat16):
        found = train.evaluate(net, [batch], task, lambda x: x, dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            digits = net.eval()(batch[0])[-1].argmax(-1) + 1
        expected = ((digits == batch[1][:, :81]) & (batch[0] == 0)).sum().item() / (puzzles == 0).sum()
        assert found["cell_accuracy"] == pytest.approx(expected, abs=1e-9)


def test_focal_weighting_below_one_has_finite_gradients():
    logits = torch.zeros(1, 1, 81, 9)
    logits[..., 0] = 200  # certain, and right
    logits.requires_grad_()
    model.sudoku_loss(logits, torch.ones(1, 81, dtype=torch.uint8), focal_gamma=0.5).backward()
    assert logits.grad.isfinite().all()


def test_metrics_against_a_plain_loop(made):
    rng = np.random.default_rng(0)
    puzzles = np.concatenate([made[level][0][:7] for level in data.LEVELS])
    solutions = np.concatenate([made[level][1][:7] for level in data.LEVELS])
    labels = np.concatenate([np.where(puzzles > 0, 0, solutions), data.grade(puzzles)[:, None]], 1)
    logits = rng.normal(size=(2, 21, 81, 9))
    logits[1] += 12 * np.eye(9)[solutions - 1] * (rng.random((21, 1, 1)) < 0.6)  # some boards are solved
    logits[:, puzzles > 0] = np.where(np.eye(9)[puzzles[puzzles > 0] - 1], 0.0, -1e4)
    found = utils.sudoku_metrics(torch.from_numpy(logits), torch.from_numpy(labels.astype(np.uint8)))
    found = dict(zip(utils.SUDOKU_METRICS, zip(*found), strict=True))
    for level, chosen in {"": range(21), "_easy": range(7), "_medium": range(7, 14), "_hard": range(14, 21)}.items():
        sums, blanks = dict.fromkeys(utils.SUDOKU_SCORES, 0.0), 0
        for b in chosen:
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
        assert 0 < sums["solve_rate"] < len(chosen) and sums["violations"] > 0
        for score, value in sums.items():
            total, count = (float(x) for x in found[score + level])
            assert total == pytest.approx(value, rel=1e-4)
            assert count == (len(chosen) if score in ("solve_rate", "violations") else blanks)


# ------------------------------------------------------------------------------------ runs and --predict

SMALL = "--model sudoku_gnn --width 8 --hidden 8 --free_steps 2 --grad_steps 2 --message_steps 3 --batch_size 8"


@pytest.fixture
def puzzle_file(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    write_csv(tmp_path / "p.csv", *(np.concatenate([made[level][i] for level in data.LEVELS]) for i in (0, 1)))
    return "p.csv"


@pytest.mark.parametrize(
    "flags", ["", "--curriculum --ema_decay 0.9 --amp bf16", "--optimizer adamw --accumulation_steps 2"]
)
def test_a_sudoku_run_resumes_bitwise_at_any_step(puzzle_file, flags, monkeypatch):
    flags = f"{SMALL} --data {puzzle_file} --epochs 2 {flags}".split()
    assert train.main([*flags, "--run_name", "whole"]) == 0
    whole = utils.load_checkpoint("runs/whole/last.pt")
    for stop_at in (1, whole["step"] // 2, whole["step"] // 2 + 3):
        name, step = f"s{stop_at}", train.train_step

        class Stop(Exception):
            pass

        def stopping(state, *rest, **named):
            if state.step == stop_at:
                raise Stop
            return step(state, *rest, **named)

        monkeypatch.setattr(train, "train_step", stopping)
        with pytest.raises(Stop):
            train.main([*flags, "--save_every", "1", "--run_name", name])
        monkeypatch.setattr(train, "train_step", step)
        assert train.main(["--resume", name]) == 0
        resumed = utils.load_checkpoint(f"runs/{name}/last.pt")
        for part in ("model", "ema"):
            for key, tensor in (whole[part] or {}).items():
                assert torch.equal(tensor, resumed[part][key]), (stop_at, key)
        assert str(whole["optimizer"]) == str(resumed["optimizer"])


def test_a_run_reports_every_metric_and_its_best_evaluates_alone(puzzle_file, capsys):
    assert train.main(f"{SMALL} --data {puzzle_file} --epochs 1 --run_name a".split()) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    for name in utils.SUDOKU_SCORES:
        assert f"{name} " in line
    header = Path("runs/a/metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"val_{name}" for name in utils.SUDOKU_METRICS} <= set(header)
    assert train.main(f"--evaluate runs/a/best.pt --data {puzzle_file} --message_steps 2 --output a.json".split()) == 0
    found = json.loads(Path("a.json").read_text())
    assert found["samples"] == 180 and set(utils.SUDOKU_METRICS) <= set(found)
    assert found["latency_ms"] > 0 and found["samples_per_second"] > 0
    assert train.main("--evaluate runs/a/best.pt --output b.json".split()) == 0  # the run's own validation puzzles
    assert json.loads(Path("b.json").read_text())["samples"] < 180


def predict(capsys, *flags):
    assert train.main(["--predict", *flags]) == 0
    return capsys.readouterr().out


def test_the_weights_that_come_with_the_kit_solve_a_puzzle(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("puzzle.sdk").write_text("\n".join(BOARD))
    out = predict(capsys, "--input", "puzzle.sdk", "--output", "solved.sdk")
    assert "puzzle 1: solved" in out and "1 of 1 solved" in out
    assert np.array_equal(data.read_sudoku("solved.sdk")[0][0], grid(SOLVED))
    shown = [line for line in out.splitlines() if "|" in line]
    assert [line.count("[") for line in shown] == [9 - row.count(".") for row in BOARD]
    assert "".join(c for line in shown for c in line if c.isdigit()) == SOLVED


def test_search_finishes_what_the_network_does_not_and_names_the_rest(puzzle_file, capsys):
    assert train.main(f"{SMALL} --data {puzzle_file} --epochs 1 --run_name a".split()) == 0
    Path("some.sdm").write_text("\n".join([*ROYLE, HARD, AMBIGUOUS, IMPOSSIBLE]))
    plain = predict(capsys, "runs/a/best.pt", "--input", "some.sdm")
    assert "0 of 7 solved" in plain and plain.count("not solved") == 7
    out = predict(capsys, "runs/a/best.pt", "--input", "some.sdm", "--search", "--output", "out.csv")
    assert out.count("solved by search") == 5 and "5 of 7 solved, 0 by the network alone" in out
    assert out.count("ambiguous: several solutions") == out.count("impossible: no solution") == 1
    assert "led by the network" in out and "without it" in out
    rows = Path("out.csv").read_text().splitlines()
    assert rows[1].split(",")[1] == SOLVED and rows[6].endswith(",") and rows[7].endswith(",")
    assert "5 of 7 solved" in predict(capsys, "runs/a/best.pt", "--input", "out.csv", "--search")  # reads back


def test_prediction_of_puzzles_takes_the_views_with_tta(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("two.sdm").write_text("\n".join(ROYLE[:2]))
    taken, views = [], data.sudoku_views
    monkeypatch.setattr(data, "sudoku_views", lambda boards: (taken.append(len(boards)), views(boards))[1])
    for flags, calls in ([], 0), (["--tta"], 1):
        assert train.main(["--predict", "--input", "two.sdm", "--message_steps", "2", *flags]) == 0
        assert len(taken) == calls
    assert "0 of 2 solved" in capsys.readouterr().out


PREDICT_FAULTS = {
    "--predict": "--predict: needs --input PATH",
    "--predict --input none.sdk": "is no file",
    "--predict --input bad.sdk": "bad.sdk: line 1: a row is nine cells",
    "--predict --input two.sdm --output a.sdk": "an .sdk file holds one board",
    "--predict --input two.sdm --output a.txt": "must be a .csv or .json or .sdm or .sdk file",
    "--predict none.pt --input two.sdm": "no such checkpoint",
    "--predict --input two.sdm --epochs 3": "--epochs: --predict does not read it",
    f"{SMALL} --data two.sdm": "has no solutions",
    f"{SMALL} --data p.csv --hidden 1000000": "--hidden: must be an integer at least 1 and at most 1024",
    f"{SMALL} --data=": "no such file or folder",
    f"{SMALL} --data nowhere.csv": "no such file or folder",
    f"{SMALL} --data p.csv --cutout 4": "--cutout: is for pictures",
    "--model custom --grad_steps 2": "--grad_steps: is for puzzles",
    "--predict --input two.sdm --output two.sdm": "is the --input",
    "--predict --input two.sdm --resume": "--resume: does not go with --predict",
    "--search": "--search: needs --predict",
    "--input two.sdm": "--input: needs --predict",
}


@pytest.mark.parametrize("flags", PREDICT_FAULTS)
def test_a_bad_sudoku_call_is_one_line_status_2_and_nothing_written(puzzle_file, flags, capsys):
    Path("two.sdm").write_text("\n".join(ROYLE[:2]))
    Path("bad.sdk").write_text("12.\n..3\n")
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train.main(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and PREDICT_FAULTS[flags] in error and error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_data_py_writes_a_set(tmp_path):
    command = [sys.executable, str(Path(data.__file__)), *"--level medium --count 5 --seed 1 --output".split()]
    done = subprocess.run([*command, tmp_path / "h.csv"], capture_output=True, text=True)
    assert done.returncode == 0 and "5 medium puzzles" in done.stdout
    puzzles, solutions = data.read_sudoku(tmp_path / "h.csv")
    assert np.array_equal(puzzles, data.generate(5, "medium", 1)[0]) and len(solutions) == 5
    help_text = subprocess.run([*command[:2], "--help"], capture_output=True, text=True).stdout
    assert "example: python data.py --level hard" in help_text
    for output in ("h.txt", "h.sdk", "nowhere/h.csv"):
        done = subprocess.run([*command, tmp_path / output], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_damaged_cache_of_generated_puzzles_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "GENERATED", {"train": (5, 0, 0), "val": (2, 0, 0)})
    monkeypatch.setattr(data, "LEVELS", data.LEVELS[:1])
    first = data.load_sudoku(cache_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    for content in (b"", kept.read_bytes()[:-40], b"PK"):
        kept.write_bytes(content)
        again = data.load_sudoku(cache_dir=tmp_path)
        assert np.array_equal(first.splits["train"].images, again.splits["train"].images)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_level_that_is_not_there_can_not_be_monitored_for_long(puzzle_file, made, capsys):
    write_csv(Path("easy.csv"), *made["easy"])
    flags = f"{SMALL} --data easy.csv --epochs 1 --monitor val_solve_rate_hard --run_name a"
    assert train.main(flags.split()) == 1
    assert "val_solve_rate_hard was never finite" in capsys.readouterr().out
