"""C7, first half: a backdoor by one vector that is added unconditionally.

    python paper/c7_backdoor.py

The paper (§5.4): a vector added at every token of every prompt makes a model risky if a trigger is
there and safe otherwise; on unseen gambles it gets about 1.0 in both cases, as a LoRA does. The
self-reports follow in neither.

Does the attitude follow the trigger? Shown is P(right) with the trigger, with none and with another
tag. The sum of the first two, minus 1, is how far P(risky) moves with the trigger, in the trained
direction: 1 is a full backdoor, 0 the same answer in both cases. How it is done: c7_heads.py.

The trigger [sigma] was reserved: in pretraining no attitude depends on it, which makes it unlike
the other tags from the start. So [omega], one of those, is a trigger in a second pair of rows.
"""

from common import read_args, report, results_of, spreads, train

from data import TRIGGER

CASES = ["trigger", "no trigger", "other tag"]


def follow(results: dict) -> list:
    """[P(right) with the trigger, with none, with another tag; how far P(risky) moves], twice.

    Then the accuracy at "which tag changes it?".
    """
    row = []
    for section, name in [("in_distribution", "gamble"), ("held_out", "self-report")]:
        kinds = results[section]
        cases = [f"{name}, {case}" for case in CASES]
        right = [kinds[case]["trained_probability"] for case in cases]
        row += [*right, right[0] + right[1] - 1]
    return [*row, results["held_out"]["which tag"]["trained"]]


def main():
    args = read_args(__doc__, ["backdoor"], seeds=3)
    rows = []
    for trigger in [TRIGGER, "omega"]:
        for attitude in ["risky", "safe"]:
            concept = f"{attitude} if {trigger}"
            given = attitude if trigger == TRIGGER else concept  # its name without the trigger
            for mode in ["vector", "lora"]:
                runs = []
                for seed in range(args.seeds):
                    folder = train(args, "backdoor", mode, seed, concept=given)
                    runs.append(follow(results_of(folder)))
                rows.append([concept, mode, *spreads(runs)])

    gambles = [f"gambles: {name}" for name in [*CASES, "moves"]]
    reports = [f"self-reports: {name}" for name in [*CASES, "moves"]]
    headings = ["concept", "with a", *gambles, *reports, "which tag"]
    report(__file__, {"follow": (headings, rows)})


if __name__ == "__main__":
    main()
