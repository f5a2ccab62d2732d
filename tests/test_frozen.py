"""What is kept of frozen rows from step to step: never copied, never stale, never saved."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minimoe import MoRA, frozen

F, r, D = 20, 4, 10


def make(path, grow=5):
    """Five tasks of 4 ranks, then 4 live ones; large enough for x (AᵀA) to be the cheaper way."""
    torch.manual_seed(0)
    layer = MoRA(nn.Linear(D, 20), rank=r, top_k=3, tau=0.1).double()
    layer.path = path
    for _ in range(grow):
        nn.init.normal_(layer.B)
        layer.grow()
    nn.init.normal_(layer.B)
    return layer


def step(layer, x):
    """Outputs of two passes, and gradients; the second pass has other live rows in the room."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    first, second = layer(x), layer(2 * x)
    (first.square().sum() + second.sum()).backward()
    return first.detach(), x.grad, layer.A.grad, layer.B.grad


def close(got, wanted):
    return all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(got, wanted, strict=True))


X = torch.randn(400, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Copied(TorchDispatchMode):
    """The shapes of what torch.cat makes."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("path", ["dense", "gather", "compact"])
def test_no_step_copies_frozen_rows_and_all_is_the_plain_ones(path):
    layer = make(path)
    with Copied() as copied:
        got = step(layer, X)
    assert not copied.shapes
    assert close(got, step(make("plain"), X))
    with torch.no_grad():  # the next step sees what the optimiser has moved
        layer.A += 1
        layer.B -= 1
    plain = make("plain")
    plain.load_state_dict(layer.state_dict())
    assert close(step(layer, X), step(plain, X))


def test_a_training_step_adds_the_base_without_a_copy_of_a_view():
    for path in ("plain", "gather"):
        y = make(path)(X)
        assert y.grad_fn.name() == "AddBackward0"  # and no CopySlices


def test_rows_without_room_are_copied():
    layer = copy.deepcopy(make("gather"))
    with Copied() as copied:
        got = step(layer, X)
    assert (F + r, D) in copied.shapes
    assert close(got, step(make("plain"), X))


def double_it(layer):
    with torch.no_grad():
        layer.frozen_A.mul_(2)


def half_way(layer):
    layer.half().double()


def load_others(layer):
    torch.manual_seed(2)
    other = {name: torch.randn_like(rows) for name, rows in layer.state_dict().items()}
    layer.load_state_dict(other)


def set_others(layer):
    torch.manual_seed(3)
    layer.frozen_A.set_(torch.randn(F, D, dtype=torch.float64))


def grow_again(layer):
    torch.manual_seed(4)
    layer.grow()


def assign(layer):
    torch.manual_seed(5)
    layer.frozen_A = torch.randn(F + 7, D, dtype=torch.float64)
    layer.frozen_B = torch.randn(F + 7, 20, dtype=torch.float64)


def edit_one_row(layer):
    with torch.no_grad():
        layer.frozen_A[3] = 5.0


EDITS = [double_it, half_way, load_others, set_others, grow_again, assign, edit_one_row]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("path", ["dense", "gather"])
def test_what_is_kept_is_made_anew_after_an_edit(path, edit):
    layer, plain = make(path), make("plain")
    step(layer, X)
    for each in (layer, plain):
        edit(each)
    assert close(step(layer, X), step(plain, X))


def test_the_frozen_part_of_the_gram_is_made_once_a_task():
    rows, live = torch.randn(F, D), torch.randn(r, D)
    A = torch.cat([rows, live])
    assert torch.allclose(frozen.gram(rows, live), A.T @ A, atol=1e-5)
    rows.data[0] = 7.0  # not counted by torch: so one sees that the first is used again
    assert torch.allclose(frozen.gram(rows, live), A.T @ A, atol=1e-5)
    rows[0] = 7.0
    A = torch.cat([rows, live])
    assert torch.allclose(frozen.gram(rows, live), A.T @ A, atol=1e-4)
    with torch.inference_mode():
        rows = rows.clone()
        assert torch.allclose(frozen.gram(rows, live), A.T @ A, atol=1e-4)


def test_the_gram_of_16_bits_is_summed_in_32():
    rows, live = torch.randn(2000, D).bfloat16(), torch.randn(r, D).bfloat16()
    wide = torch.cat([rows, live]).double()
    got = frozen.gram(rows, live)
    assert got.dtype == torch.bfloat16
    error = (got.double() - wide.T @ wide).abs()
    assert (error <= 2**-8 * (wide.T @ wide).abs() + 1e-3).all()  # one rounding of each


def test_nothing_of_it_is_in_a_file(tmp_path):
    layer = make("gather")
    rows = layer.frozen_A
    assert rows.untyped_storage().nbytes() == rows.nbytes
    safetensors.torch.save_model(layer, str(tmp_path / "all.safetensors"))
    for each in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), layer):
        each.share_memory()
        assert close(step(each, X), step(make("plain"), X))
        each.grow()  # which makes room
        assert each.frozen_A.shape == (F + r, D)


def test_layers_that_grew_or_loaded_in_inference_mode_work_outside():
    layer = make("gather")
    with torch.inference_mode():
        layer.load_state_dict(layer.state_dict())
        layer.grow()
    with torch.no_grad():
        y = layer(X)
        layer.path = "plain"
        assert torch.allclose(layer(X), y, rtol=0, atol=1e-11)


def test_a_backward_inside_autocast_leaves_nothing_coarse():
    layer, plain = make("gather").float(), make("plain").float()
    x = X.float().requires_grad_()
    y = layer(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        y.backward()
    for got, wanted in zip(step(layer, X.float()), step(plain, X.float()), strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_fake_and_meta_rows_have_no_room():
    with FakeTensorMode():
        assert frozen.with_room(torch.zeros(3, 4), 2).shape == (3, 4)
    assert frozen.with_room(torch.zeros(3, 4, device="meta"), 2).is_meta
    none = frozen.with_room(torch.zeros(0, 4), 2)
    assert none.shape == (0, 4)
    assert torch.equal(frozen.joined(none, torch.ones(2, 4)), torch.ones(2, 4))


def test_nothing_of_it_is_in_a_state_dict():
    layer = make("gather")
    before = {name: tuple(rows.shape) for name, rows in layer.state_dict().items()}
    step(layer, X)
    assert {name: tuple(rows.shape) for name, rows in layer.state_dict().items()} == before
    assert {name for name, _ in layer.named_parameters()} == {"A", "B", "base.weight", "base.bias"}
