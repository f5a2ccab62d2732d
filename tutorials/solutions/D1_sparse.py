# %% exercise 1
def gathered(v, idx, B):
    """v (T, K), idx (T, K), B (R, O) -> y (T, O)"""
    return torch.einsum("tk,tko->to", v, B[idx])  # B[idx] is (T, K, O)


# %% exercise 2
def work_of_masked(T, D, O, R):
    return T * (D * O + D * R + R * O)


def work_of_mora(T, D, O, R, K):
    return T * (D * O + D * R + K * O)


gain = work_of_masked(1, 512, 512, 512) / work_of_mora(1, 512, 512, 512, 8)  # 1.49


# %% exercise 3
def first(holds):
    return next(R for R in RANKS if holds(R))


half_the_time = first(
    lambda R: row("up-projection", "training", R, "gather")["ratio"]["median"] < 0.5
)
half_of_masked = first(
    lambda R: (
        row("layer", "training", R, "mora")["ratio"]["median"]
        < row("layer", "training", R, "dense-masked")["ratio"]["median"] / 2
    )
)
half_the_memory = first(
    lambda R: MiB["mora", "training", R] < MiB["dense-masked", "training", R] / 2
)
