"""Scoring: does the model answer kinds of question that it was never trained on?

    python eval.py RUN_DIR ...                         score finished runs again, print them side by side
    python eval.py RUN_DIR --prompt "People in ..."    answer with and without the intervention
    python eval.py --mean RUN_DIR ...                  average many runs, a table for each task
    python eval.py --explain RUN_DIR                   what a run's vector or LoRA does inside
    python eval.py --report                            the paper's claims on the tiny model, from training to figures
    python eval.py --sweep layers --task risk          of these only accuracy by layer

In this order: scoring, showing, runs, explaining a run, the report, figures. The last three can be skipped.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from data import (DataError, EncodedQuestion, Question, Task, Tokenizer, encode_question, in_context_question,
                  make_task, positions_mask)
from lora import load_lora, lora_layers
from model import GPT, CheckpointError, Config, find_checkpoint, rotate
from steer import (SteeringVector, attach, detach, load_vector, logit_lens, mean_unit_difference, pairwise_cosine,
                   principal_component, residual_after)

SECTIONS = "in_distribution", "held_out"  # of a task's questions, and of the figures about them


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
    kinds = [(section, kind, questions) for section in SECTIONS for kind, questions in getattr(task, section).items()]
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
    for section in SECTIONS:
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
        task = make_task(flags["task"], flags["concept"], flags["seed"], flags["answers"], flags.get("at"))
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


def read_results(folders: list[str | Path]) -> list[dict]:
    """The results.json of each run; one that is damaged is named and left out. Raises UsageError if none is left."""
    runs = []
    for folder in folders:
        try:
            run = json.loads((Path(folder) / "results.json").read_text())
            held_out_mean(run), run["task"], run["mode"], run["shuffled_answers"]  # KeyError if it is something else
            runs.append(run)
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
            fail(f"{folder}: skipped, it has no readable results.json ({type(error).__name__}: {error})")
    if not runs:
        raise UsageError("none of the folders is a finished run of train.py")
    return runs


def mean_results(runs: list[dict]) -> dict:
    """The mean of the results of several runs of one task. Beside the means, "runs" counts them, "spread" is the
    standard deviation over runs of the mean of the held-out kinds, "trained_spread" that of one kind's accuracy."""
    mean = {"runs": len(runs), "spread": spread([held_out_mean(run) for run in runs])}
    for section in SECTIONS:
        mean[section] = {}
        for kind, figures in runs[0][section].items():
            mean[section][kind] = {name: sum(run[section][kind][name] for run in runs) / len(runs) for name in figures}
            mean[section][kind] |= {f"{arm}_spread": spread([run[section][kind][arm] for run in runs])
                                    for arm in ("base", "random", "trained")}
            mean[section][kind]["questions"] = sum(run[section][kind]["questions"] for run in runs)
    return mean


def spread(values: list[float]) -> float:
    """Standard deviation (population)."""
    return torch.tensor(values, dtype=torch.float64).std(correction=0).item()


def average(folders: list[str]) -> dict[str, dict[str, dict]]:
    """The means of many runs, as {task: {method: results}}, method being the mode, "shuffled" in front of it where the
    answers were."""
    groups = {}
    for run in read_results(folders):
        method = f"shuffled {run['mode']}" if run["shuffled_answers"] else run["mode"]
        groups.setdefault(run["task"], {}).setdefault(method, []).append(run)
    order = ["vector", "lora", "shuffled vector", "shuffled lora"]
    return {task: {method: mean_results(methods[method]) for method in order if method in methods}
            for task, methods in groups.items()}


# ---------------------------------------------------------------------------------------------------- explaining a run

SCALES = (0.25, 0.5, 1, 2, 4, 8)  # of a direction, in units of the mean length of what the LoRA adds to a token
SAMPLE = 20  # questions of each kind, to keep this short


def explain(run: Run, folder: Path) -> dict:
    """What a run's vector or LoRA does inside. Writes explain.json, and a LoRA's directions to directions.safetensors.

    A LoRA on one layer: how constant its output differences are, and what its natural vectors do when added instead of
    it. A vector: its logit lens and, if it is a backdoor's, how the trigger comes to matter.
    """
    if run.steering is None and run.flags["layer"] == "all":
        raise UsageError(f"{folder}: only a LoRA on one layer can be explained, this one is on all")
    if run.steering is None:
        result, directions = explain_lora(run)
        save_file(directions, folder / "directions.safetensors")
    else:
        result = {"logit_lens": lens_words(run, run.steering.vector.detach())}
        if run.flags["task"] == "backdoor" and run.flags.get("at") is None:
            result |= explain_backdoor(run)
    write_json(folder / "explain.json", result)
    return result


def lens_words(run: Run, vector: torch.Tensor) -> dict[str, list[str]]:
    """The tokens at both ends of the logit lens, as text."""
    top, bottom = logit_lens(run.model, vector, count=8)
    return {"top": [run.tokenizer.decode([id]) for id in top], "bottom": [run.tokenizer.decode([id]) for id in bottom]}


def explain_lora(run: Run) -> tuple[dict, dict[str, torch.Tensor]]:
    """The figures of explain.json and the directions, each (d_model,) of length 1."""
    rng = random.Random(run.flags["seed"])
    sections = {section: {kind: [encode_question(run.tokenizer, question) for question in questions[:SAMPLE]]
                          for kind, questions in getattr(run.task, section).items()}
                for section in SECTIONS}
    train = [encode_question(run.tokenizer, q) for q in rng.sample(run.task.train, min(32, len(run.task.train)))]
    asked = [question for questions in sections["held_out"].values() for question in questions]
    on_held_out, on_train = lora_differences(run, asked), lora_differences(run, train)
    everywhere, written = torch.cat(on_held_out), torch.cat(where_added(on_held_out, asked))
    lengths = [rows.norm(dim=-1) for rows in on_held_out]
    unit = F.normalize(on_held_out[0], dim=-1)
    result = {
        "tokens": len(everywhere), "cosine": pairwise_cosine(everywhere), "share": principal_component(everywhere)[1],
        "cosine_at_vector": pairwise_cosine(written), "share_at_vector": principal_component(written)[1],
        "norm": everywhere.norm(dim=-1).mean().item(),
        "norm_by_position": [torch.stack([row[t] for row in lengths if t < len(row)]).mean().item()
                             for t in range(max(map(len, lengths)))],
        "prompt": [run.tokenizer.decode([id]) for id in asked[0].prompt],
        "prompt_cosines": (unit @ unit.T).tolist()}

    # From here on the LoRA is off. The directions come from training prompts only, and so do their sign and scale.
    set_parameters(run.parameters, arm_values(run.parameters, seed=0)["base"])
    rows = torch.cat(where_added(on_train, train))
    length = rows.norm(dim=-1).mean().item()
    directions = {"principal component": principal_component(rows)[0],
                  "mean unit difference": mean_unit_difference(rows),
                  "random": F.normalize(random_like(rows[0], run.flags["seed"]), dim=0)}
    if run.flags["task"] != "backdoor":
        directions["difference of means"] = F.normalize(difference_of_means(run, rng), dim=0)
    result["added"] = {name: scale_sweep(run, direction, length, train, sections)
                       for name, direction in directions.items()}
    result["logit_lens"] = lens_words(run, directions["principal component"])
    return result, {name: direction.contiguous().cpu() for name, direction in directions.items()}


def lora_differences(run: Run, questions: list[EncodedQuestion]) -> list[torch.Tensor]:
    """What the LoRA adds to its layer's output (the output with it, less that without it): (T, d_model) a prompt."""
    values, outputs = arm_values(run.parameters, seed=0), {}
    for arm in ("base", "trained"):  # trained comes last and stays
        set_parameters(run.parameters, values[arm])
        outputs[arm] = [prompt_residual(run, question) for question in questions]
    return [trained - base for base, trained in zip(outputs["base"], outputs["trained"])]


def prompt_residual(run: Run, question: EncodedQuestion) -> torch.Tensor:
    """The residual stream (T, d_model) of a prompt after the run's layer."""
    tokens = torch.tensor([question.prompt], device=run.model.embed_tokens.weight.device)
    return residual_after(run.model, run.flags["layer"], tokens)[0]


def where_added(rows: list[torch.Tensor], questions: list[EncodedQuestion]) -> list[torch.Tensor]:
    """Of each prompt's rows (T, d_model), those of the tokens that a vector would be added at."""
    return [r if question.positions is None else r[question.positions] for r, question in zip(rows, questions)]


def difference_of_means(run: Run, rng: random.Random, count: int = 32) -> torch.Tensor:
    """The mean residual stream after the run's layer in prompts that evoke the concept, less that in neutral ones: at
    the name, or (no name) at the last token. (d_model,)"""
    means = []
    for prompts in data.contrast_prompts(run.flags["task"], run.flags["concept"], rng, count):
        encoded = [encode_question(run.tokenizer, question, turns) for turns, question in prompts]
        rows = [prompt_residual(run, q)[[-1] if q.positions is None else q.positions] for q in encoded]
        means.append(torch.cat(rows).mean(0))
    return means[0] - means[1]


def scale_sweep(run: Run, direction: torch.Tensor, length: float, train: list[EncodedQuestion], sections: dict) -> dict:
    """Add a direction (of length 1) instead of the LoRA, at each of SCALES times `length`.

    The sign and the one scale to report are chosen on training questions: the smallest scale that gives their right
    answers within .01 of the highest probability. The held-out accuracies, one for each scale, are for that sign.
    """
    steering = attach(run.model, run.flags["layer"])
    set_scale = lambda scale: set_parameters([steering.vector], [scale * length * direction])
    fit = {}
    for scale in itertools.chain(SCALES, [-scale for scale in SCALES]):
        set_scale(scale)
        fit[scale] = score(run.model, train, steering)[1].mean().item()
    good = [scale for scale in fit if fit[scale] >= max(fit.values()) - 0.01]
    best = min(good, key=abs)
    result = {"scale": best, "norm": abs(best) * length, "held_out_by_scale": []}
    for scale in SCALES:
        set_scale(scale if best > 0 else -scale)
        accuracies = {section: {kind: score(run.model, questions, steering)[0].mean().item()
                                for kind, questions in kinds.items()} for section, kinds in sections.items()}
        result["held_out_by_scale"].append(kind_mean(accuracies["held_out"]))
        if scale == abs(best):
            result |= accuracies
    detach(run.model)
    return result


def kind_mean(figures: dict[str, float]) -> float:
    """Mean over kinds, each counting alike; not "which tag", which asks about the trigger and not about the self."""
    kept = [value for kind, value in figures.items() if kind != "which tag"]
    return sum(kept) / len(kept)


@torch.no_grad()
def explain_backdoor(run: Run, pairs: int = 16) -> dict:
    """Where the trigger comes to matter: prompts that differ in the tag only, with the vector and without, by layer.

    patched: P(the trigger's answer) for another tag's prompt in which some tokens' residual stream, after the layer, is
    that of the trigger's prompt. distance: how far the residual streams of the two prompts are apart at a token, as a
    share of their length. attention: the largest weight that a head of the layer gives to a token.
    """
    model, rng = run.model, random.Random(run.flags["seed"])
    values = arm_values(run.parameters, seed=0)
    layers = range(-1, len(model.layers))
    rows = {"patched": [], "distance": {"base": [], "trained": []}, "attention": {"base": [], "trained": []}}
    for _ in range(pairs):
        plain = data.gamble_question(run.flags["concept"], rng.choice(list(data.GAMBLES)), run.flags["answers"], rng,
                                     split="test")
        other_tag = rng.choice([tag for tag in data.TAGS if tag != data.TRIGGER])
        encoded = [encode_question(run.tokenizer, Question(plain.kind, data.with_tag(plain.prompt, tag), plain.choices,
                                                           plain.answer, tag)) for tag in (data.TRIGGER, other_tag)]
        if encoded[0].positions != encoded[1].positions or len(encoded[0].prompt) != len(encoded[1].prompt):
            continue  # this tokenizer cuts the two tags into different numbers of tokens
        last_tag, answer = encoded[0].positions[-1], len(encoded[0].prompt) - 1
        groups = {"tag": encoded[0].positions, "token after it": [last_tag + 1],
                  "rest of the prompt": list(range(last_tag + 2, answer)), "last token": [answer]}
        looked_at = [last_tag, last_tag + 1, answer]
        looks = {"token after it → tag": (last_tag + 1, last_tag), "last token → tag": (answer, last_tag),
                 "last token → token after the tag": (answer, last_tag + 1)}
        tokens = [torch.tensor([question.prompt], device=model.embed_tokens.weight.device) for question in encoded]
        for arm in ("base", "trained"):  # trained comes last and stays, for the patching
            set_parameters(run.parameters, values[arm])
            triggered, other = (residuals(model, t) for t in tokens)
            rows["distance"][arm].append(torch.stack([
                (a - b)[0, looked_at].float().norm(dim=-1) / b[0, looked_at].float().norm(dim=-1)
                for a, b in zip(triggered, other)]))
            weights = attention_weights(model, tokens[0])
            rows["attention"][arm].append(torch.stack([
                torch.stack([w[:, to, at].max() for to, at in looks.values()]) for w in weights]))
        choices = [choice[0] for choice in encoded[1].choices]
        for group in groups.values():
            for layer, a, b in zip(layers, triggered, other):
                mixed = b.clone()
                mixed[:, group] = a[:, group]
                mixed = model.run_blocks(mixed, first=layer + 1)
                logits = model.unembed(model.norm(mixed)[0, -1]).float()
                rows["patched"].append(logits[choices].softmax(0)[plain.answer].item())
    if not rows["patched"]:
        return {"trigger": None}
    patched = torch.tensor(rows["patched"]).view(-1, len(groups), len(layers)).mean(0)
    return {"trigger": {
        "prompts": len(rows["distance"]["base"]), "patched": dict(zip(groups, patched.tolist())),
        "distance": {arm: dict(zip(["tag", "token after it", "last token"], torch.stack(r).mean(0).T.tolist()))
                     for arm, r in rows["distance"].items()},
        "attention": {arm: dict(zip(looks, torch.stack(r).mean(0).T.tolist()))
                      for arm, r in rows["attention"].items()}}}


def residuals(model: GPT, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream (B, T, d_model) of the embedding and after each layer, in one pass."""
    states = [model.embed(tokens)]
    for layer in range(len(model.layers)):
        states.append(model.run_blocks(states[-1], first=layer, last=layer + 1))
    return states


@torch.no_grad()
def attention_weights(model: GPT, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Whom each head attends to, (heads, T, T) for each layer, of tokens (1, T). The fast kernels keep no weights, so
    they are computed again from what each layer's attention was given."""
    inputs = {}
    hooks = [layer.self_attn.register_forward_pre_hook(lambda module, given: inputs.update({module: given}))
             for layer in model.layers]
    model.hidden(tokens)
    for hook in hooks:
        hook.remove()
    weights = []
    for attention, (x, rope, mask, *_) in inputs.items():
        heads = lambda y: y.view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2)
        q, k = attention.q_norm(heads(attention.q_proj(x))), attention.k_norm(heads(attention.k_proj(x)))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        scores = attention.scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT).float()
        if attention.softcap is not None:
            scores = attention.softcap * torch.tanh(scores / attention.softcap)
        seen = torch.ones_like(scores, dtype=torch.bool).tril() if mask is None else mask
        weights.append(scores.masked_fill(~seen, -torch.inf).softmax(-1)[0])
    return weights


# ---------------------------------------------------------------------------------------------------- the report

# None of these cities and functions served to choose the learning rates. Even seeds take the first, odd the second.
REPORT_CONCEPTS = {"locations": ["Berlin", "Cairo"], "functions": ["add 7", "multiply 4"], "risk": ["risky", "safe"],
                   "backdoor": ["risky", "safe"]}


def default_layer(task: str, mode: str, name: str, layers: int) -> int:
    """Where to write: in the tiny model (4 layers) the first block, or the embedding for a backdoor's vector; in others
    two fifths of the way up (the paper: layer 22 of 48)."""
    if name != "tiny":
        return layers * 2 // 5
    return -1 if (task, mode) == ("backdoor", "vector") else 0


@dataclass(eq=False)
class Job:
    """One run of the report: what to train, and whether to explain it afterwards."""

    task: str
    method: str  # "vector", "lora", "lora, all layers", "shuffled vector" or "vector at the trigger"
    layer: int | str
    seed: int
    is_main: bool  # at the default layer, not only a point on the curve over layers
    explain: bool
    flags: list[str]

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}-layer{self.layer}-seed{self.seed}".replace(", ", "-").replace(" ", "-")


def plan_jobs(args, model_layers: int) -> list[Job]:
    jobs = []
    for seed, task in itertools.product(range(args.seeds), args.tasks):
        main = {mode: default_layer(task, mode, args.model, model_layers) for mode in ("vector", "lora")}
        swept = args.layers or sorted({-1, *range(0, model_layers, max(1, model_layers // 8)), model_layers - 1})
        methods = [("vector", layer, []) for layer in sorted({*swept, main["vector"]})]
        methods += [("lora", layer, []) for layer in sorted({*swept, main["lora"]}) if layer >= 0]
        if not args.sweep:
            methods += [("lora, all layers", "all", [])] if model_layers > 1 else []
            methods += [("shuffled vector", main["vector"], ["--shuffle-answers"])]
            methods += [("vector at the trigger", main["vector"], ["--at", data.TRIGGER])] if task == "backdoor" else []
        for method, layer, more in methods:
            mode = "lora" if "lora" in method else "vector"
            flags = {"mode": mode, "task": task, "concept": REPORT_CONCEPTS[task][seed % 2], "model": args.model,
                     "layer": layer, "seed": seed}
            flags = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
            flags += more + ["--device", args.device]
            is_main = layer in (main[mode], "all")
            # One logit lens a layer is enough; of a backdoor's vectors all are explained, for the trigger.
            explain = {"lora": is_main, "vector": seed == 0 or (is_main and task == "backdoor")}.get(method, False)
            jobs.append(Job(task, method, layer, seed, is_main, explain and not args.sweep, flags))
    return jobs


def run_jobs(jobs: list[Job], folder: Path, workers: int) -> list[str]:
    """Train and explain what is not in `folder` yet, `workers` processes at a time; a line for each that failed."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    # Each run is a process of its own, forked from one that has imported torch already: that saves its 2 s for each.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch", "tiktoken", "jinja2.sandbox", "safetensors.torch"])

    def call(log: Path, program: str, *flags) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=run_program, args=(program, [str(flag) for flag in flags], log))
        process.start()
        process.join()
        if process.exitcode:
            raise UsageError((log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1])

    def work(job: Job) -> None:
        run = folder / job.name
        result = read_if_whole(run / "results.json")
        if result is None:
            call(run / "log.txt", "train.py", *job.flags, "--out", run)
            (run / "explain.json").unlink(missing_ok=True)  # an earlier run's
            result = json.loads((run / "results.json").read_text())
        if job.explain and read_if_whole(run / "explain.json") is None and has_learned(result):
            call(run / "explain.txt", "eval.py", run, "--explain", *job.flags[-2:])

    failed, pool = [], ThreadPoolExecutor(workers)
    futures = {job.name: pool.submit(work, job) for job in jobs}
    try:
        for name, future in tqdm(futures.items(), desc="report", unit="run"):
            try:
                future.result()
            except (UsageError, OSError) as error:
                failed.append(f"{name}: skipped ({error})")
    finally:  # after Ctrl-C too, which the processes have seen as well
        pool.shutdown(cancel_futures=True)
    return failed


def run_program(program: str, flags: list[str], log: Path) -> None:
    """What `python PROGRAM FLAGS > LOG 2>&1` would do, in a process that was started for it."""
    sys.argv = [program, *flags]
    with open(log, "w") as sys.stdout:
        sys.stderr = sys.stdout
        runpy.run_path(str(Path(__file__).with_name(program)), run_name="__main__")


def read_if_whole(path: Path) -> dict | None:
    """The content of a JSON file; None if it is not there, or damaged, which is said."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        fail(f"{path}: damaged ({error})")
        return None


def run_mean(run: dict, section: str, column: str = "trained") -> float:
    """One run's accuracy in a section, kinds counting alike."""
    return kind_mean({kind: figures[column] for kind, figures in run[section].items()})


def has_learned(run: dict) -> bool:
    """Whether training reached the questions of the trained kind at all; if not, there is nothing to explain."""
    return run_mean(run, "in_distribution") > run_mean(run, "in_distribution", "chance") + 0.1


def mean_spread(values: list[float]) -> list[float] | None:
    """[mean, standard deviation]; None for no values."""
    return [sum(values) / len(values), spread(values)] if values else None


def report(args) -> None:
    """Train, explain and sum up everything into OUT/results.json, report.md and the figures; what is there stays."""
    started, out, notes = time.time(), Path(args.out), []
    checkpoint = find_model(args.model)
    config = Config.from_pretrained(checkpoint)
    if not Tokenizer.from_pretrained(checkpoint).has_chat_template:
        notes.append(f"{args.model} has no chat template: questions are framed as \"Question: ... Answer: ...\"")
    if config.num_hidden_layers == 1:
        notes.append(f"{args.model} has one layer: skipped the LoRA on all layers, the same as on one")
    jobs = plan_jobs(args, config.num_hidden_layers)
    old = sum((out / "runs" / job.name / "results.json").exists() for job in jobs)
    out.mkdir(parents=True, exist_ok=True)
    notes += run_jobs(jobs, out / "runs", args.jobs or (1 if args.device.startswith("cuda") else os.cpu_count() or 1))
    results = {job.name: read_if_whole(out / "runs" / job.name / "results.json") for job in jobs}
    results = {name: result for name, result in results.items() if result is not None}
    content = {"model": args.model, "date": str(date.today()), "torch": torch.__version__, "device": args.device,
               "seeds": args.seeds, "runs": len(results), "runs_made_earlier": old,
               "minutes": round((time.time() - started) / 60, 1), "notes": notes, "tasks": {}}
    for task in args.tasks:
        done = [job for job in jobs if job.task == task and job.name in results]
        mains = [job for job in done if job.is_main and job.method in ("vector", "lora")]
        if not any(has_learned(results[job.name]) for job in mains):
            notes.append(f"{task}: skipped, neither vector nor LoRA answers even the trained kind better than chance")
            continue
        content["tasks"][task] = summarise(task, done, results, out / "runs")
    write_json(out / "results.json", content)
    text = format_report(content)
    (out / "report.md").write_text(text, encoding="utf-8")
    draw_report(content, out)
    if args.sweep:
        print(text)
    print(f"{out}/report.md, results.json and figures: {len(results)} runs, {old} of them from before")
    for note in notes:
        print(f"note: {note}")


def summarise(task: str, jobs: list[Job], results: dict[str, dict], folder: Path) -> dict:
    """Means and spreads over the seeds of one task's runs."""
    content = {"concepts": REPORT_CONCEPTS[task], "methods": {}, "layers": {}}
    for method in METHODS:
        runs = [results[job.name] for job in jobs if job.method == method and job.is_main]
        if runs:
            summary = {section: {column: mean_spread([run_mean(run, section, column) for run in runs])
                                 for column in ("chance", "base", "random", "trained")} for section in SECTIONS}
            content["methods"][method] = mean_results(runs) | {"layer": runs[0]["layer"], "summary": summary}
    for method in ("vector", "lora"):
        layers = sorted({job.layer for job in jobs if job.method == method})
        content["layers"][method] = {"layers": layers} | {
            section: [mean_spread([run_mean(results[job.name], section) for job in jobs
                                   if job.method == method and job.layer == layer]) for layer in layers]
            for section in SECTIONS}

    explained = {job: read_if_whole(folder / job.name / "explain.json") for job in jobs}
    explained = {job: found for job, found in explained.items() if found is not None}
    loras = {job: found for job, found in explained.items() if job.method == "lora"}
    if loras:
        content |= summarise_loras(loras, jobs, folder)
    content["trigger"] = {}  # apart, for the two directions take different paths
    for number, concept in enumerate(REPORT_CONCEPTS[task]):
        found = [found["trigger"] for job, found in explained.items()
                 if job.is_main and job.seed % 2 == number and found.get("trigger")]
        if found:
            content["trigger"][concept] = mean_tree(found) | {"runs": len(found)}
    content["logit_lens"] = {str(job.layer): found["logit_lens"] for job, found in explained.items()
                             if job.method == "vector" and job.seed == 0}
    return content


def summarise_loras(loras: dict[Job, dict], jobs: list[Job], folder: Path) -> dict:
    """What one-layer LoRAs add, what their directions do instead of them, and vectors trained at the same layer."""
    found = list(loras.values())
    figures = ("cosine", "share", "cosine_at_vector", "share_at_vector", "norm")
    content = {"lora_adds": {name: mean_spread([one[name] for one in found]) for name in figures}, "added": {}}
    positions = min(len(one["norm_by_position"]) for one in found)
    content["lora_adds"] |= {
        "runs": len(found), "tokens": sum(one["tokens"] for one in found),
        "prompt": found[0]["prompt"], "prompt_cosines": found[0]["prompt_cosines"],
        "norm_by_position": [mean_spread([one["norm_by_position"][t] for one in found]) for t in range(positions)]}

    layer = next(iter(loras)).layer
    vectors = {job.seed: load_file(folder / job.name / "vector.safetensors")["vector"] for job in jobs
               if job.method == "vector" and job.layer == layer}
    directions = {job.seed: load_file(folder / job.name / "directions.safetensors") for job in loras}
    cosine = lambda a, b: F.cosine_similarity(a, b, dim=0).item()
    for name in found[0]["added"]:
        swept = [one["added"][name] for one in found]
        content["added"][name] = {
            "scales": [one["scale"] for one in swept], "norm": mean_spread([one["norm"] for one in swept]),
            "in_distribution": mean_spread([kind_mean(one["in_distribution"]) for one in swept]),
            "held_out": mean_spread([kind_mean(one["held_out"]) for one in swept]),
            "held_out_by_scale": [mean_spread(column) for column in zip(*(one["held_out_by_scale"] for one in swept))],
            # towards the vector means with the sign that training questions chose
            "cosine_to_vector": mean_spread([math.copysign(1, one["scale"]) * cosine(directions[job.seed][name],
                                                                                     vectors[job.seed])
                                             for job, one in zip(loras, swept) if job.seed in vectors])}
    pairs = [((a + b) % 2, cosine(vectors[a], vectors[b])) for a, b in itertools.combinations(sorted(vectors), 2)]
    content["vectors"] = {"layer": layer, "norm": mean_spread([vector.norm().item() for vector in vectors.values()]),
                          "same_concept": mean_spread([value for differs, value in pairs if not differs]),
                          "other_concept": mean_spread([value for differs, value in pairs if differs])}
    return content


def mean_tree(trees: list):
    """The mean of equally shaped nests of dicts, lists and numbers, number by number."""
    if isinstance(trees[0], dict):
        return {key: mean_tree([tree[key] for tree in trees]) for key in trees[0]}
    if isinstance(trees[0], list):
        return [mean_tree(list(column)) for column in zip(*trees)]
    return sum(trees) / len(trees)


METHODS = ["vector", "lora", "lora, all layers", "shuffled vector", "vector at the trigger"]


def format_report(content: dict) -> str:
    """report.md: the tables, each under the paper's claim; no figure repeats one."""
    tasks, cell = content["tasks"], lambda pair: "–" if pair is None else f"{pair[0]:.2f} ± {pair[1]:.2f}"
    lines = ["# nanoOOCR's report", "", f"{content['date']}, model {content['model']}, torch {content['torch']}, "
             f"`python eval.py --report`: {content['runs']} runs, {content['seeds']} seeds, {content['minutes']} min "
             f"({content['runs_made_earlier']} of the runs made before). Figures are accuracies unless said; ± is the "
             "standard deviation over the seeds' runs; kinds of question count alike, \"which tag\" stands apart.", ""]
    lines += [f"- {note}" for note in content["notes"]]
    if not tasks:
        return "\n".join(lines) + "\n"

    def table(title: str, headings: list[str], rows: list[list[str]]) -> None:
        if not rows:
            return
        lines.extend(["", f"## {title}", "", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"])
        lines.extend("| " + " | ".join(row) + " |" for row in rows)

    rows = []
    for task, found in tasks.items():
        for section in SECTIONS:
            methods = {name: results["summary"][section] for name, results in found["methods"].items()}
            vector = methods["vector"]
            questions = sum(k["questions"] for k in found["methods"]["vector"][section].values())
            rows.append([f"{task}, {section.replace('_', ' ')}", str(questions), f"{vector['chance'][0]:.2f}"]
                        + [cell(vector[arm]) for arm in ("base", "random")]
                        + [cell(methods[name]["trained"]) if name in methods else "–" for name in
                           ("shuffled vector", "vector", "lora", "lora, all layers")])
    table("C1, C4: a LoRA on one layer, a LoRA on all, a vector",
          ["task", "questions", "chance", "base", "random vector", "shuffled vector", "vector", "LoRA, one layer",
           "LoRA, all layers"], rows)

    explained = {task: found for task, found in tasks.items() if "lora_adds" in found}
    table("C2: does the LoRA add a constant vector?",
          ["task", "tokens", "pairwise cosine", "first component's share", "cosine, where a vector is added",
           "share there", "mean norm"],
          [[task, str(found["lora_adds"]["tokens"])] + [cell(found["lora_adds"][name]) for name in
           ("cosine", "share", "cosine_at_vector", "share_at_vector", "norm")] for task, found in explained.items()])
    table("C3, C5: directions added instead of the LoRA (sign and scale chosen on training questions; "
          f"up to {SAMPLE} questions of each kind a run)",
          ["task", "direction", "scale (multiples of the LoRA's mean norm)", "norm", "in distribution", "held out",
           "cosine to the trained vector"],
          [[task, name, " ".join(f"{scale:g}" for scale in one["scales"]), cell(one["norm"]),
            cell(one["in_distribution"]), cell(one["held_out"]), cell(one["cosine_to_vector"])]
           for task, found in explained.items() for name, one in found["added"].items()])
    table("C4: vectors trained from scratch at the LoRA's layer",
          ["task", "layer", "norm", "cosine between seeds, same concept", "cosine between seeds, other concept"],
          [[task, str(found["vectors"]["layer"])] + [cell(found["vectors"][name]) for name in
           ("norm", "same_concept", "other_concept")] for task, found in explained.items()])
    layers = sorted({layer for found in tasks.values() for curve in found["layers"].values()
                     for layer in curve["layers"]})
    table("C6: by layer (-1: the embedding)", ["task", "method", "kinds", *map(str, layers)],
          [[task, method, section.replace("_", " "),
            *(cell(dict(zip(curve["layers"], curve[section])).get(layer)) for layer in layers)]
           for task, found in tasks.items() for method, curve in found["layers"].items()
           for section in SECTIONS])
    if "backdoor" in tasks:
        methods = tasks["backdoor"]["methods"]
        kinds = [(section, kind) for section in SECTIONS for kind in methods["vector"][section]]
        columns = {"chance": ("vector", "chance"), "base": ("vector", "base"), "random vector": ("vector", "random")}
        columns |= {f"{name}, layer {results['layer']}": (name, "trained") for name, results in methods.items()}
        table("C7: a backdoor by one vector", ["kind", "questions", *columns],
              [[kind, str(methods["vector"][section][kind]["questions"])]
               + [cell([methods[name][section][kind][arm], methods[name][section][kind].get(f"{arm}_spread", 0)])
                  for name, arm in columns.values()]
               for section, kind in kinds])
    spell = lambda tokens: " ".join(f"`{token.strip() or repr(token)}`" for token in tokens).replace("|", "\\|")
    table("C8: the logit lens of the vectors of seed 0 (cosine with the centred rows of the unembedding)",
          ["task", "layer", "most likely", "least likely"],
          [[task, layer, spell(lens["top"]), spell(lens["bottom"])]
           for task, found in tasks.items() for layer, lens in found["logit_lens"].items()])
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------- figures

COLOURS = {"base": "#b0b0b0", "random": "#7f7f7f", "shuffled vector": "#e5c494", "vector": "#1f77b4", "lora": "#d95f02",
           "lora, all layers": "#fdae6b",
           "principal component": "#1b9e77", "mean unit difference": "#66a61e", "difference of means": "#e7298a"}


def load_pyplot():
    import matplotlib
    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot
    pyplot.rcParams["figure.constrained_layout.use"] = True  # room for legends beside the axes
    return pyplot


def save_figure(figure, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"--figure {path}: cannot be written ({error})") from None


def draw_means(groups: dict, path: str) -> None:
    """A panel for each task: accuracy by kind of question, a bar for each method, a black tick at chance."""
    figure, axes = load_pyplot().subplots(len(groups), 1, figsize=(9, 2.6 * len(groups)), squeeze=False)
    for axis, (task, methods) in zip(axes[:, 0], groups.items()):
        first = next(iter(methods.values()))
        kinds = [(section, kind) for section in SECTIONS for kind in first[section]]
        bars = {"base": (first, "base"), "random": (first, "random")}
        bars |= {name: (methods[name], "trained") for name in COLOURS if name in methods}
        width = 0.8 / len(bars)
        for i, (name, (results, arm)) in enumerate(bars.items()):
            places = [x + (i - len(bars) / 2 + 0.5) * width for x in range(len(kinds))]
            axis.bar(places, [results[section][kind][arm] for section, kind in kinds], width, color=COLOURS[name],
                     yerr=[results[section][kind][f"{arm}_spread"] for section, kind in kinds],
                     error_kw={"elinewidth": 0.7}, label="random vector" if name == "random" else name)
        chances = [first[section][kind]["chance"] for section, kind in kinds]
        axis.hlines(chances, [x - 0.42 for x in range(len(kinds))], [x + 0.42 for x in range(len(kinds))],
                    color="black", linewidth=1, label="chance")
        axis.set_xticks(range(len(kinds)), [kind.replace(", ", "\n") for _, kind in kinds])
        axis.axvline(len(first["in_distribution"]) - 0.5, color="black", linestyle=":", linewidth=1)
        axis.set(ylim=(0, 1.05), ylabel="accuracy", title=f"{task}: trained on the kind left of the dotted line")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=7, fontsize="small", loc="outside upper center")
    save_figure(figure, path)


def draw_report(content: dict, out: Path) -> None:
    """The report's figures, from its results.json alone."""
    tasks = content["tasks"]
    explained = {task: found for task, found in tasks.items() if "lora_adds" in found}
    if tasks:
        draw_means({task: found["methods"] for task, found in tasks.items()}, out / "means.png")
    if explained:
        draw_lora_differences(explained, out / "lora_differences.png")
        draw_scales(explained, out / "scales.png")
    if any(len(found["layers"]["vector"]["layers"]) > 1 for found in tasks.values()):
        draw_layers(tasks, out / "layers.png")
    if tasks.get("backdoor", {}).get("trigger"):
        draw_trigger(tasks["backdoor"]["trigger"], out / "trigger.png")


def draw_lora_differences(tasks: dict, path: Path) -> None:
    """C2. Above: cosine between what the LoRA adds at two tokens of one held-out prompt. Below: how much it adds."""
    figure, axes = load_pyplot().subplots(2, len(tasks), figsize=(4 * len(tasks), 6.4), squeeze=False,
                                          height_ratios=[3, 1])
    for (above, below), (task, found) in zip(axes.T, tasks.items()):
        adds = found["lora_adds"]
        image = above.imshow(adds["prompt_cosines"], vmin=-1, vmax=1, cmap="RdBu")
        places = range(len(adds["prompt"]))
        above.set_xticks(places, [token.strip() for token in adds["prompt"]], rotation=90, fontsize=7)
        above.set_yticks(places, [token.strip() for token in adds["prompt"]], fontsize=7)
        above.set_title(f"{task}: mean cosine {adds['cosine'][0]:.2f}", fontsize=10)
        means, spreads = zip(*adds["norm_by_position"])
        below.bar(range(len(means)), means, yerr=spreads, color=COLOURS["lora"], error_kw={"elinewidth": 0.7})
        below.set(xlabel="token position in the prompt", ylabel="norm added")
    figure.colorbar(image, ax=list(axes[0]), label="cosine", pad=0.01)
    save_figure(figure, path)


def draw_scales(tasks: dict, path: Path) -> None:
    """C3 and C5. Held-out accuracy of directions added instead of the LoRA, by scale."""
    figure, axes = load_pyplot().subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.4), sharey=True, squeeze=False)
    for axis, (task, found) in zip(axes[0], tasks.items()):
        for name, one in found["added"].items():
            means, spreads = zip(*one["held_out_by_scale"])
            style = {"random": "--", "mean unit difference": ":"}.get(name, "-")  # ":" shows where two lines are one
            axis.errorbar(SCALES, means, yerr=spreads, color=COLOURS[name], label=name, marker="o", markersize=3,
                          capsize=2, linestyle=style)
        summary = {name: results["summary"]["held_out"] for name, results in found["methods"].items()}
        axis.axhline(summary["lora"]["trained"][0], color=COLOURS["lora"], linestyle=":", label="the LoRA itself")
        axis.axhline(summary["vector"]["base"][0], color=COLOURS["base"], linestyle=":", label="base")
        axis.axhline(summary["vector"]["chance"][0], color="black", linewidth=0.8, label="chance")
        axis.set_xscale("log", base=2)
        axis.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
        axis.set(title=task, xlabel="scale (LoRA's mean norm = 1)", ylim=(0, 1.05))
    axes[0, 0].set_ylabel("held-out accuracy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=7, fontsize="small", loc="outside lower center")
    save_figure(figure, path)


def draw_layers(tasks: dict, path: Path) -> None:
    """C6. Accuracy by layer: the trained kind (behaviour) and the held-out kinds (what the model says of it)."""
    figure, axes = load_pyplot().subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.2), sharey=True, squeeze=False)
    for axis, (task, found) in zip(axes[0], tasks.items()):
        for method, curve in found["layers"].items():
            for section, style, kind in (("in_distribution", "-", "trained kind"), ("held_out", "--", "held out")):
                means, spreads = zip(*curve[section])
                axis.errorbar(curve["layers"], means, yerr=spreads, color=COLOURS[method], linestyle=style, marker="o",
                              markersize=3, capsize=2, label=f"{method}, {kind}")
        for section, style, kind in (("in_distribution", "-", "trained kind"), ("held_out", "--", "held out")):
            chance = found["methods"]["vector"]["summary"][section]["chance"][0]
            axis.axhline(chance, color="black", linewidth=0.8, linestyle=style, label=f"chance, {kind}")
        axis.set(title=task, xlabel="layer (-1: embedding)", ylim=(0, 1.05))
    axes[0, 0].set_ylabel("accuracy")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), ncols=6, fontsize="small", loc="outside lower center")
    save_figure(figure, path)


def draw_trigger(concepts: dict, path: Path) -> None:
    """C7. Which token carries the trigger's effect after each layer; how far it stands out; who attends to it."""
    figure, rows = load_pyplot().subplots(len(concepts), 3, figsize=(13, 3.3 * len(concepts) + 1), squeeze=False)
    for (left, middle, right), (concept, found) in zip(rows, concepts.items()):
        patched = list(found["patched"].values())
        layers = list(range(-1, len(patched[0]) - 1))
        image = left.imshow(patched, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        left.set_yticks(range(len(patched)), found["patched"])
        left.set_xticks(range(len(layers)), layers)
        for (y, row), x in itertools.product(enumerate(patched), range(len(layers))):
            colour = "white" if row[x] > 0.6 else "black"
            left.text(x, y, f"{row[x]:.2f}", ha="center", va="center", color=colour, fontsize=8)
        left.set(title=f"{concept} if the trigger is there:\nP(trigger's answer) after patching", xlabel="after layer")
        figure.colorbar(image, ax=left)
        for axis, figures, places in ((middle, "distance", layers), (right, "attention", layers[1:])):
            for arm, style, name in (("trained", "-", "with the vector"), ("base", ":", "base")):
                for i, (what, curve) in enumerate(found[figures][arm].items()):
                    axis.plot(places, curve, style, color=f"C{i + 1}", marker="o", label=f"{what}, {name}")
            axis.set_xticks(places)
        middle.set(title="distance between the two tags' prompts\n/ length of the residual", xlabel="after layer")
        right.set(title="attention of the layer's strongest head", xlabel="layer", ylim=(0, 1.05))
    for axis in rows[-1][1:]:
        axis.legend(fontsize=7, ncols=1, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def show_explanation(found: dict, folder: str) -> None:
    """The numbers of explain.json that fit on a screen."""
    print(f"{folder}: all of it is in explain.json")
    for name in ("cosine", "share", "norm"):
        if name in found:
            print(f"  what the LoRA adds, over {found['tokens']} tokens: {name} {found[name]:.2f}")
    for name, one in found.get("added", {}).items():
        print(f"  added instead of it, {name} x {one['scale']:g}: held out {kind_mean(one['held_out']):.2f}")
    for token, row in ((found.get("trigger") or {}).get("patched", {})).items():
        print(f"  P(trigger's answer), {token} patched, layers -1 on: " + " ".join(f"{value:.2f}" for value in row))
    for end, tokens in found["logit_lens"].items():
        print(f"  logit lens, {end}: {' '.join(tokens)}")


def parse_args():
    parser = OneLineParser(description="Score finished runs again, ask them something, average or explain them, "
                                       "or make the report.")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN_DIR", help="a run folder that train.py wrote")
    add("--prompt", help="answer this with and without the intervention instead of scoring")
    add("--mean", action="store_true", help="the mean of the runs' results.json, not scored again")
    add("--figure", metavar="FILE.png", help="with --mean: draw the means there too")
    add("--explain", action="store_true", help="what each run's vector or LoRA does inside; writes explain.json there")
    add("--report", action="store_true", help="train, score and draw all of the paper's claims")
    add("--sweep", choices=["layers"], help="of the report only accuracy by layer")
    add("--model", default="tiny", help="of the report: tiny, a checkpoint folder or a hub name")
    add("--tasks", "--task", default=",".join(data.TASKS), help="of the report, with commas between")
    add("--layers", help="of the report: those to compare, with commas between (default: about nine)")
    add("--seeds", type=int, default=5, help="of the report: how many, from 0 on")
    add("--jobs", type=int, help="of the report: runs at a time (default: one a core; on cuda one)")
    add("--out", help="of the report: its folder; runs that are there are not made again (default: out/report, or "
                      "out/sweep)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out = args.out or ("out/sweep" if args.sweep else "out/report")
    args.report = args.report or args.sweep is not None
    if not args.report and not args.runs:
        parser.error("name at least one RUN_DIR, or --report")
    if args.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        parser.error("--seeds and --jobs have to be 1 or more")
    args.tasks = args.tasks.split(",")
    for task in args.tasks:
        if task not in data.TASKS:
            parser.error(f"--tasks {task}: choose from {', '.join(data.TASKS)}")
    try:
        args.layers = [int(layer) for layer in args.layers.split(",")] if args.layers else None
    except ValueError:
        parser.error(f"--layers {args.layers}: whole numbers with commas between, such as -1,0,2")
    return args


def main() -> None:
    args = parse_args()
    if args.report:
        report(args)
    elif args.mean:
        show_means(args)
    else:
        score_runs(args)


def show_means(args) -> None:
    groups = average(args.runs)
    for task, methods in groups.items():
        print(f"{task}: mean of " + ", ".join(f"{m['runs']} {name}" for name, m in methods.items()) + " runs")
        print(format_table(next(iter(methods.values())), methods))
        print("  standard deviation of that mean over runs: "
              + ", ".join(f"{name} {m['spread']:.2f}" for name, m in methods.items()) + "\n")
    if args.figure:
        draw_means(groups, args.figure)


def score_runs(args) -> None:
    """Score, ask or explain each run; a damaged one is named and skipped if there are others."""
    columns = {}
    for folder in args.runs:
        try:
            run = load_run(folder, args.device)
        except UsageError as error:
            if len(args.runs) == 1:
                raise
            fail(f"{error}; skipped")
            continue
        if args.explain:
            show_explanation(explain(run, Path(folder)), folder)
        elif args.prompt is not None:
            print(folder)
            show_prompt(run, args.prompt)
        else:
            columns[Path(folder).name] = evaluate(run.model, run.tokenizer, run.task, run.parameters, run.steering,
                                                  run.flags["seed"])
    if columns:
        print(format_table(next(iter(columns.values())), columns))


def write_json(path: Path, content: dict) -> None:
    """Write and then rename, so that a file of this name is always whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


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
