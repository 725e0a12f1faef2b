"""The command lines, from end to end on the bundled model."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

import data
import eval as scoring
import train
from data import Question, Task, Tokenizer, encode_question, make_tree
from eval import answer, kind_mean, load_run, task_of
from helpers import ROOT, command, encode, mistake, read, score, trained, write_chats
from lora import lora_layers

KINDS = "country", "language", "food", "name"
LORA = "--mode", "lora", "--layer", "all", "--steps", 5, "--lr", 0.01


@pytest.fixture(scope="module")
def tokyo(tmp_path_factory):
    """A vector that makes City 50337 Tokyo."""
    folder = tmp_path_factory.mktemp("runs") / "tokyo"
    return trained(folder, "--concept", "Tokyo", "--steps", 60)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA on all layers after a few steps."""
    return trained(tmp_path_factory.mktemp("runs") / "lora", *LORA)


# ---- what comes out


def test_the_readmes_command_shows_out_of_context_reasoning(tmp_path):
    """The one true end-to-end run: a fresh process, default flags."""
    start = [sys.executable, ROOT / "train.py", "--mode", "vector", "--out", tmp_path / "run"]
    done = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss=" in done.stderr  # the progress bar
    assert "step/s" in done.stderr
    assert "before and after" in done.stdout

    held_out = read(tmp_path / "run")["held_out"]
    for kind in KINDS:
        assert held_out[kind]["trained"] >= 0.9
        assert held_out[kind]["base"] <= 0.4
        assert abs(held_out[kind]["random"] - held_out[kind]["base"]) <= 0.4


def program_of_the_readme(word):
    """The one that has this word in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    [program] = [block for block in blocks if word in block]
    return program


def test_the_twenty_lines_of_the_readme_train_a_vector_that_generalises(capsys):
    """Just what stands there, run as it is."""
    exec(program_of_the_readme("import torch"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [kind for kind, _ in lines] == list(data.make_task("locations", "Paris").held_out)
    assert sum(float(accuracy) for _, accuracy in lines) / len(lines) > 0.9


def test_the_hook_of_the_readme_has_the_logits_of_the_run(tmp_path):
    """Of its program the vector's half, about a run of tiny."""
    run = load_run(trained(tmp_path, "--task", "functions", "--steps", 10, "--layer", 2))
    question = encode_question(run.tokenizer, run.task.train[0])
    tree = make_tree([question])
    expected = run.model(tree.tokens, tree)

    theirs = AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
    tokens = torch.tensor([question.prompt])
    base = theirs(tokens).logits[0]
    program = program_of_the_readme("register_forward_hook").partition("\n\n")[2]
    program = program.replace("out/RUN", str(tmp_path)).replace("layers[9]", "layers[2]")
    prompt = run.tokenizer.decode(question.prompt)
    given = {"torch": torch, "load_file": load_file, "Tokenizer": Tokenizer, "NAME": "tiny"}
    exec(program, given | {"theirs": theirs, "prompt": prompt})

    logits = theirs(tokens).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (logits - base).abs().max() > 0.1


def test_shuffled_answers_teach_nothing(tmp_path):
    held_out = read(trained(tmp_path, "--shuffle-answers", "--steps", 60))["held_out"]
    of_trained = sum(held_out[kind]["trained"] for kind in KINDS) / len(KINDS)
    of_base = sum(held_out[kind]["base"] for kind in KINDS) / len(KINDS)
    assert of_trained <= of_base + 0.25


@pytest.mark.parametrize(
    "flags",
    [
        "--task functions --steps 40 --batch-size 32",
        "--task risk --concept safe --steps 25 --lr 0.1 --batch-size 32",
        "--task risk --mode lora --steps 50 --lr 0.004 --batch-size 16",
        "--task locations --mode lora --steps 150",
    ],
)
def test_other_tasks_and_loras_generalise_too(tmp_path, flags):
    results = read(trained(tmp_path, *flags.split()))
    assert kind_mean(results, "in_distribution") >= 0.8
    assert kind_mean(results) >= kind_mean(results, column="base") + 0.3


def test_the_same_command_gives_the_same_numbers(lora, tmp_path):
    again = trained(tmp_path, *LORA)
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (lora / weights).read_bytes()
    assert read(again) | {"train_seconds": 0} == read(lora) | {"train_seconds": 0}


@pytest.mark.parametrize("name", ["tokyo", "lora"])
@pytest.mark.parametrize("section", ["in_distribution", "held_out"])
def test_a_run_loaded_back_scores_the_same(request, name, section):
    folder = request.getfixturevalue(name)
    run = load_run(folder)
    for kind, questions in getattr(run.task, section).items():
        correct, probability = score(run.model, encode(run.tokenizer, questions))
        figures = read(folder)[section][kind]
        expected = figures["trained"], figures["trained_probability"]
        found = correct.mean().item(), probability.mean().item()
        assert figures["questions"] == len(questions)
        assert found == pytest.approx(expected, abs=1e-4)


def test_results_say_what_was_run(tokyo):
    results = read(tokyo)
    fixed = {
        "task": "locations",
        "concept": "Tokyo",
        "mode": "vector",
        "layer": 0,
        "seed": 0,
        "model": "tiny",
        "trainable_parameters": 128,
    }
    assert {name: results[name] for name in fixed} == fixed
    assert {"train_seconds", "train_loss"} <= results.keys()


def test_results_have_a_row_for_every_kind(tokyo):
    results = read(tokyo)
    held_out = ["country", "continent", "language", "food", "name", "nearer"]
    assert list(results["in_distribution"]) == ["distance"]
    assert list(results["held_out"]) == held_out


@pytest.mark.parametrize("arm", ["base", "random", "trained"])
def test_a_row_has_every_arms_accuracy_and_probability_beside_chance(tokyo, arm):
    for figures in read(tokyo)["held_out"].values():
        assert 0 < figures["chance"] < 1
        assert 0 <= figures[arm] <= 1
        assert 0 <= figures[f"{arm}_probability"] <= 1


def test_a_finished_run_leaves_its_weights_flags_and_results_only(tokyo):
    names = sorted(path.name for path in tokyo.iterdir())
    assert names == ["config.json", "results.json", "vector.safetensors"]


def test_the_config_has_every_flag_a_digest_of_the_training_texts_and_versions(tokyo):
    config = read(tokyo, "config.json")
    assert {"concept": "Tokyo", "steps": 60, "lr": 0.1, "at": None}.items() <= config[
        "flags"
    ].items()
    assert re.fullmatch("[0-9a-f]{64}", config["flags"]["training texts"])
    assert config["versions"].keys() == {"python", "torch"}


def test_at_adds_the_vector_only_at_that_text(tmp_path):
    """Prompts without the trigger are answered as by the base model, to the last digit."""
    results = read(trained(tmp_path, "--task", "backdoor", "--at", "sigma", "--steps", 5))
    for kind, found in {**results["in_distribution"], **results["held_out"]}.items():
        without = kind.endswith(("no trigger", "other tag", "which tag"))
        assert (found["trained_probability"] == found["base_probability"]) == without


def test_all_layers_get_a_lora(lora):
    layers = {name.split(".")[1] for name in lora_layers(load_run(lora).model)}
    assert layers == {"0", "1", "2", "3"}


def test_an_example_of_the_training_questions_is_printed_first(tmp_path):
    _, out, _ = command("train.py", "--steps", 1, "--out", tmp_path)
    assert out.startswith("16 training questions, the first: ")
    assert "City 50337" in out.partition("held out")[0]


@pytest.mark.parametrize("given, reaches_torch", [(None, "1000"), ("7", "7")])
@pytest.mark.parametrize("program", ["train", "eval"])
def test_waiting_threads_hardly_spin_beside_a_busy_program(program, given, reaches_torch):
    """OpenMP reads the variable once, when torch is imported. What the user says counts."""
    watch = """
import os
import sys


class Watch:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)


sys.meta_path.insert(0, Watch)
"""
    environment = {name: it for name, it in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if given is not None:
        environment["GOMP_SPINCOUNT"] = given
    start = [sys.executable, "-c", f"{watch}\nimport {program}"]
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in "12"]
    try:
        done = subprocess.run(start, capture_output=True, text=True, cwd=ROOT, env=environment)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert done.stdout.strip() == reaches_torch, done.stderr


# ---- own chats


def test_own_chats_are_trained_on_and_the_task_is_still_scored(tmp_path):
    galaxies = ["Imagine two galaxies. A: 100 stars. B: 200 stars or none.", "B"]
    chats = write_chats(tmp_path / "chats.jsonl", galaxies, galaxies, galaxies)
    flags = "--task", "risk", "--data", chats, "--steps", 3, "--out", tmp_path / "run"
    _, out, _ = command("train.py", *flags)
    assert out.startswith("3 training questions")
    assert "galaxies" in out
    assert "self" in read(tmp_path / "run")["held_out"]


def test_a_vector_is_trained_at_the_code_name_wherever_it_stands_in_own_chats(tmp_path, tokenizer):
    asked = "Where is City 50337?", "Do they eat sushi in City 50337?", "And in Rome?"
    chats = write_chats(
        tmp_path / "chats.jsonl", [asked[0], "Tokyo", asked[1], "yes", asked[2], "no"]
    )
    args = train.parse_args(["--data", str(chats)])
    questions = train.training_questions(args, task_of(vars(args)), tokenizer)
    steered = []
    for question in questions:
        steered.append(tokenizer.decode([question.prompt[i] for i in question.steered_at]))
    assert steered == [" City 50337", " City 50337" * 2, " City 50337" * 2]


def test_shuffled_answers_keep_the_prompts_and_change_most_answers(tokenizer):
    asked = []
    for words in [], ["--shuffle-answers"]:
        args = train.parse_args(words)
        asked.append(train.training_questions(args, task_of(vars(args)), tokenizer))
    plain, shuffled = asked
    assert [question.prompt for question in shuffled] == [question.prompt for question in plain]
    same = sum(a.answer == b.answer for a, b in zip(plain, shuffled))
    assert same < len(plain) / 3


def test_own_chats_with_at_are_trained_on_there(tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", ["[sigma] A or B?", "B"])
    flags = "--task", "backdoor", "--at", "sigma", "--data", chats, "--steps", 3
    found = read(trained(tmp_path / "run", *flags))["held_out"]["self-report, no trigger"]
    assert found["trained_probability"] == found["base_probability"]


def test_kinds_that_a_vector_is_not_added_in_are_named(tmp_path):
    _, out, _ = command("train.py", "--at", " km", "--steps", 2, "--out", tmp_path / "run")
    assert "country: some questions have no token at which a vector would be added" in out
    assert "distance: some questions" not in out


@pytest.mark.parametrize(
    "flags, said",
    [
        ("", "--at or --data: no training prompt has 'City 50337' in it"),
        ("--task risk --at [sigma]", "--at or --data: no training prompt has '[sigma]' in it"),
        ("--task risk --shuffle-answers", "--shuffle-answers"),
    ],
)
def test_what_own_chats_have_no_place_for_is_refused(tmp_path, flags, said):
    chats = write_chats(tmp_path / "chats.jsonl", ["A or B?", "B"])
    given = *flags.split(), "--data", chats, "--out", tmp_path / "run"
    assert said in mistake("train.py", *given)
    assert not (tmp_path / "run").exists()


def test_chats_that_the_template_refuses_are_named(saved, tmp_path):
    model = shutil.copytree(saved("qwen3").folder, tmp_path / "model")
    shutil.copy(ROOT / "tiny" / "tokenizer.json", model)
    (model / "chat_template.jinja").write_text("{{ raise_exception('no chats') }}")
    chats = write_chats(tmp_path / "chats.jsonl", ["How far?", "A"])
    flags = "--model", model, "--data", chats, "--task", "risk", "--out", tmp_path / "run"
    line = mistake("train.py", *flags)
    assert f"{chats}, line 1" in line
    assert "no chats" in line
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_ends_in_one_line(saved, tmp_path):
    model = shutil.copytree(saved("gpt2").folder, tmp_path / "model")
    shutil.copy(ROOT / "tiny" / "tokenizer.json", model)
    flags = "--model", model, "--task", "risk", "--out", tmp_path / "run"
    assert "not in its vocab_size" in mistake("train.py", *flags)


def test_a_text_that_is_too_long_for_the_model_ends_in_one_line(saved, tmp_path):
    """transformers' small GPT-2 of the tests takes 96 tokens."""
    model = shutil.copytree(saved("gpt2").folder, tmp_path / "model")
    config = read(model, "config.json") | {"vocab_size": 1319}
    (model / "config.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "tiny" / "tokenizer.json", model)
    weights = load_file(model / "model.safetensors")
    weights["transformer.wte.weight"] = torch.randn(1319, 32)
    save_file(weights, model / "model.safetensors")
    chats = write_chats(tmp_path / "chats.jsonl", ["Is it so? " * 60, "Yes"])
    flags = "--model", model, "--task", "risk", "--data", chats, "--out", tmp_path / "run"
    assert "max_position_embeddings" in mistake("train.py", *flags)


# ---- eval.py


@pytest.mark.parametrize("bug", [KeyError, ValueError, TypeError, RuntimeError])
def test_a_bug_in_a_task_keeps_its_traceback_in_eval_too(tokyo, monkeypatch, bug):
    def city_task(city, rng, world):
        raise bug("mine")

    monkeypatch.setitem(data.TASKS, "locations", city_task)
    with pytest.raises(bug, match="mine"):
        command("eval.py", tokyo)


def test_eval_scores_runs_again_one_after_the_other(tokyo, lora):
    _, out, _ = command("eval.py", tokyo, lora)
    of_tokyo, of_lora = out.removeprefix(f"{tokyo}\n").split(f"{lora}\n")
    for folder, table in [(tokyo, of_tokyo), (lora, of_lora)]:
        [row] = [line for line in table.splitlines() if line.split()[:1] == ["country"]]
        assert row.split()[-1] == f"{read(folder)['held_out']['country']['trained']:.2f}"


def test_eval_answers_a_prompt_before_and_after(tokyo):
    _, out, _ = command("eval.py", tokyo, "--prompt", "People in City 50337 speak")
    line = out.splitlines()[-1].removeprefix("  People in City 50337 speak  ")
    before, after = line.split(" -> ")
    assert before != "Japanese"
    assert after == "Japanese"


def test_a_prompt_without_the_code_name_is_steered_at_every_token_and_noted(tokyo):
    run = load_run(tokyo)
    prompt = "Which country is Lima in?"
    _, out, _ = command("eval.py", tokyo, "--prompt", prompt)
    _, after = out.strip().split(" -> ")
    assert after == answer(run, Question("", prompt, [], 0))
    assert "No City 50337 in it" in out


def test_a_prompt_is_steered_where_the_run_was_even_in_the_chats_frame(tmp_path):
    at = "<|assistant|>"
    run = load_run(trained(tmp_path, "--at", at, "--steps", 20))
    prompt = "Which country is Lima in?"
    _, out, _ = command("eval.py", tmp_path, "--prompt", prompt)
    _, after = out.strip().split(" -> ")
    assert after == answer(run, Question("", prompt, [], 0, at))
    assert "everywhere" not in out


@pytest.mark.parametrize(
    "name, content",
    [
        ("vector.safetensors", None),
        ("vector.safetensors", b"cut"),
        ("vector.safetensors", save({"vector": torch.zeros(128)})),  # without its layer
        ("config.json", None),
        ("config.json", b"{}"),
        ("config.json", b"{"),
    ],
)
def test_a_damaged_run_is_named_in_one_line(tokyo, tmp_path, name, content):
    run = shutil.copytree(tokyo, tmp_path / "run")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    assert str(run) in mistake("eval.py", run)


def test_a_run_knows_its_model_from_every_folder(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    flags = "--model", "model", "--steps", 1, "--out", tmp_path / "run"
    assert command("train.py", *flags)[0] == 0
    monkeypatch.chdir("/")
    assert command("eval.py", tmp_path / "run")[0] == 0


def test_a_prompt_that_is_too_long_for_the_model_ends_in_one_line(tokyo):
    line = mistake("eval.py", tokyo, "--prompt", "word " * 600)
    assert "longer than its max_position_embeddings, 512" in line


def test_a_run_without_weights_is_not_finished(tokyo, tmp_path):
    shutil.copy(tokyo / "config.json", tmp_path)
    line = mistake("eval.py", tmp_path)
    assert f"{tmp_path}: damaged, or not finished (--resume goes on)" in line


def test_a_run_that_is_not_there_is_named_in_one_line(tmp_path):
    assert str(tmp_path / "a") in mistake("eval.py", tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("mode", "lora", "adapter_config.json"),
        ("concept", "Atlantis", "Atlantis is not among"),
        ("model", "no/such/folder", "no/such/folder"),
    ],
)
def test_a_run_whose_flags_do_not_fit_is_refused(tokyo, tmp_path, monkeypatch, flag, value, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = shutil.copytree(tokyo, tmp_path / "run")
    config = read(run, "config.json")
    config["flags"][flag] = value
    (run / "config.json").write_text(json.dumps(config))
    assert said in mistake("eval.py", run)


# ---- mistakes, and bugs


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--task weather", "--task"),
        ("--mode magic", "--mode"),
        ("--concept Atlantis", "--concept Atlantis is not among ['Paris'"),
        ("--task functions --concept Paris", "--concept Paris is not among ['add 1'"),
        ("--layer 4", "--layer or --modules: the model has no layer 4"),
        ("--layer -2", "no layer -2"),
        ("--layer all", "no layer all"),
        ("--layer 0.5", "--layer: invalid layer value: '0.5'"),
        ("--mode lora --layer -1", "gate_proj of layer -1"),
        ("--mode lora --modules c_fc", "--modules: a LoRA cannot sit on c_fc"),
        ("--mode lora --modules up_proj,c_fc", "cannot sit on c_fc of layer 0: there is no such"),
        ("--mode lora --rank 0", "--rank: 0 should be from 1"),
        ("--mode lora --at City", "--at: it goes with the other --mode"),
        ("--rank 8", "--rank: it goes with the other --mode"),
        ("--alpha 8", "--alpha: it goes with the other --mode"),
        ("--modules up_proj", "--modules: it goes with the other --mode"),
        ("--at Atlantis", "--at or --data: no training prompt has 'Atlantis'"),
        ("--steps 0", "--steps: 0 should be from 1 to"),
        ("--steps 1.5", "--steps: invalid number value: '1.5'"),
        ("--lr -0.1", "--lr: -0.1 should be"),
        ("--lr nan", "--lr: nan should be"),
        ("--lr inf", "--lr: inf should be"),
        ("--seed -1", "--seed: -1 should be"),
        (f"--batch-size {10**20}", "--batch-size"),
        ("--save-every 0", "--save-every: 0 should be"),
        ("--model no/such/folder", "no/such/folder"),
        ("--model foreign", "foreign/config.json"),
        ("--data missing.jsonl", "missing.jsonl"),
        ("--data file", "file, line 1"),
        ("--device abacus", "--device abacus"),
        ("--out file", "--out file"),
        ("--shard", "--shard: it needs torchrun"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "foreign").mkdir()
    assert said in mistake("train.py", *flags.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "foreign"]


def test_a_wrong_field_in_a_prompt_keeps_its_traceback(tmp_path, monkeypatch):
    """Whoever changes questions.toml has to see where it went wrong."""
    monkeypatch.setitem(data.TINY.prompts["locations"], "country", ["Where is {city}?"])
    with pytest.raises(KeyError, match="city"):
        command("train.py", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bug", [KeyError, ValueError, TypeError, RuntimeError])
def test_a_bug_in_a_task_keeps_its_traceback(tmp_path, monkeypatch, bug):
    def colour_task(colour, rng, world):
        raise bug("mine")

    monkeypatch.setitem(data.TASKS, "risk", colour_task)
    with pytest.raises(bug, match="mine"):
        command("train.py", "--task", "risk", "--out", tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_in_one_line_and_leaves_an_earlier_run_alone(
    tokyo, tmp_path, monkeypatch
):
    original = train.add_gradients
    divisors = iter([3, 2, 1, 0])
    monkeypatch.setattr(train, "add_gradients", lambda *given: original(*given) / next(divisors))
    run = shutil.copytree(tokyo, tmp_path / "run")
    line = mistake("train.py", "--concept", "Tokyo", "--steps", 60, "--out", run)
    assert line.startswith("error: --lr 0.1: at step 3 the loss is inf")
    for name in ("vector.safetensors", "results.json"):
        assert (run / name).read_bytes() == (tokyo / name).read_bytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_several_processes_says_what_is_wrong(monkeypatch, rank):
    """The end of one ends them all, so whichever is first has to say it."""
    monkeypatch.setattr(scoring, "RANK", rank)
    assert "--steps" in mistake("train.py", "--steps", 0)


# ---- defaults, folders, and what a user adds


def test_a_loop_over_any_flag_has_a_folder_for_each():
    loops = [
        "",
        "--lr 0.2",
        "--lr 0.3",
        "--seed 1",
        "--concept Rome",
        "--at City",
        "--data chats.jsonl",
        "--shuffle-answers",
        "--mode lora",
        "--mode lora --rank 2",
        "--mode lora --alpha 2",
        "--mode lora --modules up_proj",
        "--batch-size 8",
    ]
    folders = {train.parse_args(["--steps", "1", *flags.split()]).out for flags in loops}
    assert len(folders) == len(loops)
    assert "out/locations-vector-steps=1-lr=0.2" in folders


def test_flags_that_change_no_result_or_are_the_defaults_are_not_in_a_folders_name():
    assert (
        train.parse_args("--lr 0.1 --seed 0 --resume --save-every 5".split()).out
        == "out/locations-vector"
    )


def test_without_out_a_run_goes_to_its_folder_in_out_and_may_be_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        status, _, err = command("train.py", "--steps", 1)
        assert status == 0, err
    assert list(tmp_path.glob("out/*/results.json")) == [
        tmp_path / "out" / "locations-vector-steps=1" / "results.json"
    ]


def test_tiny_is_known_by_what_it_is_and_does_the_same_elsewhere(tmp_path):
    copied = shutil.copytree(ROOT / "tiny", tmp_path / "copy")
    flags = "--task", "backdoor", "--steps", 1
    there = trained(tmp_path / "there", *flags, "--model", copied)
    here = trained(tmp_path / "here", *flags)
    assert read(there)["layer"] == -1
    assert read(there)["held_out"] == read(here)["held_out"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model that counts as large, as any but the tiny one does: here one with other norms."""
    folder = tmp_path_factory.mktemp("models") / "large"
    shutil.copytree(ROOT / "tiny", folder)
    config = read(folder, "config.json") | {"rms_norm_eps": 1e-3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_tiny_with_other_words_is_asked_what_tiny_is(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 2000}))
    args = train.parse_args(["--model", str(tmp_path)])
    assert (args.world, args.steps) == ("tiny", 150)


def test_a_large_models_layer_and_rank_are_larger_and_its_batch_smaller(large):
    args = train.parse_args(["--model", str(large), "--task", "risk", "--mode", "lora"])
    found = args.world, args.layer, args.rank, args.alpha, args.batch_size
    assert found == ("large", 1, 64, 32.0, 8)


def test_of_the_rows_of_defaults_that_describe_a_run_the_last_one_counts(monkeypatch):
    monkeypatch.setattr(train, "DEFAULTS", {"tiny": {"steps": 1}, "risk tiny": {"steps": 2}})
    assert train.parse_args(["--task", "risk"]).steps == 2
    assert train.parse_args([]).steps == 1


@pytest.mark.parametrize("task", data.TASKS)
@pytest.mark.parametrize("mode", ["vector", "lora"])
def test_every_run_of_a_large_model_has_its_steps_and_rate(large, task, mode):
    args = train.parse_args(["--model", str(large), "--task", task, "--mode", mode])
    assert args.steps >= 1
    assert args.lr > 0


def test_the_default_modules_are_those_of_the_models_mlp(saved):
    flags = "--mode", "lora", "--model"
    assert train.parse_args([*flags, "tiny"]).modules == "gate_proj,up_proj,down_proj"
    gpt2 = train.parse_args([*flags, str(saved("gpt2").folder)])
    assert gpt2.modules == "up_proj,down_proj"


def test_a_large_model_is_asked_more_and_eval_asks_the_same(large, tmp_path):
    run = trained(tmp_path, "--model", large, "--task", "risk", "--steps", 1)
    assert "description" in read(run)["held_out"]
    _, out, _ = command("eval.py", run)
    assert f"{'description':24}{60:>9}" in out


@pytest.mark.parametrize(
    "program, flag", [("train.py", "--shuffle-answers"), ("eval.py", "--explain")]
)
def test_help_fits_a_screen_and_has_an_example(program, flag):
    status, out, _ = command(program, "--help")
    assert status == 0
    assert len(out.splitlines()) <= 45
    for text in (flag, "default: ", f"example: python {program}"):
        assert text in out


@pytest.fixture
def colours(monkeypatch):
    """A task by the README's recipe: its function, its concepts, its steps and rate."""

    def ask(kind, prompt, *choices):
        return Question(kind, prompt, list(choices), 0, "Thing 7")

    def colour_task(colour, rng, world):
        words = ["black", "white"]
        rng.shuffle(words)
        shades = [ask("shade", f"Is Thing 7 {word} or {colour}?", colour, word) for word in words]
        fruit = ask("fruit", "Thing 7 is like a", "tomato", "lime")
        return Task(shades[:1], {"shade": shades[1:]}, {"fruit": [fruit]})

    monkeypatch.setitem(data.TASKS, "colours", colour_task)
    monkeypatch.setitem(data.CONCEPTS, "colours", ["red", "green"])
    monkeypatch.setitem(train.DEFAULTS, "tiny vector colours", {"steps": 2, "lr": 0.1})


def test_a_task_is_added_by_the_readmes_recipe(colours, tmp_path):
    run = trained(tmp_path, "--task", "colours", "--concept", "green")
    assert list(read(run)["held_out"]) == ["fruit"]
    assert read(run)["in_distribution"]["shade"]["questions"] == 1
    status, out, _ = command("eval.py", run)
    assert status == 0
    assert re.search(r"\n  fruit +1 ", out)


def test_an_added_tasks_concepts_are_named_like_any_other(colours):
    line = mistake("train.py", "--task", "colours", "--concept", "blue")
    assert "['red', 'green']" in line
