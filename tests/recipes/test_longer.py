"""A run that is asked for more steps than it was planned for."""

from tiny_model import train, write_config, write_model, write_rows


def test_a_rate_that_jumps_is_told(tmp_path, capsys):
    made = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 16)
    held_out = write_rows(tmp_path / "held_out.jsonl", 4, seed=1)
    schedule = {"name": "cosine", "min_ratio": 0.1}
    file = write_config(
        tmp_path / "config.yaml", *made, held_out, steps=4, checkpoint={"every": 2}, schedule=schedule
    )

    def rates(*more):
        return [row["lr"] for row in train("full_sft", "--config", file, *more) if "lr" in row]

    even = "schedule.name=constant", f"output_dir={tmp_path}/even"
    assert len(rates(*even)) == 4 and len(rates(*even, "steps=8")) == 8
    short = rates()
    assert "the learning rate rises" not in capsys.readouterr().out
    longer = rates("steps=8")
    told = f"step 5: the learning rate rises from {short[3]:.3g} to {longer[4]:.3g} at once"
    assert longer[4] > 2 * short[3] and capsys.readouterr().out.count(told) == 1
