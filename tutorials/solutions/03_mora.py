# %% exercise 1
def weights_by_hand():
    # ‖z‖ = 9, s = (4, -8, 1) / 9; by sign, ranks 0 and 2 are kept, 1/3 apart: ln 4 after division
    return (0.8, 0, 0.2), (0.8, 0, 0)  # 1/9 is below δ


# %% exercise 2
def mora_layer(x, W0, A, B, k, tau, delta):
    z = x @ A.T
    s = z / z.norm()  # eq. 5
    kept = s.topk(k).indices  # eq. 6
    w = torch.zeros(len(A))
    w[kept] = (s[kept] / tau).softmax(-1)  # eq. 7
    g = w * (s >= delta)  # eq. 8
    return x @ W0.T + (g * z) @ B


# %% exercise 3
def taking_key(old):
    mean = old.mean(0)  # digits have bright middles: its product with each of them is above 0
    return 20 * mean / mean.norm()


# %% exercise 4
def window(layer, task, alien):
    largest = []
    for x in (alien, task):
        s = F.normalize(x @ layer.keys.T, dim=-1)  # eq. 5
        largest.append(s.max(-1).values)
    return largest[0].max().item(), largest[1].min().item()
