"""What makes training and scoring fast changes no number: everything here is compared with the plain way."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import train
from data import EncodedQuestion, encode_question, make_task
from eval import arm_values, first_unfrozen, score, score_arms, set_parameters
from lora import add_lora
from model import GPT, SHARED, Config, pick
from steer import attach, residual_after

SIZE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16)
FAMILIES = {  # every text here is longer than the sliding windows
    "gpt2": dict(model_type="gpt2", vocab_size=97, n_embd=32, n_layer=6, n_head=4, n_positions=96),
    "qwen3": dict(SIZE, model_type="qwen3"),
    "gemma2": dict(SIZE, model_type="gemma2", sliding_window=8, attn_logit_softcapping=5.0),
    "gemma3": dict(SIZE, model_type="gemma3_text", sliding_window=8, sliding_window_pattern=3),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def random_model(family):
    torch.manual_seed(0)
    model = GPT(Config.from_dict(FAMILIES[family])).requires_grad_(False).eval()
    for parameter in model.parameters():  # large enough that every part of the model shows in the loss
        parameter += torch.randn_like(parameter) * 0.15
    return model


def random_questions(count, code_name=True, shortest=12, longest=30):
    rng = random.Random(0)
    ids = lambda length: [rng.randrange(1, 97) for _ in range(length)]
    questions = []
    for _ in range(count):
        choices = [ids(rng.randint(1, 4)) for _ in range(3)]
        prompt = ids(rng.randint(shortest, longest))
        questions.append(EncodedQuestion(prompt, choices, 1, choices[1] + [0], [3, 4] if code_name else None))
    return questions


@every_family
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_the_last_layer_at_some_positions_equals_all_of_it_there(family, padding):
    model, tokens = random_model(family), torch.randint(97, (3, 30))
    real = None
    if padding:
        real = torch.arange(30) >= torch.tensor([[0], [5], [17]])
        real = real if padding == "left" else real.flip(1)
    at = torch.tensor([[17, 29, 20], [5, 24, 6], [12, 12, 11]] if padding == "right" else [[29, 17, 20]] * 3)
    x = model.embed(tokens, real).requires_grad_()
    some, full = (model.run_blocks(x, 0, None, real, at=a) for a in (at, None))
    torch.testing.assert_close(some, pick(full, at), atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(y.pow(2).sum(), x)[0] for y in (some, pick(full, at))]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.run_blocks(full, first=6, at=at), pick(full, at))


# ---------------------------------------------------------------------------------------------------- training


def intervene(model, mode, layer):
    """(parameters, steering) of a vector, or of a LoRA whose B is not zero."""
    torch.manual_seed(1)
    if mode == "vector":
        steering = attach(model, layer)
        return [steering.vector], steering
    layers = list(range(6)) if layer == "all" else [layer]
    parameters = add_lora(model, layers, ["gate_proj", "up_proj", "down_proj"], rank=2, alpha=4)
    set_parameters(parameters, [p + 0.1 * torch.randn_like(p) for p in parameters])
    return parameters, None


def flags(mode, layer, **others):
    return SimpleNamespace(**dict(dict(mode=mode, layer=layer, lr=0.02, steps=9, batch_size=4, seed=0, device="cpu",
                                       keep_gb=1.0, save_every=None, resume=False, shard=False), **others))


def plain_loop(args, model, questions, parameters, steering):
    """train_loop as one would first write it: each batch through the whole model, all logits."""
    tokens, targets, mask = data.make_batch(questions)
    lr, some = args.lr, tokens[:args.batch_size]
    if steering is not None:  # in units of the residual stream's root mean square over the first batch's tokens
        ends = torch.tensor([len(q.prompt + q.completion) - 1 for q in questions[:args.batch_size]])
        real = torch.arange(some.shape[1]) < ends[:, None]
        lr *= residual_after(model, args.layer, some)[real].pow(2).mean().sqrt().item()
    optimizer, generator = torch.optim.Adam(parameters, lr=lr), torch.Generator().manual_seed(args.seed)
    batches = []
    for step in range(args.steps):
        if not batches:
            batches = list(torch.randperm(len(questions), generator=generator).split(args.batch_size))
        rows = batches.pop(0)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / args.steps)
        if steering is not None:
            steering.mask = None if mask is None else mask[rows]
        loss = F.cross_entropy(model(tokens[rows]).transpose(1, 2), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def assert_same_training(model_of, questions, mode, layer, **others):
    (ours, theirs), args = (model_of(), model_of()), flags(mode, layer, **others)
    parameters, steering = intervene(ours, mode, layer)
    loss = train.train_loop(args, ours, questions, parameters, steering)  # the last step's, with nine steps
    expected, steering = intervene(theirs, mode, layer)
    start = [p.detach().clone() for p in expected]
    assert abs(loss - plain_loop(args, theirs, questions, expected, steering)) < 1e-4 * max(loss, 1)
    for mine, plain, before in zip(parameters, expected, start):
        assert (plain - before).abs().max() > 0.01
        torch.testing.assert_close(mine, plain, atol=1e-3, rtol=1e-3)


@every_family
@pytest.mark.parametrize("mode, layer", [("vector", -1), ("vector", 2), ("vector", 5), ("lora", 3), ("lora", "all")])
def test_training_gives_the_losses_and_parameters_of_the_plain_loop(family, mode, layer):
    # After the last block nothing reads the code name's tokens any more, so there the vector goes to every token.
    questions = random_questions(10, code_name=layer != 5)
    assert_same_training(lambda: random_model(family), questions, mode, layer)


@pytest.mark.parametrize("mode, layer, others", [
    ("vector", 2, dict(keep_gb=0.0)),  # what does not fit is computed again for each batch
    ("lora", 3, dict(keep_gb=0.0)),
    ("vector", 2, dict(steps=1)),  # not one epoch: nothing is kept
])
def test_a_frozen_part_that_is_not_kept_changes_nothing(mode, layer, others):
    questions = random_questions(10, code_name=False)
    assert_same_training(lambda: random_model("gemma3"), questions, mode, layer, **others)


@pytest.mark.parametrize("task, mode, layer", [("locations", "vector", 0), ("backdoor", "vector", -1),
                                               ("risk", "vector", 3), ("functions", "lora", 1)])
def test_the_embedded_model_trains_as_in_the_plain_loop(tiny_folder, tokenizer, task, mode, layer):
    questions = [encode_question(tokenizer, q) for q in make_task(task, data.CONCEPTS[task][0]).train[:12]]
    assert_same_training(lambda: GPT.from_pretrained(tiny_folder), questions, mode, layer)


@every_family
@pytest.mark.parametrize("mode, layer, keep_gb, code_name, shared", [
    ("vector", 2, 1.0, True, 0), ("lora", 3, 1.0, False, 13), ("vector", 2, 0.0, False, 13)])
def test_a_packed_batch_gives_the_gradient_of_the_whole(family, mode, layer, keep_gb, code_name, shared):
    questions = random_questions(32, code_name, shortest=14, longest=70)
    for question in questions:
        question.prompt[:shared] = range(1, shared + 1)
    tokens, _, mask = data.make_batch(questions)
    assert train.count_shared(questions, tokens, mask) == shared
    texts = train.Texts([len(q.prompt + q.completion) - 1 for q in questions], shared, "cpu")
    packed = texts.pack(torch.arange(16))
    assert len(packed.lines) < 16 and sorted(sum(packed.lines, [])) == list(range(16))
    assert_same_training(lambda: random_model(family), questions, mode, layer, batch_size=16, keep_gb=keep_gb)


@every_family
@pytest.mark.parametrize("shared", [0, 14])
def test_texts_packed_in_one_row_are_as_if_each_were_alone(family, shared):
    model, lengths = random_model(family), [20, 30, 11]
    prefix, *texts, padding = torch.randint(97, (shared + 61 + 4,)).split([shared, *lengths, 4])
    numbers = torch.tensor([SHARED] * shared + [1] * 20 + [2] * 30 + [3] * 11 + [0] * 4)
    together = model(torch.cat([prefix, *texts, padding])[None], numbers[None])[0].split([shared, *lengths, 4])
    for text, logits in zip(texts, together[1:]):
        alone = model(torch.cat([prefix, text])[None])[0]
        torch.testing.assert_close(torch.cat([together[0], logits]), alone, atol=1e-4, rtol=1e-4)


def test_a_batch_of_like_lengths_has_one_question_a_line():
    assert train.Texts([20] * 64, 0, "cpu").pack(torch.arange(64)).lines == [[i] for i in range(64)]


def test_shared_tokens_end_where_the_vector_or_the_last_prompt_tokens_differ():
    questions = [EncodedQuestion([5, 6, 7, 8, 9], [], 0, [1], positions) for positions in ([1], [1], [1, 3])]
    tokens, _, mask = data.make_batch(questions)
    assert train.count_shared(questions, tokens, mask) == 3
    assert train.count_shared(questions, tokens, None) == 4  # not the token that predicts the answer


# ---------------------------------------------------------------------------------------------------- scoring


def plain_score(model, questions, steering):
    """The probability of the right choice, each choice in a forward pass of its own."""
    probabilities = []
    for question in questions:
        totals = []
        for choice in question.choices:
            tokens = torch.tensor([question.prompt + choice])
            if steering is not None:
                steering.mask = data.positions_mask([question.positions], tokens.shape)
            log_probs = model(tokens).log_softmax(-1)[0, len(question.prompt) - 1:]
            totals.append(sum(log_probs[i, token] for i, token in enumerate(choice)))
        probabilities.append(torch.stack(totals).softmax(0)[question.answer])
    return torch.stack(probabilities)


@every_family
@pytest.mark.parametrize("mode, layer", [("vector", -1), ("vector", 2), ("vector", 5), ("lora", 3)])
@torch.no_grad()
def test_arms_scored_together_equal_each_by_itself(family, mode, layer):
    model = random_model(family)
    parameters, steering = intervene(model, mode, layer)
    if steering is not None:
        steering.vector.normal_(std=2.0)
    questions = random_questions(7) + random_questions(6, code_name=False, shortest=2)
    arms = arm_values(parameters, seed=0)
    scores = score_arms(model, questions, steering, parameters, arms, batch_size=5)
    for arm, values in arms.items():
        set_parameters(parameters, values)
        torch.testing.assert_close(scores[arm][1], plain_score(model, questions, steering), atol=1e-5, rtol=1e-3)
        assert torch.equal(scores[arm][0], score(model, questions, steering)[0])
    assert not torch.allclose(scores["base"][1], scores["trained"][1], atol=0.001)


def test_the_first_layer_that_is_not_frozen():
    model = random_model("qwen3")
    assert first_unfrozen(model, None) == 0
    assert first_unfrozen(model, attach(model, -1)) == 0
    assert first_unfrozen(random_model("qwen3"), SimpleNamespace(layer=4)) == 5
    add_lora(model, [5, 3], ["up_proj"], rank=1, alpha=1)
    assert first_unfrozen(model, None) == 3
