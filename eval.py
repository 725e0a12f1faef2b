"""Scoring: does the model answer kinds of question that it was never trained on? And what was added to it?

    python eval.py RUN_DIR ... [--prompt "People in City 50337 speak" | --explain]
"""

import argparse
import json
import os
import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import data
from data import Question, Task, Tokenizer, encode_question, make_task, make_tree
from lora import load_lora, lora_layers
from model import GPT, Config, find_checkpoint
from steer import attach, detach, load_vector, logit_lens, pairwise_cosines, principal_component

SECTIONS = "in_distribution", "held_out"  # of a task's questions, and of the figures about them

# ---------------------------------------- mistakes and files

class UserError(ValueError):
    """A user's mistake: one line naming the flag, file, field or line at fault, and what would be right."""

@contextmanager
def reading(source):
    """Whatever goes wrong in here is the fault of `source`, a file, folder or flag of the user's."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UserError(f"{source}: {kind}{' '.join(str(error).split())[:400]}") from error

def run_main(main) -> None:
    """A mistake of the user's ends in one line and exit status 2, not in a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)

def read_json(path) -> dict:
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))

def write_json(path, content) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

def write_whole(path, write) -> None:
    """write(temporary file), then rename it: whenever the program is killed, a file of this name is whole."""
    temporary = path.with_suffix(".tmp")
    write(temporary)
    os.replace(temporary, path)

def load_model(name, device, dtype, shard=False) -> tuple[GPT, Tokenizer]:
    with reading(f"--device {device}"):
        torch.empty(0, device=device)
    with reading(name):
        folder = find_checkpoint(name)
    with reading(folder / "config.json"):
        Config.from_pretrained(folder)
    with reading(folder):
        model = GPT.from_pretrained(folder, device, getattr(torch, dtype), shard)
        return model, Tokenizer.from_pretrained(folder)

# ---------------------------------------- scoring

def rank_and_world():
    """This process's number and how many there are: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def add_up(*tensors) -> None:
    """Adds up what each process has found, in place."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)

def first_unfrozen(model) -> int:
    """The first block whose input depends on the vector, or with a LoRA: before it all arms are alike."""
    if model.steering is not None:
        return model.steering.layer + 1
    return min((int(name.split(".")[1]) for name in lora_layers(model)), default=0)

@torch.no_grad()
def frozen_batches(model, tree, rows, last, batch_size):
    """Yields for this process's share of a tree's rows, batch by batch: (rows, their texts, their nodes'
    numbers, their tree, the residual stream (n, d) of these nodes before block `last`)."""
    device = model.embed_tokens.weight.device
    rank, world = (0, 1) if model.sharded else rank_and_world()  # a sharded model's blocks are run together
    for batch in rows.split(4 * batch_size)[rank::world]:  # without gradients that takes no more memory
        texts = torch.isin(tree.row_of, batch).nonzero()[:, 0]
        used, part = tree.select(texts)
        part = part.to(device)
        yield batch, texts, used, part, model.run_blocks(model.embed(part.tokens, part), 0, last, part)

def residual_stream(model, tree, last, batch_size=64, rows=None):
    """The residual stream (N, d) of a tree's nodes before block `last`, and before a vector that is added
    there. rows: only of their nodes. What would fill a quarter of a GPU's free memory goes to the host's."""
    weight, rows = model.embed_tokens.weight, torch.arange(len(tree.rows)) if rows is None else rows
    home = weight.device
    if home.type == "cuda" and len(tree.tokens) * weight[0].nbytes > torch.cuda.mem_get_info(home)[0] / 4:
        home = "cpu"
    states = torch.zeros(len(tree.tokens), weight.shape[1], dtype=weight.dtype, device=home)
    owner = rows[:, None].expand(-1, tree.rows.shape[1]).flatten()  # a node of several rows is the last one's
    owner = torch.zeros_like(tree.tokens).scatter_reduce(0, tree.rows[rows].flatten(), owner, "amax")
    for batch, _, used, _, x in frozen_batches(model, tree, rows, last, batch_size):
        own = torch.isin(owner[used], batch)
        states[used[own]] = x.to(home)[own]
    if not model.sharded:  # each process has left zeros where others worked
        add_up(states)
    return states

def answer_log_probs(model, x, first, tree):
    """The log-probability (texts,) float32, in nats, of each text's whole answer, from x (N, d), the residual
    stream before block `first`. The last block's output and the logits are made only where wanted."""
    real = tree.answers >= 0
    wanted, which = tree.predicting[real].unique(return_inverse=True)
    h = model.norm(model.run_blocks(x, first, tree=tree, wanted=wanted))  # (W, d)
    log_probs = model.unembed(h).float().log_softmax(-1)[which, tree.answers[real]]
    return torch.zeros(len(real), device=x.device).index_add(0, real.nonzero()[:, 0], log_probs)

@torch.no_grad()
def score_arms(model, questions, parameters, arms, batch_size=64) -> dict:
    """Which choice has the highest log-probability after the prompt, for each question and in each arm: with
    `parameters` set to each of these values in turn (the last stay). Returns {arm: (correct, probability)},
    both (questions,) float32: 1 where the right choice wins, and its probability among the choices."""
    tree = make_tree(questions, [question.choices for question in questions])
    device, first = model.embed_tokens.weight.device, first_unfrozen(model)
    totals = torch.zeros(len(arms), len(tree.row_of), device=device)
    rows = tree.positions[tree.rows].amax(1).argsort(stable=True)  # little padding
    for _, texts, _, part, x in frozen_batches(model, tree, rows, first, batch_size):
        for total, values in zip(totals, arms.values()):
            set_parameters(parameters, values)
            total[texts.to(device)] = answer_log_probs(model, x, first, part)
    if not model.sharded:
        add_up(totals)
    results = {}
    for arm, total in zip(arms, totals.cpu()):
        choices = list(zip(total.split([len(question.choices) for question in questions]), questions))
        correct = torch.tensor([found.argmax().item() == question.answer for found, question in choices])
        probability = torch.stack([found.softmax(0)[question.answer] for found, question in choices])
        results[arm] = correct.float(), probability
    return results

def random_like(parameter, seed):
    """A tensor of the same shape and L2 norm in a random direction: the control for "any push would do"."""
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return (direction * (parameter.norm().cpu() / direction.norm())).to(parameter.device)

@torch.no_grad()
def arm_values(parameters, seed) -> dict:
    """What the vector, or the LoRA's A and B, hold in each arm. All zeros is the untouched base model."""
    return {"base": [torch.zeros_like(p) for p in parameters],
            "random": [random_like(p, 1000 * seed + i) for i, p in enumerate(parameters)],
            "trained": [p.detach().clone() for p in parameters]}  # last, so that it is what stays

@torch.no_grad()
def set_parameters(parameters, values) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)

@contextmanager
def switched_off(parameters):
    """In here the vector or LoRA holds zeros, and the model is the untouched base."""
    arms = arm_values(parameters, seed=0)
    set_parameters(parameters, arms["base"])
    yield
    set_parameters(parameters, arms["trained"])

def evaluate(model, tokenizer, task, parameters, arms, batch_size=64) -> dict:
    """Score every kind of question in every arm: {"in_distribution": {kind: figures}, "held_out": …}, where
    figures are each arm's accuracy and probability of the right answer, the chance level and the number of
    questions."""
    kinds = [(section, kind, questions) for section in SECTIONS
             for kind, questions in getattr(task, section).items()]
    encoded = [encode_question(tokenizer, question) for _, _, questions in kinds for question in questions]
    results, sizes = {section: {} for section in SECTIONS}, [len(questions) for _, _, questions in kinds]
    for section, kind, questions in kinds:
        chance = sum(1 / len(question.choices) for question in questions) / len(questions)
        results[section][kind] = {"chance": round(chance, 4), "questions": len(questions)}
    for arm, (correct, probability) in score_arms(model, encoded, parameters, arms, batch_size).items():
        for (section, kind, _), right, p in zip(kinds, correct.split(sizes), probability.split(sizes)):
            results[section][kind] |= {arm: round(right.mean().item(), 4),
                                       f"{arm}_probability": round(p.mean().item(), 4)}
    return results

def kind_mean(results, section="held_out", column="trained") -> float:
    """Mean over the kinds, each counting alike; "which tag" is about the trigger, not the self: left out."""
    kept = [figures[column] for kind, figures in results[section].items() if kind != "which tag"]
    return sum(kept) / len(kept)

def format_table(results) -> str:
    arms = "chance", "base", "random", "trained"
    lines = [f"{'':26}{'questions':>9}" + "".join(f"{arm:>9}" for arm in arms)]
    for section in SECTIONS:
        lines.append(section.replace("_", " "))
        for kind, figures in results[section].items():
            cells = "".join(f"{figures[arm]:9.2f}" for arm in arms)
            lines.append(f"  {kind:24}{figures['questions']:>9}{cells}")
    label = "mean but for which tag" if "which tag" in results["held_out"] else "mean of held out"
    lines.append(f"  {label:33}" + "".join(f"{kind_mean(results, column=arm):9.2f}" for arm in arms))
    return "\n".join(lines)

# ---------------------------------------- finished runs

@dataclass
class Run:
    """A finished run, loaded back: the model with its vector or LoRA on it, and its questions."""
    flags: dict
    model: GPT
    tokenizer: Tokenizer
    task: Task
    parameters: list

def load_run(folder, device="cpu") -> Run:
    """Read what train.py wrote; UserError if it is no run or damaged."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        flags = config["flags"]
        torch.manual_seed(flags["seed"])
        task = make_task(flags["task"], flags["concept"], flags["seed"], flags["at"])
        model, tokenizer = load_model(flags["model"], device, flags["dtype"])
    with reading(folder):
        is_vector = flags["mode"] == "vector"
        parameters = [load_vector(model, folder).vector] if is_vector else load_lora(model, folder)
    return Run(flags, model, tokenizer, task, parameters)

@torch.no_grad()
def answer(model, tokenizer, prompt, code_name, max_new_tokens=16) -> str:
    """The greedy answer to one prompt, up to the end-of-turn token. The vector goes to code_name's tokens in
    the prompt, or (None) to every token."""
    question, made = encode_question(tokenizer, Question("", prompt, [""], 0, code_name)), []
    while len(made) < max_new_tokens:
        tree = make_tree([replace(question, prompt=question.prompt + made)], [[[]]])
        tree = tree.to(model.embed_tokens.weight.device)
        token = model(tree.tokens, tree)[-1].argmax().item()
        if token in tokenizer.eos_ids:
            break
        made.append(token)
    return tokenizer.decode(made).strip()

def before_and_after(model, tokenizer, prompt, code_name, parameters):
    with switched_off(parameters):
        before = answer(model, tokenizer, prompt, code_name)
    return before, answer(model, tokenizer, prompt, code_name)

def show_prompt(run, prompt) -> None:
    code_name = run.task.train[0].code_name
    if code_name and code_name not in prompt:
        print(f"note: the prompt does not mention {code_name}: a vector is added at every token")
        code_name = None
    before, after = before_and_after(run.model, run.tokenizer, prompt, code_name, run.parameters)
    print(f"{prompt}\n  before: {before}\n  after:  {after}")

# ---------------------------------------- explaining a run

LAST = 20  # the paper compares what is added at a prompt's last tokens

def explain(run, folder) -> dict:
    """What a vector or a one-layer LoRA does inside, printed and written to explain.json: the logit lens
    (C8); of a LoRA also how constant what it adds is (C2), and what its natural vector does when added
    instead (C3): the first principal component of what it adds in training prompts, at the mean length that
    this has there."""
    vector = run.parameters[0].detach()
    result = {}
    if run.model.steering is None:
        if run.flags["layer"] == "all":
            raise UserError(f"{folder}: only a LoRA on one layer can be explained, this one is on all")
        rows, result["adds"] = what_lora_adds(run)
        vector = principal_component(rows)[0] * rows.norm(dim=-1).mean()
        save_file({"vector": vector.contiguous()}, folder / "natural_vector.safetensors")
        arms = {"natural": [vector], "random": [random_like(vector, run.flags["seed"])]}
        result["instead"] = evaluate_instead(run, arms)
    top, bottom = ([run.tokenizer.decode([id]) for id in ids] for ids in logit_lens(run.model, vector, 8))
    result["logit_lens"] = {"top": top, "bottom": bottom}
    write_json(folder / "explain.json", result)
    for text, figures in result.get("adds", {}).items():
        print(f"  added in {text} prompts: " + ", ".join(f"{name} {x:.2f}" for name, x in figures.items()
                                                         if name != "histogram"))
    for arm in ("natural", "random") if "instead" in result else ():
        print(f"  {arm} vector instead of the LoRA, held out: {kind_mean(result['instead'], column=arm):.2f}")
    print(f"  logit lens, top: {' '.join(top)}\n  logit lens, bottom: {' '.join(bottom)}")
    return result

def evaluate_instead(run, arms) -> dict:
    """The scores (see evaluate) of vectors added after a LoRA's layer instead of the LoRA."""
    steering = attach(run.model, run.flags["layer"])
    with switched_off(run.parameters):
        results = evaluate(run.model, run.tokenizer, run.task, [steering.vector], arms)
    detach(run.model)
    return results

def what_lora_adds(run):
    """(rows, figures): what the LoRA adds in training prompts where a vector would be added, (N, d); and how
    constant what it adds is at the last tokens of training prompts, held-out ones and another task's."""
    other = "functions" if run.flags["task"] == "locations" else "locations"
    unrelated = make_task(other, data.CONCEPTS[other][0])
    train = random.Random(run.flags["seed"]).sample(run.task.train, min(32, len(run.task.train)))
    texts = {"training": {"": train}, "held out": run.task.held_out, "unrelated": unrelated.held_out}
    figures = {}
    for text, kinds in texts.items():
        some = [question for questions in kinds.values() for question in questions[:32]]
        questions = [encode_question(run.tokenizer, question) for question in some]
        with switched_off(run.parameters):
            base = prompt_residuals(run, questions)
        added = [with_it - without for with_it, without in zip(prompt_residuals(run, questions), base)]
        figures[text] = constancy(torch.cat([rows[-LAST:] for rows in added]))
        if text == "training":
            rows = torch.cat([r if q.positions is None else r[q.positions] for r, q in zip(added, questions)])
    return rows, figures

def prompt_residuals(run, questions) -> list:
    """The residual stream (T, d) float32 of each prompt after the run's layer."""
    tree = make_tree(questions, [[[]]] * len(questions))
    states = residual_stream(run.model, tree, run.flags["layer"] + 1).float()
    return [states[tree.nodes(i)] for i in range(len(questions))]

def constancy(rows) -> dict:
    """How constant the rows (N, d) are: the mean cosine of two rows, as it is and (the paper's measure) in
    absolute value, the latter's histogram in 20 bins from 0 to 1, and the first principal component's
    share."""
    cosines = pairwise_cosines(rows)
    return {"tokens": len(rows), "norm": rows.norm(dim=-1).mean().item(), "cosine": cosines.mean().item(),
            "abs_cosine": cosines.abs().mean().item(), "share": principal_component(rows)[1],
            "histogram": (cosines.abs().clamp(max=1).histc(20, 0, 1) / len(cosines)).tolist()}

def main() -> None:
    parser = Parser(description="Score finished runs again, ask them something or explain them.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_DIR", help="a run folder that train.py wrote")
    add("--prompt", help="answer this with and without the vector or LoRA instead of scoring")
    add("--explain", action="store_true", help="what the vector or LoRA does inside; writes explain.json")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for folder in args.runs:
        run = load_run(folder, args.device)
        print(folder)
        if args.explain:
            explain(run, Path(folder))
        elif args.prompt is not None:
            show_prompt(run, args.prompt)
        else:
            arms = arm_values(run.parameters, run.flags["seed"])
            print(format_table(evaluate(run.model, run.tokenizer, run.task, run.parameters, arms)))

if __name__ == "__main__":
    run_main(main)
