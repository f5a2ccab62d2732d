"""Wrong schemes by the dozen: each line of a scheme's file, changed mechanically.

    python tests/mutants.py mora [--laws] [--jobs 2]

Of each mutant: whether `same` tells it from the scheme, and with --laws whether a law does. Those
that neither does are printed: read them, to see that they are the same function.

A mutant is one change in one place: an operator, a comparison, a number, a flag, a name for another
of the same function, a statement left out, a branch taken always, an argument swapped.
"""

import argparse
import ast
import copy
import itertools
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import joblib
import torch

from minimoe import laws
from minimoe.roster import SCHEMES

SWAPS = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div, ast.Add],
    ast.Div: [ast.Mult],
    ast.Mod: [ast.FloorDiv],
    ast.FloorDiv: [ast.Mult],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.Lt: [ast.GtE],
    ast.LtE: [ast.Gt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
}
ATTRIBUTES = {
    "kept": ["n_experts", "top_k"],
    "n_experts": ["kept", "ranks"],
    "ranks": ["rank"],
    "in_features": ["out_features"],
    "out_features": ["in_features"],
    "block": ["rank"],
    "softmax": ["sigmoid"],
    "frozen_A": ["A"],
    "A": ["frozen_A"],
}


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what it was and is, the whole source) of every mutant."""
    tree = ast.parse(source)
    places = [
        node
        for cls in tree.body
        if isinstance(cls, (ast.ClassDef, ast.FunctionDef))
        for node in ast.walk(cls)
    ]
    for i, node in enumerate(places):
        for change in changes(node, tree):
            other = copy.deepcopy(tree)
            twin = [
                n
                for cls in other.body
                if isinstance(cls, (ast.ClassDef, ast.FunctionDef))
                for n in ast.walk(cls)
            ][i]
            before = ast.unparse(node)
            new = change(twin, other)
            if new is None:
                continue
            ast.fix_missing_locations(other)
            text = ast.unparse(other)
            if text != ast.unparse(tree):
                yield getattr(node, "lineno", 0), f"{before}  ->  {new}", text


def changes(node, tree):
    """Functions that change a node in place, and say what it is then (None: they could not)."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        for op in SWAPS.get(type(node.op), []):
            yield _set("op", op())
    if isinstance(node, ast.BinOp):
        yield _become(lambda n: n.left)
        yield _become(lambda n: n.right)
    if isinstance(node, ast.Compare):
        for op in SWAPS.get(type(node.ops[0]), []):
            yield _set("ops", [op()])
    if isinstance(node, ast.Constant) and not isinstance(node.value, str):
        for value in others(node.value):
            yield _set("value", value)
    if isinstance(node, ast.UnaryOp):
        yield _become(lambda n: n.operand)
    if isinstance(node, ast.IfExp):
        yield _become(lambda n: n.body)
        yield _become(lambda n: n.orelse)
    if isinstance(node, ast.If):
        for value in (True, False):
            yield _set("test", ast.Constant(value))
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)) and not _docstring(node):
        yield _become(lambda n: ast.Pass())
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield _become(lambda n: n.func.value)  # the method is not called
    if isinstance(node, ast.Call):
        for j in range(len(node.keywords)):
            yield _drop_keyword(j)
        if len(node.args) > 1:
            yield _swap_arguments
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        for name in sorted(names_near(node, tree) - {node.id}):
            yield _set("id", name)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        for name in ATTRIBUTES.get(node.attr, []):
            yield _set("attr", name)


def others(value):
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return []
    if isinstance(value, (int, float)):
        return [value + 1, -value] if value else [1]
    return []


def names_near(node, tree):
    """Names of the function that a node is in, which it may be mistaken for."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and any(n is node for n in ast.walk(function)):
            stored = {
                n.id
                for n in ast.walk(function)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            given = {a.arg for a in function.args.args} - {"self"}
            return (stored | given) if node.id in stored | given else set()
    return set()


def _docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _set(field, value):
    def change(node, tree):
        setattr(node, field, value)
        return ast.unparse(ast.fix_missing_locations(node))

    return change


def _become(make):
    def change(node, tree):
        new = make(node)
        for parent in ast.walk(tree):
            for field, value in ast.iter_fields(parent):
                if value is node:
                    setattr(parent, field, new)
                    return ast.unparse(ast.fix_missing_locations(new))
                if isinstance(value, list) and any(v is node for v in value):
                    value[[v is node for v in value].index(True)] = new
                    return ast.unparse(ast.fix_missing_locations(new))
        return None

    return change


def _drop_keyword(j):
    def change(node, tree):
        del node.keywords[j]
        return ast.unparse(node)

    return change


def _swap_arguments(node, tree):
    node.args[0], node.args[1] = node.args[1], node.args[0]
    return ast.unparse(node)


def load(source: str, scheme: type):
    """The class that the changed source makes, in place of the scheme's."""
    module = types.ModuleType(f"{scheme.__module__}_mutant")
    module.__package__ = scheme.__module__.rpartition(".")[0]
    sys.modules[module.__name__] = module
    exec(compile(source, module.__name__, "exec"), vars(module))
    return vars(module)[scheme.__name__]


def judge(name: str, line: int, what: str, source: str, by_laws: bool):
    """(line, what, the step of `same` that tells it, the law that does); "" if none does."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    scheme = SCHEMES[name]

    def first(rows):
        return next((str(row) for row in rows if row.verdict == "broken"), "")

    def told(ask):
        try:
            return ask()
        except Exception as error:  # it cannot even be built
            return f"{type(error).__name__}: {error}"

    mine = told(lambda: load(source, scheme))
    if isinstance(mine, str):
        return line, what, mine, mine
    slow = ("compiles", "active_is_read")
    order = sorted(laws.LAWS, key=lambda law: law.__name__ in slow)
    by_law = told(lambda: first(laws.hold(law, mine) for law in order)) if by_laws else ""
    return line, what, told(lambda: first(laws.same(mine, scheme))), by_law


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("scheme", choices=SCHEMES)
    parser.add_argument("--laws", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--every", type=int, default=1)
    args = parser.parse_args()
    source = Path(sys.modules[SCHEMES[args.scheme].__module__].__file__).read_text()
    todo = list(itertools.islice(mutants(source), 0, None, args.every))
    print(len(todo), "mutants")
    start, told, lawful = time.time(), 0, 0
    jobs = (joblib.delayed(judge)(args.scheme, *m, args.laws) for m in todo)
    for line, what, same, law in joblib.Parallel(args.jobs, return_as="generator")(jobs):
        told, lawful = told + bool(same), lawful + bool(law)
        mark = f"{'same ' if same else '     '}{'law' if law else '   '}"
        print(mark, line, what, "|", same[:100], flush=True)
    print(
        f"{told} of {len(todo)} told by same" + f", {lawful} by a law" * args.laws,
        time.time() - start,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
