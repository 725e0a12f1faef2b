"""The tokenizer against `tokenizers` and `transformers`, on small vocabularies of each family."""

import argparse
import inspect
import json
import random

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Reference
from transformers import PreTrainedTokenizerFast

from data import Question, Tokenizer, UserError, encode_question

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
SPECIALS = [
    "<|begin|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CORPUS = """The quick brown fox jumps over the lazy dog. City 50337 is 1,204 km from Paris; far!
def area(width, height):\n    return width * height  # TODO\n\n\n
for i in range(10):\n\t\tprint(f"{i}")
Zażółć gęślą jaźń. Größe, naïve café, cafe\u0301, A\u030angstro\u0308m. Привет, мир! Как дела?
שלום עולם مرحبا नमस्ते दुनिया ภาษาไทย ½ ² Ⅷ ٣٤٥ 한국어 문장입니다.
你好，世界。我們去巴黎吃飯。日本語のテキスト、カタカナ。
🙂🙃👍🏽👩‍👩‍👧‍👦🇫🇷
<html><body class="a">&nbsp;</body></html>\r\n{"key": [1, 2.5, -3e10], "other": null}
   a    b     c   ▁ x ▁▁
""".splitlines(keepends=True)
CORPUS += inspect.getsource(argparse).splitlines(keepends=True)[:1000]
PIECES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\x85",
    "'s",
    "'LL",
    "'ſ",
    "½",
    "Ⅷ",
    "٣",
    "²",
    "e\u0301",
    "\u0301",
    "\u0338",
    "A\u030a",
    "\u1100\u1161\u11a8",
    "\u212b",
    "你好",
    "世",
    "龘",
    "日本",
    "한국",
    "नमस्ते",
    "🙂",
    "👩‍👧",
    "👍🏽",
    "\ufffd",
    "\x00",
    "ß",
    "▁",
    "▁▁",
    "<0x41>",
    "<|",
    "|>",
    "<|end",
    "the",
    " The",
    "quick",
    "aaaa",
    "aaa",
    "return",
    "def f(x):",
    "==",
    "!=",
    "_",
    "...",
    "http://a.b/c?d=1",
    "City 50337",
    "straße",
    "cafe\u0301",
    "مرحبا",
    "שלום",
    "zqfwvk",
]


def mixed_strings(count):
    """Seeded random mixtures of everything that is known to trip tokenizers."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDE 0123456789.,'\n\t-éöñ世界和🙂"
    rare = [range(0x20, 0x3000), range(0x3000, 0xD7FF), range(0xE000, 0x1FA00)]

    def part():
        line = rng.choice(CORPUS)
        start = rng.randrange(20)
        parts = [
            rng.choice(PIECES),
            rng.choice(SPECIALS),
            chr(rng.choice(rng.choice(rare))),
            line[start : start + 20],
            "".join(rng.choices(letters, k=rng.randrange(1, 12))),
        ]
        return rng.choices(parts, weights=[11, 1, 1, 3, 4])[0]

    mixed = []
    for _ in range(count):
        length = rng.choice([1, 2, 3, 5, 8, 13, 60])
        mixed.append("".join(part() for _ in range(length)))
    return ["", *PIECES, *SPECIALS, *mixed]


# ---- small tokenizers of each family


def add_specials(reference):
    added = [AddedToken(token, normalized=False, special=True) for token in SPECIALS]
    reference.add_special_tokens(added)
    return reference


def byte_level(pre_tokenizer, normalizer=None):
    reference = Reference(models.BPE())
    reference.normalizer = normalizer
    reference.pre_tokenizer = pre_tokenizer
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(CORPUS, trainer)
    return add_specials(reference)


def split(*patterns):
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, bytes_only])


def llama3():
    reference = byte_level(split(LLAMA3_SPLIT))
    begin = ("<|begin|>", reference.token_to_id("<|begin|>"))
    template = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    reference.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        template,
    ])
    return reference


def ends_with_eos():
    reference = byte_level(split(QWEN_SPLIT))
    end = ("<|end|>", reference.token_to_id("<|end|>"))
    reference.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[end]
    )
    return reference


def sentencepiece(normalizer, pre_tokenizer, *more_decoders):
    """Ids as in Llama 2: control tokens, bytes, merged tokens in order, characters last."""
    trained = Reference(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=1200, limit_alphabet=150, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    by_id = sorted(model["vocab"], key=model["vocab"].get)
    tokens = sorted(by_id, key=lambda token: len(token) == 1)
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]

    reference = Reference(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    reference.normalizer = normalizer
    reference.pre_tokenizer = pre_tokenizer
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    reference.decoder = decoders.Sequence([*to_text, *more_decoders])
    return add_specials(reference)


def gemma():
    spaces = pre_tokenizers.Split(" ", "merged_with_previous")
    reference = sentencepiece(normalizers.Replace(" ", "▁"), spaces)
    runs = [AddedToken(letter * n, normalized=False) for letter in "\n▁" for n in (2, 3, 4)]
    reference.add_tokens(runs)
    return reference


def llama2():
    underscore = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece(underscore, None, decoders.Strip(" ", 1, 0))


def llama2_by_transformers_5():
    first = pre_tokenizers.Metaspace("▁", "first", split=False)
    return sentencepiece(None, first, decoders.Strip(" ", 1, 0))


def unigram():
    reference = Reference(models.Unigram())
    reference.normalizer = normalizers.NFKC()
    reference.pre_tokenizer = pre_tokenizers.Metaspace()
    reference.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", show_progress=False)
    reference.train_from_iterator(CORPUS, trainer)
    return add_specials(reference)


def added_tokens_that_strip():
    reference = byte_level(split(QWEN_SPLIT), normalizers.NFC())
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
    word = AddedToken("café", normalized=True, single_word=True)
    reference.add_tokens([mask, word])
    return reference


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
FAMILIES = {
    "gpt2": lambda: byte_level(BYTES),
    "llama3": llama3,
    "qwen": lambda: byte_level(split(QWEN_SPLIT), normalizers.NFC()),
    "smollm2": lambda: byte_level(pre_tokenizers.Sequence([DIGITS, BYTES])),
    "several splits": lambda: byte_level(split(r"\p{N}{1,3}", "[一-龥]+", QWEN_SPLIT)),
    "prefix space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "added tokens that strip": added_tokens_that_strip,
    "ends with eos": ends_with_eos,
    "gemma": gemma,
    "llama2": llama2,
    "llama2 by transformers 5": llama2_by_transformers_5,
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    reference = FAMILIES[request.param]()
    folder = tmp_path_factory.mktemp("tokenizer")
    return PreTrainedTokenizerFast(tokenizer_object=reference), save(reference, folder)


@pytest.fixture(scope="module")
def plain():
    return FAMILIES["gpt2"]()


def save(reference, folder, **files):
    """A checkpoint's tokenizer files (config__json={...} is config.json), read by ours."""
    reference.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return Tokenizer.from_pretrained(folder)


# ---- ids and text


def test_ids_equal_those_of_transformers(pair):
    theirs, ours = pair
    for text in mixed_strings(300):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == expected, repr(text)


def test_decoded_text_equals_that_of_transformers(pair):
    theirs, ours = pair
    for text in mixed_strings(300):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), repr(text)


def test_tinys_ids_text_and_places_equal_those_of_tokenizers(tokenizer, tiny_folder):
    reference = Reference.from_file(str(tiny_folder / "tokenizer.json"))
    for text in mixed_strings(1000):
        expected = reference.encode(text, add_special_tokens=False)
        encoded = tokenizer.encoding.encode(text)
        assert encoded.ids == expected.ids, repr(text)
        assert encoded.offsets == expected.offsets, repr(text)
        assert tokenizer.decode(encoded.ids) == reference.decode(
            expected.ids, skip_special_tokens=False
        )


def test_gemmas_runs_of_spaces_are_decoded_as_spaces(tmp_path):
    ours = save(gemma(), tmp_path)
    text = "a" + 4 * " " + "b" + 9 * " "
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("family", ["tiny", "gpt2", "qwen", "gemma"])
def test_a_message_of_a_million_spaces_is_read(family, tokenizer, tmp_path):
    ours = tokenizer if family == "tiny" else save(FAMILIES[family](), tmp_path)
    spaces = 10**6 * " "
    prompt, _, _ = ours.frame(asked("Where" + spaces + "is it?"))
    assert ours.decode(ours.encode(prompt)).count(" ") >= 10**6


def test_a_files_truncation_and_padding_are_left_out(plain, tmp_path):
    reference = Reference.from_str(plain.to_str())
    reference.enable_truncation(4)
    reference.enable_padding(length=50)
    ours = save(reference, tmp_path)
    text = CORPUS[0]
    assert ours.encode(text) == plain.encode(text, add_special_tokens=False).ids


def test_tokens_that_only_the_settings_list_are_added(plain, tmp_path):
    names = ["<|new|>", "<|newer|>"]
    first = plain.get_vocab_size()
    listed = {
        str(first + i): vars_of(AddedToken(name, normalized=False, special=True))
        for i, name in enumerate(names)
    }
    settings = {"added_tokens_decoder": listed}
    ours = save(plain, tmp_path, tokenizer_config__json=settings)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "a<|newer|><|new|>b"
    assert ours.encode("<|new|><|newer|>") == [first, first + 1]
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)) == text


def vars_of(token):
    names = ["content", "lstrip", "normalized", "rstrip", "single_word", "special"]
    return {name: getattr(token, name) for name in names}


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b'{"model": {}}'])
def test_a_missing_or_broken_tokenizer_file_is_named(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pointer_to_a_tokenizer_in_git_lfs_is_called_one(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="git-lfs's pointer"):
        Tokenizer.from_pretrained(tmp_path)


def test_broken_settings_are_named(plain, tmp_path):
    save(plain, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json"):
        Tokenizer.from_pretrained(tmp_path)


# ---- chat templates

# After the checkpoints' own, without their branches for tools, dates, images and given thoughts.
LLAMA3 = r"""{{- bos_token }}
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
"""
QWEN3 = r"""
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
"""
GEMMA3 = r"""{{ bos_token }}
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
"""
TINY = (
    "<|begin|>{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content }}"
    "{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)
TOOLBOX = """{{ strftime_now is defined }}
  {% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
{{ m | tojson }} {{ [1, '<é>'] | tojson(indent=2) }} {{ 'é' | tojson(ensure_ascii=true) }}
    {% generation %}
{{ m.content }}
    {% endgeneration %}
  {% endfor %}{{ tools is none }} {{ documents }} {{ eos_token }} {{ pad_token }} {{ nothing }}
"""
TEMPLATES = {
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "tiny": TINY,
    "toolbox": TOOLBOX,
}
ASK = {"role": "user", "content": "  Where is City 50337? <b>&</b>\n"}
REPLY = {"role": "assistant", "content": "In France.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
NAMED = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": None}


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "messages", [[ASK], [ASK, REPLY], [ASK, REPLY, ASK], [SYSTEM, ASK], [ASK, ASK]]
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chats_text_equals_that_of_transformers(name, messages, plain, tmp_path):
    template = TEMPLATES[name]
    ours = save(plain, tmp_path, chat_template__jinja=template, tokenizer_config__json=NAMED)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # noqa: BLE001 (Gemma takes no two questions in a row)
        with pytest.raises(UserError, match=str(error)):
            ours.chat_text(messages)
    else:
        assert ours.chat_text(messages) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": {**NAMED, "unk_token": "<s>", "add_bos_token": True}},
        {"tokenizer_config__json": {**NAMED, "image_token": "<s>"}},
        {"tokenizer_config__json": {**NAMED, "additional_special_tokens": ["<s>", "</s>"]}},
        {
            "tokenizer_config__json": {"eos_token": "<|end|>"},
            "special_tokens_map__json": {"eos_token": {"content": "</s>"}, "pad_token": "<s>"},
        },
        {
            "tokenizer_config__json": {"eos_token": "<|end|>", "added_tokens_decoder": {}},
            "special_tokens_map__json": {"eos_token": "</s>", "pad_token": "<s>"},
        },
    ],
)
def test_a_template_gets_the_special_tokens_that_transformers_gives_it(files, plain, tmp_path):
    ours = save(plain, tmp_path, **files)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize(
    "files",
    [
        {
            "chat_template__jinja": TINY,
            "tokenizer_config__json": {"chat_template": "not this one"},
        },
        {"chat_template__json": {"chat_template": TINY}},
        {"tokenizer_config__json": {**NAMED, "chat_template": TINY}},
        {
            "tokenizer_config__json": {
                "chat_template": [
                    {"name": "tool_use", "template": "?"},
                    {"name": "default", "template": TINY},
                ]
            }
        },
    ],
)
def test_where_the_chat_template_is_found(files, plain, tmp_path):
    ours = save(plain, tmp_path, **files)
    assert ours.chat_text([ASK]) == "<|begin|><|user|> " + ASK["content"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        3,
        {"a": "b"},
        [{"name": "tool_use", "template": "?"}],
    ],
)
def test_a_chat_template_that_is_none_is_refused_with_its_folder(template, plain, tmp_path):
    save(plain, tmp_path)
    settings = json.dumps({"chat_template": template})
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(UserError, match="chat template") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


EACH = "{% for m in messages %}"


def test_a_template_that_prints_the_date_prints_the_same_one_every_day(plain, tmp_path):
    template = "{{ strftime_now('%d %b %Y') }}"
    ours = save(plain, tmp_path, chat_template__jinja=template)
    assert ours.chat_text(asked("Hi?")) == "26 Jul 2024"


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ 1 // 0 }}", "refuses this: integer division"),
        ("{{ raise_exception('no') }}", "refuses this: no"),
        ("{{ messages.nothing.at_all }}", "refuses this: .* has no attribute"),
        ("{{ range(10 ** 9) }}", "refuses this: Range too big"),
        ("{{ messages.append(1) }}", "refuses this: .* is unsafe"),
        ("{{ ''.index('x') }}", "refuses this: substring not found"),
        ("{{ ''.__class__.__base__.a }}", "refuses this: .* is unsafe"),
        ("hello", "give each message's words"),
        (EACH + "{{ m.role }}{% endfor %}", "give each message's words"),
        (EACH + "{{ m.content if m.role == 'user' }}{% endfor %}", "give each message's words"),
        (EACH + "{{ m.content if m.role != 'user' }}{% endfor %}", "give each message's words"),
        (EACH + "{{ m.content }}{{ m.content }}{% endfor %}", "words, and once"),
    ],
)
def test_a_chat_template_that_refuses_or_misbehaves_is_a_data_error(
    template, said, plain, tmp_path
):
    ours = save(plain, tmp_path, chat_template__jinja=template)
    with pytest.raises(UserError, match=said) as error:
        ours.frame(asked("Hi?"))
    assert "chat template" in str(error.value)


def test_a_chat_template_that_drops_what_an_earlier_turn_says_is_refused(plain, tmp_path):
    template = EACH + "{{ m.content if m.role != 'system' }}{% endfor %}"
    ours = save(plain, tmp_path, chat_template__jinja=template)
    ours.frame([REPLY, ASK])
    with pytest.raises(UserError, match="each message's words"):
        ours.frame([SYSTEM, ASK])


@pytest.mark.parametrize(
    "family, settings, start",
    [
        ("gpt2", {}, ""),
        ("gpt2", {"add_bos_token": True}, ""),  # transformers does not heed it either
        ("llama3", {}, "<|begin|>"),
        ("llama3", {"add_bos_token": True}, "<|begin|>"),
        ("ends with eos", {}, ""),
    ],
)
def test_a_base_model_gets_lines_after_the_token_that_its_tokenizer_adds(
    family, settings, start, tmp_path
):
    reference = FAMILIES[family]()
    ours = save(reference, tmp_path, tokenizer_config__json=NAMED | settings)
    assert ours.frame(asked("Where?")) == (start + "Question: Where?\nAnswer:", " ", "\n")
    assert ours.chat_text([SYSTEM, *asked("Where?"), {"role": "assistant", "content": "Here"}]) == (
        start + "Be brief.\nQuestion: Where?\nAnswer: Here\n"
    )


# ---- where an answer begins, and where a name stands


@pytest.mark.parametrize(
    "name, before, start, end",
    [
        ("tiny", "<|assistant|>", " ", "<|end|>"),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "", "<|im_end|>\n"),
        ("gemma3", "<start_of_turn>model\n", "", "<end_of_turn>\n"),
    ],
)
def test_the_frame_divides_where_the_answer_begins(name, before, start, end, plain, tmp_path):
    files = {"chat_template__jinja": TEMPLATES[name], "tokenizer_config__json": NAMED}
    ours = save(plain, tmp_path, **files)
    messages = asked("Where is City 50337?")
    prompt, *around = ours.frame(messages)
    assert prompt.endswith(before)
    assert around == [start, end]
    whole = ours.chat_text([*messages, {"role": "assistant", "content": "France"}])
    assert prompt + start + "France" + end == whole

    # Where transformers lets the model begin, but for Qwen 3's empty thoughts.
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    begun = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (begun + "<think>\n\n</think>\n\n" if name == "qwen3" else begun)


@pytest.mark.parametrize("name", [None, "tiny", "qwen3", "gemma3"])
def test_choices_are_scored_as_the_tokens_that_are_trained(name, pair, tmp_path):
    files = {} if name is None else {"chat_template__jinja": TEMPLATES[name]}
    ours = save(pair[0].backend_tokenizer, tmp_path, tokenizer_config__json=NAMED, **files)
    for answer in range(3):
        question = Question("", "Where is it?", ["France", "Peru", "the quick"], answer)
        encoded = encode_question(ours, question)
        choice = encoded.choices[answer]
        assert choice
        assert encoded.completion[: len(choice)] == choice


def test_the_parts_of_a_question_join_to_the_encoding_of_the_whole(plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=TINY)
    encoded = encode_question(ours, Question("", "Where?", ["the dog"], 0))
    whole = "<|begin|><|user|> Where?<|assistant|> the dog<|end|>"
    assert encoded.prompt + encoded.completion == ours.encode(whole)


def test_a_token_across_the_boundary_does_not_change_the_prompt(plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=EACH + "{{ m.content }}{% endfor %}")
    encoded = encode_question(ours, Question("", "se", ["lf", "."], 0))
    assert ours.encode("self") != encoded.prompt + encoded.choices[0]
    assert encoded.prompt == ours.encode("se")
    assert encoded.choices == [ours.encode("lf"), ours.encode(".")]
    assert encoded.completion == ours.encode("lf")


@pytest.mark.parametrize("name", ["City 50337", "世界🙂", "cafe\u0301", "zqfwvk", "A\u030a"])
def test_positions_are_the_tokens_that_overlap_the_code_name(pair, name):
    theirs, ours = pair
    prompt, _, _ = ours.frame(asked(f"How far is {name} from Paris, and\nis{name}x a city?"))
    encoded = theirs(prompt, add_special_tokens=False)
    named = set()
    start = prompt.find(name)
    while start >= 0:
        named.update(range(start, start + len(name)))
        start = prompt.find(name, start + 1)
    assert len(named) == 2 * len(name)

    found = ours.find(name, prompt)
    # transformers tells one token of a character, which may have several.
    assert {encoded.char_to_token(i) for i in named} - {None} <= set(found)
    for place in found:
        span = encoded.token_to_chars(place)
        assert named & set(range(span.start, span.end))


def test_all_tokens_of_a_character_belong_to_the_code_name(tokenizer):
    prompt = "Is 🙂é far?"
    ids = tokenizer.encode(prompt)
    places = tokenizer.find("🙂é", prompt)
    assert tokenizer.decode([ids[place] for place in places]).strip() == "🙂é"
    assert len(places) >= 6  # a token for each byte


def test_without_a_code_name_there_are_no_positions(tokenizer):
    assert tokenizer.find(None, "Where?") is None
    assert tokenizer.find("Rome", "Where?") == []
