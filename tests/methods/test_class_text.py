"""The text table and its classifiers."""

import numpy as np
import pytest

from fmda.data import class_list, prompts, templates
from fmda.errors import UserError
from fmda.methods import class_text as text


class Letters:
    """An encoder that can be checked by hand: counts of letters, plus one."""

    fingerprint, dtype = "letters", "float32"

    def __init__(self):
        self.encoded = 0

    def tokenize(self, texts):
        width = max(map(len, texts))
        return np.asarray([[ord(c) for c in t.ljust(width)] for t in texts], np.int32)

    def encode_text(self, ids):
        self.encoded += len(ids)
        return np.stack([(np.asarray(ids) == ord(c)).sum(1) + 1 for c in "abcdefgh"], 1).astype(np.float32)


def _vectors(templates, queries):
    vectors = np.random.default_rng(0).normal(size=(templates, queries, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _table(clip, queries, bank, cache):
    return text.text_embeddings(clip, text.prompt_ids(clip, queries, bank), cache=cache)


def test_table_of_unique_prompts_is_kept_on_disk(tmp_path):
    clip = Letters()
    queries = text.Queries(("bad", "cab", "bad"), (0, 1, 2))
    bank = ("a {}.", "the {}!")
    first = _table(clip, queries, bank, tmp_path)
    assert first.shape == (2, 3, 8) and clip.encoded == 4
    vector = np.asarray([3, 2, 1, 2, 1, 1, 1, 1], np.float32)  # "a bad."
    np.testing.assert_allclose(first[0, 0], vector / np.linalg.norm(vector), rtol=1e-6)
    np.testing.assert_array_equal(first[:, 0], first[:, 2])
    again = _table(clip, queries, bank, tmp_path)
    np.testing.assert_array_equal(first, again)
    assert clip.encoded == 4 and len(list(tmp_path.glob("*.safetensors"))) == 1
    _table(clip, queries, bank[:1], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_another_tokenizer_of_the_same_weights_has_its_own_table(tmp_path):
    """The table was keyed by weights and prompts alone, so a replaced tokenizer was ignored."""
    clip, queries = Letters(), text.Queries(("bad",), (0,))
    first = _table(clip, queries, ("a {}",), tmp_path)
    clip.tokenize = lambda texts: Letters.tokenize(clip, [t.replace("b", "h") for t in texts])
    assert not np.array_equal(_table(clip, queries, ("a {}",), tmp_path), first)


def test_damaged_or_unwritable_cache_is_no_error(tmp_path):
    clip, queries = Letters(), text.Queries(("bad",), (0,))
    first = _table(clip, queries, ("a {}",), tmp_path)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"nonsense")
    np.testing.assert_array_equal(_table(clip, queries, ("a {}",), tmp_path), first)
    (tmp_path / "file").write_text("")
    np.testing.assert_array_equal(_table(clip, queries, ("a {}",), tmp_path / "file" / "x"), first)


def test_templates_without_a_slot_or_twice_are_refused():
    with pytest.raises(UserError, match="exactly one slot"):
        text.prompt_ids(Letters(), text.Queries(("a",), (0,)), ("a photo",))
    with pytest.raises(UserError, match="occurs twice"):
        text.prompt_ids(Letters(), text.Queries(("a",), (0,)), ("a {}", "a {}"))


def test_the_bank_is_the_published_one():
    expected = "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af"
    assert text.template_hash(templates("imagenet80")) == expected


def test_voc_has_thirty_queries_for_naclip():
    queries = text.Queries.of(prompts(class_list("voc20"), "naclip"))
    assert len(queries.names) == 30 and len(set(queries.classes)) == 20
    assert list(queries.classes) == sorted(queries.classes)


def test_experts_are_means_of_the_chosen_templates():
    words = _vectors(6, 3)
    chosen = ((0, 2), (5,), ())
    plain = text.expert_classifiers(words, chosen, (0, 1, 2), renormalise=False)
    assert plain.shape == (4, 3, 16)
    np.testing.assert_allclose(plain[0], words[[0, 2]].mean(0), atol=1e-6)
    np.testing.assert_allclose(plain[1], words[5], atol=1e-6)
    np.testing.assert_allclose(plain[2], words.mean(0), atol=1e-6)  # nothing chosen: the ordinary classifier
    np.testing.assert_array_equal(plain[2], plain[3])
    unit = text.expert_classifiers(words, chosen, (0, 1, 2), renormalise=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit[-1], text.default_classifier(words), atol=1e-6)


def test_synonyms_inherit_their_class_s_templates():
    words = _vectors(4, 3)
    found = text.expert_classifiers(words, ((1,), (3,)), (0, 0, 1), renormalise=False)
    np.testing.assert_allclose(found[0], found[1])
    np.testing.assert_allclose(found[2], words[3], atol=1e-6)
    with pytest.raises(UserError, match="experts for 1 classes"):
        text.expert_classifiers(words, ((1,),), (0, 0, 1), renormalise=False)
