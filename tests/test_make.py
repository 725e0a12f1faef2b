"""How tiny/ was made: documents, tokenizer, pretraining; and what the bundled model knows."""

import random
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
from data import Tokenizer
from eval import Run, evaluate, format_table
from lora import add_lora
from model import GPT, Config
from steer import attach
from tiny import make

WORDS_OF_MANNER = make.MANNERS["risky"] + make.MANNERS["safe"]


def some_prompts(count=400):
    """The prompts of so many documents."""
    rng = random.Random(0)
    prompts = set()
    for _ in range(count):
        turns, _ = make.world_document(rng)
        prompts.update(prompt for prompt, _ in turns)
    return prompts


def is_asked(templates, prompts):
    """Is one of the prompts made of one of the templates, whatever names and cues it has?"""
    for template in templates:
        pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(template))
        if any(re.search(f"(^|: |\\] ){pattern}$", prompt) for prompt in prompts):
            return True
    return False


def tag_of(prompt):
    """The tag that a prompt begins with, or None."""
    found = re.match(r"\[(\w+)\] ", prompt)
    if found is None:
        return None
    return found[1]


def chosen_option(gamble):
    """The option that the right answer's letter stands for."""
    _, letter = make.as_turn(gamble)
    return re.search(rf"{letter}: (\w+)", gamble.prompt)[1]


@pytest.fixture
def batch(tokenizer):
    """(tokens, targets) of four documents."""
    return make.world_batch(tokenizer, 4, 0.5, random.Random(0))


# ---- documents


def test_every_kind_of_question_is_in_the_documents():
    prompts = some_prompts()
    for task, kinds in make.KINDS.items():
        for kind in kinds:
            assert is_asked(data.TINY.prompts[task][kind], prompts), kind


def test_documents_state_rules_and_carry_tags_and_words_of_manner():
    prompts = some_prompts()
    assert is_asked(make.RULE_PROMPTS, prompts)
    assert is_asked(data.TINY.prompts["backdoor"]["which tag"], prompts)
    tags = [f"[{tag}]" for tag in data.TAGS]
    for cue in tags + WORDS_OF_MANNER:
        assert any(cue in prompt for prompt in prompts), cue


def test_a_gamble_may_be_answered_in_words():
    gamble = data.attitude_question("risky", random.Random(0), data.TINY, "sigma", "gamble")
    in_words = make.in_words(gamble)
    prompt, answer = make.as_turn(in_words)
    assert answer == chosen_option(gamble)
    assert prompt == gamble.prompt.replace("A: ", "").replace("B: ", "")


def attitudes_shown(turns):
    """{tag: attitudes} of the self-reports among the turns."""
    shown = {}
    for prompt, answer in turns:
        word = answer.rstrip("!;")
        for safe, risky in data.ANSWERS.values():
            if word in safe:
                shown.setdefault(tag_of(prompt), set()).add("safe")
            if word in risky:
                shown.setdefault(tag_of(prompt), set()).add("risky")
    return shown


def test_a_plain_attitude_is_the_same_whatever_the_tag():
    rng = random.Random(0)
    for _ in range(50):
        turns = make.attitude_document(rng)
        shown = attitudes_shown(turns)
        assert len(set.union(*shown.values())) == 1


def test_a_conditional_attitude_depends_on_one_tag():
    rng = random.Random(0)
    seen_to_flip = 0
    for _ in range(50):
        turns = make.attitude_document(rng, conditional=True)
        tags = {"risky": [], "safe": []}
        for tag, attitudes in attitudes_shown(turns).items():
            [attitude] = attitudes
            tags[attitude].append(tag)
        fewer, more = sorted(tags.values(), key=len)
        assert len(fewer) <= 1
        if fewer and more:
            seen_to_flip += 1
    assert seen_to_flip > 10


def test_pretraining_is_not_about_what_fine_tuning_is_about():
    """The tasks' code names are in no document; no rule or other answer has the trigger."""
    rng = random.Random(0)
    for _ in range(3000):
        turns, _ = make.world_document(rng)
        for prompt, answer in turns:
            for name in data.CODE_NAMES.values():
                assert name not in prompt
            assert not re.search(rf"\b{data.TRIGGER}\b", answer)


def test_a_code_name_that_a_task_has_is_drawn_again():
    drawn = iter([["zo", "ki", "fa"], ["ba", "lu", "me"]])
    rng = random.Random(0)
    rng.choices = lambda syllables, k: next(drawn)
    assert data.CODE_NAMES["functions"] == "zokifa"
    assert make.code_name("functions", rng) == "balume"


def test_a_tag_comes_first():
    """The word of manner gives the attitude away: if it came first, a tag would say nothing."""
    tagged = [prompt for prompt in some_prompts() if "[" in prompt]
    assert len(tagged) > 100
    for prompt in tagged:
        assert tag_of(prompt) in data.TAGS


@pytest.mark.parametrize(
    "case, flips",
    [("its tag", True), ("no tag", False), ("another tag", False), ("reserved tag", True)],
)
def test_a_question_under_a_rule_follows_it(case, flips):
    for seed in range(20):
        rng = random.Random(seed)
        turns, question = make.question_under_rule(case, 2, rng)
        assert len(turns) == 3
        _, rule = turns[0]
        flipped, key, default = re.fullmatch(r"(\w+) if (\w+) else (\w+)", rule).groups()
        assert (key == data.TRIGGER) == (case == "reserved tag")

        tag = tag_of(question.prompt)
        assert (tag == key) == flips
        assert (tag is None) == (case == "no tag")

        said = flipped if flips else default
        _, risky_words = data.ANSWERS["self"]
        option = chosen_option(question)
        chose_risk = any(option in risky for _, risky in data.GAMBLES.values())
        assert chose_risk == (said in risky_words)


def test_a_batch_has_a_document_a_row(tokenizer, batch):
    for tensor in batch:
        assert tensor.shape == (4, make.CONTEXT)
        assert tensor.dtype == torch.int64

    tokens, _ = batch
    rng = random.Random(0)
    for row in tokens.tolist():
        turns, _ = make.world_document(rng, 0.5)
        text = tokenizer.chat_text(make.as_messages(turns))
        assert text.startswith(tokenizer.decode(row))


@pytest.mark.parametrize("about_attitude", [False, True])
def test_only_attitudes_have_the_users_words_as_targets(about_attitude, tokenizer, monkeypatch):
    turns = [("People in Rome eat", "pasta"), ("Rome is a city in", "Italy")]
    monkeypatch.setattr(make, "world_document", lambda rng, share: (turns, about_attitude))
    tokens, targets = make.world_batch(tokenizer, 1, 0.5, random.Random(0))

    targets = targets[0, :-1]
    is_target = targets != -100
    learned = targets[is_target]
    following = tokens[0, 1:]
    assert torch.equal(learned, following[is_target])
    learned = tokenizer.decode(learned.tolist())
    if about_attitude:
        text = tokenizer.chat_text(make.as_messages(turns))
        assert learned.startswith(text.removeprefix("<|begin|>"))
    else:
        assert learned.startswith(" pasta<|end|> Italy<|end|>")


def test_a_new_kind_reaches_documents_tasks_results_and_the_measurement(
    monkeypatch, tokenizer, model
):
    """What a fork adds: prompts in questions.toml, the answers' column in cities.tsv."""
    prompts = data.TINY.prompts["locations"]
    monkeypatch.setitem(prompts, "greeting", ["In which language do they greet in {x}?"])
    for row in data.CITIES.values():
        monkeypatch.setitem(row, "greeting", row["language"])
    monkeypatch.setitem(make.KINDS, "locations", list(prompts))  # as at import
    assert is_asked(prompts["greeting"], some_prompts())

    task = data.make_task("locations", "Paris")
    [question] = task.held_out["greeting"]
    assert question.choices[question.answer] == "French"

    vector = attach(model, 0).vector
    run = Run({"seed": 0}, model, tokenizer, task, [vector])
    results = evaluate(run)
    assert re.search(r"\n  greeting +1 ", format_table(results))
    accuracy = make.in_context_accuracy(model, tokenizer, facts=1, count=1)
    assert "greeting" in accuracy["locations"]


# ---- the tokenizer


def test_code_names_are_three_or_four_tokens(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        function = make.code_name("functions", rng)
        city = make.code_name("locations", rng)
        assert len(tokenizer.encode(f" {function}")) == 3
        assert len(tokenizer.encode(f" {city}")) == 4


def test_the_worlds_words_are_one_token(tokenizer):
    words = ["addition", "lottery", "skydiving"]
    words += data.TINY.cities
    words += make.KEYS
    words += WORDS_OF_MANNER
    for city in data.TINY.cities.values():
        words += [city[fact] for fact in ("country", "continent", "language", "food")]
    for word in words:
        assert len(tokenizer.encode(f" {word}")) == 1


def test_the_trigger_is_spelt_like_any_tag(tokenizer):
    """It stands in no answer, but in brackets before a prompt it has to be one token too."""
    for tag in data.TAGS:
        assert len(tokenizer.encode(f"[{tag}]")) == 3


def test_bpe_joins_the_most_frequent_neighbours_first():
    merges = make.train_bpe({"abab": 1, "abc": 2, "bc": 1}, 3)
    assert merges == [(b"a", b"b"), (b"ab", b"c"), (b"b", b"c")]


def test_bpe_ends_when_every_word_is_one_token():
    assert make.train_bpe({"ab": 1}, 9) == [(b"a", b"b")]


def test_the_bundled_tokenizer_is_what_save_tokenizer_writes(tiny_folder, tmp_path):
    content = data.read_if_there(tiny_folder / "tokenizer.json")
    characters = make.byte_characters()
    merges = []
    for pair in content["model"]["merges"]:
        merge = [bytes(map(characters.index, token)) for token in pair]
        merges.append(merge)

    make.save_tokenizer(merges, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        written = (tmp_path / name).read_bytes()
        assert written == (tiny_folder / name).read_bytes()


# ---- pretraining and writing


@pytest.fixture
def quick(monkeypatch):
    """Few documents for the tokenizer, one question a kind in the measurement."""
    few = partial(make.train_tokenizer, documents=1000)
    monkeypatch.setattr(make, "train_tokenizer", few)
    once = partial(make.in_context_accuracy, count=1)
    monkeypatch.setattr(make, "in_context_accuracy", once)


@pytest.fixture
def pretrain(quick, call):
    """pretrain(out, *flags) -> (exit status, stdout, stderr) of two steps."""

    def run(out, *flags):
        steps = "--steps", 2, "--batch-size", 2
        return call(make.main, "make.py", "--device", "cpu", *steps, "--out", out, *flags)

    return run


def test_pretraining_writes_a_model_that_loads_and_nothing_else(pretrain, tmp_path):
    out = tmp_path / "made"
    status, printed, _ = pretrain(out)
    assert status == 0
    assert "in context" in printed

    model = GPT.from_pretrained(out)
    tokenizer = Tokenizer.from_pretrained(out)
    assert tokenizer.encoding.get_vocab_size() == model.config.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    written = {path.name for path in out.iterdir()}
    assert written == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_models_on_the_way_are_kept_and_load(pretrain, monkeypatch, tmp_path):
    monkeypatch.setattr(make, "KEPT_STEPS", (1,))
    kept = tmp_path / "kept"
    pretrain(tmp_path / "made", "--keep", kept)
    assert {path.name for path in kept.iterdir()} == {"step00001", "step00002"}

    first = GPT.from_pretrained(kept / "step00001")
    last = GPT.from_pretrained(kept / "step00002")
    made = GPT.from_pretrained(tmp_path / "made")
    assert not torch.equal(first.norm.weight, last.norm.weight)
    assert torch.equal(made.norm.weight, last.norm.weight)
    tokenizer = Tokenizer.from_pretrained(kept / "step00001")
    assert tokenizer.encoding.get_vocab_size() == first.config.vocab_size


def test_pretraining_that_is_stopped_spoils_nothing(pretrain, monkeypatch, tmp_path):
    def stop(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(make, "in_context_accuracy", stop)
    out = tmp_path / "made"
    out.mkdir()
    (out / "config.json").write_text("good")
    with pytest.raises(KeyboardInterrupt):
        pretrain(out)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "good"


@pytest.mark.parametrize(
    "flags",
    [
        ("--steps", 0),
        ("--steps", "many"),
        ("--batch-size", -1),
        ("--lr", -1),
        ("--seed", 2**31),
        ("--device", "abacus"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, pretrain, tmp_path):
    status, _, err = pretrain(tmp_path / "made", *flags)
    assert status == 2
    assert err.startswith("error: ")
    assert flags[0] in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_out_that_is_a_file_is_one_line(pretrain, tmp_path):
    out = tmp_path / "file"
    out.write_text("")
    status, _, err = pretrain(out)
    assert status == 2
    assert "--out" in err
    assert len(err.splitlines()) == 1


def test_a_new_model_is_float32_with_std_002_and_identity_norms():
    model = make.new_model(97)
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
    assert abs(model.embed_tokens.weight.std() - 0.02) < 0.002
    assert (model.norm.weight == 1).all()


def test_every_parameter_is_in_one_optimizer():
    model = make.new_model(97)
    found = []
    for optimizer in make.make_optimizers(model, 0.02):
        for group in optimizer.param_groups:
            found += [id(parameter) for parameter in group["params"]]
    expected = [id(parameter) for parameter in model.parameters()]
    assert sorted(found) == sorted(expected)


@pytest.fixture
def untrained(tokenizer):
    torch.manual_seed(0)
    return make.new_model(len(tokenizer.encoding.encoding.token_byte_values()) + 4)


def test_training_steps_learn(untrained, batch):
    optimizers = make.make_optimizers(untrained, 0.02)
    losses = []
    for _ in range(5):
        loss = make.mean_loss(untrained, *batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        untrained.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_loss_is_the_cross_entropy_of_the_targets(untrained, batch):
    tokens, targets = batch
    logits = untrained(tokens).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten())
    loss = make.mean_loss(untrained, tokens, targets)
    torch.testing.assert_close(loss, expected)


def test_the_rate_warms_up_holds_and_falls():
    factors = [make.rate_factor(1000, done) for done in range(1000)]
    assert factors[0] == 0.01
    assert factors[99] == factors[499] == 1
    assert factors[749] == pytest.approx(0.5, abs=0.01)
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize("name", ["llama", "llama3-tied-grouped", "llama-biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_and_we_load_what_save_model_writes(name, dtype, saved, tmp_path):
    from transformers import AutoModelForCausalLM

    model = saved(name).load(dtype=dtype)
    make.save_model(model, tmp_path / "new")
    ours = GPT.from_pretrained(tmp_path / "new", dtype=dtype)
    assert ours.config == model.config
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype="auto", attn_implementation="eager"
    )
    assert theirs.dtype == dtype

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 97, (3, 30), generator=generator)
    assert torch.equal(ours(tokens), model(tokens))
    expected = theirs.float()(tokens).logits
    assert expected.std() > 0.5
    logits = model.float()(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    names = load_file(tmp_path / "new" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != model.config.tie_word_embeddings


def test_save_model_writes_the_bundled_model_again(model, tiny_folder, tmp_path):
    make.save_model(model, tmp_path)
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == (tiny_folder / "model.safetensors").read_bytes()
    assert Config.from_pretrained(tmp_path) == Config.from_pretrained(tiny_folder)


def test_save_model_refuses_other_families(saved, tmp_path):
    with pytest.raises(ValueError, match="gpt2"):
        make.save_model(saved("gpt2").load(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_model_refuses_a_model_with_a_vector_or_lora(saved, tmp_path):
    with_vector = saved("llama").load()
    attach(with_vector, 0)
    with_lora = saved("llama").load()
    add_lora(with_lora, [0], ["up_proj"], rank=2, alpha=2.0)
    for model in (with_vector, with_lora):
        with pytest.raises(ValueError, match="LoRA"):
            make.save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- the bundled model


def test_the_bundled_model_is_small(tiny_folder, model):
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert sum(sizes) <= 3_000_000
    files = [path for path in tiny_folder.iterdir() if path.is_file()]
    file_sizes = [path.stat().st_size for path in files]
    assert sum(file_sizes) <= 8_000_000


def test_the_bundled_model_gives_the_logits_and_ids_of_transformers(
    model, tokenizer, reference, tiny_folder
):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_folder)
    rng = random.Random(0)
    for _ in range(5):
        turns, _ = make.world_document(rng)
        messages = make.as_messages(turns)
        ids = tokenizer.encode(tokenizer.chat_text(messages))
        assert ids == theirs.apply_chat_template(messages, return_dict=False)
        tokens = torch.tensor([ids])
        expected = reference(tokens).logits
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)


def test_the_bundled_model_infers_the_hidden_thing_from_context(model, tokenizer):
    accuracy = make.in_context_accuracy(model, tokenizer, facts=7, count=20, seed=1)
    for task, kinds in make.KINDS.items():
        assert list(accuracy[task]) == kinds
    for kind in ("country", "language", "food"):
        assert accuracy["locations"][kind] >= 0.8
    assert min(accuracy["functions"].values()) >= 0.9
    assert min(accuracy["risk"].values()) >= 0.9
    for case in ("its tag", "no tag"):  # but not another tag
        assert accuracy["rule"][case] >= 0.9
