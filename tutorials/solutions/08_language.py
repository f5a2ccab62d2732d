# %% exercise 1
def bits_at(logits, ids):
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats.view(logits.shape[:2]) / math.log(2)


# %% exercise 2
def pair_bits(ids, new, V):
    counts = torch.bincount(ids[:-1] * V + ids[1:], minlength=V * V).view(V, V) + 1.0
    p = counts / counts.sum(1, keepdim=True)
    return -p[new[:-1], new[1:]].log2().mean().item()


# %% exercise 3
SETTING = {"delta": 0.2, "top_k": 8, "scale": 2.4}
