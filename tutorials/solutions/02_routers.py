# %% exercise 1
def router_rows(centres):
    return centres.pinverse().T  # row e reads 1 at centre e and 0 at the others


# %% exercise 2
f = (3 / 4, 1 / 4)  # three of four inputs keep expert 0
P = ((3 * 3 / 4 + 1 / 4) / 4, (3 * 1 / 4 + 3 / 4) / 4)  # 5/8 and 3/8
value = 2 * (f[0] * P[0] + f[1] * P[1])  # 1.125


# %% exercise 3
def most_kept(D, O, r, E, share):
    router, expert = E * D, r * (D + O)
    return int((share * (router + E * expert) - router) / expert)
