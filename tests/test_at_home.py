"""A researcher's own stream, model and scheme through the command and through Python."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minimoe import MoRA
from minimoe.adapt import adapters
from minimoe.cli import main
from minimoe.compare import compare, report, restore
from minimoe.continual import Stream, Task, streams
from minimoe.continual.backbones import Attention, Backbone
from minimoe.continual.learn import AdapterLearner
from minimoe.roster import ROSTER, names
from minimoe.tools.results import CompareResult
from minimoe.tools.seeds import seed_all, seeded

WINE = """
import torch
from sklearn.datasets import load_wine
from minimoe.continual import Stream, Task

def make(tasks, seed):
    x, y = map(torch.tensor, load_wine(return_X_y=True))
    x = ((x - x.mean(0)) / x.std(0)).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:120], order[120:]
    turned = [x.roll(t, 1) for t in range(tasks)]
    made = [((x[train], y[train]), (x[test], y[test])) for x in turned]
    return Stream("wine", [Task(f"rolled {t}", *both) for t, both in enumerate(made)])
"""

TOKENS = """
import torch
from torch import nn
from minimoe.continual import Stream, Task

class Bag(nn.Module):
    targets = "fc"

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids, mask):
        h = self.fc(self.embed(ids)).relu() * mask.unsqueeze(-1)
        return self.head(h.sum(1) / mask.sum(1, keepdim=True))

def data(t, n):
    ids = torch.randint(1, 20, (n, 7), generator=torch.Generator().manual_seed(1000 * n + t))
    mask = (torch.arange(7) <= torch.arange(n).unsqueeze(1) % 7).long()
    return {"ids": ids * mask, "mask": mask, "labels": (ids[:, 0] + t) % 4}

def make(tasks, seed):
    made = [Task(f"plus {t}", data(t, 128), data(t, 64)) for t in range(tasks)]
    return Stream("tokens", made, model=lambda stream: Bag())
"""

IMAGES = """
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification
from minimoe.continual import Stream, Task, streams

def loader(x, y):
    return DataLoader(TensorDataset(x.view(-1, 1, 8, 8), y), 64, shuffle=True)

def model(stream):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    kind = dict(image_size=8, patch_size=2, num_channels=1, num_labels=10)
    return ViTForImageClassification(ViTConfig(**sizes, **kind))

def make(tasks, seed):
    made = streams.make("permuted-digits", tasks, seed).tasks
    made = [Task(task.name, loader(*task.train), loader(*task.test)) for task in made]
    return Stream("images", made, model=model)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"wine": WINE, "tokens": TOKENS, "images": IMAGES}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def cells(path):
    """The numbers of a comparison without times."""
    result = json.loads(path.read_text())
    for scheme in result["schemes"].values():
        del scheme["seconds"], scheme["step"]
    return result["schemes"]


def run(command, capsys):
    status = main(["compare", *command.split()])
    out, err = capsys.readouterr()
    return status, out, err.splitlines()[-1] if err else ""


LACKS = {name for name, entry in ROSTER.items() if entry.needs}


@pytest.mark.parametrize(
    ("name", "more", "lacks"),
    [
        ("wine", "", ()),
        pytest.param("tokens", "", LACKS, marks=pytest.mark.slow),
        pytest.param(
            "images",
            "--targets .*attention.*(q|v).*|.*fc1 --rank 4",
            LACKS,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_file_of_ones_own_gives_the_table_and_the_pictures(name, more, lacks, home, capsys):
    status, out, err = run(f"--stream {name}.py:make --tasks 2 --epochs 1 {more} --out o", capsys)
    assert status == 0, err
    result = CompareResult.read(home / "o" / "compare.json")
    assert result.stream == name and result.settings["score"] == "accuracy"
    usual = set(names(Backbone(), "scheme", "baseline", "privileged"))
    assert set(result.schemes) == usual - set(lacks)
    for scheme in result.schemes.values():
        assert 0 <= scheme.acc.mean <= 1
    assert result.schemes["mora"].interference.mean is not None
    assert all((home / "o" / f"{n}.png").stat().st_size for n in ("compare", "gates"))
    page = (home / "o" / "compare.md").read_text()
    assert f"`minimoe compare --stream {name}.py:make --tasks 2 --epochs 1" in page
    assert out.startswith(f"{name}, 2 tasks, seed 0")
    learner, stream = restore(home / "o", "mora")
    for j, task in enumerate(stream.tasks):
        found = learner.row(stream, 2)[j]
        assert found == result.schemes["mora"].matrix[0][-1][j], task.name


@pytest.mark.slow
def test_side_by_side_and_one_after_the_other_give_the_same_numbers(home, capsys):
    (home / "gate.py").write_text("from minimoe import MoRA\n\n\nclass Mine(MoRA):\n    pass\n")
    asked = "--stream tokens.py:make --tasks 2 --epochs 2 --seeds 0 1 --schemes lora gate.py:Mine"
    assert run(f"{asked} --out one", capsys)[0] == 0
    assert run(f"{asked} --out two --jobs 2", capsys)[0] == 0
    assert cells(home / "one" / "compare.json") == cells(home / "two" / "compare.json")
    # and more seeds beside those that are there
    assert run("--resume --seeds 2 --jobs 2 --out two", capsys)[0] == 0
    assert len(cells(home / "two" / "compare.json")["Mine"]["matrix"]) == 3


@pytest.mark.slow
def test_a_run_does_not_go_on_with_a_file_that_was_changed(home, capsys):
    asked = "--stream wine.py:make --tasks 2 --epochs 1 --schemes lora --out o"
    assert run(asked, capsys)[0] == 0
    (home / "wine.py").write_text(WINE.replace("roll(t, 1)", "roll(t + 1, 1)"))
    status, _, err = run("--resume --out o", capsys)
    assert status == 2 and "a checkpoint of another run (stream_source" in err
    (home / "wine.py").write_text(WINE.replace("\ndef", "\n\n# in words\ndef"))
    assert run("--resume --out o", capsys)[0] == 0


@pytest.mark.slow
def test_a_file_that_changes_within_a_process_is_read_again(home):
    first = compare(home / "a", "wine.py:make", ["zero_shot"], tasks=1, epochs=1)
    text = WINE.replace("roll(t, 1)", "roll(t + 1, 1)")
    (home / "wine.py").write_text(text)
    second = compare(home / "b", "wine.py:make", ["zero_shot"], tasks=1, epochs=1)
    assert first.schemes["zero_shot"].matrix != second.schemes["zero_shot"].matrix


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--stream nope.py:make", "nope.py: no such file"),
        ("--stream wine.py:nope", "no function nope; functions there: load_wine, make"),
        ("--stream wine.py:torch", "no function torch"),
        ("--stream wine.py:Task", "wine.py:Task fails: TypeError"),
        ("--stream wine.py:load_wine", "load_wine fails: "),
        ("--stream tokens.py:data", "data gives a dict, allowed: a Stream"),
        ("--stream tokens.py:make --backbone mlp", "mlp is for tensors that belong to classes"),
        ("--stream wine.py:make --backbone attention", "attention is for 8×8 images"),
        ("--backbone nope", "backbone is 'nope', allowed: mlp, attention, file.py:make"),
        ("--backbone tokens.py:Bag", "Bag fails: TypeError: "),
        ("--targets nope", "targets 'nope' matches no"),
        ("--lr -1", "lr is -1.0, allowed: 0 or more"),
        ("--lr nan", "lr is nan, allowed: 0 or more"),
        ("--batch 0", "batch is 0, allowed: 1 or more"),
        ("--optimiser Nope", "optimiser is 'Nope', allowed: AdamW, Adam, SGD"),
        ("--jobs 0", "jobs is 0, allowed: 1 or more, or -1"),
        ("--stream planted --backbone mlp", "mlp is for tensors that belong to classes"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(asked, message, home, capsys):
    before = sorted(home.iterdir())
    status, _, err = run(f"{asked} --schemes mora --out o", capsys)
    assert status == 2 and message in err, err
    assert sorted(p for p in home.iterdir() if p.name != "__pycache__") == before


def test_what_does_not_fit_is_named_before_anything_is_learned(tmp_path):
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    two = [Task("a", (x, y), (x, y)), Task("b", (x[:, :5], y), (x[:, :5], y))]
    with pytest.raises(ValueError, match="mine, b: the model fails: RuntimeError"):
        compare(tmp_path / "o", Stream("mine", two))
    one = Stream("mine", two[:1])
    with pytest.raises(ValueError, match="tasks is 3, allowed for mine: 1"):
        compare(tmp_path / "o", one, tasks=3)
    with pytest.raises(ValueError, match="the model is a int, allowed: "):
        compare(tmp_path / "o", one, backbone=lambda stream: 3)
    few = dataclasses.replace(one, classes=2)
    with pytest.raises(ValueError, match="mine, a: label is 2, allowed: 0 to 1"):
        compare(tmp_path / "o", few)
    each = dataclasses.replace(one, loss=lambda answers, y: answers.sum(-1))
    with pytest.raises(ValueError, match=r"mine: the loss is tensor.*allowed: a tensor of one"):
        compare(tmp_path / "o", each)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_in_python_an_object_a_function_and_a_model_of_ones_own(tmp_path):
    torch.manual_seed(0)
    W, x = torch.randn(2, 4, 6), torch.randn(80, 6)
    made = [Task(f"map {t}", (x[:60], x[:60] @ W[t].T), (x[60:], x[60:] @ W[t].T)) for t in (0, 1)]

    def mean_error(answers, y):
        return -float((answers - y).abs().mean())

    stream = Stream("maps", made, loss=nn.functional.l1_loss, score=mean_error)

    def net(stream):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    schemes, how = ["lora", "mora", "joint", "ewc"], {"lr": 0.05, "optimiser": "Adam", "batch": 16}
    result = compare(
        tmp_path, stream, schemes, backbone=net, targets="0", epochs=30, changes={"rank": 4}, **how
    )
    assert result.settings["score"] == "mean error" and result.settings["backbone"] == "<net>"
    assert result.settings["lr"] == 0.05 and result.settings["pretrain"] is None
    joint = result.schemes["joint"].matrix[0]
    assert joint[-1][0] > joint[0][0] and joint[-1][1] > joint[0][1]
    files = report(result, tmp_path)
    assert [file.name for file in files] == [
        "compare.json",
        "compare.md",
        "compare.png",
        "gates.png",
    ]
    assert "Here accuracy is the stream's own score, mean error" in files[1].read_text()
    learner, _ = restore(tmp_path, "mora", stream=stream, backbone=net)
    assert learner.row(stream, 2) == result.schemes["mora"].matrix[0][-1]
    # other data under the same name are noticed
    other = [made[0], Task("map 1", made[0].train, made[1].test)]
    with pytest.raises(ValueError, match=r"a checkpoint of another run .*data "):
        compare(
            tmp_path,
            dataclasses.replace(stream, tasks=other),
            ["lora"],
            backbone=net,
            targets="0",
            epochs=30,
            changes={"rank": 4},
            **how,
        )

    def each_seed(tasks, seed):
        return dataclasses.replace(streams.make("planted", tasks, seed), reachable=None)

    result = compare(tmp_path / "f", each_seed, ["lora"], seeds=[0, 1], tasks=2, epochs=1, jobs=2)
    assert result.stream == "planted" and result.schemes["lora"].acc.std > 0


@pytest.mark.slow
def test_digits_through_attention(tmp_path, capsys):
    asked = "--stream permuted-digits --backbone attention --tasks 2 --epochs 1 "
    asked += "--schemes mora class_mean"
    status, _, err = run(f"{asked} --out {tmp_path / 'o'}", capsys)
    assert status == 0, err
    result = CompareResult.read(tmp_path / "o" / "compare.json")
    assert result.settings["backbone"] == "attention"
    assert 0.1 < result.schemes["class_mean"].acc.mean < 1
    # six layers of width 64 and 256, and their ranks
    widths = 4 * (64 + 64) + 2 * (64 + 256)
    assert result.schemes["mora"].stored == 2 * 8 * widths


def test_adapters_sit_before_pooling_or_after_it():
    for targets, wrapped in ((None, 6), (r"fc\d", 2)):
        model = Attention().requires_grad_(False)
        model.targets = targets or model.targets
        learner = AdapterLearner(model, MoRA, rank=2)
        assert len(list(adapters(model))) == wrapped
        seen = []
        for _, layer in adapters(model):
            layer.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].shape[:-1]))
        learner.predict(torch.randn(5, 64), 0)
        assert set(seen) == {(5,) if targets else (5, 16)}  # images, or their tokens


def test_attention_takes_patches_of_the_image():
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(3, 64)
    assert torch.allclose(model(x), model(x.view(3, 1, 8, 8)))
    # the tokens are 2×2 patches: without positions their order is nothing to the answer
    with torch.no_grad():
        model.positions.zero_()
    patches = x.view(3, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(3, 16, 4)
    mixed = patches[:, torch.randperm(16)]
    back = mixed.view(3, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(3, 64)
    assert torch.allclose(model(x), model(back), atol=1e-5)
    assert math.isfinite(model(x).sum().item())


DRAWS = """
import random
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from minimoe.continual import Stream, Task

class Noisy(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + np.float32(np.random.randn()) + random.random(), self.y[i]

def make(tasks, seed):
    x, y = torch.tensor(np.random.randn(40, 9)).float() + random.random(), torch.arange(40) % 3
    return Stream("draws", [Task("a", Noisy(x, y), (x, y))])

def workers(tasks, seed):
    x, y = torch.randn(40, 9), torch.arange(40) % 3
    loader = DataLoader(TensorDataset(x, y), 20, shuffle=True, num_workers=1)
    return Stream("workers", [Task("a", loader, (x, y))])
"""


def test_what_numpy_and_random_draw_is_seeded(tmp_path):
    (tmp_path / "draws.py").write_text(DRAWS)
    found = []
    for n in range(2):
        np.random.seed(n)
        random.seed(n)
        result = compare(
            tmp_path / str(n), f"{tmp_path}/draws.py:make", ["lora"], tasks=1, epochs=2
        )
        (kept,) = (tmp_path / str(n)).rglob("*.safetensors")
        found.append((result.schemes["lora"].matrix, load_file(kept)["fc1.B"].tolist()))
    assert found[0] == found[1]


def test_seeded_draws_leave_those_that_follow_as_they_were():
    def draws():
        return torch.rand(1).item(), np.random.rand(), random.random()

    seed_all(3)
    expected = draws()
    found = []
    for n in (3, 3, 4):
        seed_all(3)
        with seeded(n):
            found.append(draws())
        assert draws() == expected
    assert found[0] == found[1] == expected != found[2]


@pytest.mark.slow
def test_a_dataloaders_workers_run_in_a_process_side_by_side(tmp_path):
    (tmp_path / "draws.py").write_text(DRAWS)
    found = [
        compare(
            tmp_path / str(jobs),
            f"{tmp_path}/draws.py:workers",
            ["lora", "mora"],
            tasks=1,
            epochs=1,
            jobs=jobs,
        )
        for jobs in (1, 2)
    ]
    assert found[0].schemes["mora"].matrix == found[1].schemes["mora"].matrix


def test_an_infinite_score_is_refused_by_name(tmp_path):
    def sure(answers, y):
        return -torch.tensor(math.inf)

    x, y = torch.randn(9, 9), torch.arange(9) % 3
    stream = Stream("s", [Task("a", (x, y), (x, y))], score=sure)
    with pytest.raises(FloatingPointError, match="lora, seed 0: the score on a is -inf"):
        compare(tmp_path, stream, ["lora"], epochs=1)
