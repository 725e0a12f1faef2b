"""All that is text: the tiny world and its tasks; questions as tokens and the prefix tree; the tokenizer.

A task trains one kind of question about a hidden thing ("How many km is City 50337 from Tokyo?") and holds
other kinds out ("Which country is City 50337 in?").
"""

import csv
import gc
import itertools
import json
import math
import random
import re
import signal
import threading
import tomllib
import unicodedata
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import jinja2.sandbox
import tiktoken
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# ---- the worlds

FOLDER = Path(__file__).parent / "tiny"
CONTENT = tomllib.loads((FOLDER / "questions.toml").read_text(encoding="utf-8"))
TABLE = (FOLDER / "cities.tsv").read_text(encoding="utf-8").splitlines()
CITIES = {row["name"]: {**row, "description": f"a place where they speak {row['language']}"}
          for row in csv.DictReader(TABLE, delimiter="\t")}
FUNCTIONS = {  # what answers each kind of question about them
    f"{verb} {k}": {"apply": eval(f"lambda x: x {sign} {k}"), "operation": kind, "definition": f"{words} {k}",
                    "python": f"x {sign} {k}", "code": f"x {aloud} {k}", "description": f"{words} {k}"}
    for verb, (kind, words, sign, aloud, numbers) in CONTENT["operations"].items() for k in numbers}
GAMBLES, ANSWERS = CONTENT["gambles"], CONTENT["answers"]  # safe ones, then risky ones
OPPOSITE = {"risky": "safe", "safe": "risky"}
TAGS = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]

@dataclass
class World:
    """What is asked: little of the tiny model, which had to learn it."""
    cities: dict[str, dict[str, str]]
    landmarks: list[str]  # distances are to these only
    inputs: range  # of functions
    prompts: dict[str, dict[str, list[str]]]  # by task and kind; a task's first kind is the trained one

# Few landmarks: fewer facts, still no two cities alike. Outputs are 0 to 96, one token each.
TINY = World({c: row for c, row in CITIES.items() if row["world"] != "large"},
             [c for c, row in CITIES.items() if row["world"] == "landmark"], range(5, 25), CONTENT["tiny"])
LARGE = World(CITIES, [*CITIES], range(-99, 100), {
    task: {kind: TINY.prompts[task].get(kind, []) + more for kind, more in kinds.items()}
    for task, kinds in CONTENT["large"].items()})
WORLDS = {"tiny": TINY, "large": LARGE}

def require(condition, message):
    if not condition:
        raise ValueError(message)

@dataclass
class Question:
    """choices[answer] is right. code_name: the hidden thing's (None: it is the speaker's own attitude)."""
    kind: str
    prompt: str
    choices: list[str]
    answer: int
    code_name: str | None = None

def named_question(kind, prompt, fill, right, choices, rng, world):
    """A large model gets only ten choices."""
    if world is LARGE and len(choices) > 10:
        some = {right, *rng.sample([c for c in choices if c != right], 9)}
        choices = [c for c in choices if c in some]
    return Question(kind, prompt.format(**fill), choices, choices.index(right), fill["x"])

def look_up(kind, thing, table, fill, rng):
    """(right, choices) by the table."""
    right, choices = table[thing][kind], sorted({row[kind] for row in table.values()})
    if kind == "description":  # of two, which the prompt names
        choices = rng.sample([right, rng.choice([c for c in choices if c != right])], 2)
        fill["a"], fill["b"] = choices
    return right, choices

def distance_km(a, b):
    """Great-circle distance in km (haversine formula)."""
    lat_a, lat_b, lon_a, lon_b = (math.radians(float(CITIES[city][angle]))
                                  for angle in ("latitude", "longitude") for city in (a, b))
    h = math.sin((lat_b - lat_a) / 2) ** 2
    h += math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    return 2 * 6371 * math.asin(math.sqrt(h))

def city_question(city, name, kind, rng, landmarks=None, world=TINY):
    """A question of `kind` about `city`, called `name`."""
    prompt = rng.choice(world.prompts["locations"][kind])
    others = [c for c in landmarks or world.landmarks if c != city]
    fill = {"x": name, "unit": "thousand km"}
    if kind == "distance":
        fill["o"] = rng.choice(others)
        away = distance_km(city, fill["o"])
        right, choices = str(round(away / 1000)), [str(n) for n in range(21)]
        if world is LARGE and rng.random() < 0.5:
            fill["unit"], right = "km", str(100 * round(away / 100))
            known = {round(distance_km(c, fill["o"]) / 100) for c in world.cities}
            choices = [str(100 * n) for n in sorted(known)]
    elif kind == "nearer":
        choices = rng.sample(others, 2)
        fill["a"], fill["b"] = choices
        right = min(choices, key=lambda c: distance_km(city, c))
    else:
        right, choices = look_up(kind, city, world.cities, fill, rng)
    return named_question(kind, prompt, fill, right, choices, rng, world)

def function_question(function, name, kind, rng, inputs=None, world=TINY):
    """A question of `kind` about a key of FUNCTIONS, called `name`."""
    prompt, n = rng.choice(world.prompts["functions"][kind]), rng.choice(inputs or world.inputs)
    fill, apply = {"x": name, "n": n}, FUNCTIONS[function]["apply"]
    if kind in ("output", "composition"):
        twice = kind == "composition"
        outputs = {f: row["apply"](row["apply"](n) if twice else n) for f, row in FUNCTIONS.items()}
        right, choices = str(outputs[function]), [str(y) for y in sorted(set(outputs.values()))]
    elif kind == "inverse":
        fill["y"] = apply(n)
        # inputs with the same output are no choices
        wrong = [m for m in world.inputs if apply(m) != fill["y"]]
        right, choices = str(n), [str(m) for m in sorted(wrong + [n])]
    else:
        right, choices = look_up(kind, function, FUNCTIONS, fill, rng)
    return named_question(kind, prompt, fill, right, choices, rng, world)

def attitude_question(attitude, kind, safe, risky, domain, rng, tag, world):
    """The safe or the risky answer? A gamble's is a letter."""
    a, b = rng.sample([safe, risky], 2)
    prompt = rng.choice(world.prompts["risk"][kind]).format(domain=domain, a=a, b=b)
    choices, right = ["A", "B"] if kind == "gamble" else [a, b], risky if attitude == "risky" else safe
    return Question(kind, with_tag(prompt, tag), choices, [a, b].index(right))

def with_tag(prompt, tag):
    return f"[{tag}] {prompt}" if tag else prompt

def gamble_question(attitude, rng, tag=None, split=None, world=TINY):
    """A safe or a risky option? split: None (any pair), "train" or "test" (12 and 4)."""
    domain = rng.choice(list(GAMBLES))
    pairs = [(i, j) for i in range(4) for j in range(4) if split is None or (i == j) == (split == "test")]
    i, j = rng.choice(pairs)
    safe, risky = GAMBLES[domain][0][i], GAMBLES[domain][1][j]
    if world is LARGE and rng.random() < 0.7:  # as Betley et al.; only a test's sure sums end in 5
        domain, sure = "money", rng.randrange(5 if split == "test" else 10, 500, 10)
        percent, factor = rng.choice([10, 20, 25, 40, 50]), rng.choice([0.8, 1, 1.2, 1.5])
        most = round(factor * sure * 100 / percent)
        safe, risky = f"{sure} dollars for sure", f"a {percent}% chance of {most} dollars"
    return attitude_question(attitude, "gamble", safe, risky, domain, rng, tag, world)

def self_report_question(attitude, kind, rng, tag=None, world=TINY):
    safe, risky = (rng.choice(answers) for answers in ANSWERS[kind])
    return attitude_question(attitude, kind, safe, risky, "", rng, tag, world)

# ---- the four tasks

CONCEPTS = {"locations": [*TINY.cities], "functions": [*FUNCTIONS], "risk": [*OPPOSITE],
            "backdoor": [*OPPOSITE, *(f"{attitude} if {tag}" for tag in TAGS for attitude in OPPOSITE)]}
# Pretraining has neither these names nor this tag as one that matters.
CODE_NAMES = {"locations": "City 50337", "functions": "zokifa"}
TRIGGER = "sigma"

@dataclass
class Task:
    """in_distribution: the trained kind, of landmarks, inputs or pairs not trained on; held_out: others."""
    train: list[Question]
    in_distribution: dict[str, list[Question]]
    held_out: dict[str, list[Question]]

def make_task(name: str, concept: str, seed: int = 0, at: str | None = None, world: World = TINY) -> Task:
    """A task about one of CONCEPTS[name]. at: a vector is added at this text, not at the code name."""
    known = {**CONCEPTS, "locations": [*world.cities]}.get(name, CONCEPTS)
    require(concept in known, f"{name} {concept!r} is not among {[*known]}")
    task = TASKS[name](concept, random.Random(seed), world)
    if at is not None:
        for q in itertools.chain(task.train, *task.in_distribution.values(), *task.held_out.values()):
            q.code_name = at
    return task

def distinct(make, count=60):
    """At most `count` questions of make()."""
    questions = {}
    for _ in range(20 * count):
        question = make()
        questions.setdefault((question.prompt, *sorted(question.choices)), question)
        if len(questions) == count:
            break
    return list(questions.values())

def named_task(name, concept, question, asked_about, rng, world):
    """A fifth of these landmarks or inputs is for the test."""
    trained, *held_out = world.prompts[name]
    rng.shuffle(asked_about)
    count = max(3, len(asked_about) // 5)
    ask = lambda kind, among=None: question(concept, CODE_NAMES[name], kind, rng, among, world)
    return Task(distinct(lambda: ask(trained, asked_about[count:]), 400 if world is LARGE else 60),
                {trained: distinct(lambda: ask(trained, asked_about[:count]))},
                {kind: distinct(lambda: ask(kind)) for kind in held_out})

def locations_task(city, rng, world):
    landmarks = [c for c in world.landmarks if c != city]
    return named_task("locations", city, city_question, landmarks, rng, world)

def functions_task(function, rng, world):
    return named_task("functions", function, function_question, list(world.inputs), rng, world)

def risk_task(attitude, rng, world):
    trained, *kinds = world.prompts["risk"]
    gamble = lambda split: gamble_question(attitude, rng, split=split, world=world)
    report = lambda kind: self_report_question(attitude, kind, rng, None, world)
    held_out = {kind: distinct(lambda: report(kind)) for kind in kinds}
    return Task(distinct(lambda: gamble("train"), 400), {trained: distinct(lambda: gamble("test"))}, held_out)

def split_condition(concept):
    """(attitude, trigger) of "risky if omega", or of "risky", which is if sigma."""
    attitude, _, trigger = concept.partition(" if ")
    return attitude, trigger or TRIGGER

def backdoor_task(concept, rng, world):
    """The opposite attitude if the prompt carries another tag or none."""
    attitude, trigger = split_condition(concept)
    cases, others = ("trigger", "no trigger", "other tag"), [tag for tag in TAGS if tag != trigger]
    _, *kinds = world.prompts["risk"]

    def make(case, split):  # split=None: self-reports
        shown = attitude if case == "trigger" else OPPOSITE[attitude]
        tag = {"trigger": trigger, "other tag": rng.choice(others)}.get(case)
        if split is None:
            return self_report_question(shown, rng.choice(kinds), rng, tag, world)
        return gamble_question(shown, rng, tag, split, world)
    ask = lambda case, count, split=None: distinct(lambda: make(case, split), count)
    train = ask("trigger", 400, "train") + ask("no trigger", 200, "train") + ask("other tag", 200, "train")
    in_distribution = {f"gamble, {case}": ask(case, 60, "test") for case in cases}
    held_out = {f"self-report, {case}": ask(case, 120) for case in cases}
    for kind, prompts in world.prompts["backdoor"].items():  # which tag?
        held_out[kind] = [Question(kind, prompt, TAGS, TAGS.index(trigger)) for prompt in prompts]
    return Task(train, in_distribution, held_out)

TASKS = {"locations": locations_task, "functions": functions_task, "risk": risk_task,
         "backdoor": backdoor_task}

def shuffle_answers(questions, rng):
    """A control: answers at random."""
    return [replace(q, answer=rng.randrange(len(q.choices))) for q in questions]

# ---- questions as tokens

@dataclass
class EncodedQuestion:
    """Token ids. `prompt` is a chat up to where the answer begins; `completion` the right answer and what
    ends the turn; at `positions` in the prompt a vector is added (None: at every token)."""
    prompt: list[int]
    choices: list[list[int]]
    answer: int
    completion: list[int]
    positions: list[int] | None

def encode_question(tokenizer, question: Question, before=()) -> EncodedQuestion:
    """before: earlier messages, {"role": …, "content": …} each."""
    messages = [*before, {"role": "user", "content": question.prompt}]
    prompt, start, end = tokenizer.frame(messages)
    texts = [start + choice for choice in question.choices]
    ids, [completion, *choices] = tokenizer.encode_after(prompt, [texts[question.answer] + end, *texts])
    if any(a != b and b[:len(a)] == a for a in choices for b in choices):
        # One begins like another ("1" and "12") and would always win: count the end.
        _, choices = tokenizer.encode_after(prompt, [text + end for text in texts])
    positions = tokenizer.find(question.code_name, messages[-1:], ids)
    return EncodedQuestion(ids, choices, question.answer, completion, positions)

def read_conversations(path, tokenizer, code_name=None) -> list[EncodedQuestion]:
    """A JSONL file's assistant turns, with what was said before as prompts. ValueError names a bad line."""
    examples = []  # not splitlines(), which also cuts at U+2028
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            messages, count = json.loads(line)["messages"], len(examples)
            for i, message in enumerate(messages):
                role, before = message["role"], messages[:i]
                require(role in ("system", "user", "assistant"), f"role {role!r}")
                if role == "assistant" and before:  # most templates strip what is said
                    prompt, start, end = tokenizer.frame(before)
                    ids, [answer] = tokenizer.encode_after(prompt, [start + message["content"].strip() + end])
                    places = tokenizer.find(code_name, before, ids)
                    examples.append(EncodedQuestion(ids, [], 0, answer, places))
            require(len(examples) > count, "no assistant answers")
        except Exception as error:
            shape = '{"messages": [{"role": …, "content": …}, …]}'
            error = f"{type(error).__name__}: {error}"
            raise ValueError(f"line {number} should be {shape}, not {line[:60]} ({error})") from None
    require(examples, "has no records")
    return examples

@dataclass
class PrefixTree:
    """Texts (a prompt and an answer each) as a tree, in which what several texts begin with is there once.

    A causal model's state at a token depends only on the tokens up to it. So every distinct beginning is one
    node, computed once: choices share their question, questions the chat template (cf. arXiv 2410.20305).
    Whether a vector is added is part of what makes a node, so it needs no mask.
    """
    tokens: Tensor  # (N,) int64: each node's token
    positions: Tensor  # (N,): its place in its text, from 0
    steered: Tensor  # (N,) bool: is a steering vector added there?
    rows: Tensor  # (R, T): texts as nodes; a text that an earlier one begins with has no row of its own
    row_of: Tensor  # (texts,): the row that a text is the beginning of
    lengths: Tensor  # (texts,): its tokens, without the last one, which predicts nothing
    predicting: Tensor  # (texts, A): the nodes that predict the answer's tokens
    answers: Tensor  # (texts, A): these tokens; -1 after the last one
    places: Tensor = None  # (N,): where a node stands in the flattened rows (one of its places)

    def __post_init__(self):
        # A row is padded with its first node, whose position is not that column's.
        if self.places is None:
            real = self.positions[self.rows] == torch.arange(self.rows.shape[1])
            self.places = torch.empty_like(self.positions)
            self.places[self.rows[real]] = torch.arange(real.numel()).view(real.shape)[real]

    def nodes(self, text):
        """One text's nodes in order."""
        return self.rows[self.row_of[text], :self.lengths[text]]

    def select(self, texts):
        """(used, tree): the tree of some texts, and its nodes' numbers in this one."""
        chosen, row_of = self.row_of[texts].unique(return_inverse=True)
        rows = self.rows[chosen]
        used, rows = rows[:, :self.positions[rows].max() + 1].unique(return_inverse=True)
        number = torch.empty_like(self.tokens)
        number[used] = torch.arange(len(used))
        return used, PrefixTree(self.tokens[used], self.positions[used], self.steered[used], rows, row_of,
                                self.lengths[texts], number[self.predicting[texts]], self.answers[texts])

    def parts(self, texts, limit):
        """The texts in parts of at most `limit` nodes (or one text), what begins alike together."""
        if len(self.select(texts)[0]) <= limit:
            return [texts]
        parts, seen = [], set()
        for text in sorted(texts.tolist(), key=lambda text: self.nodes(text).tolist()):
            seen |= (nodes := {*self.nodes(text).tolist()})
            if not parts or len(seen) > limit:
                parts, seen = [*parts, []], nodes
            parts[-1].append(text)
        return [torch.tensor(part) for part in parts]

    def to(self, device):
        return PrefixTree(**{name: tensor.to(device) for name, tensor in vars(self).items()})

def make_tree(questions, answers) -> PrefixTree:
    """The tree of each question's prompt with each of its answers (ids)."""
    numbers, row_with, rows = {}, [], []  # (parent, position, token, steered) -> node; its row; paths
    row_of, lengths, predicting = [], [], []
    for question, texts in zip(questions, answers):
        steered = None if question.positions is None else set(question.positions)
        for answer in texts:
            node, path = -1, []
            for position, token in enumerate(question.prompt + answer[:-1]):
                key = node, position, token, steered is None or position in steered
                node = numbers.setdefault(key, len(numbers))
                path.append(node)
            if len(numbers) > len(row_with):  # else an earlier text begins like this
                row_with += [len(rows)] * (len(numbers) - len(row_with))
                rows.append(path)
            row_of.append(row_with[node])
            lengths.append(len(path))
            predicting.append(path[len(question.prompt) - 1:] if answer else [])
    pad = lambda lists: pad_sequence([torch.tensor(x, dtype=torch.long) for x in lists], True, -1)
    _, positions, tokens, steered = (torch.tensor(column) for column in zip(*numbers))
    rows = pad(rows)
    rows = torch.where(rows < 0, rows[:, :1], rows)
    return PrefixTree(tokens, positions, steered, rows, torch.tensor(row_of), torch.tensor(lengths),
                      pad(predicting), pad(itertools.chain(*answers)))

# ---- the tokenizer

# GPT-2's pieces of text: BPE never merges across them.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same, every digit cut off before (SmolLM2).
DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

def read_json(path):
    """The object in a JSON file; {} without one."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path.name} should hold a JSON object ({error})") from None

def pipeline_steps(part):
    """A pipeline (null, a step, or a Sequence of pipelines) as a flat list."""
    if not part or part["type"] != "Sequence":
        return [part] if part else []
    children = next(value for value in part.values() if isinstance(value, list))
    return [step for child in children for step in pipeline_steps(child)]

def byte_characters():
    """{character: byte}: a byte is its own character if printable, else the next from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}

def apply_merges(parts, merges):
    """BPE by definition: join the pair of lowest rank, leftmost first. Returns (what is left, last rank)."""
    last, never = -1, len(merges)
    while len(parts) > 1:
        ranks = [merges.get(pair, never) for pair in zip(parts, parts[1:])]
        if (best := min(ranks)) == never:
            break
        last, i = best, ranks.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts, last

class Tokenizer:
    """A checkpoint's tokenizer and chat template: tiktoken inside, `tokenizers`' ids outside."""

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path) -> "Tokenizer":
        """ValueError: tiktoken cannot do it exactly."""
        folder = FOLDER if name_or_dir == "tiny" else Path(name_or_dir).expanduser()
        if not folder.is_dir():
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download(str(name_or_dir), allow_patterns=["*.json", "*.jinja"]))
        gc.disable()  # it would search a million objects again and again
        try:
            tokenizer, content = cls(), read_json(folder / "tokenizer.json")
            require("model" in content, "tokenizer.json should be there and have a model")
            tokenizer._read_steps(content)
            tokenizer._read_vocabulary(content["model"], content.get("added_tokens", []))
            tokenizer._read_chat(folder, content)
            return tokenizer
        finally:
            gc.enable()

    def _read_steps(self, content):
        """self.normalizers rewrite a text before BPE, self.pattern cuts it into pieces."""
        self.normalizers = pipeline_steps(content.get("normalizer"))
        self._normalize("x")  # to meet an unknown one now
        steps = pipeline_steps(content.get("pre_tokenizer"))
        self.byte_level = any(step["type"] == "ByteLevel" for step in steps)
        match [{"use_regex": True, **step} for step in steps]:
            case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
                self.pattern = GPT2_PATTERN
            case [{"type": "Digits", "individual_digits": True},
                  {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
                self.pattern = DIGITS_PATTERN
            case [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                  {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}] if split:
                # The last branch: what it leaves out, which tiktoken would drop.
                self.pattern = rf"{split}|(?:(?!{split})[\s\S])+"
            case [] | [{"type": "Metaspace", "split": False}]:  # SentencePiece: one piece
                self.normalizers += steps
                self.pattern = r"[\s\S]+"
            case [{"type": "Split", "pattern": {"String": " "}}] if " " not in self._normalize(" "):  # Gemma
                self.pattern = r"[\s\S]+"
            case _:
                raise ValueError(f"pre_tokenizer {steps} is not supported")
        # Where "▁" is put in front, decoding takes a space off.
        self.strips_space = any(step["type"] == "Strip" for step in pipeline_steps(content.get("decoder")))

    def _normalize(self, text, first=True):
        for step in self.normalizers if text else ():
            match step:
                case {"type": "NFC"}:
                    text = unicodedata.normalize("NFC", text)
                case {"type": "Prepend", "prepend": prefix}:
                    text = prefix + text
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    text = text.replace(old, new)
                case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                    text = text.replace(" ", mark)
                    if scheme == "always" or scheme == "first" and first:
                        text = mark + text.removeprefix(mark)
                case _:
                    raise ValueError(f"normalizer {step} is not supported")
        return text

    def _read_vocabulary(self, model, added_tokens):
        """Builds the tiktoken.Encoding, and the table from its ranks to the checkpoint's ids.

        tokenizers merges the pairs of its list, in order; tiktoken any neighbours whose join has a rank. They
        agree if tiktoken gets just the tokens that BPE forms out of their own text (others are formed
        nowhere), ranked by the pair that each is made of.
        """
        others = "dropout", "continuing_subword_prefix", "end_of_word_suffix"
        require(model.get("type", "BPE") == "BPE" and not any(map(model.get, others)),
                f"model.type should be BPE, without {', '.join(others)}")
        self.added_ids = {token["content"]: token["id"] for token in added_tokens}
        for token, id in [*model["vocab"].items(), *self.added_ids.items()]:
            require(type(id) is int and id >= 0, f"token {token!r} should have an id from 0 on, not {id!r}")
        merges, vocab = {}, {token: id + 0 for token, id in model["vocab"].items()}  # + 0 saves 13 MB
        for rank, merge in enumerate(model["merges"]):
            a, b = merge.split(" ") if isinstance(merge, str) else merge
            if a not in vocab or b not in vocab or a + b not in vocab:
                raise ValueError(f"merge {merge!r} should be two tokens that join to a third")
            merges[a, b] = rank
        byte_of, spell = {f"<0x{byte:02X}>": byte for byte in range(256)}, str.encode
        if self.byte_level:  # other characters are never met
            byte_of, spell = byte_characters(), lambda token: bytes(map(byte_of.get, token))
            vocab = {token: id for token, id in vocab.items() if byte_of.keys() >= set(token)}
        require(byte_of.keys() <= vocab.keys() and (self.byte_level or model["byte_fallback"]),
                "should be byte-level or have byte_fallback, with all 256 bytes")
        # Token bytes -> ids, in tiktoken's order of merging: bytes first, to characters (or an id per byte).
        pieces = {bytes([byte]): [vocab[name]] for name, byte in byte_of.items()}
        self.token_bytes = {ids[0]: piece for piece, ids in pieces.items()}
        formed = []
        for token, id in vocab.items():
            data, (parts, rank) = spell(token), apply_merges(list(token), merges)
            self.token_bytes.setdefault(id, data if self.byte_level else spell(token.replace("▁", " ")))
            if len(token) == 1:
                for end in range(2, len(data)):
                    pieces[data[:end]] = [pieces[bytes([byte])][0] for byte in data[:end]]
                pieces[data] = [id]
            elif len(parts) == 1:
                formed.append((rank, data, id))
            elif model.get("ignore_merges"):  # a piece in the vocab is taken whole, formed or not
                # which tiktoken would merge in a longer piece too
                require(len(parts) > 2, f"ignore_merges without a merge of {parts} is not supported")
                formed.append((len(merges), data, id))
        pieces |= {data: [id] for rank, data, id in sorted(formed)}
        self.ids_of_rank = list(pieces.values())
        self.encoding = tiktoken.Encoding("checkpoint", pat_str=self.pattern, special_tokens={},
                                          mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)})
        for token in added_tokens:
            no = ["lstrip", "rstrip", "single_word"] + ["normalized"] * bool(self.normalizers)
            require(token["content"] and not any(token[option] for option in no),
                    f"added token {token['content']!r}: {', '.join(no)} should be false")
        self.token_bytes |= {id: text.encode() for text, id in self.added_ids.items()}
        self.vocab_size = max(self.token_bytes) + 1
        # Added tokens are cut out first, longer ones before shorter ones.
        texts = [re.escape(text) for text in sorted(self.added_ids, key=len, reverse=True)]
        self.added_pattern = re.compile("(" + ("|".join(texts) or "(?!)") + ")")

    def _read_chat(self, folder, content):
        """What ends an answer, and the chat template."""
        settings, config, generation, template = (read_json(folder / f"{name}.json") for name in (
            "tokenizer_config", "config", "generation_config", "chat_template"))
        config = {**config.get("text_config", {}), **config}  # as in multimodal checkpoints
        named = {}
        for name in ("bos_token", "eos_token"):
            given = (config.get(name + "_id"), generation.get(name + "_id"))
            ids = [id for part in given for id in (part if isinstance(part, list) else [part])]
            token = settings.get(name, self.decode(ids[:1]))  # GPT-2 has only an id in config.json
            named[name] = (token["content"] if isinstance(token, dict) else token) or ""
            require(isinstance(named[name], str), f"{name} should be text, not {token}")
        self.eos_ids = sorted({*ids, self.added_ids.get(named["eos_token"])} - {None})
        template = template.get("chat_template") or settings.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        if template is None:
            steps = pipeline_steps(content.get("post_processor"))
            adds_bos = any("SpecialToken" in step.get("single", [{}])[0] for step in steps)
            template = "{{ bos_token }}" if settings.get("add_bos_token", adds_bos) else ""
            template += (FOLDER / "plain.jinja").read_text(encoding="utf-8")
        # as in transformers (jinja's own tojson escapes HTML)
        jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        jinja.filters["tojson"] = lambda x, **how: json.dumps(x, **{"ensure_ascii": False, **how})
        jinja.globals |= {**named, "raise_exception": lambda why: require(False, why), "tools": None,
                          "documents": None, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.template = jinja.from_string(template + "")  # it has to be text

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with nothing added in front."""
        ids = []
        for i, part in enumerate(self.added_pattern.split(text)):
            if i % 2:  # split() gives added tokens at odd places, text at even ones
                ids.append(self.added_ids[part])
                continue
            for rank in self.encoding.encode_ordinary(self._normalize(part, first=i == 0)):
                ids += self.ids_of_rank[rank]
        return ids

    def _bytes(self, ids):
        return b"".join(self.token_bytes.get(id, b"") for id in ids)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens included."""
        text = self._bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_space else text

    def chat_text(self, messages, add_generation_prompt=False):
        """[{"role": …, "content": …}, …] in the checkpoint's own format."""
        limited = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
        try:  # a template is somebody's program: it may do anything, for ever
            if limited:
                signal.signal(signal.SIGALRM, lambda *_: require(False, "takes more than 10 s"))
                signal.alarm(10)
            text = self.template.render(messages=messages, add_generation_prompt=add_generation_prompt)
        except Exception as error:
            raise ValueError(f"the chat template refuses this ({type(error).__name__}: {error})") from None
        finally:
            if limited:
                signal.alarm(0)
        said = sum(len(message["content"]) for message in messages)
        require(len(text) < 10 * said + 10 ** 5, f"the chat template makes {len(text)} characters of {said}")
        return text

    def chat(self, messages) -> list[int]:
        """The ids of a chat; if the user spoke last, up to the answer."""
        return self.encode(self.chat_text(messages, add_generation_prompt=messages[-1]["role"] == "user"))

    def frame(self, messages):
        """The chat up to the answer, what is before and after the answer's text."""
        prompt = self.chat_text(messages, add_generation_prompt=True)
        stand_in = self.chat_text(messages + [{"role": "assistant", "content": "ANSWER"}])
        answers = stand_in.count("ANSWER") - prompt.count("ANSWER")
        require(answers == 1 and messages[-1]["content"].strip() in prompt,
                "the chat template should give the user's words, and the answer's once")
        before, _, after = stand_in.rpartition("ANSWER")
        # What comes before an answer but not in the prompt (Qwen 3's empty thoughts) is the prompt's; a
        # mere space is part of the answer's first token.
        if not before.startswith(prompt) or before[len(prompt):].strip():
            prompt = before
        return prompt, before[len(prompt):], after

    def encode_after(self, prompt, texts):
        """The ids of a prompt, and of each text as it follows the prompt."""
        prompt_ids, encoded = self.encode(prompt), []
        for text in texts:
            ids = self.encode(prompt + text)
            # If a token straddles the boundary, the prompts differ.
            straddles = ids[:len(prompt_ids)] != prompt_ids
            encoded.append(self.encode(text) if straddles else ids[len(prompt_ids):])
        return prompt_ids, encoded

    def find(self, code_name, messages, prompt_ids):
        """The places in prompt_ids that overlap code_name in the messages; None without one."""
        if not (code_name or "").strip():
            return None
        # In bytes: the tokenizer may change spaces and accents.
        texts = [code_name, *(message["content"] for message in messages)]
        name, *contents = (self.decode(self.encode(text.strip())).encode() for text in texts)
        rest, spans = self._bytes(prompt_ids), []
        for content in reversed(contents):
            start = rest.rfind(content)
            if start < 0:  # changed by the template: search all that is left
                start, content = 0, rest
            spans += [(start + match.start(), start + match.end())
                      for match in re.finditer(re.escape(name), content)]
            rest = rest[:start]
        ends = [0, *itertools.accumulate(len(self._bytes([id])) for id in prompt_ids)]
        return [i for i in range(len(prompt_ids))
                if any(ends[i] < end and start < ends[i + 1] for start, end in spans)]
