"""Text statistics against counts made by hand, and against the paper's own examples."""

import math

import pytest
import torch

from scoring.characteristics import characteristics, initial_probability
from scoring.errors import UserError

NURSE = "What career did Li Mei Yu's mother have? Her mother was a nurse."
NESTED = (
    "How have Leila Al-Sabah's books contributed to LGBTQ+ representation in literary fiction? Through "
    "her richly drawn characters and storylines, Leila Al-Sabah has helped to normalize LGBTQ+ "
    "experiences in literary fiction. Her books often center on LGBTQ+ protagonists, treating their "
    "identities and experiences with complexity, empathy, and realism, thereby increasing visibility "
    "and representation of the community."
)
CORPUS = [
    NURSE,
    NESTED,
    "Where was Samir Khoury born? Samir Khoury was born in Amman, Jordan.",
    "Samir Khoury, who writes in Arabic, was born in Amman; his books are read because they are kind.",
]


def test_syntax_by_hand():
    text = "Where did he live? He said that, although it rained, he walked; the dog stayed. It slept."
    (result,) = characteristics([text], CORPUS)
    # Sentences: 4 + 11 + 2 words. "Where" opens a question; "that" and "although" count: 2 in 3 sentences.
    assert result.words == 17
    assert result.subordinate_markers == pytest.approx(2 / 3)
    assert result.separators == pytest.approx(3 / 3)
    # Clauses: 3 sentences + 2 markers + 1 semicolon.
    assert result.words_per_clause == pytest.approx(17 / 6)


def test_the_complexity_index_is_standardised_over_the_corpus():
    corpus = ["One two three four.", "One, two, because three four five six seven."]
    # Markers, separators, words per clause: (0, 0, 4), (1, 2, 8/2 = 4). The third does not vary and adds 0.
    # Means 1/2 and 1, deviations 1/2 and 1: both texts are one deviation off in two of the three numbers.
    low, high = characteristics(corpus, corpus)
    assert low.syntactic_complexity == pytest.approx(-2 / 3)
    assert high.syntactic_complexity == pytest.approx(2 / 3)


def test_the_papers_examples_fall_on_the_right_side():
    simple, nested, *_ = characteristics([NURSE, NESTED], CORPUS)
    assert simple.syntactic_complexity < nested.syntactic_complexity
    assert simple.words < nested.words


def test_occurrence_by_hand():
    text = "Samir Khoury was born in Amman, Jordan."
    # Content words: samir khoury born amman jordan. The third text of the corpus, samir khoury born samir
    # khoury born amman jordan, has the first trigram twice, the second and the third once; the fourth text,
    # samir khoury writes arabic born amman books ..., has none.
    (result,) = characteristics([text], CORPUS)
    assert result.occurrence_frequency == pytest.approx((math.log(3) + 2 * math.log(2)) / 3)
    assert result.exact_repetitions == 0
    # Two content words are one bigram: "samir khoury" is there three times.
    (pair,) = characteristics(["Is he Samir Khoury?"], CORPUS)
    assert pair.occurrence_frequency == pytest.approx(math.log(4))
    (unseen,) = characteristics(["Zo Hassani Raharizafy established foundations."], CORPUS)
    assert unseen.occurrence_frequency == 0.0


def test_repetitions_ignore_case_and_punctuation():
    (result,) = characteristics([CORPUS[2].lower().replace("?", " :")], [*CORPUS, CORPUS[2]])
    assert result.exact_repetitions == 2


def test_rare_words_by_hand():
    corpus = ["the cat sat", "the cat ran", "the dog ran"]
    # Counts: the 3, cat 2, ran 2, dog 1, sat 1.
    (result,) = characteristics(["The cat's dog flew."], corpus, rare_below=2)
    assert result.rare_words == 2 / 4  # dog (1) and flew (0); "cat's" is "cat"
    (result,) = characteristics(["The cat's dog flew."], corpus, rare_below=3)
    assert result.rare_words == 3 / 4


def test_spelling_of_accents_and_apostrophes_does_not_matter():
    composed, decomposed = "Littérature d'Été", "Litte\u0301rature d’E\u0301te\u0301"
    first, second = characteristics([composed, decomposed], [composed], rare_below=1)
    assert first.exact_repetitions == second.exact_repetitions == 1
    assert first.rare_words == second.rare_words == 0.0


def test_tokens_are_counted_by_what_is_handed_in():
    assert characteristics(["a bc"], CORPUS)[0].tokens is None
    assert characteristics(["a bc"], CORPUS, count_tokens=len)[0].tokens == 4


def test_a_text_does_not_depend_on_the_texts_beside_it():
    assert characteristics([NURSE, NESTED], iter(CORPUS))[1] == characteristics([NESTED], CORPUS)[0]


def test_a_text_without_words():
    (result,) = characteristics(["?!"], CORPUS)
    assert (result.words, result.words_per_clause, result.exact_repetitions) == (0, 0.0, 0)
    assert math.isnan(result.rare_words)
    assert math.isnan(result.occurrence_frequency)
    (result,) = characteristics(["It was what it was."], CORPUS)
    assert math.isnan(result.occurrence_frequency)
    assert not math.isnan(result.rare_words)


def test_an_empty_corpus_is_an_error_of_one_line():
    for corpus in ([], ["?", ""]):
        with pytest.raises(UserError, match=r"^the reference corpus contains no words: .*$"):
            characteristics(["a"], corpus)


def test_initial_probability_by_hand():
    # Probabilities 1/2 and 1/8: geometric mean 1/4. The masked entry does not count.
    logprobs = torch.tensor([[0.5, 0.125, 0.9], [0.25, 1.0, 1.0]]).log()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert initial_probability(logprobs, mask).tolist() == pytest.approx([0.25, 0.25])
    assert initial_probability(logprobs, torch.zeros_like(mask)).isnan().all()
