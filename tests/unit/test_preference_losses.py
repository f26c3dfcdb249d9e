"""Preference losses: numbers worked out elsewhere, limits where they could break, the formula that is printed."""

import math

import pytest
import torch

from ftlib.errors import UserError
from ftlib.losses.preference import LOSSES, Pairs, Rated, Settings
from ftlib.losses.reward import bradley_terry, step_loss
from ftlib.preference.objective import resolve, try_own
from ftlib.sections import Dpo, methods

WIDE = {"dtype": torch.float64}
PAIRS = Pairs(
    chosen=torch.tensor([-12, -20.5], **WIDE),
    rejected=torch.tensor([-14.0, -18], **WIDE),
    ref_chosen=torch.tensor([-13.0, -20], **WIDE),
    ref_rejected=torch.tensor([-13.5, -19], **WIDE),
    chosen_len=torch.tensor([10.0, 12], **WIDE),
    rejected_len=torch.tensor([8.0, 15], **WIDE),
)
GOLDEN = {
    ("sigmoid", ()): (0.620957, 0.770957),
    ("cdpo", (("label_smoothing", 0.1),)): (0.635957, 0.755957),
    ("robust", (("label_smoothing", 0.1),)): (0.602207, 0.789707),
    ("hinge", ()): (0.85, 1.15),
    ("ipo", ()): (23.401406, 26.095069),
    ("ipo", (("average", False),)): (12.25, 42.25),
    ("sigmoid_norm", ()): (0.685055, 0.698579),
    ("nca_pair", ()): (1.350825, 1.424888),
    ("bco_pair", ()): (1.312856, 1.462856),
    ("sppo_hard", ()): (36.25, 66.25),
    ("apo_zero", ()): (0.962523, 1.037477),
    ("apo_down", ()): (0.987549, 1.024932),
    ("exo_pair", (("label_smoothing", 1e-3),)): (2.505517, 3.022554),
    ("discopop", ()): (0.849338, 0.789495),
    ("simpo", (("beta", 2.0),)): (0.644397, 2.141622),
    ("cpo", ()): (0.598139, 0.825939),
}


@pytest.mark.parametrize(("case", "wanted"), GOLDEN.items(), ids=lambda x: x[0] if isinstance(x[0], str) else "")
def test_golden_values(case, wanted):
    name, constants = case
    found = LOSSES[name](PAIRS, Settings(**dict(constants)))
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_golden_values_of_the_odds_ratio_and_of_rated_answers():
    assert (0.1 * LOSSES["orpo"](PAIRS, Settings())).tolist() == pytest.approx((0.039741, 0.108115), abs=1e-6)
    for answer, ref, good, wanted in (
        (PAIRS.chosen, PAIRS.ref_chosen, True, (0.482507, 0.519989)),
        (PAIRS.rejected, PAIRS.ref_rejected, False, (0.480011, 0.517493)),
    ):
        rated = Rated(answer, ref, torch.tensor([good, good]), 0.3)
        assert LOSSES["kto"](rated, Settings()).tolist() == pytest.approx(wanted, abs=1e-6)
    # Without a shift the two classes of bco are the halves of bco_pair.
    halves = [
        LOSSES["bco"](Rated(a, r, torch.tensor([good, good]), 0.0), Settings())
        for a, r, good in ((PAIRS.chosen, PAIRS.ref_chosen, True), (PAIRS.rejected, PAIRS.ref_rejected, False))
    ]
    assert torch.equal(sum(halves), LOSSES["bco_pair"](PAIRS, Settings()))


def test_sorted_losses_compare_distributions():
    """Worked out by hand: policy margins 2, -2.5, reference margins .5, -1; h_w 1, -.5, h_l -.5, 1."""
    for name, differences in (("aot", (-1.5, 1.5)), ("aot_unpaired", (0.0, 0.0))):
        wanted = [math.log1p(math.exp(-0.1 * d)) for d in differences]
        assert LOSSES[name](PAIRS, Settings()).tolist() == pytest.approx(wanted, abs=1e-12)


def test_every_loss_pulls_the_chosen_answer_up_or_the_rejected_one_down():
    for name in LOSSES:
        if methods.method(name).rated:
            continue
        given = {k: v.clone().requires_grad_() for k, v in vars(PAIRS).items() if k in ("chosen", "rejected")}
        x = Pairs(**{**vars(PAIRS), **given})
        up, down = torch.autograd.grad(LOSSES[name](x, Settings()).sum(), given.values(), allow_unused=True)
        slope = up.sum() - (0 if down is None else down.sum())
        assert slope < 0, name


@pytest.mark.parametrize("mean", [-1e-9, -1e-5, -math.log(2), -5.0, -80.0])
def test_odds_stay_finite_from_certain_to_hopeless(mean):
    length = torch.tensor([10.0])
    chosen = (length * mean).requires_grad_()
    x = Pairs(chosen, torch.tensor([-10.0]), None, None, length, length)
    loss = LOSSES["orpo"](x, Settings())
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(chosen.grad).all()


def test_log_ratios_far_from_zero_stay_finite():
    far = torch.tensor([-4000.0, 4000.0])
    zero = torch.zeros(2)
    for name in set(LOSSES) - {"discopop", "kto", "bco", "orpo"}:  # discopop is exponential by design
        chosen = far.clone().requires_grad_()
        loss = LOSSES[name](Pairs(chosen, zero, zero, zero, zero + 9, zero + 7), Settings())
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(chosen.grad).all(), name


def test_presets_resolve_every_constant_and_say_so():
    assert resolve(Dpo()).formula == "-ls(0.1 d)"
    simpo = resolve(Dpo(loss="simpo"))
    assert simpo.formula == "-ls(2 (p_w / L_w - p_l / L_l) - 1)" and not simpo.reference
    assert resolve(Dpo(loss="mpo")).formula.startswith("0.8 * [-ls(0.1 d)] + 0.2 * [-ls(0.1 h_w - mean reward)")
    assert resolve(Dpo(loss="mpo")).shifted and not resolve(Dpo(loss="kto")).shifted
    assert resolve(Dpo(loss="sigmoid", sft=0.5)).formula == "-ls(0.1 d) + 0.5 * [-p_w / L_w]"
    assert resolve(Dpo(loss={"sigmoid": 0.5, "hinge": 2}, beta=0.2)).formula == (
        "0.5 * [-ls(0.2 d)] + 2 * [relu(1 - 0.2 d)]"
    )
    assert resolve(Dpo(loss="ld_dpo")).length_alpha == 0.5 and resolve(Dpo(loss="wpo")).on_policy
    assert resolve(Dpo(loss="cdpo")).formula == "-0.9 ls(0.1 d) - 0.1 ls(-0.1 d)"
    assert resolve(Dpo(loss="kto")).mismatched and Dpo(loss="kto").rated and not Dpo(loss="orpo").rated
    for name in methods.NAMES:
        assert "{" not in resolve(Dpo(loss=name)).formula


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": "sigmod"}, "loss: there is no 'sigmod' (did you mean 'sigmoid'"),
        ({"loss": {"sigmoid": 1.0, "kto": 1.0}}, "they cannot be mixed"),
        ({"loss": {"kto": 1.0, "bco": 0.5}}, "loss: kto and bco subtract different baselines"),
        ({"loss": {}}, "at least one"),
        ({"gamma": 1.0}, "gamma: not a constant of sigmoid, but of simpo"),
        ({"label_smoothing": 0.1}, "label_smoothing: not a constant of sigmoid, but of cdpo, robust"),
        ({"loss": "exo_pair", "label_smoothing": 0.0}, "exo_pair needs at least 0.001"),
        ({"loss": "robust", "label_smoothing": 0.5}, "must be in [0, 0.5)"),
        ({"beta": 0.0}, "beta: must be above 0"),
        ({"loss": "dpo"}, "there is no 'dpo' (DPO itself is 'sigmoid')"),
        ({"loss": "./mine.py"}, "names a file and no function in it (write ./mine.py:function)"),
        ({"loss": {"sigmoid": 0.0}}, "one must be above 0"),
        ({"loss": {"sigmoid": 1.0, "sft": -1.0}}, "must not be negative"),
        ({"sft": -1.0}, "must not be negative"),
        ({"loss": "kto", "desirable": -1.0}, "must not be negative"),
        ({"loss": "bco", "desirable": 0.0, "undesirable": 0.0}, "one of them must be above 0"),
        ({"loss": "kto", "sft": 1.0}, "are for pairs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(ValueError) as error:
        Dpo(**settings)
    assert says in str(error.value)


def test_a_loss_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def squared(pairs, settings):\n    return (settings.beta * pairs.d - 1) ** 2\n")
    objective = resolve(Dpo(loss=f"{file}:squared", beta=0.5))
    (term,) = objective.terms
    assert term.loss(PAIRS, term.settings).tolist() == pytest.approx([(0.5 * 1.5 - 1) ** 2, (-0.5 * 1.5 - 1) ** 2])
    with pytest.raises(UserError, match="called with"):
        file.write_text("def squared(pairs):\n    return 0\n")
        resolve(Dpo(loss=f"{file.rename(tmp_path / 'other.py')}:squared"))


OWN_MISTAKES = {
    "raises": ("    return other(pairs)\n\ndef other(pairs):\n    return {}[0]", "KeyError: 0 ({file}:5)"),
    "raises inside torch": ("    import torch\n    return torch.cat([pairs.d, 3])", "TypeError: expected", ":3)"),
    "asks for what is not there": ("    return -pairs.logits", "no attribute 'logits'", "ref_chosen", "h_w, h_l, d"),
    "takes the mean": ("    return pairs.d.mean()", "returned values of shape [] for 3 pairs", "their mean over the"),
    "returns nothing": ("    pairs.d", "returned NoneType for 3 pairs"),
    "cuts the gradient": ("    return pairs.d.detach()", "without a gradient"),
}


@pytest.mark.parametrize("mistake", OWN_MISTAKES)
def test_a_mistake_in_a_loss_of_ones_own_is_told_with_file_line_and_key(tmp_path, mistake):
    body, *says = OWN_MISTAKES[mistake]
    file = tmp_path / "mine.py"
    file.write_text(f"def f(pairs, settings):\n{body}\n")
    objective = resolve(Dpo(loss=f"{file}:f"))
    with pytest.raises(UserError) as error:
        try_own(objective)
    assert error.value.where == "dpo.loss"
    for text in says:
        assert text.format(file=file) in str(error.value)


def test_golden_values_of_a_reward_model():
    found = bradley_terry(PAIRS.h_w, PAIRS.h_l, margin=0.5)
    assert found.tolist() == pytest.approx((0.313262, 2.126928), abs=1e-6)
    centred = bradley_terry(PAIRS.h_w, PAIRS.h_l, margin=0.5, centre=0.01)
    assert (centred - found).tolist() == pytest.approx((0.01 * 0.5**2, 0.01 * 0.5**2))
    logits = torch.tensor([[0.0, math.log(3)]], **WIDE)
    assert step_loss(logits, torch.tensor([1])).item() == pytest.approx(-math.log(0.75))
