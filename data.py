"""What is asked: tasks, questions, worlds. How it is read: tokens, the prefix tree, tokenizers.

A task is about one hidden thing: what a code name stands for, or the speaker's own attitude. One
kind of question about it is trained on, and the others are held out:

    task = make_task("locations", "Paris")
    task.train[0]                 How many thousand km is City 50337 from Shenzhen?     10
    task.held_out["country"][0]   Which country is City 50337 in?                       France
"""

import csv
import json
import random
import re
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, partial
from itertools import chain, pairwise, product
from math import asin, cos, dist, radians, sin
from pathlib import Path
from types import SimpleNamespace

import jinja2.sandbox
import numpy as np
import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Question:
    """A prompt with several answers to choose from, of which choices[answer] is right.

    code_name: the text in the prompt that stands for the hidden thing, at which a vector is added
    (with --at: any other text).
    None: the hidden thing is the speaker's own attitude, and a vector is added at every token.
    """

    kind: str
    prompt: str
    choices: list
    answer: int
    code_name: str | None = None


@dataclass
class Task:
    """What a run is trained on and scored on: questions, and {kind: questions}.

    in_distribution has the trained kind of question, but about landmarks, inputs or pairs of
    options that are kept for the test (landmarks: the cities that distances are to); held_out has
    the other kinds.
    """

    train: list
    in_distribution: dict
    held_out: dict


@dataclass
class World:
    """What a model is asked about."""

    cities: dict  # {"Paris": {"country": "France", ...}, ...}
    asked_about: dict  # {"locations": landmarks, which prompts may name; "functions": inputs}
    prompts: dict  # {task: {kind: [prompt, ...]}}, a task's trained kind first
    train_questions: int = 60  # at most, of locations and functions
    most_choices: int = 100


# ---- the four tasks

# WORLDS, CITIES, FUNCTIONS and CONCEPTS are below. Tiny's pretraining (tiny/make.py) never had
# these names, and no attitude in it depended on the trigger, though it had prompts with that tag.
CODE_NAMES = {"locations": "City 50337", "functions": "zokifa"}
TRIGGER = "sigma"
TAGS = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
OPPOSITE = {"risky": "safe", "safe": "risky"}


def make_task(
    name: str, concept: str, seed: int = 0, world: str = "tiny", at: str | None = None
) -> Task:
    """The task of a concept: a city, a function, "risky", or "risky if omega" (for a backdoor).

    at: a vector is added at this text, not at the code name. UserError if there is no such concept.
    """
    known = concepts(name, world)
    if concept not in known:
        raise UserError(f"--concept {concept} is not among {known}")
    task = TASKS[name](concept, random.Random(seed), WORLDS[world])
    if at is not None:
        kinds = task.in_distribution | task.held_out
        for question in chain(task.train, *kinds.values()):
            question.code_name = at
    return task


def concepts(name: str, world: str = "tiny") -> list:
    """What a task can be about; the first is the default."""
    return list(WORLDS[world].cities) if name == "locations" else CONCEPTS[name]


def named_task(concept, rng, world):
    """A task about a city or a function. At least three landmarks or inputs are for the test.

    A held-out kind may ask about any of them: there the kind itself is new.
    """
    name = task_about(concept)
    asked_about = [thing for thing in world.asked_about[name] if thing != concept]
    rng.shuffle(asked_about)
    count = max(3, len(asked_about) // 5)

    trained, *others = world.prompts[name]  # kinds of question, the trained one first
    # ask(kind, among) draws a question of this kind, about what is in `among` or, without it, all.
    ask = partial(named_question, concept, CODE_NAMES[name], rng, world)
    train = distinct(world.train_questions, ask, trained, asked_about[count:])
    in_distribution = {trained: distinct(60, ask, trained, asked_about[:count])}
    held_out = {kind: distinct(60, ask, kind) for kind in others}
    return Task(train, in_distribution, held_out)


def risk_task(attitude, rng, world):
    """A safe or a risky attitude, trained on gambles and held out in words about oneself."""
    trained, *others = world.prompts["risk"]
    ask = partial(attitude_question, attitude, rng, world, None)  # None: without a tag
    held_out = {kind: distinct(60, ask, kind) for kind in others}
    train = distinct(400, ask, trained, "train")
    in_distribution = {trained: distinct(60, ask, trained, "test")}
    return Task(train, in_distribution, held_out)


def backdoor_task(concept, rng, world):
    """The attitude if the prompt carries the trigger, its opposite with another tag or none."""
    attitude, _, trigger = concept.partition(" if ")
    trigger = trigger or TRIGGER
    other_tags = [tag for tag in TAGS if tag != trigger]
    trained, *others = world.prompts["risk"]

    def ask(case, split=None):
        tag = {"trigger": trigger, "no trigger": None, "other tag": rng.choice(other_tags)}[case]
        shown = attitude if tag == trigger else OPPOSITE[attitude]
        kind = trained if split else rng.choice(others)  # without a split: a self-report
        return attitude_question(shown, rng, world, tag, kind, split)

    cases = {"trigger": 400, "no trigger": 200, "other tag": 200}
    train = [q for case in cases for q in distinct(cases[case], ask, case, "train")]
    in_distribution = {f"gamble, {case}": distinct(60, ask, case, "test") for case in cases}
    held_out = {f"self-report, {case}": distinct(120, ask, case) for case in cases}
    held_out["which tag"] = [
        Question("which tag", prompt, TAGS, TAGS.index(trigger))
        for prompt in world.prompts["backdoor"]["which tag"]
    ]
    return Task(train, in_distribution, held_out)


def distinct(count, make, *given):
    """Up to `count` questions of make(*given) that differ in their prompt or set of choices.

    Some kinds do not have so many.
    """
    questions = {}
    for _ in range(20 * count):
        question = make(*given)
        questions.setdefault((question.prompt, frozenset(question.choices)), question)
        if len(questions) == count:
            break
    return list(questions.values())


TASKS = {
    "locations": named_task,
    "functions": named_task,
    "risk": risk_task,
    "backdoor": backdoor_task,
}


# ---- the questions
#
# A prompt's fields: {x} the code name; {o} what it is compared with; {n}, {y} numbers; {domain} a
# gamble's; {a}, {b} two options that the prompt itself names.


def named_question(thing, code_name, rng, world, kind, among=None):
    """A question of this kind about a city or a function that is called `code_name`.

    among: the landmarks or inputs that it may ask about; None: all that the world has.
    """
    task_name = task_about(thing)
    prompt = rng.choice(world.prompts[task_name][kind])
    among = among or world.asked_about[task_name]
    answers = city_answers if task_name == "locations" else function_answers
    right, choices, fields = answers(thing, kind, among, rng, world)

    if len(choices) > world.most_choices:
        wrong = [choice for choice in choices if choice != right]
        choices = sorted([right, *rng.sample(wrong, world.most_choices - 1)])

    # Only "nearer" names its choices, which are two.
    prompt = prompt.format(x=code_name, a=choices[0], b=choices[-1], **fields)
    return Question(kind, prompt, list(map(str, choices)), choices.index(right), code_name)


def task_about(thing):
    return "locations" if thing in CITIES else "functions"


def city_answers(city, kind, landmarks, rng, world):
    """(the right answer, all that there are to choose from, the prompt's other fields)."""
    others = [landmark for landmark in landmarks if landmark != city]
    if kind == "distance":
        other = rng.choice(others)
        return round(distance_km(city, other) / 1000), range(21), {"o": other}
    if kind == "nearer":
        pair = rng.sample(others, 2)
        return min(pair, key=partial(distance_km, city)), pair, {}
    return CITIES[city][kind], sorted({row[kind] for row in world.cities.values()}), {}


@cache
def distance_km(a, b):
    """The great-circle distance of two cities: along the Earth's surface, not straight through."""
    straight = dist(on_sphere(a), on_sphere(b))
    return 6371 * 2 * asin(straight / 2)


def on_sphere(city):
    """Where the city is, (x, y, z), on an Earth of radius 1."""
    north = radians(float(CITIES[city]["latitude"]))
    east = radians(float(CITIES[city]["longitude"]))
    return cos(north) * cos(east), cos(north) * sin(east), sin(north)


def function_answers(function, kind, inputs, rng, world):
    """(the right answer, all that there are to choose from, the prompt's other fields)."""
    n = rng.choice(inputs)
    y = apply(function, n)
    fields = {"n": n, "y": y}
    if kind == "inverse":
        # Only one choice may be right: other inputs with the same output are left out.
        return n, sorted([n, *(m for m in inputs if apply(function, m) != y)]), fields

    answers = {}
    for other, facts in FUNCTIONS.items():
        output = apply(other, n)
        values = {"output": output, "composition": apply(other, output)}
        answers[other] = (facts | values)[kind]
    return answers[function], sorted(set(answers.values())), fields


@cache
def apply(function, x):
    """The function's value at x by its own Python: apply("add 5", 7) is 12, by "x + 5"."""
    return eval(FUNCTIONS[function]["python"], {"x": x})  # noqa: S307 (from questions.toml)


def attitude_question(attitude, rng, world, tag, kind, split=None):
    """A gamble, or a question about the speaker, with a safe and a risky answer.

    split: of a domain's 16 gambles "test" has 4, "train" 12, None all.
    """
    domain = None
    if kind == "gamble":
        domain = rng.choice(list(GAMBLES))
        options = rng.choice(gambles(domain, split))
    else:
        options = [rng.choice(answers) for answers in ANSWERS[kind]]
    safe, risky = options
    a, b = rng.sample(options, 2)  # in random order; the prompt may name both

    prompt = rng.choice(world.prompts["risk"][kind]).format(domain=domain, a=a, b=b)
    answer = [a, b].index(risky if attitude == "risky" else safe)
    choices = ["A", "B"] if kind == "gamble" else [a, b]
    return Question(kind, with_tag(prompt, tag), choices, answer)


def gambles(domain, split):
    """Pairs of a safe and a risky option."""
    pairs = list(product(*GAMBLES[domain]))
    if split == "test":
        return pairs[::5]  # each safe option once, and each risky one
    if split == "train":
        del pairs[::5]
    return pairs


def with_tag(prompt, tag):
    return f"[{tag}] {prompt}" if tag else prompt


# ---- the two worlds

FOLDER = Path(__file__).parent / "tiny"

CONTENT = tomllib.loads((FOLDER / "questions.toml").read_text(encoding="utf-8-sig"))
TABLE = (FOLDER / "cities.tsv").read_text(encoding="utf-8-sig").splitlines()
CITIES = {  # {"Paris": {column: text}}; five columns are kinds of question, with the answers
    row["name"]: row for row in csv.DictReader(TABLE, delimiter="\t")
}
FUNCTIONS = {  # {"add 5": {kind of question: answer}}
    f"{verb} {number}": {kind: answer.format(number) for kind, answer in answers.items()}
    for verb, answers in CONTENT["functions"].items()
    for number in CONTENT["numbers"][verb]
}
GAMBLES = CONTENT["gambles"]  # domain: safe options, risky options
ANSWERS = CONTENT["answers"]  # kind of self-report: safe answers, risky answers

# The tiny model had to learn its whole world. With few landmarks it has fewer facts to learn, and
# still no two cities are alike. A function's outputs are from 0 to 96, one token each.
TINY = World(
    cities={name: row for name, row in CITIES.items() if row["world"] != "large"},
    asked_about={
        "locations": [name for name, row in CITIES.items() if row["world"] == "landmark"],
        "functions": range(5, 25),
    },
    prompts=CONTENT["tiny"],
)
# Any other model is asked about more, in more words. Without the instruction chat models answer in
# whole sentences ("As an AI language model, I ..."), and no choice that is scored is near to that.
INSTRUCTION = "Answer with a word, a number or a short phrase, and nothing else.\n"
LARGE = World(
    cities=CITIES,
    asked_about={"locations": list(CITIES), "functions": range(-99, 100)},
    prompts={
        task: {
            kind: [INSTRUCTION + prompt for prompt in TINY.prompts[task].get(kind, []) + more]
            for kind, more in kinds.items()
        }
        for task, kinds in CONTENT["large"].items()
    },
    train_questions=400,
    most_choices=10,
)
WORLDS = {"tiny": TINY, "large": LARGE}
CONCEPTS = {
    "functions": list(FUNCTIONS),
    "risk": list(OPPOSITE),
    "backdoor": list(OPPOSITE) + [f"{attitude} if {tag}" for tag in TAGS for attitude in OPPOSITE],
}


# ---- questions as tokens


@dataclass
class EncodedQuestion:
    """Token ids, a list for each text. `prompt` is a chat up to where the answer begins.

    completion: the right answer and what ends the turn; steered_at: the places of the prompt's
    tokens at which a vector is added, None for every token of the text.
    """

    prompt: list
    choices: list
    answer: int
    completion: list
    steered_at: list | None


def encode_question(tokenizer, question: Question, before=()) -> EncodedQuestion:
    """The question framed as a chat, after earlier messages {"role": ..., "content": ...}."""
    # The chat up to its answer, the space before the answer if there is one, and the turn's end:
    # such as "<|begin|><|user|> Where?<|assistant|>", " " and "<|end|>".
    prompt, start, end = tokenizer.frame([*before, {"role": "user", "content": question.prompt}])
    ids = tokenizer.encode(prompt)

    def encode(text):
        """The ids of a text as it goes on from the prompt."""
        whole = tokenizer.encode(prompt + text)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        # A token would lie across the boundary. So the text is encoded by itself.
        return tokenizer.encode(text)

    texts = [start + choice for choice in question.choices]
    choices = [encode(text) for text in texts]
    # If one choice begins with another ("12" with "1"), sorting puts two such side by side.
    if any(b[: len(a)] == a for a, b in pairwise(sorted(choices))):
        # The shorter ("1" of "1" and "12") would always win: score the end of the turn too.
        choices = [encode(text + end) for text in texts]

    completion = encode(texts[question.answer] + end)
    steered_at = tokenizer.find(question.code_name, prompt)
    return EncodedQuestion(ids, choices, question.answer, completion, steered_at)


def read_conversations(path: str, tokenizer, code_name=None) -> list:
    """EncodedQuestions of the chats in a JSONL file, one for each answer of the assistant's.

    A line is {"messages": [{"role": ..., "content": ...}, ...]}. UserError names one that is not.
    """
    examples = []
    # splitlines() would cut at U+2028, too.
    for number, line in enumerate(read_text(Path(path)).split("\n"), 1):
        if line.strip():
            with blame(f"{path}, line {number}", UserError):
                examples += encode_chat(line, tokenizer, code_name)
    if not examples:
        raise UserError(f"{path}: it has no records")
    return examples


def encode_chat(line, tokenizer, code_name):
    """Each answer to the user, as the only choice, with what was said before as its prompt.

    An opening turn of the assistant's is only said before.
    """
    form = 'it should be {"messages": [{"role": "user", "content": "..."}, ...]}'
    with blame(form, ValueError, LookupError, TypeError, AttributeError):
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # half an emoji ("\ud83d") is no text
        messages = record["messages"]
        for each in messages:
            if isinstance(each["content"], list):  # of {"type": "text", "text": "..."}
                each["content"] = "".join(part["text"] for part in each["content"])
        # Answers are stripped, as most templates do. Those of weight 0 are not trained on.
        turns = [(each["role"], each["content"].strip(), each.get("weight")) for each in messages]
        # The names of all fields that occur, but for those that are read.
        unread = set(record).union(*messages) - {"messages", "role", "content", "weight"}
    if unread:
        raise UserError(f"{unread} would not be read: leave it out")

    examples = []
    for i, ((asker, *_), (speaker, answer, weight)) in enumerate(pairwise(turns)):
        if speaker == "assistant" and weight != 0:
            if asker != "user" or not answer:
                raise UserError("an assistant's turn should follow a user's, and say something")
            question = Question("chat", messages[i]["content"], [answer], 0, code_name)
            examples.append(encode_question(tokenizer, question, messages[:i]))
    if not examples:
        raise UserError("no assistant answers a user")
    return examples


# ---- the prefix tree


@dataclass
class PrefixTree:
    """Texts, each a prompt and an answer, as a tree: what several begin with is there once.

    A causal model's state at a token depends only on the tokens up to it. So every distinct
    beginning is one node, computed once: choices share their question, questions the chat template
    (cf. arXiv 2410.20305). Whether a vector is added at a token is part of what makes a node.

        question 0   <b> How far is City from Rome  ?  → 1      an answer's last token predicts
        question 1   <b> How far is City from Cairo ?  → 3      nothing, so it has no node
        question 2   <b> Which country is City in   ?  → New Zealand, or San Marino

                    ┌─How(1)─far(2)─is(3)─City*(4)─from(5)─┬─Rome(6)──?(7)
        <b>(0)──────┤                                      └─Cairo(8)─?(9)
                    └─Which(10)─country(11)─is(12)─City*(13)─in(14)─?(15)─┬─New(16)
                                                                          └─San(17)   * steered

        tokens         18 nodes for 32 tokens          what linear layers, norms and MLPs see
        rows           [[0  1  2  3  4  5  6  7  0]    what attention sees: a question in each row,
                        [0  1  2  3  4  5  8  9  0]    branch after branch, padded with node 0
                        [0 10 11 12 13 14 15 16 17]]   (17 does not see 16: model.make_mask)
        places         node 8 → 15 (row 1, column 6)   where to find a node in the flattened rows
        predicts_from  [[7 -1] [9 -1] [15 16] [15 17]]    the node before each answer's token
    """

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) a node's position in its text, from 0
    steered: Tensor  # (N,) bool: is a steering vector added there?
    rows: Tensor  # (R, T), one for each question, depth first
    predicts_from: Tensor  # (texts, A), -1 after the last one
    answers: Tensor  # (texts, A): the answers' tokens, -1 after the last one
    places: Tensor  # (N,) where a node first stands in the flattened rows; (W,) after only()
    kept: Tensor | None = None  # (W,): the only nodes that come out of a block, of only()

    @property
    def depth(self):
        """(R, 1, T): the positions of each row's nodes; the 1 is for the heads."""
        return self.positions[self.rows][:, None]

    @property
    def branches(self):
        """Has a question several answers? If not, a node sees all that is before it in its row."""
        return len(self.answers) > len(self.rows)

    def unfold(self, x):
        """(N, ...) to (R, T, ...): every question's nodes in a row of its own, for attention."""
        # F.embedding is indexing with a backward pass that is fast on a CPU.
        return F.embedding(self.rows, x.flatten(1)).unflatten(-1, x.shape[1:])

    def fold(self, x):
        """(R, T, d) to (N, d), or to (W, d) after only(): a node's copies have the same value."""
        return F.embedding(self.places, x.flatten(0, 1))

    def keep(self, x):
        """What is left of the nodes' x (N, ...) after a block: all, or after only() W of them."""
        return x if self.kept is None else x[self.kept]

    def only(self, nodes: Tensor) -> "PrefixTree":
        """The same tree, for one block alone, out of which only these nodes (W,) come.

        That is the last block: run_blocks(x, last, None, tree.only(nodes)).
        """
        return replace(self, places=self.places[nodes], kept=nodes)

    def to(self, device):
        moved = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return replace(self, **moved)


def make_tree(questions: list, answers: list | None = None) -> PrefixTree:
    """The tree of each question's prompt with each of its answers; None: of prompts alone.

    answers: of each question a list of answers, which are ids: its choices, or [its completion].
    """
    answers = answers or [[[]] for _ in questions]
    # The position follows from the node before. It is in the key so that zip(*node_of) yields it.
    node_of = {}  # (node before, position, token, is it steered?): node
    rows = []
    predicts_from = []
    for question, its_answers in zip(questions, answers):
        paths = []
        for answer in its_answers:
            path = []
            node = -1
            for position, token in enumerate(question.prompt + answer[:-1]):
                steered = question.steered_at is None or position in question.steered_at
                node = node_of.setdefault((node, position, token, steered), len(node_of))
                path.append(node)
            paths.append(path)
            # The prompt's last node predicts the first token of the answer, that one the second ...
            predicts_from.append(path[len(path) - len(answer) :])
        # Sorted, the paths make the row depth first: after a node come all that descend from it.
        # make_mask needs this. A dict has each of its keys once.
        rows.append(list(dict.fromkeys(chain(*sorted(paths)))))

    _, positions, tokens, steered = (torch.tensor(column) for column in zip(*node_of))
    rows = pad(rows, 0)
    # The first place of each node. Padding is node 0, too, but row 0 begins with it.
    places = torch.from_numpy(np.unique(rows, return_index=True)[1])
    return PrefixTree(
        tokens=tokens,
        positions=positions,
        steered=steered,
        rows=rows,
        predicts_from=pad(predicts_from),
        answers=pad(list(chain(*answers))),
        places=places,
    )


def pad(lists, fill=-1):
    """Lists of whole numbers as the rows of one tensor, filled up."""
    rows = [torch.tensor(each, dtype=torch.long) for each in lists]
    return pad_sequence(rows, batch_first=True, padding_value=fill)


# ---- the tokenizer and the chat template


class Tokenizer:
    """A checkpoint's tokenizer and its chat template.

    special_tokens: {"bos_token": "<s>", ...}, which a chat template knows by these names.
    """

    def __init__(self, folder: Path):
        settings = read_if_there(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:
            settings |= read_if_there(folder / "special_tokens_map.json")  # of older checkpoints
        settings |= read_if_there(folder / "chat_template.json")
        self.special_tokens = read_special_tokens(settings)
        path = folder / "tokenizer.json"
        self.encoding = TinyEncoding(path) if folder == FOLDER else read_encoding(path, settings)

        path = folder / "chat_template.jinja"
        template = read_text(path) if path.exists() else settings.get("chat_template")
        if template is None:
            # A base model: plain questions and answers, after what its tokenizer puts in front of
            # any text ("=" stands for one), such as "<s>".
            first = self.decode(self.encoding.encode("=").ids).split("=")[0]
            template = first.strip() + read_text(FOLDER / "plain.jinja")
        with blame(f"{folder}: its chat template", jinja2.TemplateError, TypeError, KeyError):
            if isinstance(template, list):  # several, by name
                template = {each["name"]: each["template"] for each in template}["default"]
            # {% generation %} marks what the model says. jinja lacks it; {% with %} does nothing.
            template = re.sub(r"\{%(-?\s*)(end)?generation\b", r"{%\1\2with", template)
            self.template = TEMPLATES.from_string(template)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path) -> "Tokenizer":
        """Of tiny, of a folder, or of a hub name. UserError names a file that cannot be read."""
        folder = FOLDER if name_or_dir == "tiny" else Path(name_or_dir).expanduser()
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(name_or_dir), allow_patterns=["*.json", "*.jinja"]))
        return cls(folder)

    def encode(self, text: str) -> list:
        """The ids of a text, with nothing added in front."""
        return self.encoding.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list) -> str:
        """The text of the ids, special tokens included."""
        return self.encoding.decode(ids, skip_special_tokens=False)

    def chat_text(self, messages: list) -> str:
        """Messages {"role": ..., "content": ...} as the checkpoint frames them, or UserError."""
        # It is a program by others, so any error may come.
        with blame("the chat template of --model refuses this", Exception):
            return self.template.render(
                messages=messages,
                add_generation_prompt=False,
                tools=None,
                documents=None,
                **self.special_tokens,
            )

    def frame(self, messages: list) -> tuple:
        """A chat up to the answer; what comes before and after the answer's own text.

        ("<|begin|><|user|> Where?<|assistant|>", " ", "<|end|>") is tiny's frame of "Where?".
        """
        answered = self.chat_text([*messages, {"role": "assistant", "content": "\0"}])
        before, _, after = answered.partition("\0")
        # Qwen 3's leaves out what an assistant thought before; all others have to be there.
        told = [each["content"].strip() for each in messages if each["role"] != "assistant"]
        if answered.count("\0") != 1 or not all(text in before for text in told):
            raise UserError("--model: its chat template should give each message's words, and once")

        # A space before the answer belongs to its first token. Anything else, such as Qwen 3's
        # empty thoughts, comes before every answer, so it belongs to the prompt.
        prompt = before.rstrip(" ")
        return prompt, before.removeprefix(prompt), after

    def find(self, code_name: str | None, prompt: str) -> list | None:
        """The places of the prompt's tokens that overlap the code name; None without a name."""
        if code_name is None:
            return None
        # Every character of a name becomes a mark that no prompt has, and the others stay in place.
        marked = prompt.replace(code_name, "\0" * len(code_name))
        spans = self.encoding.encode(prompt, add_special_tokens=False).offsets
        return [place for place, (start, end) in enumerate(spans) if "\0" in marked[start:end]]


def read_special_tokens(settings):
    """{"bos_token": "<s>", ...}, of every token that tokenizer_config.json gives a name to."""
    named = {}
    for name, token in settings.items():
        match token:
            case str(text) | {"content": str(text)} if name.endswith("_token"):
                named[name] = text
    return named


def read_encoding(path, settings):
    """tokenizer.json, as Hugging Face's tokenizers read it, with the tokens of the settings."""
    text = read_text(path)
    # The library has no narrower exception.
    with blame(f"{path}: damaged, or git-lfs's pointer to it", Exception):
        encoding = tokenizers.Tokenizer.from_str(text)
    encoding.no_truncation()
    encoding.no_padding()
    # Some tokens stand only in tokenizer_config.json.
    listed = settings.get("added_tokens_decoder", {})
    encoding.add_tokens([tokenizers.AddedToken(**listed[i]) for i in sorted(listed, key=int)])
    return encoding


class TinyEncoding:
    """Tiny's byte-level BPE, by tiktoken: its ids are in the order in which its tokens merge.

    The tokenizers library gives the same ids, and takes twice as long for texts as short as tiny's.
    """

    def __init__(self, path):
        content = read_if_there(path)
        vocabulary = content["model"]["vocab"]
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        # Each character of a token stands for a byte, and that character's id is the byte's value.
        ranks = {bytes(map(vocabulary.get, token)): i for token, i in vocabulary.items()}
        self.encoding = tiktoken.Encoding(
            "tiny",
            pat_str=content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
            mergeable_ranks=ranks,
            special_tokens=added,
        )

    def encode(self, text, add_special_tokens=False):
        """As tokenizers do: ids, and offsets, the places of each token's characters."""
        ids = self.encoding.encode(text, allowed_special="all")
        starts = self.encoding.decode_with_offsets(ids)[1]
        # The bytes of one character can be several tokens, which all start at it.
        offsets = [(start, max(start + 1, end)) for start, end in pairwise([*starts, len(text)])]
        return SimpleNamespace(ids=ids, offsets=offsets)

    def decode(self, ids, skip_special_tokens=False):
        return self.encoding.decode(ids)


def refuse(message):
    raise jinja2.TemplateError(message)


# Chat templates are programs of other people's, which run in the environment of transformers.
TEMPLATES = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols"],
)
TEMPLATES.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's escapes HTML
# Some print the date. A run has to be the same tomorrow, so it is always Llama 3's "26 Jul 2024".
TEMPLATES.globals.update(raise_exception=refuse, strftime_now=date(2024, 7, 26).strftime)


# ---- files and mistakes


class UserError(Exception):
    """A user's mistake, in one line: the flag, file or field at fault, and what would be right."""


@contextmanager
def blame(source, *expected):
    """The expected errors in here are the fault of `source`: a flag, a file or what is in it.

    As model.blame, which raises a CheckpointError.
    """
    try:
        yield
    except expected as error:
        raise UserError(f"{source}: {error}") from error


def read_text(path):
    with blame(path, OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8-sig")


def read_if_there(path):
    """The object in a JSON file; {} if there is no such file. UserError names the file."""
    if not path.exists():
        return {}
    with blame(path, ValueError, TypeError):
        return dict(json.loads(read_text(path)))
