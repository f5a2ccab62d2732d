# %% exercise 1
def lora(x, W0, A, B):
    return x @ W0.T + x @ A.T @ B


# %% exercise 2
def router_gate(x, W, r, k):
    l = x @ W.T
    top, expert = l.topk(k)
    w = torch.zeros_like(l).scatter(-1, expert, top.softmax(-1))
    return w.repeat_interleave(r, -1)


# %% exercise 3
def mora_gate(z, k, tau, delta):
    s = F.normalize(z, dim=-1)  # eq. 5
    top, kept = s.topk(k)  # eq. 6
    w = torch.zeros_like(s).scatter(-1, kept, (top / tau).softmax(-1))  # eq. 7
    return w if delta is None else w * (s >= delta)  # eq. 8
