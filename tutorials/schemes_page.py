"""The page of all schemes, results/schemes.md: what their own files say, and what the study atlas
measured. python tutorials/pages.py writes it.
"""

import inspect
import re
import sys

from minimoe.roster import ROSTER, SCHEMES
from minimoe.schemes import mixlora
from minimoe.studies.atlas import FEW
from minimoe.studies.common import ACC
from minimoe.studies.verdicts import judged, shared
from minimoe.tools.tables import short

# Methods that need no file: (name, arXiv id or "", how they are had here). Held to their own
# equations by tests/schemes/test_configurations.py.
CONFIGURATIONS = [
    ("MING-MOE", "2404.09027", "`LoRAMoE(experts=E, top_k=2)`: all experts from the start"),
    ("MoLoRA", "2309.05444", "`LoRAMoE(experts=E, top_k=E)`: a dense router"),
    ("Awaker2.5-VL", "2411.10669", "`AdaMoE(top_k=1)` with S = 0: the likelihood is the weight"),
    ("Residual MoE", "", "`LoRAMoE`: each expert's weight is W0 and a low-rank residual"),
    ("ExpertWeave", "", "`baselines.ToldLoRA` in `context(label=...)`: one batch, many adapters"),
    ("the grain of experts", "", "`LoRAMoE(experts=n, top_k=n·k)`: the same ranks, cut finer"),
    ("MoCE", "", "`MoCLE(tau=1e-12)`: the cluster's expert at weight 1, no universal one"),
    ("HydraLoRA", "2404.19245", "`MoSLD(dropout=0, top_k=E)`: one key matrix, a dense router"),
    ("TMoE of SPMTrack", "", "the same beside a `LoRA` of the same layer"),
    ("MoLA", "2402.08562", "`adapt(model, LoRAMoE, targets, experts=E)`, once for each E"),
    ("CLIP-UP", "", "`rules.upcycle(lora, E)`: copies of one LoRA, and a fresh router"),
]  # fmt: skip
# What a reader may write: (name, arXiv id, what it is, and what judges it).
EXERCISES = [
    (
        "pMoE",
        "2306.04073",
        "each expert picks its tokens in a sample; the law `granularity` breaks",
    ),
    ("ReMix", "2603.10160", "kept experts weigh the same, and REINFORCE trains the router"),
    ("FURINA", "2509.14900", "scores linear in x: it merges into one matrix, so its gate is 1"),
    ("MoSLoRA", "2406.11909", "a learned matrix between A and B: g is not diagonal any more"),
    ("eMoE", "", "predict the next batch's experts by the last's: 1 - `instability`"),
    ("RoMA", "2511.07419", "`auxiliary` draws a router to those of inputs that are alike"),
    ("DriftMoE", "2507.18464", "`auxiliary`: which experts were right, as BCE of the logits"),
    ("X-LoRA", "2402.07148", "`TrainedAlone.route` by a first pass without adapters"),
    ("KeepLoRA", "", "InfLoRA's P, less the main directions of W0 from the start"),
]
# What is not here, and why.
DECLINED = [
    ("ReXMoE's shared pool", "2510.17483", "needs layers of one shape; its schedule is here"),
    ("TreeLoRA", "2506.10355", "a tree of gradients and a bandit, 300 lines for one penalty"),
    ("L2P, DualPrompt, CODA-Prompt", "", "prompts, not adapters of a linear layer"),
    ("JumpLoRA, ELLA", "", "mask the whole update, which is then of no low rank"),
    ("SD-LoRA", "2501.13198", "one magnitude per task: CoDyRA's weights, one grain up, never zero"),
    ("GainLoRA", "2505.15424", "InfLoRA and a gate by the same projection; not read in code"),
    ("RanPAC, RAIL", "2307.02251, 2406.18868", "closed forms, the learner `ridge_features`"),
    ("Switch-DiT's mask", "", "tasks on a known scale share experts; a stream's order is none"),
    ("T2MIR's contrast", "", "needs other tasks in the batch; with their means it forgot more"),
    ("SLCA, ZSCL", "", "train the body, or need data of a reference domain"),
    ("SAPT", "2401.08295", "needs replayed samples, one gate for all layers"),
    ("HoME, DeepUnifiedMom, TMMOE, TaskExpert", "", "recommenders' and decoders' own parts"),
    ("BAM's attention experts", "", "attention heads, not linear layers"),
]  # fmt: skip


def page(atlas) -> str:
    """The page, of the study's stored result."""
    places = list(dict.fromkeys(row.split(", ")[0] for row in atlas.rows))
    known = {name: _rows(atlas, name, places) for name in SCHEMES}
    parts = [
        "# The schemes, one by one",
        "Written by `python tutorials/pages.py`: equations and words are those of each scheme's "
        "own file, numbers those of `minimoe study atlas` ([findings](../findings/findings.md)).",
        "## Final accuracy",
        f"Mean of {len(atlas.seeds)} seeds, of schemes of the atlas but `alone` of {FEW}; 1 at "
        "best; a dash where a scheme cannot live or was not run. Settings are each scheme's best "
        "of its trials on held-out data.",
        _table(known, places),
        "## Who is above MoRA, and who below",
        "By the verdicts of [findings](../findings/findings.md): at least "
        f"{short(ACC)} above, or below, over the seeds that both have, and told from 0, with the "
        "difference; all who may be above in a place are one family, all who may be below "
        "another. Those that are told the task at test are marked *.",
        *(_beside_mora(known, place) for place in places),
    ]
    for name, scheme in SCHEMES.items():
        parts += _scheme(name, scheme, known[name])
    head, tail = _of_file("mixlora", mixlora)
    parts += [
        *head,
        "It wraps an FFN and not a linear layer, so `compare` does not carry it."
        + _counts(mixlora.MixLoRA),
        *tail,
        "## Settings of what is there",
        "Held to their own equations by tests/schemes/test_configurations.py.",
        _list(CONFIGURATIONS),
        "## To be written by a reader",
        "At most fifteen lines each; `minimoe check` or the law that is named judges them.",
        _list(EXERCISES),
        "## Not here, and why",
        _list(DECLINED),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(atlas, name, places):
    return {place: row for place in places if (row := atlas.rows.get(f"{place}, {name}"))}


def _table(known, places):
    heads = [place.split(" under ")[-1].removesuffix("-digits") for place in places]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(places) + 1) + "|"]
    for name, rows in known.items():
        cells = [short(rows[place]["acc"].mean) if place in rows else "–" for place in places]
        lines.append(f"| [{name}](#{name}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside_mora(known, place):
    """Who is told from MoRA in a place, the furthest first."""
    mora = known["mora"][place]["acc"]
    others = [name for name, rows in known.items() if place in rows and name != "mora"]
    words = [f"**{place}**, mora {short(mora.mean)}."]
    for which, sign in (("Above", 1), ("Below", -1)):
        pairs = [(_runs(known[name][place]["acc"]), _runs(mora))[::sign] for name in others]
        family = [shared(name, *pair, ACC) for name, pair in zip(others, pairs, strict=True)]
        told = [v for v in judged(family) if v.verdict == "supported"]
        told.sort(key=lambda verdict: -verdict.effect)
        each = [
            f"{v.label}{'*' if ROSTER[v.label].privileged else ''} {short(v.effect)}" for v in told
        ]
        words.append(f"{which}: {', '.join(each) or 'none'}.")
    return " ".join(words)


def _runs(value):
    """An accuracy's values by seed, and those of its repeats."""
    every = [value.values, *(value.repeats or [])]
    return [[float("nan") if v is None else v for v in run] for run in every]


def _scheme(name, scheme, rows):
    """A scheme's heading, paper, equation, shape of its gate, parameters, life, results."""
    head, tail = _of_file(name, sys.modules[scheme.__module__])
    claims, counts = scheme.claims, _counts(scheme)
    weight = {"rank": "each rank has a weight", "block": "each LoRA has a weight"}[claims.expert]
    shape = [weight, f"of its {claims.granularity} alone" if claims.granularity != "batch" else ""]
    shape += ["at most `top_k` speak"] if claims.top_k else []
    sums = {True: "weights sum to 1", "kept": "weights sum to k", False: ""}
    shape += [sums[claims.simplex], "" if claims.equation else "not the one equation"]
    lines = [*head, f"Gate: {', '.join(filter(None, shape))}.{counts}", *tail]
    if rows:
        place, row = next(iter(rows.items()))
        numbers = ", ".join(
            f"{what} {row[what].mean:,.0f}" for what in ("stored", "read", "speaking")
        )
        accs = ", ".join(f"{place} {spread(row['acc'])}" for place, row in rows.items())
        lines.append(f"On {place}: {numbers} numbers. Final accuracy: {accs}.")
    return lines


def _of_file(name, module):
    """What stands before a scheme's gate, its heading, paper and equation, and what after, its life
    and departures."""
    path = module.__name__.replace(".", "/") + ".py"
    paper, equations, *after = _parts(module.__doc__)
    head = [f"## {name}", f"[{path}](../../{path}). {' '.join(paper.split())}"]
    head += [f"```text\n{equations}\n```"] if equations else []
    return head, [" ".join(part.split()) for part in after if part]


def _counts(scheme):
    found = re.search(r"Parameters: (.*?)(?:\n\n|Args|$)", inspect.getdoc(scheme) + "\n\n", re.S)
    return f" Parameters: {' '.join(found[1].split())}" if found else ""


def _parts(doc):
    """(title and paper, equation, life, departures) of a module's docstring."""
    parts = re.split(r"\n\n(?=\S)", doc.strip())
    of = {key: next((p for p in parts if p.startswith(key)), "") for key in ("Life", "Departures")}
    equation = next((p for p in parts if re.search(r"^    \S.* = ", p, re.M)), "")
    blocks = re.findall(r"(?:^    .*\n?|^\n)+", equation + "\n", re.M)
    lines = "".join(blocks).strip("\n")
    return " ".join(parts[:2]), "\n".join(line[4:] for line in lines.split("\n")), *of.values()


def spread(value):
    """A mean with half its interval, as README has it too."""
    if value.mean is None:
        return "–"
    return short(value.mean) + ("" if value.half is None else f" ± {short(value.half)}")


def _list(entries):
    return "\n".join(
        f"- **{name}**{f' (arXiv {paper})' if paper else ''}: {words}"
        for name, paper, words in entries
    )
