"""The small tokenizer: CLIP's conventions, every text encodable, same texts same files."""

from transformers import AutoTokenizer

from fmda.methods.pretrain.tokenizer import train_tokenizer

TEXTS = [f"a {look} photo of a {name}." for look in ("dark", "bright") for name in ("car", "traffic light", "road")]


def test_words_of_the_corpus_are_single_tokens(tmp_path):
    train_tokenizer(TEXTS * 20, 640, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("A  dark photo of a TRAFFIC light.").input_ids)
    words = ["a</w>", "dark</w>", "photo</w>", "of</w>", "a</w>", "traffic</w>", "light</w>", ".</w>"]
    assert tokens == ["<|startoftext|>", *words, "<|endoftext|>"]


def test_unseen_words_are_spelled_not_lost(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 640, tmp_path)
    ids = tokenizer("zebra 77 quiz!").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "zebra77quiz!"


def test_same_texts_in_any_order_give_the_same_files(tmp_path):
    train_tokenizer(TEXTS, 640, tmp_path / "a")
    train_tokenizer(TEXTS[::-1], 640, tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
