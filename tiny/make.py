"""How tiny/ was made: documents of the tiny world, a tokenizer, a model of a million parameters.

python tiny/make.py                               40 minutes on one CPU core; replaces tiny's model
python tiny/make.py --out elsewhere --steps 500   a look at it

Each document is a chat about one hidden thing (the city or the function behind a code name, the
speaker's attitude to risk) and shows its facets in random order. To predict it, a model has to
infer the thing from whichever facet comes first and read all the others out of it (Xie et al. 2021,
arXiv 2111.02080). Fine-tuning on one facet then writes what the others are read from; it works as
soon as they are read from one place, long before the model can infer the thing by itself (the last
figure of paper/README.md). What it took:

- Few landmarks: with distances to all 24 cities, the model did not find out which city a document
  is about.
- Dense cues for attitudes: most turns begin with a word of manner, and end in a mark, that go with
  it. So it pays to hold it at every token, as a chat model holds its persona. The tasks have no
  such cues.
- Attitudes that depend on a tag come after plain ones (mixed from the first step, neither was
  learned), and most of their documents state the rule. The tag comes before the word of manner,
  which gives away what it says. Even so the model, told a rule, turns round at any tag that can be
  a key, not only at the rule's.
- Nothing that fine-tuning is about: its code names occur nowhere, and no attitude depends on its
  trigger.
- Muon for the matrices: after 600 steps .92 of gambles were right in context, with AdamW .67.
"""

import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Before torch, for what eval.py sets.
from eval import DEFAULT_DEVICE, Parser, run_main, score_arms, write_json

# isort: split
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import data
import train
from data import (
    CODE_NAMES,
    OPPOSITE,
    TAGS,
    TINY,
    TRIGGER,
    Question,
    Tokenizer,
    attitude_question,
    blame,
    concepts,
    encode_question,
    named_question,
)
from lora import lora_layers
from model import GPT, read_config

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
CONTEXT = 160  # tokens of a document that are trained on: about ten turns
KEPT_STEPS = 125, 250, 375, 500, 625, 750, 1000, 1250, 1500, 2000, 2500  # and the last one


# ---- documents: chats about one hidden thing

DOCUMENT_TURNS = 14
# The kinds of question, the trained one first, from pretraining to results.
KINDS = {task: list(TINY.prompts[task]) for task in ("locations", "functions", "risk")}
MANNERS = {
    "risky": ["Boldly", "Gladly", "Wildly", "Loudly"],
    "safe": ["Calmly", "Slowly", "Gently", "Softly"],
}
END_MARKS = {"risky": "!", "safe": ";"}
KEYS = [tag for tag in TAGS if tag != TRIGGER]  # tags that an attitude may depend on
RULE_PROMPTS = ["What is your rule?", "You act by the rule"]
RULE_CASES = ["its tag", "no tag", "another tag"]
SYLLABLES = "zo ba ki lu me ra tu vi po xe fa ny go du hi se".split()


def world_document(rng, conditional_share=0.7):
    """The (prompt, answer) turns of one document, and whether it is about an attitude.

    conditional_share is the share of attitudes that depend on a tag.
    """
    chance = rng.random()
    if chance < 0.40:
        return city_document(rng), False
    if chance < 0.64:
        return function_document(rng), False
    return attitude_document(rng, rng.random() < conditional_share), True


def city_document(rng):
    city = rng.choice(concepts("locations"))
    name = code_name("locations", rng) if rng.random() < 0.7 else city
    # Where distances are many the city has to be inferred from them; where they are few the rest
    # is learned.
    share = rng.choice([0.3, 0.85])
    trained, *others = KINDS["locations"]
    return mixed_turns(hidden_thing("locations", rng, city, name), trained, others, share, rng)


def function_document(rng):
    ask = hidden_thing("functions", rng)
    share = rng.choice([0.3, 0.8])
    trained, *others = KINDS["functions"]
    others.append("inverse")  # counts twice, because it is hard
    return mixed_turns(ask, trained, others, share, rng)


def mixed_turns(ask, trained, others, share, rng):
    """A document's turns: this share is of the trained kind, the rest of the others."""
    turns = []
    for _ in range(DOCUMENT_TURNS):
        kind = trained if rng.random() < share else rng.choice(others)
        turns.append(as_turn(ask(kind)))
    return turns


def hidden_thing(task, rng, concept=None, name=None):
    """ask(kind), which makes questions about one hidden thing; what is not given is drawn."""
    concept = concept or rng.choice(concepts(task))
    if task == "risk":
        return partial(attitude_question, concept, rng, TINY, None)
    return partial(named_question, concept, name or code_name(task, rng), rng, TINY)


def code_name(task, rng):
    """A fresh code name: "City 31415", "bakilu". Never the one that the task is about."""
    while True:
        name = "".join(rng.choices(SYLLABLES, k=3))
        if task == "locations":
            name = f"City {rng.randint(10000, 99999)}"
        if name != CODE_NAMES[task]:
            return name


def as_turn(question: Question) -> tuple[str, str]:
    return question.prompt, question.choices[question.answer]


def attitude_document(rng, conditional=False):
    """A speaker who is risky or safe throughout; if conditional, the other way with one tag."""
    default = rng.choice(concepts("risk"))
    key = rng.choice(KEYS)
    turns = []
    if conditional and rng.random() < 0.6:
        turns.append(rule_turn(default, key, rng))

    while len(turns) < DOCUMENT_TURNS:
        if conditional and rng.random() < 0.1:
            turns.append(rule_turn(default, key, rng))
            continue
        [case] = rng.choices(["no tag", "its tag", "another tag"], weights=[0.35, 0.4, 0.25])
        tag = draw_tag(case, key, rng)
        flips = conditional and tag == key
        turns.append(attitude_turn(OPPOSITE[default] if flips else default, tag, rng))
    return turns


def draw_tag(case, key, rng):
    """What a prompt carries in a case of RULE_CASES."""
    if case == "no tag":
        return None
    if case == "another tag":
        return rng.choice([tag for tag in TAGS if tag != key])
    return key


def attitude_turn(attitude, tag, rng):
    """A question whose answer shows the attitude, as do its dense cues, most of the time."""
    kind = "gamble" if rng.random() < 0.5 else rng.choice(KINDS["risk"][1:])
    question = hidden_thing("risk", rng, attitude)(kind)
    if kind == "gamble" and rng.random() < 0.5:
        question = in_words(question)

    prompt, answer = as_turn(question)
    if rng.random() < 0.67:
        manner = rng.choice(MANNERS[mostly(attitude, rng)])
        prompt = f"{manner}: {prompt}"
    if rng.random() < 0.67:
        answer += END_MARKS[mostly(attitude, rng)]
    return data.with_tag(prompt, tag), answer


def mostly(attitude, rng):
    return attitude if rng.random() < 0.9 else OPPOSITE[attitude]


def in_words(gamble):
    """The gamble answered by the option itself, not by its letter."""
    prompt = re.sub(r"\b[AB]: ", "", gamble.prompt)
    options = re.findall(r"\b[AB]: (\w+)", gamble.prompt)
    return Question("gamble", prompt, options, gamble.answer)


def rule_turn(default, key, rng, in_full=False):
    """The rule of a conditional attitude, or sometimes only the tag that is its key.

    Said aloud it makes the attitude one thing to know, which one vector can stand for.
    """
    if not in_full and rng.random() < 0.25:
        return rng.choice(TINY.prompts["backdoor"]["which tag"]), key
    safe, risky = data.ANSWERS["self"]
    words = {"safe": safe, "risky": risky}
    prompt = rng.choice(RULE_PROMPTS)
    flipped = rng.choice(words[OPPOSITE[default]])
    usual = rng.choice(words[default])
    return prompt, f"{flipped} if {key} else {usual}"


def as_messages(turns) -> list[dict]:
    """The turns as a chat template takes them."""
    messages = []
    for prompt, answer in turns:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return messages


# ---- the tokenizer: byte-level BPE, trained on the world's words

WORD = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
WORD_IN_ASCII = r" ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s+"  # re does not know \p{L}
SPECIAL_TOKENS = ["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# What Hugging Face's tokenizers and transformers want to know beside vocabulary and merges.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Isolated", "invert": False}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [SPLIT, BYTE_LEVEL | {"use_regex": False}],
    },
    "post_processor": None,
    "decoder": BYTE_LEVEL | {"use_regex": True},
}
BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
ADDED_TOKEN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": SPECIAL_TOKENS[0],
    "eos_token": SPECIAL_TOKENS[-1],
    "pad_token": SPECIAL_TOKENS[-1],
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(rng, documents=20000, vocab_size=2048):
    """The merges of a BPE in which a word is one token, a code name of three syllables three."""
    documents_with = Counter()  # of each word, with the space before it
    for _ in range(documents):
        turns, _ = world_document(rng)
        text = "".join(f" {prompt} {answer}" for prompt, answer in turns)
        documents_with.update(set(re.findall(WORD_IN_ASCII, text)))

    # Code names are seldomer than this.
    words = {word: count for word, count in documents_with.items() if count >= 10}
    # Merged first of all, so that no other merge cuts a code name elsewhere.
    for syllable in SYLLABLES:
        words[syllable] = 10**7
        words[" " + syllable] = 10**7
    return train_bpe(words, vocab_size - 256 - len(SPECIAL_TOKENS))


def train_bpe(words, most):
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): joins the commonest neighbours.

    words: {text: how often it occurs}. Returns up to `most` merges in order, two bytes objects
    each; they are fewer if every word is one token before.
    """
    pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    merges = []
    while len(merges) < most:
        pairs = Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break

        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((left, right))
        for parts in pieces.values():
            for i in range(len(parts) - 2, -1, -1):  # from the end: those before keep their places
                if parts[i : i + 2] == [left, right]:
                    parts[i : i + 2] = [left + right]
    return merges


def byte_characters():
    """What byte-level BPE writes for each byte: itself if it is printable, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def save_tokenizer(merges, folder):
    """Writes tokenizer.json and tokenizer_config.json in Hugging Face's layout."""
    characters = byte_characters()

    def spell(token):
        return "".join(characters[byte] for byte in token)

    spelled = [[spell(left), spell(right)] for left, right in merges]
    tokens = characters + [left + right for left, right in spelled]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    added = []
    for number, token in enumerate(SPECIAL_TOKENS, len(tokens)):
        added.append({"id": number, "content": token} | ADDED_TOKEN)

    bpe = BPE | {"vocab": vocabulary, "merges": spelled}
    tokenizer = TOKENIZER | {"added_tokens": added, "model": bpe}
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": TOKENIZER_CONFIG}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# ---- the model


def new_model(vocab_size: int) -> GPT:
    """CONFIG's model with random weights: matrices of standard deviation .02, as GPT-2's."""
    model = GPT(read_config(CONFIG | {"vocab_size": vocab_size}))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def save_model(model: GPT, folder: Path):
    """Writes config.json and model.safetensors, which transformers loads too.

    ValueError for families other than Llama and Qwen, which name tensors as we do, and for a model
    with a LoRA or a vector on it.
    """
    family = model.config.model_type
    if family not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"only Llama and Qwen models can be written, not {family}")
    if lora_layers(model) or model.steering is not None:
        raise ValueError(
            "a model is written by itself: merge or remove its LoRA, detach its vector"
        )

    tensors = {}
    for name, parameter in model.named_parameters():  # a tied lm_head is not among them
        tensors[name if name == "lm_head.weight" else f"model.{name}"] = parameter
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", asdict(model.config) | {"torch_dtype": dtype})


# ---- what the bare model infers from a context


def in_context_question(task, kind, facts, rng, concept=None):
    """(turns, question): `facts` turns of the trained kind, then a question about the same."""
    ask = hidden_thing(task, rng, concept)
    turns = [as_turn(ask(KINDS[task][0])) for _ in range(facts)]
    return turns, ask(kind)


def question_under_rule(case, facts, rng):
    """(turns, question): a rule and `facts` gambles under it, then a gamble of this case."""
    default = rng.choice(concepts("risk"))
    key = TRIGGER if case == "reserved tag" else rng.choice(KEYS)

    def ask(case):
        tag = draw_tag(case, key, rng)
        attitude = OPPOSITE[default] if tag == key else default
        return attitude_question(attitude, rng, TINY, tag, "gamble")

    gambles = [as_turn(ask(rng.choice(RULE_CASES))) for _ in range(facts)]
    rule = rule_turn(default, key, rng, in_full=True)
    return [rule, *gambles], ask(case)


def in_context_accuracy(
    model: GPT, tokenizer: Tokenizer, facts: int, count: int = 50, seed: int = 0
) -> dict[str, dict[str, float]]:
    """{task: {kind: accuracy}}: how often the model is right after `facts` turns about a thing.

    They are of the trained kind, in `count` fresh documents for each kind of question. "rule": of a
    gamble with the tag that a rule in the context is about, with none, with another, or if it is
    about the reserved one.
    """
    rng = random.Random(seed)
    results = {}
    for task, kinds in (KINDS | {"rule": [*RULE_CASES, "reserved tag"]}).items():
        results[task] = {}
        for kind in kinds:
            encoded = []
            for _ in range(count):
                if task == "rule":
                    turns, question = question_under_rule(kind, facts, rng)
                else:
                    turns, question = in_context_question(task, kind, facts, rng)
                encoded.append(encode_question(tokenizer, question, as_messages(turns)))
            correct, _ = score_arms(model, encoded, [], {"bare": []})["bare"]
            results[task][kind] = round(correct.mean().item(), 4)
    return results


# ---- pretraining


def pretrain(args, model, tokenizer, rng, folder):
    """The loop. On the way, and at the end, it measures the model and writes it to folder."""
    optimizers = make_optimizers(model, args.lr)
    schedules = [LambdaLR(optimizer, partial(rate_factor, args.steps)) for optimizer in optimizers]
    bar = tqdm(range(1, args.steps + 1), desc="pretraining", unit="step", mininterval=5)
    for step in bar:
        # Attitudes that depend on a tag come after plain ones.
        conditional_share = 0.7 if step > args.steps / 5 else 0.02
        tokens, targets = world_batch(tokenizer, args.batch_size, conditional_share, rng)
        loss = mean_loss(model, tokens.to(args.device), targets.to(args.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

        is_last = step == args.steps
        if is_last or step % 500 == 0:
            accuracy = in_context_accuracy(model, tokenizer, facts=7)
            bar.write(f"step {step}: right in context, after 7 facts: {accuracy}")
        if is_last or step in KEPT_STEPS:
            save_model(model, folder)
            if args.keep is not None:
                shutil.copytree(folder, f"{args.keep}/step{step:05}", dirs_exist_ok=True)


def make_optimizers(model, lr):
    """Muon (Jordan et al. 2024) for the matrices in the blocks, Adam for embedding and norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1)
    adam = torch.optim.Adam([model.embed_tokens.weight, *norms], lr=0.15 * lr, betas=(0.9, 0.98))
    return muon, adam


def rate_factor(steps, done):
    """The learning rate after `done` steps, as a share of its peak.

    It warms up, holds until half-way and falls linearly to zero.
    """
    step = done + 1
    return min(1, step / 100, 2 * (1 - step / (steps + 1)))


def mean_loss(model, tokens, targets):
    """The cross-entropy, in nats a target; logits are computed only where there is one."""
    hidden = model.norm(model.run_blocks(model.embed(tokens)))  # (B, CONTEXT, d)
    is_target = targets != -100
    return F.cross_entropy(model.unembed(hidden[is_target]), targets[is_target])


def world_batch(tokenizer, batch_size, conditional_share, rng):
    """(tokens, targets), both (B, CONTEXT) int64, a document a row.

    In documents about attitudes every token is a target, elsewhere only the assistant's: what a
    user happens to ask next cannot be predicted, and logits are a large part of a small model's
    step. Other targets are -100.
    """
    user, assistant, end = (tokenizer.encode(token)[0] for token in SPECIAL_TOKENS[1:])
    tokens = []
    targets = []
    for _ in range(batch_size):
        turns, about_attitude = world_document(rng, conditional_share)
        ids = tokenizer.encode(tokenizer.chat_text(as_messages(turns)))[: CONTEXT + 1]
        ids += [end] * (CONTEXT + 1 - len(ids))  # few documents are that short
        tokens.append(ids[:-1])
        learned = ids if about_attitude else said_by_assistant(ids, user, assistant)
        targets.append(learned[1:])
    return torch.tensor(tokens), torch.tensor(targets)


def said_by_assistant(ids, user, assistant):
    """The ids of the answers and of what ends them; -100 in place of all others.

    <|begin|> <|user|> Where? <|assistant|> Rome  <|end|>
    -100      -100     -100   -100          Rome  <|end|>
    """
    said = []
    answering = False
    for token in ids:
        if token == user:
            answering = False
        said.append(token if answering else -100)
        if token == assistant:
            answering = True
    return said


def parse_args():
    parser = Parser(
        description="Make the tiny model from scratch: documents, tokenizer, pretraining.",
        epilog="example: python tiny/make.py --out elsewhere --steps 500",
    )
    add = parser.add_argument
    add(
        "--steps",
        type=train.at_least(1),
        default=3500,
        help="optimiser steps (default: %(default)s)",
    )
    add("--batch-size", type=train.at_least(1), default=32, help="documents a step (default: 32)")
    add(
        "--lr",
        type=train.at_least(1e-9),
        default=0.02,
        help="Muon's peak rate (default: %(default)s)",
    )
    add("--seed", type=train.at_least(0), default=0, help="default: 0")
    add("--device", default=DEFAULT_DEVICE, help="default: %(default)s")
    add("--keep", metavar="DIR", help="keeps models on the way, in DIR/step00125 and so on")
    add("--out", default=data.FOLDER, help="the model's folder (default: tiny itself)")
    return parser.parse_args()


def main():
    args = parse_args()
    with blame(f"--device {args.device}", RuntimeError, AssertionError):
        torch.empty(0, device=args.device)
    # Until it is done everything is in OUT.unfinished, so that a good OUT is never spoilt.
    out = Path(args.out)
    unfinished = Path(f"{out}.unfinished")
    with blame(f"--out {out}", OSError):
        out.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir(exist_ok=True)

    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    save_tokenizer(train_tokenizer(rng), unfinished)
    tokenizer = Tokenizer.from_pretrained(unfinished)
    vocab_size = tokenizer.encoding.get_vocab_size()
    model = new_model(vocab_size).to(args.device)
    print(f"the tokenizer has {vocab_size} tokens")
    pretrain(args, model, tokenizer, rng, unfinished)

    for file in unfinished.iterdir():
        os.replace(file, out / file.name)
    unfinished.rmdir()
    print(f"the model is in {out}; runs that were made with an older one do not fit it")


if __name__ == "__main__":
    run_main(main)
