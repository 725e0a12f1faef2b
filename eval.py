"""Scoring: does the model answer kinds of question that it was never trained on?

    python eval.py RUN_DIR ...                         score finished runs again, print them side by side
    python eval.py RUN_DIR --prompt "People in ..."    answer with and without the intervention
    python eval.py --mean RUN_DIR ...                  average many runs, a table for each task
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from data import (DataError, EncodedQuestion, Task, Tokenizer, encode_question, in_context_question, make_task,
                  positions_mask)
from lora import load_lora, lora_layers
from model import GPT, CheckpointError, Config, find_checkpoint
from steer import SteeringVector, load_vector


class UsageError(ValueError):
    """A flag or a folder that cannot be used; the message is one line that names it and says what would be right."""


# ---------------------------------------------------------------------------------------------------- scoring


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1, unless torchrun has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_unfrozen(model: GPT, steering: SteeringVector | None) -> int:
    """The first block whose input depends on the vector, or which has a LoRA: whatever these hold, the residual stream
    before it is the same."""
    if steering is not None:
        return steering.layer + 1
    return min((int(name.split(".")[1]) for name in lora_layers(model)), default=0)


@torch.no_grad()
def frozen_residual(model: GPT, tokens: torch.Tensor, steering, first: int, attention_mask=None, cache=None):
    """The residual stream (B, T, d) of tokens (B, T) before block `first`, and before the vector is added to it."""
    if steering is not None:
        steering.mask = torch.zeros_like(tokens, dtype=torch.bool)  # its hook is on the way: it adds nothing
    return model.run_blocks(model.embed(tokens, attention_mask), 0, first, attention_mask, cache)


def hidden_from(model: GPT, residual: torch.Tensor, first: int, steering, mask, at, attention_mask=None, cache=None):
    """Goes on from a frozen_residual (B, T, d): (B, A, d) after the final norm, at the positions `at` (B, A) alone.
    mask: where the vector is added."""
    if steering is not None:
        steering.mask = mask
        residual = steering(residual)  # as its hook does, which hangs on a block that is not run here
    return model.norm(model.run_blocks(residual, first, None, attention_mask, cache, at=at))


def score(model: GPT, questions: list[EncodedQuestion], steering: SteeringVector | None = None,
          batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Which choice has the highest total log-probability after the prompt, for each question.

    Returns (correct, probability), both (len(questions),) float32: 1 where the right choice wins, and the probability
    that it gets among the choices. Works for any model without sampling.
    """
    return score_arms(model, questions, steering, [], {"as it is": []}, batch_size)["as it is"]


@torch.no_grad()
def score_arms(model: GPT, questions: list[EncodedQuestion], steering: SteeringVector | None,
               parameters: list[nn.Parameter], arms: dict[str, list[torch.Tensor]],
               batch_size: int = 64) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What score returns, for each arm: with `parameters` set to each of these values in turn. The last arm's stay.

    A prompt is computed once for all its choices, and below the vector or the LoRA once for all arms. Several processes
    share the questions out, unless the model is sharded: then they have to run its blocks together.
    """
    rank, world = (0, 1) if model.sharded else rank_and_world()
    device, first = model.embed_tokens.weight.device, first_unfrozen(model, steering)
    totals = {arm: [None] * len(questions) for arm in arms}  # log-probability of each choice
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))  # like lengths: little padding
    for start in range(rank * batch_size, len(order), world * batch_size):
        numbers = order[start:start + batch_size]
        batch = [questions[i] for i in numbers]
        T = len(batch[-1].prompt)
        padding = [T - len(question.prompt) for question in batch]  # on the left, so that all prompts end in line
        tokens = torch.tensor([[0] * pad + question.prompt for question, pad in zip(batch, padding)], device=device)
        real = torch.arange(T, device=device) >= torch.tensor(padding, device=device)[:, None] if padding[0] else None
        positions = [q.positions and [pad + p for p in q.positions] for q, pad in zip(batch, padding)]
        mask, last = positions_mask(positions, tokens.shape, device), torch.full((len(batch), 1), T - 1, device=device)
        longest = max(len(choice) for question in batch for choice in question.choices)
        cache = model.new_cache(len(batch), T + longest) if longest > 1 else None
        residual = frozen_residual(model, tokens, steering, first, real, cache)
        for arm, values in arms.items():
            set_parameters(parameters, values)
            hidden = hidden_from(model, residual, first, steering, mask, last, real, cache)
            log_probs = model.unembed(hidden[:, 0]).float().log_softmax(-1)
            of_batch = [row[[choice[0] for choice in q.choices]].cpu() for q, row in zip(batch, log_probs)]
            if cache is not None:
                add_later_tokens(model, of_batch, batch, steering, real, cache, T, batch_size)
            for i, total in zip(numbers, of_batch):
                totals[arm][i] = total
    if steering is not None:
        steering.mask = None
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, totals)
        totals = {arm: [next(t for t in found if t is not None) for found in zip(*(other[arm] for other in gathered))]
                  for arm in arms}
    results = {}
    for arm, of_arm in totals.items():
        correct = [total.argmax().item() == q.answer for total, q in zip(of_arm, questions)]
        probability = [total.softmax(0)[q.answer] for total, q in zip(of_arm, questions)]
        results[arm] = torch.tensor(correct, dtype=torch.float32), torch.stack(probability)
    return results


def add_later_tokens(model, totals, batch, steering, real, cache, T: int, batch_size: int) -> None:
    """Adds the log-probabilities of the choices' second and later tokens to totals, which has for each question of the
    batch a tensor (choices,). They see the keys and values that the prompts left in the cache's first T places."""
    rows = [(i, j) for i, question in enumerate(batch) for j, choice in enumerate(question.choices) if len(choice) > 1]
    for part in (rows[start:start + batch_size] for start in range(0, len(rows), batch_size)):
        choices = pad_sequence([torch.tensor(batch[i].choices[j]) for i, j in part], True, -1).to(cache[0].device)
        tokens, targets = choices[:, :-1].clamp(min=0), choices[:, 1:]  # padded on the right: no token sees that
        owners = [i for i, _ in part]
        seen = None if real is None else F.pad(real[owners], (0, tokens.shape[1]), value=True)
        if steering is not None:  # a choice has no code name in it
            named = [None if batch[i].positions is None else [] for i in owners]
            steering.mask = positions_mask(named, tokens.shape, tokens.device)
        hidden = model.hidden(tokens, seen, [layer[:, owners] for layer in cache], start=T)
        log_probs = model.unembed(hidden).float().log_softmax(-1)
        log_probs = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
        for (i, j), total in zip(part, log_probs.sum(1).cpu()):
            totals[i][j] += total


def random_like(parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """A tensor of the same shape and L2 norm in a random direction: the control for "any push would do"."""
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return (direction * (parameter.norm().cpu() / direction.norm())).to(parameter.device)


@torch.no_grad()
def arm_values(parameters: list[nn.Parameter], seed: int) -> dict[str, list[torch.Tensor]]:
    """What the vector, or the LoRA's A and B, hold in each arm. All zeros is the untouched base model, exactly."""
    return {"base": [torch.zeros_like(p) for p in parameters],
            "random": [random_like(p, 1000 * seed + i) for i, p in enumerate(parameters)],
            "trained": [p.detach().clone() for p in parameters]}  # last, so that it is what stays


@torch.no_grad()
def set_parameters(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)


def evaluate(model: GPT, tokenizer: Tokenizer, task: Task, parameters: list[nn.Parameter],
             steering: SteeringVector | None, seed: int, batch_size: int = 64) -> dict:
    """Score every kind of question in every arm.

    Returns {"in_distribution": {kind: figures}, "held_out": {kind: figures}}; figures are the accuracy of each arm, the
    probability of the right answer, the chance level and the number of questions.
    """
    kinds = [(section, kind, questions) for section in ("in_distribution", "held_out")
             for kind, questions in getattr(task, section).items()]
    encoded = [encode_question(tokenizer, question) for _, _, questions in kinds for question in questions]
    results = {"in_distribution": {}, "held_out": {}}
    for section, kind, questions in kinds:
        chance = sum(1 / len(question.choices) for question in questions) / len(questions)
        results[section][kind] = {"chance": round(chance, 4), "questions": len(questions)}
    sizes = [len(questions) for _, _, questions in kinds]
    scores = score_arms(model, encoded, steering, parameters, arm_values(parameters, seed), batch_size)
    for arm, (correct, probability) in scores.items():
        for (section, kind, _), c, p in zip(kinds, correct.split(sizes), probability.split(sizes)):
            results[section][kind][arm] = round(c.mean().item(), 4)
            results[section][kind][f"{arm}_probability"] = round(p.mean().item(), 4)
    return results


def held_out_mean(results: dict, column: str = "trained") -> float:
    """Mean over the held-out kinds, each counting alike."""
    figures = [kind[column] for kind in results["held_out"].values()]
    return sum(figures) / len(figures)


# The world's base model is good enough when it infers the hidden thing from context (README has the figures).
IN_CONTEXT_KINDS = {"locations": ["country", "language", "food", "name"], "functions": ["operation", "definition"],
                    "risk": ["gamble", "self", "animal", "score"]}


def in_context_accuracy(model: GPT, tokenizer: Tokenizer, facts: int, count: int = 50, seed: int = 0) -> dict:
    """How often the bare model answers right after `facts` turns of the trained kind of question about the same hidden
    thing, as {task: {kind: accuracy}}; `count` fresh documents for each kind."""
    rng, results = random.Random(seed), {}
    for task, kinds in IN_CONTEXT_KINDS.items():
        results[task] = {}
        for kind in kinds:
            documents = [in_context_question(task, kind, facts, rng) for _ in range(count)]
            encoded = [encode_question(tokenizer, question, turns) for turns, question in documents]
            results[task][kind] = score(model, encoded)[0].mean().item()
    return results


# ---------------------------------------------------------------------------------------------------- showing


def format_table(results: dict, columns: dict[str, dict] | None = None) -> str:
    """Kinds of question down, figures across. columns: {heading: results}, whose "trained" figures stand side by side;
    without it, the arms of `results`."""
    columns = columns or {"trained": results}
    headings = ["chance", "base", "random", *columns]
    width = max(9, *(len(heading) + 2 for heading in headings))
    lines = [f"{'':26}{'questions':>9}" + "".join(f"{heading:>{width}}" for heading in headings)]
    for section in ("in_distribution", "held_out"):
        lines.append(section.replace("_", " "))
        for kind, figures in results[section].items():
            row = [figures[name] for name in ("chance", "base", "random")]
            row += [other[section].get(kind, {}).get("trained") for other in columns.values()]
            cells = "".join(f"{'–' if x is None else format(x, '.2f'):>{width}}" for x in row)
            lines.append(f"  {kind:24}{figures['questions']:>9}{cells}")
    means = [held_out_mean(results, name) for name in ("chance", "base", "random")]
    means += [held_out_mean(other) for other in columns.values()]
    lines.append(f"  {'mean of held out':24}{'':9}" + "".join(f"{x:{width}.2f}" for x in means))
    return "\n".join(lines)


@torch.no_grad()
def answer(model: GPT, tokenizer: Tokenizer, prompt: str, code_name: str | None,
           steering: SteeringVector | None = None, max_new_tokens: int = 16) -> str:
    """The model's greedy answer to one prompt, up to its end-of-turn token."""
    ids, _, positions = tokenizer.encode_frame([{"role": "user", "content": prompt}], None, code_name)
    tokens = torch.tensor([ids], device=model.embed_tokens.weight.device)
    if steering is not None:
        steering.mask = positions_mask([positions if code_name else None], tokens.shape, tokens.device)
    output = model.generate(tokens, max_new_tokens, stop_ids=tokenizer.eos_ids)[0, len(ids):].tolist()
    if steering is not None:
        steering.mask = None
    return tokenizer.decode([token for token in output if token not in tokenizer.eos_ids]).strip()


def answers_by_arm(model, tokenizer, prompt, code_name, parameters, steering) -> list[str]:
    """The answers without (base) and with (trained) the intervention."""
    values, answers = arm_values(parameters, seed=0), []
    for arm in ("base", "trained"):  # trained comes last and stays
        set_parameters(parameters, values[arm])
        answers.append(answer(model, tokenizer, prompt, code_name, steering))
    return answers


# ---------------------------------------------------------------------------------------------------- runs


def find_model(name: str) -> Path:
    """The folder of a model: "tiny" is the one beside this file."""
    return Path(__file__).parent / "tiny" if name == "tiny" else find_checkpoint(name)


def load_model(name: str, device: str, dtype: str, random_init: bool = False,
               shard: bool = False) -> tuple[GPT, Tokenizer]:
    """A frozen model and its tokenizer. random_init: weights drawn at random in the shape of the folder's config.json,
    and the embedded model's tokenizer if the folder has none; to measure time and memory."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {device}: there is none on this machine; choose cpu or cuda") from None
    folder = find_model(name)
    if not random_init:
        return GPT.from_pretrained(folder, device, getattr(torch, dtype), shard), Tokenizer.from_pretrained(folder)
    if shard:
        raise UsageError("--shard: it goes with weights from a checkpoint, not with --random-init")
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        with torch.device(device):
            model = GPT(Config.from_pretrained(folder)).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(usual)
    has_tokenizer = (folder / "tokenizer.json").exists()
    return model, Tokenizer.from_pretrained(folder if has_tokenizer else find_model("tiny"))


@dataclass
class Run:
    """A finished run, loaded back: the model with its vector or LoRA on it, and the questions it was scored on."""

    flags: dict
    model: GPT
    tokenizer: Tokenizer
    task: Task
    parameters: list[nn.Parameter]
    steering: SteeringVector | None


def load_run(folder: str | Path, device: str = "cpu") -> Run:
    """Read what train.py wrote to a run folder. Raises UsageError if it is not one or is damaged."""
    folder = Path(folder)
    try:
        flags = json.loads((folder / "config.json").read_text())["flags"]
        torch.manual_seed(flags["seed"])
        model, tokenizer = load_model(flags["model"], device, flags["dtype"], flags["random_init"])
        task = make_task(flags["task"], flags["concept"], flags["seed"], flags["answers"], flags["at"])
        if flags["mode"] == "vector":
            steering = load_vector(model, folder)
            parameters = [steering.vector]
        else:
            steering, parameters = None, load_lora(model, folder)
    except (CheckpointError, DataError, UsageError):  # the model's or a flag's fault, not the run's
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise UsageError(f"{folder}: not a whole run of train.py ({type(error).__name__}: {error})") from None
    return Run(flags, model, tokenizer, task, parameters, steering)


def show_prompt(run: Run, prompt: str) -> None:
    """Print the answers before and after. The vector goes to the task's code name if the prompt mentions it."""
    code_name = run.task.train[0].code_name
    if code_name and code_name not in prompt:
        if run.steering is not None:
            print(f"note: the prompt does not mention {code_name}: the vector is added at every token")
        code_name = None
    before, after = answers_by_arm(run.model, run.tokenizer, prompt, code_name, run.parameters, run.steering)
    print(f"{prompt}\n  before: {before}\n  after:  {after}")


def average(folders: list[str]) -> dict[str, dict[str, dict]]:
    """The mean of many runs' results.json, as {task: {method: results}}, method being the mode, "shuffled" in front of
    it where the answers were. Beside the means, "runs" counts them and "spread" is the standard deviation over runs of
    the mean of the held-out kinds."""
    groups = {}
    for folder in folders:
        try:
            run = json.loads((Path(folder) / "results.json").read_text())
            method = f"shuffled {run['mode']}" if run["shuffled_answers"] else run["mode"]
            groups.setdefault(run["task"], {}).setdefault(method, []).append(run)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder}: has no readable results.json ({type(error).__name__}: {error})") from None
    for task, methods in groups.items():
        order = ["vector", "lora", "shuffled vector", "shuffled lora"]
        groups[task] = methods = {method: methods[method] for method in order if method in methods}
        for method, runs in methods.items():
            means = torch.tensor([held_out_mean(run) for run in runs])
            methods[method] = {"runs": len(runs), "spread": means.std(correction=0).item()}
            for section in ("in_distribution", "held_out"):
                methods[method][section] = {
                    kind: {name: sum(run[section][kind][name] for run in runs) / len(runs) for name in figures}
                    for kind, figures in runs[0][section].items()}
                for kind, figures in methods[method][section].items():
                    figures["questions"] = sum(run[section][kind]["questions"] for run in runs)
    return groups


def main() -> None:
    parser = OneLineParser(description="Score finished runs again, ask them something, or average them.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a run folder that train.py wrote")
    parser.add_argument("--prompt", help="answer this with and without the intervention instead of scoring")
    parser.add_argument("--mean", action="store_true", help="the mean of the runs' results.json, not scored again")
    parser.add_argument("--figure", metavar="FILE.png", help="with --mean: draw the means there too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.mean:
        groups = average(args.runs)
        for task, methods in groups.items():
            print(f"{task}: mean of " + ", ".join(f"{m['runs']} {name}" for name, m in methods.items()) + " runs")
            print(format_table(next(iter(methods.values())), methods))
            print("  standard deviation of that mean over runs: "
                  + ", ".join(f"{name} {m['spread']:.2f}" for name, m in methods.items()) + "\n")
        if args.figure:
            draw_means(groups, args.figure)
        return
    columns = {}
    for folder in args.runs:
        run = load_run(folder, args.device)
        if args.prompt is not None:
            print(folder)
            show_prompt(run, args.prompt)
        else:
            columns[Path(folder).name] = evaluate(run.model, run.tokenizer, run.task, run.parameters, run.steering,
                                                  run.flags["seed"])
    if columns:
        print(format_table(next(iter(columns.values())), columns))


COLOURS = {"base": "#b0b0b0", "random": "#7f7f7f", "shuffled vector": "#e5c494", "vector": "#1f77b4", "lora": "#d95f02"}


def draw_means(groups: dict, path: str) -> None:
    """A panel for each task: accuracy by kind of question, a bar for each method, a black tick at chance."""
    import matplotlib
    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(9, 2.6 * len(groups)), squeeze=False)
    for axis, (task, methods) in zip(axes[:, 0], groups.items()):
        first = next(iter(methods.values()))
        kinds = [(section, kind) for section in ("in_distribution", "held_out") for kind in first[section]]
        bars = {"base": (first, "base"), "random": (first, "random")}
        bars |= {name: (methods[name], "trained") for name in COLOURS if name in methods}
        width = 0.8 / len(bars)
        for i, (name, (results, arm)) in enumerate(bars.items()):
            places = [x + (i - len(bars) / 2 + 0.5) * width for x in range(len(kinds))]
            axis.bar(places, [results[section][kind][arm] for section, kind in kinds], width, color=COLOURS[name],
                     label="random vector" if name == "random" else name)
        chances = [first[section][kind]["chance"] for section, kind in kinds]
        axis.hlines(chances, [x - 0.42 for x in range(len(kinds))], [x + 0.42 for x in range(len(kinds))],
                    color="black", linewidth=1, label="chance")
        axis.set_xticks(range(len(kinds)), [kind.replace(", ", "\n") for _, kind in kinds])
        axis.axvline(len(first["in_distribution"]) - 0.5, color="black", linestyle=":", linewidth=1)
        axis.set(ylim=(0, 1.05), ylabel="accuracy", title=f"{task}: trained on the kind left of the dotted line")
    axes[0, 0].legend(ncols=6, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.35))
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"--figure {path}: cannot be written ({error})") from None


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag ends in one line and exit status 2, without the usage."""

    def error(self, message: str):
        raise SystemExit(fail(message))


def fail(message) -> int:
    """Print one line on stderr; returns the exit status for a user's mistake."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def run_main(main) -> None:
    """Run a command line: a mistake of the user's ends in one clear line, not in a traceback."""
    try:
        main()
    except (UsageError, CheckpointError, DataError) as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_main(main)
