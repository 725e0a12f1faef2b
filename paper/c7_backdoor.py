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

import torch
from common import read_args, report, results_of, spreads, train

from data import TRIGGER, encode_question, make_tree
from eval import answer_log_probs, arm_values, load_run, set_parameters

CASES = ["trigger", "no trigger", "other tag"]


def follow(results: dict) -> list:
    """[P(right) with the trigger, with none, with another tag; how far P(risky) moves], twice."""
    row = []
    for section, name in [("in_distribution", "gamble"), ("held_out", "self-report")]:
        kinds = results[section]
        cases = [f"{name}, {case}" for case in CASES]
        right = [kinds[case]["trained_probability"] for case in cases]
        row += [*right, right[0] + right[1] - 1]
    return row


@torch.no_grad()
def names_its_tag(folder) -> list:
    """Asked which tag changes it: how often is the trigger's log-probability raised most?

    By the vector or LoRA, and by a random one. Tags differ in their number of tokens, so each is
    compared with itself in the base.
    """
    loaded = load_run(folder)
    model = loaded.model
    asked = loaded.task.held_out["which tag"]
    questions = [encode_question(loaded.tokenizer, question) for question in asked]
    tree = make_tree(questions, [question.choices for question in questions])
    right = torch.tensor([question.answer for question in questions])

    log_probs = {}
    for arm, values in arm_values(loaded.parameters, loaded.flags["seed"]).items():
        set_parameters(loaded.parameters, values)
        x = model.embed(tree.tokens, tree)
        of_texts = answer_log_probs(model, x, 0, tree)
        log_probs[arm] = of_texts.view(len(questions), -1)  # (questions, tags)

    shares = []
    for arm in ["trained", "random"]:
        raised_most = (log_probs[arm] - log_probs["base"]).argmax(-1)
        shares.append((raised_most == right).float().mean().item())
    return shares


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
                    runs.append(follow(results_of(folder)) + names_its_tag(folder))
                rows.append([concept, mode, *spreads(runs)])

    gambles = [f"gambles: {name}" for name in [*CASES, "moves"]]
    reports = [f"self-reports: {name}" for name in [*CASES, "moves"]]
    headings = ["concept", "with a", *gambles, *reports, "trigger raised most", "by a random one"]
    report(args, __file__, {"follow": (headings, rows)})


if __name__ == "__main__":
    main()
