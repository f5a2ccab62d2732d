# %% exercise 1
class Loudest(Adapter):
    claims = Claims(zero_at_birth=True, granularity="token", top_k=True, simplex=True)

    def __init__(self, base, rank=8, scale=1.0, top_k=8):
        self.top_k = top_k
        super().__init__(base, rank, scale)

    def gate(self, x):
        z = self.project(x, "A")  # (..., R)
        top, idx = z.abs().topk(self.kept)  # (..., k)
        return Gate(idx, top.softmax(-1), z.gather(-1, idx))

    def active(self):
        D, O = self.in_features, self.out_features
        return self.ranks * D + self.kept * O


# %% exercise 2
class Honest(Hearsay):
    # the mean is over a sample's tokens, and the weights sum to the number of ranks kept
    claims = Claims(zero_at_birth=True, granularity="sample", top_k=True, simplex="kept")


# %% exercise 3
class Ready(ReadyGate):
    def active(self):
        # every key and every b could change who is kept; of values, only the kept ones are read
        D, O = self.in_features, self.out_features
        return self.ranks * (D + 1) + self.kept * O
