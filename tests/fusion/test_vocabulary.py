"""Vocabularies: computing, storing, and errors."""

import hashlib
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from makers import fork, was_killed

from regionspot.cache.errors import InputError, WeightsError
from regionspot.fusion.templates import TEMPLATES, template_set
from regionspot.fusion.vocabulary import PROMPTS_PER_CALL, build_vocabulary, vocabulary_folder


class LetterEncoder:
    """A fake text encoder: the embedding of a prompt is random, seeded by its bytes. Records the prompts."""

    name = "letters"
    weights_sha256 = "0" * 64

    def __init__(self):
        self.prompts = []

    def embed_prompts(self, prompts):
        self.prompts += prompts
        return torch.stack([self.embed(prompt) for prompt in prompts])

    @staticmethod
    def embed(prompt):
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4])
        return 3 * torch.randn(6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoder():
    return LetterEncoder()


def test_an_embedding_is_the_normalised_mean_of_the_raw_embeddings(home, encoder):
    templates = ("{}.", "a photo of a {}.", "many {}.")
    vocabulary = build_vocabulary(["dog", "red umbrella"], templates, encoder)
    mean = torch.stack([encoder.embed(template.replace("{}", "red umbrella")) for template in templates]).mean(dim=0)
    torch.testing.assert_close(vocabulary.embeddings[1], F.normalize(mean, dim=0))
    assert vocabulary.embeddings.dtype == torch.float32


def test_names_reach_the_encoder_verbatim(home, encoder):
    build_vocabulary(["aerosol_can", "barge (boat)", "{curly}"], ["a {}."], encoder)
    assert encoder.prompts == ["a aerosol_can.", "a barge (boat).", "a {curly}."]


def test_a_repeated_name_is_encoded_once_and_keeps_both_indices(home, encoder):
    vocabulary = build_vocabulary(["crane", "dog", "crane"], ["{}."], encoder)
    assert encoder.prompts == ["crane.", "dog."]
    assert torch.equal(vocabulary.embeddings[0], vocabulary.embeddings[2])
    assert len(vocabulary) == 3


def test_a_stored_vocabulary_is_not_computed_again(home, encoder):
    first = build_vocabulary(["dog", "cat"], ["{}."], encoder)
    again = build_vocabulary(["dog", "cat"], ["{}."], encoder)
    assert encoder.prompts == ["dog.", "cat."]
    assert torch.equal(first.embeddings, again.embeddings)
    assert [path.stem for path in vocabulary_folder().iterdir()] == [first.digest]
    assert vocabulary_folder().parent == home


def test_the_digest_depends_on_name_order_templates_and_weights(tmp_path, encoder):
    other = LetterEncoder()
    other.weights_sha256 = "1" * 64
    built = [
        build_vocabulary(["dog", "cat"], ["{}."], encoder, tmp_path),
        build_vocabulary(["cat", "dog"], ["{}."], encoder, tmp_path),
        build_vocabulary(["dog", "cat"], ["a {}."], encoder, tmp_path),
        build_vocabulary(["dog", "cat"], ["{}."], other, tmp_path),
    ]
    assert len({vocabulary.digest for vocabulary in built}) == 4


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + b"\xff"])
def test_a_damaged_vocabulary_file_is_computed_again_and_replaced(tmp_path, encoder, damage, caplog):
    first = build_vocabulary(["dog", "cat"], ["{}."], encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = build_vocabulary(["dog", "cat"], ["{}."], encoder, tmp_path)
    assert torch.equal(first.embeddings, again.embeddings)
    assert "damaged" in caplog.text
    build_vocabulary(["dog", "cat"], ["{}."], encoder, tmp_path)
    assert len(encoder.prompts) == 4


def test_a_store_that_cannot_be_written_logs_a_warning(tmp_path, encoder, caplog):
    (tmp_path / "file").write_text("in the way")
    vocabulary = build_vocabulary(["dog"], ["{}."], encoder, tmp_path / "file" / "store")
    assert len(vocabulary) == 1
    assert "cannot be written" in caplog.text


def test_the_number_of_prompts_per_call_is_limited(tmp_path):
    class Counting(LetterEncoder):
        def embed_prompts(self, prompts):
            self.prompts.append(len(prompts))
            return torch.stack([torch.full((2,), float(len(prompt))) for prompt in prompts])

    encoder = Counting()
    build_vocabulary([f"name {i}" for i in range(5000)], ["{}.", "a {}.", "the {}."], encoder, tmp_path)
    assert sum(encoder.prompts) == 15_000
    assert max(encoder.prompts) <= PROMPTS_PER_CALL


def test_the_embedding_of_synonyms_is_the_mean_over_all_of_their_prompts(tmp_path, encoder):
    texts = [["sofa", "couch", "lounge"], ["lounge"]]
    vocabulary = build_vocabulary(["sofa", "lounge"], ["{}.", "a {}."], encoder, tmp_path, texts=texts)
    raw = [encoder.embed(prompt) for text in texts[0] for prompt in (f"{text}.", f"a {text}.")]
    torch.testing.assert_close(vocabulary.embeddings[0], F.normalize(torch.stack(raw).mean(dim=0), dim=0))
    assert len(encoder.prompts) == 6  # "lounge" once
    assert vocabulary.names == ("sofa", "lounge")
    assert vocabulary.digest != build_vocabulary(["sofa", "lounge"], ["{}.", "a {}."], encoder, tmp_path).digest


class KilledEncoder:
    """Kills its process at the call with number `killed_at`. Records the number of prompts of each call."""

    name = "killed"
    weights_sha256 = "0" * 64

    def __init__(self, killed_at=None):
        self.killed_at, self.calls = killed_at, []

    def embed_prompts(self, prompts):
        self.calls.append(len(prompts))
        if len(self.calls) == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([[len(prompt), prompt.encode()[-2], 1] for prompt in prompts], dtype=torch.float32)


def test_a_killed_computation_resumes_at_the_first_missing_chunk(tmp_path):
    names, templates = [f"name {i}" for i in range(10_000)], ["{}.", "a {}.", "the {}."]
    pid = fork(lambda: build_vocabulary(names, templates, KilledEncoder(killed_at=3), tmp_path / "killed"))
    assert was_killed(pid)
    resumed, whole = KilledEncoder(), KilledEncoder()
    vocabulary = build_vocabulary(names, templates, resumed, tmp_path / "killed")
    uninterrupted = build_vocabulary(names, templates, whole, tmp_path / "whole")
    assert torch.equal(vocabulary.embeddings, uninterrupted.embeddings)
    assert (len(whole.calls), resumed.calls) == (4, whole.calls[2:])
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [f"{vocabulary.digest}.safetensors"]


def test_a_damaged_chunk_is_computed_again(tmp_path, caplog):
    names = [f"name {i}" for i in range(10_000)]
    assert was_killed(fork(lambda: build_vocabulary(names, ["{}."], KilledEncoder(killed_at=2), tmp_path)))
    (chunk,) = tmp_path.glob("*.chunks/*")
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\xff")
    encoder = KilledEncoder()
    build_vocabulary(names, ["{}."], encoder, tmp_path)
    assert len(encoder.calls) == 2
    assert "damaged" in caplog.text


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}."], "no names"),
        (["dog", " "], ["{}."], "name 2 of 2"),
        (["dog"], [], "no templates"),
        (["dog"], ["an image"], "'an image' has no '{}'"),
        (["dog"], ["{}.", "{}."], "given twice"),
    ],
)
def test_an_invalid_vocabulary_is_refused_in_one_line(tmp_path, encoder, names, templates, message):
    with pytest.raises(InputError) as error:
        build_vocabulary(names, templates, encoder, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_embeddings_that_are_not_finite_are_refused_and_not_saved(tmp_path, encoder):
    encoder.embed_prompts = lambda prompts: torch.full((len(prompts), 4), float("nan"))
    with pytest.raises(WeightsError, match="not finite"):
        build_vocabulary(["dog"], ["{}."], encoder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_reference_templates_are_the_plain_one_and_openais_80():
    assert len(TEMPLATES["imagenet"]) == 80
    assert set(TEMPLATES["reference"]) == {"{}.", *TEMPLATES["imagenet"]}
    assert all(template.count("{}") == 1 for template in TEMPLATES["reference"])
    assert "itap of my {}." in TEMPLATES["imagenet"]


def test_the_error_for_an_unknown_template_set_lists_the_sets():
    with pytest.raises(InputError, match="reference, imagenet, plain"):
        template_set("fancy")


def test_fusion_imports_without_open_clip():
    code = "import sys, regionspot.fusion, regionspot.fusion.vocabulary; print('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
