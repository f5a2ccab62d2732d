# %% exercise 1
def gathered(v, rows):
    return (v[..., None] * rows).sum(1)  # or torch.einsum("tk,tko->to", v, rows)


# %% exercise 2
def gradient_to_rows(v, idx, dy, R):
    terms = v[..., None] * dy[:, None]  # (T, K, O)
    zeros = torch.zeros(R, dy.shape[1])
    return zeros.index_add(0, idx.flatten(), terms.flatten(0, 1))


# %% exercise 3
def pays_from(R, shares, limit):
    found = None
    for r, share in zip(reversed(R), reversed(shares), strict=True):  # from the largest down
        if not share < limit:
            break
        found = r
    return found


# %% exercise 4
def work_of_masked_and_mora(D, O, R, K):
    return D * O + D * R + R * O, D * O + D * R + K * O


# %% exercise 5
def unequal_sizes():
    return 16, 16 * 16, 1_000_000, 1  # towards 1 + O / D = 17
