"""On a CUDA device: every path against the float64 reference, at sizes that fill it."""

import pytest
import torch
from torch import nn

from minimoe import MoRA
from minimoe.adapt import context
from minimoe.continual.backbones import Backbone
from minimoe.continual.learn import pretrain, run_stream
from minimoe.continual.streams import make
from minimoe.laws import live, same
from minimoe.roster import ROSTER, SCHEMES, names
from minimoe.sparse import rank_scores, rank_sparse, top_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
PATHS = ["plain", "dense", "gather", "compact", "triton"]


def draw(T, K, R, O, dtype):
    idx = torch.rand(T, R, device="cuda").topk(K)[1]
    v = torch.randn(T, K, device="cuda", dtype=dtype)
    B = torch.randn(R, O, device="cuda", dtype=dtype)
    return v, idx, B[:-16].clone(), B[-16:].clone()


def run(product, given, idx, frozen, live, path, out):
    given, live = given.detach().requires_grad_(), live.detach().requires_grad_()
    y = product(given, idx, frozen, live, path)
    return y, *torch.autograd.grad(y, [given, live], out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(4096, 16, 1024, 768), (100, 3, 600, 33), (1, 1, 17, 1)])
@pytest.mark.parametrize("path", PATHS)
def test_products_equal_the_float64_reference_twice_over(path, size, dtype):
    v, idx, frozen, live = draw(*size, dtype)
    dy = torch.randn(size[0], size[3], device="cuda", dtype=dtype)
    for product, given, out in ((rank_sparse, v, dy), (rank_scores, dy, v)):
        got = run(product, given, idx, frozen, live, path, out)
        again = run(product, given, idx, frozen, live, path, out)
        wide = [t.double() for t in (given, frozen, live, out)]
        want = run(product, wide[0], idx, wide[1], wide[2], "dense", wide[3])
        for mine, twice, truth in zip(got, again, want, strict=True):
            assert torch.equal(mine, twice)
            # float32 GEMMs may use tf32's neighbours in the reduction; sums of up to T terms
            bound = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, torch.finfo(dtype).eps)
            assert (mine.double() - truth).abs().max() <= bound * truth.abs().max()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SCHEMES)
def test_layers_equal_their_cpu_selves(name, path):
    torch.manual_seed(0)
    layer = SCHEMES[name](nn.Linear(64, 48, dtype=torch.float64), rank=8)
    for _ in range(3):
        layer.grow()
    for tensor in layer.state_dict().values():
        tensor.normal_(std=0.3)
    layer.eval()  # where noise is drawn, devices draw their own
    x = torch.randn(40, 64, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(40, 48, dtype=torch.float64)
    said = {
        what: torch.randint(len(size), (40,))
        if isinstance(size, range)
        else torch.randn(40, size, dtype=torch.float64)
        for what, size in layer.needs().items()
    }
    found = []
    for device in ("cpu", "cuda"):
        layer.to(device)
        layer.path = "auto" if device == "cpu" else path
        weights = list(live(layer).values())
        with context(layer, **{what: tensor.to(device) for what, tensor in said.items()}):
            y = layer(x.to(device))
        grads = torch.autograd.grad(y, [x, *weights], dy.to(device), materialize_grads=True)
        found.append((y, *grads))
    for cpu, gpu in zip(*found, strict=True):
        assert torch.allclose(cpu, gpu.cpu(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["lora", "lora_moe", "mora", "smora"])
def test_an_implementation_is_held_to_a_scheme_on_the_device(name):
    rows = same(SCHEMES[name], SCHEMES[name], device="cuda")
    assert not [str(row) for row in rows if row.verdict == "broken"]


@pytest.mark.parametrize("name", names(Backbone()))
def test_learners_live_on_the_device(name):
    stream = make("permuted-digits", 2)
    started = pretrain(stream, 0, "cuda")
    run = run_stream(ROSTER[name].make, started, stream, 0, epochs=1, device="cuda")
    assert all(0 <= acc <= 1 for acc in run.matrix[-1])


@pytest.mark.parametrize("path", PATHS)
def test_compiled_equals_eager(path):
    layer = MoRA(nn.Linear(64, 48), rank=8, top_k=4, tau=0.1).cuda()
    layer.path = path
    layer.grow()
    layer.B.data.normal_()
    x = torch.randn(40, 64, device="cuda")
    assert torch.allclose(torch.compile(layer, fullgraph=True)(x), layer(x), atol=1e-5)


def test_a_wrong_index_is_named_when_asked_to_look():
    v, idx, frozen, live = draw(5, 3, 20, 7, torch.float32)
    with pytest.raises(ValueError, match="allowed: 0 to 19"):
        rank_sparse(v, idx + 20, frozen, live, check=True)
    with pytest.raises(ValueError, match="v is on cpu, live on cuda:0"):
        rank_sparse(v.cpu(), idx, frozen, live)
    with pytest.raises(ValueError, match="x is on cpu, live on cuda:0"):
        top_scores(torch.randn(5, 7), frozen, live, 3)


@pytest.mark.parametrize("path", ["auto", "plain", "dense", "triton"])
def test_a_step_is_captured_in_a_graph(path):
    """So nothing in it waits for the device, and nothing that is kept between steps goes stale."""
    layer = MoRA(nn.Linear(64, 48), rank=64, top_k=4, tau=0.1).cuda()
    layer.path = path
    for _ in range(3):
        layer.grow()
    layer.frozen_B.normal_()
    x, dy = torch.randn(2000, 64, device="cuda"), torch.randn(2000, 48, device="cuda")
    given = x.clone().requires_grad_()

    def step():
        y = layer(given)
        return y, *torch.autograd.grad(y, [given, layer.A, layer.B], dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        given.copy_(torch.randn_like(x))
        for weight in (layer.A, layer.B):
            weight.normal_()
    graph.replay()
    for got, wanted in zip(captured, step(), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-4 * wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("R", "k"), [(17, 1), (512, 16), (1000, 7), (4096, 16), (16384, 16)])
def test_the_row_pass_is_a_stable_sort(R, k, dtype):
    from minimoe import kernels

    z = torch.randn(4097, R, device="cuda").to(dtype)
    z[0] = 0.5  # all equal
    z[1, R // 2] = torch.nan
    top, idx, norm = kernels.row_top(z, k)
    order = z.nan_to_num(nan=torch.inf).sort(dim=1, descending=True, stable=True)
    assert torch.equal(idx.long(), order.indices[:, :k])
    assert torch.equal(top, z.gather(1, idx.long())) or top.isnan().any()
    wide = torch.linalg.vector_norm(z.double(), dim=1, keepdim=True)
    assert torch.allclose(norm[2:].double(), wide[2:], rtol=1e-5) and norm[1].isnan()
