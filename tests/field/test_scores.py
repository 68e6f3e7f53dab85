"""Transcripts that are right in every word and written in another form."""

import pytest

from common.data.audit import audit
from common.evaluation.wer import score
from common.text import mend, normalise, odd_forms
from tests.field.tables import cells, imported

# language, reference, hypothesis: alike to anybody who listens.
ALIKE = [
    ("en", "Don’t say you can’t, it’s fine", "don't say you can't, it's fine"),
    ("en", "I don`t know", "I don't know"),
    ("en", "don＇t", "don't"),
    ("en", "It… well... it works", "It well it works"),
    ("en", "ｄｏｎ’ｔ　ｇｏ　１２", "don't go 12"),
    ("en", "zero\u200bwidth and so\u00adft", "zerowidth and soft"),
    ("tr", "İSTANBUL IŞIK", "istanbul ışık"),
    ("tr", "İstanbul", "istanbul"),
    ("az", "İki", "iki"),
    ("ro", "şi ţară", "și țară"),
    ("ar", "مُحَمَّد ٣", "محمد 3"),
    ("he", "שָׁלוֹם", "שלום"),
    ("fa", "كتاب مي\u200cخواهم", "کتاب می خواهم"),
    ("uk", "мʼята", "м'ята"),
    ("hi", "२०२४", "2024"),
]


@pytest.mark.parametrize(("language", "reference", "hypothesis"), ALIKE)
def test_a_right_transcript_in_another_form_has_no_errors(language, reference, hypothesis):
    """Curly apostrophes (elizaOS/eliza#27446), Turkish İ (huggingface/transformers#6680, shreyaskarnik/argo#46),
    Romanian cedillas (common-voice/common-voice#2971), zero-width characters (cjpais/Handy#500), vowel points of Arabic
    and Hebrew (openai/whisper#2849); ellipses, digits of other scripts, Arabic letters in Persian."""
    counted = score("u", hypothesis, [reference], language)
    assert (counted.word_errors, counted.char_errors) == (0, 0)
    assert score("u", hypothesis, [reference], language, published=True).word_errors > 0


def test_vowel_signs_of_hindi_and_thai_count(tmp_path):
    """The published normaliser takes them for punctuation (kurianbenoy/whisper_normalizer#25)."""
    assert score("u", "दन", ["दिन"], "hi").word_errors == 1
    assert normalise("दिन", "hi", published=True) == "द न"
    assert score("u", "ฟา", ["ฟ้า"], "th").char_errors > 0


def test_what_is_said_otherwise_stays_an_error():
    assert score("u", "we're", ["were"], "en").word_errors > 0
    assert score("u", "sinir", ["sınır"], "tr").word_errors == 1
    assert score("u", "12", ["13"], "hi").word_errors == 1


def test_plain_english_is_compared_as_published():
    for text in ("Mr. Smith's COLOUR, um, won't cost $20!", "twenty one", "[noise] it's 3.5%, right?"):
        assert normalise(text) == normalise(text, published=True)


def test_the_audit_counts_texts_in_odd_forms_and_the_importer_mends_them(tmp_path):
    """A model that is tuned on curly apostrophes learns to write them (elizaOS/eliza#27446)."""
    table = "path,text,speaker\n0.wav,don’t,a\n1.wav,“it’s” ﬁne\u200b,b\n2.wav,plain,c\n"
    made = imported(tmp_path / "as", table)
    (finding,) = audit(made.corpus)
    assert (finding.kind, finding.severity) == ("odd-forms", "warning")
    assert "curly or other apostrophes: 2" in finding.detail
    assert any("--normalise-characters" in note for note in made.notes)
    mended = imported(tmp_path / "mended", table, normalise_characters=True)
    assert cells(mended, "text") == [("don't",), ('"it\'s" fine',), ("plain",)]
    assert audit(mended.corpus) == []


@pytest.mark.parametrize("text", ["İstanbul", "今日は、いい！", "می\u200cخواهم", "שָׁלוֹם", "¿Qué?", "Việt", "straße"])
def test_mending_changes_nothing_that_belongs_to_a_language(text):
    assert mend(text) == text
    assert odd_forms(text) == []
