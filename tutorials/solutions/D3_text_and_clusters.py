# %% exercise 1
def mean_gate(x, means):
    nearest = torch.cdist(x, means).argmin(-1)
    return F.one_hot(nearest, len(means)).float()


# %% exercise 2
def one_mean(N, D):
    x = torch.zeros(2, N, D)
    x[0, :, : D // 2] = torch.randn(N, D // 2)
    x[1, :, D // 2 :] = torch.randn(N, D // 2)
    return x


# %% exercise 3
def bits_per_character(logits, y):
    ln_p = logits.log_softmax(-1)[torch.arange(len(y)), y]
    return -ln_p.mean() / log(2)


# %% exercise 4
def setting():
    return {"scale": 2.1}  # delta and top_k as they were
