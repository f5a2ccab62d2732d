"""torch.export and ONNX: one program for all sizes, equal to the adapted model in evaluation."""

import pytest
import torch
from layers import context_of, filled, network
from torch import nn
from torch.export import Dim, export
from torch.fx import GraphModule

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import WithContext, adapt, adapters, context, grow
from minimoe.roster import SCHEMES, names

pytestmark = [  # of strict=True: layers note something of each pass (`use`, `step`); torch's own
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
THREE = names(None, "scheme")
NEEDS = [
    "mor1e",
    "mocle",
    "mask_moe",
    "speech_moe",
    "moore",
    "poly",
    "tensor_poly",
    "task_level",
    "mmoe",
]  # in evaluation
SIZES = [(4, 3), (2, 5), (7, 1), (1, 2), (1, 1), (31, 40)]
BEYOND = (60, 100)  # SMALL, times the 6 ranks of three tasks
BATCH, TOKENS = Dim("batch"), Dim("tokens", max=512)
DYNAMIC = {0: BATCH, 1: TOKENS}


def model(name, tasks=3, path="auto"):
    return on(path, network(name, tasks)).eval()


def on(path, net):
    for _, layer in adapters(net):
        layer.path = path
    return net


def exported(net, strict=False, **options):
    return export(net, (torch.randn(4, 3, 6),), strict=strict, **options)


def operators(program):
    """The libraries whose operators a program calls."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    called = [n.target for graph in graphs for n in graph.nodes if n.op == "call_function"]
    return {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)}


def hold(net, program, sizes):
    run = program.module()
    for size in sizes:
        x = torch.randn(*size, 6)
        assert torch.equal(run(x), net(x)), size


def close(got, wanted, ulps):
    """Within so many roundings of the largest number."""
    eps = torch.finfo(wanted.dtype).eps
    assert (got - wanted).abs().max() <= ulps * eps * wanted.abs().max()


@pytest.mark.parametrize("name", THREE)
def test_one_program_serves_all_sizes(name):
    net = model(name)
    program = exported(net, dynamic_shapes=(DYNAMIC,))
    hold(net, program, SIZES)
    assert operators(program) == {"aten"}
    x = torch.randn(*BEYOND, 6)
    y, auto = program.module()(x), net(x)
    assert torch.equal(y, on("plain", net)(x))
    close(y, auto, 4)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
@pytest.mark.parametrize("tasks", [1, 3], ids=["ungrown", "grown"])
@pytest.mark.parametrize("name", THREE)
def test_in_every_way(name, tasks, strict, dynamic):
    net = model(name, tasks)
    program = exported(net, strict, dynamic_shapes=(DYNAMIC,) if dynamic else None)
    hold(net, program, SIZES if dynamic else SIZES[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in [*THREE, *NEEDS]])
def test_the_atlas(name):
    net = model(name)
    program = exported(net, dynamic_shapes=(DYNAMIC,))
    hold(net, program, SIZES)
    assert operators(program) == {"aten"}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["plain", "dense", "gather", "compact"])
@pytest.mark.parametrize("name", ["lora_moe", "mora"])
def test_a_named_path_goes_with_it(name, path):
    net = model(name, path=path)
    program = exported(net, dynamic_shapes=(DYNAMIC,))
    hold(net, program, [*SIZES, BEYOND])
    assert operators(program) == ({"aten"} if path == "plain" else {"aten", "minimoe"})


@pytest.mark.slow
def test_a_large_static_program_needs_no_operator_of_ours():
    net = model("mora")
    program = export(net, (torch.randn(*BEYOND, 6),))
    assert operators(program) == {"aten"}
    hold(on("plain", net), program, [BEYOND])


class Told(nn.Module):
    """A model whose second input is what its gates need."""

    def __init__(self, net, name):
        super().__init__()
        self.net, self.name = net, name

    def forward(self, x, value):
        with context(self.net, **{self.name: value}):
            return self.net(x)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
@pytest.mark.parametrize("name", NEEDS)
def test_context_is_an_input_of_the_program(name, strict):
    net = model(name)
    (what,) = net.fc1.needs()
    told = Told(net, what)

    def drawn(B, T):
        return torch.randn(B, T, 6), context_of(net.fc1, B)[what]

    shapes = (DYNAMIC, {0: BATCH})
    run = export(told, drawn(4, 3), dynamic_shapes=shapes, strict=strict).module()
    for size in SIZES:
        x, value = drawn(*size)
        assert torch.equal(run(x, value), told(x, value))
        if name != "mask_moe" and (name == "mor1e" or size[0] > 4):  # here each class sees all
            assert not torch.allclose(run(x, value), run(x, drawn(*size)[1]), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
def test_context_is_described_inside_the_program(strict):
    net = WithContext(model("mocle"), lambda x: {"cluster": (x[:, 0, 0] > 0).long()})
    hold(net, exported(net, strict, dynamic_shapes=((DYNAMIC,),)), SIZES)


def transformer(kind):
    """A small model of transformers, what of it is adapted, and inputs of B samples."""
    import transformers as t

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "ViT":
        config = t.ViTConfig(**sizes, intermediate_size=32, image_size=8, patch_size=4)
        return t.ViTModel(config), lambda B, T: {"pixel_values": torch.randn(B, 3, 8, 8)}
    config = t.BertConfig(**sizes, intermediate_size=32, vocab_size=50)

    def words(B, T):
        mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
        return {"input_ids": torch.randint(50, (B, T)), "attention_mask": mask.long()}

    return t.BertModel(config), words


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [LoRA, LoRAMoE, MoRA])
@pytest.mark.parametrize("kind", ["BERT", "ViT"])
def test_a_transformer(kind, scheme):
    net, inputs = transformer(kind)
    adapt(net, scheme, r"encoder.*|layers.*", rank=4)
    grow(net)
    for _, layer in adapters(net):
        filled(layer)
    given = inputs(4, 3)
    dynamic = {0: BATCH} if kind == "ViT" else DYNAMIC
    run = export(net.eval(), (), given, dynamic_shapes=dict.fromkeys(given, dynamic)).module()
    for size in SIZES:
        given = inputs(*size)
        y, wanted = run(**given)[0], net(**given)[0]
        assert torch.equal(y, wanted), size
        for _, layer in adapters(net):  # and the adapters have a part in it
            layer.scale = 0.0
        assert not torch.allclose(y, net(**given)[0], atol=1e-2)
        for _, layer in adapters(net):
            layer.scale = 1.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # torch's own
@pytest.mark.parametrize("tasks", [1, 3], ids=["ungrown", "grown"])
@pytest.mark.parametrize("name", THREE)
def test_onnx(name, tasks):
    import onnxruntime

    net = model(name, tasks)
    x = (torch.randn(4, 3, 6),)
    program = torch.onnx.export(net, x, dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False)
    held = program.model_proto.SerializeToString()
    run = onnxruntime.InferenceSession(held, providers=["CPUExecutionProvider"])
    for size in [*SIZES, BEYOND]:
        x = torch.randn(*size, 6)
        (y,) = run.run(None, {"input": x.numpy()})
        close(torch.from_numpy(y), net(x), 8)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["auto", "dense"])
def test_torch_compile_goes_on_as_before(path):
    """It chooses by size, and does not compile again for each batch size."""
    net = model("lora_moe", path=path)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch.compiler.reset()
    run = torch.compile(net, backend=keep, dynamic=True)
    with torch.no_grad():
        made = []
        for B in (4, 5, 6, 7, 9, 11):
            run(torch.randn(B, 3, 6))
            made.append(len(graphs))
        assert made[1] == made[-1]
        run(torch.randn(*BEYOND, 6))
    assert "torch.ops.minimoe" in graphs[-1]
    assert ("torch.ops.minimoe" in graphs[0]) == (path == "dense")
