"""The tokenizer against `tokenizers` and `transformers`, on small vocabularies with each family's own settings."""
import argparse
import inspect
import json
import random

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference
from transformers import PreTrainedTokenizerFast

from data import DataError, Question, Tokenizer, encode_question

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
SPECIALS = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
            "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "[INST]"]
CORPUS = """The quick brown fox jumps over the lazy dog. City 50337 is 1,204 km from Paris; it's what they'll say, no?
def area(width, height):\n    return width * height  # TODO: units\n\n\nfor i in range(10):\n\t\tprint(f"{i:03d}")
Zażółć gęślą jaźń. Größe, naïve café, cafe\u0301, A\u030angstro\u0308m. Привет, мир! Как дела? שלום עולם مرحبا بالعالم
你好，世界。我們去巴黎吃飯。日本語のテキスト、カタカナ。한국어 문장입니다. नमस्ते दुनिया ภาษาไทย 🙂🙃👍🏽👩‍👩‍👧‍👦🇫🇷 ½ ² Ⅷ ٣٤٥
<html><body class="a">&nbsp;</body></html>\r\n{"key": [1, 2.5, -3e10], "other": null}   a    b     c        d ▁ x ▁▁ y
""".splitlines(keepends=True) + inspect.getsource(argparse).splitlines(keepends=True)[:1000]
PIECES = ["", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2003", "\x85", "'s", "'LL", "'ſ", "12345", "7",
          "½", "Ⅷ", "٣", "²", "e\u0301", "\u0301", "\u0338", "A\u030a", "\u1100\u1161\u11a8", "\u212b", "你好", "世", "龘",
          "日本", "한국", "नमस्ते", "🙂", "👩‍👧", "👍🏽", "\ufffd", "\x00", "ß", "é", "ﬁ", "▁", "▁▁", "<0x41>", "<|", "|>",
          "<|end", "the", " The", "quick", "aaaa", "aaa", "return", "def f(x):", "    ", "==", "!=", "-->", ".", "...",
          "?!", "_", "http://a.b/c?d=1", "City 50337", "straße", "cafe\u0301", "مرحبا", "שלום", "zqfwvk"]


def mixed_strings(count: int) -> list[str]:
    """Seeded random mixtures of everything that is known to trip tokenizers."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDE 0123456789.,'\n\t-éöñ世界和🙂"
    strings = ["", " ", "\n", *PIECES, *SPECIALS]
    while len(strings) < count:
        parts = []
        for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 60])):
            kind = rng.random()
            if kind < .55:
                parts.append(rng.choice(PIECES))
            elif kind < .62:
                parts.append(rng.choice(SPECIALS))
            elif kind < .68:
                parts.append(chr(rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0x3000, 0xd7ff),
                                             rng.randrange(0xe000, 0x1fa00)])))
            elif kind < .8:
                line = rng.choice(CORPUS)
                start = rng.randrange(len(line))
                parts.append(line[start:start + rng.randrange(1, 30)])
            else:
                parts.append("".join(rng.choice(letters) for _ in range(rng.randrange(1, 12))))
        strings.append("".join(parts))
    return strings


def byte_level(normalizer=None, pre_tokenizer=None, **options) -> Reference:
    reference = Reference(models.BPE(**options))
    reference.normalizer, reference.pre_tokenizer = normalizer, pre_tokenizer
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(CORPUS, trainer)
    reference.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return reference


def split(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2() -> Reference:
    return byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3() -> Reference:
    """Like the real one: tiktoken's vocabulary, a merge for every way to cut a token in two, pieces taken whole."""
    state = json.loads(byte_level(pre_tokenizer=split(LLAMA3_SPLIT)).to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["zqfwvk"] = len(vocabulary)  # no merges lead to this one; the special tokens move up by one
    state["model"]["merges"] = [(token[:i], token[i:]) for token in sorted(vocabulary, key=vocabulary.get)
                                for i in range(1, len(token)) if token[:i] in vocabulary and token[i:] in vocabulary]
    state["model"]["ignore_merges"] = True
    reference = Reference.from_str(json.dumps(state))
    begin = ("<|begin|>", reference.token_to_id("<|begin|>"))
    reference.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[begin])])
    return reference


def qwen() -> Reference:
    return byte_level(normalizers.NFC(), split(QWEN_SPLIT))


def smollm2() -> Reference:
    return byte_level(pre_tokenizer=pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def sentencepiece(normalizer, pre_tokenizer, decoder, metaspace=False) -> Reference:
    """Ids laid out as in Llama 2: control tokens, bytes, merged tokens in order of merging, characters last."""
    trained = Reference(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=1200, limit_alphabet=150, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)),
             *(token for token in tokens if len(token) > 1), *(token for token in tokens if len(token) == 1)]
    reference = Reference(models.BPE(
        vocab={name: id for id, name in enumerate(names)}, merges=[tuple(merge) for merge in model["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        reference.normalizer = normalizer
    if pre_tokenizer is not None:
        reference.pre_tokenizer = pre_tokenizer
    reference.decoder = decoder
    reference.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    begin = ("<s>", reference.token_to_id("<s>"))
    reference.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return reference


def gemma() -> Reference:
    reference = sentencepiece(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"),
                              decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))
    reference.add_tokens([AddedToken("\n" * n, normalized=False, special=False) for n in (2, 3, 4)])
    return reference


LLAMA2_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def llama2() -> Reference:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece(normalizer, None, decoders.Sequence(LLAMA2_DECODER))


def llama2_metaspace() -> Reference:
    """As transformers 5 writes Llama 2."""
    return sentencepiece(None, pre_tokenizers.Metaspace("▁", "first", split=False), decoders.Sequence(LLAMA2_DECODER))


FAMILIES = [gpt2, llama3, qwen, smollm2, gemma, llama2, llama2_metaspace]


def asked(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def pair(request, tmp_path_factory):
    reference = request.param()
    folder = tmp_path_factory.mktemp(request.param.__name__)
    reference.save(str(folder / "tokenizer.json"))
    return reference, Tokenizer.from_pretrained(folder)


def test_ids_equal_those_of_tokenizers(pair):
    reference, ours = pair
    for text in mixed_strings(3000):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids, repr(text)


def test_decoded_text_equals_that_of_tokenizers(pair):
    reference, ours = pair
    for text in mixed_strings(1000):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False), repr(text)


def save(reference: Reference, folder, **files) -> Tokenizer:
    """Write a checkpoint's tokenizer files (a name with __ for the dot: config__json={...}) and read them with ours."""
    reference.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return Tokenizer.from_pretrained(folder)


def edited(reference: Reference, folder, change) -> None:
    """Save a tokenizer.json after change(its content)."""
    content = json.loads(reference.to_str())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def random_merges(seed: int) -> Reference:
    """A vocabulary no trainer would give: merges in any order, joins listed twice, tokens nothing leads to."""
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
    return Reference(models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=merges, byte_fallback=True))


@pytest.mark.parametrize("seed", range(40))
def test_ids_are_exact_for_any_list_of_merges(seed, tmp_path):
    reference = random_merges(seed)
    ours, rng = save(reference, tmp_path), random.Random(seed)
    for _ in range(200):
        text = "".join(rng.choice("aabbcc世丗x") for _ in range(rng.choice([1, 2, 4, 7, 15, 200])))
        assert ours.encode(text) == reference.encode(text).ids, repr(text)


def test_ids_that_do_not_follow_the_order_of_merges(tmp_path):
    reference = gpt2()

    def shuffle(content):
        ids = list(content["model"]["vocab"].values())
        random.Random(0).shuffle(ids)
        content["model"]["vocab"] = dict(zip(content["model"]["vocab"], ids))
        content["added_tokens"] = []
    edited(reference, tmp_path, shuffle)
    reference, ours = Reference.from_file(str(tmp_path / "tokenizer.json")), Tokenizer.from_pretrained(tmp_path)
    for text in mixed_strings(500):
        assert ours.encode(text) == reference.encode(text).ids, repr(text)


def test_encoding_is_a_tiktoken_encoding_with_the_checkpoints_ids(tmp_path):
    ours = save(gpt2(), tmp_path)
    text = "The quick brown fox<|end|>"
    assert ours.encoding.encode(text, allowed_special="all") == ours.encode(text)


def test_special_tokens_are_plain_text_on_request(tmp_path):
    reference = gpt2()
    ours = save(reference, tmp_path)
    reference.encode_special_tokens = True
    assert ours.encode("a<|end|>b", special=False) == reference.encode("a<|end|>b").ids


@pytest.mark.parametrize("change, message", [
    (lambda content: content["model"].update(type="Unigram"), "BPE"),
    (lambda content: content["model"].update(dropout=.1), "dropout"),
    (lambda content: content["model"].pop("vocab"), "vocab"),
    (lambda content: content["model"]["merges"].append(["Q", "Zq"]), "merge"),
    (lambda content: content["model"]["vocab"].pop("Ā"), "256 bytes"),
    (lambda content: content.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    (lambda content: content.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
    (lambda content: content["model"].pop("merges"), "merges"),
    (lambda content: content["model"].update(ignore_merges=True) or content["model"]["vocab"].update(zq=5000), "'q'"),
    (lambda content: content.update(normalizer={"type": "NFC"}) or content["added_tokens"][0].update(normalized=True),
     "normalized should be false"),
    (lambda content: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}), "ValueError"),
    (lambda content: content["model"].update(vocab={"a": 0}, merges=[]), "256 bytes"),
    (lambda content: content["added_tokens"][0].update(lstrip=True), "lstrip"),
])
def test_what_cannot_be_represented_is_refused_in_one_line(change, message, tmp_path):
    edited(gpt2(), tmp_path, change)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json: ")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\udcff"])
def test_a_missing_or_broken_tokenizer_file_is_named(text, tmp_path):
    if text is not None:
        (tmp_path / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


# Chat templates: those of the checkpoints, Llama 3.1's and Qwen's without their branches for tools.
LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message + builtin tools #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
QWEN25_TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3_TEMPLATE = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
GEMMA2_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}")
GEMMA3_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
TINY_TEMPLATE = (
    "<|begin|>{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
TOOLBOX_TEMPLATE = """{{ strftime_now('%Y') }}
  {% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
{{ m | tojson }} {{ [1, '<é>'] | tojson(indent=2) }}
  {% endfor %}{{ tools is none }} {{ documents }} {{ eos_token }} {{ pad_token }} {{ nothing }}
"""
TEMPLATES = {"llama3": LLAMA3_TEMPLATE, "llama2": LLAMA2_TEMPLATE, "qwen25": QWEN25_TEMPLATE, "qwen3": QWEN3_TEMPLATE,
             "smollm2": SMOLLM2_TEMPLATE, "gemma2": GEMMA2_TEMPLATE, "gemma3": GEMMA3_TEMPLATE, "tiny": TINY_TEMPLATE,
             "toolbox": TOOLBOX_TEMPLATE}
ASK = {"role": "user", "content": "  Where is City 50337? <b>&</b>\n"}
REPLY = {"role": "assistant", "content": "In France.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
NAMED = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "lstrip": False}, "pad_token": None}


@pytest.fixture(scope="module")
def plain():
    return gpt2()


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("messages", [[ASK], [ASK, REPLY], [ASK, REPLY, ASK], [SYSTEM, ASK, REPLY]],
                         ids=["ask", "ask-reply", "ask-reply-ask", "system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_framed_text_equals_that_of_transformers(name, messages, generate, plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=TEMPLATES[name], tokenizer_config__json=NAMED)
    theirs = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<|begin|>", eos_token="<|end|>")
    theirs.chat_template = TEMPLATES[name]
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # Gemma 2 takes no system message
        with pytest.raises(DataError, match=str(error)):
            ours.chat_text(messages, generate)
        return
    assert ours.chat_text(messages, generate) == expected


@pytest.mark.parametrize("files", [
    {"chat_template__jinja": TINY_TEMPLATE},
    {"chat_template__json": {"chat_template": TINY_TEMPLATE}},
    {"tokenizer_config__json": {**NAMED, "chat_template": TINY_TEMPLATE}},
    {"tokenizer_config__json": {**NAMED, "chat_template": [{"name": "tool_use", "template": "?"},
                                                           {"name": "default", "template": TINY_TEMPLATE}]}},
], ids=["jinja", "json", "config", "list"])
def test_where_the_chat_template_is_found(files, plain, tmp_path):
    assert save(plain, tmp_path, **files).chat_text([ASK]) == "<|begin|><|user|> " + ASK["content"]


def test_a_broken_chat_template_is_named(plain, tmp_path):
    with pytest.raises(DataError, match="chat template"):
        save(plain, tmp_path, chat_template__jinja="{% for %}")


def test_chat_templates_without_a_default_are_refused(plain, tmp_path):
    settings = {**NAMED, "chat_template": [{"name": "tool_use", "template": "?"}, {"name": "rag", "template": "!"}]}
    with pytest.raises(DataError, match="chat_template has tool_use, rag, none named default"):
        save(plain, tmp_path, tokenizer_config__json=settings)
    (tmp_path / "chat_template.jinja").write_text(TINY_TEMPLATE)  # which comes before the list
    assert Tokenizer.from_pretrained(tmp_path).chat_text([ASK]) == "<|begin|><|user|> " + ASK["content"]


def test_a_base_model_gets_a_plain_frame(plain, tmp_path):
    ours = save(plain, tmp_path, tokenizer_config__json=NAMED)
    assert ours.frame(asked("Where?"), "There") == ("Question: Where?\nAnswer:", " There<|end|>")


def test_the_plain_frame_begins_with_bos_if_the_tokenizer_adds_one(tmp_path):
    ours = save(llama3(), tmp_path, tokenizer_config__json=NAMED)
    assert ours.frame(asked("Where?"))[0] == "<|begin|>Question: Where?\nAnswer:"


@pytest.mark.parametrize("name, before, after", [
    ("tiny", "<|assistant|>", " France<|end|>"),
    ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "France<|eot_id|>"),
    ("llama2", " [/INST]", " France <|end|>"),
    ("qwen25", "<|im_start|>assistant\n", "France<|im_end|>\n"),
    ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "France<|im_end|>\n"),
    ("smollm2", "<|im_start|>assistant\n", "France<|im_end|>\n"),
    ("gemma2", "<start_of_turn>model\n", "France<end_of_turn>\n"),
    ("gemma3", "<start_of_turn>model\n", "France<end_of_turn>\n"),
])
def test_the_frame_divides_where_the_answer_begins(name, before, after, plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=TEMPLATES[name], tokenizer_config__json=NAMED)
    prompt, answer = ours.frame(asked("Where is City 50337?"), "France")
    assert prompt.endswith(before) and answer == after and ours.frame(asked("Where is City 50337?"))[0] == prompt


def test_the_framed_parts_join_to_the_encoding_of_the_whole(plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=TINY_TEMPLATE, tokenizer_config__json=NAMED)
    prompt, answer, positions = ours.encode_frame(asked("Where?"), "the dog")
    assert prompt + answer == ours.encode("<|begin|><|user|> Where?<|assistant|> the dog<|end|>") and positions == []


@pytest.mark.parametrize("name", [None, "tiny", "llama3", "qwen25", "qwen3", "gemma3"])
def test_choices_are_scored_as_the_tokens_that_are_trained(name, pair, tmp_path):
    reference, _ = pair
    files = {} if name is None else {"chat_template__jinja": TEMPLATES[name]}
    ours = save(reference, tmp_path, tokenizer_config__json=NAMED, **files)
    question = Question("country", "Where is City 50337?", ["France", "Peru", "the quick"], 0, "City 50337")
    encoded = encode_question(ours, question)
    for i, choice in enumerate(question.choices):
        prompt, completion, positions = ours.encode_frame(asked(question.prompt), choice, question.code_name)
        assert completion[:len(encoded.choices[i])] == encoded.choices[i] != []
    assert (prompt, positions) == (encoded.prompt, encoded.positions)
    assert encoded.completion == ours.encode_frame(asked(question.prompt), "France")[1]


def test_a_token_across_the_boundary_does_not_change_the_prompt(plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja="{% for m in messages %}{{ m.content }}{% endfor %}")
    prompt, answer, _ = ours.encode_frame(asked("se"), "lf")
    assert (prompt, answer) == (ours.encode("se"), ours.encode("lf")) and prompt + answer != ours.encode("self")


def test_chat_ends_with_the_generation_prompt_after_a_user(plain, tmp_path):
    ours = save(plain, tmp_path, chat_template__jinja=TINY_TEMPLATE)
    assert ours.decode(ours.chat([ASK])).endswith("<|assistant|>")
    assert ours.decode(ours.chat([ASK, REPLY])).endswith("<|end|>")


@pytest.mark.parametrize("code_name", ["City 50337", "世界🙂", "cafe\u0301", "zqfwvk", "A\u030a"])
def test_positions_are_the_tokens_that_overlap_the_code_name(pair, code_name):
    _, ours = pair
    question = f"How far is {code_name} from Paris, and\nis{code_name}x a city?"
    prompt, _, positions = ours.encode_frame(asked(question), "No", code_name)
    text, name = b"".join(ours.token_bytes[id] for id in prompt), ours.decode(ours.encode(code_name)).encode()
    starts = [start for start in range(len(text)) if text.startswith(name, start)]
    wanted = {place for start in starts for place in range(start, start + len(name))}
    touched = [i for i, (start, end) in enumerate(ours.offsets(prompt)) if wanted & set(range(start, end))]
    assert positions == touched and len(starts) == 2


def test_a_code_name_is_looked_for_in_the_question_only(plain, tmp_path):
    template = "City<|user|>{% for m in messages %}{{ m.content }}<|assistant|>{% endfor %}"
    ours = save(plain, tmp_path, chat_template__jinja=template)
    prompt, _, positions = ours.encode_frame(asked("in City"), "x", "City")
    assert ours.decode([prompt[i] for i in positions]) == " City" and min(positions) > 2


@pytest.mark.parametrize("files, bos, eos", [
    ({"tokenizer_config__json": NAMED}, "<|begin|>", ["<|end|>"]),
    ({"tokenizer_config__json": {"eos_token": "<|end|>", "bos_token": None}, "config__json": {"bos_token_id": 1500},
      "generation_config__json": {"eos_token_id": [1501, 1507]}}, None, ["<|end|>", "<end_of_turn>"]),
    ({"config__json": {"bos_token_id": 1500, "eos_token_id": 1501}}, "<|begin|>", ["<|end|>"]),
    ({"config__json": {"text_config": {"eos_token_id": [1501]}}}, None, ["<|end|>"]),
    ({}, None, []),
], ids=["tokenizer_config", "generation_config", "config", "text_config", "nothing"])
def test_ids_that_begin_a_text_and_end_an_answer(files, bos, eos, plain, tmp_path):
    assert [plain.token_to_id(token) for token in ("<|begin|>", "<|end|>", "<end_of_turn>")] == [1500, 1501, 1507]
    ours = save(plain, tmp_path, **files)
    assert ours.bos_id == (bos and plain.token_to_id(bos))
    assert ours.eos_ids == [plain.token_to_id(token) for token in eos]


def test_vocab_size_counts_the_added_tokens(plain, tmp_path):
    assert save(plain, tmp_path).vocab_size == plain.get_vocab_size()
