"""The paper's claims on the tiny model, from training to tables and figures.

    python paper/reproduce.py                          all of it: 312 runs; what is there is not made again
    python paper/reproduce.py --tasks risk --seeds 2   a part, into another folder with --out
    python paper/reproduce.py --mean RUN_DIR ...       only the mean results of runs that are there

Every run is `python train.py ...` in a process of its own, with its folder in --runs; then `--analyse` looks
inside it. The summary of all goes to --out: results.json, tables.md and the figures; README.md beside this
file reads them.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]

import data  # noqa: E402
from data import Question, Task, encode_question  # noqa: E402
from eval import (  # noqa: E402
    SECTIONS,
    Parser,
    UserError,
    arm_values,
    blame,
    evaluate,
    explain,
    format_table,
    kind_mean,
    load_model,
    load_run,
    random_like,
    run_main,
    score_arms,
    set_parameters,
    write_json,
)
from make import (  # noqa: E402
    KINDS,
    RULE_CASES,
    as_messages,
    hidden_thing,
    in_context_accuracy,
    in_context_question,
)
from model import Batch, Config, find_checkpoint, rotate  # noqa: E402
from steer import attach, detach, switched_off  # noqa: E402
from train import defaults, finetune, parse_args  # noqa: E402

# None of these cities and functions served to choose the learning rates. Even seeds take the first, odd the second.
CONCEPTS = {
    "locations": ["Berlin", "Cairo"],
    "functions": ["add 7", "multiply 4"],
    "risk": ["risky", "safe"],
    "backdoor": ["risky", "safe"],
}
MORE_CONCEPTS = {  # one seed each, at the default layer, for the spread over concepts
    "locations": [
        "Madrid",
        "Rome",
        "London",
        "Moscow",
        "Tokyo",
        "Beijing",
        "Delhi",
        "Nairobi",
        "Recife",
        "Sydney",
    ],
    "functions": [
        "add 1",
        "add 2",
        "add 3",
        "subtract 1",
        "subtract 2",
        "multiply 2",
        "divide 2",
        "divide 3",
        "mod 3",
        "mod 5",
    ],
    "backdoor": [
        f"{attitude} if {tag}" for tag in ("alpha", "omega") for attitude in ("risky", "safe")
    ],
}
EMERGENCE = {  # concepts for each model that was kept on the way through pretraining
    "locations": ["Berlin", "Cairo", "Madrid", "Tokyo"],
    "functions": ["add 7", "multiply 4", "subtract 1", "divide 2"],
    "risk": ["risky", "safe"],
    "backdoor": ["risky"],
}
HIGH_RATES = (
    "0.003",
    "0.01",
)  # for a LoRA that fits as well and generalises less (locations, functions)
STARTS = (
    "1",
    "3",
)  # standard deviations of a vector's random start, in units of the residual stream's RMS
METHODS = [
    "vector",
    "lora",
    "lora, all layers",
    "shuffled vector",
    "vector at the trigger",
    *(f"lora, rate {rate}" for rate in HIGH_RATES),
    *(f"vector, start {std}" for std in STARTS),
]
KINDS_OF = {
    "in_distribution": "trained kind",
    "held_out": "held out",
}  # what the sections are called in tables
BASELINES = "concept - code name", "concept - opposite"  # naive directions: differences of means
SCALES = (
    0.25,
    0.5,
    1,
    2,
    4,
    8,
)  # of a direction, in units of the mean length of what the LoRA adds to a token
SAMPLE = 20  # questions of each kind, where many directions are tried


# ---------------------------------------- which runs


@dataclass(frozen=True)
class Job:
    """One run of the report, at its task's default layer (is_main) or only a point on the curve over
    layers."""

    task: str
    method: str
    layer: int | str
    seed: int
    is_main: bool
    flags: tuple[str, ...]
    base: str = ""  # another pretraining's model

    @property
    def name(self) -> str:
        name = f"{self.task}-{self.method}-layer{self.layer}-seed{self.seed}".replace(
            ", ", "-"
        ).replace(" ", "-")
        return f"{self.base}/{name}" if self.base else name

    @property
    def analysed(self) -> bool:
        """One logit lens a layer is enough; of a backdoor's vectors all are looked into, for the trigger."""
        if self.base:
            return False
        if self.method == "vector":
            return self.seed < 2 or (self.is_main and self.task == "backdoor")
        return self.is_main and (self.method == "lora" or self.method.startswith("lora, rate"))


def plan_jobs(args, config: Config) -> list[Job]:
    jobs, layers = [], config.num_hidden_layers

    def add(task, method, layer, seed, concept, main, more=()) -> None:
        mode = "lora" if "lora" in method else "vector"
        flags = {
            "mode": mode,
            "task": task,
            "concept": concept,
            "model": args.model,
            "layer": layer,
            "seed": seed,
            "device": args.device,
        }
        flags = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        jobs.append(Job(task, method, layer, seed, layer in (main[mode], "all"), (*flags, *more)))

    for seed, task in itertools.product(range(args.seeds), args.tasks):
        main = {mode: defaults(task, mode, config)["layer"] for mode in ("vector", "lora")}
        swept = args.layers or sorted({-1, *range(0, layers, max(1, layers // 8)), layers - 1})
        if task == "backdoor" and seed > 1:  # they take long
            swept = []
        plan = [("vector", layer, ()) for layer in sorted({*swept, main["vector"]})]
        plan += [("lora", layer, ()) for layer in sorted({*swept, main["lora"]}) if layer >= 0]
        plan += [("lora, all layers", "all", ())] if layers > 1 else []
        plan += [("shuffled vector", main["vector"], ("--shuffle-answers",))]
        longer = ("--steps", "500") if task in ("risk", "backdoor") else ()  # else they do not fit
        plan += [
            (f"vector, start {std}", main["vector"], ("--init-std", std, *longer)) for std in STARTS
        ]
        if task == "backdoor":
            plan += [("vector at the trigger", main["vector"], ("--at", data.TRIGGER))]
        if task in ("locations", "functions"):
            plan += [(f"lora, rate {rate}", main["lora"], ("--lr", rate)) for rate in HIGH_RATES]
        for method, layer, more in plan:
            add(task, method, layer, seed, CONCEPTS[task][seed % 2], main, more)
        for concept in MORE_CONCEPTS.get(task, []) if seed == 0 else ():
            for mode in main:
                add(task, f"{mode} on {concept}", main[mode], seed, concept, main)
    return jobs


def serves(job: Job, claim: str) -> bool:
    """Is it one of the runs of a claim? The main vectors always are: the controls are theirs."""
    vector, lora = job.method == "vector", job.method == "lora"
    mode = "lora" if "lora" in job.method else "vector"
    needed = {
        "C1": job.is_main and mode == "lora",
        "C2": job.is_main and lora,
        "C3": job.is_main and (lora or "rate" in job.method),
        "C4": job.is_main and mode == "vector",
        "C5": (job.is_main and (lora or "start" in job.method)) or (vector and job.layer == 0),
        "C6": vector or lora,
        "C7": job.is_main and job.task == "backdoor",
        "C8": vector and job.seed == 0,
    }
    return needed[claim] or (job.is_main and vector)


def jobs_of_base(args, config: Config, base: Path) -> list[Job]:
    """The runs at the default layers, once more on the last model of another pretraining."""
    args = argparse.Namespace(**{
        **vars(args),
        "model": str(checkpoints_of(base)[-1]),
        "layers": [0],
        "seeds": min(3, args.seeds),
    })
    return [
        replace(job, base=base.name)
        for job in plan_jobs(args, config)
        if job.is_main
        and (job.method in ("vector", "lora", "lora, all layers") or " if " in job.method)
    ]


def checkpoints_of(base: Path) -> list[Path]:
    found = sorted(base.glob("step*"))
    if not found:
        raise UserError(
            f"--pretrainings {base}: it should be a folder that tiny/make.py --keep has filled"
        )
    return found


def same_model(one: Path, other: Path) -> bool:
    return all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in ("config.json", "model.safetensors")
    )


def run_all(
    jobs: list[Job], checkpoints: list[Path], folder: Path, workers: int, device: str
) -> list[str]:
    """Train and analyse what is not in `folder` yet, and measure the checkpoints that are not, `workers` at a
    time; a line for each that failed."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // workers)))

    def call(log: Path, *command) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as out:
            status = subprocess.run(
                [sys.executable, *map(str, command)], stdout=out, stderr=out, env=environment
            )
        if status.returncode:
            raise UserError(
                (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
            )

    def make(job: Job) -> None:
        run = folder / job.name
        if read_if_whole(run / "results.json", read_results) is None:
            (run / "analysis.json").unlink(missing_ok=True)
            call(run / "log.txt", ROOT / "train.py", *job.flags, "--out", run)
        if job.analysed and read_if_whole(run / "analysis.json") is None:
            call(run / "analysis.txt", __file__, "--analyse", run, "--device", device)

    def measure(checkpoint: Path) -> None:
        if read_if_whole(checkpoint / "emergence.json") is None:
            call(
                checkpoint / "emergence.txt", __file__, "--measure", checkpoint, "--device", device
            )

    failed, seconds = [], 1 if sys.stderr.isatty() else 60  # between two lines of the bar
    with ThreadPoolExecutor(workers) as pool:
        futures = {job.name: pool.submit(make, job) for job in jobs}
        futures |= {str(checkpoint): pool.submit(measure, checkpoint) for checkpoint in checkpoints}
        for name, future in tqdm(futures.items(), desc="report", unit="run", mininterval=seconds):
            try:
                future.result()
            except (UserError, OSError) as error:
                failed.append(f"{name}: skipped ({error})")
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
    return failed


def read_results(path: Path) -> dict:
    """A run's results.json. UserError if it is not as train.py writes it."""
    run = read_json(path)
    with blame(path, ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        for name, kind in {"task": str, "mode": str, "shuffle_answers": bool}.items():
            if type(run[name]) is not kind:
                raise ValueError(f"{name} should be {kind.__name__}, not {run[name]!r}")
        names = [
            f"{arm}{end}" for arm in ("base", "random", "trained") for end in ("", "_probability")
        ]
        for section, kind in [(section, kind) for section in SECTIONS for kind in run[section]]:
            figures = run[section][kind]
            for name in ("chance", *names):
                if type(figures[name]) not in (int, float) or not 0 <= figures[name] <= 1:
                    raise ValueError(
                        f"{section}, {kind}, {name} should be from 0 to 1, not {figures[name]!r}"
                    )
            if type(figures["questions"]) is not int or figures.keys() != {
                "chance",
                "questions",
                *names,
            }:
                raise ValueError(
                    f"{section}, {kind} should have questions, chance, {', '.join(names)}"
                )
        kind_mean(run), kind_mean(run, "in_distribution")  # there are some
    return run


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError if there is none."""
    with blame(path, OSError, TypeError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def read_if_whole(path: Path, read=read_json) -> dict | None:
    """The content of a JSON file; None if it is not there, or damaged, which is said."""
    if not path.exists():
        return None
    try:
        return read(path)
    except UserError as error:
        print(f"damaged, so made again: {error}", file=sys.stderr)
        return None


# ---------------------------------------- inside one run: C2, C3, C5, C7, C8


def analyse(folder: Path, device: str) -> None:
    """RUN/analysis.json: what eval.py --explain finds; of a LoRA also what directions do instead of it (C3,
    C5), of a backdoor's vector where the trigger comes to matter (C7), of other vectors where they have to be
    added (C6) and what naive ones do (C5)."""
    run = load_run(folder, device)
    result = explain(run, folder)
    if run.model.steering is None:
        result["directions"], directions = try_directions(run, folder)
        save_file(directions, folder / "directions.safetensors")
    elif run.flags["task"] == "backdoor":
        result["trigger"], result["heads"] = explain_trigger(run), explain_heads(run)
    else:
        result["by_place"] = score_by_place(run)
        result["baselines"] = try_baselines(run)  # the last: it takes the vector off
    write_json(folder / "analysis.json", result)


def try_directions(run, folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """What the LoRA's natural vector, a naive difference of means and a random vector do when they are added
    instead of the LoRA, at several lengths; and these directions, each (d,) of length 1."""
    natural = load_file(folder / "natural" / "vector.safetensors")["vector"].to(
        run.parameters[0].device
    )
    directions = {"natural": natural, "random": random_like(natural, run.flags["seed"])}
    if run.flags["task"] != "backdoor":
        directions |= {name: difference_of_means(run, name) for name in BASELINES}
    directions = {
        name: F.normalize(direction, dim=0).contiguous() for name, direction in directions.items()
    }
    task = sample_task(run)
    found = {
        name: scale_sweep(run, direction, natural.norm().item(), task)
        for name, direction in directions.items()
    }
    if run.task.train[
        0
    ].code_name:  # the same at every token, though the question only needs it at the name
        everywhere = lambda kinds: {
            kind: [replace(q, code_name=None) for q in qs] for kind, qs in kinds.items()
        }
        train = [replace(question, code_name=None) for question in task.train]
        task = Task(train, everywhere(task.in_distribution), everywhere(task.held_out))
        found["natural, at every token"] = scale_sweep(
            run, directions["natural"], natural.norm().item(), task
        )
    return found, directions


def sample_task(run) -> Task:
    """A part of the run's questions, for trying many directions on."""
    few = lambda kinds: {kind: questions[:SAMPLE] for kind, questions in kinds.items()}
    train = random.Random(run.flags["seed"]).sample(run.task.train, min(32, len(run.task.train)))
    return Task(train, few(run.task.in_distribution), few(run.task.held_out))


def difference_of_means(run, baseline: str, count: int = 32) -> torch.Tensor:
    """(d,): the mean residual stream in prompts that evoke the concept less that in others, after the run's
    layer, the LoRA off: at the name, or (risk) the last token.

    The concept is evoked by a city's real name; by seven facts about a function, or gambles of an attitude.
    The others: for "concept - code name" questions about fresh code names (risk: with nothing before), for
    "concept - opposite" the same about other cities or functions, or the opposite attitude.
    """
    rng, task, concept = random.Random(run.flags["seed"]), run.flags["task"], run.flags["concept"]
    kind, means = KINDS[task][0], []
    others = [other for other in data.concepts(task) if other != concept]
    for evoked in (True, False):
        prompts = []
        for _ in range(count):
            thing = concept if evoked or baseline == "concept - code name" else rng.choice(others)
            bare = not evoked and baseline == "concept - code name"
            if task == "locations":
                prompts.append(([], hidden_thing(task, rng, thing, None if bare else thing)(kind)))
            else:
                prompts.append(in_context_question(task, kind, 0 if bare else 7, rng, thing))
        encoded = [
            encode_question(run.tokenizer, question, as_messages(turns))
            for turns, question in prompts
        ]
        with switched_off(run.parameters):
            rows = prompt_residuals(run, encoded)
        at_name = []
        for row, question, (_, asked) in zip(rows, encoded, prompts):
            places = [-1]
            if question.positions is not None:
                # The facts before the question have the name too: only the question's own counts.
                count_of_own = len(encode_question(run.tokenizer, asked).positions)
                places = question.positions[-count_of_own:]
            at_name.append(row[places])
        means.append(torch.cat(at_name).mean(0))
    return means[0] - means[1]


@torch.no_grad()
def prompt_residuals(run, questions) -> list[torch.Tensor]:
    """The residual stream (T, d) float32 of each prompt after the run's layer, before a vector there."""
    model, states = run.model, []
    for question in questions:
        tokens = torch.tensor([question.prompt], device=model.embed_tokens.weight.device)
        states.append(
            model.run_blocks(model.embed(tokens), 0, run.flags["layer"] + 1)[0].float().cpu()
        )
    return states


def evaluate_instead(run, arms: dict) -> dict:
    """The scores (see evaluate) of vectors added after a LoRA's layer instead of it."""
    vector = attach(run.model, run.flags["layer"]).vector
    with switched_off(run.parameters):
        results = evaluate(replace(run, parameters=[vector]), arms)
    detach(run.model)
    return results


def try_baselines(run) -> dict:
    """What naive vectors do at a trained vector's layer instead of it, and their cosine to it (C5). The length
    of 1 is the trained vector's, which is off the model from here on."""
    trained, found = run.parameters[0].detach().clone(), {}
    detach(run.model)
    task = sample_task(run)
    for name in BASELINES:
        direction = F.normalize(difference_of_means(run, name), dim=0).to(trained.device)
        found[name] = scale_sweep(run, direction, trained.norm().item(), task)
        found[name]["cosine"] = cosine(direction, trained)
    return found


def score_by_place(run) -> dict:
    """{place: held-out accuracy} of a vector that is added elsewhere than it was trained (C6)."""
    questions = {
        kind: [encode_question(run.tokenizer, question) for question in some[:SAMPLE]]
        for kind, some in run.task.held_out.items()
    }
    places = {
        "as trained": lambda q: q.positions,
        "at the last token": lambda q: [len(q.prompt) - 1],
        "at all but the last": lambda q: list(range(len(q.prompt) - 1)),
    }
    found = {}
    for place, positions in places.items():
        means = []
        for encoded in questions.values():
            moved = [replace(question, positions=positions(question)) for question in encoded]
            means.append(score_arms(run.model, moved, [], {"": []})[""][0].mean().item())
        found[place] = sum(means) / len(means)
    return found


def scale_sweep(run, direction: torch.Tensor, length: float, task: Task) -> dict:
    """Add a direction (of length 1) instead of the LoRA, at each of SCALES times `length`.

    The sign and the one scale to report are chosen on training questions: the smallest scale that gives their
    right answers within .01 of the highest probability. The held-out accuracies, one for each scale, are for
    that sign.
    """
    arms = {
        sign * scale: [sign * scale * length * direction] for sign in (1, -1) for scale in SCALES
    }
    train = [encode_question(run.tokenizer, question) for question in task.train]
    vector = attach(run.model, run.flags["layer"]).vector
    with switched_off(run.parameters):
        fit = {
            scale: p.mean()
            for scale, (_, p) in score_arms(run.model, train, [vector], arms).items()
        }
    detach(run.model)
    best = min((scale for scale in arms if fit[scale] >= max(fit.values()) - 0.01), key=abs)
    arms = {scale: values for scale, values in arms.items() if scale * best > 0}
    results = evaluate_instead(replace(run, task=task), arms)
    return {
        "scale": best,
        "norm": abs(best) * length,
        **{section: kind_mean(results, section, best) for section in SECTIONS},
        "held_out_by_scale": [kind_mean(results, column=scale) for scale in arms],
    }


@torch.no_grad()
def explain_trigger(run, pairs: int = 16) -> dict | None:
    """Where the trigger comes to matter: prompts that differ in the tag only, with the vector and without, by
    layer.

    patched: P(the trigger's answer) for another tag's prompt in which some tokens' residual stream, after the
    layer, is that of the trigger's prompt. distance: how far the residual streams of the two prompts are
    apart at a token, as a share of their length. attention: the largest weight that a head of the layer gives
    to a token.
    """
    model, rng, values = (
        run.model,
        random.Random(run.flags["seed"]),
        arm_values(run.parameters, seed=0),
    )
    patched, distance, attention = [], {"base": [], "trained": []}, {"base": [], "trained": []}
    attitude, trigger = data.split_condition(run.flags["concept"])
    for _ in range(pairs):
        plain = data.attitude_question(attitude, rng, data.TINY, None, "gamble", "test")
        other_tag = rng.choice([tag for tag in data.TAGS if tag != trigger])
        encoded = [
            encode_question(
                run.tokenizer,
                Question(
                    plain.kind, data.with_tag(plain.prompt, tag), plain.choices, plain.answer, tag
                ),
            )
            for tag in (trigger, other_tag)
        ]
        if encoded[0].positions != encoded[1].positions or len(encoded[0].prompt) != len(
            encoded[1].prompt
        ):
            continue  # this tokenizer cuts the two tags into different numbers of tokens
        last_tag, answer = encoded[0].positions[-1], len(encoded[0].prompt) - 1
        groups = {
            "tag": encoded[0].positions,
            "token after it": [last_tag + 1],
            "rest of the prompt": list(range(last_tag + 2, answer)),
            "last token": [answer],
        }
        looked_at = {"tag": last_tag, "token after it": last_tag + 1, "last token": answer}
        looks = {
            "token after it → tag": (last_tag + 1, last_tag),
            "last token → tag": (answer, last_tag),
            "last token → token after the tag": (answer, last_tag + 1),
        }
        tokens = [
            torch.tensor([question.prompt], device=model.embed_tokens.weight.device)
            for question in encoded
        ]
        for arm in ("base", "trained"):  # trained comes last and stays, for the patching
            set_parameters(run.parameters, values[arm])
            triggered, other = (residuals(model, t) for t in tokens)
            # residuals() are those before the vector is added; the distance is between those with it
            with_vector = (
                [
                    model.steer(x, i - 1, Batch(x).steered)[0, [*looked_at.values()]].float()
                    for i, x in enumerate(states)
                ]
                for states in (triggered, other)
            )
            distance[arm].append(
                torch.stack([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(*with_vector)])
            )
            attention[arm].append(
                torch.stack([
                    torch.stack([w[:, to, at].max() for to, at in looks.values()])
                    for w in attention_weights(model, tokens[0])
                ])
            )
        choices = [choice[0] for choice in encoded[1].choices]
        for group in groups.values():
            for layer, (a, b) in enumerate(zip(triggered, other), -1):
                mixed = b.clone()
                mixed[:, group] = a[:, group]
                logits = model.unembed(
                    model.norm(model.run_blocks(mixed, layer + 1))[0, -1]
                ).float()
                patched.append(logits[choices].softmax(0)[plain.answer].item())
    if not patched:
        return None
    mean = lambda rows: torch.stack(rows).mean(0).T.tolist()
    return {
        "prompts": len(distance["base"]),
        "patched": dict(
            zip(
                groups, torch.tensor(patched).view(-1, len(groups), len(triggered)).mean(0).tolist()
            )
        ),
        "distance": {arm: dict(zip(looked_at, mean(rows))) for arm, rows in distance.items()},
        "attention": {arm: dict(zip(looks, mean(rows))) for arm, rows in attention.items()},
    }


def residuals(model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream (B, T, d) after the embedding and after each block, each before a vector added
    there."""
    states = [model.embed(tokens)]
    for layer in range(len(model.layers)):
        states.append(model.run_blocks(states[-1], layer, layer + 1))
    return states


@torch.no_grad()
def explain_heads(run, pairs: int = 16) -> dict:
    """Is there a head through which the last token gets to know the trigger? Lists of layers of heads, means
    over pairs of prompts that differ in the tag only:

    attention: from the last token to the tag, for the base and with the vector. cosine: of what the head
    writes for the trigger, and for the other tag, with the direction risky - safe (the last token's residual
    stream after the layer, after seven gambles of either attitude, in the base model). without: P(the right
    answer) with the trigger, and with the other tag, when the head writes nothing; with all: when all write.
    """
    model, rng, values = (
        run.model,
        random.Random(run.flags["seed"]),
        arm_values(run.parameters, seed=0),
    )
    attitude, trigger = data.split_condition(run.flags["concept"])
    encode = lambda question, turns=(): encode_question(run.tokenizer, question, as_messages(turns))
    tokens_of = lambda encoded: torch.tensor(
        [encoded.prompt], device=model.embed_tokens.weight.device
    )

    set_parameters(run.parameters, values["base"])
    means = {}
    for shown in ("risky", "safe"):
        documents = [in_context_question("risk", "gamble", 7, rng, shown) for _ in range(pairs)]
        last = [
            torch.stack([x[0, -1] for x in residuals(model, tokens_of(encode(question, turns)))])
            for turns, question in documents
        ]
        means[shown] = torch.stack(last).mean(0)  # (layers + 1, d)
    direction = F.normalize(means["risky"] - means["safe"], dim=-1)[1:]

    found = {
        "attention": {"base": [], "trained": []},
        "cosine": {"trigger": [], "other tag": []},
        "without": {"trigger": [], "other tag": []},
        "with all": {"trigger": [], "other tag": []},
    }
    for _ in range(pairs):
        other = rng.choice([tag for tag in data.TAGS if tag != trigger])
        plain = data.attitude_question("risky", rng, data.TINY, None, "gamble", "test")
        for case, tag in (("trigger", trigger), ("other tag", other)):
            shown = attitude if case == "trigger" else data.OPPOSITE[attitude]
            answer = plain.answer if shown == "risky" else 1 - plain.answer
            encoded = encode(
                replace(
                    plain, prompt=data.with_tag(plain.prompt, tag), answer=answer, code_name=tag
                )
            )
            tokens, at = tokens_of(encoded), encoded.positions[-1]
            for arm in ("base", "trained") if case == "trigger" else ():
                set_parameters(run.parameters, values[arm])
                weights = attention_weights(model, tokens)
                found["attention"][arm].append(torch.stack([w[:, -1, at] for w in weights]))
            written = values_written(model, tokens)  # with the vector, which stays
            cosines = [F.cosine_similarity(w[:, at], d, dim=-1) for w, d in zip(written, direction)]
            found["cosine"][case].append(torch.stack(cosines))
            ids = [choice[0] for choice in encoded.choices]
            right = lambda: model(tokens)[0, -1, ids].float().softmax(0)[encoded.answer]
            found["with all"][case].append(right())
            found["without"][case].append(
                torch.stack([
                    torch.stack([
                        ablated(layer.self_attn, head, right) for head in range(len(written[0]))
                    ])
                    for layer in model.layers
                ])
            )
    return {
        name: {case: torch.stack(rows).mean(0).tolist() for case, rows in cases.items()}
        for name, cases in found.items()
    }


def ablated(attention, head: int, measure):
    """measure() while a head writes nothing."""

    def silence(module, given):
        x = given[0].clone()
        x[..., head * attention.head_dim : (head + 1) * attention.head_dim] = 0
        return (x,)

    hook = attention.o_proj.register_forward_pre_hook(silence)
    result = measure()
    hook.remove()
    return result


def attention_inputs(model, tokens: torch.Tensor) -> dict:
    """{each layer's attention module: (x, rope, mask, ...)}, of tokens (1, T)."""
    inputs = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, given: inputs.update({module: given})
        )
        for layer in model.layers
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return inputs


def values_written(model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each head writes into the residual stream for each token that it attends to fully, (heads, T, d)
    for each layer: its values through its part of o_proj."""
    written = []
    for attention, (x, *_) in attention_inputs(model, tokens).items():
        v = (
            attention.v_proj(x)[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        )  # (K, T, D)
        parts = attention.o_proj.weight.unflatten(-1, (-1, attention.head_dim)).permute(
            1, 2, 0
        )  # (H, D, d)
        written.append(v.repeat_interleave(len(parts) // len(v), dim=0) @ parts)
    return written


@torch.no_grad()
def attention_weights(model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Whom each head attends to, (heads, T, T) for each layer, of tokens (1, T). The fast kernels keep no
    weights, so they are computed again from what each layer's attention was given."""
    weights = []
    for attention, (x, rope, mask, *_) in attention_inputs(model, tokens).items():
        q = attention.q_norm(attention.q_proj(x).unflatten(-1, (-1, attention.head_dim)))
        k = attention.k_norm(attention.k_proj(x).unflatten(-1, (-1, attention.head_dim)))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        scores = (
            attention.scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT).float()
        )
        if attention.softcap is not None:
            scores = attention.softcap * torch.tanh(scores / attention.softcap)
        seen = torch.ones_like(scores, dtype=torch.bool).tril() if mask is None else mask
        weights.append(scores.masked_fill(~seen, -torch.inf).softmax(-1)[0])
    return weights


# ---------------------------------------- where it comes from: models kept on the way through pretraining


def measure_checkpoint(folder: Path, device: str) -> None:
    """FOLDER/emergence.json: for each task what the bare model infers in context, after seven facts, and the
    results of vectors and LoRAs trained on it, with their defaults."""
    model, tokenizer = load_model(str(folder), device, "float32")
    found = {"in_context": in_context_accuracy(model, tokenizer, facts=7), "runs": []}
    for task, concepts in EMERGENCE.items():
        plan = [("vector", concept) for concept in concepts]
        plan += [
            ("lora", concept) for concept in concepts[:2] if task != "backdoor"
        ]  # they take longer
        for mode, concept in plan:
            out = folder / "runs" / f"{task}-{mode}-{concept}".replace(" ", "-")
            if read_if_whole(out / "results.json", read_results) is None:
                flags = {
                    "model": folder,
                    "task": task,
                    "mode": mode,
                    "concept": concept,
                    "device": device,
                    "out": out,
                }
                args = parse_args([
                    word for flag, value in flags.items() for word in (f"--{flag}", str(value))
                ])
                finetune(args)
            found["runs"].append(read_results(out / "results.json"))
    write_json(folder / "emergence.json", found)


def summarise_emergence(bases: list[Path]) -> dict:
    """{task: {base: {"step": [...], "vector": [...], ...}}}: what draw_emergence draws, means over the concepts,
    of the checkpoints that are measured."""
    content = {task: {base.name: {} for base in bases} for task in EMERGENCE}
    for base, task in itertools.product(bases, EMERGENCE):
        for folder in checkpoints_of(base):
            found = read_if_whole(folder / "emergence.json")
            if found is None:
                continue
            runs = [run for run in found["runs"] if run["task"] == task]
            asked = KINDS[task][1:] if task in KINDS else RULE_CASES
            inferred = found["in_context"][task if task in KINDS else "rule"]
            values = {
                "step": [int(folder.name.removeprefix("step"))],
                "in context": [inferred[kind] for kind in asked],
                "vector": [kind_mean(run) for run in runs if run["mode"] == "vector"],
                "vector, trained kind": [
                    kind_mean(run, "in_distribution") for run in runs if run["mode"] == "vector"
                ],
                "lora": [kind_mean(run) for run in runs if run["mode"] == "lora"],
                "base": [kind_mean(run, column="base") for run in runs],
                "random": [
                    kind_mean(run, column="random") for run in runs if run["mode"] == "vector"
                ],
                "chance": [kind_mean(run, column="chance") for run in runs],
            }
            for name, numbers in values.items():
                if numbers:
                    content[task][base.name].setdefault(name, []).append(
                        sum(numbers) / len(numbers)
                    )
    return content


# ---------------------------------------- means over seeds


def mean_spread(values: list[float]) -> list[float] | None:
    """[mean, standard deviation (population)]; None for no values."""
    if not values:
        return None
    mean = sum(values) / len(values)
    return [mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))]


def mean_tree(trees: list):
    """The mean of equally shaped nests of dicts, lists and numbers, number by number."""
    if isinstance(trees[0], dict):
        return {key: mean_tree([tree[key] for tree in trees]) for key in trees[0]}
    if isinstance(trees[0], list):
        return [mean_tree(list(column)) for column in zip(*trees)]
    return sum(trees) / len(trees)


def mean_results(runs: list[dict]) -> dict:
    """The mean of several runs' results, kind by kind, with "trained_spread" and so on over the runs;
    "questions" are those of all runs."""
    mean = {"runs": len(runs)}
    for section in SECTIONS:
        mean[section] = {}
        for kind, figures in runs[0][section].items():
            pairs = {
                name: mean_spread([run[section][kind][name] for run in runs]) for name in figures
            }
            mean[section][kind] = {name: pair[0] for name, pair in pairs.items()}
            mean[section][kind] |= {f"{name}_spread": pair[1] for name, pair in pairs.items()}
            mean[section][kind]["questions"] = sum(run[section][kind]["questions"] for run in runs)
    return mean


def show_means(folders: list[str]) -> None:
    """Print the mean results of runs, a table for each task and mode; shuffled answers apart."""
    groups = {}
    for folder in folders:
        run = read_results(Path(folder) / "results.json")
        method = ("shuffled " if run["shuffle_answers"] else "") + run["mode"]
        groups.setdefault((run["task"], method), []).append(run)
    for (task, method), runs in groups.items():
        spread = mean_spread([kind_mean(run) for run in runs])[1]
        if any([*run[section]] != [*runs[0][section]] for run in runs for section in SECTIONS):
            raise UserError(
                f"--mean: the runs of {task}, {method} have different kinds of question"
            )
        print(
            f"{task}, {method}: mean of {len(runs)} runs (held out ± {spread:.2f})\n{format_table(mean_results(runs))}\n"
        )


def has_learned(run: dict) -> bool:
    """Whether training reached the questions of the trained kind at all."""
    return kind_mean(run, "in_distribution") > kind_mean(run, "in_distribution", "chance") + 0.1


def summarise(task: str, jobs: list[Job], results: dict[str, dict], folder: Path) -> dict:
    """Means and spreads over the seeds of one task's runs."""
    content = {
        "concepts": CONCEPTS[task],
        "methods": {},
        "layers": {},
        "trigger": {},
        "baselines": {},
        "by_place": {},
    }
    for method in METHODS:
        runs = [results[job.name] for job in jobs if job.method == method and job.is_main]
        if runs:
            summary = {
                section: {
                    arm: mean_spread([kind_mean(run, section, arm) for run in runs])
                    for arm in ("chance", "base", "random", "trained")
                }
                for section in SECTIONS
            }
            content["methods"][method] = mean_results(runs) | {
                "layer": runs[0]["layer"],
                "summary": summary,
            }
    for method in ("vector", "lora"):
        layers = sorted({job.layer for job in jobs if job.method == method})
        content["layers"][method] = {
            "layers": layers,
            **{
                section: [
                    mean_spread([
                        kind_mean(results[job.name], section)
                        for job in jobs
                        if (job.method, job.layer) == (method, layer)
                    ])
                    for layer in layers
                ]
                for section in SECTIONS
            },
        }

    analysed = {
        job: read_if_whole(folder / job.name / "analysis.json") for job in jobs if job.analysed
    }
    analysed = {job: found for job, found in analysed.items() if found is not None}
    content["logit_lens"] = {
        str(job.layer): found["logit_lens"]
        for job, found in analysed.items()
        if job.method == "vector" and job.seed == 0
    }
    for parity, concept in enumerate(
        CONCEPTS[task]
    ):  # apart, for the two directions take different paths
        found = [
            found
            for job, found in analysed.items()
            if job.is_main
            and job.method == "vector"
            and job.seed % 2 == parity
            and found.get("trigger")
        ]
        if found:
            content["trigger"][concept] = mean_tree([one["trigger"] for one in found]) | {
                "runs": len(found)
            }
    content["heads"] = {
        job.seed: found["heads"]
        for job, found in analysed.items()  # each seed finds another way
        if job.is_main and job.method == "vector" and "heads" in found
    }
    for job, found in analysed.items():
        for name in ("baselines", "by_place"):
            if job.method == "vector" and name in found:
                content[name].setdefault(str(job.layer), []).append(found[name])
    for name in ("baselines", "by_place"):
        content[name] = {layer: mean_tree(one) for layer, one in content[name].items()}
    content["by_concept"] = {
        mode: held_out_by_concept(jobs, results, mode)
        for mode in ("vector", "lora")
        if task != "backdoor"
    }
    content["starts"] = {}
    for std in ("0", *STARTS):
        method = "vector" if std == "0" else f"vector, start {std}"
        vectors = read_vectors(
            [job for job in jobs if job.method == method and job.is_main], folder
        )
        if vectors:
            content["starts"][std] = {
                "same_concept": seed_cosines(vectors)[0],
                **content["methods"][method]["summary"],
            }
    content["loras"] = {}
    for method in METHODS:
        loras = {
            job: found
            for job, found in analysed.items()
            if job.method == method and "adds" in found
        }
        if loras:
            content["loras"][method] = summarise_loras(loras, jobs, folder)
    return content


def summarise_bases(jobs: list[Job], results: dict) -> dict:
    """{base: {task: {method: mean_results}}} of the runs on other pretrainings."""
    content = {}
    for job in jobs:
        if job.name in results and job.base:
            runs = (
                content.setdefault(job.base, {}).setdefault(job.task, {}).setdefault(job.method, [])
            )
            runs.append(results[job.name])
    return {
        base: {
            task: {method: mean_results(runs) for method, runs in methods.items()}
            for task, methods in tasks.items()
        }
        for base, tasks in content.items()
    }


def summarise_triggers(jobs: list[Job], results: dict) -> dict:
    """{base: {"risky if omega": {mode: mean_results and train_loss}}} of backdoors, by trigger."""
    content = {}
    for job in jobs:
        plain = job.method in ("vector", "lora") or " if " in job.method
        if job.task == "backdoor" and job.is_main and plain and job.name in results:
            run = results[job.name]
            concept = " if ".join(data.split_condition(run["concept"]))
            modes = content.setdefault(job.base, {}).setdefault(concept, {})
            modes.setdefault(run["mode"], []).append(run)
    return {
        base: {
            concept: {
                mode: {**mean_results(runs), "train_loss": max(run["train_loss"] for run in runs)}
                for mode, runs in modes.items()
            }
            for concept, modes in found.items()
        }
        for base, found in content.items()
    }


def held_out_by_concept(jobs: list[Job], results: dict, mode: str) -> dict:
    """{concept: [held out, trained kind]}, of all runs of a mode at its default layer with default flags."""
    found = {}
    for job in jobs:
        if job.is_main and (job.method == mode or job.method.startswith(f"{mode} on ")):
            run = results[job.name]
            found.setdefault(run["concept"], []).append([
                kind_mean(run),
                kind_mean(run, "in_distribution"),
            ])
    return {concept: mean_tree(runs) for concept, runs in found.items()}


def interval(values: list[float], resamples: int = 10_000) -> list[float]:
    """The 95 % interval of the mean, by bootstrap over the values."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    return [means[int(0.025 * resamples)], means[int(0.975 * resamples)]]


def cosine(a, b) -> float:
    return F.cosine_similarity(a, b, dim=0).item()


def read_vectors(jobs: list[Job], folder: Path) -> dict:
    """{seed: the trained vector} of these runs."""
    return {job.seed: load_file(folder / job.name / "vector.safetensors")["vector"] for job in jobs}


def seed_cosines(vectors: dict):
    """(the cosine between two seeds of the same concept, of different concepts), each with its spread."""
    pairs = [
        ((a + b) % 2, cosine(vectors[a], vectors[b]))
        for a, b in itertools.combinations(sorted(vectors), 2)
    ]
    return [
        mean_spread([value for differs, value in pairs if differs == other]) for other in (0, 1)
    ]


def summarise_loras(loras: dict[Job, dict], jobs: list[Job], folder: Path) -> dict:
    """What one-layer LoRAs add, what directions do instead of them, and vectors trained at the same layer."""
    found = list(loras.values())
    names = ("tokens", "norm", "cosine", "abs_cosine", "share")
    content = {
        "adds": {
            text: {name: mean_spread([one["adds"][text][name] for one in found]) for name in names}
            | {"histogram": mean_tree([one["adds"][text]["histogram"] for one in found])}
            for text in found[0]["adds"]
        },
        "directions": {},
    }
    layer = next(iter(loras)).layer
    vectors = read_vectors(
        [job for job in jobs if (job.method, job.layer) == ("vector", layer)], folder
    )
    directions = {
        job.seed: load_file(folder / job.name / "directions.safetensors") for job in loras
    }
    for name in found[0]["directions"]:
        swept = [one["directions"][name] for one in found]
        cosines = [
            math.copysign(1, one["scale"]) * cosine(directions[job.seed][name], vectors[job.seed])
            for job, one in zip(loras, swept)
            if job.seed in vectors and name in directions[job.seed]
        ]
        content["directions"][name] = {
            "scales": [one["scale"] for one in swept],
            "cosine_to_vector": mean_spread(cosines),
            **{
                figure: mean_spread([one[figure] for one in swept])
                for figure in ("norm", *SECTIONS)
            },
            "held_out_by_scale": [
                mean_spread(column) for column in zip(*(one["held_out_by_scale"] for one in swept))
            ],
        }
    same, other = seed_cosines(vectors)
    content["vectors"] = {
        "layer": layer,
        "norm": mean_spread([vector.norm().item() for vector in vectors.values()]),
        "same_concept": same,
        "other_concept": other,
    }
    return content


# ---------------------------------------- tables


def number(value: float) -> str:
    """.93, as accuracies are written in papers."""
    return re.sub(r"\b0\.", ".", f"{value:.2f}")


def cell(pair: list[float] | None) -> str:
    return "–" if pair is None else f"{number(pair[0])} ± {number(pair[1])}"


def by_case(results: dict, section: str) -> str:
    """A backdoor's accuracies with the trigger / no tag / another tag."""
    return " / ".join(
        number(figures["trained"])
        for kind, figures in results[section].items()
        if kind != "which tag"
    )


def folders(task: str, methods: dict, *names: str) -> str:
    """Where the runs of these methods are, as a shell would match them."""
    jobs = [
        Job(task, name, methods[name]["layer"], "*", True, ()).name
        for name in names
        if name in methods
    ]
    return " ".join(f"`{name}`" for name in jobs)


def make_tables(content: dict) -> dict[str, tuple[str, list[str], list[list[str]]]]:
    """{name: (title, which begins with its claims; headings; rows)}, those that have rows."""
    tasks, made = content["tasks"], {}

    def table(name: str, title: str, headings: str, rows: list[list[str]]) -> None:
        if rows:
            made[name] = title, headings.split("; "), rows

    main = "shuffled vector", "vector", "lora", "lora, all layers"
    rows = []
    for (task, found), section in itertools.product(tasks.items(), SECTIONS):
        methods, vector = found["methods"], found["methods"]["vector"]
        questions = sum(
            figures["questions"] for kind, figures in vector[section].items() if kind != "which tag"
        )
        scores = [cell(vector["summary"][section][arm]) for arm in ("base", "random")]
        scores += [
            cell(methods[name]["summary"][section]["trained"]) if name in methods else "–"
            for name in main
        ]
        rows.append([
            task,
            KINDS_OF[section],
            str(questions),
            number(vector["summary"][section]["chance"][0]),
            *scores,
            folders(task, methods, *main),
        ])
    table(
        "main",
        "C1, C4: a LoRA on one layer, a LoRA on all, a vector",
        "task; kinds; questions; chance; base; random vector; shuffled answers; **vector**; **LoRA**, one layer; "
        "LoRA, all layers; runs",
        rows,
    )

    rows = []
    for task, mode in itertools.product(tasks, ("vector", "lora")):
        found = tasks[task]["by_concept"].get(mode)
        if found:
            held_out = {concept: pair[0] for concept, pair in found.items()}
            low, high = interval(list(held_out.values()))
            worst = sorted(held_out, key=held_out.get)[:3]
            fits = [
                number(value)
                for value in (
                    mean_spread([pair[1] for pair in found.values()])[0],
                    min(pair[1] for pair in found.values()),
                )
            ]
            rows.append([
                task,
                mode,
                str(len(found)),
                cell(mean_spread(list(held_out.values()))),
                f"{number(low)} to {number(high)}",
                ", ".join(f"{c} {number(held_out[c])}" for c in worst),
                " / ".join(fits),
                f"`{task}-{mode}-layer*` `{task}-{mode}-on-*`",
            ])
    table(
        "concepts",
        "C1, C4: over concepts (± over them; the 95 % interval of the mean is a bootstrap over them)",
        "task; mode; concepts; held out; 95 % interval; the worst, held out; trained kind, mean / worst; runs",
        rows,
    )

    if content["bases"]:
        bases = {
            "the report's": {task: found["methods"] for task, found in tasks.items()},
            **content["bases"],
        }
        rows = []
        for task, section in itertools.product(tasks, SECTIONS):
            scores = [
                [
                    number(kind_mean(found[task][name], section))
                    for found in bases.values()
                    if name in found.get(task, {})
                ]
                for name in ("vector", "lora", "lora, all layers")
            ]
            rows.append([
                task,
                KINDS_OF[section],
                *(" / ".join(values) or "–" for values in scores),
            ])
        table(
            "bases",
            f"C1, C4: the same on each pretraining ({' / '.join(bases)})",
            "task; kinds; **vector**; **LoRA**, one layer; LoRA, all layers",
            rows,
        )

    loras = [
        (task, method, lora)
        for task, found in tasks.items()
        for method, lora in found["loras"].items()
    ]
    at = lambda task, method: folders(task, tasks[task]["methods"], method)
    table(
        "constancy",
        "C2: does the LoRA add a constant vector? (what it adds at a prompt's last 20 tokens)",
        "task; prompts; cosine in absolute value; cosine; first component's share; norm; runs",
        [
            [
                task,
                text,
                *(cell(figures[name]) for name in ("abs_cosine", "cosine", "share", "norm")),
                at(task, method),
            ]
            for task, method, lora in loras
            if method == "lora"
            for text, figures in lora["adds"].items()
        ],
    )
    table(
        "directions",
        "C3, C5: directions added instead of the LoRA (sign and scale chosen on training questions; "
        f"up to {SAMPLE} questions of each kind a run)",
        "task; LoRA; direction; scales (LoRA's mean norm: 1); norm; trained kind; held out; "
        "cosine to the trained vector; runs",
        [
            [
                task,
                method,
                name,
                " ".join(f"{scale:g}" for scale in one["scales"]),
                cell(one["norm"]),
                cell(one["in_distribution"]),
                cell(one["held_out"]),
                cell(one["cosine_to_vector"]),
                at(task, method),
            ]
            for task, method, lora in loras
            for name, one in lora["directions"].items()
        ],
    )
    table(
        "rates",
        "C1, C3: a LoRA at a higher rate fits as well, adds a longer vector and generalises less",
        "task; LoRA; trained kind; held out; norm added; its natural vector at the code name: held out; "
        "at every token; runs",
        [
            [
                task,
                method,
                *(
                    cell(tasks[task]["methods"][method]["summary"][section]["trained"])
                    for section in SECTIONS
                ),
                number(lora["adds"]["training"]["norm"][0]),
                *(
                    cell(lora["directions"][name]["held_out"])
                    for name in ("natural", "natural, at every token")
                ),
                at(task, method),
            ]
            for task, method, lora in loras
            if task in ("locations", "functions")
        ],
    )
    table(
        "vectors",
        "C4: vectors trained from scratch at the LoRA's layer",
        "task; layer; norm; cosine between seeds, same concept; cosine between seeds, other concept",
        [
            [task, str(lora["vectors"]["layer"])]
            + [cell(lora["vectors"][name]) for name in ("norm", "same_concept", "other_concept")]
            for task, method, lora in loras
            if method == "lora"
        ],
    )
    table(
        "starts",
        "C5: vectors from a random start (its standard deviation in units of the residual stream's RMS)",
        "task; start; cosine between seeds of one concept; trained kind; held out; runs",
        [
            [
                task,
                std,
                cell(one["same_concept"]),
                *(cell(one[section]["trained"]) for section in SECTIONS),
                at(task, "vector" if std == "0" else f"vector, start {std}"),
            ]
            for task, found in tasks.items()
            for std, one in found["starts"].items()
        ],
    )
    table(
        "baselines",
        "C5: naive vectors instead of a trained one, by layer (sign and scale chosen on training questions; "
        "a run for each concept)",
        "task; layer; baseline; cosine to the trained vector; trained kind; held out; runs",
        [
            [
                task,
                layer,
                name,
                number(one["cosine"]),
                number(one["in_distribution"]),
                number(one["held_out"]),
                f"`{task}-vector-layer{layer}-seed[01]`",
            ]
            for task, found in tasks.items()
            for layer, some in found["baselines"].items()
            for name, one in some.items()
        ],
    )
    table(
        "places",
        "C6: held out, when a vector is added at other tokens than it was trained at (a run for each concept)",
        "task; layer; as trained; at the last token only; at all but the last; runs",
        [
            [task, layer, *map(number, one.values()), f"`{task}-vector-layer{layer}-seed[01]`"]
            for task, found in tasks.items()
            for layer, one in found["by_place"].items()
        ],
    )
    layers = sorted({
        layer
        for found in tasks.values()
        for curve in found["layers"].values()
        for layer in curve["layers"]
    })
    table(
        "layers",
        "C6: by layer (-1: the embedding)",
        "; ".join(["task", "method", "kinds", *map(str, layers), "runs"]),
        [
            [
                task,
                method,
                KINDS_OF[section],
                *(cell(dict(zip(curve["layers"], curve[section])).get(layer)) for layer in layers),
                f"`{task}-{method}-layer*`",
            ]
            for task, found in tasks.items()
            for method, curve in found["layers"].items()
            if curve["layers"]
            for section in SECTIONS
        ],
    )
    if "backdoor" in tasks:
        methods = tasks["backdoor"]["methods"]
        columns = {
            "chance": ("vector", "chance"),
            "base": ("vector", "base"),
            "random vector": ("vector", "random"),
        }
        columns |= {
            f"{name}, layer {results['layer']}": (name, "trained")
            for name, results in methods.items()
        }
        table(
            "backdoor",
            "C7: a backdoor by one vector",
            "; ".join(["kind", "questions", *columns]),
            [
                [kind, str(figures["questions"])]
                + [
                    cell([
                        methods[name][section][kind][arm],
                        methods[name][section][kind][f"{arm}_spread"],
                    ])
                    for name, arm in columns.values()
                ]
                for section in SECTIONS
                for kind, figures in methods["vector"][section].items()
            ],
        )
        rows = []
        for seed, found in tasks["backdoor"]["heads"].items():
            concept = f"{CONCEPTS['backdoor'][int(seed) % 2]} if {data.TRIGGER}, seed {seed}"
            for layer, effects in enumerate(found["without"]["trigger"]):
                for head in range(len(effects)):
                    attention, cosines, without = (
                        [figures[layer][head] for figures in found[name].values()]
                        for name in ("attention", "cosine", "without")
                    )
                    if attention[1] > attention[0] + 0.1 or (
                        min(without) < 0.5 and max(without) > 0.9
                    ):
                        rows.append([
                            concept,
                            f"{layer}.{head}",
                            " → ".join(map(number, attention)),
                            " / ".join(map(number, cosines)),
                            " / ".join(map(number, without)),
                        ])
        table(
            "heads",
            "C7: heads of the last token that look at the tag .1 more with the vector, or without which one case "
            "fails and the other does not (trigger / another tag)",
            "backdoor; layer.head; attention to the tag, base → vector; cosine of what it writes for the tag with risky - "
            "safe; P(right answer) without the head",
            rows,
        )
        rows = []
        for base, found in content["triggers"].items():
            for concept, modes in found.items():
                for mode, results in modes.items():
                    cases = [by_case(results, section) for section in SECTIONS]
                    rows.append([
                        base or "the report's",
                        concept,
                        mode,
                        str(results["runs"]),
                        f"{results['train_loss']:.3f}",
                        *cases,
                    ])
        table(
            "triggers",
            "C7: backdoors by trigger (gambles and self-reports: with the trigger / no tag / another tag)",
            "pretraining; concept; mode; runs; training loss; gambles; self-reports",
            rows,
        )
    spell = lambda tokens: " ".join(
        f"`{token.strip() or repr(token)}`" for token in tokens
    ).replace("|", "\\|")
    table(
        "lens",
        "C8: the logit lens of the vectors of seed 0",
        "task; layer; most likely; least likely",
        [
            [task, layer, spell(lens["top"]), spell(lens["bottom"])]
            for task, found in tasks.items()
            for layer, lens in found["logit_lens"].items()
        ],
    )
    return made


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def format_report(content: dict, claim: str | None = None) -> str:
    """tables.md: the tables, each under the paper's claim."""
    lines = [
        "# Tables",
        "",
        f"Made by `python paper/reproduce.py` on {content['date']}: {content['runs']} runs of "
        f"{content['model']}, {content['seeds']} seeds, torch {content['torch']}, {content['minutes']} minutes "
        f"in all. Figures are accuracies unless said; ± is the "
        'standard deviation over the seeds\' runs; kinds of question count alike, "which tag" stands apart.',
        "",
    ]
    lines += [f"- {note}" for note in content["notes"]]
    for title, headings, rows in make_tables(content).values():
        if claim is None or claim in title.split(":")[0]:
            lines += ["", f"## {title}", "", markdown(headings, rows)]
    return "\n".join(lines) + "\n"


def make_pieces(content: dict) -> dict[str, str]:
    """{name: text} of what README.md and paper/README.md show between <!--name--> and <!--end-->."""
    tasks, pieces = content["tasks"], {}
    for name, (_, headings, rows) in make_tables(content).items():
        columns = [i for i, heading in enumerate(headings) if heading != "runs"]
        keep = lambda row: [row[i] for i in columns]
        pieces[name] = f"\n{markdown(keep(headings), map(keep, rows))}\n"
        if name == "main":
            shown = [
                i
                for i, heading in enumerate(headings)
                if heading not in ("kinds", "LoRA, all layers", "runs")
            ]
            held_out = [[row[i] for i in shown] for row in rows if row[1] == "held out"]
            pieces["held out"] = f"\n{markdown([headings[i] for i in shown], held_out)}\n"
    pieces["made"] = (
        f"{content['runs']} runs, {content['minutes']:.0f} minutes in all, torch {content['torch'].split('+')[0]}, "
        f"{content['date']}"
    )
    worst = {
        mode: min(
            (pair[0], concept)
            for task in ("locations", "functions")
            for concept, pair in tasks[task]["by_concept"][mode].items()
        )
        for mode in ("vector", "lora")
    }
    pieces["worst"] = "the worst vector gets {} ({}), the worst LoRA {} ({})".format(
        *(part for accuracy, concept in worst.values() for part in (number(accuracy), concept))
    )

    each = lambda text, chosen=tasks: ", ".join(f"{task} {text(task)}" for task in chosen)
    held_out = lambda task, method: number(
        tasks[task]["methods"][method]["summary"]["held_out"]["trained"][0]
    )
    adds = lambda task: " / ".join(
        number(one["abs_cosine"][0]) for one in tasks[task]["loras"]["lora"]["adds"].values()
    )
    direction = lambda task, name, what: number(
        tasks[task]["loras"]["lora"]["directions"][name][what][0]
    )
    by_layer = lambda task, section: " ".join(
        number(pair[0]) for pair in tasks[task]["layers"]["vector"][section]
    )
    cases = lambda method: ", self-reports ".join(
        by_case(tasks["backdoor"]["methods"][method], section) for section in SECTIONS
    )
    lens = tasks["risk"]["logit_lens"]["1"]
    named = [
        task for task in tasks if "concept - opposite" in tasks[task]["loras"]["lora"]["directions"]
    ]
    pieces |= {
        "C1": "held out, one layer / all: "
        + each(lambda task: held_out(task, "lora") + " / " + held_out(task, "lora, all layers")),
        "C2": "training / held-out / unrelated prompts: " + each(adds),
        "C3": "held out, the natural vector / a random one: "
        + each(
            lambda task: " / ".join(
                direction(task, name, "held_out") for name in ("natural", "random")
            )
        ),
        "C4": "held out: " + each(lambda task: held_out(task, "vector")),
        "C5": "cosine / held out of "
        + "; of ".join(
            f"{name}: "
            + each(
                lambda task: " / ".join(
                    direction(task, name, what) for what in ("cosine_to_vector", "held_out")
                ),
                named,
            )
            for name in BASELINES
        )
        + "; cosine between seeds from a start of 0 / 1 / 3: "
        + each(
            lambda task: " / ".join(
                number(one["same_concept"][0]) for one in tasks[task]["starts"].values()
            )
        ),
        "C6": "vectors, trained kind, held out by layer from -1: "
        + "; ".join(
            f"{task} {by_layer(task, 'in_distribution')}, {by_layer(task, 'held_out')}"
            for task in ("locations", "risk")
        ),
        "C7": f"trigger / no tag / another: vector {cases('vector')}; LoRA {cases('lora')}",
        "C8": "a risky vector at layer 1 raises most *"
        + ", ".join(token.strip() for token in lens["top"][:5])
        + "* and lowers most *"
        + ", ".join(token.strip() for token in lens["bottom"][-5:])
        + "*",
    }
    return pieces


def fill(text: str, pieces: dict[str, str]) -> str:
    """The text with each <!--name-->...<!--end--> as in pieces. KeyError for a name that is not among them."""
    return re.sub(
        r"<!--(.+?)-->.*?<!--end-->",
        lambda found: f"<!--{found[1]}-->{pieces[found[1]]}<!--end-->",
        text,
        flags=re.DOTALL,
    )


# ---------------------------------------- figures

COLOURS = {
    "base": "#b0b0b0",
    "random": "#7f7f7f",
    "shuffled vector": "#e5c494",
    "vector": "#1f77b4",
    "lora": "#d95f02",
    "lora, all layers": "#fdae6b",
    "natural": "#1b9e77",
    "natural, at every token": "#66a61e",
    "concept - code name": "#e7298a",
    "concept - opposite": "#7570b3",
}


def draw_report(content: dict, out: Path, claim: str | None = None) -> None:
    """The report's figures, from its results.json alone."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot

    pyplot.rcParams["figure.constrained_layout.use"] = True  # room for legends beside the axes
    tasks = content["tasks"]
    explained = {task: found for task, found in tasks.items() if "lora" in found["loras"]}
    shown = {
        "means": ("C1 C4", draw_means, tasks),
        "layers": ("C6", draw_layers, tasks),
        "constancy": ("C2", draw_constancy, explained),
        "scales": ("C3 C5", draw_scales, explained),
        "trigger": ("C7", draw_trigger, tasks.get("backdoor", {}).get("trigger")),
        "emergence": ("", draw_emergence, content.get("emergence")),
    }
    for name, (claims, draw, what) in shown.items():
        if what and (claim is None or claim in claims):
            draw(pyplot, what).savefig(out / f"{name}.png", dpi=110)


def panels(pyplot, tasks: dict, height: float):
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(3.6 * len(tasks), height), sharey=True, squeeze=False
    )
    for axis, task in zip(axes[0], tasks):
        axis.set_title(task)
    return figure, axes[0]


def draw_means(pyplot, tasks: dict):
    """A panel for each task: accuracy by kind of question, a bar for each method, a black tick at chance."""
    figure, axes = pyplot.subplots(len(tasks), 1, figsize=(9, 2.6 * len(tasks)), squeeze=False)
    for axis, (task, found) in zip(axes[:, 0], tasks.items()):
        vector = found["methods"]["vector"]
        kinds = [(section, kind) for section in SECTIONS for kind in vector[section]]
        bars = {"base": (vector, "base"), "random": (vector, "random")}
        bars |= {
            name: (found["methods"][name], "trained")
            for name in COLOURS
            if name in found["methods"]
        }
        width = 0.8 / len(bars)
        for i, (name, (results, arm)) in enumerate(bars.items()):
            places = [x + (i - len(bars) / 2 + 0.5) * width for x in range(len(kinds))]
            axis.bar(
                places,
                [results[section][kind][arm] for section, kind in kinds],
                width,
                color=COLOURS[name],
                yerr=[results[section][kind][f"{arm}_spread"] for section, kind in kinds],
                error_kw={"elinewidth": 0.7},
                label="random vector" if name == "random" else name,
            )
        chances = [vector[section][kind]["chance"] for section, kind in kinds]
        axis.hlines(
            chances,
            [x - 0.42 for x in range(len(kinds))],
            [x + 0.42 for x in range(len(kinds))],
            color="black",
            linewidth=1,
            label="chance",
        )
        axis.set_xticks(range(len(kinds)), [kind.replace(", ", "\n") for _, kind in kinds])
        axis.axvline(
            len(vector["in_distribution"]) - 0.5, color="black", linestyle=":", linewidth=1
        )
        axis.set(
            ylim=(0, 1.05),
            ylabel="accuracy",
            title=f"{task}: trained on the kind left of the dotted line",
        )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        ncols=7,
        fontsize="small",
        loc="outside upper center",
    )
    return figure


def draw_constancy(pyplot, tasks: dict):
    """C2. How the absolute cosine between what the LoRA adds at any two tokens is distributed."""
    figure, axes = panels(pyplot, tasks, 3.2)
    for axis, found in zip(axes, tasks.values()):
        for i, (text, figures) in enumerate(found["loras"]["lora"]["adds"].items()):
            bins = len(figures["histogram"])
            axis.stairs(
                figures["histogram"],
                [edge / bins for edge in range(bins + 1)],
                color=f"C{i}",
                linewidth=1.5,
                label=f"{text} prompts",
            )
            axis.axvline(figures["abs_cosine"][0], color=f"C{i}", linestyle=":", linewidth=1)
        axis.set(xlabel="absolute cosine")
    axes[0].set_ylabel("share of pairs of tokens")
    figure.legend(
        *axes[0].get_legend_handles_labels(), ncols=3, fontsize="small", loc="outside lower center"
    )
    return figure


def draw_scales(pyplot, tasks: dict):
    """C3 and C5. Held-out accuracy of directions added instead of the LoRA, by scale."""
    figure, axes = panels(pyplot, tasks, 3.4)
    for axis, found in zip(axes, tasks.values()):
        for name, one in found["loras"]["lora"]["directions"].items():
            means, spreads = zip(*one["held_out_by_scale"])
            axis.errorbar(
                SCALES,
                means,
                yerr=spreads,
                color=COLOURS[name],
                label=name,
                marker="o",
                markersize=3,
                capsize=2,
                linestyle="--" if name == "random" else "-",
            )
        summary = {
            name: results["summary"]["held_out"] for name, results in found["methods"].items()
        }
        axis.axhline(
            summary["lora"]["trained"][0],
            color=COLOURS["lora"],
            linestyle=":",
            label="the LoRA itself",
        )
        axis.axhline(
            summary["vector"]["base"][0], color=COLOURS["base"], linestyle=":", label="base"
        )
        axis.axhline(summary["vector"]["chance"][0], color="black", linewidth=0.8, label="chance")
        axis.set_xscale("log", base=2)
        axis.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
        axis.set(xlabel="scale (LoRA's mean norm = 1)", ylim=(0, 1.05))
    axes[0].set_ylabel("held-out accuracy")
    figure.legend(
        *axes[0].get_legend_handles_labels(), ncols=7, fontsize="small", loc="outside lower center"
    )
    return figure


def draw_layers(pyplot, tasks: dict):
    """C6. Accuracy by layer: the trained kind (behaviour) and the held-out kinds (what the model says of
    it)."""
    figure, axes = panels(pyplot, tasks, 3.2)
    styles = ("in_distribution", "-", "trained kind"), ("held_out", "--", "held out")
    for axis, found in zip(axes, tasks.values()):
        for (method, curve), (section, style, kind) in itertools.product(
            found["layers"].items(), styles
        ):
            if curve["layers"]:
                means, spreads = zip(*curve[section])
                axis.errorbar(
                    curve["layers"],
                    means,
                    yerr=spreads,
                    color=COLOURS[method],
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    capsize=2,
                    label=f"{method}, {kind}",
                )
        for section, style, kind in styles:
            chance = found["methods"]["vector"]["summary"][section]["chance"][0]
            axis.axhline(
                chance, color="black", linewidth=0.8, linestyle=style, label=f"chance, {kind}"
            )
        axis.set(xlabel="layer (-1: embedding)", ylim=(0, 1.05))
    axes[0].set_ylabel("accuracy")
    figure.legend(
        *axes[-1].get_legend_handles_labels(), ncols=6, fontsize="small", loc="outside lower center"
    )
    return figure


def draw_emergence(pyplot, tasks: dict):
    """Held-out accuracy of what is trained on models from along pretraining, beside what they infer in
    context: a thin line for each pretraining, a thick one for their mean."""
    figure, axes = panels(pyplot, tasks, 3.4)
    styles = {
        "vector": "-",
        "vector, trained kind": ":",
        "lora": "-",
        "in context": "-",
        "base": "-",
        "random": "-",
        "chance": "-",
    }
    colours = {
        **COLOURS,
        "vector, trained kind": COLOURS["vector"],
        "in context": "#1b9e77",
        "chance": "black",
    }
    for axis, bases in zip(axes, tasks.values()):
        for name, style in styles.items():
            curves = [(rows["step"], rows[name]) for rows in bases.values() if name in rows]
            for steps, values in curves:
                axis.plot(steps, values, style, color=colours[name], linewidth=0.5, alpha=0.5)
            if len({tuple(steps) for steps, _ in curves}) == 1:
                label = {
                    "in context": "in context, after seven facts",
                    "random": "random vector",
                }.get(name, name)
                axis.plot(
                    curves[0][0],
                    mean_tree([values for _, values in curves]),
                    style,
                    color=colours[name],
                    linewidth=2 if name in ("vector", "lora", "in context") else 1,
                    label=label,
                )
        axis.set_xscale("log")
        axis.set_xticks([125, 250, 500, 1000, 2000], ["125", "250", "500", "1k", "2k"], minor=False)
        axis.set_xticks([], minor=True)
        axis.set(xlabel="pretraining step", ylim=(0, 1.05))
    axes[0].set_ylabel("held-out accuracy")
    figure.legend(
        *axes[0].get_legend_handles_labels(), ncols=5, fontsize="small", loc="outside lower center"
    )
    return figure


def draw_trigger(pyplot, concepts: dict):
    """C7. Which token carries the trigger's effect after each layer; how far it stands out; who attends to
    it."""
    figure, rows = pyplot.subplots(
        len(concepts), 3, figsize=(13, 3.3 * len(concepts) + 1), squeeze=False
    )
    for (left, middle, right), (concept, found) in zip(rows, concepts.items()):
        patched = list(found["patched"].values())
        layers = list(range(-1, len(patched[0]) - 1))
        image = left.imshow(patched, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        left.set_yticks(range(len(patched)), found["patched"])
        left.set_xticks(range(len(layers)), layers)
        for (y, row), x in itertools.product(enumerate(patched), range(len(layers))):
            colour = "white" if row[x] > 0.6 else "black"
            left.text(x, y, f"{row[x]:.2f}", ha="center", va="center", color=colour, fontsize=8)
        left.set(
            title=f"{concept} if the trigger is there:\nP(trigger's answer) after patching",
            xlabel="after layer",
        )
        figure.colorbar(image, ax=left)
        for axis, figures, places in (
            (middle, "distance", layers),
            (right, "attention", layers[1:]),
        ):
            for arm, style, name in (("trained", "-", "with the vector"), ("base", ":", "base")):
                for i, (what, curve) in enumerate(found[figures][arm].items()):
                    axis.plot(
                        places, curve, style, color=f"C{i + 1}", marker="o", label=f"{what}, {name}"
                    )
            axis.set_xticks(places)
        middle.set(
            title="distance between the two tags' prompts\n/ length of the residual",
            xlabel="after layer",
        )
        right.set(title="attention of the layer's strongest head", xlabel="layer", ylim=(0, 1.05))
    for axis in rows[-1][1:]:
        axis.legend(fontsize=7, ncols=1, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


# ---------------------------------------- command line


def read_flags():
    parser = Parser(
        description="Train, score, analyse and draw the paper's claims.",
        epilog="example: python paper/reproduce.py --tasks risk --seeds 2 --out out/risk",
    )
    add = parser.add_argument
    add("--tasks", default=",".join(data.TASKS), help="with commas between (default: %(default)s)")
    add("--layers", help="those to compare, with commas between (default: about nine)")
    add("--seeds", type=int, default=5, help="how many, from 0 on (default: %(default)s)")
    add("--model", default="tiny", help="tiny (default), a checkpoint folder or a hub name")
    add("--jobs", type=int, help="runs at a time (default: one a core; on cuda one)")
    add(
        "--runs",
        default="out/report",
        help="folder of the runs; those that are there are not made again (default: %(default)s)",
    )
    add("--out", help="folder of tables and figures (default for tiny: the script's own)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    add(
        "--pretrainings",
        nargs="+",
        metavar="DIR",
        default=[],
        help="only add to the results that are there: "
        "measure every model in these folders, which tiny/make.py --keep has filled, and make the main runs again on "
        "the last of each",
    )
    add(
        "--claim",
        choices=[f"C{i}" for i in range(1, 9)],
        help="only this one's runs, tables and figures; --out is then out/C4 or so",
    )
    add("--mean", nargs="+", metavar="RUN_DIR", help="only print the mean results of these runs")
    for name in ("analyse", "measure"):  # processes that run_all starts
        add(f"--{name}", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, value in vars(args).items():
        if args.mean and name != "mean" and value != parser.get_default(name):
            raise UserError(f"--{name} {value}: it does nothing beside --mean")
    args.tasks = args.tasks.split(",")
    for task in args.tasks:
        if task not in data.TASKS:
            raise UserError(f"--tasks {task}: choose from {', '.join(data.TASKS)}")
    with blame(f"--layers {args.layers}", ValueError):
        args.layers = [int(layer) for layer in args.layers.split(",")] if args.layers else None
    if args.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        raise UserError("--seeds and --jobs have to be 1 or more")
    if args.claim:
        args.out = args.out or f"out/{args.claim}"
    if args.out is None and args.model != "tiny":
        raise UserError(f"--model {args.model}: name a folder for its tables with --out")
    args.pretrainings = [Path(base) for base in args.pretrainings]
    args.out, args.runs = Path(args.out or Path(__file__).parent), Path(args.runs)
    return args


def main() -> None:
    args = read_flags()
    if args.mean:
        return show_means(args.mean)
    if args.analyse:
        return analyse(Path(args.analyse), args.device)
    if args.measure:
        return measure_checkpoint(Path(args.measure), args.device)
    started, notes = time.time(), []
    folder = find_checkpoint(args.model)
    config = Config.from_pretrained(folder)
    if config.num_hidden_layers == 1:
        notes.append(
            f"{args.model} has one layer: skipped the LoRA on all layers, the same as on one"
        )
    jobs = (
        []
        if args.pretrainings
        else [
            job for job in plan_jobs(args, config) if args.claim is None or serves(job, args.claim)
        ]
    )
    checkpoints = [checkpoint for base in args.pretrainings for checkpoint in checkpoints_of(base)]
    for base in args.pretrainings:
        if not same_model(checkpoints_of(base)[-1], folder):
            jobs += jobs_of_base(args, config, base)
    earlier = sum((args.runs / job.name / "results.json").exists() for job in jobs)
    with blame(f"--runs {args.runs}", OSError):
        args.runs.mkdir(parents=True, exist_ok=True)
    old = args.out / "results.json"  # which --pretrainings needs: read before the long work
    old = read_json(old) if args.pretrainings else read_if_whole(old) or {}
    workers = args.jobs or (1 if args.device.startswith("cuda") else os.cpu_count() or 1)
    notes += run_all(jobs, checkpoints, args.runs, workers, args.device)
    spent = (time.time() - started) / 60
    results = {
        job.name: read_if_whole(args.runs / job.name / "results.json", read_results) for job in jobs
    }
    results = {name: result for name, result in results.items() if result is not None}
    if jobs and not results:
        raise UserError(f"--runs {args.runs}: no run succeeded; the first: {notes[0]}")
    if args.pretrainings:
        content = add_pretrainings(args, jobs, results, old, len(results) - earlier, spent)
    else:
        content = summarise_report(args, jobs, results, old, notes, spent)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", content)
    (args.out / "tables.md").write_text(format_report(content, args.claim), encoding="utf-8")
    if content["tasks"]:
        draw_report(content, args.out, args.claim)
    if args.out == Path(__file__).parent and [*content["tasks"]] == [*data.TASKS]:
        pieces = make_pieces(content)
        for path in (ROOT / "README.md", args.out / "README.md"):
            path.write_text(fill(path.read_text(encoding="utf-8"), pieces), encoding="utf-8")
    print(
        f"{args.out}: tables.md, results.json and figures of {len(results)} runs, {earlier} of them from before"
    )
    for note in notes:
        print(f"note: {note}")


def summarise_report(
    args, jobs: list[Job], results: dict, old: dict, notes: list[str], spent: float
) -> dict:
    """results.json of the runs on one model; of other pretrainings it keeps what was there."""
    time_file = args.runs / "time.json"
    spent += (read_if_whole(time_file) or {"minutes": 0})["minutes"]
    write_json(time_file, {"minutes": spent})  # of all the times that it was started
    content = {
        "model": args.model,
        "date": str(date.today()),
        "torch": torch.__version__,
        "device": args.device,
        "seeds": args.seeds,
        "runs": len(results),
        "minutes": round(spent, 1),
        "notes": notes,
        "tasks": {},
    }
    for task in args.tasks:
        done = [job for job in jobs if job.task == task and not job.base and job.name in results]
        if not any(
            has_learned(results[job.name])
            for job in done
            if job.is_main and job.method in ("vector", "lora")
        ):
            notes.append(
                f"{task}: skipped, neither vector nor LoRA answers even the trained kind better than chance"
            )
            continue
        content["tasks"][task] = summarise(task, done, results, args.runs)
    return {
        **content,
        "triggers": {**old.get("triggers", {}), **summarise_triggers(jobs, results)},
        "bases": old.get("bases", {}),
        "emergence": old.get("emergence", {}),
    }


def add_pretrainings(
    args, jobs: list[Job], results: dict, old: dict, made: int, spent: float
) -> dict:
    """The results.json that is there, and what these pretrainings' runs and models add to it."""
    with blame(args.out / "results.json", AttributeError, KeyError, TypeError, ValueError):
        emergence = {
            task: {**old["emergence"].get(task, {}), **bases}
            for task, bases in summarise_emergence(args.pretrainings).items()
        }
        return {
            **old,
            "runs": old["runs"] + made,
            "minutes": round(old["minutes"] + spent, 1),
            "emergence": emergence,
            "bases": {**old["bases"], **summarise_bases(jobs, results)},
            "triggers": {**old["triggers"], **summarise_triggers(jobs, results)},
        }


if __name__ == "__main__":
    run_main(main)
