"""Which class a name means."""

import numpy as np
import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.sampling.class_names import find_class, matching_labels, shown_name, slug

NAMES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Flags", "Flagpoles", "Terrier, Australian")


def test_slug():
    assert slug("Smileys & Emotion") == "smileys_and_emotion"
    assert slug("  Côte d'Or! ") == "côte_d_or"


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("Smileys & Emotion", 0),
        ("smileys", 0),
        ("NATURE", 1),
        ("food_and_drink", 2),
        ("flags", 3),
        ("australian", 5),
        ("flagp", 4),
    ],
)
def test_exact_then_unique_prefix_then_unique_part(name, index):
    assert find_class(name, NAMES) == index


def test_an_exact_name_wins_over_longer_ones():
    assert find_class("flag", ("flag", "flags")) == 0


def test_an_ambiguous_name_lists_what_it_fits():
    with pytest.raises(UserError, match="Flags, Flagpoles"):
        find_class("flag", NAMES)


@pytest.mark.parametrize(("name", "close"), [("smily", "smileys_and_emotion"), ("animels", "animals_and_nature")])
def test_an_unknown_name_gets_close_ones(name, close):
    with pytest.raises(UserError, match=close):
        find_class(name, NAMES)


def test_an_empty_name_is_no_prefix_of_everything():
    with pytest.raises(UserError, match="there is no class"):
        find_class("", NAMES)


def test_names_in_any_script():
    assert find_class("猫", ("犬", "猫")) == 1
    assert find_class("猫 1", ("犬 1", "猫 1")) == 1
    with pytest.raises(UserError, match="there is no class '!!'"):
        find_class("!!", ("犬", "猫"))


def test_names_that_differ_in_punctuation_alone_need_to_be_exact():
    assert find_class("a-b", ("a b", "a-b")) == 1
    with pytest.raises(UserError, match="fits 2 classes"):
        find_class("A_B", ("a b", "a-b"))


DOGS = ("n02085936-maltese_dog", "n02096294-australian_terrier", "n02111889-samoyed", "n02113624-toy_poodle")


@pytest.mark.parametrize(
    ("name", "index"), [("maltese", 0), ("Samoyed", 2), ("n02111889-samoyed", 2), ("toy poodle", 3)]
)
def test_wordnet_ids_do_not_count(name, index):
    assert find_class(name, DOGS) == index


def test_names_are_shown_without_wordnet_ids():
    assert [shown_name(name) for name in DOGS[:2]] == ["maltese_dog", "australian_terrier"]
    assert shown_name("n1234-thing") == "n1234-thing"
    assert shown_name("n02085936") == "maltese_dog"  # what TensorFlow Datasets and folders call ImageNet's classes
    assert shown_name("n99999999") == "n99999999"
    assert find_class("samoyed", ("n02085936", "n02111889")) == 1
    assert slug("n02096294-Australian Terrier") == "australian_terrier"


def test_labels_match_by_id_name_beginning_and_the_other_way():
    labels = (
        "n02085936 Maltese terrier",
        "Samoyed",
        "poodle, toy",
        "poodle, miniature",
        "poodle",
        "terrier",
        "samoyeds",
    )
    classes = (DOGS[0], DOGS[2], "Poodle", "terrier_of_the_north", "poodle, giant", "pug")
    expected = [[0], [1], [4], [5], [4], []]
    assert [np.flatnonzero(row).tolist() for row in matching_labels(classes, labels)] == expected
    without_the_exact_one = matching_labels(["poodle"], [*labels[:4], "terrier"])
    assert np.flatnonzero(without_the_exact_one[0]).tolist() == [2, 3]
