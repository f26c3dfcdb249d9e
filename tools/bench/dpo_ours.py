"""Our contender for preferences: the gradients of recipes/dpo.py, with and without one copy of each pair's prompt."""

import common
import numpy as np
import ours

import ftlib
from ftlib import optim, plugins
from ftlib.data import Preferences
from ftlib.data.documents import Documents, SourceInfo
from ftlib.data.store import MemoryWriter
from ftlib.preference import reference
from ftlib.preference.objective import resolve
from ftlib.sections import Dpo

RECIPE = plugins.load_file(common.ROOT / "recipes" / "dpo.py")


def main() -> None:
    work = common.job()
    model, run, cfg = ours.build_model(work)
    optimizer, objective = optim.build(model, cfg.optim), resolve(Dpo())
    refer = reference.switched(None, objective)
    pairs = Preferences(documents(work), shared=work["share"])
    length = int(pairs.lengths[0])

    def step(number: int) -> tuple[float, float]:
        first = number * work["pairs"]
        rows = [[first + i] for i in range(work["pairs"])]
        batch = pairs.batch(rows, length, 0, 1)
        loss, _ = RECIPE.backward(model, [batch], objective, refer, 0.0, work["pairs"], run)
        return loss.item(), optim.step(optimizer, None).item()

    checks, seconds = [], []
    for number in range(common.WARM + common.TIMED + 1):
        if number == common.WARM:
            common.forget_peak()
        start = common.wait()
        checks.append(step(number))
        seconds.append(common.wait() - start)
    common.report("ftlib", work, seconds, checks, {"ftlib": ftlib.__version__})


def documents(work: dict) -> Documents:
    """The pairs of all steps, as the data pipeline holds them."""
    writer, answer = MemoryWriter(["drawn"]), work["answer_tokens"]
    prompt = work["prompt_tokens"]
    trained = np.arange(prompt + 2 * answer) >= prompt
    for number, (ids, chosen, rejected) in enumerate(common.pairs(work)):
        tokens = np.array([*ids, *chosen, *rejected], np.int32)
        writer.add(tokens, trained, 0, number, None, (float(prompt), float(answer), 0.0))
    return Documents([writer.finish()], sources=(SourceInfo("drawn", "drawn"),))


if __name__ == "__main__":
    main()
