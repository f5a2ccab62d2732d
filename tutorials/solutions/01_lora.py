# %% exercise 1
def update_matrix(layer):
    return layer.scale * layer.rows("B").T @ layer.rows("A")


# %% exercise 2
def largest_rank(D, O, share):
    return int(share * D * O / (D + O))


# %% exercise 3
def untouched(keys, old):
    return keys - keys @ old.pinverse() @ old
