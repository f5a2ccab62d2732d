import copy
import dataclasses
import math

import pytest
import torch

from minimoe import LoRA, LoRAMoE, MoRA
from minimoe.adapt import context
from minimoe.continual import streams
from minimoe.continual.backbones import Backbone
from minimoe.continual.baselines import ClassMean, HeadOnly, Joint, Oracle, ToldLoRA
from minimoe.continual.checkpoints import Checkpoints
from minimoe.continual.learn import AdapterLearner, Learner, pretrain, run_stream, train
from minimoe.tools.files import read_tensors, write_tensors

STREAM = streams.make("permuted-digits", 3, seed=1)
MAKE = {
    "lora": lambda model, stream: AdapterLearner(model, LoRA, grows=False, rank=4),
    "lora_moe": lambda model, stream: AdapterLearner(model, LoRAMoE, rank=4),
    "mora": lambda model, stream: AdapterLearner(model, MoRA, rank=4, tau=0.1),
    "zero_shot": lambda model, stream: Learner(model),
    "class_mean": ClassMean,
    "head_only": lambda model, stream: HeadOnly(model),
    "joint": lambda model, stream: Joint(model, stream, rank=4),
    "oracle": lambda model, stream: Oracle(model, rank=4),
}


@pytest.fixture(scope="module")
def backbone():
    return pretrain(STREAM, seed=1)


def test_pretraining_learns_the_base_domain_and_leaves_all_frozen(backbone):
    right = backbone(STREAM.base.x_test).argmax(1) == STREAM.base.y_test
    assert right.float().mean() > 0.95
    assert not any(p.requires_grad for p in backbone.parameters())


class Cut(Exception):
    pass


def until(left):
    """Take `left` reports, then be cut off."""

    def done(tasks):
        nonlocal left
        left -= 1
        if left == 0:
            raise Cut

    return done


def timeless(run):
    return repr(dataclasses.replace(run, seconds=0.0, step=0.0))


@pytest.mark.parametrize("name", MAKE)
def test_a_run_cut_off_after_a_task_goes_on_to_the_same_bits(name, backbone, tmp_path):
    run = {"scheme": name, "tau": 0.1}
    args = (MAKE[name], backbone, STREAM, 1)
    whole = run_stream(*args, epochs=2)
    before = copy.deepcopy(backbone.state_dict())
    kept = Checkpoints(tmp_path / "c", run)
    # after the first task; then again after one more (the first report is of what was there)
    for tasks in (1, 2):
        with pytest.raises(Cut):
            run_stream(*args, epochs=2, checkpoints=kept, done=until(tasks))
        files = kept.of_all(3) if name == "joint" else kept
        assert files.learned(STREAM) == tasks
    resumed = run_stream(*args, epochs=2, checkpoints=kept)
    assert timeless(resumed) == timeless(whole)
    assert sorted(tmp_path.iterdir()) == [files.file(t) for t in (1, 2, 3)]
    assert all(torch.equal(t, before[k]) for k, t in backbone.state_dict().items())
    with pytest.raises(ValueError, match=r"task1.*another run \(tau 0.1 there, 0.2 here\)"):
        run_stream(*args, epochs=2, checkpoints=Checkpoints(kept.stem, run | {"tau": 0.2}))


@pytest.mark.parametrize("name", MAKE)
def test_a_run_goes_on_to_more_tasks_as_if_they_had_been_asked_for(name, backbone, tmp_path):
    kept = Checkpoints(tmp_path / "c", {"scheme": name})
    shorter = dataclasses.replace(STREAM, tasks=STREAM.tasks[:2])
    run_stream(MAKE[name], backbone, shorter, 1, epochs=1, checkpoints=kept)
    reports = []
    args = (MAKE[name], backbone, STREAM, 1)
    longer = run_stream(*args, epochs=1, checkpoints=kept, done=reports.append)
    assert reports == ([1, 1, 1] if name == "joint" else [2, 1])
    assert timeless(longer) == timeless(run_stream(*args, epochs=1))


def test_a_checkpoint_that_is_not_this_runs_is_one_line(backbone, tmp_path):
    kept = Checkpoints(tmp_path / "c", {"scheme": "lora"})
    args = (MAKE["lora"], backbone, STREAM, 1)
    run_stream(*args, epochs=1, checkpoints=kept)
    first, second, third = (kept.file(t) for t in (1, 2, 3))
    whole = {path: path.read_bytes() for path in (first, second, third)}

    def refused(message):
        with pytest.raises(ValueError, match=message) as error:
            run_stream(*args, epochs=1, checkpoints=kept)
        assert "\n" not in str(error.value) and str(second) in str(error.value)
        second.write_bytes(whole[second])

    second.write_bytes(whole[third])  # swapped
    refused("task permutation 3 there, permutation 2 here; data .*; learned 3 there, 2 here")
    middle = len(whole[second]) // 2
    flipped = bytes([whole[second][middle] ^ 4])
    second.write_bytes(whole[second][:middle] + flipped + whole[second][middle + 1 :])
    refused("changed or cut short.*; delete it to learn its task again")
    tensors, facts = read_tensors(second, "checkpoint", mend="")
    for odd in (
        {"learned": "2"},
        {"seconds": None},
        {"run": [1]},
        {"steps": 1.5},
        {"more": 1},
    ):
        write_tensors(second, "checkpoint", tensors, facts | odd)
        refused(f"{next(iter(odd))}: ")
    write_tensors(second, "checkpoint", {"x": torch.ones(2)}, facts)
    refused("not this learner's \\(ValueError: ")
    second.unlink()  # learned again, the same
    run_stream(*args, epochs=1, checkpoints=kept)
    assert read_tensors(second, "checkpoint", mend="")[0].keys() == tensors.keys()
    for name, tensor in read_tensors(second, "checkpoint", mend="")[0].items():
        assert torch.equal(tensor, tensors[name])


def test_a_matrix_has_the_row_before_any_task_first(backbone):
    zero = run_stream(MAKE["zero_shot"], backbone, STREAM, 1, epochs=1).matrix
    lora = run_stream(MAKE["lora"], backbone, STREAM, 1, epochs=4)
    assert len(zero) == 4 and all(row == zero[0] for row in zero)
    assert lora.matrix[0] == zero[0]  # a fresh adapter is the backbone
    assert all(lora.matrix[t + 1][t] > zero[0][t] + 0.3 for t in range(3))
    assert lora.trainable == lora.stored == 4 * (64 + 128 + 128 + 128 + 128 + 64)


def test_the_oracle_forgets_nothing_and_joint_knows_no_rows_between(backbone):
    oracle = run_stream(MAKE["oracle"], backbone, STREAM, 1, epochs=3).matrix
    for j in range(3):
        assert all(oracle[i][j] == oracle[0][j] for i in range(j + 1))
        assert all(oracle[i][j] == oracle[j + 1][j] for i in range(j + 1, 4))
        assert oracle[3][j] > 0.6
    joint = run_stream(MAKE["joint"], backbone, STREAM, 1, epochs=3).matrix
    assert all(math.isnan(entry) for row in joint[1:3] for entry in row)
    assert min(joint[3]) > 0.6


def test_told_lora_uses_the_told_tasks_ranks_alone():
    layer = ToldLoRA(torch.nn.Linear(5, 4, dtype=torch.float64), rank=2)
    layer.grow()
    layer.frozen_B.normal_()
    torch.nn.init.normal_(layer.B)
    x = torch.randn(3, 5, dtype=torch.float64)
    for task, (A, B) in enumerate([(layer.frozen_A, layer.frozen_B), (layer.A, layer.B)]):
        with context(layer, label=torch.full((3,), task)):
            assert torch.allclose(layer(x), layer.base(x) + x @ A.T @ B, atol=1e-12)
    with context(layer, label=torch.tensor([1, 2, 0])):  # 2 is not learned yet
        y = layer(x)
    assert torch.equal(y[1], layer.base(x)[1])
    assert torch.allclose(y[0], layer.base(x[0]) + x[0] @ layer.A.T @ layer.B, atol=1e-12)


def test_a_digit_that_nobody_has_shown_is_never_answered(backbone):
    split = streams.make("split-digits", 5, seed=1)
    some = dataclasses.replace(split, base=split.tasks[0])  # a base domain of 0 and 1 alone
    learner = ClassMean(copy.deepcopy(backbone), some)
    learner.learn(some, 1, lambda *args: None)  # 2 and 3
    answers = learner.predict(split.base.x_test, 0)
    assert not answers.isnan().any() and set(answers.argmax(1).tolist()) == {0, 1, 2, 3}


def test_what_a_learner_gives_for_a_checkpoint_is_a_copy(backbone):
    for make in MAKE.values():
        learner = make(copy.deepcopy(backbone), STREAM)
        before = learner.state()
        kept = copy.deepcopy(before)
        learner.learn(STREAM, 2, lambda model, weights, task: [w.data.add_(1) for w in weights])
        assert all(torch.equal(before[name], tensor) for name, tensor in kept.items())


def test_class_means_are_the_streams_where_it_has_shown_the_digit(backbone):
    split = streams.make("split-digits", 5, seed=1)
    learner = ClassMean(copy.deepcopy(backbone), split)
    learner.learn(split, 0, lambda *args: None)
    learner.learn(split, 1, lambda *args: None)
    with torch.no_grad():
        centres = []
        for digit in range(10):
            task = split.tasks[digit // 2] if digit < 4 else split.base
            images = task.x_train[task.y_train == digit]
            centres.append(backbone.features(images).double().mean(0).float())
        features = backbone.features(split.tasks[1].x_test)
        nearest = [min(range(10), key=lambda c: (f - centres[c]).norm()) for f in features]
        assert learner.predict(split.tasks[1].x_test, 1).argmax(-1).tolist() == nearest


def test_a_loss_that_is_no_number_stops_the_run_and_is_named(backbone, tmp_path):
    class Breaks(AdapterLearner):
        def learn(self, stream, t, fit):
            if t == 1:
                self.model.fc2.A.data.fill_(math.nan)
            super().learn(stream, t, fit)

    def make(model, stream):
        return Breaks(model, MoRA, rank=4)

    kept = Checkpoints(tmp_path / "c", {})
    message = r"mora, seed 1, task 2 \(permutation 2\), step 1: the loss is nan"
    with pytest.raises(FloatingPointError, match=message):
        run_stream(make, backbone, STREAM, 1, epochs=1, name="mora, seed 1", checkpoints=kept)
    assert kept.learned(STREAM) == 1  # the first task is not lost


def test_training_takes_no_step_on_a_bad_loss():
    model = Backbone()
    before = copy.deepcopy(model.state_dict())
    STREAM.base.x_train[0, 0], kept = math.inf, STREAM.base.x_train[0, 0].item()
    try:
        with pytest.raises(FloatingPointError, match=r"training, step \d+: the loss is nan"):
            train(model, model.parameters(), STREAM.base, 1, seed=0, lr=0.0)
    finally:
        STREAM.base.x_train[0, 0] = kept
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
