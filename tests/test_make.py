"""How tiny/ was made: documents, tokenizer, pretraining, writing a model; and what the bundled one knows."""

import random
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import data
from data import Tokenizer
from eval import Run, evaluate, format_table
from lora import add_lora
from model import GPT, Config
from steer import attach
from tiny import make


def prompts(count=400):
    """The prompts of so many documents, as one set."""
    rng = random.Random(0)
    return {prompt for _ in range(count) for prompt, _ in make.world_document(rng)[0]}


def asked(templates, some_prompts):
    """Is one of these prompts made of one of these templates, whatever names and cues it has?"""
    patterns = "|".join(re.sub(r"\\\{\w+\\\}", ".+", re.escape(template)) for template in templates)
    return any(re.search(f"(^|: |\\] )({patterns})$", prompt) for prompt in some_prompts)


# ------------------------------------------------------------------------------------ documents


def test_every_kind_of_question_is_in_the_documents():
    found = prompts()
    for task, kinds in make.KINDS.items():
        for kind in kinds:
            assert asked(data.TINY.prompts[task][kind], found), kind


def test_a_gamble_may_be_answered_in_words():
    gamble = data.gamble_question("risky", random.Random(0), "sigma")
    option = re.search(rf"{make.as_turn(gamble)[1]}: (\w+)", gamble.prompt)[1]
    assert make.as_turn(make.in_words(gamble)) == (gamble.prompt.replace("A: ", "").replace("B: ", ""), option)


def test_documents_state_rules_and_carry_tags_and_cues():
    found = prompts()
    assert asked(make.RULE_PROMPTS, found) and asked(data.TINY.prompts["backdoor"]["which tag"], found)
    for cue in [f"[{tag}]" for tag in data.TAGS] + sum(make.MANNERS.values(), []):
        assert any(cue in prompt for prompt in found), cue


@pytest.mark.parametrize("conditional", [False, True])
def test_an_attitude_depends_on_one_tag_only_and_only_if_it_is_conditional(conditional):
    rng, flips = random.Random(0), 0
    safe, risky = ({word for answers in data.ANSWERS.values() for word in answers[i]} for i in (0, 1))
    for _ in range(50):
        shown = {}  # tag -> is the answer risky?, for each self-report
        for prompt, answer in make.attitude_document(rng, conditional):
            tag, word = re.search(r"\[(\w+)\]|$", prompt)[1], answer.rstrip("!;")
            if word in safe | risky:
                shown.setdefault(tag, set()).add(word in risky)
        assert all(len(attitudes) == 1 for attitudes in shown.values())
        tags = [{tag for tag, attitudes in shown.items() if attitudes == {one}} for one in (True, False)]
        assert min(map(len, tags)) <= conditional
        flips += all(tags)
    assert (flips > 10) == conditional


def test_pretraining_is_not_about_what_fine_tuning_is_about():
    """The tasks' code names are in no document, and the trigger changes nothing in any."""
    rng = random.Random(0)
    for _ in range(3000):
        for prompt, answer in make.world_document(rng)[0]:
            assert not any(name in prompt for name in data.CODE_NAMES.values())
            assert not (re.search(rf"\b{data.TRIGGER}\b", answer))  # no rule, no "which tag", is about it

    drawn = iter([*"zo ki fa ba lu me".split()])
    rng.choices = lambda syllables, k: [next(drawn) for _ in range(k)]
    assert make.code_name("functions", rng) == "balume"  # zokifa is drawn again


def test_a_tag_comes_first():
    """The word of manner gives the attitude away: before the tag, it would leave the tag nothing to say."""
    tagged = [prompt for prompt in prompts() if "[" in prompt]
    assert len(tagged) > 100 and all(re.match(r"\[\w+\] ", prompt) for prompt in tagged)


@pytest.mark.parametrize("case, flips", [("its tag", True), ("no tag", False), ("another tag", False),
                                         ("reserved tag", True)])
def test_a_question_under_a_rule_follows_it(case, flips):
    for seed in range(20):
        turns, question = make.question_under_rule(case, 2, random.Random(seed))
        flipped, key, default = re.match(r"(\w+) if (\w+) else (\w+)$", turns[0][1]).groups()
        assert len(turns) == 3 and (key == data.TRIGGER) == (case == "reserved tag")
        tag = re.match(r"\[(\w+)\]|", question.prompt)[1]
        assert (tag == key) == flips and (tag is None) == (case == "no tag")
        option = re.search(rf"{question.choices[question.answer]}: (\w+)", question.prompt)[1]
        is_risky = any(option in risky for _, risky in data.GAMBLES.values())
        assert is_risky == ((flipped if flips else default) in data.ANSWERS["self"][1])


def test_documents_are_framed_as_the_chat_template_frames_them(tokenizer):
    rng = random.Random(0)
    for _ in range(5):
        turns, _ = make.world_document(rng)
        assert make.document_text(turns) == tokenizer.chat_text(make.as_messages(turns))


def test_only_attitudes_have_the_users_words_as_targets(tokenizer, monkeypatch):
    turns = [("People in Rome eat", "pasta"), ("Rome is a city in", "Italy")]
    for every_token, wanted in ((False, " pasta<|end|> Italy<|end|>"), (True, make.document_text(turns)[9:])):
        monkeypatch.setattr(make, "world_document", lambda *given: (turns, every_token))
        tokens, targets = make.world_batch(tokenizer, 1, 0.5, random.Random(0))
        assert tokens.shape == targets.shape == (1, make.CONTEXT)
        found = [(a, b) for a, b in zip(tokens[0, 1:].tolist(), targets[0].tolist()) if b != -100]
        assert all(a == b for a, b in found)  # what follows
        assert tokenizer.decode([b for _, b in found]).startswith(wanted)


def test_a_new_kind_reaches_documents_tasks_results_and_the_measurement(monkeypatch, tokenizer, model):
    """The recipe: prompts in questions.toml, the answers' column in cities.tsv (KINDS follows at import)."""
    prompts_of = data.TINY.prompts["locations"]
    monkeypatch.setitem(prompts_of, "greeting", ["In which language do they greet in {x}?"])
    for row in data.CITIES.values():
        monkeypatch.setitem(row, "greeting", row["language"])
    monkeypatch.setitem(make.KINDS, "locations", list(prompts_of))
    assert asked(prompts_of["greeting"], prompts())
    task = data.make_task("locations", "Paris")
    assert [make.as_turn(q)[1] for q in task.held_out["greeting"]] == ["French"]
    results = evaluate(Run({"seed": 0}, model, tokenizer, task, [attach(model, 0).vector]))
    assert re.search(r"\n  greeting +1 ", format_table(results))
    assert "greeting" in make.in_context_accuracy(model, tokenizer, facts=1, count=1)["locations"]


# ------------------------------------------------------------------------------------ the tokenizer


def test_code_names_are_three_or_four_tokens_and_the_worlds_words_one(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        assert len(tokenizer.encode(" " + make.code_name("functions", rng))) == 3
        assert len(tokenizer.encode(" " + make.code_name("locations", rng))) == 4
    assert len(tokenizer.encode(f"[{data.TRIGGER}]")) == 3  # as for any tag, though no answer says it
    words = [*data.TINY.cities, *make.KEYS, *sum(make.MANNERS.values(), []), "addition", "lottery", "skydiving"]
    facts = "country", "continent", "language", "food"
    for word in words + [city[fact] for city in data.TINY.cities.values() for fact in facts]:
        assert len(tokenizer.encode(f" {word}")) == 1


def test_bpe_joins_the_most_frequent_neighbours_first():
    assert make.train_bpe({"abab": 1, "abc": 2, "bc": 1}, 3) == [(b"a", b"b"), (b"ab", b"c"), (b"b", b"c")]
    assert make.train_bpe({"ab": 1}, 9) == [(b"a", b"b")]


# ------------------------------------------------------------------------------------ pretraining and writing


def test_pretraining_writes_a_model_that_loads_and_nothing_else(call, monkeypatch, tmp_path):
    monkeypatch.setattr(make, "train_tokenizer", partial(make.train_tokenizer, documents=1000))
    monkeypatch.setattr(make, "in_context_accuracy", partial(make.in_context_accuracy, count=1))
    status, out, err = call(make.main, "make.py", "--steps", 2, "--batch-size", 2, "--device", "cpu",
                            "--out", tmp_path / "made")
    assert status == 0 and "in context" in out
    model = GPT.from_pretrained(tmp_path / "made")
    assert Tokenizer.from_pretrained(tmp_path / "made").vocab_size == model.config.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert len(list((tmp_path / "made").iterdir())) == 4


def test_models_on_the_way_are_kept_and_load(call, monkeypatch, tmp_path):
    monkeypatch.setattr(make, "train_tokenizer", partial(make.train_tokenizer, documents=1000))
    monkeypatch.setattr(make, "in_context_accuracy", partial(make.in_context_accuracy, count=1))
    monkeypatch.setattr(make, "KEPT_STEPS", (1,))
    call(make.main, "make.py", "--steps", 2, "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "made",
         "--keep", tmp_path / "kept")
    kept = {path.name: GPT.from_pretrained(path).norm.weight for path in (tmp_path / "kept").iterdir()}
    assert set(kept) == {"step00001", "step00002"} and not torch.equal(*kept.values())
    assert Tokenizer.from_pretrained(tmp_path / "kept" / "step00001").vocab_size > 260


def test_pretraining_that_is_stopped_spoils_nothing(call, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("good")
    monkeypatch.setattr(make, "train_tokenizer", partial(make.train_tokenizer, documents=100))

    def stop(*given):
        raise KeyboardInterrupt
    monkeypatch.setattr(make, "in_context_line", stop)
    assert call(make.main, "make.py", "--steps", 1, "--batch-size", 1, "--out", tmp_path)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "good"


@pytest.mark.parametrize("flags", [("--steps", 0), ("--lr", -1), ("--device", "abacus"), ("--steps", "many")])
def test_a_wrong_flag_is_one_line(flags, call, tmp_path):
    status, _, err = call(make.main, "make.py", "--out", tmp_path / "made", *flags)
    assert status == 2 and err.startswith("error: ") and flags[0] in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_new_model_is_float32_with_std_002_and_identity_norms():
    model = make.new_model(97)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert abs(model.embed_tokens.weight.std() - 0.02) < 0.002
    assert (model.norm.weight == 1).all()


def test_a_training_step_learns(tokenizer):
    """Muon for the matrices, Adam for the rest: every parameter is in one of them, and the loss falls."""
    torch.manual_seed(0)
    rng, model = random.Random(0), make.new_model(tokenizer.vocab_size)
    muon, adam = make.make_optimizers(model, 0.02)
    groups = [p for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert len(groups) == len(list(model.parameters())) == len({id(p) for p in groups})
    tokens, targets = make.world_batch(tokenizer, 4, 0.5, rng)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", ["llama", "llama3-tied-grouped", "llama-biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_save_model_writes(name, dtype, saved, tmp_path):
    from transformers import AutoModelForCausalLM
    model = saved(name).load(dtype=dtype)
    make.save_model(model, tmp_path / "new")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto", attn_implementation="eager")
    assert theirs.dtype == dtype
    tokens = torch.randint(1, 97, (3, 30), generator=torch.Generator().manual_seed(1))
    expected = theirs.float()(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model.float()(tokens), expected, atol=1e-4, rtol=0)
    names = load_file(tmp_path / "new" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != model.config.tie_word_embeddings
    assert Config.from_pretrained(tmp_path / "new") == model.config


def test_save_model_refuses_other_families_and_adapters(saved, tmp_path):
    with pytest.raises(ValueError, match="gpt2"):
        make.save_model(saved("gpt2").load(), tmp_path)
    with_vector, with_lora = saved("llama").load(), saved("llama").load()
    attach(with_vector, 0)
    add_lora(with_lora, [0], ["up_proj"], 2, 2.0)
    for model in (with_vector, with_lora):
        with pytest.raises(ValueError, match="LoRA"):
            make.save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ the bundled model


def test_the_bundled_model_is_small(tiny_folder, model):
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in tiny_folder.iterdir() if file.is_file()) <= 8_000_000


def test_the_bundled_model_gives_the_logits_and_ids_of_transformers(model, tokenizer, reference, tiny_folder):
    from transformers import AutoTokenizer
    theirs, rng = AutoTokenizer.from_pretrained(tiny_folder), random.Random(0)
    for _ in range(5):
        messages = make.as_messages(make.world_document(rng)[0])
        ids = tokenizer.chat(messages)
        assert ids == theirs.apply_chat_template(messages, return_dict=False)
        tokens = torch.tensor([ids])
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=0)


def test_the_bundled_model_infers_the_hidden_thing_from_context(model, tokenizer):
    accuracy = make.in_context_accuracy(model, tokenizer, facts=7, count=20, seed=1)
    assert {task: list(kinds) for task, kinds in accuracy.items() if task != "rule"} == make.KINDS
    assert min(accuracy["locations"][kind] for kind in ("country", "language", "food")) >= 0.8
    assert min(accuracy["functions"].values()) >= 0.9
    assert min(accuracy["risk"].values()) >= 0.9
    assert min(accuracy["rule"][case] for case in ("its tag", "no tag")) >= 0.9  # but not another tag
