"""What `minimoe bench` times is what it says it times; that it is fast is never asserted here."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minimoe import bench
from minimoe.bench import LIVE, DenseMasked, GroupedMoE

ODD = ((9, 3, 60, 33),)
KIND = {"device": "cpu", "dtype": torch.float64}


def grads(layer, x, dy):
    x = x.clone().requires_grad_()
    live = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *live], dy)


def test_planted_inputs_choose_the_ranks_they_were_planted_for():
    idx = torch.rand(50, 200).topk(4)[1]
    x, layers = bench.mora_layers(idx, 200, 128, KIND)
    assert bench.agreement(layers["mora"], x, idx) > 0.99
    assert bench.agreement(layers["mora"], x, (idx + 1) % 200) < 0.2


@pytest.mark.parametrize("R", [24, 200])
def test_dense_masked_is_the_same_layer_as_mora(R):
    idx = torch.rand(30, R).topk(4)[1]
    x, layers = bench.mora_layers(idx, R, 32, KIND)
    dy = torch.randn_like(x)
    for mine, theirs in zip(
        grads(layers["dense-masked"], x, dy), grads(layers["mora"], x, dy), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)
    assert isinstance(layers["dense-masked"], DenseMasked)


def test_dense_masked_computes_no_gradient_of_frozen_rows():
    idx = torch.rand(30, 200).topk(4)[1]
    x, layers = bench.mora_layers(idx, 200, 32, KIND)
    with FlopCounterMode(display=False) as counted:
        layers["dense-masked"](x.requires_grad_()).sum().backward()
    T, D, R = 30, 32, 200
    scores, base, live = (2 * T * D * n for n in (R, D, LIVE))
    # forward: the base, z, y; backward: x by the base, x by z, h, and live A and B
    assert counted.get_total_flops() == 2 * base + 4 * scores + 2 * live


def test_grouped_mm_is_the_same_layer_as_lora_moe():
    layers = bench.beside(32, 16, {"device": "cpu", "dtype": torch.float32})
    assert isinstance(layers["grouped_mm"], GroupedMoE) and layers["lora_moe"].ranks == 8 * LIVE
    x = torch.randn(30, 32)
    dy = torch.randn_like(x)
    for mine, theirs in zip(
        grads(layers["grouped_mm"], x, dy), grads(layers["lora_moe"], x, dy), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_pefts_lora_has_as_many_active_ranks():
    peft = pytest.importorskip("peft")
    layers = bench.beside(32, 12, {"device": "cpu", "dtype": torch.float32})
    assert isinstance(layers["peft lora"], peft.tuners.lora.Linear)
    assert layers["peft lora"].lora_A["default"].weight.shape == (12, 32)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_the_batch_of_many_adapters_is_the_loop(order):
    contenders = bench.many_adapters(3, order, 16, KIND)
    assert list(contenders) == ["loop", "one batch"]
    apart, together = (f() for f in contenders.values())
    assert [tuple(y.shape) for y in apart] == 8 * [(8, 3, 16)]

    def rows(y):
        return sorted(y.detach().flatten(1).tolist())

    assert torch.allclose(torch.tensor(rows(torch.cat(apart))), torch.tensor(rows(together)))
    assert torch.allclose(torch.cat(apart), together) == (order == "sorted")


def test_the_page_shows_many_adapters_if_they_were_timed():
    timed = {"pass": "forward", "R": 64, "D": 768, "ms": {"median": 1.0, "iqr": 0.0}}
    ratio = iter((0.5, 0.61, 0.072, 1.25))
    rows = [
        {**timed, "part": f"8 adapters, T {T}", "routing": order, "name": name}
        | {"ratio": {"median": 1.0 if name == "loop" else next(ratio), "iqr": 0.0}}
        for T in (1, 16)
        for order in ("sorted", "shuffled")
        for name in ("loop", "one batch")
    ]
    stored = bench.read(Path(__file__).parents[2] / "tutorials" / "results" / "bench-cpu.json")
    old = [row for row in stored["rows"] if row["name"] != "one batch"]
    before, now = (bench.page(stored | {"rows": r}, "x", "y.png") for r in (old, old + rows))
    table = """
| one batch / loop | sorted | shuffled |
|---|---|---|
| 8 adapters, T 1 | .50 | .61 |
| 8 adapters, T 16 | .072 | 1.25 |

All parts"""
    assert table in now and "one batch" not in before
    assert "8 adapters, T 1, forward; ratios to loop" in now
    assert bench.from_json(stored | {"rows": old + rows})["rows"][-1] == rows[-1]


@pytest.mark.slow
def test_the_row_pass_is_timed_in_several_shapes(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed (Linux only)")
    kind = {"device": "cpu", "dtype": torch.bfloat16}
    found = bench.passes_over_scores(512, 1, 16, 16, kind, True)
    assert {name for name in found if "groups of" in name} == {
        f"row pass, {warps} warps, groups of {G}" for warps in (1, 2) for G in (4, 8)
    }
    for f in found.values():
        f()
    layers = bench.small_layers(64, 16, kind)
    assert list(layers) == ["plain", "dense", "gather", "triton"]
    layers["triton"]()


def test_a_table_of_contenders_that_not_all_sizes_have():
    stored = bench.read(Path(__file__).parents[2] / "tutorials" / "results" / "bench-cpu.json")
    rows = [row for row in stored["rows"] if row["part"] == "top-k"]
    more = rows[0] | {"name": "row pass"}
    text = bench.table(stored | {"rows": [*rows, more]})
    lines = [line.split() for line in text.splitlines()]
    assert [line[-1] for line in lines if line[:1] == ["256"]] == ["–"]


def test_a_page_of_one_routing_shows_it():
    stored = bench.read(Path(__file__).parents[2] / "tutorials" / "results" / "bench-cpu.json")
    rows = [r for r in stored["rows"] if r["part"] == "top-k" or r["routing"] == "pool"]
    page = bench.page(stored | {"rows": rows}, "x", "y.png")
    assert "pool\nrouting" in page and "\n| 1024 |" in page
    none = stored | {"rows": rows[:3], "complete": False}
    with pytest.raises(ValueError, match="no row times a layer: the run stopped before its end"):
        bench.first_routing(none)
    assert "the run stopped before its end" in bench.table(none)


@pytest.mark.parametrize("kind", [KIND, {"device": "cpu", "dtype": torch.float32}])
def test_what_torch_cannot_group_is_left_out(kind):
    layers = bench.beside(17, 16, kind)
    assert {"linear", "lora_moe"} <= set(layers) and "grouped_mm" not in layers


def test_routes():
    torch.manual_seed(1)
    routes = bench.make_routes((64, 128, 200), bench.ROUTINGS, 4, 30)
    made = {(R, "random") for R in (64, 128, 200)} | {(128, "pool"), (200, "pool")}
    assert routes.keys() == made | {(64, "recorded"), (128, "recorded")}
    for (R, name), idx in routes.items():
        assert idx.shape == (30, 4) and idx.min() >= 0 and idx.max() < R
        assert all(len(set(row)) == 4 for row in idx.tolist())
        assert name != "pool" or len(idx.unique()) <= 64
    # a batch of a real run keeps to fewer ranks than chance would
    assert len(routes[128, "recorded"].unique()) < len(routes[128, "random"].unique())


def test_recording_leaves_the_random_state_and_threads_alone():
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    bench.record((64,), 4, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_peak_memory_by_hand():
    x = torch.zeros(1000)  # 4,000 bytes

    def two_at_once():
        a = x + 1
        b = a + 1
        del a
        return b + 1

    assert 8000 <= bench.Clock("cpu").peak(two_at_once) < 8200


def test_rounds_are_interleaved_and_each_contender_is_first_in_turn():
    calls = []
    names = ["a", "b", "c"]
    contenders = {name: lambda name=name: calls.append(name) for name in names}
    times = bench.rounds(contenders, 3, bench.Clock("cpu"))
    assert calls == [*"abcabc", *"abc", *"bca", *"cab"]
    assert [len(ms) for ms in times.values()] == [3, 3, 3]


def test_spread_by_hand():
    assert bench.spread([3.0, 1.0, 2.0, 4.0, 5.0]) == {"median": 3.0, "iqr": 3.0}
    assert bench.spread([2.0]) == {"median": 2.0, "iqr": 0.0}


def test_bytes_that_must_move_by_hand():
    idx = torch.tensor([[0, 1], [1, 2], [0, 2]])  # T 3, K 2, three ranks used; O = 5
    # idx 6·8, v 6·4, rows of B 3·5·4, y 3·5·4
    moved = bench.up_bytes(idx, 9, 5, torch.float32)
    assert moved["forward"] == 48 + 24 + 60 + 60
    # once more with dy for y; dv 6·4 and the live rows' gradients 16·5·4
    assert moved["training"] == 2 * 192 + 24 + LIVE * 20


def row(part, R, name, ratio, ms=1.0):
    place = {"part": part, "pass": "forward", "R": R, "D": 8, "routing": "random", "name": name}
    return place | {"ratio": {"median": ratio, "iqr": 0.0}, "ms": {"median": ms, "iqr": 0.0}}


def test_what_auto_should_do_by_hand():
    up = [("up-projection", R, "gather", t) for R, t in ((64, 1.2), (128, 0.9), (256, 1.1))]
    rows = [row(*each) for each in [*up, ("up-projection", 512, "gather", 0.5)]]
    # 128 is no crossover: 256 is slower again; from 512 on it is faster, and K is 16
    assert bench.suggested(rows, 16) == {"spmm": 512 // 16}
    slow = [
        row("sddmm", R, "gather", 2.0) for R in (64, 256)
    ]  # never faster: beyond what was timed
    assert bench.suggested(slow, 16) == {"sddmm": 2 * 256 // 16}
    on_a_gpu = [row("spmm_t", 64, "gather", 2.0), row("spmm_t", 64, "triton", 0.5)]
    assert bench.suggested(on_a_gpu, 16) == {"spmm_t": 64 // 16}
    times = {64: (1.0, 2.0), 256: (1.0, 1.1), 1024: (1.0, 0.9), 4096: (1.0, 1.5)}
    small = [
        row("small layers", R, name, 1.0, ms)
        for R, both in times.items()
        for name, ms in zip(("plain", "gather"), both, strict=True)
    ]
    assert bench.suggested(small, 16) == {"small": 64 * 256}  # at 1024 gather is faster


@pytest.mark.parametrize("wrong", ["rank_sparse", "rank_scores", "top_scores"])
def test_a_wrong_product_is_seen_before_anything_is_timed(wrong, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which takes its time
    right = getattr(bench.errors.__globals__["sparse"], wrong)

    def slightly_off(*args):
        out = right(*args)
        return (
            tuple(t * (1 + 1e-3) if t.is_floating_point() else t for t in out)
            if isinstance(out, tuple)
            else out * (1 + 1e-3)
        )

    assert all(row["error"] <= row["allowed"] for row in bench.errors("cpu", ODD))
    monkeypatch.setattr(bench.errors.__globals__["sparse"], wrong, slightly_off)
    rows = bench.errors("cpu", ODD)
    off = {r["product"] for r in rows if r["dtype"] == "float32" and r["error"] > r["allowed"]}
    assert off == {wrong}


def test_a_product_that_gives_nan_is_wrong(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which takes its time
    monkeypatch.setattr(
        bench.errors.__globals__["sparse"], "rank_scores", lambda x, idx, A, live, path: (
            x @ live.T
        )[:, :3] * torch.nan
    )  # fmt: skip
    rows = [row for row in bench.errors("cpu", ODD) if row["product"] == "rank_scores"]
    assert not any(row["error"] <= row["allowed"] for row in rows)


def test_settings_out_of_range_are_named():
    for settings, message in (
        ({"tokens": 0}, "tokens is 0, allowed: 1 or more"),
        ({"ranks": (64, 15)}, "ranks is 15, allowed: 16 or more"),
        ({"top_k": 32, "ranks": (31,)}, "ranks is 31, allowed: 32 or more"),
        ({"width": 8}, "width is 8, allowed: 16 or more"),
        ({"repeats": 0}, "repeats is 0, allowed: 1 or more"),
        ({"routings": ("random", "hot")}, "routing is 'hot', allowed: random, pool, recorded"),
        ({"routings": ("pool",), "ranks": (64,)}, "none of the routings pool is made for any R"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.bench(**settings)
