"""Adapters in another library's models: no cell of tests/models.py is wrong, each error is one that
is expected, and the stored table says so."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")  # whose layers' names these are

from models import MODELS, SCHEMES, SITUATIONS, inputs, outcome, page, plain, rows, words
from transformers import BertConfig, BertModel

from minimoe.adapt import adapt, context, survey

PAGE = Path(__file__).parent.parent / "tutorials/results/models.md"
FAST = [("Llama", "LoRAMoE", situation) for situation in SITUATIONS if situation != "compile"]
FAST += [("GPT-2", "LoRA", situation) for situation in SITUATIONS if situation != "compile"]

# torch's own tracer makes an instance of autograd.Function, and torch's own Function warns
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# {(situation, scheme): (models, what the message says after the layer)}
NO_GRADIENT = r"its auxiliary loss was made without gradients; checkpoint with use_reentrant=False"
NO_FIT = r"mask is \(3, 6\), allowed for x \(3, 5, 16\): its first axes$"
TWO_LENGTHS = ["T5", "CLIP", "Whisper"]
ERRORS = {
    ("checkpointing reentrant", "LoRAMoE"): (list(MODELS), NO_GRADIENT),
    ("checkpointing reentrant", "SEMA"): (list(MODELS), NO_GRADIENT),
    ("padded batch left", "LoRAMoE"): (TWO_LENGTHS, NO_FIT),
    ("padded batch left", "SMoRA"): (TWO_LENGTHS, NO_FIT),
    ("padded batch left", "SEMA"): (TWO_LENGTHS, NO_FIT),
    ("padded batch right", "LoRAMoE"): (TWO_LENGTHS, NO_FIT),
    ("padded batch right", "SMoRA"): (TWO_LENGTHS, NO_FIT),
    ("padded batch right", "SEMA"): (TWO_LENGTHS, NO_FIT),
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


def unexpected(model, scheme, situation):
    """What is not as it should be in a cell; "" if all is."""
    models, message = ERRORS.get((situation, scheme), ([], ""))
    wanted = rf"error: [\w.]+ \({scheme}\): {message}" if model in models else "right$"
    got = outcome(model, scheme, situation)
    return "" if re.match(wanted, got) else f"{scheme}: {got}"


@pytest.mark.parametrize(("model", "scheme", "situation"), FAST)
def test_a_cell_is_right_or_an_expected_error(model, scheme, situation):
    assert not unexpected(model, scheme, situation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "situation"), [(model, s) for s in SITUATIONS for model in rows(s)]
)
def test_all_schemes_are_right_or_an_expected_error(model, situation):
    found = [unexpected(model, scheme, situation) for scheme in SCHEMES]
    assert not [reason for reason in found if reason]


@pytest.mark.slow
def test_the_stored_table_is_what_the_cells_say():
    assert words(PAGE.read_text(encoding="utf-8")) == words(page())


def test_the_stored_table_has_every_cell():
    cells = {(model, c, s) for s in SITUATIONS for model in rows(s) for c in SCHEMES}
    stored = words(PAGE.read_text(encoding="utf-8"))
    assert stored.keys() == cells and set(stored.values()) == {"right", "error"}
    for (model, scheme, situation), word in stored.items():
        models, _ = ERRORS.get((situation, scheme), ([], ""))
        assert (word == "error") == (model in models)


def test_mixtrals_experts_are_left_out_and_named():
    chosen, left_out = survey(plain("Mixtral"), r".*self_attn\.._proj|.*experts.*")
    assert len(chosen) == 2 * 4
    for block in range(2):
        experts = f"model.layers.{block}.mlp.experts"
        assert left_out[experts].endswith(
            "MixtralExperts, allowed: nn.Linear, transformers' Conv1D"
        )
        for name in ("gate_up_proj", "down_proj"):
            reason = left_out[f"{experts}.{name}"]
            assert reason == "a parameter of a MixtralExperts, and no layer"
    with pytest.raises(ValueError, match=r"experts is a .*MixtralExperts, allowed: nn\.Linear"):
        adapt(plain("Mixtral"), SCHEMES["LoRA"][0], r".*experts.*", rank=2)


@pytest.mark.parametrize("scheme", ["LoRAMoE", "SMoRA", "SEMA"])
def test_a_layer_of_pooled_samples_takes_no_mask_of_tokens(scheme):
    kind, settings = SCHEMES[scheme]
    net = BertModel(BertConfig(**MODELS["BERT"].config))
    adapt(net, kind, r".*(query|pooler\.dense)", **settings)
    words = inputs("BERT")["input_ids"]
    with (
        pytest.raises(ValueError, match=r"^pooler\.dense \(\w+\): mask is .* for x \(3, 16\): its"),
        context(net, mask=torch.ones_like(words)),
    ):
        net(words)
