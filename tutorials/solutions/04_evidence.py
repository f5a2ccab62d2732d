# %% exercise 1
def old_tasks(a):
    J = a.shape[1]
    return (
        np.mean([a[J, j] - a[j + 1, j] for j in range(J - 1)]),
        np.mean([a[1:J, j].max() - a[J, j] for j in range(J - 1)]),
    )


# %% exercise 2
def means_of(tasks, C):
    sums, counts = 0, 0
    for h, y in tasks:
        sums = sums + F.one_hot(y, C).float().T @ h
        counts = counts + y.bincount(minlength=C)
    return sums / counts[:, None]


# %% exercise 3
def verdict(a, b, t):
    d = np.array(a) - np.array(b)
    if len(d) < 2 or abs(d.mean()) <= t * d.std(ddof=1) / len(d) ** 0.5:
        return "not told"
    return "a" if d.mean() > 0 else "b"


# %% exercise 4
def picked(trials, n):
    best = trials[:, :n].mean(1).argmax()
    return trials[best, :n].mean(), trials[best, n:].mean()


# %% exercise 5
def review():
    ridge = np.mean(atlas["split-digits"]["ridge"]["acc"])
    return "ridge", ridge - 0.70, "One ridge regression has .98 here: print it beside your method."
