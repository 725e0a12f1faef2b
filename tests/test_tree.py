"""The prefix tree: every text's numbers are those that transformers finds for the text alone."""

import random
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from data import EncodedQuestion, encode_question, make_task, make_tree
from model import make_mask
from steer import attach


def question(prompt, *choices, steered_at=None):
    completion = choices[0] if choices else []
    return EncodedQuestion(prompt, list(choices), 0, completion, steered_at)


def random_questions():
    """Prompts that begin alike, past the sliding windows; a vector goes to some of their tokens."""
    rng = random.Random(0)

    def ids(length):
        return [rng.randrange(1, 97) for _ in range(length)]

    start = ids(11)
    other = ids(13)
    short = ids(2)
    longer = start + ids(5)
    prompts = [
        (start + ids(7), None),
        (longer + ids(2), [3, 12]),
        (longer, [3, 12]),
        (longer + ids(14), [3]),
        (other + ids(3), [0, 12]),
        (other, []),
    ]
    questions = []
    for prompt, steered_at in prompts:
        choices = [short, short + ids(2), ids(1), ids(4)]
        questions.append(question(prompt, *choices, steered_at=steered_at))
    return questions


QUESTIONS = random_questions()
ANSWERS = [q.choices for q in QUESTIONS]
TREE = make_tree(QUESTIONS, ANSWERS)
IS_TOKEN = TREE.answers >= 0
CHOICES = [(q, choice) for q in QUESTIONS for choice in q.choices]
TEXTS = [q.prompt + choice[:-1] for q, choice in CHOICES]
STEERED = [
    torch.tensor([q.steered_at is None or i in q.steered_at for i in range(len(text))])
    for (q, _), text in zip(CHOICES, TEXTS)
]


def nodes_of(index, tree=TREE):
    """The nodes of a text: of each depth the last one that stands in the row up to its end."""
    row = tree.rows[index // 4].tolist()  # each question has four choices
    end = tree.predicts_from[index][tree.answers[index] >= 0][-1].item()
    at_depth = {}
    for node in row[: row.index(end) + 1]:
        at_depth[tree.positions[node].item()] = node
    return torch.tensor([at_depth[depth] for depth in range(tree.positions[end] + 1)])


def alone(family, vector=None, layer=None):
    """transformers' logits of each text by itself, with the vector at its own positions only."""
    logits = []
    for text, steered in zip(TEXTS, STEERED):
        added = None if vector is None else steered[:, None] * vector
        logits.append(family.logits(torch.tensor([text]), layer, added)[0])
    return logits


def random_vector():
    return torch.randn(32, generator=torch.Generator().manual_seed(2))


def test_texts_that_begin_alike_share_nodes():
    tree = make_tree([question([5, 6, 7, 8]), question([5, 6, 9])], [[[1]], [[1]]])
    assert sorted(tree.tokens.tolist()) == [5, 6, 7, 8, 9]


def test_choices_share_their_prompt_and_a_last_token_has_no_node():
    tree = make_tree([question([5, 6, 7])], [[[1, 2], [1, 3], [4]]])
    assert sorted(tree.tokens.tolist()) == [1, 5, 6, 7]


def test_a_question_is_one_row_with_each_node_once_and_branch_after_branch():
    choices = [[1, 2], [8, 9], [1, 3, 4], [4]]
    tree = make_tree([question([5, 6, 7]), question([5])], [choices, [[6]]])
    rows = [tree.tokens[row].tolist() for row in tree.rows]
    assert rows == [[5, 6, 7, 1, 3, 8], [5, 5, 5, 5, 5, 5]]  # padded with node 0


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_a_node_sees_the_nodes_of_its_own_text_up_to_itself(index):
    config = SimpleNamespace(sliding_window=None, attn_logit_softcapping=None)
    mask = make_mask(config, "full_attention", TREE)[index // 4, 0]
    nodes = nodes_of(index)
    row = TREE.rows[index // 4]
    for count, node in enumerate(nodes, 1):
        sees = mask[row.tolist().index(node)]
        assert set(row[sees].tolist()) == set(nodes[:count].tolist())


def test_questions_with_one_text_each_need_no_mask():
    config = SimpleNamespace(sliding_window=None, attn_logit_softcapping=None)
    tree = make_tree(QUESTIONS, [[choices[1]] for choices in ANSWERS])
    assert make_mask(config, "full_attention", tree) is None


def test_questions_that_are_alike_have_a_row_each():
    """The training loop keeps a stream for each question, and hands them over as rows."""
    tree = make_tree([question([5, 6]), question([5, 6])], [[[1, 2]], [[1, 3]]])
    assert tree.rows.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_a_nodes_place_is_the_first_where_it_stands():
    flat = TREE.rows.flatten().tolist()
    assert TREE.places.tolist() == [flat.index(node) for node in range(len(TREE.tokens))]


def test_prompts_alike_do_not_share_nodes_from_where_a_vector_is_added_to_one_only():
    questions = [question([5, 6, 7], steered_at=places) for places in ([1], [2], [2], None)]
    tree = make_tree(questions, [[[1]]] * 4)
    # The first two share their first token; None is every token.
    assert len(tree.tokens) == 1 + 2 + 2 + 3


def test_there_is_one_node_for_each_beginning():
    beginnings = set()
    for text, steered in zip(TEXTS, STEERED):
        for end in range(1, len(text) + 1):
            beginnings.add((tuple(text[:end]), tuple(steered[:end].tolist())))
    assert len(TREE.tokens) == len(beginnings)


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_the_nodes_of_a_text_spell_it_and_know_their_place_and_whether_they_are_steered(index):
    nodes = nodes_of(index)
    assert TREE.tokens[nodes].tolist() == TEXTS[index]
    assert TREE.positions[nodes].tolist() == list(range(len(nodes)))
    assert torch.equal(TREE.steered[nodes], STEERED[index])


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_each_token_of_an_answer_is_predicted_at_the_node_before_it(index):
    asked, choice = CHOICES[index]
    is_token = IS_TOKEN[index]
    assert TREE.answers[index][is_token].tolist() == choice
    before = nodes_of(index)[len(asked.prompt) - 1 :]
    assert torch.equal(TREE.predicts_from[index][is_token], before)


def test_without_answers_a_tree_is_of_the_prompts_alone():
    tree = make_tree([question([5, 6, 7]), question([5])])
    assert tree.tokens.tolist() == [5, 6, 7]
    assert tree.rows.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert tree.answers.numel() == 0


def test_unfold_gives_every_question_a_row_and_fold_gives_every_node_back():
    x = torch.randn(len(TREE.tokens), 3)
    rows = TREE.unfold(x)
    assert torch.equal(rows, x[TREE.rows])
    assert len(rows) == len(QUESTIONS)
    assert torch.equal(TREE.fold(rows), x)


def test_fold_reads_no_place_that_is_only_padding():
    rows = torch.zeros(TREE.rows.shape)
    for number, row in enumerate(rows):
        texts = [nodes_of(4 * number + choice).tolist() for choice in range(4)]
        row[: len(set(chain(*texts)))] = 1
    assert TREE.fold(rows[..., None]).all()


def test_only_some_nodes_come_out_of_a_tree_of_them():
    some = torch.tensor([7, 3, 11])
    x = torch.randn(len(TREE.tokens), 3)
    tree = TREE.only(some)
    assert torch.equal(tree.fold(tree.unfold(x)), x[some])
    assert torch.equal(tree.keep(x), x[some])
    assert torch.equal(TREE.keep(x), x)


def test_a_tree_of_a_tasks_questions_is_a_small_part_of_its_texts(tokenizer):
    asked = make_task("locations", "Paris").held_out["country"]
    questions = [encode_question(tokenizer, q) for q in asked]
    tree = make_tree(questions, [q.choices for q in questions])
    tokens = sum(len(q.prompt + choice[:-1]) for q in questions for choice in q.choices)
    assert len(questions) < len(tree.answers)
    assert len(tree.tokens) < tokens / 20


def test_logits_of_a_trees_nodes_equal_transformers_of_each_text_alone(family):
    logits = family.load()(TREE.tokens, TREE)
    for index, expected in enumerate(alone(family)):
        assert expected.std() > 0.5
        torch.testing.assert_close(logits[nodes_of(index)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", ["embedding", "middle", "last"])
def test_a_vector_is_added_at_its_own_nodes_only(place, family):
    model = family.load()
    last = len(model.layers) - 1
    layer = {"embedding": -1, "middle": last // 2, "last": last}[place]
    attach(model, layer, random_vector())
    logits = model(TREE.tokens, TREE)
    for index, expected in enumerate(alone(family, random_vector(), layer)):
        torch.testing.assert_close(logits[nodes_of(index)], expected, atol=1e-4, rtol=0)


def test_a_trees_gradient_is_the_sum_of_its_texts_gradients(family):
    model = family.load()
    embedding = model.embed_tokens.weight.requires_grad_()
    steering = attach(model, 0, random_vector())
    log_probs = model(TREE.tokens, TREE).log_softmax(-1)
    loss = log_probs[TREE.predicts_from[IS_TOKEN], TREE.answers[IS_TOKEN]].sum()
    ours = torch.autograd.grad(loss, [steering.vector, embedding])

    vector = random_vector().requires_grad_()
    expected = 0
    for logits, (_, choice) in zip(alone(family, vector, 0), CHOICES):
        predicted = logits.log_softmax(-1)[-len(choice) :]
        expected += predicted.gather(1, torch.tensor(choice)[:, None]).sum()
    theirs = torch.autograd.grad(expected, [vector, family.theirs.get_input_embeddings().weight])

    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    for our, their in zip(ours, theirs):
        largest = their.abs().max().item()
        assert largest > 0.1
        torch.testing.assert_close(our, their, atol=1e-4 * largest, rtol=0)


def test_a_last_block_with_only_some_nodes_gives_theirs_and_their_gradients(family):
    model = family.load()
    some = TREE.predicts_from[IS_TOKEN].unique()
    attach(model, len(model.layers) - 1, random_vector())
    last = len(model.layers) - 1
    x = model.embed(TREE.tokens, TREE).requires_grad_()
    before = model.run_blocks(x, 0, last, TREE)
    ours = model.run_blocks(before, last, None, TREE.only(some))
    expected = model.run_blocks(before, last, None, TREE)[some]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)

    gradient = torch.autograd.grad(ours.pow(2).sum(), x, retain_graph=True)[0]
    wanted = torch.autograd.grad(expected.pow(2).sum(), x)[0]
    largest = wanted.abs().max().item()
    torch.testing.assert_close(gradient, wanted, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("layer", [-1, 1])
def test_a_batchs_own_tree_goes_on_from_kept_streams_to_the_same_logits(layer, family):
    model = family.load()
    attach(model, layer, random_vector())
    kept = model.run_blocks(model.embed(TREE.tokens, TREE), 0, layer + 1, TREE)
    batch = make_tree(QUESTIONS[2:4], ANSWERS[2:4])
    # The batch's texts are TREE's from the ninth on, in the same order.
    node_in_tree = torch.zeros_like(batch.tokens)
    for index in range(8):
        node_in_tree[nodes_of(index, batch)] = nodes_of(index + 8)

    rows = kept[node_in_tree[batch.rows]]
    x = model.run_blocks(batch.fold(rows), layer + 1, None, batch)
    logits = model.unembed(model.norm(x))
    torch.testing.assert_close(logits, model(batch.tokens, batch), atol=1e-4, rtol=0)
