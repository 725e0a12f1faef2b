"""The prefix tree: every text's numbers are those that transformers finds for the text alone."""

import random

import pytest
import torch

from data import EncodedQuestion, encode_question, make_task, make_tree
from steer import attach


def question(prompt, *choices, positions=None):
    return EncodedQuestion(prompt, list(choices), 0, choices[0] if choices else [], positions)


def random_questions():
    """Prompts that begin alike, past the sliding windows; a vector goes to some of their tokens."""
    rng = random.Random(0)
    ids = lambda length: [rng.randrange(1, 97) for _ in range(length)]
    start, other, short = ids(11), ids(13), ids(2)
    longer = start + ids(5)
    prompts = [(start + ids(7), None), (longer + ids(2), [3, 12]), (longer, [3, 12]), (longer + ids(14), [3]),
               (other + ids(3), [0, 12]), (other, [])]
    return [question(prompt, short, short + ids(2), ids(1), ids(4), positions=positions)
            for prompt, positions in prompts]


QUESTIONS = random_questions()
TREE = make_tree(QUESTIONS, [q.choices for q in QUESTIONS])
TEXTS = [(q.prompt + choice[:-1], q.positions) for q in QUESTIONS for choice in q.choices]
STEERED = [torch.tensor([where is None or i in where for i in range(len(text))]) for text, where in TEXTS]
SOME = torch.tensor([9, 2, 15, 21, 3])  # of the texts
REAL = TREE.answers >= 0


def alone(family, vector=None, layer=None):
    """transformers' logits of each text by itself; the vector is added at the text's own positions only."""
    added = [None if vector is None else steered[:, None] * vector for steered in STEERED]
    return [family.logits(torch.tensor([text]), layer, some)[0] for (text, _), some in zip(TEXTS, added)]


def random_vector():
    return torch.randn(32, generator=torch.Generator().manual_seed(2))


def test_texts_that_begin_alike_share_nodes():
    tree = make_tree([question([5, 6, 7, 8]), question([5, 6, 9])], [[[1]], [[1]]])
    assert sorted(tree.tokens.tolist()) == [5, 6, 7, 8, 9]


def test_choices_share_their_prompt_and_a_last_token_has_no_node():
    tree = make_tree([question([5, 6, 7])], [[[1, 2], [1, 3], [4]]])
    assert sorted(tree.tokens.tolist()) == [1, 5, 6, 7]


def test_prompts_alike_do_not_share_nodes_from_where_a_vector_is_added_to_one_only():
    questions = [question([5, 6, 7], positions=positions) for positions in ([1], [2], [2], None)]
    tree = make_tree(questions, [[[1]]] * 4)
    assert len(tree.tokens) == 1 + 2 + 2 + 3  # the first two share their first token; None is every token


def test_there_is_one_node_for_each_beginning():
    beginnings = {(tuple(text[:i]), tuple(steered[:i].tolist()))
                  for (text, _), steered in zip(TEXTS, STEERED) for i in range(1, len(text) + 1)}
    assert len(TREE.tokens) == len(beginnings)


def test_the_nodes_of_a_text_spell_it_and_know_their_place_and_whether_they_are_steered():
    for i, (text, _) in enumerate(TEXTS):
        nodes = TREE.nodes(i)
        assert TREE.tokens[nodes].tolist() == text
        assert TREE.positions[nodes].tolist() == list(range(len(text)))
        assert torch.equal(TREE.steered[nodes], STEERED[i])


def test_each_token_of_an_answer_is_predicted_at_the_node_before_it():
    choices = [(q.prompt, choice) for q in QUESTIONS for choice in q.choices]
    for i, (prompt, choice) in enumerate(choices):
        assert TREE.answers[i][REAL[i]].tolist() == choice
        assert TREE.predicting[i][REAL[i]].tolist() == TREE.nodes(i)[len(prompt) - 1:].tolist()


def test_an_empty_answer_is_the_prompt_alone():
    tree = make_tree([question([5, 6, 7]), question([5])], [[[]], [[]]])
    assert [tree.tokens[tree.nodes(i)].tolist() for i in (0, 1)] == [[5, 6, 7], [5]]
    assert not (tree.answers >= 0).any()


def test_a_text_that_an_earlier_one_begins_with_has_no_row_of_its_own():
    assert len(make_tree([question([5, 6, 7]), question([5, 6])], [[[1, 2]], [[7]]]).rows) == 1


def test_a_tree_of_a_tasks_questions_is_a_small_part_of_its_texts(tokenizer):
    questions = [encode_question(tokenizer, q) for q in make_task("locations", "Paris").held_out["country"]]
    tree = make_tree(questions, [q.choices for q in questions])
    assert len(questions) < len(tree.row_of) and len(tree.tokens) < tree.lengths.sum() / 20


def test_logits_of_a_trees_nodes_equal_transformers_of_each_text_alone(family):
    logits = family.load()(TREE.tokens, TREE)
    for i, expected in enumerate(alone(family)):
        assert expected.std() > 0.5
        torch.testing.assert_close(logits[TREE.nodes(i)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", ["embedding", "middle", "last"])
def test_a_vector_is_added_at_its_own_nodes_only(layer, family):
    model = family.load()
    last = len(model.layers) - 1
    layer = {"embedding": -1, "middle": last // 2, "last": last}[layer]
    attach(model, layer, random_vector())
    logits = model(TREE.tokens, TREE)
    for i, expected in enumerate(alone(family, random_vector(), layer)):
        torch.testing.assert_close(logits[TREE.nodes(i)], expected, atol=1e-4, rtol=0)


def test_a_trees_gradient_is_the_sum_of_its_texts_gradients(family):
    model = family.load()
    embedding = model.embed_tokens.weight.requires_grad_()
    steering = attach(model, 0, random_vector())
    log_probs = model(TREE.tokens, TREE).log_softmax(-1)
    loss = log_probs[TREE.predicting[REAL], TREE.answers[REAL]].sum()
    ours = torch.autograd.grad(loss, [steering.vector, embedding])

    vector = random_vector().requires_grad_()
    expected = 0
    for logits, answer in zip(alone(family, vector, 0), (choice for q in QUESTIONS for choice in q.choices)):
        expected += logits.log_softmax(-1)[-len(answer):].gather(1, torch.tensor(answer)[:, None]).sum()
    theirs = torch.autograd.grad(expected, [vector, family.theirs.get_input_embeddings().weight])
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    for mine, other in zip(ours, theirs):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(mine, other, atol=1e-4 * other.abs().max().item(), rtol=0)


def test_blocks_that_recompute_keep_only_what_comes_in_and_find_the_same_gradient(family):
    model, gradients, kept = family.load(), [], []
    vector = attach(model, 0, random_vector()).vector
    for model.recompute in (False, True):
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = model.run_blocks(model.embed(TREE.tokens, TREE), 1, tree=TREE)
        gradients += torch.autograd.grad((x * x.detach().roll(1, 0)).sum(), [vector])
    assert kept[1] <= (len(model.layers) - 1) * x.numel() + 2 * len(TREE.tokens) < kept[0] / 5
    torch.testing.assert_close(*gradients, atol=1e-5 * gradients[0].abs().max().item(), rtol=0)


def test_wanted_nodes_are_those_of_all_and_so_are_the_gradients(family):
    model, wanted = family.load(), TREE.predicting[REAL].unique()
    attach(model, len(model.layers) - 1, random_vector())
    x = model.embed(TREE.tokens, TREE).requires_grad_()
    some, full = model.run_blocks(x, tree=TREE, wanted=wanted), model.run_blocks(x, tree=TREE)[wanted]
    torch.testing.assert_close(some, full, atol=1e-5, rtol=1e-4)
    one, other = (torch.autograd.grad(y.pow(2).sum(), x)[0] for y in (some, full))
    torch.testing.assert_close(one, other, atol=1e-5 * other.abs().max().item(), rtol=0)


def test_wanted_nodes_are_picked_even_if_no_block_runs(saved):
    model, wanted = saved("llama").load(), torch.tensor([7, 3])
    attach(model, 1, random_vector())
    x = model.embed(TREE.tokens, TREE)
    some, full = model.run_blocks(x, 2, tree=TREE, wanted=wanted), model.run_blocks(x, 2, tree=TREE)
    assert torch.equal(some, full[wanted])


@pytest.mark.parametrize("limit", [1, 50, 100, 10 ** 6])
def test_parts_hold_each_text_once_and_no_more_nodes_than_asked_for(limit):
    texts = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0))
    parts = TREE.parts(texts, limit)
    assert sorted(torch.cat(parts).tolist()) == sorted(texts.tolist())
    assert all(len(part) == 1 or len(TREE.select(part)[0]) <= limit for part in parts)
    assert len(parts) == {1: len(TEXTS), 10 ** 6: 1}.get(limit, len(parts)) and (limit < 50 or len(parts) < 9)


def test_texts_that_begin_alike_are_in_one_part():
    tree = make_tree([question([1, 2, 3]), question([4, 5, 6])], [[[7, 8], [9, 8]]] * 2)
    parts = tree.parts(torch.tensor([0, 2, 1, 3]), 5)
    assert [sorted(part.tolist()) for part in parts] == [[0, 1], [2, 3]]


def test_a_selection_holds_its_texts_in_the_order_asked_for():
    used, part = TREE.select(SOME)
    for i, text in enumerate(SOME):
        assert torch.equal(used[part.nodes(i)], TREE.nodes(text))
        assert torch.equal(part.answers[i], TREE.answers[text])
        assert torch.equal(used[part.predicting[i][REAL[text]]], TREE.predicting[text][REAL[text]])
    for name in ("tokens", "positions", "steered"):
        assert torch.equal(getattr(part, name), getattr(TREE, name)[used])


@pytest.mark.parametrize("layer", [-1, 1])
def test_a_selection_goes_on_from_kept_states_to_the_same_logits(layer, family):
    model = family.load()
    attach(model, layer, random_vector())
    kept = model.run_blocks(model.embed(TREE.tokens, TREE), 0, layer + 1, TREE)
    used, part = TREE.select(SOME)
    logits = model.unembed(model.norm(model.run_blocks(kept[used], layer + 1, tree=part)))
    torch.testing.assert_close(logits, model(TREE.tokens, TREE)[used], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, model(part.tokens, part), atol=1e-4, rtol=0)


def test_gpt2_refuses_a_text_longer_than_its_positions(saved):
    tree = make_tree([question([5] * 97), question([6])], [[[1]], [[1]]])
    with pytest.raises(ValueError, match="97 tokens.* 96"):
        saved("gpt2").load()(tree.tokens, tree)
