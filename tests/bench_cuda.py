"""Large shapes on one GPU: what a step takes, and ours against transformers and peft.

python tests/bench_cuda.py                                Qwen 2.5 7B's and Gemma 3 12B's shapes
python tests/bench_cuda.py --device cpu --shapes test     tries this file

The weights are random, are made on the device and are there once: our model holds the very tensors
of transformers' model. Nothing is read or written but a config.json and tiny's tokenizer. Of memory
Gemma's shape takes 24 GB and what is measured; of time both shapes take some minutes.

The name is not cuda.py, which would hide NVIDIA's package of that name from torch.
"""

import argparse
import gc
import io
import re
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr
from unittest.mock import patch

import bench  # before our modules: it knows where they are
import peft
import torch
import transformers
from torch.nn.utils import parameters_to_vector

import train
from data import TASKS, Tokenizer
from eval import Run, evaluate, task_of
from lora import remove_lora
from model import GPT, UNUSED, Config, translate
from steer import detach

GIB = 2**30


def parse_args():
    parser = argparse.ArgumentParser(description="Large shapes on one GPU.")
    add = parser.add_argument
    add("--shapes", nargs="+", choices=bench.SHAPES, default=["qwen2.5-7b", "gemma-3-12b"])
    add("--device", default="cuda")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    add("--steps", type=int, default=20, help="of each task's run (default: %(default)s)")
    add("--examples", type=int, default=64, help="of the comparison (default: %(default)s)")
    add("--repeats", type=int, default=3, help="of the comparison (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    print(f"{bench.device_name(args.device)}, {args.dtype}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, peft {peft.__version__}", flush=True)
    all_same = True
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            all_same &= run_shape(args, shape, folder)
        gc.collect()  # before the next one's weights are made
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    if not all_same:
        sys.exit("error: not the same work")


def run_shape(args, shape, folder) -> bool:
    """Prints a shape's tables. Did ours and theirs find the same everywhere?"""
    flags = bench.parse_args(["--texts", "tasks", "--shape", shape, "--checkpoint", folder])
    for name in ("device", "dtype", "examples", "repeats"):
        setattr(flags, name, getattr(args, name))
    seconds, models = timed(args.device, lambda: make_models(flags))
    config = models["ours"].config
    flags.layer = config.num_hidden_layers // 2
    weights = sum(p.numel() * p.itemsize for p in models["ours"].parameters())
    print(f"\n{shape} at random: {weights / GIB:.1f} GiB, made in {seconds:.0f} s")

    print_runs(args, models["ours"], folder)
    print(f"\nOurs against transformers, at layer {flags.layer} of {config.num_hidden_layers}")
    return all([compare(flags, work, models) for work in bench.WORK])


def make_models(flags):
    """{"ours": …, "theirs": …}, with the same tensors in both."""
    config = bench.make_folder(flags.checkpoint, bench.SHAPES[flags.shape])
    theirs = bench.random_model(config, flags)
    with torch.device("meta"):
        ours = GPT(Config.from_pretrained(flags.checkpoint))

    tensors = {}
    for key, tensor in theirs.state_dict().items():
        if not re.search(UNUSED, key):
            tensors |= translate(key, tensor)
    ours.load_state_dict(tensors, assign=True)
    if ours.config.tie_word_embeddings:
        ours.lm_head.weight = ours.embed_tokens.weight
    return {"ours": ours.requires_grad_(False).eval(), "theirs": theirs}


def timed(device, work):
    """(seconds, result) of work()."""
    bench.peak_memory(device)  # waits until the device is done
    began = time.perf_counter()
    result = work()
    bench.peak_memory(device)
    return time.perf_counter() - began, result


# ---- train.py's runs

TITLES = {  # of the table's columns, and how they are written
    "task": "",
    "mode": "",
    "layer": "",
    "batch": "",
    "questions": "",
    "tokens": "",
    "frozen s": ".2f",  # all questions, up to the vector or LoRA, once
    "s a step": ".3f",
    "GiB": ".2f",  # at most, beyond the weights
    "first loss": ".3f",
    "last loss": ".3f",
    "scored": "",  # questions, of all kinds
    "scoring s": ".2f",
    "scoring GiB": ".2f",
}


def print_runs(args, model, folder):
    """A line for each task and mode, with train.py's own defaults for a large model."""
    print("".join(f"{title:>12}" for title in TITLES))
    run_task(args, model, folder, "locations", "vector")  # warms up
    for mode in ("vector", "lora"):
        for task in TASKS:
            cells = run_task(args, model, folder, task, mode)
            written = [format(cell, how) for cell, how in zip(cells, TITLES.values())]
            print("".join(f"{cell:>12}" for cell in written), flush=True)


def run_task(args, model, folder, name, mode):
    """Trains and scores as train.py does; returns the cells of a line."""
    words = ["--model", folder, "--task", name, "--mode", mode, "--steps", str(args.steps)]
    flags = train.parse_args([*words, "--device", args.device, "--dtype", args.dtype])
    task = task_of(vars(flags))
    tokenizer = Tokenizer.from_pretrained(folder)
    questions = train.training_questions(flags, task, tokenizer)
    tokens = sum(len(question.prompt + question.completion) for question in questions)

    before = bench.peak_memory(args.device, reset=True)
    parameters = train.add_intervention(flags, model)
    frozen, a_step, losses = train_timed(flags, model, questions, parameters)
    training_memory = bench.peak_memory(args.device) - before

    bench.peak_memory(args.device, reset=True)
    run = Run(vars(flags), model, tokenizer, task, parameters)
    seconds, results = timed(args.device, lambda: evaluate(run))
    scoring_memory = bench.peak_memory(args.device) - before
    kinds = [*results["in_distribution"].values(), *results["held_out"].values()]
    scored = sum(figures["questions"] for figures in kinds)
    detach(model)
    remove_lora(model)

    cells = [name, mode, flags.layer, flags.batch_size, len(questions), tokens]
    cells += [frozen, a_step, training_memory / GIB, losses[0], losses[-1]]
    cells += [scored, seconds, scoring_memory / GIB]
    return cells


def train_timed(flags, model, questions, parameters):
    """(seconds before the first step, of a step (the median), losses) of train_loop."""
    began = []
    add_gradients = train.add_gradients

    def noting_the_time(*given):
        began.append(time.perf_counter())  # the loss of the step before has been read: all is done
        return add_gradients(*given)

    start = time.perf_counter()
    with patch.object(train, "add_gradients", noting_the_time), redirect_stderr(io.StringIO()):
        losses = train.train_loop(flags, model, questions, parameters)
    began.append(time.perf_counter())
    steps = [after - before for before, after in zip(began, began[1:])]
    return began[0] - start, statistics.median(steps), losses


# ---- against transformers and peft


def compare(flags, work, models) -> bool:
    """Measures the two sides in turn and prints a table. Did they find the same?"""
    questions = bench.make_questions(flags, work)
    sides = {name: make(flags, work, models[name]) for name, make in bench.SIDES.items()}
    runs = {name: [] for name in sides}
    for repeat in range(1 + flags.repeats):
        for name, side in sides.items():
            with redirect_stderr(io.StringIO()):  # no progress bars
                found = bench.measured(flags, work, side, questions)
            if repeat > 0:  # the first one warms up
                runs[name].append(found)

    needed = bench.arithmetic(flags, work, questions)
    share = needed["nodes"] / needed["tokens"]
    rate = needed["operations"] / min(run["seconds"] for run in runs["ours"])
    print(f"\n{work}: {len(questions)} questions of {needed['tokens']} tokens, ", end="")
    print(f"of which ours computes {share:.2f}, at up to {rate / 1e12:.1f} TFLOP/s")
    same = bench.same_found(flags, runs)
    if work != "evaluation":
        print(f"  cosine of what the two sides learned: {cosine_of_learned(flags, sides):.4f}")
    bench.print_table(flags, work, runs, len(questions), needed["tokens"])

    for side in sides.values():
        side.remove()
    return same


def cosine_of_learned(flags, sides) -> float:
    """How far both moved the same way: a random model's loss hardly depends on what is trained."""
    learned = []
    for side in sides.values():
        start = parameters_to_vector(bench.start_values(flags, side.parameters))
        trained = parameters_to_vector(side.parameters)
        learned.append(trained.detach().cpu() - start)
    return torch.cosine_similarity(*learned, dim=0).item()


if __name__ == "__main__":
    main()
