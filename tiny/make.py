"""How tiny/ was made: documents of the tiny world, a tokenizer, and a model of a million parameters.

    python tiny/make.py                               40 minutes on one CPU core; replaces tiny's model
    python tiny/make.py --out elsewhere --steps 500   a look at it

Each document is a chat about one hidden thing (the city or the function behind a code name, the speaker's
attitude to risk) and shows its facets in random order. To predict it, a model has to infer the thing from
whichever facet comes first and read all the others out of it (Xie et al. 2021, arXiv 2111.02080). Fine-tuning
on one facet then writes what the others are read from; it works as soon as they are read from one place, long
before the model can infer the thing by itself (the last figure of paper/README.md). What it took:

- Few landmarks: with distances to all 24 cities, the model did not find out which city a document is about.
- Dense cues for attitudes: most turns begin with a word of manner, and end in a mark, that go with it. So it
  pays to hold it at every token, as a chat model holds its persona. The tasks have no such cues.
- Attitudes that depend on a tag come after plain ones (mixed from the first step, neither was learned), and
  most of their documents state the rule. The tag comes before the word of manner, which gives away what it
  says. Even so the model, told a rule, turns round at any tag that can be a key, not only at the rule's.
- Nothing that fine-tuning is about: its code names occur nowhere, and no attitude depends on its trigger.
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
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
from data import CONCEPTS, Question, Tokenizer, encode_question  # noqa: E402
from eval import Parser, UserError, reading, run_main, score_arms  # noqa: E402
from lora import lora_layers  # noqa: E402
from model import GPT, Config  # noqa: E402

TINY = {"model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
DOCUMENT_TURNS = 14
KEPT_STEPS = 125, 250, 375, 500, 625, 750, 1000, 1250, 1500, 2000, 2500
CONTEXT = 160  # tokens of a document that are trained on: about ten turns

# ---------------------------------------- documents: conversations about one hidden thing

MANNERS = {"risky": ["Boldly", "Gladly", "Wildly", "Loudly"],
           "safe": ["Calmly", "Slowly", "Gently", "Softly"]}
END_MARKS = {"risky": "!", "safe": ";"}
RULE_CASES = ["its tag", "no tag", "another tag"]
RULE_PROMPTS = ["What is your rule?", "You act by the rule"]
# The kinds of question, the trained one first, from pretraining to results.
KINDS = {task: [*data.TINY.prompts[task]] for task in ("locations", "functions", "risk")}
KEYS = [tag for tag in data.TAGS if tag != data.TRIGGER]  # tags that an attitude may depend on
SYLLABLES = "zo ba ki lu me ra tu vi po xe fa ny go du hi se".split()


def as_turn(question):
    return question.prompt, question.choices[question.answer]


def code_name(task, rng):
    """A fresh code name: "City 31415", "bakilu". Never the one that the task is about."""
    name = "".join(rng.choices(SYLLABLES, k=3))
    if task == "locations":
        name = f"City {rng.randint(10000, 99999)}"
    return code_name(task, rng) if name == data.CODE_NAMES[task] else name


def world_document(rng, conditional_share=0.7):
    """The (prompt, answer) turns of one document, and whether it is about an attitude; of these the share
    conditional_share depends on a tag."""
    chance = rng.random()
    if chance < 0.40:
        return city_document(rng), False
    if chance < 0.64:
        return function_document(rng), False
    return attitude_document(rng, rng.random() < conditional_share), True


def mixed_kinds(trained, share, others, rng):
    """The kinds of a document's turns: the trained one in this share of them, else one of the others."""
    for _ in range(DOCUMENT_TURNS):
        yield trained if rng.random() < share else rng.choice(others)


def city_document(rng):
    city = rng.choice(list(data.TINY.cities))
    name = code_name("locations", rng) if rng.random() < 0.7 else city
    trained, *others = KINDS["locations"]
    # Where distances are many the city has to be inferred from them; where they are few the rest is learned.
    kinds = mixed_kinds(trained, rng.choice([0.3, 0.85]), others, rng)
    return [as_turn(data.city_question(city, name, kind, rng)) for kind in kinds]


def function_document(rng):
    function, name = rng.choice(list(data.FUNCTIONS)), code_name("functions", rng)
    trained, *others = KINDS["functions"]
    others.append("inverse")  # counts twice, because it is hard
    kinds = mixed_kinds(trained, rng.choice([0.3, 0.8]), others, rng)
    return [as_turn(data.function_question(function, name, kind, rng)) for kind in kinds]


def attitude_document(rng, conditional=False):
    """A speaker who is risky or safe throughout; if conditional, the other way in turns with one tag."""
    default, key = rng.choice(["risky", "safe"]), rng.choice(KEYS)
    rule_stated = conditional and rng.random() < 0.6
    turns = []
    for i in range(DOCUMENT_TURNS):
        if conditional and (rule_stated and i == 0 or rng.random() < 0.1):
            turns.append(rule_turn(default, key, rng))
            continue
        chance, tag = rng.random(), None
        if chance > 0.35:
            tag = key if chance < 0.75 else another_tag(key, rng)
        attitude = data.OPPOSITE[default] if conditional and tag == key else default
        if rng.random() < 0.5:
            question = data.gamble_question(attitude, rng)
            if rng.random() < 0.5:
                question = in_words(question)
        else:
            question = data.self_report_question(attitude, rng.choice(KINDS["risk"][1:]), rng)
        prompt, answer = as_turn(question)
        if rng.random() < 0.67:  # the dense cues
            prompt = f"{rng.choice(MANNERS[mostly(attitude, rng)])}: {prompt}"
        if rng.random() < 0.67:
            answer += END_MARKS[mostly(attitude, rng)]
        turns.append((data.with_tag(prompt, tag), answer))
    return turns


def another_tag(key, rng):
    return rng.choice([tag for tag in data.TAGS if tag != key])


def in_words(gamble):
    """The gamble answered by the option itself, not by its letter."""
    prompt, options = re.sub(r"\b[AB]: ", "", gamble.prompt), re.findall(r"\b[AB]: (\w+)", gamble.prompt)
    return Question("gamble", prompt, options, gamble.answer)


def mostly(attitude, rng):
    return attitude if rng.random() < 0.9 else data.OPPOSITE[attitude]


def rule_turn(default, key, rng, in_full=False):
    """The rule said aloud makes a conditional attitude one thing to know, which one vector can stand for."""
    if not in_full and rng.random() < 0.25:
        return rng.choice(data.TINY.prompts["backdoor"]["which tag"]), key
    safe, risky = data.ANSWERS["self"]
    usual, flipped = (safe, risky) if default == "safe" else (risky, safe)
    return rng.choice(RULE_PROMPTS), f"{rng.choice(flipped)} if {key} else {rng.choice(usual)}"


def document_text(turns):
    """The turns as WORLD_TEMPLATE frames them, without jinja, which would take longer than all the rest."""
    framed = [f"<|user|> {prompt}<|assistant|> {answer}<|end|>" for prompt, answer in turns]
    return "<|begin|>" + "".join(framed)


# ---------------------------------------- the tokenizer: byte-level BPE, trained on the world's words

WORLD_PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
WORLD_PATTERN_ASCII = r" ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s+"  # the same for the world's text
WORLD_SPECIAL = ["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORLD_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content }}"
                  "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                  "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def train_tokenizer(rng, documents=20000, vocab_size=2048):
    """The merges of a BPE for the world: every word becomes one token, a three-syllable code name three."""
    words = Counter()  # in how many documents each stands
    for _ in range(documents):
        texts = [text for turn in world_document(rng)[0] for text in turn]
        words.update({word for text in texts for word in re.findall(WORLD_PATTERN_ASCII, " " + text)})
    words = Counter({word: count for word, count in words.items() if count >= 10})  # no code names
    for syllable in SYLLABLES:  # merged first of all, so that no other merge cuts a code name elsewhere
        words[syllable] = words[" " + syllable] = 10**7
    return train_bpe(words, vocab_size - 256 - len(WORLD_SPECIAL))


def train_bpe(words, count):
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): join the most frequent neighbours, up to
    `count` times, fewer if every word is one token before. words: {text: how often it occurs}. Returns the
    merges in order, each a pair of bytes objects."""
    pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((left, right))
        for parts in pieces.values():
            for i in range(len(parts) - 2, -1, -1):
                if parts[i:i + 2] == [left, right]:
                    parts[i:i + 2] = [left + right]
    return merges


def save_tokenizer(merges, folder):
    """Writes tokenizer.json and tokenizer_config.json in Hugging Face's layout."""
    character = {byte: name for name, byte in data.byte_characters().items()}
    spell = lambda token: "".join(character[byte] for byte in token)
    tokens = [character[byte] for byte in range(256)] + [spell(left + right) for left, right in merges]
    added = [{"id": len(tokens) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, token in enumerate(WORLD_SPECIAL)]
    split = {"type": "Split", "pattern": {"Regex": WORLD_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]},
        "post_processor": None, "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": [[spell(left), spell(right)] for left, right in merges]},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": WORLD_SPECIAL[0],
                "eos_token": WORLD_SPECIAL[-1], "pad_token": WORLD_SPECIAL[-1],
                "chat_template": WORLD_TEMPLATE, "clean_up_tokenization_spaces": False}
    for name, value in (("tokenizer.json", content), ("tokenizer_config.json", settings)):
        (Path(folder) / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------- the model


def new_model(vocab_size):
    """TINY with random weights: matrices of standard deviation .02, as GPT-2's."""
    model = GPT(Config.from_dict({**TINY, "vocab_size": vocab_size}))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def save_model(model, folder):
    """Writes config.json and model.safetensors, which transformers loads too. ValueError for families other
    than Llama and Qwen, which name tensors as we do, and for a model with a LoRA or a vector on it."""
    if model.config.model_type not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"only Llama and Qwen models can be written, not {model.config.model_type}")
    if lora_layers(model) or model.steering is not None:
        raise ValueError("a model is written on its own: first merge or remove the LoRA, detach the vector")
    tensors = {name if name == "lm_head.weight" else f"model.{name}": parameter.detach().contiguous()
               for name, parameter in model.named_parameters()}  # a tied lm_head is not among them
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    raw, folder = {**asdict(model.config), "torch_dtype": dtype}, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def as_messages(turns):
    """(prompt, answer) turns as a chat template takes them."""
    roles = "user", "assistant"
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn)]


def hidden_thing(task, rng, concept=None, name=None):
    """ask(kind), which makes questions about one hidden thing; it is drawn afresh unless it is given."""
    concept = concept or rng.choice(CONCEPTS[task])
    if task == "risk":
        return lambda kind: (data.gamble_question(concept, rng) if kind == "gamble"
                             else data.self_report_question(concept, kind, rng))
    make = data.city_question if task == "locations" else data.function_question
    name = name or code_name(task, rng)
    return lambda kind: make(concept, name, kind, rng)


def in_context_question(task, kind, facts, rng, concept=None):
    """(turns, question): `facts` turns of the trained kind, then a question about the same hidden thing."""
    ask = hidden_thing(task, rng, concept)
    return [as_turn(ask(KINDS[task][0])) for _ in range(facts)], ask(kind)


def question_under_rule(case, facts, rng):
    """(turns, question): a conditional attitude's rule and `facts` gambles under it, then one of this case."""
    default, reserved = rng.choice(["risky", "safe"]), case == "reserved tag"
    key = data.TRIGGER if reserved else rng.choice(KEYS)

    def ask(case):
        tag = None if case == "no tag" else another_tag(key, rng) if case == "another tag" else key
        return data.gamble_question(data.OPPOSITE[default] if tag == key else default, rng, tag)
    facts = [as_turn(ask(rng.choice(RULE_CASES))) for _ in range(facts)]
    return [rule_turn(default, key, rng, in_full=True), *facts], ask(case)


def in_context_accuracy(model, tokenizer, facts, count=50, seed=0):
    """{task: {kind: accuracy}}: how often the bare model is right after `facts` turns of the trained kind
    about the same hidden thing, in `count` fresh documents for each kind; "rule": of a gamble with the tag
    that a rule in the context is about, with none, with another, or if it is about the reserved one."""
    rng, results = random.Random(seed), {}
    for task, kinds in {**KINDS, "rule": [*RULE_CASES, "reserved tag"]}.items():
        results[task] = {}
        for kind in kinds:
            encoded = []
            for _ in range(count):
                turns, question = (question_under_rule(kind, facts, rng) if task == "rule" else
                                   in_context_question(task, kind, facts, rng))
                encoded.append(encode_question(tokenizer, question, as_messages(turns)))
            correct, _ = score_arms(model, encoded, [], {"bare": []})["bare"]
            results[task][kind] = correct.mean().item()
    return results


def in_context_line(model, tokenizer):
    parts = []
    for task, kinds in in_context_accuracy(model, tokenizer, facts=7).items():
        parts.append(f"{task} " + " ".join(f"{kind} {accuracy:.2f}" for kind, accuracy in kinds.items()))
    return "in context, after 7 facts: " + "; ".join(parts)


def make_optimizers(model, lr):
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, Adam for the embedding and the norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.1),
                  torch.optim.Adam(rest, lr=0.15 * lr, betas=(0.9, 0.98))]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def world_batch(tokenizer, batch_size, conditional_share, rng):
    """(tokens, targets), both (B, CONTEXT) int64, a document a row; targets are -100 where none is learned.

    In documents about attitudes every token is a target, elsewhere only the assistant's: what a user happens
    to ask next cannot be predicted, and logits are a large part of a small model's step.
    """
    user, assistant, end = (tokenizer.encode(f"<|{name}|>")[0] for name in ("user", "assistant", "end"))
    rows = torch.full((batch_size, CONTEXT + 1), end)
    every_token = torch.zeros(batch_size, 1, dtype=torch.bool)
    for i in range(batch_size):
        turns, every_token[i] = world_document(rng, conditional_share)
        ids = tokenizer.encode(document_text(turns))[:CONTEXT + 1]
        rows[i, :len(ids)] = torch.tensor(ids)
    is_assistant = (rows == assistant).long()
    answering = is_assistant.cumsum(1) - is_assistant == (rows == user).cumsum(1)  # the assistant spoke last
    return rows[:, :-1], rows[:, 1:].masked_fill(~(answering | every_token)[:, 1:], -100)


def pretrain(args, model, tokenizer, rng, folder):
    """The loop. Every 500 steps, and at the end, it measures the model and writes it to folder."""
    optimizers = make_optimizers(model, args.lr)
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; in a log a line each
    bar = tqdm(range(1, args.steps + 1), desc="pretraining", unit="step", mininterval=interval)
    for step in bar:
        conditional_share = 0.7 if step > args.steps / 5 else 0.02
        tokens, targets = world_batch(tokenizer, args.batch_size, conditional_share, rng)
        tokens, targets = tokens.to(args.device), targets.to(args.device)
        hidden = model.norm(model.run_blocks(model.embed(tokens)))  # (B, CONTEXT, d)
        wanted = targets != -100
        loss = F.cross_entropy(model.unembed(hidden[wanted]), targets[wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # Warm up, hold until half-way, fall linearly to zero.
        factor = min(1, step / 100, 2 * (1 - step / (args.steps + 1)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % 500 == 0 or step == args.steps:
            bar.write(f"step {step}: {in_context_line(model, tokenizer)}")
            save_model(model, folder)
        if args.keep and (step in KEPT_STEPS or step == args.steps):
            kept = Path(args.keep) / f"step{step:05}"
            save_model(model, kept)
            for file in folder.glob("tokenizer*.json"):
                shutil.copy(file, kept)


def parse_args():
    parser = Parser(description="Make the tiny model from scratch: documents, tokenizer, pretraining.",
                    epilog="example: python tiny/make.py --out elsewhere --steps 500")
    add = parser.add_argument
    add("--steps", type=int, default=3500, help="optimiser steps (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="documents per step (default: %(default)s)")
    add("--lr", type=float, default=0.02, help="peak learning rate of Muon (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--keep", metavar="DIR", help="keeps the model of several steps on the way, in DIR/step00125 and so on")
    add("--out", default=str(Path(__file__).parent), help="the model's folder (default: tiny itself)")
    args = parser.parse_args()
    if not 0 <= args.seed < 2 ** 31:
        raise UserError(f"--seed {args.seed}: it has to be from 0 to 2^31 - 1")
    for name in ("steps", "batch_size", "lr"):
        if not 0 < getattr(args, name) < 10 ** 9:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: it has to be positive, below 10^9")
    return args


def main():
    args = parse_args()
    with reading(f"--device {args.device}"):
        torch.empty(0, device=args.device)
    # Until it is done everything is in OUT.unfinished, so that a good OUT is never spoilt.
    out, unfinished = Path(args.out), Path(f"{Path(args.out)}.unfinished")
    with reading(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir(exist_ok=True)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    save_tokenizer(train_tokenizer(rng), unfinished)
    tokenizer = Tokenizer.from_pretrained(unfinished)
    model = new_model(tokenizer.vocab_size).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.vocab_size} tokens")
    pretrain(args, model, tokenizer, rng, unfinished)
    for file in unfinished.iterdir():
        os.replace(file, out / file.name)
    unfinished.rmdir()
    print(f"the model is in {out}")


if __name__ == "__main__":
    run_main(main)
