# %% exercise 1
def query_and_value(numbers):
    return rf"encoder\.layer\.({numbers})\.attention\.self\.(query|value)"


# %% exercise 2
def nearest_mean(features, labels, new):
    classes = labels.unique()
    means = torch.stack([features[labels == c].mean(0) for c in classes])
    return classes[torch.cdist(new, means).argmin(-1)]


# %% exercise 3
def first_change(z, gradient, scale, lr):
    return -scale * lr * z @ gradient.sign()


# %% exercise 4
def breaking_scale():
    return 16.0
