# %% exercise 1
# P: both tasks were at their best when they were learned: ((.48 - .50) + (.50 - .52)) / 2
# Q: ((.72 - .94) + (.84 - .96)) / 2; but its first task's best is .96, after the second
bwt_of = {"P": -0.02, "Q": -0.17}
forgetting_of = {"P": 0.02, "Q": 0.18}
forgets_more = "Q"
keep = "Q"  # ACC .84 against .51: P has little to forget


# %% exercise 2
def verdict(a: list[float], b: list[float]) -> str:
    names = {"supported": "a", "refuted": "b", "inconclusive": "not told"}
    return names[Comparison("a above b", list(a), list(b)).verdict]


# %% exercise 3
baseline = "class_mean"
share = (0.70 - split["class_mean"]) / (split["joint"] - split["class_mean"])  # below 0
