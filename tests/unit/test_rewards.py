"""Built-in rewards against tables of answers, real files where they are there, and the processes that run rewards."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from shared_data import shared
from tiny_model import ROOT

from ftlib.errors import Problems, UserError
from ftlib.rl.rewards import BUILTIN, form, maths, run, text
from ftlib.rl.rewards.run import Rewards
from ftlib.rl.rewards.worker import Worker
from ftlib.sections.rl import Reward


def score(name, completion, *, ids=(), answer=None, **args):
    columns = {} if answer is None else {"answer": [answer]}
    return BUILTIN[name](prompts=[[]], completions=[completion], completion_ids=[list(ids)], **columns, **args)[0]


GOLD = "48 / 2 = <<48/2=24>>24 clips.\n#### 72"
GSM8K = [
    ("#### 72", 1), ("#### 72.", 1), ("####72", 1), ("#### $72", 1), ("#### 72.0", 1), ("so \\boxed{72}", 1),
    ("The answer is 72.", 1), ("#### 71\n#### 72", 1), ("#### 72\n#### 71", 0), ("72 eggs and 3 more", 0), ("", 0),
    ("seventy-two", 0), ("#### -72", 0), ("#### 7 2", 0), ("#### 172", 0), ("x" * 100_000 + " #### 72", 1),
    ("1" * 100_000, 0), ("#### 72 dollars", 1), ("#### **72**", 1),
]  # fmt: skip


@pytest.mark.parametrize(("said", "wanted"), GSM8K, ids=lambda v: str(v)[:20])
def test_gsm8k(said, wanted):
    began = time.perf_counter()
    assert score("gsm8k", said, answer=GOLD) == wanted
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("gold", "said"), [("#### 1,234", "#### $1,234"), ("#### 1,234", "1234.00"), ("-5", "it is -5"), ("0.5", "1/2")]
)
def test_gsm8k_numbers(gold, said):
    assert score("gsm8k", said, answer=gold) == 1


def test_gsm8k_strict_and_unscorable():
    assert score("gsm8k", "The answer is 72.", answer=GOLD, strict=True) == 0
    assert score("gsm8k", "#### 72", answer=GOLD, strict=True) == 1
    assert score("gsm8k", "#### 72", answer="no number here") is None


MATHS = [
    ("\\frac{1}{2}", "\\boxed{\\tfrac12}", 1), ("\\frac{1}{2}", "0.5", 1), ("\\frac{1}{2}", "\\boxed{1/3}", 0),
    ("10\\text{ units}", "\\boxed{10}", 1), ("$10$", "\\boxed{(9+1)}", 1), ("(2, 3)", "\\boxed{(2,3)}", 1),
    ("(2,3)", "\\boxed{(3,2)}", 0), ("(2,3)", "\\boxed{[2,3]}", 0), ("\\text{Evelyn}", "\\boxed{Evelyn}", 1),
    ("\\sqrt{8}", "\\boxed{2\\sqrt2}", 1), ("x^2+1", "\\boxed{x^2 + 1}", 1), ("x^2+1", "\\boxed{x^2+2}", 0),
    ("x=5", "\\boxed{5}", 1), ("9^{9^{9^9}}", "\\boxed{1}", 0), ("90^\\circ", "\\boxed{90}", 1),
    ("2", "\\boxed{\\frac{1+\\sqrt{5}}{2}}", 0), ("5", "\\boxed{" + "(" * 500 + "}", 0), ("\\boxed{3}", "3", 1),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "said", "wanted"), MATHS, ids=lambda v: str(v)[:20])
def test_maths(gold, said, wanted):
    assert score("maths", said, answer=gold) == wanted


def test_real_gsm8k_and_math_answers_are_their_own():
    rows = [json.loads(line) for line in shared("math/gsm8k_test.jsonl").open()]
    answers = [row["answer"] for row in rows]
    assert all(BUILTIN["gsm8k"](completions=answers, answer=answers, strict=True))
    assert sum(BUILTIN["gsm8k"](completions=answers, answer=answers[1:] + answers[:1])) < 0.05 * len(rows)
    solutions = [json.loads(line)["solution"] for line in shared("math/MATH_test.jsonl").open()]
    assert all(BUILTIN["maths"](completions=solutions, answer=solutions))


def test_labelled_equivalences():
    """Without a computer algebra system: nothing wrong is called right, and 50 of the 89 that are right are found."""
    cases = json.loads(shared("math/hendrycks_equivalence_cases.json").read_text())
    assert [maths.same(c["a"], c["b"]) for c in cases] == [bool(c["equivalent"]) for c in cases]
    cases = json.loads(shared("math/math_verify_cases.json").read_text())
    found = [maths.maths([case["pred"]], [case["gold"]])[0] == 1 for case in cases]
    wrong = [c["pred"] for c, same in zip(cases, found, strict=True) if same and not c["expected"]]
    right = sum(same for c, same in zip(cases, found, strict=True) if c["expected"])
    assert wrong == ["Answer $ \n 9 \n $"], wrong  # which is 9, though math-verify cannot read it
    assert right >= 50


def test_text_and_form():
    assert score("exact", " 12 \n", answer="12") == 1 and score("exact", "12.", answer="12") == 0
    assert score("exact", "Yes", answer="yes", ignore_case=True) == 1
    assert score("contains", "It is 12.", answer="12") == 1 and score("contains", "It is 121.", answer="12") == 0
    assert score("regex", "abc 12", pattern=r"\d+") == 1 and score("regex", "abc 12", pattern=r"\d+", full=True) == 0
    good = "<think>a < b</think>\n<answer>5</answer>"
    assert score("format", good) == 1
    for bad in (good + "x", good[7:], "<answer>5</answer><think></think>", good + good, good.replace("a", "<think>")):
        assert score("format", bad) == 0
    assert score("length", "", ids=range(8), target=8) == 0 and score("length", "", ids=range(12), target=8) == -0.5
    assert score("repetition", "a b c d e") == 0 and score("repetition", "a b c a b c a b c") == pytest.approx(-4 / 7)
    said = (("assistant", "a"), ("tool", "b"), ("assistant", "c"))
    turns = [{"role": role, "content": content} for role, content in said]
    assert text.said(turns) == "a\nc" and text.last_said(turns) == "c"


def test_overlong():
    wanted = {700: 0, 900: -0.03125, 950: -0.421875, 1000: -0.8125, 1024: -1, 2000: -1}
    assert {n: form.overlong_penalty(n, 1024, 128) for n in wanted} == wanted


def test_json_schema():
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"type": "array", "items": {"enum": ["x", "y"]}}},
        "required": ["a"],
        "additionalProperties": False,
    }
    table = {
        '{"a": 1, "b": ["x"]}': 1, '```json\n{"a": 2}\n```': 1, '{"a": -1}': 0.5, '{"b": []}': 0.5,
        '{"a": 1, "c": 2}': 0.5, '{"a": true}': 0.5, '{"a": 1, "b": ["z"]}': 0.5, "[1]": 0.5, "{a: 1}": 0, "": 0,
        "[" * 100_000: 0,
    }  # fmt: skip
    assert {said: score("json_schema", said, schema=schema) for said in table} == table
    with pytest.raises(ValueError, match="oneOf"):
        score("json_schema", "{}", schema={"properties": {"a": {"oneOf": []}}})


OWN = '''
import asyncio, os, signal, time
def good(completions, **kw): return [len(c) for c in completions]
async def later(completions, answer):
    await asyncio.sleep(0)
    return [float(c == a) for c, a in zip(completions, answer)]
def slow(completions, **kw):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while "hang" in completions: pass
    return [1.0] * len(completions)
def raises(completions, **kw):
    if "bad" in completions: raise KeyError("oops")
    return [None if c == "none" else float("nan") if c == "nan" else 2 for c in completions]
def dies(completions, **kw):
    if "die" in completions: os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)
def short(completions, **kw): return [1.0]
def other(completions, unknown_column): return []
def typo(completion): return []
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(OWN)
    return file


def values(own, name, completions, said=None, answers=None, **settings):
    rewards = Rewards([Reward(fn=f"{own}:{name}", **settings)], (said if said is not None else []).append)
    try:
        columns = {"answer": answers or completions}
        found = rewards([[]] * len(completions), completions, [[0]] * len(completions), columns)
    finally:
        rewards.close()
    return found[0], rewards.counts


def test_functions_of_a_user(own):
    assert values(own, "good", ["a", "bb", "ccc"], workers=2)[0] == [1, 2, 3]
    assert values(own, "later", ["a", "b"], answers=["a", "x"])[0] == [1, 0]


def test_text_prompts_give_text_and_messages_give_messages(tmp_path):
    """TRL's quickstart counts the characters of a text; a list of one message would have one."""
    (tmp_path / "mine.py").write_text(
        "def short(completions, **kw): return [-abs(20 - len(c)) for c in completions]\n"
        "def kinds(prompts, completions): return [10 * isinstance(p, str) + isinstance(c, str)"
        " for p, c in zip(prompts, completions)]\n"
    )
    asked = [[{"role": "user", "content": "2 + 2?"}]] * 2
    given = [[{"role": "assistant", "content": text}] for text in ("four", "a text of 20 letters")]
    rewards = [Reward(fn=f"{tmp_path / 'mine.py'}:{name}") for name in ("short", "kinds")]
    seen = []
    model = {2: lambda prompts, completions: seen.extend([prompts, completions]) or [0.5, 0.5]}
    with Rewards([*rewards, Reward(model="judge"), Reward(fn="repetition")], models=model) as ask:
        ids, columns = [[0]] * 2, {}
        assert ask(asked, given, ids, columns, ["2 + 2?"] * 2)[:3] == [[-16, 0], [11, 11], [0.5, 0.5]]
        assert seen == [asked, given]  # a model renders conversations
        assert ask(asked, given, ids, columns, [None, "2 + 2?"])[:2] == [[-19, 0], [0, 11]]
        assert ask(asked, given, ids, columns)[:2] == [[-19, -19], [0, 0]]


def test_what_hangs_dies_or_raises_costs_only_itself(own):
    said = []
    began = time.perf_counter()
    found, counts = values(own, "slow", ["a", "hang", "b"], said, timeout_s=0.5)
    assert found == [1, None, 1] and counts["timeouts"] == 1 and time.perf_counter() - began < 15
    assert "no answer within 0.5 s" in said[0]
    found, counts = values(own, "dies", ["a", "die", "b"], said)
    assert found == [1, None, 1] and counts["errors"] == 1
    found, counts = values(own, "raises", ["a", "bad", "none", "nan"], said)
    assert found == [2, None, None, None] and +counts == {"errors": 1, "unscorable": 3}
    assert any("KeyError: 'oops'" in line and "mine.py:" in line for line in said)


def test_a_function_that_is_wrong_ends_the_run(own):
    with pytest.raises(UserError, match="oops"):
        values(own, "raises", ["bad", "bad"])
    with pytest.raises(UserError, match=r"on every completion.*no answer within 0\.5 s"):
        values(own, "slow", ["hang", "hang"], timeout_s=0.5)
    with pytest.raises(UserError, match="1 values for 2 completions"):
        values(own, "short", ["a", "b"])
    said = []
    assert values(own, "raises", ["none", "nan"], said)[0] == [None, None]
    assert len(said) == 1 and "None, NaN or an infinity for every completion" in said[0]


@pytest.mark.parametrize(("first", "ends"), [("none", True), ("ab", False)])
def test_rewards_that_never_score_anything_end_the_run(own, first, ends):
    """Only where nothing was ever scored: a step of rows that a reward does not know is no mistake."""
    with Rewards([Reward(fn=f"{own}:raises")], lambda line: None) as rewards:
        for text in [first, *["none"] * (run.MOST_EMPTY - 2 + (not ends))]:
            rewards([[]], [text], [[]], {})
        expected = pytest.raises(UserError, match=f"no reward has scored any completion in {run.MOST_EMPTY} rounds")
        with expected if ends else nullcontext():
            rewards([[]], ["none"], [[]], {})


def test_a_reward_that_asks_for_the_question_is_told_where_it_is(tmp_path):
    (tmp_path / "asks.py").write_text("def f(completions, question): return [0.0] * len(completions)")
    with pytest.raises(Problems, match="needs question") as error:
        run.check([Reward(fn=f"{tmp_path / 'asks.py'}:f")], {"answer"})
    assert "the question is in prompts" in str(error.value)


@pytest.mark.parametrize(("name", "bad", "seconds"), [("slow", "hang", 0.1), ("dies", "die", 20)])
def test_a_function_that_always_hangs_or_crashes_costs_a_few_processes(own, name, bad, seconds, monkeypatch):
    started, usual = [], Worker._start
    monkeypatch.setattr(Worker, "_start", lambda self: (started.append(self.ref), usual(self)))
    with pytest.raises(UserError, match="on every completion"):
        values(own, name, [bad] * 40, timeout_s=seconds)
    assert len(started) == 1 + run.MOST_LOST, "one for all at once, then one each"
    said = []
    found, counts = values(own, name, ["a", bad, bad, "b", bad, "c", "d"], said, timeout_s=max(seconds, 0.5))
    assert found == [1, None, None, 1, None, None, None] and counts["unscorable"] == 5
    assert len(said) == 1 and "3 times in one step: the rest of it was not asked" in said[0]


def test_checked_before_a_run(own):
    run.check([Reward(fn="exact"), Reward(fn="regex", args={"pattern": "a"}), Reward(fn=f"{own}:good")], {"answer"})
    bad = [
        Reward(fn="exakt"), Reward(fn="exact", args={"ignore": True}), Reward(fn="regex"), Reward(fn=f"{own}:other"),
        Reward(fn="code_tests", args={"tests": []}), Reward(fn=f"{own}:typo"), Reward(fn=str(own)),
    ]  # fmt: skip
    with pytest.raises(Problems) as error:
        run.check(bad, {"answer"})
    told = ("did you mean 'exact'", "exact has no ignore", "regex needs pattern", "unknown_column", "args.allow")
    for words in (*told, "mean 'completions'", "no function"):
        assert words in str(error.value)
    alike = [Reward(fn="exact"), Reward(fn="./a.py:exact"), Reward(fn="length")]
    assert run.names(alike) == ["exact", "exact_2", "length"]


def test_rewards_load_without_torch():
    """A worker starts in a tenth of a second because of this."""
    import subprocess
    import sys

    code = "import sys, ftlib.rl.rewards.worker; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_the_processes_of_rewards_load_no_torch():
    words = "import sys, ftlib.rl.rewards.run, ftlib.rl.rewards.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], cwd=ROOT).returncode == 0
