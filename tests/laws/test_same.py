"""Held to a shipped scheme: what is the same is, and what differs is told by its step."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.laws import STEPS, Mapped, same
from minimoe.roster import SCHEMES


def first(rows):
    """(the step that differs first, its evidence), or None."""
    return next(((row.law, row.evidence) for row in rows if row.verdict == "broken"), None)


def few(names, quick):
    """All, of which only the quick ones are not slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", few(SCHEMES, {"mora"}))
def test_a_scheme_is_the_same_as_itself(name):
    rows = same(SCHEMES[name], SCHEMES[name])
    assert [row.law for row in rows] == [step.__name__ for step in STEPS]
    assert first(rows) is None, first(rows)
    held = {row.law for row in rows if row.verdict == "held"}
    assert held >= {"rows", "y", "gradients", "steps", "growth", "bits16", "usual"}


class Plain(nn.Module):
    """MoRA by its equations, in 20 lines, a list of tensors for the tasks."""

    def __init__(self, base, rank, top_k, tau, delta, scale):
        super().__init__()
        self.base, self.k, self.tau, self.delta, self.scale = base, top_k, tau, delta, scale
        self.keys = nn.ParameterList([nn.Parameter(torch.randn(base.in_features, rank))])
        self.values = nn.ParameterList([nn.Parameter(torch.zeros(rank, base.out_features))])
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    def next_task(self):
        for rows in (self.keys, self.values):
            rows[-1].requires_grad_(False)
        self.keys.append(nn.Parameter(torch.randn_like(self.keys[-1])))
        self.values.append(nn.Parameter(torch.zeros_like(self.values[-1])))

    def forward(self, x):
        z = x @ torch.cat([*self.keys], 1)
        s = z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        top, at = s.topk(min(self.k, s.shape[-1]))
        w = (top / self.tau).softmax(-1)
        w = w if self.training else w * (top >= self.delta)
        g = torch.zeros_like(z).scatter(-1, at, w)
        return self.base(x) + self.scale * (g * z) @ torch.cat([*self.values])


def tensors_of(plain):
    return {
        "A": plain.keys[-1].T,
        "B": plain.values[-1],
        "frozen_A": [keys.T for keys in plain.keys[:-1]],
        "frozen_B": [*plain.values[:-1]],
    }


PLAIN = Mapped(Plain, tensors_of, Plain.next_task)


def test_a_plain_module_is_held_by_a_map_of_its_tensors():
    rows = same(PLAIN, MoRA)
    assert first(rows) is None, first(rows)
    assert {row.law for row in rows if row.verdict == "not claimed"} == {"counts", "usual"}


@pytest.mark.slow
def test_a_module_that_cannot_grow_is_held_in_one_task():
    rows = same(Mapped(Plain, tensors_of), MoRA)
    assert first(rows) is None, first(rows)
    assert {row.law for row in rows if row.verdict == "not claimed"} == {
        "counts",
        "growth",
        "usual",
    }
    wrong = Mapped(RandomValues, tensors_of)  # its mistake is in its growth
    assert first(same(wrong, MoRA)) is None


def plain_mora(x, layer, **wrong):
    """MoRA's y of the numbers of a layer, with errors."""
    z = x @ layer.keys.T
    length = z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    s = z if "raw" in wrong else z / length
    k = min(layer.top_k, layer.ranks) - wrong.get("fewer", 0)
    at = wrong.get("order", lambda s: s)(s).topk(max(k, 1)).indices
    top = s.gather(-1, at)
    if "norm of kept" in wrong:
        top = z.gather(-1, at)
        top = top / top.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    tau = layer.tau * (1 if layer.training else wrong.get("eval tau", 1))
    w = (top / tau ** wrong.get("power", 1)).softmax(-1)
    if "before" in wrong:
        w = (s / tau).softmax(-1).gather(-1, at)
    if not layer.training or "always" in wrong:
        pruned = w * (s.gather(-1, at) >= layer.delta)
        w = wrong.get("prune", lambda w, pruned: pruned)(w, pruned)
    w = wrong.get("weights", lambda w: w)(w)
    g = torch.zeros_like(z).scatter(-1, at, w)
    said = z / length if "said" in wrong else z
    scale = wrong.get("scale", lambda scale: scale)(layer.scale)
    y = layer.base(x) + scale * (g * said) @ layer.rows("B")
    return wrong.get("y", lambda y, layer, x: y)(y, layer, x)


def renormalised(w, pruned):
    return pruned / pruned.sum(-1, keepdim=True).clamp_min(1e-12)


WRONG = {
    "the choice is by size, not by sign": ("chosen", {"order": torch.abs}),
    "the smallest are kept": ("chosen", {"order": torch.neg}),
    "the threshold prunes in training too": ("chosen", {"always": True}),
    "tau is applied twice": ("weights", {"power": 2}),
    "tau is not applied": ("weights", {"power": 0}),
    "scores are not normalised": ("weights", {"raw": True, "prune": lambda w, pruned: w}),
    "the norm is over the kept ranks only": ("weights", {"norm of kept": True}),
    "the softmax is over all, before the top k": ("weights", {"before": True}),
    "z / ‖z‖ is said, not z": ("weights", {"said": True}),
    "all that speak weigh the same": ("weights", {"weights": lambda w: 0 * w + 1 / w.shape[-1]}),
    "weights are given to other ranks than theirs": ("weights", {"weights": lambda w: w.flip(-1)}),
    "the update is divided by scale": ("weights", {"scale": lambda scale: 1.0}),
    "the update is multiplied by scale": ("weights", {"scale": lambda scale: scale**2}),
    "there is no threshold": ("pruned", {"prune": lambda w, pruned: w}),
    "weights are divided by their sum after the threshold": ("pruned", {"prune": renormalised}),
    "logits are multiplied by 0.5": ("pruned", {"eval tau": 2}),
    "the bias is left out": (
        "y",
        {"y": lambda y, layer, x: y if layer.base.bias is None else y - layer.base.bias},
    ),
    "weights are constants in the backward pass": ("gradients", {"weights": torch.detach}),
}  # fmt: skip


QUICK = {
    "the choice is by size, not by sign",
    "tau is applied twice",
    "there is no threshold",
    "the bias is left out",
    "weights are constants in the backward pass",
}


@pytest.mark.parametrize("said", few(WRONG, QUICK))
def test_one_error_in_an_equation_is_named(said):
    step, wrong = WRONG[said]
    rows = same(lambda x, layer: plain_mora(x, layer, **wrong), MoRA)
    found, evidence = first(rows)
    assert found == step and evidence.startswith(f"as if {said}: "), (found, evidence)
    at = [row.law for row in rows].index(step)
    assert {row.verdict for row in rows[at + 1 :]} == {"not claimed"}  # not looked at


@pytest.mark.slow
def test_the_function_without_an_error_is_held():
    assert first(same(plain_mora, MoRA)) is None


def test_another_scheme_is_not_the_same():
    assert first(same(LoRA, LoRAMoE))[0] == "rows"
    assert first(same(LoRAMoE, MoRA))[0] == "rows"


class MovesFrozen(Plain):
    def next_task(self):
        super().next_task()
        self.values[-2].requires_grad_(True)


class RandomValues(Plain):
    def next_task(self):
        super().next_task()
        nn.init.normal_(self.values[-1])


class Overflows(Plain):
    def forward(self, x):
        return super().forward(x) + (0 * x.norm(dim=-1, keepdim=True) ** 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "step", "evidence"),
    [
        (MovesFrozen, "gradients", "as if what is frozen learns"),
        (RandomValues, "growth", "fresh B"),
        (Overflows, "bits16", "not finite"),
    ],
)
def test_a_life_that_differs_is_told(module, step, evidence):
    found, said = first(same(Mapped(module, tensors_of, module.next_task), MoRA))
    assert found == step and evidence in said, (found, said)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (lambda m: {"A": m.keys[-1].T}, "rows gives no B"),
        (
            lambda m: tensors_of(m) | {"router": m.keys[-1]},
            "rows gives router, allowed: A, B, frozen_A",
        ),
        (lambda m: tensors_of(m) | {"A": m.keys[-1]}, "A after 1 tasks is (2, 1), theirs (1, 2)"),
        (lambda m: tensors_of(m) | {"B": m.values[-1] * 1}, "B as rows gives it is a copy"),
        (lambda m: m.nothing, "rows: AttributeError"),
    ],
)
def test_a_map_that_does_not_fit_is_said(rows, said):
    step, evidence = first(same(Mapped(Plain, rows, Plain.next_task), MoRA))
    assert step == "rows" and said in evidence


def test_what_cannot_be_held():
    with pytest.raises(TypeError, match=r"mine is 3, allowed: a subclass of minimoe\.Adapter, a"):
        same(3, MoRA)
    with pytest.raises(ValueError, match="needs a context, allowed for mine: an Adapter"):
        same(PLAIN, SCHEMES["mocle"])


FILE = """
import torch
from minimoe.laws import Mapped
def kernel(x, layer):
    return layer.base(x) + layer.update(x)
def forgets_scale(x, layer):
    return layer.base(x) + layer.update(x) / layer.scale
"""


@pytest.mark.slow
def test_the_command(tmp_path):
    (tmp_path / "own.py").write_text(FILE)

    def check(*args):
        command = [sys.executable, "-m", "minimoe", "check", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = check("own.py:kernel", "own.py:forgets_scale", "--as", "mora")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    flat = " ".join(done.stdout.split())
    assert "own.py:forgets_scale is not mora in weights: as if the update is divided by" in flat
    done = check("own.py:kernel", "--as", "mora", "--json")
    assert done.returncode == 0
    rows = json.loads(done.stdout)["own.py:kernel"]
    assert {row["verdict"] for row in rows} == {"held"}
    for args, said in (
        (("own.py:nobody", "--as", "mora"), "own.py: nobody is not there; names there: torch, "),
        (("mora", "--as", "nobody"), "scheme is 'nobody', allowed: lora, "),
    ):
        done = check(*args)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_a_step_says_what_is_compared():
    every = sys.modules["minimoe.laws.same"].__doc__
    for step in STEPS:
        said = (step.__doc__ or "").splitlines()[0]
        assert said.endswith(".") and len(said) < 80, step.__name__
        assert f"\n    {step.__name__} " in every, step.__name__
