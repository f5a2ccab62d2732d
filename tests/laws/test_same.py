"""Held to a shipped scheme: what is the same is, and what differs is told by its step."""

import json
import subprocess
import sys

import pytest
import torch
from layers import OWN
from torch import nn

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.laws import STEPS, Mapped, same
from minimoe.roster import SCHEMES
from minimoe.schemes.flylora import FlyLoRA
from minimoe.schemes.smora import SMoRA


def first(rows):
    """(the step that differs first, its evidence), or None."""
    return next(((row.law, row.evidence) for row in rows if row.verdict == "broken"), None)


def few(names, quick):
    """All, of which only the quick ones are not slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", few([*OWN, "meteora", "evomoe", "mask_moe"], {"mora"}))
def test_a_scheme_is_the_same_as_itself(name):
    rows = same(SCHEMES[name], SCHEMES[name])
    assert [row.law for row in rows] == [step.__name__ for step in STEPS]
    assert first(rows) is None, first(rows)
    held = {row.law for row in rows if row.verdict == "held"}
    assert held >= {"rows", "y", "gradients", "steps", "growth", "precision", "usual"}


class Plain(nn.Module):
    """MoRA by its equations, in 20 lines, a list of tensors for the tasks."""

    def __init__(self, base, rank, top_k, tau, delta, scale):
        super().__init__()
        self.base, self.k, self.tau, self.delta, self.scale = base, top_k, tau, delta, scale
        self.keys, self.values = nn.ParameterList(), nn.ParameterList()
        base.requires_grad_(False)
        self.add(rank)

    def add(self, rank):
        keys = torch.empty(rank, self.base.in_features)
        self.keys.append(nn.Parameter(nn.init.kaiming_uniform_(keys, a=5**0.5).T))
        self.values.append(nn.Parameter(torch.zeros(rank, self.base.out_features)))

    def next_task(self):
        self.requires_grad_(False)
        self.add(len(self.values[0]))
        self.to(self.base.weight.dtype)

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


def peft_layer(base, rank, scale):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=rank, lora_alpha=scale * rank)
    return Linear(base.requires_grad_(False), "own", config, r=rank, lora_alpha=scale * rank)


def tensors_of_peft(layer):
    return {"A": layer.lora_A["own"].weight, "B": layer.lora_B["own"].weight.T}


@pytest.mark.slow
def test_pefts_layer_is_held_to_lora():
    rows = same(Mapped(peft_layer, tensors_of_peft), LoRA)
    assert first(rows) is None, first(rows)
    twice = Mapped(lambda base, rank, scale: peft_layer(base, rank, 2 * scale), tensors_of_peft)
    step, evidence = first(same(twice, LoRA))
    assert step == "weights" and "has weight 2 where theirs is 1" in evidence


def plain_mora(x, layer, **wrong):
    """MoRA's y of the numbers of a layer, with errors."""
    z = x @ layer.keys.T
    length = z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    length = wrong.get("length", lambda length: length)(length)
    s = z if "raw" in wrong else z / length
    k = wrong.get("k", lambda layer: min(layer.top_k, layer.ranks))(layer)
    at = wrong.get("order", lambda s, layer: s)(s, layer).topk(k).indices
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
    said = z / length if "said" in wrong else wrong.get("z", lambda z: z)(z)
    scale = wrong.get("scale", lambda scale: scale)(layer.scale)
    y = layer.base(x) + scale * (g * said) @ layer.rows("B")
    return wrong.get("y", lambda y, layer, x: y)(y, layer, x)


def live_first(s, layer):
    return s - 9.0 * (torch.arange(layer.ranks) < layer.ranks - layer.rank)


def renormalised(w, pruned):
    return pruned / pruned.sum(-1, keepdim=True).clamp_min(1e-12)


WRONG = {
    "the choice is by size, not by sign": ("chosen", {"order": lambda s, layer: s.abs()}),
    "the smallest are kept": ("chosen", {"order": lambda s, layer: -s}),
    "of the kept those of small scores say nothing, in training too": ("chosen", {"always": True}),
    "tau is applied twice": ("weights", {"power": 2}),
    "tau is not applied": ("weights", {"power": 0}),
    "scores are not normalised": ("weights", {"raw": True, "prune": lambda w, pruned: w}),
    "the norm is over the kept ranks only": ("weights", {"norm of kept": True}),
    "the softmax is over all, before the top k": ("weights", {"before": True}),
    "z / ‖z‖ is said, not z": ("weights", {"said": True}),
    "all that are used weigh the same": ("weights", {"weights": lambda w: 0 * w + 1 / w.shape[-1]}),
    "weights are given to other ranks than theirs": ("weights", {"weights": lambda w: w.flip(-1)}),
    "the update is divided by scale": ("weights", {"scale": lambda scale: 1.0}),
    "the update is multiplied by scale": ("weights", {"scale": lambda scale: scale**2}),
    "the update is multiplied by the number 1.25": ("weights", {"scale": lambda s: 1.25 * s}),
    "what ranks see, z, is constant in the backward pass": ("gradients", {"z": torch.detach}),
    "‖z‖ is constant in the backward pass": ("gradients", {"length": torch.detach}),
    "only live ranks are chosen from": (
        "chosen",
        {"order": live_first, "k": lambda layer: min(layer.top_k, layer.rank)},
    ),
    "r are kept, and not k": ("chosen", {"k": lambda layer: layer.rank}),
    "there is no threshold": ("pruned", {"prune": lambda w, pruned: w}),
    "weights are divided by their sum after the threshold": ("pruned", {"prune": renormalised}),
    "logits are multiplied by 0.5": ("pruned", {"eval tau": 2}),
    "the bias is left out": (
        "y",
        {"y": lambda y, layer, x: y if layer.base.bias is None else y - layer.base.bias},
    ),
    "weights are constant in the backward pass": ("gradients", {"weights": torch.detach}),
}  # fmt: skip


QUICK = {
    "the choice is by size, not by sign",
    "tau is applied twice",
    "there is no threshold",
    "the bias is left out",
    "weights are constant in the backward pass",
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


@pytest.mark.slow
def test_what_computes_in_float32_is_held_within_1e_4():
    class Narrow:  # a layer's numbers, as such a kernel reads them
        def __init__(self, layer):
            self.layer, self.keys = layer, layer.keys.float()

        def rows(self, name):
            return self.layer.rows(name).float()

        def __getattr__(self, name):
            return getattr(self.layer, name)

        def base(self, x):
            bias = self.layer.base.bias
            return nn.functional.linear(
                x, self.layer.base.weight.float(), None if bias is None else bias.float()
            )

    def kernel(**wrong):
        def call(x, layer):
            if x.dtype != torch.float64:
                return plain_mora(x, layer, **wrong)
            return plain_mora(x.float(), Narrow(layer), **wrong).double()

        return call

    step, evidence = first(same(kernel(), MoRA))
    assert evidence.startswith(
        "as if it is computed in fewer bits, or by another eps, within 0.0001 the same: "
    )
    assert first(same(kernel(), MoRA, within=1e-4)) is None
    for said in sorted(QUICK - {"the bias is left out"}):
        step, wrong = WRONG[said]
        found, evidence = first(same(kernel(**wrong), MoRA, within=1e-4))
        assert found == step and evidence.startswith(f"as if {said}: "), (said, found, evidence)


def test_another_scheme_is_not_the_same():
    assert first(same(LoRA, LoRAMoE))[0] == "rows"
    assert first(same(LoRAMoE, MoRA))[0] == "chosen"


class MovesFrozen(Plain):
    def next_task(self):
        super().next_task()
        self.values[-2].requires_grad_(True)


class RandomValues(Plain):
    def next_task(self):
        super().next_task()
        nn.init.normal_(self.values[-1])


class NormalKeys(Plain):
    def add(self, rank):
        super().add(rank)
        nn.init.normal_(self.keys[-1], std=(3 * self.base.in_features) ** -0.5)  # as far from 0


class NormalKeysAtGrowth(Plain):
    def next_task(self):
        super().next_task()
        nn.init.normal_(self.keys[-1])


class SameKeys(Plain):
    def add(self, rank):
        super().add(rank)
        source = torch.Generator().manual_seed(0)
        nn.init.kaiming_uniform_(self.keys[-1].T, a=5**0.5, generator=source)


class TwinKeys(Plain):
    def add(self, rank):
        super().add(rank)
        self.keys[-1].data[:, -1] = self.keys[-1].data[:, 0]


class Overflows(Plain):
    def forward(self, x):
        return super().forward(x) + (0 * x.norm(dim=-1, keepdim=True) ** 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "step", "evidence"),
    [
        (MovesFrozen, "gradients", "as if what is frozen learns"),
        (RandomValues, "growth", "B after grow is not 0, and theirs is"),
        (NormalKeys, "birth", "A at birth (8, 2048) is drawn otherwise than by fresh(): mean "),
        (
            NormalKeysAtGrowth,
            "birth",
            "A after grow (8, 2048) is drawn otherwise than by fresh(): mean ",
        ),
        (SameKeys, "birth", "A after grow is what it was at birth"),
        (TwinKeys, "birth", "A at birth has one row twice"),
        (Overflows, "precision", "not finite"),
    ],
)
def test_a_life_that_differs_is_told(module, step, evidence):
    found, said = first(same(Mapped(module, tensors_of, module.next_task), MoRA))
    assert found == step and evidence in said, (found, said)


def test_numbers_that_are_none_are_said():
    for nothing in (torch.nan, torch.inf):
        step, evidence = first(
            same(lambda x, layer, n=nothing: layer.base(x) + n * layer.update(x), LoRA)
        )
        assert step == "chosen" and evidence.startswith(f"y is {nothing:.6g}, theirs "), evidence


def test_a_build_that_fails_is_said():
    step, evidence = first(same(Mapped(lambda base: 1 / 0, tensors_of), MoRA))
    assert step == "rows" and "build: ZeroDivisionError: division by zero" in evidence
    step, evidence = first(same(Mapped(lambda base: 3, tensors_of), MoRA))
    assert step == "rows" and "build gives 3, allowed: an nn.Module" in evidence


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (lambda m: {"A": m.keys[-1].T}, "rows gives no B"),
        (
            lambda m: tensors_of(m) | {"router": m.keys[-1]},
            "rows gives router, allowed: A, B, frozen_A",
        ),
        (lambda m: tensors_of(m) | {"A": m.keys[-1]}, "of 1 tasks: A is (2, 1), theirs (1, 2)"),
        (lambda m: tensors_of(m) | {"B": m.values[-1] * 1}, "B as rows gives it is a copy"),
        (lambda m: m.nothing, "rows: AttributeError"),
    ],
)
def test_a_map_that_does_not_fit_is_said(rows, said):
    step, evidence = first(same(Mapped(Plain, rows, Plain.next_task), MoRA))
    assert step == "rows" and said in evidence


class Samples(MoRA):
    """Wrong where tokens come in samples alone."""

    def gate(self, x):
        gate = super().gate(x)
        return gate._replace(weight=gate.weight.detach()) if x.dim() > 2 else gate


class CountsPadding(SMoRA):
    def mask(self, x):
        return torch.ones_like(super().mask(x))


class RateFixed(SMoRA):
    def after_step(self):
        rate, self.rate = self.rate, 1e-5
        super().after_step()
        self.rate = rate


class Seeds(MoRA):
    def fresh(self):
        torch.manual_seed(0)
        return super().fresh()


class FirstPlaces(FlyLoRA):
    def fresh(self):
        rows = super().fresh()
        return rows | {"A": rows["A"].sort(descending=True, stable=True).values}


class NoBackward(MoRA):
    def forward(self, x):
        y = super().forward(x)
        return y if x.dtype == torch.float64 else y.detach() + 0 * x.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mine", "theirs", "step", "said"),
    [
        (Samples, MoRA, "gradients", "weights are constant in the backward pass: x (2, "),
        (CountsPadding, SMoRA, "counts", "counts, with a mask is "),
        (RateFixed, SMoRA, "counts", "expert_bias after after_step() is 1e-05"),
        (Seeds, MoRA, "rows", "sets torch's seed, to 0"),
        (FirstPlaces, FlyLoRA, "birth", "columns that are not 0, theirs "),
        (NoBackward, MoRA, "precision", "float32: of dx the median token's error is "),
    ],
)
def test_what_a_scheme_does_beside_its_answers_is_told(mine, theirs, step, said):
    found, evidence = first(same(mine, theirs))
    assert found == step and said in evidence, (found, evidence)


def test_what_cannot_be_held():
    with pytest.raises(TypeError, match="grow is 3, allowed: a function"):
        Mapped(Plain, tensors_of, 3)
    with pytest.raises(TypeError, match=r"mine is 3, allowed: a subclass of minimoe\.Adapter, a"):
        same(3, MoRA)
    with pytest.raises(ValueError, match="needs a context, allowed for mine: an Adapter"):
        same(PLAIN, SCHEMES["mocle"])
    with pytest.raises(ValueError, match=r"within is 0, allowed: above 0 and below 0\.1"):
        same(MoRA, MoRA, within=0)
    with pytest.raises(ValueError, match="device is 'tpu', allowed here: cpu"):
        same(MoRA, MoRA, device="tpu")


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
    rows = json.loads(done.stdout)["schemes"]["own.py:kernel"]
    assert [r["name"] for r in rows if r["verdict"] == "not claimed"] == ["counts", "usual"]
    assert not [row for row in rows if row["verdict"] == "broken"]
    for args, said in (
        (("own.py:nobody", "--as", "mora"), "own.py: nobody is not there; names there: torch, "),
        (("mora", "--as", "nobody"), "scheme is 'nobody', allowed: lora, "),
        (("mora", "--as", "mora", "--within", "1"), "error: within is 1.0, allowed: above 0 "),
        (("mora", "--as", "mora", "--device", "xpu:9"), "device is 'xpu:9', allowed here: cpu"),
        (("mora", "--device", "cpu"), "--device is for --as NAME"),
    ):
        done = check(*args)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_a_step_says_what_is_compared():
    every = sys.modules["minimoe.laws.same"].__doc__
    for step in STEPS:
        said = (step.__doc__ or "").splitlines()[0]
        assert said.endswith(".") and len(said) < 80, step.__name__
        assert f"\n    {step.__name__} " in every, step.__name__
