"""What decides whether a figure of tools/bench counts, and which one is shown, against rows made by hand.

Nothing saw it when these were wrong: a contender that computes something else may agree, and a ratio stand upside down.
"""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SCRIPTS = ("sft", "common", "budgets", "kernels", "packed", "table", "parallel", "headline")


@pytest.fixture(scope="module")
def bench():
    """The scripts as modules; some of their names are those of other modules in the tests."""
    path, others = list(sys.path), {name: sys.modules.pop(name) for name in list(sys.modules) if _script(name)}
    sys.path.insert(0, str(BENCH))
    found = {name: __import__(name) for name in SCRIPTS}
    sys.path[:] = path
    for name in filter(_script, list(sys.modules)):
        del sys.modules[name]
    sys.modules |= others
    return type("Bench", (), found)


def _script(name: str) -> bool:
    return (BENCH / f"{name.split('.')[0]}.py").is_file()


WORK = {"shape": "llama-3.1-8b", "method": "lora", "rows": 2, "seq_len": 4096, "recompute": "none"}


def row(contender="peer", speed=1000, loss=(2.0, 1.9), norm=(1.0, 1.1), peak=10.0, **more):
    found = {"contender": contender, "work": WORK, "tokens_per_s": speed, "loss": list(loss), "grad_norm": list(norm)}
    return found | {"peak_gib": peak} | more


@pytest.mark.parametrize(
    ("loss", "norm", "work", "agrees"),
    [
        ((2.0038, 1.9), (1.019, 1.0), {}, True),
        ((2.0, 1.9039), (1.0, 1.0), {}, False),  # the second loss counts
        ((1.9958, 1.9), (1.0, 1.0), {}, False),  # lower is no better
        ((2.0, 1.9), (1.021, 1.0), {}, False),
        ((2.0, 1.9), (0.979, 1.0), {}, False),
        ((2.009, 1.9), (1.09, 1.0), {"fp8": "rowwise"}, True),  # otherwise rounded
        ((2.0, 1.9), (1.09, 1.0), {"qat": "int4"}, True),
        ((2.011, 1.9), (1.0, 1.0), {"fp8": "rowwise"}, False),
        ((2.0, 1.9), (0.89, 1.0), {"fp8": "rowwise"}, False),
    ],
)
def test_who_agrees(bench, loss, norm, work, agrees):
    judged = bench.sft.judge(row(speed=500, loss=loss, norm=norm, work=WORK | work), row("ftlib", 1000))
    assert judged["agrees"] is agrees and judged["ratio"] == 2.0
    assert judged["grad_gap"] == pytest.approx(abs(norm[0] - 1.0))


def test_both_of_another_kind_are_alike_again(bench):
    both = [row(work=WORK | {"fp8": "rowwise"}, loss=(loss, 1.9)) for loss in (2.0, 2.009)]
    assert not bench.sft.judge(both[1], both[0])["agrees"]
    assert bench.sft.judge({"failed": "x"}, both[0]) == {} == bench.sft.judge(both[0], {"failed": "x"})


def test_of_several_gpus_every_step_agrees(bench):
    one = row(speed=1000, loss=(2.0, 1.9, 1.8), norm=(1.0, 1.0, 1.0))
    for loss, norm, agrees in (
        ((2.003, 1.9, 1.8), (1.0, 1.0, 1.019), True),
        ((2.0, 1.9, 1.805), (1.0, 1.0, 1.0), False),
        ((2.0, 1.9, 1.8), (1.0, 1.021, 1.0), False),
    ):
        judged = bench.parallel.judge(row(speed=3000, loss=loss, norm=norm), one)
        assert judged["agrees"] is agrees and judged["times_one"] == 3.0


def test_a_speed_is_compared_with_fewer_gpus_only(bench):
    rows = {f"70b/fsdp@{n}": row(speed=1000.0 * n) | {"grad_norm": [1.0]} for n in (1, 2, 8)}
    rows["70b/fsdp@2"]["tokens_per_s"] = 1600.0
    assert bench.headline.compared("70b/fsdp@8", rows) == {"times_1": 8.0, "times_2": 5.0}
    assert bench.headline.compared("70b/fsdp@2", rows) == {"times_1": 1.6}
    rows["70b/fsdp-tp2@8"] = row(speed=4000.0, loss=(2.1, 1.9)) | {"grad_norm": [1.0]}
    assert bench.headline.compared("70b/fsdp-tp2@8", rows)["agrees"] is False


def test_the_useful_work_of_a_known_model(bench):
    """Llama-3.1-8B without its embedding, and scores of 32 layers of 32 heads of 128."""
    scores = 6 * 4096 * 4096 * 32
    for method, factor in (("lora", 4), ("full", 6)):
        found = bench.sft.mfu(row(speed=10_000, work=WORK | {"method": method}))
        rate = 10_000 * (factor * 7_504_658_432 + scores)
        assert found["mfu_measured"] == pytest.approx(rate / 744e12, abs=6e-4)
        assert found["mfu_datasheet"] == pytest.approx(rate / 989e12, abs=6e-4)


def report(bench, capsys, *given, **more):
    bench.common.report("x", WORK | {"rows": 1, "seq_len": 100}, *given, {}, **more)
    return json.loads(capsys.readouterr().out.removeprefix("ROW "))


def test_a_row_s_speed_is_the_median_s_of_the_timed_steps(bench, capsys, monkeypatch):
    """The first five are none of them: 4 to warm up, and the one behind, in which the peak is forgotten."""
    monkeypatch.setattr(bench.common, "peak_gib", lambda: 1.0)
    timed = [0.5, 0.4, 0.2, 0.9, 1.0, 0.6, 0.7, 0.3, 1.2, 0.8, 1.1, 0.1]
    seconds = [9.0, 9.0, 9.0, 9.0, 9.0, *timed]
    found = report(bench, capsys, seconds, [(2.0, 1.0)] * 3)
    assert (found["tokens_per_s"], found["step_ms"], found["first_step_s"]) == (143, 700.0, 9.0)
    assert found["spread"] == 1.571 and found["loss"] == [2.0, 2.0]
    found = report(bench, capsys, seconds, [(2.0, 1.0)] * 3, tokens=[1] * 5 + [round(1000 * t) for t in timed])
    assert found["tokens_per_s"] == 1000, "by each step's own tokens"


def test_a_row_of_reinforcement_learning_leaves_the_first_step_out(bench, capsys):
    bench.common.report_steps("x", WORK, [{"step_s": s} for s in (9.0, 1.0, 3.0, 2.0)], {})
    found = json.loads(capsys.readouterr().out.removeprefix("ROW "))
    assert (found["first_step_s"], found["step_s"]) == (9.0, 2.0)


def test_each_token_predicts_its_successor(bench):
    assert bench.common.shifted(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist() == [[2, 3, -100], [5, 6, -100]]


def test_the_table_of_budgets(bench):
    """The fastest that fits; of two runs the slower; who does not agree counts nowhere."""
    rows = [
        row("ftlib", 1200, peak=30.0, setting="none", agrees=True),
        row("a", 1000, peak=20.0, setting="none", agrees=True),
        row("b", 800, peak=20.0, setting="none", agrees=True),
        row("b", 5000, peak=5.0, setting="full", agrees=False),
        row("ftlib", 600, peak=16.05, setting="full", agrees=True),
        row("ftlib", 1100, peak=30.0, setting="none", agrees=True),
        {"contender": "c", "failed": "x"},
    ]
    found = bench.budgets.table(rows, [16.0, 20.0, 40.0])
    assert found[0] == "| GiB | ftlib | a | b | ours / best peer |"
    assert found[2:] == [
        "| 16 | does not fit | does not fit | does not fit |  |",
        "| 20 | 600 (16.1, full) | 1,000 (20.0, none) | 800 (20.0, none) | 0.600 |",
        "| 40 | 1,100 (30.0, none) | 1,000 (20.0, none) | 800 (20.0, none) | 1.100 |",
    ]


def test_the_table_of_the_readme(bench, tmp_path, monkeypatch):
    """Ours by its slower run, peers that agree, of a work on both GPUs the H200's."""
    monkeypatch.setattr(bench.table, "RESULTS", tmp_path)

    def write(name, scale, *rows):
        rows = [r | {"device": f"NVIDIA {name[:4].upper()} x", "tokens_per_s": scale * r["tokens_per_s"]} for r in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))

    ours = row("ftlib", 1200, agrees=True), row("ftlib", 1100, agrees=True)
    write("h100_a", 1, *ours)
    write("h200_a", 2, ours[0], row("trl", 900, agrees=True), row("unsloth", 9000, agrees=False), ours[1])
    write("h100_b", 1, *[r | {"work": WORK | {"recompute": "selective", "quantize": "nf4"}} for r in ours])
    assert [line.split(" | ")[1:] for line in bench.table.lines()[2:]] == [
        ["2,200 (10.0)", "", "", "1,800 (10.0) |"],
        ["1,100 (10.0)", "", "", " |"],
    ]
    titles = [line.split(" | ")[0] for line in bench.table.lines()[2:]]
    assert titles == [
        "| llama-3.1-8b lora, 2 x 4096, nothing recomputed, H200",
        "| llama-3.1-8b lora on nf4, 2 x 4096, elementwise recomputed, H100",
    ]


def test_an_error_is_the_largest_and_the_truth_is_float64(bench):
    exact = [torch.tensor([3.0, 4.0]).double(), torch.tensor([1.0]).double()]
    assert bench.kernels.largest([torch.tensor([3.0, 4.5]), torch.tensor([1.02])], exact) == pytest.approx(0.1)
    product = ModuleType("case")
    product.operands = lambda make: (torch.tensor([1.0, 1e-4, 3.0], dtype=torch.bfloat16).requires_grad_(),)
    product.exact, product.plain = None, lambda x: (x.sum() ** 2 / 3,)
    (out,), (slope,) = bench.kernels.truth(product, torch.device("cpu"))
    total = 4.0 + float(torch.tensor(1e-4, dtype=torch.bfloat16))
    assert out.dtype == slope.dtype == torch.float64 and out.item() == pytest.approx(total**2 / 3, rel=1e-12)
    assert slope.tolist() == pytest.approx([2 * total / 3] * 3, rel=1e-12)


def test_steps_of_real_documents_are_of_one_size(bench):
    lengths = np.random.default_rng(0).integers(10, 400, 300)
    line = np.arange(300).reshape(6, 50)
    dealt = bench.packed.level(line, lengths)
    held = lengths[dealt].sum(1)
    assert sorted(dealt.ravel()) == list(range(300)) and held.max() - held.min() < 8
    assert all((np.diff(lengths[step]) <= 0).all() for step in dealt)


def test_the_first_token_of_a_document_is_nobody_s_target(bench, tmp_path, monkeypatch):
    """Side by side, it would be predicted from the document before."""

    class Documents:
        lengths = np.full(8, 5)

        def __len__(self):
            return 8

        def masked(self, i):
            return np.full(5, i), np.ones(5, bool)

    monkeypatch.setattr(bench.packed.data, "load", lambda *_, **__: SimpleNamespace(train=Documents()))
    monkeypatch.setattr(bench.packed.tokenizers, "from_pretrained", lambda _: SimpleNamespace(chat_template="x"))
    bench.packed.prepare(tmp_path / "a.npz", ["x.jsonl"], "", None, {"rows": 2, "seq_len": 10, "steps": 2})
    with np.load(tmp_path / "a.npz") as arrays:
        trained, ids, about = (
            arrays["trained"].reshape(8, 5),
            arrays["ids"].reshape(8, 5),
            json.loads(str(arrays["about"])),
        )
    assert not trained[:, 0].any() and trained[:, 1:].all() and sorted(ids[:, 0]) == list(range(8))
    assert (about["tokens"], about["trained"], about["documents_per_step"]) == (40, 0.8, 4)
