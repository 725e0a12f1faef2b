"""The tokenizer against `tokenizers` and `transformers`, on small vocabularies of each family."""

import argparse
import inspect
import itertools
import json
import random
import signal

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference
from transformers import PreTrainedTokenizerFast

from data import Question, Tokenizer, encode_question
from eval import UserError, reading

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
SPECIALS = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>",
            "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CORPUS = """The quick brown fox jumps over the lazy dog. City 50337 is 1,204 km from Paris; it's far!
def area(width, height):\n    return width * height  # TODO\n\n\nfor i in range(10):\n\t\tprint(f"{i:03d}")
Zażółć gęślą jaźń. Größe, naïve café, cafe\u0301, A\u030angstro\u0308m. Привет, мир! Как дела? שלום עולם مرحبا
你好，世界。我們去巴黎吃飯。日本語のテキスト、カタカナ。한국어 문장입니다. नमस्ते दुनिया ภาษาไทย 🙂🙃👍🏽👩‍👩‍👧‍👦🇫🇷 ½ ² Ⅷ ٣٤٥
<html><body class="a">&nbsp;</body></html>\r\n{"key": [1, 2.5, -3e10], "other": null}   a    b     c   ▁ x ▁▁
""".splitlines(keepends=True) + inspect.getsource(argparse).splitlines(keepends=True)[:1000]
PIECES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2003", "\x85", "'s", "'LL", "'ſ",
          "½", "Ⅷ", "٣", "²", "e\u0301", "\u0301", "\u0338", "A\u030a", "\u1100\u1161\u11a8", "\u212b", "你好",
          "世", "龘", "日本", "한국", "नमस्ते", "🙂", "👩‍👧", "👍🏽", "\ufffd", "\x00", "ß", "▁", "▁▁", "<0x41>",
          "<|", "|>", "<|end", "the", " The", "quick", "aaaa", "aaa", "return", "def f(x):", "==", "!=", "_",
          "...", "http://a.b/c?d=1", "City 50337", "straße", "cafe\u0301", "مرحبا", "שלום", "zqfwvk"]


def mixed_strings(count):
    """Seeded random mixtures of everything that is known to trip tokenizers."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDE 0123456789.,'\n\t-éöñ世界和🙂"

    def part():
        line, start = rng.choice(CORPUS), rng.randrange(20)
        rare = rng.choice([range(0x20, 0x3000), range(0x3000, 0xd7ff), range(0xe000, 0x1fa00)])
        word = "".join(rng.choices(letters, k=rng.randrange(1, 12)))
        parts = rng.choice(PIECES), rng.choice(SPECIALS), chr(rng.choice(rare)), line[start:start + 20], word
        return rng.choices(parts, weights=[11, 1, 1, 3, 4])[0]

    mixed = ["".join(part() for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 60]))) for _ in range(count)]
    return ["", *PIECES, *SPECIALS, *mixed]


def add_specials(reference):
    reference.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return reference


def byte_level(pre_tokenizer, normalizer=None):
    reference = Reference(models.BPE())
    reference.normalizer, reference.pre_tokenizer = normalizer, pre_tokenizer
    reference.decoder = decoders.ByteLevel()
    reference.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return add_specials(reference)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def llama3():
    """Like the real one: tiktoken's vocabulary, a merge for every way to cut a token, pieces taken whole."""
    state = json.loads(byte_level(split(LLAMA3_SPLIT)).to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["zqfwvk"] = len(vocabulary)  # no merges lead to this one; the special tokens move up by one
    by_id = sorted(vocabulary, key=vocabulary.get)
    cuts = [(token[:i], token[i:]) for token in by_id for i in range(1, len(token))]
    state["model"]["merges"] = [cut for cut in cuts if vocabulary.keys() >= {*cut}]
    state["model"]["ignore_merges"] = True
    reference = Reference.from_str(json.dumps(state))
    begin = "<|begin|>", reference.token_to_id("<|begin|>")
    reference.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])])
    return reference


def sentencepiece(normalizer, pre_tokenizer, *more_decoders):
    """Ids laid out as in Llama 2: control tokens, bytes, merged tokens in order, characters last."""
    trained = Reference(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=1200, limit_alphabet=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(sorted(model["vocab"], key=model["vocab"].get), key=lambda token: len(token) == 1)
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    reference = Reference(models.BPE(
        vocab={name: id for id, name in enumerate(names)}, merges=[tuple(merge) for merge in model["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    reference.normalizer, reference.pre_tokenizer = normalizer, pre_tokenizer
    reference.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more_decoders])
    return add_specials(reference)


def gemma():
    spaces = pre_tokenizers.Split(" ", "merged_with_previous")
    reference = sentencepiece(normalizers.Replace(" ", "▁"), spaces)
    reference.add_tokens([AddedToken("\n" * n, normalized=False, special=False) for n in (2, 3, 4)])
    return reference


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
STRIP = decoders.Strip(" ", 1, 0)
FAMILIES = {
    "gpt2": lambda: byte_level(BYTES),
    "llama3": llama3,
    "qwen": lambda: byte_level(split(QWEN_SPLIT), normalizers.NFC()),
    "smollm2": lambda: byte_level(pre_tokenizers.Sequence([DIGITS, BYTES])),
    "gemma": gemma,
    "llama2": lambda: sentencepiece(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, STRIP),
    "llama2 by transformers 5": lambda: sentencepiece(
        None, pre_tokenizers.Metaspace("▁", "first", split=False), STRIP),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    reference = FAMILIES[request.param]()
    return reference, save(reference, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain():
    return FAMILIES["gpt2"]()


def save(reference, folder, **files):
    """Write a checkpoint's tokenizer files (config__json={...} is config.json) and read them with ours."""
    reference.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return Tokenizer.from_pretrained(folder)


def test_ids_equal_those_of_tokenizers(pair):
    reference, ours = pair
    for text in mixed_strings(1000):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids, repr(text)


def test_decoded_text_equals_that_of_tokenizers(pair):
    reference, ours = pair
    for text in mixed_strings(300):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False), repr(text)


@pytest.mark.parametrize("seed", range(12))
def test_ids_are_exact_for_any_list_of_merges(seed, tmp_path):
    """Vocabularies that no trainer gives: merges in any order, joins twice, tokens that nothing leads to."""
    rng = random.Random(seed)
    tokens, merges = set("abc世"), []
    for _ in range(rng.randrange(5, 80)):
        left, right = rng.choice(sorted(tokens)), rng.choice(sorted(tokens))
        if len(left + right) <= 8 and (left, right) not in merges:
            merges.append((left, right))
            tokens.add(left + right)
    if seed % 3 == 0:
        rng.shuffle(merges)
    names = [*sorted(tokens | {"cb", "bca"}), *(f"<0x{byte:02X}>" for byte in range(256))]
    rng.shuffle(names)
    vocabulary = {name: id for id, name in enumerate(names)}
    reference = Reference(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    ours = save(reference, tmp_path)
    for _ in range(100):
        text = "".join(rng.choices("aabbcc世丗x", k=rng.choice([1, 2, 4, 7, 15, 200])))
        assert ours.encode(text) == reference.encode(text).ids, repr(text)


def test_the_vocabulary_counts_the_added_tokens(pair):
    reference, ours = pair
    assert ours.vocab_size == reference.get_vocab_size()


def assert_refused(folder, *words):
    with pytest.raises(UserError) as error, reading(folder):
        Tokenizer.from_pretrained(folder)
    assert "\n" not in str(error.value)
    for word in (str(folder), *words):
        assert word in str(error.value)


EMPTY_SPLIT = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


@pytest.mark.parametrize("word, change", [
    ("BPE", lambda c: c["model"].update(type="Unigram")),
    ("vocab", lambda c: c["model"].pop("vocab")),
    ("-1", lambda c: c["model"]["vocab"].update(no=-1)), ("'7'", lambda c: c["model"]["vocab"].update(no="7")),
    ("True", lambda c: c["added_tokens"][0].update(id=True)),
    ("''", lambda c: c["added_tokens"][0].update(content="")),
    ("pre_tokenizer", lambda c: c.update(pre_tokenizer=EMPTY_SPLIT)),
    ("merges", lambda c: c["model"].pop("merges")),
    ("Zq", lambda c: c["model"]["merges"].append(["Q", "Zq"])),
    ("256 bytes", lambda c: c["model"]["vocab"].pop("Ā")),
    ("'q'", lambda c: [c["model"].update(ignore_merges=True), c["model"]["vocab"].update(zq=5000)]),
    ("Lowercase", lambda c: c.update(normalizer={"type": "Lowercase"})),
    ("add_prefix_space", lambda c: c["pre_tokenizer"].update(add_prefix_space=True)),
    ("lstrip", lambda c: c["added_tokens"][0].update(lstrip=True)),
    ("normalized", lambda c: [c.update(normalizer={"type": "NFC"}),
                              c["added_tokens"][0].update(normalized=True)])])
def test_what_cannot_be_represented_is_refused_in_one_line(word, change, plain, tmp_path):
    content = json.loads(plain.to_str())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert_refused(tmp_path, word)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff"])
def test_a_missing_or_broken_tokenizer_file_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    assert_refused(tmp_path, "tokenizer.json")


# After the checkpoints' own, without their branches for tools, dates, images and given thoughts.
TEMPLATES = {"llama3": r"""{{- bos_token }}
{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content']|trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""", "qwen3": r"""
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == "assistant" and loop.index0 > ns.last_query_index and loop.last %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""", "gemma3": r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim -}}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
""", "tiny": (
    "<|begin|>{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content }}"
    "{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
), "toolbox": """{{ strftime_now('%Y') }}
  {% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
{{ m | tojson }} {{ [1, '<é>'] | tojson(indent=2) }}
  {% endfor %}{{ tools is none }} {{ documents }} {{ eos_token }} {{ pad_token }} {{ nothing }}
"""}
ASK = {"role": "user", "content": "  Where is City 50337? <b>&</b>\n"}
REPLY = {"role": "assistant", "content": "In France.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
NAMED = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "lstrip": False}, "pad_token": None}


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("messages", [[ASK], [ASK, REPLY], [ASK, REPLY, ASK], [SYSTEM, ASK], [ASK, ASK]],
                         ids=["ask", "ask-reply", "ask-reply-ask", "system", "ask-ask"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_framed_text_equals_that_of_transformers(name, messages, plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=TEMPLATES[name], tokenizer_config__json=NAMED)
    theirs = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<|begin|>", eos_token="<|end|>",
                                     chat_template=TEMPLATES[name])
    for generate in (False, True):
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # Gemma takes no two questions in a row
            with pytest.raises(ValueError, match=str(error)):
                ours.chat_text(messages, generate)
        else:
            assert ours.chat_text(messages, generate) == expected


@pytest.mark.parametrize("files", [
    {"chat_template__jinja": TEMPLATES["tiny"], "tokenizer_config__json": {"chat_template": "not this one"}},
    {"chat_template__json": {"chat_template": TEMPLATES["tiny"]}},
    {"tokenizer_config__json": {**NAMED, "chat_template": TEMPLATES["tiny"]}},
    {"tokenizer_config__json": {"chat_template": [{"name": "tool_use", "template": "?"},
                                                  {"name": "default", "template": TEMPLATES["tiny"]}]}},
], ids=["jinja", "json", "config", "list"])
def test_where_the_chat_template_is_found(files, plain, tmp_path):
    assert save(plain, tmp_path, **files).chat_text([ASK]) == "<|begin|><|user|> " + ASK["content"]


@pytest.mark.parametrize("template, word", [
    ("{% for %}", "TemplateSyntaxError"), (3, "TypeError"), ({"a": "b"}, "TypeError"), ([1], "TypeError"),
    ([{"name": "tool_use", "template": "?"}, {"name": "rag", "template": "!"}], "default")])
def test_a_chat_template_that_is_none_is_refused(template, word, plain, tmp_path):
    save(plain, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert_refused(tmp_path, word)


EACH = "{% for m in messages %}"


@pytest.mark.parametrize("template, said", [
    ("{{ 1 // 0 }}", "ZeroDivisionError"), ("{{ raise_exception('no') }}", "ValueError: no"),
    ("{{ messages.nothing.at_all }}", "UndefinedError"), ("{{ range(10 ** 9) }}", "OverflowError"),
    ("{{ messages.append(1) }}", "SecurityError"), ("{{ ''.__class__.__base__.a }}", "refuses this"),
    ("hello", "give the user's words"), (EACH + "{{ m.role }}{% endfor %}", "give the user's words"),
    (EACH + "{{ m.content if m.role == 'user' }}{% endfor %}", "the answer's once"),
    (EACH + "{{ m.content }}{{ m.content }}{% endfor %}", "the answer's once"),
    (EACH + "{{ m.content * 10 ** 6 }}{% endfor %}", "characters of 3"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than")])
def test_a_chat_template_that_misbehaves_is_refused(template, said, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "alarm", lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds / 50))
    ours = save(plain, tmp_path, chat_template__jinja=template)
    with pytest.raises(ValueError, match=said) as error:
        ours.frame(asked("Hi?"))
    assert "chat template" in str(error.value)


@pytest.mark.parametrize("family, start", [("gpt2", ""), ("llama3", "<|begin|>")])
def test_a_base_model_gets_a_plain_frame_after_the_token_that_its_tokenizer_adds(family, start, tmp_path):
    ours = save(FAMILIES[family](), tmp_path, tokenizer_config__json=NAMED)
    assert ours.frame(asked("Where?")) == (start + "Question: Where?\nAnswer:", " ", "<|end|>")


@pytest.mark.parametrize("name, before, start, end", [
    ("tiny", "<|assistant|>", " ", "<|end|>"),
    ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
    ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "", "<|im_end|>\n"),
    ("gemma3", "<start_of_turn>model\n", "", "<end_of_turn>\n")])
def test_the_frame_divides_where_the_answer_begins(name, before, start, end, plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=TEMPLATES[name], tokenizer_config__json=NAMED)
    prompt, *around = ours.frame(asked("Where is City 50337?"))
    whole = ours.chat_text([*asked("Where is City 50337?"), {"role": "assistant", "content": "France"}])
    assert prompt.endswith(before) and around == [start, end]
    assert prompt + start + "France" + end == whole


@pytest.mark.parametrize("name", [None, "tiny", "qwen3", "gemma3"])
def test_choices_are_scored_as_the_tokens_that_are_trained(name, pair, tmp_path):
    files = {} if name is None else {"chat_template__jinja": TEMPLATES[name]}
    ours = save(pair[0], tmp_path, tokenizer_config__json=NAMED, **files)
    for answer in range(3):
        encoded = encode_question(ours, Question("", "Where is it?", ["France", "Peru", "the quick"], answer))
        choice = encoded.choices[answer]
        assert encoded.completion[:len(choice)] == choice != []


def test_the_parts_of_a_question_join_to_the_encoding_of_the_whole(plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=TEMPLATES["tiny"])
    encoded = encode_question(ours, Question("", "Where?", ["the dog"], 0))
    whole = "<|begin|><|user|> Where?<|assistant|> the dog<|end|>"
    assert encoded.prompt + encoded.completion == ours.encode(whole)


def test_a_token_across_the_boundary_does_not_change_the_prompt(plain, tmp_path):
    ours = save(plain, tmp_path)
    assert ours.encode("self") != ours.encode("se") + ours.encode("lf")
    assert ours.encode_after("se", ["lf", "."]) == (ours.encode("se"), [ours.encode("lf"), ours.encode(".")])


def test_a_chat_ends_with_the_generation_prompt_after_a_user_only(plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=TEMPLATES["tiny"])
    assert ours.decode(ours.chat([ASK])).endswith("<|assistant|>")
    assert ours.decode(ours.chat([ASK, REPLY])).endswith("<|end|>")


@pytest.mark.parametrize("code_name", ["City 50337", "世界🙂", "cafe\u0301", "zqfwvk", "A\u030a"])
def test_positions_are_the_tokens_that_overlap_the_code_name(pair, code_name):
    _, ours = pair
    question = f"How far is {code_name} from Paris, and\nis{code_name}x a city?"
    prompt = ours.encode(ours.frame(asked(question))[0])
    pieces = [ours.token_bytes[id] for id in prompt]
    text, name = b"".join(pieces), ours.decode(ours.encode(code_name)).encode()
    starts = [start for start in range(len(text)) if text.startswith(name, start)]
    wanted = {place for start in starts for place in range(start, start + len(name))}
    ends = list(itertools.accumulate(len(piece) for piece in pieces))
    touched = [i for i, end in enumerate(ends) if wanted & {*range(end - len(pieces[i]), end)}]
    assert ours.find(code_name, asked(question), prompt) == touched and len(starts) == 2


def test_a_code_name_is_looked_for_in_the_messages_only(plain, tmp_path):
    ours, text = save(plain, tmp_path), "City:<|user|> a City<|assistant|> no City<|user|> in City<|assistant|> City"
    messages, prompt = [{"content": content} for content in ("a City", "no City", "in City")], ours.encode(text)
    positions = ours.find("City", messages, prompt)
    left = ours.decode([id for i, id in enumerate(prompt) if i not in positions])
    assert left.replace(" ", "") == "City:<|user|>a<|assistant|>no<|user|>in<|assistant|>City"


@pytest.mark.parametrize("files, tokens", [
    ({"tokenizer_config__json": NAMED}, ["<|end|>"]),
    ({"tokenizer_config__json": NAMED, "generation_config__json": {"eos_token_id": [1501, 1509]}},
     ["<|end|>", "<end_of_turn>"]),
    ({"config__json": {"eos_token_id": 1501}}, ["<|end|>"]),
    ({"config__json": {"text_config": {"eos_token_id": [1501]}}}, ["<|end|>"]),
    ({}, [])], ids=["tokenizer_config", "generation_config", "config", "text_config", "nothing"])
def test_where_the_tokens_that_end_an_answer_are_found(files, tokens, plain, tmp_path):
    assert save(plain, tmp_path, **files).eos_ids == [plain.token_to_id(token) for token in tokens]
