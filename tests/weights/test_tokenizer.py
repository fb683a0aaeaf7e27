import shutil
import subprocess
import sys

import numpy as np
import pytest

from fmda.errors import UserError
from fmda.weights.load import load_clip
from fmda.weights.source import assets_folder
from fmda.weights.tokenizer import Tokenizer

START, END = 517, 518


@pytest.fixture(scope="module")
def words(tokenizer_folder):
    return Tokenizer(tokenizer_folder, END, 519)


def test_ids_are_cut_to_the_longest_text_and_padded_with_zeros(words):
    ids = words(["a road", "A  ROAD car "], 12)
    assert ids.dtype == np.int32 and ids.shape == (2, 5)
    assert ids[0].tolist()[0] == START and ids[0].tolist()[3:] == [END, 0]
    assert ids[0, 1:3].tolist() == ids[1, 1:3].tolist()


def test_a_given_context_is_kept_and_long_texts_keep_their_end(words):
    assert words(["a"], 12, 8).shape == (1, 8)
    long = words(["road " * 30], 12)
    assert long.shape == (1, 12) and long[0, 0] == START and long[0, -1] == END
    assert words(["road car road"], 12, 3)[0].tolist()[::2] == [START, END]


def test_a_context_beyond_the_model_is_a_user_error(words):
    with pytest.raises(UserError, match="context: 13 is not in 2..12"):
        words(["a"], 12, 13)


def test_no_texts_give_no_rows(words):
    assert words([], 12).shape[0] == 0


def test_two_files_serve_as_well_as_one(tokenizer_folder, words, tmp_path):
    import json

    model = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    texts = ["A road, of cars!", "it's 25 o'clock"]
    np.testing.assert_array_equal(Tokenizer(tmp_path, END, 519)(texts, 40), words(texts, 40))
    assert [path.name for path in Tokenizer(tmp_path, END, 519).files()] == ["vocab.json", "merges.txt"]


def test_a_larger_vocabulary_than_the_models_is_a_user_error(tokenizer_folder):
    with pytest.raises(UserError, match="519 tokens, the model 100; take both"):
        Tokenizer(tokenizer_folder, 2, 100)


def test_with_the_end_of_old_configurations_the_tokenizer_must_be_as_large_as_the_model(tokenizer_folder, tmp_path):
    assert Tokenizer(tokenizer_folder, 2, 519).vocab_size == 519
    with pytest.raises(UserError, match="ends sentences with id 518, the model reads them off at 49407; take both"):
        Tokenizer(tokenizer_folder, 2, 49408)
    # words that were added, as for textual inversion, come after the end
    from transformers import CLIPTokenizer

    more = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    more.add_tokens(["<street>"])
    more.save_pretrained(tmp_path)
    assert Tokenizer(tmp_path, 2, 520).vocab_size == 520
    with pytest.raises(UserError, match="ends sentences with id 518, the model reads them off at 520; take both"):
        Tokenizer(tmp_path, 2, 521)


def test_the_packaged_tokenizer_goes_with_its_text_tower():
    folder = assets_folder() / "street-clip"
    assert Tokenizer(folder, 1023, 1024).vocab_size == Tokenizer(folder, 2, 1024).vocab_size == 1024


def test_shorter_contexts_give_the_same_embeddings(folder):
    clip = load_clip(folder)
    texts = ["a road", "car"]
    short, full = clip.tokenize(texts), clip.tokenize(texts, context=12)
    assert short.shape[1] < full.shape[1] == 12
    np.testing.assert_allclose(clip.encode_text(short), clip.encode_text(full), atol=1e-6)


def test_loading_needs_no_torch_and_prints_nothing(folder, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; from fmda.weights.load import load_clip; "
        f"print(load_clip({str(shutil.copytree(folder, tmp_path / 'copy'))!r}).tokenize(['a road']).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[[517, ") and done.stderr == ""
