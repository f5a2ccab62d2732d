# %% exercise 1
def bits_at(logits, y):
    log_p = logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return -log_p / math.log(2)


# %% exercise 2
def pair_bits(x, y, new_x, new_y, C):
    counts = torch.bincount(x * C + y, minlength=C * C).view(C, C) + 1.0
    p = counts / counts.sum(1, keepdim=True)
    return -p[new_x, new_y].log2().mean().item()


# %% exercise 3
SETTING = {"delta": 0.2, "top_k": 8, "scale": 2.1}
