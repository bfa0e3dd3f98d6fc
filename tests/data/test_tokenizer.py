"""Every tokenizer on real vocabularies built here, against the libraries' own answers."""

import json
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from megafp4.data.tokenizer import ByteTokenizer, get_tokenizer
from megafp4.errors import ConfigError, DataError, UnsupportedError

TEXTS = [
    "",
    "the cat sat on the mat, and the other cat's hat",
    "  two  spaces\n\n\tand tabs ",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f642",
    "<|endoftext|> </s> are only characters here",
]
SENTENCES = ["the cat sat on the mat", "the other cat has a hat", "that is the theme of the thing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE, trained here, as tokenizer.json and as GPT-2's two pairs of files."""
    import tokenizers

    folder = tmp_path_factory.mktemp("vocabulary")
    bpe = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(SENTENCES * 20, vocab_size=300, min_frequency=2, show_progress=False)
    plain = json.loads(bpe.to_str())["model"]
    # GPT-2 numbers the 256 bytes in the order of the characters that stand for them.
    merges = [tuple(pair) for pair in plain["merges"]]
    letters = bytes_in_order()
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    model = tokenizers.models.BPE(vocab=dict(vocabulary), merges=merges)
    whole = tokenizers.Tokenizer(model)
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    whole.add_special_tokens(["<|endoftext|>"])
    (folder / "json").mkdir()
    whole.save(str(folder / "json" / "tokenizer.json"))
    lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""])
    for name, first, second in (
        ("gpt2", "encoder.json", "vocab.bpe"),
        ("hf", "vocab.json", "merges.txt"),
    ):
        (folder / name).mkdir()
        content = {**vocabulary, "<|endoftext|>": len(vocabulary)}
        indent = 1 if name == "hf" else None
        (folder / name / first).write_text(json.dumps(content, indent=indent), encoding="utf-8")
        (folder / name / second).write_text(lines, encoding="utf-8")
    return folder


def bytes_in_order():
    """GPT-2's 256 one-character tokens: printable Latin-1 as itself, the rest from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(len(hidden))]


@given(characters=st.lists(st.integers(0, 0x10FFFF), max_size=60))
def test_bytes_round_trip(characters):
    text = "".join(map(chr, characters))
    tokenizer = ByteTokenizer()
    try:
        expected = list(text.encode())
    except UnicodeEncodeError:
        with pytest.raises(DataError, match="surrogate"):
            tokenizer.encode(text)
        return
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes():
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.identity) == (257, 256, "bytes")
    assert tokenizer.encode("a\u00e9").dtype == np.int32
    assert tokenizer.decode([104, 105, 256, 255]) == "hi\ufffd"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["gpt2", "hf"])
def test_gpt2_files_equal_the_other_library(folder, name, text):
    tokenizer = get_tokenizer(str(folder / name))
    other = get_tokenizer(str(folder / "json"))
    assert tokenizer.encode(text).tolist() == other.encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text == other.decode(other.encode(text))
    assert tokenizer.eod == other.eod == tokenizer.vocab_size - 1
    assert tokenizer.eod not in tokenizer.encode(text)
    assert tokenizer.eod not in other.encode(text)


def test_identity_is_of_content_not_of_files(folder, tmp_path):
    one, two = (get_tokenizer(str(folder / name)) for name in ("gpt2", "hf"))
    assert one.identity == two.identity
    assert one.identity.startswith("bpe-")
    assert get_tokenizer(str(folder / "gpt2" / "vocab.bpe")).identity == one.identity
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes((folder / "json" / "tokenizer.json").read_bytes())
    assert get_tokenizer(str(copy)).identity == get_tokenizer(str(folder / "json")).identity


def test_gpt2_needs_no_files_until_it_encodes():
    """Training on token files asks only for the size of the vocabulary."""
    tokenizer = get_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.identity) == (50257, 50256, "gpt2")


def test_gpt2_offline(monkeypatch, tmp_path):
    import requests

    def unreachable(url, **options):
        raise requests.ConnectionError(f"no route to {url}")

    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(DataError, match=r"cannot load GPT-2's vocabulary .*set data.tokenizer to"):
        get_tokenizer("gpt2").encode("hello")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.bpe", "#version: 0.2\nt h e\n"),
        ("vocab.bpe", "#version: 0.2\n\u65e5 \u672c\n"),
        ("vocab.bpe", "#version: 0.2\nt q\n"),
        ("encoder.json", "{"),
        ("encoder.json", "[]"),
        ("encoder.json", '{"a": 0}'),
    ],
)
def test_damaged_gpt2_files(folder, tmp_path, name, content):
    for file in ("encoder.json", "vocab.bpe"):
        (tmp_path / file).write_bytes((folder / "gpt2" / file).read_bytes())
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"not one byte-level BPE|is not JSON|not an object"):
        get_tokenizer(str(tmp_path))


def test_json_tokenizer_takes_its_end_from_the_configuration(folder, tmp_path):
    content = (folder / "json" / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    vocabulary = get_tokenizer(str(folder / "gpt2")).vocab_size
    for eos in ("t", {"content": "t"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        tokenizer = get_tokenizer(str(tmp_path))
        assert tokenizer.decode([tokenizer.eod]) == "t"
        assert tokenizer.vocab_size == vocabulary
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "absent"}))
    with pytest.raises(DataError, match="no end-of-document token"):
        get_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["{}", '{"model": 3}', "no json", "[]"])
def test_damaged_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer.json"):
        get_tokenizer(str(tmp_path))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    for name, eos in (("tokenizer", 2), ("endless", -1)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 10),
            model_prefix=str(folder / name),
            vocab_size=40,
            model_type="bpe",
            eos_id=eos,
            minloglevel=2,
            num_threads=1,
        )
    return folder


def test_sentencepiece(sentencepiece_model):
    import sentencepiece

    tokenizer = get_tokenizer(str(sentencepiece_model / "tokenizer.model"))
    library = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_model / "tokenizer.model")
    )
    assert (tokenizer.vocab_size, tokenizer.eod) == (40, 2)
    assert tokenizer.encode(SENTENCES[0]).tolist() == library.encode(SENTENCES[0])
    assert tokenizer.decode(tokenizer.encode(SENTENCES[1])) == SENTENCES[1]
    assert tokenizer.eod not in tokenizer.encode("an </s> is only characters")
    assert get_tokenizer(str(sentencepiece_model)).identity == tokenizer.identity


def test_sentencepiece_errors(sentencepiece_model, tmp_path):
    with pytest.raises(DataError, match="without an </s>"):
        get_tokenizer(str(sentencepiece_model / "endless.model"))
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        get_tokenizer(str(tmp_path / "bad.model"))


def test_unknown_names(tmp_path):
    with pytest.raises(
        ConfigError, match="unknown tokenizer 'gpt3': choose bytes, gpt2, or the path"
    ):
        get_tokenizer("gpt3")
    with pytest.raises(DataError, match="holds no tokenizer"):
        get_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "module"),
    [("gpt2", "tiktoken"), ("json", "tokenizers"), ("tokenizer.model", "sentencepiece")],
)
def test_missing_libraries_name_the_extra(folder, sentencepiece_model, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    path = (sentencepiece_model if "." in name else folder) / name
    with pytest.raises(
        UnsupportedError, match=rf"{module}, which is not installed: .*megafp4\[data\]"
    ):
        get_tokenizer(str(path))


def test_unknown_ids_are_not_decoded(folder):
    tokenizer = get_tokenizer(str(folder / "json"))
    for ids in ([tokenizer.vocab_size], [-1]):
        with pytest.raises(DataError, match="cannot be decoded"):
            tokenizer.decode(ids)
    assert tokenizer.decode([]) == ""
