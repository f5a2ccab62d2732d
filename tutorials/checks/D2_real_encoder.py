# %% install
assert not missing

# %% imports
assert not absent

# %% encoder
assert total == 22_713_216 and len(linear) == 37 == 6 * 6 + 1
assert abs(inside / total - 0.47) < 0.01 and not any(w.requires_grad for w in encoder.parameters())
words = encoder.embeddings.word_embeddings.weight
assert len(words) == 30_522 and abs(words.numel() / total - 0.52) < 0.01

# %% patterns
assert [len(survey(encoder, p)[0]) for p in (r".*intermediate\.dense", r".*output\.dense")] == [
    6,
    12,
]
assert "encoder.layer.5.attention.self.query" in linear

# %% adapted
assert apart == 0 and abs(count(model)["trainable"] / total - 0.004) < 0.0005
assert count(model)["trainable"] == 6 * 8 * (384 + 1536)

# %% stream
assert stream.label_space() == 16 and all(len(task.labels) == 4 for task in stream.tasks)
for task in stream.tasks:
    assert task.x_train.shape == (160, 20, 384) and task.x_test.shape == (80, 20, 384)
with torch.no_grad():  # the stream's model is the whole encoder's upper part
    whole = torch.nn.functional.normalize(encoder(ids).last_hidden_state.mean(1), dim=-1)
    assert torch.allclose(base.features(stream.tasks[0].x_train[:40]), whole, atol=1e-5)
assert survey(base, base.targets)[0].keys() == {
    f"blocks.{b}.attention.self.{n}" for b in (0, 1) for n in ("query", "value")
}

# %% start
assert abs(start - 0.64) < 0.02
near = torch.stack([e[y == c].mean(0) for c in y.unique()])  # by distance: classes are 0 to 15
assert abs((torch.cdist(e_new, near).argmin(-1) == y_new).double().mean() - 0.64) < 0.02

# %% probe
assert abs(probed - 0.70) < 0.02

# %% lora
assert abs(one[0].mean() - start) < 1e-6  # a new adapter changes nothing
assert abs(acc(one) - 0.46) < 0.1 and acc(one) < start - 0.08
assert (
    abs(one[0, 0] - 0.59) < 0.02 and abs(one[1, 0] - 0.74) < 0.06 and abs(one[-1, 0] - 0.36) < 0.1
)
assert abs(one[0, 2] - 0.65) < 0.02 and one[1, 2] < 0.1

# %% answers
assert of_task_1[0] < 0.3 and of_task_1[1] > 0.6

# %% mora
assert abs(plasticity(one) - 0.76) < 0.04 and abs(forgetting(one) - 0.41) < 0.1
assert abs(forgetting(mora) - 0.02) < 0.03 and abs(plasticity(mora) - 0.65) < 0.03
assert abs(acc(mora) - start) < 0.03 and abs(mora[1, 2] - 0.42) < 0.1

# %% compared
for matrix, after, end, lost in (
    (small, 0.71, 0.62, 0.12), (large, 0.75, 0.60, 0.20)
):  # fmt: skip
    assert abs(plasticity(matrix) - after) < 0.04
    assert abs(acc(matrix) - end) < 0.06 and abs(forgetting(matrix) - lost) < 0.08
assert max(map(acc, runs.values())) < start + 0.03 < probed

# %% tenth
assert abs(plasticity(slow) - 0.66) < 0.03 and abs(acc(slow) - 0.65) < 0.03
assert abs(forgetting(slow) - 0.01) < 0.03

# %% seeds
means = [round(float(np.mean(row)), 2) for row in seeds.values()]
assert means == [0.70, 0.68, 0.66, 0.66, 0.53, 0.44] and all(len(r) == 10 for r in seeds.values())
assert abs(np.mean(seeds["MoRA"]) - np.mean(seeds["class mean"])) < 0.01 and ahead == 9
assert abs(np.mean(seeds["MoRA"]) - np.mean(seeds["LoRA"]) - 0.22) < 0.005
assert abs(np.mean(seeds["LDA"]) - np.mean(seeds["MoRA"]) - 0.02) < 0.005
assert [stored[n]["stored"] for n in ("lda_features", "mora", "class_mean")] == [
    81600,
    122880,
    15400,
]

# %% llama
assert count(llama)["trainable"] == 8 * 8 * (32 + 32)
found = survey(twelve, r"encoder\.layer\.[10].*query")[0]  # the exit ticket's first question
assert {name.split(".")[2] for name in found} == {"0", "1", "10", "11"}
