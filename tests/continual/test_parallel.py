"""Several processes train to the same result as one with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimoe.continual.backbones import Backbone
from minimoe.roster import names

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo"
    ),
]


def torchrun(*args, cwd):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *command, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    done = torchrun(Path(__file__).with_name("parallel_train.py"), cwd=tmp_path_factory.mktemp("p"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NOISY = ("evomoe", "poly", "tensor_poly")  # as in parallel_train.py
# AdamW makes steps of a gradient that is 0 but for rounding, as a threshold's often is, and at
# first that of two passes, which agree
ROUGH = ("adamole", "ld_mole", "dselect_k", "adamix")


@pytest.mark.parametrize(
    "name", [*(n for n in names(Backbone()) if n not in NOISY), "lora_moe balanced"]
)
def test_two_processes_learn_what_one_learns(name, said):
    assert said["processes"] == 2
    assert said["apart"][name] < (1e-9 if name in ROUGH else 1e-12)


def test_a_batch_shared_unevenly_has_the_gradient_of_its_mean(said):
    assert said["gradient"] == pytest.approx(2 * (1 + 4 + 36) / 3)  # by w of the mean of (w x)²


@pytest.mark.parametrize("checkpointed", [False, True])
def test_micro_batches_under_ddp_have_one_processs_gradients_and_counts(checkpointed, said):
    assert said["micro"][checkpointed] < 1e-12


def test_a_weight_that_a_process_did_not_use_has_gradient_0_there(said):
    assert said["unused"] == [1.5, None]


def test_compare_under_torchrun_writes_once_and_the_same(tmp_path):
    args = ["compare", "--schemes", "mora", "lora_moe_plugin", "class_mean"]
    args += ["--stream", "permuted-digits", "--tasks", 2, "--epochs", 1, "--seeds", 3]
    two = torchrun("-m", "minimoe", *args, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("permuted-digits, 2 tasks") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["minimoe-compare"]
    command = [sys.executable, "-m", "minimoe", *map(str, args), "--out", "one"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    results = [
        json.loads((tmp_path / folder / "compare.json").read_text())["schemes"]
        for folder in ("minimoe-compare", "one")
    ]
    for name in ("mora", "lora_moe_plugin", "class_mean"):
        ours, theirs = (torch.tensor(result[name]["matrix"]) for result in results)
        assert torch.allclose(ours, theirs, atol=0.02)  # in float32 rounding grows, step by step
    again = torchrun("-m", "minimoe", *args, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.split("\n\n")[1] == two.stdout.split("\n\n")[1]  # the table, seconds too


def test_bad_input_under_torchrun_is_told_once(tmp_path):
    done = torchrun("-m", "minimoe", "compare", "--stream", "permuted", cwd=tmp_path)
    assert done.returncode == 1  # torchrun's own, for any failure
    assert done.stderr.count("minimoe: error: stream is 'permuted', allowed: permuted-digits") == 1
    assert "exitcode  : 2" in done.stderr
    assert not list(tmp_path.iterdir())
