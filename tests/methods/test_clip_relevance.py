"""CDPruner's relevance by CLIP: which words are embedded as the question, and how long ones are cut."""

from __future__ import annotations

import pytest
import torch
from methods.clip import TEMPLATES, behind, clip, ids, relevance, tokenizer
from PIL import Image

import vlmprune as vp
from vlmprune import tiny

templates = pytest.mark.parametrize("name", TEMPLATES)


QUESTIONS = [
    "What is this?",
    "Where is the ASSISTANT of the USER: here, or there?",
    "Wo? Über «dem» Baum — 3.14!",
    "Why?\nTell me.",
]


@templates
@pytest.mark.parametrize("ask", [True, False], ids=["asked", "not asked"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_bare_question_is_found(name, ask, question):
    """Red: the template's own words (" ASSISTANT:") are embedded with the question."""
    found = relevance(TEMPLATES[name]).asked(ids(behind(name, question, ask=ask)))
    assert found == question


@templates
def test_the_last_question_of_a_conversation(name):
    told = relevance(TEMPLATES[name])
    assert told.asked(ids(behind(name, "Is it red?", "No, blue.", "And what is it?"))) == "And what is it?"
    assert told.asked(ids(behind(name, "Is it red?", "No.", "Is it blue?", "Yes.", "Is it a car?"))) == "Is it a car?"
    assert told.asked(ids(behind(name, "Is it red?", "No.", "And what is it?", ask=False))) == "And what is it?"
    begun = behind(name, "Is it red?") + " It is"  # an answer that was begun
    assert told.asked(ids(begun)) == "Is it red?"
    begun = behind(name, "Is it red?", "No.", "And what is it?") + " It is"
    assert told.asked(ids(begun)) == "And what is it?"
    spaced = behind(name, "Is it red?", "No.", "And what is it?").replace("</s>", " </s> ").replace("[", " [")
    assert told.asked(ids(spaced)) == "And what is it?"  # as tokenizers write special tokens


def test_without_a_template_all_words_are_embedded():
    """There is nothing to tell the question by; and the words are what `decode` gives without special tokens."""
    assert relevance().asked(ids("\nWhat is this? ASSISTANT:")) == "\nWhat is this? ASSISTANT:"


def test_a_given_question_is_taken_as_it_is():
    assert relevance(TEMPLATES["llava"], question="What  is\nthis?").asked(ids("\nAnything ASSISTANT:")) == "What  is\nthis?"
    first = relevance(TEMPLATES["llava"], question=lambda text: text.split("?")[0].strip() + "?")
    assert first.asked(ids("\nWhat is this? Answer in one word. ASSISTANT:")) == "What is this?"
    with pytest.raises(vp.UsageError, match=r"finds no question in the text after the picture by question=…"):
        relevance(question=lambda text: "").asked(ids("What is this?"))


@pytest.mark.parametrize("given", [3, "", "  ", ["What?"]])
def test_other_questions_are_refused_at_once(given):
    with pytest.raises(vp.UsageError, match="question must be a text, or a function"):
        relevance(question=given)


@pytest.mark.parametrize(("name", "text"), [("mistral", "\nWhat is this?"), ("llava", "\n ASSISTANT:"), ("chatml", "\nWhat?")])
def test_no_question_no_answer(name, text):
    """A prompt that the template did not write, or with nothing behind the picture: never other words in silence."""
    with pytest.raises(vp.UsageError, match=r"finds no question .* by the chat template, found .*give it as ClipRelevance"):
        relevance(TEMPLATES[name]).asked(ids(text))


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "hello", "{{ messages[0]['colour'] + 'x' }}"])
def test_a_template_that_shows_no_questions_is_refused_at_once(template):
    with pytest.raises(vp.UsageError, match="cannot find questions by this chat template"):
        relevance(template)
    assert relevance(template, question="What?").asked(ids("x")) == "What?"


def test_a_processor_holds_the_template_too():
    """The embedded model's processor, whose template is its own and whose tokenizer has none."""
    _, processor = tiny.load("cpu")
    told = vp.ClipRelevance(clip(), tokenizer(marks=True), processor)
    words = processor.tokenizer("what color is the circle? ASSISTANT:", add_special_tokens=False)["input_ids"]
    bare = processor.tokenizer.decode(processor.tokenizer("what color is the circle?", add_special_tokens=False)["input_ids"])
    assert told.asked(torch.tensor(words)).split() == bare.split()


def test_scores_are_of_the_bare_question():
    """Of two questions of unlike lengths in one batch, each as if it were given alone and bare."""
    patches, texts = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2)), ["What is this?", "Is it a red car?"]
    rows = [ids(behind("llava", text)) for text in texts]
    longest = max(map(len, rows))
    padded = torch.stack([torch.cat((row.new_zeros(longest - len(row)), row)) for row in rows])
    valid = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
    found = relevance(TEMPLATES["llava"])(patches, padded, valid)
    for image, text in enumerate(texts):
        alone = relevance(question=text)(patches[image : image + 1], rows[image][None], torch.ones(1, len(rows[image])).bool())
        torch.testing.assert_close(found[image], alone[0])
    whole = relevance()(patches, padded, valid)
    assert not torch.allclose(whole, found, atol=1e-3)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_every_piece_of_a_long_question_counts(changed):
    """Longer than CLIP reads: every piece has marks of its own, so that what it says matters, the first piece's too."""
    patches = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(3))
    pieces = ["abcdefgh", "ijklmnop", "qrs"]
    other = [*pieces[:changed], pieces[changed].upper(), *pieces[changed + 1 :]]

    def score(parts: list[str]) -> torch.Tensor:
        return relevance(longest=10, question="".join(parts))(patches, torch.zeros(1, 1).long(), torch.ones(1, 1).bool())

    assert not torch.allclose(score(pieces), score(other), atol=1e-4)
    apart = [relevance(longest=10, question=piece) for piece in pieces]
    mean = torch.stack([one(patches, torch.zeros(1, 1).long(), torch.ones(1, 1).bool()) for one in apart]).mean(0)
    torch.testing.assert_close(score(pieces), mean)


def test_in_a_model_with_its_processor():
    """The embedded VLM: the question is found in a live prompt, in a batch as alone."""
    model, processor = tiny.load("cpu")
    width = model.config.vision_config.hidden_size
    texts = ["what color is the circle?", "how many red squares are there?"]
    written = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}], add_generation_prompt=True
        )
        for text in texts
    ]
    processor.tokenizer.padding_side = "left"
    size = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))

    def inputs(rows: list[int]):
        blank = [Image.new("RGB", (size, size)) for _ in rows]
        made = processor(text=[written[row] for row in rows], images=blank, return_tensors="pt", padding=True)
        return {**made, "pixel_values": pixels[rows]}

    def chosen(rows: list[int], **question):
        scorer = vp.ClipRelevance(clip(width), tokenizer(marks=True), processor, **question)
        with vp.wrap(model, vp.CDPruner(tokens=20, relevance=scorer)) as run, torch.no_grad():
            model(**inputs(rows))
        return [kept.index.tolist() for kept in run.last.kept]

    bare = [
        " ".join(processor.tokenizer.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True).split())
        for text in texts
    ]
    alone = [chosen([row], question=bare[row])[0] for row in range(2)]
    assert chosen([0, 1]) == alone
    assert chosen([0]) + chosen([1]) == alone
